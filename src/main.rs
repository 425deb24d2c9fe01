//! The life of the process: arguments → configuration → logging → command → exit code.

use std::process::ExitCode;

/// A hit allocates nothing; misses and the API do, on many threads.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    waypost::cli::run()
}
