//! The key that tells visitors apart: a visitor is a keyed hash of the whole address and the agent.
//!
//! In: the deployment's key, or a new one each day. Out: a 64-bit hash for each visit, made on its core.
//! Never: goes into a visit, its ring or its log; lets anybody without the key find out whether an address was here.
//! Where it is kept: [`super::visitor_keys`].

use std::net::IpAddr;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use siphasher::sip::SipHasher24;

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
        if day == EVERY_DAY {
            self.slots.iter().for_each(|slot| slot.set(day, key));
        } else {
            self.slot(day).set(day, key);
        }
    }

    /// SipHash-2-4 over the address and `agent`, which is a hash of the agent's text; 0 while there is no key for the day.
    /// An IPv4-mapped IPv6 address is IPv4.
    #[must_use]
    pub fn visitor(&self, day: i64, client: IpAddr, agent: u64) -> u64 {
        let Some([key0, key1]) = self.slot(day).get(day) else { return 0 };
        let hasher = SipHasher24::new_with_keys(key0, key1);
        // A hash of 0 would say that there is none.
        match client.to_canonical() {
            IpAddr::V4(v4) => {
                let mut bytes = [0; 12];
                bytes[..4].copy_from_slice(&v4.octets());
                bytes[4..].copy_from_slice(&agent.to_le_bytes());
                hasher.hash(&bytes).max(1)
            }
            IpAddr::V6(v6) => {
                let mut bytes = [0; 24];
                bytes[..16].copy_from_slice(&v6.octets());
                bytes[16..].copy_from_slice(&agent.to_le_bytes());
                hasher.hash(&bytes).max(1)
            }
        }
    }

    fn slot(&self, day: i64) -> &Slot {
        &self.slots[day.rem_euclid(2) as usize]
    }
}

impl Slot {
    fn set(&self, day: i64, [key0, key1]: [u64; 2]) {
        // Whoever reads a word of the new key finds that the day has changed (see `get`).
        self.day.store(0, Ordering::Relaxed);
        self.key[0].store(key0, Ordering::Release);
        self.key[1].store(key1, Ordering::Release);
        self.day.store(day, Ordering::Release);
    }

    fn get(&self, day: i64) -> Option<[u64; 2]> {
        let known = self.day.load(Ordering::Acquire);
        let key = [self.key[0].load(Ordering::Acquire), self.key[1].load(Ordering::Acquire)];
        let whole = self.day.load(Ordering::Relaxed) == known;
        (whole && known != 0 && (known == day || known == EVERY_DAY)).then_some(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_of_the_day_decides() {
        let client = IpAddr::from([203, 0, 113, 7]);
        let keys = Keys::default();
        assert_eq!(keys.visitor(20_000, client, 1), 0, "no key yet");
        keys.set(20_000, [1, 2]);
        let today = keys.visitor(20_000, client, 1);
        assert_ne!(today, 0);
        assert_eq!(keys.visitor(20_001, client, 1), 0, "tomorrow has none yet");
        keys.set(20_001, [3, 4]);
        assert_eq!(keys.visitor(20_000, client, 1), today, "what was begun before midnight");
        assert!(![0, today].contains(&keys.visitor(20_001, client, 1)));
        keys.set(20_002, [5, 6]);
        assert_eq!(keys.visitor(20_000, client, 1), 0, "forgotten");
        keys.set(EVERY_DAY, [1, 2]);
        assert_eq!([keys.visitor(1, client, 1), keys.visitor(20_001, client, 1)], [today; 2]);
    }

    #[test]
    fn a_visitor_is_an_address_and_an_agent() {
        let keys = Keys::default();
        keys.set(EVERY_DAY, [1, 2]);
        let visitor = |client: &str, agent| keys.visitor(1, client.parse().unwrap(), agent);
        let one = visitor("203.0.113.7", 1);
        assert_eq!(visitor("::ffff:203.0.113.7", 1), one);
        for (client, agent) in [("203.0.113.8", 1), ("203.0.113.7", 2), ("2001:db8::7", 1)] {
            assert_ne!(visitor(client, agent), one, "{client} {agent}");
        }
    }
}
