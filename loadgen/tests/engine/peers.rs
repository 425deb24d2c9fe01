//! Servers that do what no server should, or what any may: raw ones, so that each byte and its instant is the test's.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use loadgen::campaign::Performed;
use loadgen::clock;
use loadgen::measure::{Connected, Outcome};
use loadgen::slo::Scope;

use crate::raw::{FINE, Raw};
use crate::{count, outcomes, perform};

/// One class whose paths number its requests; `run` is more of `[run]`.
fn asks(run: &str, connection: &str, rate: u32, lasts: &str) -> String {
    format!(
        "{run}\n[traffic.asks]\nrequest = \"GET /{{n}}\"\nexpect = {{ status = [200] }}\nconnection = {connection}\n\
         [[phase]]\nname = \"only\"\nfor = \"{lasts}\"\nrate = {rate}\nmix = {{ asks = 1 }}\n"
    )
}

/// Requests that were handed to the kernel.
fn sent(performed: &Performed) -> u64 {
    performed.totals.intervals().iter().map(|interval| interval.sent).sum()
}

/// Each request was on the wire once at least.
fn distinct(raw: &Raw) -> u64 {
    raw.seen().into_iter().map(|(_, request)| request).collect::<HashSet<_>>().len() as u64
}

#[test]
fn bytes_behind_an_answer_answer_nothing_that_was_not_sent() {
    // The second answer is wrong, so that a request that takes it is seen.
    let twice = [FINE, b"HTTP/1.1 500 Twice\r\nContent-Length: 0\r\n\r\n"].concat();
    let raw = Raw::start(move |talk| {
        while talk.request().is_some() {
            // Requests queue up meanwhile, so that the next is put on the connection as soon as this one ends.
            std::thread::park_timeout(Duration::from_millis(5));
            if !talk.say(&twice) {
                break;
            }
        }
    });
    let pool = r#"{ kind = "pool", max = 1, when_full = "queue" }"#;
    let performed = perform(raw.address(), 1, &asks("", pool, 400, "250ms"));
    let total = count(&performed, Outcome::Ok) + count(&performed, Outcome::ProtocolError);
    assert_eq!(total, 100, "{:?}", outcomes(&performed));
    assert_eq!((raw.seen().len(), distinct(&raw)), (100, 100), "each was sent once");
    assert_eq!(sent(&performed), 100);
    // The first answer was right, and nothing else was in flight.
    assert_eq!(outcomes(&performed), [("ok", 100)]);
    // One that has said what nobody asked for is not believed again.
    let connected = performed.totals.connected(0);
    assert_eq!(connected[Connected::Opened as usize], 100, "{connected:?}");
    let service_ns = performed.totals.sum(&Scope::default()).service.max_ns;
    assert!(service_ns < 5_000_000_000, "an answer of {service_ns} ns");
}

#[test]
fn an_answer_that_comes_with_the_end_of_the_connection_is_whole() {
    let raw = Raw::start(|talk| {
        if talk.request().is_some() {
            std::thread::park_timeout(Duration::from_millis(5));
            talk.say_and_close(FINE);
        }
    });
    let pool = r#"{ kind = "pool", max = 2, when_full = "queue" }"#;
    let performed = perform(raw.address(), 1, &asks("", pool, 600, "300ms"));
    assert_eq!(outcomes(&performed), [("ok", 180)]);
    assert_eq!((raw.seen().len(), distinct(&raw)), (180, 180), "each was sent once");
    assert_eq!(sent(&performed), 180);
}

