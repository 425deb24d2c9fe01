//! Visits when things break: the real server under the load of loadgen, one fault at a time, judged by loadgen's ledger.
//!
//! In: a store, a load, a fault and its end. Out: [`Judged`]: no redirect that a client received is lost, none is there
//! twice, what is there too often was in flight at a kill, and the figures of accounting, rows and rollups are one.
//! Never: tells a server of a fault; takes its word for what was answered.
//! At the limit: whatever is pending must be stored within [`SETTLED`] of the fault's end, else the test fails and shows the
//! server's log.
//!
//! Each test is a campaign: a [`Stand`], a server, a [`Load`] with a ledger, a fault, its end, [`Stand::judge`].

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use waypost::domain::time;

use crate::loadgen::{self, Ran, Running};
use crate::servers::port;
use crate::servers::postgres::{Database, Postgres, ROLE};
use crate::servers::proxy::Proxy;
use crate::support::{LIMIT, Server, eventually, throughout};
use crate::warm::Place;

mod calls;
mod clock;
mod disk;
mod folders;
mod kills;
mod sink;
mod trace;

/// From the end of a fault until all that was pending is stored, on a machine that does other things.
const SETTLED: Duration = Duration::from_secs(60);

/// Of a statement, which is a fifth of what a batch's step may take: a test of silence waits for that. What a look-up may
/// take has no part in any claim here.
const TIMEOUTS: &str = "statement_timeout = \"1s\"\nlookup_timeout = \"2s\"\n";

/// What a core answered may stand in no figure of the store for as long: until the next batch, and its way.
const UNHEARD: Duration = Duration::from_millis(1500);

/// The id of requests that stand in no ledger.
const OURS: &str = "ours";
const OURS_HEADER: (&str, &str) = ("X-Request-Id", OURS);

/// Whose visits are tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    Embedded,
    Postgres,
}

/// Postgres, and the way on which visits reach it: look-ups and creates go past the proxy.
#[derive(Debug)]
struct Back {
    proxy: Proxy,
    database: Database,
    /// None: the one that all tests share.
    own: Option<Postgres>,
}

/// A folder, a store and a port: what a server finds again when it is started again.
struct Stand {
    place: Place,
    back: Option<Back>,
    port: u16,
}

/// The configuration that every server of a stand has: ids of requests are believed, and visits reach Postgres by the proxy.
fn configuration(back: Option<&Back>, more: &str) -> String {
    let store = back.map_or(String::new(), |Back { proxy, database, .. }| {
        let (url, owner, direct) = (database.url(), database.owner_url(), database.url_at(proxy.address().port()));
        format!("[postgres]\nurl = \"{url}\"\ndirect_url = \"{direct}\"\nmigrate_url = \"{owner}\"\n{TIMEOUTS}")
    });
    format!("[proxies]\ntrusted = [\"127.0.0.0/8\"]\n[breaker]\nrecovery = \"2s\"\n{more}\n{store}")
}

impl Stand {
    fn new(kept: Kept, more: &str) -> Self {
        match kept {
            Kept::Embedded => Self::on(None, more),
            Kept::Postgres => Self::on(Some(Postgres::shared()), more),
        }
    }

    /// With a cluster that the test may break.
    fn breakable(more: &str) -> Self {
        let own = Postgres::own();
        let mut this = Self::on(Some(&own), more);
        this.back.as_mut().unwrap().own = Some(own);
        this
    }

    fn on(postgres: Option<&Postgres>, more: &str) -> Self {
        let back = postgres.map(|postgres| {
            let proxy = Proxy::start(SocketAddr::from(([127, 0, 0, 1], postgres.port())));
            Back { proxy, database: postgres.database(), own: None }
        });
        let place = Place::new(&configuration(back.as_ref(), more));
        if back.is_some() {
            place.ok(&["migrate", "--grants", ROLE]);
            let key = place.ok(&["key", "create", "--scope", "admin"]);
            std::fs::create_dir_all(place.data()).unwrap();
            std::fs::write(place.data().join("admin.key"), &key).unwrap();
        }
        Self { place, back, port: port() }
    }

