//! The engine: threads that send what is due and tell what came of it.
//!
//! In: a [`Job`]. Out: through each worker's [`crate::measure::recorder::Recorder`], one sample for each arrival; what is
//! about to be sent and what was fully received, through the ledger. Never: follows a redirect, allocates for a request,
//! waits for one connection while another arrival is due, takes an arrival's instant from anything but the plan. At its
//! limit: arrivals wait in their group's queue (bounded by rate x timeout, since what waits longer is `unsent`).

pub mod address;
pub mod http;
pub mod template;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::scenario::Scenario;

/// What the workers are to do.
#[derive(Debug, Clone)]
pub struct Job {
    pub scenario: Arc<Scenario>,
    /// Threads; resolved, at least 1.
    pub workers: usize,
    /// The address that `scenario.run.target` was resolved to.
    pub address: std::net::SocketAddr,
    pub spin: Spin,
    /// What `{key}` in headers becomes.
    pub key: Option<String>,
    pub ledger: Option<LedgerJob>,
    /// Set from outside: no more arrivals, drain, end.
    pub stop: Arc<AtomicBool>,
    pub defect: Option<Defect>,
}

#[derive(Debug, Clone)]
pub struct LedgerJob {
    pub file: PathBuf,
    /// The name of the header that carries the id.
    pub header: String,
}

/// Whether a worker that waits for its next arrival keeps its core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spin {
    /// Where this process may use more cores than it has workers and a target on this machine.
    Auto,
    Never,
    Always,
}

/// A fault planted on purpose: `prove` must find each (oha had the first for years, hatoo/oha#857).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Defect {
    /// Response time counted from the send instead of the intended instant.
    FromSend,
    /// A long sample invents the ones before it, though the schedule has them already.
    BackFill,
    /// One reading of the clock for everything that a wake-up brings, taken before.
    CachedClock,
}
