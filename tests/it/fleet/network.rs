//! A network that loses everything: a black hole between an instance and Postgres, or Redis.
//!
//! In: an instance in a network namespace of its own, and a link from there to each store; then a route that swallows what
//! the store says, so that nothing is refused and nothing is reset. Out: it is noticed within [`NOTICED`], links in memory
//! are answered as ever, connections that say nothing any more are given up, and all works again within [`BACK`] of the end.
//! Never: touches a route, an address or an interface but its own.
//! At the limit: who may make no namespace leaves it out, and says so.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;
use waypost::domain::time;

use super::{CONFIG, Over};
use crate::servers::deployment::{Deployment, WAYPOST, Way};
use crate::servers::port;
use crate::servers::postgres::Postgres;
use crate::servers::proxy::Proxy;
use crate::servers::redis::Redis;
use crate::support::{LIMIT, Server, eventually, left_out, throughout};

/// From the first lost packet until the instance says so.
const NOTICED: Duration = Duration::from_secs(5);
/// Until no connection is believed in that was there before: `tcp_user_timeout`, or the keepalives, and their last wait.
const GIVEN_UP: Duration = Duration::from_secs(16);
/// From the end until everything works.
const BACK: Duration = Duration::from_secs(10);
/// How long hits are measured before and during.
const SPAN: Duration = Duration::from_secs(3);
/// What one in a hundred hits takes on a machine that does other things, whatever it was before.
const UNAFFECTED: Duration = Duration::from_millis(20);
const TARGET: &str = "https://example.com/";

/// Runs `ip`, which is told everything in words.
fn ip(words: &str) -> Result<(), String> {
    let output = Command::new("ip").args(words.split(' ')).output().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(format!("ip {words}: {said}")) }
}

/// What the names of our namespaces begin with; the rest is the process.
const PREFIX: &str = "waypost-";

/// A network namespace; gone when it is dropped.
struct Namespace(String);

impl Namespace {
    /// Another one; those of processes that were killed go.
    fn new() -> Result<Self, String> {
        for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
            let name = entry.file_name().into_string().unwrap_or_default();
            let process = name.strip_prefix(PREFIX).filter(|process| process.parse::<u32>().is_ok());
            if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
                // Its links go with it.
                let _ = ip(&format!("netns del {name}"));
            }
        }
        let name = format!("{PREFIX}{}", std::process::id());
        ip(&format!("netns add {name}"))?;
        Ok(Self(name))
    }

    /// The same command, inside.
    fn inside(&self, command: &Command) -> Command {
        let mut inside = Command::new("ip");
        inside.args(["netns", "exec", &self.0]).arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        if let Some(folder) = command.get_current_dir() {
            inside.current_dir(folder);
        }
        inside
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = ip(&format!("netns del {}", self.0));
    }
}

/// A cable between here and a namespace.
struct Link<'a> {
    namespace: &'a Namespace,
    name: String,
    here: Ipv4Addr,
    there: Ipv4Addr,
}

impl<'a> Link<'a> {
    fn new(namespace: &'a Namespace, number: u8) -> Result<Self, String> {
        let process = std::process::id();
        // Of 10.0.0.0/8 a corner that is each process's own; four addresses for each link.
        let address = |last: u8| {
            let [_, _, high, low] = process.to_be_bytes();
            Ipv4Addr::new(10, 128 | high, low, number * 4 + last)
        };
        let name = format!("wp{number}-{process}");
        let this = Self { namespace, here: address(1), there: address(2), name };
        let (name, inside) = (&this.name, &namespace.0);
        ip(&format!("link add {name} type veth peer name {name}n netns {inside}"))?;
        ip(&format!("address add {}/30 dev {name}", this.here))?;
        ip(&format!("link set {name} up"))?;
        ip(&format!("-n {inside} address add {}/30 dev {name}n", this.there))?;
        ip(&format!("-n {inside} link set {name}n up"))?;
        Ok(this)
    }

    /// What goes from here to there is swallowed.
    fn begin_black_hole(&self) {
        ip(&format!("route add blackhole {}/32", self.there)).unwrap();
    }

    fn end_black_hole(&self) -> Result<(), String> {
        ip(&format!("route del blackhole {}/32", self.there))
    }

    /// Connections of the namespace to here: the ports they come from, and their timers.
    fn connections(&self) -> Vec<(String, String)> {
        let mut ss = Command::new("ss");
        ss.args(["-H", "-t", "-n", "-o", "state", "established", "dst", &self.here.to_string()]);
        let output = self.namespace.inside(&ss).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let line = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            (words[2].to_owned(), words.get(4).copied().unwrap_or_default().to_owned())
        };
        text.lines().map(line).collect()
    }
}

impl Drop for Link<'_> {
    fn drop(&mut self) {
        let _ = self.end_black_hole();
        let _ = ip(&format!("link del {}", self.name));
    }
}

/// The time that one in a hundred hits takes longer than, of so many, all of them right.
fn hits(server: &Server, codes: &[String], span: Duration) -> (Duration, usize) {
    let mut client = server.connect();
    let mut took = Vec::new();
    let begun = time::monotonic();
    while time::monotonic().duration_since(begun) < span {
        for code in codes {
            let asked = time::monotonic();
            let answer = client.get(&format!("/{code}"));
            took.push(time::monotonic().duration_since(asked));
            assert_eq!((answer.status, answer.location()), (307, Some(TARGET)), "{code}: {answer:?}");
        }
    }
    took.sort_unstable();
    (took[took.len() * 99 / 100], took.len())
}

