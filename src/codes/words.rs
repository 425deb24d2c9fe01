//! Words that no generated code may be: the server's own paths, and what offends.
//!
//! In: a candidate. Out: whether it is refused. Never: judges a code that a person chose beyond
//! `Code::is_reserved`; that is their affair.
//! At the limit: a list is only a list. It keeps the likely accidents off a poster, no more.
//!
//! The offensive words are those of the sqids crate, used for this alone. Everything is compared after folding: case
//! goes, and the digits that stand for letters become them. `i`, `l` and `1` are one letter, since `1` is read
//! as either, and in many a typeface a capital `I` is a small `l`.
//! - A word of up to three letters counts only as the whole code: they are in everything.
//! - A spelling with digits counts at the start or the end of a code: inside, hardly anybody reads it.
//! - A spelling of letters alone counts anywhere.

use std::collections::HashSet;

use crate::domain::key::RESERVED;

const WHOLE_LETTERS_MAX: usize = 3;
/// A folded letter is 1–26 in five bits.
const LETTER_BITS: u32 = 5;

/// What is forbidden. Made once; some 20 KiB.
pub struct Words {
    /// Folded and packed, so that a look-up needs no string.
    packed: HashSet<u128>,
    letters_max: usize,
}

impl Words {
    /// The built-in lists.
    #[must_use]
    pub fn built_in() -> Self {
        let list = sqids::default_blocklist();
        let letters_max = list.iter().map(String::len).max().unwrap_or(0);
        // A u128 has 25 letters; the longest word has 13.
        let packed = list.iter().filter_map(|word| word.bytes().try_fold(0, append)).collect();
        Self { packed, letters_max }
    }

    /// Whether a generator must not hand out `code`.
    ///
    /// 0.5 µs for seven characters in a release build: 100,000 codes a second take a twentieth of a core.
    /// Of random codes of seven characters it refuses 0.044 % in base62, 0.035 % in base58 and 0.041 % in base36
    /// (two million of each).
    #[must_use]
    pub fn forbids(&self, code: &str) -> bool {
        RESERVED.iter().any(|word| word.eq_ignore_ascii_case(code)) || self.offends(code.as_bytes())
    }

    fn offends(&self, code: &[u8]) -> bool {
        (0..code.len()).any(|start| {
            let mut packed = 0;
            let mut digits = false;
            for (index, byte) in code[start..].iter().enumerate().take(self.letters_max) {
                let Some(longer) = append(packed, *byte) else { return false };
                packed = longer;
                digits |= byte.is_ascii_digit();
                let length = index + 1;
                let at_start = start == 0;
                let at_end = start + length == code.len();
                let counts =
                    if length <= WHOLE_LETTERS_MAX { at_start && at_end } else { !digits || at_start || at_end };
                if counts && self.packed.contains(&packed) {
                    return true;
                }
            }
            false
        })
    }
}

/// `packed` and one more letter; none if no letter is read out of `byte`.
fn append(packed: u128, byte: u8) -> Option<u128> {
    let letter = match byte.to_ascii_lowercase() {
        b'0' => b'o',
        b'1' | b'l' => b'i',
        b'3' => b'e',
        b'4' => b'a',
        b'5' => b's',
        b'7' => b't',
        b'8' => b'b',
        b'9' => b'g',
        letter @ b'a'..=b'z' => letter,
        _ => return None,
    };
    Some(packed << LETTER_BITS | u128::from(letter - b'a' + 1))
}

#[cfg(test)]
mod tests {
    use super::{WHOLE_LETTERS_MAX, Words};
    use crate::codes::Alphabet;
    use crate::codes::random::characters;
    use crate::domain::key::RESERVED;
    use proptest::prelude::{any, prop_assert_eq, proptest};
    use proptest::sample::Index;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    fn check(code: &str, want: bool) {
        assert_eq!(Words::built_in().forbids(code), want, "{code}");
    }

