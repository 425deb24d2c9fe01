//! Interning: a core's agents and referrers, each of them written into the ring once.
//!
//! In: texts as clients wrote them. Out: their ids in the ring.
//! Never: allocates after the start; waits for room; trusts that two texts with one hash are one.
//! At its limit: a text that finds no room has no id, and its record says so.

use ahash::RandomState;
use siphasher::sip::SipHasher24;

use super::format::STRING_BYTES_MAX;
use super::ring::{RingWriter, STRING_ROOM_MAX};

/// Bytes of a half for each slot of the table: agents have 100 to 200, short referrers 30.
const BYTES_PER_SLOT: usize = 32;

/// The strings of the ring's half that is in use.
#[derive(Debug)]
pub struct Strings {
    hasher: RandomState,
    /// Open addressing, linear probing; a power of two. What is of another generation is free.
    slots: Box<[Slot]>,
    /// Of `slots`, in this generation.
    used: usize,
    generation: u64,
    /// The texts, as they lie in the half.
    texts: Box<[u8]>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    hash: u64,
    generation: u64,
    /// For the visitor.
    fixed_hash: u64,
    id: u32,
    /// Where its text lies in `texts`.
    at: u32,
    len: u32,
}

/// A text that was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interned {
    /// 0 = none.
    pub id: u32,
    /// SipHash-2-4 of the text without a key: the same on every core and instance; 0 for no text.
    pub fixed_hash: u64,
    /// There is a text, and no room for it.
    pub no_room: bool,
}

impl Strings {
    /// For one ring.
    #[must_use]
    pub fn new(ring: &RingWriter) -> Self {
        let slots = (ring.half_bytes() / BYTES_PER_SLOT).next_power_of_two();
        Self {
            hasher: RandomState::new(),
            slots: vec![Slot::default(); slots].into(),
            used: 0,
            generation: ring.generation(),
            // The end is for what is compared and never lies there.
            texts: vec![0; ring.half_bytes() + STRING_ROOM_MAX].into(),
        }
    }

    /// The id of `text`, which is cut at 512 bytes; it is written into the ring if it is new.
    #[inline]
    pub fn intern(&mut self, ring: &mut RingWriter, text: &[u8]) -> Interned {
        if text.is_empty() {
            return Interned::default();
        }
        let text = cut(text);
        let hash = self.hasher.hash_one(text);
        if let Ok(slot) = self.find(hash, text) {
            return Interned { id: slot.id, fixed_hash: slot.fixed_hash, no_room: false };
        }
        self.add(ring, hash, text)
    }

    /// The slot that has the text, or the place for it.
    #[inline]
    fn find(&self, hash: u64, text: &[u8]) -> Result<&Slot, usize> {
        let mask = self.slots.len() - 1;
        let mut index = hash as usize & mask;
        loop {
            // A quarter of the slots is always free.
            let slot = &self.slots[index];
            if slot.generation != self.generation {
                return Err(index);
            }
            if slot.hash == hash && &self.texts[slot.at as usize..][..slot.len as usize] == text {
                return Ok(slot);
            }
            index = (index + 1) & mask;
        }
    }

    #[cold]
    fn add(&mut self, ring: &mut RingWriter, hash: u64, text: &[u8]) -> Interned {
        let fixed_hash = SipHasher24::new().hash(text);
        let full = self.used * 4 >= self.slots.len() * 3 && !ring.begin_half();
        let Some((id, at)) = (if full { None } else { ring.put_string(text) }) else {
            return Interned { id: 0, fixed_hash, no_room: true };
        };
        if ring.generation() != self.generation {
            self.generation = ring.generation();
            self.used = 0;
        }
        if let Err(index) = self.find(hash, text) {
            self.texts[at..at + text.len()].copy_from_slice(text);
            let (at, len) = (at as u32, text.len() as u32);
            self.slots[index] = Slot { hash, generation: self.generation, fixed_hash, id, at, len };
            self.used += 1;
        }
        Interned { id, fixed_hash, no_room: false }
    }
}

