//! The server under systemd: sockets that are passed and outlive it, its notices, its unit.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::Signal;
use socket2::{Domain, Socket, Type};
use waypost::domain::time;

use crate::support::{Client, LIMIT, Server, Setup, clean, eventually, request};

const TARGET: &str = "https://example.com/target";

/// Sockets that listen, each at a port of its own.
fn sockets(count: usize) -> Vec<TcpListener> {
    (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect()
}

/// Sockets that share one address, as `ReusePort=yes` makes them.
fn sockets_of_one_address(count: usize) -> Vec<TcpListener> {
    let mut address: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let mut bind = || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_reuse_port(true).unwrap();
        socket.bind(&address.into()).unwrap();
        socket.listen(1024).unwrap();
        let socket = TcpListener::from(socket);
        address = socket.local_addr().unwrap();
        socket
    };
    (0..count).map(|_| bind()).collect()
}

/// Descriptors are inherited by every child that is spawned while they may be.
static SPAWNING: Mutex<()> = Mutex::new(());

/// Moves the descriptors of its first argument to 3 and on, says so in the environment, and becomes the server
/// (sd_listen_fds(3); `LISTEN_PID` must be the server's own).
const PASS: &str = "\
import os, sys
passed = [int(fd) for fd in sys.argv[1].split(',')]
high = [os.dup2(fd, 200 + i, inheritable=False) for i, fd in enumerate(passed)]
for fd in passed:
    os.close(fd)
for i, fd in enumerate(high):
    os.dup2(fd, 3 + i, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(high)))
os.execv(sys.argv[2], sys.argv[2:])
";

/// Starts the server with these sockets, as systemd would.
fn start(setup: &Setup, sockets: &[TcpListener]) -> Server {
    let serve = setup.serve();
    let passed: Vec<String> = sockets.iter().map(|socket| socket.as_raw_fd().to_string()).collect();
    let mut command = Command::new("python3");
    clean(&mut command);
    command.args(["-c", PASS, &passed.join(",")]).arg(serve.get_program()).args(serve.get_args());
    command.envs(serve.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.current_dir(serve.get_current_dir().unwrap());
    let _alone = SPAWNING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let inherit = |flags: FdFlags| sockets.iter().for_each(|socket| fcntl_setfd(socket.as_fd(), flags).unwrap());
    inherit(FdFlags::empty());
    let server = Server::spawn(command, &setup.data());
    inherit(FdFlags::CLOEXEC);
    server
}

/// A server that will be passed its sockets, whose store has a link `code`.
fn setup(workers: usize) -> Setup {
    let setup = Setup::new("").without_listener().argument("--workers").argument(&workers.to_string());
    setup.store().add("code", TARGET, |_| {});
    setup
}

fn asks(address: SocketAddr) -> u16 {
    Client::connect(address).get("/code").status
}

#[test]
fn every_passed_socket_is_accepted_from() {
    for (count, workers) in [(1, 1), (1, 2), (2, 2), (3, 2), (5, 1), (2, 3)] {
        let (setup, passed) = (setup(workers), sockets(count));
        let server = start(&setup, &passed);
        let mut addresses: Vec<SocketAddr> = passed.iter().map(|socket| socket.local_addr().unwrap()).collect();
        addresses.sort();
        let mut printed: Vec<SocketAddr> = server.addresses.iter().map(|listening| listening.address).collect();
        printed.sort();
        assert_eq!(printed, addresses, "{count} sockets, {workers} workers");
        for address in addresses.repeat(4) {
            assert_eq!(asks(address), 307, "{count} sockets, {workers} workers");
        }
        server.stop();
    }
    // The kernel gives each of them a share of the connections, whether anybody accepts from it or not.
    for (count, workers) in [(4, 2), (2, 2), (3, 1)] {
        let (setup, passed) = (setup(workers), sockets_of_one_address(count));
        let server = start(&setup, &passed);
        assert_eq!(server.addresses.len(), 1);
        for _ in 0..50 {
            assert_eq!(asks(server.address()), 307, "{count} sockets, {workers} workers");
        }
    }
}

#[test]
fn sockets_of_another_process_are_not_taken() {
    // LISTEN_PID names somebody else: the variables were inherited.
    let setup = Setup::new("").variable("LISTEN_PID", "1").variable("LISTEN_FDS", "1");
    let server = setup.start();
    assert_eq!(server.get("/healthz").status, 200);
}

#[test]
fn a_connection_waits_for_the_next_server() {
    let setup = setup(2);
    let passed = sockets_of_one_address(2);
    let address = passed[0].local_addr().unwrap();
    let before = start(&setup, &passed);
    assert_eq!(asks(address), 307);
    before.stop();
    let mut waiting: Vec<Client> = (0..20).map(|_| Client::connect(address)).collect();
    for client in &mut waiting {
        client.send(request("GET", "/code", &[], b""));
    }
    let after = start(&setup, &passed);
    for client in &mut waiting {
        assert_eq!(client.answer().status, 307);
    }
    after.stop();
}

#[test]
fn restarts_under_load_lose_no_request() {
    let setup = setup(2);
    let passed = sockets_of_one_address(2);
    let address = passed[0].local_addr().unwrap();
    let (over, answered) = (AtomicBool::new(false), AtomicU64::new(0));
    let ask = |kept: bool| {
        let mut failed = Vec::new();
        let mut client: Option<Client> = None;
        while !over.load(Ordering::Relaxed) {
            let open = client.get_or_insert_with(|| Client::connect(address));
            let sent = open.try_send(request("GET", "/code", &[], b""));
            match open.next(false) {
                Ok(answer) if sent && answer.status == 307 => {
                    answered.fetch_add(1, Ordering::Relaxed);
                    if !kept || answer.closes() {
                        client = None;
                    }
                }
                outcome => {
                    failed.push(format!("sent: {sent}, kept: {kept}, {outcome:?}"));
                    client = None;
                }
            }
        }
        failed
    };
    let ask = &ask;
    let more = || {
        let goal = answered.load(Ordering::Relaxed) + 300;
        eventually(LIMIT, "requests are answered", || answered.load(Ordering::Relaxed) > goal);
    };
    let failed: Vec<String> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..6).map(|number| scope.spawn(move || ask(number % 2 == 0))).collect();
        let mut server = start(&setup, &passed);
        for _ in 0..5 {
            more();
            server.stop();
            server = start(&setup, &passed);
        }
        more();
        over.store(true, Ordering::Relaxed);
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    });
    assert!(failed.is_empty(), "{} failed: {:?}", failed.len(), &failed[..failed.len().min(5)]);
}

