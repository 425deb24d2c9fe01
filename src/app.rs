//! The wiring: what runs, in which order it starts and in which it stops.
//!
//! Start: store → codes → memory → back's tasks → sockets → workers → ready.
//! Stop:  not ready → wait `shutdown.drain` → workers accept no more and answer with `Connection: close` → the last
//! connection ends, or the grace is over → back's tasks.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use http::{HeaderValue, StatusCode};
use tokio::sync::{mpsc, oneshot};

use crate::accept::listener::{self, Listen, Listener};
use crate::accept::{connection, worker};
use crate::api::{self, Api};
use crate::codes::Strategy;
use crate::config::Config;
use crate::control::{Control, Order};
use crate::domain::key::DomainId;
use crate::domain::target::Target;
use crate::domain::time;
use crate::guard::address::Trusted;
use crate::guard::keys::AdminKey;
use crate::guard::limits::Limiter;
use crate::guard::targets::{Blocklist, Policy};
use crate::http::call;
use crate::http::route::Surface;
use crate::http::site::{DomainSite, Page, Pages, Site};
use crate::http::{self as front, Front};
use crate::instance::{Core, Instance, Phase};
use crate::links::Links;
use crate::links::worker_id::{self, InstanceId, WorkerId};
use crate::resolve::ask::{self, Ask};
use crate::resolve::flight::{self, Flight};
use crate::resolve::follow::Follower;
use crate::resolve::{Defaults, Memory, Resolver, header_value};
use crate::store::Store;

/// The longest time between two ticks, in milliseconds; shorter where a limit is.
const TICK_MS_MAX: u64 = 1_000;
const TICK_MS_MIN: u64 = 20;
/// While draining, so that the last idle connections end soon.
const DRAIN_TICK_MS: u64 = 50;
/// How long a worker may take to stop after the grace.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);
/// Descriptors that are kept for the store, listeners and logs when `connections.max` is worked out.
const DESCRIPTORS_KEPT: u64 = 128;
/// Addresses and keys whose rate is remembered.
const LIMITED_MAX: usize = 100_000;
const PAGE_BYTES_MAX: u64 = 1 << 20;

/// A server that listens.
pub struct Running {
    pub instance: Arc<Instance>,
    /// Where it listens, ports resolved.
    pub addresses: Vec<Listen>,
    pub base_url: String,
    /// Its lock on the data folder lives as long.
    _id: InstanceId,
    links: Arc<Links>,
    control: Control,
    workers: Vec<std::thread::JoinHandle<()>>,
    tick: Duration,
    started: Instant,
}

