//! The writer against a model of the world: a log in which segments are damaged and removed, a store that is away, lies
//! about commits, loses them and refuses rows, writers that stop between any two steps, and two of them at once.
//!
//! The claim: once everything answers again, each visit of the log is stored exactly once or counted in exactly one drop;
//! and the figures of a writer never say more than that, and that at the end.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::FutureExt;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tokio::sync::watch;

use super::state::{self, Action, Event, Moment, State};
use super::{Delivery, Figures, Log, Settings};
use crate::config;
use crate::config::Bots;
use crate::domain::time::{self, UnixMillis};
use crate::domain::visit::Class;
use crate::visits::agents::{Agents, Referrers};
use crate::visits::batch::{self, Batch, Builder, Fates, Row};
use crate::visits::sink::{Failure, Position, Sink, Tidied};
use crate::visits::spool::format::{KIND_CLICK, KIND_HEAD, KIND_ORPHAN, KIND_PREFETCH};
use crate::visits::spool::read::Reader;
use crate::visits::spool::record::{Encoder, Record, RequestId};
use crate::visits::spool::segment::Tally;
use crate::visits::spool::segment::{self, Block, Body, Header};
use crate::visits::spool::{Epoch, Source};
use crate::visits::{Dropped, Drops};

const FIREFOX: &str = "Mozilla/5.0 (X11; Linux x86_64; rv:130.0) Gecko/20100101 Firefox/130.0";
const GOOGLEBOT: &str = "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)";
const WRITTEN_AT: UnixMillis = UnixMillis(1_790_000_000_000);
const CORES: u16 = 2;

/// A record's number, of a source.
type Place = (Source, u64);

// ---- The store ----

#[derive(Clone, Debug)]
pub struct Store(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    /// What is committed, in order: a failover cuts the end off.
    commits: Vec<Commit>,
    positions: BTreeMap<Source, Position>,
    agents: BTreeMap<i64, String>,
    refuses: BTreeSet<Place>,
    faults: VecDeque<Fault>,
}

#[derive(Debug)]
struct Commit {
    ranges: Vec<batch::Range>,
    rows: Vec<Row>,
    agents: Vec<(i64, String)>,
}

/// How the store answers once.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Away,
    Broken,
    /// Nothing is committed, and nobody knows.
    UnknownLost,
    /// It is committed, and nobody knows.
    UnknownStored,
    /// The last commits are gone, and so is the connection.
    Failover(usize),
    /// The last commits are gone, and a pooler hides it.
    QuietFailover(usize),
}

