//! Batches: what goes into the store in one transaction, made of the spool alone.
//!
//! In: blocks of the log. Out: rows, rollups and positions. Pure: the same blocks make the same batch.
//! Never: does IO; looks at a clock (absurd times are clamped by when the log was written).
//! At its limit: [`ROWS_MAX`] rows; what comes after is the next batch's.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ahash::{HashMap, HashSet};

use super::agents::{Agent, Agents, Referrers};
use super::sink::Position;
use super::spool::read::Block;
use super::spool::record::{self, Record};
use super::spool::segment::Tally;
use super::spool::{Epoch, Source, format};
use super::{Dropped, Drops};
use crate::config::Bots;
use crate::domain::link::LinkId;
use crate::domain::time::UnixMillis;
use crate::domain::visit::Class;
use crate::stats::rollup::{self, DAY_MS, Day, Rollup};

/// Rows of one batch. The more, the fewer rows of rollups a visit costs: 100,000 links by Zipf's law are 0.28 of them a visit in
/// batches of 100,000 and 0.2 in these.
pub const ROWS_MAX: usize = 250_000;

/// One transaction.
#[derive(Debug, Default)]
pub struct Batch {
    /// One for each source that has anything to say, in order. Some may be empty (`from == to`), for a tally or
    /// to see that the store has lost nothing: their position decides all the same.
    pub ranges: Vec<Range>,
    /// By day, then in the order of the spool. Empty with `visits.raw = false`.
    pub rows: Vec<Row>,
    pub orphans: Vec<Orphan>,
    /// By link and day.
    pub rollups: Vec<Rollup>,
    /// Agents and referrers of `rows` and `orphans` that this process has not stored yet that day, by id.
    pub agents: Vec<Arc<Agent>>,
    pub referrers: Vec<Arc<Referrer>>,
    /// How each source of `ranges` stood at the end of its range, in the same order; what the ring gave up is as its last
    /// tally in the log said. None of a source whose tallies were all damaged.
    pub tallies: Vec<Tally>,
}

/// The records of a source that a batch stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub source: Source,
    /// The number of the first record, and of the one behind the last: the position before and after.
    pub from: u64,
    pub to: u64,
    /// Visits of a link that it stores.
    pub stored: u64,
    /// Those that it gives up.
    pub drops: Drops,
}

/// A visit of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub link: LinkId,
    pub at: UnixMillis,
    pub epoch: u64,
    /// The record's core and number: for the dead-letter file.
    pub core: u16,
    pub number: u64,
    pub class: Class,
    pub address: Option<IpAddr>,
    pub visitor: u64,
    /// Ids of agent and referrer; 0 = none.
    pub agent: i64,
    pub referrer: i64,
    pub request_id: RequestId,
}

/// As the store is told it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestId {
    None,
    Packed(u128),
    Written { len: u8, bytes: [u8; super::spool::format::REQUEST_ID_BYTES_MAX] },
}

/// A visit of nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Orphan {
    pub domain: u16,
    pub code: String,
    pub row: Row,
}

/// Where visitors come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Referrer {
    /// As [`Agent::id`].
    pub id: i64,
    /// As it was written, or its host once the day's bound is reached.
    pub text: String,
    /// The host, in lower case, without `www.`; the text itself where there is none.
    pub host: String,
}

/// How long before and after its writing to the log a visit may say that it was.
const BEFORE_MS: i64 = DAY_MS;
const AFTER_MS: i64 = 10 * 60 * 1000;
/// 2020-01-01 and 2100-01-01.
const FIRST_MS: i64 = 1_577_836_800_000;
const LAST_MS: i64 = 4_102_444_800_000;
/// Agents and referrers that are remembered as stored; past it all are told once more.
const STORED_TEXTS_MAX: usize = 1 << 20;

/// What the configuration says of batches.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Whether single visits are kept.
    pub raw: bool,
    pub bots: Bots,
}

