//! Shards: the process-wide memory of links, least recently used first out.
//!
//! In: an entry that was believed (see `invalidate`), or a key. Out: the entry, copied.
//! Never: waits for anything but one of its own locks; grows past its budget; reads the clock. A lock is held for a copy
//! of some hundred bytes; when a segment is given up or looked through or the index grows, for a walk over some hundred
//! entries.
//! At its limit: the oldest segment is given up; of its entries those that were asked for since they were last looked
//! at move to the front, the others are evicted and counted.
//!
//! Each shard is a log of segments and an index into it. Entries are appended; a changed or removed one leaves its
//! bytes behind until its segment is given up. That is CLOCK (Corbató, 1968) on a log: the segment is the hand's next
//! stretch, the mark is the reference bit, and moving an entry to the front is its second chance. It needs no links
//! between entries, no allocation per entry and no free list: an entry costs its bytes, 21 more, and its share
//! of the index (5 bytes at a load of 7/8, 11 after the index has just doubled).
//!
//! How much an entry is asked for: of each of the last [`PERIODS`] periods one bit says whether it was asked for at all,
//! the present one on top; read as a number, the bits are its heat. [`Shards::for_each`] ends a period. That is aging
//! (the additional reference bits of page replacement): the hit that sets the mark sets the bit in the same byte, and
//! one that finds both writes nothing. Hits in one period are not counted: most never come here from `hot`.
//!
//! An entry, little-endian:
//!   flags and heat u8 | domain u16 | target length u16 | link id u64 | code: packed u64, or length u8 and bytes (LONG)
//!   | rules: length u16 and bytes (RULES) | target

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use hashbrown::HashTable;

use super::value;
use crate::domain::key::{Case, Code, DomainId, Key};
use crate::domain::link::{Entry, LinkId, Rules};
use crate::domain::target::Target;

const SEGMENT_BYTES: usize = 64 << 10;
/// Segments that a shard has at the least when its budget is used up.
const SEGMENTS_MIN: usize = 8;
/// More shards than this are of no use: a lock is held for some hundred nanoseconds.
const SHARDS_MAX: usize = 64;
/// What a given-up segment may keep, so that giving it up always frees something.
const KEPT_BYTES_MAX: usize = SEGMENT_BYTES / 4 * 3;
/// A longer entry is not kept, only answered: this much room is always there when a segment was given up.
const RECORD_BYTES_MAX: usize = SEGMENT_BYTES - KEPT_BYTES_MAX;

const MARKED: u8 = 1;
const LONG: u8 = 2;
const RULES: u8 = 4;
/// Asked for in the present period, the first of those that the bits from here down to [`FLAGS`] tell of.
const ASKED: u8 = 0x80;
const FLAGS: u8 = MARKED | LONG | RULES;
/// Periods of which it is known whether an entry was asked for.
pub const PERIODS: u32 = FLAGS.leading_zeros();
/// As many heats as the bits of that many periods tell apart.
pub const HEATS: usize = 1 << PERIODS;

/// What a shard knows of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    pub entry: Entry,
    /// It was asked for before since it came in or was last spared: worth a place in `hot`.
    pub marked: bool,
    /// The shard's epoch when it was copied; a later one means that it may have changed.
    pub epoch: u32,
}

/// An entry as [`Shards::for_each`] finds it.
#[derive(Clone, Copy, Debug)]
pub struct Kept<'a> {
    record: &'a [u8],
    /// Below [`HEATS`]: a bit for each period, the one that ends on top, set if the entry was asked for in it.
    pub heat: u8,
}

impl Kept<'_> {
    #[must_use]
    pub fn decode(&self) -> (Key, Entry) {
        (parts(self.record).key, decode(self.record).expect("it was encoded here"))
    }
}

/// Figures for `/metrics`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    pub bytes: u64,
    pub entries: u64,
    pub evictions: u64,
}

#[derive(Debug)]
pub struct Shards {
    shards: Box<[Shard]>,
}

