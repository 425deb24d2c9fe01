//! A connection: one peer's bytes in and out, and when it has had its time.
//!
//! In: an accepted socket. Out: requests to `http`, answers to the peer, gathered: whatever answers hyper writes within
//! one poll leave in one `send`, up to 16 KiB. A socket is registered with epoll when it has to be waited for: most
//! connections of one request never are, which saves two of eight system calls. (hyper's own `pipeline_flush` is not used: it leaves a request unanswered
//! while part of the next one waits, and lifts the cap on what is buffered for a peer that does not read.)
//! Never: a timer. Each step notes the core's coarse time, and the sweep compares.
//! At its limit: a head that takes longer than `header_timeout`, and a peer that is silent or does not read for
//! `idle_timeout`, are shut down. A request that back works on is back's to limit.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use http::{Request, Response, header};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use rustix::net::{RecvFlags, Shutdown};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::proxy_protocol::{self, HEADER_BYTES_MAX, Parsed, Source};
use crate::http::body::{Body, Done, Never};
use crate::http::{Answer, Front, Via};

/// What is gathered before it is sent.
const GATHERED_BYTES_MAX: usize = 16 << 10;
/// The largest head of a request (431 beyond), and what hyper may buffer of a connection.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Bytes that are read and thrown away after an answer that ends a connection, so that the answer is not lost to
/// the reset that unread bytes cause (RFC 9112, section 9.6).
const LINGER_BYTES_MAX: usize = 256 << 10;

/// hyper's settings, the same for every connection.
#[must_use]
pub fn builder() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .half_close(true)
        .writev(false)
        .max_header_size(HEAD_BYTES_MAX)
        .max_buf_size(2 * HEAD_BYTES_MAX)
        .header_read_timeout(None);
    builder
}

/// One core's coarse time, and the buffer in which its connections gather their answers, one after the other.
#[derive(Debug, Default)]
pub struct Desk {
    /// Milliseconds since the start, as of the last tick.
    pub now_ms: Cell<u64>,
    gathered: RefCell<Vec<u8>>,
    /// What the first read of a connection is read into.
    first_bytes: RefCell<FirstBytes>,
}

#[derive(Debug)]
struct FirstBytes(Box<[u8]>);

impl Default for FirstBytes {
    fn default() -> Self {
        Self(vec![0; 8 << 10].into())
    }
}

/// A socket before and after epoll knows of it.
#[derive(Debug)]
enum Socket {
    /// Registering it failed: there is no memory or no descriptor for it.
    Lost,
    /// `read`: its first bytes were read; whoever reads again waits.
    New {
        socket: std::net::TcpStream,
        read: bool,
    },
    Registered(TcpStream),
}

impl Socket {
    /// The socket for who has to wait for it.
    fn registered(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        if let Self::New { .. } = self
            && let Self::New { socket, .. } = std::mem::replace(self, Self::Lost)
        {
            *self = Self::Registered(TcpStream::from_std(socket)?);
        }
        match self {
            Self::Registered(stream) => Ok(Pin::new(stream)),
            Self::New { .. } | Self::Lost => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>, desk: &Desk) -> Poll<io::Result<()>> {
        if let Self::New { socket, read: read @ false } = self {
            *read = true;
            let mut bytes = desk.first_bytes.borrow_mut();
            let room = bytes.0.len().min(buffer.remaining());
            match socket.read(&mut bytes.0[..room]) {
                Ok(count) => {
                    buffer.put_slice(&bytes.0[..count]);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        self.registered()?.poll_read(cx, buffer)
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if let Self::New { socket, .. } = self {
            match socket.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return Poll::Ready(done),
            }
        }
        self.registered()?.poll_write(cx, bytes)
    }

    fn shut(&self, how: Shutdown) {
        if let Some(fd) = self.fd() {
            // It may be shut down already, by the peer or by us.
            let _ = rustix::net::shutdown(fd, how);
        }
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::New { socket, .. } => Some(socket.as_fd()),
            Self::Registered(stream) => Some(stream.as_fd()),
            Self::Lost => None,
        }
    }
}

/// What the sweep and the connection's own task both see.
#[derive(Debug)]
pub struct Connection {
    socket: RefCell<Socket>,
    desk: Rc<Desk>,
    /// Bytes that the peer did not take yet.
    unsent: RefCell<Vec<u8>>,
    /// Bytes that were read before hyper began.
    unread: RefCell<Vec<u8>>,
    phase: Cell<Phase>,
    /// When the phase began, or bytes last moved in it.
    since_ms: Cell<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Between requests, or before the first; or the answer is on its way out.
    Idle,
    /// The head of a request has begun. Bytes that come do not prolong it.
    Head,
    /// Answered by hyper's task or by back.
    Answering,
    /// The answer has left, the connection ends; what still comes is thrown away.
    Lingering,
}

/// When a connection has had its time, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub header_ms: u64,
    pub idle_ms: u64,
}

/// While draining, a connection that is idle for this long gets no more requests.
const DRAIN_IDLE_MS: u64 = 250;

impl Connection {
    #[must_use]
    pub fn new(socket: std::net::TcpStream, desk: Rc<Desk>) -> Self {
        let since_ms = Cell::new(desk.now_ms.get());
        Self {
            socket: RefCell::new(Socket::New { socket, read: false }),
            desk,
            unsent: RefCell::default(),
            unread: RefCell::default(),
            phase: Cell::new(Phase::Idle),
            since_ms,
        }
    }

