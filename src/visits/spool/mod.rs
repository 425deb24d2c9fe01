//! The spool: visits between their redirect and the store.
//!
//! In: records of every core, by way of its ring on tmpfs. Out: the same records from a log on disk, in the order of each
//! core, as often as they are asked for while they are kept.
//! Never: makes a core wait; says that a record is durable that was not synced; appends to a segment after its sync failed
//! or to one of an earlier start; shares its folder with another process (`flock`).
//! At its limit: see the table in [`crate::visits`].
//!
//! Files: `DATA/spool/lock`, `DATA/spool/rings` (where the rings lie), `DATA/spool/<number, 16 hexadecimal digits>.log`,
//! `DATA/spool/lost.ndjson`; rings in `<spool.ring>/waypost-<epoch, 16 hexadecimal digits>/core-<n>.ring`.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::domain::time::{self, UnixMillis};
use copy::{Copier, Copying, Turn};
use disk::Disk;
use folder::RingFolder;
use live::Live;
use log::{Log, Unsynced};
use read::{Next, Reader};
pub use recovery::recover_rings;
use retain::{Goes, Limits};
use ring::{About, Counts, RingWriter};
use segment::Tally;
pub use summary::{Summary, summary};

pub mod copy;
pub mod disk;
pub mod folder;
pub mod format;
pub mod intern;
pub mod live;
pub mod log;
pub mod lost;
pub mod map;
pub mod piece;
pub mod read;
pub mod record;
pub mod recovery;
pub mod retain;
pub mod ring;
pub mod segment;
mod summary;
#[cfg(test)]
mod tests;

/// One start of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

/// A core of one start: what numbers are counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Source {
    pub epoch: Epoch,
    pub core: u16,
}

/// What a start is told. All but `runtime_dir` and `cores` stand in [`crate::config::Spool`].
#[derive(Clone, Debug)]
pub struct Settings {
    /// `DATA/spool`, or `spool.dir`.
    pub dir: PathBuf,
    /// `spool.ring`.
    pub ring: Option<PathBuf>,
    /// systemd's `RUNTIME_DIRECTORY` (systemd.exec(5)); of several the first.
    pub runtime_dir: Option<PathBuf>,
    pub ring_bytes: u64,
    pub segment_bytes: u64,
    pub sync: Duration,
    pub bytes_max: u64,
    pub keep: Duration,
    pub keep_bytes: u64,
    /// Rings are made for cores 0 up to this one.
    pub cores: u16,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("another process uses the spool {0}: end it, or give this one a folder of its own with spool.dir")]
    InUse(PathBuf),
    #[error(
        "the rings cannot lie in {0}: it is neither a tmpfs nor ext4 nor xfs, and any other file system may stall or kill \
         the process that writes to a mapping of it; name a tmpfs with spool.ring"
    )]
    RingFolder(PathBuf),
    #[error(
        "{path} is of version {found}, this program reads version {known}: use the newer waypost that wrote it; nothing \
         of it is lost",
        known = format::VERSION
    )]
    Newer { path: PathBuf, found: u32 },
    #[error("{what} {path}: {error}")]
    Io { what: &'static str, path: PathBuf, error: io::Error },
}

/// Says of which file an error is.
fn at<T>(what: &'static str, path: &Path, result: io::Result<T>) -> Result<T, Error> {
    result.map_err(|error| Error::Io { what, path: path.into(), error })
}

/// How often the rings are looked at. Nobody says when: the smallest ring has room for several turns of a busy core. Told
/// by a channel, this thread yielded eight times before each sleep, 350 instead of 50 context switches a second under load,
/// and workers woke it up.
const TURN: Duration = Duration::from_millis(20);
/// How often a new segment is tried while the log cannot be written, and what may go is looked at.
const RETRY: Duration = Duration::from_secs(1);
/// The share of what the log may have that one segment has at most: so that a small disk can let go of some.
const SEGMENTS_MIN: u64 = 8;
const SEGMENT_BYTES_MIN: u64 = 64 << 10;

/// The largest ring, 1 GiB, has fewer pieces: only a worker that records on needs more turns to be emptied.
const SEAL_TURNS_MAX: usize = 4096;

/// The spool of this process.
#[derive(Debug)]
pub struct Spool {
    shared: Arc<Shared>,
    threads: Mutex<Option<Threads>>,
    /// The folder is ours for as long as this is open.
    _lock: File,
}

#[derive(Debug)]
struct Threads {
    copy: JoinHandle<Copying>,
    sync: JoinHandle<()>,
    rings: RingFolder,
}

