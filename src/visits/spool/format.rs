//! Every byte of ring and log. All numbers are little-endian; all lengths count bytes.
//!
//! # Ring: one file for each core, on tmpfs, `spool.ring_size` bytes, mapped shared, allocated and touched at start
//!
//! It is used as an array of 64-bit words that are read and written atomically: whatever a crash leaves is whole words.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | magic `wayring\0` |
//! | 8 | 4 | [`VERSION`] |
//! | 12 | 2 | core |
//! | 14 | 2 | 0 |
//! | 16 | 8 | epoch |
//! | 24 | 8 | the spool: inode of `DATA/spool/lock` and when that was made, mixed (a copied folder does not own its original's rings) |
//! | 32 | 8 | size of the file |
//! | 40 | 8 | when it was made, milliseconds since 1970 |
//! | 64 | 8 | `head`: position behind the last record, written last by the core |
//! | 72 | 8 | `visits`: records so far that are visits of a link |
//! | 80 | 8 | orphans that were recorded; with `visits`, `appended`: the number of the next record |
//! | 88 | 8 | visits that found the ring full |
//! | 96 | 8 | visits that found the ring full while the log could not be written |
//! | 104 | 8 | orphans that were not recorded |
//! | 112 | 8 | generation of the strings in the first half: 1, 3, 5 …; 0: none yet |
//! | 120 | 8 | the same of the second half: 2, 4, 6 … |
//! | 192 | 8 | `tail`: position behind the last record that the log has, written by back |
//! | 200 | 8 | the number of the record at `tail`, written before it |
//! | 208 | 8 | 1 while the log cannot be written, written by back |
//! | 4096 | ring_size / 8 | strings: two halves |
//! | then | the rest | records |
//!
//! The three groups lie on cache lines of their own. Positions count bytes from the ring's making and never go back; a
//! record lies at its position modulo the size of the records' area, and is never cut in two: where it does not fit before
//! the end, a word of [`PAD`] says that the rest of the area is skipped.
//!
//! **String**: 2 bytes length, the bytes (at most 512), zeros up to a multiple of 8. Its id is its offset in the strings'
//! area divided by 8, plus 1; id 0 is no string. A half is filled from its beginning; when it is full the other half is begun
//! anew, with a new generation, as soon as the log has every record that was written while the other half was in use
//! before. Until then strings that are not there yet are left out: of an agent the record says so, by [`NO_AGENT_ROOM`].
//!
//! **Record**: at a multiple of 8, whole words.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 4 | checksum: CRC-32C (RFC 3720, appendix B.4) over epoch (8), core (2), number (8), and the bytes from 4 to the end of the record |
//! | 4 | 2 | length of the record, a multiple of 8 |
//! | 6 | 1 | kind: 1 click, 2 head, 3 prefetch, 4 orphan; 255: [`PAD`] |
//! | 7 | 1 | flags |
//! | 8 | 8 | link id; of an orphan the domain's number |
//! | 16 | 6 | time, milliseconds since 1970 |
//! | 22 | 2 | length of the request id, as it was written; of an orphan also the high byte: length of the code |
//! | 24 | 8 | visitor: a keyed hash, 0 for none |
//! | 32 | 4 | agent: id of its string |
//! | 36 | 4 | referrer: id of its string |
//! | 40 | 0, 4, 6, 16 | address: none, IPv4, the first 48 bits of IPv6, IPv6 (see flags) |
//! | then | – | request id: 16 bytes if flagged as packed, else as it was written, at most 64 bytes |
//! | then | – | of an orphan: its code |
//! | then | – | zeros up to a multiple of 8 |
//!
//! The first word (checksum, length, kind, flags) is the commit word: it is written last, and after it the one count that
//! the record changes (at 72 or 80), then `head`. A kill between them leaves a record too many for the counts, never two.
//! Flags: bits 0–1 the address (0 none, 1 IPv4, 2 IPv6 of 48 bits, 3 IPv6); bit 2 the request id is packed (32
//! hexadecimal digits in lower case); bit 3 [`NO_AGENT_ROOM`]; bit 4 the visitor asked not to be tracked (nothing of them is in the record).
//!
//! # Log: segments
//!
//! **Segment header**, 64 bytes:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | magic `waylog\0\0` |
//! | 8 | 4 | [`VERSION`] |
//! | 12 | 4 | CRC-32C of the bytes from 16 to 64 |
//! | 16 | 8 | epoch |
//! | 24 | 8 | the segment's number, also in its name |
//! | 32 | 8 | when it was made, milliseconds since 1970 |
//! | 40 | 8 | the oldest segment whose unsynced blocks are repeated here, after a write or sync of it failed; 0: none |
//! | 48 | 16 | 0 |
//!
//! **Block**, at a multiple of 8:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 4 | length of the block, header and all, a multiple of 8 |
//! | 4 | 4 | CRC-32C over epoch (8), segment number (8), and the bytes from 8 to the end of the block |
//! | 8 | 1 | kind: 1 records, 2 tally |
//! | 9 | 1 | 0 |
//! | 10 | 2 | core |
//! | 12 | 4 | records: how many; tally: 0 |
//! | 16 | 8 | number of the first record; tally: of the next record that the log gets |
//! | 24 | 8 | when it was written, milliseconds since 1970 |
//! | 32 | 4 | records: bytes of the strings; tally: 0 |
//! | 36 | 4 | records: visits of a link among them; tally: 0 |
//! | 40 | 8 | visits of a link among all records before that number: what a gap before it has lost is known exactly |
//! | 48 | – | records: the strings that they use and that this segment has not had yet (each: 4 bytes id, 2 bytes length, the bytes, zeros up to a multiple of 8), then the records as they lay in the ring. Tally: dropped by ring_full, by spool_error, and orphans not recorded: three numbers of 8 bytes |
//!
//! Every segment begins with a tally of each core: where its numbers stand is known without reading what was before. A
//! string that comes again with the same id replaces it. A block whose checksum is wrong ends what can be read of its
//! segment, but for blocks behind it that are found by their checksum at a multiple of 8. Blocks may come again (see
//! `repeats` in the header): a reader skips the numbers that it has had, and in a segment that a later one repeats it waits
//! for that one instead of calling a hole a loss.
//!
//! # `lost.ndjson`
//!
//! One line for each segment that was given up, synced before the segment goes:
//! `{"segment", "reason": "spool_full", "sources": [{"epoch", "core", "from", "to", "before", "visits"}], "links": {"id": visits}}`;
//! `before` counts the visits of all records before `from`. A segment that has a line here is not read, should it still be there.
//! A file that has grown too long is written anew (`lost.new`, then renamed): lines of segments that stood side by side become
//! one, that of the last of them, with the sums of all; where that is not short enough, without `links`.

