//! A ring: the records of one core, from the moment of their redirect until the log has them. Every byte is in
//! [`super::format`].
//!
//! In: records, and strings, of the thread that owns the [`RingWriter`]. Out: the same to the [`RingReader`] in back, or,
//! after a crash, to that of the next start.
//! Never: waits, allocates or calls the kernel to append; gives out a record that was not written whole.
//! At its limit: a record that finds no room is counted, by its reason, in the ring's header.
//!
//! A kill may come between any two stores. So each append changes one word of the counts, after the commit word: what
//! recovery finds beyond the counts is exactly what it has to add to them. And `take` writes the number before the
//! position: recovery looks, from the position on, for the record that has the number.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use super::format::{
    KIND_ORPHAN, PAD, RECORD_BYTES_MAX, RING_HEADER_BYTES, RING_MAGIC, STRING_BYTES_MAX, STRINGS_SHARE, VERSION,
};
use super::map::{Map, WORD_BYTES};
use super::record::{self, Encoder, Record};
use super::{Epoch, Source};
use crate::domain::time::UnixMillis;

/// The smallest ring, in bytes.
pub const RING_BYTES_MIN: u64 = 16 << 10;
/// What sizes are rounded down to.
const SIZE_STEP_BYTES: u64 = 4096;
/// A string with its length.
pub const STRING_ROOM_MAX: usize = (2 + STRING_BYTES_MAX).next_multiple_of(WORD_BYTES);

/// Words of the header.
const MAGIC: usize = 0;
const VERSION_AND_CORE: usize = 1;
const EPOCH: usize = 2;
const SPOOL: usize = 3;
const SIZE: usize = 4;
const MADE_AT: usize = 5;
const HEAD: usize = 8;
const VISITS: usize = 9;
const ORPHANS: usize = 10;
const RING_FULL: usize = 11;
const SPOOL_ERROR: usize = 12;
const ORPHANS_LEFT_OUT: usize = 13;
const GENERATIONS: usize = 14;
const TAIL: usize = 24;
const TAIL_NUMBER: usize = 25;
const FAILING: usize = 26;

/// Whose ring it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct About {
    pub source: Source,
    /// Which spool's, as `format` says.
    pub spool: u64,
    pub made_at: UnixMillis,
}

/// How a core stands, as `read::Tally` names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Records so far; never less than what can be read, but for what [`RingReader::recover`] has not come to.
    pub appended: u64,
    /// Visits of a link among them.
    pub visits: u64,
    /// Visits that found the ring full.
    pub ring_full: u64,
    /// The same while the log could not be written.
    pub spool_error: u64,
    /// Orphans that were not recorded.
    pub orphans: u64,
}

/// What was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Read {
    /// The number of the first record; without any, of the next one.
    pub first: u64,
    pub count: u32,
    /// Visits of a link among them.
    pub visits: u32,
}

