//! Making links in Postgres, and taking visits out of limited ones: what waits together shares a transaction. Of one link
//! there is one question in each: the next waits for the next.
//!
//! In: creates and visits from a bounded queue. Out: to each row its own outcome, durable when it is told.
//! Never: sends a statement per row where no code is taken; says of a link that was made that it failed, if the store can
//! still be asked; writes what nobody waits for any more.
//! At its limit: [`WRITES_MAX`] wait, then a write is refused as transient; each for `write_timeout`, and whether it was
//! written is not known then.
//!
//! Of rows with the same key the first of a group goes into the shared transaction. Rows whose code is taken come back
//! from it unmade and are settled one by one by whoever asked for them, each in a transaction of its own, against the link
//! as it is by then: the rows of one call are not one transaction. A call fails as long as nothing of it is done;
//! after that, what fails is the outcome of its row.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::{Mutex, mpsc, oneshot};
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::links::{Tries, busy, written};
use super::{Failed, Inner, LOCK, Param, Postgres, Query, bigint, get, number};
use crate::domain::link::{Link, LinkId};
use crate::domain::target::Target;
use crate::domain::time::UnixMillis;
use crate::store::row::{Inserted, NewLink, OnConflict, QuotaAsk, Taken, history};
use crate::store::{Error, Result};

/// Writes that may wait for the writer.
const WRITES_MAX: usize = 4096;
/// Groups that are under way at a time: while one is committed the next one waits at the feed's row, in Postgres, and goes
/// on without a word of ours in between. One alone left a third of two cores idle (PERF.md).
const WRITERS: usize = 2;
/// Writes that share a transaction.
const GROUP_MAX: usize = 512;
/// Once a group has so many rows, no further write joins it: a commit stays a matter of tens of milliseconds.
const GROUP_ROWS_MAX: usize = 5_000;

/// Versions follow the last one that was given, by this transaction or before it. Rows whose code is taken are left
/// out: the feed's row is locked, so that nobody takes one in between. OFFSET 0 keeps it one search of the index per row,
/// as in the look-up.
const INSERT: &str = "WITH asked AS (
    SELECT * FROM unnest($1::int8[], $2::int4[], $3::text[], $4::text[], $5::text[], $6::int4[], $7::text[], $8::text[],
        $9::text[], $10::int8[], $11::int8[], $12::text[], $13::int8[], $14::bool[], $15::int8[], $16::int8[], $17::int8[])
      WITH ORDINALITY AS a (id, domain_id, code, target_url, target_written, status, cache_control, title, note, starts_at,
        expires_at, expired_url, max_visits, forward_query, created_at, at, imported, n)
  ), fresh AS (
    SELECT a.*, row_number() OVER (ORDER BY a.n)
      + (SELECT greatest(version, (SELECT max(version) FROM link_changes)) FROM feed
          WHERE current_setting('waypost.begun', true) = 'yes') AS version
    FROM asked a WHERE NOT EXISTS (
      SELECT 1 FROM links l WHERE l.domain_id = a.domain_id AND l.code = a.code OFFSET 0)
  ), made AS (
    INSERT INTO links (id, domain_id, code, target_url, target_written, status, cache_control, title, note, starts_at,
      expires_at, expired_url, max_visits, forward_query, version, created_at, updated_at)
    SELECT id, domain_id, code, target_url, target_written, status, cache_control, title, note, starts_at, expires_at,
      expired_url, max_visits, forward_query, version, created_at, at FROM fresh
  ), tagged AS (
    INSERT INTO tags (link_id, tag)
    SELECT t.id, t.tag FROM unnest($18::int8[], $19::text[]) AS t (id, tag) JOIN fresh ON fresh.id = t.id
    ON CONFLICT (link_id, tag) DO NOTHING
  ), counted AS (
    INSERT INTO link_totals (link_id, imported) SELECT id, imported FROM fresh WHERE imported > 0
  ), recorded AS (
    INSERT INTO link_changes (version, at, domain_id, code, what)
    SELECT version, at, domain_id, code, 'create' FROM fresh
  ) SELECT id FROM fresh";

