//! A report from a run, through its JSON, its folder and its text.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

use proptest::prelude::{ProptestConfig, prop, prop_assert, proptest};
use serde_json::Value;

use loadgen::checks::machine::Machine;
use loadgen::checks::{Check, Mark};
use loadgen::events::Happened;
use loadgen::measure::seconds::Interval;
use loadgen::measure::totals::{Totals, channel};
use loadgen::measure::{Connected, Outcome, Sample};
use loadgen::plan;
use loadgen::report::terminal::{self, COLUMNS, Look};
use loadgen::report::{Bound, Ended, Options, Report, Run, Skipped, Verdict, build, bundle, verdict};
use loadgen::scenario::Scenario;
use loadgen::scenario::change::Changes;
use loadgen::scenario::load::from_toml;
use loadgen::slo::eval::{Judged, evaluate};

const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;
/// Of the clock that the recorders' samples are of.
const ORIGIN_NS: u64 = 7 * SECOND;

const SCENARIO: &str = r#"
[run]
target = "http://127.0.0.1:8080"
seed = 7
warmup = "1s"

[links]
existing = { count = 1000 }

[traffic.clicks]
request = "GET /{code}"
code = { pick = "uniform", from = "existing" }

[traffic.bots]
request = "GET /{code}"
code = { pick = "random", length = 7 }
closed = { clients = 2, think = "1ms" }
expect = { status = [404] }

[[phase]]
name = "calm / first"
for = "2s"
rate = 1000
mix = { clicks = 1 }

[[phase]]
name = "peak"
for = "3s"
rate = 1000
mix = "previous"
also = ["bots"]

[[event]]
name = "store stalls"
at = "peak + 1s"
lasts = "1s"
begin = { exec = ["true"] }
end = { exec = ["true"] }

[[slo]]
in = { phase = "peak", traffic = ["clicks"] }
must = ["p(50) < 5ms", "p(99) < 5s", "errors < 0.1%", "wrong_location == 0", "max > 1ms"]

[[slo]]
in = { event = "store stalls", traffic = ["clicks"] }
must = ["p(50) < 5ms", "recovery < 2s"]
"#;

fn scenario() -> Scenario {
    from_toml("sample", SCENARIO, Path::new("."), &Changes::default()).expect("a scenario")
}

/// Clicks take 1 ms; those due while the store stalls are answered at its end, but each tenth never; one bot in two is
/// answered wrongly.
fn samples(scenario: &Scenario) -> Vec<Sample> {
    let segments = plan::segments(scenario);
    let class = |name: &str| scenario.traffic.iter().position(|traffic| traffic.name == name).expect("a class") as u16;
    let (clicks, bots) = (class("clicks"), class("bots"));
    let mut samples = Vec::new();
    for number in 0..6000 {
        let at_ns = number * MS;
        let segment = segments.iter().position(|segment| segment.to_ns > at_ns).expect("within the plan") as u16;
        let stall_ns = if (4 * SECOND..5 * SECOND).contains(&at_ns) { 5 * SECOND - at_ns } else { 10_000 };
        let mut ended = |traffic, outcome, status, sent_after_ns, took_ns| {
            let intended_ns = ORIGIN_NS + at_ns;
            let done_ns = intended_ns + took_ns;
            samples.push(Sample {
                segment,
                traffic,
                outcome,
                status,
                bytes: 200,
                intended_ns,
                picked_ns: intended_ns + 1000,
                sent_ns: intended_ns + sent_after_ns,
                first_byte_ns: done_ns,
                done_ns,
                woken_ns: done_ns,
                created_ns: 0,
            });
        };
        if stall_ns > MS && number % 10 == 0 {
            ended(clicks, Outcome::Timeout, 0, stall_ns, 2 * SECOND);
        } else {
            ended(clicks, Outcome::Ok, 302, stall_ns, stall_ns + MS);
        }
        match number {
            0..3000 => {}
            _ if number % 2 == 0 => ended(bots, Outcome::WrongStatus, 500, 10_000, MS / 2),
            _ => ended(bots, Outcome::Ok, 404, 10_000, MS / 2),
        }
    }
    samples
}

