//! The generator judges itself first: could its own lateness, loss or hunger explain what it reports?
//!
//! In: what was measured, what was planned, what the machine says. Out: one [`Check`] for each of V1–V11, V14 and V15, always
//! all of them, in this order, those that did not pass with what to do about it. Never: judges the server (that is
//! [`crate::slo`]), but for answers that no server of links may give. At its limit: where there is too little to judge, it
//! says so; it warns where that leaves reported percentiles unjudged, and passes otherwise.
//!
//! Checks of phases leave out the warm-up, where pools open and nothing is reported; those of loops and the machine see all.

pub mod machine;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::events::Happened;
use crate::measure::percentile::{enough, quantile_ns};
use crate::measure::totals::{Tally, Totals};
use crate::measure::{Connected, Kind, Outcome};
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
const WAIT_WARN: f64 = 0.01;
const WAIT_INVALID: f64 = 0.1;
const NO_CODE_INVALID: f64 = 0.01;
/// An event may be late by this, or by [`LATENESS_SHARE`] of its length where that is more.
const EVENT_FLOOR_NS: u64 = 100_000_000;
const DISTANCE: f64 = 0.02;
/// Of fewer arrivals two make up the whole distance.
const DISTANCE_OF: u64 = 100;
const CPU_WARN: f64 = 0.9;
/// Read from a register; all others cost a system call or the reading of a slow device.
const FAST_CLOCKS: [&str; 2] = ["tsc", "arch_sys_counter"];

/// How a run went, beside what was measured.
#[derive(Debug, Clone, Copy)]
pub struct Circumstances<'a> {
    /// The target runs on this machine ([`machine::is_this_host`]).
    pub same_host: bool,
    /// Ended before its plan was through, to which it is not held then.
    pub interrupted: bool,
    /// A worker could not go on: what it had in its hands nobody knows.
    pub failed: bool,
    /// What became of the scenario's events, in their order.
    pub events: &'a [Happened],
}

