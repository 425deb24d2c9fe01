//! Time. The only place that reads the clock; everybody else is given `now`.

use std::fmt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Milliseconds since the Unix epoch, UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixMillis(pub i64);

impl UnixMillis {
    /// No moment is later: what never expires.
    pub const NEVER: Self = Self(i64::MAX);

    /// This moment and `duration` more, saturating.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)))
    }
}

impl fmt::Display for UnixMillis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The wall clock in nanoseconds since the Unix epoch: one reading stamps a visit, decides an
/// expiry and starts the latency of a redirect. It may step; a difference below zero counts as zero.
#[derive(Clone, Copy, Debug)]
pub struct Stamp(i64);

impl Stamp {
    #[expect(clippy::disallowed_methods, reason = "this is the place that reads the clock")]
    #[must_use]
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
    }

    #[must_use]
    pub fn millis(self) -> UnixMillis {
        UnixMillis(self.0 / 1_000_000)
    }

    /// Nanoseconds from `earlier` to `self`.
    #[must_use]
    pub fn nanos_since(self, earlier: Self) -> u64 {
        u64::try_from(self.0 - earlier.0).unwrap_or(0)
    }
}

/// The wall clock, for what needs no nanoseconds.
#[must_use]
pub fn now() -> UnixMillis {
    Stamp::now().millis()
}

/// The clock that never steps, for time limits and rates.
#[expect(clippy::disallowed_methods, reason = "this is the place that reads the clock")]
#[must_use]
pub fn monotonic() -> Instant {
    Instant::now()
}