/// Makes batches, and knows where each source stands.
#[derive(Debug)]
pub struct Builder {
    settings: Settings,
    texts: Texts,
    courses: BTreeMap<Source, Course>,
    rows: Vec<Row>,
    orphans: Vec<Orphan>,
    /// A source that the last stored batch has moved. A store that loses commits loses the last one: who names this source's
    /// position in the next batch finds out, also behind a pooler that hides the failover.
    witness: Option<Source>,
    /// Rows that the store refuses, until they are behind.
    refused: HashSet<(Source, u64)>,
    /// When the first block of the batch was written.
    oldest: Option<UnixMillis>,
    /// Whether the store has ever said where it stands.
    settled: bool,
}

/// What became of visits of links on their way from the rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fates {
    pub stored: u64,
    /// Without what the rings gave up: that has no number.
    pub drops: Drops,
}

impl Fates {
    /// How many visits they are of.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.stored + sum(&self.drops)
    }

    /// Each by itself.
    #[must_use]
    pub fn zip(&self, other: &Self, with: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            stored: with(self.stored, other.stored),
            drops: std::array::from_fn(|why| with(self.drops[why], other.drops[why])),
        }
    }
}

/// A source on its way through the log.
#[derive(Debug, Default)]
struct Course {
    /// The number that the store wants next, and what it has of the visits before it.
    base: u64,
    had: Fates,
    /// What it had at the first answer, or less after it lost commits.
    found: Fates,
    /// The farthest that the store ever stood: number, and visits of a link before it. It may have lost commits since.
    farthest: (u64, u64),
    /// Of the batch: the number behind its last record, what it stores, what it gives up.
    next: u64,
    stored: u64,
    drops: Drops,
    /// Where the log was read up to, and how many visits of a link there were up to there, where that is known.
    read: u64,
    visits: Option<u64>,
    /// Visits of a link before the first thing that the log has, and the most that it was seen to have.
    least: u64,
    most: u64,
    /// As its ring said last, and as the store was told last.
    tally: Option<Tally>,
    told: Option<Tally>,
    agents: HashMap<u32, Met>,
    referrers: HashMap<u32, Met>,
}

/// What a string of the spool is.
#[derive(Clone, Copy, Debug)]
struct Met {
    turn: u64,
    id: i64,
    class: Class,
}

/// Agents and referrers: from the spool's ids to the store's.
#[derive(Debug)]
struct Texts {
    agents: Agents,
    referrers: Referrers,
    /// Those of the batch.
    met_agents: HashMap<i64, Arc<Agent>>,
    met_referrers: HashMap<i64, Arc<Referrer>>,
    /// Those that the store was told on `stored_on`. It forgets what it is not told for `visits.keep`: each day it is told
    /// anew what comes.
    stored: HashSet<i64>,
    stored_referrers: HashSet<i64>,
    stored_on: Day,
    /// Counts batches: a [`Met`] of another one is not among those of this.
    turn: u64,
}

/// What became of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Took {
    All,
    /// The batch is full: the rest of the block is the next one's.
    Part,
}

impl Builder {
    #[must_use]
    pub fn new(settings: Settings, agents: Agents, referrers: Referrers) -> Self {
        let texts = Texts {
            agents,
            referrers,
            met_agents: HashMap::default(),
            met_referrers: HashMap::default(),
            stored: HashSet::default(),
            stored_referrers: HashSet::default(),
            stored_on: 0,
            turn: 0,
        };
        Self {
            settings,
            texts,
            courses: BTreeMap::new(),
            rows: Vec::new(),
            orphans: Vec::new(),
            witness: None,
            refused: HashSet::default(),
            oldest: None,
            settled: false,
        }
    }

