//! Links as tables: CSV (RFC 4180) and NDJSON, the same columns in and out.
//!
//! In: links; or a file. Out: bytes; or a [`Row`] for each record of the file, a [`Draft`] or everything that is wrong
//! with it, and its line.
//! Never: decides what a link may be (`links` does); keeps more than one record in memory; writes a cell that a
//! spreadsheet takes for a formula; stops at a record that is wrong.
//! At its limit: a record of more than [`RECORD_BYTES_MAX`] is wrong, and reading goes on behind it. (The reader of crate
//! csv keeps a record whole, however long: one forgotten quote would keep the rest of the file. It is the oracle of the
//! tests.)

use std::borrow::Cow;
use std::io::{self, BufRead, Read};

use bytes::Bytes;
use http::HeaderValue;
use serde::{Deserialize, Serialize};

use crate::domain::key::DomainId;
use crate::domain::link::Link;
use crate::domain::target::Target;
use crate::links::{Draft, rfc3339};

pub const COLUMNS: [&str; 14] = [
    "code",
    "url",
    "domain",
    "title",
    "tags",
    "status",
    "starts_at",
    "expires_at",
    "expired_url",
    "max_visits",
    "forward_query",
    "note",
    "created_at",
    "clicks",
];
/// The most bytes of a record, as the file has it: 64 KiB. An export's largest is a note of 4,096 characters, a title,
/// 32 tags and two targets.
pub const RECORD_BYTES_MAX: usize = 64 << 10;
/// The store keeps numbers as signed ones.
const COUNT_MAX: u64 = i64::MAX as u64;
/// How much of a cell is told.
const SHOWN_CHARS: usize = 60;
const BOM: &[u8] = "\u{feff}".as_bytes();

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Csv,
    /// A JSON object a line.
    Ndjson,
}

impl Format {
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "csv" => Some(Self::Csv),
            "ndjson" => Some(Self::Ndjson),
            _ => None,
        }
    }

    #[must_use]
    pub fn content_type(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            Self::Csv => "text/csv; charset=utf-8; header=present",
            Self::Ndjson => "application/x-ndjson",
        })
    }
}

/// A record of NDJSON. Times are RFC 3339; what is none is absent.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct Record {
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    domain: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    title: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tags: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    starts_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expired_url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_visits: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    forward_query: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    created_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    clicks: Option<u64>,
}

impl Record {
    fn of(link: &Link, host: &str) -> Self {
        let fields = &link.fields;
        Self {
            code: Some(link.key.code.to_string()),
            url: Some(fields.target_written.clone()),
            domain: (!host.is_empty()).then(|| host.to_owned()),
            title: fields.title.clone(),
            tags: (!fields.tags.is_empty()).then(|| fields.tags.clone()),
            status: fields.status.map(u64::from),
            starts_at: fields.starts_at.map(rfc3339),
            expires_at: fields.expires_at.map(rfc3339),
            expired_url: fields.expired_url.as_ref().map(|url| Target::as_str(url).to_owned()),
            max_visits: fields.max_visits,
            forward_query: fields.forward_query,
            note: fields.note.clone(),
            created_at: Some(rfc3339(link.created_at)),
            clicks: Some(link.imported_clicks),
        }
    }

    /// In the order of [`COLUMNS`].
    fn cells(self) -> [String; COLUMNS.len()] {
        let number = |number: Option<u64>| number.map(|number| number.to_string());
        [
            self.code,
            self.url,
            self.domain,
            self.title,
            self.tags.map(|tags| tags.join(",")),
            number(self.status),
            self.starts_at,
            self.expires_at,
            self.expired_url,
            number(self.max_visits),
            self.forward_query.map(|forward| forward.to_string()),
            self.note,
            self.created_at,
            number(self.clicks),
        ]
        .map(Option::unwrap_or_default)
    }

