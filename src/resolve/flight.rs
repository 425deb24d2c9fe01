//! Flight: one look-up per key and process at a time.
//!
//! In: look-ups of all workers. Out: to each of them what the store has.
//! Never: asks the store for a key twice at a time; answers with a value that was read before a change which the
//! asker could have seen; says `Missing` when the store did not answer.
//! At its limit: [`READS_MAX`] reads of the store are under way at once; the others wait in the crossing, and what does
//! not fit there is `Unavailable`.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use dashmap::mapref::entry::Entry as Slot;
use tokio::sync::{Semaphore, mpsc};

use super::Memory;
use super::ask::{Answers, Looked, Lookup, Questions};
use super::invalidate::AsOf;
use crate::domain::key::Key;
use crate::domain::link::{Entry, Validity};
use crate::domain::time;
use crate::store::Store;

/// Keys of one read of the store.
const BATCH_MAX: usize = 256;
/// Turns of event loops that are taken up together.
const TURNS_MAX: usize = 64;
/// Reads of the store at once.
const READS_MAX: usize = 4;
/// How long the store may take.
const TIMEOUT: Duration = Duration::from_secs(2);
/// How often a value is read again that was changed while it was read.
const ATTEMPTS_MAX: u32 = 5;
/// Before it is read again: the change is noted already, and the feed's position follows at once.
const AGAIN: Duration = Duration::from_millis(2);

/// Starts the look-up thread. It has a runtime of its own, so that a question from front crosses one thread and not
/// three: with the embedded store that halves what a miss costs.
pub fn spawn(flight: Flight, questions: mpsc::Receiver<Questions>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new()
        .name("waypost-lookup".into())
        .spawn(move || runtime.block_on(Arc::new(flight).run(questions)))?;
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
}

/// Answers on their way, gathered for each worker: what one read answers crosses together.
type Gathered = HashMap<usize, Answers>;

impl Flight {
    #[must_use]
    pub fn new(memory: Arc<Memory>, store: Store, answers: Vec<mpsc::Sender<Answers>>) -> Self {
        Self { memory, store, waiting: DashMap::default(), answers }
    }

    /// Answers look-ups until every worker has gone.
    async fn run(self: Arc<Self>, mut questions: mpsc::Receiver<Questions>) {
        let reads = Arc::new(Semaphore::new(READS_MAX));
        let mut turns = Vec::new();
        while questions.recv_many(&mut turns, TURNS_MAX).await > 0 {
            let keys: Vec<(Key, u64)> = turns
                .drain(..)
                .flatten()
                .filter(|lookup| self.wait(*lookup))
                .map(|lookup| (lookup.key, lookup.hash))
                .collect();
            for keys in keys.chunks(BATCH_MAX) {
                let permit = Arc::clone(&reads).acquire_owned().await.expect("it is never closed");
                let (flight, keys) = (Arc::clone(&self), keys.to_vec());
                tokio::spawn(async move {
                    flight.look_up(keys).await;
                    drop(permit);
                });
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
            let read = self.store.look_up(keys.iter().map(|(key, _)| *key).collect());
            let Ok(Ok(entries)) = tokio::time::timeout(TIMEOUT, read).await else { break };
            let (mut again, mut gathered) = (Vec::new(), Gathered::new());
            for ((key, hash), entry) in keys.into_iter().zip(entries) {
                if !self.settle(key, hash, entry, as_of, &mut gathered) {
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

    /// Keeps what was read and answers those who wait; false if it is not believed and they still wait.
    fn settle(&self, key: Key, hash: u64, entry: Option<Entry>, as_of: AsOf, gathered: &mut Gathered) -> bool {
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
                alone |= self.wait(waiter);
            }
            return !alone;
        }
        match entry {
            None => gather(gathered, waiters, &Looked::Missing),
            Some(entry) if entry.rules.limited && entry.rules.validity(time::now()) == Validity::Valid => {
                self.take_visits(&entry, waiters);
            }
            Some(entry) => gather(gathered, waiters, &Looked::Found(Box::new(entry))),
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
