//! `loadgen http`: flags instead of a file.
//!
//! In: a URL and flags whose names are those of wrk, wrk2 and oha. Out: the text of a scenario with one class, and that
//! scenario; the text shows what such a file would look like. Never: a second way into the engine.

use std::path::Path;

use super::Scenario;
use super::change::Changes;
use super::load::{LoadError, from_toml, target};
use crate::slo::Expression;
use crate::units;

/// Flags of `loadgen http`.
#[derive(Debug, Clone, clap::Args)]
pub struct Flags {
    /// What to ask for: http://HOST:PORT/PATH
    pub url: String,
    /// Requests a second, such as 20k, or a ramp 1k:20k; without it a closed loop of --connections clients
    #[arg(short = 'R', long, visible_short_alias = 'q', visible_alias = "qps", value_parser = rate)]
    pub rate: Option<Rate>,
    /// How long arrivals come
    #[arg(short, long, visible_short_alias = 'z', default_value = "10s", value_parser = duration)]
    pub duration: String,
    /// How many requests come instead of how long; needs --rate
    #[arg(short = 'n', long, conflicts_with = "duration", value_parser = requests)]
    pub requests: Option<u64>,
    /// Most connections at a time
    #[arg(short, long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub connections: u32,
    /// Threads that send; 0: as many as leave a core to a target on this machine
    #[arg(short, long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=256))]
    pub threads: u16,
    /// A header of each request, "Name: value"; may be repeated
    #[arg(short = 'H', long = "header", value_parser = header)]
    pub headers: Vec<(String, String)>,
    /// Method; POST where there is a body
    #[arg(short, long, visible_short_alias = 'X')]
    pub method: Option<String>,
    /// Body of each request
    #[arg(short, long)]
    pub body: Option<String>,
    /// From the intended instant; what takes longer counts as at least that long
    #[arg(long, default_value = "5s", value_parser = duration)]
    pub timeout: String,
    /// Arrivals as independent visitors have them instead of evenly spaced
    #[arg(long, requires = "rate")]
    pub poisson: bool,
    /// Statuses of a right answer, such as 301,302; any below 400 otherwise
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u16).range(200..=599))]
    pub expect: Vec<u16>,
    /// What the answer's Location must be
    #[arg(long)]
    pub location: Option<String>,
    /// What must hold, such as "p(99) < 5ms" or "errors < 0.1%"; may be repeated
    #[arg(long, value_parser = expression)]
    pub slo: Vec<String>,
    /// The same load before, recorded apart
    #[arg(long, value_parser = duration)]
    pub warmup: Option<String>,
    /// Seed of all chance
    #[arg(long, default_value_t = 1)]
    pub seed: u32,
    /// pool, session:MEAN (so many requests on average, then a new connection), or per-request
    #[arg(long, default_value = "pool", value_parser = connection)]
    pub connection: ConnectionFlag,
    /// Requests in flight on one connection of a pool
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub pipeline: u16,
    /// Addresses to come from, such as 127.66.0.0/29
    #[arg(long)]
    pub bind: Option<ipnet::IpNet>,
}

/// `-R`: requests a second, all the time or from … to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    pub from: f64,
    pub to: Option<f64>,
}

/// `--connection`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ConnectionFlag {
    Pool,
    /// Mean of its requests.
    Session(f64),
    PerRequest,
}

fn rate(text: &str) -> Result<Rate, String> {
    let rate = match text.split_once(':') {
        Some((from, to)) => Rate { from: units::number_of(from)?, to: Some(units::number_of(to)?) },
        None => Rate { from: units::number_of(text)?, to: None },
    };
    if rate.from + rate.to.unwrap_or(0.0) <= 0.0 {
        return Err("nothing arrives at a rate of 0: leave it out for a closed loop".to_owned());
    }
    Ok(rate)
}

/// Kept as it was typed, for the scenario's text.
fn duration(text: &str) -> Result<String, String> {
    match units::duration_ns(text)? {
        0 => Err("0s is too short".to_owned()),
        _ => Ok(text.to_owned()),
    }
}

fn requests(text: &str) -> Result<u64, String> {
    match units::count_of(text)? {
        0 => Err("0 requests are none".to_owned()),
        count => Ok(count),
    }
}

fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("write it as \"Name: value\"")?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

fn expression(text: &str) -> Result<String, String> {
    Expression::parse(text).map(|expression| expression.text)
}

fn connection(text: &str) -> Result<ConnectionFlag, String> {
    match text.split_once(':') {
        None if text == "pool" => Ok(ConnectionFlag::Pool),
        None if text == "per-request" => Ok(ConnectionFlag::PerRequest),
        Some(("session", mean)) => units::number_of(mean).map(ConnectionFlag::Session),
        _ => Err("use pool, per-request, or session:MEAN such as session:1.4".to_owned()),
    }
}

/// The scenario that the flags mean.
///
/// # Errors
///
/// What is wrong with a flag, or with flags together.
pub fn scenario(flags: &Flags) -> Result<Scenario, LoadError> {
    let text = text(flags).map_err(LoadError::one)?;
    from_toml("http", &text, Path::new("."), &Changes::default())
}

