//! Against the stub, whose every answer is known beforehand.

use std::ops::RangeInclusive;

use loadgen::measure::Outcome;
use loadgen::slo::Scope;
use loadgen::stub::Stub;
use loadgen::stub::script::Script;

use crate::{LOCAL, count, outcomes, perform};

fn script(flags: &[(&str, &str)]) -> Script {
    let mut script = Script::default();
    for (flag, value) in flags {
        script.set(flag, value).unwrap();
    }
    script
}

const CLASS: &str = r#"
[links]
all = { count = 1000 }
[traffic.clicks]
request = "GET /{code}"
code = { pick = "zipf", from = "all", s = 1.1, scatter = true }
expect = { status = [307], location = "known" }
"#;

fn phase(rate: u32) -> String {
    format!("\n[[phase]]\nname = \"only\"\nfor = \"1s\"\nrate = {rate}\nmix = {{ clicks = 1 }}\n")
}

#[test]
fn every_kind_of_connection_carries_the_plan() {
    for (connection, opened) in [
        (r#"{ kind = "pool", max = 8, when_full = "queue" }"#, 8..=8),
        (r#"{ kind = "pool", max = 64 }"#, 1..=64),
        (r#"{ kind = "session", requests = "geometric(1.4)", max = 200 }"#, 1_200..=1_650),
        (r#"{ kind = "session", requests = 4, max = 200 }"#, 500..=560),
        (r#"{ kind = "per_request", max = 200 }"#, 2_000..=2_000),
        (r#"{ kind = "pool", max = 2, when_full = "queue", pipeline = 16 }"#, 2..=2),
    ] {
        for workers in [1, 2] {
            let stub = Stub::start(LOCAL, Script::default()).unwrap();
            let toml = format!("{CLASS}connection = {connection}\nbind = \"127.66.0.0/24\"\n{}", phase(2_000));
            let performed = perform(stub.address(), workers, &toml);
            assert_eq!(outcomes(&performed), [("ok", 2_000)], "{connection}, {workers} workers");
            let connected = performed.totals.connected(0);
            assert!(opened.contains(&connected[1]), "{connection}: {connected:?}");
        }
    }
}

/// Of a thousand requests in a second, at most 16 at a time.
#[test]
fn what_goes_wrong_has_a_name() {
    for (flags, expected) in [
        // Who is sent or still waits when its time is over depends on how fast connections are replaced.
        (("stall", "10s@0.5s"), &[("ok", 400..=600), ("timeout", 100..=600), ("unsent", 0..=500)][..]),
        // Each that is stuck holds one request until its time-out; one of four that replace it is stuck again.
        (("stuck", "1/4"), &[("ok", 950..=996), ("timeout", 4..=50)]),
        (("fail", "503:200ms@300ms"), &[("ok", 750..=850), ("wrong_status", 150..=250)]),
        (("reset", "10%"), &[("ok", 870..=930), ("reset", 70..=130)]),
    ] {
        let stub = Stub::start(LOCAL, script(&[flags])).unwrap();
        let run = "timeout = \"300ms\"\ndrain = \"500ms\"\n";
        let toml = format!(
            "{run}{CLASS}connection = {{ kind = \"pool\", max = 16, when_full = \"queue\" }}\n{}",
            phase(1_000)
        );
        let performed = perform(stub.address(), 2, &toml);
        let outcomes = outcomes(&performed);
        for (name, range) in expected {
            let count = outcomes.iter().find(|(outcome, _)| outcome == name).map_or(0, |(_, count)| *count);
            assert!(range.contains(&count), "{flags:?}: {name} is not in {range:?}: {outcomes:?}");
        }
        let named = |outcome: &str| expected.iter().any(|(name, _)| *name == outcome);
        assert!(outcomes.iter().all(|(outcome, _)| named(outcome)), "{flags:?}: {outcomes:?}");
    }
}

#[test]
fn nobody_listens() {
    let address = Stub::start(LOCAL, Script::default()).unwrap().address();
    // Its port is free again when the thread has ended.
    while std::net::TcpStream::connect(address).is_ok() {}
    let performed = perform(address, 1, &format!("{CLASS}{}", phase(500)));
    assert_eq!(outcomes(&performed), [("refused", 500)]);
}

#[test]
fn created_codes_are_read_back() {
    let stub = Stub::start(LOCAL, Script::default()).unwrap();
    let toml = r#"
[traffic.create]
request = "POST /shorten"
headers = { Authorization = "Bearer {key}" }
body = '{"original_url":"{target}"}'
expect = { status = [201] }
yields = { code = "json:short_code" }
[traffic.readback]
request = "GET /{code}"
code = { pick = "fresh", from = "create", delay = "20ms" }
expect = { status = [307], location = "known" }
[[phase]]
name = "first"
for = "300ms"
rate = 500
mix = { create = 1 }
[[phase]]
name = "both"
for = "1s"
rate = 1000
mix = { create = 1, readback = 1 }
"#;
    let performed = perform(stub.address(), 2, toml);
    assert_eq!(outcomes(&performed), [("ok", 1_150)]);
    let sum = performed.totals.sum(&Scope { phase: None, event: None, traffic: vec![1] });
    assert!(sum.visible.known.len() > 100, "{}", sum.visible.known.len());
}

/// What waited for a reader says nothing of the server: nine of ten codes of the first second are read back in the next.
#[test]
fn the_wait_for_a_reader_is_not_the_wait_to_be_visible() {
    let stub = Stub::start(LOCAL, Script::default()).unwrap();
    let toml = r#"
[traffic.create]
request = "POST /shorten"
body = '{"original_url":"{target}"}'
expect = { status = [201] }
yields = { code = "json:short_code" }
[traffic.readback]
request = "GET /{code}"
code = { pick = "fresh", from = "create", delay = "1ms" }
expect = { status = [307], location = "known" }
[[phase]]
name = "creates"
for = "1s"
rate = 1000
mix = { create = 9, readback = 1 }
[[phase]]
name = "reads"
for = "1500ms"
rate = 1000
mix = { readback = 1 }
"#;
    let performed = perform(stub.address(), 1, toml);
    let visible = performed.totals.sum(&Scope { phase: None, event: None, traffic: vec![1] }).visible;
    assert!(visible.known.len() > 50, "{} codes were read back as soon as they could be", visible.known.len());
    assert!(visible.max_ns < 1_000_000_000, "{} ns, on a server that shows a code at once", visible.max_ns);
}

/// A machine that is busy with something else makes it fewer, nothing makes it more: the best of three counts.
fn best(expected: &RangeInclusive<u64>, count: impl Fn() -> u64) -> u64 {
    let mut best = 0;
    for _ in 0..3 {
        best = count().max(best);
        if best >= *expected.start() {
            break;
        }
    }
    best
}

/// 10 clients that think for 8 ms and wait for 2 ms, and one that never thinks: 1,000 and 500 answers a second at most.
#[test]
fn a_closed_loop_asks_as_soon_as_it_has_thought() {
    let stub = Stub::start(LOCAL, script(&[("service", "2ms")])).unwrap();
    for (closed, length_ms, possible) in [
        ("{ clients = 10, think = \"8ms\" }", 1_000, 1_000),
        // It begins with its phase, whatever else wakes the worker up.
        ("{ clients = 10, think = \"8ms\" }", 150, 150),
        ("{ clients = 1, think = \"0ms\" }", 200, 100),
    ] {
        let toml = format!(
            "{CLASS}closed = {closed}\n[[phase]]\nname = \"only\"\nfor = \"{length_ms}ms\"\nalso = [\"clicks\"]\n"
        );
        // Each client has asked once more in the last instant, at most.
        let expected = possible * 8 / 10..=possible + 10;
        let ok = best(&expected, || {
            let performed = perform(stub.address(), 1, &toml);
            assert_eq!(outcomes(&performed).len(), 1, "{closed}, {length_ms} ms: {:?}", outcomes(&performed));
            count(&performed, Outcome::Ok)
        });
        assert!(expected.contains(&ok), "{closed}, {length_ms} ms: {ok} of {possible}");
    }
}

#[test]
fn a_closed_loop_pauses_in_a_phase_without_it() {
    let stub = Stub::start(LOCAL, script(&[("service", "2ms")])).unwrap();
    let mut toml = format!(
        "{CLASS}closed = {{ clients = 10, think = \"8ms\" }}\n[traffic.others]\nrequest = \"GET /missing1\"\n\
         expect = {{ status = [404] }}\n"
    );
    for (name, also) in
        [("before", ""), ("one", "also = [\"clicks\"]\n"), ("between", ""), ("two", "also = [\"clicks\"]\n")]
    {
        toml += &format!("[[phase]]\nname = \"{name}\"\nfor = \"300ms\"\nrate = 20\nmix = {{ others = 1 }}\n{also}");
    }
    let expected = 240..=310;
    let least = best(&expected, || {
        let performed = perform(stub.address(), 2, &toml);
        let tally = |phase| performed.totals.tally(&Scope { phase: Some(phase), event: None, traffic: vec![0] });
        assert_eq!((tally(0).scheduled, tally(2).scheduled), (0, 0), "asked in a phase that is not theirs");
        for phase in [1, 3] {
            assert_eq!(tally(phase).of(Outcome::Ok), tally(phase).scheduled, "phase {phase}");
            assert!(tally(phase).scheduled <= *expected.end(), "phase {phase}: {}", tally(phase).scheduled);
        }
        tally(1).scheduled.min(tally(3).scheduled)
    });
    assert!(expected.contains(&least), "{least} are not in {expected:?}");
}
