//! Redis goes wrong, and the whole server goes on: hits as ever, misses a little later at first, no answer wrong, and
//! Postgres is asked once for each code.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;
use waypost::domain::key::DomainId;
use waypost::domain::time;

use crate::servers::deployment::{Deployment, Way};
use crate::servers::redis::{Cluster, Redis, Sentinel};
use crate::support::{Client, Direct, LIMIT, Server, eventually, key, throughout};

/// What a miss may take longer than without Redis, until it is known that Redis is away.
const SLOWER_MAX: Duration = Duration::from_millis(20);
const RECOVERY: Duration = Duration::from_secs(1);
/// More than by default, so that there is something to measure until the breaker opens.
const FAILURES: usize = 30;
/// What everybody asks for all the time.
const WARM: usize = 20;
/// What is asked for the first time in each phase.
const COLD: usize = 100;

fn code(number: usize) -> String {
    format!("code-{number}")
}

fn target(number: usize) -> String {
    format!("https://example.com/{number}")
}

/// Where a link is in Redis.
fn name(number: usize) -> String {
    format!("waypost:l:0:{}", code(number))
}

fn config(url: &str) -> String {
    let recovery_ms = RECOVERY.as_millis();
    format!("[redis]\nurl = \"{url}\"\n[breaker]\nfailures = {FAILURES}\nrecovery = \"{recovery_ms}ms\"\n")
}

/// A deployment of this many links.
fn deployment(config: &str, links: usize) -> Deployment {
    let deployment = Deployment::new(Way::Straight, config);
    let all = (0..links).map(|number| (key(DomainId(0), &code(number)), Direct::fields(&target(number))));
    deployment.store().add_all(all.collect());
    deployment
}

/// Asks for these links, one after the other; each answer must be right.
#[track_caller]
fn ask(client: &mut Client, numbers: impl IntoIterator<Item = usize>) -> Latencies {
    let one = |number| {
        let begun = time::monotonic();
        let answer = client.get(&format!("/{}", code(number)));
        let took = time::monotonic().duration_since(begun);
        assert_eq!((answer.status, answer.location()), (307, Some(target(number).as_str())), "link {number}");
        took
    };
    Latencies(numbers.into_iter().map(one).collect())
}

struct Latencies(Vec<Duration>);

impl Latencies {
    /// One that so many of a hundred are no slower than.
    fn percentile(&self, percent: usize) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        sorted[(sorted.len() - 1) * percent / 100]
    }

    fn median(&self) -> Duration {
        self.percentile(50)
    }

    fn max(&self) -> Duration {
        self.percentile(100)
    }
}

#[expect(clippy::print_stdout, reason = "the figures are what the test is about")]
fn print(what: &str, figures: &[(&str, &Latencies)]) {
    for (of, latencies) in figures {
        let (median, p99, max) = (latencies.median(), latencies.percentile(99), latencies.max());
        println!("{what}: {of} ({}): median {median:?}, p99 {p99:?}, at most {max:?}", latencies.0.len());
    }
}

/// How late a timer of [`SLOWER_MAX`] goes off: that is the machine's, which does other things, too.
fn lateness() -> Duration {
    let begun = time::monotonic();
    let (_sender, nothing) = std::sync::mpsc::sync_channel::<()>(0);
    assert!(nothing.recv_timeout(SLOWER_MAX).is_err());
    time::monotonic().duration_since(begun).saturating_sub(SLOWER_MAX)
}

/// Asks for cold links until Redis is left alone, with a pause before each. How late each pause ended comes with it.
fn until_left_alone(
    server: &Server,
    client: &mut Client,
    numbers: &mut impl Iterator<Item = usize>,
) -> (Latencies, Latencies) {
    let (mut took, mut late) = (Vec::new(), Vec::new());
    while !is_degraded(server)
        && let Some(number) = numbers.next()
    {
        late.push(lateness());
        took.extend(ask(client, [number]).0);
    }
    (Latencies(took), Latencies(late))
}

fn breaker(server: &Server) -> f64 {
    server.metric("waypost_breaker_state", &["dependency=\"redis\""])
}

fn reads(server: &Server, outcome: &str) -> f64 {
    server.metric("waypost_redis_reads_total", &[&format!("outcome=\"{outcome}\"")])
}

fn from(server: &Server, tier: &str) -> f64 {
    server.metric("waypost_redirects_total", &[&format!("tier=\"{tier}\"")])
}

fn is_degraded(server: &Server) -> bool {
    let ready = server.get("/readyz");
    assert_eq!(ready.status, 200, "{ready:?}");
    let degraded = &ready.json()["degraded"];
    assert!(*degraded == json!([]) || *degraded == json!(["redis"]), "{ready:?}");
    *degraded == json!(["redis"])
}