    /// Begins a batch where the store stands; a source that is not named is at 0. Says whether the store has lost
    /// something of what it had.
    pub fn settle(&mut self, positions: &[Position]) -> bool {
        let mut known = BTreeMap::new();
        for position in positions {
            let mut had = Fates { stored: position.stored, drops: position.drops };
            for why in [Dropped::RingFull, Dropped::SpoolError] {
                had.drops[why as usize] = 0;
            }
            known.insert(position.source, (position.next, had));
            self.courses.entry(position.source).or_default();
        }
        let mut lost = false;
        for (source, course) in &mut self.courses {
            let (base, had) = known.get(source).copied().unwrap_or_default();
            lost |= base < course.base;
            course.found = if self.settled { course.found.zip(&had, u64::min) } else { had };
            (course.base, course.had, course.told) = (base, had, None);
            course.farthest = course.farthest.max((base, had.sum()));
        }
        self.settled = true;
        if lost {
            self.texts.forget_stored();
        }
        self.restart();
        lost
    }

    /// Forgets the batch: it will be made again.
    pub fn restart(&mut self) {
        for course in self.courses.values_mut() {
            course.begin();
        }
        self.clear();
    }

    /// The batch is in the store, and the next one begins behind it. Its memory is used again.
    pub fn stored(&mut self, batch: Batch) {
        for course in self.courses.values_mut() {
            course.told = course.tally();
            course.base = course.next;
            course.had = course.had.zip(&Fates { stored: course.stored, drops: course.drops }, |a, b| a + b);
            course.farthest = course.farthest.max((course.base, course.had.sum()));
            course.begin();
        }
        if !self.refused.is_empty() {
            let courses = &self.courses;
            self.refused.retain(|(source, number)| courses.get(source).is_none_or(|course| *number >= course.base));
        }
        if self.settings.raw {
            self.rows = batch.rows;
        }
        self.orphans = batch.orphans;
        self.witness =
            batch.ranges.iter().find(|range| range.to > range.from).map(|range| range.source).or(self.witness);
        self.texts.remember(&batch.agents, &batch.referrers);
        self.clear();
    }

    fn clear(&mut self) {
        self.rows.clear();
        self.orphans.clear();
        self.texts.met_agents.clear();
        self.texts.met_referrers.clear();
        self.texts.turn += 1;
        self.oldest = None;
    }

    /// Leaves a row out from now on: the store refuses it.
    pub fn refuse(&mut self, source: Source, number: u64) {
        self.refused.insert((source, number));
    }

    /// What it looks up in, for the next one: patterns of agents take long to compile.
    #[cfg(test)]
    pub(super) fn into_texts(self) -> (Agents, Referrers) {
        (self.texts.agents, self.texts.referrers)
    }

    /// The starts whose records or gaps were seen.
    pub fn epochs(&self) -> impl Iterator<Item = Epoch> {
        self.courses.keys().map(|source| source.epoch)
    }

