//! Rows as COPY takes them in binary (PostgreSQL manual, COPY, "Binary Format").
//!
//! In: the rows of a batch. Out: pieces of [`PIECE_BYTES`], cut anywhere: the protocol joins them again.
//! Never: asks the server for types; allocates for a row.
//! At its limit: a batch lies in memory once, in a buffer that the next one takes over.
//!
//! By hand, since `BinaryCopyInWriter` goes through a trait object and a check of types for each field.

use std::net::IpAddr;

use bytes::{BufMut, Bytes, BytesMut};

use crate::visits::batch::{Orphan, RequestId, Row};

/// The columns are those of the rows below, in their order.
pub(super) const COPY_VISITS: &str =
    "COPY visits (link_id, at, epoch, agent_id, referrer_id, kind, address, request_id) FROM STDIN (FORMAT binary)";
pub(super) const COPY_ORPHANS: &str = "COPY orphan_visits (domain_id, code, at, epoch, agent_id, referrer_id, address, request_id) \
     FROM STDIN (FORMAT binary)";

const PIECE_BYTES: usize = 256 << 10;

/// Signature, flags, length of the extension.
const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
const TRAILER: i16 = -1;
const FIELDS: i16 = 8;

/// A null's length.
const NULL: i32 = -1;

/// Families of `inet` (`src/include/utils/inet.h`): PGSQL_AF_INET is the system's AF_INET, which is 2 everywhere, and
/// PGSQL_AF_INET6 the next number.
const V4: u8 = 2;
const V6: u8 = 3;

pub(super) fn visits(rows: &[Row], buffer: &mut BytesMut) -> Vec<Bytes> {
    pieces(rows, buffer, |row, buffer| {
        bigint(row.link.0.cast_signed(), buffer);
        seen(row, buffer);
        buffer.put_i32(2);
        buffer.put_i16(row.class as i16);
        from(row, buffer);
    })
}

pub(super) fn orphans(orphans: &[Orphan], buffer: &mut BytesMut) -> Vec<Bytes> {
    pieces(orphans, buffer, |orphan, buffer| {
        buffer.put_i32(4);
        buffer.put_i32(i32::from(orphan.domain));
        text(orphan.code.as_bytes(), buffer);
        seen(&orphan.row, buffer);
        from(&orphan.row, buffer);
    })
}

/// None for no rows.
fn pieces<R>(rows: &[R], buffer: &mut BytesMut, write: impl Fn(&R, &mut BytesMut)) -> Vec<Bytes> {
    let mut pieces = Vec::new();
    if rows.is_empty() {
        return pieces;
    }
    buffer.put_slice(HEADER);
    for row in rows {
        buffer.put_i16(FIELDS);
        write(row, buffer);
        if buffer.len() >= PIECE_BYTES {
            pieces.push(buffer.split().freeze());
        }
    }
    buffer.put_i16(TRAILER);
    pieces.push(buffer.split().freeze());
    pieces
}

/// When, and with what.
fn seen(row: &Row, buffer: &mut BytesMut) {
    for value in [row.at.0, row.epoch.cast_signed(), row.agent, row.referrer] {
        bigint(value, buffer);
    }
}

/// Address and request id.
fn from(row: &Row, buffer: &mut BytesMut) {
    match row.address {
        None => buffer.put_i32(NULL),
        Some(IpAddr::V4(address)) => inet(V4, &address.octets(), buffer),
        Some(IpAddr::V6(address)) => inet(V6, &address.octets(), buffer),
    }
    match row.request_id {
        RequestId::None => buffer.put_i32(NULL),
        RequestId::Packed(id) => {
            const DIGITS: &[u8; 16] = b"0123456789abcdef";
            let mut digits = [0; 32];
            for (place, byte) in id.to_be_bytes().into_iter().enumerate() {
                digits[2 * place] = DIGITS[usize::from(byte >> 4)];
                digits[2 * place + 1] = DIGITS[usize::from(byte & 15)];
            }
            text(&digits, buffer);
        }
        // What is no UTF-8 the server would refuse, and the visit with it.
        RequestId::Written { len, bytes } => {
            text(String::from_utf8_lossy(&bytes[..usize::from(len)]).as_bytes(), buffer);
        }
    }
}

fn bigint(value: i64, buffer: &mut BytesMut) {
    buffer.put_i32(8);
    buffer.put_i64(value);
}

fn inet(family: u8, address: &[u8], buffer: &mut BytesMut) {
    let len = address.len() as u8;
    buffer.put_i32(4 + i32::from(len));
    // All bits, no network, then the address with its length.
    buffer.put_slice(&[family, len * 8, 0, len]);
    buffer.put_slice(address);
}

fn text(bytes: &[u8], buffer: &mut BytesMut) {
    buffer.put_i32(i32::try_from(bytes.len()).expect("codes and request ids are short"));
    buffer.put_slice(bytes);
}
