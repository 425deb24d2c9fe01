//! Warm requests, pins and instances in SQLite. Every function runs inside of a transaction that its caller holds.

use std::path::Path;

use rusqlite::types::Type;
use rusqlite::{Connection, Error, Result, params};

use super::Writing;
use super::links::key;
use crate::domain::key::Key;
use crate::domain::time::UnixMillis;
use crate::store::row::{InstanceRow, WarmReport, WarmRequest, WarmWhat};

/// How long requests and reports are kept, in milliseconds: a day. Whoever starts later has nothing to catch up.
const KEPT_MS: i64 = 86_400_000;

/// The next value of what every poll reads.
fn next_asked(tx: &mut Writing<'_>) -> Result<u64> {
    tx.db.prepare_cached("UPDATE feed SET asked = asked + 1 RETURNING asked")?.query_row([], |row| row.get(0))
}

pub fn ask(tx: &mut Writing<'_>, what: &WarmWhat, now: UnixMillis) -> Result<u64> {
    let old = now.0.saturating_sub(KEPT_MS);
    tx.db.prepare_cached("DELETE FROM warm_requests WHERE at < ?1")?.execute([old])?;
    tx.db.prepare_cached("DELETE FROM warm_reports WHERE at < ?1")?.execute([old])?;
    let text = serde_json::to_string(what).map_err(|error| Error::ToSqlConversionFailure(Box::new(error)))?;
    let number = next_asked(tx)?;
    tx.db
        .prepare_cached("INSERT INTO warm_requests (number, at, what) VALUES (?1, ?2, ?3)")?
        .execute(params![number, now.0, text])?;
    Ok(number)
}

pub fn requests(db: &Connection, number: u64) -> Result<Vec<WarmRequest>> {
    let mut statement =
        db.prepare_cached("SELECT number, what FROM warm_requests WHERE number > ?1 ORDER BY number")?;
    let rows = statement.query_map([number], |row| {
        let what = serde_json::from_str(row.get_ref(1)?.as_str()?)
            .map_err(|error| Error::FromSqlConversionFailure(1, Type::Text, Box::new(error)))?;
        Ok(WarmRequest { number: row.get(0)?, what })
    })?;
    rows.collect()
}

/// What `what` means. For the most visited, the file of visits is to be attached: see [`attach_visits`].
pub fn keys_of(db: &Connection, what: &WarmWhat, limit: u32) -> Result<Vec<Key>> {
    match what {
        WarmWhat::Codes(codes) => Ok(WarmWhat::keys(codes, limit)),
        WarmWhat::Tag(tag) => {
            let mut statement = db.prepare_cached(
                "SELECT domain_id, code FROM tags JOIN links ON id = link_id
                 WHERE tag = ?1 AND deleted_at IS NULL ORDER BY id LIMIT ?2",
            )?;
            statement.query_map(params![tag, limit], |row| key(row, 0, 1))?.collect()
        }
        WarmWhat::Top(count) => top(db, limit.min(*count)),
    }
}

/// Attaches the file of visits to a connection, for [`keys_of`]. It must not be in a transaction.
pub fn attach_visits(db: &Connection, visits: &Path) -> Result<()> {
    // Without one nothing was visited yet.
    if visits.exists() {
        let text = visits.to_str().ok_or_else(|| Error::InvalidPath(visits.to_owned()))?;
        db.execute("ATTACH ?1 AS visited", [text])?;
    }
    Ok(())
}

/// The most visited, by clicks, tools and what an import brought along; those without any come last. Nothing sorts all
/// links.
fn top(db: &Connection, limit: u32) -> Result<Vec<Key>> {
    let counts = if db.table_exists(Some("visited"), "link_totals")? {
        "SELECT link_id, imported AS visits FROM main.link_totals
         UNION ALL SELECT link_id, clicks + tools FROM visited.link_totals"
    } else {
        "SELECT link_id, imported AS visits FROM main.link_totals"
    };
    let mut statement = db.prepare(&format!(
        "WITH totals AS MATERIALIZED (SELECT link_id, sum(visits) AS visits FROM ({counts}) GROUP BY link_id)
         SELECT domain_id, code FROM (
           SELECT * FROM (SELECT domain_id, code, visits, id FROM totals JOIN links ON id = link_id
             WHERE deleted_at IS NULL ORDER BY visits DESC, id LIMIT ?1)
           UNION ALL
           SELECT * FROM (SELECT domain_id, code, 0, id FROM links
             WHERE deleted_at IS NULL AND id NOT IN (SELECT link_id FROM totals) ORDER BY id LIMIT ?1)
         ) ORDER BY visits DESC, id LIMIT ?1"
    ))?;
    statement.query_map([limit], |row| key(row, 0, 1))?.collect()
}

