//! From a key to what is to be answered, tier by tier.
//!
//! In: a key and now. Out: a [`Resolution`], at once from `hot` or `shards`, or by way of the `lookup` crossing.
//! Never: says that a link is missing when that could not be found out; waits in front for anything but a look-up
//! that no memory can answer; believes a value that is older than a change of its key.
//! At its limit: [`ask::ASKED_MAX`] look-ups of a core may be open; one more is `Unavailable`.
//!
//! ```text
//!   front:  hot ▸ shards ▸ negative ▸ ask ─ lookup crossing ─▶ back:  flight ▸ store
//!                                        follow ─ note, remove, advance ─▶ shards, negative
//! ```

pub mod ask;
pub mod flight;
pub mod follow;
pub mod hot;
pub mod invalidate;
pub mod negative;
pub mod shards;
pub mod value;
pub mod warm;

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, StatusCode};
use tokio::sync::oneshot;

use crate::domain::key::Key;
use crate::domain::link::{Entry, Validity};
use crate::domain::target::Target;
use crate::domain::time::UnixMillis;
use ask::{Ask, Looked};
use hot::{Hot, Ready};
use invalidate::{AsOf, Feed, Trust};
use negative::Negative;
use shards::{Hit, Shards};

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
    Store,
    /// Nothing was looked up: a page, or a request that is none.
    None,
}

impl Tier {
    pub const ALL: [Self; 4] = [Self::Hot, Self::Shards, Self::Store, Self::None];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hot => "hot",
            Self::Shards => "shards",
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
}

impl Memory {
    /// `position`: where the feed of the store stands.
    #[must_use]
    pub fn new(cache_bytes: u64, workers: usize, negative_ttl: Duration, position: u64) -> Self {
        Self {
            hasher: ahash::RandomState::new(),
            shards: Shards::new(cache_bytes, workers),
            negative: Negative::default(),
            feed: Feed::new(position),
            negative_ttl,
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
        // Each visit of a limited link is taken from the store, so there is nothing to keep.
        if entry.rules.limited {
            return self.feed.believes(hash, as_of);
        }
        self.shards.insert(hash, key, entry, |key| self.hash(key), || self.feed.believes(hash, as_of))
    }

    /// Keeps that there was no link at `as_of`; false if that is not believed.
    #[must_use]
    pub fn keep_missing(&self, hash: u64, key: &Key, as_of: AsOf, now: UnixMillis) -> bool {
        self.negative.insert(hash, key, now.after(self.negative_ttl), || self.feed.believes(hash, as_of))
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
            if let Some(hit) = memory.shards.get(hash, key) {
                return Step::Done(self.remembered(hash, key, hit, now), Tier::Shards);
            }
            if memory.negative.has(hash, key, now) {
                return Step::Done(Resolution::Missing, Tier::Shards);
            }
        }
        match self.ask.ask(*key, hash, visit) {
            Some(looked) => Step::Asked(looked),
            None => Step::Done(Resolution::Unavailable, Tier::Store),
        }
    }

