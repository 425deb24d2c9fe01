//! `max_visits` over several instances: never one visit more, and all of them while nobody dies.
//!
//! The store's part as a table of questions; then real instances on one Postgres, all of them asked until each says 410.

use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use waypost::domain::key::DomainId;
use waypost::domain::link::LinkId;
use waypost::domain::time;
use waypost::store::Store;
use waypost::store::row::{Change, Found, Patch, QuotaAsk, Settled, Taken};

use crate::servers::deployment::{Deployment, Way};
use crate::servers::postgres::Postgres;
use crate::servers::proxy::{Mode, Proxy};
use crate::support::{Client, Direct, LIMIT, Server, eventually, key, request, throughout};

const TARGET: &str = "https://example.com/";
/// A dead holder's lease is over by then, and everybody knows.
const KNOWN: Duration = Duration::from_secs(25);
/// Connections to each instance.
const CLIENTS: usize = 3;

fn limit(store: &Direct, code: &str, max_visits: u64) {
    store.add(code, TARGET, |fields| fields.max_visits = Some(max_visits));
}

/// One question, or what happens between two.
enum Step {
    /// Visits wanted, by a lease of this number, after leases of which so much is left.
    Ask(u32, u64, &'static [(u64, u32)], Taken),
    /// Their holders have died: the time of all leases is over.
    Expire,
    /// They end so much later than now, as a row of the database's clock.
    Ends(&'static str),
    /// Counted as used, rows of leases, whether a look-up says that it is gone, and how often it was recorded as used up.
    Stands(u32, u32, bool, u32),
    Limit(Option<u64>),
    /// So many visits were taken for lost since the first step.
    Swept(u64),
}

fn visits(count: u32) -> Taken {
    Taken::Visits { count, leased: true }
}

/// Runs `steps` over a link with `max_visits`.
fn check(deployment: &Deployment, store: &Direct, code: &str, max_visits: u64, steps: &[Step]) {
    limit(store, code, max_visits);
    let sql = |sql: &str| {
        deployment.database.sql(&sql.replace("ID", &format!("(SELECT id FROM links WHERE code = '{code}')")))
    };
    let id = LinkId(sql("SELECT ID").parse().unwrap());
    let swept = || {
        let mut visits = 0;
        store.check(async |store| {
            let Store::Postgres(postgres) = store else { panic!("only Postgres leases") };
            visits = postgres.figures().visits_swept;
        });
        visits
    };
    let swept_before = swept();
    for (number, step) in steps.iter().enumerate() {
        let what = format!("{code}, step {number}");
        match step {
            Step::Ask(wanted, lease, settled, taken) => {
                let settled = settled.iter().map(|(lease, rest)| Settled { lease: *lease, rest: *rest }).collect();
                let (key, waiting) = (key(DomainId(0), code), u32::from(*wanted > 0));
                let ask = QuotaAsk { key, id, wanted: *wanted, waiting, lease: *lease, settled };
                store.check(async |store| {
                    assert_eq!(store.take_visits(ask, time::now()).await.unwrap(), *taken, "{what}");
                });
            }
            Step::Expire => {
                sql("UPDATE quota_leases SET expires_at = now() WHERE link_id = ID");
            }
            Step::Ends(interval) => {
                sql(&format!("UPDATE quota_leases SET expires_at = now() + INTERVAL '{interval}' WHERE link_id = ID"));
            }
            Step::Stands(used, rows, gone, recorded) => {
                let stands = sql(&format!(
                    "SELECT (SELECT used FROM link_quotas WHERE link_id = ID),
                       (SELECT count(*) FROM quota_leases WHERE link_id = ID),
                       (SELECT count(*) FROM link_changes WHERE code = '{code}' AND what = 'used_up')"
                ));
                assert_eq!(stands, format!("{used}|{rows}|{recorded}"), "{what}");
                store.check(async |store| {
                    let found = store.look_up(vec![key(DomainId(0), code)]).await.unwrap();
                    assert!(
                        matches!(&found[..], [Found::Entry(entry)] if entry.rules.gone == *gone),
                        "{what}: {found:?}"
                    );
                });
            }
            Step::Limit(max) => {
                store.change(code, Change::Edit(Box::new(Patch { max_visits: Some(*max), ..Patch::default() })));
            }
            Step::Swept(visits) => assert_eq!(swept() - swept_before, *visits, "{what}"),
        }
    }
}

#[test]
fn what_the_store_grants_and_takes_back() {
    for way in [Way::Straight, Way::Pooled] {
        let deployment = Deployment::new(way, "");
        let store = deployment.store();
        let check = |code: &str, max_visits: u64, steps: &[Step]| check(&deployment, &store, code, max_visits, steps);
        use Step::{Ask, Ends, Expire, Limit, Stands, Swept};
        const ALL: u32 = u32::MAX;
        check(
            "single",
            1,
            &[
                Ask(256, 1, &[], visits(1)),
                Stands(1, 1, false, 0),
                Ask(1, 2, &[], Taken::Held),
                Ask(1, 2, &[(1, 0)], Taken::UsedUp),
                Stands(1, 0, true, 1),
                Ask(1, 3, &[], Taken::UsedUp),
                Stands(1, 0, true, 1),
            ],
        );
        // Its answer came to nobody, or nobody waited for it any more.
        check(
            "single-given-back",
            1,
            &[
                Ask(1, 1, &[], visits(1)),
                Ask(1, 2, &[(1, ALL)], visits(1)),
                Ask(0, 0, &[(2, 1)], Taken::UsedUp),
                Stands(0, 0, false, 0),
            ],
        );
        check("one-by-one", 31, &[Ask(256, 1, &[], visits(1)), Ask(9, 2, &[], visits(1)), Stands(2, 2, false, 0)]);
        check(
            "a-sixteenth",
            320,
            &[
                Ask(256, 1, &[], visits(20)),
                Ask(256, 2, &[], visits(18)),
                Ask(5, 3, &[], visits(5)),
                Stands(43, 3, false, 0),
            ],
        );
        check(
            "given-back",
            100,
            &[
                Ask(6, 1, &[], visits(6)),
                Ask(3, 2, &[(1, 4)], visits(3)),
                Stands(5, 1, false, 0),
                Ask(0, 0, &[(2, 0)], Taken::UsedUp),
                Stands(5, 0, false, 0),
            ],
        );
        check(
            "given-back-once",
            100,
            &[
                Ask(6, 1, &[], visits(6)),
                Ask(0, 0, &[(1, 4)], Taken::UsedUp),
                Ask(0, 0, &[(1, 4), (7, 9)], Taken::UsedUp),
                Stands(2, 0, false, 0),
            ],
        );
        check(
            "never-heard-of",
            100,
            &[Ask(6, 1, &[], visits(6)), Ask(1, 2, &[(1, ALL)], visits(1)), Stands(1, 1, false, 0)],
        );
        // The last lease is out: nobody knows whether it is used up until it is settled.
        check(
            "held",
            32,
            &[
                Ask(2, 1, &[], visits(2)),
                Limit(Some(2)),
                Stands(2, 1, false, 0),
                Ask(1, 2, &[], Taken::Held),
                Stands(2, 1, false, 0),
                Ask(0, 0, &[(1, 0)], Taken::UsedUp),
                Stands(2, 0, true, 1),
                Ask(1, 2, &[], Taken::UsedUp),
                Stands(2, 0, true, 1),
            ],
        );
        check(
            "back-in-time",
            32,
            &[
                Ask(2, 1, &[], visits(2)),
                Limit(Some(2)),
                Ask(1, 2, &[], Taken::Held),
                Ask(1, 2, &[(1, 1)], visits(1)),
                Stands(2, 1, false, 0),
                Ask(0, 0, &[(2, 0)], Taken::UsedUp),
                Stands(2, 0, true, 1),
            ],
        );
        // The server's clock stepped back an hour: nobody waits for as long.
        check("stepped-back", 1, &[Ask(1, 1, &[], visits(1)), Ends("1 hour"), Ask(1, 2, &[], Taken::UsedUp), Swept(1)]);
        // Its limit was taken away: nothing is counted, and what was leased of nothing is no matter.
        check(
            "unlimited",
            32,
            &[
                Ask(2, 1, &[], visits(2)),
                Limit(None),
                Ask(9, 2, &[(1, 1)], visits(9)),
                Ask(0, 0, &[(2, 5)], Taken::UsedUp),
                Stands(1, 0, false, 0),
                Swept(0),
            ],
        );
        // Rows of the dead go when they are a day old, also of a link that is not used up.
        check(
            "long-dead",
            100,
            &[
                Ask(6, 1, &[], visits(6)),
                Ends("-23 hours"),
                Ask(0, 0, &[], Taken::UsedUp),
                Stands(6, 1, false, 0),
                Swept(0),
                Ends("-25 hours"),
                Ask(0, 0, &[], Taken::UsedUp),
                Stands(6, 0, false, 0),
                Swept(6),
            ],
        );
        // Its holder died: the next who asks settles that.
        check(
            "died",
            32,
            &[
                Ask(2, 1, &[], visits(2)),
                Limit(Some(2)),
                Expire,
                Stands(2, 1, false, 0),
                Ask(1, 2, &[], Taken::UsedUp),
                Stands(2, 0, true, 1),
                Ask(0, 0, &[(1, 2)], Taken::UsedUp),
                Stands(2, 0, true, 1),
                Swept(2),
            ],
        );
        // One who was only cut off gives back what he has, if nobody was told meanwhile that it is used up.
        check(
            "late",
            32,
            &[
                Ask(2, 1, &[], visits(2)),
                Expire,
                Ask(1, 2, &[], visits(1)),
                Ask(0, 0, &[(1, 2)], Taken::UsedUp),
                Stands(1, 1, false, 0),
                Swept(0),
            ],
        );
        check(
            "raised",
            1,
            &[
                Ask(1, 1, &[], visits(1)),
                Ask(0, 0, &[(1, 0)], Taken::UsedUp),
                Stands(1, 0, true, 1),
                Limit(Some(2)),
                Stands(1, 0, false, 1),
                Ask(1, 2, &[(1, 0)], visits(1)),
                Ask(0, 0, &[(2, 0)], Taken::UsedUp),
                Stands(2, 0, true, 2),
            ],
        );
        check(
            "lowered",
            64,
            &[
                Ask(4, 1, &[], visits(4)),
                Limit(Some(1)),
                Ask(1, 2, &[], Taken::Held),
                Ask(1, 2, &[(1, 2)], Taken::UsedUp),
                Stands(2, 0, true, 1),
            ],
        );
    }
}

/// What happens to one of the instances when half of the visits are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    Restart,
    Kill,
    Freeze,
}

/// The status of a visit; none if the server has gone, or is frozen. A connection that it has closed is made anew.
fn visit(client: &mut Option<Client>, address: SocketAddr, code: &str, patience: Duration) -> Option<u16> {
    for _ in 0..2 {
        let connected = match client {
            Some(connected) => connected,
            None if TcpStream::connect(address).is_err() => return None,
            None => client.insert(Client::connect(address)),
        };
        connected.stream().set_read_timeout(Some(patience)).unwrap();
        if connected.try_send(request("GET", &format!("/{code}"), &[], b""))
            && let Ok(answer) = connected.next(false)
        {
            if answer.status == 503 {
                assert_eq!(answer.header("retry-after"), Some("1"));
            }
            if answer.closes() {
                *client = None;
            }
            return Some(answer.status);
        }
        *client = None;
    }
    None
}

/// Visits until the link is gone, or the server is.
fn visit_all(address: SocketAddr, code: &str, patience: Duration, counted: impl Fn()) {
    let mut client = None;
    eventually(KNOWN, &format!("{code} is used up"), || {
        loop {
            match visit(&mut client, address, code, patience) {
                Some(307) => counted(),
                Some(503) => return false,
                None | Some(410) => return true,
                other => panic!("{code}: {other:?}"),
            }
        }
    });
}

struct Fleet {
    deployment: Deployment,
    servers: Vec<Server>,
}

impl Fleet {
    fn new() -> Self {
        let deployment = Deployment::new(Way::Straight, "");
        let servers = ["one", "two", "three"].map(|name| deployment.instance(name)).into();
        Self { deployment, servers }
    }

