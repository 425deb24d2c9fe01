//! Redis: the tier between memory and store, the hints of changes, and the place where instances count together.
//!
//! In: keys and values as bytes, scripts. Out: what Redis has, or nothing when it did not answer in time.
//! Never: fails because a server is away; makes a caller wait longer than `redis.timeout`; decides whether a value may
//! be believed; holds the only copy of anything.
//! At its limit: [`WRITES_MAX`] writes wait, more are dropped and counted; a value longer than [`VALUE_BYTES_MAX`] is a
//! miss; after failures in a row nothing is asked for a while (`breaker`), and the connection is made anew.
//!
//! A stand-alone server, the master that Sentinel names, and a Cluster look the same from outside. In a Cluster a call
//! has failed only when none of its keys was answered: those of a node that is away, or that have just moved, are misses.

mod cluster;
mod connect;
pub mod limits;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ::redis::aio::PubSub;
use ::redis::{Cmd, ErrorKind, RedisError, RedisResult, ServerErrorKind, Value, cmd};
use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use crate::breaker::{self, Breaker};
use crate::config;
use crate::domain::time::monotonic;
use cluster::{Cluster, slot};
pub use connect::BadUrl;
use connect::{CONNECT_TIMEOUT, Form, Line, Target};

/// A longer value is none of ours.
pub const VALUE_BYTES_MAX: usize = 16 << 10;
/// Keys to be written that wait.
pub const WRITES_MAX: usize = 16_384;
/// Tokio's timers go off up to this late: their wheel counts whole milliseconds, and so does `epoll_wait`.
const TIMER: Duration = Duration::from_millis(2);
/// Writes that share a round trip.
const WRITES_AT_ONCE: usize = 512;
/// How often a Redis that is left alone may be asked whether it is back; its breaker lets less through.
const PROBE_EVERY: Duration = Duration::from_secs(1);
/// A subscription on which nothing came for so long is asked whether it lives.
const PING_EVERY: Duration = Duration::from_secs(5);

/// A clonable handle. With the last of them its connections end.
#[derive(Clone)]
pub struct Redis {
    link: Arc<Link>,
    writes: mpsc::Sender<Write>,
}

impl fmt::Debug for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Redis")
    }
}

/// What the handles and the writing task share.
struct Link {
    servers: Servers,
    breaker: Breaker,
    timeout: Duration,
    ttl: Duration,
    prefix: String,
    counters: Counters,
}

enum Servers {
    One { target: Arc<Target>, line: Line },
    Cluster(Cluster),
}

#[derive(Default)]
struct Counters {
    hits: AtomicU64,
    misses: AtomicU64,
    garbage: AtomicU64,
    timeouts: AtomicU64,
    errors: AtomicU64,
    dropped: AtomicU64,
}

/// For `/metrics`, since the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Figures {
    pub state: breaker::State,
    /// How often the breaker opened.
    pub opened: u64,
    pub hits: u64,
    pub misses: u64,
    /// Values that cannot be ours: too long, or of another type.
    pub garbage: u64,
    /// Commands that were not answered in time.
    pub timeouts: u64,
    /// Commands that were answered with an error, or could not be sent.
    pub errors: u64,
    /// Writes that were given up: too many waited, the value was too long, or Redis did not answer.
    pub dropped: u64,
}

enum Write {
    Set { key: Vec<u8>, value: Vec<u8> },
    Publish { message: Vec<u8> },
}

/// A Lua script with its name in the server's cache of scripts.
pub struct Script {
    source: String,
    hash: String,
}

impl Script {
    #[must_use]
    pub fn new(source: String) -> Self {
        let hash = ::redis::Script::new(&source).get_hash().to_owned();
        Self { source, hash }
    }
}

/// A subscription is over; a new one must be made.
#[derive(Debug, thiserror::Error)]
#[error("no hints from redis: {0}")]
pub struct Lost(String);

