//! A worker: one thread, one epoll, its share of the plan. One turn of [`Worker::run`] is the whole engine:
//!
//! 1. arrivals that are due are taken out of the plan and put on a connection, or into their group's queue;
//! 2. clients of closed loops that have thought enough ask again;
//! 3. what was staged goes into the ledger, and only then to the kernel;
//! 4. what has waited longer than the time-out ends;
//! 5. the second's measurements are given away when it is over;
//! 6. sleep until the next instant of 1, 2, 4 or 5, or an event;
//! 7. events: connections that opened, answers, ends.

use std::io;
use std::sync::atomic::Ordering::Relaxed;

use rustix::event::Timespec;
use rustix::event::epoll;
use rustix::fd::OwnedFd;

use super::address::{self, Addresses, Failure};
use super::answer;
use super::connection::{Connection, Flight, Head, Phase, Place};
use super::fresh::{Fresh, Ring};
use super::group::{Clients, Group, Waiting};
use super::http::{self, Step};
use super::template::{self, Template};
use super::{Defect, Ended, Job, Spin};
use crate::clock;
use crate::ledger::link_of;
use crate::ledger::write::Writer;
use crate::links;
use crate::measure::recorder::Recorder;
use crate::measure::{Connected, Outcome, Sample};
use crate::plan::arrivals::Arrivals;
use crate::plan::pick::{self, Choice, Picker};
use crate::plan::{Arrival, Segment};
use crate::scenario::{ConnectionKind, Pick, Scenario, WhenFull};

/// Most bytes of an answer that one read takes: those of 100 redirects.
const READ_BYTES: usize = 64 << 10;
/// Of a body that somebody looks at; the rest is passed over.
const BODY_BYTES_MAX: usize = 64 << 10;
/// Events of one wake-up; more come with the next.
const EVENTS: usize = 512;
/// The last part of a wait, which [`Spin::Auto`] polls away: a sleeper comes back some 30 µs late (half of the time; 50 one
/// time in a hundred). A share of it at most, so that the core is left to others for the rest however often it wakes up.
const POLLED_NS: u64 = 50_000;
const POLLED_SHARE: u64 = 4;
/// Arrivals of one turn.
const ARRIVALS: usize = 64;
/// How often time-outs are looked for, at least and at most: a sweep of 8,000 connections takes about 40 µs.
const SWEEP_NS: (u64, u64) = (1_000_000, 50_000_000);

pub(super) struct Worker<'a> {
    job: &'a Job,
    scenario: &'a Scenario,
    segments: &'a [Segment],
    number: usize,
    origin_ns: u64,
    epoll: OwnedFd,
    connections: Vec<Connection>,
    /// Places of closed connections.
    free: Vec<u32>,
    groups: Vec<Group>,
    rings: Vec<Ring>,
    recorder: Recorder,
    ledger: Option<Writer>,
    /// Connections with bytes to be written in this turn.
    staged: Vec<Place>,
    in_flight: usize,
    /// The segment of the present instant.
    segment: usize,
    scratch: Vec<u8>,
    code: Vec<u8>,
    target: Vec<u8>,
    woken_ns: u64,
    /// Before the last sleep: what the planted [`Defect::CachedClock`] takes for now.
    stale_ns: u64,
}

impl<'a> Worker<'a> {
    pub(super) fn new(
        job: &'a Job,
        segments: &'a [Segment],
        number: usize,
        origin_ns: u64,
        mut recorder: Recorder,
        ledger: Option<Writer>,
    ) -> anyhow::Result<Self> {
        if job.defect == Some(Defect::BackFill) {
            recorder.plant_back_fill();
        }
        let scenario = &*job.scenario;
        let share = |all: usize| all / job.workers + usize::from(number < all % job.workers);
        let header = job.ledger.as_ref().map(|ledger| ledger.header.as_str());
        let groups = scenario.traffic.iter().enumerate().map(|(index, traffic)| {
            let clients = traffic.closed.map_or(0, |closed| share(closed.clients));
            Ok(Group {
                template: Template::compile(traffic, &scenario.run.target.authority, job.key.as_deref(), header)?,
                picker: Picker::new(scenario, index),
                addresses: Addresses::new(traffic.bind, number, job.workers),
                queue: std::collections::VecDeque::new(),
                idle: std::collections::VecDeque::new(),
                open: 0,
                connecting: 0,
                // A class that has fewer connections than there are workers would never be sent by some of them.
                max: share(traffic.connection.max).max(1),
                clients: Clients {
                    running: false,
                    parked: clients,
                    due_ns: std::collections::VecDeque::with_capacity(clients),
                    next_ordinal: number as u64,
                },
            })
        });
        Ok(Self {
            job,
            scenario,
            segments,
            number,
            origin_ns,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            connections: Vec::new(),
            free: Vec::new(),
            groups: groups.collect::<anyhow::Result<_>>()?,
            rings: scenario.traffic.iter().map(|_| Ring::default()).collect(),
            recorder,
            ledger,
            staged: Vec::new(),
            in_flight: 0,
            segment: 0,
            scratch: vec![0; http::HEAD_MAX + READ_BYTES],
            code: Vec::with_capacity(256),
            target: Vec::with_capacity(256),
            woken_ns: 0,
            stale_ns: 0,
        })
    }

