//! A sketch: what is kept of many visits in a bounded number of bytes: when (15-minute buckets), from where, with what,
//! and by how many different visitors.
//!
//! In: visits; other sketches' bytes. Out: bytes, at most [`SKETCH_BYTES_MAX`]; answers. Pure, and deterministic.
//! Never: panics, whatever the bytes; counts a visitor twice.
//! At its limit: of too many values of a dimension the frequent ones stay (see [`Sketch::top`]), visitors beyond
//! [`EXACT_VISITORS_MAX`] are estimated (see [`Sketch::unique`]), a count stops at [`COUNT_MAX`].
//!
//! Several encoded sketches one behind the other are read as their sum: a store may append before it merges.
//!
//! # Bytes
//!
//! A sketch of nothing has none. Numbers are LEB128 varints if not said otherwise.
//!
//! | what | bytes |
//! |---|---|
//! | version | 1 byte, [`VERSION`] |
//! | buckets | how many; for each, ascending: the quarter of an hour (1 byte, 0 to 95, UTC), its visits |
//! | referrer hosts, countries, browsers, systems, devices: each | twice the number of values, plus 1 if some were left out; then `floor` and `other`; for each value, ascending: the value, its count, and how much of that may be too much (`over`) |
//! | visitors | how many, then the upper 32 bits of each hash, ascending, 4 bytes little-endian; or [`EXACT_VISITORS_MAX`] + 1, then 2048 registers of 5 bits |
//!
//! `floor`, `other` and `over` are there only if some values were left out. A value is twice its place in the list of the
//! known ones plus 1, or twice the length of its UTF-8 and that. A list is part of the version: changing one makes the next
//! version, which comes with a migration, so that an older program refuses the store instead of misreading it.

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::Arc;

/// The most bytes that one sketch encodes to; of a link with all its values known it is 2 KiB and less.
pub const SKETCH_BYTES_MAX: usize = 7 << 10;
pub const VERSION: u8 = 1;
/// Buckets of a day.
pub const QUARTERS: usize = 96;
/// Visitors that are counted exactly: as many as need no more bytes than the registers. (32 bits of a hash are kept: two of
/// 320 visitors are taken for one with a probability of 1 in 80,000.)
pub const EXACT_VISITORS_MAX: usize = PACKED_BYTES / 4;
/// No count grows beyond: 6 bytes.
pub const COUNT_MAX: u64 = (1 << 42) - 1;

/// Registers of the HyperLogLog are 2^11, for 1.04 / sqrt(2^11) = 2.3 % of standard error; 2^12 would make the hot links'
/// sketches, which every batch rewrites, larger than a page of either store has room for.
const INDEX_BITS: u32 = 11;
const REGISTERS: usize = 1 << INDEX_BITS;
/// What is left of a hash behind the index: ranks go from 1 to one more than these.
const RANK_BITS: u32 = 32 - INDEX_BITS;
const PACKED_BYTES: usize = REGISTERS * 5 / 8;

/// What values are counted of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dimension {
    /// Hosts of referrers.
    Referrer,
    /// ISO 3166-1 codes of two letters.
    Country,
    Browser,
    System,
    Device,
}

impl Dimension {
    pub const ALL: [Self; 5] = [Self::Referrer, Self::Country, Self::Browser, Self::System, Self::Device];

    /// Values that are kept.
    #[must_use]
    pub const fn values_max(self) -> usize {
        match self {
            Self::Referrer | Self::Country => 32,
            Self::Browser | Self::System => 16,
            Self::Device => 8,
        }
    }

    /// Bytes of a value; what is longer is cut.
    const fn bytes_max(self) -> usize {
        match self {
            Self::Referrer => 64,
            Self::Country => 8,
            Self::Browser | Self::System => 32,
            Self::Device => 16,
        }
    }

