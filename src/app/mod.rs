//! The wiring: what runs, in which order it starts and in which it stops.
//!
//! Start: sockets → store → codes → memory → rings of visits → back's tasks → workers → ready.
//! Stop:  not ready → wait `shutdown.drain` → workers accept no more and answer with `Connection: close` → the last
//! connection ends, or the grace is over → the look-up thread gives back leased visits of limited links → the log of visits is
//! sealed, and stored for up to `shutdown.flush` → back's tasks.

pub mod back;
pub mod opening;
pub mod site;
pub mod visits;

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use http::{HeaderValue, StatusCode};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::accept::listener::{self, Listen, Listener};
use crate::accept::{connection, worker};
use crate::api::identity::Known;
use crate::api::{self, Api};
use crate::breaker::Breaker;
use crate::config::Config;
use crate::control::{Control, Order};
use crate::domain::time::{self, UnixMillis};
use crate::guard::address::Trusted;
use crate::guard::keys::AdminKey;
use crate::guard::limits::Limiter;
use crate::http::call;
use crate::http::route::Surface;
use crate::http::{self as front, Front};
use crate::instance::{self, Core, Instance, Phase, VisitFigures};
use crate::links::worker_id::{self, InstanceId};
use crate::redis::Redis;
use crate::resolve::ask::{self, Ask};
use crate::resolve::flight;
use crate::resolve::follow::Follower;
use crate::resolve::preload::Preload;
use crate::resolve::through::Through;
use crate::resolve::tier::Remote;
use crate::resolve::value::StoredAsOf;
use crate::resolve::warm::Warm;
use crate::resolve::{Defaults, Memory, Resolver, Share};
use crate::stats::query::Stats;
use crate::store::Store;
use back::WarmFile;
use opening::{Opened, Opening};
pub use site::policy;
use visits::Visits;

/// The longest time between two ticks, in milliseconds; shorter where a limit is.
const TICK_MS_MAX: u64 = 1_000;
const TICK_MS_MIN: u64 = 20;
/// While draining, so that the last idle connections end soon.
const DRAIN_TICK_MS: u64 = 50;
/// How long a worker may take to stop after the grace.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);
/// Descriptors that are kept for the store, listeners and logs when `connections.max` is worked out.
const DESCRIPTORS_KEPT: u64 = 128;
/// The links that were asked for most, in the data folder.
const WARM_FILE: &str = "warm";
/// How long what a stopping server has to tell the store may take.
const FAREWELL: Duration = Duration::from_secs(1);
/// The embedded store reads on the look-up thread, one batch after the other.
const EMBEDDED_LOOKUPS: usize = 256;
const EMBEDDED_LOOKUP_TIMEOUT: Duration = Duration::from_secs(2);
/// Addresses and keys whose rate is remembered.
const LIMITED_MAX: usize = 100_000;

/// A server that listens.
pub struct Running {
    pub instance: Arc<Instance>,
    /// Where it listens, ports resolved.
    pub addresses: Vec<Listen>,
    pub base_url: String,
    control: Control,
    workers: Vec<std::thread::JoinHandle<()>>,
    /// The look-up thread, which ends after the workers.
    looking: std::thread::JoinHandle<()>,
    /// Dropped, it ends: a worker that hangs does not keep it.
    end_looking: oneshot::Sender<Infallible>,
    warm_file: Arc<WarmFile>,
    visits: Option<Visits>,
    flush: Duration,
    /// Its lock on the data folder lives as long.
    _id: InstanceId,
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

    let policy = Arc::new(policy(&config, &base_url).context(BadConfiguration)?);
    let warm_file = config.data.join(WARM_FILE);
    let snapshot = back::read_warm_file(&warm_file, &config, &store.describe());
    let id = worker_id::instance_id(&config.data)
        .with_context(|| format!("cannot use the file instance in {}", config.data.display()))?;
    let shared_config = Arc::new(config.clone());
    let opening =
        Opening { store: store.clone(), policy, config: Arc::clone(&shared_config), instance: id.as_str().to_owned() };
    let Opened { links, domains: numbers, at, complete } = opening.start(snapshot.as_ref()).await?;

