//! The bytes of an entry outside of this process: what Redis keeps of a link, and the fields that the warm file has, too.
//!
//! In: an entry and what moment of the store it is of. Out: bytes, and the same from them.
//! Never: panics over bytes; makes an entry of bytes that [`encode`] has not written. What is of another version, cut,
//! too long, damaged or foreign is none: a miss. The checksum is against accidents; who may write into Redis may forge.
//! At its limit: there is none here; texts have 32 bits of length, and whoever reads bounds what it reads.
//!
//! A value, little-endian:
//!
//! ```text
//!  at  bytes
//!   0      2  "wp"
//!   2      1  version of the format: 1
//!   3      8  checksum: FNV-1a of 64 bits over everything after it
//!  11      8  generation of the store
//!  19      8  position of the feed before the store was read
//!  27      …  entry
//!
//! entry:       link id u64 | rules | target, to the end
//! rules:       what there is u16 | status u16 | starts at i64 | expires at i64 | cache control text | expired URL text
//!              each but the first only if its bit is set
//! what there is, by bits: 0 status · 1 starts at · 2 expires at · 3 cache control · 4 expired URL
//!              5 `forward_query` is said · 6 and true · 7 gone · 8 limited; those above are zero
//! text:        length u32 | bytes
//! ```

use crate::domain::link::{Entry, LinkId, Rules};
use crate::domain::target::Target;
use crate::domain::time::UnixMillis;

const MAGIC: [u8; 2] = *b"wp";
const VERSION: u8 = 1;

const STATUS: u16 = 1;
const STARTS_AT: u16 = 1 << 1;
const EXPIRES_AT: u16 = 1 << 2;
const CACHE_CONTROL: u16 = 1 << 3;
const EXPIRED_URL: u16 = 1 << 4;
const FORWARD_SAID: u16 = 1 << 5;
const FORWARD: u16 = 1 << 6;
const GONE: u16 = 1 << 7;
const LIMITED: u16 = 1 << 8;
const KNOWN: u16 = (1 << 9) - 1;

/// A moment of a store, as every process that shares it names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredAsOf {
    /// Of the store; positions of another one say nothing about this.
    pub generation: u64,
    /// Every change up to this one shows in the value.
    pub position: u64,
}

/// The bytes of an entry that was read at `as_of` or later. A limited entry stays in this process: each of its visits is
/// granted by the store, so that others gain nothing by it, and older programs ask for each.
#[must_use]
pub fn encode(entry: &Entry, as_of: StoredAsOf) -> Vec<u8> {
    debug_assert!(!entry.rules.limited, "a limited link is in no cache that outlives the process");
    let mut body = Vec::with_capacity(32 + entry.target.as_str().len());
    body.extend(as_of.generation.to_le_bytes());
    body.extend(as_of.position.to_le_bytes());
    put_entry(&mut body, entry);
    let mut out = Vec::with_capacity(11 + body.len());
    out.extend(MAGIC);
    out.push(VERSION);
    out.extend(fnv1a(FNV_BASIS, &body).to_le_bytes());
    out.extend(body);
    out
}

/// What [`encode`] has made bytes of; none if these are no such bytes.
#[must_use]
pub fn decode(bytes: &[u8]) -> Option<(StoredAsOf, Entry)> {
    let mut reader = Reader(bytes);
    if reader.take(2)? != MAGIC || reader.u8()? != VERSION || reader.u64()? != fnv1a(FNV_BASIS, reader.0) {
        return None;
    }
    let as_of = StoredAsOf { generation: reader.u64()?, position: reader.u64()? };
    Some((as_of, take_entry(reader.0)?))
}

/// Appends an entry; where it ends, who writes it must say.
pub(super) fn put_entry(out: &mut Vec<u8>, entry: &Entry) {
    out.extend(entry.id.0.to_le_bytes());
    put_rules(out, &entry.rules);
    out.extend(entry.target.as_str().as_bytes());
}

/// The entry that `bytes` are, to their end; none if it is limited, since no such entry is ever written.
pub(super) fn take_entry(bytes: &[u8]) -> Option<Entry> {
    let mut reader = Reader(bytes);
    let id = LinkId(reader.u64()?);
    let rules = take_rules(&mut reader)?;
    let target = Target::new(std::str::from_utf8(reader.0).ok()?)?;
    (!rules.limited).then_some(Entry { id, target, rules })
}

