//! The generator judges itself first: could its own lateness, loss or hunger explain what it reports?
//!
//! In: what was measured, what was planned, what the machine says. Out: one [`Check`] for each of V1–V11, V14 and V15, always
//! all of them, in this order, those that did not pass with what to do about it. Never: judges the server (that is
//! [`crate::slo`]), but for answers that no server of links may give. At its limit: where there is too little to judge, it
//! passes and says so.
//!
//! Checks of phases leave out the warm-up, where pools open and nothing is reported; those of loops and the machine see all.

pub mod machine;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use hdrhistogram::Histogram;

use crate::measure::percentile::{enough, quantile_ns};
use crate::measure::totals::{Own, Tally, Totals};
use crate::measure::{Connected, Outcome};
use crate::scenario::{Phase, Scenario};
use crate::slo::{Metric, Scope};
use crate::units::{count, duration, percent};
use machine::Machine;

/// A question that the generator asks itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Check {
    pub id: String,
    pub what: String,
    pub value: String,
    pub limit: String,
    pub verdict: Mark,
    /// What to do about it; none when it passed.
    pub advice: Option<String>,
}

/// The worst comes last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mark {
    Pass,
    /// Read the results with this in mind.
    Warn,
    /// They may show the generator instead of the server: exit code 3.
    Invalid,
    /// Requests were lost or counted twice: a bug of this program, exit code 1.
    Fail,
}

/// Lateness below this is no percentile's concern, however fast the server.
const LATENESS_FLOOR_NS: u64 = 50_000;
/// Of a reported percentile, what may be the generator's own.
const LATENESS_SHARE: f64 = 0.1;
const LATE_SHARE: f64 = 0.001;
const BUSY_WARN: f64 = 0.8;
const BUSY_INVALID: f64 = 0.95;
const GAP_SHARE: f64 = 0.001;
const STEAL_WARN: f64 = 0.01;
const STEAL_INVALID: f64 = 0.05;
const DISTANCE: f64 = 0.02;
/// Of fewer arrivals two make up the whole distance.
const DISTANCE_OF: u64 = 100;
const CPU_WARN: f64 = 0.9;
/// Read from a register; all others cost a system call or the reading of a slow device.
const FAST_CLOCKS: [&str; 2] = ["tsc", "arch_sys_counter"];

/// All checks. `planned[phase][traffic]` is of [`crate::plan::arrivals::counts`]; a run that was `interrupted` is not held
/// to it. `same_host`: the target runs on this machine ([`machine::is_this_host`]).
#[must_use]
pub fn run(
    totals: &Totals,
    planned: &[Vec<u64>],
    scenario: &Scenario,
    machine: &Machine,
    same_host: bool,
    interrupted: bool,
) -> Vec<Check> {
    vec![
        conservation(totals, planned, scenario, interrupted),
        lateness(totals, scenario, &SENDING),
        in_time(totals, scenario),
        busy(totals),
        gaps(totals),
        steal(machine),
        lateness(totals, scenario, &RECEIVING),
        resources(totals, scenario),
        connections(totals, scenario),
        course(totals, scenario),
        impossible_answers(totals, scenario),
        competition(machine, same_host),
        build_and_clock(machine),
    ]
}

fn check(id: &'static str, what: &str, value: String, limit: &str, verdict: Mark, advice: &str) -> Check {
    let advice = (verdict != Mark::Pass).then(|| advice.to_owned());
    Check { id: id.to_owned(), what: what.to_owned(), value, limit: limit.to_owned(), verdict, advice }
}

fn invalid_if(invalid: bool) -> Mark {
    if invalid { Mark::Invalid } else { Mark::Pass }
}

fn warn_if(warn: bool) -> Mark {
    if warn { Mark::Warn } else { Mark::Pass }
}

/// Two digits after the point are more than anybody acts on.
fn rounded(share: f64) -> String {
    percent((share * 10_000.0).round() / 10_000.0)
}

/// (index, phase) of those that are reported.
fn reported(scenario: &Scenario) -> impl Iterator<Item = (usize, &Phase)> {
    scenario.phases.iter().enumerate().filter(|(_, phase)| !phase.warmup)
}

fn scope(phase: usize, traffic: &[usize]) -> Scope {
    Scope { phase: Some(phase), event: None, traffic: traffic.to_vec() }
}