    /// Values that are one byte. Part of [`VERSION`]: see above.
    const fn known(self) -> &'static [&'static str] {
        match self {
            Self::Referrer => &[
                "google.com",
                "facebook.com",
                "l.facebook.com",
                "instagram.com",
                "l.instagram.com",
                "t.co",
                "linkedin.com",
                "lnkd.in",
                "youtube.com",
                "reddit.com",
                "bing.com",
                "duckduckgo.com",
                "mail.google.com",
                "news.ycombinator.com",
                "github.com",
                "tiktok.com",
                "pinterest.com",
                "com.google.android.gm",
            ],
            Self::Country => &[],
            Self::Browser => &[
                "Chrome",
                "Chrome Mobile",
                "Mobile Safari",
                "Safari",
                "Edge",
                "Firefox",
                "Samsung Internet",
                "Firefox Mobile",
                "Chrome Mobile WebView",
                "Chrome Mobile iOS",
                "Mobile Safari UI/WKWebView",
                "Opera",
                "Opera Mobile",
                "Edge Mobile",
                "Facebook",
                "Instagram",
                "curl",
                "Firefox iOS",
                "Google",
                "Yandex Browser",
            ],
            Self::System => &["Windows", "Android", "iOS", "Mac OS X", "Linux", "Ubuntu", "Chrome OS", "Fedora"],
            Self::Device => &["desktop", "mobile", "tablet", "other"],
        }
    }
}

/// A value of a dimension, as a sketch keeps it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Value(Kept);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Kept {
    /// Its place among the dimension's known ones.
    Known(u8),
    Text(Arc<str>),
}

impl Value {
    /// None of an empty text: what is not known is not counted.
    #[must_use]
    pub fn new(dimension: Dimension, text: &str) -> Option<Self> {
        let text = &text[..text.floor_char_boundary(dimension.bytes_max())];
        let place = dimension.known().iter().position(|known| *known == text);
        match place.and_then(|place| u8::try_from(place).ok()) {
            Some(place) => Some(Self(Kept::Known(place))),
            None if text.is_empty() => None,
            None => Some(Self(Kept::Text(text.into()))),
        }
    }

    fn text(&self, dimension: Dimension) -> &str {
        match &self.0 {
            Kept::Known(place) => dimension.known()[usize::from(*place)],
            Kept::Text(text) => text,
        }
    }
}

/// Why bytes are no sketches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Bad {
    #[error("a sketch of version {0}, which this program does not know")]
    Version(u8),
    #[error("a sketch that ends too early")]
    Cut,
    #[error("a sketch with contents that no sketch has")]
    Contents,
}

/// Only clicks and tools are in it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sketch {
    /// Quarters with visits, ascending.
    buckets: Vec<(u8, u64)>,
    /// By dimension and value; of each dimension at most its `values_max`.
    entries: Vec<Entry>,
    left_out: [LeftOut; Dimension::ALL.len()],
    visitors: Visitors,
}

/// `count - over` visits had the value for certain, and at most `count`.
#[derive(Clone, Debug, PartialEq)]
struct Entry {
    dimension: Dimension,
    value: Value,
    count: u64,
    over: u64,
}

/// Of the values of a dimension that are no entries.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct LeftOut {
    /// No single one of them had more visits.
    floor: u64,
    /// Visits that are in no entry for certain.
    other: u64,
}

#[derive(Clone, Debug, PartialEq)]
enum Visitors {
    /// Upper halves of hashes, ascending; at most [`EXACT_VISITORS_MAX`].
    Exact(Vec<u32>),
    /// The largest rank of each register.
    Estimated(Box<[u8; REGISTERS]>),
}

impl Default for Visitors {
    fn default() -> Self {
        Self::Exact(Vec::new())
    }
}

