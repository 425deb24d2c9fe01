//! Two instances on one database: what one does shows on the other, soon, and nothing old comes back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;
use waypost::domain::target::Target;
use waypost::domain::time;
use waypost::store::row::{Change, Patch};

use crate::servers::deployment::{Deployment, Way};
use crate::servers::redis::Redis;
use crate::support::{Client, Direct, LIMIT, Server, eventually};

/// How soon a change shows, if a message tells of it: p99.
pub(crate) const SOON: Duration = Duration::from_millis(100);
/// And at the latest, if none does.
const LATEST: Duration = Duration::from_secs(1);

/// A status and where it leads.
pub(crate) type Outcome = (u16, Option<String>);

pub(crate) fn target(version: u32) -> String {
    format!("https://example.com/{version}")
}

pub(crate) fn leads(version: u32) -> Outcome {
    (307, Some(target(version)))
}

const GONE: Outcome = (410, None);
const UNKNOWN: Outcome = (404, None);

fn get(client: &mut Client, code: &str) -> Outcome {
    let answer = client.get(&format!("/{code}"));
    (answer.status, answer.location().map(str::to_owned))
}

pub(crate) fn edit(version: u32) -> Change {
    let target = target(version);
    let target = Some((target.clone(), Target::new(&target).unwrap()));
    Change::Edit(Box::new(Patch { target, ..Patch::default() }))
}

/// The section of a configuration.
pub(crate) fn redis_section(redis: &Redis) -> String {
    format!("[redis]\nurl = \"{}\"\n", redis.url())
}

/// Connections to each of some instances, so many that all workers are met.
pub(crate) struct Onlookers(Vec<Vec<Client>>);

impl Onlookers {
    pub(crate) fn of(servers: &[&Server]) -> Self {
        Self(servers.iter().map(|server| (0..3).map(|_| server.connect()).collect()).collect())
    }

    /// Asks every connection to the instances `which` for `code` until all see `new`, and how long that took for each of
    /// them; before an instance does, it may say `old`, and then never again.
    #[track_caller]
    pub(crate) fn see(&mut self, which: &[usize], code: &str, old: &Outcome, new: &Outcome) -> Vec<Duration> {
        let done = time::monotonic();
        let mut seen = vec![false; self.0.len()];
        let mut took = vec![None; self.0.len()];
        eventually(LIMIT, &format!("{code}: {new:?} after {old:?}"), || {
            for &number in which {
                let (mut all, seen) = (true, &mut seen[number]);
                for client in &mut self.0[number] {
                    let outcome = get(client, code);
                    let is_new = outcome == *new;
                    assert!(is_new || outcome == *old, "{code}: neither {old:?} nor {new:?}: {outcome:?}");
                    assert!(is_new || !*seen, "{code}: {old:?} came after {new:?}");
                    *seen |= is_new;
                    all &= is_new;
                }
                if all && took[number].is_none() {
                    took[number] = Some(time::monotonic().duration_since(done));
                }
            }
            which.iter().all(|number| took[*number].is_some())
        });
        // The next look would find what came back.
        for &number in which {
            self.0[number].iter_mut().for_each(|client| assert_eq!(get(client, code), *new));
        }
        took.into_iter().flatten().collect()
    }
}

/// The p99 and the maximum of what was measured, which are printed.
pub(crate) fn figures(took: &mut [Duration], what: &str) -> (Duration, Duration) {
    took.sort_unstable();
    let (median, p99) = (took[took.len() / 2], took[took.len() * 99 / 100]);
    let max = *took.last().unwrap();
    #[expect(clippy::print_stdout, reason = "the figure is what the test is about")]
    {
        println!("{what}: {} changes: median {median:?}, p99 {p99:?}, at most {max:?}", took.len());
    }
    (p99, max)
}

/// Two instances, and who looks at them.
struct Twins {
    servers: [Server; 2],
    onlookers: Onlookers,
    store: Direct,
    /// How long each change took to show on each instance.
    took: Vec<Duration>,
}

