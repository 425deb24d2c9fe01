//! Who sends a request, and how often they may.
//!
//! In: a request's head, its address. Out: an identity, or a problem that says what is missing.
//! Never: tells by its time which keys there are; asks the store for the same key twice a second.
//! At its limit: [`KNOWN_MAX`] keys are remembered, then they are all forgotten at once.

use std::time::{Duration, Instant};

use dashmap::DashMap;
use http::HeaderMap;

use super::problem::Problem;
use super::{Api, From, away, limit_headers};
use crate::domain::time::{self, UnixMillis};
use crate::guard::keys::{self, ApiKey, KeyRecord, Presented, Scope, Scopes};
use crate::guard::limits::{Caller, Limiter, Verdict};
use crate::redis;

/// A key's last use is noted when the last note is older than this.
const TOUCH_EVERY: Duration = Duration::from_secs(60);
/// How long a revoked key may go on.
const KNOWN_FOR: Duration = Duration::from_secs(1);
const KNOWN_MAX: usize = 10_000;

/// Keys that the store had when it was last asked.
#[derive(Debug, Default)]
pub struct Known(DashMap<String, (KeyRecord, Instant), ahash::RandomState>);

impl Known {
    fn get(&self, id: &str, now: Instant) -> Option<KeyRecord> {
        let known = self.0.get(id)?;
        (now.saturating_duration_since(known.1) < KNOWN_FOR).then(|| known.0.clone())
    }

    fn last(&self, id: &str) -> Option<KeyRecord> {
        self.0.get(id).map(|known| known.0.clone())
    }

    fn note(&self, id: &str, record: Option<KeyRecord>, now: Instant) {
        if self.0.len() >= KNOWN_MAX {
            self.0.clear();
        }
        match record {
            Some(record) => drop(self.0.insert(id.to_owned(), (record, now))),
            None => drop(self.0.remove(id)),
        }
    }
}

/// Who a request is by its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// None: a configured admin key.
    pub key: Option<String>,
    pub scopes: Scopes,
    per_minute: Option<u32>,
}

impl Api {
    /// Who sent a request; none without a key. A wrong key counts against its address.
    pub async fn identify(
        &self,
        headers: &HeaderMap,
        from: From,
        now: UnixMillis,
    ) -> Result<Option<Identity>, Problem> {
        let presented = match keys::presented(headers) {
            Presented::None => return Ok(None),
            Presented::Malformed => return Err(self.unknown_key(from, now).await),
            Presented::Key(key) => key,
        };
        if self.admin_key.as_ref().is_some_and(|admin| admin.matches(presented)) {
            return Ok(Some(Identity { key: None, scopes: Scopes::of(&[Scope::Admin]), per_minute: None }));
        }
        let Some(key) = ApiKey::parse(presented) else { return Err(self.unknown_key(from, now).await) };
        let record = self.record(&key.id).await?;
        // Compared also where there is no such id, so that the time does not tell which ids there are.
        let digest = record.as_ref().map_or([0; 32], |record| record.digest);
        let right = keys::verify(&digest, &key.secret);
        let record = record.filter(|record| right && record.valid(now));
        let Some(record) = record else { return Err(self.unknown_key(from, now).await) };
        if record.last_used_at.is_none_or(|last| last.after(TOUCH_EVERY) < now) {
            let (store, id) = (self.store.clone(), key.id.clone());
            // Nothing depends on it: a failure shows with the next write that matters.
            tokio::spawn(async move { store.touch_key(id, now).await });
        }
        Ok(Some(Identity { key: Some(key.id), scopes: record.scopes, per_minute: record.per_minute }))
    }

    /// What the store has of a key: now, a moment ago, or, while it is away, when it was last asked. A revoked key is
    /// thus refused within a second of its revocation, or of the store's return.
    async fn record(&self, id: &str) -> Result<Option<KeyRecord>, Problem> {
        let now = time::monotonic();
        if let Some(record) = self.known.get(id, now) {
            return Ok(Some(record));
        }
        // Nobody waits for a time-out to be told what is known already.
        if self.instance.store_is_away() {
            return self.known.last(id).map(Some).ok_or_else(away);
        }
        let record = self.store.key(id.to_owned()).await.map_err(|error| Problem::of_store(&error))?;
        self.known.note(id, record.clone(), now);
        Ok(record)
    }

    async fn unknown_key(&self, from: From, now: UnixMillis) -> Problem {
        match self.count(&self.by_address, Caller::of_address(from.client), None, now).await {
            refused @ Verdict::Refused { .. } => self.too_many(&refused),
            _ => Problem::new(401, "this key is unknown, revoked or expired"),
        }
    }

    /// The identity that a request needs to have.
    pub async fn require(&self, headers: &HeaderMap, from: From, scope: Scope) -> Result<Identity, Problem> {
        let identity = self.identify(headers, from, time::now()).await?;
        let identity = identity
            .ok_or_else(|| Problem::new(401, "this needs a key: send Authorization: Bearer KEY or X-Api-Key: KEY"))?;
        if identity.scopes.allows(scope) {
            Ok(identity)
        } else {
            Err(Problem::new(403, format!("this needs a key with the scope {}", scope.name())))
        }
    }

    /// Counts a request against the limit of its key, or of its address if it has none.
    pub async fn limit(&self, identity: Option<&Identity>, from: From, now: UnixMillis) -> Result<Verdict, Problem> {
        let verdict = match identity {
            None => self.count(&self.by_address, Caller::of_address(from.client), None, now).await,
            Some(Identity { key: Some(id), scopes, per_minute })
                if per_minute.is_some() || !scopes.allows(Scope::Admin) =>
            {
                self.count(&self.by_key, Caller::of_key(id), *per_minute, now).await
            }
            Some(_) => Verdict::Unlimited,
        };
        if verdict.is_allowed() { Ok(verdict) } else { Err(self.too_many(&verdict)) }
    }

    /// Of all instances together while Redis answers.
    async fn count(&self, limiter: &Limiter, caller: Caller, per_minute: Option<u32>, now: UnixMillis) -> Verdict {
        redis::limits::check(self.redis.as_ref(), limiter, caller, per_minute, now).await
    }

    pub(super) fn too_many(&self, verdict: &Verdict) -> Problem {
        self.instance.count_limited();
        let mut problem = Problem::new(429, "too many requests: wait for the seconds in Retry-After");
        problem.headers = limit_headers(verdict);
        problem
    }
}
