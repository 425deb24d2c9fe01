//! All servers of a campaign, and how each fault begins and ends.
//!
//! In: events. Out: spans of time in which something was away, which is all that may excuse a client's failure.
//! Never: tells an instance of a fault; ends a fault and leaves a part of it.
//! At the limit: full service is back within [`RECOVERY`] of the last end of a round, else the campaign has failed.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;
use waypost::domain::time::{self, UnixMillis};

use super::plan::{Event, Fault};
use super::watch::{self, Outcome};
use crate::fleet::{CONFIG, Fleet};
use crate::servers::READY;
use crate::servers::deployment::Way;
use crate::servers::haproxy::Haproxy;
use crate::servers::postgres::{Postgres, psql};
use crate::servers::proxy::{Mode, Proxy};
use crate::servers::redis::Redis;
use crate::support::{Server, eventually};

/// I11.
const RECOVERY: Duration = Duration::from_secs(10);
/// How late an edit may show where nothing is broken (I3).
const STALE_MAX: Duration = Duration::from_secs(2);
/// CommandComplete (PostgreSQL manual, section 55.7).
const COMMITTED: &[u8] = b"C\0\0\0\x0bCOMMIT\0";
const WORKERS: usize = 2;

/// From a moment to a moment.
pub(super) type Span = (UnixMillis, UnixMillis);

/// What may excuse a failure.
#[derive(Debug, Default)]
pub(super) struct Diary {
    /// Instances that were killed, stopped or frozen.
    pub(super) down: Vec<(usize, Span)>,
    /// Instances that were started while they could not reach Postgres: nobody promises that they know every link.
    pub(super) without_store: Vec<(usize, Span)>,
    /// From what the standby had for certain until it was the primary: what was acknowledged in between may be lost.
    pub(super) lost: Vec<Span>,
}

pub(super) struct Stand {
    pub(super) fleet: Fleet,
    pub(super) haproxy: Haproxy,
    pub(super) diary: Diary,
    primary: Postgres,
    standby: Postgres,
    /// The address that instances know, which leads to the primary.
    way: Proxy,
    redis: Redis,
    workers: usize,
    /// An instance of a copied data folder.
    copy: Option<Server>,
    /// Commits are being lost: how many so far.
    losing: Option<u64>,
    /// Since when something that was begun lasts.
    since: Vec<(Fault, UnixMillis)>,
    /// A standby must be made.
    alone: bool,
    /// How often something was made that needs a name of its own.
    made: u32,
    /// What servers said that have ended.
    logs: Vec<(usize, Vec<String>)>,
}

fn config(redis: &Redis, workers: usize) -> String {
    let url = redis.url();
    format!("{CONFIG}[workers]\ncount = {workers}\n[shutdown]\ndrain = \"1500ms\"\n[redis]\nurl = \"{url}\"\n")
}

impl Stand {
    pub(super) fn new() -> Self {
        let (primary, redis) = (Postgres::own(), Redis::start());
        let way = Proxy::start(address(primary.port()));
        let rest = config(&redis, WORKERS).replacen(CONFIG, "", 1);
        let fleet = Fleet::on(&primary, Way::Through(way.address().port()), 3, &rest);
        let standby = primary.standby();
        let haproxy = Haproxy::start([0, 1, 2].map(|instance| address(fleet.port(instance))));
        let this = Self {
            fleet,
            haproxy,
            diary: Diary::default(),
            primary,
            standby,
            way,
            redis,
            workers: WORKERS,
            copy: None,
            losing: None,
            since: Vec::new(),
            alone: false,
            made: 0,
            logs: Vec::new(),
        };
        for (code, target) in watch::links() {
            this.fleet.server(0).custom(&code, &target);
            // So often that every memory of every instance has it.
            for server in this.fleet.servers() {
                (0..6).for_each(|_| assert_eq!(server.get(&format!("/{code}")).status, 307));
            }
        }
        this
    }

    pub(super) fn addresses(&self) -> [SocketAddr; 3] {
        [0, 1, 2].map(|instance| address(self.fleet.port(instance)))
    }