impl Twins {
    fn new(deployment: &Deployment) -> Self {
        let servers = ["one", "other"].map(|name| deployment.instance(name));
        let onlookers = Onlookers::of(&servers.each_ref());
        let store = deployment.store();
        Self { servers, onlookers, store, took: Vec::new() }
    }

    #[track_caller]
    fn shows(&mut self, code: &str, old: &Outcome, new: &Outcome) {
        self.took.extend(self.onlookers.see(&[0, 1], code, old, new));
    }

    fn change(&mut self, code: &str, change: Change, old: &Outcome, new: &Outcome) {
        self.store.change(code, change);
        self.shows(code, old, new);
    }

    /// Everything that can happen to a code: six changes.
    fn life(&mut self, code: &str) {
        let (gone, unknown) = (GONE, UNKNOWN);
        for clients in &mut self.onlookers.0 {
            clients.iter_mut().for_each(|client| assert_eq!(get(client, code), unknown));
        }
        let body = json!({"original_url": target(1), "custom_code": code});
        assert_eq!(self.servers[0].shorten(&body).status, 201);
        // Whoever made it sees it at once.
        assert_eq!(get(&mut self.onlookers.0[0][0], code), leads(1));
        self.shows(code, &unknown, &leads(1));
        self.change(code, edit(2), &leads(1), &leads(2));
        self.change(code, Change::Disable, &leads(2), &gone);
        self.change(code, Change::Enable, &gone, &leads(2));
        self.change(code, Change::Delete, &leads(2), &gone);
        self.store.add(code, &target(3), |_| {});
        self.shows(code, &gone, &leads(3));
    }
}

#[test]
fn a_change_shows_on_the_other_instance_at_once() {
    let redis = Redis::start();
    let with = redis_section(&redis);
    for (way, config) in [(Way::Straight, ""), (Way::Straight, &with), (Way::Pooled, ""), (Way::Pooled, &with)] {
        let deployment = Deployment::new(way, config);
        let mut twins = Twins::new(&deployment);
        redis.cli(&["FLUSHALL"]);
        for number in 0..36 {
            twins.life(&format!("code-{number}"));
        }
        let what = format!("{way:?}, {} Redis", if config.is_empty() { "without" } else { "with" });
        let (p99, _) = figures(&mut twins.took, &what);
        assert!(p99 <= SOON, "{what}: p99 {p99:?}");
    }
}

/// Ends connections that listen as soon as there are any; how many there were.
fn deafen(deployment: &Deployment, over: &AtomicBool) -> u32 {
    let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
               WHERE datname = current_database() AND query LIKE 'LISTEN%'";
    let mut ended = 0;
    while !over.load(Ordering::SeqCst) {
        ended += deployment.database.sql(sql).parse::<u32>().unwrap();
    }
    ended
}

#[test]
fn a_change_shows_within_a_second_when_nobody_tells_of_it() {
    let mut redis = Redis::start();
    let with = redis_section(&redis);
    let (alone, killed) = (Deployment::new(Way::PooledAlone, ""), Deployment::new(Way::Straight, &with));

    let mut twins = Twins::new(&alone);
    (0..3).for_each(|number| twins.life(&format!("code-{number}")));
    let (_, max) = figures(&mut twins.took, "pooled alone");
    assert!(max <= LATEST, "{max:?}");

    let mut twins = Twins::new(&killed);
    redis.kill();
    let over = AtomicBool::new(false);
    let ended = std::thread::scope(|scope| {
        let deafening = scope.spawn(|| deafen(&killed, &over));
        let lives = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            (0..3).for_each(|number| twins.life(&format!("code-{number}")));
        }));
        over.store(true, Ordering::SeqCst);
        lives.unwrap();
        deafening.join().unwrap()
    });
    assert!(ended >= 2, "{ended} connections were ended: none listened");
    let (_, max) = figures(&mut twins.took, "Redis killed, no connection that listens");
    assert!(max <= LATEST, "{max:?}");
}