impl Sketch {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.buckets.is_empty() && self.has_only_buckets()
    }

    fn has_only_buckets(&self) -> bool {
        self.entries.is_empty()
            && self.left_out == [LeftOut::default(); _]
            && matches!(&self.visitors, Visitors::Exact(hashes) if hashes.is_empty())
    }

    /// Counts visits in a quarter of an hour of the day, 0 to 95.
    pub fn count_quarter(&mut self, quarter: u8, visits: u64) {
        // Visits come nearly in order.
        let at = match self.buckets.last() {
            Some(last) if last.0 == quarter => Ok(self.buckets.len() - 1),
            Some(last) if last.0 < quarter => Err(self.buckets.len()),
            _ => self.buckets.binary_search_by_key(&quarter, |bucket| bucket.0),
        };
        match at {
            Ok(at) => self.buckets[at].1 = sum(self.buckets[at].1, visits),
            Err(at) => self.buckets.insert(at, (quarter, visits.min(COUNT_MAX))),
        }
    }

    /// Counts visits with values: Space-Saving (Metwally, Agrawal, El Abbadi: Efficient Computation of Frequent and Top-k
    /// Elements in Data Streams, 2005) that leaves values out only once all are counted. Each comes once.
    pub fn count_values<'a>(&mut self, values: impl IntoIterator<Item = (Dimension, &'a Value, u64)>) {
        let before = self.entries.len();
        for (dimension, value, visits) in values {
            match self.entries[..before].binary_search_by(|entry| entry.key().cmp(&(dimension, value))) {
                Ok(at) => self.entries[at].add(visits, 0),
                Err(_) => {
                    let floor = self.left_out[dimension as usize].floor;
                    let entry = Entry { dimension, value: value.clone(), count: sum(floor, visits), over: floor };
                    self.entries.push(entry);
                }
            }
        }
        self.settle();
    }

    /// Sees a visitor by their hash, all of whose bits are even; 0 is nobody.
    pub fn see_visitor(&mut self, hash: u64) {
        if hash != 0 {
            self.visitors.see((hash >> 32) as u32);
        }
    }

    /// Adds encoded sketches, one behind the other. After an error it has those that stood before the bad one.
    pub fn merge(&mut self, mut bytes: &[u8]) -> Result<(), Bad> {
        while !bytes.is_empty() {
            self.merge_sketch(decode(&mut bytes)?);
        }
        Ok(())
    }

    /// Adds another one. For buckets and visitors the order of merges makes no difference, nor for values as long as none is
    /// left out. How entries merge: Cafaro, Pulimeno, Tempesta: A parallel space saving algorithm for frequent items and the
    /// Hurwitz zeta distribution, 2016.
    pub fn merge_sketch(&mut self, other: Self) {
        if self.is_empty() {
            *self = other;
            return;
        }
        for (quarter, visits) in other.buckets {
            self.count_quarter(quarter, visits);
        }
        self.merge_entries(other.entries, other.left_out);
        match other.visitors {
            Visitors::Exact(hashes) => hashes.into_iter().for_each(|hash| self.visitors.see(hash)),
            Visitors::Estimated(ranks) => self.visitors.merge_ranks(&ranks),
        }
    }

    fn merge_entries(&mut self, theirs: Vec<Entry>, left_out: [LeftOut; Dimension::ALL.len()]) {
        // What one of the two does not have, it may have left out as often as its floor says.
        for entry in &mut self.entries {
            let floor = left_out[entry.dimension as usize].floor;
            if floor > 0 && theirs.binary_search_by(|their| their.key().cmp(&entry.key())).is_err() {
                entry.add(floor, floor);
            }
        }
        let ours = self.entries.len();
        for mut entry in theirs {
            match self.entries[..ours].binary_search_by(|our| our.key().cmp(&entry.key())) {
                Ok(at) => self.entries[at].add(entry.count, entry.over),
                Err(_) => {
                    let floor = self.left_out[entry.dimension as usize].floor;
                    entry.add(floor, floor);
                    self.entries.push(entry);
                }
            }
        }
        for (ours, theirs) in self.left_out.iter_mut().zip(left_out) {
            ours.floor = sum(ours.floor, theirs.floor);
            ours.other = sum(ours.other, theirs.other);
        }
        self.settle();
    }

    /// Puts entries in order, and takes the least frequent ones of a dimension away if there are more than may be.
    fn settle(&mut self) {
        self.entries.sort_unstable_by(|a, b| a.key().cmp(&b.key()));
        // Most sketches are of a few visits: no dimension has more values than all of them.
        if self.entries.len() <= Dimension::Device.values_max() {
            return;
        }
        for dimension in Dimension::ALL {
            self.leave_out(dimension);
        }
    }

    fn leave_out(&mut self, dimension: Dimension) {
        let range = self.range(dimension);
        if range.len() <= dimension.values_max() {
            return;
        }
        let mut entries: Vec<Entry> = self.entries.drain(range.clone()).collect();
        // Of equals the first ones stay, so that the order of their coming does not matter.
        entries.sort_by_key(|entry| Reverse(entry.count));
        let left_out = &mut self.left_out[dimension as usize];
        for entry in entries.drain(dimension.values_max()..) {
            left_out.floor = left_out.floor.max(entry.count);
            left_out.other = sum(left_out.other, entry.count - entry.over);
        }
        entries.sort_by(|a, b| a.key().cmp(&b.key()));
        self.entries.splice(range.start..range.start, entries);
    }

    /// Where the entries of a dimension are.
    fn range(&self, dimension: Dimension) -> Range<usize> {
        let from = self.entries.partition_point(|entry| entry.dimension < dimension);
        from..self.entries.partition_point(|entry| entry.dimension <= dimension)
    }

    /// Different visitors: exact up to [`EXACT_VISITORS_MAX`], then by HyperLogLog (Flajolet, Fusy, Gandouet, Meunier, 2007) of
    /// 2048 registers with the improved raw estimator of Ertl (New cardinality estimation algorithms for HyperLogLog
    /// sketches, 2017, algorithm 6), which needs no corrections at either end. Standard error 2.3 %.
    #[must_use]
    pub fn unique(&self) -> u64 {
        match &self.visitors {
            Visitors::Exact(hashes) => hashes.len() as u64,
            Visitors::Estimated(ranks) => estimate(ranks),
        }
    }

    /// Visits of each quarter of an hour of the day, UTC.
    #[must_use]
    pub fn buckets(&self) -> [u64; QUARTERS] {
        let mut all = [0; QUARTERS];
        for (quarter, visits) in &self.buckets {
            all[usize::from(*quarter)] = *visits;
        }
        all
    }

    /// The most frequent values with their visits, the most frequent first. With k values kept (32 hosts and countries, 16
    /// browsers and systems, 8 devices) of n visits, every value with more than n / k of them is among them, and none is
    /// said to have more than it has, nor fewer by more than n / k. Without [`Sketch::other`] they are exact.
    #[must_use]
    pub fn top(&self, dimension: Dimension) -> Vec<(String, u64)> {
        let entries = &self.entries[self.range(dimension)];
        let mut top: Vec<_> =
            entries.iter().map(|entry| (entry.value.text(dimension).to_owned(), entry.count - entry.over)).collect();
        top.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        top
    }

    /// Visits whose value is known and not counted in [`Sketch::top`].
    #[must_use]
    pub fn other(&self, dimension: Dimension) -> u64 {
        self.left_out[dimension as usize].other
    }

    /// Appends its bytes; none if it is empty.
    pub fn encode(&self, out: &mut Vec<u8>) {
        self.encode_with(&self.buckets, out);
    }

    /// The same without its buckets: of totals, which are of no day.
    pub fn encode_without_quarters(&self, out: &mut Vec<u8>) {
        self.encode_with(&[], out);
    }

    fn encode_with(&self, buckets: &[(u8, u64)], out: &mut Vec<u8>) {
        if buckets.is_empty() && self.has_only_buckets() {
            return;
        }
        out.push(VERSION);
        put(out, buckets.len() as u64);
        for (quarter, visits) in buckets {
            out.push(*quarter);
            put(out, *visits);
        }
        for dimension in Dimension::ALL {
            let entries = &self.entries[self.range(dimension)];
            let left_out = self.left_out[dimension as usize];
            let some_left_out = left_out != LeftOut::default();
            put(out, (entries.len() as u64) << 1 | u64::from(some_left_out));
            if some_left_out {
                put(out, left_out.floor);
                put(out, left_out.other);
            }
            for entry in entries {
                match &entry.value.0 {
                    Kept::Known(place) => put(out, u64::from(*place) << 1 | 1),
                    Kept::Text(text) => {
                        put(out, (text.len() as u64) << 1);
                        out.extend_from_slice(text.as_bytes());
                    }
                }
                put(out, entry.count);
                if some_left_out {
                    put(out, entry.over);
                }
            }
        }
        match &self.visitors {
            Visitors::Exact(hashes) => {
                put(out, hashes.len() as u64);
                hashes.iter().for_each(|hash| out.extend_from_slice(&hash.to_le_bytes()));
            }
            Visitors::Estimated(ranks) => {
                put(out, EXACT_VISITORS_MAX as u64 + 1);
                for eight in ranks.chunks_exact(8) {
                    let packed = eight.iter().rev().fold(0_u64, |packed, rank| packed << 5 | u64::from(*rank));
                    out.extend_from_slice(&packed.to_le_bytes()[..5]);
                }
            }
        }
    }
}

