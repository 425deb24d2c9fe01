//! Reading the log: its blocks in order, from any place, up to what has been written.
//!
//! In: a folder of segments, a place. Out: blocks, and what was lost between them, each record once.
//! Never: waits; believes a block whose checksum is wrong; gives a string that may have been another's.
//! At its limit: one block is in memory at a time, and the strings of one segment.
//!
//! The order is that of the segments' numbers. For each core the reader knows the number that comes next and how many
//! visits came before it. What has a lower number it has had, and skips; what has a higher one shows a gap, and since each
//! block and tally says how many visits came before it, the gap's visits are known exactly. A gap is known once something
//! behind it can be read: what stood at the very end of the log, and what stood before the first thing that is
//! still there, is in no gap.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;

use super::format::{BLOCK_HEADER_BYTES, SEGMENT_HEADER_BYTES, VERSION};
use super::live::Live;
use super::segment::{self, Body, Header, Tally};
use super::{Epoch, Place, Source, lost};
use crate::domain::time::UnixMillis;
use crate::visits::Dropped;

/// Bytes that are read at once, unless a block has more.
const READ_BYTES: usize = 256 << 10;
/// What a disk gives, or does not give, as a whole: a page of the kernel's cache.
const SECTOR_BYTES: u64 = 4096;

/// A reader of one spool's log.
#[derive(Debug)]
pub struct Reader {
    dir: PathBuf,
    /// Of the process that writes the log; none = whatever the folder has.
    live: Option<Arc<Live>>,
    place: Place,
    /// Up to which segment those that were given up have been told.
    lost_from: u64,
    open: Option<Open>,
    /// The epoch of the segment before.
    epoch: Option<Epoch>,
    /// What comes next of each source.
    next: HashMap<Source, Next>,
    strings: Strings,
    /// Whether strings that were known are void, by core.
    reset: HashMap<u16, bool>,
    fresh: Vec<u32>,
    /// Gaps that are known and not told yet.
    due: VecDeque<Gap>,
    buffer: Buffer,
}

type Strings = HashMap<(u16, u32), Box<[u8]>, ahash::RandomState>;

/// Where the numbers of a source stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Next {
    pub number: u64,
    /// Visits of a link before it.
    pub visits: u64,
}

#[derive(Debug)]
struct Open {
    file: File,
    /// None where the header is damaged and no neighbour's epoch fits.
    epoch: Option<Epoch>,
    /// A later segment repeats what was not synced of this one, and of those before it from this number on.
    repeats: Option<u64>,
    /// Something was passed over in it.
    damaged: bool,
}

#[derive(Clone, Copy, Debug)]
struct Gap {
    source: Source,
    from: u64,
    to: u64,
    visits: u64,
    why: Dropped,
}

/// Bytes of the open segment.
#[derive(Debug, Default)]
struct Buffer {
    bytes: Vec<u8>,
    at: u64,
}

/// What comes next in the log.
#[derive(Debug)]
pub enum Item<'a> {
    Records(Block<'a>),
    Tally(Tally),
    /// Records that the log has no more: damaged, or given up.
    Gap {
        source: Source,
        from: u64,
        to: u64,
        visits: u64,
        why: Dropped,
    },
}

/// Records of one core.
#[derive(Debug)]
pub struct Block<'a> {
    pub source: Source,
    /// The number of the first record.
    pub first: u64,
    /// Visits of a link among all records before it.
    pub before: u64,
    pub count: u32,
    /// Those of them that are visits of a link.
    pub visits: u32,
    pub written_at: UnixMillis,
    /// The records, one behind the other, as `record::decode` reads them.
    pub records: &'a [u8],
    /// Every string that was known of this core is void: another segment has begun, or something was damaged.
    pub strings_reset: bool,
    /// Ids whose string is new or another one since this core's block before.
    pub strings_new: &'a [u32],
    strings: &'a Strings,
}

