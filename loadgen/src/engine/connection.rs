//! One connection: its socket, what is in flight on it, and the bytes between.

use std::collections::VecDeque;

use socket2::Socket;

use super::fresh::Fresh;
use super::http::Reader;
use crate::ledger::write::Id;
use crate::plan::pick::Choice;

/// A request that was put on a connection and has not ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flight {
    pub(super) segment: u16,
    pub(super) intended_ns: u64,
    pub(super) picked_ns: u64,
    /// 0 until its bytes are handed to the kernel.
    pub(super) sent_ns: u64,
    pub(super) first_byte_ns: u64,
    pub(super) bytes: u32,
    pub(super) ordinal: u64,
    pub(super) choice: Choice,
    pub(super) fresh: Option<Fresh>,
    pub(super) id: Option<Id>,
    /// Found a free connection as soon as it was picked.
    pub(super) direct: bool,
    /// Has ended by its time-out; others on the connection are still waited for, and its answer would be passed over.
    pub(super) given_up: bool,
}

/// What the head of the present answer said.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Head {
    pub(super) status: u16,
    pub(super) location_right: bool,
    pub(super) keep_alive: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Since this instant.
    Connecting(u64),
    Open,
    /// Its place in the slab is free.
    Closed,
}

/// Buffers keep their room when the place is used again.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: Option<Socket>,
    /// Tells an event of this connection from one of its place's last owner.
    pub(super) generation: u32,
    pub(super) group: u16,
    pub(super) phase: Phase,
    /// Stands in its group's list of those that have room.
    pub(super) listed: bool,
    /// Has bytes to be written in this turn.
    pub(super) staged: bool,
    /// Of its session; counts down when one is put on it.
    pub(super) requests_left: u32,
    pub(super) flights: VecDeque<Flight>,
    pub(super) reader: Reader,
    pub(super) head: Head,
    /// The part of a head that has come so far.
    pub(super) carry: Vec<u8>,
    /// Of a body that somebody looks at.
    pub(super) body: Vec<u8>,
    pub(super) out: Vec<u8>,
    pub(super) written: usize,
}

impl Connection {
    /// A place in the slab.
    pub(super) fn empty() -> Self {
        Self {
            socket: None,
            generation: 0,
            group: 0,
            phase: Phase::Closed,
            listed: false,
            staged: false,
            requests_left: 0,
            flights: VecDeque::new(),
            reader: Reader::default(),
            head: Head::default(),
            carry: Vec::new(),
            body: Vec::new(),
            out: Vec::new(),
            written: 0,
        }
    }

    pub(super) fn begin(&mut self, socket: Socket, group: u16, requests: u32, now_ns: u64) {
        self.socket = Some(socket);
        self.group = group;
        self.phase = Phase::Connecting(now_ns);
        self.requests_left = requests;
    }

    /// Closes the socket; what was in flight has been taken out before.
    pub(super) fn end(&mut self) {
        self.socket = None;
        self.generation = self.generation.wrapping_add(1);
        self.phase = Phase::Closed;
        self.listed = false;
        self.staged = false;
        self.flights.clear();
        self.reader = Reader::default();
        self.carry.clear();
        self.body.clear();
        self.out.clear();
        self.written = 0;
    }

    /// May carry one more request now.
    pub(super) fn has_room(&self, pipeline: usize) -> bool {
        self.phase == Phase::Open && self.requests_left > 0 && self.flights.len() < pipeline
    }
}

/// Where an event belongs: a place in the slab, and which of its owners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) index: u32,
    pub(super) generation: u32,
}

impl Place {
    pub(super) fn pack(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    pub(super) fn unpack(data: u64) -> Self {
        Self { index: (data & 0xffff_ffff) as u32, generation: (data >> 32) as u32 }
    }
}