    fn back(&self) -> &Back {
        self.back.as_ref().unwrap()
    }

    fn postgres(&mut self) -> &mut Postgres {
        self.back.as_mut().unwrap().own.as_mut().unwrap()
    }

    fn folder(&self) -> PathBuf {
        self.place.data().parent().unwrap().to_owned()
    }

    fn configure(&self, more: &str) {
        let text = configuration(self.back.as_ref(), more);
        std::fs::write(self.folder().join("waypost.toml"), text).unwrap();
    }

    /// `waypost serve` at the stand's port, which is its own for as long as the stand is there.
    fn serve(&self) -> Command {
        self.place.command(&["serve", "--listen", &format!("127.0.0.1:{}", self.port)])
    }

    fn start(&self) -> Server {
        Server::spawn(self.serve(), &self.place.data())
    }

    /// Begins a load that is there for `seconds`, unless it is stopped; returns when its redirects are answered.
    fn load(&self, rate: u32, seconds: u32) -> Load {
        let folder = self.folder();
        let ledger = folder.join("run.ledger");
        let _ = std::fs::remove_file(&ledger);
        let changes = format!(
            "peak={rate} warmup=100ms links.existing.count=200 phase.1.for=100ms phase.2.for=100ms phase.3.for={seconds}s \
             phase.4.for=100ms drain=6s"
        );
        let target = format!("http://127.0.0.1:{}", self.port);
        let key = self.place.data().join("admin.key");
        let mut arguments = loadgen::run("mail-blast", &target, &changes);
        arguments.extend(["--ledger", "run.ledger", "--key-file", key.to_str().unwrap()]);
        let mut running = loadgen::start(&folder, arguments);
        eventually(3 * LIMIT, "the load begins", || size(&ledger) > 20_000 || running.has_ended());
        assert!(size(&ledger) > 20_000, "{:#?}", running.ends());
        Load { running, ledger }
    }

    /// The first cell that the store of visits has for this.
    fn sql(&self, sql: &str) -> u64 {
        let said = match &self.back {
            Some(back) => back.database.sql(sql),
            None => {
                let visits = rusqlite::Connection::open(self.place.data().join("visits.db")).unwrap();
                visits.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap().to_string()
            }
        };
        said.parse().unwrap_or_else(|_| panic!("{sql}: {said:?}"))
    }

    /// Waits until nothing is pending; the account by then.
    #[track_caller]
    fn settle(&self, server: &Server) -> Account {
        let begun = time::monotonic();
        let mut before = None;
        loop {
            // What a core has answered last may not be in any figure yet.
            let account = (server.metric("waypost_visits_pending", &[]) == 0.0).then(|| Account::of(server));
            let account = account.filter(|account| account.pending == 0);
            if let Some(account) = account.as_ref().filter(|_| account == before) {
                return account.clone();
            }
            let late = time::monotonic().duration_since(begun) > SETTLED;
            assert!(!late, "not settled: {:?}", Account::of(server));
            before = account;
            throughout(UNHEARD, || {});
        }
    }