    /// The store, as the instances see it.
    pub(super) fn sql(&self, sql: &str) -> String {
        psql(&self.fleet.deployment.database.url_at(self.way.address().port()), sql)
    }

    /// What has to be done again and again while a fault lasts.
    pub(super) fn tick(&mut self) {
        if let Some(before) = self.losing
            && self.way.cuts() > before
        {
            self.losing = Some(self.way.cuts());
            self.way.mode(Mode::CutAt(COMMITTED.to_vec()));
        }
    }

    pub(super) fn begin(&mut self, event: Event) {
        let now = time::now();
        self.since.push((event.fault, now));
        let instance = event.instance;
        match event.fault {
            Fault::Kill | Fault::Workers | Fault::Replay => self.kill(instance),
            Fault::Stop => {
                let server = self.fleet.take(instance);
                self.logs.push((instance, server.stop()));
            }
            Fault::Freeze => self.fleet.server(instance).signal(Signal::STOP),
            Fault::Copy => {
                self.kill(instance);
                let name = self.name("copied");
                let copied = self.fleet.deployment.path(&name);
                let copy = Command::new("cp").arg("-a").args([&self.fleet.data(instance), &copied]).status().unwrap();
                assert!(copy.success());
                self.copy = Some(self.fleet.deployment.instance(&name));
            }
            Fault::KillAll => (0..3).for_each(|instance| self.kill(instance)),
            Fault::PostgresStop => self.primary.stop(),
            Fault::PostgresKill => self.primary.kill(),
            Fault::PostgresFreeze => self.primary.freeze(),
            Fault::PostgresSlow => self.way.mode(Mode::Delay(Duration::from_millis(400))),
            Fault::PostgresSilent => self.way.mode(Mode::Silent),
            Fault::PostgresCut => {
                self.way.mode(Mode::Refuse);
                self.way.cut();
            }
            Fault::CommitsLost => {
                self.losing = Some(self.way.cuts());
                self.way.mode(Mode::CutAt(COMMITTED.to_vec()));
            }
            Fault::ReadOnly => self.read_only("on"),
            Fault::Failover => {
                self.diary.lost.push((self.synced(), UnixMillis::NEVER));
                self.primary.kill();
            }
            Fault::LaggingFailover => {
                self.diary.lost.push((self.synced(), UnixMillis::NEVER));
                self.standby.sql("ALTER SYSTEM SET primary_conninfo TO ''");
                self.standby.sql("SELECT pg_reload_conf()");
                eventually(READY, "the standby gets nothing more", || {
                    self.standby.sql("SELECT count(*) FROM pg_stat_wal_receiver") == "0"
                });
            }
            Fault::RedisKill => self.redis.kill(),
            Fault::RedisFreeze => self.redis.freeze(),
            Fault::RedisFlush => assert_eq!(self.redis.cli(&["FLUSHALL"]), "OK"),
            Fault::RedisGarbage => self.garbage(),
            Fault::BothStores => {
                self.primary.kill();
                self.redis.kill();
            }
            Fault::Reload => self.haproxy.reload(&[]),
        }
    }

