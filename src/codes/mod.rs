//! Codes: how the code of a link is made when nobody chose one.
//!
//! In: an alphabet, chance or a number from a leased range, the words that a code must not be. Out: candidates.
//! Never: asks the store, reads the clock, decides whether a code is free. The store's unique constraint on
//! (domain, code) decides that, and whoever calls comes back for another candidate.
//! At the limit: `random` has none, a crowded length merely collides more often; `permuted` says that the lease,
//! or all numbers, are used up; so does `snowflake`.

pub mod permuted;
pub mod random;
pub mod snowflake;
pub mod words;

/// The characters that generated codes are made of. Fixed when a store is made: a permuted code depends on their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Alphabet {
    #[default]
    Base62,
    /// Without the look-alikes `0 O I l`.
    Base58,
    /// Digits and lower-case letters: the only one whose codes survive `codes.case = "insensitive"`.
    Base36,
}

/// How codes are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strategy {
    /// [`random::draw`]: long enough that collisions are rare, and nobody is asked.
    #[default]
    Random,
    /// [`permuted::Permutation`]: as short as can be, out of leased numbers.
    Permuted,
    /// [`snowflake::Snowflakes`]: out of a leased worker id, without asking the store for each.
    Snowflake,
}

/// A name in the configuration or in the store's settings that means nothing here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unknown {
    #[error("codes.alphabet is base62, base58 or base36, not {0:?}")]
    Alphabet(String),
    #[error("codes.strategy is random, permuted or snowflake, not {0:?}")]
    Strategy(String),
}

impl Alphabet {
    pub const ALL: [Self; 3] = [Self::Base62, Self::Base58, Self::Base36];

    /// As the configuration and the store's settings spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Base62 => "base62",
            Self::Base58 => "base58",
            Self::Base36 => "base36",
        }
    }

    pub fn parse(name: &str) -> Result<Self, Unknown> {
        Self::ALL.into_iter().find(|alphabet| alphabet.name() == name).ok_or_else(|| Unknown::Alphabet(name.to_owned()))
    }

    /// The characters in the order of their values, which is that of ASCII. At most 64 of them.
    #[must_use]
    pub fn characters(self) -> &'static [u8] {
        match self {
            Self::Base62 => b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz",
            Self::Base58 => b"123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz",
            Self::Base36 => b"0123456789abcdefghijklmnopqrstuvwxyz",
        }
    }
}

impl Strategy {
    pub const ALL: [Self; 3] = [Self::Random, Self::Permuted, Self::Snowflake];

    /// As the configuration spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Permuted => "permuted",
            Self::Snowflake => "snowflake",
        }
    }

    pub fn parse(name: &str) -> Result<Self, Unknown> {
        Self::ALL.into_iter().find(|strategy| strategy.name() == name).ok_or_else(|| Unknown::Strategy(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::{Alphabet, Strategy, Unknown};
    use crate::domain::key::{Case, Code};

    #[test]
    fn alphabets_are_what_their_names_say() {
        for (alphabet, radix) in Alphabet::ALL.into_iter().zip([62, 58, 36]) {
            let characters = alphabet.characters();
            assert_eq!(characters.len(), radix);
            assert!(characters.is_sorted_by(|a, b| a < b), "{alphabet:?}: each once, in order");
            assert!(characters.iter().all(u8::is_ascii_alphanumeric));
        }
        assert!(!Alphabet::Base58.characters().iter().any(|character| b"0OIl".contains(character)));
    }

    #[test]
    fn base36_is_not_changed_by_folding() {
        let text = Alphabet::Base36.characters();
        assert_eq!(Code::parse(text, Case::Insensitive), Code::parse(text, Case::Sensitive));
    }

    #[test]
    fn names_come_back() {
        assert!(Alphabet::ALL.into_iter().all(|alphabet| Alphabet::parse(alphabet.name()) == Ok(alphabet)));
        assert!(Strategy::ALL.into_iter().all(|strategy| Strategy::parse(strategy.name()) == Ok(strategy)));
        assert_eq!(Alphabet::parse("base64"), Err(Unknown::Alphabet("base64".to_owned())));
        assert_eq!(Strategy::parse("Random"), Err(Unknown::Strategy("Random".to_owned())));
        let message = Unknown::Alphabet("base64".to_owned()).to_string();
        assert_eq!(message, "codes.alphabet is base62, base58 or base36, not \"base64\"");
    }
}
