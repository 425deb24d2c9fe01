//! From a run that has ended to its report.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Serializer, V2DeflateSerializer};
use sha2::{Digest, Sha256};

use super::{
    Between, Bound, Ci95, Connections, Ended, Lag, Measured, Phase, Report, Run, SCHEMA, ScenarioText, Target, Times,
    Tool, Whole, verdict,
};
use crate::measure::percentile::{Distribution, Quantile, quantile_ns};
use crate::measure::totals::Sum;
use crate::measure::{Connected, Outcome};
use crate::scenario::change;
use crate::slo::{Scope, eval};

/// Everything that the run yields. An interrupted run's SLOs are left out: a part of the plan says nothing about them.
#[must_use]
pub fn build(run: &Run<'_>) -> Report {
    let scenario = run.scenario;
    let checks = run.checks.clone();
    let slo = if matches!(run.ended, Ended::Interrupted { .. }) { Vec::new() } else { run.slos.clone() };
    let ended = ended(run);
    let (verdict, exit_code) = verdict(&ended, &checks, &slo);
    Report {
        schema: SCHEMA.to_owned(),
        tool: Tool { name: "loadgen".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() },
        begun_unix_ms: run.begun_unix_ms,
        lasted_ns: run.lasted_ns,
        cpu_ns_per_request: cpu_ns_per_request(run),
        scenario: ScenarioText {
            name: scenario.name.clone(),
            toml: change::masked(&scenario.toml),
            sha256: Sha256::digest(&scenario.toml).iter().map(|byte| format!("{byte:02x}")).collect(),
            seed: scenario.run.seed,
            length_ns: scenario.length_ns(),
        },
        target: Target {
            url: format!("http://{}", scenario.run.target.authority),
            address: run.address,
            same_host: run.same_host,
        },
        machine: run.machine.clone(),
        options: run.options.clone(),
        phases: phases(run),
        whole: whole(run),
        intervals: run.totals.intervals().to_vec(),
        events: run.events.clone(),
        skipped: run.skipped.clone(),
        notes: run.notes.clone(),
        slo,
        checks,
        verdict,
        reason: match ended {
            Ended::AsPlanned => None,
            Ended::Failed(why) => Some(why),
            Ended::Interrupted { signal } => Some(format!("by {}", signal_name(signal))),
        },
        exit_code,
    }
}

/// A run without one of its events measured something else than was asked for.
fn ended(run: &Run<'_>) -> Ended {
    let missing = run.events.iter().find_map(|event| match (&event.error, event.begun_ns) {
        (Some(error), _) => Some(format!("event {:?}: {error}", event.name)),
        (None, None) => Some(format!("event {:?} never began: the run was over before", event.name)),
        (None, Some(_)) => None,
    });
    match (&run.ended, missing) {
        (Ended::AsPlanned, Some(missing)) => Ended::Failed(missing),
        (ended, _) => ended.clone(),
    }
}

fn signal_name(signal: u8) -> String {
    match signal {
        2 => "Ctrl-C (SIGINT)".to_owned(),
        15 => "SIGTERM".to_owned(),
        other => format!("signal {other}"),
    }
}

fn cpu_ns_per_request(run: &Run<'_>) -> Option<u64> {
    let of_phase = |phase| run.totals.tally(&Scope { phase: Some(phase), ..Scope::default() }).ended();
    run.cpu_ns.checked_div((0..run.scenario.phases.len()).map(of_phase).sum())
}

fn phases(run: &Run<'_>) -> Vec<Phase> {
    let mut from_ns = 0;
    let mut phases = Vec::new();
    for (index, phase) in run.scenario.phases.iter().enumerate() {
        let to_ns = from_ns + phase.for_ns;
        let open = phase.mix.iter().map(|(traffic, _)| *traffic);
        let traffic = open.chain(phase.also.iter().copied()).map(|traffic| {
            let scope = Scope { phase: Some(index), event: None, traffic: vec![traffic] };
            (name(run, traffic), measured(&run.totals.sum(&scope), planned(run, traffic, |phase| phase == index)))
        });
        let own = run.totals.own(Some(index));
        phases.push(Phase {
            name: phase.name.clone(),
            from_ns,
            to_ns,
            warmup: phase.warmup,
            gen_lag: lag(&own.gen_lag),
            traffic: traffic.collect(),
        });
        from_ns = to_ns;
    }
    phases
}