/// The first 512 bytes, and no part of a character.
fn cut(text: &[u8]) -> &[u8] {
    if text.len() <= STRING_BYTES_MAX {
        return text;
    }
    let begins = |at: &usize| text[*at] & 0b1100_0000 != 0b1000_0000;
    let end = (STRING_BYTES_MAX - 3..=STRING_BYTES_MAX).rev().find(begins).unwrap_or(STRING_BYTES_MAX);
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::super::ring::{self, RING_BYTES_MIN, RingReader};
    use super::super::{Epoch, Source};
    use super::*;
    use crate::domain::time::UnixMillis;

    fn ring() -> (tempfile::TempDir, RingWriter, RingReader) {
        let folder = tempfile::tempdir().unwrap();
        let source = Source { epoch: Epoch(1), core: 0 };
        let about = ring::About { source, spool: 0, made_at: UnixMillis(0) };
        let (writer, reader) = ring::create(&folder.path().join("ring"), RING_BYTES_MIN, &about).unwrap();
        (folder, writer, reader)
    }

    #[test]
    fn a_text_is_written_once() {
        let (_folder, mut writer, reader) = ring();
        let mut strings = Strings::new(&writer);
        assert_eq!(strings.intern(&mut writer, b""), Interned::default());
        let curl = strings.intern(&mut writer, b"curl/8.5.0");
        let wget = strings.intern(&mut writer, b"Wget/1.21.4");
        assert_eq!(strings.intern(&mut writer, b"curl/8.5.0"), curl);
        assert!(curl.id != wget.id && curl.fixed_hash != wget.fixed_hash);
        // Another core and another start say the same.
        let (_folder, mut other, _) = ring();
        assert_eq!(Strings::new(&other).intern(&mut other, b"curl/8.5.0").fixed_hash, curl.fixed_hash);
        let mut text = Vec::new();
        assert!(reader.string(wget.id, &mut text));
        assert_eq!(text, b"Wget/1.21.4");
    }

    /// Many short texts fill the table before the half, long ones the half before the table: both go over to the other
    /// half, and then to no room, and every id is that of its text.
    #[test]
    fn full_halves() {
        for len in [3, 100] {
            let (_folder, mut writer, reader) = ring();
            let mut strings = Strings::new(&writer);
            let mut record = record();
            let mut known: Vec<(Vec<u8>, Interned)> = Vec::new();
            for nth in 0.. {
                let text = format!("{nth:0len$}").into_bytes();
                let generation = writer.generation();
                let interned = strings.intern(&mut writer, &text);
                if writer.generation() != generation {
                    // A record that uses the half that was left: it cannot be begun anew until the log has it.
                    record.agent = known[0].1.id;
                    assert!(writer.append(&record));
                    known.clear();
                }
                if interned.no_room {
                    assert_eq!(interned.id, 0);
                    break;
                }
                known.push((text, interned));
            }
            assert_eq!(reader.generations(), [1, 2], "texts of {len} bytes");
            assert!(known.len() >= 9);
            for (text, interned) in known {
                assert_eq!(strings.intern(&mut writer, &text), interned, "what is there stays");
                let mut found = Vec::new();
                assert!(reader.string(interned.id, &mut found));
                assert_eq!(found, text);
            }
        }
    }

    fn record() -> super::super::record::Record<'static> {
        super::super::record::Record {
            kind: super::super::format::KIND_CLICK,
            link: 1,
            at: UnixMillis(0),
            visitor: 0,
            agent: 0,
            referrer: 0,
            address: None,
            request_id: super::super::record::RequestId::None,
            code: b"",
            not_tracked: false,
            no_agent_room: false,
        }
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let ascii = "a".repeat(600);
        let two = format!("a{}", "é".repeat(300));
        let four = format!("aaa{}", "🦀".repeat(150));
        for (text, len) in [
            (&b"short"[..], 5),
            (&ascii.as_bytes()[..512], 512),
            (ascii.as_bytes(), 512),
            (two.as_bytes(), 511),
            (four.as_bytes(), 511),
            (&[0x80; 600], 512),
        ] {
            assert_eq!(cut(text), &text[..len]);
        }
    }
}
