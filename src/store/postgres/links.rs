//! Links and their changes in Postgres; how they are made is in `insert`.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};

use super::connect::Pool;
use super::fence::Server;
use super::{CLUSTER, Inner, NO_TIMELINE, Param, Postgres, TIMELINE, bigint, get, limited, number, only};
use crate::domain::key::{Case, Code, DomainId, Key};
use crate::domain::link::{Entry, Fields, Link, LinkId, Rules, STATUSES};
use crate::domain::target::Target;
use crate::domain::time::{UnixMillis, monotonic};
use crate::store::row::{
    Change, ChangeRow, Filter, Found, IDS_LOST, LEASES_LOST_MS, Patch, Position, Reading, history,
};
use crate::store::{Error, Result};

/// Used up is a link of which nobody holds a lease either, dead holders included: that it becomes so is a change, of which
/// the feed tells. One search of the index per key, whatever the planner knows of the table: a plan that was made while it was small
/// would read all of it, until the next `ANALYZE`.
const LOOK_UP: &str =
    "SELECT a.n, l.id, l.target_url, l.status, l.cache_control, l.forward_query, l.starts_at, l.expires_at,
    l.expired_url, l.disabled_at IS NOT NULL OR l.deleted_at IS NOT NULL OR coalesce(
      l.max_visits <= coalesce((SELECT used FROM link_quotas WHERE link_id = l.id), 0)
        AND NOT EXISTS (SELECT 1 FROM quota_leases WHERE link_id = l.id), false),
    l.max_visits IS NOT NULL
  FROM unnest($1::int4[], $2::text[]) WITH ORDINALITY AS a (domain_id, code, n)
  CROSS JOIN LATERAL (SELECT * FROM links WHERE domain_id = a.domain_id AND code = a.code LIMIT 1) AS l";

const LINK: &str = "SELECT l.id, l.domain_id, l.code, l.target_url, l.target_written, l.status, l.cache_control, l.title,
    l.note, l.starts_at, l.expires_at, l.expired_url, l.max_visits, l.forward_query, l.version, l.created_at, l.updated_at,
    l.disabled_at, l.deleted_at, ARRAY(SELECT tag FROM tags WHERE link_id = l.id),
    (SELECT imported FROM link_totals WHERE link_id = l.id), (SELECT used FROM link_quotas WHERE link_id = l.id)
      - (SELECT coalesce(sum(granted), 0)::int8 FROM quota_leases WHERE link_id = l.id)
  FROM links l";

/// The version is that of the feed's row, which the transaction holds: none is given between.
const SAVE: &str = "WITH saved AS (
    UPDATE links SET target_url = $3, target_written = $4, status = $5, cache_control = $6, title = $7, note = $8,
      starts_at = $9, expires_at = $10, expired_url = $11, max_visits = $12, forward_query = $13, updated_at = $14,
      disabled_at = $15, deleted_at = $16, version =
        (SELECT version FROM feed WHERE current_setting('waypost.begun', true) = 'yes') + 1
    WHERE id = $1 AND version = $2 RETURNING id, domain_id, code, version
  ), untagged AS (
    DELETE FROM tags USING saved WHERE link_id = saved.id AND tag <> ALL ($17::text[])
  ), tagged AS (
    INSERT INTO tags (link_id, tag) SELECT saved.id, t.tag FROM saved CROSS JOIN unnest($17::text[]) AS t (tag)
    ON CONFLICT (link_id, tag) DO NOTHING
  ), recorded AS (
    INSERT INTO link_changes (version, at, domain_id, code, what, before)
    SELECT version, $14, domain_id, code, $18, $19 FROM saved
  ) SELECT version FROM saved";

const CHANGES: &str = "SELECT version, domain_id, code, what = 'create' FROM link_changes
  WHERE version > $1 ORDER BY version LIMIT $2";
const EDITS: &str = "SELECT version, domain_id, code, false FROM link_changes
  WHERE what <> 'create' ORDER BY version DESC LIMIT $1";

/// How far a standby is behind, in seconds; 0 if it has replayed all that it got.
const LAG: &str =
    "SELECT CASE WHEN NOT pg_is_in_recovery() OR pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() THEN 0
    ELSE extract(epoch FROM now() - pg_last_xact_replay_timestamp()) END::float8";

