//! The log: pieces of all cores, one segment after another, on the disk.
//!
//! In: pieces. Out: blocks that a reader finds, and that outlast a loss of power once they were synced.
//! Never: appends to a segment whose write or sync has failed; forgets a piece before it was synced.
//! At its limit: [`UNSYNCED_BYTES_MAX`] of pieces wait for their sync; then nothing more is copied, and the rings fill.
//!
//! Two threads share it. One appends ([`Log::write`]), one syncs ([`Unsynced::sync`]), so that a disk that takes a second
//! to sync stops nothing. After a failed write or sync every segment that is not synced is abandoned, and all that was not
//! synced is written to a new one, which says so in its header: the kernel may drop the pages of a failed write-back and
//! report it once alone (fsync(2), errors EIO and ENOSPC).

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use super::disk::Disk;
use super::live::Live;
use super::piece::Piece;
use super::segment::{self, Block, Body, Header, Tally};
use super::{Epoch, Place};
use crate::domain::time::UnixMillis;

/// Bytes of pieces that may wait for their sync.
pub const UNSYNCED_BYTES_MAX: usize = 64 << 20;

/// The end of the log that is appended to.
#[derive(Debug)]
pub struct Log {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    epoch: Epoch,
    segment_bytes: u64,
    live: Arc<Live>,
    unsynced: Arc<Unsynced>,
    /// The number of the next segment.
    number: u64,
    current: Option<Current>,
    /// What was not synced has to be written again.
    anew: bool,
}

/// The segment that is appended to.
#[derive(Debug)]
struct Current {
    number: u64,
    file: Arc<File>,
    bytes: u64,
    /// When it has as many, the next one begins.
    bytes_max: u64,
    /// Strings that it has, by core and id.
    defined: HashMap<(u16, u32), Arc<[u8]>, ahash::RandomState>,
}

/// What is in the log and may not outlast a loss of power.
#[derive(Debug)]
pub struct Unsynced {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    inner: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// In the order of the log, with the first segment that each one was written to.
    pieces: VecDeque<(u64, Arc<Piece>)>,
    bytes: usize,
    segments: VecDeque<Segment>,
    /// Counts what was abandoned: a sync that began before says nothing about what is here now.
    round: u64,
    failed: Option<String>,
}

#[derive(Clone, Debug)]
struct Segment {
    number: u64,
    file: Arc<File>,
    /// Its name is not known to last yet.
    new: bool,
    /// Writes so far, and those of them that were synced.
    written: u64,
    synced: u64,
}

impl Unsynced {
    #[must_use]
    pub fn new(disk: Arc<dyn Disk>, dir: PathBuf) -> Self {
        Self { disk, dir, inner: Mutex::default() }
    }

    /// Bytes of pieces that wait.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.lock().bytes
    }

    /// Whether a sync has failed, and nothing was written anew since.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.lock().failed.is_some()
    }

    /// Syncs what was written until now, the oldest segment first. After a failure everything has to be written again, which
    /// [`Log::write`] does.
    pub fn sync(&self) -> io::Result<()> {
        let (segments, pieces, round) = {
            let waiting = self.lock();
            if waiting.failed.is_some() {
                return Ok(());
            }
            (waiting.segments.clone(), waiting.pieces.len(), waiting.round)
        };
        let synced = segments.iter().filter(|segment| segment.written > segment.synced).try_for_each(|segment| {
            self.disk.sync(&segment.file)?;
            if segment.new { self.disk.sync_folder(&self.dir) } else { Ok(()) }
        });
        let mut waiting = self.lock();
        if waiting.round != round {
            return Ok(());
        }
        if let Err(error) = &synced {
            waiting.failed = Some(error.to_string());
            return synced;
        }
        let durable = waiting.pieces.drain(..pieces).map(|(_, piece)| piece.bytes()).sum::<usize>();
        waiting.bytes -= durable;
        let last = waiting.segments.back().map(|segment| segment.number);
        for segment in &mut waiting.segments {
            if let Some(synced) = segments.iter().find(|synced| synced.number == segment.number) {
                (segment.new, segment.synced) = (false, synced.written);
            }
        }
        waiting.segments.retain(|segment| segment.written > segment.synced || Some(segment.number) == last);
        Ok(())
    }

    /// All that was not synced, to be written again. Nothing is synced until it was.
    fn abandon(&self) -> VecDeque<(u64, Arc<Piece>)> {
        let mut waiting = self.lock();
        waiting.round += 1; // a sync that is under way says nothing any more
        waiting.failed.get_or_insert_default();
        waiting.segments.clear();
        waiting.pieces.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.inner.lock().expect("nobody panics with it")
    }
}

impl Log {
    /// `number` is that of the first segment it makes.
    #[must_use]
    pub fn new(unsynced: Arc<Unsynced>, epoch: Epoch, segment_bytes: u64, live: Arc<Live>, number: u64) -> Self {
        let (disk, dir) = (Arc::clone(&unsynced.disk), unsynced.dir.clone());
        Self { disk, dir, epoch, segment_bytes, live, unsynced, number, current: None, anew: false }
    }

    /// Of the segments that begin from now on.
    pub fn set_segment_bytes(&mut self, bytes: u64) {
        self.segment_bytes = bytes;
    }

    /// The number of the next segment.
    #[must_use]
    pub fn next_segment(&self) -> u64 {
        self.number
    }

