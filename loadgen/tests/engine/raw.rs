//! A server that does to its clients whatever a test wants, byte by byte.
//!
//! In: what to do with one connection. Out: the requests that came, in order of each connection. A thread accepts, each
//! connection has one of its own; all end when it is dropped. At its limit: of more than [`CONNECTIONS_MAX`] connections
//! the others are never accepted.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use socket2::SockRef;

use crate::LOCAL;

const CONNECTIONS_MAX: usize = 1_000;

/// An answer that keeps the connection.
pub(crate) const FINE: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

pub(crate) struct Raw {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    over: AtomicBool,
    /// (connection, method and path).
    seen: Mutex<Vec<(usize, String)>>,
    open: Mutex<HashMap<usize, TcpStream>>,
}

impl Raw {
    /// `serve` has each connection to itself. When it returns, the connection is closed for writing, and what still
    /// comes is read: a request that was sent is seen, whether it was answered or not.
    pub(crate) fn start(serve: impl Fn(&mut Talk) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(LOCAL).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
        let (theirs, serve) = (Arc::clone(&shared), Arc::new(serve));
        let thread = thread::spawn(move || {
            let mut threads = Vec::new();
            for number in 0..CONNECTIONS_MAX {
                let (stream, _) = listener.accept().unwrap();
                if theirs.over.load(Ordering::Relaxed) {
                    break;
                }
                stream.set_nodelay(true).unwrap();
                theirs.open.lock().unwrap().insert(number, stream.try_clone().unwrap());
                let (shared, serve) = (Arc::clone(&theirs), Arc::clone(&serve));
                threads.push(thread::spawn(move || {
                    let mut talk = Talk { number, stream, bytes: Vec::new(), shared };
                    serve(&mut talk);
                    let _ = talk.stream.shutdown(Shutdown::Write);
                    talk.stream.set_read_timeout(None).unwrap();
                    while talk.request().is_some() {}
                    talk.shared.open.lock().unwrap().remove(&number);
                }));
            }
            threads.into_iter().for_each(|thread| drop(thread.join()));
        });
        Self { address, shared, thread: Some(thread) }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// (connection, method and path), by connection in the order in which they came.
    pub(crate) fn seen(&self) -> Vec<(usize, String)> {
        self.shared.seen.lock().unwrap().clone()
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        for stream in self.shared.open.lock().unwrap().values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        // Wakes up who waits in accept(2).
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The server's side of one connection.
pub(crate) struct Talk {
    /// In the order in which they were accepted, from 0.
    pub(crate) number: usize,
    pub(crate) stream: TcpStream,
    bytes: Vec<u8>,
    shared: Arc<Shared>,
}

impl Talk {
    /// Method and path of the next request; none when the client has closed, or nothing came within the read time-out.
    pub(crate) fn request(&mut self) -> Option<String> {
        loop {
            if let Some((request, length)) = parse(&self.bytes) {
                self.bytes.drain(..length);
                self.shared.seen.lock().unwrap().push((self.number, request.clone()));
                return Some(request);
            }
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece) {
                Ok(0) => return None,
                Ok(read) => self.bytes.extend_from_slice(&piece[..read]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
    }

    /// False when the client does not want it.
    pub(crate) fn say(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    /// The last words, with the end of the stream in the same segment.
    pub(crate) fn say_and_close(&mut self, bytes: &[u8]) {
        SockRef::from(&self.stream).set_tcp_cork(true).unwrap();
        self.say(bytes);
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.shared.over.load(Ordering::Relaxed)
    }
}

/// Method and path of a whole request, and its length.
fn parse(bytes: &[u8]) -> Option<(String, usize)> {
    let head = bytes.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let text = String::from_utf8_lossy(&bytes[..head]).into_owned();
    let (request, _) = text.split_once(" HTTP/1.1\r\n").unwrap_or((&text, ""));
    let body = text.lines().find_map(|line| line.strip_prefix("Content-Length: ")).map_or(0, |it| it.parse().unwrap());
    (bytes.len() >= head + body).then(|| (request.to_owned(), head + body))
}
