//! A request costs no allocation: counted on the thread that records it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use loadgen::links::Catalogue;
use loadgen::measure::recorder::Recorder;
use loadgen::measure::totals::channel;
use loadgen::measure::{Connected, Outcome, Sample};
use loadgen::plan::Segment;
use loadgen::scenario::{Connection, ConnectionKind, Expect, Pick, Run, Scenario, Target, Traffic, WhenFull};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    ALLOCATIONS.with(|count| count.set(count.get() + 1));
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
