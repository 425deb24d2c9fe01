//! What may be believed: the feed of changes and how far it was followed.
//!
//! In: the store's changes in the order of their versions. Out: which values of a cache are believed, and whether
//! what is in memory is fresh.
//! Never: believes a look-up that began before a change of its key; waits in front.
//! At its limit: of [`RECENT_MAX`] remembered changes the oldest is forgotten, and nothing read before it is believed.
//!
//! The rule: a value carries `as_of`, the position of the feed before the store was read for it. It is believed if
//! `as_of ≥ floor` and its key has not changed since `as_of`. The question is asked under the lock of the shard
//! that will hold the value, and a change is noted here before its key is removed from there: so a value is either
//! refused or removed, whichever of the two comes first.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// Changes that are remembered.
const RECENT_MAX: usize = 65_536;

#[derive(Debug)]
pub struct Feed {
    trust: AtomicU8,
    /// Apart from what every hit reads.
    state: Box<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    /// Every change up to this one was noted, and its key removed from memory.
    at: AsOf,
    /// Nothing that was read before this position is believed.
    floor: u64,
    /// The last change of each remembered key, by the key's hash: two keys with one hash only cost a second look.
    versions: HashMap<u64, u64, ahash::RandomState>,
    /// The remembered changes, oldest first.
    order: VecDeque<(u64, u64)>,
}

/// A moment of the feed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AsOf {
    /// Grows when the store turns out to be another one (a backup was put back): positions begin anew.
    generation: u64,
    pub position: u64,
}

/// How far what is in memory may be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// The feed was followed less than `cache.ttl` ago.
    Fresh = 0,
    /// Longer ago, and there is nobody to ask: served all the same.
    Stale = 1,
    /// Longer ago than `cache.stale_max`: not served.
    Expired = 2,
}

impl Feed {
    /// A feed that was followed up to `position`, with nothing in memory yet.
    #[must_use]
    pub fn new(position: u64) -> Self {
        let at = AsOf { generation: 0, position };
        let state = State { at, floor: position, versions: HashMap::default(), order: VecDeque::new() };
        Self { trust: AtomicU8::new(Trust::Fresh as u8), state: Box::new(Mutex::new(state)) }
    }

    /// Where the feed stands: `as_of` of a look-up that begins now.
    #[must_use]
    pub fn now(&self) -> AsOf {
        self.lock().at
    }

    /// Whether a value of this key, read at `as_of`, may be kept and served.
    #[must_use]
    pub fn believes(&self, hash: u64, as_of: AsOf) -> bool {
        let state = self.lock();
        as_of.generation == state.at.generation
            && as_of.position >= state.floor
            && state.versions.get(&hash).is_none_or(|changed| *changed <= as_of.position)
    }

    /// Notes a change. Its key must be removed from memory after this and before [`Feed::advance`].
    pub fn note(&self, hash: u64, version: u64) {
        let mut state = self.lock();
        state.versions.insert(hash, version);
        state.order.push_back((hash, version));
        while state.order.len() > RECENT_MAX
            && let Some((hash, version)) = state.order.pop_front()
        {
            state.floor = state.floor.max(version);
            if state.versions.get(&hash) == Some(&version) {
                state.versions.remove(&hash);
            }
        }
    }

    /// Every change up to `position` was noted and removed.
    pub fn advance(&self, position: u64) {
        self.lock().at.position = position;
    }

    /// The store is another one than it was: nothing read before this is believed. Memory must be cleared after it.
    pub fn restart(&self, position: u64) {
        let mut state = self.lock();
        let generation = state.at.generation + 1;
        *state = State {
            at: AsOf { generation, position },
            floor: position,
            versions: HashMap::default(),
            order: VecDeque::new(),
        };
    }

    #[must_use]
    pub fn trust(&self) -> Trust {
        match self.trust.load(Ordering::Relaxed) {
            0 => Trust::Fresh,
            1 => Trust::Stale,
            _ => Trust::Expired,
        }
    }

    /// Tells how long ago the feed was followed to its end.
    pub fn set_age(&self, followed: Instant, now: Instant, ttl: Duration, stale_max: Duration) {
        let age = now.saturating_duration_since(followed);
        let trust = if age <= ttl {
            Trust::Fresh
        } else if age <= stale_max {
            Trust::Stale
        } else {
            Trust::Expired
        };
        self.trust.store(trust as u8, Ordering::Relaxed);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_believed() {
        let feed = Feed::new(10);
        let before = feed.now();
        assert!(feed.believes(1, before));
        feed.note(1, 11);
        assert!(!feed.believes(1, before), "it changed since");
        assert!(feed.believes(2, before), "another key did not");
        assert!(!feed.believes(1, feed.now()), "noted, but not removed yet");
        feed.advance(11);
        assert!(feed.believes(1, feed.now()));
        feed.restart(5);
        assert!(!feed.believes(2, before), "of another store, although its position is higher");
        assert!(feed.believes(2, feed.now()));
    }

    #[test]
    fn what_was_forgotten_raises_the_floor() {
        let feed = Feed::new(0);
        let before = feed.now();
        for version in 1..=RECENT_MAX as u64 + 1 {
            feed.note(version, version);
            feed.advance(version);
        }
        assert!(!feed.believes(u64::MAX, before), "the first change is forgotten: it may have been this key's");
        assert!(feed.believes(u64::MAX, feed.now()));
        assert_eq!(feed.lock().versions.len(), RECENT_MAX);
    }

    #[test]
    fn trust_goes_with_age() {
        let feed = Feed::new(0);
        let start = crate::domain::time::monotonic();
        let second = Duration::from_secs(1);
        for (age, want) in
            [(0, Trust::Fresh), (10, Trust::Fresh), (11, Trust::Stale), (20, Trust::Stale), (21, Trust::Expired)]
        {
            feed.set_age(start, start + age * second, 10 * second, 20 * second);
            assert_eq!(feed.trust(), want, "{age} s");
        }
    }
}
