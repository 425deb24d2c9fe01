//! Campaigns: a load with a ledger, something that happens meanwhile, and a judge.
//!
//! In: servers, a load, and what the store has in the end. Out: [`Judged`]: no redirect that a client received is lost, none
//! is there twice, what is there too often was in flight at a kill, and the figures of accounting, rows and rollups are one.
//! Never: takes a server's word for what was answered.
//! At the limit: whatever is pending must be stored within [`SETTLED`] of the fault's end, else the test fails and shows the
//! server's log.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use waypost::domain::time;

use crate::loadgen::{self, Ran, Running};
use crate::support::{LIMIT, Server, eventually, throughout};

/// From the end of a fault until all that was pending is stored, on a machine that does other things.
const SETTLED: Duration = Duration::from_secs(60);

/// What a core answered may stand in no figure of the store for as long: until the next batch, and its way.
const UNHEARD: Duration = Duration::from_millis(1500);
/// Between two looks while something is pending.
const AGAIN: Duration = Duration::from_millis(100);

/// The id of requests that stand in no ledger.
pub(crate) const OURS: &str = "ours";

/// loadgen, writing its ledger.
pub(crate) struct Load {
    running: Running,
    ledger: PathBuf,
}

impl Load {
    /// Begins one that lasts for `seconds`, unless it is stopped; returns when its redirects are answered. `key`: the file of
    /// the admin key.
    pub(crate) fn begin(folder: &Path, target: &str, key: &Path, rate: u32, seconds: u32) -> Self {
        let ledger = folder.join("run.ledger");
        let _ = std::fs::remove_file(&ledger);
        let changes = format!(
            "peak={rate} warmup=100ms links.existing.count=200 phase.1.for=100ms phase.2.for=100ms phase.3.for={seconds}s \
             phase.4.for=100ms drain=6s"
        );
        let mut arguments = loadgen::run("mail-blast", target, &changes);
        arguments.extend(["--ledger", "run.ledger", "--key-file", key.to_str().unwrap()]);
        let mut running = loadgen::start(folder, arguments);
        eventually(3 * LIMIT, "the load begins", || size(&ledger) > 20_000 || running.has_ended());
        assert!(size(&ledger) > 20_000, "{:#?}", running.ends());
        Self { running, ledger }
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.running.has_ended()
    }

    /// Requests that were sent so far, about.
    pub(crate) fn sent(&self) -> u64 {
        // Two lines a request, of some 90 bytes.
        size(&self.ledger) / 180
    }

    /// Runs to its end.
    pub(crate) fn ends(self) -> PathBuf {
        self.finishes().0
    }

    /// Runs to its end: the ledger, and the report.
    pub(crate) fn finishes(self) -> (PathBuf, Ran) {
        let ran = self.running.ends();
        assert!(matches!(ran.code, Some(0 | 1 | 3 | 99)), "{ran:#?}");
        (self.ledger, ran)
    }

    /// Ends now, which is what a ^C does; what is in flight is not waited for.
    pub(crate) fn stop(mut self) -> PathBuf {
        if !self.running.has_ended() {
            self.running.signal(Signal::INT);
        }
        let Ran { code, err, .. } = self.running.ends();
        assert!(matches!(code, Some(0 | 1 | 3 | 99 | 130)), "{code:?}: {err}");
        self.ledger
    }
}

/// What loadgen's clients saw, by its ledger (`loadgen/LEDGER.md`).
#[derive(Debug)]
pub(crate) struct Ledger {
    /// By their ids.
    pub(crate) requests: HashMap<String, Request>,
    pub(crate) created: Vec<Created>,
    /// Of its last line.
    pub(crate) ended: UnixNanos,
}

/// Of the wall clock.
pub(crate) type UnixNanos = i64;

#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) sent: UnixNanos,
    pub(crate) class: String,
    pub(crate) code: String,
    pub(crate) answer: Option<Received>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Received {
    pub(crate) at: UnixNanos,
    pub(crate) status: u16,
    /// It led to the right target.
    is_right: bool,
}

/// A link that was acknowledged.
#[derive(Debug)]
pub(crate) struct Created {
    pub(crate) at: UnixNanos,
    pub(crate) code: String,
}

impl Ledger {
    /// Of a load that may have been stopped in the middle of a line.
    pub(crate) fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap();
        let mut lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
        let begun: UnixNanos = lines.next().unwrap().split('\t').nth(5).unwrap().parse().unwrap();
        let mut this = Self { requests: HashMap::new(), created: Vec::new(), ended: begun };
        for line in lines {
            let fields: Vec<&str> = line.split('\t').collect();
            let at = begun + fields[2].parse::<UnixNanos>().unwrap();
            this.ended = this.ended.max(at);
            match fields[..] {
                ["S", id, _, class, _, code] => {
                    let request = Request { sent: at, class: class.to_owned(), code: code.to_owned(), answer: None };
                    this.requests.insert(id.to_owned(), request);
                }
                ["R", id, _, status, right] => {
                    let received = Received { at, status: status.parse().unwrap(), is_right: right == "1" };
                    this.requests.get_mut(id).unwrap().answer = Some(received);
                }
                ["C", _, _, code, _] => this.created.push(Created { at, code: code.to_owned() }),
                _ => panic!("no line of a ledger: {line:?}"),
            }
        }
        this
    }
}

impl Request {
    /// Whether it came to what loadgen's scenario expects of it.
    pub(crate) fn went_well(&self) -> bool {
        let Some(Received { status, is_right, .. }) = self.answer else { return false };
        match self.class.as_str() {
            "create" => status == 201,
            "stats" => status == 200,
            "typo" => status == 404,
            _ => (300..400).contains(&status) && is_right,
        }
    }
}

