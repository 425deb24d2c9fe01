//! waypost: a URL shortener and redirect server.
//!
//! Two worlds. **Front**: one worker thread per core, each with a single-threaded runtime, its own listener and its own
//! hot cache and its own ring of visits. **Back**: one multi-threaded runtime for the API and housekeeping, a thread that
//! looks up, three for visits (one copies the rings into the log, one syncs it, one writes batches), and, with the embedded
//! store, one that writes links. Nothing in front waits for anything in back, except a look-up that no memory can answer,
//! a visit of a link that has a limit, and a request that is no redirect.
//!
//! ```text
//!  front, per core                                            back
//!  accept ─▶ http ─▶ resolve ─────── lookup ───────────────▶ resolve::flight ─▶ redis ─▶ store (sqlite | postgres)
//!             │      hot ▸ shards ▸ negative                    resolve::preload ────────▶ │
//!             │           ◀── forget ─────────────────────── resolve::follow ◀── feed of changes
//!             │                     DATA/warm ◀── most asked ──┘    ▲ hints: redis, postgres
//!             ├─▶ respond
//!             ├─▶ visits::Recorder ─ ring ─ visits ────────▶ visits::spool ─▶ visits::writer ─▶ visits::sink ─▶ the store
//!             │      (tmpfs, this core's)                      log on disk      batches          rows, stats::rollup
//!             └─▶ anything else ──── api ──────────────────▶ api ─▶ links ─▶ store
//!                                                             │  ├─ resolve::through ─▶ redis
//!                                                             │  └─ stats::query ─▶ the store's rollups
//!                                                             ├─ guard, redis::limits
//!                                                             └─ metrics ◀─ every core's counters
//!  worker ◀────────────────────────── control ─────────────── app (tick, drain)
//! ```
//!
//! The crossings, all bounded, all counted, and no others:
//!
//! | crossing | from, to | bound | when it is full |
//! |---|---|---|---|
//! | `lookup` | front → back → front: a key that memory cannot answer, a visit of a limited link | [`resolve::ask::ASKED_MAX`] a core | 503 |
//! | `api` | front → back → front: a request that is no redirect | [`http::call::CALLS_MAX`] | 503 |
//! | `visits` | front → back: records, through each core's ring ([`visits::spool::ring`]), which back looks into each 20 ms | `spool.ring_size` | the visit is dropped, counted |
//! | `control` | back → front: tick, drain | [`control::ORDERS_MAX`] | the worker hangs, and its heartbeat shows it |
//! | `metrics` | per-core cells that back reads | – | – |
//!
//! And one memory that both worlds share, behind locks that are held for a copy: [`resolve::Memory`].
//!
//! Invariants, each an absence: `domain` knows no tokio, no SQL, no JSON. `http::{route, visitor, respond}` do no IO. On a
//! hit there is no allocation, no lock of ours and no write to a line that another core reads, but for the end of its ring
//! that back reads each 20 ms. Nothing in front waits for a visit, or has
//! a timer. Only `domain::time` reads the clock. No queue is unbounded. No secret stands in a log line. No request makes an
//! outbound connection.
//!
//! Imports point one way: `domain, metrics, control ◀ codes ◀ guard ◀ config ◀ breaker, log ◀ redis, store ◀ links, resolve
//! ◀ table ◀ stats, visits ◀ http ◀ accept ◀ instance ◀ api ◀ app ◀ cli ◀ main`. One knot is left: `visits::batch` rolls up
//! its rows by `stats::rollup`, which is written in terms of them.
//!
//! The modules in the order in which a request travels:

pub mod accept;
pub mod http;
pub mod resolve;
pub mod visits;

pub mod api;
pub mod codes;
pub mod guard;
pub mod links;
pub mod redis;
pub mod stats;
pub mod store;
pub mod table;

pub mod app;
pub mod breaker;
pub mod cli;
pub mod config;
pub mod control;
pub mod domain;
pub mod instance;
pub mod log;
pub mod metrics;