    #[test]
    fn reserved_words_are_exact_in_any_case() {
        for word in RESERVED {
            check(word, true);
            check(&word.to_uppercase(), true);
        }
        check("admin2", false);
        check("xapi", false);
        check("healthy", false);
    }

    #[test]
    fn the_whole_list_is_refused_as_a_code() {
        let words = Words::built_in();
        for word in sqids::default_blocklist() {
            assert!(words.forbids(&word), "{word}");
            assert!(words.forbids(&word.to_uppercase()), "{word}");
        }
    }

    #[test]
    fn short_words_only_as_the_whole_code() {
        check("ass", true);
        check("A55", true);
        check("goo", true);
        check("class", false);
        check("assets1", false);
        check("x7ass2k", false);
        check("assassin", false);
    }

    #[test]
    fn letters_anywhere_digits_at_the_ends() {
        check("xxshitx", true);
        check("22sHiT2", true);
        check("sh1txxx", true);
        check("xxx5h17", true);
        check("xxsh1tx", false);
        check("xx5hitx", false);
        check("81tch22", true);
        check("n199er", true);
    }

    #[test]
    fn one_is_i_and_l() {
        check("s1ut", true);
        check("sIut", true);
        check("id1ot", true);
        check("idiot", true);
        check("d11do", true);
    }

    #[test]
    fn harmless_codes_pass() {
        for code in ["", "a", "0", "abc1234", "summer26", "-s-h-i-t-", "sh2it", "Zx81pQ7", "é", "launch"] {
            check(code, false);
        }
    }

    #[test]
    fn few_random_codes_are_refused() {
        let words = Words::built_in();
        let mut rng = StdRng::seed_from_u64(1);
        let refused = (0..200_000).filter(|_| words.forbids(&characters(Alphabet::Base62, 7, &mut rng))).count();
        assert!((40..200).contains(&refused), "{refused} of 200,000");
    }

    /// A digit and the letter that it stands for; `l` is read as `i` after them.
    const DIGITS: [[char; 2]; 9] =
        [['0', 'o'], ['1', 'i'], ['1', 'l'], ['3', 'e'], ['4', 'a'], ['5', 's'], ['7', 't'], ['8', 'b'], ['9', 'g']];

    /// The same rule with strings, slowly.
    fn naive(list: &[String], code: &str) -> bool {
        let fold = |text: &str| {
            let read = |text: String, [digit, letter]: [char; 2]| text.replace(digit, &letter.to_string());
            DIGITS.into_iter().fold(text.to_lowercase(), read).replace('l', "i")
        };
        let folded = fold(code);
        let counts = |word: &str, start: usize| {
            let end = start + word.len();
            let digits = || code[start..end].contains(|character: char| character.is_ascii_digit());
            folded[start..].starts_with(word) && (start == 0 || end == code.len() || !digits())
        };
        RESERVED.iter().any(|word| word.eq_ignore_ascii_case(code))
            || list.iter().map(|word| fold(word)).any(|word| {
                folded == word || word.len() > WHOLE_LETTERS_MAX && (0..code.len()).any(|start| counts(&word, start))
            })
    }

    proptest! {
        #[test]
        fn as_the_naive_rule_has_it(
            word in any::<Index>(),
            before in "[a-zA-Z0-9._~-]{0,2}",
            after in "[a-zA-Z0-9._~-]{0,2}",
            digits in any::<u32>(),
        ) {
            let mut list: Vec<String> = sqids::default_blocklist().into_iter().collect();
            list.sort();
            let spell = |(index, letter): (usize, char)| {
                let digit = DIGITS.iter().find(|pair| pair[1] == letter && digits >> index & 1 == 1);
                digit.map_or(letter, |pair| pair[0])
            };
            let word: String = word.get(&list).chars().enumerate().map(spell).collect();
            let code = format!("{before}{word}{after}");
            prop_assert_eq!(Words::built_in().forbids(&code), naive(&list, &code), "{}", code);
        }
    }
}
