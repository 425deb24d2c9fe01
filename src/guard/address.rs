//! Who is calling: the client's address behind balancers, and what of it a rate limit counts by.
//!
//! In: the peer of the socket (or of the PROXY header), the request's headers, the trusted networks.
//! Out: an address, and by what it was decided. An IPv4-mapped IPv6 address is IPv4 everywhere.
//! Never: believes a header of a peer that is not trusted, takes an address left of what it cannot read, allocates
//! without a forwarding header, fails.
//! At the limit: of a chain the rightmost 64 elements are looked at; if all are trusted, the leftmost of these is
//! taken.
//!
//! Most proxies add to one of `Forwarded` and `X-Forwarded-For` and pass the other on as the client wrote it (nginx
//! does). So where both are there and name two clients, neither is believed and the peer's own address is taken: a client
//! can hide behind its balancer that way, but not be somebody else.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv6Addr};

use http::HeaderMap;
use http::header::FORWARDED;
use ipnet::{IpNet, Ipv4Net};

const X_FORWARDED_FOR: &str = "x-forwarded-for";
/// The most elements of a chain that are looked at.
const ELEMENTS_MAX: usize = 64;

/// The networks whose forwarding headers are believed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trusted {
    /// None of them lies in `::ffff:0:0/96`.
    networks: Vec<IpNet>,
}

/// Who is calling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    pub address: IpAddr,
    pub decided: Decided,
}

/// Where a client's address comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decided {
    /// The peer itself: it is not trusted, sent no forwarding header, one whose last element names no address, or two
    /// that disagree.
    Socket,
    Forwarded,
    XForwardedFor,
    /// The peer itself, which is private, not trusted, and sent a forwarding header: most likely a balancer that
    /// `proxies.trusted` lacks, so that its own address is recorded for every visitor.
    UntrustedPrivatePeer,
}

impl Trusted {
    #[must_use]
    pub fn new(mut networks: Vec<IpNet>) -> Self {
        for network in &mut networks {
            if let IpNet::V6(v6) = network
                && let Some(v4) = v6.addr().to_ipv4_mapped()
                && let Some(Ok(mapped)) = v6.prefix_len().checked_sub(96).map(|bits| Ipv4Net::new(v4, bits))
            {
                *network = IpNet::V4(mapped);
            }
        }
        Self { networks }
    }

    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.networks.iter().any(|network| network.contains(&address))
    }
}

/// The client of a request: the rightmost address of the chain that is not trusted; the leftmost if all are.
/// The chain is that of `Forwarded` (RFC 7239) or of `X-Forwarded-For`, lines joined in order. It ends, from the
/// right, at the first element that names no address: the hop right of that, which is trusted, is then the client.
#[must_use]
pub fn client(peer: IpAddr, headers: &HeaderMap, trusted: &Trusted) -> Client {
    let peer = peer.to_canonical();
    if !trusted.contains(peer) {
        let forwards = headers.contains_key(FORWARDED) || headers.contains_key(X_FORWARDED_FOR);
        let decided = if forwards && is_private(peer) { Decided::UntrustedPrivatePeer } else { Decided::Socket };
        return Client { address: peer, decided };
    }
    let forwarded = headers.contains_key(FORWARDED).then(|| {
        let lines = headers.get_all(FORWARDED).iter().rev();
        let elements = lines.flat_map(|line| FromRight { rest: Some(line.as_bytes()), separator: b',' });
        walk(elements.map(forwarded_for), trusted)
    });
    let x_forwarded_for = headers.contains_key(X_FORWARDED_FOR).then(|| {
        let lines = headers.get_all(X_FORWARDED_FOR).iter().rev();
        let elements = lines.flat_map(|line| line.as_bytes().rsplit(|byte| *byte == b','));
        walk(elements.map(x_forwarded_for), trusted)
    });
    match (forwarded, x_forwarded_for) {
        (Some(one), Some(other)) if one != other => Client { address: peer, decided: Decided::Socket },
        (Some(Some(address)), _) => Client { address, decided: Decided::Forwarded },
        (_, Some(Some(address))) => Client { address, decided: Decided::XForwardedFor },
        _ => Client { address: peer, decided: Decided::Socket },
    }
}

