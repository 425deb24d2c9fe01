//! The worker's side.

use super::{Connected, Sample};

#[derive(Debug)]
pub struct Recorder {}

impl Recorder {
    /// An arrival was taken out of the plan.
    pub fn arrived(&mut self, segment: u16, traffic: u16, intended_ns: u64, picked_ns: u64) {
        let _ = (segment, traffic, intended_ns, picked_ns);
        todo!()
    }

    /// Bytes of a request have left.
    pub fn sent(&mut self) {
        todo!()
    }

    /// A request ended; called once for each that arrived.
    pub fn finished(&mut self, sample: &Sample) {
        let _ = sample;
        todo!()
    }

    pub fn connected(&mut self, traffic: u16, what: Connected) {
        let _ = (traffic, what);
        todo!()
    }

    /// One turn of the loop: `idle_ns` it was asleep or polled for nothing, `busy_ns` it worked, and `late_ns` after the
    /// instant until which it wanted to sleep at most it came back (0: in time).
    pub fn turn(&mut self, busy_ns: u64, idle_ns: u64, late_ns: u64) {
        let _ = (busy_ns, idle_ns, late_ns);
        todo!()
    }

    /// Gives the batch away when its second is over; gauges are of this instant. Cheap otherwise.
    pub fn tick(&mut self, now_ns: u64, in_flight: usize, queued: usize, open: usize) {
        let _ = (now_ns, in_flight, queued, open);
        todo!()
    }

    /// Gives the last batch away, waiting for room.
    pub fn finish(self, now_ns: u64) {
        let _ = now_ns;
        todo!()
    }
}
