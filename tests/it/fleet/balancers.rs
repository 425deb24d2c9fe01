//! HAProxy and nginx, by the files that people deploy, in front of three instances: what happens to an instance, and what a
//! visitor makes up, is nobody else's trouble.
//!
//! In: `deploy/haproxy/`, `deploy/nginx/`; for figures, `WAYPOST_ROUNDS`, how often the three are restarted and one is
//! killed (once), and `WAYPOST_RATE`, requests a second. Out: requests that failed, and when they were sent; what the judge says.
//! Never: an instance that is told of its balancer's view, or the other way round, but by what they say over HTTP.
//! At the limit: what is in flight in the last [`CALM`] of a load counts neither as answered nor as failed.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use waypost::domain::target::Target;
use waypost::domain::time;
use waypost::store::row::{Change, Patch};

use super::Fleet;
use crate::campaign::{Ledger, Received, Request};
use crate::servers::deployment::{Deployment, Way};
use crate::servers::haproxy::{Haproxy, NAMES, SETS};
use crate::servers::nginx::Nginx;
use crate::servers::postgres::Postgres;
use crate::servers::proxy::{Mode, Proxy};
use crate::servers::{port, shipped};
use crate::support::{Answer, Client, Direct, LIMIT, Server, Setup, eventually, key, metric, request, throughout};

/// The longest that a load lasts: it is stopped when the test has seen enough.
const LOAD_SECONDS: u32 = 600;
/// How long the load goes on after the last fault.
const CALM: Duration = Duration::from_secs(1);
/// Before and after a reload of nginx: its old workers end a little later than the new ones serve.
const CLOSING_NS: i64 = 300_000_000;
const NO_ANSWER: &str = "no answer";
/// In the networks that a balancer believes and lets use the API, as [`Haproxy::start`] has it; and not.
const INSIDE: &str = "127.0.0.9";
const OUTSIDE: &str = "127.200.0.1";
/// A balancer that is believed; who comes by way of it is a visitor.
const EDGE: &str = "127.0.0.200";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Haproxy,
    Nginx,
}

impl Kind {
    /// The file of `deploy/` for the instances behind it.
    fn instance_file(self) -> &'static str {
        match self {
            Self::Haproxy => "haproxy/waypost.toml",
            Self::Nginx => "nginx/waypost.toml",
        }
    }

    /// The section that tells how an instance behind it stops, as that file has it.
    fn shutdown(self) -> String {
        let file = shipped(self.instance_file(), &[]);
        file[file.find("[shutdown]").expect("the file says how an instance stops")..].to_owned()
    }
}

enum Balancer {
    Haproxy(Haproxy),
    Nginx(Nginx),
}

impl Balancer {
    fn start(kind: Kind, servers: [SocketAddr; 3], changes: &[(&str, &str)]) -> Self {
        match kind {
            Kind::Haproxy => Self::Haproxy(Haproxy::changed(servers, changes)),
            Kind::Nginx => Self::Nginx(Nginx::changed(servers, changes)),
        }
    }

    fn before(kind: Kind, fleet: &Fleet) -> Self {
        Self::start(kind, [0, 1, 2].map(|number| local(fleet.port(number))), &[])
    }

    fn address(&self) -> SocketAddr {
        match self {
            Self::Haproxy(haproxy) => haproxy.address(),
            Self::Nginx(nginx) => nginx.address(),
        }
    }

    fn log(&self) -> String {
        match self {
            Self::Haproxy(haproxy) => haproxy.log(),
            Self::Nginx(nginx) => nginx.log(),
        }
    }

    /// As a person does, by `deploy/README.md`; when it returns the instance is asked for nothing.
    fn take_out(&self, number: usize) {
        match self {
            Self::Haproxy(haproxy) => {
                haproxy.set_state(NAMES[number], "drain");
                let name = NAMES[number];
                let servers = [name, &format!("{name}_without_store")];
                let is_idle = || servers.iter().all(|server| haproxy.stat(SETS[0], server, "scur") == "0");
                eventually(LIMIT, "what was in flight is answered", is_idle);
            }
            Self::Nginx(nginx) => nginx.take_out(number),
        }
    }

