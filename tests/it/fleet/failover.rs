//! Failover of Postgres to a standby that is promoted, under load: what the standby had is there, what it lacked is
//! made up for where that can be done, and known where it cannot.
//!
//! In: a primary with a standby, three instances, loads on two of them; a third that is idle. Out: they write again within
//! [`BACK`] of the promotion, each visit is stored once, and what an asynchronous standby lacked of links is gone: not
//! served, nor are its ids and codes anybody else's.
//! Never: restarts an instance, or tells it where the primary is.
//! At the limit: links that were acknowledged and are in no standby are lost; which these are, the old primary tells.
//!
//! A primary that was only silent wakes up as a primary. What an instance promises that has seen the new one: it takes no
//! link and no visit of it for stored, nor an answer to what was under way there, and makes no connection that it keeps. What
//! nobody but a fence can promise: that nothing is written there, as what had been sent before is carried out, and that
//! nobody writes there who has not seen the new one, such as a process that starts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;
use waypost::domain::time;

use super::Fleet;
use crate::campaign::{Judged, Load, OURS};
use crate::servers::deployment::Way;
use crate::servers::postgres::{Database, Postgres, ROLE};
use crate::servers::proxy::Proxy;
use crate::servers::redis::Redis;
use crate::support::{Answer, Client, Direct, LIMIT, Server, eventually, request, throughout};

/// From the promotion until every instance writes again, and has forgotten what was lost.
const BACK: Duration = Duration::from_secs(5);
const RATE: u32 = 100;
const TARGET: &str = "https://example.com/";
/// Redirects of the idle instance.
const OTHERS: usize = 20;
const OURS_HEADER: (&str, &str) = ("X-Request-Id", OURS);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standby {
    Synchronous,
    /// It gets nothing any more for a while before the primary dies.
    Lagging,
}

/// How instances find whichever is the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// Both are in the URL.
    Hosts,
    /// An address that moves.
    Address,
    /// PgBouncer alone, that is led elsewhere.
    Pooler,
}

/// What the old primary does after the promotion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Old {
    StaysAway,
    /// It is there again, and takes no writes.
    IsReadOnly,
    /// It was never away: it was made read-only, and the connections to it stay.
    StaysReadOnly,
}

struct Stand {
    // Instances end before what they depend on.
    fleet: Fleet,
    address: Option<Proxy>,
    standby: Postgres,
    primary: Postgres,
    redis: Redis,
    by: By,
}

impl Stand {
    fn new(standby: Standby, by: By, config: &str) -> Self {
        let (primary, redis) = (Postgres::own(), Redis::start());
        let follower = primary.standby();
        if standby == Standby::Synchronous {
            primary.waits_for_standby();
        }
        let address = (by == By::Address).then(|| Proxy::start(at(primary.port())));
        let way = match &address {
            Some(address) => Way::Through(address.address().port()),
            None if by == By::Hosts => Way::OfTwo(follower.port()),
            None => Way::PooledAlone,
        };
        let config = format!("[redis]\nurl = \"{}\"\n{config}", redis.url());
        let fleet = Fleet::on(&primary, way, 3, &config);
        Self { fleet, address, standby: follower, primary, redis, by }
    }

    /// With every time-out as it is shipped: see [`CONFIG`](super::CONFIG), and what deployments of tests have for Postgres.
    fn as_shipped(by: By) -> Self {
        let mut this = Self::new(Standby::Lagging, by, "");
        let deployment = &this.fleet.deployment;
        let path = deployment.path("store.toml");
        let store = std::fs::read_to_string(&path).unwrap();
        let (kept, own): (Vec<&str>, Vec<&str>) = store.lines().partition(|line| !line.contains("timeout"));
        assert_eq!(own.len(), 1, "{own:?}");
        std::fs::write(&path, kept.join("\n")).unwrap();
        deployment.reconfigure(&format!(
            "[proxies]\ntrusted = [\"127.0.0.0/8\"]\n[codes]\nstrategy = \"permuted\"\n[redis]\nurl = \"{}\"\n",
            this.redis.url()
        ));
        for number in 0..3 {
            this.fleet.stop(number);
            this.fleet.begin(number);
        }
        this
    }

