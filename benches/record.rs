//! Question: what does a redirect pay for its visit? Time of one `record()` of an ordinary browser's visit, while a thread
//! takes from the ring; then the same while a neighbour writes to the disk, under a lowered dirty limit where this may be
//! set. And: how many bytes has a visit in the spool?
//!
//! Run: `cargo bench --bench record [-- RING_FOLDER DISK_FOLDER]`; `/dev/shm` and `target` by default. Bars: 150 ns in the
//! median; with the neighbour p99.99 and maximum no worse; 56 bytes, 72 with a request id. Figures: PERF.md.

#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use waypost::config::KeptAddress;
use waypost::domain::link::LinkId;
use waypost::domain::time::{Stamp, UnixMillis};
use waypost::domain::visit::{Kind, Of, Visit};
use waypost::visits::spool::ring::{self, RingReader};
use waypost::visits::spool::{Epoch, Source, format};
use waypost::visits::{Counts, Recorder, Settings, visitor};

const VISITS: usize = 2_000_000;
const RING_BYTES: u64 = 4 << 20;
const DIRTY_BYTES: &str = "/proc/sys/vm/dirty_bytes";
const DIRTY_BYTES_LOW: &str = "16777216";
const NEIGHBOUR_FILE_BYTES: u64 = 256 << 20;
/// Visits a second of one core, for what a block's header adds to each.
const VISITS_PER_SECOND: u64 = 5_000;
const SEGMENT_BYTES: u64 = 8 << 20;

fn main() {
    let mut folders = std::env::args().skip(1).filter(|argument| argument != "--bench").map(PathBuf::from);
    let rings = folders.next().unwrap_or_else(|| PathBuf::from("/dev/shm"));
    let disk = folders.next().unwrap_or_else(|| PathBuf::from("target"));
    let empty = overhead();
    println!("reading the clock twice: {empty} ns, which is taken off what follows");
    for (name, request_ids) in [("ordinary browsers", false), ("with request ids", true)] {
        let run = run(&rings, request_ids);
        run.print(name, empty);
    }
    let limit = Limit::lower();
    let stop = AtomicBool::new(false);
    let (with, wrote) = std::thread::scope(|scope| {
        let neighbour = scope.spawn(|| write_until(&disk, &stop));
        let with = run(&rings, false);
        stop.store(true, Ordering::Relaxed);
        (with, neighbour.join().expect("it does not panic"))
    });
    let said = if limit.before.is_some() { "a lowered dirty limit" } else { "the dirty limit as it is" };
    with.print(&format!("with a neighbour that wrote {} MB under {said}", wrote >> 20), empty);
    drop(limit);
}

struct Run {
    /// Of each `record()`, sorted.
    nanos: Vec<u64>,
    record_bytes: u64,
    string_bytes: u64,
    dropped: u64,
}

impl Run {
    fn print(&self, name: &str, empty: u64) {
        let at = |share: f64| self.nanos[(share * (self.nanos.len() - 1) as f64) as usize].saturating_sub(empty);
        let visits = self.nanos.len() as u64;
        let records = self.record_bytes as f64 / (visits - self.dropped) as f64;
        // A block each 20 ms; the strings once for each segment.
        let blocks = format::BLOCK_HEADER_BYTES as f64 * 50.0 / VISITS_PER_SECOND as f64;
        let strings = self.string_bytes as f64 * records / SEGMENT_BYTES as f64;
        println!(
            "{name}: record() {} ns in the median, p99 {}, p99.99 {}, maximum {}; {} of {visits} found no room; \
             {:.1} bytes a visit: record {records:.1}, strings {strings:.1}, blocks {blocks:.1}",
            at(0.5),
            at(0.99),
            at(0.9999),
            at(1.0),
            self.dropped,
            records + strings + blocks,
        );
    }
}

/// What the measurement itself takes, in nanoseconds.
fn overhead() -> u64 {
    let mut nanos: Vec<u64> = (0..100_000).map(|_| Stamp::now()).map(|begun| Stamp::now().nanos_since(begun)).collect();
    nanos.sort_unstable();
    nanos[nanos.len() / 2]
}

/// Agents and referrers as they come: a few are frequent, many are rare.
fn texts() -> (Vec<String>, Vec<String>) {
    let agents = (0..1000).map(|nth| {
        let (major, build) = (90 + nth % 50, nth * 7);
        match nth % 3 {
            0 => format!(
                "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/{major}.0.{build}.0 Safari/537.36"
            ),
            1 => format!(
                "Mozilla/5.0 (iPhone; CPU iPhone OS 17_{} like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.{build} Mobile/15E148 Safari/604.1",
                nth % 7
            ),
            _ => format!("Mozilla/5.0 (X11; Linux x86_64; rv:{major}.{build}) Gecko/20100101 Firefox/{major}.{build}"),
        }
    });
    let referrers = (0..300).map(|nth| format!("https://news-{nth}.example.org/articles/2026/{nth}"));
    (agents.collect(), referrers.collect())
}

