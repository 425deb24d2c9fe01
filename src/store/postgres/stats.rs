//! What is added up of visits, and single visits for an export, in Postgres.
//!
//! Everything is read from a standby where one is near enough, and never waits longer than any other listing.

use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::{Param, Postgres, bigint, get, number};
use crate::domain::key::DomainId;
use crate::domain::link::LinkId;
use crate::domain::time::UnixMillis;
use crate::domain::visit::Class;
use crate::store::row::Reading;
use crate::store::visited::{Account, DAYS_MAX, DayRow, Days, Exported, Kinds, LinkRows, Totals, accounts};
use crate::store::{Error, Result};

/// One statement, so that totals and days are of one moment. Totals come first: their day is none.
const LINK: &str = "SELECT NULL::int4 AS day, clicks, tools, bots, heads, prefetches, first_at, last_at, sketch
    FROM link_totals WHERE link_id = $1
  UNION ALL (
    SELECT day, clicks, tools, bots, heads, prefetches, NULL, NULL, CASE WHEN $4 THEN sketch ELSE ''::bytea END
    FROM link_days WHERE link_id = $1 AND day BETWEEN $2 AND $3 ORDER BY day DESC LIMIT $5)
  ORDER BY day DESC NULLS FIRST";

const SUMS: &str = "SELECT instance, sum(answered)::int8, sum(stored)::int8, max(at) FROM spool_positions
  GROUP BY instance ORDER BY instance";
const DROPS: &str = "SELECT instance, reason, sum(visits)::int8 FROM spool_drops
  JOIN spool_positions USING (epoch, core) GROUP BY instance, reason";

/// The bounds of the partitions, in milliseconds. Without them every day since 1970 would have to be asked for.
const SPANS: &str = "SELECT DISTINCT bounds[1]::int8, bounds[2]::int8 FROM (
    SELECT regexp_match(pg_get_expr(c.relpartbound, c.oid), 'FROM \\(''?(-?\\d+)''?\\) TO \\(''?(-?\\d+)''?\\)') AS bounds
    FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
    WHERE i.inhparent IN ('visits'::regclass, 'orphan_visits'::regclass)
  ) AS partitions WHERE bounds IS NOT NULL ORDER BY 1";

const VISITS: &str = "SELECT v.at, coalesce(l.domain_id, v.domain_id), coalesce(l.code, v.code, ''), v.kind,
    host(v.address), a.text, r.text, v.country, v.request_id, v.epoch
  FROM (
    SELECT link_id, NULL::int4 AS domain_id, NULL::text AS code, at, epoch, agent_id, referrer_id, kind, address, country,
      request_id FROM visits WHERE at >= $1 AND at < $2
    UNION ALL
    SELECT NULL, domain_id, code, at, epoch, agent_id, referrer_id, 5::int2, address, country, request_id
      FROM orphan_visits WHERE at >= $1 AND at < $2
  ) AS v
  LEFT JOIN links l ON l.id = v.link_id
  LEFT JOIN agents a ON a.id = v.agent_id
  LEFT JOIN referrers r ON r.id = v.referrer_id
  ORDER BY v.at LIMIT $3";

impl Postgres {
    pub async fn link_visits(&self, link: LinkId, days: Days, reading: Reading) -> Result<LinkRows> {
        let params: [Param<'_>; 5] = [
            (&bigint(link.0), Type::INT8),
            (&days.from, Type::INT4),
            (&days.to, Type::INT4),
            (&days.sketches, Type::BOOL),
            (&i64::from(DAYS_MAX), Type::INT8),
        ];
        let mut read = LinkRows::default();
        for row in &self.inner.read_lately(reading, LINK, &params).await? {
            let sketch = get::<&[u8]>(row, 8)?.to_vec();
            match get::<Option<i32>>(row, 0)? {
                None => {
                    let millis = |column| get::<Option<i64>>(row, column).map(|at| at.map(UnixMillis));
                    read.totals = Totals { kinds: kinds(row)?, first_at: millis(6)?, last_at: millis(7)?, sketch };
                }
                Some(day) => read.days.push(DayRow { day, kinds: kinds(row)?, sketch }),
            }
        }
        Ok(read)
    }

    pub async fn accounts(&self) -> Result<Vec<Account>> {
        // From the primary: what a standby does not have yet would look pending.
        let answers = self.inner.transaction(&[(SUMS, &[]), (DROPS, &[])]).await?;
        let sum = |row: &Row| {
            Ok(Account {
                instance: get(row, 0)?,
                answered: number(row, 1)?,
                stored: number(row, 2)?,
                drops: Default::default(),
                at: UnixMillis(get(row, 3)?),
            })
        };
        let sums: Vec<Account> = answers[0].iter().map(sum).collect::<Result<_>>()?;
        let drop = |row: &Row| Ok((get(row, 0)?, get(row, 1)?, number(row, 2)?));
        Ok(accounts(sums, answers[1].iter().map(drop).collect::<Result<_>>()?))
    }

    /// The times, from and to, that partitions of visits are of, oldest first.
    pub async fn visit_spans(&self) -> Result<Vec<(i64, i64)>> {
        let rows = self.inner.read_lately(Reading::Lately, SPANS, &[]).await?;
        rows.iter().map(|row| Ok((get(row, 0)?, get(row, 1)?))).collect()
    }

    /// At most `limit` visits from `from` to before `to`, in milliseconds, oldest first.
    pub async fn visits(&self, from: i64, to: i64, limit: u32) -> Result<Vec<Exported>> {
        let params: [Param<'_>; 3] = [(&from, Type::INT8), (&to, Type::INT8), (&i64::from(limit), Type::INT8)];
        self.inner.read_lately(Reading::Lately, VISITS, &params).await?.iter().map(exported).collect()
    }
}

fn kinds(row: &Row) -> Result<Kinds> {
    let mut kinds = Kinds::default();
    for (column, count) in kinds.iter_mut().enumerate() {
        *count = number(row, 1 + column)?;
    }
    Ok(kinds)
}

fn exported(row: &Row) -> Result<Exported> {
    let text = |column| get::<Option<String>>(row, column);
    let kind: i16 = get(row, 3)?;
    let domain: Option<i32> = get(row, 1)?;
    Ok(Exported {
        at: UnixMillis(get(row, 0)?),
        domain: DomainId(domain.and_then(|id| id.try_into().ok()).unwrap_or_default()),
        code: get(row, 2)?,
        kind: usize::try_from(kind)
            .ok()
            .and_then(|kind| Class::ALL.get(kind).copied())
            .ok_or_else(|| Error::Broken(format!("a visit of kind {kind}, which there is not")))?,
        address: text(4)?,
        user_agent: text(5)?,
        referrer: text(6)?,
        country: text(7)?,
        request_id: text(8)?,
        epoch: get::<i64>(row, 9)?.cast_unsigned(),
    })
}