fn whole(run: &Run<'_>) -> Whole {
    let is_judged = |phase: usize| !run.scenario.phases[phase].warmup;
    let classes: Vec<usize> = (0..run.scenario.traffic.len()).filter(|traffic| is_used(run, *traffic)).collect();
    let of = |traffic: &[usize]| {
        let scope = Scope { traffic: traffic.to_vec(), ..Scope::default() };
        let planned = traffic.iter().map(|traffic| planned(run, *traffic, is_judged)).sum();
        measured(&run.totals.sum(&scope), planned)
    };
    let (closed, open): (Vec<usize>, Vec<usize>) =
        classes.iter().partition(|traffic| run.scenario.traffic[**traffic].closed.is_some());
    Whole {
        all: of(if open.is_empty() { &closed } else { &open }),
        traffic: classes.iter().map(|traffic| (name(run, *traffic), of(&[*traffic]))).collect(),
        connections: classes.iter().map(|traffic| (name(run, *traffic), connections(run, *traffic))).collect(),
    }
}

fn is_used(run: &Run<'_>, traffic: usize) -> bool {
    let mut phases = run.scenario.phases.iter();
    phases.any(|phase| phase.also.contains(&traffic) || phase.mix.iter().any(|(mixed, _)| *mixed == traffic))
}

fn name(run: &Run<'_>, traffic: usize) -> String {
    run.scenario.traffic[traffic].name.clone()
}

/// Arrivals of the plan in the phases that are asked for; none for a closed loop.
fn planned(run: &Run<'_>, traffic: usize, phases: impl Fn(usize) -> bool) -> Option<u64> {
    if run.scenario.traffic[traffic].closed.is_some() {
        return None;
    }
    Some(run.planned.iter().enumerate().filter(|(phase, _)| phases(*phase)).map(|(_, counts)| counts[traffic]).sum())
}

fn measured(sum: &Sum, planned: Option<u64>) -> Measured {
    let of = |outcome: Outcome| sum.outcomes[outcome as usize];
    let named = Outcome::ALL.into_iter().filter(|outcome| of(*outcome) > 0);
    Measured {
        planned,
        scheduled: sum.scheduled,
        sent: sum.sent,
        outcomes: named.map(|outcome| (outcome.name().to_owned(), of(outcome))).collect(),
        statuses: sum.statuses.iter().copied().collect::<BTreeMap<u16, u64>>(),
        bytes: sum.bytes,
        response: times(&sum.response),
        service: times(&sum.service),
        ttfb: times(&sum.ttfb),
        conn_wait: times(&sum.conn_wait),
        failed: times(&sum.failed),
        visible: times(&sum.visible),
    }
}

/// None without a sample.
fn times(distribution: &Distribution) -> Option<Times> {
    let Distribution { known, censored, .. } = distribution;
    let at = |quantile: f64| distribution.quantile(quantile).map(bound);
    Some(Times {
        count: known.len(),
        censored: censored.len(),
        min: min(distribution),
        mean: eval::mean(distribution).map(bound)?,
        p50: at(0.5)?,
        p75: at(0.75)?,
        p90: at(0.9)?,
        p99: at(0.99)?,
        p99_9: at(0.999)?,
        p99_99: at(0.9999)?,
        max: eval::max(distribution).map(bound)?,
        ci95: Ci95 { p99: between(distribution, 0.99), p99_9: between(distribution, 0.999) },
        hdr_b64: encoded(known),
        censored_hdr_b64: (!censored.is_empty()).then(|| encoded(censored)),
    })
}

/// None without a sample.
fn lag(histogram: &Histogram<u64>) -> Option<Lag> {
    Some(Lag {
        count: histogram.len(),
        p50_ns: quantile_ns(histogram, 0.5)?,
        p99_ns: quantile_ns(histogram, 0.99)?,
        p99_9_ns: quantile_ns(histogram, 0.999)?,
        max_ns: histogram.max(),
        hdr_b64: encoded(histogram),
    })
}

/// Of at least one sample; at least the smallest age where that is smaller than every known time.
fn min(Distribution { known, censored, min_ns, .. }: &Distribution) -> Bound {
    if censored.is_empty() || (!known.is_empty() && *min_ns <= censored.min()) {
        Bound { ns: *min_ns, at_least: false }
    } else {
        Bound { ns: censored.min(), at_least: true }
    }
}

fn bound(quantile: Quantile) -> Bound {
    Bound { ns: quantile.value_ns, at_least: quantile.at_least }
}

fn between(distribution: &Distribution, quantile: f64) -> Option<Between> {
    distribution.interval_95(quantile).map(|(low, high)| Between { low: bound(low), high: bound(high) })
}

fn encoded(histogram: &Histogram<u64>) -> String {
    let mut bytes = Vec::new();
    V2DeflateSerializer::new().serialize(histogram, &mut bytes).expect("a Vec takes everything");
    STANDARD.encode(bytes)
}

fn connections(run: &Run<'_>, traffic: usize) -> Connections {
    let connected = run.totals.connected(traffic);
    let of = |what: Connected| connected[what as usize];
    Connections {
        asked: of(Connected::Asked),
        opened: of(Connected::Opened),
        failed: of(Connected::Failed),
        failed_by_us: of(Connected::FailedByUs),
        closed_by_server: of(Connected::ClosedByServer),
        closed: of(Connected::Closed),
    }
}
