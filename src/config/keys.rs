//! Every key of the configuration, once: its kind and limits, its default, a line of help.
//!
//! In: nothing. Out: the table that names what files, environment and flags may say, what `config print` shows, and
//! what an unknown key is compared with. Never: holds a value, or a key that nothing reads.

use std::time::Duration;

use strsim::damerau_levenshtein;

/// A key: `section.name`, or `name` alone at the top of the file.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    pub name: &'static str,
    pub kind: Kind,
    /// As it is written in TOML.
    pub default: &'static str,
    /// What it does; one line.
    pub help: &'static str,
}

/// What a key's value looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Text,
    /// Text that is never shown and stands in the environment alone.
    Secret,
    /// The address of a service; `""` = none. Its password is not shown.
    Service,
    /// A whole number from 0 on; `""` = none.
    OptionalCount {
        max: u64,
    },
    /// Text, one of these.
    OneOf(&'static [&'static str]),
    Flag,
    /// A whole number, both ends allowed.
    Count {
        min: u64,
        max: u64,
    },
    /// Texts; with commas between them in the environment.
    List,
    /// Text as `units::duration` reads it, of at least `min`.
    Duration {
        min: Duration,
    },
    /// Text as `units::size` reads it, in bytes.
    Size,
}

/// The sections that stand in double brackets, once for each thing: `[[listen]]`.
pub const TABLES: [&str; 2] = ["listen", "domains"];

const ANY: Kind = Kind::Duration { min: Duration::ZERO };
const AT_LEAST_1MS: Kind = Kind::Duration { min: Duration::from_millis(1) };

