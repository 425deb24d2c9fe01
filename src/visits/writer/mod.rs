//! The writer: from the log to the sink, exactly once.
//!
//! In: the log, from its oldest segment on; the positions of the store. Out: batches in the store, in the order of the log;
//! figures that add up. It runs on a thread of its own: the store may be away for hours, and redirects are answered.
//! Never: tells the store a record that its position is past; leaves one out without counting it; believes that a batch is
//! stored, or is not, unless the store says so; keeps a batch that failed (the log has it).
//! At its limit: a store that does not answer is asked again and again, and the log grows up to its own limit.
//!
//! Every outcome that is not plain ends in the same way: ask the store where it stands, go to the place in the log where that
//! is, and go on. So does one that is idle when the store is another one than before. [`state`] decides, [`Course`] does,
//! [`Writer`] is the thread.

#[cfg(test)]
pub(super) mod model;
pub mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use self::state::{Action, Event, Moment, Phase, State};
use super::Drops;
use super::batch::{Batch, Builder, Fates, Took};
use super::dead;
use super::sink::{Failure, Sink, Tidied};
use super::spool::format::SEGMENT_HEADER_BYTES;
use super::spool::read::{Item, Reader};
use super::spool::recovery::recover_rings;
use super::spool::segment::{self, Tally};
use super::spool::{self, Epoch, Place, Source, Spool};
use crate::breaker::Breaker;
use crate::config;
use crate::domain::time::{self, UnixMillis};
use crate::metrics::Counter;
use crate::store::row;

/// How often the store is tidied up, and how soon again where that did not work.
const HOUSEKEEPING: Duration = Duration::from_secs(600);
const HOUSEKEEPING_AGAIN: Duration = Duration::from_secs(60);
/// A replay gives up after so many failures in a row: about half a minute.
const REPLAY_FAILURES_MAX: u32 = 20;
/// A replay has as long as it takes.
const EVER: Duration = Duration::from_secs(10 * 365 * 86_400);

/// What the writer is told beside log and sink.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `DATA/dead-letters.ndjson`.
    pub dead_letters: PathBuf,
    pub breaker: config::Breaker,
    /// This start, whose rings know what is pending of it.
    pub own: Option<Epoch>,
}

/// The writer's thread.
#[derive(Debug)]
pub struct Writer {
    thread: JoinHandle<()>,
    orders: watch::Sender<Option<Instant>>,
    figures: Arc<Figures>,
}

impl Writer {
    /// Begins with the oldest segment in `dir`, which is the spool's folder, as soon as the store answers. `seen` is what is
    /// known of the store.
    pub fn start(
        settings: Settings,
        dir: &Path,
        spool: Arc<Spool>,
        builder: Builder,
        sink: Sink,
        seen: watch::Receiver<Option<row::Position>>,
    ) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let figures = Arc::new(Figures::default());
        let log = Log { dir: dir.to_path_buf(), reader: spool.reader(), spool: Some(spool) };
        let delivery = Delivery::new(settings, log, builder, sink, Arc::clone(&figures));
        let (orders, ordered) = watch::channel(None);
        let thread = std::thread::Builder::new().name("waypost-writer".into()).spawn(move || {
            runtime.block_on(run(delivery, ordered, Generation::of(seen), u32::MAX));
        })?;
        Ok(Self { thread, orders, figures })
    }

    #[must_use]
    pub fn figures(&self) -> &Arc<Figures> {
        &self.figures
    }

    /// Stores what the log still has, until `by` at the latest, and ends. The log should be sealed before. Blocks.
    pub fn stop(self, by: Instant) {
        self.orders.send_replace(Some(by));
        if self.thread.join().is_err() {
            tracing::error!("the writer of visits has panicked; the log has what is not stored");
        }
    }
}

/// What became of a folder's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replayed {
    /// Visits of links that were stored, and those that were given up, since this replay began.
    pub stored: u64,
    pub drops: Drops,
    /// Why it ended before the log did; none = everything is in the store.
    pub failed: Option<String>,
}

