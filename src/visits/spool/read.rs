//! Reading the log: its blocks in order, from any place, up to what has been written.
//!
//! In: a folder of segments, a place. Out: blocks, and what was lost between them.
//! Never: waits; believes a block whose checksum is wrong.
//! At its limit: one block is in memory at a time, and the strings of one segment.

use std::io;
use std::path::Path;

use super::{Place, Source};
use crate::domain::time::UnixMillis;
use crate::visits::Dropped;

/// A reader of one spool's log.
#[derive(Debug)]
pub struct Reader;

/// What comes next in the log.
#[derive(Debug)]
pub enum Item<'a> {
    Records(Block<'a>),
    Tally(Tally),
    /// Records that the log has no more: damaged, or given up.
    Gap {
        source: Source,
        from: u64,
        to: u64,
        visits: u64,
        why: Dropped,
    },
}

/// Records of one core.
#[derive(Debug)]
pub struct Block<'a> {
    pub source: Source,
    /// The number of the first record.
    pub first: u64,
    pub count: u32,
    /// Those of them that are visits of a link.
    pub visits: u32,
    pub written_at: UnixMillis,
    /// The records, one behind the other, as `record::decode` reads them.
    pub records: &'a [u8],
    strings: &'a (),
}

/// How a core stood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    pub source: Source,
    /// Records so far.
    pub appended: u64,
    /// Visits of a link among them.
    pub visits: u64,
    pub ring_full: u64,
    pub spool_error: u64,
    /// Orphans that were not recorded.
    pub orphans: u64,
}

impl Block<'_> {
    /// The string with this id, as it was when the records were written; none for 0 and for what was damaged.
    #[must_use]
    pub fn string(&self, id: u32) -> Option<&[u8]> {
        let _ = (id, self.strings);
        todo!()
    }
}

impl Reader {
    /// Begins at the oldest segment in `dir`.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let _ = dir;
        todo!()
    }

    /// The next thing in the log; none at its end, where more may come later.
    pub fn next(&mut self) -> io::Result<Option<Item<'_>>> {
        todo!()
    }

    /// Where the next item begins.
    #[must_use]
    pub fn place(&self) -> Place {
        todo!()
    }

    /// Goes to the beginning of a segment, or of the next one that is there.
    pub fn seek(&mut self, segment: u64) {
        let _ = segment;
        todo!()
    }
}
