//! Reading rollups and accounts, out of either store.
//!
//! In: a link, days. Out: its totals and its days, of one moment; what every instance has answered and stored.
//! Never: writes; makes `visits.db` (without one nothing was visited yet).
//! At its limit: [`DAYS_MAX`] days at a time; readings wait for room as those of the store do, and end within its time-out.

mod sqlite;

use super::rollup::Day;
use crate::domain::link::LinkId;
use crate::domain::time::UnixMillis;
use crate::domain::visit::Class;
use crate::store::Result;
use crate::store::Store;
use crate::store::postgres::Postgres;
use crate::store::row::Reading;
use crate::visits::sink::Account;
use crate::visits::{Dropped, Drops};

pub use sqlite::Sqlite;

/// Days that are read at a time: five years.
pub const DAYS_MAX: u16 = 1_827;

/// Visits by [`Class`], orphans left out.
pub type Kinds = [u64; Class::OF_LINKS];

/// All visits of a link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub kinds: Kinds,
    /// The first and the last click or tool.
    pub first_at: Option<UnixMillis>,
    pub last_at: Option<UnixMillis>,
    /// For `stats::sketch`.
    pub sketch: Vec<u8>,
}

/// The visits of a link on a day (UTC).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DayRow {
    pub day: Day,
    pub kinds: Kinds,
    /// Empty if it was not asked for.
    pub sketch: Vec<u8>,
}

/// Which days, and what of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Days {
    /// The first and the last one.
    pub from: Day,
    pub to: Day,
    /// Up to 8 KiB a day: a document without a range does without.
    pub sketches: bool,
}

impl Days {
    /// The newest [`DAYS_MAX`], without sketches.
    pub const ALL: Self = Self { from: Day::MIN, to: Day::MAX, sketches: false };
}

/// What is known of a link's visits. A link without any has zeros.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkRows {
    pub totals: Totals,
    /// Newest first; those without visits are left out.
    pub days: Vec<DayRow>,
}

/// Where stats are read from.
#[derive(Clone, Debug)]
pub enum Stats {
    Sqlite(Sqlite),
    Postgres(Postgres),
}

impl Stats {
    /// Those of the store's links; the embedded store has them in `visits.db` beside it.
    #[must_use]
    pub fn of(store: &Store) -> Self {
        match store {
            Store::Sqlite(links) => Self::Sqlite(Sqlite::beside(links.path())),
            Store::Postgres(postgres) => Self::Postgres(postgres.clone()),
        }
    }

    pub async fn link(&self, link: LinkId, days: Days, reading: Reading) -> Result<LinkRows> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(move |db| sqlite::link(db, link, days)).await,
            Self::Postgres(postgres) => postgres.link_visits(link, days, reading).await,
        }
    }

    /// The sums of every instance that ever stored visits, by name.
    pub async fn accounts(&self) -> Result<Vec<Account>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(sqlite::accounts).await,
            Self::Postgres(postgres) => postgres.accounts().await,
        }
    }
}

/// The account of each instance: its sums, and the drops by reason, both ordered by instance.
pub(crate) fn accounts(sums: Vec<Account>, drops: Vec<(String, String, u64)>) -> Vec<Account> {
    let mut sums = sums;
    for (instance, reason, visits) in drops {
        let place = Dropped::ALL.iter().position(|dropped| dropped.name() == reason);
        // A reason that only a newer program knows still adds up: it shows as pending.
        if let (Some(account), Some(place)) = (sums.iter_mut().find(|sum| sum.instance == instance), place) {
            account.drops[place] += visits;
        }
    }
    sums
}

/// What is neither stored nor given up.
#[must_use]
pub fn pending(answered: u64, stored: u64, drops: &Drops) -> u64 {
    answered.saturating_sub(stored).saturating_sub(drops.iter().sum())
}