pub(super) fn put_rules(out: &mut Vec<u8>, rules: &Rules) {
    let bit = |bit: u16, there: bool| if there { bit } else { 0 };
    let there = bit(STATUS, rules.status.is_some())
        | bit(STARTS_AT, rules.starts_at.is_some())
        | bit(EXPIRES_AT, rules.expires_at.is_some())
        | bit(CACHE_CONTROL, rules.cache_control.is_some())
        | bit(EXPIRED_URL, rules.expired_url.is_some())
        | bit(FORWARD_SAID, rules.forward_query.is_some())
        | bit(FORWARD, rules.forward_query == Some(true))
        | bit(GONE, rules.gone)
        | bit(LIMITED, rules.limited);
    out.extend(there.to_le_bytes());
    out.extend(rules.status.into_iter().flat_map(u16::to_le_bytes));
    for time in [rules.starts_at, rules.expires_at].into_iter().flatten() {
        out.extend(time.0.to_le_bytes());
    }
    for text in [rules.cache_control.as_deref(), rules.expired_url.as_ref().map(Target::as_str)].into_iter().flatten() {
        put_text(out, text);
    }
}

pub(super) fn take_rules(reader: &mut Reader<'_>) -> Option<Rules> {
    let there = reader.u16()?;
    let has = |bit: u16| there & bit != 0;
    if there & !KNOWN != 0 || (has(FORWARD) && !has(FORWARD_SAID)) {
        return None;
    }
    // In the order in which they are written: a struct's fields are made in the order of these lines.
    Some(Rules {
        status: if has(STATUS) { Some(reader.u16()?) } else { None },
        starts_at: if has(STARTS_AT) { Some(reader.time()?) } else { None },
        expires_at: if has(EXPIRES_AT) { Some(reader.time()?) } else { None },
        cache_control: if has(CACHE_CONTROL) { Some(reader.text()?.into()) } else { None },
        expired_url: if has(EXPIRED_URL) { Some(Target::new(reader.text()?)?) } else { None },
        forward_query: has(FORWARD_SAID).then_some(has(FORWARD)),
        gone: has(GONE),
        limited: has(LIMITED),
    })
}

pub(super) fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Where [`fnv1a`] begins.
pub(super) const FNV_BASIS: u64 = 0xCBF2_9CE4_8422_2325;

/// FNV-1a of 64 bits (Fowler, Noll, Vo; RFC 9923), going on from `sum`. Each step is a bijection, so that no change of a
/// single byte goes unnoticed; any other goes unnoticed once in 2^64.
pub(super) fn fnv1a(sum: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(sum, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01B3))
}

