//! Numbered migrations, embedded in the program.
//!
//! In: a database. Out: the same with every migration applied, each once and in order, or an error.
//! Never: changes one that was applied (its checksum is kept and compared), runs twice at a time (the caller
//! holds the store's lock over it), opens a store that a newer program has made, unless that said that it may be.

use sha2::{Digest, Sha256};

use super::{Error, Result};

/// One step of the schema. Never edited once released: a correction is a new one.
#[derive(Clone, Copy, Debug)]
pub struct Migration {
    pub number: u32,
    pub name: &'static str,
    pub sql: &'static str,
}

/// A step that a database has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    pub number: u32,
    pub checksum: String,
    /// Programs that know the migrations up to this one go on when they meet it; none: only those that know it itself.
    pub compatible_from: Option<u32>,
}

impl Migration {
    /// SHA-256 of the SQL, in hexadecimal.
    #[must_use]
    pub fn checksum(&self) -> String {
        Sha256::digest(self.sql).iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The steps that are still to be applied.
pub fn pending<'a>(all: &'a [Migration], applied: &[Applied]) -> Result<&'a [Migration]> {
    for (index, have) in applied.iter().enumerate() {
        let Some(known) = all.get(index) else {
            if have.compatible_from.is_some_and(|oldest| oldest as usize <= all.len()) {
                continue;
            }
            return Err(Error::Schema(format!(
                "the store has migration {}, this program knows {}: it was made by a newer waypost, use that one",
                have.number,
                all.len()
            )));
        };
        if have.number != known.number || have.checksum != known.checksum() {
            return Err(Error::Schema(format!(
                "migration {} ({}) is not the one that the store was made with: restore the store or the program",
                known.number, known.name
            )));
        }
    }
    Ok(&all[applied.len().min(all.len())..])
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Migration; 2] =
        [Migration { number: 1, name: "one", sql: "SELECT 1" }, Migration { number: 2, name: "two", sql: "SELECT 2" }];

    fn check(applied: &[Applied], want: std::result::Result<&[u32], &str>) {
        let got = pending(&ALL, applied).map(|rest| rest.iter().map(|m| m.number).collect::<Vec<_>>());
        match (got, want) {
            (Ok(got), Ok(want)) => assert_eq!(got, want),
            (Err(got), Err(want)) => assert!(got.to_string().contains(want), "{got}"),
            (got, want) => panic!("{got:?} instead of {want:?}"),
        }
    }

    #[test]
    fn what_is_left_to_do() {
        let have = |number: u32, sql: &'static str| Applied {
            number,
            checksum: Migration { number, name: "", sql }.checksum(),
            compatible_from: None,
        };
        let later = |number: u32, oldest: u32| Applied { compatible_from: Some(oldest), ..have(number, "SELECT 3") };
        let both = [have(1, "SELECT 1"), have(2, "SELECT 2")];
        check(&[], Ok(&[1, 2]));
        check(&[have(1, "SELECT 1")], Ok(&[2]));
        check(&both, Ok(&[]));
        check(&[have(1, "SELECT 9")], Err("migration 1 (one)"));
        check(&[have(2, "SELECT 2")], Err("migration 1 (one)"));
        let and = |more: &[Applied]| [&both[..], more].concat();
        check(&and(&[have(3, "SELECT 3")]), Err("newer waypost"));
        check(&and(&[later(3, 3)]), Err("newer waypost"));
        check(&and(&[later(3, 2), later(4, 1)]), Ok(&[]));
        // What was left in place for a while has gone.
        check(&and(&[later(3, 2), later(4, 3)]), Err("newer waypost"));
        check(&[have(1, "SELECT 9"), have(2, "SELECT 2"), later(3, 2)], Err("migration 1 (one)"));
    }
}
