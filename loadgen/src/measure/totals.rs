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
use super::percentile::Distribution;
use super::recorder::Recorder;
use super::seconds::{Interval, ROWS, SecondOfTraffic, Seconds, busy_share};
use super::{Connected, Kind, Outcome};
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
    let closed: Arc<[bool]> = scenario.traffic.iter().map(|class| class.closed.is_some()).collect();
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
            Recorder::new(worker, Arc::clone(&closed), Arc::clone(&segments), origin_ns, give.clone(), back)
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
    sent: u64,
    /// By [`Kind`]; none where there was no value: most classes never fail.
    samples: [Option<Samples<u64>>; Kind::COUNT],
}

/// As [`Lag`], of the whole run.
#[derive(Debug)]
struct LagTotal {
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
    /// Requests whose bytes were handed to the kernel.
    pub sent: u64,
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
    /// Requests whose bytes were handed to the kernel.
    pub sent: u64,
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

/// The generator's own part in a phase. Arrivals are those of the plan: a closed loop's are due when they are sent.
#[derive(Debug, Clone)]
pub struct Own {
    pub gen_lag: Histogram<u64>,
    pub scheduled: u64,
    pub picked_in_time: u64,
    /// The largest distance between the planned and the real course of arrivals, 0 to 1.
    pub distance: f64,
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
            seconds: Seconds::new(workers, traffic, ROWS),
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
        let Tally { scheduled, sent, outcomes } = self.tally(scope);
        let mut statuses = [0; 600];
        let mut bytes = 0;
        for cell in self.cells_of(scope) {
            add_each(&mut statuses, &cell.statuses);
            bytes += cell.bytes;
        }
        let known = |kind| Distribution::new(self.samples(scope, kind), Samples::new());
        Sum {
            scheduled,
            sent,
            outcomes,
            statuses: (0..).zip(statuses).filter(|&(_, count)| count > 0).collect(),
            bytes,
            response: self.response(scope),
            service: known(Kind::Service),
            ttfb: known(Kind::Ttfb),
            conn_wait: known(Kind::ConnWait),
            failed: known(Kind::Failed),
            visible: known(Kind::Visible),
        }
    }

    /// The response times and ages of [`Totals::sum`] alone.
    #[must_use]
    pub fn response(&self, scope: &Scope) -> Distribution {
        Distribution::new(self.samples(scope, Kind::Response), self.samples(scope, Kind::Censored))
    }

    /// The times of one kind alone.
    #[must_use]
    pub fn samples(&self, scope: &Scope, kind: Kind) -> Samples<u64> {
        let mut sum = Samples::new();
        let cells = self.cells_of(scope).filter_map(|cell| cell.samples[kind as usize].as_ref());
        cells.for_each(|samples| sum.merge(samples));
        sum
    }

    /// The counts of [`Totals::sum`] alone.
    #[must_use]
    pub fn tally(&self, scope: &Scope) -> Tally {
        let mut tally = Tally::default();
        for cell in self.cells_of(scope) {
            tally.scheduled += cell.scheduled;
            tally.sent += cell.sent;
            add_each(&mut tally.outcomes, &cell.outcomes);
        }
        tally
    }

    /// The generator's part; `None`: all phases but the warm-up.
    #[must_use]
    pub fn own(&self, phase: Option<usize>) -> Own {
        let scope = Scope { phase, ..Scope::default() };
        let mut picked_in_time = 0;
        // Both courses run on from one segment to the next.
        let (mut planned, mut picked, mut apart) = (0_u64, 0_u64, 0_u64);
        for lag in self.segments_of(&scope).filter_map(|segment| self.lags[segment].as_deref()) {
            picked_in_time += lag.picked_in_time;
            for (due, taken) in lag.planned.iter().zip(&*lag.picked) {
                planned += due;
                picked += taken;
                apart = apart.max(planned.abs_diff(picked));
            }
        }
        Own {
            gen_lag: self.samples(&scope, Kind::GenLag).counts,
            scheduled: planned,
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

    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
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
            sent: 0,
            samples: [const { None }; Kind::COUNT],
        }
    }

    fn absorb(&mut self, cell: &Cell) {
        self.scheduled += cell.scheduled;
        add_each(&mut self.outcomes, &cell.outcomes);
        add_each(&mut self.statuses, &cell.statuses);
        self.bytes += cell.bytes;
        self.sent += cell.sent;
        for (total, second) in self.samples.iter_mut().zip(&cell.samples) {
            if !second.is_empty() {
                total.get_or_insert_with(Samples::new).absorb(second);
            }
        }
    }
}

