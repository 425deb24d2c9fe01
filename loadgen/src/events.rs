//! What is done to the server's surroundings during a run: signals to processes, and commands.
//!
//! In: events with the instants of their begin and end. Out: for each, when it began and ended, and what went wrong.
//! Never: leaves a process stopped that it stopped: it goes on at the event's end, when the run is stopped, and when this
//! process dies, whatever kills it; signals a process that has taken the pid of one that ended. At its limit: a command that
//! takes longer than 30 s is killed, and that is its error; one that begins an event is also killed when the run ends.
//!
//! Events are carried out one after the other: a begin or an end that takes long makes the next ones late, which
//! [`Happened`] shows.
//!
//! The last promise is kept by a second process, the guard (`loadgen __guard`): before an event begins it is told over a
//! pipe what undoes it, and after that was done, that it was. When the pipe closes in between, the guard does it: an end
//! that was being carried out when loadgen was killed is carried out again. Twice is what an outage can bear; never is not.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, BufRead, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::process::{Pid, Signal, getpid, kill_process, kill_process_group, test_kill_process};
use serde::{Deserialize, Serialize};

use crate::clock;
use crate::scenario::{Action, Event, PidFrom};

/// Longest time that a command may take.
const EXEC_MAX_NS: u64 = 30_000_000_000;

/// How often a command is asked whether it has ended, and `stop` whether it is set.
const TURN: Duration = Duration::from_millis(5);

/// How often a process's tree is looked through for those that were forked while it was being stopped. What has stopped
/// forks no more, so each look finds fewer; three suffice unless something outside starts new ones.
const LOOKS_MAX: usize = 10;

/// Bytes of a command's error output that are kept: its end.
const STDERR_MAX: usize = 4096;

/// The hidden command that [`guard`] is.
pub const GUARD: &str = "__guard";

/// The signals that an event may send.
const SIGNALS: [(&str, Signal); 9] = [
    ("STOP", Signal::STOP),
    ("CONT", Signal::CONT),
    ("TERM", Signal::TERM),
    ("KILL", Signal::KILL),
    ("HUP", Signal::HUP),
    ("INT", Signal::INT),
    ("QUIT", Signal::QUIT),
    ("USR1", Signal::USR1),
    ("USR2", Signal::USR2),
];

/// What became of an event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Happened {
    pub name: String,
    /// When its begin was taken up, since the run's origin; `None`: the run was stopped before. Later than planned: the
    /// event before it took too long.
    pub started_ns: Option<u64>,
    /// When its begin had been carried out, or had failed; between the two its command ran.
    pub begun_ns: Option<u64>,
    /// When its end had been carried out; `None`: it has none, or never began.
    pub ended_ns: Option<u64>,
    pub error: Option<String>,
}

/// Whether all events can be carried out: signals are known; their processes exist, may be signalled, and are neither this
/// one, nor its ancestors where their descendants are meant too, nor process 1. A file with a pid is read again when its
/// event begins.
pub fn check(events: &[Event]) -> Result<()> {
    for event in events {
        for action in [Some(&event.begin), event.end.as_ref()].into_iter().flatten() {
            prepare(action).with_context(|| format!("event {:?}", event.name))?;
        }
    }
    Ok(())
}

/// Carries out the events, in order, on the calling thread: it returns when all have ended and nothing that they stopped is
/// still stopped, or soon after `stop` is set: that ends what has begun. `origin_ns` is an instant of [`clock::now_ns`].
#[must_use]
pub fn run(events: &[Event], origin_ns: u64, stop: &AtomicBool) -> Vec<Happened> {
    run_with(
        || {
            let mut command = Command::new(std::env::current_exe()?);
            command.arg(GUARD);
            Ok(command)
        },
        events,
        origin_ns,
        stop,
    )
}

