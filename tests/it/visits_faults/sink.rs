//! Postgres breaks under visits that come: it stops, dies, freezes, is slow, takes a batch and does not say so.
//!
//! In: a table of faults. Out: for each, redirects go on meanwhile, and all visits are stored once after it.
//! Never: a restart of the server.
//! At the limit: each fault lasts until it is seen, and [`SPAN`] longer.

use std::time::Duration;

use super::{Kept, Stand, degraded, pending, redirects, stored};
use crate::servers::proxy::{Mode, Side};
use crate::support::{LIMIT, eventually, throughout};

/// How long a fault is looked at.
const SPAN: Duration = Duration::from_secs(1);
/// The longest that one step of a batch takes before it is given up, and the breaker's recovery, and some time.
const GIVEN_UP: Duration = Duration::from_secs(20);

pub(super) const COPY_BEGINS: &[u8] = b"PGCOPY\n\xff\r\n\0";
/// CommandComplete (PostgreSQL manual, section 55.7) of the rows, of a transaction.
const COPIED: &[u8] = b"COPY ";
const COMMITTED: &[u8] = b"C\0\0\0\x0bCOMMIT\0";
const COMMIT: &[u8] = b"COMMIT\0";

/// A fault of the whole of Postgres.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Stopped,
    Killed,
    Frozen,
}

impl Fault {
    fn begin(self, stand: &mut Stand) {
        match self {
            Self::Stopped => stand.postgres().stop(),
            Self::Killed => stand.postgres().kill(),
            Self::Frozen => stand.postgres().freeze(),
        }
    }

    fn end(self, stand: &mut Stand) {
        match self {
            Self::Stopped | Self::Killed => stand.postgres().start(),
            Self::Frozen => stand.postgres().thaw(),
        }
    }
}

#[track_caller]
fn check(fault: Fault) {
    let mut stand = Stand::breakable("");
    let server = stand.start();
    let load = stand.load(300, 8);
    redirects(&server);
    eventually(LIMIT, "batches are stored", || stored(&server) > 0.0);
    fault.begin(&mut stand);
    eventually(LIMIT, "visits wait", || pending(&server) > 300.0);
    eventually(GIVEN_UP, "it shows", || degraded(&server).contains(&"visits_sink".to_owned()));
    throughout(SPAN, || redirects(&server));
    fault.end(&mut stand);
    let ledger = load.ends();
    stand.judge(&server, &ledger).right().nothing_in_flight();
    assert!(!degraded(&server).contains(&"visits_sink".to_owned()));
    let log = server.log();
    let told = log.iter().filter(|line| line.contains("visits wait") || line.contains("visits are stored again"));
    assert!((2..=4).contains(&told.count()), "a fault is told of, and its end: {log:#?}");
}

#[test]
fn stopped() {
    check(Fault::Stopped);
}

#[test]
fn killed() {
    check(Fault::Killed);
}

#[test]
fn frozen() {
    check(Fault::Frozen);
}

/// What becomes of a batch on its way, again and again: `begin` lets it happen, and it happened when `seen`.
#[track_caller]
fn check_way(times: u32, begin: impl Fn(&Stand), seen: impl Fn(&Stand) -> u64, after: impl Fn(&Stand)) {
    let stand = Stand::new(Kept::Postgres, "");
    let server = stand.start();
    let load = stand.load(300, 300);
    for _ in 0..times {
        let (seen_before, stored_before) = (seen(&stand), stored(&server));
        eventually(GIVEN_UP, "batches are stored", || stored(&server) > stored_before);
        begin(&stand);
        eventually(LIMIT, "it happens to a batch", || seen(&stand) > seen_before);
        // Nothing heals it but the server.
        let stored_before = stored(&server);
        eventually(GIVEN_UP, "the next batches are stored", || {
            redirects(&server);
            stored(&server) > stored_before
        });
        after(&stand);
    }
    let ledger = load.stop();
    stand.judge(&server, &ledger).right();
}

/// The writer finds out by the positions that it was stored.
#[test]
fn a_commit_whose_answer_is_lost() {
    let cut = |stand: &Stand| stand.back().proxy.mode(Mode::CutAt(COMMITTED.to_vec()));
    check_way(5, cut, |stand| stand.back().proxy.cuts(), |_| {});
}

/// And that it was not, or that it is only now.
#[test]
fn a_commit_that_comes_late() {
    let hold = |stand: &Stand| stand.back().proxy.mode(Mode::HoldAt(Side::Client, COMMIT.to_vec()));
    check_way(1, hold, |stand| stand.back().proxy.held(), |stand| stand.back().proxy.release());
}

/// It holds the locks of its positions, and somebody has to end it.
#[test]
fn a_copy_that_never_ends() {
    let hold = |stand: &Stand| stand.back().proxy.mode(Mode::HoldAt(Side::Client, COPY_BEGINS.to_vec()));
    check_way(1, hold, |stand| stand.back().proxy.held(), |stand| stand.back().proxy.release());
}

#[test]
fn a_copy_that_is_taken_in_silence() {
    let hold = |stand: &Stand| stand.back().proxy.mode(Mode::HoldAt(Side::Server, COPIED.to_vec()));
    check_way(1, hold, |stand| stand.back().proxy.held(), |stand| stand.back().proxy.release());
}

#[test]
fn slow() {
    let stand = Stand::new(Kept::Postgres, "");
    let server = stand.start();
    let load = stand.load(300, 6);
    stand.back().proxy.mode(Mode::Delay(Duration::from_millis(200)));
    throughout(SPAN, || redirects(&server));
    // Each batch is the larger, and none is late for ever.
    let before = stored(&server);
    eventually(GIVEN_UP, "batches are stored all the same", || stored(&server) > before);
    let ledger = load.ends();
    stand.judge(&server, &ledger).right().nothing_in_flight();
}

/// Of today and of tomorrow, whatever made them: a batch finds its day gone.
#[test]
fn a_day_without_a_partition() {
    let stand = Stand::new(Kept::Postgres, "");
    let server = stand.start();
    let load = stand.load(300, 5);
    eventually(LIMIT, "batches are stored", || stored(&server) > 0.0);
    let database = &stand.back().database;
    let tables = "SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent IN
        ('visits'::regclass, 'orphan_visits'::regclass)";
    let tables = database.sql(tables);
    assert!(tables.lines().count() >= 4, "days are made ahead: {tables}");
    // What has been stored stays, beside.
    for table in tables.lines() {
        let parent = if table.starts_with("orphan") { "orphan_visits" } else { "visits" };
        database
            .sql(&format!("ALTER TABLE {parent} DETACH PARTITION {table}; ALTER TABLE {table} RENAME TO {table}_old"));
    }
    let before = stored(&server);
    eventually(GIVEN_UP, "its day is made", || stored(&server) > before);
    let ledger = load.ends();
    stand.settle(&server);
    // What lay in the tables that were taken away.
    for table in tables.lines() {
        let parent = if table.starts_with("orphan") { "orphan_visits" } else { "visits" };
        database.sql(&format!("INSERT INTO {parent} SELECT * FROM {table}_old"));
    }
    stand.judge(&server, &ledger).right().nothing_in_flight();
}