    /// Takes what a cell says; an empty one says nothing.
    fn set(&mut self, column: &'static str, text: &str) -> Result<(), String> {
        if text.is_empty() {
            return Ok(());
        }
        let number = || {
            let number = text.trim().parse::<u64>();
            number.map_err(|_| format!("{column}: {} is no whole number from 0 to {COUNT_MAX}", shown(text)))
        };
        match column {
            "code" => self.code = Some(text.to_owned()),
            "url" => self.url = Some(text.to_owned()),
            "domain" => self.domain = Some(text.to_owned()),
            "title" => self.title = Some(text.to_owned()),
            "tags" => self.tags = Some(text.split(',').map(str::to_owned).collect()),
            "status" => self.status = Some(number()?),
            "starts_at" => self.starts_at = Some(text.to_owned()),
            "expires_at" => self.expires_at = Some(text.to_owned()),
            "expired_url" => self.expired_url = Some(text.to_owned()),
            "max_visits" => self.max_visits = Some(number()?),
            "forward_query" => {
                let forward = text.trim().to_ascii_lowercase().parse();
                self.forward_query =
                    Some(forward.map_err(|_| format!("{column}: {} is neither true nor false", shown(text)))?);
            }
            "note" => self.note = Some(text.to_owned()),
            "created_at" => self.created_at = Some(text.to_owned()),
            _ => self.clicks = Some(number()?),
        }
        Ok(())
    }

    fn draft(self) -> Result<Draft, Vec<String>> {
        let counts = [("status", self.status), ("max_visits", self.max_visits), ("clicks", self.clicks)];
        let too_large = counts.into_iter().filter_map(|(column, count)| {
            let count = count.filter(|count| *count > COUNT_MAX)?;
            Some(format!("{column}: {count} is more than {COUNT_MAX}"))
        });
        let wrong: Vec<String> = too_large.collect();
        if !wrong.is_empty() {
            return Err(wrong);
        }
        Ok(Draft {
            url: self.url,
            code: self.code,
            domain: self.domain,
            title: self.title,
            tags: self.tags,
            status: self.status,
            cache_control: None,
            starts_at: self.starts_at,
            expires_at: self.expires_at,
            expired_url: self.expired_url,
            max_visits: self.max_visits,
            forward_query: self.forward_query,
            note: self.note,
            created_at: self.created_at,
            clicks: self.clicks,
        })
    }
}

/// A cell, short enough for a message, and without anything that moves a terminal's cursor.
fn shown(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// Whether a spreadsheet takes a cell for a formula, or for a command to the program that is named in it.
fn is_formula(cell: &str) -> bool {
    cell.starts_with(['=', '+', '-', '@', '\t', '\r'])
}

/// A cell that no spreadsheet evaluates: `'` stands before what it would, and before a `'` that [`unguard`] would take.
pub(crate) fn guard(cell: &str) -> Cow<'_, str> {
    let after_quote = cell.strip_prefix('\'').is_some_and(|rest| is_formula(rest) || rest.starts_with('\''));
    if is_formula(cell) || after_quote { format!("'{cell}").into() } else { cell.into() }
}

/// Undoes [`guard`].
fn unguard(cell: &str) -> &str {
    match cell.strip_prefix('\'') {
        Some(rest) if is_formula(rest) || rest.starts_with('\'') => rest,
        _ => cell,
    }
}

/// Writes links, a piece at a time.
#[derive(Debug)]
pub struct Writer {
    format: Format,
    begun: bool,
}

impl Writer {
    #[must_use]
    pub fn new(format: Format) -> Self {
        Self { format, begun: false }
    }

    /// The next bytes of the file; with the first ones of CSV comes the header, also if there are no links.
    /// `host` is empty for the default domain.
    pub fn write<'a>(&mut self, links: &[Link], host: impl Fn(DomainId) -> &'a str) -> Bytes {
        let records = links.iter().map(|link| Record::of(link, host(link.key.domain)));
        match self.format {
            Format::Csv => {
                let mut out = csv::Writer::from_writer(Vec::new());
                if !self.begun {
                    out.write_record(COLUMNS).expect("a vector takes it");
                }
                for record in records {
                    for cell in record.cells() {
                        out.write_field(&*guard(&cell)).expect("a vector takes it");
                    }
                    out.write_record(None::<&[u8]>).expect("a vector takes it");
                }
                self.begun = true;
                out.into_inner().expect("a vector takes it").into()
            }
            Format::Ndjson => {
                let mut out = Vec::new();
                for record in records {
                    serde_json::to_writer(&mut out, &record).expect("texts and numbers are JSON");
                    out.push(b'\n');
                }
                out.into()
            }
        }
    }
}

