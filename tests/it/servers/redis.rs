//! Redis: alone, as a Cluster of six, behind three Sentinels.
//!
//! In: commands. Out: what redis-cli prints of them, which shares no code with what is tested.
//! Never: keeps anything on disk.
//! At the limit: what does not come together within [`READY`] fails the test.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use super::{PASSWORD, Process, READY, Tls, becomes_ready, folder, log, start, write};
use crate::support::eventually;

/// What the Sentinels call the master.
const MASTER: &str = "waypost";

/// A server.
#[derive(Debug)]
pub(crate) struct Redis {
    // Ends before its folder goes.
    process: Option<Process>,
    folder: TempDir,
    port: u16,
    how: How,
}

#[derive(Clone, Debug, Default)]
struct How {
    tls: Option<Tls>,
    password: bool,
    /// Words of its command line beside those that all have.
    options: Vec<String>,
}

impl Redis {
    /// Without TLS and password.
    pub(crate) fn start() -> Self {
        Self::run(folder(), How::default())
    }

    /// One that takes no connection without TLS.
    pub(crate) fn with_tls() -> Self {
        let folder = folder();
        let tls = Tls::new(folder.path());
        Self::run(folder, How { tls: Some(tls), ..How::default() })
    }

    /// One that wants [`PASSWORD`].
    pub(crate) fn with_password() -> Self {
        Self::run(folder(), How { password: true, ..How::default() })
    }

    fn with_options(options: &[&str]) -> Self {
        let options = options.iter().map(|&word| word.to_owned()).collect();
        Self::run(folder(), How { options, ..How::default() })
    }

    fn run(folder: TempDir, how: How) -> Self {
        let spawn = |port| Self::spawn(folder.path(), port, &how);
        let (port, process) = start(folder.path(), spawn, |port| how.answers(port));
        Self { process: Some(process), port, folder, how }
    }

    fn spawn(folder: &Path, port: u16, how: &How) -> Process {
        let words = "--bind 127.0.0.1 --dir . --unixsocket redis.sock --unixsocketperm 777 --appendonly no --save";
        let mut arguments: Vec<String> = words.split(' ').map(str::to_owned).collect();
        arguments.push(String::new());
        let port = port.to_string();
        if let Some(tls) = &how.tls {
            let files = [("cert", &tls.certificate), ("key", &tls.key), ("ca-cert", &tls.authority)];
            for (name, path) in files {
                arguments.extend([format!("--tls-{name}-file"), path.display().to_string()]);
            }
            arguments.extend(["--port", "0", "--tls-auth-clients", "no", "--tls-port", &port].map(str::to_owned));
        } else {
            arguments.extend(["--port".to_owned(), port]);
        }
        if how.password {
            arguments.extend(["--requirepass".to_owned(), PASSWORD.to_owned()]);
        }
        arguments.extend(how.options.clone());
        Process::spawn(folder, "KILL", Path::new("redis-server"), &arguments)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    pub(crate) fn url(&self) -> String {
        let scheme = if self.how.tls.is_some() { "rediss" } else { "redis" };
        let password = if self.how.password { format!(":{PASSWORD}@") } else { String::new() };
        format!("{scheme}://{password}{}", self.address())
    }

    /// It listens at this, too.
    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("redis.sock")
    }

    /// The authority of its certificate.
    pub(crate) fn ca_file(&self) -> &Path {
        &self.how.tls.as_ref().expect("it has TLS").authority
    }

    /// What redis-cli prints of a command, also if that is an error.
    pub(crate) fn cli(&self, words: &[&str]) -> String {
        self.how.cli(self.port, words)
    }

    /// SIGSTOP: connections stay, and nobody answers.
    pub(crate) fn freeze(&self) {
        self.process.as_ref().unwrap().signal(Signal::STOP);
    }

    pub(crate) fn thaw(&self) {
        self.process.as_ref().unwrap().signal(Signal::CONT);
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        let process = self.process.take().unwrap();
        process.signal(Signal::KILL);
        process.wait();
    }

    /// Starts it again after a kill, empty and at the same port; waits until it answers.
    pub(crate) fn restart(&mut self) {
        assert!(self.process.is_none(), "it runs");
        let process = Self::spawn(self.folder.path(), self.port, &self.how);
        let ready = becomes_ready(&process, || self.how.answers(self.port));
        assert!(ready, "it does not start again: {}", log(self.folder.path()));
        self.process = Some(process);
    }
}