    fn enter(&self, phase: Phase) {
        self.phase.set(phase);
        self.since_ms.set(self.desk.now_ms.get());
    }

    /// Shuts the connection down if it has had its time; true if so. Its task ends by itself then.
    /// `drain_ms` is when the drain began: before it, time was too coarse to say who was idle.
    pub fn sweep(&self, limits: Limits, drain_ms: Option<u64>) -> bool {
        let now_ms = self.desk.now_ms.get();
        let age_ms = now_ms.saturating_sub(self.since_ms.get());
        let drained =
            drain_ms.is_some_and(|began| now_ms.saturating_sub(self.since_ms.get().max(began)) >= DRAIN_IDLE_MS);
        let over = match self.phase.get() {
            Phase::Head => age_ms >= limits.header_ms,
            Phase::Lingering => age_ms >= limits.header_ms || drained,
            Phase::Idle => age_ms >= limits.idle_ms || drained && self.has_nothing(),
            // A peer that does not read an answer of back's: back waits for it, and may for ever.
            Phase::Answering => age_ms >= limits.idle_ms && !self.unsent.borrow().is_empty(),
        };
        if over {
            self.socket.borrow().shut(Shutdown::Both);
        }
        over
    }

    /// Whether nothing waits to be read or sent: only then can it be shut without losing a request.
    fn has_nothing(&self) -> bool {
        let mut byte = [0; 1];
        let socket = self.socket.borrow();
        let Some(fd) = socket.fd() else { return true };
        let peeked = rustix::net::recv(fd, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        self.unsent.borrow().is_empty() && peeked.is_err()
    }

    fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut unread = self.unread.borrow_mut();
        if !unread.is_empty() {
            let count = unread.len().min(buffer.remaining());
            buffer.put_slice(&unread[..count]);
            unread.drain(..count);
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        ready!(self.socket.borrow_mut().poll_read(cx, buffer, &self.desk))?;
        if buffer.filled().len() > before {
            match self.phase.get() {
                Phase::Idle => self.enter(Phase::Head),
                // A body on its way to back.
                Phase::Answering => self.since_ms.set(self.desk.now_ms.get()),
                Phase::Head | Phase::Lingering => {}
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_send_unsent(cx))?;
        let mut gathered = self.desk.gathered.borrow_mut();
        if gathered.len() + bytes.len() <= GATHERED_BYTES_MAX {
            gathered.extend_from_slice(bytes);
            return Poll::Ready(Ok(bytes.len()));
        }
        drop(gathered);
        ready!(self.poll_send_gathered(cx))?;
        let count = bytes.len().min(GATHERED_BYTES_MAX);
        self.desk.gathered.borrow_mut().extend_from_slice(&bytes[..count]);
        Poll::Ready(Ok(count))
    }

    /// Sends what the last poll of this connection gathered; what the peer does not take becomes its own.
    fn poll_send_gathered(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut gathered = self.desk.gathered.borrow_mut();
        if gathered.is_empty() {
            return self.poll_send_unsent(cx);
        }
        // There is something unsent only if hyper wrote nothing since.
        let sent = match self.socket.borrow_mut().poll_write(cx, &gathered) {
            Poll::Ready(Ok(count)) => {
                self.since_ms.set(self.desk.now_ms.get());
                count
            }
            Poll::Ready(Err(error)) => {
                gathered.clear();
                return Poll::Ready(Err(error));
            }
            Poll::Pending => 0,
        };
        if sent < gathered.len() {
            self.unsent.borrow_mut().extend_from_slice(&gathered[sent..]);
        }
        gathered.clear();
        drop(gathered);
        self.poll_send_unsent(cx)
    }

    fn poll_send_unsent(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut unsent = self.unsent.borrow_mut();
        while !unsent.is_empty() {
            let count = ready!(self.socket.borrow_mut().poll_write(cx, &unsent))?;
            self.since_ms.set(self.desk.now_ms.get());
            unsent.drain(..count);
        }
        // Idle connections keep nothing.
        if unsent.capacity() > 0 {
            *unsent = Vec::new();
        }
        Poll::Ready(Ok(()))
    }

    /// Reads the PROXY header that must come first.
    async fn source(&self) -> Result<Source, Ended> {
        self.enter(Phase::Head);
        let mut seen = Vec::new();
        loop {
            match proxy_protocol::parse(&seen) {
                Ok(Parsed::Done { consumed, source }) => {
                    seen.drain(..consumed);
                    if seen.is_empty() {
                        self.enter(Phase::Idle);
                    }
                    *self.unread.borrow_mut() = seen;
                    return Ok(source);
                }
                Ok(Parsed::Partial) if seen.len() < HEADER_BYTES_MAX => {}
                Ok(Parsed::Partial) | Err(_) => return Err(Ended::NoProxyHeader),
            }
            let before = seen.len();
            let read = poll_fn(|cx| self.poll_read_some(cx, |bytes| seen.extend_from_slice(bytes))).await;
            if read.is_err() || seen.len() == before {
                // A balancer that only looks whether somebody answers.
                return Err(if seen.is_empty() { Ended::Served } else { Ended::NoProxyHeader });
            }
        }
    }

    /// Hands on what comes next; nothing at the end. The buffer lies on the stack of the poll: in the task of every
    /// connection it would lie as long as the connection lives.
    fn poll_read_some(&self, cx: &mut Context<'_>, mut take: impl FnMut(&[u8])) -> Poll<io::Result<()>> {
        let mut bytes = [0; 1024];
        let mut buffer = ReadBuf::new(&mut bytes);
        ready!(self.socket.borrow_mut().poll_read(cx, &mut buffer, &self.desk))?;
        take(buffer.filled());
        Poll::Ready(Ok(()))
    }

    /// Throws away what the peer still sends, until it has seen the end.
    async fn linger(&self) {
        self.enter(Phase::Lingering);
        let mut total = 0;
        while total < LINGER_BYTES_MAX {
            let before = total;
            let read = poll_fn(|cx| self.poll_read_some(cx, |bytes| total += bytes.len())).await;
            if read.is_err() || total == before {
                return;
            }
        }
    }
}

/// How a connection ended, where that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Served,
    /// A PROXY header was due, and other bytes came.
    NoProxyHeader,
}

/// Serves one connection to its end.
pub async fn serve(
    connection: Rc<Connection>,
    builder: &http1::Builder,
    front: Rc<Front>,
    mut via: Via,
    proxy_protocol: bool,
) -> Ended {
    if proxy_protocol {
        match connection.source().await {
            Ok(Source::Client(address)) => via.peer = front.client_of(via.peer, address.ip()),
            Ok(Source::Socket) => {}
            Err(ended) => return ended,
        }
    }
    let refused = Rc::new(Cell::new(false));
    let service = Service {
        front,
        connection: Rc::clone(&connection),
        via,
        first: Cell::new(true),
        refused: Rc::clone(&refused),
    };
    let mut http = pin!(builder.serve_connection(TokioIo::new(Io(Rc::clone(&connection))), service));
    let served = poll_fn(|cx| {
        let served = http.as_mut().poll(cx);
        // Whatever hyper has written within this poll leaves now. A failure shows at hyper's next read or write.
        let _ = connection.poll_send_gathered(cx);
        served
    })
    .await;
    // hyper ends with an error after it has refused a head by itself (400, 431).
    if refused.get() || served.is_err_and(|error| error.is_parse()) {
        connection.linger().await;
    }
    Ended::Served
}

/// hyper's view of a connection.
struct Io(Rc<Connection>);

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.0.poll_read(cx, buffer)
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.poll_write(cx, bytes)
    }

