//! What of the log goes: stored segments after a while, and, when there is no more room, what was never sent.
//!
//! In: segments and limits. Out: which go, and why; then they are gone, the lost ones with a line in `lost.ndjson` first.
//! Never: gives up a segment that may have been sent; removes one that is being written or read.
//! At its limit: what may not go stays, even beyond `spool.max_bytes`.

use std::collections::HashMap;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::disk::Disk;
use super::format::{BLOCK_HEADER_BYTES, SEGMENT_HEADER_BYTES};
use super::lost::{self, Line, Range};
use super::segment::{self, Block, Body, Header};
use super::{Epoch, Place, read};
use crate::domain::time::UnixMillis;
use crate::visits::Dropped;

/// Of a line without counts of links: some sources of many, with their numbers.
const LINE_ROOM_BYTES: u64 = 64 << 10;
/// What file systems round a file's end up to, and more.
const TRIM_STEP_BYTES: u64 = 64 << 10;

/// A segment of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub number: u64,
    /// Of the disk: with what is reserved for it.
    pub bytes: u64,
    pub changed_at: UnixMillis,
    /// Since when all of it is known to be stored.
    pub stored_at: Option<UnixMillis>,
}

/// What bounds the log, and who uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub keep_ms: i64,
    pub keep_bytes: u64,
    /// Of `spool.max_bytes` and the free disk.
    pub bytes_max: u64,
    /// The segment that is written: it and what comes after it stays.
    pub written: u64,
    /// The segment that is read: it and what comes after it is needed.
    pub reading: u64,
    /// The last one that may have been sent.
    pub claimed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goes {
    /// It is stored, and was kept long enough.
    Stored(u64),
    /// There is no room for it.
    GivenUp(u64),
}

/// What the log may have: `bytes_max`, and never more than a fifth of what would be free without it.
#[must_use]
pub fn cap(bytes_max: u64, free: u64, log_bytes: u64) -> u64 {
    bytes_max.min(free.saturating_add(log_bytes) / 5)
}

/// Which of `segments`, which are in order, go now, in this order.
#[must_use]
pub fn decide(segments: &[Segment], limits: &Limits, now: UnixMillis) -> Vec<Goes> {
    let mut bytes = segments.iter().map(|segment| segment.bytes).sum::<u64>();
    let stored = segments
        .iter()
        .take_while(|segment| segment.stored_at.is_some() && segment.number < limits.written.min(limits.reading))
        .collect::<Vec<_>>();
    let mut stored_bytes = stored.iter().map(|segment| segment.bytes).sum::<u64>();
    let mut goes = Vec::new();
    for segment in stored {
        let kept_ms = segment.stored_at.map_or(0, |at| now.0.saturating_sub(at.0));
        if kept_ms < limits.keep_ms && stored_bytes <= limits.keep_bytes && bytes <= limits.bytes_max {
            break;
        }
        stored_bytes -= segment.bytes;
        bytes -= segment.bytes;
        goes.push(Goes::Stored(segment.number));
    }
    let unsent = segments.iter().filter(|segment| segment.number > limits.claimed && segment.number < limits.written);
    for segment in unsent {
        if bytes <= limits.bytes_max {
            break;
        }
        bytes -= segment.bytes;
        goes.push(Goes::GivenUp(segment.number));
    }
    goes
}

/// The segments in `dir`, in order; of none it is known here whether it is stored.
pub fn scan(dir: &Path) -> io::Result<Vec<Segment>> {
    let mut segments = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let Some(number) = entry.file_name().to_str().and_then(segment::number) else { continue };
        // It may have gone just now.
        let Ok(about) = entry.metadata() else { continue };
        let bytes = on_disk(&about).max(about.len());
        let changed_at = UnixMillis(about.mtime() * 1000 + about.mtime_nsec() / 1_000_000);
        segments.push(Segment { number, bytes, changed_at, stored_at: None });
    }
    segments.sort_unstable_by_key(|segment| segment.number);
    Ok(segments)
}

/// What `segments` have from `stored` up to `written`. What is reserved for the one that is written is no part of it.
#[must_use]
pub fn waiting_bytes(segments: &[Segment], stored: Place, written: Place) -> u64 {
    let whole = segments.iter().filter(|segment| (stored.segment..written.segment).contains(&segment.number));
    let whole = whole.map(|segment| segment.bytes).sum::<u64>();
    (whole + written.offset).saturating_sub(stored.offset)
}

/// Bytes of the disk that a file has (stat(2): blocks are of 512 bytes).
fn on_disk(about: &Metadata) -> u64 {
    about.blocks() * 512
}

/// Gives back what a start that was killed had reserved for a segment.
pub fn trim(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    let about = file.metadata()?;
    // Not otherwise: it would look as if it were new.
    if on_disk(&about) > about.len().next_multiple_of(TRIM_STEP_BYTES) {
        file.set_len(about.len())?;
    }
    Ok(())
}