/// [`run`] with the command that runs [`guard`].
#[must_use]
pub fn run_with(
    guard: impl FnOnce() -> io::Result<Command>,
    events: &[Event],
    origin_ns: u64,
    stop: &AtomicBool,
) -> Vec<Happened> {
    if events.is_empty() {
        return Vec::new();
    }
    let mut guard = guard().and_then(Guard::spawn);
    // What is to be undone, in the order in which it was done.
    let mut open: Vec<Undo> = Vec::new();
    let mut all = Vec::new();
    for event in events {
        let mut happened =
            Happened { name: event.name.clone(), started_ns: None, begun_ns: None, ended_ns: None, error: None };
        if wait_until(origin_ns + event.at_ns, stop) {
            let others = open.len();
            happened.started_ns = Some(clock::now_ns().saturating_sub(origin_ns));
            happened.error = begin(event, &mut open, &mut guard, stop).err().map(|error| format!("begin: {error:#}"));
            happened.begun_ns = Some(clock::now_ns().saturating_sub(origin_ns));
            if event.end.is_some()
                && open.len() > others
                && let Some(undo) = open.pop()
            {
                wait_until(origin_ns + event.at_ns + event.lasts_ns, stop);
                let end = undo.carry_out().err().map(|error| format!("end: {error:#}"));
                happened.error = happened.error.or(end);
                happened.ended_ns = Some(clock::now_ns().saturating_sub(origin_ns));
                disarm(&mut guard, &open);
            }
        }
        all.push(happened);
    }
    // An event without an end that stopped something holds until the run is over.
    if !open.is_empty() {
        wait_until(u64::MAX, stop);
    }
    while let Some(undo) = open.pop() {
        if let (Err(error), Some(last)) = (undo.carry_out(), all.last_mut()) {
            last.error.get_or_insert(format!("end: {error:#}"));
        }
        disarm(&mut guard, &open);
    }
    all
}

/// The guard's process: reads from the pipe what is to be undone, and does the last of it when the pipe closes.
pub fn guard(input: impl BufRead) -> Result<()> {
    let mut open: Vec<Undo> = Vec::new();
    for line in input.lines() {
        open = serde_json::from_str(&line?)?;
    }
    while let Some(undo) = open.pop() {
        // The others are undone all the same, and nobody is left to be told.
        let _ = undo.carry_out();
    }
    Ok(())
}

/// Carries out an event's begin. Before, `open` and the guard learn how to undo it, where there is anything to undo.
fn begin(event: &Event, open: &mut Vec<Undo>, guard: &mut io::Result<Guard>, stop: &AtomicBool) -> Result<()> {
    let begin = prepare(&event.begin)?;
    let end = event.end.as_ref().map(prepare).transpose()?;
    let undo = Undo { end, go_on: begin.go_on() };
    if undo.end.is_some() || undo.go_on.is_some() {
        open.push(undo);
        let guard = guard.as_mut().map_err(|error| anyhow!("the guard that would undo it does not run: {error}"));
        if let Err(error) = guard.and_then(|guard| guard.tell(open).context("the guard that would undo it has gone")) {
            // Nothing was done, so there is nothing to undo either.
            open.pop();
            return Err(error);
        }
    }
    let (done, result) = begin.carry_out(Some(stop));
    if let Some(Undo { go_on: Some(Prepared::Signal { processes, .. }), .. }) = open.last_mut() {
        // With those that were forked meanwhile; the guard finds them among the descendants of the others.
        *processes = done;
    }
    result
}

fn disarm(guard: &mut io::Result<Guard>, open: &[Undo]) {
    if let Ok(guard) = guard {
        // A guard that has gone cannot undo too much, and the next event that needs it says that it has.
        let _ = guard.tell(open);
    }
}

/// How an event is undone.
#[derive(Debug, Serialize, Deserialize)]
struct Undo {
    end: Option<Prepared>,
    /// Continues what the event stopped, whatever its end does.
    go_on: Option<Prepared>,
}

impl Undo {
    fn carry_out(self) -> Result<()> {
        // A stop does not keep what was begun from being ended.
        let ended = self.end.map_or(Ok(()), |end| end.carry_out(None).1);
        if let Some(go_on) = self.go_on {
            // What has gone since needs nothing.
            let _ = go_on.carry_out(None);
        }
        ended
    }
}

/// An action whose processes are known.
#[derive(Debug, Clone, Serialize, Deserialize)]
enum Prepared {
    /// Parents stand before their children.
    Signal {
        signal: String,
        processes: Vec<Process>,
        tree: bool,
    },
    Exec(Vec<String>),
}

