//! The previous version beside this one: on one schema, one Redis, and one after the other on one data folder.
//!
//! In: the program of the previous version, which `script/previous` builds from the history at first use. Out: what either
//! writes, the other reads, or refuses by name; each visit once.
//! Never: passes silently where there is no history to build from.
//! At the limit: a build that has not ended within [`BUILD`] fails the test.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use waypost::store::postgres::MIGRATIONS;

use super::coming::{Ends, go_on, judge, killed_with_visits, load};
use super::{CONFIG, Fleet, Member};
use crate::campaign::Load;
use crate::instances::{redis_section, target};
use crate::servers::deployment::{Deployment, WAYPOST, Way};
use crate::servers::port;
use crate::servers::postgres::{Postgres, psql};
use crate::servers::redis::Redis;
use crate::support::{Answer, LIMIT, Server, eventually, left_out};

/// Of one crate, the others' artifacts being there, on a machine that does other things.
const BUILD: Duration = Duration::from_secs(600);

/// The program of the previous version; none, loudly, where it cannot be built for want of history.
fn previous() -> Option<&'static Path> {
    static PREVIOUS: OnceLock<Option<PathBuf>> = OnceLock::new();
    let build = || {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut script = Command::new(root.join("script/previous"));
        // Where cargo has built us: DIR/debug/waypost.
        script.env("CARGO_TARGET_DIR", Path::new(WAYPOST).ancestors().nth(2).unwrap());
        let mut child = script.stdout(Stdio::piped()).spawn().unwrap();
        eventually(BUILD, "script/previous ends", || child.try_wait().unwrap().is_some());
        let output = child.wait_with_output().unwrap();
        match output.status.code() {
            Some(0) => Some(PathBuf::from(String::from_utf8(output.stdout).unwrap().trim_end())),
            Some(3) => None,
            other => panic!("script/previous: {other:?}"),
        }
    };
    let program = PREVIOUS.get_or_init(build).as_deref();
    if program.is_none() {
        left_out("there is no history to build the previous version from: git fetch --unshallow --tags");
    }
    program
}

#[expect(clippy::print_stdout, reason = "what was not tested, and why, is for people")]
fn said(what: &str) {
    println!("{what}");
}

/// Instances of the previous version on a store that it made.
fn fleet_of(program: &Path, postgres: &Postgres, config: &str) -> Fleet {
    let deployment = Deployment::made_by(program, postgres, Way::Straight, &format!("{CONFIG}{config}"));
    let member = |number| Member { name: format!("instance-{number}"), port: port(), server: None };
    let mut fleet = Fleet { deployment, members: (0..3).map(member).collect() };
    (0..3).for_each(|number| begin(&mut fleet, number, program));
    fleet
}

/// Starts an instance that does not run, by this version of the program.
fn begin(fleet: &mut Fleet, number: usize, program: &Path) {
    let member = &mut fleet.members[number];
    let (command, data) = fleet.deployment.serve(program, &member.name, member.port);
    member.server = Some(Server::spawn(command, &data));
}

/// Whether this version of the program starts on the schema.
fn accepts(fleet: &Fleet, program: &Path) -> bool {
    fleet.deployment.command_of(program, &["migrate", "--status"]).output().unwrap().status.success()
}

/// What an instance says that does not start on the schema. None: it does.
fn refusal(fleet: &Fleet, number: usize, program: &Path) -> Option<String> {
    if accepts(fleet, program) {
        return None;
    }
    let member = &fleet.members[number];
    let (mut serve, _) = fleet.deployment.serve(program, &member.name, member.port);
    let refused = serve.stdout(Stdio::null()).output().unwrap();
    assert!(!refused.status.success());
    Some(String::from_utf8(refused.stderr).unwrap())
}

#[test]
fn instances_are_upgraded_one_by_one_and_one_goes_back() {
    let Some(old) = previous() else { return };
    let (new, redis) = (Path::new(WAYPOST), Redis::start());
    let mut fleet = fleet_of(old, Postgres::shared(), &redis_section(&redis));
    let mut loads: Vec<Load> = (0..3).map(|number| load(&fleet, number, Ends::Killed)).collect();

    fleet.stop(0);
    begin(&mut fleet, 0, new);
    go_on(&mut loads);
    understand(&fleet, 0, 1, new);
    let commands = if accepts(&fleet, old) { old } else { new };
    understand(&fleet, 1, 0, commands);
    // What a kill leaves of either in rings and log, the other takes over.
    killed_with_visits(&mut fleet, 1);
    begin(&mut fleet, 1, new);
    killed_with_visits(&mut fleet, 0);
    let spool = fleet.data(0).join("spool");
    let [by_old, by_new] = [old, new].map(|program| {
        let mut status = fleet.deployment.command_of(program, &["spool", "status", "--json"]);
        let output = status.arg(&spool).output().unwrap();
        if output.status.success() { output.stdout } else { output.stderr }
    });
    assert!(by_old == by_new || String::from_utf8_lossy(&by_old).contains("version"), "{by_old:?} {by_new:?}");
    match refusal(&fleet, 0, old) {
        Some(why) => {
            assert!(why.contains("it was made by a newer waypost"), "{why}");
            said("the previous version starts on no newer schema, and says so");
            begin(&mut fleet, 0, new);
        }
        None => begin(&mut fleet, 0, old),
    }
    go_on(&mut loads);
    judge(&fleet, loads, Ends::Killed);
}

