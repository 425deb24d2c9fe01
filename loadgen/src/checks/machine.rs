//! What the kernel says of the machine, and of how it treated this process.
//!
//! In: files of `/proc` and `/sys` (proc(5), the kernel's documentation of cpufreq and of clocksources). Out: a
//! [`Machine`]. Never: fails; reads a clock. At its limit: what cannot be read is `None`, empty or 0 (other systems, hidden
//! `/proc`), and no check condemns a run for that.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, UdpSocket};

use serde::{Deserialize, Serialize};

use crate::engine;

/// The machine, and how it treated a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// That this process may use.
    pub cores: usize,
    /// The processor's model; empty where the kernel does not tell.
    pub cpu: String,
    /// Of the first core's frequency; none where there is no choice, as in most virtual machines.
    pub governor: Option<String>,
    pub clocksource: Option<String>,
    /// Its release.
    pub kernel: String,
    /// Of loadgen itself.
    pub debug_build: bool,
    /// Of all CPU time, 0 to 1, what the hypervisor gave to others while this machine wanted it.
    pub steal_share: f64,
    /// Of all CPU time, 0 to 1, what was not idle, whoever used it.
    pub cpu_share: f64,
    /// How often one of this process's threads was taken off its core while it wanted to run. Of threads that were alive
    /// in some [`Watch::observe`].
    pub involuntary_switches: u64,
    /// Of the run's time, 0 to 1, how long the worker that fared worst wanted to run and had no core. Of workers that were
    /// alive in some [`Watch::observe`].
    pub core_wait_share: f64,
}

/// Looks at the machine while a run goes on.
#[derive(Debug)]
pub struct Watch {
    begun: CpuTimes,
    /// By thread: at first sight and at the last.
    switches: BTreeMap<u32, (u64, u64)>,
    begun_ns: u64,
    /// The largest share of the time since then that a worker has waited for a core, at the last look.
    core_wait_share: f64,
}

/// Of all cores, in ticks since the machine started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct CpuTimes {
    total: u64,
    idle: u64,
    steal: u64,
}

impl Machine {
    /// What does not change; the shares are 0.
    #[must_use]
    pub fn this() -> Self {
        Self {
            cores: engine::cores(),
            cpu: cpu_model(&text("/proc/cpuinfo").unwrap_or_default()),
            governor: text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            clocksource: text("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
            kernel: text("/proc/sys/kernel/osrelease").unwrap_or_default(),
            debug_build: cfg!(debug_assertions),
            ..Self::default()
        }
    }
}

impl Watch {
    /// Before the run.
    #[must_use]
    pub fn begin() -> Self {
        let begun = cpu_times(&text("/proc/stat").unwrap_or_default());
        let mut watch = Self { begun, switches: BTreeMap::new(), begun_ns: uptime_ns(), core_wait_share: 0.0 };
        watch.observe();
        watch
    }

    /// While its threads live, about once a second: the kernel forgets their counts with them.
    pub fn observe(&mut self) {
        let threads = threads();
        for Thread { id, switches, .. } in &threads {
            self.switches.entry(*id).or_insert((*switches, *switches)).1 = *switches;
        }
        // Workers begin after the watch: all that they ever waited is of its time.
        if let Some(waited_ns) = threads.iter().filter_map(|thread| thread.worker_waited_ns).max() {
            self.core_wait_share = part(waited_ns, uptime_ns().saturating_sub(self.begun_ns));
        }
    }

