//! From a key to what is to be answered, tier by tier.
//!
//! In: a key and now. Out: a [`Resolution`], at once from `hot` or `shards`, or by way of the `lookup` crossing.
//! Never: says that a link is missing when that could not be found out; waits in front for anything but a look-up
//! that no memory can answer; believes a value that is older than a change of its key.
//! At its limit: [`ask::ASKED_MAX`] look-ups of a core may be open; one more is `Unavailable`.
//!
//! ```text
//!   front:  hot ▸ shards ▸ negative ▸ ask ─ lookup crossing ─▶ back:  flight ▸ (quota) ▸ tier (Redis) ▸ store
//!                    ▲         ▲                follow ◀─ poll, hints ─ store, Redis
//!                    └─────────┴── note, remove, advance ─┘
//! ```

pub mod ask;
pub mod flight;
pub mod follow;
pub mod hot;
pub mod invalidate;
#[cfg(test)]
mod model;
pub mod negative;
pub mod preload;
pub mod quota;
pub mod shards;
pub mod through;
pub mod tier;
pub mod value;
pub mod warm;

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, StatusCode};
use tokio::sync::{Semaphore, SemaphorePermit, oneshot};

use crate::domain::key::Key;
use crate::domain::link::{Entry, Validity};
use crate::domain::target::Target;
use crate::domain::time::UnixMillis;
use crate::metrics::Counter;
use ask::{Ask, Looked};
use hot::{Hot, Ready};
use invalidate::{AsOf, Feed, Read, Trust};
use negative::Negative;
use shards::{Hit, Shards};
use value::StoredAsOf;

/// What a key leads to, now.
#[derive(Clone, Debug)]
pub enum Resolution {
    Found(Ready),
    /// Expired, disabled, deleted or used up; an expired link may lead on.
    Gone(Option<Target>),
    /// Unknown, or not begun.
    Missing,
    /// It cannot be known.
    Unavailable,
}

/// Where an answer came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    Hot,
    Shards,
    Redis,
    Store,
    /// Nothing was looked up: a page, or a request that is none.
    None,
}

impl Tier {
    pub const ALL: [Self; 5] = [Self::Hot, Self::Shards, Self::Redis, Self::Store, Self::None];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hot => "hot",
            Self::Shards => "shards",
            Self::Redis => "redis",
            Self::Store => "store",
            Self::None => "none",
        }
    }
}

/// The first step of resolving a key: done, or asked.
#[derive(Debug)]
pub enum Step {
    Done(Resolution, Tier),
    Asked(oneshot::Receiver<Looked>),
}

/// How links are answered that do not say it themselves.
#[derive(Clone, Debug)]
pub struct Defaults {
    pub status: StatusCode,
    /// Of 302, 303 and 307.
    pub cache_control: HeaderValue,
    /// Of 301 and 308.
    pub permanent_cache_control: HeaderValue,
    pub forward_query: bool,
}

/// What the whole process remembers.
#[derive(Debug)]
pub struct Memory {
    hasher: ahash::RandomState,
    pub shards: Shards,
    pub negative: Negative,
    pub feed: Feed,
    pub negative_ttl: Duration,
    /// Visits of limited links that cannot be given back, and nobody came for. The thread that looks up counts them.
    pub unclaimed: Counter,
}

impl Memory {
    /// `at`: where the feed of the store stands.
    #[must_use]
    pub fn new(cache_bytes: u64, workers: usize, negative_ttl: Duration, at: StoredAsOf) -> Self {
        Self {
            hasher: ahash::RandomState::new(),
            shards: Shards::new(cache_bytes, workers),
            negative: Negative::default(),
            feed: Feed::new(at),
            negative_ttl,
            unclaimed: Counter::default(),
        }
    }

    /// The one hash of a key; keyed, since visitors choose the codes that are asked for.
    #[must_use]
    pub fn hash(&self, key: &Key) -> u64 {
        self.hasher.hash_one(key)
    }

    /// Keeps an entry that was read at `as_of`; false if it is not believed.
    #[must_use]
    pub fn keep(&self, hash: u64, key: &Key, entry: &Entry, as_of: AsOf) -> bool {
        self.shards.insert(hash, key, entry, |key| self.hash(key), || self.feed.believes(hash, as_of, Read::Link))
    }

    /// A link was created here, with a code that no link ever had.
    pub fn created(&self, key: &Key) {
        let hash = self.hash(key);
        self.feed.expect(hash);
        self.negative.remove(hash, key);
    }

    /// Keeps that there was no link at `as_of`; false if that is not believed.
    #[must_use]
    pub fn keep_missing(&self, hash: u64, key: &Key, as_of: AsOf, now: UnixMillis) -> bool {
        let believed = || self.feed.believes(hash, as_of, Read::Absence);
        self.negative.insert(hash, key, now.after(self.negative_ttl), believed)
    }
}

