//! The store's operations, over each kind of store as one table: SQLite, Postgres, and Postgres through PgBouncer in
//! transaction mode. The role that is used owns nothing.

use std::net::TcpListener;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_postgres::NoTls;
use waypost::config::{self, Migrate, ServiceUrl, Statements};
use waypost::domain::key::{Case, Code, DomainId, Key};
use waypost::domain::link::{Fields, Link, LinkId};
use waypost::domain::target::Target;
use waypost::domain::time::{self, UnixMillis};
use waypost::guard::keys::{KeyRecord, Scope, Scopes};
use waypost::store::postgres::{self, Postgres};
use waypost::store::row::{
    Change, Filter, Found, Inserted, NewLink, OnConflict, Patch, QuotaAsk, Reading, Rest, Settled, Taken, WarmReport,
    WarmWhat,
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
    _postgres: Running,
    _pooler: Running,
    port: u16,
    pooler_port: u16,
    databases: AtomicU32,
    dir: TempDir,
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
        // The authority signs a certificate for another name than the one that is connected to.
        let openssl = |arguments: &str| {
            let made = command("openssl").args(arguments.split(' ')).current_dir(dir.path()).status().unwrap();
            assert!(made.success(), "{arguments}");
        };
        openssl(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 9 -subj /CN=ca -keyout ca.key -out ca.pem",
        );
        openssl(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 9 -subj /CN=no -keyout no.key -out other.pem",
        );
        openssl("req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=db -keyout db.key -out db.csr");
        write("db.ext", "subjectAltName = DNS:localhost");
        openssl("x509 -req -in db.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 9 -extfile db.ext -out db.pem");
        let file = |name: &str| dir.path().join(name).display().to_string();
        let postgres = command(&format!("{BIN}/postgres"))
            .arg("-D")
            .arg(&data)
            .args(["-p", &port.to_string(), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="])
            .args(["-c", "fsync=off", "-c", "max_connections=300", "-c", "ssl=on"])
            .args(["-c", &format!("ssl_cert_file={}", file("db.pem"))])
            .args(["-c", &format!("ssl_key_file={}", file("db.key"))])
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
            Self { _postgres: postgres, _pooler: pooler, port, pooler_port, databases: AtomicU32::new(0), dir };
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

    /// A standby of the Postgres, and its port.
    fn standby(&self) -> (Running, u16) {
        let data = self.dir.path().join("standby");
        let primary = format!("host=127.0.0.1 port={} user=owner password=owner-password", self.port);
        let copied = command(&format!("{BIN}/pg_basebackup"))
            .args(["-R", "-X", "stream", "-c", "fast", "--no-sync", "-d", &primary, "-D"])
            .arg(&data)
            .status()
            .unwrap();
        assert!(copied.success());
        let port = free_port();
        let standby = command(&format!("{BIN}/postgres"))
            .arg("-D")
            .arg(&data)
            .args(["-p", &port.to_string(), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="])
            .args(["-c", "fsync=off", "-c", "max_connections=300"])
            .spawn()
            .unwrap();
        (Running(standby), port)
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

    /// A connection of the owner's, past the pooler.
    async fn owner(&self) -> tokio_postgres::Client {
        let (servers, database) = self.behind.as_ref().unwrap();
        let url = format!("postgres://{OWNER}@127.0.0.1:{}/{database}", servers.port);
        let (client, connection) = tokio_postgres::connect(&url, NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    /// Waits until so many of the role's connections are as `what` says.
    async fn until(&self, count: i64, what: &str) {
        // Inside of a transaction the view does not change.
        let client = self.owner().await;
        let sql = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE usename <> 'owner' AND datname = current_database() AND {what}"
        );
        let begun = time::monotonic();
        while client.query_typed(&sql, &[]).await.unwrap()[0].get::<_, i64>(0) != count {
            assert!(begun.elapsed() < LIMIT, "{}: {what}", self.kind);
            tokio::time::sleep(Duration::from_millis(10)).await;
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
fn each_store(check: &impl AsyncFn(&Sample)) {
    runtime().block_on(async { check(&Sample::sqlite()).await });
    each_postgres(|_| {}, check);
}

fn each_postgres(change: impl Fn(&mut config::Postgres), check: &impl AsyncFn(&Sample)) {
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
    each_store(&async |sample| {
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
    each_store(&async |sample| {
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
    each_store(&async |sample| {
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
    each_store(&async |sample| {
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
    each_store(&async |sample| {
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
        for (change, disabled, deleted) in
            [(Change::Disable, true, false), (Change::Enable, false, false), (Change::Delete, false, true)]
        {
            let after = store.change(key("a"), change, at).await.unwrap().unwrap();
            assert_eq!((after.disabled_at.is_some(), after.deleted_at.is_some()), (disabled, deleted));
            assert_eq!(after, sample.link("a").await, "{}", sample.kind);
        }
        assert_eq!(store.change(key("a"), Change::Enable, at).await.unwrap(), None, "it is deleted");
        sample.assert_gapless().await;
    });
}

/// Takes a single visit and settles it; false if there is none.
async fn takes(store: &Store, code: &str, id: LinkId) -> bool {
    let lease = rand::random::<u64>() >> 1;
    let one = QuotaAsk { key: key(code), id, wanted: 1, waiting: 1, lease, settled: Vec::new() };
    let taken = store.take_visits(one.clone(), NOW).await.unwrap();
    if taken == (Taken::Visits { count: 1, leased: true }) {
        let settled = vec![Settled { lease, rest: 0 }];
        store.take_visits(QuotaAsk { wanted: 0, waiting: 0, settled, ..one }, NOW).await.unwrap();
    }
    matches!(taken, Taken::Visits { count: 1, .. })
}

#[test]
fn visits_are_taken_as_long_as_there_are_some() {
    each_store(&async |sample| {
        let mut new = sample.new_link("a", A, OnConflict::Take);
        new.fields.max_visits = Some(7);
        let id = new.id;
        sample.store.insert(vec![new], NOW).await.unwrap();
        sample.add("free", A).await;
        let tasks: Vec<_> = (0..50)
            .map(|_| {
                let store = sample.store.clone();
                tokio::spawn(async move { takes(&store, "a", id).await })
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
        assert!(takes(&sample.store, "free", free).await, "its limit may have been taken away a moment ago");
        assert_eq!(sample.link("free").await.visits_used, 0);
        assert!(!takes(&sample.store, "none", LinkId(999)).await);
        assert_eq!(sample.history().await.len(), 3, "{}: two creates, and once used up", sample.kind);
        sample.assert_gapless().await;
    });
}

#[test]
fn listings() {
    each_store(&async |sample| {
        let domain = sample.store.number_domains(vec!["b.example".into()]).await.unwrap()[0];
        let mut links = Vec::new();
        for n in 0..20_u64 {
            let mut new =
                sample.new_link(&format!("code-{n}"), &format!("https://example.com/{n}_x"), OnConflict::Take);
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
    each_store(&async |sample| {
        let store = &sample.store;
        assert_eq!(store.settle("a", vec![1, 0]).await.unwrap(), [1, 0]);
        assert_eq!(store.settle("a", vec![2]).await.unwrap(), [1, 0]);
        for name in ["a.1", "a.10", "a.2", "b"] {
            store.settle(name, vec![1]).await.unwrap();
        }
        store.forget("a.1".to_owned(), "a.2".to_owned()).await.unwrap();
        for (name, value) in [("a", [1, 0].as_slice()), ("a.1", &[2]), ("a.10", &[2]), ("a.2", &[1]), ("b", &[1])] {
            assert_eq!(store.settle(name, vec![2]).await.unwrap(), value, "{name}");
        }
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

#[test]
fn changes_at_the_same_time_are_all_kept() {
    each_store(&async |sample| {
        sample.add("a", A).await;
        let tasks: Vec<_> = (0..8)
            .map(|n| {
                let store = sample.store.clone();
                let some = || Some(Some("set".to_owned()));
                let patch = match n {
                    0 => Patch { title: some(), ..Patch::default() },
                    1 => Patch { note: some(), ..Patch::default() },
                    2 => Patch { cache_control: some(), ..Patch::default() },
                    3 => Patch { tags: Some(vec!["set".into()]), ..Patch::default() },
                    4 => Patch { status: Some(Some(308)), ..Patch::default() },
                    5 => Patch { starts_at: Some(Some(NOW)), ..Patch::default() },
                    6 => Patch { max_visits: Some(Some(5)), ..Patch::default() },
                    _ => Patch { forward_query: Some(Some(true)), ..Patch::default() },
                };
                tokio::spawn(async move { store.change(key("a"), Change::Edit(Box::new(patch)), NOW).await })
            })
            .collect();
        for task in tasks {
            task.await.unwrap().unwrap().unwrap();
        }
        let fields = sample.link("a").await.fields;
        let set = Some("set".to_owned());
        assert_eq!((&fields.title, &fields.note, &fields.cache_control), (&set, &set, &set), "{}", sample.kind);
        assert_eq!((fields.tags, fields.status), (vec!["set".to_owned()], Some(308)));
        assert_eq!((fields.starts_at, fields.max_visits, fields.forward_query), (Some(NOW), Some(5), Some(true)));
        sample.assert_gapless().await;
    });
}

#[test]
fn a_row_that_is_no_link_harms_no_other() {
    each_postgres(|_| {}, &async |sample| {
        for (code, harm) in [("a", "status = 200"), ("b", "target_url = E'https://a\r\nb'"), ("c", "expired_url = ''")]
        {
            sample.add(code, A).await;
            sample.run(&format!("UPDATE links SET {harm} WHERE code = '{code}'")).await;
        }
        let good = sample.add("d", A).await.entry();
        let found = sample.store.look_up(vec![key("a"), key("b"), key("d"), key("c")]).await.unwrap();
        let want = [Found::Unreadable, Found::Unreadable, Found::Entry(good), Found::Unreadable];
        assert_eq!(found, want, "{}", sample.kind);
    });
}

#[test]
fn edits_are_the_changes_that_create_nothing() {
    each_postgres(|_| {}, &async |sample| {
        for code in ["a", "b", "c"] {
            sample.add(code, A).await;
            sample.store.change(key(code), edit(B), NOW).await.unwrap().unwrap();
        }
        let edits = sample.store.edits(2).await.unwrap();
        let edits: Vec<_> = edits.iter().map(|row| (row.version, row.key, row.created)).collect();
        assert_eq!(edits, [(4, key("b"), false), (6, key("c"), false)], "{}", sample.kind);
    });
}

#[test]
fn worker_ids_are_leased_to_one_holder_at_a_time() {
    each_postgres(|_| {}, &async |sample| {
        let store = &sample.store;
        let lease = async |holder: &str, wanted: Option<u16>, now_ms: u64| {
            store.lease_worker(holder.into(), wanted, now_ms, 60_000).await.unwrap()
        };
        let first = lease("a", None, 1_000_000).await.unwrap();
        assert_eq!((first.worker_id, first.epoch, first.from_ms, first.until_ms), (0, 1, 1_000_000, 1_060_000));
        let second = lease("b", None, 1_000_000).await.unwrap();
        assert_eq!(second.worker_id, 1);
        assert_eq!(lease("b", Some(0), 1_000_000).await, None, "it is another's");
        assert_eq!(lease("c", Some(700), 5).await.unwrap().worker_id, 700);
        // Its holder gets it again, past what was given before.
        let again = lease("a", None, 1_000_500).await.unwrap();
        assert_eq!((again.worker_id, again.epoch, again.from_ms), (0, 2, 1_060_001), "{}", sample.kind);
        assert_eq!(store.renew_worker(first, 1_030_000, 60_000).await.unwrap(), None, "it was leased anew");
        let renewed = store.renew_worker(again, 1_200_000, 60_000).await.unwrap().unwrap();
        assert_eq!((renewed.from_ms, renewed.until_ms), (again.from_ms, 1_260_000));
        store.release_worker(first, 0).await.unwrap();
        assert_eq!(lease("d", Some(0), 1).await, None, "an old lease gives nothing back");
        store.release_worker(renewed, 1_210_000).await.unwrap();
        let next = lease("d", None, 1).await.unwrap();
        assert_eq!((next.worker_id, next.from_ms), (0, 1_210_001), "{}", sample.kind);
        sample.run("UPDATE worker_leases SET expires_at = now() WHERE worker_id = 1").await;
        assert_eq!(lease("e", Some(1), 1).await.unwrap().from_ms, second.until_ms + 1, "it expired");
        let tasks = (0..30).map(|n| {
            let store = store.clone();
            tokio::spawn(async move { store.lease_worker(format!("holder {n}"), None, 1, 60_000).await.unwrap() })
        });
        let mut ids = Vec::new();
        for task in tasks.collect::<Vec<_>>() {
            ids.push(task.await.unwrap().unwrap().worker_id);
        }
        ids.sort_unstable();
        assert_eq!(ids, (2..32).collect::<Vec<_>>(), "{}", sample.kind);
    });
}

#[test]
fn a_changed_timeline_begins_a_generation() {
    each_postgres(|_| {}, &async |sample| {
        let (store, generation) = (&sample.store, async || sample.store.position().await.unwrap().generation);
        let first = generation().await;
        let lease = store.lease_worker("a".into(), None, 1000, 1000).await.unwrap().unwrap();
        assert_eq!(generation().await, first, "the same timeline");
        sample.run("UPDATE feed SET timeline = '0000002A'").await;
        let tasks: Vec<_> =
            (0..4).map(|_| store.clone()).map(|store| tokio::spawn(async move { store.position().await })).collect();
        for task in tasks {
            assert_eq!(task.await.unwrap().unwrap().generation, first + 1, "{}: begun once", sample.kind);
        }
        assert_eq!(store.begin_generation(first).await.unwrap(), first + 1, "it was begun by somebody else");
        assert_eq!(store.begin_generation(first + 1).await.unwrap(), first + 2);
        // Whatever the lost transactions leased, nobody has it any more, and nobody gets it again.
        assert_eq!(store.renew_worker(lease, 1000, 1000).await.unwrap(), None);
        let next = store.lease_worker("a".into(), None, 1000, 1000).await.unwrap().unwrap();
        const DAY_MS: u64 = 86_400_000;
        assert!(next.from_ms >= time::now().0 as u64 + 2 * DAY_MS - 1000, "{}: two days", sample.kind);
        // Nor if the first to see the new timeline is who leases.
        sample.run("UPDATE feed SET timeline = '0000002B'").await;
        let next = store.lease_worker("b".into(), Some(900), 1000, 1000).await.unwrap().unwrap();
        assert!(next.from_ms >= time::now().0 as u64 + 3 * DAY_MS - 1000, "{}: three days", sample.kind);
    });
}

/// Who wants an id that is only locked waits for it.
#[test]
fn a_worker_id_that_is_locked_is_not_taken() {
    each_postgres(|_| {}, &async |sample| {
        let client = sample.owner().await;
        client.batch_execute("BEGIN; SELECT FROM worker_leases WHERE worker_id = 7 FOR UPDATE").await.unwrap();
        let lease = |wanted| {
            let store = sample.store.clone();
            tokio::spawn(async move { store.lease_worker("a".into(), wanted, 1000, 1000).await })
        };
        let wanted = lease(Some(7));
        sample.until(1, "wait_event_type = 'Lock'").await;
        assert_eq!(lease(None).await.unwrap().unwrap().unwrap().worker_id, 0, "{}", sample.kind);
        client.batch_execute("COMMIT").await.unwrap();
        assert_eq!(wanted.await.unwrap().unwrap().unwrap().worker_id, 7, "{}", sample.kind);
    });
}

/// What was refused once is asked for again once it is granted.
#[test]
fn the_timeline_is_read_once_the_feed_may_be() {
    each_postgres(|_| {}, &async |sample| {
        let first = sample.store.position().await.unwrap().generation;
        let role = ROLE.replace('"', "\"\"");
        sample.run(&format!("REVOKE SELECT ON feed FROM \"{role}\"")).await;
        let error = sample.store.position().await.unwrap_err();
        assert!(error.to_string().contains("42501"), "{error}");
        sample.run(&format!("GRANT SELECT ON feed TO \"{role}\"; UPDATE feed SET timeline = '0000002A'")).await;
        assert_eq!(sample.store.position().await.unwrap().generation, first + 1, "{}", sample.kind);
    });
}

/// What fails after something of the same call was done is told of its row alone.
#[test]
fn a_row_that_fails_hides_no_other() {
    each_postgres(|_| {}, &async |sample| {
        sample.add("a", A).await;
        let mut bad = sample.new_link("a", B, OnConflict::Update);
        // Postgres has no text with a NUL.
        bad.given.title = Some(Some("\0".into()));
        let good = || vec![sample.new_link("b", A, OnConflict::Take), sample.new_link("a", B, OnConflict::Take)];
        let insert = async |rows: Vec<NewLink>| sample.store.insert(rows, NOW).await;
        let mut rows = good();
        rows.insert(1, bad.clone());
        let outcomes = insert(rows).await.unwrap();
        assert!(matches!(&outcomes[1], Inserted::Failed(why) if why.contains("22021")), "{outcomes:?}");
        assert_eq!((&outcomes[0], &outcomes[2]), (&Inserted::Created, &Inserted::Taken), "{}", sample.kind);
        let error = insert(vec![bad]).await.unwrap_err();
        assert!(matches!(error, Error::Broken(_)), "{error}");
    });
}

/// Listings wait for each other, writes do not wait for them.
#[test]
fn listings_leave_room_to_writes() {
    each_postgres(|settings| settings.pool = 4, &async |sample| {
        sample.add("a", A).await;
        let client = sample.owner().await;
        client.batch_execute("BEGIN; LOCK TABLE tags IN ACCESS EXCLUSIVE MODE").await.unwrap();
        let listings: Vec<_> = (0..10)
            .map(|_| sample.store.clone())
            .map(|store| {
                let filter = Filter { tag: Some("t".into()), ..Filter::default() };
                tokio::spawn(async move { store.count(filter, Reading::Now).await })
            })
            .collect();
        sample.until(1, "wait_event_type = 'Lock'").await;
        for _ in 0..5 {
            assert!(!takes(&sample.store, "none", LinkId(999)).await);
        }
        assert!(listings.iter().all(|listing| !listing.is_finished()), "{}", sample.kind);
        client.batch_execute("COMMIT").await.unwrap();
        for listing in listings {
            assert_eq!(listing.await.unwrap().unwrap(), 0);
        }
    });
}

/// A host that takes connections and says nothing does not keep us from the next.
#[test]
fn a_frozen_host_is_passed_by() {
    runtime().block_on(async {
        let frozen = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = frozen.local_addr().unwrap().port();
        let sample = Sample::postgres("postgres", Statements::Prepared, |settings| {
            let url = settings.url.expose().replace("@127.0.0.1:", &format!("@127.0.0.1:{port},127.0.0.1:"));
            settings.url = ServiceUrl::new(url);
            settings.connect_timeout = Duration::from_secs(1);
        })
        .await;
        sample.only_postgres().check_schema().await.unwrap();
        drop(frozen);
    });
}

/// A `BEGIN` that the server refuses, as when somebody cancels it, makes of what follows a transaction for each statement:
/// none of them may write.
#[test]
fn nothing_is_written_without_its_transaction() {
    runtime().block_on(async {
        let servers = tokio::task::spawn_blocking(Servers::shared).await.unwrap();
        let muffle = Muffle::before(servers.port).await;
        let sample = Sample::postgres("postgres", Statements::Prepared, |settings| {
            let url = settings.url.expose().replace(&format!(":{}/", servers.port), &format!(":{}/", muffle.port));
            // What is garbled must be read.
            settings.url = ServiceUrl::new(url + "?sslmode=disable");
        })
        .await;
        sample.add("a", A).await;
        sample.insert(&[("deleted", A, OnConflict::Take)]).await;
        sample.store.change(key("deleted"), Change::Delete, NOW).await.unwrap().unwrap();
        let history = sample.history().await;
        let link = sample.link("a").await;
        muffle.garble.store(true, Ordering::SeqCst);
        sample.store.insert(vec![sample.new_link("b", A, OnConflict::Take)], NOW).await.unwrap_err();
        sample.store.insert(vec![sample.new_link("deleted", B, OnConflict::Take)], NOW).await.unwrap_err();
        sample.store.change(key("a"), edit(B), NOW).await.unwrap_err();
        muffle.garble.store(false, Ordering::SeqCst);
        assert_eq!(sample.history().await, history);
        assert_eq!(sample.link("a").await, link);
        assert_eq!(sample.store.link(key("b")).await.unwrap(), None);
        sample.assert_gapless().await;
    });
}

#[test]
fn warm_requests_pins_and_instances() {
    each_postgres(|_| {}, &async |sample| {
        let store = &sample.store;
        let mut links = Vec::new();
        for (code, clicks) in [("a", 0), ("b", 7), ("c", 6)] {
            let mut new = sample.new_link(code, A, OnConflict::Take);
            new.imported_clicks = clicks;
            new.fields.tags = vec!["t".into()];
            links.push(new);
        }
        store.insert(links, NOW).await.unwrap();
        let asked =
            [WarmWhat::Codes(vec![(0, "a".into()), (0, "b".into())]), WarmWhat::Tag("t".into()), WarmWhat::Top(9)];
        let keys = [vec![key("a"), key("b")], vec![key("a"), key("b"), key("c")], vec![key("b"), key("c"), key("a")]];
        for (what, keys) in asked.iter().zip(&keys) {
            assert_eq!(store.keys_of(what.clone(), 100).await.unwrap(), *keys, "{}", sample.kind);
            assert_eq!(store.keys_of(what.clone(), 1).await.unwrap(), keys[..1]);
        }
        let mut numbers = Vec::new();
        for what in &asked {
            numbers.push(store.ask_warm(what.clone(), NOW).await.unwrap());
        }
        assert_eq!(numbers, [1, 2, 3]);
        let position = store.position().await.unwrap();
        assert_eq!((position.version, position.asked), (3, 3));
        let requests = store.warm_requests(1).await.unwrap();
        assert_eq!(
            requests.iter().map(|request| &request.what).collect::<Vec<_>>(),
            asked[1..].iter().collect::<Vec<_>>()
        );
        let report = |loaded| WarmReport { instance: "i".into(), loaded, missing: 1 };
        for loaded in [1, 2] {
            store.report_warm(1, report(loaded), NOW).await.unwrap();
        }
        assert_eq!(store.warm_reports(1).await.unwrap(), [report(2)]);
        store.ask_warm(WarmWhat::Top(1), UnixMillis(NOW.0 + 86_400_001)).await.unwrap();
        assert_eq!(store.warm_requests(0).await.unwrap().len(), 1, "the others are a day old");
        assert_eq!(store.warm_reports(1).await.unwrap(), []);

        assert_eq!(store.pin(vec![key("a"), key("x"), key("a")], true, NOW).await.unwrap(), 2);
        assert_eq!(store.pin(vec![key("a"), key("b")], true, NOW).await.unwrap(), 1);
        assert_eq!(store.pin(vec![key("x"), key("y")], false, NOW).await.unwrap(), 1);
        assert_eq!(store.pin(vec![key("a")], true, NOW).await.unwrap(), 0);
        assert_eq!(store.pins().await.unwrap(), [key("a"), key("b")], "{}", sample.kind);
        assert_eq!(store.position().await.unwrap().asked, 7, "what changes nothing is not asked");

        store.present("i".into(), true, NOW).await.unwrap();
        store.present("j".into(), true, NOW).await.unwrap();
        store.present("i".into(), true, UnixMillis(NOW.0 + 1)).await.unwrap();
        store.present("j".into(), false, NOW).await.unwrap();
        let instances = store.instances().await.unwrap();
        assert_eq!(
            instances.iter().map(|row| (row.instance.as_str(), row.seen_at.0)).collect::<Vec<_>>(),
            [("i", NOW.0 + 1)]
        );
    });
}

#[test]
fn links_move_in_once() {
    each_postgres(|_| {}, &async |sample| {
        let store = &sample.store;
        let from = Sample::sqlite();
        let rest = Rest {
            store_id: "one".into(),
            generation: 4,
            version: 90,
            links: 3,
            settings: vec![("codes.case".into(), b"sensitive".to_vec())],
            domains: vec![(DomainId(0), String::new()), (DomainId(5), "b.example".into())],
            ranges: vec![("link_ids".into(), 1001)],
            keys: Vec::new(),
            pins: vec![key("a")],
        };
        // What a server settled before is not what the links were made with.
        store.settle("codes.case", b"insensitive".to_vec()).await.unwrap();
        store.number_domains(vec!["b.example".into()]).await.unwrap();
        let mut links = Vec::new();
        for code in ["a", "b", "c"] {
            let mut new = from.new_link(code, A, OnConflict::Take);
            new.fields.tags = vec!["t".into(), "u".into()];
            new.fields.max_visits = Some(3);
            new.imported_clicks = 2;
            let id = new.id;
            from.store.insert(vec![new], NOW).await.unwrap();
            assert!(takes(&from.store, code, id).await);
            links.push(from.link(code).await);
        }
        links[2] = from.store.change(key("c"), Change::Delete, NOW).await.unwrap().unwrap();
        assert!(matches!(store.adopt(links.clone()).await, Err(Error::Schema(_))), "its settings come first");
        assert_eq!(store.adopt_rest(rest.clone(), false).await.unwrap(), (LinkId(0), false));
        assert_eq!(store.settle("codes.case", Vec::new()).await.unwrap(), b"sensitive");
        assert_eq!(store.domains().await.unwrap(), rest.domains, "{}", sample.kind);
        assert_eq!(store.adopt(links[..2].to_vec()).await.unwrap(), LinkId(2));
        // It stopped here, and begins again.
        assert_eq!(store.adopt_rest(rest.clone(), false).await.unwrap(), (LinkId(2), false));
        assert_eq!(store.adopt(links[1..].to_vec()).await.unwrap(), LinkId(3));
        let before = store.position().await.unwrap().generation;
        for was_done in [false, true] {
            assert_eq!(store.adopt_rest(rest.clone(), true).await.unwrap(), (LinkId(3), was_done));
            let position = store.position().await.unwrap();
            assert_eq!((position.version, position.generation), (90, before.max(4) + 1), "{}", sample.kind);
        }
        for link in &links {
            assert_eq!(store.link(link.key).await.unwrap().as_ref(), Some(link), "{}", sample.kind);
        }
        assert_eq!(store.pins().await.unwrap(), [key("a")]);
        assert_eq!(store.lease("link_ids", 1, 10).await.unwrap(), 1001);
        assert_eq!(store.changes(0, 10).await.unwrap(), []);
        let edited = store.change(key("a"), edit(B), NOW).await.unwrap().unwrap();
        assert_eq!(edited.version, 91);
        assert_eq!(store.adopt(links.clone()).await.unwrap(), LinkId(3));
        assert_eq!(sample.link("a").await, edited, "what is there is left alone");
        let refused = store.adopt_rest(Rest { store_id: "two".into(), ..rest.clone() }, false).await.unwrap_err();
        assert!(matches!(&refused, Error::Schema(why) if why.contains("another store")), "{refused}");

        let other = Sample::postgres("postgres", Statements::Prepared, |_| {}).await;
        other.add("own", A).await;
        let refused = other.store.adopt_rest(rest, false).await.unwrap_err();
        assert!(matches!(&refused, Error::Schema(why) if why.contains("links of its own")), "{refused}");
    });
}

#[test]
fn a_hint_follows_a_change() {
    runtime().block_on(async {
        let sample = Sample::postgres("postgres", Statements::Prepared, |_| {}).await;
        let mut hints = sample.only_postgres().listen().await.unwrap().unwrap();
        let hint = async |hints: &mut postgres::Hints| tokio::time::timeout(LIMIT, hints.next()).await.unwrap();
        sample.add("a", A).await;
        hint(&mut hints).await.unwrap();
        sample.store.change(key("a"), edit(B), NOW).await.unwrap().unwrap();
        hint(&mut hints).await.unwrap();
        sample.store.pin(vec![key("a")], true, NOW).await.unwrap();
        hint(&mut hints).await.unwrap();
        sample.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'").await;
        assert!(hint(&mut hints).await.is_err_and(|error| error.is_transient()));

        let pooled = Sample::postgres("pgbouncer", Statements::Unnamed, |_| {}).await;
        assert!(pooled.only_postgres().listen().await.unwrap().is_none(), "there is no way past the pooler");
    });
}

/// A call that finds a lock held ends by itself, its connection with it, and holds nothing.
#[test]
fn a_call_that_takes_too_long_ends_with_its_connection() {
    let short = |settings: &mut config::Postgres| {
        settings.statement_timeout = Duration::from_millis(300);
        settings.lookup_timeout = Duration::from_millis(300);
    };
    each_postgres(short, &async |sample| {
        sample.add("a", A).await;
        let (servers, database) = sample.behind.as_ref().unwrap();
        let url = format!("postgres://{OWNER}@127.0.0.1:{}/{database}", servers.port);
        let (client, connection) = tokio_postgres::connect(&url, NoTls).await.unwrap();
        tokio::spawn(connection);
        client.batch_execute("BEGIN; LOCK TABLE links IN ACCESS EXCLUSIVE MODE").await.unwrap();
        let open = sample.only_postgres().figures().open;
        assert!(open > 0);
        let late = sample.store.look_up(vec![key("a")]).await.unwrap_err();
        assert!(late.is_transient(), "{late}");
        assert!(sample.only_postgres().figures().open < open, "{}", sample.kind);
        let late = sample.store.insert(vec![sample.new_link("b", A, OnConflict::Take)], NOW).await.unwrap_err();
        assert!(late.is_transient(), "{late}");
        // Nor does the server go on waiting for the lock.
        sample.until(0, "wait_event_type = 'Lock'").await;
        client.batch_execute("COMMIT").await.unwrap();
        assert_eq!(sample.insert(&[("b", A, OnConflict::Take)]).await, [Inserted::Created], "{}", sample.kind);
        assert!(matches!(sample.store.look_up(vec![key("a")]).await.unwrap()[..], [Found::Entry(_)]));
        sample.assert_gapless().await;
    });
}

/// After a failover a former primary takes no writes; once it does again, or another one does, nothing remembers.
#[test]
fn a_server_that_takes_no_writes_is_left() {
    runtime().block_on(async {
        let sample = Sample::postgres("postgres", Statements::Prepared, |_| {}).await;
        sample.add("a", A).await;
        let (_, database) = sample.behind.as_ref().unwrap();
        let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename <> 'owner' AND datname = current_database()";
        sample.run(&format!("ALTER DATABASE {database} SET default_transaction_read_only = on; {end}")).await;
        // The pool may still have one that was ended.
        for attempt in 0..20 {
            let error = sample.store.insert(vec![sample.new_link("b", A, OnConflict::Take)], NOW).await.unwrap_err();
            assert!(error.is_transient(), "{error}");
            if error.to_string().contains("25006") {
                break;
            }
            assert!(attempt < 19, "{error}");
        }
        let error = sample.store.position().await.unwrap_err();
        assert!(error.is_transient() && error.to_string().contains("takes no writes"), "{error}");
        let url = sample.behind.as_ref().unwrap().0.settings(database, Statements::Prepared);
        let (client, connection) =
            tokio_postgres::connect(url.migrate_url.unwrap().expose(), NoTls).await.unwrap();
        tokio::spawn(connection);
        client.batch_execute("SET default_transaction_read_only = off").await.unwrap();
        client.batch_execute(&format!("ALTER DATABASE {database} RESET ALL")).await.unwrap();
        assert_eq!(sample.insert(&[("b", A, OnConflict::Take)]).await, [Inserted::Created]);
        sample.store.position().await.unwrap();
    });
}

/// Between us and the server; can keep the server's answers on connections that exist, and make what is no SQL of every
/// `BEGIN`.
struct Muffle {
    port: u16,
    garble: Arc<AtomicBool>,
    /// Connections below this number are muted.
    muted: Arc<AtomicU32>,
    count: Arc<AtomicU32>,
}

impl Muffle {
    async fn before(port: u16) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let this = Self {
            port: listener.local_addr().unwrap().port(),
            garble: Arc::default(),
            muted: Arc::default(),
            count: Arc::default(),
        };
        let (garble, muted, count) = (this.garble.clone(), this.muted.clone(), this.count.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let number = count.fetch_add(1, Ordering::SeqCst);
                let server = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_server, mut to_server) = server.into_split();
                let garble = garble.clone();
                tokio::spawn(async move {
                    let mut bytes = vec![0; 65_536];
                    while let Ok(count @ 1..) = from_client.read(&mut bytes).await {
                        let said = &mut bytes[..count];
                        if garble.load(Ordering::SeqCst) {
                            let begin = said.windows(6).position(|word| word == b"BEGIN ");
                            begin.into_iter().for_each(|place| said[place] = b'?');
                        }
                        if to_server.write_all(said).await.is_err() {
                            return;
                        }
                    }
                });
                let muted = muted.clone();
                tokio::spawn(async move {
                    let mut bytes = vec![0; 65_536];
                    while let Ok(count @ 1..) = from_server.read(&mut bytes).await {
                        if number >= muted.load(Ordering::SeqCst) && to_client.write_all(&bytes[..count]).await.is_err()
                        {
                            return;
                        }
                    }
                });
            }
        });
        this
    }

    fn mute(&self) {
        self.muted.store(self.count.load(Ordering::SeqCst), Ordering::SeqCst);
    }
}

#[test]
fn a_create_that_was_committed_unheard_is_no_failure() {
    runtime().block_on(async {
        let servers = tokio::task::spawn_blocking(Servers::shared).await.unwrap();
        let muffle = Muffle::before(servers.port).await;
        let sample = Sample::postgres("postgres", Statements::Prepared, |settings| {
            let url = settings.url.expose().replace(&format!(":{}/", servers.port), &format!(":{}/", muffle.port));
            settings.url = ServiceUrl::new(url);
            settings.statement_timeout = Duration::from_millis(500);
        })
        .await;
        sample.add("a", A).await;
        sample.insert(&[("b", A, OnConflict::Take)]).await;
        muffle.mute();
        // Of both writes in it only one is new.
        let rows = [("a", B, OnConflict::Refuse), ("c", A, OnConflict::Take)];
        assert_eq!(sample.insert(&rows).await, [Inserted::Taken, Inserted::Created]);
        // And one more that asked to cancel it.
        assert!(muffle.count.load(Ordering::SeqCst) > muffle.muted.load(Ordering::SeqCst), "it was heard of anew");
        sample.assert_gapless().await;
    });
}

#[test]
fn tls_is_as_strict_as_the_url_says() {
    runtime().block_on(async {
        let servers = tokio::task::spawn_blocking(Servers::shared).await.unwrap();
        let database = servers.database().await;
        let file = |name: &str| servers.dir.path().join(name).display().to_string();
        let check = async |host: &str, query: &str, works: bool| {
            let mut settings = servers.settings(&database, Statements::Prepared);
            let query = query.replace("CA", &file("ca.pem")).replace("OTHER", &file("other.pem"));
            let url = format!("postgres://{ROLE_IN_URL}@{host}:{}/{database}?{query}", servers.port);
            settings.url = ServiceUrl::new(url);
            let checked = Postgres::open(&settings).unwrap().check_schema().await;
            assert_eq!(checked.is_ok(), works, "{host} {query}: {checked:?}");
        };
        check("127.0.0.1", "sslmode=disable", true).await;
        check("127.0.0.1", "sslmode=prefer", true).await;
        check("127.0.0.1", "sslmode=require", true).await;
        check("127.0.0.1", "sslmode=require&sslrootcert=OTHER", false).await;
        check("127.0.0.1", "sslmode=verify-ca&sslrootcert=CA", true).await;
        check("localhost", "sslmode=verify-ca&sslrootcert=OTHER", false).await;
        check("127.0.0.1", "sslmode=verify-full&sslrootcert=CA", false).await;
        check("localhost", "sslmode=verify-full&sslrootcert=CA", true).await;
        check("localhost", "sslmode=verify-full&sslrootcert=OTHER", false).await;
        check("localhost", "sslmode=require&channel_binding=require", true).await;

        let mut settings = servers.settings(&database, Statements::Prepared);
        settings.url = ServiceUrl::new("postgres://a:secret@b/c?sslmode=verify-full&sslrootcert=/none".into());
        let error = Postgres::open(&settings).unwrap_err();
        assert!(matches!(&error, Error::Schema(why) if why.contains("/none") && !why.contains("secret")), "{error}");
    });
}

#[test]
fn the_schema_is_checked_and_migrated() {
    runtime().block_on(async {
        let servers = tokio::task::spawn_blocking(Servers::shared).await.unwrap();
        servers.run("postgres", "CREATE DATABASE bare").await;
        let check = async |change: &dyn Fn(&mut config::Postgres), transient: bool, want: &str| {
            let mut settings = servers.settings("bare", Statements::Prepared);
            settings.connect_timeout = Duration::from_secs(1);
            change(&mut settings);
            let error = Postgres::open(&settings).unwrap().check_schema().await.unwrap_err();
            assert_eq!(error.is_transient(), transient, "{error}");
            assert!(error.to_string().contains(want) && !error.to_string().contains("app-password"), "{error}");
        };
        let url = |settings: &mut config::Postgres, from: &str, to: &str| {
            settings.url = ServiceUrl::new(settings.url.expose().replace(from, to));
        };
        check(&|_| {}, false, "waypost migrate").await;
        check(&|settings| url(settings, "/bare", "/nowhere"), false, "\"nowhere\" does not exist").await;
        check(&|settings| url(settings, "app-password", "wrong-password"), false, "28P01").await;
        let port = servers.port;
        check(&|settings| url(settings, &format!(":{port}/"), &format!(":{}/", free_port())), true, "").await;

        let settings = servers.settings("bare", Statements::Prepared);
        assert_eq!(postgres::pending(&settings).await.unwrap().len(), postgres::MIGRATIONS.len());
        let tasks: Vec<_> = (0..3)
            .map(|_| settings.clone())
            .map(|settings| tokio::spawn(async move { postgres::migrate(&settings).await.unwrap().len() }))
            .collect();
        let mut applied = 0;
        for task in tasks {
            applied += task.await.unwrap();
        }
        assert_eq!(applied, postgres::MIGRATIONS.len(), "each once");
        assert!(postgres::pending(&settings).await.unwrap().is_empty());
        check(&|_| {}, false, "--grants").await;
        postgres::grants(&settings, ROLE).await.unwrap();
        let store = Postgres::open(&settings).unwrap();
        store.check_schema().await.unwrap();
        servers.run("postgres", "CREATE DATABASE pooled").await;
        let mut pooled = servers.settings("pooled", Statements::Unnamed);
        pooled.migrate_url = None;
        pooled.url = ServiceUrl::new(format!("postgres://{OWNER}@127.0.0.1:{}/pooled", servers.pooler_port));
        let tasks: Vec<_> = (0..5)
            .map(|_| pooled.clone())
            .map(|settings| tokio::spawn(async move { postgres::migrate(&settings).await.unwrap().len() }))
            .collect();
        let mut applied = 0;
        for task in tasks {
            applied += task.await.unwrap();
        }
        assert_eq!(applied, postgres::MIGRATIONS.len(), "each once, through the pooler");
        let (client, connection) = tokio_postgres::connect(pooled.url.expose(), NoTls).await.unwrap();
        tokio::spawn(connection);
        let left = "SELECT current_setting('lock_timeout') || current_setting('client_min_messages')
          || (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))";
        assert_eq!(client.query_typed(left, &[]).await.unwrap()[0].get::<_, &str>(0), "0notice0");

        servers.run("postgres", "CREATE DATABASE foreigner").await;
        servers.run("foreigner", "CREATE TABLE schema_migrations (version text PRIMARY KEY)").await;
        let role = ROLE.replace('"', "\"\"");
        servers.run("foreigner", &format!("GRANT SELECT ON schema_migrations TO \"{role}\"")).await;
        check(&|settings| url(settings, "/bare", "/foreigner"), false, "another program").await;
        let foreign = servers.settings("foreigner", Statements::Prepared);
        let error = postgres::migrate(&foreign).await.unwrap_err();
        assert!(error.to_string().contains("another program"), "{error}");

        servers.run("bare", "INSERT INTO schema_migrations (number, name, checksum) VALUES (99, 'new', 'x')").await;
        check(&|_| {}, false, "newer waypost").await;
        assert!(matches!(postgres::migrate(&settings).await, Err(Error::Schema(_))));
    });
}

#[test]
fn a_standby_that_is_away_is_not_waited_for() {
    each_postgres(
        |settings| {
            let url = format!("postgres://{ROLE_IN_URL}@127.0.0.1:{}/none", free_port());
            settings.replica_url = Some(ServiceUrl::new(url));
        },
        &async |sample| {
            sample.add("a", A).await;
            assert_eq!(sample.store.count(Filter::default(), Reading::Lately).await.unwrap(), 1);
            let page = sample.store.page(Filter::default(), None, 10, Reading::Lately).await.unwrap();
            assert_eq!(page, [sample.link("a").await], "{}", sample.kind);
        },
    );
}

/// Writes that share a transaction do not share a failure.
#[test]
fn a_write_that_is_refused_refuses_no_other() {
    each_store(&async |sample| {
        let id = sample.add("a", A).await.id;
        let mut tasks = Vec::new();
        for n in 0..40 {
            let (store, mut new) = (sample.store.clone(), sample.new_link(&format!("b{n}"), A, OnConflict::Take));
            if n == 20 {
                new.id = id;
            }
            tasks.push(tokio::spawn(async move { store.insert(vec![new], NOW).await }));
        }
        for (n, task) in tasks.into_iter().enumerate() {
            let outcome = task.await.unwrap();
            assert_eq!(outcome.is_ok(), n != 20, "{}: {n}: {outcome:?}", sample.kind);
            assert!(outcome.is_ok_and(|made| made == [Inserted::Created]) || n == 20);
        }
        sample.assert_gapless().await;
    });
}

/// Connections end by their age, one by one, and nobody notices.
#[test]
fn connections_are_replaced() {
    runtime().block_on(async {
        let young = |settings: &mut config::Postgres| {
            settings.max_lifetime = Duration::from_millis(1);
            settings.pool = 2;
        };
        let sample = Sample::postgres("postgres", Statements::Prepared, young).await;
        let (servers, database) = sample.behind.as_ref().unwrap();
        let url = format!("postgres://{OWNER}@127.0.0.1:{}/{database}", servers.port);
        let (client, connection) = tokio_postgres::connect(&url, NoTls).await.unwrap();
        tokio::spawn(connection);
        let mut seen = std::collections::HashSet::new();
        for n in 0..10 {
            sample.add(&format!("a{n}"), A).await;
            let sql =
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'waypost' AND datname = current_database()";
            for row in client.query_typed(sql, &[]).await.unwrap() {
                seen.insert(row.get::<_, i32>(0));
            }
        }
        assert!(seen.len() >= 5, "{seen:?}");
        assert!(sample.only_postgres().figures().open <= 2);
    });
}

/// All transactions wait for a lock that another instance holds; look-ups and polls do not.
#[test]
fn look_ups_find_connections_while_writes_wait() {
    let small = |settings: &mut config::Postgres| {
        settings.pool = 2;
        settings.pool_timeout = Duration::from_millis(200);
    };
    each_postgres(small, &async |sample| {
        sample.add("a", A).await;
        // The first poll of a store writes its timeline down.
        sample.store.position().await.unwrap();
        let (servers, database) = sample.behind.as_ref().unwrap();
        let url = format!("postgres://{OWNER}@127.0.0.1:{}/{database}", servers.port);
        let (client, connection) = tokio_postgres::connect(&url, NoTls).await.unwrap();
        tokio::spawn(connection);
        client.batch_execute("BEGIN; SELECT version FROM feed FOR UPDATE").await.unwrap();
        let tasks: Vec<_> = (0..10)
            .map(|_| sample.store.clone())
            .map(|store| tokio::spawn(async move { store.change(key("a"), edit(B), NOW).await }))
            .collect();
        let new = sample.new_link("b", A, OnConflict::Take);
        let store = sample.store.clone();
        let create = tokio::spawn(async move { store.insert(vec![new], NOW).await });
        for _ in 0..50 {
            assert!(matches!(sample.store.look_up(vec![key("a")]).await.unwrap()[..], [Found::Entry(_)]));
            sample.store.position().await.unwrap();
        }
        assert!(tasks.iter().all(|task| !task.is_finished()), "{}", sample.kind);
        client.batch_execute("COMMIT").await.unwrap();
        for task in tasks {
            task.await.unwrap().unwrap().unwrap();
        }
        assert_eq!(create.await.unwrap().unwrap(), [Inserted::Created]);
        sample.assert_gapless().await;
    });
}

#[test]
fn a_standby_is_read_while_it_is_close_behind() {
    runtime().block_on(async {
        let servers = tokio::task::spawn_blocking(Servers::shared).await.unwrap();
        let (standby, port) = {
            let servers = servers.clone();
            tokio::task::spawn_blocking(move || servers.standby()).await.unwrap()
        };
        let behind = |settings: &mut config::Postgres, max_lag: Duration| {
            let url = settings.url.expose().replace(&format!(":{}/", servers.port), &format!(":{port}/"));
            (settings.replica_url, settings.replica_max_lag) = (Some(ServiceUrl::new(url)), max_lag);
        };
        let hour = Duration::from_secs(3600);
        let sample = Sample::postgres("postgres", Statements::Prepared, |settings| behind(settings, hour)).await;
        let (_, database) = sample.behind.as_ref().unwrap();
        let mut settings = servers.settings(database, Statements::Prepared);
        behind(&mut settings, Duration::ZERO);
        let strict = Store::Postgres(Postgres::open(&settings).unwrap());
        let url = format!("postgres://{OWNER}@127.0.0.1:{port}/{database}");
        let (client, connection) = loop {
            // The database has not come over yet.
            match tokio_postgres::connect(&url, NoTls).await {
                Ok(connected) => break connected,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        tokio::spawn(connection);
        let count = async || sample.store.count(Filter::default(), Reading::Lately).await.unwrap();
        sample.add("a", A).await;
        // Asked there: the store answers from the primary as long as the standby has no tables.
        let arrived = async {
            while !client.query_typed("SELECT 1 FROM links", &[]).await.is_ok_and(|rows| rows.len() == 1) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(LIMIT, arrived).await.unwrap();
        client.batch_execute("SELECT pg_wal_replay_pause()").await.unwrap();
        let paused = "SELECT pg_get_wal_replay_pause_state() = 'paused'";
        while !client.query_typed(paused, &[]).await.unwrap()[0].get::<_, bool>(0) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        sample.add("b", A).await;
        assert_eq!(count().await, 1, "from the standby, which is close behind");
        assert_eq!(sample.store.count(Filter::default(), Reading::Now).await.unwrap(), 2);
        // The transaction that it replayed last is some time ago.
        assert_eq!(strict.count(Filter::default(), Reading::Lately).await.unwrap(), 2, "it is too far behind");
        client.batch_execute("SELECT pg_wal_replay_resume()").await.unwrap();
        drop(standby);
        assert_eq!(count().await, 2, "it is gone");
    });
}
