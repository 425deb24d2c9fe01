//! The life of the process: arguments → command → exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    loadgen::cli::run()
}
