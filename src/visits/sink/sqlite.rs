//! The sink of the embedded store: `DATA/visits.db`, beside the links, so that a batch never waits for a create nor a create
//! for a batch.
//!
//! In: batches, on the writer's own thread, which waits for the disk. Out: one transaction each, positions first.
//! Never: syncs for each batch (`synchronous = NORMAL`): a loss of power may undo the last commits, but positions go back
//! together with the rows, and the segments that the spool keeps (`spool.keep`) fill exactly that hole.
//! At its limit: waits [`file::BUSY_MS`] for another process; deletes what is old for [`TIDYING_MAX`] at a time; its log of
//! pages is written back each [`CHECKPOINT_PAGES`].

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use rusqlite::functions::{Context, FunctionFlags};
use rusqlite::types::Null;
use rusqlite::{CachedStatement, Connection, ErrorCode, Transaction, TransactionBehavior};

use super::{Failure, Position, Settings, TEXTS_KEPT_DAYS, Tidied};
use crate::domain::time::{UnixMillis, monotonic};
use crate::stats::rollup::{self, DAY_MS, Rollup};
use crate::stats::sketch::Sketch;
use crate::store;
use crate::store::schema::Migration;
use crate::store::sqlite::file;
use crate::visits::batch::{Batch, Orphan, RequestId, Row};
use crate::visits::spool::{Epoch, Source};
use crate::visits::{Dropped, Drops};

/// How long one call of [`Sqlite::housekeep`] deletes: nothing is stored meanwhile, and no order to stop is heard.
const TIDYING_MAX: Duration = Duration::from_millis(200);
/// Rows that are deleted in one transaction: a few milliseconds.
const DELETED_AT_ONCE: usize = 4096;
/// Pages of 4 KiB. A batch rewrites the pages that the one before it wrote: the longer the log, the fewer go to the disk twice.
const CHECKPOINT_PAGES: i64 = 8192;
/// KiB of pages in memory: those that batch after batch touches.
const CACHE_KIB: i64 = 32 << 10;
/// Rows of one statement, which share what running it costs.
const ROWS_AT_ONCE: usize = 32;

pub const MIGRATIONS: [Migration; 1] =
    [Migration { number: 1, name: "visits", sql: include_str!("../../../migrations/visits/0001_visits.sql") }];
/// Its `application_id` is "wpsv".
const KIND: file::Kind = file::Kind { application_id: 0x7770_7376, migrations: &MIGRATIONS, prepare_to_write };

#[derive(Debug)]
pub struct Sqlite {
    db: Connection,
    settings: Settings,
}

impl Sqlite {
    /// Opens the file at `path`, which [`migrate`] made.
    pub fn open(path: &Path, settings: &Settings) -> Result<Self, Failure> {
        let db = KIND.open(path).map_err(of_store)?;
        Ok(Self { db, settings: settings.clone() })
    }

    pub async fn positions(&mut self, epochs: &[Epoch]) -> Result<Vec<Position>, Failure> {
        self.read_positions(epochs).map_err(explain)
    }

    fn read_positions(&self, epochs: &[Epoch]) -> rusqlite::Result<Vec<Position>> {
        let mut positions = Vec::new();
        let mut statement =
            self.db.prepare_cached("SELECT core, next, stored FROM spool_positions WHERE epoch = ?1 ORDER BY core")?;
        let mut dropped =
            self.db.prepare_cached("SELECT reason, visits FROM spool_drops WHERE epoch = ?1 AND core = ?2")?;
        for epoch in epochs {
            let key = epoch.0.cast_signed();
            let mut rows = statement.query([key])?;
            while let Some(row) = rows.next()? {
                let core = row.get(0)?;
                let mut drops = Drops::default();
                let mut reasons = dropped.query((key, core))?;
                while let Some(row) = reasons.next()? {
                    add_drop(&mut drops, &row.get::<_, String>(0)?, row.get(1)?);
                }
                let source = Source { epoch: *epoch, core };
                positions.push(Position { source, next: row.get(1)?, stored: row.get(2)?, drops });
            }
        }
        Ok(positions)
    }

    pub async fn store(&mut self, batch: &Batch) -> Result<(), Failure> {
        let instance = &self.settings.instance;
        let tx = self.db.transaction_with_behavior(TransactionBehavior::Immediate).map_err(explain)?;
        // After an error nothing more is run: on a full disk SQLite rolls back by itself, and what came next would commit
        // on its own.
        if !move_positions(&tx, batch, instance).map_err(explain)? {
            return Err(Failure::Moved);
        }
        let write = || -> rusqlite::Result<()> {
            tell(&tx, batch, instance)?;
            insert_rows(&tx, &batch.rows)?;
            insert_orphans(&tx, &batch.orphans)?;
            insert_texts(&tx, batch)?;
            add_days(&tx, &batch.rollups)?;
            add_totals(&tx, &batch.rollups)
        };
        write().map_err(explain)?;
        // A commit that fails has not happened; were it otherwise, the next try would find its position moved.
        tx.commit().map_err(explain)
    }

