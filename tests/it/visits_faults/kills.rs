//! `kill -9` under load, again and again, at moments that are known: what a client was told is stored, and stored once.
//!
//! In: how many kills (`WAYPOST_KILLS`, 10 by default), a seed (`WAYPOST_SEED`; drawn and shown by default). Out: a line for
//! each kill with its moment, their counts, what the judge says of the whole.
//! Never: a pause between a kill and the next start; a load that waits for the server.
//! At its limit: of each moment there are as many kills as [`plan`] says; one that comes too late for its moment is counted
//! as what it was, and tried again.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};
use waypost::domain::time;

use super::{Kept, Load, Stand, trace};
use crate::servers::proxy::{Mode, Side};
use crate::support::{LIMIT, Server, eventually, lines, throughout};

/// Requests a second, of which nine in ten are redirects.
const RATE: u32 = if cfg!(debug_assertions) { 300 } else { 3000 };

/// What the server did when it was killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Moment {
    /// It served under load: a visit may be anywhere between its ring and the store.
    Appending,
    /// Its log was at a system call.
    Log,
    /// A batch was begun and not committed.
    Transaction,
    /// A batch was committed and the server did not know it.
    Commit,
    /// It had been started again and served nobody yet, with rings and segments of earlier starts waiting.
    Recovery,
}

/// The moments of `count` kills: of each at least a tenth, and one.
fn plan(count: usize, chance: &mut StdRng) -> Vec<Moment> {
    use Moment::{Appending, Commit, Log, Recovery, Transaction};
    let shares = [Appending, Transaction, Recovery, Commit, Log, Appending, Transaction, Recovery, Commit, Appending];
    let mut plan: Vec<Moment> = shares.iter().cycle().take(count).copied().collect();
    plan.shuffle(chance);
    plan
}

/// A stand under load whose server is killed.
struct Campaign {
    stand: Stand,
    load: Load,
    chance: StdRng,
    /// From a start to the first answer, the longest so far.
    start: Duration,
    killed: BTreeMap<Moment, usize>,
}

impl Campaign {
    fn begin(kept: Kept, count: usize, chance: StdRng) -> (Self, Server) {
        let stand = Stand::new(kept, "");
        let begun = time::monotonic();
        let server = stand.start();
        let start = time::monotonic().duration_since(begun);
        let load = stand.load(RATE, u32::try_from(count).unwrap() * 5 + 10);
        (Self { stand, load, chance, start, killed: BTreeMap::new() }, server)
    }

    fn started(&mut self) -> Server {
        let begun = time::monotonic();
        let server = self.stand.start();
        self.start = self.start.max(time::monotonic().duration_since(begun));
        server
    }

    fn below(&mut self, most: Duration) -> Duration {
        most.mul_f64(self.chance.random_range(0.0..1.0))
    }

