//! Reading `visits.db`, where the embedded store has visits and what is added up of them.
//!
//! Connections only read, have the links' file attached as `links_db`, and wait for nobody: the file has a write-ahead log.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, params};

use crate::domain::key::DomainId;
use crate::domain::link::LinkId;
use crate::domain::time::UnixMillis;
use crate::domain::visit::Class;
use crate::store::sqlite::file::{Readers, connect};
use crate::store::sqlite::{VISITS_FILE, explain};
use crate::store::visited::{self, Account, DAYS_MAX, DayRow, Days, Exported, Kinds, LinkRows, Totals};
use crate::store::{Error, Result};

/// Connections that read at once.
const READERS_MAX: usize = 4;

/// A handle.
#[derive(Clone, Debug)]
pub struct Sqlite(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    visits: PathBuf,
    links: PathBuf,
    readers: Arc<Readers>,
}

impl Sqlite {
    /// `visits.db` beside the file of links; it is opened when something is read.
    #[must_use]
    pub fn beside(links: &Path) -> Self {
        let visits = links.with_file_name(VISITS_FILE);
        let files = (visits.clone(), links.to_owned());
        let readers = Readers::new(READERS_MAX, move || reader(&files.0, &files.1));
        Self(Arc::new(Shared { visits, links: links.to_owned(), readers }))
    }

    /// Runs `work` in one read transaction; what it returns is empty where there is no file yet.
    pub(crate) async fn read<T: Default + Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        if self.0.visits.exists() { self.0.readers.read(work).await } else { Ok(T::default()) }
    }
}

fn reader(visits: &Path, links: &Path) -> Result<Connection> {
    let db = connect(visits, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    let links = links.to_str().ok_or_else(|| Error::Broken(format!("{}: its path is no text", links.display())))?;
    db.execute("ATTACH ?1 AS links_db", [links]).map_err(explain)?;
    Ok(db)
}

/// The first eight columns of a row of totals.
pub(super) fn totals(row: &Row<'_>) -> rusqlite::Result<Totals> {
    Ok(Totals {
        kinds: kinds(row, 0)?,
        first_at: row.get::<_, Option<i64>>(5)?.map(UnixMillis),
        last_at: row.get::<_, Option<i64>>(6)?.map(UnixMillis),
        sketch: row.get(7)?,
    })
}

pub(super) fn kinds(row: &Row<'_>, first: usize) -> rusqlite::Result<Kinds> {
    let mut kinds = Kinds::default();
    for (column, count) in kinds.iter_mut().enumerate() {
        *count = row.get(first + column)?;
    }
    Ok(kinds)
}

pub(super) fn link(db: &Connection, link: LinkId, days: Days) -> rusqlite::Result<LinkRows> {
    let totals = db
        .prepare_cached(
            "SELECT clicks, tools, bots, heads, prefetches, first_at, last_at, sketch FROM link_totals
             WHERE link_id = ?1",
        )?
        .query_row([link.0], totals)
        .optional()?
        .unwrap_or_default();
    let sketch = if days.sketches { "sketch" } else { "x''" };
    let mut statement = db.prepare_cached(&format!(
        "SELECT day, clicks, tools, bots, heads, prefetches, {sketch} FROM link_days
         WHERE link_id = ?1 AND day BETWEEN ?2 AND ?3 ORDER BY day DESC LIMIT {DAYS_MAX}"
    ))?;
    let rows = statement.query_map(params![link.0, days.from, days.to], |row| {
        Ok(DayRow { day: row.get(0)?, kinds: kinds(row, 1)?, sketch: row.get(6)? })
    })?;
    Ok(LinkRows { totals, days: rows.collect::<rusqlite::Result<_>>()? })
}

/// The account of each instance, by name.
pub(crate) fn accounts(db: &Connection) -> rusqlite::Result<Vec<Account>> {
    let mut sums = db.prepare_cached(
        "SELECT instance, sum(answered), sum(stored), max(at) FROM spool_positions GROUP BY instance ORDER BY instance",
    )?;
    let sums = sums.query_map([], |row| {
        let at = UnixMillis(row.get(3)?);
        Ok(Account { instance: row.get(0)?, answered: row.get(1)?, stored: row.get(2)?, at, ..Account::default() })
    })?;
    let mut drops = db.prepare_cached(
        "SELECT instance, reason, sum(visits) FROM spool_drops JOIN spool_positions USING (epoch, core)
         GROUP BY instance, reason",
    )?;
    let drops = drops.query_map([], |row| row.try_into())?;
    Ok(visited::accounts(sums.collect::<rusqlite::Result<_>>()?, drops.collect::<rusqlite::Result<_>>()?))
}

/// Visits in the order of time, in a table of the connection's own. The kind of an orphan is in no row; numbers as those of
/// `domain::visit::Class`.
const SORT: &str = "CREATE TEMP TABLE export AS SELECT * FROM (
    SELECT link_id, NULL AS domain_id, NULL AS code, at, epoch, agent_id, referrer_id, kind, address, country, request_id
      FROM visits
    UNION ALL
    SELECT NULL, domain_id, code, at, epoch, agent_id, referrer_id, 5, address, country, request_id FROM orphan_visits
  ) ORDER BY at";

