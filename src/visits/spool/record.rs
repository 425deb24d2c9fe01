//! A record: one visit, as ring and log have it (see [`super::format`]).
//!
//! In: what is to be written, or bytes. Out: bytes, or what they say. Pure.
//! Never: allocates; trusts a length.
//! At its limit: a request id is cut at 64 bytes, a time is clamped to 48 bits.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Source;
use super::format::{
    ADDRESS_MASK, ADDRESS_V4, ADDRESS_V6, ADDRESS_V6_SHORT, KIND_CLICK, KIND_ORPHAN, NO_AGENT_ROOM, NOT_TRACKED,
    PACKED_REQUEST_ID, RECORD_BYTES_MAX, RECORD_BYTES_MIN, REQUEST_ID_BYTES_MAX,
};
use crate::domain::key::CODE_BYTES_MAX;
use crate::domain::time::UnixMillis;

/// What one record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// One of the kinds of [`super::format`].
    pub kind: u8,
    /// The link's id; of an orphan the domain's number.
    pub link: u64,
    pub at: UnixMillis,
    /// A keyed hash of address and agent; 0 = none.
    pub visitor: u64,
    /// Ids of strings; 0 = none.
    pub agent: u32,
    pub referrer: u32,
    /// As much of it as is kept.
    pub address: Option<IpAddr>,
    pub request_id: RequestId<'a>,
    /// Of an orphan; else empty.
    pub code: &'a [u8],
    pub not_tracked: bool,
    /// The agent found no room in the ring.
    pub no_agent_room: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestId<'a> {
    None,
    /// 32 hexadecimal digits in lower case.
    Packed(u128),
    /// At most 64 bytes.
    Written(&'a [u8]),
}

/// Why bytes are no record of this place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// No room for its length, or a length that none has.
    Length,
    /// Torn, stale, or of another core.
    Checksum,
    /// Its checksum is right and its contents are none of ours.
    Contents,
}

/// Digits of an id that packs.
const PACKED_DIGITS: usize = 32;
const AT_MAX: i64 = (1 << 48) - 1;

impl<'a> RequestId<'a> {
    /// What is kept of a header's value: its first 64 bytes; nothing if one of them is not 0x21–0x7E.
    #[must_use]
    pub fn new(value: &'a [u8]) -> Self {
        if let Some(packed) = pack(value) {
            return Self::Packed(packed);
        }
        let value = &value[..value.len().min(REQUEST_ID_BYTES_MAX)];
        if value.is_empty() || !value.iter().all(u8::is_ascii_graphic) { Self::None } else { Self::Written(value) }
    }
}

fn pack(value: &[u8]) -> Option<u128> {
    if value.len() != PACKED_DIGITS {
        return None;
    }
    value.iter().try_fold(0, |packed: u128, byte| {
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'f' => byte - b'a' + 10,
            _ => return None,
        };
        Some(packed << 4 | u128::from(digit))
    })
}

/// Where a record begins in [`Encoder::bytes`]: behind its number, whose second half makes room for the checksum.
const BEGIN: usize = 8;

/// Writes the records of one source, into a buffer of its own.
#[derive(Debug)]
pub struct Encoder {
    seed: u32,
    bytes: [u8; BEGIN + RECORD_BYTES_MAX],
}

impl Encoder {
    #[must_use]
    pub fn new(source: Source) -> Self {
        Self { seed: seed(source), bytes: [0; BEGIN + RECORD_BYTES_MAX] }
    }

