//! `[traffic.NAME]`.

use ipnet::IpNet;

use super::super::rates;
use super::super::table::{Problems, Table, Value, unknown_name};
use super::super::{
    ArrivalKind, Closed, Connection, ConnectionKind, Expect, Phase, Pick, Requests, Scenario, Traffic, WhenFull, Yields,
};
use super::{PARTS_MAX, check_name};
use crate::units;

/// Most connections of one class.
const CONNECTIONS_MAX: u64 = 1_000_000;

/// Connections of a class that does not say how many.
const CONNECTIONS_DEFAULT: usize = 1_000;

/// Digits of a random code; as many as [`crate::plan::pick::RANDOM_MAX`] has room for.
pub(super) const RANDOM_CODE_MAX: u64 = 16;

/// A browser's name, so that a server that counts bots apart counts these requests as visits.
const USER_AGENT: &str = concat!(
    "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0 loadgen/",
    env!("CARGO_PKG_VERSION")
);

/// Headers that every request has anyway.
const OUR_HEADERS: [&str; 4] = ["host", "connection", "content-length", "transfer-encoding"];

/// The classes that take part, and the names of those that are left out.
pub(super) struct Classes<'a> {
    on: Vec<Table<'a>>,
    /// Of those in `on`.
    pub(super) names: Vec<String>,
    off: Vec<String>,
}

impl<'a> Classes<'a> {
    pub(super) fn of(root: &Table<'a>, problems: &mut Problems<'_>) -> Self {
        let mut classes = Self { on: Vec::new(), names: Vec::new(), off: Vec::new() };
        let all = root.need("traffic", "[traffic.NAME] with a request", problems, |value| {
            let all = value.table()?.iter();
            if all.is_empty() || all.len() > PARTS_MAX {
                return Err(format!("there are {} classes, not 1 to {PARTS_MAX}", all.len()));
            }
            Ok(all)
        });
        // Only that they are off is said of them: by `--set`, and with a slip of the pen.
        let mut unknown = Vec::new();
        for (name, value) in all.unwrap_or_default() {
            match check_name(name).and_then(|()| value.table()) {
                Ok(table) if table.get("request").is_none() && table.get("off").is_some() => {
                    unknown.push((name, value))
                }
                Ok(table) if table.read("off", problems, Value::flag) == Some(true) => {
                    classes.off.push(name.to_owned())
                }
                Ok(table) => {
                    classes.names.push(name.to_owned());
                    classes.on.push(table);
                }
                Err(what) => problems.add(value.offset, &value.path, what),
            }
        }
        for (name, value) in unknown {
            problems.add(value.offset, &value.path, unknown_name(name, &classes.names, "traffic"));
        }
        // Whoever reads the codes of a class that is left out has nothing to read, and so on.
        while let Some(index) = classes
            .on
            .iter()
            .position(|table| fresh_from(table).is_some_and(|from| classes.off.iter().any(|off| off == from)))
        {
            classes.on.remove(index);
            classes.off.push(classes.names.remove(index));
        }
        classes
    }

    /// The index of the class that `name` is; none if it is left out.
    pub(super) fn index(&self, name: &str) -> Result<Option<usize>, String> {
        if self.off.iter().any(|off| off == name) {
            return Ok(None);
        }
        match self.names.iter().position(|on| on == name) {
            Some(index) => Ok(Some(index)),
            None => Err(unknown_name(name, &self.names, "traffic")),
        }
    }

    /// Of a list of names, those that take part.
    pub(super) fn indices(&self, value: &Value<'_>) -> Result<Vec<usize>, String> {
        let texts = value.texts()?;
        if texts.is_empty() {
            return Err("names no traffic: leave it out to mean all".to_owned());
        }
        let found = texts.iter().map(|name| self.index(name)).collect::<Result<Vec<_>, _>>()?;
        Ok(found.into_iter().flatten().collect())
    }

    pub(super) fn is_closed(&self, index: usize) -> bool {
        self.on[index].get("closed").is_some()
    }
}