#[derive(Debug)]
struct Shared {
    settings: Settings,
    /// Of each core, while its thread may be stuck in a write.
    counts: Vec<Counts>,
    disk: Arc<dyn Disk>,
    live: Arc<Live>,
    unsynced: Arc<Unsynced>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    figures: Figures,
    /// Everything before it is stored.
    stored: Place,
    /// The first that was said of it: segments before were stored by earlier starts, nobody knows when.
    found_stored: Option<u64>,
    /// Since when each segment is.
    stored_at: BTreeMap<u64, UnixMillis>,
    /// The last sync failed.
    sync_fails: bool,
    /// Both threads end: what is left in the rings is for whoever stops them.
    stops: bool,
}

/// How the spool stands.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Each core of this start, as its ring says.
    pub cores: Vec<Tally>,
    /// Of the log, and up to which it may grow now.
    pub bytes: u64,
    pub bytes_max: u64,
    /// Of it, what is not stored.
    pub waiting_bytes: u64,
    /// Since when the log cannot be written or synced.
    pub failing_since: Option<UnixMillis>,
    /// Visits that this process gave up because the log was full.
    pub given_up: u64,
}

impl Spool {
    /// Opens the spool: recovers what earlier starts left in their rings, makes this start's, and starts the threads.
    /// The second value has the rings' other ends, by core.
    pub fn open(settings: &Settings, now: UnixMillis, epoch: Epoch) -> Result<(Self, Vec<RingWriter>), Error> {
        Self::open_on(Arc::new(disk::Kernel), settings, now, epoch)
    }

    /// The same on a disk of the caller's.
    pub fn open_on(
        disk: Arc<dyn Disk>,
        settings: &Settings,
        now: UnixMillis,
        epoch: Epoch,
    ) -> Result<(Self, Vec<RingWriter>), Error> {
        let dir = &settings.dir;
        at("cannot make the folder", dir, DirBuilder::new().recursive(true).mode(0o700).create(dir))?;
        let (lock, spool) = folder::lock(dir)?;
        let base = folder::ring_base(settings)?;
        let (left, number) = recovery::recover(dir, Some(&base), spool, &disk, now)?;

        // On a full disk there may be room later.
        let _ = retain::reserve_line(dir);
        let rings = RingFolder::path(&base, epoch);
        let named = left.into_iter().chain([rings.clone()]).collect();
        if let Err(error) = folder::write_rings(dir, &named, &*disk) {
            // What the file named before, it still does.
            tracing::warn!(
                dir = %dir.display(), %error,
                "where the rings lie could not be written down: leave spool.ring as it is until the next start"
            );
        }
        let rings = RingFolder::make(rings)?;
        let about = About { source: Source { epoch, core: 0 }, spool, made_at: now };
        let (writers, copiers) = make_rings(settings, &rings.path, &about).inspect_err(|_| {
            // They would hold memory until somebody looks.
            let _ = fs::remove_dir_all(&rings.path);
        })?;
        let live = Arc::new(Live::new(number));
        let unsynced = Arc::new(Unsynced::new(Arc::clone(&disk), dir.clone()));
        let shared = Shared {
            settings: settings.clone(),
            counts: copiers.iter().map(Copier::counts).collect(),
            disk,
            live: Arc::clone(&live),
            unsynced: Arc::clone(&unsynced),
            state: Mutex::default(),
            changed: Condvar::new(),
        };
        let shared = Arc::new(shared);
        let bytes_max = shared.bytes_max();
        shared.lock().figures.bytes_max = bytes_max;
        let segment_bytes = shared.segment_bytes();
        let copying = Copying::new(Log::new(unsynced, epoch, segment_bytes, live, number), copiers);
        let copy = at("cannot start a thread for", dir, {
            let shared = Arc::clone(&shared);
            thread::Builder::new().name("waypost-spool".into()).spawn(move || shared.copy(copying))
        })?;
        let sync = at("cannot start a thread for", dir, {
            let shared = Arc::clone(&shared);
            thread::Builder::new().name("waypost-sync".into()).spawn(move || shared.sync())
        })?;
        let threads = Mutex::new(Some(Threads { copy, sync, rings }));
        Ok((Self { shared, threads, _lock: lock }, writers))
    }

    /// A reader of the whole log, which the log does not take segments from. There is one at a time.
    #[must_use]
    pub fn reader(&self) -> Reader {
        Reader::attached(&self.shared.settings.dir, Arc::clone(&self.shared.live))
    }

    /// Up to where a reader may read.
    #[must_use]
    pub fn written(&self) -> Place {
        self.shared.live.written()
    }

    /// Waits until something is written; returns at once if that was so since the last call.
    pub async fn wait(&self) {
        self.shared.live.news().await;
    }

    /// Everything before `place` is stored. It may go back, after a failover of the store.
    pub fn stored(&self, place: Place) {
        let mut state = self.shared.lock();
        state.found_stored = state.found_stored.or(Some(place.segment));
        state.stored = place;
    }

