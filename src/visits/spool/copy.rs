//! Copying: what is new in a ring becomes a piece of the log.
//!
//! In: a ring. Out: pieces: records as they lay in the ring, with all strings that they use.
//! Never: takes from a ring what the log does not have; reads a string's bytes twice while they stand.
//! At its limit: [`PIECE_BYTES_MAX`] of records at once; the rest comes with the next turn.

use std::io;
use std::sync::Arc;

use super::Source;
use super::log::Log;
use super::piece::Piece;
use super::read::Next;
use super::ring::{Counts, Figures, Read, RingReader};
use super::segment::{self, Tally};
use crate::domain::time::UnixMillis;

/// Bytes of records that one turn takes out of one ring: 25 MB/s at 20 ms.
pub const PIECE_BYTES_MAX: usize = 512 << 10;

/// One ring, and how far the log has it.
#[derive(Debug)]
pub struct Copier {
    ring: RingReader,
    next: Next,
    known: Vec<Known>,
    generations: [u64; 2],
    /// Pieces so far: tells which strings the piece at hand has already.
    pieces: u64,
    /// What was read and not taken yet.
    read: Next,
}

#[derive(Clone, Debug, Default)]
struct Known {
    string: Option<Arc<[u8]>>,
    piece: u64,
}

impl Copier {
    /// `next` is what comes next in the log.
    #[must_use]
    pub fn new(ring: RingReader, next: Next) -> Self {
        let generations = ring.generations();
        Self { ring, next, known: Vec::new(), generations, pieces: 0, read: next }
    }

    /// What is new; it counts as had once it is taken.
    pub fn read(&mut self, now: UnixMillis) -> Option<Piece> {
        let mut records = Vec::new();
        let read = self.ring.read(&mut records, PIECE_BYTES_MAX);
        self.piece(read, records, now)
    }

    /// The same after a crash (see [`RingReader::recover`]), without what the log has already.
    pub fn recover(&mut self, now: UnixMillis) -> Option<Piece> {
        loop {
            let mut records = Vec::new();
            let read = self.ring.recover(&mut records, PIECE_BYTES_MAX);
            let nothing = read.count == 0;
            let mut piece = self.piece(read, records, now);
            if let Some(piece) = &mut piece {
                // As its start would have written it: who was down for long does not make its visits look too old.
                let newest = segment::glance(&piece.records).map(|record| record.at).max();
                piece.written_at = newest.unwrap_or(now).min(now);
            }
            if nothing || piece.is_some() {
                return piece;
            }
        }
    }

    fn piece(&mut self, read: Read, records: Vec<u8>, now: UnixMillis) -> Option<Piece> {
        if read.count == 0 {
            return None;
        }
        let mut piece = Piece {
            core: self.ring.about().source.core,
            begin: Next { number: read.first, visits: self.next.visits },
            count: read.count,
            visits: read.visits,
            written_at: now,
            records,
            strings: Vec::new(),
            strings_bytes_new: 0,
        };
        if piece.begin.number < self.next.number {
            piece.skip_to(self.next);
            if piece.count == 0 {
                return None;
            }
        }
        self.read = piece.end();
        self.forget_old_strings();
        self.pieces += 1;
        let ids = segment::glance(&piece.records).flat_map(|record| record.strings).collect::<Vec<_>>();
        for id in ids {
            self.string(id, &mut piece);
        }
        Some(piece)
    }

    /// Adds the string with this id to a piece's, once.
    fn string(&mut self, id: u32, piece: &mut Piece) {
        if id == 0 {
            return;
        }
        let index = id as usize;
        if self.known.len() <= index {
            self.known.resize(index + 1, Known::default());
        }
        let known = &mut self.known[index];
        if known.piece == self.pieces {
            return;
        }
        known.piece = self.pieces;
        if known.string.is_none() {
            let mut bytes = Vec::new();
            known.string = self.ring.string(id, &mut bytes).then(|| bytes.into());
            piece.strings_bytes_new += known.string.as_ref().map_or(0, |string| string.len());
        }
        piece.strings.extend(known.string.clone().map(|string| (id, string)));
    }