fn fresh_from<'a>(table: &Table<'a>) -> Option<&'a str> {
    let code = table.get("code")?.table().ok()?;
    (code.get("pick")?.text() == Ok("fresh")).then(|| code.get("from")?.text().ok()).flatten()
}

/// All classes that take part, in the order of [`Classes::names`]; fewer only together with a problem.
pub(super) fn read(classes: &Classes<'_>, sets: &[String], problems: &mut Problems<'_>) -> Vec<Traffic> {
    let mut all = Vec::new();
    for (name, table) in classes.names.iter().zip(&classes.on) {
        all.extend(read_class(name, table, classes, sets, problems));
    }
    all
}

fn read_class(
    name: &str,
    table: &Table<'_>,
    classes: &Classes<'_>,
    sets: &[String],
    problems: &mut Problems<'_>,
) -> Option<Traffic> {
    const KEYS: [&str; 11] =
        ["request", "code", "expect", "headers", "body", "yields", "connection", "closed", "bind", "optional", "off"];
    table.only(&KEYS, problems);
    let request = table.need("request", "request = \"GET /{code}\"", problems, |value| request(value.text()?));
    let code = table.read("code", problems, Value::table);
    let pick = code.as_ref().map_or(Some(Pick::None), |code| read_pick(code, classes, sets, problems));
    if let Some((_, path)) = &request {
        match (path.contains("{code}"), table.get("code").is_some()) {
            (true, false) => problems.add(
                table.offset,
                &format!("{}.code", table.path),
                "missing, the request has {code}: write code = { pick = \"zipf\", from = \"SET\" }",
            ),
            (false, true) => {
                table.refuse("code", "the request has no {code} to put it: write \"GET /{code}\"", problems)
            }
            _ => {}
        }
    }
    let body = table.read("body", problems, |value| value.text().map(str::to_owned));
    let headers = read_headers(table, body.is_some(), problems);
    let expect = read_expect(table, pick.as_ref(), problems);
    let yields = read_yields(table, problems);
    let closed = read_closed(table, problems);
    let connection = read_connection(table, closed, problems);
    let bind = table.read("bind", problems, |value| network(value.text()?));
    let optional = table.read("optional", problems, Value::flag).unwrap_or(false);
    let (method, path) = request?;
    Some(Traffic {
        name: name.to_owned(),
        method,
        path,
        headers,
        body,
        pick: pick?,
        expect,
        yields,
        connection,
        closed,
        bind,
        optional,
    })
}

/// Method and path of `GET /{code}`.
fn request(text: &str) -> Result<(String, String), String> {
    let wrong = || format!("{text:?} is no request: write METHOD /PATH, such as \"GET /{{code}}\"");
    let (method, path) = text.split_once(' ').ok_or_else(wrong)?;
    let method_is_good = !method.is_empty() && method.chars().all(|c| c.is_ascii_uppercase());
    if !method_is_good || !path.starts_with('/') || !path.chars().all(|c| c.is_ascii_graphic()) {
        return Err(wrong());
    }
    check_placeholders(path, &["{code}", "{n}"])?;
    Ok((method.to_owned(), path.to_owned()))
}

/// Everything in braces must be known: a wrong name would be sent as it stands.
fn check_placeholders(text: &str, known: &[&str]) -> Result<(), String> {
    let mut rest = text;
    while let Some(begin) = rest.find('{') {
        let Some(length) = rest[begin..].find('}') else { break };
        let placeholder = &rest[begin..=begin + length];
        if !known.contains(&placeholder) {
            return Err(format!("{placeholder} is no placeholder here, known are {}", known.join(", ")));
        }
        rest = &rest[begin + length..];
    }
    Ok(())
}