/// Makes the ring's file, whose size is rounded down to 4 KiB; the two ends share the mapping.
/// `AlreadyExists`; `InvalidInput` below [`RING_BYTES_MIN`]; `StorageFull` where the file system has no room.
pub fn create(path: &Path, size: u64, about: &About) -> io::Result<(RingWriter, RingReader)> {
    let size = size - size % SIZE_STEP_BYTES;
    if size < RING_BYTES_MIN {
        let text = format!("a ring has at least {RING_BYTES_MIN} bytes: spool.ring_size is too small");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    let bytes = usize::try_from(size).map_err(io::Error::other)?;
    let shared = Arc::new(Shared::new(Map::create(&file, bytes)?, bytes));
    shared.store(VERSION_AND_CORE, u64::from(VERSION) | u64::from(about.source.core) << 32);
    shared.store(EPOCH, about.source.epoch.0);
    shared.store(SPOOL, about.spool);
    shared.store(SIZE, size);
    shared.store(MADE_AT, about.made_at.0 as u64);
    shared.store(GENERATIONS, 1);
    shared.store(MAGIC, u64::from_le_bytes(RING_MAGIC));
    let writer = RingWriter {
        shared: Arc::clone(&shared),
        encoder: Encoder::new(about.source),
        head: 0,
        offset: 0,
        tail: 0,
        number: 0,
        generation: 1,
        strings_end: 0,
        left_at: [0; 2],
        alive: Arc::default(),
    };
    let (next, found, alive) = (Next::default(), Found::default(), Arc::downgrade(&writer.alive));
    Ok((writer, RingReader { shared, about: *about, next, counted: 0, found, writer: alive }))
}

/// The ring that an earlier start left; `InvalidData` where it is none of this version, `UnexpectedEof` where it was never
/// made whole, and so has nothing.
pub fn open(path: &Path) -> io::Result<RingReader> {
    let invalid = |what| io::Error::new(io::ErrorKind::InvalidData, format!("{} is no ring: {what}", path.display()));
    let file: File = OpenOptions::new().read(true).write(true).open(path)?;
    let size = file.metadata()?.len();
    let unfinished = || Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the ring was never made whole"));
    if size < RING_BYTES_MIN {
        return unfinished();
    }
    if !size.is_multiple_of(SIZE_STEP_BYTES) {
        return Err(invalid("its size is none of a ring"));
    }
    let bytes = usize::try_from(size).map_err(io::Error::other)?;
    let shared = Shared::new(Map::of(&file, bytes)?, bytes);
    if shared.load(MAGIC) == 0 {
        return unfinished(); // it is written last
    }
    if shared.load(MAGIC) != u64::from_le_bytes(RING_MAGIC) {
        return Err(invalid("it does not begin as one"));
    }
    let version_and_core = shared.load(VERSION_AND_CORE);
    if version_and_core as u32 != VERSION {
        return Err(invalid("it is of another version"));
    }
    let core = (version_and_core >> 32) as u16;
    let source = Source { epoch: Epoch(shared.load(EPOCH)), core };
    let about = About { source, spool: shared.load(SPOOL), made_at: UnixMillis(shared.load(MADE_AT) as i64) };
    let next = Next { position: shared.load(TAIL), number: shared.load(TAIL_NUMBER) };
    // No ring comes near this, and sums of positions do not overflow.
    let bound = u64::MAX / 4;
    if shared.load(SIZE) != size
        || !next.position.is_multiple_of(WORD_BYTES as u64)
        || [next.position, next.number, shared.load(HEAD), shared.load(VISITS), shared.load(ORPHANS)]
            .iter()
            .any(|word| *word > bound)
    {
        return Err(invalid("its header is damaged"));
    }
    let counted = shared.load(VISITS) + shared.load(ORPHANS);
    let (shared, found, writer) = (Arc::new(shared), Found::default(), Weak::new());
    let mut reader = RingReader { shared, about, next, counted, found, writer };
    reader.find_next();
    Ok(reader)
}

/// The mapping, and where its parts lie, in words.
#[derive(Debug)]
struct Shared {
    map: Map,
    /// Bytes of a half of the strings.
    half_bytes: usize,
    records_at: usize,
    /// Bytes of the records' area.
    area: u64,
    /// Every store, in order.
    #[cfg(test)]
    journal: std::sync::Mutex<Vec<(usize, u64)>>,
}

impl Shared {
    fn new(map: Map, bytes: usize) -> Self {
        let strings = bytes / STRINGS_SHARE;
        let records = RING_HEADER_BYTES + strings;
        Self {
            map,
            half_bytes: strings / 2,
            records_at: records / WORD_BYTES,
            area: (bytes - records) as u64,
            #[cfg(test)]
            journal: std::sync::Mutex::default(),
        }
    }

    /// What was stored before is seen before, by whoever loads, and whatever is killed: no store moves ahead of another.
    #[inline]
    fn store(&self, word: usize, value: u64) {
        self.map.words()[word].store(value.to_le(), Ordering::Release);
        #[cfg(test)]
        self.journal.lock().unwrap().push((word, value));
    }

    #[inline]
    fn load(&self, word: usize) -> u64 {
        u64::from_le(self.map.words()[word].load(Ordering::Acquire))
    }

    fn add_one(&self, word: usize) {
        self.store(word, self.load(word) + 1);
    }

    fn record_word(&self, offset: u64, index: usize) -> usize {
        self.records_at + offset as usize / WORD_BYTES + index
    }

    fn figures(&self, found: Found) -> Figures {
        let visits = self.load(VISITS) + found.visits;
        Figures {
            appended: visits + self.load(ORPHANS) + found.orphans,
            visits,
            ring_full: self.load(RING_FULL),
            spool_error: self.load(SPOOL_ERROR),
            orphans: self.load(ORPHANS_LEFT_OUT),
        }
    }
}

/// A core's end of its ring.
#[derive(Debug)]
pub struct RingWriter {
    shared: Arc<Shared>,
    encoder: Encoder,
    /// Position behind the last record, and where in the area that is.
    head: u64,
    offset: u64,
    /// As it was last seen: back's line is loaded only when the ring looks full.
    tail: u64,
    number: u64,
    /// Of the half of the strings that is in use: odd ones lie in the first half.
    generation: u64,
    strings_end: usize,
    /// Position behind every record that may use a string of the half, since it is no longer in use.
    left_at: [u64; 2],
    /// Its reader sees when it goes.
    alive: Arc<()>,
}

impl RingWriter {
    /// Writes a record; false if there was no room, which is counted.
    #[inline]
    pub fn append(&mut self, record: &Record<'_>) -> bool {
        let orphan = record.kind == KIND_ORPHAN;
        let bytes = self.encoder.encode(record, self.number);
        let (len, area) = (bytes.len() as u64, self.shared.area);
        let skipped = if self.offset + len > area { area - self.offset } else { 0 };
        let end = self.head + skipped + len;
        if end - self.tail > area {
            self.tail = self.shared.load(TAIL);
            if end - self.tail > area {
                self.shared.add_one(match (orphan, self.shared.load(FAILING)) {
                    (true, _) => ORPHANS_LEFT_OUT,
                    (false, 0) => RING_FULL,
                    (false, _) => SPOOL_ERROR,
                });
                return false;
            }
        }
        if skipped > 0 {
            self.shared.store(self.shared.record_word(self.offset, 0), u64::from(PAD) << 48);
            self.offset = 0;
        }
        let at = self.shared.record_word(self.offset, 0);
        let mut words = bytes.chunks_exact(WORD_BYTES).map(word);
        let commit = words.next().expect("a record has 5 words");
        for (index, word) in words.enumerate() {
            self.shared.store(at + 1 + index, word);
        }
        self.shared.store(at, commit);
        self.shared.add_one(if orphan { ORPHANS } else { VISITS });
        self.shared.store(HEAD, end);
        self.head = end;
        self.offset += len;
        if self.offset == area {
            self.offset = 0;
        }
        self.number += 1;
        true
    }

    /// Records so far; the number of the next one.
    #[must_use]
    pub fn appended(&self) -> u64 {
        self.number
    }

    /// Counts an orphan that is not recorded.
    pub fn leave_out_orphan(&mut self) {
        self.shared.add_one(ORPHANS_LEFT_OUT);
    }

    /// Of the strings that records may use now. When it changes, every string has to be put anew.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Bytes of a half of the strings.
    #[must_use]
    pub fn half_bytes(&self) -> usize {
        self.shared.half_bytes
    }

    /// Writes a string of 1 to [`STRING_BYTES_MAX`] bytes, into the other half if this one is full. Its id, and where it
    /// lies in its half; none while there is no room.
    pub fn put_string(&mut self, text: &[u8]) -> Option<(u32, usize)> {
        let room = (2 + text.len()).next_multiple_of(WORD_BYTES);
        if self.strings_end + room > self.shared.half_bytes && !self.begin_half() {
            return None;
        }
        let mut bytes = [0; STRING_ROOM_MAX];
        bytes[..2].copy_from_slice(&(text.len() as u16).to_le_bytes());
        bytes[2..2 + text.len()].copy_from_slice(text);
        let in_half = self.strings_end;
        let index = (self.half() * self.shared.half_bytes + in_half) / WORD_BYTES;
        for (nth, chunk) in bytes[..room].chunks_exact(WORD_BYTES).enumerate() {
            self.shared.store(RING_HEADER_BYTES / WORD_BYTES + index + nth, word(chunk));
        }
        self.strings_end += room;
        // At most an eighth of 1 GiB.
        Some((index as u32 + 1, in_half))
    }

    /// Goes over to the other half, if the log has every record that uses strings of it.
    pub fn begin_half(&mut self) -> bool {
        let (here, other) = (self.half(), 1 - self.half());
        self.tail = self.shared.load(TAIL);
        if self.tail < self.left_at[other] {
            return false;
        }
        // The record that is being made may have a string of each half, and stand behind a gap.
        self.left_at[here] = self.head + 2 * RECORD_BYTES_MAX as u64;
        self.generation += 1;
        self.strings_end = 0;
        self.shared.store(GENERATIONS + other, self.generation);
        true
    }

    fn half(&self) -> usize {
        (self.generation % 2) as usize ^ 1
    }
}

fn word(chunk: &[u8]) -> u64 {
    u64::from_le_bytes(chunk.try_into().expect("8 bytes"))
}

/// Back's end of a ring.
#[derive(Debug)]
pub struct RingReader {
    shared: Arc<Shared>,
    about: About,
    next: Next,
    /// Records that the header had counted when the ring was opened.
    counted: u64,
    found: Found,
    writer: Weak<()>,
}

/// How a core stands, for whoever asks and whenever: it reads the ring's header.
#[derive(Debug)]
pub struct Counts {
    pub source: Source,
    shared: Arc<Shared>,
}

impl Counts {
    #[must_use]
    pub fn figures(&self) -> Figures {
        self.shared.figures(Found::default())
    }
}

/// The record that is read next.
#[derive(Clone, Copy, Debug, Default)]
struct Next {
    position: u64,
    number: u64,
}

/// What recovery found beyond the counts.
#[derive(Clone, Copy, Debug, Default)]
struct Found {
    visits: u64,
    orphans: u64,
}

/// What lies at a position.
enum Lies {
    Record {
        len: usize,
        kind: u8,
    },
    /// As many bytes are skipped.
    Pad(u64),
    Nothing,
}

impl RingReader {
    #[must_use]
    pub fn about(&self) -> &About {
        &self.about
    }

    /// What is new since the last `read`: records verbatim (as `record::decode` reads them, pads left out) are appended to
    /// `records`, at least one if there is any, and no more once there are `bytes_max` bytes. Trusts `head`.
    pub fn read(&mut self, records: &mut Vec<u8>, bytes_max: usize) -> Read {
        // A damaged `head` would lead round and round.
        let until = self.shared.load(HEAD).min(self.shared.load(TAIL) + self.shared.area);
        self.advance(records, bytes_max, until, false)
    }

    /// The same after a crash: goes on from `tail` for as long as checksums are right for the next number, whatever
    /// `head` says. Nothing more comes once it has read nothing; if [`Figures::appended`] is greater than the next
    /// number then, the records between are damaged.
    pub fn recover(&mut self, records: &mut Vec<u8>, bytes_max: usize) -> Read {
        let until = self.shared.load(TAIL) + self.shared.area;
        self.advance(records, bytes_max, until, true)
    }

    /// What was read is in the log: `tail` moves.
    pub fn take(&mut self) {
        self.shared.store(TAIL_NUMBER, self.next.number);
        self.shared.store(TAIL, self.next.position);
    }

    /// Appends the string with this id to `bytes`; false, and nothing is appended, for 0 and for what is not there.
    pub fn string(&self, id: u32, bytes: &mut Vec<u8>) -> bool {
        let half_words = self.shared.half_bytes / WORD_BYTES;
        let Some(index) = (id as usize).checked_sub(1).filter(|index| *index < 2 * half_words) else { return false };
        let words = RING_HEADER_BYTES / WORD_BYTES + index;
        let first = self.shared.load(words);
        let len = usize::from(first as u16);
        let room = (2 + len).div_ceil(WORD_BYTES);
        if len == 0 || len > STRING_BYTES_MAX || index % half_words + room > half_words {
            return false;
        }
        let end = bytes.len() + len;
        bytes.extend_from_slice(&first.to_le_bytes()[2..]);
        for nth in 1..room {
            bytes.extend_from_slice(&self.shared.load(words + nth).to_le_bytes());
        }
        bytes.truncate(end);
        true
    }

    /// Generations of the two halves of the strings; 0: nothing was ever written there.
    #[must_use]
    pub fn generations(&self) -> [u64; 2] {
        [self.shared.load(GENERATIONS), self.shared.load(GENERATIONS + 1)]
    }

    /// In which half the string with this id lies.
    #[must_use]
    pub fn half(&self, id: u32) -> usize {
        usize::from((id as usize).saturating_sub(1) * WORD_BYTES >= self.shared.half_bytes)
    }

    #[must_use]
    pub fn figures(&self) -> Figures {
        self.shared.figures(self.found)
    }

    /// The same for others.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts { source: self.about.source, shared: Arc::clone(&self.shared) }
    }

    /// Whether there is somebody who may still record.
    #[must_use]
    pub fn has_writer(&self) -> bool {
        self.writer.strong_count() > 0
    }

    /// Whether visits that find no room are counted as `spool_error` from now on.
    pub fn set_failing(&self, failing: bool) {
        self.shared.store(FAILING, u64::from(failing));
    }

    fn advance(&mut self, records: &mut Vec<u8>, bytes_max: usize, until: u64, checked: bool) -> Read {
        let mut read = Read { first: self.next.number, ..Read::default() };
        let begun = records.len();
        let mut position = self.next.position;
        while position < until && records.len() - begun < bytes_max {
            let (len, kind) = match self.lies(position) {
                Lies::Record { len, kind } => (len, kind),
                Lies::Pad(bytes) => {
                    position += bytes;
                    continue;
                }
                Lies::Nothing => break,
            };
            let from = records.len();
            self.copy(position, len, records);
            if checked && record::decode(&records[from..], self.about.source, self.next.number).is_err() {
                records.truncate(from);
                break;
            }
            let visit = kind != KIND_ORPHAN;
            if checked && self.next.number >= self.counted {
                self.found.visits += u64::from(visit);
                self.found.orphans += u64::from(!visit);
            }
            read.count += 1;
            read.visits += u32::from(visit);
            position += len as u64;
            self.next = Next { position, number: self.next.number + 1 };
        }
        read
    }

    /// Corrects the position after a kill between the two stores of `take`: the number is that of a later record.
    fn find_next(&mut self) {
        let (tail, head) = (self.next.position, self.shared.load(HEAD));
        let mut bytes = Vec::with_capacity(RECORD_BYTES_MAX);
        let mut position = tail;
        while position < head && head - tail <= self.shared.area {
            match self.lies(position) {
                Lies::Record { len, .. } => {
                    bytes.clear();
                    self.copy(position, len, &mut bytes);
                    if record::decode(&bytes, self.about.source, self.next.number).is_ok() {
                        break;
                    }
                    position += len as u64;
                }
                Lies::Pad(skipped) => position += skipped,
                Lies::Nothing => return,
            }
        }
        if position <= head {
            self.next.position = position;
        }
    }

    fn lies(&self, position: u64) -> Lies {
        let offset = position % self.shared.area;
        let word = self.shared.load(self.shared.record_word(offset, 0));
        if (word >> 48) as u8 == PAD {
            return Lies::Pad(self.shared.area - offset);
        }
        match record::opening(word) {
            Some((len, kind)) if offset + len as u64 <= self.shared.area => Lies::Record { len, kind },
            _ => Lies::Nothing,
        }
    }

    fn copy(&self, position: u64, len: usize, to: &mut Vec<u8>) {
        let at = self.shared.record_word(position % self.shared.area, 0);
        for index in 0..len / WORD_BYTES {
            to.extend_from_slice(&self.shared.load(at + index).to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::super::format::KIND_CLICK;
    use super::super::record::RequestId;
    use super::*;

    const SOURCE: Source = Source { epoch: Epoch(0xE0), core: 2 };
    const ABOUT: About = About { source: SOURCE, spool: 11, made_at: UnixMillis(1_800_000_000_000) };

    struct Fixture {
        folder: tempfile::TempDir,
        writer: RingWriter,
        reader: RingReader,
    }

    fn fixture() -> Fixture {
        let folder = tempfile::tempdir().unwrap();
        let (writer, reader) = create(&folder.path().join("ring"), RING_BYTES_MIN, &ABOUT).unwrap();
        Fixture { folder, writer, reader }
    }

    impl Fixture {
        fn path(&self) -> PathBuf {
            self.folder.path().join("ring")
        }

        /// The file as a kill after the first `stores` stores since `before` leaves it.
        fn killed(&self, before: &[u8], journal: &[(usize, u64)]) -> PathBuf {
            let mut bytes = before.to_vec();
            for (word, value) in journal {
                bytes[word * 8..word * 8 + 8].copy_from_slice(&value.to_le_bytes());
            }
            let path = self.folder.path().join("killed");
            std::fs::write(&path, bytes).unwrap();
            path
        }

        fn journal(&self) -> Vec<(usize, u64)> {
            std::mem::take(&mut *self.writer.shared.journal.lock().unwrap())
        }
    }

    /// Number `number` of a stream in which every third record is an orphan, of several lengths.
    fn nth(number: u64) -> Record<'static> {
        let orphan = number % 3 == 2;
        Record {
            kind: if orphan { KIND_ORPHAN } else { KIND_CLICK },
            link: number,
            at: ABOUT.made_at,
            visitor: number * 7,
            agent: 0,
            referrer: 0,
            address: None,
            request_id: RequestId::Written(&[b'x'; 64][..number as usize % 5 * 16]),
            code: if orphan { b"launch" } else { b"" },
            not_tracked: false,
            no_agent_room: false,
        }
        .without_empty_id()
    }

    impl Record<'_> {
        fn without_empty_id(mut self) -> Self {
            if self.request_id == RequestId::Written(b"") {
                self.request_id = RequestId::None;
            }
            self
        }
    }

    fn visits(records: std::ops::Range<u64>) -> u64 {
        records.filter(|number| number % 3 != 2).count() as u64
    }

    /// The records are those of the stream from `read.first` on.
    fn check(read: Read, records: &[u8], range: std::ops::Range<u64>) {
        let count = (range.end - range.start) as u32;
        assert_eq!(read, Read { first: range.start, count, visits: visits(range.clone()) as u32 });
        let mut rest = records;
        for number in range {
            let (record, len) = record::decode(rest, SOURCE, number).unwrap();
            assert_eq!(record, nth(number));
            rest = &rest[len..];
        }
        assert!(rest.is_empty());
    }

    fn read(reader: &mut RingReader, range: std::ops::Range<u64>) {
        let mut records = Vec::new();
        let read = reader.read(&mut records, usize::MAX);
        check(read, &records, range);
    }

    fn recover(path: &Path, range: std::ops::Range<u64>, appended: u64) -> RingReader {
        let mut reader = open(path).unwrap();
        let mut records = Vec::new();
        let found = reader.recover(&mut records, usize::MAX);
        check(found, &records, range);
        let figures = reader.figures();
        assert_eq!((figures.appended, figures.visits), (appended, visits(0..appended)));
        reader
    }

    #[test]
    fn round_and_round() {
        let mut f = fixture();
        let mut rounds = proptest::test_runner::TestRng::deterministic_rng(prop::test_runner::RngAlgorithm::ChaCha);
        let mut taken = 0;
        while f.writer.head < 20 * f.writer.shared.area {
            let count = rounds.random_range(1..60);
            for _ in 0..count {
                assert!(f.writer.append(&nth(f.writer.appended())));
            }
            read(&mut f.reader, taken..taken + count);
            taken += count;
            f.reader.take();
            let figures = Figures { appended: taken, visits: visits(0..taken), ..Figures::default() };
            assert_eq!(f.reader.figures(), figures);
        }
        // Nothing is left for the next start, which sees the same.
        assert_eq!(recover(&f.path(), taken..taken, taken).about(), &ABOUT);
    }

    #[test]
    fn pieces() {
        let mut f = fixture();
        for number in 0..20 {
            f.writer.append(&nth(number));
        }
        let (mut records, mut first) = (Vec::new(), 0);
        loop {
            records.clear();
            let read = f.reader.read(&mut records, 100);
            if read.count == 0 {
                break;
            }
            assert!(records.len() < 100 + RECORD_BYTES_MAX);
            check(read, &records, first..first + u64::from(read.count));
            first += u64::from(read.count);
        }
        assert_eq!(first, 20);
    }

    #[test]
    fn what_finds_it_full_is_counted() {
        let mut f = fixture();
        let mut written = 0;
        while f.writer.append(&nth(written)) {
            written += 1;
        }
        let before = f.reader.figures();
        let orphan = nth(2);
        let visit = nth(4);
        assert!(!f.writer.append(&visit) && !f.writer.append(&orphan));
        f.reader.set_failing(true);
        assert!(!f.writer.append(&visit));
        f.writer.leave_out_orphan();
        let after = f.reader.figures();
        let want = Figures {
            appended: written,
            visits: visits(0..written),
            ring_full: before.ring_full + 1,
            spool_error: 1,
            orphans: before.orphans + 2,
        };
        assert_eq!(after, want);
        // What was read makes no room; what was taken does.
        read(&mut f.reader, 0..written);
        assert!(!f.writer.append(&visit));
        f.reader.take();
        assert!(f.writer.append(&nth(written)));
        recover(&f.path(), written..written + 1, written + 1);
    }

    #[test]
    fn strings_come_back_while_records_use_them() {
        let mut f = fixture();
        let mut text = Vec::new();
        assert!(
            !f.reader.string(0, &mut text) && !f.reader.string(1, &mut text) && !f.reader.string(u32::MAX, &mut text)
        );
        assert_eq!(f.reader.generations(), [1, 0]);
        let long = [b'a'; STRING_BYTES_MAX];
        let (first, _) = f.writer.put_string(&long).unwrap();
        let (second, _) = f.writer.put_string(b"b").unwrap();
        assert!(f.reader.string(first, &mut text) && f.reader.string(second, &mut text));
        assert_eq!(text, [&long[..], b"b"].concat());

        // The first half has no room for it, and nothing uses the second one.
        let (third, _) = f.writer.put_string(&long).unwrap();
        assert_eq!([first, second, third].map(|id| f.reader.half(id)), [0, 0, 1]);
        assert_eq!(f.reader.generations(), [1, 2]);
        // The second half is full, and a record that uses the first one may be on its way to the log.
        f.writer.append(&nth(0));
        assert_eq!(f.writer.put_string(&long), None);
        assert!(f.writer.put_string(b"c").is_some(), "what has room");
        assert!(!f.writer.begin_half());
        // Once the log has it, and what may have used both, the first half is begun anew.
        for number in 1..20 {
            f.writer.append(&nth(number));
        }
        f.reader.read(&mut Vec::new(), usize::MAX);
        assert_eq!(f.writer.put_string(&long), None, "read is not taken");
        f.reader.take();
        assert_eq!(f.writer.put_string(&[b'd'; STRING_BYTES_MAX]), Some((first, 0)));
        assert_eq!(f.reader.generations(), [3, 2]);
        text.clear();
        assert!(f.reader.string(first, &mut text) && f.reader.string(third, &mut text));
        assert_eq!(text, [[b'd'; STRING_BYTES_MAX], long].concat());
    }

    /// A kill between any two stores of appends, with gaps at the end of the area among them, loses no record that was
    /// written, invents none, and leaves counts that add up.
    #[test]
    fn a_kill_between_any_two_stores_of_an_append() {
        let mut f = fixture();
        let (mut taken, mut gaps, mut commits) = (0, 0, 0);
        while f.writer.head < 2 * f.writer.shared.area + 1000 {
            let (before, number) = (std::fs::read(f.path()).unwrap(), f.writer.appended());
            f.journal();
            assert!(f.writer.append(&nth(number)));
            let journal = f.journal();
            // Behind the commit word come the count and the head.
            let committed = journal.len() - 2;
            gaps += u32::from(journal[0].1 >> 48 == u64::from(PAD));
            for stores in 0..=journal.len() {
                let whole = number + u64::from(stores >= committed);
                recover(&f.killed(&before, &journal[..stores]), taken..whole, whole);
                commits += 1;
            }
            if number % 50 == 49 {
                read(&mut f.reader, taken..number + 1);
                f.reader.take();
                taken = number + 1;
            }
        }
        assert!(gaps >= 2 && commits > 1000, "{gaps} gaps, {commits} kills");
    }

    #[test]
    fn a_kill_between_the_two_stores_of_take() {
        let mut f = fixture();
        for number in 0..30 {
            f.writer.append(&nth(number));
        }
        let mut part = Vec::new();
        f.reader.read(&mut part, 1000);
        let taken = f.reader.next.number;
        assert!((5..25).contains(&taken));
        for (taken, more) in [(taken, true), (30, false)] {
            let before = std::fs::read(f.path()).unwrap();
            f.journal();
            f.reader.take();
            let journal = f.journal();
            assert_eq!(journal.len(), 2);
            recover(&f.killed(&before, &journal[..1]), taken..30, 30);
            recover(&f.killed(&before, &journal), taken..30, 30);
            if more {
                f.reader.read(&mut part, usize::MAX);
            }
        }
    }

    /// The commit word of an append whose `head` was not written may be the first record beyond what was taken.
    #[test]
    fn recovery_takes_what_it_found() {
        let mut f = fixture();
        for number in 0..10 {
            f.writer.append(&nth(number));
        }
        let mut reader = recover(&f.path(), 0..10, 10);
        reader.take();
        recover(&f.path(), 10..10, 10);
    }

    #[test]
    fn what_is_no_ring() {
        let f = fixture();
        let bytes = std::fs::read(f.path()).unwrap();
        let changed = |at: usize, byte: u8| {
            let mut bytes = bytes.clone();
            bytes[at] = byte;
            bytes
        };
        let others = [
            vec![],
            b"wayring\0".to_vec(),
            vec![0; bytes.len()],
            bytes[..8192].to_vec(),
            [&bytes[..], &[0; 4096]].concat(),
            changed(0, b'W'),
            changed(8, 2),
            changed(32, 1),
            changed(71, 0xFF),
            changed(192, 3),
            changed(199, 0xFF),
        ];
        for (nth, other) in others.iter().enumerate() {
            let path = f.folder.path().join("other");
            std::fs::write(&path, other).unwrap();
            let unfinished = nth < 4;
            let want = if unfinished { io::ErrorKind::UnexpectedEof } else { io::ErrorKind::InvalidData };
            assert_eq!(open(&path).unwrap_err().kind(), want, "{nth}");
        }
        assert_eq!(create(&f.path(), RING_BYTES_MIN, &ABOUT).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        let small = f.folder.path().join("small");
        assert_eq!(create(&small, RING_BYTES_MIN - 1, &ABOUT).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert!(!small.exists());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Whatever happened to the file: no panic, no record that was not written, each at its own number.
        #[test]
        fn any_damage(
            written in 0u64..400, taken in 0u64..400,
            changes in prop::collection::vec((any::<prop::sample::Index>(), 0usize..9, any::<u8>()), 1..40),
        ) {
            let mut f = fixture();
            let (mut records, taken) = (Vec::new(), taken.min(written));
            for number in 0..written {
                if number == taken {
                    f.reader.read(&mut records, usize::MAX);
                    f.reader.take();
                }
                // Where there is no room, what is there stays.
                f.writer.append(&nth(f.writer.appended()));
            }
            let mut bytes = std::fs::read(f.path()).unwrap();
            for (index, place, byte) in changes {
                // Half of the damage is where it hurts.
                let at = match place {
                    0..4 => index.index(bytes.len()),
                    4 => index.index(RING_HEADER_BYTES / 16),
                    5 => 64 + index.index(16),
                    6 => 192 + index.index(16),
                    _ => RING_HEADER_BYTES + bytes.len() / STRINGS_SHARE + index.index(1000),
                };
                bytes[at] = byte;
            }
            let path = f.folder.path().join("damaged");
            std::fs::write(&path, bytes).unwrap();
            let Ok(mut reader) = open(&path) else { return Ok(()) };
            let (mut number, mut count) = (reader.next.number, 0);
            loop {
                records.clear();
                let read = reader.recover(&mut records, 500);
                if read.count == 0 {
                    break;
                }
                prop_assert_eq!(read.first, number);
                let mut rest = &records[..];
                for _ in 0..read.count {
                    let (record, len) = record::decode(rest, reader.about().source, number).unwrap();
                    prop_assert_eq!(record, nth(number));
                    (rest, number, count) = (&rest[len..], number + 1, count + 1);
                }
                prop_assert!(rest.is_empty() && count <= 400);
            }
            let mut text = Vec::new();
            for id in 0..(RING_BYTES_MIN as u32 / 64) + 2 {
                reader.string(id, &mut text);
            }
            // Neither does the way that trusts `head` panic.
            records.clear();
            reader.read(&mut records, usize::MAX);
        }
    }
}
