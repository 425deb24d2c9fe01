//! Days of visits: partitions ahead of time, an index once a day is over, and away with what is too old, also with agents
//! and referrers that no visit has had for so long.
//!
//! In: the time. Out: a table a day. What takes their owner is done by functions of the schema (`0002_visits.sql`), since
//! the role that stores visits owns nothing.
//! Never: waits longer than [`LOCK_MS`] for a lock, behind which everybody else would wait; looks at the clock alone to
//! drop a day: the server's must say the same.
//! At its limit: what was not done is done the next time.

use futures_util::future::join3;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Row};

use super::encoded::Query;
use super::{Postgres, all, failure, get, why};
use crate::domain::time::UnixMillis;
use crate::stats::rollup::{self, DAY_MS, Day};
use crate::store::postgres::connect::Connector;
use crate::visits::sink::{Failure, TEXTS_KEPT_DAYS, Tidied};

/// Partitions from today on.
const DAYS_AHEAD: Day = 4;
const LOCK_MS: u32 = 1000;
/// After the end of a day, until it gets its index: what was seen at its end is stored by then, also after hours in which
/// the store was away.
const CLOSED_AFTER_MS: i64 = 6 * 3_600_000;
/// The longest that an index may take, and a batch with later visits of that day be put off.
const INDEX_MAX_MS: u32 = 1_800_000;
/// Days that are dropped at a time.
const DROPS_MAX: usize = 1000;
/// Agents that are deleted at a time, and referrers.
const FORGOTTEN_MAX: i64 = 10_000;

const ADD: &str = "SELECT add_visit_day(day) FROM unnest($1::int4[]) AS a (day)";
/// A clock of ours that is years ahead would drop everything.
const DROP: &str = "SELECT drop_visit_day(least($1, floor(extract(epoch FROM now()) / 86400)::int4 - $2))";
/// As [`DROP`]. Those that somebody else writes or deletes are left alone.
const FORGET_AGENTS: &str = "DELETE FROM agents WHERE id IN (SELECT id FROM agents
  WHERE seen_day < least($1, floor(extract(epoch FROM now()) / 86400)::int4 - $2) LIMIT $3 FOR UPDATE SKIP LOCKED) RETURNING 1";
const FORGET_REFERRERS: &str = "DELETE FROM referrers WHERE id IN (SELECT id FROM referrers
  WHERE seen_day < least($1, floor(extract(epoch FROM now()) / 86400)::int4 - $2) LIMIT $3 FOR UPDATE SKIP LOCKED) RETURNING 1";
const INDEX: &str = "SELECT index_visit_day($1)";

impl Postgres {
    /// See [`crate::visits::sink::Sink::housekeep`]. An index is built beside it, on a connection of its own; that it
    /// failed is told by the next call.
    pub async fn housekeep(&mut self, now: UnixMillis) -> Result<Tidied, Failure> {
        let today = rollup::day(now);
        self.add_days(&(today..today + DAYS_AHEAD).collect::<Vec<_>>()).await?;
        let keep = Day::try_from(self.settings.keep.as_millis() / DAY_MS.unsigned_abs() as u128).unwrap_or(Day::MAX);
        let first = today.saturating_sub(keep);
        for _ in 0..DROPS_MAX {
            let rows = self.brief((DROP, vec![(&first, Type::INT4), (&keep, Type::INT4)])).await?;
            if !rows.first().map(|row| get::<bool>(row, 0)).transpose()?.unwrap_or(false) {
                break;
            }
        }
        self.index_days(rollup::day(UnixMillis(now.0 - CLOSED_AFTER_MS))).await?;
        let kept = keep.saturating_add(TEXTS_KEPT_DAYS as Day);
        let first = today.saturating_sub(kept);
        let mut tidied = Tidied::All;
        for forget in [FORGET_AGENTS, FORGET_REFERRERS] {
            let params = vec![(&first as _, Type::INT4), (&kept as _, Type::INT4), (&FORGOTTEN_MAX as _, Type::INT8)];
            if self.brief((forget, params)).await?.len() as i64 == FORGOTTEN_MAX {
                tidied = Tidied::Part;
            }
        }
        Ok(tidied)
    }

    /// Those that are there stay as they are.
    pub(super) async fn add_days(&mut self, days: &[Day]) -> Result<(), Failure> {
        let days = days.to_vec();
        self.brief((ADD, vec![(&days, Type::INT4_ARRAY)])).await.map(drop)
    }

    async fn brief(&mut self, query: Query<'_>) -> Result<Vec<Row>, Failure> {
        let session = self.session().await?;
        let limit_ms = u32::try_from(self.limit.as_millis()).unwrap_or(u32::MAX);
        let rows = self.heard(&session.admission, locking(&session.client, limit_ms, query)).await?;
        self.session = Some(session);
        Ok(rows)
    }

    /// Begins to index what lacks it among the days before `before`, unless that is under way.
    async fn index_days(&mut self, before: Day) -> Result<(), Failure> {
        match self.indexing.take() {
            Some(indexing) if !indexing.is_finished() => {
                self.indexing = Some(indexing);
                Ok(())
            }
            ended => {
                self.indexing = Some(tokio::spawn(index_all(self.connector.clone(), before)));
                match ended {
                    Some(ended) => ended.await.unwrap_or_else(|error| Err(Failure::Broken(error.to_string()))),
                    None => Ok(()),
                }
            }
        }
    }
}

/// One after the other, of all instances one at a time. Whoever stores a visit of such a day meanwhile waits for it up to
/// its `lock_timeout`, then for its next attempt, and the visits wait in the log: CONCURRENTLY would not let it wait, but
/// takes the partition's owner and no transaction.
async fn index_all(connector: Connector, before: Day) -> Result<(), Failure> {
    let connection = connector.connect(|| {}).await.map_err(failure)?;
    let limit = std::time::Duration::from_millis(INDEX_MAX_MS.into());
    let built = async || {
        let rows = locking(&connection.client, INDEX_MAX_MS, (INDEX, vec![(&before, Type::INT4)])).await?;
        rows.first().map_or(Ok(false), |row| row.try_get(0))
    };
    loop {
        match tokio::time::timeout(limit, built()).await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return Ok(()),
            Ok(Err(error)) => return Err(Failure::Away(why(&error))),
            Err(_) => return Err(Failure::Away("postgres did not build the index of a day in time".into())),
        }
    }
}

/// One statement, in a transaction that waits for no lock.
async fn locking(client: &Client, limit_ms: u32, query: Query<'_>) -> Result<Vec<Row>, tokio_postgres::Error> {
    let begin = format!("BEGIN; SET LOCAL lock_timeout = {LOCK_MS}; SET LOCAL statement_timeout = {limit_ms}");
    let queries = [query];
    let (begun, answers, committed) =
        join3(client.batch_execute(&begin), all(client, &queries), client.batch_execute("COMMIT")).await;
    let answers = begun.and(answers)?;
    committed?;
    Ok(answers.into_iter().flatten().collect())
}
