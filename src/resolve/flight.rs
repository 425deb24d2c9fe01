//! Flight: one look-up per key and process at a time, in Redis and then in the store.
//!
//! In: look-ups of all workers. Out: to each of them what there is.
//! Never: asks for a key twice at a time; answers with a value that was read before a change which the asker could
//! have seen; says `Missing` when the store did not answer; waits for Redis longer than its time-out.
//! At its limit: at most `lookups` keys are asked of Postgres at once. The others wait in line, and what cannot be
//! answered within `lookup_timeout` is `Unavailable`; so is everything at once while the breaker is open.
//!
//! Everything here runs on one thread: between a belief and the answers that follow from it nothing else happens.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry as Slot;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::LocalSet;

use super::ask::{Answers, Looked, Lookup, Questions};
use super::invalidate::{AsOf, Trust};
use super::tier::Remote;
use super::{Memory, Tier};
use crate::breaker::Breaker;
use crate::domain::key::Key;
use crate::domain::link::{Entry, Validity};
use crate::domain::time;
use crate::store::row::Found;
use crate::store::{Error, Store};

/// Keys of one read of Redis or of the store.
const BATCH_MAX: usize = 256;
/// Turns of event loops that are taken up together.
const TURNS_MAX: usize = 64;
/// How often a value is read again that was changed while it was read.
const ATTEMPTS_MAX: u32 = 5;
/// Before it is read again: the change is noted already, and the feed's position follows at once.
const AGAIN: Duration = Duration::from_millis(2);

/// What look-ups stand on.
#[derive(Debug)]
pub struct Setup {
    pub memory: Arc<Memory>,
    pub store: Store,
    pub remote: Option<Remote>,
    /// Of the store.
    pub breaker: Arc<Breaker>,
    /// Keys that may be asked of the store at once; whoever else looks up many takes its share of it.
    pub lookups: Arc<Semaphore>,
    pub lookup_timeout: Duration,
    /// To each worker.
    pub answers: Vec<mpsc::Sender<Answers>>,
}

/// Starts the look-up thread. It has a runtime of its own, so that a question from front crosses one thread and not
/// three. Only together with `ask`, which gathers questions, does that make misses cheaper (PERF.md).
pub fn spawn(setup: Setup, questions: mpsc::Receiver<Questions>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let run = move || {
        let flight = Rc::new(Flight { setup, waiting: DashMap::default(), line: RefCell::default() });
        runtime.block_on(LocalSet::new().run_until(flight.run(questions)));
    };
    std::thread::Builder::new().name("waypost-lookup".into()).spawn(run)?;
    Ok(())
}

#[derive(Debug)]
struct Flight {
    setup: Setup,
    /// Who waits for each key that is being looked up.
    waiting: DashMap<Key, Vec<Lookup>, ahash::RandomState>,
    /// Keys that wait until they may be asked of the store.
    line: RefCell<VecDeque<Wanted>>,
}

/// A key to be looked up.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    key: Key,
    hash: u64,
    since: Instant,
}

/// Answers on their way, gathered for each worker: what one read answers crosses together.
type Gathered = HashMap<usize, Answers>;

impl Flight {
    /// Answers look-ups until every worker has gone.
    async fn run(self: Rc<Self>, mut questions: mpsc::Receiver<Questions>) {
        let mut turns = Vec::new();
        while questions.recv_many(&mut turns, TURNS_MAX).await > 0 {
            let since = time::monotonic();
            let new = turns.drain(..).flatten().filter(|lookup| self.wait(*lookup));
            let mut wanted: Vec<Wanted> =
                new.map(|lookup| Wanted { key: lookup.key, hash: lookup.hash, since }).collect();
            let mut gathered = Gathered::new();
            wanted.retain(|wanted| match self.remembered(wanted) {
                Some(looked) => {
                    gather(&mut gathered, self.leave(&wanted.key), &looked);
                    false
                }
                None => true,
            });
            self.send(gathered).await;
            for wanted in wanted.chunks(BATCH_MAX) {
                let (flight, wanted) = (Rc::clone(&self), wanted.to_vec());
                if self.setup.remote.is_some() {
                    tokio::task::spawn_local(async move {
                        let wanted = flight.ask_redis(wanted).await;
                        flight.ask_store(wanted).await;
                    });
                } else {
                    flight.ask_store(wanted).await;
                }
            }
        }
    }

