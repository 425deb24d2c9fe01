//! The run second by second: the series that reports draw, and when an event was over for its visitors.
//!
//! In: batches of all workers, those of one second in any order. Out: rows in order of time; percentiles are of the second's
//! merged histogram. Never: grows past `rows_max` rows. At its limit: two rows become one, with the sum of their counts and the
//! larger of their gauges and percentiles, since those of a sum cannot be told any more.

use std::collections::VecDeque;

use super::batch::{Batch, Samples};
use super::percentile::{Quantile, quantile, quantile_ns};
use super::{Kind, Outcome};
use serde::{Deserialize, Serialize};

/// One second of the whole run; after 3,600 of them two become one.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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

/// An hour of seconds.
pub const ROWS: usize = 3600;
/// Rows whose histograms are kept for batches yet to come: workers end their seconds within milliseconds of each other.
const OPEN: usize = 3;

/// One class in one row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SecondOfTraffic {
    /// Arrivals that became due.
    pub scheduled: u64,
    /// Ended in this row, whenever they were due: rightly,
    pub ok: u64,
    /// otherwise,
    pub errors: u64,
    /// and by a fault of the generator's side ([`Outcome::is_ours`]), not counted in `errors`.
    pub ours: u64,
    /// Of the response times and ages of those that ended; none when none did.
    pub p50: Option<Quantile>,
    pub p99: Option<Quantile>,
    pub p99_9: Option<Quantile>,
    /// Exact, of response times.
    pub max_ns: u64,
}

impl SecondOfTraffic {
    /// Share of those that ended, 0 to 1; 0 when none did.
    #[must_use]
    pub fn error_share(&self) -> f64 {
        self.errors as f64 / (self.ok + self.errors).max(1) as f64
    }

    fn add(&mut self, other: &Self) {
        self.scheduled += other.scheduled;
        self.ok += other.ok;
        self.errors += other.errors;
        self.ours += other.ours;
        self.p50 = worse(self.p50, other.p50);
        self.p99 = worse(self.p99, other.p99);
        self.p99_9 = worse(self.p99_9, other.p99_9);
        self.max_ns = self.max_ns.max(other.max_ns);
    }
}

fn worse(one: Option<Quantile>, other: Option<Quantile>) -> Option<Quantile> {
    let both = || one.into_iter().chain(other);
    Some(Quantile {
        value_ns: both().map(|quantile| quantile.value_ns).max()?,
        at_least: both().any(|quantile| quantile.at_least),
        at_most_ns: both().map(|quantile| quantile.at_most_ns).max_by_key(|most| most.unwrap_or(u64::MAX))?,
    })
}

#[derive(Debug)]
pub struct Seconds {
    workers: usize,
    traffic: usize,
    rows_max: usize,
    /// Seconds of a row.
    width: u32,
    rows: Vec<Interval>,
    /// `traffic` of them for each row.
    classes: Vec<SecondOfTraffic>,
    /// The latest rows, oldest first.
    open: VecDeque<Open>,
}

/// A row that may still change.
#[derive(Debug)]
struct Open {
    row: usize,
    known: Vec<Samples<u32>>,
    ages: Vec<Samples<u32>>,
    all: Samples<u32>,
    gen_lag: Samples<u32>,
    /// (in flight, queued, open) of each worker.
    gauges: Vec<[u64; 3]>,
}

impl Seconds {
    pub(super) fn new(workers: usize, traffic: usize, rows_max: usize) -> Self {
        Self { workers, traffic, rows_max, width: 1, rows: Vec::new(), classes: Vec::new(), open: VecDeque::new() }
    }

    pub(super) fn rows(&self) -> &[Interval] {
        &self.rows
    }

