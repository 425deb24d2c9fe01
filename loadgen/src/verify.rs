//! `loadgen verify`: what the server says it stored, held against what the ledger says was sent and answered.
//!
//! In: a ledger, an export of visits (CSV or NDJSON), an export of links (the same). Out: [`Findings`]: each loss, each
//! double and each visit that should not be, by its id. Never: calls something explained that the server had answered, or
//! lost what it had not; keeps a file in memory: 16 bytes a request, 24 a created link, and the findings that are shown. At
//! its limit: of each kind of finding the first are kept, the rest counted; a file that is not what it should be is an
//! error, since half a comparison proves nothing.
//!
//! The rules are a table in `LEDGER.md`. Measured: 10 million requests (a ledger of 20 million lines and 1.2 GB, 10 million
//! visits as CSV) take 3.1 s of CPU time and 161 MB, with the visits as NDJSON 4.4 s; by the test `ten_million_requests`,
//! which says how to run it.

use std::collections::HashMap;
use std::fmt::{self, Display, Formatter};
use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use crate::ledger::read::{self, Reader, Record, RequestId, unescape};

mod export;

use export::{Kind, Link, Visit};

/// What a caller chooses.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Findings of one kind that are kept; the rest is counted.
    pub max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { max: 100 }
    }
}

/// All that was found: nothing wrong where `wrong` is empty.
#[derive(Debug, Serialize)]
pub struct Findings {
    /// 16 hexadecimal digits.
    pub run: String,
    pub target: String,
    pub requests: Requests,
    /// `None`: no export of visits was given.
    pub visits: Option<Visits>,
    /// `None`: no export of links was given.
    pub links: Option<Links>,
    pub wrong: Vec<Group>,
}

/// What the ledger says.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct Requests {
    pub sent: u64,
    /// Whose answer came whole.
    pub received: u64,
    /// With a 3xx, to a request for a link: each must be one visit.
    pub redirects: u64,
    /// Of `received`: a redirect to somewhere else than the known target.
    pub wrong_location: u64,
    /// Sent and not fully received, of requests for a link: how many visits too many they can explain.
    pub unanswered: u64,
    /// Created links that were acknowledged.
    pub created: u64,
    /// The last line was not whole: the generator was killed.
    pub cut: bool,
}

/// What the export of visits says.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct Visits {
    pub read: u64,
    /// Of this run.
    pub of_this_run: u64,
    /// Without an id, or with one of another run.
    pub of_others: u64,
    /// Requests without a whole answer that are there once: over-counts that are explained.
    pub explained: u64,
}

/// What the export of links says.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct Links {
    pub read: u64,
    /// Acknowledged in this run, and there with their target.
    pub found: u64,
    /// That no answer of this run acknowledged.
    pub not_acknowledged: u64,
}

/// What can be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Wrong {
    /// A redirect was received, and is in no visit.
    Missing,
    /// In more than one visit.
    Doubled,
    /// A redirect was received, and is stored as a visit to no link.
    StoredAsOrphan,
    /// A visit of a request that was answered otherwise, or that asked for no link.
    Counted,
    /// Stored as a visit of another code than was asked for.
    Elsewhere,
    /// An id of this run that was never sent.
    Unknown,
    /// A link that was acknowledged and is not there.
    LinkLost,
    /// A link that was acknowledged and leads elsewhere.
    LinkOtherTarget,
}

impl Wrong {
    pub const ALL: [Self; 8] = [
        Self::Missing,
        Self::Doubled,
        Self::StoredAsOrphan,
        Self::Counted,
        Self::Elsewhere,
        Self::Unknown,
        Self::LinkLost,
        Self::LinkOtherTarget,
    ];

    /// For people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Doubled => "doubled",
            Self::StoredAsOrphan => "stored as orphan",
            Self::Counted => "counted",
            Self::Elsewhere => "elsewhere",
            Self::Unknown => "unknown",
            Self::LinkLost => "link lost",
            Self::LinkOtherTarget => "link with another target",
        }
    }
}

/// All findings of one kind.
#[derive(Debug, Serialize)]
pub struct Group {
    pub wrong: Wrong,
    pub count: u64,
    /// The first of them.
    pub findings: Vec<Finding>,
}

