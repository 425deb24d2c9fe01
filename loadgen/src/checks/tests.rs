//! Runs made by hand, each with one thing wrong, and the one check that must notice.

use std::time::Duration;

use super::machine::Machine;
use super::{Check, Circumstances, Mark, run};
use crate::events::Happened;
use crate::measure::fixture::{sample, scenario, segments};
use crate::measure::recorder::Recorder;
use crate::measure::totals::{Totals, channel};
use crate::measure::{Connected, Outcome, Sample};
use crate::plan::Segment;
use crate::scenario::{Action, Closed, Event, Scenario};
use crate::slo::{Comparison, Expression, Metric, Scope, Slo};

const ORIGIN: u64 = 3_000_000_000_000;
const S: u64 = 1_000_000_000;
const MS: u64 = 1_000_000;
const US: u64 = 1_000;
/// Arrivals of each of two classes in the one phase but the warm-up.
const EACH: u64 = 10_000;

type Change = Box<dyn Fn(u64, &mut Sample)>;

/// What a test does to an otherwise perfect run.
struct Run {
    /// Arrivals of each class.
    each: u64,
    scenario: Scenario,
    planned: Vec<Vec<u64>>,
    machine: Machine,
    same_host: bool,
    interrupted: bool,
    failed: bool,
    events: Vec<Happened>,
    /// Number and sample, before it is recorded.
    change: Change,
    /// After the last.
    also: Box<dyn Fn(&mut Recorder)>,
}

impl Run {
    fn new() -> Self {
        Self::of(EACH)
    }

    fn of(each: u64) -> Self {
        Self {
            each,
            scenario: scenario(&[("warmup", 1), ("peak", 10)], 2),
            planned: vec![vec![0, 0], vec![each, each]],
            machine: at_rest(),
            same_host: true,
            interrupted: false,
            failed: false,
            events: Vec::new(),
            change: Box::new(|_, _| {}),
            also: Box::new(|_| {}),
        }
    }

    fn checks(&self) -> Vec<Check> {
        let mut segments = segments(&self.scenario);
        // Beside the phase's own, to which all samples belong: only how long it is matters.
        segments.extend(self.scenario.events.iter().enumerate().map(|(event, Event { at_ns, .. })| Segment {
            phase: 1,
            event: Some(event),
            from_ns: *at_ns,
            to_ns: at_ns + 2 * S,
        }));
        let (mut recorders, collector) = channel(1, &self.scenario, &segments, ORIGIN);
        let mut totals = Totals::new(&self.scenario, &segments, 1);
        let mut recorder = recorders.pop().expect("one worker");
        for number in 0..self.each {
            for traffic in [0, 1] {
                let intended_ns = ORIGIN + S + number * MS;
                let mut sample = sample(1, traffic, Outcome::Ok, intended_ns, 300 * US);
                sample.picked_ns += 10 * US;
                (self.change)(number, &mut sample);
                recorder.arrived(1, traffic, intended_ns, sample.picked_ns);
                recorder.left(1, traffic, intended_ns, sample.picked_ns);
                recorder.finished(&sample);
            }
        }
        for _ in 0..1000 {
            recorder.turn(200 * US, 800 * US, 0);
        }
        (self.also)(&mut recorder);
        recorder.finish(ORIGIN);
        while let Some(batch) = collector.next(Duration::ZERO) {
            totals.absorb(&batch);
        }
        let circumstances = Circumstances {
            same_host: self.same_host,
            interrupted: self.interrupted,
            failed: self.failed,
            events: &self.events,
        };
        run(&totals, &self.planned, &self.scenario, &self.machine, circumstances)
    }
}

fn at_rest() -> Machine {
    Machine { clocksource: Some("tsc".into()), governor: Some("performance".into()), ..Machine::default() }
}

/// The changed run's checks: all pass but those.
fn check(name: &str, change: impl FnOnce(&mut Run), expected: &[(&str, Mark)]) {
    let mut run = Run::new();
    change(&mut run);
    check_of(name, &run, expected);
}

