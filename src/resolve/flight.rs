//! Flight: one look-up per key and process at a time.
//!
//! In: look-ups of all workers. Out: to each of them what the store has.
//! Never: asks the store for a key twice at a time; answers with a value that was read before a change which the
//! asker could have seen; says `Missing` when the store did not answer.
//! At its limit: what waits longer than a core's patience is answered there (see `ask`), not here.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dashmap::DashMap;
use dashmap::mapref::entry::Entry as Slot;
use tokio::sync::mpsc;

use super::Memory;
use super::ask::{Answers, Looked, Lookup, Questions};
use super::invalidate::AsOf;
use crate::domain::key::Key;
use crate::domain::link::{Entry, Validity};
use crate::domain::time;
use crate::store::row::Found;
use crate::store::{Error, Store};

/// Keys of one read of the store.
const BATCH_MAX: usize = 256;
/// Turns of event loops that are taken up together.
const TURNS_MAX: usize = 64;
/// How often a value is read again that was changed while it was read.
const ATTEMPTS_MAX: u32 = 5;
/// Before it is read again: the change is noted already, and the feed's position follows at once.
const AGAIN: Duration = Duration::from_millis(2);

/// Starts the look-up thread. It has a runtime of its own, so that a question from front crosses one thread and not
/// three. Only together with `ask`, which gathers questions, does that make misses cheaper (PERF.md).
pub fn spawn(flight: Flight, questions: mpsc::Receiver<Questions>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("waypost-lookup".into()).spawn(move || runtime.block_on(flight.run(questions)))?;
    Ok(())
}

#[derive(Debug)]
pub struct Flight {
    memory: Arc<Memory>,
    store: Store,
    /// Who waits for each key that is being looked up.
    waiting: DashMap<Key, Vec<Lookup>, ahash::RandomState>,
    /// To each worker.
    answers: Vec<mpsc::Sender<Answers>>,
    /// The last read of the store failed.
    failing: AtomicBool,
}

/// Answers on their way, gathered for each worker: what one read answers crosses together.
type Gathered = HashMap<usize, Answers>;

impl Flight {
    #[must_use]
    pub fn new(memory: Arc<Memory>, store: Store, answers: Vec<mpsc::Sender<Answers>>) -> Self {
        Self { memory, store, waiting: DashMap::default(), answers, failing: AtomicBool::new(false) }
    }

    /// Answers look-ups until every worker has gone.
    async fn run(self, mut questions: mpsc::Receiver<Questions>) {
        let mut turns = Vec::new();
        while questions.recv_many(&mut turns, TURNS_MAX).await > 0 {
            let new = turns.drain(..).flatten().filter(|lookup| self.wait(*lookup));
            let keys: Vec<(Key, u64)> = new.map(|lookup| (lookup.key, lookup.hash)).collect();
            for keys in keys.chunks(BATCH_MAX) {
                self.look_up(keys.to_vec()).await;
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

    async fn look_up(&self, mut keys: Vec<(Key, u64)>) {
        for _ in 0..ATTEMPTS_MAX {
            // Before the read: what changes from here on is not believed.
            let as_of = self.memory.feed.now();
            let read = self.store.look_up(keys.iter().map(|(key, _)| *key).collect()).await;
            self.note(read.as_ref().err());
            let Ok(found) = read else { break };
            let (mut again, mut gathered) = (Vec::new(), Gathered::new());
            for ((key, hash), found) in keys.into_iter().zip(found) {
                if !self.settle(key, hash, found, as_of, &mut gathered) {
                    again.push((key, hash));
                }
            }
            self.send(gathered).await;
            if again.is_empty() {
                return;
            }
            keys = again;
            tokio::time::sleep(AGAIN).await;
        }
        let mut gathered = Gathered::new();
        for (key, _) in keys {
            gather(&mut gathered, self.leave(&key), &Looked::Unavailable);
        }
        self.send(gathered).await;
    }

    /// A line of the log when look-ups begin to fail, and one when they work again.
    fn note(&self, error: Option<&Error>) {
        match (error, self.failing.swap(error.is_some(), Ordering::Relaxed)) {
            (Some(error), false) => tracing::warn!(%error, "look-ups fail: links that are not in memory are 503"),
            (None, true) => tracing::info!("look-ups work again"),
            _ => {}
        }
    }

    /// Keeps what was read and answers those who wait; false if it is not believed and they still wait.
    fn settle(&self, key: Key, hash: u64, found: Found, as_of: AsOf, gathered: &mut Gathered) -> bool {
        let kept = match &found {
            Found::Entry(entry) => self.memory.keep(hash, &key, entry, as_of),
            Found::Missing => self.memory.keep_missing(hash, &key, as_of, time::now()),
            Found::Unreadable => {
                tracing::error!(code = %key.code, "this link cannot be read from the store: is it written by hand?");
                true
            }
        };
        if !kept {
            return false;
        }
        // Whoever waits came before that question: this thread lets nobody in between.
        let waiters = self.leave(&key);
        match found {
            Found::Missing => gather(gathered, waiters, &Looked::Missing),
            Found::Unreadable => gather(gathered, waiters, &Looked::Unavailable),
            Found::Entry(entry) if entry.rules.limited && entry.rules.validity(time::now()) == Validity::Valid => {
                self.take_visits(&entry, waiters);
            }
            Found::Entry(entry) => gather(gathered, waiters, &Looked::Found(Box::new(entry))),
        }
        true
    }

    fn leave(&self, key: &Key) -> Vec<Lookup> {
        self.waiting.remove(key).map(|(_, waiters)| waiters).unwrap_or_default()
    }

    async fn send(&self, gathered: Gathered) {
        for (worker, answers) in gathered {
            // A worker that has ended asks no more.
            let _ = self.answers[worker].send(answers).await;
        }
    }

    /// A limited link is found by as many as it has visits left.
    fn take_visits(&self, entry: &Entry, waiters: Vec<Lookup>) {
        for waiter in waiters {
            let (store, entry, worker) = (self.store.clone(), entry.clone(), self.answers[waiter.worker].clone());
            tokio::spawn(async move {
                let taken =
                    if waiter.visit { store.take_visit(waiter.key, entry.id, time::now()).await } else { Ok(true) };
                let looked = match taken {
                    Ok(true) => Looked::Found(Box::new(entry)),
                    Ok(false) => Looked::UsedUp,
                    Err(_) => Looked::Unavailable,
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
