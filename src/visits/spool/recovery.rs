//! Recovery: what is left in the rings of a start that was killed goes to the end of the log.
//!
//! In: folders of rings. Out: segments of the epochs that they are of, synced; then the rings go.
//! Never: takes a ring whose owner lives (it holds the folder's lock), or one of another spool (a copied data folder);
//! removes a ring that the log does not have; reads more of the log than the last segments of the ring's epoch.
//! At its limit: a ring that cannot be read, or a log that cannot be written, stays for the next start, and is told.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::copy::Copier;
use super::disk::Disk;
use super::live::Live;
use super::log::{Log, Unsynced};
use super::read::{self, Item, Next, Reader, Tally};
use super::ring::{self, RingReader};
use super::{Epoch, Error, Source, at, disk, folder, lost, segment};
use crate::domain::time::UnixMillis;

/// Recovers the rings that `rings` names and those of this spool in `base`; says what became of them. The folders that
/// are left, and the number of the next segment.
pub(super) fn recover(
    dir: &Path,
    base: Option<&Path>,
    spool: u64,
    disk: &Arc<dyn Disk>,
    now: UnixMillis,
) -> Result<(BTreeSet<PathBuf>, u64), Error> {
    let lost = at("cannot read", dir, lost::read(dir))?;
    for number in lost.keys() {
        // Its line was written, and the process killed before it went.
        let _ = disk.remove(&dir.join(segment::name(*number)));
    }
    let there = at("cannot read", dir, read::segments(dir))?;
    let next = there.last().max(lost.keys().next_back()).map_or(1, |last| last + 1);
    let named = at("cannot read", dir, folder::read_rings(dir))?;
    let mut all = named;
    all.extend(base.into_iter().flat_map(|base| folder::rings_of(base, spool)));
    let (all, next) = folders(dir, &all, spool, disk, next, now);
    let mut left = BTreeSet::new();
    for recovered in all {
        match recovered {
            Recovered::Gone => {}
            Recovered::Done { folder, records } => {
                tracing::info!(folder = %folder.display(), records, "rings of an earlier start were recovered");
            }
            Recovered::Held { folder } => {
                tracing::warn!(folder = %folder.display(), "rings of this spool are another process's: they are left alone");
                left.insert(folder);
            }
            Recovered::Foreign { folder } => {
                tracing::warn!(folder = %folder.display(), "rings of another spool are left alone: this folder is a copy");
            }
            Recovered::Failed { folder, error } => {
                tracing::error!(folder = %folder.display(), %error, "rings of an earlier start cannot be recovered: they stay for the next one");
                left.insert(folder);
            }
        }
    }
    Ok((left, next))
}

/// Appends to the log in `dir` what is left in rings beside it, for a replay: of a machine that is gone there are none.
/// [`Error::InUse`] while a process uses the folder.
pub fn recover_rings(dir: &Path, now: UnixMillis) -> Result<(), Error> {
    let (_lock, spool) = folder::lock(dir)?;
    let disk: Arc<dyn Disk> = Arc::new(disk::Kernel);
    let (left, _) = recover(dir, None, spool, &disk, now)?;
    at("cannot write", dir, folder::write_rings(dir, &left, &*disk))
}

/// What became of a folder of rings.
#[derive(Debug)]
enum Recovered {
    /// Its records are in the log, and the folder is gone.
    Done { folder: PathBuf, records: u64 },
    /// Another process holds it.
    Held { folder: PathBuf },
    /// Its rings are of another spool.
    Foreign { folder: PathBuf },
    /// It stays as it is.
    Failed { folder: PathBuf, error: io::Error },
    /// It is not there any more: rings do not outlast a loss of power.
    Gone,
}

/// A recovery's own segments have about so many bytes.
const SEGMENT_BYTES: u64 = 8 << 20;
/// Up to how many segments of an epoch are read to find out where the log stands.
const SEGMENTS_READ_MAX: usize = 4;

/// Recovers the rings in each of `folders` into the log in `dir`, whose lock is held. `spool` is the spool's number, and
/// `next` that of the first segment that is made; the one behind the last comes back.
fn folders(
    dir: &Path,
    folders: &BTreeSet<PathBuf>,
    spool: u64,
    disk: &Arc<dyn Disk>,
    mut next: u64,
    now: UnixMillis,
) -> (Vec<Recovered>, u64) {
    let mut all = Vec::new();
    for folder in folders {
        let recovered = one(dir, folder, spool, disk, &mut next, now);
        all.push(recovered.unwrap_or_else(|error| match error.kind() {
            io::ErrorKind::NotFound if !folder.exists() => Recovered::Gone,
            _ => Recovered::Failed { folder: folder.clone(), error },
        }));
    }
    (all, next)
}

