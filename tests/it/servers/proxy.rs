//! A network that can be broken: a TCP proxy in front of a server.
//!
//! In: connections of clients. Out: each one's bytes to the server, the server's bytes back, as [`Mode`] says.
//! Never: reads a protocol.
//! At the limit: a chunk is what one read brings, at most 16 KiB, and each direction holds one.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::SockRef;
use waypost::domain::time;

use crate::support::{LIMIT, eventually};

/// What happens to the server's bytes, and to new connections.
#[derive(Clone, Debug)]
pub(crate) enum Mode {
    Pass,
    /// Each chunk of the server comes later by this.
    Delay(Duration),
    /// New connections are reset at once; old ones go on.
    Refuse,
    /// The server gets everything and its bytes go nowhere.
    Silent,
    /// When the server says this, its client's connection is cut before it arrives, and the mode is [`Mode::Pass`] again:
    /// `C…COMMIT` of a transaction that is durable, and whose client is not told.
    CutAt(Vec<u8>),
    /// When this side says this, that chunk and all that this side says after it wait for [`Proxy::release`], though the
    /// connection stays; for the others the mode is [`Mode::Pass`] again. A client held in its transaction keeps its locks.
    HoldAt(Side, Vec<u8>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server,
}

/// Chunks that were held, and how often all of them were let go.
#[derive(Debug, Default)]
struct Held {
    count: u64,
    released: u64,
}

#[derive(Debug)]
struct State {
    target: Mutex<SocketAddr>,
    mode: Mutex<Mode>,
    /// Both ends of each connection, by its number.
    streams: Mutex<HashMap<u64, [TcpStream; 2]>>,
    opened: AtomicU64,
    cuts: AtomicU64,
    held: Mutex<Held>,
    let_go: Condvar,
    over: AtomicBool,
}

#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    state: Arc<State>,
    accepting: Option<JoinHandle<()>>,
}

impl Proxy {
    pub(crate) fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            target: Mutex::new(target),
            mode: Mutex::new(Mode::Pass),
            streams: Mutex::default(),
            opened: AtomicU64::new(0),
            cuts: AtomicU64::new(0),
            held: Mutex::default(),
            let_go: Condvar::new(),
            over: AtomicBool::new(false),
        });
        let its = Arc::clone(&state);
        let accepting = std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if its.over.load(Ordering::SeqCst) {
                    return;
                }
                its.connect(client);
            }
        });
        Self { address, state, accepting: Some(accepting) }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn mode(&self, mode: Mode) {
        *self.state.mode.lock().unwrap() = mode;
    }

    /// New connections lead to another server.
    pub(crate) fn leads_to(&self, target: SocketAddr) {
        *self.state.target.lock().unwrap() = target;
    }

    /// Resets every connection that there is.
    pub(crate) fn cut(&self) {
        self.state.cut();
    }

    /// How many connections [`Mode::CutAt`] has cut.
    pub(crate) fn cuts(&self) -> u64 {
        self.state.cuts.load(Ordering::SeqCst)
    }

    /// How many connections [`Mode::HoldAt`] has held.
    pub(crate) fn held(&self) -> u64 {
        self.state.held.lock().unwrap().count
    }

    /// What is held goes on, and arrives if its connection is still there.
    pub(crate) fn release(&self) {
        self.state.release();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.over.store(true, Ordering::SeqCst);
        self.state.cut();
        self.state.release();
        // Wakes the one who accepts.
        let _ = TcpStream::connect(self.address);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

impl State {
    fn connect(self: &Arc<Self>, client: TcpStream) {
        if matches!(*self.mode.lock().unwrap(), Mode::Refuse) {
            reset(&client);
            return;
        }
        // Nobody listens there: the client's connection ends.
        let Ok(server) = TcpStream::connect(*self.target.lock().unwrap()) else { return };
        let number = self.opened.fetch_add(1, Ordering::Relaxed);
        let both = [&client, &server].map(|stream| {
            stream.set_nodelay(true).unwrap();
            stream.try_clone().unwrap()
        });
        self.streams.lock().unwrap().insert(number, both);
        let (from_client, to_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        let state = Arc::clone(self);
        std::thread::spawn(move || {
            let mut said = Vec::new();
            copy(&from_client, |chunk| {
                state.hold(Side::Client, chunk, &mut said);
                (&to_server).write_all(chunk).is_ok()
            });
            let _ = to_server.shutdown(Shutdown::Write);
        });
        let state = Arc::clone(self);
        std::thread::spawn(move || {
            let mut said = Vec::new();
            copy(&server, |chunk| {
                state.hold(Side::Server, chunk, &mut said);
                state.deliver(&client, chunk, &mut said)
            });
            let _ = client.shutdown(Shutdown::Both);
            let _ = server.shutdown(Shutdown::Both);
            state.streams.lock().unwrap().remove(&number);
        });
    }

    /// Takes a chunk of the server to its client; false if the connection is over. `said` is the end of what was said
    /// before.
    fn deliver(&self, mut client: &TcpStream, chunk: &[u8], said: &mut Vec<u8>) -> bool {
        let mut mode = self.mode.lock().unwrap();
        match &*mode {
            Mode::Pass | Mode::Refuse | Mode::HoldAt(..) => {}
            Mode::Silent => return true,
            Mode::Delay(span) => {
                let span = *span;
                drop(mode);
                delay(span);
                return client.write_all(chunk).is_ok();
            }
            Mode::CutAt(part) => {
                if says(said, chunk, part) {
                    *mode = Mode::Pass;
                    self.cuts.fetch_add(1, Ordering::SeqCst);
                    reset(client);
                    return false;
                }
            }
        }
        drop(mode);
        client.write_all(chunk).is_ok()
    }

    /// Waits with this chunk if it is the one to be held.
    fn hold(&self, by: Side, chunk: &[u8], said: &mut Vec<u8>) {
        let mut mode = self.mode.lock().unwrap();
        let holds = matches!(&*mode, Mode::HoldAt(side, part) if *side == by && says(said, chunk, part));
        if !holds {
            return;
        }
        *mode = Mode::Pass;
        drop(mode);
        let mut held = self.held.lock().unwrap();
        held.count += 1;
        let before = held.released;
        drop(self.let_go.wait_while(held, |held| held.released == before).unwrap());
    }

    fn release(&self) {
        self.held.lock().unwrap().released += 1;
        self.let_go.notify_all();
    }

    fn cut(&self) {
        self.streams.lock().unwrap().values().flatten().for_each(reset);
    }
}

/// Whether `part` is in this chunk, or begins in what was said before and ends in it. `said` is the end of that.
fn says(said: &mut Vec<u8>, chunk: &[u8], part: &[u8]) -> bool {
    said.extend(chunk);
    let says = said.windows(part.len()).any(|window| window == part);
    let end = if says { said.len() } else { said.len().saturating_sub(part.len()) };
    said.drain(..end);
    says
}

/// Hands on what `from` says, until its end or until `deliver` has enough.
fn copy(mut from: &TcpStream, mut deliver: impl FnMut(&[u8]) -> bool) {
    let mut chunk = vec![0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut chunk) {
        if !deliver(&chunk[..count]) {
            return;
        }
    }
}

/// Ends a connection. With SO_LINGER at 0 the last descriptor's end is a reset, and nothing that waits is sent.
fn reset(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
    let _ = stream.shutdown(Shutdown::Both);
}

#[expect(clippy::disallowed_methods, reason = "a delay is what was asked for")]
fn delay(span: Duration) {
    std::thread::sleep(span);
}

/// A server that repeats whatever it is told, for as many clients as come.
fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || copy(&client, |chunk| (&client).write_all(chunk).is_ok()));
        }
    });
    address
}