    pub(super) fn absorb(&mut self, batch: &Batch) {
        while (batch.second / self.width) as usize >= self.rows_max {
            self.halve();
        }
        let row = (batch.second / self.width) as usize;
        while self.rows.len() <= row {
            let from_s = u32::try_from(self.rows.len()).unwrap_or(u32::MAX) * self.width;
            self.rows.push(Interval { from_s, seconds: self.width, ..Interval::default() });
            self.classes.extend((0..self.traffic).map(|_| SecondOfTraffic::default()));
        }
        let interval = &mut self.rows[row];
        let classes = &mut self.classes[row * self.traffic..(row + 1) * self.traffic];
        interval.sent += batch.sent;
        interval.busy = interval.busy.max(busy_share(batch));
        for cell in &batch.cells {
            let ok = cell.outcomes[Outcome::Ok as usize];
            let ours: u64 =
                Outcome::ALL.iter().filter(|outcome| outcome.is_ours()).map(|&o| cell.outcomes[o as usize]).sum();
            let ended: u64 = cell.outcomes.iter().sum();
            interval.scheduled += cell.scheduled;
            interval.ok += ok;
            interval.errors += ended - ok;
            let class = &mut classes[usize::from(cell.traffic)];
            class.scheduled += cell.scheduled;
            class.ok += ok;
            class.errors += ended - ok - ours;
            class.ours += ours;
        }
        let Some(open) = open_row(&mut self.open, row, self.workers, self.traffic) else { return };
        open.gauges[batch.worker] = [batch.in_flight, batch.queued, batch.open];
        for cell in &batch.cells {
            open.all.merge(cell.of(Kind::Response));
            open.known[usize::from(cell.traffic)].merge(cell.of(Kind::Response));
            open.ages[usize::from(cell.traffic)].merge(cell.of(Kind::Censored));
            open.gen_lag.merge(cell.of(Kind::GenLag));
        }
        [interval.in_flight, interval.queued, interval.open] =
            [0, 1, 2].map(|gauge| open.gauges.iter().map(|of_worker| of_worker[gauge]).sum());
        interval.p50_ns = quantile_ns(&open.all.counts, 0.5).unwrap_or(0).min(open.all.max_ns);
        interval.p99_ns = quantile_ns(&open.all.counts, 0.99).unwrap_or(0).min(open.all.max_ns);
        interval.max_ns = open.all.max_ns;
        interval.gen_lag_p99_ns = quantile_ns(&open.gen_lag.counts, 0.99).unwrap_or(0).min(open.gen_lag.max_ns);
        for (class, (known, ages)) in classes.iter_mut().zip(open.known.iter().zip(&open.ages)) {
            let at = |q| quantile(&known.counts, &ages.counts, q);
            (class.p50, class.p99, class.p99_9) = (at(0.5), at(0.99), at(0.999));
            class.max_ns = known.max_ns;
        }
    }

    /// From `event_end_ns` (since the origin) to the begin of the first row at or after it in which every one of `traffic`
    /// (none named: all) that had something to do is `good`; none when there is no such row. A class that had arrivals but
    /// no ends is not good: nothing is known of it yet.
    pub(super) fn recovery(
        &self,
        traffic: &[usize],
        event_end_ns: u64,
        good: &dyn Fn(&SecondOfTraffic) -> bool,
    ) -> Option<u64> {
        let asked = |class: usize| traffic.is_empty() || traffic.contains(&class);
        let mut rows = self.rows.iter().zip(self.classes.chunks_exact(self.traffic.max(1)));
        rows.find_map(|(row, classes)| {
            let waited_ns = (u64::from(row.from_s) * 1_000_000_000).checked_sub(event_end_ns)?;
            let mut busy = classes
                .iter()
                .enumerate()
                .filter(|&(class, second)| {
                    asked(class) && second.scheduled + second.ok + second.errors + second.ours > 0
                })
                .map(|(_, second)| second)
                .peekable();
            busy.peek()?;
            busy.all(|second| second.ok + second.errors > 0 && good(second)).then_some(waited_ns)
        })
    }

    fn halve(&mut self) {
        self.width *= 2;
        self.halve_open();
        let mut halved: Vec<Interval> = Vec::with_capacity(self.rows_max);
        for (index, row) in self.rows.drain(..).enumerate() {
            match halved.last_mut() {
                Some(first) if index % 2 == 1 => first.add(&row),
                _ => halved.push(Interval { seconds: self.width, ..row }),
            }
        }
        self.rows = halved;
        let traffic = self.traffic;
        for row in 0..self.rows.len() {
            for class in 0..traffic {
                let mut both = self.classes[2 * row * traffic + class];
                if let Some(second) = self.classes.get((2 * row + 1) * traffic + class) {
                    both.add(second);
                }
                self.classes[row * traffic + class] = both;
            }
        }
        self.classes.truncate(self.rows.len() * traffic);
    }

    fn halve_open(&mut self) {
        // Its other half is closed: what comes late for that row can only be counted.
        if self.open.front().is_some_and(|oldest| oldest.row % 2 == 1) {
            self.open.pop_front();
        }
        let mut halved: VecDeque<Open> = VecDeque::new();
        for mut open in self.open.drain(..) {
            open.row /= 2;
            match halved.back_mut().filter(|half| half.row == open.row) {
                Some(half) => half.merge(&open),
                None => halved.push_back(open),
            }
        }
        self.open = halved;
    }
}