/// What others than visitors may look up at once: a quarter of all, so that visitors come first.
#[derive(Clone, Debug)]
pub struct Share {
    lookups: Arc<Semaphore>,
    /// Keys of one read. On the embedded store, 64 of them keep its thread for less than a millisecond.
    pub keys_max: usize,
}

impl Share {
    /// `lookups` is what visitors' look-ups take from, `lookups_max` its size.
    #[must_use]
    pub fn new(lookups: Arc<Semaphore>, lookups_max: usize) -> Self {
        Self { lookups, keys_max: (lookups_max / 4).clamp(1, 64) }
    }

    /// Waits until `keys` more may be looked up; they are under way as long as the permit lives. None would be a
    /// semaphore that is closed, which nobody does.
    pub async fn take(&self, keys: usize) -> Option<SemaphorePermit<'_>> {
        self.lookups.acquire_many(u32::try_from(keys).unwrap_or(u32::MAX)).await.ok()
    }
}

/// A core's way to resolve.
#[derive(Debug)]
pub struct Resolver {
    memory: Arc<Memory>,
    hot: RefCell<Hot>,
    ask: Ask,
    defaults: Defaults,
}

impl Resolver {
    #[must_use]
    pub fn new(memory: Arc<Memory>, ask: Ask, defaults: Defaults) -> Self {
        Self { memory, hot: RefCell::default(), ask, defaults }
    }

    /// Sends this core's questions across and hands out the answers, until back has gone.
    pub async fn run(&self) {
        self.ask.run().await;
    }

    /// Time has passed.
    pub fn tick(&self, now_ms: u64) {
        self.ask.tick(now_ms);
    }

    /// Resolves from memory, or asks. `visit`: whether a limited link is used by it.
    pub fn resolve(&self, key: &Key, visit: bool, now: UnixMillis) -> Step {
        let memory = &*self.memory;
        let hash = memory.hash(key);
        if memory.feed.trust() != Trust::Expired {
            let epoch = memory.shards.epoch(hash);
            if let Some(ready) = self.hot.borrow_mut().get(hash, key, epoch, now) {
                return Step::Done(Resolution::Found(ready.clone()), Tier::Hot);
            }
            match memory.shards.get(hash, key) {
                // Its visits are counted behind the crossing.
                Some(hit) if hit.entry.is_counted(now) => {}
                Some(hit) => return Step::Done(self.remembered(hash, key, hit, now), Tier::Shards),
                None if memory.negative.has(hash, key, now) => return Step::Done(Resolution::Missing, Tier::Shards),
                None => {}
            }
        }
        match self.ask.ask(*key, hash, visit) {
            Some(looked) => Step::Asked(looked),
            None => Step::Done(Resolution::Unavailable, Tier::Store),
        }
    }

    /// What a look-up found, and where.
    #[must_use]
    pub fn judge(&self, looked: Looked, now: UnixMillis) -> (Resolution, Tier) {
        match looked {
            Looked::Found(entry, tier) => (self.answer(*entry, now), tier),
            Looked::UsedUp => (Resolution::Gone(None), Tier::Store),
            Looked::Missing => (Resolution::Missing, Tier::Store),
            Looked::Unavailable => (Resolution::Unavailable, Tier::Store),
        }
    }

    fn remembered(&self, hash: u64, key: &Key, hit: Hit, now: UnixMillis) -> Resolution {
        let resolution = self.answer(hit.entry, now);
        // Not at the first hit: codes that are asked for once would push out those that are asked for all day.
        if hit.marked
            && let Resolution::Found(ready) = &resolution
        {
            self.hot.borrow_mut().insert(hash, key, hit.epoch, ready.clone());
        }
        resolution
    }

    fn answer(&self, entry: Entry, now: UnixMillis) -> Resolution {
        let rules = entry.rules;
        match rules.validity(now) {
            Validity::Gone => return Resolution::Gone(None),
            Validity::Expired => return Resolution::Gone(rules.expired_url),
            Validity::NotYet => return Resolution::Missing,
            Validity::Valid => {}
        }
        let defaults = &self.defaults;
        let status = rules.status.and_then(|status| StatusCode::from_u16(status).ok()).unwrap_or(defaults.status);
        let cache_control = rules.cache_control.and_then(|value| HeaderValue::from_str(&value).ok());
        Resolution::Found(Ready {
            link: entry.id,
            status,
            location: header_value(entry.target),
            cache_control: cache_control.unwrap_or_else(|| match status.as_u16() {
                301 | 308 => defaults.permanent_cache_control.clone(),
                _ => defaults.cache_control.clone(),
            }),
            forward_query: rules.forward_query.unwrap_or(defaults.forward_query),
            starts_at: rules.starts_at.unwrap_or(UnixMillis(i64::MIN)),
            ends_at: rules.expires_at.unwrap_or(UnixMillis::NEVER),
        })
    }
}

/// A target is made of bytes that a header may have, so this cannot fail; its bytes are not copied.
#[must_use]
pub fn header_value(target: Target) -> HeaderValue {
    HeaderValue::from_maybe_shared(Bytes::from(target.into_string())).expect("a target is graphic ASCII")
}
