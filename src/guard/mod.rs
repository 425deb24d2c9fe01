//! Who may, how often, and where to.
//!
//! `address` decides who is calling, before anything limits or records by it; `keys` what a key may do; `limits` how
//! often; `targets` where a link may lead. Never: IO in a request, but for the block list when its file has changed.

pub mod address;
pub mod keys;
pub mod limits;
pub mod targets;
