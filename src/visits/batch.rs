//! Batches: what goes into the store in one transaction, made of the spool alone.
//!
//! In: blocks of the log. Out: rows, rollups and positions. Pure: the same blocks make the same batch.
//! Never: does IO; looks at a clock (absurd times are clamped by when the log was written).
//! At its limit: [`ROWS_MAX`] rows; what comes after is the next batch's.

use std::net::IpAddr;
use std::sync::Arc;

use super::Drops;
use super::agents::Agent;
use super::spool::Source;
use super::spool::read::Tally;
use crate::domain::link::LinkId;
use crate::domain::time::UnixMillis;
use crate::domain::visit::Class;
use crate::stats::rollup::Rollup;

/// Rows of one batch.
pub const ROWS_MAX: usize = 100_000;

/// One transaction.
#[derive(Debug, Default)]
pub struct Batch {
    /// One for each source, in order: what moves.
    pub ranges: Vec<Range>,
    /// By day, then in the order of the spool. Empty with `visits.raw = false`.
    pub rows: Vec<Row>,
    pub orphans: Vec<Orphan>,
    /// By link and day.
    pub rollups: Vec<Rollup>,
    /// Agents and referrers that this process has not stored yet, by id.
    pub agents: Vec<Arc<Agent>>,
    pub referrers: Vec<Arc<Referrer>>,
    /// The last one of each source.
    pub tallies: Vec<Tally>,
}

/// The records of a source that a batch stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub source: Source,
    /// The number of the first record, and of the one behind the last: the position before and after.
    pub from: u64,
    pub to: u64,
    /// Visits of a link that it stores.
    pub stored: u64,
    /// Those that it gives up.
    pub drops: Drops,
}

/// A visit of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub link: LinkId,
    pub at: UnixMillis,
    pub epoch: u64,
    /// The record's core and number: for the dead-letter file.
    pub core: u16,
    pub number: u64,
    pub class: Class,
    pub address: Option<IpAddr>,
    pub visitor: u64,
    /// Ids of agent and referrer; 0 = none.
    pub agent: i64,
    pub referrer: i64,
    pub request_id: RequestId,
}

/// As the store is told it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestId {
    None,
    Packed(u128),
    Written { len: u8, bytes: [u8; super::spool::format::REQUEST_ID_BYTES_MAX] },
}

/// A visit of nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orphan {
    pub domain: u16,
    pub code: String,
    pub row: Row,
}

/// Where visitors come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Referrer {
    /// As [`Agent::id`].
    pub id: i64,
    /// As it was written, or its host once the day's bound is reached.
    pub text: String,
    /// The host, in lower case, without `www.`; the text itself where there is none.
    pub host: String,
}
