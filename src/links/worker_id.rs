//! The keeper of this instance's worker id, and the name by which it holds it.
//!
//! In: a store, a holder's name, the clocks. Out: snowflakes, while the id is leased.
//! Never: gives a number once the lease is over by the monotonic clock, counted from before the store was asked, so that
//! it is over here before anybody else can have it; draws from the lease of another holder, also where it does not know
//! yet that there is one (`codes::snowflake` has the argument).
//! At its limit: without a lease a draw waits for [`WAIT`] and then says so. The store is asked by one task alone, once in
//! half a lease, and after a failure each eighth of one, but not more rarely than each [`RETRY_MAX`].

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::codes::snowflake::{Drawn, EPOCH_MS, Snowflakes, WORKERS};
use crate::config;
use crate::domain::time;
use crate::store::row::WorkerLease;
use crate::store::{Error, Result, Store};

/// How long a draw waits for a lease: the time in which one that was used up early is prolonged.
const WAIT: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// The lease of a command: short, since one that is killed gives nothing back.
const COMMAND_SPAN: Duration = Duration::from_secs(5);
/// Hexadecimal digits of an instance's name.
const NAME_CHARS: usize = 32;

/// The name of an instance: 128 random bits in hexadecimal. It is the same after a restart on the same data folder; the
/// folder is this process's while the value lives.
#[derive(Debug)]
pub struct InstanceId {
    text: String,
    _lock: Option<File>,
}

impl InstanceId {
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// The name that lies in the file `instance` of the folder `data`, which is made if it is missing. A second process on
/// the same folder, and a second call in one process, get a name of their own: the file is locked (flock(2)).
/// Errors are those of the file.
pub fn instance_id(data: &Path) -> io::Result<InstanceId> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(data)?;
    let path = data.join("instance");
    let mut file = File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => return Ok(InstanceId { text: random_name(), _lock: None }),
        Err(std::fs::TryLockError::Error(error)) => return Err(error),
    }
    let mut text = String::new();
    // More than a name is none: whatever it is, it is not read to its end.
    let read = (&file).take(NAME_CHARS as u64 + 2).read_to_string(&mut text);
    let name = text.trim_end();
    if read.is_ok() && name.len() == NAME_CHARS && name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(InstanceId { text: name.to_owned(), _lock: Some(file) });
    }
    let text = random_name();
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{text}")?;
    file.sync_all()?;
    Ok(InstanceId { text, _lock: Some(file) })
}

fn random_name() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// A leased worker id, or the lack of one.
pub struct WorkerId {
    store: Store,
    holder: String,
    /// The configured one; none is any.
    wanted: Option<u16>,
    span: Duration,
    state: Mutex<State>,
    /// Somebody needs a longer lease than there is.
    needed: Notify,
    leased: Notify,
}

enum State {
    Held(Held),
    Lost,
    /// It was given back: there will be no other.
    Released,
}

struct Held {
    lease: WorkerLease,
    snowflakes: Snowflakes,
    /// By the monotonic clock.
    ends: Instant,
}

impl Held {
    fn new(lease: WorkerLease, ends: Instant) -> Self {
        Self { lease, snowflakes: Snowflakes::new(lease.worker_id, lease.from_ms..=lease.until_ms), ends }
    }
}

impl std::fmt::Debug for WorkerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WorkerId of {}", self.holder)
    }
}

impl WorkerId {
    /// Leases what `codes` says for an instance. [`Error::Schema`] if the configured id is another's,
    /// [`Error::Unavailable`] if all are. [`WorkerId::run`] keeps it.
    pub async fn lease(store: Store, holder: String, codes: &config::Codes) -> Result<Self> {
        let keeper = Self::new(store, holder, codes.worker_id, codes.worker_lease);
        if keeper.keep(clock_ms(), time::monotonic()).await? {
            return Ok(keeper);
        }
        Err(match codes.worker_id {
            Some(id) => Error::Schema(format!(
                "codes.worker_id is {id}, and another instance has that id: give each instance its own, or leave it out to \
                 lease one that is free; that of an instance which is gone is free after codes.worker_lease"
            )),
            None => Error::Unavailable(format!("all {WORKERS} worker ids are leased: stop an instance")),
        })
    }