/// Asks for warm links until `over`.
fn hit(server: &Server, over: &AtomicBool) -> Latencies {
    let mut client = server.connect();
    let mut all = Vec::new();
    loop {
        all.extend(ask(&mut client, 0..WARM).0);
        if over.load(Ordering::SeqCst) {
            return Latencies(all);
        }
    }
}

/// What is done meanwhile, and what [`hit`] has measured.
fn while_hit<T>(server: &Server, meanwhile: impl FnOnce() -> T) -> (T, Latencies) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let hitting = scope.spawn(|| hit(server, &over));
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(meanwhile));
        over.store(true, Ordering::SeqCst);
        let hits = hitting.join().unwrap();
        (done.unwrap_or_else(|panic| std::panic::resume_unwind(panic)), hits)
    })
}

/// What becomes of Redis.
struct Fault {
    what: &'static str,
    breaks: fn(&mut Redis),
    mends: fn(&mut Redis),
    /// Whether it is left alone meanwhile.
    opens: bool,
    /// Values that nobody can use.
    garbage: usize,
}

const FAULTS: [Fault; 8] = [
    Fault { what: "killed", breaks: Redis::kill, mends: Redis::restart, opens: true, garbage: 0 },
    Fault { what: "frozen", breaks: |redis| redis.freeze(), mends: |redis| redis.thaw(), opens: true, garbage: 0 },
    Fault {
        what: "restarted",
        breaks: |redis| {
            redis.kill();
            redis.restart();
        },
        mends: |_| {},
        opens: false,
        garbage: 0,
    },
    Fault { what: "FLUSHALL", breaks: |redis| cli(redis, &["FLUSHALL"]), mends: |_| {}, opens: false, garbage: 0 },
    Fault { what: "garbage", breaks: litter, mends: |_| {}, opens: false, garbage: COLD },
    Fault {
        what: "out of memory",
        breaks: |redis| {
            cli(redis, &["CONFIG", "SET", "maxmemory-policy", "noeviction"]);
            cli(redis, &["CONFIG", "SET", "maxmemory", "1mb"]);
        },
        mends: |redis| cli(redis, &["CONFIG", "SET", "maxmemory", "0"]),
        opens: false,
        garbage: 0,
    },
    Fault {
        what: "another password",
        breaks: |redis| {
            cli(redis, &["CONFIG", "SET", "requirepass", "new"]);
            redis.cli(&["-a", "new", "CLIENT", "KILL", "TYPE", "normal"]);
        },
        mends: |redis| drop(redis.cli(&["-a", "new", "CONFIG", "SET", "requirepass", ""])),
        opens: true,
        garbage: 0,
    },
    Fault {
        what: "read only",
        breaks: |redis| cli(redis, &["REPLICAOF", "127.0.0.1", "1"]),
        mends: |redis| cli(redis, &["REPLICAOF", "NO", "ONE"]),
        opens: false,
        garbage: 0,
    },
];

#[track_caller]
fn cli(redis: &Redis, words: &[&str]) {
    assert_eq!(redis.cli(words), "OK", "{words:?}");
}

/// Puts what is no value of ours under the keys that are asked for next: of other types, too long, cut, random.
fn litter(redis: &mut Redis) {
    let huge = (100 << 20).to_string();
    for number in WARM + COLD..WARM + 2 * COLD {
        let (name, length) = (name(number), (number * 7 % 300 + 1).to_string());
        let script = "local all = {} for i = 1, tonumber(ARGV[1]) do all[i] = string.char(math.random(0, 255)) end \
                      return redis.call('SET', KEYS[1], ARGV[2] .. table.concat(all))";
        let said = match number % 10 {
            0 => redis.cli(&["RPUSH", &name, "x"]),
            1 => redis.cli(&["HSET", &name, "k", "v"]),
            2 => redis.cli(&["SADD", &name, "x"]),
            3 => redis.cli(&["XADD", &name, "*", "k", "v"]),
            // Not ten of them: 100 MB each are there.
            4 if number % 50 == 24 => redis.cli(&["SETRANGE", &name, &huge, "x"]),
            5 => redis.cli(&["SETRANGE", &name, "17000", "x"]),
            6 => redis.cli(&["EVAL", script, "1", &name, &length, "wp\u{1}"]),
            7 => redis.cli(&["SET", &name, "https://example.org/"]),
            _ => redis.cli(&["EVAL", script, "1", &name, &length, ""]),
        };
        assert!(!said.contains("ERR"), "{number}: {said}");
    }
}

#[test]
fn whatever_becomes_of_redis() {
    // One after the other: each measures.
    FAULTS.iter().for_each(check);
}

