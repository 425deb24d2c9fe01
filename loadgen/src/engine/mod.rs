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
    /// For the last part of the wait: at most half of it, and 50 µs.
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

/// Threads that are at work.
#[derive(Debug)]
pub struct Running {
    threads: Vec<JoinHandle<anyhow::Result<()>>>,
}

impl Running {
    /// Whether all have ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Waits for all workers. The first error among them is the run's.
    pub fn join(self) -> anyhow::Result<()> {
        let ended: Vec<_> = self.threads.into_iter().map(JoinHandle::join).collect();
        ended.into_iter().try_for_each(|ended| ended.map_err(|_| anyhow::anyhow!("a worker panicked"))?)
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
    let mut running = Running { threads: Vec::new() };
    for (number, recorder) in recorders.into_iter().enumerate() {
        if let Err(error) = running.add(job, segments, origin_ns, number, recorder, ledger) {
            job.stop.store(true, Relaxed);
            // Those that run already have nothing else to say.
            let _ = running.join();
            return Err(error);
        }
    }
    Ok(running)
}

impl Running {
    fn add(
        &mut self,
        job: &Arc<Job>,
        segments: &Arc<[Segment]>,
        origin_ns: u64,
        number: usize,
        recorder: Recorder,
        ledger: Option<&Ledger>,
    ) -> anyhow::Result<()> {
        let (job, segments) = (Arc::clone(job), Arc::clone(segments));
        let writer = ledger.map(|ledger| ledger.writer(number)).transpose()?;
        let thread = thread::Builder::new().name(format!("{WORKER}{number}")).spawn(move || {
            let mut alone = Alone { stop: &job.stop, ended: false };
            // Waking up is late by it otherwise, 50 µs (prctl(2), PR_SET_TIMERSLACK).
            let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
            let worked = Worker::new(&job, &segments, number, origin_ns, recorder, writer).and_then(Worker::run);
            alone.ended = worked.is_ok();
            worked
        })?;
        self.threads.push(thread);
        Ok(())
    }
}

/// A worker that cannot go on, or panics, ends the others: half a load measures nothing.
struct Alone<'a> {
    stop: &'a AtomicBool,
    ended: bool,
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.stop.store(true, Relaxed);
        }
    }
}

/// The name of a worker's thread, without its number.
pub const WORKER: &str = "loadgen-";

/// Cores that this process may use.
#[must_use]
pub fn cores() -> usize {
    rustix::thread::sched_getaffinity(None).map_or(1, |set| set.count() as usize).max(1)
}

/// A connection is an open file: as many as we may have.
pub(crate) fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    // Where it cannot be raised, V8 tells when it was too low.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}
