//! The stub's HTTP/1.1: requests that it reads and answers that it writes (RFC 9112).
//!
//! In: bytes of a connection. Out: borrowed [`Request`]s, and answers appended to a buffer. Never: allocates, keeps
//! state. At its limit: more than [`HEADERS_MAX`] headers, or a body without a length, is malformed.

/// More than browsers send.
const HEADERS_MAX: usize = 48;

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request<'a> {
    pub(super) method: &'a str,
    /// Without the query.
    pub(super) path: &'a str,
    pub(super) body: &'a [u8],
    /// `X-Loadgen-Intended`, nanoseconds of `CLOCK_MONOTONIC`.
    pub(super) intended_ns: Option<u64>,
    /// `X-Request-Id`.
    pub(super) request_id: Option<&'a [u8]>,
    /// The client wants no more answers on this connection after this one (RFC 9112, 9.3).
    pub(super) close: bool,
}

/// What came is no HTTP/1.1 that this server speaks.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// The first request of `bytes` and its length, or none while it is not whole.
pub(super) fn parse(bytes: &[u8]) -> Result<Option<(Request<'_>, usize)>, Malformed> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Request::new(&mut headers);
    let head_length = match head.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(Malformed),
    };
    let (Some(method), Some(target), Some(version)) = (head.method, head.path, head.version) else {
        return Err(Malformed);
    };
    let mut body_length = 0usize;
    let mut request = Request {
        method,
        path: target.split('?').next().unwrap_or(target),
        body: &[],
        intended_ns: None,
        request_id: None,
        close: version == 0,
    };
    for header in &*head.headers {
        // Names differ in length: most comparisons end there.
        let name = header.name;
        if name.eq_ignore_ascii_case("x-loadgen-intended") {
            request.intended_ns = number(header.value);
        } else if name.eq_ignore_ascii_case("content-length") {
            body_length = number(header.value).and_then(|length| length.try_into().ok()).ok_or(Malformed)?;
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(Malformed);
        } else if name.eq_ignore_ascii_case("x-request-id") {
            request.request_id = Some(header.value);
        } else if name.eq_ignore_ascii_case("connection") {
            request.close = header.value.eq_ignore_ascii_case(b"close")
                || version == 0 && !header.value.eq_ignore_ascii_case(b"keep-alive");
        }
    }
    let length = head_length.checked_add(body_length).ok_or(Malformed)?;
    match bytes.get(head_length..length) {
        Some(body) => {
            request.body = body;
            Ok(Some((request, length)))
        }
        None => Ok(None),
    }
}

fn number(value: &[u8]) -> Option<u64> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// An answer's head; the caller appends `body_length` bytes. Returns the length of the head.
pub(super) fn head(
    out: &mut Vec<u8>,
    status_line: &str,
    headers: &[(&str, &[u8])],
    body_length: u64,
    close: bool,
) -> usize {
    let before = out.len();
    out.extend_from_slice(b"HTTP/1.1 ");
    out.extend_from_slice(status_line.as_bytes());
    for (name, value) in headers {
        out.extend_from_slice(b"\r\n");
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(b": ");
        out.extend_from_slice(value);
    }
    if close {
        out.extend_from_slice(b"\r\nconnection: close");
    }
    out.extend_from_slice(b"\r\ncontent-length: ");
    let mut digits = [0; 20];
    out.extend_from_slice(decimal(body_length, &mut digits));
    out.extend_from_slice(b"\r\n\r\n");
    out.len() - before
}

/// `write!` of a number costs more than the rest of a redirect's head.
fn decimal(mut value: u64, digits: &mut [u8; 20]) -> &[u8] {
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (value % 10) as u8;
        value /= 10;
        if value == 0 {
            return &digits[at..];
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, proptest};

    use super::{Malformed, Request, decimal, head, parse};

    const PLAIN: Request<'static> =
        Request { method: "GET", path: "/abc", body: b"", intended_ns: None, request_id: None, close: false };

    #[test]
    fn requests_are_read() {
        let check = |text: &str, expected: Request<'_>| {
            let bytes = [text.as_bytes(), b"GET /next"].concat();
            assert_eq!(parse(&bytes), Ok(Some((expected, text.len()))), "{text}");
            for end in 0..text.len() {
                assert_eq!(parse(&bytes[..end]), Ok(None), "{text} to {end}");
            }
        };
        check("GET /abc HTTP/1.1\r\n\r\n", PLAIN);
        check("GET /abc?x=1 HTTP/1.1\r\nHost: a\r\n\r\n", PLAIN);
        check("GET /abc HTTP/1.0\r\n\r\n", Request { close: true, ..PLAIN });
        check("GET /abc HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", PLAIN);
        check("GET /abc HTTP/1.1\r\nconnection: Close\r\n\r\n", Request { close: true, ..PLAIN });
        check("GET /abc HTTP/1.1\r\nX-Loadgen-Intended: 123\r\n\r\n", Request { intended_ns: Some(123), ..PLAIN });
        check("GET /abc HTTP/1.1\r\nX-Request-Id: 7f\r\n\r\n", Request { request_id: Some(b"7f"), ..PLAIN });
        check(
            "POST /shorten HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
            Request { method: "POST", path: "/shorten", body: b"{}", ..PLAIN },
        );
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for text in [
            "\0\0\0\0",
            "GET /abc SPDY/9\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 18446744073709551615\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
        ] {
            assert_eq!(parse(text.as_bytes()), Err(Malformed), "{text}");
        }
    }

    #[test]
    fn a_head_is_written() {
        let mut out = b"before".to_vec();
        let length = head(&mut out, "204 No Content", &[("x", b"1")], 0, true);
        let expected = "HTTP/1.1 204 No Content\r\nx: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
        assert_eq!(String::from_utf8_lossy(&out), format!("before{expected}"));
        assert_eq!(length, expected.len());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }

        #[test]
        fn numbers_are_written_as_decimals(value in any::<u64>()) {
            assert_eq!(decimal(value, &mut [0; 20]), value.to_string().as_bytes());
        }
    }
}