/// Stores what the spool in `dir` has, of a process that is gone, exactly once: rings that lie beside it are recovered first,
/// and what the store has already is skipped. A spool that is in use is an error, and whoever opens it meanwhile is told so.
pub async fn replay(dir: &Path, settings: Settings, builder: Builder, sink: Sink) -> Result<Replayed, spool::Error> {
    let _lock = recover_rings(dir, time::now())?;
    let reader =
        Reader::open(dir).map_err(|error| spool::Error::Io { what: "cannot read", path: dir.into(), error })?;
    let figures = Arc::new(Figures::default());
    let log = Log { dir: dir.to_path_buf(), reader, spool: None };
    let delivery = Delivery::new(settings, log, builder, sink, Arc::clone(&figures));
    let (_orders, ordered) = watch::channel(Some(time::monotonic() + EVER));
    // Nobody follows the store here, nor does a replay rest.
    let (_seen, seen) = watch::channel(None);
    let failures = run(delivery, ordered, Generation::of(seen), REPLAY_FAILURES_MAX).await;
    let Report { earlier: Fates { stored, drops }, away, .. } = figures.report();
    let raced = (failures >= REPLAY_FAILURES_MAX).then(|| "another process stores the same visits".to_owned());
    Ok(Replayed { stored, drops, failed: away.map(|away| away.why).or(raced) })
}

/// Says how many failures in a row there were at the end.
async fn run(
    mut delivery: Delivery,
    mut orders: watch::Receiver<Option<Instant>>,
    mut generation: Generation,
    failures_max: u32,
) -> u32 {
    let (mut state, mut action) = State::START;
    if let Err(error) = delivery.look_ahead(&orders) {
        tracing::warn!(%error, "what waits of earlier starts is not known until the log is read");
    }
    let mut tidy_at = time::monotonic();
    loop {
        let end_by = *orders.borrow_and_update();
        let resting = matches!(action, Action::Sleep { .. } | Action::Listen);
        if resting && state.phase == Phase::Direct && end_by.is_none() && time::monotonic() >= tidy_at {
            let tidied = tokio::select! {
                tidied = delivery.sink.housekeep(time::now()) => tidied,
                () = over(&mut orders) => return state.failures,
            };
            if let Err(error) = &tidied {
                tracing::warn!(%error, "the store of visits was not tidied up");
            }
            tidy_at = time::monotonic()
                + match tidied {
                    Ok(Tidied::All) => HOUSEKEEPING,
                    // At the next rest: what is to be stored goes first.
                    Ok(Tidied::Part) => Duration::ZERO,
                    Err(_) => HOUSEKEEPING_AGAIN,
                };
        }
        let event = match action {
            Action::Finish => return state.failures,
            Action::Sleep { until } => {
                sleep(until.min(end_by.unwrap_or(until)), end_by.is_none(), &mut orders).await;
                Event::Woken
            }
            Action::Listen => tokio::select! {
                () = delivery.log.news() => Event::Woken,
                () = sleep(tidy_at, true, &mut orders) => Event::Woken,
                // No batch would find out while nobody visits, and what is kept to fill the hole is not kept for ever.
                () = generation.changes() => Event::Moved,
            },
            Action::Ask | Action::Read { .. } | Action::Send | Action::SetAside => tokio::select! {
                event = delivery.perform(action) => event,
                // What became of it is in the store's positions.
                () = over(&mut orders) => return state.failures,
            },
        };
        let at = Moment {
            now: time::monotonic(),
            chance: rand::random(),
            end_by: *orders.borrow_and_update(),
            failures_max,
        };
        (state, action) = state::next(state, event, &at);
    }
}

/// Until a moment, or until the order to end comes.
async fn sleep(until: Instant, or_ordered: bool, orders: &mut watch::Receiver<Option<Instant>>) {
    let ordered = async {
        if !or_ordered || orders.wait_for(Option::is_some).await.is_err() {
            std::future::pending().await
        }
    };
    tokio::select! {
        () = tokio::time::sleep_until(until.into()) => {}
        () = ordered => {}
    }
}

/// Until the moment at which everything has to end.
async fn over(orders: &mut watch::Receiver<Option<Instant>>) {
    let by = orders.wait_for(Option::is_some).await.ok().and_then(|by| *by);
    match by {
        Some(by) => tokio::time::sleep_until(by.into()).await,
        None => std::future::pending().await,
    }
}

