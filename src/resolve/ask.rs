//! Ask: a core's end of the `lookup` crossing.
//!
//! In: keys that this core's memory cannot answer. Out: to each who asks, what was found.
//! Never: crosses once for each key. What the ready connections of one turn of the event loop ask for crosses
//! together, and so do the answers: with both threads on one CPU, a wake-up for each key and each answer made
//! a miss cost half as much again (PERF.md).
//! At its limit: [`ASKED_MAX`] questions of a core are open; one more is `Unavailable`, and so is what meets a full
//! crossing, and what a store that hangs has not answered within [`PATIENCE_MS`].

use std::cell::{Cell, RefCell};
use std::collections::HashMap;

use tokio::sync::{Notify, mpsc, oneshot};

use super::Tier;
use crate::domain::key::Key;
use crate::domain::link::Entry;

/// Questions of one core that may be open.
pub const ASKED_MAX: usize = 4096;
/// Turns of the event loops whose questions may wait for the look-up thread, in the whole process.
pub const QUESTIONS_MAX: usize = 1024;
/// Messages of answers that may wait for a core: never more than it has questions.
pub const ANSWERS_MAX: usize = ASKED_MAX;

/// How long a visitor waits for the store, in milliseconds; the core's tick, of a second at the most, adds to it.
const PATIENCE_MS: u64 = 2_000;

/// What crosses to back: the questions of one turn.
pub type Questions = Vec<Lookup>;
/// What crosses to a core: the numbers of its questions, and what was found.
pub type Answers = Vec<(u64, Looked)>;

/// A question that crosses from front to back.
#[derive(Clone, Copy, Debug)]
pub struct Lookup {
    pub key: Key,
    pub hash: u64,
    /// Whether a limited link is used by it.
    pub visit: bool,
    /// Whose question it is, and its number there.
    pub worker: usize,
    pub id: u64,
}

/// What was found.
#[derive(Clone, Debug)]
pub enum Looked {
    Found(Box<Entry>, Tier),
    UsedUp,
    Missing,
    Unavailable,
}

#[derive(Debug)]
pub struct Ask {
    worker: usize,
    crossing: mpsc::Sender<Questions>,
    /// Taken by [`Ask::run`].
    answers: RefCell<Option<mpsc::Receiver<Answers>>>,
    next: Cell<u64>,
    open: RefCell<HashMap<u64, Open, ahash::RandomState>>,
    /// The core's coarse time.
    now_ms: Cell<u64>,
    outbox: RefCell<Questions>,
    asked: Notify,
}

/// A question, when it was asked, and who waits for its answer.
#[derive(Debug)]
struct Open {
    since_ms: u64,
    reply: oneshot::Sender<Looked>,
}

impl Ask {
    #[must_use]
    pub fn new(worker: usize, crossing: mpsc::Sender<Questions>, answers: mpsc::Receiver<Answers>) -> Self {
        Self {
            worker,
            crossing,
            answers: RefCell::new(Some(answers)),
            next: Cell::new(0),
            open: RefCell::default(),
            now_ms: Cell::new(0),
            outbox: RefCell::default(),
            asked: Notify::new(),
        }
    }

    /// Asks at the end of this turn; none if too many questions are open. A reply that is dropped is `Unavailable`.
    pub fn ask(&self, key: Key, hash: u64, visit: bool) -> Option<oneshot::Receiver<Looked>> {
        let mut open = self.open.borrow_mut();
        if open.len() >= ASKED_MAX {
            return None;
        }
        let id = self.next.replace(self.next.get() + 1);
        let (reply, looked) = oneshot::channel();
        open.insert(id, Open { since_ms: self.now_ms.get(), reply });
        self.outbox.borrow_mut().push(Lookup { key, hash, visit, worker: self.worker, id });
        // The task that sends is queued behind the connections that are ready now.
        self.asked.notify_one();
        Some(looked)
    }

    /// Sends questions and hands out answers until back has gone.
    pub async fn run(&self) {
        let Some(mut answers) = self.answers.borrow_mut().take() else { return };
        loop {
            tokio::select! {
                biased;
                arrived = answers.recv() => {
                    let Some(arrived) = arrived else { return };
                    self.hand_out(arrived);
                }
                () = self.asked.notified() => {
                    let questions = std::mem::take(&mut *self.outbox.borrow_mut());
                    if let Err(refused) = self.crossing.try_send(questions) {
                        let unavailable = |lookup: Lookup| (lookup.id, Looked::Unavailable);
                        self.hand_out(refused.into_inner().into_iter().map(unavailable).collect());
                    }
                }
            }
        }
    }

    /// Time has passed: whoever has waited too long is told so. A reply that is dropped says `Unavailable`.
    pub fn tick(&self, now_ms: u64) {
        self.now_ms.set(now_ms);
        self.open.borrow_mut().retain(|_, question| now_ms.saturating_sub(question.since_ms) < PATIENCE_MS);
    }

    fn hand_out(&self, answers: Answers) {
        let mut open = self.open.borrow_mut();
        for (id, looked) in answers {
            if let Some(question) = open.remove(&id) {
                // Nobody listens when the visitor has gone.
                let _ = question.reply.send(looked);
            }
        }
    }
}
