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
use super::read::{self, Block, Item, Next, Reader};
use super::ring::{self, RingReader};
use super::segment::{self, Tally};
use super::{Epoch, Error, Source, at, disk, folder, lost, retain};
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
    let there = at("cannot read", dir, read::segments(dir))?;
    // What it says would look damaged, be counted so, and go.
    if let Some((number, found)) = there.iter().find_map(|number| Some((*number, read::newer_version(dir, *number)?))) {
        return Err(Error::Newer { path: dir.join(segment::name(number)), found });
    }
    let lost = at("cannot read", dir, lost::read(dir))?;
    for number in lost.keys() {
        // Its line was written, and the process killed before it went.
        let _ = disk.remove(&dir.join(segment::name(*number)));
    }
    let there = at("cannot read", dir, read::segments(dir))?;
    if let Err(error) = lost::shorten(dir, &there, &**disk) {
        tracing::warn!(dir = %dir.display(), %error, "lost.ndjson could not be shortened");
    }
    for number in &there {
        // What cannot be given back is counted all the same.
        let _ = retain::trim(&dir.join(segment::name(*number)));
    }
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
                left.insert(folder);
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
/// The folder's lock comes back, for as long as it is read. [`Error::InUse`] while a process uses the folder.
pub fn recover_rings(dir: &Path, now: UnixMillis) -> Result<File, Error> {
    let (lock, spool) = folder::lock(dir)?;
    let disk: Arc<dyn Disk> = Arc::new(disk::Kernel);
    let (left, _) = recover(dir, None, spool, &disk, now)?;
    at("cannot write", dir, folder::write_rings(dir, &left, &*disk))?;
    Ok(lock)
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
            // A start that found no room for it, or was killed while it was made.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
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
    sync(dir, epoch, &**disk)?;
    let logged = logged(dir, epoch)?;
    let (mut copiers, mut known) = (Vec::new(), Vec::new());
    for (path, ring) in rings {
        let tail = tail(&path)?;
        let source = ring.about().source;
        let none = Tally { source, appended: 0, visits: 0, ring_full: 0, spool_error: 0, orphans: 0 };
        let tally = logged.get(&source).copied().unwrap_or(none);
        let next = Next { number: tally.appended, visits: tally.visits };
        copiers.push(Copier::new(ring, if next.number < tail.number { tail } else { next }));
        known.push(tally);
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
        let tallies = if last { copiers.iter().map(Copier::tally_of_ring).collect::<Vec<_>>() } else { Vec::new() };
        if last && records == 0 && tallies == known {
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

/// What a killed start wrote and had not synced lasts now: its rings, which have it no more, are not asked again.
fn sync(dir: &Path, epoch: Epoch, disk: &dyn Disk) -> io::Result<()> {
    for number in of_epoch(dir, epoch)? {
        disk.sync(&File::open(dir.join(segment::name(number)))?)?;
    }
    disk.sync_folder(dir)
}

/// The segments of an epoch, in order.
fn of_epoch(dir: &Path, epoch: Epoch) -> io::Result<Vec<u64>> {
    let mut numbers = read::segments(dir)?;
    numbers.retain(|number| read::header(dir, *number).is_some_and(|header| header.epoch == epoch));
    Ok(numbers.into_iter().collect())
}

/// How each core stands in the log, by the last segments of the epoch. Each begins with a tally of every core.
fn logged(dir: &Path, epoch: Epoch) -> io::Result<BTreeMap<Source, Tally>> {
    let numbers = of_epoch(dir, epoch)?;
    let Some(last) = numbers.last() else { return Ok(BTreeMap::new()) };
    let mut reader = Reader::open(dir)?;
    reader.seek(numbers[numbers.len().saturating_sub(SEGMENTS_READ_MAX)]);
    let mut tallies = BTreeMap::new();
    while let Some(item) = reader.next()? {
        let source = match item {
            Item::Tally(tally) => {
                tallies.insert(tally.source, tally);
                tally.source
            }
            Item::Records(Block { source, .. }) | Item::Gap { source, .. } => source,
        };
        let none = Tally { source, appended: 0, visits: 0, ring_full: 0, spool_error: 0, orphans: 0 };
        let tally = tallies.entry(source).or_insert(none);
        if let Some(next) = reader.next_of(source) {
            (tally.appended, tally.visits) = (next.number, next.visits);
        }
        if reader.place().segment > *last {
            break;
        }
    }
    tallies.retain(|source, _| source.epoch == epoch);
    Ok(tallies)
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
