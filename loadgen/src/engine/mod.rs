//! The engine: threads that send what is due and tell what came of it.
//!
//! In: a [`Job`]. Out: through each worker's [`crate::measure::recorder::Recorder`], one sample for each arrival; what is
//! about to be sent and what was fully received, through the ledger. Never: follows a redirect, allocates for a request,
//! waits for one connection while another arrival is due, takes an arrival's instant from anything but the plan. At its
//! limit: arrivals wait in their group's queue (bounded by rate x timeout, since what waits longer is `unsent`).

pub mod address;
pub mod http;
pub mod template;

pub mod answer;
mod connection;
mod fresh;
mod group;
mod worker;

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::{self, JoinHandle};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::ledger::write::Ledger;
use crate::measure::recorder::Recorder;
use crate::plan::Segment;
use crate::scenario::Scenario;
use worker::Worker;

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

/// Whether a worker that waits for its next arrival polls instead of sleeping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spin {
    /// For the last part of the wait: at most a quarter of it, and 50 µs.
    Auto,
    /// It sleeps, and comes back when the kernel's timer and scheduler let it.
    Never,
    /// All the time: its core is its own. Beside a server on two cores that takes the server's.
    Always,
}

impl Spin {
    /// As it is typed.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Never => "never",
            Self::Always => "always",
        }
    }
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

/// A worker that has ended.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    /// CPU time of its thread.
    pub cpu_ns: u64,
}

/// Threads that are at work.
#[derive(Debug)]
pub struct Running {
    threads: Vec<JoinHandle<anyhow::Result<Ended>>>,
}

impl Running {
    /// Whether all have ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Waits for all workers. The first error among them is the run's.
    pub fn join(self) -> anyhow::Result<Vec<Ended>> {
        let ended: Vec<_> = self.threads.into_iter().map(JoinHandle::join).collect();
        ended.into_iter().map(|ended| ended.map_err(|_| anyhow::anyhow!("a worker panicked"))?).collect()
    }
}

/// Starts a thread for each recorder. The run begins at `origin_ns`, which leaves them time to open their pools.
pub fn start(
    job: &Arc<Job>,
    segments: &Arc<[Segment]>,
    origin_ns: u64,
    recorders: Vec<Recorder>,
    ledger: Option<&Ledger>,
) -> anyhow::Result<Running> {
    raise_file_limit();
    let threads = recorders.into_iter().enumerate().map(|(number, recorder)| {
        let (job, segments) = (Arc::clone(job), Arc::clone(segments));
        let writer = ledger.map(|ledger| ledger.writer(number)).transpose()?;
        let name = format!("{WORKER}{number}");
        let thread = thread::Builder::new().name(name).spawn(move || {
            // Waking up is late by it otherwise, 50 µs (prctl(2), PR_SET_TIMERSLACK).
            let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
            let ended = Worker::new(&job, &segments, number, origin_ns, recorder, writer).and_then(Worker::run);
            // One that cannot go on ends the others: half a load measures nothing.
            if ended.is_err() {
                job.stop.store(true, Relaxed);
            }
            ended
        })?;
        Ok(thread)
    });
    Ok(Running { threads: threads.collect::<anyhow::Result<_>>()? })
}

/// The name of a worker's thread, without its number.
pub const WORKER: &str = "loadgen-";

/// Cores that this process may use.
#[must_use]
pub fn cores() -> usize {
    rustix::thread::sched_getaffinity(None).map_or(1, |set| set.count() as usize).max(1)
}

/// A connection is an open file: as many as we may have.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    // Where it cannot be raised, V8 tells when it was too low.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}