fn text(flags: &Flags) -> Result<String, String> {
    let (origin, path) = split_url(&flags.url)?;
    if let Some((name, _)) = flags.headers.iter().find(|(_, value)| value.contains("{key}")) {
        let way_out = "write the key itself (no report shows it), or use `loadgen run` with --key-file";
        return Err(format!("-H {name}: {{key}} is of scenarios: {way_out}"));
    }
    if (flags.rate.is_some() || flags.pipeline > 1) && flags.connections < u32::from(flags.threads) {
        let (connections, threads) = (flags.connections, flags.threads);
        return Err(format!(
            "-c {connections} is less than -t {threads}, and each thread has a connection: raise -c, or lower -t"
        ));
    }
    let mut lines = vec![
        "[run]".to_owned(),
        format!("target = {}", quoted(origin)),
        format!("seed = {}", flags.seed),
        format!("workers = {}", flags.threads),
        format!("timeout = {}", quoted(&flags.timeout)),
        // As long as the last arrival may take, and a little.
        format!("drain = {}", quoted(&units::exact_duration(units::duration_ns(&flags.timeout)? + 1_000_000_000))),
    ];
    lines.extend(flags.warmup.as_ref().map(|warmup| format!("warmup = {}", quoted(warmup))));

    let method = flags.method.as_deref().unwrap_or(if flags.body.is_some() { "POST" } else { "GET" });
    // A target is known of a code, so the path becomes one.
    let path = if let Some(location) = &flags.location {
        lines.push("\n[links]".to_owned());
        lines.push(format!("asked = {{ targets = {{ {} = {} }} }}", quoted(&path[1..]), quoted(location)));
        "/{code}"
    } else {
        path
    };
    lines.push("\n[traffic.http]".to_owned());
    lines.push(format!("request = {}", quoted(&format!("{method} {path}"))));
    lines.extend(flags.body.as_ref().map(|body| format!("body = {}", quoted(body))));
    for (name, value) in &flags.headers {
        lines.push(format!("headers.{} = {}", quoted(name), quoted(value)));
    }
    if flags.location.is_some() {
        lines.push("code = { pick = \"one\", from = \"asked\" }".to_owned());
        lines.push("expect.location = \"known\"".to_owned());
    }
    if !flags.expect.is_empty() {
        lines.push(format!("expect.status = {:?}", flags.expect));
    }
    lines.push(match flags.connection {
        ConnectionFlag::Pool => "connection.kind = \"pool\"".to_owned(),
        ConnectionFlag::Session(mean) => {
            format!("connection.kind = \"session\"\nconnection.requests = \"geometric({mean})\"")
        }
        ConnectionFlag::PerRequest => "connection.kind = \"per_request\"".to_owned(),
    });
    if flags.pipeline > 1 {
        lines.push(format!("connection.pipeline = {}", flags.pipeline));
    }
    if flags.rate.is_some() {
        lines.push(format!("connection.max = {}", flags.connections));
        // A pool of a fixed size, as wrk2 has it: all its connections are open before the first arrival.
        let when_full = if flags.connection == ConnectionFlag::Pool { "queue" } else { "grow" };
        lines.push(format!("connection.when_full = \"{when_full}\""));
    } else {
        // Each connection has as many clients as it may have requests in flight.
        let clients = u64::from(flags.connections) * u64::from(flags.pipeline);
        lines.push(format!("closed = {{ clients = {clients} }}"));
    }
    lines.extend(flags.bind.map(|bind| format!("bind = \"{bind}\"")));

    lines.push("\n[[phase]]\nname = \"run\"".to_owned());
    lines.push(format!("for = {}", quoted(&length(flags)?)));
    match flags.rate {
        Some(Rate { from, to: Some(to) }) => lines.push(format!("ramp = {{ from = {from}, to = {to} }}")),
        Some(Rate { from, to: None }) => lines.push(format!("rate = {from}")),
        None => lines.push("also = [\"http\"]".to_owned()),
    }
    if flags.rate.is_some() {
        lines.push(format!("arrivals = \"{}\"", if flags.poisson { "poisson" } else { "even" }));
        lines.push("mix = { http = 1 }".to_owned());
    }
    if !flags.slo.is_empty() {
        let must: Vec<String> = flags.slo.iter().map(|expression| quoted(expression)).collect();
        lines.push(format!("\n[[slo]]\nmust = [{}]", must.join(", ")));
    }
    lines.push(String::new());
    Ok(lines.join("\n"))
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// `-d`, or as long as `-n` requests take to arrive.
fn length(flags: &Flags) -> Result<String, String> {
    match (flags.requests, flags.rate) {
        (None, _) => Ok(flags.duration.clone()),
        (Some(_), None) => Err("-n needs a rate: add -R, or give a time with -d".to_owned()),
        (Some(count), Some(Rate { from, to })) => {
            let mean = (from + to.unwrap_or(from)) / 2.0;
            let ns = (count as f64 / mean * 1e9).round() as u64;
            Ok(units::exact_duration(ns))
        }
    }
}

/// `http://HOST:PORT` and the path with its query; a fragment is never sent (RFC 9110, 7.1).
fn split_url(url: &str) -> Result<(&str, &str), String> {
    let begin = url.find("://").map_or(0, |at| at + 3);
    let end = url[begin..].find(['/', '?', '#']).map_or(url.len(), |at| begin + at);
    let (origin, rest) = url.split_at(end);
    target(origin)?;
    match rest.split('#').next() {
        None | Some("") => Ok((origin, "/")),
        Some(path) if path.starts_with('/') => Ok((origin, path)),
        Some(path) => Err(format!("{url:?} has no path before {path:?}: write http://HOST:PORT/{path}")),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::{Flags, scenario};
    use crate::plan::arrivals;
    use crate::scenario::{ArrivalKind, Closed, ConnectionKind, Curve, Pick, Requests, Scenario, WhenFull};

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        flags: Flags,
    }

    fn load(line: &str) -> Result<Scenario, String> {
        let words = std::iter::once("http").chain(line.split_whitespace());
        let command = Command::try_parse_from(words).map_err(|error| error.to_string())?;
        scenario(&command.flags).map_err(|error| error.to_string())
    }

    #[test]
    fn flags_mean_a_scenario() {
        let open = load("http://127.0.0.1:8080/abc?x=1#y -R 2k -d 5s -c 10 -t 2 --poisson --slo p(99)<5ms").unwrap();
        assert_eq!((open.run.target.port, open.run.workers), (8080, 2));
        assert_eq!(open.traffic[0].path, "/abc?x=1");
        assert_eq!(open.traffic[0].connection.max, 10);
        assert_eq!(open.traffic[0].connection.when_full, WhenFull::Queue);
        assert_eq!(open.phases[0].curve, Curve::Constant(2000.0));
        assert_eq!(open.phases[0].arrivals, ArrivalKind::Poisson);
        assert_eq!(open.slos[0].must.len(), 1);

        let closed = load("http://127.0.0.1:8080 -z 5s -c 10 --expect 301,302").unwrap();
        assert_eq!(closed.traffic[0].closed, Some(Closed { clients: 10, think_ns: 0 }));
        assert_eq!((closed.traffic[0].path.as_str(), closed.phases[0].curve.clone()), ("/", Curve::None));
        assert_eq!(closed.traffic[0].expect.status, [301, 302]);

        let pipelined = load("http://127.0.0.1:8080 -z 5s -c 10 --pipeline 4").unwrap();
        assert_eq!(pipelined.traffic[0].closed, Some(Closed { clients: 40, think_ns: 0 }));
        assert_eq!((pipelined.traffic[0].connection.max, pipelined.traffic[0].connection.pipeline), (10, 4));

        let ramp = load("http://[::1] -q 0:1k --connection session:1.4 --location https://x.example/").unwrap();
        assert_eq!(ramp.phases[0].curve, Curve::Linear { from: 0.0, to: 1000.0 });
        assert_eq!(ramp.traffic[0].connection.kind, ConnectionKind::Session(Requests::Geometric(1.4)));
        assert_eq!(ramp.traffic[0].pick, Pick::One { set: 0 });
        assert_eq!(ramp.run.target.host, "::1");

        let post = load("http://127.0.0.1/a -H X-A:b -H Content-Type:text/plain -b {n} --warmup 1s -R 1").unwrap();
        assert_eq!((post.traffic[0].method.as_str(), post.phases.len()), ("POST", 2));
        let names: Vec<&str> = post.traffic[0].headers.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["X-A", "Content-Type", "User-Agent"]);
    }

    #[test]
    fn so_many_requests_come() {
        for (rate, count) in [("7", 100), ("333", 1000), ("1k:3k", 12_345), ("0:100", 77)] {
            let scenario = load(&format!("http://127.0.0.1/a -R {rate} -n {count}")).unwrap();
            assert_eq!(arrivals::counts(&scenario), [[count]], "{rate}");
        }
    }

    #[test]
    fn wrong_flags_are_named() {
        for (line, part) in [
            ("127.0.0.1:8080", "is no http://HOST:PORT"),
            ("https://127.0.0.1", "TLS comes later"),
            ("http://127.0.0.1?x", "has no path before"),
            ("http://127.0.0.1 -d 5", "\"5\" has no unit"),
            ("http://127.0.0.1 -R fast", "is no number"),
            ("http://127.0.0.1 -n 100", "-n needs a rate"),
            ("http://127.0.0.1 -n 100 -d 5s -R 5", "cannot be used with"),
            ("http://127.0.0.1 --slo p99<5ms", "use p(99)"),
            ("http://127.0.0.1 --connection session", "session:MEAN"),
            ("http://127.0.0.1 -H Host:x", "is written by loadgen itself"),
            ("http://127.0.0.1 -H A:{key}", "-H A: {key} is of scenarios: write the key itself"),
            ("http://127.0.0.1 -R 1 -c 2 -t 3", "-c 2 is less than -t 3"),
            ("http://127.0.0.1 --pipeline 2 -c 2 -t 3", "-c 2 is less than -t 3"),
            ("http://127.0.0.1/{key}", "{key} is no placeholder here"),
        ] {
            let error = load(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
    }
}
