//! `waypost warm`, `pin` and `unpin`: what they ask of instances, what these say, what is refused; and a real server.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;
use waypost::domain::key::{Case, Code, DomainId, Key};
use waypost::domain::target::Target;
use waypost::domain::time::{self, UnixMillis};
use waypost::store::row::{Change, Patch, WarmReport, WarmWhat};
use waypost::store::sqlite::Sqlite;
use waypost::store::{self, Store};

use super::support::{Direct, LIMIT, Setup, clean, eventually, key, rings};

/// A folder with a configuration and an embedded store, whatever store the other tests use.
pub(super) struct Place {
    folder: TempDir,
    rings: TempDir,
}

#[derive(Debug)]
pub(super) struct Ended {
    pub(super) code: Option<i32>,
    pub(super) out: String,
    pub(super) err: String,
}

impl Place {
    pub(super) fn new(config: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("waypost.toml"), config).unwrap();
        Self { folder, rings: rings() }
    }

    pub(super) fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    pub(super) fn rings(&self) -> &Path {
        self.rings.path()
    }

    pub(super) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_waypost"));
        clean(&mut command);
        command.args(arguments).current_dir(self.folder.path()).env("WAYPOST_DATA", self.data());
        command.env("WAYPOST_SPOOL__RING", self.rings.path());
        command
    }

    pub(super) fn spawn(&self, arguments: &[&str]) -> Child {
        let mut command = self.command(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    pub(super) fn run(&self, arguments: &[&str]) -> Ended {
        ended(self.spawn(arguments))
    }

    #[track_caller]
    pub(super) fn ok(&self, arguments: &[&str]) -> String {
        let ended = self.run(arguments);
        assert_eq!(ended.code, Some(0), "{arguments:?}: {ended:?}");
        ended.out
    }

    #[track_caller]
    pub(super) fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[arguments, &["--json"]].concat())).unwrap()
    }

    /// The exit code, and what stands in stderr.
    #[track_caller]
    pub(super) fn check(&self, arguments: &[&str], code: i32, want: &[&str]) {
        let ended = self.run(arguments);
        assert_eq!(ended.code, Some(code), "{arguments:?}: {ended:?}");
        for want in want {
            assert!(ended.err.contains(want), "{arguments:?}: {want:?} is not in {}", ended.err);
        }
    }
}