    /// Whether the store has to be told anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.courses.values().any(Course::moves)
    }

    /// Rows and orphans so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len() + self.orphans.len()
    }

    /// When what is oldest in the batch was written to the log.
    #[must_use]
    pub fn oldest(&self) -> Option<UnixMillis> {
        self.oldest
    }

    /// Visits of links that the log has, or is known to have, and that the store neither has nor knows to be lost; of all
    /// starts but `own`, whose rings say more.
    #[must_use]
    pub fn pending(&self, own: Option<Epoch>) -> u64 {
        let others = self.courses.iter().filter(|(source, _)| Some(source.epoch) != own);
        // What stood before the log's beginning was stored, unless the store says otherwise.
        let settled = |course: &Course| if self.settled { course.had.sum() } else { course.least };
        others.map(|(_, course)| course.most.saturating_sub(settled(course))).sum()
    }

    /// What became of the visits of one start.
    #[must_use]
    pub fn fates_of(&self, own: Epoch) -> Fates {
        let courses = self.courses.iter().filter(|(source, _)| source.epoch == own);
        courses.fold(Fates::default(), |sum, (_, course)| sum.zip(&course.had, |a, b| a + b))
    }

    /// What became, since the store answered first, of the visits of all starts but `own`.
    #[must_use]
    pub fn fates_but_of(&self, own: Option<Epoch>) -> Fates {
        let courses = self.courses.iter().filter(|(source, _)| Some(source.epoch) != own);
        let new = courses.map(|(_, course)| course.had.zip(&course.found, |had, found| had - found));
        new.fold(Fates::default(), |sum, new| sum.zip(&new, |a, b| a + b))
    }

    /// The log is still to be read: of a core it begins at `first`, and goes to `last` at least.
    pub fn expects(&mut self, first: &Tally, last: &Tally) {
        let course = self.courses.entry(last.source).or_default();
        course.least = first.visits;
        course.most = course.most.max(last.visits);
    }

    /// The log was read from where the store stood to its end: what the store had beyond that, it has lost, and so has
    /// the log.
    pub fn end(&mut self) {
        for course in self.courses.values_mut() {
            let (number, visits) = course.farthest;
            course.arrive(number, Some(visits));
        }
    }

    /// How a core stood at this place of the log, where all before it was read.
    pub fn tally(&mut self, tally: &Tally) {
        let course = self.courses.entry(tally.source).or_default();
        course.arrive(tally.appended, Some(tally.visits));
        course.seen(tally.appended, Some(tally.visits));
        // Segments are read more than once: an older one says nothing new.
        if course.tally.is_none_or(|last| last.appended <= tally.appended) {
            course.tally = Some(*tally);
        }
    }

    /// Records that the log has no more, as the reader found out.
    pub fn gap(&mut self, source: Source, from: u64, to: u64, visits: u64, why: Dropped) {
        let course = self.courses.entry(source).or_default();
        let before = course.visits.filter(|_| course.read == from);
        course.arrive(from, before);
        let behind = before.map(|before| before + visits);
        course.seen(to, behind);
        if to > course.next {
            // Of a part, the sums know more than the gap.
            let lost = if from < course.next { visits.min(course.missing(to, behind)) } else { visits };
            course.give_up(to, lost, why);
        }
    }

    /// Takes what the store does not have of a block, until the batch has `rows_max` rows.
    pub fn records(&mut self, block: &Block<'_>, rows_max: usize) -> Took {
        let (source, end) = (block.source, block.first + u64::from(block.count));
        let course = self.courses.entry(source).or_default();
        course.forget_strings(block);
        course.arrive(block.first, Some(block.before));
        course.seen(end, Some(block.before + u64::from(block.visits)));
        if end <= course.next {
            return Took::All;
        }
        self.oldest = Some(self.oldest.map_or(block.written_at, |oldest| oldest.min(block.written_at)));
        self.texts.comes(rollup::day(block.written_at));
        let mut bytes = block.records;
        for number in block.first..end {
            let Some((record, rest)) = split(bytes) else {
                // Nothing behind it can be found.
                course.give_up(end, u64::from(block.visits), Dropped::Corrupt);
                break;
            };
            bytes = rest;
            if number < course.next {
                continue;
            }
            if self.rows.len() + self.orphans.len() >= rows_max {
                return Took::Part;
            }
            course.next = number + 1;
            let is_visit = record[6] != format::KIND_ORPHAN;
            if !self.refused.is_empty() && self.refused.contains(&(source, number)) {
                course.drops[Dropped::Refused as usize] += u64::from(is_visit);
                continue;
            }
            let Ok((record, _)) = record::decode(record, source, number) else {
                course.drops[Dropped::Corrupt as usize] += u64::from(is_visit);
                continue;
            };
            let (agent, agent_class) = self.texts.agent(block, &mut course.agents, &record);
            let class = match (record.kind, agent_class, self.settings.bots) {
                (format::KIND_ORPHAN, ..) => Class::Orphan,
                (_, Class::Bot, Bots::Drop) => {
                    course.drops[Dropped::Bot as usize] += 1;
                    continue;
                }
                (format::KIND_HEAD, ..) => Class::Head,
                (format::KIND_PREFETCH, ..) => Class::Prefetch,
                (_, Class::Bot, Bots::Count) => Class::Click,
                (_, class, _) => class,
            };
            let row = Row {
                link: LinkId(record.link),
                at: clamp(record.at, block.written_at),
                epoch: source.epoch.0,
                core: source.core,
                number,
                class,
                address: record.address,
                visitor: record.visitor,
                agent,
                referrer: self.texts.referrer(block, &mut course.referrers, record.referrer),
                request_id: request_id(record.request_id),
            };
            if class == Class::Orphan {
                let domain = u16::try_from(record.link).unwrap_or(0);
                // A code is ASCII; what is not came from a damaged ring.
                let code = String::from_utf8_lossy(record.code).replace('\0', "\u{fffd}");
                self.orphans.push(Orphan { domain, code, row });
            } else {
                course.stored += 1;
                self.rows.push(row);
            }
        }
        Took::All
    }

    /// The batch, to be stored. Then comes [`Builder::stored`] or [`Builder::restart`].
    pub fn finish(&mut self) -> Batch {
        // The order of the spool is that of time, nearly: only around midnight is there anything to sort.
        if !self.rows.is_sorted_by_key(|row| rollup::day(row.at)) {
            self.rows.sort_by_key(|row| rollup::day(row.at));
        }
        if !self.orphans.is_sorted_by_key(|orphan| rollup::day(orphan.row.at)) {
            self.orphans.sort_by_key(|orphan| rollup::day(orphan.row.at));
        }
        let texts = &self.texts;
        let mut batch = Batch {
            rollups: rollup::roll_up(
                &self.rows,
                |id| texts.met_agents.get(&id).map(Arc::as_ref),
                |id| texts.met_referrers.get(&id).map(Arc::as_ref),
            ),
            ..Batch::default()
        };
        for (source, course) in &self.courses {
            if course.moves() || self.witness == Some(*source) {
                let (stored, drops) = (course.stored, course.drops);
                batch.ranges.push(Range { source: *source, from: course.base, to: course.next, stored, drops });
                batch.tallies.extend(course.tally());
            }
        }
        if self.settings.raw {
            let agents = texts.met_agents.values().filter(|agent| !texts.stored.contains(&agent.id));
            batch.agents = agents.cloned().collect();
            batch.agents.sort_unstable_by_key(|agent| agent.id);
            let referrers = texts.met_referrers.values().filter(|one| !texts.stored_referrers.contains(&one.id));
            batch.referrers = referrers.cloned().collect();
            batch.referrers.sort_unstable_by_key(|referrer| referrer.id);
            batch.rows = std::mem::take(&mut self.rows);
            batch.orphans = std::mem::take(&mut self.orphans);
        }
        batch
    }

    /// The one row of a batch that has no other, with its agent and referrer: what the store refused.
    #[must_use]
    pub fn only<'a>(&'a self, batch: &'a Batch) -> Option<Refused<'a>> {
        let (rows, orphans) =
            if self.settings.raw { (&batch.rows, &batch.orphans) } else { (&self.rows, &self.orphans) };
        let (row, code) = match (rows.as_slice(), orphans.as_slice()) {
            ([row], []) => (row, None),
            ([], [orphan]) => (&orphan.row, Some((orphan.domain, orphan.code.as_str()))),
            _ => return None,
        };
        let agent = self.texts.met_agents.get(&row.agent).map(|agent| agent.text.as_str());
        let referrer = self.texts.met_referrers.get(&row.referrer).map(|referrer| referrer.text.as_str());
        Some(Refused { row, code, agent, referrer })
    }
}