fn check(fault: &Fault) {
    let mut redis = Redis::start();
    let links = WARM + 4 * COLD;
    let deployment = deployment("", links);
    let phase = |number: usize| WARM + number * COLD..WARM + (number + 1) * COLD;

    // What a miss costs without Redis.
    let server = deployment.instance("without");
    let mut client = server.connect();
    ask(&mut client, (0..WARM).chain(phase(0)));
    let ((without, _), _) = while_hit(&server, || until_left_alone(&server, &mut client, &mut phase(1).take(COLD / 2)));
    server.kill();
    let before = deployment.look_ups();

    deployment.reconfigure(&config(&redis.url()));
    let server = deployment.instance("with");
    let mut client = server.connect();
    let mut asked = WARM;
    assert!(is_used(&mut client, &redis, 0..WARM), "{}", fault.what);
    for _ in 0..5 {
        ask(&mut client, 0..WARM);
    }
    let (with, _) = while_hit(&server, || ask(&mut client, phase(0)));
    asked += COLD;
    let last = name(phase(0).end - 1);
    eventually(LIMIT, "all was written", || redis.cli(&["EXISTS", &last]) == "1");
    let (_, undisturbed) = while_hit(&server, || ask(&mut server.connect(), 0..WARM));

    (fault.breaks)(&mut redis);
    let (opened_before, garbage_before) = (breaker(&server), reads(&server, "garbage"));
    assert_eq!(opened_before, 0.0);
    let (((first, late), rest), hits) = while_hit(&server, || {
        let mut numbers = phase(1);
        (until_left_alone(&server, &mut client, &mut numbers), ask(&mut client, numbers))
    });
    asked += COLD;
    print(
        fault.what,
        &[
            ("misses without Redis", &without),
            ("with it", &with),
            ("broken, at first", &first),
            ("of it the machine", &late),
        ],
    );
    if !rest.0.is_empty() {
        print(fault.what, &[("left alone", &rest)]);
    }
    print(fault.what, &[("hits before", &undisturbed), ("hits meanwhile", &hits)]);
    // The slower nine tenths have in them what else the machine does.
    let slower = first.percentile(10).saturating_sub(without.percentile(10) + late.percentile(10));
    assert!(slower <= SLOWER_MAX, "{}: misses are {slower:?} slower", fault.what);
    let waits = |latencies: &Latencies| !latencies.0.is_empty() && latencies.median() > SLOWER_MAX / 2;
    assert!(!waits(&rest) && !waits(&hits), "{}: hits wait, or misses when Redis is left alone", fault.what);
    assert_eq!(is_degraded(&server), fault.opens, "{}", fault.what);
    assert_eq!(breaker(&server) != 0.0, fault.opens, "{}", fault.what);
    assert_eq!(reads(&server, "garbage") - garbage_before, fault.garbage as f64, "{}", fault.what);

    // Nobody comes twice: eight ask for the same links at a time.
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| ask(&mut server.connect(), phase(2)));
        }
    });
    asked += COLD;

    (fault.mends)(&mut redis);
    let mended = time::monotonic();
    let mut asking = phase(3);
    assert!(is_used(&mut client, &redis, asking.by_ref()), "{}: Redis is not used again", fault.what);
    asked += COLD - asking.len();
    let again = time::monotonic().duration_since(mended);
    assert!(!is_degraded(&server), "{}", fault.what);
    ask(&mut client, 0..WARM);
    drop(server);
    print(fault.what, &[("used again", &Latencies(vec![again]))]);

    assert_eq!(deployment.look_ups() - before, asked as u64, "{}: look-ups for {asked} links", fault.what);
}

/// Asks for one link after the other until one of them is written into Redis.
#[track_caller]
fn is_used(client: &mut Client, redis: &Redis, mut numbers: impl Iterator<Item = usize>) -> bool {
    numbers.any(|number| {
        ask(client, [number]);
        let mut is_there = false;
        throughout(Duration::from_millis(50), || is_there |= redis.cli(&["EXISTS", &name(number)]) == "1");
        is_there
    })
}

/// Instances count together, whatever becomes of the script that counts.
#[test]
fn rate_limits_go_on_counting_when_scripts_are_flushed() {
    let redis = Redis::start();
    let limits = "[shorten]\nopen = true\n[limits]\nshorten_per_minute = 12\n";
    let deployment = Deployment::new(Way::Straight, &format!("{}{limits}", config(&redis.url())));
    let servers = ["one", "other"].map(|name| deployment.instance(name));
    eventually(LIMIT, "it is used", || {
        servers.iter().all(|server| {
            server.get("/unknown");
            reads(server, "miss") > 0.0
        })
    });
    let mut statuses = Vec::new();
    for number in 0..18 {
        cli(&redis, &["SCRIPT", "FLUSH"]);
        let answer = servers[number % 2].connect().shorten(&json!({"original_url": target(number)}), "");
        statuses.push(answer.status);
    }
    // One more may have come back within the time that it takes.
    let made = statuses.iter().filter(|status| **status == 201).count();
    assert!((12..=13).contains(&made) && statuses[14..].iter().all(|status| *status == 429), "{statuses:?}");
}