    /// Has every instance make a link, however often it takes; their codes. No code is asked for twice: what was sent to a
    /// server that hung may be made there when it wakes up.
    fn all_write(&self, name: &str) -> Vec<String> {
        let made = |number: usize| {
            let mut tries = 0;
            let mut code = String::new();
            eventually(2 * BACK, "it writes again", || {
                tries += 1;
                code = format!("{name}-{number}-{tries}");
                create(self.fleet.server(number), &code).status == 201
            });
            code
        };
        (0..3).map(made).collect()
    }

    fn loads(&self, seconds: u32) -> [Load; 2] {
        [0, 1].map(|number| {
            let folder = self.fleet.deployment.path(&format!("load-{number}"));
            std::fs::create_dir(&folder).unwrap();
            let target = format!("http://127.0.0.1:{}", self.fleet.port(number));
            Load::begin(&folder, &target, &self.fleet.deployment.path("admin.key"), RATE, seconds)
        })
    }

    /// The primary goes, and the standby becomes it. When it had.
    fn fails_over(&mut self, old: Old) -> Instant {
        self.primary.will_be_read_only();
        match old {
            Old::StaysAway | Old::IsReadOnly => self.primary.kill(),
            Old::StaysReadOnly => self.primary.reload(),
        }
        self.standby.promote();
        let promoted = time::monotonic();
        if let Some(address) = &self.address {
            address.leads_to(at(self.standby.port()));
            if old == Old::StaysAway {
                address.cut();
            }
        }
        if self.by == By::Pooler {
            self.primary.pooler_leads_to(&self.standby);
        }
        if old == Old::IsReadOnly {
            self.primary.start();
        }
        self.fleet.deployment.database = self.fleet.deployment.database.of(&self.standby);
        promoted
    }

    fn sql(&self, sql: &str) -> u64 {
        self.fleet.deployment.database.sql(sql).parse().unwrap()
    }

    /// Links of the old primary that the new one never had: codes by ids. The old one is started for that if need be.
    fn lost(&mut self, old: Old) -> BTreeMap<u64, String> {
        if old == Old::StaysAway {
            self.primary.start();
        }
        self.lost_of(&self.primary)
    }

    /// Links of a cluster that the store lacks.
    fn lost_of(&self, former: &Postgres) -> BTreeMap<u64, String> {
        let store = &self.fleet.deployment.database;
        let now = links(store);
        links(&store.of(former)).into_iter().filter(|(id, code)| now.get(id) != Some(code)).collect()
    }
}

