//! Three instances on one Postgres, under load: what happens to one of them, or to what they share, loses nothing.
//!
//! In: instances, a load on one of them or on a balancer before them, a fault. Out: what `campaign` judges, and what the
//! clients saw.
//! Never: tells an instance of a fault.
//!
//! | what must be shown | where |
//! |---|---|
//! | Postgres and Redis both stopped, across a restart of an instance | `outage::both_stores_gone`; 60 s: `script/outage` |
//! | failover to a standby that lacks the last commits | `failover` |
//! | one of three killed, a rolling restart, behind HAProxy and nginx | `balancers` |
//! | from three to one and back, a copied folder, half the workers | `coming` |
//! | a black hole to Postgres, and to Redis | `network` |
//! | an edit on one of three, also while one is frozen | `edits` |
//! | a program of the version before beside this one | `versions` |
//! | all of it at once | `chaos`; longer: `script/chaos` |
//! | three instances against one, CPU per request | `script/bench-instances` |
//! | `max_visits`, exact across instances | `quotas` (outside of this folder) |

mod balancers;
mod chaos;
mod coming;
mod edits;
mod failover;
mod network;
mod outage;
mod versions;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::campaign::{Account, Judged, Load, Sums};
use crate::servers::deployment::{Deployment, Way};
use crate::servers::port;
use crate::servers::postgres::Postgres;
use crate::support::Server;

/// What every instance of a fleet has beside its store. Of the breaker only its rest is shorter than what is shipped, 10 s: on
/// a machine that does other things it opens when nobody is away, and then what a test waits for is longer than the test.
const CONFIG: &str = "[proxies]\ntrusted = [\"127.0.0.0/8\"]\n[breaker]\nrecovery = \"2s\"\n";

/// Instances of one database. Each has a name, a data folder and a port that stay its own whether it runs or not.
pub(crate) struct Fleet {
    pub(crate) deployment: Deployment,
    members: Vec<Member>,
}

struct Member {
    name: String,
    port: u16,
    server: Option<Server>,
}

impl Fleet {
    /// Starts `count` instances. `config` is what all of them have beside the store and [`CONFIG`].
    pub(crate) fn start(count: usize, config: &str) -> Self {
        Self::on(Postgres::shared(), Way::Straight, count, config)
    }

    pub(crate) fn on(postgres: &Postgres, way: Way, count: usize, config: &str) -> Self {
        let deployment = Deployment::on(postgres, way, &format!("{CONFIG}{config}"));
        let member = |number| Member { name: format!("instance-{number}"), port: port(), server: None };
        let mut this = Self { deployment, members: (0..count).map(member).collect() };
        (0..count).for_each(|number| this.begin(number));
        this
    }

    /// Starts an instance that does not run.
    pub(crate) fn begin(&mut self, number: usize) {
        let server = self.started(number);
        self.put(number, server);
    }

    /// The same, for somebody who has it for a while; see [`Fleet::put`].
    pub(crate) fn started(&self, number: usize) -> Server {
        let member = &self.members[number];
        assert!(member.server.is_none(), "{} runs", member.name);
        self.deployment.instance_at(&member.name, member.port)
    }

    /// The server of an instance that is to end; [`Fleet::begin`] starts it again.
    pub(crate) fn take(&mut self, number: usize) -> Server {
        self.members[number].server.take().unwrap()
    }

    /// The server of an instance, given back.
    pub(crate) fn put(&mut self, number: usize, server: Server) {
        self.members[number].server = Some(server);
    }

    pub(crate) fn stop(&mut self, number: usize) {
        self.take(number).stop();
    }

    pub(crate) fn kill(&mut self, number: usize) {
        self.take(number).kill();
    }

    pub(crate) fn server(&self, number: usize) -> &Server {
        self.members[number].server.as_ref().unwrap()
    }

    /// Those that run.
    pub(crate) fn servers(&self) -> Vec<&Server> {
        self.members.iter().filter_map(|member| member.server.as_ref()).collect()
    }

    pub(crate) fn port(&self, number: usize) -> u16 {
        self.members[number].port
    }

    pub(crate) fn data(&self, number: usize) -> PathBuf {
        self.deployment.path(&self.members[number].name)
    }

    /// Begins a load on an instance, or whoever listens at `port`; see [`Load::begin`].
    pub(crate) fn load(&self, port: u16, rate: u32, seconds: u32) -> Load {
        let (folder, key) = (self.deployment.path(""), self.deployment.path("admin.key"));
        Load::begin(&folder, &format!("http://127.0.0.1:{port}"), &key, rate, seconds)
    }

    /// Waits until nothing is pending at any instance that runs, and compares all that there is.
    #[track_caller]
    pub(crate) fn judge(&self, ledger: &Path) -> Judged {
        self.judge_all(&[ledger]).remove(0)
    }

    /// The same for loads that came at the same time.
    #[track_caller]
    pub(crate) fn judge_all(&self, ledgers: &[impl AsRef<Path>]) -> Vec<Judged> {
        let account = Account::settled(&self.servers());
        let command = |arguments: &[&str]| {
            let mut command = self.deployment.command(arguments);
            command.env("WAYPOST_POSTGRES__STATEMENT_TIMEOUT", "60s");
            command
        };
        let sums = Sums::of(|sql| self.deployment.database.sql(sql).parse().unwrap());
        let judge = |ledger: &_| {
            Judged::judge(&self.deployment.path(""), AsRef::as_ref(ledger), command, account.clone(), sums)
        };
        ledgers.iter().map(judge).collect()
    }
}

/// Set when it is dropped: threads that go on until then end also if a claim fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn instances_keep_name_and_port() {
    let mut fleet = Fleet::start(3, "");
    for number in 0..3 {
        fleet.stop(number);
        fleet.begin(number);
    }
    fleet.kill(0);
    assert_eq!(fleet.servers().len(), 2);
    fleet.begin(0);
    assert!(fleet.data(0).join("spool").exists());
    assert_eq!(fleet.server(0).address().port(), fleet.port(0));
    let (ledger, ran) = fleet.load(fleet.port(2), 200, 1).finishes();
    assert_eq!(ran.failures(), 0, "{ran:#?}");
    fleet.judge(&ledger).right().nothing_in_flight();
}
