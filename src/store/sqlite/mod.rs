//! The embedded store: one SQLite file with a write-ahead log.
//!
//! One thread writes. It takes what waits, runs it in one transaction, commits once, and only then answers:
//! creates that come together share a commit (and its `fdatasync`). Each piece of work has a savepoint of its own,
//! so a refused one undoes nothing of its neighbours. Readers have connections of their own and wait for nobody.
//!
//! Other processes may read and write the same file at the same time; they are waited for, up to [`file::BUSY_MS`].

pub mod file;
pub mod leases;
pub mod links;
pub mod moving;
pub mod settings;
pub mod warm;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, TrySendError};
use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};
use tokio::sync::oneshot;

use self::file::{Readers, connect};
use super::row::WarmWhat;
use super::schema::Migration;
use super::{Error, Result};
use crate::domain::key::Key;

/// Writes that may wait for the writer.
pub const WRITES_MAX: usize = 4096;
/// Connections that read at once, the look-up thread's apart.
const READERS_MAX: usize = 8;
/// Writes that share a commit.
const GROUP_MAX: usize = 512;

pub const MIGRATIONS: [Migration; 2] = [
    Migration { number: 1, name: "links", sql: include_str!("../../../migrations/sqlite/0001_links.sql") },
    Migration { number: 2, name: "instances", sql: include_str!("../../../migrations/sqlite/0002_instances.sql") },
];
/// Its `application_id` is "wpst".
const KIND: file::Kind = file::Kind { application_id: 0x7770_7374, migrations: &MIGRATIONS, prepare_to_write };
/// The file of visits, beside that of links.
pub const VISITS_FILE: &str = "visits.db";

/// A handle; the writer ends when the last one is dropped.
#[derive(Clone)]
pub struct Sqlite(Arc<Shared>);

struct Shared {
    path: PathBuf,
    writes: Sender<Box<dyn Job>>,
    readers: Arc<Readers>,
}

/// A piece of work and who waits for it: run once, then told how the commit went.
trait Job: Send {
    fn run(&mut self, writing: &mut Writing<'_>);
    fn answer(self: Box<Self>, committed: std::result::Result<(), &Error>);
}

struct Work<F, T> {
    work: Option<F>,
    outcome: Option<rusqlite::Result<T>>,
    reply: oneshot::Sender<Result<T>>,
}

impl<F, T: Send> Job for Work<F, T>
where
    F: FnOnce(&mut Writing<'_>) -> rusqlite::Result<T> + Send,
{
    fn run(&mut self, writing: &mut Writing<'_>) {
        self.outcome = self.work.take().map(|work| in_savepoint(writing, work));
    }

    fn answer(self: Box<Self>, committed: std::result::Result<(), &Error>) {
        let answer = match (committed, self.outcome) {
            (Ok(()), Some(outcome)) => outcome.map_err(explain),
            (Ok(()), None) => Err(Error::Broken("its work was not run".into())),
            (Err(error), _) => Err(error.clone()),
        };
        // Nobody listens when the request was given up: the write stands all the same.
        let _ = self.reply.send(answer);
    }
}

/// The transaction that a write runs in.
pub struct Writing<'a> {
    pub db: &'a Connection,
    /// The version that the next change gets.
    version: u64,
}

impl Writing<'_> {
    /// The version of a change; they are given out in the order of commits.
    pub fn next_version(&mut self) -> u64 {
        self.version += 1;
        self.version
    }
}

impl std::fmt::Debug for Sqlite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sqlite({})", self.0.path.display())
    }
}

impl Sqlite {
    /// Opens the store at `path`, whose schema must be up to date; starts its writer.
    pub fn open(path: &Path) -> Result<Self> {
        let db = KIND.open(path)?;
        let (writes, jobs) = crossbeam_channel::bounded(WRITES_MAX);
        std::thread::Builder::new()
            .name("waypost-store".into())
            .spawn(move || write_all(db, &jobs))
            .map_err(|error| Error::Broken(format!("no thread for the writer: {error}")))?;
        let file = path.to_owned();
        let readers = Readers::new(READERS_MAX, move || reader(&file));
        Ok(Self(Arc::new(Shared { path: path.to_owned(), writes, readers })))
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Runs `work` on a connection that only reads, in one read transaction.
    pub async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        self.0.readers.read(work).await
    }

