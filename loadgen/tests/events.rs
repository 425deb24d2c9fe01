//! What events do to real processes, and that nothing stays stopped.

#![expect(clippy::unwrap_used, reason = "a test that meets one has failed")]

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use loadgen::clock;
use loadgen::events::{GUARD, Happened, check, run_with};
use loadgen::scenario::{Action, Event, PidFrom};
use rustix::process::{Pid, Signal, kill_process_group};

const HOUR_NS: u64 = 3_600_000_000_000;

fn event(name: &str, at_ns: u64, lasts_ns: u64, begin: Action, end: Option<Action>) -> Event {
    Event { name: name.to_owned(), at_ns, lasts_ns, begin, end }
}

fn signal(name: &str, pid: u32, tree: bool) -> Action {
    Action::Signal { signal: name.to_owned(), pid: PidFrom::Pid(pid), tree }
}

fn exec(script: &str) -> Action {
    Action::Exec(["sh", "-c", script].map(str::to_owned).to_vec())
}

/// A child that is killed with its own children when the test ends, however it ends.
struct Kept(Child);

impl Kept {
    fn spawn(command: &mut Command) -> Self {
        Self(command.process_group(0).spawn().unwrap())
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        kill_process_group(Pid::from_child(&self.0), Signal::KILL).unwrap();
        self.0.wait().unwrap();
    }
}

fn sleeper() -> Kept {
    Kept::spawn(Command::new("sleep").arg("300"))
}

/// The letter of /proc/PID/stat: `S` sleeps, `T` is stopped; none: it has gone.
fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(") ").next()?.chars().next()
}

/// Neither stopped nor gone.
fn goes_on(pid: u32) -> bool {
    state(pid).is_some_and(|state| !matches!(state, 'T' | 'Z' | 'X'))
}

/// Waits up to 30 s for it.
fn eventually(holds: impl Fn() -> bool) -> bool {
    let late_ns = clock::now_ns() + 30_000_000_000;
    while !holds() {
        if clock::now_ns() > late_ns {
            return false;
        }
        thread::sleep(Duration::from_millis(2));
    }
    true
}

/// The guard that users have.
fn guard() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loadgen"));
    command.arg(GUARD);
    command
}

fn run(events: &[Event], stop: &AtomicBool) -> Vec<Happened> {
    run_with(|| Ok(guard()), events, clock::now_ns(), stop)
}

#[test]
#[ignore = "not a test: the process that is killed in the middle of an event"]
fn as_generator() {
    let Ok(pid) = std::env::var("LOADGEN_TEST_STOPS") else { return };
    let stops = event("stops", 0, HOUR_NS, signal("STOP", pid.parse().unwrap(), true), None);
    let _ = run(&[stops], &AtomicBool::new(false));
}

#[test]
fn what_a_killed_generator_stopped_goes_on() {
    let target = sleeper();
    let pid = target.0.id();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "as_generator", "--nocapture"]);
    let mut generator = Kept::spawn(command.env("LOADGEN_TEST_STOPS", pid.to_string()).stdout(Stdio::null()));
    assert!(eventually(|| state(pid) == Some('T')));
    generator.0.kill().unwrap();
    assert!(eventually(|| goes_on(pid)));
}

#[test]
fn a_tree_is_stopped_until_the_run_is() {
    // A shell with two children; one of them forks all the time. Not by vfork(2), which a shell uses for a plain command:
    // whoever waits for a vforked child that was stopped before its exec is in state D instead of T.
    let script = "sleep 300 & (while :; do (sleep 0.01); done) & echo $! ready; wait";
    let mut shell = Kept::spawn(Command::new("sh").args(["-c", script]).stdout(Stdio::piped()));
    let mut line = String::new();
    BufReader::new(shell.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let forker: u32 = line.split(' ').next().unwrap().parse().unwrap();
    let pid = shell.0.id();
    let check = |at_end: Option<Action>| {
        let stop = AtomicBool::new(false);
        let stops = [event("stops", 0, HOUR_NS, signal("STOP", pid, true), at_end.clone())];
        let happened = thread::scope(|scope| {
            let running = scope.spawn(|| run(&stops, &stop));
            let stopped = eventually(|| [pid, forker].iter().all(|pid| state(*pid) == Some('T')));
            stop.store(true, Ordering::Relaxed);
            let happened = running.join().unwrap();
            assert!(stopped, "{pid}: {:?}, {forker}: {:?}", state(pid), state(forker));
            happened
        });
        assert_eq!((happened.len(), &happened[0].error), (1, &None));
        assert_eq!(happened[0].ended_ns.is_some(), at_end.is_some());
        for pid in [pid, forker] {
            assert!(eventually(|| goes_on(pid)));
        }
    };
    check(Some(signal("CONT", pid, true)));
    check(Some(exec("true")));
    check(None);
}

#[test]
fn events_happen_in_their_order() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let note = |what: &str| exec(&format!("echo {what} >> {}", log.display()));
    let target = sleeper();
    let pid_file = folder.path().join("pid");
    let events = [
        event("first", 1_000_000, 20_000_000, note("begin"), Some(note("end"))),
        event("fails", 30_000_000, 1_000_000, exec("echo why >&2; exit 4"), Some(note("undone"))),
        // The file is made by an event before.
        event("pid", 40_000_000, 0, exec(&format!("echo {} > {}", target.0.id(), pid_file.display())), None),
        event(
            "kills",
            50_000_000,
            0,
            Action::Signal { signal: "KILL".to_owned(), pid: PidFrom::File(pid_file), tree: true },
            None,
        ),
    ];
    let happened = run(&events, &AtomicBool::new(false));
    assert_eq!(fs::read_to_string(&log).unwrap(), "begin\nend\nundone\n");
    let errors: Vec<_> = happened.iter().map(|happened| happened.error.as_deref()).collect();
    assert_eq!(errors, [None, Some("begin: sh: exit status: 4: why"), None, None]);
    for (event, happened) in events.iter().zip(&happened) {
        assert_eq!(event.name, happened.name);
        assert!(happened.started_ns.unwrap() >= event.at_ns);
        assert!(happened.begun_ns >= happened.started_ns);
        assert_eq!(happened.ended_ns.is_some(), event.end.is_some());
        assert!(happened.ended_ns.is_none_or(|ended_ns| ended_ns >= event.at_ns + event.lasts_ns));
    }
    assert!(eventually(|| state(target.0.id()) == Some('Z')));
}