/// Takes fields off the front of bytes that anybody may have written: none if there are too few.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn time(&mut self) -> Option<UnixMillis> {
        self.array().map(i64::from_le_bytes).map(UnixMillis)
    }

    pub(super) fn text(&mut self) -> Option<&'a str> {
        let length = self.u32()?;
        std::str::from_utf8(self.take(usize::try_from(length).ok()?)?).ok()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn entries() -> impl Strategy<Value = Entry> {
        let target = || "[!-~]{1,80}".prop_map(|text| Target::new(&text).unwrap());
        let time = || prop::option::of(any::<i64>().prop_map(UnixMillis));
        let rules = (
            prop::option::of(any::<u16>()),
            prop::option::of(any::<String>().prop_map(Into::into)),
            any::<Option<bool>>(),
            (time(), time()),
            prop::option::of(target()),
            any::<bool>(),
        )
            .prop_map(|(status, cache_control, forward_query, (starts_at, expires_at), expired_url, gone)| Rules {
                status,
                cache_control,
                forward_query,
                starts_at,
                expires_at,
                expired_url,
                gone,
                limited: false,
            });
        let rules = prop_oneof![1 => Just(Rules::default()), 3 => rules];
        (any::<u64>(), target(), rules).prop_map(|(id, target, rules)| Entry { id: LinkId(id), target, rules })
    }

    fn moments() -> impl Strategy<Value = StoredAsOf> {
        any::<(u64, u64)>().prop_map(|(generation, position)| StoredAsOf { generation, position })
    }

    /// A value with a right checksum over whatever it says.
    fn sealed(body: &[u8]) -> Vec<u8> {
        [&b"wp\x01"[..], &fnv1a(FNV_BASIS, body).to_le_bytes(), body].concat()
    }

    /// What is in other processes' caches stays readable, and the checksum is the one that it says it is.
    #[test]
    fn the_bytes_are_what_they_were() {
        assert_eq!(fnv1a(FNV_BASIS, b"foobar"), 0x8594_4171_F739_67E8);
        let target = Target::new("https://example.com/").unwrap();
        let rules = Rules { status: Some(301), forward_query: Some(false), gone: true, ..Rules::default() };
        let entry = Entry { id: LinkId(7), target, rules };
        let body = b"\x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0\xA1\x00\x2D\x01https://example.com/";
        let as_of = StoredAsOf { generation: 2, position: 3 };
        assert_eq!(encode(&entry, as_of), sealed(body));
        assert_eq!(decode(&sealed(body)), Some((as_of, entry)));
    }

    #[test]
    fn what_says_the_wrong_thing_under_a_right_checksum_is_none() {
        let body = |rules: &[u8], target: &str| {
            let value = sealed(&[&[0; 24][..], rules, target.as_bytes()].concat());
            decode(&value).is_some()
        };
        let check = |rules: &[u8], target: &str, want: bool| {
            assert_eq!(body(rules, target), want, "{rules:02X?} {target:?}");
        };
        check(&[0, 0], "https://a/", true);
        check(&[0, 0], "", false);
        check(&[0, 0], "https://a/\r\n", false);
        check(&[0, 0], "https://ä/", false);
        check(&[0, 1], "https://a/", false);
        check(&[0, 2], "https://a/", false);
        check(&[0x40, 0], "https://a/", false);
        check(&[0x08, 0, 9, 0, 0, 0], "private", false);
        check(&[0x10, 0, 1, 0, 0, 0, b' '], "https://a/", false);
        check(&[0x10, 0, 1, 0, 0, 0, b'x'], "https://a/", true);
        assert_eq!(decode(&sealed(&[0; 23])), None);
        assert_eq!(decode(&[]), None);
        let mut other =
            encode(&take_entry(b"\0\0\0\0\0\0\0\0\0\0x").unwrap(), StoredAsOf { generation: 0, position: 0 });
        assert!(decode(&other).is_some());
        other[2] = 2;
        assert_eq!(decode(&other), None);
    }

    proptest! {
        #[test]
        fn an_entry_comes_back_as_it_was(entry in entries(), as_of in moments()) {
            prop_assert_eq!(decode(&encode(&entry, as_of)), Some((as_of, entry)));
        }

        #[test]
        fn rules_come_back_as_they_were(entry in entries(), limited in any::<bool>()) {
            let rules = Rules { limited, ..entry.rules };
            let mut bytes = Vec::new();
            put_rules(&mut bytes, &rules);
            let mut reader = Reader(&bytes);
            prop_assert_eq!(take_rules(&mut reader), Some(rules));
            prop_assert!(reader.0.is_empty());
        }

        #[test]
        fn any_bytes_are_none(bytes in prop::collection::vec(any::<u8>(), 0..200), whole in any::<bool>()) {
            let bytes = if whole { [b"wp\x01".to_vec(), bytes].concat() } else { bytes };
            prop_assert_eq!(decode(&bytes), None);
        }

        /// Whatever the checksum does not find: it may be an entry, and must not be a panic.
        #[test]
        fn any_body_under_a_right_checksum_is_an_entry_or_none(body in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some((as_of, entry)) = decode(&sealed(&body)) {
                prop_assert_eq!(encode(&entry, as_of), sealed(&body));
            }
        }

        #[test]
        fn a_damaged_value_is_none(
            entry in entries(),
            as_of in moments(),
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
            damage in 0..4,
        ) {
            let value = encode(&entry, as_of);
            let at = at.index(value.len());
            let mut damaged = value.clone();
            match damage {
                0 => damaged[at] = byte,
                1 => damaged.insert(at, byte),
                2 => damaged.truncate(at),
                _ => damaged.push(byte),
            }
            let want = (damaged == value).then_some((as_of, entry));
            prop_assert_eq!(decode(&damaged), want);
        }
    }
}
