//! The rule of belief against a model: processes that share a store and a Redis, each of which may stop between any two
//! steps; messages that come late, in any order or never; a store that is put back.
//!
//! The claim: once a process has followed the feed past a change, it serves nothing older from memory. What it serves
//! may be newer than what it has followed.

use std::time::Duration;

use proptest::prelude::*;

use super::Memory;
use super::invalidate::AsOf;
use super::value::StoredAsOf;
use crate::domain::key::{Case, Code, DomainId, Key};
use crate::domain::link::{Entry, LinkId, Rules};
use crate::domain::target::Target;
use crate::domain::time::UnixMillis;

const KEYS: usize = 3;
const PROCESSES: usize = 2;
/// Edits that a process reads when it starts: fewer than there are.
const REMEMBERED: usize = 1;
const NOW: UnixMillis = UnixMillis(0);

/// One step of anybody, in any order. Numbers choose among what is under way, modulo how much there is.
#[derive(Clone, Debug)]
enum Step {
    /// Somebody begins a transaction; what it changes is seen, and numbered, when it commits.
    Begin {
        key: usize,
        exists: bool,
    },
    Commit(usize),
    /// A look-up begins: it notes where the feed stands here.
    Ask {
        process: usize,
        key: usize,
    },
    /// It reads the store.
    Read(usize),
    /// What it read is kept here, if it is believed.
    Keep(usize),
    /// What it read reaches Redis, believed or not.
    Put(usize),
    /// A process takes a value out of Redis, and looks at it later.
    Take {
        process: usize,
        key: usize,
    },
    /// It keeps that, if it is believed.
    KeepTaken(usize),
    /// Redis forgets.
    Lose(usize),
    /// A poll reads the feed's end and the changes up to it.
    Poll(usize),
    /// The next of these changes is noted and its key removed.
    Note(usize),
    /// Everything that was noted counts as followed.
    Advance(usize),
    /// A process starts anew, with what it reads of the feed.
    Restart(usize),
    /// A backup from before everything is put back; the first who sees it begins a generation.
    PutBack,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let (any_key, process, which) = (0..KEYS, 0..PROCESSES, 0..16usize);
    let pair = || (0..PROCESSES, 0..KEYS);
    let step = prop_oneof![
        4 => (any_key.clone(), any::<bool>()).prop_map(|(key, exists)| Step::Begin { key, exists }),
        5 => which.clone().prop_map(Step::Commit),
        6 => pair().prop_map(|(process, key)| Step::Ask { process, key }),
        6 => which.clone().prop_map(Step::Read),
        5 => which.clone().prop_map(Step::Keep),
        5 => which.clone().prop_map(Step::Put),
        6 => pair().prop_map(|(process, key)| Step::Take { process, key }),
        6 => which.prop_map(Step::KeepTaken),
        1 => any_key.prop_map(Step::Lose),
        5 => process.clone().prop_map(Step::Poll),
        10 => process.clone().prop_map(Step::Note),
        6 => process.clone().prop_map(Step::Advance),
    ];
    let rare = prop_oneof![4 => process.prop_map(Step::Restart), 1 => Just(Step::PutBack)];
    prop::collection::vec(prop_oneof![30 => step, 1 => rare], 1..300)
}

type State = Option<Entry>;

/// What the store has had, in the order of commits.
#[derive(Default)]
struct Store {
    generation: u64,
    /// Of each key: the version and what it is since then.
    history: [Vec<(u64, State)>; KEYS],
    feed: Vec<(u64, usize, bool)>,
    open: Vec<(usize, State)>,
    made: u64,
    /// A backup was put back, and nobody has seen it yet.
    put_back: bool,
}

impl Store {
    fn version(&self) -> u64 {
        self.feed.len() as u64
    }

    fn state(&self, key: usize) -> State {
        self.history[key].last().and_then(|(_, state)| state.clone())
    }

    fn begin(&mut self, key: usize, exists: bool) {
        self.made += 1;
        let target = Target::new(&format!("https://example.com/{}", self.made)).unwrap();
        let entry = Entry { id: LinkId(self.made), target, rules: Rules::default() };
        self.open.push((key, exists.then_some(entry)));
    }

    fn commit(&mut self, which: usize) {
        if self.open.is_empty() {
            return;
        }
        let (key, state) = self.open.remove(which % self.open.len());
        let created = self.history[key].is_empty() && state.is_some();
        let version = self.version() + 1;
        self.history[key].push((version, state));
        self.feed.push((version, key, created));
    }
}

struct Lookup {
    process: usize,
    /// The start of the process that asks: what its forerunner had under way is gone.
    start: u64,
    key: usize,
    as_of: AsOf,
    read: Option<State>,
}

struct Taken {
    process: usize,
    start: u64,
    key: usize,
    value: (StoredAsOf, Entry),
}

struct Process {
    memory: Memory,
    start: u64,
    /// What the last poll read and is not noted yet.
    polled: std::collections::VecDeque<(u64, usize, bool)>,
    noted: u64,
}

impl Process {
    fn new(store: &Store, start: u64) -> Self {
        let at = StoredAsOf { generation: store.generation, position: store.version() };
        let memory = Memory::new(0, 1, Duration::from_secs(3600), at);
        let edits = store.feed.iter().filter(|(_, _, created)| !created);
        let mut edits: Vec<(u64, u64)> =
            edits.map(|(version, number, _)| (memory.hash(&key(*number)), *version)).collect();
        let cut = edits.len().saturating_sub(REMEMBERED);
        let since = edits.drain(..cut).next_back().map_or(0, |(_, version)| version);
        memory.feed.remember(edits.into_iter(), since, memory.feed.now());
        Self { memory, start, polled: Default::default(), noted: at.position }
    }