#[derive(Debug)]
struct Shard {
    /// Grows with each change of one of the shard's links. Beside the lock, so that `hot` reads it without.
    epoch: Epoch,
    log: Mutex<Log>,
    evictions: AtomicU64,
}

/// On a cache line of its own: it is read with every hit and must not share one with a lock.
#[derive(Debug)]
#[repr(align(128))]
struct Epoch(AtomicU32);

/// Where an entry begins: the segment's number (wrapping) above sixteen bits of offset.
type Place = u32;

#[derive(Debug)]
struct Log {
    index: HashTable<Place>,
    /// Oldest first. Reserved in full when made, written from the start; what was not written yet is not resident.
    segments: std::collections::VecDeque<Vec<u8>>,
    /// The number of the oldest segment.
    oldest: u16,
    segments_max: usize,
}

impl Shards {
    /// At most `budget_bytes` in all, at least a megabyte or so.
    #[must_use]
    pub fn new(budget_bytes: u64, workers: usize) -> Self {
        let affordable = usize::try_from(budget_bytes).unwrap_or(usize::MAX) / (SEGMENTS_MIN * SEGMENT_BYTES);
        let wanted = (workers * 8).next_power_of_two().min(SHARDS_MAX);
        let count = wanted.min(1 << affordable.max(1).ilog2());
        // An eighth is for the index: at 85 bytes an entry it takes a tenth.
        let per_shard = usize::try_from(budget_bytes).unwrap_or(usize::MAX) / count / 8 * 7;
        let segments_max = (per_shard / SEGMENT_BYTES).clamp(SEGMENTS_MIN, usize::from(u16::MAX));
        let shard = || Shard {
            epoch: Epoch(AtomicU32::new(0)),
            log: Mutex::new(Log {
                index: HashTable::new(),
                segments: std::collections::VecDeque::new(),
                oldest: 0,
                segments_max,
            }),
            evictions: AtomicU64::new(0),
        };
        Self { shards: (0..count).map(|_| shard()).collect() }
    }

    /// The index takes its bits from the lower end of the hash, the shard is chosen by the upper end.
    fn shard(&self, hash: u64) -> &Shard {
        &self.shards[(hash >> 48) as usize & (self.shards.len() - 1)]
    }

    /// The epoch of the shard that has `hash`.
    #[must_use]
    pub fn epoch(&self, hash: u64) -> u32 {
        self.shard(hash).epoch.0.load(Ordering::Acquire)
    }

    /// Copies what is known of `key`, and marks it.
    #[must_use]
    pub fn get(&self, hash: u64, key: &Key) -> Option<Hit> {
        let shard = self.shard(hash);
        let mut log = shard.lock();
        let place = log.find(hash, key)?;
        let record = log.record_mut(place);
        let marked = record[0] & MARKED != 0;
        if record[0] & (MARKED | ASKED) != MARKED | ASKED {
            record[0] |= MARKED | ASKED;
        }
        let entry = decode(record).expect("it was encoded here");
        Some(Hit { entry, marked, epoch: shard.epoch.0.load(Ordering::Acquire) })
    }

    /// Keeps `entry`, if `believed` says so while no change of this shard can come between; true if it did.
    pub fn insert(
        &self,
        hash: u64,
        key: &Key,
        entry: &Entry,
        hash_of: impl Fn(&Key) -> u64,
        believed: impl FnOnce() -> bool,
    ) -> bool {
        let record = encode(key, entry);
        let shard = self.shard(hash);
        let mut log = shard.lock();
        if !believed() {
            return false;
        }
        log.forget(hash, key);
        if record.len() <= RECORD_BYTES_MAX {
            let evicted = log.append(hash, &record, &hash_of);
            shard.evictions.fetch_add(evicted, Ordering::Relaxed);
        }
        true
    }

    /// Forgets `key`; copies elsewhere are no longer believed either.
    pub fn remove(&self, hash: u64, key: &Key) {
        let shard = self.shard(hash);
        let mut log = shard.lock();
        log.forget(hash, key);
        shard.epoch.0.fetch_add(1, Ordering::Release);
    }