    /// What is older than `visits.keep` goes, in small transactions; and so do agents and referrers that no visit has had
    /// for so long, and [`TEXTS_KEPT_DAYS`] more.
    pub async fn housekeep(&mut self, now: UnixMillis) -> Result<Tidied, Failure> {
        let tidied = self.delete_old(now, TIDYING_MAX).map_err(explain)?;
        // What readers allow, without waiting for them.
        self.db.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(())).map_err(explain)?;
        Ok(tidied)
    }

    /// At least one transaction for each table, so that none of them waits for another.
    fn delete_old(&self, now: UnixMillis, time_max: Duration) -> rusqlite::Result<Tidied> {
        let until = monotonic() + time_max;
        let keep_ms = i64::try_from(self.settings.keep.as_millis()).unwrap_or(i64::MAX);
        let before = now.0.saturating_sub(keep_ms);
        // Where each goes on; none = it has no more.
        let mut visits = [("visits", Some(i64::MIN)), ("orphan_visits", Some(i64::MIN))];
        let mut texts = [("agents", true), ("referrers", true)];
        loop {
            for (table, from) in &mut visits {
                if let Some(first) = *from {
                    *from = delete_visits(&self.db, table, first, before)?;
                }
            }
            for (table, has_more) in &mut texts {
                *has_more = *has_more && delete_texts(&self.db, table, before)?;
            }
            if visits.iter().all(|(_, from)| from.is_none()) && !texts.iter().any(|(_, has_more)| *has_more) {
                return Ok(Tidied::All);
            }
            if monotonic() >= until {
                return Ok(Tidied::Part);
            }
        }
    }
}

fn add_drop(drops: &mut Drops, reason: &str, visits: u64) {
    if let Some(at) = Dropped::ALL.iter().position(|known| known.name() == reason) {
        drops[at] += visits;
    }
}

