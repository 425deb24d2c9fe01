//! What the writer does next: a closed set of states, and one function from one to the next.
//!
//! In: what happened, at which moment. Out: the next state, and what is to be done. Pure.
//! Never: does IO, reads the clock, throws a die.
//! At its limit: a store that does not answer is asked every [`BACKOFF_MAX`] at most, for as long as it takes.
//!
//! ```text
//!              positions                     the end of the log
//!   Waiting ───────────────▶ Replaying ────────────────────────────▶ Direct
//!   asks, with backoff       full batches,   ◀────────────────────── a batch each LINGER
//!      ▲                     back to back       a batch is full         │
//!      └──────────────────────────┴─── moved, unknown, away, broken ────┘
//! ```

use std::time::{Duration, Instant};

use crate::visits::batch::ROWS_MAX;

/// From one batch to the next while the log is read to its end. Fewer batches are cheaper, and a visit has to show in the
/// stats within two seconds.
pub const LINGER: Duration = Duration::from_secs(1);
pub const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// The breaker leaves a store alone for longer than that; this is what its probe may come late.
pub const BACKOFF_MAX: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    pub phase: Phase,
    /// Outcomes in a row that were no success.
    pub failures: u32,
    /// Rows that the next batch may have; fewer than [`ROWS_MAX`] while refused rows are looked for. Each refusal halves it,
    /// each success doubles it.
    pub rows_max: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Where the store stands is not known.
    Waiting,
    /// The log has more than one batch.
    Replaying,
    /// The log was read to its end.
    Direct,
    Finished,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The store said where it stands, and reading begins there.
    Positions,
    /// The batch is full.
    Filled,
    /// The log was read to its end; whether there is anything to store.
    End { anything: bool },
    /// What was waited for is there: a time, something new in the log, or the order to end.
    Woken,
    /// The batch is in the store.
    Stored,
    /// A position was another one.
    Moved,
    /// Whether the batch is in the store is not known.
    Unknown,
    /// Nothing was done, it may work later.
    Away,
    /// Nothing was done, and it will not work by itself. Somebody may mend it.
    Broken,
    /// The store refuses one of so many rows.
    Refused { rows: usize },
    /// The refused row is in the file of dead letters.
    SetAside,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Ask the store where it stands, and begin there.
    Ask,
    /// Read the log until the batch has so many rows.
    Read {
        rows_max: usize,
    },
    /// Store the batch. If that fails it is made again.
    Send,
    /// Put the only row of the batch into the file of dead letters.
    SetAside,
    /// Wait for this moment, or the order to end.
    Sleep {
        until: Instant,
    },
    /// Wait for something new in the log, or the order to end.
    Listen,
    Finish,
}

/// Of what an outcome depends beside the state.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    pub now: Instant,
    /// From 0 to 1: spreads those who wait for the same store.
    pub chance: f64,
    /// Set once it is to end: with the log's end, or at this moment at the latest.
    pub end_by: Option<Instant>,
    /// So many failures in a row end it.
    pub failures_max: u32,
}

impl State {
    /// Where everybody begins.
    pub const START: (Self, Action) = (Self { phase: Phase::Waiting, failures: 0, rows_max: ROWS_MAX }, Action::Ask);
}

#[must_use]
pub fn next(state: State, event: Event, at: &Moment) -> (State, Action) {
    let over = at.end_by.is_some_and(|end| at.now >= end) || state.failures >= at.failures_max;
    if over || state.phase == Phase::Finished {
        return finish(state);
    }
    match (state.phase, event) {
        (_, Event::Unknown | Event::Away | Event::Broken | Event::Refused { rows: 0 }) => {
            wait(state, backoff(state.failures, at.chance), at)
        }
        // Somebody else has stored it, or the store lost something: that is known at once. Who is told so again and again
        // is in a race, and leaves it to the other one.
        (_, Event::Moved) if state.failures == 0 => {
            (State { phase: Phase::Waiting, failures: 1, ..state }, Action::Ask)
        }
        (_, Event::Moved) => wait(state, backoff(state.failures - 1, at.chance), at),
        (_, Event::Refused { rows: 1 }) => (replaying(state, 1), Action::SetAside),
        (_, Event::Refused { rows }) => read(replaying(state, rows / 2)),
        (_, Event::Positions | Event::SetAside) => read(replaying(state, state.rows_max)),
        (Phase::Waiting, _) => (state, Action::Ask),

        (_, Event::Filled) => (replaying(state, state.rows_max), Action::Send),
        (_, Event::End { anything: true }) => (State { phase: Phase::Direct, ..state }, Action::Send),
        (_, Event::End { anything: false }) if at.end_by.is_some() => finish(state),
        (_, Event::End { anything: false }) => (State { phase: Phase::Direct, failures: 0, ..state }, Action::Listen),
        (phase, Event::Stored) => {
            let rows_max = state.rows_max.saturating_mul(2).min(ROWS_MAX);
            let state = State { failures: 0, rows_max, ..state };
            if phase == Phase::Direct && at.end_by.is_none() {
                (state, Action::Sleep { until: at.now + LINGER })
            } else {
                read(state)
            }
        }
        (_, Event::Woken) => read(state),
    }
}

fn replaying(state: State, rows_max: usize) -> State {
    State { phase: Phase::Replaying, rows_max, ..state }
}

fn read(state: State) -> (State, Action) {
    (state, Action::Read { rows_max: state.rows_max })
}

fn finish(state: State) -> (State, Action) {
    (State { phase: Phase::Finished, ..state }, Action::Finish)
}

