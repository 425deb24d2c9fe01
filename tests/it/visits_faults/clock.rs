//! The clock steps, and a day ends: libfaketime stands between the server and the clock that people set.
//!
//! In: an offset, in a file that is read at each question. Out: each visit once, on the day that the clock said.
//! Never: touches the monotonic clock, which does not step.
//! At the limit: without libfaketime (`script/setup` installs it) these are left out, and say so.

use std::path::PathBuf;
use std::time::Duration;

use waypost::domain::time;

use super::{Kept, Stand, redirects, stored};
use crate::support::{LIMIT, Server, eventually, left_out, throughout};

const DAY_SECONDS: i64 = 86_400;

/// Where Debian has it, for whatever processor.
fn library() -> Option<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").ok()?.map(|entry| entry.unwrap().path());
    let found = folders.map(|folder| folder.join("faketime/libfaketimeMT.so.1")).find(|library| library.exists());
    if found.is_none() {
        left_out("the clock cannot be turned without libfaketime: script/setup installs it");
    }
    found
}

/// A server whose clock is ahead of ours by what is turned.
struct Turned {
    stand: Stand,
    server: Server,
}

impl Turned {
    fn start(kept: Kept, ahead_seconds: i64) -> Option<Self> {
        let library = library()?;
        let stand = Stand::new(kept, "");
        let turned = stand.folder().join("clock");
        turn(&stand, ahead_seconds);
        let mut command = stand.serve();
        command.env("LD_PRELOAD", library).env("FAKETIME_TIMESTAMP_FILE", turned);
        command.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        let server = Server::spawn(command, &stand.place.data());
        Some(Self { stand, server })
    }
}

fn turn(stand: &Stand, ahead_seconds: i64) {
    // In one step: it is read at any time.
    let (new, file) = (stand.folder().join("clock.new"), stand.folder().join("clock"));
    std::fs::write(&new, format!("{ahead_seconds:+}\n")).unwrap();
    std::fs::rename(new, file).unwrap();
}

#[test]
fn a_clock_that_steps() {
    for kept in [Kept::Embedded, Kept::Postgres] {
        let Some(Turned { stand, server }) = Turned::start(kept, 0) else { return };
        let load = stand.load(200, 6);
        for ahead in [-3600, 3600, -2 * DAY_SECONDS, 0] {
            turn(&stand, ahead);
            throughout(Duration::from_secs(1), || redirects(&server));
            let before = stored(&server);
            // On a machine that does other things the load is over by then.
            eventually(LIMIT, "batches are stored", || {
                redirects(&server);
                stored(&server) > before
            });
        }
        let ledger = load.ends();
        stand.judge(&server, &ledger).right().nothing_in_flight();
    }
}

/// And nobody has made the table of the day that begins.
#[test]
fn midnight() {
    let until = || DAY_SECONDS - time::now().0 / 1000 % DAY_SECONDS;
    let Some(Turned { stand, server }) = Turned::start(Kept::Postgres, until() - 120) else { return };
    let load = stand.load(200, 12);
    eventually(LIMIT, "batches are stored", || stored(&server) > 0.0);
    let database = &stand.back().database;
    let today = time::now().0 / 1000 / DAY_SECONDS;
    let tables = database.sql(
        "SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent IN ('visits'::regclass, 'orphan_visits'::regclass)
         ORDER BY 1",
    );
    for table in tables.lines() {
        if database.sql(&format!("SELECT count(*) FROM {table}")) == "0" {
            let _ = database.sql(&format!("DROP TABLE {table}"));
        }
    }
    turn(&stand, until() - 2);
    let ledger = load.ends();
    stand.judge(&server, &ledger).right().nothing_in_flight();
    let days = database.sql("SELECT count(DISTINCT at / 86400000), max(at) / 86400000 FROM visits");
    assert_eq!(days, format!("2|{}", today + 1));
}
