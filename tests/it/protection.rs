//! What a client can do to the server with bytes, their timing and their absence; and how the server stops.

use std::collections::HashSet;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;
use waypost::domain::key::DomainId;
use waypost::domain::time;

use crate::support::{
    Answer, Client, Direct, LIMIT, Server, Setup, embedded_only, eventually, key, metric, request, throughout,
};

const TARGET: &str = "https://example.com/target";

#[track_caller]
fn redirects(answer: &Answer) {
    assert_eq!((answer.status, answer.location()), (307, Some(TARGET)), "{answer:?}");
}

/// The statuses of the answers that come until the connection ends.
fn statuses(client: &mut Client) -> Vec<u16> {
    let mut statuses = Vec::new();
    loop {
        match client.next(false) {
            Ok(answer) => statuses.push(answer.status),
            Err(problem) => {
                assert!(!problem.starts_with("nothing came"), "the connection stays open after {statuses:?}");
                return statuses;
            }
        }
    }
}

fn get(code: &str) -> Vec<u8> {
    request("GET", &format!("/{code}"), &[], b"")
}

#[test]
fn heads_and_targets_have_a_limit() {
    let (_setup, server) = Server::new("");
    let code = server.warm(TARGET);
    let check = |path: &str, header_bytes: usize, want: u16| {
        let mut client = server.connect();
        let value = "x".repeat(header_bytes);
        let headers: &[(&str, &str)] = if value.is_empty() { &[] } else { &[("X-Filler", &value)] };
        // The server may answer and close before all of it is sent.
        client.try_send(request("GET", path, headers, b""));
        let answer = client.answer();
        assert_eq!(answer.status, want, "{header_bytes} bytes: {answer:?}");
        if matches!(want, 414 | 431) {
            assert_eq!(client.rest(), b"", "it goes on after {want}");
        } else {
            redirects(&client.get(&format!("/{code}")));
        }
    };
    check(&format!("/{code}"), 15 << 10, 307);
    check(&format!("/{code}"), 17 << 10, 431);
    check(&format!("/{code}"), 200 << 10, 431);
    check(&format!("/{}", "a".repeat(8191)), 0, 404);
    check(&format!("/{}", "a".repeat(8193)), 0, 414);
    check(&format!("/{code}?{}", "a".repeat(8193)), 0, 414);
    redirects(&server.get(&format!("/{code}")));
}

#[test]
fn a_redirect_takes_no_body() {
    let (_setup, server) = Server::new("");
    let code = server.warm(TARGET);
    let inside = String::from_utf8(get(&code)).unwrap();
    let check = |method: &str, headers: &str, body: &str, want: u16| {
        let mut client = server.connect();
        let head = format!("{method} /{code} HTTP/1.1\r\nHost: a\r\n{headers}\r\n");
        client.send(format!("{head}{body}"));
        let answer = client.next(method == "HEAD").unwrap();
        assert_eq!(answer.status, want, "{headers:?} {answer:?}");
        if want == 307 {
            redirects(&client.get(&format!("/{code}")));
            return;
        }
        assert!(answer.closes(), "{answer:?}");
        if want == 405 {
            assert_eq!(answer.header("allow"), Some("GET, HEAD"), "{answer:?}");
        }
        assert_eq!(String::from_utf8_lossy(&client.rest()), "", "something was answered out of the body: {headers:?}");
    };
    let chunked = format!("{:x}\r\n{inside}\r\n0\r\n\r\n", inside.len());
    for method in ["GET", "HEAD"] {
        check(method, "", "", 307);
        check(method, "Content-Length: 0\r\n", "", 307);
        check(method, &format!("Content-Length: {}\r\n", inside.len()), &inside, 400);
        check(method, "Content-Length: 5\r\n", &inside, 400);
        check(method, "Transfer-Encoding: chunked\r\n", &chunked, 400);
        check(method, "Transfer-Encoding: chunked\r\n", &format!("0\r\n\r\n{inside}"), 400);
    }
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"] {
        check(method, "", "", 405);
        check(method, &format!("Content-Length: {}\r\n", inside.len()), &inside, 405);
    }
}