    fn reload(&self) {
        match self {
            Self::Haproxy(haproxy) => haproxy.reload(&[]),
            Self::Nginx(nginx) => nginx.reload(&[]),
        }
    }

    fn put_back(&self, number: usize) {
        match self {
            Self::Haproxy(haproxy) => haproxy.set_state(NAMES[number], "ready"),
            Self::Nginx(_) => self.reload(),
        }
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // To where the failed test's own message goes.
            #[expect(clippy::print_stdout, reason = "a failed test tells what the balancer said")]
            {
                println!("the balancer's log:\n{}", self.log());
            }
        }
    }
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn number(name: &str, default: u32) -> u32 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

fn rounds() -> usize {
    number("WAYPOST_ROUNDS", 1) as usize
}

/// Requests a second.
fn rate() -> u32 {
    number("WAYPOST_RATE", if cfg!(debug_assertions) { 300 } else { 2000 })
}

/// The instance gets requests, which it did not have when it was started.
fn is_asked_again(server: &Server) -> bool {
    redirects(server) > 0.0
}

fn redirects(server: &Server) -> f64 {
    metric(&server.get("/metrics").text(), "waypost_redirects_total", &[])
}

/// A request that was not answered as it should be.
#[derive(Debug)]
struct Failed {
    /// In nanoseconds since 1970.
    sent_ns: i64,
    answered_ns: Option<i64>,
    why: String,
}

/// What the ledger of a load that was stopped says.
#[derive(Debug)]
struct Seen {
    requests: usize,
    failed: Vec<Failed>,
}

impl Seen {
    fn of(ledger: &Path) -> Self {
        let Ledger { requests, ended, .. } = Ledger::read(ledger);
        let calm = ended - i64::try_from(CALM.as_nanos()).unwrap();
        let is_under_way = |request: &Request| request.answer.is_none() && request.sent > calm;
        let failed = requests.values().filter(|request| !request.went_well() && !is_under_way(request));
        let failed = failed.map(|Request { sent, class, answer, .. }| match answer {
            Some(Received { at, status, .. }) => {
                Failed { sent_ns: *sent, answered_ns: Some(*at), why: format!("{class}: {status}") }
            }
            None => Failed { sent_ns: *sent, answered_ns: None, why: format!("{class}: {NO_ANSWER}") },
        });
        let mut failed: Vec<Failed> = failed.collect();
        failed.sort_by_key(|failed| failed.sent_ns);
        Self { failed, requests: requests.len() }
    }

    #[track_caller]
    fn is_shown(&self, what: &str) {
        #[expect(clippy::print_stdout, reason = "the figure is what the test is about")]
        {
            println!("{what}: {} of {} requests failed", self.failed.len(), self.requests);
        }
        assert!(self.requests > 200, "{what}: a load that asks nothing sees nothing");
    }

    #[track_caller]
    fn none_failed(&self, what: &str, balancer: &Balancer) {
        self.is_shown(what);
        assert!(self.failed.is_empty(), "{what}: {:#?}\n{}", self.failed, balancer.log());
    }

    /// Nothing failed that was sent at another time.
    #[track_caller]
    fn failed_between(&self, what: &str, begin_ns: i64, end_ns: i64) {
        let wrong: Vec<_> =
            self.failed.iter().filter(|failed| !(begin_ns..=end_ns).contains(&failed.sent_ns)).collect();
        assert!(wrong.is_empty(), "{what}: sent not between {begin_ns} and {end_ns}: {wrong:#?}");
    }
}

