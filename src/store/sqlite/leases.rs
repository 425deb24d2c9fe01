//! Generations and leases of worker ids in SQLite. Every function runs inside of a transaction that its caller holds.
//!
//! Milliseconds that were leased are never leased again, whatever a clock says: a lease begins past the last one of its
//! id. The wall clock decides only when an id is free for another holder.

use std::collections::HashSet;

use rusqlite::{OptionalExtension, Result, params};

use super::Writing;
use crate::codes::snowflake::WORKERS;
use crate::domain::time;
use crate::store::row::{IDS_LOST, LEASES_LOST_MS, WorkerLease};

pub fn begin_generation(tx: &mut Writing<'_>, seen: u64) -> Result<u64> {
    let begun =
        tx.db.prepare_cached("UPDATE feed SET generation = generation + 1 WHERE generation = ?1")?.execute([seen])?;
    if begun == 1 {
        // Ids without a row as well: theirs may be among what was lost. The epoch ends what is held of each, also
        // of leases that followed on the one that is known.
        tx.db
            .prepare_cached(
                "WITH RECURSIVE ids (id) AS (SELECT 0 UNION ALL SELECT id + 1 FROM ids WHERE id + 1 < ?1)
                 INSERT INTO worker_leases (worker_id, epoch, holder, until_ms, expires_at)
                   SELECT id, 1, '', ?2 + ?3, 0 FROM ids WHERE true
                 ON CONFLICT (worker_id) DO UPDATE SET epoch = epoch + 1000, until_ms = max(until_ms, ?2) + ?3",
            )?
            .execute(params![WORKERS, time::now().0, LEASES_LOST_MS])?;
        tx.db
            .prepare_cached(
                "INSERT INTO ranges (name, next) VALUES ('link_ids', 1 + ?1)
                 ON CONFLICT (name) DO UPDATE SET next = next + ?1",
            )?
            .execute([IDS_LOST])?;
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

#[cfg(test)]
mod tests {
    use super::{IDS_LOST, LEASES_LOST_MS, WORKERS, begin_generation, lease_worker, release_worker, renew_worker};
    use crate::store::row::WorkerLease;
    use crate::store::sqlite::settings;
    use crate::store::sqlite::tests::{fresh, write};
    use rusqlite::Connection;

    /// A lease that does not end within the test.
    const LONG_MS: u64 = 1_000_000;

    fn lease(db: &Connection, holder: &str, wanted: Option<u16>, now_ms: u64, span_ms: u64) -> Option<WorkerLease> {
        write(db, 0, |tx| lease_worker(tx, holder, wanted, now_ms, span_ms))
    }

    fn check(lease: Option<WorkerLease>, worker_id: u16, epoch: u64, from_ms: u64, until_ms: u64) -> WorkerLease {
        assert_eq!(lease, Some(WorkerLease { worker_id, epoch, from_ms, until_ms }));
        lease.unwrap()
    }

    #[test]
    fn milliseconds_are_leased_once() {
        let db = fresh();
        check(lease(&db, "a", None, 1000, LONG_MS), 0, 1, 1000, 1000 + LONG_MS);
        // Its own again, and past the first whatever its clock says.
        check(lease(&db, "a", None, 0, LONG_MS), 0, 2, 1001 + LONG_MS, 1001 + 2 * LONG_MS);
        check(lease(&db, "b", None, 500, LONG_MS), 1, 1, 500, 500 + LONG_MS);
        assert_eq!(lease(&db, "b", Some(0), 9000, LONG_MS), None);
        // Leases that are over at once: others may have the id, beyond what was leased of it.
        check(lease(&db, "c", Some(7), 100, 0), 7, 1, 100, 100);
        check(lease(&db, "d", Some(7), 100, 0), 7, 2, 101, 101);
        check(lease(&db, "e", None, 100, 0), 2, 1, 100, 100);
    }

    #[test]
    fn whoever_lost_a_lease_cannot_renew_it() {
        let db = fresh();
        let renew = |lease: &WorkerLease, now_ms| write(&db, 0, |tx| renew_worker(tx, lease, now_ms, 50));
        let first = check(lease(&db, "a", Some(3), 100, 0), 3, 1, 100, 100);
        let first = check(renew(&first, 120), 3, 1, 100, 170);
        check(renew(&first, 0), 3, 1, 100, 170);
        let second = check(lease(&db, "a", Some(3), 0, 10), 3, 2, 171, 181);
        assert_eq!(renew(&first, 500), None);
        // Nor give back what is another's; who gives back frees what was not used.
        write(&db, 0, |tx| release_worker(tx, &first, 100));
        write(&db, 0, |tx| release_worker(tx, &second, 174));
        check(lease(&db, "b", Some(3), 0, 10), 3, 3, 175, 185);
    }

    #[test]
    fn there_are_1024() {
        let db = fresh();
        for id in 0..WORKERS {
            check(lease(&db, &format!("holder {id}"), None, 10, LONG_MS), id, 1, 10, 10 + LONG_MS);
        }
        assert_eq!(lease(&db, "one more", None, 10, LONG_MS), None);
        check(lease(&db, "holder 5", None, 10, 0), 5, 2, 11 + LONG_MS, 11 + LONG_MS);
    }

    #[test]
    fn a_new_generation_moves_every_id_and_begins_once() {
        let db = fresh();
        let far = 1 << 50;
        let held = check(lease(&db, "a", Some(3), far, LONG_MS), 3, 1, far, far + LONG_MS);
        let generation: u64 = db.query_row("SELECT generation FROM feed", [], |row| row.get(0)).unwrap();
        assert_eq!(write(&db, 0, |tx| begin_generation(tx, generation)), generation + 1);
        assert_eq!(write(&db, 0, |tx| begin_generation(tx, generation)), generation + 1, "somebody else was faster");
        assert_eq!(write(&db, 0, |tx| renew_worker(tx, &held, far, 1)), None);
        let from_ms = far + LONG_MS + LEASES_LOST_MS + 1;
        check(lease(&db, "a", Some(3), far, 0), 3, 1002, from_ms, from_ms);
        // One that the store has never heard of may have been leased in what was lost.
        let unknown = lease(&db, "b", Some(900), 0, 0).unwrap();
        assert!(unknown.from_ms > LEASES_LOST_MS, "{unknown:?}");
        // Nor does a link get an id that it had given by then, had nobody known of one.
        assert_eq!(write(&db, 0, |tx| settings::lease(tx, "link_ids", 1, 10)), 1 + IDS_LOST);
    }
}
