//! A request costs no allocation: counted on the thread that records it, and on the worker that sends it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use loadgen::campaign;
use loadgen::engine::{Job, LedgerJob, Spin};
use loadgen::links::Catalogue;
use loadgen::measure::recorder::Recorder;
use loadgen::measure::totals::{Totals, channel};
use loadgen::measure::{Connected, Outcome, Sample};
use loadgen::plan::Segment;
use loadgen::scenario::change::Changes;
use loadgen::scenario::load;
use loadgen::scenario::{Connection, ConnectionKind, Expect, Pick, Run, Scenario, Target, Traffic, WhenFull};
use loadgen::slo::Scope;
use loadgen::stub::Stub;
use loadgen::stub::script::Script;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    /// Asked for once per thread, while workers are watched: all have their names by then.
    static IS_WORKER: Cell<Option<bool>> = const { Cell::new(None) };
}

/// Whether the allocations of the thread `loadgen-0` are counted now, and how many there were.
static WATCHED: AtomicBool = AtomicBool::new(false);
static OF_WORKER: AtomicU64 = AtomicU64::new(0);

fn count() {
    ALLOCATIONS.with(|count| count.set(count.get() + 1));
    if WATCHED.load(Relaxed) && is_worker() {
        OF_WORKER.fetch_add(1, Relaxed);
    }
}

fn is_worker() -> bool {
    IS_WORKER.with(|known| {
        known.get().unwrap_or_else(|| {
            // The name is allocated as well: that must not ask again.
            known.set(Some(false));
            let is_worker = rustix::thread::name().is_ok_and(|name| name.as_bytes() == b"loadgen-0");
            known.set(Some(is_worker));
            is_worker
        })
    })
}

#[expect(unsafe_code, reason = "an allocator is unsafe by its trait; this one counts and hands on")]
// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is the system's condition.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is the system's condition.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is the system's condition.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const SECOND_NS: u64 = 1_000_000_000;

fn scenario(classes: usize) -> Scenario {
    let class = Traffic {
        name: "clicks".into(),
        method: "GET".into(),
        path: "/".into(),
        headers: Vec::new(),
        body: None,
        pick: Pick::None,
        expect: Expect::default(),
        yields: None,
        connection: Connection { kind: ConnectionKind::Pool, max: 1, when_full: WhenFull::Queue, pipeline: 1 },
        closed: None,
        bind: None,
        optional: false,
    };
    Scenario {
        name: "allocations".into(),
        toml: String::new(),
        run: Run {
            target: Target { authority: "127.0.0.1:80".into(), host: "127.0.0.1".into(), port: 80 },
            seed: 1,
            workers: 1,
            timeout_ns: 5 * SECOND_NS,
            drain_ns: SECOND_NS,
            peak: 0.0,
        },
        catalogue: Catalogue::default(),
        traffic: vec![class; classes],
        phases: Vec::new(),
        events: Vec::new(),
        slos: Vec::new(),
    }
}

/// A thousand requests of each class, with every outcome, answered after up to 8 ms.
fn second(recorder: &mut Recorder, classes: u16, number: u64) {
    let segment = u16::try_from(number / 10).expect("few");
    for k in 0..1000 {
        let outcome = Outcome::ALL[usize::try_from(k).expect("few") % Outcome::COUNT];
        let intended_ns = number * SECOND_NS + k * 1_000_000;
        let done_ns = intended_ns + k * 8_000;
        for traffic in 0..classes {
            recorder.arrived(segment, traffic, intended_ns, intended_ns + 10_000);
            recorder.left(segment, traffic, intended_ns, intended_ns + 10_000);
            recorder.sent();
            recorder.connected(traffic, Connected::Opened);
            recorder.finished(&Sample {
                segment,
                traffic,
                outcome,
                status: 302,
                bytes: 200,
                intended_ns,
                picked_ns: intended_ns,
                sent_ns: intended_ns,
                first_byte_ns: done_ns,
                done_ns,
                woken_ns: intended_ns,
                created_ns: intended_ns,
            });
            recorder.turn(10_000, 90_000, 0);
            recorder.tick(done_ns, 1, 0, 1);
        }
    }
}