/// One request or link with which something is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub wrong: Wrong,
    pub id: String,
    /// Since the run began, when it was sent or, for a link, acknowledged.
    pub at_ns: Option<u64>,
    pub class: String,
    pub method: String,
    /// What was asked for or created; empty where no link was.
    pub code: String,
    /// Of the answer that came whole.
    pub status: Option<u16>,
    /// Visits with this id; 255 stands for more as well.
    pub times: u64,
    /// What is stored instead: a kind of visit, a code, a target.
    pub stored: Option<String>,
}

/// A request, in 16 bytes: what is shown is read from the ledger again.
#[derive(Debug, Clone, Copy)]
struct Request {
    /// Where its `S` line begins.
    offset: u64,
    /// Of its code; two codes share one with a probability of 2^-32: then a visit that was stored elsewhere is not seen.
    code: u32,
    /// 0: no whole answer.
    status: u16,
    /// Visits with its id, up to 255.
    times: u8,
    /// Of its first visit, and whether it asks for a link.
    flags: u8,
}

const _: () = assert!(size_of::<Request>() == 16);

/// Flags of a [`Request`]; the lowest bits are the kind of its first visit.
const KIND: u8 = 0b0000_0111;
const ASKS: u8 = 0b0000_1000;

/// A created link; in the order of `code`. Two of ten million hashes of 64 bits are alike once in 400,000 runs.
#[derive(Debug, Clone, Copy)]
struct Created {
    code: u64,
    target: u64,
    /// Where its `C` line begins, and in the highest bits what was found.
    offset: u64,
}

const THERE: u64 = 1 << 63;
const RIGHT: u64 = 1 << 62;
const OFFSET: u64 = RIGHT - 1;

/// The ledger in memory.
#[derive(Debug)]
struct Sent {
    run: u64,
    target: String,
    /// By worker and number.
    workers: Vec<Vec<Request>>,
    created: Vec<Created>,
    requests: Requests,
}

/// Compares a ledger with one or both exports. What is not given is not checked, and the findings say so.
pub fn verify(ledger: &Path, visits: Option<&Path>, links: Option<&Path>, options: Options) -> Result<Findings> {
    ensure!(visits.is_some() || links.is_some(), "nothing to compare the ledger with: give --visits, --links or both");
    let mut sent = load(ledger)?;
    let mut wrong = Collected { file: File::open(ledger)?, max: options.max, groups: HashMap::new() };
    let visits = visits.map(|path| compare_visits(&mut sent, path, &mut wrong)).transpose()?;
    let links = links.map(|path| compare_links(&mut sent, path, &mut wrong)).transpose()?;
    Ok(Findings {
        run: format!("{:016x}", sent.run),
        target: sent.target,
        requests: sent.requests,
        visits,
        links,
        wrong: wrong.in_order(),
    })
}

impl Findings {
    #[must_use]
    pub fn is_right(&self) -> bool {
        self.wrong.is_empty()
    }

    /// 0: nothing is wrong. 1: something is.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        u8::from(!self.is_right())
    }
}