fn now_ns() -> i64 {
    // To the next millisecond.
    (time::now().0 + 1) * 1_000_000
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hand {
    /// `systemctl restart`: the instance says at /readyz that it ends, or closes its listener.
    Instance,
    /// A person takes it out of the balancer first.
    Person,
}

/// The bar: no request fails, each visit is stored once.
fn rolling_restart(kind: Kind, hand: Hand) {
    let mut fleet = Fleet::start(3, &kind.shutdown());
    let balancer = Balancer::before(kind, &fleet);
    let load = fleet.load(balancer.address().port(), rate(), LOAD_SECONDS);
    let mut reloads = Vec::new();
    let mut reloaded = |work: &dyn Fn()| {
        let begun_ns = now_ns();
        work();
        reloads.push((begun_ns, now_ns()));
    };
    if hand == Hand::Person {
        reloaded(&|| balancer.reload());
    }
    for number in (0..3).cycle().take(3 * rounds()) {
        if hand == Hand::Person {
            reloaded(&|| balancer.take_out(number));
        }
        fleet.stop(number);
        fleet.begin(number);
        if hand == Hand::Person {
            reloaded(&|| balancer.put_back(number));
        }
        eventually(LIMIT, "it gets requests again", || is_asked_again(fleet.server(number)));
    }
    throughout(2 * CALM, || {});
    let ledger = load.stop();
    let (mut seen, what) = (Seen::of(&ledger), format!("rolling restart behind {kind:?}, by {hand:?}"));
    if (kind, hand) == (Kind::Nginx, Hand::Person) {
        // A reload of nginx closes what it takes for idle, also under a request that is on its way: until 1.27.4 nothing
        // keeps it from that. A browser asks again; a load does not.
        seen.is_shown(&what);
        let is_excused = |failed: &Failed| {
            let near = |(begun_ns, ended_ns): &(i64, i64)| {
                (begun_ns - CLOSING_NS..=ended_ns + CLOSING_NS).contains(&failed.sent_ns)
            };
            failed.why.ends_with(NO_ANSWER) && reloads.iter().any(near)
        };
        seen.failed.retain(|failed| !is_excused(failed));
    }
    seen.none_failed(&what, &balancer);
    fleet.judge(&ledger).right();
}

#[test]
fn a_rolling_restart_behind_haproxy() {
    rolling_restart(Kind::Haproxy, Hand::Instance);
}

#[test]
fn a_rolling_restart_behind_haproxy_by_hand() {
    rolling_restart(Kind::Haproxy, Hand::Person);
}

#[test]
fn a_rolling_restart_behind_nginx() {
    rolling_restart(Kind::Nginx, Hand::Instance);
}

#[test]
fn a_rolling_restart_behind_nginx_by_hand() {
    rolling_restart(Kind::Nginx, Hand::Person);
}

/// The bar: at most the requests in flight on it fail. So none that was sent when it was gone.
fn killed(kind: Kind) {
    let mut fleet = Fleet::start(3, &kind.shutdown());
    let balancer = Balancer::before(kind, &fleet);
    let load = fleet.load(balancer.address().port(), rate(), LOAD_SECONDS);
    let mut kills = Vec::new();
    for number in (0..3).cycle().take(rounds()) {
        let asked = redirects(fleet.server(number));
        eventually(LIMIT, "it is under load", || redirects(fleet.server(number)) > asked + 20.0);
        let begun_ns = now_ns();
        fleet.kill(number);
        kills.push((begun_ns, now_ns()));
        // The others alone for as long as checks and time-outs take.
        throughout(Duration::from_secs(3), || {});
        fleet.begin(number);
        eventually(LIMIT, "it gets requests again", || is_asked_again(fleet.server(number)));
    }
    throughout(2 * CALM, || {});
    let ledger = load.stop();
    let seen = Seen::of(&ledger);
    seen.is_shown(&format!("{} kills behind {kind:?}", kills.len()));
    for failed in &seen.failed {
        // What has no answer at all was sent shortly before: it takes less than a second to fail, if its instance ends.
        let in_flight = |(begun_ns, ended_ns): &(i64, i64)| {
            let until_ns = failed.answered_ns.unwrap_or(failed.sent_ns + 1_000_000_000);
            failed.sent_ns <= *ended_ns && until_ns >= *begun_ns
        };
        assert!(kills.iter().any(in_flight), "not in flight when an instance ended: {failed:#?} {kills:?}");
    }
    fleet.judge(&ledger).right();
}

#[test]
fn an_instance_killed_behind_haproxy() {
    killed(Kind::Haproxy);
}

#[test]
fn an_instance_killed_behind_nginx() {
    killed(Kind::Nginx);
}

fn edit(target: &str) -> Change {
    let target = Some((target.to_owned(), Target::new(target).unwrap()));
    Change::Edit(Box::new(Patch { target, ..Patch::default() }))
}

/// An instance that hangs fails what it was given, which is little, and nothing when it is out; what changed meanwhile is
/// known to it when it goes on.
fn frozen(kind: Kind) {
    let fleet = Fleet::start(3, &kind.shutdown());
    let balancer = Balancer::before(kind, &fleet);
    let (store, edited) = (fleet.deployment.store(), "/edited");
    store.add("edited", "https://example.com/old", |_| {});
    fleet.servers().iter().for_each(|server| assert_eq!(server.get(edited).status, 307));
    let load = fleet.load(balancer.address().port(), rate(), LOAD_SECONDS);
    let begun_ns = now_ns() - 1_000_000_000;
    let before = load.sent();
    fleet.server(0).signal(Signal::STOP);
    if let Balancer::Haproxy(haproxy) = &balancer {
        eventually(LIMIT, "its checks fail", || SETS.iter().all(|set| !haproxy.is_up(set, NAMES[0])));
    }
    let (out_ns, until_out) = (now_ns(), load.sent() - before);
    store.change("edited", edit("https://example.com/new"));
    throughout(Duration::from_secs(4), || {});
    fleet.server(0).signal(Signal::CONT);
    let (thawed_ns, meanwhile) = (now_ns(), load.sent() - before);
    let is_new = |client: &mut Client| client.get(edited).location().is_some_and(|location| location.ends_with("new"));
    // What was asked of the store before it hung counts as not answered in time: 503 for once.
    eventually(Duration::from_secs(1), "the thawed instance knows of the edit", || {
        is_new(&mut fleet.server(0).connect())
    });
    if let Balancer::Haproxy(haproxy) = &balancer {
        eventually(LIMIT, "its checks pass", || SETS.iter().all(|set| haproxy.is_up(set, NAMES[0])));
    }
    for _ in 0..30 {
        assert!(is_new(&mut Client::connect(balancer.address())));
    }
    throughout(2 * CALM, || {});
    let ledger = load.stop();
    let seen = Seen::of(&ledger);
    seen.is_shown(&format!("an instance frozen behind {kind:?}, of which {meanwhile} while it was"));
    // nginx tries it again and again.
    seen.failed_between("frozen", begun_ns, if kind == Kind::Haproxy { out_ns } else { thawed_ns });
    // Its share would be a third.
    let meanwhile = if kind == Kind::Haproxy { until_out } else { meanwhile };
    assert!(seen.failed.len() as u64 * 6 < meanwhile, "{meanwhile} requests meanwhile: {seen:#?}");
    fleet.judge(&ledger).right();
}

#[test]
fn an_instance_frozen_behind_haproxy() {
    frozen(Kind::Haproxy);
}

#[test]
fn an_instance_frozen_behind_nginx() {
    frozen(Kind::Nginx);
}

/// The server sets of HAProxy that send requests to some instance.
fn used(balancer: &Balancer, number: usize) -> [bool; 2] {
    match balancer {
        Balancer::Haproxy(haproxy) => SETS.map(|set| haproxy.is_up(set, NAMES[number])),
        Balancer::Nginx(_) => [false, true],
    }
}

#[track_caller]
fn expect_sets(balancer: &Balancer, numbers: &[usize], want: [bool; 2]) {
    if matches!(balancer, Balancer::Haproxy(_)) {
        let all = || numbers.iter().all(|number| used(balancer, *number) == want);
        eventually(LIMIT, &format!("instances {numbers:?} with and without the store: {want:?}"), all);
    }
}

/// All lose their database: all stay, with what they remember; the balancer makes up no answer.
fn all_lose_the_store(kind: Kind) {
    let mut postgres = Postgres::own();
    let fleet = Fleet::on(&postgres, Way::Straight, 3, &kind.shutdown());
    let balancer = Balancer::before(kind, &fleet);
    fleet.server(0).custom("warm", "https://example.com/");
    fleet.servers().iter().for_each(|server| assert_eq!(server.get("/warm").status, 307));
    expect_sets(&balancer, &[0, 1, 2], [true, true]);
    let get = |path: &str| Client::connect(balancer.address()).get(path);
    // Unknown codes, which are what takes an instance out of nginx's rotation, and warm ones.
    let asks = || {
        let unknown = get("/unknown");
        assert!(matches!(unknown.status, 404 | 503), "{unknown:?}");
        assert!(unknown.status == 404 || unknown.header("retry-after").is_some(), "not waypost's: {unknown:?}");
        (0..5).for_each(|_| assert_eq!(get("/warm").status, 307));
        unknown.status
    };
    assert_eq!(asks(), 404);
    postgres.stop();
    eventually(LIMIT, "unknown codes cannot be looked up", || asks() == 503);
    let begun = time::monotonic();
    while time::monotonic().duration_since(begun) < Duration::from_secs(4) {
        asks();
    }
    expect_sets(&balancer, &[0, 1, 2], [false, true]);
    asks();
    postgres.start();
    eventually(2 * LIMIT, "unknown codes can be looked up", || asks() == 404);
    expect_sets(&balancer, &[0, 1, 2], [true, true]);
}

#[test]
fn all_lose_the_store_behind_haproxy() {
    all_lose_the_store(Kind::Haproxy);
}

#[test]
fn all_lose_the_store_behind_nginx() {
    all_lose_the_store(Kind::Nginx);
}

/// One alone loses its way to the database: no visitor notices; it leaves the rotation, and comes back.
fn one_loses_the_store(kind: Kind) {
    let deployment = Deployment::new(Way::Straight, &format!("[breaker]\nrecovery = \"1s\"\n{}", kind.shutdown()));
    let way = Proxy::start(local(Postgres::shared().port()));
    let [one, two, three] = [(); 3].map(|()| port());
    let others = [("two", two), ("three", three)].map(|(name, port)| deployment.instance_at(name, port));
    let (file, url) = (deployment.path("waypost.toml"), deployment.database.url());
    let config = std::fs::read_to_string(&file).unwrap();
    let own = format!("url = \"{}\"", deployment.database.url_at(way.address().port()));
    let changed = config.replace(&format!("\nurl = \"{url}\""), &format!("\n{own}"));
    assert_ne!(changed, config);
    std::fs::write(&file, changed).unwrap();
    let alone = deployment.instance_at("one", one);
    let balancer = Balancer::start(kind, [one, two, three].map(local), &[]);
    expect_sets(&balancer, &[0, 1, 2], [true, true]);
    let store = deployment.store();
    // Links that nobody remembers.
    let mut number = 0;
    let mut cold = || {
        number += 1;
        store.add(&format!("cold{number}"), "https://example.com/", |_| {});
        let answer = Client::connect(balancer.address()).get(&format!("/cold{number}"));
        assert_eq!(answer.status, 307, "{answer:?}\n{}", balancer.log());
    };
    (0..10).for_each(|_| cold());
    way.mode(Mode::Refuse);
    way.cut();
    let ready = || alone.get("/readyz?require=store").status;
    let begun = time::monotonic();
    while ready() != 503 || time::monotonic().duration_since(begun) < Duration::from_secs(3) {
        cold();
        assert!(time::monotonic().duration_since(begun) < LIMIT, "it does not notice");
    }
    expect_sets(&balancer, &[0], [false, true]);
    expect_sets(&balancer, &[1, 2], [true, true]);
    (0..10).for_each(|_| cold());
    way.mode(Mode::Pass);
    eventually(2 * LIMIT, "it has its store again", || ready() == 200);
    let before = redirects(&alone);
    expect_sets(&balancer, &[0], [true, true]);
    eventually(LIMIT, "it gets requests again", || {
        cold();
        redirects(&alone) > before
    });
    others.iter().for_each(|server| assert_eq!(server.get("/readyz?require=store").status, 200));
}

#[test]
fn one_loses_the_store_behind_haproxy() {
    one_loses_the_store(Kind::Haproxy);
}

#[test]
fn one_loses_the_store_behind_nginx() {
    one_loses_the_store(Kind::Nginx);
}

/// How the visitor's address reaches an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Header,
    ProxyProtocol,
}