    /// Waits until nothing is pending, and compares all that there is: the ledger with the exports, the account with
    /// rows, rollups and positions.
    #[track_caller]
    fn judge(&self, server: &Server, ledger: &Path) -> Judged {
        let account = self.settle(server);
        let folder = self.folder();
        for (file, arguments) in
            [("visits.ndjson", &["export", "--visits", "--format", "ndjson"][..]), ("links.csv", &["export"])]
        {
            let mut command = self.place.command(arguments);
            if self.back.is_some() {
                // What is judged is what is there, not how soon a busy machine finds it.
                command.env("WAYPOST_POSTGRES__STATEMENT_TIMEOUT", "60s");
            }
            let exported = command.stderr(Stdio::piped()).output().unwrap();
            assert!(exported.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&exported.stderr));
            std::fs::write(folder.join(file), exported.stdout).unwrap();
        }
        let ledger = ledger.to_str().unwrap();
        let arguments = ["verify", ledger, "--visits", "visits.ndjson", "--links", "links.csv", "--max", "5", "--json"];
        let ran = loadgen::start(&folder, arguments).ends();
        let said: Value = serde_json::from_str(&ran.out).unwrap_or_else(|error| panic!("{error}: {ran:#?}"));
        assert_eq!(account.answered, account.stored + account.dropped(), "{account:?}");
        let sums = self.sums();
        assert_eq!(sums.rows, account.stored, "rows of visits, and stored by the account: {sums:?} {account:?}");
        assert!(sums.agree(), "I7: {sums:?} {account:?}");
        let visits = std::fs::read_to_string(folder.join("visits.ndjson")).unwrap();
        let visits = visits.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let ours = visits.filter(|visit| visit["request_id"] == OURS).count();
        Judged { said, account, ours: ours as u64 }
    }

    /// What the store of visits adds up to.
    fn sums(&self) -> Sums {
        let all = "coalesce(sum(clicks + tools + bots + heads + prefetches), 0)";
        Sums {
            rows: self.sql("SELECT count(*) FROM visits"),
            totals: self.sql(&format!("SELECT {all} FROM link_totals")),
            days: self.sql(&format!("SELECT {all} FROM link_days")),
            positions: self.sql("SELECT coalesce(sum(stored), 0) FROM spool_positions"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sums {
    rows: u64,
    totals: u64,
    days: u64,
    positions: u64,
}

impl Sums {
    fn agree(&self) -> bool {
        [self.totals, self.days, self.positions].iter().all(|sum| *sum == self.rows)
    }
}

fn size(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.size())
}

/// loadgen, writing its ledger.
struct Load {
    running: Running,
    ledger: PathBuf,
}

impl Load {
    fn has_ended(&mut self) -> bool {
        self.running.has_ended()
    }

    /// Requests that were sent so far, about.
    fn sent(&self) -> u64 {
        // Two lines a request, of some 90 bytes.
        size(&self.ledger) / 180
    }

    /// Runs to its end.
    fn ends(self) -> PathBuf {
        let ran = self.running.ends();
        assert!(matches!(ran.code, Some(0 | 1 | 3 | 99)), "{ran:#?}");
        self.ledger
    }

    /// Ends now, which is what a ^C does; what is in flight is not waited for.
    fn stop(mut self) -> PathBuf {
        if !self.running.has_ended() {
            self.running.signal(Signal::INT);
        }
        let Ran { code, err, .. } = self.running.ends();
        assert!(matches!(code, Some(0 | 1 | 3 | 99 | 130)), "{code:?}: {err}");
        self.ledger
    }
}

/// Sums over all instances, as `GET /api/v1/accounting` has them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Account {
    answered: u64,
    stored: u64,
    pending: u64,
    drops: BTreeMap<String, u64>,
}

impl Account {
    fn of(server: &Server) -> Self {
        let bearer = format!("Bearer {}", server.admin_key());
        let answer = server.connect().ask("GET", "/api/v1/accounting", &[("Authorization", &bearer)], b"");
        assert_eq!(answer.status, 200, "{answer:?}");
        let all = &answer.json()["all"];
        let figure = |name: &str| all[name].as_u64().unwrap_or_else(|| panic!("no {name}: {answer:?}"));
        let drops = all["dropped"].as_object().unwrap().iter();
        let drops = drops.map(|(reason, count)| (reason.clone(), count.as_u64().unwrap())).filter(|(_, n)| *n > 0);
        Self {
            answered: figure("answered"),
            stored: figure("stored"),
            pending: figure("pending"),
            drops: drops.collect(),
        }
    }

    fn dropped(&self) -> u64 {
        self.drops.values().sum()
    }
}

/// What was found.
#[derive(Debug)]
struct Judged {
    /// As `loadgen verify --json` has it.
    said: Value,
    account: Account,
    /// Visits of requests that we made ourselves, with [`OURS`].
    ours: u64,
}

impl Judged {
    fn of(&self, part: &str, name: &str) -> u64 {
        self.said[part][name].as_u64().unwrap_or_else(|| panic!("no {part}.{name}: {}", self.said))
    }

    /// How often this is wrong.
    fn wrong(&self, what: &str) -> u64 {
        let groups = self.said["wrong"].as_array().unwrap().iter();
        groups.filter(|group| group["wrong"] == what).map(|group| group["count"].as_u64().unwrap()).sum()
    }

    /// Visits of requests whose answer did not come whole.
    fn explained(&self) -> u64 {
        self.of("visits", "explained")
    }

    /// I4, I5: nothing lost, nothing twice, and nothing was given up.
    #[track_caller]
    fn right(&self) -> &Self {
        assert_eq!(self.said["wrong"], serde_json::json!([]), "{self:#?}");
        assert_eq!(self.account.dropped(), 0, "{self:#?}");
        // A judge that sees nothing finds nothing.
        assert!(self.of("requests", "redirects") > 100, "{self:#?}");
        self.is_shown();
        self
    }

    /// I6 where nobody was killed: what is stored was received.
    #[track_caller]
    fn nothing_in_flight(&self) {
        assert_eq!(self.explained(), 0, "{self:#?}");
    }

    /// I7: what was given up, for these reasons alone, is what is missing, to the visit. `others`: redirects that we received
    /// ourselves.
    #[track_caller]
    fn lost_exactly(&self, reasons: &[&str], others: u64) {
        let drops = &self.account.drops;
        assert!(!drops.is_empty() && drops.keys().all(|reason| reasons.contains(&reason.as_str())), "{self:#?}");
        // A visit of a request whose answer did not come may be among those that were given up.
        let missing = self.wrong("missing") + others - self.ours;
        let dropped = self.account.dropped();
        let unanswered = self.of("requests", "unanswered") - self.explained();
        assert!(missing <= dropped && dropped <= missing + unanswered, "{missing} missing: {self:#?}");
        let others = self.said["wrong"].as_array().unwrap().iter().filter(|group| group["wrong"] != "missing");
        assert_eq!(others.count(), 0, "{self:#?}");
        self.is_shown();
    }

    #[expect(clippy::print_stdout, reason = "figures are for people")]
    fn is_shown(&self) {
        println!(
            "{} redirects received, {} visits of them, {} explained of {} not fully received; {:?}",
            self.of("requests", "redirects"),
            self.of("visits", "of_this_run"),
            self.explained(),
            self.of("requests", "unanswered"),
            self.account
        );
    }
}

fn pending(server: &Server) -> f64 {
    server.metric("waypost_visits_pending", &[])
}

fn stored(server: &Server) -> f64 {
    server.metric("waypost_visits_stored_total", &[])
}

fn dropped(server: &Server, reason: &str) -> f64 {
    server.metric("waypost_visits_dropped_total", &[&format!("reason=\"{reason}\"")])
}

/// What `/readyz` says is not well.
fn degraded(server: &Server) -> Vec<String> {
    let names = |value: &Value| value.as_str().unwrap().to_owned();
    server.get("/readyz").json()["degraded"].as_array().unwrap().iter().map(names).collect()
}

/// A link in memory is redirected whatever happens to its visits. This is a visit of no ledger.
#[track_caller]
fn redirects(server: &Server) {
    assert_eq!(server.connect().ask("GET", "/spring26", &[OURS_HEADER], b"").status, 307);
}

#[expect(clippy::print_stdout, reason = "a test that leaves something out says so, loudly")]
fn left_out(why: &str) {
    println!("LEFT OUT: {why}");
}
