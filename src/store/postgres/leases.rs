//! Leases of worker ids in Postgres. They end by the server's clock: the holders' clocks may differ.

use tokio_postgres::types::Type;

use super::{Param, Postgres, bigint, get, number};
use crate::store::row::WorkerLease;
use crate::store::{Error, Result};

/// The holder's own id first, then the lowest that is free. Who wants any passes by those that somebody is leasing at this
/// moment; who wants one waits for it, which may only be locked for a moment.
const LEASE_ANY: &str = "UPDATE worker_leases SET epoch = epoch + 1, holder = $1,
    until_ms = greatest($2::int8, until_ms + 1) + $3::int8, expires_at = now() + $3::int8 * INTERVAL '1 millisecond'
  WHERE worker_id = (SELECT worker_id FROM worker_leases WHERE holder = $1 OR expires_at <= now()
    ORDER BY holder <> $1, worker_id LIMIT 1 FOR UPDATE SKIP LOCKED)
  RETURNING worker_id, epoch, until_ms - $3::int8, until_ms";
const LEASE_ONE: &str = "UPDATE worker_leases SET epoch = epoch + 1, holder = $1,
    until_ms = greatest($2::int8, until_ms + 1) + $3::int8, expires_at = now() + $3::int8 * INTERVAL '1 millisecond'
  WHERE worker_id = $4 AND (holder = $1 OR expires_at <= now())
  RETURNING worker_id, epoch, until_ms - $3::int8, until_ms";
const RENEW: &str = "UPDATE worker_leases SET until_ms = greatest(until_ms, $3::int8 + $4::int8),
    expires_at = now() + $4::int8 * INTERVAL '1 millisecond'
  WHERE worker_id = $1 AND epoch = $2 RETURNING until_ms";
const RELEASE: &str = "UPDATE worker_leases SET until_ms = least(until_ms, $3), expires_at = now()
  WHERE worker_id = $1 AND epoch = $2";

impl Postgres {
    pub async fn lease_worker(
        &self,
        holder: &str,
        wanted: Option<u16>,
        now_ms: u64,
        span_ms: u64,
    ) -> Result<Option<WorkerLease>> {
        // A timeline that nobody has polled yet begins a generation here: what the server that is gone leased last is not
        // in these rows. What was leased across that may be of before it; the holder gets its own again.
        let mut generation = self.position().await?.generation;
        let (wanted, now_ms, span_ms) = (wanted.map(i32::from), bigint(now_ms), bigint(span_ms));
        let mut params: Vec<Param<'_>> = vec![(&holder, Type::TEXT), (&now_ms, Type::INT8), (&span_ms, Type::INT8)];
        let sql = match &wanted {
            None => LEASE_ANY,
            Some(id) => {
                params.push((id, Type::INT4));
                LEASE_ONE
            }
        };
        let rows = loop {
            let rows = self.inner.one(sql, &params).await?;
            let present = self.position().await?.generation;
            if present == generation {
                break rows;
            }
            generation = present;
        };
        let Some(row) = rows.first() else { return Ok(None) };
        let id: i32 = get(row, 0)?;
        Ok(Some(WorkerLease {
            worker_id: u16::try_from(id).map_err(|_| Error::Broken(format!("there is a worker id {id}")))?,
            epoch: number(row, 1)?,
            from_ms: number(row, 2)?,
            until_ms: number(row, 3)?,
        }))
    }

    pub async fn renew_worker(&self, lease: &WorkerLease, now_ms: u64, span_ms: u64) -> Result<Option<WorkerLease>> {
        let params: [Param<'_>; 4] = [
            (&i32::from(lease.worker_id), Type::INT4),
            (&bigint(lease.epoch), Type::INT8),
            (&bigint(now_ms), Type::INT8),
            (&bigint(span_ms), Type::INT8),
        ];
        let rows = self.inner.one(RENEW, &params).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        Ok(Some(WorkerLease { until_ms: number(row, 0)?, ..*lease }))
    }

    pub async fn release_worker(&self, lease: &WorkerLease, used_ms: u64) -> Result<()> {
        // Who used nothing gives back what the holder before it had not used either.
        let used_ms = bigint(used_ms.max(lease.from_ms.saturating_sub(1)));
        let params: [Param<'_>; 3] =
            [(&i32::from(lease.worker_id), Type::INT4), (&bigint(lease.epoch), Type::INT8), (&used_ms, Type::INT8)];
        self.inner.one(RELEASE, &params).await.map(drop)
    }
}