/// V1. Closed loops have no plan: theirs is to end what they began.
fn conservation(totals: &Totals, planned: &[Vec<u64>], scenario: &Scenario, interrupted: bool) -> Check {
    let mut due = 0;
    let mut lost = None;
    for (phase, of_phase) in planned.iter().enumerate() {
        for (traffic, (&planned, class)) in of_phase.iter().zip(&scenario.traffic).enumerate() {
            let tally = totals.tally(&scope(phase, &[traffic]));
            due += tally.scheduled;
            let as_planned = interrupted || class.closed.is_some() || tally.scheduled == planned;
            if tally.ended() != tally.scheduled || !as_planned {
                lost.get_or_insert_with(|| {
                    format!(
                        "{} planned, {} due, {} ended of {} in {:?}",
                        count(planned),
                        count(tally.scheduled),
                        count(tally.ended()),
                        class.name,
                        scenario.phases[phase].name
                    )
                });
            }
        }
    }
    check(
        "V1",
        "every arrival of the plan ended in one outcome",
        lost.clone().unwrap_or_else(|| format!("{} of {}", count(due), count(due))),
        "all",
        if lost.is_some() { Mark::Fail } else { Mark::Pass },
        "this is a bug of loadgen: report it with the scenario and its seed",
    )
}

/// What V2 and V7 have in common: a part of the response time that is the generator's own.
struct Lateness {
    id: &'static str,
    what: &'static str,
    quantiles: &'static [(&'static str, f64)],
    /// Closed loops have no instant at which they are due.
    of_closed: bool,
    own: fn(&Own) -> &Histogram<u64>,
    advice: &'static str,
}

const SENDING: Lateness = Lateness {
    id: "V2",
    what: "requests were sent when they were due (lag against response time)",
    quantiles: &[("p99", 0.99), ("p99.9", 0.999)],
    of_closed: false,
    own: |own| &own.gen_lag,
    advice: "ask for fewer requests a second, give it cores of its own (`taskset`) with `--spin always`, or more workers (`-t`)",
};

const RECEIVING: Lateness = Lateness {
    id: "V7",
    what: "answers were read when they came (lag against response time)",
    quantiles: &[("p99", 0.99)],
    of_closed: true,
    own: |own| &own.rx_lag,
    advice: "ask for fewer requests a second, or give it more workers (`-t`) on cores of their own (`taskset`)",
};

/// V2 and V7: the phase that is worst.
fn lateness(totals: &Totals, scenario: &Scenario, lateness: &Lateness) -> Check {
    let judged = scenario.traffic.iter().enumerate().filter(|(_, class)| lateness.of_closed || class.closed.is_none());
    let judged: Vec<usize> = judged.map(|(traffic, _)| traffic).collect();
    let mut worst: Option<(f64, String)> = None;
    for (index, phase) in reported(scenario) {
        let own = totals.own(Some(index));
        let lag = (lateness.own)(&own);
        let response = totals.sum(&scope(index, &judged)).response;
        for &(name, q) in lateness.quantiles {
            if !enough(lag.len(), q) || !enough(response.count(), q) {
                continue;
            }
            let (Some(lag_ns), Some(response)) = (quantile_ns(lag, q), response.quantile(q)) else { continue };
            let allowed = (response.value_ns as f64 * LATENESS_SHARE).max(LATENESS_FLOOR_NS as f64);
            let part = lag_ns as f64 / allowed;
            if worst.as_ref().is_none_or(|(most, _)| part > *most) {
                let (lag, response) = (duration(lag_ns), duration(response.value_ns));
                worst = Some((part, format!("{name} {lag} of {response} in {:?}", phase.name)));
            }
        }
    }
    let verdict = invalid_if(worst.as_ref().is_some_and(|(part, _)| *part > 1.0));
    let value = worst.map_or_else(|| "too few to judge".to_owned(), |(_, value)| value);
    check(lateness.id, lateness.what, value, "10% of it, or 50 µs", verdict, lateness.advice)
}

/// V3: the phase that is worst. At the end of each segment one may be under way.
fn in_time(totals: &Totals, scenario: &Scenario) -> Check {
    let mut value = "no arrivals".to_owned();
    let mut worst = 0.0;
    let mut invalid = false;
    for (index, phase) in reported(scenario) {
        let own = totals.own(Some(index));
        let late = own.scheduled.saturating_sub(own.picked_in_time);
        let segments = totals.segments().iter().filter(|segment| segment.phase == index).count() as u64;
        invalid |= late > segments && late as f64 > own.scheduled as f64 * LATE_SHARE;
        let share = late as f64 / own.scheduled.max(1) as f64;
        if own.scheduled > 0 && share >= worst {
            worst = share;
            value = format!("{} of {} in {:?}", count(own.picked_in_time), count(own.scheduled), phase.name);
        }
    }
    check(
        "V3",
        "requests were taken up within their phase",
        value,
        "at least 99.9%",
        invalid_if(invalid),
        "the generator could not keep the rate: ask for fewer requests a second, or give it more workers (`-t`)",
    )
}

