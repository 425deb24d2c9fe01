//! Sinks: where batches go. Links and visits are always in the same kind of store.
//!
//! In: a [`Batch`]. Out: it is stored whole, with its positions, or not at all, and the writer knows which of the two, or
//! that it must ask.
//! Never: tries again by itself; decides what a batch holds.
//! At its limit: every call ends within its time-out, as [`Failure::Away`] or [`Failure::Unknown`].

pub mod postgres;
pub mod sqlite;

use super::Drops;
use super::batch::Batch;
use super::spool::{Epoch, Source};
use crate::domain::time::UnixMillis;

/// Why a batch was not stored, as far as is known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Nothing was stored. It may work later.
    #[error("the store is not available: {0}")]
    Away(String),
    /// It may have been stored: ask for the positions.
    #[error("whether the store has it is not known: {0}")]
    Unknown(String),
    /// A position was not where the batch begins. Nothing was stored.
    #[error("a position has moved")]
    Moved,
    /// The store refuses a row's data (SQLSTATE class 22 or 23). Nothing was stored.
    #[error("the store refuses a row: {0}")]
    Refused(String),
    /// It will not work by itself. Nothing was stored.
    #[error("the store failed: {0}")]
    Broken(String),
}

/// What the store has of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    pub source: Source,
    /// The number of the next record that it wants.
    pub next: u64,
    /// Visits of a link that it stored.
    pub stored: u64,
    pub drops: Drops,
}

/// How much longer than visits their agents and referrers are kept: they are told once a day, by the clock of the log, and
/// deleted by others.
const TEXTS_KEPT_DAYS: i64 = 2;

/// Whether [`Sink::housekeep`] has done all there was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tidied {
    All,
    /// Its share of time is over: there is more, for the next rest.
    Part,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a process has one")]
pub enum Sink {
    Sqlite(sqlite::Sqlite),
    Postgres(postgres::Postgres),
    /// A store in memory, whose answers a test chooses.
    #[cfg(test)]
    Model(super::writer::model::Store),
}

impl Sink {
    /// The positions of all sources of `epochs`; a source that the store does not know is at 0.
    pub async fn positions(&mut self, epochs: &[Epoch]) -> Result<Vec<Position>, Failure> {
        match self {
            Self::Sqlite(sink) => sink.positions(epochs).await,
            Self::Postgres(sink) => sink.positions(epochs).await,
            #[cfg(test)]
            Self::Model(sink) => sink.positions(epochs),
        }
    }

    pub async fn store(&mut self, batch: &Batch) -> Result<(), Failure> {
        match self {
            Self::Sqlite(sink) => sink.store(batch).await,
            Self::Postgres(sink) => sink.store(batch).await,
            #[cfg(test)]
            Self::Model(sink) => sink.store(batch),
        }
    }

    /// What has to be done from time to time: partitions ahead, what is too old goes. What blocks the writer's thread does
    /// so for a fraction of a second.
    pub async fn housekeep(&mut self, now: UnixMillis) -> Result<Tidied, Failure> {
        match self {
            Self::Sqlite(sink) => sink.housekeep(now).await,
            Self::Postgres(sink) => sink.housekeep(now).await,
            #[cfg(test)]
            Self::Model(sink) => sink.housekeep(now),
        }
    }
}

/// What every sink is told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This instance's name, which its positions carry.
    pub instance: String,
    pub keep: std::time::Duration,
}