/// An instance that is all three, of the file that is shipped for it, and the balancer in front of it.
struct One {
    setup: Setup,
    server: Server,
    balancer: Balancer,
}

const HOST: &str = "go.example";

impl One {
    fn start(kind: Kind, by: By, changes: &[(&str, &str)]) -> Self {
        let address = local(port());
        let listen = format!("address = \"{address}\"");
        let mut own =
            vec![("address = \"10.0.0.11:8080\"", &*listen), ("[\"10.0.0.10\"]", "[\"127.0.0.1\", \"127.0.0.9\"]")];
        let mut changes = changes.to_vec();
        if by == By::ProxyProtocol {
            own.push(("#proxy_protocol = true", "proxy_protocol = true"));
            changes.push(("#default-server send-proxy-v2", "default-server send-proxy-v2"));
        }
        let more =
            format!("[[domains]]\nhost = \"{HOST}\"\n[api]\nlisten = \"127.0.0.1:0\"\n[privacy]\naddress = \"full\"\n");
        let setup = Setup::new(&format!("{}\n{more}", shipped(kind.instance_file(), &own)));
        let store = setup.store();
        let server = setup.start();
        let domain = store.domain(HOST);
        store.add_all(vec![(key(domain, "code"), Direct::fields("https://example.com/"))]);
        let balancer = Balancer::start(kind, [address; 3], &changes);
        Self { setup, server, balancer }
    }

