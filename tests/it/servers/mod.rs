//! Real servers for the tests: Postgres, PgBouncer, Redis, HAProxy, nginx, and a network between them that can be broken.
//!
//! In: the programs that `script/setup` installs. Out: private servers on 127.0.0.1, each at a port and in a folder of
//! its own, which a test may freeze, kill and start again.
//! Never: outlives the tests, were they killed themselves; touches a server of the machine; runs as root.
//! At the limit: a server that is not ready within [`READY`] fails the test, which shows the server's log.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, geteuid, kill_process};
use tempfile::TempDir;

use crate::support::eventually;

pub(crate) mod deployment;
pub(crate) mod haproxy;
pub(crate) mod nginx;
pub(crate) mod postgres;
pub(crate) mod proxy;
pub(crate) mod redis;

/// The most that a server takes to be ready or to end, on a machine that does other things, too.
pub(crate) const READY: Duration = Duration::from_secs(30);
/// Of every role and of Redis where it wants one: a secret that must stand in no log.
pub(crate) const PASSWORD: &str = "hush-7c1e90";

/// Runs a server for as long as its stdin is open, which ends with whoever holds it, also by SIGKILL: then the server
/// gets `$2`, and its folder `$1` goes, unless `keep` was said. (`PR_SET_PDEATHSIG` would not do: it tells of the end
/// of the thread that started the server, and every test has a thread of its own.)
const KEEPER: &str = r#"
folder=$1 signal=$2
shift 2
"$@" </dev/null >>"$folder/log" 2>&1 &
echo $!
read -r word
kill -s "$signal" $!
kill -s CONT $!
wait $!
[ "$word" = keep ] || rm -rf "$folder"
"#;

/// A running server.
#[derive(Debug)]
struct Process {
    keeper: Child,
    line: Option<ChildStdin>,
    pid: Pid,
}

impl Process {
    /// Runs `program` with its output in `folder/log`. `end` is the signal that ends it in the end.
    fn spawn(folder: &Path, end: &str, program: &Path, arguments: &[String]) -> Self {
        let mut command = Command::new("sh");
        command.args(["-c", KEEPER, "keeper"]).arg(folder).arg(end).arg(program).args(arguments);
        // A ^C at the terminal is for the tests: the servers end when those have.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut keeper = unprivileged(&mut command, folder).spawn().unwrap();
        let mut said = String::new();
        BufReader::new(keeper.stdout.take().unwrap()).read_line(&mut said).unwrap();
        let pid = Pid::from_raw(said.trim().parse().unwrap()).unwrap();
        Self { line: keeper.stdin.take(), keeper, pid }
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).unwrap();
    }

    /// The processes that it started and that run.
    fn children(&self) -> Vec<Pid> {
        let ours = |pid: &Pid| status(*pid).is_some_and(|(state, parent)| state != "Z" && parent == self.pid);
        let names =
            std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
        names.filter_map(|name| Pid::from_raw(name.parse().ok()?)).filter(ours).collect()
    }

    fn has_ended(&self) -> bool {
        has_ended(self.pid)
    }

    /// Waits for the end of a server that was told to end; its folder stays.
    fn wait(mut self) {
        eventually(READY, "the server ends", || self.has_ended());
        self.line.take().unwrap().write_all(b"keep\n").unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.line.take());
        let _ = self.keeper.wait();
    }
}

/// State and parent of a process (proc_pid_stat(5)); none if there is no such process.
fn status(pid: Pid) -> Option<(String, Pid)> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.to_owned(), Pid::from_raw(fields.next()?.parse().ok()?)?))
}

/// A server's keeper takes note of its end last, so that its pid is no other process's before.
fn has_ended(pid: Pid) -> bool {
    status(pid).is_none_or(|(state, _)| state == "Z")
}

/// Lets a command run in `folder` and, if we are root, as user postgres, since Postgres and PgBouncer refuse to be root.
fn unprivileged<'a>(command: &'a mut Command, folder: &Path) -> &'a mut Command {
    if let Some((user, group)) = *USER {
        command.uid(user).gid(group);
    }
    command.current_dir(folder)
}

/// User and group of the servers; none = our own.
static USER: LazyLock<Option<(u32, u32)>> = LazyLock::new(|| {
    if !geteuid().is_root() {
        return None;
    }
    let users = std::fs::read_to_string("/etc/passwd").unwrap();
    let line = users.lines().find_map(|line| line.strip_prefix("postgres:"));
    let mut fields = line.expect("there is a user postgres: script/setup installs Postgres").split(':').skip(1);
    let mut number = || fields.next().unwrap().parse().unwrap();
    Some((number(), number()))
});