/// A row that the store refuses, with its texts.
#[derive(Clone, Copy, Debug)]
pub struct Refused<'a> {
    pub row: &'a Row,
    /// Of an orphan: domain and code.
    pub code: Option<(u16, &'a str)>,
    pub agent: Option<&'a str>,
    pub referrer: Option<&'a str>,
}

impl Course {
    fn begin(&mut self) {
        (self.next, self.stored, self.drops) = (self.base, 0, Drops::default());
    }

    /// How it stands at the end of the batch.
    fn tally(&self) -> Option<Tally> {
        let visits = self.visits.filter(|_| self.read == self.next).unwrap_or_else(|| self.accounted());
        self.tally.map(|tally| Tally { appended: self.next, visits, ..tally })
    }

    fn moves(&self) -> bool {
        self.next > self.base || self.tally() != self.told
    }

    /// Visits of a link that the store has or has given up once the batch is stored.
    fn accounted(&self) -> u64 {
        self.had.sum() + self.stored + sum(&self.drops)
    }

    /// An id may mean another text from this block on.
    fn forget_strings(&mut self, block: &Block<'_>) {
        if block.strings_reset {
            self.agents.clear();
            self.referrers.clear();
        }
        for id in block.strings_new {
            self.agents.remove(id);
            self.referrers.remove(id);
        }
    }