/// Codes by ids.
fn links(database: &Database) -> BTreeMap<u64, String> {
    let rows = database.sql("SELECT id, code FROM links");
    let pair = |row: &str| row.split_once('|').map(|(id, code)| (id.parse().unwrap(), code.to_owned()));
    rows.lines().filter_map(pair).collect()
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn create(server: &Server, code: &str) -> Answer {
    server.shorten(&json!({"original_url": format!("{TARGET}{code}"), "custom_code": code}))
}

fn visit(client: &mut Client, code: &str) -> Answer {
    client.ask("GET", &format!("/{code}"), &[OURS_HEADER], b"")
}

fn is_right(answer: &Answer, code: &str) -> bool {
    answer.status == 307 && answer.location() == Some(format!("{TARGET}{code}").as_str())
}

fn since(moment: Instant) -> Duration {
    time::monotonic().duration_since(moment)
}

#[expect(clippy::print_stdout, reason = "figures are for people")]
fn report(figures: &str) {
    println!("{figures}");
}

fn check(standby: Standby, by: By, old: Old, strategy: &str) {
    let mut stand = Stand::new(standby, by, &format!("[codes]\nstrategy = \"{strategy}\"\n"));
    let loads = stand.loads(14);
    let rows = "SELECT count(*) FROM visits";
    eventually(LIMIT, "visits are stored", || stand.sql(rows) > 100);
    assert_eq!(create(stand.fleet.server(0), "kept").status, 201);
    // From the store, before the idle one makes its first link: what it leases then is among what is lost.
    let mut idle = stand.fleet.server(2).connect();
    eventually(LIMIT, "it is there", || is_right(&visit(&mut stand.fleet.server(1).connect(), "kept"), "kept"));
    let mut ours = 1;
    if standby == Standby::Lagging {
        stand.standby.unfollow();
    }
    assert_eq!(create(stand.fleet.server(2), "last").status, 201);
    for number in 0..OTHERS {
        let code = ["kept", "last"][number % 2];
        let answer = visit(&mut idle, code);
        assert!(is_right(&answer, code), "{answer:?}");
        ours += 1;
    }
    // In memory of those that did not make it, too.
    for number in [0, 1] {
        assert!(is_right(&visit(&mut stand.fleet.server(number).connect(), "last"), "last"));
        ours += 1;
    }
    let stored_of_ours = format!("SELECT count(*) FROM visits WHERE request_id = '{OURS}'");
    eventually(LIMIT, "these are stored", || stand.sql(&stored_of_ours) == ours);
    let links = "SELECT count(*) FROM links";
    let before = (stand.sql(rows), stand.sql(links));
    eventually(LIMIT, "there is more", || stand.sql(rows) > before.0 + 100 && stand.sql(links) > before.1);
    let has: u64 = stand.fleet.deployment.database.of(&stand.standby).sql(rows).parse().unwrap();
    report(&format!("the primary has {} visits, the standby {has}", stand.sql(rows)));

    let promoted = stand.fails_over(old);
    for number in 0..3 {
        let code = format!("after-{number}");
        let server = stand.fleet.server(number);
        eventually(2 * BACK, "it writes again", || matches!(create(server, &code).status, 201 | 409));
    }
    let writes = since(promoted);
    // The idle one has nothing to store that would tell it.
    eventually(2 * BACK, "what was lost of visits is there again", || stand.sql(&stored_of_ours) == ours);
    // Which of the two this is, every instance knows soon, and never says anything else.
    for number in 0..3 {
        let mut client = stand.fleet.server(number).connect();
        let mut seen = |code: &str| {
            let answer = client.get(&format!("/{code}"));
            assert!(matches!(answer.status, 404 | 503) || is_right(&answer, code), "{code}: {answer:?}");
            answer.status
        };
        let there = if standby == Standby::Lagging { 404 } else { 307 };
        eventually(2 * BACK, "what is lost is known to be", || seen("last") == there);
        throughout(Duration::from_millis(300), || assert_eq!((seen("last"), seen("kept")), (there, 307)));
    }
    let known = since(promoted);
    report(&format!("{standby:?} {by:?} {old:?}: all write {writes:?} after the promotion, all know after {known:?}"));
    assert!(writes <= BACK && known <= 2 * BACK, "{writes:?}, {known:?}");

    let ledgers: Vec<PathBuf> = loads.map(Load::ends).into();
    let judged: Vec<Judged> = ledgers.iter().map(|ledger| stand.fleet.judge(ledger)).collect();
    assert_eq!(stand.sql(&stored_of_ours), ours);
    let lost = stand.lost(old);
    if standby == Standby::Synchronous {
        assert_eq!(lost, BTreeMap::new());
        judged.iter().for_each(|judged| judged.right().nothing_in_flight());
        return;
    }
    assert!(lost.values().any(|code| code == "last"), "{lost:?}");
    judged.iter().for_each(|judged| right_but_for(judged, &lost));
    nothing_is_given_twice(&stand, &lost);
}

/// Nothing is wrong but what Postgres has lost: links, whose visits are there all the same.
#[track_caller]
fn right_but_for(judged: &Judged, lost: &BTreeMap<u64, String>) {
    for what in ["missing", "doubled", "stored_as_orphan", "counted", "unknown", "link_other_target"] {
        assert_eq!(judged.wrong(what), 0, "{what}: {judged:#?}");
    }
    assert_eq!(judged.account.dropped(), 0, "{judged:#?}");
    assert!(judged.of("requests", "redirects") > 100, "{judged:#?}");
    assert_eq!(judged.of("requests", "wrong_location"), 0, "{judged:#?}");
    judged.nothing_in_flight();
    let groups = judged.said["wrong"].as_array().unwrap().iter();
    for finding in groups.flat_map(|group| group["findings"].as_array().unwrap()) {
        let code = finding["code"].as_str().unwrap();
        assert!(lost.values().any(|lost| lost == code), "{finding}: {lost:?}");
    }
    assert!(judged.wrong("link_lost") <= lost.len() as u64, "{judged:#?}");
}

/// Visits of a lost link, in the spool as well as in the store, would be another's.
#[track_caller]
fn nothing_is_given_twice(stand: &Stand, lost: &BTreeMap<u64, String>) {
    let rows = stand.fleet.deployment.database.sql("SELECT id, code FROM links");
    let now: Vec<(u64, &str)> =
        rows.lines().map(|row| row.split_once('|').unwrap()).map(|(id, code)| (id.parse().unwrap(), code)).collect();
    let codes: BTreeSet<&str> = lost.values().map(String::as_str).collect();
    let again: Vec<_> = now.iter().filter(|(id, code)| lost.contains_key(id) || codes.contains(code)).collect();
    assert!(again.is_empty(), "given again: {again:?} of {lost:?}");
}

/// What becomes of an instance that sees nothing of a failover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Absent {
    /// In order: all that it had was stored.
    Stopped,
    /// By SIGSTOP: it remembers what it knew.
    Frozen,
}