    fn metrics(&self) -> String {
        Client::connect(self.server.listener("(API)")).get("/metrics").text()
    }

    /// A visit from `source` with these headers beside the host's.
    fn visit(&self, source: &str, headers: &[(&str, &str)]) -> Answer {
        let headers = [&[("Host", HOST)], headers].concat();
        Client::connect_from(source, self.balancer.address()).ask("GET", "/code", &headers, b"")
    }

    /// All visits, when there are `count`.
    fn stored(&self, count: usize) -> Vec<Value> {
        let stored = || metric(&self.metrics(), "waypost_visits_stored_total", &[]);
        eventually(LIMIT, &format!("{count} visits are stored"), || stored() >= count as f64);
        let exported = self.setup.run(&["export", "--visits", "--format", "ndjson"]);
        assert!(exported.status.success(), "{exported:?}");
        let text = String::from_utf8(exported.stdout).unwrap();
        let all: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(all.len(), count, "{all:#?}");
        all
    }
}

/// Who visits, and under which id, is what the balancer says, never what the visitor does.
fn addresses(kind: Kind, by: By) {
    // What tells the id that the balancer gave.
    let shows: &[_] = match kind {
        Kind::Haproxy => &[("    option dontlog-normal\n", "")],
        Kind::Nginx => &[("access_log off;", "access_log off; add_header X-Given $waypost_request_id;")],
    };
    let one = One::start(kind, by, shows);
    let forged = [
        ("X-Forwarded-For", "198.51.100.6"),
        ("Forwarded", "for=198.51.100.6"),
        ("X-Request-Id", "forged"),
        ("X-Real-IP", "198.51.100.6"),
    ];
    let mut given = Vec::new();
    for headers in [&[][..], &forged, &forged[..1], &forged[1..2]] {
        let answer = one.visit(OUTSIDE, headers);
        assert_eq!(answer.status, 307, "{kind:?} {by:?} {headers:?}: {answer:?}");
        given.extend(answer.header("x-given").map(str::to_owned));
    }
    // A PROXY header of a visitor's own.
    let mut client = Client::connect_from(OUTSIDE, one.balancer.address());
    client.send("PROXY TCP4 198.51.100.6 127.0.0.1 1 80\r\n");
    client.send(request("GET", "/code", &[("Host", HOST)], b""));
    assert_eq!(client.answer().status, 400, "{kind:?} {by:?}");
    // What stands before the balancer is believed, also if it names nobody.
    let headers = [("X-Forwarded-For", "203.0.113.7"), ("X-Request-Id", "its-own")];
    for headers in [&headers[..], &[]] {
        assert_eq!(one.visit(INSIDE, headers).status, 307, "{kind:?} {by:?} {headers:?}");
    }

    let all = one.stored(6);
    let of = |address: &str| -> Vec<String> {
        let visits = all.iter().filter(|visit| visit["address"] == address);
        visits.map(|visit| visit["request_id"].as_str().unwrap_or_default().to_owned()).collect()
    };
    assert_eq!(of("203.0.113.7"), ["its-own"], "{kind:?} {by:?}: {all:#?}");
    assert_eq!(of(INSIDE).len(), 1, "{kind:?} {by:?}: {all:#?}");
    let mut ids = of(OUTSIDE);
    assert_eq!(ids.len(), 4, "{kind:?} {by:?}: {all:#?}");
    match kind {
        Kind::Haproxy => ids.iter().for_each(|id| {
            assert_eq!(id.len(), 36, "no UUID: {kind:?} {by:?} {id:?}");
            eventually(LIMIT, "the balancer's log has the visit's id", || one.balancer.log().contains(id));
        }),
        Kind::Nginx => {
            given.sort();
            let mut stored = ids.clone();
            stored.sort();
            assert_eq!(stored, given, "{kind:?} {by:?}: {all:#?}");
        }
    }
    ids.sort();
    ids.dedup();
    assert!(ids.len() == 4 && !ids.contains(&"forged".to_owned()), "{kind:?} {by:?}: {all:#?}");
}