    /// True if nobody was waiting for this key: it is to be looked up.
    fn wait(&self, lookup: Lookup) -> bool {
        match self.waiting.entry(lookup.key) {
            Slot::Occupied(mut waiters) => {
                waiters.get_mut().push(lookup);
                false
            }
            Slot::Vacant(slot) => {
                slot.insert(vec![lookup]);
                true
            }
        }
    }

    /// What came into memory after the asker's core had looked there: the answer to somebody else, which left before this
    /// question arrived. Without it, of many who ask for a cold link at a time some would send for it again.
    fn remembered(&self, wanted: &Wanted) -> Option<Looked> {
        let memory = &*self.setup.memory;
        if memory.feed.trust() == Trust::Expired {
            return None;
        }
        if let Some(hit) = memory.shards.get(wanted.hash, &wanted.key) {
            return Some(Looked::Found(Box::new(hit.entry), Tier::Shards));
        }
        memory.negative.has(wanted.hash, &wanted.key, time::now()).then_some(Looked::Missing)
    }

    /// Answers what Redis has and is believed; returns the others.
    async fn ask_redis(&self, wanted: Vec<Wanted>) -> Vec<Wanted> {
        let Some(remote) = &self.setup.remote else { return wanted };
        let keys: Vec<Key> = wanted.iter().map(|wanted| wanted.key).collect();
        let Some(found) = remote.get(&keys).await else { return wanted };
        let mut gathered = Gathered::new();
        let mut rest = Vec::new();
        for (wanted, found) in wanted.into_iter().zip(found) {
            let answered = found.is_some_and(|(stored, entry)| {
                let as_of = self.setup.memory.feed.as_of(stored);
                self.settle(&wanted, Found::Entry(entry), as_of, Tier::Redis, &mut gathered)
            });
            if !answered {
                rest.push(wanted);
            }
        }
        self.send(gathered).await;
        rest
    }

    async fn ask_store(self: Rc<Self>, wanted: Vec<Wanted>) {
        if let Store::Sqlite(_) = self.setup.store {
            // It reads on this thread, and never for long.
            self.look_up(wanted).await;
            return;
        }
        if self.setup.breaker.admits(time::monotonic()) {
            self.line.borrow_mut().extend(wanted);
            self.next().await;
        } else {
            self.give_up(wanted).await;
        }
    }

    /// Asks the store for as many of those in line as may be asked now.
    async fn next(self: Rc<Self>) {
        loop {
            let now = time::monotonic();
            // Who has waited for half of the time has not enough of it left.
            let is_late = |wanted: &Wanted| now.duration_since(wanted.since) > self.setup.lookup_timeout / 2;
            let late: Vec<Wanted> = {
                let mut line = self.line.borrow_mut();
                let late = line.partition_point(is_late);
                line.drain(..late).collect()
            };
            self.give_up(late).await;
            let count = self.line.borrow().len().min(BATCH_MAX).min(self.setup.lookups.available_permits());
            let permits = u32::try_from(count).ok().and_then(|count| {
                Arc::clone(&self.setup.lookups).try_acquire_many_owned(count).ok().filter(|_| count > 0)
            });
            let Some(permits) = permits else { return };
            let wanted: Vec<Wanted> = self.line.borrow_mut().drain(..count).collect();
            let flight = Rc::clone(&self);
            tokio::task::spawn_local(async move {
                flight.look_up(wanted).await;
                drop(permits);
                // Boxed by the task: the next of the line follow on this one.
                flight.next().await;
            });
        }
    }

    /// Reads keys from the store and answers whoever waits for them.
    async fn look_up(&self, mut wanted: Vec<Wanted>) {
        for _ in 0..ATTEMPTS_MAX {
            // Before the read: what changes from here on is not believed.
            let as_of = self.setup.memory.feed.now();
            let Some(found) = self.read(&wanted).await else { break };
            let (mut again, mut gathered) = (Vec::new(), Gathered::new());
            for (one, found) in wanted.into_iter().zip(found) {
                if let (Some(remote), Found::Entry(entry)) = (&self.setup.remote, &found) {
                    remote.put(&one.key, entry, as_of.stored);
                }
                if !self.settle(&one, found, as_of, Tier::Store, &mut gathered) {
                    again.push(one);
                }
            }
            self.send(gathered).await;
            if again.is_empty() {
                return;
            }
            wanted = again;
            tokio::time::sleep(AGAIN).await;
        }
        self.give_up(wanted).await;
    }

