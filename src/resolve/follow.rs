//! Follow: reads the feed of changes and makes memory forget what has changed.
//!
//! In: the store's changes, by this process and every other. Out: memory without the keys that changed; how fresh
//! it is. Never: skips a change; believes a hint. A hint only makes the next poll come sooner.
//! At its limit: a poll reads [`PAGE`] changes at a time until there are no more; hints that come faster than
//! [`HINTS_APART`] share a poll.
//!
//! The poll is also what finds out that the store is away, or back: it goes on while the breaker is open.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, Notify, watch};

use super::Memory;
use super::invalidate::{RECENT_MAX, Trust};
use super::value::StoredAsOf;
use crate::breaker::Breaker;
use crate::domain::time::{self, UnixMillis};
use crate::store::row::Position;
use crate::store::{Error, Store};

/// The embedded store is asked this often: nobody hints.
const INTERVAL_EMBEDDED: Duration = Duration::from_millis(200);
/// A store that hints is asked this often all the same: what a lost hint told shows within a second.
const INTERVAL: Duration = Duration::from_millis(800);
/// An edit shows within 100 ms; each poll costs every instance a query.
const HINTS_APART: Duration = Duration::from_millis(10);
/// How long one question of a poll may take before the poll counts as failed; a poll has as many as it needs.
const TIMEOUT: Duration = Duration::from_secs(1);
const PAGE: u32 = 10_000;

#[derive(Debug)]
pub struct Follower {
    memory: Arc<Memory>,
    store: Store,
    /// Of the store.
    breaker: Arc<Breaker>,
    ttl: Duration,
    stale_max: Duration,
    /// Held over a poll: there is one at a time.
    followed: Mutex<Followed>,
    /// Polls that have begun.
    begun: AtomicU64,
    hinted: Notify,
    /// The last poll failed.
    failing: AtomicBool,
    /// The wall clock at the last successful poll.
    followed_at_ms: AtomicI64,
    /// When memory went stale, in Unix milliseconds; 0 while it is fresh.
    stale_since_ms: AtomicI64,
    /// What the last successful poll saw; none before the first.
    seen: watch::Sender<Option<Position>>,
}

#[derive(Debug)]
struct Followed {
    /// When the feed was last followed to its end.
    at: Instant,
    /// The number of the last poll, whatever came of it.
    poll: u64,
}

impl Follower {
    /// `followed_at`: when the store was last known to be as memory is, by both clocks.
    #[must_use]
    pub fn new(
        memory: Arc<Memory>,
        store: Store,
        breaker: Arc<Breaker>,
        (ttl, stale_max): (Duration, Duration),
        (followed_at, followed_at_ms): (Instant, UnixMillis),
    ) -> Self {
        Self {
            memory,
            store,
            breaker,
            ttl,
            stale_max,
            followed: Mutex::new(Followed { at: followed_at, poll: 0 }),
            begun: AtomicU64::new(0),
            hinted: Notify::new(),
            failing: AtomicBool::new(false),
            followed_at_ms: AtomicI64::new(followed_at_ms.0),
            stale_since_ms: AtomicI64::new(0),
            seen: watch::Sender::new(None),
        }
    }