    /// Leases an id for a command: from the far end, so that no instance's configured one is taken meanwhile, and for
    /// 5 s at a time.
    pub async fn lease_for_command(store: Store) -> Result<Self> {
        let mut keeper = Self::new(store, random_name(), None, COMMAND_SPAN);
        for id in (0..WORKERS).rev() {
            keeper.wanted = Some(id);
            if keeper.keep(clock_ms(), time::monotonic()).await? {
                return Ok(keeper);
            }
        }
        Err(Error::Unavailable(format!("all {WORKERS} worker ids are leased: stop an instance")))
    }

    /// Without a lease yet: the next [`WorkerId::keep`] asks for one. `wanted` is 0 to 1,023, none is any; `span` is
    /// how long a lease is.
    #[must_use]
    pub fn new(store: Store, holder: String, wanted: Option<u16>, span: Duration) -> Self {
        let state = Mutex::new(State::Lost);
        Self { store, holder, wanted, span, state, needed: Notify::new(), leased: Notify::new() }
    }

    /// The next number. [`Drawn::LeaseUsedUp`]: there was no lease, nor did one come within a second.
    pub async fn draw(&self) -> Drawn {
        let deadline = time::monotonic() + WAIT;
        loop {
            // Before the look, so that a lease that comes right after it is not missed.
            let leased = self.leased.notified();
            let now = time::monotonic();
            let drawn = self.draw_at(clock_ms(), now);
            if drawn != Drawn::LeaseUsedUp || now >= deadline || matches!(*self.state(), State::Released) {
                return drawn;
            }
            self.needed.notify_one();
            // When the time is over it is looked at once more.
            let _ = tokio::time::timeout(deadline - now, leased).await;
        }
    }

    /// The next number where the wall clock says `now_ms`, in milliseconds since 1970, and the monotonic one `now`.
    pub fn draw_at(&self, now_ms: u64, now: Instant) -> Drawn {
        match &mut *self.state() {
            State::Held(held) if now < held.ends => held.snowflakes.draw(now_ms),
            State::Held(_) | State::Lost | State::Released => Drawn::LeaseUsedUp,
        }
    }

