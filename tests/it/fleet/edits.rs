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
use crate::support::throughout;

const EDITS: u32 = 210;
/// Each so many edits an instance is frozen, in turns.
const FROZEN_EACH: u32 = 3;
/// How long, at the least; and once in the middle.
const FROZEN: Duration = Duration::from_millis(20);
const FROZEN_LONG: Duration = Duration::from_secs(2);

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
    let (mut edited, mut thawed) = (Vec::new(), Vec::new());
    for version in 1..=EDITS {
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
        throughout(if version == EDITS / 2 { FROZEN_LONG } else { FROZEN }, || {});
        fleet.server(frozen).signal(Signal::CONT);
        thawed.extend(onlookers.see(&[frozen], "code", &old, &new));
    }
    for (what, took) in [(what.to_owned(), &mut edited), (format!("{what}, after a thaw"), &mut thawed)] {
        let (p99, _) = figures(took, &what);
        assert!(p99 <= SOON, "{what}: p99 {p99:?}");
    }
}
