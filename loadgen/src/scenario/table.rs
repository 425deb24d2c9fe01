//! Tables of a scenario's file, read key by key; what is wrong is collected with its line, and reading goes on.
//!
//! In: TOML. Out: values of the kind that each key wants. Never: takes an unknown key in silence. At its limit: a value
//! that is wrong reads as one that is absent, so that one run of `check` finds every mistake that can be found.

use std::fmt;
use std::ops::{Range, RangeInclusive};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::units;

/// What is wrong in a text, so far.
#[derive(Debug)]
pub(super) struct Problems<'t> {
    text: &'t str,
    list: Vec<Problem>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    line: usize,
    key: String,
    what: String,
}

/// `LINE: KEY: WHAT`.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.line)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.what)
    }
}

impl<'t> Problems<'t> {
    pub(super) fn of(text: &'t str) -> Self {
        Self { text, list: Vec::new() }
    }

    /// Parses the whole text; mistakes of syntax are collected, and what could be read is given.
    pub(super) fn parse(&mut self) -> DeTable<'t> {
        let (root, errors) = DeTable::parse_recoverable(self.text);
        for error in errors {
            self.add(error.span().map_or(0, |span| span.start), "", error.message());
        }
        root.into_inner()
    }

    pub(super) fn are_none(&self) -> bool {
        self.list.is_empty()
    }

    /// `offset` is the byte in the text where the mistake stands.
    pub(super) fn add(&mut self, offset: usize, key: &str, what: impl Into<String>) {
        let line = self.text[..offset].matches('\n').count() + 1;
        self.list.push(Problem { line, key: key.to_owned(), what: what.into() });
    }

    /// In the order of their lines.
    pub(super) fn into_list(mut self) -> Vec<Problem> {
        self.list.sort_by_key(|problem| problem.line);
        self.list
    }
}

/// A table, and where it stands.
#[derive(Debug, Clone)]
pub(super) struct Table<'a> {
    /// As in `--set`: `phase.2.mix`; empty for the whole file.
    pub(super) path: String,
    pub(super) offset: usize,
    entries: &'a DeTable<'a>,
}

/// A value, and where it stands.
#[derive(Debug, Clone)]
pub(super) struct Value<'a> {
    pub(super) path: String,
    pub(super) offset: usize,
    value: &'a DeValue<'a>,
}

impl<'a> Table<'a> {
    pub(super) fn root(entries: &'a DeTable<'a>) -> Self {
        Self { path: String::new(), offset: 0, entries }
    }

    fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Refuses every key that is not listed.
    pub(super) fn only(&self, known: &[&str], problems: &mut Problems<'_>) {
        for key in self.entries.keys().filter(|key| !known.contains(&key.get_ref().as_ref())) {
            let what = match nearest(key.get_ref(), known.iter().copied()) {
                Some(near) => format!("unknown key, did you mean {near}?"),
                None => format!("unknown key, known are {}", known.join(", ")),
            };
            problems.add(key.span().start, &self.path_of(key.get_ref()), what);
        }
    }

    /// Refuses `key`, if it is there, because of `why`.
    pub(super) fn refuse(&self, key: &str, why: &str, problems: &mut Problems<'_>) {
        if let Some(value) = self.get(key) {
            problems.add(value.offset, &value.path, why);
        }
    }