/// A value that was true once lies in Redis again, with the position that it was true at.
#[test]
fn an_old_value_in_redis_is_never_served() {
    let redis = Redis::start();
    let deployment = Deployment::new(Way::Straight, &redis_section(&redis));
    let store = deployment.store();
    let codes: Vec<String> = (0..30).map(|number| format!("code-{number}")).collect();
    codes.iter().for_each(|code| store.add(code, &target(1), |_| {}));
    let names: Vec<String> = codes.iter().map(|code| format!("waypost:l:0:{code}")).collect();
    let server = deployment.instance("one");
    let mut client = server.connect();
    codes.iter().for_each(|code| assert_eq!(get(&mut client, code), leads(1)));
    let there = || names.iter().all(|name| redis.cli(&["EXISTS", name]) == "1");
    eventually(LIMIT, "all are in Redis", there);
    names.iter().for_each(|name| assert_eq!(redis.cli(&["COPY", name, &format!("kept:{name}")]), "1"));

    let want = |number: usize| [leads(2), GONE, GONE, leads(3)][number % 4].clone();
    for (number, code) in codes.iter().enumerate() {
        let changes: &[Change] = match number % 4 {
            0 => &[edit(2)],
            1 => &[Change::Disable],
            2 => &[Change::Delete],
            _ => &[edit(2), edit(3)],
        };
        changes.iter().for_each(|change| store.change(code, change.clone()));
    }
    let check = |client: &mut Client, when: &str| {
        for (number, code) in codes.iter().enumerate() {
            assert_eq!(get(client, code), want(number), "{code}, {when}");
        }
    };
    let put_back = || {
        names.iter().for_each(|name| assert_eq!(redis.cli(&["COPY", &format!("kept:{name}"), name, "REPLACE"]), "1"));
    };
    let last = codes.last().unwrap();
    eventually(LIMIT, "the last change shows", || get(&mut client, last) == want(codes.len() - 1));
    check(&mut client, "in memory");
    put_back();
    check(&mut client, "in memory, with old values in Redis");
    server.kill();
    for (name, when) in [("one", "started again"), ("other", "of a new instance")] {
        put_back();
        let server = deployment.instance(name);
        let mut client = server.connect();
        check(&mut client, when);
        // They were read, and not believed.
        let hits = server.metric("waypost_redis_reads_total", &["outcome=\"hit\""]);
        assert!(hits >= codes.len() as f64, "{when}: Redis was asked for {hits} only");
        assert_eq!(server.metric("waypost_redirects_total", &["tier=\"redis\""]), 0.0, "{when}");
        eventually(LIMIT, "the true ones are in Redis", || {
            names.iter().all(|name| redis.cli(&["GET", name]) != redis.cli(&["GET", &format!("kept:{name}")]))
        });
        server.kill();
    }
    // What is true is believed: the third instance has all of it from Redis.
    let server = deployment.instance("third");
    check(&mut server.connect(), "from Redis");
    let from_redis = server.metric("waypost_redirects_total", &["tier=\"redis\""]);
    assert!(from_redis >= (codes.len() / 2) as f64, "{from_redis} of {} came from Redis", codes.len());
}

/// Two deployments that a person forgot to give prefixes of their own, or the second life of a database.
#[test]
fn a_value_of_another_store_is_never_served() {
    let redis = Redis::start();
    let [one, other] = [(); 2].map(|()| Deployment::new(Way::Straight, &redis_section(&redis)));
    // Positions of the first are ahead of the other's.
    let store = one.store();
    (0..20).for_each(|number| store.add(&format!("more-{number}"), &target(9), |_| {}));
    store.add("code", &target(1), |_| {});
    other.store().add("code", &target(2), |_| {});
    let server = one.instance("one");
    eventually(LIMIT, "its value is in Redis", || {
        assert_eq!(get(&mut server.connect(), "code"), leads(1));
        redis.cli(&["EXISTS", "waypost:l:0:code"]) == "1"
    });
    let server = other.instance("other");
    assert_eq!(get(&mut server.connect(), "code"), leads(2), "it came from the other store");
    assert_eq!(server.metric("waypost_redis_reads_total", &["outcome=\"hit\""]), 1.0, "Redis was not asked");
}
