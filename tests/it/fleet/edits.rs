//! An edit on one of three shows on all of them at once; one that was frozen meanwhile says nothing old for long.
//!
//! In: three instances, with Redis between them and with Postgres alone, and edits of a link that all of them have in memory.
//! Out: the time from the edit, or from the thaw, to the last old answer, as p99; of so few thaws that is all of them.
//! Never: warms a link again; tells the frozen one of its sleep.

use std::time::Duration;

use rustix::process::Signal;

use super::Fleet;
use crate::instances::{Onlookers, SOON, edit, figures, leads, redis_section, target};
use crate::servers::redis::Redis;
use crate::support::{Direct, throughout};

const EDITS: u32 = 210;
/// Each so many edits an instance is frozen, in turns.
const FROZEN_EACH: u32 = 3;
/// How long, at the least; and once in the middle, for less than a look-up may take that was under way.
const FROZEN: Duration = Duration::from_millis(20);
const FROZEN_LONG: Duration = Duration::from_millis(1500);
/// A machine that does other things may be late itself: one of so many tries is what the instances can do.
const TRIES: u32 = 3;

#[test]
fn edits_with_notify_alone() {
    check("notify alone", "");
}

#[test]
fn edits_with_redis() {
    let redis = Redis::start();
    check("with Redis", &redis_section(&redis));
}

#[track_caller]
fn check(what: &str, config: &str) {
    let fleet = Fleet::start(3, config);
    let store = fleet.deployment.store();
    let mut onlookers = Onlookers::of(&fleet.servers());
    store.add("code", &target(0), |_| {});
    onlookers.see(&[0, 1, 2], "code", &(404, None), &leads(0));
    let mut shown = Vec::new();
    for attempt in 0..TRIES {
        let (mut edited, mut thawed) = measure(&fleet, &store, &mut onlookers, attempt * EDITS);
        let (p99, _) = figures(&mut edited, what);
        let (thawed_p99, _) = figures(&mut thawed, &format!("{what}, after a thaw"));
        if p99.max(thawed_p99) <= SOON {
            return;
        }
        shown.push((p99, thawed_p99));
    }
    panic!("{what}: p99 of edits, and after a thaw: {shown:?}");
}

/// How long [`EDITS`] edits took to show where nobody slept, and on the frozen ones after their thaws. `last`: the version
/// that is shown.
fn measure(fleet: &Fleet, store: &Direct, onlookers: &mut Onlookers, last: u32) -> (Vec<Duration>, Vec<Duration>) {
    let (mut edited, mut thawed) = (Vec::new(), Vec::new());
    for version in last + 1..=last + EDITS {
        let (old, new) = (leads(version - 1), leads(version));
        if version % FROZEN_EACH > 0 {
            store.change("code", edit(version));
            edited.extend(onlookers.see(&[0, 1, 2], "code", &old, &new));
            continue;
        }
        let frozen = (version / FROZEN_EACH % 3) as usize;
        let others: Vec<usize> = (0..3).filter(|number| *number != frozen).collect();
        fleet.server(frozen).signal(Signal::STOP);
        store.change("code", edit(version));
        edited.extend(onlookers.see(&others, "code", &old, &new));
        throughout(if version == last + EDITS / 2 { FROZEN_LONG } else { FROZEN }, || {});
        fleet.server(frozen).signal(Signal::CONT);
        thawed.extend(onlookers.see(&[frozen], "code", &old, &new));
    }
    (edited, thawed)
}
