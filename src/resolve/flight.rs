//! Flight: one look-up per key and process at a time, in Redis and then in the store; and of each limited link one question
//! at a time for visits.
//!
//! In: look-ups of all workers. Out: to each of them what there is.
//! Never: asks for a key twice at a time; answers with a value that was read before a change which the asker could
//! have seen; says `Missing` when the store did not answer; waits for Redis longer than its time-out.
//! At its limit: at most `lookups` keys are asked of Postgres at once. The others wait in line, and what cannot be
//! answered within `lookup_timeout` is `Unavailable`; so is everything at once while the breaker is open. So is who has
//! waited as long, or for [`VISITOR_WAIT_MAX`], for a visit of a limited link, and who comes when [`VISITORS_MAX`] wait for
//! one of this link, or a moment after the store was asked for one in vain.
//!
//! Everything here runs on one thread: between a belief and the answers that follow from it nothing else happens.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry as Slot;
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};
use tokio::task::LocalSet;

use super::ask::{Answers, Looked, Lookup, Questions};
use super::invalidate::{AsOf, Read, Trust};
use super::quota::{Asked, Next, Quota};
use super::tier::Remote;
use super::{Memory, Tier};
use crate::breaker::{self, Breaker};
use crate::domain::key::Key;
use crate::domain::link::{Entry, LinkId, Validity};
use crate::domain::time;
use crate::store::row::{Found, QuotaAsk, Taken};
use crate::store::{Error, Store};

/// Keys of one read of Redis or of the store.
const BATCH_MAX: usize = 256;
/// Turns of event loops that are taken up together.
const TURNS_MAX: usize = 64;
/// How often a value is read again that was changed while it was read.
const ATTEMPTS_MAX: u32 = 5;
/// Before it is read again: the change is noted already, and the feed's position follows at once.
const AGAIN: Duration = Duration::from_millis(2);
/// Visitors who wait for a visit of one limited link.
const VISITORS_MAX: usize = 4096;
/// The longest that a visitor waits for a visit, whatever `lookup_timeout` is: a core gives its question up after 2 s by a
/// clock that may be a second late, and a visit that comes then is spent for nobody.
const VISITOR_WAIT_MAX: Duration = Duration::from_millis(900);
/// How often somebody looks who has waited too long for a visit of a limited link.
const LATE_EVERY: Duration = Duration::from_millis(50);
/// How long leases are settled at the end.
pub const SETTLE_TIMEOUT: Duration = Duration::from_secs(1);

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
/// It ends when `end` is dropped, or every worker has gone, and what it leased is given back.
pub fn spawn(
    setup: Setup,
    questions: mpsc::Receiver<Questions>,
    end: oneshot::Receiver<Infallible>,
) -> io::Result<JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let run = move || {
        let flight = Rc::new(Flight {
            setup,
            waiting: DashMap::default(),
            line: RefCell::default(),
            limited: RefCell::default(),
            ending: Cell::new(false),
            settled: Notify::new(),
        });
        runtime.block_on(LocalSet::new().run_until(flight.run(questions, end)));
    };
    std::thread::Builder::new().name("waypost-lookup".into()).spawn(run)
}

#[derive(Debug)]
struct Flight {
    setup: Setup,
    /// Who waits for each key that is being looked up.
    waiting: DashMap<Key, Vec<Lookup>, ahash::RandomState>,
    /// Keys that wait until they may be asked of the store.
    line: RefCell<VecDeque<Wanted>>,
    /// Limited links that are visited, each with a task that asks for its visits.
    limited: RefCell<HashMap<LinkId, Limited, ahash::RandomState>>,
    /// Nobody waits any more.
    ending: Cell<bool>,
    /// The last of `limited` has gone.
    settled: Notify,
}

#[derive(Debug)]
struct Limited {
    quota: Quota,
    waiting: Vec<Visitor>,
    woken: Rc<Notify>,
}

/// Whether there is a visit for a visitor.
enum Visit {
    Taken,
    /// The store is asked.
    Waits,
    /// Nobody knows: too many wait, or it was asked in vain a moment ago.
    Refused,
}

/// Who waits for a visit of a limited link.
#[derive(Debug)]
struct Visitor {
    lookup: Lookup,
    entry: Entry,
    /// When the entry was believed.
    as_of: AsOf,
    since: Instant,
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
    /// Answers look-ups until the end.
    async fn run(self: Rc<Self>, mut questions: mpsc::Receiver<Questions>, mut end: oneshot::Receiver<Infallible>) {
        let mut turns = Vec::new();
        loop {
            tokio::select! {
                biased;
                _ = &mut end => break,
                count = questions.recv_many(&mut turns, TURNS_MAX) => if count == 0 { break },
            }
            self.take_up(turns.drain(..).flatten()).await;
        }
        self.ending.set(true);
        for limited in self.limited.borrow_mut().values_mut() {
            limited.waiting.clear();
            limited.woken.notify_one();
        }
        while !self.limited.borrow().is_empty() {
            if tokio::time::timeout(SETTLE_TIMEOUT, self.settled.notified()).await.is_err() {
                tracing::warn!("visits of limited links were not given back: the store does not answer");
                return;
            }
        }
    }