/// A process and no other: its pid is given anew after it has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Process {
    pid: i32,
    /// Ticks between the machine's start and its own.
    started: u64,
}

/// Finds an action's processes, and checks that they may be signalled.
fn prepare(action: &Action) -> Result<Prepared> {
    match action {
        Action::Exec(arguments) => {
            ensure!(!arguments.is_empty(), "exec names no program");
            Ok(Prepared::Exec(arguments.clone()))
        }
        Action::Signal { signal, pid, tree } => {
            signal_named(signal)?;
            let pid = pid_of(pid)?;
            ensure!(pid != 1, "process 1 is not signalled: everything depends on it");
            let own = getpid().as_raw_pid();
            ensure!(pid != own, "process {pid} is loadgen itself");
            match test_kill_process(raw(pid)?) {
                Ok(()) => {}
                Err(Errno::SRCH) => bail!("there is no process {pid}"),
                Err(Errno::PERM) => bail!("process {pid} belongs to somebody else: loadgen may not signal it"),
                Err(error) => return Err(error).with_context(|| format!("process {pid}")),
            }
            let (_, named) = look(pid).with_context(|| format!("there is no process {pid}"))?;
            let processes = if *tree { with_descendants(&[named])? } else { vec![named] };
            ensure!(
                processes.iter().all(|process| process.pid != own),
                "loadgen itself descends from process {pid}: leave tree out, or name another"
            );
            Ok(Prepared::Signal { signal: signal.clone(), processes, tree: *tree })
        }
    }
}

impl Prepared {
    /// What continues the processes that this stops.
    fn go_on(&self) -> Option<Self> {
        match self {
            Self::Signal { signal, processes, tree } if signal == "STOP" => {
                Some(Self::Signal { signal: "CONT".to_owned(), processes: processes.clone(), tree: *tree })
            }
            _ => None,
        }
    }

    /// Does it; gives the processes that were signalled, and the first error: it does not keep the rest from being done.
    /// A command is killed when `stop` is set.
    fn carry_out(&self, stop: Option<&AtomicBool>) -> (Vec<Process>, Result<()>) {
        match self {
            Self::Exec(arguments) => (Vec::new(), exec(arguments, EXEC_MAX_NS, stop)),
            Self::Signal { signal, processes, tree } => {
                let mut done = Vec::new();
                let result = signal_named(signal).and_then(|signal| signal_all(signal, processes, *tree, &mut done));
                (done, result)
            }
        }
    }
}

/// Signals the processes and, with `tree`, what descends from them by now; `done` are those that were tried.
fn signal_all(signal: Signal, processes: &[Process], tree: bool, done: &mut Vec<Process>) -> Result<()> {
    let mut wanted = processes.to_vec();
    let mut result = Ok(());
    for _ in 0..LOOKS_MAX {
        if tree {
            wanted = with_descendants(&wanted)?;
        }
        let new: Vec<Process> = wanted.iter().copied().filter(|process| !done.contains(process)).collect();
        if new.is_empty() {
            break;
        }
        for process in new {
            done.push(process);
            match send(process, signal) {
                // Of a tree one may have ended since; the process that was named may not.
                Err(Errno::SRCH) if process != processes[0] => {}
                sent => result = result.and(sent.with_context(|| format!("process {}", process.pid))),
            }
        }
    }
    result
}

fn signal_named(name: &str) -> Result<Signal> {
    SIGNALS.iter().find(|(known, _)| *known == name).map(|(_, signal)| *signal).with_context(|| {
        let names: Vec<_> = SIGNALS.iter().map(|(name, _)| *name).collect();
        format!("signal {name:?} is not known: one of {}", names.join(", "))
    })
}

fn pid_of(from: &PidFrom) -> Result<i32> {
    match from {
        PidFrom::Pid(pid) => {
            i32::try_from(*pid).ok().filter(|pid| *pid > 0).with_context(|| format!("{pid} is no pid"))
        }
        PidFrom::File(file) => {
            let text = fs::read_to_string(file).with_context(|| format!("cannot read pid_file {}", file.display()))?;
            let line = text.lines().next().unwrap_or_default().trim();
            let pid = line.parse().ok().filter(|pid| *pid > 0);
            pid.with_context(|| format!("pid_file {}: its first line {line:?} is no pid", file.display()))
        }
    }
}

