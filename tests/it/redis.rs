//! Redis, with real servers: every form of URL, what is garbage, and what goes wrong. Answers are right or none.

use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use proptest::prelude::{Just, Strategy, any, prop_oneof};
use proptest::test_runner::{Config, TestRunner};
use tokio::runtime::Runtime;
use waypost::breaker::State;
use waypost::config::{self, ServiceUrl};
use waypost::domain::time::{self, UnixMillis};
use waypost::guard::limits::{Caller, GCRA_LUA, Limiter, Verdict, gcra};
use waypost::redis::{Hints, Lost, Redis, VALUE_BYTES_MAX, WRITES_MAX, limits};

use crate::servers::redis::{Cluster, Redis as Server, Sentinel};
use crate::support::eventually;

const LIMIT: Duration = Duration::from_secs(20);
/// Of a command; ample, so that a busy machine fails no test.
const TIMEOUT: Duration = Duration::from_secs(1);
/// So much earlier than at a time-out one gives up, since timers are late.
const TIMER: Duration = Duration::from_millis(2);
const FAILURES: u32 = 3;
const RECOVERY: Duration = Duration::from_millis(300);
const LOOPBACK: &str = "127.0.0.1";

fn settings(url: &str) -> config::Redis {
    config::Redis {
        url: ServiceUrl::new(url.to_owned()),
        ca_file: None,
        timeout: TIMEOUT,
        ttl: Duration::from_secs(600),
        prefix: "t:".to_owned(),
    }
}

/// A client with a runtime of its own.
struct Client {
    runtime: Runtime,
    redis: Redis,
}

impl Client {
    fn new(settings: &config::Redis) -> Self {
        let runtime = Runtime::new().unwrap();
        let _entered = runtime.enter();
        let redis = Redis::open(settings, config::Breaker { failures: FAILURES, recovery: RECOVERY }).unwrap();
        Self { runtime, redis }
    }

    fn of(url: &str) -> Self {
        let client = Self::new(&settings(url));
        client.wait_until_it_answers();
        client
    }

    fn get(&self, keys: &[&str]) -> Option<Vec<Option<String>>> {
        let keys: Vec<_> = keys.iter().map(|key| key.as_bytes().to_vec()).collect();
        let values = self.runtime.block_on(self.redis.get_many(&keys))?;
        Some(values.into_iter().map(|value| value.map(|bytes| String::from_utf8(bytes).unwrap())).collect())
    }

    fn set(&self, key: &str, value: &str) {
        self.redis.set(key.into(), value.into());
    }

    #[track_caller]
    fn wait_until_it_answers(&self) {
        eventually(LIMIT, "it answers", || self.get(&["t:none"]).is_some());
    }

    /// Writes until it can be read: a write is dropped while Redis is away.
    #[track_caller]
    fn wait_until_it_keeps(&self, key: &str, value: &str) {
        eventually(LIMIT, "it keeps what is written", || {
            self.set(key, value);
            self.get(&[key]) == Some(vec![Some(value.to_owned())])
        });
    }

    fn hints(&self) -> Result<Hints, Lost> {
        self.runtime.block_on(self.redis.hints())
    }

    #[track_caller]
    fn hint(&self, hints: &mut Hints) -> Result<(), Lost> {
        self.runtime.block_on(async { tokio::time::timeout(LIMIT, hints.next()).await }).expect("it ends")
    }

    fn limit(&self, limiter: &Limiter, caller: Caller) -> Verdict {
        self.runtime.block_on(limits::check(Some(&self.redis), limiter, caller, None, time::now()))
    }
}

fn remaining(verdict: Verdict) -> Option<u32> {
    match verdict {
        Verdict::Allowed { remaining, .. } => Some(remaining),
        Verdict::Refused { .. } | Verdict::Unlimited => None,
    }
}

/// All that a client does, over this URL.
#[track_caller]
fn check(settings: &config::Redis) {
    let client = Client::new(settings);
    client.wait_until_it_answers();
    client.wait_until_it_keeps("t:a", "one");
    let mut hints = client.hints().unwrap();
    client.redis.set("t:b".into(), "two".into());
    client.redis.publish(b"7".to_vec());
    client.hint(&mut hints).unwrap();
    // The hint came behind the writes.
    let want = ["two", "", "one", "two"].map(|value| (!value.is_empty()).then(|| value.to_owned()));
    assert_eq!(client.get(&["t:b", "t:none", "t:a", "t:b"]), Some(want.to_vec()));
    let limiter = Limiter::new(1, Some(3), 10);
    let ann = Caller::V4(1);
    assert_eq!([(); 4].map(|()| remaining(client.limit(&limiter, ann))), [Some(2), Some(1), Some(0), None]);
    assert_eq!(remaining(client.limit(&limiter, Caller::of_key("\u{1}\0{}"))), Some(2));
    assert_eq!(limiter.entries(), 0, "all of it was counted in Redis");
    let figures = client.redis.figures();
    assert_eq!((figures.state, figures.garbage, figures.timeouts), (State::Closed, 0, 0));
}

