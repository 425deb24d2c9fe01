//! What this machine can do, so that a run can be as large as it can be told truthfully.
//!
//! In: a stub in another process, some seconds. Out: a [`Calibration`], kept in `$XDG_CACHE_HOME/loadgen/` (else
//! `~/.cache/loadgen/`), a file for each processor and number of cores. Never: uses one that was made on another
//! processor, kernel or number of cores; leaves the stub behind, however it ends. At its limit: a file that cannot be read
//! counts as none; one that is doubtful by the checks of its own runs is told to be that ([`Made::doubt`]).
//!
//! How late a timer is: 1,000 wake-ups 1 ms apart, by the call and with the timer slack that workers use. How much can be
//! sent: the stub is asked in closed loops, once over connections that stay and once with a connection for each request.

use std::env;
use std::fmt;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use hdrhistogram::Histogram;
use rustix::event::{Timespec, epoll};
use serde::{Deserialize, Serialize};

use crate::campaign;
use crate::checks::{self, Check, Mark, machine};
use crate::clock;
use crate::engine::{self, Job, Spin};
use crate::measure::Outcome;
use crate::plan::arrivals;
use crate::scenario::change::Changes;
use crate::scenario::{ConnectionKind, Requests, Scenario, load, rates};
use crate::slo::Scope;
use crate::units;

/// One machine's measure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    pub machine: Machine,
    /// Requests a second over 64 connections that stay open.
    pub keep_alive_per_s: f64,
    /// Requests a second with a connection for each.
    pub connect_per_s: f64,
    /// How late a sleeping thread is, nanoseconds.
    pub lag_p50_ns: u64,
    pub lag_p99_ns: u64,
    /// When, in seconds since the Unix epoch.
    pub made_unix_s: u64,
}

/// A calibration that was just made.
#[derive(Debug)]
pub struct Made {
    pub calibration: Calibration,
    /// Why it is not to be kept for other runs.
    pub doubt: Option<String>,
}

/// What a measure depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    pub cpu: String,
    /// That this process may use.
    pub cores: usize,
    pub kernel: String,
}

/// What a server can be expected to bear of what the stub bears. It looks a link up, records the visit and asks a store
/// where the stub computes one hash, so it has half of the rate and the generator the rest of its own: well below the
/// 70 % of its own best from which V16 warns.
const SHARE_OF_STUB: f64 = 0.5;

/// Checks of a calibration's runs. The others ask for a plan that is kept or for time to spare, and loops at full speed
/// have neither.
const CHECKS: [&str; 6] = ["V1", "V5", "V6", "V8", "V11", "V15"];

const CLIENTS: usize = 64;
const WAKE_UPS: u64 = 1_000;
const WAKE_UP_NS: u64 = 1_000_000;
/// How long the stub may take to listen.
const START_TRIES: u32 = 250;
const START_PAUSE: Duration = Duration::from_millis(20);

impl Calibration {
    /// The one that was saved for this machine, if there is one.
    #[must_use]
    pub fn load() -> Option<Self> {
        let machine = Machine::this();
        Self::read(&file(&machine).ok()?, &machine)
    }

    fn read(file: &Path, machine: &Machine) -> Option<Self> {
        let calibration: Self = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
        (calibration.machine == *machine).then_some(calibration)
    }

    /// Saves it for the runs to come; says where.
    pub fn save(&self) -> Result<PathBuf> {
        let file = file(&self.machine)?;
        self.write(&file).with_context(|| format!("{} cannot be written", file.display()))?;
        Ok(file)
    }

    /// Whole or not at all.
    fn write(&self, file: &Path) -> io::Result<()> {
        if let Some(folder) = file.parent() {
            fs::create_dir_all(folder)?;
        }
        let new = file.with_extension(format!("{}.new", std::process::id()));
        fs::write(&new, serde_json::to_vec_pretty(self)?)?;
        fs::rename(&new, file)
    }

    /// The highest `peak`, requests a second, at which this machine can both send the scenario's requests and answer
    /// them: in no phase does the mix of connections ask for more than [`SHARE_OF_STUB`] of what the stub was asked.
    /// Closed loops are not counted: they ask for what is left. Infinite where nothing else arrives.
    #[must_use]
    pub fn peak_for(&self, scenario: &Scenario) -> f64 {
        let cost_s = |traffic: usize| self.cost_s(scenario.traffic[traffic].connection.kind);
        // Of the whole machine, for each request a second that `peak` stands for.
        let shares = scenario.phases.iter().map(|phase| {
            let request_s: f64 = phase.mix.iter().map(|(traffic, weight)| weight * cost_s(*traffic)).sum();
            let of_peak = if scenario.run.peak > 0.0 { rates::highest(&phase.curve) / scenario.run.peak } else { 1.0 };
            request_s * of_peak
        });
        SHARE_OF_STUB / shares.fold(0.0, f64::max)
    }

