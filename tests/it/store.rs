//! The store's operations, over each kind of store as one table: SQLite, Postgres, and Postgres through PgBouncer in
//! transaction mode. The role that is used owns nothing.

use std::net::TcpListener;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio_postgres::NoTls;
use waypost::config::{self, Migrate, ServiceUrl, Statements};
use waypost::domain::key::{Case, Code, DomainId, Key};
use waypost::domain::link::{Fields, Link, LinkId};
use waypost::domain::target::Target;
use waypost::domain::time::{self, UnixMillis};
use waypost::guard::keys::{KeyRecord, Scope, Scopes};
use waypost::store::postgres::{self, Postgres};
use waypost::store::row::{
    Change, Filter, Found, Inserted, NewLink, OnConflict, Patch, Reading, Rest, WarmReport, WarmWhat,
};
use waypost::store::sqlite::{self, Sqlite};
use waypost::store::{Error, Store};

use crate::support::{LIMIT, eventually};

const BIN: &str = "/usr/lib/postgresql/15/bin";
const NOW: UnixMillis = UnixMillis(1_700_000_000_000);
const OWNER: &str = "owner:owner-password";
const ROLE: &str = "app\"role";
const ROLE_IN_URL: &str = "app%22role:app-password";

/// A Postgres and a PgBouncer in front of it, shared by the tests that run at the same time, a database for each.
struct Servers {
    postgres: Running,
    _pooler: Running,
    port: u16,
    pooler_port: u16,
    databases: AtomicU32,
    _dir: TempDir,
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Postgres: an immediate stop; PgBouncer: the same.
        let pid = Pid::from_child(&self.0);
        let _ = kill_process(pid, Signal::QUIT);
        let _ = self.0.wait();
    }
}