#[test]
fn recording_allocates_nothing_once_every_class_was_seen() {
    let classes = 3;
    let scenario = scenario(classes);
    // New segments come for ever; the cells of the old ones must do for them.
    let segments: Vec<Segment> = (0..5)
        .map(|number| Segment {
            phase: 0,
            event: None,
            from_ns: number * 10 * SECOND_NS,
            to_ns: (number + 1) * 10 * SECOND_NS,
        })
        .collect();
    let (mut recorders, collector) = channel(1, &scenario, &segments, 0);
    let mut recorder = recorders.pop().expect("one worker");
    let mut taken = 0;
    let mut allocated = Vec::new();
    for number in 0..50 {
        let before = ALLOCATIONS.get();
        second(&mut recorder, 3, number);
        allocated.push(ALLOCATIONS.get() - before);
        if let Some(batch) = collector.next(Duration::ZERO) {
            taken += batch.cells.len();
            collector.give_back(batch);
        }
    }
    assert!(allocated[0] > 0, "nothing is counted");
    // The first change of segments is a part of warming up: both have cells then.
    assert_eq!(allocated[11..], [0; 39], "allocations of each second: {allocated:?}");
    assert!(taken >= 40 * classes, "{taken} cells arrived");
}

#[test]
fn the_plan_allocates_nothing_for_an_arrival() {
    use loadgen::links::{Set, Source};
    use loadgen::plan::arrivals::Arrivals;
    use loadgen::plan::pick::{self, Choice, Picker};
    use loadgen::scenario::{ArrivalKind, Curve, Phase, Requests};
    let mut scenario = scenario(4);
    scenario.catalogue.sets.push(Set { name: "existing".into(), source: Source::Derived { count: 1000 } });
    let picks = [
        Pick::Zipf { set: 0, s: 1.1, scatter: true },
        Pick::Uniform { set: 0, never_twice: true },
        Pick::Uniform { set: 0, never_twice: false },
        Pick::Random { length: 7 },
    ];
    for (traffic, pick) in scenario.traffic.iter_mut().zip(picks) {
        traffic.pick = pick;
    }
    for arrivals in [ArrivalKind::Even, ArrivalKind::Poisson] {
        scenario.phases.push(Phase {
            name: "phase".into(),
            for_ns: SECOND_NS,
            curve: Curve::Exponential { from: 1000.0, to: 20_000.0 },
            arrivals,
            mix: vec![(0, 0.4), (1, 0.3), (2, 0.2), (3, 0.1)],
            also: Vec::new(),
            warmup: false,
        });
    }
    let pickers: Vec<Picker> = (0..4).map(|traffic| Picker::new(&scenario, traffic)).collect();
    let mut arrivals = Arrivals::new(&scenario, 0, 2);
    let (mut code, mut target) = (Vec::with_capacity(64), Vec::with_capacity(64));
    let before = ALLOCATIONS.get();
    let mut taken = 0;
    for arrival in &mut arrivals {
        if let Choice::Link { set, index } = pickers[usize::from(arrival.traffic)].pick(arrival.ordinal) {
            code.clear();
            target.clear();
            scenario.catalogue.code_into(usize::from(set), index, &mut code);
            scenario.catalogue.target_into(usize::from(set), index, &mut target);
            assert!(scenario.catalogue.is_target(usize::from(set), index, &target));
        }
        taken += pick::session_requests(1, &arrival, Requests::Geometric(1.4)).min(1);
    }
    assert_eq!(ALLOCATIONS.get() - before, 0);
    assert!(taken > 5000, "{taken} arrivals");
}

