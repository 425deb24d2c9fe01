//! Single visits, one after the other: `waypost export --visits`.
//!
//! In: the visits that the store has. Out: all of them, oldest first, as CSV (RFC 4180) or NDJSON.
//! Never: keeps more than a few pages of them in memory; waits in the store for whoever reads the file.
//! At its limit: visits of one millisecond are read together, however many they are.
//!
//! Postgres is asked for one span of time after the other: an index on time would be paid by every visit, a sort of a whole
//! day would end by its time-out. SQLite has no such index either, and sorts once, into a temporary file, which is then read.
//! What is stored meanwhile is in the export if its time is not over yet.

use std::fmt;

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::mpsc;

use super::query::{Sqlite, Stats};
use crate::domain::key::DomainId;
use crate::domain::time::UnixMillis;
use crate::store::Result;
use crate::store::postgres::Postgres;
use crate::store::visited::Exported;
use crate::table::{Format, guard};

/// Visits that are read at a time.
const PAGE: u32 = 4_096;
const SPAN_MS_MIN: i64 = 1;
const SPAN_MS_MAX: i64 = super::rollup::DAY_MS;
/// What the first question is for: the store grows it while it finds little.
const SPAN_MS: i64 = 60_000;

/// The columns of CSV, and the members of NDJSON.
pub const COLUMNS: [&str; 10] =
    ["at", "domain", "code", "kind", "address", "user_agent", "referrer", "country", "request_id", "epoch"];

/// All visits, a page at a time.
pub struct Pages(From);

enum From {
    /// Its thread ends when nobody takes the next page.
    Sqlite(mpsc::Receiver<Result<Vec<Exported>>>),
    Postgres(Spans),
}

struct Spans {
    postgres: Postgres,
    /// What is left of the partitions: none before the first page.
    left: Option<std::vec::IntoIter<(i64, i64)>>,
    /// From and to, of the partition that is being read.
    at: (i64, i64),
    span_ms: i64,
    limit: u32,
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pages")
    }
}

impl Pages {
    #[must_use]
    pub fn of(stats: &Stats) -> Self {
        match stats {
            Stats::Sqlite(sqlite) => Self(From::Sqlite(sqlite_pages(sqlite.clone()))),
            Stats::Postgres(postgres) => Self(From::Postgres(Spans {
                postgres: postgres.clone(),
                left: None,
                at: (0, 0),
                span_ms: SPAN_MS,
                limit: PAGE,
            })),
        }
    }

    /// The next visits, at least one; none at the end.
    pub async fn next(&mut self) -> Result<Option<Vec<Exported>>> {
        match &mut self.0 {
            From::Sqlite(pages) => pages.recv().await.transpose(),
            From::Postgres(spans) => spans.next().await,
        }
    }
}

fn sqlite_pages(sqlite: Sqlite) -> mpsc::Receiver<Result<Vec<Exported>>> {
    let (pages, taken) = mpsc::channel(1);
    tokio::task::spawn_blocking(move || {
        let read = sqlite.export(PAGE as usize, |page| pages.blocking_send(Ok(page)).is_ok());
        if let Err(error) = read {
            // Nobody is told when nobody listens.
            let _ = pages.blocking_send(Err(error));
        }
    });
    taken
}

impl Spans {
    async fn next(&mut self) -> Result<Option<Vec<Exported>>> {
        if self.left.is_none() {
            self.left = Some(self.postgres.visit_spans().await?.into_iter());
        }
        loop {
            let (from, end) = self.at;
            if from >= end {
                match self.left.as_mut().and_then(Iterator::next) {
                    Some(partition) => self.at = partition,
                    None => return Ok(None),
                }
                continue;
            }
            let to = end.min(from.saturating_add(self.span_ms));
            let mut page = self.postgres.visits(from, to, self.limit).await?;
            if page.len() < self.limit as usize {
                if page.len() < PAGE as usize / 4 {
                    self.span_ms = (self.span_ms * 2).min(SPAN_MS_MAX);
                }
                (self.at.0, self.limit) = (to, PAGE);
            } else {
                // There may be more of the last millisecond, which is asked for again, and of what follows.
                let last = page.last().map_or(from, |visit| visit.at.0);
                page.retain(|visit| visit.at.0 < last);
                self.span_ms = (self.span_ms / 2).max(SPAN_MS_MIN);
                (self.at.0, self.limit) = (last, if page.is_empty() { self.limit.saturating_mul(2) } else { PAGE });
            }
            if !page.is_empty() {
                return Ok(Some(page));
            }
        }
    }
}

/// A line of NDJSON.
#[derive(Serialize)]
struct Line<'a> {
    at: String,
    domain: &'a str,
    code: &'a str,
    kind: &'a str,
    address: Option<&'a str>,
    user_agent: Option<&'a str>,
    referrer: Option<&'a str>,
    country: Option<&'a str>,
    request_id: Option<&'a str>,
    /// 16 hexadecimal digits: as a number, programs that count in floating point would round it.
    epoch: String,
}

/// RFC 3339 in UTC, always with milliseconds.
fn at(at: UnixMillis) -> String {
    jiff::Timestamp::from_millisecond(at.0).map_or_else(|_| at.to_string(), |at| format!("{at:.3}"))
}

/// Writes visits, a page at a time.
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

    /// The next bytes of the file; with the first ones of CSV comes the header, also if there are no visits.
    /// `host` is empty for the default domain.
    pub fn write<'a>(&mut self, visits: &'a [Exported], host: impl Fn(DomainId) -> &'a str) -> Bytes {
        let lines = visits.iter().map(|visit| Line {
            at: at(visit.at),
            domain: host(visit.domain),
            code: &visit.code,
            kind: visit.kind.name(),
            address: visit.address.as_deref(),
            user_agent: visit.user_agent.as_deref(),
            referrer: visit.referrer.as_deref(),
            country: visit.country.as_deref(),
            request_id: visit.request_id.as_deref(),
            epoch: format!("{:016x}", visit.epoch),
        });
        match self.format {
            Format::Csv => {
                let mut out = csv::Writer::from_writer(Vec::new());
                if !std::mem::replace(&mut self.begun, true) {
                    out.write_record(COLUMNS).expect("a vector takes it");
                }
                for line in lines {
                    let optional = [line.address, line.user_agent, line.referrer, line.country, line.request_id];
                    let [address, user_agent, referrer, country, request_id] = optional.map(Option::unwrap_or_default);
                    let cells = [&*line.at, line.domain, line.code, line.kind, address, user_agent, referrer, country];
                    for cell in cells.into_iter().chain([request_id, &line.epoch]) {
                        out.write_field(&*guard(cell)).expect("a vector takes it");
                    }
                    out.write_record(None::<&[u8]>).expect("a vector takes it");
                }
                out.into_inner().expect("a vector takes it").into()
            }
            Format::Ndjson => {
                let mut out = Vec::new();
                for line in lines {
                    serde_json::to_writer(&mut out, &line).expect("texts are JSON");
                    out.push(b'\n');
                }
                out.into()
            }
        }
    }
}
