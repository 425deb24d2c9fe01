//! The worker's side.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use rustix::rand::{GetRandomFlags, getrandom};

use super::{NAME, VERSION};
use crate::clock;

/// Hexadecimal digits of an id.
pub const ID_DIGITS: usize = 32;

/// Bits of an id that number the requests of a worker.
const NUMBER_BITS: u32 = 48;

/// Room for the lines of one turn of a worker's loop; a turn with more makes it grow once.
const STAGED_BYTES: usize = 256 * 1024;

/// A run's ledger: the file, begun with a line that says what it is.
#[derive(Debug)]
pub struct Ledger {
    /// Opened to append: the kernel puts the lines of several writers one behind the other.
    file: File,
    run: u64,
    begun_ns: u64,
}

/// One worker's pen.
#[derive(Debug)]
pub struct Writer {
    file: File,
    run: u64,
    worker: u16,
    begun_ns: u64,
    next: u64,
    staged: Vec<u8>,
}

/// A request's number in its worker: with run and worker it is the id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Id(pub u64);

impl Ledger {
    /// Makes the file; one that exists is not overwritten. `target` and `header` go into its first line.
    pub fn create(file: &Path, target: &str, header: &str) -> io::Result<Self> {
        let run = by_chance()?;
        let mut first = Vec::new();
        write!(first, "{NAME}\t{VERSION}\t")?;
        push_hex(&mut first, run, 16);
        first.push(b'\t');
        push_text(&mut first, target.as_bytes());
        first.push(b'\t');
        push_text(&mut first, header.as_bytes());
        writeln!(first, "\t{}", clock::unix_ns())?;
        let mut file = OpenOptions::new().append(true).create_new(true).open(file)?;
        let begun_ns = clock::now_ns();
        file.write_all(&first)?;
        Ok(Self { file, run, begun_ns })
    }

    /// The first 16 digits of all ids of this run.
    #[must_use]
    pub fn run(&self) -> u64 {
        self.run
    }

    /// For worker number `worker`, below 65,536. One writer for each number: a second would give the same ids again.
    pub fn writer(&self, worker: usize) -> io::Result<Writer> {
        let worker = u16::try_from(worker).map_err(io::Error::other)?;
        Ok(Writer {
            file: self.file.try_clone()?,
            run: self.run,
            worker,
            begun_ns: self.begun_ns,
            next: 0,
            staged: Vec::with_capacity(STAGED_BYTES),
        })
    }
}

impl Writer {
    /// Stages a line: this is about to be sent. The id is the next of this worker. `at_ns` is an instant of
    /// [`clock::now_ns`]; `code` is what [`super::link_of`] gives.
    pub fn sending(&mut self, at_ns: u64, traffic: &str, method: &str, code: &[u8]) -> Id {
        let id = Id(self.next);
        self.next += 1;
        self.begin(b'S', id, at_ns);
        for field in [traffic.as_bytes(), method.as_bytes(), code] {
            self.staged.push(b'\t');
            push_text(&mut self.staged, field);
        }
        self.staged.push(b'\n');
        id
    }

    /// The digits that go into the header.
    #[must_use]
    pub fn digits(&self, id: Id) -> [u8; ID_DIGITS] {
        let mut digits = [0; ID_DIGITS];
        let (run, rest) = digits.split_at_mut(16);
        hex(run, self.run);
        hex(rest, u64::from(self.worker) << NUMBER_BITS | id.0);
        digits
    }

    /// Stages a line: the answer came whole. `location_right`: it was a redirect to the known target, or nobody asked.
    pub fn received(&mut self, id: Id, at_ns: u64, status: u16, location_right: bool) {
        self.begin(b'R', id, at_ns);
        self.staged.push(b'\t');
        push_decimal(&mut self.staged, u64::from(status));
        self.staged.extend_from_slice(if location_right { b"\t1\n" } else { b"\t0\n" });
    }

    /// Stages a line: the server acknowledged that this code now has that target.
    pub fn created(&mut self, id: Id, at_ns: u64, code: &[u8], target: &[u8]) {
        self.begin(b'C', id, at_ns);
        for field in [code, target] {
            self.staged.push(b'\t');
            push_text(&mut self.staged, field);
        }
        self.staged.push(b'\n');
    }

    /// Hands all staged lines to the kernel in one write; one that the kernel took in part is continued. What was staged as
    /// being sent may leave after this. After an error nothing more may be sent: the run is over.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.staged.is_empty() {
            return Ok(());
        }
        self.file.write_all(&self.staged)?;
        self.staged.clear();
        Ok(())
    }

    fn begin(&mut self, kind: u8, id: Id, at_ns: u64) {
        let digits = self.digits(id);
        self.staged.extend_from_slice(&[kind, b'\t']);
        self.staged.extend_from_slice(&digits);
        self.staged.push(b'\t');
        push_decimal(&mut self.staged, at_ns.saturating_sub(self.begun_ns));
    }
}

/// 64 bits that no other run has: two of 4 billion runs share theirs with a probability of a half.
pub(crate) fn by_chance() -> io::Result<u64> {
    let mut bytes = [0; 8];
    // Up to 256 bytes come whole or not at all (getrandom(2)).
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(bytes))
}

/// The lowest digits of `value`, as many as `out` has room for.
fn hex(out: &mut [u8], value: u64) {
    let mut rest = value;
    for digit in out.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(rest & 15) as usize];
        rest >>= 4;
    }
}

fn push_hex(out: &mut Vec<u8>, value: u64, digits: usize) {
    let from = out.len();
    out.resize(from + digits, 0);
    hex(&mut out[from..], value);
}

/// As `write!` would, at a fifth of its cost.
fn push_decimal(out: &mut Vec<u8>, value: u64) {
    let mut digits = [0; 20];
    let mut from = digits.len();
    let mut rest = value;
    loop {
        from -= 1;
        digits[from] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[from..]);
}

fn push_text(out: &mut Vec<u8>, text: &[u8]) {
    for &byte in text {
        if byte.is_ascii_graphic() && byte != b'%' {
            out.push(byte);
        } else {
            out.push(b'%');
            push_hex(out, u64::from(byte), 2);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{push_decimal, push_text};

    #[test]
    fn text_is_escaped() {
        let check = |text: &[u8], expected: &str| {
            let mut out = Vec::new();
            push_text(&mut out, text);
            assert_eq!(String::from_utf8(out).unwrap(), expected);
        };
        check(b"", "");
        check(b"Ab-_.~09", "Ab-_.~09");
        check(b"a b\tc\nd%", "a%20b%09c%0ad%25");
        check("ä".as_bytes(), "%c3%a4");
    }

    #[test]
    fn decimals() {
        for value in [0, 9, 10, 12_345, u64::MAX] {
            let mut out = Vec::new();
            push_decimal(&mut out, value);
            assert_eq!(String::from_utf8(out).unwrap(), value.to_string());
        }
    }
}