#[test]
fn every_form_of_one_server() {
    let plain = Server::start();
    let socket = plain.socket();
    let socket = socket.to_str().unwrap();
    check(&settings(&plain.url()));
    plain.cli(&["flushall"]);
    check(&settings(&format!("redis+unix://{socket}")));
    plain.cli(&["flushall"]);
    check(&settings(&format!("unix://{socket}?db=3")));
    assert_eq!(plain.cli(&["dbsize"]), "0", "it was in database 3");

    let guarded = Server::start();
    guarded.cli(&["acl", "setuser", "ann", "on", ">pass", "~t:*", "&t:*", "+@all"]);
    guarded.cli(&["config", "set", "requirepass", "s3cret/@:word"]);
    let address = guarded.address();
    check(&settings(&format!("redis://:s3cret%2F%40%3Aword@{address}/2")));
    check(&settings(&format!("redis://ann:pass@{address}")));
    let wrong = Client::new(&settings(&format!("redis://:wrong@{address}")));
    eventually(LIMIT, "it is left alone", || wrong.get(&["t:a"]).is_none() && wrong.redis.figures().opened > 0);
}

#[test]
fn tls_is_checked() {
    let [server, other] = [(); 2].map(|()| Server::with_tls());
    let with = |ca_file: &Path| config::Redis { ca_file: Some(ca_file.to_owned()), ..settings(&server.url()) };
    check(&with(server.ca_file()));
    let stranger = Client::new(&with(other.ca_file()));
    eventually(LIMIT, "it is left alone", || {
        assert_eq!(stranger.get(&["t:a"]), None);
        stranger.redis.figures().opened > 0
    });
    let key = server.ca_file().with_file_name("server.key");
    let broken = Redis::open(&with(&key), config::Breaker { failures: 1, recovery: RECOVERY });
    assert!(broken.err().unwrap().to_string().contains("server.key cannot be used: it has no certificate"));
}

#[test]
fn garbage_is_a_miss_of_its_key_alone() {
    let server = Server::start();
    let client = Client::of(&server.url());
    let longest = "x".repeat(VALUE_BYTES_MAX);
    client.wait_until_it_keeps("t:good", &longest);
    server.cli(&["rpush", "t:list", "x"]);
    server.cli(&["setrange", "t:huge", &(100_usize << 20).to_string(), "x"]);
    server.cli(&["set", "t:empty", ""]);
    server.cli(&["set", "t:number", "12"]);
    let keys = ["t:list", "t:good", "t:huge", "t:empty", "t:number", "t:good"];
    let want = [None, Some(longest.as_str()), None, None, Some("12"), Some(longest.as_str())];
    let want: Vec<_> = want.iter().map(|value| value.map(str::to_owned)).collect();
    let before = client.redis.figures();
    assert_eq!(client.get(&keys).as_ref(), Some(&want));
    let after = client.redis.figures();
    assert_eq!((after.hits - before.hits, after.misses - before.misses, after.garbage - before.garbage), (3, 1, 2));
    // A value that nobody could read again is not written.
    client.redis.set("t:long".into(), vec![0; VALUE_BYTES_MAX + 1]);
    assert_eq!(client.redis.figures().dropped, before.dropped + 1);
    // Not one of a hundred is sent whole: together they would be 10 GB.
    let begun = time::monotonic();
    assert_eq!(client.get(&["t:huge"; 100]), Some(vec![None; 100]));
    assert!(begun.elapsed() < TIMEOUT);
    // With the last handle its connection ends, though its runtime goes on.
    let connected = |count: u32| server.cli(&["info", "clients"]).contains(&format!("connected_clients:{count}\r\n"));
    let Client { runtime: _runtime, redis: other } = Client::of(&server.url());
    eventually(LIMIT, "both are connected, and who asks", || connected(3));
    drop(other);
    eventually(LIMIT, "one is left", || connected(2));
    // Keys of ours under a script too.
    server.cli(&["rpush", "t:r:4:00000001", "x"]);
    let limiter = Limiter::new(60, Some(2), 10);
    assert_eq!(remaining(client.limit(&limiter, Caller::V4(1))), Some(1));
    assert_eq!(remaining(client.limit(&limiter, Caller::V4(1))), Some(0));
    let ttl: u64 = server.cli(&["pttl", "t:r:4:00000001"]).trim().parse().unwrap();
    assert!((1..=2000).contains(&ttl), "{ttl} ms");
    let ttl: u64 = server.cli(&["pttl", "t:good"]).trim().parse().unwrap();
    assert!((530_000..=600_000).contains(&ttl), "{ttl} ms");
}

