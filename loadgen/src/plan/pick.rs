//! Which code an arrival asks for.

use super::Arrival;
use crate::scenario::{Pick, Scenario};

/// The code of one request; the catalogue, or the digits here, spell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    None,
    Link {
        set: u16,
        index: u64,
    },
    Random {
        digits: [u8; RANDOM_MAX],
        length: u8,
    },
    /// The worker's next fresh code of class `from`.
    Fresh {
        from: u16,
    },
}

/// Longest random code.
pub const RANDOM_MAX: usize = 16;

/// Prepared for one class: Zipf's constants, the permutation's size.
#[derive(Debug)]
pub struct Picker {
    pick: Pick,
}

impl Picker {
    /// For class `traffic` of the scenario.
    #[must_use]
    pub fn new(scenario: &Scenario, traffic: usize) -> Self {
        Self { pick: scenario.traffic[traffic].pick.clone() }
    }

    /// The choice of the arrival with this ordinal within its class: the same for any number of workers.
    #[must_use]
    pub fn pick(&self, ordinal: u64) -> Choice {
        let _ = (&self.pick, ordinal);
        todo!()
    }
}

/// Requests of the session that begins with this arrival, at least 1; pure as well.
#[must_use]
pub fn session_requests(seed: u64, arrival: &Arrival, requests: crate::scenario::Requests) -> u32 {
    let _ = (seed, arrival, requests);
    todo!()
}
