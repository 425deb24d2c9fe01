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
use std::iter::Peekable;
use std::sync::atomic::Ordering::Relaxed;

use rustix::event::Timespec;
use rustix::event::epoll;
use rustix::fd::OwnedFd;

use super::address::{self, Addresses, Failure};
use super::answer;
use super::connection::{Connection, Flight, Head, Phase, Place};
use super::fresh::{CODE_MAX, Fresh, Ring};
use super::group::{Clients, Group, Waiting};
use super::http::{self, Step};
use super::template::{self, Template};
use super::{Defect, Job, Spin};
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
/// A wait that is shorter found what it waited for when it began.
const AT_ONCE_NS: u64 = 5_000;
const SECOND_NS: u64 = 1_000_000_000;
/// Reads of one connection in one turn: a body without an end keeps nobody else waiting.
const READS: usize = 8;
/// The pause of a closed loop's client that met no answer: a server that refuses would be asked without any.
const PAUSE_NS: u64 = 1_000_000;
/// Arrivals of one turn.
const ARRIVALS: usize = 64;
/// How often time-outs are looked for, at least and at most: a sweep of 8,000 connections takes about 40 µs.
const SWEEP_NS: (u64, u64) = (1_000_000, 50_000_000);

/// How the turns of a worker ended.
enum Over {
    AsPlanned,
    Stopped,
}

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
    /// Connections that had more to read than one turn takes, and whether the server has closed them.
    unfinished: Vec<(Place, bool)>,
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
            unfinished: Vec::new(),
            in_flight: 0,
            segment: 0,
            scratch: vec![0; http::HEAD_MAX + READ_BYTES],
            code: Vec::with_capacity(256),
            target: Vec::with_capacity(256),
            woken_ns: 0,
            stale_ns: 0,
        })
    }

    /// From before the origin to the last answer. Whatever ends it, what was measured until then is given away.
    pub(super) fn run(mut self) -> anyhow::Result<()> {
        self.open_pools();
        let mut arrivals = Arrivals::new(self.scenario, self.number, self.job.workers).peekable();
        let turned = self.turns(&mut arrivals);
        // A worker that was too slow for its plan says so: these came too late to be sent at all.
        while let Some(arrival) = arrivals.next().filter(|_| matches!(turned, Ok(Over::AsPlanned))) {
            let waiting = Waiting { arrival, intended_ns: self.origin_ns + arrival.at_ns, picked_ns: self.now_ns() };
            self.recorder.arrived(arrival.segment, arrival.traffic, waiting.intended_ns, waiting.picked_ns);
            self.recorder.left(arrival.segment, arrival.traffic, waiting.intended_ns, waiting.picked_ns);
            self.unsent(waiting, Outcome::Unsent);
        }
        self.end(turned.map(|_| ()))
    }

    fn turns(&mut self, arrivals: &mut Peekable<Arrivals<'_>>) -> anyhow::Result<Over> {
        let mut stopped = false;
        let mut events: Vec<epoll::Event> = Vec::with_capacity(EVENTS);
        let last_ns = self.origin_ns + self.scenario.length_ns();
        let mut heard = 0;
        let mut give_up_ns = last_ns + self.scenario.run.drain_ns;
        let sweep_ns = (self.scenario.run.timeout_ns / 100).clamp(SWEEP_NS.0, SWEEP_NS.1);
        let (mut wanted_ns, mut slept_ns, mut turn_ns) = (u64::MAX, 0, clock::now_ns());
        let mut sweep_at_ns = turn_ns + sweep_ns;

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
            // Where a wake-up brought as many events as it can, answers may still lie in the kernel.
            if now_ns >= sweep_at_ns && heard < EVENTS {
                self.sweep(now_ns);
                sweep_at_ns = now_ns + sweep_ns;
            }
            let queued = self.groups.iter().map(|group| group.queue.len()).sum::<usize>();
            let open = self.connections.len() - self.free.len();
            self.recorder.tick(now_ns, self.in_flight, queued, open);

            let arrived = stopped || arrivals.peek().is_none();
            if (over && arrived && self.in_flight + queued == 0) || now_ns >= give_up_ns {
                return Ok(if stopped { Over::Stopped } else { Over::AsPlanned });
            }
            let since_ns = now_ns.saturating_sub(self.origin_ns);
            let due_ns = [
                arrivals.peek().filter(|_| !stopped).map_or(u64::MAX, |arrival| self.origin_ns + arrival.at_ns),
                self.groups.iter().filter_map(|group| group.clients.due_ns.front().copied()).min().unwrap_or(u64::MAX),
                // Closed loops begin and end with their phases.
                if over { u64::MAX } else { self.origin_ns + self.segments[self.segment].to_ns },
                if now_ns < self.origin_ns {
                    self.origin_ns
                } else {
                    self.origin_ns + since_ns.next_multiple_of(SECOND_NS)
                },
                if self.unfinished.is_empty() { u64::MAX } else { now_ns },
                sweep_at_ns,
            ];
            let next_ns = due_ns.into_iter().min().unwrap_or(sweep_at_ns);

            let asleep_ns = clock::now_ns();
            let busy_ns = asleep_ns - turn_ns;
            if asleep_ns >= self.origin_ns {
                let late_ns = turn_ns.saturating_sub(wanted_ns).max(busy_ns);
                self.recorder.turn(busy_ns, slept_ns, late_ns);
            }
            self.stale_ns = asleep_ns;
            wanted_ns = self.wait(&mut events, next_ns, asleep_ns)?;
            let woken_ns = clock::now_ns();
            slept_ns = woken_ns - asleep_ns;
            // What is there at once may have come at any time since the sockets were last looked at.
            self.woken_ns = if slept_ns < AT_ONCE_NS { turn_ns } else { woken_ns };
            turn_ns = woken_ns;
            heard = events.len();
            let unfinished = std::mem::take(&mut self.unfinished);
            for event in events.drain(..) {
                self.handle(Place::unpack(event.data.u64()), event.flags);
            }
            for (place, closing) in unfinished {
                self.heard(place, closing);
            }
        }
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
    fn close(&mut self, place: Place, outcome: Outcome, why: Connected) {
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
        self.think(usize::from(arrival.traffic), done_ns, false);
    }

    /// Ends a request that was on a connection; `status` is 0 where no answer came.
    fn finish(&mut self, number: usize, flight: &Flight, status: u16, outcome: Outcome, done_ns: u64) {
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
    fn think(&mut self, number: usize, now_ns: u64, answered: bool) {
        if let Some(closed) = self.scenario.traffic[number].closed {
            let pause_ns = if answered { closed.think_ns } else { closed.think_ns.max(PAUSE_NS) };
            self.groups[number].clients.due_ns.push_back(now_ns + pause_ns);
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
    fn give_up(&mut self, place: Place, until_ns: u64) {
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
    fn heard(&mut self, place: Place, closing: bool) {
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
    fn read(&mut self, place: Place, closing: bool) {
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

    /// Reads answers out of `bytes`; false when the connection is over.
    fn take(&mut self, place: Place, bytes: &[u8], done_ns: u64) -> bool {
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
    fn answered(&mut self, place: Place, flight: &Flight, done_ns: u64) {
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

    // ---- the end

    /// What has not ended by now is known to take at least as long as it has.
    fn end(mut self, turned: anyhow::Result<()>) -> anyhow::Result<()> {
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
        let ended = turned.and_then(|()| self.flush());
        self.recorder.finish(clock::now_ns());
        ended
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
