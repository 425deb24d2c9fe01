//! The spool against a disk that fails, a power cut, damage, and other processes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;

use super::copy::{Copier, Copying, Turn};
use super::disk::{Disk, Kernel};
use super::format::{KIND_CLICK, KIND_ORPHAN};
use super::live::Live;
use super::log::{Log, Unsynced};
use super::read::{Item, Next, Reader};
use super::record::{self, Record, RequestId};
use super::retain::{self, Goes, Limits, Segment};
use super::ring::{self, About, RingWriter};
use super::{Epoch, Error, Place, Settings, Source, Spool, folder, lost, recovery};
use crate::domain::time::UnixMillis;
use crate::visits::Dropped;

const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

/// Chance that is the same each time (SplitMix64: Steele, Lea and Flood, 2014).
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % bound
    }
}

/// The cores' ends, and what they wrote: the agent of each record, by its source and number.
struct Cores {
    writers: Vec<RingWriter>,
    epoch: Epoch,
    written: BTreeMap<(Source, u64), Vec<u8>>,
}

impl Cores {
    fn append(&mut self, chance: &mut Chance) {
        for (core, writer) in self.writers.iter_mut().enumerate() {
            for _ in 0..chance.below(4) {
                let agent = format!("agent {} of core {core} ", chance.below(40)).repeat(1 + chance.below(9) as usize);
                let id = writer.put_string(agent.as_bytes()).map_or(0, |(id, _)| id);
                let number = writer.appended();
                let record = Record {
                    kind: if chance.below(5) == 0 { KIND_ORPHAN } else { KIND_CLICK },
                    link: 1 + number,
                    at: NOW,
                    visitor: 0,
                    agent: id,
                    referrer: 0,
                    address: None,
                    request_id: RequestId::None,
                    code: b"",
                    not_tracked: false,
                    no_agent_room: id == 0,
                };
                if writer.append(&record) {
                    let source = Source { epoch: self.epoch, core: core as u16 };
                    self.written.insert((source, number), if id == 0 { Vec::new() } else { agent.into_bytes() });
                }
            }
        }
    }
}

fn rings(dir: &Path, epoch: Epoch) -> (Cores, Vec<Copier>) {
    let (mut writers, mut copiers) = (Vec::new(), Vec::new());
    for core in 0..2 {
        let about = About { source: Source { epoch, core }, spool: 1, made_at: NOW };
        let (writer, reader) = ring::create(&dir.join(format!("{:x}-{core}", epoch.0)), 64 << 10, &about).unwrap();
        writers.push(writer);
        copiers.push(Copier::new(reader, Next::default()));
    }
    (Cores { writers, epoch, written: BTreeMap::new() }, copiers)
}

fn log(dir: &Path, disk: Arc<dyn Disk>, epoch: Epoch, number: u64) -> (Log, Arc<Unsynced>) {
    let unsynced = Arc::new(Unsynced::new(disk, dir.into()));
    let live = Arc::new(Live::new(number));
    (Log::new(Arc::clone(&unsynced), epoch, 2048, live, number), unsynced)
}

/// All that a reader gives: how far each source came, which records there were, and which were in gaps. Everything that
/// comes has to have been written, once, in order, with the string that it was written with or none.
struct Had {
    records: HashSet<(Source, u64)>,
    without_string: usize,
    gaps: Vec<(Source, Range<u64>, u64, Dropped)>,
}

fn read_all(reader: &mut Reader, written: &BTreeMap<(Source, u64), Vec<u8>>) -> Had {
    let mut had = Had { records: HashSet::new(), without_string: 0, gaps: Vec::new() };
    let mut next = HashMap::<Source, u64>::new();
    while let Some(item) = reader.next().unwrap() {
        match item {
            Item::Records(block) => {
                let mut bytes = block.records;
                let mut visits = 0;
                for number in block.first..block.first + u64::from(block.count) {
                    let (record, len) = record::decode(bytes, block.source, number).unwrap();
                    bytes = &bytes[len..];
                    visits += u32::from(record.kind != KIND_ORPHAN);
                    let expected = &written[&(block.source, number)];
                    assert_eq!(record.link, 1 + number);
                    match block.string(record.agent) {
                        Some(agent) => assert_eq!(agent, expected),
                        None => had.without_string += usize::from(!expected.is_empty()),
                    }
                    assert!(had.records.insert((block.source, number)), "{number} twice");
                }
                assert_eq!((bytes.len(), visits), (0, block.visits));
                let place = next.entry(block.source).or_insert(block.first);
                assert_eq!(*place, block.first, "a hole that is no gap");
                *place += u64::from(block.count);
            }
            Item::Tally(tally) => {
                let place = next.entry(tally.source).or_insert(tally.appended);
                assert_eq!(*place, tally.appended, "a hole that is no gap");
            }
            Item::Gap { source, from, to, visits, why } => {
                let place = next.entry(source).or_insert(from);
                assert!(*place == from && from < to, "a gap that is none");
                *place = to;
                had.gaps.push((source, from..to, visits, why));
            }
        }
    }
    had
}