#[expect(clippy::print_stdout, reason = "figures are for people")]
fn report(figures: &str) {
    println!("{figures}");
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behind {
    Postgres,
    Redis,
}

#[test]
fn a_black_hole() {
    let cannot = |why: &str| left_out(&format!("a black hole needs root and iproute2: {why}"));
    let namespace = match Namespace::new() {
        Ok(namespace) => namespace,
        Err(why) => return cannot(&why),
    };
    let links: Result<Vec<Link<'_>>, String> = (0..3).map(|number| Link::new(&namespace, number)).collect();
    let [visitors, to_postgres, to_redis] = match links.as_deref() {
        Ok([visitors, to_postgres, to_redis]) => [visitors, to_postgres, to_redis],
        Ok(_) => unreachable!("three were made"),
        Err(why) => return cannot(why),
    };
    ip(&format!("-n {} link set lo up", namespace.0)).unwrap();
    let (postgres, redis) = (Postgres::own(), Redis::start());
    let postgres_there = Proxy::start_at(to_postgres.here, ([127, 0, 0, 1], postgres.port()).into());
    let redis_there = Proxy::start_at(to_redis.here, redis.address());
    let config = format!("{CONFIG}[redis]\nurl = \"redis://{}\"\n", redis_there.address());
    let deployment = Deployment::on(&postgres, Way::Elsewhere(postgres_there.address()), &config);
    // The owner's way to Postgres does not lead there.
    deployment.restrict("migrate = \"check\"\n");
    let listen = format!("{}:{}", visitors.there, port());
    let (command, data) = deployment.serve_at(Path::new(WAYPOST), "inside", &listen);
    let server = Server::spawn(namespace.inside(&command), &data);
    let warm: Vec<String> = (0..20).map(|_| server.warm(TARGET)).collect();
    for (behind, link) in [(Behind::Postgres, to_postgres), (Behind::Redis, to_redis)] {
        check(behind, link, &server, &warm);
    }
    server.stop();
}

fn check(behind: Behind, link: &Link<'_>, server: &Server, warm: &[String]) {
    let breaker = if behind == Behind::Postgres { "\"store\"" } else { "\"redis\"" };
    let is_open = || server.metric("waypost_breaker_state", &[breaker]) != 0.0;
    let says = |name: &str| server.get("/readyz").json()["degraded"].as_array().unwrap().contains(&json!(name));
    let name = if behind == Behind::Postgres { "store" } else { "redis" };
    assert!(!is_open());
    let before = link.connections();
    assert!(!before.is_empty(), "it has connections");
    if behind == Behind::Postgres {
        // Of Redis it is asked by commands of our own whether anybody is there.
        assert!(before.iter().all(|(_, timer)| timer.starts_with("timer:(")), "{before:?}");
    }
    let (usual, _) = hits(server, warm, SPAN);

    link.begin_black_hole();
    let begun = time::monotonic();
    let over = AtomicBool::new(false);
    let longest = Mutex::new(Duration::ZERO);
    let (noticed, during, count) = std::thread::scope(|scope| {
        // Somebody asks for what is not there: the others wait for nothing.
        scope.spawn(|| {
            let mut client = server.connect();
            let mut number = 0;
            while !over.load(Ordering::Relaxed) {
                number += 1;
                let asked = time::monotonic();
                let answer = client.get(&format!("/unknown-{behind:?}-{number}"));
                let right = if behind == Behind::Postgres { 503 } else { 404 };
                assert!(matches!(answer.status, 503) || answer.status == right, "{answer:?}");
                let mut longest = longest.lock().unwrap();
                *longest = longest.max(time::monotonic().duration_since(asked));
                drop(longest);
                throughout(Duration::from_millis(20), || {});
            }
        });
        let _over = Over(&over);
        let hitting = scope.spawn(|| hits(server, warm, 2 * SPAN));
        eventually(2 * NOTICED, "it is noticed", || is_open() && says(name));
        let noticed = time::monotonic().duration_since(begun);
        let (during, count) = hitting.join().unwrap();
        (noticed, during, count)
    });
    let store = server.get("/readyz?require=store").status;
    assert_eq!(store, if behind == Behind::Postgres { 503 } else { 200 });
    let old = |connections: &[(String, String)]| {
        connections.iter().filter(|(port, _)| before.iter().any(|(known, _)| known == port)).count()
    };
    eventually(GIVEN_UP, "connections are given up", || old(&link.connections()) == 0);
    let given_up = time::monotonic().duration_since(begun);
    if behind == Behind::Postgres {
        assert_eq!(server.shorten(&json!({"original_url": TARGET})).status, 503);
    }

    link.end_black_hole().unwrap();
    let healed = time::monotonic();
    eventually(2 * BACK, "it creates", || server.shorten(&json!({"original_url": TARGET})).status == 201);
    eventually(2 * BACK, "what is unknown is unknown", || server.get("/unknown").status == 404);
    eventually(2 * BACK, "nothing is degraded", || server.get("/readyz").json()["degraded"] == json!([]));
    let back = time::monotonic().duration_since(healed);
    report(&format!(
        "{behind:?} behind a black hole: noticed after {noticed:?}, its {} connections given up after {given_up:?}, all \
         works {back:?} after its end; p99 of hits {usual:?} before, {during:?} of {count} during: {:.2} times; what is \
         unknown took at most {:?}",
        before.len(),
        during.as_secs_f64() / usual.as_secs_f64(),
        longest.lock().unwrap()
    ));
    assert!(noticed <= NOTICED && back <= BACK, "noticed {noticed:?}, back {back:?}");
    assert!(during <= UNAFFECTED.max(10 * usual), "hits take {during:?}, before it {usual:?}");
    let pending = || server.metric("waypost_visits_pending", &[]) == 0.0;
    eventually(LIMIT, "visits are stored", pending);
}