/// Addresses that no visitor on the Internet has: loopback, RFC 1918, RFC 4193, link-local, and RFC 6598 (CGNAT).
pub fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [first, second, ..] = v4.octets();
            v4.is_loopback() || v4.is_private() || v4.is_link_local() || (first == 100 && second >> 6 == 1)
        }
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unique_local() || v6.is_unicast_link_local(),
    }
}

/// Through the elements from right to left. None: not even the first has an address.
fn walk(elements: impl Iterator<Item = Option<IpAddr>>, trusted: &Trusted) -> Option<IpAddr> {
    let mut last = None;
    for address in elements.take(ELEMENTS_MAX).map_while(|address| address) {
        last = Some(address);
        if !trusted.contains(address) {
            break;
        }
    }
    last
}

/// The parts between separators outside of quoted strings, from right to left: what a proxy appended is then read
/// the same, whatever stands left of it. From the left, a quote that the client opened would swallow it.
struct FromRight<'a> {
    rest: Option<&'a [u8]>,
    separator: u8,
}

impl<'a> Iterator for FromRight<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let rest = self.rest.take()?;
        let mut quoted = false;
        for (at, byte) in rest.iter().enumerate().rev() {
            if *byte == b'"' {
                let backslashes = rest[..at].iter().rev().take_while(|byte| **byte == b'\\').count();
                quoted ^= backslashes % 2 == 0;
            } else if *byte == self.separator && !quoted {
                self.rest = Some(&rest[..at]);
                return Some(&rest[at + 1..]);
            }
        }
        Some(rest)
    }
}

/// The address that a forwarded-element names (RFC 7239, section 4): `name=value` pairs, among them one `for`.
fn forwarded_for(element: &[u8]) -> Option<IpAddr> {
    let mut found = None;
    for pair in (FromRight { rest: Some(element), separator: b';' }) {
        let pair = str::from_utf8(pair).ok()?.trim_matches([' ', '\t']);
        if pair.is_empty() {
            continue;
        }
        let (name, value) = pair.split_once('=')?;
        let value = unquoted(value)?;
        if name.eq_ignore_ascii_case("for") && found.replace(node(&value)?).is_some() {
            return None;
        }
    }
    found
}

/// The text of a token or quoted-string (RFC 9110, section 5.6.4). Characters that no token has pass: proxies are
/// known to leave out the quotes around an address with a port.
fn unquoted(value: &str) -> Option<Cow<'_, str>> {
    let Some(inside) = value.strip_prefix('"') else {
        return (!value.is_empty() && !value.contains('"')).then_some(Cow::Borrowed(value));
    };
    let inside = inside.strip_suffix('"')?;
    if !inside.contains(['\\', '"']) {
        return Some(Cow::Borrowed(inside));
    }
    let mut text = String::with_capacity(inside.len());
    let mut characters = inside.chars();
    while let Some(character) = characters.next() {
        text.push(match character {
            '\\' => characters.next()?,
            '"' => return None,
            character => character,
        });
    }
    Some(Cow::Owned(text))
}

/// The address of a node with or without a port (RFC 7239, section 6). None: `unknown`, `_obfuscated`, or no node.
fn node(text: &str) -> Option<IpAddr> {
    let (address, port) = match text.strip_prefix('[') {
        Some(text) => {
            let (address, port) = text.split_once(']')?;
            (IpAddr::V6(address.parse().ok()?), port)
        }
        None => {
            let (address, port) = text.split_at(text.find(':').unwrap_or(text.len()));
            (IpAddr::V4(address.parse().ok()?), port)
        }
    };
    let is_port = match port.as_bytes() {
        [] => true,
        [b':', b'_', name @ ..] => {
            !name.is_empty() && name.iter().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(byte))
        }
        [b':', digits @ ..] => matches!(digits.len(), 1..=5) && digits.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    is_port.then_some(address.to_canonical())
}

