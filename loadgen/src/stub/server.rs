//! The stub's one thread: connections, the queue of answers that are not due yet, and the script's windows.
//!
//! In: bytes of clients. Out: answers at their instants, and the [`Truth`]. Never: allocates for a redirect once its
//! buffers have grown; reads or writes more than once for a request that can be answered at once. At its limit: a client
//! that does not take its answers is not read from; a request longer than [`REQUEST_MAX`] closes its connection.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::mem;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};
use socket2::{Domain, Socket, Type};

use super::http::{self, Request};
use super::links::{Creation, Links};
use super::script::{DRIP_BYTES, Script};
use super::truth::Truth;
use crate::clock;
use crate::links::target_of;

/// Longest request, and the bytes taken by one read.
const REQUEST_MAX: usize = 64 * 1024;

/// Answers that wait for one client; more are not made before it reads.
const OUT_MAX: usize = 1024 * 1024;

/// How long a command to stop may go unseen.
const PATIENCE_NS: u64 = 20_000_000;

/// Connections that wait to be accepted: a stall of two seconds at some thousand connections a second.
const BACKLOG: i32 = 16_384;

const EVENTS: usize = 256;

/// What the listener's events carry; connections carry generation and index.
const LISTENER: u64 = u64::MAX;

/// A socket that listens there.
pub(super) fn listen(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), None)?;
    socket.set_reuse_address(true)?;
    // Accepted sockets inherit it: single bytes of a dripping body leave at once.
    socket.set_tcp_nodelay(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

pub(super) struct Server<'a> {
    script: Script,
    /// When the script's time began, 0: not yet. The first request begins it, or someone outside.
    clock_ns: &'a AtomicU64,
    listener: Socket,
    epoll: OwnedFd,
    accepting: bool,
    connections: Vec<Connection>,
    free: Vec<u32>,
    /// Answers that are not due yet, at most [`OUT_MAX`] bytes of each connection.
    due: BinaryHeap<Reverse<Due>>,
    /// When the queue of the script's capacity is through with all that came so far.
    free_at_ns: u64,
    links: Links,
    truth: Truth,
    scratch: Vec<u8>,
}

struct Connection {
    /// None: the slot is free.
    socket: Option<OwnedFd>,
    /// Counts the slot's uses, so that events and answers of an earlier one are known as such.
    generation: u32,
    stuck: bool,
    /// No more requests are read; it is closed after the last answer.
    closing: bool,
    /// Read and not answered yet: the begin of a request, or whole ones while `out` is full.
    partial: Vec<u8>,
    /// Answers in order, `written <= released <= out.len()`: what was sent, and what may be.
    out: Vec<u8>,
    written: usize,
    released: usize,
    /// Answers in [`Server::due`], and when the last of them ends.
    pending: u32,
    last_due_ns: u64,
    interest: epoll::EventFlags,
}

/// Bytes of one answer that may leave from `at_ns` on. In order of time, then of requests.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Due {
    at_ns: u64,
    number: u64,
    index: u32,
    generation: u32,
    bytes: usize,
    /// Bytes that drip afterwards.
    drip: u64,
    status: u16,
    intended_ns: Option<u64>,
}

impl<'a> Server<'a> {
    pub(super) fn new(listener: Socket, script: Script, clock_ns: &'a AtomicU64) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, epoll::EventData::new_u64(LISTENER), epoll::EventFlags::IN)?;
        Ok(Self {
            script,
            clock_ns,
            listener,
            epoll,
            accepting: true,
            connections: Vec::new(),
            free: Vec::new(),
            due: BinaryHeap::new(),
            free_at_ns: 0,
            links: Links::new(),
            truth: Truth::new(),
            scratch: vec![0; REQUEST_MAX],
        })
    }