    /// A half of the strings begins anew only when every record that used it was taken: after a read, all that was read
    /// uses the strings of now.
    fn forget_old_strings(&mut self) {
        let generations = self.ring.generations();
        for (half, (now, before)) in generations.iter().zip(self.generations).enumerate() {
            if *now != before {
                for (id, known) in self.known.iter_mut().enumerate() {
                    if u32::try_from(id).is_ok_and(|id| id > 0 && self.ring.half(id) == half) {
                        known.string = None;
                    }
                }
            }
        }
        self.generations = generations;
    }

    /// What was read is in the log.
    pub fn take(&mut self) {
        self.ring.take();
        self.advance();
    }

    /// The same, and the ring stays as it is: it goes as a whole once all of it is in the log.
    pub fn advance(&mut self) {
        self.next = self.read;
    }

    /// How the core stands as its ring says.
    #[must_use]
    pub fn tally_of_ring(&self) -> Tally {
        tally(self.ring.about().source, self.ring.figures())
    }

    /// Where the ring says how the core stands.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.ring.counts()
    }

    /// Whether the log has all that is in the ring, and nobody can record more.
    fn is_done(&self) -> bool {
        !self.ring.has_writer() && self.next.number == self.ring.figures().appended
    }

    /// How the core stands as the log has it.
    #[must_use]
    pub fn tally(&self) -> Tally {
        Tally { appended: self.next.number, visits: self.next.visits, ..self.tally_of_ring() }
    }
}

/// What a ring's figures say.
#[must_use]
pub fn tally(source: Source, figures: Figures) -> Tally {
    let Figures { appended, visits, ring_full, spool_error, orphans } = figures;
    Tally { source, appended, visits, ring_full, spool_error, orphans }
}

/// All rings of a start, and the log that they are copied to.
#[derive(Debug)]
pub struct Copying {
    pub log: Log,
    copiers: Vec<Copier>,
    /// What was read and the log does not have, for it fails.
    unwritten: Vec<Piece>,
    /// The tallies that the log has, and since when.
    tallies: Vec<Tally>,
    tallied_at: UnixMillis,
}

/// What a turn came to.
#[derive(Debug)]
pub enum Turn {
    Nothing,
    Copied,
    /// The log could not be written: what was read is kept, and the rings fill.
    Failed(io::Error),
}

/// How often the log is told how the cores stand.
const TALLY_MS: u64 = 1000;

impl Copying {
    #[must_use]
    pub fn new(log: Log, copiers: Vec<Copier>) -> Self {
        Self { log, copiers, unwritten: Vec::new(), tallies: Vec::new(), tallied_at: UnixMillis::default() }
    }

    /// Copies once what is new in every ring; `last`: with a tally of each core.
    pub fn turn(&mut self, now: UnixMillis, last: bool) -> Turn {
        let reads = self.unwritten.is_empty() && self.log.has_room();
        if reads {
            self.unwritten.extend(self.copiers.iter_mut().filter_map(|copier| copier.read(now)));
        }
        let due = last || now.0.abs_diff(self.tallied_at.0) >= TALLY_MS;
        let standing = self.copiers.iter().map(Copier::tally).collect::<Vec<_>>();
        let tallies = if due { self.changed() } else { Vec::new() };
        if self.unwritten.is_empty() && tallies.is_empty() && !self.log.must_write() {
            return Turn::Nothing;
        }
        if let Err(error) = self.log.write(&mut self.unwritten, &tallies, &standing, now) {
            self.set_failing(true);
            return Turn::Failed(error);
        }
        self.copiers.iter_mut().for_each(Copier::take);
        if reads {
            // Not after what was left of a failed turn alone: the rings are as full as they were until they are read again.
            self.set_failing(false);
        }
        if due {
            self.tallied_at = now;
            self.tallies = self.copiers.iter().map(Copier::tally).collect();
        }
        Turn::Copied
    }

    /// Tallies of the cores whose figures are others than those that the log has, as they will stand with what is unwritten.
    fn changed(&self) -> Vec<Tally> {
        let tallies = self.copiers.iter().map(|copier| {
            let Next { number: appended, visits } = copier.read;
            Tally { appended, visits, ..copier.tally() }
        });
        tallies.filter(|tally| !self.tallies.contains(tally)).collect()
    }

    /// Whether the log has all that is in the rings, and nobody can record more: a worker that hangs still may.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.copiers.iter().all(Copier::is_done)
    }

    /// Whether visits that find no room are lost to the disk.
    pub fn set_failing(&self, failing: bool) {
        self.copiers.iter().for_each(|copier| copier.ring.set_failing(failing));
    }
}