/// Takes a deleted link away, for [`INSERT`] to follow in the same transaction.
const REPLACE: &str = "WITH gone AS (DELETE FROM links WHERE id = $1 AND version = $2 RETURNING domain_id, code)
  INSERT INTO link_changes (version, at, domain_id, code, what, before)
  SELECT (SELECT version FROM feed WHERE current_setting('waypost.begun', true) = 'yes') + 1, $3, domain_id, code, 'replace', $4 FROM gone";

/// Settles leases and grants visits, single ones as leases of one. What was granted to others lives until its row is gone:
/// to give back the rest and to delete the row is one step, whoever else takes it for lost. That a link is used up is a
/// change, which is recorded by what makes it so: there is nothing left, and nobody who may give back. Its version follows
/// those of the creates beside it. $4 to $6 are the leases that are settled. Of a link without a limit, which it lost a
/// moment ago, as much is granted as is wanted, and nothing counted.
///
/// A lease is live for 10 s, ten times as long as it is spent (`TERM` in `resolve::quota`, whose `EXPIRY` this is, too). One
/// that ends in more than a minute was granted before this server's clock stepped back, and is dead.
const TAKE_VISITS: &str = "WITH asked AS (
    SELECT * FROM unnest($1::int8[], $2::int8[], $3::int8[]) AS a (id, wanted, lease)
    WHERE current_setting('waypost.begun', true) = 'yes'
  ), settled AS (
    DELETE FROM quota_leases q USING asked a JOIN unnest($4::int8[], $5::int8[], $6::int8[]) AS s (id, lease, rest)
      ON s.id = a.id
    WHERE q.link_id = s.id AND q.lease = s.lease RETURNING q.link_id, least(s.rest, q.granted) AS rest
  ), returned AS (
    SELECT link_id, sum(rest)::int8 AS rest FROM settled GROUP BY link_id
  ), found AS (
    SELECT l.id, l.domain_id, l.code, l.max_visits, coalesce(q.used, 0) - coalesce(r.rest, 0) AS used, a.wanted, a.lease,
      coalesce(r.rest, 0) AS rest, r.rest IS NOT NULL AS settles, coalesce(o.live, false) AS live,
      coalesce(o.dead, false) AS dead
    FROM asked a JOIN links l ON l.id = a.id LEFT JOIN link_quotas q ON q.link_id = l.id
    LEFT JOIN returned r ON r.link_id = l.id
    CROSS JOIN LATERAL (
      SELECT bool_or(is_live) AS live, bool_or(NOT is_live) AS dead FROM (
        SELECT expires_at > now() AND expires_at <= now() + INTERVAL '1 minute' AS is_live FROM quota_leases
        WHERE link_id = l.id AND lease <> ALL ($5::int8[])) AS others
    ) AS o
  ), granted AS (
    SELECT *, CASE WHEN max_visits IS NULL THEN wanted
      ELSE least(wanted, greatest((max_visits - used) / 16, 1), greatest(max_visits - used, 0)) END AS visits FROM found
  ), counted AS (
    INSERT INTO link_quotas (link_id, used)
    SELECT id, CASE WHEN max_visits IS NULL THEN 0 ELSE visits END - rest FROM granted WHERE settles OR visits > 0
    ON CONFLICT (link_id) DO UPDATE SET used = link_quotas.used + excluded.used
  ), leased AS (
    INSERT INTO quota_leases (link_id, lease, granted, expires_at)
    SELECT id, lease, visits, now() + INTERVAL '10 seconds' FROM granted WHERE max_visits IS NOT NULL AND visits > 0
  ), ended AS (
    SELECT id, domain_id, code FROM granted
    WHERE used >= max_visits AND NOT live AND (settles OR dead)
  ), swept AS (
    DELETE FROM quota_leases q USING granted g WHERE q.link_id = g.id AND q.lease <> ALL ($5::int8[])
      AND (g.id IN (SELECT id FROM ended) OR q.expires_at < now() - INTERVAL '1 day')
    RETURNING q.link_id, q.granted
  ), recorded AS (
    INSERT INTO link_changes (version, at, domain_id, code, what)
    SELECT row_number() OVER (ORDER BY id)
        + (SELECT greatest(version, (SELECT max(version) FROM link_changes)) FROM feed), $7, domain_id, code, 'used_up'
    FROM ended
  ) SELECT id, visits, coalesce(live AND used >= max_visits, false),
    (SELECT coalesce(sum(granted), 0)::int8 FROM swept WHERE link_id = id) FROM granted";

