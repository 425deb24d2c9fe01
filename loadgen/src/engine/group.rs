//! A class in one worker: what waits, on which connections, and what its requests are made of.

use std::collections::VecDeque;

use super::address::Addresses;
use super::connection::Place;
use super::template::Template;
use crate::plan::Arrival;
use crate::plan::pick::Picker;
use crate::scenario::Traffic;

/// An arrival that no connection has taken yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waiting {
    pub(super) arrival: Arrival,
    /// On the monotonic clock.
    pub(super) intended_ns: u64,
    pub(super) picked_ns: u64,
}

#[derive(Debug)]
pub(super) struct Group {
    pub(super) template: Template,
    pub(super) picker: Picker,
    pub(super) link: Link,
    pub(super) addresses: Addresses,
    /// In order of picking. Empty while a connection has room.
    pub(super) queue: VecDeque<Waiting>,
    /// Connections with room, the longest idle first, so that load is spread over all (giltene/wrk2#89). One that was
    /// closed meanwhile is passed over by its generation.
    pub(super) idle: VecDeque<Place>,
    /// Open or being opened, and this worker's share of the class's `max`.
    pub(super) open: usize,
    pub(super) connecting: usize,
    pub(super) max: usize,
    pub(super) clients: Clients,
}

/// Which link the requests of a class ask for: what the ledger calls their code.
#[derive(Debug)]
pub(super) enum Link {
    /// The code that was picked.
    Picked,
    /// The path is that of one link.
    Fixed(Vec<u8>),
    /// None: an API, stats.
    No,
}

impl Link {
    pub(super) fn of_requests(traffic: &Traffic) -> Self {
        let path = traffic.path.split(['?', '#']).next().unwrap_or("").trim_start_matches('/');
        match path {
            _ if !matches!(traffic.method.as_str(), "GET" | "HEAD") => Self::No,
            "{code}" => Self::Picked,
            _ if path.is_empty() || path.contains(['/', '{']) => Self::No,
            _ => Self::Fixed(path.as_bytes().to_owned()),
        }
    }

    pub(super) fn of<'a>(&'a self, picked: &'a [u8]) -> &'a [u8] {
        match self {
            Self::Picked => picked,
            Self::Fixed(code) => code,
            Self::No => &[],
        }
    }
}

/// Closed-loop clients of a class, those of this worker.
#[derive(Debug, Default)]
pub(super) struct Clients {
    pub(super) running: bool,
    /// Wait for a phase that has them.
    pub(super) parked: usize,
    /// When each thinking one asks again, in order of time since all think alike long.
    pub(super) due_ns: VecDeque<u64>,
    pub(super) next_ordinal: u64,
}
