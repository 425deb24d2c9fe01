//! The only place that reads the clock.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`: one clock for every process of a machine (clock_gettime(2)), so that `prove` can
/// compare an instant of the generator with one of the stub.
#[must_use]
pub fn now_ns() -> u64 {
    nanos(ClockId::Monotonic)
}

/// CPU time that this process has used, user and system, in nanoseconds.
#[must_use]
pub fn process_cpu_ns() -> u64 {
    nanos(ClockId::ProcessCPUTime)
}

/// CPU time that the calling thread has used, in nanoseconds.
#[must_use]
pub fn thread_cpu_ns() -> u64 {
    nanos(ClockId::ThreadCPUTime)
}

/// Nanoseconds since the Unix epoch: what is written into files for people. It may step.
#[must_use]
pub fn unix_ns() -> u64 {
    nanos(ClockId::Realtime)
}

fn nanos(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    // Neither is negative for these clocks after 1970.
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}