fn one(
    dir: &Path,
    folder: &Path,
    spool: u64,
    disk: &Arc<dyn Disk>,
    next: &mut u64,
    now: UnixMillis,
) -> io::Result<Recovered> {
    // Before the lock: another spool's must not find it taken.
    for entry in fs::read_dir(folder)? {
        if ring::open(&entry?.path()).is_ok_and(|ring| ring.about().spool != spool) {
            return Ok(Recovered::Foreign { folder: folder.into() });
        }
    }
    let lock = File::open(folder)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(Recovered::Held { folder: folder.into() }),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    let mut epochs = BTreeMap::<Epoch, Vec<(PathBuf, RingReader)>>::new();
    let mut failed = None;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        match ring::open(&path) {
            Ok(ring) => epochs.entry(ring.about().source.epoch).or_default().push((path, ring)),
            Err(_) if ring::is_unfinished(&path) => {}
            Err(error) => failed = Some(error),
        }
    }
    let mut records = 0;
    for (epoch, rings) in epochs {
        records += append(dir, epoch, rings, disk, next, now)?;
    }
    if let Some(error) = failed {
        return Err(error);
    }
    fs::remove_dir_all(folder)?;
    Ok(Recovered::Done { folder: folder.into(), records })
}

/// Appends what the rings of one epoch have beyond the log; how many records that are.
fn append(
    dir: &Path,
    epoch: Epoch,
    rings: Vec<(PathBuf, RingReader)>,
    disk: &Arc<dyn Disk>,
    next: &mut u64,
    now: UnixMillis,
) -> io::Result<u64> {
    let logged = logged(dir, epoch)?;
    let mut copiers = Vec::new();
    for (path, ring) in rings {
        let tail = tail(&path)?;
        let next = logged.get(&ring.about().source).copied().filter(|next| next.number >= tail.number);
        copiers.push(Copier::new(ring, next.unwrap_or(tail)));
    }
    let mut standing = copiers.iter().map(Copier::tally).collect::<Vec<_>>();
    let unsynced = Arc::new(Unsynced::new(Arc::clone(disk), dir.to_path_buf()));
    let live = Arc::new(Live::new(*next));
    let mut log = Log::new(Arc::clone(&unsynced), epoch, SEGMENT_BYTES, live, *next);
    let mut records = 0;
    let result = loop {
        let mut pieces = copiers.iter_mut().filter_map(|copier| copier.recover(now)).collect::<Vec<_>>();
        let last = pieces.is_empty();
        records += pieces.iter().map(|piece| u64::from(piece.count)).sum::<u64>();
        let tallies = if last { copiers.iter().map(Copier::tally_of_ring).collect() } else { Vec::new() };
        if last && records == 0 && tallies.iter().all(|tally| stands(&standing, tally)) {
            break Ok(());
        }
        if let Err(error) = log.write(&mut pieces, &tallies, &standing, now).and_then(|()| unsynced.sync()) {
            break Err(error);
        }
        copiers.iter_mut().for_each(Copier::advance);
        standing = copiers.iter().map(Copier::tally).collect();
        if last {
            break Ok(());
        }
    };
    log.trim();
    *next = log.next_segment();
    result.map(|()| records)
}

fn stands(standing: &[Tally], tally: &Tally) -> bool {
    let same = |other: &&Tally| other.source == tally.source;
    standing.iter().find(same).is_some_and(|other| (other.appended, other.visits) == (tally.appended, tally.visits))
}

/// Where the log stands, by the last segments of the epoch. Each begins with a tally of every core.
fn logged(dir: &Path, epoch: Epoch) -> io::Result<BTreeMap<Source, Next>> {
    let numbers = read::segments(dir)?;
    let of_epoch = |number: &&u64| read::header(dir, **number).is_some_and(|header| header.epoch == epoch);
    let last = numbers.iter().rev().filter(of_epoch).take(SEGMENTS_READ_MAX).collect::<Vec<_>>();
    let (Some(first), Some(last)) = (last.last(), last.first()) else { return Ok(BTreeMap::new()) };
    let mut reader = Reader::open(dir)?;
    reader.seek(**first);
    let mut sources = BTreeSet::new();
    while let Some(item) = reader.next()? {
        sources.extend(match item {
            Item::Records(block) => [block.source],
            Item::Tally(tally) => [tally.source],
            Item::Gap { source, .. } => [source],
        });
        if reader.place().segment > **last {
            break;
        }
    }
    let of_epoch = sources.into_iter().filter(|source| source.epoch == epoch);
    Ok(of_epoch.filter_map(|source| Some((source, reader.next_of(source)?))).collect())
}

/// The number at a ring's tail, and the visits before it: all that the core had counted but for those that are left.
fn tail(path: &Path) -> io::Result<Next> {
    let mut ring = ring::open(path)?;
    let mut records = Vec::new();
    let first = ring.recover(&mut records, 0).first;
    let mut visits = 0;
    loop {
        records.clear();
        let read = ring.recover(&mut records, super::copy::PIECE_BYTES_MAX);
        visits += u64::from(read.visits);
        if read.count == 0 {
            break;
        }
    }
    Ok(Next { number: first, visits: ring.figures().visits.saturating_sub(visits) })
}