    /// Seconds of the machine for a request, its share of opening a connection included.
    fn cost_s(&self, kind: ConnectionKind) -> f64 {
        let (stays_s, opens_s) = (1.0 / self.keep_alive_per_s, 1.0 / self.connect_per_s);
        let session = |requests: f64| (opens_s + (requests - 1.0) * stays_s) / requests;
        match kind {
            ConnectionKind::Pool => stays_s,
            ConnectionKind::PerRequest => opens_s,
            ConnectionKind::Session(Requests::Fixed(requests)) => session(f64::from(requests)),
            ConnectionKind::Session(Requests::Geometric(mean)) => session(mean),
        }
    }
}

/// For people.
impl fmt::Display for Calibration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine { cpu, cores, kernel } = &self.machine;
        writeln!(f, "machine             {cpu}, {cores} cores, Linux {kernel}")?;
        writeln!(
            f,
            "timers are late by  {} (half), {} (1 of 100)",
            units::duration(self.lag_p50_ns),
            units::duration(self.lag_p99_ns)
        )?;
        writeln!(f, "on kept connections {}", units::rate(self.keep_alive_per_s.round()))?;
        writeln!(f, "each on a new one   {}", units::rate(self.connect_per_s.round()))
    }
}

impl Machine {
    /// The one that this process runs on.
    #[must_use]
    pub fn this() -> Self {
        let machine::Machine { cpu, cores, kernel, .. } = machine::Machine::this();
        Self { cpu, cores, kernel }
    }
}

/// Where it is kept, by the XDG base directory specification: a relative `$XDG_CACHE_HOME` is none.
fn file(machine: &Machine) -> Result<PathBuf> {
    let given = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|folder| folder.is_absolute());
    let folder = given.or_else(|| Some(env::home_dir()?.join(".cache")));
    let folder = folder.context("there is no home directory to keep the calibration in: set XDG_CACHE_HOME")?;
    Ok(folder.join("loadgen").join(file_name(machine)))
}

/// One for each processor and number of cores: `taskset` does not overwrite what the whole machine can do, nor does
/// another machine with the same home directory.
fn file_name(machine: &Machine) -> String {
    let cpu = machine.cpu.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
    format!("calibration-{cpu}-{}.json", machine.cores)
}

/// Measures for about `seconds` each way of connecting, against the stub of `program` (this one) in another process.
pub fn measure(program: &Path, seconds: u32) -> Result<Made> {
    let lag = timer_lag().context("measuring timers")?;
    let stub = StubProcess::start(program)?;
    against(stub.address, seconds, &lag)
}

fn against(address: SocketAddr, seconds: u32, lag: &Histogram<u64>) -> Result<Made> {
    let (keep_alive_per_s, kept_doubt) = closed_loop(address, seconds, "pool")?;
    let (connect_per_s, connect_doubt) = closed_loop(address, seconds, "per_request")?;
    let calibration = Calibration {
        machine: Machine::this(),
        keep_alive_per_s,
        connect_per_s,
        lag_p50_ns: lag.value_at_quantile(0.5),
        lag_p99_ns: lag.value_at_quantile(0.99),
        made_unix_s: clock::unix_ns() / 1_000_000_000,
    };
    Ok(Made { calibration, doubt: kept_doubt.or(connect_doubt) })
}

/// The first check that speaks against keeping what was measured.
fn doubt(checks: &[Check]) -> Option<String> {
    let spoils = |check: &&Check| check.verdict >= Mark::Invalid && CHECKS.contains(&check.id.as_str());
    checks.iter().find(spoils).map(|check| {
        let advice = check.advice.as_deref().unwrap_or_default();
        format!("{}, {}: {}: {advice}", check.id, check.what, check.value)
    })
}

