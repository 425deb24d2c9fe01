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
use crate::visits::batch::Fates;
use crate::visits::{Dropped, Drops};
use crate::{accept, http};

/// Why the server is degraded, as `/readyz`, `/metrics` and `waypost status` name it.
pub const REASONS: [&str; 6] = ["store", "stale", "redis", "worker_lease", "visits_sink", "spool"];
/// Rates are of at least this time.
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

/// What became of the visits of this process: `answered = stored + pending + drops`; and of those that it found in its
/// spool. All zeros without recording, but for what was answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VisitFigures {
    /// Redirects to a target that left.
    pub answered: u64,
    /// Those that are in the log.
    pub spooled: u64,
    pub stored: u64,
    /// Neither stored nor given up.
    pub pending: u64,
    pub drops: Drops,
    pub earlier: EarlierVisits,
    /// What was stored and dropped since the process began, of every start; never goes back.
    pub ever: Fates,
    /// Since the oldest that is pending, of whichever start, was answered.
    pub oldest_pending_seconds: u64,
    /// Bytes of the log, and how many it may have.
    pub spool_bytes: u64,
    pub spool_max_bytes: u64,
    /// Of the log, what is not stored.
    pub spool_waiting_bytes: u64,
    /// Since when the store takes no visits.
    pub sink_away_since: Option<UnixMillis>,
    /// Since when the log cannot be written.
    pub spool_failing_since: Option<UnixMillis>,
}

/// Visits that earlier starts have left in the spool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EarlierVisits {
    /// What became of them since this process began.
    pub fates: Fates,
    pub pending: u64,
}

impl EarlierVisits {
    /// `{"stored", "pending", "dropped": {reason: n}}`.
    #[must_use]
    pub fn show(&self) -> Value {
        json!({"stored": self.fates.stored, "pending": self.pending, "dropped": dropped(&self.fates.drops)})
    }
}

/// Drops by reason, all of them.
#[must_use]
pub fn dropped(drops: &Drops) -> Value {
    Dropped::ALL.iter().zip(drops).map(|(dropped, visits)| (dropped.name().to_owned(), Value::from(*visits))).collect()
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
    /// Asked for each scrape, and for each tick.
    pub visits: Box<dyn Fn() -> VisitFigures + Send + Sync>,
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
    /// The last sample, and an earlier one.
    samples: [Sample; 2],
}

/// What rates are made of.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    at: UnixMillis,
    answers: u64,
    spool_waiting_bytes: u64,
}

/// A store that takes visits has the oldest of them sooner.
const LATE_SECONDS: u64 = 10;