/// A disk that fails, or ends, at its n-th operation, and that knows what would outlast a power cut.
#[derive(Debug, Default)]
struct Faulty(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    operations: usize,
    fails: Range<usize>,
    ends_at: Option<usize>,
    files: HashMap<u64, Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    path: PathBuf,
    synced: u64,
    named: bool,
    /// A sync has failed: what was not on the disk then never will be.
    broken: bool,
}

impl Faulty {
    fn new(fails: Range<usize>, ends_at: Option<usize>) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Known { fails, ends_at, ..Known::default() })))
    }

    fn operation(&self) -> io::Result<()> {
        let mut known = self.0.lock().unwrap();
        let nth = known.operations;
        known.operations += 1;
        if known.fails.contains(&nth) || known.ends_at.is_some_and(|end| nth >= end) {
            return Err(io::Error::other("injected"));
        }
        Ok(())
    }

    fn fail_next(&self) {
        let mut known = self.0.lock().unwrap();
        known.fails = known.operations..known.operations + 1;
    }

    fn ended(&self) -> bool {
        let known = self.0.lock().unwrap();
        known.ends_at.is_some_and(|end| known.operations > end)
    }

    /// Leaves of each file what was synced, and by chance more.
    fn cut_power(&self, chance: &mut Chance) {
        for kept in self.0.lock().unwrap().files.values() {
            let Ok(file) = File::options().write(true).open(&kept.path) else { continue };
            let len = file.metadata().unwrap().len();
            if !kept.named && chance.below(2) == 0 {
                fs::remove_file(&kept.path).unwrap();
            } else {
                let left = kept.synced + chance.below(len - kept.synced + 1);
                file.set_len(left).unwrap();
                if chance.below(2) == 0 {
                    let zeros = vec![0; (left - kept.synced) as usize / 2];
                    file.write_all_at(&zeros, kept.synced).unwrap();
                }
            }
        }
    }
}

impl Disk for Faulty {
    fn create(&self, path: &Path, bytes: u64) -> io::Result<File> {
        self.operation()?;
        let file = Kernel.create(path, bytes)?;
        let kept = Kept { path: path.into(), ..Kept::default() };
        self.0.lock().unwrap().files.insert(file.metadata()?.ino(), kept);
        Ok(file)
    }

    fn append(&self, file: &File, bytes: &[u8]) -> io::Result<()> {
        if let Err(error) = self.operation() {
            let mut file = file;
            file.write_all(&bytes[..bytes.len() / 2])?;
            return Err(error);
        }
        Kernel.append(file, bytes)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        let result = self.operation();
        let about = file.metadata()?;
        if let Some(kept) = self.0.lock().unwrap().files.get_mut(&about.ino()) {
            kept.broken |= result.is_err();
            if !kept.broken {
                kept.synced = about.len();
            }
        }
        result
    }

    fn sync_folder(&self, _dir: &Path) -> io::Result<()> {
        self.operation()?;
        self.0.lock().unwrap().files.values_mut().for_each(|kept| kept.named = true);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.operation()?;
        Kernel.remove(path)
    }
}

/// Records, copies and syncs for a while on `disk`; which records were synced, and how many operations there were.
fn history(dir: &Path, disk: &Arc<Faulty>, seed: u64) -> (Cores, Copying, Arc<Unsynced>, HashSet<(Source, u64)>) {
    let mut chance = Chance(seed);
    let (mut cores, copiers) = rings(dir, Epoch(7));
    let (log, unsynced) = log(dir, Arc::clone(disk) as Arc<dyn Disk>, Epoch(7), 1);
    let mut copying = Copying::new(log, copiers);
    let mut synced = HashSet::new();
    for step in 0..60 {
        if disk.ended() {
            break;
        }
        cores.append(&mut chance);
        let now = UnixMillis(NOW.0 + step * 200);
        // The first one may have had to write what an earlier one could not, and then it reads nothing new.
        let turns = [copying.turn(now, false), copying.turn(now, false)];
        let all_copied = !turns.iter().any(|turn| matches!(turn, Turn::Failed(_)));
        if chance.below(3) == 0 {
            let durable = unsynced.sync().is_ok() && all_copied && !copying.log.must_write();
            if durable {
                synced.extend(cores.written.keys().copied());
            }
        }
    }
    (cores, copying, unsynced, synced)
}

