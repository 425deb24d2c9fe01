//! Instances that come and go under load: fewer and more of them, a machine that is gone, a folder that is copied.
//!
//! In: three instances, a load on each, and what happens to the instances meanwhile. Out: each visit once, and the accounts.
//! Never: asks an instance to be polite to another one; lets two processes have one folder.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use super::{CONFIG, Fleet, Member};
use crate::campaign::Load;
use crate::servers::port;
use crate::servers::postgres::psql;
use crate::support::{LIMIT, Server, eventually};

/// Requests a second on each instance.
const RATE: u32 = 100;
/// How long they come where every answer has to be waited for: longer than what happens takes, also on a machine that does
/// other things.
const SECONDS: u32 = 12;
/// How long they come where they are broken off.
const SECONDS_MAX: u32 = 120;

/// What happens to a fleet; a load stands where its instance does.
type Happens = fn(&mut Fleet, &mut Vec<Load>);

/// Whether an instance is killed meanwhile: then what was in flight may be stored and not received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ends {
    Stopped,
    Killed,
}

#[test]
fn from_three_to_one_and_back() {
    check("", Ends::Stopped, |fleet, loads| {
        [1, 2].into_iter().for_each(|number| fleet.stop(number));
        go_on(&mut loads[..1]);
        [2, 1].into_iter().for_each(|number| fleet.begin(number));
        go_on(loads);
    });
}

#[test]
fn half_the_workers_after_a_restart() {
    check("[workers]\ncount = 4\n", Ends::Killed, |fleet, loads| {
        fleet.deployment.reconfigure(&format!("{CONFIG}[workers]\ncount = 2\n"));
        for (number, end) in [Fleet::stop, Fleet::kill, killed_with_visits].into_iter().enumerate() {
            end(fleet, number);
            fleet.begin(number);
            go_on(loads);
        }
    });
}

#[test]
fn all_are_killed_at_once_and_come_back_in_another_order() {
    check("", Ends::Killed, |fleet, loads| {
        let all = [0, 1, 2].map(|number| fleet.take(number));
        all.into_iter().for_each(Server::kill);
        [2, 0, 1].into_iter().for_each(|number| fleet.begin(number));
        go_on(loads);
    });
}

/// Its disk is all that is left of it, and is read elsewhere; then it is back, with what its memory alone had.
#[test]
fn a_machine_that_is_gone_and_comes_back() {
    check("", Ends::Killed, |fleet, loads| {
        killed_with_visits(fleet, 0);
        let elsewhere = copy(fleet, 0);
        is_replayed(fleet, 0, &elsewhere);
        go_on(&mut loads[1..]);
        fleet.begin(0);
        go_on(loads);
    });
}

#[test]
fn a_machine_that_never_comes_back() {
    check("", Ends::Killed, |fleet, loads| {
        killed_with_visits(fleet, 0);
        is_replayed(fleet, 0, &fleet.data(0));
        go_on(&mut loads[1..]);
    });
}

/// Both have what waited when the folder was copied, and send it at once.
#[test]
fn a_copied_folder_beside_its_original() {
    check("", Ends::Killed, |fleet, loads| {
        killed_with_visits(fleet, 0);
        let copied = copy(fleet, 0).file_name().unwrap().to_str().unwrap().to_owned();
        fleet.members.push(Member { name: copied, port: port(), server: None });
        [3, 0].into_iter().for_each(|number| fleet.begin(number));
        loads.push(load(fleet, 3, Ends::Killed));
        go_on(loads);
    });
}

/// Three instances with `config` under load, of which nothing may be lost and nothing be there twice.
#[track_caller]
fn check(config: &str, ends: Ends, happens: Happens) {
    let mut fleet = Fleet::start(3, config);
    let mut loads: Vec<Load> = (0..3).map(|number| load(&fleet, number, ends)).collect();
    happens(&mut fleet, &mut loads);
    judge(&fleet, loads, ends);
}