/// Which store it is: another one once it was put back, or a standby has taken over.
#[derive(Debug)]
struct Generation {
    seen: watch::Receiver<Option<row::Position>>,
    known: Option<u64>,
}

impl Generation {
    fn of(seen: watch::Receiver<Option<row::Position>>) -> Self {
        let known = seen.borrow().map(|position| position.generation);
        Self { seen, known }
    }

    async fn changes(&mut self) {
        let known = self.known;
        let is_new = |seen: &Option<row::Position>| seen.is_some_and(|position| Some(position.generation) != known);
        match self.seen.wait_for(is_new).await {
            Ok(seen) => self.known = seen.map(|position| position.generation),
            Err(_) => std::future::pending().await,
        }
    }
}

/// A log to read.
#[derive(Debug)]
struct Log {
    dir: PathBuf,
    reader: Reader,
    /// Of this process; none = what another one has left.
    spool: Option<Arc<Spool>>,
}

impl Log {
    async fn news(&self) {
        match &self.spool {
            Some(spool) => spool.wait().await,
            None => std::future::pending().await,
        }
    }

    fn seek(&mut self, segment: u64) {
        self.reader.seek(segment);
    }

    /// Everything before `place` is in the store: its segments may go, after a while.
    fn stored(&self, place: Place) {
        if let Some(spool) = &self.spool {
            spool.stored(place);
        }
    }

    /// The starts that it has anything of.
    fn epochs(&self) -> io::Result<BTreeSet<Epoch>> {
        let mut epochs = BTreeSet::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if entry.file_name().to_str().and_then(segment::number).is_none() {
                continue;
            }
            let mut header = [0; SEGMENT_HEADER_BYTES];
            // It may have been stored and removed by now, or be damaged: the reader finds out.
            let read = fs::File::open(entry.path()).and_then(|mut file| file.read_exact(&mut header));
            if let (Ok(()), Some(header)) = (read, segment::Header::decode(&header)) {
                epochs.insert(header.epoch);
            }
        }
        Ok(epochs)
    }
}

/// The tallies of a segment: those that it begins with, or the last ones.
fn tallies(dir: &Path, segment: u64, first: bool) -> io::Result<BTreeMap<Source, Tally>> {
    let mut reader = Reader::open(dir)?;
    reader.seek(segment);
    let mut tallies = BTreeMap::new();
    while let Some(item) = reader.next()? {
        let is_tally = matches!(item, Item::Tally(_));
        if let Item::Tally(tally) = item {
            tallies.insert(tally.source, tally);
        }
        if reader.place().segment != segment || (first && !is_tally) {
            break;
        }
    }
    Ok(tallies)
}

/// What does as [`state`] decides.
#[derive(Debug)]
struct Delivery {
    settings: Settings,
    log: Log,
    builder: Builder,
    sink: Sink,
    breaker: Breaker,
    figures: Arc<Figures>,
    /// The segment with the first thing that is not stored.
    resume: u64,
    /// The block that the batch has only a part of.
    cut: Option<Place>,
    /// The batch of one row that was refused, and why.
    refused: Option<(Batch, String)>,
}

impl Delivery {
    fn new(settings: Settings, log: Log, builder: Builder, sink: Sink, figures: Arc<Figures>) -> Self {
        let breaker = Breaker::new("store of visits", settings.breaker);
        Self { settings, log, builder, sink, breaker, figures, resume: 0, cut: None, refused: None }
    }

    async fn perform(&mut self, action: Action) -> Event {
        let event = match action {
            Action::Ask => self.ask().await,
            Action::Read { rows_max } => self.read(rows_max),
            Action::Send => self.send().await,
            Action::SetAside => self.set_aside(),
            Action::Sleep { .. } | Action::Listen | Action::Finish => Event::Woken,
        };
        let oldest = self.builder.oldest().map_or(0, |at| at.0.unsigned_abs());
        match event {
            Event::Stored | Event::End { anything: false } => {
                self.figures.works();
                self.figures.oldest_pending.set(0);
            }
            Event::Filled | Event::End { anything: true } => self.figures.oldest_pending.set(oldest),
            _ => {}
        }
        if event == (Event::End { anything: false }) {
            self.log.stored(self.log.reader.place());
        }
        self.note();
        event
    }