fn operations() -> usize {
    let dir = tempfile::tempdir().unwrap();
    let disk = Faulty::new(0..0, None);
    let _ = history(dir.path(), &disk, 1);
    disk.0.lock().unwrap().operations
}

#[test]
fn a_failure_of_any_operation_loses_nothing() {
    let all = operations();
    for nth in 0..all {
        for (count, seed) in [(1, 1), (2 + nth % 4, 2), (40, 3)].into_iter().take(2 + usize::from(nth % 8 == 0)) {
            let dir = tempfile::tempdir().unwrap();
            let disk = Faulty::new(nth..nth + count, None);
            let (cores, mut copying, unsynced, _) = history(dir.path(), &disk, seed);
            for _ in 0..count + 3 {
                let _ = copying.turn(NOW, true);
                let _ = unsynced.sync();
            }
            let had = read_all(&mut Reader::open(dir.path()).unwrap(), &cores.written);
            assert_eq!(had.gaps, [], "after {count} failures from {nth} on");
            assert_eq!(had.records.len(), cores.written.len(), "after {count} failures from {nth} on");
            assert_eq!(had.without_string, 0, "after {count} failures from {nth} on");
        }
    }
}

#[test]
fn a_power_cut_at_any_operation_takes_nothing_that_was_synced() {
    let all = operations();
    let mut chance = Chance(5);
    for nth in 1..all {
        let failure = chance.below(nth as u64) as usize;
        for fails in [0..0, failure..failure + 1, failure..failure + 3] {
            let dir = tempfile::tempdir().unwrap();
            let disk = Faulty::new(fails.clone(), Some(nth));
            let (cores, copying, _, synced) = history(dir.path(), &disk, 1);
            drop(copying);
            disk.cut_power(&mut chance);
            let had = read_all(&mut Reader::open(dir.path()).unwrap(), &cores.written);
            let lost = synced.difference(&had.records).collect::<Vec<_>>();
            assert!(lost.is_empty(), "cut at {nth}, failures {fails:?}: {lost:?}");
        }
    }
}

#[test]
fn corrupted() {
    let count = std::env::var("WAYPOST_MUTATIONS").map_or(500, |count| count.parse().unwrap());
    let whole = tempfile::tempdir().unwrap();
    let mut written = BTreeMap::new();
    let mut chance = Chance(9);
    let mut number = 1;
    for epoch in [Epoch(3), Epoch(4)] {
        let (mut cores, copiers) = rings(whole.path(), epoch);
        let (log, _unsynced) = log(whole.path(), Arc::new(Kernel), epoch, number);
        let mut copying = Copying::new(log, copiers);
        for _ in 0..40 {
            cores.append(&mut chance);
            assert!(!matches!(copying.turn(NOW, false), Turn::Failed(_)));
        }
        assert!(!matches!(copying.turn(NOW, true), Turn::Failed(_)));
        number = copying.log.next_segment();
        written.append(&mut cores.written);
    }
    let had = read_all(&mut Reader::open(whole.path()).unwrap(), &written);
    assert_eq!((had.records.len(), had.gaps.len(), had.without_string), (written.len(), 0, 0));
    let files = super::read::segments(whole.path()).unwrap().into_iter().collect::<Vec<_>>();
    assert!(files.len() > 8, "{files:?}");

    let mut gaps = 0;
    for _ in 0..count {
        let dir = tempfile::tempdir().unwrap();
        let path = |number: u64| dir.path().join(super::segment::name(number));
        for number in &files {
            fs::copy(whole.path().join(super::segment::name(*number)), path(*number)).unwrap();
        }
        for _ in 0..=chance.below(3) {
            let any = |chance: &mut Chance| path(files[chance.below(files.len() as u64) as usize]);
            let (one, other) = (any(&mut chance), any(&mut chance));
            let Ok(mut bytes) = fs::read(&one) else { continue };
            let at = chance.below(bytes.len().max(1) as u64) as usize;
            match chance.below(5) {
                0 if !bytes.is_empty() => bytes[at] ^= 1 << chance.below(8),
                1 => bytes.truncate(at),
                2 => bytes.iter_mut().skip(at / 8 * 8).take(512).for_each(|byte| *byte = 0),
                3 if one != other && other.exists() => {
                    fs::rename(&one, dir.path().join("aside")).unwrap();
                    fs::rename(&other, &one).unwrap();
                    fs::rename(dir.path().join("aside"), &other).unwrap();
                    continue;
                }
                _ => {
                    fs::remove_file(&one).unwrap();
                    continue;
                }
            }
            fs::write(&one, bytes).unwrap();
        }
        let had = read_all(&mut Reader::open(dir.path()).unwrap(), &written);
        for (source, range, visits, why) in had.gaps {
            assert_eq!(why, Dropped::Corrupt);
            assert!(visits <= range.end - range.start);
            assert!(range.clone().all(|number| !had.records.contains(&(source, number))));
            gaps += 1;
        }
    }
    assert!(gaps > count / 4, "the mutations have to do something");
}

