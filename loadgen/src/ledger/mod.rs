//! The ledger: what was sent and what was fully received, in a file that the server cannot touch.
//!
//! In: from a worker, a line before a request leaves and a line after its answer came whole. Out: a text file that is
//! complete up to the last system call, whatever ends this process: a request never leaves before its line is with the
//! kernel. Never: buffers a `sent` line past the send. At its limit: when a line cannot be written (disk full) the run
//! ends with an error, since what is not in the ledger can prove nothing.
//!
//! # The format, version 1
//!
//! One record a line, fields separated by one tab, each line ended by one line feed (the same words stand in
//! `LEDGER.md`):
//!
//! ```text
//! loadgen-ledger  1     run     target  header   begun_unix_ns
//! S               id    at_ns   class   method   code
//! R               id    at_ns   status  location_right
//! C               id    at_ns   code    target
//! ```
//!
//! - The first line: `run` is 16 hexadecimal digits that no other run has, `target` what was asked, `header` the name of
//!   the header that carried the ids, `begun_unix_ns` the wall clock.
//! - `S`, before the first byte of a request leaves: `code` is empty where the request asks for no link ([`link_of`]).
//! - `R`, after its answer came whole (status line, headers, body): `location_right` is `0` for a redirect to somewhere
//!   else than the known target, else `1`; in an answer that is no redirect it says nothing.
//! - `C`, after an answer that acknowledged that `code` now has `target`.
//! - `id`: 32 hexadecimal digits: 16 of the run, 4 of the worker, 12 of the request, counted from 0 in its worker without
//!   gaps.
//! - `at_ns`: nanoseconds since the first line was made, on the monotonic clock.
//! - In a text field a byte that is no visible ASCII character, and `%`, is written as `%` and two hexadecimal digits
//!   (RFC 3986, section 2.1).
//!
//! Lines of one worker stand in the order of what happened; workers append whole lines to the same file. A last line
//! without a line feed is of a writer that was killed inside the call: it is read as absent, and rightly, since its request
//! had not left. Any other line that is not as described is an error of the file.

pub mod read;
pub mod write;

/// First field of the first line.
pub const NAME: &str = "loadgen-ledger";

/// Second field of the first line.
pub const VERSION: &str = "1";

/// The link that a request asks for, by its class's method and path: that of `/{code}`, or the one segment of a path that is
/// the same each time. Empty: none. A redirect to anything else is no visit, and would be missed as one; a visit of
/// anything else is one too many, whether its answer came or not.
#[must_use]
pub fn link_of<'a>(method: &str, path: &'a str, code: &'a [u8]) -> &'a [u8] {
    let path = path.split('?').next().unwrap_or(path);
    match path.strip_prefix('/') {
        _ if !matches!(method, "GET" | "HEAD") => b"",
        Some("{code}") => code,
        Some(segment) if !segment.contains(['/', '{']) => segment.as_bytes(),
        _ => b"",
    }
}

#[cfg(test)]
mod tests {
    use super::link_of;

    #[test]
    fn requests_for_links() {
        for (method, path, expected) in [
            ("GET", "/{code}", "abc"),
            ("HEAD", "/{code}", "abc"),
            ("GET", "/{code}?from=mail", "abc"),
            ("GET", "/spring26", "spring26"),
            ("HEAD", "/spring26?from=/mail", "spring26"),
            // What is not redirected there is no visit in any table: a single segment needs no list of exceptions.
            ("GET", "/healthz", "healthz"),
            ("GET", "/", ""),
            ("GET", "/?code={code}", ""),
            ("GET", "/stats/{code}", ""),
            ("GET", "/{code}/stats", ""),
            ("GET", "/{code}/", ""),
            ("GET", "/api/links", ""),
            ("GET", "/{n}", ""),
            ("POST", "/shorten", ""),
            ("DELETE", "/{code}", ""),
        ] {
            assert_eq!(String::from_utf8_lossy(link_of(method, path, b"abc")), expected, "{method} {path}");
        }
    }
}