    let cache_bytes = config.cache.memory_bytes(crate::config::memory_limit(Path::new("/")));
    let (at, followed_at) = begin(at, complete, snapshot.as_ref(), config.cache.ttl);
    let memory = Arc::new(Memory::new(cache_bytes, workers, config.cache.negative_ttl, at));
    restore(&memory, snapshot);
    let breaker = Arc::new(Breaker::new("store", config.breaker));
    let ages = (config.cache.ttl, config.cache.stale_max);
    let follower = Arc::new(Follower::new(Arc::clone(&memory), store.clone(), Arc::clone(&breaker), ages, followed_at));
    // What changed since the last run is forgotten before anybody is answered.
    follower.catch_up().await;
    vital(tokio::spawn(Arc::clone(&follower).run()));
    let redis = match &config.redis {
        Some(settings) => Some(Redis::open(settings, config.breaker).context(BadConfiguration)?),
        None => None,
    };
    if let Some(redis) = &redis {
        vital(tokio::spawn(back::remember(Arc::clone(&follower))));
        vital(tokio::spawn(back::redis_hints(redis.clone(), Arc::clone(&follower))));
    }
    if let Store::Postgres(postgres) = &store {
        vital(tokio::spawn(back::store_hints(postgres.clone(), Arc::clone(&follower))));
    }
    let (lookups_max, lookup_timeout) = config
        .postgres
        .as_ref()
        .map_or((EMBEDDED_LOOKUPS, EMBEDDED_LOOKUP_TIMEOUT), |postgres| (postgres.lookups, postgres.lookup_timeout));
    let looking_up = Arc::new(Semaphore::new(lookups_max));
    let (lookups, asked) = mpsc::channel(ask::QUESTIONS_MAX);
    let (to_workers, answers): (Vec<_>, Vec<_>) = (0..workers).map(|_| mpsc::channel(ask::ANSWERS_MAX)).unzip();
    let remote = redis.clone().map(Remote::new);
    let flight = flight::Setup {
        memory: Arc::clone(&memory),
        store: store.clone(),
        remote: remote.clone(),
        breaker: Arc::clone(&breaker),
        lookups: Arc::clone(&looking_up),
        lookup_timeout,
        answers: to_workers,
    };
    let (end_looking, end) = oneshot::channel();
    let looking = flight::spawn(flight, asked, end)?;
    let share = Share::new(looking_up, lookups_max);
    let through = remote.map(|remote| {
        let (through, run) = Through::start(Arc::clone(&memory), store.clone(), remote, share.clone());
        vital(tokio::spawn(run));
        through
    });
    let preload =
        Preload { memory: Arc::clone(&memory), store: store.clone(), share, instance: id.as_str().to_owned() };
    vital(tokio::spawn(preload.run(follower.seen())));
    vital(tokio::spawn(back::generations(follower.seen(), Arc::clone(&links))));
    vital(tokio::spawn(back::present(store.clone(), id.as_str().to_owned())));