/// It finds the store as far as it was, or farther, and all the same another one.
fn check_absent(absent: Absent) {
    let mut stand = Stand::new(Standby::Lagging, By::Hosts, "");
    let [load, other] = stand.loads(16);
    assert_eq!(create(stand.fleet.server(0), "kept").status, 201);
    stand.standby.unfollow();
    assert_eq!(create(stand.fleet.server(2), "last").status, 201);
    let mut idle = stand.fleet.server(2).connect();
    for _ in 0..OTHERS {
        assert!(is_right(&visit(&mut idle, "last"), "last"));
    }
    drop(idle);
    let stored_of_ours = format!("SELECT count(*) FROM visits WHERE request_id = '{OURS}'");
    eventually(LIMIT, "these are stored", || stand.sql(&stored_of_ours) == OTHERS as u64);
    let version = "SELECT version FROM feed";
    let before = stand.sql(version);
    match absent {
        Absent::Stopped => stand.fleet.stop(2),
        Absent::Frozen => stand.fleet.server(2).signal(Signal::STOP),
    }
    stand.fails_over(Old::StaysAway);
    let mut number = 0;
    eventually(2 * LIMIT, "the new history is longer than the old one", || {
        number += 1;
        let answer = create(stand.fleet.server(number % 2), &format!("new-{number}"));
        assert!(matches!(answer.status, 201 | 503), "{answer:?}");
        stand.sql(version) > before + 1
    });
    match absent {
        Absent::Stopped => stand.fleet.begin(2),
        Absent::Frozen => stand.fleet.server(2).signal(Signal::CONT),
    }
    eventually(2 * BACK, "what is lost is known to be", || {
        let answer = stand.fleet.server(2).get("/last");
        assert!(matches!(answer.status, 404 | 503) || is_right(&answer, "last"), "{answer:?}");
        answer.status == 404
    });
    eventually(LIMIT, "what was lost of visits is there again", || stand.sql(&stored_of_ours) == OTHERS as u64);
    let ledgers = [load, other].map(Load::ends);
    let judged = ledgers.map(|ledger| stand.fleet.judge(&ledger));
    let lost = stand.lost(Old::StaysAway);
    assert!(lost.values().any(|code| code == "last"), "{lost:?}");
    judged.iter().for_each(|judged| right_but_for(judged, &lost));
    nothing_is_given_twice(&stand, &lost);
}

