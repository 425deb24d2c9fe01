//! Rate limits: how often a caller may, counted in this process.
//!
//! In: who calls, and when. Out: a verdict with what `Retry-After` and `RateLimit-*` say. Never: waits, reads the
//! clock, holds a lock beyond `check`, asks Redis (`redis::limits` does, and comes here when it does not answer).
//! At the limit: a limiter remembers at most `entries_max` callers, 30 to 60 bytes each. When it is full
//! it forgets those whose allowance is whole again, at most once a second (under 1 ms for 100,000, on the thread that
//! meets it); if it is still full, all callers that it does not know share one allowance, and each such check is
//! counted. A million invented addresses thus cost no memory and win nothing, and who is known keeps what is theirs.

use std::net::IpAddr;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use dashmap::DashMap;

use crate::domain::time::UnixMillis;

/// [`gcra`] in Lua, for a key in Redis; the file says what must come before it.
pub const GCRA_LUA: &str = include_str!("gcra.lua");

const MINUTE_US: u64 = 60_000_000;
const SWEEP_INTERVAL_MS: u64 = 1000;

/// Whose calls are counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Caller {
    V4(u32),
    /// The upper 64 bits: whoever has one IPv6 address has all that share them.
    V6(u64),
    /// An API key's id.
    Key([u8; 8]),
}

/// What a limiter says to a call. Times are in milliseconds, rounded up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is no limit, so no header speaks of one.
    Unlimited,
    Allowed {
        /// How many calls may come at once when none came before.
        limit: u32,
        /// How many more may come at once now.
        remaining: u32,
        /// Until `limit` may come at once again, if none comes before.
        reset_ms: u64,
    },
    Refused {
        limit: u32,
        /// Until one is allowed.
        retry_after_ms: u64,
        reset_ms: u64,
    },
}

/// A rate limit for one purpose.
pub struct Limiter {
    rate: Rate,
    entries_max: usize,
    /// The theoretical arrival time of each caller, in µs since the epoch. The hash is keyed, since visitors choose
    /// their addresses.
    table: DashMap<Caller, i64, ahash::RandomState>,
    /// Entries and places promised to callers who are about to enter; never above `entries_max`.
    taken: AtomicUsize,
    swept_at_ms: AtomicI64,
    /// The theoretical arrival time that all others share.
    overflow: Mutex<Option<i64>>,
    overflowed: AtomicU64,
}

/// How often one may.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// Microseconds between two calls; 0 = no limit.
    pub interval_us: i64,
    /// How many calls may come at once; at least 1 where there is a limit.
    pub burst: u32,
}

impl Caller {
    #[must_use]
    pub fn of_address(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address.to_bits()),
            IpAddr::V6(address) => Self::V6((address.to_bits() >> 64) as u64),
        }
    }

    /// An id has eight bytes, and no more of it is looked at.
    #[must_use]
    pub fn of_key(id: &str) -> Self {
        let mut bytes = [0; 8];
        bytes.iter_mut().zip(id.bytes()).for_each(|(slot, byte)| *slot = byte);
        Self::Key(bytes)
    }
}

impl Verdict {
    /// Also when there is no limit.
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        !matches!(self, Self::Refused { .. })
    }
}

/// Milliseconds as the whole seconds of `Retry-After` (RFC 9110, section 10.2.3) and `RateLimit-Reset`, rounded up.
#[must_use]
pub fn seconds(ms: u64) -> u64 {
    ms.div_ceil(1000)
}

impl Limiter {
    /// `per_minute` calls a minute and caller, at most `burst` of them at once (none: as many as in a minute;
    /// at least 1). With `per_minute` 0 everything is allowed.
    ///
    #[must_use]
    pub fn new(per_minute: u32, burst: Option<u32>, entries_max: usize) -> Self {
        Self {
            rate: Rate { burst: burst.unwrap_or(per_minute).max(1), ..Rate::of(per_minute) },
            entries_max,
            table: DashMap::with_hasher(ahash::RandomState::new()),
            taken: AtomicUsize::new(0),
            swept_at_ms: AtomicI64::new(i64::MIN),
            overflow: Mutex::new(None),
            overflowed: AtomicU64::new(0),
        }
    }