fn check_of(name: &str, run: &Run, expected: &[(&str, Mark)]) {
    let checks = run.checks();
    let ids: Vec<&str> = checks.iter().map(|check| check.id.as_str()).collect();
    assert_eq!(ids, ["V1", "V2", "V3", "V4", "V5", "V6", "V7", "V8", "V9", "V10", "V11", "V14", "V15"]);
    let noticed: Vec<_> = checks.iter().filter(|check| check.verdict != Mark::Pass).collect();
    let found: Vec<(&str, Mark)> = noticed.iter().map(|check| (check.id.as_str(), check.verdict)).collect();
    assert_eq!(found, expected, "{name}: {noticed:#?}");
    assert!(noticed.iter().all(|check| check.advice.is_some()), "{name}: {noticed:#?}");
    assert!(checks.iter().all(|check| !check.value.is_empty()), "{name}: {checks:#?}");
}

/// One in so many samples ends so.
fn every(nth: u64, outcome: Outcome) -> Change {
    Box::new(move |number, sample| {
        if number % nth == 0 {
            sample.outcome = outcome;
        }
    })
}

#[test]
fn each_fault_is_noticed_by_its_own_check() {
    use Mark::{Fail, Invalid, Warn};
    check("nothing wrong", |_| {}, &[]);

    check("the plan had more", |run| run.planned[1][1] += 1, &[("V1", Fail)]);
    check("the plan had more, but was interrupted", |run| (run.planned[1][1], run.interrupted) = (2 * EACH, true), &[]);
    let lost = |run: &mut Run| run.also = Box::new(|recorder| recorder.arrived(1, 0, ORIGIN + S, ORIGIN + S));
    check("one never ended", |run| (lost(run), run.planned[1][0] += 1).0, &[("V1", Fail)]);
    check("a worker failed", |run| (lost(run), run.interrupted = true, run.failed = true).0, &[]);
    check("one never ended, and was interrupted", |run| (lost(run), run.interrupted = true).0, &[("V1", Fail)]);
    let closed = |run: &mut Run| {
        run.scenario.traffic[1].closed = Some(Closed { clients: 1, think_ns: 0 });
        run.planned[1][1] = 0;
    };
    check("a closed loop has no plan", closed, &[]);
    let late_beside_closed = |run: &mut Run| {
        closed(run);
        // 0.14 % of the plan's arrivals, 0.07 % of all.
        run.change = Box::new(|n, s| s.picked_ns += u64::from(s.traffic == 0 && n % 700 == 0) * 60 * US);
    };
    check("a closed loop hides no lateness", late_beside_closed, &[("V2", Invalid)]);

    check(
        "half the requests 60 µs late",
        |run| run.change = Box::new(|n, s| s.picked_ns += n % 2 * 60 * US),
        &[("V2", Invalid)],
    );
    check(
        "0.3 % 60 µs late: p99.9 alone",
        |run| run.change = Box::new(|n, s| s.picked_ns += u64::from(n % 300 == 0) * 60 * US),
        &[("V2", Invalid)],
    );
    check("40 µs late: under the floor", |run| run.change = Box::new(|_, s| s.picked_ns += 40 * US - 10 * US), &[]);
    let slow = |n: u64, s: &mut Sample| (s.picked_ns += n % 2 * 60 * US, s.done_ns += MS, s.woken_ns += MS).0;
    check("60 µs late of 1.3 ms", |run| run.change = Box::new(slow), &[]);

    let slow_class = |n: u64, s: &mut Sample| {
        s.picked_ns += n % 2 * 60 * US;
        (s.done_ns, s.woken_ns) =
            (s.done_ns + u64::from(s.traffic) * 9 * MS, s.woken_ns + u64::from(s.traffic) * 9 * MS);
    };
    check("a slow class hides no lateness", |run| run.change = Box::new(slow_class), &[("V2", Invalid)]);
    let slow_tail = |n: u64, s: &mut Sample| {
        s.picked_ns += n % 2 * 60 * US;
        let more_ns = u64::from(n.is_multiple_of(50)) * 90 * MS;
        (s.done_ns, s.woken_ns) = (s.done_ns + more_ns, s.woken_ns + more_ns);
    };
    check("a slow tail hides no lateness", |run| run.change = Box::new(slow_tail), &[("V2", Invalid)]);
    // 0.15 % of one class, 0.075 % of all.
    let late_class =
        |n: u64, s: &mut Sample| s.picked_ns += u64::from(s.traffic == 1 && n.is_multiple_of(660)) * 60 * US;
    check("a punctual class hides no lateness", |run| run.change = Box::new(late_class), &[("V2", Invalid)]);

    check(
        "30 of them after the phase's end",
        |run| {
            run.change = Box::new(|n, s| {
                if n >= EACH - 15 {
                    s.picked_ns = ORIGIN + 11 * S
                }
            })
        },
        &[("V2", Invalid), ("V3", Invalid)],
    );

    let busy = |turns: usize, busy_ns: u64| {
        Box::new(move |recorder: &mut Recorder| (0..turns).for_each(|_| recorder.turn(busy_ns, 0, 0)))
    };
    check("84 % busy", |run| run.also = busy(1000, 4 * MS), &[("V4", Warn)]);
    check("97 % busy", |run| run.also = busy(3000, 9 * MS), &[("V4", Invalid)]);
    check(
        "a gap of 11 ms in 31 s",
        |run| run.also = Box::new(|recorder| recorder.turn(0, 30 * S, 11 * MS)),
        &[("V5", Warn)],
    );
    check(
        "a gap of 20 ms in 1 s",
        |run| run.also = Box::new(|recorder| recorder.turn(0, 20 * MS, 20 * MS)),
        &[("V5", Invalid)],
    );

    check("1 % stolen", |run| run.machine.steal_share = 0.011, &[("V6", Warn)]);
    check("6 % stolen", |run| run.machine.steal_share = 0.06, &[("V6", Invalid)]);
    check("2 % without a core", |run| run.machine.core_wait_share = 0.02, &[("V6", Warn)]);
    check("11 % without a core", |run| run.machine.core_wait_share = 0.11, &[("V6", Invalid)]);

    check("read 60 µs after they came", |run| run.change = Box::new(|_, s| s.woken_ns -= 60 * US), &[("V7", Invalid)]);
    check("read 40 µs after they came", |run| run.change = Box::new(|_, s| s.woken_ns -= 40 * US), &[]);

    let read_late_by_closed = |run: &mut Run| {
        closed(run);
        run.change = Box::new(|_, s| s.woken_ns -= u64::from(s.traffic) * 60 * US);
    };
    check("a closed loop reads late by nature", read_late_by_closed, &[("V7", Warn)]);

    check("no open files", |run| run.change = every(5000, Outcome::NoFd), &[("V8", Invalid)]);
    check("no ports", |run| run.change = every(5000, Outcome::NoPort), &[("V8", Invalid)]);

    let half_open = |recorder: &mut Recorder| {
        recorder.connected(1, Connected::Asked);
        recorder.connected(1, Connected::Asked);
        recorder.connected(1, Connected::Opened);
    };
    check("no code", |run| run.change = every(5000, Outcome::NoCode), &[("V8", Warn)]);
    let of_one_class = |n: u64, s: &mut Sample| {
        if s.traffic == 1 && n.is_multiple_of(60) {
            s.outcome = Outcome::NoCode;
        }
    };
    check("no code for 1.7 % of a class", |run| run.change = Box::new(of_one_class), &[("V8", Invalid)]);
    let kept_from_opening = |recorder: &mut Recorder| {
        recorder.connected(1, Connected::Asked);
        recorder.connected(1, Connected::FailedByUs);
    };
    check("not opened by our fault", |run| run.also = Box::new(kept_from_opening), &[("V8", Invalid)]);
    check("not all opened", |run| run.also = Box::new(half_open), &[("V9", Warn)]);

    check(
        "asleep for 300 ms",
        |run| {
            run.change = Box::new(|n, s| {
                if (5000..5300).contains(&n) {
                    s.picked_ns = ORIGIN + S + 5300 * MS
                }
            })
        },
        &[("V2", Invalid), ("V10", Invalid)],
    );

    check("wrong locations", |run| run.change = every(5000, Outcome::WrongLocation), &[("V11", Invalid)]);
    check("no HTTP", |run| run.change = every(5000, Outcome::ProtocolError), &[("V11", Invalid)]);
    check("other errors are the server's", |run| run.change = every(5000, Outcome::WrongStatus), &[]);
    let judged = |phase, traffic: &[usize]| {
        let scope = Scope { phase, event: None, traffic: traffic.to_vec() };
        let metric = Metric::Count(Outcome::WrongLocation);
        let must = Expression { text: String::new(), metric, comparison: Comparison::Less, limit: 9.0 };
        vec![Slo { scope, must: vec![must] }]
    };
    let wrong = |run: &mut Run| run.change = every(5000, Outcome::WrongLocation);
    check("an SLO judges them", |run| (wrong(run), run.scenario.slos = judged(Some(1), &[])).0, &[]);
    check("an SLO judges half", |run| (wrong(run), run.scenario.slos = judged(None, &[1])).0, &[("V11", Invalid)]);

    check("all wrong", |run| run.change = every(1, Outcome::WrongStatus), &[("V11", Invalid)]);
    check("none answered", |run| run.change = every(1, Outcome::Timeout), &[("V11", Invalid)]);

    check("95 % CPU", |run| run.machine.cpu_share = 0.95, &[("V14", Warn)]);
    check("95 % CPU, target elsewhere", |run| (run.machine.cpu_share, run.same_host) = (0.95, false), &[]);

    check("debug build", |run| run.machine.debug_build = true, &[("V15", Invalid)]);
    check("slow clock", |run| run.machine.clocksource = Some("hpet".into()), &[("V15", Warn)]);
    check("powersave", |run| run.machine.governor = Some("powersave".into()), &[("V15", Warn)]);
    check("no governor to choose", |run| run.machine.governor = None, &[]);
}

