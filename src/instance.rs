//! The instance: a running server as its own API sees it.
//!
//! In: what the stations count. Out: whether it is ready, what is degraded since when and why, its status.
//! Never: decides anything.

use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use serde_json::{Value, json};

use crate::breaker::{Breaker, State};
use crate::domain::time::{self, UnixMillis};
use crate::links::{Links, rfc3339};
use crate::redis::Redis;
use crate::resolve::follow::Follower;
use crate::resolve::{Memory, Tier};
use crate::store::Store;
use crate::{accept, http};

/// Why the server is degraded, as `/readyz`, `/metrics` and `waypost status` name it.
pub const REASONS: [&str; 4] = ["store", "stale", "redis", "worker_lease"];
/// The rate is of at least this time.
const RATE_MS: i64 = 5_000;

/// What the process is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Starting = 0,
    Serving = 1,
    Draining = 2,
}

/// What one core counts.
#[derive(Clone, Debug, Default)]
pub struct Core {
    pub http: Arc<http::Counts>,
    pub accept: Arc<accept::Counts>,
}

/// What an instance is made of.
pub struct Parts {
    pub name: String,
    pub store: Store,
    pub memory: Arc<Memory>,
    pub follower: Arc<Follower>,
    /// Of the store.
    pub breaker: Arc<Breaker>,
    pub redis: Option<Redis>,
    /// Empty until the store was there once.
    pub links: Arc<OnceLock<Arc<Links>>>,
    pub cores: Vec<Core>,
}

/// A running server, as its own API sees it.
pub struct Instance {
    parts: Parts,
    phase: AtomicU8,
    started: Instant,
    started_at: UnixMillis,
    limited: AtomicU64,
    noted: Mutex<Noted>,
}

/// What the ticks have seen.
#[derive(Debug)]
struct Noted {
    /// Since when each of [`REASONS`] holds.
    since: [Option<UnixMillis>; REASONS.len()],
    /// Answers by a moment, and by an earlier one.
    answers: [(UnixMillis, u64); 2],
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Instance")
    }
}