    /// The same on the caller's own thread, which waits for the disk.
    pub fn read_here<T>(&self, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T> {
        self.0.readers.read_here(work)
    }

    /// The keys that `what` means. The file of visits is attached for it: to a connection of its own, for it is asked
    /// rarely.
    pub async fn keys_of(&self, what: WarmWhat, limit: u32) -> Result<Vec<Key>> {
        let path = self.0.path.clone();
        let task = tokio::task::spawn_blocking(move || {
            let db = reader(&path)?;
            warm::attach_visits(&db, &path.with_file_name(VISITS_FILE)).map_err(explain)?;
            warm::keys_of(&db, &what, limit).map_err(explain)
        });
        task.await.map_err(|error| Error::Broken(format!("a read ended early: {error}")))?
    }

    /// Runs `work` in the writer's next transaction and returns what it returned once that is on the disk.
    pub async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Writing<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel::<Result<T>>();
        let job = Box::new(Work { work: Some(work), outcome: None, reply });
        self.0.writes.try_send(job).map_err(|refused| match refused {
            TrySendError::Full(_) => Error::Unavailable(format!("{WRITES_MAX} writes are waiting")),
            TrySendError::Disconnected(_) => Error::Broken("its writer has ended".into()),
        })?;
        answer.await.map_err(|_| Error::Broken("its writer has ended".into()))?
    }
}

fn in_savepoint<T>(
    writing: &mut Writing<'_>,
    work: impl FnOnce(&mut Writing<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    let version = writing.version;
    writing.db.prepare_cached("SAVEPOINT work")?.execute([])?;
    match work(writing) {
        Ok(value) => {
            writing.db.prepare_cached("RELEASE work")?.execute([])?;
            Ok(value)
        }
        Err(error) => {
            writing.version = version;
            // SQLite rolls the whole transaction back by itself on a full disk; then there is no savepoint left.
            if !writing.db.is_autocommit() {
                writing.db.execute_batch("ROLLBACK TO work; RELEASE work")?;
            }
            Err(error)
        }
    }
}

/// The writer's thread: ends when no handle is left and everything that waited is done.
fn write_all(mut db: Connection, jobs: &Receiver<Box<dyn Job>>) {
    while let Ok(first) = jobs.recv() {
        let mut group = vec![first];
        group.extend(jobs.try_iter().take(GROUP_MAX - 1));
        let committed = write_group(&mut db, &mut group);
        for job in group {
            job.answer(committed.as_ref().copied());
        }
    }
}

fn write_group(db: &mut Connection, group: &mut [Box<dyn Job>]) -> Result<()> {
    let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate).map_err(explain)?;
    let before = links::position(&transaction).map_err(explain)?.version;
    let mut writing = Writing { db: &transaction, version: before };
    for job in group {
        job.run(&mut writing);
        // On a full disk SQLite rolls the transaction back by itself: what came next would commit on its own.
        if transaction.is_autocommit() {
            return Err(Error::Unavailable("the transaction was rolled back: is the disk full?".into()));
        }
    }
    let after = writing.version;
    if after != before {
        let mut statement = transaction.prepare_cached("UPDATE feed SET version = ?1").map_err(explain)?;
        statement.execute([after]).map_err(explain)?;
    }
    transaction.commit().map_err(explain)
}

/// Makes the store if there is none, and brings its schema up to date; returns what was applied.
pub fn migrate(path: &Path) -> Result<Vec<&'static Migration>> {
    KIND.migrate(path)
}

/// The migrations that the store at `path` still lacks; all if there is none.
pub fn pending(path: &Path) -> Result<&'static [Migration]> {
    KIND.pending(path)
}

fn prepare_to_write(db: &Connection) -> rusqlite::Result<()> {
    map_pages(db)?;
    db.pragma_update(None, "journal_mode", "WAL")?;
    // A create is durable when it is answered: the log is synced at each commit.
    db.pragma_update(None, "synchronous", "FULL")?;
    db.pragma_update(None, "foreign_keys", true)
}

