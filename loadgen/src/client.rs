//! A blocking HTTP/1.1 client for all that is beside the measured load: seeding, questions before a run.
//!
//! In: requests. Out: whole answers. Never: follows a redirect, waits longer than its time-out for one answer, sends a
//! request again that may have been carried out, unless it only reads (RFC 9112, 9.3.1). At its limit: a body of more
//! than [`BODY_MAX`] bytes is an error; pipelined requests go out [`IN_FLIGHT_MAX`] at a time.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use httparse::Header;

use crate::clock::now_ns;
use crate::engine::address;
use crate::engine::http::{FIELDS_MAX, Head, Progress, Reader, Step};

/// Bytes of an answer's body.
pub const BODY_MAX: usize = 1024 * 1024;
/// Requests that wait for their answers on the connection: few enough for the kernel's buffers in both directions, so
/// that neither side can wait for the other to read.
pub const IN_FLIGHT_MAX: usize = 64;

/// A connection that is opened anew when the server has closed it.
#[derive(Debug)]
pub struct Client {
    address: SocketAddr,
    authority: String,
    local: Option<IpAddr>,
    timeout: Duration,
    connection: Option<Connection>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    /// Empty where there is none.
    pub location: Vec<u8>,
    /// As they came; bytes that are no UTF-8 are replaced.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    /// The first header of this name, in any case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(given, _)| given.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

impl Client {
    /// Opens the connection; `authority` is for `Host`, `timeout` for each request in all, opening included.
    pub fn connect(address: SocketAddr, authority: &str, timeout: Duration) -> Result<Self> {
        Self::connect_from(None, address, authority, timeout)
    }

    /// The same from an address of this machine.
    pub fn connect_from(
        local: Option<IpAddr>,
        address: SocketAddr,
        authority: &str,
        timeout: Duration,
    ) -> Result<Self> {
        let mut client = Self { address, authority: authority.to_owned(), local, timeout, connection: None };
        client.connection = Some(client.open()?);
        Ok(client)
    }

    /// Sends a request with `Host` and `Content-Length` beside `headers`, and waits for its answer.
    pub fn request(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<Answer> {
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\n", self.authority).into_bytes();
        for (name, value) in headers {
            request.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
        }
        if !body.is_empty() || !is_read_only(&request) {
            request.extend_from_slice(format!("Content-Length: {}\r\n", body.len()).as_bytes());
        }
        request.extend_from_slice(b"\r\n");
        request.extend_from_slice(body);
        let mut answer = None;
        self.pipeline(&[request], |_, came| answer = Some(came.clone()))?;
        answer.context("a request without an answer came back without an error")
    }

    /// Sends whole requests (head and body as they go over the wire) without waiting for each answer in turn, and calls
    /// `on` with the index and the answer of each, in order.
    pub fn pipeline(&mut self, requests: &[Vec<u8>], mut on: impl FnMut(usize, &Answer)) -> Result<()> {
        let mut answered = 0;
        while answered < requests.len() {
            let mut connection = match self.connection.take().filter(Connection::is_usable) {
                Some(connection) => connection,
                None => self.open()?,
            };
            let behind = requests.len().min(answered + IN_FLIGHT_MAX);
            let end = connection.exchange(&requests[answered..behind], self.timeout, |answer| {
                on(answered, answer);
                answered += 1;
            });
            let is_repeatable = connection.answered > 0 && requests[answered..behind].iter().all(|it| is_read_only(it));
            match end.with_context(|| self.context("asking"))? {
                End::Open => self.connection = Some(connection),
                End::Announced => {}
                End::Closed if is_repeatable => {}
                End::Closed => {
                    return Err(anyhow!("the server closed the connection before it answered"))
                        .with_context(|| self.context("asking"));
                }
            }
        }
        Ok(())
    }

    fn open(&self) -> Result<Connection> {
        let socket = address::socket(self.address, self.local).with_context(|| self.context("a socket for"))?;
        socket.connect_timeout(&self.address.into(), self.timeout).with_context(|| self.context("connecting to"))?;
        Ok(Connection { stream: socket.into(), reader: Reader::default(), bytes: Vec::new(), answered: 0 })
    }

    fn context(&self, doing: &str) -> String {
        match self.local {
            Some(local) => format!("{doing} {} from {local}", self.address),
            None => format!("{doing} {}", self.address),
        }
    }
}

fn is_head(request: &[u8]) -> bool {
    request.starts_with(b"HEAD ")
}

/// May be sent again when nobody knows whether it was carried out.
fn is_read_only(request: &[u8]) -> bool {
    request.starts_with(b"GET ") || is_head(request)
}

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    reader: Reader,
    /// Read from the stream, not yet by the reader.
    bytes: Vec<u8>,
    answered: u64,
}

/// How an exchange left the connection.
enum End {
    /// Ready for more.
    Open,
    /// Closed behind an answer that said so: later requests were not carried out (RFC 9112, 9.6).
    Announced,
    /// Closed between two answers: nobody knows about later requests.
    Closed,
}

impl Connection {
    /// The server has neither closed it nor said anything unasked.
    fn is_usable(&self) -> bool {
        let peek = || {
            self.stream.set_nonblocking(true)?;
            let peeked = self.stream.peek(&mut [0]);
            self.stream.set_nonblocking(false)?;
            peeked
        };
        self.bytes.is_empty() && peek().is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    /// Sends all of `requests`, then calls `on` with each answer.
    fn exchange(&mut self, requests: &[Vec<u8>], timeout: Duration, mut on: impl FnMut(&Answer)) -> Result<End> {
        self.send(&requests.concat(), &Deadline::in_time(timeout))?;
        for request in requests {
            let Some((answer, keep_alive)) = self.receive(is_head(request), &Deadline::in_time(timeout))? else {
                return Ok(End::Closed);
            };
            self.answered += 1;
            on(&answer);
            if !keep_alive {
                return Ok(End::Announced);
            }
        }
        Ok(End::Open)
    }

    fn send(&mut self, mut bytes: &[u8], deadline: &Deadline) -> Result<()> {
        while !bytes.is_empty() {
            self.stream.set_write_timeout(Some(deadline.left()?))?;
            match self.stream.write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                // An answer may have come before the end: what can be read will tell.
                Err(error) if is_closed(&error) => return Ok(()),
                Err(error) if is_to_be_repeated(&error) => {}
                Err(error) => return Err(error).context("sending"),
            }
        }
        Ok(())
    }

