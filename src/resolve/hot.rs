//! Hot: this core's small table of ready-made answers.
//!
//! In: a key and the epoch of its shard. Out: an answer that needs nothing but to be written.
//! Never: takes a lock, allocates on a hit, writes to a line that another core reads; is seen by another thread.
//! At its limit: each set has [`WAYS`] places; CLOCK within the set chooses whose answer goes.
//!
//! An answer is as new as its shard's epoch: when a link of that shard changes, the epoch grows, and the next hit goes to
//! the shard again. Only codes that pack into eight bytes have a place here; the few others live in the shards.

use http::{HeaderValue, StatusCode};

use crate::domain::key::{DomainId, Key};
use crate::domain::link::LinkId;
use crate::domain::time::UnixMillis;

/// Places of a set: its keys fill half a cache line.
const WAYS: usize = 4;
/// 8,192 answers: about 2 MiB a core with their targets.
const SETS: usize = 2048;

/// A redirect, ready to be written.
#[derive(Clone, Debug)]
pub struct Ready {
    pub link: LinkId,
    pub status: StatusCode,
    pub location: HeaderValue,
    pub cache_control: HeaderValue,
    pub forward_query: bool,
    pub starts_at: UnixMillis,
    /// Out of `Validity::Valid` at this moment.
    pub ends_at: UnixMillis,
}

impl Ready {
    #[must_use]
    pub fn is_valid(&self, now: UnixMillis) -> bool {
        self.starts_at <= now && now < self.ends_at
    }
}

#[derive(Debug)]
pub struct Hot {
    sets: Box<[Set]>,
    answers: Box<[Option<Ready>]>,
}

/// 60 bytes; a key of 0 is none, since a packed code has at least one character.
#[derive(Clone, Debug, Default)]
#[repr(align(64))]
struct Set {
    codes: [u64; WAYS],
    epochs: [u32; WAYS],
    domains: [DomainId; WAYS],
    marks: [bool; WAYS],
    hand: u8,
}

impl Default for Hot {
    fn default() -> Self {
        Self { sets: vec![Set::default(); SETS].into(), answers: vec![None; SETS * WAYS].into() }
    }
}

impl Hot {
    /// The answer for `key`, if it is as new as `epoch` and valid at `now`.
    #[inline]
    pub fn get(&mut self, hash: u64, key: &Key, epoch: u32, now: UnixMillis) -> Option<&Ready> {
        let code = key.code.packed()?;
        let at = hash as usize % SETS;
        let set = &mut self.sets[at];
        let way = (0..WAYS).find(|way| set.codes[*way] == code && set.domains[*way] == key.domain)?;
        if set.epochs[way] != epoch {
            return None;
        }
        if !set.marks[way] {
            set.marks[way] = true;
        }
        self.answers[at * WAYS + way].as_ref().filter(|ready| ready.is_valid(now))
    }

    /// Keeps `ready`, which was made of what the shard had at `epoch`.
    pub fn insert(&mut self, hash: u64, key: &Key, epoch: u32, ready: Ready) {
        let Some(code) = key.code.packed() else { return };
        let at = hash as usize % SETS;
        let set = &mut self.sets[at];
        let known = (0..WAYS).find(|way| set.codes[*way] == code && set.domains[*way] == key.domain);
        let way = known.unwrap_or_else(|| set.victim());
        set.codes[way] = code;
        set.domains[way] = key.domain;
        set.epochs[way] = epoch;
        set.marks[way] = false;
        self.answers[at * WAYS + way] = Some(ready);
    }
}

impl Set {
    /// The next place whose answer was not asked for since the hand last came by.
    fn victim(&mut self) -> usize {
        loop {
            let way = usize::from(self.hand) % WAYS;
            self.hand = self.hand.wrapping_add(1);
            if !std::mem::take(&mut self.marks[way]) {
                return way;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::key::{Case, Code};

    fn ready(link: u64) -> Ready {
        Ready {
            link: LinkId(link),
            status: StatusCode::TEMPORARY_REDIRECT,
            location: HeaderValue::from_static("https://example.com/"),
            cache_control: HeaderValue::from_static("no-store"),
            forward_query: false,
            starts_at: UnixMillis(10),
            ends_at: UnixMillis(20),
        }
    }

    fn key(domain: u16, code: &str) -> Key {
        Key { domain: DomainId(domain), code: Code::parse(code.as_bytes(), Case::Sensitive).unwrap() }
    }

    #[test]
    fn an_answer_is_found_while_it_is_as_new_as_its_shard_and_valid() {
        let mut hot = Hot::default();
        hot.insert(5, &key(1, "a"), 7, ready(1));
        let mut check = |what: Key, epoch: u32, now: i64, want: Option<u64>| {
            let got = hot.get(5, &what, epoch, UnixMillis(now)).map(|ready| ready.link.0);
            assert_eq!(got, want, "{what:?} {epoch} {now}");
        };
        check(key(1, "a"), 7, 10, Some(1));
        check(key(1, "a"), 7, 19, Some(1));
        check(key(1, "a"), 7, 20, None);
        check(key(1, "a"), 7, 9, None);
        check(key(1, "a"), 8, 10, None);
        check(key(2, "a"), 7, 10, None);
        check(key(1, "b"), 7, 10, None);
    }

    #[test]
    fn a_full_set_gives_up_what_nobody_asked_for() {
        let mut hot = Hot::default();
        let keys: Vec<Key> = ["a", "b", "c", "d"].map(|code| key(0, code)).into();
        for (index, key) in keys.iter().enumerate() {
            hot.insert(0, key, 0, ready(index as u64));
        }
        for asked in [0, 1, 3] {
            assert!(hot.get(0, &keys[asked], 0, UnixMillis(10)).is_some());
        }
        hot.insert(0, &key(0, "e"), 0, ready(9));
        assert!(hot.get(0, &keys[2], 0, UnixMillis(10)).is_none());
        for asked in [0, 1, 3] {
            assert!(hot.get(0, &keys[asked], 0, UnixMillis(10)).is_some(), "{asked}");
        }
        assert_eq!(hot.get(0, &key(0, "e"), 0, UnixMillis(10)).map(|ready| ready.link.0), Some(9));
    }
}