fn read_pick(code: &Table<'_>, classes: &Classes<'_>, sets: &[String], problems: &mut Problems<'_>) -> Option<Pick> {
    #[derive(Clone, Copy)]
    enum Kind {
        Zipf,
        One,
        Uniform,
        Random,
        Fresh,
    }
    const KINDS: [(&str, Kind); 5] = [
        ("zipf", Kind::Zipf),
        ("one", Kind::One),
        ("uniform", Kind::Uniform),
        ("random", Kind::Random),
        ("fresh", Kind::Fresh),
    ];
    let set = |problems: &mut Problems<'_>| {
        code.need("from", "from = \"SET\", one of [links]", problems, |value| value.index_in(sets, "set of links"))
    };
    match code.need("pick", "pick = \"zipf\"", problems, |value| value.one_of(&KINDS))? {
        Kind::Zipf => {
            code.only(&["pick", "from", "s", "scatter"], problems);
            let s = code.read("s", problems, |value| match value.number()? {
                s if s > 0.0 && s <= 10.0 => Ok(s),
                s => Err(format!("{s} is not above 0 and up to 10")),
            });
            let scatter = code.read("scatter", problems, Value::flag);
            Some(Pick::Zipf { set: set(problems)?, s: s.unwrap_or(1.0), scatter: scatter.unwrap_or(true) })
        }
        Kind::One => {
            code.only(&["pick", "from"], problems);
            Some(Pick::One { set: set(problems)? })
        }
        Kind::Uniform => {
            code.only(&["pick", "from", "never_twice"], problems);
            let never_twice = code.read("never_twice", problems, Value::flag).unwrap_or(false);
            Some(Pick::Uniform { set: set(problems)?, never_twice })
        }
        Kind::Random => {
            code.only(&["pick", "length"], problems);
            let length = code.read("length", problems, |value| value.count(1..=RANDOM_CODE_MAX));
            Some(Pick::Random { length: length.unwrap_or(7) as usize })
        }
        Kind::Fresh => {
            code.only(&["pick", "from", "delay"], problems);
            let delay_ns = code.read("delay", problems, Value::duration_ns).unwrap_or(0);
            let from = code.need("from", "from = \"CLASS\", one that yields codes", problems, |value| {
                let name = value.text()?;
                let from = classes.index(name)?.ok_or_else(|| format!("{name} is left out"))?;
                if classes.on[from].get("yields").is_none() {
                    return Err(format!("{name} yields no codes: give it yields = {{ code = \"json:MEMBER\" }}"));
                }
                Ok(from)
            });
            Some(Pick::Fresh { from: from?, delay_ns })
        }
    }
}

fn read_headers(table: &Table<'_>, has_body: bool, problems: &mut Problems<'_>) -> Vec<(String, String)> {
    let mut headers: Vec<(String, String)> = Vec::new();
    if let Some(given) = table.read("headers", problems, Value::table) {
        for (name, value) in given.iter() {
            match header(name, &value) {
                Ok(text) => headers.push((name.to_owned(), text)),
                Err(what) => problems.add(value.offset, &value.path, what),
            }
        }
    }
    let has =
        |wanted: &str, headers: &[(String, String)]| headers.iter().any(|(name, _)| name.eq_ignore_ascii_case(wanted));
    if !has("user-agent", &headers) {
        headers.push(("User-Agent".to_owned(), USER_AGENT.to_owned()));
    }
    if has_body && !has("content-type", &headers) {
        headers.push(("Content-Type".to_owned(), "application/json".to_owned()));
    }
    headers
}

/// A header's value; its name is a token and its value has no control characters (RFC 9110, 5.1 and 5.5).
fn header(name: &str, value: &Value<'_>) -> Result<String, String> {
    let token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    if name.is_empty() || !name.chars().all(token) {
        return Err(format!("{name:?} is no name of a header"));
    }
    if OUR_HEADERS.iter().any(|ours| name.eq_ignore_ascii_case(ours)) {
        return Err("is written by loadgen itself: leave it out".to_owned());
    }
    let text = value.text()?;
    if text.chars().any(char::is_control) {
        return Err("has a control character, such as a line's end".to_owned());
    }
    check_placeholders(text, &["{key}", "{intended}"])?;
    Ok(text.to_owned())
}