/// V4.
fn busy(totals: &Totals) -> Check {
    let busiest =
        totals.workers().iter().enumerate().max_by(|(_, one), (_, other)| one.busiest.total_cmp(&other.busiest));
    let (value, share) = busiest.map_or((String::new(), 0.0), |(number, worker)| {
        let value = format!("{} in second {} of worker {number}", rounded(worker.busiest), worker.busiest_second);
        (value, worker.busiest)
    });
    let verdict = if share >= BUSY_INVALID { Mark::Invalid } else { warn_if(share >= BUSY_WARN) };
    let advice = "ask for fewer requests a second, or give it more workers (`-t`)";
    check(
        "V4",
        "workers had time to spare in their busiest second",
        value,
        "80% busy; invalid from 95%",
        verdict,
        advice,
    )
}

/// V5.
fn gaps(totals: &Totals) -> Check {
    let gaps: u64 = totals.workers().iter().map(|worker| worker.gaps).sum();
    let shares = totals.workers().iter().map(|worker| worker.gap_ns as f64 / worker.time_ns.max(1) as f64);
    let share = shares.fold(0.0, f64::max);
    check(
        "V5",
        "workers' loops came round without gaps of more than 10 ms",
        format!("{} gaps, {} of a worker's time", count(gaps), rounded(share)),
        "no gap; invalid over 0.1% of the time",
        if share > GAP_SHARE { Mark::Invalid } else { warn_if(gaps > 0) },
        "something else had the core: stop other programs, or keep them and the server off it with `taskset`",
    )
}

/// V6.
fn steal(machine: &Machine) -> Check {
    let share = machine.steal_share;
    check(
        "V6",
        "the hypervisor left this machine its CPU time",
        format!("{} stolen; {} involuntary switches", rounded(share), count(machine.involuntary_switches)),
        "1% stolen; invalid over 5%",
        if share > STEAL_INVALID { Mark::Invalid } else { warn_if(share > STEAL_WARN) },
        "other guests of the host are busy: measure again later, or on a machine with cores of its own",
    )
}

/// V8.
fn resources(totals: &Totals, scenario: &Scenario) -> Check {
    let of =
        |outcome| -> u64 { (0..scenario.phases.len()).map(|phase| totals.tally(&scope(phase, &[])).of(outcome)).sum() };
    let (files, ports) = (of(Outcome::NoFd), of(Outcome::NoPort));
    check(
        "V8",
        "no request lacked an open file or a local port",
        format!("{} lacked a file, {} a port", count(files), count(ports)),
        "none",
        invalid_if(files + ports > 0),
        match (files, ports) {
            (1.., 0) => "raise the limit of open files (`ulimit -n`), or lower `max` connections",
            (0, 1..) => {
                "give its connections a range of addresses (`bind = \"127.1.0.0/24\"` on loopback), or keep them alive"
            }
            _ => "raise the limit of open files (`ulimit -n`) and give connections a range of addresses (`bind`)",
        },
    )
}

/// V9.
fn connections(totals: &Totals, scenario: &Scenario) -> Check {
    let classes: Vec<(&str, u64, u64)> = scenario
        .traffic
        .iter()
        .enumerate()
        .map(|(traffic, class)| {
            let connected = totals.connected(traffic);
            (class.name.as_str(), connected[Connected::Asked as usize], connected[Connected::Opened as usize])
        })
        .collect();
    let missing: Vec<String> = classes
        .iter()
        .filter(|(_, asked, opened)| opened < asked)
        .map(|(name, asked, opened)| format!("{} of {} for {name}", count(*opened), count(*asked)))
        .collect();
    let all: u64 = classes.iter().map(|(_, _, opened)| opened).sum();
    check(
        "V9",
        "connections that were asked for were opened",
        if missing.is_empty() { count(all) } else { missing.join(", ") },
        "all",
        warn_if(!missing.is_empty()),
        "the server refuses or is slow to accept: look at its limits, its backlog (`ListenOverflows` in /proc/net/netstat) and \
         whether it runs",
    )
}