    pub(super) fn end(&mut self, event: Event) {
        let instance = event.instance;
        match event.fault {
            Fault::Kill | Fault::Stop => self.start(instance),
            Fault::Freeze => self.fleet.server(instance).signal(Signal::CONT),
            Fault::Workers => {
                self.workers = if self.workers == WORKERS { WORKERS / 2 } else { WORKERS };
                self.fleet.deployment.reconfigure(&config(&self.redis, self.workers));
                self.start(instance);
            }
            Fault::Copy => {
                self.start(instance);
                let copy = self.copy.take().unwrap();
                self.logs.push((instance, copy.stop()));
            }
            Fault::Replay => {
                self.replay(instance);
                self.start(instance);
            }
            Fault::KillAll => (0..3).for_each(|instance| self.start(instance)),
            Fault::PostgresStop | Fault::PostgresKill => self.primary.start(),
            Fault::PostgresFreeze => self.primary.thaw(),
            Fault::PostgresSlow | Fault::PostgresCut => self.way.mode(Mode::Pass),
            Fault::PostgresSilent => {
                // What was swallowed would be missing in the middle of a connection: no network does that.
                self.way.mode(Mode::Pass);
                self.way.cut();
            }
            Fault::CommitsLost => {
                self.losing = None;
                self.way.mode(Mode::Pass);
            }
            Fault::ReadOnly => self.read_only("off"),
            Fault::Failover => self.fail_over(),
            Fault::LaggingFailover => {
                self.primary.kill();
                self.fail_over();
            }
            Fault::RedisKill => self.redis.restart(),
            Fault::RedisFreeze => self.redis.thaw(),
            Fault::BothStores => {
                self.primary.start();
                self.redis.restart();
            }
            Fault::RedisFlush | Fault::RedisGarbage | Fault::Reload => {}
        }
        let place = self.since.iter().position(|(fault, _)| *fault == event.fault).unwrap();
        let span = (self.since.swap_remove(place).1, time::now());
        match event.fault {
            Fault::KillAll => self.diary.down.extend((0..3).map(|instance| (instance, span))),
            Fault::Kill | Fault::Stop | Fault::Freeze | Fault::Workers | Fault::Copy | Fault::Replay => {
                self.diary.down.push((instance, span));
            }
            _ => {}
        }
    }

    fn kill(&mut self, instance: usize) {
        let server = self.fleet.take(instance);
        self.logs.push((instance, server.log()));
        server.kill();
    }

    fn start(&mut self, instance: usize) {
        let begun = time::now();
        self.fleet.begin(instance);
        if self.since.iter().any(|(fault, _)| fault.is_of_postgres()) {
            self.diary.without_store.push((instance, (begun, UnixMillis::NEVER)));
        }
    }

    fn name(&mut self, what: &str) -> String {
        self.made += 1;
        format!("{what}-{}", self.made)
    }

    /// Stores the visits of an instance that is away. While Postgres is away this fails, and loses nothing.
    fn replay(&mut self, instance: usize) {
        let name = self.name("elsewhere");
        let elsewhere = self.fleet.deployment.path(&name);
        std::fs::create_dir(&elsewhere).unwrap();
        std::fs::copy(self.fleet.data(instance).join("admin.key"), elsewhere.join("admin.key")).unwrap();
        let spool = self.fleet.data(instance).join("spool");
        let mut replay = self.fleet.deployment.command(&["spool", "replay", spool.to_str().unwrap()]);
        let replayed = replay.arg("--data").arg(&elsewhere).output().unwrap();
        let is_reachable = !self.since.iter().any(|(fault, _)| fault.is_of_postgres());
        let said = String::from_utf8_lossy(&replayed.stderr);
        assert!(replayed.status.success() || !is_reachable, "spool replay: {said}");
    }

    fn read_only(&self, value: &str) {
        self.primary.sql(&format!("ALTER SYSTEM SET default_transaction_read_only = {value}"));
        self.primary.sql("SELECT pg_reload_conf()");
    }

    /// A moment by which the standby had all that was committed.
    fn synced(&self) -> UnixMillis {
        let by = time::now();
        let written = self.primary.sql("SELECT pg_current_wal_flush_lsn()");
        let has = format!("SELECT pg_last_wal_receive_lsn() >= '{written}'");
        eventually(READY, "the standby follows", || self.standby.sql(&has) == "t");
        by
    }

    /// The primary is gone for good.
    fn fail_over(&mut self) {
        self.standby.promote();
        self.diary.lost.last_mut().unwrap().1 = time::now();
        self.way.leads_to(address(self.standby.port()));
        self.way.cut();
        self.alone = true;
    }

    fn garbage(&self) {
        for (number, (code, _)) in watch::links().enumerate() {
            let key = format!("waypost:l:0:{code}");
            let values =
                ["", "x", "\u{1}\u{2}\u{3}\u{4}\u{5}\u{6}\u{7}\u{8}", "{\"url\": \"https://elsewhere.example\"}"];
            match values.get(number % 5) {
                Some(value) => drop(self.redis.cli(&["SET", &key, value])),
                None => {
                    self.redis.cli(&["DEL", &key]);
                    self.redis.cli(&["LPUSH", &key, "x"]);
                }
            }
        }
    }

