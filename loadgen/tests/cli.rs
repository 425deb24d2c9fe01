//! The program as it is typed: exit codes, and the sentences that people read.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

const PROGRAM: &str = env!("CARGO_BIN_EXE_loadgen");

/// `loadgen stub` in a process of its own; ended when dropped.
struct Stub {
    child: Child,
    url: String,
}

impl Stub {
    fn start(flags: &[&str]) -> Self {
        let mut child = Command::new(PROGRAM)
            .args(["stub", "--listen", "127.0.0.1:0"])
            .args(flags)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().strip_prefix("listening on ").unwrap().to_owned();
        Self { child, url }
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn loadgen(folder: &Path, words: &[&str]) -> Output {
    Command::new(PROGRAM).args(words).current_dir(folder).output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn what_cannot_be_done_is_said_with_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let two_mistakes = "[run]\ntarget = \"http://127.0.0.1:1\"\ntimeuot = \"5s\"\n[traffic.a]\nrequest = \"GET /\"\n\
                        [[phase]]\nname = \"x\"\nfor = \"1s\"\nrate = 1\nmix = { b = 1 }\n";
    std::fs::write(folder.path().join("two.toml"), two_mistakes).unwrap();
    for (words, code, parts) in [
        (&["http", "https://127.0.0.1/x", "-R", "1"][..], 2, &["TLS comes later"][..]),
        (&["http", "http://127.0.0.1:1/x", "-R", "0"], 2, &["--rate"]),
        (&["run", "mail-blats"], 2, &["mail-blast"]),
        (&["run", "store-outage"], 2, &["store-outage needs --postgres-pid PID: "]),
        (&["run", "two.toml"], 2, &["two.toml:3: run.timeuot", "timeout", "two.toml:10"]),
        (&["check", "mail-blast", "--set", "peek=3"], 2, &["peak"]),
        (&["run", "mail-blast", "--target", "http://127.0.0.1:1"], 1, &["127.0.0.1:1"]),
        (&["run", "mail-blast", "--key-file", "nowhere"], 2, &["--key-file nowhere"]),
        (&["http", "http://127.0.0.1:1/a", "-R", "1", "--ledger", "two.toml"], 2, &["two.toml: it is there already"]),
        (
            &["http", "http://127.0.0.1:1/a", "-R", "1", "--ledger", "no/l"],
            2,
            &["--ledger no/l: its folder is not there"],
        ),
        (&["http", "http://127.0.0.1:1/a", "-R", "1", "--json", "no/j"], 2, &["--json no/j"]),
        (&["http", "http://127.0.0.1:1/a", "-R", "1", "--out", "two.toml"], 2, &["--out", "two.toml"]),
        (
            &["http", "http://127.0.0.1:1/a", "-R", "1", "-H", "X-Request-Id: 1", "--ledger", "l"],
            2,
            &["header X-Request-Id", "--ledger-header"],
        ),
        (&["run", "mail-blast", "--target", "http://127.0.0.1:1", "--ledger", "two.toml"], 2, &["it is there already"]),
        (&["seed", "mail-blast", "--write", "two.toml"], 2, &["--write two.toml: an existing file is not overwritten"]),
        (&["http", "http://127.0.0.1:1/a", "-R", "0.01", "-d", "1s"], 2, &["nothing arrives"]),
        (&["report", "nowhere"], 2, &["nowhere"]),
        (&["verify", "nowhere", "--links", "none"], 2, &["nowhere"]),
        (&["stub", "--stall", "soon"], 2, &["--stall soon"]),
        (&["check", "mail-blast"], 0, &["in order"]),
        (&["plan", "tv-spot"], 0, &["clicks"]),
    ] {
        let output = loadgen(folder.path(), words);
        let text = said(&output);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {text}");
        for part in parts {
            assert!(text.contains(part), "{words:?}: no {part:?} in: {text}");
        }
    }
}

#[test]
fn a_run_is_reported_and_its_folder_read_back() {
    let (stub, folder) = (Stub::start(&[]), tempfile::tempdir().unwrap());
    let url = format!("{}/missing1", stub.url);
    let slo = "wrong_status == 0";
    let run = loadgen(folder.path(), &["http", &url, "-R", "500", "-n", "500", "--out", "run", "--slo", slo]);
    let text = said(&run);
    // Invalid by its debug build and whatever else this machine does, before the SLO is looked at; else 99.
    assert!(matches!(run.status.code(), Some(3 | 99)), "{text}");
    assert!(text.contains("wrong_status 500") && text.contains("FAILS"), "{text}");
    for file in ["run.json", "timeline.csv", "intervals.hlog", "hgrm"] {
        assert!(folder.path().join("run").join(file).exists(), "{file}");
    }
    let again = loadgen(folder.path(), &["report", "run"]);
    assert_eq!(again.status.code(), run.status.code());
    assert!(String::from_utf8_lossy(&run.stdout).lines().all(|line| said(&again).contains(line)), "{}", said(&again));
    let refused = loadgen(folder.path(), &["http", &url, "-R", "500", "-n", "1", "--out", "run"]);
    assert_eq!(refused.status.code(), Some(2), "{}", said(&refused));
}

/// As when `calibrate` is killed, which drops nothing.
#[test]
fn a_stub_ends_with_the_process_that_started_it() {
    let mut child = Command::new(PROGRAM)
        .args(["stub", "--until-stdin-ends", "--listen", "127.0.0.1:0"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
}

/// The folder is what a run is for: whoever reads the standard output may have gone or be full.
#[test]
fn a_full_output_loses_no_folder() {
    let (stub, folder) = (Stub::start(&[]), tempfile::tempdir().unwrap());
    let url = format!("{}/spring26", stub.url);
    for (out, json) in [("text", None), ("json", Some("-"))] {
        let mut words = vec!["http", &url, "-R", "100", "-n", "10", "--out", out];
        words.extend(json.map(|json| ["--json", json]).into_iter().flatten());
        let full = std::fs::File::create("/dev/full").unwrap();
        let run = Command::new(PROGRAM).args(&words).current_dir(folder.path()).stdout(full).output().unwrap();
        assert!(folder.path().join(out).join("run.json").exists(), "{}", said(&run));
        assert!(folder.path().join(out).join("hgrm/run.http.hgrm").exists(), "{}", said(&run));
    }
}

#[test]
fn a_saturated_generator_is_never_green() {
    let (stub, folder) = (Stub::start(&[]), tempfile::tempdir().unwrap());
    let words =
        ["http", &format!("{}/spring26", stub.url), "-R", "5M", "-d", "100ms", "--timeout", "1s", "--json", "-"];
    let output = loadgen(folder.path(), &words);
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["verdict"], "INVALID");
    // V15 alone would be for the debug build. Which of these notices first depends on who else wants the cores.
    let invalid = |id: &str| {
        report["checks"].as_array().unwrap().iter().any(|check| check["id"] == id && check["verdict"] == "invalid")
    };
    assert!(invalid("V3"), "{}", report["checks"]);
    let all = &report["whole"]["all"];
    assert_eq!(all["planned"], 500_000);
    let outcomes: u64 = all["outcomes"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum();
    assert_eq!(outcomes, 500_000, "each arrival ends in one outcome: {}", all["outcomes"]);
}

#[test]
fn an_interrupted_run_is_reported_as_that() {
    let (stub, folder) = (Stub::start(&[]), tempfile::tempdir().unwrap());
    let mut child = Command::new(PROGRAM)
        .args(["http", &format!("{}/spring26", stub.url), "-R", "100", "-d", "60s", "--json", "-"])
        .current_dir(folder.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    // The first second has been told.
    while !line.contains(" s ") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "it ended by itself");
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    // The pipe must not fill up meanwhile.
    std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", said(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["verdict"], "INTERRUPTED");
    assert!(report["whole"]["all"]["outcomes"]["ok"].as_u64().unwrap() > 50);
}