const MADE: &str = "SELECT id FROM links WHERE id = ANY ($1::int8[])";

/// What waits for the writer, and who waits for it.
#[derive(Debug)]
pub(super) enum Write {
    Insert { links: Arc<Vec<NewLink>>, now: UnixMillis, reply: oneshot::Sender<Result<Arc<HashSet<LinkId>>>> },
    Visits { ask: QuotaAsk, now: UnixMillis, reply: oneshot::Sender<Result<Taken>> },
}

impl Write {
    /// Nobody waits for it any more.
    fn is_given_up(&self) -> bool {
        match self {
            Self::Insert { reply, .. } => reply.is_closed(),
            Self::Visits { reply, .. } => reply.is_closed(),
        }
    }

    fn rows(&self) -> usize {
        match self {
            Self::Insert { links, .. } => links.len(),
            Self::Visits { .. } => 1,
        }
    }
}

impl Postgres {
    pub async fn insert(&self, links: Vec<NewLink>, now: UnixMillis) -> Result<Vec<Inserted>> {
        let links = Arc::new(links);
        let made = self.queue(|reply| Write::Insert { links: links.clone(), now, reply }).await?;
        let mut outcomes = Vec::with_capacity(links.len());
        let mut failed: Option<Error> = None;
        for new in &*links {
            outcomes.push(match (new.on_conflict, &failed) {
                _ if made.contains(&new.id) => Inserted::Created,
                (OnConflict::Refuse, _) => Inserted::Taken,
                // It would fail in the same way, and each row would wait for it.
                (_, Some(error)) if error.is_transient() => Inserted::Failed(error.to_string()),
                (OnConflict::Take | OnConflict::Update, _) => {
                    self.settle_conflict(new, now).await.unwrap_or_else(|error| {
                        let outcome = Inserted::Failed(error.to_string());
                        failed = Some(error);
                        outcome
                    })
                }
            });
        }
        let is_done = |outcome: &Inserted| matches!(outcome, Inserted::Created | Inserted::Updated);
        match failed {
            Some(error) if !outcomes.iter().any(is_done) => Err(error),
            _ => Ok(outcomes),
        }
    }

    pub async fn take_visits(&self, ask: QuotaAsk, now: UnixMillis) -> Result<Taken> {
        self.queue(|reply| Write::Visits { ask, now, reply }).await
    }

    /// Hands a write to the writers, which run as long as there is a handle, on the runtime of the first write.
    async fn queue<T>(&self, write: impl FnOnce(oneshot::Sender<Result<T>>) -> Write) -> Result<T> {
        let writes = self.writes.get_or_init(|| {
            let (sender, receiver) = mpsc::channel(WRITES_MAX);
            let receiver = Arc::new(Mutex::new(receiver));
            for _ in 0..WRITERS {
                tokio::spawn(write_all(self.inner.clone(), Arc::clone(&receiver)));
            }
            sender
        });
        let (reply, answer) = oneshot::channel();
        writes.try_send(write(reply)).map_err(|refused| match refused {
            mpsc::error::TrySendError::Full(_) => Error::Unavailable(format!("{WRITES_MAX} writes are waiting")),
            mpsc::error::TrySendError::Closed(_) => Error::Broken("its writer has ended".into()),
        })?;
        let limit = self.inner.write_timeout;
        tokio::time::timeout(limit, answer)
            .await
            .map_err(|_| {
                let limit_ms = limit.as_millis();
                Error::Unavailable(format!(
                    "the writer took longer than {limit_ms} ms; whether it was written is not known"
                ))
            })?
            .map_err(|_| Error::Broken("its writer has ended".into()))?
    }

