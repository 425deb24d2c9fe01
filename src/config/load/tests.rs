use std::io;
use std::path::Path;
use std::time::Duration;

use ipnet::IpNet;
use proptest::prelude::*;

use super::{DOMAINS, Errors, FILE_BYTES_MAX, Flags, Loaded, PLACES, load, print, read};
use crate::config::keys::{KEYS, Kind};
use crate::config::{Config, Listen, Peers, Secret};
use crate::domain::target::Target;

const FILE: &str = "./waypost.toml";

/// Loads with no files but these.
fn load_with(flags: &Flags, env: &[(&str, &str)], files: &[(&str, &str)]) -> Result<Loaded, Errors> {
    let env = env.iter().map(|(name, value)| (name.to_string(), value.to_string()));
    load(flags, env, |path| {
        let file = files.iter().find(|(name, _)| path == Path::new(name));
        file.map(|(_, text)| text.to_string()).ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no such file"))
    })
}

fn file(text: &str) -> Result<Loaded, Errors> {
    load_with(&Flags::default(), &[], &[(FILE, text)])
}

fn env(env: &[(&str, &str)]) -> Result<Loaded, Errors> {
    load_with(&Flags::default(), env, &[])
}

/// Each error's line begins and ends so; there are no others.
fn check(got: Result<Loaded, Errors>, want: &[(&str, &str)]) {
    let got = got.map(|loaded| loaded.config).expect_err("errors").to_string();
    let lines: Vec<&str> = got.lines().collect();
    assert_eq!(lines.len(), want.len(), "{got}");
    for (line, (start, end)) in lines.iter().zip(want) {
        assert!(line.starts_with(start) && line.ends_with(end), "{line}\nis not {start} … {end}");
    }
}

/// The configuration without its secret, to compare.
fn shown(config: &Config) -> String {
    format!("{:#?}", Config { admin_key: None, ..config.clone() })
}

/// What is printed loads to the same.
fn check_print(loaded: &Loaded) {
    let flags = Flags { yes: true, ..Flags::default() };
    let printed = print(loaded);
    let again = load_with(&flags, &[], &[(FILE, &printed)]).map_err(|errors| format!("{errors}\n{printed}")).unwrap();
    assert_eq!(shown(&again.config), shown(&loaded.config), "{printed}");
}

#[test]
fn every_default_is_accepted_and_every_key_is_printed() {
    let loaded = env(&[]).unwrap();
    let config = &loaded.config;
    assert!(config.base_url.is_none() && config.admin_key.is_none() && config.domains.is_empty());
    assert_eq!(config.listen, [Listen { address: "127.0.0.1:8080".parse().unwrap(), proxy_protocol: false }]);
    assert_eq!(config.connections.max, None);
    assert_eq!(config.redirect.permanent_cache_control, "private, max-age=90");
    assert_eq!(config.cache.memory, None);
    assert_eq!(config.cache.stale_max, Duration::from_secs(86_400));
    assert_eq!(config.metrics.allow, [Peers::Loopback, Peers::Private]);
    assert_eq!(config.codes.length, 7);
    let printed = print(&loaded);
    for key in KEYS.iter().filter(|key| key.section() != DOMAINS) {
        let (value, absent) = (format!("{} = ", key.leaf()), format!("# {} ", key.leaf()));
        let is_its = |line: &str| line.starts_with(&value) || line.starts_with(&absent);
        assert!(printed.lines().any(is_its), "{}", key.name);
    }
    check_print(&loaded);
}