pub fn report(tx: &mut Writing<'_>, number: u64, report: &WarmReport, now: UnixMillis) -> Result<()> {
    tx.db
        .prepare_cached(
            "INSERT INTO warm_reports (number, instance, loaded, missing, at) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (number, instance) DO UPDATE SET loaded = ?3, missing = ?4, at = ?5",
        )?
        .execute(params![number, report.instance, report.loaded, report.missing, now.0])?;
    Ok(())
}

pub fn reports(db: &Connection, number: u64) -> Result<Vec<WarmReport>> {
    let mut statement =
        db.prepare_cached("SELECT instance, loaded, missing FROM warm_reports WHERE number = ?1 ORDER BY instance")?;
    let report =
        |row: &rusqlite::Row<'_>| Ok(WarmReport { instance: row.get(0)?, loaded: row.get(1)?, missing: row.get(2)? });
    statement.query_map([number], report)?.collect()
}

pub fn pin(tx: &mut Writing<'_>, keys: &[Key], pinned: bool, _: UnixMillis) -> Result<u64> {
    let sql = if pinned {
        "INSERT INTO pins (domain_id, code) VALUES (?1, ?2) ON CONFLICT DO NOTHING"
    } else {
        "DELETE FROM pins WHERE domain_id = ?1 AND code = ?2"
    };
    let mut changed = 0;
    for key in keys {
        changed += tx.db.prepare_cached(sql)?.execute(params![key.domain.0, key.code.to_string()])? as u64;
    }
    if changed > 0 {
        next_asked(tx)?;
    }
    Ok(changed)
}

pub fn pins(db: &Connection) -> Result<Vec<Key>> {
    let mut statement = db.prepare_cached("SELECT domain_id, code FROM pins ORDER BY domain_id, code")?;
    statement.query_map([], |row| key(row, 0, 1))?.collect()
}

pub fn present(tx: &mut Writing<'_>, instance: &str, runs: bool, now: UnixMillis) -> Result<()> {
    if runs {
        tx.db
            .prepare_cached(
                "INSERT INTO instances (instance, seen_at) VALUES (?1, ?2)
                 ON CONFLICT (instance) DO UPDATE SET seen_at = ?2",
            )?
            .execute(params![instance, now.0])?;
    } else {
        tx.db.prepare_cached("DELETE FROM instances WHERE instance = ?1")?.execute([instance])?;
    }
    Ok(())
}

pub fn instances(db: &Connection) -> Result<Vec<InstanceRow>> {
    let mut statement = db.prepare_cached("SELECT instance, seen_at FROM instances ORDER BY instance")?;
    let row = |row: &rusqlite::Row<'_>| Ok(InstanceRow { instance: row.get(0)?, seen_at: UnixMillis(row.get(1)?) });
    statement.query_map([], row)?.collect()
}

#[cfg(test)]
mod tests {
    use super::{KEPT_MS, ask, instances, keys_of, pin, pins, present, report, reports, requests};
    use crate::domain::time::UnixMillis;
    use crate::store::row::{Change, InstanceRow, WarmReport, WarmRequest, WarmWhat};
    use crate::store::sqlite::links::{change, insert, position};
    use crate::store::sqlite::tests::{fresh, key, new, write};

    const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

    #[test]
    fn requests_and_reports_are_kept_for_a_day() {
        let db = fresh();
        let later = UnixMillis(NOW.0 + KEPT_MS + 1);
        let tag = WarmWhat::Tag("spring".to_owned());
        let codes = WarmWhat::Codes(vec![(0, "a".to_owned())]);
        assert_eq!(write(&db, 0, |tx| ask(tx, &tag, NOW)), 1);
        let said = WarmReport { instance: "one".to_owned(), loaded: 3, missing: 1 };
        let corrected = WarmReport { loaded: 4, ..said.clone() };
        write(&db, 0, |tx| report(tx, 1, &said, NOW));
        write(&db, 0, |tx| report(tx, 1, &corrected, NOW));
        assert_eq!(reports(&db, 1).unwrap(), [corrected]);
        assert_eq!(write(&db, 0, |tx| ask(tx, &codes, NOW)), 2);
        let [first, second] = [WarmRequest { number: 1, what: tag }, WarmRequest { number: 2, what: codes }];
        assert_eq!(requests(&db, 0).unwrap(), [first, second.clone()]);
        assert_eq!(requests(&db, 1).unwrap(), [second]);
        // Numbers go on when everything before is gone.
        assert_eq!(write(&db, 0, |tx| ask(tx, &WarmWhat::Top(3), later)), 3);
        assert_eq!(requests(&db, 0).unwrap(), [WarmRequest { number: 3, what: WarmWhat::Top(3) }]);
        assert_eq!((reports(&db, 1).unwrap(), position(&db).unwrap().asked), (vec![], 3));
    }