    /// How many visits there were of a new link with `max`: everybody visits every instance until it is gone. The first
    /// instance meets `fault` when half of them are answered.
    fn answered(&self, code: &str, max: u32, fault: Fault) -> u32 {
        limit(&self.deployment.store(), code, max.into());
        let answered = AtomicU32::new(0);
        let victim = &self.servers[0];
        let counted = || {
            if answered.fetch_add(1, Ordering::SeqCst) + 1 == max / 2 {
                match fault {
                    Fault::None => {}
                    Fault::Restart => victim.signal(Signal::TERM),
                    Fault::Kill => victim.signal(Signal::KILL),
                    Fault::Freeze => victim.signal(Signal::STOP),
                }
            }
        };
        std::thread::scope(|scope| {
            for server in &self.servers {
                let is_frozen = fault == Fault::Freeze && server.pid() == victim.pid();
                let patience = if is_frozen { Duration::from_secs(2) } else { LIMIT };
                for _ in 0..CLIENTS {
                    scope.spawn(move || visit_all(server.address(), code, patience, counted));
                }
            }
        });
        answered.into_inner()
    }

    /// Everybody knows that it is used up, also those who only look.
    fn is_used_up(&self, code: &str, max: u32, instances: &[&Server]) {
        for server in instances {
            let status = |method| server.connect().ask(method, &format!("/{code}"), &[], b"").status;
            assert_eq!(status("GET"), 410, "{code}");
            eventually(LIMIT, "who looks knows it as well", || status("HEAD") == 410);
        }
        let sql = format!(
            "SELECT used, (SELECT count(*) FROM quota_leases WHERE link_id = l.id),
               (SELECT count(*) FROM link_changes WHERE code = l.code AND what = 'used_up')
             FROM links l JOIN link_quotas ON link_id = id WHERE code = '{code}'"
        );
        assert_eq!(self.deployment.database.sql(&sql), format!("{max}|0|1"), "{code}");
    }
}

#[test]
fn three_instances_answer_as_many_visits_as_a_link_has() {
    let mut fleet = Fleet::new();
    for max in [1, 2, 17, 1000] {
        let code = format!("of-{max}");
        assert_eq!(fleet.answered(&code, max, Fault::None), max);
        fleet.is_used_up(&code, max, &fleet.servers.iter().collect::<Vec<_>>());
    }
    for server in &fleet.servers {
        assert_eq!(server.metric("waypost_limited_visits_lost_total", &[]), 0.0);
    }
    assert_eq!(fleet.answered("restarted", 1000, Fault::Restart), 1000);
    fleet.servers.remove(0).ends();
    fleet.servers.push(fleet.deployment.instance("one"));
    fleet.is_used_up("restarted", 1000, &fleet.servers.iter().collect::<Vec<_>>());
}

/// The embedded store leases nothing, and grants to all who wait at once.
#[test]
fn one_process_answers_as_many_visits_as_a_link_has() {
    let (setup, server) = Server::new("");
    for max in [1, 17, 1000] {
        let code = format!("of-{max}");
        limit(&setup.store(), &code, max);
        let answered = AtomicU32::new(0);
        let counted = || {
            answered.fetch_add(1, Ordering::SeqCst);
        };
        std::thread::scope(|scope| {
            (0..8).for_each(|_| drop(scope.spawn(|| visit_all(server.address(), &code, LIMIT, counted))));
        });
        assert_eq!(u64::from(answered.into_inner()), max);
    }
}

/// It takes along what it held: a sixteenth of what was left at the most. And its clients do not know of what was under way.
#[test]
fn an_instance_that_dies_takes_along_what_it_held() {
    let fleet = Fleet::new();
    let answered = fleet.answered("killed", 1000, Fault::Kill);
    assert!((1000 - 1000 / 16 - CLIENTS as u32..=1000).contains(&answered), "{answered}");
    fleet.is_used_up("killed", 1000, &fleet.servers[1..].iter().collect::<Vec<_>>());
}

/// To the visit: what the dead one held is counted by those who find it, and what it had answered of that is in it.
#[test]
fn what_is_lost_with_a_dead_instance_is_counted() {
    const MAX: u32 = 300;
    let fleet = Fleet::new();
    limit(&fleet.deployment.store(), "link", MAX.into());
    let (victim, others) = fleet.servers.split_first().unwrap();
    let sql = |sql: &str| fleet.deployment.database.sql(sql).parse::<u32>().unwrap();
    let held = || sql("SELECT coalesce(sum(granted), 0) FROM quota_leases");
    let lost = || -> f64 {
        let of = |server: &Server| server.metric("waypost_limited_visits_lost_total", &["reason=\"dead_lease\""]);
        others.iter().map(of).sum()
    };
    let (mut client, mut answered) = (victim.connect(), 0);
    eventually(LIMIT, "several are leased", || {
        assert_eq!(client.get("/link").status, 307);
        answered += 1;
        held() >= 4
    });
    // It may have been about to ask: what it sent is done by the store.
    victim.signal(Signal::STOP);
    throughout(Duration::from_millis(300), || {});
    let held = held();
    let spent = answered - (sql("SELECT used FROM link_quotas") - held);
    victim.signal(Signal::KILL);
    assert_eq!(lost(), 0.0);
    let by_others = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for server in others {
            let counted = || {
                by_others.fetch_add(1, Ordering::SeqCst);
            };
            scope.spawn(move || visit_all(server.address(), "link", LIMIT, counted));
        }
    });
    fleet.is_used_up("link", MAX, &others.iter().collect::<Vec<_>>());
    assert_eq!(lost(), f64::from(held));
    assert_eq!(MAX - answered - by_others.into_inner(), held - spent, "{answered} by it, {spent} of its last lease");
}

