//! The checks: from what was given to a [`Config`] that cannot be wrong.
//!
//! In: the values of all layers. Out: the configuration, and every value that is refused. Never: stops at the first one:
//! its default stands in, and the checks go on. At the limit: `keys` names those of each number.

use std::collections::BTreeMap;
use std::time::Duration;

use toml::de::DeValue;

use super::text::{
    address, base_url, header, header_name, host, host_and_port, net, path, peers, prefix, scheme, sink, size,
    size_within, target,
};
use super::{DOMAINS_MAX, Entry, Error, Given, Raw, Source, from_toml, must_be};
use crate::codes::{Alphabet, Strategy};
use crate::config::keys::{self, Key, Kind};
use crate::config::{
    Api, Bots, Breaker, Cache, Codes, Config, Connections, Domain, KeptAddress, Limits, Listen, Log, LogFormat,
    Metrics, Migrate, Pages, Postgres, Privacy, Proxies, Redirect, Redis, Secret, ServiceUrl, Shorten, Shutdown, Spool,
    Statements, Stats, Targets, VisitorKey, Visits, Workers, units,
};
use crate::domain::key::Case;
use crate::domain::link::STATUSES;
use crate::domain::target::Target;
use crate::guard::targets::Lookalikes;

const RING_UNIT_BYTES: u64 = 4 << 10;
/// Segments that the log has room for.
const SEGMENTS_MIN: u64 = 4;
const WORKER_LEASE_MAX: Duration = Duration::from_secs(3600);

pub(super) fn check(given: &Given, yes: bool, errors: &mut Vec<Error>) -> Option<Config> {
    let listen = each(&given.listen, errors, listener);
    let domains = each(&given.domains, errors, domain);
    let mut config = repaired(given.single.clone(), errors, single)?;
    let is_good = |key, errors: &[Error]| {
        !errors.iter().any(|error| matches!(error, Error::Value { key: bad, .. } if *bad == key))
    };

    for (index, (at, one)) in listen.iter().enumerate() {
        if one.address.port() != 0 && listen[..index].iter().any(|(_, other)| other.address == one.address) {
            let problem = format!("{} is given twice: leave one out", one.address);
            errors.push(Error::Value { at: at.clone(), key: "listen.address", problem });
        }
    }
    config.listen = listen.into_iter().map(|(_, listen)| listen).collect();
    if given.listen.is_empty() {
        config.listen = vec![listener(&Entry::default()).map_err(|error| errors.push(error)).ok()?];
    }

    let mut hosts = BTreeMap::new();
    for (at, Domain { host, .. }) in &domains {
        if let Some(first) = hosts.insert(host.clone(), at) {
            let problem = format!("{host} stands at {first} already: leave one out");
            errors.push(Error::Value { at: at.clone(), key: "domains.host", problem });
        }
    }
    if let Some((at, _)) = domains.get(DOMAINS_MAX) {
        let problem = format!("is one too many: at most {DOMAINS_MAX} domains");
        errors.push(Error::Value { at: at.clone(), key: "domains.host", problem });
    }
    config.domains = domains.into_iter().map(|(_, domain)| inherit(domain, &config.redirect)).collect();

    let refuse = |key: &'static str, problem: String| {
        let at = given.single.values.get(key).map_or(Source::Default, |(_, at)| at.clone());
        Error::Value { at, key, problem }
    };
    if let Some(api) = config.api.listen
        && api.port() != 0
        && config.listen.iter().any(|listen| listen.address == api)
    {
        let problem = format!("{api} is a listener already: choose another port, or \"\" for the same one");
        errors.push(refuse("api.listen", problem));
    }
    let Codes { alphabet, case, .. } = &config.codes;
    if *case == Case::Insensitive && *alphabet != Alphabet::Base36 && is_good("codes.alphabet", errors) {
        let problem = "is insensitive, and codes.alphabet has letters in both cases: set codes.alphabet to base36";
        errors.push(refuse("codes.case", problem.to_owned()));
    }
    // A new generation moves worker ids by a day: no lease may reach so far.
    if config.codes.worker_lease > WORKER_LEASE_MAX {
        errors.push(refuse("codes.worker_lease", "must be at most 1h".to_owned()));
    }
    // The kernel maps whole pages.
    if !config.spool.ring_size.is_multiple_of(RING_UNIT_BYTES) {
        errors.push(refuse("spool.ring_size", "must be a multiple of 4KiB".to_owned()));
    }
    // One that is written, and what the store has not got yet: less could not be given up a segment at a time.
    let least = SEGMENTS_MIN * config.spool.segment;
    if config.spool.max_bytes < least && is_good("spool.segment", errors) {
        let problem = format!("must be at least {SEGMENTS_MIN} times spool.segment, {}MiB", least.div_ceil(1 << 20));
        errors.push(refuse("spool.max_bytes", problem));
    }
    // With a listener of its own, the API is not served on the others.
    let shortening = config
        .api
        .listen
        .map_or_else(|| config.listen.iter().map(|listen| listen.address).collect(), |address| vec![address]);
    let public = shortening.iter().find(|address| !address.ip().to_canonical().is_loopback());
    if let Some(public) = public
        && config.shorten.open
        && !yes
        && is_good("api.listen", errors)
    {
        let problem = format!(
            "lets anybody shorten, and {public} is not a loopback address: listen on 127.0.0.1, or confirm with --yes"
        );
        errors.push(refuse("shorten.open", problem));
    }
    Some(config)
}