#[test]
fn what_is_no_http_ends_the_connection() {
    let (_setup, server) = Server::new("");
    let code = server.warm(TARGET);
    let check = |bytes: &[u8]| {
        let mut client = server.connect();
        client.send(bytes);
        assert_eq!(statuses(&mut client), [400], "{}", String::from_utf8_lossy(bytes));
    };
    check(b"nonsense\r\n\r\n");
    check(b"GET / HTTP/1.1\r\nno colon\r\n\r\n");
    check(b"GET / HTTP/1.1\r\nBad\x01Name: x\r\n\r\n");
    check(b"GET / HTTP/9.9\r\n\r\n");
    check(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03");
    check(format!("GET /{code} HTTP/1.1\r\nX: a\0b\r\n\r\n").as_bytes());
    check(format!("GET /{code} HTTP/1.1\r\nHost : a\r\n\r\n").as_bytes());
    redirects(&server.get(&format!("/{code}")));
}

/// No answer waits for bytes that need not come: hyper's `pipeline_flush` did that.
#[test]
fn an_answer_waits_for_no_more_bytes() {
    let (_setup, server) = Server::new("");
    let code = server.warm(TARGET);
    let one = get(&code);
    let half = &one[..one.len() / 2];
    let check = |count: usize, after: &[u8], rest: &[u8]| {
        let mut client = server.connect();
        for round in 0..3 {
            client.send([one.repeat(count).as_slice(), after].concat());
            for _ in 0..count {
                redirects(&client.answer());
            }
            if !rest.is_empty() {
                assert!(!client.is_closed(), "round {round}");
                client.send(rest);
                redirects(&client.answer());
            }
        }
    };
    for count in [1, 2, 16, 200] {
        check(count, b"", b"");
        check(count, b"\r\n", b"");
        check(count, half, &one[half.len()..]);
        check(count, &one[..1], &one[1..]);
        check(count, &one[..one.len() - 1], b"\n");
    }
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let (setup, server) = Server::new("");
    let store = setup.store();
    let target = |number: usize| format!("https://example.com/{number}");
    let links = (0..60).map(|number| (key(DomainId(0), &format!("c{number}")), Direct::fields(&target(number))));
    store.add_all(links.collect());
    let hot = server.warm(TARGET);
    let mut client = server.connect();
    // None of them is in memory, every other one is followed by one that is, and now and then there is none.
    let mut bytes = Vec::new();
    for number in 0..60 {
        bytes.extend(get(&format!("c{number}")));
        bytes.extend(get(&hot));
        bytes.extend(get(&format!("none{number}")));
        if number % 10 == 0 {
            bytes.extend(request("GET", "/healthz", &[], b""));
        }
    }
    client.send(bytes);
    for number in 0..60 {
        let answer = client.answer();
        assert_eq!((answer.status, answer.location()), (307, Some(target(number).as_str())), "{answer:?}");
        redirects(&client.answer());
        assert_eq!(client.answer().status, 404);
        if number % 10 == 0 {
            assert_eq!(client.answer().json(), json!({"status": "pass"}));
        }
    }
}

#[test]
fn a_head_has_its_time() {
    let (_setup, server) = Server::new("[connections]\nheader_timeout = \"300ms\"");
    let code = server.warm(TARGET);
    let path = format!("/{code}");
    let within = Duration::from_secs(3);
    let mut silent = server.connect();
    silent.send("GET /abc HTTP/1.1\r\nHost: a\r\n");
    let mut later = server.connect();
    redirects(&later.get(&path));
    later.send("GET /abc HT");
    let mut dripping = server.connect();
    dripping.send("GET /abc HTTP/1.1\r\n");
    eventually(within, "a head that does not go on is closed", || silent.is_closed());
    eventually(within, "a second head that does not go on is closed", || later.is_closed());
    eventually(within, "a byte now and then buys no time", || !dripping.try_send("X") || dripping.is_closed());
    // Who sends nothing at all is idle, and slow only later.
    let mut idle = server.connect();
    throughout(Duration::from_secs(1), || assert!(!idle.is_closed()));
    redirects(&idle.get(&path));
    assert!(server.metric("waypost_connections_closed_total", &["reason=\"slow\""]) >= 3.0);
}

/// hyper has the half head in its buffer, and no byte comes that would show that a head has begun: it counts as idle.
#[test]
fn a_head_that_came_with_the_request_before_it_has_its_time() {
    let (_setup, server) = Server::new("[connections]\nidle_timeout = \"500ms\"");
    let code = server.warm(TARGET);
    let mut client = server.connect();
    client.send([get(&code).as_slice(), b"GET /abc HTTP/1.1\r\n"].concat());
    redirects(&client.answer());
    eventually(Duration::from_secs(3), "the half head is closed", || client.is_closed());
}

#[test]
fn idle_connections_are_closed_and_active_ones_are_not() {
    let (_setup, server) = Server::new("[connections]\nidle_timeout = \"400ms\"");
    let code = server.warm(TARGET);
    let path = format!("/{code}");
    let (mut active, mut idle, mut never) = (server.connect(), server.connect(), server.connect());
    redirects(&idle.get(&path));
    let mut closed = (false, false);
    throughout(Duration::from_secs(2), || {
        redirects(&active.get(&path));
        closed = (closed.0 || idle.is_closed(), closed.1 || never.is_closed());
    });
    assert_eq!(closed, (true, true), "the idle one, the one that never asked");
    redirects(&active.get(&path));
}

#[test]
fn connections_have_a_limit() {
    let setup = Setup::new("[connections]\nmax = 3").argument("--workers").argument("1");
    let server = setup.start();
    let code = server.link(TARGET);
    let path = format!("/{code}");
    let mut open: Vec<Client> = Vec::new();
    // The link was made on a connection that the server may not have seen the end of yet.
    eventually(LIMIT, "room for three", || {
        let mut client = server.connect();
        client.send(get(&code));
        match client.next(false) {
            Ok(answer) => {
                redirects(&answer);
                open.push(client);
            }
            Err(_) => assert!(open.is_empty(), "{} connections were one too many", open.len() + 1),
        }
        open.len() == 3
    });
    let mut refused = server.connect();
    refused.try_send(get(&code));
    assert_eq!(refused.rest(), b"");
    for client in &mut open {
        redirects(&client.get(&path));
    }
    let text = open[0].get("/metrics").text();
    assert!(metric(&text, "waypost_connections_closed_total", &["reason=\"cap\""]) >= 1.0, "{text}");
    assert_eq!(metric(&text, "waypost_connections", &[]), 3.0);
    open.pop();
    eventually(LIMIT, "room for one more", || {
        let mut client = server.connect();
        client.try_send(get(&code)) && client.next(false).is_ok_and(|answer| answer.status == 307)
    });
}

#[test]
fn out_of_descriptors_it_goes_on() {
    // The limit of connections must not come first.
    let setup = Setup::new("[connections]\nmax = 1000").argument("--workers").argument("1").shell("ulimit -n 64");
    let server = setup.start();
    let code = server.warm(TARGET);
    let path = format!("/{code}");
    let mut first = server.connect();
    redirects(&first.get(&path));
    let mut crowd: Vec<Client> = (0..100).map(|_| server.connect()).collect();
    let figure = |client: &mut Client, reason: &str| {
        metric(&client.get("/metrics").text(), "waypost_connections_closed_total", &[reason])
    };
    eventually(LIMIT, "some are turned away", || figure(&mut first, "reason=\"no_descriptor\"") > 10.0);
    // New ones still come, one after the other, and each is turned away at once.
    let (cpu, mut turned_away) = (server.cpu(), 0);
    let span = Duration::from_secs(1);
    throughout(span, || {
        redirects(&first.get(&path));
        if turned_away < 20 {
            let mut late = server.connect();
            if late.try_send(get(&code)) && late.next(false).is_ok_and(|answer| answer.status == 307) {
                // A connection to the store has ended meanwhile, and left its descriptor: this one keeps it.
                crowd.push(late);
            } else {
                turned_away += 1;
            }
        }
    });
    assert!(turned_away >= 5, "{turned_away}: each is to be turned away at once");
    let taken = server.cpu() - cpu;
    assert!(taken < span / 3, "the loop spins: {taken:?} of {span:?}");
    let served = crowd.iter_mut().map(Client::is_closed).filter(|closed| !closed).count();
    assert!((10..64).contains(&served), "{served} of the crowd are connected");
    crowd.clear();
    eventually(LIMIT, "a new one is served", || {
        let mut client = server.connect();
        client.try_send(get(&code)) && client.next(false).is_ok_and(|answer| answer.status == 307)
    });
    redirects(&first.get(&path));
    server.stop();
}

#[test]
fn who_sends_no_more_still_gets_an_answer() {
    let (_setup, server) = Server::new("");
    let hot = server.warm(TARGET);
    let cold = server.link(TARGET);
    let bearer = format!("Bearer {}", server.admin_key());
    let headers = [("Content-Type", "application/json"), ("Authorization", bearer.as_str())];
    let shorten = request("POST", "/shorten", &headers, br#"{"original_url": "https://example.com/"}"#);
    let check = |bytes: &[u8], want: &[u16]| {
        let mut client = server.connect();
        client.send(bytes);
        client.stream().shutdown(Shutdown::Write).unwrap();
        assert_eq!(statuses(&mut client), want, "{}", String::from_utf8_lossy(bytes));
    };
    check(&get(&hot), &[307]);
    check(&get(&hot).repeat(3), &[307; 3]);
    check(&get(&cold), &[307]);
    check(&get("unknown"), &[404]);
    check(&shorten, &[201]);
    check(b"", &[]);
    check(&[get(&hot).as_slice(), &get(&hot)[..20]].concat(), &[307]);
    eventually(LIMIT, "nothing stays open", || server.metric("waypost_connections", &[]) <= 1.0);
}

#[test]
fn who_is_gone_leaves_nothing_behind() {
    let (_setup, server) = Server::new("");
    let code = server.warm(TARGET);
    let reset = |bytes: &[u8]| {
        let mut client = server.connect();
        client.send(bytes);
        let socket = socket2::SockRef::from(client.stream());
        socket.set_linger(Some(Duration::ZERO)).unwrap();
    };
    for _ in 0..20 {
        reset(b"");
        reset(&get(&code));
        reset(&get(&code)[..10]);
        reset(&get(&code).repeat(100));
        reset(&get("unknown"));
        reset(b"POST /shorten HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{");
    }
    eventually(LIMIT, "all are gone", || server.metric("waypost_connections", &[]) <= 1.0);
    redirects(&server.get(&format!("/{code}")));
    server.stop();
}

#[test]
fn a_request_in_segments_of_a_byte() {
    let (_setup, server) = Server::new("");
    let code = server.link(TARGET);
    let mut client = server.connect();
    for _ in 0..3 {
        for byte in get(&code) {
            client.send([byte]);
        }
        redirects(&client.answer());
    }
    let bearer = format!("Bearer {}", server.admin_key());
    let headers = [("Content-Type", "application/json"), ("Authorization", bearer.as_str())];
    for byte in request("POST", "/shorten", &headers, br#"{"original_url": "https://example.com/"}"#) {
        client.send([byte]);
    }
    assert_eq!(client.answer().status, 201);
}

/// RFC 9112, sections 6.1, 6.3 and 11.2: where it is not certain where a request ends, nothing behind it is one.
#[test]
fn nothing_is_answered_out_of_a_body() {
    let (_setup, server) = Server::new("");
    let code = server.warm(TARGET);
    let inside = String::from_utf8(get(&code)).unwrap();
    let all = inside.len() + 5;
    let check = |framing: &str, body: &str| {
        let mut client = server.connect();
        let head = "POST /shorten HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n";
        client.send(format!("{head}{framing}\r\n{body}"));
        let answered = statuses(&mut client);
        assert!(answered.len() == 1 && answered[0] >= 400, "{framing:?}: {answered:?}");
    };
    let ended = format!("0\r\n\r\n{inside}");
    check(&format!("Content-Length: {all}\r\nTransfer-Encoding: chunked\r\n"), &ended);
    check(&format!("Transfer-Encoding: chunked\r\nContent-Length: {all}\r\n"), &ended);
    check("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", &ended);
    check("Content-Length: 5\r\nContent-Length: 6\r\n", &ended);
    check("Content-Length: 5, 6\r\n", &ended);
    check("Content-Length: +5\r\n", &ended);
    check("Content-Length: -1\r\n", &ended);
    check("Content-Length: 0x5\r\n", &ended);
    check("Transfer-Encoding: xchunked\r\n", &ended);
    check("Transfer-Encoding: identity\r\n", &ended);
    check("Transfer-Encoding: chunked, identity\r\n", &ended);
    check("Transfer-Encoding : chunked\r\n", &ended);
    check("Transfer-Encoding: chunked\r\n", &format!("5;\n{inside}"));
    check("Transfer-Encoding: chunked\r\n", &format!("fffffffffffffffff\r\n{inside}"));
    check("Transfer-Encoding: chunked\r\n", &format!("-1\r\n{inside}"));
}

#[test]
fn a_connection_is_kept() {
    let (_setup, server) = Server::new("");
    let code = server.warm(TARGET);
    let path = format!("/{code}");
    let mut client = server.connect();
    for round in 0..50 {
        redirects(&client.get(&path));
        assert_eq!(client.get("/unknown").status, 404);
        assert_eq!(client.get("/healthz").status, 200);
        let status = client.ask("POST", "/shorten", &[("Content-Type", "application/json")], b"{}").status;
        assert!(matches!(status, 401 | 429), "{round}: {status}");
    }
    let check = |bytes: &str, stays: bool| {
        let mut client = server.connect();
        client.send(bytes);
        redirects(&client.answer());
        if stays {
            redirects(&client.get(&path));
        } else {
            assert_eq!(client.rest(), b"", "{bytes}");
        }
    };
    check(&format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"), false);
    check(&format!("GET {path} HTTP/1.0\r\n\r\n"), false);
    check(&format!("GET {path} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"), true);
    check(&format!("GET http://elsewhere.example{path} HTTP/1.1\r\nHost: a\r\n\r\n"), true);
    check(&format!("GET {path} HTTP/1.1\r\n\r\n"), true);
    check(&format!("\r\n\r\nGET {path} HTTP/1.1\r\nHost: a\r\n\r\n"), true);
}

/// A request whose body is still on its way.
fn half_a_shorten(server: &Server) -> (Client, &'static str) {
    let mut client = server.connect();
    let body = r#"{"original_url": "https://example.com/"}"#;
    let key = server.admin_key();
    client.send(format!(
        "POST /shorten HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nAuthorization: Bearer {key}\r\n\
         Expect: 100-continue\r\nContent-Length: {}\r\n\r\n",
        body.len(),
    ));
    // Now back has it and waits for the body.
    assert_eq!(client.answer().status, 100);
    client.send(&body[..10]);
    (client, &body[10..])
}

#[test]
fn a_request_in_flight_is_answered_before_the_end() {
    let (setup, server) = Server::new("");
    let (mut client, rest) = half_a_shorten(&server);
    server.signal(Signal::TERM);
    server.logged("draining");
    // Idle connections go at once, this one does not.
    throughout(Duration::from_millis(600), || assert!(!client.is_closed()));
    client.send(rest);
    let answer = client.answer();
    assert_eq!(answer.status, 201, "{answer:?}");
    assert!(answer.closes(), "{answer:?}");
    assert_eq!(client.rest(), b"");
    let log = server.ends();
    assert!(!log.iter().any(|line| line.contains("the grace is over")), "{log:?}");
    let code = answer.json()["short_code"].as_str().unwrap().to_owned();
    assert_eq!(setup.start().get(&format!("/{code}")).status, 307);
}

#[test]
fn the_grace_ends() {
    let (_setup, server) = Server::new("[shutdown]\ngrace = \"500ms\"");
    let (mut client, _) = half_a_shorten(&server);
    let begun = time::monotonic();
    let log = server.stop();
    let took = time::monotonic().duration_since(begun);
    assert!((Duration::from_millis(500)..Duration::from_secs(5)).contains(&took), "{took:?}");
    assert!(log.iter().any(|line| line.contains("the grace is over")), "{log:?}");
    assert!(client.next(false).is_err());
}

#[test]
fn idle_connections_end_with_the_server() {
    let (_setup, server) = Server::new("[shutdown]\ngrace = \"60s\"");
    let code = server.warm(TARGET);
    let mut clients: Vec<Client> = (0..10).map(|_| server.connect()).collect();
    for client in &mut clients[..5] {
        redirects(&client.get(&format!("/{code}")));
    }
    server.stop();
    for client in &mut clients {
        assert_eq!(client.rest(), b"");
    }
}

/// A client that keeps asking is told by `Connection: close`, never by a reset.
#[test]
fn no_request_is_lost_to_a_stop() {
    let (_setup, server) = Server::new("");
    let code = server.warm(TARGET);
    let (address, asked, stopped) = (server.address(), AtomicU32::new(0), AtomicBool::new(false));
    let ask = |path: &str| {
        let mut client = Client::connect(address);
        loop {
            client.send(request("GET", path, &[], b""));
            let answer = client.next(false).expect("an answer to each request");
            asked.fetch_add(1, Ordering::Relaxed);
            if answer.closes() {
                assert!(stopped.load(Ordering::SeqCst), "{answer:?}");
                assert_eq!(client.rest(), b"");
                return;
            }
        }
    };
    let ask = &ask;
    std::thread::scope(|scope| {
        let (path, unknown) = (format!("/{code}"), "/unknown".to_owned());
        let paths = [path.clone(), path.clone(), path, unknown, "/healthz".to_owned()];
        let clients: Vec<_> = paths.into_iter().map(|path| scope.spawn(move || ask(&path))).collect();
        eventually(LIMIT, "requests", || asked.load(Ordering::Relaxed) > 1000);
        stopped.store(true, Ordering::SeqCst);
        server.stop();
        clients.into_iter().for_each(|client| client.join().unwrap());
    });
}

#[test]
fn while_it_drains_it_says_so_and_still_serves() {
    let (_setup, server) = Server::new("[shutdown]\ndrain = \"1s\"");
    let code = server.warm(TARGET);
    server.signal(Signal::TERM);
    server.logged("draining");
    let answer = server.get("/readyz");
    assert_eq!((answer.status, &answer.json()["status"]), (503, &json!("draining")));
    assert_eq!(server.get("/healthz").status, 200);
    redirects(&server.get(&format!("/{code}")));
    server.ends();
}

/// A connection that waits in the queue when the signal comes is one that the client has been promised.
#[test]
fn what_waits_in_the_queue_is_served_before_the_end() {
    let (_setup, server) = Server::new("");
    let code = server.warm(TARGET);
    server.signal(Signal::STOP);
    let mut clients: Vec<Client> = (0..50).map(|_| server.connect()).collect();
    for client in &mut clients {
        client.send(get(&code));
    }
    server.signal(Signal::TERM);
    server.signal(Signal::CONT);
    for client in &mut clients {
        redirects(&client.answer());
    }
    server.ends();
}

#[test]
fn an_export_waits_for_its_reader() {
    if embedded_only("the bar is for a process without connections to a store") {
        return;
    }
    // What the allocator keeps for later is not what the export takes: it gives everything back at once here.
    let setup = Setup::new("").variable("MIMALLOC_PURGE_DELAY", "0");
    let server = setup.start();
    let store = setup.store();
    for thousand in 0..20 {
        let link = |number: usize| {
            let target = format!("https://example.com/{thousand}-{number}/{}", "x".repeat(1500));
            (key(DomainId(0), &format!("l{thousand}-{number}")), Direct::fields(&target))
        };
        store.add_all((0..1000).map(link).collect());
    }
    let bearer = format!("Bearer {}", server.admin_key());
    let headers = [("Authorization", bearer.as_str())];
    // Those that are read to their end bring threads, connections to the store and the allocator up to their size.
    for _ in 0..2 {
        server.connect().ask("GET", "/api/v1/export", &headers, b"");
    }
    let whole = server.connect().ask("GET", "/api/v1/export?format=ndjson", &headers, b"");
    let codes: HashSet<String> = whole
        .text()
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["code"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!((whole.status, codes.len()), (200, 20_000));
    // Not VmRSS: pages of the store's file that are mapped are the kernel's to take back.
    let before = server.memory_kib("RssAnon");
    let mut deaf = Client::connect_narrow(server.address());
    deaf.send(request("GET", "/api/v1/export?format=ndjson", &headers, b""));
    let mut most = before;
    let mut last = (time::monotonic(), server.cpu());
    eventually(LIMIT, "it stops to work for who does not read", || {
        most = most.max(server.memory_kib("RssAnon"));
        let cpu = server.cpu();
        if cpu > last.1 + Duration::from_millis(20) {
            last = (time::monotonic(), cpu);
        }
        time::monotonic().duration_since(last.0) > Duration::from_secs(1)
    });
    assert!(most < before + 1024, "{before} KiB before, {most} KiB while nobody reads");
    let mut start = [0; 12];
    deaf.stream().peek(&mut start).unwrap();
    assert_eq!(&start, b"HTTP/1.1 200", "it had begun");
}