/// As the engine tells it: in order of time, a tick each millisecond.
fn totals(scenario: &Scenario) -> Totals {
    let segments = plan::segments(scenario);
    let (mut recorders, collector) = channel(1, scenario, &segments, ORIGIN_NS);
    let mut recorder = recorders.pop().expect("one worker");
    let mut totals = Totals::new(scenario, &segments, 1);
    let samples = samples(scenario);
    let mut happenings: Vec<(u64, bool, &Sample)> =
        samples.iter().map(|sample| (sample.done_ns, true, sample)).collect();
    happenings.extend(samples.iter().map(|sample| (sample.picked_ns, false, sample)));
    happenings.sort_by_key(|(at_ns, ..)| *at_ns);
    for what in [Connected::Asked, Connected::Opened, Connected::Asked, Connected::Failed] {
        recorder.connected(0, what);
    }
    let take = |recorded: &mut Totals| {
        while let Some(batch) = collector.next(Duration::ZERO) {
            recorded.absorb(&batch);
            collector.give_back(batch);
        }
    };
    for (at_ns, is_end, sample) in happenings {
        recorder.tick(at_ns, 3, 2, 1);
        take(&mut totals);
        if is_end {
            recorder.finished(sample);
        } else {
            recorder.arrived(sample.segment, sample.traffic, sample.intended_ns, sample.picked_ns);
            recorder.left(sample.segment, sample.traffic, sample.intended_ns, sample.picked_ns);
            recorder.sent();
        }
    }
    recorder.finish(ORIGIN_NS + 8 * SECOND);
    take(&mut totals);
    totals
}

fn report(scenario: &Scenario, totals: &Totals, ended: Ended) -> Report {
    report_with(scenario, totals, ended, event())
}

fn report_with(scenario: &Scenario, totals: &Totals, ended: Ended, event: Happened) -> Report {
    build::build(&Run {
        scenario,
        planned: &plan::arrivals::counts(scenario),
        totals,
        checks: checks(),
        slos: evaluate(&scenario.slos, scenario, totals, std::slice::from_ref(&event)),
        events: vec![event],
        machine: Machine::this(),
        address: ([127, 0, 0, 1], 8080).into(),
        same_host: true,
        options: Options { workers: 1, spin: "auto".into(), ledger: false },
        begun_unix_ms: 1_700_000_000_000,
        lasted_ns: 8 * SECOND,
        cpu_ns: SECOND,
        skipped: vec![Skipped { traffic: "stats".into(), reason: "GET /stats/x was answered 404".into() }],
        notes: vec!["peak scaled to 1,000/s by calibrate".into()],
        ended,
    })
}

fn checks() -> Vec<Check> {
    let check = |id: &str, verdict, advice: Option<&str>| Check {
        id: id.into(),
        what: "lateness".into(),
        value: "60 µs".into(),
        limit: "50 µs".into(),
        verdict,
        advice: advice.map(str::to_owned),
    };
    vec![check("V1", Mark::Pass, None), check("V2", Mark::Warn, Some("ask for less")), check("V3", Mark::Pass, None)]
}

fn event() -> Happened {
    Happened {
        name: "store stalls".into(),
        started_ns: Some(4 * SECOND),
        begun_ns: Some(4 * SECOND),
        ended_ns: Some(5 * SECOND),
        error: None,
    }
}

#[test]
fn a_run_is_told_from_its_verdict_to_its_self_checks() {
    let scenario = scenario();
    let text = terminal::text(&report(&scenario, &totals(&scenario), Ended::AsPlanned), Look::default());
    assert_eq!(text, GOLDEN, "\n{text}");
}