impl Store {
    fn new() -> Self {
        Self(Arc::default())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    pub fn positions(&self, epochs: &[Epoch]) -> Result<Vec<Position>, Failure> {
        let mut inner = self.lock();
        match inner.faults.pop_front() {
            None | Some(Fault::Broken) => {}
            Some(Fault::QuietFailover(commits)) => inner.fail_over(commits),
            Some(Fault::Failover(commits)) => {
                inner.fail_over(commits);
                return Err(Failure::Away("the primary is another one".into()));
            }
            Some(_) => return Err(Failure::Away("no answer".into())),
        }
        Ok(inner.positions.values().filter(|position| epochs.contains(&position.source.epoch)).copied().collect())
    }

    pub fn store(&self, batch: &Batch) -> Result<(), Failure> {
        let mut inner = self.lock();
        let fault = inner.faults.pop_front();
        match fault {
            Some(Fault::Away) => return Err(Failure::Away("no answer".into())),
            Some(Fault::Broken) => return Err(Failure::Broken("a trigger is wrong".into())),
            Some(Fault::UnknownLost) => return Err(Failure::Unknown("no answer".into())),
            Some(Fault::Failover(commits)) => {
                inner.fail_over(commits);
                return Err(Failure::Away("the primary is another one".into()));
            }
            Some(Fault::QuietFailover(commits)) => inner.fail_over(commits),
            Some(Fault::UnknownStored) | None => {}
        }
        inner.commit(batch)?;
        if fault.is_some_and(|fault| matches!(fault, Fault::UnknownStored)) {
            return Err(Failure::Unknown("the answer to COMMIT was lost".into()));
        }
        Ok(())
    }

    pub fn housekeep(&self, _now: UnixMillis) -> Result<Tidied, Failure> {
        Ok(Tidied::All)
    }
}

impl Inner {
    fn commit(&mut self, batch: &Batch) -> Result<(), Failure> {
        assert!(!batch.ranges.is_empty(), "an empty batch");
        let stands =
            |range: &batch::Range| self.positions.get(&range.source).map_or(0, |position| position.next) == range.from;
        if !batch.ranges.iter().all(stands) {
            return Err(Failure::Moved);
        }
        let rows: Vec<Row> = batch.rows.iter().chain(batch.orphans.iter().map(|orphan| &orphan.row)).copied().collect();
        if rows.iter().any(|row| self.refuses.contains(&place(row))) {
            return Err(Failure::Refused("value out of range".into()));
        }
        for row in &rows {
            let (source, number) = place(row);
            let range = batch.ranges.iter().find(|range| range.source == source).expect("its source moves");
            assert!((range.from..range.to).contains(&number), "{number} of {range:?}");
        }
        let rolled_up: u64 = batch.rollups.iter().flat_map(|rollup| rollup.counts).sum();
        assert_eq!(rolled_up, batch.rows.len() as u64, "rollups count the rows");
        assert_eq!(batch.ranges.iter().map(|range| range.stored).sum::<u64>(), batch.rows.len() as u64);
        let agents = batch.agents.iter().map(|agent| (agent.id, agent.text.clone())).collect();
        let commit = Commit { ranges: batch.ranges.clone(), rows, agents };
        self.apply(&commit);
        self.commits.push(commit);
        Ok(())
    }

    fn apply(&mut self, commit: &Commit) {
        for range in &commit.ranges {
            let new = Position { source: range.source, next: 0, stored: 0, drops: Drops::default() };
            let position = self.positions.entry(range.source).or_insert(new);
            position.next = range.to;
            position.stored += range.stored;
            for (sum, visits) in position.drops.iter_mut().zip(range.drops) {
                *sum += visits;
            }
        }
        self.agents.extend(commit.agents.iter().cloned());
    }

    /// What it has of some starts.
    fn fates(&self, of: impl Fn(u64) -> bool) -> Fates {
        let positions = self.positions.values().filter(|position| of(position.source.epoch.0));
        let fates = positions.map(|position| Fates { stored: position.stored, drops: position.drops });
        fates.fold(Fates::default(), |sum, fates| sum.zip(&fates, |a, b| a + b))
    }

    fn fail_over(&mut self, lost: usize) {
        let kept = self.commits.len().saturating_sub(lost);
        let commits: Vec<Commit> = std::mem::take(&mut self.commits).into_iter().take(kept).collect();
        self.positions.clear();
        self.agents.clear();
        commits.iter().for_each(|commit| self.apply(commit));
        self.commits = commits;
    }
}

fn place(row: &Row) -> Place {
    (Source { epoch: Epoch(row.epoch), core: row.core }, row.number)
}

// ---- The log ----

/// What a record is, by chance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Browser,
    NoAgent,
    Bot,
    Head,
    Prefetch,
    Orphan,
    /// Those that the store refuses.
    RefusedClick,
    RefusedOrphan,
}

#[derive(Debug)]
struct Disk {
    dir: PathBuf,
    epoch: u64,
    segment: u64,
    /// Records and visits of each source so far.
    sources: BTreeMap<Source, (u64, u64)>,
    /// Strings that the segment has.
    strings: BTreeSet<(u16, u32)>,
    /// Every record that was ever written.
    written: BTreeMap<Place, What>,
    /// Blocks of records that are whole: segment, offset, records.
    blocks: Vec<(u64, u64, Vec<Place>)>,
    lost: BTreeSet<Place>,
    damaged: BTreeSet<u64>,
    refused: BTreeSet<Place>,
}