/// Starts a server on `store`; every worker accepts when it returns.
pub async fn start(config: Config, store: Store) -> anyhow::Result<Running> {
    let started = time::monotonic();
    let workers = match config.workers.count {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        count => count,
    };
    let mut shares = listeners(&config, workers)?;
    let mut addresses: Vec<Listen> = Vec::new();
    for listener in shares.iter().flatten() {
        if !addresses.contains(&listener.listen) {
            addresses.push(listener.listen);
        }
    }
    let base_url = base_url(&config, &shares);

    let hosts: Vec<String> = config.domains.iter().map(|domain| domain.host.clone()).collect();
    let numbers = store.number_domains(hosts).await?;
    let policy = Arc::new(policy(&config, &base_url).context(BadConfiguration)?);
    let id = worker_id::instance_id(&config.data)
        .with_context(|| format!("cannot use the file instance in {}", config.data.display()))?;
    let worker_id = match config.codes.strategy {
        Strategy::Snowflake => {
            let leased = Arc::new(WorkerId::lease(store.clone(), id.as_str().to_owned(), &config.codes).await?);
            let keeper = Arc::clone(&leased);
            vital(tokio::spawn(async move { keeper.run().await }));
            Some(leased)
        }
        Strategy::Random | Strategy::Permuted => None,
    };
    let links = Arc::new(Links::open(store.clone(), policy, config.codes.clone(), worker_id).await?);
    let cache_bytes = config.cache.memory_bytes(crate::config::memory_limit(Path::new("/")));
    let position = store.position().await?.version;
    let memory = Arc::new(Memory::new(cache_bytes, workers, config.cache.negative_ttl, position));
    let follower =
        Arc::new(Follower::new(Arc::clone(&memory), store.clone(), config.cache.ttl, config.cache.stale_max));
    vital(tokio::spawn(Arc::clone(&follower).run()));
    let (lookups, asked) = mpsc::channel(ask::QUESTIONS_MAX);
    let (to_workers, answers): (Vec<_>, Vec<_>) = (0..workers).map(|_| mpsc::channel(ask::ANSWERS_MAX)).unzip();
    flight::spawn(Flight::new(Arc::clone(&memory), store.clone(), to_workers), asked)?;

    let cores: Vec<Core> = (0..workers).map(|_| Core::default()).collect();
    let instance = Arc::new(Instance::new(store.clone(), Arc::clone(&memory), Arc::clone(&follower), cores.clone()));
    let (calls, called) = mpsc::channel(call::CALLS_MAX);
    let api = Api {
        store,
        links: Arc::clone(&links),
        follower,
        instance: Arc::clone(&instance),
        base_url: base_url.clone(),
        admin_key: config.admin_key.as_ref().map(|key| AdminKey::new(key.expose())).transpose()?,
        open: config.shorten.open,
        metrics_allow: config.metrics.allow.clone(),
        by_address: Limiter::new(config.limits.shorten_per_minute, None, LIMITED_MAX),
        by_key: Limiter::new(config.limits.key_per_minute, None, LIMITED_MAX),
    };
    vital(tokio::spawn(api::run(Arc::new(api), called)));

    let shared = Arc::new(front::Shared {
        site: site(&config, &numbers, &base_url).context(BadConfiguration)?,
        trusted: Trusted::new(config.proxies.trusted.clone()),
        warned: false.into(),
        access_log: config.log.access,
    });
    let defaults = Defaults {
        status: StatusCode::from_u16(config.redirect.status)?,
        cache_control: uncounted(&config.redirect.cache_control)?,
        permanent_cache_control: uncounted(&config.redirect.permanent_cache_control)?,
        forward_query: config.redirect.forward_query,
    };
    let limits = connection::Limits {
        header_ms: millis(config.connections.header_timeout),
        idle_ms: millis(config.connections.idle_timeout),
    };
    let watchdog_ms = sd_notify::watchdog_enabled().map_or(u64::MAX, millis);
    let tick_ms = (limits.header_ms.min(limits.idle_ms).min(watchdog_ms) / 4).clamp(TICK_MS_MIN, TICK_MS_MAX);
    let connections_max = config.connections.max.unwrap_or_else(connections_by_nofile).div_ceil(workers).max(1);
    let mut control = Control::default();
    let (mut threads, mut accepting) = (Vec::new(), Vec::new());
    for ((number, core), answers) in cores.iter().enumerate().zip(answers) {
        let (ready, accepts) = oneshot::channel();
        let counts = Arc::clone(&core.http);
        let (memory, lookups, defaults) = (Arc::clone(&memory), lookups.clone(), defaults.clone());
        let (shared, calls) = (Arc::clone(&shared), calls.clone());
        threads.push(worker::spawn(worker::Setup {
            number,
            listeners: std::mem::take(&mut shares[number]),
            orders: control.add_worker(),
            front: Box::new(move || {
                let resolver = Resolver::new(memory, Ask::new(number, lookups, answers), defaults);
                Front::new(shared, resolver, calls, counts)
            }),
            counts: Arc::clone(&core.accept),
            limits,
            connections_max,
            ready,
        })?);
        accepting.push(accepts);
    }
    for accepts in accepting {
        accepts.await.context("a worker ended before it accepted")?;
    }
    instance.enter(Phase::Serving);
    let tick = Duration::from_millis(tick_ms);
    Ok(Running { instance, addresses, base_url, _id: id, links, control, workers: threads, tick, started })
}

