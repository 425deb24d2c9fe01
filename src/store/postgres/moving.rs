//! What moves out of an embedded store into Postgres.
//!
//! In: links as they are, and what there is beside them. Out: the same in Postgres, and how far it is.
//! Never: changes a link that is there; mixes two stores: a mark in `settings` says which one moves in.
//! At its limit: what stopped half-way is gone on with from the mark, which each transaction moves together with its links.

use tokio_postgres::types::Type;

use super::links::{columns, written};
use super::{LOCK, Param, Postgres, Query, bigint, get, only};
use crate::domain::link::{Link, LinkId};
use crate::domain::target::Target;
use crate::domain::time::UnixMillis;
use crate::store::row::Rest;
use crate::store::{Error, Result};

/// Settings: whose links move in, the highest id that has, and that all have.
const FROM: &str = "moved.from";
const TO: &str = "moved.to";
const DONE: &str = "moved.done";

const STATE: &str = "SELECT (SELECT value FROM settings WHERE name = 'moved.from'),
    (SELECT value FROM settings WHERE name = 'moved.to'), EXISTS (SELECT 1 FROM links),
    EXISTS (SELECT 1 FROM settings WHERE name = 'moved.done')";

const ADOPT: &str = "WITH adopted AS (
    INSERT INTO links (id, domain_id, code, target_url, target_written, status, cache_control, title, note, starts_at,
      expires_at, expired_url, max_visits, forward_query, version, created_at, updated_at, disabled_at, deleted_at)
    SELECT * FROM unnest($1::int8[], $2::int4[], $3::text[], $4::text[], $5::text[], $6::int4[], $7::text[], $8::text[],
      $9::text[], $10::int8[], $11::int8[], $12::text[], $13::int8[], $14::bool[], $15::int8[], $16::int8[], $17::int8[],
      $18::int8[], $19::int8[])
    ON CONFLICT DO NOTHING RETURNING id
  ), tagged AS (
    INSERT INTO tags (link_id, tag)
    SELECT t.id, t.tag FROM unnest($20::int8[], $21::text[]) AS t (id, tag) JOIN adopted ON adopted.id = t.id
  ), counted AS (
    INSERT INTO link_totals (link_id, imported)
    SELECT c.id, c.n FROM unnest($1::int8[], $22::int8[]) AS c (id, n) JOIN adopted ON adopted.id = c.id WHERE c.n > 0
  ) INSERT INTO link_quotas (link_id, used)
    SELECT u.id, u.n FROM unnest($1::int8[], $23::int8[]) AS u (id, n) JOIN adopted ON adopted.id = u.id WHERE u.n > 0";
const MOVE_MARK: &str = "UPDATE settings SET value = convert_to($1::int8::text, 'UTF8')
  WHERE name = 'moved.to' AND convert_from(value, 'UTF8')::int8 < $1";

const SETTINGS_OF_NEW: &str = "INSERT INTO settings (name, value)
  SELECT * FROM unnest($1::text[], $2::bytea[]) ON CONFLICT (name) DO UPDATE SET value = excluded.value";
const SETTINGS: &str = "INSERT INTO settings (name, value)
  SELECT * FROM unnest($1::text[], $2::bytea[]) ON CONFLICT (name) DO NOTHING";
const DOMAINS: &str =
    "INSERT INTO domains (id, host) SELECT * FROM unnest($1::int4[], $2::text[]) ON CONFLICT DO NOTHING";
const RANGES: &str = "INSERT INTO ranges (name, next) SELECT * FROM unnest($1::text[], $2::int8[])
  ON CONFLICT (name) DO UPDATE SET next = greatest(ranges.next, excluded.next)";
const KEYS: &str =
    "INSERT INTO api_keys (id, name, digest, scopes, per_minute, created_at, expires_at, revoked_at, last_used_at)
  SELECT * FROM unnest($1::text[], $2::text[], $3::bytea[], $4::text[], $5::int8[], $6::int8[], $7::int8[], $8::int8[],
    $9::int8[]) ON CONFLICT (id) DO NOTHING";
const PINS: &str =
    "INSERT INTO pins (domain_id, code) SELECT * FROM unnest($1::int4[], $2::text[]) ON CONFLICT DO NOTHING";