impl Disk {
    fn new(dir: PathBuf) -> Self {
        let mut disk = Self {
            dir,
            epoch: 100,
            segment: 0,
            sources: BTreeMap::new(),
            strings: BTreeSet::new(),
            written: BTreeMap::new(),
            blocks: Vec::new(),
            lost: BTreeSet::new(),
            damaged: BTreeSet::new(),
            refused: BTreeSet::new(),
        };
        disk.next_segment();
        disk
    }

    fn path(&self, segment: u64) -> PathBuf {
        self.dir.join(segment::name(segment))
    }

    /// Appends to the segment; says at which offset.
    fn write(&self, bytes: &[u8]) -> u64 {
        let mut file = OpenOptions::new().append(true).create(true).open(self.path(self.segment)).unwrap();
        let offset = file.metadata().unwrap().len();
        file.write_all(bytes).unwrap();
        offset
    }

    fn next_segment(&mut self) {
        self.segment += 1;
        self.strings.clear();
        let header = Header { epoch: Epoch(self.epoch), number: self.segment, made_at: WRITTEN_AT, repeats: 0 };
        self.write(&header.encode());
        self.write_tallies();
    }

    fn write_tallies(&mut self) {
        let mut bytes = Vec::new();
        for core in 0..CORES {
            let source = Source { epoch: Epoch(self.epoch), core };
            let (appended, visits) = *self.sources.entry(source).or_default();
            let tally = Tally { source, appended, visits, ring_full: 0, spool_error: 0, orphans: 0 };
            Block::tally(&tally, WRITTEN_AT).encode(source.epoch, self.segment, &mut bytes);
        }
        self.write(&bytes);
    }

    /// Another start of the instance, which the one before has ended well.
    fn next_epoch(&mut self) {
        self.write_tallies();
        self.epoch += 1;
        self.next_segment();
    }

