//! The store: where links live, and the feed of their changes.
//!
//! In: keys, links, changes. Out: what is durable, or an [`Error`] that says whether to try again.
//! Never: caches; decides who may; counts visits. Answers a write before it is on the disk.
//! At its limit: the queue of writes holds [`sqlite::WRITES_MAX`]; a write beyond it is refused as transient.
//!
//! The set of stores is closed, so it is an enum: a reader sees what there is.

pub mod row;
pub mod schema;
pub mod sqlite;

use crate::domain::key::{DomainId, Key};
use crate::domain::link::{Link, LinkId};
use crate::domain::time::UnixMillis;
use crate::guard::keys::KeyRecord;
use row::{Change, ChangeRow, Filter, Found, Inserted, NewLink};

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It may work in a moment: locked by another process, a full queue, a full disk.
    #[error("the store is not available: {0}")]
    Unavailable(String),
    /// It will not work again by itself.
    #[error("the store failed: {0}")]
    Broken(String),
    /// The file is not ours, newer than this program, or changed by hand.
    #[error("{0}")]
    Schema(String),
}

impl Error {
    /// Whether the same call may succeed later without anybody's help.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unavailable(_) => true,
            Self::Broken(_) | Self::Schema(_) => false,
        }
    }
}

pub type Result<T> = std::result::Result<T, Error>;

/// A clonable handle.
#[derive(Clone, Debug)]
pub enum Store {
    Sqlite(sqlite::Sqlite),
}

impl Store {
    /// What a person calls it.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Sqlite(sqlite) => format!("sqlite {}", sqlite.path().display()),
        }
    }

    /// What there is of `keys`, in their order. All are of one moment.
    /// The embedded store reads them on the caller's own thread: two switches of threads would cost several times the
    /// read. Only the look-up thread calls it.
    pub async fn look_up(&self, keys: Vec<Key>) -> Result<Vec<Found>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read_here(|db| sqlite::links::look_up(db, &keys)),
        }
    }

    /// Inserts links, durably when it returns. The outcomes stand in the order of `links`.
    pub async fn insert(&self, links: Vec<NewLink>, now: UnixMillis) -> Result<Vec<Inserted>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::links::insert(tx, &links, now)).await,
        }
    }

    /// Changes a link that is not deleted; none if there is no such link.
    pub async fn change(&self, key: Key, change: Change, now: UnixMillis) -> Result<Option<Link>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::links::change(tx, key, &change, now)).await,
        }
    }

    /// Takes one visit out of the link's `max_visits`; false if none is left.
    pub async fn take_visit(&self, key: Key, id: LinkId, now: UnixMillis) -> Result<bool> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::links::take_visit(tx, key, id, now)).await,
        }
    }

    /// One link with all that is known of it, deleted ones included.
    pub async fn link(&self, key: Key) -> Result<Option<Link>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(move |db| sqlite::links::link(db, key)).await,
        }
    }

    /// At most `limit` links after `after`, by id.
    pub async fn page(&self, filter: Filter, after: Option<LinkId>, limit: u32) -> Result<Vec<Link>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(move |db| sqlite::links::page(db, &filter, after, limit)).await,
        }
    }

    /// How many links `page` will go through in all.
    pub async fn count(&self, filter: Filter) -> Result<u64> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(move |db| sqlite::links::count(db, &filter)).await,
        }
    }

    /// The version of the last committed change.
    pub async fn position(&self) -> Result<u64> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(sqlite::links::position).await,
        }
    }

    /// At most `limit` changes after `position`, oldest first; none is ever committed before one that was read.
    pub async fn changes(&self, position: u64, limit: u32) -> Result<Vec<ChangeRow>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(move |db| sqlite::links::changes(db, position, limit)).await,
        }
    }

    /// The first of `count` numbers that nobody else is given; `known` is the first that the caller has not seen.
    pub async fn lease(&self, range: &'static str, known: u64, count: u64) -> Result<u64> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::settings::lease(tx, range, known, count)).await,
        }
    }

    /// The value of a setting; `value` becomes it if it has none.
    pub async fn settle(&self, name: &'static str, value: Vec<u8>) -> Result<Vec<u8>> {
        match self {
            Self::Sqlite(sqlite) => {
                let known = sqlite.read(move |db| sqlite::settings::get(db, name)).await?;
                match known {
                    Some(known) => Ok(known),
                    None => sqlite.write(move |tx| sqlite::settings::settle(tx, name, &value)).await,
                }
            }
        }
    }

    /// The numbers of `hosts`, given to those that have none.
    pub async fn number_domains(&self, hosts: Vec<String>) -> Result<Vec<DomainId>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::settings::number_domains(tx, &hosts)).await,
        }
    }

    /// All domains that ever had a number; the default domain's host is empty.
    pub async fn domains(&self) -> Result<Vec<(DomainId, String)>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(sqlite::settings::domains).await,
        }
    }

    pub async fn add_key(&self, key: KeyRecord) -> Result<()> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::settings::add_key(tx, &key)).await,
        }
    }

    pub async fn keys(&self) -> Result<Vec<KeyRecord>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(|db| sqlite::settings::keys(db, None)).await,
        }
    }

    pub async fn key(&self, id: String) -> Result<Option<KeyRecord>> {
        match self {
            Self::Sqlite(sqlite) => Ok(sqlite.read(move |db| sqlite::settings::keys(db, Some(&id))).await?.pop()),
        }
    }

    /// False if there is no such key, or it was revoked before.
    pub async fn revoke_key(&self, id: String, now: UnixMillis) -> Result<bool> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::settings::revoke_key(tx, &id, now)).await,
        }
    }

    /// Notes when a key was last used.
    pub async fn touch_key(&self, id: String, now: UnixMillis) -> Result<()> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::settings::touch_key(tx, &id, now)).await,
        }
    }
}