impl Entry {
    fn key(&self) -> (Dimension, &Value) {
        (self.dimension, &self.value)
    }

    fn add(&mut self, count: u64, over: u64) {
        self.count = sum(self.count, count);
        self.over = sum(self.over, over);
    }
}

impl Visitors {
    fn see(&mut self, hash: u32) {
        match self {
            Self::Exact(hashes) => {
                let Err(at) = hashes.binary_search(&hash) else { return };
                if hashes.len() < EXACT_VISITORS_MAX {
                    hashes.insert(at, hash);
                } else {
                    let mut ranks = Box::new([0; REGISTERS]);
                    hashes.iter().chain([&hash]).for_each(|hash| note(&mut ranks, *hash));
                    *self = Self::Estimated(ranks);
                }
            }
            Self::Estimated(ranks) => note(ranks, hash),
        }
    }

    fn merge_ranks(&mut self, theirs: &[u8; REGISTERS]) {
        let ours = match self {
            Self::Estimated(ranks) => ranks,
            Self::Exact(hashes) => {
                let mut ranks = Box::new([0; REGISTERS]);
                hashes.iter().for_each(|hash| note(&mut ranks, *hash));
                *self = Self::Estimated(ranks);
                return self.merge_ranks(theirs);
            }
        };
        for (our, their) in ours.iter_mut().zip(theirs) {
            *our = (*our).max(*their);
        }
    }
}

