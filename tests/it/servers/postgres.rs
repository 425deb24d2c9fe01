//! Postgres: one cluster for all tests with a database for each, or one of a test's own that it may break; PgBouncer in
//! front of it, a standby behind it.
//!
//! In: SQL. Out: what psql prints of it, which shares no code with what is tested.
//! Never: a superuser for what is tested: it has the role that owns the database and one that owns nothing.
//! At the limit: 200 connections to a cluster; PgBouncer is the one that people deploy, but for where it is and who may come.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::{PASSWORD, Process, READY, Tls, becomes_ready, folder, has_ended, log, run, start, unprivileged, write};
use crate::support::{eventually, throughout};

/// Owns each test's database, and so may migrate.
const OWNER: &str = "waypost_owner";
/// Owns nothing: what a server should be.
pub(crate) const ROLE: &str = "waypost_app";

/// Where Debian puts the programs of its newest version, or wherever PATH leads.
static PROGRAMS: LazyLock<PathBuf> = LazyLock::new(|| {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().filter_map(|entry| {
        let path = entry.ok()?.path();
        Some((path.file_name()?.to_str()?.parse::<u32>().ok()?, path.join("bin")))
    });
    versions.max().map_or_else(PathBuf::new, |(_, path)| path)
});

/// A cluster that was never started. All others are copies of it: `initdb` takes seven times as long as `cp`.
struct Template {
    path: PathBuf,
    /// Its keeper removes the folder when the tests end.
    _holds: Process,
}

static TEMPLATE: LazyLock<Template> = LazyLock::new(|| {
    let path = folder().keep();
    let _holds = Process::spawn(&path, "TERM", Path::new("sleep"), &["infinity".to_owned()]);
    write(&path.join("password"), PASSWORD);
    let mut initdb = Command::new(PROGRAMS.join("initdb"));
    initdb.args(["--pgdata=data", "--username=postgres", "--pwfile=password", "--auth=scram-sha-256"]);
    initdb.args(["--encoding=UTF8", "--locale=C", "--no-sync"]);
    run(unprivileged(&mut initdb, &path));
    Template { path, _holds }
});

/// What a cluster's databases know of it, too.
#[derive(Debug)]
struct At {
    port: u16,
    tls: Option<Tls>,
    pooler: OnceLock<Pooler>,
}

impl At {
    fn url(&self, role: &str, port: u16, database: &str) -> String {
        let mut url = format!("postgres://{role}:{PASSWORD}@127.0.0.1:{port}/{database}");
        if let Some(tls) = &self.tls {
            url += &format!("?sslmode=verify-full&sslrootcert={}", tls.authority.display());
        }
        url
    }

    fn superuser(&self, database: &str) -> String {
        self.url("postgres", self.port, database)
    }

    fn pooler(&self) -> &Pooler {
        self.pooler.get_or_init(|| Pooler::start(self))
    }
}

/// A cluster.
#[derive(Debug)]
pub(crate) struct Postgres {
    // Ends before its folder goes.
    process: Option<Process>,
    folder: TempDir,
    at: Arc<At>,
    frozen: Vec<Pid>,
}

