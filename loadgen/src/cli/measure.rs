//! What `http` and `run` share: a scenario is carried out, watched, judged and reported.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::args::Common;
use super::{Failure, print};
use crate::campaign::{self, Performed};
use crate::checks::{self, machine};
use crate::engine::{self, Job, LedgerJob};
use crate::measure::totals::Totals;
use crate::plan::arrivals;
use crate::plan::curve::Cumulative;
use crate::report::{self, Ended, Report, Skipped, bundle, terminal};
use crate::scenario::Scenario;
use crate::slo::eval;
use crate::{events, probe};

/// What is measured, and what a reader of its report must know.
pub(super) struct Subject {
    pub(super) scenario: Scenario,
    pub(super) address: SocketAddr,
    pub(super) key: Option<String>,
    pub(super) skipped: Vec<Skipped>,
    pub(super) notes: Vec<String>,
}

/// From the scenario to the exit code.
pub(super) fn measure(subject: Subject, common: &Common) -> Result<u8, Failure> {
    let Subject { scenario, address, key, skipped, notes } = subject;
    if let Some(folder) = &common.out {
        bundle::prepare(folder).map_err(Failure::Usage)?;
    }
    events::check(&scenario.events).map_err(Failure::Usage)?;
    if common.ledger.is_some() {
        probe::ids::ask(&scenario, address, &common.ledger_header).map_err(Failure::Usage)?;
    }
    for text in skipped.iter().map(|skipped| format!("{}: left out: {}", skipped.traffic, skipped.reason)) {
        print::say(&text);
    }
    for note in &notes {
        print::say(note);
    }

    let same_host = machine::is_this_host(address.ip());
    let workers = match scenario.run.workers {
        0 => engine::cores().saturating_sub(usize::from(same_host)).max(1),
        workers => workers,
    };
    let planned = arrivals::counts(&scenario);
    let scenario = Arc::new(scenario);
    let interruption = Interruption::listen().context("signals")?;
    let job = Job {
        scenario: Arc::clone(&scenario),
        workers,
        address,
        spin: common.spin,
        key,
        ledger: common
            .ledger
            .as_ref()
            .map(|file| LedgerJob { file: file.clone(), header: common.ledger_header.clone() }),
        stop: Arc::clone(&interruption.stop),
        defect: None,
    };
    let mut shown_s = 0;
    let intervals = common.out.as_ref().map(|folder| folder.join(bundle::INTERVALS));
    let performed = campaign::perform(job, intervals, &mut |totals, elapsed_s| {
        shown_s = show(&scenario, totals, shown_s, elapsed_s);
    })?;

    let report = judge(
        &scenario,
        &planned,
        &performed,
        &interruption,
        Run { address, same_host, workers, common, skipped, notes },
    );
    deliver(&report, &scenario, &performed.totals, common)?;
    Ok(report.exit_code)
}

/// The lines of the seconds that are over; all workers have told of a second when the next one is.
fn show(scenario: &Scenario, totals: &Totals, shown_s: u32, elapsed_s: u32) -> u32 {
    let mut shown_s = shown_s;
    for interval in totals.intervals() {
        let end_s = interval.from_s + interval.seconds;
        if interval.from_s >= shown_s && end_s < elapsed_s {
            let (phase, planned) = planned(scenario, interval.from_s, end_s);
            print::say(&terminal::live(interval, phase, planned));
            shown_s = end_s;
        }
    }
    shown_s
}

/// The name of the phase in which a second begins, and how many arrivals the plan has in it.
fn planned(scenario: &Scenario, from_s: u32, to_s: u32) -> (&str, u64) {
    let (from_s, to_s) = (f64::from(from_s), f64::from(to_s));
    let (mut begin_s, mut name, mut arrivals) = (0.0, "(draining)", 0.0);
    for phase in &scenario.phases {
        let end_s = begin_s + phase.for_ns as f64 / 1e9;
        if from_s < end_s && to_s > begin_s {
            let curve = Cumulative::new(&phase.curve, phase.for_ns);
            arrivals += curve.count(to_s.min(end_s) - begin_s) - curve.count(from_s.max(begin_s) - begin_s);
            if from_s >= begin_s {
                name = &phase.name;
            }
        }
        begin_s = end_s;
    }
    (name, arrivals.round() as u64)
}

