//! Warm requests, pins and instances in SQLite. Every function runs inside of a transaction that its caller holds.

use rusqlite::types::Type;
use rusqlite::{Connection, Error, Result, params};

use super::Writing;
use super::links::key;
use crate::domain::key::{Case, Code, DomainId, Key};
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

pub fn keys_of(db: &Connection, what: &WarmWhat, limit: u32) -> Result<Vec<Key>> {
    match what {
        WarmWhat::Codes(codes) => {
            // What is no code has no link.
            let parsed = |(domain, code): &(u16, String)| {
                let code = Code::parse(code.as_bytes(), Case::Sensitive).ok()?;
                Some(Key { domain: DomainId(*domain), code })
            };
            Ok(codes.iter().filter_map(parsed).take(limit as usize).collect())
        }
        WarmWhat::Tag(tag) => {
            let mut statement = db.prepare_cached(
                "SELECT domain_id, code FROM tags JOIN links ON id = link_id
                 WHERE tag = ?1 AND deleted_at IS NULL ORDER BY id LIMIT ?2",
            )?;
            statement.query_map(params![tag, limit], |row| key(row, 0, 1))?.collect()
        }
        WarmWhat::Top(count) => {
            let mut statement = db.prepare_cached(
                "SELECT domain_id, code FROM links LEFT JOIN link_totals ON link_id = id
                 WHERE deleted_at IS NULL ORDER BY coalesce(imported, 0) DESC, id LIMIT ?1",
            )?;
            statement.query_map([limit.min(*count)], |row| key(row, 0, 1))?.collect()
        }
    }
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