    /// The record as it lies in the ring.
    #[inline]
    pub fn encode(&mut self, record: &Record<'_>, number: u64) -> &[u8] {
        let mut flags = 0;
        let mut end = BEGIN + RECORD_BYTES_MIN;
        match record.address {
            None => {}
            Some(IpAddr::V4(v4)) => {
                flags |= ADDRESS_V4;
                end = self.put(end, &v4.octets());
            }
            Some(IpAddr::V6(v6)) => {
                let octets = v6.octets();
                let short = octets[6..] == [0; 10];
                flags |= if short { ADDRESS_V6_SHORT } else { ADDRESS_V6 };
                end = self.put(end, if short { &octets[..6] } else { &octets });
            }
        }
        let mut id_len = 0;
        match record.request_id {
            RequestId::None => {}
            RequestId::Packed(packed) => {
                flags |= PACKED_REQUEST_ID;
                id_len = PACKED_DIGITS;
                end = self.put(end, &packed.to_le_bytes());
            }
            RequestId::Written(id) => {
                id_len = id.len().min(REQUEST_ID_BYTES_MAX);
                end = self.put(end, &id[..id_len]);
            }
        }
        let code_len = record.code.len().min(CODE_BYTES_MAX);
        if code_len > 0 {
            end = self.put(end, &record.code[..code_len]);
        }
        if record.no_agent_room {
            flags |= NO_AGENT_ROOM;
        }
        if record.not_tracked {
            flags |= NOT_TRACKED;
        }
        let len = (end - BEGIN).next_multiple_of(8);
        self.bytes[end..BEGIN + len].fill(0);

        let at = record.at.0.clamp(0, AT_MAX) as u64;
        let head = (len as u64) << 32 | u64::from(record.kind) << 48 | u64::from(flags) << 56;
        self.put_word(0, head);
        self.put_word(1, record.link);
        self.put_word(2, at | (id_len as u64) << 48 | (code_len as u64) << 56);
        self.put_word(3, record.visitor);
        self.put_word(4, u64::from(record.agent) | u64::from(record.referrer) << 32);

        let number_at = BEGIN - 4;
        self.bytes[number_at..number_at + 8].copy_from_slice(&number.to_le_bytes());
        let checksum = crc32c::crc32c_append(self.seed, &self.bytes[number_at..BEGIN + len]);
        self.bytes[BEGIN..BEGIN + 4].copy_from_slice(&checksum.to_le_bytes());
        &self.bytes[BEGIN..BEGIN + len]
    }

    fn put(&mut self, at: usize, bytes: &[u8]) -> usize {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        at + bytes.len()
    }

    fn put_word(&mut self, index: usize, word: u64) {
        let at = BEGIN + index * 8;
        self.bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }
}

/// The checksum of what stands before the number.
fn seed(source: Source) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&source.epoch.0.to_le_bytes()), &source.core.to_le_bytes())
}

/// Length and kind of the record that begins with this word, whoever's it is; none if no record begins so.
#[must_use]
pub fn opening(word: u64) -> Option<(usize, u8)> {
    let (len, kind) = ((word >> 32) as u16, (word >> 48) as u8);
    let len = usize::from(len);
    (len.is_multiple_of(8) && (RECORD_BYTES_MIN..=RECORD_BYTES_MAX).contains(&len)).then_some((len, kind))
}

