//! The command line.

pub mod args;

use std::process::ExitCode;

/// Parses the arguments and runs the command.
#[must_use]
pub fn run() -> ExitCode {
    todo!()
}