/// Epochs that were given in what was lost are fewer than a thousand. The row of ids may be among what was lost. A change of
/// timelines may pass some by, of which the server has nothing: what they were given is as many steps, $5, so that no other
/// line of servers comes to the same numbers.
const BEGIN_GENERATION: &str = "WITH begun AS (
    UPDATE feed SET generation = generation + 1 WHERE generation = $1 RETURNING one
  ), moved AS (
    INSERT INTO ranges (name, next) SELECT 'link_ids', 1 + $3::int8 FROM begun
    ON CONFLICT (name) DO UPDATE SET next = ranges.next + $3::int8
  ) UPDATE worker_leases SET epoch = epoch + 1000,
    until_ms = greatest(until_ms, (extract(epoch FROM now()) * 1000)::int8) + $2 WHERE EXISTS (SELECT 1 FROM begun)";
const CHANGE_TIMELINE: &str = "WITH begun AS (
    UPDATE feed SET timeline = $2, generation = generation + CASE WHEN timeline = '' THEN 0 ELSE $5::int8 END
    WHERE timeline = $1 RETURNING one
  ), moved AS (
    INSERT INTO ranges (name, next) SELECT 'link_ids', 1 + $4::int8 * $5::int8 FROM begun WHERE $1 <> ''
    ON CONFLICT (name) DO UPDATE SET next = ranges.next + $4::int8 * $5::int8
  ) UPDATE worker_leases SET epoch = epoch + 1000 * $5::int8,
    until_ms = greatest(until_ms, (extract(epoch FROM now()) * 1000)::int8) + $3::int8 * $5::int8
    WHERE $1 <> '' AND EXISTS (SELECT 1 FROM begun)";
/// More failovers than anybody has between two polls; so many steps of ids are far from the end of their numbers.
const STEPS_MAX: i64 = 1000;
/// The longest wait of a change that met another one: 128 ms.
const AGAIN_MS_LOG2_MAX: u32 = 7;

/// The tries of a change that reads a link and saves it only if it is still the same: one of those who meet always gets
/// through, the others wait a random while, longer each time, so that they come apart; for as long as a write may take.
pub(super) struct Tries {
    until: Instant,
    done: u32,
}

impl Tries {
    pub(super) fn within(limit: Duration) -> Self {
        Self { until: monotonic() + limit, done: 0 }
    }

    /// Waits before every try but the first; false when the time is over.
    pub(super) async fn again(&mut self) -> bool {
        if self.done > 0 {
            let wait_ms = rand::random_range(0..=1 << self.done.min(AGAIN_MS_LOG2_MAX));
            tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        }
        self.done += 1;
        self.done == 1 || monotonic() < self.until
    }
}