impl Received {
    /// A redirect to somewhere else.
    pub(crate) fn leads_astray(&self) -> bool {
        (300..400).contains(&self.status) && !self.is_right
    }
}

/// Sums over all instances, as `GET /api/v1/accounting` has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) answered: u64,
    pub(crate) stored: u64,
    pub(crate) pending: u64,
    pub(crate) drops: BTreeMap<String, u64>,
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

    /// Waits until nothing is pending at any of `servers`, which share a store; the account by then.
    #[track_caller]
    pub(crate) fn settled(servers: &[&Server]) -> Self {
        let is_idle = |server: &&Server| server.metric("waypost_visits_pending", &[]) == 0.0;
        let begun = time::monotonic();
        let mut before = None;
        loop {
            // What a core has answered last may not be in any figure yet.
            let account = servers.iter().all(is_idle).then(|| Self::of(servers[0]));
            let account = account.filter(|account| account.pending == 0);
            if let Some(account) = account.as_ref().filter(|_| account == before) {
                return account.clone();
            }
            let late = time::monotonic().duration_since(begun) > SETTLED;
            assert!(!late, "not settled: {:?}", Self::of(servers[0]));
            throughout(if account.is_some() { UNHEARD } else { AGAIN }, || {});
            before = account;
        }
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.drops.values().sum()
    }
}

/// What was found.
#[derive(Debug)]
pub(crate) struct Judged {
    /// As `loadgen verify --json` has it.
    pub(crate) said: Value,
    pub(crate) account: Account,
    /// Visits of requests that we made ourselves, with [`OURS`].
    ours: u64,
}

impl Judged {
    /// Compares all that there is, when nothing is pending any more: the ledger with the exports, the account with rows,
    /// rollups and positions. `command`: the command line of the store.
    #[track_caller]
    pub(crate) fn judge(
        folder: &Path,
        ledger: &Path,
        command: impl Fn(&[&str]) -> Command,
        account: Account,
        sums: Sums,
    ) -> Self {
        for (file, arguments) in
            [("visits.ndjson", &["export", "--visits", "--format", "ndjson"][..]), ("links.csv", &["export"])]
        {
            let exported = command(arguments).stderr(Stdio::piped()).output().unwrap();
            assert!(exported.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&exported.stderr));
            std::fs::write(folder.join(file), exported.stdout).unwrap();
        }
        let ledger = ledger.to_str().unwrap();
        let arguments = ["verify", ledger, "--visits", "visits.ndjson", "--links", "links.csv", "--max", "5", "--json"];
        let ran = loadgen::start(folder, arguments).ends();
        let said: Value = serde_json::from_str(&ran.out).unwrap_or_else(|error| panic!("{error}: {ran:#?}"));
        assert_eq!(account.answered, account.stored + account.dropped(), "{account:?}");
        assert_eq!(sums.rows, account.stored, "rows of visits, and stored by the account: {sums:?} {account:?}");
        assert!(sums.agree(), "I7: {sums:?} {account:?}");
        let visits = std::fs::read_to_string(folder.join("visits.ndjson")).unwrap();
        let visits = visits.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let ours = visits.filter(|visit| visit["request_id"] == OURS).count();
        Self { said, account, ours: ours as u64 }
    }

    pub(crate) fn of(&self, part: &str, name: &str) -> u64 {
        self.said[part][name].as_u64().unwrap_or_else(|| panic!("no {part}.{name}: {}", self.said))
    }

    /// How often this is wrong.
    pub(crate) fn wrong(&self, what: &str) -> u64 {
        let groups = self.said["wrong"].as_array().unwrap().iter();
        groups.filter(|group| group["wrong"] == what).map(|group| group["count"].as_u64().unwrap()).sum()
    }

    /// Visits of requests whose answer did not come whole.
    pub(crate) fn explained(&self) -> u64 {
        self.of("visits", "explained")
    }

    /// I4, I5: nothing lost, nothing twice, and nothing was given up.
    #[track_caller]
    pub(crate) fn right(&self) -> &Self {
        assert_eq!(self.said["wrong"], serde_json::json!([]), "{self:#?}");
        assert_eq!(self.account.dropped(), 0, "{self:#?}");
        // A judge that sees nothing finds nothing.
        assert!(self.of("requests", "redirects") > 100, "{self:#?}");
        self.is_shown();
        self
    }

    /// I6 where nobody was killed: what is stored was received.
    #[track_caller]
    pub(crate) fn nothing_in_flight(&self) {
        assert_eq!(self.explained(), 0, "{self:#?}");
    }

    /// I7: what was given up, for these reasons alone, is what is missing, to the visit. `others`: redirects that we received
    /// ourselves.
    #[track_caller]
    pub(crate) fn lost_exactly(&self, reasons: &[&str], others: u64) {
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

/// What the store of visits adds up to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sums {
    rows: u64,
    totals: u64,
    days: u64,
    positions: u64,
}

impl Sums {
    /// `sql`: the first cell that the store has for this.
    pub(crate) fn of(sql: impl Fn(&str) -> u64) -> Self {
        let all = "coalesce(sum(clicks + tools + bots + heads + prefetches), 0)";
        Self {
            rows: sql("SELECT count(*) FROM visits"),
            totals: sql(&format!("SELECT {all} FROM link_totals")),
            days: sql(&format!("SELECT {all} FROM link_days")),
            positions: sql("SELECT coalesce(sum(stored), 0) FROM spool_positions"),
        }
    }

    fn agree(&self) -> bool {
        [self.totals, self.days, self.positions].iter().all(|sum| *sum == self.rows)
    }
}

fn size(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.size())
}