fn raw(pid: i32) -> Result<Pid, Errno> {
    Pid::from_raw(pid).filter(|_| pid > 1).ok_or(Errno::SRCH)
}

/// One that has ended is not there, whoever has its pid now.
fn send(process: Process, signal: Signal) -> Result<(), Errno> {
    match look(process.pid) {
        Some((_, now)) if now == process => kill_process(raw(process.pid)?, signal),
        _ => Err(Errno::SRCH),
    }
}

/// The processes and all that descend from them, each once, parents before their children.
fn with_descendants(processes: &[Process]) -> Result<Vec<Process>> {
    let mut children: HashMap<i32, Vec<Process>> = HashMap::new();
    for entry in fs::read_dir("/proc").context("cannot read /proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // One that has ended since has no children.
        if let Some((parent, process)) = look(pid) {
            children.entry(parent).or_default().push(process);
        }
    }
    let mut all: Vec<Process> = Vec::new();
    let mut known: HashSet<Process> = HashSet::new();
    all.extend(processes.iter().filter(|process| known.insert(**process)));
    let mut next = 0;
    while let Some(process) = all.get(next) {
        // Of one that has ended the descendants are its own no more, and of the next with its pid they never were.
        if next >= processes.len() || look(process.pid).is_some_and(|(_, now)| now == *process) {
            let found = children.remove(&process.pid).unwrap_or_default();
            all.extend(found.into_iter().filter(|process| known.insert(*process)));
        }
        next += 1;
    }
    Ok(all)
}

/// A process's parent and itself; `None`: it is not there (fields 4 and 22 of /proc/PID/stat, proc_pid_stat(5)).
fn look(pid: i32) -> Option<(i32, Process)> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name before it, field 2, stands in parentheses and may hold anything.
    let after_name = stat.rsplit(|byte| *byte == b')').next()?;
    let mut fields = std::str::from_utf8(after_name).ok()?.split_ascii_whitespace();
    let parent = fields.nth(1)?.parse().ok()?;
    Some((parent, Process { pid, started: fields.nth(17)?.parse().ok()? }))
}

