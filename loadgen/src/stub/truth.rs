//! What really happened to requests, as the other side of the wire saw it.
//!
//! In: requests whose header `X-Loadgen-Intended` names the nanosecond of `CLOCK_MONOTONIC` at which they were due; one
//! clock for both processes of a machine. Out: [`Truth`]. Never: a sample for what was not answered; those are counted.
//! At its limit: longer than an hour counts as an hour.

use hdrhistogram::Histogram;

/// Times are nanoseconds, three digits.
#[derive(Debug, Clone)]
pub struct Truth {
    /// Requests that were read, with the header or without.
    pub requests: u64,
    /// Of those, how many named their intended instant: the histograms are about these alone.
    pub marked: u64,
    /// Connections that were accepted.
    pub connections: u64,
    /// `done - intended` of answers below 400. Done is the instant before the last byte is handed to the kernel: a
    /// client cannot have it earlier.
    pub right: Histogram<u64>,
    /// `done - intended` of other answers.
    pub wrong: Histogram<u64>,
    /// `read - intended`: how late requests arrived, whoever was late.
    pub arrival: Histogram<u64>,
}

impl Truth {
    pub(super) fn new() -> Self {
        let histogram = || Histogram::new_with_bounds(1, HOUR_NS, 3).expect("the bounds are right");
        Self { requests: 0, marked: 0, connections: 0, right: histogram(), wrong: histogram(), arrival: histogram() }
    }

    pub(super) fn read(&mut self, intended_ns: Option<u64>, now_ns: u64) {
        self.requests += 1;
        if let Some(intended_ns) = intended_ns {
            self.marked += 1;
            self.arrival.saturating_record(now_ns.saturating_sub(intended_ns));
        }
    }

    pub(super) fn answered(&mut self, status: u16, intended_ns: Option<u64>, now_ns: u64) {
        let Some(intended_ns) = intended_ns else { return };
        let histogram = if status < 400 { &mut self.right } else { &mut self.wrong };
        histogram.saturating_record(now_ns.saturating_sub(intended_ns));
    }

    /// Marked requests that were read and never answered: stuck, reset, given up by the client, or still waiting.
    #[must_use]
    pub fn unanswered(&self) -> u64 {
        self.marked - self.right.len() - self.wrong.len()
    }
}

const HOUR_NS: u64 = 3_600_000_000_000;