    /// Counts a kill and tells of it.
    #[expect(clippy::print_stdout, reason = "the log of the kills is what is asked for")]
    fn note(&mut self, moment: Moment, how: &str) {
        *self.killed.entry(moment).or_default() += 1;
        let number: usize = self.killed.values().sum();
        let count = |folder: &std::path::Path, end: &str| {
            let names = std::fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().file_name());
            names.filter(|name| name.to_str().unwrap().ends_with(end)).count()
        };
        let epochs = count(self.stand.place.rings(), "");
        let segments = count(&self.stand.place.data().join("spool"), ".log");
        println!("kill {number}: {moment:?}, {how}; rings of {epochs} starts and {segments} segments lie there");
    }

    /// Kills a server at this moment, and starts it again.
    fn kill(&mut self, mut server: Server, moment: Moment) -> Server {
        assert!(!self.load.has_ended(), "the load has ended before the kills");
        let sent = self.load.sent();
        eventually(LIMIT, "the load goes on", || self.load.sent() > sent + 20);
        match moment {
            Moment::Appending => {
                let after = self.below(Duration::from_millis(900));
                throughout(after, || {});
                server.kill();
                self.note(moment, &format!("{after:?} after the load came"));
                self.started()
            }
            Moment::Recovery => {
                server.kill();
                for attempt in 1.. {
                    let (served, after) = self.kill_start(attempt);
                    if !served {
                        self.note(Moment::Recovery, &format!("{after:?} after the start"));
                        break;
                    }
                    self.note(Moment::Appending, "just when it served again");
                }
                self.started()
            }
            Moment::Log => {
                let (call, most) = *[("write", 40), ("fdatasync", 5)].choose(&mut self.chance).unwrap();
                self.kill_at(server, &trace::LOG, call, most, moment)
            }
            Moment::Transaction | Moment::Commit if self.stand.back.is_none() => {
                // Pages of a transaction are written, and locks and counters of the log are changed, in this order.
                let (call, most) = if moment == Moment::Transaction { ("pwrite64", 60) } else { ("fcntl", 60) };
                self.kill_at(server, &trace::WRITER, call, most, moment)
            }
            Moment::Transaction | Moment::Commit => {
                let copy: (Side, &[u8]) = (Side::Client, b"PGCOPY\n\xff\r\n\0");
                let inside = [copy, (Side::Server, b"COPY "), (Side::Client, b"COMMIT\0")];
                // CommandComplete (PostgreSQL manual, section 55.7).
                let after: [(Side, &[u8]); 1] = [(Side::Server, b"C\0\0\0\x0bCOMMIT\0")];
                let parts = if moment == Moment::Transaction { &inside[..] } else { &after[..] };
                let (side, part) = *parts.choose(&mut self.chance).unwrap();
                let proxy = &self.stand.back().proxy;
                let held = proxy.held();
                proxy.mode(Mode::HoldAt(side, part.to_vec()));
                eventually(LIMIT, "a batch comes", || proxy.held() > held || server.has_ended());
                server.kill();
                let what = format!("{side:?} said {:?}", String::from_utf8_lossy(part));
                // What was under way never arrives, or at once, or when there is another server.
                match self.chance.random_range(0..3) {
                    0 => {
                        self.stand.back().proxy.cut();
                        self.stand.back().proxy.release();
                        self.note(moment, &format!("{what}, and it was lost"));
                        self.started()
                    }
                    1 => {
                        self.stand.back().proxy.release();
                        self.note(moment, &format!("{what}, and it arrived"));
                        self.started()
                    }
                    _ => {
                        self.note(moment, &format!("{what}, and it arrived after the next start"));
                        let server = self.started();
                        let later = self.below(Duration::from_millis(500));
                        throughout(later, || {});
                        self.stand.back().proxy.release();
                        server
                    }
                }
            }
        }
    }

    /// Starts the server and kills it, at a random moment of what a start takes; whether it served by then.
    fn kill_start(&mut self, attempt: u32) -> (bool, Duration) {
        let after = self.below(self.start / attempt);
        let mut child = self.stand.serve().stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let said = lines(child.stdout.take().unwrap());
        let served = said.recv_timeout(after).is_ok_and(|line| line.contains("listens on"));
        child.kill().unwrap();
        child.wait().unwrap();
        (served, after)
    }

    /// Kills the server when a thread of it makes a certain call.
    fn kill_at(&mut self, mut server: Server, threads: &[&str], call: &str, most: u32, moment: Moment) -> Server {
        if !trace::possible() {
            return self.kill(server, Moment::Appending);
        }
        let number = self.chance.random_range(1..=most);
        let tracer = trace::tamper(&server, threads, &[], &[&format!("{call}:signal=SIGKILL:when={number}")]);
        let begun = time::monotonic();
        eventually(2 * LIMIT, "it is killed, or makes no such call", || {
            server.has_ended() || time::monotonic().duration_since(begun) > LIMIT
        });
        let how = format!("{threads:?} made the {call} number {number}");
        if server.has_ended() {
            self.note(moment, &how);
        } else {
            self.note(Moment::Appending, &format!("not yet: {how}"));
        }
        server.kill();
        drop(tracer);
        self.started()
    }
}

#[expect(clippy::print_stdout, reason = "the log of the kills is what is asked for")]
fn check(kept: Kept) {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let count = usize::try_from(number("WAYPOST_KILLS").unwrap_or(10)).unwrap();
    let seed = number("WAYPOST_SEED").unwrap_or_else(rand::random);
    println!("{count} kills over {kept:?}; again by WAYPOST_SEED={seed}");
    let mut chance = StdRng::seed_from_u64(seed);
    let plan = plan(count, &mut chance);
    let (mut campaign, mut server) = Campaign::begin(kept, count, chance);
    for moment in plan {
        server = campaign.kill(server, moment);
    }
    let Campaign { stand, load, killed, .. } = campaign;
    println!("kills: {killed:?}");
    let moments = if trace::possible() { 5 } else { 3 };
    let enough = killed.values().filter(|kills| **kills * 20 >= count).count();
    assert!(enough >= moments, "a twentieth of each: {killed:?}");
    let ledger = load.stop();
    let rings = std::fs::read_dir(stand.place.rings()).unwrap().count();
    assert_eq!(rings, 1, "rings of a start that was killed stay for ever");
    let judged = stand.judge(&server, &ledger);
    judged.right();
    println!("{:#}", judged.said);
}

#[test]
fn embedded() {
    check(Kept::Embedded);
}

#[test]
fn postgres() {
    check(Kept::Postgres);
}