/// Writes down what goes with a segment, synced, and removes it. `lost_to` is up to where each source was given up before:
/// what a segment repeats is counted once.
pub fn give_up(dir: &Path, number: u64, disk: &dyn Disk) -> io::Result<Line> {
    let before = lost::read(dir)?;
    let mut lost_to = HashMap::new();
    for range in before.values().flatten() {
        let to: &mut u64 = lost_to.entry(range.source()).or_default();
        *to = range.to.max(*to);
    }
    let path = dir.join(segment::name(number));
    if let Some(sources) = before.get(&number) {
        // Its line was written, and then its sync failed, or the removal.
        disk.sync(&File::open(dir.join(lost::NAME))?)?;
        disk.remove(&path)?;
        return Ok(Line { segment: number, sources: sources.clone(), ..Line::default() });
    }
    let bytes = fs::read(&path)?;
    let repeated =
        Header::decode(&bytes).map(|header| repeated(dir, number, header.epoch)).transpose()?.unwrap_or_default();
    let lost_to = |range: &Range| lost_to.get(&range.source()).copied().unwrap_or(0);
    let mut line = line_of(number, &bytes, lost_to, &repeated);
    let mut text = line.encode()?;
    let shortened = lost::shorten(dir, &read::segments(dir)?, disk);
    if shortened.is_err() || free_bytes(dir) < 2 * text.len() as u64 {
        // The room that `reserve_line` keeps is enough for this.
        line.links.clear();
        text = line.encode()?;
    }
    let mut file = OpenOptions::new().create(true).append(true).mode(0o600).open(dir.join(lost::NAME))?;
    file.write_all(&text)?;
    disk.sync(&file)?;
    if before.is_empty() {
        disk.sync_folder(dir)?;
    }
    disk.remove(&path)?;
    Ok(line)
}

/// Keeps room for a line without counts of links: on a disk that others have filled, nothing could be given up otherwise.
pub fn reserve_line(dir: &Path) -> io::Result<()> {
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(dir.join(lost::NAME))?;
    let end = file.metadata()?.len();
    match rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, end, LINE_ROOM_BYTES) {
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Of the disk, to this process.
pub fn free_bytes(dir: &Path) -> u64 {
    rustix::fs::statvfs(dir).map_or(u64::MAX, |disk| disk.f_bavail * disk.f_frsize)
}

/// The blocks of a segment that can be read.
fn blocks(number: u64, epoch: Epoch, bytes: &[u8]) -> impl Iterator<Item = Block<'_>> {
    let mut offset = SEGMENT_HEADER_BYTES;
    std::iter::from_fn(move || {
        while offset + BLOCK_HEADER_BYTES <= bytes.len() {
            let rest = &bytes[offset..];
            let block = segment::claimed_len(rest).and_then(|len| rest.get(..len));
            if let Some((bytes, block)) = block.and_then(|bytes| Some((bytes, segment::decode(bytes, epoch, number)?)))
            {
                offset += bytes.len();
                return Some(block);
            }
            offset += 8;
        }
        None
    })
}

/// From which record of each core on later segments have what was not synced of this one.
fn repeated(dir: &Path, number: u64, epoch: Epoch) -> io::Result<HashMap<u16, u64>> {
    let mut firsts = HashMap::new();
    for later in read::segments(dir)?.range(number + 1..) {
        let repeats = read::header(dir, *later).filter(|header| header.epoch == epoch).map(|header| header.repeats);
        if !repeats.is_some_and(|first| (1..=number).contains(&first)) {
            continue;
        }
        for block in blocks(*later, epoch, &fs::read(dir.join(segment::name(*later)))?) {
            if matches!(block.body, Body::Records { .. }) {
                let first = firsts.entry(block.core).or_insert(block.number);
                *first = block.number.min(*first);
            }
        }
    }
    Ok(firsts)
}

/// What a segment holds, by source and link; records before `lost_to` of their source are no part of it, nor are blocks of
/// a core from `repeated` on.
fn line_of(number: u64, bytes: &[u8], lost_to: impl Fn(&Range) -> u64, repeated: &HashMap<u16, u64>) -> Line {
    let mut line = Line { segment: number, reason: Dropped::SpoolFull.name().into(), ..Line::default() };
    let Some(header) = Header::decode(bytes) else { return line };
    for block in blocks(number, header.epoch, bytes) {
        let Body::Records { count, visits, records, .. } = block.body else { continue };
        if repeated.get(&block.core).is_some_and(|first| block.number >= *first) {
            continue;
        }
        let mut all = Range {
            epoch: header.epoch.0,
            core: block.core,
            from: block.number,
            to: block.number + u64::from(count),
            before: block.before,
            visits: u64::from(visits),
        };
        let range = line.sources.iter_mut().find(|range| range.core == block.core);
        let had = range.as_ref().map_or_else(|| lost_to(&all), |range| range.to);
        let skipped = had.saturating_sub(all.from).min(u64::from(count));
        let (bytes, skipped_visits) = segment::measure(records, skipped);
        if skipped == u64::from(count) {
            continue;
        }
        for record in segment::glance(&records[bytes..]).filter(|record| record.visit) {
            *line.links.entry(record.link).or_default() += 1;
        }
        let end = all.before + all.visits;
        match range {
            Some(range) => (range.to, range.visits) = (all.to, end - range.before),
            None => {
                (all.from, all.before, all.visits) =
                    (all.from + skipped, all.before + skipped_visits, end - all.before - skipped_visits);
                line.sources.push(all);
            }
        }
    }
    line
}