/// V10: the phase that is worst.
///
/// Lancet (Kogias et al., USENIX ATC 2019) tests the gaps between arrivals. Even arrivals have but one gap, of which the
/// Kolmogorov–Smirnov distance says nothing; so this is the distance of the two courses themselves, planned and real: the
/// largest share of a phase's arrivals by which one was ahead of the other ([`Own::distance`]).
fn course(totals: &Totals, scenario: &Scenario) -> Check {
    let judged = reported(scenario).filter_map(|(index, phase)| {
        let own = totals.own(Some(index));
        (own.scheduled >= DISTANCE_OF).then_some((own.distance, &phase.name))
    });
    let worst = judged.max_by(|(one, _), (other, _)| one.total_cmp(other));
    check(
        "V10",
        "the real course of arrivals was the planned one",
        worst.map_or_else(|| "too few to judge".to_owned(), |(distance, phase)| format!("{distance:.4} in {phase:?}")),
        "distance under 0.02",
        invalid_if(worst.is_some_and(|(distance, _)| distance >= DISTANCE)),
        "the generator fell behind and caught up: ask for fewer requests a second, use `--spin always`, or more workers (`-t`)",
    )
}

/// V11. An SLO that speaks of the outcome takes it over for the phase and the classes it names.
fn impossible_answers(totals: &Totals, scenario: &Scenario) -> Check {
    let judged_elsewhere = |outcome: Outcome, phase: usize, traffic: usize| {
        scenario.slos.iter().any(|slo| {
            slo.scope.event.is_none()
                && slo.scope.phase.is_none_or(|only| only == phase)
                && (slo.scope.traffic.is_empty() || slo.scope.traffic.contains(&traffic))
                && slo
                    .must
                    .iter()
                    .any(|must| matches!(must.metric, Metric::Count(of) | Metric::Share(of) if of == outcome))
        })
    };
    let of = |outcome: Outcome| -> u64 {
        reported(scenario)
            .flat_map(|(phase, _)| (0..scenario.traffic.len()).map(move |traffic| (phase, traffic)))
            .filter(|&(phase, traffic)| !judged_elsewhere(outcome, phase, traffic))
            .map(|(phase, traffic)| Tally::of(&totals.tally(&scope(phase, &[traffic])), outcome))
            .sum()
    };
    let (location, protocol) = (of(Outcome::WrongLocation), of(Outcome::ProtocolError));
    check(
        "V11",
        "no redirect led to another link's target, all answers were HTTP/1.1",
        format!("{} wrong locations, {} protocol errors", count(location), count(protocol)),
        "none, unless an SLO speaks of them",
        invalid_if(location + protocol > 0),
        "check that the target holds the links of this scenario (`loadgen seed`) and is the server that is meant",
    )
}

/// V14.
fn competition(machine: &Machine, same_host: bool) -> Check {
    let place = if same_host { "target on this machine" } else { "target elsewhere" };
    check(
        "V14",
        "generator and server do not compete for cores",
        format!("{} of all CPU time used, {place}", rounded(machine.cpu_share)),
        "90% when both are on one machine",
        warn_if(same_host && machine.cpu_share > CPU_WARN),
        "ask for fewer requests a second, give each its own cores (`taskset`), or put the server on another machine",
    )
}

/// V15.
fn build_and_clock(machine: &Machine) -> Check {
    let build = if machine.debug_build { "debug build" } else { "release build" };
    let clock = machine.clocksource.as_deref().unwrap_or("unknown");
    let governor = machine.governor.as_deref().unwrap_or("unknown");
    let slow_clock = machine.clocksource.is_some() && !FAST_CLOCKS.contains(&clock);
    let saving = machine.governor.is_some() && governor != "performance";
    check(
        "V15",
        "build, clock and frequency are fit for measuring",
        format!("{build}, clock source {clock}, governor {governor}"),
        "release build, clock source tsc or arch_sys_counter, governor performance",
        if machine.debug_build { Mark::Invalid } else { warn_if(slow_clock || saving) },
        match (machine.debug_build, slow_clock) {
            (true, _) => "build with `cargo build --release -p loadgen`",
            (false, true) => {
                "readings of the clock are slow here: choose tsc in /sys/devices/system/clocksource if it is offered"
            }
            (false, false) => "cores change their frequency: `cpupower frequency-set -g performance`",
        },
    )
}