/// Sums stop at [`COUNT_MAX`], so that sketches stay within their bytes.
fn sum(a: u64, b: u64) -> u64 {
    a.saturating_add(b).min(COUNT_MAX)
}

/// The hash's first bits choose a register, the zeros that follow are its rank.
fn note(ranks: &mut [u8; REGISTERS], hash: u32) {
    let register = &mut ranks[(hash >> RANK_BITS) as usize];
    let rank = (hash << INDEX_BITS).leading_zeros().min(RANK_BITS) + 1;
    *register = (*register).max(rank as u8);
}

#[expect(clippy::float_cmp, reason = "the series end when adding changes nothing")]
fn estimate(ranks: &[u8; REGISTERS]) -> u64 {
    let sigma = |mut x: f64| {
        if x == 1.0 {
            return f64::INFINITY;
        }
        let (mut y, mut z) = (1.0, x);
        loop {
            x *= x;
            let before = z;
            z += x * y;
            y += y;
            if z == before {
                return z;
            }
        }
    };
    let tau = |mut x: f64| {
        if x == 0.0 || x == 1.0 {
            return 0.0;
        }
        let (mut y, mut z) = (1.0, 1.0 - x);
        loop {
            x = x.sqrt();
            let before = z;
            y *= 0.5;
            z -= (1.0 - x).powi(2) * y;
            if z == before {
                return z / 3.0;
            }
        }
    };
    // How many registers have each rank.
    let mut having = [0_u32; RANK_BITS as usize + 2];
    ranks.iter().for_each(|rank| having[usize::from(*rank)] += 1);
    let m = REGISTERS as f64;
    let [none, ranked @ .., most] = having.map(f64::from);
    let z = ranked.iter().rev().fold(m * tau(1.0 - most / m), |z, having| 0.5 * (z + having));
    let z = z + m * sigma(none / m);
    (m * m / (2.0 * std::f64::consts::LN_2 * z)).round() as u64
}

