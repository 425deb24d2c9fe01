//! A scripted HTTP/1.1 server whose every answer time is known: the judge of the generator, and a fast opposite for
//! comparisons of CPU.
//!
//! In: an address, a [`script::Script`]. Out: answers as the script says, and at the end the [`truth::Truth`]. Never: a
//! second thread, TLS, a file. At its limit: as many connections as the process may have files, which is raised as far
//! as the system allows; then it ends with an error.
//!
//! What it serves: `GET` and `HEAD /{code}` are redirected (307) to the code's derived target, or to the one that was
//! posted; codes that begin with `missing` are unknown (404); `POST /shorten` creates (201), but no second link of a
//! `custom_code` (409); `/stats/{code}` and `/healthz`, which gives `X-Request-Id` back, are 200.

mod http;
mod links;
pub mod script;
mod server;
pub mod truth;

use std::io;
use std::net::SocketAddr;
use std::panic;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use socket2::Socket;

use crate::clock;
use crate::engine;
use script::Script;
use server::Server;
use truth::Truth;

/// A stub that runs in a thread of this process; dropped, it stops.
#[derive(Debug)]
pub struct Stub {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    clock_ns: Arc<AtomicU64>,
    thread: Option<JoinHandle<io::Result<Truth>>>,
}

impl Stub {
    /// Listens and serves; with port 0 the system chooses one.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn start(listen: SocketAddr, script: Script) -> io::Result<Self> {
        engine::raise_file_limit();
        let listener = server::listen(listen)?;
        let address = address_of(&listener)?;
        let stop = Arc::new(AtomicBool::new(false));
        let clock_ns = Arc::new(AtomicU64::new(0));
        let (stop_seen, clock_seen) = (Arc::clone(&stop), Arc::clone(&clock_ns));
        let thread = thread::Builder::new()
            .name("stub".to_owned())
            .spawn(move || Server::new(listener, script, &clock_seen)?.run(&stop_seen))?;
        Ok(Self { address, stop, clock_ns, thread: Some(thread) })
    }

    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Begins the script's time now, instead of with the first request that is not for `/healthz`.
    pub fn start_clock(&self) {
        self.clock_ns.store(clock::now_ns(), Ordering::Relaxed);
    }

    /// Ends it, with what it saw.
    ///
    /// # Errors
    /// It ended before, for want of files.
    pub fn stop(mut self) -> io::Result<Truth> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(truth)) => truth,
            Some(Err(cause)) => panic::resume_unwind(cause),
            None => Err(io::Error::other("the stub was stopped before")),
        }
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Serves in this thread until `stop` is set; `on_listening` is told where, once connections can be made.
///
/// # Errors
/// The address cannot be listened on, or no more files may be opened.
pub fn serve(
    listen: SocketAddr,
    script: Script,
    stop: &AtomicBool,
    on_listening: impl FnOnce(SocketAddr),
) -> io::Result<Truth> {
    engine::raise_file_limit();
    let listener = server::listen(listen)?;
    on_listening(address_of(&listener)?);
    Server::new(listener, script, &AtomicU64::new(0))?.run(stop)
}

fn address_of(listener: &Socket) -> io::Result<SocketAddr> {
    listener.local_addr()?.as_socket().ok_or_else(|| io::Error::other("the stub's socket has no internet address"))
}