const EVERYTHING: &str = r#"
    base_url = "https://go.example/s/"
    data = "/var/lib/waypost"
    listen = [{ address = "[::1]:80", proxy_protocol = true }, { address = "127.0.0.1:81" }]
    [workers]
    count = 2
    [connections]
    max = 1_000
    header_timeout = "1ms"
    idle_timeout = "2min"
    [[domains]]
    host = "BÜCHER.example."
    gone_url = "https://b.example/ü"
    [[domains]]
    host = "b.example"
    [redirect]
    status = 308
    cache_control = "no-store"
    permanent_cache_control = "public"
    forward_query = false
    root_url = "https://example"
    not_found_url = "https://example/404"
    gone_url = "https://example/410"
    [pages]
    dir = "C:\\a \"b\"\n# c"
    [api]
    listen = "127.0.0.1:9000"
    [metrics]
    allow = ["private", "192.0.2.1"]
    [postgres]
    url = "postgresql://db/waypost"
    replica_url = "postgres://replica"
    replica_max_lag = "1s"
    direct_url = "postgres://direct"
    migrate_url = "postgres://db/owner"
    migrate = "check"
    pool = 2
    pool_timeout = "2s"
    max_lifetime = "2h"
    lookups = 5
    lookup_timeout = "1ms"
    statements = "unnamed"
    connect_timeout = "3s"
    statement_timeout = "3s"
    [redis]
    url = "rediss://cache:6380"
    ca_file = "ca.pem"
    timeout = "5ms"
    ttl = "1h"
    prefix = "w:"
    [breaker]
    failures = 3
    recovery = "1s"
    [cache]
    memory = "64MiB"
    ttl = "1s"
    negative_ttl = "0s"
    stale_max = "90d"
    [codes]
    strategy = "permuted"
    length = 4
    alphabet = "base36"
    case = "insensitive"
    worker_id = 7
    worker_lease = "30s"
    [shorten]
    open = true
    [limits]
    shorten_per_minute = 0
    key_per_minute = 5
    [targets]
    schemes = ["HTTPS", "mailto"]
    max_bytes = 32768
    blocklist = "block.txt"
    own_hosts = ["Short.example", "[::1]:80", "127.0.0.1:8080"]
    lookalikes = "refuse"
    [proxies]
    trusted = ["10.1.2.3/8", "::1"]
    [spool]
    ring = "/run/rings"
    ring_size = "260KiB"
    dir = "/var/spool/waypost"
    segment = "1MiB"
    sync = "1s"
    max_bytes = "4MiB"
    keep = "0s"
    keep_bytes = "0B"
    [visits]
    keep = "1d"
    raw = false
    sinks = []
    request_id_header = "x-amzn-trace-id"
    bots = "drop"
    bot_list = "bots.txt"
    agents_per_day = 100
    [stats]
    public = true
    [privacy]
    address = "none"
    visitor = "daily"
    honour_dnt = true
    [log]
    format = "text"
    level = "debug"
    access = true
    [shutdown]
    drain = "5s"
    grace = "1min"
    flush = "0s"
"#;

#[test]
fn every_key_arrives() {
    let loaded = file(EVERYTHING).unwrap();
    check_print(&loaded);
    let Config { base_url, domains, redirect, targets, proxies, metrics, cache, listen, .. } = &loaded.config;
    assert_eq!(base_url.as_ref().map(Target::as_str), Some("https://go.example/s"));
    assert_eq!(domains[0].host, "xn--bcher-kva.example");
    assert_eq!(domains[0].gone_url.as_ref().map(Target::as_str), Some("https://b.example/%C3%BC"));
    assert_eq!(domains[1].gone_url, redirect.gone_url, "a domain without its own has the instance's");
    assert_eq!(redirect.root_url.as_ref().map(Target::as_str), Some("https://example/"));
    assert_eq!(targets.own_hosts, ["short.example", "[::1]:80", "127.0.0.1:8080"]);
    assert_eq!(targets.schemes, ["https", "mailto"]);
    assert_eq!(proxies.trusted, ["10.0.0.0/8".parse().unwrap(), "::1/128".parse::<IpNet>().unwrap()]);
    assert_eq!(metrics.allow, [Peers::Private, Peers::Net("192.0.2.1/32".parse().unwrap())]);
    assert_eq!((cache.memory, cache.negative_ttl), (Some(64 << 20), Duration::ZERO));
    assert!(listen[0].proxy_protocol && !listen[1].proxy_protocol);

    // None of the values above is a default, so each field that is not read from its key would show.
    let defaults = shown(&env(&[]).unwrap().config);
    let all = shown(&loaded.config);
    let alike: Vec<&str> = all.lines().filter(|line| line.contains(": ") && defaults.contains(*line)).collect();
    let structs = |line: &&str| {
        !line.ends_with(['{', '[', '(']) && !line.contains("proxy_protocol") && !line.contains("admin_key")
    };
    assert_eq!(alike.into_iter().filter(structs).collect::<Vec<_>>(), Vec::<&str>::new());
}