/// Runs a program without a shell and waits for its end, up to `max_ns` and until `stop` is set.
fn exec(arguments: &[String], max_ns: u64, stop: Option<&AtomicBool>) -> Result<()> {
    let name = &arguments[0];
    let mut command = Command::new(name);
    // A group of its own: an interrupt from the terminal does not stop it half-way, and a time-out ends all of it.
    command.args(&arguments[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().with_context(|| format!("cannot run {name}"))?;
    let mut stderr = child.stderr.take().context("stderr is piped")?;
    // What it started may keep the pipe open for ever: only what is there is read.
    ioctl_fionbio(&stderr, true)?;
    let mut tail = Vec::new();
    let late_ns = clock::now_ns() + max_ns;
    let status = loop {
        drain(&mut stderr, &mut tail);
        if let Some(status) = child.try_wait()? {
            drain(&mut stderr, &mut tail);
            break status;
        }
        let stopped = stop.is_some_and(|stop| stop.load(Ordering::Relaxed));
        if stopped || clock::now_ns() >= late_ns {
            let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
            child.wait()?;
            ensure!(!stopped, "the run ended while {name} ran, and {name} was killed");
            bail!("{name} took longer than {:?} and was killed", Duration::from_nanos(max_ns));
        }
        thread::sleep(TURN);
    };
    if status.success() {
        return Ok(());
    }
    let tail = String::from_utf8_lossy(&tail);
    match tail.lines().map(str::trim).rfind(|line| !line.is_empty()) {
        Some(line) => bail!("{name}: {status}: {line}"),
        None => bail!("{name}: {status}"),
    }
}

/// Reads what is there and keeps its end.
fn drain(from: &mut ChildStderr, tail: &mut Vec<u8>) {
    let mut part = [0; STDERR_MAX];
    // Both "nothing there" and "closed" end it; whether the program failed is for its status to say.
    while let Ok(read @ 1..) = from.read(&mut part) {
        tail.extend_from_slice(&part[..read]);
        tail.drain(..tail.len().saturating_sub(STDERR_MAX));
    }
}

/// True: the instant has come. False: `stop` was set before.
fn wait_until(at_ns: u64, stop: &AtomicBool) -> bool {
    loop {
        if stop.load(Ordering::Relaxed) {
            return false;
        }
        let left = Duration::from_nanos(at_ns.saturating_sub(clock::now_ns()));
        if left.is_zero() {
            return true;
        }
        thread::sleep(left.min(TURN));
    }
}

/// The guard as its parent sees it.
#[derive(Debug)]
struct Guard {
    child: Child,
}

impl Guard {
    fn spawn(mut command: Command) -> io::Result<Self> {
        // A group of its own: Ctrl-C in the terminal is not for it.
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        Ok(Self { child: command.spawn()? })
    }

    /// Replaces what it was told before.
    fn tell(&mut self, open: &[Undo]) -> io::Result<()> {
        let mut line = serde_json::to_vec(open)?;
        line.push(b'\n');
        match &mut self.child.stdin {
            Some(pipe) => pipe.write_all(&line),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

impl Drop for Guard {
    /// Closes the pipe, after which the guard ends by itself.
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        // Nobody would act on how it ended: it had nothing left to do.
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::atomic::AtomicBool;

    use rustix::io::Errno;
    use rustix::process::Signal;

    use super::{Process, exec, look, send, signal_all, with_descendants};

    #[test]
    fn commands() {
        let check = |arguments: &[&str], max_ns: u64, expected: Option<&str>| {
            let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
            let stop = AtomicBool::new(max_ns == STOPPED);
            let error = exec(&arguments, max_ns, Some(&stop)).err().map(|error| format!("{error:#}"));
            match (&error, expected) {
                (None, None) => {}
                (Some(error), Some(expected)) if error.contains(expected) => {}
                _ => panic!("{arguments:?}: {error:?} instead of {expected:?}"),
            }
        };
        const MINUTE_NS: u64 = 60_000_000_000;
        const STOPPED: u64 = 600_000_000_000;
        check(&["true"], MINUTE_NS, None);
        check(&["false"], MINUTE_NS, Some("false: exit status: 1"));
        check(
            &["sh", "-c", "echo first >&2; echo last >&2; echo >&2; exit 3"],
            MINUTE_NS,
            Some("sh: exit status: 3: last"),
        );
        check(&["sh", "-c", "seq 100000 >&2; exit 1"], MINUTE_NS, Some(": 100000"));
        // What goes on in the background, and holds the pipe, is not waited for.
        check(&["sh", "-c", "echo gone on >&2; sleep 5 & exit 1"], MINUTE_NS, Some(": gone on"));
        check(&["/nonexistent/program"], MINUTE_NS, Some("cannot run /nonexistent/program: No such file"));
        check(&["sleep", "60"], 1, Some("sleep took longer than 1ns and was killed"));
        check(&["sleep", "60"], STOPPED, Some("the run ended while sleep ran, and sleep was killed"));
    }

    /// The pid is there, but it is another process that has it now.
    #[test]
    fn a_pid_that_was_given_anew_is_left_alone() {
        let mut child = Command::new("sleep").arg("300").spawn().unwrap();
        let (_, now) = look(i32::try_from(child.id()).unwrap()).unwrap();
        let before = Process { started: now.started - 1, ..now };
        assert_eq!(send(before, Signal::KILL), Err(Errno::SRCH));
        let mut done = Vec::new();
        let error = signal_all(Signal::KILL, &[before], true, &mut done).unwrap_err();
        assert_eq!(format!("{error:#}"), format!("process {}: No such process (os error 3)", now.pid));
        assert_eq!((done, child.try_wait().unwrap()), (vec![before], None));

        let own = look(i32::try_from(std::process::id()).unwrap()).unwrap().1;
        assert!(with_descendants(&[own]).unwrap().contains(&now));
        assert_eq!(with_descendants(&[Process { started: own.started + 1, ..own }]).unwrap().len(), 1);

        assert_eq!(send(now, Signal::KILL), Ok(()));
        child.wait().unwrap();
        assert_eq!(send(now, Signal::KILL), Err(Errno::SRCH));
    }
}
