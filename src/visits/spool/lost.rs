//! `lost.ndjson`: what was given up since the log had no more room (see [`super::format`]).
//!
//! In: lines. Out: lines. Never: stops at a line that is damaged; it is passed over.
//! At its limit: past [`LOST_BYTES_MAX`] it is shortened; where there is no room for that, lines carry no counts of links.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::disk::Disk;
use super::{Epoch, Source};

pub const NAME: &str = "lost.ndjson";
/// Bytes of the file up to which lines say what each link lost. Who reads the log reads it whole with each segment.
pub const LOST_BYTES_MAX: u64 = 16 << 20;

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

impl Line {
    /// As it is written; what was torn before ends with its beginning.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        let mut text = b"\n".to_vec();
        serde_json::to_writer(&mut text, self)?;
        text.push(b'\n');
        Ok(text)
    }

    /// Adds what a later segment lost: this is its line from now on.
    fn add(&mut self, later: Self) {
        self.segment = later.segment;
        for range in later.sources {
            let before = self.sources.iter_mut().find(|one| one.source() == range.source() && one.to == range.from);
            match before {
                Some(before) => (before.to, before.visits) = (range.to, before.visits + range.visits),
                None => self.sources.push(range),
            }
        }
        for (link, visits) in later.links {
            *self.links.entry(link).or_default() += visits;
        }
    }
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
    let mut lost = BTreeMap::<_, Vec<_>>::new();
    for line in text(dir)?.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice::<Short>(line).ok()) {
        lost.entry(line.segment).or_default().extend(line.sources);
    }
    Ok(lost)
}

fn text(dir: &Path) -> io::Result<Vec<u8>> {
    match fs::read(dir.join(NAME)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read,
    }
}

/// Where the file has more than [`LOST_BYTES_MAX`], makes one line of all those between whose segments none of `there`, the
/// segments in `dir`, is left: whoever reads the log comes upon all of them at once. Counts of links go if half of it is left.
pub fn shorten(dir: &Path, there: &BTreeSet<u64>, disk: &dyn Disk) -> io::Result<()> {
    if fs::metadata(dir.join(NAME)).map_or(0, |about| about.len()) <= LOST_BYTES_MAX {
        return Ok(());
    }
    let text = text(dir)?;
    let mut lines: Vec<Line> =
        text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
    lines.sort_by_key(|line| line.segment);
    let mut left: Vec<Line> = Vec::new();
    for line in lines {
        match left.last_mut().filter(|last| there.range(last.segment..=line.segment).next().is_none()) {
            Some(last) => last.add(line),
            None => left.push(line),
        }
    }
    let encode = |lines: &[Line]| lines.iter().map(Line::encode).collect::<io::Result<Vec<_>>>();
    let mut text = encode(&left)?.concat();
    if text.len() as u64 > LOST_BYTES_MAX / 2 {
        left.iter_mut().for_each(|line| line.links.clear());
        text = encode(&left)?.concat();
    }
    let new = dir.join("lost.new");
    let written =
        OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new).and_then(|mut file| {
            file.write_all(&text)?;
            disk.sync(&file)?;
            fs::rename(&new, dir.join(NAME))
        });
    if written.is_err() {
        // It may hold what a full disk needs.
        let _ = fs::remove_file(&new);
    }
    written?;
    disk.sync_folder(dir)
}