impl Postgres {
    /// The one that all tests share. None of them can stop it.
    pub(crate) fn shared() -> &'static Self {
        // It is never dropped: its keeper ends it.
        static SHARED: LazyLock<Postgres> = LazyLock::new(|| {
            let shared = Postgres::own();
            // Nobody kills it: to wait for its disk would prove nothing.
            shared.set("fsync", "off");
            shared
        });
        &SHARED
    }

    /// One of a test's own.
    pub(crate) fn own() -> Self {
        let folder = folder();
        Self::initialised(folder, None)
    }

    /// One that takes no connection without TLS.
    pub(crate) fn own_with_tls() -> Self {
        let folder = folder();
        let tls = Tls::new(folder.path());
        Self::initialised(folder, Some(&tls))
    }

    fn initialised(folder: TempDir, tls: Option<&Tls>) -> Self {
        let path = folder.path();
        run(unprivileged(Command::new("cp").arg("-a").arg(TEMPLATE.path.join("data")).arg("data"), path));
        let kind = if tls.is_some() { "hostssl" } else { "host" };
        let rules = ["all", "replication"].map(|what| format!("{kind} {what} all 127.0.0.1/32 scram-sha-256\n"));
        write(&path.join("data/pg_hba.conf"), &rules.concat());
        let cluster = Self::run(folder, tls);
        for role in [OWNER, ROLE] {
            cluster.sql(&format!("CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'"));
        }
        cluster
    }

    /// Starts the cluster of a folder, for the first time.
    fn run(folder: TempDir, tls: Option<&Tls>) -> Self {
        let at = |port| At { port, tls: tls.cloned(), pooler: OnceLock::new() };
        let spawn = |port| Self::spawn(folder.path(), &at(port));
        let (port, process) = start(folder.path(), spawn, |port| answers(&at(port).superuser("postgres")));
        Self { process: Some(process), at: Arc::new(at(port)), folder, frozen: Vec::new() }
    }

    fn spawn(folder: &Path, at: &At) -> Process {
        let mut settings = vec![
            format!("port={}", at.port),
            "listen_addresses=127.0.0.1".to_owned(),
            "unix_socket_directories=".to_owned(),
            "max_connections=200".to_owned(),
            "timezone=UTC".to_owned(),
        ];
        if let Some(tls) = &at.tls {
            settings.push("ssl=on".to_owned());
            settings.push(format!("ssl_cert_file={}", tls.certificate.display()));
            settings.push(format!("ssl_key_file={}", tls.key.display()));
        }
        let settings = settings.into_iter().flat_map(|setting| ["-c".to_owned(), setting]);
        let arguments: Vec<String> = ["-D".to_owned(), "data".to_owned()].into_iter().chain(settings).collect();
        // Of SIGKILL a bit of System V shared memory would stay.
        Process::spawn(folder, "QUIT", &PROGRAMS.join("postgres"), &arguments)
    }

    /// What psql prints of SQL that a superuser runs in database postgres: rows, cells between `|`.
    #[track_caller]
    pub(crate) fn sql(&self, sql: &str) -> String {
        psql(&self.at.superuser("postgres"), sql)
    }

    /// A new database. It goes when it is dropped, and with the cluster.
    pub(crate) fn database(&self) -> Database {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("waypost_{}", NEXT.fetch_add(1, Ordering::Relaxed));
        self.sql(&format!("CREATE DATABASE {name} OWNER {OWNER} TEMPLATE template0"));
        Database { name, at: Arc::clone(&self.at) }
    }

    pub(crate) fn port(&self) -> u16 {
        self.at.port
    }

    /// Ends it in order: whoever is connected is told and cut off (pg_ctl's mode "fast").
    pub(crate) fn stop(&mut self) {
        let process = self.process.take().unwrap();
        process.signal(Signal::INT);
        process.wait();
    }

    /// SIGKILL for every process of it, as if the machine had lost them.
    pub(crate) fn kill(&mut self) {
        let process = self.process.take().unwrap();
        // No child begins or ends meanwhile.
        process.signal(Signal::STOP);
        let children = process.children();
        process.signal(Signal::KILL);
        for child in &children {
            let _ = kill_process(*child, Signal::KILL);
        }
        self.frozen.clear();
        eventually(READY, "all of its processes end", || children.iter().all(|child| has_ended(*child)));
        process.wait();
    }

    /// Starts it again, at the same port; waits until it answers.
    pub(crate) fn start(&mut self) {
        assert!(self.process.is_none(), "it runs");
        let process = Self::spawn(self.folder.path(), &self.at);
        let ready = becomes_ready(&process, || answers(&self.at.superuser("postgres")));
        assert!(ready, "it does not start again: {}", log(self.folder.path()));
        self.process = Some(process);
    }

    /// The processes that serve a database, or refuse to. Asks their titles, for which no connection is needed: "postgres:
    /// ROLE DATABASE HOST(PORT) STATE".
    pub(crate) fn backends(&self, database: &Database) -> Vec<Pid> {
        let serves = |pid: &Pid| {
            let title = std::fs::read_to_string(format!("/proc/{}/cmdline", pid.as_raw_nonzero()));
            title.is_ok_and(|title| title.split(' ').nth(2) == Some(&database.name))
        };
        self.process.as_ref().unwrap().children().into_iter().filter(serves).collect()
    }

    /// SIGSTOP for every process of it: connections stay, and nobody answers.
    pub(crate) fn freeze(&mut self) {
        let process = self.process.as_ref().unwrap();
        process.signal(Signal::STOP);
        self.frozen = process.children();
        for child in &self.frozen {
            let _ = kill_process(*child, Signal::STOP);
        }
    }

    pub(crate) fn thaw(&mut self) {
        for child in self.frozen.drain(..) {
            let _ = kill_process(child, Signal::CONT);
        }
        if let Some(process) = &self.process {
            process.signal(Signal::CONT);
        }
    }

    /// Another cluster that follows this one (streaming, asynchronous), with all of its databases.
    pub(crate) fn standby(&self) -> Self {
        let folder = folder();
        let mut backup = Command::new(PROGRAMS.join("pg_basebackup"));
        backup.args(["--pgdata=data", "--write-recovery-conf", "--checkpoint=fast", "--no-sync", "--dbname"]);
        run(unprivileged(backup.arg(self.at.superuser("postgres")), folder.path()));
        Self::run(folder, self.at.tls.as_ref())
    }

    /// From now on a commit is acknowledged when its standby has it, too.
    pub(crate) fn waits_for_standby(&self) {
        self.set("synchronous_standby_names", "*");
        let state = "SELECT coalesce(max(sync_state), '') FROM pg_stat_replication";
        eventually(READY, "the standby is synchronous", || self.sql(state) == "sync");
    }

    /// A standby gets nothing more of what its primary writes, and has replayed all that it got.
    pub(crate) fn unfollow(&self) {
        self.set("primary_conninfo", "");
        let is_behind = "SELECT EXISTS (SELECT 1 FROM pg_stat_wal_receiver)
            OR pg_last_wal_receive_lsn() <> pg_last_wal_replay_lsn()";
        eventually(READY, "it follows nobody", || self.sql(is_behind) == "f");
    }

    /// Makes a primary of a standby.
    pub(crate) fn promote(&self) {
        assert_eq!(self.sql("SELECT pg_promote()"), "t");
    }

    /// Once it is started again, or told so, it takes no writes.
    pub(crate) fn will_be_read_only(&self) {
        self.sql("ALTER SYSTEM SET default_transaction_read_only = on");
    }

    pub(crate) fn reload(&self) {
        self.sql("SELECT pg_reload_conf()");
    }

    fn set(&self, setting: &str, value: &str) {
        self.sql(&format!("ALTER SYSTEM SET {setting} = '{value}'"));
        self.reload();
    }

    /// Whether it ever told its log so.
    pub(crate) fn says(&self, words: &str) -> bool {
        log(self.folder.path()).contains(words)
    }

    /// The pooler of this cluster leads to another one from now on, as a person makes it.
    pub(crate) fn pooler_leads_to(&self, other: &Self) {
        self.at.pooler().leads_to(&self.at, other.port());
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.thaw();
    }
}