#[test]
fn nothing_begins_after_the_stop() {
    let target = sleeper();
    let happened = run(&[event("late", 0, 0, signal("KILL", target.0.id(), false), None)], &AtomicBool::new(true));
    let never = Happened { name: "late".to_owned(), started_ns: None, begun_ns: None, ended_ns: None, error: None };
    assert_eq!(happened, [never]);
    assert!(goes_on(target.0.id()));
}

/// The first begin never comes to an end by itself; the stop ends both it and
/// what it started, and its end is carried out all the same.
#[test]
fn a_begin_that_runs_is_ended_with_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let long = format!("sleep 300 & echo $! > {0}.new; mv {0}.new {0}; wait", path("child").display());
    let events = [
        event("long", 0, HOUR_NS, exec(&long), Some(exec(&format!("echo end > {}", path("end").display())))),
        event("next", 0, 0, exec(&format!("touch {}", path("next").display())), None),
    ];
    let stop = AtomicBool::new(false);
    let happened = thread::scope(|scope| {
        let running = scope.spawn(|| run(&events, &stop));
        let begun = eventually(|| path("child").exists());
        stop.store(true, Ordering::Relaxed);
        let happened = running.join().unwrap();
        assert!(begun);
        happened
    });
    let child: u32 = fs::read_to_string(path("child")).unwrap().trim().parse().unwrap();
    assert!(eventually(|| !goes_on(child)));
    assert_eq!(happened[0].error.as_deref(), Some("begin: the run ended while sh ran, and sh was killed"));
    assert!(happened[0].started_ns < happened[0].begun_ns && happened[0].ended_ns.is_some());
    assert_eq!((happened[1].started_ns, path("next").exists()), (None, false));
    assert_eq!(fs::read_to_string(path("end")).unwrap(), "end\n");
}

/// A begin that takes long makes the next event late, and both say so.
#[test]
fn who_was_late_is_told() {
    let slow = event("slow", 0, 0, exec("sleep 0.05"), None);
    let happened = run(&[slow, event("next", 1, 0, exec("true"), None)], &AtomicBool::new(false));
    let [slow, next] = &happened[..] else { panic!("{happened:?}") };
    assert!(slow.begun_ns.unwrap() - slow.started_ns.unwrap() >= 50_000_000, "{happened:?}");
    assert!(next.started_ns >= slow.begun_ns, "{happened:?}");
}

#[test]
fn without_a_guard_nothing_is_stopped() {
    let target = sleeper();
    let stops = [event("stops", 0, 0, signal("STOP", target.0.id(), false), None)];
    let happened = run_with(|| Err(io::ErrorKind::NotFound.into()), &stops, clock::now_ns(), &AtomicBool::new(false));
    assert!(happened[0].error.as_deref().unwrap().contains("the guard that would undo it does not run"));
    assert!(goes_on(target.0.id()));
}

#[test]
fn what_cannot_be_carried_out_is_told_before() {
    let check_one = |action: Action, expected: &str| {
        let whole = [event("outage", 0, 1, exec("true"), Some(action))];
        match check(&whole) {
            Ok(()) => assert_eq!(expected, ""),
            Err(error) => {
                let error = format!("{error:#}");
                assert!(!expected.is_empty() && error.contains(expected), "{error}");
                assert!(error.starts_with("event \"outage\": "), "{error}");
            }
        }
    };
    let target = sleeper();
    let gone = {
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        child.id()
    };
    let parent = std::os::unix::process::parent_id();
    let file = |text: &str| {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        file
    };
    let from = |path: PathBuf| Action::Signal { signal: "STOP".to_owned(), pid: PidFrom::File(path), tree: false };
    let (good, bad) = (file(&format!("{}\nstarted\n", target.0.id())), file("waypost\n"));

    check_one(signal("STOP", target.0.id(), true), "");
    check_one(from(good.path().to_owned()), "");
    check_one(exec("false"), "");
    check_one(Action::Exec(Vec::new()), "exec names no program");
    check_one(signal("SIGSTOP", target.0.id(), true), "signal \"SIGSTOP\" is not known: one of STOP, CONT");
    check_one(signal("STOP", gone, false), "there is no process");
    check_one(signal("STOP", 0, false), "0 is no pid");
    check_one(signal("STOP", u32::MAX, false), "4294967295 is no pid");
    check_one(signal("STOP", 1, false), "process 1 is not signalled");
    check_one(signal("STOP", std::process::id(), false), "is loadgen itself");
    if parent > 1 {
        check_one(signal("STOP", parent, true), "loadgen itself descends from process");
    }
    check_one(from("/nonexistent/pid".into()), "cannot read pid_file /nonexistent/pid");
    check_one(from(bad.path().to_owned()), "its first line \"waypost\" is no pid");
}