#[test]
fn addresses_and_ids_behind_haproxy() {
    addresses(Kind::Haproxy, By::Header);
    addresses(Kind::Haproxy, By::ProxyProtocol);
}

#[test]
fn addresses_and_ids_behind_nginx() {
    addresses(Kind::Nginx, By::Header);
}

#[test]
fn what_the_world_does_not_see() {
    for kind in [Kind::Haproxy, Kind::Nginx] {
        let fleet = Fleet::start(1, "");
        let balancer = Balancer::start(kind, [local(fleet.port(0)); 3], &[]);
        let status = |source: &str, path: &str| {
            let answer = Client::connect_from(source, balancer.address()).get(path);
            (answer.status, answer.header("x-request-id").is_some())
        };
        for path in ["/metrics", "/readyz", "/readyz?require=store", "/livez", "/metrics?x"] {
            for source in [INSIDE, OUTSIDE] {
                assert_eq!(status(source, path), (404, false), "{kind:?} {path} from {source}");
            }
        }
        assert_eq!(status(OUTSIDE, "/healthz"), (200, true), "{kind:?}");
        for path in ["/api/v1/accounting", "/api/v1/status", "/shorten", "/stats/x", "/x/stats", "/docs", "/docs/x"] {
            for source in [OUTSIDE, EDGE] {
                assert_eq!(status(source, path), (404, false), "{kind:?} {path} from {source}");
            }
            assert!(status(INSIDE, path).1, "{kind:?} {path}: waypost is not asked");
        }
        // Codes that begin like them.
        for path in ["/metricsx", "/shortenx", "/docsx", "/apix", "/statsx"] {
            fleet.deployment.store().add(&path[1..], "https://example.com/", |_| {});
            assert_eq!(status(OUTSIDE, path), (307, false), "{kind:?} {path}");
            fleet.deployment.store().change(&path[1..], Change::Delete);
        }
    }
}