/// Why a file is not read at all.
#[derive(Debug, thiserror::Error)]
pub enum BadTable {
    #[error("the file is empty: its first line names the columns, url at least")]
    Empty,
    #[error("the first line is not text in UTF-8 of at most {RECORD_BYTES_MAX} bytes: is the file CSV?")]
    Unreadable,
    #[error("unknown columns {unknown}: the first line names the columns, which are {}", COLUMNS.join(", "))]
    Unknown { unknown: String },
    #[error("the column {0} is named twice: name it once")]
    Twice(&'static str),
    #[error("there is no column url: name it in the first line")]
    NoUrl,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A record of a file.
#[derive(Debug, PartialEq, Eq)]
pub struct Row {
    /// Where it begins, from 1.
    pub line: u64,
    /// The draft, or a reason for each thing that is wrong.
    pub draft: Result<Draft, Vec<String>>,
}

/// Reads a file, a record at a time. A BOM at its start is skipped; empty lines are no records.
#[derive(Debug)]
pub struct Reader<R> {
    input: io::Chain<io::Cursor<Vec<u8>>, R>,
    format: Format,
    /// Of each cell of a CSV record.
    columns: Vec<&'static str>,
    split: Split,
}

impl<R: BufRead> Reader<R> {
    /// Reads the header of CSV; NDJSON has none.
    pub fn new(mut input: R, format: Format) -> Result<Self, BadTable> {
        let mut head = Vec::new();
        input.by_ref().take(BOM.len() as u64).read_to_end(&mut head)?;
        if head == BOM {
            head.clear();
        }
        let split = Split { next_line: 1, ..Split::default() };
        let mut reader = Self { input: io::Cursor::new(head).chain(input), format, columns: Vec::new(), split };
        if format == Format::Csv {
            reader.read_header()?;
        }
        Ok(reader)
    }

    fn read_header(&mut self) -> Result<(), BadTable> {
        if !self.split.next(&mut self.input, self.format)? {
            return Err(BadTable::Empty);
        }
        if self.split.fault().is_some() {
            return Err(BadTable::Unreadable);
        }
        let mut unknown = Vec::new();
        for cell in self.split.cells() {
            let name = str::from_utf8(cell).map_err(|_| BadTable::Unreadable)?.trim();
            match COLUMNS.into_iter().find(|column| *column == name) {
                Some(column) if self.columns.contains(&column) => return Err(BadTable::Twice(column)),
                Some(column) => self.columns.push(column),
                None => unknown.push(shown(name)),
            }
        }
        if !unknown.is_empty() {
            return Err(BadTable::Unknown { unknown: unknown.join(", ") });
        }
        if self.columns.contains(&"url") { Ok(()) } else { Err(BadTable::NoUrl) }
    }

    /// The next record; none at the end.
    pub fn next_row(&mut self) -> io::Result<Option<Row>> {
        if !self.split.next(&mut self.input, self.format)? {
            return Ok(None);
        }
        let draft = match (self.split.fault(), self.format) {
            (Some(fault), _) => Err(vec![fault]),
            (None, Format::Csv) => self.of_cells(),
            (None, Format::Ndjson) => of_object(&self.split.bytes),
        };
        Ok(Some(Row { line: self.split.line, draft }))
    }

    fn of_cells(&self) -> Result<Draft, Vec<String>> {
        let (have, want) = (self.split.ends.len(), self.columns.len());
        if have != want {
            return Err(vec![format!("it has {have} cells, and the first line names {want} columns")]);
        }
        let mut record = Record::default();
        let mut wrong = Vec::new();
        for (cell, column) in self.split.cells().zip(&self.columns) {
            let taken = match str::from_utf8(cell) {
                Ok(text) => record.set(column, unguard(text)),
                Err(_) => Err(format!("{column}: it is not UTF-8")),
            };
            wrong.extend(taken.err());
        }
        if wrong.is_empty() { record.draft() } else { Err(wrong) }
    }
}

fn of_object(line: &[u8]) -> Result<Draft, Vec<String>> {
    // A record is also an array of its values to serde.
    if !line.trim_ascii_start().starts_with(b"{") {
        return Err(vec!["it is no JSON object".to_owned()]);
    }
    let record: Record = serde_json::from_slice(line).map_err(|error| {
        let text = error.to_string();
        // Its own line is always 1.
        let reason = text.rsplit_once(" at line ").map_or(&*text, |(reason, _)| reason);
        vec![format!("{reason} (column {})", error.column())]
    })?;
    record.draft()
}

/// Splits a file into records and these into cells, as RFC 4180 and crate csv do: quotes only at a cell's begin, a quote
/// in quotes is doubled, CR, LF and CRLF end a record, and what follows a closing quote belongs to the cell.
/// A record of NDJSON is a line, and one cell.
#[derive(Debug, Default)]
struct Split {
    /// Where the record begins.
    line: u64,
    next_line: u64,
    /// The cells, without their quotes.
    bytes: Vec<u8>,
    /// Where each cell ends in `bytes`.
    ends: Vec<usize>,
    /// What the file has of the record, in bytes; `bytes` and `ends` no longer grow past the limit.
    length: usize,
    open_quote: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Of NDJSON.
    Line,
    CellBegins,
    Plain,
    Quoted,
    /// Behind a quote that ends the cell, or is the first of two.
    QuoteInQuoted,
}

impl Split {
    /// Reads the next record; false at the end.
    fn next(&mut self, input: &mut impl BufRead, format: Format) -> io::Result<bool> {
        self.begin();
        let mut state = if format == Format::Csv { State::CellBegins } else { State::Line };
        loop {
            let chunk = input.fill_buf()?;
            if chunk.is_empty() {
                self.open_quote = state == State::Quoted;
                self.end_cell();
                return Ok(!self.is_blank(state));
            }
            let mut used = 0;
            let mut ended = false;
            for &byte in chunk {
                used += 1;
                self.next_line += u64::from(byte == b'\n');
                let at_end = match state {
                    State::Line => byte == b'\n',
                    State::Quoted => false,
                    State::CellBegins | State::Plain | State::QuoteInQuoted => matches!(byte, b'\n' | b'\r'),
                };
                if !at_end {
                    self.length += 1;
                    state = self.take(state, byte);
                } else if self.is_blank(state) {
                    self.begin();
                } else {
                    self.end_cell();
                    ended = true;
                    break;
                }
            }
            input.consume(used);
            if ended {
                return Ok(true);
            }
        }
    }

    fn begin(&mut self) {
        self.line = self.next_line;
        self.bytes.clear();
        self.ends.clear();
        self.length = 0;
        self.open_quote = false;
    }

    fn is_blank(&self, state: State) -> bool {
        match state {
            State::Line => self.length <= RECORD_BYTES_MAX && self.bytes.trim_ascii().is_empty(),
            _ => self.length == 0,
        }
    }

    fn take(&mut self, state: State, byte: u8) -> State {
        match (state, byte) {
            (State::Line, _) => self.push(byte, State::Line),
            (State::CellBegins, b'"') => State::Quoted,
            (State::CellBegins | State::Plain | State::QuoteInQuoted, b',') => {
                self.end_cell();
                State::CellBegins
            }
            (State::CellBegins | State::Plain, _) => self.push(byte, State::Plain),
            (State::Quoted, b'"') => State::QuoteInQuoted,
            (State::Quoted, _) | (State::QuoteInQuoted, b'"') => self.push(byte, State::Quoted),
            (State::QuoteInQuoted, _) => self.push(byte, State::Plain),
        }
    }

    fn push(&mut self, byte: u8, next: State) -> State {
        if self.length <= RECORD_BYTES_MAX {
            self.bytes.push(byte);
        }
        next
    }

    fn end_cell(&mut self) {
        if self.length <= RECORD_BYTES_MAX {
            self.ends.push(self.bytes.len());
        }
    }

    /// Why the record cannot be taken apart.
    fn fault(&self) -> Option<String> {
        if self.open_quote {
            Some("a quote is opened and never closed: the rest of the file stands in it".to_owned())
        } else if self.length > RECORD_BYTES_MAX {
            Some(format!(
                "it has {} bytes, and {RECORD_BYTES_MAX} is the most: is a quote open before its end?",
                self.length
            ))
        } else {
            None
        }
    }

    fn cells(&self) -> impl Iterator<Item = &[u8]> {
        let begins = std::iter::once(0).chain(self.ends.iter().copied());
        begins.zip(&self.ends).map(|(begin, end)| &self.bytes[begin..*end])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::key::{Case, Code, Key};
    use crate::domain::link::{Fields, LinkId, STATUSES};
    use crate::domain::time::UnixMillis;
    use proptest::prelude::*;

    const HEADER: &str = "code,url,domain,title,tags,status,starts_at,expires_at,expired_url,max_visits,forward_query,\
                          note,created_at,clicks";

    fn rows(format: Format, file: &[u8]) -> Vec<Row> {
        let mut reader = Reader::new(file, format).unwrap();
        let mut rows = Vec::new();
        while let Some(row) = reader.next_row().unwrap() {
            rows.push(row);
        }
        rows
    }

    fn link(code: &str, fields: Fields) -> Link {
        Link {
            id: LinkId(1),
            key: Key { domain: DomainId(0), code: Code::parse(code.as_bytes(), Case::Sensitive).unwrap() },
            fields,
            version: 1,
            created_at: UnixMillis(0),
            updated_at: UnixMillis(0),
            disabled_at: None,
            deleted_at: None,
            imported_clicks: 0,
            visits_used: 0,
        }
    }

    fn target(url: &str) -> Target {
        Target::new(url).unwrap()
    }

    /// What of each record is expected: its line, and a part of each reason or of the draft as `Debug` shows it.
    fn check(format: Format, file: &[u8], want: &[(u64, Result<&str, &[&str]>)]) {
        let shown = String::from_utf8_lossy(&file[..file.len().min(200)]).into_owned();
        let got = rows(format, file);
        assert_eq!(got.len(), want.len(), "{shown:?}: {got:?}");
        for (row, (line, outcome)) in got.iter().zip(want) {
            assert_eq!(row.line, *line, "{shown:?}");
            match (&row.draft, outcome) {
                (Ok(draft), Ok(part)) => assert!(format!("{draft:?}").contains(part), "{shown:?}: {draft:?}"),
                (Err(reasons), Err(parts)) => {
                    assert_eq!(reasons.len(), parts.len(), "{shown:?}: {reasons:?}");
                    for (reason, part) in reasons.iter().zip(*parts) {
                        assert!(reason.contains(part), "{shown:?}: {reason}");
                    }
                }
                (got, want) => panic!("{shown:?}: {got:?} instead of {want:?}"),
            }
        }
    }

    #[test]
    fn csv_records() {
        let csv = |file: &str, want: &[(u64, Result<&str, &[&str]>)]| check(Format::Csv, file.as_bytes(), want);
        csv("url\n", &[]);
        csv("url\nhttps://a/\nhttps://b/", &[(2, Ok("https://a/")), (3, Ok("https://b/"))]);
        csv("\u{feff}url\r\nhttps://a/\r\n\r\nhttps://b/\r\n", &[(2, Ok("https://a/")), (4, Ok("https://b/"))]);
        csv(
            "\u{feff}\"url\",\"note\"\nu,\"a\nb\"\nv,c\n",
            &[(2, Ok(r#"note: Some("a\nb")"#)), (4, Ok("note: Some(\"c"))],
        );
        csv("url , tags\nu,\"a,b\"\n", &[(2, Ok(r#"tags: Some(["a", "b"])"#))]);
        csv(
            "url,forward_query,status\nu,TRUE,301\nu,,\n",
            &[(2, Ok("status: Some(301)")), (3, Ok("forward_query: None"))],
        );
        csv(
            "url,code\nu,'-a\nu,''a\nu,'a\nu,''=a\n",
            &[
                (2, Ok(r#"code: Some("-a")"#)),
                (3, Ok(r#"code: Some("'a")"#)),
                (4, Ok(r#"code: Some("'a")"#)),
                (5, Ok(r#"code: Some("'=a")"#)),
            ],
        );
        csv(
            "url,code\na\nb,c,d\ne,f\n",
            &[
                (2, Err(&["it has 1 cells, and the first line names 2 columns"])),
                (3, Err(&["it has 3 cells"])),
                (4, Ok("\"f\"")),
            ],
        );
        csv(
            "url,status,max_visits,forward_query,clicks\nu,x,-1,maybe,9223372036854775808\nu,,,,5\n",
            &[
                (
                    2,
                    Err(&[
                        "status: \"x\" is no whole number",
                        "max_visits: \"-1\"",
                        "forward_query: \"maybe\" is neither",
                    ]),
                ),
                (3, Ok("clicks: Some(5)")),
            ],
        );
        csv("url,clicks\nu,9223372036854775808\n", &[(2, Err(&["clicks: 9223372036854775808 is more than"]))]);
        csv("url,note\nu,\"never closed\nv,w\n", &[(2, Err(&["never closed"]))]);
        check(Format::Csv, b"url,title\nu,\xff\xfe\nv,w\n", &[(2, Err(&["title: it is not UTF-8"])), (3, Ok("\"w\""))]);
    }

    #[test]
    fn ndjson_records() {
        let json = |file: &str, want: &[(u64, Result<&str, &[&str]>)]| check(Format::Ndjson, file.as_bytes(), want);
        json("", &[]);
        json(
            "\u{feff}{\"url\": \"u\"}\r\n\n  \n{\"url\": \"v\", \"tags\": [\"a\", \"b,c\"]}",
            &[(1, Ok("\"u\"")), (4, Ok(r#"tags: Some(["a", "b,c"])"#))],
        );
        json(
            "{\"url\": \"u\", \"title\": null, \"clicks\": 3, \"forward_query\": false}\n",
            &[(1, Ok("clicks: Some(3)"))],
        );
        json(
            "{\"url\": \"u\", \"colour\": 1}\n{\"url\": \"'=v\"}\n",
            &[(1, Err(&["unknown field `colour`, expected one of `code`, `url`, `domain`"])), (2, Ok("\"'=v\""))],
        );
        json(
            "{\"url\": 1}\n{\"status\": \"x\"}\n{\"max_visits\": -1}\n[\"code\", \"u\"]\n{\"url\": \n7\n",
            &[
                (1, Err(&["invalid type: integer `1`, expected a string (column"])),
                (2, Err(&["expected u64"])),
                (3, Err(&["expected u64"])),
                (4, Err(&["no JSON object"])),
                (5, Err(&["EOF"])),
                (6, Err(&["no JSON object"])),
            ],
        );
        json("{\"max_visits\": 9223372036854775808}\n", &[(1, Err(&["max_visits: 9223372036854775808 is more than"]))]);
        check(Format::Ndjson, b"{\"url\": \"\xff\"}\n{}\n", &[(1, Err(&["column"])), (2, Ok("url: None"))]);
    }

    #[test]
    fn headers_that_are_refused() {
        for (file, want) in [
            (&b""[..], "the file is empty"),
            (b"\n\r\n", "the file is empty"),
            (
                b"url,colour,\xc3\xa9\n",
                "unknown columns \"colour\", \"\u{e9}\": the first line names the columns, which are code, url",
            ),
            (b"https://example.com/\n", "unknown columns \"https://example.com/\""),
            (b"url,code,url\n", "the column url is named twice"),
            (b"code,title\n", "there is no column url"),
            (b"\xff\xfeu\0r\0l\0\n", "not text in UTF-8"),
            (b"\"url\nhttps://a/\n", "not text in UTF-8"),
        ] {
            let got = Reader::new(file, Format::Csv).unwrap_err().to_string();
            assert!(got.contains(want), "{got}");
        }
    }

    #[test]
    fn a_record_too_long_is_skipped_and_kept_by_nobody() {
        let long = "x\"\"\n".repeat(1 << 20);
        let file = format!("url,note\na,\"{long}\"\nb,c\n");
        let mut reader = Reader::new(file.as_bytes(), Format::Csv).unwrap();
        let row = reader.next_row().unwrap().unwrap();
        assert!(row.draft.unwrap_err()[0].contains("65536 is the most"));
        assert!(reader.split.bytes.capacity() <= 2 * RECORD_BYTES_MAX, "{}", reader.split.bytes.capacity());
        let row = reader.next_row().unwrap().unwrap();
        assert_eq!((row.line, row.draft.unwrap().note.as_deref()), (3 + (1 << 20), Some("c")));

        let commas = format!("url\n{}\nb\n", ",".repeat(RECORD_BYTES_MAX + 1));
        check(Format::Csv, commas.as_bytes(), &[(2, Err(&["65537 bytes"])), (3, Ok("\"b\""))]);
        let spaces = format!("{}\n{{\"url\": \"b\"}}", " ".repeat(RECORD_BYTES_MAX + 1));
        check(Format::Ndjson, spaces.as_bytes(), &[(1, Err(&["65537 bytes"])), (2, Ok("\"b\""))]);
        let fits = format!("url\n{}\n", "u".repeat(RECORD_BYTES_MAX));
        check(Format::Csv, fits.as_bytes(), &[(2, Ok("uuu"))]);
    }

    #[test]
    fn files_that_are_written() {
        let mut fields = Fields::new("HTTPS://Example.com".to_owned(), target("https://example.com/"));
        let plain = link("abc", fields.clone());
        fields.title = Some("=1+1".to_owned());
        fields.tags = vec!["a".to_owned(), "b".to_owned()];
        fields.status = Some(301);
        fields.starts_at = Some(UnixMillis(1));
        fields.expires_at = Some(UnixMillis(86_400_000));
        fields.expired_url = Some(target("https://example.com/over"));
        fields.max_visits = Some(5);
        fields.forward_query = Some(false);
        fields.note = Some("two\nlines, \"quoted\"".to_owned());
        let mut full = link("-x", fields);
        full.key.domain = DomainId(1);
        full.imported_clicks = 7;
        let write = |format| {
            let mut writer = Writer::new(format);
            let host = |domain: DomainId| if domain.0 == 1 { "go.example" } else { "" };
            let first = writer.write(std::slice::from_ref(&plain), host);
            let pieces = [first, writer.write(std::slice::from_ref(&full), host), writer.write(&[], host)];
            String::from_utf8(pieces.concat()).unwrap()
        };
        assert_eq!(
            write(Format::Csv),
            format!(
                "{HEADER}\nabc,HTTPS://Example.com,,,,,,,,,,,1970-01-01T00:00:00Z,0\n\
                 '-x,HTTPS://Example.com,go.example,'=1+1,\"a,b\",301,1970-01-01T00:00:00.001Z,1970-01-02T00:00:00Z,\
                 https://example.com/over,5,false,\"two\nlines, \"\"quoted\"\"\",1970-01-01T00:00:00Z,7\n"
            )
        );
        assert_eq!(
            write(Format::Ndjson),
            "{\"code\":\"abc\",\"url\":\"HTTPS://Example.com\",\"created_at\":\"1970-01-01T00:00:00Z\",\"clicks\":0}\n\
             {\"code\":\"-x\",\"url\":\"HTTPS://Example.com\",\"domain\":\"go.example\",\"title\":\"=1+1\",\
             \"tags\":[\"a\",\"b\"],\"status\":301,\"starts_at\":\"1970-01-01T00:00:00.001Z\",\
             \"expires_at\":\"1970-01-02T00:00:00Z\",\"expired_url\":\"https://example.com/over\",\"max_visits\":5,\
             \"forward_query\":false,\"note\":\"two\\nlines, \\\"quoted\\\"\",\"created_at\":\"1970-01-01T00:00:00Z\",\
             \"clicks\":7}\n"
        );
        for (format, want) in [(Format::Csv, format!("{HEADER}\n")), (Format::Ndjson, String::new())] {
            assert_eq!(Writer::new(format).write(&[], |_| ""), want);
        }
    }

    fn a_link() -> impl Strategy<Value = Link> {
        let text = || prop::option::of("(?s)[=+@'\"\t\r\n,-]{0,3}.{1,20}");
        let count = || prop::option::of(0..=COUNT_MAX);
        let at = || prop::option::of((-60_000_000_000_000..200_000_000_000_000_i64).prop_map(UnixMillis));
        let tags = prop::collection::vec("[^,\\p{Cc}]{1,5}", 0..3);
        let status = prop::option::of(prop::sample::select(STATUSES.to_vec()));
        let texts = (text(), text(), "(?s)[=+@'\"\t\r\n,-]{0,3}.{1,20}", prop::option::of("[!-~]{1,20}"));
        (texts, "[-._~a-zA-Z0-9]{1,20}", tags, status, (at(), at(), at()), (count(), count()), any::<Option<bool>>())
            .prop_map(|((title, note, written, over), code, tags, status, times, counts, forward_query)| {
                let fields = Fields {
                    title,
                    note,
                    tags,
                    status,
                    starts_at: times.0,
                    expires_at: times.1,
                    expired_url: over.as_deref().and_then(Target::new),
                    max_visits: counts.0,
                    forward_query,
                    ..Fields::new(written, target("https://example.com/"))
                };
                let created_at = times.2.unwrap_or_default();
                Link { created_at, imported_clicks: counts.1.unwrap_or(0), ..link(&code, fields) }
            })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_as_it_was(links in prop::collection::vec(a_link(), 0..4), host in "([a-z]{1,5})?") {
            for format in [Format::Csv, Format::Ndjson] {
                let file = Writer::new(format).write(&links, |_| &host);
                let want: Vec<Draft> = links.iter().map(|link| Record::of(link, &host).draft().unwrap()).collect();
                let got: Vec<Draft> = rows(format, &file).into_iter().map(|row| row.draft.unwrap()).collect();
                prop_assert_eq!(got, want);
                // Nor is a cell of CSV left that a spreadsheet evaluates.
                if format == Format::Csv {
                    for record in csv::Reader::from_reader(&*file).records() {
                        prop_assert!(!record.unwrap().iter().any(is_formula));
                    }
                }
            }
        }

        #[test]
        fn guarding_is_undone(cell in "(?s)['=+@\t\r-]{0,4}.{0,5}") {
            let guarded = guard(&cell);
            prop_assert_eq!(unguard(&guarded), &*cell);
            prop_assert!(!is_formula(&guarded));
        }

        #[test]
        fn records_are_those_of_crate_csv(file in "[ab\",\n\ré]{0,40}") {
            let mut split = Split { next_line: 1, ..Split::default() };
            // A short buffer: states outlive a chunk.
            let mut input = io::BufReader::with_capacity(3, file.as_bytes());
            let mut got: Vec<Vec<Vec<u8>>> = Vec::new();
            while split.next(&mut input, Format::Csv).unwrap() {
                got.push(split.cells().map(<[u8]>::to_vec).collect());
            }
            let mut oracle = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(file.as_bytes());
            let want: Vec<Vec<Vec<u8>>> =
                oracle.byte_records().map(|record| record.unwrap().iter().map(<[u8]>::to_vec).collect()).collect();
            prop_assert_eq!(got, want);
        }

        #[test]
        fn any_bytes_are_rows_or_an_error(file in prop::collection::vec(any::<u8>(), 0..200)) {
            for format in [Format::Csv, Format::Ndjson] {
                for file in [file.clone(), [b"url,code\n", &*file].concat()] {
                    let Ok(mut reader) = Reader::new(&*file, format) else { continue };
                    let mut last = 0;
                    while let Some(row) = reader.next_row().unwrap() {
                        prop_assert!(row.line >= last);
                        last = row.line;
                    }
                }
            }
        }
    }
}
