//! Answers to a worker: events of its sockets, and what the bytes say.

use rustix::event::epoll;

use super::{READ_BYTES, Worker};
use crate::engine::answer;
use crate::engine::connection::{Flight, Head, Phase, Place};
use crate::engine::fresh::{CODE_MAX, Fresh, Ring};
use crate::engine::http::{self, Step};
use crate::ledger::write::Writer;
use crate::links;
use crate::measure::{Connected, Outcome};
use crate::plan::pick::Choice;
use crate::scenario::{Pick, Scenario};

/// Of a body that somebody looks at; the rest is passed over.
const BODY_BYTES_MAX: usize = 64 << 10;
/// Reads of one connection in one turn: a body without an end keeps nobody else waiting.
const READS: usize = 8;

impl Worker<'_> {
    pub(super) fn handle(&mut self, place: Place, flags: epoll::EventFlags) {
        if !self.is_current(place) {
            return;
        }
        let connection = &mut self.connections[place.index as usize];
        let number = usize::from(connection.group);
        if let Phase::Connecting(_) = connection.phase {
            let error = connection.socket.as_ref().and_then(|socket| socket.take_error().transpose());
            if let Some(error) = error {
                let error = error.unwrap_or_else(|error| error);
                self.release(place);
                self.not_opened(number, &error);
                return self.grow(number);
            }
            if !flags.contains(epoll::EventFlags::OUT) {
                return;
            }
            connection.phase = Phase::Open;
            self.groups[number].connecting -= 1;
            self.recorder.connected(number as u16, Connected::Opened);
            self.offer(place);
        } else if flags.contains(epoll::EventFlags::OUT) && !connection.out.is_empty() && !connection.staged {
            self.write(place);
        }
        let ended = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::HUP | epoll::EventFlags::ERR;
        if flags.intersects(ended) {
            let closing = flags.intersects(epoll::EventFlags::RDHUP | epoll::EventFlags::HUP | epoll::EventFlags::ERR);
            self.heard(place, closing);
        }
    }

    /// Something can be read. What waits goes on the connection only after that: bytes that are there answer nothing
    /// that has not been sent, and one that the server has closed takes nothing more.
    pub(super) fn heard(&mut self, place: Place, closing: bool) {
        if !self.is_current(place) {
            return;
        }
        if closing {
            self.connections[place.index as usize].requests_left = 0;
        }
        self.read(place, closing);
        if self.is_current(place) {
            self.offer(place);
        }
    }

    /// Takes what has come. A read that fills less than it might has emptied the socket (epoll(7)); the end of the stream
    /// shows by an event of its own, `closing`.
    pub(super) fn read(&mut self, place: Place, closing: bool) {
        let mut scratch = std::mem::take(&mut self.scratch);
        for turn in 0.. {
            if turn == READS {
                self.unfinished.push((place, closing));
                break;
            }
            let connection = &mut self.connections[place.index as usize];
            let carried = connection.carry.len();
            scratch[..carried].copy_from_slice(&connection.carry);
            connection.carry.clear();
            let Some(socket) = &connection.socket else { break };
            let room = &mut scratch[carried..carried + READ_BYTES];
            match rustix::net::recv(socket, room, rustix::net::RecvFlags::empty()) {
                Ok((_, 0)) => {
                    self.ended(place);
                    break;
                }
                Ok((_, read)) => {
                    let done_ns = self.now_ns();
                    let open = self.take(place, &scratch[..carried + read], done_ns);
                    if !open || (read < READ_BYTES && !closing) {
                        break;
                    }
                }
                Err(rustix::io::Errno::AGAIN) => {
                    // What was carried still waits for the rest.
                    connection.carry.extend_from_slice(&scratch[..carried]);
                    break;
                }
                Err(rustix::io::Errno::INTR) => connection.carry.extend_from_slice(&scratch[..carried]),
                Err(_) => {
                    self.lost(place, Outcome::Reset);
                    break;
                }
            }
        }
        self.scratch = scratch;
    }

    /// The server has closed: that ends an answer without a length, and cuts off any other.
    pub(super) fn ended(&mut self, place: Place) {
        let connection = &mut self.connections[place.index as usize];
        if connection.reader.ends_by_close() {
            let done_ns = self.now_ns();
            self.complete(place, done_ns);
        }
        self.lost(place, Outcome::ClosedEarly);
    }

    pub(super) fn lost(&mut self, place: Place, outcome: Outcome) {
        if self.is_current(place) {
            let number = usize::from(self.connections[place.index as usize].group);
            self.close(place, outcome, Connected::ClosedByServer);
            self.grow(number);
        }
    }

    /// Reads answers out of `bytes`; false when the connection is over.
    pub(super) fn take(&mut self, place: Place, bytes: &[u8], done_ns: u64) -> bool {
        let connection = &mut self.connections[place.index as usize];
        let traffic = &self.scenario.traffic[usize::from(connection.group)];
        let looked_at = traffic.yields.is_some() || traffic.expect.body.is_some();
        let mut rest = bytes;
        loop {
            let connection = &mut self.connections[place.index as usize];
            let Some(flight) = connection.flights.front_mut() else {
                if rest.is_empty() {
                    return true;
                }
                self.recorder.connected(connection.group, Connected::Unsolicited);
                self.lost(place, Outcome::ProtocolError);
                return false;
            };
            let Ok(progress) = connection.reader.read(rest, traffic.method == "HEAD") else {
                self.lost(place, Outcome::ProtocolError);
                return false;
            };
            rest = &rest[progress.consumed..];
            flight.bytes = flight.bytes.saturating_add(progress.consumed as u32);
            if flight.first_byte_ns == 0 {
                flight.first_byte_ns = done_ns;
            }
            match progress.step {
                Step::More => {
                    connection.carry.extend_from_slice(rest);
                    return true;
                }
                Step::Head(head) => {
                    let location_right = self.is_right(place, &head);
                    self.connections[place.index as usize].head =
                        Head { status: head.status, location_right, keep_alive: head.keep_alive };
                }
                Step::Body(piece) => {
                    let room = BODY_BYTES_MAX - connection.body.len();
                    if looked_at {
                        connection.body.extend_from_slice(&piece[..piece.len().min(room)]);
                    }
                }
                Step::Done => {
                    if !self.complete(place, done_ns) {
                        return false;
                    }
                    if rest.is_empty() {
                        return true;
                    }
                }
            }
        }
    }

    /// Whether `Location` is the target that belongs to the code that was asked for.
    pub(super) fn is_right(&self, place: Place, head: &http::Head<'_>) -> bool {
        let connection = &self.connections[place.index as usize];
        let Some(flight) = connection.flights.front() else { return false };
        match (flight.choice, flight.fresh) {
            (Choice::Link { set, index }, _) => {
                self.scenario.catalogue.is_target(usize::from(set), index, head.location)
            }
            (Choice::Fresh { from }, Some(fresh)) => {
                let class = &self.scenario.traffic[usize::from(from)].name;
                links::numbered_target(class, fresh.ordinal)[..] == *head.location
            }
            _ => true,
        }
    }

    /// The first request in flight has its whole answer; false when that ended the connection.
    pub(super) fn complete(&mut self, place: Place, done_ns: u64) -> bool {
        let connection = &mut self.connections[place.index as usize];
        let number = usize::from(connection.group);
        let head = connection.head;
        let Some(flight) = connection.flights.pop_front() else { return true };
        let over = !head.keep_alive || (connection.requests_left == 0 && connection.flights.is_empty());
        if !flight.given_up {
            self.answered(place, &flight, done_ns);
        }
        self.connections[place.index as usize].body.clear();
        if over {
            self.close(place, Outcome::ClosedEarly, Connected::Closed);
            self.grow(number);
        }
        !over
    }

    /// Judges a whole answer, and what it yields.
    pub(super) fn answered(&mut self, place: Place, flight: &Flight, done_ns: u64) {
        let connection = &self.connections[place.index as usize];
        let number = usize::from(connection.group);
        let traffic = &self.scenario.traffic[number];
        let head = connection.head;
        let mut outcome = answer::judge(&traffic.expect, head.status, head.location_right, &connection.body);
        if let (Outcome::Ok, Some(yields)) = (outcome, &traffic.yields) {
            match answer::member(&connection.body, &yields.member) {
                // Anything else would be read as another part of the request line.
                Some(code) if (1..=CODE_MAX).contains(&code.len()) && code.bytes().all(links::is_of_code) => {
                    created(&mut self.rings, self.scenario, &mut self.ledger, number, flight, &code, done_ns);
                }
                _ => outcome = Outcome::WrongBody,
            }
        }
        if let (Some(ledger), Some(id)) = (&mut self.ledger, flight.id) {
            let location_right = head.location_right || !answer::is_redirect(head.status);
            ledger.received(id, done_ns, head.status, location_right);
        }
        self.finish(number, flight, head.status, outcome, done_ns);
    }
}

/// A code that the server has acknowledged: into the ledger, and to those that read it back.
fn created(
    rings: &mut [Ring],
    scenario: &Scenario,
    ledger: &mut Option<Writer>,
    number: usize,
    flight: &Flight,
    code: &str,
    done_ns: u64,
) {
    let target = links::numbered_target(&scenario.traffic[number].name, flight.ordinal);
    if let (Some(ledger), Some(id)) = (ledger, flight.id) {
        ledger.created(id, done_ns, code.as_bytes(), &target);
    }
    // Of several classes that read them, none is to come too early.
    let delays_ns = scenario.traffic.iter().filter_map(|reader| match reader.pick {
        Pick::Fresh { from, delay_ns } if from == number => Some(delay_ns),
        _ => None,
    });
    if let (Some(delay_ns), Some(fresh)) = (delays_ns.max(), Fresh::new(code.as_bytes(), flight.ordinal, done_ns)) {
        rings[number].created(fresh, done_ns + delay_ns);
    }
}