    /// Serves until `stop` is set.
    pub(super) fn run(mut self, stop: &AtomicBool) -> io::Result<Truth> {
        // The default slack delays each wake-up by 50 µs (prctl(2), PR_SET_TIMERSLACK).
        rustix::thread::set_current_timer_slack(NonZeroU64::new(1))?;
        let mut events = Vec::with_capacity(EVENTS);
        while !stop.load(Ordering::Relaxed) {
            let now_ns = clock::now_ns();
            if let Some(left_ns) = self.stalled_for(now_ns) {
                rustix::event::poll(&mut [], Some(&timespec(left_ns.min(PATIENCE_NS))))
                    .or_else(|error| if error == Errno::INTR { Ok(0) } else { Err(error) })?;
                continue;
            }
            self.release_due(now_ns);
            self.accept_or_not(now_ns)?;
            let wait = timespec(self.wait_ns(now_ns));
            match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&wait)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            // What came after a stall began waits until it is over.
            let stalled = self.stalled_for(clock::now_ns()).is_some();
            for event in events.drain(..).filter(|_| !stalled) {
                match event.data.u64() {
                    LISTENER => self.accept()?,
                    token => self.ready((token & u64::from(u32::MAX)) as u32, (token >> 32) as u32, event.flags),
                }
            }
        }
        Ok(self.truth)
    }

    /// The script's time, once it has begun.
    fn script_ns(&self, now_ns: u64) -> Option<u64> {
        match self.clock_ns.load(Ordering::Relaxed) {
            0 => None,
            begin_ns => Some(now_ns.saturating_sub(begin_ns)),
        }
    }

    fn stalled_for(&self, now_ns: u64) -> Option<u64> {
        let stall = self.script.stall?;
        let at_ns = self.script_ns(now_ns)?;
        stall.holds(at_ns).then(|| stall.end_ns() - at_ns)
    }

    /// Until an answer is due or a window begins or ends.
    fn wait_ns(&self, now_ns: u64) -> u64 {
        let mut wait_ns = PATIENCE_NS;
        if let Some(Reverse(due)) = self.due.peek() {
            wait_ns = wait_ns.min(due.at_ns.saturating_sub(now_ns));
        }
        if let Some(at_ns) = self.script_ns(now_ns) {
            for window in [self.script.stall, self.script.accept_stall].iter().flatten() {
                wait_ns = wait_ns.min(window.next_edge_ns(at_ns) - at_ns);
            }
        }
        wait_ns
    }

    /// Listens to the listener as the script wants it: one that is ready and not accepted from would wake each wait.
    fn accept_or_not(&mut self, now_ns: u64) -> io::Result<()> {
        let Some(stall) = self.script.accept_stall else { return Ok(()) };
        let accepting = !self.script_ns(now_ns).is_some_and(|at_ns| stall.holds(at_ns));
        if accepting != self.accepting {
            self.accepting = accepting;
            if accepting {
                epoll::add(&self.epoll, &self.listener, epoll::EventData::new_u64(LISTENER), epoll::EventFlags::IN)?;
            } else {
                epoll::delete(&self.epoll, &self.listener)?;
            }
        }
        Ok(())
    }

    fn accept(&mut self) -> io::Result<()> {
        loop {
            let socket = match rustix::net::accept_with(&self.listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(socket) => socket,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(error) => return Err(error.into()),
            };
            let index = self.free.pop().unwrap_or_else(|| {
                self.connections.push(Connection::free());
                (self.connections.len() - 1) as u32
            });
            let connection = &mut self.connections[index as usize];
            let token = u64::from(connection.generation) << 32 | u64::from(index);
            epoll::add(&self.epoll, &socket, epoll::EventData::new_u64(token), epoll::EventFlags::IN)?;
            connection.socket = Some(socket);
            connection.stuck = self.script.sticks(self.truth.connections);
            self.truth.connections += 1;
        }
    }

    fn ready(&mut self, index: u32, generation: u32, flags: epoll::EventFlags) {
        let connection = &mut self.connections[index as usize];
        let Some(socket) = connection.socket.as_ref().filter(|_| connection.generation == generation) else { return };
        let mut scratch = mem::take(&mut self.scratch);
        let mut fresh = 0;
        let mut ended = false;
        if flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
            match rustix::net::recv(socket, &mut scratch[..], RecvFlags::empty()) {
                Ok((0, _)) => ended = true,
                Ok((length, _)) => fresh = length,
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => ended = true,
            }
        }
        if ended {
            self.close(index);
        } else {
            self.read(index, &scratch[..fresh]);
            self.flush(index);
        }
        self.scratch = scratch;
    }

    /// Reads requests from what was left and what came.
    fn read(&mut self, index: u32, fresh: &[u8]) {
        let mut kept = mem::take(&mut self.connections[index as usize].partial);
        if !kept.is_empty() {
            kept.extend_from_slice(fresh);
        }
        let bytes = if kept.is_empty() { fresh } else { &kept[..] };
        let mut at = 0;
        while at < bytes.len() {
            let connection = &mut self.connections[index as usize];
            if connection.socket.is_none() || connection.closing || connection.out.len() > OUT_MAX {
                break;
            }
            match http::parse(&bytes[at..]) {
                Ok(Some((request, length))) => {
                    at += length;
                    self.answer(index, &request);
                }
                Ok(None) if bytes.len() - at < REQUEST_MAX => break,
                Ok(None) | Err(http::Malformed) => return self.close(index),
            }
        }
        let rest = at..bytes.len();
        if kept.is_empty() {
            kept.extend_from_slice(&fresh[rest]);
        } else {
            kept.drain(..at);
        }
        let connection = &mut self.connections[index as usize];
        if connection.socket.is_some() {
            connection.partial = kept;
        }
    }

    /// Decides one request's fate and when.
    fn answer(&mut self, index: u32, request: &Request<'_>) {
        let now_ns = clock::now_ns();
        if request.path != "/healthz" && self.clock_ns.load(Ordering::Relaxed) == 0 {
            self.clock_ns.store(now_ns, Ordering::Relaxed);
        }
        let number = self.truth.requests;
        self.truth.read(request.intended_ns, now_ns);
        if self.connections[index as usize].stuck {
            return;
        }
        if self.script.resets(number) {
            return self.reset(index);
        }
        let failing = self.script_ns(now_ns).zip(self.script.fail).is_some_and(|(at_ns, fail)| fail.holds(at_ns));
        let mut at_ns = now_ns;
        if !failing {
            if let Some(capacity_per_s) = self.script.capacity_per_s {
                self.free_at_ns = self.free_at_ns.max(now_ns) + (1e9 / capacity_per_s) as u64;
                at_ns = self.free_at_ns;
            }
            at_ns += self.script.service_of(number);
        }

        let connection = &mut self.connections[index as usize];
        let before = connection.out.len();
        let status = if failing {
            http::head(&mut connection.out, "503 Service Unavailable", &[], 0, request.close);
            503
        } else {
            respond(&self.script, &mut self.links, request, &mut connection.out)
        };
        let drip = if status == 307 && request.method != "HEAD" && self.script.drip_ns > 0 { DRIP_BYTES } else { 0 };
        connection.closing |= request.close;
        at_ns = at_ns.max(connection.last_due_ns);
        if at_ns == now_ns && connection.pending == 0 && drip == 0 {
            connection.released = connection.out.len();
            self.truth.answered(status, request.intended_ns, now_ns);
            return;
        }
        let bytes = connection.out.len() - before - drip as usize;
        connection.pending += 1;
        connection.last_due_ns = at_ns + drip * self.script.drip_ns;
        let generation = connection.generation;
        let intended_ns = request.intended_ns;
        self.due.push(Reverse(Due { at_ns, number, index, generation, bytes, drip, status, intended_ns }));
    }

    fn release_due(&mut self, now_ns: u64) {
        while let Some(Reverse(due)) = self.due.peek()
            && due.at_ns <= now_ns
        {
            let Some(Reverse(due)) = self.due.pop() else { return };
            let connection = &mut self.connections[due.index as usize];
            if connection.generation != due.generation {
                continue;
            }
            connection.released += due.bytes;
            if due.drip > 0 {
                let at_ns = due.at_ns + self.script.drip_ns;
                self.due.push(Reverse(Due { at_ns, bytes: 1, drip: due.drip - 1, ..due }));
            } else {
                connection.pending -= 1;
                self.truth.answered(due.status, due.intended_ns, clock::now_ns());
            }
            self.flush(due.index);
        }
    }

    /// Writes what may leave, and asks for the events that matter then.
    fn flush(&mut self, index: u32) {
        loop {
            let connection = &mut self.connections[index as usize];
            let Some(socket) = &connection.socket else { return };
            if connection.written < connection.released {
                let bytes = &connection.out[connection.written..connection.released];
                match rustix::net::send(socket, bytes, SendFlags::NOSIGNAL) {
                    Ok(length) => connection.written += length,
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    Err(_) => return self.close(index),
                }
            }
            let full = connection.out.len() > OUT_MAX;
            if connection.written == connection.out.len() {
                connection.out.clear();
                connection.written = 0;
                connection.released = 0;
                if connection.closing {
                    return self.close(index);
                }
                if full {
                    // What was left unread for want of room can be answered now.
                    self.read(index, &[]);
                    continue;
                }
            }
            break;
        }
        let connection = &mut self.connections[index as usize];
        let Some(socket) = &connection.socket else { return };
        let mut interest = epoll::EventFlags::empty();
        interest.set(epoll::EventFlags::IN, connection.out.len() <= OUT_MAX && !connection.closing);
        interest.set(epoll::EventFlags::OUT, connection.written < connection.released);
        if interest != connection.interest {
            connection.interest = interest;
            let token = u64::from(connection.generation) << 32 | u64::from(index);
            if epoll::modify(&self.epoll, socket, epoll::EventData::new_u64(token), interest).is_err() {
                self.close(index);
            }
        }
    }

    /// Closes with a reset instead of an answer (SO_LINGER of 0, socket(7)).
    fn reset(&mut self, index: u32) {
        if let Some(socket) = &self.connections[index as usize].socket {
            // Where it fails the client sees an end instead of a reset: the request stays unanswered.
            let _ = rustix::net::sockopt::set_socket_linger(socket, Some(Duration::ZERO));
        }
        self.close(index);
    }

    fn close(&mut self, index: u32) {
        let connection = &mut self.connections[index as usize];
        // Dropping the socket takes it out of the epoll set.
        if connection.socket.take().is_some() {
            connection.generation = connection.generation.wrapping_add(1);
            connection.vacate();
            self.free.push(index);
        }
    }
}