    /// Whether no codes can be made for want of a lease.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        match &*self.state() {
            State::Held(held) => time::monotonic() >= held.ends,
            State::Lost => true,
            State::Released => false,
        }
    }

    /// Keeps the lease, and leases anew what was lost, until [`WorkerId::release`].
    pub async fn run(&self) {
        let (mut failed, mut was_lost) = (false, false);
        loop {
            if failed {
                tokio::time::sleep((self.span / 8).min(RETRY_MAX)).await;
            } else {
                // Earlier, if it is used up before.
                let _ = tokio::time::timeout(self.span / 2, self.needed.notified()).await;
            }
            if matches!(*self.state(), State::Released) {
                return;
            }
            let before = self.epoch();
            let kept = self.keep(clock_ms(), time::monotonic()).await;
            failed = !matches!(kept, Ok(true));
            let is_lost = self.is_lost();
            if is_lost && !was_lost {
                let why = kept.err().map_or_else(|| "another instance has it".to_owned(), |error| error.to_string());
                tracing::warn!(why, "the lease of the worker id is lost: no codes are made until there is one");
            }
            if !is_lost && (was_lost || self.epoch() != before) {
                tracing::info!("the lease of the worker id was lost, and a worker id is leased again");
            }
            was_lost = is_lost;
        }
    }

    /// Prolongs the lease, or leases anew; false if no id is to be had. The clocks as in [`WorkerId::draw_at`], of the
    /// moment before the store is asked. Errors are the store's, and change nothing. One task calls it.
    pub async fn keep(&self, now_ms: u64, now: Instant) -> Result<bool> {
        let held = match &*self.state() {
            // The clock may have stepped back behind what was used: the lease must reach past that.
            State::Held(held) => Some((held.lease, held.snowflakes.logical_ms(now_ms))),
            State::Lost => None,
            State::Released => return Ok(false),
        };
        if let Some((lease, logical_ms)) = held {
            if let Some(renewed) = self.store.renew_worker(lease, logical_ms, self.span_ms()).await? {
                if let State::Held(held) = &mut *self.state() {
                    held.lease = renewed;
                    held.snowflakes.prolong(renewed.until_ms);
                    held.ends = now + self.span;
                }
                self.leased.notify_waiters();
                return Ok(true);
            }
            self.enter(State::Lost);
        }
        let leased = self.store.lease_worker(self.holder.clone(), self.wanted, now_ms, self.span_ms()).await?;
        let Some(lease) = leased else { return Ok(false) };
        self.enter(State::Held(Held::new(lease, now + self.span)));
        self.leased.notify_waiters();
        Ok(true)
    }

    /// Changes the state; what was given back stays so.
    fn enter(&self, next: State) {
        let mut state = self.state();
        if !matches!(*state, State::Released) {
            *state = next;
        }
    }

    /// Gives the lease back, at the end: no number is drawn after it. Should the store not take it, it runs out.
    pub async fn release(&self) {
        let state = std::mem::replace(&mut *self.state(), State::Released);
        self.leased.notify_waiters();
        self.needed.notify_one();
        let State::Held(held) = state else { return };
        if let Err(error) = self.store.release_worker(held.lease, held.snowflakes.used_ms()).await {
            tracing::warn!(%error, "the worker id could not be given back: its lease runs out by itself");
        }
    }

    /// Of the lease that is held.
    fn epoch(&self) -> Option<(u16, u64)> {
        match &*self.state() {
            State::Held(held) => Some((held.lease.worker_id, held.lease.epoch)),
            State::Lost | State::Released => None,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }

    fn span_ms(&self) -> u64 {
        u64::try_from(self.span.as_millis()).unwrap_or(u64::MAX)
    }
}

/// The wall clock, never before the first millisecond that a snowflake can have.
fn clock_ms() -> u64 {
    u64::try_from(time::now().0).unwrap_or(0).max(EPOCH_MS)
}

#[cfg(test)]
mod tests {
    use super::{NAME_CHARS, instance_id};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_name_stays_with_its_folder_and_is_one_process_s() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        let first = instance_id(&data).unwrap();
        let name = first.as_str().to_owned();
        assert!(name.len() == NAME_CHARS && name.bytes().all(|byte| byte.is_ascii_hexdigit()), "{name}");
        assert_eq!(std::fs::metadata(data.join("instance")).unwrap().permissions().mode() & 0o777, 0o600);
        let second = instance_id(&data).unwrap();
        assert_ne!(second.as_str(), name, "the folder is the first one's");
        drop(first);
        assert_eq!(instance_id(&data).unwrap().as_str(), name);
    }

    #[test]
    fn what_is_no_name_is_replaced_by_one() {
        let good = "0123456789abcdef0123456789abcdef";
        let check = |content: &[u8], kept: bool| {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("instance");
            std::fs::write(&path, content).unwrap();
            let name = instance_id(folder.path()).unwrap().as_str().to_owned();
            assert_eq!(name == good, kept, "{content:?}");
            assert_eq!(std::fs::read_to_string(path).unwrap().trim_end(), name, "{content:?}");
        };
        check(good.as_bytes(), true);
        check(format!("{good}\n").as_bytes(), true);
        check(b"", false);
        check(b"0123", false);
        check(format!("{good}{good}").as_bytes(), false);
        check(&[0xFF; 32], false);
        check("é".repeat(16).as_bytes(), false);
    }
}
