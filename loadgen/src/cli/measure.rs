//! What `http` and `run` share: a scenario is carried out, watched, judged and reported.

use std::fs::{File, OpenOptions};
use std::io::BufWriter;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result, anyhow, bail};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::args::Common;
use super::{Failure, print};
use crate::campaign::{self, Performed};
use crate::checks::{self, machine};
use crate::engine::template::Template;
use crate::engine::{self, Job, LedgerJob};
use crate::measure::seconds::Interval;
use crate::measure::totals::Totals;
use crate::plan::arrivals;
use crate::plan::curve::Cumulative;
use crate::report::{self, Ended, Report, Skipped, bundle, terminal};
use crate::scenario::{Scenario, Traffic};
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

/// What would end the run when everything else is done: told before a link is created or a second measured.
pub(super) fn check(scenario: &Scenario, common: &Common) -> Result<()> {
    events::check(&scenario.events)?;
    let header = common.ledger.as_ref().map(|_| common.ledger_header.as_str());
    for traffic in &scenario.traffic {
        // Whether there is a key is asked elsewhere: where there is none, some classes can be left out.
        Template::compile(traffic, &scenario.run.target.authority, Some("key"), header)?;
    }
    let is_looped = scenario.phases.iter().any(|phase| !phase.also.is_empty());
    if !is_looped && arrivals::counts(scenario).iter().flatten().sum::<u64>() == 0 {
        bail!("nothing arrives in the whole run: give it a higher rate, or more time");
    }
    if let Some(file) = &common.ledger {
        let problem = |what| anyhow!("--ledger {}: {what}", file.display());
        if file.symlink_metadata().is_ok() {
            return Err(problem("it is there already, and no ledger is overwritten: name another file, or remove it"));
        }
        if file.parent().is_some_and(|folder| !folder.as_os_str().is_empty() && !folder.is_dir()) {
            return Err(problem("its folder is not there: make it first"));
        }
    }
    if let Some(file) = common.json.as_ref().filter(|file| !is_stdout(file)) {
        // Neither made nor emptied yet: nothing may come of the run.
        if file.exists() {
            let open = OpenOptions::new().append(true).open(file);
            open.with_context(|| format!("--json {}: cannot be written", file.display()))?;
        } else if file.parent().is_some_and(|folder| !folder.as_os_str().is_empty() && !folder.is_dir()) {
            bail!("--json {}: its folder is not there: make it first", file.display());
        }
    }
    common.out.as_ref().map_or(Ok(()), |folder| bundle::prepare(folder))
}

fn is_stdout(json: &Path) -> bool {
    json.as_os_str() == "-"
}