#[test]
fn an_instance_that_was_frozen_spends_nothing_after_its_term() {
    let fleet = Fleet::new();
    let begun = time::monotonic();
    let answered = fleet.answered("frozen", 1000, Fault::Freeze);
    assert!((1000 - 1000 / 16 - CLIENTS as u32..=1000).contains(&answered), "{answered}");
    fleet.is_used_up("frozen", 1000, &fleet.servers[1..].iter().collect::<Vec<_>>());
    throughout(Duration::from_secs(15).saturating_sub(time::monotonic().duration_since(begun)), || {});
    fleet.servers[0].signal(Signal::CONT);
    let mut client = fleet.servers[0].connect();
    eventually(LIMIT, "it knows that it is used up", || {
        let status = client.get("/frozen").status;
        assert_ne!(status, 307, "it has spent what it held");
        status == 410
    });
    fleet.is_used_up("frozen", 1000, &fleet.servers.iter().collect::<Vec<_>>());
}

/// Every edit ends the leases of its link, and costs no visit.
#[test]
fn edits_end_leases_and_lose_no_visit() {
    let fleet = Fleet::new();
    let store = fleet.deployment.store();
    limit(&store, "edited", 1000);
    let over = AtomicBool::new(false);
    let title = |number: u32| Patch { title: Some(Some(number.to_string())), ..Patch::default() };
    std::thread::scope(|scope| {
        let campaigns = ["a", "b", "c"].map(|code| {
            let fleet = &fleet;
            scope.spawn(move || fleet.answered(code, 500, Fault::None))
        });
        let edited = scope.spawn(|| {
            let answered = AtomicU32::new(0);
            std::thread::scope(|scope| {
                for server in &fleet.servers {
                    let answered = &answered;
                    let counted = move || {
                        answered.fetch_add(1, Ordering::SeqCst);
                    };
                    scope.spawn(move || visit_all(server.address(), "edited", LIMIT, counted));
                }
            });
            over.store(true, Ordering::SeqCst);
            answered.into_inner()
        });
        let mut edits = 0;
        eventually(KNOWN, "the edited link is used up", || {
            edits += 1;
            store.change("edited", Change::Edit(Box::new(title(edits))));
            over.load(Ordering::SeqCst)
        });
        assert_eq!(campaigns.map(|campaign| campaign.join().unwrap()), [500; 3]);
        assert_eq!(edited.join().unwrap(), 1000, "{edits} edits");
    });
}

