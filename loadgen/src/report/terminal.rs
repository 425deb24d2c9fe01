//! A report as text for people, and a run's line a second.
//!
//! In: a [`Report`], or one second's [`Interval`]. Out: text of at most 100 columns, the verdict first; colours only where
//! asked for. Never: a number without what it is worth: a percentile on fewer than ten samples beyond it is not shown, a
//! lower bound bears its `≥`. At its limit: names that do not fit their column stand on a line of their own.

use std::collections::BTreeMap;

use super::{Between, Bound, Connections, Measured, Report, Times, Verdict};
use crate::checks::{Check, Mark};
use crate::events::Happened;
use crate::measure::Outcome;
use crate::measure::percentile::enough;
use crate::measure::seconds::Interval;
use crate::slo::eval::Judged;
use crate::units;

/// The width of everything here.
pub const COLUMNS: usize = 100;

const NAME: usize = 15;
const COUNT: usize = 11;
const TIME: usize = 10;

/// How the text is to look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Look {
    pub colour: bool,
    /// With every class's percentiles of every kind (`--latency`).
    pub percentiles: bool,
}

/// Whether standard output is a terminal whose user did not ask for no colours (<https://no-color.org>).
#[must_use]
pub fn wants_colour() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    rustix::termios::isatty(std::io::stdout()) && !refused
}

/// The whole report.
#[must_use]
pub fn text(report: &Report, look: Look) -> String {
    let mut out = String::new();
    headline(&mut out, report, look);
    subject(&mut out, report);
    phases(&mut out, report);
    whole(&mut out, report);
    explanations(&mut out, report);
    if look.percentiles {
        percentiles(&mut out, &report.whole.traffic);
    }
    events(&mut out, &report.events, look);
    slos(&mut out, &report.slo, look);
    checks(&mut out, &report.checks, look);
    out
}

/// One second while the run goes on, in which `planned` arrivals are due by the plan; every twentieth has the columns'
/// names above it. Rates are a second's.
#[must_use]
pub fn live(interval: &Interval, phase: &str, planned: u64) -> String {
    let seconds = u64::from(interval.seconds.max(1));
    let time = |ns| if interval.ok == 0 { "–".to_owned() } else { units::duration(ns) };
    let mut out = String::new();
    if interval.from_s.is_multiple_of(20) {
        out.push_str(
            "   time  phase            planned/s     sent/s       p50       p99   errors  in flight   lag p99\n",
        );
    }
    out.push_str(&format!(
        "{:>5} s  {:<15} {:>10} {:>10} {:>9} {:>9} {:>8} {:>10} {:>9}",
        interval.from_s + interval.seconds.max(1),
        cut(phase, 15),
        count(planned / seconds),
        count(interval.sent / seconds),
        time(interval.p50_ns),
        time(interval.p99_ns),
        count(interval.errors),
        count(interval.in_flight),
        units::duration(interval.gen_lag_p99_ns),
    ));
    out
}

fn headline(out: &mut String, report: &Report, look: Look) {
    let failed: Vec<&Judged> = report.slo.iter().filter(|slo| !slo.pass).collect();
    let first = |verdict| report.checks.iter().find(|check| check.verdict == verdict).map(told).unwrap_or_default();
    let (word, colour, rest) = match report.verdict {
        Verdict::Valid => match failed.first() {
            None if report.slo.is_empty() => ("VALID", GREEN, String::new()),
            None => ("VALID", GREEN, format!(": {0} of {0} SLOs hold", report.slo.len())),
            Some(slo) => {
                let which = format!("{}: {} was {}", slo.scope, slo.text, slo.value);
                ("VALID", RED, format!(", but {} of {} SLOs failed: {which}", failed.len(), report.slo.len()))
            }
        },
        Verdict::Invalid => ("INVALID", RED, format!(": {}", first(Mark::Invalid))),
        Verdict::Failed => ("FAILED", RED, format!(": {}", report.reason.clone().unwrap_or_else(|| first(Mark::Fail)))),
        Verdict::Interrupted => {
            let by = report.reason.as_deref().unwrap_or_default();
            let after = units::duration(report.lasted_ns);
            ("INTERRUPTED", RED, format!(" {by} after {after}: the numbers are partial, no SLO was judged"))
        }
    };
    let mut line = String::new();
    paragraph(&mut line, 0, &format!("{word}{rest}"));
    out.push_str(&line.replacen(word, &painted(word, colour, look), 1));
}