fn wait(state: State, pause: Duration, at: &Moment) -> (State, Action) {
    let state = State { phase: Phase::Waiting, failures: state.failures.saturating_add(1), ..state };
    (state, Action::Sleep { until: at.now + pause })
}

/// Twice as long each time, and by chance down to half of it (M. Brooker, "Exponential Backoff And Jitter", AWS
/// Architecture Blog, 2015: "equal jitter").
fn backoff(failures: u32, chance: f64) -> Duration {
    let whole = BACKOFF_MIN.saturating_mul(1 << failures.min(16)).min(BACKOFF_MAX);
    whole.mul_f64(0.5 + chance.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::time::monotonic;

    const EVENTS: [Event; 14] = [
        Event::Positions,
        Event::Filled,
        Event::End { anything: true },
        Event::End { anything: false },
        Event::Woken,
        Event::Stored,
        Event::Moved,
        Event::Unknown,
        Event::Away,
        Event::Broken,
        Event::Refused { rows: 0 },
        Event::Refused { rows: 1 },
        Event::Refused { rows: 9 },
        Event::SetAside,
    ];

    /// Short names of what is done.
    fn name(action: Action) -> &'static str {
        match action {
            Action::Ask => "ask",
            Action::Read { .. } => "read",
            Action::Send => "send",
            Action::SetAside => "aside",
            Action::Sleep { .. } => "sleep",
            Action::Listen => "listen",
            Action::Finish => "finish",
        }
    }

    fn check(phase: Phase, ending: bool, expected: [(Phase, &str); EVENTS.len()]) {
        let now = monotonic();
        let end_by = ending.then(|| now + Duration::from_secs(5));
        let at = Moment { now, chance: 0.0, end_by, failures_max: u32::MAX };
        for (event, expected) in EVENTS.into_iter().zip(expected) {
            let state = State { phase, failures: 0, rows_max: ROWS_MAX };
            let (then, action) = next(state, event, &at);
            assert_eq!((then.phase, name(action)), expected, "{phase:?}, {event:?}, ending: {ending}");
            // Whatever happens, it is over at its time, and after too many failures.
            let late = Moment { end_by: Some(now), ..at };
            assert_eq!(next(state, event, &late).1, Action::Finish, "{phase:?}, {event:?}");
            let failed = Moment { failures_max: 0, ..at };
            assert_eq!(next(state, event, &failed).1, Action::Finish, "{phase:?}, {event:?}");
        }
    }

    #[test]
    fn every_state_answers_every_event() {
        use Phase::{Direct, Finished, Replaying, Waiting};
        let waits = (Waiting, "sleep");
        // Positions, Filled, End with and without anything, Woken, Stored, Moved, Unknown, Away, Broken, Refused of 0, 1, 9, SetAside.
        let failures = [
            (Waiting, "ask"),
            waits,
            waits,
            waits,
            waits,
            (Replaying, "aside"),
            (Replaying, "read"),
            (Replaying, "read"),
        ];
        let row = |first: [(Phase, &'static str); 6]| {
            let mut row = [(Finished, ""); EVENTS.len()];
            row[..6].copy_from_slice(&first);
            row[6..].copy_from_slice(&failures);
            row
        };
        let asks = (Waiting, "ask");
        let waiting = row([(Replaying, "read"), asks, asks, asks, asks, asks]);
        let begun = (Replaying, "read");
        let replaying = row([begun, (Replaying, "send"), (Direct, "send"), (Direct, "listen"), begun, begun]);
        let full = (Replaying, "send");
        let direct = row([begun, full, (Direct, "send"), (Direct, "listen"), (Direct, "read"), (Direct, "sleep")]);
        check(Waiting, false, waiting);
        check(Replaying, false, replaying);
        check(Direct, false, direct);
        check(Finished, false, [(Finished, "finish"); EVENTS.len()]);

        // Once it is to end, the end of the log is its end, and nothing lingers.
        let end = (Finished, "finish");
        check(Waiting, true, waiting);
        check(Replaying, true, row([begun, full, (Direct, "send"), end, begun, begun]));
        check(Direct, true, row([begun, full, (Direct, "send"), end, (Direct, "read"), (Direct, "read")]));
    }

    #[test]
    fn waits_longer_each_time_and_apart_from_others() {
        let check =
            |failures, chance, ms| assert_eq!(backoff(failures, chance), Duration::from_millis(ms), "{failures}");
        check(0, 1.0, 100);
        check(0, 0.0, 50);
        check(1, 1.0, 200);
        check(4, 1.0, 1_600);
        check(5, 1.0, 2_000);
        check(5, 0.5, 1_500);
        check(u32::MAX, 1.0, 2_000);
    }

    #[test]
    fn a_refused_row_is_found_by_halves() {
        let now = monotonic();
        let at = Moment { now, chance: 0.0, end_by: None, failures_max: u32::MAX };
        let state = State { phase: Phase::Direct, failures: 0, rows_max: ROWS_MAX };
        let (state, _) = next(state, Event::Refused { rows: 9 }, &at);
        assert_eq!(state.rows_max, 4);
        let (state, _) = next(state, Event::Refused { rows: 4 }, &at);
        let (state, _) = next(state, Event::Stored, &at);
        assert_eq!((state.rows_max, state.phase), (4, Phase::Replaying));
        let (state, action) = next(state, Event::Refused { rows: 1 }, &at);
        assert_eq!((state.rows_max, action), (1, Action::SetAside));
        let (state, action) = next(state, Event::SetAside, &at);
        assert_eq!(action, Action::Read { rows_max: 1 });
        let grown = (0..20).fold(state, |state, _| next(state, Event::Stored, &at).0);
        assert_eq!(grown.rows_max, ROWS_MAX);
    }
}
