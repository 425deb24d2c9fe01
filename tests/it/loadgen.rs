//! loadgen against waypost: both programs as a person starts them, each run in the folder of a server of its own.
//!
//! In: the scenarios that come with loadgen, scaled down to seconds. Out: the same requests counted twice, by loadgen
//! (`run.json`, the ledger) and by waypost (metrics, exports).
//! Never: asks how fast anything was. These are debug builds on a busy machine, of which loadgen itself says that their
//! measurement is invalid.
//! At the limit: a run that has not ended within [`RUN`] fails its test and is killed.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read, Seek};
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::servers::deployment::{Deployment, Way};
use crate::servers::postgres::Postgres;
use crate::support::{LIMIT, Server, Setup, eventually};

/// The longest that a run of a few seconds takes on a machine that does other things.
const RUN: Duration = Duration::from_secs(120);

/// `mail-blast` in five seconds, with as many creates and fresh links as there are otherwise in a minute.
const MAIL_BLAST: &str = "peak=200 warmup=1s links.existing.count=200 phase.1.for=1s phase.2.for=1s phase.3.for=1s \
                          phase.4.for=1s phase.2.mix.create=20 phase.2.mix.readback=20";

/// The program. `cargo test` without `--workspace` builds none of another package, so what is older than its sources is
/// built first.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let program = Path::new(env!("CARGO_BIN_EXE_waypost")).with_file_name("loadgen");
        if !is_fresh(&program) {
            let folder = program.parent().unwrap();
            let profile = match folder.file_name().unwrap().to_str().unwrap() {
                "debug" => "dev",
                other => other,
            };
            let mut cargo = Command::new(env!("CARGO"));
            cargo.args(["build", "--quiet", "--package", "loadgen", "--profile", profile, "--target-dir"]);
            let built = cargo.arg(folder.parent().unwrap()).current_dir(env!("CARGO_MANIFEST_DIR")).status().unwrap();
            assert!(built.success(), "loadgen cannot be built");
        }
        program
    })
}

/// Whether the program is there and none of its sources, which cargo lists beside it, is newer.
fn is_fresh(program: &Path) -> bool {
    let changed = |path: &Path| -> Option<SystemTime> { fs::metadata(path).ok()?.modified().ok() };
    let (Some(built), Ok(list)) = (changed(program), fs::read_to_string(program.with_extension("d"))) else {
        return false;
    };
    list.split_whitespace().skip(1).all(|source| changed(Path::new(source)).is_some_and(|changed| changed <= built))
}

/// A running loadgen; killed when dropped.
pub(super) struct Running {
    child: Child,
    out: File,
    err: File,
    report: PathBuf,
}

/// What it came to.
#[derive(Debug)]
pub(super) struct Ran {
    /// None: a signal ended it.
    pub(super) code: Option<i32>,
    pub(super) out: String,
    pub(super) err: String,
    /// `run.json`; null if it wrote none.
    report: Value,
}

/// Starts loadgen in a folder.
pub(super) fn start<'a>(folder: &Path, arguments: impl IntoIterator<Item = &'a str>) -> Running {
    let (out, err) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let report = folder.join("run.json");
    let _ = fs::remove_file(&report);
    let mut command = Command::new(program());
    command.args(arguments).current_dir(folder).stdin(Stdio::null());
    command.stdout(out.try_clone().unwrap()).stderr(err.try_clone().unwrap());
    Running { child: command.spawn().unwrap(), out, err, report }
}