/// Minutes until a spool of `figures` is full of what is not stored (what is goes first), if it goes on as since `then`; none
/// while that does not grow, or is no more than what is on its way at any time.
fn minutes_until_full(figures: &VisitFigures, now: UnixMillis, then: Sample) -> Option<u64> {
    if figures.sink_away_since.is_none() && figures.oldest_pending_seconds < LATE_SECONDS {
        return None;
    }
    let span_ms = u64::try_from(now.0 - then.at.0).ok()?;
    let grown = figures.spool_waiting_bytes.checked_sub(then.spool_waiting_bytes).filter(|grown| *grown > 0)?;
    let left = figures.spool_max_bytes.saturating_sub(figures.spool_waiting_bytes);
    u64::try_from(u128::from(left) * u128::from(span_ms) / u128::from(grown) / 60_000).ok()
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
            noted: Mutex::new(Noted {
                since: Default::default(),
                samples: [Sample { at: now, ..Sample::default() }; 2],
            }),
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
    pub fn name(&self) -> &str {
        &self.parts.name
    }

    #[must_use]
    pub fn visits(&self) -> VisitFigures {
        (self.parts.visits)()
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

    /// How often each breaker has opened.
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
        REASONS.into_iter().zip(self.flags(&self.visits())).filter_map(|(reason, is)| is.then_some(reason)).collect()
    }

    fn flags(&self, visits: &VisitFigures) -> [bool; REASONS.len()] {
        let Parts { follower, redis, links, .. } = &self.parts;
        [
            follower.is_failing(),
            follower.stale_since().is_some(),
            redis.as_ref().is_some_and(|redis| redis.figures().state != State::Closed),
            links.get().is_some_and(|links| links.worker_id_is_lost()),
            visits.sink_away_since.is_some(),
            visits.spool_failing_since.is_some(),
        ]
    }

    /// Time has passed: remembers since when what is degraded, and how many answers there were.
    pub fn note(&self, now: UnixMillis) {
        let visits = self.visits();
        let flags = self.flags(&visits);
        let mut noted = self.noted.lock().expect("nobody panics with it");
        for (since, is) in noted.since.iter_mut().zip(flags) {
            *since = if is { since.or(Some(now)) } else { None };
        }
        if now.0 - noted.samples[0].at.0 >= RATE_MS {
            let sample = Sample { at: now, answers: self.answers(), spool_waiting_bytes: visits.spool_waiting_bytes };
            noted.samples = [sample, noted.samples[0]];
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
        let visits = self.visits();
        let (degraded, rate, minutes) = {
            let noted = self.noted.lock().expect("nobody panics with it");
            let since = REASONS.into_iter().zip(noted.since);
            let degraded: Vec<Value> =
                since.filter_map(|(reason, since)| Some(json!({"reason": reason, "since": rfc3339(since?)}))).collect();
            let then = noted.samples[1];
            let seconds = (now.0 - then.at.0) as f64 / 1e3;
            let rate = if seconds > 0.0 { (self.answers() - then.answers) as f64 / seconds } else { 0.0 };
            (degraded, rate, minutes_until_full(&visits, now, then))
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
            "visits": {
                "answered": visits.answered,
                "spooled": visits.spooled,
                "stored": visits.stored,
                "pending": visits.pending,
                "oldest_pending_seconds": visits.oldest_pending_seconds,
                "dropped": dropped(&visits.drops),
                "earlier": visits.earlier.show(),
                "sink_away_since": visits.sink_away_since.map(rfc3339),
                "spool_failing_since": visits.spool_failing_since.map(rfc3339),
                "spool_bytes": visits.spool_bytes,
                "spool_max_bytes": visits.spool_max_bytes,
                "minutes_until_full": minutes,
            },
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_the_spool_is_full() {
        let check_late = |away: bool, late: u64, before: u64, bytes: u64, max: u64, span_ms: i64, want: Option<u64>| {
            let figures = VisitFigures {
                // With what is stored and kept.
                spool_bytes: max,
                spool_waiting_bytes: bytes,
                spool_max_bytes: max,
                sink_away_since: away.then_some(UnixMillis(1)),
                oldest_pending_seconds: late,
                ..Default::default()
            };
            let then = Sample { at: UnixMillis(1_000), answers: 0, spool_waiting_bytes: before };
            let got = minutes_until_full(&figures, UnixMillis(1_000 + span_ms), then);
            assert_eq!(got, want, "{away} {late} {before} {bytes} {max} {span_ms}");
        };
        let check = |away, before, bytes, max, span_ms, want| check_late(away, 2, before, bytes, max, span_ms, want);
        check(true, 0, 1_000, 61_000, 60_000, Some(60));
        check(true, 500, 1_000, 61_000, 60_000, Some(120));
        check(true, 0, 1_000, 1_000, 60_000, Some(0));
        check(true, 0, 2_000, 1_000, 60_000, Some(0));
        check(false, 0, 1_000, 61_000, 60_000, None);
        check(true, 1_000, 1_000, 61_000, 60_000, None);
        check(true, 2_000, 1_000, 61_000, 60_000, None);
        check(true, 0, 1_000, 61_000, -5, None);
        check(true, 0, 1, u64::MAX, i64::MAX - 1_000, None);
        // It answers, and is slower than the visits.
        check_late(false, 10, 0, 1_000, 61_000, 60_000, Some(60));
        check_late(false, 10, 1_000, 1_000, 61_000, 60_000, None);
    }
}