    #[test]
    fn what_a_request_means() {
        let db = fresh();
        write(&db, 0, |tx| {
            let links = [
                new(1, "a", &["spring"], 0),
                new(2, "b", &["spring"], 7),
                new(3, "c", &["autumn"], 9),
                new(4, "d", &["spring"], 8),
            ];
            insert(tx, &links, NOW)?;
            change(tx, key("d"), &Change::Delete, NOW)
        });
        let check = |what: WarmWhat, limit, want: &[&str]| {
            let keys = keys_of(&db, &what, limit).unwrap();
            assert_eq!(keys, want.iter().map(|code| key(code)).collect::<Vec<_>>(), "{what:?}");
        };
        check(WarmWhat::Tag("spring".to_owned()), 9, &["a", "b"]);
        check(WarmWhat::Tag("spring".to_owned()), 1, &["a"]);
        check(WarmWhat::Tag("winter".to_owned()), 9, &[]);
        check(WarmWhat::Top(9), 9, &["c", "b", "a"]);
        // Visits count as much as what an import brought along; bots do not, nor does what has no link any more.
        db.execute_batch(&format!(
            "ATTACH ':memory:' AS visited; {};
             INSERT INTO visited.link_totals VALUES (1, 6, 2, 0, 0, 0, 1, 1, x''), (2, 0, 0, 90, 90, 90, 1, 1, x''),
               (4, 99, 0, 0, 0, 0, 1, 1, x''), (5, 99, 0, 0, 0, 0, 1, 1, x'')",
            crate::visits::sink::sqlite::MIGRATIONS[0]
                .sql
                .replace("CREATE TABLE ", "CREATE TABLE visited.")
                .replace("CREATE INDEX ", "CREATE INDEX visited.")
        ))
        .unwrap();
        check(WarmWhat::Top(9), 9, &["c", "a", "b"]);
        db.execute("UPDATE visited.link_totals SET tools = 4 WHERE link_id = 1", []).unwrap();
        check(WarmWhat::Top(9), 9, &["a", "c", "b"]);
        db.execute("UPDATE visited.link_totals SET clicks = 0, tools = 0", []).unwrap();
        check(WarmWhat::Top(2), 9, &["c", "b"]);
        check(WarmWhat::Top(9), 1, &["c"]);
        let codes = ["x", "not a code", "b"].map(|code| (0, code.to_owned())).to_vec();
        check(WarmWhat::Codes(codes.clone()), 9, &["x", "b"]);
        check(WarmWhat::Codes(codes), 1, &["x"]);
    }

    #[test]
    fn pins_count_what_changes() {
        let db = fresh();
        let check = |codes: &[&str], pinned, want: u64, asked: u64| {
            let keys: Vec<_> = codes.iter().map(|code| key(code)).collect();
            assert_eq!(write(&db, 0, |tx| pin(tx, &keys, pinned, NOW)), want, "{codes:?}");
            assert_eq!(position(&db).unwrap().asked, asked, "{codes:?}");
        };
        check(&["a", "b", "a"], true, 2, 1);
        check(&["b"], true, 0, 1);
        assert_eq!(pins(&db).unwrap(), [key("a"), key("b")]);
        check(&["b", "c"], false, 1, 2);
        check(&["b"], false, 0, 2);
        assert_eq!(pins(&db).unwrap(), [key("a")]);
    }

    #[test]
    fn instances_come_and_go() {
        let db = fresh();
        let row = |instance: &str, seen_at| InstanceRow { instance: instance.to_owned(), seen_at: UnixMillis(seen_at) };
        for (instance, runs, at) in [("b", true, 1), ("a", true, 2), ("b", true, 3), ("a", false, 4), ("c", false, 5)] {
            write(&db, 0, |tx| present(tx, instance, runs, UnixMillis(at)));
        }
        assert_eq!(instances(&db).unwrap(), [row("b", 3)]);
    }
}