    /// Counts a call.
    pub fn check(&self, caller: Caller, now: UnixMillis) -> Verdict {
        self.check_rate(caller, self.rate, now)
    }

    /// Counts a call of one who has a rate of their own, as an API key may.
    pub fn check_at(&self, caller: Caller, per_minute: u32, now: UnixMillis) -> Verdict {
        self.check_rate(caller, Rate::of(per_minute), now)
    }

    /// The rate of all, or of one who may call `per_minute` times.
    #[must_use]
    pub fn rate(&self, per_minute: Option<u32>) -> Rate {
        per_minute.map_or(self.rate, Rate::of)
    }

    /// Checks that met a full table and shared one allowance.
    #[must_use]
    pub fn overflowed(&self) -> u64 {
        self.overflowed.load(Ordering::Relaxed)
    }

    /// Callers that are remembered.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.table.len()
    }

    /// Counts a call of one who has this rate.
    pub fn check_rate(&self, caller: Caller, rate: Rate, now: UnixMillis) -> Verdict {
        if rate.is_unlimited() {
            return Verdict::Unlimited;
        }
        let now_us = micros(now);
        let decide = |tat: Option<i64>| gcra(tat, now_us, rate.interval_us, rate.burst);
        if let Some(mut tat) = self.table.get_mut(&caller) {
            let (verdict, next) = decide(Some(*tat));
            *tat = next;
            return verdict;
        }
        if !self.take_place(now) {
            self.overflowed.fetch_add(1, Ordering::Relaxed);
            let mut tat = self.overflow.lock().unwrap_or_else(PoisonError::into_inner);
            let (verdict, next) = decide(*tat);
            *tat = Some(next);
            return verdict;
        }
        match self.table.entry(caller) {
            dashmap::Entry::Vacant(place) => {
                let (verdict, next) = decide(None);
                place.insert(next);
                verdict
            }
            // Another thread entered the same caller since; its place is enough for both.
            dashmap::Entry::Occupied(mut tat) => {
                self.taken.fetch_sub(1, Ordering::Relaxed);
                let (verdict, next) = decide(Some(*tat.get()));
                tat.insert(next);
                verdict
            }
        }
    }

    /// Promises a place in the table. `DashMap::len` would lock every shard to tell.
    fn take_place(&self, now: UnixMillis) -> bool {
        let take = || {
            let one_more = |taken| (taken < self.entries_max).then_some(taken + 1);
            self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
        };
        take() || self.sweep(now) && take()
    }

    /// Forgets the callers whose allowance is whole. False if somebody did so within the last second.
    fn sweep(&self, now: UnixMillis) -> bool {
        let before = self.swept_at_ms.load(Ordering::Relaxed);
        if now.0.abs_diff(before) < SWEEP_INTERVAL_MS
            || self.swept_at_ms.compare_exchange(before, now.0, Ordering::Relaxed, Ordering::Relaxed).is_err()
        {
            return false;
        }
        let now_us = micros(now);
        // After the clock stepped back, entries of its former time would keep the table full until that time comes
        // again. A rate of a key's own has a period of a minute, as far as it matters.
        let latest = now_us.saturating_add(self.rate.period_us().max(MINUTE_US as i64));
        let mut forgotten = 0;
        self.table.retain(|_, tat| {
            *tat = latest.min(*tat);
            let keep = *tat > now_us;
            forgotten += usize::from(!keep);
            keep
        });
        self.taken.fetch_sub(forgotten, Ordering::Relaxed);
        true
    }
}

impl Rate {
    fn of(per_minute: u32) -> Self {
        Self { interval_us: interval_us(per_minute), burst: per_minute }
    }

    #[must_use]
    pub fn is_unlimited(self) -> bool {
        self.interval_us == 0
    }

    fn period_us(self) -> i64 {
        self.interval_us * i64::from(self.burst)
    }
}

