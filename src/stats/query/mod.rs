//! Reading rollups and accounts, out of either store.
//!
//! In: a link, days. Out: its totals and its days, of one moment; what every instance has answered and stored.
//! Never: writes; makes `visits.db` (without one nothing was visited yet).
//! At its limit: [`crate::store::visited::DAYS_MAX`] days at a time; readings wait for room as those of the store do, and end within its time-out.

mod moving;
pub(crate) mod sqlite;

use crate::domain::link::LinkId;
use crate::domain::visit::Drops;
use crate::store::postgres::Postgres;
use crate::store::row::Reading;
use crate::store::visited::{Account, Days, LinkRows};
use crate::store::{Result, Store};

pub use sqlite::Sqlite;

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

    /// All visits of links that are added up, of every kind.
    pub async fn sum(&self) -> Result<u64> {
        match self {
            Self::Sqlite(sqlite) => sqlite.sum().await,
            Self::Postgres(postgres) => postgres.sum_of_visits().await,
        }
    }
}

/// What is neither stored nor given up.
#[must_use]
pub fn pending(answered: u64, stored: u64, drops: &Drops) -> u64 {
    answered.saturating_sub(stored).saturating_sub(drops.iter().sum())
}
