//! A scenario's file becomes a [`Scenario`].
//!
//! In: TOML, the folder that its file names are relative to, and what the command line changes. Out: a [`Scenario`] in
//! which every name is an index; the format is described in `SCENARIOS.md`. Never: opens a socket, or goes on with a guess.
//! At its limit: every mistake that can be found is told at once, as `file:line: key: what, way out`; lines are those of
//! the text after `--set`.

mod events;
mod phases;
mod traffic;

use std::cell::Cell;
use std::fmt;
use std::fs::File;
use std::path::Path;

use super::change::{self, Changes};
use super::table::{Problems, Table, Value};
use super::{Run, Scenario, Target};
use crate::links::{Catalogue, DERIVED_MAX, Set, Source};
use crate::slo::{Expression, Metric, Scope, Slo};
use crate::units;

/// Phases, classes, events, SLOs: more of one is a mistake of whatever wrote the file.
const PARTS_MAX: usize = 64;

/// A phase, and the warm-up: 64 of them still fit into 64 bits of nanoseconds.
const PHASE_MAX_NS: u64 = 7 * 24 * 3_600_000_000_000;

/// Requests a second that a rate may be.
const RATE_MAX: f64 = 10_000_000.0;

/// Why a scenario is refused, one line for each mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadError {
    pub problems: Vec<String>,
}

impl LoadError {
    pub(super) fn one(problem: String) -> Self {
        Self { problems: vec![problem] }
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problems.join("\n"))
    }
}

impl std::error::Error for LoadError {}

/// Reads the scenario `name` (a file's name or a preset's), after `changes`.
///
/// # Errors
///
/// All mistakes that could be found.
pub fn from_toml(name: &str, text: &str, folder: &Path, changes: &Changes) -> Result<Scenario, LoadError> {
    let toml = change::apply(text, changes).map_err(|error| LoadError::one(format!("{name}: {error}")))?;
    let mut problems = Problems::of(&toml);
    let root = problems.parse();
    let root = Table::root(&root);
    if !changes.rehearsal && changes.postgres_pid.is_none() && events::need_postgres_pid(&root) {
        return Err(LoadError::one(format!(
            "{name} needs --postgres-pid PID: the process of the Postgres server that it stops for a while, which is the \
             first line of postmaster.pid in Postgres's data directory: head -1 …/postmaster.pid"
        )));
    }
    if problems.are_none()
        && let Some(scenario) = read(name, &toml, (folder, changes.postgres_pid), &root, &mut problems)
        && problems.are_none()
    {
        return Ok(scenario);
    }
    let problems = problems.into_list().iter().map(|problem| format!("{name}:{problem}")).collect();
    Err(LoadError { problems })
}

/// None only together with a problem.
fn read(
    name: &str,
    toml: &str,
    (folder, postgres): (&Path, Option<u32>),
    root: &Table<'_>,
    problems: &mut Problems<'_>,
) -> Option<Scenario> {
    root.only(&["run", "links", "traffic", "phase", "event", "slo"], problems);

    let run_table = root.need("run", "[run] with a target", problems, Value::table);
    let run = run_table.as_ref().and_then(|table| read_run(table, problems));
    let peak =
        Peak { rate: run_table.as_ref().and_then(|table| table.read("peak", problems, rate)), used: Cell::new(false) };
    let catalogue = read_links(root, folder, problems);
    let set_names: Vec<String> = catalogue.sets.iter().map(|set| set.name.clone()).collect();
    let classes = traffic::Classes::of(root, problems);
    let traffic = traffic::read(&classes, &set_names, problems);
    let warmup_ns = run_table.as_ref().and_then(|table| table.read("warmup", problems, phase_ns));
    let phases = phases::read(root, &classes, warmup_ns.unwrap_or(0), &peak, problems);
    let events = events::read(root, (folder, postgres), &phases, problems);
    let slos = read_slos(root, &classes, &phases, &events, problems);

    let (Some(mut run), true) = (run, problems.are_none()) else { return None };
    run.peak = if peak.used.get() { peak.rate.unwrap_or(0.0) } else { 0.0 };
    let scenario =
        Scenario { name: name.to_owned(), toml: toml.to_owned(), run, catalogue, traffic, phases, events, slos };
    traffic::check_across(&scenario, &classes, problems);
    Some(scenario)
}

fn read_run(table: &Table<'_>, problems: &mut Problems<'_>) -> Option<Run> {
    table.only(&["target", "seed", "workers", "timeout", "drain", "warmup", "peak"], problems);
    let target = table.need("target", "target = \"http://127.0.0.1:8080\"", problems, |value| target(value.text()?));
    let seed = table.read("seed", problems, |value| value.count(0..=1 << 53));
    let workers = table.read("workers", problems, |value| value.count(0..=256));
    let timeout_ns = table.read("timeout", problems, phase_ns);
    let drain_ns = table.read("drain", problems, Value::duration_ns);
    Some(Run {
        target: target?,
        seed: seed.unwrap_or(1),
        workers: workers.unwrap_or(0) as usize,
        timeout_ns: timeout_ns.unwrap_or(5_000_000_000),
        drain_ns: drain_ns.unwrap_or(6_000_000_000),
        peak: 0.0,
    })
}

