//! The sum of all batches, and the questions that reports and checks ask it.
//!
//! In: batches, by [`Totals::absorb`]. Out: sums of any scope (phase, event, classes), the generator's own part, and the run
//! second by second. Never: drops or samples what it is given; reads a clock. At its limit: its memory is that of the
//! (segment, class) pairs that were used, and of an hour of seconds.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use hdrhistogram::Histogram;

use super::batch::{BINS, Batch, Cell, Lag, Samples};
use super::recorder::Recorder;
use super::seconds::{SecondOfTraffic, Seconds, busy_share};
use super::{Connected, Outcome};
use crate::plan::Segment;
use crate::scenario::Scenario;
use crate::slo::Scope;

/// Of each worker: one that it fills, one that is being added up, and one so that neither waits for the other.
const BATCHES: usize = 3;

/// The collector's end of the channels.
#[derive(Debug)]
pub struct Collector {
    full: Receiver<Box<Batch>>,
    /// By worker.
    emptied: Vec<Sender<Box<Batch>>>,
}

/// A recorder for each worker, and where their batches arrive. `origin_ns` is the run's, on the monotonic clock.
#[must_use]
pub fn channel(
    workers: usize,
    scenario: &Scenario,
    segments: &[Segment],
    origin_ns: u64,
) -> (Vec<Recorder>, Collector) {
    let traffic = scenario.traffic.len();
    let segments: Arc<[Segment]> = segments.into();
    // As many places as there are batches: giving one away never finds it full.
    let (give, full) = bounded(workers * BATCHES);
    let mut emptied = Vec::with_capacity(workers);
    let recorders = (0..workers)
        .map(|worker| {
            let (give_back, back) = bounded(BATCHES);
            for _ in 1..BATCHES {
                give_back.try_send(Box::new(Batch::new(worker, traffic))).expect("an empty channel with places");
            }
            emptied.push(give_back);
            Recorder::new(worker, traffic, Arc::clone(&segments), origin_ns, give.clone(), back)
        })
        .collect();
    (recorders, Collector { full, emptied })
}

impl Collector {
    /// The next batch, or none within `patience` or when all workers have finished.
    pub fn next(&self, patience: Duration) -> Option<Box<Batch>> {
        self.full.recv_timeout(patience).ok()
    }

    /// Emptied, for its worker to fill again.
    pub fn give_back(&self, mut batch: Box<Batch>) {
        batch.clear();
        // It fails only when the worker has finished and needs none.
        let _ = self.emptied[batch.worker].try_send(batch);
    }
}

/// All that was measured.
#[derive(Debug)]
pub struct Totals {
    segments: Vec<Segment>,
    /// By phase.
    warmup: Vec<bool>,
    traffic: usize,
    /// Segment by segment, by traffic; none where nothing was asked.
    cells: Vec<Option<Box<CellTotal>>>,
    /// By segment.
    lags: Vec<Option<Box<LagTotal>>>,
    /// By traffic.
    connected: Vec<[u64; Connected::COUNT]>,
    workers: Vec<WorkerTotal>,
    seconds: Seconds,
}

/// As [`Cell`], of the whole run.
#[derive(Debug)]
struct CellTotal {
    scheduled: u64,
    outcomes: [u64; Outcome::COUNT],
    statuses: Box<[u64; 600]>,
    bytes: u64,
    /// None where there was no value: most classes never fail.
    response: Option<Samples<u64>>,
    censored: Option<Samples<u64>>,
    failed: Option<Samples<u64>>,
    service: Option<Samples<u64>>,
    ttfb: Option<Samples<u64>>,
    conn_wait: Option<Samples<u64>>,
    visible: Option<Samples<u64>>,
}

/// As [`Lag`], of the whole run.
#[derive(Debug)]
struct LagTotal {
    gen_lag: Samples<u64>,
    rx_lag: Samples<u64>,
    picked_in_time: u64,
    planned: Box<[u64; BINS]>,
    picked: Box<[u64; BINS]>,
}

/// How one worker's loop fared in the whole run, warm-up included.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct WorkerTotal {
    /// The busy share of its busiest second, 0 to 1, and which second that was.
    pub busiest: f64,
    pub busiest_second: u32,
    /// Time that its loop told of.
    pub time_ns: u64,
    /// Sum and number of gaps longer than 10 ms.
    pub gap_ns: u64,
    pub gaps: u64,
}

/// Counts of a scope, without its histograms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    pub scheduled: u64,
    pub outcomes: [u64; Outcome::COUNT],
}

impl Tally {
    #[must_use]
    pub fn of(&self, outcome: Outcome) -> u64 {
        self.outcomes[outcome as usize]
    }

