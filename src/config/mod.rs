//! The checked configuration.
//!
//! In: a file, the environment, flags, each as an argument. Out: a [`Config`] that cannot be wrong, with a struct for
//! each station, and where each value came from; or all errors at once, each with its place, its key, the limit and the
//! way out.
//! Never: reads the process' environment or the clock, binds, resolves a name, keeps an unknown key to itself, shows a
//! secret.
//! At the limit: a file of more than `load::FILE_BYTES_MAX` is refused, as is every number past the limit that `keys`
//! names.
//!
//! `keys` is the table of all keys, `units` reads durations and sizes, `load` puts the layers together and checks them.

pub mod keys;
pub mod load;
pub mod units;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use http::HeaderValue;
use ipnet::IpNet;

use crate::codes::{Alphabet, Strategy};
use crate::domain::key::Case;
use crate::domain::target::Target;
use crate::guard::targets::Lookalikes;

/// What a cache takes when the memory limit allows it, in bytes.
const CACHE_MEMORY_MAX: u64 = 1 << 30;
/// What a cache takes when no memory limit can be read, in bytes.
const CACHE_MEMORY_UNKNOWN: u64 = 256 << 20;

#[derive(Clone, Debug)]
pub struct Config {
    /// What short URLs begin with, `http` or `https`, without a trailing slash. None (default) = `http://` and the
    /// first listener, whose port may be known only once it is bound.
    pub base_url: Option<Target>,
    /// Folder of the store, the spool and `admin.key`; `./waypost-data` by default.
    pub data: PathBuf,
    /// An admin key beside those in the store; none by default.
    pub admin_key: Option<Secret>,
    /// At least one, all different (but for port 0); `127.0.0.1:8080` by default.
    pub listen: Vec<Listen>,
    pub workers: Workers,
    pub connections: Connections,
    /// None by default: every Host is domain 0. With some, an unlisted Host is 404.
    pub domains: Vec<Domain>,
    pub redirect: Redirect,
    pub pages: Pages,
    pub api: Api,
    pub metrics: Metrics,
    /// None (default) = the embedded store in [`Config::data`].
    pub postgres: Option<Postgres>,
    /// None (default) = no Redis.
    pub redis: Option<Redis>,
    pub breaker: Breaker,
    pub cache: Cache,
    pub codes: Codes,
    pub shorten: Shorten,
    pub limits: Limits,
    pub targets: Targets,
    pub proxies: Proxies,
    pub spool: Spool,
    pub visits: Visits,
    pub stats: Stats,
    pub privacy: Privacy,
    pub log: Log,
    pub shutdown: Shutdown,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Port 0 = any free one.
    pub address: SocketAddr,
    /// Every connection begins with a PROXY protocol header; one without is refused. Default: false, such a header is
    /// refused.
    pub proxy_protocol: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workers {
    /// Threads of the front; 0 (default) = cores.
    pub count: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connections {
    /// Connections at once, over all workers; none (default) = as many as the limit of open files allows.
    pub max: Option<usize>,
    /// From a request's first byte to the end of its head, 1 ms or more; 5 s by default, then the connection is closed.
    pub header_timeout: Duration,
    /// Without a request, 1 ms or more; 75 s by default, then the connection is closed.
    pub idle_timeout: Duration,
}

/// A host with codes of its own. Its URLs are those of [`Redirect`] where it names none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// Lower-case ASCII (IDNA, as the WHATWG URL standard parses hosts), without port and trailing dot; unique.
    pub host: String,
    /// Where `/` leads.
    pub root_url: Option<Target>,
    /// Where unknown codes lead.
    pub not_found_url: Option<Target>,
    /// Where links that are over lead.
    pub gone_url: Option<Target>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// Of links that name none: one of `domain::link::STATUSES`; 307 by default.
    pub status: u16,
    /// Of 302, 303 and 307; `private, max-age=0` by default: a visit that a browser answers itself is not counted.
    pub cache_control: HeaderValue,
    /// Of 301 and 308; `private, max-age=90` by default: so long an edit does not reach who has been there.
    pub permanent_cache_control: HeaderValue,
    /// Whether a visitor's query is added to the target, where the link says nothing; true by default.
    pub forward_query: bool,
    /// Where `/` leads; none (default) = a short page.
    pub root_url: Option<Target>,
    /// Where unknown codes lead; none (default) = a 404 page.
    pub not_found_url: Option<Target>,
    /// Where links that are over lead; none (default) = a 410 page.
    pub gone_url: Option<Target>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pages {
    /// Folder of `index.html`, `404.html`, `410.html`, `.well-known`; none (default) = the built-in pages.
    pub dir: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Api {
    /// A listener for the API, its docs and the metrics alone, none of [`Config::listen`]; none (default) = the same
    /// port.
    pub listen: Option<SocketAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metrics {
    /// Peers that read `/metrics` without a key; loopback and private ones by default.
    pub allow: Vec<Peers>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peers {
    Loopback,
    /// RFC 1918 and RFC 4193.
    Private,
    Net(IpNet),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Postgres {
    /// `postgres://user:password@host:port/database?sslmode=verify-full&sslrootcert=FILE`.
    pub url: ServiceUrl,
    /// A standby that lists and exports are read from; none by default.
    pub replica_url: Option<ServiceUrl>,
    /// A standby further behind is not read; 2 s by default.
    pub replica_max_lag: Duration,
    /// Past a pooler in transaction mode, for what needs a session (LISTEN); none (default) = [`Postgres::url`], if
    /// statements are prepared.
    pub direct_url: Option<ServiceUrl>,
    /// A role that owns the tables; none (default) = [`Postgres::direct_url`] or [`Postgres::url`].
    pub migrate_url: Option<ServiceUrl>,
    /// Auto by default.
    pub migrate: Migrate,
    /// Connections, 2 to 1,000; 8 by default.
    pub pool: usize,
    /// How long a request waits for one of them; 1 s by default.
    pub pool_timeout: Duration,
    /// A connection is replaced after this time; 1 h by default.
    pub max_lifetime: Duration,
    /// Codes that are looked up at once, 4 to 10,000; 32 by default. Warming takes at most a quarter of them.
    pub lookups: usize,
    /// How long a look-up may take, its wait for others included; 250 ms by default, then it is a 503.
    pub lookup_timeout: Duration,
    /// Prepared by default.
    pub statements: Statements,
    /// 2 s by default.
    pub connect_timeout: Duration,
    /// 2 s by default.
    pub statement_timeout: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Migrate {
    /// `serve` brings the schema up to date.
    Auto,
    /// `serve` refuses an old schema.
    Check,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statements {
    /// Parsed and planned once a connection.
    Prepared,
    /// Each time anew, for poolers that give every transaction another connection.
    Unnamed,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redis {
    /// `redis://`, `rediss://`, `redis+unix:///path`; `redis+cluster://` and `rediss+cluster://` with nodes separated by
    /// commas; `redis+sentinel://sentinel,sentinel/name` and `rediss+sentinel://`.
    pub url: ServiceUrl,
    /// PEM of the authorities that a server's certificate is checked with; none (default) = the system's.
    pub ca_file: Option<PathBuf>,
    /// How long a command may take; 20 ms by default.
    pub timeout: Duration,
    /// How long a link stays; 10 min by default, less up to a tenth.
    pub ttl: Duration,
    /// What every key and channel begins with; `waypost:` by default.
    pub prefix: String,
}

/// When a dependency that fails is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Breaker {
    /// Failures in a row, 1 to 1,000; 5 by default.
    pub failures: u32,
    /// Then nothing is asked for this time; 10 s by default.
    pub recovery: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache {
    /// Bytes that cached links may take; none (default) = by the memory limit, see [`Cache::memory_bytes`].
    pub memory: Option<u64>,
    /// How long an entry is fresh without news from the store; 60 s by default.
    pub ttl: Duration,
    /// How long a code is remembered as unknown; 2 s by default.
    pub negative_ttl: Duration,
    /// How long an entry is served after it was fresh, while the store is away; 24 h by default.
    pub stale_max: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Codes {
    /// Random by default.
    pub strategy: Strategy,
    /// Characters of a random code, 4 to 32; 7 by default. Permuted ones are as short as can be.
    pub length: usize,
    /// Base 62 by default; fixed when a store is made.
    pub alphabet: Alphabet,
    /// Sensitive by default, insensitive with base 36 alone; fixed when a store is made.
    pub case: Case,
    /// Of snowflakes, 0 to 1,023; none (default) = one that is free.
    pub worker_id: Option<u16>,
    /// How long a worker id is leased, 1 s to 1 h; 60 s by default.
    pub worker_lease: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shorten {
    /// Anybody may shorten and read stats; false by default.
    pub open: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// What an address without a key may shorten in a minute; 10 by default, 0 = no limit.
    pub shorten_per_minute: u32,
    /// Requests of a key in a minute, admin keys excepted; 1,000 by default, 0 = no limit.
    pub key_per_minute: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Targets {
    /// At least one, in lower case; http and https by default.
    pub schemes: Vec<String>,
    /// Bytes, as written and as serialised, 1 to 32,768; 2,048 by default.
    pub max_bytes: usize,
    /// File of hosts that no target may have; none by default. It is not read here.
    pub blocklist: Option<PathBuf>,
    /// Hosts that lead here beside `base_url` and the domains, `host` or `host:port`, as the WHATWG URL standard
    /// serialises hosts; none by default.
    pub own_hosts: Vec<String>,
    /// Flag by default.
    pub lookalikes: Lookalikes,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxies {
    /// Peers whose forwarding headers are believed; none by default: a client's address is its socket's.
    pub trusted: Vec<IpNet>,
}

/// Visits between their redirect and the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spool {
    /// Folder of the rings, a tmpfs that outlives the process; none (default) = systemd's runtime directory, else
    /// `/dev/shm`.
    pub ring: Option<PathBuf>,
    /// Bytes of each core's ring, 256 KiB to 1 GiB, a multiple of 4 KiB; 4 MiB by default.
    pub ring_size: u64,
    /// Folder of the log; none (default) = `spool` in [`Config::data`].
    pub dir: Option<PathBuf>,
    /// Bytes of a segment of the log, 1 MiB to 1 GiB; 8 MiB by default.
    pub segment: u64,
    /// How often the log is synced, and so what a loss of power may cost; 200 ms by default.
    pub sync: Duration,
    /// Bytes of the log, at least 4 segments, and never more than a fifth of the free disk; 8 GiB by default. Then visits
    /// are given up.
    pub max_bytes: u64,
    /// How long what is stored stays in the log, to fill the hole that a failover leaves; 15 min by default.
    pub keep: Duration,
    /// At most this many bytes of it; 1 GiB by default.
    pub keep_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Visits {
    /// How long single visits are kept, a day or more; totals stay. 90 d by default.
    pub keep: Duration,
    /// Whether single visits are kept at all, or totals alone; true by default.
    pub raw: bool,
    /// Whether visits are recorded and stored (`sinks = ["store"]`, the default), or only counted by the process (`[]`).
    pub recorded: bool,
    /// The header with a request's id, taken from trusted peers alone; `X-Request-Id` by default, none = no ids.
    pub request_id_header: Option<http::HeaderName>,
    /// Separate by default.
    pub bots: Bots,
    /// File of more patterns of bots, a regular expression a line; none by default. It is not read here.
    pub bot_list: Option<PathBuf>,
    /// Agents, and referrers, that are new in a day, 100 to 10,000,000; 100,000 by default. Of what is past it only the
    /// family, or the host, is kept.
    pub agents_per_day: usize,
}

/// What becomes of visits of declared bots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bots {
    /// They stand beside the clicks.
    Separate,
    /// They are clicks.
    Count,
    /// They are not stored.
    Drop,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Anybody may read them; false by default.
    pub public: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Privacy {
    /// Truncated by default.
    pub address: KeptAddress,
    /// Deployment by default.
    pub visitor: VisitorKey,
    /// Of those who send `DNT: 1` or `Sec-GPC: 1` nothing but the click is kept; false by default.
    pub honour_dnt: bool,
}

/// What is kept of a visitor's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptAddress {
    /// Without the last octet, or the last 80 bits.
    Truncated,
    Full,
    Nothing,
}

/// Which key tells visitors apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VisitorKey {
    /// One for ever: visitors of several days are true unions.
    Deployment,
    /// A new one each day (UTC), the old one is forgotten: days are added up.
    Daily,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// JSON by default.
    pub format: LogFormat,
    /// Info by default.
    pub level: tracing::Level,
    /// A line for each request; false by default.
    pub access: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Json,
    Text,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shutdown {
    /// From SIGTERM on, `/readyz` says 503 and connections are still accepted for this time; 0 by default.
    pub drain: Duration,
    /// After that, what is in flight has this time to end; 10 s by default.
    pub grace: Duration,
    /// Then, what is pending of visits is stored for this long, if the store answers; 5 s by default.
    pub flush: Duration,
}

/// The address of a service, which may have a password in it; what is shown has none.
#[derive(Clone, PartialEq, Eq)]
pub struct ServiceUrl(String);

impl ServiceUrl {
    #[must_use]
    pub fn new(url: String) -> Self {
        Self(url)
    }

    /// With the password: to connect with it, and for nothing else.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// What is between the scheme and the last `@` of all: a password that was not percent-encoded may have every other
    /// sign that would end it.
    fn credentials(&self) -> Option<std::ops::Range<usize>> {
        let start = self.0.find("://")? + 3;
        Some(start..start + self.0[start..].rfind('@')?)
    }

    #[must_use]
    pub fn has_credentials(&self) -> bool {
        self.credentials().is_some() || self.0.contains("password=")
    }
}

/// Without user and password.
impl fmt::Display for ServiceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = match self.credentials() {
            Some(range) => format!("{}(hidden){}", &self.0[..range.start], &self.0[range.end..]),
            None => self.0.clone(),
        };
        // A parameter may be the password too; what follows the address says nothing to a person.
        f.write_str(url.split('?').next().unwrap_or_default())
    }
}

impl fmt::Debug for ServiceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that no message, log line or print shows.
#[derive(Clone)]
pub struct Secret(String);

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum BadSecret {
    #[error("has {0} bytes: it must have from {min} to {max}", min = Secret::BYTES_MIN, max = Secret::BYTES_MAX)]
    Length(usize),
    #[error(
        "has a space, a control character or one outside of ascii: it must be visible ascii, as it travels in a header"
    )]
    Character,
}

impl Secret {
    const BYTES_MIN: usize = 20;
    const BYTES_MAX: usize = 256;

    /// 20 to 256 bytes, all of them visible ASCII: a key travels in a header. The error never shows the text.
    fn new(text: String) -> Result<Self, BadSecret> {
        if !(Self::BYTES_MIN..=Self::BYTES_MAX).contains(&text.len()) {
            return Err(BadSecret::Length(text.len()));
        }
        if text.bytes().all(|byte| byte.is_ascii_graphic()) { Ok(Self(text)) } else { Err(BadSecret::Character) }
    }

    /// For the comparison alone.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

impl Cache {
    /// Bytes that cached links may take: what is configured, else a quarter of `limit` (see [`memory_limit`]), at most
    /// 1 GiB; 256 MiB where no limit is known.
    #[must_use]
    pub fn memory_bytes(&self, limit: Option<u64>) -> u64 {
        self.memory.unwrap_or_else(|| limit.map_or(CACHE_MEMORY_UNKNOWN, |limit| (limit / 4).min(CACHE_MEMORY_MAX)))
    }
}

/// Bytes of memory that this process may use: the least of the machine's and the limits of its control group and of all
/// groups above it (cgroup v2 `memory.max`, v1 `memory.limit_in_bytes`; cgroups(7)). `root` is `/`, but for tests.
/// None where nothing can be read.
#[must_use]
pub fn memory_limit(root: &Path) -> Option<u64> {
    let read = |path: &Path| std::fs::read_to_string(root.join(path)).ok();
    let machine = read(Path::new("proc/meminfo")).and_then(|meminfo| {
        let kib = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.trim().strip_suffix(" kB")?;
        kib.parse::<u64>().ok()?.checked_mul(1024)
    });
    let mut least = machine;
    for line in read(Path::new("proc/self/cgroup")).unwrap_or_default().lines() {
        // hierarchy:controllers:path; of v2, hierarchy 0 and no controllers.
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else { continue };
        let (mount, file) = match controllers {
            "" => ("sys/fs/cgroup", "memory.max"),
            list if list.split(',').any(|name| name == "memory") => ("sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => continue,
        };
        // Inside of a container the path may be the host's, or begin with `..`: what exists of it counts.
        let group: PathBuf =
            Path::new(group).components().filter(|part| matches!(part, Component::Normal(_))).collect();
        for folder in group.ancestors() {
            // "max" and v1's huge number are no limits: the one does not parse, the other is never the least.
            let limit = read(&Path::new(mount).join(folder).join(file)).and_then(|text| text.trim().parse().ok());
            least = least.into_iter().chain(limit).min();
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal:       16777216 kB\nMemFree:         1000 kB\n");

    fn check(files: &[(&str, &str)], want: Option<u64>) {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        assert_eq!(memory_limit(root.path()), want, "{files:?}");
    }

    #[test]
    fn limits_of_memory() {
        let v2 = ("proc/self/cgroup", "0::/system.slice/waypost.service\n");
        let v1 = ("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n");
        let own = "sys/fs/cgroup/system.slice/waypost.service/memory.max";
        let slice = "sys/fs/cgroup/system.slice/memory.max";
        check(&[], None);
        check(&[MEMINFO], Some(16 * GIB));
        check(&[("proc/meminfo", "MemTotal: many kB\n")], None);
        check(&[MEMINFO, v2], Some(16 * GIB));
        check(&[MEMINFO, v2, (own, "2147483648\n"), (slice, "max\n")], Some(2 * GIB));
        check(&[MEMINFO, v2, (own, "max\n"), (slice, "1073741824\n")], Some(GIB));
        check(&[MEMINFO, v2, (own, "34359738368\n")], Some(16 * GIB));
        check(&[v2, (own, "max\n")], None);
        check(&[MEMINFO, v1, ("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "1073741824\n")], Some(GIB));
        check(&[MEMINFO, v1, ("sys/fs/cgroup/memory/memory.limit_in_bytes", "2147483648\n")], Some(2 * GIB));
        let none = ("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "9223372036854771712\n");
        check(&[MEMINFO, v1, none], Some(16 * GIB));
        let outside = ("proc/self/cgroup", "0::/../../other\n");
        check(&[MEMINFO, outside, ("sys/fs/cgroup/memory.max", "1073741824\n")], Some(GIB));
    }

    #[test]
    fn memory_of_the_cache() {
        let cache =
            |memory| Cache { memory, ttl: Duration::ZERO, negative_ttl: Duration::ZERO, stale_max: Duration::ZERO };
        for (memory, limit, want) in [
            (None, Some(GIB), GIB / 4),
            (None, Some(64 * GIB), GIB),
            (None, None, GIB / 4),
            (Some(5), Some(GIB), 5),
            (Some(8 * GIB), Some(GIB), 8 * GIB),
        ] {
            assert_eq!(cache(memory).memory_bytes(limit), want, "{memory:?} {limit:?}");
        }
    }

    #[test]
    fn passwords_of_services_are_not_shown() {
        for (url, want) in [
            ("postgres://a:secret@db:5432/waypost?sslmode=require", "postgres://(hidden)@db:5432/waypost"),
            ("redis://:s3/cr@et#?@127.0.0.1", "redis://(hidden)@127.0.0.1"),
            ("postgres://db/waypost?password=secret", "postgres://db/waypost"),
            ("redis+unix:///run/redis.sock", "redis+unix:///run/redis.sock"),
        ] {
            let url = ServiceUrl::new(url.to_owned());
            assert_eq!((url.to_string(), format!("{url:?}")), (want.to_owned(), want.to_owned()));
            assert_eq!(url.has_credentials(), url.expose().contains("secret") || url.expose().contains('@'));
        }
    }

    #[test]
    fn a_secret_is_not_shown() {
        assert_eq!(format!("{:?}", Some(Secret("correct horse battery staple".to_owned()))), "Some((hidden))");
    }
}