#[test]
fn what_goes() {
    const fn segment(number: u64, stored_at: i64) -> Segment {
        let stored_at = if stored_at < 0 { None } else { Some(UnixMillis(stored_at)) };
        Segment { number, bytes: 10, changed_at: NOW, stored_at }
    }
    fn check(segments: &[Segment], limits: Limits, expected: &[Goes]) {
        assert_eq!(retain::decide(segments, &limits, UnixMillis(1000)), expected, "{segments:?} {limits:?}");
    }
    let three = [segment(1, 0), segment(2, 500), segment(3, 900), segment(4, -1), segment(5, -1), segment(6, -1)];
    let limits = Limits { keep_ms: 600, keep_bytes: 100, bytes_max: 100, written: 6, reading: 4, claimed: 4 };
    check(&[], limits, &[]);
    // Kept long enough; too many of them.
    check(&three, limits, &[Goes::Stored(1)]);
    check(&three, Limits { keep_ms: 5000, ..limits }, &[]);
    check(&three, Limits { keep_bytes: 10, ..limits }, &[Goes::Stored(1), Goes::Stored(2)]);
    check(&three, Limits { keep_ms: 0, reading: 3, ..limits }, &[Goes::Stored(1), Goes::Stored(2)]);
    check(&three, Limits { keep_ms: 0, reading: 1, ..limits }, &[]);
    // No room: what is stored goes first, then what was never sent, never what may have been.
    check(&three, Limits { keep_ms: 5000, bytes_max: 50, ..limits }, &[Goes::Stored(1)]);
    let stored = [Goes::Stored(1), Goes::Stored(2), Goes::Stored(3)];
    check(&three, Limits { keep_ms: 5000, bytes_max: 30, ..limits }, &stored);
    let all = [Goes::Stored(1), Goes::Stored(2), Goes::Stored(3), Goes::GivenUp(5)];
    check(&three, Limits { bytes_max: 0, ..limits }, &all);
    check(&three, Limits { bytes_max: 20, claimed: 6, ..limits }, &stored);
    // A fifth of what would be free without the log.
    assert_eq!(retain::cap(1000, 60, 40), 20);
    assert_eq!(retain::cap(10, u64::MAX, 40), 10);
}

#[test]
fn what_waits() {
    let segments = [1, 2, 3].map(|number| Segment { number, bytes: 10, changed_at: NOW, stored_at: None });
    let check = |stored: (u64, u64), written: (u64, u64), expected| {
        let place = |(segment, offset)| Place { segment, offset };
        assert_eq!(retain::waiting_bytes(&segments, place(stored), place(written)), expected, "{stored:?} {written:?}");
    };
    check((0, 0), (3, 4), 24);
    check((1, 3), (3, 4), 21);
    check((3, 3), (3, 4), 1);
    check((3, 4), (3, 4), 0);
    check((2, 9), (4, 0), 11);
    // The disk has less of it than was written, or the figures are of another moment.
    check((3, 4), (3, 3), 0);
}

#[test]
fn what_is_given_up_is_written_down_and_a_gap() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Faulty::new(0..0, None);
    let (cores, _copying, _, _) = history(dir.path(), &disk, 1);
    let all = read_all(&mut Reader::open(dir.path()).unwrap(), &cores.written);
    assert_eq!(all.gaps, []);
    for number in [2, 3] {
        let line = retain::give_up(dir.path(), number, &*disk).unwrap();
        assert_eq!(line.links.values().sum::<u64>(), line.sources.iter().map(|range| range.visits).sum::<u64>());
    }
    let had = read_all(&mut Reader::open(dir.path()).unwrap(), &cores.written);
    let lost = had.gaps.iter().map(|(_, range, ..)| range.end - range.start).sum::<u64>();
    assert!(lost > 0 && had.gaps.iter().all(|(.., why)| *why == Dropped::SpoolFull), "{:?}", had.gaps);
    assert_eq!(had.records.len() as u64 + lost, all.records.len() as u64);
}

struct Folders {
    data: TempDir,
    memory: TempDir,
}

impl Folders {
    fn new() -> Self {
        Self { data: tempfile::tempdir().unwrap(), memory: tempfile::tempdir_in("/dev/shm").unwrap() }
    }

