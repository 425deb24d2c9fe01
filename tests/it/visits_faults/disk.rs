//! The disk under the log breaks: it is full, it is slow; and a log that may not grow. (`calls` has those that fail.)
//!
//! In: a small tmpfs, or strace at the thread that writes the log. Out: redirects go on; what is given up is counted to the
//! visit, and nothing is given up that the rings could hold.
//! Never: a fault of another disk than the log's.
//! At the limit: who may not mount leaves the small disk out, and says so.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;
use waypost::domain::time;

use super::{Kept, OURS_HEADER, Stand, degraded, dropped, stored, trace};
use crate::servers::proxy::Mode;
use crate::support::{LIMIT, Server, eventually, left_out, request, throughout};

/// A disk of its own for the log; gone when it is dropped.
struct SmallDisk(TempDir);

impl SmallDisk {
    /// None, and it says so, where we may not mount. A log may have a fifth of it, and a segment an eighth of that.
    fn new(mebibytes: u32) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mebibytes}m"), "tmpfs"])
            .arg(folder.path())
            .output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(Self(folder));
        }
        left_out("a disk that is full needs root, to mount a tmpfs");
        None
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Takes all the room that there is.
    fn fill(&self) -> PathBuf {
        let filler = self.path().join("filler");
        let full = std::io::copy(&mut std::io::repeat(0), &mut std::fs::File::create(&filler).unwrap());
        assert_eq!(full.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
        filler
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Also while a server that is about to be killed has files open there.
        let _ = Command::new("umount").arg("--lazy").arg(self.path()).status();
    }
}

#[test]
fn a_full_disk() {
    let Some(disk) = SmallDisk::new(4) else { return };
    let more = format!("[workers]\ncount = 1\n[spool]\ndir = \"{}\"\nring_size = \"256KiB\"\n", disk.path().display());
    let stand = Stand::new(Kept::Postgres, &more);
    let server = stand.start();
    let load = stand.load(300, 15);
    eventually(LIMIT, "batches are stored", || stored(&server) > 0.0);
    let filler = disk.fill();
    // There is room for two thousand visits in the segment at hand, and for four thousand in the ring.
    let mut others = 0;
    eventually(3 * LIMIT, "the ring is full", || {
        others += visit(&server, 0..256);
        dropped(&server, "spool_error") > 100.0
    });
    assert!(degraded(&server).contains(&"spool".to_owned()), "{:?}", degraded(&server));
    std::fs::remove_file(filler).unwrap();
    let before = stored(&server);
    eventually(LIMIT, "the log goes on by itself", || stored(&server) > before);
    eventually(LIMIT, "nothing is degraded", || degraded(&server).is_empty());
    let ledger = load.ends();
    stand.judge(&server, &ledger).lost_exactly(&["spool_error"], others);
}

/// Redirects of one link in one connection, each by the agent of a number, of 500 bytes: a visit of a new one is ten of
/// others.
pub(super) fn visit(server: &Server, agents: Range<u32>) -> u64 {
    let mut client = server.connect();
    let text = "x".repeat(480);
    for chunk in agents.clone().collect::<Vec<_>>().chunks(64) {
        let requests: Vec<u8> = chunk
            .iter()
            .flat_map(|number| {
                request("GET", "/spring26", &[OURS_HEADER, ("User-Agent", &format!("agent {number} {text}"))], b"")
            })
            .collect();
        client.send(requests);
        chunk.iter().for_each(|_| assert_eq!(client.answer().status, 307));
    }
    agents.len() as u64
}

/// It leaves most of its disk to others, as by `spool.max_bytes`, and lets go of its oldest; also on a disk that is full
/// before that is looked at.
#[track_caller]
fn check_growth(mebibytes: u32, reasons: &[&str]) {
    let Some(disk) = SmallDisk::new(mebibytes) else { return };
    let mut stand = Stand::breakable(&format!("[spool]\ndir = \"{}\"\n", disk.path().display()));
    let server = stand.start();
    let load = stand.load(200, 12);
    eventually(LIMIT, "batches are stored", || stored(&server) > 0.0);
    stand.postgres().stop();
    let mut others = 0;
    eventually(3 * LIMIT, "old visits are given up", || {
        others += visit(&server, 0..512);
        dropped(&server, "spool_full") > 0.0
    });
    stand.postgres().start();
    let ledger = load.ends();
    stand.judge(&server, &ledger).lost_exactly(reasons, others);
    let lost = std::fs::read_to_string(disk.path().join("lost.ndjson")).unwrap();
    assert!(lost.contains("spool_full"), "{lost}");
}

/// The store comes and goes while the log has all that it may have: segments go under the eyes of who reads it.
#[test]
fn a_log_at_its_limit_while_it_is_read() {
    let stand = Stand::new(Kept::Postgres, "[spool]\nsegment = \"1MiB\"\nmax_bytes = \"4MiB\"\n");
    let server = stand.start();
    let load = stand.load(200, 600);
    eventually(LIMIT, "batches are stored", || stored(&server) > 0.0);
    let proxy = &stand.back().proxy;
    let (mut agents, mut others) = (0, 0);
    let mut more = || {
        // More than half of the ring's strings hold: each is written to the log again whenever it comes.
        agents = (agents + 256) % 1024;
        others += visit(&server, agents..agents + 256);
    };
    for _ in 0..3 {
        let lost = dropped(&server, "spool_full");
        proxy.mode(Mode::Refuse);
        proxy.cut();
        eventually(6 * LIMIT, "old visits are given up", || {
            more();
            dropped(&server, "spool_full") > lost
        });
        let before = stored(&server);
        proxy.mode(Mode::Pass);
        eventually(2 * LIMIT, "batches are stored", || {
            more();
            stored(&server) > before
        });
    }
    let ledger = load.stop();
    stand.judge(&server, &ledger).lost_exactly(&["spool_full"], others);
}

#[test]
fn a_log_that_may_not_grow() {
    check_growth(16, &["spool_full"]);
}

#[test]
fn a_log_that_cannot_grow() {
    check_growth(4, &["spool_error", "spool_full"]);
}

/// Rings are allocated before anybody is served, for what is missing later is a SIGBUS.
#[test]
fn no_room_for_the_rings() {
    if !trace::possible() {
        return;
    }
    let stand = Stand::new(Kept::Embedded, "");
    let mut command = trace::tampered(&stand.serve(), &["fallocate:error=ENOSPC:when=1+"]);
    let ended = command.output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(!ended.status.success() && said.contains("spool.ring"), "{said}");
}

#[test]
fn a_slow_disk() {
    const SYNC: Duration = Duration::from_secs(2);
    if !trace::possible() {
        return;
    }
    let stand = Stand::new(Kept::Postgres, "");
    let server = stand.start();
    let load = stand.load(300, 8);
    let _slow = trace::tamper(&server, &trace::LOG, &[], &[&format!("fdatasync:delay_enter={}", SYNC.as_micros())]);
    let mut client = server.connect();
    let mut times = Vec::new();
    throughout(3 * SYNC, || {
        let begun = time::monotonic();
        assert_eq!(client.get("/spring26").status, 307);
        times.push(time::monotonic().duration_since(begun));
    });
    times.sort_unstable();
    let p99 = times[times.len() * 99 / 100];
    assert!(p99 < SYNC / 4, "p99 of redirects: {p99:?} while a sync takes {SYNC:?}");
    let ledger = load.ends();
    stand.judge(&server, &ledger).right().nothing_in_flight();
}