#[test]
fn a_run_of_nothing_is_not_condemned_by_the_generators_checks() {
    let scenario = scenario(&[("peak", 10)], 1);
    let totals = Totals::new(&scenario, &segments(&scenario), 1);
    let circumstances = Circumstances { same_host: false, interrupted: false, failed: false, events: &[] };
    let checks = run(&totals, &[vec![0]], &scenario, &Machine::default(), circumstances);
    assert!(checks.iter().all(|check| check.verdict == Mark::Pass), "{checks:#?}");
}

#[test]
fn few_arrivals_are_judged_as_far_as_they_go() {
    let late = |late_ns: u64| -> Change {
        Box::new(move |_, s| {
            (s.picked_ns, s.done_ns, s.woken_ns) = (s.picked_ns + late_ns, s.done_ns + late_ns, s.woken_ns + late_ns);
        })
    };
    let check = |each: u64, late_ns: u64, expected: &[(&str, Mark)]| {
        let run = Run { change: late(late_ns), ..Run::of(each) };
        check_of(&format!("{each} arrivals, {late_ns} ns late"), &run, expected);
    };
    check(900, 0, &[]);
    check(900, 5 * MS, &[("V2", Mark::Invalid)]);
    check(20, 5 * MS, &[("V2", Mark::Invalid)]);
    // Each class has too few, both together do not.
    check(10, 5 * MS, &[("V2", Mark::Invalid)]);
    check(9, 5 * MS, &[("V2", Mark::Warn), ("V7", Mark::Warn)]);
}