#[test]
fn names_of_choices_are_accepted() {
    for key in KEYS {
        let Kind::OneOf(names) = key.kind else { continue };
        for name in names {
            let variable = key.variable().unwrap();
            let mut variables = vec![(variable.as_str(), *name)];
            if *name == "insensitive" {
                variables.push(("WAYPOST_CODES__ALPHABET", "base36"));
            }
            check_print(&env(&variables).unwrap());
        }
    }
}

#[test]
fn flags_over_environment_over_file_over_defaults() {
    let (text, variables) = (
        "data = \"f\"\n[[listen]]\naddress = \"1.1.1.1:1\"\n",
        [("WAYPOST_DATA", "e"), ("WAYPOST_LISTEN", "2.2.2.2:2, [::]:2")],
    );
    let flags =
        Flags { data: Some("g".into()), listen: vec!["3.3.3.3:3".to_owned()], workers: Some(3), ..Flags::default() };
    let none = Flags::default();
    for (flags, variables, text, data, listen, from) in [
        (&none, &[][..], "", "./waypost-data", &["127.0.0.1:8080"][..], "default"),
        (&none, &[], text, "f", &["1.1.1.1:1"], "./waypost.toml:1"),
        (&none, &variables, text, "e", &["2.2.2.2:2", "[::]:2"], "WAYPOST_DATA"),
        (&flags, &variables, text, "g", &["3.3.3.3:3"], "--data"),
    ] {
        let loaded = load_with(flags, variables, &[(FILE, text)]).unwrap();
        assert_eq!(loaded.config.data, Path::new(data));
        assert_eq!(loaded.config.listen.iter().map(|one| one.address.to_string()).collect::<Vec<_>>(), listen);
        assert!(print(&loaded).contains(&format!("data = \"{data}\"  # {from}\n")), "{}", print(&loaded));
        assert_eq!(loaded.config.workers.count, flags.workers.unwrap_or(0));
        check_print(&loaded);
    }
}

