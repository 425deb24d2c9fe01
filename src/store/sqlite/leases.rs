//! Generations and leases of worker ids in SQLite. Every function runs inside of a transaction that its caller holds.
//!
//! Milliseconds that were leased are never leased again, whatever a clock says: a lease begins past the last one of its
//! id. The wall clock decides only when an id is free for another holder.

use std::collections::HashSet;

use rusqlite::{OptionalExtension, Result, params};

use super::Writing;
use crate::codes::snowflake::WORKERS;
use crate::domain::time;
use crate::store::row::WorkerLease;

/// How far a new generation moves every worker id, in milliseconds: a day. Leases of the lost transactions reached at
/// most the longest lease past the clock.
const LOST_MS: u64 = 86_400_000;

pub fn begin_generation(tx: &mut Writing<'_>, seen: u64) -> Result<u64> {
    let begun =
        tx.db.prepare_cached("UPDATE feed SET generation = generation + 1 WHERE generation = ?1")?.execute([seen])?;
    if begun == 1 {
        // Ids without a row as well: theirs may be among what was lost. The epoch ends what is held of each.
        tx.db
            .prepare_cached(
                "WITH RECURSIVE ids (id) AS (SELECT 0 UNION ALL SELECT id + 1 FROM ids WHERE id + 1 < ?1)
                 INSERT INTO worker_leases (worker_id, epoch, holder, until_ms, expires_at)
                   SELECT id, 1, '', ?2 + ?3, 0 FROM ids WHERE true
                 ON CONFLICT (worker_id) DO UPDATE SET epoch = epoch + 1, until_ms = max(until_ms, ?2) + ?3",
            )?
            .execute(params![WORKERS, time::now().0, LOST_MS])?;
    }
    tx.db.prepare_cached("SELECT generation FROM feed")?.query_row([], |row| row.get(0))
}

pub fn lease_worker(
    tx: &mut Writing<'_>,
    holder: &str,
    wanted: Option<u16>,
    now_ms: u64,
    span_ms: u64,
) -> Result<Option<WorkerLease>> {
    let now = time::now().0;
    let others: HashSet<u16> = tx
        .db
        .prepare_cached("SELECT worker_id FROM worker_leases WHERE expires_at > ?1 AND holder <> ?2")?
        .query_map(params![now, holder], |row| row.get(0))?
        .collect::<Result<_>>()?;
    let own: Option<u16> = tx
        .db
        .prepare_cached("SELECT min(worker_id) FROM worker_leases WHERE holder = ?1")?
        .query_row([holder], |row| row.get(0))?;
    let free = || (0..WORKERS).find(|id| !others.contains(id));
    let Some(worker_id) = wanted.or(own).or_else(free).filter(|id| !others.contains(id)) else { return Ok(None) };
    let (epoch, until_ms): (u64, u64) = tx
        .db
        .prepare_cached(
            "INSERT INTO worker_leases (worker_id, epoch, holder, until_ms, expires_at)
             VALUES (?1, 1, ?2, ?3 + ?4, ?5 + ?4)
             ON CONFLICT (worker_id) DO UPDATE SET epoch = epoch + 1, holder = ?2,
               until_ms = max(until_ms + 1, ?3) + ?4, expires_at = ?5 + ?4
             RETURNING epoch, until_ms",
        )?
        .query_row(params![worker_id, holder, now_ms, span_ms, now], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(Some(WorkerLease { worker_id, epoch, from_ms: until_ms - span_ms, until_ms }))
}

pub fn renew_worker(
    tx: &mut Writing<'_>,
    lease: &WorkerLease,
    now_ms: u64,
    span_ms: u64,
) -> Result<Option<WorkerLease>> {
    let until_ms: Option<u64> = tx
        .db
        .prepare_cached(
            "UPDATE worker_leases SET until_ms = max(until_ms, ?3 + ?4), expires_at = ?5 + ?4
             WHERE worker_id = ?1 AND epoch = ?2 RETURNING until_ms",
        )?
        .query_row(params![lease.worker_id, lease.epoch, now_ms, span_ms, time::now().0], |row| row.get(0))
        .optional()?;
    Ok(until_ms.map(|until_ms| WorkerLease { until_ms, ..*lease }))
}

pub fn release_worker(tx: &mut Writing<'_>, lease: &WorkerLease, used_ms: u64) -> Result<()> {
    tx.db
        .prepare_cached(
            "UPDATE worker_leases SET until_ms = min(until_ms, ?3), expires_at = ?4 WHERE worker_id = ?1 AND epoch = ?2",
        )?
        .execute(params![lease.worker_id, lease.epoch, used_ms, time::now().0])?;
    Ok(())
}
