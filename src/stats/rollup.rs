//! Rollups: what a batch adds to a link on a day.
//!
//! In: the rows of a batch. Out: one [`Rollup`] for each link and day, by link and day. Pure.

use super::sketch::Sketch;
use crate::domain::link::LinkId;
use crate::domain::time::UnixMillis;
use crate::domain::visit::Class;

/// Days since 1970, UTC.
pub type Day = i32;

pub const DAY_MS: i64 = 86_400_000;

/// What is added.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollup {
    pub link: LinkId,
    pub day: Day,
    /// By [`Class`], orphans left out.
    pub counts: [u64; Class::OF_LINKS],
    /// The first and the last click or tool; none without one.
    pub first_at: Option<UnixMillis>,
    pub last_at: Option<UnixMillis>,
    pub sketch: Sketch,
}

/// The day of a moment.
#[must_use]
pub fn day(at: UnixMillis) -> Day {
    i32::try_from(at.0.div_euclid(DAY_MS)).unwrap_or(0)
}
