//! Agents: what a `User-Agent` says, found out once for each distinct text; and what a `Referer` says.
//!
//! In: texts as clients wrote them. Out: what kind of visitor it is, with browser, system and device; the host that a
//! visitor comes from.
//! Never: runs on a worker; keeps more than a bounded number of texts in memory.
//! At its limit: the texts that were not asked for longest are forgotten, and evaluated again when they come back; past
//! `visits.agents_per_day` new texts in a day only their family, or host, is kept, and past [`FOLDED_PER_DAY_MAX`] of those
//! only `(other)`.
//!
//! Which texts the store has is the writer's to know: an id is made of the text, so a set of ids is enough for it.

mod cache;
mod families;
pub mod patterns;
#[cfg(test)]
mod tests;

use std::cell::OnceCell;
use std::fmt;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use url::Url;

use super::batch::Referrer;
use crate::domain::visit::Class;
use crate::stats::rollup::Day;
use cache::{Cache, DailyBound};
use families::Families;
use patterns::{BotList, Patterns};

/// The most bytes of a text that are kept.
pub const TEXT_BYTES_MAX: usize = 512;
/// The most bytes of a browser's, a system's or a program's name.
const NAME_BYTES_MAX: usize = 64;
/// Families, or hosts, that are kept in a day once its bound is reached: clients invent them too.
pub const FOLDED_PER_DAY_MAX: usize = 10_000;
/// What is kept of the rest.
const OTHER: &str = "(other)";

/// What an agent's text says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent {
    /// The first 8 bytes of SHA-256 of the text that is kept, as a positive number: the same on every instance. 0 = there
    /// is no text.
    pub id: i64,
    /// As it was written (what is no UTF-8 replaced, no NUL), or its family once `visits.agents_per_day` is reached.
    pub text: String,
    /// [`Class::Click`], [`Class::Tool`] or [`Class::Bot`].
    pub class: Class,
    /// `Firefox`, `Chrome Mobile`, `curl`, a bot's name; empty = unknown.
    pub browser: String,
    pub os: String,
    /// `desktop`, `mobile`, `tablet`, `other`.
    pub device: &'static str,
}

/// Every agent that was seen lately.
pub struct Agents {
    list: BotList,
    /// Compiled for the first agent: a start does not wait for them.
    known: OnceCell<(Patterns, Families)>,
    cache: Cache<Agent>,
    bound: DailyBound,
}

impl Agents {
    /// `list` is that of `visits.bot_list`, `per_day` is `visits.agents_per_day`.
    #[must_use]
    pub fn new(list: BotList, per_day: usize) -> Self {
        let bound = DailyBound::new(per_day, FOLDED_PER_DAY_MAX);
        Self { list, known: OnceCell::new(), cache: Cache::default(), bound }
    }

    /// What an agent says, as a client wrote it, on the day of its visit. An empty one is a tool with the id 0.
    pub fn look_up(&mut self, text: &[u8], day: Day) -> Arc<Agent> {
        let text = cut(text);
        if let Some(agent) = self.cache.get(text) {
            return agent;
        }
        let (patterns, families) = self.known.get_or_init(|| (Patterns::new(&self.list), Families::new()));
        let mut agent = read(kept(text), patterns, families);
        if agent.id != 0 && !self.bound.takes_text(day) {
            agent = fold(&agent, |family| self.bound.takes_folded(family));
        }
        let agent = Arc::new(agent);
        self.cache.put(text.into(), Arc::clone(&agent));
        agent
    }
}

impl fmt::Debug for Agents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agents").field("bound", &self.bound).finish_non_exhaustive()
    }
}

/// Bots before tools: a crawler that is made with a library names itself behind it. Tools before URLs: some libraries name
/// their home. Else a URL is how a robot says who runs it, and no browser has one.
fn read(text: String, patterns: &Patterns, families: &Families) -> Agent {
    let one_word = !text.trim().contains(char::is_whitespace);
    let (class, browser) = if let Some(name) = patterns.bot(&text) {
        (Class::Bot, name)
    } else if let Some(name) = patterns.tool(&text) {
        (Class::Tool, name)
    } else if text.contains("http://") || text.contains("https://") {
        (Class::Bot, families.browser(&text))
    } else if one_word {
        (Class::Tool, text.trim().split('/').next().unwrap_or_default().to_owned())
    } else {
        (Class::Click, families.browser(&text))
    };
    Agent {
        id: id(&text),
        class,
        browser: short(browser, NAME_BYTES_MAX),
        os: short(families.os(&text), NAME_BYTES_MAX),
        device: families::device(&text),
        text,
    }
}

/// What is kept of an agent past the day's bound. In brackets, so that it is nobody's text.
fn fold(agent: &Agent, takes: impl FnOnce(&str) -> bool) -> Agent {
    let Agent { class, browser, os, device, .. } = agent;
    let text = format!("({}, {browser}, {os}, {device})", class.name());
    if takes(&text) {
        return Agent { id: id(&text), text, ..agent.clone() };
    }
    let text = format!("({}, other)", class.name());
    Agent { id: id(&text), text, class: *class, browser: String::new(), os: String::new(), device: "other" }
}

/// Every referrer that was seen lately.
#[derive(Debug)]
pub struct Referrers {
    cache: Cache<Referrer>,
    bound: DailyBound,
}

impl Referrers {
    /// `per_day` is `visits.agents_per_day`.
    #[must_use]
    pub fn new(per_day: usize) -> Self {
        Self { cache: Cache::default(), bound: DailyBound::new(per_day, FOLDED_PER_DAY_MAX) }
    }

    /// What a referrer says, as a client wrote it, on the day of its visit. An empty one has the id 0 and no host.
    pub fn look_up(&mut self, text: &[u8], day: Day) -> Arc<Referrer> {
        let text = cut(text);
        if let Some(referrer) = self.cache.get(text) {
            return referrer;
        }
        let mut whole = kept(text);
        let mut host = host(&whole);
        if !whole.is_empty() && !self.bound.takes_text(day) {
            if !self.bound.takes_folded(&host) {
                OTHER.clone_into(&mut host);
            }
            whole.clone_from(&host);
        }
        let referrer = Arc::new(Referrer { id: id(&whole), text: whole, host });
        self.cache.put(text.into(), Arc::clone(&referrer));
        referrer
    }
}

/// In lower case, without `www.`; of an app (`android-app://name/`) its name; the text itself where there is none.
fn host(text: &str) -> String {
    let parsed = Url::parse(text).ok();
    let host = parsed.as_ref().and_then(Url::host_str).unwrap_or(text).to_lowercase();
    let bare = host.strip_prefix("www.").filter(|rest| !rest.is_empty()).unwrap_or(&host);
    // Some letters are longer in lower case.
    short(bare.to_owned(), TEXT_BYTES_MAX)
}

fn id(text: &str) -> i64 {
    if text.is_empty() {
        return 0;
    }
    let digest: [u8; 32] = Sha256::digest(text).into();
    let (first, _) = digest.split_first_chunk().expect("32 bytes have 8");
    (i64::from_be_bytes(*first) & i64::MAX).max(1)
}

fn cut(text: &[u8]) -> &[u8] {
    &text[..text.len().min(TEXT_BYTES_MAX)]
}

/// What a store takes: Postgres has no NUL in a text, and what is no UTF-8 is replaced, which makes it longer.
fn kept(text: &[u8]) -> String {
    short(String::from_utf8_lossy(text).replace('\0', "\u{fffd}"), TEXT_BYTES_MAX)
}

fn short(mut text: String, bytes_max: usize) -> String {
    text.truncate(text.floor_char_boundary(bytes_max));
    text
}