#[test]
fn a_report_is_as_its_schema_says() {
    let schema: Value = serde_json::from_str(include_str!("../schema/run.schema.json")).expect("JSON");
    jsonschema::meta::validate(&schema).expect("a schema of draft 2020-12");
    let schema = jsonschema::validator_for(&schema).expect("a schema");
    let scenario = scenario();
    let report = report(&scenario, &totals(&scenario), Ended::AsPlanned);
    let good = serde_json::to_value(&report).expect("JSON");
    let mistakes: Vec<String> =
        schema.iter_errors(&good).map(|error| format!("{}: {error}", error.instance_path())).collect();
    assert_eq!(mistakes, Vec::<String>::new());

    // Each member is described and needed: without it, or with another beside it, the report is none.
    let mut members = Vec::new();
    objects(&good, "", &mut members);
    assert!(members.len() > 500, "{}", members.len());
    for (object, key) in members {
        let mut bad = good.clone();
        let map = bad.pointer_mut(&object).and_then(Value::as_object_mut).expect("an object");
        let value = map.remove(&key).expect("a member");
        map.insert(format!("{key} "), value);
        assert!(!schema.is_valid(&bad), "{object}/{key}");
    }
}

/// Every (object, key) but those of maps by class, outcome or status, whose keys are data.
fn objects(value: &Value, at: &str, found: &mut Vec<(String, String)>) {
    let is_map = ["/traffic", "/outcomes", "/statuses", "/connections"].iter().any(|map| at.ends_with(map));
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                if !is_map {
                    found.push((at.to_owned(), key.clone()));
                }
                objects(value, &format!("{at}/{key}"), found);
            }
        }
        // One row stands for all.
        Value::Array(rows) => {
            if let Some(row) = rows.first() {
                objects(row, &format!("{at}/0"), found);
            }
        }
        _ => {}
    }
}

#[test]
fn a_folder_holds_a_run_and_keeps_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path().join("out");
    let scenario = scenario();
    let totals = totals(&scenario);
    let written = report(&scenario, &totals, Ended::AsPlanned);
    bundle::prepare(&folder).expect("room");
    bundle::write(&folder, &written, &scenario, &totals).expect("written");

    let read = bundle::read(&folder).expect("read");
    assert_eq!(read, written);
    for look in [Look::default(), Look { colour: true, percentiles: true }] {
        assert_eq!(terminal::text(&read, look), terminal::text(&written, look));
    }
    let mut histograms: Vec<String> = fs::read_dir(folder.join("hgrm"))
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
        .collect();
    histograms.sort();
    assert_eq!(histograms, ["calm---first.clicks.hgrm", "peak.bots.hgrm", "peak.clicks.hgrm", "warm-up.clicks.hgrm"]);
    let timeline = fs::read_to_string(folder.join("timeline.csv")).expect("a table");
    assert_eq!(timeline.lines().count(), 1 + written.intervals.len());
    assert!(timeline.starts_with("from_s,seconds,scheduled,sent,ok,"), "{timeline}");

    let refused = bundle::prepare(&folder).expect_err("it holds a run").to_string();
    assert!(refused.starts_with("--out ") && refused.contains("holds a run already"), "{refused}");
    let file = folder.join(bundle::RUN_JSON);
    let other = fs::read_to_string(&file).expect("text").replace("loadgen/1", "loadgen/9");
    fs::write(&file, other).expect("written");
    let half = tempfile::tempdir().expect("a folder");
    bundle::prepare(half.path()).expect("room");
    bundle::prepare(half.path()).expect("nothing came of the first run");
    fs::write(half.path().join("hgrm/old.hgrm"), "").expect("written");
    let refused = bundle::prepare(half.path()).expect_err("histograms of another run").to_string();
    assert!(refused.contains("hgrm is not empty"), "{refused}");
    let refused = bundle::read(&folder).expect_err("another version").to_string();
    assert!(refused.contains("its schema is \"loadgen/9\""), "{refused}");
}