/// Host and port of `http://HOST[:PORT]`, port 80 by default (RFC 9110, 4.2.1).
///
/// # Errors
///
/// What is wrong with the URL, in words that follow the name of a key or flag.
pub fn target(url: &str) -> Result<Target, String> {
    if url.starts_with("https:") {
        return Err("https is not offered: TLS comes later; give http://HOST:PORT".to_owned());
    }
    // Without what may stand before the host: that can be a password.
    let wrong = || format!("{:?} is no http://HOST:PORT", url.rsplit('@').next().unwrap_or(url));
    let authority = url.strip_prefix("http://").ok_or_else(wrong)?;
    let authority = authority.strip_suffix('/').unwrap_or(authority);
    // The colons of an IPv6 address stand in brackets (RFC 3986, 3.2.2).
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port.parse().map_err(|_| wrong())?),
        _ => (authority, 80),
    };
    let bracketed = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_') || (bracketed.is_some() && c == ':');
    let host = bracketed.unwrap_or(host);
    if host.is_empty() || !host.chars().all(good) || port == 0 {
        return Err(wrong());
    }
    Ok(Target { authority: authority.to_owned(), host: host.to_owned(), port })
}

/// What `peak` stands for, and whether it was said.
struct Peak {
    rate: Option<f64>,
    used: Cell<bool>,
}

impl Peak {
    /// Requests a second: a number, `"25k"`, `"peak"` or `"2% of peak"`.
    fn rate(&self, value: &Value<'_>) -> Result<f64, String> {
        let share = match value.text() {
            Ok("peak") => 1.0,
            Ok(text) if text.ends_with("of peak") => units::fraction_of(text.trim_end_matches("of peak").trim_end())?,
            _ => return rate(value),
        };
        self.used.set(true);
        let peak = self.rate.ok_or("there is no peak: set run.peak, or give --set peak=10k")?;
        check_rate(share * peak)
    }
}

fn rate(value: &Value<'_>) -> Result<f64, String> {
    check_rate(value.number()?)
}

fn check_rate(rate: f64) -> Result<f64, String> {
    if rate > RATE_MAX {
        return Err(format!("{rate} is more than {} requests a second", units::count(RATE_MAX as u64)));
    }
    Ok(rate)
}

/// Above 0, at most a week.
fn phase_ns(value: &Value<'_>) -> Result<u64, String> {
    match value.duration_ns()? {
        0 => Err("0s is too short".to_owned()),
        ns if ns > PHASE_MAX_NS => Err("is longer than a week (168h)".to_owned()),
        ns => Ok(ns),
    }
}

/// Names are part of dotted keys and of file names.
fn check_name(name: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    if name.is_empty() || name.len() > 64 || !name.chars().all(good) {
        return Err(format!("{name:?} is no name: up to 64 letters, digits, - and _"));
    }
    Ok(())
}

fn read_links(root: &Table<'_>, folder: &Path, problems: &mut Problems<'_>) -> Catalogue {
    let Some(links) = root.read("links", problems, Value::table) else { return Catalogue::default() };
    let mut sets = Vec::new();
    for (name, value) in links.iter() {
        let read = check_name(name).and_then(|()| value.table());
        let source = match read {
            Ok(table) => read_source(&table, folder, problems),
            Err(what) => {
                problems.add(value.offset, &value.path, what);
                None
            }
        };
        // A set whose links are wrong is still known by its name.
        sets.push(Set { name: name.to_owned(), source: source.unwrap_or(Source::Derived { count: 1 }) });
    }
    let catalogue = Catalogue { sets };
    if let Err(what) = catalogue.check() {
        problems.add(links.offset, &links.path, what);
    }
    catalogue
}

fn read_source(table: &Table<'_>, folder: &Path, problems: &mut Problems<'_>) -> Option<Source> {
    const KINDS: [&str; 4] = ["count", "codes", "targets", "file"];
    table.only(&KINDS, problems);
    let given: Vec<&str> = KINDS.into_iter().filter(|kind| table.get(kind).is_some()).collect();
    match given[..] {
        ["count"] => {
            table.read("count", problems, |value| value.count(1..=DERIVED_MAX)).map(|count| Source::Derived { count })
        }
        ["codes"] => table.read("codes", problems, codes).map(Source::Codes),
        ["targets"] => table.read("targets", problems, targets).map(Source::Listed),
        ["file"] => table.read("file", problems, |value| listed(&folder.join(value.text()?))).map(Source::Listed),
        _ => {
            let what = "needs exactly one of count = NUMBER, codes = [CODE], targets = { CODE = URL }, file = CSV";
            problems.add(table.offset, &table.path, what);
            None
        }
    }
}