/// What `build` makes of the entry, if need be with defaults in place of what it refused.
/// None if a default is refused too: that is a value without one.
fn repaired<T>(mut entry: Entry, errors: &mut Vec<Error>, build: fn(&Entry) -> Result<T, Error>) -> Option<T> {
    let mut aside = Vec::new();
    loop {
        match build(&entry) {
            Ok(value) => return Some(value),
            Err(Error::Value { key, .. }) if aside.contains(&key) => return None,
            Err(error) => {
                let key = if let Error::Value { key, .. } = &error { Some(*key) } else { None };
                errors.push(error);
                aside.push(key?);
                entry.values.remove(key?)?;
            }
        }
    }
}

/// Those of the entries in which nothing is wrong.
fn each<T>(entries: &[Entry], errors: &mut Vec<Error>, build: fn(&Entry) -> Result<T, Error>) -> Vec<(Source, T)> {
    let mut good = Vec::new();
    for entry in entries {
        let before = errors.len();
        let built = repaired(entry.clone(), errors, build);
        if errors.len() == before {
            good.extend(built.map(|built| (entry.at.clone(), built)));
        }
    }
    good
}

fn listener(entry: &Entry) -> Result<Listen, Error> {
    Ok(Listen { address: entry.text("listen.address", address)?, proxy_protocol: entry.flag("listen.proxy_protocol")? })
}

fn domain(entry: &Entry) -> Result<Domain, Error> {
    Ok(Domain {
        root_url: entry.optional("domains.root_url", target)?,
        not_found_url: entry.optional("domains.not_found_url", target)?,
        gone_url: entry.optional("domains.gone_url", target)?,
        // Last: without one the entry is not looked at further.
        host: entry.text("domains.host", host)?,
    })
}

fn inherit(domain: Domain, redirect: &Redirect) -> Domain {
    let or = |own: Option<Target>, all: &Option<Target>| own.or_else(|| all.clone());
    Domain {
        host: domain.host,
        root_url: or(domain.root_url, &redirect.root_url),
        not_found_url: or(domain.not_found_url, &redirect.not_found_url),
        gone_url: or(domain.gone_url, &redirect.gone_url),
    }
}