/// The address that an element of `X-Forwarded-For` is: also IPv6 without brackets, which then has no port.
fn x_forwarded_for(element: &[u8]) -> Option<IpAddr> {
    let text = str::from_utf8(element).ok()?.trim_matches([' ', '\t']);
    match text.parse::<Ipv6Addr>() {
        Ok(bare) => Some(IpAddr::V6(bare).to_canonical()),
        Err(_) => node(text),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use http::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// 10.0.0.0/8, fd00::/16 and 192.0.2.0/24, the last in mapped form.
    fn trusted() -> Trusted {
        let networks = ["10.0.0.0/8", "fd00::/16", "::ffff:192.0.2.0/120"];
        Trusted::new(networks.map(|network| network.parse().unwrap()).to_vec())
    }

    fn headers(lines: &[(&str, &[u8])]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_bytes(value).unwrap());
        }
        headers
    }

    fn check(peer: &str, lines: &[(&str, &str)], address: &str, decided: Decided) {
        let bytes: Vec<(&str, &[u8])> = lines.iter().map(|(name, value)| (*name, value.as_bytes())).collect();
        let got = client(ip(peer), &headers(&bytes), &trusted());
        assert_eq!(got, Client { address: ip(address), decided }, "{peer} {lines:?}");
    }

    const F: &str = "Forwarded";
    const X: &str = "X-Forwarded-For";

    #[test]
    fn peers() {
        use Decided::{Socket, UntrustedPrivatePeer, XForwardedFor};
        check("203.0.113.1", &[], "203.0.113.1", Socket);
        check("10.0.0.1", &[], "10.0.0.1", Socket);
        check("::ffff:203.0.113.1", &[], "203.0.113.1", Socket);
        check("203.0.113.1", &[(X, "1.1.1.1")], "203.0.113.1", Socket);
        check("10.0.0.1", &[(X, "1.1.1.1")], "1.1.1.1", XForwardedFor);
        check("::ffff:10.0.0.1", &[(X, "1.1.1.1")], "1.1.1.1", XForwardedFor);
        check("192.0.2.9", &[(X, "1.1.1.1")], "1.1.1.1", XForwardedFor);
        check("fd00::9", &[(X, "1.1.1.1")], "1.1.1.1", XForwardedFor);
        for private in ["127.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.0.1", "100.64.0.1", "100.127.255.255"] {
            check(private, &[(X, "1.1.1.1")], private, UntrustedPrivatePeer);
            check(private, &[(F, "for=1.1.1.1")], private, UntrustedPrivatePeer);
            check(&format!("::ffff:{private}"), &[(X, "1.1.1.1")], private, UntrustedPrivatePeer);
            check(private, &[], private, Socket);
        }
        for private in ["::1", "fc00::1", "fdff::1", "fe80::1", "febf::1"] {
            check(private, &[(X, "")], private, UntrustedPrivatePeer);
        }
        for public in ["100.63.0.1", "100.128.0.1", "172.32.0.1", "fe00::1", "2001:db8::1", "::"] {
            check(public, &[(X, "1.1.1.1")], public, Socket);
        }
    }

    #[test]
    fn x_forwarded_for_chains() {
        let check = |lines: &[&str], address| {
            let decided = if address == "10.0.0.1" { Decided::Socket } else { Decided::XForwardedFor };
            let lines: Vec<(&str, &str)> = lines.iter().map(|line| (X, *line)).collect();
            check("10.0.0.1", &lines, address, decided);
        };
        check(&["1.1.1.1, 2.2.2.2"], "2.2.2.2");
        check(&["1.1.1.1,2.2.2.2,10.9.9.9"], "2.2.2.2");
        check(&["1.1.1.1", "2.2.2.2, 10.9.9.9", "192.0.2.7"], "2.2.2.2");
        check(&["10.3.3.3, 10.2.2.2"], "10.3.3.3");
        check(&["1.2.3.4:5"], "1.2.3.4");
        check(&["\t 1.2.3.4 \t"], "1.2.3.4");
        check(&["::ffff:1.2.3.4"], "1.2.3.4");
        check(&["2001:db8::1"], "2001:db8::1");
        check(&["[2001:db8::1]"], "2001:db8::1");
        check(&["[2001:db8::1]:5"], "2001:db8::1");
        // Garbage ends the walk, and whatever is left of it is not believed.
        for garbage in [
            "",
            "unknown",
            "_x",
            "\"1.2.3.4\"",
            "1.2.3.4:",
            "1.2.3.4:123456",
            "1.2.3",
            "01.2.3.4",
            "1.2.3.4 5",
            "[::1",
            "[::1]5",
            "[1.2.3.4]",
            "::1%1",
            "é",
            "1.2.3.4;x",
            "for=1.2.3.4",
        ] {
            check(&[&format!("6.6.6.6, {garbage}, 10.2.2.2")], "10.2.2.2");
            check(&[&format!("6.6.6.6, {garbage}")], "10.0.0.1");
            check(&["6.6.6.6", garbage], "10.0.0.1");
        }
    }

    #[test]
    fn two_headers_that_disagree() {
        check("10.0.0.1", &[(F, "for=1.2.3.4"), (X, "1.2.3.4")], "1.2.3.4", Decided::Forwarded);
        check("10.0.0.1", &[(F, "for=6.6.6.6"), (X, "1.2.3.4")], "10.0.0.1", Decided::Socket);
        check("10.0.0.1", &[(F, "for=unknown"), (X, "1.2.3.4")], "10.0.0.1", Decided::Socket);
    }

    #[test]
    fn forwarded_chains() {
        let check = |lines: &[&str], address| {
            let decided = if address == "10.0.0.1" { Decided::Socket } else { Decided::Forwarded };
            let lines: Vec<(&str, &str)> = lines.iter().map(|line| (F, *line)).collect();
            check("10.0.0.1", &lines, address, decided);
        };
        check(&["for=1.2.3.4"], "1.2.3.4");
        check(&["FOR=1.2.3.4;proto=http;by=9.9.9.9"], "1.2.3.4");
        check(&["proto=http; For=\"1.2.3.4:80\" ;;"], "1.2.3.4");
        check(&["for=\"[2001:db8::1]:4711\""], "2001:db8::1");
        check(&["for=\"[2001:db8::1]:_port\""], "2001:db8::1");
        check(&["for=\"[::ffff:1.2.3.4]\""], "1.2.3.4");
        check(&["for=\"1\\.2.3\\.4\""], "1.2.3.4");
        check(&["for=1.2.3.4:80"], "1.2.3.4");
        check(&["for=1.1.1.1, for=2.2.2.2;proto=https", "for=10.1.1.1"], "2.2.2.2");
        check(&["for=1.2.3.4;host=\"a, for=6.6.6.6; \\\", for=6.6.6.6\""], "1.2.3.4");
        check(&["for=1.2.3.4;host=\"\\\\\""], "1.2.3.4");
        check(&["for=\"6.6.6.6, for=1.2.3.4"], "1.2.3.4");
        check(&["for=\"6.6.6.6\\, for=\"[2001:db8::1]\""], "2001:db8::1");
        for garbage in [
            "",
            "for=",
            "for=unknown",
            "for=_hidden",
            "for=\"_hidden:80\"",
            "proto=http",
            "1.2.3.4",
            "for=2001:db8::1",
            "for=\"2001:db8::1\"",
            "for=\"1.2.3.4",
            "for=1.2.3.4\"",
            "for=\"\"1.2.3.4\"\"",
            "for=1.2.3.4;for=1.2.3.4",
            "for=1.2.3.4;x",
            "for=1.2.3.4;x=\"a\"\"b\"",
            "for=\"[::1]:\"",
            "for=\"[::1]:_\"",
            "for=\"1.2.3.4\\\"",
            "for = 1.2.3.4",
            "for=1.2.3.4;x=é\"",
        ] {
            check(&["for=6.6.6.6", &format!("{garbage}, for=10.2.2.2")], "10.2.2.2");
            check(&["for=6.6.6.6", garbage], "10.0.0.1");
        }
    }

    #[test]
    fn at_most_64_elements() {
        let hops = |count: usize| format!("1.1.1.1{}", ", 10.2.2.2".repeat(count));
        check("10.0.0.1", &[(X, &hops(63))], "1.1.1.1", Decided::XForwardedFor);
        check("10.0.0.1", &[(X, &hops(64))], "10.2.2.2", Decided::XForwardedFor);
    }

    #[test]
    fn networks_in_mapped_form() {
        let trusts = |network: &str, address: &str| Trusted::new(vec![network.parse().unwrap()]).contains(ip(address));
        assert!(trusts("::ffff:10.0.0.0/104", "10.1.1.1"));
        assert!(trusts("::ffff:10.0.0.0/104", "::ffff:10.1.1.1"));
        assert!(trusts("10.0.0.0/8", "::ffff:10.1.1.1"));
        assert!(trusts("::ffff:10.0.0.1/128", "10.0.0.1"));
        assert!(trusts("::ffff:0.0.0.0/96", "1.2.3.4"));
        assert!(!trusts("::ffff:10.0.0.0/104", "11.1.1.1"));
        assert!(!trusts("::/0", "1.2.3.4"));
        assert!(trusts("::/0", "2001:db8::1"));
        assert!(!Trusted::default().contains(ip("127.0.0.1")));
    }

    fn trusted_address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            any::<[u8; 3]>().prop_map(|[b, c, d]| Ipv4Addr::new(10, b, c, d).into()),
            any::<u8>().prop_map(|d| Ipv4Addr::new(192, 0, 2, d).into()),
            any::<u64>().prop_map(|low| Ipv6Addr::from_bits(0xfd00 << 112 | u128::from(low)).into()),
        ]
    }

    fn untrusted_address() -> impl Strategy<Value = IpAddr> {
        let any = prop_oneof![any::<Ipv4Addr>().prop_map(IpAddr::V4), any::<Ipv6Addr>().prop_map(IpAddr::V6)];
        any.prop_map(|address| address.to_canonical()).prop_filter("untrusted", |address| !trusted().contains(*address))
    }

    /// An element that names `address`, in one of the ways that there are.
    fn written(name: &str, address: IpAddr, way: u8) -> String {
        let mapped = |v4: Ipv4Addr| v4.to_ipv6_mapped();
        let node = match (address, way % 3) {
            (IpAddr::V4(v4), 0) => v4.to_string(),
            (IpAddr::V4(v4), 1) => format!("{v4}:{way}"),
            (IpAddr::V4(v4), _) => format!("[{}]:65535", mapped(v4)),
            (IpAddr::V6(v6), 0 | 1) => format!("[{v6}]"),
            (IpAddr::V6(v6), _) => format!("[{v6}]:{way}"),
        };
        match (name, way / 3 % 4) {
            (X, 0) => address.to_string(),
            (X, _) => node,
            (_, 0) => format!("for=\"{node}\""),
            (_, 1) => format!("proto=https;host=\"a,\\\"b\";For=\"{node}\""),
            (_, 2) => format!("FOR=\"{node}\"; by=_me"),
            (_, _) => format!("for=\"\\{node}\""),
        }
    }

    /// What a client can put into a header.
    fn anything() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![prop::sample::select(&b",;=\"\\ :[]_.1for"[..]), any::<u8>()];
        let bytes = prop::collection::vec(byte, 0..60);
        let spoofed = "(for=|For=\"?)?(10\\.0\\.0\\.1|6\\.6\\.6\\.6|\\[::1\\]:1|unknown)(\"|\\\\|, ?)?";
        prop_oneof![bytes, spoofed.prop_map(Vec::from)]
            .prop_filter("a header's value", |bytes| HeaderValue::from_bytes(bytes).is_ok())
    }

    /// A header: `left`, then the elements, each on the line of the one before or on a new one.
    fn chain(name: &'static str, left: Vec<u8>, elements: &[(IpAddr, u8, bool)]) -> HeaderMap {
        let mut lines = vec![left];
        for (address, way, same_line) in elements {
            let element = written(name, *address, *way);
            match lines.last_mut() {
                Some(line) if *same_line => line.extend([b", ", element.as_bytes()].concat()),
                _ => lines.push(element.into_bytes()),
            }
        }
        headers(&lines.iter().map(|line| (name, &line[..])).collect::<Vec<_>>())
    }

    proptest! {
        #[test]
        fn the_rightmost_untrusted_is_the_client(
            name in prop::sample::select(vec![F, X]),
            left in anything(),
            other in anything(),
            caller in (untrusted_address(), any::<u8>(), any::<bool>()),
            hops in prop::collection::vec((trusted_address(), any::<u8>(), any::<bool>()), 0..6),
            peer in trusted_address(),
        ) {
            let mut headers = chain(name, left, &[vec![caller], hops].concat());
            let decided = if name == F { Decided::Forwarded } else { Decided::XForwardedFor };
            prop_assert_eq!(client(peer, &headers, &trusted()), Client { address: caller.0, decided }, "{:?}", headers);
            // What the client wrote into the header that its proxy does not add to: at most it hides.
            headers.append(if name == F { X } else { F }, HeaderValue::from_bytes(&other).unwrap());
            let address = client(peer, &headers, &trusted()).address;
            prop_assert!(address == caller.0 || address == peer.to_canonical(), "{:?}", headers);
        }

        #[test]
        fn nothing_left_of_garbage_is_believed(
            name in prop::sample::select(vec![F, X]),
            garbage in prop::sample::select(
                vec!["unknown", "for=unknown", "for=_a", "", "for=\"", "\"", "x=1", "\\\"", "1.1.1"]
            ),
            left in anything(),
            hops in prop::collection::vec((trusted_address(), any::<u8>(), any::<bool>()), 0..6),
            peer in trusted_address(),
        ) {
            let left = [&left, ", ".as_bytes(), garbage.as_bytes()].concat();
            let got = client(peer, &chain(name, left, &hops), &trusted()).address;
            prop_assert_eq!(got, hops.first().map_or(peer, |hop| hop.0));
        }

        #[test]
        fn no_header_of_an_untrusted_peer_is_read(
            name in prop::sample::select(vec![F, X]),
            value in anything(),
            peer in untrusted_address(),
        ) {
            let got = client(peer, &headers(&[(name, &value)]), &trusted());
            let decided = if is_private(peer) { Decided::UntrustedPrivatePeer } else { Decided::Socket };
            prop_assert_eq!(got, Client { address: peer, decided });
        }

        #[test]
        fn any_header_gives_an_address_in_canonical_form(
            name in prop::sample::select(vec![F, X]),
            lines in prop::collection::vec(anything(), 1..4),
        ) {
            let lines: Vec<(&str, &[u8])> = lines.iter().map(|line| (name, &line[..])).collect();
            let got = client(ip("10.0.0.1"), &headers(&lines), &trusted()).address;
            prop_assert_eq!(got, got.to_canonical());
        }
    }
}
