//! loadgen: an open-loop load generator for servers of short links, and the judge of what they promise.
//!
//! It decides beforehand when each request is due, counts its time from that instant whatever else happens, and says so
//! when it was late itself. It shares no code with the server that it measures.
//!
//! ```text
//!  scenario (TOML, or the flags of `http`) ─▶ plan: when, of which class, for which code; no state, no chance but the seed's
//!                                              │ each worker walks the whole plan and takes its part of each class
//!  a worker per core: engine                   ▼
//!      wait (epoll) ─▶ due arrivals ─▶ group (one queue, its connections) ─▶ conn ─▶ http ─▶ one Outcome
//!                                                              │                              │
//!                                                              ▼ before it is sent            ▼
//!                                                       ledger (FILE)         measure::Recorder, given away each second
//!                                                              │                              │ bounded channel
//!  main thread                                                 ▼                              ▼
//!      events (signals, commands) · a line a second      verify (and exports)       measure::Totals
//!                                                                                             │
//!      exit code ◀── report (terminal, run.json, .hgrm, .hlog) ◀── checks V1–V15, slo ◀───────┘
//! ```
//!
//! Invariants: the plan is a pure function of scenario and seed, whatever the number of workers. Each arrival of the plan
//! ends in exactly one [`measure::Outcome`]. Only [`clock`] reads the clock. A request costs no allocation and no lock.
//! No redirect is ever followed. Nothing is measured by a clock that was read for something else.
//!
//! Imports point one way: `clock, units ◀ links ◀ scenario ◀ plan ◀ measure, ledger ◀ engine ◀ events, checks, slo ◀ report
//! ◀ client, seed, probe, stub, verify ◀ campaign ◀ calibrate, prove ◀ cli ◀ main`.
//!
//! The modules: of a run, of what goes before it and after it, and the ground floor.

pub mod checks;
pub mod engine;
pub mod events;
pub mod ledger;
pub mod links;
pub mod measure;
pub mod plan;
pub mod report;
pub mod scenario;
pub mod slo;

pub mod calibrate;
pub mod campaign;
pub mod client;
pub mod probe;
pub mod prove;
pub mod seed;
pub mod stub;
pub mod verify;

pub mod cli;
pub mod clock;
pub mod units;
