//! Reading a ledger back: a line at a time, in a memory that does not grow with the file.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::{NAME, VERSION};

/// Longest line that is read.
const LINE_MAX: usize = 64 * 1024;

/// The first line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub run: u64,
    pub target: String,
    /// The name of the header that carried the ids.
    pub header: String,
    /// Wall clock when the run began, nanoseconds since the Unix epoch.
    pub begun_unix_ns: u64,
}

/// An id, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequestId {
    pub run: u64,
    pub worker: u16,
    /// The how-manieth of its worker, from 0; below 2^48.
    pub number: u64,
}

impl RequestId {
    /// `None`: not 32 hexadecimal digits (of either case: what stood between may have changed it).
    #[must_use]
    pub fn parse(digits: &[u8]) -> Option<Self> {
        if digits.len() != 32 {
            return None;
        }
        let rest = hex(&digits[16..])?;
        Some(Self { run: hex(&digits[..16])?, worker: (rest >> 48) as u16, number: rest & ((1 << 48) - 1) })
    }
}

impl std::fmt::Display for RequestId {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{:016x}{:04x}{:012x}", self.run, self.worker, self.number)
    }
}

/// One line after the first. Texts are as in the file: [`unescape`] them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record<'a> {
    Sent { id: RequestId, at_ns: u64, class: &'a [u8], method: &'a [u8], code: &'a [u8] },
    Received { id: RequestId, at_ns: u64, status: u16, location_right: bool },
    Created { id: RequestId, at_ns: u64, code: &'a [u8], target: &'a [u8] },
}

/// A ledger that is being read from its begin to its end.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    file: BufReader<File>,
    header: Header,
    line: Vec<u8>,
    /// Where the next line begins, and its number.
    offset: u64,
    number: u64,
    cut: bool,
}

impl Reader {
    /// Opens the file and reads its first line.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open the ledger {}", path.display()))?;
        let mut reader = Self {
            path: path.to_owned(),
            file: BufReader::with_capacity(1 << 20, file),
            header: Header { run: 0, target: String::new(), header: String::new(), begun_unix_ns: 0 },
            line: Vec::new(),
            offset: 0,
            number: 0,
            cut: false,
        };
        ensure!(reader.advance()?.is_some(), "{} is no ledger: its first line is not whole", path.display());
        reader.header = header(&reader.line).with_context(|| path.display().to_string())?;
        Ok(reader)
    }

    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The next record and where its line begins; `None` at the end.
    #[expect(clippy::should_implement_trait, reason = "a record borrows the reader's line: no iterator can say that")]
    pub fn next(&mut self) -> Result<Option<(u64, Record<'_>)>> {
        let Some(offset) = self.advance()? else { return Ok(None) };
        match record(&self.line) {
            Some(record) => Ok(Some((offset, record))),
            None => {
                bail!(
                    "{}: line {} is no record of a ledger: {}; what it stood for is not known, so nothing is proved: run \
                     again, with the ledger on a disk with room",
                    self.path.display(),
                    self.number,
                    shown(&self.line)
                )
            }
        }
    }

    /// The number of the line that was read last, from 1.
    #[must_use]
    pub fn line_number(&self) -> u64 {
        self.number
    }

    /// After the end: whether the last line had no line feed, since its writer was killed.
    #[must_use]
    pub fn was_cut(&self) -> bool {
        self.cut
    }

    /// Reads the line, without its line feed, and says where it began.
    fn advance(&mut self) -> Result<Option<u64>> {
        self.line.clear();
        let read = read_line(&mut self.file, &mut self.line, LINE_MAX)
            .with_context(|| format!("{}: line {}", self.path.display(), self.number + 1))?;
        if self.line.pop_if(|last| *last == b'\n').is_none() {
            self.cut = read > 0;
            return Ok(None);
        }
        let offset = self.offset;
        self.offset += read as u64;
        self.number += 1;
        Ok(Some(offset))
    }
}