#[test]
fn variables_of_every_kind() {
    let loaded = load_with(
        &Flags::default(),
        &[
            ("WAYPOST_PROXIES__TRUSTED", "10.0.0.0/8,::1"),
            ("WAYPOST_TARGETS__OWN_HOSTS", ""),
            ("WAYPOST_LOG__ACCESS", "true"),
            ("WAYPOST_CODES__LENGTH", "9"),
            ("WAYPOST_CACHE__MEMORY", "512MiB"),
            ("WAYPOST_CACHE__TTL_FILE", "/run/ttl"),
            ("WAYPOST_ADMIN_KEY_FILE", "/run/key"),
            ("WAYPOST_SERVER", "https://x"),
            ("WAYPOST_POSTGRES_URL_FILE", "/run/postgres"),
            ("WAYPOST_REDIS_URL", "redis://cache"),
            ("WAYPOST_CODES__WORKER_ID", "0"),
            ("WAYPOST_KEY", "k"),
            ("WAYPOST_SERVICE_HOST", "10.0.0.1"),
            ("WAYPOST_SERVICE_PORT_HTTP", "80"),
            ("WAYPOST_PORT", "tcp://10.0.0.1:80"),
            ("WAYPOST_REDIS_PORT_6379_TCP_ADDR", "10.0.0.2"),
            ("PATH", "/bin"),
        ],
        &[
            ("/run/ttl", "5s\r\n"),
            ("/run/key", "correct-horse-battery\n"),
            ("/run/postgres", "postgres://a:pony@db/w\n"),
        ],
    )
    .unwrap();
    let Config { proxies, targets, log, codes, cache, admin_key, .. } = &loaded.config;
    assert_eq!((proxies.trusted.len(), targets.own_hosts.len(), log.access, codes.length), (2, 0, true, 9));
    assert_eq!((cache.memory, cache.ttl), (Some(512 << 20), Duration::from_secs(5)));
    assert_eq!(admin_key.as_ref().map(Secret::expose), Some("correct-horse-battery"));
    let printed = print(&loaded);
    assert!(printed.contains("# admin_key = \"(hidden)\"  # WAYPOST_ADMIN_KEY_FILE\n"), "{printed}");
    let (postgres, redis) = (loaded.config.postgres.as_ref().unwrap(), loaded.config.redis.as_ref().unwrap());
    assert_eq!((postgres.url.expose(), redis.url.expose()), ("postgres://a:pony@db/w", "redis://cache"));
    assert_eq!(codes.worker_id, Some(0));
    assert!(printed.contains("# url = \"postgres://(hidden)@db/w\"  # WAYPOST_POSTGRES_URL_FILE\n"), "{printed}");
    assert!(printed.contains("url = \"redis://cache\"  # WAYPOST_REDIS_URL\n"), "{printed}");
    let shown = format!("{printed}{loaded:?}");
    assert!(!shown.contains("horse") && !shown.contains("pony"), "{shown}");
}

#[test]
fn which_file() {
    let [here, etc] = PLACES;
    let named = Flags { config: Some("a.toml".into()), ..Flags::default() };
    let files: [(&str, &str); 4] = [("a.toml", ""), ("b.toml", ""), (here, ""), (etc, "")];
    for (flags, variable, files, want) in [
        (&named, Some("b.toml"), &files[..], Some("a.toml")),
        (&Flags::default(), Some("b.toml"), &files, Some("b.toml")),
        (&Flags::default(), None, &files, Some(here)),
        (&Flags::default(), None, &files[3..], Some(etc)),
        (&Flags::default(), None, &[], None),
    ] {
        let env: Vec<_> = variable.map(|path| ("WAYPOST_CONFIG", path)).into_iter().collect();
        assert_eq!(load_with(flags, &env, files).unwrap().file.as_deref(), want.map(Path::new));
    }
    check(load_with(&named, &[], &files[1..]), &[("--config: cannot read a.toml: ", "no such file")]);
    check(env(&[("WAYPOST_CONFIG", "b.toml")]), &[("WAYPOST_CONFIG: cannot read b.toml: ", "no such file")]);
    let denied = load(&Flags::default(), [], |_| Err(io::Error::new(io::ErrorKind::PermissionDenied, "denied")));
    check(denied, &[("default: cannot read ./waypost.toml: ", "denied")]);
}