    /// Full service within [`RECOVERY`] (I11): every instance is ready and has its store; on each a link can be made, which
    /// is right everywhere, as is one that all knew; an edit shows. How long that took.
    pub(super) fn serves(&mut self) -> Duration {
        let begun = time::monotonic();
        let took = || time::monotonic().duration_since(begun);
        let addresses = self.addresses();
        let get = |address, path: &str| watch::ask(address, "GET", path, &[], b"");
        let is = |outcome: &Outcome, wanted| matches!(outcome, Outcome::Answered { status, .. } if *status == wanted);
        let within = |what: &str, condition: &mut dyn FnMut() -> bool| {
            eventually(RECOVERY.saturating_sub(took()).max(Duration::from_millis(1)), what, condition);
        };
        let key = self.fleet.deployment.path("admin.key");
        let bearer = format!("Bearer {}", std::fs::read_to_string(key).unwrap().trim());
        let headers = [("Content-Type", "application/json"), ("Authorization", bearer.as_str())];
        let mut all: Vec<(String, String)> = watch::links().collect();
        for (instance, address) in addresses.into_iter().enumerate() {
            let ready = format!("instance-{instance} is ready, and has its store");
            within(&ready, &mut || is(&get(address, "/readyz?require=store"), 200));
            self.made += 1;
            let (code, target) = (format!("new-{}", self.made), format!("https://example.com/new/{}", self.made));
            let body = json!({"original_url": target, "custom_code": code}).to_string();
            within(&format!("a link is made by instance-{instance}"), &mut || {
                let outcome = watch::ask(address, "POST", "/shorten", &headers, body.as_bytes());
                // After a lost answer it is there.
                is(&outcome, 201) || is(&outcome, 409)
            });
            all.push((code, target));
        }
        for (code, target) in &all {
            for (instance, address) in addresses.into_iter().enumerate() {
                let right = format!("instance-{instance} answers {code}");
                within(&right, &mut || {
                    let outcome = get(address, &format!("/{code}"));
                    assert!(
                        watch::is_redirect(&outcome, target) || !is_final(&outcome),
                        "instance-{instance}, {code}: {outcome:?}"
                    );
                    watch::is_redirect(&outcome, target)
                });
            }
        }
        let (code, _) = &all[all.len() - 1];
        let edited = format!("https://example.com/edited/{}", self.made);
        within("a link is edited", &mut || {
            let edit = self.fleet.deployment.command(&["link", "edit", code, "--url", &edited]).output().unwrap();
            edit.status.success()
        });
        eventually(STALE_MAX, &format!("the edit of {code} shows"), || {
            addresses.iter().all(|address| watch::is_redirect(&get(*address, &format!("/{code}")), &edited))
        });
        let now = time::now();
        for (_, span) in &mut self.diary.without_store {
            span.1 = span.1.min(now);
        }
        took()
    }

    /// The primary has a standby again.
    pub(super) fn made_whole(&mut self) {
        if std::mem::take(&mut self.alone) {
            let standby = self.standby.standby();
            self.primary = std::mem::replace(&mut self.standby, standby);
        }
    }

    /// Every line that an instance has said.
    pub(super) fn lines(&self) -> impl Iterator<Item = (usize, String)> {
        let running = (0..3).map(|instance| (instance, self.fleet.server(instance).log()));
        let ended = self.logs.iter().cloned();
        ended.chain(running).flat_map(|(instance, log)| log.into_iter().map(move |line| (instance, line)))
    }
}

impl Drop for Stand {
    /// Those that run show their logs themselves.
    #[expect(clippy::print_stdout, reason = "a failed test tells what the servers said")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (instance, log) in &self.logs {
                println!("the log of instance-{instance}, which has ended:\n{}", log.join("\n"));
            }
            println!("HAProxy's log:\n{}", self.haproxy.log());
        }
    }
}

/// An answer that is no excuse: a redirect, or that there is no such link.
fn is_final(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Answered { status, .. } if *status < 500)
}

fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}
