//! The command line: what was typed, which command that is, and the exit code.
//!
//! Exit codes: 0 valid and all SLOs met, 1 the run failed, 2 usage or scenario, 3 invalid measurement, 99 an SLO failed,
//! 130 and 143 interrupted.

mod measure;
mod print;
mod run;
mod tools;

pub mod args;

use std::process::ExitCode;

use clap::Parser;

use args::{Args, Command};

/// A command that could not do what it was told.
#[derive(Debug)]
enum Failure {
    /// What was typed, or the scenario, is wrong: nothing was begun.
    Usage(anyhow::Error),
    Failed(anyhow::Error),
}

/// What goes wrong after the arguments were understood.
impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

/// Parses the arguments and carries out the command.
#[must_use]
pub fn run() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|word| word == crate::events::GUARD) {
        return tools::guard();
    }
    let done = match Args::parse().command {
        Command::Http(http) => run::http(&http),
        Command::Run(command) => run::run(&command),
        Command::Check(source) => tools::check(&source),
        Command::Plan(source) => tools::plan(&source),
        Command::Seed(seed) => tools::seed(&seed),
        Command::Calibrate(calibrate) => tools::calibrate(&calibrate),
        Command::Report(report) => tools::report(&report),
        Command::Stub(stub) => tools::stub(&stub),
        Command::Prove(prove) => tools::prove(&prove),
        Command::Verify(verify) => tools::verify(&verify),
    };
    let (code, error) = match done {
        Ok(code) => return ExitCode::from(code),
        Err(Failure::Failed(error)) => (1, error),
        Err(Failure::Usage(error)) => (2, error),
    };
    print::say(&format!("loadgen: {error:#}"));
    ExitCode::from(code)
}
