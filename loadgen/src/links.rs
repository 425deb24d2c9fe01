//! Links whose codes and targets need no memory: both are computed from the set's name and an index.
//!
//! `seed` creates them, a run asks for them, and the answer's `Location` is compared with the target that must be there:
//! an answer that belongs to another link, or an old one, is found under any load.

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
        let _ = set;
        todo!()
    }

    /// Appends the code of link `index` of `set`.
    pub fn code_into(&self, set: usize, index: u64, out: &mut Vec<u8>) {
        let _ = (set, index, out);
        todo!()
    }

    /// Appends its target.
    pub fn target_into(&self, set: usize, index: u64, out: &mut Vec<u8>) {
        let _ = (set, index, out);
        todo!()
    }
}

/// Bytes of a derived target.
pub const TARGET_BYTES: usize = 40;

/// The target that belongs to a code: `https://shop.example/` and 16 hexadecimal digits of its hash, and no other code's
/// (but for a collision of 64 bits).
#[must_use]
pub fn target_of(code: &[u8]) -> [u8; TARGET_BYTES] {
    let _ = code;
    todo!()
}
