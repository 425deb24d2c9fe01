//! The plan: which request is due when, of which class, for which code. A pure function of scenario and seed.
//!
//! Arrival number k has the same instant, class and code for any number of workers: each worker walks the whole sequence
//! and takes its part of each class. Chance is a generator keyed by seed and k, never one that was advanced by
//! other arrivals.

pub mod arrivals;
pub mod chance;
pub mod curve;
pub mod draw;
pub mod pick;

use crate::scenario::Scenario;

/// One request that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// Since the run's origin.
    pub at_ns: u64,
    /// Over all open arrivals of the run, in order of time.
    pub number: u64,
    /// The how-manieth of its class, from 0.
    pub ordinal: u64,
    pub segment: u16,
    pub traffic: u16,
}

/// A stretch of the run inside one phase and either outside all events or inside one: requests belong to the segment of
/// their intended instant, phases and events are sums of segments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub phase: usize,
    pub event: Option<usize>,
    /// Since the run's origin; `from_ns <= t < to_ns`.
    pub from_ns: u64,
    pub to_ns: u64,
}

/// The segments of a run in order of time, without gaps. An event lasts until its `end`, and one without `lasts` until
/// its phase is over.
#[must_use]
pub fn segments(scenario: &Scenario) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut phase_from_ns = 0;
    for (phase, plan) in scenario.phases.iter().enumerate() {
        let phase_to_ns = phase_from_ns + plan.for_ns;
        let mut from_ns = phase_from_ns;
        let mut push = |event, to_ns| {
            if to_ns > from_ns {
                segments.push(Segment { phase, event, from_ns, to_ns });
                from_ns = to_ns;
            }
        };
        for (index, event) in scenario.events.iter().enumerate() {
            let to_ns = event_to_ns(scenario, index);
            if event.at_ns < phase_to_ns && to_ns > phase_from_ns {
                push(None, event.at_ns);
                push(Some(index), to_ns.min(phase_to_ns));
            }
        }
        push(None, phase_to_ns);
        phase_from_ns = phase_to_ns;
    }
    segments
}

/// Where an event is over, since the run's origin.
fn event_to_ns(scenario: &Scenario, index: usize) -> u64 {
    let event = &scenario.events[index];
    if event.lasts_ns > 0 {
        return event.at_ns + event.lasts_ns;
    }
    let phases_to_ns = scenario.phases.iter().scan(0, |to_ns, phase| {
        *to_ns += phase.for_ns;
        Some(*to_ns)
    });
    let phase_to_ns = phases_to_ns.into_iter().find(|to_ns| *to_ns > event.at_ns).unwrap_or(event.at_ns);
    let next_ns = scenario.events.get(index + 1).map_or(u64::MAX, |next| next.at_ns);
    phase_to_ns.min(next_ns)
}

/// Scenarios for the tests of this folder.
#[cfg(test)]
pub(crate) mod sample {
    use crate::links::{Catalogue, Set, Source};
    use crate::scenario::{
        Action, ArrivalKind, Connection, ConnectionKind, Curve, Event, Expect, Phase, Pick, Run, Scenario, Target,
        Traffic, WhenFull,
    };

    pub(crate) const SECOND_NS: u64 = 1_000_000_000;

    pub(crate) fn scenario(seed: u64, traffic: Vec<Traffic>, phases: Vec<Phase>) -> Scenario {
        Scenario {
            name: "sample".into(),
            toml: String::new(),
            run: Run {
                target: Target { authority: "127.0.0.1:1".into(), host: "127.0.0.1".into(), port: 1 },
                seed,
                workers: 1,
                timeout_ns: SECOND_NS,
                drain_ns: SECOND_NS,
                peak: 0.0,
            },
            catalogue: Catalogue {
                sets: vec![Set { name: "existing".into(), source: Source::Derived { count: 1000 } }],
            },
            traffic,
            phases,
            events: Vec::new(),
            slos: Vec::new(),
        }
    }

    pub(crate) fn traffic(pick: Pick) -> Traffic {
        Traffic {
            name: "clicks".into(),
            method: "GET".into(),
            path: "/{code}".into(),
            headers: Vec::new(),
            body: None,
            pick,
            expect: Expect::default(),
            yields: None,
            connection: Connection { kind: ConnectionKind::Pool, max: 1, when_full: WhenFull::Grow, pipeline: 1 },
            closed: None,
            bind: None,
            optional: false,
        }
    }

    pub(crate) fn phase(for_ns: u64, curve: Curve, arrivals: ArrivalKind, mix: Vec<(usize, f64)>) -> Phase {
        Phase { name: "phase".into(), for_ns, curve, arrivals, mix, also: Vec::new(), warmup: false }
    }

    pub(crate) fn event(at_ns: u64, lasts_ns: u64) -> Event {
        let end = (lasts_ns > 0).then(|| Action::Exec(vec!["true".into()]));
        Event { name: "event".into(), at_ns, lasts_ns, begin: Action::Exec(vec!["true".into()]), end }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::scenario::{ArrivalKind, Curve};

    #[test]
    fn segments_cut_phases_at_events() {
        let check = |lengths: &[u64], events: &[(u64, u64)], expected: &[(usize, Option<usize>, u64, u64)]| {
            let phases =
                lengths.iter().map(|ns| sample::phase(*ns, Curve::Constant(1.0), ArrivalKind::Even, vec![])).collect();
            let mut scenario = sample::scenario(1, vec![], phases);
            scenario.events = events.iter().map(|(at, lasts)| sample::event(*at, *lasts)).collect();
            let found: Vec<_> =
                segments(&scenario).iter().map(|part| (part.phase, part.event, part.from_ns, part.to_ns)).collect();
            assert_eq!(found, expected, "{lengths:?} {events:?}");
        };
        check(&[10], &[], &[(0, None, 0, 10)]);
        check(&[10, 0, 5], &[], &[(0, None, 0, 10), (2, None, 10, 15)]);
        check(&[10], &[(3, 4)], &[(0, None, 0, 3), (0, Some(0), 3, 7), (0, None, 7, 10)]);
        check(&[10], &[(0, 10)], &[(0, Some(0), 0, 10)]);
        // Over the border of two phases.
        check(&[10, 10], &[(8, 4)], &[(0, None, 0, 8), (0, Some(0), 8, 10), (1, Some(0), 10, 12), (1, None, 12, 20)]);
        // Without an end: until the phase is over, or the next event begins.
        check(&[10, 10], &[(8, 0)], &[(0, None, 0, 8), (0, Some(0), 8, 10), (1, None, 10, 20)]);
        check(&[10], &[(2, 0), (5, 2)], &[(0, None, 0, 2), (0, Some(0), 2, 5), (0, Some(1), 5, 7), (0, None, 7, 10)]);
        // On a border it belongs to the phase that begins.
        check(&[10, 10], &[(10, 0)], &[(0, None, 0, 10), (1, Some(0), 10, 20)]);
        // Longer than the run, or after it.
        check(&[10], &[(6, 9)], &[(0, None, 0, 6), (0, Some(0), 6, 10)]);
        check(&[10], &[(12, 3)], &[(0, None, 0, 10)]);
    }
}
