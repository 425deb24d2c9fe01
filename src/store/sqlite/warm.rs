//! Warm requests, pins and instances in SQLite. (Being built.)

use rusqlite::Connection;
use rusqlite::Result;

use super::Writing;
use crate::domain::key::Key;
use crate::domain::time::UnixMillis;
use crate::store::row::{InstanceRow, WarmReport, WarmRequest, WarmWhat};

fn unbuilt<T>() -> Result<T> {
    Err(rusqlite::Error::InvalidQuery)
}

pub fn ask(_: &mut Writing<'_>, _: &WarmWhat, _: UnixMillis) -> Result<u64> {
    unbuilt()
}

pub fn requests(_: &Connection, _: u64) -> Result<Vec<WarmRequest>> {
    unbuilt()
}

pub fn keys_of(_: &Connection, _: &WarmWhat, _: u32) -> Result<Vec<Key>> {
    unbuilt()
}

pub fn report(_: &mut Writing<'_>, _: u64, _: &WarmReport, _: UnixMillis) -> Result<()> {
    unbuilt()
}

pub fn reports(_: &Connection, _: u64) -> Result<Vec<WarmReport>> {
    unbuilt()
}

pub fn pin(_: &mut Writing<'_>, _: &[Key], _: bool, _: UnixMillis) -> Result<u64> {
    unbuilt()
}

pub fn pins(_: &Connection) -> Result<Vec<Key>> {
    unbuilt()
}

pub fn present(_: &mut Writing<'_>, _: &str, _: bool, _: UnixMillis) -> Result<()> {
    unbuilt()
}

pub fn instances(_: &Connection) -> Result<Vec<InstanceRow>> {
    unbuilt()
}
