//! A class in one worker: what waits, on which connections, and what its requests are made of.

use std::collections::VecDeque;

use super::address::Addresses;
use super::connection::Place;
use super::template::Template;
use crate::plan::Arrival;
use crate::plan::pick::Picker;

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