    /// Answers from memory, or looks up.
    async fn take_up(self: &Rc<Self>, lookups: impl Iterator<Item = Lookup>) {
        let since = time::monotonic();
        let (mut wanted, mut gathered) = (Vec::new(), Gathered::new());
        for lookup in lookups {
            if self.wait(lookup) && !self.remembered(&lookup, &mut gathered) {
                wanted.push(Wanted { key: lookup.key, hash: lookup.hash, since });
            }
        }
        self.send(gathered).await;
        for wanted in wanted.chunks(BATCH_MAX) {
            let (flight, wanted) = (Rc::clone(self), wanted.to_vec());
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

    /// Answers what has come into memory since the core looked there, to those who asked a moment before, and visitors of
    /// limited links, who are answered here alone; false if it is not in memory.
    fn remembered(self: &Rc<Self>, lookup: &Lookup, gathered: &mut Gathered) -> bool {
        let memory = &*self.setup.memory;
        if memory.feed.trust() == Trust::Expired {
            return false;
        }
        // Before it is read: what changes from here on is not believed.
        let as_of = memory.feed.now();
        match memory.shards.get(lookup.hash, &lookup.key) {
            Some(hit) => {
                let waiters = self.leave(&lookup.key);
                self.found(hit.entry, as_of, Tier::Shards, waiters, time::monotonic(), gathered);
            }
            None if memory.negative.has(lookup.hash, &lookup.key, time::now()) => {
                gather(gathered, self.leave(&lookup.key), &Looked::Missing);
            }
            None => return false,
        }
        true
    }

    /// Answers with an entry that is believed; of a limited one, each visitor who has a visit. `since`: when the first of
    /// them asked.
    fn found(
        self: &Rc<Self>,
        entry: Entry,
        as_of: AsOf,
        tier: Tier,
        waiters: Vec<Lookup>,
        since: Instant,
        gathered: &mut Gathered,
    ) {
        let (visitors, lookers): (Vec<Lookup>, _) =
            waiters.into_iter().partition(|waiter| entry.rules.limited && waiter.visit);
        let validity = entry.rules.validity(time::now());
        for lookup in visitors {
            let looked = match validity {
                Validity::Valid => match self.visit(lookup, &entry, as_of, since) {
                    Visit::Taken => Looked::Found(Box::new(entry.clone()), Tier::Shards),
                    Visit::Refused => Looked::Unavailable,
                    Visit::Waits => continue,
                },
                // It is decided here: a moment later, when the core judges, it may have begun, and nobody counted.
                Validity::NotYet => Looked::Missing,
                Validity::Expired | Validity::Gone => Looked::Found(Box::new(entry.clone()), tier),
            };
            gather(gathered, vec![lookup], &looked);
        }
        gather(gathered, lookers, &Looked::Found(Box::new(entry), tier));
    }

    /// Answers what Redis has and is believed; returns the others.
    async fn ask_redis(self: &Rc<Self>, wanted: Vec<Wanted>) -> Vec<Wanted> {
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
    async fn look_up(self: &Rc<Self>, mut wanted: Vec<Wanted>) {
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
    fn settle(
        self: &Rc<Self>,
        wanted: &Wanted,
        found: Found,
        as_of: AsOf,
        tier: Tier,
        gathered: &mut Gathered,
    ) -> bool {
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
            Found::Entry(entry) => self.found(entry, as_of, tier, waiters, wanted.since, gathered),
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

    /// Spends a visit for a visitor, who waits if there is none in memory.
    fn visit(self: &Rc<Self>, lookup: Lookup, entry: &Entry, as_of: AsOf, since: Instant) -> Visit {
        let (id, now) = (entry.id, time::monotonic());
        let mut limited = self.limited.borrow_mut();
        let limited = limited.entry(id).or_insert_with(|| {
            tokio::task::spawn_local(Rc::clone(self).look_after(id, lookup.key, lookup.hash));
            Limited { quota: Quota::new(now), waiting: Vec::new(), woken: Rc::default() }
        });
        // Nobody is served before those who wait.
        if limited.waiting.is_empty()
            && limited.quota.take(now, |as_of| self.setup.memory.feed.believes(lookup.hash, as_of, Read::Link))
        {
            return Visit::Taken;
        }
        if limited.quota.is_refused(now) || limited.waiting.len() >= VISITORS_MAX {
            return Visit::Refused;
        }
        limited.waiting.push(Visitor { lookup, entry: entry.clone(), as_of, since });
        limited.woken.notify_one();
        Visit::Waits
    }

    /// Asks for the visits of a limited link and gives them back, until nobody visits it any more.
    async fn look_after(self: Rc<Self>, id: LinkId, key: Key, hash: u64) {
        let believes = |as_of: AsOf| self.setup.memory.feed.believes(hash, as_of, Read::Link);
        loop {
            self.dismiss_late(id).await;
            let now = time::monotonic();
            let (next, waiting, woken) = {
                let mut all = self.limited.borrow_mut();
                let Some(limited) = all.get_mut(&id) else { return };
                let waiting = limited.waiting.len();
                let next = limited.quota.next(now, waiting > 0, self.ending.get(), believes);
                self.setup.memory.unclaimed.add(std::mem::take(&mut limited.quota.unclaimed));
                (next, waiting, Rc::clone(&limited.woken))
            };
            let (wanted, settled) = match next {
                Next::Ask { wanted, settled } => (wanted, settled),
                Next::Wait(until) => {
                    let until = if waiting > 0 { until.min(now + LATE_EVERY) } else { until };
                    let _ = tokio::time::timeout_at(until.into(), woken.notified()).await;
                    continue;
                }
                Next::Rest => {
                    let mut all = self.limited.borrow_mut();
                    all.remove(&id);
                    if all.is_empty() {
                        self.settled.notify_one();
                    }
                    return;
                }
            };
            let as_of = self.setup.memory.feed.now();
            let number = rand::random::<u64>() >> 1;
            let is_sent = self.setup.breaker.state() == breaker::State::Closed;
            let may_be_granted = is_sent && matches!(self.setup.store, Store::Postgres(_));
            let asked = Asked { wanted, may_be_granted, number, at: time::monotonic(), as_of };
            let mut taken = None;
            if is_sent {
                let waiting = u32::try_from(waiting).unwrap_or(u32::MAX);
                let ask = QuotaAsk { key, id, wanted, waiting, lease: number, settled };
                let mut asking = std::pin::pin!(self.setup.store.take_visits(ask, time::now()));
                taken = loop {
                    match tokio::time::timeout(LATE_EVERY, &mut asking).await {
                        Ok(taken) => break taken.ok(),
                        Err(_) => self.dismiss_late(id).await,
                    }
                };
            }
            // Nothing is spent for those who have gone.
            self.dismiss_late(id).await;
            let again = self.hand_out(id, asked, taken, believes).await;
            self.take_up(again.into_iter()).await;
        }
    }

    /// Answers those who wait for a visit by what the store said; returns those whose entry has changed meanwhile.
    async fn hand_out(
        &self,
        id: LinkId,
        asked: Asked,
        taken: Option<Taken>,
        believes: impl Fn(AsOf) -> bool,
    ) -> Vec<Lookup> {
        let (mut again, mut gathered) = (Vec::new(), Gathered::new());
        if let Some(limited) = self.limited.borrow_mut().get_mut(&id) {
            let now = time::monotonic();
            limited.quota.answered(asked, taken, now);
            for visitor in std::mem::take(&mut limited.waiting) {
                let (lookup, is_known) = (visitor.lookup, believes(visitor.as_of));
                let looked = match taken {
                    _ if limited.quota.take(now, |as_of| is_known && believes(as_of)) => {
                        Looked::Found(Box::new(visitor.entry), Tier::Store)
                    }
                    _ if !is_known => {
                        again.push(lookup);
                        continue;
                    }
                    Some(Taken::UsedUp) if asked.wanted > 0 => {
                        // A HEAD takes no visit, and would be told of the entry until the feed has it.
                        self.setup.memory.shards.remove(lookup.hash, &lookup.key);
                        Looked::UsedUp
                    }
                    Some(Taken::Held) | None if asked.wanted > 0 => Looked::Unavailable,
                    // More wait than were granted, or none was asked for.
                    _ => {
                        limited.waiting.push(visitor);
                        continue;
                    }
                };
                gather(&mut gathered, vec![lookup], &looked);
            }
        }
        self.send(gathered).await;
        again
    }

    /// Tells those who have waited too long for a visit of a limited link that it cannot be known.
    async fn dismiss_late(&self, id: LinkId) {
        let now = time::monotonic();
        let limit = self.setup.lookup_timeout.min(VISITOR_WAIT_MAX);
        let is_late = |visitor: &mut Visitor| now.duration_since(visitor.since) >= limit;
        let late: Vec<Lookup> = match self.limited.borrow_mut().get_mut(&id) {
            Some(limited) => limited.waiting.extract_if(.., is_late).map(|visitor| visitor.lookup).collect(),
            None => Vec::new(),
        };
        let mut gathered = Gathered::new();
        gather(&mut gathered, late, &Looked::Unavailable);
        self.send(gathered).await;
    }
}

fn gather(gathered: &mut Gathered, waiters: Vec<Lookup>, looked: &Looked) {
    for waiter in waiters {
        gathered.entry(waiter.worker).or_default().push((waiter.id, looked.clone()));
    }
}