#[test]
fn an_instance_that_was_stopped() {
    check_absent(Absent::Stopped);
}

#[test]
fn an_instance_that_slept() {
    check_absent(Absent::Frozen);
}

/// What is lost of visits and no longer kept is counted, to the visit.
#[test]
fn a_gap_larger_than_what_is_kept() {
    const AT_ONCE: usize = 100;
    let spool = "[workers]\ncount = 1\n[spool]\nsegment = \"1MiB\"\nkeep = \"1s\"\n";
    let mut stand = Stand::new(Standby::Lagging, By::Hosts, spool);
    let [load, other] = stand.loads(12);
    assert_eq!(create(stand.fleet.server(0), "kept").status, 201);
    let stored = format!("SELECT count(*) FROM visits WHERE request_id = '{OURS}'");
    eventually(LIMIT, "visits are stored", || stand.sql("SELECT count(*) FROM visits") > 100);
    stand.standby.unfollow();
    let (mut client, mut ours) = (stand.fleet.server(0).connect(), 0);
    let spool = stand.fleet.data(0).join("spool");
    let segments = || {
        let names = std::fs::read_dir(&spool).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.ends_with(".log")).min().unwrap()
    };
    let first = segments();
    let requests = request("GET", "/kept", &[OURS_HEADER], b"").repeat(AT_ONCE);
    eventually(6 * LIMIT, "the first segment is not kept", || {
        client.send(&requests);
        for _ in 0..AT_ONCE {
            let answer = client.answer();
            assert!(is_right(&answer, "kept"), "{answer:?}");
        }
        ours += AT_ONCE as u64;
        segments() != first
    });
    stand.fails_over(Old::StaysAway);
    let ledgers = [load, other].map(Load::ends);
    let judged = ledgers.map(|ledger| stand.fleet.judge(&ledger));
    let missing =
        judged.each_ref().map(|judged| judged.wrong("missing")).iter().sum::<u64>() + ours - stand.sql(&stored);
    let account = &judged[0].account;
    report(&format!("{missing} missing; {account:?}"));
    assert_eq!(account.drops.keys().collect::<Vec<_>>(), ["failover_gap"], "{account:?}");
    assert_eq!(account.dropped(), missing, "{judged:#?}");
    for judged in &judged {
        judged.nothing_in_flight();
        for what in ["doubled", "stored_as_orphan", "counted", "unknown", "link_other_target"] {
            assert_eq!(judged.wrong(what), 0, "{what}: {judged:#?}");
        }
    }
}