fn subject(out: &mut String, report: &Report) {
    let Report { scenario, target, options, .. } = report;
    let place = if target.same_host { ", this machine" } else { "" };
    let workers = if options.workers == 1 { "1 worker".to_owned() } else { format!("{} workers", options.workers) };
    let length = units::exact_duration(scenario.length_ns);
    let (name, url, address, seed) = (&scenario.name, &target.url, target.address, scenario.seed);
    paragraph(out, 0, &format!("{name}: {url} ({address}{place}), {length}, {workers}, seed {seed}"));
    if let Some(ns) = report.cpu_ns_per_request {
        paragraph(out, 0, &format!("CPU {} a request", units::duration(ns)));
    }
    for note in &report.notes {
        paragraph(out, 0, &format!("note: {note}"));
    }
    for skipped in &report.skipped {
        paragraph(out, 0, &format!("left out {}: {}", skipped.traffic, skipped.reason));
    }
    let closed: Vec<&str> = closed_loops(&report.whole.traffic);
    if !closed.is_empty() {
        let which = if closed.len() == report.whole.traffic.len() { String::new() } else { closed.join(", ") + ": " };
        paragraph(out, 0, &format!("{which}closed loop: latency here is not what users would see"));
    }
}

fn closed_loops(traffic: &BTreeMap<String, Measured>) -> Vec<&str> {
    traffic.iter().filter(|(_, measured)| measured.planned.is_none()).map(|(name, _)| name.as_str()).collect()
}

/// The phases; a single one is the whole run and not told twice.
fn phases(out: &mut String, report: &Report) {
    let single = report.phases.iter().filter(|phase| !phase.warmup).count() == 1;
    let shown: Vec<_> = report.phases.iter().filter(|phase| phase.warmup || !single).collect();
    if shown.is_empty() {
        return;
    }
    out.push('\n');
    columns(out);
    for phase in shown {
        let length = units::exact_duration(phase.to_ns - phase.from_ns);
        let apart = if phase.warmup { ", in no verdict" } else { "" };
        paragraph(out, 0, &format!("{}, {length}{apart}", phase.name));
        for (name, measured) in &phase.traffic {
            row(out, name, measured);
            not_ok(out, measured);
        }
    }
}

fn whole(out: &mut String, report: &Report) {
    let Report { whole, phases, .. } = report;
    out.push('\n');
    columns(out);
    let apart = if phases.iter().any(|phase| phase.warmup) { " without the warm-up" } else { "" };
    paragraph(out, 0, &format!("the whole run{apart}"));
    for (name, measured) in &whole.traffic {
        row(out, name, measured);
        intervals(out, measured);
        not_ok(out, measured);
        if let Some(connections) = whole.connections.get(name) {
            troubled(out, connections);
        }
        closed_view(out, measured);
        if let Some(visible) = &measured.visible {
            let [p50, p99, max] =
                [cell(visible, 0.5, visible.p50), cell(visible, 0.99, visible.p99), shown(visible.max)];
            paragraph(out, 4, &format!("visible after its create: p50 {p50}, p99 {p99}, max {max}"));
        }
    }
    let closed = closed_loops(&whole.traffic).len();
    if whole.traffic.len() - closed > 1 {
        row(out, if closed > 0 { "all planned" } else { "all" }, &whole.all);
        intervals(out, &whole.all);
    }
}

fn columns(out: &mut String) {
    out.push_str(&" ".repeat(2 + NAME));
    for head in ["planned", "sent", "ok"] {
        out.push_str(&format!("{head:>COUNT$}"));
    }
    for head in ["p50", "p90", "p99", "p99.9", "max"] {
        out.push_str(&format!("{head:>TIME$}"));
    }
    out.push('\n');
}