#[test]
fn an_exit_code_says_the_worst_first() {
    let check = |ended: Ended, worst: Mark, slo: bool, expected: (Verdict, u8)| {
        let checks: Vec<Check> = [Mark::Pass, worst]
            .map(|verdict| Check {
                id: "V1".into(),
                what: String::new(),
                value: String::new(),
                limit: String::new(),
                verdict,
                advice: None,
            })
            .into();
        let slo = Judged { scope: String::new(), text: String::new(), value: String::new(), pass: slo, why: None };
        assert_eq!(verdict(&ended, &checks, &[slo]), expected, "{ended:?} {worst:?}");
    };
    let failed = || Ended::Failed("no space left".into());
    check(Ended::AsPlanned, Mark::Pass, true, (Verdict::Valid, 0));
    check(Ended::AsPlanned, Mark::Warn, true, (Verdict::Valid, 0));
    check(Ended::AsPlanned, Mark::Warn, false, (Verdict::Valid, 99));
    check(Ended::AsPlanned, Mark::Invalid, false, (Verdict::Invalid, 3));
    check(Ended::AsPlanned, Mark::Fail, false, (Verdict::Failed, 1));
    check(failed(), Mark::Pass, true, (Verdict::Failed, 1));
    check(failed(), Mark::Invalid, false, (Verdict::Failed, 1));
    check(Ended::Interrupted { signal: 2 }, Mark::Fail, false, (Verdict::Interrupted, 130));
    check(Ended::Interrupted { signal: 15 }, Mark::Pass, true, (Verdict::Interrupted, 143));
}

#[test]
fn a_run_without_one_of_its_events_failed() {
    let scenario = scenario();
    let totals = totals(&scenario);
    let check = |event: Happened, ended: Ended, expected: (Verdict, u8, Option<&str>)| {
        let found = report_with(&scenario, &totals, ended, event.clone());
        assert_eq!((found.verdict, found.exit_code, found.reason.as_deref()), expected, "{event:?}");
    };
    let failed = Happened { error: Some("begin: there is no process 7".into()), ..event() };
    let why = "event \"store stalls\": begin: there is no process 7";
    check(event(), Ended::AsPlanned, (Verdict::Valid, 99, None));
    check(failed.clone(), Ended::AsPlanned, (Verdict::Failed, 1, Some(why)));
    let unbegun = Happened { begun_ns: None, ended_ns: None, ..event() };
    let why = "event \"store stalls\" never began: the run was over before";
    check(unbegun.clone(), Ended::AsPlanned, (Verdict::Failed, 1, Some(why)));
    check(unbegun, Ended::Interrupted { signal: 2 }, (Verdict::Interrupted, 130, Some("by Ctrl-C (SIGINT)")));
    check(failed, Ended::Failed("no space left".into()), (Verdict::Failed, 1, Some("no space left")));
}

#[test]
fn recovery_counts_from_the_end_or_without_one_from_the_begin() {
    let mut scenario = scenario();
    let totals = totals(&scenario);
    let check = |scenario: &Scenario, happened: Happened, expected: (&str, bool, Option<&str>)| {
        let judged = evaluate(&scenario.slos, scenario, &totals, std::slice::from_ref(&happened));
        let recovery = judged.iter().find(|judged| judged.text == "recovery < 2s").expect("it is among them");
        assert_eq!((recovery.value.as_str(), recovery.pass, recovery.why.as_deref()), expected, "{happened:?}");
    };
    check(&scenario, event(), ("at once", true, None));
    let no_end = Happened { ended_ns: None, ..event() };
    check(&scenario, no_end.clone(), ("–", false, Some("\"store stalls\" did not end within the run")));
    scenario.events[0].end = None;
    let begun_ns = Some(3500 * MS);
    check(&scenario, Happened { begun_ns, ..no_end }, ("500 ms", true, None));
    let unbegun = Happened { begun_ns: None, ended_ns: None, ..event() };
    check(&scenario, unbegun, ("–", false, Some("\"store stalls\" did not begin within the run")));
}

