//! Chance that has no memory: what is drawn for an arrival depends on the seed and its number, on nothing drawn before.
//!
//! In: a key (of seed, purpose and place) and a number. Out: one word, or a stream of them where a draw needs several.
//! Never: advances a shared generator, so any number of workers draws the same.

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::SeedableRng;

use crate::links::mix;

/// What is drawn: no two purposes share their chance.
#[derive(Debug, Clone, Copy)]
#[repr(u64)]
pub enum Purpose {
    Gap = 1,
    Class,
    Code,
    Scatter,
    Order,
    Session,
}

/// 2^64 divided by the golden ratio, odd: the step of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The key of one purpose at one place: a phase, a class or a set, by index.
#[must_use]
pub fn key(seed: u64, purpose: Purpose, place: usize) -> u64 {
    word(word(mix(seed), purpose as u64), place as u64)
}

/// Word number `number` of the key's SplitMix64 sequence, which can be entered anywhere.
#[must_use]
pub fn word(key: u64, number: u64) -> u64 {
    mix(key.wrapping_add(number.wrapping_add(1).wrapping_mul(STEP)))
}

/// A number in (0, 1] from the upper 53 bits of a word; its logarithm is finite.
#[must_use]
pub fn unit(word: u64) -> f64 {
    ((word >> 11) + 1) as f64 / (1u64 << 53) as f64
}

/// Words without end for draw number `number`.
#[must_use]
pub fn stream(key: u64, number: u64) -> Xoshiro256PlusPlus {
    Xoshiro256PlusPlus::seed_from_u64(word(key, number))
}

/// A bijection of 0 … count-1 in no order that could be seen.
#[derive(Debug)]
pub struct Permutation {
    rounds: [u64; 3],
    count: u64,
    /// All bits that `count - 1` needs.
    mask: u64,
    shift: u32,
}

impl Permutation {
    /// Of so many numbers, at least 1.
    #[must_use]
    pub fn new(key: u64, count: u64) -> Self {
        let bits = u64::BITS - (count - 1).leading_zeros();
        let mask = u64::MAX.checked_shr(u64::BITS - bits).unwrap_or(0);
        let rounds = [0, 1, 2].map(|round| word(key, round));
        Self { rounds, count, mask, shift: (bits / 2).max(1) }
    }

    /// Where `number` (modulo the count) goes.
    #[must_use]
    pub fn place(&self, number: u64) -> u64 {
        let mut place = number % self.count;
        // Multiplying by an odd number, adding, and folding the upper half onto the lower can each be undone within
        // these bits. What falls outside walks on (Black, Rogaway: Ciphers with arbitrary finite domains, CT-RSA 2002):
        // fewer than two rounds on average, since the power of two is less than twice the count.
        loop {
            for round in self.rounds {
                place = place.wrapping_mul(STEP).wrapping_add(round) & self.mask;
                place ^= place >> self.shift;
            }
            if place < self.count {
                return place;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::{Just, any, prop_assert, prop_oneof, proptest};

    #[test]
    fn permutations_of_small_and_awkward_counts() {
        for count in (1..70).chain([127, 128, 129, 997, 1000, 1024, 1025, 65_536, 65_537]) {
            is_bijection(7, count);
        }
    }

    fn is_bijection(key: u64, count: u64) {
        let permutation = Permutation::new(key, count);
        let mut places: Vec<u64> = (0..count).map(|number| permutation.place(number)).collect();
        places.sort_unstable();
        assert!(places.into_iter().eq(0..count), "key {key} count {count}");
    }

    proptest! {
        #[test]
        fn permutations_are_bijections(key in any::<u64>(), count in 1..5000u64) {
            is_bijection(key, count);
        }

        /// Too many to try all: no two of a few share a place.
        #[test]
        fn large_permutations(key in any::<u64>(), count in prop_oneof![1..=u64::MAX, Just(u64::MAX), Just(1 << 63)],
            left in any::<u64>(), right in any::<u64>()) {
            let permutation = Permutation::new(key, count);
            let (left, right) = (left % count, right % count);
            prop_assert!(permutation.place(left) < count);
            prop_assert!((permutation.place(left) == permutation.place(right)) == (left == right));
        }
    }

    /// Spread evenly: chi-square of the places of the first tenth over 100 stretches, 99 degrees of freedom (mean 99,
    /// deviation 14).
    #[test]
    fn permutations_scatter() {
        for key in 0..20 {
            let permutation = Permutation::new(key, 100_000);
            let mut found = [0f64; 100];
            for number in 0..10_000 {
                found[(permutation.place(number) / 1000) as usize] += 1.0;
            }
            let chi_square: f64 = found.iter().map(|count| (count - 100.0).powi(2) / 100.0).sum();
            assert!(chi_square < 170.0, "key {key}: {chi_square}");
        }
    }

    #[test]
    fn keys_differ() {
        let mut keys = vec![key(1, Purpose::Gap, 0), key(1, Purpose::Gap, 1), key(1, Purpose::Class, 0)];
        keys.extend([key(2, Purpose::Gap, 0), key(0, Purpose::Gap, 0), key(1, Purpose::Code, 0)]);
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), 6);
    }

    #[test]
    fn units_are_above_0_and_at_most_1() {
        assert!(unit(0) > 0.0);
        assert!(unit(u64::MAX) <= 1.0);
    }
}