/// On a thread of its own, since the timer slack stays with the thread.
fn timer_lag() -> Result<Histogram<u64>> {
    let measure = || -> Result<Histogram<u64>> {
        rustix::thread::set_current_timer_slack(NonZeroU64::new(1))?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mut events = Vec::with_capacity(1);
        let mut lag = Histogram::new(3)?;
        let begin_ns = clock::now_ns();
        for due_ns in (1..=WAKE_UPS).map(|number| begin_ns + number * WAKE_UP_NS) {
            let late_ns = loop {
                let now_ns = clock::now_ns();
                if now_ns >= due_ns {
                    break now_ns - due_ns;
                }
                let timeout = Timespec { tv_sec: 0, tv_nsec: i64::try_from(due_ns - now_ns)? };
                match epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout)) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            };
            lag.record(late_ns)?;
        }
        Ok(lag)
    };
    thread::spawn(measure).join().map_err(|_| anyhow!("the thread panicked"))?
}

/// Right answers a second, and what speaks against them. Connections come from many addresses, as a run's do, so that ports do not run out.
fn closed_loop(address: SocketAddr, seconds: u32, connection: &str) -> Result<(f64, Option<String>)> {
    let toml = format!(
        r#"
[run]
target = "http://{address}"
[traffic.redirect]
request = "GET /{{code}}"
code = {{ pick = "random", length = 7 }}
expect = {{ status = [307] }}
connection = {{ kind = "{connection}" }}
closed = {{ clients = {CLIENTS}, think = "0ms" }}
bind = "127.65.0.0/24"
[[phase]]
name = "calibrate"
for = "{seconds}s"
also = ["redirect"]
"#
    );
    let scenario = Arc::new(load::from_toml("calibrate", &toml, Path::new("."), &Changes::default())?);
    let job = Job {
        scenario: Arc::clone(&scenario),
        // The stub has the other core.
        workers: (engine::cores() - 1).max(1),
        address,
        spin: Spin::Never,
        key: None,
        ledger: None,
        stop: Arc::new(AtomicBool::new(false)),
        defect: None,
    };
    let performed = campaign::perform(job, None, &mut |_, _| {})?;
    let right = performed.totals.tally(&Scope::default()).of(Outcome::Ok);
    ensure!(right > 0, "the stub gave no right answer over connections of kind {connection}");
    let planned = arrivals::counts(&scenario);
    let circumstances = checks::Circumstances {
        same_host: true,
        interrupted: performed.stopped,
        failed: performed.failure.is_some(),
        events: &[],
    };
    let checks = checks::run(&performed.totals, &planned, &scenario, &performed.machine, circumstances);
    Ok((right as f64 / f64::from(seconds), doubt(&checks)))
}

/// Ended by its own id when it is dropped; by itself when this process was ended and drops nothing.
struct StubProcess {
    child: Child,
    address: SocketAddr,
}

impl StubProcess {
    fn start(program: &Path) -> Result<Self> {
        // Somebody may take the port in between; then the stub says so, and ends.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let child = Command::new(program)
            .args(["stub", "--until-stdin-ends", "--listen", &address.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("{} stub cannot be started", program.display()))?;
        let mut process = Self { child, address };
        for _ in 0..START_TRIES {
            if let Some(status) = process.child.try_wait()? {
                bail!("the stub ended at once, with {status}");
            }
            if TcpStream::connect(address).is_ok() {
                return Ok(process);
            }
            thread::sleep(START_PAUSE);
        }
        bail!("the stub did not listen on {address} within {:?}", START_PAUSE * START_TRIES)
    }
}

impl Drop for StubProcess {
    fn drop(&mut self) {
        // Either fails only where it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stub::Stub;
    use crate::stub::script::Script;

    fn calibration() -> Calibration {
        Calibration {
            machine: Machine { cpu: "a".to_owned(), cores: 2, kernel: "6.1".to_owned() },
            keep_alive_per_s: 10_000.0,
            connect_per_s: 2_000.0,
            lag_p50_ns: 52_000,
            lag_p99_ns: 1_100_000,
            made_unix_s: 1,
        }
    }

    #[test]
    fn a_calibration_is_used_on_the_machine_that_made_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("loadgen/calibration.json");
        let made = calibration();
        assert_eq!(Calibration::read(&file, &made.machine), None);
        made.write(&file).unwrap();
        assert_eq!(Calibration::read(&file, &made.machine), Some(made.clone()));
        for other in [
            Machine { cpu: "b".to_owned(), ..made.machine.clone() },
            Machine { cores: 4, ..made.machine.clone() },
            Machine { kernel: "6.2".to_owned(), ..made.machine.clone() },
        ] {
            assert_eq!(Calibration::read(&file, &other), None, "{other:?}");
        }
        fs::write(&file, "{").unwrap();
        assert_eq!(Calibration::read(&file, &made.machine), None);
        assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 1, "no half-written file is left");
    }

