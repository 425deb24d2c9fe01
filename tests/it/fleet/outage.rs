//! Postgres and Redis both gone, under load, for three instances; and eight of them that come back at once.
//!
//! In: how long (`WAYPOST_OUTAGE_SECONDS`, 6 by default; `script/outage`). Out: links in memory are right, every
//! time; what cannot be known is a 503 within [`FAST`], and never a 404; visits are all there afterwards; nobody's hand is
//! needed.
//! Never: restarts an instance to end an outage; one is restarted in the middle of it.
//! At the limit: times are those of the claims themselves; the figures are printed.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;
use waypost::domain::time;

use super::{Fleet, Over};
use crate::campaign::{Load, OURS};
use crate::servers::deployment::{WAYPOST, Way};
use crate::servers::postgres::{Postgres, ROLE};
use crate::servers::redis::Redis;
use crate::support::{Answer, Client, LIMIT, Server, eventually, throughout};

/// What cannot be known, and what cannot be done, is said within this time.
const FAST: Duration = Duration::from_millis(300);
/// The create that meets the outage may find out about it itself.
const FOUND_OUT: Duration = Duration::from_secs(6);
/// From the end of an outage until everything works.
const BACK: Duration = Duration::from_secs(10);
const RATE: u32 = 100;
const WARM: usize = 50;
const TARGET: &str = "https://example.com/";

/// What a visitor of one instance saw.
#[derive(Debug, Default)]
struct Seen {
    right: u64,
    /// 503 for what is not in memory, or not there.
    later: u64,
    later_max: Duration,
    create_max: Duration,
}

impl Seen {
    fn and(mut self, other: &Self) -> Self {
        self.right += other.right;
        self.later += other.later;
        self.later_max = self.later_max.max(other.later_max);
        self.create_max = self.create_max.max(other.create_max);
        self
    }

    /// One look at each kind of question.
    fn looks(&mut self, client: &mut Client, number: usize, key: &str) {
        for code in (0..WARM).map(warm) {
            let answer = visit(client, &code);
            assert!(is_right(&answer, &code), "{code}: {answer:?}");
            self.right += 1;
        }
        for code in ["unknown".to_owned(), cold(number)] {
            let (answer, took) = timed(|| client.get(&format!("/{code}")));
            assert_eq!(answer.status, 503, "{code}: {answer:?}");
            assert!(answer.header("retry-after").is_some(), "{answer:?}");
            self.later += 1;
            self.later_max = self.later_max.max(took);
        }
        let (answer, took) = timed(|| create(client, "never", key));
        assert_eq!(answer.status, 503, "{answer:?}");
        self.create_max = self.create_max.max(took);
    }
}

fn warm(number: usize) -> String {
    format!("warm-{number}")
}

/// A link that this instance has never heard of.
fn cold(number: usize) -> String {
    format!("cold-{number}")
}

fn timed(work: impl FnOnce() -> Answer) -> (Answer, Duration) {
    let begun = time::monotonic();
    let answer = work();
    (answer, time::monotonic().duration_since(begun))
}

fn visit(client: &mut Client, code: &str) -> Answer {
    client.ask("GET", &format!("/{code}"), &[("X-Request-Id", OURS)], b"")
}

fn create(client: &mut Client, code: &str, key: &str) -> Answer {
    client.shorten(&json!({"original_url": format!("{TARGET}{code}"), "custom_code": code}), key)
}

fn is_right(answer: &Answer, code: &str) -> bool {
    answer.status == 307 && answer.location() == Some(format!("{TARGET}{code}").as_str())
}

#[expect(clippy::print_stdout, reason = "figures are for people")]
fn report(figures: &str) {
    println!("{figures}");
}