#[test]
fn what_a_file_may_not_say() {
    for (text, start, end) in [
        ("\n[cache]\nmemroy = \"1GiB\"", "3: unknown key cache.memroy: ", "did you mean cache.memory"),
        ("[redirect]\nttl = \"1s\"", "2: unknown key redirect.ttl: ", "did you mean redis.ttl"),
        ("[[listen]]\nadress = \"127.0.0.1:1\"", "2: unknown key listen.adress: ", "did you mean listen.address"),
        ("[cache]\nsize = 5", "2: unknown key cache.size: ", "[cache] has memory, ttl, negative_ttl, stale_max"),
        ("seven = 5", "1: unknown key seven: ", "`waypost config print` shows the known ones"),
        ("ttl = 5", "1: unknown key ttl: ", "did you mean redis.ttl"),
        ("cache.ttl.x = 5", "1: cache.ttl must be a duration in quotes, such as \"30s\", not a table", ""),
        ("[cahce]\nttl = 5", "1: unknown section [cahce]: ", "did you mean [cache]"),
        ("[mysql]\nurl = 5", "1: unknown section [mysql]: ", "shows the known ones"),
        ("[redis]\nurl = 5", "2: redis.url must be an address in quotes", "not 5"),
        ("[postgres]\nurl = \"mysql://a:secret@b\"", "2: postgres.url must begin with postgres://", "postgresql://"),
        ("[codes]\nworker_id = 1024", "2: codes.worker_id must be a whole number from 0 to 1023", "not 1024"),
        ("cache = 5", "1: cache is a section: ", "write [cache], and its keys below"),
        ("[[cache]]", "1: cache is a section: ", "write [cache], and its keys below"),
        ("[listen]\naddress = \"127.0.0.1:1\"", "1: listen is a list of tables: ", "write [[listen]] for each"),
        ("listen = [\"127.0.0.1:1\"]", "1: listen is a list of tables: ", "write [[listen]] for each"),
        ("domains = \"a\"", "1: domains is a list of tables: ", "write [[domains]] for each"),
        (
            "admin_key = \"x\"",
            "1: admin_key stands in the environment alone: ",
            "set WAYPOST_ADMIN_KEY or WAYPOST_ADMIN_KEY_FILE",
        ),
        ("[cache]\nttl = 60", "2: cache.ttl \"60\" has no unit: ", "such as \"60s\""),
        ("[cache]\nmemory = 512", "2: cache.memory \"512\" has no unit: ", "such as \"512MiB\""),
        ("[cache]\nttl = true", "2: cache.ttl must be a duration in quotes, ", "not true"),
        ("[log]\naccess = \"yes\"", "2: log.access must be true or false, ", "not \"yes\""),
        ("[workers]\ncount = -1", "2: workers.count must be a whole number from 0 to 1024, ", "not \"-1\""),
        ("[workers]\ncount = 1025", "2: workers.count must be a whole number from 0 to 1024, ", "not 1025"),
        ("[targets]\nschemes = [5]", "2: targets.schemes must be a list of texts", "not 5"),
        ("a = \n", "1: this is not toml: ", ""),
        ("data = \"a\"\ndata = \"b\"", "2: this is not toml: ", "duplicate key"),
    ] {
        check(file(text), &[(&format!("{FILE}:{start}"), end)]);
    }
}

