//! A sketch: what is kept of many visits in a bounded number of bytes: when (15-minute buckets), from where, with what,
//! and by how many different visitors.
//!
//! In: visits; other sketches' bytes. Out: bytes, at most [`SKETCH_BYTES_MAX`]; answers. Pure.
//! Several encoded sketches one behind the other are read as their sum: a store may append before it merges.

/// The most bytes that one sketch encodes to.
pub const SKETCH_BYTES_MAX: usize = 8 << 10;

/// Only clicks and tools are in it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sketch;
