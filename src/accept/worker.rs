//! A worker: one core's thread, its runtime, its accept loops and its orders.
//!
//! In: listeners, orders. Out: served connections; it ends when it was told to drain and the last one has ended, or
//! when it was told to stop. Never: touches another core's connections; keeps time of its own.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use hyper::server::conn::http1;
use rustix::net::SocketFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::LocalOptions;
use tokio::sync::{Notify, mpsc, oneshot};

use super::Counts;
use super::connection::{self, Connection, Desk, Ended, Limits};
use super::listener::Listener;
use crate::control::Order;
use crate::http::{Front, Via};

/// What a worker is made of. It crosses to its thread; the rest is made there.
pub struct Setup {
    pub number: usize,
    pub listeners: Vec<Listener>,
    pub orders: mpsc::Receiver<Order>,
    /// Makes the front, on the worker's own thread.
    pub front: Box<dyn FnOnce() -> Front + Send>,
    pub counts: Arc<Counts>,
    pub limits: Limits,
    /// Connections of this worker.
    pub connections_max: usize,
    /// Told when it accepts.
    pub ready: oneshot::Sender<()>,
}

/// Starts the worker's thread.
pub fn spawn(setup: Setup) -> io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new().name(format!("waypost-{}", setup.number)).spawn(move || {
        if let Err(error) = run(setup) {
            tracing::error!(%error, "a worker could not start");
            std::process::abort();
        }
    })
}

fn run(setup: Setup) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        // Every ready connection is served before the kernel is asked again: measured in PERF.md.
        .event_interval(256)
        .build_local(LocalOptions::default())?;
    runtime.block_on(serve(setup))
}

struct Worker {
    front: Rc<Front>,
    builder: http1::Builder,
    desk: Rc<Desk>,
    connections: RefCell<Slots>,
    counts: Arc<Counts>,
    limits: Limits,
    connections_max: usize,
    draining: Cell<bool>,
    /// The first tick of the drain.
    drain_ms: Cell<Option<u64>>,
    /// Wakes those who wait for the next tick, for a drain or for the last connection.
    changed: Notify,
    /// Closed to accept one more when there is no descriptor left.
    reserve: RefCell<Option<OwnedFd>>,
}

async fn serve(setup: Setup) -> io::Result<()> {
    let Setup { listeners, mut orders, front, counts, limits, connections_max, ready, .. } = setup;
    let worker = Rc::new(Worker {
        front: Rc::new(front()),
        builder: connection::builder(),
        desk: Rc::default(),
        connections: RefCell::default(),
        counts,
        limits,
        connections_max,
        draining: Cell::new(false),
        drain_ms: Cell::new(None),
        changed: Notify::new(),
        reserve: RefCell::new(reserve()),
    });
    let front = Rc::clone(&worker.front);
    tokio::task::spawn_local(async move { front.run().await });
    let mut accepting = Vec::new();
    for listener in listeners {
        let socket = watch(listener.socket.try_clone()?)?;
        accepting.push(tokio::task::spawn_local(accept_all(Rc::clone(&worker), listener, socket)));
    }
    // Nobody listens when the start was given up.
    let _ = ready.send(());
    loop {
        let order = tokio::select! {
            biased;
            order = orders.recv() => order,
            () = worker.changed.notified(), if worker.draining.get() => {
                if worker.connections.borrow().open == 0 { break } else { continue }
            }
        };
        match order {
            Some(Order::Tick { ms }) => worker.tick(ms),
            Some(Order::Drain) => {
                worker.drain();
                for accepting in accepting.drain(..) {
                    // They end at once; what waited in our own sockets is admitted then.
                    let _ = accepting.await;
                }
            }
            None => break,
        }
        if worker.draining.get() && worker.connections.borrow().open == 0 {
            break;
        }
    }
    worker.front.hand_over();
    Ok(())
}

impl Worker {
    fn tick(&self, ms: u64) {
        self.desk.now_ms.set(ms);
        self.front.tick(ms);
        let draining = self.draining.get();
        if draining && self.drain_ms.get().is_none() {
            self.drain_ms.set(Some(ms));
        }
        let drain_ms = self.drain_ms.get();
        let swept = self.connections.borrow().iter().filter(|open| open.sweep(self.limits, drain_ms)).count();
        if !draining {
            self.counts.swept.add(swept as u64);
        }
        self.counts.heartbeat_ms.set(ms);
        self.changed.notify_waiters();
    }

    fn drain(&self) {
        self.draining.set(true);
        self.front.drain();
        self.changed.notify_waiters();
    }

