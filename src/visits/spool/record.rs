//! A record: one visit, as ring and log have it (see [`super::format`]).
//!
//! In: what is to be written, or bytes. Out: words, or what they say. Pure.
//! Never: allocates; trusts a length.

use std::net::IpAddr;

use super::Source;
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
    /// A string found no room in the ring.
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

/// Reads the record at the beginning of `bytes`, which is number `number` of `source`; also how many bytes it has.
pub fn decode(bytes: &[u8], source: Source, number: u64) -> Result<(Record<'_>, usize), Bad> {
    let _ = (bytes, source, number);
    todo!()
}