    #[test]
    fn each_processor_and_number_of_cores_has_a_file() {
        let of = |cpu: &str, cores| file_name(&Machine { cpu: cpu.to_owned(), cores, kernel: "6.1".to_owned() });
        assert_eq!(of("Intel(R) i7 / 3.0GHz", 8), "calibration-Intel-R--i7---3-0GHz-8.json");
        assert_ne!(of("a", 8), of("a", 2));
    }

    /// A loop at full speed has no time to spare; it is spoilt by what others did to it.
    #[test]
    fn a_doubtful_measure_is_told_to_be_that() {
        let check = |id: &str, verdict| Check {
            id: id.to_owned(),
            what: "what".to_owned(),
            value: "value".to_owned(),
            limit: String::new(),
            verdict,
            advice: Some("do this".to_owned()),
        };
        assert_eq!(doubt(&[check("V4", Mark::Invalid), check("V6", Mark::Warn)]), None);
        let found = doubt(&[check("V4", Mark::Invalid), check("V6", Mark::Invalid)]);
        assert_eq!(found.as_deref(), Some("V6, what: value: do this"));
    }

    #[test]
    fn the_peak_is_half_of_what_the_dearest_phase_allows() {
        let check = |phases: &str, expected: f64| {
            let class = |name: &str, connection: &str| {
                format!("[traffic.{name}]\nrequest = \"GET /\"\nconnection = {{ {connection} }}\n")
            };
            let toml = [
                "[run]\ntarget = \"http://127.0.0.1:1\"\npeak = 500\n".to_owned(),
                class("stays", "kind = \"pool\""),
                class("opens", "kind = \"per_request\""),
                class("two", "kind = \"session\", requests = 2"),
                class("mean", "kind = \"session\", requests = \"geometric(2)\""),
                phases.to_owned(),
            ];
            let scenario = load::from_toml("test", &toml.concat(), Path::new("."), &Changes::default())
                .unwrap_or_else(|error| panic!("{error}"));
            let peak = calibration().peak_for(&scenario);
            assert!((peak - expected).abs() < 1e-6 * expected, "{phases}: {peak}, not {expected}");
        };
        let phase =
            |rate: &str, mix: &str| format!("[[phase]]\nname = \"{mix}\"\nfor = \"1s\"\n{rate}\nmix = {{ {mix} }}\n");
        check(&phase("rate = \"peak\"", "stays = 1"), 5_000.0);
        check(&phase("rate = \"peak\"", "opens = 1"), 1_000.0);
        // (1/2,000 + 1/10,000) / 2 = 300 µs a request.
        check(&phase("rate = \"peak\"", "two = 1"), 0.5 / 300e-6);
        check(&phase("rate = \"peak\"", "mean = 1"), 0.5 / 300e-6);
        check(&phase("rate = \"peak\"", "stays = 3, opens = 1"), 0.5 / 200e-6);
        check(&phase("rate = \"50% of peak\"", "stays = 1"), 10_000.0);
        check(&[phase("rate = \"peak\"", "stays = 1"), phase("rate = \"10% of peak\"", "opens = 1")].concat(), 5_000.0);
        check(&[phase("rate = \"peak\"", "stays = 1"), phase("rate = \"50% of peak\"", "opens = 1")].concat(), 2_000.0);
    }

    #[test]
    fn this_machine_can_be_measured() {
        let stub = Stub::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), Script::default()).unwrap();
        let lag = timer_lag().unwrap();
        assert_eq!(lag.len(), WAKE_UPS);
        let Made { calibration: made, doubt } = against(stub.address(), 1, &lag).unwrap();
        assert!(doubt.is_some() || !cfg!(debug_assertions), "V15 is against debug builds");
        assert!(made.keep_alive_per_s >= 1.0 && made.connect_per_s >= 1.0, "{made:?}");
        assert!(made.lag_p50_ns <= made.lag_p99_ns);
        assert_eq!(made.machine, Machine::this());
        let truth = stub.stop().unwrap();
        assert!(truth.connections >= CLIENTS as u64 + made.connect_per_s as u64, "{made:?}, {truth:?}");
    }
}
