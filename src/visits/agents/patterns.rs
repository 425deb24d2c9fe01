//! Patterns: which agents are tools, and which are declared bots.
//!
//! In: an agent's text. Out: the first pattern that it matches, by what it matched: the name of the program.
//! Never: reads the disk after [`BotList::open`].
//! At its limit: a list past [`BOT_LIST_BYTES_MAX`], or a line that is no regular expression, is refused.
//!
//! The lists are data: `data/README.md` says whose, and how they are brought up to date.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use regex::Regex;
use ua_parser::user_agent::{Builder, Extractor, Parser};

/// Patterns of `crawler-user-agents`, case as written.
const BOTS: &str = include_str!("data/bots.txt");
/// What they have in common, whatever the case.
const BOTS_GENERIC: &str = include_str!("data/generic.txt");
/// Ours, whatever the case.
const TOOLS: &str = include_str!("data/tools.txt");

/// The largest file of patterns that is read.
pub const BOT_LIST_BYTES_MAX: u64 = 1 << 20;

/// The patterns of `visits.bot_list`, checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BotList(Vec<String>);

/// Why `visits.bot_list` is refused.
#[derive(Debug, thiserror::Error)]
pub enum BotListError {
    #[error("visits.bot_list: {path} cannot be read: {error}")]
    Read { path: PathBuf, error: io::Error },
    #[error("visits.bot_list: {path} has more than {BOT_LIST_BYTES_MAX} bytes: leave patterns out")]
    TooLarge { path: PathBuf },
    #[error("visits.bot_list: {path}, line {line}: not a regular expression: {reason}")]
    Pattern { path: PathBuf, line: usize, reason: String },
}

impl BotList {
    /// Reads a file with a regular expression a line; empty lines and those that begin with `#` are comments.
    pub fn open(path: &Path) -> Result<Self, BotListError> {
        let unreadable = |error| BotListError::Read { path: path.to_owned(), error };
        let mut text = String::new();
        let file = File::open(path).map_err(unreadable)?;
        file.take(BOT_LIST_BYTES_MAX + 1).read_to_string(&mut text).map_err(unreadable)?;
        if text.len() as u64 > BOT_LIST_BYTES_MAX {
            return Err(BotListError::TooLarge { path: path.to_owned() });
        }
        let mut patterns = Vec::new();
        for (line, pattern) in patterns_of(&text) {
            let refuse = |reason| BotListError::Pattern { path: path.to_owned(), line, reason };
            Regex::new(pattern).map_err(|error| refuse(last_line(&error.to_string())))?;
            // The matcher reads a little less than the crate does, and says less about it.
            Builder::new().push(parser(pattern, "")).map_err(|error| refuse(error.to_string()))?;
            patterns.push(pattern.to_owned());
        }
        Ok(Self(patterns))
    }
}

/// The last line of the crate's message is the reason; those before it draw the place.
fn last_line(message: &str) -> String {
    let last = message.lines().last().unwrap_or(message);
    last.trim_start_matches("error: ").to_owned()
}

/// The lines that are patterns, with their numbers from 1.
fn patterns_of(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = text.lines().map(str::trim).enumerate();
    lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')).map(|(index, line)| (index + 1, line))
}

/// The whole match is the first group, and so the family.
fn parser(pattern: &str, flags: &str) -> Parser<'static> {
    Parser { regex: format!("{flags}({pattern})").into(), ..Parser::default() }
}

/// All patterns, compiled.
pub(super) struct Patterns {
    bots: Extractor<'static>,
    tools: Extractor<'static>,
}

impl Patterns {
    pub(super) fn new(list: &BotList) -> Self {
        let given = list.0.iter().map(|pattern| parser(pattern, ""));
        let named = patterns_of(BOTS).map(|(_, pattern)| parser(pattern, ""));
        let generic = patterns_of(BOTS_GENERIC).map(|(_, pattern)| parser(pattern, "(?i)"));
        let tools = patterns_of(TOOLS).map(|(_, pattern)| parser(pattern, "(?i)"));
        Self { bots: compile(given.chain(named).chain(generic)), tools: compile(tools) }
    }

    /// The name of the bot, as its agent has it.
    pub(super) fn bot<'a>(&'a self, text: &'a str) -> Option<String> {
        name(&self.bots, text)
    }

    pub(super) fn tool<'a>(&'a self, text: &'a str) -> Option<String> {
        name(&self.tools, text)
    }
}

fn compile(patterns: impl Iterator<Item = Parser<'static>>) -> Extractor<'static> {
    let builder =
        Builder::new().push_all(patterns).expect("our lists are tested, the given one was checked when it was read");
    builder.build().expect("the prefilter of patterns that compile")
}

fn name(patterns: &Extractor<'static>, text: &str) -> Option<String> {
    let found = patterns.extract(text)?;
    Some(found.family.trim_matches(|c: char| !c.is_alphanumeric()).to_owned())
}
