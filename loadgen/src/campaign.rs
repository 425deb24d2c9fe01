//! One run: from a [`Job`] to everything that was measured.
//!
//! In: the job, and who wants to hear of each second. Out: [`Performed`]. Beside the workers it has a thread for events;
//! the calling one adds up what was measured. Never: changes a scenario. At its limit: an error of a worker or of the
//! interval log (the disk is full) ends the run; what was measured until then is there, and its report says why.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;

use anyhow::Context;

use crate::checks::machine::{Machine, Watch};
use crate::clock;
use crate::engine::{self, Job};
use crate::events::{self, Happened};
use crate::ledger::write::Ledger;
use crate::measure::hlog;
use crate::measure::totals::{self, Totals};
use crate::plan;
use crate::scenario::{ConnectionKind, Scenario, WhenFull};

/// What came of a run.
#[derive(Debug)]
pub struct Performed {
    pub totals: Totals,
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
    /// Why a worker or the interval log could not go on; what was measured until then is there.
    pub failure: Option<String>,
}

/// How long the collector waits before it looks whether the workers have ended.
const PATIENCE: Duration = Duration::from_millis(100);

/// From the call to the origin: threads start, and open the pools that stand before the first arrival.
fn head_start_ns(scenario: &Scenario) -> u64 {
    let connections = scenario.traffic.iter().map(|traffic| &traffic.connection);
    let opened = connections.filter(|it| it.kind == ConnectionKind::Pool && it.when_full == WhenFull::Queue);
    50_000_000 + opened.map(|connection| connection.max as u64).sum::<u64>() * 100_000
}

/// Carries out `job`. `on_second` is called about once a second, with the seconds
/// since the origin; `intervals` is where the interval log goes.
pub fn perform(
    job: Job,
    intervals: Option<&Path>,
    on_second: &mut dyn FnMut(&Totals, u32),
) -> anyhow::Result<Performed> {
    let job = Arc::new(job);
    let scenario = &job.scenario;
    let segments: Arc<[plan::Segment]> = plan::segments(scenario).into();
    let ledger = match &job.ledger {
        Some(ledger) => {
            let created = Ledger::create(&ledger.file, &scenario.run.target.authority, &ledger.header);
            Some(created.with_context(|| format!("--ledger {}", ledger.file.display()))?)
        }
        None => None,
    };
    let began_ns = clock::now_ns();
    let origin_ns = began_ns + head_start_ns(scenario);
    let begun_unix_ns = clock::unix_ns() + (origin_ns - began_ns);
    let mut log = match intervals {
        Some(path) => Some(hlog::Log::create(path, scenario, begun_unix_ns)?),
        None => None,
    };
    let log_failure = |error| intervals.map(|path| format!("{}: {error}", path.display()));
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
    let mut failure = None;
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
        if let Some(Err(error)) = log.as_mut().map(|log| log.add(&batch)) {
            // What is measured meanwhile is kept: without the log, but until the workers have ended.
            (log, failure) = (None, log_failure(error));
            job.stop.store(true, Relaxed);
        }
        collector.give_back(batch);
        let elapsed_s = (clock::now_ns().saturating_sub(origin_ns) / 1_000_000_000) as u32;
        if elapsed_s > seconds {
            seconds = elapsed_s;
            watch.observe();
            on_second(&totals, elapsed_s);
        }
    }
    if let Some(Err(error)) = log.map(hlog::Log::end) {
        failure = log_failure(error);
    }
    let lasted_ns = clock::now_ns().saturating_sub(origin_ns);
    if let Err(error) = running.join() {
        failure.get_or_insert_with(|| format!("{error:#}"));
    }
    let stopped = job.stop.load(Relaxed);
    // Whatever an event did is undone before anything is said.
    job.stop.store(true, Relaxed);
    let events = events.join().map_err(|_| anyhow::anyhow!("the thread of events panicked"))?;
    Ok(Performed {
        totals,
        events,
        machine: watch.end(),
        begun_unix_ns,
        lasted_ns,
        cpu_ns: clock::process_cpu_ns() - cpu_ns,
        stopped,
        failure,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::engine::Spin;
    use crate::measure::Outcome;
    use crate::scenario::change::Changes;
    use crate::scenario::load;
    use crate::slo::Scope;
    use crate::stub::{Stub, script::Script};

    fn scenario(target: &str, connection: &str) -> Scenario {
        let text = format!(
            "[run]\ntarget = \"{target}\"\n[traffic.a]\nrequest = \"GET /a\"\nconnection = {{ {connection} }}\n[[phase]]\n\
             name = \"x\"\nfor = \"100ms\"\nrate = 1000\nmix = {{ a = 1 }}\n"
        );
        load::from_toml("test", &text, Path::new("."), &Changes::default()).unwrap()
    }

    /// A large pool that grows when it must has nothing to open, and delays no run.
    #[test]
    fn only_pools_that_are_opened_beforehand_take_time() {
        for (connection, expected_ms) in [
            ("max = 30000", 50),
            ("max = 30000, when_full = \"shed\"", 50),
            ("max = 30000, when_full = \"queue\"", 3_050),
            ("max = 30000, kind = \"per_request\"", 50),
        ] {
            let scenario = scenario("http://127.0.0.1:1", connection);
            assert_eq!(head_start_ns(&scenario) / 1_000_000, expected_ms, "{connection}");
        }
    }

    #[test]
    fn a_full_disk_ends_the_run_and_keeps_what_was_measured() {
        let stub = Stub::start(([127, 0, 0, 1], 0).into(), Script::default()).unwrap();
        let job = Job {
            scenario: Arc::new(scenario(&format!("http://{}", stub.address()), "max = 4")),
            workers: 1,
            address: stub.address(),
            spin: Spin::Never,
            key: None,
            ledger: None,
            stop: Arc::new(AtomicBool::new(false)),
            defect: None,
        };
        let performed = perform(job, Some(Path::new("/dev/full")), &mut |_, _| {}).unwrap();
        let failure = performed.failure.unwrap_or_default();
        assert!(failure.starts_with("/dev/full: No space left"), "{failure}");
        assert_eq!(performed.totals.tally(&Scope::default()).of(Outcome::Ok), 100);
    }
}