    /// None if the store did not answer in time.
    async fn read(&self, wanted: &[Wanted]) -> Option<Vec<Found>> {
        let keys: Vec<Key> = wanted.iter().map(|wanted| wanted.key).collect();
        let now = time::monotonic();
        let waited = wanted.first().map_or(Duration::ZERO, |first| now.duration_since(first.since));
        let left = self.setup.lookup_timeout.saturating_sub(waited);
        let read = match tokio::time::timeout(left, self.setup.store.look_up(keys)).await {
            Ok(read) => read,
            Err(_) => Err(Error::Unavailable("look-ups take longer than postgres.lookup_timeout".into())),
        };
        self.setup.breaker.note(read.as_ref().map(|_| ()), time::monotonic());
        read.ok()
    }

    async fn give_up(&self, wanted: Vec<Wanted>) {
        let mut gathered = Gathered::new();
        for wanted in wanted {
            gather(&mut gathered, self.leave(&wanted.key), &Looked::Unavailable);
        }
        self.send(gathered).await;
    }

    /// Keeps what was read and answers those who wait; false if it is not believed and they still wait.
    fn settle(&self, wanted: &Wanted, found: Found, as_of: AsOf, tier: Tier, gathered: &mut Gathered) -> bool {
        let Wanted { key, hash, .. } = wanted;
        let kept = match &found {
            Found::Entry(entry) => self.setup.memory.keep(*hash, key, entry, as_of),
            Found::Missing => self.setup.memory.keep_missing(*hash, key, as_of, time::now()),
            Found::Unreadable => {
                tracing::error!(code = %key.code, "this link cannot be read from the store: is it written by hand?");
                true
            }
        };
        if !kept {
            return false;
        }
        // Whoever waits by now may have come after the read began. It is believed all the same: had the key changed
        // since, it would not be.
        let waiters = self.leave(key);
        match found {
            Found::Missing => gather(gathered, waiters, &Looked::Missing),
            Found::Unreadable => gather(gathered, waiters, &Looked::Unavailable),
            Found::Entry(entry) if entry.rules.limited && entry.rules.validity(time::now()) == Validity::Valid => {
                self.take_visits(&entry, waiters);
            }
            Found::Entry(entry) => gather(gathered, waiters, &Looked::Found(Box::new(entry), tier)),
        }
        true
    }

    fn leave(&self, key: &Key) -> Vec<Lookup> {
        self.waiting.remove(key).map(|(_, waiters)| waiters).unwrap_or_default()
    }

    async fn send(&self, gathered: Gathered) {
        for (worker, answers) in gathered {
            // A worker that has ended asks no more.
            let _ = self.setup.answers[worker].send(answers).await;
        }
    }

    /// A limited link is found by as many as it has visits left.
    fn take_visits(&self, entry: &Entry, waiters: Vec<Lookup>) {
        for waiter in waiters {
            let worker = self.setup.answers[waiter.worker].clone();
            let (store, entry) = (self.setup.store.clone(), entry.clone());
            let limit = self.setup.lookup_timeout;
            tokio::spawn(async move {
                let taken = async {
                    if waiter.visit { store.take_visit(waiter.key, entry.id, time::now()).await } else { Ok(true) }
                };
                let looked = match tokio::time::timeout(limit, taken).await {
                    Ok(Ok(true)) => Looked::Found(Box::new(entry), Tier::Store),
                    Ok(Ok(false)) => Looked::UsedUp,
                    Ok(Err(_)) | Err(_) => Looked::Unavailable,
                };
                let _ = worker.send(vec![(waiter.id, looked)]).await;
            });
        }
    }
}

fn gather(gathered: &mut Gathered, waiters: Vec<Lookup>, looked: &Looked) {
    for waiter in waiters {
        gathered.entry(waiter.worker).or_default().push((waiter.id, looked.clone()));
    }
}