    /// The same id means another text in the next segment.
    fn text(segment: u64, id: u32) -> &'static str {
        if (segment + u64::from(id)).is_multiple_of(2) { FIREFOX } else { GOOGLEBOT }
    }

    fn append(&mut self, core: u16, records: &[What]) {
        let source = Source { epoch: Epoch(self.epoch), core };
        let (first, before) = self.sources[&source];
        let mut encoder = Encoder::new(source);
        let (mut bytes, mut strings, mut places, mut visits) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for (number, what) in (first..).zip(records) {
            let (kind, text) = match what {
                What::Browser | What::RefusedClick => (KIND_CLICK, Some(FIREFOX)),
                What::NoAgent => (KIND_CLICK, None),
                What::Bot => (KIND_CLICK, Some(GOOGLEBOT)),
                What::Head => (KIND_HEAD, Some(FIREFOX)),
                What::Prefetch => (KIND_PREFETCH, None),
                What::Orphan | What::RefusedOrphan => (KIND_ORPHAN, Some(FIREFOX)),
            };
            let agent = text.map_or(0, |text| if Self::text(self.segment, 1) == text { 1 } else { 2 });
            if agent != 0 && self.strings.insert((core, agent)) {
                segment::put_string(agent, Self::text(self.segment, agent).as_bytes(), &mut strings);
            }
            let record = Record {
                kind,
                link: 1 + number % 3,
                at: UnixMillis(WRITTEN_AT.0 + i64::try_from(number).unwrap() * 20_000_000 % 80_000_000 - 40_000_000),
                visitor: number,
                agent,
                referrer: 0,
                address: None,
                request_id: RequestId::Packed(u128::from(number)),
                code: if kind == KIND_ORPHAN { b"nope" } else { b"" },
                not_tracked: false,
                no_agent_room: false,
            };
            bytes.extend_from_slice(encoder.encode(&record, number));
            visits += u32::from(kind != KIND_ORPHAN);
            self.written.insert((source, number), *what);
            if matches!(what, What::RefusedClick | What::RefusedOrphan) {
                self.refused.insert((source, number));
            }
            places.push((source, number));
        }
        let count = u32::try_from(records.len()).unwrap();
        let body = Body::Records { count, visits, strings: &strings, records: &bytes };
        let mut block = Vec::new();
        Block { core, number: first, before, written_at: WRITTEN_AT, body }.encode(
            source.epoch,
            self.segment,
            &mut block,
        );
        let offset = self.write(&block);
        self.blocks.push((self.segment, offset, places));
        self.sources.insert(source, (first + u64::from(count), before + u64::from(visits)));
    }

    /// One bit of a block is another one from now on.
    fn damage(&mut self, which: usize) {
        if self.blocks.is_empty() {
            return;
        }
        let (segment, offset, places) = self.blocks.remove(which % self.blocks.len());
        let path = self.path(segment);
        let mut bytes = fs::read(&path).unwrap();
        bytes[usize::try_from(offset).unwrap() + 16 + which % 32] ^= 1 << (which % 8);
        fs::write(&path, bytes).unwrap();
        self.lost.extend(places);
        self.damaged.insert(segment);
    }

    /// The oldest segment goes if everything before `stored` may, but for the last one of each start.
    fn retain(&mut self, stored: u64) {
        let oldest = (1..=self.segment).find(|segment| self.path(*segment).exists()).unwrap();
        let header = |segment: u64| Header::decode(&fs::read(self.path(segment)).ok()?);
        let is_last = header(oldest).unwrap().epoch != header(oldest + 1).map_or(Epoch(0), |header| header.epoch);
        if oldest < stored && !is_last {
            fs::remove_file(self.path(oldest)).unwrap();
            for (_, _, places) in self.blocks.extract_if(.., |(segment, ..)| *segment == oldest) {
                self.lost.extend(places);
            }
        }
    }
}

// ---- The writers ----

struct Running {
    delivery: Delivery,
    state: State,
    action: Action,
    now: std::time::Instant,
    rows_max: usize,
}

impl Running {
    fn new(disk: &Disk, store: &Store, texts: (Agents, Referrers), setup: &Setup) -> Self {
        let breaker = config::Breaker { failures: u32::MAX, recovery: Duration::from_secs(1) };
        let settings =
            Settings { dead_letters: disk.dir.join("dead-letters.ndjson"), breaker, own: Some(Epoch(disk.epoch)) };
        let log = Log { dir: disk.dir.clone(), reader: Reader::open(&disk.dir).unwrap(), spool: None };
        let builder = Builder::new(batch::Settings { raw: true, bots: setup.bots }, texts.0, texts.1);
        let figures = Arc::new(Figures::default());
        let mut delivery = Delivery::new(settings, log, builder, Sink::Model(store.clone()), figures);
        let (_orders, ordered) = watch::channel(None);
        delivery.look_ahead(&ordered).unwrap();
        let (state, action) = State::START;
        Self { delivery, state, action, now: time::monotonic(), rows_max: setup.rows_max }
    }

    fn step(&mut self) {
        let event = match self.action {
            Action::Finish => panic!("nobody told it to end"),
            Action::Sleep { until } => {
                self.now = self.now.max(until);
                Event::Woken
            }
            Action::Listen => Event::Woken,
            Action::Read { rows_max } => self.perform(Action::Read { rows_max: rows_max.min(self.rows_max) }),
            action => self.perform(action),
        };
        let at = Moment { now: self.now, chance: 0.5, end_by: None, failures_max: u32::MAX };
        (self.state, self.action) = state::next(self.state, event, &at);
    }