    pub(super) fn get(&self, key: &str) -> Option<Value<'a>> {
        let value = self.entries.get(key)?;
        Some(Value { path: self.path_of(key), offset: value.span().start, value: value.get_ref() })
    }

    /// The value of `key` as `read` has it; none if it is absent, or wrong, which is collected.
    pub(super) fn read<T>(
        &self,
        key: &str,
        problems: &mut Problems<'_>,
        read: impl FnOnce(&Value<'a>) -> Result<T, String>,
    ) -> Option<T> {
        let value = self.get(key)?;
        read(&value).map_err(|what| problems.add(value.offset, &value.path, what)).ok()
    }

    /// As [`Self::read`], but absent is wrong too; `example` is how the key could look.
    pub(super) fn need<T>(
        &self,
        key: &str,
        example: &str,
        problems: &mut Problems<'_>,
        read: impl FnOnce(&Value<'a>) -> Result<T, String>,
    ) -> Option<T> {
        if self.get(key).is_none() {
            problems.add(self.offset, &self.path_of(key), format!("missing, write {example}"));
        }
        self.read(key, problems, read)
    }

    /// Its keys with their values, in the order of the file.
    pub(super) fn iter(&self) -> Vec<(&'a str, Value<'a>)> {
        let mut all: Vec<_> = self.entries.iter().collect();
        all.sort_by_key(|(key, _)| key.span().start);
        all.into_iter()
            .map(|(key, value)| {
                let path = self.path_of(key.get_ref());
                (key.get_ref().as_ref(), Value { path, offset: key.span().start, value: value.get_ref() })
            })
            .collect()
    }
}

impl<'a> Value<'a> {
    pub(super) fn text(&self) -> Result<&'a str, String> {
        self.value.as_str().ok_or_else(|| format!("{} is no text: write it in quotes", self.kind()))
    }

    pub(super) fn flag(&self) -> Result<bool, String> {
        self.value.as_bool().ok_or_else(|| format!("{} is neither true nor false", self.kind()))
    }

    pub(super) fn duration_ns(&self) -> Result<u64, String> {
        match self.value {
            DeValue::String(text) => units::duration_ns(text),
            _ => Err(format!("{} is no duration: write it with its unit in quotes, such as \"5s\"", self.kind())),
        }
    }

    /// A number, or a text such as `"20k"`.
    pub(super) fn number(&self) -> Result<f64, String> {
        match self.value {
            DeValue::String(text) => units::number_of(text),
            DeValue::Integer(number) if number.radix() == 10 => units::number_of(number.as_str()),
            DeValue::Float(number) => match number.as_str().parse() {
                Ok(number) if number >= 0.0 && f64::is_finite(number) => Ok(number),
                _ => Err(format!("{} is no number from 0 up", number.as_str())),
            },
            _ => Err(format!("{} is no number: write one such as 400 or \"20k\"", self.kind())),
        }
    }

    /// A whole number within `range`.
    pub(super) fn count(&self, range: RangeInclusive<u64>) -> Result<u64, String> {
        let number = self.number()?;
        let count = number as u64;
        if count as f64 != number || !range.contains(&count) {
            return Err(format!("{number} is no whole number from {} to {}", range.start(), range.end()));
        }
        Ok(count)
    }

    pub(super) fn one_of<T: Copy>(&self, choices: &[(&str, T)]) -> Result<T, String> {
        let text = self.text()?;
        choices.iter().find(|(name, _)| *name == text).map(|&(_, choice)| choice).ok_or_else(|| {
            let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
            match nearest(text, names.iter().copied()) {
                Some(near) => format!("{text:?} is unknown, did you mean {near:?}?"),
                None => format!("{text:?} is unknown, use one of {}", names.join(", ")),
            }
        })
    }

    /// The index of a name among `names`; `what` is what they are names of.
    pub(super) fn index_in(&self, names: &[String], what: &str) -> Result<usize, String> {
        let text = self.text()?;
        names.iter().position(|name| name == text).ok_or_else(|| unknown_name(text, names, what))
    }

    pub(super) fn table(&self) -> Result<Table<'a>, String> {
        match self.value {
            DeValue::Table(entries) => Ok(Table { path: self.path.clone(), offset: self.offset, entries }),
            _ => Err(format!("{} is no table: write {{ KEY = VALUE }}", self.kind())),
        }
    }

    /// Numbered from 1, as `--set` does.
    pub(super) fn items(&self) -> Result<Vec<Value<'a>>, String> {
        let DeValue::Array(array) = self.value else {
            return Err(format!("{} is no list: write [ITEM, ITEM]", self.kind()));
        };
        let item = |(index, value): (usize, &'a Spanned<DeValue<'a>>)| Value {
            path: format!("{}.{}", self.path, index + 1),
            offset: value.span().start,
            value: value.get_ref(),
        };
        Ok(array.iter().enumerate().map(item).collect())
    }

    pub(super) fn texts(&self) -> Result<Vec<String>, String> {
        self.items()?.iter().map(|item| item.text().map(str::to_owned)).collect()
    }

    pub(super) fn is_text(&self) -> bool {
        self.value.is_str()
    }

    fn kind(&self) -> String {
        match self.value {
            DeValue::Integer(number) => number.to_string(),
            DeValue::Float(number) => number.to_string(),
            DeValue::Boolean(flag) => flag.to_string(),
            DeValue::String(text) => format!("{text:?}"),
            DeValue::Datetime(_) => "a date".to_owned(),
            DeValue::Array(_) => "a list".to_owned(),
            DeValue::Table(_) => "a table".to_owned(),
        }
    }
}

/// Says that there is no such name, and which is meant.
pub(super) fn unknown_name(text: &str, names: &[String], what: &str) -> String {
    match nearest(text, names.iter().map(String::as_str)) {
        Some(near) => format!("there is no {what} {text:?}, did you mean {near:?}?"),
        None if names.is_empty() => format!("there is no {what} {text:?}, and none at all"),
        None => format!("there is no {what} {text:?}, there are {}", names.join(", ")),
    }
}

/// The name that was most probably meant: at most a third of its letters are wrong, missing or swapped.
fn nearest<'n>(text: &str, names: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    names
        .map(|name| (strsim::damerau_levenshtein(text, name), name))
        .min()
        .filter(|&(wrong, name)| wrong <= name.len().div_ceil(3))
        .map(|(_, name)| name)
}

/// Where the child `segment` of `value` stands and what it is: a key of a table, or a number from 1 of a list.
pub(super) fn child<'a>(value: &'a DeValue<'a>, segment: &str) -> Option<(Range<usize>, &'a DeValue<'a>)> {
    let child = match value {
        DeValue::Table(entries) => entries.get(segment)?,
        DeValue::Array(items) => items.get(segment.parse::<usize>().ok()?.checked_sub(1)?)?,
        _ => return None,
    };
    Some((child.span(), child.get_ref()))
}
