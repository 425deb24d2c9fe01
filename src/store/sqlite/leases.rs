//! Generations and leases of worker ids in SQLite. (Being built.)

use super::Writing;
use crate::store::row::WorkerLease;
use rusqlite::Result;

fn unbuilt<T>() -> Result<T> {
    Err(rusqlite::Error::InvalidQuery)
}

pub fn begin_generation(_: &mut Writing<'_>, _: u64) -> Result<u64> {
    unbuilt()
}

pub fn lease_worker(_: &mut Writing<'_>, _: &str, _: Option<u16>, _: u64, _: u64) -> Result<Option<WorkerLease>> {
    unbuilt()
}

pub fn renew_worker(_: &mut Writing<'_>, _: &WorkerLease, _: u64, _: u64) -> Result<Option<WorkerLease>> {
    unbuilt()
}

pub fn release_worker(_: &mut Writing<'_>, _: &WorkerLease, _: u64) -> Result<()> {
    unbuilt()
}