#[test]
fn what_a_value_may_not_be() {
    for (variable, value, end) in [
        ("BASE_URL", "go.example", "(relative URL without a base)"),
        ("BASE_URL", "ftp://go.example", "must begin with http:// or https://, not \"ftp:\""),
        ("BASE_URL", "https://go.example/?", "leave out what stands after ? or #, not \"https://go.example/?\""),
        ("BASE_URL", "https://go.example/#a", "not \"https://go.example/#a\""),
        ("BASE_URL", "https://u:p@go.example", "leave out what stands before the @"),
        ("DATA", "", "data must be a path, not \"\""),
        ("API__LISTEN", "localhost:80", "such as 127.0.0.1:8080, 0.0.0.0:80 or [::]:80, not \"localhost:80\""),
        ("API__LISTEN", ":80", "not \":80\""),
        ("API__LISTEN", "127.0.0.1", "not \"127.0.0.1\""),
        ("CONNECTIONS__HEADER_TIMEOUT", "0s", "must be at least 1ms, not 0s"),
        ("CONNECTIONS__IDLE_TIMEOUT", "5", "such as \"5s\""),
        ("REDIRECT__STATUS", "304", "must be one of [301, 302, 303, 307, 308], not 304"),
        ("REDIRECT__STATUS", "200", "must be a whole number from 301 to 308, not 200"),
        ("REDIRECT__CACHE_CONTROL", " ", "such as \"no-store\", not 0"),
        ("REDIRECT__CACHE_CONTROL", "é", "such as \"no-store\", not \"é\""),
        ("REDIRECT__ROOT_URL", "/", "(relative URL without a base)"),
        ("REDIRECT__GONE_URL", "javascript:0", "not \"javascript:\""),
        ("REDIRECT__FORWARD_QUERY", "1", "must be true or false, not \"1\""),
        ("METRICS__ALLOW", "public", "not \"public\""),
        ("CACHE__MEMORY", "1GB", "such as \"512MiB\""),
        ("CODES__LENGTH", "3", "must be a whole number from 4 to 32, not 3"),
        ("CODES__LENGTH", "33", "not 33"),
        ("CODES__LENGTH", "seven", "not \"seven\""),
        ("CODES__ALPHABET", "base64", "must be one of base62, base58, base36, not \"base64\""),
        ("CODES__CASE", "insensitive", "set codes.alphabet to base36"),
        ("TARGETS__MAX_BYTES", "32769", "must be a whole number from 1 to 32768, not 32769"),
        ("TARGETS__SCHEMES", "", "must name at least one"),
        ("TARGETS__SCHEMES", "https:", "not \"https:\""),
        ("TARGETS__SCHEMES", "http,,https", "not \"\""),
        ("TARGETS__OWN_HOSTS", "https://go.example", "not \"https://go.example\""),
        ("TARGETS__OWN_HOSTS", "go.example:99999", "not \"go.example:99999\""),
        ("PROXIES__TRUSTED", "10.0.0.0/33", "not \"10.0.0.0/33\""),
        ("PROXIES__TRUSTED", "proxy.example", "not \"proxy.example\""),
        ("SPOOL__RING_SIZE", "255KiB", "must be from 256KiB to 1024MiB, not \"255KiB\""),
        ("SPOOL__RING_SIZE", "2GiB", "must be from 256KiB to 1024MiB, not \"2GiB\""),
        ("SPOOL__RING_SIZE", "257KiB", "spool.ring_size must be a multiple of 4KiB"),
        ("SPOOL__SEGMENT", "512KiB", "must be from 1024KiB to 1024MiB, not \"512KiB\""),
        ("SPOOL__SYNC", "0s", "must be at least 1ms, not 0s"),
        ("SPOOL__MAX_BYTES", "31MiB", "spool.max_bytes must be at least 4 times spool.segment, 32MiB"),
        ("SPOOL__KEEP", "15", "such as \"15s\""),
        ("SPOOL__KEEP_BYTES", "1G", "such as \"512MiB\""),
        ("VISITS__KEEP", "23h", "must be at least 1d, not 23h"),
        ("VISITS__RAW", "no", "must be true or false, not \"no\""),
        ("VISITS__SINKS", "kafka", "must be [\"store\"], or [] for none, not \"kafka\""),
        ("VISITS__REQUEST_ID_HEADER", "X Id", "such as \"X-Request-Id\", not \"X Id\""),
        ("VISITS__BOTS", "hide", "must be one of separate, count, drop, not \"hide\""),
        ("VISITS__AGENTS_PER_DAY", "99", "must be a whole number from 100 to 10000000, not 99"),
        ("STATS__PUBLIC", "yes", "must be true or false, not \"yes\""),
        ("PRIVACY__ADDRESS", "hashed", "must be one of truncated, full, none, not \"hashed\""),
        ("PRIVACY__VISITOR", "none", "must be one of deployment, daily, not \"none\""),
        ("PRIVACY__HONOUR_DNT", "1", "must be true or false, not \"1\""),
        ("LOG__LEVEL", "3", "must be one of error, warn, info, debug, trace, not \"3\""),
        ("ADMIN_KEY", "nineteen-bytes-long", "has 19 bytes: it must have from 20 to 256"),
        ("ADMIN_KEY", "twenty bytes and spaces", "as it travels in a header"),
        ("LISTEN", " ", "write one, such as 127.0.0.1:8080, or unset it"),
        ("LISTEN", "127.0.0.1:80,127.0.0.1:80", "127.0.0.1:80 is given twice: leave one out"),
        ("DATA", "a\nb", "holds the value alone"),
    ] {
        let variable = format!("WAYPOST_{variable}");
        check(env(&[(&variable, value)]), &[(&format!("{variable}: "), end)]);
    }
}