const EXPORT: &str =
    "SELECT v.at, coalesce(l.domain_id, v.domain_id, 0), coalesce(l.code, v.code, ''), v.kind, v.address, a.text,
    r.text, v.country, v.request_id, v.epoch
  FROM temp.export AS v
  LEFT JOIN links_db.links l ON l.id = v.link_id
  LEFT JOIN agents a ON a.id = v.agent_id
  LEFT JOIN referrers r ON r.id = v.referrer_id
  WHERE v.rowid > ?1 AND v.rowid <= ?1 + ?2 ORDER BY v.rowid";

impl Sqlite {
    /// Every visit, oldest first, `page` of them at a time, until `take` wants no more. Waits for the disk, and for
    /// `take`: between two transactions, for while one is open the log of pages grows with all that is stored. The order
    /// lies in a temporary file meanwhile (where SQLite has them: `SQLITE_TMPDIR`, else `/var/tmp` or `/tmp`).
    pub(crate) fn export(&self, page: usize, mut take: impl FnMut(Vec<Exported>) -> bool) -> Result<()> {
        if !self.0.visits.exists() {
            return Ok(());
        }
        // Its own, which takes the temporary table along when it goes.
        let db = reader(&self.0.visits, &self.0.links)?;
        db.execute(SORT, []).map_err(explain)?;
        let read = |last: usize| -> rusqlite::Result<Vec<Exported>> {
            db.prepare_cached(EXPORT)?.query_map([last, page], exported)?.collect()
        };
        let mut last = 0;
        loop {
            let visits = read(last).map_err(explain)?;
            if visits.is_empty() || !take(visits) {
                return Ok(());
            }
            last += page;
        }
    }
}

fn exported(row: &Row<'_>) -> rusqlite::Result<Exported> {
    let out_of_range = |column, value| rusqlite::Error::IntegralValueOutOfRange(column, value);
    let kind: i64 = row.get(3)?;
    let class = usize::try_from(kind).ok().and_then(|kind| Class::ALL.get(kind).copied());
    let address: Option<Vec<u8>> = row.get(4)?;
    Ok(Exported {
        at: UnixMillis(row.get(0)?),
        domain: DomainId(row.get(1)?),
        code: row.get(2)?,
        kind: class.ok_or_else(|| out_of_range(3, kind))?,
        address: address.and_then(|bytes| address_of(&bytes)).map(|address| address.to_string()),
        user_agent: row.get(5)?,
        referrer: row.get(6)?,
        country: row.get(7)?,
        request_id: row.get(8)?,
        epoch: row.get::<_, i64>(9)?.cast_unsigned(),
    })
}

/// Of 4 or 16 bytes.
fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_takes_an_export_slowly_holds_no_transaction() {
        let folder = tempfile::tempdir().unwrap();
        let links = folder.path().join("waypost.db");
        let links_db = Connection::open(&links).unwrap();
        links_db.execute_batch("CREATE TABLE links (id INTEGER PRIMARY KEY, domain_id, code)").unwrap();
        let db = Connection::open(folder.path().join(VISITS_FILE)).unwrap();
        db.pragma_update(None, "journal_mode", "wal").unwrap();
        db.execute_batch(include_str!("../../../migrations/visits/0001_visits.sql")).unwrap();
        let see =
            |at: i64| db.execute("INSERT INTO visits VALUES (1, ?1, 1, 0, 0, 0, NULL, NULL, NULL)", [at]).unwrap();
        for at in [5, 3, 4, 1, 2] {
            see(at);
        }
        let mut exported = Vec::new();
        let take = |page: Vec<Exported>| {
            exported.extend(page.iter().map(|visit| visit.at.0));
            see(6);
            let busy: i64 = db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0)).unwrap();
            assert_eq!(busy, 0, "a reader keeps the log of pages");
            true
        };
        Sqlite::beside(&links).export(2, take).unwrap();
        assert_eq!(exported, [1, 2, 3, 4, 5]);
    }
}
