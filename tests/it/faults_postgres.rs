//! What the whole server does when Postgres breaks: real servers, the real binary, one fault at a time.
//!
//! In: a table of faults. Out: for each of them the same claims: links in memory and in Redis are served, what cannot be
//! known is a 503 within [`FAST`], nothing is denied that exists, and everything is back within [`BACK`] of the end.
//! Never: tells a server of a fault, or restarts one to end it.
//! At the limit: times are those of the claims themselves; the figures are printed.

use std::collections::HashMap;
use std::io::{Read, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use socket2::{Domain, Socket, Type};
use waypost::domain::time;

use crate::servers::postgres::{Database, Postgres, ROLE};
use crate::servers::proxy::{Mode, Proxy};
use crate::servers::redis::Redis;
use crate::support::{Answer, Client, LIMIT, Server, eventually, throughout};
use crate::warm::Place;

/// What cannot be known, and what cannot be done, is said within this time.
const FAST: Duration = Duration::from_millis(300);
/// The first create that meets a fault may find out about it itself: `statement_timeout`, for the transaction and for
/// the question whether it was committed, and `pool_timeout`.
const FOUND_OUT: Duration = Duration::from_secs(6);
/// From the end of a fault until everything works.
const BACK: Duration = Duration::from_secs(10);
/// How long a fault is looked at.
const SPAN: Duration = Duration::from_millis(2500);
const PROMPT: Duration = Duration::from_millis(1500);

const TARGET: &str = "https://example.com/";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Stopped in order.
    Stopped,
    /// Every process killed.
    Killed,
    /// SIGSTOP for every process.
    Frozen,
    /// Each chunk of its answers comes half a second later.
    Slow,
    /// Somebody else has all connections, and ours were ended.
    Full,
    /// Connections stay and can be made, and nothing comes back.
    Silent,
    /// The host is gone: not even a connection is refused.
    BlackHole,
    /// As a primary is after it lost its office.
    ReadOnly,
}

/// What goes on although the fault lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goes {
    /// Nothing that asks Postgres.
    Nothing,
    /// The server may find it usable at times; look-ups never get an answer in time.
    SlowWrites,
    /// Look-ups; what writes is refused.
    Reads,
}

/// What a fault needs to last.
enum Lasting {
    Itself,
    Greed { over: Arc<AtomicBool>, taking: Option<JoinHandle<()>> },
    Hole { _sockets: Vec<Socket> },
}

impl Drop for Lasting {
    fn drop(&mut self) {
        if let Self::Greed { over, taking } = self {
            over.store(true, Ordering::SeqCst);
            let _ = taking.take().unwrap().join();
        }
    }
}

impl Fault {
    fn by_proxy(self) -> bool {
        matches!(self, Self::Slow | Self::Silent)
    }

    /// Whether somebody else can write to the store meanwhile.
    fn spares_others(self) -> bool {
        self.by_proxy()
    }

    fn begin(self, stand: &mut Stand) -> Lasting {
        let postgres = &mut stand.postgres;
        match self {
            Self::Stopped => postgres.stop(),
            Self::Killed => postgres.kill(),
            Self::Frozen => postgres.freeze(),
            Self::Slow => stand.proxy.mode(Mode::Delay(Duration::from_millis(500))),
            Self::Silent => stand.proxy.mode(Mode::Silent),
            Self::ReadOnly => read_only(postgres, "on"),
            Self::Full => return take_all_connections(postgres),
            Self::BlackHole => {
                postgres.kill();
                return hole(postgres.port());
            }
        }
        Lasting::Itself
    }

    fn end(self, stand: &mut Stand, lasting: Lasting) {
        drop(lasting);
        match self {
            Self::Stopped | Self::Killed | Self::BlackHole => stand.postgres.start(),
            Self::Frozen => stand.postgres.thaw(),
            Self::Slow | Self::Silent => stand.proxy.mode(Mode::Pass),
            Self::ReadOnly => read_only(&stand.postgres, "off"),
            Self::Full => {}
        }
    }
}

fn read_only(postgres: &Postgres, value: &str) {
    postgres.sql(&format!("ALTER SYSTEM SET default_transaction_read_only = {value}"));
    postgres.sql("SELECT pg_reload_conf()");
}

