//! Against the stub, whose every answer is known beforehand.

use loadgen::measure::Outcome;
use loadgen::slo::Scope;
use loadgen::stub::Stub;
use loadgen::stub::script::Script;

use crate::{LOCAL, outcomes, perform};

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

#[test]
fn what_goes_wrong_has_a_name() {
    for (flags, expected) in [
        (&[("stall", "10s@0.5s")][..], &["ok", "in_flight_at_end", "timeout", "unsent"][..]),
        (&[("stuck", "1/4")], &["ok", "in_flight_at_end", "timeout", "unsent"]),
        (&[("fail", "503:200ms@300ms")], &["ok", "wrong_status"]),
        (&[("reset", "10%")], &["ok", "reset"]),
    ] {
        let stub = Stub::start(LOCAL, script(flags)).unwrap();
        let run = "timeout = \"300ms\"\ndrain = \"500ms\"\n";
        let toml = format!(
            "{run}{CLASS}connection = {{ kind = \"pool\", max = 16, when_full = \"queue\" }}\n{}",
            phase(1_000)
        );
        let performed = perform(stub.address(), 2, &toml);
        for (name, count) in outcomes(&performed) {
            assert!(expected.contains(&name), "{flags:?}: {count} {name}");
        }
        assert!(outcomes(&performed).len() > 1, "{flags:?}: {:?}", outcomes(&performed));
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

#[test]
fn a_closed_loop_asks_as_soon_as_it_has_thought() {
    let stub = Stub::start(LOCAL, script(&[("service", "2ms")])).unwrap();
    let toml = format!(
        "{CLASS}closed = {{ clients = 10, think = \"8ms\" }}\n\
         [[phase]]\nname = \"only\"\nfor = \"1s\"\nalso = [\"clicks\"]\n"
    );
    let performed = perform(stub.address(), 2, &toml);
    let tally = performed.totals.tally(&Scope::default());
    // 10 clients x 1 s / 10 ms; a busy machine makes it fewer, nothing makes it more.
    assert!((500..=1_010).contains(&tally.of(Outcome::Ok)), "{:?}", outcomes(&performed));
}
