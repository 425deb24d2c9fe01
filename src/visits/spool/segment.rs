//! Segments, headers and blocks of the log as bytes (see [`super::format`]).
//!
//! In: what is to be written, or bytes. Out: bytes, or what they say. Pure.
//! Never: believes a length or a checksum that does not fit.

use super::format::{
    BLOCK_BYTES_MAX, BLOCK_HEADER_BYTES, BLOCK_RECORDS, BLOCK_TALLY, KIND_ORPHAN, LOG_MAGIC, RECORD_BYTES_MAX,
    RECORD_BYTES_MIN, SEGMENT_HEADER_BYTES, VERSION,
};
use super::{Epoch, Source};
use crate::domain::time::UnixMillis;

/// The name of segment `number`.
#[must_use]
pub fn name(number: u64) -> String {
    format!("{number:016x}.log")
}

/// The number of the segment with this name.
#[must_use]
pub fn number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".log").filter(|digits| digits.len() == 16)?;
    u64::from_str_radix(digits, 16).ok()
}

/// What a segment begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub epoch: Epoch,
    pub number: u64,
    pub made_at: UnixMillis,
    /// The oldest segment whose unsynced blocks are repeated here; 0 = none.
    pub repeats: u64,
}

impl Header {
    #[must_use]
    pub fn encode(&self) -> [u8; SEGMENT_HEADER_BYTES] {
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        bytes[..8].copy_from_slice(&LOG_MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.epoch.0.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.number.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.made_at.0.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.repeats.to_le_bytes());
        let sum = crc32c::crc32c(&bytes[16..]);
        bytes[12..16].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..SEGMENT_HEADER_BYTES)?;
        let sound =
            bytes[..8] == LOG_MAGIC && u32_at(bytes, 8) == VERSION && u32_at(bytes, 12) == crc32c::crc32c(&bytes[16..]);
        sound.then(|| Self {
            epoch: Epoch(u64_at(bytes, 16)),
            number: u64_at(bytes, 24),
            made_at: UnixMillis(u64_at(bytes, 32).cast_signed()),
            repeats: u64_at(bytes, 40),
        })
    }
}

/// The version that a segment's header says, if it is one.
#[must_use]
pub fn version(header: &[u8; SEGMENT_HEADER_BYTES]) -> Option<u32> {
    header.starts_with(&LOG_MAGIC).then(|| u32_at(header, 8))
}

/// One block of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block<'a> {
    pub core: u16,
    /// The number of the first record, or of the next one.
    pub number: u64,
    /// Visits of a link among all records before that number.
    pub before: u64,
    pub written_at: UnixMillis,
    pub body: Body<'a>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body<'a> {
    Records { count: u32, visits: u32, strings: &'a [u8], records: &'a [u8] },
    Tally { ring_full: u64, spool_error: u64, orphans: u64 },
}

/// How a core stood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    pub source: Source,
    /// Records that the log has had: the number of the next one.
    pub appended: u64,
    /// Visits of a link among them.
    pub visits: u64,
    pub ring_full: u64,
    pub spool_error: u64,
    /// Orphans that were not recorded.
    pub orphans: u64,
}

impl Block<'_> {
    /// The block that says how a core stands.
    #[must_use]
    pub fn tally(tally: &Tally, written_at: UnixMillis) -> Self {
        let Tally { source, appended, visits, ring_full, spool_error, orphans } = *tally;
        let body = Body::Tally { ring_full, spool_error, orphans };
        Self { core: source.core, number: appended, before: visits, written_at, body }
    }

    /// Appends the block, of the segment `segment` of `epoch`, to `out`.
    pub fn encode(&self, epoch: Epoch, segment: u64, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; BLOCK_HEADER_BYTES]);
        let (kind, count, strings_bytes, visits) = match self.body {
            Body::Records { count, visits, strings, records } => {
                out.extend_from_slice(strings);
                out.extend_from_slice(records);
                (BLOCK_RECORDS, count, u32::try_from(strings.len()).expect("a block is less than 4 GiB"), visits)
            }
            Body::Tally { ring_full, spool_error, orphans } => {
                for figure in [ring_full, spool_error, orphans] {
                    out.extend_from_slice(&figure.to_le_bytes());
                }
                (BLOCK_TALLY, 0, 0, 0)
            }
        };
        let block = &mut out[start..];
        let len = u32::try_from(block.len()).expect("a block is less than 4 GiB");
        block[..4].copy_from_slice(&len.to_le_bytes());
        block[8] = kind;
        block[10..12].copy_from_slice(&self.core.to_le_bytes());
        block[12..16].copy_from_slice(&count.to_le_bytes());
        block[16..24].copy_from_slice(&self.number.to_le_bytes());
        block[24..32].copy_from_slice(&self.written_at.0.to_le_bytes());
        block[32..36].copy_from_slice(&strings_bytes.to_le_bytes());
        block[36..40].copy_from_slice(&visits.to_le_bytes());
        block[40..48].copy_from_slice(&self.before.to_le_bytes());
        let sum = checksum(epoch, segment, &block[8..]);
        block[4..8].copy_from_slice(&sum.to_le_bytes());
    }
}