/// From the scenario to the exit code.
pub(super) fn measure(subject: Subject, common: &Common) -> Result<u8, Failure> {
    let Subject { scenario, address, key, skipped, notes } = subject;
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
        0 => workers(&scenario, engine::cores().saturating_sub(usize::from(same_host))),
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
    let performed = campaign::perform(job, intervals.as_deref(), &mut |totals, elapsed_s| {
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

/// As many as there are cores for them, and no more than the smallest class has connections: each worker has one of each.
fn workers(scenario: &Scenario, cores: usize) -> usize {
    // A client of a closed loop is one worker's, and so is its connection, unless it shares that.
    let is_shared = |traffic: &&Traffic| traffic.closed.is_none_or(|closed| closed.clients > traffic.connection.max);
    scenario.traffic.iter().filter(is_shared).map(|traffic| traffic.connection.max).fold(cores, usize::min).max(1)
}

/// The lines of the seconds that are over.
fn show(scenario: &Scenario, totals: &Totals, shown_s: u32, elapsed_s: u32) -> u32 {
    let mut shown_s = shown_s;
    for interval in untold(totals.intervals(), shown_s, elapsed_s) {
        let end_s = interval.from_s + interval.seconds;
        let (phase, planned) = planned(scenario, interval.from_s, end_s);
        print::say(&terminal::live(interval, phase, planned));
        shown_s = end_s;
    }
    shown_s
}

/// Rows that end later than `shown_s`; all workers have told of a second when the next one is. Two rows become one after
/// an hour: one that begins before `shown_s` has half of its seconds untold.
fn untold(intervals: &[Interval], shown_s: u32, elapsed_s: u32) -> impl Iterator<Item = &Interval> {
    let end_s = |interval: &Interval| interval.from_s + interval.seconds;
    intervals.iter().filter(move |interval| end_s(interval) > shown_s && end_s(interval) < elapsed_s)
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
        cpu_ns: performed.cpu_ns,
        skipped: run.skipped,
        notes: run.notes,
        ended: match (&performed.failure, signal) {
            (Some(failure), _) => Ended::Failed(failure.clone()),
            (None, Some(signal)) => Ended::Interrupted { signal },
            (None, None) => Ended::AsPlanned,
        },
    })
}

/// Into the folder, to people, as JSON: what one of them does not take, the others still get.
fn deliver(report: &Report, scenario: &Scenario, totals: &Totals, common: &Common) -> Result<()> {
    let kept = common.out.as_ref().map_or(Ok(()), |folder| bundle::write(folder, report, scenario, totals));
    let look = terminal::Look { colour: terminal::wants_colour(), percentiles: common.latency };
    let text = terminal::text(report, look);
    let told = match &common.json {
        Some(file) if is_stdout(file) => {
            print::say(&text);
            bundle::json(report, std::io::stdout().lock()).context("--json -")
        }
        file => {
            print::out(&text);
            file.as_ref().map_or(Ok(()), |file| write_json(file, report))
        }
    };
    kept.and(told)
}

fn write_json(file: &Path, report: &Report) -> Result<()> {
    let context = || format!("--json {}", file.display());
    let out = File::create(file).with_context(context)?;
    bundle::json(report, BufWriter::new(out)).with_context(context)
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::scenario::change::Changes;
    use crate::scenario::load;

    #[test]
    fn each_second_is_told_also_when_rows_become_wider() {
        let row = |from_s, seconds| Interval { from_s, seconds, ..Interval::default() };
        let check = |rows: &[Interval], shown_s, elapsed_s, expected: &[u32]| {
            let told: Vec<u32> = untold(rows, shown_s, elapsed_s).map(|row| row.from_s).collect();
            assert_eq!(told, expected, "after {shown_s}");
        };
        let single = [row(0, 1), row(1, 1), row(2, 1)];
        check(&single, 0, 3, &[0, 1]);
        check(&single, 1, 4, &[1, 2]);
        let double = [row(3596, 2), row(3598, 2), row(3600, 2)];
        check(&double, 3599, 3602, &[3598]);
        check(&double, 3600, 3603, &[3600]);
    }

    /// The engine gives each worker a connection of each class, and would open more than the scenario allows.
    #[test]
    fn there_are_no_more_workers_than_connections() {
        let check = |class: &str, phase: &str, expected: usize| {
            let text = format!(
                "[run]\ntarget = \"http://127.0.0.1:1\"\n[traffic.a]\nrequest = \"GET /\"\n{class}\n[[phase]]\nname = \"x\"\n\
                 for = \"1s\"\n{phase}\n"
            );
            let scenario = load::from_toml("t", &text, Path::new("."), &Changes::default()).unwrap();
            assert_eq!(workers(&scenario, 4), expected, "{class}");
        };
        check("", "rate = 1\nmix = { a = 1 }", 4);
        check("connection = { max = 3 }", "rate = 1\nmix = { a = 1 }", 3);
        check("closed = { clients = 1 }", "also = [\"a\"]", 4);
        check("closed = { clients = 4 }\nconnection = { pipeline = 2 }", "also = [\"a\"]", 2);
    }
}