/// Whether every position was where the batch begins.
fn move_positions(tx: &Transaction<'_>, batch: &Batch, instance: &str) -> rusqlite::Result<bool> {
    let mut known = tx.prepare_cached(
        "INSERT OR IGNORE INTO spool_positions (epoch, core, instance, next, stored, answered, at)
         VALUES (?1, ?2, ?3, 0, 0, 0, 0)",
    )?;
    let mut moved = tx.prepare_cached(
        "UPDATE spool_positions SET next = ?4, stored = stored + ?5, at = unixepoch('subsec') * 1000
         WHERE epoch = ?1 AND core = ?2 AND next = ?3",
    )?;
    for range in &batch.ranges {
        let (epoch, core) = key(range.source);
        known.execute((epoch, core, instance))?;
        if moved.execute((epoch, core, range.from, range.to, range.stored))? == 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Drops and tallies. What a core counts itself is told as its sum so far, everything else as what is added; a tally that
/// comes again, or late, changes nothing.
fn tell(tx: &Transaction<'_>, batch: &Batch, instance: &str) -> rusqlite::Result<()> {
    let mut added = tx.prepare_cached(
        "INSERT INTO spool_drops (epoch, core, reason, visits) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT DO UPDATE SET visits = visits + excluded.visits",
    )?;
    for range in &batch.ranges {
        let (epoch, core) = key(range.source);
        for (reason, visits) in Dropped::ALL.into_iter().zip(range.drops).filter(|(_, visits)| *visits > 0) {
            added.execute((epoch, core, reason.name(), visits))?;
        }
    }
    let mut answered = tx.prepare_cached(
        "INSERT INTO spool_positions (epoch, core, instance, next, stored, answered, at)
         VALUES (?1, ?2, ?3, 0, 0, ?4, unixepoch('subsec') * 1000)
         ON CONFLICT DO UPDATE SET answered = max(answered, excluded.answered), at = excluded.at",
    )?;
    let mut so_far = tx.prepare_cached(
        "INSERT INTO spool_drops (epoch, core, reason, visits) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT DO UPDATE SET visits = max(visits, excluded.visits)",
    )?;
    for tally in &batch.tallies {
        let (epoch, core) = key(tally.source);
        answered.execute((epoch, core, instance, tally.visits + tally.ring_full + tally.spool_error))?;
        for (reason, visits) in [(Dropped::RingFull, tally.ring_full), (Dropped::SpoolError, tally.spool_error)] {
            if visits > 0 {
                so_far.execute((epoch, core, reason.name(), visits))?;
            }
        }
    }
    Ok(())
}

fn key(source: Source) -> (i64, u16) {
    (source.epoch.0.cast_signed(), source.core)
}

fn insert_rows(tx: &Transaction<'_>, rows: &[Row]) -> rusqlite::Result<()> {
    let values = |rows: usize| {
        let rows = vec!["(?,?,?,?,?,?,?,NULL,?)"; rows].join(",");
        format!("INSERT INTO visits VALUES {rows}")
    };
    let (chunks, rest) = rows.as_chunks::<ROWS_AT_ONCE>();
    let mut many = tx.prepare_cached(&values(ROWS_AT_ONCE))?;
    for chunk in chunks {
        bind_rows(&mut many, chunk)?;
    }
    let mut one = tx.prepare_cached(&values(1))?;
    rest.iter().try_for_each(|row| bind_rows(&mut one, std::slice::from_ref(row)))
}

/// Runs `insert` for as many rows as it has places for.
fn bind_rows(insert: &mut CachedStatement<'_>, rows: &[Row]) -> rusqlite::Result<()> {
    for (row, at) in rows.iter().zip((0..).step_by(8)) {
        insert.raw_bind_parameter(at + 1, row.link.0.cast_signed())?;
        insert.raw_bind_parameter(at + 2, row.at.0)?;
        insert.raw_bind_parameter(at + 3, row.epoch.cast_signed())?;
        insert.raw_bind_parameter(at + 4, row.agent)?;
        insert.raw_bind_parameter(at + 5, row.referrer)?;
        insert.raw_bind_parameter(at + 6, row.class as u8)?;
        bind_address(insert, at + 7, row.address)?;
        bind_request_id(insert, at + 8, &row.request_id)?;
    }
    insert.raw_execute().map(|_| ())
}

fn bind_address(insert: &mut CachedStatement<'_>, at: usize, address: Option<IpAddr>) -> rusqlite::Result<()> {
    match address {
        None => insert.raw_bind_parameter(at, Null),
        Some(IpAddr::V4(address)) => insert.raw_bind_parameter(at, address.octets()),
        Some(IpAddr::V6(address)) => insert.raw_bind_parameter(at, address.octets()),
    }
}

fn bind_request_id(insert: &mut CachedStatement<'_>, at: usize, id: &RequestId) -> rusqlite::Result<()> {
    match id {
        RequestId::None => insert.raw_bind_parameter(at, Null),
        RequestId::Packed(id) => insert.raw_bind_parameter(at, format!("{id:032x}")),
        RequestId::Written { len, bytes } => {
            let written = &bytes[..usize::from(*len).min(bytes.len())];
            insert.raw_bind_parameter(at, String::from_utf8_lossy(written))
        }
    }
}

fn insert_orphans(tx: &Transaction<'_>, orphans: &[Orphan]) -> rusqlite::Result<()> {
    let mut insert = tx.prepare_cached("INSERT INTO orphan_visits VALUES (?,?,?,?,?,?,?,NULL,?)")?;
    for Orphan { domain, code, row } in orphans {
        insert.raw_bind_parameter(1, domain)?;
        insert.raw_bind_parameter(2, code)?;
        insert.raw_bind_parameter(3, row.at.0)?;
        insert.raw_bind_parameter(4, row.epoch.cast_signed())?;
        insert.raw_bind_parameter(5, row.agent)?;
        insert.raw_bind_parameter(6, row.referrer)?;
        bind_address(&mut insert, 7, row.address)?;
        bind_request_id(&mut insert, 8, &row.request_id)?;
        insert.raw_execute()?;
    }
    Ok(())
}

fn insert_texts(tx: &Transaction<'_>, batch: &Batch) -> rusqlite::Result<()> {
    let mut insert = tx.prepare_cached(
        "INSERT INTO agents VALUES (?1, ?2, ?3, ?4, ?5, ?6, unixepoch() / 86400)
         ON CONFLICT DO UPDATE SET seen_day = excluded.seen_day WHERE seen_day < excluded.seen_day",
    )?;
    for agent in &batch.agents {
        insert.execute((agent.id, &agent.text, agent.class as u8, &agent.browser, &agent.os, agent.device))?;
    }
    let mut insert = tx.prepare_cached(
        "INSERT INTO referrers VALUES (?1, ?2, ?3, unixepoch() / 86400)
         ON CONFLICT DO UPDATE SET seen_day = excluded.seen_day WHERE seen_day < excluded.seen_day",
    )?;
    for referrer in &batch.referrers {
        insert.execute((referrer.id, &referrer.text, &referrer.host))?;
    }
    Ok(())
}

/// One statement a row: what finding and running a second one costs is most of what a row costs.
fn add_days(tx: &Transaction<'_>, days: &[Rollup]) -> rusqlite::Result<()> {
    let mut add = tx.prepare_cached(
        "INSERT INTO link_days VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
         ON CONFLICT DO UPDATE SET clicks = clicks + ?3, tools = tools + ?4, bots = bots + ?5, heads = heads + ?6,
           prefetches = prefetches + ?7, last_at = coalesce(max(last_at, ?8), last_at, ?8), sketch = add_sketch(sketch, ?9)",
    )?;
    let mut sketch = Vec::new();
    for day in days {
        sketch.clear();
        day.sketch.encode(&mut sketch);
        add.raw_bind_parameter(1, day.link.0.cast_signed())?;
        add.raw_bind_parameter(2, day.day)?;
        bind_counts(&mut add, 3, &day.counts)?;
        add.raw_bind_parameter(8, day.last_at.map(|at| at.0))?;
        add.raw_bind_parameter(9, &sketch)?;
        add.raw_execute()?;
    }
    Ok(())
}

fn add_totals(tx: &Transaction<'_>, days: &[Rollup]) -> rusqlite::Result<()> {
    let mut add = tx.prepare_cached(
        "INSERT INTO link_totals VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
         ON CONFLICT DO UPDATE SET clicks = clicks + ?2, tools = tools + ?3, bots = bots + ?4, heads = heads + ?5,
           prefetches = prefetches + ?6, first_at = coalesce(min(first_at, ?7), first_at, ?7),
           last_at = coalesce(max(last_at, ?8), last_at, ?8), sketch = add_sketch(sketch, ?9)",
    )?;
    let mut sketch = Vec::new();
    for total in rollup::totals(days) {
        sketch.clear();
        total.encode_sketch(&mut sketch);
        add.raw_bind_parameter(1, total.link.0.cast_signed())?;
        bind_counts(&mut add, 2, &total.counts)?;
        add.raw_bind_parameter(7, total.first_at.map(|at| at.0))?;
        add.raw_bind_parameter(8, total.last_at.map(|at| at.0))?;
        add.raw_bind_parameter(9, &sketch)?;
        add.raw_execute()?;
    }
    Ok(())
}

fn bind_counts(add: &mut CachedStatement<'_>, at: usize, counts: &[u64]) -> rusqlite::Result<()> {
    counts.iter().zip(at..).try_for_each(|(count, at)| add.raw_bind_parameter(at, *count))
}

/// The SQL function that adds a sketch to a stored one. They are merged at once, for rows that grow spread over more pages,
/// which costs more than merging does.
fn add_sketch(context: &Context<'_>) -> rusqlite::Result<Vec<u8>> {
    let mut sketch = Sketch::default();
    for place in 0..2 {
        // What is damaged begins anew, for the counts beside it are right all the same.
        if let Err(bad) = sketch.merge(context.get_raw(place).as_blob()?) {
            tracing::warn!(%bad, "a link's sketch in visits.db is damaged: its buckets, top values and visitors begin anew");
        }
    }
    let mut bytes = Vec::new();
    sketch.encode(&mut bytes);
    Ok(bytes)
}

/// Deletes the old ones of the first rows behind a rowid. They lie in the order of their coming, which is nearly that of
/// time: where all are to stay there is no more to delete, and one that came late goes late.
fn delete_visits(db: &Connection, table: &str, from: i64, before: i64) -> rusqlite::Result<Option<i64>> {
    let mut last = db.prepare_cached(&format!(
        "SELECT max(rowid) FROM (SELECT rowid FROM {table} WHERE rowid > ?1 ORDER BY rowid LIMIT {DELETED_AT_ONCE})"
    ))?;
    let mut delete = db.prepare_cached(&format!("DELETE FROM {table} WHERE rowid > ?1 AND rowid <= ?2 AND at < ?3"))?;
    let Some(to) = last.query_row([from], |row| row.get::<_, Option<i64>>(0))? else { return Ok(None) };
    let deleted = delete.execute((from, to, before))?;
    Ok(Some(to).filter(|_| deleted > 0))
}

/// Whether there may be more.
fn delete_texts(db: &Connection, table: &str, before: i64) -> rusqlite::Result<bool> {
    let mut delete = db.prepare_cached(&format!(
        "DELETE FROM {table} WHERE id IN (SELECT id FROM {table} WHERE seen_day < ?1 LIMIT {DELETED_AT_ONCE})"
    ))?;
    let deleted = delete.execute([before.div_euclid(DAY_MS).saturating_sub(TEXTS_KEPT_DAYS)])?;
    Ok(deleted == DELETED_AT_ONCE)
}

/// Makes the file if there is none, and brings its schema up to date; returns what was applied.
pub fn migrate(path: &Path) -> store::Result<Vec<&'static Migration>> {
    KIND.migrate(path)
}

/// The migrations that the file at `path` still lacks; all if there is none.
pub fn pending(path: &Path) -> store::Result<&'static [Migration]> {
    KIND.pending(path)
}