/// A database of a test's own.
#[derive(Debug)]
pub(crate) struct Database {
    name: String,
    at: Arc<At>,
}

impl Database {
    /// As the role that owns nothing.
    pub(crate) fn url(&self) -> String {
        self.url_at(self.at.port)
    }

    /// As the role that owns the database.
    pub(crate) fn owner_url(&self) -> String {
        self.owner_url_at(self.at.port)
    }

    /// The same at another port: a standby's or a proxy's.
    pub(crate) fn owner_url_at(&self, port: u16) -> String {
        self.at.url(OWNER, port, &self.name)
    }

    /// As the role that owns nothing, through PgBouncer in transaction mode.
    pub(crate) fn pooled_url(&self) -> String {
        // PgBouncer itself wants no TLS.
        format!("postgres://{ROLE}:{PASSWORD}@127.0.0.1:{}/{}", self.at.pooler().port, self.name)
    }

    /// As the role that owns nothing, at another port: a standby's or a proxy's.
    pub(crate) fn url_at(&self, port: u16) -> String {
        self.at.url(ROLE, port, &self.name)
    }

    /// As the role that owns nothing, by way of somebody at this address.
    pub(crate) fn url_through(&self, address: SocketAddr) -> String {
        self.url_at(address.port()).replace("@127.0.0.1:", &format!("@{}:", address.ip()))
    }

    /// As the role that owns nothing, of this cluster and another one whichever takes writes.
    pub(crate) fn url_of_two(&self, port: u16) -> String {
        let one = format!("@127.0.0.1:{}/", self.at.port);
        let two = format!("@127.0.0.1:{},127.0.0.1:{port}/", self.at.port);
        format!("{}?target_session_attrs=read-write", self.url().replace(&one, &two))
    }