#[test]
fn a_kept_connection_may_end_while_it_is_idle() {
    let crossed = Arc::new(AtomicU64::new(0));
    let theirs = Arc::clone(&crossed);
    let raw = Raw::start(move |talk| {
        talk.stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        while talk.request().is_some() {
            talk.say(FINE);
        }
        // What comes now crossed the end on its way.
        let _ = talk.stream.shutdown(std::net::Shutdown::Write);
        talk.stream.set_read_timeout(None).unwrap();
        while talk.request().is_some() {
            theirs.fetch_add(1, Ordering::Relaxed);
        }
    });
    for connection in [r#"{ kind = "pool", max = 4, when_full = "queue" }"#, r#"{ kind = "pool", max = 4 }"#] {
        let performed = perform(raw.address(), 1, &asks("", connection, 15, "1s"));
        let wrong = 15 - count(&performed, Outcome::Ok);
        assert!(wrong <= crossed.load(Ordering::Relaxed), "{connection}: {:?}", outcomes(&performed));
        let opened = performed.totals.connected(0)[Connected::Opened as usize];
        assert!(opened > 4, "{connection}: only {opened} connections, none of them ended");
    }
}

#[test]
fn behind_one_that_is_late_in_a_pipeline_nobody_is_late_yet() {
    let raw = Raw::start(|talk| {
        while talk.request().is_some() {
            if talk.number != 0 {
                talk.say(FINE);
            }
        }
    });
    let pool = r#"{ kind = "pool", max = 2, when_full = "queue", pipeline = 8 }"#;
    let run = "timeout = \"300ms\"\ndrain = \"2s\"\n";
    let performed = perform(raw.address(), 1, &asks(run, pool, 50, "500ms"));
    assert!(count(&performed, Outcome::Timeout) >= 1, "{:?}", outcomes(&performed));
    let response = performed.totals.sum(&Scope::default()).response;
    // Of the three digits of a histogram the last may be rounded down.
    assert!(response.censored.min() >= 299_000_000, "late after {} ns", response.censored.min());
    assert!(response.censored.max() <= 1_000_000_000, "given up after {} ns", response.censored.max());
    for (name, _) in outcomes(&performed) {
        assert!(["ok", "timeout", "closed_early"].contains(&name), "{:?}", outcomes(&performed));
    }
}

#[test]
fn behind_the_last_answer_of_a_connection_a_pipeline_goes_elsewhere() {
    let answered = Arc::new(AtomicU64::new(0));
    let theirs = Arc::clone(&answered);
    let last = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let three = [FINE, FINE, &last[..]].concat();
    let raw = Raw::start(move |talk| {
        for _ in 0..3 {
            if talk.request().is_none() {
                return;
            }
        }
        theirs.fetch_add(3, Ordering::Relaxed);
        talk.say_and_close(&three);
    });
    let pool = r#"{ kind = "pool", max = 2, when_full = "queue", pipeline = 8 }"#;
    // Two are not enough for an answer: they wait for their time-out at the end.
    let run = "timeout = \"1s\"\ndrain = \"2s\"\n";
    let performed = perform(raw.address(), 1, &asks(run, pool, 3_000, "200ms"));
    let (ok, early) = (count(&performed, Outcome::Ok), count(&performed, Outcome::ClosedEarly));
    let answered = answered.load(Ordering::Relaxed);
    let seen = raw.seen().len() as u64;
    assert_eq!(ok, answered, "{:?}", outcomes(&performed));
    assert!(early <= seen - answered, "{early} ended early of {} that came unanswered", seen - answered);
    assert!(sent(&performed) <= seen, "{} sent, {seen} came", sent(&performed));
    assert!(ok > 100 && ok + early >= 580, "{:?}", outcomes(&performed));
    for (name, _) in outcomes(&performed) {
        assert!(["ok", "closed_early", "timeout"].contains(&name), "{:?}", outcomes(&performed));
    }
}

