//! A scenario: which requests, when, over which connections, and what must hold. Checked once, here; nobody looks again.
//!
//! In: TOML (a file, or one of [`presets`]) with what `--set` changed, or the flags of `loadgen http`. Out: a [`Scenario`]
//! in which every name is an index, every time nanoseconds, every rate requests a second. Never: reads a clock, opens a
//! socket. At its limit: what is wrong is refused with the line, the key and the nearest known one, all that can be found
//! at once.

pub mod change;
pub mod flags;
pub mod load;
pub mod presets;
pub mod rates;
mod table;
pub mod warnings;

use std::path::PathBuf;

use ipnet::IpNet;

use crate::links::Catalogue;
use crate::slo::Slo;

/// What a run does, checked.
#[derive(Debug)]
pub struct Scenario {
    pub name: String,
    /// The text that was run, after `--set`: what the report hashes, and shows as [`change::masked`] has it.
    pub toml: String,
    pub run: Run,
    pub catalogue: Catalogue,
    pub traffic: Vec<Traffic>,
    /// In order of time; the first may be the warm-up.
    pub phases: Vec<Phase>,
    /// In order of their begin; no two overlap.
    pub events: Vec<Event>,
    pub slos: Vec<Slo>,
}

/// `[run]`.
#[derive(Debug, Clone)]
pub struct Run {
    pub target: Target,
    pub seed: u64,
    /// Threads that send; 0: one a core, as many as leave a core to a target on this machine.
    pub workers: usize,
    /// From the intended instant; what took longer counts as at least that long.
    pub timeout_ns: u64,
    /// How long answers are waited for after the last arrival.
    pub drain_ns: u64,
    /// The rate that `peak` means in this run, requests a second; 0.0 where no phase says `peak`.
    pub peak: f64,
}

/// Where requests go: plain HTTP/1.1 so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// As in the URL, for `Host`.
    pub authority: String,
    pub host: String,
    pub port: u16,
}

/// `[traffic.NAME]`: a class of requests that are alike.
#[derive(Debug, Clone)]
pub struct Traffic {
    pub name: String,
    pub method: String,
    /// With `{code}`, `{n}` (the ordinal within the class) where those go.
    pub path: String,
    /// `{key}` is the API key, `{intended}` the intended instant in nanoseconds.
    pub headers: Vec<(String, String)>,
    /// `{n}`, and `{target}`: the derived target number n of this class.
    pub body: Option<String>,
    pub pick: Pick,
    pub expect: Expect,
    pub yields: Option<Yields>,
    pub connection: Connection,
    /// A closed loop of its own instead of a share of the arrivals.
    pub closed: Option<Closed>,
    /// Addresses that its connections come from, in turn.
    pub bind: Option<IpNet>,
    /// Where the server does not offer it, the run goes on without.
    pub optional: bool,
}

/// Which code a request asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Pick {
    /// No `{code}` in the request.
    None,
    /// Rank r of the set with a probability in proportion to r^-s; `scatter` spreads the popular ranks over the set.
    Zipf { set: usize, s: f64, scatter: bool },
    /// The set's first code, always.
    One { set: usize },
    /// Each code alike; with `never_twice` a permutation of the set, walked once.
    Uniform { set: usize, never_twice: bool },
    /// Base62 digits by chance: most surely unknown.
    Random { length: usize },
    /// Codes that requests of class `from` (an index of traffic) yielded, `delay_ns` after they were answered.
    Fresh { from: usize, delay_ns: u64 },
}

/// What a right answer is.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Expect {
    /// One of these; none listed: any below 400.
    pub status: Vec<u16>,
    /// `Location` must be the known target of the code that was asked for, where the status is 3xx.
    pub known_location: bool,
    /// Must occur in the body.
    pub body: Option<String>,
}

/// `yields = { code = "json:short_code" }`: the member of the answer's JSON object that is a new code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Yields {
    pub member: String,
}

/// How a class holds its connections. All numbers are of the whole run, not of a worker.
#[derive(Debug, Clone, PartialEq)]
pub struct Connection {
    pub kind: ConnectionKind,
    /// At most so many at a time.
    pub max: usize,
    pub when_full: WhenFull,
    /// Requests in flight on one connection; 1: none is sent before the answer to the last.
    pub pipeline: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ConnectionKind {
    /// Kept for the whole run; all `max` are opened before the first arrival when the policy is [`WhenFull::Queue`].
    Pool,
    /// A visitor: some requests, then the client closes.
    Session(Requests),
    /// `Connection: close` on each request.
    PerRequest,
}

/// Requests of one session, at least 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Requests {
    Fixed(u32),
    /// With this mean, of 1, 2, 3 …
    Geometric(f64),
}

/// What an arrival meets when no connection is idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenFull {
    /// Opens one more, up to `max`; then as `Queue`.
    Grow,
    /// Waits; its time runs.
    Queue,
    /// Is not sent, and counted as that.
    Shed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed {
    pub clients: usize,
    /// From an answer to the client's next request.
    pub think_ns: u64,
}

/// `[[phase]]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Phase {
    pub name: String,
    pub for_ns: u64,
    pub curve: Curve,
    pub arrivals: ArrivalKind,
    /// (index of traffic, weight); weights add up to 1.
    pub mix: Vec<(usize, f64)>,
    /// Classes in closed loop that run beside.
    pub also: Vec<usize>,
    /// Recorded apart: in no verdict but the generator's own.
    pub warmup: bool,
}

/// Arrivals a second over the time of a phase.
#[derive(Debug, Clone, PartialEq)]
pub enum Curve {
    /// No arrivals: closed loops only.
    None,
    Constant(f64),
    Linear {
        from: f64,
        to: f64,
    },
    Exponential {
        from: f64,
        to: f64,
    },
    /// (nanoseconds since the phase began, rate), joined by straight lines; at least two, the first at 0, the last at its end.
    Points(Vec<(u64, f64)>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArrivalKind {
    /// The k-th where the curve's integral is k.
    Even,
    /// A Poisson process of that rate: gaps are independent, as visitors are.
    Poisson,
}

/// `[[event]]`: something that is done to the server's surroundings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub name: String,
    /// Since the run's origin (warm-up included).
    pub at_ns: u64,
    /// Between begin and end; 0 where there is no end.
    pub lasts_ns: u64,
    pub begin: Action,
    pub end: Option<Action>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// `signal` by its name without SIG; `tree`: the process's descendants too.
    Signal { signal: String, pid: PidFrom, tree: bool },
    /// A program and its arguments, no shell.
    Exec(Vec<String>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PidFrom {
    Pid(u32),
    /// First line of a file, read when the event begins.
    File(PathBuf),
}

impl Scenario {
    /// From the origin to the last arrival.
    #[must_use]
    pub fn length_ns(&self) -> u64 {
        self.phases.iter().map(|phase| phase.for_ns).sum()
    }
}
