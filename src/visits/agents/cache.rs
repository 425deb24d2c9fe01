//! What bounds the texts: in memory, and in a day.
//!
//! In: texts. Out: what was found out about them, and whether a new one may be kept. Pure.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use ahash::RandomState;

use crate::stats::rollup::Day;

/// Entries of a generation.
const GENERATION_MAX: usize = 16_384;

/// Two generations: what is asked for is in the young one, and when that is full, the old one is forgotten. At most
/// twice [`GENERATION_MAX`] entries, and no list to keep in order. Keyed hashes: clients choose the texts.
#[derive(Debug)]
pub(super) struct Cache<T> {
    young: HashMap<Box<[u8]>, Arc<T>, RandomState>,
    old: HashMap<Box<[u8]>, Arc<T>, RandomState>,
}

impl<T> Default for Cache<T> {
    fn default() -> Self {
        Self { young: HashMap::default(), old: HashMap::default() }
    }
}

impl<T> Cache<T> {
    pub(super) fn get(&mut self, text: &[u8]) -> Option<Arc<T>> {
        if let Some(value) = self.young.get(text) {
            return Some(Arc::clone(value));
        }
        let (text, value) = self.old.remove_entry(text)?;
        self.put(text, Arc::clone(&value));
        Some(value)
    }

    pub(super) fn put(&mut self, text: Box<[u8]>, value: Arc<T>) {
        if self.young.len() >= GENERATION_MAX {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(text, value);
    }
}

/// How many new texts a day may bring. A text that was forgotten and comes back counts again.
#[derive(Debug)]
pub(super) struct DailyBound {
    texts_max: usize,
    folded_max: usize,
    /// The latest that was seen: what comes late counts for it too.
    day: Day,
    texts: usize,
    folded: HashSet<String, RandomState>,
}

impl DailyBound {
    pub(super) fn new(texts_max: usize, folded_max: usize) -> Self {
        Self { texts_max, folded_max, day: Day::MIN, texts: 0, folded: HashSet::default() }
    }

    /// Whether a new text may be kept; it counts.
    pub(super) fn takes_text(&mut self, day: Day) -> bool {
        if day > self.day {
            self.day = day;
            self.texts = 0;
            self.folded.clear();
        }
        self.texts = self.texts.saturating_add(1);
        self.texts <= self.texts_max
    }

    /// Whether this may stand for a text that was not taken.
    pub(super) fn takes_folded(&mut self, folded: &str) -> bool {
        self.folded.contains(folded) || (self.folded.len() < self.folded_max && self.folded.insert(folded.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_stays() {
        let mut cache = Cache::default();
        cache.put(b"asked".as_slice().into(), Arc::new(usize::MAX));
        cache.put(b"never asked".as_slice().into(), Arc::new(0));
        for number in 0..5 * GENERATION_MAX {
            cache.put(number.to_le_bytes().as_slice().into(), Arc::new(number));
            assert!(cache.young.len() + cache.old.len() <= 2 * GENERATION_MAX);
            if number % (GENERATION_MAX / 2) == 0 {
                assert_eq!(cache.get(b"asked").as_deref(), Some(&usize::MAX), "{number}");
            }
        }
        assert_eq!(cache.get(b"never asked"), None);
    }

    #[test]
    fn a_day_takes_so_many() {
        let mut bound = DailyBound::new(2, 1);
        let takes = [(20, true), (20, true), (20, false), (19, false), (21, true), (20, true), (21, false), (22, true)];
        for (index, (day, takes)) in takes.into_iter().enumerate() {
            assert_eq!(bound.takes_text(day), takes, "{index}");
        }
        assert!(bound.takes_folded("a") && !bound.takes_folded("b") && bound.takes_folded("a"));
        assert!(bound.takes_text(23) && bound.takes_folded("b"), "a new day");
    }
}