/// Verdict, totals, the sentence on what is explained, then a line for each finding.
impl Display for Findings {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        let counts: Vec<_> = self.wrong.iter().map(|group| format!("{} {}", group.count, group.wrong.name())).collect();
        match (counts.is_empty(), &self.visits, &self.links) {
            (false, ..) => writeln!(out, "WRONG: {}", counts.join(", "))?,
            (true, Some(_), Some(_)) => {
                writeln!(out, "RIGHT: every redirect is one visit, every acknowledged link is there")?
            }
            (true, _, None) => writeln!(out, "RIGHT: every redirect is one visit")?,
            (true, None, _) => writeln!(out, "RIGHT: every acknowledged link is there")?,
        }
        let Requests { sent, received, redirects, wrong_location, unanswered, created, cut } = self.requests;
        writeln!(out, "run {} against {}", self.run, self.target)?;
        writeln!(
            out,
            "ledger: {sent} requests sent, {received} fully received, {redirects} redirects of a link, \
             {wrong_location} to a wrong target; {created} links acknowledged"
        )?;
        if cut {
            writeln!(out, "ledger: its last line is not whole (the generator was killed): it is taken as absent")?;
        }
        match &self.visits {
            Some(Visits { read, of_this_run, of_others, explained }) => {
                writeln!(out, "visits: {read} read, {of_this_run} of this run, {of_others} without its id (ignored)")?;
                writeln!(
                    out,
                    "{unanswered} requests for a link were sent and not fully received: they explain up to \
                     {unanswered} visits too many; {explained} of them are there"
                )?;
            }
            None => writeln!(out, "visits: not checked (no --visits)")?,
        }
        match &self.links {
            Some(Links { read, found, not_acknowledged }) => writeln!(
                out,
                "links: {read} read, {found} of {created} acknowledged are there with their target, \
                 {not_acknowledged} that no answer of this run acknowledged (ignored)"
            )?,
            None => writeln!(out, "links: not checked (no --links)")?,
        }
        for group in &self.wrong {
            for finding in &group.findings {
                writeln!(out, "{finding}")?;
            }
            let more = group.count - group.findings.len() as u64;
            if more > 0 {
                writeln!(out, "{}: and {more} more", group.wrong.name())?;
            }
        }
        Ok(())
    }
}

impl Display for Finding {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        write!(out, "{}: {}", self.wrong.name(), self.id)?;
        if let Some(at_ns) = self.at_ns {
            write!(out, " at {}.{:06} s", at_ns / 1_000_000_000, at_ns / 1_000 % 1_000_000)?;
        }
        if !self.class.is_empty() {
            write!(out, ", {} {}", self.class, self.method)?;
        }
        if !self.code.is_empty() {
            write!(out, ", code {}", self.code)?;
        }
        let stored = self.stored.as_deref().unwrap_or("another");
        let answered = match self.status {
            Some(status) => format!("answered {status}"),
            None => "not fully received".to_owned(),
        };
        match self.wrong {
            Wrong::Missing => write!(out, ": {answered}, in no visit"),
            Wrong::Doubled => write!(out, ": {answered}, in {} visits", self.times),
            Wrong::StoredAsOrphan => write!(out, ": {answered}, stored as a visit to no link"),
            Wrong::Counted if self.code.is_empty() => write!(out, ": counted as {stored} though it asks for no link"),
            Wrong::Counted => write!(out, ": counted as {stored} though it was {answered}"),
            Wrong::Elsewhere => write!(out, ": stored as a visit of {stored}"),
            Wrong::Unknown => write!(out, ": stored as {stored}, but never sent: not explained"),
            Wrong::LinkLost => write!(out, ": acknowledged, and not there"),
            Wrong::LinkOtherTarget => write!(out, ": leads to {stored}, not to what was acknowledged"),
        }
    }
}

fn load(ledger: &Path) -> Result<Sent> {
    let mut reader = Reader::open(ledger)?;
    let run = reader.header().run;
    let target = reader.header().target.clone();
    let mut workers: Vec<Vec<Request>> = Vec::new();
    let mut created = Vec::new();
    let mut requests = Requests::default();
    loop {
        let line = reader.line_number() + 1;
        let Some((offset, record)) = reader.next()? else { break };
        take(run, offset, record, &mut workers, &mut created, &mut requests)
            .with_context(|| format!("{}: line {line}", ledger.display()))?;
    }
    requests.cut = reader.was_cut();
    requests.created = created.len() as u64;
    created.sort_unstable_by_key(|created| created.code);
    Ok(Sent { run, target, workers, created, requests })
}