/// Everything but the listeners and the domains.
fn single(entry: &Entry) -> Result<Config, Error> {
    Ok(Config {
        base_url: entry.optional("base_url", base_url)?,
        data: entry.text("data", path)?,
        admin_key: entry.secret("admin_key"),
        listen: Vec::new(),
        workers: Workers { count: entry.count("workers.count")? },
        connections: Connections {
            max: Some(entry.count("connections.max")?).filter(|max| *max != 0),
            header_timeout: entry.duration("connections.header_timeout")?,
            idle_timeout: entry.duration("connections.idle_timeout")?,
        },
        domains: Vec::new(),
        redirect: Redirect {
            status: entry.status("redirect.status")?,
            cache_control: entry.text("redirect.cache_control", header)?,
            permanent_cache_control: entry.text("redirect.permanent_cache_control", header)?,
            forward_query: entry.flag("redirect.forward_query")?,
            root_url: entry.optional("redirect.root_url", target)?,
            not_found_url: entry.optional("redirect.not_found_url", target)?,
            gone_url: entry.optional("redirect.gone_url", target)?,
        },
        pages: Pages { dir: entry.optional("pages.dir", path)? },
        api: Api { listen: entry.optional("api.listen", address)? },
        metrics: Metrics { allow: entry.list("metrics.allow", peers)? },
        postgres: postgres(entry)?,
        redis: redis(entry)?,
        breaker: Breaker { failures: entry.count("breaker.failures")?, recovery: entry.duration("breaker.recovery")? },
        cache: Cache {
            memory: entry.optional("cache.memory", size)?,
            ttl: entry.duration("cache.ttl")?,
            negative_ttl: entry.duration("cache.negative_ttl")?,
            stale_max: entry.duration("cache.stale_max")?,
        },
        codes: Codes {
            strategy: entry.one_of("codes.strategy", |name| Strategy::parse(name).ok())?,
            length: entry.count("codes.length")?,
            alphabet: entry.one_of("codes.alphabet", |name| Alphabet::parse(name).ok())?,
            case: entry.one_of("codes.case", |name| match name {
                "sensitive" => Some(Case::Sensitive),
                "insensitive" => Some(Case::Insensitive),
                _ => None,
            })?,
            worker_id: entry.optional_count("codes.worker_id")?,
            worker_lease: entry.duration("codes.worker_lease")?,
        },
        shorten: Shorten { open: entry.flag("shorten.open")? },
        limits: Limits {
            shorten_per_minute: entry.count("limits.shorten_per_minute")?,
            key_per_minute: entry.count("limits.key_per_minute")?,
        },
        targets: Targets {
            schemes: entry.some("targets.schemes", scheme)?,
            max_bytes: entry.count("targets.max_bytes")?,
            blocklist: entry.optional("targets.blocklist", path)?,
            own_hosts: entry.list("targets.own_hosts", host_and_port)?,
            lookalikes: entry.one_of("targets.lookalikes", |name| match name {
                "flag" => Some(Lookalikes::Flag),
                "refuse" => Some(Lookalikes::Refuse),
                _ => None,
            })?,
        },
        proxies: Proxies { trusted: entry.list("proxies.trusted", net)? },
        spool: spool(entry)?,
        visits: visits(entry)?,
        stats: Stats { public: entry.flag("stats.public")? },
        privacy: Privacy {
            address: entry.one_of("privacy.address", |name| match name {
                "truncated" => Some(KeptAddress::Truncated),
                "full" => Some(KeptAddress::Full),
                "none" => Some(KeptAddress::Nothing),
                _ => None,
            })?,
            visitor: entry.one_of("privacy.visitor", |name| match name {
                "deployment" => Some(VisitorKey::Deployment),
                "daily" => Some(VisitorKey::Daily),
                _ => None,
            })?,
            honour_dnt: entry.flag("privacy.honour_dnt")?,
        },
        log: Log {
            format: entry.one_of("log.format", |name| match name {
                "json" => Some(LogFormat::Json),
                "text" => Some(LogFormat::Text),
                _ => None,
            })?,
            level: entry.one_of("log.level", |name| name.parse().ok())?,
            access: entry.flag("log.access")?,
        },
        shutdown: Shutdown {
            drain: entry.duration("shutdown.drain")?,
            grace: entry.duration("shutdown.grace")?,
            flush: entry.duration("shutdown.flush")?,
        },
    })
}

fn spool(entry: &Entry) -> Result<Spool, Error> {
    Ok(Spool {
        ring: entry.optional("spool.ring", path)?,
        ring_size: entry.text("spool.ring_size", |text| size_within(text, 256 << 10, 1 << 30))?,
        dir: entry.optional("spool.dir", path)?,
        segment: entry.text("spool.segment", |text| size_within(text, 1 << 20, 1 << 30))?,
        sync: entry.duration("spool.sync")?,
        max_bytes: entry.text("spool.max_bytes", size)?,
        keep: entry.duration("spool.keep")?,
        keep_bytes: entry.text("spool.keep_bytes", size)?,
    })
}

