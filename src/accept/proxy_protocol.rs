//! The PROXY protocol, versions 1 and 2, as haproxy's `proxy-protocol.txt` has it: what a balancer says of the
//! connection before the first byte of HTTP.
//!
//! In: the first bytes of a connection. Out: how many of them are the header, and whom it names.
//! Never: reads a socket, allocates, accepts a connection without a header, verifies a CRC32c TLV.
//! At the limit: a v1 line of more than 107 bytes and a v2 block of more than 4096 are refused, not awaited.

use std::array;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The most bytes that a header has, and so the most that a caller ever holds before the verdict.
pub const HEADER_BYTES_MAX: usize = V2_HEAD_BYTES + V2_BLOCK_BYTES_MAX;

/// The most bytes of a v1 line with its CRLF (section 2.1).
const V1_BYTES_MAX: usize = 107;
const V1_START: &[u8] = b"PROXY ";

/// What a v2 header begins with (section 2.2); no HTTP request does.
const V2_SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, command, family and transport, length.
const V2_HEAD_BYTES: usize = 16;
/// The most bytes behind the head. The format allows 65535; addresses and the TLVs of known balancers with a
/// client certificate's name stay below 1 KiB.
const V2_BLOCK_BYTES_MAX: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// All bytes so far are the beginning of a header: come again with more.
    Partial,
    /// The first `consumed` bytes are the header; HTTP begins behind them.
    Done { consumed: usize, source: Source },
}

/// Who opened the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A health check of the balancer, or a client whose address it does not know: the socket's own address holds.
    Socket,
    /// As the header has it: an IPv4-mapped address is not unmapped.
    Client(SocketAddr),
}

/// Why these bytes are no header, whatever follows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error(
        "the connection does not begin with a PROXY protocol header: let the balancer send one, or set \
         listen.proxy_protocol = false"
    )]
    Missing,
    #[error(
        "a PROXY v1 line is \"PROXY UNKNOWN\" or \"PROXY TCP4|TCP6 source destination port port\" with single \
         spaces, addresses of that family and ports from 0 to 65535"
    )]
    Line,
    #[error("a PROXY v1 line has at most {V1_BYTES_MAX} bytes with its CRLF")]
    LineTooLong,
    #[error("byte 13 of a PROXY v2 header is 0x20 (LOCAL) or 0x21 (PROXY), not {0:#04x}")]
    Command(u8),
    #[error(
        "byte 14 of a PROXY v2 header is a family from 0 to 3 and a transport from 0 to 2, not {0:#04x}: let the \
         balancer send 0x00 for what it cannot name"
    )]
    Family(u8),
    #[error("a PROXY v2 block has at most {V2_BLOCK_BYTES_MAX} bytes, not {0}: let the balancer send fewer TLVs")]
    BlockTooLong(usize),
    #[error("a PROXY v2 block of {0} bytes is too short for the addresses of its family")]
    Addresses(usize),
    #[error("the TLVs of a PROXY v2 header do not end where its length says")]
    Tlv,
}

/// Reads the header that `bytes`, the first of a connection, begin with (proxy-protocol.txt, section 2).
///
/// # Errors
/// Version 1: as soon as no further bytes can complete the line. Version 2: once the 16 bytes of the head are there,
/// or, for TLVs that do not add up, once the block is.
pub fn parse(bytes: &[u8]) -> Result<Parsed, Malformed> {
    if agree(bytes, V2_SIGNATURE) {
        binary(bytes)
    } else if agree(bytes, V1_START) {
        text(bytes)
    } else {
        Err(Malformed::Missing)
    }
}

/// Whether the shorter one begins the longer one.
fn agree(bytes: &[u8], start: &[u8]) -> bool {
    bytes.iter().zip(start).all(|(a, b)| a == b)
}

/// Version 1 (section 2.1).
fn text(bytes: &[u8]) -> Result<Parsed, Malformed> {
    let head = &bytes[..bytes.len().min(V1_BYTES_MAX)];
    if let Some(end) = head.windows(2).position(|pair| pair == b"\r\n") {
        return Ok(Parsed::Done { consumed: end + 2, source: line(&head[..end])? });
    }
    match head.strip_suffix(b"\r") {
        Some(whole) if head.len() < V1_BYTES_MAX => line(whole).map(|_| Parsed::Partial),
        None if can_become_a_line(head) => Ok(Parsed::Partial),
        _ if head.len() + 2 > V1_BYTES_MAX => Err(Malformed::LineTooLong),
        _ => Err(Malformed::Line),
    }
}

