//! The report: all that a run yields, as one value that is written, read back and printed.
//!
//! In: a [`Run`] that has ended ([`build`]), or the `run.json` of an earlier one ([`bundle`]). Out: a [`Report`], whose JSON
//! is described by `schema/run.schema.json`; the folder of a run ([`bundle`]); text for people ([`terminal`]), printed from
//! the report alone, so that a run says the same a year later. Never: measures, judges a limit of its own, holds an API
//! key. At its limit: percentiles that are only lower bounds, or stand on too few samples, say so wherever they appear.
//!
//! Names are those of `run.json`. Times in `_ns` are nanoseconds, instants count from the run's origin (warm-up included).

pub mod build;
pub mod bundle;
pub mod terminal;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::checks::machine::Machine;
use crate::checks::{Check, Mark};
use crate::events::Happened;
use crate::measure::seconds::Interval;
use crate::measure::totals::Totals;
use crate::scenario::Scenario;
use crate::slo::eval::Judged;

/// The format's name and version; it changes when a reader of the old one would misread the new one.
pub const SCHEMA: &str = "loadgen/1";

/// What a report is made of.
#[derive(Debug)]
pub struct Run<'a> {
    pub scenario: &'a Scenario,
    /// `planned[phase][traffic]`, as [`crate::plan::arrivals::counts`] tells.
    pub planned: &'a [Vec<u64>],
    pub totals: &'a Totals,
    pub checks: Vec<Check>,
    pub slos: Vec<Judged>,
    pub events: Vec<Happened>,
    pub machine: Machine,
    pub address: SocketAddr,
    pub same_host: bool,
    pub options: Options,
    pub begun_unix_ms: u64,
    /// From the origin to the end of draining.
    pub lasted_ns: u64,
    /// CPU time of this process, from its start of the workers on.
    pub cpu_ns: u64,
    pub skipped: Vec<Skipped>,
    pub notes: Vec<String>,
    pub ended: Ended,
}

/// Why a run was over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    AsPlanned,
    /// By an error of the generator's own (ledger, threads, events), in its words.
    Failed(String),
    /// By a signal: SIGINT is 2, SIGTERM 15.
    Interrupted {
        signal: u8,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    pub schema: String,
    pub tool: Tool,
    pub begun_unix_ms: u64,
    pub lasted_ns: u64,
    /// CPU time of loadgen, in user and kernel mode, for each request that ended, warm-up included; none without one.
    pub cpu_ns_per_request: Option<u64>,
    pub scenario: ScenarioText,
    pub target: Target,
    pub machine: Machine,
    pub options: Options,
    /// In order of time, the warm-up among them.
    pub phases: Vec<Phase>,
    pub whole: Whole,
    pub intervals: Vec<Interval>,
    pub events: Vec<Happened>,
    pub skipped: Vec<Skipped>,
    /// What a reader must know to read the numbers, such as a rate that `calibrate` chose.
    pub notes: Vec<String>,
    pub slo: Vec<Judged>,
    pub checks: Vec<Check>,
    pub verdict: Verdict,
    /// Why it failed or what interrupted it.
    pub reason: Option<String>,
    pub exit_code: u8,
}

/// Of the measurement; whether the server kept its SLOs is another question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verdict {
    Valid,
    /// The generator's own part could explain what was measured.
    Invalid,
    /// The accounts do not add up, or the generator met an error.
    Failed,
    /// Partial.
    Interrupted,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tool {
    pub name: String,
    pub version: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScenarioText {
    pub name: String,
    /// As it was run: after `--set`, but for keys in its headers.
    pub toml: String,
    /// Of the whole text, keys included, hexadecimal: runs with the same one can be compared.
    pub sha256: String,
    pub seed: u64,
    /// From the origin to the last planned arrival.
    pub length_ns: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    pub url: String,
    /// What its host was resolved to.
    pub address: SocketAddr,
    /// It competes with the generator for cores.
    pub same_host: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    pub workers: u64,
    /// `auto`, `never` or `always`.
    pub spin: String,
    pub ledger: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    pub name: String,
    pub from_ns: u64,
    pub to_ns: u64,
    /// Recorded apart: in no verdict but the generator's own.
    pub warmup: bool,
    /// From the instant at which a request was due until it was with the kernel, or in a queue because no connection was
    /// free: the generator's own part.
    pub gen_lag: Option<Lag>,
    /// By class; those that the phase does not use are absent.
    pub traffic: BTreeMap<String, Measured>,
}

/// A distribution of the generator's own lateness with at least one sample; all of its times are known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lag {
    pub count: u64,
    pub p50_ns: u64,
    pub p99_ns: u64,
    pub p99_9_ns: u64,
    pub max_ns: u64,
    /// HdrHistogram's V2 deflate encoding, base64.
    pub hdr_b64: String,
}

