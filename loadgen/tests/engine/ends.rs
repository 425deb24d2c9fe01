//! Where a run meets the limits of its machine, or is to end.

use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use loadgen::clock;
use loadgen::stub::Stub;
use loadgen::stub::script::Script;

use crate::raw::Raw;
use crate::{LOCAL, carry_out, job, outcomes, perform};

/// From the command to stop until all has ended, the collector's patience of 100 ms included.
const SOON_NS: u64 = 300_000_000;

/// loadgen in a shell that has run `before`; with its report.
fn limited(before: &str, words: &str, folder: &std::path::Path) -> (Output, serde_json::Value) {
    let line = format!("{before}; exec {} {words} --json -", env!("CARGO_BIN_EXE_loadgen"));
    let output = Command::new("sh").args(["-c", &line]).current_dir(folder).output().unwrap();
    let report = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    (output, report)
}

fn verdict(report: &serde_json::Value, id: &str) -> String {
    let checks = report["checks"].as_array().unwrap();
    checks.iter().find(|check| check["id"] == id).unwrap()["verdict"].as_str().unwrap().to_owned()
}

#[test]
fn where_nobody_listens_nobody_waits_for_it() {
    // A port that is taken, so that no other test listens there, by a socket that does not listen.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&LOCAL.into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    for connection in [
        r#"{ kind = "pool", max = 2, when_full = "queue" }"#,
        r#"{ kind = "pool", max = 2 }"#,
        r#"{ kind = "per_request", max = 2 }"#,
        r#"{ kind = "session", requests = 4, max = 2 }"#,
    ] {
        let toml = format!(
            "timeout = \"2s\"\n[traffic.asks]\nrequest = \"GET /\"\nconnection = {connection}\n[[phase]]\n\
             name = \"only\"\nfor = \"50ms\"\nrate = 40000\nmix = {{ asks = 1 }}\n"
        );
        assert_eq!(outcomes(&perform(address, 1, &toml)), [("refused", 2_000)], "{connection}");
    }
}

#[test]
fn too_few_files_are_our_fault() {
    let stub = Stub::start(LOCAL, Script::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let words = format!("http http://{}/spring26 -R 200 -d 1s -c 100 -t 1", stub.address());
    let (output, report) = limited("ulimit -n 40", &words, folder.path());
    assert_eq!(verdict(&report, "V8"), "invalid", "{}", report["checks"]);
    assert_eq!(output.status.code(), Some(3));
    let failed = report["whole"]["connections"]["http"]["failed_by_us"].as_u64();
    assert!(failed > Some(0), "{}", report["whole"]["connections"]);
}

#[test]
fn a_full_disk_ends_a_run_but_not_its_report() {
    let stub = Stub::start(LOCAL, Script::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let words = format!("http http://{}/spring26 -R 500 -d 20s -c 4 -t 1 --ledger ledger.tsv", stub.address());
    // 60 blocks hold some 140 or 290 requests, as the shell has it: less than a second's. SIGXFSZ would end the process
    // before it hears of the error.
    let (output, report) = limited("trap '' 25; ulimit -f 60", &words, folder.path());
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stderr).contains("ledger"), "{}", report["reason"]);
    let ledger = std::fs::read_to_string(folder.path().join("ledger.tsv")).unwrap();
    let answered = ledger.lines().filter(|line| line.starts_with("R\t")).count() as u64;
    let all = &report["whole"]["all"];
    assert!(answered > 100, "{answered} answers in the ledger");
    assert!(all["outcomes"]["ok"].as_u64() >= Some(answered), "{answered} answers in the ledger, reported: {all}");
    assert_eq!(verdict(&report, "V1"), "pass", "{}", report["checks"]);
}

#[test]
fn a_run_that_is_stopped_before_its_origin_ends_soon() {
    // The first connection of a pool is there two seconds before the origin, since many may be needed.
    let stop: Arc<OnceLock<Arc<AtomicBool>>> = Arc::default();
    let stopped: Arc<OnceLock<u64>> = Arc::default();
    let (to_set, instant) = (Arc::clone(&stop), Arc::clone(&stopped));
    let raw = Raw::start(move |talk| {
        instant.get_or_init(clock::now_ns);
        to_set.get().unwrap().store(true, Ordering::Relaxed);
        // It stays open: nothing wakes the worker up.
        while talk.request().is_some() {}
    });
    let toml = "[traffic.pool]\nrequest = \"GET /\"\nconnection = { kind = \"pool\", max = 1, when_full = \"queue\" }\n\
                [traffic.many]\nrequest = \"GET /\"\nconnection = { kind = \"pool\", max = 20000 }\n\
                [[phase]]\nname = \"only\"\nfor = \"10s\"\nrate = 100\nmix = { pool = 1, many = 1 }\n";
    let job = job(raw.address(), 1, toml);
    stop.set(Arc::clone(&job.stop)).unwrap();
    let performed = carry_out(job, &mut |_, _| {});
    let took_ns = clock::now_ns() - stopped.get().unwrap();
    assert!(took_ns < SOON_NS, "it went on for {took_ns} ns");
    assert!(outcomes(&performed).is_empty() && performed.stopped, "{:?}", outcomes(&performed));
}

#[test]
fn a_run_that_is_stopped_in_its_drain_ends_soon() {
    let raw = Raw::start(|talk| while talk.request().is_some() {});
    let toml = "timeout = \"20s\"\ndrain = \"20s\"\n[traffic.asks]\nrequest = \"GET /\"\n\
                [[phase]]\nname = \"only\"\nfor = \"200ms\"\nrate = 100\nmix = { asks = 1 }\n";
    let job = job(raw.address(), 1, toml);
    let stop = Arc::clone(&job.stop);
    let mut stopped = None;
    let performed = carry_out(job, &mut |_, _| {
        stopped.get_or_insert_with(clock::now_ns);
        stop.store(true, Ordering::Relaxed);
    });
    let took_ns = clock::now_ns() - stopped.unwrap();
    assert!(took_ns < SOON_NS, "it went on for {took_ns} ns");
    assert_eq!(outcomes(&performed), [("in_flight_at_end", 20)]);
}