fn prepare_to_write(db: &Connection) -> rusqlite::Result<()> {
    db.pragma_update(None, "journal_mode", "WAL")?;
    db.pragma_update(None, "synchronous", "NORMAL")?;
    db.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
    // After a reader has kept it from being begun anew, it is cut.
    db.pragma_update(None, "journal_size_limit", 2 * 4096 * CHECKPOINT_PAGES)?;
    db.pragma_update(None, "cache_size", -CACHE_KIB)?;
    let pure = FunctionFlags::SQLITE_DETERMINISTIC | FunctionFlags::SQLITE_DIRECTONLY;
    db.create_scalar_function("add_sketch", 2, pure, add_sketch)
}

fn explain(error: rusqlite::Error) -> Failure {
    match error.sqlite_error_code() {
        Some(ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch | ErrorCode::TooBig) => {
            Failure::Refused(error.to_string())
        }
        _ => of_store(store::sqlite::explain(error)),
    }
}

fn of_store(error: store::Error) -> Failure {
    match error {
        store::Error::Unavailable(why) => Failure::Away(why),
        store::Error::Broken(why) | store::Error::Schema(why) => Failure::Broken(why),
    }
}

#[cfg(test)]
mod tests {
    use super::{DELETED_AT_ONCE, MIGRATIONS, Sqlite, migrate, pending};
    use crate::domain::link::LinkId;
    use crate::domain::time::{UnixMillis, monotonic, now};
    use crate::domain::visit::Class;
    use crate::stats::query::sqlite::accounts;
    use crate::stats::rollup::{DAY_MS, roll_up};
    use crate::stats::sketch::{Dimension, Sketch};
    use crate::store::sqlite::VISITS_FILE;
    use crate::store::visited::Account;
    use crate::visits::agents::Agent;
    use crate::visits::batch::{Batch, Orphan, Range, Referrer, RequestId, Row};
    use crate::visits::sink::{Failure, Position, Settings, Tidied};
    use crate::visits::spool::segment::Tally;
    use crate::visits::spool::{Epoch, Source};
    use crate::visits::{Dropped, Drops};
    use std::path::Path;
    use std::sync::Arc;
    use std::time::Duration;