/// A visitor who is slow costs an instance nothing, also one that restarts meanwhile.
fn slow_visitor(kind: Kind) {
    let mut fleet = Fleet::start(3, "");
    let balancer = Balancer::before(kind, &fleet);
    fleet.server(0).custom("code", "https://example.com/");
    let bytes = request("GET", "/code", &[], b"");
    let (mut slow, mut slower) = (Client::connect(balancer.address()), Client::connect(balancer.address()));
    for piece in bytes.chunks(bytes.len() / 10) {
        slow.send(piece);
        throughout(Duration::from_millis(50), || {});
    }
    assert_eq!(slow.answer().status, 307);
    slower.send(&bytes[..10]);
    for number in 0..3 {
        fleet.stop(number);
        fleet.begin(number);
        eventually(LIMIT, "it is asked again", || {
            Client::connect(balancer.address()).get("/code");
            is_asked_again(fleet.server(number))
        });
    }
    let open = |server: &Server| server.metric("waypost_connections", &[]);
    // Its own question is one of them.
    eventually(LIMIT, "no instance waits for it", || fleet.servers().iter().all(|server| open(server) <= 2.0));
    slower.send(&bytes[10..]);
    let answer = slower.answer();
    assert!(matches!(answer.status, 307 | 408), "{answer:?}");
}

