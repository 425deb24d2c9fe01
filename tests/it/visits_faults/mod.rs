//! Visits when things break: the real server under the load of loadgen, one fault at a time, judged by loadgen's ledger.
//!
//! In: a store, a load, a fault and its end. Out: what `campaign` judges.
//! Never: tells a server of a fault.
//!
//! Each test is a campaign: a [`Stand`], a server, a [`Load`] with a ledger, a fault, its end, [`Stand::judge`].

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::campaign::{Account, Judged, Load, OURS, Sums};
use crate::servers::port;
use crate::servers::postgres::{Database, Postgres, ROLE};
use crate::servers::proxy::Proxy;
use crate::support::Server;
use crate::warm::Place;

mod calls;
mod clock;
mod disk;
mod folders;
mod kills;
mod rollups;
mod sink;
mod trace;

/// Of a statement, which is a fifth of what a batch's step may take: a test of silence waits for that. What a look-up may
/// take has no part in any claim here.
const TIMEOUTS: &str = "statement_timeout = \"1s\"\nlookup_timeout = \"2s\"\n";

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
        let (target, key) = (format!("http://127.0.0.1:{}", self.port), self.place.data().join("admin.key"));
        Load::begin(&self.folder(), &target, &key, rate, seconds)
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
        Account::settled(&[server])
    }

    /// Waits until nothing is pending, and compares all that there is.
    #[track_caller]
    fn judge(&self, server: &Server, ledger: &Path) -> Judged {
        let account = self.settle(server);
        let export = |arguments: &[&str]| {
            let mut command = self.place.command(arguments);
            if self.back.is_some() {
                // What is judged is what is there, not how soon a busy machine finds it.
                command.env("WAYPOST_POSTGRES__STATEMENT_TIMEOUT", "60s");
            }
            command
        };
        Judged::judge(&self.folder(), ledger, export, account, Sums::of(|sql| self.sql(sql)))
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