    /// The log goes on at `from`, with so many visits before. What the store does not have of them is no longer kept: the
    /// store has lost commits.
    fn arrive(&mut self, from: u64, visits: Option<u64>) {
        if from > self.next {
            self.give_up(from, self.missing(from, visits), Dropped::FailoverGap);
        }
    }

    /// The log was read to `to`, with so many visits before.
    fn seen(&mut self, to: u64, visits: Option<u64>) {
        (self.read, self.visits) = (to, visits);
        self.most = self.most.max(visits.unwrap_or(0));
    }

    /// Visits of a link from the end of the batch up to `to`, before which there are `visits`; where that is not known, as
    /// many as there are records.
    fn missing(&self, to: u64, visits: Option<u64>) -> u64 {
        visits.map_or(to - self.next, |visits| visits.saturating_sub(self.accounted()))
    }

    fn give_up(&mut self, to: u64, visits: u64, why: Dropped) {
        self.drops[why as usize] += visits.min(to - self.next);
        self.next = to;
    }
}

impl Texts {
    fn agent(&mut self, block: &Block<'_>, met: &mut HashMap<u32, Met>, record: &Record<'_>) -> (i64, Class) {
        if record.agent == 0 {
            // Without an agent it is a tool, unless we did not keep it.
            let unknown = record.not_tracked || record.no_agent_room;
            return (0, if unknown { Class::Click } else { Class::Tool });
        }
        if let Some(met) = met.get(&record.agent).filter(|met| met.turn == self.turn) {
            return (met.id, met.class);
        }
        let mut found = Met { turn: self.turn, id: 0, class: Class::Click };
        if let Some(text) = block.string(record.agent) {
            let agent = self.agents.look_up(text, rollup::day(block.written_at));
            (found.id, found.class) = (agent.id, agent.class);
            self.met_agents.entry(agent.id).or_insert(agent);
        }
        met.insert(record.agent, found);
        (found.id, found.class)
    }

    fn referrer(&mut self, block: &Block<'_>, met: &mut HashMap<u32, Met>, string: u32) -> i64 {
        if string == 0 {
            return 0;
        }
        if let Some(met) = met.get(&string).filter(|met| met.turn == self.turn) {
            return met.id;
        }
        let mut found = Met { turn: self.turn, id: 0, class: Class::Click };
        if let Some(text) = block.string(string) {
            let referrer = self.referrers.look_up(text, rollup::day(block.written_at));
            found.id = referrer.id;
            self.met_referrers.entry(referrer.id).or_insert(referrer);
        }
        met.insert(string, found);
        found.id
    }

    /// A day, by the log; a clock may also step back.
    fn comes(&mut self, day: Day) {
        if self.stored_on != day {
            self.stored_on = day;
            self.forget_stored();
        }
    }

    fn forget_stored(&mut self) {
        self.stored.clear();
        self.stored_referrers.clear();
    }