impl Running {
    pub(super) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub(super) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub(super) fn ends(mut self) -> Ran {
        eventually(RUN, "loadgen ends", || self.has_ended());
        let read = |mut file: &File| {
            let mut text = String::new();
            file.rewind().unwrap();
            file.read_to_string(&mut text).unwrap();
            text
        };
        let report = fs::read(&self.report).map_or(Value::Null, |text| serde_json::from_slice(&text).unwrap());
        Ran { code: self.child.wait().unwrap().code(), out: read(&self.out), err: read(&self.err), report }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ran {
    /// It came to its end, and everything was answered as it should be. That the measurement is invalid (3), or an SLO of
    /// times not kept (99), is no wonder here; see above.
    #[track_caller]
    fn went_well(&self) {
        assert!(matches!(self.code, Some(0 | 3 | 99)), "{self:#?}");
        assert_eq!(self.failures(), 0, "{self:#?}");
    }

    /// The requests that were not answered as they should be, warm-up apart.
    #[track_caller]
    pub(super) fn failures(&self) -> u64 {
        // Before the first link is created there is none to read back.
        self.outcomes().into_iter().filter(|(name, _)| !["ok", "no_code"].contains(name)).map(|(_, n)| n).sum()
    }

    /// How its requests ended, warm-up apart; each that was planned is among them.
    #[track_caller]
    fn outcomes(&self) -> Vec<(&str, u64)> {
        let all = &self.report["whole"]["all"];
        let outcomes = all["outcomes"].as_object().unwrap_or_else(|| panic!("no report: {self:#?}"));
        let outcomes: Vec<_> = outcomes.iter().map(|(name, count)| (name.as_str(), count.as_u64().unwrap())).collect();
        assert_eq!(all["planned"].as_u64(), Some(outcomes.iter().map(|(_, count)| count).sum()), "{self:#?}");
        outcomes
    }

    /// The requests of a class that ended in `outcome`, warm-up apart.
    fn ended(&self, class: &str, outcome: &str) -> u64 {
        self.report["whole"]["traffic"][class]["outcomes"][outcome].as_u64().unwrap_or(0)
    }
}

/// The arguments of `run`. `changes` are separated by blanks.
pub(super) fn run<'a>(scenario: &'a str, target: &'a str, changes: &'a str) -> Vec<&'a str> {
    let mut arguments = vec!["run", scenario, "--target", target, "--json", "run.json"];
    changes.split_whitespace().for_each(|change| arguments.extend(["--set", change]));
    arguments
}

fn url(server: &Server) -> String {
    format!("http://{}", server.address())
}

/// A server whose folder is as that of one that was started without any flag.
fn serve() -> (Setup, Server) {
    let (setup, server) = Server::new("");
    symlink("data", setup.path("waypost-data")).unwrap();
    (setup, server)
}

/// loadgen in the server's folder, to its end.
fn load(setup: &Setup, arguments: &[&str]) -> Ran {
    start(&setup.path(""), arguments.iter().copied()).ends()
}

#[test]
fn every_click_is_counted_and_judged() {
    let (setup, server) = serve();
    let link = format!("{}/{}", url(&server), server.link("https://example.com/"));
    let mut clicks = 0.0;
    let mut check = |status: &str, location: &str, outcome: &str| {
        let load_by = ["http", &link, "-R", "500", "-d", "1s", "--json", "run.json", "--expect", status];
        let ran = load(&setup, &[&load_by[..], &["--location", location]].concat());
        assert_eq!(ran.outcomes(), [(outcome, 500)], "{ran:#?}");
        assert_eq!(ran.report["whole"]["all"]["sent"], json!(500), "{ran:#?}");
        clicks += 500.0;
        assert_eq!(server.metric("waypost_redirects_total", &[]), clicks);
        assert_eq!(server.metric("waypost_redirects_total", &["status=\"307\""]), clicks);
    };
    check("307", "https://example.com/", "ok");
    check("307", "https://example.com/other", "wrong_location");
    check("302", "https://example.com/", "wrong_status");
}

#[test]
fn mail_blast_needs_one_command() {
    let (ran, server) = check_preset("mail-blast", MAIL_BLAST, 201);
    assert!(ran.ended("create", "ok") > 0 && ran.ended("readback", "ok") > 0, "{ran:#?}");
    let has_statistics = server.get("/stats/spring26").status != 404;
    let skipped: Vec<&Value> =
        ran.report["skipped"].as_array().unwrap().iter().map(|class| &class["traffic"]).collect();
    assert_eq!(json!(skipped), if has_statistics { json!([]) } else { json!(["stats"]) }, "{ran:#?}");
    assert_eq!(ran.err.contains("stats: left out: GET /stats/"), !has_statistics, "{ran:#?}");
}