    /// Polls until the task is ended.
    pub async fn run(self: Arc<Self>) {
        let interval = match self.store {
            Store::Sqlite(_) => INTERVAL_EMBEDDED,
            Store::Postgres(_) => INTERVAL,
        };
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = self.hinted.notified() => {}
            }
            self.catch_up().await;
            tokio::time::sleep(HINTS_APART).await;
        }
    }

    /// Somebody says that something has changed.
    pub fn hint(&self) {
        self.hinted.notify_one();
    }

    /// What the last successful poll saw, and each that sees something else.
    #[must_use]
    pub fn seen(&self) -> watch::Receiver<Option<Position>> {
        self.seen.subscribe()
    }

    /// Whether the store did not answer the last poll.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed)
    }

    /// When memory was last known to be as the store is.
    #[must_use]
    pub fn followed_at(&self) -> UnixMillis {
        UnixMillis(self.followed_at_ms.load(Ordering::Relaxed))
    }

    /// Since when links are served from memory that nobody could confirm for `cache.ttl`.
    #[must_use]
    pub fn stale_since(&self) -> Option<UnixMillis> {
        Some(self.stale_since_ms.load(Ordering::Relaxed)).filter(|ms| *ms != 0).map(UnixMillis)
    }

    /// Follows the feed to its end: after a change of this process it shows here when this returns. A failure is
    /// made up for by the next poll. Those who come together share one.
    pub async fn catch_up(&self) {
        let begun = self.begun.load(Ordering::Acquire);
        // Those who were woken together, by one commit, are all counted here before the first of them polls: else the
        // others wait for its poll, and then for one more.
        tokio::task::yield_now().await;
        let mut followed = self.followed.lock().await;
        // A poll that began after this call has read whatever was committed before it.
        if followed.poll > begun {
            return;
        }
        let poll = self.begun.fetch_add(1, Ordering::AcqRel) + 1;
        let outcome = self.poll().await;
        // Also of one that failed: those who waited behind it do not all try for themselves.
        followed.poll = poll;
        if outcome.is_ok() {
            followed.at = time::monotonic();
            self.followed_at_ms.store(time::now().0, Ordering::Relaxed);
        }
        self.breaker.note(outcome.as_ref().map(|_| ()), time::monotonic());
        self.memory.feed.set_age(followed.at, time::monotonic(), self.ttl, self.stale_max);
        let stale = self.memory.feed.trust() != Trust::Fresh;
        let since_ms = self.stale_since_ms.load(Ordering::Relaxed);
        if stale != (since_ms != 0) {
            self.stale_since_ms.store(if stale { time::now().0 } else { 0 }, Ordering::Relaxed);
        }
        let failed_before = self.failing.swap(outcome.is_err(), Ordering::Relaxed);
        match outcome {
            Ok(position) => {
                if failed_before {
                    tracing::info!(dependency = "store", "the store answers again");
                }
                self.seen.send_if_modified(|seen| seen.replace(position) != Some(position));
            }
            Err(error) if !failed_before => {
                tracing::warn!(dependency = "store", %error, "the store does not answer: links in memory go on");
            }
            Err(_) => {}
        }
    }

    /// Remembers the edits that came before this process, so that what others left in Redis can be believed.
    pub async fn remember(&self) -> Result<(), Error> {
        let begun = self.memory.feed.now();
        let edits = self.store.edits(RECENT_MAX as u32).await?;
        let since = edits.first().filter(|_| edits.len() == RECENT_MAX).map_or(0, |first| first.version);
        let edits = edits.iter().map(|edit| (self.memory.hash(&edit.key), edit.version));
        self.memory.feed.remember(edits, since, begun);
        Ok(())
    }

    async fn poll(&self) -> Result<Position, Error> {
        let memory = &*self.memory;
        let mut end = in_time(self.store.position()).await?;
        loop {
            let StoredAsOf { generation, position } = memory.feed.now().stored;
            if generation == end.generation && position == end.version {
                return Ok(end);
            }
            if generation == end.generation && end.version < position {
                // A backup was put back: versions and numbers that were given since begin anew.
                end.generation = in_time(self.store.begin_generation(generation)).await?;
            }
            let changes = match generation == end.generation {
                true => in_time(self.store.changes(position, PAGE)).await?,
                false => Vec::new(),
            };
            if changes.first().map(|change| change.version) != Some(position + 1) {
                let (from, to) = (position, end.version);
                tracing::warn!(from, to, "the store was put back or its history cut: forgetting everything");
                memory.feed.restart(StoredAsOf { generation: end.generation, position: end.version });
                memory.shards.clear();
                memory.negative.clear();
                return Ok(end);
            }
            for change in &changes {
                let hash = memory.hash(&change.key);
                memory.feed.note(hash, change.version, change.created);
                memory.negative.remove(hash, &change.key);
                // Of a link that was just created nothing older is in memory, and what is there may be it.
                if !change.created {
                    memory.shards.remove(hash, &change.key);
                }
                memory.feed.advance(change.version);
            }
            if changes.last().is_some_and(|last| last.version >= end.version) {
                return Ok(end);
            }
        }
    }
}

async fn in_time<T>(question: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let late = |_| Err(Error::Unavailable("it does not answer within a second".into()));
    tokio::time::timeout(TIMEOUT, question).await.unwrap_or_else(late)
}