/// Appends one line of at most `max` bytes with its line feed (which the last may lack); the number of bytes, 0 at the end.
pub fn read_line(from: &mut impl BufRead, line: &mut Vec<u8>, max: usize) -> Result<usize> {
    let read = std::io::Read::take(&mut *from, max as u64).read_until(b'\n', line)?;
    ensure!(read < max || line.ends_with(b"\n"), "longer than {max} bytes");
    Ok(read)
}

/// Calls `each` with the record whose line begins at `offset`, which a [`Reader`] gave.
pub fn at<T>(file: &File, offset: u64, each: impl FnOnce(Record<'_>) -> T) -> Result<T> {
    let mut line = vec![0; 512];
    loop {
        let read = file.read_at(&mut line, offset)?;
        if let Some(end) = line[..read].iter().position(|byte| *byte == b'\n') {
            let record = record(&line[..end]).context("the ledger changed while it was read")?;
            return Ok(each(record));
        }
        ensure!(read == line.len() && read < LINE_MAX, "the ledger changed while it was read");
        line.resize(read * 2, 0);
    }
}

/// A text field as it was before it was written. What is not as the writer escapes stays as it is.
#[must_use]
pub fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        rest = tail;
        match (first, tail) {
            (b'%', [high, low, after @ ..]) if let Some(byte) = hex(&[*high, *low]) => {
                out.push(byte as u8);
                rest = after;
            }
            _ => out.push(*first),
        }
    }
    out
}

fn header(line: &[u8]) -> Result<Header> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b'\t').collect();
    ensure!(fields[0] == NAME.as_bytes(), "no ledger: its first line does not begin with {NAME}");
    let version = fields.get(1).copied().unwrap_or_default();
    ensure!(
        version == VERSION.as_bytes(),
        "a ledger of version {}: this loadgen reads version {VERSION}",
        shown(version)
    );
    let [_, _, run, target, header, begun] = fields[..] else { bail!("its first line has not six fields") };
    Ok(Header {
        run: (run.len() == 16).then(|| hex(run)).flatten().context("its first line has no run of 16 digits")?,
        target: String::from_utf8_lossy(&unescape(target)).into_owned(),
        header: String::from_utf8_lossy(&unescape(header)).into_owned(),
        begun_unix_ns: decimal(begun).context("its first line has no time")?,
    })
}

fn record(line: &[u8]) -> Option<Record<'_>> {
    let mut fields = line.split(|byte| *byte == b'\t');
    let kind = fields.next()?;
    let id = RequestId::parse(fields.next()?)?;
    let at_ns = decimal(fields.next()?)?;
    let record = match kind {
        b"S" => Record::Sent { id, at_ns, class: fields.next()?, method: fields.next()?, code: fields.next()? },
        b"R" => Record::Received {
            id,
            at_ns,
            status: decimal(fields.next()?)?.try_into().ok()?,
            location_right: match fields.next()? {
                b"0" => false,
                b"1" => true,
                _ => return None,
            },
        },
        b"C" => Record::Created { id, at_ns, code: fields.next()?, target: fields.next()? },
        _ => return None,
    };
    fields.next().is_none().then_some(record)
}

/// The value of each byte as a hexadecimal digit; 255: none.
const HEX: [u8; 256] = {
    let mut values = [255; 256];
    let mut digit = 0;
    while digit < 16 {
        values[b"0123456789abcdef"[digit] as usize] = digit as u8;
        values[b"0123456789ABCDEF"[digit] as usize] = digit as u8;
        digit += 1;
    }
    values
};

/// Of at most 16 digits.
fn hex(digits: &[u8]) -> Option<u64> {
    let mut value = 0;
    let mut all = 0;
    for digit in digits {
        let digit = HEX[usize::from(*digit)];
        all |= digit;
        value = value << 4 | u64::from(digit & 15);
    }
    (all < 16).then_some(value)
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, digit| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit <= 9)?;
        value.checked_mul(10)?.checked_add(u64::from(digit))
    })
}

/// For messages: the begin of a line that may be anything.
fn shown(bytes: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(&bytes[..bytes.len().min(80)]))
}