impl Block<'_> {
    /// The string with this id, as it was when the records were written; none for 0 and for what was damaged.
    #[must_use]
    pub fn string(&self, id: u32) -> Option<&[u8]> {
        self.strings.get(&(self.source.core, id)).map(AsRef::as_ref)
    }
}

/// What was found at the reader's place, owned: where its bytes lie in the buffer.
enum Found {
    Records { source: Source, next: Next, visits: u32, count: u32, written_at: UnixMillis, at: usize, len: usize },
    Tally(Tally),
    Gap(Gap),
    End,
}

/// What became of the block at the reader's place.
enum Took {
    /// There is none.
    NoBlock,
    /// It has nothing new.
    Passed,
    Item(Found),
}

impl Reader {
    /// Begins at the oldest segment in `dir`. It needs no lock, and may follow a log that another process writes.
    pub fn open(dir: &Path) -> io::Result<Self> {
        fs::metadata(dir)?;
        Ok(Self::new(dir, None))
    }

    /// A reader of the log that this process writes: what it is reading is not given up under it.
    #[must_use]
    pub(super) fn attached(dir: &Path, live: Arc<Live>) -> Self {
        Self::new(dir, Some(live))
    }

    fn new(dir: &Path, live: Option<Arc<Live>>) -> Self {
        Self {
            dir: dir.to_path_buf(),
            live,
            place: Place::default(),
            lost_from: 0,
            open: None,
            epoch: None,
            next: HashMap::new(),
            strings: Strings::default(),
            reset: HashMap::new(),
            fresh: Vec::new(),
            due: VecDeque::new(),
            buffer: Buffer::default(),
        }
    }

