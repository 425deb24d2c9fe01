//! Warm requests, pins and instances in Postgres. Requests and pins count up `feed.asked`, which every poll reads.

use tokio_postgres::types::Type;

use super::links::{columns, key};
use super::{LOCK, Param, Postgres, bigint, get, number, only};
use crate::domain::key::Key;
use crate::domain::time::UnixMillis;
use crate::store::row::{InstanceRow, WarmReport, WarmRequest, WarmWhat};
use crate::store::{Error, Result};

/// Requests older than this are gone, in milliseconds.
const KEPT_MS: i64 = 86_400_000;

const FORGET: &str = "WITH old AS (DELETE FROM warm_requests WHERE at < $1 RETURNING number)
  DELETE FROM warm_reports USING old WHERE warm_reports.number = old.number";
const ASK: &str = "WITH asked AS (UPDATE feed SET asked = asked + 1 RETURNING asked)
  INSERT INTO warm_requests (number, at, what) SELECT asked, $1, $2 FROM asked RETURNING number";
const REPORT: &str = "INSERT INTO warm_reports (number, instance, loaded, missing, at) VALUES ($1, $2, $3, $4, $5)
  ON CONFLICT (number, instance) DO UPDATE
    SET loaded = excluded.loaded, missing = excluded.missing, at = excluded.at";
const PIN: &str = "WITH pinned AS (
    INSERT INTO pins (domain_id, code)
    SELECT DISTINCT domain_id, code FROM unnest($1::int4[], $2::text[]) AS a (domain_id, code)
    ON CONFLICT (domain_id, code) DO NOTHING RETURNING code
  ), asked AS (UPDATE feed SET asked = asked + 1 WHERE EXISTS (SELECT 1 FROM pinned))
  SELECT count(*) FROM pinned";
const UNPIN: &str = "WITH unpinned AS (
    DELETE FROM pins USING unnest($1::int4[], $2::text[]) AS a (domain_id, code)
    WHERE pins.domain_id = a.domain_id AND pins.code = a.code RETURNING pins.code
  ), asked AS (UPDATE feed SET asked = asked + 1 WHERE EXISTS (SELECT 1 FROM unpinned))
  SELECT count(*) FROM unpinned";
const HINT: &str = "SELECT pg_notify('waypost', '')";
const OF_TAG: &str = "SELECT l.domain_id, l.code FROM tags t JOIN links l ON l.id = t.link_id
  WHERE t.tag = $1 AND l.deleted_at IS NULL ORDER BY l.id LIMIT $2";
/// Those without a total come last. It reads all totals: an index on what each batch changes would make its updates dearer
/// (PostgreSQL manual, "Heap-Only Tuples").
const TOP: &str = "SELECT domain_id, code FROM (
    (SELECT l.domain_id, l.code, t.imported + t.clicks + t.tools AS visits, l.id
      FROM link_totals t JOIN links l ON l.id = t.link_id
      WHERE l.deleted_at IS NULL ORDER BY visits DESC, l.id LIMIT $1)
    UNION ALL
    (SELECT l.domain_id, l.code, 0, l.id FROM links l WHERE l.deleted_at IS NULL
      AND NOT EXISTS (SELECT 1 FROM link_totals t WHERE t.link_id = l.id) ORDER BY l.id LIMIT $1)
  ) AS top ORDER BY visits DESC, id LIMIT $1";
const PRESENT: &str = "INSERT INTO instances (instance, seen_at) VALUES ($1, $2)
  ON CONFLICT (instance) DO UPDATE SET seen_at = excluded.seen_at";

impl Postgres {
    pub async fn ask_warm(&self, what: &WarmWhat, now: UnixMillis) -> Result<u64> {
        let what = serde_json::to_string(what).map_err(|error| Error::Broken(error.to_string()))?;
        let old = now.0.saturating_sub(KEPT_MS);
        let answers = self
            .inner
            .again(&[(ASK, &[(&now.0, Type::INT8), (&what, Type::TEXT)]), (FORGET, &[(&old, Type::INT8)]), (HINT, &[])])
            .await?;
        number(only(&answers[0])?, 0)
    }

