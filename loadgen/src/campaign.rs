//! One run: from a [`Job`] to everything that was measured.
//!
//! In: the job, and who wants to hear of each second. Out: [`Performed`]. Beside the workers it has a thread for events;
//! the calling one adds up what was measured. Never: changes a scenario. At its limit: an error of a worker (the ledger's
//! disk is full) ends the run, whose report says so.

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;

use crate::checks::machine::{Machine, Watch};
use crate::clock;
use crate::engine::{self, Ended, Job};
use crate::events::{self, Happened};
use crate::ledger::write::Ledger;
use crate::measure::hlog;
use crate::measure::totals::{self, Totals};
use crate::plan;

/// What came of a run.
#[derive(Debug)]
pub struct Performed {
    pub totals: Totals,
    pub workers: Vec<Ended>,
    pub events: Vec<Happened>,
    pub machine: Machine,
    /// The wall clock at the run's origin.
    pub begun_unix_ns: u64,
    /// From the origin to the end of the last worker.
    pub lasted_ns: u64,
    /// CPU time of the whole process during the run.
    pub cpu_ns: u64,
    /// Ended before the plan was through.
    pub stopped: bool,
    /// Why a worker could not go on; what was measured until then is there.
    pub failure: Option<String>,
}

/// How long the collector waits before it looks whether the workers have ended.
const PATIENCE: Duration = Duration::from_millis(100);

/// From the call to the origin: threads start, and open a pool of `n` connections.
fn head_start_ns(connections: usize) -> u64 {
    50_000_000 + connections as u64 * 100_000
}

/// Carries out `job`. `on_second` is called about once a second, with the seconds
/// since the origin; `intervals` is where the interval log goes.
pub fn perform(
    job: Job,
    intervals: Option<PathBuf>,
    on_second: &mut dyn FnMut(&Totals, u32),
) -> anyhow::Result<Performed> {
    let job = Arc::new(job);
    let scenario = &job.scenario;
    let segments: Arc<[plan::Segment]> = plan::segments(scenario).into();
    let ledger = match &job.ledger {
        Some(ledger) => Some(Ledger::create(&ledger.file, &scenario.run.target.authority, &ledger.header)?),
        None => None,
    };
    let connections = scenario.traffic.iter().map(|traffic| traffic.connection.max).sum();
    let began_ns = clock::now_ns();
    let origin_ns = began_ns + head_start_ns(connections);
    let begun_unix_ns = clock::unix_ns() + (origin_ns - began_ns);
    let mut log = match intervals {
        Some(path) => Some(hlog::Log::begin(BufWriter::new(File::create(path)?), scenario, begun_unix_ns)?),
        None => None,
    };
    let mut totals = Totals::new(scenario, &segments, job.workers);
    let (recorders, collector) = totals::channel(job.workers, scenario, &segments, origin_ns);
    let mut watch = Watch::begin();
    let cpu_ns = clock::process_cpu_ns();

    let running = engine::start(&job, &segments, origin_ns, recorders, ledger.as_ref())?;
    let events = {
        let job = Arc::clone(&job);
        thread::spawn(move || events::run(&job.scenario.events, origin_ns, &job.stop))
    };
    let mut seconds = 0;
    loop {
        // Asked before the last look, so that no batch comes after it.
        let over = running.is_over();
        let Some(batch) = collector.next(PATIENCE) else {
            if over {
                break;
            }
            continue;
        };
        totals.absorb(&batch);
        if let Some(log) = &mut log {
            log.add(&batch)?;
        }
        collector.give_back(batch);
        let elapsed_s = (clock::now_ns().saturating_sub(origin_ns) / 1_000_000_000) as u32;
        if elapsed_s > seconds {
            seconds = elapsed_s;
            watch.observe();
            on_second(&totals, elapsed_s);
        }
    }
    if let Some(log) = log {
        log.end()?;
    }
    let lasted_ns = clock::now_ns().saturating_sub(origin_ns);
    let (workers, failure) = match running.join() {
        Ok(workers) => (workers, None),
        Err(error) => (Vec::new(), Some(format!("{error:#}"))),
    };
    let stopped = job.stop.load(Relaxed);
    // Whatever an event did is undone before anything is said.
    job.stop.store(true, Relaxed);
    let events = events.join().map_err(|_| anyhow::anyhow!("the thread of events panicked"))?;
    Ok(Performed {
        totals,
        workers,
        events,
        machine: watch.end(),
        begun_unix_ns,
        lasted_ns,
        cpu_ns: clock::process_cpu_ns() - cpu_ns,
        stopped,
        failure,
    })
}