fn row(out: &mut String, name: &str, measured: &Measured) {
    if name.chars().count() <= NAME {
        out.push_str(&format!("  {:<NAME$}", cut(name, NAME)));
    } else {
        paragraph(out, 2, name);
        out.push_str(&" ".repeat(2 + NAME));
    }
    let planned = measured.planned.map_or_else(|| "closed".to_owned(), count);
    let ok = measured.outcomes.get(Outcome::Ok.name()).copied().unwrap_or(0);
    for cell in [planned, count(measured.sent), count(ok)] {
        out.push_str(&format!("{cell:>COUNT$}"));
    }
    let cells = measured.response.as_ref().map(|times| {
        [
            cell(times, 0.5, times.p50),
            cell(times, 0.9, times.p90),
            cell(times, 0.99, times.p99),
            cell(times, 0.999, times.p99_9),
            shown(times.max),
        ]
    });
    for cell in cells.unwrap_or_else(|| ["–"; 5].map(str::to_owned)) {
        out.push_str(&format!("{cell:>TIME$}"));
    }
    out.push('\n');
}

/// A percentile stands on at least ten samples beyond it, or is not told: below that it is a matter of luck.
fn cell(times: &Times, quantile: f64, bound: Bound) -> String {
    if is_few(times, quantile) { format!("n<{:.0}", 10.0 / (1.0 - quantile)) } else { shown(bound) }
}

fn is_few(times: &Times, quantile: f64) -> bool {
    !enough(times.count + times.censored, quantile)
}

fn shown(bound: Bound) -> String {
    let least = if bound.at_least { "≥" } else { "" };
    format!("{least}{}", units::duration(bound.ns))
}

/// The 95 % confidence intervals, below the two columns that they belong to.
fn intervals(out: &mut String, measured: &Measured) {
    let Some(Times { ci95, .. }) = &measured.response else { return };
    if ci95.p99.is_none() && ci95.p99_9.is_none() {
        return;
    }
    let mut line = |label: &str, end: &dyn Fn(Between) -> Bound| {
        let [p99, p99_9] = [ci95.p99, ci95.p99_9].map(|ci| ci.map(|ci| shown(end(ci))).unwrap_or_default());
        let before = 2 + NAME + 3 * COUNT + 2 * TIME;
        out.push_str(format!("{label:>before$}{p99:>TIME$}{p99_9:>TIME$}").trim_end());
        out.push('\n');
    };
    line("95 % from", &|ci| ci.low);
    line("to", &|ci| ci.high);
}

/// What did not end well, by kind; the statuses where they were the reason.
fn not_ok(out: &mut String, measured: &Measured) {
    let listed = |ours: bool| -> Vec<String> {
        let kinds = Outcome::ALL.into_iter().filter(|kind| *kind != Outcome::Ok && kind.is_ours() == ours);
        kinds
            .filter_map(|kind| {
                measured.outcomes.get(kind.name()).map(|many| format!("{} {}", kind.name(), count(*many)))
            })
            .collect()
    };
    let (errors, ours) = (listed(false), listed(true));
    if !errors.is_empty() {
        paragraph(out, 4, &format!("errors: {}", errors.join(", ")));
    }
    if !ours.is_empty() {
        paragraph(out, 4, &format!("not asked: {}", ours.join(", ")));
    }
    if measured.outcomes.contains_key(Outcome::WrongStatus.name()) {
        let statuses: Vec<String> =
            measured.statuses.iter().map(|(status, many)| format!("{} of {status}", count(*many))).collect();
        paragraph(out, 4, &format!("statuses: {}", statuses.join(", ")));
    }
}

fn troubled(out: &mut String, connections: &Connections) {
    let Connections { asked, opened, failed, failed_by_us, closed_by_server, .. } = connections;
    if asked != opened || *closed_by_server > 0 {
        let ours = if *failed_by_us > 0 {
            format!(", kept from opening here {}", count(*failed_by_us))
        } else {
            String::new()
        };
        let [asked, opened, failed, closed] = [asked, opened, failed, closed_by_server].map(|many| count(*many));
        paragraph(
            out,
            4,
            &format!(
                "connections: asked {asked}, opened {opened}, failed {failed}{ours}, closed by the server {closed}"
            ),
        );
    }
}

