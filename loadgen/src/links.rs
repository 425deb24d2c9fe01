//! Links whose codes and targets need no memory: both are computed from the set's name and an index.
//!
//! `seed` creates them, a run asks for them, and the answer's `Location` is compared with the target that must be there:
//! an answer that belongs to another link, or an old one, is found under any load.
//!
//! In: a set and an index. Out: code and target, the same in every run and for every seed, so that links that were
//! created once serve every run. Never: allocates (but for room in the caller's buffer), remembers, draws. At its limit:
//! sets that would share codes, contradict each other, or are too large for 7 digits, are refused by [`Catalogue::check`].

use std::collections::HashMap;

/// Sets of links, by index in the order of the scenario.
#[derive(Debug, Default)]
pub struct Catalogue {
    pub sets: Vec<Set>,
}

#[derive(Debug)]
pub struct Set {
    pub name: String,
    pub source: Source,
}

#[derive(Debug)]
pub enum Source {
    /// Codes and targets by [`code_of`] and [`target_of`].
    Derived { count: u64 },
    /// Codes that a person chose, with derived targets.
    Codes(Vec<String>),
    /// (code, target), as read from a CSV with the columns `code` and `url`, such as `waypost export` writes.
    Listed(Vec<(String, String)>),
}

impl Catalogue {
    /// Number of links in a set, at least 1.
    #[must_use]
    pub fn count(&self, set: usize) -> u64 {
        match &self.sets[set].source {
            Source::Derived { count } => *count,
            Source::Codes(codes) => codes.len() as u64,
            Source::Listed(links) => links.len() as u64,
        }
    }

    /// Appends the code of link `index` of `set`.
    pub fn code_into(&self, set: usize, index: u64, out: &mut Vec<u8>) {
        let set = &self.sets[set];
        match &set.source {
            Source::Derived { .. } => out.extend_from_slice(&code_of(&set.name, index)),
            Source::Codes(codes) => out.extend_from_slice(codes[place(index)].as_bytes()),
            Source::Listed(links) => out.extend_from_slice(links[place(index)].0.as_bytes()),
        }
    }

    /// Appends its target.
    pub fn target_into(&self, set: usize, index: u64, out: &mut Vec<u8>) {
        let set = &self.sets[set];
        match &set.source {
            Source::Derived { .. } => out.extend_from_slice(&target_of(&code_of(&set.name, index))),
            Source::Codes(codes) => out.extend_from_slice(&target_of(codes[place(index)].as_bytes())),
            Source::Listed(links) => out.extend_from_slice(links[place(index)].1.as_bytes()),
        }
    }

    /// Whether an answer's `Location` is the target of link `index` of `set`, byte by byte.
    #[must_use]
    pub fn is_target(&self, set: usize, index: u64, location: &[u8]) -> bool {
        let set = &self.sets[set];
        match &set.source {
            Source::Derived { .. } => location == target_of(&code_of(&set.name, index)),
            Source::Codes(codes) => location == target_of(codes[place(index)].as_bytes()),
            Source::Listed(links) => location == links[place(index)].1.as_bytes(),
        }
    }

    /// Whether every link of the derived sets has a code of its own, and no code that is held in memory two targets;
    /// otherwise what to change.
    pub fn check(&self) -> Result<(), String> {
        self.check_derived()?;
        let mut seen: HashMap<Vec<u8>, (Vec<u8>, usize)> = HashMap::new();
        let in_memory = |set: &usize| !matches!(self.sets[*set].source, Source::Derived { .. });
        for set in (0..self.sets.len()).filter(in_memory) {
            for index in 0..self.count(set) {
                let (mut code, mut target) = (Vec::new(), Vec::new());
                self.code_into(set, index, &mut code);
                self.target_into(set, index, &mut target);
                match seen.get(&code) {
                    Some((other, other_set)) if *other != target => {
                        return Err(format!(
                            "code {} leads to {} in links.{} and to {} in links.{}: leave one of them out",
                            String::from_utf8_lossy(&code),
                            String::from_utf8_lossy(other),
                            self.sets[*other_set].name,
                            String::from_utf8_lossy(&target),
                            self.sets[set].name,
                        ));
                    }
                    Some(_) => {}
                    None => drop(seen.insert(code, (target, set))),
                }
            }
        }
        Ok(())
    }

    fn check_derived(&self) -> Result<(), String> {
        let mut taken: Vec<(u64, &str)> = Vec::new();
        for set in &self.sets {
            let Source::Derived { count } = set.source else { continue };
            let name = set.name.as_str();
            if count > DERIVED_MAX {
                return Err(format!("links.{name}: count is {count}, at most {DERIVED_MAX} links fit into a set"));
            }
            let block = block_of(name);
            if let Some((_, other)) = taken.iter().find(|(other, _)| *other == block) {
                return Err(format!("links.{name} and links.{other} would have the same codes; rename one of them"));
            }
            taken.push((block, name));
        }
        Ok(())
    }
}

