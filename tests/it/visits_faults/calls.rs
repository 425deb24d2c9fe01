//! System calls of the log that fail: each of them, with each error, at the first time, the second, and so on.
//!
//! In: up to which time a call fails (`WAYPOST_FAULTS`: all faults up to that one; else a few of them by chance), a seed
//! (`WAYPOST_SEED`; drawn and shown by default). Out: redirects go on, and nothing is lost: a ring has room for all of it.
//! Never: a fault of a file that is not the log's.
//! At its limit: a fault whose call does not come within [`REACHED`] fails the test: it would have tested nothing.

use std::path::PathBuf;
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use waypost::domain::time;

use super::disk::visit;
use super::{Kept, Stand, pending, redirects, trace};
use crate::support::{LIMIT, eventually, throughout};

/// The faults of a short run: those that [`every`] of [`FAULTS_MAX`] has, drawn.
const FAULTS: usize = 4;
const FAULTS_MAX: u32 = 12;
/// Until a call comes for the n-th time, while a new segment begins about once a second.
const REACHED: Duration = Duration::from_secs(30);
/// How long a fault is looked at once it has come.
const SPAN: Duration = Duration::from_millis(600);

/// Each call of the log at each time up to `most`: it fails once, or when it is tried again, too.
fn every(most: u32) -> Vec<Vec<String>> {
    let mut faults = Vec::new();
    for nth in 1..=most {
        for call in ["fdatasync", "openat", "fallocate", "write"] {
            for error in ["EIO", "ENOSPC"] {
                for last in [nth, nth + 1] {
                    faults.push(vec![format!("{call}:error={error}:when={nth}..{last}")]);
                }
            }
        }
    }
    faults
}

/// The folder of the log, its last segment and those that may come: what tampering is for. (A thread writes to others, too,
/// when it wakes somebody or has something to say.)
fn files(stand: &Stand) -> Vec<PathBuf> {
    let spool = stand.place.data().join("spool");
    let number = |entry: std::io::Result<std::fs::DirEntry>| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        u64::from_str_radix(name.strip_suffix(".log")?, 16).ok()
    };
    let last = std::fs::read_dir(&spool).unwrap().filter_map(number).max().unwrap();
    let segments = (last..last + 50).map(|number| spool.join(format!("{number:016x}.log")));
    std::iter::once(spool.clone()).chain(segments).collect()
}

/// strace's tampering, once for each element, under load. The smallest segments there are.
#[expect(clippy::print_stdout, reason = "the log of the faults is what is asked for")]
fn check(kept: Kept, faults: &[Vec<String>]) {
    if !trace::possible() {
        return;
    }
    let stand = Stand::new(kept, "[spool]\nsegment = \"1MiB\"\n");
    let server = stand.start();
    let load = stand.load(300, 3600);
    let mut agents = 0;
    for fault in faults {
        eventually(6 * LIMIT, "the store keeps pace", || pending(&server) < 20_000.0);
        let spooled = || server.metric("waypost_visits_spooled_total", &[]);
        let tampering: Vec<&str> = fault.iter().map(String::as_str).collect();
        let tracer = trace::tamper(&server, &trace::LOG, &files(&stand), &tampering);
        let begun = time::monotonic();
        eventually(REACHED, "the call comes", || {
            // More than half of the ring's strings hold: each is written to the log again whenever it comes.
            agents = (agents + 256) % 1024;
            visit(&server, agents..agents + 256);
            tracer.injected() > 0
        });
        let after = time::monotonic().duration_since(begun);
        throughout(SPAN, || redirects(&server));
        println!("{fault:?}: after {after:?}, {} calls failed", tracer.injected());
        drop(tracer);
        let before = spooled();
        eventually(LIMIT, "the log goes on", || {
            redirects(&server);
            spooled() > before
        });
    }
    let ledger = load.stop();
    stand.judge(&server, &ledger).right();
}

/// One call fails, or all of them, until strace goes; and a new segment that is needed then cannot be made.
const TOGETHER: [&[&str]; 7] = [
    &["fdatasync:error=ENOSPC:when=1+"],
    &["write:error=EIO:when=1+"],
    &["fallocate:error=ENOSPC:when=1+"],
    &["fdatasync:error=EIO:when=1", "openat:error=ENOSPC:when=1"],
    &["fdatasync:error=EIO:when=1", "openat:error=EIO:when=1+"],
    &["fdatasync:error=EIO:when=1", "fallocate:error=ENOSPC:when=1"],
    &["fdatasync:error=EIO:when=1", "fsync:error=EIO:when=1"],
];

#[test]
fn several_at_once() {
    let faults: Vec<Vec<String>> =
        TOGETHER.iter().map(|fault| fault.iter().map(|call| (*call).to_owned()).collect()).collect();
    for kept in [Kept::Embedded, Kept::Postgres] {
        check(kept, &faults);
    }
}

#[expect(clippy::print_stdout, reason = "the seed is what repeats it")]
fn check_each(kept: Kept) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    if let Some(most) = number("WAYPOST_FAULTS") {
        return check(kept, &every(most.try_into().unwrap()));
    }
    let seed = number("WAYPOST_SEED").unwrap_or_else(rand::random);
    println!("faults of the log over {kept:?}; again by WAYPOST_SEED={seed}");
    let mut chance = StdRng::seed_from_u64(seed);
    let all = every(FAULTS_MAX);
    check(kept, &all.sample(&mut chance, FAULTS).cloned().collect::<Vec<_>>());
}

#[test]
fn embedded() {
    check_each(Kept::Embedded);
}

#[test]
fn postgres() {
    check_each(Kept::Postgres);
}
