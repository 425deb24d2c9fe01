//! What one worker measured in one second: filled in front, added up behind, emptied and filled again.

use hdrhistogram::Histogram;

use super::{Connected, Outcome};

/// Of one class in one segment.
#[derive(Debug)]
pub struct Cell {
    pub segment: u16,
    pub traffic: u16,
    /// Arrivals that became due.
    pub scheduled: u64,
    pub outcomes: [u64; Outcome::COUNT],
    /// By status, from 100 to 599; others count at 0.
    pub statuses: Box<[u64; 600]>,
    pub bytes: u64,
    /// `done - intended` of what was answered rightly: the headline.
    pub response: Histogram<u64>,
    /// Ages of what is known only to have taken at least that long.
    pub censored: Histogram<u64>,
    /// `done - intended` of what was answered, but not rightly: fast errors improve no percentile.
    pub failed: Histogram<u64>,
    /// `done - sent`: what a closed-loop tool shows.
    pub service: Histogram<u64>,
    /// `first byte - sent`.
    pub ttfb: Histogram<u64>,
    /// `sent - picked`: no free connection, connecting.
    pub conn_wait: Histogram<u64>,
    /// `done - created` of the first right answer for a fresh code.
    pub visible: Histogram<u64>,
}

/// Of the worker itself in one segment.
#[derive(Debug)]
pub struct Lag {
    pub segment: u16,
    /// `picked - intended`: our fault.
    pub gen_lag: Histogram<u64>,
    /// `done - woken`: ours too.
    pub rx_lag: Histogram<u64>,
    /// Arrivals picked before their segment's end.
    pub picked_in_time: u64,
    /// Instants, in parts of the segment's length: planned and real, for V10.
    pub planned: Box<[u64; BINS]>,
    pub picked: Box<[u64; BINS]>,
}

/// Parts into which a segment is cut to compare the planned with the real course.
pub const BINS: usize = 1000;

/// The second's batch.
#[derive(Debug)]
pub struct Batch {
    pub worker: usize,
    /// Since the run's origin: the second in which these ended or became due.
    pub second: u32,
    /// Those that were used; others wait empty in the worker's recorder.
    pub cells: Vec<Cell>,
    pub lags: Vec<Lag>,
    pub connected: Vec<[u64; Connected::COUNT]>,
    /// Requests sent.
    pub sent: u64,
    /// At the second's end.
    pub in_flight: u64,
    pub queued: u64,
    pub open: u64,
    /// Of the loop in this second.
    pub busy_ns: u64,
    pub idle_ns: u64,
    /// The sum and number of gaps longer than 10 ms in which the loop did not come round though it should have.
    pub gap_ns: u64,
    pub gaps: u64,
}
