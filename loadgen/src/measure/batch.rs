//! What one worker measured in one second: filled in front, added up behind, emptied and filled again.
//!
//! In: samples of one worker. Out: the same, as counts. Never: shared between two threads at a time; shrinks. At its limit: a
//! time above an hour counts in the histogram as an hour (its exact value stays in `max_ns`).

use hdrhistogram::{Counter, Histogram};

use super::{Connected, Kind, Outcome};

/// Digits of a value that a histogram keeps: an error of 1/1024 at most.
const DIGITS: u8 = 3;
/// Below a microsecond values are not told apart (the crate rounds this down to 512 ns).
const FINEST_NS: u64 = 1_000;
/// What a new histogram covers: 2,048 counters, the smallest that the crate makes. It grows by 1,024 for each doubling.
const FIRST_NS: u64 = 1_000_000;
const LONGEST_NS: u64 = 3_600_000_000_000;

/// Values in nanoseconds: a histogram and its exact ends. `u32` counters for a second, `u64` for sums.
#[derive(Debug, Clone)]
pub struct Samples<C: Counter> {
    pub counts: Histogram<C>,
    /// `u64::MAX` when there is none.
    pub min_ns: u64,
    pub max_ns: u64,
}

impl<C: Counter> Samples<C> {
    #[must_use]
    pub fn new() -> Self {
        let mut counts = Histogram::new_with_bounds(FINEST_NS, FIRST_NS, DIGITS).expect("constants within its bounds");
        counts.auto(true);
        Self { counts, min_ns: u64::MAX, max_ns: 0 }
    }

    /// Allocates only when the value is longer than all before it, at most 22 times in the life of a histogram.
    pub fn record(&mut self, ns: u64) {
        self.counts.record(ns.min(LONGEST_NS)).expect("it grows up to an hour");
        self.min_ns = self.min_ns.min(ns);
        self.max_ns = self.max_ns.max(ns);
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    pub fn merge(&mut self, other: &Self) {
        self.counts.add(&other.counts).expect("it grows up to an hour");
        self.min_ns = self.min_ns.min(other.min_ns);
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// Keeps the memory.
    pub fn clear(&mut self) {
        if !self.is_empty() {
            self.counts.reset();
        }
        (self.min_ns, self.max_ns) = (u64::MAX, 0);
    }

    /// Of its counters.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.counts.distinct_values() * size_of::<C>()
    }
}

impl<C: Counter> Default for Samples<C> {
    fn default() -> Self {
        Self::new()
    }
}

impl Samples<u64> {
    /// Adds a second's values; lossless, since both histograms have the same buckets.
    pub fn absorb(&mut self, second: &Samples<u32>) {
        for bucket in second.counts.iter_recorded() {
            let count = u64::from(bucket.count_at_value());
            self.counts.record_n(bucket.value_iterated_to(), count).expect("it grows up to an hour");
        }
        self.min_ns = self.min_ns.min(second.min_ns);
        self.max_ns = self.max_ns.max(second.max_ns);
    }
}

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
    /// Requests whose bytes were handed to the kernel.
    pub sent: u64,
    /// By [`Kind`].
    pub samples: [Samples<u32>; Kind::COUNT],
}

impl Cell {
    pub(super) fn new() -> Self {
        Self {
            segment: 0,
            traffic: 0,
            scheduled: 0,
            outcomes: [0; Outcome::COUNT],
            statuses: Box::new([0; 600]),
            bytes: 0,
            sent: 0,
            samples: std::array::from_fn(|_| Samples::new()),
        }
    }

    pub(super) fn record(&mut self, kind: Kind, ns: u64) {
        self.samples[kind as usize].record(ns);
    }

    #[must_use]
    pub fn of(&self, kind: Kind) -> &Samples<u32> {
        &self.samples[kind as usize]
    }

    fn clear(&mut self) {
        self.scheduled = 0;
        self.outcomes = [0; Outcome::COUNT];
        self.statuses.fill(0);
        (self.bytes, self.sent) = (0, 0);
        self.samples.iter_mut().for_each(Samples::clear);
    }
}

/// Of the worker itself in one segment: how it kept to the plan.
#[derive(Debug)]
pub struct Lag {
    pub segment: u16,
    /// Arrivals of the plan picked before their segment's end.
    pub picked_in_time: u64,
    /// Instants, in parts of the segment's length: planned and real, for V10.
    pub planned: Box<[u64; BINS]>,
    pub picked: Box<[u64; BINS]>,
}

impl Lag {
    pub(super) fn new() -> Self {
        Self { segment: 0, picked_in_time: 0, planned: Box::new([0; BINS]), picked: Box::new([0; BINS]) }
    }

    fn clear(&mut self) {
        self.picked_in_time = 0;
        self.planned.fill(0);
        self.picked.fill(0);
    }
}

/// Parts into which a segment is cut to compare the planned with the real course.
pub const BINS: usize = 1000;

/// The second's batch.
#[derive(Debug)]
pub struct Batch {
    pub worker: usize,
    /// Since the run's origin: the second in which these ended or became due; the first of them, when nobody took it in time.
    pub second: u32,
    /// Those that were used; others wait empty in the worker's recorder.
    pub cells: Vec<Cell>,
    pub lags: Vec<Lag>,
    /// By traffic.
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

impl Batch {
    pub(super) fn new(worker: usize, traffic: usize) -> Self {
        Self {
            worker,
            second: 0,
            // Of the present segment and the one before it.
            cells: Vec::with_capacity(2 * traffic),
            lags: Vec::with_capacity(2),
            connected: vec![[0; Connected::COUNT]; traffic],
            sent: 0,
            in_flight: 0,
            queued: 0,
            open: 0,
            busy_ns: 0,
            idle_ns: 0,
            gap_ns: 0,
            gaps: 0,
        }
    }

    /// Zeroes everything, cells in place: their worker keeps them.
    pub(super) fn clear(&mut self) {
        self.cells.iter_mut().for_each(Cell::clear);
        self.lags.iter_mut().for_each(Lag::clear);
        self.connected.fill([0; Connected::COUNT]);
        (self.sent, self.in_flight, self.queued, self.open) = (0, 0, 0, 0);
        (self.busy_ns, self.idle_ns, self.gap_ns, self.gaps) = (0, 0, 0, 0);
    }
}
