//! The key that tells visitors apart: a visitor is a keyed hash of the whole address and the agent.
//!
//! In: the deployment's key, or a new one each day. Out: a 64-bit hash for each visit, made on its core.
//! Never: stands on the disk beside visits; lets anybody without the key find out whether an address was here.

use std::net::IpAddr;
use std::sync::atomic::{AtomicI64, AtomicU64};

/// The keys that the cores read; back writes one once a day, or never.
#[derive(Debug, Default)]
pub struct Keys {
    /// Of the days since 1970 that are even, and of those that are odd.
    slots: [Slot; 2],
}

#[derive(Debug, Default)]
struct Slot {
    /// [`EVERY_DAY`], a day, or 0 for none yet.
    day: AtomicI64,
    key: [AtomicU64; 2],
}

/// A key for ever.
pub const EVERY_DAY: i64 = i64::MAX;

impl Keys {
    /// The key of `day`, or of all days with [`EVERY_DAY`].
    pub fn set(&self, day: i64, key: [u64; 2]) {
        let _ = (&self.slots[0].day, &self.slots[0].key, day, key);
        todo!()
    }

    /// SipHash-2-4 over the address and `agent`, which is a hash of the agent's text; 0 while there is no key for the day.
    #[must_use]
    pub fn visitor(&self, day: i64, client: IpAddr, agent: u64) -> u64 {
        let _ = (day, client, agent);
        todo!()
    }
}
