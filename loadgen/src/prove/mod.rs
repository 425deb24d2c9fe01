//! `loadgen prove`: whether this generator tells the truth, on this machine, now.
//!
//! In: which cases. Out: a line for each statement through `say`, and the worst [`Verdict`]. For each case the engine runs
//! against a [`Stub`] that knows when each request was due, since both read one clock. Then a fault is planted in the
//! engine, one of three that other generators had or have, and some case must find it. Never: leaves this machine.
//! At its limit: a machine with other things to do may be late, so a case is tried up to [`TRIES`] times and its best try
//! counts; what the generator does wrong fails all of them.

pub mod cases;
pub mod judge;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context;

use crate::campaign;
use crate::engine::{self, Defect, Job, Spin};
use crate::plan::arrivals;
use crate::scenario::change::Changes;
use crate::scenario::load;
use crate::slo::Scope;
use crate::stub::Stub;
use cases::{Case, cases};
use judge::{Line, Verdict, judge};

const TRIES: usize = 3;

/// What to prove.
#[derive(Debug, Clone, Default)]
pub struct Proof {
    /// Some cases, 3 s each, instead of all with 10 s each.
    pub short: bool,
    /// The case of this name alone.
    pub only: Option<String>,
    /// Nothing but that this defect is found, by `only` or by the case that must find it.
    pub plant: Option<Defect>,
}

/// The planted defects, their names, and the case that must find each.
const PLANTS: [(Defect, &str, &str); 3] = [
    (Defect::FromSend, "times counted from the send", "stall"),
    (Defect::BackFill, "samples filled in", "two speeds"),
    (Defect::CachedClock, "a clock read before the sleep", "no fault"),
];

/// Carries the proof out: the worst of its cases, and [`Verdict::False`] where a planted defect was not found.
///
/// # Errors
/// The name of a case that is not there, or a run or a stub that could not begin.
pub fn run(proof: &Proof, say: &mut dyn FnMut(&str)) -> anyhow::Result<Verdict> {
    let cases = cases(proof.short);
    let only = proof.only.as_deref().map(|name| find(&cases, name)).transpose()?;
    // The stub has a core of its own where there are two. Then the worker may keep one as well, and is as exact as it can
    // be; the short proof runs beside other tests.
    let spin = if !proof.short && engine::cores() > 1 { Spin::Always } else { Spin::Auto };
    let mut worst = Verdict::True;
    if proof.plant.is_none() {
        for case in &cases {
            if only.is_none_or(|only| only.name == case.name) {
                worst = worst.max(is_true(case, spin, say)?);
            }
        }
    }
    for (defect, name, finder) in PLANTS {
        let wanted = proof.plant.map_or(only.is_none(), |plant| plant == defect);
        if wanted {
            let finder = only.map_or_else(|| find(&cases, finder), Ok)?;
            worst = worst.max(is_found(finder, defect, name, spin, say)?);
        }
    }
    Ok(worst)
}

fn find<'a>(cases: &'a [Case], name: &str) -> anyhow::Result<&'a Case> {
    cases.iter().find(|case| case.name == name).with_context(|| {
        let names: Vec<_> = cases.iter().map(|case| case.name).collect();
        format!("--only {name:?}: no such case in this proof; there are: {}", names.join(", "))
    })
}

/// The best of the tries.
fn is_true(case: &Case, spin: Spin, say: &mut dyn FnMut(&str)) -> anyhow::Result<Verdict> {
    say(&format!("{}: {}", case.name, case.why));
    let mut best = Verdict::False;
    for number in 1..=TRIES {
        let lines = attempt(case, None, spin)?;
        for line in &lines {
            say(&show(line));
        }
        let verdict = worst(&lines);
        best = best.min(verdict);
        if best == Verdict::True {
            break;
        }
        say(&format!("  try {number} of {TRIES}: {}", in_words(verdict)));
    }
    say(&format!("  {}: {}", case.name, in_words(best)));
    Ok(best)
}

/// [`Verdict::True`] when the case finds the planted defect in every try.
fn is_found(case: &Case, defect: Defect, name: &str, spin: Spin, say: &mut dyn FnMut(&str)) -> anyhow::Result<Verdict> {
    say(&format!("planted: {name}"));
    for number in 1..=TRIES {
        let lines = attempt(case, Some(defect), spin)?;
        let Some(line) = lines.iter().find(|line| line.verdict == Verdict::False) else {
            say(&format!("  try {number} of {TRIES}: NOT CAUGHT by {}", case.name));
            return Ok(Verdict::False);
        };
        say(&show(line));
    }
    say(&format!("  caught by {}", case.name));
    Ok(Verdict::True)
}

fn worst(lines: &[Line]) -> Verdict {
    lines.iter().map(|line| line.verdict).max().unwrap_or(Verdict::False)
}

fn in_words(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::True => "true",
        Verdict::Late => "true but for its own lateness, which it shows: this machine has other things to do",
        Verdict::False => "FALSE",
    }
}

fn show(line: &Line) -> String {
    let mark = match line.verdict {
        Verdict::True => ' ',
        Verdict::Late => '~',
        Verdict::False => '!',
    };
    format!("  {mark} {:<22} {:>12}   truth {}", line.what, line.reported, line.truth)
}

/// Runs a case once.
fn attempt(case: &Case, defect: Option<Defect>, spin: Spin) -> anyhow::Result<Vec<Line>> {
    let stub = Stub::start(SocketAddr::from(([127, 0, 0, 1], 0)), case.script.clone())
        .context("the stub could not listen on 127.0.0.1")?;
    let target = format!("http://{}", stub.address());
    let changes = Changes { target: Some(target), ..Changes::default() };
    let scenario = load::from_toml(case.name, &case.scenario, Path::new(""), &changes)?;
    let planned = arrivals::counts(&scenario).iter().flatten().sum();
    let job = Job {
        workers: scenario.run.workers,
        scenario: Arc::new(scenario),
        address: stub.address(),
        spin,
        key: None,
        ledger: None,
        stop: Arc::new(AtomicBool::new(false)),
        defect,
    };
    let performed = campaign::perform(job, None, &mut |_, _| {})?;
    let truth = stub.stop().context("the stub")?;
    let totals = &performed.totals;
    Ok(judge(case, planned, &totals.sum(&Scope::default()), &totals.own(None).gen_lag, &truth))
}
