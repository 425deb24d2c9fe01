//! Faults of the disk, as strace makes them: a system call of one thread that fails, is late, or is the last.
//!
//! In: a thread of a running server by its name, or a server about to start; what is to happen at which of its calls.
//! Out: strace's own doing (strace(1), "Tampering").
//! Never: stops another thread: redirects are served at their own pace.
//! At the limit: a machine on which strace may trace nobody leaves these tests out, and says so.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;

use tempfile::NamedTempFile;

use crate::support::{Server, left_out};

/// A strace at work; it lets go when it is dropped.
#[derive(Debug)]
pub(super) struct Tracer {
    child: Child,
    /// A line for each call, as it was made.
    calls: NamedTempFile,
}

impl Tracer {
    /// Calls that were tampered with so far.
    pub(super) fn injected(&self) -> usize {
        let calls = std::fs::read_to_string(self.calls.path()).unwrap();
        calls.lines().filter(|line| line.contains("(INJECTED)")).count()
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // What it traces goes on.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether strace may trace what we started; says so if not.
pub(super) fn possible() -> bool {
    static POSSIBLE: LazyLock<bool> = LazyLock::new(|| {
        let traced = Command::new("strace").args(["-o", "/dev/null", "true"]).stderr(Stdio::null()).status();
        traced.is_ok_and(|status| status.success())
    });
    if !*POSSIBLE {
        left_out(
            "strace is not there, or may trace nobody: script/setup installs it, a container needs CAP_SYS_PTRACE",
        );
    }
    *POSSIBLE
}

/// The threads whose name begins with this.
fn threads(pid: u32, name: &str) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let is = |task: &Path| std::fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.starts_with(name));
    let found = tasks.map(|task| task.unwrap().path()).filter(|task| is(task));
    found.map(|task| task.file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

/// The threads of the log: one writes it, one syncs it.
pub(super) const LOG: [&str; 2] = ["waypost-spool", "waypost-sync"];
/// The one that stores visits.
pub(super) const WRITER: [&str; 1] = ["waypost-writer"];

/// Lets each of `tampering` (`fdatasync:error=EIO:when=1+`) happen to the threads with these names from now on. Each
/// counts its own calls, of these files alone if any are named.
#[track_caller]
pub(super) fn tamper(server: &Server, names: &[&str], files: &[PathBuf], tampering: &[&str]) -> Tracer {
    let threads: Vec<String> = names.iter().flat_map(|name| threads(server.pid(), name)).collect();
    assert!(threads.len() >= names.len(), "there are no threads {names:?}");
    let mut command = Command::new("strace");
    let calls = NamedTempFile::new().unwrap();
    command.args(arguments(calls.path(), tampering)).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    for file in files {
        command.arg("-P").arg(file);
    }
    for thread in &threads {
        command.args(["-p", thread]);
    }
    let mut child = command.spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    for _ in threads {
        // It may say before that a file is not there yet.
        let attached = said.find(|line| line.as_ref().is_ok_and(|line| line.contains("attached")));
        assert!(attached.is_some(), "strace did not attach");
    }
    // Nothing that it says later may stop it.
    std::thread::spawn(move || said.for_each(drop));
    Tracer { child, calls }
}

/// A server to which `tampering` happens from its start, in all of its threads. It is our child, strace is not.
pub(super) fn tampered(serve: &Command, tampering: &[&str]) -> Command {
    let mut command = Command::new("strace");
    // Only the calls in question stop a thread.
    command
        .args(["-D", "-f", "--seccomp-bpf"])
        .args(arguments(Path::new("/dev/null"), tampering))
        .arg(serve.get_program())
        .args(serve.get_args());
    for (name, value) in serve.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.current_dir(serve.get_current_dir().unwrap());
    command
}

/// `out` gets a line for each call.
fn arguments(out: &Path, tampering: &[&str]) -> Vec<String> {
    let calls: Vec<&str> = tampering.iter().map(|one| one.split(':').next().unwrap()).collect();
    let mut arguments = vec!["-o".to_owned(), out.to_str().unwrap().to_owned()];
    arguments.extend(["-e".to_owned(), format!("trace={}", calls.join(","))]);
    tampering.iter().for_each(|one| arguments.extend(["-e".to_owned(), format!("inject={one}")]));
    arguments
}
