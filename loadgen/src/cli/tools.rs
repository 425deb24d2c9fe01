//! The commands beside the measured run.

use std::fs;
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, anyhow};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::args;
use super::run::{Key, create_links, read, resolve};
use super::{Failure, print};
use crate::calibrate;
use crate::plan::{arrivals, draw};
use crate::prove::judge::Verdict;
use crate::report::{bundle, terminal};
use crate::scenario::change::Changes;
use crate::scenario::warnings;
use crate::stub::{self, script::Script};
use crate::{events, prove, seed, verify};

/// The hidden process that undoes events when this one dies.
pub(super) fn guard() -> ExitCode {
    match events::guard(io::stdin().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            print::say(&format!("loadgen: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn rehearsal(source: &args::Source) -> Changes {
    Changes { rehearsal: true, ..source.changes() }
}

pub(super) fn check(source: &args::Source) -> Result<u8, Failure> {
    let scenario = read(source, &rehearsal(source))?;
    for warning in warnings::warnings(&scenario) {
        print::out(&format!("warning: {warning}"));
    }
    let (phases, classes) = (scenario.phases.len(), scenario.traffic.len());
    print::out(&format!("{}: in order: {phases} phases, {classes} classes of traffic", scenario.name));
    Ok(0)
}

pub(super) fn plan(source: &args::Source) -> Result<u8, Failure> {
    let scenario = read(source, &rehearsal(source))?;
    print::out(&draw::draw(&scenario, &arrivals::counts(&scenario)));
    Ok(0)
}

pub(super) fn seed(seed: &args::Seed) -> Result<u8, Failure> {
    let scenario = read(&seed.source, &rehearsal(&seed.source))?;
    if let Some(file) = &seed.write {
        let taken =
            || format!("--write {}: an existing file is not overwritten, and its folder must exist", file.display());
        let out = fs::File::create_new(file).with_context(taken).map_err(Failure::Usage)?;
        seed::write_csv(&scenario.catalogue, io::BufWriter::new(out)).context(format!("writing {}", file.display()))?;
        print::say(&format!("{} is written: waypost import {0}", file.display()));
        return Ok(0);
    }
    let address = resolve(&scenario.run.target).map_err(Failure::Usage)?;
    let key = Key::find(seed.key_file.as_deref()).map_err(Failure::Usage)?;
    create_links(&scenario, address, &key)?;
    Ok(0)
}

pub(super) fn calibrate(calibrate: &args::Calibrate) -> Result<u8, Failure> {
    let calibration = calibrate::measure(&std::env::current_exe().map_err(anyhow::Error::from)?, calibrate.seconds)?;
    print::out(&calibration.to_string());
    if !calibrate.print {
        print::say(&format!("saved in {}", calibration.save()?.display()));
    }
    Ok(0)
}

pub(super) fn report(report: &args::Report) -> Result<u8, Failure> {
    let read = bundle::read(&report.dir).map_err(Failure::Usage)?;
    let look = terminal::Look { colour: terminal::wants_colour(), percentiles: true };
    print::out(&terminal::text(&read, look));
    Ok(read.exit_code)
}

pub(super) fn stub(args: &args::Stub) -> Result<u8, Failure> {
    let mut script = Script::default();
    for (flag, value) in args.script() {
        script.set(flag, value).map_err(|error| Failure::Usage(anyhow!("--{flag} {value}: {error}")))?;
    }
    let stop = stop_on_signals()?;
    stub::serve(args.listen, script, &stop, |address| print::out(&format!("listening on http://{address}")))
        .with_context(|| format!("--listen {}", args.listen))?;
    Ok(0)
}

pub(super) fn prove(args: &args::Prove) -> Result<u8, Failure> {
    let proof = prove::Proof { plant: args.plant, only: args.only.clone(), short: args.short };
    Ok(match prove::run(&proof, &mut |line| print::out(line))? {
        Verdict::True => 0,
        Verdict::False => 1,
        Verdict::Late => 3,
    })
}

pub(super) fn verify(args: &args::Verify) -> Result<u8, Failure> {
    let options = verify::Options { max: args.max };
    let findings =
        verify::verify(&args.ledger, args.visits.as_deref(), args.links.as_deref(), options).map_err(Failure::Usage)?;
    let text = if args.json {
        serde_json::to_string_pretty(&findings).map_err(anyhow::Error::from)?
    } else {
        findings.to_string()
    };
    print::out(&text);
    Ok(findings.exit_code())
}

fn stop_on_signals() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}