#[track_caller]
pub(super) fn judge(fleet: &Fleet, loads: Vec<Load>, ends: Ends) {
    let end = if ends == Ends::Stopped { Load::ends } else { Load::stop };
    let ledgers: Vec<PathBuf> = loads.into_iter().map(end).collect();
    for judged in fleet.judge_all(&ledgers) {
        judged.right();
        if ends == Ends::Stopped {
            judged.nothing_in_flight();
        }
    }
}

pub(super) fn load(fleet: &Fleet, number: usize, ends: Ends) -> Load {
    let seconds = if ends == Ends::Stopped { SECONDS } else { SECONDS_MAX };
    let folder = fleet.deployment.path(&format!("load-{number}"));
    std::fs::create_dir(&folder).unwrap();
    let target = format!("http://127.0.0.1:{}", fleet.port(number));
    Load::begin(&folder, &target, &fleet.deployment.path("admin.key"), RATE, seconds)
}

/// Waits until each load has had answers for a while.
#[track_caller]
pub(super) fn go_on(loads: &mut [Load]) {
    let before: Vec<u64> = loads.iter().map(Load::sent).collect();
    eventually(LIMIT, "the loads go on", || {
        assert!(!loads.iter_mut().any(Load::has_ended), "a load has ended before what happens under it");
        loads.iter().zip(&before).all(|(load, before)| load.sent() > before + u64::from(RATE) / 2)
    });
}

/// Kills an instance whose visits of the last moment are in its spool alone: nobody could store any.
pub(super) fn killed_with_visits(fleet: &mut Fleet, number: usize) {
    let url = fleet.deployment.database.owner_url();
    let locked = "BEGIN; LOCK TABLE visits IN SHARE MODE; SELECT pg_sleep(1.5); COMMIT";
    std::thread::scope(|scope| {
        scope.spawn(|| psql(&url, locked));
        let waiting = || fleet.server(number).metric("waypost_visits_pending", &[]);
        eventually(LIMIT, "visits wait", || waiting() > 0.5 * f64::from(RATE));
        fleet.kill(number);
    });
}

/// The data folder of an instance on another machine, which has neither its memory nor its folder's inodes.
fn copy(fleet: &Fleet, number: usize) -> PathBuf {
    let copied = fleet.deployment.path("copied");
    let copy = Command::new("cp").arg("-a").arg(fleet.data(number)).arg(&copied).status().unwrap();
    assert!(copy.success());
    copied
}

/// Replays a data folder of an instance that does not run, twice, from a machine that is none of the fleet; the others say
/// of the instance, by its name, that it has answered and stored as many more, and that nothing of it is pending.
#[track_caller]
fn is_replayed(fleet: &Fleet, number: usize, data: &Path) {
    let name = std::fs::read_to_string(fleet.data(number).join("instance")).unwrap();
    let before = account(fleet.server(number + 1), name.trim());
    let stored = [(); 2].map(|()| {
        let mut replay = fleet.deployment.command(&["spool", "replay", "--json"]);
        replay.arg(data.join("spool")).arg("--data").arg(fleet.deployment.path("elsewhere"));
        let Output { status, stdout, stderr } = replay.output().unwrap();
        assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
        serde_json::from_slice::<Value>(&stdout).unwrap()["stored"].as_u64().unwrap()
    });
    assert!(stored[0] > 0 && stored[1] == 0, "{stored:?}");
    let after = account(fleet.server(number + 1), name.trim());
    let [(answered, had), (then, has)] = [before, after];
    assert_eq!((then - answered, has - had), (stored[0], stored[0]), "{before:?} {after:?}");
}

/// Answered and stored of an instance, as `server` says it; nothing is pending or dropped.
#[track_caller]
fn account(server: &Server, instance: &str) -> (u64, u64) {
    let bearer = format!("Bearer {}", server.admin_key());
    let answer = server.connect().ask("GET", "/api/v1/accounting", &[("Authorization", &bearer)], b"").json();
    let account = &answer["instances"][instance];
    let figure = |name: &str| account[name].as_u64().unwrap_or_else(|| panic!("no {name} of {instance}: {answer}"));
    assert_eq!(figure("pending"), 0, "{answer}");
    (figure("answered"), figure("stored"))
}