/// A subscription to the hints that something has changed. Those that came since the last look are one.
pub struct Hints(mpsc::Receiver<Result<(), Lost>>);

impl Redis {
    /// Checks the configuration and begins to connect in the background.
    ///
    /// # Errors
    /// The URL or the file of authorities cannot be used. A server that is away is no error.
    ///
    /// # Panics
    /// Outside of a tokio runtime with timers: the connection lives in it. Callers may be of another such runtime.
    pub fn open(settings: &config::Redis, breaker: config::Breaker) -> Result<Self, BadUrl> {
        let servers = match Form::new(settings)? {
            Form::Cluster(seeds) => Servers::Cluster(Cluster::open(seeds, breaker.failures)),
            Form::One(target) => {
                let target = Arc::new(target);
                Servers::One { line: Line::open(Arc::clone(&target), breaker.failures), target }
            }
        };
        let link = Arc::new(Link {
            servers,
            breaker: Breaker::new("redis", breaker),
            timeout: settings.timeout,
            ttl: settings.ttl,
            prefix: settings.prefix.clone(),
            counters: Counters::default(),
        });
        let (writes, waiting) = mpsc::channel(WRITES_MAX);
        tokio::spawn(write(Arc::clone(&link), waiting));
        Ok(Self { link, writes })
    }

    /// What every key must begin with; keys are given whole.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.link.prefix
    }

    /// What Redis has of `keys`, in their order, after at most `redis.timeout`. None when it did not answer, or is left
    /// alone since it has not answered before.
    ///
    /// An empty value counts as none: `GETRANGE` does not tell them apart. It is asked for instead of `GET`, so that of
    /// a huge value under a key of ours only its beginning is sent; measured with `redis-benchmark`, it costs the same.
    pub async fn get_many(&self, keys: &[Vec<u8>]) -> Option<Vec<Option<Vec<u8>>>> {
        if keys.is_empty() {
            return Some(Vec::new());
        }
        let get = |key: &Vec<u8>| {
            let mut command = cmd("GETRANGE");
            // The last index is included: one byte more than fits.
            command.arg(key).arg(0).arg(VALUE_BYTES_MAX);
            (slot(key), command)
        };
        let answers = self.link.ask(keys.iter().map(get).collect(), self.link.deadline()).await?;
        Some(answers.into_iter().map(|answer| self.link.value(answer)).collect())
    }

    /// Counts a value that was whole for Redis and is none for whoever asked.
    pub fn count_garbage(&self) {
        count(&self.link.counters.garbage, 1);
    }

    /// Writes a value soon, for `redis.ttl` less up to a tenth. Nobody learns whether it worked.
    pub fn set(&self, key: Vec<u8>, value: Vec<u8>) {
        if value.len() > VALUE_BYTES_MAX {
            count(&self.link.counters.dropped, 1);
        } else {
            self.write(Write::Set { key, value });
        }
    }

    /// Sends a message to whoever has [`Redis::hints`], soon, behind the writes before it.
    pub fn publish(&self, message: Vec<u8>) {
        self.write(Write::Publish { message });
    }

    /// Runs a script that touches one key, after at most `redis.timeout`; none when it did not run, or nobody knows
    /// whether it did.
    pub async fn script(&self, script: &Script, key: &[u8], arguments: &[i64]) -> Option<Value> {
        let run = |name: &str, what: &str| {
            let mut command = cmd(name);
            command.arg(what).arg(1).arg(key);
            arguments.iter().for_each(|argument| {
                command.arg(*argument);
            });
            vec![(slot(key), command)]
        };
        let deadline = self.link.deadline();
        let mut answer = self.link.ask(run("EVALSHA", &script.hash), deadline).await?.pop()?;
        if matches!(&answer, Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript)) {
            // It keeps what it runs, on this node, until it is restarted or flushed.
            answer = self.link.ask(run("EVAL", &script.source), deadline).await?.pop()?;
        }
        answer.ok()
    }

    /// Subscribes to the messages of [`Redis::publish`], on a connection of its own: to the server, to the present
    /// master, or to some node of the Cluster (a node passes each message on to all others). It ends
    /// with [`Lost`]; what was sent before the next one is made is gone, so whoever makes one looks once for themselves.
    ///
    /// # Errors
    /// There is nobody to subscribe to. It takes at most a second for each server that is asked.
    pub async fn hints(&self) -> Result<Hints, Lost> {
        let channel = self.link.channel();
        let lost = |error: RedisError| Lost(error.to_string());
        match &self.link.servers {
            Servers::One { target, .. } => {
                let client = target.client().await.map_err(lost)?;
                connect::subscribe(&client, &channel).await.map(Hints::new).map_err(lost)
            }
            Servers::Cluster(cluster) => {
                let mut outcome = Err(Lost("the cluster has no nodes".to_owned()));
                for client in cluster.anybody() {
                    outcome = connect::subscribe(&client, &channel).await.map(Hints::new).map_err(lost);
                    if outcome.is_ok() {
                        break;
                    }
                }
                outcome
            }
        }
    }

    #[must_use]
    pub fn figures(&self) -> Figures {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.link.counters;
        Figures {
            state: self.link.breaker.state(),
            opened: self.link.breaker.opened(),
            hits: read(&counters.hits),
            misses: read(&counters.misses),
            garbage: read(&counters.garbage),
            timeouts: read(&counters.timeouts),
            errors: read(&counters.errors),
            dropped: read(&counters.dropped),
        }
    }

    fn write(&self, write: Write) {
        if self.writes.try_send(write).is_err() {
            count(&self.link.counters.dropped, 1);
        }
    }
}

