//! Copying: what is new in a ring becomes a piece of the log.
//!
//! In: a ring. Out: pieces: records as they lay in the ring, with all strings that they use.
//! Never: takes from a ring what the log does not have; reads a string's bytes twice while they stand.
//! At its limit: [`PIECE_BYTES_MAX`] of records at once; the rest comes with the next turn.

use std::sync::Arc;

use super::read::{Next, Tally};
use super::ring::{Read, RingReader};
use super::segment;
use crate::domain::time::UnixMillis;

/// Bytes of records that one turn takes out of one ring: 25 MB/s at 20 ms.
pub const PIECE_BYTES_MAX: usize = 512 << 10;

/// What one block of records is made of. It knows all its strings, so that it can be written to any segment.
#[derive(Clone, Debug)]
pub struct Piece {
    pub core: u16,
    /// The number of the first record, and the visits before it.
    pub begin: Next,
    pub count: u32,
    pub visits: u32,
    pub written_at: UnixMillis,
    pub records: Vec<u8>,
    pub strings: Vec<(u32, Arc<[u8]>)>,
}

impl Piece {
    /// Bytes that it holds in memory, near enough.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.records.len() + self.strings.len() * 24
    }

    /// Leaves out what comes before `next`.
    fn skip(&mut self, next: Next) {
        let had = next.number.saturating_sub(self.begin.number).min(u64::from(self.count));
        let (bytes, visits) = segment::measure(&self.records, had);
        self.records.drain(..bytes);
        self.count -= u32::try_from(had).unwrap_or(self.count);
        self.visits -= u32::try_from(visits).unwrap_or(self.visits).min(self.visits);
        self.begin = Next { number: self.begin.number + had, visits: self.begin.visits + visits };
    }
}

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

    #[must_use]
    pub fn ring(&self) -> &RingReader {
        &self.ring
    }

    /// Where the log stands.
    #[must_use]
    pub fn next(&self) -> Next {
        self.next
    }

    /// What is new; it counts as had once it is taken.
    pub fn read(&mut self, now: UnixMillis) -> Option<Piece> {
        let mut records = Vec::new();
        let read = self.ring.read(&mut records, PIECE_BYTES_MAX);
        self.piece(read, records, now)
    }

    /// The same after a crash (see [`RingReader::recover`]), without what the log has already.
    pub fn recover(&mut self, now: UnixMillis) -> Option<Piece> {
        let mut records = Vec::new();
        let read = self.ring.recover(&mut records, PIECE_BYTES_MAX);
        self.piece(read, records, now)
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
        };
        if piece.begin.number < self.next.number {
            piece.begin.visits = 0;
            piece.skip(self.next);
            piece.begin = self.next;
        }
        self.read = Next {
            number: piece.begin.number + u64::from(piece.count),
            visits: piece.begin.visits + u64::from(piece.visits),
        };
        self.forget_old_strings();
        self.pieces += 1;
        for record in segment::glance(&piece.records) {
            for id in record.strings {
                self.string(id, &mut piece.strings);
            }
        }
        Some(piece)
    }

    /// Adds the string with this id to a piece's, once.
    fn string(&mut self, id: u32, strings: &mut Vec<(u32, Arc<[u8]>)>) {
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
        }
        strings.extend(known.string.clone().map(|string| (id, string)));
    }

    /// A half of the strings begins anew only when every record that used it was taken: after a read, all that was read
    /// uses the strings of now.
    fn forget_old_strings(&mut self) {
        let generations = self.ring.generations();
        for half in 0..2 {
            if generations[half] != self.generations[half] {
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
        self.next = self.read;
    }

    /// How the core stands as the log has it.
    #[must_use]
    pub fn tally(&self) -> Tally {
        let figures = self.ring.figures();
        Tally {
            source: self.ring.about().source,
            appended: self.next.number,
            visits: self.next.visits,
            ring_full: figures.ring_full,
            spool_error: figures.spool_error,
            orphans: figures.orphans,
        }
    }
}
