//! The ground floor: the words that every station uses.
//!
//! In: bytes and numbers. Out: values that cannot be wrong.
//! Never: IO, SQL, JSON, tokio; only `time` reads the clock.

pub mod key;
pub mod link;
pub mod target;
pub mod time;
pub mod visit;