    const SOURCE: Source = Source { epoch: Epoch(u64::MAX - 1), core: 3 };
    const AT: i64 = 1_700_000_000_000;

    fn settings() -> Settings {
        Settings { instance: "one".into(), keep: Duration::from_secs(86_400) }
    }

    fn fresh(folder: &Path) -> Sqlite {
        let path = folder.join(VISITS_FILE);
        migrate(&path).unwrap();
        Sqlite::open(&path, &settings()).unwrap()
    }

    fn agent() -> Arc<Agent> {
        Arc::new(Agent {
            id: 7,
            text: "curl/8".into(),
            class: Class::Tool,
            browser: "curl".into(),
            os: String::new(),
            device: "other",
        })
    }

    fn row(link: u64, at: i64, number: u64) -> Row {
        Row {
            link: LinkId(link),
            at: UnixMillis(at),
            epoch: SOURCE.epoch.0,
            core: SOURCE.core,
            number,
            class: Class::Click,
            address: Some([192, 0, 2, 1].into()),
            visitor: (number + 1) << 32,
            agent: 7,
            referrer: 9,
            request_id: RequestId::Packed(u128::from(number)),
        }
    }

    /// The records of [`SOURCE`] from `from` to `to`, all of link 1 and one moment.
    fn batch(from: u64, to: u64) -> Batch {
        batch_of((from..to).map(|number| row(1, AT, number)).collect(), from, to)
    }

    fn batch_of(rows: Vec<Row>, from: u64, to: u64) -> Batch {
        let (agent, referrer) =
            (agent(), Referrer { id: 9, text: "https://a.example/x".into(), host: "a.example".into() });
        let rollups = roll_up(&rows, |id| (id == 7).then_some(&*agent), |id| (id == 9).then_some(&referrer));
        let stored = rows.len() as u64;
        Batch {
            ranges: vec![Range { source: SOURCE, from, to, stored, drops: Drops::default() }],
            rollups,
            rows,
            agents: vec![agent],
            referrers: vec![Arc::new(referrer)],
            ..Batch::default()
        }
    }

