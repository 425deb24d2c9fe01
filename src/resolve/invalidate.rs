//! What may be believed: the feed of changes and how far it was followed.
//!
//! In: the store's changes in the order of their versions. Out: which values of a cache are believed, and whether
//! what is in memory is fresh.
//! Never: believes a look-up that began before a change of its key; waits in front.
//! At its limit: of [`RECENT_MAX`] remembered changes the oldest is forgotten, and nothing read before it is believed.
//!
//! The rule: a value carries `as_of`, the position of the feed before the store was read for it, by whomever: this
//! process or another one that left it in Redis. It is believed if `as_of ≥ floor` and its key has not changed since
//! `as_of`. The question is asked under the lock of the shard that will hold the value, and a change is noted here
//! before its key is removed from there: so a value is either refused or removed, whichever of the two comes first.
//!
//! Creations are remembered apart: they make absences wrong, and no link. A million imported links thus push no edit
//! out of memory, and Redis stays of use.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use super::value::StoredAsOf;

/// Changes that are remembered, and as many creations. About 4 MiB in all.
pub const RECENT_MAX: usize = 65_536;

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
    /// No link that was read before this position is believed.
    floor: u64,
    /// No absence that was read before this position is believed.
    floor_missing: u64,
    /// The last change of each remembered key, by the key's hash: two keys with one hash only cost a second look.
    versions: HashMap<u64, u64, ahash::RandomState>,
    /// The remembered changes of links that were there before, oldest first.
    edited: VecDeque<(u64, u64)>,
    /// The remembered creations, oldest first.
    created: VecDeque<(u64, u64)>,
    /// What this process has created and the feed has not told yet.
    expected: HashSet<u64, ahash::RandomState>,
}

/// A moment of the feed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AsOf {
    /// Grows when this process forgets everything; what is under way then is not believed.
    restarts: u64,
    pub stored: StoredAsOf,
}

/// What was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    Link,
    Absence,
}

/// How far what is in memory may be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// The feed was followed less than `cache.ttl` ago.
    Fresh = 0,
    /// Longer ago, and there is nobody to ask (the feed is asked all the time): served all the same.
    Stale = 1,
    /// Longer ago than `cache.stale_max`: not served.
    Expired = 2,
}

impl Feed {
    /// A feed that was followed up to `at`, with nothing remembered of what came before.
    #[must_use]
    pub fn new(at: StoredAsOf) -> Self {
        Self { trust: AtomicU8::new(Trust::Fresh as u8), state: Box::new(Mutex::new(State::new(0, at))) }
    }

    /// Where the feed stands: `as_of` of a look-up that begins now.
    #[must_use]
    pub fn now(&self) -> AsOf {
        self.lock().at
    }

    /// The `as_of` of a value that was found elsewhere, with what it says of itself.
    #[must_use]
    pub fn as_of(&self, stored: StoredAsOf) -> AsOf {
        AsOf { restarts: self.lock().at.restarts, stored }
    }

    /// Whether what was read of this key at `as_of` may be kept and served.
    #[must_use]
    pub fn believes(&self, hash: u64, as_of: AsOf, read: Read) -> bool {
        let state = self.lock();
        let floor = match read {
            Read::Link => state.floor,
            Read::Absence if state.expected.contains(&hash) => return false,
            Read::Absence => state.floor_missing,
        };
        as_of.restarts == state.at.restarts
            && as_of.stored.generation == state.at.stored.generation
            && as_of.stored.position >= floor
            && state.versions.get(&hash).is_none_or(|changed| *changed <= as_of.stored.position)
    }

    /// Notes a change. Its key must be removed from memory after this and before [`Feed::advance`].
    pub fn note(&self, hash: u64, version: u64, created: bool) {
        let state = &mut *self.lock();
        state.versions.insert(hash, version);
        state.expected.remove(&hash);
        let recent = if created { &mut state.created } else { &mut state.edited };
        recent.push_back((hash, version));
        while recent.len() > RECENT_MAX
            && let Some((hash, version)) = recent.pop_front()
        {
            state.floor_missing = state.floor_missing.max(version);
            if !created {
                state.floor = state.floor.max(version);
            }
            if state.versions.get(&hash) == Some(&version) {
                state.versions.remove(&hash);
            }
        }
    }

    /// A link was created here that no link preceded: from now on nobody believes that it is missing, though the feed
    /// tells of it later. Its absence must be removed from memory after this.
    pub fn expect(&self, hash: u64) {
        self.lock().expected.insert(hash);
    }