    fn remember(&mut self, agents: &[Arc<Agent>], referrers: &[Arc<Referrer>]) {
        if self.stored.len() + self.stored_referrers.len() > STORED_TEXTS_MAX {
            self.forget_stored();
        }
        self.stored.extend(agents.iter().map(|agent| agent.id));
        self.stored_referrers.extend(referrers.iter().map(|referrer| referrer.id));
    }
}

fn sum(drops: &Drops) -> u64 {
    drops.iter().sum()
}

/// The first record of `bytes`, by its length, and what is behind it.
fn split(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = usize::from(u16::from_le_bytes(bytes.get(4..6)?.try_into().ok()?));
    if length < format::RECORD_BYTES_MIN { None } else { bytes.split_at_checked(length) }
}

/// A clock may have been anywhere; when the log was written is near the truth.
fn clamp(at: UnixMillis, written_at: UnixMillis) -> UnixMillis {
    let written = written_at.0.clamp(FIRST_MS, LAST_MS);
    UnixMillis(at.0.clamp(written - BEFORE_MS, written + AFTER_MS).clamp(FIRST_MS, LAST_MS))
}

fn request_id(id: record::RequestId<'_>) -> RequestId {
    match id {
        record::RequestId::None => RequestId::None,
        record::RequestId::Packed(number) => RequestId::Packed(number),
        record::RequestId::Written(written) => {
            let mut bytes = [0; format::REQUEST_ID_BYTES_MAX];
            let len = written.len().min(bytes.len());
            bytes[..len].copy_from_slice(&written[..len]);
            RequestId::Written { len: u8::try_from(len).expect("at most 64"), bytes }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absurd_times_are_near_their_writing() {
        const WRITTEN_MS: i64 = 1_790_000_000_000;
        let check =
            |at, written, expected| assert_eq!(clamp(UnixMillis(at), UnixMillis(written)), UnixMillis(expected));
        check(WRITTEN_MS - 20, WRITTEN_MS, WRITTEN_MS - 20);
        check(0, WRITTEN_MS, WRITTEN_MS - BEFORE_MS);
        check(i64::MAX, WRITTEN_MS, WRITTEN_MS + AFTER_MS);
        // The log's own clock was absurd.
        check(WRITTEN_MS, 0, FIRST_MS + AFTER_MS);
        check(0, i64::MIN, FIRST_MS);
        check(i64::MAX, i64::MAX, LAST_MS);
    }

    #[test]
    fn what_store_and_log_have_both_lost_is_given_up() {
        let source = Source { epoch: Epoch(1), core: 0 };
        let settings = Settings { raw: true, bots: Bots::Count };
        let mut builder = Builder::new(settings, Agents::new(Default::default(), 1), Referrers::new(1));
        let mut drops = Drops::default();
        drops[Dropped::Refused as usize] = 1;
        drops[Dropped::RingFull as usize] = 50;
        let position = Position { source, next: 10, stored: 6, drops };
        assert!(!builder.settle(&[position]));
        assert_eq!(builder.fates_of(source.epoch).sum(), 7);
        builder.end();
        assert!(builder.is_empty());
        assert!(builder.settle(&[Position { next: 4, stored: 3, drops: Drops::default(), ..position }]));
        assert_eq!(builder.fates_of(source.epoch).sum(), 3);
        builder.end();
        let batch = builder.finish();
        let mut lost = Drops::default();
        lost[Dropped::FailoverGap as usize] = 4;
        assert_eq!(batch.ranges, [Range { source, from: 4, to: 10, stored: 0, drops: lost }]);
        builder.stored(batch);
        assert_eq!(builder.fates_of(source.epoch).sum(), 7);
    }

    #[test]
    fn a_record_is_as_long_as_it_says() {
        let mut bytes = [0; 96];
        for (length, expected) in [(40, Some(40)), (96, Some(96)), (104, None), (32, None), (0, None)] {
            bytes[4] = length;
            assert_eq!(split(&bytes).map(|(record, _)| record.len()), expected, "{length}");
        }
        assert_eq!(split(&bytes[..5]), None);
    }
}