fn visits(entry: &Entry) -> Result<Visits, Error> {
    Ok(Visits {
        keep: entry.duration("visits.keep")?,
        raw: entry.flag("visits.raw")?,
        recorded: !entry.list("visits.sinks", sink)?.is_empty(),
        request_id_header: entry.optional("visits.request_id_header", header_name)?,
        bots: entry.one_of("visits.bots", |name| match name {
            "separate" => Some(Bots::Separate),
            "count" => Some(Bots::Count),
            "drop" => Some(Bots::Drop),
            _ => None,
        })?,
        bot_list: entry.optional("visits.bot_list", path)?,
        agents_per_day: entry.count("visits.agents_per_day")?,
    })
}

/// None without `postgres.url`; the other keys are checked all the same.
fn postgres(entry: &Entry) -> Result<Option<Postgres>, Error> {
    let schemes = &["postgres", "postgresql"];
    let settings = Postgres {
        url: entry.service("postgres.url", schemes)?.unwrap_or_else(|| ServiceUrl::new(String::new())),
        replica_url: entry.service("postgres.replica_url", schemes)?,
        replica_max_lag: entry.duration("postgres.replica_max_lag")?,
        direct_url: entry.service("postgres.direct_url", schemes)?,
        migrate_url: entry.service("postgres.migrate_url", schemes)?,
        migrate: entry.one_of("postgres.migrate", |name| match name {
            "auto" => Some(Migrate::Auto),
            "check" => Some(Migrate::Check),
            _ => None,
        })?,
        pool: entry.count("postgres.pool")?,
        pool_timeout: entry.duration("postgres.pool_timeout")?,
        max_lifetime: entry.duration("postgres.max_lifetime")?,
        lookups: entry.count("postgres.lookups")?,
        lookup_timeout: entry.duration("postgres.lookup_timeout")?,
        statements: entry.one_of("postgres.statements", |name| match name {
            "prepared" => Some(Statements::Prepared),
            "unnamed" => Some(Statements::Unnamed),
            _ => None,
        })?,
        connect_timeout: entry.duration("postgres.connect_timeout")?,
        statement_timeout: entry.duration("postgres.statement_timeout")?,
    };
    Ok(Some(settings).filter(|settings| !settings.url.expose().is_empty()))
}

/// None without `redis.url`; the other keys are checked all the same.
fn redis(entry: &Entry) -> Result<Option<Redis>, Error> {
    let schemes = &[
        "redis",
        "rediss",
        "redis+unix",
        "unix",
        "redis+cluster",
        "rediss+cluster",
        "redis+sentinel",
        "rediss+sentinel",
    ];
    let settings = Redis {
        url: entry.service("redis.url", schemes)?.unwrap_or_else(|| ServiceUrl::new(String::new())),
        ca_file: entry.optional("redis.ca_file", path)?,
        timeout: entry.duration("redis.timeout")?,
        ttl: entry.duration("redis.ttl")?,
        prefix: entry.text("redis.prefix", prefix)?,
    };
    Ok(Some(settings).filter(|settings| !settings.url.expose().is_empty()))
}

impl Entry {
    /// The value or its default, as `take` reads it.
    fn get<T>(&self, name: &'static str, take: impl FnOnce(&Key, Raw) -> Result<T, String>) -> Result<T, Error> {
        let refuse = |at: &Source, problem| Error::Value { at: at.clone(), key: name, problem };
        let key = keys::find(name).ok_or_else(|| refuse(&self.at, "is not in the table of keys".to_owned()))?;
        let (raw, at) = match self.values.get(name) {
            Some((raw, at)) => (Ok(raw.clone()), at),
            None => (default(key), &self.at),
        };
        raw.and_then(|raw| take(key, raw)).map_err(|problem| refuse(at, problem))
    }

    fn text<T>(&self, name: &'static str, parse: fn(&str) -> Result<T, String>) -> Result<T, Error> {
        self.get(name, |key, raw| match raw {
            Raw::Text(text) => parse(&text),
            _ => Err(not_of_its_kind(key)),
        })
    }

    /// `""` = none.
    fn optional<T>(&self, name: &'static str, parse: fn(&str) -> Result<T, String>) -> Result<Option<T>, Error> {
        self.get(name, |key, raw| match raw {
            Raw::Text(text) if text.is_empty() => Ok(None),
            Raw::Text(text) => parse(&text).map(Some),
            _ => Err(not_of_its_kind(key)),
        })
    }

    fn one_of<T>(&self, name: &'static str, parse: fn(&str) -> Option<T>) -> Result<T, Error> {
        self.get(name, |key, raw| match (key.kind, raw) {
            (Kind::OneOf(names), Raw::Text(text)) => {
                let known = if names.contains(&text.as_str()) { parse(&text) } else { None };
                known.ok_or_else(|| must_be(key, &text))
            }
            _ => Err(not_of_its_kind(key)),
        })
    }

