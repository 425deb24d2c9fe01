//! Question: does a second core slow the first one down? Resolve and count one hot code on two threads against one,
//! in operations per second of CPU time. A lock, or a line that both write, would show.
//!
//! Run: `cargo bench --bench hot`. Bar: at least 0.97. Figures: PERF.md.

#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, StatusCode};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::mpsc;
use waypost::domain::key::{Case, Code, DomainId, Key};
use waypost::domain::link::{Entry, LinkId, Rules};
use waypost::domain::target::Target;
use waypost::domain::time::Stamp;
use waypost::domain::visit::{Kind, Of, Visit};
use waypost::resolve::ask::Ask;
use waypost::resolve::value::StoredAsOf;
use waypost::resolve::{Defaults, Memory, Resolution, Resolver, Step, Tier};
use waypost::visits::{Counts, Recorder};

const OPERATIONS: u64 = 2_000_000;
const ROUNDS: usize = 15;

fn main() {
    let memory = Arc::new(Memory::new(8 << 20, 2, Duration::from_secs(2), StoredAsOf { generation: 0, position: 0 }));
    let key = Key { domain: DomainId(0), code: Code::parse(b"launch", Case::Sensitive).expect("it is a code") };
    let target = Target::new("https://example.com/very/long/url/path/1?utm_source=campaign").expect("it is a URL");
    let entry = Entry { id: LinkId(1), target, rules: Rules::default() };
    assert!(memory.keep(memory.hash(&key), &key, &entry, memory.feed.now()));
    let mut ratios = Vec::new();
    let mut rates = Vec::new();
    for round in 0..ROUNDS {
        // ABBA: a machine that changes its speed meets both alike.
        let (one, two) = if round % 2 == 0 {
            let one = rate(1, &memory, key);
            (one, rate(2, &memory, key))
        } else {
            let two = rate(2, &memory, key);
            (rate(1, &memory, key), two)
        };
        ratios.push(two / one);
        rates.push(one);
    }
    ratios.sort_by(f64::total_cmp);
    rates.sort_by(f64::total_cmp);
    println!(
        "resolve and count, hot: {:.1} ns; two threads against one: {:.3} [{:.3}-{:.3}] over {ROUNDS} rounds (bar 0.97)",
        1e9 / rates[ROUNDS / 2],
        ratios[ROUNDS / 2],
        ratios[1],
        ratios[ROUNDS - 2]
    );
}

/// Operations per second of CPU time, over all threads.
fn rate(threads: usize, memory: &Arc<Memory>, key: Key) -> f64 {
    let cpu_seconds: f64 = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(|| work(Arc::clone(memory), key))).collect();
        running.into_iter().map(|thread| thread.join().expect("no thread panics")).sum()
    });
    (OPERATIONS * threads as u64) as f64 / cpu_seconds
}

/// One core's work; returns its CPU time in seconds.
fn work(memory: Arc<Memory>, key: Key) -> f64 {
    let defaults = Defaults {
        status: StatusCode::TEMPORARY_REDIRECT,
        cache_control: HeaderValue::from_static("private, max-age=0"),
        permanent_cache_control: HeaderValue::from_static("private, max-age=90"),
        forward_query: true,
    };
    let resolver = Resolver::new(memory, Ask::new(0, mpsc::channel(1).0, mpsc::channel(1).1), defaults);
    let counts = Counts::default();
    let mut recorder = Recorder::default();
    let now = Stamp::now().millis();
    let mut hot = 0;
    let begun = thread_seconds();
    for _ in 0..OPERATIONS {
        if let Step::Done(Resolution::Found(ready), tier) = resolver.resolve(std::hint::black_box(&key), true, now) {
            hot += u64::from(tier == Tier::Hot);
            let visit = Visit {
                of: Of::Link(ready.link, Kind::Click),
                at: now,
                client: IpAddr::V4(Ipv4Addr::LOCALHOST),
                agent: b"",
                referrer: b"",
                request_id: b"",
                not_tracked: false,
            };
            recorder.record(&counts, &visit);
            std::hint::black_box(ready);
        }
    }
    let took = thread_seconds() - begun;
    assert!(hot >= OPERATIONS - 2 && counts.answered() == OPERATIONS);
    took
}

fn thread_seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