/// One record of the ledger; an id that is not the next, or that answers what was not sent, is no ledger of ours.
fn take(
    run: u64,
    offset: u64,
    record: Record<'_>,
    workers: &mut Vec<Vec<Request>>,
    created: &mut Vec<Created>,
    requests: &mut Requests,
) -> Result<()> {
    let (Record::Sent { id, .. } | Record::Received { id, .. } | Record::Created { id, .. }) = record;
    ensure!(id.run == run, "id {id} is of another run");
    let worker = usize::from(id.worker);
    if workers.len() <= worker {
        workers.resize_with(worker + 1, Vec::new);
    }
    let worker = &mut workers[worker];
    let number = usize::try_from(id.number)?;
    match record {
        Record::Sent { code, .. } => {
            ensure!(number == worker.len(), "id {id} is not the next of its worker");
            let asks = !code.is_empty();
            let flags = if asks { ASKS } else { 0 };
            worker.push(Request { offset, code: hash(&unescape(code)) as u32, status: 0, times: 0, flags });
            requests.sent += 1;
            requests.unanswered += u64::from(asks);
        }
        Record::Received { status, location_right, .. } => {
            let request = worker.get_mut(number).with_context(|| format!("id {id} was answered and never sent"))?;
            ensure!(request.status == 0, "id {id} was answered twice");
            ensure!(status != 0, "id {id} was answered with status 0");
            request.status = status;
            let asks = request.flags & ASKS != 0;
            requests.received += 1;
            requests.unanswered -= u64::from(asks && !is_unknown(status));
            requests.redirects += u64::from(asks && is_redirect(status));
            requests.wrong_location += u64::from(!location_right && is_redirect(status));
        }
        Record::Created { code, target, .. } => {
            ensure!(number < worker.len(), "id {id} created a link and was never sent");
            created.push(Created { code: hash(&unescape(code)), target: hash(&unescape(target)), offset });
        }
    }
    Ok(())
}

fn compare_visits(sent: &mut Sent, path: &Path, wrong: &mut Collected) -> Result<Visits> {
    let mut visits = Visits::default();
    export::visits(path, |Visit { id, code, kind }| {
        visits.read += 1;
        let Some(id) = RequestId::parse(id).filter(|id| id.run == sent.run) else {
            visits.of_others += 1;
            return Ok(());
        };
        visits.of_this_run += 1;
        let number = usize::try_from(id.number)?;
        let worker = sent.workers.get_mut(usize::from(id.worker));
        let Some(request) = worker.and_then(|worker| worker.get_mut(number)) else {
            wrong.add(Wrong::Unknown, |_| {
                let code = String::from_utf8_lossy(code).into_owned();
                Ok(Finding { code, stored: Some(kind.name().to_owned()), times: 1, ..blank(Wrong::Unknown, id) })
            })?;
            return Ok(());
        };
        if request.times == 0 {
            request.flags |= kind as u8;
        }
        request.times = request.times.saturating_add(1);
        // What a visit to no link is stored under is the server's affair.
        let asks = request.flags & ASKS != 0;
        if asks && kind != Kind::Orphan && request.code != hash(code) as u32 {
            wrong.add_sent(Wrong::Elsewhere, id, request, Some(&String::from_utf8_lossy(code)))?;
        }
        Ok(())
    })?;
    for (worker, requests) in sent.workers.iter().enumerate() {
        for (number, request) in requests.iter().enumerate() {
            // Both fit: they were made of an id.
            let id = RequestId { run: sent.run, worker: worker as u16, number: number as u64 };
            visits.explained += u64::from(is_explained(request));
            if let Some(what) = judge(request) {
                let kind = (request.times > 0).then(|| Kind::of_bits(request.flags & KIND).name());
                wrong.add_sent(what, id, request, kind)?;
            }
        }
    }
    Ok(visits)
}

/// The table of `LEDGER.md`.
fn judge(request: &Request) -> Option<Wrong> {
    let orphan = request.flags & KIND == Kind::Orphan as u8;
    if request.flags & ASKS == 0 {
        return (request.times > 0).then_some(Wrong::Counted);
    }
    match (request.status, request.times) {
        (status, 0 | 1) if is_unknown(status) => None,
        (status, 0) => is_redirect(status).then_some(Wrong::Missing),
        (status, 1) if is_redirect(status) => orphan.then_some(Wrong::StoredAsOrphan),
        (404 | 410, 1) => (!orphan).then_some(Wrong::Counted),
        (status, _) if is_unknown(status) || is_redirect(status) || matches!(status, 404 | 410) => Some(Wrong::Doubled),
        _ => Some(Wrong::Counted),
    }
}