/// Connections that say who they are and not their password: each takes a place for as long as it is waited for
/// (`authentication_timeout`, a minute). Then ours are ended, and whatever becomes free is taken too.
fn take_all_connections(postgres: &Postgres) -> Lasting {
    let pids = postgres.sql(&format!("SELECT pid FROM pg_stat_activity WHERE usename = '{ROLE}'"));
    let port = postgres.port();
    let over = Arc::new(AtomicBool::new(false));
    let (is_over, full) = (Arc::clone(&over), Arc::new(AtomicBool::new(false)));
    let is_full = Arc::clone(&full);
    let taking = std::thread::spawn(move || {
        let mut taken = Vec::new();
        while !is_over.load(Ordering::SeqCst) {
            match take_connection(port) {
                Some(connection) => taken.push(connection),
                None => is_full.store(true, Ordering::SeqCst),
            }
        }
    });
    eventually(LIMIT, "all connections are taken", || full.load(Ordering::SeqCst));
    for pid in pids.lines() {
        kill_process(Pid::from_raw(pid.parse().unwrap()).unwrap(), Signal::TERM).unwrap();
    }
    Lasting::Greed { over, taking: Some(taking) }
}

/// None if there was no place (PostgreSQL manual, section 55.2.1: `R` asks for the password, `E` is an error).
fn take_connection(port: u16) -> Option<TcpStream> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let parameters = format!("user\0{ROLE}\0database\0postgres\0\0");
    let length = u32::try_from(8 + parameters.len()).unwrap();
    let version: u32 = 3 << 16;
    stream.write_all(&[&length.to_be_bytes(), &version.to_be_bytes(), parameters.as_bytes()].concat()).unwrap();
    let mut said = [0];
    stream.read_exact(&mut said).ok()?;
    (said == *b"R").then_some(stream)
}

/// Somebody who listens and takes nothing: once as many wait as may (listen(2)), what comes is not answered.
fn hole(port: u16) -> Lasting {
    let socket = || Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], port)).into();
    let listener = socket();
    listener.set_reuse_address(true).unwrap();
    listener.bind(&address).unwrap();
    listener.listen(0).unwrap();
    let mut sockets = vec![listener];
    for _ in 0..4 {
        let waiting = socket();
        waiting.set_nonblocking(true).unwrap();
        let _ = waiting.connect(&address);
        sockets.push(waiting);
    }
    let probe = TcpStream::connect_timeout(&address.as_socket().unwrap(), Duration::from_millis(100));
    assert!(probe.is_err(), "it takes connections");
    Lasting::Hole { _sockets: sockets }
}

/// A store, Redis, and the folders of two instances on them. What is declared first ends first.
struct Stand {
    /// The first reaches Postgres through the proxy if it was asked for.
    places: [Place; 2],
    proxy: Proxy,
    redis: Option<Redis>,
    database: Database,
    postgres: Postgres,
}

impl Stand {
    fn new(by_proxy: bool, redis: Option<Redis>, more: &str) -> Self {
        let postgres = Postgres::own();
        let database = postgres.database();
        let proxy = Proxy::start(SocketAddr::from(([127, 0, 0, 1], postgres.port())));
        let first = if by_proxy { database.url_at(proxy.address().port()) } else { database.url() };
        let redis_section = redis.as_ref().map_or(String::new(), |redis| format!("[redis]\nurl = \"{}\"\n", redis.url()));
        let places = [first, database.url()].map(|url| {
            let owner = database.owner_url();
            Place::new(&format!("{redis_section}[postgres]\nurl = \"{url}\"\nmigrate_url = \"{owner}\"\n{more}"))
        });
        places[0].ok(&["migrate", "--grants", ROLE]);
        let key = places[0].ok(&["key", "create", "--scope", "admin"]);
        for place in &places {
            std::fs::create_dir_all(place.data()).unwrap();
            std::fs::write(place.data().join("admin.key"), &key).unwrap();
        }
        Self { places, proxy, redis, database, postgres }
    }

    fn start(&self, number: usize) -> Server {
        let place = &self.places[number];
        Server::spawn(place.command(&["serve", "--listen", "127.0.0.1:0"]), &place.data())
    }

    /// Another process makes a link, and no instance learns of it but by the store.
    fn add(&self, code: &str) {
        self.places[1].ok(&["link", "add", &target(code), "--code", code]);
    }

    fn count(&self, code: &str) -> u64 {
        self.database.sql(&format!("SELECT count(*) FROM links WHERE code = '{code}'")).parse().unwrap()
    }
}

fn target(code: &str) -> String {
    format!("{TARGET}{code}")
}

#[track_caller]
fn redirects(answer: &Answer, code: &str) {
    assert_eq!((answer.status, answer.location()), (307, Some(target(code).as_str())), "{code}: {answer:?}");
}

fn is_right(answer: &Answer, code: &str) -> bool {
    answer.status == 307 && answer.location() == Some(target(code).as_str())
}