fn read_expect(table: &Table<'_>, pick: Option<&Pick>, problems: &mut Problems<'_>) -> Expect {
    let Some(expect) = table.read("expect", problems, Value::table) else { return Expect::default() };
    expect.only(&["status", "location", "body"], problems);
    let status = expect.read("status", problems, |value| {
        let status = |value: &Value<'_>| value.count(200..=599).map(|status| status as u16);
        match value.items() {
            Ok(items) => items.iter().map(status).collect(),
            Err(_) => status(value).map(|status| vec![status]),
        }
    });
    let known_location = expect.read("location", problems, |value| {
        value.one_of(&[("known", ())])?;
        match pick {
            Some(Pick::None | Pick::Random { .. }) => {
                Err("no target is known here: only codes of a set of [links], and fresh ones, have one".to_owned())
            }
            _ => Ok(true),
        }
    });
    let body = expect.read("body", problems, |value| value.text().map(str::to_owned));
    Expect { status: status.unwrap_or_default(), known_location: known_location.unwrap_or(false), body }
}

fn read_yields(table: &Table<'_>, problems: &mut Problems<'_>) -> Option<Yields> {
    let yields = table.read("yields", problems, Value::table)?;
    yields.only(&["code"], problems);
    yields.need("code", "code = \"json:short_code\"", problems, |value| {
        let member = value.text()?.strip_prefix("json:").filter(|member| !member.is_empty());
        let member = member.ok_or("write json: and the member of the answer's object, such as \"json:short_code\"")?;
        Ok(Yields { member: member.to_owned() })
    })
}

fn read_closed(table: &Table<'_>, problems: &mut Problems<'_>) -> Option<Closed> {
    let closed = table.read("closed", problems, Value::table)?;
    closed.only(&["clients", "think"], problems);
    let clients = closed.need("clients", "clients = 40", problems, |value| value.count(1..=CONNECTIONS_MAX));
    let think_ns = closed.read("think", problems, Value::duration_ns).unwrap_or(0);
    Some(Closed { clients: clients? as usize, think_ns })
}

fn read_connection(table: &Table<'_>, closed: Option<Closed>, problems: &mut Problems<'_>) -> Connection {
    #[derive(Clone, Copy, PartialEq)]
    enum Kind {
        Pool,
        Session,
        PerRequest,
    }
    const KINDS: [(&str, Kind); 3] =
        [("pool", Kind::Pool), ("session", Kind::Session), ("per_request", Kind::PerRequest)];
    const WHEN_FULL: [(&str, WhenFull); 3] =
        [("grow", WhenFull::Grow), ("queue", WhenFull::Queue), ("shed", WhenFull::Shed)];

    let mut connection = Connection {
        kind: ConnectionKind::Pool,
        max: closed.map_or(CONNECTIONS_DEFAULT, |closed| closed.clients),
        when_full: WhenFull::Grow,
        pipeline: 1,
    };
    let Some(given) = table.read("connection", problems, Value::table) else { return connection };
    given.only(&["kind", "requests", "max", "when_full", "pipeline"], problems);
    let kind = given.read("kind", problems, |value| value.one_of(&KINDS)).unwrap_or(Kind::Pool);
    if kind == Kind::Session {
        let example = "requests = 3, or \"geometric(1.4)\"";
        if let Some(requests) = given.need("requests", example, problems, requests) {
            connection.kind = ConnectionKind::Session(requests);
        }
    } else {
        given.refuse("requests", "only for kind = \"session\"", problems);
        connection.kind = if kind == Kind::Pool { ConnectionKind::Pool } else { ConnectionKind::PerRequest };
    }
    if closed.is_some() {
        given.refuse(
            "max",
            "a closed loop has one connection for each of its clients, or for as many as pipeline says",
            problems,
        );
        given.refuse("when_full", "a client of a closed loop has its own connection", problems);
    } else if let Some(max) = given.read("max", problems, |value| value.count(1..=CONNECTIONS_MAX)) {
        connection.max = max as usize;
    }
    if let Some(when_full) = given.read("when_full", problems, |value| value.one_of(&WHEN_FULL)) {
        connection.when_full = when_full;
    }
    if let Some(pipeline) = given.read("pipeline", problems, |value| value.count(1..=1024)) {
        if pipeline > 1 && kind != Kind::Pool {
            given.refuse("pipeline", "only for kind = \"pool\"", problems);
        }
        connection.pipeline = pipeline as usize;
        // Clients share connections, or no two of their requests would ever be on one.
        if let Some(closed) = closed {
            connection.max = closed.clients.div_ceil(connection.pipeline);
        }
    }
    connection
}

