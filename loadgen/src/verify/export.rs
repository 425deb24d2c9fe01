//! Exports of a server, a record at a time: CSV with a header, or NDJSON where the file begins with `{`.
//!
//! Only the columns that are compared are looked at; there may be others, in any order.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::ledger::read::read_line;

/// Longest line of NDJSON, and room for a record of CSV.
const RECORD_MAX: usize = 1 << 20;

/// One visit of the export.
#[derive(Debug)]
pub(super) struct Visit<'a> {
    /// As the request carried it; empty: none.
    pub(super) id: &'a [u8],
    pub(super) code: &'a [u8],
    pub(super) kind: Kind,
}

/// One link of the export.
#[derive(Debug)]
pub(super) struct Link<'a> {
    pub(super) code: &'a [u8],
    pub(super) target: &'a [u8],
}

/// As what the server stored a visit. Fits into three bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Click,
    Tool,
    Head,
    Prefetch,
    Bot,
    /// To a code that has no link.
    Orphan,
}

impl Kind {
    const ALL: [Self; 6] = [Self::Click, Self::Tool, Self::Head, Self::Prefetch, Self::Bot, Self::Orphan];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Click => "click",
            Self::Tool => "tool",
            Self::Head => "head",
            Self::Prefetch => "prefetch",
            Self::Bot => "bot",
            Self::Orphan => "orphan",
        }
    }

    /// The kind whose bits these are.
    pub(super) fn of_bits(bits: u8) -> Self {
        Self::ALL[usize::from(bits)]
    }

    fn of_name(name: &[u8]) -> Result<Self> {
        let known = Self::ALL.into_iter().find(|kind| kind.name().as_bytes() == name);
        known.with_context(|| {
            let names: Vec<_> = Self::ALL.iter().map(|kind| kind.name()).collect();
            format!("{:?} is no kind of visit: known are {}", String::from_utf8_lossy(name), names.join(", "))
        })
    }
}

/// A line of NDJSON. A member that is missing is told from one that is null: only the first is an error.
#[derive(Deserialize)]
struct VisitLine<'a> {
    #[serde(borrow)]
    code: Text<'a>,
    #[serde(borrow)]
    kind: Text<'a>,
    #[serde(borrow, deserialize_with = "Option::deserialize")]
    request_id: Option<Text<'a>>,
}

#[derive(Deserialize)]
struct LinkLine<'a> {
    #[serde(borrow)]
    code: Text<'a>,
    #[serde(borrow)]
    url: Text<'a>,
}

/// Borrowed where nothing is escaped, also inside an `Option`, where a plain `Cow` would be copied.
#[derive(Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// Calls `each` with every visit of the file.
pub(super) fn visits(path: &Path, mut each: impl FnMut(Visit<'_>) -> Result<()>) -> Result<()> {
    match open(path)? {
        (Format::Csv, file) => csv(path, file, ["code", "kind", "request_id"], |[code, kind, id]| {
            each(Visit { id, code, kind: Kind::of_name(kind)? })
        }),
        (Format::Ndjson, file) => ndjson(path, file, |line| {
            let line: VisitLine<'_> = serde_json::from_slice(line)?;
            let id = line.request_id.as_ref().map_or("", |id| &id.0).as_bytes();
            each(Visit { id, code: line.code.0.as_bytes(), kind: Kind::of_name(line.kind.0.as_bytes())? })
        }),
    }
}

/// Calls `each` with every link of the file.
pub(super) fn links(path: &Path, mut each: impl FnMut(Link<'_>) -> Result<()>) -> Result<()> {
    match open(path)? {
        (Format::Csv, file) => csv(path, file, ["code", "url"], |[code, target]| each(Link { code, target })),
        (Format::Ndjson, file) => ndjson(path, file, |line| {
            let line: LinkLine<'_> = serde_json::from_slice(line)?;
            each(Link { code: line.code.0.as_bytes(), target: line.url.0.as_bytes() })
        }),
    }
}

enum Format {
    Csv,
    Ndjson,
}

/// An empty file is NDJSON without a record: a server that stored nothing is found out by what is missing.
fn open(path: &Path) -> Result<(Format, BufReader<File>)> {
    let file = File::open(path).with_context(|| format!("cannot open the export {}", path.display()))?;
    let mut file = BufReader::with_capacity(1 << 20, file);
    let begin = file.fill_buf().with_context(|| format!("cannot read the export {}", path.display()))?;
    let format = match begin.first() {
        None | Some(b'{') => Format::Ndjson,
        Some(_) => Format::Csv,
    };
    Ok((format, file))
}

fn ndjson(path: &Path, mut file: BufReader<File>, mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let mut line = Vec::new();
    for number in 1_u64.. {
        line.clear();
        let mut next = || {
            let read = read_line(&mut file, &mut line, RECORD_MAX)?;
            if !line.trim_ascii().is_empty() {
                each(&line)?;
            }
            Ok(read)
        };
        let read: Result<usize> = next();
        if read.with_context(|| format!("{}: line {number}", path.display()))? == 0 {
            break;
        }
    }
    Ok(())
}

/// Records of RFC 4180, their `names` columns in this order. A record of another length than the header is an error.
fn csv<const N: usize>(
    path: &Path,
    file: BufReader<File>,
    names: [&str; N],
    mut each: impl FnMut([&[u8]; N]) -> Result<()>,
) -> Result<()> {
    let mut file = csv::ReaderBuilder::new().from_reader(file);
    let header = file.byte_headers().with_context(|| path.display().to_string())?.clone();
    let mut columns = [0; N];
    for (column, name) in columns.iter_mut().zip(names) {
        let Some(found) = header.iter().position(|field| field == name.as_bytes()) else {
            let there: Vec<_> = header.iter().map(String::from_utf8_lossy).collect();
            bail!("{}: the column {name} is missing; there are: {}", path.display(), there.join(", "));
        };
        *column = found;
    }
    let mut record = csv::ByteRecord::new();
    while file.read_byte_record(&mut record).with_context(|| path.display().to_string())? {
        let line = record.position().map_or(0, csv::Position::line);
        ensure!(record.as_slice().len() <= RECORD_MAX, "{}: line {line}: too long", path.display());
        each(columns.map(|column| &record[column])).with_context(|| format!("{}: line {line}", path.display()))?;
    }
    Ok(())
}
