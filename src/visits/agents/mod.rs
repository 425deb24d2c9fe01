//! Agents: what a `User-Agent` says, found out once for each distinct text.
//!
//! In: texts as clients wrote them. Out: what kind of visitor it is, with browser, system and device.
//! Never: runs on a worker; keeps more than a bounded number of texts in memory.

use crate::domain::visit::Class;

/// What an agent's text says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent {
    /// The first 8 bytes of SHA-256 of the text that is kept, as a positive number: the same on every instance.
    pub id: i64,
    /// As it was written (what is no UTF-8 replaced, no NUL), or its family once `visits.agents_per_day` is reached.
    pub text: String,
    /// [`Class::Click`], [`Class::Tool`] or [`Class::Bot`].
    pub class: Class,
    /// `Firefox`, `Chrome Mobile`, `curl`, a bot's name; empty = unknown.
    pub browser: String,
    pub os: String,
    /// `desktop`, `mobile`, `tablet`, `other`.
    pub device: &'static str,
}
