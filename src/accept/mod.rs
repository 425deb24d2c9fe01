//! Accept: from a socket to a request, on the core that accepted it.
//!
//! `listener` makes and takes over sockets; `worker` is a core: its runtime, its accept loops, its orders;
//! `connection` is one peer: its bytes in and out, and when it has had its time; `proxy_protocol` is what a balancer may
//! say before the first request.
//!
//! In: listening sockets. Out: requests for `http`, and their answers as bytes.
//! Never: a timer (one allocates per request): a coarse tick comes over `control`; a connection moved between cores.
//! At its limit: past `connections.max` a new connection is closed at once and counted; out of descriptors the
//! reserve takes one off the queue and closes it, so that the loop neither spins nor stops.

pub mod connection;
pub mod listener;
pub mod proxy_protocol;
pub mod worker;

use crate::metrics::Counter;

/// What one core counts of its connections, on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Counts {
    pub accepted: Counter,
    /// Open now.
    pub open: Counter,
    /// Closed at once: the cap was reached.
    pub over_cap: Counter,
    /// Closed at once: there was no descriptor left.
    pub no_descriptor: Counter,
    /// Closed for their slowness: a head that did not end, an answer that was not read, no next request.
    pub swept: Counter,
    /// A PROXY header was due, and other bytes came.
    pub no_proxy_header: Counter,
    /// The last tick that this worker has seen, in milliseconds since the start: its heartbeat.
    pub heartbeat_ms: Counter,
}