/// What `writer` and the command line of its `program` make, with whatever they leave in Redis, `reader` answers as `writer`
/// does; also after an edit.
#[track_caller]
fn understand(fleet: &Fleet, writer: usize, reader: usize, program: &Path) {
    let [written, read] = [writer, reader].map(|number| fleet.server(number));
    // Of another format, and skipped, or believed.
    let met = ["garbage", "hit"].map(|outcome| format!("outcome=\"{outcome}\""));
    let met = || met.each_ref().map(|outcome| read.metric("waypost_redis_reads_total", &[outcome]));
    let before = met();
    let made = written.link(&target(1));
    check_link(fleet, (written, read), program, &made);
    let rules: [&[&str]; 4] = [
        &["--status", "301", "--title", "moved"],
        &["--cache-control", "no-store", "--tag", "spring"],
        &["--starts", "2020-01-01", "--expires", "2999-01-01", "--expired-url", "https://example.com/over"],
        &["--forward-query", "true"],
    ];
    for (number, rules) in rules.into_iter().enumerate() {
        let code = format!("by-{writer}-{number}");
        fleet.deployment.cli(program, &[&["link", "add", &target(1), "--code", &code], rules].concat());
        check_link(fleet, (written, read), program, &code);
    }
    let after = met();
    said(&format!("instance {reader} met in Redis, foreign and understood: {after:?}, before: {before:?}"));
    assert!(after > before, "nothing of the other version was in Redis");
    // Both take from what is left; what one of them has leased and does not use, it gives back.
    let code = format!("by-{writer}-limited");
    fleet.deployment.cli(program, &["link", "add", &target(1), "--code", &code, "--max-visits", "6"]);
    let found = || [written, read].iter().filter(|server| server.get(&format!("/{code}")).status == 307).count();
    let mut visits = 0;
    eventually(LIMIT, &format!("all visits of {code}"), || {
        visits += found();
        visits >= 6
    });
    let more: usize = (0..10).map(|_| found()).sum();
    assert_eq!((visits, more), (6, 0), "{code}");
}

#[track_caller]
fn check_link(fleet: &Fleet, (written, read): (&Server, &Server), program: &Path, code: &str) {
    let path = format!("/{code}?a=b");
    let answer = |server: &Server| {
        let Answer { status, headers, .. } = server.get(&path);
        (status, headers.into_iter().filter(|(name, _)| name != "date").collect::<Vec<_>>())
    };
    let leads = |version: u32| {
        let leads = |server: &Server| server.get(&path).location().is_some_and(|to| to.starts_with(&target(version)));
        eventually(LIMIT, &format!("{code} leads to {version} on both"), || leads(written) && leads(read));
        assert_eq!(answer(written), answer(read));
    };
    leads(1);
    fleet.deployment.cli(program, &["link", "edit", code, "--url", &target(2)]);
    leads(2);
}

/// Each starts on what the other remembered of the links that were asked for most, while there is no store.
#[test]
fn a_start_without_stores_on_what_the_other_version_remembered() {
    let Some(old) = previous() else { return };
    let new = Path::new(WAYPOST);
    let mut postgres = Postgres::own();
    let mut fleet = fleet_of(old, &postgres, "");
    let code = fleet.server(0).warm(&target(1));
    fleet.stop(2);
    fleet.stop(1);
    for (before, after) in [(old, new), (new, old)] {
        fleet.stop(0);
        postgres.stop();
        begin(&mut fleet, 0, after);
        let answer = fleet.server(0).get(&format!("/{code}"));
        assert_eq!((answer.status, answer.location()), (307, Some(&*target(1))), "{before:?} {after:?}");
        postgres.start();
        eventually(LIMIT, "the store is there", || fleet.server(0).get("/readyz?require=store").status == 200);
        (0..5).for_each(|_| assert_eq!(fleet.server(0).get(&format!("/{code}")).status, 307));
    }
}

/// What the next version of this program will do to the schema while this one runs, and starts again.
#[test]
fn a_schema_that_a_later_version_has_added_to() {
    let (mut fleet, known) = (Fleet::start(1, ""), MIGRATIONS.len());
    let url = fleet.deployment.database.owner_url();
    psql(
        &url,
        "DO $$ DECLARE name text; BEGIN
           FOR name IN SELECT c.relname FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace
             AND c.relkind IN ('r', 'p') AND NOT c.relispartition
           LOOP EXECUTE format('ALTER TABLE %I ADD COLUMN later text NOT NULL DEFAULT ''new''', name); END LOOP;
         END $$",
    );
    let later = |number: usize, from: usize| {
        let row = format!("({number}, 'later', 'unknown', {from})");
        psql(&url, &format!("INSERT INTO schema_migrations (number, name, checksum, compatible_from) VALUES {row}"));
    };
    later(known + 1, known);
    let mut load = fleet.load(fleet.port(0), 100, 60);
    fleet.stop(0);
    fleet.begin(0);
    go_on(std::slice::from_mut(&mut load));
    fleet.judge(&load.stop()).right();
    // What was left in place for older programs goes.
    later(known + 2, known + 1);
    fleet.stop(0);
    let why = refusal(&fleet, 0, Path::new(WAYPOST)).expect("it is refused");
    assert!(why.contains("it was made by a newer waypost"), "{why}");
}
