//! Negative entries: codes that the store did not have a moment ago.
//!
//! In: a key that was looked up in vain, and until when that is believed. Out: whether it is.
//! Never: answers for another key (the whole key is compared); grows. At its limit: a newer key takes the place of an
//! older one. A flood of invented codes stays in here and pushes no link out of the shards.

use std::sync::{Mutex, MutexGuard};

use crate::domain::key::Key;
use crate::domain::time::UnixMillis;

const LOCKS: usize = 64;
/// Places in all: about 2.5 MiB.
const PLACES: usize = 16_384;

type Places = Box<[Option<(Key, UnixMillis)>]>;

#[derive(Debug)]
pub struct Negative {
    parts: Box<[Mutex<Places>]>,
}

impl Default for Negative {
    fn default() -> Self {
        Self { parts: (0..LOCKS).map(|_| Mutex::new(vec![None; PLACES / LOCKS].into())).collect() }
    }
}

impl Negative {
    fn part(&self, hash: u64) -> MutexGuard<'_, Places> {
        self.parts[(hash >> 40) as usize % LOCKS].lock().expect("nobody panics with it")
    }

    fn place(hash: u64) -> usize {
        hash as usize % (PLACES / LOCKS)
    }

    #[must_use]
    pub fn has(&self, hash: u64, key: &Key, now: UnixMillis) -> bool {
        self.part(hash)[Self::place(hash)].as_ref().is_some_and(|(known, until)| known == key && now < *until)
    }

    /// Keeps it, if `believed` says so while no change of this key can come between; true if it did.
    pub fn insert(&self, hash: u64, key: &Key, until: UnixMillis, believed: impl FnOnce() -> bool) -> bool {
        let mut part = self.part(hash);
        let believed = believed();
        if believed {
            part[Self::place(hash)] = Some((*key, until));
        }
        believed
    }

    pub fn remove(&self, hash: u64, key: &Key) {
        let slot = &mut self.part(hash)[Self::place(hash)];
        if slot.as_ref().is_some_and(|(known, _)| known == key) {
            *slot = None;
        }
    }

    pub fn clear(&self) {
        for part in &self.parts {
            part.lock().expect("nobody panics with it").fill(None);
        }
    }
}
