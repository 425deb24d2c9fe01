//! Random codes: each character drawn for itself.
//!
//! In: an alphabet, a length, a generator of random bits (a CSPRNG wherever a code must not be guessed).
//! Out: a candidate, uniform over all codes of that length that are not forbidden.
//! Never: decides whether the code is free. Lengths are checked where the configuration is.
//! At the limit: draws until a candidate is not forbidden. One in two thousand is
//! (`words` has the measurement), so that a second draw is rare and a third one unheard of.

use rand::Rng;

use super::Alphabet;
use super::words::Words;

/// A code of `length` characters; about one in 350,000 is taken at ten million links in base62 and seven characters.
pub fn draw(alphabet: Alphabet, length: usize, rng: &mut impl Rng, words: &Words) -> String {
    loop {
        let code = characters(alphabet, length, rng);
        if !words.forbids(&code) {
            return code;
        }
    }
}

/// `length` characters of `alphabet`, each uniform and independent of the others.
///
/// Six bits choose a character, and values past the alphabet's end are thrown away: a remainder
/// would favour the first characters of an alphabet whose size does not divide a power of two.
pub fn characters(alphabet: Alphabet, length: usize, rng: &mut impl Rng) -> String {
    let characters = alphabet.characters();
    let mut text = String::with_capacity(length);
    while text.len() < length {
        let bits = rng.next_u64();
        let drawn = (0..10).filter_map(|index| characters.get((bits >> (6 * index) & 63) as usize));
        text.extend(drawn.take(length - text.len()).map(|character| char::from(*character)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{characters, draw};
    use crate::codes::Alphabet;
    use crate::codes::words::Words;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    fn check_uniform(alphabet: Alphabet) {
        let radix = alphabet.characters().len();
        let text = characters(alphabet, 2000 * radix, &mut StdRng::seed_from_u64(7));
        let mut counts = [0_i32; 128];
        text.bytes().for_each(|byte| counts[usize::from(byte)] += 1);
        for character in alphabet.characters() {
            // Five standard deviations; a remainder of six bits would be twice the expectation for some.
            let off = counts[usize::from(*character)] - 2000;
            assert!(off.abs() < 224, "{alphabet:?} {} is off by {off}", char::from(*character));
        }
    }

    #[test]
    fn every_character_is_as_likely() {
        Alphabet::ALL.into_iter().for_each(check_uniform);
    }

    #[test]
    fn lengths_are_as_asked() {
        let words = Words::built_in();
        let mut rng = StdRng::seed_from_u64(8);
        for (alphabet, length) in Alphabet::ALL.into_iter().zip([1, 7, 128]) {
            let code = draw(alphabet, length, &mut rng, &words);
            assert_eq!(code.len(), length);
            assert!(code.bytes().all(|byte| alphabet.characters().contains(&byte)), "{code}");
        }
    }

    #[test]
    fn forbidden_candidates_are_drawn_again() {
        let words = Words::built_in();
        let mut plain = StdRng::seed_from_u64(9);
        let candidates = (0..20_000).map(|_| characters(Alphabet::Base36, 4, &mut plain));
        assert!(candidates.filter(|code| words.forbids(code)).count() > 0, "the seed must meet a forbidden one");
        let mut rng = StdRng::seed_from_u64(9);
        assert!((0..20_000).all(|_| !words.forbids(&draw(Alphabet::Base36, 4, &mut rng, &words))));
    }
}