/// An index of a set that is held in memory.
fn place(index: u64) -> usize {
    usize::try_from(index).unwrap_or(usize::MAX)
}

/// Bytes of a derived code: as many as a server of short links commonly generates.
pub const CODE_BYTES: usize = 7;

/// Base 62.
pub const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const CODES: u64 = 62u64.pow(CODE_BYTES as u32);

/// Links in a derived set, at most. 62^7 has room for 3,279 sets of this size.
pub const DERIVED_MAX: u64 = 1 << 30;
const BLOCKS: u64 = CODES / DERIVED_MAX;

/// No common factor with 62 = 2 x 31, so that multiplying modulo 62^7 loses nothing; near 62^7 divided by the golden
/// ratio, so that neighbours differ from their first digit on.
const MULTIPLIER: u64 = 2_176_477_521_915;
const OFFSET: u64 = 1_234_567_890_123;

/// The code of link `index` of the derived set of this name: 7 digits of base 62 that look as if drawn, no two alike as
/// long as [`Catalogue::check`] is content.
#[must_use]
pub fn code_of(set: &str, index: u64) -> [u8; CODE_BYTES] {
    let number = block_of(set) * DERIVED_MAX + index;
    // The remainder is below 62^7 < 2^42.
    let mut scattered = ((u128::from(number) * u128::from(MULTIPLIER) + u128::from(OFFSET)) % u128::from(CODES)) as u64;
    let mut code = [0; CODE_BYTES];
    for digit in code.iter_mut().rev() {
        *digit = DIGITS[(scattered % 62) as usize];
        scattered /= 62;
    }
    code
}

/// The stretch of numbers that belongs to a derived set.
fn block_of(set: &str) -> u64 {
    hash(set.as_bytes()) % BLOCKS
}

/// Bytes of a derived target.
pub const TARGET_BYTES: usize = 40;
const TARGET_START: &[u8; 24] = b"https://shop.example/to/";

/// Whether a code may hold it: RFC 3986's unreserved characters (2.3).
#[must_use]
pub fn is_of_code(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

/// The target that belongs to a code: `https://shop.example/to/` and 16 hexadecimal digits of its hash, and no other
/// code's (but for a collision of 64 bits).
#[must_use]
pub fn target_of(code: &[u8]) -> [u8; TARGET_BYTES] {
    target(hash(code))
}

/// The target number `n` of a class that creates links: `{target}` in its body. No two numbers of a class share one.
#[must_use]
pub fn numbered_target(class: &str, n: u64) -> [u8; TARGET_BYTES] {
    target(mix(hash(class.as_bytes()).wrapping_add(n)))
}

fn target(hash: u64) -> [u8; TARGET_BYTES] {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let mut target = [0; TARGET_BYTES];
    target[..TARGET_START.len()].copy_from_slice(TARGET_START);
    let mut rest = hash;
    for digit in target[TARGET_START.len()..].iter_mut().rev() {
        *digit = HEX[(rest % 16) as usize];
        rest /= 16;
    }
    target
}

/// FNV-1a of 64 bits (Fowler, Noll, Vo; draft-eastlake-fnv), mixed once more since its high bits move little on short
/// texts. It guards against mistakes, not against people who look for collisions.
#[must_use]
pub fn hash(bytes: &[u8]) -> u64 {
    mix(bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)))
}

