//! The writer: from the log to the sink, exactly once.
//!
//! In: the log, from its oldest segment on; the positions of the store. Out: batches in the store, in the order of the log;
//! figures that add up. It runs on a thread of its own: the store may be away for hours, and redirects are answered.
//! Never: tells the store a record that its position is past; leaves one out without counting it; believes that a batch is
//! stored, or is not, unless the store says so; keeps a batch that failed (the log has it).
//! At its limit: a store that does not answer is asked again and again, and the log grows up to its own limit.
//!
//! Every outcome that is not plain ends in the same way: ask the store where it stands, go to the place in the log where that
//! is, and go on. [`state`] decides, [`Course`] does, [`Writer`] is the thread.

pub mod state;

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use self::state::{Action, Event, Moment, Phase, State};
use super::batch::{self, Batch, Builder, ROWS_MAX, Took};
use super::dead;
use super::sink::{Failure, Sink};
use super::spool::format::SEGMENT_HEADER_BYTES;
use super::spool::read::{Item, Reader};
use super::spool::{Epoch, Place, Source, segment};
use super::{Drops, Dropped};
use crate::breaker::Breaker;
use crate::config;
use crate::domain::time::{self, UnixMillis};
use crate::metrics::Counter;

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
}

/// The writer's thread.
#[derive(Debug)]
pub struct Writer {
    thread: JoinHandle<()>,
    orders: watch::Sender<Option<Instant>>,
    figures: Arc<Figures>,
}

impl Writer {
    /// Begins with the oldest segment of the spool's log, as soon as the store answers.
    pub fn start(settings: Settings, spool: Arc<Spool>, builder: Builder, sink: Sink) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let figures = Arc::new(Figures::default());
        let log = Log { dir: spool.dir().to_path_buf(), reader: spool.reader(), spool: Some(spool) };
        let delivery = Delivery::new(settings, log, builder, sink, Arc::clone(&figures));
        let (orders, ordered) = watch::channel(None);
        let thread = std::thread::Builder::new()
            .name("waypost-writer".into())
            .spawn(move || runtime.block_on(run(delivery, ordered, u32::MAX)))?;
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
    /// Visits of links that were stored, and those that were given up, by this replay alone.
    pub stored: u64,
    pub drops: Drops,
    /// Why it ended before the log did; none = everything is in the store.
    pub failed: Option<String>,
}

/// Stores what the log in `dir` has, of a machine that is gone, exactly once: what the store has already is skipped.
pub async fn replay(dir: &Path, settings: Settings, builder: Builder, sink: Sink) -> io::Result<Replayed> {
    let figures = Arc::new(Figures::default());
    let log = Log { dir: dir.to_path_buf(), reader: Reader::open(dir)?, spool: None };
    let delivery = Delivery::new(settings, log, builder, sink, Arc::clone(&figures));
    let (_orders, ordered) = watch::channel(Some(time::monotonic() + EVER));
    run(delivery, ordered, REPLAY_FAILURES_MAX).await;
    let Report { stored, drops, away, .. } = figures.report();
    Ok(Replayed { stored, drops, failed: away.map(|away| away.why) })
}

async fn run(mut delivery: Delivery, mut orders: watch::Receiver<Option<Instant>>, failures_max: u32) {
    let (mut state, mut action) = State::START;
    let mut tidy_at = time::monotonic();
    loop {
        delivery.figures.phase.set(state.phase as u64);
        let end_by = *orders.borrow_and_update();
        let resting = matches!(action, Action::Sleep { .. } | Action::Listen);
        if resting && state.phase == Phase::Direct && end_by.is_none() && time::monotonic() >= tidy_at {
            let tidied = tokio::select! {
                tidied = delivery.sink.housekeep(time::now()) => tidied,
                () = over(&mut orders) => return,
            };
            if let Err(error) = &tidied {
                tracing::warn!(%error, "the store of visits was not tidied up");
            }
            tidy_at = time::monotonic() + if tidied.is_ok() { HOUSEKEEPING } else { HOUSEKEEPING_AGAIN };
        }
        let event = match action {
            Action::Finish => return,
            Action::Sleep { until } => {
                sleep(until.min(end_by.unwrap_or(until)), end_by.is_none(), &mut orders).await;
                Event::Woken
            }
            Action::Listen => {
                tokio::select! {
                    () = delivery.log.news() => {}
                    () = sleep(tidy_at, true, &mut orders) => {}
                }
                Event::Woken
            }
            Action::Ask | Action::Read { .. } | Action::Send | Action::SetAside => tokio::select! {
                event = delivery.perform(action) => event,
                // What became of it is in the store's positions.
                () = over(&mut orders) => return,
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
            Some(spool) => spool.news().await,
            None => std::future::pending().await,
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
            Action::Read { rows_max } => self.read(rows_max).map_err(|error| broken("the log", &error)),
            Action::Send => self.send().await,
            Action::SetAside => self.set_aside().map_err(|error| broken("the file of dead letters", &error)),
            Action::Sleep { .. } | Action::Listen | Action::Finish => Ok(Event::Woken),
        };
        let event = event.unwrap_or_else(|failure| {
            let event = match &failure {
                Failure::Away(_) => Event::Away,
                Failure::Unknown(_) => Event::Unknown,
                Failure::Moved => return Event::Moved,
                Failure::Refused(_) => return Event::Refused { rows: self.refused_rows },
                Failure::Broken(_) => Event::Broken,
            };
            self.figures.fails(&failure.to_string());
            event
        });
        if matches!(event, Event::Stored | Event::End { anything: false }) {
            self.figures.works();
        }
        self.figures.pending.set(self.builder.pending());
        event
    }
}