#[test]
fn an_event_that_is_late_is_another_course() {
    let check = |begun_ms: u64, ended_ms: Option<u64>, expected: &[(&str, Mark)]| {
        let mut run = Run::new();
        let action = || Action::Exec(vec!["true".into()]);
        let end = ended_ms.map(|_| action());
        let lasts_ns = if end.is_some() { 2 * S } else { 0 };
        run.scenario.events.push(Event { name: "stall".into(), at_ns: 5 * S, lasts_ns, begin: action(), end });
        let [begun_ns, ended_ns] = [Some(begun_ms), ended_ms].map(|ms| ms.map(|ms| ms * MS));
        run.events = vec![Happened { name: "stall".into(), started_ns: begun_ns, begun_ns, ended_ns, error: None }];
        check_of(&format!("begun at {begun_ms}, ended at {ended_ms:?}"), &run, expected);
    };
    check(5000, Some(7000), &[]);
    check(5200, Some(7200), &[]);
    check(5201, Some(7000), &[("V10", Mark::Invalid)]);
    check(5000, Some(7201), &[("V10", Mark::Invalid)]);
    // As long as its segment.
    check(5200, None, &[]);
    check(5201, None, &[("V10", Mark::Invalid)]);
}

#[test]
fn a_value_says_which_and_how_many() {
    let mut run = Run::new();
    run.change = Box::new(|_, s| s.picked_ns += u64::from(s.traffic) * 60 * US);
    run.also = Box::new(|recorder| recorder.turn(0, 30 * S, 11 * MS));
    let checks = run.checks();
    let value = |id: &str| checks.iter().find(|check| check.id == id).map(|check| check.value.clone());
    assert_eq!(value("V2").as_deref(), Some("p50 70.1 µs of 300 µs for \"t1\" in \"peak\""));
    assert!(value("V5").is_some_and(|value| value.starts_with("1 gap, ")), "{checks:#?}");
}
