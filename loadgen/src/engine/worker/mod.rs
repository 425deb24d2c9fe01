//! A worker: one thread, one epoll, its share of the plan. One turn of [`Worker::run`] is the whole engine:
//!
//! 1. arrivals that are due are taken out of the plan and put on a connection, or into their group's queue;
//! 2. clients of closed loops that have thought enough ask again;
//! 3. what was staged goes into the ledger, and only then to the kernel;
//! 4. what has waited longer than the time-out ends;
//! 5. the second's measurements are given away when it is over;
//! 6. sleep until the next instant of 1, 2, 4 or 5, or an event;
//! 7. events: connections that opened, answers, ends.

mod answers;
mod connections;
mod requests;

use std::io;
use std::iter::Peekable;
use std::sync::atomic::Ordering::Relaxed;

use rustix::event::Timespec;
use rustix::event::epoll;
use rustix::fd::OwnedFd;

use crate::clock;
use crate::engine::address::Addresses;
use crate::engine::connection::{Connection, Phase, Place};
use crate::engine::fresh::Ring;
use crate::engine::group::{Clients, Group, Waiting};
use crate::engine::http;
use crate::engine::template::Template;
use crate::engine::{Defect, Job, Spin};
use crate::ledger::write::Writer;
use crate::measure::recorder::Recorder;
use crate::measure::{Connected, Outcome};
use crate::plan::arrivals::Arrivals;
use crate::plan::pick::Picker;
use crate::plan::{Arrival, Segment};
use crate::scenario::{Scenario, WhenFull};

/// Most bytes of an answer that one read takes: those of 100 redirects.
const READ_BYTES: usize = 64 << 10;
/// Events of one wake-up; more come with the next.
const EVENTS: usize = 512;
/// The last part of a wait, which [`Spin::Auto`] polls away: a sleeper comes back some 25 µs late (half of the time; 70 one
/// time in a hundred). A share of it at most, so that the core is left to others for the rest however often it wakes up.
const POLLED_NS: u64 = 50_000;
const POLLED_SHARE: u64 = 2;
/// A wait that is shorter found what it waited for when it began.
const AT_ONCE_NS: u64 = 5_000;
const SECOND_NS: u64 = 1_000_000_000;
/// How long a run that was stopped waits for answers: somebody waits for it.
const STOPPED_NS: u64 = 200_000_000;
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
                give_up_ns = give_up_ns.min(clock::now_ns() + STOPPED_NS);
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
                give_up_ns,
            ];
            let next_ns = due_ns.into_iter().min().unwrap_or(give_up_ns);

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