/// A bijection of the 64-bit numbers in which each bit of the input moves half of the output's: the finaliser of
/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
#[must_use]
pub fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::collections::HashSet;

    use proptest::prelude::{prop_assert, prop_assert_eq, proptest};

    fn catalogue(sets: Vec<(&str, Source)>) -> Catalogue {
        Catalogue { sets: sets.into_iter().map(|(name, source)| Set { name: name.into(), source }).collect() }
    }

    #[test]
    fn codes_are_distinct_over_sets() {
        let catalogue = catalogue(vec![
            ("existing", Source::Derived { count: 200_000 }),
            ("launch", Source::Derived { count: 100_000 }),
        ]);
        catalogue.check().unwrap();
        let mut seen = HashSet::new();
        for set in 0..2 {
            for index in 0..catalogue.count(set) {
                let mut code = Vec::new();
                catalogue.code_into(set, index, &mut code);
                assert!(code.iter().all(u8::is_ascii_alphanumeric) && code.len() == CODE_BYTES);
                assert!(seen.insert(code), "set {set} index {index}");
            }
        }
    }

    /// Codes and targets are kept by servers between versions of this program: they may not change.
    #[test]
    fn codes_and_targets_are_fixed() {
        assert_eq!(std::str::from_utf8(&code_of("existing", 0)).unwrap(), "ol6oELD");
        assert_eq!(std::str::from_utf8(&code_of("existing", 1)).unwrap(), "R4pc6j8");
        assert_eq!(std::str::from_utf8(&target_of(b"spring26")).unwrap(), "https://shop.example/to/bfedede7ab4d7d8d");
        assert_eq!(
            std::str::from_utf8(&numbered_target("create", 7)).unwrap(),
            "https://shop.example/to/982a33077d76b33d"
        );
    }

    proptest! {
        /// Multiplying by an inverse leads back: the map of numbers to codes is one to one.
        #[test]
        fn the_scatter_is_a_bijection(number in 0..CODES) {
            let modulus = u128::from(CODES);
            let power = |mut exponent: u128| {
                let (mut base, mut result) = (u128::from(MULTIPLIER), 1);
                while exponent > 0 {
                    if exponent % 2 == 1 {
                        result = result * base % modulus;
                    }
                    base = base * base % modulus;
                    exponent /= 2;
                }
                result
            };
            // Euler: the inverse is the power phi - 1, phi(62^7) = 62^7 x 1/2 x 30/31.
            let inverse = power(modulus / 62 * 30 - 1);
            let scattered = (u128::from(number) * u128::from(MULTIPLIER) + u128::from(OFFSET)) % modulus;
            prop_assert_eq!((scattered + modulus - u128::from(OFFSET)) * inverse % modulus, u128::from(number));
        }

        #[test]
        fn only_the_right_location_is_right(index in 0..1000u64, other in 0..1000u64) {
            let listed = (0..1000).map(|n| (format!("l{n}"), format!("https://e.example/{n}"))).collect();
            let catalogue = catalogue(vec![
                ("derived", Source::Derived { count: 1000 }),
                ("chosen", Source::Codes((0..1000).map(|n| format!("c{n}")).collect())),
                ("listed", Source::Listed(listed)),
            ]);
            for set in 0..3 {
                let mut target = Vec::new();
                catalogue.target_into(set, index, &mut target);
                prop_assert!(catalogue.is_target(set, index, &target));
                prop_assert_eq!(catalogue.is_target(set, other, &target), other == index);
                prop_assert!(!catalogue.is_target(set, index, &target[1..]));
            }
        }
    }

    #[test]
    fn sets_that_would_share_codes_are_refused() {
        let first = block_of("a");
        let twin = (0..).map(|n| format!("b{n}")).find(|name| block_of(name) == first).unwrap();
        let check = |name: &str, count: u64, message: &str| {
            let sets = vec![("a", Source::Derived { count: 1 }), (name, Source::Derived { count })];
            assert_eq!(catalogue(sets).check().err().unwrap_or_default(), message);
        };
        check("b", 1, "");
        check(&twin, 1, &format!("links.{twin} and links.a would have the same codes; rename one of them"));
        check("b", DERIVED_MAX, "");
        check("b", DERIVED_MAX + 1, "links.b: count is 1073741825, at most 1073741824 links fit into a set");
    }

    #[test]
    fn a_code_has_one_target() {
        let listed = |target: &str| Source::Listed(vec![("docs".to_owned(), target.to_owned())]);
        let twice = ("docs".to_owned(), "https://b/".to_owned());
        let derived = String::from_utf8(target_of(b"docs").to_vec()).unwrap();
        let codes = || Source::Codes(vec!["docs".to_owned()]);
        for (sets, message) in [
            (vec![("a", listed("https://a/")), ("b", listed("https://a/"))], ""),
            (vec![("a", codes()), ("b", listed(&derived))], ""),
            (
                vec![("a", listed("https://a/")), ("b", listed("https://b/"))],
                "code docs leads to https://a/ in links.a and to https://b/ in links.b: leave one of them out",
            ),
            (
                vec![("a", Source::Listed(vec![("docs".to_owned(), "https://a/".to_owned()), twice]))],
                "code docs leads to https://a/ in links.a and to https://b/ in links.a: leave one of them out",
            ),
            (
                vec![("a", codes()), ("b", listed("https://b/"))],
                &*format!(
                    "code docs leads to {derived} in links.a and to https://b/ in links.b: leave one of them out"
                ),
            ),
        ] {
            assert_eq!(catalogue(sets).check().err().unwrap_or_default(), message);
        }
    }

    #[test]
    fn numbered_targets_differ_by_number_and_class() {
        let targets: HashSet<_> =
            ["create", "other"].iter().flat_map(|class| (0..10_000).map(|n| numbered_target(class, n))).collect();
        assert_eq!(targets.len(), 20_000);
    }
}
