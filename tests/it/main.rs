//! The integration tests: one binary, a file for each feature. `support` starts the real server and speaks bytes to it.

#![expect(clippy::unwrap_used, reason = "a test that meets one has failed")]

mod campaign;
mod servers;
mod support;

mod addresses;
mod allocations;
mod cli;
mod codes;
mod coherence;
mod deploy;
mod faults_postgres;
mod faults_redis;
mod fleet;
mod instances;
mod loadgen;
mod moving;
mod protection;
mod quotas;
mod redis;
mod server;
mod stats;
mod store;
mod systemd;
mod targets;
mod visits_faults;
mod visits_postgres;
mod warm;