    /// Forgets everything.
    pub fn clear(&self) {
        for shard in &self.shards {
            let mut log = shard.lock();
            log.index.clear();
            log.segments.clear();
            shard.epoch.0.fetch_add(1, Ordering::Release);
        }
    }

    /// Shows every entry and ends the period, for one caller at a time. No lock is held while `f` runs, and none for
    /// longer than it takes to copy a segment; what moves or comes meanwhile may be missed.
    ///
    /// Epochs grow, so that what `hot` answers is fetched from here once in each period and keeps its heat and its mark.
    /// Not for times when the store cannot be asked: an answer that is in `hot` alone would be lost.
    pub fn for_each(&self, hash_of: impl Fn(&Key) -> u64, mut f: impl FnMut(Kept<'_>)) {
        let mut copied = Vec::with_capacity(SEGMENT_BYTES);
        for shard in &self.shards {
            let (oldest, count) = {
                let log = shard.lock();
                (log.oldest, log.segments.len() as u16)
            };
            for number in (0..count).map(|segment| oldest.wrapping_add(segment)) {
                copied.clear();
                shard.lock().end_period(number, &hash_of, &mut copied);
                let mut rest = copied.as_slice();
                while let Some(first) = rest.first() {
                    let heat = first >> FLAGS.count_ones();
                    let (record, after) = rest.split_at(parts(rest).length);
                    f(Kept { record, heat });
                    rest = after;
                }
            }
            shard.epoch.0.fetch_add(1, Ordering::Release);
        }
    }

    #[must_use]
    pub fn figures(&self) -> Figures {
        self.shards.iter().fold(Figures::default(), |sum, shard| {
            let log = shard.lock();
            let written: usize = log.segments.iter().map(Vec::len).sum();
            Figures {
                bytes: sum.bytes + (written + log.index.allocation_size()) as u64,
                entries: sum.entries + log.index.len() as u64,
                evictions: sum.evictions + shard.evictions.load(Ordering::Relaxed),
            }
        })
    }
}

impl Shard {
    fn lock(&self) -> std::sync::MutexGuard<'_, Log> {
        self.log.lock().expect("nobody panics with it")
    }
}

impl Log {
    fn segment(&self, place: Place) -> usize {
        usize::from(((place >> 16) as u16).wrapping_sub(self.oldest))
    }

    /// The bytes from the entry at `place` to the end of its segment.
    fn record(&self, place: Place) -> &[u8] {
        &self.segments[self.segment(place)][(place & 0xFFFF) as usize..]
    }

    fn record_mut(&mut self, place: Place) -> &mut [u8] {
        let segment = self.segment(place);
        &mut self.segments[segment][(place & 0xFFFF) as usize..]
    }

    fn find(&self, hash: u64, key: &Key) -> Option<Place> {
        self.index.find(hash, |place| is_of(self.record(*place), key)).copied()
    }

    fn forget(&mut self, hash: u64, key: &Key) {
        let Some(place) = self.find(hash, key) else { return };
        if let Ok(slot) = self.index.find_entry(hash, |known| *known == place) {
            slot.remove();
        }
    }

    /// Appends a record that is in no segment; returns how many entries were evicted for it.
    fn append(&mut self, hash: u64, record: &[u8], hash_of: &impl Fn(&Key) -> u64) -> u64 {
        let mut evicted = 0;
        while !self.has_room(record.len()) {
            if self.segments.len() < self.segments_max {
                self.segments.push_back(Vec::with_capacity(SEGMENT_BYTES));
            } else {
                evicted += self.give_up_oldest(hash_of);
            }
        }
        self.push(hash, record, hash_of);
        evicted
    }

    fn has_room(&self, bytes: usize) -> bool {
        self.segments.back().is_some_and(|segment| segment.len() + bytes <= SEGMENT_BYTES)
    }

