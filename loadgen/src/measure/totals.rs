//! The sum of all batches, and the questions that reports and checks ask it.

use std::time::Duration;

use hdrhistogram::Histogram;

use super::Outcome;
use super::batch::Batch;
use super::recorder::Recorder;
use crate::plan::Segment;
use crate::scenario::Scenario;
use crate::slo::Scope;

/// The collector's end of the channels.
#[derive(Debug)]
pub struct Collector {}

/// A recorder for each worker, and where their batches arrive. `origin_ns` is the run's, on the monotonic clock.
#[must_use]
pub fn channel(
    workers: usize,
    scenario: &Scenario,
    segments: &[Segment],
    origin_ns: u64,
) -> (Vec<Recorder>, Collector) {
    let _ = (workers, scenario, segments, origin_ns);
    todo!()
}

impl Collector {
    /// The next batch, or none within `patience` or when all workers have finished.
    pub fn next(&self, patience: Duration) -> Option<Box<Batch>> {
        let _ = patience;
        todo!()
    }

    /// Emptied, for its worker to fill again.
    pub fn give_back(&self, batch: Box<Batch>) {
        drop(batch);
        todo!()
    }
}

/// All that was measured.
#[derive(Debug)]
pub struct Totals {}

/// One scope's sum.
#[derive(Debug, Clone)]
pub struct Sum {
    pub scheduled: u64,
    pub outcomes: [u64; Outcome::COUNT],
    /// (status, how many), those that came.
    pub statuses: Vec<(u16, u64)>,
    pub bytes: u64,
    pub response: Distribution,
    pub service: Distribution,
    pub ttfb: Distribution,
    pub conn_wait: Distribution,
    pub failed: Distribution,
    pub visible: Distribution,
}

/// Values and the ages of those that are only known to be longer.
#[derive(Debug, Clone)]
pub struct Distribution {
    pub known: Histogram<u64>,
    pub censored: Histogram<u64>,
    /// Exact; of `known`.
    pub min_ns: u64,
    pub max_ns: u64,
}

/// The generator's own part in a phase.
#[derive(Debug, Clone)]
pub struct Own {
    pub gen_lag: Histogram<u64>,
    pub rx_lag: Histogram<u64>,
    pub scheduled: u64,
    pub picked_in_time: u64,
    /// The largest distance between the planned and the real course of arrivals, 0 to 1.
    pub distance: f64,
}

/// One second of the whole run; after 3,600 of them two become one.
#[derive(Debug, Clone, Default)]
pub struct Interval {
    pub from_s: u32,
    pub seconds: u32,
    pub scheduled: u64,
    pub sent: u64,
    pub ok: u64,
    pub errors: u64,
    pub in_flight: u64,
    pub queued: u64,
    pub open: u64,
    /// Nanoseconds, of answers in this second.
    pub p50_ns: u64,
    pub p99_ns: u64,
    pub max_ns: u64,
    pub gen_lag_p99_ns: u64,
    /// Of the busiest worker, 0 to 1.
    pub busy: f64,
}

impl Totals {
    #[must_use]
    pub fn new(scenario: &Scenario, segments: &[Segment], workers: usize) -> Self {
        let _ = (scenario, segments, workers);
        todo!()
    }

    pub fn absorb(&mut self, batch: &Batch) {
        let _ = batch;
        todo!()
    }

    /// Everything in the scope, without the warm-up unless that is the phase that is asked for.
    #[must_use]
    pub fn sum(&self, scope: &Scope) -> Sum {
        let _ = scope;
        todo!()
    }

    /// The generator's part; `None`: all phases but the warm-up.
    #[must_use]
    pub fn own(&self, phase: Option<usize>) -> Own {
        let _ = phase;
        todo!()
    }

    #[must_use]
    pub fn intervals(&self) -> &[Interval] {
        todo!()
    }
}