    /// Of all outcomes.
    #[must_use]
    pub fn ended(&self) -> u64 {
        self.outcomes.iter().sum()
    }
}

/// One scope's sum.
#[derive(Debug, Clone)]
pub struct Sum {
    pub scheduled: u64,
    pub outcomes: [u64; Outcome::COUNT],
    /// (status, how many), those that came; 0: outside 100 to 599.
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
    /// Exact; of `known`. 0 without values.
    pub min_ns: u64,
    pub max_ns: u64,
}

impl Distribution {
    #[must_use]
    pub fn new(known: Samples<u64>, censored: Samples<u64>) -> Self {
        let min_ns = if known.is_empty() { 0 } else { known.min_ns };
        Self { known: known.counts, censored: censored.counts, min_ns, max_ns: known.max_ns }
    }
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
    /// All other outcomes.
    pub errors: u64,
    /// At its end, as the two below.
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
        let traffic = scenario.traffic.len();
        Self {
            segments: segments.to_vec(),
            warmup: scenario.phases.iter().map(|phase| phase.warmup).collect(),
            traffic,
            cells: (0..segments.len() * traffic).map(|_| None).collect(),
            lags: (0..segments.len()).map(|_| None).collect(),
            connected: vec![[0; Connected::COUNT]; traffic],
            workers: vec![WorkerTotal::default(); workers],
            seconds: Seconds::new(workers, traffic),
        }
    }

    pub fn absorb(&mut self, batch: &Batch) {
        for cell in &batch.cells {
            let place = usize::from(cell.segment) * self.traffic + usize::from(cell.traffic);
            self.cells[place].get_or_insert_with(|| Box::new(CellTotal::new())).absorb(cell);
        }
        for lag in &batch.lags {
            self.lags[usize::from(lag.segment)].get_or_insert_with(|| Box::new(LagTotal::new())).absorb(lag);
        }
        for (total, more) in self.connected.iter_mut().zip(&batch.connected) {
            add_each(total, more);
        }
        self.workers[batch.worker].absorb(batch);
        self.seconds.absorb(batch);
    }

    /// Everything in the scope, without the warm-up unless that is the phase that is asked for.
    #[must_use]
    pub fn sum(&self, scope: &Scope) -> Sum {
        let Tally { scheduled, outcomes } = self.tally(scope);
        let mut statuses = [0; 600];
        let mut bytes = 0;
        for cell in self.cells_of(scope) {
            add_each(&mut statuses, &*cell.statuses);
            bytes += cell.bytes;
        }
        let gather = |part: fn(&CellTotal) -> &Option<Samples<u64>>| {
            let mut sum = Samples::new();
            self.cells_of(scope).filter_map(|cell| part(cell).as_ref()).for_each(|samples| sum.merge(samples));
            sum
        };
        let known = |part| Distribution::new(gather(part), Samples::new());
        Sum {
            scheduled,
            outcomes,
            statuses: (0..).zip(statuses).filter(|&(_, count)| count > 0).collect(),
            bytes,
            response: Distribution::new(gather(|cell| &cell.response), gather(|cell| &cell.censored)),
            service: known(|cell| &cell.service),
            ttfb: known(|cell| &cell.ttfb),
            conn_wait: known(|cell| &cell.conn_wait),
            failed: known(|cell| &cell.failed),
            visible: known(|cell| &cell.visible),
        }
    }

    /// The counts of [`Totals::sum`] alone.
    #[must_use]
    pub fn tally(&self, scope: &Scope) -> Tally {
        let mut tally = Tally::default();
        for cell in self.cells_of(scope) {
            tally.scheduled += cell.scheduled;
            add_each(&mut tally.outcomes, &cell.outcomes);
        }
        tally
    }

    /// The generator's part; `None`: all phases but the warm-up.
    #[must_use]
    pub fn own(&self, phase: Option<usize>) -> Own {
        let scope = Scope { phase, ..Scope::default() };
        let (mut gen_lag, mut rx_lag) = (Samples::<u64>::new(), Samples::<u64>::new());
        let mut picked_in_time = 0;
        // Both courses run on from one segment to the next.
        let (mut planned, mut picked, mut apart) = (0_u64, 0_u64, 0_u64);
        for lag in self.segments_of(&scope).filter_map(|segment| self.lags[segment].as_deref()) {
            gen_lag.merge(&lag.gen_lag);
            rx_lag.merge(&lag.rx_lag);
            picked_in_time += lag.picked_in_time;
            for (due, taken) in lag.planned.iter().zip(&*lag.picked) {
                planned += due;
                picked += taken;
                apart = apart.max(planned.abs_diff(picked));
            }
        }
        Own {
            scheduled: gen_lag.counts.len(),
            gen_lag: gen_lag.counts,
            rx_lag: rx_lag.counts,
            picked_in_time,
            distance: apart as f64 / planned.max(1) as f64,
        }
    }

    #[must_use]
    pub fn intervals(&self) -> &[Interval] {
        self.seconds.rows()
    }

    /// Nanoseconds from `event_end_ns` (since the origin) to the begin of the first second at or after it in which every one
    /// of `traffic` (none named: all) that had something to do is `good`; none when there is no such second. A class that
    /// had arrivals but no ends is not good: nothing is known of it yet. Runs of more than an hour have longer seconds.
    #[must_use]
    pub fn recovery(
        &self,
        traffic: &[usize],
        event_end_ns: u64,
        good: &dyn Fn(&SecondOfTraffic) -> bool,
    ) -> Option<u64> {
        self.seconds.recovery(traffic, event_end_ns, good)
    }

    /// What happened to connections of a class in the whole run, by [`Connected`].
    #[must_use]
    pub fn connected(&self, traffic: usize) -> [u64; Connected::COUNT] {
        self.connected[traffic]
    }

    /// By worker.
    #[must_use]
    pub fn workers(&self) -> &[WorkerTotal] {
        &self.workers
    }

    fn segments_of<'a>(&'a self, scope: &'a Scope) -> impl Iterator<Item = usize> + 'a {
        let inside = move |segment: &Segment| {
            let phase = scope.phase.map_or(!self.warmup[segment.phase], |phase| segment.phase == phase);
            phase && (scope.event.is_none() || segment.event == scope.event)
        };
        self.segments.iter().enumerate().filter(move |(_, segment)| inside(segment)).map(|(index, _)| index)
    }

    fn cells_of<'a>(&'a self, scope: &'a Scope) -> impl Iterator<Item = &'a CellTotal> + 'a {
        let asked = |traffic: &usize| scope.traffic.is_empty() || scope.traffic.contains(traffic);
        self.segments_of(scope).flat_map(move |segment| {
            (0..self.traffic)
                .filter(asked)
                .filter_map(move |traffic| self.cells[segment * self.traffic + traffic].as_deref())
        })
    }
}