#[test]
fn tv_spot_needs_one_command() {
    let spot = "phase.2.for=2s phase.2.points.2=[\"1s\",\"peak\"] phase.2.points.3=[\"2s\",\"peak\"]";
    let changes = format!("peak=200 warmup=1s links.existing.count=100 phase.1.for=1s phase.3.for=1s {spot}");
    check_preset("tv-spot", &changes, 101);
}

#[test]
fn cold_start_needs_one_command() {
    check_preset("cold-start", "peak=200 links.hot.count=20 links.cold.count=100 phase.1.for=1s phase.2.for=1s", 120);
}

/// A preset against a server that has just been made, and once more against the same.
fn check_preset(name: &str, changes: &str, links: u64) -> (Ran, Server) {
    let (setup, server) = serve();
    let target = url(&server);
    let check = |seeded: &str| {
        let ran = load(&setup, &run(name, &target, changes));
        ran.went_well();
        assert!(ran.err.contains(seeded), "{seeded}: {ran:#?}");
        ran
    };
    let ran = check(&format!("links: {links} created, 0 there already"));
    check(&format!("links: 0 created, {links} there already"));
    (ran, server)
}

#[test]
fn a_store_that_stops() {
    let postgres = Postgres::own();
    let pid = postgres.sql("SELECT pg_read_file('postmaster.pid')").lines().next().unwrap().to_owned();
    let deployment = Deployment::on(&postgres, Way::Straight, "");
    let server = deployment.instance("one");
    let (folder, target) = (tempfile::tempdir().unwrap(), url(&server));
    fs::write(folder.path().join("key"), server.admin_key()).unwrap();
    // So few links that each of them has been asked for before the store stops.
    let changes = "peak=400 warmup=2s links.warm.count=10 phase.1.for=5s event.1.at=3s event.1.lasts=2s";
    let mut arguments = run("store-outage", &target, changes);
    arguments.extend(["--key-file", "key"]);

    let refused = start(folder.path(), arguments.clone()).ends();
    assert_eq!(refused.code, Some(2), "{refused:#?}");
    assert!(refused.err.contains("store-outage needs --postgres-pid PID"), "{refused:#?}");

    arguments.extend(["--postgres-pid", &pid]);
    let stopped = || family(&pid).into_iter().filter(|state| state == "T").count();
    let stops = || {
        let running = start(folder.path(), arguments.clone());
        eventually(RUN, "the store is stopped", || stopped() > 0);
        running
    };
    let ran = stops().ends();
    ran.went_well();
    assert_eq!(stopped(), 0, "{ran:#?}");
    let event = &ran.report["events"][0];
    assert!(event["begun_ns"].is_u64() && event["ended_ns"].is_u64() && event["error"].is_null(), "{ran:#?}");
    assert_eq!(postgres.sql("SELECT 1"), "1");

    // Nor does it stay stopped when loadgen has no chance to say so.
    let killed = stops();
    killed.signal(Signal::KILL);
    assert_eq!(killed.ends().code, None);
    eventually(LIMIT, "the store goes on", || stopped() == 0);
    assert_eq!(postgres.sql("SELECT 1"), "1");
}

/// The states of a process and its children (proc_pid_stat(5)).
fn family(pid: &str) -> Vec<String> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    // One of them may end meanwhile.
    let state =
        |pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok()?.rsplit_once(") ")?.1.get(..1).map(str::to_owned);
    std::iter::once(pid).chain(children.split_whitespace()).filter_map(state).collect()
}

/// A server that takes over the ids of the requests of [`MAIL_BLAST`]: after it was asked which lines it lacks for that.
fn serve_trusting() -> (Setup, Server) {
    let (setup, server) = serve();
    let refused = load(&setup, &recorded(&url(&server)));
    assert_eq!(refused.code, Some(2), "{refused:#?}");
    assert!(!setup.path(LEDGER).exists());
    let (sentence, lines) = refused.err.split_once("\n\n").unwrap_or_else(|| panic!("no lines: {refused:#?}"));
    assert!(sentence.ends_with("it believes them from peers that its configuration trusts:"), "{refused:#?}");
    server.stop();
    setup.configure(lines);
    let server = setup.start();
    (setup, server)
}