    /// The next answer, and whether the connection stays open; none: it was closed where an answer would begin.
    fn receive(&mut self, head_request: bool, deadline: &Deadline) -> Result<Option<(Answer, bool)>> {
        let mut received: Option<(Answer, bool)> = None;
        loop {
            let mut at = 0;
            let is_whole = loop {
                let Progress { consumed, step } = self.reader.read(&self.bytes[at..], head_request)?;
                at += consumed;
                match (step, &mut received) {
                    (Step::More, _) => break false,
                    (Step::Done, _) => break true,
                    (Step::Head(head), _) => received = Some((answer_of(&head), head.keep_alive)),
                    (Step::Body(piece), Some((answer, _))) if answer.body.len() + piece.len() <= BODY_MAX => {
                        answer.body.extend_from_slice(piece);
                    }
                    (Step::Body(_), _) => bail!("the answer's body is longer than {} KiB", BODY_MAX / 1024),
                }
            };
            self.bytes.drain(..at);
            if is_whole {
                return Ok(received);
            }
            let is_closed = !self.fill(deadline)?;
            if is_closed && self.reader.ends_by_close() {
                return Ok(received);
            }
            if is_closed && received.is_none() && self.bytes.is_empty() {
                return Ok(None);
            }
            ensure!(!is_closed, "the server closed the connection inside its answer");
        }
    }

    /// Reads what there is, waiting for it; false: the connection is closed.
    fn fill(&mut self, deadline: &Deadline) -> Result<bool> {
        let mut chunk = [0; 16 * 1024];
        loop {
            self.stream.set_read_timeout(Some(deadline.left()?))?;
            match self.stream.read(&mut chunk) {
                Ok(count) => {
                    self.bytes.extend_from_slice(&chunk[..count]);
                    return Ok(count > 0);
                }
                // A body that ends with the connection is not whole when that was reset.
                Err(error) if is_closed(&error) && !self.reader.ends_by_close() => return Ok(false),
                Err(error) if is_to_be_repeated(&error) => {}
                Err(error) => return Err(error).context("receiving"),
            }
        }
    }
}

/// Of one request.
struct Deadline {
    at_ns: u64,
    timeout: Duration,
}

impl Deadline {
    fn in_time(timeout: Duration) -> Self {
        Self { at_ns: now_ns().saturating_add(u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX)), timeout }
    }

    /// Never zero, which would mean "for ever" to a socket.
    fn left(&self) -> Result<Duration> {
        match self.at_ns.saturating_sub(now_ns()) {
            0 => bail!("no answer within {:?}", self.timeout),
            left => Ok(Duration::from_nanos(left).max(Duration::from_millis(1))),
        }
    }
}

