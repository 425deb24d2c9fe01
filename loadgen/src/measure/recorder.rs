//! The worker's side.
//!
//! In: what the engine tells of each arrival. Out: a [`Batch`] a second. Never: waits, locks, drops a sample; allocates once
//! every class has been seen and no answer is slower than all before it. At its limit: while no emptied batch has come back,
//! the present one is filled on.

use std::mem;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};

use super::batch::{BINS, Batch, Cell, Lag};
use super::{Connected, Kind, Outcome, Sample};
use crate::plan::Segment;

/// Longer than this the loop ought never to stay away; no scheduler of a machine at rest takes that long.
const GAP_NS: u64 = 10_000_000;
const SECOND_NS: u64 = 1_000_000_000;
/// The interval that the planted back-fill pretends, that of autocannon.
const BACK_FILL_NS: u64 = 1_000_000;
/// No cell in the present batch.
const NONE: usize = usize::MAX;

#[derive(Debug)]
pub struct Recorder {
    segments: Arc<[Segment]>,
    /// By traffic: whether it is a closed loop.
    closed: Arc<[bool]>,
    origin_ns: u64,
    batch: Box<Batch>,
    batch_ends_ns: u64,
    /// Where the cell of (segment, traffic), row by row, stands in the present batch.
    cell_of: Vec<usize>,
    lag_of: Vec<usize>,
    /// Emptied, with their memory: as many as classes are active at a time, however many phases a run has.
    free_cells: Vec<Cell>,
    free_lags: Vec<Lag>,
    full: Sender<Box<Batch>>,
    emptied: Receiver<Box<Batch>>,
    back_fill: bool,
}

impl Recorder {
    /// `full` must have room for every batch of every worker; further batches of this worker lie in `emptied`.
    pub(super) fn new(
        worker: usize,
        closed: Arc<[bool]>,
        segments: Arc<[Segment]>,
        origin_ns: u64,
        full: Sender<Box<Batch>>,
        emptied: Receiver<Box<Batch>>,
    ) -> Self {
        let traffic = closed.len();
        Self {
            cell_of: vec![NONE; segments.len() * traffic],
            lag_of: vec![NONE; segments.len()],
            segments,
            closed,
            origin_ns,
            batch: Box::new(Batch::new(worker, traffic)),
            batch_ends_ns: origin_ns + SECOND_NS,
            free_cells: Vec::with_capacity(4 * traffic),
            free_lags: Vec::with_capacity(4),
            full,
            emptied,
            back_fill: false,
        }
    }

    /// A fault on purpose, for `prove`: from now on each right answer of x also counts as x - 1 ms, x - 2 ms and so on, as
    /// generators do that wait for answers. The plan has those requests already, so they count twice.
    pub fn plant_back_fill(&mut self) {
        self.back_fill = true;
    }

    /// An arrival was taken out of the plan, or begun by a closed loop.
    pub fn arrived(&mut self, segment: u16, traffic: u16, intended_ns: u64, picked_ns: u64) {
        self.cell(segment, traffic).scheduled += 1;
        // No plan says when these are due; always in time, they would hide the lateness of the others.
        if self.closed[usize::from(traffic)] {
            return;
        }
        let Segment { from_ns, to_ns, .. } = self.segments[usize::from(segment)];
        let (from_ns, to_ns) = (self.origin_ns + from_ns, self.origin_ns + to_ns);
        let bin = |at_ns: u64| {
            let part = at_ns.saturating_sub(from_ns) * BINS as u64 / (to_ns - from_ns).max(1);
            usize::try_from(part).map_or(BINS - 1, |part| part.min(BINS - 1))
        };
        let lag = self.lag(segment);
        lag.picked_in_time += u64::from(picked_ns < to_ns);
        lag.planned[bin(intended_ns)] += 1;
        lag.picked[bin(picked_ns)] += 1;
    }

    /// An arrival that was due at `intended_ns` left our hands at `left_ns`: handed to the kernel, or put into its group's
    /// queue because no connection was free. What it waits after that is not our fault.
    pub fn left(&mut self, segment: u16, traffic: u16, intended_ns: u64, left_ns: u64) {
        if !self.closed[usize::from(traffic)] {
            self.cell(segment, traffic).record(Kind::GenLag, left_ns.saturating_sub(intended_ns));
        }
    }

    /// Bytes of a request have left.
    pub fn sent(&mut self) {
        self.batch.sent += 1;
    }