const LEDGER: &str = "run.ledger";

fn recorded(target: &str) -> Vec<&str> {
    let mut arguments = run("mail-blast", target, MAIL_BLAST);
    arguments.extend(["--ledger", LEDGER]);
    arguments
}

/// The lines of a kind of the ledger, whole ones, in fields.
fn ledger(setup: &Setup, kind: &str) -> Vec<Vec<String>> {
    let text = fs::read_to_string(setup.path(LEDGER)).unwrap_or_default();
    let fields = |line: &str| line.split('\t').map(str::to_owned).collect::<Vec<_>>();
    let whole = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
    whole.map(fields).filter(|fields| fields[0] == kind).collect()
}

/// The links of the server, as it exports them.
fn export(setup: &Setup, file: &str) -> String {
    let exported = setup.run(&["export", file]);
    assert!(exported.status.success(), "{}", String::from_utf8_lossy(&exported.stderr));
    fs::read_to_string(setup.path(file)).unwrap()
}

/// Compares the ledger with an export of this content.
#[track_caller]
fn verify(setup: &Setup, option: &str, content: &str, code: i32, tells: &[&str]) {
    fs::write(setup.path("export"), content).unwrap();
    let ran = load(setup, &["verify", LEDGER, option, "export"]);
    assert_eq!(ran.code, Some(code), "{ran:#?}");
    tells.iter().for_each(|part| assert!(ran.out.contains(part), "{part}: {ran:#?}"));
}

#[test]
fn what_was_answered_is_what_was_stored() {
    let (setup, server) = serve_trusting();
    load(&setup, &recorded(&url(&server))).went_well();

    let created = ledger(&setup, "C").swap_remove(0).swap_remove(3);
    for file in ["links.csv", "links.ndjson"] {
        let links = export(&setup, file);
        verify(&setup, "--links", &links, 0, &["RIGHT: every acknowledged link is there"]);
        let without: String = links.split_inclusive('\n').filter(|line| !line.contains(&created)).collect();
        verify(&setup, "--links", &without, 1, &["WRONG: 1 link lost", &format!("code {created}")]);
    }

    // What a server would export that counts every redirect once.
    let is_redirect = |received: &Vec<String>| received[3].starts_with('3').then(|| received[1].clone());
    let redirects: HashSet<String> = ledger(&setup, "R").iter().filter_map(is_redirect).collect();
    let mut visits: Vec<[String; 2]> = Vec::new();
    for mut sent in ledger(&setup, "S").into_iter().filter(|sent| redirects.contains(&sent[1])) {
        visits.push([sent.swap_remove(5), sent.swap_remove(1)]);
    }
    assert!(visits.len() > 200, "{visits:?}");
    let csv = |visits: &[[String; 2]]| {
        visits.iter().fold("code,kind,request_id\n".to_owned(), |mut all, [code, id]| {
            let _ = writeln!(all, "{code},click,{id}");
            all
        })
    };
    let ndjson = |visits: &[[String; 2]]| {
        let line = |[code, id]: &[String; 2]| format!("{}\n", json!({"code": code, "kind": "click", "request_id": id}));
        visits.iter().map(line).collect::<String>()
    };
    let (one, others) = visits.split_first().unwrap();
    let doubled = [others, &[one.clone(), one.clone()]].concat();
    for write in [&csv as &dyn Fn(&[[String; 2]]) -> String, &ndjson] {
        verify(&setup, "--visits", &write(&visits), 0, &["RIGHT: every redirect is one visit"]);
        verify(&setup, "--visits", &write(others), 1, &["WRONG: 1 missing", &one[1]]);
        verify(&setup, "--visits", &write(&doubled), 1, &["WRONG: 1 doubled", &one[1]]);
    }
}