/// `3`, or `"geometric(1.4)"` with the mean.
fn requests(value: &Value<'_>) -> Result<Requests, String> {
    if !value.is_text() {
        return Ok(Requests::Fixed(value.count(1..=1_000_000)? as u32));
    }
    let text = value.text()?;
    let mean = text.strip_prefix("geometric(").and_then(|rest| rest.strip_suffix(')'));
    match mean.map(units::number_of) {
        Some(Ok(mean)) if (1.0..=1e6).contains(&mean) => Ok(Requests::Geometric(mean)),
        _ => Err(format!("{text:?} is neither a number nor \"geometric(MEAN)\" with a mean from 1 up")),
    }
}

/// A range of addresses, `127.66.0.0/29`, or one address.
fn network(text: &str) -> Result<IpNet, String> {
    let one = || text.parse().map(|address| IpNet::new(address, if text.contains(':') { 128 } else { 32 }));
    match text.parse() {
        Ok(network) => Ok(network),
        Err(_) => match one() {
            Ok(Ok(network)) => Ok(network),
            _ => Err(format!("{text:?} is no range of addresses, such as 127.66.0.0/29")),
        },
    }
}

/// What can only be checked when classes, links and phases are known.
pub(super) fn check_across(scenario: &Scenario, classes: &Classes<'_>, problems: &mut Problems<'_>) {
    for (index, traffic) in scenario.traffic.iter().enumerate() {
        let table = &classes.on[index];
        if let Pick::Uniform { set, never_twice: true } = traffic.pick {
            if traffic.closed.is_some() {
                table.refuse("closed", "never_twice needs a known number of requests: not in a closed loop", problems);
            }
            let (needed, there) = (arrivals_at_most(scenario, index), scenario.catalogue.count(set));
            if needed > there {
                let name = &scenario.catalogue.sets[set].name;
                let what = format!(
                    "never_twice asks for up to {} links, and {name} has {}: set links.{name}.count, or a shorter run",
                    units::count(needed),
                    units::count(there)
                );
                table.refuse("code", &what, problems);
            }
        }
        if let (Pick::Fresh { from, .. }, true) = (&traffic.pick, traffic.expect.known_location)
            && !scenario.traffic[*from].body.as_ref().is_some_and(|body| body.contains("{target}"))
        {
            let name = &scenario.traffic[*from].name;
            let what = format!("location is only known where the body of {name} holds {{target}}");
            table.refuse("expect", &what, problems);
        }
        // Each worker holds a connection of each class, so that none of its arrivals waits for ever.
        let max = traffic.connection.max;
        let is_shared = traffic.closed.is_none_or(|closed| closed.clients > max);
        if max < scenario.run.workers && is_shared {
            let what = format!(
                "{} may have {max} connections, fewer than the {} workers: raise connection.max, or lower workers",
                traffic.name, scenario.run.workers
            );
            table.refuse("request", &what, problems);
        }
        if let (Some(bind), Ok(host)) = (traffic.bind, scenario.run.target.host.parse::<std::net::IpAddr>())
            && bind.addr().is_ipv4() != host.is_ipv4()
        {
            table.refuse("bind", &format!("{bind} cannot reach {host}: one is IPv4, the other IPv6"), problems);
        }
    }
}

/// Arrivals of a class in the whole run: its share of a phase is exact within one, and by chance within five deviations.
fn arrivals_at_most(scenario: &Scenario, traffic: usize) -> u64 {
    let of_phase = |phase: &Phase| {
        let weight = phase.mix.iter().find(|(index, _)| *index == traffic).map_or(0.0, |(_, weight)| *weight);
        let expected = rates::arrivals(&phase.curve, phase.for_ns) * weight;
        match phase.arrivals {
            ArrivalKind::Even => expected + 1.0,
            ArrivalKind::Poisson => expected + 5.0 * expected.sqrt() + 1.0,
        }
    };
    scenario.phases.iter().map(of_phase).sum::<f64>() as u64
}
