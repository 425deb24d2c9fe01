//! Permuted codes: the numbers of a leased range, each under another number of the same size, in the alphabet's digits.
//!
//! In: the deployment's key, a generation, numbers that nobody else was given. Out: a code for each number,
//! as short as can be; no two numbers of a generation give one code.
//! Never: leases, counts or remembers numbers; tells from a code which comes next, without the key.
//! At the limit: numbers past the codes of ten characters have none (8.5 × 10¹⁷ in base62).
//!
//! The permutation is FF1 (NIST SP 800-38G, section 5.1) with AES-256, the alphabet's size as its radix
//! and the generation as its tweak. FF1 wants a domain of at least 10⁶ (revision 1 of the same), so that codes
//! begin at four characters. The numbers from 0 to radix⁴ - 1 give those, the next radix⁵ give those of five, and so on.

use std::ops::Range;

use aes::Aes256;
use fpe::ff1::{FF1, FlexibleNumeralString};

use super::Alphabet;
use super::words::Words;

/// The least length whose domain is 10⁶ in each alphabet: 36⁴ is 1,679,616, and 62³ only 238,328.
pub const LENGTH_MIN: u32 = 4;
/// What packs into a `u64` key.
pub const LENGTH_MAX: u32 = 10;

/// Numbers to codes, under one key and generation.
pub struct Permutation {
    alphabet: Alphabet,
    ff1: FF1<Aes256>,
    tweak: [u8; 8],
}

/// What [`Permutation::draw`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Drawn {
    Code(String),
    /// The lease is used up: ask for another.
    LeaseUsedUp,
    /// There are no codes for these numbers and none for later ones: only a new generation helps.
    NumbersUsedUp,
}

impl Permutation {
    /// A restore or a changed timeline of the store starts a new `generation`: numbers given before may then be
    /// given again, and must not give the codes that they gave before. Codes of other generations can
    /// still meet these; the unique constraint decides.
    #[must_use]
    pub fn new(alphabet: Alphabet, key: &[u8; 32], generation: u64) -> Self {
        let radix = alphabet.characters().len() as u32;
        let ff1 = FF1::new(key, radix).expect("every alphabet's size lies in FF1's 2 to 65,536");
        Self { alphabet, ff1, tweak: generation.to_be_bytes() }
    }

    /// The same under another generation.
    pub fn set_generation(&mut self, generation: u64) {
        self.tweak = generation.to_be_bytes();
    }

    /// The code of `number`, forbidden or not; none past the codes of [`LENGTH_MAX`] characters.
    ///
    /// 3 to 5 µs in a release build.
    #[must_use]
    pub fn code(&self, number: u64) -> Option<String> {
        let radix = self.alphabet.characters().len() as u64;
        let mut rest = number;
        for length in LENGTH_MIN..=LENGTH_MAX {
            // 62¹⁰ is below 2⁶⁰.
            let codes = radix.pow(length);
            if rest < codes {
                let digit = |place| (rest / radix.pow(place) % radix) as u16;
                return Some(self.permute(&self.tweak, (0..length).rev().map(digit).collect()));
            }
            rest -= codes;
        }
        None
    }

    /// The next code out of `lease` that is not forbidden. Numbers are taken from the lease's start,
    /// those of forbidden codes as well: they are spent, and give no code ever.
    pub fn draw(&self, lease: &mut Range<u64>, words: &Words) -> Drawn {
        for number in lease {
            match self.code(number) {
                Some(code) if words.forbids(&code) => {}
                Some(code) => return Drawn::Code(code),
                None => return Drawn::NumbersUsedUp,
            }
        }
        Drawn::LeaseUsedUp
    }