fn run(rings: &Path, request_ids: bool) -> Run {
    let path = rings.join(format!("waypost-bench-{}.ring", std::process::id()));
    let about = ring::About { source: Source { epoch: Epoch(1), core: 0 }, spool: 0, made_at: UnixMillis(0) };
    let (writer, reader) = ring::create(&path, RING_BYTES, &about).expect("the folder has room for a ring");
    // The mapping outlives its name.
    fs::remove_file(&path).expect("it was just made");
    let keys = Arc::<visitor::Keys>::default();
    keys.set(visitor::EVERY_DAY, [1, 2]);
    let recorder = Recorder::new(writer, Settings { address: KeptAddress::Truncated, keys });
    std::thread::scope(|scope| {
        let taking = scope.spawn(|| take(reader));
        let nanos = record(recorder, request_ids);
        let (record_bytes, string_bytes, dropped) = taking.join().expect("it does not panic");
        Run { nanos, record_bytes, string_bytes, dropped }
    })
}

fn record(mut recorder: Recorder, request_ids: bool) -> Vec<u64> {
    let (agents, referrers) = texts();
    let counts = Counts::default();
    let mut nanos = Vec::with_capacity(VISITS);
    let mut random = 0x9E37_79B9_7F4A_7C15_u64;
    let mut request_id = *b"0123456789abcdef0123456789abcdef";
    for nth in 0..VISITS {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        // The square makes low numbers frequent.
        let skewed = |count: usize, bits: u64| {
            let share = (bits & 0xFFFF) as f64 / 65536.0;
            (share * share * share * count as f64) as usize
        };
        request_id[nth % 32] = b"0123456789abcdef"[(random >> 60) as usize];
        let begun = Stamp::now();
        let visit = Visit {
            of: Of::Link(LinkId(random >> 44), Kind::Click),
            at: begun.millis(),
            client: IpAddr::from([203, 0, (random >> 8) as u8, random as u8]),
            agent: agents[skewed(agents.len(), random >> 16)].as_bytes(),
            referrer: if random & 3 == 0 { b"" } else { referrers[skewed(referrers.len(), random >> 32)].as_bytes() },
            request_id: if request_ids { &request_id } else { b"" },
            not_tracked: false,
        };
        recorder.record(&counts, std::hint::black_box(&visit));
        nanos.push(Stamp::now().nanos_since(begun));
        // A ring of 4 MiB has room for 70,000 visits: back has to come to its turn on a machine with one core.
        if nth % 20_000 == 0 {
            std::thread::yield_now();
        }
    }
    assert_eq!(counts.answered(), VISITS as u64);
    nanos.sort_unstable();
    nanos
}

/// Back's part: takes what is new, now and then. Bytes of records and of strings, and visits that found no room.
fn take(mut reader: RingReader) -> (u64, u64, u64) {
    let (mut records, mut record_bytes) = (Vec::with_capacity(2 << 20), 0);
    let mut ended = false;
    while !ended {
        std::thread::park_timeout(Duration::from_millis(1));
        ended = !reader.has_writer();
        loop {
            records.clear();
            if reader.read(&mut records, 1 << 20).count == 0 {
                break;
            }
            record_bytes += records.len() as u64;
            reader.take();
        }
    }
    let string_bytes = string_bytes(&reader);
    (record_bytes, string_bytes, reader.figures().ring_full)
}

/// What the log would have of the strings, ids and all.
fn string_bytes(reader: &RingReader) -> u64 {
    let (mut id, mut bytes, mut text) = (1, 0, Vec::new());
    while reader.string(id, &mut text) {
        let room = (2 + text.len()).next_multiple_of(8) as u64;
        bytes += 4 + room;
        id += (room / 8) as u32;
        text.clear();
    }
    bytes
}

/// Dirties the disk as fast as it lets; how many bytes.
fn write_until(folder: &Path, stop: &AtomicBool) -> u64 {
    let path = folder.join(format!("waypost-bench-{}.neighbour", std::process::id()));
    let block = vec![0xA5; 1 << 20];
    let mut written = 0;
    let mut file = fs::File::create(&path).expect("the folder can be written");
    while !stop.load(Ordering::Relaxed) {
        if written % NEIGHBOUR_FILE_BYTES == 0 {
            file = fs::File::create(&path).expect("the folder can be written");
        }
        file.write_all(&block).expect("the disk has room");
        written += block.len() as u64;
    }
    drop(file);
    fs::remove_file(&path).expect("it is there");
    written
}

/// The kernel's limit of dirty pages, put back in the end.
struct Limit {
    before: Option<String>,
}

impl Limit {
    fn lower() -> Self {
        let before = fs::read_to_string(DIRTY_BYTES).ok();
        Self { before: before.filter(|_| fs::write(DIRTY_BYTES, DIRTY_BYTES_LOW).is_ok()) }
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // 0 says that the ratio counts instead, and the kernel takes it only with the ratio.
            let restored = if before.trim() == "0" {
                fs::write("/proc/sys/vm/dirty_ratio", "20")
            } else {
                fs::write(DIRTY_BYTES, before)
            };
            restored.expect("it could be written before");
        }
    }
}