/// It hangs, and another one takes its place; then it wakes up, and takes writes.
#[test]
fn a_primary_that_was_silent_wakes_up() {
    let mut stand = Stand::as_shipped(By::Hosts);
    let loads = stand.loads(10);
    let former = stand.fleet.deployment.database.of(&stand.primary);
    eventually(LIMIT, "visits are stored", || stand.sql("SELECT count(*) FROM visits") > 100);
    assert_eq!(create(stand.fleet.server(0), "kept").status, 201);
    let mut clients = [0, 1, 2].map(|number| stand.fleet.server(number).connect());
    eventually(LIMIT, "all have it", || clients.iter_mut().all(|client| is_right(&client.get("/kept"), "kept")));
    stand.standby.unfollow();
    assert_eq!(create(stand.fleet.server(2), "last").status, 201);
    let mut ours = 0;
    for _ in 0..OTHERS {
        assert!(is_right(&visit(&mut clients[2], "last"), "last"));
        ours += 1;
    }
    let stored_of_ours = format!("SELECT count(*) FROM visits WHERE request_id = '{OURS}'");
    eventually(LIMIT, "these are stored", || stand.sql(&stored_of_ours) == ours);

    stand.primary.freeze();
    throughout(Duration::from_secs(1), || {
        for client in &mut clients {
            assert!(is_right(&visit(client, "kept"), "kept"));
            ours += 1;
        }
    });
    stand.standby.promote();
    let promoted = time::monotonic();
    stand.fleet.deployment.database = former.of(&stand.standby);
    stand.all_write("after");
    let writes = since(promoted);
    eventually(2 * BACK, "what was lost of visits is there again", || stand.sql(&stored_of_ours) == ours);
    let stored = since(promoted);
    for client in &mut clients {
        eventually(BACK, "what is lost is known to be", || client.get("/last").status == 404);
    }

    stand.primary.thaw();
    assert_eq!(former.sql("SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on'"), "f");
    let connections = format!("SELECT count(*) FROM pg_stat_activity WHERE usename = '{ROLE}'");
    eventually(BACK, "nobody stays there", || former.sql(&connections) == "0");
    let written = || former.sql("SELECT (SELECT count(*) FROM links), (SELECT count(*) FROM visits)");
    let left = written();
    throughout(Duration::from_millis(500), || {
        assert_eq!(former.sql(&connections), "0");
        assert_eq!(written(), left);
    });
    // It is all there is for them, and it is not the store.
    stand.standby.freeze();
    eventually(2 * BACK, "they are refused", || stand.primary.says("this is a former primary"));
    let answer = create(stand.fleet.server(2), "nowhere");
    assert_eq!((answer.status, written()), (503, left.clone()), "{answer:?}");
    stand.standby.thaw();
    let thawed = time::monotonic();
    stand.all_write("back");
    let back = since(thawed);
    report(&format!("all write {writes:?} after the promotion, visits are there after {stored:?}; back {back:?}"));
    assert!(writes <= BACK && back <= BACK, "{writes:?}, {back:?}");

    let ledgers: Vec<PathBuf> = loads.map(Load::ends).into();
    assert_eq!((stand.sql(&stored_of_ours), written()), (ours, left));
    let lost = stand.lost_of(&stand.primary);
    // Who judges has seen nothing, and would ask the one that comes first.
    stand.primary.kill();
    let judged: Vec<Judged> = ledgers.iter().map(|ledger| stand.fleet.judge(ledger)).collect();
    assert!(lost.values().any(|code| code == "last"), "{lost:?}");
    judged.iter().for_each(|judged| right_but_for(judged, &lost));
    nothing_is_given_twice(&stand, &lost);
}