    fn settings(&self, cores: u16) -> Settings {
        Settings {
            dir: self.data.path().join("spool"),
            ring: Some(self.memory.path().into()),
            runtime_dir: None,
            ring_bytes: 64 << 10,
            segment_bytes: 64 << 10,
            sync: Duration::from_millis(5),
            bytes_max: 1 << 30,
            keep: Duration::from_secs(60),
            keep_bytes: 1 << 30,
            cores,
        }
    }

    fn open(&self, epoch: u64, cores: u16) -> (Spool, Cores) {
        let (spool, writers) = Spool::open(&self.settings(cores), NOW, Epoch(epoch)).unwrap();
        (spool, Cores { writers, epoch: Epoch(epoch), written: BTreeMap::new() })
    }

    /// A start in which nothing happens.
    fn seal(&self, epoch: u64) {
        let (spool, cores) = self.open(epoch, 1);
        drop(cores);
        spool.seal();
    }

    fn rings(&self) -> usize {
        fs::read_dir(self.memory.path()).unwrap().count()
    }
}

#[test]
fn starts_that_are_killed_leave_everything_to_the_next() {
    let place = Folders::new();
    let mut written = BTreeMap::new();
    let mut chance = Chance(2);
    for (epoch, cores, sealed) in [(1, 2, false), (2, 1, false), (3, 3, true), (4, 1, false), (5, 2, true)] {
        let (spool, mut cores) = place.open(epoch, cores);
        for _ in 0..50 {
            cores.append(&mut chance);
        }
        if sealed {
            cores.writers.clear();
            spool.seal();
            spool.seal();
            assert_eq!(place.rings(), 0);
        }
        drop(spool);
        written.append(&mut cores.written);
    }
    let dir = place.settings(0).dir;
    let had = read_all(&mut Reader::open(&dir).unwrap(), &written);
    assert_eq!((had.records.len(), had.gaps.len(), had.without_string), (written.len(), 0, 0));
    let summary = super::summary(&dir).unwrap();
    assert_eq!((summary.records, summary.epochs.len(), summary.rings.len()), (written.len() as u64, 5, 0));
    assert_eq!(summary.lost.iter().sum::<u64>(), 0);
}

#[test]
fn a_folder_has_one_process() {
    let place = Folders::new();
    let (first, cores) = place.open(1, 1);
    let error = Spool::open(&place.settings(1), NOW, Epoch(2)).unwrap_err();
    assert!(matches!(&error, Error::InUse(dir) if *dir == place.settings(1).dir), "{error}");
    assert_eq!(super::summary(&place.settings(1).dir).unwrap().rings.len(), 1);
    let dir = place.settings(1).dir;
    assert!(matches!(recovery::recover_rings(&dir, NOW), Err(Error::InUse(_))));
    drop(cores);
    first.seal();
    drop(first);
    place.seal(3);
    // Who replays it has it until the end.
    let lock = recovery::recover_rings(&dir, NOW).unwrap();
    assert!(matches!(Spool::open(&place.settings(1), NOW, Epoch(4)), Err(Error::InUse(_))));
    drop(lock);
    place.seal(5);
}

/// Read as if it were damaged, it would be counted as lost, and go.
#[test]
fn what_a_newer_program_has_written_is_left_to_it() {
    let place = Folders::new();
    place.seal(1);
    let segment = fs::read_dir(place.settings(1).dir).unwrap().map(|entry| entry.unwrap().path());
    let segment = segment.into_iter().find(|path| path.extension().is_some_and(|end| end == "log")).unwrap();
    let mut newer = fs::read(&segment).unwrap();
    newer[8] += 1;
    fs::write(&segment, &newer).unwrap();
    let start = Spool::open(&place.settings(1), NOW, Epoch(2)).map(drop);
    for refused in [start, recovery::recover_rings(&place.settings(1).dir, NOW).map(drop)] {
        let why = refused.unwrap_err().to_string();
        assert!(why.contains(segment.to_str().unwrap()) && why.contains("is of version 2"), "{why}");
    }
    assert_eq!(fs::read(&segment).unwrap(), newer);
}

#[test]
fn a_copied_folder_leaves_its_originals_rings_alone() {
    let original = Folders::new();
    let (spool, mut cores) = original.open(1, 1);
    drop(spool);
    cores.append(&mut Chance(1));
    let rings = original.rings();
    let copy = Folders::new();
    fs::create_dir(copy.settings(1).dir).unwrap();
    for entry in fs::read_dir(original.settings(1).dir).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.settings(1).dir.join(path.file_name().unwrap())).unwrap();
    }
    copy.seal(2);
    assert_eq!(original.rings(), rings);
    original.seal(3);
    assert_eq!(original.rings(), 0);
    let had = read_all(&mut Reader::open(&original.settings(1).dir).unwrap(), &cores.written);
    assert_eq!(had.records.len(), cores.written.len());
}

