//! Snowflakes: no number twice, whatever clocks, pauses and lost leases do; and one holder to a worker id.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::process::Signal;
use serde_json::json;
use waypost::codes::Alphabet;
use waypost::codes::snowflake::{Drawn, EPOCH_MS, Snowflakes};
use waypost::domain::time;
use waypost::links::worker_id::WorkerId;
use waypost::store::Store;
use waypost::store::sqlite::{self, Sqlite};

use crate::support::{LIMIT, Server, Setup, eventually};

const GENERATORS: usize = 8;
/// Few ids for many generators.
const IDS: u16 = 4;

/// An instance with clocks of its own.
struct Generator {
    keeper: WorkerId,
    holder: String,
    clock_ms: u64,
    monotonic: Instant,
}

#[derive(Default)]
struct Seen {
    ids: HashSet<u64>,
    /// What happened, so that the test knows that it was tried.
    thefts: u32,
    lost: u32,
    refused: u32,
}

impl Seen {
    fn add(&mut self, seed: u64, id: u64) {
        assert!(self.ids.insert(id), "seed {seed}: {id:#x} came twice, after {} others", self.ids.len());
    }
}

fn keeper(store: &Store, holder: &str, rng: &mut StdRng) -> WorkerId {
    let wanted = rng.random_bool(0.8).then(|| rng.random_range(0..IDS));
    // Of real time, by which the store lets others have an id: some are over at once.
    WorkerId::new(store.clone(), holder.to_owned(), wanted, Duration::from_millis(rng.random_range(1..40)))
}

/// Mostly little, so that clocks that disagree still meet in the same milliseconds.
fn step_ms(rng: &mut StdRng) -> u64 {
    if rng.random_ratio(1, 20) { rng.random_range(0..3_600_000) } else { rng.random_range(0..40) }
}

/// Draws `count` numbers from generators that crash, stop and disagree about the time.
pub(crate) async fn check_no_number_twice(store: &Store, seed: u64, count: usize) {
    let mut rng = StdRng::seed_from_u64(seed);
    let start_ms = EPOCH_MS + 50_000_000_000;
    let mut generators: Vec<Generator> = (0..GENERATORS)
        .map(|number| {
            let holder = format!("holder-{seed}-{number}");
            let keeper = keeper(store, &holder, &mut rng);
            Generator { keeper, holder, clock_ms: start_ms + rng.random_range(0..40), monotonic: time::monotonic() }
        })
        .collect();
    let mut seen = Seen::default();
    while seen.ids.len() < count {
        let generator = &mut generators[rng.random_range(0..GENERATORS)];
        match rng.random_range(0..100) {
            0..50 => {
                for _ in 0..rng.random_range(1..5000) {
                    match generator.keeper.draw_at(generator.clock_ms, generator.monotonic) {
                        Drawn::Id(id) => seen.add(seed, id),
                        Drawn::LeaseUsedUp => break,
                        Drawn::TimeUsedUp => panic!("seed {seed}: at {}", generator.clock_ms),
                    }
                    generator.clock_ms += u64::from(rng.random_ratio(1, 500));
                }
            }
            50..70 => {
                let kept = generator.keeper.keep(generator.clock_ms, generator.monotonic).await.unwrap();
                seen.refused += u32::from(!kept);
            }
            // Asked, perhaps done, and never answered.
            70..75 => drop(generator.keeper.keep(generator.clock_ms, generator.monotonic).now_or_never()),
            75..80 => generator.clock_ms += step_ms(&mut rng),
            80..85 => generator.clock_ms -= step_ms(&mut rng),
            // Longer than any lease.
            85..88 => {
                generator.monotonic += Duration::from_secs(1);
                let drawn = generator.keeper.draw_at(generator.clock_ms, generator.monotonic);
                assert_eq!(drawn, Drawn::LeaseUsedUp, "seed {seed}: the lease is over by the monotonic clock");
                seen.lost += 1;
            }
            // It crashes, and comes again as itself or as another.
            88..92 => {
                if rng.random_bool(0.5) {
                    generator.holder = format!("holder-{seed}-{}", rng.random::<u64>());
                }
                generator.keeper = keeper(store, &generator.holder, &mut rng);
            }
            92..94 => {
                generator.keeper.release().await;
                let drawn = generator.keeper.draw_at(generator.clock_ms, generator.monotonic);
                assert_eq!(drawn, Drawn::LeaseUsedUp, "seed {seed}: it was given back");
                generator.keeper = keeper(store, &generator.holder, &mut rng);
            }
            // Somebody takes an id whose holder, if its clock stands still, believes that it has it.
            94..99 => {
                let wanted = Some(rng.random_range(0..IDS));
                let stolen = store.lease_worker("thief".to_owned(), wanted, generator.clock_ms, 1).await.unwrap();
                if let Some(lease) = stolen {
                    seen.thefts += 1;
                    let mut thief = Snowflakes::new(lease.worker_id, lease.from_ms..=lease.until_ms);
                    while let Drawn::Id(id) = thief.draw(generator.clock_ms.min(lease.until_ms)) {
                        seen.add(seed, id);
                    }
                }
            }
            _ => {
                let generation = store.position().await.unwrap().generation;
                assert_eq!(store.begin_generation(generation).await.unwrap(), generation + 1);
            }
        }
    }
    let Seen { thefts, lost, refused, .. } = seen;
    assert!(thefts > 5 && lost > 5 && refused > 0, "seed {seed}: {thefts} thefts, {lost} lost, {refused} refused");
}

