//! What moves out of SQLite into another store. Every function runs inside of a transaction that its caller holds.

use rusqlite::{Connection, Result};

use super::links::{LINK, position, whole};
use super::settings;
use super::warm::pins;
use crate::domain::link::{Link, LinkId};
use crate::store::row::Rest;

pub fn rest(db: &Connection) -> Result<Rest> {
    let position = position(db)?;
    let mut named = db.prepare_cached("SELECT name, value FROM settings WHERE name <> 'store.id' ORDER BY name")?;
    let mut ranges = db.prepare_cached("SELECT name, next FROM ranges ORDER BY name")?;
    Ok(Rest {
        // It stays: another store has a name of its own.
        store_id: db
            .query_row("SELECT CAST(value AS TEXT) FROM settings WHERE name = 'store.id'", [], |row| row.get(0))?,
        generation: position.generation,
        version: position.version,
        links: db.query_row("SELECT count(*) FROM links", [], |row| row.get(0))?,
        settings: named.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<Result<_>>()?,
        domains: settings::domains(db)?,
        ranges: ranges.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<Result<_>>()?,
        keys: settings::keys(db, None)?,
        pins: pins(db)?,
    })
}

pub fn all(db: &Connection, after: LinkId, limit: u32) -> Result<Vec<Link>> {
    let mut statement = db.prepare_cached(&format!("{LINK} WHERE id > ?1 ORDER BY id LIMIT ?2"))?;
    statement.query_map([after.0, limit.into()], whole)?.collect()
}