    /// The next thing in the log; none at its end, where more may come later.
    #[expect(clippy::should_implement_trait, reason = "an item lends what the reader has in memory")]
    pub fn next(&mut self) -> io::Result<Option<Item<'_>>> {
        Ok(match self.find()? {
            Found::End => None,
            Found::Gap(Gap { source, from, to, visits, why }) => Some(Item::Gap { source, from, to, visits, why }),
            Found::Tally(tally) => Some(Item::Tally(tally)),
            Found::Records { source, next, visits, count, written_at, at, len } => Some(Item::Records(Block {
                source,
                first: next.number,
                before: next.visits,
                count,
                visits,
                written_at,
                records: &self.buffer.bytes[at..at + len],
                strings_reset: self.reset.insert(source.core, false).unwrap_or(true),
                strings_new: &self.fresh,
                strings: &self.strings,
            })),
        })
    }

    /// Where the next item begins.
    #[must_use]
    pub fn place(&self) -> Place {
        self.place
    }

    /// Where the numbers of a source stand, as far as it was read.
    #[must_use]
    pub fn next_of(&self, source: Source) -> Option<Next> {
        self.next.get(&source).copied()
    }

    /// Goes to the beginning of a segment, or of the next one that is there. What was read before is forgotten: records
    /// from there on come again.
    pub fn seek(&mut self, segment: u64) {
        *self = Self::new(&self.dir, self.live.take());
        self.place.segment = segment;
        self.lost_from = segment;
    }

    fn find(&mut self) -> io::Result<Found> {
        loop {
            if let Some(gap) = self.due.pop_front() {
                return Ok(Found::Gap(gap));
            }
            if self.open.is_none() {
                if self.enter()? || !self.due.is_empty() {
                    continue;
                }
                return Ok(Found::End);
            }
            let limit = self.limit()?;
            match self.take(limit)? {
                Took::Item(found) => return Ok(found),
                Took::Passed => continue,
                Took::NoBlock => {}
            }
            let closed = self.closed()?;
            if closed && self.limit()? > limit {
                continue; // it grew before the next one began
            }
            if let Some(offset) = self.search(limit)? {
                self.jump(offset);
            } else if closed {
                self.open = None;
            } else {
                // What is there and was not written whole may be another thing the next time.
                self.buffer.bytes.clear();
                if self.live.is_some() && self.place.offset < limit {
                    self.jump(limit);
                }
                return Ok(Found::End);
            }
        }
    }

    /// Over something damaged: a string may have been in it.
    fn jump(&mut self, offset: u64) {
        self.place.offset = offset;
        if let Some(open) = &mut self.open {
            open.damaged = true;
        }
        self.strings.clear();
        self.reset.clear();
    }

    /// Up to where the open segment may be read now.
    fn limit(&self) -> io::Result<u64> {
        match &self.live {
            Some(live) if live.written().segment == self.place.segment => Ok(live.written().offset),
            _ => self.open.as_ref().map_or(Ok(0), |open| Ok(open.file.metadata()?.len())),
        }
    }

    /// Whether nothing more will come in the open segment.
    fn closed(&self) -> io::Result<bool> {
        match &self.live {
            Some(live) => Ok(live.written().segment > self.place.segment),
            None => Ok(segments(&self.dir)?.range(self.place.segment + 1..).next().is_some()),
        }
    }

    /// Opens the next segment that is there. What was given up before it is due first.
    fn enter(&mut self) -> io::Result<bool> {
        let from = self.place.segment + u64::from(self.place.offset > 0);
        // In this order: a segment's line is written before the segment goes.
        let mut there = segments(&self.dir)?;
        let lost = lost::read(&self.dir)?;
        let until = self.live.as_ref().map_or(u64::MAX, |live| live.written().segment);
        there.retain(|number| (from..=until).contains(number) && !lost.contains_key(number));
        let number = there.first().copied();
        for (_, ranges) in lost.range(self.lost_from..number.unwrap_or(u64::MAX).max(self.lost_from)) {
            for range in ranges {
                self.give_up(range);
            }
        }
        let lost_last = lost.last_key_value().map_or(0, |(number, _)| number + 1);
        self.lost_from = number.unwrap_or(lost_last).max(self.lost_from);
        let Some(number) = number else { return Ok(false) };

        let path = self.dir.join(segment::name(number));
        let opened = match &self.live {
            Some(live) => live.claim(number, || File::open(&path)),
            None => File::open(&path).map(Some),
        };
        let file = match opened {
            Ok(Some(file)) => file,
            Ok(None) => return Ok(false), // it is being given up: its line comes
            Err(error) if error.kind() == io::ErrorKind::NotFound => return self.enter(), // it went just now
            Err(error) => return Err(error),
        };
        if file.metadata()?.len() < SEGMENT_HEADER_BYTES as u64 && there.len() == 1 {
            return Ok(false); // it is being made
        }
        let mut open = Open { file, epoch: None, repeats: None, damaged: false };
        self.place = Place { segment: number, offset: SEGMENT_HEADER_BYTES as u64 };
        self.strings.clear();
        self.reset.clear();
        self.buffer = Buffer::default();
        open.epoch = match header(&self.dir, number) {
            Some(header) => Some(header.epoch),
            // A damaged header: its epoch is a neighbour's, if any block says so.
            None => {
                let after = there.range(number + 1..).find_map(|number| header(&self.dir, *number));
                let neighbours = [self.epoch, after.map(|header| header.epoch)];
                let mut fits = None;
                for epoch in neighbours.into_iter().flatten() {
                    open.epoch = Some(epoch);
                    let limit = open.file.metadata()?.len();
                    if find_block(&open, &mut self.buffer, self.place, limit)?.is_some() {
                        fits = Some(epoch);
                        break;
                    }
                }
                fits
            }
        };
        self.epoch = open.epoch.or(self.epoch);
        self.open = Some(open);
        Ok(true)
    }

    /// A range of a segment that was given up is a gap, as far as its records were not had.
    fn give_up(&mut self, range: &lost::Range) {
        let source = range.source();
        let end = Next { number: range.to, visits: range.before + range.visits };
        let begin = Next { number: range.from, visits: range.before };
        let next = self.next.get(&source).copied().unwrap_or(begin);
        if end.number <= next.number {
            return;
        }
        if next.number < begin.number {
            self.due.push_back(gap(source, next, begin, Dropped::Corrupt));
        }
        let from = if next.number < begin.number { begin } else { next };
        self.due.push_back(gap(source, from, end, Dropped::SpoolFull));
        self.next.insert(source, end);
    }

    /// Takes the block at the reader's place.
    fn take(&mut self, limit: u64) -> io::Result<Took> {
        let place = self.place;
        let Some(open) = &mut self.open else { return Ok(Took::NoBlock) };
        let Some(epoch) = open.epoch else { return Ok(Took::NoBlock) };
        let Some(bytes) = self.buffer.block(&open.file, place.offset, limit)? else { return Ok(Took::NoBlock) };
        let Some(block) = segment::decode(bytes, epoch, place.segment) else { return Ok(Took::NoBlock) };
        let end = place.offset + bytes.len() as u64;
        let source = Source { epoch, core: block.core };
        let begin = Next { number: block.number, visits: block.before };
        let known = self.next.get(&source).copied();
        let behind = known.is_none_or(|next| begin.number > next.number);
        if behind && open.repeats.is_none() {
            open.repeats = repeated(&self.dir, place.segment)?;
        }
        // Something may be missing that comes again later; a core that is not known yet begins where it is whole.
        let wait = behind && open.repeats.is_some_and(|first| known.is_some() || open.damaged || first < place.segment);
        let next = known.unwrap_or(begin);
        if behind && !wait {
            self.next.insert(source, begin);
            if known.is_some() {
                // The block itself comes with the next call.
                return Ok(Took::Item(Found::Gap(gap(source, next, begin, Dropped::Corrupt))));
            }
        }
        self.place.offset = end;
        let (count, visits, strings, records) = match block.body {
            Body::Tally { .. } if wait => return Ok(Took::Passed),
            Body::Tally { ring_full, spool_error, orphans } => {
                let Next { number: appended, visits } = next;
                return Ok(Took::Item(Found::Tally(Tally {
                    source,
                    appended,
                    visits,
                    ring_full,
                    spool_error,
                    orphans,
                })));
            }
            Body::Records { count, visits, strings, records } => (count, visits, strings, records),
        };
        self.fresh.clear();
        for (id, string) in segment::strings(strings) {
            self.fresh.push(id);
            self.strings.insert((block.core, id), string.into());
        }
        let had = u64::from(count).min(next.number - begin.number.min(next.number));
        if wait || had == u64::from(count) {
            if !self.fresh.is_empty() {
                self.reset.remove(&block.core);
            }
            return Ok(Took::Passed);
        }
        let (skipped, skipped_visits) = segment::measure(records, had);
        let count = count - u32::try_from(had).unwrap_or(count);
        let visits = visits - u32::try_from(skipped_visits).unwrap_or(visits).min(visits);
        let after = Next { number: next.number + u64::from(count), visits: next.visits + u64::from(visits) };
        self.next.insert(source, after);
        let (len, written_at) = (records.len() - skipped, block.written_at);
        let at = self.buffer.offset(end) - len;
        Ok(Took::Item(Found::Records { source, next, visits, count, written_at, at, len }))
    }

    /// The next offset behind the reader's place where a block is.
    fn search(&mut self, limit: u64) -> io::Result<Option<u64>> {
        let Some(open) = &self.open else { return Ok(None) };
        let from = Place { offset: self.place.offset + 8, ..self.place };
        find_block(open, &mut self.buffer, from, limit)
    }
}