    fn permute(&self, tweak: &[u8], digits: Vec<u16>) -> String {
        let permuted = self.ff1.encrypt(tweak, &FlexibleNumeralString::from(digits));
        let digits = Vec::from(permuted.expect("each digit is below the radix, and there are four or more"));
        digits.into_iter().map(|digit| char::from(self.alphabet.characters()[usize::from(digit)])).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{Drawn, LENGTH_MAX, LENGTH_MIN, Permutation};
    use crate::codes::Alphabet;
    use crate::codes::words::Words;
    use proptest::prelude::{any, prop_assert_eq, prop_assert_ne, proptest};
    use proptest::sample::select;
    use std::collections::HashSet;

    const KEY: [u8; 32] = [7; 32];

    /// The first number whose code has `length` characters.
    fn first(alphabet: Alphabet, length: u32) -> u64 {
        (LENGTH_MIN..length).map(|length| (alphabet.characters().len() as u64).pow(length)).sum()
    }

    fn permutation(alphabet: Alphabet) -> Permutation {
        Permutation::new(alphabet, &KEY, 0)
    }

    #[test]
    fn the_sample_of_nist() {
        // FF1 sample 9 of NIST's examples: AES-256, radix 36.
        let key = [
            0x2B, 0x7E, 0x15, 0x16, 0x28, 0xAE, 0xD2, 0xA6, 0xAB, 0xF7, 0x15, 0x88, 0x09, 0xCF, 0x4F, 0x3C, 0xEF, 0x43,
            0x59, 0xD8, 0xD5, 0x80, 0xAA, 0x4F, 0x7F, 0x03, 0x6D, 0x6F, 0x04, 0xFC, 0x6A, 0x94,
        ];
        let tweak = [0x37, 0x37, 0x37, 0x37, 0x70, 0x71, 0x72, 0x73, 0x37, 0x37, 0x37];
        let permuted = Permutation::new(Alphabet::Base36, &key, 0).permute(&tweak, (0..19).collect());
        assert_eq!(permuted, "xs8a0azh2avyalyzuwd");
    }

    #[test]
    fn codes_stay_what_they_were() {
        // If these change, every deployment hands out codes that it has given before.
        let check = |alphabet, generation, number, want: &str| {
            assert_eq!(Permutation::new(alphabet, &KEY, generation).code(number).as_deref(), Some(want));
        };
        check(Alphabet::Base62, 0, 0, "Caux");
        check(Alphabet::Base62, 1, 0, "WRRh");
        check(Alphabet::Base62, 0, 1_000_000_000, "dArnFu");
        check(Alphabet::Base58, 0, 1, "46H4");
        check(Alphabet::Base36, 0, 2, "5xip");
    }

    #[test]
    fn lengths_change_where_they_should() {
        for alphabet in Alphabet::ALL {
            let permutation = permutation(alphabet);
            let length = |number| permutation.code(number).map(|code| code.len() as u32);
            for at in LENGTH_MIN..=LENGTH_MAX {
                assert_eq!(length(first(alphabet, at)), Some(at), "{alphabet:?}");
                assert_eq!(length(first(alphabet, at + 1) - 1), Some(at), "{alphabet:?}");
            }
            assert_eq!(length(first(alphabet, LENGTH_MAX + 1)), None);
            assert_eq!(length(u64::MAX), None);
        }
    }

    #[test]
    fn neighbours_do_not_look_alike() {
        let permutation = permutation(Alphabet::Base62);
        let codes: Vec<String> = (0..2000).filter_map(|number| permutation.code(number)).collect();
        let same: usize =
            codes.windows(2).map(|pair| pair[0].bytes().zip(pair[1].bytes()).filter(|(a, b)| a == b).count()).sum();
        // Chance alone makes one position in 62 the same: 129 of 7,996.
        assert!(same < 200, "{same} of 7,996 positions are the same");
        assert!(!codes.is_sorted());
    }

    #[test]
    fn leases_end_and_forbidden_codes_are_passed_over() {
        let words = Words::built_in();
        let permutation = permutation(Alphabet::Base36);
        let forbidden =
            (0..50_000).find(|number| permutation.code(*number).is_some_and(|code| words.forbids(&code))).unwrap();
        let mut lease = forbidden..forbidden + 2;
        let after = permutation.code(forbidden + 1).unwrap();
        assert_eq!(permutation.draw(&mut lease, &words), Drawn::Code(after));
        assert_eq!(permutation.draw(&mut lease, &words), Drawn::LeaseUsedUp);
        assert_eq!(permutation.draw(&mut (u64::MAX - 1..u64::MAX), &words), Drawn::NumbersUsedUp);
    }

    proptest! {
        #[test]
        fn no_code_twice(
            alphabet in select(&Alphabet::ALL[..]),
            key in any::<[u8; 32]>(),
            length in LENGTH_MIN..=LENGTH_MAX,
            offset in any::<u64>(),
        ) {
            let permutation = Permutation::new(alphabet, &key, 3);
            let numbers = (alphabet.characters().len() as u64).pow(length) - 50;
            let start = first(alphabet, length) + offset % numbers;
            let codes: HashSet<String> = (start..start + 50).filter_map(|number| permutation.code(number)).collect();
            prop_assert_eq!(codes.len(), 50);
            for code in codes {
                prop_assert_eq!(code.len() as u32, length);
                prop_assert_eq!(code.bytes().find(|byte| !alphabet.characters().contains(byte)), None);
            }
        }

        #[test]
        fn keys_and_generations_differ(key in any::<[u8; 32]>(), generation in any::<u64>(), bit in 0..256_usize) {
            let mut other = key;
            other[bit / 8] ^= 1 << (bit % 8);
            let codes = |key, generation| {
                let permutation = Permutation::new(Alphabet::Base62, key, generation);
                (0..4).map(|number| permutation.code(number)).collect::<Vec<_>>()
            };
            let these = codes(&key, generation);
            prop_assert_ne!(&these, &codes(&other, generation));
            prop_assert_ne!(&these, &codes(&key, generation ^ 1 << (bit % 64)));
        }
    }
}
