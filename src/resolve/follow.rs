//! Follow: reads the feed of changes and makes memory forget what has changed.
//!
//! In: the store's changes, by this process and every other. Out: memory without the keys that changed; how fresh
//! it is. Never: skips a change; believes a hint. A hint only makes the next poll come sooner.
//! At its limit: a poll reads [`PAGE`] changes at a time until there are no more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use super::Memory;
use super::invalidate::Trust;
use crate::domain::time;
use crate::store::{Error, Store};

/// The embedded store is asked this often; the contract is a second.
const INTERVAL: Duration = Duration::from_millis(200);
/// How long one poll may take before it counts as failed.
const TIMEOUT: Duration = Duration::from_secs(1);
const PAGE: u32 = 10_000;

#[derive(Debug)]
pub struct Follower {
    memory: Arc<Memory>,
    store: Store,
    ttl: Duration,
    stale_max: Duration,
    /// Held over a poll: there is one at a time.
    followed: Mutex<Followed>,
    /// Polls that have begun.
    begun: AtomicU64,
    /// The last poll failed.
    failing: AtomicBool,
}

#[derive(Debug)]
struct Followed {
    /// When the feed was last followed to its end.
    at: Instant,
    /// The number of the poll that did.
    poll: u64,
}

impl Follower {
    #[must_use]
    pub fn new(memory: Arc<Memory>, store: Store, ttl: Duration, stale_max: Duration) -> Self {
        Self {
            memory,
            store,
            ttl,
            stale_max,
            followed: Mutex::new(Followed { at: time::monotonic(), poll: 0 }),
            begun: AtomicU64::new(0),
            failing: AtomicBool::new(false),
        }
    }

    /// Polls until the task is ended.
    pub async fn run(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.catch_up().await;
        }
    }

    /// Whether the store did not answer the last poll.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed)
    }

    /// Whether links are served from memory that nobody could confirm for `cache.ttl`.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.memory.feed.trust() != Trust::Fresh
    }

    /// Follows the feed to its end: after a change of this process it shows here when this returns. A failure is
    /// made up for by the next poll. Those who come together share one.
    pub async fn catch_up(&self) {
        let begun = self.begun.load(Ordering::Acquire);
        let mut followed = self.followed.lock().await;
        // A poll that began after this call has read whatever was committed before it.
        if followed.poll > begun {
            return;
        }
        let poll = self.begun.fetch_add(1, Ordering::AcqRel) + 1;
        let outcome = tokio::time::timeout(TIMEOUT, self.poll()).await;
        let outcome = outcome.unwrap_or_else(|_| Err(Error::Unavailable("it took more than a second".into())));
        if outcome.is_ok() {
            *followed = Followed { at: time::monotonic(), poll };
        }
        self.memory.feed.set_age(followed.at, time::monotonic(), self.ttl, self.stale_max);
        match (outcome, self.failing.load(Ordering::Relaxed)) {
            (Ok(()), true) => tracing::info!(dependency = "store", "the store answers again"),
            (Err(error), false) => {
                tracing::warn!(dependency = "store", %error, "the store does not answer: links in memory go on");
                self.failing.store(true, Ordering::Relaxed);
                return;
            }
            (Err(_), true) => return,
            (Ok(()), false) => {}
        }
        self.failing.store(false, Ordering::Relaxed);
    }

    async fn poll(&self) -> Result<(), Error> {
        let memory = &*self.memory;
        let end = self.store.position().await?.version;
        loop {
            let position = memory.feed.now().position;
            if end == position {
                return Ok(());
            }
            let changes = self.store.changes(position, PAGE).await?;
            let next = changes.first().map(|change| change.version);
            if end < position || next != Some(position + 1) {
                tracing::warn!(position, end, "the store was put back or its history cut: forgetting everything");
                memory.feed.restart(end);
                memory.shards.clear();
                memory.negative.clear();
                return Ok(());
            }
            let Some(last) = changes.last() else { return Ok(()) };
            for change in &changes {
                let hash = memory.hash(&change.key);
                memory.feed.note(hash, change.version);
                memory.negative.remove(hash, &change.key);
                // A link that was just created is in nobody's memory.
                memory.shards.remove(hash, &change.key, !change.created);
                memory.feed.advance(change.version);
            }
            if last.version >= end {
                return Ok(());
            }
        }
    }
}
