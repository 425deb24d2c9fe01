//! Snowflakes: numbers out of leased milliseconds, without asking the store for each.
//!
//! In: a lease of a worker id, the time. Out: numbers that grow, each once in the deployment; their text in an alphabet.
//! Never: reads the clock, leases, uses a millisecond outside of its lease.
//! At its limit: a millisecond has [`SEQUENCES`] numbers; then the next one is begun, ahead of the clock. Where the lease
//! ends, no number is given until it is longer. Time ends in 2094.
//!
//! A number has 63 bits: 41 of milliseconds since [`EPOCH_MS`], 10 of worker id, 12 of sequence (the layout of Twitter's
//! Snowflake, 2010). In base62 that is ten characters until 2031 and eleven after; in base36 at most thirteen.
//!
//! Why no number comes twice: it is a triple of millisecond, worker id and sequence. The store leases each pair of
//! millisecond and worker id at most once, since a lease begins past every millisecond of the id that was leased before,
//! and one that others have begun after is prolonged no more. In a lease one generator alone draws, and its next triple
//! is always greater than its last. No clock stands in this argument: one that steps, or a process that is stopped for an
//! hour, changes only which of its own milliseconds a generator takes. So nothing need be known of other instances,
//! and a lease that was lost in the store gives no duplicates, even where its holder has not heard of it.

use std::ops::RangeInclusive;

use super::Alphabet;

/// 2025-01-01T00:00:00Z in milliseconds since 1970. Fixed for ever: another one gives old numbers again.
pub const EPOCH_MS: u64 = 1_735_689_600_000;
/// Worker ids: from 0 to 1,023.
pub const WORKERS: u16 = 1 << WORKER_BITS;
/// Numbers of a millisecond.
pub const SEQUENCES: u64 = 1 << SEQUENCE_BITS;
const MILLIS_BITS: u32 = 41;
const WORKER_BITS: u32 = 10;
const SEQUENCE_BITS: u32 = 12;

/// What [`Snowflakes::draw`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drawn {
    Id(u64),
    /// The next millisecond is past the lease: prolong it, or lease anew.
    LeaseUsedUp,
    /// The 41 bits are used up.
    TimeUsedUp,
}

/// The numbers of one lease.
#[derive(Debug)]
pub struct Snowflakes {
    worker_id: u16,
    /// The last millisecond of the lease.
    until_ms: u64,
    /// The least that may come next: a millisecond and a sequence below [`SEQUENCES`]. Never before the lease.
    next_ms: u64,
    next_sequence: u64,
}

impl Snowflakes {
    /// Of the leased milliseconds, which are counted from 1970 as all here are.
    #[must_use]
    pub fn new(worker_id: u16, leased: RangeInclusive<u64>) -> Self {
        let (from_ms, until_ms) = leased.into_inner();
        Self { worker_id, until_ms, next_ms: from_ms.max(EPOCH_MS), next_sequence: 0 }
    }

    /// The same lease up to `until_ms`; it never becomes shorter.
    pub fn prolong(&mut self, until_ms: u64) {
        self.until_ms = self.until_ms.max(until_ms);
    }

    /// Where a lease must reach past for the next number: the clock, or ahead of it where
    /// numbers were drawn faster, or the clock has stepped back.
    #[must_use]
    pub fn logical_ms(&self, now_ms: u64) -> u64 {
        self.next_ms.max(now_ms)
    }

    /// The last millisecond of which a number was given: nobody else's lease may begin before it has passed.
    #[must_use]
    pub fn used_ms(&self) -> u64 {
        if self.next_sequence == 0 { self.next_ms - 1 } else { self.next_ms }
    }

    /// The next number. `now_ms` is what a clock says, right or wrong.
    pub fn draw(&mut self, now_ms: u64) -> Drawn {
        let (ms, sequence) = if now_ms > self.next_ms { (now_ms, 0) } else { (self.next_ms, self.next_sequence) };
        if ms - EPOCH_MS >= 1 << MILLIS_BITS {
            return Drawn::TimeUsedUp;
        }
        if ms > self.until_ms {
            return Drawn::LeaseUsedUp;
        }
        (self.next_ms, self.next_sequence) = if sequence + 1 < SEQUENCES { (ms, sequence + 1) } else { (ms + 1, 0) };
        let millis_and_worker = (ms - EPOCH_MS) << WORKER_BITS | u64::from(self.worker_id);
        Drawn::Id(millis_and_worker << SEQUENCE_BITS | sequence)
    }
}

/// `id` in the digits of `alphabet`, the first one no zero.
#[must_use]
pub fn text(alphabet: Alphabet, id: u64) -> String {
    let digits = alphabet.characters();
    let radix = digits.len() as u64;
    let mut reversed = Vec::new();
    let mut rest = id;
    loop {
        reversed.push(digits[(rest % radix) as usize]);
        rest /= radix;
        if rest == 0 {
            break;
        }
    }
    reversed.into_iter().rev().map(char::from).collect()
}

