//! The engine: each arrival ends in one outcome, over every kind of connection and whatever the server does.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod ends;
mod peers;
mod raw;
mod stub;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use loadgen::campaign::{self, Performed};
use loadgen::engine::{Job, Spin};
use loadgen::measure::Outcome;
use loadgen::measure::totals::Totals;
use loadgen::plan::arrivals;
use loadgen::scenario::change::Changes;
use loadgen::scenario::load;
use loadgen::slo::Scope;

const LOCAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// `toml` is a scenario without its `target` and `seed`; it may begin with more keys of `[run]`.
fn job(address: SocketAddr, workers: usize, toml: &str) -> Job {
    let text = format!("[run]\ntarget = \"http://{address}\"\nseed = 7\n{toml}");
    let scenario = load::from_toml("test", &text, Path::new("."), &Changes::default())
        .unwrap_or_else(|error| panic!("{error}\n{text}"));
    Job {
        scenario: Arc::new(scenario),
        workers,
        address,
        spin: Spin::Never,
        key: Some("secret".to_owned()),
        ledger: None,
        stop: Arc::new(AtomicBool::new(false)),
        defect: None,
    }
}

/// Whatever happens, each arrival ends in one outcome.
fn carry_out(job: Job, on_second: &mut dyn FnMut(&Totals, u32)) -> Performed {
    let performed = campaign::perform(job, None, on_second).unwrap();
    let tally = performed.totals.tally(&Scope::default());
    assert_eq!(tally.scheduled, tally.outcomes.iter().sum::<u64>(), "{:?}", tally.outcomes);
    performed
}

/// To the end of its plan.
fn perform(address: SocketAddr, workers: usize, toml: &str) -> Performed {
    let job = job(address, workers, toml);
    let planned: u64 = arrivals::counts(&job.scenario).iter().flatten().sum();
    let performed = carry_out(job, &mut |_, _| {});
    let tally = performed.totals.tally(&Scope::default());
    assert!(tally.scheduled >= planned, "{} arrived of {planned} planned", tally.scheduled);
    performed
}

/// (outcome, how many) of those that occurred.
fn outcomes(performed: &Performed) -> Vec<(&'static str, u64)> {
    let tally = performed.totals.tally(&Scope::default());
    Outcome::ALL.iter().map(|&outcome| (outcome.name(), tally.of(outcome))).filter(|(_, count)| *count > 0).collect()
}

fn count(performed: &Performed, outcome: Outcome) -> u64 {
    performed.totals.tally(&Scope::default()).of(outcome)
}
