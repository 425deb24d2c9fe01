//! Settings, domains, leased ranges and API keys in SQLite.

use rusqlite::{Connection, OptionalExtension, Result, params};

use super::Writing;
use crate::domain::key::DomainId;
use crate::domain::time::UnixMillis;
use crate::guard::keys::{KeyRecord, Scopes};

pub fn get(db: &Connection, name: &str) -> Result<Option<Vec<u8>>> {
    db.prepare_cached("SELECT value FROM settings WHERE name = ?1")?.query_row([name], |row| row.get(0)).optional()
}

pub fn settle(tx: &mut Writing<'_>, name: &str, value: &[u8]) -> Result<Vec<u8>> {
    tx.db
        .prepare_cached("INSERT INTO settings (name, value) VALUES (?1, ?2) ON CONFLICT (name) DO NOTHING")?
        .execute(params![name, value])?;
    get(tx.db, name).map(Option::unwrap_or_default)
}

pub fn forget(tx: &mut Writing<'_>, from: &str, before: &str) -> Result<()> {
    tx.db.prepare_cached("DELETE FROM settings WHERE name >= ?1 AND name < ?2")?.execute([from, before])?;
    Ok(())
}

pub fn lease(tx: &mut Writing<'_>, range: &str, known: u64, count: u64) -> Result<u64> {
    let next: u64 = tx
        .db
        .prepare_cached(
            "INSERT INTO ranges (name, next) VALUES (?1, ?2 + ?3)
             ON CONFLICT (name) DO UPDATE SET next = max(next, ?2) + ?3 RETURNING next",
        )?
        .query_row(params![range, known, count], |row| row.get(0))?;
    Ok(next - count)
}

pub fn number_domains(tx: &mut Writing<'_>, hosts: &[String]) -> Result<Vec<DomainId>> {
    let number = |host: &String| {
        tx.db
            .prepare_cached(
                "INSERT INTO domains (id, host) SELECT max(id) + 1, ?1 FROM domains WHERE true ON CONFLICT (host) DO NOTHING",
            )?
            .execute([host])?;
        let mut statement = tx.db.prepare_cached("SELECT id FROM domains WHERE host = ?1")?;
        statement.query_row([host], |row| row.get(0)).map(DomainId)
    };
    hosts.iter().map(number).collect()
}

pub fn domains(db: &Connection) -> Result<Vec<(DomainId, String)>> {
    let mut statement = db.prepare_cached("SELECT id, host FROM domains ORDER BY id")?;
    statement.query_map([], |row| Ok((DomainId(row.get(0)?), row.get(1)?)))?.collect()
}

pub fn add_key(tx: &mut Writing<'_>, key: &KeyRecord) -> Result<()> {
    tx.db
        .prepare_cached(
            "INSERT INTO api_keys (id, name, digest, scopes, per_minute, created_at, expires_at)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute(params![
            key.id,
            key.name,
            key.digest,
            key.scopes.to_string(),
            key.per_minute,
            key.created_at.0,
            key.expires_at.map(|at| at.0),
        ])?;
    Ok(())
}

/// All keys, or the one with this id.
pub fn keys(db: &Connection, id: Option<&str>) -> Result<Vec<KeyRecord>> {
    let one = if id.is_some() { "id = ?1" } else { "?1 IS NULL" };
    let mut statement = db.prepare_cached(&format!(
        "SELECT id, name, digest, scopes, per_minute, created_at, expires_at, revoked_at, last_used_at FROM api_keys
         WHERE {one} ORDER BY created_at, id",
    ))?;
    let rows = statement.query_map([id], |row| {
        let millis = |column: usize| Ok::<_, rusqlite::Error>(row.get::<_, Option<i64>>(column)?.map(UnixMillis));
        Ok(KeyRecord {
            id: row.get(0)?,
            name: row.get(1)?,
            digest: row.get(2)?,
            scopes: Scopes::parse(row.get_ref(3)?.as_str()?).map_err(|error| {
                rusqlite::Error::FromSqlConversionFailure(3, rusqlite::types::Type::Text, Box::new(error))
            })?,
            per_minute: row.get(4)?,
            created_at: UnixMillis(row.get(5)?),
            expires_at: millis(6)?,
            revoked_at: millis(7)?,
            last_used_at: millis(8)?,
        })
    })?;
    rows.collect()
}

pub fn revoke_key(tx: &mut Writing<'_>, id: &str, now: UnixMillis) -> Result<bool> {
    let revoked = tx
        .db
        .prepare_cached("UPDATE api_keys SET revoked_at = ?2 WHERE id = ?1 AND revoked_at IS NULL")?
        .execute(params![id, now.0])?;
    Ok(revoked == 1)
}

pub fn touch_key(tx: &mut Writing<'_>, id: &str, now: UnixMillis) -> Result<()> {
    tx.db.prepare_cached("UPDATE api_keys SET last_used_at = ?2 WHERE id = ?1")?.execute(params![id, now.0])?;
    Ok(())
}