    /// Remembers edits that came before the feed was followed, so that links which others read meanwhile (and left in
    /// Redis) can be believed: `edits` (hash and version, oldest first) are all that there were after `since`. They
    /// were read after `begun`; if everything was forgotten meanwhile, they are of another store.
    pub fn remember(&self, edits: impl DoubleEndedIterator<Item = (u64, u64)>, since: u64, begun: AsOf) {
        let state = &mut *self.lock();
        if state.at.restarts != begun.restarts {
            return;
        }
        let floor = state.floor;
        for (hash, version) in edits.rev().filter(|(_, version)| *version <= floor) {
            state.versions.entry(hash).or_insert(version);
            state.edited.push_front((hash, version));
        }
        state.floor = floor.min(since);
    }

    /// Every change up to `position` was noted and removed.
    pub fn advance(&self, position: u64) {
        self.lock().at.stored.position = position;
    }

    /// The store is another one than it was, or its history was cut: nothing read before this is believed. Memory must
    /// be cleared after it.
    pub fn restart(&self, at: StoredAsOf) {
        let mut state = self.lock();
        *state = State::new(state.at.restarts + 1, at);
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

impl State {
    fn new(restarts: u64, at: StoredAsOf) -> Self {
        Self {
            at: AsOf { restarts, stored: at },
            floor: at.position,
            floor_missing: at.position,
            versions: HashMap::default(),
            edited: VecDeque::new(),
            created: VecDeque::new(),
            expected: HashSet::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(generation: u64, position: u64) -> StoredAsOf {
        StoredAsOf { generation, position }
    }

    #[test]
    fn what_is_believed() {
        let feed = Feed::new(at(0, 10));
        let before = feed.now();
        assert!(feed.believes(1, before, Read::Link));
        feed.note(1, 11, false);
        assert!(!feed.believes(1, before, Read::Link), "it changed since");
        assert!(feed.believes(2, before, Read::Absence), "another key did not");
        assert!(!feed.believes(1, feed.now(), Read::Link), "noted, but not removed yet");
        feed.advance(11);
        assert!(feed.believes(1, feed.now(), Read::Link));
        assert!(feed.believes(1, feed.as_of(at(0, 12)), Read::Link), "of somebody who is ahead");
        assert!(!feed.believes(2, feed.as_of(at(0, 9)), Read::Link), "older than what is remembered");
        assert!(!feed.believes(2, feed.as_of(at(1, 11)), Read::Link), "of another generation");
        feed.restart(at(1, 5));
        assert!(!feed.believes(2, before, Read::Link), "of another store, although its position is higher");
        assert!(feed.believes(2, feed.now(), Read::Link));
        let before = feed.now();
        feed.restart(at(1, 5));
        assert!(!feed.believes(2, before, Read::Link), "everything was forgotten meanwhile");
    }

    #[test]
    fn what_was_created_here_is_not_missing() {
        let feed = Feed::new(at(0, 10));
        let before = feed.now();
        feed.expect(1);
        assert!(!feed.believes(1, before, Read::Absence));
        assert!(feed.believes(1, before, Read::Link) && feed.believes(2, before, Read::Absence));
        feed.note(1, 11, true);
        feed.advance(11);
        assert!(!feed.believes(1, before, Read::Absence), "the feed has told of it");
        assert!(feed.believes(1, feed.now(), Read::Absence), "it may have been deleted since");
    }

    #[test]
    fn what_was_remembered_lowers_the_floor() {
        let feed = Feed::new(at(0, 10));
        let check = |hash: u64, position: u64, want: bool| {
            assert_eq!(feed.believes(hash, feed.as_of(at(0, position)), Read::Link), want, "{hash} at {position}");
        };
        feed.remember([(1, 5), (2, 7), (1, 8)].into_iter(), 3, feed.now());
        for (hash, position, want) in
            [(1, 7, false), (1, 8, true), (2, 6, false), (2, 7, true), (3, 3, true), (3, 2, false), (1, 10, true)]
        {
            check(hash, position, want);
        }
        assert!(!feed.believes(3, feed.as_of(at(0, 9)), Read::Absence), "creations are not remembered");
    }

    #[test]
    fn what_was_forgotten_raises_the_floor() {
        for created in [false, true] {
            let feed = Feed::new(at(0, 0));
            let before = feed.now();
            for version in 1..=RECENT_MAX as u64 + 1 {
                feed.note(version, version, created);
                feed.advance(version);
            }
            // The first change is forgotten: it may have been this key's.
            assert!(!feed.believes(u64::MAX, before, Read::Absence));
            assert_eq!(feed.believes(u64::MAX, before, Read::Link), created, "a creation makes no link wrong");
            assert!(feed.believes(u64::MAX, feed.now(), Read::Absence));
            assert_eq!(feed.lock().versions.len(), RECENT_MAX);
        }
    }

    #[test]
    fn trust_goes_with_age() {
        let feed = Feed::new(at(0, 0));
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