struct Run<'a> {
    address: SocketAddr,
    same_host: bool,
    workers: usize,
    common: &'a Common,
    skipped: Vec<Skipped>,
    notes: Vec<String>,
}

fn judge(
    scenario: &Scenario,
    planned: &[Vec<u64>],
    performed: &Performed,
    interruption: &Interruption,
    run: Run<'_>,
) -> Report {
    let signal = interruption.signal();
    let circumstances = checks::Circumstances {
        same_host: run.same_host,
        interrupted: performed.stopped,
        failed: performed.failure.is_some(),
        events: &performed.events,
    };
    let checks = checks::run(&performed.totals, planned, scenario, &performed.machine, circumstances);
    report::build::build(&report::Run {
        scenario,
        planned,
        totals: &performed.totals,
        checks,
        slos: eval::evaluate(&scenario.slos, scenario, &performed.totals, &performed.events),
        events: performed.events.clone(),
        machine: performed.machine.clone(),
        address: run.address,
        same_host: run.same_host,
        options: report::Options {
            workers: run.workers as u64,
            spin: run.common.spin.name().to_owned(),
            ledger: run.common.ledger.is_some(),
        },
        begun_unix_ms: performed.begun_unix_ns / 1_000_000,
        lasted_ns: performed.lasted_ns,
        skipped: run.skipped,
        notes: run.notes,
        ended: match (&performed.failure, signal) {
            (Some(failure), _) => Ended::Failed(failure.clone()),
            (None, Some(signal)) => Ended::Interrupted { signal },
            (None, None) => Ended::AsPlanned,
        },
    })
}

/// To the terminal, into the folder, as JSON.
fn deliver(report: &Report, scenario: &Scenario, totals: &Totals, common: &Common) -> Result<()> {
    let look = terminal::Look { colour: terminal::wants_colour(), percentiles: common.latency };
    let to_stdout = common.json.as_ref().is_some_and(|file| file.as_os_str() == "-");
    let text = terminal::text(report, look);
    if to_stdout {
        bundle::json(report, std::io::stdout().lock())?;
        print::say(&text);
    } else {
        print::out(&text);
    }
    if let Some(folder) = &common.out {
        bundle::write(folder, report, scenario, totals)?;
    }
    if let Some(file) = common.json.as_ref().filter(|_| !to_stdout) {
        let out = std::fs::File::create(file).with_context(|| format!("{} cannot be written", file.display()))?;
        bundle::json(report, std::io::BufWriter::new(out))?;
    }
    Ok(())
}

/// SIGINT and SIGTERM: the first ends the run with a partial report, the second ends the process.
struct Interruption {
    stop: Arc<AtomicBool>,
    signal: Arc<AtomicUsize>,
}

impl Interruption {
    fn listen() -> Result<Self> {
        let (stop, signal) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let asked = Arc::new(AtomicBool::new(false));
        for number in [SIGINT, SIGTERM] {
            signal_hook::flag::register_conditional_shutdown(number, 128 + number, Arc::clone(&asked))?;
            signal_hook::flag::register(number, Arc::clone(&asked))?;
            signal_hook::flag::register(number, Arc::clone(&stop))?;
            signal_hook::flag::register_usize(number, Arc::clone(&signal), usize::try_from(number)?)?;
        }
        Ok(Self { stop, signal })
    }

    fn signal(&self) -> Option<u8> {
        u8::try_from(self.signal.load(Ordering::Relaxed)).ok().filter(|signal| *signal != 0)
    }
}