/// Once: who is done already stays in his generation.
const FINISH: &str = "WITH done AS (
    INSERT INTO settings (name, value) VALUES ('moved.done', '1') ON CONFLICT (name) DO NOTHING RETURNING name
  ) UPDATE feed SET version = greatest(version, $1::int8), generation = greatest(generation, $2::int8) + 1
    WHERE EXISTS (SELECT 1 FROM done)";

/// How far a move is.
struct State {
    from: Option<String>,
    to: u64,
    has_links: bool,
    is_done: bool,
}

impl Postgres {
    pub async fn adopt(&self, links: &[Link]) -> Result<LinkId> {
        let State { from: Some(_), .. } = self.moved().await? else {
            return Err(Error::Schema("links move in after the settings of their store: adopt those first".into()));
        };
        let (domains, codes) = columns(&links.iter().map(|link| link.key).collect::<Vec<_>>());
        let ids = all(links, |link| bigint(link.id.0));
        let targets = all(links, |link| link.fields.target.as_str());
        let as_written = all(links, |link| written(&link.fields));
        let statuses = all(links, |link| link.fields.status.map(i32::from));
        let cache_controls = all(links, |link| link.fields.cache_control.as_deref());
        let titles = all(links, |link| link.fields.title.as_deref());
        let notes = all(links, |link| link.fields.note.as_deref());
        let starts = all(links, |link| millis(link.fields.starts_at));
        let ends = all(links, |link| millis(link.fields.expires_at));
        let expired_urls = all(links, |link| link.fields.expired_url.as_ref().map(Target::as_str));
        let max_visits = all(links, |link| link.fields.max_visits.map(bigint));
        let forward_queries = all(links, |link| link.fields.forward_query);
        let versions = all(links, |link| bigint(link.version));
        let created = all(links, |link| link.created_at.0);
        let updated = all(links, |link| link.updated_at.0);
        let disabled = all(links, |link| millis(link.disabled_at));
        let deleted = all(links, |link| millis(link.deleted_at));
        let imported = all(links, |link| bigint(link.imported_clicks));
        let used = all(links, |link| bigint(link.visits_used));
        let pairs = links.iter().flat_map(|link| link.fields.tags.iter().map(|tag| (bigint(link.id.0), tag.as_str())));
        let (tag_ids, tags): (Vec<i64>, Vec<&str>) = pairs.unzip();
        let last = ids.iter().copied().max().unwrap_or(0);
        let params: [Param<'_>; 23] = [
            (&ids, Type::INT8_ARRAY),
            (&domains, Type::INT4_ARRAY),
            (&codes, Type::TEXT_ARRAY),
            (&targets, Type::TEXT_ARRAY),
            (&as_written, Type::TEXT_ARRAY),
            (&statuses, Type::INT4_ARRAY),
            (&cache_controls, Type::TEXT_ARRAY),
            (&titles, Type::TEXT_ARRAY),
            (&notes, Type::TEXT_ARRAY),
            (&starts, Type::INT8_ARRAY),
            (&ends, Type::INT8_ARRAY),
            (&expired_urls, Type::TEXT_ARRAY),
            (&max_visits, Type::INT8_ARRAY),
            (&forward_queries, Type::BOOL_ARRAY),
            (&versions, Type::INT8_ARRAY),
            (&created, Type::INT8_ARRAY),
            (&updated, Type::INT8_ARRAY),
            (&disabled, Type::INT8_ARRAY),
            (&deleted, Type::INT8_ARRAY),
            (&tag_ids, Type::INT8_ARRAY),
            (&tags, Type::TEXT_ARRAY),
            (&imported, Type::INT8_ARRAY),
            (&used, Type::INT8_ARRAY),
        ];
        self.inner.again(&[(LOCK, &[]), (ADOPT, &params), (MOVE_MARK, &[(&last, Type::INT8)])]).await?;
        Ok(LinkId(self.moved().await?.to))
    }