#[tokio::test]
async fn a_reader_follows_what_is_written() {
    let place = Folders::new();
    let (spool, mut cores) = place.open(1, 2);
    let mut reader = spool.reader();
    let mut chance = Chance(4);
    let mut records = 0;
    for _ in 0..20 {
        cores.append(&mut chance);
        while records < cores.written.len() {
            spool.wait().await;
            records += read_all_but_holes(&mut reader);
        }
    }
    assert_eq!(records, cores.written.len());
    assert_eq!(reader.place(), spool.written());
    let visits = spool.figures().cores.iter().map(|tally| tally.appended).sum::<u64>();
    assert!(visits <= records as u64);
    spool.stored(Place { segment: reader.place().segment, offset: 0 });
    spool.seal();
}

fn read_all_but_holes(reader: &mut Reader) -> usize {
    let mut records = 0;
    while let Some(item) = reader.next().unwrap() {
        match item {
            Item::Records(block) => records += block.count as usize,
            Item::Tally(_) => {}
            Item::Gap { .. } => panic!("nothing is lost"),
        }
    }
    records
}

/// A spool whose disk fails or not, whose log is full of what was not synced, or not: all that was recorded is in the log
/// after it is sealed, or the rings stay and the next start has it.
#[test]
fn sealing_leaves_nothing_behind() {
    // Nothing; a write, which is tried twice; a sync, which is too; all but the first.
    for (fails, rounds) in [(0..0, 1), (0..0, 40), (2..3, 40), (3..4, 40), (1..10_000, 40)] {
        let folders = tempfile::tempdir().unwrap();
        let disk = Faulty::new(0..0, None);
        let (mut cores, copiers) = rings(folders.path(), Epoch(7));
        let (log, unsynced) = log(folders.path(), Arc::clone(&disk) as Arc<dyn Disk>, Epoch(7), 1);
        let mut copying = Copying::new(log, copiers);
        let mut chance = Chance(3);
        for _ in 0..rounds {
            cores.append(&mut chance);
        }
        disk.0.lock().unwrap().fails = fails.clone();
        let emptied = super::empty(&mut copying, &unsynced);
        assert!(!copying.is_done(), "somebody may still record");
        cores.writers.clear();
        assert_eq!(emptied.is_ok(), fails.len() < 2, "{fails:?}");
        assert!(copying.is_done() || emptied.is_err());
        let had = read_all(&mut Reader::open(folders.path()).unwrap(), &cores.written);
        assert!(had.records.len() == cores.written.len() || emptied.is_err(), "{fails:?}");
        assert_eq!(had.gaps, []);
    }
}

#[test]
fn a_worker_that_hangs_keeps_its_rings() {
    let place = Folders::new();
    let (spool, mut cores) = place.open(1, 2);
    spool.seal();
    cores.append(&mut Chance(1));
    drop(spool);
    assert_eq!(place.rings(), 1);
    place.seal(2);
    assert_eq!(place.rings(), 0);
    let had = read_all(&mut Reader::open(&place.settings(1).dir).unwrap(), &cores.written);
    assert_eq!(had.records.len(), cores.written.len());
}

#[test]
fn rings_that_were_never_made_whole_hold_nothing_up() {
    for (name, bytes) in [("core-0.ring", 0), ("core-0.ring", 100), ("core-1.ring", 64 << 10)] {
        let place = Folders::new();
        let (spool, cores) = place.open(1, 1);
        drop((spool, cores));
        let made = place.memory.path().join(format!("waypost-{:016x}", 1));
        File::create(made.join(name)).unwrap().set_len(bytes).unwrap();
        place.seal(2);
        assert_eq!(place.rings(), 0, "{name} {bytes}");
    }
    // What this start cannot make goes at once.
    let place = Folders::new();
    let settings = Settings { ring_bytes: 1, ..place.settings(2) };
    Spool::open(&settings, NOW, Epoch(1)).unwrap_err();
    assert_eq!(place.rings(), 0);
}