/// Of the time that the loop told of, 0 to 1; a batch of less than half a second (a run's last) says nothing.
pub(super) fn busy_share(batch: &Batch) -> f64 {
    let told_ns = batch.busy_ns + batch.idle_ns;
    if told_ns < 500_000_000 { 0.0 } else { batch.busy_ns as f64 / told_ns as f64 }
}

/// The row's histograms; none when it is older than all that are kept.
fn open_row(open: &mut VecDeque<Open>, row: usize, workers: usize, traffic: usize) -> Option<&mut Open> {
    let mut place = open.partition_point(|kept| kept.row < row);
    if open.get(place).is_none_or(|kept| kept.row != row) {
        let mut next = if open.len() < OPEN {
            Open::new(workers, traffic)
        } else {
            // The oldest makes room, unless this one is older.
            place = place.checked_sub(1)?;
            open.pop_front()?
        };
        next.begin(row);
        open.insert(place, next);
    }
    open.get_mut(place)
}

impl Open {
    fn new(workers: usize, traffic: usize) -> Self {
        let samples = || (0..traffic).map(|_| Samples::new()).collect();
        Self {
            row: 0,
            known: samples(),
            ages: samples(),
            all: Samples::new(),
            gen_lag: Samples::new(),
            gauges: vec![[0; 3]; workers],
        }
    }

    fn begin(&mut self, row: usize) {
        self.row = row;
        self.known.iter_mut().chain(&mut self.ages).for_each(Samples::clear);
        self.all.clear();
        self.gen_lag.clear();
        self.gauges.fill([0; 3]);
    }

    fn merge(&mut self, other: &Self) {
        let mine = self.known.iter_mut().chain(&mut self.ages).chain([&mut self.all, &mut self.gen_lag]);
        let theirs = other.known.iter().chain(&other.ages).chain([&other.all, &other.gen_lag]);
        mine.zip(theirs).for_each(|(samples, more)| samples.merge(more));
        for (gauges, more) in self.gauges.iter_mut().zip(&other.gauges) {
            for (gauge, other) in gauges.iter_mut().zip(more) {
                *gauge = (*gauge).max(*other);
            }
        }
    }
}

impl Interval {
    /// The next row.
    fn add(&mut self, other: &Self) {
        self.scheduled += other.scheduled;
        self.sent += other.sent;
        self.ok += other.ok;
        self.errors += other.errors;
        self.in_flight = self.in_flight.max(other.in_flight);
        self.queued = self.queued.max(other.queued);
        self.open = self.open.max(other.open);
        self.p50_ns = self.p50_ns.max(other.p50_ns);
        self.p99_ns = self.p99_ns.max(other.p99_ns);
        self.max_ns = self.max_ns.max(other.max_ns);
        self.gen_lag_p99_ns = self.gen_lag_p99_ns.max(other.gen_lag_p99_ns);
        self.busy = self.busy.max(other.busy);
    }
}

#[cfg(test)]
mod tests {
    use super::{ROWS, SecondOfTraffic, Seconds};
    use crate::measure::batch::{Batch, Cell, Samples};
    use crate::measure::{Kind, Outcome};

    const MS: u64 = 1_000_000;

    fn batch(worker: usize, second: u32, answers: &[(u16, Outcome, u64)]) -> Batch {
        let mut batch = Batch::new(worker, 2);
        batch.second = second;
        for &(traffic, outcome, ns) in answers {
            let mut cell = Cell { traffic, ..Cell::new() };
            cell.scheduled = 1;
            cell.outcomes[outcome as usize] = 1;
            cell.record(if outcome == Outcome::Ok { Kind::Response } else { Kind::Censored }, ns);
            batch.cells.push(cell);
        }
        batch
    }

    #[test]
    fn a_second_is_that_of_all_workers_in_any_order() {
        let ok = |ns| (0, Outcome::Ok, ns);
        let mut seconds = Seconds::new(2, 2, ROWS);
        seconds.absorb(&batch(0, 0, &[ok(MS), ok(MS), ok(MS)]));
        seconds.absorb(&batch(0, 1, &[ok(2 * MS)]));
        seconds.absorb(&batch(1, 1, &[ok(2 * MS)]));
        // This one was late. Each of the workers alone has another middle than both.
        seconds.absorb(&batch(1, 0, &[ok(9 * MS), ok(9 * MS), ok(9 * MS), ok(9 * MS)]));
        let rows = seconds.rows();
        assert_eq!(rows.iter().map(|row| row.ok).collect::<Vec<_>>(), [7, 2]);
        assert!(rows[0].p50_ns.abs_diff(9 * MS) < 10_000, "{:?}", rows[0]);
        assert_eq!(rows[0].max_ns, 9 * MS);
        // Older than all that is kept open: counted all the same.
        for second in 2..10 {
            seconds.absorb(&batch(0, second, &[ok(MS)]));
        }
        seconds.absorb(&batch(1, 0, &[ok(MS)]));
        assert_eq!(seconds.rows()[0].ok, 8);
        assert_eq!(seconds.open.len(), super::OPEN);
    }