#[test]
fn a_body_without_end_holds_up_nobody_else() {
    // Whoever reads it to its end is free again after this, and has failed.
    let ends_ns = 8_000_000_000;
    let raw = Raw::start(move |talk| {
        // Small ones take longer to be read than to be written: there is always more than one read takes.
        let chunks = b"1\r\nx\r\n".repeat(100_000);
        while let Some(request) = talk.request() {
            if request != "GET /3" {
                talk.say(FINE);
                continue;
            }
            let begun_ns = clock::now_ns();
            talk.say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
            while !talk.is_over() && clock::now_ns() - begun_ns < ends_ns && talk.say(&chunks) {}
            return;
        }
    });
    let pool = r#"{ kind = "pool", max = 4, when_full = "queue" }"#;
    let run = "timeout = \"400ms\"\ndrain = \"1s\"\n";
    let performed = perform(raw.address(), 1, &asks(run, pool, 100, "1s"));
    assert_eq!(outcomes(&performed), [("ok", 99), ("timeout", 1)]);
    assert!(performed.lasted_ns < 4_000_000_000, "it lasted {} ns", performed.lasted_ns);
}

#[test]
fn what_is_no_code_is_never_asked_for() {
    let long = "a".repeat(100);
    for code in ["abc\\r\\nX-Evil: 1", "a b", &long] {
        let body = format!("{{\"short_code\":\"{code}\"}}");
        let answer = format!("HTTP/1.1 201 Created\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        let raw = Raw::start(move |talk| {
            while let Some(request) = talk.request() {
                talk.say(if request == "POST /shorten" { answer.as_bytes() } else { FINE });
            }
        });
        let toml = r#"
[traffic.create]
request = "POST /shorten"
body = '{"original_url":"{target}"}'
expect = { status = [201] }
yields = { code = "json:short_code" }
[traffic.readback]
request = "GET /{code}"
code = { pick = "fresh", from = "create", delay = "1ms" }
[[phase]]
name = "only"
for = "300ms"
rate = 200
mix = { create = 1, readback = 1 }
"#;
        let performed = perform(raw.address(), 1, toml);
        assert_eq!(outcomes(&performed), [("wrong_body", 30), ("no_code", 30)], "{code}");
        let others: Vec<_> = raw.seen().into_iter().filter(|(_, request)| request != "POST /shorten").collect();
        assert!(others.is_empty(), "{code}: {others:?}");
    }
}

#[test]
fn what_comes_for_an_answer_has_a_name() {
    let fine = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";
    let check = |answer: &str, closes: bool, expected: &str| {
        let bytes = answer.as_bytes().to_vec();
        let raw = Raw::start(move |talk| {
            while talk.request().is_some() {
                if closes {
                    return talk.say_and_close(&bytes);
                }
                if !talk.say(&bytes) {
                    return;
                }
            }
        });
        let pool = r#"{ kind = "pool", max = 2, when_full = "queue" }"#;
        let performed = perform(raw.address(), 1, &asks("timeout = \"1s\"", pool, 100, "100ms"));
        assert_eq!(outcomes(&performed), [(expected, 10)], "{answer:?}");
        assert_eq!((raw.seen().len(), distinct(&raw)), (10, 10), "{answer:?}: each was sent once");
    };
    check(fine, false, "ok");
    check(&format!("HTTP/1.1 100 Continue\r\n\r\n{fine}"), false, "ok");
    check(&format!("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 P\r\n\r\n{fine}"), false, "ok");
    check("HTTP/1.1 200 OK\r\n\r\nas long as it lasts", true, "ok");
    check("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", true, "ok");
    check("", true, "closed_early");
    check("HTTP/1.1 100 Continue\r\n\r\n", true, "closed_early");
    check("HTTP/1.1 200 OK\r\nContent-Le", true, "closed_early");
    check("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345", true, "closed_early");
    check("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12", true, "closed_early");
    check("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", false, "protocol_error");
    check("\u{16}\u{3}\u{1}\0 no HTTP at all\r\n\r\n", false, "protocol_error");
    check("SSH-2.0-OpenSSH_9.9\r\n", false, "protocol_error");
    check("HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\nhi", false, "protocol_error");
    check("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", false, "protocol_error");
}