    /// Positions, and how many visits rows, totals and days have.
    async fn standing(sink: &mut Sqlite) -> (Vec<Position>, [u64; 4]) {
        let positions = sink.positions(&[Epoch(5), SOURCE.epoch]).await.unwrap();
        let count = |sql: &str| sink.db.query_row(sql, [], |row| row.get(0)).unwrap();
        let counts = [
            count("SELECT count(*) FROM visits"),
            count("SELECT coalesce(sum(clicks), 0) FROM link_totals"),
            count("SELECT coalesce(sum(clicks), 0) FROM link_days"),
            sketches(sink).iter().map(|sketch| sketch.buckets().iter().sum::<u64>()).sum(),
        ];
        (positions, counts)
    }

    fn sketches(sink: &Sqlite) -> Vec<Sketch> {
        let mut statement = sink.db.prepare("SELECT sketch FROM link_days ORDER BY link_id, day").unwrap();
        let encoded = statement.query_map([], |row| row.get::<_, Vec<u8>>(0)).unwrap();
        let read = |bytes: Vec<u8>| {
            let mut sketch = Sketch::default();
            sketch.merge(&bytes).unwrap();
            sketch
        };
        encoded.map(|bytes| read(bytes.unwrap())).collect()
    }

    fn at(next: u64) -> Vec<Position> {
        vec![Position { source: SOURCE, next, stored: next, drops: Drops::default() }]
    }

    #[tokio::test]
    async fn a_batch_is_stored_once_and_whole() {
        let folder = tempfile::tempdir().unwrap();
        let mut sink = fresh(folder.path());
        assert_eq!(standing(&mut sink).await, (vec![], [0; 4]));
        sink.store(&batch(0, 100)).await.unwrap();
        assert_eq!(standing(&mut sink).await, (at(100), [100; 4]));
        for (from, to) in [(0, 100), (50, 150), (101, 102)] {
            assert_eq!(sink.store(&batch(from, to)).await, Err(Failure::Moved));
            assert_eq!(standing(&mut sink).await, (at(100), [100; 4]));
        }
        // Another handle, as of a replay beside the server, and the first one opened again.
        let mut other = Sqlite::open(&folder.path().join(VISITS_FILE), &settings()).unwrap();
        other.store(&batch(100, 133)).await.unwrap();
        assert_eq!(sink.store(&batch(100, 134)).await, Err(Failure::Moved));
        drop(sink);
        let mut sink = Sqlite::open(&folder.path().join(VISITS_FILE), &settings()).unwrap();
        sink.store(&batch(133, 134)).await.unwrap();
        assert_eq!(standing(&mut other).await, (at(134), [134; 4]));
        assert_eq!(sketches(&sink)[0].unique(), 134);
        assert_eq!(sketches(&sink)[0].top(Dimension::Referrer), [("a.example".to_owned(), 134)]);
    }

    #[tokio::test]
    async fn one_of_two_sources_moved() {
        let folder = tempfile::tempdir().unwrap();
        let mut sink = fresh(folder.path());
        let mut two = batch(0, 5);
        let other = Source { core: 4, ..SOURCE };
        two.ranges.push(Range { source: other, from: 1, to: 2, stored: 1, drops: Drops::default() });
        assert_eq!(sink.store(&two).await, Err(Failure::Moved));
        assert_eq!(standing(&mut sink).await, (vec![], [0; 4]));
    }

    #[tokio::test]
    async fn figures_add_up_by_instance() {
        let folder = tempfile::tempdir().unwrap();
        let mut sink = fresh(folder.path());
        let tally = Tally { source: SOURCE, appended: 12, visits: 10, ring_full: 4, spool_error: 0, orphans: 0 };
        let mut drops = Drops::default();
        drops[Dropped::Corrupt as usize] = 2;
        for (from, ring_full) in [(0, 4), (5, 6)] {
            let mut batch = batch(from, from + 5);
            batch.ranges[0].drops = drops;
            batch.tallies = vec![Tally { ring_full, ..tally }, Tally { ring_full: 1, ..tally }];
            sink.store(&batch).await.unwrap();
        }
        drops[Dropped::Corrupt as usize] = 4;
        drops[Dropped::RingFull as usize] = 6;
        let [position] = &sink.positions(&[SOURCE.epoch]).await.unwrap()[..] else { panic!("one source") };
        assert_eq!(*position, Position { source: SOURCE, next: 10, stored: 10, drops });
        let [account] = &accounts(&sink.db).unwrap()[..] else { panic!("one instance") };
        assert!(account.at > UnixMillis(AT), "{account:?}");
        let want = Account { instance: "one".into(), answered: 16, stored: 10, drops, at: account.at };
        assert_eq!(*account, want);
    }