/// A start was killed before it synced; the next one recovers its rings, which go, and then the power is cut.
#[test]
fn what_a_recovery_relied_on_outlasts_a_power_cut() {
    let mut chance = Chance(6);
    for _ in 0..20 {
        let (dir, memory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let disk = Faulty::new(0..0, None);
        let shared = Arc::clone(&disk) as Arc<dyn Disk>;
        let (mut cores, copiers) = rings(memory.path(), Epoch(7));
        let (log, _unsynced) = log(dir.path(), Arc::clone(&shared), Epoch(7), 1);
        let mut copying = Copying::new(log, copiers);
        for _ in 0..30 {
            cores.append(&mut chance);
            assert!(!matches!(copying.turn(NOW, false), Turn::Failed(_)));
        }
        cores.writers[0].leave_out_orphan();
        folder::write_rings(dir.path(), &BTreeSet::from([memory.path().into()]), &*disk).unwrap();
        recovery::recover(dir.path(), None, 1, &shared, NOW).unwrap();
        assert!(!memory.path().exists());
        disk.cut_power(&mut chance);
        let had = read_all(&mut Reader::open(dir.path()).unwrap(), &cores.written);
        assert_eq!((had.records.len(), had.gaps.len()), (cores.written.len(), 0));
        let summary = super::summary(dir.path()).unwrap();
        assert_eq!(summary.tallies.values().map(|tally| tally.orphans).sum::<u64>(), 1, "counted before the kill");
    }
}

#[test]
fn giving_up_again_loses_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Faulty::new(0..0, None);
    let (_cores, _copying, _, _) = history(dir.path(), &disk, 1);
    let path = dir.path().join(super::segment::name(2));
    let whole = fs::read(&path).unwrap();
    let first = retain::give_up(dir.path(), 2, &*disk).unwrap();
    fs::write(&path, whole).unwrap();
    let again = retain::give_up(dir.path(), 2, &*disk).unwrap();
    assert!(!first.sources.is_empty() && !path.exists());
    assert_eq!(again.sources, first.sources);
    assert_eq!(super::lost::read(dir.path()).unwrap()[&2], first.sources);
}

#[test]
fn what_a_killed_start_had_reserved_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(super::segment::name(1));
    let file = Kernel.create(&path, 1 << 20).unwrap();
    Kernel.append(&file, &[1; 100]).unwrap();
    let before = retain::scan(dir.path()).unwrap();
    retain::trim(&path).unwrap();
    let after = retain::scan(dir.path()).unwrap();
    assert!(before[0].bytes >= 1 << 20, "what is reserved counts: {before:?}");
    assert!(after[0].bytes < 64 << 10, "{after:?}");
    assert_eq!(fs::read(&path).unwrap(), [1; 100]);
}

/// Long numbers make a file long with few of them.
const LOST_EACH: u64 = 100_000_000_000_000_000;

/// Lines of 16 segments, each with 26,000 links, of which `link` says the n-th.
fn write_lost(dir: &Path, link: impl Fn(u64, u64) -> u64) {
    let mut file = File::create(dir.join(lost::NAME)).unwrap();
    for segment in 1..=16 {
        let range = lost::Range {
            epoch: 7,
            core: 0,
            from: 10 * segment,
            to: 10 * segment + 10,
            before: 8 * segment,
            visits: 8,
        };
        let links = (0..26_000).map(|nth| (10_000_000_000_000_000_000 + link(segment, nth), LOST_EACH)).collect();
        let line = lost::Line { segment, reason: "spool_full".to_owned(), sources: vec![range], links };
        file.write_all(&line.encode().unwrap()).unwrap();
    }
    assert!(file.metadata().unwrap().len() > lost::LOST_BYTES_MAX);
}

#[test]
fn a_long_list_of_what_was_lost_is_shortened() {
    let check = |there: &[u64], link: fn(u64, u64) -> u64, lines: &[(u64, u64, u64)], counted: u64| {
        let dir = tempfile::tempdir().unwrap();
        write_lost(dir.path(), link);
        lost::shorten(dir.path(), &there.iter().copied().collect(), &Kernel).unwrap();
        let text = fs::read_to_string(dir.path().join(lost::NAME)).unwrap();
        assert!((text.len() as u64) < lost::LOST_BYTES_MAX / 2);
        let links = text.lines().filter_map(|line| serde_json::from_str::<lost::Line>(line).ok());
        assert_eq!(
            links.flat_map(|line| line.links.into_values()).map(|visits| visits / LOST_EACH).sum::<u64>(),
            counted,
            "{there:?}"
        );
        let all = lost::read(dir.path()).unwrap().into_iter().map(|(segment, ranges)| {
            let [range] = ranges[..] else { panic!("{ranges:?}") };
            assert_eq!((range.visits, range.before), ((range.to - range.from) / 10 * 8, range.from / 10 * 8));
            (segment, range.from, range.to)
        });
        assert_eq!(all.collect::<Vec<_>>(), lines, "{there:?}");
    };
    let same = |_, nth| nth;
    check(&[], same, &[(16, 10, 170)], 16 * 26_000);
    // Of one that is there what was lost before it is told before it; one that should have gone keeps its line.
    check(&[5, 40], same, &[(4, 10, 50), (5, 50, 60), (16, 60, 170)], 16 * 26_000);
    check(&[], |segment, nth| segment * 1_000_000 + nth, &[(16, 10, 170)], 0);
    // A short one stays as it is.
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(lost::NAME), "anything").unwrap();
    lost::shorten(dir.path(), &BTreeSet::new(), &Kernel).unwrap();
    assert_eq!(fs::read_to_string(dir.path().join(lost::NAME)).unwrap(), "anything");
}