#[test]
fn unknown_variables() {
    for (variable, hint) in [
        ("WAYPOST_CACHE__MEMROY", "did you mean WAYPOST_CACHE__MEMORY"),
        ("WAYPOST_CACHE_MEMORY", "did you mean WAYPOST_CACHE__MEMORY"),
        ("WAYPOST_CACHE__MEMROY_FILE", "did you mean WAYPOST_CACHE__MEMORY"),
        ("WAYPOST_LISTEN__ADDRESS", "did you mean WAYPOST_LISTEN"),
        ("WAYPOST_DOMAINS__HOST", "[[domains]] stands in the file alone"),
        ("WAYPOST_data", "did you mean WAYPOST_DATA"),
        ("WAYPOST_FOO", "`waypost config print` shows the known keys"),
        ("WAYPOST_", "`waypost config print` shows the known keys"),
        ("WAYPOST_PORT", "`waypost config print` shows the known keys"),
    ] {
        check(env(&[(variable, "8080")]), &[(&format!("{variable}: unknown variable: "), hint)]);
    }
}

#[test]
fn a_variable_beside_its_file() {
    let both = [("WAYPOST_DATA", "a"), ("WAYPOST_DATA_FILE", "/run/data")];
    let want = ("WAYPOST_DATA_FILE: is given beside WAYPOST_DATA", "unset one of them");
    check(load_with(&Flags::default(), &both, &[("/run/data", "b")]), &[want]);
    let missing = ("WAYPOST_DATA_FILE: cannot read /run/data: ", "no such file");
    check(env(&[("WAYPOST_DATA_FILE", "/run/data")]), &[missing]);
}

#[test]
fn values_that_do_not_go_together() {
    for (text, start, end) in [
        ("[[listen]]\naddress = \"[::]:80\"\n[[listen]]\naddress = \"[::]:80\"", "3: listen.address", "leave one out"),
        ("[api]\nlisten = \"127.0.0.1:8080\"", "2: api.listen 127.0.0.1:8080 is a listener already", "the same one"),
        (
            "[[domains]]\nhost = \"a.b\"\n[[domains]]\nhost = \"A.b.\"",
            "3: domains.host a.b stands at",
            ":1 already: leave one out",
        ),
        ("[[domains]]\nroot_url = \"https://a\"", "1: domains.host must be a host name", "not \"\""),
        ("[[domains]]\nhost = \"a.b:80\"", "2: domains.host must be a host name", "not \"a.b:80\""),
        ("[[domains]]\nhost = \"a..b\"", "2: domains.host must be a host name", "not \"a..b\""),
        ("[[domains]]\nhost = 5", "2: domains.host must be text in quotes", "not 5"),
    ] {
        check(file(text), &[(&format!("{FILE}:{start}"), end)]);
    }
    // Two listeners on any free port are two, and so is one for the API.
    assert!(env(&[("WAYPOST_LISTEN", "127.0.0.1:0,127.0.0.1:0"), ("WAYPOST_API__LISTEN", "127.0.0.1:0")]).is_ok());
}

