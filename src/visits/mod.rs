//! Visits: every redirect to a target that leaves is one, stored exactly once.
//!
//! In: a [`Visit`] on a worker, before its redirect leaves. Out: rows and rollups in the store, and figures that add up:
//! `answered = stored + pending + dropped(reason)`, per instance.
//! Never: makes a redirect wait, allocates for one, or tells the store anything twice.
//! At its limit: redirects go on, and each visit that is given up is counted by its reason.
//!
//! ```text
//!  front, per core                 back: the spool's thread               the writer's thread
//!  Recorder ─▶ spool::ring ──────▶ spool::copy ─▶ spool::log ───────────▶ spool::read ─▶ batch ─▶ sink ─▶ the store
//!   (intern)   tmpfs, this core's   each 20 ms    DATA/spool, one of all    (agents)     rows      compare-and-set,
//!       └─ Chunk ─ crossbeam ──────▶ (where to look)  ▲ fdatasync each        │          rollups   rows, rollups
//!                                                     │ spool.sync           └─ refused rows ─▶ DATA/dead-letters.ndjson
//!                                            spool::recovery (rings of a start that was killed)
//! ```
//!
//! What may be lost, where, and what shows it:
//!
//! | what happens | what is lost | counted as |
//! |---|---|---|
//! | `kill -9`, a panic, out of memory | nothing: ring and page cache outlive the process. A visit may be stored whose redirect was in flight and never arrived | – |
//! | power cut, kernel crash | visits of the last `spool.sync`, one `fdatasync` and 20 ms | nothing can count them: neither `answered` nor stored |
//! | back hangs, or copies more slowly than visits come, until a ring is full | the visits that find no room in it | `ring_full` |
//! | the disk of the log fails or is full (a new segment is tried each second), until a ring is full | the same | `spool_error` |
//! | the store is away until the log has `spool.max_bytes` | the oldest segments that were never sent; per link in `DATA/spool/lost.ndjson` | `spool_full` |
//! | a segment was damaged on the disk | its records whose checksum is wrong, and what stood behind a broken length | `corrupt` |
//! | the store lost commits (failover), and their segments are no longer kept (`spool.keep`) | the visits between | `failover_gap` |
//! | the store refuses a row (SQLSTATE 22, 23) | its row; the visit lies in `DATA/dead-letters.ndjson` | `refused` |
//! | `visits.bots = "drop"` | visits of declared bots, on purpose | `bot` |
//! | a store of visits that cannot be asked for its key at the first start | nothing but distinctness: those visits count for no unique visitor | – |
//!
//! Positions decide, and nothing else does. A record's place is `(epoch, core, number)`: each start draws a random epoch,
//! and numbers count the records of a core from 0. The store keeps for each `(epoch, core)` the number of the next record
//! that it wants, and moves it in the transaction that stores the records. Whoever replays anything, however often and
//! from wherever, finds its position moved and skips.
//!
//! [`spool::format`] has every byte that lies on tmpfs and disk.

pub mod agents;
pub mod batch;
pub mod sink;
pub mod spool;
pub mod visitor;
pub mod visitor_keys;
pub mod writer;

use crate::domain::visit::{Kind, Of, Visit};
use crate::metrics::Counter;

/// What this core has answered.
#[derive(Debug, Default)]
pub struct Counts {
    pub click: Counter,
    pub head: Counter,
    pub prefetch: Counter,
    /// Unknown and dead codes, and fallbacks: answered, but no visit of a link.
    pub orphan: Counter,
}

impl Counts {
    /// Redirects to a target that left.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.click.get() + self.head.get() + self.prefetch.get()
    }
}

/// Why a visit is not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dropped {
    RingFull,
    SpoolError,
    SpoolFull,
    Corrupt,
    FailoverGap,
    Refused,
    Bot,
}

impl Dropped {
    pub const ALL: [Self; 7] =
        [Self::RingFull, Self::SpoolError, Self::SpoolFull, Self::Corrupt, Self::FailoverGap, Self::Refused, Self::Bot];

    /// As metrics, the accounting and the store name it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::RingFull => "ring_full",
            Self::SpoolError => "spool_error",
            Self::SpoolFull => "spool_full",
            Self::Corrupt => "corrupt",
            Self::FailoverGap => "failover_gap",
            Self::Refused => "refused",
            Self::Bot => "bot",
        }
    }
}

/// Visits that are given up, by [`Dropped::ALL`].
pub type Drops = [u64; Dropped::ALL.len()];

/// A core's way to record: what `http` knows of visits.
#[derive(Clone, Copy, Debug)]
pub struct Recorder<'a>(pub &'a Counts);

impl Recorder<'_> {
    pub fn record(&self, visit: &Visit<'_>) {
        match visit.of {
            Of::Link(_, Kind::Click) => self.0.click.add(1),
            Of::Link(_, Kind::Head) => self.0.head.add(1),
            Of::Link(_, Kind::Prefetch) => self.0.prefetch.add(1),
            Of::Orphan(_) => self.0.orphan.add(1),
        }
    }
}