    #[must_use]
    pub fn figures(&self) -> Figures {
        let cores = self.shared.counts.iter().map(|counts| copy::tally(counts.source, counts.figures())).collect();
        Figures { cores, ..self.shared.lock().figures.clone() }
    }

    /// Ends both threads, copies what is left in the rings, syncs, and removes the rings if the log has all that was in
    /// them and nobody can record any more: what a worker that hangs still holds stays. A second call does nothing.
    pub fn seal(&self) {
        let Some(Threads { copy, sync, rings }) = self.threads.lock().expect("nobody panics with it").take() else {
            return;
        };
        self.shared.stop();
        let (copying, synced) = (copy.join(), sync.join());
        let (Ok(mut copying), Ok(())) = (copying, synced) else {
            tracing::error!("a thread of the spool has panicked: its rings stay for the next start");
            return;
        };
        match empty(&mut copying, &self.shared.unsynced) {
            Ok(()) if !copying.is_done() => tracing::error!(
                folder = %rings.path.display(),
                "a worker does not end, or a ring is damaged: the rings stay for the next start"
            ),
            Ok(()) => {
                copying.log.trim();
                let removed = fs::remove_dir_all(&rings.path).and_then(|()| {
                    let dir = &self.shared.settings.dir;
                    let mut named = folder::read_rings(dir)?;
                    named.remove(&rings.path);
                    folder::write_rings(dir, &named, &*self.shared.disk)
                });
                if let Err(error) = removed {
                    tracing::warn!(folder = %rings.path.display(), %error, "empty rings could not be removed");
                }
            }
            Err(error) => tracing::error!(
                folder = %rings.path.display(),
                %error,
                "the log could not be written at the end: its rings stay for the next start"
            ),
        }
    }
}

/// The rings of each core in `folder`, which is new: `about` is the first one's.
fn make_rings(settings: &Settings, folder: &Path, about: &About) -> Result<(Vec<RingWriter>, Vec<Copier>), Error> {
    let mut writers = Vec::new();
    let mut copiers = Vec::new();
    for core in 0..settings.cores {
        let about = About { source: Source { core, ..about.source }, ..*about };
        let path = folder.join(format!("core-{core}.ring"));
        let (writer, reader) = at(
            "no room or no right for the ring (spool.ring names its folder, spool.ring_size its size):",
            &path,
            ring::create(&path, settings.ring_bytes, &about),
        )?;
        writers.push(writer);
        copiers.push(Copier::new(reader, Next::default()));
    }
    Ok((writers, copiers))
}

/// Copies and syncs until nothing is new; what failed once is tried once more.
fn empty(copying: &mut Copying, unsynced: &Unsynced) -> io::Result<()> {
    let mut failed = false;
    let mut left = SEAL_TURNS_MAX;
    loop {
        // In this order: there is room for the turn, and nothing is unsynced once it finds nothing.
        let turn = unsynced.sync().map_or_else(Turn::Failed, |()| copying.turn(time::now(), true));
        match turn {
            Turn::Nothing => return Ok(()),
            Turn::Copied if left > 0 => left -= 1,
            Turn::Copied => return unsynced.sync(),
            Turn::Failed(error) if failed => return Err(error),
            Turn::Failed(_) => failed = true,
        }
    }
}

impl Drop for Spool {
    /// Without [`Spool::seal`]: as if the process had been killed, but that its threads end.
    fn drop(&mut self) {
        let Some(threads) = self.threads.lock().ok().and_then(|mut threads| threads.take()) else { return };
        self.shared.stop();
        let _ = threads.copy.join();
        let _ = threads.sync.join();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }

    fn stop(&self) {
        self.lock().stops = true;
        self.changed.notify_all();
    }