    fn push(&mut self, hash: u64, record: &[u8], hash_of: &impl Fn(&Key) -> u64) {
        let number = self.oldest.wrapping_add((self.segments.len() - 1) as u16);
        let segment = self.segments.back_mut().expect("has_room found it");
        let place = u32::from(number) << 16 | segment.len() as u32;
        segment.extend_from_slice(record);
        // Taken apart, since the index asks for the hashes of its other entries when it grows.
        let mut index = std::mem::take(&mut self.index);
        index.insert_unique(hash, place, |place| hash_of(&parts(self.record(*place)).key));
        self.index = index;
    }

    /// Gives up the oldest segment; what was marked in it begins the newest one.
    fn give_up_oldest(&mut self, hash_of: &impl Fn(&Key) -> u64) -> u64 {
        let Some(old) = self.segments.pop_front() else { return 0 };
        let number = self.oldest;
        self.oldest = self.oldest.wrapping_add(1);
        self.segments.push_back(Vec::with_capacity(SEGMENT_BYTES));
        let (mut offset, mut kept, mut evicted) = (0, 0, 0);
        let mut spared = Vec::new();
        while offset < old.len() {
            let record = &old[offset..];
            let Parts { key, length, .. } = parts(record);
            let place = u32::from(number) << 16 | offset as u32;
            offset += length;
            let hash = hash_of(&key);
            let Ok(slot) = self.index.find_entry(hash, |known| *known == place) else {
                continue; // Forgotten or replaced since.
            };
            slot.remove();
            if record[0] & MARKED == 0 || kept + length > KEPT_BYTES_MAX {
                evicted += 1;
                continue;
            }
            kept += length;
            let mut record = record[..length].to_vec();
            record[0] &= !MARKED;
            spared.push((hash, record));
        }
        // Not before: an index that grows hashes all its entries, and none may still lie in the old segment.
        for (hash, record) in spared {
            self.push(hash, &record, hash_of);
        }
        evicted
    }

    /// Copies what the index has of a segment, and makes its present period a past one; nothing if it was given up.
    fn end_period(&mut self, number: u16, hash_of: &impl Fn(&Key) -> u64, copied: &mut Vec<u8>) {
        let at = self.segment(u32::from(number) << 16);
        let Some(segment) = self.segments.get_mut(at) else { return };
        let mut offset = 0;
        while offset < segment.len() {
            let record = &mut segment[offset..];
            let Parts { key, length, .. } = parts(record);
            let place = u32::from(number) << 16 | offset as u32;
            offset += length;
            if self.index.find(hash_of(&key), |known| *known == place).is_some() {
                copied.extend_from_slice(&record[..length]);
                record[0] = record[0] & FLAGS | record[0] >> 1 & !FLAGS;
            }
        }
    }
}

/// Whether the record is of this key, without decoding more of it than that takes.
fn is_of(record: &[u8], key: &Key) -> bool {
    let mut reader = Reader(record);
    let flags = reader.u8();
    if reader.u16() != key.domain.0 {
        return false;
    }
    reader.take(2 + 8);
    match key.code.packed() {
        Some(packed) => flags & LONG == 0 && reader.u64() == packed,
        None => {
            let mut buffer = [0; 10];
            flags & LONG != 0 && {
                let length = reader.u8();
                reader.take(length.into()) == key.code.bytes(&mut buffer)
            }
        }
    }
}

fn encode(key: &Key, entry: &Entry) -> Vec<u8> {
    let target = entry.target.as_str().as_bytes();
    let rules = (entry.rules != Rules::default()).then(|| {
        let mut rules = Vec::new();
        value::put_rules(&mut rules, &entry.rules);
        rules
    });
    let mut out = Vec::with_capacity(32 + target.len());
    // Whatever comes in, somebody has asked for it.
    out.push(ASKED | if key.code.packed().is_none() { LONG } else { 0 } | if rules.is_some() { RULES } else { 0 });
    out.extend(key.domain.0.to_le_bytes());
    out.extend(u16::try_from(target.len()).unwrap_or(u16::MAX).to_le_bytes());
    out.extend(entry.id.0.to_le_bytes());
    match key.code.packed() {
        Some(packed) => out.extend(packed.to_le_bytes()),
        None => {
            let mut buffer = [0; 10];
            let bytes = key.code.bytes(&mut buffer);
            out.push(bytes.len() as u8);
            out.extend(bytes);
        }
    }
    if let Some(rules) = rules {
        out.extend((rules.len() as u16).to_le_bytes());
        out.extend(rules);
    }
    out.extend(target);
    out
}