fn reader(path: &Path) -> Result<Connection> {
    let db = connect(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    map_pages(&db).map_err(explain)?;
    Ok(db)
}

/// Look-ups of codes that are in no cache read pages at random.
fn map_pages(db: &Connection) -> rusqlite::Result<()> {
    db.pragma_update(None, "mmap_size", 1_i64 << 30)
}

/// Whether to try again is known here alone.
#[expect(clippy::needless_pass_by_value, reason = "it is what map_err hands over")]
pub(crate) fn explain(error: rusqlite::Error) -> Error {
    let transient = matches!(
        error.sqlite_error_code(),
        Some(
            ErrorCode::DatabaseBusy
                | ErrorCode::DatabaseLocked
                | ErrorCode::FileLockingProtocolFailed
                | ErrorCode::DiskFull
                | ErrorCode::SystemIoFailure
                | ErrorCode::CannotOpen
                | ErrorCode::OutOfMemory
        )
    );
    if transient { Error::Unavailable(error.to_string()) } else { Error::Broken(error.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::{MIGRATIONS, Sqlite, Writing, connect, links, migrate, prepare_to_write};
    use crate::domain::key::{Case, Code, DomainId, Key};
    use crate::domain::link::{Fields, LinkId};
    use crate::domain::target::Target;
    use crate::domain::time::UnixMillis;
    use crate::store::Store;
    use crate::store::row::{Change, Inserted, NewLink, OnConflict, Patch, Position};
    use rusqlite::{Connection, OpenFlags};

    /// A new store in memory.
    pub(super) fn fresh() -> Connection {
        let db = Connection::open_in_memory().unwrap();
        MIGRATIONS.iter().for_each(|migration| db.execute_batch(migration.sql).unwrap());
        db
    }

    /// What runs in the writer's transaction; versions go on from `version`.
    pub(super) fn write<T>(
        db: &Connection,
        version: u64,
        work: impl FnOnce(&mut Writing<'_>) -> rusqlite::Result<T>,
    ) -> T {
        work(&mut Writing { db, version }).unwrap()
    }

    pub(super) fn key(code: &str) -> Key {
        Key { domain: DomainId(0), code: Code::parse(code.as_bytes(), Case::Sensitive).unwrap() }
    }

    pub(super) fn new(id: u64, code: &str, tags: &[&str], imported_clicks: u64) -> NewLink {
        let written = "https://example.com/";
        let mut fields = Fields::new(written.to_owned(), Target::new(written).unwrap());
        fields.tags = tags.iter().map(|tag| (*tag).to_owned()).collect();
        NewLink {
            id: LinkId(id),
            key: key(code),
            fields,
            given: Patch::default(),
            created_at: UnixMillis(5),
            imported_clicks,
            on_conflict: OnConflict::Refuse,
        }
    }

    #[tokio::test]
    async fn a_store_of_the_first_schema_becomes_one_of_today() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("waypost.db");
        let old = connect(&path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE).unwrap();
        prepare_to_write(&old).unwrap();
        old.execute_batch(&format!("PRAGMA application_id = {}; {}", super::KIND.application_id, MIGRATIONS[0].sql))
            .unwrap();
        old.execute_batch(
            "CREATE TABLE schema_migrations (
               number INTEGER PRIMARY KEY, name TEXT NOT NULL, checksum TEXT NOT NULL, applied_at TEXT NOT NULL) STRICT",
        )
        .unwrap();
        old.execute("INSERT INTO schema_migrations VALUES (1, 'links', ?1, datetime())", [MIGRATIONS[0].checksum()])
            .unwrap();
        write(&old, 0, |tx| links::insert(tx, &[new(1, "a", &[], 0), new(2, "b", &[], 0)], UnixMillis(9)));
        old.execute("UPDATE feed SET version = 2", []).unwrap();
        drop(old);

        assert!(Sqlite::open(&path).unwrap_err().to_string().contains("lacks migration 2 (instances)"));
        let applied: Vec<u32> = migrate(&path).unwrap().iter().map(|migration| migration.number).collect();
        assert_eq!((applied, migrate(&path).unwrap().len()), (vec![2], 0));
        let store = Store::Sqlite(Sqlite::open(&path).unwrap());
        let generation = store.position().await.unwrap().generation;
        assert_eq!(store.position().await.unwrap(), Position { version: 2, generation, asked: 0 });
        assert_eq!(store.link(key("b")).await.unwrap().map(|link| link.id), Some(LinkId(2)));
        assert_eq!(store.insert(vec![new(3, "c", &[], 0)], UnixMillis(9)).await.unwrap(), [Inserted::Created]);
        assert_eq!(store.rest().await.unwrap().store_id.len(), 32);
        assert_eq!(store.begin_generation(generation).await.unwrap(), generation + 1);
        assert_eq!(store.position().await.unwrap(), Position { version: 3, generation: generation + 1, asked: 0 });
    }

    #[test]
    fn edits_are_the_last_changes_that_are_no_creations() {
        let db = fresh();
        write(&db, 0, |tx| {
            links::insert(tx, &[new(1, "a", &[], 0), new(2, "b", &[], 0)], UnixMillis(1))?;
            links::change(tx, key("a"), &Change::Disable, UnixMillis(2))?;
            links::change(tx, key("b"), &Change::Delete, UnixMillis(3))?;
            links::insert(tx, &[new(3, "c", &[], 0)], UnixMillis(4))?;
            links::insert(tx, &[NewLink { on_conflict: OnConflict::Take, ..new(4, "b", &[], 0) }], UnixMillis(5))
        });
        let check = |limit, want: &[(u64, &str)]| {
            let edits = links::edits(&db, limit).unwrap();
            assert!(edits.iter().all(|edit| !edit.created), "{edits:?}");
            let edits: Vec<_> = edits.iter().map(|edit| (edit.version, edit.key)).collect();
            assert_eq!(edits, want.iter().map(|(version, code)| (*version, key(code))).collect::<Vec<_>>());
        };
        check(10, &[(3, "a"), (4, "b"), (6, "b")]);
        check(2, &[(4, "b"), (6, "b")]);
        check(0, &[]);
        let mut plan = db.prepare("EXPLAIN QUERY PLAN SELECT version FROM link_changes WHERE what <> 'create' ORDER BY version DESC LIMIT 9").unwrap();
        let plan: String = plan.query_row([], |row| row.get(3)).unwrap();
        assert!(plan.contains("link_changes_edits"), "every creation is read: {plan}");
    }
}
