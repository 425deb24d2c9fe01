//! Files as tables: what is read of good ones, and what is said of bad ones.

use std::path::Path;

use proptest::{prop_assert, proptest};

use super::super::change::Changes;
use super::super::presets;
use super::super::{
    Action, ArrivalKind, Closed, ConnectionKind, Curve, Expect, Phase, Pick, PidFrom, Requests, Scenario, WhenFull,
};
use super::traffic::RANDOM_CODE_MAX;
use super::{from_toml, target};
use crate::links::{DERIVED_MAX, Source};
use crate::plan::pick::RANDOM_MAX;

const SECOND: u64 = 1_000_000_000;

/// Lines 1 to 11 of every text below; what is tested begins at line 12.
const BEGIN: &str = "\
[run]
target = \"http://127.0.0.1:8080\"
[links]
old = { count = 100 }
[traffic.a]
request = \"GET /{code}\"
code = { pick = \"zipf\", from = \"old\" }
[traffic.bot]
request = \"GET /x\"
closed = { clients = 4 }

";

const PHASE: &str = "[[phase]]\nname = \"one\"\nfor = \"10s\"\nrate = 100\nmix = { a = 1 }\n";

fn load(text: &str, changes: &Changes) -> Result<Scenario, String> {
    from_toml("t", text, Path::new("."), changes).map_err(|error| error.to_string())
}

fn set(key: &str, value: &str) -> Changes {
    Changes { set: vec![(key.to_owned(), value.to_owned())], ..Changes::default() }
}

#[test]
fn what_is_wrong_is_said_with_its_line() {
    let mut wrong = Vec::new();
    for (text, expected) in [
        ("[[phase", "t:12: unclosed array table, expected `]]`"),
        ("[rnu]\n", "t:12: rnu: unknown key, did you mean run?"),
        (
            "[[phase]]\nname = \"x\"\narivals = \"even\"\nfor = \"1s\"\nrate = 1\nmix = { a = 1 }",
            "t:14: phase.1.arivals: unknown key, did you mean arrivals?",
        ),
        (
            "[[phase]]\nname = \"x\"\nfor = 5\nrate = 1\nmix = { a = 1 }",
            "t:14: phase.1.for: 5 is no duration: write it with its unit in quotes, such as \"5s\"",
        ),
        ("[[phase]]\nname = \"x\"\nfor = \"5\"\nrate = 1\nmix = { a = 1 }", "t:14: phase.1.for: \"5\" has no unit"),
        (
            "[[phase]]\nname = \"x\"\nfor = \"5s\"\nrate = \"peak\"\nmix = { a = 1 }",
            "t:15: phase.1.rate: there is no peak: set run.peak, or give --set peak=10k",
        ),
        (
            "[[phase]]\nname = \"x\"\nfor = \"5s\"\nrate = \"2 of peak\"\nmix = { a = 1 }",
            "t:15: phase.1.rate: \"2\" is no share: give one such as 0.1%",
        ),
        (
            "[[phase]]\nname = \"x\"\nfor = \"5s\"\nrate = 1",
            "t:12: phase.1.mix: missing, write mix = { CLASS = 1 }, or \"previous\"",
        ),
        (
            "[[phase]]\nname = \"x\"\nfor = \"5s\"",
            "t:12: phase.1: has neither a rate (rate, ramp, points) nor closed loops (also)",
        ),
        (
            "[[phase]]\nname = \"x\"\nfor = \"5s\"\nrate = 1\nramp = { to = 5 }\nmix = { a = 1 }",
            "t:12: phase.1: has rate and ramp: only one of them",
        ),
        (
            "[[phase]]\nname = \"x\"\nfor = \"5s\"\nramp = { to = 5 }\nmix = { a = 1 }",
            "t:15: phase.1.ramp.from: missing, write from = 100: there is no rate before",
        ),
        (
            "[[phase]]\nname = \"x\"\nfor = \"5s\"\nramp = { from = 0, to = 5, shape = \"exp\" }\nmix = { a = 1 }",
            "t:15: phase.1.ramp.shape: an exponential ramp neither",
        ),
        (
            "[[phase]]\nname = \"x\"\nfor = \"5s\"\nrate = 1\nmix = { b = 1 }",
            "t:16: phase.1.mix: there is no traffic \"b\", did you mean \"a\"?",
        ),
        (
            "[[phase]]\nname = \"x\"\nfor = \"5s\"\nrate = 1\nmix = { a = 0 }",
            "t:16: phase.1.mix: has no class with a weight above 0",
        ),
        (
            "[[phase]]\nname = \"x\"\nfor = \"5s\"\nrate = 1\nmix = { bot = 1 }",
            "t:16: phase.1.mix: bot is a closed loop and has no share",
        ),
        (
            "[[phase]]\nname = \"x\"\nfor = \"5s\"\nrate = 1\nmix = \"previous\"",
            "t:16: phase.1.mix: no phase before has a mix",
        ),
        ("[[phase]]\nname = \"x\"\nfor = \"5s\"\nalso = [\"a\"]", "t:15: phase.1.also: a is no closed loop"),
        (
            "[[phase]]\nname = \"x\"\nfor = \"5s\"\npoints = [[\"0s\", 1], [\"4s\", 2]]\nmix = { a = 1 }",
            "t:15: phase.1.points: the last point is at 4s, and the phase ends at 5s",
        ),
        (
            "[[phase]]\nname = \"x\"\nfor = \"5s\"\npoints = [[\"1s\", 1], [\"5s\", 2]]\nmix = { a = 1 }",
            "t:15: phase.1.points: the times begin with 0s",
        ),
        (
            "[[phase]]\nname = \"warm-up\"\nfor = \"5s\"\nrate = 1\nmix = { a = 1 }",
            "t:13: phase.1.name: \"warm-up\" is taken",
        ),
        ("", "t:1: phase: there is none, write [[phase]]"),
        ("[traffic.b]\nrequest = \"get /\"\n", "t:13: traffic.b.request: \"get /\" is no request: write METHOD /PATH"),
        (
            "[traffic.b]\nrequest = \"GET /{cod}\"\n",
            "t:13: traffic.b.request: {cod} is no placeholder here, known are {code}, {n}",
        ),
        ("[traffic.b]\nrequest = \"GET /{code}\"\n", "t:12: traffic.b.code: missing, the request has {code}"),
        (
            "[traffic.b]\nrequest = \"GET /x\"\ncode = { pick = \"one\", from = \"old\" }\n",
            "t:14: traffic.b.code: the request has no {code}",
        ),
        (
            "[traffic.b]\nrequest = \"GET /{code}\"\ncode = { pick = \"zipff\" }\n",
            "t:14: traffic.b.code.pick: \"zipff\" is unknown, did you mean \"zipf\"?",
        ),
        (
            "[traffic.b]\nrequest = \"GET /{code}\"\ncode = { pick = \"one\", from = \"odl\" }\n",
            "t:14: traffic.b.code.from: there is no set of links \"odl\", did you mean \"old\"?",
        ),
        (
            "[traffic.b]\nrequest = \"GET /{code}\"\ncode = { pick = \"one\", from = \"old\", s = 1 }\n",
            "t:14: traffic.b.code.s: unknown key, known are pick, from",
        ),
        (
            "[traffic.b]\nrequest = \"GET /{code}\"\ncode = { pick = \"random\", length = 17 }\n",
            "t:14: traffic.b.code.length: 17 is no whole number from 1 to 16",
        ),
        (
            "[traffic.b]\nrequest = \"GET /{code}\"\ncode = { pick = \"fresh\", from = \"a\" }\n",
            "t:14: traffic.b.code.from: a yields no codes",
        ),
        (
            "[traffic.b]\nrequest = \"GET /\"\nexpect = { location = \"known\" }\n",
            "t:14: traffic.b.expect.location: no target is known here",
        ),
        (
            "[traffic.b]\nrequest = \"GET /\"\nexpect = { status = [301, 99] }\n",
            "t:14: traffic.b.expect.status: 99 is no whole number from 200 to 599",
        ),
        (
            "[traffic.b]\nrequest = \"GET /\"\nheaders = { \"a b\" = \"x\" }\n",
            "t:14: traffic.b.headers.a b: \"a b\" is no name of a header",
        ),
        (
            "[traffic.b]\nrequest = \"GET /\"\nheaders = { A = \"x\\r\\nB: y\" }\n",
            "t:14: traffic.b.headers.A: has a control character",
        ),
        (
            "[traffic.b]\nrequest = \"GET /\"\nheaders = { Host = \"x\" }\n",
            "t:14: traffic.b.headers.Host: is written by loadgen itself",
        ),
        (
            "[traffic.b]\nrequest = \"GET /\"\nconnection = { kind = \"session\" }\n",
            "t:14: traffic.b.connection.requests: missing",
        ),
        (
            "[traffic.b]\nrequest = \"GET /\"\nconnection = { kind = \"session\", requests = \"geometric(0.4)\" }\n",
            "t:14: traffic.b.connection.requests: \"geometric(0.4)\" is neither",
        ),
        (
            "[traffic.b]\nrequest = \"GET /\"\nconnection = { kind = \"per_request\", pipeline = 2 }\n",
            "t:14: traffic.b.connection.pipeline: only for kind = \"pool\"",
        ),
        (
            "[traffic.b]\nrequest = \"GET /\"\nclosed = { clients = 2 }\nconnection = { max = 2 }\n",
            "t:15: traffic.b.connection.max: a closed loop has one connection",
        ),
        (
            "[traffic.b]\nrequest = \"GET /\"\nyields = { code = \"short_code\" }\n",
            "t:14: traffic.b.yields.code: write json:",
        ),
        (
            "[traffic.b]\nrequest = \"GET /\"\nbind = \"127.0.0.0/40\"\n",
            "t:14: traffic.b.bind: \"127.0.0.0/40\" is no range",
        ),
        ("[links.new]\n", "t:12: links.new: needs exactly one of count"),
        ("[links.new]\nfile = \"/nowhere/at-all.csv\"\n", "t:13: links.new.file: /nowhere/at-all.csv: No such file"),
        (
            "[[event]]\nname = \"e\"\nat = \"oen + 5s\"\nbegin = { exec = [\"true\"] }\n",
            "t:14: event.1.at: there is no phase \"oen\", did you mean \"one\"?",
        ),
        (
            "[[event]]\nname = \"e\"\nat = \"one + 10s\"\nbegin = { exec = [\"true\"] }\n",
            "t:14: event.1.at: \"one\" lasts 10s: the event would be after it",
        ),
        (
            "[[event]]\nname = \"e\"\nat = \"9s\"\nlasts = \"2s\"\nbegin = { exec = [\"true\"] }\nend = { exec = [\"true\"] }\n",
            "t:14: event.1.at: ends 11s after the run's begin, and the run is over after 10s",
        ),
        (
            "[[event]]\nname = \"e\"\nat = \"9s\"\nbegin = { exec = [\"true\"] }\nend = { exec = [\"true\"] }\n",
            "t:16: event.1.end: when? add lasts = \"5s\"",
        ),
        (
            "[[event]]\nname = \"e\"\nat = \"1s\"\nbegin = { exec = [\"true\"] }\n[[event]]\nname = \"f\"\nat = \"2s\"\nbegin = { exec = [\"true\"] }\n",
            "t:16: event.2: begins before \"e\" has ended: events may not overlap",
        ),
        (
            "[[event]]\nname = \"e\"\nat = \"1s\"\nbegin = { signal = \"STPO\", pid = 5 }\n",
            "t:15: event.1.begin.signal: \"STPO\" is unknown, did you mean \"STOP\"?",
        ),
        (
            "[[event]]\nname = \"e\"\nat = \"1s\"\nbegin = { signal = \"STOP\", pid = 1 }\n",
            "t:15: event.1.begin.pid: 1 is no whole number from 2",
        ),
        (
            "[[event]]\nname = \"e\"\nat = \"1s\"\nbegin = { signal = \"STOP\" }\n",
            "t:15: event.1.begin: needs either pid",
        ),
        (
            "[[slo]]\nin = { phase = \"two\" }\nmust = [\"p(99) < 5ms\"]\n",
            "t:13: slo.1.in.phase: there is no phase \"two\", there are one",
        ),
        ("[[slo]]\nmust = [\"p(99) < 5\"]\n", "t:13: slo.1.must: \"p(99) < 5\": \"5\" has no unit"),
        (
            "[[slo]]\nmust = [\"recovery < 5s\"]\n",
            "t:13: slo.1.must: recovery is from an event: add in = { event = \"NAME\" }",
        ),
    ] {
        let text = if text.starts_with("[[phase") || text.is_empty() {
            format!("{BEGIN}{text}")
        } else {
            format!("{BEGIN}{text}\n{PHASE}")
        };
        let error = load(&text, &Changes::default()).map(|_| ()).expect_err(expected);
        if !error.starts_with(expected) || error.lines().count() != 1 {
            wrong.push(format!("expected {expected}\nfound    {error}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn all_mistakes_are_told_at_once() {
    let text = "[run]\ntarget = \"https://x\"\ntimeuot = \"5s\"\n[traffic.a]\nrequest = 5\n[[phase]]\nname = \"x\"\nrate = \"fast\"\n";
    let expected = "\
t:2: run.target: https is not offered: TLS comes later; give http://HOST:PORT
t:3: run.timeuot: unknown key, did you mean timeout?
t:5: traffic.a.request: 5 is no text: write it in quotes
t:6: phase.1.for: missing, write for = \"30s\"
t:6: phase.1.mix: missing, write mix = { CLASS = 1 }, or \"previous\"
t:8: phase.1.rate: \"fast\" is no number: give one such as 400, 20k or 1.5M";
    assert_eq!(load(text, &Changes::default()).map(|_| ()), Err(expected.to_owned()));
}

#[test]
fn targets_are_host_and_port() {
    for (url, host, port) in [
        ("http://127.0.0.1:8080", "127.0.0.1", 8080),
        ("http://localhost/", "localhost", 80),
        ("http://[::1]:81", "::1", 81),
        ("http://[::1]", "::1", 80),
    ] {
        let target = target(url).unwrap();
        assert_eq!((target.host.as_str(), target.port), (host, port), "{url}");
    }
    for url in [
        "",
        "x",
        "http://",
        "http://:80",
        "http://a:0",
        "http://a:b",
        "http://a/b",
        "http://u@h",
        "http://a b",
        "http://::1",
    ] {
        assert!(target(url).is_err(), "{url}");
    }
}

#[test]
fn a_whole_file_is_read() {
    let text = format!(
        "{}{}",
        BEGIN.replacen("[links]", "warmup = \"2s\"\npeak = \"2k\"\n[links]\nchosen = {{ codes = [\"x\", \"y\"] }}\ngiven = {{ targets = {{ z = \"https://z.example/\" }} }}", 1)
            .replace("{{", "{").replace("}}", "}"),
        "
[traffic.make]
request = \"POST /shorten\"
headers = { Authorization = \"Bearer {key}\" }
body = '{\"original_url\":\"{target}\"}'
expect = { status = 201, body = \"short\" }
yields = { code = \"json:short_code\" }
connection = { max = 8, when_full = \"shed\", pipeline = 4 }
bind = \"127.66.0.1\"
[traffic.read]
request = \"GET /{code}\"
code = { pick = \"fresh\", from = \"make\", delay = \"50ms\" }
connection = { kind = \"session\", requests = \"geometric(1.4)\" }
optional = true
[[phase]]
name = \"up\"
for = \"10s\"
points = [[\"0s\", \"10% of peak\"], [\"5s\", \"10% of peak\"], [\"5s\", 1000], [\"10s\", \"peak\"]]
mix = { a = 3, make = 1 }
arrivals = \"poisson\"
[[phase]]
name = \"down\"
for = \"20s\"
ramp = { to = 100, shape = \"exp\" }
mix = \"previous\"
also = [\"bot\"]
[[event]]
name = \"stop\"
at = \"down + 1s\"
lasts = \"2s\"
begin = { signal = \"STOP\", pid = \"{postgres_pid}\", tree = true }
end = { signal = \"CONT\", pid = '{postgres_pid}', tree = true }
[[event]]
name = \"first\"
at = \"1s\"
begin = { exec = [\"true\", \"x\"] }
[[slo]]
in = { phase = \"down\", traffic = [\"read\", \"a\"], event = \"stop\" }
must = [\"recovery < 2s\"]
"
    );
    let changes = Changes { postgres_pid: Some(77), ..Changes::default() };
    let scenario = load(&text, &changes).unwrap_or_else(|error| panic!("{error}"));
    let names: Vec<&str> = scenario.traffic.iter().map(|traffic| traffic.name.as_str()).collect();
    assert_eq!(names, ["a", "bot", "make", "read"]);
    assert_eq!(scenario.run.peak, 2000.0);
    assert!(matches!(scenario.catalogue.sets[0].source, Source::Codes(_)));
    assert!(matches!(scenario.catalogue.sets[1].source, Source::Listed(_)));

    let [a, bot, make, read] = &scenario.traffic[..] else { panic!("four classes") };
    assert_eq!(a.pick, Pick::Zipf { set: 2, s: 1.0, scatter: true });
    assert_eq!(a.headers.len(), 1);
    assert!(a.headers[0].1.contains("Firefox") && a.headers[0].1.contains("loadgen/"));
    assert_eq!(bot.closed, Some(Closed { clients: 4, think_ns: 0 }));
    assert_eq!(bot.connection.max, 4);
    assert_eq!(make.expect, Expect { status: vec![201], known_location: false, body: Some("short".to_owned()) });
    assert_eq!((make.connection.max, make.connection.when_full, make.connection.pipeline), (8, WhenFull::Shed, 4));
    assert_eq!(make.headers[2], ("Content-Type".to_owned(), "application/json".to_owned()));
    assert_eq!(read.pick, Pick::Fresh { from: 2, delay_ns: 50_000_000 });
    assert_eq!(read.connection.kind, ConnectionKind::Session(Requests::Geometric(1.4)));
    assert!(read.optional);

    let [warmup, up, down] = &scenario.phases[..] else { panic!("three phases") };
    assert_eq!((warmup.name.as_str(), warmup.warmup, &warmup.curve), ("warm-up", true, &Curve::Constant(200.0)));
    assert_eq!(warmup.mix, [(0, 0.75), (2, 0.25)]);
    assert_eq!(
        up.curve,
        Curve::Points(vec![(0, 200.0), (5 * SECOND, 200.0), (5 * SECOND, 1000.0), (10 * SECOND, 2000.0)])
    );
    let expected = Phase {
        name: "down".to_owned(),
        for_ns: 20 * SECOND,
        curve: Curve::Exponential { from: 2000.0, to: 100.0 },
        arrivals: ArrivalKind::Even,
        mix: up.mix.clone(),
        also: vec![1],
        warmup: false,
    };
    assert_eq!(*down, expected);

    // In order of time, whatever the file's, and the warm-up counts.
    let [first, stop] = &scenario.events[..] else { panic!("two events") };
    assert_eq!((first.at_ns, first.lasts_ns), (3 * SECOND, 0));
    assert_eq!((stop.at_ns, stop.lasts_ns), (13 * SECOND, 2 * SECOND));
    let begin = Action::Signal { signal: "STOP".to_owned(), pid: PidFrom::Pid(77), tree: true };
    assert_eq!(stop.begin, begin);
    let scope = &scenario.slos[0].scope;
    assert_eq!((scope.phase, scope.event, &scope.traffic), (Some(2), Some(1), &vec![3, 0]));
    // The text is the same one with any server.
    assert!(scenario.toml.contains("{postgres_pid}") && !scenario.toml.contains("77"));
    let again = load(&scenario.toml, &changes).unwrap();
    assert_eq!(again.phases, scenario.phases);
}

#[test]
fn a_mistake_is_told_once() {
    for (phase, expected) in [
        ("points = [[\"0s\", 1], [\"4s\", 2]]\nmix = { a = 1 }", "t:15: phase.1.points: the last point"),
        ("rate = 1\nmix = { b = 1 }", "t:16: phase.1.mix: there is no traffic"),
        ("rate = \"fast\"\nmix = { a = 1 }", "t:15: phase.1.rate: \"fast\" is no number"),
    ] {
        let text = format!(
            "{BEGIN}[[phase]]\nname = \"x\"\nfor = \"5s\"\n{phase}\n[[phase]]\nname = \"y\"\nfor = \"5s\"\nramp = {{ to = 5 }}\nmix = \
             \"previous\"\n[[event]]\nname = \"e\"\nat = \"x + 1s\"\nbegin = {{ exec = [\"true\"] }}\n[[slo]]\nin = {{ phase = \"x\" }}\n\
             must = [\"max < 1s\"]\n"
        );
        let error = load(&text, &Changes::default()).map(|_| ()).unwrap_err();
        assert!(error.starts_with(expected) && error.lines().count() == 1, "{error}");
    }
    let event = "[[event]]\nname = \"e\"\nat = \"1s\"\nbegin = { exec = [] }\n";
    let text = format!("{BEGIN}{PHASE}{event}[[slo]]\nin = {{ event = \"e\" }}\nmust = [\"recovery < 1s\"]\n");
    let error = load(&text, &Changes::default()).map(|_| ()).unwrap_err();
    assert!(error.contains("event.1.begin.exec: names no program") && error.lines().count() == 1, "{error}");
}

#[test]
fn a_phase_may_have_a_plus_in_its_name() {
    for (at, at_s) in [("up + 2s", 0), ("up + 2s + 3s", 3)] {
        let text = format!("{BEGIN}{PHASE}[[event]]\nname = \"e\"\nat = \"{at}\"\nbegin = {{ exec = [\"true\"] }}\n");
        let scenario = load(&text.replace("\"one\"", "\"up + 2s\""), &Changes::default()).unwrap();
        assert_eq!(scenario.events[0].at_ns, at_s * SECOND, "{at}");
    }
}

#[test]
fn each_worker_needs_a_connection() {
    let text = format!("{BEGIN}{PHASE}").replace("[traffic.bot]", "connection = { max = 3 }\n[traffic.bot]");
    assert!(load(&text, &set("workers", "3")).is_ok());
    let error = load(&text, &set("workers", "4")).map(|_| ()).unwrap_err();
    assert!(error.contains("a may have 3 connections, fewer than the 4 workers"), "{error}");
}

#[test]
fn a_class_that_is_off_leaves_its_share_to_the_rest() {
    let text = format!(
        "{BEGIN}[traffic.make]\nrequest = \"POST /\"\nyields = {{ code = \"json:c\" }}\n[traffic.read]\nrequest = \"GET /{{code}}\"\n\
         code = {{ pick = \"fresh\", from = \"make\" }}\n{}[[slo]]\nin = {{ traffic = [\"read\"] }}\nmust = [\"max < 1s\"]\n\
         [[slo]]\nin = {{ traffic = [\"read\", \"a\"] }}\nmust = [\"max < 2s\"]\n",
        PHASE.replace("{ a = 1 }", "{ a = 2, make = 1, read = 1, bot2 = 4 }").replace(", bot2 = 4", "")
    );
    let drop = Changes { drop: vec!["make".to_owned()], ..Changes::default() };
    for changes in [set("traffic.make", "off"), drop] {
        let scenario = load(&text, &changes).unwrap();
        assert_eq!(scenario.traffic.len(), 2);
        assert_eq!(scenario.phases[0].mix, [(0, 1.0)]);
        // What judged only the class that is off is gone, and does not judge all instead.
        assert_eq!(scenario.slos.len(), 1);
        assert_eq!(scenario.slos[0].scope.traffic, [0]);
    }
    let unknown = load(&text, &set("traffic.mak", "off")).unwrap_err().to_string();
    assert!(unknown.contains("there is no traffic \"mak\", did you mean \"make\"?"), "{unknown}");
    let error = load(&text, &set("traffic.a", "off")).map(|scenario| scenario.phases[0].mix.clone());
    assert_eq!(error, Ok(vec![(1, 0.5), (2, 0.5)]));
}

#[test]
fn never_twice_needs_a_link_for_each_arrival() {
    let text = format!("{BEGIN}{PHASE}")
        .replace("pick = \"zipf\", from = \"old\"", "pick = \"uniform\", from = \"old\", never_twice = true");
    for (rate, good) in [("9", true), ("10.1", false)] {
        assert_eq!(load(&text, &set("phase.1.rate", rate)).is_ok(), good, "{rate}");
    }
    let error = load(&text, &Changes::default()).unwrap_err();
    let expected = "t:7: traffic.a.code: never_twice asks for up to 1,001 links, and old has 100: set links.old.count, or a \
                    shorter run";
    assert_eq!(error, expected);
}

#[test]
fn links_come_from_a_csv_beside_the_scenario() {
    let folder = tempfile::tempdir().unwrap();
    let text = format!("{BEGIN}[links.file]\nfile = \"l.csv\"\n{PHASE}");
    for (csv, expected) in [
        ("code,title,url\nab,A,https://a.example/\n", Ok(vec![("ab".to_owned(), "https://a.example/".to_owned())])),
        ("code,title\nab,A\n", Err("has no column \"url\"")),
        ("code,url\n", Err("has no links")),
        ("code,url\nab\n", Err("record")),
    ] {
        std::fs::write(folder.path().join("l.csv"), csv).unwrap();
        match (from_toml("t", &text, folder.path(), &Changes::default()), expected) {
            (Ok(scenario), Ok(links)) => {
                assert!(
                    matches!(&scenario.catalogue.sets[1].source, Source::Listed(found) if *found == links),
                    "{csv}"
                );
            }
            (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
            (found, expected) => panic!("{csv}: {found:?}, not {expected:?}"),
        }
    }
}

#[test]
fn every_preset_loads() {
    for (name, text) in presets::ALL {
        let pid = Changes { postgres_pid: Some(77), ..Changes::default() };
        let scenario = from_toml(name, text, Path::new("."), &pid).unwrap_or_else(|error| panic!("{error}"));
        assert!((40 * SECOND..=95 * SECOND).contains(&scenario.length_ns()), "{name}");
        assert_eq!(scenario.run.peak, 10_000.0, "{name}");
        assert!(!scenario.slos.is_empty(), "{name}");
    }
}

#[test]
fn who_stops_postgres_must_say_which() {
    let text = presets::find("store-outage").unwrap();
    let error = from_toml("store-outage", text, Path::new("."), &Changes::default()).unwrap_err().to_string();
    assert!(error.starts_with("store-outage needs --postgres-pid PID: ") && error.contains("head -1"), "{error}");
    let rehearsal = Changes { rehearsal: true, ..Changes::default() };
    let scenario = from_toml("store-outage", text, Path::new("."), &rehearsal).unwrap();
    assert!(matches!(&scenario.events[0].begin, Action::Signal { pid: PidFrom::File(_), .. }));
}

#[test]
fn the_reference_names_the_limits() {
    let reference = include_str!("../../../SCENARIOS.md");
    for limit in [crate::units::count(DERIVED_MAX), format!("up to {RANDOM_CODE_MAX} random")] {
        assert!(reference.contains(&limit), "{limit}");
    }
}

#[test]
fn a_random_code_fits_the_plan() {
    assert_eq!(RANDOM_CODE_MAX, RANDOM_MAX as u64);
}

#[test]
fn every_example_of_the_reference_loads() {
    let reference = include_str!("../../../SCENARIOS.md");
    let examples: Vec<&str> =
        reference.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(examples.len() >= 5, "{}", examples.len());
    for example in examples {
        load(example, &Changes::default()).unwrap_or_else(|error| panic!("{error}\n{example}"));
    }
    // What can be written is described.
    for (name, _) in presets::ALL {
        assert!(reference.contains(name), "{name}");
    }
}

proptest! {
    /// A preset with some bytes replaced: a scenario, or mistakes with lines; never a panic.
    #[test]
    fn a_damaged_file_is_refused_or_read(preset in 0..4_usize, at in 0..4000_usize, cut in 0..40_usize, with in "\\PC{0,6}") {
        let (name, text) = presets::ALL[preset];
        let from = text.floor_char_boundary(at.min(text.len()));
        let to = text.floor_char_boundary((from + cut).min(text.len()));
        let damaged = format!("{}{with}{}", &text[..from], &text[to..]);
        for changes in [Changes { rehearsal: true, ..Changes::default() }, set("phase.2.for", "5s"), set("traffic.clicks", "off")] {
            if let Err(error) = from_toml(name, &damaged, Path::new("."), &changes) {
                prop_assert!(!error.problems.is_empty());
                prop_assert!(error.problems.iter().all(|problem| problem.starts_with(name)), "{}", error);
            }
        }
    }

    #[test]
    fn any_set_is_refused_or_read(key in "[a-z.0-9]{0,12}", value in "\\PC{0,8}") {
        let _ = from_toml("mail-blast", presets::ALL[0].1, Path::new("."), &set(&key, &value));
    }
}
