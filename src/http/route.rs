//! Route: what a request asks for. Pure.
//!
//! In: the head of a request. Out: a [`Route`]. Never: looks anything up; allocates; trusts a Host that is not configured.

use http::{HeaderMap, Method, Uri, header};

use super::site::{DomainSite, Site};
use crate::domain::key::{Code, Key, RESERVED};

/// The longest target of a request line, in bytes (RFC 9110, section 15.5.15).
pub const TARGET_BYTES_MAX: usize = 8 << 10;

#[derive(Debug)]
pub enum Route<'a> {
    /// A redirect, if there is such a link. The key is none where the spelling is no code as it stands.
    Code {
        key: Option<Key>,
        spelled: &'a str,
        domain: &'a DomainSite,
    },
    Home {
        domain: &'a DomainSite,
    },
    /// A file of the site: `/robots.txt`, `/favicon.ico`, `/.well-known/…`.
    File {
        path: &'a str,
    },
    /// Not a redirect: back's.
    Back,
    /// A code or a page, but neither GET nor HEAD.
    MethodNotAllowed,
    /// A body, where none has a meaning.
    BodyNotAllowed,
    TargetTooLong,
    /// Of a domain that is not ours: whatever links there are, none of them is asked for.
    UnknownHost,
}

#[must_use]
pub fn route<'a>(method: &Method, uri: &'a Uri, headers: &HeaderMap, site: &'a Site, surface: Surface) -> Route<'a> {
    let path = uri.path();
    if path.len() + uri.query().map_or(0, str::len) > TARGET_BYTES_MAX {
        return Route::TargetTooLong;
    }
    let spelled = path.strip_prefix('/').unwrap_or(path);
    if is_back(spelled, surface) {
        return Route::Back;
    }
    if !matches!(*method, Method::GET | Method::HEAD) {
        return Route::MethodNotAllowed;
    }
    if has_body(headers) {
        return Route::BodyNotAllowed;
    }
    if spelled == "robots.txt" || spelled == "favicon.ico" || spelled.starts_with(".well-known/") {
        return Route::File { path: spelled };
    }
    let Some(domain) = site.domain(uri, headers) else { return Route::UnknownHost };
    if spelled.is_empty() {
        return Route::Home { domain };
    }
    let key = Code::from_path(spelled.as_bytes(), site.case).ok().map(|code| Key { domain: domain.id, code });
    Route::Code { key, spelled, domain }
}

/// What a listener serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Surface {
    Everything,
    /// Redirects, pages, `/healthz` and `/readyz` alone: the API has a listener of its own.
    Public,
    Api,
}

fn is_back(path: &str, surface: Surface) -> bool {
    let first = path.split('/').next().unwrap_or(path);
    match surface {
        Surface::Api => true,
        Surface::Public => matches!(path, "healthz" | "readyz"),
        // `/{code}/` is a code with a slash too many; every other path of several segments is the API's, or nobody's.
        Surface::Everything => {
            if first.len() == path.len() || first.len() + 1 == path.len() {
                is_reserved(first) && !matches!(first, "robots.txt" | "favicon.ico")
            } else {
                first != ".well-known"
            }
        }
    }
}

fn is_reserved(segment: &str) -> bool {
    RESERVED.iter().any(|word| word.eq_ignore_ascii_case(segment))
}

/// Whether the request brings a body. A redirect has no use for one, and a body that is not read is how requests
/// are smuggled (RFC 9112, section 11.2).
fn has_body(headers: &HeaderMap) -> bool {
    headers.contains_key(header::TRANSFER_ENCODING)
        || headers.get(header::CONTENT_LENGTH).is_some_and(|length| length.as_bytes().iter().any(|byte| *byte != b'0'))
}

/// What else a code may have been meant by: one slash too many, and punctuation that a text glued on. Longest first.
pub fn forgiven(spelled: &str) -> impl Iterator<Item = &str> {
    /// Each of them asks the store once more.
    const STRIPPED_MAX: usize = 4;
    const GLUED_ON: [&str; 9] = [".", ",", ")", ">", "\"", "%3E", "%3e", "%22", "%29"];
    let without = |text: &'static str| move |spelled: &str| spelled.ends_with(text).then(|| spelled.len() - text.len());
    let unslashed = spelled.strip_suffix('/');
    let mut rest = unslashed.unwrap_or(spelled);
    unslashed.into_iter().chain(
        std::iter::from_fn(move || {
            let length = GLUED_ON.iter().find_map(|glued| without(glued)(rest))?;
            rest = &rest[..length];
            Some(rest)
        })
        .take(STRIPPED_MAX),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forgiven_spellings() {
        for (spelled, want) in [
            ("abc", &[][..]),
            ("abc/", &["abc"]),
            ("abc//", &["abc/"]),
            ("abc.", &["abc"]),
            ("abc).", &["abc)", "abc"]),
            ("abc./", &["abc.", "abc"]),
            ("abc%22%3E", &["abc%22", "abc"]),
            ("abc......", &["abc.....", "abc....", "abc...", "abc.."]),
        ] {
            assert_eq!(forgiven(spelled).collect::<Vec<_>>(), want, "{spelled}");
        }
    }

    #[test]
    fn routes() {
        let site = Site::for_tests();
        let check =
            |method: Method, uri: &str, surface: Surface, headers: &[(&'static str, &'static str)], want: &str| {
                let uri: Uri = uri.parse().unwrap();
                let headers =
                    headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
                let got = match route(&method, &uri, &headers, &site, surface) {
                    Route::Code { key: Some(key), .. } => format!("code {}", key.code),
                    Route::Code { key: None, spelled, .. } => format!("no code {spelled}"),
                    Route::File { path } => format!("file {path}"),
                    Route::Home { .. } => "home".to_owned(),
                    other => format!("{other:?}"),
                };
                assert_eq!(got, want, "{method} {uri} {surface:?} {headers:?}");
            };
        let get = |uri: &str, want: &str| check(Method::GET, uri, Surface::Everything, &[], want);
        get("/", "home");
        get("/abc", "code abc");
        get("/abc?x=1", "code abc");
        get("http://any.example/abc", "code abc");
        get("/abc/", "no code abc/");
        get("/a%2Db", "code a-b");
        get("/a!", "no code a!");
        get("/health", "Back");
        get("/HEALTH", "Back");
        get("/readyz/", "Back");
        get("/abc/stats", "Back");
        get("/api/v1/links", "Back");
        get("/robots.txt", "file robots.txt");
        get("/.well-known/acme/x", "file .well-known/acme/x");
        get(&format!("/{}", "a".repeat(8191)), &format!("no code {}", "a".repeat(8191)));
        get(&format!("/{}", "a".repeat(8192)), "TargetTooLong");
        check(Method::HEAD, "/abc", Surface::Everything, &[], "code abc");
        check(Method::POST, "/abc", Surface::Everything, &[], "MethodNotAllowed");
        check(Method::POST, "/shorten", Surface::Everything, &[], "Back");
        check(Method::GET, "/abc", Surface::Everything, &[("content-length", "0")], "code abc");
        check(Method::GET, "/abc", Surface::Everything, &[("content-length", "1")], "BodyNotAllowed");
        check(Method::GET, "/abc", Surface::Everything, &[("transfer-encoding", "chunked")], "BodyNotAllowed");
        check(Method::GET, "/health", Surface::Public, &[], "code health");
        check(Method::GET, "/healthz", Surface::Public, &[], "Back");
        check(Method::POST, "/shorten", Surface::Public, &[], "MethodNotAllowed");
        check(Method::GET, "/abc", Surface::Api, &[], "Back");
    }
}