impl Connection {
    fn free() -> Self {
        Self {
            socket: None,
            generation: 0,
            stuck: false,
            closing: false,
            partial: Vec::new(),
            out: Vec::new(),
            written: 0,
            released: 0,
            pending: 0,
            last_due_ns: 0,
            interest: epoll::EventFlags::IN,
        }
    }

    /// As new, but for the generation and the buffer's room.
    fn vacate(&mut self) {
        let mut out = mem::take(&mut self.out);
        out.clear();
        *self = Self { generation: self.generation, out, ..Self::free() };
    }
}

/// Appends the answer to a request and returns its status.
fn respond(script: &Script, links: &mut Links, request: &Request<'_>, out: &mut Vec<u8>) -> u16 {
    let close = request.close;
    let (method, path) = (request.method, request.path);
    match (method, path) {
        ("GET" | "HEAD", "/healthz") => {
            let id = request.request_id.map(|id| ("X-Request-Id", id));
            http::head(out, "200 OK", id.as_slice(), 0, close);
            200
        }
        ("POST", "/shorten") => match links.create(request.body) {
            Creation::Created(body) => {
                http::head(out, "201 Created", &[("Content-Type", b"application/json")], body.len() as u64, close);
                out.extend_from_slice(body.as_bytes());
                201
            }
            Creation::Taken => {
                http::head(out, "409 Conflict", &[], 0, close);
                409
            }
            Creation::Malformed => {
                http::head(out, "400 Bad Request", &[], 0, close);
                400
            }
        },
        ("GET", _) if path.starts_with("/stats/") => {
            http::head(out, "200 OK", &[("Content-Type", b"application/json")], 2, close);
            out.extend_from_slice(b"{}");
            200
        }
        ("GET" | "HEAD", _) => {
            let code = path.strip_prefix('/').unwrap_or(path).as_bytes();
            if code.is_empty() || code.contains(&b'/') || code.starts_with(b"missing") {
                http::head(out, "404 Not Found", &[], 0, close);
                return 404;
            }
            let drip = if script.drip_ns > 0 { DRIP_BYTES } else { 0 };
            let status = "307 Temporary Redirect";
            let cached = ("Cache-Control", b"private, max-age=90".as_slice());
            match links.target(code) {
                Some(target) => http::head(out, status, &[("Location", target), cached], drip, close),
                None => http::head(out, status, &[("Location", &target_of(code)), cached], drip, close),
            };
            if method == "GET" {
                out.extend_from_slice(&[b'.'; DRIP_BYTES as usize][..drip as usize]);
            }
            307
        }
        _ => {
            http::head(out, "405 Method Not Allowed", &[("Allow", b"GET, HEAD, POST")], 0, close);
            405
        }
    }
}

fn timespec(ns: u64) -> Timespec {
    Timespec { tv_sec: (ns / 1_000_000_000).cast_signed(), tv_nsec: (ns % 1_000_000_000).cast_signed() }
}
