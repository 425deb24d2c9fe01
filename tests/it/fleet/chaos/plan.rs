//! What is to happen, and when: drawn before anything begins.
//!
//! In: a seed, how many seconds. Out: rounds of faults, each fault with its begin and its length.
//! Never: depends on what happens.
//! At the limit: in one round, one fault of an instance, one of Postgres, one of Redis and a reload of HAProxy; every kind
//! of them comes once before any comes twice.

use std::fmt;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

/// From the begin of one round to the begin of the next: faults, what may be needed to recover, and full service.
pub(super) const ROUND: Duration = Duration::from_secs(22);
/// The end of the last fault of a round.
const FAULTS_MS: u64 = 8_000;
/// Between two faults that begin in a round, at the least a fault's length.
const SHORTEST_MS: u64 = 1_500;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    /// SIGKILL.
    Kill,
    /// SIGTERM.
    Stop,
    /// SIGSTOP, and SIGCONT at the end.
    Freeze,
    /// SIGKILL, and back with half the workers, or twice as many.
    Workers,
    /// SIGKILL; a copy of its data folder is served beside it.
    Copy,
    /// SIGKILL; its spool is replayed from elsewhere before it comes back.
    Replay,
    /// SIGKILL for every instance.
    KillAll,
    PostgresStop,
    PostgresKill,
    PostgresFreeze,
    /// Each chunk that Postgres sends comes late.
    PostgresSlow,
    /// It gets everything, and nothing of it arrives.
    PostgresSilent,
    /// Connections are reset, and no new one comes.
    PostgresCut,
    /// Connections end when a commit is done, before its client is told.
    CommitsLost,
    ReadOnly,
    /// The primary is killed, and the standby becomes the primary in the end.
    Failover,
    /// The standby gets nothing more; in the end the primary is killed and the standby becomes the primary.
    LaggingFailover,
    RedisKill,
    RedisFreeze,
    /// All of it is forgotten.
    RedisFlush,
    /// What it has of links is replaced by something else.
    RedisGarbage,
    /// Postgres and Redis are killed.
    BothStores,
    /// HAProxy's.
    Reload,
}

const INSTANCE: [Fault; 7] =
    [Fault::Kill, Fault::Stop, Fault::Freeze, Fault::Workers, Fault::Copy, Fault::Replay, Fault::KillAll];
const POSTGRES: [Fault; 11] = [
    Fault::PostgresStop,
    Fault::PostgresKill,
    Fault::PostgresFreeze,
    Fault::PostgresSlow,
    Fault::PostgresSilent,
    Fault::PostgresCut,
    Fault::CommitsLost,
    Fault::ReadOnly,
    Fault::Failover,
    Fault::LaggingFailover,
    Fault::BothStores,
];
const REDIS: [Fault; 4] = [Fault::RedisKill, Fault::RedisFreeze, Fault::RedisFlush, Fault::RedisGarbage];

impl Fault {
    /// Whether it keeps instances from their store.
    pub(super) fn is_of_postgres(self) -> bool {
        POSTGRES.contains(&self)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) fault: Fault,
    /// The instance that is meant, where one is.
    pub(super) instance: usize,
    /// Since the begin of its round.
    pub(super) begin_ms: u64,
    pub(super) for_ms: u64,
}

impl fmt::Display for Event {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { fault, instance, begin_ms, for_ms } = self;
        write!(out, "{fault:?}")?;
        if INSTANCE.contains(fault) && *fault != Fault::KillAll {
            write!(out, " of instance-{instance}")?;
        }
        write!(out, " at {begin_ms} ms for {for_ms} ms")
    }
}

/// Kinds that come in the order of a shuffled deck, which is shuffled again when it is used up.
struct Deck {
    kinds: &'static [Fault],
    left: Vec<Fault>,
}

impl Deck {
    fn draw(&mut self, chance: &mut StdRng) -> Fault {
        if self.left.is_empty() {
            self.left = self.kinds.to_vec();
            self.left.shuffle(chance);
        }
        self.left.pop().expect("it was filled")
    }
}

/// The rounds that fit, at least one.
pub(super) fn plan(seconds: u64, seed: u64) -> Vec<Vec<Event>> {
    let mut chance = StdRng::seed_from_u64(seed);
    let mut decks = [&INSTANCE[..], &POSTGRES, &REDIS].map(|kinds| Deck { kinds, left: Vec::new() });
    let rounds = (seconds / ROUND.as_secs()).max(1);
    (0..rounds).map(|_| round(&mut decks, &mut chance)).collect()
}

fn round([instance, postgres, redis]: &mut [Deck; 3], chance: &mut StdRng) -> Vec<Event> {
    // One of the seven sets of them that are not empty.
    let wanted = chance.random_range(1..8);
    let mut faults = Vec::new();
    for (bit, deck) in [(1, instance), (2, postgres), (4, redis)] {
        // Redis cannot go twice.
        if wanted & bit != 0 && !(bit == 4 && faults.contains(&Fault::BothStores)) {
            faults.push(deck.draw(chance));
        }
    }
    if chance.random_range(0..4) == 0 {
        faults.push(Fault::Reload);
    }
    let event = |fault| {
        let instance = chance.random_range(0..3);
        let begin_ms = chance.random_range(0..FAULTS_MS - 2 * SHORTEST_MS);
        let for_ms = match fault {
            Fault::RedisFlush | Fault::RedisGarbage | Fault::Reload => 0,
            _ => chance.random_range(SHORTEST_MS..=FAULTS_MS - begin_ms),
        };
        Event { fault, instance, begin_ms, for_ms }
    };
    faults.into_iter().map(event).collect()
}

#[test]
fn a_seed_is_a_plan() {
    assert_eq!(plan(900, 7), plan(900, 7));
    assert_ne!(plan(900, 7), plan(900, 8));
    assert_eq!(plan(25, 7).len(), 1);
    let rounds = plan(900, 7);
    assert_eq!(rounds.len(), 40);
    for kind in [&INSTANCE[..], &POSTGRES, &REDIS, &[Fault::Reload]].concat() {
        assert!(rounds.iter().flatten().any(|event| event.fault == kind), "{kind:?} never comes");
    }
    for event in rounds.iter().flatten() {
        assert!(event.begin_ms + event.for_ms <= FAULTS_MS, "{event}");
    }
}