    /// Whether another piece may be written before more was synced.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.unsynced.bytes() < UNSYNCED_BYTES_MAX
    }

    /// Whether a sync has failed, and what it was of has to be written again.
    #[must_use]
    pub fn must_write(&self) -> bool {
        self.anew || self.unsynced.failed()
    }

    /// Appends `pieces` and then `tallies`, in one write, and empties `pieces`. `standing` has a tally of each core as it
    /// stands before `pieces`: what a new segment begins with. It tries twice, the second time with a new segment; after an
    /// error `pieces` are not in the log.
    pub fn write(
        &mut self,
        pieces: &mut Vec<Piece>,
        tallies: &[Tally],
        standing: &[Tally],
        now: UnixMillis,
    ) -> io::Result<()> {
        match self.write_once(pieces, tallies, standing, now) {
            Ok(()) => Ok(()),
            Err(_) => self.write_once(pieces, tallies, standing, now),
        }
    }

    fn write_once(
        &mut self,
        pieces: &mut Vec<Piece>,
        tallies: &[Tally],
        standing: &[Tally],
        now: UnixMillis,
    ) -> io::Result<()> {
        self.anew = self.must_write();
        if self.anew || self.current.as_ref().is_none_or(|current| current.bytes >= current.bytes_max) {
            self.begin(standing, now)?;
        }
        let Some(current) = &mut self.current else { return Ok(()) };
        let mut bytes = Vec::new();
        for piece in &*pieces {
            current.encode(piece, self.epoch, &mut bytes);
        }
        for tally in tallies {
            Block::tally(tally, now).encode(self.epoch, current.number, &mut bytes);
        }
        if let Err(error) = self.disk.append(&current.file, &bytes) {
            self.anew = true;
            return Err(error);
        }
        current.bytes += bytes.len() as u64;
        let written = Place { segment: current.number, offset: current.bytes };
        let mut waiting = self.unsynced.lock();
        for piece in pieces.drain(..) {
            waiting.bytes += piece.bytes();
            waiting.pieces.push_back((written.segment, Arc::new(piece)));
        }
        if let Some(segment) = waiting.segments.back_mut() {
            segment.written += 1;
        }
        drop(waiting);
        self.live.set_written(written);
        Ok(())
    }

    /// Makes the next segment: its tallies, and, if what came before is abandoned, all that was not synced.
    fn begin(&mut self, standing: &[Tally], now: UnixMillis) -> io::Result<()> {
        let number = self.number;
        self.number += 1;
        let mut again = VecDeque::new();
        if self.anew {
            self.trim();
            self.current = None;
            again = self.unsynced.abandon();
        }
        let repeats = again.front().map_or(0, |(segment, _)| *segment);
        let mut bytes = Header { epoch: self.epoch, number, made_at: now, repeats }.encode().to_vec();
        for tally in standing {
            let mut tally = *tally;
            if let Some((_, piece)) = again.iter().find(|(_, piece)| piece.core == tally.source.core) {
                (tally.appended, tally.visits) = (piece.begin.number, piece.begin.visits);
            }
            Block::tally(&tally, now).encode(self.epoch, number, &mut bytes);
        }
        let defined = HashMap::default();
        let path = self.dir.join(segment::name(number));
        let made = self.disk.create(&path, self.segment_bytes).map(Arc::new).and_then(|file| {
            let mut current = Current { number, file, bytes: 0, bytes_max: self.segment_bytes, defined };
            for (_, piece) in &again {
                current.encode(piece, self.epoch, &mut bytes);
            }
            self.disk.append(&current.file, &bytes)?;
            current.bytes = bytes.len() as u64;
            Ok(current)
        });
        let current = match made {
            Ok(current) => current,
            Err(error) => {
                // It may hold what a full disk needs; a reader passes over what cannot be removed.
                let _ = self.disk.remove(&path);
                return Err(error);
            }
        };
        let mut waiting = self.unsynced.lock();
        if self.anew {
            waiting.failed = None;
        }
        waiting.segments.push_back(Segment {
            number,
            file: Arc::clone(&current.file),
            new: true,
            written: 1,
            synced: 0,
        });
        drop(waiting);
        self.live.set_written(Place { segment: number, offset: current.bytes });
        self.current = Some(current);
        self.anew = false;
        Ok(())
    }

    /// Gives back what was reserved for the segment at hand. Whether that works is of no consequence.
    pub fn trim(&self) {
        if let Some(current) = &self.current {
            let _ = current.file.set_len(current.bytes);
        }
    }
}

impl Current {
    fn encode(&mut self, piece: &Piece, epoch: Epoch, out: &mut Vec<u8>) {
        let mut strings = Vec::new();
        for (id, string) in &piece.strings {
            let defined = self.defined.get(&(piece.core, *id));
            if !defined.is_some_and(|defined| Arc::ptr_eq(defined, string)) {
                segment::put_string(*id, string, &mut strings);
                self.defined.insert((piece.core, *id), Arc::clone(string));
            }
        }
        let body =
            Body::Records { count: piece.count, visits: piece.visits, strings: &strings, records: &piece.records };
        let (number, before) = (piece.begin.number, piece.begin.visits);
        Block { core: piece.core, number, before, written_at: piece.written_at, body }.encode(epoch, self.number, out);
    }
}
