//! Pieces: what `copy` takes out of a ring at once, and `log` writes as one block.
//!
//! In: records as they lay in the ring, and their strings. Out: the same, whole or from a number on. Pure.
//! Never: knows where it is written. At its limit: [`super::copy::PIECE_BYTES_MAX`] of records.

use std::sync::Arc;

use super::read::Next;
use super::segment;
use crate::domain::time::UnixMillis;

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
    /// Of the strings that no piece before it has.
    pub strings_bytes_new: usize,
}

impl Piece {
    /// Bytes that it holds in memory, near enough.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.records.len() + self.strings.len() * 24 + self.strings_bytes_new
    }

    /// What comes next behind it.
    #[must_use]
    pub fn end(&self) -> Next {
        Next { number: self.begin.number + u64::from(self.count), visits: self.begin.visits + u64::from(self.visits) }
    }

    /// Leaves out what comes before `next`.
    pub fn skip_to(&mut self, next: Next) {
        let had = next.number.saturating_sub(self.begin.number).min(u64::from(self.count));
        let (bytes, visits) = segment::measure(&self.records, had);
        self.records.drain(..bytes);
        self.count -= u32::try_from(had).unwrap_or(self.count);
        self.visits -= u32::try_from(visits).unwrap_or(self.visits).min(self.visits);
        self.begin = next;
    }
}
