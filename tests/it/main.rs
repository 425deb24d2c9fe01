//! The integration tests: one binary, a file for each feature. `support` starts the real server and speaks bytes to it.

mod support;

mod addresses;
mod allocations;
mod cli;
mod coherence;
mod protection;
mod server;
mod systemd;
mod targets;