    /// Waits for so long, or until the threads are to end.
    fn stops_within(&self, span: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), span, |state| !state.stops);
        waited.expect("nobody panics with it").0.stops
    }

    /// The thread that copies.
    fn copy(&self, mut copying: Copying) -> Copying {
        let mut retry_at = time::monotonic();
        let mut failing = false;
        loop {
            if self.stops_within(TURN) {
                return copying;
            }
            // A failed sync has all of it written anew: not more often than a failed write is tried again.
            let again = failing || copying.log.must_write();
            if again && time::monotonic() < retry_at {
                copying.set_failing(true);
                continue;
            }
            copying.log.set_segment_bytes(self.segment_bytes());
            let turn = copying.turn(time::now(), false);
            failing = matches!(turn, Turn::Failed(_));
            if failing || again {
                retry_at = time::monotonic() + RETRY;
            }
            self.tell(&turn);
        }
    }

    /// Whether the log can be written and synced: a line when that changes.
    fn tell(&self, turn: &Turn) {
        let mut state = self.lock();
        match (turn, state.figures.failing_since) {
            (Turn::Failed(error), None) => {
                state.figures.failing_since = Some(time::now());
                let dir = self.settings.dir.display();
                tracing::error!(%dir, %error, "the log of visits cannot be written: visits wait in the rings");
            }
            (Turn::Copied, Some(since)) if !state.sync_fails => {
                state.figures.failing_since = None;
                let ms = time::now().0.saturating_sub(since.0);
                tracing::warn!(ms, "the log of visits can be written again");
            }
            _ => {}
        }
    }

    /// Syncs what was written, unless it waits to be written anew.
    fn sync_once(&self) {
        if self.unsynced.failed() {
            return;
        }
        let synced = self.unsynced.sync();
        let mut state = self.lock();
        state.sync_fails = synced.is_err();
        if let (Err(error), None) = (synced, state.figures.failing_since) {
            state.figures.failing_since = Some(time::now());
            let dir = self.settings.dir.display();
            tracing::error!(%dir, %error, "the log of visits cannot be synced: what is not durable is written anew");
        }
    }

    /// The thread that syncs, and lets segments go.
    fn sync(&self) {
        let mut retain_at = time::monotonic();
        let mut retaining = true;
        loop {
            let stops = self.stops_within(self.settings.sync);
            self.sync_once();
            if stops {
                return;
            }
            if time::monotonic() >= retain_at {
                retain_at = time::monotonic() + RETRY;
                let retained = self.retain(time::now());
                if let Err(error) = &retained
                    && retaining
                {
                    tracing::warn!(%error, "segments of the log could not be removed");
                }
                retaining = retained.is_ok();
            }
        }
    }

    /// How many bytes a segment that begins now has, about: less while the disk is nearly full.
    fn segment_bytes(&self) -> u64 {
        self.settings.segment_bytes.min(self.lock().figures.bytes_max / SEGMENTS_MIN).max(SEGMENT_BYTES_MIN)
    }

    /// Up to how many bytes the log may grow now.
    fn bytes_max(&self) -> u64 {
        let bytes = self.lock().figures.bytes;
        retain::cap(self.settings.bytes_max, retain::free_bytes(&self.settings.dir), bytes)
    }

    /// Lets go what may go. What cannot be removed does not keep the rest; the first error comes back.
    fn retain(&self, now: UnixMillis) -> io::Result<()> {
        let dir = &self.settings.dir;
        let bytes_max = self.bytes_max();
        let (reading, claimed) = self.live.claimed();
        let mut segments = retain::scan(dir)?;
        let limits = {
            let mut state = self.lock();
            let before = state.stored.segment;
            state.stored_at.retain(|number, _| *number < before);
            for segment in segments.iter_mut().filter(|segment| segment.number < before) {
                let found = state.found_stored.is_some_and(|found| segment.number < found);
                let since = if found { segment.changed_at.min(now) } else { now };
                segment.stored_at = Some(*state.stored_at.entry(segment.number).or_insert(since));
            }
            state.figures.bytes = segments.iter().map(|segment| segment.bytes).sum();
            state.figures.bytes_max = bytes_max;
            state.figures.waiting_bytes = retain::waiting_bytes(&segments, state.stored, self.live.written());
            Limits {
                keep_ms: i64::try_from(self.settings.keep.as_millis()).unwrap_or(i64::MAX),
                keep_bytes: self.settings.keep_bytes,
                bytes_max,
                written: self.live.written().segment,
                reading,
                claimed,
            }
        };
        let mut outcome = Ok(());
        for goes in retain::decide(&segments, &limits, now) {
            let gone = match goes {
                Goes::Stored(number) => self.remove_stored(number),
                Goes::GivenUp(number) if self.live.leave(number) => self.give_up(number, bytes_max),
                Goes::GivenUp(_) => Ok(()),
            };
            outcome = outcome.and(gone);
        }
        outcome
    }

    fn remove_stored(&self, number: u64) -> io::Result<()> {
        self.disk.remove(&self.settings.dir.join(segment::name(number)))?;
        self.lock().stored_at.remove(&number);
        Ok(())
    }

    fn give_up(&self, number: u64, bytes_max: u64) -> io::Result<()> {
        let dir = &self.settings.dir;
        let line = retain::give_up(dir, number, &*self.disk);
        self.live.left();
        let visits = line?.sources.iter().map(|range| range.visits).sum::<u64>();
        self.lock().figures.given_up += visits;
        // Where there is room for it again.
        let _ = retain::reserve_line(dir);
        tracing::warn!(
            segment = number,
            visits,
            bytes_max,
            "the log of visits is full: its oldest segment that was never sent is given up"
        );
        Ok(())
    }
}

/// Where a reader of the log stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The segment's number.
    pub segment: u64,
    /// Bytes from its beginning, at a block's.
    pub offset: u64,
}