    /// A row whose code was taken when the others of its group were made.
    async fn settle_conflict(&self, new: &NewLink, now: UnixMillis) -> Result<Inserted> {
        let mut tries = Tries::within(self.inner.write_timeout);
        while tries.again().await {
            match (self.link(new.key).await?, new.on_conflict) {
                (Some(taken), _) if taken.deleted_at.is_some() => {
                    if self.inner.replace(&taken, new, now).await? {
                        return Ok(Inserted::Created);
                    }
                }
                (Some(taken), OnConflict::Update) => {
                    if self.update(&taken, &new.given, now).await? {
                        return Ok(Inserted::Updated);
                    }
                }
                (Some(_), OnConflict::Take | OnConflict::Refuse) => return Ok(Inserted::Taken),
                // Who replaces it is between two transactions of his own.
                (None, _) => {}
            }
        }
        Err(busy(new.key))
    }
}

impl Inner {
    /// False if somebody else was faster.
    async fn replace(&self, taken: &Link, new: &NewLink, now: UnixMillis) -> Result<bool> {
        let before = history(taken);
        let params: [Param<'_>; 4] = [
            (&bigint(taken.id.0), Type::INT8),
            (&bigint(taken.version), Type::INT8),
            (&now.0, Type::INT8),
            (&before, Type::TEXT),
        ];
        let rows = Rows::of(&[(new, now)]);
        match self.write(&[(REPLACE, &params), (INSERT, &rows.params())]).await {
            Ok(answers) => Ok(!answers[1].is_empty()),
            Err(failed) => {
                let made =
                    failed.is_unknown && self.made_after_all(&[(new, now)]).await.is_ok_and(|ids| !ids.is_empty());
                if made { Ok(true) } else { Err(failed.error) }
            }
        }
    }