/// A server that refuses is not away: each refusal is an error that is counted.
#[test]
fn refusals_are_answers() {
    let server = Server::start();
    let client = Client::of(&server.url());
    client.wait_until_it_keeps("t:a", "one");
    server.cli(&["acl", "setuser", "default", "-getrange"]);
    let before = client.redis.figures();
    for _ in 0..2 * FAILURES {
        assert_eq!(client.get(&["t:a", "t:b"]), Some(vec![None, None]));
    }
    let after = client.redis.figures();
    assert_eq!((after.errors - before.errors, after.opened - before.opened), (u64::from(4 * FAILURES), 0));
    assert_eq!(after.garbage, before.garbage);
    server.cli(&["acl", "setuser", "default", "+getrange"]);
    assert_eq!(client.get(&["t:a"]), Some(vec![Some("one".to_owned())]));
}

#[test]
fn a_frozen_server_costs_each_call_its_time_out_and_then_nothing() {
    let timeout = Duration::from_millis(50);
    let recovery = Duration::from_secs(2);
    let server = Server::start();
    let runtime = Runtime::new().unwrap();
    let redis = {
        let _entered = runtime.enter();
        let settings = config::Redis { timeout, ..settings(&server.url()) };
        Redis::open(&settings, config::Breaker { failures: FAILURES, recovery }).unwrap()
    };
    let client = Client { runtime, redis };
    client.wait_until_it_answers();
    eventually(LIMIT, "no failure is in a row with ours", || client.get(&["t:a"]).is_some());

    server.freeze();
    let limiter = Limiter::new(60, Some(2), 10);
    for n in 0..FAILURES {
        let begun = time::monotonic();
        assert_eq!(client.get(&["t:a", "t:b"]), None);
        let took = begun.elapsed();
        // What is beyond is the scheduler's: the machine may be busy.
        assert!(took >= timeout - TIMER && took < timeout + Duration::from_millis(200), "call {n} took {took:?}");
    }
    assert_eq!(client.redis.figures().state, State::Open);
    let opened = time::monotonic();
    let mut calls = 0;
    while calls < 1000 && opened.elapsed() < recovery / 2 {
        assert_eq!(client.get(&["t:a"]), None);
        calls += 1;
    }
    assert_eq!(calls, 1000, "they waited");
    // Neither open nor closed.
    assert_eq!([(); 3].map(|()| remaining(client.limit(&limiter, Caller::V4(1)))), [Some(1), Some(0), None]);
    assert_eq!(limiter.entries(), 1);
    let dropped = client.redis.figures().dropped;
    client.set("t:a", "one");
    eventually(LIMIT, "the write is dropped", || client.redis.figures().dropped > dropped);

    server.thaw();
    client.wait_until_it_keeps("t:a", "two");
    let figures = client.redis.figures();
    assert!(figures.timeouts >= u64::from(FAILURES), "{figures:?}");
    assert_eq!(figures.state, State::Closed);
}

#[test]
fn a_flood_of_writes_is_bounded() {
    let server = Server::start();
    let client = Client::of(&server.url());
    server.freeze();
    let writes = 4 * WRITES_MAX as u64;
    (0..writes).for_each(|n| client.redis.set(format!("t:{n}").into_bytes(), b"x".to_vec()));
    // What the task took up meanwhile is dropped one by one, too.
    let dropped = client.redis.figures().dropped;
    assert!((writes / 2..writes).contains(&dropped), "{dropped} of {writes} were dropped");
    server.thaw();
    client.wait_until_it_keeps("t:a", "one");
}

#[test]
fn a_server_that_dies_and_comes_back_and_forgets() {
    let mut server = Server::start();
    let client = Client::of(&server.url());
    client.wait_until_it_keeps("t:a", "one");
    let limiter = Limiter::new(1, Some(10), 10);
    assert_eq!(remaining(client.limit(&limiter, Caller::V4(1))), Some(9));
    let mut hints = client.hints().unwrap();

    server.cli(&["script", "flush"]);
    assert_eq!(remaining(client.limit(&limiter, Caller::V4(1))), Some(8), "the script is sent again");
    server.cli(&["flushall"]);
    assert_eq!(client.get(&["t:a"]), Some(vec![None]));

    server.kill();
    assert!(client.hint(&mut hints).is_err());
    assert!(client.hints().is_err());
    eventually(LIMIT, "it is left alone", || {
        assert_eq!(client.get(&["t:a"]), None);
        client.redis.figures().state != State::Closed
    });
    server.restart();
    client.wait_until_it_keeps("t:a", "two");
    let mut hints = client.hints().unwrap();
    client.redis.publish(b"x".to_vec());
    client.hint(&mut hints).unwrap();
    assert_eq!(remaining(client.limit(&limiter, Caller::V4(1))), Some(9), "Redis has forgotten, and counts");
    assert_eq!(limiter.entries(), 0);
}

