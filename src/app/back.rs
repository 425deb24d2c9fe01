//! Back's own tasks: what goes on beside requests.
//!
//! In: the parts of a running server. Out: hints to the follower, news to the parts that make links, the warm file.
//! Never: ends, but with the process; says the same thing about a dependency twice (its breaker and the follower do).
//! At its limit: whatever fails is tried again, a second later and then less and less often.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::opening::Later;
use crate::config::Config;
use crate::domain::key::{Case, DomainId};
use crate::domain::time;
use crate::redis::Redis;
use crate::resolve::Memory;
use crate::resolve::follow::Follower;
use crate::resolve::warm::{self, About, Warm, Warmest};
use crate::store::Store;
use crate::store::postgres::Postgres;
use crate::store::row::Position;

const AGAIN_MIN: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(15);
/// `waypost warm` waits for instances that were heard of within three times this.
const PRESENT_EVERY: Duration = Duration::from_secs(30);
/// A period of the heat by which links are chosen (see `shards`), and what a crash loses of the warm file.
const WARM_EVERY: Duration = Duration::from_secs(300);
/// Before the first; then twice as long each time. Who was killed young, and finds no store, has nothing else to begin with.
const WARM_FIRST: Duration = Duration::from_secs(5);

/// The wait before the next try: longer with each failure, and not the same on every instance.
struct Backoff(Duration);

impl Backoff {
    fn new() -> Self {
        Self(AGAIN_MIN)
    }

    async fn wait(&mut self) {
        tokio::time::sleep(self.0.mul_f64(rand::random_range(0.5..1.0))).await;
        self.0 = (self.0 * 2).min(AGAIN_MAX);
    }
}

/// Remembers what was edited before this process, as soon as the store says so.
pub async fn remember(follower: Arc<Follower>) {
    let mut seen = follower.seen();
    let mut generation = None;
    let mut backoff = Backoff::new();
    loop {
        let known = seen.borrow_and_update().map(|position| position.generation);
        if known.is_some() && known != generation {
            match follower.remember().await {
                Ok(()) => generation = known,
                Err(_) => {
                    backoff.wait().await;
                    continue;
                }
            }
            backoff = Backoff::new();
        }
        if seen.changed().await.is_err() {
            return;
        }
    }
}

/// What hears the hints of a dependency, and says once when they cease and once when they are back.
struct Ear {
    dependency: &'static str,
    follower: Arc<Follower>,
    backoff: Backoff,
    deaf: bool,
}

impl Ear {
    fn new(dependency: &'static str, follower: Arc<Follower>) -> Self {
        Self { dependency, follower, backoff: Backoff::new(), deaf: false }
    }

    fn listens(&mut self) {
        if std::mem::take(&mut self.deaf) {
            tracing::info!(dependency = self.dependency, "changes are hinted at again");
        }
        self.backoff = Backoff::new();
        // What was said before it listened.
        self.follower.hint();
    }

    async fn lost(&mut self, error: impl std::fmt::Display) {
        if !std::mem::replace(&mut self.deaf, true) {
            tracing::warn!(
                dependency = self.dependency,
                %error,
                "changes of other instances are not hinted at: they show within a second"
            );
        }
        self.backoff.wait().await;
    }
}

/// Hints by way of Redis.
pub async fn redis_hints(redis: Redis, follower: Arc<Follower>) {
    let mut ear = Ear::new("redis", follower);
    loop {
        let lost = match redis.hints().await {
            Ok(mut hints) => {
                ear.listens();
                loop {
                    match hints.next().await {
                        Ok(()) => ear.follower.hint(),
                        Err(lost) => break lost,
                    }
                }
            }
            Err(lost) => lost,
        };
        ear.lost(lost).await;
    }
}

/// Hints of the store itself.
pub async fn store_hints(postgres: Postgres, follower: Arc<Follower>) {
    let mut ear = Ear::new("store", follower);
    loop {
        let lost = match postgres.listen().await {
            // Behind a pooler without a direct way to the store nobody hints; the poll finds out within a second.
            Ok(None) => return,
            Ok(Some(mut hints)) => {
                ear.listens();
                loop {
                    match hints.next().await {
                        Ok(()) => ear.follower.hint(),
                        Err(lost) => break lost,
                    }
                }
            }
            Err(lost) => lost,
        };
        ear.lost(lost).await;
    }
}

/// Tells those who make codes when leased numbers may have been given before.
pub async fn generations(mut seen: watch::Receiver<Option<Position>>, links: Later) {
    loop {
        let position = *seen.borrow_and_update();
        if let (Some(position), Some(links)) = (position, links.get()) {
            links.set_generation(position.generation);
        }
        if seen.changed().await.is_err() {
            return;
        }
    }
}

/// Says that this instance runs.
pub async fn present(store: Store, instance: String) {
    let mut ticks = tokio::time::interval(PRESENT_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // Nothing depends on it while the store is away.
        let _ = store.present(instance.clone(), true, time::now()).await;
    }
}

/// Keeps `DATA/warm`: the links that are asked for most, for a start without stores.
#[derive(Debug)]
pub struct WarmFile {
    pub path: PathBuf,
    pub memory: Arc<Memory>,
    pub follower: Arc<Follower>,
    pub config: Arc<Config>,
    /// What a person calls it.
    pub store: String,
    /// Of the configured domains, in their order.
    pub domains: Vec<DomainId>,
}

/// How codes are written.
fn codes(config: &Config) -> String {
    let folded = if config.codes.case == Case::Insensitive { " insensitive" } else { "" };
    format!("{}{folded}", config.codes.alphabet.name())
}

/// The links of the last run, if it was on the same store and wrote codes as this one does. A file that cannot be read
/// is no reason not to start.
#[must_use]
pub fn read_warm_file(path: &Path, config: &Config, store: &str) -> Option<Warm> {
    match warm::read(path) {
        Ok(warm) => warm.filter(|warm| warm.about.store == store && warm.about.codes == codes(config)),
        Err(error) => {
            tracing::warn!(file = %path.display(), %error, "starting without the links of the last run");
            None
        }
    }
}

impl WarmFile {
    pub async fn run(self: Arc<Self>) {
        let mut wait = WARM_FIRST;
        loop {
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(WARM_EVERY);
            // Gathering sends every core to the shards once more, and what only a core still has would be asked for.
            if !self.follower.is_failing() {
                Arc::clone(&self).write().await;
            }
        }
    }

    pub async fn write(self: Arc<Self>) {
        let written = tokio::task::spawn_blocking(move || {
            let hosts = self.config.domains.iter().map(|domain| domain.host.clone());
            // Before the entries are copied: each of them is at least as new.
            let as_of = self.memory.feed.now().stored;
            let warmest = Warmest::of(&self.memory.shards, |key| self.memory.hash(key));
            // Whatever was gathered while the store turned out to be another one is of neither.
            if self.memory.feed.now().stored.generation != as_of.generation {
                return Ok(());
            }
            let about = About {
                store: self.store.clone(),
                as_of,
                followed_at: self.follower.followed_at(),
                codes: codes(&self.config),
                domains: self.domains.iter().copied().zip(hosts).collect(),
            };
            warm::write(&self.path, &about, &warmest)
        });
        if let Ok(Err(error)) = written.await {
            tracing::warn!(%error, "the warm file cannot be written: a start without stores would have older links");
        }
    }
}