#[test]
fn no_number_twice() {
    let setup = Setup::new("");
    setup.migrate();
    setup.store().check(|store| check_no_number_twice(store, 1, 1_000_000));
}

/// A draw that finds no lease waits for the keeper, which makes one.
#[test]
fn a_draw_waits_for_the_lease_that_is_on_its_way() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("waypost.db");
    sqlite::migrate(&path).unwrap();
    let store = Store::Sqlite(Sqlite::open(&path).unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let keeper = Arc::new(WorkerId::new(store, "one".to_owned(), Some(3), Duration::from_secs(60)));
        assert!(keeper.is_lost());
        let kept = Arc::clone(&keeper);
        let running = tokio::spawn(async move { kept.run().await });
        let Drawn::Id(id) = keeper.draw().await else { panic!("no lease came") };
        assert_eq!((id >> 12 & 1023, keeper.is_lost()), (3, false));
        keeper.release().await;
        assert_eq!(keeper.draw().await, Drawn::LeaseUsedUp);
        tokio::time::timeout(LIMIT, running).await.expect("it ends with the release").unwrap();
    });
}

/// The worker id in a code of base62.
fn worker_of(code: &str) -> u64 {
    let digits = Alphabet::Base62.characters();
    let digit = |byte| digits.iter().position(|known| *known == byte).unwrap() as u64;
    code.bytes().fold(0, |number, byte| number * 62 + digit(byte)) >> 12 & 1023
}

const SEVEN: &str = "[codes]\nstrategy = \"snowflake\"\nworker_id = 7\nworker_lease = ";

fn links(server: &Server, codes: &mut Vec<String>) {
    codes.extend((0..50).map(|number| server.link(&format!("https://example.com/{number}"))));
}

#[test]
fn a_second_instance_with_the_same_id_does_not_start() {
    let (setup, server) = Server::new(&format!("{SEVEN}\"60s\""));
    let (code, said) = setup.refused();
    assert_eq!(code, 78, "{said}");
    assert!(said.contains("codes.worker_id is 7, and another instance has that id"), "{said}");
    // A command has an id of its own, and a folder's second process a name of its own.
    let made = setup.run(&["link", "add", "https://example.com/", "--json"]);
    let made: serde_json::Value = serde_json::from_slice(&made.stdout).unwrap();
    assert_eq!(worker_of(made["code"].as_str().unwrap()), 1023, "{made}");
    let mut codes = Vec::new();
    links(&server, &mut codes);
    assert!(codes.iter().all(|code| worker_of(code) == 7), "{codes:?}");
    // After a crash it is the same instance, at once; after its end the id is free for any.
    server.kill();
    let server = setup.start();
    links(&server, &mut codes);
    server.stop();
    std::fs::remove_file(setup.data().join("instance")).unwrap();
    let server = setup.start();
    links(&server, &mut codes);
    assert_eq!(server.metric("waypost_codes_redrawn_total", &[]), 0.0);
    assert_eq!(codes.iter().collect::<HashSet<_>>().len(), 150);
}

#[test]
fn an_instance_that_slept_over_its_lease_makes_no_code_of_another() {
    let config = format!("{SEVEN}\"3s\"");
    let (setup, first) = Server::new(&config);
    let mut codes = Vec::new();
    links(&first, &mut codes);
    let store = setup.store();
    first.signal(Signal::STOP);
    // Not in the middle of a write: with SQLite nobody could write then.
    while !store.is_writable() {
        first.signal(Signal::CONT);
        first.signal(Signal::STOP);
    }
    eventually(LIMIT, "the lease is over", || store.takes_worker(7));
    // The first one has its spool still.
    setup.configure(&format!("{config}\n[spool]\ndir = {:?}\n", setup.data().join("second")));
    let second = setup.start();
    links(&second, &mut codes);
    first.signal(Signal::CONT);
    // A question to the store that was under way meanwhile has failed, and it may say that first.
    eventually(LIMIT, "it says that it has no worker id", || {
        let refused = first.shorten(&json!({"original_url": "https://example.com/"}));
        assert_eq!(refused.status, 503, "{refused:?}");
        assert!(refused.header("retry-after").is_some(), "{refused:?}");
        refused.text().contains("no worker id is leased")
    });
    first.logged("the lease of the worker id is lost");
    links(&second, &mut codes);
    assert_eq!(second.metric("waypost_codes_redrawn_total", &[]), 0.0);
    second.stop();
    first.logged("a worker id is leased again");
    links(&first, &mut codes);
    assert_eq!(first.metric("waypost_codes_redrawn_total", &[]), 0.0);
    assert!(codes.iter().all(|code| worker_of(code) == 7), "{codes:?}");
    assert_eq!(codes.iter().collect::<HashSet<_>>().len(), 200);
    first.stop();
}