/// The first offset from `place` on where a block is.
fn find_block(open: &Open, buffer: &mut Buffer, place: Place, limit: u64) -> io::Result<Option<u64>> {
    let Some(epoch) = open.epoch else { return Ok(None) };
    let mut offset = place.offset;
    while offset + BLOCK_HEADER_BYTES as u64 <= limit {
        let block = buffer.block(&open.file, offset, limit)?;
        if block.is_some_and(|bytes| segment::decode(bytes, epoch, place.segment).is_some()) {
            return Ok(Some(offset));
        }
        offset += 8;
    }
    Ok(None)
}

fn gap(source: Source, from: Next, to: Next, why: Dropped) -> Gap {
    Gap { source, from: from.number, to: to.number, visits: to.visits.saturating_sub(from.visits), why }
}

/// From which segment on a later one repeats what was not synced of this one; none if none does.
fn repeated(dir: &Path, number: u64) -> io::Result<Option<u64>> {
    let there = segments(dir)?;
    let later = there.range(number + 1..).filter_map(|later| header(dir, *later));
    Ok(later.map(|header| header.repeats).filter(|repeats| (1..=number).contains(repeats)).min())
}

/// The numbers of the segments in `dir`.
pub fn segments(dir: &Path) -> io::Result<BTreeSet<u64>> {
    let mut numbers = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        numbers.extend(entry?.file_name().to_str().and_then(segment::number));
    }
    Ok(numbers)
}