/// Whether a call at `now_us` conforms, and the theoretical arrival time (TAT) to remember, in µs since the epoch.
///
/// The generic cell rate algorithm in its form of virtual scheduling (ATM Forum, Traffic Management
/// Specification 4.0): calls are due `interval_us` apart, and the TAT is when the next one
/// would be due. One may come early by up to `burst - 1` intervals; whoever comes later than the TAT is simply on
/// time. `tat_us` is none for a caller without a past. `interval_us` and `burst` are at least 1.
///
/// A refused call does not move the TAT, so that insisting costs nothing. A TAT further off than `burst` intervals
/// can only come from a clock that stepped back, or from a former rate: it counts as `burst` intervals, and the
/// caller is allowed again after one.
///
/// Every value for a time of this century is below 2⁵³, so that an implementation whose numbers are doubles gives
/// the same: [`GCRA_LUA`].
#[must_use]
pub fn gcra(tat_us: Option<i64>, now_us: i64, interval_us: i64, burst: u32) -> (Verdict, i64) {
    let period_us = interval_us.saturating_mul(i64::from(burst));
    let latest_us = now_us.saturating_add(period_us);
    let tat_us = tat_us.unwrap_or(now_us).clamp(now_us, latest_us);
    let next_us = tat_us.saturating_add(interval_us);
    if next_us > latest_us {
        let verdict = Verdict::Refused {
            limit: burst,
            retry_after_ms: millis_up(next_us.saturating_sub(latest_us)),
            reset_ms: millis_up(tat_us.saturating_sub(now_us)),
        };
        return (verdict, tat_us);
    }
    let remaining = latest_us.saturating_sub(next_us) / interval_us;
    let verdict = Verdict::Allowed {
        limit: burst,
        remaining: u32::try_from(remaining).unwrap_or(u32::MAX),
        reset_ms: millis_up(next_us.saturating_sub(now_us)),
    };
    (verdict, next_us)
}

/// The time between two calls in microseconds; 0 where there is no limit.
///
/// It is rounded up, so that the rate is never higher than it says: up to 100,000 a minute it is exact to 0.2 %.
#[must_use]
pub fn interval_us(per_minute: u32) -> i64 {
    if per_minute == 0 { 0 } else { MINUTE_US.div_ceil(u64::from(per_minute)) as i64 }
}

fn micros(now: UnixMillis) -> i64 {
    now.0.saturating_mul(1000)
}

fn millis_up(us: i64) -> u64 {
    u64::try_from(us).unwrap_or(0).div_ceil(1000)
}

#[cfg(test)]
mod tests {
    use super::{Caller, Limiter, Verdict, gcra, interval_us, seconds};
    use crate::domain::time::UnixMillis;
    use proptest::prelude::{any, prop, prop_assert, prop_assert_eq, proptest};
    use std::collections::VecDeque;
    use std::net::IpAddr;

    const NOW: UnixMillis = UnixMillis(1_800_000_000_000);
    const ANN: Caller = Caller::V4(1);

    fn at(ms: i64) -> UnixMillis {
        UnixMillis(NOW.0 + ms)
    }

    fn allowed(limit: u32, remaining: u32, reset_ms: u64) -> Verdict {
        Verdict::Allowed { limit, remaining, reset_ms }
    }

    fn refused(limit: u32, retry_after_ms: u64, reset_ms: u64) -> Verdict {
        Verdict::Refused { limit, retry_after_ms, reset_ms }
    }

    #[track_caller]
    fn check(per_minute: u32, burst: Option<u32>, calls: &[(i64, Verdict)]) {
        let limiter = Limiter::new(per_minute, burst, 10);
        for (ms, want) in calls {
            assert_eq!(limiter.check(ANN, at(*ms)), *want, "at {ms} ms");
        }
    }

    #[test]
    fn a_caller_alone() {
        check(0, None, &[(0, Verdict::Unlimited), (0, Verdict::Unlimited)]);
        check(60, Some(1), &[(0, allowed(1, 0, 1000)), (999, refused(1, 1, 1)), (1000, allowed(1, 0, 1000))]);
        check(60, Some(0), &[(0, allowed(1, 0, 1000)), (1, refused(1, 999, 999))]);
        check(
            60,
            Some(3),
            &[
                (0, allowed(3, 2, 1000)),
                (0, allowed(3, 1, 2000)),
                (0, allowed(3, 0, 3000)),
                (0, refused(3, 1000, 3000)),
                (400, refused(3, 600, 2600)),
                (1000, allowed(3, 0, 3000)),
                (60_000, allowed(3, 2, 1000)),
            ],
        );
        check(2, None, &[(0, allowed(2, 1, 30_000)), (0, allowed(2, 0, 60_000)), (0, refused(2, 30_000, 60_000))]);
    }