impl Postgres {
    pub async fn look_up(&self, keys: &[Key]) -> Result<Vec<Found>> {
        let (domains, codes) = columns(keys);
        let params: [Param<'_>; 2] = [(&domains, Type::INT4_ARRAY), (&codes, Type::TEXT_ARRAY)];
        let inner = &self.inner;
        let asking = inner.within(inner.lookup_timeout, &inner.primary, LOOK_UP, &params);
        let rows = limited(inner.lookup_timeout, asking).await?;
        let mut found = vec![Found::Missing; keys.len()];
        for row in &rows {
            let place: usize = number(row, 0)?;
            // Somebody else wrote into the table: this row cannot be read, its neighbours can.
            found[place - 1] = entry(row).map_or(Found::Unreadable, Found::Entry);
        }
        Ok(found)
    }

    pub async fn link(&self, key: Key) -> Result<Option<Link>> {
        let (domain, code) = (i32::from(key.domain.0), key.code.to_string());
        let sql = format!("{LINK} WHERE l.domain_id = $1 AND l.code = $2");
        let params: [Param<'_>; 2] = [(&domain, Type::INT4), (&code, Type::TEXT)];
        // Among the transactions, but not the readers: edits that read all at once would lose to each other.
        let answers = self.inner.transaction(&[(&sql, &params)]).await?;
        answers[0].first().map(whole).transpose()
    }

    pub async fn page(
        &self,
        filter: &Filter,
        after: Option<LinkId>,
        limit: u32,
        reading: Reading,
    ) -> Result<Vec<Link>> {
        let wanted = Wanted::new(filter);
        let (after, limit) = (after.map_or(0, |after| bigint(after.0)), i64::from(limit));
        let mut params = wanted.params();
        params.extend([(&after as &(dyn ToSql + Sync), Type::INT8), (&limit, Type::INT8)]);
        let n = params.len();
        let sql = format!("{LINK} WHERE {} AND l.id > ${} ORDER BY l.id LIMIT ${n}", wanted.sql, n - 1);
        self.inner.read_lately(reading, &sql, &params).await?.iter().map(whole).collect()
    }

    pub async fn count(&self, filter: &Filter, reading: Reading) -> Result<u64> {
        let wanted = Wanted::new(filter);
        let sql = format!("SELECT count(*) FROM links l WHERE {}", wanted.sql);
        number(only(&self.inner.read_lately(reading, &sql, &wanted.params()).await?)?, 0)
    }

    pub async fn position(&self) -> Result<Position> {
        let inner = &self.inner;
        let shown = inner.shows_timeline.load(Ordering::Relaxed);
        let rows = match inner.poll(shown).await {
            // 42883: there is no such function; 42501: it is not for us.
            Err(Error::Schema(why)) if shown && ["42883", "42501"].iter().any(|code| why.contains(code)) => {
                let rows = inner.poll(false).await?;
                // Not before: it may have been the table that is not for us, until somebody grants it.
                inner.shows_timeline.store(false, Ordering::Relaxed);
                rows
            }
            rows => rows?,
        };
        let row = only(&rows)?;
        let (known, present): (&str, &str) = (get(row, 3)?, get(row, 4)?);
        if present.is_empty() || present == known {
            return Ok(Position { version: number(row, 0)?, generation: number(row, 1)?, asked: number(row, 2)? });
        }
        let (leases, ids, steps) = (bigint(LEASES_LOST_MS), bigint(IDS_LOST), steps(known, present));
        let params: [Param<'_>; 5] = [
            (&known, Type::TEXT),
            (&present, Type::TEXT),
            (&leases, Type::INT8),
            (&ids, Type::INT8),
            (&steps, Type::INT8),
        ];
        inner.again(&[(CHANGE_TIMELINE, &params)]).await?;
        let rows = inner.poll(true).await?;
        let row = only(&rows)?;
        Ok(Position { version: number(row, 0)?, generation: number(row, 1)?, asked: number(row, 2)? })
    }

    pub async fn begin_generation(&self, seen: u64) -> Result<u64> {
        let (leases, ids) = (bigint(LEASES_LOST_MS), bigint(IDS_LOST));
        let params: [Param<'_>; 3] = [(&bigint(seen), Type::INT8), (&leases, Type::INT8), (&ids, Type::INT8)];
        let answers = self.inner.again(&[(BEGIN_GENERATION, &params), ("SELECT generation FROM feed", &[])]).await?;
        number(only(&answers[1])?, 0)
    }

    pub async fn changes(&self, position: u64, limit: u32) -> Result<Vec<ChangeRow>> {
        let params: [Param<'_>; 2] = [(&bigint(position), Type::INT8), (&i64::from(limit), Type::INT8)];
        self.inner.one(CHANGES, &params).await?.iter().map(changed).collect()
    }

    pub async fn edits(&self, limit: u32) -> Result<Vec<ChangeRow>> {
        let rows = self.inner.one(EDITS, &[(&i64::from(limit), Type::INT8)]).await?;
        rows.iter().rev().map(changed).collect()
    }

    pub async fn change(&self, key: Key, change: &Change, now: UnixMillis) -> Result<Option<Link>> {
        let mut tries = Tries::within(self.inner.write_timeout);
        while tries.again().await {
            let Some(before) = self.link(key).await?.filter(|link| link.deleted_at.is_none()) else {
                return Ok(None);
            };
            let mut after = before.clone();
            let what = change.apply(&mut after, now);
            if let Some(after) = self.save(&before, after, what, now).await? {
                return Ok(Some(after));
            }
        }
        Err(busy(key))
    }

    /// What an import says of a link that is there; false if somebody changed it in between.
    pub(super) async fn update(&self, before: &Link, given: &Patch, now: UnixMillis) -> Result<bool> {
        let mut after = before.clone();
        given.apply(&mut after.fields);
        Ok(self.save(before, after, "edit", now).await?.is_some())
    }

    /// None if `before` is no longer what is stored.
    async fn save(&self, before: &Link, mut after: Link, what: &str, now: UnixMillis) -> Result<Option<Link>> {
        let fields = &after.fields;
        let millis = |at: Option<UnixMillis>| at.map(|at| at.0);
        let params: [Param<'_>; 19] = [
            (&bigint(before.id.0), Type::INT8),
            (&bigint(before.version), Type::INT8),
            (&fields.target.as_str(), Type::TEXT),
            (&written(fields), Type::TEXT),
            (&fields.status.map(i32::from), Type::INT4),
            (&fields.cache_control, Type::TEXT),
            (&fields.title, Type::TEXT),
            (&fields.note, Type::TEXT),
            (&millis(fields.starts_at), Type::INT8),
            (&millis(fields.expires_at), Type::INT8),
            (&fields.expired_url.as_ref().map(Target::as_str), Type::TEXT),
            (&fields.max_visits.map(bigint), Type::INT8),
            (&fields.forward_query, Type::BOOL),
            (&now.0, Type::INT8),
            (&millis(after.disabled_at), Type::INT8),
            (&millis(after.deleted_at), Type::INT8),
            (&fields.tags, Type::TEXT_ARRAY),
            (&what, Type::TEXT),
            (&history(before), Type::TEXT),
        ];
        let answers = self.inner.write(&[(SAVE, &params)]).await?;
        let Some(row) = answers[0].first() else { return Ok(None) };
        after.version = number(row, 0)?;
        after.updated_at = now;
        Ok(Some(after))
    }
}

/// Closes the idle connections of a pool, unless it is taken back: after a poll that failed, or was given up. The server may
/// hang: each of them would cost whoever takes it a time-out of its own, for longer than it takes to connect anew.
struct Doubt<'a>(Option<&'a Pool>);

impl Drop for Doubt<'_> {
    fn drop(&mut self) {
        if let Some(pool) = self.0 {
            pool.retain(|_, _| false);
        }
    }
}

/// Timelines from one to the next: one at least, also if it is another server's altogether.
fn steps(known: &str, present: &str) -> i64 {
    let number = |timeline| i64::from_str_radix(timeline, 16).unwrap_or(0);
    (number(present) - number(known)).clamp(1, STEPS_MAX)
}

impl Inner {
    /// The feed's row, of a server that takes writes and is the store.
    async fn poll(&self, with_timeline: bool) -> Result<Vec<Row>> {
        let (timeline, cluster) = if with_timeline { (TIMELINE, CLUSTER) } else { (NO_TIMELINE, NO_TIMELINE) };
        let sql = format!(
            "SELECT version, generation, asked, timeline, {timeline}, current_setting('transaction_read_only'), {cluster}
             FROM feed"
        );
        let mut doubt = Doubt(Some(&self.primary));
        let rows = self.one(&sql, &[]).await?;
        let row = only(&rows)?;
        if get::<&str>(row, 5)? == "on" {
            return Err(Error::Unavailable("postgres takes no writes: it is a standby, or was made read-only".into()));
        }
        self.fence.admit(Server::new(get(row, 6)?, get(row, 4)?)).map_err(Error::Unavailable)?;
        doubt.0 = None;
        Ok(rows)
    }

    /// From the standby, if there is one, it answers and it is not too far behind.
    pub(super) async fn read_lately(&self, reading: Reading, sql: &str, params: &[Param<'_>]) -> Result<Vec<Row>> {
        if let (Reading::Lately, Some(replica)) = (reading, &self.replica) {
            let asking = self.within(self.lookup_timeout, replica, LAG, &[]);
            let lag = limited(self.lookup_timeout, asking).await;
            let lag: Option<f64> = lag.and_then(|rows| get(only(&rows)?, 0)).unwrap_or_default();
            if lag.is_some_and(|lag| lag <= self.replica_max_lag.as_secs_f64())
                && let Ok(mut answers) = self.flight(replica, &[(sql, params)]).await
            {
                return Ok(answers.pop().unwrap_or_default());
            }
        }
        self.read(sql, params).await
    }
}

pub(super) fn busy(key: Key) -> Error {
    Error::Unavailable(format!("others change the link {} all the time: try again in a moment", key.code))
}

/// Keys as two columns.
pub(super) fn columns(keys: &[Key]) -> (Vec<i32>, Vec<String>) {
    keys.iter().map(|key| (i32::from(key.domain.0), key.code.to_string())).unzip()
}

/// What was written, where it is not what is served.
pub(super) fn written(fields: &Fields) -> Option<&str> {
    (fields.target_written != fields.target.as_str()).then_some(&fields.target_written)
}

fn entry(row: &Row) -> Result<Entry> {
    Ok(Entry {
        id: LinkId(number(row, 1)?),
        target: target(get(row, 2)?)?,
        rules: Rules {
            status: status(row, 3)?,
            cache_control: get::<Option<&str>>(row, 4)?.map(Into::into),
            forward_query: get(row, 5)?,
            starts_at: millis(row, 6)?,
            expires_at: millis(row, 7)?,
            expired_url: get::<Option<&str>>(row, 8)?.map(target).transpose()?,
            gone: get(row, 9)?,
            limited: get(row, 10)?,
        },
    })
}

pub(super) fn whole(row: &Row) -> Result<Link> {
    let target_url = target(get(row, 3)?)?;
    // In the order of bytes, as they are given; the server has an order of its own.
    let mut tags: Vec<String> = get(row, 19)?;
    tags.sort();
    Ok(Link {
        id: LinkId(number(row, 0)?),
        key: key(row, 1, 2)?,
        fields: Fields {
            target_written: get::<Option<String>>(row, 4)?.unwrap_or_else(|| target_url.as_str().to_owned()),
            target: target_url,
            status: status(row, 5)?,
            cache_control: get(row, 6)?,
            title: get(row, 7)?,
            tags,
            note: get(row, 8)?,
            starts_at: millis(row, 9)?,
            expires_at: millis(row, 10)?,
            expired_url: get::<Option<&str>>(row, 11)?.map(target).transpose()?,
            max_visits: optional(row, 12)?,
            forward_query: get(row, 13)?,
        },
        version: number(row, 14)?,
        created_at: UnixMillis(get(row, 15)?),
        updated_at: UnixMillis(get(row, 16)?),
        disabled_at: millis(row, 17)?,
        deleted_at: millis(row, 18)?,
        imported_clicks: optional(row, 20)?.unwrap_or(0),
        visits_used: optional(row, 21)?.unwrap_or(0),
    })
}

/// A target that somebody else wrote and that could end a header is an error, not an answer.
fn target(text: &str) -> Result<Target> {
    Target::new(text).ok_or_else(|| Error::Broken("a target in the store is not a serialised URL".into()))
}

fn status(row: &Row, column: usize) -> Result<Option<u16>> {
    let Some(status) = get::<Option<i32>>(row, column)? else { return Ok(None) };
    let known = STATUSES.into_iter().find(|known| i32::from(*known) == status);
    known.map(Some).ok_or_else(|| Error::Broken(format!("a link in the store has status {status}")))
}

fn millis(row: &Row, column: usize) -> Result<Option<UnixMillis>> {
    Ok(get::<Option<i64>>(row, column)?.map(UnixMillis))
}

fn optional(row: &Row, column: usize) -> Result<Option<u64>> {
    if get::<Option<i64>>(row, column)?.is_none() { Ok(None) } else { number(row, column).map(Some) }
}

pub(super) fn key(row: &Row, domain: usize, code: usize) -> Result<Key> {
    let id: i32 = get(row, domain)?;
    let id = u16::try_from(id).map_err(|_| Error::Broken(format!("a row has the domain {id}")))?;
    let text: &str = get(row, code)?;
    let code = Code::parse(text.as_bytes(), Case::Sensitive)
        .map_err(|error| Error::Broken(format!("a row has the code {text:?}: {error}")))?;
    Ok(Key { domain: DomainId(id), code })
}

fn changed(row: &Row) -> Result<ChangeRow> {
    Ok(ChangeRow { version: number(row, 0)?, key: key(row, 1, 2)?, created: get(row, 3)? })
}

/// The part of a query that a filter is, and its values.
struct Wanted {
    sql: String,
    pattern: Option<String>,
    tag: Option<String>,
    domain: Option<i32>,
}

impl Wanted {
    fn new(filter: &Filter) -> Self {
        // Postgres has no text with a NUL, so that none has a part with one; the tag of one character is on no link.
        let without_nul = |text: &String| text.replace('\0', "\u{1}");
        let pattern = filter.search.as_ref().map(|search| {
            let search = without_nul(search);
            format!("%{}%", search.replace('\\', "\\\\").replace('%', "\\%").replace('_', "\\_"))
        });
        let (tag, domain) = (filter.tag.as_ref().map(without_nul), filter.domain.map(|domain| i32::from(domain.0)));
        let mut sql = "l.deleted_at IS NULL".to_owned();
        let mut n = 0;
        if pattern.is_some() {
            n += 1;
            sql += &format!(" AND (l.code ILIKE ${n} OR l.target_url ILIKE ${n} OR l.title ILIKE ${n})");
        }
        if tag.is_some() {
            n += 1;
            sql += &format!(" AND l.id IN (SELECT link_id FROM tags WHERE tag = ${n})");
        }
        if domain.is_some() {
            n += 1;
            sql += &format!(" AND l.domain_id = ${n}");
        }
        Self { sql, pattern, tag, domain }
    }

    fn params(&self) -> Vec<Param<'_>> {
        let mut params: Vec<Param<'_>> = Vec::new();
        if let Some(pattern) = &self.pattern {
            params.push((pattern, Type::TEXT));
        }
        if let Some(tag) = &self.tag {
            params.push((tag, Type::TEXT));
        }
        if let Some(domain) = &self.domain {
            params.push((domain, Type::INT4));
        }
        params
    }
}