/// Reads one sketch and leaves what is behind it.
fn decode(bytes: &mut &[u8]) -> Result<Sketch, Bad> {
    let mut sketch = Sketch::default();
    match take(bytes, 1)?[0] {
        VERSION => {}
        other => return Err(Bad::Version(other)),
    }
    for _ in 0..get(bytes, QUARTERS as u64)? {
        let quarter = take(bytes, 1)?[0];
        let ascends = sketch.buckets.last().is_none_or(|last| last.0 < quarter);
        ensure(ascends && usize::from(quarter) < QUARTERS)?;
        sketch.buckets.push((quarter, get(bytes, COUNT_MAX)?));
    }
    for dimension in Dimension::ALL {
        let head = get(bytes, (dimension.values_max() as u64) << 1 | 1)?;
        let some_left_out = head & 1 == 1;
        if some_left_out {
            let left_out = LeftOut { floor: get(bytes, COUNT_MAX)?, other: get(bytes, COUNT_MAX)? };
            sketch.left_out[dimension as usize] = left_out;
        }
        for _ in 0..head >> 1 {
            let value = decode_value(bytes, dimension)?;
            let count = get(bytes, COUNT_MAX)?;
            let over = if some_left_out { get(bytes, count)? } else { 0 };
            let entry = Entry { dimension, value, count, over };
            ensure(sketch.entries.last().is_none_or(|last| last.key() < entry.key()))?;
            sketch.entries.push(entry);
        }
    }
    let visitors = get(bytes, EXACT_VISITORS_MAX as u64 + 1)? as usize;
    if visitors <= EXACT_VISITORS_MAX {
        let (hashes, _) = take(bytes, visitors * 4)?.as_chunks();
        let hashes: Vec<u32> = hashes.iter().map(|hash| u32::from_le_bytes(*hash)).collect();
        ensure(hashes.is_sorted_by(|a, b| a < b))?;
        sketch.visitors = Visitors::Exact(hashes);
    } else {
        let mut ranks = Box::new([0; REGISTERS]);
        for (eight, five) in ranks.as_chunks_mut::<8>().0.iter_mut().zip(take(bytes, PACKED_BYTES)?.as_chunks::<5>().0)
        {
            let [a, b, c, d, e] = *five;
            let packed = u64::from_le_bytes([a, b, c, d, e, 0, 0, 0]);
            for (at, rank) in eight.iter_mut().enumerate() {
                *rank = (packed >> (5 * at)) as u8 & 31;
            }
        }
        ensure(ranks.iter().all(|rank| u32::from(*rank) <= RANK_BITS + 1))?;
        sketch.visitors = Visitors::Estimated(ranks);
    }
    Ok(sketch)
}

fn decode_value(bytes: &mut &[u8], dimension: Dimension) -> Result<Value, Bad> {
    let head = get(bytes, u64::MAX)?;
    if head & 1 == 1 {
        let place = u8::try_from(head >> 1).map_err(|_| Bad::Contents)?;
        ensure(usize::from(place) < dimension.known().len())?;
        return Ok(Value(Kept::Known(place)));
    }
    ensure((1..=dimension.bytes_max() as u64).contains(&(head >> 1)))?;
    let text = take(bytes, (head >> 1) as usize)?;
    let text = std::str::from_utf8(text).map_err(|_| Bad::Contents)?;
    Ok(Value(Kept::Text(text.into())))
}

fn ensure(good: bool) -> Result<(), Bad> {
    if good { Ok(()) } else { Err(Bad::Contents) }
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Result<&'a [u8], Bad> {
    bytes.split_off(..count).ok_or(Bad::Cut)
}

fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// A varint of at most `max`.
fn get(bytes: &mut &[u8], max: u64) -> Result<u64, Bad> {
    let mut number = 0;
    for shift in (0..63).step_by(7) {
        let byte = take(bytes, 1)?[0];
        number |= u64::from(byte & 0x7F) << shift;
        if byte < 0x80 {
            ensure(number <= max)?;
            return Ok(number);
        }
    }
    Err(Bad::Contents)
}

#[cfg(test)]
mod tests {
    use super::{Bad, COUNT_MAX, Dimension, EXACT_VISITORS_MAX, SKETCH_BYTES_MAX, Sketch, Value};
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    /// A visit: its quarter, its visitor, and numbers that make its values.
    type Seen = (u8, u64, [u8; 5]);

    /// The generator of SplitMix64: as good as a keyed hash here.
    fn hash(number: u64) -> u64 {
        let x = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ x >> 31
    }