    /// From before the origin to the last answer.
    pub(super) fn run(mut self) -> anyhow::Result<Ended> {
        self.open_pools();
        let mut arrivals = Arrivals::new(self.scenario, self.number, self.job.workers).peekable();
        let mut events: Vec<epoll::Event> = Vec::with_capacity(EVENTS);
        let last_ns = self.origin_ns + self.scenario.length_ns();
        let mut give_up_ns = last_ns + self.scenario.run.drain_ns;
        let sweep_ns = (self.scenario.run.timeout_ns / 100).clamp(SWEEP_NS.0, SWEEP_NS.1);
        let mut sweep_at_ns = self.origin_ns + sweep_ns;
        let mut stopped = false;
        let (mut wanted_ns, mut slept_ns, mut turn_ns) = (u64::MAX, 0, clock::now_ns());

        loop {
            if !stopped && self.job.stop.load(Relaxed) {
                stopped = true;
                give_up_ns = give_up_ns.min(clock::now_ns() + self.scenario.run.drain_ns);
            }
            // Not all that are due: answers are read in between, however late this worker is.
            for _ in 0..ARRIVALS {
                let now_ns = self.now_ns();
                let due = |arrival: &Arrival| !stopped && self.origin_ns + arrival.at_ns <= now_ns;
                let Some(arrival) = arrivals.next_if(due) else { break };
                self.arrive(arrival, now_ns);
            }
            let now_ns = self.now_ns();
            let over = stopped || now_ns >= last_ns;
            self.ask_again(now_ns, over);
            self.flush()?;
            if now_ns >= sweep_at_ns {
                self.sweep(now_ns);
                sweep_at_ns = now_ns + sweep_ns;
            }
            let queued = self.groups.iter().map(|group| group.queue.len()).sum::<usize>();
            let open = self.connections.len() - self.free.len();
            self.recorder.tick(now_ns, self.in_flight, queued, open);

            let arrived = stopped || arrivals.peek().is_none();
            if (over && arrived && self.in_flight + queued == 0) || now_ns >= give_up_ns {
                break;
            }
            let due_ns = [
                arrivals.peek().filter(|_| !stopped).map_or(u64::MAX, |arrival| self.origin_ns + arrival.at_ns),
                self.groups.iter().filter_map(|group| group.clients.due_ns.front().copied()).min().unwrap_or(u64::MAX),
                if over { u64::MAX } else { last_ns },
                sweep_at_ns,
            ];
            let next_ns = due_ns.into_iter().min().unwrap_or(sweep_at_ns);

            let asleep_ns = clock::now_ns();
            let busy_ns = asleep_ns - turn_ns;
            let late_ns = turn_ns.saturating_sub(wanted_ns).max(busy_ns);
            self.recorder.turn(busy_ns, slept_ns, late_ns);
            self.stale_ns = asleep_ns;
            wanted_ns = self.wait(&mut events, next_ns, asleep_ns)?;
            self.woken_ns = clock::now_ns();
            (turn_ns, slept_ns) = (self.woken_ns, self.woken_ns - asleep_ns);
            for event in events.drain(..) {
                self.handle(Place::unpack(event.data.u64()), event.flags);
            }
        }
        // A worker that was too slow for its plan says so: these came too late to be sent at all.
        while let Some(arrival) = arrivals.next().filter(|_| !stopped) {
            let waiting = Waiting { arrival, intended_ns: self.origin_ns + arrival.at_ns, picked_ns: self.now_ns() };
            self.recorder.arrived(arrival.segment, arrival.traffic, waiting.intended_ns, waiting.picked_ns);
            self.unsent(waiting, Outcome::Unsent);
        }
        self.end()
    }

    /// The clock, read anew for each instant that is recorded.
    fn now_ns(&self) -> u64 {
        match self.job.defect {
            Some(Defect::CachedClock) => self.stale_ns,
            _ => clock::now_ns(),
        }
    }