    /// Until it has nothing to do.
    fn drain(&mut self) {
        let mut steps_left = 10_000;
        loop {
            self.step();
            steps_left -= 1;
            assert!(steps_left > 0, "it does not end: {:?}", self.state);
            if self.action == Action::Listen {
                break;
            }
        }
    }

    /// Of the visits of its start, so many are neither stored nor given up by its figures.
    fn pending(&self, disk: &Disk) -> u64 {
        let own = self.delivery.settings.own.unwrap();
        let answered = disk.sources.iter().filter(|(source, _)| source.epoch == own).map(|(_, (_, visits))| visits);
        let settled = self.delivery.figures.report().own.sum();
        answered.sum::<u64>().checked_sub(settled).expect("no more is stored and given up than was answered")
    }

    fn perform(&mut self, action: Action) -> Event {
        self.delivery.perform(action).now_or_never().expect("the model answers at once")
    }
}

#[derive(Clone, Debug)]
struct Setup {
    bots: Bots,
    rows_max: usize,
}

/// One step of anybody, in any order.
#[derive(Clone, Debug)]
enum Step {
    Append {
        core: u16,
        records: Vec<What>,
    },
    NextSegment,
    NextEpoch,
    Run {
        writer: usize,
        steps: usize,
    },
    /// It stops where it is, and another one begins.
    Stop {
        writer: usize,
    },
    Fault(Fault),
    Damage(usize),
    Retain,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let what = prop_oneof![
        8 => Just(What::Browser),
        3 => Just(What::NoAgent),
        3 => Just(What::Bot),
        1 => Just(What::Head),
        1 => Just(What::Prefetch),
        3 => Just(What::Orphan),
        1 => Just(What::RefusedClick),
        1 => Just(What::RefusedOrphan),
    ];
    let fault = prop_oneof![
        Just(Fault::Away),
        Just(Fault::Broken),
        Just(Fault::UnknownLost),
        Just(Fault::UnknownStored),
        (0..4usize).prop_map(Fault::Failover),
        (0..4usize).prop_map(Fault::QuietFailover),
    ];
    let records = prop::collection::vec(what, 1..12);
    let step = prop_oneof![
        12 => (0..CORES, records).prop_map(|(core, records)| Step::Append { core, records }),
        3 => Just(Step::NextSegment),
        1 => Just(Step::NextEpoch),
        14 => (prop_oneof![5 => Just(0usize), 1 => Just(1)], 1..12usize).prop_map(|(writer, steps)| Step::Run { writer, steps }),
        1 => (0..2usize).prop_map(|writer| Step::Stop { writer }),
        8 => fault.prop_map(Step::Fault),
        1 => any::<usize>().prop_map(Step::Damage),
        2 => Just(Step::Retain),
    ];
    prop::collection::vec(step, 1..60)
}

fn setups() -> impl Strategy<Value = Setup> {
    let bots = prop_oneof![Just(Bots::Separate), Just(Bots::Count), Just(Bots::Drop)];
    let rows_max = prop_oneof![1..12usize, Just(1_000)];
    (bots, rows_max).prop_map(|(bots, rows_max)| Setup { bots, rows_max })
}

#[test]
fn every_visit_is_stored_once_or_counted_in_one_drop() {
    // Patterns of agents take long to compile: all histories share them. `PROPTEST_CASES` asks for more of them.
    let texts = RefCell::new(Vec::new());
    let cases = std::env::var("PROPTEST_CASES").map_or(300, |cases| cases.parse().unwrap());
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    runner
        .run(&(setups(), steps()), |(setup, steps)| {
            check(&setup, &steps, &texts);
            Ok(())
        })
        .unwrap();
}