    /// A request ended; called once for each that arrived.
    pub fn finished(&mut self, sample: &Sample) {
        let back_fill = self.back_fill;
        let cell = self.cell(sample.segment, sample.traffic);
        cell.outcomes[sample.outcome as usize] += 1;
        cell.bytes += u64::from(sample.bytes);
        cell.sent += u64::from(sample.sent_ns != 0);
        if sample.status != 0 {
            let known = if (100..600).contains(&sample.status) { usize::from(sample.status) } else { 0 };
            cell.statuses[known] += 1;
        }
        let response_ns = sample.done_ns.saturating_sub(sample.intended_ns);
        match sample.outcome {
            Outcome::Ok => {
                cell.record(Kind::Response, response_ns);
                cell.record(Kind::Service, sample.done_ns.saturating_sub(sample.sent_ns));
                cell.record(Kind::Ttfb, sample.first_byte_ns.saturating_sub(sample.sent_ns));
                cell.record(Kind::ConnWait, sample.sent_ns.saturating_sub(sample.picked_ns));
                if sample.created_ns != 0 {
                    cell.record(Kind::Visible, sample.done_ns.saturating_sub(sample.created_ns));
                }
                if back_fill {
                    let mut missing_ns = response_ns.saturating_sub(BACK_FILL_NS);
                    while missing_ns >= BACK_FILL_NS {
                        cell.record(Kind::Response, missing_ns);
                        missing_ns -= BACK_FILL_NS;
                    }
                }
            }
            Outcome::WrongStatus | Outcome::WrongLocation | Outcome::WrongBody => {
                cell.record(Kind::Failed, response_ns)
            }
            Outcome::Timeout | Outcome::Unsent | Outcome::InFlightAtEnd => cell.record(Kind::Censored, response_ns),
            // It took no time that says anything of an answer.
            Outcome::ProtocolError
            | Outcome::Refused
            | Outcome::Reset
            | Outcome::ClosedEarly
            | Outcome::NoFd
            | Outcome::NoPort
            | Outcome::NoCode => {}
        }
        // Only what came over the wire could wait in our batch of events.
        if sample.status != 0 && sample.woken_ns != 0 {
            cell.record(Kind::RxLag, sample.done_ns.saturating_sub(sample.woken_ns));
        }
    }

    pub fn connected(&mut self, traffic: u16, what: Connected) {
        self.batch.connected[usize::from(traffic)][what as usize] += 1;
    }

    /// One turn of the loop: `idle_ns` it was asleep or polled for nothing, `busy_ns` it worked, and `late_ns` after the
    /// instant until which it wanted to sleep at most it came back (0: in time).
    pub fn turn(&mut self, busy_ns: u64, idle_ns: u64, late_ns: u64) {
        self.batch.busy_ns += busy_ns;
        self.batch.idle_ns += idle_ns;
        let away_ns = busy_ns.max(late_ns);
        if away_ns > GAP_NS {
            self.batch.gap_ns += away_ns;
            self.batch.gaps += 1;
        }
    }

    /// Gives the batch away when its second is over; gauges are of this instant. Cheap otherwise.
    pub fn tick(&mut self, now_ns: u64, in_flight: usize, queued: usize, open: usize) {
        if now_ns < self.batch_ends_ns {
            return;
        }
        let Ok(mut empty) = self.emptied.try_recv() else { return };
        self.free_cells.append(&mut empty.cells);
        self.free_lags.append(&mut empty.lags);
        self.cell_of.fill(NONE);
        self.lag_of.fill(NONE);
        let second = now_ns.saturating_sub(self.origin_ns) / SECOND_NS;
        empty.second = u32::try_from(second).unwrap_or(u32::MAX);
        self.batch_ends_ns = self.origin_ns + (second + 1) * SECOND_NS;
        let mut full = mem::replace(&mut self.batch, empty);
        (full.in_flight, full.queued, full.open) = (in_flight as u64, queued as u64, open as u64);
        // There is room for every batch; it fails only when the collector is gone, and nobody wants it then.
        let _ = self.full.try_send(full);
    }

    /// Gives away what is left: a run's gauges end at 0.
    pub fn finish(mut self, now_ns: u64) {
        self.tick(now_ns, 0, 0, 0);
        let _ = self.full.send(self.batch);
    }

    fn cell(&mut self, segment: u16, traffic: u16) -> &mut Cell {
        let place = &mut self.cell_of[usize::from(segment) * self.closed.len() + usize::from(traffic)];
        if *place == NONE {
            let cell = self.free_cells.pop().unwrap_or_else(Cell::new);
            *place = self.batch.cells.len();
            self.batch.cells.push(Cell { segment, traffic, ..cell });
        }
        &mut self.batch.cells[*place]
    }

    fn lag(&mut self, segment: u16) -> &mut Lag {
        let place = &mut self.lag_of[usize::from(segment)];
        if *place == NONE {
            let lag = self.free_lags.pop().unwrap_or_else(Lag::new);
            *place = self.batch.lags.len();
            self.batch.lags.push(Lag { segment, ..lag });
        }
        &mut self.batch.lags[*place]
    }
}

#[cfg(test)]
mod tests {
    use super::Recorder;

    impl Recorder {
        /// In its hands, free or in use.
        pub(in crate::measure) fn cells(&self) -> usize {
            self.batch.cells.len() + self.free_cells.len()
        }

        /// Of all histograms, those in emptied batches taken back first.
        pub(in crate::measure) fn memory_bytes(&mut self) -> usize {
            while let Ok(mut empty) = self.emptied.try_recv() {
                self.free_cells.append(&mut empty.cells);
                self.free_lags.append(&mut empty.lags);
            }
            let cells = self.batch.cells.iter().chain(&self.free_cells).flat_map(|cell| &cell.samples);
            cells.map(super::super::batch::Samples::memory_bytes).sum()
        }
    }
}