/// All phases but the warm-up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Whole {
    /// All classes of the plan; closed loops, whose rate is not theirs to choose, only where there is nothing else.
    pub all: Measured,
    pub traffic: BTreeMap<String, Measured>,
    /// By class, warm-up included: connections outlive phases.
    pub connections: BTreeMap<String, Connections>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Arrivals of the plan; none for a closed loop, which has no plan.
    pub planned: Option<u64>,
    /// Arrivals that became due, each of which ended in one outcome.
    pub scheduled: u64,
    /// Those whose bytes were handed to the kernel.
    pub sent: u64,
    /// By name, those that occurred.
    pub outcomes: BTreeMap<String, u64>,
    /// By status, those that came.
    pub statuses: BTreeMap<u16, u64>,
    pub bytes: u64,
    /// From the intended instant to the answer's last byte, of right answers: the headline.
    pub response: Option<Times>,
    /// From the send: what a closed-loop tool shows.
    pub service: Option<Times>,
    /// From the send to the answer's first byte.
    pub ttfb: Option<Times>,
    /// Until a connection was free or had been opened.
    pub conn_wait: Option<Times>,
    /// As `response`, of wrong answers: a fast error improves no percentile.
    pub failed: Option<Times>,
    /// From a create's answer to the first right answer for its code.
    pub visible: Option<Times>,
}

/// A distribution with at least one sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Times {
    /// Samples whose time is known.
    pub count: u64,
    /// Samples whose time is only known to be longer than their age; percentiles count them.
    pub censored: u64,
    pub min: Bound,
    pub mean: Bound,
    pub p50: Bound,
    pub p75: Bound,
    pub p90: Bound,
    pub p99: Bound,
    pub p99_9: Bound,
    pub p99_99: Bound,
    pub max: Bound,
    pub ci95: Ci95,
    /// The known samples: HdrHistogram's V2 deflate encoding, base64.
    pub hdr_b64: String,
    /// The ages of the censored ones, likewise; none if there are none.
    pub censored_hdr_b64: Option<String>,
}

/// A time, or the least that it can have been.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bound {
    pub ns: u64,
    pub at_least: bool,
}

/// 95 % confidence intervals by order statistics; none where the samples are too few.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ci95 {
    pub p99: Option<Between>,
    pub p99_9: Option<Between>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Between {
    pub low: Bound,
    pub high: Bound,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connections {
    pub asked: u64,
    pub opened: u64,
    pub failed: u64,
    /// This machine had no file or no port for them.
    pub failed_by_us: u64,
    pub closed_by_server: u64,
    pub closed: u64,
}

/// A class that was left out because the server does not offer it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Skipped {
    pub traffic: String,
    pub reason: String,
}

/// The first of these that holds: interrupted (128 + the signal), failed (1), invalid (3), an SLO failed (99), 0.
#[must_use]
pub fn verdict(ended: &Ended, checks: &[Check], slos: &[Judged]) -> (Verdict, u8) {
    let any = |verdict| checks.iter().any(|check| check.verdict == verdict);
    match ended {
        Ended::Interrupted { signal } => (Verdict::Interrupted, 128 + signal),
        Ended::Failed(_) => (Verdict::Failed, 1),
        Ended::AsPlanned if any(Mark::Fail) => (Verdict::Failed, 1),
        Ended::AsPlanned if any(Mark::Invalid) => (Verdict::Invalid, 3),
        Ended::AsPlanned if slos.iter().any(|slo| !slo.pass) => (Verdict::Valid, 99),
        Ended::AsPlanned => (Verdict::Valid, 0),
    }
}