fn check(setup: &Setup, steps: &[Step], texts: &RefCell<Vec<(Agents, Referrers)>>) {
    let folder = tempfile::tempdir().unwrap();
    let mut disk = Disk::new(folder.path().to_path_buf());
    let store = Store::new();
    let begin = |disk: &Disk| {
        let texts = texts.borrow_mut().pop();
        let texts = texts.unwrap_or_else(|| (Agents::new(Default::default(), 1_000), Referrers::new(1_000)));
        Running::new(disk, &store, texts, setup)
    };
    let end = |running: Running| texts.borrow_mut().push(running.delivery.builder.into_texts());
    let mut writers = [begin(&disk), begin(&disk)];
    for step in steps {
        match step {
            Step::Append { core, records } => {
                disk.append(*core, records);
                store.lock().refuses = disk.refused.clone();
            }
            Step::NextSegment => disk.next_segment(),
            Step::NextEpoch => disk.next_epoch(),
            Step::Run { writer, steps } => (0..*steps).for_each(|_| writers[*writer].step()),
            Step::Stop { writer } => end(std::mem::replace(&mut writers[*writer], begin(&disk))),
            Step::Fault(fault) => store.lock().faults.push_back(*fault),
            Step::Damage(which) => disk.damage(*which),
            Step::Retain => disk.retain(writers[0].delivery.resume),
        }
        for writer in &writers {
            writer.pending(&disk);
        }
    }

    // Everything answers again. What a store lost behind a pooler is noticed by a start at the latest.
    store.lock().faults.clear();
    disk.write_tallies();
    end(std::mem::replace(&mut writers[0], begin(&disk)));
    let found = store.lock().fates(|epoch| epoch != disk.epoch);
    for writer in &mut writers {
        writer.drain();
        let report = writer.delivery.figures.report();
        assert_eq!((writer.pending(&disk), report.earlier_pending, report.away), (0, 0, None));
    }
    let report = writers[0].delivery.figures.report();
    assert_eq!(report.own, store.lock().fates(|epoch| epoch == disk.epoch));
    let earlier = store.lock().fates(|epoch| epoch != disk.epoch);
    assert_eq!(report.earlier, earlier.zip(&found, |now, then| now - then));
    assert_eq!(report.ever, report.own.zip(&report.earlier, |own, earlier| own + earlier));
    judge(setup, &disk, &store);
    writers.into_iter().for_each(end);
}

#[test]
fn what_waits_of_earlier_starts_is_what_the_log_has() {
    let folder = tempfile::tempdir().unwrap();
    let mut disk = Disk::new(folder.path().to_path_buf());
    disk.append(0, &[What::NoAgent; 5]);
    disk.next_segment();
    disk.append(0, &[What::NoAgent; 3]);
    disk.append(1, &[What::NoAgent, What::Orphan]);
    disk.retain(2);
    disk.next_epoch();
    disk.append(0, &[What::NoAgent; 7]);
    let (store, setup) = (Store::new(), Setup { bots: Bots::Count, rows_max: 1_000 });
    let mut writer = Running::new(&disk, &store, (Agents::new(Default::default(), 10), Referrers::new(10)), &setup);
    // The store was not asked yet: what the log has no more is taken for stored.
    assert_eq!(writer.delivery.figures.report().earlier_pending, 4);
    writer.drain();
    let report = writer.delivery.figures.report();
    let mut earlier = Fates { stored: 4, ..Fates::default() };
    earlier.drops[Dropped::FailoverGap as usize] = 5;
    assert_eq!((report.own.stored, report.earlier, report.earlier_pending), (7, earlier, 0));
}