#[test]
fn who_uses_up_a_visit() {
    let fleet = Fleet::new();
    let store = fleet.deployment.store();
    limit(&store, "some", 4);
    let mut client = fleet.servers[0].connect();
    let mut check = |method: &str, headers: &[(&str, &str)], want: u16| {
        assert_eq!(client.ask(method, "/some", headers, b"").status, want, "{method} {headers:?}");
    };
    (0..5).for_each(|_| check("HEAD", &[], 307));
    check("GET", &[("User-Agent", "Googlebot/2.1")], 307);
    check("GET", &[("User-Agent", "curl/8.0")], 307);
    check("GET", &[("Sec-Purpose", "prefetch")], 307);
    check("HEAD", &[], 307);
    check("GET", &[], 307);
    check("GET", &[], 410);
    fleet.is_used_up("some", 4, &fleet.servers.iter().collect::<Vec<_>>());
}

/// A link that is disabled is not served from a lease; what was left of it is there when it is enabled again.
#[test]
fn a_lease_ends_with_what_is_known_of_its_link() {
    let fleet = Fleet::new();
    let store = fleet.deployment.store();
    limit(&store, "campaign", 100_000);
    let mut client = fleet.servers[0].connect();
    let mut answered = 0;
    let leased = || fleet.deployment.database.sql("SELECT coalesce(max(granted), 0) FROM quota_leases").parse::<u32>();
    let mut visit = || {
        let status = client.get("/campaign").status;
        answered += u32::from(status == 307);
        status
    };
    eventually(LIMIT, "much is leased", || {
        (0..500).for_each(|_| assert_eq!(visit(), 307));
        leased().unwrap() >= 64
    });
    for (change, want) in [(Change::Disable, 410), (Change::Enable, 307)] {
        store.change("campaign", change);
        eventually(LIMIT, "the change shows", || visit() == want);
        throughout(Duration::from_millis(200), || assert_eq!(visit(), want));
    }
    store.change("campaign", Change::Edit(Box::new(Patch { max_visits: Some(Some(1)), ..Patch::default() })));
    eventually(LIMIT, "the lower limit shows", || visit() == 410);
    throughout(Duration::from_millis(200), || assert_eq!(visit(), 410));
    let used = fleet.deployment.database.sql("SELECT used, (SELECT count(*) FROM quota_leases) FROM link_quotas");
    assert_eq!(used, format!("{answered}|0"));
}

