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
//! - `S`, before the first byte of a request leaves: `code` is empty where the request asks for no link.
//! - `R`, after its answer came whole (status line, headers, body): `location_right` is `0` for a redirect to somewhere
//!   else than the known target, else `1`.
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