    fn flag(&self, name: &'static str) -> Result<bool, Error> {
        self.get(name, |key, raw| match raw {
            Raw::Flag(flag) => Ok(flag),
            _ => Err(not_of_its_kind(key)),
        })
    }

    fn count<T: TryFrom<u64>>(&self, name: &'static str) -> Result<T, Error> {
        self.get(name, |key, raw| match (key.kind, raw) {
            (Kind::Count { min, max }, Raw::Count(count)) => {
                let count = Some(count).filter(|count| (min..=max).contains(count)).ok_or(count);
                let fits = count.and_then(|count| T::try_from(count).map_err(|_| count));
                fits.map_err(|count| format!("must be {}, not {count}", key.kind.describe()))
            }
            _ => Err(not_of_its_kind(key)),
        })
    }

    /// `""` = none.
    fn optional_count<T: TryFrom<u64>>(&self, name: &'static str) -> Result<Option<T>, Error> {
        self.get(name, |key, raw| match (key.kind, raw) {
            (Kind::OptionalCount { .. }, Raw::Text(_)) => Ok(None),
            (Kind::OptionalCount { max }, Raw::Count(count)) => {
                let fits = Some(count).filter(|count| *count <= max).and_then(|count| T::try_from(count).ok());
                fits.map(Some).ok_or_else(|| format!("must be {}, not {count}", key.kind.describe()))
            }
            _ => Err(not_of_its_kind(key)),
        })
    }

    /// `""` = none. A message never shows the address: it may have a password in it.
    fn service(&self, name: &'static str, schemes: &[&str]) -> Result<Option<ServiceUrl>, Error> {
        self.get(name, |key, raw| match raw {
            Raw::Service(url) if url.expose().is_empty() => Ok(None),
            Raw::Service(url) => {
                let known = url.expose().split_once("://").is_some_and(|(scheme, _)| schemes.contains(&scheme));
                known.then_some(Some(url)).ok_or_else(|| format!("must begin with {}://", schemes.join("://, ")))
            }
            _ => Err(not_of_its_kind(key)),
        })
    }

    fn status(&self, name: &'static str) -> Result<u16, Error> {
        let status = self.count(name)?;
        self.get(name, |_, _| {
            let known = STATUSES.contains(&status).then_some(status);
            known.ok_or_else(|| format!("must be one of {STATUSES:?}, not {status}"))
        })
    }

    fn duration(&self, name: &'static str) -> Result<Duration, Error> {
        self.get(name, |key, raw| match (key.kind, raw) {
            (Kind::Duration { min }, Raw::Text(text)) => {
                let duration = units::duration(&text).map_err(|error| error.to_string())?;
                let enough = Some(duration).filter(|duration| *duration >= min);
                enough.ok_or_else(|| format!("must be at least {}, not {text}", units::print_duration(min)))
            }
            _ => Err(not_of_its_kind(key)),
        })
    }

    fn list<T>(&self, name: &'static str, parse: fn(&str) -> Result<T, String>) -> Result<Vec<T>, Error> {
        self.get(name, |key, raw| match raw {
            Raw::List(list) => list.iter().map(|item| parse(item)).collect(),
            _ => Err(not_of_its_kind(key)),
        })
    }

    /// A list that is not empty.
    fn some<T>(&self, name: &'static str, parse: fn(&str) -> Result<T, String>) -> Result<Vec<T>, Error> {
        let list = self.list(name, parse)?;
        self.get(name, |_, _| if list.is_empty() { Err("must name at least one".to_owned()) } else { Ok(list) })
    }

    fn secret(&self, name: &'static str) -> Option<Secret> {
        match self.values.get(name) {
            Some((Raw::Secret(secret), _)) => Some(secret.clone()),
            _ => None,
        }
    }
}

fn default(key: &Key) -> Result<Raw, String> {
    let value = DeValue::parse(key.default).map_err(|error| error.message().to_owned())?;
    from_toml(key, value.get_ref())
}

/// The table of keys and the checks disagree; a test loads every default.
fn not_of_its_kind(key: &Key) -> String {
    format!("is not {} in the table of keys", key.kind.describe())
}