    #[test]
    fn a_longer_run_has_longer_rows() {
        let rows_max = 40;
        let mut seconds = Seconds::new(2, 2, rows_max);
        let last = 87;
        for second in 0..last {
            for worker in [0, 1] {
                seconds.absorb(&batch(worker, second, &[(1, Outcome::Ok, u64::from(second) * MS)]));
            }
        }
        let rows = seconds.rows();
        assert!(rows.len() <= rows_max && rows.iter().all(|row| row.seconds == 4), "{} rows", rows.len());
        assert_eq!(rows.iter().map(|row| row.ok).sum::<u64>(), u64::from(last) * 2);
        assert_eq!(seconds.classes.iter().map(|class| class.ok).sum::<u64>(), u64::from(last) * 2);
        assert_eq!(seconds.classes.len(), rows.len() * 2);
        for (index, row) in rows.iter().enumerate() {
            assert_eq!(row.from_s as usize, index * 4);
            let worst = u64::from((row.from_s + 3).min(last - 1)) * MS;
            assert_eq!(row.max_ns, worst, "row {index}");
        }
    }

    #[test]
    fn recovery_is_the_first_good_second_after_the_end() {
        let slow = (0, Outcome::Ok, 900 * MS);
        let fast = (0, Outcome::Ok, MS);
        let other_slow = (1, Outcome::Ok, 900 * MS);
        let other_fast = (1, Outcome::Ok, MS);
        let failed = (0, Outcome::Timeout, MS);
        let good = |second: &SecondOfTraffic| {
            second.error_share() < 0.01 && second.p99.is_some_and(|p99| !p99.at_least && p99.value_ns < 5 * MS)
        };
        let check = |seconds: &[&[(u16, Outcome, u64)]], traffic: &[usize], end_ms: u64, expected_ms: Option<u64>| {
            let mut series = Seconds::new(1, 2, ROWS);
            for (second, answers) in (0..).zip(seconds) {
                series.absorb(&batch(0, second, answers));
            }
            let found = series.recovery(traffic, end_ms * MS, &good);
            assert_eq!(found, expected_ms.map(|ms| ms * MS), "{seconds:?} after {end_ms} ms");
        };
        // Good before the end counts for nothing.
        check(&[&[fast], &[slow], &[slow], &[fast]], &[], 1500, Some(1500));
        check(&[&[fast], &[slow], &[slow], &[fast]], &[], 3000, Some(0));
        check(&[&[fast], &[slow], &[slow]], &[], 1500, None);
        // An age is a bound only, and an error.
        check(&[&[slow], &[failed], &[fast, failed], &[fast]], &[], 1000, Some(2000));
        // All classes that were asked for, unless they had nothing to do.
        check(&[&[slow], &[fast, other_slow], &[fast, other_fast]], &[], 1000, Some(1000));
        check(&[&[slow], &[fast, other_slow], &[fast, other_fast]], &[0], 1000, Some(0));
        check(&[&[slow], &[fast]], &[], 1000, Some(0));
        // A second in which nothing happened says nothing.
        check(&[&[slow], &[], &[fast]], &[], 1000, Some(1000));
        // Asked, and nothing came: still hanging.
        let mut hung = batch(0, 1, &[fast]);
        hung.cells.push(Cell { traffic: 1, scheduled: 4, ..Cell::new() });
        let mut series = Seconds::new(1, 2, ROWS);
        series.absorb(&hung);
        assert_eq!(series.recovery(&[], 0, &good), None);
        assert_eq!(series.recovery(&[0], 0, &good), Some(1000 * MS));
    }

    impl Seconds {
        pub(in crate::measure) fn memory_bytes(&self) -> usize {
            let open =
                self.open.iter().flat_map(|open| open.known.iter().chain(&open.ages).chain([&open.all, &open.gen_lag]));
            open.map(Samples::memory_bytes).sum::<usize>()
                + self.rows.capacity() * size_of::<super::Interval>()
                + self.classes.capacity() * size_of::<SecondOfTraffic>()
        }
    }
}