/// A v1 line without its CRLF, that begins with [`V1_START`].
///
/// Addresses are read as `inet_pton` would, though the text asks for groups of hexadecimal digits alone: balancers
/// print with `inet_ntop`, which writes `::ffff:192.0.2.1`.
fn line(line: &[u8]) -> Result<Source, Malformed> {
    // "The receiver must ignore anything presented before the CRLF": even bytes that are no text.
    if line == b"PROXY UNKNOWN" || line.starts_with(b"PROXY UNKNOWN ") {
        return Ok(Source::Socket);
    }
    let mut fields = str::from_utf8(line).map_err(|_| Malformed::Line)?.split(' ');
    // A missing field is an empty one: neither is valid.
    let [_, family, source, destination, source_port, destination_port] =
        array::from_fn(|_| fields.next().unwrap_or_default());
    let address = |text: &str| match family {
        "TCP4" => text.parse().ok().map(IpAddr::V4),
        "TCP6" => text.parse().ok().map(IpAddr::V6),
        _ => None,
    };
    let port = |text: &str| match text.as_bytes() {
        // `parse` takes a sign and leading zeros.
        [b'+', ..] | [b'0', _, ..] => None,
        _ => text.parse::<u16>().ok(),
    };
    match (address(source), address(destination), port(source_port), port(destination_port), fields.next()) {
        (Some(source), Some(_), Some(port), Some(_), None) => Ok(Source::Client(SocketAddr::new(source, port))),
        _ => Err(Malformed::Line),
    }
}

/// What ends a field that has begun, as shortly as can be. These suffice: a begun IPv4 address, also one inside of
/// an IPv6 address, lacks up to three numbers and perhaps a digit before them; a begun IPv6 address is one already,
/// or lacks a digit, or its `::`, or half of that; a begun port is one already or lacks a digit.
const ENDINGS: [&str; 10] = ["", "0", ":", "::", ".0", "0.0", ".0.0", "0.0.0", ".0.0.0", "0.0.0.0"];