impl Running {
    /// Serves until `stop` comes; then says so for `drain`, accepts no more and ends its connections for at most
    /// `grace`. Every worker has ended when it returns; true if each of its connections had ended before.
    pub async fn serve(self, stop: impl Future<Output = ()>, drain: Duration, grace: Duration) -> bool {
        let mut stop = std::pin::pin!(stop);
        let mut ticks = tokio::time::interval(self.tick);
        let mut watchdog = Watchdog::new();
        loop {
            tokio::select! {
                () = &mut stop => break,
                _ = ticks.tick() => {
                    let ms = self.tell_time();
                    watchdog.feed(ms, self.instance.cores());
                }
            }
        }
        self.instance.enter(Phase::Draining);
        notify(&[sd_notify::NotifyState::Stopping]);
        tracing::info!(connections = self.open(), "draining");
        let begun = time::monotonic();
        let mut ticks = tokio::time::interval(Duration::from_millis(DRAIN_TICK_MS));
        while !self.control.is_over() {
            ticks.tick().await;
            let waited = time::monotonic().saturating_duration_since(begun);
            if waited >= drain + grace {
                break;
            }
            if waited >= drain {
                // Again with each tick: a worker that was busy may have missed it.
                self.control.tell(Order::Drain);
            }
            self.tell_time();
        }
        let clean = self.control.is_over();
        if !clean {
            tracing::warn!(connections = self.open(), "the grace is over: closing what is left");
        }
        // A worker stops when nobody can tell it anything any more; one that hangs is not waited for.
        drop(self.control);
        for worker in self.workers {
            let joined = tokio::task::spawn_blocking(move || worker.join());
            if tokio::time::timeout(STOP_TIMEOUT, joined).await.is_err() {
                tracing::error!("a worker does not end");
            }
        }
        self.links.close().await;
        clean
    }

    fn open(&self) -> u64 {
        self.instance.cores().map(|core| core.accept.open.get()).sum()
    }

    fn tell_time(&self) -> u64 {
        let ms = millis(time::monotonic().saturating_duration_since(self.started));
        self.control.tell(Order::Tick { ms });
        ms
    }
}

/// Tells systemd that the server lives while every worker follows its ticks.
struct Watchdog {
    interval_ms: Option<u64>,
    fed_ms: u64,
}

impl Watchdog {
    fn new() -> Self {
        Self { interval_ms: sd_notify::watchdog_enabled().map(millis), fed_ms: 0 }
    }

    fn feed<'a>(&mut self, now_ms: u64, mut cores: impl Iterator<Item = &'a Core>) {
        let Some(interval_ms) = self.interval_ms else { return };
        // Twice in each interval, as sd_watchdog_enabled(3) recommends.
        if now_ms < self.fed_ms + interval_ms / 2 {
            return;
        }
        if cores.all(|core| core.accept.heartbeat_ms.get() + interval_ms / 2 >= now_ms) {
            self.fed_ms = now_ms;
            notify(&[sd_notify::NotifyState::Watchdog]);
        }
    }
}

/// A task without which the server only looks well: the process ends with it.
fn vital(task: tokio::task::JoinHandle<()>) {
    tokio::spawn(async move {
        if task.await.is_err_and(|error| error.is_panic()) {
            std::process::abort();
        }
    });
}

/// A panic ends the process, but for one in a request of the API: that request alone is lost. A core that serves
/// nobody while its socket still queues connections, a look-up thread or a writer that is gone: each is worse than a
/// restart.
pub fn abort_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        if std::thread::current().name() != Some(BACK) {
            std::process::abort();
        }
    }));
}

/// The name of back's threads.
pub const BACK: &str = "waypost-back";