impl LagTotal {
    fn new() -> Self {
        Self { picked_in_time: 0, planned: Box::new([0; BINS]), picked: Box::new([0; BINS]) }
    }

    fn absorb(&mut self, lag: &Lag) {
        self.picked_in_time += lag.picked_in_time;
        add_each(&mut self.planned, &lag.planned);
        add_each(&mut self.picked, &lag.picked);
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{BATCHES, Collector, Totals, channel};
    use crate::measure::batch::{Batch, Samples};
    use crate::measure::fixture::{sample, scenario, segments};
    use crate::measure::recorder::Recorder;
    use crate::measure::{Connected, Outcome, Sample};
    use crate::plan::Segment;
    use crate::slo::Scope;

    const ORIGIN: u64 = 7_000_000_000_000;
    const S: u64 = 1_000_000_000;
    const MS: u64 = 1_000_000;

    fn take_all(collector: &Collector, totals: &mut Totals) -> usize {
        let mut taken = 0;
        while let Some(batch) = collector.next(Duration::ZERO) {
            totals.absorb(&batch);
            collector.give_back(batch);
            taken += 1;
        }
        taken
    }

    fn one(recorder: &mut Recorder, segment: u16, traffic: u16, outcome: Outcome, at_ns: u64, response_ns: u64) {
        recorder.arrived(segment, traffic, ORIGIN + at_ns, ORIGIN + at_ns);
        recorder.left(segment, traffic, ORIGIN + at_ns, ORIGIN + at_ns);
        recorder.finished(&sample(segment, traffic, outcome, ORIGIN + at_ns, response_ns));
    }

    #[test]
    fn everything_arrives_in_the_scope_that_it_belongs_to() {
        let scenario = scenario(&[("warmup", 1), ("a", 2), ("b", 2)], 2);
        let mut segments = segments(&scenario);
        // The second phase is cut by an event.
        segments[2].from_ns = 2 * S;
        segments[1].to_ns = 2 * S;
        segments[2].phase = 1;
        segments[2].event = Some(0);
        segments[2].to_ns = 3 * S;
        segments.push(Segment { phase: 2, event: None, from_ns: 3 * S, to_ns: 5 * S });
        let (mut recorders, collector) = channel(2, &scenario, &segments, ORIGIN);
        let mut totals = Totals::new(&scenario, &segments, 2);
        for (worker, recorder) in recorders.iter_mut().enumerate() {
            let more = worker as u64 * MS;
            one(recorder, 0, 0, Outcome::Ok, 0, 100 * MS);
            one(recorder, 1, 0, Outcome::Ok, S, MS + more);
            one(recorder, 1, 1, Outcome::WrongStatus, S, 2 * MS);
            recorder.tick(ORIGIN + 2 * S, 1, 2, 3);
            one(recorder, 2, 0, Outcome::Timeout, 2 * S, 5000 * MS);
            one(recorder, 2, 1, Outcome::Refused, 2 * S, MS);
            one(recorder, 3, 1, Outcome::Ok, 3 * S, 3 * MS);
            recorder.connected(1, Connected::Asked);
            recorder.sent();
        }
        for recorder in recorders {
            recorder.finish(ORIGIN + 3 * S - 1);
        }
        assert_eq!(take_all(&collector, &mut totals), 4);

        let check = |phase, event, traffic: &[usize], expected: [u64; 6]| {
            let sum = totals.sum(&Scope { phase, event, traffic: traffic.to_vec() });
            let known = sum.response.known.len();
            let found = [
                sum.scheduled,
                known,
                sum.response.censored.len(),
                sum.failed.known.len(),
                sum.bytes,
                sum.response.max_ns,
            ];
            assert_eq!(found, expected, "{phase:?} {event:?} {traffic:?}");
            assert_eq!(sum.outcomes.iter().sum::<u64>(), sum.scheduled);
            assert_eq!(sum.service.known.len(), known);
        };
        check(None, None, &[], [10, 4, 2, 2, 1000, 3 * MS]);
        check(Some(0), None, &[], [2, 2, 0, 0, 200, 100 * MS]);
        check(Some(1), None, &[], [8, 2, 2, 2, 800, 2 * MS]);
        check(Some(1), None, &[0], [4, 2, 2, 0, 400, 2 * MS]);
        check(None, Some(0), &[], [4, 0, 2, 0, 400, 0]);
        check(Some(2), None, &[0], [0, 0, 0, 0, 0, 0]);
        check(Some(2), None, &[0, 1], [2, 2, 0, 0, 200, 3 * MS]);
        assert_eq!(totals.connected(1)[Connected::Asked as usize], 2);
        assert_eq!(totals.sum(&Scope::default()).statuses, [(302, 4)]);
        let own = totals.own(None);
        assert_eq!((own.scheduled, own.picked_in_time, own.distance), (10, 10, 0.0));
        // Each worker's first batch covers two seconds, since it ticked only then.
        let intervals = totals.intervals();
        assert_eq!(intervals.iter().map(|second| second.scheduled).collect::<Vec<_>>(), [6, 0, 6]);
        assert_eq!([intervals[0].in_flight, intervals[0].queued, intervals[0].open], [2, 4, 6]);
        assert_eq!((intervals[2].ok, intervals[2].errors, intervals[2].sent), (2, 4, 2));
    }

    #[test]
    fn nothing_is_lost_when_nobody_takes_the_batches() {
        let scenario = scenario(&[("a", 100)], 1);
        let segments = segments(&scenario);
        let (mut recorders, collector) = channel(1, &scenario, &segments, ORIGIN);
        let mut totals = Totals::new(&scenario, &segments, 1);
        let mut recorder = recorders.pop().expect("one worker");
        for second in 0..50 {
            one(&mut recorder, 0, 0, Outcome::Ok, second * S, MS);
            recorder.tick(ORIGIN + (second + 1) * S, 0, 0, 0);
        }
        // It has one left to fill; the rest waits here.
        assert_eq!(take_all(&collector, &mut totals), BATCHES - 1);
        recorder.tick(ORIGIN + 51 * S, 0, 0, 0);
        recorder.finish(ORIGIN + 51 * S);
        take_all(&collector, &mut totals);
        assert_eq!(totals.sum(&Scope::default()).scheduled, 50);
    }

    #[test]
    fn sent_is_what_left_whatever_became_of_it() {
        let scenario = scenario(&[("a", 100)], 1);
        let segments = segments(&scenario);
        let (mut recorders, collector) = channel(1, &scenario, &segments, ORIGIN);
        let mut totals = Totals::new(&scenario, &segments, 1);
        let mut recorder = recorders.pop().expect("one worker");
        for outcome in Outcome::ALL {
            let left = sample(0, 0, outcome, ORIGIN, MS);
            for sample in [Sample { sent_ns: 0, ..left }, left] {
                recorder.arrived(0, 0, ORIGIN, ORIGIN);
                recorder.finished(&sample);
            }
        }
        recorder.finish(ORIGIN);
        take_all(&collector, &mut totals);
        let sum = totals.sum(&Scope::default());
        assert_eq!((sum.scheduled, sum.sent), (2 * Outcome::COUNT as u64, Outcome::COUNT as u64));
    }

    #[test]
    fn planted_back_fill_invents_what_is_below_a_long_sample() {
        let scenario = scenario(&[("a", 100)], 1);
        let segments = segments(&scenario);
        let (mut recorders, collector) = channel(1, &scenario, &segments, ORIGIN);
        let mut totals = Totals::new(&scenario, &segments, 1);
        let mut recorder = recorders.pop().expect("one worker");
        recorder.plant_back_fill();
        one(&mut recorder, 0, 0, Outcome::Ok, 0, 50 * MS);
        recorder.finish(ORIGIN);
        take_all(&collector, &mut totals);
        let sum = totals.sum(&Scope::default());
        assert_eq!((sum.scheduled, sum.response.known.len()), (1, 50));
    }

    #[test]
    fn the_course_of_arrivals_is_compared_over_a_whole_phase() {
        let scenario = scenario(&[("a", 10)], 1);
        let segments = segments(&scenario);
        let check = |late_ns: &dyn Fn(u64) -> u64, expected: f64, in_time: u64| {
            let (mut recorders, collector) = channel(1, &scenario, &segments, ORIGIN);
            let mut totals = Totals::new(&scenario, &segments, 1);
            let mut recorder = recorders.pop().expect("one worker");
            for at_ns in (0..1000).map(|k| k * 10 * MS) {
                recorder.arrived(0, 0, ORIGIN + at_ns, ORIGIN + at_ns + late_ns(at_ns));
                recorder.left(0, 0, ORIGIN + at_ns, ORIGIN + at_ns + late_ns(at_ns));
            }
            recorder.finish(ORIGIN);
            take_all(&collector, &mut totals);
            let own = totals.own(Some(0));
            assert!((own.distance - expected).abs() < 0.002, "{} for {expected}", own.distance);
            assert_eq!(own.picked_in_time, in_time);
        };
        check(&|_| 0, 0.0, 1000);
        check(&|_| 100_000, 0.0, 1000);
        // Asleep from second 2 to second 3.
        check(&|at_ns| if (2 * S..3 * S).contains(&at_ns) { 3 * S - at_ns } else { 0 }, 0.1, 1000);
        // Half a second behind for good; what is picked after the end stands at it.
        check(&|_| 500 * MS, 0.05, 950);
    }

    #[test]
    fn a_worker_tells_its_busiest_second_and_its_gaps() {
        let scenario = scenario(&[("a", 10)], 1);
        let segments = segments(&scenario);
        let (mut recorders, collector) = channel(1, &scenario, &segments, ORIGIN);
        let mut totals = Totals::new(&scenario, &segments, 1);
        let mut recorder = recorders.pop().expect("one worker");
        for second in 0..3 {
            for _ in 0..100 {
                let busy = if second == 1 { 9 * MS } else { 2 * MS };
                recorder.turn(busy, 10 * MS - busy, 0);
            }
            recorder.tick(ORIGIN + (second + 1) * S, 0, 0, 0);
            take_all(&collector, &mut totals);
        }
        // Too short to say anything.
        recorder.turn(30 * MS, 0, 20 * MS);
        recorder.finish(ORIGIN + 3 * S);
        take_all(&collector, &mut totals);
        let worker = totals.workers()[0];
        assert!((worker.busiest - 0.9).abs() < 1e-9 && worker.busiest_second == 1, "{worker:?}");
        assert_eq!((worker.gaps, worker.gap_ns, worker.time_ns), (1, 30 * MS, 3030 * MS));
    }

    #[test]
    fn a_long_campaign_fits_into_28_mib() {
        // Seven segments, six classes, one of the segments a stall of 5 s; two workers, each second's batches given back late.
        let (phases, classes) = (7_u16, 6_u16);
        let names: Vec<(&str, u64)> = (0..phases).map(|_| ("a", 8)).collect();
        let scenario = scenario(&names, usize::from(classes));
        let segments = segments(&scenario);
        let (mut recorders, collector) = channel(2, &scenario, &segments, ORIGIN);
        let mut totals = Totals::new(&scenario, &segments, 2);
        let mut held: Vec<Box<Batch>> = Vec::new();
        let mut worker_cells = 0;
        for second in 0..8 * u64::from(phases) {
            let segment = u16::try_from(second / 8).expect("few");
            for recorder in &mut recorders {
                for traffic in 0..classes {
                    for k in 0..10 {
                        let stalled = segment == 3 && k < 5;
                        let response_ns = if stalled { 5000 * MS } else { MS / 5 + k * 400_000 };
                        // Answers of the last segment come while the next one has begun.
                        one(
                            recorder,
                            segment.saturating_sub(u16::from(k % 2 == 0)),
                            traffic,
                            Outcome::Ok,
                            second * S,
                            response_ns,
                        );
                    }
                }
                recorder.tick(ORIGIN + (second + 1) * S, 0, 0, 0);
            }
            held.drain(..).for_each(|batch| collector.give_back(batch));
            while let Some(batch) = collector.next(Duration::ZERO) {
                totals.absorb(&batch);
                held.push(batch);
            }
            let cells: usize = held.iter().map(|batch| batch.cells.len()).sum();
            worker_cells = worker_cells.max(cells + recorders.iter().map(Recorder::cells).sum::<usize>());
        }
        held.drain(..).for_each(|batch| collector.give_back(batch));
        // Not with the number of phases: present and last segment, a batch to fill and one away, for two workers.
        assert!(worker_cells <= 2 * 2 * 2 * usize::from(classes), "{worker_cells} cells");
        let in_front: usize = recorders.iter_mut().map(Recorder::memory_bytes).sum();
        let behind = totals.memory_bytes();
        assert!(in_front + behind < 28 << 20, "{in_front} + {behind} bytes");
        assert!(in_front > 1 << 20 && behind > 1 << 20, "{in_front} + {behind} bytes: not everything was counted");
    }

    impl Totals {
        fn memory_bytes(&self) -> usize {
            let cells = self.cells.iter().flatten().flat_map(|cell| cell.samples.iter().flatten());
            cells.map(Samples::memory_bytes).sum::<usize>() + self.seconds.memory_bytes()
        }
    }
}
