//! Respond: answers. Pure.
//!
//! In: what was decided, and the request's own header map, which becomes the answer's: a redirect allocates nothing.
//! Out: the answer. Never: a cookie, a script, or a `Location` that the request chose.

use std::collections::HashSet;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};

use super::body::Body;
use super::site::Page;
use crate::resolve::hot::Ready;

const NO_STORE: HeaderValue = HeaderValue::from_static("no-store");
const PLAIN: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const HTML: HeaderValue = HeaderValue::from_static("text/html; charset=utf-8");

/// A redirect to the target of a link.
#[must_use]
pub fn redirect(mut headers: HeaderMap, ready: Ready, query: Option<&str>) -> Response<Body> {
    let location = match query {
        Some(query) if ready.forward_query && !query.is_empty() => forward(&ready.location, query),
        _ => ready.location,
    };
    headers.clear();
    headers.insert(header::LOCATION, location);
    headers.insert(header::CACHE_CONTROL, ready.cache_control);
    answer(ready.status, headers, Body::Empty)
}

/// A redirect to where visitors go who cannot be redirected.
#[must_use]
pub fn fallback(location: HeaderValue) -> Response<Body> {
    let headers = HeaderMap::from_iter([(header::LOCATION, location), (header::CACHE_CONTROL, NO_STORE)]);
    answer(StatusCode::FOUND, headers, Body::Empty)
}

/// A page out of `pages.dir`.
#[must_use]
pub fn page(status: StatusCode, page: &Page) -> Response<Body> {
    let headers =
        HeaderMap::from_iter([(header::CONTENT_TYPE, page.content_type.clone()), (header::CACHE_CONTROL, NO_STORE)]);
    answer(status, headers, Body::Page(page.bytes.clone()))
}

/// The built-in page: a sentence, in HTML for those who ask for it.
#[must_use]
pub fn sentence(status: StatusCode, text: &'static str, html: bool) -> Response<Body> {
    let (content_type, bytes) = if html {
        let title = status.canonical_reason().unwrap_or("waypost");
        let page = format!(
            "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
             <meta name=robots content=noindex><title>{title}</title>\
             <style>body{{font:1.1rem/1.5 system-ui,sans-serif;max-width:32rem;margin:20vh auto;padding:0 1rem}}</style>\
             <p>{text}\n"
        );
        (HTML, Bytes::from(page))
    } else {
        (PLAIN, Bytes::from(format!("{text}\n")))
    };
    let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, content_type), (header::CACHE_CONTROL, NO_STORE)]);
    answer(status, headers, Body::Page(bytes))
}

/// What the API answers when it cannot be reached, as its other errors are (RFC 9457).
#[must_use]
pub fn problem_unavailable() -> Response<Body> {
    const PROBLEM: &str = r#"{"type":"about:blank","title":"Service Unavailable","status":503,"detail":"the API cannot answer just now: try again in a moment"}"#;
    let headers = HeaderMap::from_iter([
        (header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json")),
        (header::CACHE_CONTROL, NO_STORE),
        (header::RETRY_AFTER, HeaderValue::from_static("1")),
    ]);
    answer(StatusCode::SERVICE_UNAVAILABLE, headers, Body::Page(Bytes::from_static(PROBLEM.as_bytes())))
}

/// Whether the page is for a person's browser.
#[must_use]
pub fn wants_html(headers: &HeaderMap) -> bool {
    headers.get(header::ACCEPT).is_some_and(|accept| accept.as_bytes().windows(9).any(|part| part == b"text/html"))
}

/// The same answer, after which the connection ends.
#[must_use]
pub fn closing(mut response: Response<Body>) -> Response<Body> {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

fn answer(status: StatusCode, headers: HeaderMap, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// `location` with the parameters of `query` added; one of the request wins over one of the target with the same name.
/// Nothing before the target's `?` or after its `#` changes.
#[must_use]
pub fn forward(location: &HeaderValue, query: &str) -> HeaderValue {
    let bytes = location.as_bytes();
    let (rest, fragment) = split(bytes, b'#');
    let (path, own) = split(rest, b'?');
    let name = |parameter: &[u8]| split(parameter, b'=').0.to_vec();
    let theirs: HashSet<Vec<u8>> = query.split('&').map(|parameter| name(&encoded(parameter))).collect();
    let mut out = path.to_vec();
    let mut separator = b'?';
    let mut push = |parameter: &[u8]| {
        if !parameter.is_empty() {
            out.push(separator);
            out.extend(parameter);
            separator = b'&';
        }
    };
    for parameter in own.unwrap_or_default().split(|byte| *byte == b'&') {
        if !theirs.contains(&name(parameter)) {
            push(parameter);
        }
    }
    for parameter in query.split('&') {
        push(&encoded(parameter));
    }
    if let Some(fragment) = fragment {
        out.push(b'#');
        out.extend(fragment);
    }
    HeaderValue::from_maybe_shared(Bytes::from(out)).unwrap_or_else(|_| location.clone())
}

/// The part before the first `at`, and the part after it.
fn split(bytes: &[u8], at: u8) -> (&[u8], Option<&[u8]>) {
    match bytes.iter().position(|byte| *byte == at) {
        Some(index) => (&bytes[..index], Some(&bytes[index + 1..])),
        None => (bytes, None),
    }
}

/// Percent-encodes what a serialised query of a special scheme does not have (URL standard, "special-query
/// percent-encode set").
fn encoded(query: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(query.len());
    for byte in query.bytes() {
        if byte.is_ascii_graphic() && !matches!(byte, b'"' | b'#' | b'<' | b'>' | b'\'') {
            out.push(byte);
        } else {
            out.extend(format!("%{byte:02X}").bytes());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn queries_are_added_to_targets() {
        let check = |target: &'static str, query: &str, want: &str| {
            assert_eq!(forward(&HeaderValue::from_static(target), query), want, "{target} {query}");
        };
        check("https://e.com/", "a=1", "https://e.com/?a=1");
        check("https://e.com/?b=2", "a=1", "https://e.com/?b=2&a=1");
        check("https://e.com/?a=0&b=2", "a=1", "https://e.com/?b=2&a=1");
        check("https://e.com/?a=0", "a=1&a=2", "https://e.com/?a=1&a=2");
        check("https://e.com/#top", "a=1", "https://e.com/?a=1#top");
        check("https://e.com/?b#top", "a", "https://e.com/?b&a#top");
        check("https://e.com/?a", "a", "https://e.com/?a");
        check("https://e.com/?", "a=1", "https://e.com/?a=1");
        check("https://e.com/x", "&&", "https://e.com/x");
        check("https://e.com/", "a=\"<é>'", "https://e.com/?a=%22%3C%C3%A9%3E%27");
        check("https://e.com/", "u=http://evil.example/#x", "https://e.com/?u=http://evil.example/%23x");
        check("mailto:a@e.com", "subject=x", "mailto:a@e.com?subject=x");
    }

    proptest! {
        #[test]
        fn a_query_changes_nothing_but_the_query(query in "\\PC{0,60}", own in "[a-z&=]{0,12}") {
            let target = format!("https://e.com:81/p;q/r?{own}#frag");
            let got = forward(&target.parse().unwrap(), &query);
            let got = got.to_str().unwrap();
            prop_assert!(got.starts_with("https://e.com:81/p;q/r") && got.ends_with("#frag"), "{}", got);
            prop_assert!(got.bytes().all(|byte| byte.is_ascii_graphic()));
            let parsed = url::Url::parse(got).unwrap();
            prop_assert_eq!(parsed.as_str(), got);
            prop_assert_eq!(parsed.path(), "/p;q/r");
        }
    }
}