/// Without systemd there is nobody to tell.
pub fn notify(state: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd could not be told");
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The same value without a count of its users: every hit of every core takes one, and a count would be a cache line
/// that all of them write. It is never freed; there are two in a process.
fn uncounted(value: &HeaderValue) -> anyhow::Result<HeaderValue> {
    Ok(HeaderValue::from_static(String::leak(value.to_str()?.to_owned())))
}

/// Sockets for each worker: those that were passed, or new ones.
fn listeners(config: &Config, workers: usize) -> anyhow::Result<Vec<Vec<Listener>>> {
    let surface = if config.api.listen.is_some() { Surface::Public } else { Surface::Everything };
    let mut wanted: Vec<Listen> = config
        .listen
        .iter()
        .map(|listen| Listen { address: listen.address, proxy_protocol: listen.proxy_protocol, surface })
        .collect();
    wanted.extend(config.api.listen.map(|address| Listen { address, proxy_protocol: false, surface: Surface::Api }));
    let passed = listener::take_passed(&wanted, surface).context("a passed socket cannot be used")?;
    if !passed.is_empty() {
        check_passed(config, &passed).context(BadConfiguration)?;
        return Ok(listener::share_out(passed, workers)?);
    }
    let mut shares: Vec<Vec<Listener>> = (0..workers).map(|_| Vec::new()).collect();
    for listen in wanted {
        let bound = listener::bind(listen, workers).with_context(|| {
            format!(
                "cannot listen on {}: is another server there? choose another address with --listen",
                listen.address
            )
        })?;
        for (share, listener) in shares.iter_mut().zip(bound) {
            share.push(listener);
        }
    }
    Ok(shares)
}

/// What the configuration could not check before the sockets were there.
fn check_passed(config: &Config, passed: &[Listener]) -> anyhow::Result<()> {
    let addresses: Vec<_> = passed.iter().map(|listener| listener.listen.address).collect();
    if let Some(api) = config.api.listen {
        anyhow::ensure!(
            addresses.contains(&api),
            "api.listen is {api}, and no passed socket is: add it to the socket unit"
        );
    }
    let unknown = |listener: &&Listener| config.listen.iter().all(|listen| listen.address != listener.listen.address);
    let reached = passed
        .iter()
        .filter(unknown)
        .find(|listener| listener.listen.surface == Surface::Everything && !listener.listen.address.ip().is_loopback());
    if let (true, Some(listener)) = (config.shorten.open, reached) {
        let address = listener.listen.address;
        anyhow::bail!(
            "shorten.open lets everybody shorten on the passed socket {address}: name it in [[listen]] and start with --yes"
        );
    }
    Ok(())
}

/// The configuration cannot be used: the process ends with 78.
#[derive(Debug, thiserror::Error)]
#[error("bad configuration")]
pub struct BadConfiguration;

/// `base_url`, or the first listener that serves links.
fn base_url(config: &Config, shares: &[Vec<Listener>]) -> String {
    if let Some(url) = &config.base_url {
        return url.as_str().trim_end_matches('/').to_owned();
    }
    let first = shares.iter().flatten().find(|listener| listener.listen.surface != Surface::Api);
    match first.map(|listener| listener.listen.address) {
        Some(address) => format!("http://{}", listener::reachable(address)),
        None => String::new(),
    }
}

/// The rules of targets: what the configuration says, and no link to ourselves.
pub fn policy(config: &Config, base_url: &str) -> anyhow::Result<Policy> {
    let targets = &config.targets;
    let blocklist = targets.blocklist.clone().map(|path| Blocklist::open(path, time::now())).transpose()?;
    let mut own: Vec<String> = targets.own_hosts.clone();
    own.extend(config.domains.iter().map(|domain| domain.host.clone()));
    if let Ok(url) = url::Url::parse(base_url)
        && let Some(host) = url.host()
    {
        // Another port of a machine is another service; a name of ours is ours.
        own.push(match (host, url.port_or_known_default()) {
            (url::Host::Domain(name), _) if name != "localhost" => name.to_owned(),
            (host, Some(port)) => format!("{host}:{port}"),
            (host, None) => host.to_string(),
        });
    }
    Ok(Policy::new(&targets.schemes, targets.max_bytes, blocklist, &own, targets.lookalikes)?)
}

fn site(config: &Config, numbers: &[DomainId], base_url: &str) -> anyhow::Result<Site> {
    let value = |target: &Option<Target>| target.clone().map(header_value);
    let redirect = &config.redirect;
    let default_domain = DomainSite {
        id: DomainId::default(),
        root_url: value(&redirect.root_url),
        not_found_url: value(&redirect.not_found_url),
        gone_url: value(&redirect.gone_url),
    };
    let mut domains: HashMap<String, DomainSite, _> = HashMap::default();
    if !config.domains.is_empty()
        && let Ok(url) = url::Url::parse(base_url)
        && let Some(host) = url.host_str()
    {
        domains.insert(host.to_owned(), default_domain.clone());
    }
    for (domain, id) in config.domains.iter().zip(numbers) {
        let site = DomainSite {
            id: *id,
            root_url: value(&domain.root_url),
            not_found_url: value(&domain.not_found_url),
            gone_url: value(&domain.gone_url),
        };
        domains.insert(domain.host.clone(), site);
    }
    let pages = match &config.pages.dir {
        Some(dir) => read_pages(dir).with_context(|| format!("pages.dir: cannot read {}", dir.display()))?,
        None => Pages::default(),
    };
    Ok(Site { case: config.codes.case, default_domain, domains, pages })
}

/// Reads the site's files once: no request ever waits for a disk.
fn read_pages(dir: &Path) -> anyhow::Result<Pages> {
    let mut pages = Pages::default();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            let name = path.strip_prefix(dir)?.to_string_lossy().into_owned();
            if path.is_dir() {
                if name == ".well-known" || name.starts_with(".well-known/") {
                    folders.push(path);
                }
                continue;
            }
            let length = std::fs::metadata(&path)?.len();
            anyhow::ensure!(
                length <= PAGE_BYTES_MAX,
                "{} has {length} bytes, at most {PAGE_BYTES_MAX} fit",
                path.display()
            );
            let page = Page { content_type: content_type(&name), bytes: Bytes::from(std::fs::read(&path)?) };
            match name.as_str() {
                "index.html" => pages.home = Some(page),
                "404.html" => pages.missing = Some(page),
                "410.html" => pages.gone = Some(page),
                "robots.txt" | "favicon.ico" => drop(pages.files.insert(name, page)),
                _ if name.starts_with(".well-known/") => drop(pages.files.insert(name, page)),
                _ => tracing::warn!(file = name, "pages.dir has a file that is not served"),
            }
        }
    }
    Ok(pages)
}

fn content_type(name: &str) -> HeaderValue {
    HeaderValue::from_static(match name.rsplit_once('.').map(|(_, ending)| ending) {
        Some("html") => "text/html; charset=utf-8",
        Some("txt") => "text/plain; charset=utf-8",
        Some("json") => "application/json",
        Some("ico") => "image/x-icon",
        _ => "application/octet-stream",
    })
}

/// What the limit of open files leaves for connections.
fn connections_by_nofile() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(1 << 20);
    usize::try_from(limit.saturating_sub(DESCRIPTORS_KEPT).max(16)).unwrap_or(usize::MAX)
}

/// The allocator asks for huge pages where the kernel lets it. Each first touch then costs 2 MiB: an idle connection held
/// 24 KiB instead of 15, and an export grew by 8 MiB (PERF.md).
pub fn refuse_huge_pages() {
    if let Err(error) = rustix::thread::disable_transparent_huge_pages(true) {
        tracing::warn!(%error, "the kernel may use huge pages: memory grows in steps of 2 MiB");
    }
}

/// Raises the limit of open files as far as the process may.
pub fn raise_nofile() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    if rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).is_err() {
        tracing::warn!("the limit of open files stays as it is");
    }
}