    #[test]
    fn a_clock_that_steps_back_locks_nobody_out() {
        let hour = 3_600_000;
        check(
            60,
            Some(2),
            &[
                (0, allowed(2, 1, 1000)),
                (-hour, refused(2, 1000, 2000)),
                (1000 - hour, allowed(2, 0, 2000)),
                (3000 - hour, allowed(2, 1, 1000)),
            ],
        );
    }

    #[test]
    fn seconds_are_rounded_up() {
        assert_eq!([0, 1, 1000, 1001].map(seconds), [0, 1, 1, 2]);
    }

    #[test]
    fn rates_are_never_higher_than_they_say() {
        assert_eq!([0, 1, 7, 60, 100_000, u32::MAX].map(interval_us), [0, 60_000_000, 8_571_429, 1_000_000, 600, 1]);
    }

    #[test]
    fn callers_are_told_apart() {
        let caller = |text: &str| Caller::of_address(text.parse::<IpAddr>().unwrap());
        assert_eq!(caller("192.0.2.1"), caller("::ffff:192.0.2.1"));
        assert_ne!(caller("192.0.2.1"), caller("192.0.2.2"));
        assert_eq!(caller("2001:db8:0:1::1"), caller("2001:db8:0:1:ffff::"));
        assert_ne!(caller("2001:db8:0:1::1"), caller("2001:db8:0:2::1"));
        assert_ne!(Caller::of_key("abcdefgh"), Caller::of_key("abcdefgi"));
    }

    #[test]
    fn a_key_with_a_rate_of_its_own() {
        let limiter = Limiter::new(1, None, 10);
        let key = Caller::of_key("abcdefgh");
        assert_eq!(limiter.check_at(key, 600, NOW), allowed(600, 599, 100));
        assert_eq!(limiter.check_at(key, 0, NOW), Verdict::Unlimited);
        assert_eq!(limiter.check(ANN, NOW), allowed(1, 0, 60_000));
    }

    #[test]
    fn a_flood_of_addresses_is_bounded_and_shares_one_allowance() {
        let limiter = Limiter::new(60, Some(5), 1000);
        assert!(limiter.check(ANN, NOW).is_allowed());
        let verdicts = (0..100_000).map(|n| limiter.check(Caller::V6(n), at(n as i64 / 100)).is_allowed());
        // All within a second, in which nobody's allowance becomes whole: 999 callers find a place, and all others
        // have the five calls of one.
        assert_eq!(verdicts.filter(|allowed| *allowed).count(), 999 + 5);
        assert_eq!(limiter.entries(), 1000);
        assert_eq!(limiter.overflowed(), 100_000 - 999);
        assert_eq!(limiter.check(ANN, at(999)), allowed(5, 3, 1001));
    }

    #[test]
    fn a_full_table_forgets_who_is_whole_at_most_once_a_second() {
        let limiter = Limiter::new(60, Some(5), 2);
        let call = |caller, ms| limiter.check(Caller::V4(caller), at(ms));
        call(1, 0);
        call(2, 0);
        call(2, 0);
        call(3, 500);
        assert_eq!((limiter.entries(), limiter.overflowed()), (2, 1));
        call(3, 1499);
        assert_eq!((limiter.entries(), limiter.overflowed()), (2, 2), "a second has not passed");
        call(3, 1500);
        assert_eq!((limiter.entries(), limiter.overflowed()), (2, 2), "the first is forgotten");
        assert_eq!(call(2, 1500), allowed(5, 3, 1500));
    }

    #[test]
    fn a_step_back_does_not_keep_the_table_full() {
        let limiter = Limiter::new(60, None, 2);
        let call = |caller, ms| limiter.check(Caller::V4(caller), at(ms));
        let day = 86_400_000;
        call(1, 0);
        call(2, 0);
        call(3, -day);
        assert_eq!(limiter.overflowed(), 1);
        call(3, 60_000 - day);
        assert_eq!((limiter.entries(), limiter.overflowed()), (1, 1));
    }

