//! The plan: which request is due when, of which class, for which code. A pure function of scenario and seed.
//!
//! Arrival number k has the same instant, class and code for any number of workers: worker w of W walks the whole
//! sequence and takes those with `k % W == w`. Chance is a generator keyed by seed and k, never one that was advanced by
//! other arrivals.

pub mod arrivals;
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
    let _ = scenario;
    todo!()
}
