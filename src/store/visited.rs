//! What comes out of a store about visits: rows of totals, of days, and of single visits.

use crate::domain::key::DomainId;
use crate::domain::link::LinkId;
use crate::domain::time::UnixMillis;
use crate::domain::visit::{Class, Dropped, Drops};

/// Days that are read at a time: five years.
pub const DAYS_MAX: u16 = 1_827;

/// Visits by [`Class`], orphans left out.
pub type Kinds = [u64; Class::OF_LINKS];

/// All visits of a link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub kinds: Kinds,
    /// The first and the last click or tool.
    pub first_at: Option<UnixMillis>,
    pub last_at: Option<UnixMillis>,
    /// For `stats::sketch`.
    pub sketch: Vec<u8>,
}

/// The visits of a link on a day (UTC).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DayRow {
    /// Since 1970.
    pub day: i32,
    pub kinds: Kinds,
    /// Empty if it was not asked for.
    pub sketch: Vec<u8>,
}

/// Which days, and what of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Days {
    /// The first and the last one, as days since 1970 (UTC).
    pub from: i32,
    pub to: i32,
    /// Up to 8 KiB a day: a document without a range does without.
    pub sketches: bool,
}

impl Days {
    /// The newest [`DAYS_MAX`], without sketches.
    pub const ALL: Self = Self { from: i32::MIN, to: i32::MAX, sketches: false };
}

/// What is known of a link's visits. A link without any has zeros.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkRows {
    pub totals: Totals,
    /// Newest first; those without visits are left out.
    pub days: Vec<DayRow>,
}

/// The visits of a link on a day, as they move to another store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DayOfLink {
    pub link: LinkId,
    pub row: DayRow,
    /// The last click or tool.
    pub last_at: Option<UnixMillis>,
}

/// Up to where the records of a core of a start are stored, as it moves to another store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// As the store has it: the same 64 bits, signed.
    pub epoch: i64,
    pub core: i32,
    pub instance: String,
    pub next: u64,
    pub stored: u64,
    pub answered: u64,
    pub at: UnixMillis,
    /// Visits that were given up, by reason.
    pub drops: Vec<(String, u64)>,
}

/// A visit as the store has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    pub at: UnixMillis,
    pub domain: DomainId,
    /// Empty: its link is no more.
    pub code: String,
    pub kind: Class,
    pub address: Option<String>,
    pub user_agent: Option<String>,
    pub referrer: Option<String>,
    pub country: Option<String>,
    pub request_id: Option<String>,
    pub epoch: u64,
}

/// Sums over the epochs of an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Account {
    pub instance: String,
    pub answered: u64,
    pub stored: u64,
    pub drops: Drops,
    /// When it was last heard of.
    pub at: UnixMillis,
}

/// The account of each instance: its sums, and the drops by reason, both ordered by instance.
pub(crate) fn accounts(sums: Vec<Account>, drops: Vec<(String, String, u64)>) -> Vec<Account> {
    let mut sums = sums;
    for (instance, reason, visits) in drops {
        let place = Dropped::ALL.iter().position(|dropped| dropped.name() == reason);
        // A reason that only a newer program knows still adds up: it shows as pending.
        if let (Some(account), Some(place)) = (sums.iter_mut().find(|sum| sum.instance == instance), place) {
            account.drops[place] += visits;
        }
    }
    sums
}