/// New instances, that have nothing in memory and Redis behind them, are asked for everything until `over`; returns how
/// many instances there were, and how many answers came from Redis and from Postgres.
fn load(deployment: &Deployment, links: usize, over: &AtomicBool) -> (usize, f64, f64) {
    let (mut instances, mut redis, mut store) = (0, 0.0, 0.0);
    while !over.load(Ordering::SeqCst) {
        let server = deployment.instance(&format!("load-{instances}"));
        instances += 1;
        std::thread::scope(|scope| {
            for first in 0..4 {
                let server = &server;
                scope.spawn(move || ask(&mut server.connect(), (first..links).step_by(4)));
            }
        });
        redis += from(&server, "redis");
        store += from(&server, "store");
    }
    (instances, redis, store)
}

/// Puts all links into Redis, then does something while new instances are asked for all of them.
#[expect(clippy::print_stdout, reason = "the figures tell how much of it was met")]
fn under_load(what: &str, deployment: &Deployment, links: usize, meanwhile: impl FnOnce()) {
    let over = AtomicBool::new(true);
    let server = deployment.instance("first");
    let mut client = server.connect();
    eventually(LIMIT, "Redis is used", || {
        client.get("/unknown");
        reads(&server, "miss") > 0.0
    });
    ask(&mut client, 0..links);
    server.kill();
    let before = deployment.look_ups();
    let (instances, redis, store) = std::thread::scope(|scope| {
        over.store(false, Ordering::SeqCst);
        let loading = scope.spawn(|| load(deployment, links, &over));
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(meanwhile));
        over.store(true, Ordering::SeqCst);
        let loaded = loading.join().unwrap();
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        loaded
    });
    let look_ups = deployment.look_ups() - before;
    println!(
        "{what}: {instances} instances: {redis} answers from Redis, {store} from Postgres, which was asked {look_ups} times"
    );
    assert!(redis > 0.0, "{what}: nothing came from Redis");
    assert_eq!(redis + store, (instances * links) as f64, "{what}: a link was asked for twice");
    assert_eq!(look_ups as f64, store, "{what}: what Postgres was asked, and what came from it");
}

#[test]
fn a_cluster_is_resharded_and_loses_a_master() {
    let links = 2000;
    let mut cluster = Cluster::start();
    let deployment = deployment(&config(&cluster.url()), links);
    under_load("resharded", &deployment, links, || {
        let id = |node: usize| cluster.nodes[node].cli(&["CLUSTER", "MYID"]);
        let address = cluster.nodes[0].address().to_string();
        for (from, to) in [(0, 1), (1, 2), (2, 0)] {
            let (from, to) = (id(from), id(to));
            let words = ["--cluster", "reshard", &address, "--cluster-from", &from, "--cluster-to", &to];
            let words = [&words[..], &["--cluster-slots", "500", "--cluster-yes"]].concat();
            // It begins once all nodes know of the last one.
            eventually(LIMIT, "500 slots move", || !cluster.nodes[0].cli(&words).contains("[ERR]"));
        }
    });
    under_load("a master killed", &deployment, links, || {
        cluster.nodes[0].kill();
        let whole = |node: &Redis| node.cli(&["CLUSTER", "INFO"]).contains("cluster_state:ok");
        let failed = |node: &Redis| node.cli(&["CLUSTER", "NODES"]).lines().any(|line| line.contains("fail "));
        let nodes = &cluster.nodes[1..];
        eventually(3 * LIMIT, "a replica takes over", || nodes.iter().all(|node| failed(node) && whole(node)));
    });
}

#[test]
fn sentinels_name_another_master() {
    let links = 2000;
    let mut all = Sentinel::start();
    let deployment = deployment(&config(&all.url()), links);
    let server = deployment.instance("one");
    let (mut client, mut cold) = (server.connect(), 0..links);
    assert!(is_used(&mut client, &all.servers[0], cold.by_ref()), "Redis is not used");
    ask(&mut client, 0..WARM);
    while_hit(&server, || {
        all.servers[0].kill();
        let replica = all.servers[1].address().port();
        eventually(3 * LIMIT, "the replica is the master", || {
            ask(&mut client, cold.by_ref().take(1));
            all.master() == replica
        });
        assert!(is_used(&mut client, &all.servers[1], cold.by_ref()), "the new master is not used");
    });
    assert!(!is_degraded(&server));
}