#[test]
fn a_network_that_breaks() {
    let proxy = Proxy::start(echo());
    let connect = || {
        let client = TcpStream::connect(proxy.address()).unwrap();
        client.set_read_timeout(Some(LIMIT)).unwrap();
        client
    };
    let say = |mut client: &TcpStream, words: &str| {
        client.write_all(words.as_bytes()).unwrap();
    };
    // What comes back; none if the connection ends.
    let hear = |mut client: &TcpStream, words: &str| {
        let mut back = vec![0; words.len()];
        client.read_exact(&mut back).ok().map(|()| assert_eq!(back, words.as_bytes()))
    };
    let asks = |client: &TcpStream, words: &str| {
        say(client, words);
        hear(client, words)
    };
    let client = connect();
    assert_eq!(asks(&client, "pass"), Some(()));

    proxy.mode(Mode::Delay(Duration::from_millis(200)));
    let begun = time::monotonic();
    assert_eq!(asks(&client, "later"), Some(()));
    assert!(time::monotonic().duration_since(begun) >= Duration::from_millis(200));

    proxy.mode(Mode::Refuse);
    assert_eq!(hear(&connect(), "x"), None);
    assert_eq!(asks(&client, "still there"), Some(()));

    proxy.mode(Mode::Silent);
    for silent in [&client, &connect()] {
        silent.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        say(silent, "anybody?");
        let error = (&mut &*silent).read(&mut [0; 1]).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    }

    proxy.mode(Mode::Pass);
    let (first, second) = (connect(), connect());
    for client in [&first, &second] {
        assert_eq!(asks(client, "again"), Some(()));
    }
    proxy.mode(Mode::CutAt(b"COMMIT".to_vec()));
    assert_eq!(asks(&first, "..COM"), Some(()));
    assert_eq!(asks(&second, "another COM, MIT"), Some(()));
    say(&first, "MIT..");
    assert_eq!(hear(&first, "M"), None);
    assert_eq!(proxy.cuts(), 1);
    assert_eq!(asks(&second, "COMMIT"), Some(()), "it is cut once");

    for side in [Side::Client, Side::Server] {
        let (held, third) = (proxy.held(), connect());
        proxy.mode(Mode::HoldAt(side, b"HOLD".to_vec()));
        assert_eq!(asks(&second, "another HO, LD"), Some(()));
        assert_eq!(asks(&third, "..HO"), Some(()));
        say(&third, "LD..");
        eventually(LIMIT, "it is held", || proxy.held() > held);
        third.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        (&third).read(&mut [0; 1]).unwrap_err();
        assert_eq!(asks(&second, "HOLD"), Some(()), "one is held");
        proxy.release();
        third.set_read_timeout(Some(LIMIT)).unwrap();
        assert_eq!(hear(&third, "LD.."), Some(()));
        assert_eq!(asks(&third, "HOLD"), Some(()), "it is held once");
    }

    proxy.cut();
    assert_eq!(hear(&second, "x"), None);
    assert_eq!(asks(&connect(), "new ones pass"), Some(()));
}