impl Instance {
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        let now = time::now();
        Self {
            parts,
            phase: AtomicU8::new(Phase::Starting as u8),
            started: time::monotonic(),
            started_at: now,
            limited: AtomicU64::new(0),
            noted: Mutex::new(Noted { since: Default::default(), answers: [(now, 0); 2] }),
        }
    }

    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Starting,
            1 => Phase::Serving,
            _ => Phase::Draining,
        }
    }

    pub fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    pub fn cores(&self) -> impl Iterator<Item = &Core> {
        self.parts.cores.iter()
    }

    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.parts.memory
    }

    #[must_use]
    pub fn redis(&self) -> Option<&Redis> {
        self.parts.redis.as_ref()
    }

    #[must_use]
    pub fn store(&self) -> &Store {
        &self.parts.store
    }

    /// The state of each dependency's breaker.
    pub fn breakers(&self) -> impl Iterator<Item = (&'static str, State)> {
        let redis = self.parts.redis.as_ref().map(|redis| ("redis", redis.figures().state));
        std::iter::once(("store", self.parts.breaker.state())).chain(redis)
    }

    /// How often each dependency's breaker opened.
    pub fn opened(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let redis = self.parts.redis.as_ref().map(|redis| ("redis", redis.figures().opened));
        std::iter::once(("store", self.parts.breaker.opened())).chain(redis)
    }

    /// Whether asking the store is of no use now: it is left alone, or did not answer a moment ago.
    #[must_use]
    pub fn store_is_away(&self) -> bool {
        self.parts.breaker.state() != State::Closed || self.parts.follower.is_failing()
    }

    /// What is away that redirects can do without, of [`REASONS`].
    #[must_use]
    pub fn degraded(&self) -> Vec<&'static str> {
        REASONS.into_iter().zip(self.flags()).filter_map(|(reason, is)| is.then_some(reason)).collect()
    }

    fn flags(&self) -> [bool; REASONS.len()] {
        let Parts { follower, redis, links, .. } = &self.parts;
        [
            follower.is_failing(),
            follower.stale_since().is_some(),
            redis.as_ref().is_some_and(|redis| redis.figures().state != State::Closed),
            links.get().is_some_and(|links| links.worker_id_is_lost()),
        ]
    }

    /// Time has passed: remembers since when what is degraded, and how many answers there were.
    pub fn note(&self, now: UnixMillis) {
        let flags = self.flags();
        let mut noted = self.noted.lock().expect("nobody panics with it");
        for (since, is) in noted.since.iter_mut().zip(flags) {
            *since = if is { since.or(Some(now)) } else { None };
        }
        if now.0 - noted.answers[0].0.0 >= RATE_MS {
            noted.answers = [(now, self.answers()), noted.answers[0]];
        }
    }

    fn answers(&self) -> u64 {
        Tier::ALL.into_iter().map(|tier| self.answers_of(tier)).sum()
    }

    fn answers_of(&self, tier: Tier) -> u64 {
        self.cores().map(|core| core.http.answers(tier)).sum()
    }

    pub fn count_limited(&self) {
        self.limited.fetch_add(1, Ordering::Relaxed);
    }

    #[must_use]
    pub fn limited(&self) -> u64 {
        self.limited.load(Ordering::Relaxed)
    }

    /// Tells the store that this instance ends, and gives back what it leased.
    pub async fn leave(&self) {
        if let Some(links) = self.parts.links.get() {
            links.close().await;
        }
        // It is only missed for a while if that fails.
        let _ = self.parts.store.present(self.parts.name.clone(), false, time::now()).await;
    }

    /// What `waypost status` shows.
    #[must_use]
    pub fn status(&self) -> Value {
        let now = time::now();
        self.note(now);
        let tiers: serde_json::Map<_, _> =
            Tier::ALL.into_iter().map(|tier| (tier.name().to_owned(), self.answers_of(tier).into())).collect();
        let breakers: serde_json::Map<_, _> =
            self.breakers().map(|(dependency, state)| (dependency.to_owned(), state.name().into())).collect();
        let (degraded, rate) = {
            let noted = self.noted.lock().expect("nobody panics with it");
            let since = REASONS.into_iter().zip(noted.since);
            let degraded: Vec<Value> =
                since.filter_map(|(reason, since)| Some(json!({"reason": reason, "since": rfc3339(since?)}))).collect();
            let (then, before) = noted.answers[1];
            let seconds = (now.0 - then.0) as f64 / 1e3;
            (degraded, if seconds > 0.0 { (self.answers() - before) as f64 / seconds } else { 0.0 })
        };
        let figures = self.parts.memory.shards.figures();
        let up = time::monotonic().saturating_duration_since(self.started).as_secs();
        let mut status = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "instance": self.parts.name,
            "phase": match self.phase() { Phase::Starting => "starting", Phase::Serving => "serving", Phase::Draining => "draining" },
            "started_at": rfc3339(self.started_at),
            "uptime_seconds": up,
            "store": self.parts.store.describe(),
            "workers": self.parts.cores.len(),
            "connections": self.cores().map(|core| core.accept.open.get()).sum::<u64>(),
            "degraded": degraded,
            "breakers": breakers,
            "visits_answered": self.cores().map(|core| core.http.visits.answered()).sum::<u64>(),
            "answers_per_second": (rate * 10.0).round() / 10.0,
            "answers_by_tier": tiers,
            "cache": {"links": figures.entries, "bytes": figures.bytes, "evictions": figures.evictions},
        });
        if let Store::Postgres(postgres) = &self.parts.store {
            let figures = postgres.figures();
            status["postgres"] = json!({
                "open": figures.open, "idle": figures.idle, "waiting": figures.waiting, "max": figures.pool_max,
            });
        }
        if let Some(redis) = &self.parts.redis {
            let figures = redis.figures();
            status["redis"] = json!({
                "hits": figures.hits, "misses": figures.misses, "garbage": figures.garbage,
                "timeouts": figures.timeouts, "errors": figures.errors, "dropped": figures.dropped,
            });
        }
        status
    }
}