fn judge(setup: &Setup, disk: &Disk, store: &Store) {
    let inner = store.lock();
    let mut stored = BTreeMap::new();
    for row in inner.commits.iter().flat_map(|commit| &commit.rows) {
        assert!(stored.insert(place(row), row).is_none(), "stored twice: {:?}", place(row));
    }
    let letters = dead_letters(disk);
    let (mut sum, mut missing) = (Drops::default(), 0);
    let (mut corrupt, mut refused, mut bots) = ([0, 0], [0, 0], [0, 0]);
    for (source, (appended, visits)) in &disk.sources {
        let position = inner.positions.get(source);
        let next = position.map_or(0, |position| position.next);
        assert_eq!(next, *appended, "{source:?}");
        let Some(position) = position else { continue };
        let given_up: u64 = position.drops.iter().sum();
        assert_eq!(position.stored + given_up, *visits, "{source:?}: {position:?}");
        for (sum, visits) in sum.iter_mut().zip(position.drops) {
            *sum += visits;
        }
    }
    for (place, what) in &disk.written {
        let is_orphan = matches!(what, What::Orphan | What::RefusedOrphan);
        let is_refused = matches!(what, What::RefusedClick | What::RefusedOrphan);
        let is_dropped_bot = setup.bots == Bots::Drop && *what == What::Bot;
        let is_lost = disk.lost.contains(place);
        match stored.remove(place) {
            Some(row) => {
                assert!(!is_refused);
                assert!(row.agent == 0 || inner.agents.contains_key(&row.agent), "nobody knows its agent: {place:?}");
                // Where something of its segment was damaged, its agent's text may be lost.
                if disk.damaged.is_empty() {
                    assert_eq!(row.class, class(*what, setup.bots), "{place:?}");
                    let text = inner.agents.get(&row.agent).map(String::as_str);
                    assert_eq!(text, agent(*what), "{place:?}");
                }
            }
            None => {
                assert!(is_lost || is_refused || is_dropped_bot, "gone: {place:?} {what:?}");
                assert!(is_lost || !is_refused || letters.contains(place), "no letter: {place:?}");
                if !is_orphan {
                    missing += 1;
                    for (bounds, applies, alone) in [
                        (&mut corrupt, is_lost, !is_refused && !is_dropped_bot),
                        (&mut refused, is_refused, !is_lost),
                        (&mut bots, is_dropped_bot, !is_lost),
                    ] {
                        bounds[0] += u64::from(applies && alone);
                        bounds[1] += u64::from(applies);
                    }
                }
            }
        }
    }
    assert!(stored.is_empty(), "never written: {stored:?}");
    assert_eq!(sum.iter().sum::<u64>(), missing, "{sum:?}");
    let lost = sum[Dropped::Corrupt as usize] + sum[Dropped::FailoverGap as usize];
    for (name, count, [least, most]) in [
        ("lost", lost, corrupt),
        ("refused", sum[Dropped::Refused as usize], refused),
        ("bot", sum[Dropped::Bot as usize], bots),
    ] {
        assert!((least..=most).contains(&count), "{name}: {count} of {least} to {most}");
    }
}

fn class(what: What, bots: Bots) -> Class {
    match what {
        What::Browser | What::RefusedClick => Class::Click,
        What::NoAgent => Class::Tool,
        What::Bot if bots == Bots::Count => Class::Click,
        What::Bot => Class::Bot,
        What::Head => Class::Head,
        What::Prefetch => Class::Prefetch,
        What::Orphan | What::RefusedOrphan => Class::Orphan,
    }
}

fn agent(what: What) -> Option<&'static str> {
    match what {
        What::NoAgent | What::Prefetch => None,
        What::Bot => Some(GOOGLEBOT),
        _ => Some(FIREFOX),
    }
}

fn dead_letters(disk: &Disk) -> BTreeSet<Place> {
    let text = fs::read_to_string(disk.dir.join("dead-letters.ndjson")).unwrap_or_default();
    text.lines()
        .map(|line| {
            let letter: serde_json::Value = serde_json::from_str(line).unwrap();
            let epoch = u64::from_str_radix(letter["epoch"].as_str().unwrap(), 16).unwrap();
            let core = u16::try_from(letter["core"].as_u64().unwrap()).unwrap();
            (Source { epoch: Epoch(epoch), core }, letter["number"].as_u64().unwrap())
        })
        .collect()
}