    #[test]
    fn many_threads_keep_the_bound_and_the_count() {
        let limiter = Limiter::new(60, Some(3), 100);
        let allowed: usize = std::thread::scope(|scope| {
            let count = || (0..5000).filter(|n| limiter.check(Caller::V4(n % 50), NOW).is_allowed()).count();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(count)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(allowed, 50 * 3);
        assert_eq!((limiter.entries(), limiter.overflowed()), (50, 0));
        // No place was lost to callers who entered together.
        assert!((100..150).all(|n| limiter.check(Caller::V4(n), NOW).is_allowed()));
        assert_eq!((limiter.entries(), limiter.overflowed()), (100, 0));
    }

    proptest! {
        /// The model: a queue with room for `burst`, out of which one goes each interval.
        #[test]
        fn as_a_queue_has_it(
            per_minute in 1_u32..10_000,
            burst in 1_u32..20,
            steps in prop::collection::vec(0_i64..3000, 1..200),
        ) {
            let interval = interval_us(per_minute);
            let mut queue: VecDeque<i64> = VecDeque::new();
            let (mut tat, mut now) = (None, NOW.0 * 1000);
            for step in steps {
                now += step * interval / 1000;
                while queue.front().is_some_and(|leaves| *leaves <= now) {
                    queue.pop_front();
                }
                let fits = queue.len() < burst as usize;
                if fits {
                    queue.push_back(queue.back().copied().unwrap_or(now) + interval);
                }
                let (verdict, next) = gcra(tat, now, interval, burst);
                tat = Some(next);
                prop_assert_eq!(verdict.is_allowed(), fits);
                if let Verdict::Allowed { remaining, .. } = verdict {
                    prop_assert_eq!(remaining as usize, burst as usize - queue.len());
                }
            }
        }

        #[test]
        fn no_window_has_more_than_the_burst_and_the_rate(
            per_minute in 1_u32..10_000,
            burst in 1_u32..20,
            steps in prop::collection::vec(0_i64..2000, 1..200),
        ) {
            let limiter = Limiter::new(per_minute, Some(burst), 10);
            let mut now = 0;
            let mut times = Vec::new();
            for step in steps {
                now += step;
                if limiter.check(ANN, at(now)).is_allowed() {
                    times.push(now);
                }
            }
            for (first, from) in times.iter().enumerate() {
                for (last, to) in times.iter().enumerate().skip(first) {
                    let calls = (last - first + 1) as i64;
                    prop_assert!((calls - i64::from(burst)) * 60_000 <= (to - from) * i64::from(per_minute));
                }
            }
        }

        #[test]
        fn who_waits_as_told_is_allowed(
            per_minute in 1_u32..10_000_000,
            burst in 1_u32..1000,
            tat in any::<Option<i64>>(),
            now in -4_000_000_000_000_000_i64..4_000_000_000_000_000,
        ) {
            let interval = interval_us(per_minute);
            let period = interval * i64::from(burst);
            let (verdict, next) = gcra(tat, now, interval, burst);
            prop_assert!((now..=now + period).contains(&next), "nobody is locked out for longer than a burst takes");
            if let Verdict::Refused { retry_after_ms, reset_ms, .. } = verdict {
                let later = |ms| gcra(Some(next), now + ms as i64 * 1000, interval, burst).0;
                prop_assert!(later(retry_after_ms).is_allowed());
                prop_assert!(retry_after_ms == 1 || !later(retry_after_ms - 1).is_allowed());
                let whole = matches!(later(reset_ms), Verdict::Allowed { remaining, .. } if remaining == burst - 1);
                prop_assert!(whole);
            }
        }

        #[test]
        fn no_value_panics(
            tat in any::<Option<i64>>(),
            now in any::<i64>(),
            interval in 1..i64::MAX,
            burst in 1..u32::MAX,
        ) {
            let (_, next) = gcra(tat, now, interval, burst);
            prop_assert!(next >= now);
        }
    }
}