    let cores: Vec<Core> = (0..workers).map(|_| Core::default()).collect();
    let (visits, recorders) = visits::start(&config, workers, &store, id.as_str(), follower.seen())?;
    let instance = Arc::new(Instance::new(instance::Parts {
        name: id.as_str().to_owned(),
        store: store.clone(),
        memory: Arc::clone(&memory),
        follower: Arc::clone(&follower),
        breaker,
        redis: redis.clone(),
        links: Arc::clone(&links),
        cores: cores.clone(),
        visits: Box::new({
            let (cores, standing) = (cores.clone(), visits.as_ref().map(Visits::standing));
            move || match &standing {
                Some(standing) => standing.figures(&cores),
                None => VisitFigures {
                    answered: cores.iter().map(|core| core.http.visits.answered()).sum(),
                    ..VisitFigures::default()
                },
            }
        }),
    }));
    let warm_file = Arc::new(WarmFile {
        path: warm_file,
        memory: Arc::clone(&memory),
        follower: Arc::clone(&follower),
        config: shared_config,
        store: store.describe(),
        domains: numbers.clone(),
    });
    vital(tokio::spawn(Arc::clone(&warm_file).run()));
    let shared = Arc::new(front::Shared {
        site: site::site(&config, &numbers, &base_url).context(BadConfiguration)?,
        trusted: Trusted::new(config.proxies.trusted.clone()),
        warned: false.into(),
        access_log: config.log.access,
        request_id_header: config.visits.request_id_header.clone(),
        honour_dnt: config.privacy.honour_dnt,
    });
    let (calls, called) = mpsc::channel(call::CALLS_MAX);
    let reader =
        api::stats::Reader::new(Stats::of(&store), config.stats.public || config.shorten.open, config.privacy.visitor);
    let api = Api {
        store,
        links,
        through,
        redis,
        follower,
        instance: Arc::clone(&instance),
        reader,
        front: Arc::clone(&shared),
        base_url: base_url.clone(),
        admin_key: config.admin_key.as_ref().map(|key| AdminKey::new(key.expose())).transpose()?,
        open: config.shorten.open,
        metrics_allow: config.metrics.allow.clone(),
        by_address: Limiter::new(config.limits.shorten_per_minute, None, LIMITED_MAX),
        by_key: Limiter::new(config.limits.key_per_minute, None, LIMITED_MAX),
        known: Known::default(),
    };
    vital(tokio::spawn(api::run(Arc::new(api), called)));

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
    for (((number, core), answers), recorder) in cores.iter().enumerate().zip(answers).zip(recorders) {
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
                Front::new(shared, resolver, calls, counts, recorder)
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
    let flush = config.shutdown.flush;
    let workers = threads;
    Ok(Running {
        instance,
        addresses,
        base_url,
        control,
        workers,
        looking,
        end_looking,
        warm_file,
        visits,
        flush,
        _id: id,
        tick,
        started,
    })
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
        // It gives back the visits of limited links that it has leased, also when a worker hangs.
        drop(self.end_looking);
        let joined = tokio::task::spawn_blocking(move || self.looking.join());
        if tokio::time::timeout(flight::SETTLE_TIMEOUT + STOP_TIMEOUT, joined).await.is_err() {
            tracing::error!("the look-up thread does not end");
        }
        // Nothing is recorded any more.
        if let Some(visits) = self.visits {
            let _ = tokio::task::spawn_blocking(move || visits.close(self.flush)).await;
        }
        // What it remembers outlives it, and nobody waits for an answer of it any more.
        self.warm_file.write().await;
        if tokio::time::timeout(FAREWELL, self.instance.leave()).await.is_err() {
            tracing::warn!("the store was not told that this instance ends");
        }
        clean
    }

    fn open(&self) -> u64 {
        self.instance.cores().map(|core| core.accept.open.get()).sum()
    }

    fn tell_time(&self) -> u64 {
        let ms = millis(time::monotonic().saturating_duration_since(self.started));
        self.control.tell(Order::Tick { ms });
        self.instance.note(time::now());
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

/// Where memory begins, and when the store was last known to be as it is then, by both clocks.
fn begin(
    at: StoredAsOf,
    complete: bool,
    snapshot: Option<&Warm>,
    ttl: Duration,
) -> (StoredAsOf, (std::time::Instant, UnixMillis)) {
    let (now, now_ms) = (time::monotonic(), time::now());
    match snapshot.map(|snapshot| &snapshot.about) {
        // It goes on where the last run stopped: the feed tells what changed since.
        Some(about) if !complete || about.as_of.generation == at.generation => {
            let age_ms = u64::try_from(now_ms.0 - about.followed_at.0).unwrap_or(0);
            let then = now.checked_sub(Duration::from_millis(age_ms)).unwrap_or(now);
            (about.as_of, (then, about.followed_at))
        }
        _ if complete => (at, (now, now_ms)),
        // There is nothing in memory that could be stale, and nobody has confirmed it.
        _ => (at, (now.checked_sub(ttl + Duration::from_secs(1)).unwrap_or(now), UnixMillis(0))),
    }
}

/// Puts the links of the last run into memory, if it begins where they were taken.
fn restore(memory: &Memory, snapshot: Option<Warm>) {
    let Some(snapshot) = snapshot else { return };
    let as_of = memory.feed.now();
    if as_of.stored != snapshot.about.as_of {
        return;
    }
    // The most asked for come last into the log of the shards, and so are the last to give way.
    for (key, entry) in snapshot.entries.iter().rev() {
        let _ = memory.keep(memory.hash(key), key, entry, as_of);
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
