//! A report from a run, through its JSON, its folder and its text.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use proptest::prelude::{prop_assert, proptest};
use serde_json::Value;

use loadgen::measure::totals::{Interval, Totals, channel};
use loadgen::measure::{Connected, Outcome, Sample};
use loadgen::plan;
use loadgen::report::terminal::{self, COLUMNS, Look};
use loadgen::report::{
    Between, Bound, Check, Ci95, Connections, Ended, Event, Machine, Measured, Options, Passed, Phase, Report, Run,
    Skipped, Target, Times, Tool, Verdict, Whole, build, bundle, verdict,
};
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
    let mut take = |recorded: &mut Totals| {
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
            recorder.sent();
        }
    }
    recorder.finish(ORIGIN_NS + 8 * SECOND);
    take(&mut totals);
    totals
}

fn report(scenario: &Scenario, totals: &Totals, ended: Ended) -> Report {
    build::build(&Run {
        scenario,
        planned: &plan::arrivals::counts(scenario),
        totals,
        checks: checks(),
        slos: evaluate(&scenario.slos, scenario, totals, &[Some(5 * SECOND)]),
        events: vec![event()],
        machine: Machine { cpu: "some".into(), cores: 2, kernel: "6.1".into(), ..Machine::default() },
        address: ([127, 0, 0, 1], 8080).into(),
        same_host: true,
        options: Options { workers: 1, spin: "auto".into(), ledger: false },
        begun_unix_ms: 1_700_000_000_000,
        lasted_ns: 8 * SECOND,
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
    vec![
        check("V1", Passed::Pass, None),
        check("V2", Passed::Warn, Some("ask for less")),
        check("V3", Passed::Pass, None),
    ]
}

fn event() -> Event {
    Event { name: "store stalls".into(), begun_ns: Some(4 * SECOND), ended_ns: Some(5 * SECOND), error: None }
}

#[test]
fn a_run_is_told_from_its_verdict_to_its_self_checks() {
    let scenario = scenario();
    let report = report(&scenario, &totals(&scenario), Ended::AsPlanned);
    let text = terminal::text(&report, Look::default());
    println!("{text}");
    println!("{}", terminal::text(&report, Look { percentiles: true, colour: false }));
    for i in &report.intervals {
        println!(
            "{}",
            terminal::live(
                &loadgen::measure::totals::Interval {
                    from_s: i.from_s,
                    seconds: i.seconds,
                    scheduled: i.scheduled,
                    sent: i.sent,
                    ok: i.ok,
                    p50_ns: i.p50_ns,
                    p99_ns: i.p99_ns,
                    ..Default::default()
                },
                "peak"
            )
        );
    }
    assert_eq!(text, "");
}