fn is_closed(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted)
}

/// Interrupted, or its time is over: the deadline decides.
fn is_to_be_repeated(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

fn answer_of(head: &Head<'_>) -> Answer {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut response = httparse::Response::new(&mut fields);
    // The reader has found no fault with the same bytes.
    let _ = response.parse(head.raw);
    let header = |field: &Header<'_>| (field.name.to_owned(), String::from_utf8_lossy(field.value).into_owned());
    Answer {
        status: head.status,
        location: head.location.to_vec(),
        headers: response.headers.iter().map(header).collect(),
        body: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// What a scripted server does on one connection: waits until a request ends with this, then sends that, and closes
    /// after the last.
    type Script = &'static [(&'static str, &'static str)];

    fn serve(connections: &'static [Script]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for script in connections {
                let (mut stream, _) = listener.accept().unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                let mut read = Vec::new();
                for (until, answer) in *script {
                    while !read.ends_with(until.as_bytes()) {
                        let mut byte = [0];
                        if !matches!(stream.read(&mut byte), Ok(1)) {
                            return;
                        }
                        read.push(byte[0]);
                    }
                    stream.write_all(answer.as_bytes()).unwrap();
                }
            }
        });
        address
    }

    fn client(connections: &'static [Script]) -> Client {
        Client::connect(serve(connections), "sho.rt", Duration::from_secs(5)).unwrap()
    }

    const FOUND: &str = "HTTP/1.1 302 Found
Location: https://a/
Content-Length: 0

";
    const FOUND_CUT: &str = "HTTP/1.1 302 Found\r\nLocation: https://a/\r\nContent-Length: 1\r\n\r\n";
    const CLOSING: &str = "HTTP/1.1 200 OK
Connection: close
Content-Length: 2

ok";

    #[test]
    fn a_request_goes_out_as_it_should_and_its_answer_comes_whole() {
        let mut client = client(&[&[(
            "POST /shorten HTTP/1.1\r\nHost: sho.rt\r\nA: b\r\nContent-Length: 2\r\n\r\n{}",
            "HTTP/1.1 201 Created\r\nX-Id: 7\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        )]]);
        let answer = client.request("POST", "/shorten", &[("A", "b")], b"{}").unwrap();
        assert_eq!((answer.status, answer.body.as_slice(), answer.header("x-id")), (201, &b"abc"[..], Some("7")));
    }

    #[test]
    fn a_kept_connection_that_was_closed_is_opened_again() {
        let mut client = client(&[&[("\r\n\r\n", FOUND)], &[("\r\n\r\n", CLOSING)]]);
        assert_eq!(client.request("GET", "/a", &[], b"").unwrap().location, b"https://a/");
        assert_eq!(client.request("GET", "/b", &[], b"").unwrap().body, b"ok");
    }

    #[test]
    fn pipelined_requests_are_answered_in_order_over_as_many_connections_as_the_server_likes() {
        let mut client = client(&[
            &[("GET /0\r\n\r\n", FOUND), ("GET /1\r\n\r\n", CLOSING)],
            &[("GET /2\r\n\r\n", FOUND)],
            &[("GET /3\r\n\r\n", FOUND), ("GET /4\r\n\r\n", FOUND)],
        ]);
        let requests: Vec<Vec<u8>> = (0..5).map(|n| format!("GET /{n}\r\n\r\n").into_bytes()).collect();
        let mut seen = Vec::new();
        client.pipeline(&requests, |index, answer| seen.push((index, answer.status))).unwrap();
        assert_eq!(seen, [(0, 302), (1, 200), (2, 302), (3, 302), (4, 302)]);
    }

    #[test]
    fn what_goes_wrong_is_said() {
        let check = |connections: &'static [Script], method: &str, timeout: Duration, expected: &str| {
            let address = serve(connections);
            let mut client = Client::connect(address, "sho.rt", timeout).unwrap();
            let error = format!("{:#}", client.request(method, "/", &[], b"").unwrap_err());
            assert_eq!(error, format!("asking {address}: {expected}"));
        };
        let (long, short) = (Duration::from_secs(5), Duration::from_millis(50));
        check(&[&[("\r\n\r\n", "")]], "GET", long, "the server closed the connection before it answered");
        check(&[&[("\r\n\r\n", FOUND_CUT)]], "POST", long, "the server closed the connection inside its answer");
        check(&[&[("\r\n\r\n", "SMTP\r\n")]], "GET", long, "no HTTP/1.1 answer: it has no status line");
        check(&[&[("never", "")]], "GET", short, "no answer within 50ms");
    }
}
