//! A file of the embedded store: one of links, one of visits, each with migrations of its own.
//!
//! In: a path, and what the file is to be ([`Kind`]). Out: a connection to a file that is ours and up to date.
//! Never: writes to another program's database; shows anybody else what is in a folder that it makes.
//! At its limit: another process is waited for, up to [`BUSY_MS`].

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, Row, Transaction, TransactionBehavior};
use tokio::sync::Semaphore;

use super::explain;
use crate::store::schema::{self, Applied, Migration};
use crate::store::{Error, Result};

/// How long another process is waited for, in milliseconds.
pub const BUSY_MS: u64 = 5_000;

/// What a file is.
#[derive(Debug)]
pub struct Kind {
    /// `application_id` of the file: another program's database is never written to.
    pub application_id: i32,
    pub migrations: &'static [Migration],
    /// Settings of a connection that writes; only of a file that is ours.
    pub prepare_to_write: fn(&Connection) -> rusqlite::Result<()>,
}

impl Kind {
    /// A connection that writes to the file at `path`, whose schema must be up to date.
    pub fn open(&self, path: &Path) -> Result<Connection> {
        let db = connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        if let [first, ..] = self.lacks(&db)? {
            return Err(Error::Schema(format!(
                "the store {} lacks migration {} ({}): run `waypost migrate`",
                path.display(),
                first.number,
                first.name
            )));
        }
        (self.prepare_to_write)(&db).map_err(explain)?;
        Ok(db)
    }

    /// Makes the file if there is none, and brings its schema up to date; returns what was applied.
    pub fn migrate(&self, path: &Path) -> Result<Vec<&'static Migration>> {
        if let Some(folder) = path.parent() {
            // It has what nobody else should read: targets, notes, the key of the permutation, who visited what.
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)
                .map_err(|error| Error::Broken(format!("cannot make the folder {}: {error}", folder.display())))?;
        }
        let mut db = connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE)?;
        if self.lacks(&db)?.is_empty() {
            return Ok(Vec::new());
        }
        (self.prepare_to_write)(&db).map_err(explain)?;
        let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate).map_err(explain)?;
        // Read again: another process may have been faster than our lock.
        let pending = self.lacks(&transaction)?;
        self.apply(&transaction, pending).map_err(explain)?;
        transaction.commit().map_err(explain)?;
        Ok(pending.iter().collect())
    }

    /// The migrations that the file at `path` still lacks; all if there is none.
    pub fn pending(&self, path: &Path) -> Result<&'static [Migration]> {
        if !path.exists() {
            return Ok(self.migrations);
        }
        self.lacks(&connect(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?)
    }

    fn apply(&self, transaction: &Transaction<'_>, migrations: &[Migration]) -> rusqlite::Result<()> {
        transaction.execute_batch(&format!(
            "PRAGMA application_id = {};
             CREATE TABLE IF NOT EXISTS schema_migrations (
               number INTEGER PRIMARY KEY, name TEXT NOT NULL, checksum TEXT NOT NULL, applied_at TEXT NOT NULL) STRICT;",
            self.application_id
        ))?;
        for migration in migrations {
            transaction.execute_batch(migration.sql)?;
            transaction.execute(
                "INSERT INTO schema_migrations (number, name, checksum, applied_at) VALUES (?1, ?2, ?3, datetime())",
                (migration.number, migration.name, migration.checksum()),
            )?;
        }
        Ok(())
    }

    fn lacks(&self, db: &Connection) -> Result<&'static [Migration]> {
        let foreign = || -> rusqlite::Result<bool> {
            let id: i32 = db.query_row("PRAGMA application_id", [], |row| row.get(0))?;
            let tables: i64 = db.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
            Ok(id != self.application_id && tables > 0)
        };
        if foreign().map_err(explain)? {
            return Err(Error::Schema(format!(
                "{} is another program's database: choose another folder with --data",
                db.path().unwrap_or_default()
            )));
        }
        schema::pending(self.migrations, &applied(db).map_err(explain)?)
    }
}

fn applied(db: &Connection) -> rusqlite::Result<Vec<Applied>> {
    if !db.table_exists(None, "schema_migrations")? {
        return Ok(Vec::new());
    }
    let mut statement = db.prepare("SELECT number, checksum FROM schema_migrations ORDER BY number")?;
    // One program has the file at a time: no older one has to go on beside it.
    let row = |row: &Row<'_>| Ok(Applied { number: row.get(0)?, checksum: row.get(1)?, compatible_from: None });
    let rows = statement.query_map([], row)?;
    rows.collect()
}

/// Connections that only read, so many at once; each is kept for the next one.
pub(crate) struct Readers {
    connect: Box<dyn Fn() -> Result<Connection> + Send + Sync>,
    idle: Mutex<Vec<Connection>>,
    /// Reads that may be under way on the blocking pool.
    reading: Semaphore,
}

impl Readers {
    pub(crate) fn new(
        readers_max: usize,
        connect: impl Fn() -> Result<Connection> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self { connect: Box::new(connect), idle: Mutex::default(), reading: Semaphore::new(readers_max) })
    }

    /// Runs `work` in one read transaction.
    pub(crate) async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        let _reading = self.reading.acquire().await.map_err(|_| Error::Broken("it is closed".into()))?;
        let this = Arc::clone(self);
        let task = tokio::task::spawn_blocking(move || this.read_here(work));
        task.await.map_err(|error| Error::Broken(format!("a read ended early: {error}")))?
    }

    /// The same on the caller's own thread, which waits for the disk.
    pub(crate) fn read_here<T>(&self, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T> {
        let idle = self.idle.lock().expect("nobody panics with it").pop();
        let mut db = match idle {
            Some(db) => db,
            None => (self.connect)()?,
        };
        let transaction = db.transaction().map_err(explain)?;
        let value = work(&transaction).map_err(explain)?;
        transaction.commit().map_err(explain)?;
        self.idle.lock().expect("nobody panics with it").push(db);
        Ok(value)
    }
}

impl std::fmt::Debug for Readers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Readers")
    }
}

/// A connection to whatever is at `path`.
pub(crate) fn connect(path: &Path, flags: OpenFlags) -> Result<Connection> {
    let open = || -> rusqlite::Result<Connection> {
        let db = Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        db.busy_timeout(Duration::from_millis(BUSY_MS))?;
        db.set_prepared_statement_cache_capacity(64);
        Ok(db)
    };
    open().map_err(|error| match explain(error) {
        Error::Broken(why) => Error::Broken(format!("{}: {why}", path.display())),
        Error::Unavailable(why) => Error::Unavailable(format!("{}: {why}", path.display())),
        schema @ Error::Schema(_) => schema,
    })
}
