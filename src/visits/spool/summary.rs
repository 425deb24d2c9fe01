//! What a folder of the log has, for people.
//!
//! In: a folder. Out: sums. Never: takes its lock, or changes anything.
//! At its limit: it reads the whole log.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use super::read::{Item, Reader};
use super::segment::Tally;
use super::{Epoch, Source, folder, retain};
use crate::visits::{Dropped, Drops};

/// What a folder has.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    pub segments: u64,
    pub bytes: u64,
    pub epochs: BTreeSet<Epoch>,
    pub records: u64,
    /// Visits of a link among them.
    pub visits: u64,
    /// The last tally of each core.
    pub tallies: BTreeMap<Source, Tally>,
    /// Folders of rings that are there: of a process that runs, or what a start will recover.
    pub rings: Vec<PathBuf>,
    /// Visits that the log or its tallies know as lost, by [`Dropped::ALL`].
    pub lost: Drops,
}

/// Reads the whole log in `dir`, without its lock.
pub fn summary(dir: &Path) -> io::Result<Summary> {
    let segments = retain::scan(dir)?;
    let mut summary = Summary {
        segments: segments.len() as u64,
        bytes: segments.iter().map(|segment| segment.bytes).sum(),
        rings: folder::read_rings(dir)?.into_iter().filter(|folder| folder.is_dir()).collect(),
        ..Summary::default()
    };
    let mut reader = Reader::open(dir)?;
    while let Some(item) = reader.next()? {
        let source = match item {
            Item::Records(block) => {
                summary.records += u64::from(block.count);
                summary.visits += u64::from(block.visits);
                block.source
            }
            Item::Tally(tally) => {
                summary.tallies.insert(tally.source, tally);
                tally.source
            }
            Item::Gap { source, visits, why, .. } => {
                summary.lost[index(why)] += visits;
                source
            }
        };
        summary.epochs.insert(source.epoch);
    }
    for tally in summary.tallies.values() {
        summary.lost[index(Dropped::RingFull)] += tally.ring_full;
        summary.lost[index(Dropped::SpoolError)] += tally.spool_error;
    }
    Ok(summary)
}

fn index(why: Dropped) -> usize {
    Dropped::ALL.iter().position(|reason| *reason == why).expect("it has all reasons")
}