#[test]
fn a_silent_subscription_is_asked_whether_it_lives() {
    let server = Server::start();
    let client = Client::of(&server.url());
    let mut hints = client.hints().unwrap();
    // Longer than the time between two questions: the answers are no hints.
    let idle = Duration::from_secs(6);
    let early = client.runtime.block_on(async { tokio::time::timeout(idle, hints.next()).await });
    assert!(early.is_err(), "{early:?}");
    client.redis.publish(b"x".to_vec());
    client.hint(&mut hints).unwrap();
    server.freeze();
    assert!(client.hint(&mut hints).is_err());
}

#[test]
fn a_read_only_server_is_left_for_another() {
    let server = Server::start();
    let client = Client::of(&server.url());
    server.cli(&["replicaof", LOOPBACK, "1"]);
    let errors = client.redis.figures().errors;
    client.set("t:a", "one");
    eventually(LIMIT, "the write fails", || client.redis.figures().errors > errors);
    server.cli(&["replicaof", "no", "one"]);
    client.wait_until_it_keeps("t:a", "two");
}

/// Twice the same arithmetic: for any calls at any times, in Lua on a real server and in Rust.
#[test]
fn the_script_is_the_twin_of_gcra() {
    let server = Server::start();
    let client = ::redis::Client::open(server.url()).unwrap();
    let mut connection = None;
    eventually(LIMIT, "it answers", || {
        connection = client.get_connection().ok();
        connection.is_some()
    });
    let mut connection = connection.unwrap();
    // Time is given, so that nothing may expire by the server's own.
    let script = ::redis::Script::new(&format!(
        "local now, interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])\n\
         local real = redis\n\
         local redis = {{ pcall = real.pcall, call = function(name, key, value) return real.call(name, key, value) end }}\n\
         {GCRA_LUA}"
    ));
    let mut call = |now: i64, interval: i64, burst: u32| -> (i64, i64, i64) {
        let (tat, now): (i64, i64) = script.key("k").arg(now).arg(interval).arg(burst).invoke(&mut connection).unwrap();
        let next: i64 = ::redis::cmd("GET").arg("k").query(&mut connection).unwrap();
        (tat, now, next)
    };
    let step = prop_oneof![
        4 => (0_i64..3_000).prop_map(|thousandths| thousandths),
        1 => -100_000_i64..0,
        1 => Just(0),
        1 => any::<i32>().prop_map(i64::from),
    ];
    let calls = proptest::collection::vec((step, any::<proptest::sample::Index>()), 1..40);
    let cases = (1_i64..60_000_000, 1_u32..2000, 1_u32..5, calls);
    let mut flush = ::redis::Client::open(server.url()).unwrap().get_connection().unwrap();
    let call = std::cell::RefCell::new(&mut call);
    let flush = std::cell::RefCell::new(&mut flush);
    let mut runner = TestRunner::new(Config { cases: 100, failure_persistence: None, ..Config::default() });
    runner
        .run(&cases, |(interval, burst, other, calls)| {
            ::redis::cmd("FLUSHALL").exec(*flush.borrow_mut()).unwrap();
            let mut now = 1_800_000_000_000_000;
            let mut tat = None;
            for (step, which) in calls {
                now += step * interval / 1000;
                // Now and then the rate is another one.
                let burst = if which.index(5) == 0 { other } else { burst };
                let (verdict, next) = gcra(tat, now, interval, burst);
                let (found, at, stored) = (call.borrow_mut())(now, interval, burst);
                assert_eq!((stored, at), (next, now));
                assert_eq!(gcra(Some(found), at, interval, burst), (verdict, next));
                tat = Some(next);
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn what_is_no_time_is_written_over() {
    let server = Server::start();
    let client = Client::of(&server.url());
    let limiter = Limiter::new(60, Some(2), 10);
    for (caller, (value, want)) in [
        ("x", Some(1)),
        ("", Some(1)),
        ("nan", Some(1)),
        ("-inf", Some(1)),
        ("-5", Some(1)),
        ("inf", None),
        ("1e300", None),
    ]
    .into_iter()
    .enumerate()
    {
        server.cli(&["set", &format!("t:r:4:{caller:08x}"), value]);
        let caller = Caller::V4(u32::try_from(caller).unwrap());
        assert_eq!(remaining(client.limit(&limiter, caller)), want, "{value:?}");
        assert_eq!(limiter.check_at(caller, 0, UnixMillis(0)), Verdict::Unlimited);
    }
    assert_eq!(limiter.entries(), 0);
}

#[test]
fn sentinel_names_the_next_master() {
    let mut all = Sentinel::start();
    all.guard("pass");
    // The first of the sentinels is away.
    let url = all.url().replace("://", &format!("://:pass@{LOOPBACK}:1,"));
    check(&settings(&url));
    let client = Client::of(&url);
    client.wait_until_it_keeps("t:a", "one");
    all.servers[0].kill();
    client.wait_until_it_keeps("t:b", "two");
    assert_eq!(all.servers[1].cli(&["-a", "pass", "--no-auth-warning", "get", "t:b"]), "two");
    let mut hints = client.hints().unwrap();
    client.redis.publish(b"x".to_vec());
    client.hint(&mut hints).unwrap();
}

#[test]
fn a_cluster_answers_right_or_not_at_all() {
    let mut cluster = Cluster::start();
    for node in &cluster.nodes {
        assert_eq!(node.cli(&["config", "set", "cluster-require-full-coverage", "no"]), "OK");
    }
    let addresses: Vec<String> = cluster.nodes.iter().map(|node| node.address().to_string()).collect();

    // One of the nodes that the URL names is away.
    let url = format!("redis+cluster://{LOOPBACK}:1,{},{}", addresses[1], addresses[2]);
    check(&settings(&url));
    let client = Client::of(&url);
    let values: HashMap<String, String> = (0..1000).map(|n| (format!("t:l:0:{n}"), format!("value {n}"))).collect();
    let keys: Vec<&str> = values.keys().map(String::as_str).collect();
    // Right or a miss; how many are right.
    let right = || {
        let found = client.get(&keys).unwrap_or_else(|| vec![None; keys.len()]);
        for (key, value) in keys.iter().zip(&found) {
            assert!(value.as_ref().is_none_or(|value| *value == values[*key]), "{key}: {value:?}");
        }
        found.iter().flatten().count()
    };
    values.iter().for_each(|(key, value)| client.redis.set(key.clone().into(), value.clone().into()));
    eventually(LIMIT, "all are there", || right() == keys.len());

    let id = |server: &Server| server.cli(&["cluster", "myid"]);
    let (from, to) = (id(&cluster.nodes[0]), id(&cluster.nodes[1]));
    let mut reshard = Command::new("redis-cli")
        .args(["--cluster", "reshard", &addresses[0], "--cluster-from", &from, "--cluster-to", &to])
        .args(["--cluster-slots", "300", "--cluster-yes"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let (mut rounds, mut least) = (0, keys.len());
    let status = loop {
        least = least.min(right());
        rounds += 1;
        if let Some(status) = reshard.try_wait().unwrap() {
            break status;
        }
    };
    assert!(status.success(), "reshard: {status}");
    assert!(rounds > 10 && least > keys.len() * 8 / 10, "{rounds} rounds, at least {least} right");
    eventually(LIMIT, "all are there", || right() == keys.len());
    let copied =
        || cluster.nodes[3..].iter().all(|server| server.cli(&["info", "replication"]).contains("link_status:up"));
    eventually(LIMIT, "the replicas follow", copied);

    // One that is frozen costs its own keys alone, and after some time-outs they cost nothing either. It is too short
    // for the cluster to notice.
    cluster.nodes[1].freeze();
    for _ in 0..FAILURES {
        assert!(right() > 0);
    }
    eventually(LIMIT, "it is given up", || {
        let begun = time::monotonic();
        assert!(right() > 0);
        begun.elapsed() < TIMEOUT / 2
    });
    cluster.nodes[1].thaw();
    eventually(LIMIT, "all are there", || right() == keys.len());
    assert_eq!(client.redis.figures().opened, 0);

    cluster.nodes[2].kill();
    let begun = time::monotonic();
    let least = right();
    assert!(begun.elapsed() < TIMEOUT * 2 && least > 0, "{least} right in {:?}", begun.elapsed());
    eventually(LIMIT, "a replica has taken over", || right() == keys.len());
    let mut hints = client.hints().unwrap();
    client.redis.publish(b"x".to_vec());
    client.hint(&mut hints).unwrap();
}
