//! The stub through a client that knows nothing of it but HTTP: each fault of the script, and that its truth is one.
//!
//! Times are compared with bounds from below alone: a machine may be late, a script must not be early.

#![expect(clippy::unwrap_used, reason = "a test's helpers are tests")]

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use loadgen::clock::now_ns;
use loadgen::links::target_of;
use loadgen::stub::Stub;
use loadgen::stub::script::{DRIP_BYTES, Script};
use loadgen::stub::truth::Truth;

const MS: u64 = 1_000_000;
const PATIENCE: Duration = Duration::from_secs(20);

struct Client {
    stream: BufReader<TcpStream>,
}

#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: u16,
    /// As written, the status line first.
    head: Vec<String>,
    body: Vec<u8>,
}

impl Client {
    fn new(stub: &Stub) -> Self {
        let stream = TcpStream::connect(stub.address()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream: BufReader::new(stream) }
    }

    fn send(&mut self, bytes: &str) {
        self.stream.get_mut().write_all(bytes.as_bytes()).unwrap();
    }

    /// One whole answer, or none where the connection ended before its first byte.
    fn answer(&mut self) -> std::io::Result<Option<Answer>> {
        let mut head = Vec::new();
        loop {
            let mut line = String::new();
            if self.stream.read_line(&mut line)? == 0 {
                assert!(head.is_empty(), "the connection ended within {head:?}");
                return Ok(None);
            }
            let line = line.trim_end().to_owned();
            if line.is_empty() {
                break;
            }
            head.push(line);
        }
        let status = head[0].split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status line");
        let length = head.iter().find_map(|line| line.strip_prefix("content-length: ")).expect("a length");
        let mut body = vec![0; length.parse().unwrap()];
        self.stream.read_exact(&mut body)?;
        Ok(Some(Answer { status, head, body }))
    }

    fn ask(&mut self, bytes: &str) -> Answer {
        self.send(bytes);
        self.answer().unwrap().expect("an answer")
    }

    /// A redirect's status and how long it took, counted as the stub counts.
    fn timed(&mut self, code: &str) -> (u16, u64) {
        let intended_ns = now_ns();
        let answer = self.ask(&marked(code, intended_ns));
        (answer.status, now_ns() - intended_ns)
    }
}

fn marked(code: &str, intended_ns: u64) -> String {
    format!("GET /{code} HTTP/1.1\r\nX-Loadgen-Intended: {intended_ns}\r\n\r\n")
}

fn location(code: &str) -> String {
    format!("Location: {}", String::from_utf8_lossy(&target_of(code.as_bytes())))
}

fn stub(flags: &[(&str, &str)]) -> (Stub, Script) {
    let mut script = Script::default();
    for (flag, value) in flags {
        script.set(flag, value).unwrap();
    }
    (Stub::start(SocketAddr::from(([127, 0, 0, 1], 0)), script.clone()).unwrap(), script)
}

fn check_sums(truth: &Truth, marked: u64, unanswered: u64) {
    assert_eq!((truth.marked, truth.unanswered()), (marked, unanswered));
    assert_eq!(truth.arrival.len(), marked);
}