    /// What a look-up found.
    #[must_use]
    pub fn judge(&self, looked: Looked, now: UnixMillis) -> Resolution {
        match looked {
            Looked::Found(entry) => self.answer(*entry, now),
            Looked::UsedUp => Resolution::Gone(None),
            Looked::Missing => Resolution::Missing,
            Looked::Unavailable => Resolution::Unavailable,
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::key::{Case, DomainId};
    use crate::domain::link::{LinkId, Rules};
    use crate::resolve::invalidate::AsOf;

    const KEYS: usize = 4;

    /// What may happen, in any order: links change, look-ups begin, read the store and come to an end much later, and the
    /// feed is followed one line at a time.
    #[derive(Clone, Debug)]
    enum Event {
        Change { key: usize, exists: bool },
        Begin(usize),
        Read(usize),
        End(usize),
        Note,
        Advance,
        Restore,
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let event = prop_oneof![
            4 => (0..KEYS, any::<bool>()).prop_map(|(key, exists)| Event::Change { key, exists }),
            6 => (0..KEYS).prop_map(Event::Begin),
            6 => (0..8usize).prop_map(Event::Read),
            6 => (0..8usize).prop_map(Event::End),
            8 => Just(Event::Note),
            6 => Just(Event::Advance),
        ];
        prop::collection::vec(prop_oneof![60 => event, 1 => Just(Event::Restore)], 1..200)
    }

    struct Lookup {
        key: usize,
        as_of: AsOf,
        read: Option<Option<Entry>>,
    }

    /// A store with a history, and how far its feed was followed.
    #[derive(Default)]
    struct World {
        /// The version and what the link is since then, for each key.
        links: [Vec<(u64, Option<Entry>)>; KEYS],
        feed: Vec<(u64, usize)>,
        noted: usize,
        advanced: usize,
    }

    fn key(number: usize) -> Key {
        let code = crate::domain::key::Code::parse(format!("code{number}").as_bytes(), Case::Sensitive).unwrap();
        Key { domain: DomainId(0), code }
    }

    fn entry(version: u64) -> Entry {
        let target = Target::new(&format!("https://example.com/{version}")).unwrap();
        Entry { id: LinkId(version), target, rules: Rules::default() }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

        /// Once the feed was followed past a change, nothing older is served, however late a look-up ends.
        #[test]
        fn nothing_older_than_a_change_that_was_followed_is_served(events in events()) {
            let memory = Memory::new(0, 1, Duration::from_secs(3600), 0);
            let mut world = World::default();
            let mut version = 0;
            let mut lookups: Vec<Lookup> = Vec::new();
            let now = UnixMillis(0);
            for event in events {
                match event {
                    Event::Change { key, exists } => {
                        version += 1;
                        world.links[key].push((version, exists.then(|| entry(version))));
                        world.feed.push((version, key));
                    }
                    Event::Begin(key) => lookups.push(Lookup { key, as_of: memory.feed.now(), read: None }),
                    Event::Read(index) => {
                        if let Some(lookup) = lookups.get_mut(index) && lookup.read.is_none() {
                            lookup.read = Some(world.links[lookup.key].last().and_then(|(_, entry)| entry.clone()));
                        }
                    }
                    Event::End(index) => {
                        if lookups.get(index).is_some_and(|lookup| lookup.read.is_some()) {
                            let lookup = lookups.remove(index);
                            let key = key(lookup.key);
                            let hash = memory.hash(&key);
                            let _ = match lookup.read.unwrap() {
                                Some(entry) => memory.keep(hash, &key, &entry, lookup.as_of),
                                None => memory.keep_missing(hash, &key, lookup.as_of, now),
                            };
                        }
                    }
                    Event::Note => {
                        if let Some((version, number)) = world.feed.get(world.noted) {
                            let key = key(*number);
                            let hash = memory.hash(&key);
                            memory.feed.note(hash, *version);
                            memory.negative.remove(hash, &key);
                            memory.shards.remove(hash, &key, true);
                            world.noted += 1;
                        }
                    }
                    Event::Advance => {
                        world.advanced = world.noted;
                        if let Some((version, _)) = world.noted.checked_sub(1).and_then(|last| world.feed.get(last)) {
                            memory.feed.advance(*version);
                        }
                    }
                    Event::Restore => {
                        // A backup from before everything: versions begin anew.
                        world = World::default();
                        version = 0;
                        lookups.iter_mut().filter(|lookup| lookup.read.is_none()).for_each(|lookup| lookup.read = Some(None));
                        memory.feed.restart(0);
                        memory.shards.clear();
                        memory.negative.clear();
                    }
                }
                let followed = world.noted.checked_sub(1).map_or(0, |last| world.feed[last].0);
                for number in 0..KEYS {
                    let key = key(number);
                    let hash = memory.hash(&key);
                    let changes = &world.links[number];
                    // What may be served: the state at the last change that was followed, or any later one.
                    let first = changes.iter().rposition(|(version, _)| *version <= followed);
                    let may = |served: &Option<Entry>| {
                        first.is_none() && served.is_none() || changes[first.unwrap_or(0)..].iter().any(|(_, entry)| entry == served)
                    };
                    if let Some(hit) = memory.shards.get(hash, &key) {
                        prop_assert!(may(&Some(hit.entry)), "an old entry of {:?}", key);
                    }
                    if memory.negative.has(hash, &key, now) {
                        prop_assert!(may(&None), "an old absence of {:?}", key);
                    }
                }
            }
        }
    }
}