fn codes(value: &Value<'_>) -> Result<Vec<String>, String> {
    let codes = value.texts()?;
    if codes.is_empty() {
        return Err("names no code".to_owned());
    }
    codes.iter().try_for_each(|code| check_code(code))?;
    Ok(codes)
}

fn targets(value: &Value<'_>) -> Result<Vec<(String, String)>, String> {
    let mut targets = Vec::new();
    for (code, target) in value.table()?.iter() {
        check_code(code)?;
        targets.push((code.to_owned(), target.text()?.to_owned()));
    }
    if targets.is_empty() {
        return Err("names no code".to_owned());
    }
    Ok(targets)
}

/// A code goes into a request line as it is.
fn check_code(code: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_graphic();
    if code.chars().all(good) { Ok(()) } else { Err(format!("{code:?} is no code: ASCII without spaces only")) }
}

/// Columns `code` and `url` of a CSV; others are passed over.
fn listed(path: &Path) -> Result<Vec<(String, String)>, String> {
    let tell = |error: &dyn fmt::Display| format!("{}: {error}", path.display());
    let file = File::open(path).map_err(|error| tell(&error))?;
    let mut reader = csv::Reader::from_reader(file);
    let header = reader.headers().map_err(|error| tell(&error))?;
    let column = |name| {
        let at = header.iter().position(|column| column == name);
        at.ok_or_else(|| tell(&format!("has no column {name:?}: the first line must name code and url")))
    };
    let (code_at, url_at) = (column("code")?, column("url")?);
    let mut links = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|error| tell(&error))?;
        // The reader refuses a record that is shorter than the header.
        let code = &record[code_at];
        check_code(code).map_err(|error| tell(&error))?;
        links.push((code.to_owned(), record[url_at].to_owned()));
    }
    if links.is_empty() {
        return Err(tell(&"has no links"));
    }
    Ok(links)
}

/// The tables of `[[key]]`, in order.
fn tables<'a>(root: &Table<'a>, key: &str, problems: &mut Problems<'_>) -> Vec<Table<'a>> {
    let items = root.read(key, problems, |value| {
        let items = value.items()?;
        if items.len() > PARTS_MAX {
            return Err(format!("there are {}, more than {PARTS_MAX}", items.len()));
        }
        items.iter().map(Value::table).collect()
    });
    items.unwrap_or_default()
}

fn read_slos(
    root: &Table<'_>,
    classes: &traffic::Classes<'_>,
    phases: &[super::Phase],
    events: &[super::Event],
    problems: &mut Problems<'_>,
) -> Vec<Slo> {
    let phase_names: Vec<String> = phases.iter().map(|phase| phase.name.clone()).collect();
    let event_names: Vec<String> = events.iter().map(|event| event.name.clone()).collect();
    let event_tables = root.get("event").and_then(|events| Some(events.items().ok()?.len())).unwrap_or(0);
    let mut slos = Vec::new();
    for table in tables(root, "slo", problems) {
        table.only(&["in", "must"], problems);
        let place = table.read("in", problems, Value::table);
        let mut scope = Scope::default();
        let mut all_are_off = false;
        if let Some(place) = place {
            place.only(&["phase", "traffic", "event"], problems);
            scope.phase = place.read("phase", problems, |value| {
                let phase = value.index_in(&phase_names, "phase")?;
                if phases[phase].warmup {
                    return Err("nothing is judged in the warm-up: name another phase".to_owned());
                }
                Ok(phase)
            });
            // One whose own mistakes are told is not missing.
            if events.len() == event_tables {
                scope.event = place.read("event", problems, |value| value.index_in(&event_names, "event"));
            }
            if let Some(named) = place.read("traffic", problems, |value| classes.indices(value)) {
                all_are_off = named.is_empty();
                scope.traffic = named;
            }
        }
        let must = table.need("must", "must = [\"p(99) < 5ms\"]", problems, |value| {
            let texts = value.texts()?;
            if texts.is_empty() {
                return Err("asks for nothing, write [\"p(99) < 5ms\"]".to_owned());
            }
            let must = texts.iter().map(|text| Expression::parse(text)).collect::<Result<Vec<_>, _>>()?;
            if scope.event.is_none()
                && events.len() == event_tables
                && must.iter().any(|expression| expression.metric == Metric::Recovery)
            {
                return Err("recovery is from an event: add in = { event = \"NAME\" }".to_owned());
            }
            Ok(must)
        });
        // What is left out cannot be judged, and "no class" would mean all of them.
        if let (Some(must), false) = (must, all_are_off) {
            slos.push(Slo { scope, must });
        }
    }
    slos
}

#[cfg(test)]
mod tests;