    fn text(dimension: Dimension, number: u8) -> String {
        match dimension.known().get(usize::from(number)) {
            Some(known) => (*known).to_owned(),
            None => format!("value {number}"),
        }
    }

    fn add(sketch: &mut Sketch, (quarter, visitor, numbers): Seen) {
        sketch.count_quarter(quarter, 1);
        sketch.see_visitor(visitor);
        let values = Dimension::ALL.map(|dimension| (dimension, text(dimension, numbers[dimension as usize])));
        let values = values.map(|(dimension, text)| (dimension, Value::new(dimension, &text).unwrap()));
        sketch.count_values(values.iter().map(|(dimension, value)| (*dimension, value, 1)));
    }

    fn sketch_of(visits: &[Seen]) -> Sketch {
        let mut sketch = Sketch::default();
        visits.iter().for_each(|visit| add(&mut sketch, *visit));
        sketch
    }

    fn encoded(sketch: &Sketch) -> Vec<u8> {
        let mut bytes = Vec::new();
        sketch.encode(&mut bytes);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Sketch, Bad> {
        let mut sketch = Sketch::default();
        sketch.merge(bytes).map(|()| sketch)
    }

    fn visits(values: u8, most: usize) -> impl Strategy<Value = Vec<Seen>> {
        // Few of them, so that visitors come back.
        let visitor = (0..1000_u64).prop_map(hash);
        prop::collection::vec((0..96_u8, visitor, prop::array::uniform5(0..values)), 0..most)
    }

    proptest! {
        #[test]
        fn sketches_add_up_in_any_order(a in visits(8, 300), b in visits(8, 300), c in visits(8, 300)) {
            let all = sketch_of(&[a.clone(), b.clone(), c.clone()].concat());
            let [a, b, c] = [a, b, c].map(|visits| encoded(&sketch_of(&visits)));
            for order in [[&a, &b, &c], [&c, &a, &b], [&b, &c, &a]] {
                let [x, y, z] = order;
                prop_assert_eq!(&read(&[&x[..], y, z].concat()).unwrap(), &all);
                let right = encoded(&read(&[&y[..], z].concat()).unwrap());
                prop_assert_eq!(&read(&[&x[..], &right].concat()).unwrap(), &all);
            }
        }

        #[test]
        fn values_are_never_said_to_have_more_than_they_have(parts in prop::collection::vec(visits(80, 200), 1..6)) {
            let mut sketch = Sketch::default();
            for part in &parts {
                sketch.merge(&encoded(&sketch_of(part))).unwrap();
            }
            let all = parts.concat();
            for dimension in Dimension::ALL {
                let mut want: BTreeMap<String, u64> = BTreeMap::new();
                for (_, _, numbers) in &all {
                    *want.entry(text(dimension, numbers[dimension as usize])).or_default() += 1;
                }
                let top: BTreeMap<String, u64> = sketch.top(dimension).into_iter().collect();
                let bound = all.len() as u64 / dimension.values_max() as u64;
                prop_assert!(top.len() <= dimension.values_max());
                prop_assert_eq!(top.values().sum::<u64>() + sketch.other(dimension), all.len() as u64);
                for (value, count) in &want {
                    let said = top.get(value).copied().unwrap_or(0);
                    prop_assert!(said <= *count && count - said <= bound, "{value}: {said} of {count}, bound {bound}");
                }
            }
        }

        #[test]
        fn visitors_are_exact_while_they_are_few(visits in visits(2, 900)) {
            let want = visits.iter().map(|visit| visit.1).filter(|hash| *hash != 0).collect::<BTreeSet<_>>().len() as u64;
            let got = sketch_of(&visits).unique();
            if want <= EXACT_VISITORS_MAX as u64 {
                prop_assert_eq!(got, want);
            } else {
                prop_assert!(got.abs_diff(want) * 10 < want, "{} instead of {}", got, want);
            }
        }

        #[test]
        fn any_bytes_are_sketches_or_none(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
        }

        #[test]
        fn damaged_bytes_are_sketches_or_none(
            visits in visits(60, 500),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            keep in any::<prop::sample::Index>(),
        ) {
            let mut bytes = encoded(&sketch_of(&visits));
            prop_assume!(!bytes.is_empty());
            for (at, byte) in damage {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            let bytes = &bytes[..=keep.index(bytes.len())];
            if let Ok(mut sketch) = read(bytes) {
                sketch.merge(bytes).unwrap();
                prop_assert!(encoded(&sketch).len() <= SKETCH_BYTES_MAX);
                prop_assert_eq!(read(&encoded(&sketch)), Ok(sketch));
            }
        }
    }

    #[test]
    fn one_visit_is_33_bytes() {
        let values = [
            (Dimension::Referrer, "example.com"),
            (Dimension::Browser, "Chrome"),
            (Dimension::System, "Windows"),
            (Dimension::Device, "desktop"),
        ];
        let values = values.map(|(dimension, text)| (dimension, Value::new(dimension, text).unwrap()));
        let mut sketch = Sketch::default();
        sketch.count_quarter(95, 1);
        sketch.see_visitor(u64::MAX);
        sketch.count_values(values.iter().map(|(dimension, value)| (*dimension, value, 1)));
        assert_eq!(encoded(&sketch).len(), 33);
        let mut of_total = Vec::new();
        sketch.encode_without_quarters(&mut of_total);
        assert_eq!(of_total.len(), 31);
        assert_eq!(sketch.top(Dimension::Referrer), [("example.com".to_owned(), 1)]);
        assert!(encoded(&Sketch::default()).is_empty());
        assert_eq!(Value::new(Dimension::Browser, ""), None);
    }

    #[test]
    fn the_largest_sketch_keeps_to_its_bytes() {
        let mut sketch = Sketch::default();
        (0..96).for_each(|quarter| sketch.count_quarter(quarter, u64::MAX));
        for number in 0..1000_u64 {
            sketch.see_visitor((number * 4_294_967) << 32 | 1);
            let text = format!("{number:0>100}").chars().rev().collect::<String>();
            let values = Dimension::ALL.map(|dimension| (dimension, Value::new(dimension, &text).unwrap()));
            sketch.count_values(values.iter().map(|(dimension, value)| (*dimension, value, u64::MAX)));
        }
        let bytes = encoded(&sketch);
        assert!((6000..=SKETCH_BYTES_MAX).contains(&bytes.len()), "{}", bytes.len());
        assert_eq!(read(&bytes), Ok(sketch.clone()));
        assert_eq!(sketch.buckets()[95], COUNT_MAX);
    }

    #[test]
    fn bytes_that_are_none() {
        let good = encoded(&sketch_of(&[(3, 7 << 32, [0, 0, 0, 0, 0])]));
        let check = |bytes: &[u8], want| assert_eq!(read(bytes), Err(want), "{bytes:?}");
        check(&[2], Bad::Version(2));
        check(&good[..good.len() - 1], Bad::Cut);
        check(&[1, 1, 96, 1], Bad::Contents);
        check(&[1, 2, 5, 1, 5, 1], Bad::Contents);
        check(&[1, 97], Bad::Contents);
        check(&[1, 0, 0, 0, 2, 99, 1], Bad::Contents);
        check(&[1, 0, 0, 2, 4, 0xFF, 0xFE, 1], Bad::Contents);
        check(&[1, 0, 0, 0, 0, 0, 0, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 1], Bad::Contents);
        check(&[&good[..], &[1]].concat(), Bad::Cut);
    }

    #[test]
    fn visitors_are_estimated_within_the_error() {
        const RUNS: u64 = 20;
        for count in [100, 320, 1_000, 3_000, 10_000, 100_000, 1_000_000_u64] {
            let mut squares = 0.0;
            for run in 1..=RUNS {
                let mut sketch = Sketch::default();
                (0..count).for_each(|number| sketch.see_visitor(hash(run << 32 | number)));
                squares += (sketch.unique() as f64 / count as f64 - 1.0).powi(2);
            }
            let error = (squares / RUNS as f64).sqrt();
            println!("{count} visitors: {:.2} % of error", 100.0 * error);
            // 1.04 / sqrt(2048) = 2.3 %; of 20 runs the error itself is uncertain by a sixth.
            assert!(error < 0.033, "{count}: {error}");
            assert!(count > 320 || error == 0.0, "{count}: {error}");
        }
    }
}