/// What is leased goes on to the end of its term; then nobody can know, until the store is back. No visit is lost.
#[test]
fn a_store_that_is_away_gives_no_visits() {
    let mut postgres = Postgres::own();
    let deployment = Deployment::on(&postgres, Way::Straight, "");
    let server = deployment.instance("one");
    limit(&deployment.store(), "campaign", 2_000);
    let (mut client, mut answered) = (None, 0);
    let mut visit = || {
        let status = visit(&mut client, server.address(), "campaign", LIMIT).unwrap();
        answered += u32::from(status == 307);
        status
    };
    (0..200).for_each(|_| assert_eq!(visit(), 307));
    postgres.freeze();
    eventually(LIMIT, "nothing is leased any more", || visit() == 503);
    throughout(Duration::from_secs(1), || assert_eq!(visit(), 503));
    postgres.thaw();
    eventually(KNOWN, "it is used up", || {
        loop {
            match visit() {
                307 => {}
                503 => return false,
                status => return status == 410,
            }
        }
    });
    assert_eq!(answered, 2_000);
}

/// A visitor is not kept waiting by a store that is slow, and what comes too late for him is for the next one.
#[test]
fn a_visit_that_comes_too_late_is_not_used_up() {
    let postgres = Postgres::shared();
    let proxy = Proxy::start(SocketAddr::from(([127, 0, 0, 1], postgres.port())));
    let deployment = Deployment::new(Way::Elsewhere(proxy.address()), "");
    let config = deployment.path("waypost.toml");
    let patient = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, patient.replace("lookup_timeout = \"2s\"", "lookup_timeout = \"250ms\"")).unwrap();
    let server = deployment.instance("one");
    limit(&deployment.store(), "once", 1);
    let mut client = server.connect();
    eventually(LIMIT, "it is in memory", || client.ask("HEAD", "/once", &[], b"").status == 307);
    proxy.mode(Mode::Delay(Duration::from_millis(1_300)));
    let begun = time::monotonic();
    assert_eq!(client.get("/once").status, 503);
    assert!(time::monotonic().duration_since(begun) < Duration::from_millis(900), "he waited too long");
    // Its answer comes, and nobody waits.
    throughout(Duration::from_secs(2), || {});
    proxy.mode(Mode::Pass);
    eventually(KNOWN, "the visit is there", || client.get("/once").status == 307);
    eventually(KNOWN, "it is used up", || match client.get("/once").status {
        307 => panic!("a second visit"),
        status => status == 410,
    });
    let used = deployment.database.sql("SELECT used, (SELECT count(*) FROM quota_leases) FROM link_quotas");
    assert_eq!(used, "1|0");
}