    /// Positions make the figures, not answers: those may be lost, and a store may lose what it said that it has.
    fn note(&self) {
        let own = self.settings.own;
        let books = Books {
            own: own.map(|own| self.builder.fates_of(own)).unwrap_or_default(),
            earlier: self.builder.fates_but_of(own),
            earlier_pending: self.builder.pending(own),
            ..Books::default()
        };
        self.figures.note(books);
    }

    /// What waits of earlier starts, before it is read: of each, by the first tallies of its first segment and the last ones
    /// of its last. Until the order to end comes.
    fn look_ahead(&mut self, orders: &watch::Receiver<Option<Instant>>) -> io::Result<()> {
        let dir = &self.log.dir;
        let mut ends: BTreeMap<Epoch, (u64, u64)> = BTreeMap::new();
        for number in spool::read::segments(dir)? {
            if let Some(header) = spool::read::header(dir, number) {
                ends.entry(header.epoch).or_insert((number, number)).1 = number;
            }
        }
        if let Some(own) = self.settings.own {
            ends.remove(&own);
        }
        for (first, last) in ends.into_values() {
            if orders.borrow().is_some() {
                break;
            }
            let begins = tallies(dir, first, true)?;
            for (source, ends) in tallies(dir, last, false)? {
                self.builder.expects(begins.get(&source).unwrap_or(&ends), &ends);
            }
        }
        self.note();
        Ok(())
    }

    async fn ask(&mut self) -> Event {
        if !self.breaker.admits(time::monotonic()) {
            return Event::Away;
        }
        // The log may have lost all that it had of a source but the note that it did.
        let mut epochs = match self.log.epochs() {
            Ok(epochs) => epochs,
            Err(error) => return self.failed(&Failure::Broken(format!("the log cannot be listed: {error}"))),
        };
        epochs.extend(self.builder.epochs());
        let epochs: Vec<Epoch> = epochs.into_iter().collect();
        let answer = self.sink.positions(&epochs).await;
        self.breaker.note(answer.as_ref().map(|_| ()), time::monotonic());
        match answer {
            Ok(positions) => {
                if self.builder.settle(&positions) {
                    // What it lost may lie anywhere in the log.
                    self.resume = 0;
                    self.log.stored(Place::default());
                    tracing::warn!("the store has lost visits that it had: they are stored again from the log");
                }
                self.go_back();
                Event::Positions
            }
            Err(failure) => self.failed(&failure),
        }
    }

    /// To the first thing that is not stored.
    fn go_back(&mut self) {
        self.cut = None;
        self.refused = None;
        self.log.seek(self.resume);
    }

    fn read(&mut self, rows_max: usize) -> Event {
        loop {
            let place = self.log.reader.place();
            let item = match self.log.reader.next() {
                Ok(Some(item)) => item,
                Ok(None) => {
                    self.builder.end();
                    return Event::End { anything: !self.builder.is_empty() };
                }
                Err(error) => return self.failed(&Failure::Broken(format!("the log cannot be read: {error}"))),
            };
            match item {
                Item::Records(block) => {
                    if self.builder.records(&block, rows_max) == Took::Part {
                        self.cut = Some(place);
                        return Event::Filled;
                    }
                }
                Item::Tally(tally) => self.builder.tally(&tally),
                Item::Gap { source, from, to, visits, why } => self.builder.gap(source, from, to, visits, why),
            }
            // At the end of a block, since one that is cut is read twice.
            if self.builder.len() >= (rows_max - rows_max / 4).max(1) {
                return Event::Filled;
            }
        }
    }

    async fn send(&mut self) -> Event {
        let rows = self.builder.len();
        let batch = self.builder.finish();
        let outcome = self.sink.store(&batch).await;
        let now = time::monotonic();
        match outcome {
            Ok(()) => {
                self.breaker.note(Ok::<(), Failure>(()), now);
                self.builder.stored(batch);
                let place = self.cut.take();
                if let Some(cut) = place {
                    self.log.seek(cut.segment);
                }
                let stored = place.unwrap_or_else(|| self.log.reader.place());
                self.resume = stored.segment;
                self.log.stored(stored);
                Event::Stored
            }
            Err(Failure::Refused(reason)) if rows == 1 => {
                self.refused = Some((batch, reason));
                Event::Refused { rows }
            }
            Err(failure) => {
                if matches!(failure, Failure::Away(_) | Failure::Unknown(_)) {
                    self.breaker.note(Err(&failure), now);
                }
                self.builder.restart();
                self.go_back();
                match failure {
                    Failure::Refused(_) if rows > 1 => Event::Refused { rows },
                    failure => self.failed(&failure),
                }
            }
        }
    }