    pub async fn warm_requests(&self, after: u64) -> Result<Vec<WarmRequest>> {
        let sql = "SELECT number, what FROM warm_requests WHERE number > $1 ORDER BY number";
        let rows = self.inner.one(sql, &[(&bigint(after), Type::INT8)]).await?;
        let request = |row| {
            let number = number(row, 0)?;
            let what = serde_json::from_str(get(row, 1)?)
                .map_err(|error| Error::Broken(format!("the warm request {number} cannot be read: {error}")))?;
            Ok(WarmRequest { number, what })
        };
        rows.iter().map(request).collect()
    }

    pub async fn keys_of(&self, what: &WarmWhat, limit: u32) -> Result<Vec<Key>> {
        let keys = |rows: Vec<_>| rows.iter().map(|row| key(row, 0, 1)).collect();
        match what {
            WarmWhat::Codes(codes) => Ok(WarmWhat::keys(codes, limit)),
            WarmWhat::Tag(tag) => {
                let params: [Param<'_>; 2] = [(tag, Type::TEXT), (&i64::from(limit), Type::INT8)];
                keys(self.inner.read(OF_TAG, &params).await?)
            }
            WarmWhat::Top(count) => {
                let limit = i64::from(limit.min(*count));
                keys(self.inner.read_all(TOP, &[(&limit, Type::INT8)]).await?)
            }
        }
    }

    pub async fn report_warm(&self, request: u64, report: &WarmReport, now: UnixMillis) -> Result<()> {
        let params: [Param<'_>; 5] = [
            (&bigint(request), Type::INT8),
            (&report.instance, Type::TEXT),
            (&bigint(report.loaded), Type::INT8),
            (&bigint(report.missing), Type::INT8),
            (&now.0, Type::INT8),
        ];
        self.inner.one(REPORT, &params).await.map(drop)
    }

    pub async fn warm_reports(&self, request: u64) -> Result<Vec<WarmReport>> {
        let sql = "SELECT instance, loaded, missing FROM warm_reports WHERE number = $1 ORDER BY instance";
        let rows = self.inner.one(sql, &[(&bigint(request), Type::INT8)]).await?;
        let report = |row| Ok(WarmReport { instance: get(row, 0)?, loaded: number(row, 1)?, missing: number(row, 2)? });
        rows.iter().map(report).collect()
    }

    pub async fn pin(&self, keys: &[Key], pinned: bool, _: UnixMillis) -> Result<u64> {
        let (domains, codes) = columns(keys);
        let params: [Param<'_>; 2] = [(&domains, Type::INT4_ARRAY), (&codes, Type::TEXT_ARRAY)];
        let answers =
            self.inner.again(&[(LOCK, &[]), (if pinned { PIN } else { UNPIN }, &params), (HINT, &[])]).await?;
        number(only(&answers[1])?, 0)
    }

    pub async fn pins(&self) -> Result<Vec<Key>> {
        let rows = self.inner.one("SELECT domain_id, code FROM pins ORDER BY domain_id, code", &[]).await?;
        rows.iter().map(|row| key(row, 0, 1)).collect()
    }

    pub async fn present(&self, instance: &str, runs: bool, now: UnixMillis) -> Result<()> {
        let named: [Param<'_>; 2] = [(&instance, Type::TEXT), (&now.0, Type::INT8)];
        if runs {
            self.inner.one(PRESENT, &named).await.map(drop)
        } else {
            self.inner.one("DELETE FROM instances WHERE instance = $1", &named[..1]).await.map(drop)
        }
    }

    pub async fn instances(&self) -> Result<Vec<InstanceRow>> {
        let rows = self.inner.one("SELECT instance, seen_at FROM instances ORDER BY instance", &[]).await?;
        rows.iter().map(|row| Ok(InstanceRow { instance: get(row, 0)?, seen_at: UnixMillis(get(row, 1)?) })).collect()
    }
}