fn is_explained(request: &Request) -> bool {
    request.flags & ASKS != 0 && is_unknown(request.status) && request.times == 1
}

/// No answer, or a gateway's on the way (RFC 9110, sections 15.6.3 and 15.6.5), which has none of the server's.
fn is_unknown(status: u16) -> bool {
    matches!(status, 0 | 502 | 504)
}

fn is_redirect(status: u16) -> bool {
    (300..400).contains(&status)
}

fn compare_links(sent: &mut Sent, path: &Path, wrong: &mut Collected) -> Result<Links> {
    let mut links = Links::default();
    // Where the first of those lead that lead elsewhere, by where their lines begin.
    let mut other: HashMap<u64, String> = HashMap::new();
    export::links(path, |Link { code, target }| {
        links.read += 1;
        let (code, target_hash) = (hash(code), hash(target));
        let from = sent.created.partition_point(|created| created.code < code);
        let same = sent.created[from..].iter_mut().take_while(|created| created.code == code);
        let mut acknowledged = false;
        for created in same {
            acknowledged = true;
            created.offset |= THERE;
            if created.target == target_hash {
                created.offset |= RIGHT;
            } else if other.len() < wrong.max {
                other.insert(created.offset & OFFSET, String::from_utf8_lossy(target).into_owned());
            }
        }
        links.not_acknowledged += u64::from(!acknowledged);
        Ok(())
    })?;
    sent.created.sort_unstable_by_key(|created| created.offset & OFFSET);
    for created in &sent.created {
        let offset = created.offset & OFFSET;
        // The same code may stand there for another domain too.
        match (created.offset & THERE != 0, created.offset & RIGHT != 0) {
            (_, true) => links.found += 1,
            (true, false) => wrong.add_created(Wrong::LinkOtherTarget, offset, other.remove(&offset))?,
            (false, false) => wrong.add_created(Wrong::LinkLost, offset, None)?,
        }
    }
    Ok(links)
}

/// The findings so far, and the ledger to read from what they are about.
struct Collected {
    file: File,
    max: usize,
    groups: HashMap<Wrong, Group>,
}

impl Collected {
    /// Counts a finding, and makes it if it will be shown.
    fn add(&mut self, wrong: Wrong, make: impl FnOnce(&File) -> Result<Finding>) -> Result<()> {
        let group = self.groups.entry(wrong).or_insert_with(|| Group { wrong, count: 0, findings: Vec::new() });
        group.count += 1;
        if group.findings.len() < self.max {
            group.findings.push(make(&self.file)?);
        }
        Ok(())
    }

    fn add_sent(&mut self, wrong: Wrong, id: RequestId, request: &Request, stored: Option<&str>) -> Result<()> {
        self.add(wrong, |file| {
            read::at(file, request.offset, |record| {
                let Record::Sent { at_ns, class, method, code, .. } = record else {
                    bail!("the ledger changed while it was read")
                };
                Ok(Finding {
                    at_ns: Some(at_ns),
                    class: text(class),
                    method: text(method),
                    code: text(code),
                    status: (request.status != 0).then_some(request.status),
                    times: u64::from(request.times),
                    stored: stored.map(str::to_owned),
                    ..blank(wrong, id)
                })
            })?
        })
    }

    fn add_created(&mut self, wrong: Wrong, offset: u64, stored: Option<String>) -> Result<()> {
        self.add(wrong, |file| {
            read::at(file, offset, |record| {
                let Record::Created { id, at_ns, code, .. } = record else {
                    bail!("the ledger changed while it was read")
                };
                Ok(Finding { at_ns: Some(at_ns), code: text(code), stored, ..blank(wrong, id) })
            })?
        })
    }

    fn in_order(mut self) -> Vec<Group> {
        Wrong::ALL.iter().filter_map(|wrong| self.groups.remove(wrong)).collect()
    }
}

fn blank(wrong: Wrong, id: RequestId) -> Finding {
    Finding {
        wrong,
        id: id.to_string(),
        at_ns: None,
        class: String::new(),
        method: String::new(),
        code: String::new(),
        status: None,
        times: 0,
        stored: None,
    }
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(&unescape(field)).into_owned()
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}