/// All checks. `planned[phase][traffic]` is of [`crate::plan::arrivals::counts`].
#[must_use]
pub fn run(
    totals: &Totals,
    planned: &[Vec<u64>],
    scenario: &Scenario,
    machine: &Machine,
    circumstances: Circumstances<'_>,
) -> Vec<Check> {
    vec![
        conservation(totals, planned, scenario, circumstances),
        lateness(totals, scenario, &SENDING),
        in_time(totals, scenario),
        busy(totals),
        gaps(totals),
        cores(machine),
        lateness(totals, scenario, &RECEIVING),
        resources(totals, scenario),
        connections(totals, scenario),
        course(totals, scenario, circumstances.events),
        impossible_answers(totals, scenario),
        competition(machine, circumstances.same_host),
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
fn conservation(totals: &Totals, planned: &[Vec<u64>], scenario: &Scenario, circumstances: Circumstances<'_>) -> Check {
    let mut due = 0;
    let mut lost = None;
    for (phase, of_phase) in planned.iter().enumerate() {
        for (traffic, (&planned, class)) in of_phase.iter().zip(&scenario.traffic).enumerate() {
            let tally = totals.tally(&scope(phase, &[traffic]));
            due += tally.scheduled;
            let as_planned = circumstances.interrupted || class.closed.is_some() || tally.scheduled == planned;
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
    let (value, verdict) = match lost {
        _ if circumstances.failed => ("not judged: a worker could not go on".to_owned(), Mark::Pass),
        Some(lost) => (lost, Mark::Fail),
        None => (format!("{} of {}", count(due), count(due)), Mark::Pass),
    };
    check(
        "V1",
        "arrivals that ended in one outcome, of the plan's",
        value,
        "all",
        verdict,
        "this is a bug of loadgen: report it with the scenario and its seed",
    )
}

/// What V2 and V7 have in common: a part of the response time that is the generator's own.
struct Lateness {
    id: &'static str,
    what: &'static str,
    own: Kind,
    /// What it says of a closed loop, if it is asked: it has no instant at which it is due, and is always saturated.
    of_closed: Option<Mark>,
    advice: &'static str,
}

const SENDING: Lateness = Lateness {
    id: "V2",
    what: "lag at the send, against the response time",
    own: Kind::GenLag,
    of_closed: None,
    advice: "ask for fewer requests a second, give it cores of its own (`taskset`) with `--spin always`, or more workers (`-t`)",
};

const RECEIVING: Lateness = Lateness {
    id: "V7",
    what: "lag at the receive, against the response time",
    own: Kind::RxLag,
    of_closed: Some(Mark::Warn),
    advice: "ask for fewer requests a second, or give it more workers (`-t`) on cores of their own (`taskset`)",
};

/// The percentiles that reports show; what lies beyond stands on too few samples in most runs.
const QUANTILES: [(&str, f64); 5] = [("p50", 0.5), ("p75", 0.75), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)];

/// V2 and V7: the percentile that is worst. Each class is held against its own times in each phase, so that no slow one
/// allows the others to be late, and so are the sums that reports show, which may be judged where their parts are too few.
fn lateness(totals: &Totals, scenario: &Scenario, lateness: &Lateness) -> Check {
    let mark_of = |traffic: &usize| {
        if scenario.traffic[*traffic].closed.is_some() { lateness.of_closed } else { Some(Mark::Invalid) }
    };
    let judged: Vec<usize> = (0..scenario.traffic.len()).filter(|traffic| mark_of(traffic).is_some()).collect();
    let open: Vec<usize> =
        judged.iter().copied().filter(|traffic| scenario.traffic[*traffic].closed.is_none()).collect();
    let phases = reported(scenario).map(|(phase, _)| Some(phase)).chain([None]);
    let classes = phases.flat_map(|phase| judged.iter().map(move |&traffic| (phase, vec![traffic])));
    // (mark, part of what is allowed, in words)
    let mut worst: Option<(Mark, f64, String)> = None;
    let mut is_shown = false;
    for (phase, traffic) in classes.chain((!open.is_empty()).then_some((None, open.clone()))) {
        let scope = Scope { phase, event: None, traffic };
        let (lag, response) = (totals.samples(&scope, lateness.own).counts, totals.response(&scope));
        is_shown |= response.count() > 0;
        for (name, q) in QUANTILES {
            if !enough(lag.len(), q) || !enough(response.count(), q) {
                continue;
            }
            let (Some(lag_ns), Some(response)) = (quantile_ns(&lag, q), response.quantile(q)) else { continue };
            let part = lag_ns as f64 / (response.value_ns as f64 * LATENESS_SHARE).max(LATENESS_FLOOR_NS as f64);
            let late = scope.traffic.first().and_then(mark_of).unwrap_or(Mark::Pass);
            let mark = if part > 1.0 { late } else { Mark::Pass };
            if worst.as_ref().is_none_or(|(most, of, _)| (*most, *of) < (mark, part)) {
                let class = match scope.traffic[..] {
                    [traffic] => format!("{:?}", scenario.traffic[traffic].name),
                    _ => "all".to_owned(),
                };
                let place =
                    phase.map_or("the whole run".to_owned(), |phase| format!("{:?}", scenario.phases[phase].name));
                let (lag, response) = (duration(lag_ns), duration(response.value_ns));
                worst = Some((mark, part, format!("{name} {lag} of {response} for {class} in {place}")));
            }
        }
    }
    let (verdict, value, advice) = match worst {
        Some((mark, _, value)) => (mark, value, lateness.advice),
        None => {
            (warn_if(is_shown), "too few to judge".to_owned(), "measure for longer: p50 takes 20 answers of a class")
        }
    };
    check(lateness.id, lateness.what, value, "10% of it, or 50 µs", verdict, advice)
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
        "arrivals that were taken up within their phase",
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
    check("V4", "busy share of a worker's busiest second", value, "80% busy; invalid from 95%", verdict, advice)
}

/// V5.
fn gaps(totals: &Totals) -> Check {
    let gaps: u64 = totals.workers().iter().map(|worker| worker.gaps).sum();
    let shares = totals.workers().iter().map(|worker| worker.gap_ns as f64 / worker.time_ns.max(1) as f64);
    let share = shares.fold(0.0, f64::max);
    check(
        "V5",
        "gaps of more than 10 ms in the workers' loops",
        format!("{} {}, {} of a worker's time", count(gaps), if gaps == 1 { "gap" } else { "gaps" }, rounded(share)),
        "no gap; invalid over 0.1% of the time",
        if share > GAP_SHARE { Mark::Invalid } else { warn_if(gaps > 0) },
        "something else had the core: stop other programs, or keep them and the server off it with `taskset`",
    )
}

/// V6.
fn cores(machine: &Machine) -> Check {
    let Machine { steal_share: stolen, core_wait_share: waited, .. } = *machine;
    check(
        "V6",
        "time that workers waited for a core",
        format!(
            "{} stolen by the hypervisor; a worker waited {} of the time; {} involuntary switches",
            rounded(stolen),
            rounded(waited),
            count(machine.involuntary_switches)
        ),
        "1% stolen or waited; invalid over 5% stolen, 10% waited",
        if stolen > STEAL_INVALID || waited > WAIT_INVALID {
            Mark::Invalid
        } else {
            warn_if(stolen > STEAL_WARN || waited > WAIT_WARN)
        },
        if stolen > STEAL_WARN {
            "other guests of the host are busy: measure again later, or on a machine with cores of its own"
        } else {
            "other programs want its cores: stop them, or keep them and the server off with `taskset`"
        },
    )
}

/// V8. Before anything was created, in the warm-up, there is no code to be read.
fn resources(totals: &Totals, scenario: &Scenario) -> Check {
    let of =
        |outcome| -> u64 { (0..scenario.phases.len()).map(|phase| totals.tally(&scope(phase, &[])).of(outcome)).sum() };
    let (files, ports) = (of(Outcome::NoFd), of(Outcome::NoPort));
    let classes = 0..scenario.traffic.len();
    let unopened: u64 = classes.clone().map(|traffic| totals.connected(traffic)[Connected::FailedByUs as usize]).sum();
    let tallies = classes.map(|traffic| totals.tally(&Scope { traffic: vec![traffic], ..Scope::default() }));
    let (mut codes, mut codes_share) = (0, 0.0_f64);
    for tally in tallies {
        codes += tally.of(Outcome::NoCode);
        codes_share = codes_share.max(tally.of(Outcome::NoCode) as f64 / tally.scheduled.max(1) as f64);
    }
    let is_short = files + ports + unopened > 0;
    check(
        "V8",
        "what lacked a file, a port or a code here",
        format!(
            "{} lacked a file, {} a port, {} a code; {} not opened",
            count(files),
            count(ports),
            count(codes),
            count(unopened)
        ),
        "none; codes: invalid over 1% of a class",
        if is_short || codes_share > NO_CODE_INVALID { Mark::Invalid } else { warn_if(codes > 0) },
        match (files, ports) {
            _ if !is_short => "fresh codes ran out: create more of them, or lower their `delay`",
            (1.., 0) => "raise the limit of open files (`ulimit -n`), or lower `max` connections",
            (0, 1..) => {
                "give its connections a range of addresses (`bind = \"127.1.0.0/24\"` on loopback), or keep them alive"
            }
            _ => "raise the limit of open files (`ulimit -n`) and give connections a range of addresses (`bind`)",
        },
    )
}

/// V9. What this machine kept from opening is V8's.
fn connections(totals: &Totals, scenario: &Scenario) -> Check {
    let mut all = 0;
    let mut missing = Vec::new();
    for (traffic, class) in scenario.traffic.iter().enumerate() {
        let connected = totals.connected(traffic);
        let opened = connected[Connected::Opened as usize];
        let asked = connected[Connected::Asked as usize].saturating_sub(connected[Connected::FailedByUs as usize]);
        all += opened;
        if opened < asked {
            missing.push(format!("{} of {} for {}", count(opened), count(asked), class.name));
        }
    }
    check(
        "V9",
        "connections that opened, of those that were asked for",
        if missing.is_empty() { count(all) } else { missing.join(", ") },
        "all",
        warn_if(!missing.is_empty()),
        "the server refuses or is slow to accept: look at its limits, its backlog (`ListenOverflows` in /proc/net/netstat) and \
         whether it runs",
    )
}

/// V10: the phase that is worst, or the first event that was late: what was due in its time was not asked during it.
///
/// Lancet (Kogias et al., USENIX ATC 2019) tests the gaps between arrivals. Even arrivals have but one gap, of which the
/// Kolmogorov–Smirnov distance says nothing; so this is the distance of the two courses themselves, planned and real: the
/// largest share of a phase's arrivals by which one was ahead of the other ([`crate::measure::totals::Own::distance`]).
fn course(totals: &Totals, scenario: &Scenario, events: &[Happened]) -> Check {
    let judged = reported(scenario).filter_map(|(index, phase)| {
        let own = totals.own(Some(index));
        (own.scheduled >= DISTANCE_OF).then_some((own.distance, &phase.name))
    });
    let worst = judged.max_by(|(one, _), (other, _)| one.total_cmp(other));
    let is_far = worst.is_some_and(|(distance, _)| distance >= DISTANCE);
    let late_event = late_event(totals, scenario, events);
    let value = match (&late_event, worst) {
        (Some(event), _) if !is_far => event.clone(),
        (_, Some((distance, phase))) => format!("{distance:.4} in {phase:?}"),
        (_, None) => "too few to judge".to_owned(),
    };
    check(
        "V10",
        "distance of the real course of arrivals and events from the planned one",
        value,
        "distance under 0.02; events late by 100 ms, or 10% of their length",
        invalid_if(is_far || late_event.is_some()),
        if is_far {
            "the generator fell behind and caught up: ask for fewer requests a second, use `--spin always`, or more workers \
             (`-t`)"
        } else {
            "give events more distance, and commands that return at once"
        },
    )
}

/// The first event that began or ended too late, in words.
fn late_event(totals: &Totals, scenario: &Scenario, events: &[Happened]) -> Option<String> {
    scenario.events.iter().zip(events).enumerate().find_map(|(index, (event, happened))| {
        let segments = totals.segments().iter().filter(|segment| segment.event == Some(index));
        let length_ns: u64 = segments.map(|segment| segment.to_ns - segment.from_ns).sum();
        let allowed_ns = EVENT_FLOOR_NS.max((length_ns as f64 * LATENESS_SHARE) as u64);
        let late = |what: &str, due_ns: u64, at_ns: Option<u64>| {
            let late_ns = at_ns?.checked_sub(due_ns).filter(|late_ns| *late_ns > allowed_ns)?;
            Some(format!("{:?} {what} {} late", event.name, duration(late_ns)))
        };
        let end_ns = happened.ended_ns.filter(|_| event.end.is_some());
        late("began", event.at_ns, happened.begun_ns).or_else(|| late("ended", event.at_ns + event.lasts_ns, end_ns))
    })
}

/// V11. An SLO that speaks of an outcome takes it over for the phase and the classes it names.
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
    let unsolicited: u64 =
        (0..scenario.traffic.len()).map(|traffic| totals.connected(traffic)[Connected::Unsolicited as usize]).sum();
    let all = totals.tally(&Scope::default());
    let none_right = all.scheduled > 0 && all.of(Outcome::Ok) == 0;
    check(
        "V11",
        "answers that cannot be right",
        if none_right {
            "no answer was right: percentiles are of nothing".to_owned()
        } else {
            let (location, protocol, unsolicited) = (count(location), count(protocol), count(unsolicited));
            format!("{location} wrong locations, {protocol} protocol errors, {unsolicited} answers to nothing")
        },
        "some right; none of those, unless an SLO speaks of them",
        invalid_if(location + protocol + unsolicited > 0 || none_right),
        if none_right {
            "look at the outcomes: the target must run and hold these links (`loadgen seed`); say what is right by `expect` \
             (`--expect`, `--location`)"
        } else {
            "check that the target holds the links of this scenario (`loadgen seed`) and is the server that is meant"
        },
    )
}

/// V14.
fn competition(machine: &Machine, same_host: bool) -> Check {
    let place = if same_host { "target on this machine" } else { "target elsewhere" };
    check(
        "V14",
        "CPU time that everything on this machine used",
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
        "build, clock and frequency",
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