/// The length that the block at the beginning of `bytes` claims; none where it cannot be one.
#[must_use]
pub fn claimed_len(bytes: &[u8]) -> Option<usize> {
    let header = bytes.get(..BLOCK_HEADER_BYTES)?;
    let len = u32_at(header, 0) as usize;
    let plausible = (BLOCK_HEADER_BYTES..=BLOCK_BYTES_MAX).contains(&len)
        && len.is_multiple_of(8)
        && matches!(header[8], BLOCK_RECORDS | BLOCK_TALLY)
        && header[9] == 0;
    plausible.then_some(len)
}

/// The block that `bytes` are, all of them.
#[must_use]
pub fn decode(bytes: &[u8], epoch: Epoch, segment: u64) -> Option<Block<'_>> {
    if claimed_len(bytes)? != bytes.len() || u32_at(bytes, 4) != checksum(epoch, segment, &bytes[8..]) {
        return None;
    }
    let rest = &bytes[BLOCK_HEADER_BYTES..];
    let body = if bytes[8] == BLOCK_RECORDS {
        let (strings, records) = rest.split_at_checked(u32_at(bytes, 32) as usize)?;
        Body::Records { count: u32_at(bytes, 12), visits: u32_at(bytes, 36), strings, records }
    } else if rest.len() == 24 {
        Body::Tally { ring_full: u64_at(rest, 0), spool_error: u64_at(rest, 8), orphans: u64_at(rest, 16) }
    } else {
        return None;
    };
    Some(Block {
        core: u16::from_le_bytes([bytes[10], bytes[11]]),
        number: u64_at(bytes, 16),
        before: u64_at(bytes, 40),
        written_at: UnixMillis(u64_at(bytes, 24).cast_signed()),
        body,
    })
}

/// Appends a string's definition to a block's strings.
pub fn put_string(id: u32, string: &[u8], out: &mut Vec<u8>) {
    let len = u16::try_from(string.len()).expect("strings have at most 512 bytes");
    out.extend_from_slice(&id.to_le_bytes());
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(string);
    out.resize(out.len().next_multiple_of(8), 0);
}

/// The strings of a block: id and bytes.
pub fn strings(mut bytes: &[u8]) -> impl Iterator<Item = (u32, &[u8])> {
    std::iter::from_fn(move || {
        let id = u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?);
        let len = usize::from(u16::from_le_bytes(bytes.get(4..6)?.try_into().ok()?));
        let string = bytes.get(6..6 + len)?;
        bytes = bytes.get((6 + len).next_multiple_of(8)..).unwrap_or_default();
        Some((id, string))
    })
}

/// What of a record the log itself looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Glance {
    pub len: usize,
    /// A visit of a link, no orphan.
    pub visit: bool,
    pub link: u64,
    pub at: UnixMillis,
    /// Agent and referrer; 0 = none.
    pub strings: [u32; 2],
}

/// The records in `records`, one behind the other, for as long as their lengths are right.
pub fn glance(mut records: &[u8]) -> impl Iterator<Item = Glance> {
    std::iter::from_fn(move || {
        let head = records.get(..RECORD_BYTES_MIN)?;
        let len = usize::from(u16::from_le_bytes([head[4], head[5]]));
        if !(RECORD_BYTES_MIN..=RECORD_BYTES_MAX).contains(&len) || !len.is_multiple_of(8) {
            return None;
        }
        records = records.get(len..)?;
        let strings = [u32_at(head, 32), u32_at(head, 36)];
        let at = UnixMillis((u64_at(head, 16) & ((1 << 48) - 1)).cast_signed());
        Some(Glance { len, visit: head[6] != KIND_ORPHAN, link: u64_at(head, 8), at, strings })
    })
}

/// Bytes and visits of the first `count` records.
#[must_use]
pub fn measure(records: &[u8], count: u64) -> (usize, u64) {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    glance(records)
        .take(count)
        .fold((0, 0), |(bytes, visits), record| (bytes + record.len, visits + u64::from(record.visit)))
}

fn checksum(epoch: Epoch, segment: u64, bytes: &[u8]) -> u32 {
    let sum = crc32c::crc32c(&epoch.0.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c_append(sum, &segment.to_le_bytes()), bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