/// In the order in which they are printed: TOML wants those without a section first.
pub const KEYS: [Key; 88] = [
    key("base_url", Kind::Text, r#""""#, "what short URLs begin with; \"\" = http:// and the first listener"),
    key("data", Kind::Text, r#""./waypost-data""#, "folder of the store, the spool and admin.key"),
    key("admin_key", Kind::Secret, r#""""#, "an admin key of its own, 20 bytes or more; from the environment alone"),
    key("listen.address", Kind::Text, r#""127.0.0.1:8080""#, "where to listen: IP:PORT or [IPv6]:PORT"),
    key("listen.proxy_protocol", Kind::Flag, "false", "every connection begins with a PROXY protocol header, v1 or v2"),
    key("workers.count", Kind::Count { min: 0, max: 1024 }, "0", "worker threads; 0 = one for each core"),
    key(
        "connections.max",
        Kind::Count { min: 0, max: 16_777_216 },
        "0",
        "connections at once; 0 = as many as the limit of open files allows",
    ),
    key("connections.header_timeout", AT_LEAST_1MS, r#""5s""#, "a request's head must arrive within this time"),
    key(
        "connections.idle_timeout",
        AT_LEAST_1MS,
        r#""75s""#,
        "a connection without a request is closed after this time",
    ),
    key("domains.host", Kind::Text, r#""""#, "a host with codes of its own; without any domain every Host is the same"),
    key("domains.root_url", Kind::Text, r#""""#, "where / of this host leads; \"\" = redirect.root_url"),
    key("domains.not_found_url", Kind::Text, r#""""#, "where its unknown codes lead; \"\" = redirect.not_found_url"),
    key("domains.gone_url", Kind::Text, r#""""#, "where its links that are over lead; \"\" = redirect.gone_url"),
    key("redirect.status", Kind::Count { min: 301, max: 308 }, "307", "status of links that name none"),
    key(
        "redirect.cache_control",
        Kind::Text,
        r#""private, max-age=0""#,
        "Cache-Control of 302, 303 and 307; what browsers keep is not counted again",
    ),
    key(
        "redirect.permanent_cache_control",
        Kind::Text,
        r#""private, max-age=90""#,
        "Cache-Control of 301 and 308; an edit reaches a browser after max-age",
    ),
    key(
        "redirect.forward_query",
        Kind::Flag,
        "true",
        "a visitor's query is added to the target, where the link says nothing",
    ),
    key("redirect.root_url", Kind::Text, r#""""#, "where / leads; \"\" = a short page that says what this is"),
    key("redirect.not_found_url", Kind::Text, r#""""#, "where unknown codes lead; \"\" = a 404 page"),
    key("redirect.gone_url", Kind::Text, r#""""#, "where links that are over lead; \"\" = a 410 page"),
    key(
        "pages.dir",
        Kind::Text,
        r#""""#,
        "folder of index.html, 404.html, 410.html, .well-known; \"\" = the built-in pages",
    ),
    key("api.listen", Kind::Text, r#""""#, "a listener for the API, its docs and /metrics alone; \"\" = the same port"),
    key(
        "metrics.allow",
        Kind::List,
        r#"["loopback", "private"]"#,
        "peers that read /metrics without a key: \"loopback\", \"private\", addresses, CIDRs",
    ),
    key("postgres.url", Kind::Service, r#""""#, "postgres://user:password@host/database; \"\" = the embedded store"),
    key("postgres.replica_url", Kind::Service, r#""""#, "a standby that lists and exports are read from; \"\" = none"),
    key("postgres.replica_max_lag", ANY, r#""2s""#, "a standby further behind is not read"),
    key(
        "postgres.direct_url",
        Kind::Service,
        r#""""#,
        "past a pooler in transaction mode, for LISTEN; \"\" = postgres.url if statements are prepared",
    ),
    key(
        "postgres.migrate_url",
        Kind::Service,
        r#""""#,
        "with a role that owns the tables; \"\" = postgres.direct_url or postgres.url",
    ),
    key(
        "postgres.migrate",
        Kind::OneOf(&["auto", "check"]),
        r#""auto""#,
        "whether serve brings the schema up to date or refuses an old one",
    ),
    key("postgres.pool", Kind::Count { min: 2, max: 1000 }, "8", "connections to Postgres"),
    key("postgres.pool_timeout", AT_LEAST_1MS, r#""1s""#, "how long a request waits for one of them"),
    key("postgres.max_lifetime", AT_LEAST_1MS, r#""1h""#, "a connection is replaced after this time"),
    key("postgres.lookups", Kind::Count { min: 4, max: 10_000 }, "32", "codes that are looked up at once"),
    key(
        "postgres.lookup_timeout",
        AT_LEAST_1MS,
        r#""250ms""#,
        "how long a look-up may take, its wait for others included; then it is a 503",
    ),
    key(
        "postgres.statements",
        Kind::OneOf(&["prepared", "unnamed"]),
        r#""prepared""#,
        "unnamed works through poolers that give every transaction another connection",
    ),
    key("postgres.connect_timeout", AT_LEAST_1MS, r#""2s""#, "how long making a connection may take"),
    key("postgres.statement_timeout", AT_LEAST_1MS, r#""2s""#, "how long any other statement may take"),
    key(
        "redis.url",
        Kind::Service,
        r#""""#,
        "redis://host, rediss://, redis+unix:///path, redis+cluster://a,b, redis+sentinel://a,b/name; \"\" = none",
    ),
    key("redis.ca_file", Kind::Text, r#""""#, "PEM of the authorities of its certificate; \"\" = the system's"),
    key("redis.timeout", AT_LEAST_1MS, r#""20ms""#, "how long a command may take"),
    key("redis.ttl", AT_LEAST_1MS, r#""10min""#, "how long a link stays in Redis"),
    key("redis.prefix", Kind::Text, r#""waypost:""#, "what every key and channel begins with"),
    key(
        "breaker.failures",
        Kind::Count { min: 1, max: 1000 },
        "5",
        "failures in a row, after which a dependency is left alone",
    ),
    key("breaker.recovery", AT_LEAST_1MS, r#""10s""#, "for this time"),
    key(
        "cache.memory",
        Kind::Size,
        r#""""#,
        "what cached links may take; \"\" = a quarter of the memory limit, at most 1GiB",
    ),
    key("cache.ttl", ANY, r#""60s""#, "how long a link is fresh without news from the store"),
    key("cache.negative_ttl", ANY, r#""2s""#, "how long a code is remembered as unknown"),
    key("cache.stale_max", ANY, r#""24h""#, "how long a link is served after it was fresh, while the store is away"),
    key("codes.strategy", Kind::OneOf(&["random", "permuted", "snowflake"]), r#""random""#, "how codes are made"),
    key(
        "codes.length",
        Kind::Count { min: 4, max: 32 },
        "7",
        "characters of a random code; permuted ones are as short as can be",
    ),
    key(
        "codes.alphabet",
        Kind::OneOf(&["base62", "base58", "base36"]),
        r#""base62""#,
        "characters of codes, fixed when a store is made; base58 has no look-alikes, base36 no capitals",
    ),
    key(
        "codes.case",
        Kind::OneOf(&["sensitive", "insensitive"]),
        r#""sensitive""#,
        "whether AbC and abc are two codes, fixed when a store is made; insensitive with base36 alone",
    ),
    key(
        "codes.worker_id",
        Kind::OptionalCount { max: 1023 },
        r#""""#,
        "this instance's number in snowflakes; \"\" = one that is free",
    ),
    key(
        "codes.worker_lease",
        Kind::Duration { min: Duration::from_secs(1) },
        r#""60s""#,
        "how long that number is leased, at most 1h; renewed after half of it",
    ),
    key("shorten.open", Kind::Flag, "false", "anybody may shorten and read stats"),
    key(
        "limits.shorten_per_minute",
        Kind::Count { min: 0, max: 1_000_000 },
        "10",
        "what an address without a key may shorten in a minute; 0 = no limit",
    ),
    key(
        "limits.key_per_minute",
        Kind::Count { min: 0, max: 1_000_000 },
        "1000",
        "requests of a key in a minute, admin keys excepted; 0 = no limit",
    ),
    key("targets.schemes", Kind::List, r#"["http", "https"]"#, "schemes that a target may have"),
    key(
        "targets.max_bytes",
        Kind::Count { min: 1, max: 32_768 },
        "2048",
        "bytes of a target, as written and as serialised",
    ),
    key("targets.blocklist", Kind::Text, r#""""#, "file of hosts that no target may have, one a line; \"\" = none"),
    key(
        "targets.own_hosts",
        Kind::List,
        "[]",
        "more hosts, host or host:port, that lead here: targets on them would loop",
    ),
    key(
        "targets.lookalikes",
        Kind::OneOf(&["flag", "refuse"]),
        r#""flag""#,
        "what happens to targets on look-alike hosts",
    ),
    key("proxies.trusted", Kind::List, "[]", "addresses and CIDRs of proxies whose forwarding headers are believed"),
    key(
        "spool.ring",
        Kind::Text,
        r#""""#,
        "folder of the rings, a tmpfs that outlives the process; \"\" = systemd's runtime directory, else /dev/shm",
    ),
    key("spool.ring_size", Kind::Size, r#""4MiB""#, "memory of each core's ring of visits"),
    key("spool.dir", Kind::Text, r#""""#, "folder of the log of visits; \"\" = spool in data"),
    key("spool.segment", Kind::Size, r#""8MiB""#, "a file of the log"),
    key("spool.sync", AT_LEAST_1MS, r#""200ms""#, "how often the log is synced: what a loss of power may cost"),
    key(
        "spool.max_bytes",
        Kind::Size,
        r#""8GiB""#,
        "the log's limit, and never more than a fifth of the free disk; then the oldest visits are given up",
    ),
    key("spool.keep", ANY, r#""15min""#, "how long stored visits stay in the log, to fill the hole of a failover"),
    key("spool.keep_bytes", Kind::Size, r#""1GiB""#, "at most this much of them"),
    key(
        "visits.keep",
        Kind::Duration { min: Duration::from_secs(86_400) },
        r#""90d""#,
        "how long single visits are kept; totals stay",
    ),
    key("visits.raw", Kind::Flag, "true", "whether single visits are kept, or totals alone"),
    key("visits.sinks", Kind::List, r#"["store"]"#, "where visits go; [] = they are only counted by the process"),
    key(
        "visits.request_id_header",
        Kind::Text,
        r#""X-Request-Id""#,
        "header with a request's id, of trusted proxies alone; \"\" = none",
    ),
    key(
        "visits.bots",
        Kind::OneOf(&["separate", "count", "drop"]),
        r#""separate""#,
        "visits of declared bots stand beside the clicks, are clicks, or are not stored",
    ),
    key("visits.bot_list", Kind::Text, r#""""#, "file of more patterns of bots, one a line; \"\" = none"),
    key(
        "visits.agents_per_day",
        Kind::Count { min: 100, max: 10_000_000 },
        "100000",
        "agents, and referrers, that are new in a day; past it their family, or host, is kept",
    ),
    key("stats.public", Kind::Flag, "false", "anybody may read the stats of a link"),
    key(
        "privacy.address",
        Kind::OneOf(&["truncated", "full", "none"]),
        r#""truncated""#,
        "what is kept of a visitor's address; truncated: without the last octet, or the last 80 bits",
    ),
    key(
        "privacy.visitor",
        Kind::OneOf(&["deployment", "daily"]),
        r#""deployment""#,
        "the key that tells visitors apart: one for ever, or a new one each day, and ranges add up days",
    ),
    key("privacy.honour_dnt", Kind::Flag, "false", "of visitors who send DNT or Sec-GPC nothing but the click is kept"),
    key("log.format", Kind::OneOf(&["json", "text"]), r#""json""#, "how a line of the log is written"),
    key(
        "log.level",
        Kind::OneOf(&["error", "warn", "info", "debug", "trace"]),
        r#""info""#,
        "the least that is logged",
    ),
    key("log.access", Kind::Flag, "false", "a line for each request"),
    key(
        "shutdown.drain",
        ANY,
        r#""0s""#,
        "after SIGTERM, /readyz says 503 and connections are still accepted for this time",
    ),
    key("shutdown.grace", ANY, r#""10s""#, "after that, what is in flight has this time to end"),
    key(
        "shutdown.flush",
        ANY,
        r#""5s""#,
        "then, what is pending of visits is stored for this long, if the store answers",
    ),
];

const fn key(name: &'static str, kind: Kind, default: &'static str, help: &'static str) -> Key {
    Key { name, kind, default, help }
}

impl Key {
    /// `cache` of `cache.ttl`; empty at the top of the file.
    #[must_use]
    pub fn section(&self) -> &'static str {
        self.name.split_once('.').map_or("", |(section, _)| section)
    }

    /// `ttl` of `cache.ttl`.
    #[must_use]
    pub fn leaf(&self) -> &'static str {
        self.name.split_once('.').map_or(self.name, |(_, leaf)| leaf)
    }

    /// The variable that sets it, `WAYPOST_CACHE__TTL`; none of what stands in double brackets has one.
    #[must_use]
    pub fn variable(&self) -> Option<String> {
        let name = self.name.to_ascii_uppercase().replace('.', "__");
        (!TABLES.contains(&self.section())).then(|| format!("WAYPOST_{name}"))
    }
}

impl Kind {
    /// What a value must be, for a message.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Text | Self::Secret => "text in quotes".to_owned(),
            Self::Service => "an address in quotes, such as \"scheme://host:port\"".to_owned(),
            Self::OptionalCount { max } => format!("a whole number from 0 to {max}, or \"\""),
            Self::OneOf(names) => format!("one of {}", names.join(", ")),
            Self::Flag => "true or false".to_owned(),
            Self::Count { min, max } => format!("a whole number from {min} to {max}"),
            Self::List => "a list of texts, such as [\"a\", \"b\"]".to_owned(),
            Self::Duration { .. } => "a duration in quotes, such as \"30s\"".to_owned(),
            Self::Size => "a size in quotes, such as \"512MiB\"".to_owned(),
        }
    }
}

#[must_use]
pub fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// Whether a key stands in the section.
#[must_use]
pub fn is_section(name: &str) -> bool {
    !name.is_empty() && KEYS.iter().any(|key| key.section() == name)
}

/// The known key that an unknown one was probably meant to be: nearly spelt so, or nearly named so in another section.
#[must_use]
pub fn nearest(unknown: &str) -> Option<&'static Key> {
    let leaf = unknown.rsplit('.').next().unwrap_or(unknown);
    let distance = |key: &Key| {
        let elsewhere = 1 + damerau_levenshtein(leaf, key.leaf());
        let near = elsewhere <= 1 + slips_max(leaf);
        damerau_levenshtein(unknown, key.name).min(if near { elsewhere } else { usize::MAX })
    };
    let (slips, key) = KEYS.iter().map(|key| (distance(key), key)).min_by_key(|(slips, _)| *slips)?;
    (slips <= 1 + slips_max(unknown)).then_some(key)
}

/// The known section that an unknown one was probably meant to be.
#[must_use]
pub fn nearest_section(unknown: &str) -> Option<&'static str> {
    let sections = KEYS.iter().map(Key::section).filter(|section| !section.is_empty());
    let near = sections.map(|section| (damerau_levenshtein(unknown, section), section));
    near.min_by_key(|(slips, _)| *slips)
        .filter(|(slips, _)| *slips <= 1 + slips_max(unknown))
        .map(|(_, section)| section)
}

/// A slip for every four letters: more of them, and the hint misleads.
fn slips_max(written: &str) -> usize {
    written.len() / 4
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn check(unknown: &str, want: Option<&str>) {
        assert_eq!(nearest(unknown).map(|key| key.name), want, "{unknown}");
    }

    #[test]
    fn names_are_unique_and_printable_in_order() {
        assert_eq!(KEYS.iter().map(|key| key.name).collect::<HashSet<_>>().len(), KEYS.len());
        let mut sections: Vec<_> = KEYS.iter().map(Key::section).collect();
        assert_eq!(sections[0], "");
        sections.dedup();
        assert_eq!(sections.iter().collect::<HashSet<_>>().len(), sections.len(), "a section stands in one piece");
        assert!(TABLES.iter().all(|table| is_section(table)));
    }

    #[test]
    fn help_is_one_line() {
        for key in KEYS {
            assert!(!key.help.is_empty() && !key.help.contains('\n') && !key.help.ends_with('.'), "{}", key.name);
        }
    }

    #[test]
    fn unknown_keys_and_the_nearest() {
        check("cache.memroy", Some("cache.memory"));
        check("cache.memory_", Some("cache.memory"));
        check("cache_memory", Some("cache.memory"));
        check("memory", Some("cache.memory"));
        check("redirect.negative_ttl", Some("cache.negative_ttl"));
        check("codes.lenght", Some("codes.length"));
        check("limit.key_per_minute", Some("limits.key_per_minute"));
        check("baseurl", Some("base_url"));
        check("dta", Some("data"));
        check("proxies.trust", Some("proxies.trusted"));
        check("foo", None);
        check("x", None);
        check("", None);
        check("foo.bar", None);
        check("postgres_url", Some("postgres.url"));
    }

    #[test]
    fn unknown_sections_and_the_nearest() {
        for (unknown, want) in [
            ("cahce", Some("cache")),
            ("limit", Some("limits")),
            ("proxy", None),
            ("rediss", Some("redis")),
            ("", None),
        ] {
            assert_eq!(nearest_section(unknown), want, "{unknown}");
        }
    }

    #[test]
    fn variables() {
        for (name, variable) in [
            ("base_url", Some("WAYPOST_BASE_URL")),
            ("cache.negative_ttl", Some("WAYPOST_CACHE__NEGATIVE_TTL")),
            ("listen.address", None),
        ] {
            assert_eq!(find(name).and_then(Key::variable).as_deref(), variable);
        }
    }
}