/// The parts of the entry at the start of `record`, without a copy of the longer ones.
struct Parts<'a> {
    key: Key,
    id: LinkId,
    rules: Option<&'a [u8]>,
    target: &'a [u8],
    /// Bytes of all of it.
    length: usize,
}

fn parts(record: &[u8]) -> Parts<'_> {
    let mut reader = Reader(record);
    let flags = reader.u8();
    let domain = DomainId(reader.u16());
    let target_length = reader.u16();
    let id = LinkId(reader.u64());
    let code = if flags & LONG == 0 {
        Code::from_packed(reader.u64())
    } else {
        let length = reader.u8();
        Code::parse(reader.take(length.into()), Case::Sensitive).expect("it was a code when it was encoded")
    };
    let rules = (flags & RULES != 0).then(|| {
        let length = reader.u16();
        reader.take(length.into())
    });
    let target = reader.take(target_length.into());
    Parts { key: Key { domain, code }, id, rules, target, length: record.len() - reader.0.len() }
}

fn decode(record: &[u8]) -> Option<Entry> {
    let parts = parts(record);
    let rules = match parts.rules {
        None => Rules::default(),
        Some(bytes) => value::take_rules(&mut value::Reader(bytes))?,
    };
    Some(Entry { id: parts.id, target: Target::new(std::str::from_utf8(parts.target).ok()?)?, rules })
}

