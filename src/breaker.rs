//! Breaker: leaves a dependency alone for a while that does not answer.
//!
//! In: how each call went, and when. Out: whether to make the next one. Never: waits, reads the clock, makes a call.
//! At its limit: while open, one call per `recovery` is let through; what comes of it closes the breaker or
//! leaves it open for as long again. (M. Nygard, Release It!, 2nd edition, "Circuit Breaker".)

use std::fmt::Display;
use std::sync::Mutex;
use std::time::Instant;

use crate::config;

#[derive(Debug)]
pub struct Breaker {
    dependency: &'static str,
    settings: config::Breaker,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// In a row.
    failures: u32,
    /// While open: when the next call is let through.
    probe_at: Option<Instant>,
    /// A call was let through while open, and has not come back.
    probing: bool,
    opened: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Every call is made.
    Closed = 0,
    /// One call is under way to see whether it answers again.
    HalfOpen = 1,
    /// No call is made.
    Open = 2,
}

impl State {
    /// As `/metrics` and `waypost status` name it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::HalfOpen => "half_open",
            Self::Open => "open",
        }
    }
}

impl Breaker {
    #[must_use]
    pub fn new(dependency: &'static str, settings: config::Breaker) -> Self {
        let inner = Inner { failures: 0, probe_at: None, probing: false, opened: 0 };
        Self { dependency, settings, inner: Mutex::new(inner) }
    }

    /// Whether to make a call now. Whoever is told so says with [`Breaker::note`] how it went.
    #[must_use]
    pub fn admits(&self, now: Instant) -> bool {
        let mut inner = self.lock();
        match inner.probe_at {
            None => true,
            // A probe that never came back (its task was ended) must not keep the breaker open for ever.
            Some(at) if now >= at => {
                inner.probing = true;
                inner.probe_at = Some(now + self.settings.recovery);
                true
            }
            Some(_) => false,
        }
    }

    /// How a call went. A success closes the breaker, also of a call that was made without asking.
    pub fn note<E: Display>(&self, outcome: Result<(), E>, now: Instant) {
        let mut inner = self.lock();
        match outcome {
            Ok(()) => {
                let was_open = inner.probe_at.take().is_some();
                inner.failures = 0;
                inner.probing = false;
                if was_open {
                    tracing::info!(dependency = self.dependency, "it answers again: its breaker is closed");
                }
            }
            Err(error) => {
                inner.failures = inner.failures.saturating_add(1);
                let was_open = inner.probe_at.is_some();
                if was_open && inner.probing || !was_open && inner.failures >= self.settings.failures {
                    inner.probe_at = Some(now + self.settings.recovery);
                    inner.probing = false;
                }
                if !was_open && inner.probe_at.is_some() {
                    inner.opened += 1;
                    tracing::warn!(dependency = self.dependency, %error, "it does not answer: its breaker is open");
                }
            }
        }
    }

    #[must_use]
    pub fn state(&self) -> State {
        match *self.lock() {
            Inner { probe_at: None, .. } => State::Closed,
            Inner { probing: true, .. } => State::HalfOpen,
            Inner { .. } => State::Open,
        }
    }

    /// How often it opened.
    #[must_use]
    pub fn opened(&self) -> u64 {
        self.lock().opened
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().expect("nobody panics with it")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::domain::time::monotonic;

    /// What happens at a second: a call that is asked for, or how one went.
    enum Event {
        Asks(bool),
        Fails,
        Works,
    }

    #[test]
    fn opens_after_failures_in_a_row_and_closes_with_one_success() {
        use Event::{Asks, Fails, Works};
        let settings = config::Breaker { failures: 3, recovery: Duration::from_secs(10) };
        let breaker = Breaker::new("test", settings);
        let start = monotonic();
        for (second, event, want) in [
            (0, Asks(true), State::Closed),
            (0, Fails, State::Closed),
            (0, Fails, State::Closed),
            (0, Works, State::Closed),
            (1, Fails, State::Closed),
            (1, Fails, State::Closed),
            (1, Fails, State::Open),
            (10, Asks(false), State::Open),
            (11, Asks(true), State::HalfOpen),
            (11, Asks(false), State::HalfOpen),
            (12, Fails, State::Open),
            (21, Asks(false), State::Open),
            (22, Asks(true), State::HalfOpen),
            // It never comes back: after as long again another one is let through.
            (31, Asks(false), State::HalfOpen),
            (32, Asks(true), State::HalfOpen),
            (32, Works, State::Closed),
            (32, Asks(true), State::Closed),
            (33, Fails, State::Closed),
        ] {
            let now = start + Duration::from_secs(second);
            match event {
                Asks(admitted) => assert_eq!(breaker.admits(now), admitted, "second {second}"),
                Fails => breaker.note(Err("it is away"), now),
                Works => breaker.note(Ok::<(), &str>(()), now),
            }
            assert_eq!(breaker.state(), want, "second {second}");
        }
        assert_eq!(breaker.opened(), 1);
    }
}