/// Reads the record at the beginning of `bytes`, which is number `number` of `source`; also how many bytes it has.
pub fn decode(bytes: &[u8], source: Source, number: u64) -> Result<(Record<'_>, usize), Bad> {
    let word = |index: usize| {
        let word = bytes.get(index * 8..index * 8 + 8).ok_or(Bad::Length)?;
        Ok(u64::from_le_bytes(word.try_into().expect("8 bytes")))
    };
    let head = word(0)?;
    let (len, kind) = opening(head).ok_or(Bad::Length)?;
    let bytes = bytes.get(..len).ok_or(Bad::Length)?;
    let checksum = crc32c::crc32c_append(crc32c::crc32c_append(seed(source), &number.to_le_bytes()), &bytes[4..]);
    if checksum != head as u32 {
        return Err(Bad::Checksum);
    }

    let flags = (head >> 56) as u8;
    let (times, strings) = (word(2)?, word(4)?);
    let (id_len, code_len) = (usize::from((times >> 48) as u8), usize::from((times >> 56) as u8));
    let known = ADDRESS_MASK | PACKED_REQUEST_ID | NO_AGENT_ROOM | NOT_TRACKED;
    let packed = flags & PACKED_REQUEST_ID != 0;
    if flags & !known != 0
        || !(KIND_CLICK..=KIND_ORPHAN).contains(&kind)
        || (packed && id_len != PACKED_DIGITS)
        || id_len > REQUEST_ID_BYTES_MAX
        || code_len > CODE_BYTES_MAX
        || (code_len > 0 && kind != KIND_ORPHAN)
    {
        return Err(Bad::Contents);
    }
    let address_len = [0, 4, 6, 16][usize::from(flags & ADDRESS_MASK)];
    let id_bytes = if packed { 16 } else { id_len };
    let contents = &bytes[RECORD_BYTES_MIN..];
    if (address_len + id_bytes + code_len).next_multiple_of(8) != contents.len() {
        return Err(Bad::Contents);
    }
    let (address, rest) = contents.split_at(address_len);
    let (id, rest) = rest.split_at(id_bytes);
    let address = match flags & ADDRESS_MASK {
        ADDRESS_V4 => Some(IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(address).expect("4 bytes")))),
        ADDRESS_V6 | ADDRESS_V6_SHORT => {
            let mut octets = [0; 16];
            octets[..address.len()].copy_from_slice(address);
            Some(IpAddr::V6(Ipv6Addr::from(octets)))
        }
        _ => None,
    };
    let request_id = match id {
        [] => RequestId::None,
        id if packed => RequestId::Packed(u128::from_le_bytes(id.try_into().expect("16 bytes"))),
        id => RequestId::Written(id),
    };
    let record = Record {
        kind,
        link: word(1)?,
        at: UnixMillis((times & AT_MAX as u64) as i64),
        visitor: word(3)?,
        agent: strings as u32,
        referrer: (strings >> 32) as u32,
        address,
        request_id,
        code: &rest[..code_len],
        not_tracked: flags & NOT_TRACKED != 0,
        no_agent_room: flags & NO_AGENT_ROOM != 0,
    };
    Ok((record, len))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::visits::spool::Epoch;

    const SOURCE: Source = Source { epoch: Epoch(0x0123_4567_89AB_CDEF), core: 3 };

    fn plain() -> Record<'static> {
        Record {
            kind: KIND_CLICK,
            link: 7,
            at: UnixMillis(1_800_000_000_000),
            visitor: 9,
            agent: 1,
            referrer: 2,
            address: None,
            request_id: RequestId::None,
            code: b"",
            not_tracked: false,
            no_agent_room: false,
        }
    }

    fn check(record: Record<'_>, bytes: usize) {
        let mut encoder = Encoder::new(SOURCE);
        // What an earlier record left in the buffer is not in this one.
        encoder.bytes.fill(0xFF);
        let written = encoder.encode(&record, 5);
        assert_eq!(decode(written, SOURCE, 5), Ok((record, bytes)));
    }

    #[test]
    fn records_come_back_as_they_were() {
        let v4 = Some(IpAddr::from([203, 0, 113, 7]));
        check(plain(), 40);
        check(Record { address: v4, ..plain() }, 48);
        check(Record { address: v4, request_id: RequestId::Packed(u128::MAX / 3), ..plain() }, 64);
        check(Record { address: Some("2001:db8:7::".parse().unwrap()), ..plain() }, 48);
        check(Record { address: Some("2001:db8:7::1".parse().unwrap()), ..plain() }, 56);
        check(Record { request_id: RequestId::Written(b"x"), not_tracked: true, ..plain() }, 48);
        check(Record { kind: KIND_ORPHAN, link: 65535, code: b"launch", no_agent_room: true, ..plain() }, 48);
        let longest = Record {
            kind: KIND_ORPHAN,
            address: Some("2001:db8::1".parse().unwrap()),
            request_id: RequestId::Written(&[b'i'; 64]),
            code: &[b'c'; 128],
            ..plain()
        };
        check(longest, RECORD_BYTES_MAX);
    }

    /// Byte for byte as `format` says: what an older version wrote must be read by this one.
    #[test]
    fn bytes_of_a_record() {
        let record = Record { address: Some(IpAddr::from([192, 0, 2, 1])), ..plain() };
        let mut encoder = Encoder::new(SOURCE);
        let written = encoder.encode(&record, 5).to_vec();
        let mut covered = 0x0123_4567_89AB_CDEF_u64.to_le_bytes().to_vec();
        covered.extend([3, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        covered.extend(&written[4..]);
        let mut want = crc32c::crc32c(&covered).to_le_bytes().to_vec();
        want.extend([48, 0, 1, 1, 7, 0, 0, 0, 0, 0, 0, 0]);
        want.extend([0x00, 0x50, 0x5C, 0x18, 0xA3, 0x01, 0, 0]);
        want.extend([9, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0]);
        want.extend([192, 0, 2, 1, 0, 0, 0, 0]);
        assert_eq!(written, want);
    }

    #[test]
    fn what_is_kept_of_a_request_id() {
        let digits = b"0123456789abcdef0123456789abcdef";
        let long = [b'x'; 70];
        for (value, want) in [
            (&b""[..], RequestId::None),
            (digits, RequestId::Packed(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef)),
            (b"0123456789ABCDEF0123456789abcdef", RequestId::Written(b"0123456789ABCDEF0123456789abcdef")),
            (&digits[1..], RequestId::Written(&digits[1..])),
            (b"a b", RequestId::None),
            (b"caf\xC3\xA9", RequestId::None),
            (&long, RequestId::Written(&long[..64])),
        ] {
            assert_eq!(RequestId::new(value), want);
        }
    }

    #[test]
    fn a_record_of_another_place_is_none() {
        let mut encoder = Encoder::new(SOURCE);
        let written = encoder.encode(&plain(), 5).to_vec();
        let others = [
            (SOURCE, 4),
            (SOURCE, 6),
            (Source { core: 2, ..SOURCE }, 5),
            (Source { epoch: Epoch(SOURCE.epoch.0 + 1), ..SOURCE }, 5),
        ];
        for (source, number) in others {
            assert_eq!(decode(&written, source, number), Err(Bad::Checksum));
        }
        for cut in 0..written.len() {
            assert_eq!(decode(&written[..cut], SOURCE, 5), Err(Bad::Length));
        }
    }

    proptest! {
        #[test]
        fn a_changed_byte_is_noticed(at in 0usize..48, to in any::<u8>()) {
            let record = Record { address: Some(IpAddr::from([192, 0, 2, 1])), ..plain() };
            let mut encoder = Encoder::new(SOURCE);
            let mut bytes = encoder.encode(&record, 5).to_vec();
            prop_assume!(bytes[at] != to);
            bytes[at] = to;
            prop_assert!(decode(&bytes, SOURCE, 5).is_err());
        }

        /// Contents that are none of ours, with a right checksum: no panic.
        #[test]
        fn any_bytes_are_a_record_or_an_error(mut bytes in prop::collection::vec(any::<u8>(), 8..300), len in 0u16..300) {
            bytes[4..6].copy_from_slice(&len.to_le_bytes());
            let end = usize::from(len).clamp(4, bytes.len());
            let checksum = crc32c::crc32c_append(seed(SOURCE), &1u64.to_le_bytes());
            let checksum = crc32c::crc32c_append(checksum, &bytes[4..end]);
            bytes[..4].copy_from_slice(&checksum.to_le_bytes());
            if let Ok((record, bytes_read)) = decode(&bytes, SOURCE, 1) {
                prop_assert_eq!(bytes_read, usize::from(len));
                prop_assert!(record.code.len() <= CODE_BYTES_MAX);
            }
        }
    }
}