/// A sync has failed, and a later segment has what was not synced: that is not lost with the first one.
#[test]
fn what_is_repeated_is_not_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Faulty::new(0..0, None);
    let (mut cores, copiers) = rings(dir.path(), Epoch(7));
    let (log, unsynced) = log(dir.path(), Arc::clone(&disk) as Arc<dyn Disk>, Epoch(7), 1);
    let mut copying = Copying::new(log, copiers);
    let mut chance = Chance(8);
    let mut write = |cores: &mut Cores, copying: &mut Copying| {
        cores.append(&mut chance);
        assert!(matches!(copying.turn(NOW, false), Turn::Copied));
        cores.written.len()
    };
    let synced = write(&mut cores, &mut copying);
    unsynced.sync().unwrap();
    write(&mut cores, &mut copying);
    disk.fail_next();
    unsynced.sync().unwrap_err();
    write(&mut cores, &mut copying);
    assert_eq!(super::read::header(dir.path(), 2).unwrap().repeats, 1);
    let line = retain::give_up(dir.path(), 1, &*disk).unwrap();
    let lost = line.sources.iter().map(|range| range.to - range.from).sum::<u64>();
    assert_eq!(lost, synced as u64);
    let had = read_all(&mut Reader::open(dir.path()).unwrap(), &cores.written);
    assert_eq!(had.records.len(), cores.written.len() - synced);
    assert!(had.gaps.iter().all(|(.., why)| *why == Dropped::SpoolFull), "{:?}", had.gaps);
}

/// Until it was read again, a ring is full of what the disk did not take.
#[test]
fn what_finds_no_room_behind_a_failure_is_lost_to_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Faulty::new(0..0, None);
    let (mut cores, copiers) = rings(dir.path(), Epoch(7));
    let counts = copiers.iter().map(Copier::counts).collect::<Vec<_>>();
    let drops = || {
        let figures = counts.iter().map(|counts| counts.figures());
        figures.fold((0, 0), |(full, error), core| (full + core.ring_full, error + core.spool_error))
    };
    let (log, _unsynced) = log(dir.path(), Arc::clone(&disk) as Arc<dyn Disk>, Epoch(7), 1);
    let mut copying = Copying::new(log, copiers);
    let mut chance = Chance(8);
    cores.append(&mut chance);
    disk.0.lock().unwrap().fails = 0..usize::MAX;
    assert!(matches!(copying.turn(NOW, false), Turn::Failed(_)));
    let mut fill = || (0..2000).for_each(|_| cores.append(&mut chance));
    fill();
    let (_, failed) = drops();
    disk.0.lock().unwrap().fails = 0..0;
    assert!(matches!(copying.turn(NOW, false), Turn::Copied));
    fill();
    let (full, behind) = drops();
    assert!(full == 0 && behind > failed && failed > 0, "{full} {failed} {behind}");
    assert!(matches!(copying.turn(NOW, false), Turn::Copied));
    fill();
    assert!(drops().0 > 0 && drops().1 == behind, "{:?}", drops());
}

/// A disk that does not let one file go.
#[derive(Debug)]
struct Sticky(PathBuf);

impl Disk for Sticky {
    fn remove(&self, path: &Path) -> io::Result<()> {
        if path == self.0 { Err(io::Error::other("injected")) } else { Kernel.remove(path) }
    }
}

#[test]
fn what_cannot_be_removed_keeps_nothing_else() {
    let place = Folders::new();
    let dir = place.settings(1).dir;
    fs::create_dir(&dir).unwrap();
    let (cores, copying, _, _) = history(&dir, &Faulty::new(0..0, None), 1);
    drop(copying);
    let stuck = dir.join(super::segment::name(2));
    let settings = Settings { keep: Duration::ZERO, ..place.settings(1) };
    let (spool, _rings) = Spool::open_on(Arc::new(Sticky(stuck.clone())), &settings, NOW, Epoch(1)).unwrap();
    let mut reader = spool.reader();
    assert_eq!(read_all_but_holes(&mut reader), cores.written.len());
    let stored = reader.place().segment;
    assert!(stored > 4, "{stored}");
    spool.stored(Place { segment: stored, offset: 0 });
    let error = spool.shared.retain(UnixMillis(NOW.0 + 1)).unwrap_err();
    assert_eq!(error.to_string(), "injected");
    let left = super::read::segments(&dir).unwrap();
    assert_eq!(left.range(..stored).collect::<Vec<_>>(), [&2]);
}
