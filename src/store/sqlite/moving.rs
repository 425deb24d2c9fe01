//! What moves out of SQLite into another store. (Being built.)

use rusqlite::Connection;
use rusqlite::Result;

use crate::domain::link::{Link, LinkId};
use crate::store::row::Rest;

fn unbuilt<T>() -> Result<T> {
    Err(rusqlite::Error::InvalidQuery)
}

pub fn rest(_: &Connection) -> Result<Rest> {
    unbuilt()
}

pub fn all(_: &Connection, _: LinkId, _: u32) -> Result<Vec<Link>> {
    unbuilt()
}