    /// As `follow::poll`: nothing is skipped, and what does not fit starts everything anew.
    fn poll(&mut self, store: &mut Store) {
        let followed = self.memory.feed.now().stored;
        if followed.generation == store.generation && store.put_back {
            store.generation += 1;
            store.put_back = false;
        }
        if followed.generation != store.generation {
            self.polled.clear();
            self.noted = store.version();
            self.memory.feed.restart(StoredAsOf { generation: store.generation, position: store.version() });
            self.memory.shards.clear();
            self.memory.negative.clear();
            return;
        }
        self.polled = store.feed.iter().skip(self.noted as usize).copied().collect();
    }

    fn note(&mut self) {
        let Some((version, number, created)) = self.polled.pop_front() else { return };
        let key = key(number);
        let hash = self.memory.hash(&key);
        self.memory.feed.note(hash, version, created);
        self.memory.negative.remove(hash, &key);
        if !created {
            self.memory.shards.remove(hash, &key);
        }
        self.noted = version;
    }

    fn keep(&self, number: usize, read: &State, as_of: AsOf) {
        let key = key(number);
        let hash = self.memory.hash(&key);
        let _ = match read {
            Some(entry) => self.memory.keep(hash, &key, entry, as_of),
            None => self.memory.keep_missing(hash, &key, as_of, NOW),
        };
    }

    /// What this process serves of a key is its state at the last change that was noted here, or any later one.
    fn check(&self, store: &Store, number: usize) -> Result<(), TestCaseError> {
        if self.memory.feed.now().stored.generation != store.generation || store.put_back {
            return Ok(()); // It has not seen yet that the store was put back.
        }
        let key = key(number);
        let hash = self.memory.hash(&key);
        let history = &store.history[number];
        let first = history.iter().rposition(|(version, _)| *version <= self.noted);
        let may = |served: &State| {
            first.is_none() && served.is_none()
                || history[first.unwrap_or(0)..].iter().any(|(_, state)| state == served)
        };
        if let Some(hit) = self.memory.shards.get(hash, &key) {
            prop_assert!(may(&Some(hit.entry)), "an old link of {:?}", key);
        }
        if self.memory.negative.has(hash, &key, NOW) {
            prop_assert!(may(&None), "an old absence of {:?}", key);
        }
        Ok(())
    }
}

fn key(number: usize) -> Key {
    Key { domain: DomainId(0), code: Code::parse(format!("code{number}").as_bytes(), Case::Sensitive).unwrap() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn nothing_older_than_a_change_that_was_followed_is_served(steps in steps()) {
        let mut store = Store::default();
        let mut starts = PROCESSES as u64;
        let mut processes: Vec<Process> = (0..starts).map(|start| Process::new(&store, start)).collect();
        let mut redis: [Option<(StoredAsOf, Entry)>; KEYS] = Default::default();
        let mut lookups: Vec<Lookup> = Vec::new();
        let mut taken: Vec<Taken> = Vec::new();
        for step in steps {
            match step {
                Step::Begin { key, exists } => store.begin(key, exists),
                Step::Commit(which) => store.commit(which),
                Step::Ask { process, key } => {
                    let asking = &processes[process];
                    let as_of = asking.memory.feed.now();
                    lookups.push(Lookup { process, start: asking.start, key, as_of, read: None });
                }
                Step::Read(which) => {
                    let count = lookups.len().max(1);
                    if let Some(lookup) = lookups.get_mut(which % count) && lookup.read.is_none() {
                        lookup.read = Some(store.state(lookup.key));
                    }
                }
                Step::Keep(which) | Step::Put(which) => {
                    let count = lookups.len().max(1);
                    let Some(Lookup { process, start, key, as_of, read: Some(read) }) = lookups.get(which % count) else { continue };
                    let keeper = &processes[*process];
                    if keeper.start == *start {
                        match (&step, read) {
                            (Step::Put(_), Some(entry)) => redis[*key] = Some((as_of.stored, entry.clone())),
                            (Step::Put(_), None) => {}
                            _ => {
                                keeper.keep(*key, read, *as_of);
                                lookups.swap_remove(which % count);
                            }
                        }
                    }
                }
                Step::Take { process, key } => {
                    if let Some(value) = redis[key].clone() {
                        taken.push(Taken { process, start: processes[process].start, key, value });
                    }
                }
                Step::KeepTaken(which) => {
                    if !taken.is_empty() {
                        let Taken { process, start, key, value: (stored, entry) } = taken.swap_remove(which % taken.len());
                        let keeper = &processes[process];
                        if keeper.start == start {
                            keeper.keep(key, &Some(entry), keeper.memory.feed.as_of(stored));
                        }
                    }
                }
                Step::Lose(key) => redis[key] = None,
                Step::Poll(process) => processes[process].poll(&mut store),
                Step::Note(process) => processes[process].note(),
                Step::Advance(process) => {
                    let process = &processes[process];
                    if process.noted > process.memory.feed.now().stored.position {
                        process.memory.feed.advance(process.noted);
                    }
                }
                Step::Restart(process) => {
                    processes[process] = Process::new(&store, starts);
                    starts += 1;
                }
                Step::PutBack => {
                    // Its own history is gone. Whoever reads it now reads the backup, and knows only after a poll.
                    let generation = store.generation;
                    let put_back = store.put_back || !store.feed.is_empty();
                    store = Store { generation, made: store.made, put_back, ..Store::default() };
                }
            }
            for process in &processes {
                for number in 0..KEYS {
                    process.check(&store, number)?;
                }
            }
        }
    }
}