    /// Gathered bytes leave at the end of the poll; those that the peer did not take are what is waited for.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll_send_unsent(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.0.poll_send_gathered(cx))?;
        self.0.socket.borrow().shut(Shutdown::Write);
        Poll::Ready(Ok(()))
    }
}

struct Service {
    front: Rc<Front>,
    connection: Rc<Connection>,
    via: Via,
    first: Cell<bool>,
    /// The last answer ends the connection although more of the request may come.
    refused: Rc<Cell<bool>>,
}

impl hyper::service::Service<Request<Incoming>> for Service {
    type Response = Response<Body>;
    type Error = Never;
    type Future = Serving;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        self.connection.enter(Phase::Answering);
        if self.first.replace(false) {
            self.front.look_at_forwarding(self.via.peer, request.headers());
        }
        let answer = self.front.answer(request, self.via);
        Serving {
            answer,
            front: Rc::clone(&self.front),
            connection: Rc::clone(&self.connection),
            refused: Rc::clone(&self.refused),
        }
    }
}

/// An answer in the making; when it is made, the connection is between requests again.
struct Serving {
    answer: Answer,
    front: Rc<Front>,
    connection: Rc<Connection>,
    refused: Rc<Cell<bool>>,
}

impl Future for Serving {
    type Output = Result<Response<Body>, Never>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Ok(mut response) = ready!(Pin::new(&mut self.answer).poll(cx));
        let maybe_last = response.status().as_u16() >= 400 || self.front.is_draining();
        if maybe_last {
            let back = matches!(response.body(), Body::Back { .. });
            self.refused.set(back || response.headers().contains_key(header::CONNECTION));
        }
        let connection = Rc::clone(&self.connection);
        match response.body_mut() {
            Body::Back { done, .. } => *done = Some(Done(Rc::new(move || connection.enter(Phase::Idle)))),
            Body::Empty | Body::Page(_) => connection.enter(Phase::Idle),
        }
        Poll::Ready(Ok(response))
    }
}