/// The header of a segment, if it can be read and is its own.
#[must_use]
pub fn header(dir: &Path, number: u64) -> Option<Header> {
    let mut bytes = [0; SEGMENT_HEADER_BYTES];
    File::open(dir.join(segment::name(number))).ok()?.read_exact_at(&mut bytes, 0).ok()?;
    Header::decode(&bytes).filter(|header| header.number == number)
}

/// The version of a segment that a newer program has written.
#[must_use]
pub fn newer_version(dir: &Path, number: u64) -> Option<u32> {
    let mut bytes = [0; SEGMENT_HEADER_BYTES];
    File::open(dir.join(segment::name(number))).ok()?.read_exact_at(&mut bytes, 0).ok()?;
    segment::version(&bytes).filter(|version| *version > VERSION)
}

impl Buffer {
    /// The bytes of the block that is claimed to be at `offset`, all before `limit`.
    fn block(&mut self, file: &File, offset: u64, limit: u64) -> io::Result<Option<&[u8]>> {
        let Some(header) = self.bytes_at(file, offset, BLOCK_HEADER_BYTES, limit)? else { return Ok(None) };
        let Some(len) = segment::claimed_len(header) else { return Ok(None) };
        self.bytes_at(file, offset, len, limit)
    }

    fn bytes_at(&mut self, file: &File, offset: u64, len: usize, limit: u64) -> io::Result<Option<&[u8]>> {
        if offset.saturating_add(len as u64) > limit {
            return Ok(None);
        }
        if offset < self.at || offset + len as u64 > self.at + self.bytes.len() as u64 {
            let wanted = (limit - offset).min(len.max(READ_BYTES) as u64);
            self.bytes.resize(usize::try_from(wanted).expect("a block and a buffer fit into memory"), 0);
            self.at = offset;
            let mut filled = 0;
            while filled < self.bytes.len() {
                match file.read_at(&mut self.bytes[filled..], offset + filled as u64) {
                    Ok(0) => break, // it was cut just now
                    Ok(count) => filled += count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    // A sector that the disk cannot give is damage, and what lies behind it is still there.
                    Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => {
                        let there = offset + filled as u64;
                        let skipped =
                            usize::try_from(SECTOR_BYTES - there % SECTOR_BYTES).expect("a sector fits into memory");
                        let end = (filled + skipped).min(self.bytes.len());
                        self.bytes[filled..end].fill(0);
                        filled = end;
                    }
                    Err(error) => {
                        self.bytes.clear();
                        return Err(error);
                    }
                }
            }
            self.bytes.truncate(filled);
        }
        let start = self.offset(offset);
        Ok(self.bytes.get(start..start + len))
    }

    /// Where the byte at `offset` of the segment lies.
    fn offset(&self, offset: u64) -> usize {
        usize::try_from(offset - self.at).expect("what is buffered fits into memory")
    }
}