impl Hints {
    fn new(pubsub: PubSub) -> Self {
        let (hint, hints) = mpsc::channel(1);
        tokio::spawn(listen(pubsub, hint));
        Self(hints)
    }

    /// Waits until something was published.
    ///
    /// # Errors
    /// The connection is gone, or does not answer: the subscription is over.
    pub async fn next(&mut self) -> Result<(), Lost> {
        self.0.recv().await.unwrap_or_else(|| Err(Lost("the subscription is over".to_owned())))
    }
}

impl Link {
    fn deadline(&self) -> Instant {
        Instant::from_std(monotonic() + self.timeout.saturating_sub(TIMER).max(TIMER))
    }

    fn channel(&self) -> String {
        format!("{}changes", self.prefix)
    }

    /// The answers to `commands`, of which there is at least one, in their order; none when not one was answered.
    async fn ask(&self, commands: Vec<(u16, Cmd)>, deadline: Instant) -> Option<Vec<RedisResult<Value>>> {
        if !self.breaker.admits(monotonic()) {
            return None;
        }
        let answers = match &self.servers {
            Servers::One { line, .. } => {
                line.run(commands.into_iter().map(|(_, command)| command).collect(), deadline).await
            }
            Servers::Cluster(cluster) => cluster.run(commands, deadline).await,
        };
        let failures = || answers.iter().filter_map(|answer| answer.as_ref().err()).filter(|error| !is_answer(error));
        let failed = failures().count();
        let timeouts = failures().filter(|error| error.is_timeout()).count();
        let refused = answers.iter().filter(|answer| answer.as_ref().is_err_and(is_refusal)).count();
        count(&self.counters.timeouts, timeouts as u64);
        count(&self.counters.errors, (failed - timeouts + refused) as u64);
        let answered = failed < answers.len();
        self.breaker.note(failures().next().filter(|_| !answered).map_or(Ok(()), Err), monotonic());
        answered.then_some(answers)
    }

