//! What tests of this crate measure: a small scenario, made by hand.

use crate::links::Catalogue;
use crate::measure::{Outcome, Sample};
use crate::plan::Segment;
use crate::scenario::{
    ArrivalKind, Connection, ConnectionKind, Curve, Expect, Phase, Pick, Run, Scenario, Target, Traffic, WhenFull,
};

/// Each phase lasts that many seconds; classes are named `t0`, `t1` and so on, and all are in every phase's mix.
pub(crate) fn scenario(phases: &[(&str, u64)], traffic: usize) -> Scenario {
    Scenario {
        name: "fixture".into(),
        toml: String::new(),
        run: Run {
            target: Target { authority: "127.0.0.1:80".into(), host: "127.0.0.1".into(), port: 80 },
            seed: 1,
            workers: 2,
            timeout_ns: 5_000_000_000,
            drain_ns: 1_000_000_000,
            peak: 0.0,
        },
        catalogue: Catalogue::default(),
        traffic: (0..traffic).map(class).collect(),
        phases: phases
            .iter()
            .map(|&(name, seconds)| Phase {
                name: name.into(),
                for_ns: seconds * 1_000_000_000,
                curve: Curve::Constant(1000.0),
                arrivals: ArrivalKind::Even,
                mix: (0..traffic).map(|class| (class, 1.0 / traffic as f64)).collect(),
                also: Vec::new(),
                warmup: name == "warmup",
            })
            .collect(),
        events: Vec::new(),
        slos: Vec::new(),
    }
}

fn class(number: usize) -> Traffic {
    Traffic {
        name: format!("t{number}"),
        method: "GET".into(),
        path: "/".into(),
        headers: Vec::new(),
        body: None,
        pick: Pick::None,
        expect: Expect::default(),
        yields: None,
        connection: Connection { kind: ConnectionKind::Pool, max: 1, when_full: WhenFull::Queue, pipeline: 1 },
        closed: None,
        bind: None,
        optional: false,
    }
}

/// One a phase.
pub(crate) fn segments(scenario: &Scenario) -> Vec<Segment> {
    let mut from_ns = 0;
    scenario
        .phases
        .iter()
        .enumerate()
        .map(|(phase, length)| {
            let segment = Segment { phase, event: None, from_ns, to_ns: from_ns + length.for_ns };
            from_ns = segment.to_ns;
            segment
        })
        .collect()
}

/// Sent when it was due, answered `response_ns` later, seen at once.
pub(crate) fn sample(segment: u16, traffic: u16, outcome: Outcome, intended_ns: u64, response_ns: u64) -> Sample {
    let done_ns = intended_ns + response_ns;
    Sample {
        segment,
        traffic,
        outcome,
        status: if outcome == Outcome::Ok { 302 } else { 0 },
        bytes: 100,
        intended_ns,
        picked_ns: intended_ns,
        sent_ns: intended_ns,
        first_byte_ns: done_ns,
        done_ns,
        woken_ns: done_ns,
        created_ns: 0,
    }
}
