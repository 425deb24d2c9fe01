//! Runs made by hand, each with one thing wrong, and the one check that must notice.

use std::time::Duration;

use super::machine::Machine;
use super::{Check, Mark, run};
use crate::measure::fixture::{sample, scenario, segments};
use crate::measure::recorder::Recorder;
use crate::measure::totals::{Totals, channel};
use crate::measure::{Connected, Outcome, Sample};
use crate::scenario::{Closed, Scenario};
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
    scenario: Scenario,
    planned: Vec<Vec<u64>>,
    machine: Machine,
    same_host: bool,
    interrupted: bool,
    /// Number and sample, before it is recorded.
    change: Change,
    /// After the last.
    also: Box<dyn Fn(&mut Recorder)>,
}

impl Run {
    fn new() -> Self {
        Self {
            scenario: scenario(&[("warmup", 1), ("peak", 10)], 2),
            planned: vec![vec![0, 0], vec![EACH, EACH]],
            machine: at_rest(),
            same_host: true,
            interrupted: false,
            change: Box::new(|_, _| {}),
            also: Box::new(|_| {}),
        }
    }

    fn checks(&self) -> Vec<Check> {
        let segments = segments(&self.scenario);
        let (mut recorders, collector) = channel(1, &self.scenario, &segments, ORIGIN);
        let mut totals = Totals::new(&self.scenario, &segments, 1);
        let mut recorder = recorders.pop().expect("one worker");
        for number in 0..EACH {
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
        run(&totals, &self.planned, &self.scenario, &self.machine, self.same_host, self.interrupted)
    }
}

fn at_rest() -> Machine {
    Machine { clocksource: Some("tsc".into()), governor: Some("performance".into()), ..Machine::default() }
}

/// The changed run's checks: all pass but those.
fn check(name: &str, change: impl FnOnce(&mut Run), expected: &[(&str, Mark)]) {
    let mut run = Run::new();
    change(&mut run);
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

    check("read 60 µs after they came", |run| run.change = Box::new(|_, s| s.woken_ns -= 60 * US), &[("V7", Invalid)]);
    check("read 40 µs after they came", |run| run.change = Box::new(|_, s| s.woken_ns -= 40 * US), &[]);

    check("no open files", |run| run.change = every(5000, Outcome::NoFd), &[("V8", Invalid)]);
    check("no ports", |run| run.change = every(5000, Outcome::NoPort), &[("V8", Invalid)]);

    let half_open = |recorder: &mut Recorder| {
        recorder.connected(1, Connected::Asked);
        recorder.connected(1, Connected::Asked);
        recorder.connected(1, Connected::Opened);
    };
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
    let checks = run(&totals, &[vec![0]], &scenario, &Machine::default(), false, false);
    assert!(checks.iter().all(|check| check.verdict == Mark::Pass), "{checks:#?}");
}
