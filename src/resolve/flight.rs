//! Flight: one look-up per key and process at a time.
//!
//! In: look-ups of all workers. Out: to each of them what the store has.
//! Never: asks the store for a key twice at a time; answers with a value that was read before a change which the
//! asker could have seen; says `Missing` when the store did not answer.
//! At its limit: [`BATCHES_MAX`] batches are with the store at once; the others wait in the crossing, and what does
//! not fit there is `Unavailable`.

use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use dashmap::mapref::entry::Entry as Slot;
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::Memory;
use super::invalidate::AsOf;
use crate::domain::key::Key;
use crate::domain::link::{Entry, Validity};
use crate::domain::time;
use crate::store::Store;

/// Keys of one read of the store.
const BATCH_MAX: usize = 256;
/// Reads of the store at once.
const BATCHES_MAX: usize = 4;
/// How long the store may take.
const TIMEOUT: Duration = Duration::from_secs(2);
/// How often a value is read again that was changed while it was read.
const ATTEMPTS_MAX: u32 = 5;
/// Before it is read again: the change is noted already, and the feed's position follows at once.
const AGAIN: Duration = Duration::from_millis(2);

/// A question that crosses from front to back.
#[derive(Debug)]
pub struct Lookup {
    pub key: Key,
    pub hash: u64,
    /// Whether a limited link is used by it.
    pub visit: bool,
    pub reply: oneshot::Sender<Looked>,
}

/// What was found. A reply that is dropped is to be read as `Unavailable`.
#[derive(Clone, Debug)]
pub enum Looked {
    Found(Box<Entry>),
    UsedUp,
    Missing,
    Unavailable,
}

#[derive(Debug)]
struct Waiter {
    visit: bool,
    reply: oneshot::Sender<Looked>,
}

#[derive(Debug)]
pub struct Flight {
    memory: Arc<Memory>,
    store: Store,
    /// Who waits for each key that is being looked up.
    waiting: DashMap<Key, Vec<Waiter>, ahash::RandomState>,
}

impl Flight {
    #[must_use]
    pub fn new(memory: Arc<Memory>, store: Store) -> Self {
        Self { memory, store, waiting: DashMap::default() }
    }

    /// Answers look-ups until every worker has gone.
    pub async fn run(self: Arc<Self>, mut lookups: mpsc::Receiver<Lookup>) {
        let batches = Arc::new(Semaphore::new(BATCHES_MAX));
        let mut batch = Vec::with_capacity(BATCH_MAX);
        while lookups.recv_many(&mut batch, BATCH_MAX).await > 0 {
            let keys: Vec<(Key, u64)> = batch.drain(..).filter_map(|lookup| self.join(lookup)).collect();
            if keys.is_empty() {
                continue;
            }
            let permit = Arc::clone(&batches).acquire_owned().await.expect("it is never closed");
            let flight = Arc::clone(&self);
            tokio::spawn(async move {
                flight.look_up(keys).await;
                drop(permit);
            });
        }
    }

    /// Waits for a look-up of the same key, or returns the key that is to be looked up.
    fn join(&self, lookup: Lookup) -> Option<(Key, u64)> {
        self.wait(lookup.key, Waiter { visit: lookup.visit, reply: lookup.reply }).then_some((lookup.key, lookup.hash))
    }

    /// True if nobody was waiting for this key.
    fn wait(&self, key: Key, waiter: Waiter) -> bool {
        match self.waiting.entry(key) {
            Slot::Occupied(mut waiters) => {
                waiters.get_mut().push(waiter);
                false
            }
            Slot::Vacant(slot) => {
                slot.insert(vec![waiter]);
                true
            }
        }
    }

    async fn look_up(&self, mut keys: Vec<(Key, u64)>) {
        for _ in 0..ATTEMPTS_MAX {
            // Before the read: what changes from here on is not believed.
            let as_of = self.memory.feed.now();
            let read = self.store.look_up(keys.iter().map(|(key, _)| *key).collect());
            let Ok(Ok(entries)) = tokio::time::timeout(TIMEOUT, read).await else { break };
            let mut again = Vec::new();
            for ((key, hash), entry) in keys.into_iter().zip(entries) {
                if !self.settle(key, hash, entry, as_of) {
                    again.push((key, hash));
                }
            }
            if again.is_empty() {
                return;
            }
            keys = again;
            tokio::time::sleep(AGAIN).await;
        }
        for (key, _) in keys {
            self.answer(self.leave(&key), Looked::Unavailable);
        }
    }

    /// Keeps what was read and tells it to those who wait; false if it is not believed and they still wait.
    fn settle(&self, key: Key, hash: u64, entry: Option<Entry>, as_of: AsOf) -> bool {
        let kept = match &entry {
            Some(entry) => self.memory.keep(hash, &key, entry, as_of),
            None => self.memory.keep_missing(hash, &key, as_of, time::now()),
        };
        if !kept {
            return false;
        }
        let waiters = self.leave(&key);
        // Who came after a change that this value does not have must not get it. They left before this question, so
        // whoever comes later asks the store or finds what is kept.
        if !self.memory.feed.believes(hash, as_of) {
            let mut alone = false;
            for waiter in waiters {
                alone |= self.wait(key, waiter);
            }
            return !alone;
        }
        match entry {
            None => self.answer(waiters, Looked::Missing),
            Some(entry) if entry.rules.limited && entry.rules.validity(time::now()) == Validity::Valid => {
                self.take_visits(key, &entry, waiters);
            }
            Some(entry) => self.answer(waiters, Looked::Found(Box::new(entry))),
        }
        true
    }

    fn leave(&self, key: &Key) -> Vec<Waiter> {
        self.waiting.remove(key).map(|(_, waiters)| waiters).unwrap_or_default()
    }

    fn answer(&self, waiters: Vec<Waiter>, looked: Looked) {
        for waiter in waiters {
            // Nobody listens when the visitor has gone.
            let _ = waiter.reply.send(looked.clone());
        }
    }

    /// A limited link is found by as many as it has visits left.
    fn take_visits(&self, key: Key, entry: &Entry, waiters: Vec<Waiter>) {
        for waiter in waiters {
            let (store, entry) = (self.store.clone(), entry.clone());
            tokio::spawn(async move {
                let taken = if waiter.visit { store.take_visit(key, entry.id, time::now()).await } else { Ok(true) };
                let _ = waiter.reply.send(match taken {
                    Ok(true) => Looked::Found(Box::new(entry)),
                    Ok(false) => Looked::UsedUp,
                    Err(_) => Looked::Unavailable,
                });
            });
        }
    }
}