    /// After the run.
    #[must_use]
    pub fn end(mut self) -> Machine {
        self.observe();
        let now = cpu_times(&text("/proc/stat").unwrap_or_default());
        let (steal_share, cpu_share) = shares(self.begun, now);
        let involuntary_switches = self.switches.values().map(|(first, last)| last.saturating_sub(*first)).sum();
        let core_wait_share = self.core_wait_share;
        Machine { steal_share, cpu_share, involuntary_switches, core_wait_share, ..Machine::this() }
    }
}

/// Whether requests to it stay on this machine: an address that can be bound is one of ours.
#[must_use]
pub fn is_this_host(address: IpAddr) -> bool {
    address.is_loopback() || UdpSocket::bind((address, 0)).is_ok()
}

/// A file of one value; none when it is missing or empty.
fn text(path: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    (!text.trim().is_empty()).then(|| text.trim().to_owned())
}

/// `model name` of `/proc/cpuinfo` on x86; ARM has a `Hardware` or none.
fn cpu_model(cpuinfo: &str) -> String {
    let value = |key| cpuinfo.lines().filter_map(|line| line.split_once(':')).find(|(name, _)| name.trim() == key);
    value("model name").or_else(|| value("Hardware")).map_or(String::new(), |(_, model)| model.trim().to_owned())
}

/// The first line of `/proc/stat`: user, nice, system, idle, iowait, irq, softirq, steal; guest times, which follow, are
/// part of the first two.
fn cpu_times(stat: &str) -> CpuTimes {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu ")).unwrap_or_default();
    let ticks: Vec<u64> = line.split_ascii_whitespace().take(8).map_while(|ticks| ticks.parse().ok()).collect();
    let [.., idle, iowait, _, _, steal] = ticks[..] else { return CpuTimes::default() };
    CpuTimes { total: ticks.iter().sum(), idle: idle + iowait, steal }
}

/// (stolen, not idle) of the time between two readings.
fn shares(from: CpuTimes, to: CpuTimes) -> (f64, f64) {
    let total = to.total.saturating_sub(from.total);
    if total == 0 {
        return (0.0, 0.0);
    }
    let share = |from: u64, to: u64| part(to.saturating_sub(from), total);
    (share(from.steal, to.steal), 1.0 - share(from.idle, to.idle))
}

/// 0 to 1; 0 of nothing.
fn part(of: u64, all: u64) -> f64 {
    if all == 0 { 0.0 } else { (of as f64 / all as f64).min(1.0) }
}

/// A living thread.
struct Thread {
    id: u32,
    switches: u64,
    /// How long it wanted to run and had no core; only of workers.
    worker_waited_ns: Option<u64>,
}

fn threads() -> Vec<Thread> {
    let Ok(threads) = fs::read_dir("/proc/self/task") else { return Vec::new() };
    threads
        .flatten()
        .filter_map(|thread| {
            let read = |name| fs::read_to_string(thread.path().join(name)).ok();
            let is_worker = read("comm").is_some_and(|name| name.starts_with(engine::WORKER));
            Some(Thread {
                id: thread.file_name().to_str()?.parse().ok()?,
                switches: involuntary_switches(&read("status")?)?,
                worker_waited_ns: read("schedstat").filter(|_| is_worker).and_then(|times| waited_ns(&times)),
            })
        })
        .collect()
}

/// The second number of a thread's `schedstat`: nanoseconds on a run queue (Documentation/scheduler/sched-stats.rst).
fn waited_ns(schedstat: &str) -> Option<u64> {
    schedstat.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Since the machine started, by its first number, in hundredths of a second.
fn uptime_ns() -> u64 {
    let uptime = text("/proc/uptime").unwrap_or_default();
    let seconds: f64 = uptime.split_ascii_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(0.0);
    (seconds * 1e9) as u64
}

/// `nonvoluntary_ctxt_switches` of a thread's `status`.
fn involuntary_switches(status: &str) -> Option<u64> {
    status.lines().find_map(|line| line.strip_prefix("nonvoluntary_ctxt_switches:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::thread::gettid;

    use super::{
        CpuTimes, Watch, cpu_model, cpu_times, involuntary_switches, is_this_host, part, shares, threads, uptime_ns,
        waited_ns,
    };
    use crate::engine;

    #[test]
    fn the_kernels_texts_are_understood() {
        let check =
            |stat: &str, total, idle, steal| assert_eq!(cpu_times(stat), CpuTimes { total, idle, steal }, "{stat}");
        check("cpu  10 20 30 400 50 6 7 8 9 10\ncpu0 1 1 1 1 1 1 1 1 1 1\n", 531, 450, 8);
        check("cpu  10 20 30 400 50 6 7 8\n", 531, 450, 8);
        check("", 0, 0, 0);
        check("cpu  10 x 30", 0, 0, 0);
        assert_eq!(
            cpu_model("processor\t: 0\nmodel\t\t: 2\nmodel name\t: Fast One: 3\n\nmodel name: b"),
            "Fast One: 3"
        );
        assert_eq!(cpu_model("processor : 0\nHardware : Board\n"), "Board");
        assert_eq!(cpu_model(""), "");
        let status = "Name:\ta\nvoluntary_ctxt_switches:\t9\nnonvoluntary_ctxt_switches:\t17\n";
        assert_eq!(involuntary_switches(status), Some(17));
        assert_eq!(involuntary_switches("Name:\ta\n"), None);
        assert_eq!(waited_ns("363133 5000000000 17\n"), Some(5_000_000_000));
        assert_eq!(waited_ns(""), None);
        assert!(uptime_ns() > 0);
    }

    #[test]
    fn shares_are_of_the_time_between_two_readings() {
        let at = |total, idle, steal| CpuTimes { total, idle, steal };
        let check = |from, to, expected| assert_eq!(shares(from, to), expected);
        check(at(100, 50, 0), at(200, 75, 10), (0.1, 0.75));
        check(at(100, 50, 0), at(100, 50, 0), (0.0, 0.0));
        // Idle time of a core may run backwards (proc(5)).
        check(at(100, 50, 5), at(200, 40, 5), (0.0, 1.0));
        assert_eq!([part(1, 4), part(5, 4), part(1, 0)], [0.25, 1.0, 0.0]);
    }

    #[test]
    fn waiting_is_told_of_workers_alone() {
        let own = |name: &str| {
            let look = || {
                let me = gettid().as_raw_nonzero().get().cast_unsigned();
                threads().into_iter().find(|thread| thread.id == me).and_then(|thread| thread.worker_waited_ns)
            };
            let thread = thread::Builder::new().name(name.to_owned()).spawn(look).expect("a thread");
            thread.join().expect("no panic")
        };
        let can_tell = std::fs::read_to_string("/proc/self/schedstat").is_ok();
        assert_eq!(own(&format!("{}8", engine::WORKER)).is_some(), can_tell);
        assert_eq!(own("loadgen"), None);
    }

    #[test]
    fn this_machine_is_known() {
        let machine = Watch::begin().end();
        assert!(machine.cores >= 1 && !machine.kernel.is_empty(), "{machine:?}");
        assert!((0.0..=1.0).contains(&machine.cpu_share) && (0.0..=1.0).contains(&machine.steal_share), "{machine:?}");
        let check =
            |address: &str, ours| assert_eq!(is_this_host(address.parse().expect("an address")), ours, "{address}");
        check("127.0.0.1", true);
        check("127.9.9.9", true);
        check("::1", true);
        // Of documentation (RFC 5737): nobody's.
        check("192.0.2.7", false);
    }
}