/// A folder of the servers' user.
fn folder() -> TempDir {
    let folder = tempfile::Builder::new().prefix("waypost-server-").tempdir().unwrap();
    if let Some((user, group)) = *USER {
        std::os::unix::fs::chown(folder.path(), Some(user), Some(group)).unwrap();
    }
    folder
}

/// A file that the servers' user may read.
fn write(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    if let Some((user, group)) = *USER {
        std::os::unix::fs::chown(path, Some(user), Some(group)).unwrap();
    }
}

/// A port of 127.0.0.1 that nobody listens at. It is none of those that the kernel gives to clients (from 32,768 on), so
/// that a server which was stopped finds it free again; nor is the one 10,000 above, which a node of a Redis Cluster
/// takes as well.
pub(crate) fn port() -> u16 {
    const FIRST: u16 = 10_240;
    const COUNT: u16 = 9_700;
    static NEXT: LazyLock<AtomicU16> = LazyLock::new(|| AtomicU16::new(rand::random()));
    let free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let mut ports = (0..COUNT).map(|_| FIRST + NEXT.fetch_add(1, Ordering::Relaxed) % COUNT);
    ports.find(|port| free(port) && free(&(port + 10_000))).expect("a free port")
}

/// Starts a server at a port that is free, or at another one where somebody was faster; waits until it is ready.
fn start(folder: &Path, spawn: impl Fn(u16) -> Process, ready: impl Fn(u16) -> bool) -> (u16, Process) {
    for _ in 0..5 {
        let port = port();
        let process = spawn(port);
        if becomes_ready(&process, || ready(port)) {
            return (port, process);
        }
        assert!(process.has_ended(), "not ready within {READY:?}: {}", log(folder));
        process.wait();
    }
    panic!("it does not start: {}", log(folder));
}

/// False if it ended, or is not ready within [`READY`].
fn becomes_ready(process: &Process, ready: impl Fn() -> bool) -> bool {
    let mut is_ready = false;
    let begun = waypost::domain::time::monotonic();
    eventually(READY + READY, "a server is ready", || {
        is_ready = ready();
        is_ready || process.has_ended() || waypost::domain::time::monotonic().duration_since(begun) > READY
    });
    is_ready && !process.has_ended()
}

/// A file of `deploy/` as it is, but for `changes`, each of which must meet something.
pub(crate) fn shipped(name: &str, changes: &[(&str, &str)]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(name);
    let mut text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    for (old, new) in changes {
        assert!(text.contains(old), "{path:?} has no {old:?}");
        text = text.replace(old, new);
    }
    text
}

/// What a server said.
fn log(folder: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(folder.join("log")).unwrap_or_default()).into_owned()
}

/// The stdout of a command that must not fail.
#[track_caller]
fn run(command: &mut Command) -> String {
    let output: Output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {out}{err}");
    out.trim_end().to_owned()
}

/// A private authority, and a server's certificate and key by it, for 127.0.0.1 and localhost.
#[derive(Clone, Debug)]
struct Tls {
    authority: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

impl Tls {
    /// The files lie in `folder`.
    fn new(folder: &Path) -> Self {
        let config = "[req]\ndistinguished_name = name\nx509_extensions = authority\n[name]\n[authority]\n\
                      basicConstraints = critical, CA:TRUE\nkeyUsage = critical, keyCertSign\n[server]\n\
                      basicConstraints = CA:FALSE\nextendedKeyUsage = serverAuth\n\
                      subjectAltName = IP:127.0.0.1, DNS:localhost\n";
        write(&folder.join("tls.cnf"), config);
        let openssl = |arguments: &str| {
            run(unprivileged(Command::new("openssl").args(arguments.split(' ')), folder));
        };
        let new = "req -config tls.cnf -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
        openssl(&format!("{new} -x509 -subj /CN=tests -keyout authority.key -out authority.crt"));
        openssl(&format!("{new} -subj /CN=localhost -keyout server.key -out server.csr"));
        openssl(
            "x509 -req -in server.csr -CA authority.crt -CAkey authority.key -CAcreateserial -days 2 -extfile tls.cnf \
             -extensions server -out server.crt",
        );
        let path = |name: &str| folder.join(name);
        Self { authority: path("authority.crt"), certificate: path("server.crt"), key: path("server.key") }
    }
}

/// The tests may be killed, and their servers go all the same: what holds them is the line to their keepers.
#[test]
fn a_server_ends_when_its_line_is_cut() {
    let folder = folder();
    let mut process = Process::spawn(folder.path(), "TERM", Path::new("sleep"), &["1000".to_owned()]);
    assert!(!process.has_ended());
    process.signal(Signal::STOP);
    drop(process.line.take());
    eventually(READY, "the server ends, though it was frozen", || process.has_ended());
    eventually(READY, "its folder goes", || !folder.path().exists());
}