    /// The same in a cluster that followed this one.
    pub(crate) fn of(&self, cluster: &Postgres) -> Self {
        Self { name: self.name.clone(), at: Arc::clone(&cluster.at) }
    }

    /// What psql prints of SQL that a superuser runs: rows, cells between `|`.
    #[track_caller]
    pub(crate) fn sql(&self, sql: &str) -> String {
        psql(&self.at.superuser(&self.name), sql)
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // One that lies in a test's own cluster goes with it, which may be frozen or gone by now.
        if self.at.port == Postgres::shared().port() {
            let url = self.at.superuser("postgres");
            let _ = try_psql(&url, &format!("DROP DATABASE {} WITH (FORCE)", self.name));
        }
    }
}

/// PgBouncer, in transaction mode.
#[derive(Debug)]
struct Pooler {
    port: u16,
    // Ends before its folder goes.
    process: Process,
    folder: TempDir,
}

impl Pooler {
    fn configure(folder: &Path, at: &At, port: u16, server: u16) {
        let tls = at.tls.as_ref().map_or(String::new(), |tls| {
            format!("server_tls_sslmode = verify-full\nserver_tls_ca_file = {}\n", tls.authority.display())
        });
        let shipped = include_str!("../../../deploy/compose/pgbouncer/pgbouncer.ini");
        let mut config = shipped.to_owned();
        for (key, ours) in [
            ("%include", format!("[databases]\n* = host=127.0.0.1 port={server}")),
            ("listen_addr", "listen_addr = 127.0.0.1".to_owned()),
            ("listen_port", format!("listen_port = {port}\nunix_socket_dir =")),
            ("auth_file", "auth_file = users".to_owned()),
        ] {
            let mut lines = shipped.lines().filter(|line| line.split([' ', '=']).next() == Some(key));
            let line = lines.next().unwrap_or_else(|| panic!("the shipped pgbouncer.ini has no {key}"));
            config = config.replace(line, &ours);
        }
        write(&folder.join("pgbouncer.ini"), &format!("{config}{tls}"));
    }

    /// To another server, with SIGHUP.
    fn leads_to(&self, at: &At, server: u16) {
        Self::configure(self.folder.path(), at, self.port, server);
        self.process.signal(Signal::HUP);
    }

    fn start(at: &At) -> Self {
        let folder = folder();
        let path = folder.path();
        let users = [OWNER, ROLE].map(|role| format!("\"{role}\" \"{PASSWORD}\"\n"));
        write(&path.join("users"), &users.concat());
        let spawn = |port: u16| {
            Self::configure(path, at, port, at.port);
            // Where Debian has it, and a user's PATH ends before.
            let program = Path::new("/usr/sbin/pgbouncer");
            let program = if program.exists() { program } else { Path::new("pgbouncer") };
            Process::spawn(path, "KILL", program, &["pgbouncer.ini".to_owned()])
        };
        let (port, process) =
            start(path, spawn, |port| answers(&format!("postgres://{ROLE}:{PASSWORD}@127.0.0.1:{port}/postgres")));
        Self { port, process, folder }
    }
}

/// Runs SQL by psql and returns what it prints: rows, cells between `|`.
#[track_caller]
pub(crate) fn psql(url: &str, sql: &str) -> String {
    try_psql(url, sql).unwrap_or_else(|problem| panic!("{sql}: {problem}"))
}

