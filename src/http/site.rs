//! The site: what answers are made of that no link says. Read once from the configuration, the same for all cores.

use std::collections::HashMap;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Uri, header};

use crate::domain::key::{Case, DomainId};

#[derive(Debug)]
pub struct Site {
    pub case: Case,
    /// Answers any Host when it is alone.
    pub default_domain: DomainSite,
    /// By host, lower case, without port. Empty: no Host is looked at.
    pub domains: HashMap<String, DomainSite, ahash::RandomState>,
    pub pages: Pages,
}

/// One of the domains: its number, and where visitors go who cannot be redirected.
#[derive(Clone, Debug, Default)]
pub struct DomainSite {
    pub id: DomainId,
    pub root_url: Option<HeaderValue>,
    pub not_found_url: Option<HeaderValue>,
    pub gone_url: Option<HeaderValue>,
}

/// A page in memory.
#[derive(Clone, Debug)]
pub struct Page {
    pub content_type: HeaderValue,
    pub bytes: Bytes,
}

/// What `pages.dir` holds, read at the start.
#[derive(Debug, Default)]
pub struct Pages {
    pub home: Option<Page>,
    pub missing: Option<Page>,
    pub gone: Option<Page>,
    /// By path without the first slash.
    pub files: HashMap<String, Page>,
}

impl Site {
    /// The domain that a request is for; none if its Host is not configured.
    #[must_use]
    pub fn domain(&self, uri: &Uri, headers: &HeaderMap) -> Option<&DomainSite> {
        if self.domains.is_empty() {
            return Some(&self.default_domain);
        }
        // The target's authority wins over Host (RFC 9112, section 3.2.2).
        let host = match uri.host() {
            Some(host) => host,
            None => without_port(headers.get(header::HOST)?.to_str().ok()?),
        };
        let host = host.strip_suffix('.').unwrap_or(host);
        if host.bytes().any(|byte| byte.is_ascii_uppercase()) {
            self.domains.get(&host.to_ascii_lowercase())
        } else {
            self.domains.get(host)
        }
    }

    #[cfg(test)]
    #[must_use]
    pub fn for_tests() -> Self {
        Self {
            case: Case::Sensitive,
            default_domain: DomainSite::default(),
            domains: HashMap::default(),
            pages: Pages::default(),
        }
    }
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        // Not the last part of an IPv6 address in brackets.
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_for_the_domain_that_its_host_names() {
        let mut site = Site::for_tests();
        let number = |host: &str, site: &Site, uri: &str| {
            let mut headers = HeaderMap::new();
            if !host.is_empty() {
                headers.insert(header::HOST, host.parse().unwrap());
            }
            site.domain(&uri.parse().unwrap(), &headers).map(|domain| domain.id.0)
        };
        assert_eq!(number("whoever.example", &site, "/a"), Some(0), "without domains every Host is domain 0");
        for (index, host) in ["go.example", "127.0.0.1", "[::1]"].into_iter().enumerate() {
            let domain = DomainSite { id: DomainId(index as u16 + 1), ..DomainSite::default() };
            site.domains.insert(host.to_owned(), domain);
        }
        for (host, uri, want) in [
            ("go.example", "/a", Some(1)),
            ("GO.example:8080", "/a", Some(1)),
            ("go.example.", "/a", Some(1)),
            ("127.0.0.1:80", "/a", Some(2)),
            ("[::1]:80", "/a", Some(3)),
            ("[::1]", "/a", Some(3)),
            ("other.example", "/a", None),
            ("", "/a", None),
            ("other.example", "http://go.example/a", Some(1)),
            ("go.example", "http://other.example/a", None),
        ] {
            assert_eq!(number(host, &site, uri), want, "{host} {uri}");
        }
    }
}