    /// Takes a connection in and serves it, if there is room.
    fn admit(self: &Rc<Self>, stream: TcpStream, address: IpAddr, listener: &Listener) {
        self.counts.accepted.add(1);
        if self.connections.borrow().open >= self.connections_max {
            self.counts.over_cap.add(1);
            return;
        }
        let connection = Rc::new(Connection::new(stream, Rc::clone(&self.desk)));
        let slot = self.connections.borrow_mut().insert(Rc::clone(&connection));
        self.counts.open.add(1);
        let worker = Rc::clone(self);
        let via = Via { peer: self.front.peer(address), surface: listener.listen.surface };
        let proxy_protocol = listener.listen.proxy_protocol;
        tokio::task::spawn_local(async move {
            let front = Rc::clone(&worker.front);
            let ended = connection::serve(connection, &worker.builder, front, via, proxy_protocol).await;
            if ended == Ended::NoProxyHeader {
                worker.counts.no_proxy_header.add(1);
            }
            worker.connections.borrow_mut().remove(slot);
            worker.counts.open.subtract(1);
            if worker.draining.get() {
                worker.changed.notify_one();
            }
        });
    }

    /// The next connection off the queue; none if it was turned away.
    fn accept(&self, socket: &TcpListener) -> io::Result<Option<(TcpStream, IpAddr)>> {
        match accept(socket) {
            Err(error) if is_out_of_descriptors(&error) => self.turn_away_one(socket).map(|()| None),
            accepted => accepted.map(Some),
        }
    }

    /// Out of descriptors: gives the reserve away to take one connection off the queue and close it. Otherwise the
    /// loop would spin on a queue that it cannot empty, or stop for good. `WouldBlock` if nobody waits: without a
    /// descriptor the kernel complains before it looks, and the socket would seem ready for ever.
    fn turn_away_one(&self, socket: &TcpListener) -> io::Result<()> {
        self.reserve.borrow_mut().take();
        // Closed before the reserve is taken back: it has the descriptor.
        let turned_away = accept(socket).map(drop);
        *self.reserve.borrow_mut() = reserve();
        turned_away.map(|()| self.counts.no_descriptor.add(1))
    }
}

fn reserve() -> Option<OwnedFd> {
    File::open("/dev/null").ok().map(OwnedFd::from)
}

/// Accepts until the server drains. Then a socket of our own is emptied before it is closed, since closing resets
/// what waits in it; a passed one is left as it is, for the next process.
async fn accept_all(worker: Rc<Worker>, listener: Listener, socket: AsyncFd<TcpListener>) {
    while !worker.draining.get() {
        let accepted = tokio::select! {
            biased;
            accepted = socket.async_io(Interest::READABLE, |socket| worker.accept(socket)) => accepted,
            () = worker.changed.notified() => continue,
        };
        match accepted {
            Ok(Some((stream, from))) => worker.admit(stream, from, &listener),
            // Turned away.
            Ok(None) => {}
            // The peer has gone already.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            // The kernel is short of memory or buffers: until the next tick.
            Err(_) => worker.changed.notified().await,
        }
    }
    if listener.passed {
        return;
    }
    loop {
        match worker.accept(&listener.socket) {
            Ok(Some((stream, from))) => worker.admit(stream, from, &listener),
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(_) => return,
        }
    }
}

/// tokio's own listener would register each accepted socket with epoll; most of those that bring one request need not
/// be (see `connection`).
#[expect(unsafe_code, reason = "tokio wants a promise that std's TcpListener keeps by its type")]
fn watch(socket: TcpListener) -> io::Result<AsyncFd<TcpListener>> {
    // SAFETY: a TcpListener owns its descriptor, which stays open and the same until it is dropped with the AsyncFd.
    unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }.map_err(io::Error::from)
}

/// One connection off the queue, not blocking, and who it is.
fn accept(socket: &TcpListener) -> io::Result<(TcpStream, IpAddr)> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (stream, from) = rustix::net::acceptfrom_with(socket, flags)?;
    let from = from.and_then(|from| SocketAddr::try_from(from).ok());
    Ok((stream.into(), from.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |from| from.ip())))
}

fn is_out_of_descriptors(error: &io::Error) -> bool {
    let error = error.raw_os_error();
    error == Some(rustix::io::Errno::MFILE.raw_os_error()) || error == Some(rustix::io::Errno::NFILE.raw_os_error())
}

/// The open connections, each in a slot whose number it knows.
#[derive(Default)]
struct Slots {
    slots: Vec<Option<Rc<Connection>>>,
    free: Vec<usize>,
    open: usize,
}

impl Slots {
    fn insert(&mut self, connection: Rc<Connection>) -> usize {
        self.open += 1;
        match self.free.pop() {
            Some(slot) => {
                self.slots[slot] = Some(connection);
                slot
            }
            None => {
                self.slots.push(Some(connection));
                self.slots.len() - 1
            }
        }
    }

    fn remove(&mut self, slot: usize) {
        self.open -= 1;
        self.slots[slot] = None;
        self.free.push(slot);
    }

    fn iter(&self) -> impl Iterator<Item = &Rc<Connection>> {
        self.slots.iter().flatten()
    }
}