    /// Waits for events until `next_ns`; says until when it meant to sleep at most.
    fn wait(&self, events: &mut Vec<epoll::Event>, next_ns: u64, now_ns: u64) -> io::Result<u64> {
        let left_ns = next_ns.saturating_sub(now_ns);
        let polled_ns = match self.job.spin {
            Spin::Never => 0,
            Spin::Auto => (left_ns / POLLED_SHARE).min(POLLED_NS),
            Spin::Always => left_ns,
        };
        let mut sleep_ns = left_ns - polled_ns;
        loop {
            let timeout =
                Timespec { tv_sec: (sleep_ns / 1_000_000_000) as i64, tv_nsec: (sleep_ns % 1_000_000_000) as i64 };
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(events), Some(&timeout)) {
                Ok(0) if clock::now_ns() < next_ns => sleep_ns = 0,
                Ok(_) | Err(rustix::io::Errno::INTR) => return Ok(next_ns.max(now_ns)),
                Err(error) => return Err(error.into()),
            }
        }
    }

    // ---- 1, 2: what is due

    fn arrive(&mut self, arrival: Arrival, picked_ns: u64) {
        let intended_ns = self.origin_ns + arrival.at_ns;
        self.recorder.arrived(arrival.segment, arrival.traffic, intended_ns, picked_ns);
        self.dispatch(Waiting { arrival, intended_ns, picked_ns });
    }

    /// Puts it on a connection that has room, or into the queue.
    fn dispatch(&mut self, waiting: Waiting) {
        let number = usize::from(waiting.arrival.traffic);
        while let Some(place) = self.groups[number].idle.pop_front() {
            if self.is_current(place) {
                self.connections[place.index as usize].listed = false;
                self.put(place, waiting, true);
                return self.offer(place);
            }
        }
        self.recorder.left(waiting.arrival.segment, waiting.arrival.traffic, waiting.intended_ns, waiting.picked_ns);
        let group = &mut self.groups[number];
        if self.scenario.traffic[number].connection.when_full == WhenFull::Shed && group.open >= group.max {
            return self.unsent(waiting, Outcome::Unsent);
        }
        group.queue.push_back(waiting);
        self.grow(number);
    }

    /// Clients of closed loops: those whose phase it is ask as soon as they have thought; others are parked.
    fn ask_again(&mut self, now_ns: u64, over: bool) {
        let at_ns = now_ns.saturating_sub(self.origin_ns);
        while self.segment + 1 < self.segments.len() && self.segments[self.segment].to_ns <= at_ns {
            self.segment += 1;
        }
        let phase = &self.scenario.phases[self.segments[self.segment].phase];
        for number in 0..self.groups.len() {
            let runs = !over && now_ns >= self.origin_ns && phase.also.contains(&number);
            let clients = &mut self.groups[number].clients;
            if runs && !clients.running {
                clients.due_ns.extend(std::iter::repeat_n(now_ns, std::mem::take(&mut clients.parked)));
            }
            clients.running = runs;
            // Those that are due now and no others: an answer within this loop would ask again for ever.
            for _ in 0..clients.due_ns.len() {
                let clients = &mut self.groups[number].clients;
                let Some(due_ns) = clients.due_ns.pop_front_if(|due_ns| !runs || *due_ns <= now_ns) else { break };
                if !runs {
                    clients.parked += 1;
                    continue;
                }
                let ordinal = clients.next_ordinal;
                clients.next_ordinal += self.job.workers as u64;
                let arrival = Arrival {
                    at_ns: due_ns - self.origin_ns,
                    number: ordinal,
                    ordinal,
                    segment: self.segment as u16,
                    traffic: number as u16,
                };
                let picked_ns = self.now_ns();
                self.arrive(arrival, picked_ns);
            }
        }
    }

    // ---- connections

    fn is_current(&self, place: Place) -> bool {
        self.connections[place.index as usize].generation == place.generation
    }

    /// Pools of a fixed size are there before the first arrival.
    fn open_pools(&mut self) {
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
    fn grow(&mut self, number: usize) {
        while self.groups[number].connecting < self.groups[number].queue.len()
            && self.groups[number].open < self.groups[number].max
        {
            let first = self.groups[number].queue[self.groups[number].connecting].arrival;
            self.open(number, Some(first));
        }
    }

    /// Begins one connection; when that fails at once, what it was opened for ends.
    fn open(&mut self, number: usize, first: Option<Arrival>) {
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

    fn not_opened(&mut self, number: usize, error: &io::Error) {
        self.recorder.connected(number as u16, Connected::Failed);
        let outcome = match address::failure(error) {
            Failure::Refused => Outcome::Refused,
            Failure::NoFd => Outcome::NoFd,
            Failure::NoPort => Outcome::NoPort,
            Failure::Other => Outcome::Reset,
        };
        if let Some(waiting) = self.groups[number].queue.pop_front() {
            self.unsent(waiting, outcome);
        }
    }

    /// Ends a connection, and all that is in flight on it with `outcome`.
    fn close(&mut self, place: Place, outcome: Outcome, why: Connected) {
        let connection = &mut self.connections[place.index as usize];
        let number = usize::from(connection.group);
        let head = std::mem::take(&mut connection.head);
        let done_ns = self.now_ns();
        while let Some(flight) = self.connections[place.index as usize].flights.pop_front() {
            self.finish(number, &flight, Head { status: 0, ..head }, outcome, done_ns);
        }
        self.recorder.connected(number as u16, why);
        self.release(place);
    }

    /// Gives the place of a connection without flights back.
    fn release(&mut self, place: Place) {
        let connection = &mut self.connections[place.index as usize];
        let group = &mut self.groups[usize::from(connection.group)];
        group.open -= 1;
        group.connecting -= usize::from(matches!(connection.phase, Phase::Connecting(_)));
        connection.end();
        self.free.push(place.index);
    }

    // ---- requests

    /// Puts a request on a connection that has room; `direct`: it did not wait for one.
    fn put(&mut self, place: Place, waiting: Waiting, direct: bool) {
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
            Choice::Fresh { from } => match self.rings[usize::from(from)].take(waiting.picked_ns) {
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
        });
        if !connection.staged {
            connection.staged = true;
            self.staged.push(place);
        }
        self.in_flight += 1;
    }

    /// A connection that has room takes what waits longest; when nothing does, it is listed.
    fn offer(&mut self, place: Place) {
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
    fn unsent(&mut self, waiting: Waiting, outcome: Outcome) {
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
        self.think(usize::from(arrival.traffic), done_ns);
    }

    /// Ends a request that was on a connection.
    fn finish(&mut self, number: usize, flight: &Flight, head: Head, outcome: Outcome, done_ns: u64) {
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
            status: head.status,
            bytes: flight.bytes,
            intended_ns: if from_send { flight.sent_ns } else { flight.intended_ns },
            picked_ns: flight.picked_ns,
            sent_ns: flight.sent_ns,
            first_byte_ns: flight.first_byte_ns,
            done_ns,
            woken_ns: self.woken_ns,
            created_ns: flight.fresh.filter(|fresh| fresh.unseen).map_or(0, |fresh| fresh.created_ns),
        });
        self.think(number, done_ns);
    }

    /// A closed loop's client has its answer.
    fn think(&mut self, number: usize, now_ns: u64) {
        if let Some(closed) = self.scenario.traffic[number].closed {
            self.groups[number].clients.due_ns.push_back(now_ns + closed.think_ns);
        }
    }

    // ---- 3: out

    /// The ledger first: no request leaves before its line is with the kernel.
    fn flush(&mut self) -> anyhow::Result<()> {
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

    fn write(&mut self, place: Place) {
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

    // ---- 4: time-outs

    /// Ends what is older than the time-out: on connections, in queues, and connections that do not open.
    fn sweep(&mut self, now_ns: u64) {
        let timeout_ns = self.scenario.run.timeout_ns;
        for index in 0..self.connections.len() {
            let connection = &self.connections[index];
            let place = Place { index: index as u32, generation: connection.generation };
            let since_ns = match connection.phase {
                Phase::Closed => continue,
                Phase::Connecting(since_ns) => since_ns,
                Phase::Open => match connection.flights.front() {
                    Some(flight) => flight.intended_ns,
                    None => continue,
                },
            };
            if since_ns + timeout_ns <= now_ns {
                let connecting = matches!(connection.phase, Phase::Connecting(_));
                let number = usize::from(connection.group);
                self.close(place, Outcome::Timeout, if connecting { Connected::Failed } else { Connected::Closed });
                self.grow(number);
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

    // ---- 7: in

    fn handle(&mut self, place: Place, flags: epoll::EventFlags) {
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
                return self.not_opened(number, &error);
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
            self.read(place, closing);
        }
    }

    /// Takes what has come. A read that fills less than it might has emptied the socket (epoll(7)); the end of the stream
    /// shows by an event of its own, `closing`.
    fn read(&mut self, place: Place, closing: bool) {
        let mut scratch = std::mem::take(&mut self.scratch);
        loop {
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
                    let open = self.take(place, &scratch[..carried + read], read, done_ns);
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
    fn ended(&mut self, place: Place) {
        let connection = &mut self.connections[place.index as usize];
        if connection.reader.ends_by_close() {
            let done_ns = self.now_ns();
            self.complete(place, done_ns);
        }
        self.lost(place, Outcome::ClosedEarly);
    }

    fn lost(&mut self, place: Place, outcome: Outcome) {
        if self.is_current(place) {
            let number = usize::from(self.connections[place.index as usize].group);
            self.close(place, outcome, Connected::ClosedByServer);
            self.grow(number);
        }
    }

    /// Reads answers out of `bytes`, of which the last `read` are new; false when the connection is over.
    fn take(&mut self, place: Place, bytes: &[u8], read: usize, done_ns: u64) -> bool {
        let connection = &mut self.connections[place.index as usize];
        let traffic = &self.scenario.traffic[usize::from(connection.group)];
        if let Some(flight) = connection.flights.front_mut() {
            flight.bytes = flight.bytes.saturating_add(read as u32);
            if flight.first_byte_ns == 0 {
                flight.first_byte_ns = done_ns;
            }
        }
        let looked_at = traffic.yields.is_some() || traffic.expect.body.is_some();
        let mut rest = bytes;
        loop {
            let connection = &mut self.connections[place.index as usize];
            if connection.flights.is_empty() && !rest.is_empty() {
                // An answer to nothing.
                self.lost(place, Outcome::ProtocolError);
                return false;
            }
            let Ok(progress) = connection.reader.read(rest, traffic.method == "HEAD") else {
                self.lost(place, Outcome::ProtocolError);
                return false;
            };
            rest = &rest[progress.consumed..];
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
                    if let Some(flight) = self.connections[place.index as usize].flights.front_mut()
                        && !rest.is_empty()
                    {
                        flight.first_byte_ns = done_ns;
                    }
                }
            }
        }
    }

    /// Whether `Location` is the target that belongs to the code that was asked for.
    fn is_right(&self, place: Place, head: &http::Head<'_>) -> bool {
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
    fn complete(&mut self, place: Place, done_ns: u64) -> bool {
        let connection = &mut self.connections[place.index as usize];
        let number = usize::from(connection.group);
        let traffic = &self.scenario.traffic[number];
        let head = connection.head;
        let Some(flight) = connection.flights.pop_front() else { return true };
        let mut outcome = answer::judge(&traffic.expect, head.status, head.location_right, &connection.body);
        if let (Outcome::Ok, Some(yields)) = (outcome, &traffic.yields) {
            match answer::member(&connection.body, &yields.member) {
                Some(code) => {
                    created(&mut self.rings, self.scenario, &mut self.ledger, number, &flight, &code, done_ns)
                }
                None => outcome = Outcome::WrongBody,
            }
        }
        let connection = &mut self.connections[place.index as usize];
        connection.body.clear();
        let over = !head.keep_alive || (connection.requests_left == 0 && connection.flights.is_empty());
        if let (Some(ledger), Some(id)) = (&mut self.ledger, flight.id) {
            ledger.received(id, done_ns, head.status, head.location_right);
        }
        self.finish(number, &flight, head, outcome, done_ns);
        if over {
            self.close(place, Outcome::ClosedEarly, Connected::Closed);
            self.grow(number);
        } else {
            self.offer(place);
        }
        !over
    }

    // ---- the end

    /// What has not ended by now is known to take at least as long as it has.
    fn end(mut self) -> anyhow::Result<Ended> {
        for index in 0..self.connections.len() {
            if self.connections[index].phase != Phase::Closed {
                let place = Place { index: index as u32, generation: self.connections[index].generation };
                self.close(place, Outcome::InFlightAtEnd, Connected::Closed);
            }
        }
        for number in 0..self.groups.len() {
            while let Some(waiting) = self.groups[number].queue.pop_front() {
                self.unsent(waiting, Outcome::Unsent);
            }
        }
        self.flush()?;
        self.recorder.finish(clock::now_ns());
        Ok(Ended { cpu_ns: clock::thread_cpu_ns() })
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
    let delay_ns = scenario.traffic.iter().find_map(|reader| match reader.pick {
        Pick::Fresh { from, delay_ns } if from == number => Some(delay_ns),
        _ => None,
    });
    if let (Some(delay_ns), Some(fresh)) = (delay_ns, Fresh::new(code.as_bytes(), flight.ordinal, done_ns)) {
        rings[number].created(fresh, done_ns + delay_ns);
    }
}