/// `visits_used` has nothing of what is leased, and a link of which the last is leased is not over.
#[test]
fn what_is_leased_is_not_used() {
    let deployment = Deployment::new(Way::Straight, "");
    let store = deployment.store();
    limit(&store, "link", 32);
    let id = LinkId(deployment.database.sql("SELECT id FROM links").parse().unwrap());
    for (wanted, lease, settled, used) in [(2, 1, vec![], 0), (1, 2, vec![(1, 1)], 1), (0, 0, vec![(2, 0)], 2)] {
        let settled = settled.into_iter().map(|(lease, rest)| Settled { lease, rest }).collect();
        let ask = QuotaAsk { key: key(DomainId(0), "link"), id, wanted, waiting: wanted, lease, settled };
        store.check(async |store| {
            store.take_visits(ask, time::now()).await.unwrap();
            let link = store.link(key(DomainId(0), "link")).await.unwrap().unwrap();
            assert_eq!(link.visits_used, used, "lease {lease}");
        });
    }
}

/// What is asked of it is a figure, too: how many visits of one limited link an instance answers.
#[test]
fn an_instance_that_stops_gives_back_what_it_did_not_spend() {
    const SPAN: Duration = Duration::from_secs(2);
    let deployment = Deployment::new(Way::Straight, "");
    let server = deployment.instance("one");
    limit(&deployment.store(), "campaign", 100_000_000);
    let visits = || {
        let (mut client, mut answered) = (server.connect(), 0_u32);
        let begun = time::monotonic();
        while time::monotonic().duration_since(begun) < SPAN {
            assert_eq!(client.get("/campaign").status, 307);
            answered += 1;
        }
        answered
    };
    let answered: u32 = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..8).map(|_| scope.spawn(visits)).collect();
        clients.into_iter().map(|client| client.join().unwrap()).sum()
    });
    server.stop();
    let used = deployment.database.sql("SELECT used FROM link_quotas");
    assert_eq!(used, answered.to_string());
    println!("{} visits of one limited link a second, over 8 connections", answered / SPAN.as_secs() as u32);
}