/// Of ring and log together.
pub const VERSION: u32 = 1;
pub const RING_MAGIC: [u8; 8] = *b"wayring\0";
pub const LOG_MAGIC: [u8; 8] = *b"waylog\0\0";

/// Bytes before a ring's strings.
pub const RING_HEADER_BYTES: usize = 4096;
/// The share of a ring that strings have: an eighth.
pub const STRINGS_SHARE: usize = 8;
/// What is longer is cut, at a character's end where it is UTF-8.
pub const STRING_BYTES_MAX: usize = 512;
pub const REQUEST_ID_BYTES_MAX: usize = 64;
/// A record without address, request id and code.
pub const RECORD_BYTES_MIN: usize = 40;
/// An orphan with everything.
pub const RECORD_BYTES_MAX: usize = 40 + 16 + 64 + 128;

pub const KIND_CLICK: u8 = 1;
pub const KIND_HEAD: u8 = 2;
pub const KIND_PREFETCH: u8 = 3;
pub const KIND_ORPHAN: u8 = 4;
/// The rest of the area is skipped.
pub const PAD: u8 = 255;

pub const ADDRESS_MASK: u8 = 0b11;
pub const ADDRESS_V4: u8 = 1;
pub const ADDRESS_V6_SHORT: u8 = 2;
pub const ADDRESS_V6: u8 = 3;
pub const PACKED_REQUEST_ID: u8 = 1 << 2;
/// The agent found no room among the strings.
pub const NO_AGENT_ROOM: u8 = 1 << 3;
pub const NOT_TRACKED: u8 = 1 << 4;

pub const SEGMENT_HEADER_BYTES: usize = 64;
pub const BLOCK_HEADER_BYTES: usize = 48;
/// What claims to be longer is no block.
pub const BLOCK_BYTES_MAX: usize = 64 << 20;
pub const BLOCK_RECORDS: u8 = 1;
pub const BLOCK_TALLY: u8 = 2;