    /// Asks something while the breaker is open, which lets it through now and then: an instance without misses would not
    /// find out that Redis is back.
    async fn probe(&self) {
        if self.breaker.state() != breaker::State::Closed {
            let key = format!("{}probe", self.prefix).into_bytes();
            let mut command = cmd("GETRANGE");
            command.arg(&key).arg(0).arg(0);
            let _ = self.ask(vec![(slot(&key), command)], self.deadline()).await;
        }
    }

    fn value(&self, answer: RedisResult<Value>) -> Option<Vec<u8>> {
        let (counter, value) = match answer {
            Ok(Value::BulkString(bytes)) if bytes.is_empty() => (&self.counters.misses, None),
            Ok(Value::BulkString(bytes)) if bytes.len() <= VALUE_BYTES_MAX => (&self.counters.hits, Some(bytes)),
            Ok(_) => (&self.counters.garbage, None),
            Err(error) if is_answer(&error) && !is_refusal(&error) => (&self.counters.garbage, None),
            // It was counted as an error or a time-out.
            Err(_) => return None,
        };
        count(counter, 1);
        value
    }

    fn command(&self, write: Write) -> (u16, Cmd) {
        match write {
            Write::Set { key, value } => {
                let ttl_ms = u64::try_from(self.ttl.as_millis()).unwrap_or(u64::MAX);
                // What was written together does not expire together.
                let ttl_ms = ttl_ms - rand::random_range(0..=ttl_ms / 10);
                let mut command = cmd("SET");
                command.arg(&key).arg(value).arg("PX").arg(ttl_ms);
                (slot(&key), command)
            }
            Write::Publish { message } => {
                let channel = self.channel();
                let mut command = cmd("PUBLISH");
                command.arg(&channel).arg(message);
                // Any node will do.
                (slot(channel.as_bytes()), command)
            }
        }
    }
}

/// Takes messages as they come, since the client would keep any number of them.
async fn listen(pubsub: PubSub, hint: mpsc::Sender<Result<(), Lost>>) {
    let (mut sink, mut messages) = pubsub.split();
    let lost = loop {
        let came = tokio::select! {
            () = hint.closed() => return,
            message = timeout(PING_EVERY, messages.next()) => message.map(|message| message.is_some()),
        };
        match came {
            // When it is full, one waits that says the same.
            Ok(true) => drop(hint.try_send(Ok(()))),
            Ok(false) => break "the connection was closed".to_owned(),
            Err(_) => {
                let pong = timeout(CONNECT_TIMEOUT, sink.ping::<Value>()).await;
                if let Err(error) = pong.unwrap_or_else(|_| Err(connect::timed_out())) {
                    break error.to_string();
                }
            }
        }
    };
    // Nobody may be left who wants to know.
    let _ = hint.send(Err(Lost(lost))).await;
}

/// Sends what is to be written, until the last handle is gone.
async fn write(link: Arc<Link>, mut waiting: mpsc::Receiver<Write>) {
    let mut writes = Vec::with_capacity(WRITES_AT_ONCE);
    let mut ticks = tokio::time::interval(PROBE_EVERY);
    loop {
        tokio::select! {
            count = waiting.recv_many(&mut writes, WRITES_AT_ONCE) => if count == 0 { return },
            _ = ticks.tick() => {
                link.probe().await;
                continue;
            }
        }
        let commands: Vec<_> = writes.drain(..).map(|write| link.command(write)).collect();
        let count_of = commands.len() as u64;
        if link.ask(commands, link.deadline()).await.is_none() {
            count(&link.counters.dropped, count_of);
        }
    }
}

/// Whether an error says that the server works: it speaks of the key, or of what is no fault of the connection.
fn is_answer(error: &RedisError) -> bool {
    is_refusal(error) || matches!(error.code(), Some("WRONGTYPE" | "NOSCRIPT"))
}

/// Whether it works and will not do this: it has no room, cannot write its snapshot, or its ACL forbids it.
fn is_refusal(error: &RedisError) -> bool {
    matches!(error.code(), Some("OOM" | "MISCONF" | "NOPERM"))
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}
