//! `lost.ndjson`: what was given up since the log had no more room (see [`super::format`]).
//!
//! In: lines. Out: lines. Never: stops at a line that is damaged; it is passed over.
//! At its limit: past [`LOST_BYTES_MAX`] lines carry no counts of links.

use std::collections::BTreeMap;
use std::path::Path;
use std::{fs, io};

use serde::{Deserialize, Serialize};

use super::{Epoch, Source};

pub const NAME: &str = "lost.ndjson";
/// Bytes of the file up to which lines say what each link lost.
pub const LOST_BYTES_MAX: u64 = 64 << 20;

/// A segment that was given up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    pub segment: u64,
    pub reason: String,
    pub sources: Vec<Range>,
    /// Visits by link.
    #[serde(default)]
    pub links: BTreeMap<u64, u64>,
}

/// Records of a core that went with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    pub epoch: u64,
    pub core: u16,
    /// The number of the first one, and of the one behind the last.
    pub from: u64,
    pub to: u64,
    /// Visits of a link before `from`, and in the range.
    pub before: u64,
    pub visits: u64,
}

impl Range {
    #[must_use]
    pub fn source(&self) -> Source {
        Source { epoch: Epoch(self.epoch), core: self.core }
    }
}

/// The lines in `dir`, by segment; none without the file. Counts of links are left out: they may be many.
pub fn read(dir: &Path) -> io::Result<BTreeMap<u64, Vec<Range>>> {
    #[derive(Deserialize)]
    struct Short {
        segment: u64,
        sources: Vec<Range>,
    }
    let bytes = match fs::read(dir.join(NAME)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    let lines = bytes.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice::<Short>(line).ok());
    let mut lost = BTreeMap::<_, Vec<_>>::new();
    for line in lines {
        lost.entry(line.segment).or_default().extend(line.sources);
    }
    Ok(lost)
}
