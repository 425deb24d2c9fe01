//! Starts, stops and data folders: what a visit outlives, and whose it is.
//!
//! In: servers that end and come back, with fewer workers, from a copy, or never. Out: each visit once.
//! Never: two processes on one spool.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::sink::COPY_BEGINS;
use super::{Kept, Stand, pending, redirects};
use crate::servers::port;
use crate::servers::proxy::{Mode, Side};
use crate::support::{LIMIT, Server, eventually};

#[test]
fn sigterm_under_load() {
    for kept in [Kept::Embedded, Kept::Postgres] {
        let stand = Stand::new(kept, "");
        let mut server = stand.start();
        let load = stand.load(300, 8);
        for _ in 0..3 {
            let sent = load.sent();
            eventually(LIMIT, "the load goes on", || load.sent() > sent + 100);
            server.stop();
            server = stand.start();
        }
        let ledger = load.ends();
        stand.judge(&server, &ledger).right().nothing_in_flight();
    }
}

#[test]
fn two_processes_on_one_spool() {
    for kept in [Kept::Embedded, Kept::Postgres] {
        let stand = Stand::new(kept, "");
        let server = stand.start();
        let load = stand.load(200, 2);
        let mut second = stand.place.command(&["serve", "--listen", "127.0.0.1:0"]);
        let refused = second.stdout(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success(), "{said}");
        let spool = stand.place.data().join("spool");
        assert!(said.contains(spool.to_str().unwrap()) && said.contains("another process"), "{said}");
        let ledger = load.ends();
        stand.judge(&server, &ledger).right().nothing_in_flight();
    }
}

/// Redirects that stand in no ledger, of a server that is about to be killed.
const OTHERS: u64 = 50;

/// Kills a server that could store nothing for a while: rings and segments are all that has its visits. The ledger.
fn killed_with_visits(stand: &Stand) -> PathBuf {
    let server = stand.start();
    let load = stand.load(300, 3);
    if let Some(back) = &stand.back {
        back.proxy.mode(Mode::Refuse);
        back.proxy.cut();
        eventually(LIMIT, "visits wait", || pending(&server) > 300.0);
    }
    let ledger = load.ends();
    // Some that the log does not have yet.
    (0..OTHERS).for_each(|_| redirects(&server));
    server.kill();
    if let Some(back) = &stand.back {
        back.proxy.mode(Mode::Pass);
    }
    ledger
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_restart_with_fewer_workers() {
    for kept in [Kept::Embedded, Kept::Postgres] {
        let stand = Stand::new(kept, "[workers]\ncount = 3\n");
        let ledger = killed_with_visits(&stand);
        assert_eq!(names(stand.place.rings()).len(), 1);
        stand.configure("[workers]\ncount = 1\n");
        let server = stand.start();
        stand.judge(&server, &ledger).right();
        // Only its own.
        let epochs = names(stand.place.rings());
        assert_eq!(epochs.len(), 1, "{epochs:?}");
        assert_eq!(names(&stand.place.rings().join(&epochs[0])).len(), 1);
    }
}

/// A server with another data folder of the same stand.
fn start_at(stand: &Stand, data: &Path) -> Server {
    let mut command = stand.place.command(&["serve", "--listen", &format!("127.0.0.1:{}", port())]);
    command.arg("--data").arg(data);
    Server::spawn(command, data)
}

#[test]
fn a_copied_data_folder() {
    let stand = Stand::new(Kept::Postgres, "");
    let ledger = killed_with_visits(&stand);
    let copied = stand.folder().join("copied");
    let copy = Command::new("cp").arg("-a").arg(stand.place.data()).arg(&copied).status().unwrap();
    assert!(copy.success());
    let rings = names(stand.place.rings());
    let copy = start_at(&stand, &copied);
    eventually(LIMIT, "it stores what it has", || pending(&copy) == 0.0);
    let after = names(stand.place.rings());
    assert!(rings.iter().all(|ring| after.contains(ring)), "it took {rings:?}: {after:?}");
    redirects(&copy);
    let server = stand.start();
    redirects(&server);
    stand.settle(&copy);
    stand.judge(&server, &ledger).right();
}

/// The machine of the spool is gone, and comes back when nobody thinks of it any more.
#[test]
fn a_replay_from_elsewhere() {
    let stand = Stand::new(Kept::Postgres, "");
    let ledger = killed_with_visits(&stand);
    let elsewhere = stand.folder().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    std::fs::copy(stand.place.data().join("admin.key"), elsewhere.join("admin.key")).unwrap();
    let spool = stand.place.data().join("spool");
    for _ in 0..2 {
        let mut replay = stand.place.command(&["spool", "replay", spool.to_str().unwrap()]);
        let replayed = replay.arg("--data").arg(&elsewhere).output().unwrap();
        assert!(replayed.status.success(), "{}", String::from_utf8_lossy(&replayed.stderr));
    }
    let other = start_at(&stand, &elsewhere);
    stand.judge(&other, &ledger).right();
    let server = stand.start();
    stand.judge(&server, &ledger).right();
}

/// Its machine is not gone: it starts again while somebody stores what it left.
#[test]
fn a_start_while_its_spool_is_replayed() {
    let stand = Stand::new(Kept::Postgres, "");
    let ledger = killed_with_visits(&stand);
    let proxy = &stand.back().proxy;
    let held = proxy.held();
    proxy.mode(Mode::HoldAt(Side::Client, COPY_BEGINS.to_vec()));
    let spool = stand.place.data().join("spool");
    let replay = stand.place.spawn(&["spool", "replay", spool.to_str().unwrap()]);
    eventually(LIMIT, "it stores", || proxy.held() > held);
    stand.place.check(&["serve", "--listen", "127.0.0.1:0"], 78, &["another process", spool.to_str().unwrap()]);
    proxy.release();
    let replayed = replay.wait_with_output().unwrap();
    assert!(replayed.status.success(), "{}", String::from_utf8_lossy(&replayed.stderr));
    let server = stand.start();
    stand.judge(&server, &ledger).right();
}

/// What stood there is lost, and counted to the visit.
#[test]
fn a_damaged_segment() {
    let stand = Stand::new(Kept::Postgres, "");
    let ledger = killed_with_visits(&stand);
    let spool = stand.place.data().join("spool");
    let segments = names(&spool).into_iter().filter(|name| name.ends_with(".log")).map(|name| spool.join(name));
    let largest = segments.max_by_key(|segment| segment.metadata().unwrap().len()).unwrap();
    let mut bytes = std::fs::read(&largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(&largest, bytes).unwrap();
    let server = stand.start();
    stand.judge(&server, &ledger).lost_exactly(&["corrupt"], OTHERS);
}