/// Takes fields off the front of a record that this file has written: a short one is a bug and panics.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(count);
        self.0 = rest;
        head
    }

    fn u8(&mut self) -> u8 {
        self.take(1)[0]
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take(8).try_into().expect("eight were taken"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::domain::time::UnixMillis;

    /// A hash of the test's own: few bits, so that keys meet in the index.
    fn hash_of(key: &Key) -> u64 {
        let mut buffer = [0; 10];
        key.code
            .bytes(&mut buffer)
            .iter()
            .fold(u64::from(key.domain.0), |sum, byte| sum.wrapping_mul(31) + u64::from(*byte))
            % 509
            * 0x0001_0001_0001_0001
    }

    fn key(number: u16) -> Key {
        let text = if number.is_multiple_of(5) { format!("a.long.code.{number}") } else { format!("c{number}") };
        Key { domain: DomainId(number % 3), code: Code::parse(text.as_bytes(), Case::Sensitive).unwrap() }
    }

    fn entry(version: u32, length: usize) -> Entry {
        let target = Target::new(&format!("https://example.com/{version}/{}", "x".repeat(length))).unwrap();
        let rules = match version % 3 {
            0 => Rules::default(),
            1 => Rules {
                status: Some(301),
                cache_control: Some("public, max-age=5".into()),
                forward_query: Some(false),
                expires_at: Some(UnixMillis(i64::from(version))),
                expired_url: Target::new("https://example.com/over"),
                ..Rules::default()
            },
            _ => Rules { gone: true, starts_at: Some(UnixMillis(-1)), forward_query: Some(true), ..Rules::default() },
        };
        Entry { id: LinkId(u64::from(version) << 20), target, rules }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert { key: u16, length: usize, believed: bool },
        Get(u16),
        Remove(u16),
        ForEach,
        Clear,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let key = 0..400u16;
        let length = prop_oneof![8 => 0..200usize, 1 => 0..20_000usize];
        let step = prop_oneof![
            200 => (key.clone(), length, prop::bool::weighted(0.9)).prop_map(|(key, length, believed)| Step::Insert { key, length, believed }),
            200 => key.clone().prop_map(Step::Get),
            20 => key.prop_map(Step::Remove),
            1 => Just(Step::ForEach),
            1 => Just(Step::Clear),
        ];
        prop::collection::vec(step, 1..3000)
    }

    fn entries(shards: &Shards) -> usize {
        shards.figures().entries as usize
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

        /// Against a map that forgets nothing: what is there is the last that was believed, whatever was evicted.
        #[test]
        fn it_remembers_the_last_or_nothing(steps in steps(), budget in 0..4u64 << 20) {
            let shards = Shards::new(budget, 1);
            let limit = (shards.shards.len() * SEGMENTS_MIN * SEGMENT_BYTES) as u64;
            let mut model: HashMap<u16, Entry> = HashMap::new();
            let mut version = 0;
            for step in steps {
                match step {
                    Step::Insert { key: number, length, believed } => {
                        version += 1;
                        let (key, entry) = (key(number), entry(version, length));
                        let hash = hash_of(&key);
                        prop_assert_eq!(shards.insert(hash, &key, &entry, hash_of, || believed), believed);
                        if believed {
                            let fits = encode(&key, &entry).len() <= RECORD_BYTES_MAX;
                            let got = shards.get(hash, &key).map(|hit| hit.entry);
                            prop_assert_eq!(got.as_ref(), fits.then_some(&entry), "what was just kept is there");
                            if fits { model.insert(number, entry) } else { model.remove(&number) };
                        }
                    }
                    Step::Get(number) => {
                        let key = key(number);
                        let epoch = shards.epoch(hash_of(&key));
                        if let Some(hit) = shards.get(hash_of(&key), &key) {
                            prop_assert_eq!(Some(&hit.entry), model.get(&number));
                            prop_assert_eq!(hit.epoch, epoch);
                        }
                    }
                    Step::Remove(number) => {
                        let key = key(number);
                        let epoch = shards.epoch(hash_of(&key));
                        shards.remove(hash_of(&key), &key);
                        prop_assert!(shards.get(hash_of(&key), &key).is_none());
                        prop_assert_ne!(shards.epoch(hash_of(&key)), epoch);
                        model.remove(&number);
                    }
                    Step::ForEach => {
                        let mut seen = HashMap::new();
                        shards.for_each(hash_of, |kept| {
                            let (key, entry) = kept.decode();
                            assert_eq!(seen.insert(key, entry), None, "it is shown once");
                        });
                        prop_assert_eq!(seen.len(), entries(&shards));
                        for (number, entry) in &model {
                            prop_assert!(seen.remove(&key(*number)).is_none_or(|seen| seen == *entry));
                        }
                        prop_assert!(seen.is_empty(), "removed, and shown: {:?}", seen);
                    }
                    Step::Clear => {
                        shards.clear();
                        prop_assert_eq!(entries(&shards), 0);
                        model.clear();
                    }
                }
            }
            let figures = shards.figures();
            prop_assert!(figures.entries as usize <= model.len());
            prop_assert!(figures.bytes <= budget.max(limit) + (64 << 10), "{:?}", figures);
        }
    }

    #[test]
    fn what_is_asked_for_stays_when_others_come() {
        let shards = Shards::new(0, 1);
        let asked = key(1);
        let keep = |number: u16| {
            let key = key(number);
            assert!(shards.insert(hash_of(&key), &key, &entry(3, 1000), hash_of, || true));
        };
        keep(1);
        for number in 2..3000 {
            keep(number);
            assert!(shards.get(hash_of(&asked), &asked).is_some(), "after {number}");
        }
        let figures = shards.figures();
        assert!(figures.evictions > 2000, "{figures:?}");
        assert_eq!(figures.evictions + figures.entries, 2999);
    }

    #[test]
    fn all_of_a_segment_asked_for_still_makes_room() {
        let shards = Shards::new(0, 1);
        for number in 0..2000 {
            let new = key(number);
            assert!(shards.insert(hash_of(&new), &new, &entry(3, 1000), hash_of, || true));
            for asked in number.saturating_sub(700)..number {
                let key = key(asked);
                let _ = shards.get(hash_of(&key), &key);
            }
        }
        assert!(shards.figures().bytes <= (SEGMENTS_MIN * SEGMENT_BYTES + (64 << 10)) as u64);
    }

    #[test]
    fn heat_is_when_it_was_asked_for() {
        let check = |asked: &[bool], want: u8| {
            let shards = Shards::new(0, 1);
            let key = key(1);
            let hash = hash_of(&key);
            assert!(shards.insert(hash, &key, &entry(1, 10), hash_of, || true));
            let mut heat = None;
            for (period, asked) in asked.iter().enumerate() {
                // Twice, so that a period in which it was asked for often counts as much as any other.
                for _ in 0..2 {
                    assert!(!asked || shards.get(hash, &key).is_some_and(|hit| hit.entry == entry(1, 10)));
                }
                let epoch = shards.epoch(hash);
                shards.for_each(hash_of, |kept| heat = Some(kept.heat));
                assert_ne!(shards.epoch(hash), epoch, "what is hot comes by in each period: {period}");
            }
            assert_eq!(heat, Some(want), "{asked:?}");
        };
        // It comes in because it is asked for.
        check(&[false], 0b10000);
        check(&[true], 0b10000);
        check(&[false, false], 0b01000);
        check(&[false, true], 0b11000);
        check(&[true, false, true], 0b10100);
        check(&[false, false, false, false, false], 0b00001);
        check(&[false, false, false, false, false, false], 0);
        check(&[true; 9], 0b11111);
        check(&[true, true, true, true, true, true, false], 0b01111);
    }

    #[test]
    fn what_is_spared_keeps_its_heat() {
        let shards = Shards::new(0, 1);
        let asked = key(1);
        assert!(shards.insert(hash_of(&asked), &asked, &entry(1, 10), hash_of, || true));
        shards.for_each(hash_of, |_| {});
        for number in 2..1500 {
            assert!(shards.get(hash_of(&asked), &asked).is_some(), "before {number}");
            assert!(shards.insert(hash_of(&key(number)), &key(number), &entry(3, 1000), hash_of, || true));
        }
        assert!(shards.figures().evictions > 0);
        let mut heat = None;
        shards.for_each(hash_of, |kept| {
            if kept.decode().0 == asked {
                heat = Some(kept.heat);
            }
        });
        assert_eq!(heat, Some(0b11000));
    }

    #[test]
    fn looking_through_comes_to_an_end_while_segments_are_given_up() {
        let shards = Shards::new(0, 1);
        let keep = |number: u16| {
            let key = key(number);
            assert!(shards.insert(hash_of(&key), &key, &entry(3, 1000), hash_of, || true));
        };
        (0..400).for_each(keep);
        let (mut next, mut shown) = (400, 0);
        shards.for_each(hash_of, |kept| {
            assert_eq!(kept.decode().1, entry(3, 1000));
            shown += 1;
            (next..next + 10).for_each(keep);
            next += 10;
        });
        assert!(shown < 400, "what was given up meanwhile is not shown: {shown}");
        assert!(shards.figures().evictions > 400);
    }

    /// An index that rehashes while a segment is given up must find every entry in a segment that is there.
    #[test]
    fn an_index_at_its_load_limit_moves_with_its_segments() {
        for seed in 0..24 {
            let state = ahash::RandomState::with_seeds(seed, 1, 2, 3);
            let hash_of = |key: &Key| state.hash_one(key);
            let shards = Shards::new(0, 1);
            let entry = entry(3, seed as usize * 3);
            for number in 0..20_000u32 {
                let code = Code::parse(format!("k{number}").as_bytes(), Case::Sensitive).unwrap();
                let key = Key { domain: DomainId(0), code };
                assert!(shards.insert(hash_of(&key), &key, &entry, hash_of, || true));
                if !number.is_multiple_of(7) {
                    assert!(shards.get(hash_of(&key), &key).is_some());
                }
            }
            assert!(shards.figures().evictions > 0);
        }
    }
}