    /// Which of these links were made by a transaction that was not heard of to its end. Those that were not may still
    /// be, if it has not come to its lock yet: none of them is known to have failed.
    async fn made_after_all(&self, links: &[(&NewLink, UnixMillis)]) -> Result<HashSet<LinkId>> {
        let ids: Vec<i64> = links.iter().map(|(new, _)| bigint(new.id.0)).collect();
        // The lock waits for that transaction if it has it.
        let queries: [Query<'_>; 2] = [(LOCK, &[]), (MADE, &[(&ids, Type::INT8_ARRAY)])];
        link_ids(&self.again(&queries).await?[1])
    }
}

/// One of the writers: ends when no handle is left and everything that waited is done.
async fn write_all(inner: Arc<Inner>, writes: Arc<Mutex<mpsc::Receiver<Write>>>) {
    while let Some(mut group) = next_group(&mut *writes.lock().await).await {
        group.retain(|write| !write.is_given_up());
        while !group.is_empty() {
            let later = second_of_a_link(&mut group);
            write_group(&inner, group).await;
            group = later;
        }
    }
}

/// Takes out what asks for visits of a link for which another one of the group asks already: both would be granted the
/// same ones. A server has one question a link, see `resolve::flight`; this is for whoever else holds a handle.
fn second_of_a_link(group: &mut Vec<Write>) -> Vec<Write> {
    let mut asking = HashSet::new();
    let is_second = |write: &mut Write| match write {
        Write::Visits { ask, .. } => !asking.insert(ask.id),
        Write::Insert { .. } => false,
    };
    group.extract_if(.., is_second).collect()
}

async fn next_group(writes: &mut mpsc::Receiver<Write>) -> Option<Vec<Write>> {
    let first = writes.recv().await?;
    // Whoever can go on now comes along.
    tokio::task::yield_now().await;
    let mut rows = first.rows();
    let mut group = vec![first];
    while group.len() < GROUP_MAX && rows < GROUP_ROWS_MAX {
        let Ok(next) = writes.try_recv() else { break };
        rows += next.rows();
        group.push(next);
    }
    Some(group)
}

async fn write_group(inner: &Inner, group: Vec<Write>) {
    let (mut keys, mut links) = (HashSet::new(), Vec::new());
    let mut visits = Visits::default();
    for write in &group {
        match write {
            Write::Insert { links: new, now, .. } => {
                links.extend(new.iter().filter(|new| keys.insert(new.key)).map(|new| (new, *now)));
            }
            Write::Visits { ask, now, .. } => visits.add(ask, *now),
        }
    }
    // Neighbours in the index one after the other, in both tables: scattered over it, 5,000 rows of an import cost a
    // fifth to a quarter more of Postgres's CPU time (PERF.md).
    links.sort_by_cached_key(|(new, _)| (new.key.domain.0, new.key.code.to_string()));
    let rows = Rows::of(&links);
    let (insert, take) = (rows.params(), visits.params());
    let mut queries: Vec<Query<'_>> = Vec::new();
    if !links.is_empty() {
        queries.push((INSERT, &insert));
    }
    if !visits.ids.is_empty() {
        queries.push((TAKE_VISITS, &take));
    }
    let written = inner.write(&queries).await;
    if let Err(failed) = &written
        && matches!(failed.error, Error::Broken(_))
        && !failed.is_unknown
        && group.len() > 1
    {
        // One of them may be to blame: the others are not refused with it.
        for write in group {
            Box::pin(write_group(inner, vec![write])).await;
        }
        return;
    }
    let (made, taken) = outcome(inner, written, &links, !visits.ids.is_empty()).await;
    drop(queries);
    let made = made.map(Arc::new);
    for write in group {
        // Nobody listens when the request was given up meanwhile: what was written stands all the same.
        match write {
            Write::Insert { reply, .. } => drop(reply.send(made.as_ref().map(Arc::clone).map_err(Error::clone))),
            Write::Visits { ask, reply, .. } => {
                let taken = taken.as_ref().map_err(Error::clone);
                // Of a link that is gone nothing is left.
                drop(reply.send(taken.map(|taken| taken.get(&ask.id).copied().unwrap_or(Taken::UsedUp))));
            }
        }
    }
}

/// The links that were made, and what was granted of each quota.
async fn outcome(
    inner: &Inner,
    written: std::result::Result<Vec<Vec<Row>>, Failed>,
    links: &[(&NewLink, UnixMillis)],
    has_visits: bool,
) -> (Result<HashSet<LinkId>>, Result<HashMap<LinkId, Taken>>) {
    match written {
        Ok(mut answers) => {
            let visits = if has_visits { answers.pop() } else { None };
            let taken = visits.unwrap_or_default().iter().map(|row| taken(inner, row)).collect();
            (link_ids(&answers.pop().unwrap_or_default()), taken)
        }
        Err(failed) => {
            let found = match failed.is_unknown && !links.is_empty() {
                true => inner.made_after_all(links).await.ok().filter(|made| !made.is_empty()),
                false => None,
            };
            (found.ok_or_else(|| failed.error.clone()), Err(failed.error))
        }
    }
}

/// A row of what [`TAKE_VISITS`] says. What it swept is counted here: whoever asked may have gone.
fn taken(inner: &Inner, row: &Row) -> Result<(LinkId, Taken)> {
    inner.visits_swept.fetch_add(number(row, 3)?, Ordering::Relaxed);
    let taken = match (number(row, 1)?, get(row, 2)?) {
        (0, true) => Taken::Held,
        (0, false) => Taken::UsedUp,
        (count, _) => Taken::Visits { count, leased: true },
    };
    Ok((LinkId(number(row, 0)?), taken))
}

fn link_ids(rows: &[Row]) -> Result<HashSet<LinkId>> {
    rows.iter().map(|row| number(row, 0).map(LinkId)).collect()
}

/// What is asked of quotas, by columns: see [`TAKE_VISITS`].
#[derive(Default)]
struct Visits {
    ids: Vec<i64>,
    wanted: Vec<i64>,
    leases: Vec<i64>,
    settled_ids: Vec<i64>,
    settled: Vec<i64>,
    rests: Vec<i64>,
    at: UnixMillis,
}

impl Visits {
    fn add(&mut self, ask: &QuotaAsk, now: UnixMillis) {
        self.ids.push(bigint(ask.id.0));
        self.wanted.push(ask.wanted.into());
        self.leases.push(bigint(ask.lease));
        for settled in &ask.settled {
            self.settled_ids.push(bigint(ask.id.0));
            self.settled.push(bigint(settled.lease));
            self.rests.push(settled.rest.into());
        }
        self.at = self.at.max(now);
    }

