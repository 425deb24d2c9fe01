//! Connections of a worker: opened for what waits, ended, given up.

use std::io;

use rustix::event::epoll;

use super::Worker;
use crate::clock;
use crate::engine::address::{self, Failure};
use crate::engine::connection::{Connection, Phase, Place};
use crate::measure::{Connected, Outcome};
use crate::plan::Arrival;
use crate::plan::pick;
use crate::scenario::{ConnectionKind, WhenFull};

impl Worker<'_> {
    pub(super) fn is_current(&self, place: Place) -> bool {
        self.connections[place.index as usize].generation == place.generation
    }

    /// Pools of a fixed size are there before the first arrival.
    pub(super) fn open_pools(&mut self) {
        for number in 0..self.groups.len() {
            let class = &self.scenario.traffic[number].connection;
            if class.kind == ConnectionKind::Pool && class.when_full == WhenFull::Queue {
                for _ in 0..self.groups[number].max {
                    self.open(number, None);
                }
            }
        }
    }

    /// Opens connections for what waits, one for each, up to `max`.
    pub(super) fn grow(&mut self, number: usize) {
        while self.groups[number].connecting < self.groups[number].queue.len()
            && self.groups[number].open < self.groups[number].max
        {
            let first = self.groups[number].queue[self.groups[number].connecting].arrival;
            self.open(number, Some(first));
        }
    }

    /// Begins one connection; when that fails at once, what it was opened for ends.
    pub(super) fn open(&mut self, number: usize, first: Option<Arrival>) {
        let traffic = &self.scenario.traffic[number];
        self.recorder.connected(number as u16, Connected::Asked);
        let index = self.free.pop().unwrap_or_else(|| {
            self.connections.push(Connection::empty());
            self.connections.len() as u32 - 1
        });
        let place = Place { index, generation: self.connections[index as usize].generation };
        let local = self.groups[number].addresses.next();
        let socket = address::connect(self.job.address, local).and_then(|socket| {
            let flags =
                epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
            epoll::add(&self.epoll, &socket, epoll::EventData::new_u64(place.pack()), flags)?;
            Ok(socket)
        });
        let socket = match socket {
            Ok(socket) => socket,
            Err(error) => {
                self.free.push(index);
                return self.not_opened(number, &error);
            }
        };
        let requests = match (traffic.connection.kind, first) {
            (ConnectionKind::PerRequest, _) => 1,
            (ConnectionKind::Session(requests), Some(arrival)) => {
                pick::session_requests(self.scenario.run.seed, &arrival, requests)
            }
            _ => u32::MAX,
        };
        self.connections[index as usize].begin(socket, number as u16, requests, clock::now_ns());
        self.groups[number].open += 1;
        self.groups[number].connecting += 1;
    }

    pub(super) fn not_opened(&mut self, number: usize, error: &io::Error) {
        let (outcome, what) = match address::failure(error) {
            Failure::Refused => (Outcome::Refused, Connected::Failed),
            Failure::NoFd => (Outcome::NoFd, Connected::FailedByUs),
            Failure::NoPort => (Outcome::NoPort, Connected::FailedByUs),
            Failure::Other => (Outcome::Reset, Connected::Failed),
        };
        self.recorder.connected(number as u16, what);
        if let Some(waiting) = self.groups[number].queue.pop_front() {
            self.unsent(waiting, outcome);
        }
    }

    /// Ends a connection, and all that is in flight on it with `outcome`.
    pub(super) fn close(&mut self, place: Place, outcome: Outcome, why: Connected) {
        let connection = &mut self.connections[place.index as usize];
        let number = usize::from(connection.group);
        let done_ns = self.now_ns();
        while let Some(flight) = self.connections[place.index as usize].flights.pop_front() {
            if !flight.given_up {
                self.finish(number, &flight, 0, outcome, done_ns);
            }
        }
        self.recorder.connected(number as u16, why);
        self.release(place);
    }

    /// Gives the place of a connection without flights back.
    pub(super) fn release(&mut self, place: Place) {
        let connection = &mut self.connections[place.index as usize];
        let group = &mut self.groups[usize::from(connection.group)];
        group.open -= 1;
        group.connecting -= usize::from(matches!(connection.phase, Phase::Connecting(_)));
        connection.end();
        self.free.push(place.index);
    }

    /// Ends what is older than the time-out: on connections, in queues, and connections that do not open.
    pub(super) fn sweep(&mut self, now_ns: u64) {
        let timeout_ns = self.scenario.run.timeout_ns;
        for index in 0..self.connections.len() {
            let connection = &self.connections[index];
            let place = Place { index: index as u32, generation: connection.generation };
            let number = usize::from(connection.group);
            match connection.phase {
                Phase::Connecting(since_ns) if since_ns + timeout_ns <= now_ns => {
                    self.close(place, Outcome::Timeout, Connected::Failed);
                    self.grow(number);
                }
                Phase::Open => self.give_up(place, now_ns.saturating_sub(timeout_ns)),
                _ => {}
            }
        }
        for number in 0..self.groups.len() {
            let queue = |worker: &mut Self| {
                worker.groups[number].queue.pop_front_if(|waiting| waiting.intended_ns + timeout_ns <= now_ns)
            };
            while let Some(waiting) = queue(self) {
                self.unsent(waiting, Outcome::Unsent);
            }
        }
    }

    /// Ends the requests of a connection that were due by `until_ns`, and the connection when there is no other on it.
    pub(super) fn give_up(&mut self, place: Place, until_ns: u64) {
        let number = usize::from(self.connections[place.index as usize].group);
        let mut waited_for = 0;
        for index in 0..self.connections[place.index as usize].flights.len() {
            let flight = &mut self.connections[place.index as usize].flights[index];
            if flight.given_up || flight.intended_ns > until_ns {
                waited_for += usize::from(!flight.given_up);
                continue;
            }
            flight.given_up = true;
            let flight = *flight;
            let done_ns = self.now_ns();
            self.finish(number, &flight, 0, Outcome::Timeout, done_ns);
        }
        if waited_for == 0 && !self.connections[place.index as usize].flights.is_empty() {
            self.close(place, Outcome::Timeout, Connected::Closed);
            self.grow(number);
        }
    }
}
