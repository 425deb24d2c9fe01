//! Visitor: who is calling and for what. Pure.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, Method, header};

use crate::domain::visit::Kind;
use crate::guard::address::{self, Client, Trusted};

/// The other end of a connection, and whether its word is taken for who is behind it.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    pub address: IpAddr,
    pub trusted: bool,
    /// Whether the id that it gives a request is taken: it is trusted, or the balancer is that sent its address ahead of
    /// the request (PROXY protocol).
    pub names_requests: bool,
}

impl Peer {
    #[must_use]
    pub fn new(address: IpAddr, trusted: &Trusted) -> Self {
        let address = address.to_canonical();
        let trusted = trusted.contains(address);
        Self { address, trusted, names_requests: trusted }
    }

    /// Who is behind this one, by its PROXY header.
    #[must_use]
    pub fn in_front_of(self, address: IpAddr, trusted: &Trusted) -> Self {
        let client = Self::new(address, trusted);
        Self { names_requests: client.names_requests || self.names_requests, ..client }
    }

    /// The client's address. Headers are looked at only if a trusted peer sends them.
    #[must_use]
    pub fn client(&self, headers: &HeaderMap, trusted: &Trusted) -> IpAddr {
        if self.trusted { self.decide(headers, trusted).address } else { self.address }
    }

    /// The same, with how it was decided.
    #[must_use]
    pub fn decide(&self, headers: &HeaderMap, trusted: &Trusted) -> Client {
        address::client(self.address, headers, trusted)
    }
}

const SEC_PURPOSE: HeaderName = HeaderName::from_static("sec-purpose");

/// What kind of visit a request makes, as far as its head says.
#[must_use]
pub fn kind(method: &Method, headers: &HeaderMap) -> Kind {
    if *method == Method::HEAD {
        Kind::Head
    } else if headers.get(SEC_PURPOSE).is_some_and(|purpose| purpose.as_bytes().starts_with(b"prefetch")) {
        Kind::Prefetch
    } else {
        Kind::Click
    }
}

const SEC_GPC: HeaderName = HeaderName::from_static("sec-gpc");

/// Whether the visitor says so: `DNT: 1` (W3C, Tracking Preference Expression) or `Sec-GPC: 1` (W3C, Global Privacy
/// Control).
#[must_use]
pub fn asks_not_to_be_tracked(headers: &HeaderMap) -> bool {
    [header::DNT, SEC_GPC].iter().any(|name| headers.get(name).is_some_and(|value| value == "1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_not_to_be_tracked() {
        for (name, value, want) in [
            ("dnt", "1", true),
            ("dnt", "0", false),
            ("dnt", "null", false),
            ("sec-gpc", "1", true),
            ("sec-gpc", "", false),
            ("cookie", "1", false),
        ] {
            let name: HeaderName = name.parse().unwrap();
            let headers: HeaderMap = [(name, value.parse().unwrap())].into_iter().collect();
            assert_eq!(asks_not_to_be_tracked(&headers), want, "{headers:?}");
        }
    }

    #[test]
    fn kinds() {
        for (method, purpose, want) in [
            (Method::GET, None, Kind::Click),
            (Method::HEAD, None, Kind::Head),
            (Method::HEAD, Some("prefetch"), Kind::Head),
            (Method::GET, Some("prefetch"), Kind::Prefetch),
            (Method::GET, Some("prefetch;prerender"), Kind::Prefetch),
            (Method::GET, Some("other"), Kind::Click),
        ] {
            let headers: HeaderMap =
                purpose.into_iter().map(|value| ("sec-purpose".parse().unwrap(), value.parse().unwrap())).collect();
            assert_eq!(kind(&method, &headers), want, "{method} {purpose:?}");
        }
    }
}