    fn params(&self) -> [Param<'_>; 7] {
        [
            (&self.ids, Type::INT8_ARRAY),
            (&self.wanted, Type::INT8_ARRAY),
            (&self.leases, Type::INT8_ARRAY),
            (&self.settled_ids, Type::INT8_ARRAY),
            (&self.settled, Type::INT8_ARRAY),
            (&self.rests, Type::INT8_ARRAY),
            (&self.at.0, Type::INT8),
        ]
    }
}

/// Links by columns: a row more costs its values, and no statement.
#[derive(Default)]
struct Rows<'a> {
    ids: Vec<i64>,
    domains: Vec<i32>,
    codes: Vec<String>,
    targets: Vec<&'a str>,
    written: Vec<Option<&'a str>>,
    statuses: Vec<Option<i32>>,
    cache_controls: Vec<Option<&'a str>>,
    titles: Vec<Option<&'a str>>,
    notes: Vec<Option<&'a str>>,
    starts: Vec<Option<i64>>,
    ends: Vec<Option<i64>>,
    expired_urls: Vec<Option<&'a str>>,
    max_visits: Vec<Option<i64>>,
    forward_queries: Vec<Option<bool>>,
    created: Vec<i64>,
    at: Vec<i64>,
    imported: Vec<i64>,
    tag_ids: Vec<i64>,
    tags: Vec<&'a str>,
}

impl<'a> Rows<'a> {
    fn of(links: &[(&'a NewLink, UnixMillis)]) -> Self {
        let mut rows = Self::default();
        for (new, now) in links {
            let fields = &new.fields;
            let id = bigint(new.id.0);
            rows.ids.push(id);
            rows.domains.push(i32::from(new.key.domain.0));
            rows.codes.push(new.key.code.to_string());
            rows.targets.push(fields.target.as_str());
            rows.written.push(written(fields));
            rows.statuses.push(fields.status.map(i32::from));
            rows.cache_controls.push(fields.cache_control.as_deref());
            rows.titles.push(fields.title.as_deref());
            rows.notes.push(fields.note.as_deref());
            rows.starts.push(fields.starts_at.map(|at| at.0));
            rows.ends.push(fields.expires_at.map(|at| at.0));
            rows.expired_urls.push(fields.expired_url.as_ref().map(Target::as_str));
            rows.max_visits.push(fields.max_visits.map(bigint));
            rows.forward_queries.push(fields.forward_query);
            rows.created.push(new.created_at.0);
            rows.at.push(now.0);
            rows.imported.push(bigint(new.imported_clicks));
            rows.tag_ids.extend(fields.tags.iter().map(|_| id));
            rows.tags.extend(fields.tags.iter().map(String::as_str));
        }
        rows
    }

    /// In the order of [`INSERT`].
    fn params(&self) -> [Param<'_>; 19] {
        [
            (&self.ids, Type::INT8_ARRAY),
            (&self.domains, Type::INT4_ARRAY),
            (&self.codes, Type::TEXT_ARRAY),
            (&self.targets, Type::TEXT_ARRAY),
            (&self.written, Type::TEXT_ARRAY),
            (&self.statuses, Type::INT4_ARRAY),
            (&self.cache_controls, Type::TEXT_ARRAY),
            (&self.titles, Type::TEXT_ARRAY),
            (&self.notes, Type::TEXT_ARRAY),
            (&self.starts, Type::INT8_ARRAY),
            (&self.ends, Type::INT8_ARRAY),
            (&self.expired_urls, Type::TEXT_ARRAY),
            (&self.max_visits, Type::INT8_ARRAY),
            (&self.forward_queries, Type::BOOL_ARRAY),
            (&self.created, Type::INT8_ARRAY),
            (&self.at, Type::INT8_ARRAY),
            (&self.imported, Type::INT8_ARRAY),
            (&self.tag_ids, Type::INT8_ARRAY),
            (&self.tags, Type::TEXT_ARRAY),
        ]
    }
}