    pub async fn adopt_rest(&self, rest: &Rest, done: bool) -> Result<(LinkId, bool)> {
        let state = self.moved().await?;
        match &state.from {
            Some(from) if *from != rest.store_id => {
                return Err(Error::Schema(format!(
                    "links of another store ({from}) have moved into this one: move into an empty database"
                )));
            }
            None if state.has_links => {
                return Err(Error::Schema("the store has links of its own: move into an empty database".into()));
            }
            _ => {}
        }
        let is_new = state.from.is_none();
        let marks = [(FROM, rest.store_id.as_bytes()), (TO, b"0".as_slice())];
        let settings = rest.settings.iter().map(|(name, value)| (name.as_str(), value.as_slice()));
        // The marks of a store that was itself moved into say nothing about this one.
        let settings = settings.filter(|(name, _)| ![FROM, TO, DONE].contains(name));
        let (names, values): (Vec<&str>, Vec<&[u8]>) = settings.chain(marks).unzip();
        let (domains, hosts): (Vec<i32>, Vec<&str>) =
            rest.domains.iter().map(|(id, host)| (i32::from(id.0), host.as_str())).unzip();
        let (ranges, nexts): (Vec<&str>, Vec<i64>) =
            rest.ranges.iter().map(|(name, next)| (name.as_str(), bigint(*next))).unzip();
        let (pin_domains, pin_codes) = columns(&rest.pins);
        let keys = &rest.keys;
        let key_ids = all(keys, |key| key.id.as_str());
        let key_names = all(keys, |key| key.name.as_deref());
        let digests = all(keys, |key| key.digest.as_slice());
        let scopes = all(keys, |key| key.scopes.to_string());
        let limits = all(keys, |key| key.per_minute.map(i64::from));
        let created = all(keys, |key| key.created_at.0);
        let ends = all(keys, |key| millis(key.expires_at));
        let revoked = all(keys, |key| millis(key.revoked_at));
        let used = all(keys, |key| millis(key.last_used_at));
        let (settings, domains, ranges, pins): ([Param<'_>; 2], [Param<'_>; 2], [Param<'_>; 2], [Param<'_>; 2]) = (
            [(&names, Type::TEXT_ARRAY), (&values, Type::BYTEA_ARRAY)],
            [(&domains, Type::INT4_ARRAY), (&hosts, Type::TEXT_ARRAY)],
            [(&ranges, Type::TEXT_ARRAY), (&nexts, Type::INT8_ARRAY)],
            [(&pin_domains, Type::INT4_ARRAY), (&pin_codes, Type::TEXT_ARRAY)],
        );
        let keys: [Param<'_>; 9] = [
            (&key_ids, Type::TEXT_ARRAY),
            (&key_names, Type::TEXT_ARRAY),
            (&digests, Type::BYTEA_ARRAY),
            (&scopes, Type::TEXT_ARRAY),
            (&limits, Type::INT8_ARRAY),
            (&created, Type::INT8_ARRAY),
            (&ends, Type::INT8_ARRAY),
            (&revoked, Type::INT8_ARRAY),
            (&used, Type::INT8_ARRAY),
        ];
        let position: [Param<'_>; 2] = [(&bigint(rest.version), Type::INT8), (&bigint(rest.generation), Type::INT8)];
        let mut queries: Vec<Query<'_>> = vec![(LOCK, &[])];
        if is_new {
            // No link has any of them.
            queries.push(("DELETE FROM domains WHERE id <> 0", &[]));
        }
        queries.extend([
            (if is_new { SETTINGS_OF_NEW } else { SETTINGS }, settings.as_slice()),
            (DOMAINS, &domains),
            (RANGES, &ranges),
            (KEYS, &keys),
            (PINS, &pins),
        ]);
        if done {
            queries.push((FINISH, &position));
        }
        self.inner.again(&queries).await?;
        let known = self.domains().await?;
        if let Some((_, host)) = rest.domains.iter().find(|domain| !known.contains(domain)) {
            return Err(Error::Schema(format!(
                "the domain {host:?} has another number here: move into an empty database"
            )));
        }
        Ok((LinkId(self.moved().await?.to), state.is_done))
    }

    async fn moved(&self) -> Result<State> {
        let rows = self.inner.one(STATE, &[]).await?;
        let row = only(&rows)?;
        let text = |column: usize| {
            let value: Option<Vec<u8>> = get(row, column)?;
            value
                .map(String::from_utf8)
                .transpose()
                .map_err(|error| Error::Broken(format!("the mark of a move: {error}")))
        };
        let to = text(1)?.unwrap_or_default();
        Ok(State { from: text(0)?, to: to.parse().unwrap_or(0), has_links: get(row, 2)?, is_done: get(row, 3)? })
    }
}

/// A column.
pub(super) fn all<'a, T, V>(rows: &'a [T], value: impl Fn(&'a T) -> V) -> Vec<V> {
    rows.iter().map(value).collect()
}

pub(super) fn millis(at: Option<UnixMillis>) -> Option<i64> {
    at.map(|at| at.0)
}