#[track_caller]
fn says_later(answer: &Answer, what: &str) {
    assert_eq!(answer.status, 503, "{what}: {answer:?}");
    assert!(answer.header("retry-after").is_some(), "{what}: {answer:?}");
}

fn create(client: &mut Client, code: &str, key: &str) -> Answer {
    client.shorten(&json!({"original_url": target(code), "custom_code": code}), key)
}

fn since(begun: Instant) -> Duration {
    time::monotonic().duration_since(begun)
}

/// The longest time that each kind of question took.
#[derive(Default)]
struct Longest(HashMap<&'static str, (Duration, usize)>);

impl Longest {
    fn of<T>(&mut self, kind: &'static str, work: impl FnOnce() -> T) -> T {
        let begun = time::monotonic();
        let outcome = work();
        let (longest, count) = self.0.entry(kind).or_default();
        *longest = since(begun).max(*longest);
        *count += 1;
        outcome
    }

    #[track_caller]
    fn within(&self, limit: Duration, kind: &str) {
        let (longest, count) = self.0[kind];
        assert!(longest <= limit, "one of {count} {kind} took {longest:?}: {self}");
    }
}

impl std::fmt::Display for Longest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut kinds: Vec<_> = self.0.iter().collect();
        kinds.sort();
        kinds.iter().try_for_each(|(kind, (longest, count))| write!(f, "{kind}: {count}, at most {longest:?}; "))
    }
}

#[expect(clippy::print_stdout, reason = "figures are for people")]
fn report(what: &str, figures: &str) {
    println!("{what}: {figures}");
}

/// What must hold while `fault` lasts and once it is over.
fn check(fault: Fault, goes: Goes) {
    let mut stand = Stand::new(fault.by_proxy(), Some(Redis::start()), "");
    let (server, other) = (stand.start(0), stand.start(1));
    let warm: Vec<String> = (0..4).map(|_| server.warm(TARGET)).collect();
    let in_redis: Vec<String> = (0..100).map(|number| format!("shared-{number}")).collect();
    in_redis.iter().for_each(|code| other.custom(code, &target(code)));
    ["cold", "cold-too"].iter().for_each(|code| stand.add(code));
    let redis = stand.redis.as_ref().unwrap();
    eventually(LIMIT, "it is all in Redis", || redis.cli(&["DBSIZE"]).parse::<usize>().unwrap() >= in_redis.len());
    let follows = || in_redis.iter().take(2).all(|code| is_right(&server.get(&format!("/{code}")), code));
    eventually(LIMIT, "it follows", follows);
    server.custom("before", &target("before"));
    let key = server.admin_key();

    let mut longest = Longest::default();
    let mut lasting = None;
    let over = AtomicBool::new(false);
    let hits = std::thread::scope(|scope| {
        let hit = || {
            let mut client = server.connect();
            let mut count = 0_u64;
            while !over.load(Ordering::Relaxed) {
                for code in &warm {
                    let answer = client.get(&format!("/{code}"));
                    assert_eq!((answer.status, answer.location()), (307, Some(TARGET)), "warm: {answer:?}");
                    count += 1;
                }
                // The other threads of the machine have work to do, too.
                std::thread::yield_now();
            }
            count
        };
        let hitting: Vec<_> = (0..4).map(|_| scope.spawn(hit)).collect();
        // Ends the others also if a claim fails.
        let ends = Ends(&over);
        lasting = Some(fault.begin(&mut stand));
        while_it_lasts(&server, &in_redis[2..], goes, &mut longest);
        drop(ends);
        hitting.into_iter().map(|one| one.join().unwrap()).sum::<u64>()
    });
    assert!(hits > 100, "{hits} hits");
    let added_meanwhile = fault.spares_others();
    if added_meanwhile {
        stand.add("meanwhile");
    }

    fault.end(&mut stand, lasting.unwrap());
    let healed = time::monotonic();
    if !added_meanwhile {
        eventually(BACK, "the other instance creates", || {
            matches!(create(&mut other.connect(), "meanwhile", &key).status, 201 | 409)
        });
    }
    let mut client = server.connect();
    for code in ["meanwhile", "cold", "cold-too"] {
        eventually(BACK, code, || {
            let answer = client.get(&format!("/{code}"));
            assert!(is_right(&answer, code) || answer.status == 503 || code == "meanwhile", "{code}: {answer:?}");
            is_right(&answer, code)
        });
    }
    eventually(BACK, "what is unknown is unknown again", || client.get("/unknown-at-last").status == 404);
    eventually(BACK, "it creates", || create(&mut client, "after", &key).status == 201);
    redirects(&client.get("/after"), "after");
    redirects(&other.get("/after"), "after");
    eventually(BACK, "it is ready", || server.get("/readyz").json()["degraded"] == json!([]));
    eventually(BACK, "its breaker is closed", || server.metric("waypost_breaker_state", &["\"store\""]) == 0.0);
    let back = since(healed);
    report(&format!("{fault:?}"), &format!("{longest}{hits} hits; all of it works again after {back:?}"));
    assert!(back <= BACK, "{back:?}");
    longest.within(FAST, "unknown");
    longest.within(FAST, "cold");
    longest.within(FAST, "in Redis");
    if goes != Goes::SlowWrites {
        longest.within(FOUND_OUT, "first create");
        longest.within(FAST, "create");
    }
    each_change_is_said_once(&server.stop());
}

struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What is said to visitors, to those who create, and to those who watch.
fn while_it_lasts(server: &Server, in_redis: &[String], goes: Goes, longest: &mut Longest) {
    let (mut client, key) = (server.connect(), server.admin_key());
    let mut in_redis = in_redis.iter();
    let mut visit = |longest: &mut Longest| {
        for (kind, code) in [("unknown", "unknown"), ("cold", "cold"), ("cold", "cold-too"), ("unknown", "meanwhile")] {
            let answer = longest.of(kind, || client.get(&format!("/{code}")));
            match (goes, kind) {
                (Goes::Reads, "cold") => redirects(&answer, code),
                (Goes::Reads, _) => assert_eq!(answer.status, 404, "{code}: {answer:?}"),
                _ => says_later(&answer, code),
            }
        }
        if let Some(code) = in_redis.next() {
            let answer = longest.of("in Redis", || client.get(&format!("/{code}")));
            redirects(&answer, code);
        }
    };
    // The first to meet the fault are visitors and one who creates, all at once.
    let mut creating = server.connect();
    let first = std::thread::scope(|scope| {
        let first = scope.spawn(|| {
            let begun = time::monotonic();
            (create(&mut creating, "first", &key), since(begun))
        });
        throughout(SPAN, || visit(longest));
        first.join().unwrap()
    });
    longest.of("first create", || ());
    longest.0.insert("first create", (first.1, 1));
    let refused = |answer: &Answer| match goes {
        Goes::SlowWrites if answer.status == 201 => {}
        _ => says_later(answer, "create"),
    };
    refused(&first.0);

    let degraded = || server.get("/readyz").json()["degraded"] == json!(["store"]);
    if goes == Goes::SlowWrites {
        throughout(SPAN, || visit(longest));
        return;
    }
    eventually(SPAN, "it is degraded", degraded);
    let ready = server.get("/readyz");
    assert_eq!((ready.status, &ready.json()["status"]), (200, &json!("degraded")), "{ready:?}");
    says_later(&server.get("/readyz?require=store"), "readyz?require=store");
    assert_eq!(server.get("/healthz").status, 200);
    assert_eq!(server.metric("waypost_degraded", &["reason=\"store\""]), 1.0);
    if goes == Goes::Nothing {
        eventually(SPAN, "its breaker is open", || server.metric("waypost_breaker_state", &["\"store\""]) != 0.0);
    }
    throughout(PROMPT, || {
        visit(longest);
        refused(&longest.of("create", || create(&mut creating, "never", &key)));
    });
}

/// Each change of the store is one line: away, and there; left alone, and asked again.
fn each_change_is_said_once(log: &[String]) {
    for (away, there) in
        [("the store does not answer", "the store answers again"), ("it is left alone for a while", "it answers again")]
    {
        let said: Vec<bool> =
            log.iter().filter(|line| line.contains(away) || line.contains(there)).map(|line| line.contains(away)).collect();
        let alternates = said.iter().enumerate().all(|(number, away)| *away == (number % 2 == 0));
        assert!(alternates && said.len() % 2 == 0, "{away}: {said:?}\n{}", log.join("\n"));
    }
}

#[test]
fn stopped() {
    check(Fault::Stopped, Goes::Nothing);
}

#[test]
fn killed() {
    check(Fault::Killed, Goes::Nothing);
}

#[test]
fn frozen() {
    check(Fault::Frozen, Goes::Nothing);
}

#[test]
fn slow() {
    check(Fault::Slow, Goes::SlowWrites);
}

#[test]
fn out_of_connections() {
    check(Fault::Full, Goes::Nothing);
}

#[test]
fn silent() {
    check(Fault::Silent, Goes::Nothing);
}

#[test]
fn a_black_hole() {
    check(Fault::BlackHole, Goes::Nothing);
}

#[test]
fn read_only_after_a_failover() {
    check(Fault::ReadOnly, Goes::Reads);
}