    #[tokio::test]
    async fn rows_say_what_was_seen() {
        let folder = tempfile::tempdir().unwrap();
        let mut sink = fresh(folder.path());
        let mut bytes = [0; crate::visits::spool::format::REQUEST_ID_BYTES_MAX];
        bytes[..3].copy_from_slice(b"a\xFFc");
        let seen = [
            Row { address: None, request_id: RequestId::None, class: Class::Bot, ..row(1, AT, 0) },
            Row { address: Some("2001:db8::1".parse().unwrap()), ..row(u64::MAX, AT, 1) },
            Row { request_id: RequestId::Written { len: 3, bytes }, ..row(2, AT + 1, 2) },
        ];
        let mut batch = batch_of(seen.to_vec(), 0, 4);
        batch.orphans = vec![Orphan { domain: 2, code: "gone".into(), row: row(0, AT, 3) }];
        sink.store(&batch).await.unwrap();
        let sql = "SELECT link_id || ' ' || visits.kind || ' ' || hex(address) || ' ' || coalesce(request_id, '-')
                   FROM visits JOIN agents a ON a.id = agent_id JOIN referrers r ON r.id = referrer_id
                   WHERE epoch = -2 AND a.text = 'curl/8' AND host = 'a.example' ORDER BY visits.rowid";
        let mut statement = sink.db.prepare(sql).unwrap();
        let rows: Vec<String> = statement.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
        let id = format!("{:032x}", 1);
        let want = [
            "1 2  -".to_owned(),
            format!("-1 0 20010DB8000000000000000000000001 {id}"),
            "2 0 C0000201 a\u{FFFD}c".to_owned(),
        ];
        assert_eq!(rows, want);
        let orphan: (u32, String, i64) =
            sink.db.query_row("SELECT domain_id, code, at FROM orphan_visits", [], |row| row.try_into()).unwrap();
        assert_eq!(orphan, (2, "gone".into(), AT));
    }

