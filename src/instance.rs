//! The instance: a running server as its own API sees it.
//!
//! In: what the stations count. Out: whether it is ready, what is degraded and why, its status.
//! Never: decides anything.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Instant;

use crate::domain::time::{self, UnixMillis};
use crate::links::rfc3339;
use crate::resolve::follow::Follower;
use crate::resolve::{Memory, Tier};
use crate::store::Store;
use crate::{accept, http};

/// Why the server is degraded, as `/readyz`, `/metrics` and `waypost status` name it.
pub const REASONS: [&str; 2] = ["store", "stale"];

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

/// A running server, as its own API sees it.
pub struct Instance {
    phase: AtomicU8,
    started: Instant,
    started_at: UnixMillis,
    store: Store,
    memory: Arc<Memory>,
    follower: Arc<Follower>,
    cores: Vec<Core>,
    limited: AtomicU64,
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Instance")
    }
}

impl Instance {
    #[must_use]
    pub fn new(store: Store, memory: Arc<Memory>, follower: Arc<Follower>, cores: Vec<Core>) -> Self {
        Self {
            phase: AtomicU8::new(Phase::Starting as u8),
            started: time::monotonic(),
            started_at: time::now(),
            store,
            memory,
            follower,
            cores,
            limited: AtomicU64::new(0),
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
        self.cores.iter()
    }

    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// What is away that redirects can do without, of [`REASONS`].
    #[must_use]
    pub fn degraded(&self) -> Vec<&'static str> {
        let flags = [self.follower.is_failing(), self.follower.is_stale()];
        REASONS.into_iter().zip(flags).filter_map(|(reason, is)| is.then_some(reason)).collect()
    }

    pub fn count_limited(&self) {
        self.limited.fetch_add(1, Ordering::Relaxed);
    }

    #[must_use]
    pub fn limited(&self) -> u64 {
        self.limited.load(Ordering::Relaxed)
    }

    /// What `waypost status` shows.
    #[must_use]
    pub fn status(&self) -> serde_json::Value {
        let answers = |tier: Tier| -> u64 { self.cores().map(|core| core.http.answers(tier)).sum() };
        let tiers: serde_json::Map<_, _> =
            Tier::ALL.into_iter().map(|tier| (tier.name().to_owned(), answers(tier).into())).collect();
        let figures = self.memory.shards.figures();
        let up = time::monotonic().saturating_duration_since(self.started).as_secs();
        serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "phase": match self.phase() { Phase::Starting => "starting", Phase::Serving => "serving", Phase::Draining => "draining" },
            "started_at": rfc3339(self.started_at),
            "uptime_seconds": up,
            "store": self.store.describe(),
            "workers": self.cores.len(),
            "connections": self.cores().map(|core| core.accept.open.get()).sum::<u64>(),
            "degraded": self.degraded(),
            "visits_answered": self.cores().map(|core| core.http.visits.answered()).sum::<u64>(),
            "answers_by_tier": tiers,
            "cache": {"links": figures.entries, "bytes": figures.bytes, "evictions": figures.evictions},
        })
    }
}
