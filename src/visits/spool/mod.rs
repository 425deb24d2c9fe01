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

pub mod copy;
pub mod disk;
pub mod format;
pub mod intern;
pub mod live;
pub mod log;
pub mod lost;
pub mod map;
pub mod read;
pub mod record;
pub mod recovery;
pub mod retain;
pub mod ring;
pub mod segment;

/// One start of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

/// A core of one start: what numbers are counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Source {
    pub epoch: Epoch,
    pub core: u16,
}

/// News of a core: its ring has records up to `to`, which is where to look. A hint, for nothing is lost without it.
/// Sent when 64 KiB are new or the oldest of it is 20 ms old, never for each visit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    pub core: u16,
    /// Numbers of records: the first one that is new, and the next one that will be written.
    pub from: u64,
    pub to: u64,
    /// Those of them that are visits of a link.
    pub visits: u32,
}

/// Chunks that may wait; what finds it full is found by the next poll.
pub const CHUNKS_MAX: usize = 1024;

/// Where a reader of the log stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The segment's number.
    pub segment: u64,
    /// Bytes from its beginning, at a block's.
    pub offset: u64,
}