impl CellTotal {
    fn new() -> Self {
        Self {
            scheduled: 0,
            outcomes: [0; Outcome::COUNT],
            statuses: Box::new([0; 600]),
            bytes: 0,
            response: None,
            censored: None,
            failed: None,
            service: None,
            ttfb: None,
            conn_wait: None,
            visible: None,
        }
    }

    fn absorb(&mut self, cell: &Cell) {
        self.scheduled += cell.scheduled;
        add_each(&mut self.outcomes, &cell.outcomes);
        add_each(&mut *self.statuses, &*cell.statuses);
        self.bytes += cell.bytes;
        for (total, second) in [
            (&mut self.response, &cell.response),
            (&mut self.censored, &cell.censored),
            (&mut self.failed, &cell.failed),
            (&mut self.service, &cell.service),
            (&mut self.ttfb, &cell.ttfb),
            (&mut self.conn_wait, &cell.conn_wait),
            (&mut self.visible, &cell.visible),
        ] {
            if !second.is_empty() {
                total.get_or_insert_with(Samples::new).absorb(second);
            }
        }
    }
}

impl LagTotal {
    fn new() -> Self {
        Self {
            gen_lag: Samples::new(),
            rx_lag: Samples::new(),
            picked_in_time: 0,
            planned: Box::new([0; BINS]),
            picked: Box::new([0; BINS]),
        }
    }

    fn absorb(&mut self, lag: &Lag) {
        self.gen_lag.absorb(&lag.gen_lag);
        self.rx_lag.absorb(&lag.rx_lag);
        self.picked_in_time += lag.picked_in_time;
        add_each(&mut *self.planned, &*lag.planned);
        add_each(&mut *self.picked, &*lag.picked);
    }
}

impl WorkerTotal {
    fn absorb(&mut self, batch: &Batch) {
        let busy = busy_share(batch);
        if busy > self.busiest {
            (self.busiest, self.busiest_second) = (busy, batch.second);
        }
        self.time_ns += batch.busy_ns + batch.idle_ns;
        self.gap_ns += batch.gap_ns;
        self.gaps += batch.gaps;
    }
}

fn add_each<const N: usize>(total: &mut [u64; N], more: &[u64; N]) {
    for (total, more) in total.iter_mut().zip(more) {
        *total += more;
    }
}