#[test]
fn a_server_that_is_killed_keeps_what_it_acknowledged() {
    let (setup, server) = serve_trusting();
    let target = url(&server);
    let mut running = start(&setup.path(""), recorded(&target));
    eventually(RUN, "links are created", || ledger(&setup, "C").len() > 5 || running.has_ended());
    server.kill();
    let ran = running.ends();
    assert!(ran.code.is_some_and(|code| code != 0), "{ran:#?}");
    assert!(ran.outcomes().iter().any(|(name, count)| *name == "refused" && *count > 0), "{ran:#?}");
    assert_eq!(ran.report["slo"][0]["pass"], json!(false), "{ran:#?}");

    let _server = setup.start();
    verify(&setup, "--links", &export(&setup, "links.csv"), 0, &["RIGHT: every acknowledged link is there"]);
}

#[test]
fn a_ledger_outlives_its_generator() {
    let (setup, server) = serve_trusting();
    let target = url(&server);
    let mut running = start(&setup.path(""), recorded(&target));
    eventually(RUN, "links are created", || ledger(&setup, "C").len() > 5 || running.has_ended());
    running.signal(Signal::KILL);
    let ran = running.ends();
    assert_eq!(ran.code, None, "{ran:#?}");
    verify(&setup, "--links", &export(&setup, "links.csv"), 0, &["RIGHT: every acknowledged link is there"]);
    let created = ledger(&setup, "C").swap_remove(0).swap_remove(3);
    let without: String =
        export(&setup, "links.csv").split_inclusive('\n').filter(|line| !line.contains(&created)).collect();
    verify(&setup, "--links", &without, 1, &[&format!("code {created}")]);
}

#[test]
fn an_interrupted_run_tells_what_it_has() {
    let (setup, server) = serve();
    let path = format!("/{}", server.warm("https://example.com/"));
    let link = format!("{}{path}", url(&server));
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let clicks = || server.metric("waypost_redirects_total", &[]);
        let before = clicks();
        let running = start(&setup.path(""), ["http", &link, "-R", "50", "-d", "60s", "--json", "run.json"]);
        eventually(LIMIT, "it has begun", || clicks() > before);
        running.signal(signal);
        let ran = running.ends();
        assert_eq!((ran.code, &ran.report["exit_code"]), (Some(code), &json!(code)), "{ran:#?}");
        assert_eq!(ran.report["verdict"], json!("INTERRUPTED"), "{ran:#?}");
        assert!(ran.out.starts_with("INTERRUPTED by "), "{ran:#?}");
        let all = &ran.report["whole"]["all"];
        assert!(all["sent"].as_u64() > Some(0) && all["sent"].as_u64() < Some(3000), "{ran:#?}");
    }
}

#[test]
fn what_cannot_run_says_why() {
    let (setup, server) = serve();
    server.custom("spring26", "https://elsewhere.example/");
    fs::write(setup.path("other.key"), "wpk_of_another_server").unwrap();
    let check = |arguments: &[&str], tells: &str| {
        let ran = load(&setup, arguments);
        assert!(matches!(ran.code, Some(1 | 2)), "{arguments:?}: {ran:#?}");
        assert!(ran.err.contains(tells), "{tells}: {ran:#?}");
        assert_eq!((ran.out.as_str(), &ran.report), ("", &Value::Null));
    };
    let target = url(&server);
    check(
        &run("mail-blast", &target, MAIL_BLAST),
        "code spring26 belongs to another link, to https://elsewhere.example/",
    );
    let other = run("mail-blast", &target, "peak=200 links.existing.count=200 links.launch.codes=[\"spring27\"]");
    check(&[&other[..], &["--key-file", "other.key"]].concat(), "the server refuses the key from other.key (401)");

    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let target = format!("http://{nobody}");
    let told = format!("connecting to {nobody}: Connection refused");
    check(&["http", &target, "-R", "10", "-d", "1s"], &told);
    check(&run("mail-blast", &target, MAIL_BLAST), &told);
    check(&["seed", "mail-blast", "--target", &target], &told);
}