#[test]
fn a_slow_visitor_behind_haproxy() {
    slow_visitor(Kind::Haproxy);
}

#[test]
fn a_slow_visitor_behind_nginx() {
    slow_visitor(Kind::Nginx);
}

/// An answer that is lost on its way was a visit: it is not asked for again, be its connection new or an old one.
fn lost_answer(kind: Kind) {
    let (setup, server) = Server::new("[proxies]\ntrusted = [\"127.0.0.0/8\"]");
    server.custom("code", "https://example.com/");
    let ways = [(); 3].map(|()| Proxy::start(server.address()));
    let balancer = Balancer::start(kind, [0, 1, 2].map(|way: usize| ways[way].address()), &[]);
    let get = |id: &str| {
        let mut client = Client::connect(balancer.address());
        client.ask("GET", "/code", &[("X-Request-Id", id)], b"").status
    };
    let cuts = || ways.iter().map(Proxy::cuts).sum::<u64>();
    for (number, id) in ["over a new connection", "over one that was used"].iter().enumerate() {
        // Not an answer to a check, whose request id may have the same digits.
        ways.iter().for_each(|way| way.mode(Mode::CutAt(b"HTTP/1.1 307".to_vec())));
        let id = id.replace(' ', "-");
        assert_eq!(get(&id), 502, "{kind:?} {id}");
        assert_eq!(cuts(), number as u64 + 1, "{kind:?} {id}: it was asked for again");
        ways.iter().for_each(|way| way.mode(Mode::Pass));
        // So that there is a connection that waits, to each.
        (0..9).for_each(|_| assert_eq!(get("healthy"), 307, "{kind:?} after {id}"));
    }
    eventually(LIMIT, "all visits are stored", || server.metric("waypost_visits_stored_total", &[]) >= 20.0);
    let exported = String::from_utf8(setup.run(&["export", "--visits", "--format", "ndjson"]).stdout).unwrap();
    for id in ["over-a-new-connection", "over-one-that-was-used"] {
        assert_eq!(exported.matches(id).count(), 1, "{kind:?} {id}: {exported}");
    }
    assert_eq!(exported.lines().count(), 20, "{kind:?}: {exported}");
}

#[test]
fn a_lost_answer_behind_haproxy() {
    lost_answer(Kind::Haproxy);
}

#[test]
fn a_lost_answer_behind_nginx() {
    lost_answer(Kind::Nginx);
}

/// An instance that stops serves for longer than HAProxy takes to see it.
#[test]
fn the_drain_is_longer_than_the_checks_take() {
    let millis = |text: &str| match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(number), _) => number.parse::<u64>().unwrap(),
        (None, Some(number)) => number.parse::<u64>().unwrap() * 1000,
        (None, None) => panic!("no time: {text}"),
    };
    let file = shipped("haproxy/haproxy.cfg", &[]);
    let checks = file.lines().find_map(|line| line.trim().strip_prefix("default-server check ")).unwrap();
    let words: Vec<&str> = checks.split(' ').collect();
    let value = |name: &str| words[words.iter().position(|word| *word == name).unwrap() + 1];
    let fall: u64 = value("fall").parse().unwrap();
    let seen_ms = millis(value("inter")) + (fall - 1) * millis(value("fastinter"));
    let shutdown: toml::Table = toml::from_str(&Kind::Haproxy.shutdown()).unwrap();
    let drain_ms = millis(shutdown["shutdown"]["drain"].as_str().unwrap());
    assert!(seen_ms < drain_ms, "{seen_ms} ms until it is seen, {drain_ms} ms of drain");
}