#[test]
fn both_stores_gone() {
    let seconds = std::env::var("WAYPOST_OUTAGE_SECONDS").map_or(6, |text| text.parse().expect("a number of seconds"));
    let (mut postgres, mut redis) = (Postgres::own(), Redis::start());
    let config = format!("[redis]\nurl = \"{}\"\n", redis.url());
    let mut fleet = Fleet::on(&postgres, Way::Straight, 3, &config);
    let key = fleet.server(0).admin_key();
    (0..WARM).for_each(|number| fleet.server(0).custom(&warm(number), &format!("{TARGET}{}", warm(number))));
    // What nobody has asked for is in no memory, nor in Redis.
    for code in (0..3).map(cold) {
        fleet.deployment.cli(Path::new(WAYPOST), &["link", "add", &format!("{TARGET}{code}"), "--code", &code]);
    }
    for number in 0..3 {
        let mut client = fleet.server(number).connect();
        for code in (0..WARM).map(warm) {
            eventually(LIMIT, &code, || is_right(&client.get(&format!("/{code}")), &code));
        }
    }
    let loads = [0, 1].map(|number| {
        let folder = fleet.deployment.path(&format!("load-{number}"));
        std::fs::create_dir(&folder).unwrap();
        let target = format!("http://127.0.0.1:{}", fleet.port(number));
        Load::begin(&folder, &target, &fleet.deployment.path("admin.key"), RATE, seconds + 12)
    });

    postgres.stop();
    redis.kill();
    // The first to create find out.
    for number in 0..3 {
        let (answer, took) = timed(|| create(&mut fleet.server(number).connect(), "never", &key));
        assert_eq!(answer.status, 503, "{answer:?}");
        assert!(took <= FOUND_OUT, "{took:?}");
        eventually(LIMIT, "it is noticed", || fleet.server(number).get("/readyz?require=store").status == 503);
        assert_eq!(fleet.server(number).get("/readyz").status, 200);
    }
    let over = AtomicBool::new(false);
    let visitor = |server: &Server, number: usize| {
        let (mut seen, mut client) = (Seen::default(), server.connect());
        eventually(Duration::MAX, "it is over", || {
            seen.looks(&mut client, number, &key);
            over.load(Ordering::Relaxed)
        });
        seen
    };
    // In the middle of it an instance is restarted: what it knows lies in its folder.
    let restarted = fleet.take(2);
    let (seen, server) = std::thread::scope(|scope| {
        let visiting = [0, 1].map(|number| {
            let (visitor, server) = (&visitor, fleet.server(number));
            scope.spawn(move || visitor(server, number))
        });
        let _over = Over(&over);
        let (mut seen, mut client) = (Seen::default(), restarted.connect());
        let half = Duration::from_secs(u64::from(seconds)) / 2;
        throughout(half, || seen.looks(&mut client, 2, &key));
        drop(client);
        restarted.stop();
        let server = fleet.started(2);
        let mut client = server.connect();
        throughout(half, || seen.looks(&mut client, 2, &key));
        over.store(true, Ordering::Relaxed);
        let seen = visiting.into_iter().fold(seen, |all, one| all.and(&one.join().unwrap()));
        (seen, server)
    });
    fleet.put(2, server);

    postgres.start();
    redis.restart();
    let healed = time::monotonic();
    for number in 0..3 {
        let mut client = fleet.server(number).connect();
        let (code, after) = (cold(number), format!("after-{number}"));
        eventually(BACK, "it finds", || {
            let answer = client.get(&format!("/{code}"));
            assert!(answer.status == 503 || is_right(&answer, &code), "{answer:?}");
            answer.status == 307
        });
        eventually(BACK, "it creates", || matches!(create(&mut client, &after, &key).status, 201 | 409));
        eventually(BACK, "what is unknown is unknown", || client.get("/unknown").status == 404);
        eventually(BACK, "it is ready", || fleet.server(number).get("/readyz?require=store").status == 200);
    }
    let back = time::monotonic().duration_since(healed);
    report(&format!(
        "{seconds} s without stores: {} of {} answers for warm codes right, {} times 503, at most {:?}, creates at most \
         {:?}; all works again after {back:?}",
        seen.right, seen.right, seen.later, seen.later_max, seen.create_max
    ));
    assert!(back <= BACK, "{back:?}");
    assert!(seen.later_max <= FAST && seen.create_max <= FAST, "{seen:?}");
    assert!(seen.right > 500, "{seen:?}");
    let ledgers = loads.map(Load::ends);
    for ledger in ledgers {
        fleet.judge(&ledger).right().nothing_in_flight();
    }
    let ours = format!("SELECT count(*) FROM visits WHERE request_id = '{OURS}'");
    assert_eq!(fleet.deployment.database.sql(&ours), seen.right.to_string());
}

#[test]
fn eight_instances_that_come_back_at_once() {
    const INSTANCES: usize = 8;
    const POOL: usize = 3;
    /// Beside the pool: one that listens, one for visits.
    const BESIDE: usize = 2;
    /// Less than one for each.
    const FEW: usize = 6;
    let postgres = Postgres::own();
    let fleet = Fleet::on(&postgres, Way::Straight, 0, "");
    fleet.deployment.restrict("pool = 3\n");
    let names: Vec<String> = (0..INSTANCES).map(|number| format!("node-{number}")).collect();
    let all_at_once = || -> Vec<Server> {
        std::thread::scope(|scope| {
            let deployment = &fleet.deployment;
            let starting: Vec<_> = names.iter().map(|name| scope.spawn(move || deployment.instance(name))).collect();
            starting.into_iter().map(|one| one.join().unwrap()).collect()
        })
    };
    let servers = all_at_once();
    servers[0].custom("known", TARGET);
    for server in &servers {
        eventually(LIMIT, "it is served", || server.get("/known").status == 307);
    }
    servers.into_iter().for_each(|server| drop(server.stop()));

    let limit = |count: i32| postgres.sql(&format!("ALTER ROLE {ROLE} CONNECTION LIMIT {count}"));
    let count = format!("SELECT count(*) FROM pg_stat_activity WHERE usename = '{ROLE}'");
    let count = || postgres.sql(&count).parse::<usize>().unwrap();
    limit(i32::try_from(FEW).unwrap());
    // All of them serve what they remember, whether there was a connection for them or not.
    let servers = all_at_once();
    let mut most = 0;
    let asks = |server: &Server| {
        let mut client = server.connect();
        assert_eq!(client.get("/known").location(), Some(TARGET));
        let unknown = client.get("/unknown");
        assert!(matches!(unknown.status, 404 | 503), "{unknown:?}");
    };
    throughout(Duration::from_secs(3), || {
        servers.iter().for_each(asks);
        most = most.max(count());
    });
    report(&format!("{INSTANCES} instances where {FEW} connections are allowed: at most {most}"));
    assert!((1..=FEW).contains(&most), "{most}");
    limit(-1);
    let healed = time::monotonic();
    let mut most = 0;
    for server in &servers {
        eventually(BACK, "it is ready", || {
            most = most.max(count());
            server.get("/readyz?require=store").status == 200 && server.get("/unknown").status == 404
        });
    }
    let back = time::monotonic().duration_since(healed);
    report(&format!("all allowed: at most {most} connections, all are ready after {back:?}"));
    assert!(back <= BACK, "{back:?}");
    throughout(Duration::from_secs(1), || {
        servers.iter().for_each(asks);
        most = most.max(count());
    });
    assert!(most <= INSTANCES * (POOL + BESIDE), "{most}");
}