#[test]
fn it_answers_as_a_server_of_short_links_does() {
    let (stub, _) = stub(&[]);
    let check = |request: &str, status: u16, line: &str, body: &str| {
        let answer = Client::new(&stub).ask(request);
        assert_eq!((answer.status, String::from_utf8_lossy(&answer.body).as_ref()), (status, body), "{request}");
        assert!(answer.head.iter().any(|head| head == line), "{line} is not in {answer:?}");
    };
    check("GET /abc HTTP/1.1\r\nHost: a\r\n\r\n", 307, &location("abc"), "");
    check("GET /abc?x=1 HTTP/1.1\r\nHost: a\r\n\r\n", 307, &location("abc"), "");
    check("HEAD /abc HTTP/1.1\r\nHost: a\r\n\r\n", 307, "Cache-Control: private, max-age=90", "");
    check("GET /missing1 HTTP/1.1\r\nHost: a\r\n\r\n", 404, "content-length: 0", "");
    check("GET / HTTP/1.1\r\nHost: a\r\n\r\n", 404, "content-length: 0", "");
    check("GET /healthz HTTP/1.1\r\nX-Request-Id: 7f\r\n\r\n", 200, "X-Request-Id: 7f", "");
    check("GET /stats/abc HTTP/1.1\r\nHost: a\r\n\r\n", 200, "Content-Type: application/json", "{}");
    check("DELETE /abc HTTP/1.1\r\nHost: a\r\n\r\n", 405, "Allow: GET, HEAD, POST", "");
    check("POST /shorten HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 400, "content-length: 0", "");
    assert_eq!(stub.stop().unwrap().connections, 9);
}

#[test]
fn what_was_created_is_redirected_to() {
    let (stub, _) = stub(&[]);
    let mut client = Client::new(&stub);
    let answer =
        client.ask("POST /shorten HTTP/1.1\r\nContent-Length: 38\r\n\r\n{\"original_url\":\"https://a.example/x\"}");
    let body = "{\"short_code\":\"0000000\",\"original_url\":\"https://a.example/x\"}";
    assert_eq!((answer.status, String::from_utf8_lossy(&answer.body).as_ref()), (201, body));
    let answer = client.ask("GET /0000000 HTTP/1.1\r\n\r\n");
    assert!(answer.head.contains(&"Location: https://a.example/x".to_owned()), "{answer:?}");
    let body = "{\"original_url\":\"https://a.example/y\",\"custom_code\":\"spring\"}";
    let post = format!("POST /shorten HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    assert_eq!([client.ask(&post).status, client.ask(&post).status], [201, 409]);
}

#[test]
fn connections_end_when_the_client_says_so_or_speaks_no_http() {
    let (stub, _) = stub(&[]);
    let mut client = Client::new(&stub);
    let answer = client.ask("GET /abc HTTP/1.1\r\nConnection: close\r\n\r\n");
    assert!(answer.head.contains(&"connection: close".to_owned()), "{answer:?}");
    assert_eq!(client.answer().unwrap(), None);
    let mut client = Client::new(&stub);
    client.send("\0\0\0\0\r\n\r\n");
    assert!(!matches!(client.answer(), Ok(Some(_))), "garbage was answered");
}

/// Answers keep the order of requests though each second one is ready at once, however the bytes arrive.
#[test]
fn pipelined_answers_keep_their_order() {
    let (stub, _) = stub(&[("slow", "50%@2ms")]);
    let mut client = Client::new(&stub);
    let codes: Vec<String> = (0..200).map(|number| format!("code{number}")).collect();
    let requests: String = codes.iter().map(|code| marked(code, now_ns())).collect();
    for part in requests.as_bytes().chunks(1_021) {
        client.stream.get_mut().write_all(part).unwrap();
    }
    for code in &codes {
        let answer = client.answer().unwrap().unwrap();
        assert!(answer.head.contains(&location(code)), "{code}: {answer:?}");
    }
    check_sums(&stub.stop().unwrap(), 200, 0);
}

/// A client that sends without reading must neither be forgotten nor fill the memory.
#[test]
fn a_client_that_reads_late_gets_every_answer() {
    let (stub, _) = stub(&[]);
    let mut reader = Client::new(&stub);
    let mut writer = reader.stream.get_ref().try_clone().unwrap();
    const REQUESTS: usize = 100_000;
    let thread = std::thread::spawn(move || {
        let requests = "GET /abc HTTP/1.1\r\n\r\n".repeat(1_000);
        for _ in 0..REQUESTS / 1_000 {
            writer.write_all(requests.as_bytes()).unwrap();
        }
    });
    for _ in 0..REQUESTS {
        assert_eq!(reader.answer().unwrap().unwrap().status, 307);
    }
    thread.join().unwrap();
    assert_eq!(stub.stop().unwrap().requests, REQUESTS as u64);
}

#[test]
fn a_stall_is_as_long_as_it_should_be() {
    let (stub, _) = stub(&[("stall", "300ms@100ms")]);
    let mut client = Client::new(&stub);
    let mut longest_ns = 0;
    let begin_ns = now_ns();
    stub.start_clock();
    let mut asked = 0;
    while now_ns() - begin_ns < 450 * MS {
        longest_ns = longest_ns.max(client.timed("abc").1);
        asked += 1;
    }
    let truth = stub.stop().unwrap();
    check_sums(&truth, asked, 0);
    assert!(longest_ns >= 250 * MS, "a request at the stall's begin took {longest_ns} ns");
    // Three digits of the histogram.
    assert!(truth.right.max() as f64 <= longest_ns as f64 * 1.001, "{} against {longest_ns}", truth.right.max());
    assert!(truth.right.max() >= 250 * MS);
}

#[test]
fn a_stall_without_end_can_be_stopped() {
    let (stub, _) = stub(&[("stall", "forever@0s")]);
    stub.start_clock();
    let mut client = Client::new(&stub);
    client.stream.get_ref().set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    client.send(&marked("abc", now_ns()));
    assert_eq!(client.answer().expect_err("an answer").kind(), ErrorKind::WouldBlock);
    let truth = stub.stop().unwrap();
    assert_eq!((truth.requests, truth.connections), (0, 0));
}

#[test]
fn one_connection_of_four_is_never_answered() {
    let (stub, script) = stub(&[("stuck", "1/4")]);
    let mut answered = 0;
    for number in 0..8 {
        let mut client = Client::new(&stub);
        if script.sticks(number) {
            client.stream.get_ref().set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            client.send(&marked("abc", now_ns()));
            assert_eq!(client.answer().expect_err("an answer").kind(), ErrorKind::WouldBlock);
        } else {
            assert_eq!(client.timed("abc").0, 307);
            answered += 1;
        }
    }
    assert_eq!(answered, 6);
    check_sums(&stub.stop().unwrap(), 8, 2);
}

#[test]
fn while_it_does_not_accept_open_connections_go_on() {
    let (stub, _) = stub(&[("accept-stall", "400ms@0s")]);
    let mut open = Client::new(&stub);
    // The first request begins the script's time.
    let begin_ns = now_ns();
    assert_eq!(open.timed("abc").0, 307);
    let mut late = Client::new(&stub);
    late.send(&marked("abc", now_ns()));
    let (_, took_ns) = open.timed("abc");
    assert!(took_ns < 400 * MS, "an open connection waited {took_ns} ns");
    assert_eq!(late.answer().unwrap().unwrap().status, 307);
    assert!(now_ns() - begin_ns >= 400 * MS);
    check_sums(&stub.stop().unwrap(), 3, 0);
}

/// Which requests are slow is known beforehand, and truth says exactly those.
#[test]
fn the_slow_share_is_known() {
    let (stub, script) = stub(&[("service", "100us"), ("slow", "5%@30ms")]);
    let mut client = Client::new(&stub);
    let requests: u64 = 400;
    for number in 0..requests {
        let (_, took_ns) = client.timed("abc");
        assert!(took_ns >= script.service_of(number), "request {number} took {took_ns} ns");
    }
    let slow = (0..requests).filter(|&number| script.service_of(number) == 30 * MS).count() as u64;
    assert!(slow > 0);
    let truth = stub.stop().unwrap();
    check_sums(&truth, requests, 0);
    assert!(truth.right.count_between(30 * MS, u64::MAX) >= slow);
    assert!(truth.right.min() >= 100_000);
}

#[test]
fn failing_is_fast_and_apart() {
    let (stub, _) = stub(&[("service", "50ms"), ("fail", "503:100ms@0s")]);
    stub.start_clock();
    let mut client = Client::new(&stub);
    let (mut failed, mut right) = (0, 0);
    while right < 2 {
        match client.timed("abc") {
            (503, _) => failed += 1,
            (307, took_ns) => {
                assert!(took_ns >= 50 * MS);
                right += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    let truth = stub.stop().unwrap();
    check_sums(&truth, failed + right, 0);
    assert_eq!((truth.wrong.len(), truth.right.len()), (failed, right));
    assert!(failed > 0 && truth.right.min() >= 49 * MS);
}

#[test]
fn resets_are_resets() {
    let (stub, script) = stub(&[("reset", "30%")]);
    let mut reset = 0;
    for number in 0..50 {
        let mut client = Client::new(&stub);
        client.send(&marked("abc", now_ns()));
        match client.answer() {
            Ok(Some(answer)) => assert_eq!((answer.status, script.resets(number)), (307, false)),
            Ok(None) => panic!("request {number} was closed without a reset"),
            Err(error) => {
                assert_eq!((error.kind(), script.resets(number)), (ErrorKind::ConnectionReset, true));
                reset += 1;
            }
        }
    }
    assert!(reset > 0);
    check_sums(&stub.stop().unwrap(), 50, reset);
}

#[test]
fn a_body_drips() {
    let (stub, _) = stub(&[("drip", "2ms")]);
    let mut client = Client::new(&stub);
    let begin_ns = now_ns();
    let requests = [marked("a", begin_ns), marked("b", begin_ns)].concat();
    client.send(&requests);
    for code in ["a", "b"] {
        let answer = client.answer().unwrap().unwrap();
        assert!(answer.head.contains(&location(code)));
        assert_eq!(answer.body.len() as u64, DRIP_BYTES);
    }
    assert!(now_ns() - begin_ns >= 2 * DRIP_BYTES * 2 * MS);
    let truth = stub.stop().unwrap();
    check_sums(&truth, 2, 0);
    assert!(truth.right.min() as f64 >= (DRIP_BYTES * 2 * MS) as f64 * 0.999);
}

/// 50 requests at once and 1,000 turns a second: the k-th is answered after k milliseconds at the earliest.
#[test]
fn capacity_makes_a_queue() {
    let (stub, _) = stub(&[("capacity", "1k")]);
    let mut clients: Vec<Client> = (0..5).map(|_| Client::new(&stub)).collect();
    let begin_ns = now_ns();
    for client in &mut clients {
        client.send(&marked("abc", begin_ns).repeat(10));
    }
    for client in &mut clients {
        for _ in 0..10 {
            assert_eq!(client.answer().unwrap().unwrap().status, 307);
        }
    }
    assert!(now_ns() - begin_ns >= 50 * MS);
    let truth = stub.stop().unwrap();
    check_sums(&truth, 50, 0);
    assert!(truth.right.value_at_quantile(0.5) as f64 >= 25.0 * MS as f64 * 0.999);
    assert!(truth.right.max() as f64 >= 50.0 * MS as f64 * 0.999);
}