/// Whether bytes without CR at their end can go on to be a v1 line: some ending makes them one.
fn can_become_a_line(open: &[u8]) -> bool {
    let starts: [&[u8]; 3] = [b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN"];
    if starts.iter().any(|start| start.starts_with(open)) {
        return true;
    }
    let spaces = open.iter().filter(|byte| **byte == b' ').count();
    let fields_to_come = match (open.get(V1_START.len()..V1_START.len() + 4), spaces) {
        (Some(b"TCP4"), 2) => " 0.0.0.0 0 0",
        (Some(b"TCP6"), 2) => " :: 0 0",
        (Some(b"TCP4" | b"TCP6"), 3) => " 0 0",
        (Some(b"TCP4" | b"TCP6"), 4) => " 0",
        _ => "",
    };
    ENDINGS.iter().any(|ending| {
        let mut whole = [0; V1_BYTES_MAX - 2];
        let mut len = 0;
        for part in [open, ending.as_bytes(), fields_to_come.as_bytes()] {
            let Some(room) = whole.get_mut(len..len + part.len()) else { return false };
            room.copy_from_slice(part);
            len += part.len();
        }
        line(&whole[..len]).is_ok()
    })
}

/// Version 2 (section 2.2).
fn binary(bytes: &[u8]) -> Result<Parsed, Malformed> {
    let Some((head, rest)) = bytes.split_first_chunk::<V2_HEAD_BYTES>() else { return Ok(Parsed::Partial) };
    let [.., command, family, high, low] = *head;
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length > V2_BLOCK_BYTES_MAX {
        return Err(Malformed::BlockTooLong(length));
    }
    let addresses_bytes = match (command, family >> 4, family & 15) {
        // LOCAL: "discard the protocol block including the family". UNSPEC: nobody knows where its TLVs begin.
        (0x20, _, _) | (0x21, 0, 0..=2) => length,
        (0x21, 1, 0..=2) => 12,
        (0x21, 2, 0..=2) => 36,
        (0x21, 3, 0..=2) => 216,
        (0x21, _, _) => return Err(Malformed::Family(family)),
        _ => return Err(Malformed::Command(command)),
    };
    if length < addresses_bytes {
        return Err(Malformed::Addresses(length));
    }
    let Some(block) = rest.get(..length) else { return Ok(Parsed::Partial) };
    let (addresses, tlvs) = block.split_at(addresses_bytes);
    check_tlvs(tlvs)?;
    let source = match (command, family) {
        (0x21, 0x11 | 0x12) => client(Ipv4Addr::from, addresses),
        (0x21, 0x21 | 0x22) => client(Ipv6Addr::from, addresses),
        _ => Source::Socket,
    };
    Ok(Parsed::Done { consumed: V2_HEAD_BYTES + length, source })
}

/// Source address, destination address, source port, destination port, of `N`, `N`, 2 and 2 bytes.
fn client<const N: usize, A: Into<IpAddr>>(address: fn([u8; N]) -> A, addresses: &[u8]) -> Source {
    let (source, after) = addresses.split_first_chunk().expect("the caller gives 2 * N + 4 bytes");
    let port = u16::from_be_bytes([after[N], after[N + 1]]);
    Source::Client(SocketAddr::new(address(*source).into(), port))
}

/// A type, two bytes of length, and as many bytes; nothing is left over (section 2.2).
fn check_tlvs(mut rest: &[u8]) -> Result<(), Malformed> {
    while let Some(([_, high, low], after)) = rest.split_first_chunk() {
        rest = after.get(usize::from(u16::from_be_bytes([*high, *low]))..).ok_or(Malformed::Tlv)?;
    }
    if rest.is_empty() { Ok(()) } else { Err(Malformed::Tlv) }
}

#[cfg(test)]
mod tests {
    use ppp::{HeaderResult, PartialResult, v1, v2};
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    fn check(bytes: &[u8], want: Result<Parsed, Malformed>) {
        assert_eq!(parse(bytes), want, "{:?}", bytes.escape_ascii().to_string());
    }

    fn done(consumed: usize, source: &str) -> Result<Parsed, Malformed> {
        let source = if source == "socket" { Source::Socket } else { Source::Client(source.parse().unwrap()) };
        Ok(Parsed::Done { consumed, source })
    }

    #[test]
    fn lines() {
        const PARTIAL: Result<Parsed, Malformed> = Ok(Parsed::Partial);
        const LINE: Result<Parsed, Malformed> = Err(Malformed::Line);
        check(b"", PARTIAL);
        check(b"P", PARTIAL);
        check(b"PROXY", PARTIAL);
        check(b"PROXY TCP", PARTIAL);
        check(b"PROXY UNK", PARTIAL);
        check(b"PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\nGET", done(45, "192.0.2.1:56324"));
        check(b"PROXY TCP4 0.0.0.0 255.255.255.255 0 65535\r\n", done(44, "0.0.0.0:0"));
        check(b"PROXY TCP6 2001:db8::1 ::1 1 2\r\n", done(32, "[2001:db8::1]:1"));
        check(b"PROXY TCP6 2001:DB8::1 ::1 1 2\r\n", done(32, "[2001:db8::1]:1"));
        check(b"PROXY TCP6 ::ffff:192.0.2.1 ::1 1 2\r\n", done(37, "[::ffff:192.0.2.1]:1"));
        check(b"PROXY UNKNOWN\r\n\r\n", done(15, "socket"));
        check(b"PROXY UNKNOWN ffff::1 ::2 65535 1\r\n", done(35, "socket"));
        check(b"PROXY UNKNOWN \xFF  any \r \n thing\r\n", done(32, "socket"));
        check(b"GET / HTTP/1.1\r\n", Err(Malformed::Missing));
        check(b"PO", Err(Malformed::Missing));
        check(b"proxy TCP4", Err(Malformed::Missing));
        check(b" PROXY TCP4", Err(Malformed::Missing));
        check(b"PROXY\r\n", Err(Malformed::Missing));
        check(b"PROXY  ", LINE);
        check(b"PROXY \r\n", LINE);
        check(b"PROXY TCP5", LINE);
        check(b"PROXY TCP44", LINE);
        check(b"PROXY UDP4", LINE);
        check(b"PROXY UNKNOWNS", LINE);
        check(b"PROXY UNKNOWN\n", LINE);
        check(b"PROXY UNKNOWN\rX", LINE);
        check(b"PROXY TCP4\r\n", LINE);
        check(b"PROXY TCP4  ", LINE);
        check(b"PROXY TCP4 256", LINE);
        check(b"PROXY TCP4 01", LINE);
        check(b"PROXY TCP4 1.2.3.4.", LINE);
        check(b"PROXY TCP4 1.2.3 ", LINE);
        check(b"PROXY TCP4 ::", LINE);
        check(b"PROXY TCP6 1.", LINE);
        check(b"PROXY TCP6 12345", LINE);
        check(b"PROXY TCP6 ::1::", LINE);
        check(b"PROXY TCP6 1:2:3:4:5:6:7:8:", LINE);
        check(b"PROXY TCP6 ::%", LINE);
        check(b"PROXY TCP4 1.2.3.4 5.6.7.8 01", LINE);
        check(b"PROXY TCP4 1.2.3.4 5.6.7.8 +1", LINE);
        check(b"PROXY TCP4 1.2.3.4 5.6.7.8 -", LINE);
        check(b"PROXY TCP4 1.2.3.4 5.6.7.8 65536", LINE);
        check(b"PROXY TCP4 1.2.3.4 5.6.7.8 1\r", LINE);
        check(b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2 ", LINE);
        check(b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\n", LINE);
        check(b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\rX", LINE);
        check(b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\t\r\n", LINE);
    }

    #[test]
    fn the_length_of_a_line_is_bounded() {
        let unknown = |bytes: usize, end: &str| [&*format!("{:x<bytes$}", "PROXY UNKNOWN "), end].concat().into_bytes();
        check(&unknown(105, "\r\n"), done(107, "socket"));
        check(&unknown(105, ""), Ok(Parsed::Partial));
        check(&unknown(105, "\r"), Ok(Parsed::Partial));
        check(&unknown(106, ""), Err(Malformed::LineTooLong));
        check(&unknown(106, "\r"), Err(Malformed::LineTooLong));
        check(&unknown(106, "\r\n"), Err(Malformed::LineTooLong));
        check(&unknown(5000, "\r\n"), Err(Malformed::LineTooLong));
        // Both addresses are addresses, but with the ports they are a byte too many.
        let mapped = "0000:0000:0000:0000:0000:ffff:111.111.111.111";
        check(format!("PROXY TCP6 {mapped} {mapped}").as_bytes(), Err(Malformed::Line));
        check(format!("PROXY TCP6 {mapped} {}", &mapped[..44]).as_bytes(), Ok(Parsed::Partial));
    }

    /// A v2 header whose length is true.
    fn v2_header(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
        let length = u16::try_from(block.len()).unwrap().to_be_bytes();
        [V2_SIGNATURE, &[command, family][..], &length, block].concat()
    }

    #[test]
    fn blocks() {
        const V4: &[u8] = &[192, 0, 2, 1, 198, 51, 100, 1, 0x12, 0x34, 0, 80];
        const TLVS: &[u8] = &[4, 0, 0, 0xEA, 0, 2, 1, 2];
        let v6 = [&Ipv6Addr::LOCALHOST.octets()[..], &[9; 16], &[0, 80, 1, 1]].concat();
        let check = |command, family, parts: &[&[u8]], want| {
            check(&[&v2_header(command, family, &parts.concat())[..], b"GET"].concat(), want);
        };
        check(0x21, 0x11, &[V4], done(28, "192.0.2.1:4660"));
        check(0x21, 0x12, &[V4], done(28, "192.0.2.1:4660"));
        check(0x21, 0x11, &[V4, TLVS], done(36, "192.0.2.1:4660"));
        check(0x21, 0x21, &[&v6], done(52, "[::1]:80"));
        check(0x21, 0x22, &[&v6, TLVS], done(60, "[::1]:80"));
        check(0x21, 0x31, &[&[b'/'; 216], TLVS], done(240, "socket"));
        check(0x21, 0x00, &[], done(16, "socket"));
        check(0x21, 0x00, &[&[1, 2, 3, 4]], done(20, "socket"));
        check(0x21, 0x10, &[V4], done(28, "socket"));
        check(0x20, 0x00, &[], done(16, "socket"));
        check(0x20, 0x11, &[V4], done(28, "socket"));
        check(0x20, 0xFF, &[b"x"], done(17, "socket"));
        check(0x21, 0x11, &[V4, &[4, 0x0F, 0xF1], &[0; 4081]], done(4112, "192.0.2.1:4660"));
        check(0x21, 0x11, &[V4, &[4, 0x0F, 0xF2], &[0; 4082]], Err(Malformed::BlockTooLong(4097)));
        check(0x20, 0x00, &[&[0; 4097]], Err(Malformed::BlockTooLong(4097)));
        check(0x22, 0x11, &[V4], Err(Malformed::Command(0x22)));
        check(0x11, 0x11, &[V4], Err(Malformed::Command(0x11)));
        check(0x21, 0x41, &[V4], Err(Malformed::Family(0x41)));
        check(0x21, 0x13, &[V4], Err(Malformed::Family(0x13)));
        check(0x21, 0x11, &[&V4[1..]], Err(Malformed::Addresses(11)));
        check(0x21, 0x21, &[V4], Err(Malformed::Addresses(12)));
        check(0x21, 0x31, &[&[0; 215]], Err(Malformed::Addresses(215)));
        check(0x21, 0x11, &[V4, &[4]], Err(Malformed::Tlv));
        check(0x21, 0x11, &[V4, &[4, 0, 1]], Err(Malformed::Tlv));
        check(0x21, 0x11, &[V4, TLVS, &[4, 0]], Err(Malformed::Tlv));
    }

    fn text_header() -> impl Strategy<Value = (Vec<u8>, Source)> {
        let ports = any::<(u16, u16)>();
        let v6 = prop_oneof![
            any::<u128>().prop_map(Ipv6Addr::from),
            // Zeros, so that `::` stands everywhere.
            prop::array::uniform8(prop_oneof![Just(0u16), any::<u16>()]).prop_map(Ipv6Addr::from),
            any::<Ipv4Addr>().prop_map(|v4| v4.to_ipv6_mapped()),
        ];
        // Written out in full, or as `inet_ntop` does.
        let v6 = (v6, any::<bool>()).prop_map(|(address, full)| {
            let groups = address.segments().map(|group| format!("{group:04X}"));
            (address, if full { groups.join(":") } else { address.to_string() })
        });
        let ignored = prop_oneof![prop::collection::vec(any::<u8>(), 0..90), "[ a-f0-9:.]{0,90}".prop_map(Vec::from)];
        prop_oneof![
            (any::<(Ipv4Addr, Ipv4Addr)>(), ports).prop_map(|((from, to), (port, to_port))| {
                let line = format!("PROXY TCP4 {from} {to} {port} {to_port}\r\n");
                (line.into_bytes(), Source::Client(SocketAddr::new(from.into(), port)))
            }),
            (v6.clone(), v6, ports).prop_map(|((address, from), (_, to), (port, to_port))| {
                let line = format!("PROXY TCP6 {from} {to} {port} {to_port}\r\n");
                (line.into_bytes(), Source::Client(SocketAddr::new(address.into(), port)))
            }),
            ignored.prop_filter("the line ends at the first CRLF", |bytes| !contains(bytes, b"\r\n")).prop_map(
                |ignored| {
                    let gap: &[u8] = if ignored.is_empty() { b"" } else { b" " };
                    ([b"PROXY UNKNOWN", gap, &ignored, b"\r\n"].concat(), Source::Socket)
                }
            ),
        ]
    }

    fn binary_header() -> impl Strategy<Value = (Vec<u8>, Source)> {
        let tlvs = prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..40)), 0..4);
        let tlvs = tlvs.prop_map(|tlvs| {
            let tlv = |(kind, value): (u8, Vec<u8>)| [&[kind, 0, value.len() as u8], &value[..]].concat();
            tlvs.into_iter().flat_map(tlv).collect::<Vec<u8>>()
        });
        let addresses = prop::collection::vec(any::<u8>(), 216);
        (0x20..=0x21u8, 0..=3u8, 0..=2u8, addresses, tlvs).prop_map(|(command, family, transport, addresses, tlvs)| {
            let addresses = &addresses[..[0, 12, 36, 216][usize::from(family)]];
            let port = |at: usize| u16::from_be_bytes([addresses[at], addresses[at + 1]]);
            let source = match (command, family, transport) {
                (0x21, 1, 1..) => {
                    let octets: [u8; 4] = addresses[..4].try_into().unwrap();
                    Source::Client((octets, port(8)).into())
                }
                (0x21, 2, 1..) => {
                    let octets: [u8; 16] = addresses[..16].try_into().unwrap();
                    Source::Client((octets, port(32)).into())
                }
                _ => Source::Socket,
            };
            (v2_header(command, family << 4 | transport, &[addresses, &tlvs].concat()), source)
        })
    }

    fn header() -> impl Strategy<Value = (Vec<u8>, Source)> {
        prop_oneof![text_header(), binary_header()]
    }

    fn contains(bytes: &[u8], part: &[u8]) -> bool {
        bytes.windows(part.len()).any(|window| window == part)
    }

    /// A verdict that two parsers can share.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Verdict {
        Partial,
        Refused,
        Done { consumed: usize, source: Source },
    }

    fn ours(bytes: &[u8]) -> Verdict {
        match parse(bytes) {
            Ok(Parsed::Partial) => Verdict::Partial,
            Ok(Parsed::Done { consumed, source }) => Verdict::Done { consumed, source },
            Err(_) => Verdict::Refused,
        }
    }

    fn theirs(bytes: &[u8]) -> Verdict {
        let client = |address: IpAddr, port| Source::Client(SocketAddr::new(address, port));
        match HeaderResult::parse(bytes) {
            result if result.is_incomplete() => Verdict::Partial,
            HeaderResult::V1(Ok(header)) => {
                let source = match header.addresses {
                    v1::Addresses::Unknown => Source::Socket,
                    v1::Addresses::Tcp4(ends) => client(ends.source_address.into(), ends.source_port),
                    v1::Addresses::Tcp6(ends) => client(ends.source_address.into(), ends.source_port),
                };
                Verdict::Done { consumed: header.header.len(), source }
            }
            HeaderResult::V2(Ok(header)) => {
                let source = match (header.command, header.protocol, header.addresses) {
                    (v2::Command::Local, _, _) | (_, v2::Protocol::Unspecified, _) => Source::Socket,
                    (_, _, v2::Addresses::IPv4(ends)) => client(ends.source_address.into(), ends.source_port),
                    (_, _, v2::Addresses::IPv6(ends)) => client(ends.source_address.into(), ends.source_port),
                    (_, _, v2::Addresses::Unix(_) | v2::Addresses::Unspecified) => Source::Socket,
                };
                // Ppp hands out TLVs one by one; a broken one is an item.
                if header.command == v2::Command::Proxy && header.tlvs().any(|tlv| tlv.is_err()) {
                    return Verdict::Refused;
                }
                Verdict::Done { consumed: header.len(), source }
            }
            HeaderResult::V1(Err(_)) | HeaderResult::V2(Err(_)) => Verdict::Refused,
        }
    }

    /// Where ppp does not do what the text says: by what such bytes are known, and some of them.
    struct Deviation {
        reason: &'static str,
        example: &'static [u8],
        applies: fn(&[u8], Verdict, Verdict) -> bool,
    }

    use Verdict::{Done, Partial, Refused};

    const DEVIATIONS: [Deviation; 9] = [
        Deviation {
            reason: "laxer: ppp looks at fields once all four have begun, and awaits more of a finished line; \
                     no ending makes it accept them either",
            example: b"PROXY TCP4 300.",
            applies: |bytes, ours, theirs| {
                (ours, theirs) == (Refused, Partial) && bytes.starts_with(b"P") && ppp_accepts_no_ending_of(bytes)
            },
        },
        Deviation {
            reason: "laxer: ppp takes a sign before a port; ports are decimal integers of 0 to 65535",
            example: b"PROXY TCP4 1.2.3.4 5.6.7.8 +1 2\r\n",
            applies: |bytes, ours, theirs| ours == Refused && theirs != Refused && contains(bytes, b" +"),
        },
        Deviation {
            reason: "laxer: ppp takes a space for the CR of the CRLF",
            example: b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2 \n",
            applies: |bytes, ours, theirs| match (ours, theirs) {
                (_, Done { .. }) => contains(bytes, b" \n"),
                (Refused, Partial) => bytes.ends_with(b" "),
                _ => false,
            },
        },
        Deviation {
            reason: "stricter: ppp refuses an empty last port, though its digits may be on their way",
            example: b"PROXY TCP4 1.2.3.4 5.6.7.8 1 ",
            applies: |bytes, ours, theirs| {
                (ours, theirs) == (Partial, Refused)
                    && bytes.ends_with(b" ")
                    && bytes.split(|b| *b == b' ').count() == 6
            },
        },
        Deviation {
            reason: "stricter: ppp awaits the end of a line of UNKNOWN with more than four words; anything before \
                     the CRLF is ignored",
            example: b"PROXY UNKNOWN a b c d e\r\n",
            applies: |bytes, ours, theirs| {
                let line = bytes.split(|b| *b == b'\r').next().unwrap_or_default();
                matches!((ours, theirs), (Done { .. }, Partial))
                    && line.starts_with(b"PROXY UNKNOWN ")
                    && line.split(|b| *b == b' ').count() > 6
            },
        },
        Deviation {
            reason: "stricter: ppp wants UTF-8 in a line of UNKNOWN; anything before the CRLF is ignored",
            example: b"PROXY UNKNOWN \xFF\r\n",
            applies: |bytes, ours, theirs| {
                let line = bytes.split_inclusive(|b| *b == b'\r').next().unwrap_or_default();
                let next = bytes.get(line.len()).copied();
                ours != Refused
                    && theirs == Refused
                    && line.starts_with(b"PROXY UNKNOWN ")
                    && str::from_utf8(&line.iter().copied().chain(next).collect::<Vec<u8>>()).is_err()
            },
        },
        Deviation {
            reason: "stricter: ppp ends a line of UNKNOWN at a CR without LF; anything before the CRLF is ignored",
            example: b"PROXY UNKNOWN a\rb\r\n",
            applies: |bytes, ours, theirs| {
                let cr = bytes.iter().position(|b| *b == b'\r');
                ours != Refused
                    && matches!(theirs, Refused | Partial)
                    && bytes.starts_with(b"PROXY UNKNOWN ")
                    && cr.and_then(|cr| bytes.get(cr + 1)).is_some_and(|b| *b != b'\n')
            },
        },
        Deviation {
            reason: "laxer: ppp takes v2 blocks up to 65535 bytes, as the text does; the bound is ours",
            example: b"\r\n\r\n\0\r\nQUIT\n\x21\x00\x10\x01",
            applies: |bytes, ours, theirs| {
                let length = bytes.get(14..16).map(|length| u16::from_be_bytes([length[0], length[1]]));
                bytes.starts_with(V2_SIGNATURE)
                    && ours == Refused
                    && theirs != Refused
                    && length.is_some_and(|length| length > 4096)
            },
        },
        Deviation {
            reason: "stricter: ppp looks at the family of LOCAL; the block is discarded including the family",
            example: b"\r\n\r\n\0\r\nQUIT\n\x20\x51\x00\x00",
            applies: |bytes, ours, theirs| {
                bytes.starts_with(V2_SIGNATURE) && bytes.get(12) == Some(&0x20) && ours != Refused && theirs == Refused
            },
        },
    ];

    fn ppp_accepts_no_ending_of(bytes: &[u8]) -> bool {
        let fields = ["", " 0", " 0 0", " 0.0.0.0 0 0", " :: 0 0"];
        ENDINGS.iter().flat_map(|ending| fields.map(|fields| (ending, fields))).all(|(ending, fields)| {
            ["\r\n", "\n"].iter().all(|end| {
                let whole = [bytes, ending.as_bytes(), fields.as_bytes(), end.as_bytes()].concat();
                !matches!(theirs(&whole), Done { .. })
            })
        })
    }

    /// Both verdicts are one, or a deviation says why not.
    fn compare(bytes: &[u8]) -> Result<(), TestCaseError> {
        let (ours, theirs) = (ours(bytes), theirs(bytes));
        let known = DEVIATIONS.iter().any(|row| (row.applies)(bytes, ours, theirs));
        prop_assert!(ours == theirs || known, "{}: {ours:?}, ppp: {theirs:?}", bytes.escape_ascii());
        Ok(())
    }

    #[test]
    fn every_deviation_exists() {
        for row in &DEVIATIONS {
            let (ours, theirs) = (ours(row.example), theirs(row.example));
            assert_ne!(ours, theirs, "{}", row.reason);
            let applying = DEVIATIONS.iter().filter(|other| (other.applies)(row.example, ours, theirs));
            assert_eq!(applying.map(|other| other.reason).collect::<Vec<_>>(), [row.reason]);
        }
    }

    #[derive(Clone, Debug)]
    enum Edit {
        Replace(u8),
        Insert(u8),
        Delete,
    }

    /// Up to three bytes changed, most of them to those that mean something.
    fn edits() -> impl Strategy<Value = Vec<(Index, Edit)>> {
        let byte = prop_oneof![prop::sample::select(&b" \r\n0129+-.:afPTU\0\x11\x20\x21"[..]), any::<u8>()];
        let edit = prop_oneof![byte.clone().prop_map(Edit::Replace), byte.prop_map(Edit::Insert), Just(Edit::Delete)];
        prop::collection::vec((any::<Index>(), edit), 1..=3)
    }

    proptest! {
        #[test]
        fn a_header_is_read_wherever_it_is_split(
            (bytes, source) in header(),
            tail in prop::collection::vec(any::<u8>(), 0..50),
        ) {
            for end in 0..bytes.len() {
                prop_assert_eq!(parse(&bytes[..end]), Ok(Parsed::Partial), "{}", bytes[..end].escape_ascii());
            }
            let want = Ok(Parsed::Done { consumed: bytes.len(), source });
            prop_assert_eq!(parse(&bytes), want);
            prop_assert_eq!(parse(&[bytes, tail].concat()), want);
        }

        #[test]
        fn a_verdict_stays((bytes, _) in header(), edits in edits(), tail in prop::collection::vec(any::<u8>(), 1..9)) {
            let bytes = [edited(bytes, &edits), tail].concat();
            let mut last = Verdict::Partial;
            for end in 0..=bytes.len() {
                let verdict = ours(&bytes[..end]);
                prop_assert!(last == Partial || verdict == last, "{}", bytes[..end].escape_ascii());
                last = verdict;
            }
        }

        #[test]
        fn ppp_agrees_on_headers_and_their_beginnings(
            (bytes, _) in header(),
            tail in prop::collection::vec(any::<u8>(), 0..9),
        ) {
            let bytes = [bytes, tail].concat();
            for end in 0..=bytes.len() {
                compare(&bytes[..end])?;
            }
        }

        #[test]
        fn ppp_agrees_on_headers_gone_wrong((bytes, _) in header(), edits in edits()) {
            let bytes = edited(bytes, &edits);
            for end in 0..=bytes.len() {
                compare(&bytes[..end])?;
            }
        }

        #[test]
        fn ppp_agrees_on_any_bytes(
            start in prop::sample::select(vec![&b""[..], V1_START, b"PROXY TCP6 ", b"PROXY UNKNOWN", V2_SIGNATURE]),
            bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            compare(&[start, &bytes].concat())?;
        }
    }

    fn edited(mut bytes: Vec<u8>, edits: &[(Index, Edit)]) -> Vec<u8> {
        for (index, edit) in edits {
            let at = index.index(bytes.len());
            match edit {
                Edit::Replace(byte) => bytes[at] = *byte,
                Edit::Insert(byte) => bytes.insert(at, *byte),
                Edit::Delete => drop(bytes.remove(at)),
            }
        }
        bytes
    }
}