/// Whether the two p99 differ by more than 10 % of what the users saw.
fn hides(measured: &Measured) -> Option<&Times> {
    let (Some(response), Some(service)) = (&measured.response, &measured.service) else { return None };
    let differs = response.p99.at_least || response.p99.ns.abs_diff(service.p99.ns) > response.p99.ns / 10;
    (differs && measured.planned.is_some() && !is_few(service, 0.99)).then_some(service)
}

fn closed_view(out: &mut String, measured: &Measured) {
    if let Some(service) = hides(measured) {
        paragraph(out, 4, &format!("service p99 {} (what a closed-loop tool would show)", shown(service.p99)));
    }
}

/// One sentence for each sign that occurs.
fn explanations(out: &mut String, report: &Report) {
    let everything: Vec<&Measured> =
        report.phases.iter().flat_map(|phase| phase.traffic.values()).chain(report.whole.traffic.values()).collect();
    let responses = || everything.iter().filter_map(|measured| measured.response.as_ref());
    let mut sentences = Vec::new();
    if report.whole.traffic.values().any(|measured| hides(measured).is_some()) {
        sentences.push(
            "response counts from the instant at which a request was due, service from that at which it was sent: \
             the difference is time that users waited and a closed-loop tool does not see",
        );
    }
    if responses().any(|times| times.censored > 0) {
        sentences.push("≥: some requests had no answer when they were given up; they took at least that long");
    }
    if responses().any(|times| [0.5, 0.9, 0.99, 0.999].iter().any(|quantile| is_few(times, *quantile))) {
        sentences.push("n<1000: so many samples would be needed for ten of them to lie beyond that percentile");
    }
    if !sentences.is_empty() {
        out.push('\n');
    }
    for sentence in sentences {
        paragraph(out, 0, sentence);
    }
}

fn percentiles(out: &mut String, traffic: &BTreeMap<String, Measured>) {
    for (name, measured) in traffic {
        out.push('\n');
        paragraph(out, 0, &format!("percentiles of {name}"));
        let kinds = [
            ("response", &measured.response),
            ("service", &measured.service),
            ("first byte", &measured.ttfb),
            ("conn_wait", &measured.conn_wait),
            ("failed", &measured.failed),
            ("visible", &measured.visible),
        ];
        let kinds: Vec<(&str, &Times)> =
            kinds.into_iter().filter_map(|(kind, times)| times.as_ref().map(|times| (kind, times))).collect();
        let mut line = |label: &str, value: &dyn Fn(&str, &Times) -> String| {
            out.push_str(&format!("  {label:<8}"));
            for (kind, times) in &kinds {
                out.push_str(&format!("{:>12}", value(kind, times)));
            }
            out.push('\n');
        };
        line("", &|kind, _| kind.to_owned());
        line("samples", &|_, times| count(times.count + times.censored));
        line("min", &|_, times| shown(times.min));
        line("mean", &|_, times| shown(times.mean));
        line("p50", &|_, times| cell(times, 0.5, times.p50));
        line("p75", &|_, times| cell(times, 0.75, times.p75));
        line("p90", &|_, times| cell(times, 0.9, times.p90));
        line("p99", &|_, times| cell(times, 0.99, times.p99));
        line("p99.9", &|_, times| cell(times, 0.999, times.p99_9));
        line("p99.99", &|_, times| cell(times, 0.9999, times.p99_99));
        line("max", &|_, times| shown(times.max));
    }
}

fn events(out: &mut String, events: &[Happened], look: Look) {
    if !events.is_empty() {
        out.push_str("\nevents\n");
    }
    for event in events {
        let at = |instant: Option<u64>| instant.map_or_else(|| "–".to_owned(), units::duration);
        paragraph(out, 2, &format!("{}: began at {}, ended at {}", event.name, at(event.begun_ns), at(event.ended_ns)));
        if let Some(error) = &event.error {
            out.push_str(&format!("    {}\n", painted("error", RED, look)));
            paragraph(out, 4, error);
        }
    }
}

