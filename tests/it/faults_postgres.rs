//! What the whole server does when Postgres breaks: real servers, the real binary, one fault at a time.
//!
//! In: a table of faults. Out: for each of them the same claims: links in memory and in Redis are served, what cannot be
//! known is a 503 within [`FAST`], nothing is denied that exists, and everything is back within [`BACK`] of the end.
//! Never: tells a server of a fault, or restarts one to end it.
//! At the limit: times are those of the claims themselves; the figures are printed.

use std::collections::HashMap;
use std::io::{Read, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use serde_json::json;
use socket2::{Domain, Socket, Type};
use waypost::domain::time;

use crate::servers::postgres::{Database, Postgres, ROLE};
use crate::servers::proxy::{Mode, Proxy};
use crate::servers::redis::Redis;
use crate::support::{Answer, Client, LIMIT, Server, eventually, request, throughout};
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
            Self::Full => return take_all_connections(postgres, &stand.database),
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
/// (`authentication_timeout`). Those of `database` are ended until none of them has a place: each that ends
/// leaves one to whoever comes first.
fn take_all_connections(postgres: &Postgres, database: &Database) -> Lasting {
    postgres.sql("ALTER SYSTEM SET authentication_timeout = '10min'");
    postgres.reload();
    let places: usize = postgres.sql("SHOW max_connections").parse().unwrap();
    let port = postgres.port();
    let (over, taken) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (is_over, are_taken) = (Arc::clone(&over), Arc::clone(&taken));
    let taking = std::thread::spawn(move || {
        let mut connections = Vec::new();
        while !is_over.load(Ordering::SeqCst) {
            connections.extend(take_connection(port));
            are_taken.store(connections.len(), Ordering::SeqCst);
        }
    });
    // A process begins for each: many seconds beside other work.
    eventually(LIMIT * 4, "all connections are taken", || {
        for backend in postgres.backends(database) {
            // Or it has ended by then.
            let _ = kill_process(backend, Signal::TERM);
        }
        taken.load(Ordering::SeqCst) == places
    });
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
        let redis_section =
            // Redis is well here: a machine that does other things must not make it look otherwise.
            redis.as_ref().map_or(String::new(), |redis| format!("[redis]\nurl = \"{}\"\ntimeout = \"100ms\"\n", redis.url()));
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

/// Waits until a link is served; until then nobody says that there is none.
#[track_caller]
fn comes_back(client: &mut Client, code: &str) {
    eventually(BACK, code, || {
        let answer = client.get(&format!("/{code}"));
        assert!(is_right(&answer, code) || answer.status == 503, "{code}: {answer:?}");
        is_right(&answer, code)
    });
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
            until(&over, || {
                for code in &warm {
                    let answer = client.get(&format!("/{code}"));
                    assert_eq!((answer.status, answer.location()), (307, Some(TARGET)), "warm: {answer:?}");
                    count += 1;
                }
            });
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
    ["meanwhile", "cold", "cold-too"].iter().for_each(|code| comes_back(&mut client, code));
    eventually(BACK, "what is unknown is unknown again", || client.get("/unknown-at-last").status == 404);
    eventually(BACK, "it creates", || create(&mut client, "after", &key).status == 201);
    comes_back(&mut client, "after");
    comes_back(&mut other.connect(), "after");
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

/// Does `step` again and again until another thread says that it is over.
fn until(over: &AtomicBool, mut step: impl FnMut()) {
    eventually(Duration::MAX, "it is over", || {
        step();
        over.load(Ordering::Relaxed)
    });
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
        let asked = [("cold", "cold"), ("unknown", "unknown"), ("cold", "cold-too"), ("unknown", "meanwhile")];
        // What is made later is not asked for by those who learn that it is not there.
        let asked = if goes == Goes::Reads { &asked[..3] } else { &asked };
        for (kind, code) in asked {
            let answer = longest.of(kind, || client.get(&format!("/{code}")));
            match (goes, kind) {
                (Goes::Reads, &"cold") => redirects(&answer, code),
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

    // Visits may be away as well by then: "visits_sink".
    let degraded = || server.get("/readyz").json()["degraded"][0] == json!("store");
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
    let store = ["the store does not answer", "the store answers again", "\"store\""];
    let [of_links, of_visits] =
        ["\"store\"", "\"store of visits\""].map(|breaker| ["its breaker is open", "its breaker is closed", breaker]);
    for [away, there, dependency] in [store, of_links, of_visits] {
        let said: Vec<bool> = log
            .iter()
            .filter(|line| line.contains(dependency) && (line.contains(away) || line.contains(there)))
            .map(|line| line.contains(away))
            .collect();
        let alternates = said.iter().enumerate().all(|(number, away)| *away == (number % 2 == 0));
        assert!(alternates && said.len().is_multiple_of(2), "{away}: {said:?}\n{}", log.join("\n"));
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

/// The answers of a server's last words arrive nowhere: what was asked for was done, or not at all, and whoever asked is
/// told which of the two.
#[test]
fn a_commit_whose_answer_is_lost() {
    let stand = Stand::new(true, None, "");
    let server = stand.start(0);
    let key = server.admin_key();
    server.link(TARGET);
    // CommandComplete (PostgreSQL manual, section 55.7); the whole transaction is under way by then.
    let lost: [&[u8]; 2] = [b"C\0\0\0\x0bCOMMIT\0", b"C\0\0\0\x0aBEGIN\0"];
    // On a machine that does other things all of them may have been refused before they got there.
    let an_answer_is_lost = |cuts| {
        eventually(LIMIT, "an answer was lost", || {
            stand.proxy.cuts() > cuts || {
                server.shorten(&json!({"original_url": TARGET}));
                false
            }
        });
    };
    let mut outcomes: HashMap<Vec<u16>, usize> = HashMap::new();
    for round in 0..8 {
        let codes: Vec<String> = (0..5).map(|number| format!("lost-{round}-{number}")).collect();
        let cuts = stand.proxy.cuts();
        stand.proxy.mode(Mode::CutAt(lost[round % 2].to_vec()));
        // Two ask for each code at the same time, so that a create of one's own and one of somebody else's meet.
        let made: Vec<(&str, Answer)> = std::thread::scope(|scope| {
            let (server, key) = (&server, &key);
            let create = |code| (code, create(&mut server.connect(), code, key));
            let creating: Vec<_> = codes.iter().chain(&codes).map(|code| scope.spawn(move || create(code))).collect();
            creating.into_iter().map(|one| one.join().unwrap()).collect()
        });
        an_answer_is_lost(cuts);
        for code in &codes {
            let statuses = made.iter().filter(|(made, _)| made == code).map(|(_, answer)| answer.status);
            let mut statuses: Vec<u16> = statuses.collect();
            statuses.sort_unstable();
            let rows = match statuses[..] {
                [201, 409 | 503] => 1,
                [503, 503] => 0,
                _ => panic!("{code}: {made:?}"),
            };
            assert_eq!(stand.count(code), rows, "{code}: {made:?}");
            *outcomes.entry(statuses).or_default() += 1;
        }
        // One without a code of its own: none is made that nobody is told of.
        let count = || stand.database.sql("SELECT count(*) FROM links").parse::<u64>().unwrap();
        let (before, cuts) = (count(), stand.proxy.cuts());
        stand.proxy.mode(Mode::CutAt(lost[round % 2].to_vec()));
        let answer = server.shorten(&json!({"original_url": TARGET}));
        assert!(matches!(answer.status, 201 | 503), "{answer:?}");
        assert_eq!(count() - before, u64::from(answer.status == 201), "{answer:?}");
        an_answer_is_lost(cuts);
    }
    report("two creates of each code, one answer lost", &format!("{outcomes:?}"));
}

#[test]
fn two_hundred_creates_of_one_code_on_two_instances() {
    let stand = Stand::new(false, Some(Redis::start()), "");
    let servers = [stand.start(0), stand.start(1)];
    let (key, at_once) = (servers[0].admin_key(), Barrier::new(200));
    let create = |number: usize| {
        let mut client = servers[number % 2].connect();
        at_once.wait();
        create(&mut client, "wanted", &key).status
    };
    let create = &create;
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        let creating: Vec<_> = (0..200).map(|number| scope.spawn(move || create(number))).collect();
        creating.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let count = |status| statuses.iter().filter(|have| **have == status).count();
    assert_eq!((count(201), count(409)), (1, 199), "{statuses:?}");
    assert_eq!(stand.count("wanted"), 1);
    servers.iter().for_each(|server| redirects(&server.get("/wanted"), "wanted"));
}

/// What a server looks up, as Postgres writes it down: when, in milliseconds, and which codes together.
fn write_down(postgres: &Postgres) {
    for setting in ["log_statement = 'all'", "log_line_prefix = '%n '"] {
        postgres.sql(&format!("ALTER SYSTEM SET {setting}"));
    }
    postgres.sql("SELECT pg_reload_conf()");
    eventually(LIMIT, "it writes down", || postgres.sql("SHOW log_statement") == "all");
}

fn written_down(postgres: &Postgres) -> Vec<(f64, Vec<String>)> {
    // Of the server's statements only look-ups have two arrays and no more.
    let look_up = |line: &str| {
        let (at, rest) = line.split_once(" DETAIL:  parameters: $1 = '{")?;
        let codes = rest.split_once("}', $2 = '{")?.1.strip_suffix("}'").filter(|codes| !codes.contains("$3"))?;
        Some((at.parse::<f64>().ok()? * 1e3, codes.split(',').map(str::to_owned).collect()))
    };
    postgres.sql("SELECT pg_read_file('../log')").lines().filter_map(look_up).collect()
}

#[test]
fn five_thousand_clients_on_one_cold_code() {
    waypost::app::raise_nofile();
    let stand = Stand::new(true, None, "lookup_timeout = \"5s\"\n");
    // What is new to a server is read again if it learns of it meanwhile.
    stand.add("cold");
    let (server, other) = (stand.start(0), stand.start(1));
    write_down(&stand.postgres);
    // Connections are there, and their statement.
    let ask = |number: usize| assert_eq!(server.get(&format!("/unknown-{number}")).status, 404);
    let ask = &ask;
    std::thread::scope(|scope| {
        (0..16).for_each(|number| drop(scope.spawn(move || ask(number))));
    });
    let visit = |server: &Server, count: usize| {
        let mut clients: Vec<Client> = (0..count).map(|_| server.connect()).collect();
        let begun = time::monotonic();
        clients.iter_mut().for_each(|client| client.send(request("GET", "/cold", &[], b"")));
        let sent = since(begun);
        clients.iter_mut().for_each(|client| redirects(&client.answer(), "cold"));
        report(
            &format!("{count} clients"),
            &format!("had asked after {sent:?} and were answered after {:?}", since(begun)),
        );
    };
    // So slow that all of them wait for the same answer.
    stand.proxy.mode(Mode::Delay(Duration::from_millis(300)));
    visit(&server, 5_000);
    stand.proxy.mode(Mode::Pass);
    visit(&other, 500);
    let asked = written_down(&stand.postgres).into_iter().filter(|(_, codes)| codes.contains(&"cold".to_owned()));
    let asked: Vec<_> = asked.collect();
    assert_eq!(asked.len(), 2, "one of each process: {asked:?}");
}

#[test]
fn a_cold_start_asks_for_no_more_codes_at_once_than_it_may() {
    const LOOKUPS: usize = 4;
    const LINKS: usize = 3_000;
    /// Of each answer, and so at least between a look-up and the next that takes its place.
    const DELAY: Duration = Duration::from_millis(40);
    waypost::app::raise_nofile();
    let stand = Stand::new(true, None, &format!("lookups = {LOOKUPS}\nlookup_timeout = \"2s\"\n"));
    let file = stand.places[1].data().join("links.csv");
    let lines: Vec<String> =
        (0..LINKS).map(|number| format!("cold-{number},{}\n", target(&format!("cold-{number}")))).collect();
    std::fs::write(&file, format!("code,url\n{}", lines.concat())).unwrap();
    stand.places[1].ok(&["import", file.to_str().unwrap()]);
    let server = stand.start(0);
    write_down(&stand.postgres);
    assert_eq!(server.get("/unknown").status, 404);
    stand.proxy.mode(Mode::Delay(DELAY));
    let mut clients: Vec<Client> = (0..LINKS / 3).map(|_| server.connect()).collect();
    let mut found = 0;
    for wave in 0..3 {
        let codes: Vec<String> =
            (0..clients.len()).map(|number| format!("cold-{}", wave * clients.len() + number)).collect();
        for (client, code) in clients.iter_mut().zip(&codes) {
            client.send(request("GET", &format!("/{code}"), &[], b""));
        }
        for (client, code) in clients.iter_mut().zip(&codes) {
            let answer = client.answer();
            if answer.status == 503 {
                says_later(&answer, code);
            } else {
                redirects(&answer, code);
                found += 1;
            }
        }
    }
    let asked = written_down(&stand.postgres);
    // Less a little: Postgres writes down when it begins, and rounds.
    let window = DELAY.as_secs_f64() * 1e3 - 5.0;
    let together = |from: f64| -> usize {
        let at_once = asked.iter().filter(|(at, _)| (from..from + window).contains(at));
        at_once.map(|(_, codes)| codes.len()).sum()
    };
    let most = asked.iter().map(|(at, _)| together(*at)).max().unwrap();
    report(
        "a cold start",
        &format!("{found} of {LINKS} found by {} look-ups, at most {most} codes at once", asked.len()),
    );
    assert!(most <= LOOKUPS, "{most} codes at once: {asked:?}");
    assert!(found > 10 * LOOKUPS, "{found} found");
    // Those who were told to come later come later.
    stand.proxy.mode(Mode::Pass);
    let mut client = server.connect();
    (0..LINKS).step_by(100).for_each(|number| comes_back(&mut client, &format!("cold-{number}")));
}

#[test]
fn a_restart_meets_no_storm_of_connections() {
    const POOL: u64 = 4;
    let mut stand = Stand::new(false, None, &format!("pool = {POOL}\n"));
    let server = stand.start(0);
    let over = AtomicBool::new(false);
    let visit = |number: usize| {
        let mut client = server.connect();
        let mut asked = 0;
        until(&over, || {
            asked += 1;
            let answer = client.get(&format!("/unknown-{number}-{asked}"));
            assert!(matches!(answer.status, 404 | 503), "{answer:?}");
        });
    };
    let visit = &visit;
    let most = std::thread::scope(|scope| {
        (0..16).for_each(|number| drop(scope.spawn(move || visit(number))));
        let _ends = Ends(&over);
        stand.postgres.kill();
        eventually(LIMIT, "it is noticed", || server.get("/readyz?require=store").status == 503);
        stand.postgres.start();
        let mut most = 0;
        throughout(Duration::from_secs(4), || {
            // Its own has another role, and one that is not known yet has none.
            let count = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'
                AND (usename IS NULL OR usename <> 'postgres')";
            most = stand.postgres.sql(count).parse::<u64>().unwrap().max(most);
        });
        eventually(BACK, "it is back", || server.get("/readyz?require=store").status == 200);
        most
    });
    report(
        "after a restart",
        &format!("at most {most} connections with a pool of {POOL}, one that listens, one for visits"),
    );
    assert!((1..=POOL + 2).contains(&most), "{most}");
}

/// How the last run ended.
#[derive(Clone, Copy, Debug)]
enum End {
    Stopped,
    /// SIGKILL, of the first run: all there is to begin with is what it wrote on its way.
    Killed,
}

fn check_start_without_stores(end: End) {
    let mut stand = Stand::new(false, Some(Redis::start()), "");
    ["cold", "edited"].iter().for_each(|code| stand.add(code));
    let server = stand.start(0);
    let warm: Vec<String> = (0..20).map(|_| server.warm(TARGET)).collect();
    redirects(&server.get("/edited"), "edited");
    match end {
        End::Stopped => drop(server.stop()),
        End::Killed => {
            let file = stand.places[0].data().join("warm");
            // One of before the last of these links was asked for, if there is one.
            let _ = std::fs::remove_file(&file);
            eventually(3 * LIMIT, "the links are written", || file.exists());
            server.kill();
        }
    }
    stand.postgres.stop();
    stand.redis.as_mut().unwrap().kill();
    // Twice: what it remembers outlives a run that never saw a store.
    let without = || {
        let server = stand.start(0);
        let (mut client, key, mut longest) = (server.connect(), server.admin_key(), Longest::default());
        throughout(PROMPT, || {
            for code in &warm {
                let answer = client.get(&format!("/{code}"));
                assert_eq!((answer.status, answer.location()), (307, Some(TARGET)), "{code}: {answer:?}");
            }
            redirects(&client.get("/edited"), "edited");
            for code in ["cold", "unknown"] {
                says_later(&longest.of("unknown", || client.get(&format!("/{code}"))), code);
            }
            says_later(&longest.of("create", || create(&mut client, "never", &key)), "create");
        });
        let ready = server.get("/readyz");
        assert_eq!((ready.status, &ready.json()["degraded"][0]), (200, &json!("store")), "{ready:?}");
        says_later(&server.get("/readyz?require=store"), "readyz?require=store");
        report(&format!("{end:?}, no store"), &longest.to_string());
        ["unknown", "create"].iter().for_each(|kind| longest.within(FAST, kind));
        server
    };
    without().stop();
    let server = without();

    stand.postgres.start();
    stand.redis.as_mut().unwrap().restart();
    stand.places[1].ok(&["link", "edit", "edited", "--url", TARGET]);
    let healed = time::monotonic();
    let (mut client, key) = (server.connect(), server.admin_key());
    comes_back(&mut client, "cold");
    eventually(BACK, "the edit shows", || client.get("/edited").location() == Some(TARGET));
    eventually(BACK, "what is unknown is unknown again", || client.get("/unknown").status == 404);
    eventually(BACK, "it creates", || create(&mut client, "after", &key).status == 201);
    comes_back(&mut client, "after");
    eventually(BACK, "it is ready", || server.get("/readyz?require=store").status == 200);
    report(&format!("{end:?}, stores back"), &format!("all works after {:?}", since(healed)));
    assert!(since(healed) <= BACK);
    // Redis is left alone for its own time, and then asked though nobody misses anything.
    eventually(2 * BACK, "nothing is away", || server.get("/readyz").json()["degraded"] == json!([]));
    for code in &warm {
        assert_eq!(client.get(&format!("/{code}")).location(), Some(TARGET), "{code}");
    }
    server.stop();
}

#[test]
fn a_start_without_stores_after_a_stop() {
    check_start_without_stores(End::Stopped);
}

#[test]
fn a_start_without_stores_after_a_kill() {
    check_start_without_stores(End::Killed);
}

/// Each answer of Postgres comes 400 ms late, and a start asks for many, one after the other.
#[test]
fn a_start_with_a_slow_store() {
    let stand = Stand::new(true, None, "");
    stand.add("cold");
    let server = stand.start(0);
    let warm = server.warm(TARGET);
    server.stop();
    stand.proxy.mode(Mode::Delay(Duration::from_millis(400)));
    let begun = time::monotonic();
    let server = stand.start(0);
    let took = since(begun);
    assert_eq!(server.get(&format!("/{warm}")).location(), Some(TARGET));
    assert!(took < Duration::from_secs(6), "{took:?}");
    stand.proxy.mode(Mode::Pass);
    let (mut client, key) = (server.connect(), server.admin_key());
    comes_back(&mut client, "cold");
    eventually(BACK, "it creates", || create(&mut client, "after", &key).status == 201);
    report("slow store", &format!("started after {took:?}"));
    server.stop();
}