#[cfg(test)]
mod tests {
    use super::{Drawn, EPOCH_MS, SEQUENCES, Snowflakes, text};
    use crate::codes::Alphabet;
    use proptest::collection::vec;
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};
    use proptest::sample::select;

    fn leased(worker_id: u16, from: u64, until: u64) -> Snowflakes {
        Snowflakes::new(worker_id, EPOCH_MS + from..=EPOCH_MS + until)
    }

    #[test]
    fn the_layout_stays_what_it_was() {
        // If these change, every deployment hands out codes that it has given before.
        let check = |worker_id, ms: u64, want: u64, base62: &str, base58: &str, base36: &str| {
            let mut snowflakes = leased(worker_id, ms, ms);
            assert_eq!(snowflakes.draw(0), Drawn::Id(want));
            assert_eq!(snowflakes.draw(0), Drawn::Id(want + 1));
            for (alphabet, text_wanted) in Alphabet::ALL.into_iter().zip([base62, base58, base36]) {
                assert_eq!(text(alphabet, want), text_wanted);
            }
        };
        check(0, 0, 0, "0", "1", "0");
        check(1, 0, 4096, "144", "2Dd", "35s");
        check(0, 1, 4_194_304, "Hb84", "NVpb", "2hwcg");
        check(1023, (1 << 41) - 1, (1 << 63) - 4096, "AzL8n0Y57i4", "NQm6nKp8p2b", "1y2p0ij32e58g");
    }

    #[test]
    fn sequences_milliseconds_and_leases_end() {
        let mut snowflakes = leased(5, 10, 11);
        assert_eq!(snowflakes.used_ms(), EPOCH_MS + 9, "nothing of it is used");
        let mut last = 0;
        for _ in 0..2 * SEQUENCES {
            let Drawn::Id(id) = snowflakes.draw(EPOCH_MS) else { panic!("both milliseconds are leased") };
            assert!(id > last);
            last = id;
        }
        assert_eq!(snowflakes.draw(EPOCH_MS), Drawn::LeaseUsedUp);
        assert_eq!(snowflakes.used_ms(), EPOCH_MS + 11);
        assert_eq!(snowflakes.logical_ms(EPOCH_MS), EPOCH_MS + 12);
        snowflakes.prolong(EPOCH_MS + 20);
        // A clock past the lease takes nothing of it: when it is back, the rest is there.
        assert_eq!(snowflakes.draw(EPOCH_MS + 21), Drawn::LeaseUsedUp);
        assert_eq!(snowflakes.draw(EPOCH_MS + 13), Drawn::Id(13 << 22 | 5 << 12));
        assert_eq!(snowflakes.used_ms(), EPOCH_MS + 13);
    }

    #[test]
    fn clocks_before_and_after_all_time() {
        let mut early = Snowflakes::new(0, 0..=EPOCH_MS);
        assert_eq!(early.draw(0), Drawn::Id(0));
        let mut late = leased(0, 0, u64::MAX - EPOCH_MS);
        assert_eq!(late.draw(EPOCH_MS + (1 << 41)), Drawn::TimeUsedUp);
        assert_eq!(late.draw(EPOCH_MS), Drawn::Id(0));
    }

    proptest! {
        #[test]
        fn text_is_the_number(alphabet in select(&Alphabet::ALL[..]), id in any::<u64>()) {
            let digits = alphabet.characters();
            let digit = |byte| digits.iter().position(|known| *known == byte).unwrap() as u64;
            let text = text(alphabet, id);
            prop_assert!(id == 0 || digit(text.as_bytes()[0]) > 0, "{}", text);
            prop_assert_eq!(text.bytes().fold(0, |number, byte| number * digits.len() as u64 + digit(byte)), id);
        }

        #[test]
        fn numbers_grow_within_the_lease(
            from in 0..1000_u64,
            span in 0..50_u64,
            clocks in vec((any::<bool>(), 0..1100_u64, 1..9000_u64), 1..8),
        ) {
            let mut snowflakes = leased(3, from, from + span);
            let (mut last, mut until_ms) = (None, EPOCH_MS + from + span);
            for (prolong, clock, count) in clocks {
                if prolong {
                    until_ms = until_ms.max(snowflakes.logical_ms(EPOCH_MS + clock) + span);
                    snowflakes.prolong(until_ms);
                }
                for _ in 0..count {
                    let Drawn::Id(id) = snowflakes.draw(EPOCH_MS + clock) else { break };
                    prop_assert!(Some(id) > last);
                    let ms = EPOCH_MS + (id >> 22);
                    prop_assert!((EPOCH_MS + from..=until_ms).contains(&ms));
                    prop_assert_eq!(ms, snowflakes.used_ms());
                    last = Some(id);
                }
            }
        }
    }
}