fn ended(child: Child) -> Ended {
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().trim_end().to_owned();
    Ended { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

/// An embedded store, from this process.
pub(super) fn open(data: &Path) -> Store {
    Store::Sqlite(Sqlite::open(&data.join("waypost.db")).unwrap())
}

pub(super) fn ask<T>(question: impl Future<Output = store::Result<T>>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(question).unwrap()
}

fn with_links() -> Place {
    let place = Place::new("[[domains]]\nhost = \"other.test\"\n");
    place.ok(&["migrate"]);
    for (code, domain) in [("a", ""), ("b", ""), ("c", "other.test"), ("gone", "")] {
        place.ok(&["link", "add", "https://a.test/", "--code", code, "--domain", domain, "--tag", "t"]);
    }
    place.ok(&["link", "rm", "gone"]);
    place
}

fn says(store: &Store, number: u64, instance: &str, loaded: u64, missing: u64) {
    let report = WarmReport { instance: instance.to_owned(), loaded, missing };
    ask(store.report_warm(number, report, time::now()));
}

#[test]
fn what_instances_are_asked_and_what_they_say() {
    let place = with_links();
    let store = open(&place.data());
    let other = ask(store.domains()).into_iter().find(|(_, host)| host == "other.test").unwrap().0;
    for instance in ["one", "two"] {
        ask(store.present(instance.to_owned(), true, time::now()));
    }
    // Who has ended, and who was killed long ago, is not waited for.
    ask(store.present("ended".to_owned(), true, time::now()));
    ask(store.present("ended".to_owned(), false, time::now()));
    ask(store.present("killed".to_owned(), true, UnixMillis(time::now().0 - 91_000)));
    let code = |domain: DomainId, code: &str| (domain.0, code.to_owned());
    let zero = DomainId(0);
    for (arguments, what) in [
        (&["a", "b", "a"][..], WarmWhat::Codes(vec![code(zero, "a"), code(zero, "b")])),
        (&["c", "--domain", "other.test"], WarmWhat::Codes(vec![code(other, "c")])),
        (&["--tag", "t"], WarmWhat::Tag("t".to_owned())),
        (&["--top", "7"], WarmWhat::Top(7)),
    ] {
        let asked = ask(store.position()).asked;
        let child = place.spawn(&[&["warm"], arguments].concat());
        eventually(LIMIT, "it asks", || !ask(store.warm_requests(asked)).is_empty());
        let requests = ask(store.warm_requests(asked));
        assert_eq!(requests.iter().map(|request| request.what.clone()).collect::<Vec<_>>(), [what]);
        says(&store, requests[0].number, "two", 1_000, 0);
        says(&store, requests[0].number, "one", 2, 1);
        let ended = ended(child);
        assert_eq!(ended.code, Some(0), "{arguments:?}: {ended:?}");
        assert_eq!(ended.out, "one  loaded 2, missing 1\ntwo  loaded 1,000, missing 0");
    }

    let asked = ask(store.position()).asked;
    let child = place.spawn(&["warm", "a", "nothing", "gone", "--timeout", "1s", "--json"]);
    eventually(LIMIT, "it asks", || !ask(store.warm_requests(asked)).is_empty());
    says(&store, ask(store.warm_requests(asked))[0].number, "one", 1, 2);
    let ended = ended(child);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("1 of 2 instances did not answer within 1s"), "{}", ended.err);
    assert!(ended.err.contains("there is no link nothing, gone"), "{}", ended.err);
    let want = json!({"instances": [
        {"instance": "one", "answered": true, "loaded": 1, "missing": 2},
        {"instance": "two", "answered": false, "loaded": null, "missing": null},
    ]});
    assert_eq!(serde_json::from_str::<Value>(&ended.out).unwrap(), want);
    assert!(place.run(&["warm", "a", "--timeout", "1ms"]).out.contains("one  no answer\ntwo  no answer"));
}

#[test]
fn nobody_is_asked_when_no_instance_runs() {
    let place = with_links();
    assert_eq!(place.ok(&["warm", "--top", "5"]), "no instance runs");
    assert_eq!(place.json(&["warm", "a"]), json!({"instances": []}));
    place.check(&["warm", "a", "nothing"], 1, &["there is no link nothing"]);
    assert_eq!(ask(open(&place.data()).position()).asked, 0);
}

#[test]
fn what_cannot_be_meant() {
    let place = with_links();
    for (arguments, code, want) in [
        (&["warm"][..], 2, "--top"),
        (&["warm", "a", "--top", "3"], 2, "--top"),
        (&["warm", "--tag", "t", "--top", "3"], 2, "--top"),
        (&["warm", "--top", "0"], 2, "--top"),
        (&["warm", "--tag", "t", "--domain", "other.test"], 2, "--domain"),
        (&["warm", "a", "--timeout", "5"], 2, "has no unit"),
        (&["warm", "a/b"], 1, "\"a/b\" is not"),
        (&["warm", "a", "--domain", "none.test"], 1, "none.test"),
        (&["pin"], 2, "CODE"),
        (&["unpin"], 2, "CODE"),
    ] {
        place.check(arguments, code, &[want]);
    }
}

#[test]
fn pins() {
    let place = with_links();
    assert_eq!(place.ok(&["pin", "a", "b", "a"]), "pinned 2, 0 pinned before, 2 pins in all");
    assert_eq!(place.ok(&["pin", "b"]), "pinned 0, 1 pinned before, 2 pins in all");
    assert_eq!(place.json(&["pin", "c", "--domain", "other.test"]), json!({"pinned": 1, "unchanged": 0, "pins": 3}));
    for action in ["pin", "unpin"] {
        place.check(&[action, "a", "nothing", "gone"], 1, &["there is no link nothing, gone"]);
    }
    let store = open(&place.data());
    assert_eq!(ask(store.pins()).len(), 3);
    // One that is deleted leaves like any other.
    place.ok(&["link", "rm", "b"]);
    assert_eq!(place.ok(&["unpin", "b"]), "unpinned 1, 0 not pinned, 2 pins in all");
    place.check(&["pin", "b"], 1, &["there is no link b"]);
    place.ok(&["link", "add", "https://d.test/", "--code", "d"]);
    assert_eq!(place.json(&["unpin", "d"]), json!({"unpinned": 0, "unchanged": 1, "pins": 2}));

    let key = |code: &str| Key { domain: DomainId(0), code: Code::parse(code.as_bytes(), Case::Sensitive).unwrap() };
    let many = (2..10_000).map(|number| key(&format!("x{number}"))).collect();
    ask(store.pin(many, true, time::now()));
    place.check(&["pin", "d"], 1, &["10000 links are pinned and 1 more", "at most 10000", "waypost unpin"]);
    assert_eq!(place.ok(&["pin", "a"]), "pinned 0, 1 pinned before, 10,000 pins in all");
    place.ok(&["unpin", "a"]);
    assert_eq!(place.ok(&["pin", "d"]), "pinned 1, 0 pinned before, 10,000 pins in all");
}

#[test]
fn a_server_loads_what_it_is_asked_for() {
    let setup = Setup::new("");
    let server = setup.start();
    for code in ["a", "b"] {
        server.custom(code, "https://a.test/");
    }
    let said = |arguments: &[&str]| {
        let output = setup.run(&[arguments, &["--json"]].concat());
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        let value: Value = serde_json::from_slice(&output.stdout).unwrap();
        let instances = value["instances"].as_array().unwrap().clone();
        instances.iter().map(|instance| (instance["loaded"].clone(), instance["missing"].clone())).collect::<Vec<_>>()
    };
    eventually(LIMIT, "it is there", || !said(&["warm", "a"]).is_empty());
    assert_eq!(said(&["warm", "a", "b"]), [(json!(2), json!(0))]);
    assert_eq!(said(&["warm", "--top", "10"]), [(json!(2), json!(0))]);
    // It says that it ends.
    server.stop();
    assert_eq!(said(&["warm", "a"]), []);

    // What is pinned is there from the start on, and the first request after it is heard.
    assert!(setup.run(&["pin", "a"]).status.success());
    std::fs::remove_file(setup.data().join("warm")).unwrap();
    let server = setup.start();
    eventually(LIMIT, "the pinned link is in memory", || server.metric("waypost_cache_links", &[]) > 0.0);
    assert_eq!(said(&["warm", "b"]), [(json!(1), json!(0))]);
}

/// What another process changes while no server runs is known to the one that starts, however much it is.
#[test]
fn a_start_with_old_links_serves_none_of_them() {
    let setup = Setup::new("");
    let server = setup.start();
    server.custom("old", "https://old.test/");
    assert_eq!(server.get("/old").status, 307);
    server.stop();
    let direct = setup.store();
    let fields = || Direct::fields("https://a.test/");
    for batch in 0..20 {
        let name = |number: i32| key(DomainId(0), &format!("n{batch}-{number}"));
        direct.add_all((0..2000).map(|number| (name(number), fields())).collect());
    }
    let target = Target::new("https://new.test/").unwrap();
    let patch = Patch { target: Some((target.as_str().to_owned(), target)), ..Patch::default() };
    direct.change("old", Change::Edit(Box::new(patch)));
    let server = setup.start();
    assert_eq!(server.get("/old").location(), Some("https://new.test/"));
    assert_eq!(server.metric("waypost_degraded", &[]), 0.0);
}