#[test]
fn open_to_anybody() {
    for (listen, api, yes, refused) in [
        ("127.0.0.1:80,[::1]:80,[::ffff:127.0.0.1]:80", "", false, false),
        ("127.0.0.1:80,0.0.0.0:80", "", false, true),
        ("[::]:80", "", false, true),
        ("[::]:80", "", true, false),
        ("[::]:80", "127.0.0.1:81", false, false),
        ("127.0.0.1:80", "192.0.2.1:81", false, true),
    ] {
        let flags = Flags { open: true, yes, ..Flags::default() };
        let got = load_with(&flags, &[("WAYPOST_LISTEN", listen), ("WAYPOST_API__LISTEN", api)], &[]);
        match got {
            Ok(loaded) => assert!(loaded.config.shorten.open && !refused, "{listen} {api}"),
            Err(errors) if refused => {
                check(Err(errors), &[("--open: shorten.open lets anybody shorten, and", "--yes")])
            }
            Err(errors) => panic!("{listen} {api}: {errors}"),
        }
    }
}

#[test]
fn all_errors_at_once() {
    let text = "dta = 1\n[cache]\nttl = 5\nmemory = \"1\"\n[[listen]]\naddress = \"x\"\nproxy = 1\n\
                [codes]\nalphabet = \"base63\"\ncase = \"insensitive\"\n[[domains]]\nroot_url = \"x\"\ngone_url = \"y\"\n";
    let flags = Flags { base_url: Some("x".to_owned()), workers: Some(5000), open: true, ..Flags::default() };
    let variables = [("WAYPOST_API__LISTEN", "y"), ("WAYPOST_LOGS", "z"), ("WAYPOST_LOG__ACCESS", "no")];
    let errors = load_with(&flags, &variables, &[(FILE, text)]).expect_err("errors").to_string();
    let mut starts: Vec<String> =
        errors.lines().map(|line| line.splitn(3, ' ').take(2).collect::<Vec<_>>().join(" ")).collect();
    starts.sort();
    let mut want = [
        "--base-url: base_url",
        "--workers: workers.count",
        "WAYPOST_API__LISTEN: api.listen",
        "WAYPOST_LOGS: unknown",
        "WAYPOST_LOG__ACCESS: log.access",
        "./waypost.toml:1: unknown",
        "./waypost.toml:3: cache.ttl",
        "./waypost.toml:4: cache.memory",
        "./waypost.toml:6: listen.address",
        "./waypost.toml:7: unknown",
        "./waypost.toml:9: codes.alphabet",
        "./waypost.toml:11: domains.host",
        "./waypost.toml:12: domains.root_url",
        "./waypost.toml:13: domains.gone_url",
    ];
    want.sort_unstable();
    assert_eq!(starts, want, "{errors}");
}

#[test]
fn a_file_past_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("waypost.toml");
    for (bytes, fits) in [(FILE_BYTES_MAX, true), (FILE_BYTES_MAX + 1, false)] {
        std::fs::write(&path, " ".repeat(bytes as usize)).unwrap();
        assert_eq!(read(&path).is_ok(), fits, "{bytes}");
    }
    assert_eq!(read(&folder.path().join("none")).map_err(|error| error.kind()), Err(io::ErrorKind::NotFound));
}

proptest! {
    #[test]
    fn any_file_is_a_configuration_or_errors(
        text in "\\PC{0,60}|([a-z\\[\\]]{1,6}|\\[\\[listen\\]\\]|[=.\"\n ]|5s|true|[0-9]){0,20}",
    ) {
        match file(&text) {
            Ok(loaded) => check_print(&loaded),
            Err(Errors(errors)) => prop_assert!(!errors.is_empty()),
        }
    }

    #[test]
    fn any_value_is_taken_or_refused(
        index in 0..KEYS.len(),
        value in "\\PC{0,30}|[a-z0-9.:/,\\[\\]\"\\\\-]{0,20}",
    ) {
        let name = KEYS[index].variable().unwrap_or_else(|| "WAYPOST_LISTEN".to_owned());
        match env(&[(&name, &value)]) {
            Ok(loaded) => check_print(&loaded),
            Err(Errors(errors)) => prop_assert!(!errors.is_empty()),
        }
    }
}