#[test]
fn the_first_line_says_what_to_do() {
    let scenario = scenario();
    let totals = totals(&scenario);
    let check = |ended: Ended, worst: Option<Mark>, slos: usize, expected: &str| {
        let mut report = report(&scenario, &totals, ended);
        if let Some(worst) = worst {
            report.checks[1].verdict = worst;
        }
        report.slo.truncate(slos);
        (report.verdict, report.exit_code) = match report.verdict {
            Verdict::Valid => verdict(&Ended::AsPlanned, &report.checks, &report.slo),
            other => (other, report.exit_code),
        };
        assert_eq!(terminal::text(&report, Look::default()).lines().next(), Some(expected));
    };
    check(Ended::AsPlanned, None, 0, "VALID");
    check(Ended::AsPlanned, None, 1, "VALID: 1 of 1 SLOs hold");
    check(Ended::AsPlanned, None, 2, "VALID, but 1 of 2 SLOs failed: peak: clicks: p(99) < 5s was ≥2.00 s");
    check(Ended::AsPlanned, Some(Mark::Invalid), 2, "INVALID: V2 lateness: 60 µs, limit 50 µs: ask for less");
    check(Ended::AsPlanned, Some(Mark::Fail), 2, "FAILED: V2 lateness: 60 µs, limit 50 µs: ask for less");
    check(Ended::Failed("ledger: no space left".into()), None, 2, "FAILED: ledger: no space left");
    let interrupted = "INTERRUPTED by Ctrl-C (SIGINT) after 8.00 s: the numbers are partial, no SLO was judged";
    check(Ended::Interrupted { signal: 2 }, None, 2, interrupted);
}

#[test]
fn colours_change_no_word() {
    let scenario = scenario();
    let report = report(&scenario, &totals(&scenario), Ended::AsPlanned);
    let coloured = terminal::text(&report, Look { colour: true, percentiles: false });
    assert_ne!(coloured, GOLDEN);
    let mut plain = coloured;
    for code in ["\x1b[1;31m", "\x1b[1;32m", "\x1b[1;33m", "\x1b[0m"] {
        plain = plain.replace(code, "");
    }
    assert_eq!(plain, GOLDEN);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever names, values and a server's words are, no line is too long and none moves the cursor.
    #[test]
    fn no_line_is_wider_than_a_hundred_columns(
        words in prop::collection::vec("[ a-zäß\\x1b\\r\\n]{0,150}", 12),
        numbers in prop::collection::vec(0..100_000_000_000_u64, 12),
    ) {
        let mut report = BASE.clone();
        let mut words = words.into_iter().cycle();
        let mut word = || words.next().expect("it cycles");
        let mut numbers = numbers.into_iter().cycle();
        let mut number = || numbers.next().expect("it cycles");
        report.scenario.name = word();
        report.notes = vec![word()];
        report.skipped[0].reason = word();
        report.events[0].name = word();
        report.events[0].error = Some(word());
        for slo in &mut report.slo {
            (slo.scope, slo.text, slo.value, slo.why) = (word(), word(), word(), Some(word()));
        }
        for check in &mut report.checks {
            (check.what, check.value, check.limit, check.advice) = (word(), word(), word(), Some(word()));
        }
        for phase in &mut report.phases {
            phase.name = word();
        }
        for mut measured in std::mem::take(&mut report.whole.traffic).into_values() {
            (measured.scheduled, measured.sent) = (number(), number());
            measured.planned = measured.planned.map(|_| number());
            measured.outcomes.values_mut().chain(measured.statuses.values_mut()).for_each(|many| *many = number());
            let kinds = [&mut measured.response, &mut measured.service];
            for times in kinds.into_iter().flatten() {
                for bound in [&mut times.p50, &mut times.p90, &mut times.p99, &mut times.max] {
                    *bound = Bound { ns: number() % (3_600 * SECOND), at_least: true };
                }
            }
            report.whole.traffic.insert(word(), measured);
        }
        let text = terminal::text(&report, Look { colour: false, percentiles: true });
        for line in text.lines() {
            prop_assert!(line.chars().count() <= COLUMNS, "{}: {line}", line.chars().count());
            prop_assert!(!line.contains(char::is_control), "{line:?}");
        }
    }
}

static BASE: LazyLock<Report> = LazyLock::new(|| {
    let scenario = scenario();
    report(&scenario, &totals(&scenario), Ended::AsPlanned)
});