impl How {
    fn cli(&self, port: u16, words: &[&str]) -> String {
        let mut command = Command::new("redis-cli");
        command.args(["-h", "127.0.0.1", "-p", &port.to_string()]);
        if let Some(tls) = &self.tls {
            command.arg("--tls").arg("--cacert").arg(&tls.authority);
        }
        if self.password {
            command.env("REDISCLI_AUTH", PASSWORD);
        }
        let output = command.args(words).stdin(Stdio::null()).output().unwrap();
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).trim_end().to_owned()).concat()
    }

    fn answers(&self, port: u16) -> bool {
        self.cli(port, &["PING"]) == "PONG"
    }
}

/// Three masters and three replicas.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) nodes: Vec<Redis>,
}

impl Cluster {
    pub(crate) fn start() -> Self {
        let options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1500"];
        let nodes: Vec<Redis> = (0..6).map(|_| Redis::with_options(&options)).collect();
        let addresses: Vec<String> = nodes.iter().map(|node| node.address().to_string()).collect();
        let words = ["--cluster-replicas", "1", "--cluster-yes"];
        let words: Vec<&str> =
            ["--cluster", "create"].into_iter().chain(addresses.iter().map(String::as_str)).chain(words).collect();
        let said = nodes[0].cli(&words);
        assert!(said.contains("All 16384 slots covered"), "{said}");
        let cluster = Self { nodes };
        let of = |node: &Redis, count: usize| {
            let nodes = node.cli(&["CLUSTER", "NODES"]);
            node.cli(&["CLUSTER", "INFO"]).contains("cluster_state:ok")
                && nodes.lines().count() == 6
                && nodes.lines().filter(|line| line.contains("slave")).count() == count
        };
        eventually(READY, "all know of all", || cluster.nodes.iter().all(|node| of(node, 3)));
        let linked = |node: &Redis| {
            let info = node.cli(&["INFO", "replication"]);
            info.contains("role:master") || info.contains("master_link_status:up")
        };
        eventually(READY, "replicas follow", || cluster.nodes.iter().all(linked));
        cluster
    }

    pub(crate) fn url(&self) -> String {
        let addresses: Vec<String> = self.nodes.iter().map(|node| node.address().to_string()).collect();
        format!("redis+cluster://{}", addresses.join(","))
    }
}

/// A master with a replica, and three Sentinels that watch over them.
#[derive(Debug)]
pub(crate) struct Sentinel {
    /// The first is the master at the start.
    pub(crate) servers: [Redis; 2],
    watchers: Vec<(u16, Process, TempDir)>,
}

impl Sentinel {
    pub(crate) fn start() -> Self {
        let master = Redis::start();
        let replica = Redis::with_options(&["--replicaof", "127.0.0.1", &master.port.to_string()]);
        let linked = || replica.cli(&["INFO", "replication"]).contains("master_link_status:up");
        eventually(READY, "the replica follows", linked);
        let watchers = (0..3).map(|_| watcher(master.port)).collect();
        let all = Self { servers: [master, replica], watchers };
        let knows = |port: &u16| {
            let info = How::default().cli(*port, &["SENTINEL", "MASTER", MASTER]);
            let field = |name: &str| info.lines().skip_while(|line| *line != name).nth(1).unwrap_or_default();
            (field("num-slaves"), field("num-other-sentinels")) == ("1", "2")
        };
        eventually(READY, "all know of all", || all.watchers.iter().all(|(port, ..)| knows(port)));
        all
    }

    pub(crate) fn url(&self) -> String {
        let addresses: Vec<String> = self.watchers.iter().map(|(port, ..)| format!("127.0.0.1:{port}")).collect();
        format!("redis+sentinel://{}/{MASTER}", addresses.join(","))
    }

    /// Gives servers a password, which the Sentinels know and do not ask for themselves.
    pub(crate) fn guard(&self, password: &str) {
        for (port, ..) in &self.watchers {
            let said = How::default().cli(*port, &["SENTINEL", "SET", MASTER, "auth-pass", password]);
            assert_eq!(said, "OK");
        }
        for server in &self.servers {
            assert_eq!(server.cli(&["CONFIG", "SET", "masterauth", password]), "OK");
        }
        for server in &self.servers {
            assert_eq!(server.cli(&["CONFIG", "SET", "requirepass", password]), "OK");
        }
    }

