//! Preload: links that are wanted in memory before anybody asks for them.
//!
//! In: requests to warm and pins, rows in the store whose count every poll of the feed sees. Out: memory that has them,
//! and a report of this instance for each request.
//! Never: asks the store for more than a quarter of what may be looked up at once: visitors come first; repeats a request
//! that was made before the process started.
//! At its limit: a request loads at most [`KEYS_MAX`] links, and as many as `cache.memory` holds of them stay.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::{Memory, Share};
use crate::domain::key::Key;
use crate::domain::time;
use crate::store::row::{Found, Position, WarmReport};
use crate::store::{Result, Store};

/// Links of one request.
const KEYS_MAX: u32 = 1_000_000;
/// How often a pinned link that gave way, or changed, is looked after.
const PINS_EVERY: Duration = Duration::from_secs(1);
/// A value that was changed while it was read is read again this often.
const ATTEMPTS_MAX: u32 = 5;

#[derive(Debug)]
pub struct Preload {
    pub memory: Arc<Memory>,
    pub store: Store,
    pub share: Share,
    /// The name of this instance in the reports.
    pub instance: String,
}

impl Preload {
    /// Does what is asked until the task is ended.
    pub async fn run(self, mut seen: watch::Receiver<Option<Position>>) {
        let mut last = None;
        let mut pins = Vec::new();
        let mut ticks = tokio::time::interval(PINS_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // A change of links alone asks for nothing.
        let asked = |position: &Position| (position.generation, position.asked);
        let mut obeyed = None;
        // Pinned links that memory does not keep; until a link changes.
        let mut hopeless = HashSet::new();
        loop {
            tokio::select! {
                changed = seen.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    hopeless.clear();
                }
                _ = ticks.tick() => self.look_after(&pins, &mut hopeless).await,
            }
            let known = seen.borrow_and_update().as_ref().map(asked);
            // Again with the next tick while the store is away.
            if known.is_some() && known != obeyed && self.obey(&mut last, &mut pins).await.is_ok() {
                obeyed = known;
                self.look_after(&pins, &mut hopeless).await;
            }
        }
    }

    /// Does what was asked since `last`, and reads the pins.
    async fn obey(&self, last: &mut Option<u64>, pins: &mut Vec<Key>) -> Result<()> {
        let requests = self.store.warm_requests(last.unwrap_or(0)).await?;
        *pins = self.store.pins().await?;
        let first = last.is_none();
        let done = last.get_or_insert(0);
        for request in requests {
            if !first {
                let keys = self.store.keys_of(request.what, KEYS_MAX).await?;
                let Loaded { loaded, missing, .. } = self.load(&keys).await?;
                let report = WarmReport { instance: self.instance.clone(), loaded, missing };
                self.store.report_warm(request.number, report, time::now()).await?;
                tracing::info!(number = request.number, loaded, missing, "warmed");
            }
            *done = request.number;
        }
        Ok(())
    }

    /// Marks pinned links as asked for, and loads those that are not in memory.
    async fn look_after(&self, pins: &[Key], hopeless: &mut HashSet<Key>) {
        let is_absent = |key: &&Key| self.memory.shards.get(self.memory.hash(key), key).is_none();
        let absent: Vec<Key> = pins.iter().filter(|key| !hopeless.contains(*key)).filter(is_absent).copied().collect();
        // Again in a second if the store is away; that it is, is said elsewhere.
        if !absent.is_empty()
            && let Ok(Loaded { absent, .. }) = self.load(&absent).await
        {
            hopeless.extend(absent);
        }
    }

    async fn load(&self, keys: &[Key]) -> Result<Loaded> {
        let mut outcome = Loaded::default();
        for chunk in keys.chunks(self.share.keys_max) {
            let mut left = chunk.to_vec();
            for _ in 0..ATTEMPTS_MAX {
                let _share = self.share.take(left.len()).await;
                let as_of = self.memory.feed.now();
                let found = self.store.look_up(left.clone()).await?;
                let mut again = Vec::new();
                for (key, found) in left.into_iter().zip(found) {
                    match found {
                        Found::Entry(entry) => {
                            let hash = self.memory.hash(&key);
                            let kept = self.memory.keep(hash, &key, &entry, as_of);
                            match kept {
                                true => outcome.loaded += 1,
                                false => again.push(key),
                            }
                            // Too long for the memory.
                            outcome.absent.extend(self.memory.shards.get(hash, &key).is_none().then_some(key));
                        }
                        Found::Missing | Found::Unreadable => {
                            outcome.missing += 1;
                            outcome.absent.push(key);
                        }
                    }
                }
                left = again;
                if left.is_empty() {
                    break;
                }
            }
        }
        Ok(outcome)
    }
}

/// What came of loading links.
#[derive(Debug, Default)]
struct Loaded {
    loaded: u64,
    /// There are no such links.
    missing: u64,
    /// What is not in memory all the same.
    absent: Vec<Key>,
}
