//! Settings, domains, leased ranges and API keys in Postgres.

use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::{Param, Postgres, bigint, get, number, only};
use crate::domain::key::DomainId;
use crate::domain::time::UnixMillis;
use crate::guard::keys::{KeyRecord, Scopes};
use crate::store::{Error, Result};

const GET: &str = "SELECT value FROM settings WHERE name = $1";
const SETTLE: &str = "INSERT INTO settings (name, value) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING";
/// By bytes, as SQLite compares: the order of the database may be that of a language.
const FORGET: &str = "DELETE FROM settings WHERE name COLLATE \"C\" >= $1 AND name COLLATE \"C\" < $2";
const LEASE: &str = "INSERT INTO ranges (name, next) VALUES ($1, $2::int8 + $3::int8)
  ON CONFLICT (name) DO UPDATE SET next = greatest(ranges.next, $2::int8) + $3::int8 RETURNING next";
/// Numbers are given in turn: another process waits at the default domain's row.
const LOCK_DOMAINS: &str = "SELECT id FROM domains WHERE id = 0 FOR UPDATE";
const NUMBER_DOMAIN: &str = "INSERT INTO domains (id, host) SELECT max(id) + 1, $1 FROM domains
  HAVING NOT EXISTS (SELECT 1 FROM domains WHERE host = $1)";
const ADD_KEY: &str = "INSERT INTO api_keys (id, name, digest, scopes, per_minute, created_at, expires_at)
  VALUES ($1, $2, $3, $4, $5, $6, $7)";
const KEYS: &str = "SELECT id, name, digest, scopes, per_minute, created_at, expires_at, revoked_at, last_used_at
  FROM api_keys WHERE $1::text IS NULL OR id = $1 ORDER BY created_at, id";

impl Postgres {
    pub async fn lease(&self, range: &'static str, known: u64, count: u64) -> Result<u64> {
        // As with worker ids: a timeline that nobody has polled yet begins a generation here, which moves the range past
        // what was leased last of the server that is gone. What was leased across that may be of before it.
        let mut generation = self.position().await?.generation;
        let params: [Param<'_>; 3] = [(&range, Type::TEXT), (&bigint(known), Type::INT8), (&bigint(count), Type::INT8)];
        loop {
            let next: u64 = number(only(&self.inner.one(LEASE, &params).await?)?, 0)?;
            let present = self.position().await?.generation;
            if present == generation {
                return Ok(next - count);
            }
            generation = present;
        }
    }

    pub async fn settle(&self, name: &str, value: &[u8]) -> Result<Vec<u8>> {
        let named: [Param<'_>; 1] = [(&name, Type::TEXT)];
        if let [row, ..] = self.inner.one(GET, &named).await?.as_slice() {
            return get(row, 0);
        }
        let settled: [Param<'_>; 2] = [(&name, Type::TEXT), (&value, Type::BYTEA)];
        let answers = self.inner.again(&[(SETTLE, &settled), (GET, &named)]).await?;
        get(only(&answers[1])?, 0)
    }

    pub async fn forget(&self, from: &str, before: &str) -> Result<()> {
        let params: [Param<'_>; 2] = [(&from, Type::TEXT), (&before, Type::TEXT)];
        self.inner.one(FORGET, &params).await.map(drop)
    }

    pub async fn number_domains(&self, hosts: &[String]) -> Result<Vec<DomainId>> {
        let mut numbers = Vec::with_capacity(hosts.len());
        let mut known = self.domains().await?;
        for host in hosts {
            if !known.iter().any(|(_, name)| name == host) {
                self.inner.again(&[(LOCK_DOMAINS, &[]), (NUMBER_DOMAIN, &[(host, Type::TEXT)])]).await?;
                known = self.domains().await?;
            }
            let found = known.iter().find(|(_, name)| name == host);
            numbers.push(found.ok_or_else(|| Error::Broken(format!("the domain {host} got no number")))?.0);
        }
        Ok(numbers)
    }

    pub async fn domains(&self) -> Result<Vec<(DomainId, String)>> {
        let rows = self.inner.one("SELECT id::int8, host FROM domains ORDER BY id", &[]).await?;
        rows.iter().map(|row| Ok((DomainId(number(row, 0)?), get(row, 1)?))).collect()
    }

    pub async fn add_key(&self, key: &KeyRecord) -> Result<()> {
        let params: [Param<'_>; 7] = [
            (&key.id, Type::TEXT),
            (&key.name, Type::TEXT),
            (&key.digest.as_slice(), Type::BYTEA),
            (&key.scopes.to_string(), Type::TEXT),
            (&key.per_minute.map(i64::from), Type::INT8),
            (&key.created_at.0, Type::INT8),
            (&key.expires_at.map(|at| at.0), Type::INT8),
        ];
        self.inner.one(ADD_KEY, &params).await.map(drop)
    }

    /// All keys, or the one with this id.
    pub async fn keys(&self, id: Option<&str>) -> Result<Vec<KeyRecord>> {
        self.inner.one(KEYS, &[(&id, Type::TEXT)]).await?.iter().map(record).collect()
    }

    pub async fn revoke_key(&self, id: &str, now: UnixMillis) -> Result<bool> {
        let sql = "UPDATE api_keys SET revoked_at = $2 WHERE id = $1 AND revoked_at IS NULL RETURNING id";
        Ok(!self.inner.one(sql, &[(&id, Type::TEXT), (&now.0, Type::INT8)]).await?.is_empty())
    }

    pub async fn touch_key(&self, id: &str, now: UnixMillis) -> Result<()> {
        let sql = "UPDATE api_keys SET last_used_at = $2 WHERE id = $1";
        self.inner.one(sql, &[(&id, Type::TEXT), (&now.0, Type::INT8)]).await.map(drop)
    }
}

fn record(row: &Row) -> Result<KeyRecord> {
    let millis = |column: usize| Ok::<_, Error>(get::<Option<i64>>(row, column)?.map(UnixMillis));
    let id: String = get(row, 0)?;
    let wrong = |what: &str| Error::Broken(format!("the key {id} in the store has a wrong {what}"));
    Ok(KeyRecord {
        name: get(row, 1)?,
        digest: get::<&[u8]>(row, 2)?.try_into().map_err(|_| wrong("digest"))?,
        scopes: Scopes::parse(get(row, 3)?).map_err(|_| wrong("set of scopes"))?,
        per_minute: get::<Option<i64>>(row, 4)?.map(u32::try_from).transpose().map_err(|_| wrong("limit"))?,
        created_at: UnixMillis(get(row, 5)?),
        expires_at: millis(6)?,
        revoked_at: millis(7)?,
        last_used_at: millis(8)?,
        id,
    })
}