    /// The port of the master, as the Sentinels see it.
    pub(crate) fn master(&self) -> u16 {
        let said = How::default().cli(self.watchers[0].0, &["SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER]);
        said.lines().nth(1).unwrap().parse().unwrap()
    }
}

fn watcher(master: u16) -> (u16, Process, TempDir) {
    let folder = folder();
    let spawn = |port: u16| {
        // It writes what it learns into its configuration.
        let config = format!(
            "port {port}\nbind 127.0.0.1\nsentinel monitor {MASTER} 127.0.0.1 {master} 2\n\
             sentinel down-after-milliseconds {MASTER} 1000\nsentinel failover-timeout {MASTER} 5000\n"
        );
        write(&folder.path().join("sentinel.conf"), &config);
        Process::spawn(
            folder.path(),
            "KILL",
            Path::new("redis-server"),
            &["sentinel.conf", "--sentinel"].map(str::to_owned),
        )
    };
    let (port, process) = start(folder.path(), spawn, |port| How::default().answers(port));
    (port, process, folder)
}

#[test]
fn a_server_that_breaks() {
    let mut redis = Redis::start();
    let ping = |redis: &Redis| TcpStream::connect(redis.address()).and_then(asks);
    assert_eq!(ping(&redis).unwrap(), "+PONG");
    assert_eq!(asks(UnixStream::connect(redis.socket()).unwrap()).unwrap(), "+PONG");
    assert_eq!(redis.cli(&["SET", "k", "v"]), "OK");
    redis.freeze();
    let error = ping(&redis).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    redis.thaw();
    assert_eq!(redis.cli(&["GET", "k"]), "v");
    redis.kill();
    assert_eq!(ping(&redis).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    redis.restart();
    assert_eq!(redis.cli(&["EXISTS", "k"]), "0");
}

/// PINGs over a connection.
fn asks(mut stream: impl Read + Write + AsFd) -> std::io::Result<String> {
    socket2::SockRef::from(&stream).set_read_timeout(Some(Duration::from_millis(300)))?;
    stream.write_all(b"PING\r\n")?;
    let mut said = [0; 7];
    stream.read_exact(&mut said)?;
    Ok(String::from_utf8_lossy(&said).trim_end().to_owned())
}

#[test]
fn servers_with_tls_and_with_a_password() {
    let tls = Redis::with_tls();
    assert_eq!(tls.cli(&["PING"]), "PONG");
    assert!(TcpStream::connect(tls.address()).and_then(asks).is_err(), "it answers without TLS");
    assert!(tls.url().starts_with("rediss://") && tls.ca_file().exists());
    let guarded = Redis::with_password();
    assert_eq!(guarded.cli(&["PING"]), "PONG");
    assert!(!TcpStream::connect(guarded.address()).and_then(asks).unwrap().starts_with("+PONG"));
    assert!(guarded.url().contains(PASSWORD));
}

#[test]
fn a_cluster_of_six() {
    let mut cluster = Cluster::start();
    let set = |node: &Redis, key: &str| node.cli(&["-c", "SET", key, "v"]);
    for key in ["a", "b", "c", "d", "e", "f"] {
        assert_eq!(set(&cluster.nodes[0], key), "OK");
    }
    assert_eq!(cluster.url().matches("127.0.0.1:").count(), 6);
    cluster.nodes[0].kill();
    let taken_over = |node: &Redis| {
        let nodes = node.cli(&["CLUSTER", "NODES"]);
        let (failed, alive): (Vec<&str>, _) =
            nodes.lines().filter(|line| line.contains("master")).partition(|line| line.contains("fail"));
        (failed.len(), alive.len()) == (1, 3) && node.cli(&["CLUSTER", "INFO"]).contains("cluster_state:ok")
    };
    eventually(READY, "a replica takes over", || cluster.nodes[1..].iter().all(taken_over));
    for key in ["a", "b", "c", "d", "e", "f"] {
        assert_eq!(set(&cluster.nodes[1], key), "OK");
    }
}

#[test]
fn sentinels_fail_over() {
    let mut all = Sentinel::start();
    let [master, replica] = &all.servers;
    let (old, new) = (master.address().port(), replica.address().port());
    assert_eq!(all.master(), old);
    assert!(all.url().ends_with("/waypost"));
    all.servers[0].kill();
    eventually(READY, "the replica is the master", || all.master() == new);
    eventually(READY, "it takes writes", || all.servers[1].cli(&["SET", "k", "v"]) == "OK");
}
