//! The store: where links live, and the feed of their changes.
//!
//! In: keys, links, changes. Out: what is durable, or an [`Error`] that says whether to try again.
//! Never: caches; decides who may; counts visits. Answers a write before it is on the disk.
//! At its limit: writes wait in a bounded queue, reads for a connection; what finds no room is refused as transient.
//!
//! The set of stores is closed, so it is an enum: a reader sees what there is.

pub mod postgres;
pub mod row;
pub mod schema;
pub mod sqlite;
pub mod visited;

use crate::domain::key::{DomainId, Key};
use crate::domain::link::{Link, LinkId};
use crate::domain::time::UnixMillis;
use crate::guard::keys::KeyRecord;
use row::{
    Change, ChangeRow, Filter, Found, Inserted, InstanceRow, NewLink, Position, QuotaAsk, Reading, Rest, Taken,
    WarmReport, WarmRequest, WarmWhat, WorkerLease,
};

/// Why the store did not do it. Those who shared a transaction are told the same.
#[derive(Clone, Debug, thiserror::Error)]
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
    Postgres(postgres::Postgres),
}

impl Store {
    /// What a person calls it.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Sqlite(sqlite) => format!("sqlite {}", sqlite.path().display()),
            Self::Postgres(postgres) => postgres.describe(),
        }
    }

    /// What there is of `keys`, in their order. All are of one moment.
    /// The embedded store reads them on the caller's own thread: two switches of threads would cost several times the
    /// read. Whoever wants many keys asks for a few at a time.
    pub async fn look_up(&self, keys: Vec<Key>) -> Result<Vec<Found>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read_here(|db| sqlite::links::look_up(db, &keys)),
            Self::Postgres(postgres) => postgres.look_up(&keys).await,
        }
    }

    /// Inserts links, durably when it returns. The outcomes stand in the order of `links`. An error means that nothing is
    /// known to be done; what fails after a part was done is [`Inserted::Failed`] (of Postgres alone).
    pub async fn insert(&self, links: Vec<NewLink>, now: UnixMillis) -> Result<Vec<Inserted>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::links::insert(tx, &links, now)).await,
            Self::Postgres(postgres) => postgres.insert(links, now).await,
        }
    }

    /// Changes a link that is not deleted; none if there is no such link.
    pub async fn change(&self, key: Key, change: Change, now: UnixMillis) -> Result<Option<Link>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::links::change(tx, key, &change, now)).await,
            Self::Postgres(postgres) => postgres.change(key, &change, now).await,
        }
    }

    /// Takes visits out of the link's `max_visits`, and gives back what is left of leases.
    ///
    /// Of many instances each leases some at a time: at most what it wants, and of what is left a sixteenth or one. What is
    /// leased counts as used, so that never more than `max_visits` are answered. A lease that its holder settles gives
    /// back its rest, so that all of them are, if no holder dies. One that dies takes along what it held of the link: at
    /// most 256 visits, and a sixteenth of what was left when it leased them, and of each question whose answer it had not
    /// heard a single one. Whoever did not hear settles that lease until its question cannot come any more.
    ///
    /// The embedded store has one process and a commit on its own disk: it grants to those who wait, and leases nothing.
    /// What nobody spends of that is lost.
    pub async fn take_visits(&self, ask: QuotaAsk, now: UnixMillis) -> Result<Taken> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::links::take_visits(tx, &ask, now)).await,
            Self::Postgres(postgres) => postgres.take_visits(ask, now).await,
        }
    }

    /// One link with all that is known of it, deleted ones included.
    pub async fn link(&self, key: Key) -> Result<Option<Link>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(move |db| sqlite::links::link(db, key)).await,
            Self::Postgres(postgres) => postgres.link(key).await,
        }
    }

    /// At most `limit` links after `after`, by id.
    pub async fn page(&self, filter: Filter, after: Option<LinkId>, limit: u32, reading: Reading) -> Result<Vec<Link>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(move |db| sqlite::links::page(db, &filter, after, limit)).await,
            Self::Postgres(postgres) => postgres.page(&filter, after, limit, reading).await,
        }
    }

    /// How many links `page` will go through in all.
    pub async fn count(&self, filter: Filter, reading: Reading) -> Result<u64> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(move |db| sqlite::links::count(db, &filter)).await,
            Self::Postgres(postgres) => postgres.count(&filter, reading).await,
        }
    }

    /// Where the feed stands: what every poll reads.
    pub async fn position(&self) -> Result<Position> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(sqlite::links::position).await,
            Self::Postgres(postgres) => postgres.position().await,
        }
    }

    /// At most `limit` changes after `position`, oldest first; none is ever committed before one that was read.
    pub async fn changes(&self, position: u64, limit: u32) -> Result<Vec<ChangeRow>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(move |db| sqlite::links::changes(db, position, limit)).await,
            Self::Postgres(postgres) => postgres.changes(position, limit).await,
        }
    }

    /// The first of `count` numbers that nobody else is given; `known` is the first that the caller has not seen.
    pub async fn lease(&self, range: &'static str, known: u64, count: u64) -> Result<u64> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::settings::lease(tx, range, known, count)).await,
            Self::Postgres(postgres) => postgres.lease(range, known, count).await,
        }
    }

    /// The value of a setting; `value` becomes it if it has none.
    pub async fn settle(&self, name: &str, value: Vec<u8>) -> Result<Vec<u8>> {
        match self {
            Self::Sqlite(sqlite) => {
                let asked = name.to_owned();
                let known = sqlite.read(move |db| sqlite::settings::get(db, &asked)).await?;
                let name = name.to_owned();
                match known {
                    Some(known) => Ok(known),
                    None => sqlite.write(move |tx| sqlite::settings::settle(tx, &name, &value)).await,
                }
            }
            Self::Postgres(postgres) => postgres.settle(name, &value).await,
        }
    }

    /// Deletes the settings from `from` on and before `before`, by the bytes of their names.
    pub async fn forget(&self, from: String, before: String) -> Result<()> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::settings::forget(tx, &from, &before)).await,
            Self::Postgres(postgres) => postgres.forget(&from, &before).await,
        }
    }

    /// The numbers of `hosts`, given to those that have none.
    pub async fn number_domains(&self, hosts: Vec<String>) -> Result<Vec<DomainId>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::settings::number_domains(tx, &hosts)).await,
            Self::Postgres(postgres) => postgres.number_domains(&hosts).await,
        }
    }

    /// All domains that ever had a number; the default domain's host is empty.
    pub async fn domains(&self) -> Result<Vec<(DomainId, String)>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(sqlite::settings::domains).await,
            Self::Postgres(postgres) => postgres.domains().await,
        }
    }

    pub async fn add_key(&self, key: KeyRecord) -> Result<()> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::settings::add_key(tx, &key)).await,
            Self::Postgres(postgres) => postgres.add_key(&key).await,
        }
    }

    pub async fn keys(&self) -> Result<Vec<KeyRecord>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(|db| sqlite::settings::keys(db, None)).await,
            Self::Postgres(postgres) => postgres.keys(None).await,
        }
    }

    pub async fn key(&self, id: String) -> Result<Option<KeyRecord>> {
        match self {
            Self::Sqlite(sqlite) => Ok(sqlite.read(move |db| sqlite::settings::keys(db, Some(&id))).await?.pop()),
            Self::Postgres(postgres) => Ok(postgres.keys(Some(&id)).await?.pop()),
        }
    }

    /// False if there is no such key, or it was revoked before.
    pub async fn revoke_key(&self, id: String, now: UnixMillis) -> Result<bool> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::settings::revoke_key(tx, &id, now)).await,
            Self::Postgres(postgres) => postgres.revoke_key(&id, now).await,
        }
    }

    /// Notes when a key was last used.
    pub async fn touch_key(&self, id: String, now: UnixMillis) -> Result<()> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::settings::touch_key(tx, &id, now)).await,
            Self::Postgres(postgres) => postgres.touch_key(&id, now).await,
        }
    }

    /// At most the last `limit` changes that are no creations, oldest first.
    pub async fn edits(&self, limit: u32) -> Result<Vec<ChangeRow>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(move |db| sqlite::links::edits(db, limit)).await,
            Self::Postgres(postgres) => postgres.edits(limit).await,
        }
    }

    /// Begins a new generation if it is still `seen`; returns the present one. Leases of worker ids move past whatever
    /// the lost ones may have given.
    pub async fn begin_generation(&self, seen: u64) -> Result<u64> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::leases::begin_generation(tx, seen)).await,
            Self::Postgres(postgres) => postgres.begin_generation(seen).await,
        }
    }

    /// Leases a worker id for `span_ms`: `wanted`, or one that is free. None if it is somebody else's, or none is free.
    /// `holder` gets its own again. `now_ms` is the caller's clock, from which the milliseconds are leased.
    pub async fn lease_worker(
        &self,
        holder: String,
        wanted: Option<u16>,
        now_ms: u64,
        span_ms: u64,
    ) -> Result<Option<WorkerLease>> {
        match self {
            Self::Sqlite(sqlite) => {
                sqlite.write(move |tx| sqlite::leases::lease_worker(tx, &holder, wanted, now_ms, span_ms)).await
            }
            Self::Postgres(postgres) => postgres.lease_worker(&holder, wanted, now_ms, span_ms).await,
        }
    }

    /// Prolongs a lease by `span_ms` from now and from `now_ms`; none if it is somebody else's by now.
    pub async fn renew_worker(&self, lease: WorkerLease, now_ms: u64, span_ms: u64) -> Result<Option<WorkerLease>> {
        match self {
            Self::Sqlite(sqlite) => {
                sqlite.write(move |tx| sqlite::leases::renew_worker(tx, &lease, now_ms, span_ms)).await
            }
            Self::Postgres(postgres) => postgres.renew_worker(&lease, now_ms, span_ms).await,
        }
    }

    /// Gives a lease back; `used_ms` is the last millisecond that was used of it.
    pub async fn release_worker(&self, lease: WorkerLease, used_ms: u64) -> Result<()> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::leases::release_worker(tx, &lease, used_ms)).await,
            Self::Postgres(postgres) => postgres.release_worker(&lease, used_ms).await,
        }
    }

    /// Asks every instance to load links into its memory; returns the request's number.
    pub async fn ask_warm(&self, what: WarmWhat, now: UnixMillis) -> Result<u64> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::warm::ask(tx, &what, now)).await,
            Self::Postgres(postgres) => postgres.ask_warm(&what, now).await,
        }
    }

    /// The requests after `number`, oldest first; those older than a day are gone.
    pub async fn warm_requests(&self, number: u64) -> Result<Vec<WarmRequest>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(move |db| sqlite::warm::requests(db, number)).await,
            Self::Postgres(postgres) => postgres.warm_requests(number).await,
        }
    }

    /// The keys that `what` means, at most `limit`: those of a tag by their ids; the most visited first, by clicks, tools and
    /// what an import brought along.
    pub async fn keys_of(&self, what: WarmWhat, limit: u32) -> Result<Vec<Key>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.keys_of(what, limit).await,
            Self::Postgres(postgres) => postgres.keys_of(&what, limit).await,
        }
    }

    /// Says what came of a request on an instance.
    pub async fn report_warm(&self, number: u64, report: WarmReport, now: UnixMillis) -> Result<()> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::warm::report(tx, number, &report, now)).await,
            Self::Postgres(postgres) => postgres.report_warm(number, &report, now).await,
        }
    }

    pub async fn warm_reports(&self, number: u64) -> Result<Vec<WarmReport>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(move |db| sqlite::warm::reports(db, number)).await,
            Self::Postgres(postgres) => postgres.warm_reports(number).await,
        }
    }

    /// Pins keys in every instance's memory, or no longer; returns how many were not so before.
    pub async fn pin(&self, keys: Vec<Key>, pinned: bool, now: UnixMillis) -> Result<u64> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::warm::pin(tx, &keys, pinned, now)).await,
            Self::Postgres(postgres) => postgres.pin(&keys, pinned, now).await,
        }
    }

    pub async fn pins(&self) -> Result<Vec<Key>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(sqlite::warm::pins).await,
            Self::Postgres(postgres) => postgres.pins().await,
        }
    }

    /// Says that an instance runs, or that it has ended.
    pub async fn present(&self, instance: String, runs: bool, now: UnixMillis) -> Result<()> {
        match self {
            Self::Sqlite(sqlite) => sqlite.write(move |tx| sqlite::warm::present(tx, &instance, runs, now)).await,
            Self::Postgres(postgres) => postgres.present(&instance, runs, now).await,
        }
    }

    /// The instances that have not said that they ended, with when they were last heard of.
    pub async fn instances(&self) -> Result<Vec<InstanceRow>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(sqlite::warm::instances).await,
            Self::Postgres(postgres) => postgres.instances().await,
        }
    }

    /// Everything beside links and their history: what moves to another store with them.
    pub async fn rest(&self) -> Result<Rest> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(sqlite::moving::rest).await,
            Self::Postgres(_) => Err(Error::Schema("links move out of an embedded store alone".into())),
        }
    }

    /// At most `limit` links after `after` by id, deleted ones included.
    pub async fn all(&self, after: LinkId, limit: u32) -> Result<Vec<Link>> {
        match self {
            Self::Sqlite(sqlite) => sqlite.read(move |db| sqlite::moving::all(db, after, limit)).await,
            Self::Postgres(_) => Err(Error::Schema("links move out of an embedded store alone".into())),
        }
    }

    /// Takes over links as they are, ids, deleted ones and all; what is there already is left alone. Returns the
    /// highest id that was taken over so far.
    pub async fn adopt(&self, links: Vec<Link>) -> Result<LinkId> {
        match self {
            Self::Sqlite(_) => Err(Error::Schema("links move into Postgres alone: name it with --postgres".into())),
            Self::Postgres(postgres) => postgres.adopt(&links).await,
        }
    }

    /// Takes over what [`Store::rest`] gave: before the links (`done` false) and once more when all are there. Refuses a
    /// store that has links of its own or of another move. Returns the highest id that was taken over so far, and whether
    /// the move was done before this call.
    pub async fn adopt_rest(&self, rest: Rest, done: bool) -> Result<(LinkId, bool)> {
        match self {
            Self::Sqlite(_) => Err(Error::Schema("links move into Postgres alone: name it with --postgres".into())),
            Self::Postgres(postgres) => postgres.adopt_rest(&rest, done).await,
        }
    }
}
