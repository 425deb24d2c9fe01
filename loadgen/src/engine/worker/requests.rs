//! Requests of a worker: put on a connection, into the ledger, to the kernel; and their ends.

use super::Worker;
use crate::clock;
use crate::engine::Defect;
use crate::engine::connection::{Flight, Place};
use crate::engine::group::Waiting;
use crate::engine::template;
use crate::ledger::link_of;
use crate::links;
use crate::measure::{Outcome, Sample};
use crate::plan::pick::Choice;
use crate::scenario::Pick;

/// The pause of a closed loop's client that met no answer: a server that refuses would be asked without any.
const PAUSE_NS: u64 = 1_000_000;

impl Worker<'_> {
    /// Puts a request on a connection that has room; `direct`: it did not wait for one.
    pub(super) fn put(&mut self, place: Place, waiting: Waiting, direct: bool) {
        let number = usize::from(waiting.arrival.traffic);
        let traffic = &self.scenario.traffic[number];
        let ordinal = waiting.arrival.ordinal;
        let choice = self.groups[number].picker.pick(ordinal);
        let mut fresh = None;
        self.code.clear();
        match choice {
            Choice::None => {}
            Choice::Link { set, index } => self.scenario.catalogue.code_into(usize::from(set), index, &mut self.code),
            Choice::Random { digits, length } => self.code.extend_from_slice(&digits[..usize::from(length)]),
            Choice::Fresh { from } => match self.rings[usize::from(from)].take(clock::now_ns()) {
                Some(taken) => self.code.extend_from_slice(fresh.insert(taken).code()),
                None => return self.unsent(waiting, Outcome::NoCode),
            },
        }
        self.target.clear();
        if self.groups[number].template.wants_target() {
            self.target.extend_from_slice(&links::numbered_target(&traffic.name, ordinal));
        }
        let id = self.ledger.as_mut().map(|ledger| {
            let link = link_of(&traffic.method, &traffic.path, &self.code);
            let id = ledger.sending(clock::now_ns(), &traffic.name, &traffic.method, link);
            (id, ledger.digits(id))
        });
        let connection = &mut self.connections[place.index as usize];
        self.groups[number].template.render(
            &template::Values {
                code: &self.code,
                number: ordinal,
                target: &self.target,
                intended_ns: waiting.intended_ns,
                id: id.as_ref().map_or(&[][..], |(_, digits)| digits),
            },
            &mut connection.out,
        );
        connection.requests_left = connection.requests_left.saturating_sub(1);
        connection.flights.push_back(Flight {
            segment: waiting.arrival.segment,
            intended_ns: waiting.intended_ns,
            picked_ns: waiting.picked_ns,
            sent_ns: 0,
            first_byte_ns: 0,
            bytes: 0,
            ordinal,
            choice,
            fresh,
            id: id.map(|(id, _)| id),
            direct,
            given_up: false,
        });
        if !connection.staged {
            connection.staged = true;
            self.staged.push(place);
        }
        self.in_flight += 1;
    }

    /// A connection that has room takes what waits longest; when nothing does, it is listed.
    pub(super) fn offer(&mut self, place: Place) {
        let number = usize::from(self.connections[place.index as usize].group);
        let pipeline = self.scenario.traffic[number].connection.pipeline;
        while self.connections[place.index as usize].has_room(pipeline) {
            let Some(waiting) = self.groups[number].queue.pop_front() else {
                if !std::mem::replace(&mut self.connections[place.index as usize].listed, true) {
                    self.groups[number].idle.push_back(place);
                }
                return;
            };
            self.put(place, waiting, false);
        }
    }

    /// Ends an arrival that was never put on a connection.
    pub(super) fn unsent(&mut self, waiting: Waiting, outcome: Outcome) {
        let done_ns = self.now_ns();
        let Waiting { arrival, intended_ns, picked_ns } = waiting;
        self.recorder.finished(&Sample {
            segment: arrival.segment,
            traffic: arrival.traffic,
            outcome,
            status: 0,
            bytes: 0,
            intended_ns,
            picked_ns,
            sent_ns: 0,
            first_byte_ns: 0,
            done_ns,
            woken_ns: self.woken_ns,
            created_ns: 0,
        });
        self.think(usize::from(arrival.traffic), done_ns, false);
    }

    /// Ends a request that was on a connection; `status` is 0 where no answer came.
    pub(super) fn finish(&mut self, number: usize, flight: &Flight, status: u16, outcome: Outcome, done_ns: u64) {
        let traffic = &self.scenario.traffic[number];
        self.in_flight -= 1;
        if let (Some(fresh), Pick::Fresh { from, delay_ns }) = (flight.fresh, &traffic.pick) {
            self.rings[*from].answered(fresh, outcome == Outcome::Ok, done_ns + delay_ns.max(&1_000_000));
        }
        let from_send = self.job.defect == Some(Defect::FromSend);
        self.recorder.finished(&Sample {
            segment: flight.segment,
            traffic: number as u16,
            outcome,
            status,
            bytes: flight.bytes,
            intended_ns: if from_send { flight.sent_ns } else { flight.intended_ns },
            picked_ns: flight.picked_ns,
            sent_ns: flight.sent_ns,
            first_byte_ns: flight.first_byte_ns,
            done_ns,
            woken_ns: self.woken_ns,
            created_ns: flight.fresh.filter(|fresh| fresh.is_timed()).map_or(0, |fresh| fresh.created_ns),
        });
        self.think(number, done_ns, status != 0);
    }

    /// A closed loop's client has its answer, or none.
    pub(super) fn think(&mut self, number: usize, now_ns: u64, answered: bool) {
        if let Some(closed) = self.scenario.traffic[number].closed {
            let pause_ns = if answered { closed.think_ns } else { closed.think_ns.max(PAUSE_NS) };
            self.groups[number].clients.due_ns.push_back(now_ns + pause_ns);
        }
    }

    /// The ledger first: no request leaves before its line is with the kernel.
    pub(super) fn flush(&mut self) -> anyhow::Result<()> {
        if let Some(ledger) = &mut self.ledger {
            ledger.flush().map_err(|error| anyhow::anyhow!("the ledger cannot be written: {error}"))?;
        }
        let mut staged = std::mem::take(&mut self.staged);
        for place in staged.drain(..) {
            if self.is_current(place) {
                self.connections[place.index as usize].staged = false;
                self.write(place);
            }
        }
        self.staged = staged;
        Ok(())
    }

    pub(super) fn write(&mut self, place: Place) {
        let now_ns = self.now_ns();
        let connection = &mut self.connections[place.index as usize];
        for flight in connection.flights.iter_mut().rev().take_while(|flight| flight.sent_ns == 0) {
            flight.sent_ns = now_ns;
            self.recorder.sent();
            if flight.direct {
                self.recorder.left(flight.segment, connection.group, flight.intended_ns, now_ns);
            }
        }
        while connection.written < connection.out.len() {
            let Some(socket) = &connection.socket else { return };
            match rustix::net::send(socket, &connection.out[connection.written..], rustix::net::SendFlags::NOSIGNAL) {
                Ok(written) => connection.written += written,
                // The rest goes when the kernel says that there is room.
                Err(rustix::io::Errno::AGAIN) => return,
                Err(rustix::io::Errno::INTR) => {}
                // Perhaps an answer came before it: reading tells.
                Err(_) => break,
            }
        }
        connection.out.clear();
        connection.written = 0;
    }
}