fn slos(out: &mut String, slos: &[Judged], look: Look) {
    if !slos.is_empty() {
        out.push_str("\nSLOs\n");
    }
    let mut scope = None;
    for slo in slos {
        if scope != Some(&slo.scope) {
            paragraph(out, 2, &slo.scope);
            scope = Some(&slo.scope);
        }
        let verdict = if slo.pass { painted("holds", GREEN, look) } else { painted("FAILS", RED, look) };
        out.push_str(&format!("    {:<50}{:>16}  {verdict}\n", cut(&slo.text, 50), cut(&slo.value, 16)));
        if let Some(why) = &slo.why {
            paragraph(out, 6, why);
        }
    }
}

/// Those that passed are counted, the others told in full.
fn checks(out: &mut String, checks: &[Check], look: Look) {
    let (Some(first), Some(last)) = (checks.first(), checks.last()) else { return };
    let many = |verdict| checks.iter().filter(|check| check.verdict == verdict).count();
    let counts: Vec<String> =
        [(Mark::Pass, "passed"), (Mark::Warn, "warned"), (Mark::Invalid, "invalid"), (Mark::Fail, "failed")]
            .into_iter()
            .filter(|(verdict, _)| many(*verdict) > 0)
            .map(|(verdict, word)| format!("{} {word}", many(verdict)))
            .collect();
    out.push_str(&format!("\nself-checks {}–{}: {}\n", first.id, last.id, counts.join(", ")));
    for check in checks {
        let (word, colour) = match check.verdict {
            Mark::Pass => continue,
            Mark::Warn => ("warn", YELLOW),
            Mark::Invalid => ("INVALID", RED),
            Mark::Fail => ("FAILED", RED),
        };
        let mut line = String::new();
        paragraph(&mut line, 2, &format!("{word} {}", told(check)));
        out.push_str(&line.replacen(word, &painted(word, colour, look), 1));
    }
}

fn told(check: &Check) -> String {
    let advice = check.advice.as_ref().map(|advice| format!(": {advice}")).unwrap_or_default();
    format!("{} {}: {}, limit {}{advice}", check.id, check.what, check.value, check.limit)
}

const RED: u8 = 31;
const GREEN: u8 = 32;
const YELLOW: u8 = 33;

/// In a colour of ECMA-48's SGR, where colours are wanted.
fn painted(word: &str, colour: u8, look: Look) -> String {
    if look.colour { format!("\x1b[1;{colour}m{word}\x1b[0m") } else { word.to_owned() }
}

/// With separators; where that does not fit a column, in millions.
fn count(many: u64) -> String {
    let text = units::count(many);
    if text.chars().count() < COUNT { text } else { format!("{} M", units::count(many / 1_000_000)) }
}

/// At most `width` characters, none of which moves a terminal's cursor.
fn cut(text: &str, width: usize) -> String {
    let text = harmless(text);
    if text.chars().count() <= width { text } else { text.chars().take(width - 1).chain(['…']).collect() }
}

/// What a server or a file said may hold control characters.
fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Lines of at most [`COLUMNS`], all but the first two further in.
fn paragraph(out: &mut String, indent: usize, text: &str) {
    let mut line = " ".repeat(indent);
    let mut is_empty = true;
    for word in text.split_whitespace() {
        for piece in pieces(&harmless(word), COLUMNS - indent - 2) {
            let space = usize::from(!is_empty);
            if line.chars().count() + space + piece.chars().count() > COLUMNS {
                out.push_str(&line);
                out.push('\n');
                line = " ".repeat(indent + 2);
            } else if !is_empty {
                line.push(' ');
            }
            line.push_str(&piece);
            is_empty = false;
        }
    }
    out.push_str(line.trim_end());
    out.push('\n');
}

/// A word that is longer than a line, in parts that are not.
fn pieces(word: &str, width: usize) -> Vec<String> {
    let chars: Vec<char> = word.chars().collect();
    chars.chunks(width).map(|piece| piece.iter().collect()).collect()
}