/// What a worker allocates in a second and more of `toml`'s last phase, and how many requests ended in that time.
///
/// Before it, everything has been in use: more requests at a time than there are connections, all batches, both phases,
/// long answers.
fn of_worker(toml: &str) -> (u64, u64) {
    let mut script = Script::default();
    for (flag, value) in [("service", "5ms"), ("slow", "5%@50ms")] {
        script.set(flag, value).expect("a flag of the stub");
    }
    let stub = Stub::start(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0), script).expect("a port is free");
    let address = stub.address();
    let text = format!("[run]\ntarget = \"http://{address}\"\nseed = 7\n{toml}");
    let scenario = load::from_toml("test", &text, Path::new("."), &Changes::default())
        .unwrap_or_else(|error| panic!("{error}\n{text}"));
    let folder = tempfile::tempdir().expect("room for a ledger");
    let job = Job {
        scenario: Arc::new(scenario),
        workers: 1,
        address,
        spin: Spin::Never,
        key: None,
        ledger: Some(LedgerJob { file: folder.path().join("ledger"), header: "X-Request-Id".to_owned() }),
        stop: Arc::new(AtomicBool::new(false)),
        defect: None,
    };
    let ended = |totals: &Totals| totals.tally(&Scope::default()).ended();
    let (mut before, mut counted) = (0, None);
    let performed = campaign::perform(job, None, &mut |totals, elapsed_s| {
        if elapsed_s >= WATCHED_S.1 && counted.is_none() {
            WATCHED.store(false, Relaxed);
            counted = Some((OF_WORKER.swap(0, Relaxed), ended(totals) - before));
        } else if elapsed_s >= WATCHED_S.0 && !WATCHED.load(Relaxed) && counted.is_none() {
            before = ended(totals);
            WATCHED.store(true, Relaxed);
        }
    });
    let tally = performed.expect("it runs").totals.tally(&Scope::default());
    assert_eq!(tally.of(Outcome::Ok), tally.scheduled, "{:?}", tally.outcomes);
    counted.expect("it lasts long enough")
}

/// From the origin: when what a worker allocates is watched. Two seconds of each phase are for what is kept.
const WATCHED_S: (u32, u32) = (5, 7);

#[test]
fn a_worker_allocates_nothing_for_a_request() {
    WATCHED.store(true, Relaxed);
    let worker = std::thread::Builder::new().name("loadgen-0".to_owned()).spawn(|| drop(vec![0_u8; 100]));
    worker.expect("a thread").join().expect("it ends");
    WATCHED.store(false, Relaxed);
    assert!(OF_WORKER.swap(0, Relaxed) > 0, "nothing is counted");

    let phases = |mix: &str, crowd: u32| {
        format!(
            "[[phase]]\nname = \"crowded\"\nfor = \"1s\"\nrate = {crowd}\nmix = {mix}\n\
             [[phase]]\nname = \"watched\"\nfor = \"7s\"\nrate = 600\nmix = {mix}\n"
        )
    };
    let reads = r#"
[links]
all = { count = 1000 }
[traffic.clicks]
request = "GET /{code}"
code = { pick = "zipf", from = "all", s = 1.1, scatter = true }
expect = { status = [307], location = "known" }
connection = { kind = "pool", max = 8, when_full = "queue" }
[traffic.visitors]
request = "GET /{code}"
code = { pick = "uniform", from = "all" }
expect = { status = [307], location = "known" }
connection = { kind = "session", requests = "geometric(1.4)", max = 8 }
bind = "127.66.0.0/24"
"#;
    let (allocated, requests) = of_worker(&format!("{reads}{}", phases("{ clicks = 1, visitors = 1 }", 3_000)));
    assert!(requests >= 600, "{requests} were watched");
    assert!(allocated <= GROWTHS, "{allocated} for {requests} requests");

    let creates = r#"
[traffic.create]
request = "POST /shorten"
body = '{"original_url":"{target}"}'
expect = { status = [201] }
yields = { code = "json:short_code" }
connection = { kind = "pool", max = 8, when_full = "queue" }
"#;
    let (allocated, requests) = of_worker(&format!("{creates}{}", phases("{ create = 1 }", 2_000)));
    assert!(requests >= 600, "{requests} were watched");
    assert!(allocated <= GROWTHS, "{allocated} for {requests} creates");
}

/// A histogram grows when a value is longer than all before it, however many requests there are: on a machine that was
/// held up, those of two classes and of the loop (ten) in each of three batches.
const GROWTHS: u64 = 30;