    fn set_aside(&mut self) -> Event {
        let (batch, reason) = self.refused.take().expect("it was refused just now");
        let refused = self.builder.only(&batch).expect("it has one row");
        let row = refused.row;
        let (source, number) = (Source { epoch: Epoch(row.epoch), core: row.core }, row.number);
        let written = dead::append(&self.settings.dead_letters, &refused, &reason, time::now());
        if let Err(error) = written {
            return self.failed(&Failure::Broken(format!("a refused visit cannot be set aside: {error}")));
        }
        tracing::warn!(
            epoch = source.epoch.0,
            core = source.core,
            number,
            reason,
            "the store refuses a visit: it is in the file of dead letters"
        );
        self.builder.refuse(source, number);
        self.builder.restart();
        self.go_back();
        Event::SetAside
    }

    /// Says so, once until it works again.
    fn failed(&self, failure: &Failure) -> Event {
        match failure {
            Failure::Moved => return Event::Moved,
            Failure::Away(_) | Failure::Unknown(_) | Failure::Broken(_) | Failure::Refused(_) => {}
        }
        if self.figures.fails(failure, time::now()) {
            tracing::warn!(error = %failure, "visits wait in the log");
        }
        match failure {
            Failure::Unknown(_) => Event::Unknown,
            Failure::Away(_) => Event::Away,
            _ => Event::Broken,
        }
    }
}

/// Of the writer: what others may look at.
#[derive(Debug, Default)]
pub struct Figures {
    /// Milliseconds since 1970; 0 = none.
    oldest_pending: Counter,
    books: Mutex<Books>,
    away: Mutex<Option<Away>>,
}

/// What became of visits of links on their way from the rings to the store, all of one moment.
#[derive(Clone, Debug, Default)]
struct Books {
    own: Fates,
    earlier: Fates,
    earlier_pending: u64,
    ever: Fates,
}

/// The store takes no visits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Away {
    pub since: UnixMillis,
    /// The last failure.
    pub why: String,
}

/// [`Figures`] at a moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Visits of this start that the store has, or knows to be lost: by its positions, so that they may go back.
    pub own: Fates,
    /// The same of all other starts in the log, since this writer heard first what the store has of them.
    pub earlier: Fates,
    /// Those of the other starts that wait.
    pub earlier_pending: u64,
    /// Of every start since this writer began: never goes back. What the store loses in a failover counts again.
    pub ever: Fates,
    /// When the first that waits came into the log.
    pub oldest_pending: Option<UnixMillis>,
    pub away: Option<Away>,
}

impl Figures {
    #[must_use]
    pub fn report(&self) -> Report {
        let oldest = self.oldest_pending.get();
        let Books { own, earlier, earlier_pending, ever } = lock(&self.books).clone();
        Report {
            own,
            earlier,
            earlier_pending,
            ever,
            oldest_pending: (oldest != 0).then(|| UnixMillis(oldest.cast_signed())),
            away: lock(&self.away).clone(),
        }
    }

    fn note(&self, mut new: Books) {
        let mut books = lock(&self.books);
        let add = |a, b| a + b;
        let (then, now) = (books.own.zip(&books.earlier, add), new.own.zip(&new.earlier, add));
        new.ever = books.ever.zip(&now.zip(&then, u64::saturating_sub), add);
        *books = new;
    }

    fn works(&self) {
        if let Some(away) = lock(&self.away).take() {
            tracing::info!(since_ms = away.since.0, "visits are stored again");
        }
    }

    /// Whether it is the first failure in a row.
    fn fails(&self, failure: &Failure, now: UnixMillis) -> bool {
        let mut away = lock(&self.away);
        let is_first = away.is_none();
        let since = away.take().map_or(now, |away| away.since);
        *away = Some(Away { since, why: failure.to_string() });
        is_first
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nobody panics with it")
}