#[test]
fn a_second_is_a_line() {
    let check = |interval: Interval, phase: &str, expected: &str| {
        let text = terminal::live(&interval, phase, interval.scheduled);
        assert_eq!(text, expected, "\n{text}");
        assert!(text.lines().all(|line| line.chars().count() <= COLUMNS), "{text}");
    };
    let busy = Interval {
        from_s: 11,
        seconds: 1,
        scheduled: 9200,
        sent: 9198,
        ok: 9198,
        in_flight: 12,
        p50_ns: 210_000,
        p99_ns: 1_200_000,
        gen_lag_p99_ns: 38_000,
        ..Interval::default()
    };
    check(busy.clone(), "peak", LINE);
    let silent = Interval { from_s: 40, seconds: 2, scheduled: 4, errors: 2, ..Interval::default() };
    check(silent, "a phase with a long name", SILENT);
}

const LINE: &str = "   12 s  peak                 9,200      9,198    210 µs   1.20 ms        0         12   38.0 µs";

const SILENT: &str = "   time  phase            planned/s     sent/s       p50       p99   errors  in flight   lag p99
   42 s  a phase with a…          2          0         –         –        2          0      0 ns";

const GOLDEN: &str = "\
VALID, but 3 of 7 SLOs failed: peak: clicks: p(99) < 5s was ≥2.00 s
sample: http://127.0.0.1:8080 (127.0.0.1:8080, this machine), 6s, 1 worker, seed 7
CPU 111 µs a request
note: peak scaled to 1,000/s by calibrate
left out stats: GET /stats/x was answered 404
bots: closed loop: latency here is not what users would see

                     planned       sent         ok       p50       p90       p99     p99.9       max
warm-up, 1s, in no verdict
  clicks               1,000      1,000      1,000   1.01 ms   1.01 ms   1.01 ms   n<10000   1.01 ms
calm / first, 2s
  clicks               2,000      2,000      2,000   1.01 ms   1.01 ms   1.01 ms   n<10000   1.01 ms
peak, 3s
  bots                closed      3,000      1,500    500 µs    500 µs    500 µs   n<10000    500 µs
    errors: wrong_status 1,500
    statuses: 1,500 of 404, 1,500 of 500
  clicks               3,000      3,000      2,900   1.01 ms    778 ms   ≥2.00 s   n<10000   ≥2.00 s
    errors: timeout 100

                     planned       sent         ok       p50       p90       p99     p99.9       max
the whole run without the warm-up
  bots                closed      3,000      1,500    500 µs    500 µs    500 µs   n<10000    500 µs
                                                             95 % from    500 µs
                                                                    to    500 µs
    errors: wrong_status 1,500
    statuses: 1,500 of 404, 1,500 of 500
  clicks               5,000      5,000      4,900   1.01 ms    556 ms   ≥2.00 s   n<10000   ≥2.00 s
                                                             95 % from   ≥2.00 s
                                                                    to   ≥2.00 s
    errors: timeout 100
    connections: asked 2, opened 1, failed 1, closed by the server 0
    service p99 1.00 ms (what a closed-loop tool would show)

response counts from the instant at which a request was due, service from that at which it was sent:
  the difference is time that users waited and a closed-loop tool does not see
≥: some requests had no answer when they were given up; they took at least that long
n<1000: so many samples would be needed for ten of them to lie beyond that percentile

events
  store stalls: began at 4.00 s, ended at 5.00 s

SLOs
  peak: clicks
    p(50) < 5ms                                                1.01 ms  holds
    p(99) < 5s                                                 ≥2.00 s  FAILS
      only a lower bound is known: some requests had no answer when they were given up
    errors < 0.1%                                              3.3333%  FAILS
    wrong_location == 0                                              0  holds
    max > 1ms                                                  ≥2.00 s  holds
  store stalls: clicks
    p(50) < 5ms                                                 556 ms  FAILS
    recovery < 2s                                              at once  holds

self-checks V1–V3: 2 passed, 1 warned
  warn V2 lateness: 60 µs, limit 50 µs: ask for less
";