    #[tokio::test]
    async fn what_is_refused_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut sink = fresh(folder.path());
        sink.db
            .execute_batch(
                "CREATE TRIGGER no BEFORE INSERT ON visits WHEN NEW.at = 13 BEGIN SELECT RAISE(ABORT, 'no'); END",
            )
            .unwrap();
        let refused = sink.store(&batch_of(vec![row(1, AT, 0), row(1, 13, 1)], 0, 2)).await;
        assert!(matches!(refused, Err(Failure::Refused(_))), "{refused:?}");
        assert_eq!(standing(&mut sink).await, (vec![], [0; 4]));
    }

    #[tokio::test]
    async fn another_process_has_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let mut sink = fresh(folder.path());
        sink.db.busy_timeout(Duration::ZERO).unwrap();
        let other = Sqlite::open(&folder.path().join(VISITS_FILE), &settings()).unwrap();
        other.db.execute_batch("BEGIN IMMEDIATE").unwrap();
        let away = sink.store(&batch(0, 1)).await;
        assert!(matches!(away, Err(Failure::Away(_))), "{away:?}");
        other.db.execute_batch("ROLLBACK").unwrap();
        sink.store(&batch(0, 1)).await.unwrap();
        assert_eq!(standing(&mut sink).await, (at(1), [1; 4]));
    }

    /// SQLite's own limit stands for the disk's: both are `SQLITE_FULL`, in the middle of a statement.
    #[tokio::test]
    async fn a_full_disk_undoes_the_batch_and_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let mut sink = fresh(folder.path());
        sink.store(&batch(0, 10)).await.unwrap();
        let pages: i64 = sink.db.query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap();
        sink.db.pragma_update(None, "max_page_count", pages + 4).unwrap();
        let full = sink.store(&batch(10, 5000)).await;
        assert!(matches!(full, Err(Failure::Away(_))), "{full:?}");
        assert_eq!(standing(&mut sink).await, (at(10), [10; 4]));
        sink.db.pragma_update(None, "max_page_count", 1 << 30).unwrap();
        sink.store(&batch(10, 5000)).await.unwrap();
        assert_eq!(standing(&mut sink).await, (at(5000), [5000; 4]));
    }

    #[tokio::test]
    async fn a_damaged_sketch_begins_anew() {
        let folder = tempfile::tempdir().unwrap();
        let mut sink = fresh(folder.path());
        sink.store(&batch(0, 10)).await.unwrap();
        sink.db.execute("UPDATE link_days SET sketch = x'0100FF'", []).unwrap();
        sink.store(&batch(10, 12)).await.unwrap();
        assert_eq!(standing(&mut sink).await, (at(12), [12, 12, 12, 2]));
    }

    #[tokio::test]
    async fn what_is_too_old_goes() {
        let folder = tempfile::tempdir().unwrap();
        let mut sink = fresh(folder.path());
        let old = 2 * DELETED_AT_ONCE as u64 + 100;
        // One among the old ones is to stay, and one came late.
        let mut rows: Vec<Row> = (0..old + 50).map(|at| row(1, if at < old { AT } else { AT + DAY_MS }, at)).collect();
        rows[5].at = UnixMillis(AT + DAY_MS);
        rows[old as usize + 20].at = UnixMillis(AT);
        sink.store(&batch_of(rows, 0, old + 50)).await.unwrap();
        // Each call ends, and says that there is more.
        let part = sink.delete_old(UnixMillis(AT + DAY_MS + 1), Duration::ZERO).unwrap();
        assert_eq!((part, standing(&mut sink).await.1[0]), (Tidied::Part, old + 50 + 1 - DELETED_AT_ONCE as u64));
        for (now, left) in [(AT + DAY_MS, 1), (AT + DAY_MS + 1, 50), (AT + 3 * DAY_MS, 0), (AT, 0)] {
            let left = if now == AT + DAY_MS { old + 51 - DELETED_AT_ONCE as u64 } else { left };
            while sink.housekeep(UnixMillis(now)).await.unwrap() == Tidied::Part {}
            assert_eq!(standing(&mut sink).await.1, [left, old + 50, old + 50, old + 50], "{now}");
        }
    }

    #[tokio::test]
    async fn texts_that_no_visit_has_go() {
        let folder = tempfile::tempdir().unwrap();
        let mut sink = fresh(folder.path());
        sink.store(&batch(0, 1)).await.unwrap();
        let texts = |sink: &Sqlite| -> (u64, u64) {
            let sql = "SELECT (SELECT count(*) FROM agents), (SELECT count(*) FROM referrers)";
            sink.db.query_row(sql, [], |row| row.try_into()).unwrap()
        };
        // What is told again is kept from then on.
        sink.db.execute_batch("UPDATE agents SET seen_day = 7; UPDATE referrers SET seen_day = 7").unwrap();
        let day = |day: i64| UnixMillis(day * DAY_MS);
        for (again, now, left) in
            [(false, day(10), 1), (true, day(11), 1), (false, now().after(Duration::from_secs(86_400 * 5)), 0)]
        {
            if again {
                sink.store(&batch(1, 2)).await.unwrap();
            }
            assert_eq!(sink.housekeep(now).await, Ok(Tidied::All));
            assert_eq!(texts(&sink), (left, left), "{now:?}");
        }
    }

    #[test]
    fn only_a_file_of_ours_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(VISITS_FILE);
        assert!(matches!(Sqlite::open(&path, &settings()), Err(Failure::Away(_))));
        assert_eq!(pending(&path).unwrap().len(), MIGRATIONS.len());
        let db = rusqlite::Connection::open(&path).unwrap();
        let opened = Sqlite::open(&path, &settings()).unwrap_err();
        assert!(opened.to_string().contains("run `waypost migrate`"), "{opened}");
        db.execute_batch("CREATE TABLE theirs (x)").unwrap();
        assert!(migrate(&path).unwrap_err().to_string().contains("another program's database"));
        assert!(matches!(Sqlite::open(&path, &settings()), Err(Failure::Broken(_))));
        drop(db);
        std::fs::remove_file(&path).unwrap();
        assert_eq!((migrate(&path).unwrap().len(), migrate(&path).unwrap().len()), (MIGRATIONS.len(), 0));
        assert_eq!(pending(&path).unwrap().len(), 0);
        Sqlite::open(&path, &settings()).unwrap();
    }

    /// `CARGO_PROFILE_DEV_OPT_LEVEL=3 cargo test --lib sqlite_sink_speed -- --ignored --nocapture`
    #[tokio::test]
    #[ignore = "it prints how fast it is"]
    async fn sqlite_sink_speed() {
        const ROWS: u64 = 50_000;
        for links in [10, 1_000, 15_000, 100_000_u64] {
            let folder = tempfile::tempdir().unwrap();
            let mut sink = fresh(folder.path());
            let mut seed = 1_u64;
            let mut chance = |below: u64| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (seed >> 33) % below
            };
            for round in 0..20 {
                let rows = (0..ROWS).map(|number| Row {
                    visitor: chance(1 << 31) << 33,
                    ..row(chance(links) * 7919, AT + (round * 1000) as i64, round * ROWS + number)
                });
                let batch = batch_of(rows.collect(), round * ROWS, (round + 1) * ROWS);
                let started = monotonic();
                sink.store(&batch).await.unwrap();
                let took = (monotonic() - started).as_nanos() as u64 / ROWS;
                if round % 5 == 4 {
                    let bytes = std::fs::metadata(folder.path().join(VISITS_FILE)).unwrap().len();
                    println!("{links} links, batch {round}: {took} ns a visit; {} MiB", bytes >> 20);
                }
            }
        }
    }
}