static SHARED: Mutex<Weak<Servers>> = Mutex::new(Weak::new());

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Both servers refuse to be run by root.
fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    if rustix::process::geteuid().is_root() {
        command.uid(number("-u")).gid(number("-g"));
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn number(which: &str) -> u32 {
    let output = Command::new("id").args([which, "postgres"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

fn give_away(path: &Path) {
    if rustix::process::geteuid().is_root() {
        chown(path, Some(number("-u")), Some(number("-g"))).unwrap();
    }
}

impl Servers {
    fn shared() -> Arc<Self> {
        let mut shared = SHARED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(servers) = shared.upgrade() {
            return servers;
        }
        let servers = Arc::new(Self::start());
        *shared = Arc::downgrade(&servers);
        servers
    }

    fn start() -> Self {
        let dir = TempDir::new().unwrap();
        give_away(dir.path());
        let write = |name: &str, text: &str| -> PathBuf {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            give_away(&path);
            path
        };
        let password = write("password", "owner-password");
        let data = dir.path().join("data");
        let initialised = command(&format!("{BIN}/initdb"))
            .arg("-D")
            .arg(&data)
            .args(["-U", "owner", "-A", "scram-sha-256", "--no-sync", "-E", "UTF8", "--locale=C.UTF-8", "--pwfile"])
            .arg(&password)
            .status()
            .unwrap();
        assert!(initialised.success());
        let (port, pooler_port) = (free_port(), free_port());
        let postgres = command(&format!("{BIN}/postgres"))
            .arg("-D")
            .arg(&data)
            .args(["-p", &port.to_string(), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="])
            .args(["-c", "fsync=off", "-c", "max_connections=300"])
            .spawn()
            .unwrap();
        let postgres = Running(postgres);
        let users = write("users", "\"owner\" \"owner-password\"\n\"app\"\"role\" \"app-password\"\n");
        let settings = format!(
            "[databases]\n* = host=127.0.0.1 port={port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {pooler_port}\nunix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {}\n\
             pool_mode = transaction\nmax_client_conn = 300\ndefault_pool_size = 10\n",
            users.display()
        );
        let settings = write("pgbouncer.ini", &settings);
        let pooler = command("/usr/sbin/pgbouncer").arg(&settings).spawn().unwrap();
        let pooler = Running(pooler);
        let servers =
            Self { postgres, _pooler: pooler, port, pooler_port, databases: AtomicU32::new(0), _dir: dir };
        let ready = |port: u16| {
            let url = format!("postgres://{OWNER}@127.0.0.1:{port}/postgres");
            runtime().block_on(async { tokio_postgres::connect(&url, NoTls).await.is_ok() })
        };
        eventually(LIMIT, "postgres is there", || ready(port));
        eventually(LIMIT, "pgbouncer is there", || ready(pooler_port));
        let role = format!("CREATE ROLE \"{}\" LOGIN PASSWORD 'app-password'", ROLE.replace('"', "\"\""));
        runtime().block_on(servers.run("postgres", &role));
        servers
    }

    /// SQL as the owner, past the pooler.
    async fn run(&self, database: &str, sql: &str) {
        let url = format!("postgres://{OWNER}@127.0.0.1:{}/{database}", self.port);
        let (client, connection) = tokio_postgres::connect(&url, NoTls).await.unwrap();
        tokio::spawn(connection);
        client.batch_execute(sql).await.unwrap();
    }

    /// A new database, with the schema and the grants.
    async fn database(&self) -> String {
        let name = format!("test{}", self.databases.fetch_add(1, Ordering::Relaxed));
        self.run("postgres", &format!("CREATE DATABASE {name}")).await;
        let settings = self.settings(&name, Statements::Prepared);
        postgres::migrate(&settings).await.unwrap();
        postgres::grants(&settings, ROLE).await.unwrap();
        name
    }

    fn settings(&self, database: &str, statements: Statements) -> config::Postgres {
        let url = |user: &str, port: u16| ServiceUrl::new(format!("postgres://{user}@127.0.0.1:{port}/{database}"));
        let port = if statements == Statements::Unnamed { self.pooler_port } else { self.port };
        config::Postgres {
            url: url(ROLE_IN_URL, port),
            replica_url: None,
            replica_max_lag: Duration::from_secs(2),
            direct_url: None,
            migrate_url: Some(url(OWNER, self.port)),
            migrate: Migrate::Auto,
            pool: 8,
            pool_timeout: Duration::from_secs(5),
            max_lifetime: Duration::from_secs(3600),
            lookups: 32,
            lookup_timeout: Duration::from_secs(5),
            statements,
            connect_timeout: Duration::from_secs(5),
            statement_timeout: Duration::from_secs(5),
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A store, new and empty.
struct Sample {
    kind: &'static str,
    store: Store,
    ids: AtomicU64,
    /// The servers and the database, if it is a Postgres.
    behind: Option<(Arc<Servers>, String)>,
    _dir: TempDir,
}

impl Sample {
    fn sqlite() -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("waypost.db");
        sqlite::migrate(&path).unwrap();
        let store = Store::Sqlite(Sqlite::open(&path).unwrap());
        Self { kind: "sqlite", store, ids: AtomicU64::new(1), behind: None, _dir: dir }
    }

    async fn postgres(kind: &'static str, statements: Statements, change: impl Fn(&mut config::Postgres)) -> Self {
        let servers = tokio::task::spawn_blocking(Servers::shared).await.unwrap();
        let database = servers.database().await;
        let mut settings = servers.settings(&database, statements);
        change(&mut settings);
        let store = Store::Postgres(Postgres::open(&settings).unwrap());
        let dir = TempDir::new().unwrap();
        Self { kind, store, ids: AtomicU64::new(1), behind: Some((servers, database)), _dir: dir }
    }

    fn only_postgres(&self) -> &Postgres {
        match &self.store {
            Store::Postgres(postgres) => postgres,
            Store::Sqlite(_) => panic!("it is another kind of store"),
        }
    }

    async fn run(&self, sql: &str) {
        let (servers, database) = self.behind.as_ref().unwrap();
        servers.run(database, sql).await;
    }

    fn new_link(&self, code: &str, target: &str, on_conflict: OnConflict) -> NewLink {
        let url = Target::new(target).unwrap();
        NewLink {
            id: LinkId(self.ids.fetch_add(1, Ordering::Relaxed)),
            key: key(code),
            fields: Fields::new(target.to_owned(), url.clone()),
            given: Patch { target: Some((target.to_owned(), url)), ..Patch::default() },
            created_at: NOW,
            imported_clicks: 0,
            on_conflict,
        }
    }

    async fn insert(&self, rows: &[(&str, &str, OnConflict)]) -> Vec<Inserted> {
        let links = rows.iter().map(|(code, target, on_conflict)| self.new_link(code, target, *on_conflict));
        self.store.insert(links.collect(), NOW).await.unwrap()
    }

    async fn add(&self, code: &str, target: &str) -> Link {
        assert_eq!(self.insert(&[(code, target, OnConflict::Take)]).await, [Inserted::Created], "{}", self.kind);
        self.link(code).await
    }

    async fn link(&self, code: &str) -> Link {
        self.store.link(key(code)).await.unwrap().unwrap()
    }

    /// Every change so far: version, code, whether it created.
    async fn history(&self) -> Vec<(u64, String, bool)> {
        let changes = self.store.changes(0, 1_000_000).await.unwrap();
        changes.iter().map(|row| (row.version, row.key.code.to_string(), row.created)).collect()
    }

    async fn assert_gapless(&self) {
        let versions: Vec<u64> = self.history().await.iter().map(|(version, ..)| *version).collect();
        let last = self.store.position().await.unwrap().version;
        assert_eq!(versions, (1..=last).collect::<Vec<_>>(), "{}", self.kind);
    }
}

fn key(code: &str) -> Key {
    Key { domain: DomainId(0), code: Code::parse(code.as_bytes(), Case::Sensitive).unwrap() }
}

/// Runs `check` over a new store of each kind.
fn each_store(check: impl AsyncFn(&Sample)) {
    runtime().block_on(async { check(&Sample::sqlite()).await });
    each_postgres(|_| {}, check);
}

fn each_postgres(change: impl Fn(&mut config::Postgres), check: impl AsyncFn(&Sample)) {
    for (kind, statements) in [("postgres", Statements::Prepared), ("pgbouncer", Statements::Unnamed)] {
        runtime().block_on(async { check(&Sample::postgres(kind, statements, &change).await).await });
    }
}

const A: &str = "https://example.com/a";
const B: &str = "https://example.com/b";

fn edit(target: &str) -> Change {
    let target = Some((target.to_owned(), Target::new(target).unwrap()));
    Change::Edit(Box::new(Patch { target, ..Patch::default() }))
}

#[test]
fn a_link_comes_back_as_it_was_given() {
    each_store(async |sample| {
        let mut full = sample.new_link("full", A, OnConflict::Take);
        full.fields = Fields {
            target_written: "HTTPS://example.com/a".into(),
            target: Target::new(A).unwrap(),
            status: Some(301),
            cache_control: Some("no-store".into()),
            title: Some("Tïtle".into()),
            tags: vec!["B".into(), "a".into(), "é".into()],
            note: Some("a\nnote".into()),
            starts_at: Some(UnixMillis(1)),
            expires_at: Some(UnixMillis(2)),
            expired_url: Some(Target::new(B).unwrap()),
            max_visits: Some(i64::MAX as u64),
            forward_query: Some(false),
        };
        full.imported_clicks = 77;
        let plain = sample.new_link("plain", B, OnConflict::Refuse);
        let outcomes = sample.store.insert(vec![full.clone(), plain.clone()], UnixMillis(5)).await.unwrap();
        assert_eq!(outcomes, [Inserted::Created, Inserted::Created]);
        for (new, version) in [(full, 1), (plain, 2)] {
            let link = sample.store.link(new.key).await.unwrap().unwrap();
            let want = Link {
                id: new.id,
                key: new.key,
                fields: new.fields,
                version,
                created_at: NOW,
                updated_at: UnixMillis(5),
                disabled_at: None,
                deleted_at: None,
                imported_clicks: new.imported_clicks,
                visits_used: 0,
            };
            assert_eq!(link, want, "{}", sample.kind);
            let found = sample.store.look_up(vec![key("none"), new.key, key("other")]).await.unwrap();
            assert_eq!(found, [Found::Missing, Found::Entry(want.entry()), Found::Missing], "{}", sample.kind);
        }
        assert_eq!(sample.store.look_up(Vec::new()).await.unwrap(), []);
        sample.assert_gapless().await;
    });
}

#[test]
fn creates_that_meet_a_link() {
    each_store(async |sample| {
        use Inserted::{Created, Taken, Updated};
        use OnConflict::{Refuse, Take, Update};
        let check = async |rows: &[(&str, &str, OnConflict)], want: &[Inserted]| {
            assert_eq!(sample.insert(rows).await, want, "{}: {rows:?}", sample.kind);
            sample.assert_gapless().await;
        };
        check(&[("a", A, Take), ("b", A, Refuse), ("c", A, Update)], &[Created, Created, Created]).await;
        check(&[("a", B, Take), ("d", A, Take), ("b", B, Refuse)], &[Taken, Created, Taken]).await;
        assert_eq!(sample.link("a").await.fields.target_written, A);
        check(&[("a", B, Update), ("e", A, Take)], &[Updated, Created]).await;
        assert_eq!(sample.link("a").await.fields.target_written, B);
        // The same code twice in a batch: in the order of the batch.
        check(&[("f", A, Take), ("f", B, Take), ("f", B, Refuse)], &[Created, Taken, Taken]).await;
        check(&[("g", A, Take), ("g", B, Update), ("g", A, Take)], &[Created, Updated, Taken]).await;
        assert_eq!(sample.link("g").await.fields.target_written, B);
        // A deleted link's code is free for those who name it.
        for code in ["a", "b", "c"] {
            sample.store.change(key(code), Change::Delete, NOW).await.unwrap().unwrap();
        }
        let old = sample.link("a").await.id;
        check(
            &[("a", A, Take), ("a", A, Take), ("b", A, Refuse), ("c", A, Update), ("h", A, Take)],
            &[Created, Taken, Taken, Created, Created],
        )
        .await;
        assert_ne!(sample.link("a").await.id, old);
        assert!(sample.link("a").await.deleted_at.is_none());
        let history = sample.history().await;
        let of_a: Vec<bool> = history.iter().filter(|(_, code, _)| code == "a").map(|(.., created)| *created).collect();
        assert_eq!(of_a, [true, false, false, false, true], "{}", sample.kind);
    });
}

#[test]
fn one_of_two_hundred_creates_of_a_code_wins() {
    each_store(async |sample| {
        let tasks = (0..200).map(|n| {
            let (store, new) = (sample.store.clone(), sample.new_link(&format!("c{}", n % 4), A, OnConflict::Take));
            tokio::spawn(async move { store.insert(vec![new], NOW).await.unwrap().remove(0) })
        });
        let mut created = 0;
        for task in tasks.collect::<Vec<_>>() {
            created += usize::from(task.await.unwrap() == Inserted::Created);
        }
        assert_eq!(created, 4, "{}", sample.kind);
        sample.assert_gapless().await;
    });
}

/// Eight writers, and a reader that follows: it never sees a version whose predecessor comes later.
#[test]
fn versions_have_no_gap_under_many_writers() {
    each_store(async |sample| {
        let hot = sample.add("hot", A).await;
        let mut writers = Vec::new();
        for writer in 0..8 {
            // Of handles of its own: other processes write too.
            let store = match &sample.behind {
                Some((servers, database)) => {
                    let kind = if sample.kind == "pgbouncer" { Statements::Unnamed } else { Statements::Prepared };
                    let mut settings = servers.settings(database, kind);
                    settings.pool = 2;
                    Store::Postgres(Postgres::open(&settings).unwrap())
                }
                None => sample.store.clone(),
            };
            let new: Vec<NewLink> = (0..60)
                .map(|n| sample.new_link(&format!("w{}", (writer * 7 + n) % 100), A, OnConflict::Update))
                .collect();
            writers.push(tokio::spawn(async move {
                for (n, new) in new.into_iter().enumerate() {
                    store.insert(vec![new], NOW).await.unwrap();
                    if n % 4 == 0 {
                        store.change(key("hot"), edit(if n % 8 == 0 { B } else { A }), NOW).await.unwrap().unwrap();
                    }
                }
            }));
        }
        let mut seen = hot.version;
        while !writers.iter().all(tokio::task::JoinHandle::is_finished) {
            for row in sample.store.changes(seen, 1000).await.unwrap() {
                assert_eq!(row.version, seen + 1, "{}", sample.kind);
                seen = row.version;
            }
            assert!(sample.store.position().await.unwrap().version >= seen);
        }
        for writer in writers {
            writer.await.unwrap();
        }
        sample.assert_gapless().await;
        let edits = sample.history().await.iter().filter(|(_, code, _)| code == "hot").count();
        assert_eq!(edits, 1 + 8 * 15, "{}: no edit was lost", sample.kind);
    });
}

#[test]
fn changes_of_a_link() {
    each_store(async |sample| {
        let before = sample.add("a", A).await;
        let (store, at) = (&sample.store, UnixMillis(NOW.0 + 1));
        assert_eq!(store.change(key("none"), Change::Disable, at).await.unwrap(), None);
        let patch = Patch {
            title: Some(Some("t".into())),
            tags: Some(vec!["x".into(), "y".into()]),
            max_visits: Some(Some(3)),
            ..Patch::default()
        };
        let edited = store.change(key("a"), Change::Edit(Box::new(patch)), at).await.unwrap().unwrap();
        assert_eq!((edited.version, edited.updated_at), (before.version + 1, at));
        assert_eq!(edited, sample.link("a").await, "{}", sample.kind);
        let patch = Patch { tags: Some(vec!["y".into(), "z".into()]), title: Some(None), ..Patch::default() };
        store.change(key("a"), Change::Edit(Box::new(patch)), at).await.unwrap().unwrap();
        let edited = sample.link("a").await;
        assert_eq!((edited.fields.tags.as_slice(), &edited.fields.title), (["y".into(), "z".into()].as_slice(), &None));
        for (change, disabled, deleted) in [
            (Change::Disable, true, false),
            (Change::Enable, false, false),
            (Change::Delete, false, true),
        ] {
            let after = store.change(key("a"), change, at).await.unwrap().unwrap();
            assert_eq!((after.disabled_at.is_some(), after.deleted_at.is_some()), (disabled, deleted));
            assert_eq!(after, sample.link("a").await, "{}", sample.kind);
        }
        assert_eq!(store.change(key("a"), Change::Enable, at).await.unwrap(), None, "it is deleted");
        sample.assert_gapless().await;
    });
}

#[test]
fn visits_are_taken_as_long_as_there_are_some() {
    each_store(async |sample| {
        let mut new = sample.new_link("a", A, OnConflict::Take);
        new.fields.max_visits = Some(7);
        let id = new.id;
        sample.store.insert(vec![new], NOW).await.unwrap();
        sample.add("free", A).await;
        let tasks: Vec<_> = (0..50)
            .map(|_| {
                let store = sample.store.clone();
                tokio::spawn(async move { store.take_visit(key("a"), id, NOW).await.unwrap() })
            })
            .collect();
        let mut taken = 0;
        for task in tasks {
            taken += usize::from(task.await.unwrap());
        }
        assert_eq!(taken, 7, "{}", sample.kind);
        let link = sample.link("a").await;
        assert_eq!(link.visits_used, 7);
        let found = sample.store.look_up(vec![key("a")]).await.unwrap();
        assert!(matches!(&found[..], [Found::Entry(entry)] if entry.rules.gone && entry.rules.limited));
        let free = sample.link("free").await.id;
        assert!(!sample.store.take_visit(key("free"), free, NOW).await.unwrap(), "it has no limit to take from");
        assert!(!sample.store.take_visit(key("none"), LinkId(999), NOW).await.unwrap());
        assert_eq!(sample.history().await.len(), 3, "{}: two creates, and once used up", sample.kind);
        sample.assert_gapless().await;
    });
}

#[test]
fn listings() {
    each_store(async |sample| {
        let domain = sample.store.number_domains(vec!["b.example".into()]).await.unwrap()[0];
        let mut links = Vec::new();
        for n in 0..20_u64 {
            let mut new = sample.new_link(&format!("code-{n}"), &format!("https://example.com/{n}_x"), OnConflict::Take);
            new.fields.tags = if n % 2 == 0 { vec!["even".into()] } else { Vec::new() };
            new.fields.title = (n == 3).then(|| "50% \\ off".into());
            new.key.domain = if n < 5 { domain } else { DomainId(0) };
            links.push(new);
        }
        sample.store.insert(links, NOW).await.unwrap();
        sample.store.change(key("code-19"), Change::Delete, NOW).await.unwrap().unwrap();
        let check = async |search: Option<&str>, tag: Option<&str>, domain: Option<DomainId>, want: u64| {
            let (search, tag) = (search.map(str::to_owned), tag.map(str::to_owned));
            let filter = Filter { search, tag, domain };
            for reading in [Reading::Now, Reading::Lately] {
                let count = sample.store.count(filter.clone(), reading).await.unwrap();
                assert_eq!(count, want, "{}: {filter:?}", sample.kind);
                let (mut all, mut after) = (0, None);
                loop {
                    let page = sample.store.page(filter.clone(), after, 3, reading).await.unwrap();
                    let Some(last) = page.last() else { break };
                    assert!(page.is_sorted_by_key(|link| link.id) && after < Some(page[0].id) && page.len() <= 3);
                    (all, after) = (all + page.len() as u64, Some(last.id));
                }
                assert_eq!(all, want, "{}: {filter:?}", sample.kind);
            }
        };
        check(None, None, None, 19).await;
        check(None, Some("even"), None, 10).await;
        check(None, Some("even"), Some(domain), 3).await;
        check(None, Some("odd"), None, 0).await;
        check(Some("CODE-1"), None, None, 10).await;
        check(Some("_x"), None, None, 19).await;
        check(Some("x_"), None, None, 0).await;
        check(Some("0% \\"), None, None, 1).await;
        check(Some("1"), Some("even"), Some(DomainId(0)), 5).await;
        check(Some("a\0b"), Some("\0"), None, 0).await;
    });
}

#[test]
fn settings_ranges_domains_and_keys() {
    each_store(async |sample| {
        let store = &sample.store;
        assert_eq!(store.settle("a", vec![1, 0]).await.unwrap(), [1, 0]);
        assert_eq!(store.settle("a", vec![2]).await.unwrap(), [1, 0]);
        assert_eq!(store.lease("ids", 1, 1000).await.unwrap(), 1);
        assert_eq!(store.lease("ids", 1, 1000).await.unwrap(), 1001);
        assert_eq!(store.lease("ids", 5000, 1000).await.unwrap(), 5000);
        assert_eq!(store.lease("ids", 0, 10).await.unwrap(), 6000);
        let hosts = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let tasks: Vec<_> = (0..4)
            .map(|_| (store.clone(), hosts(&["", "b.example", "a.example", "b.example"])))
            .map(|(store, hosts)| tokio::spawn(async move { store.number_domains(hosts).await.unwrap() }))
            .collect();
        let mut numbers = Vec::new();
        for task in tasks {
            numbers.push(task.await.unwrap());
        }
        assert!(numbers.iter().all(|same| *same == numbers[0]), "{}: {numbers:?}", sample.kind);
        assert_eq!(numbers[0], [DomainId(0), numbers[0][1], numbers[0][2], numbers[0][1]]);
        let mut ids: Vec<u16> = store.domains().await.unwrap().iter().map(|(id, _)| id.0).collect();
        ids.sort_unstable();
        assert_eq!(ids, [0, 1, 2], "{}", sample.kind);

        let key = KeyRecord {
            id: "abcd1234".into(),
            name: Some("n".into()),
            digest: [7; 32],
            scopes: Scopes::of(&[Scope::LinksRead, Scope::StatsRead]),
            created_at: NOW,
            expires_at: Some(UnixMillis(3)),
            revoked_at: None,
            per_minute: Some(u32::MAX),
            last_used_at: None,
        };
        store.add_key(key.clone()).await.unwrap();
        assert_eq!(store.key(key.id.clone()).await.unwrap(), Some(key.clone()));
        assert_eq!(store.key("none".into()).await.unwrap(), None);
        store.touch_key(key.id.clone(), UnixMillis(9)).await.unwrap();
        assert!(store.revoke_key(key.id.clone(), UnixMillis(10)).await.unwrap());
        assert!(!store.revoke_key(key.id.clone(), UnixMillis(11)).await.unwrap());
        let want = KeyRecord { revoked_at: Some(UnixMillis(10)), last_used_at: Some(UnixMillis(9)), ..key };
        assert_eq!(store.keys().await.unwrap(), [want], "{}", sample.kind);
    });
}