/// A second failover, to a server that knows nothing of what was written after the first one: not even that instances
/// had seen that.
#[test]
fn to_a_third_one_that_lacks_what_the_second_wrote() {
    let mut stand = Stand::as_shipped(By::Address);
    let loads = stand.loads(14);
    let first = stand.fleet.deployment.database.of(&stand.primary);
    eventually(LIMIT, "visits are stored", || stand.sql("SELECT count(*) FROM visits") > 100);
    assert_eq!(create(stand.fleet.server(0), "kept").status, 201);
    let kept = "SELECT count(*) FROM links WHERE code = 'kept'";
    eventually(LIMIT, "the second one has it", || first.of(&stand.standby).sql(kept) == "1");

    // Connections to the first one stay, and say nothing.
    stand.primary.freeze();
    stand.standby.promote();
    let third = stand.standby.standby();
    let follows = "SELECT count(*) FROM pg_stat_replication";
    eventually(LIMIT, "the third one follows the second", || stand.standby.sql(follows) == "1");
    third.unfollow();
    let moved = time::monotonic();
    stand.address.as_ref().unwrap().leads_to(at(stand.standby.port()));
    stand.fleet.deployment.database = first.of(&stand.standby);
    let codes = stand.all_write("second");
    let writes = since(moved);
    let mut ours = 0;
    for (number, code) in codes.iter().enumerate() {
        let mut client = stand.fleet.server(number).connect();
        for _ in 0..OTHERS {
            let answer = visit(&mut client, code);
            assert!(is_right(&answer, code), "{answer:?}");
            ours += 1;
        }
    }
    let stored_of_ours = format!("SELECT count(*) FROM visits WHERE request_id = '{OURS}'");
    eventually(2 * BACK, "these are stored", || stand.sql(&stored_of_ours) == ours);
    let generation = "SELECT generation FROM feed";
    let (second_had, id) = (stand.sql(generation), stand.sql("SELECT max(id) FROM links"));

    stand.standby.kill();
    third.promote();
    let promoted = time::monotonic();
    // Whoever comes first has not seen that its history is shorter than another one was.
    let config = stand.fleet.deployment.path("third.toml");
    std::fs::write(&config, format!("[postgres]\nurl = \"{}\"\n", first.url_at(third.port()))).unwrap();
    Direct::postgres(&config).check(|store| async move {
        let generation = store.position().await.unwrap().generation;
        assert!(generation > second_had, "two generations are one: {generation}");
        let leased = store.lease("link_ids", 1, 1).await.unwrap();
        assert!(leased > id, "{leased} was given before, as was {id}");
    });
    let address = stand.address.as_ref().unwrap();
    address.leads_to(at(third.port()));
    address.cut();
    stand.fleet.deployment.database = first.of(&third);
    stand.all_write("third");
    let writes_again = since(promoted);
    eventually(2 * BACK, "what was lost of visits is there again", || stand.sql(&stored_of_ours) == ours);
    for number in 0..3 {
        let mut client = stand.fleet.server(number).connect();
        eventually(BACK, "what is lost is known to be", || {
            codes.iter().all(|code| client.get(&format!("/{code}")).status == 404)
        });
        assert!(is_right(&client.get("/kept"), "kept"));
    }
    report(&format!("all write {writes:?} after the address moved, and {writes_again:?} after the second promotion"));
    assert!(writes <= BACK && writes_again <= BACK, "{writes:?}, {writes_again:?}");

    let ledgers: Vec<PathBuf> = loads.map(Load::ends).into();
    let judged: Vec<Judged> = ledgers.iter().map(|ledger| stand.fleet.judge(ledger)).collect();
    assert_eq!(stand.sql(&stored_of_ours), ours);
    stand.primary.thaw();
    stand.standby.start();
    let mut lost = stand.lost_of(&stand.standby);
    assert!(codes.iter().all(|code| lost.values().any(|lost| lost == code)), "{lost:?}");
    lost.extend(stand.lost_of(&stand.primary));
    judged.iter().for_each(|judged| right_but_for(judged, &lost));
    nothing_is_given_twice(&stand, &lost);
}

#[test]
fn to_a_synchronous_standby() {
    check(Standby::Synchronous, By::Hosts, Old::StaysAway, "snowflake");
}

#[test]
fn to_a_standby_that_lacks_the_last_commits() {
    check(Standby::Lagging, By::Hosts, Old::StaysAway, "permuted");
}

#[test]
fn the_old_primary_will_be_read_only() {
    check(Standby::Lagging, By::Hosts, Old::IsReadOnly, "snowflake");
}

#[test]
fn the_old_primary_was_made_read_only() {
    check(Standby::Lagging, By::Hosts, Old::StaysReadOnly, "permuted");
}

#[test]
fn the_address_moves() {
    check(Standby::Lagging, By::Address, Old::StaysReadOnly, "random");
}

#[test]
fn the_pooler_is_led_elsewhere() {
    check(Standby::Lagging, By::Pooler, Old::StaysAway, "permuted");
}