/// What psql prints, or its complaint.
pub(crate) fn try_psql(url: &str, sql: &str) -> Result<String, String> {
    let mut command = Command::new(PROGRAMS.join("psql"));
    command.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", url, "-c", sql]);
    let output = command.env("PGCONNECT_TIMEOUT", "5").stdin(Stdio::null()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

fn answers(url: &str) -> bool {
    try_psql(url, "SELECT 1").is_ok()
}

#[test]
fn databases_of_the_shared_cluster() {
    let (one, other) = (Postgres::shared().database(), Postgres::shared().database());
    for (database, number) in [(&one, 1), (&other, 2)] {
        psql(&database.owner_url(), &format!("CREATE TABLE t AS SELECT {number} AS n; GRANT SELECT ON t TO {ROLE}"));
    }
    for (database, number) in [(&one, "1"), (&other, "2")] {
        for url in [database.url(), database.pooled_url()] {
            assert_eq!(psql(&url, "SELECT n, current_user FROM t"), format!("{number}|{ROLE}"));
            let refused = try_psql(&url, "CREATE TABLE mine ()").unwrap_err();
            assert!(refused.contains("permission denied"), "{refused}");
            let wrong = url.replace(PASSWORD, "wrong");
            assert!(try_psql(&wrong, "SELECT 1").is_err(), "{wrong}");
        }
    }
    // Transactions share connections, sessions do not.
    let pooled = one.pooled_url();
    assert!(try_psql(&pooled, "PREPARE p AS SELECT 1; SELECT 1").is_ok());
    assert_eq!(psql(&pooled, "SELECT count(*) FROM pg_prepared_statements"), "1", "another client's statement");
    let name = other.name.clone();
    drop(other);
    let count = format!("SELECT count(*) FROM pg_database WHERE datname = '{name}'");
    assert_eq!(Postgres::shared().sql(&count), "0");
}

#[test]
fn a_cluster_that_breaks() {
    let mut cluster = Postgres::own();
    let database = cluster.database();
    database.sql("CREATE TABLE t (n int)");
    let mut rows = 0;
    let mut add = |cluster: &Postgres| {
        rows += 1;
        database.sql(&format!("INSERT INTO t VALUES ({rows})"));
        assert_eq!(database.sql("SELECT count(*) FROM t"), rows.to_string());
        assert_eq!(cluster.sql("SHOW fsync"), "on");
    };
    add(&cluster);
    cluster.stop();
    assert!(try_psql(&database.url(), "SELECT 1").is_err());
    cluster.start();
    add(&cluster);
    cluster.kill();
    assert!(try_psql(&database.url(), "SELECT 1").is_err());
    cluster.start();
    add(&cluster);

    let pooled = database.pooled_url();
    assert_eq!(psql(&pooled, "SELECT 1"), "1");
    cluster.freeze();
    let asking = std::thread::spawn(move || psql(&pooled, "SELECT 2"));
    throughout(Duration::from_millis(300), || assert!(!asking.is_finished(), "a frozen one answers"));
    cluster.thaw();
    assert_eq!(asking.join().unwrap(), "2");
    // The pooler finds it again after a restart.
    cluster.kill();
    cluster.start();
    eventually(READY, "the pooler answers again", || answers(&database.pooled_url()));
    // One that is frozen when its test ends, ends with it.
    cluster.freeze();
    let process = cluster.process.as_ref().unwrap().pid;
    drop(cluster);
    assert!(has_ended(process));
}

#[test]
fn a_cluster_with_tls() {
    let cluster = Postgres::own_with_tls();
    let database = cluster.database();
    let encrypted = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    for url in [database.url(), database.owner_url(), database.pooled_url()] {
        assert_eq!(psql(&url, encrypted), "t");
    }
    let plain = database.url().split_once('?').unwrap().0.to_owned() + "?sslmode=disable";
    assert!(try_psql(&plain, "SELECT 1").unwrap_err().contains("no encryption"), "{plain}");
    let other = Tls::new(cluster.folder.path().join("data").as_path());
    let ours = &cluster.at.tls.as_ref().unwrap().authority;
    let unknown = database.url().replace(&ours.display().to_string(), &other.authority.display().to_string());
    assert!(try_psql(&unknown, "SELECT 1").unwrap_err().contains("certificate verify failed"), "{unknown}");
}

#[test]
fn a_standby_that_is_promoted() {
    let mut primary = Postgres::own();
    let database = primary.database();
    database.sql("CREATE TABLE t AS SELECT 7 AS n");
    database.sql(&format!("GRANT ALL ON t TO {ROLE}"));
    let standby = primary.standby();
    let there = database.url_at(standby.port());
    eventually(READY, "it follows", || try_psql(&there, "SELECT n FROM t").is_ok_and(|said| said == "7"));
    assert!(try_psql(&there, "INSERT INTO t VALUES (8)").unwrap_err().contains("read-only"));
    primary.stop();
    standby.promote();
    psql(&there, "INSERT INTO t VALUES (8)");
    assert_eq!(psql(&there, "SELECT sum(n) FROM t"), "15");
}