/// The socket on which systemd hears (sd_notify(3)).
struct Notices(UnixDatagram);

impl Notices {
    fn bind(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        Self(socket)
    }

    fn next(&self) -> String {
        let mut bytes = [0; 4096];
        let count = self.0.recv(&mut bytes).expect("a notice in time");
        String::from_utf8_lossy(&bytes[..count]).trim().to_owned()
    }
}

#[test]
fn systemd_is_told() {
    let setup = Setup::new("");
    let path = setup.path("notify");
    let notices = Notices::bind(&path);
    let setup = setup.variable("NOTIFY_SOCKET", path.to_str().unwrap());
    let server = setup.start();
    assert_eq!(notices.next(), "READY=1");
    assert_eq!(server.get("/readyz").status, 200, "ready is when every worker accepts");
    server.signal(Signal::TERM);
    assert_eq!(notices.next(), "STOPPING=1");
    server.ends();
}

/// `WatchdogSec=` of a unit arrives as `WATCHDOG_USEC`; a service that is silent for so long is killed.
#[test]
fn the_watchdog_is_fed_in_time() {
    for (watchdog_ms, count) in [(10_000, 1), (1000, 4), (400, 8)] {
        let setup = Setup::new("");
        let path = setup.path("notify");
        let notices = Notices::bind(&path);
        let setup = setup
            .variable("NOTIFY_SOCKET", path.to_str().unwrap())
            .variable("WATCHDOG_USEC", &(watchdog_ms * 1000).to_string());
        let server = setup.start();
        assert_eq!(notices.next(), "READY=1");
        let mut last = time::monotonic();
        for _ in 0..count {
            assert_eq!(notices.next(), "WATCHDOG=1");
            let now = time::monotonic();
            let gap = now.duration_since(last);
            assert!(gap < Duration::from_millis(watchdog_ms), "{gap:?} without a sign of {watchdog_ms} ms");
            last = now;
        }
        server.stop();
    }
}

#[test]
fn the_unit_is_sandboxed() {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/waypost.service");
    let output = Command::new("systemd-analyze")
        .args(["security", "--offline=yes", "--no-pager"])
        .arg(&unit)
        .output()
        .expect("systemd-analyze is there: script/setup installs it");
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find(|line| line.contains("Overall exposure level"));
    let line = line.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr)));
    let level: f64 = line.rsplit_once(": ").unwrap().1.split_whitespace().next().unwrap().parse().unwrap();
    assert!(level <= 1.5, "{line}");
}
