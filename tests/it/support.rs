//! What the tests stand on: the real server, the same store from another process, and a client that speaks raw bytes.
//!
//! In: a configuration, bytes; the store to test, in `WAYPOST_TEST_STORE`. Out: a server on free ports with a folder and a
//! store of its own; its answers, its log.
//! Never: leaves a server or a folder behind; lets a server see the environment's `WAYPOST_…`; waits for a time to pass
//! where it can wait for the thing itself.
//! At the limit: whatever is waited for must come within [`LIMIT`], else the test fails and shows the server's log.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, LazyLock, Mutex, Once};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;
use waypost::config::load::{self, Flags};
use waypost::domain::key::{Case, Code, DomainId, Key};
use waypost::domain::link::{Fields, LinkId};
use waypost::domain::target::Target;
use waypost::domain::time::{self, UnixMillis};
use waypost::guard::keys::{self, ApiKey, KeyRecord, Scope, Scopes};
use waypost::store::postgres::Postgres;
use waypost::store::row::{Change, Inserted, NewLink, OnConflict, Patch};
use waypost::store::sqlite::{self, Sqlite};
use waypost::store::{self, Store};

use crate::servers::postgres::{self, Database};

/// The most that anything takes, also on a machine that does other things.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);
/// Between two looks at something that is waited for.
const POLL: Duration = Duration::from_millis(5);

/// Waits until `condition` holds; the test fails after `limit`.
#[track_caller]
pub(crate) fn eventually(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let begun = time::monotonic();
    while !condition() {
        assert!(time::monotonic().duration_since(begun) < limit, "not within {limit:?}: {what}");
        pause();
    }
}

/// Does `step` again and again for `span`: for what must not happen meanwhile.
pub(crate) fn throughout(span: Duration, mut step: impl FnMut()) {
    let begun = time::monotonic();
    while time::monotonic().duration_since(begun) < span {
        step();
        pause();
    }
}

#[expect(clippy::disallowed_methods, reason = "the one place that waits: between two looks")]
fn pause() {
    std::thread::sleep(POLL);
}

/// The store that the tests run over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tested {
    Embedded,
    /// Postgres itself.
    Postgres,
    /// Postgres through PgBouncer in transaction mode.
    Pooled,
}

pub(crate) static TESTED: LazyLock<Tested> = LazyLock::new(|| match std::env::var("WAYPOST_TEST_STORE").as_deref() {
    Err(_) | Ok("embedded") => Tested::Embedded,
    Ok("postgres") => Tested::Postgres,
    Ok("pooled") => Tested::Pooled,
    Ok(other) => panic!("WAYPOST_TEST_STORE is {other:?}, and the stores are embedded, postgres and pooled"),
});

/// Says what is not tested for want of a tool or of a right, and what would help; with `WAYPOST_ALL=1` it fails instead.
#[track_caller]
pub(crate) fn left_out(why: &str) {
    assert!(std::env::var_os("WAYPOST_ALL").is_none_or(|all| all != "1"), "left out, and WAYPOST_ALL=1: {why}");
    // Past the macros: what they print of a test that passes nobody sees.
    std::io::stderr().write_all(format!("LEFT OUT: {why}\n").as_bytes()).unwrap();
}

/// Whether a test that only the embedded store can pass, for this reason, has to be left out.
#[must_use]
pub(crate) fn embedded_only(reason: &str) -> bool {
    let leaves_out = *TESTED != Tested::Embedded;
    if leaves_out {
        #[expect(clippy::print_stdout, reason = "it tells why nothing was tested")]
        {
            println!("left out over {:?}: {reason}", *TESTED);
        }
    }
    leaves_out
}

/// Where the links of a test are kept: in its folder, or in a database of its own.
pub(crate) struct Kept(Option<Database>);

impl Kept {
    pub(crate) fn new() -> Self {
        Self((*TESTED != Tested::Embedded).then(|| postgres::Postgres::shared().database()))
    }

    /// The configuration of `config` and of where its links are kept. The server is a role that owns nothing.
    pub(crate) fn configuration(&self, config: &str) -> String {
        let Some(database) = &self.0 else { return config.to_owned() };
        let (url, owner) = (database.url(), database.owner_url());
        let section = match *TESTED {
            Tested::Pooled => {
                format!("url = \"{}\"\ndirect_url = \"{url}\"\nstatements = \"unnamed\"", database.pooled_url())
            }
            Tested::Embedded | Tested::Postgres => format!("url = \"{url}\""),
        };
        format!("{config}\n[postgres]\n{section}\nmigrate_url = \"{owner}\"\n")
    }

    /// The command that makes the store.
    pub(crate) fn migrate(&self) -> &'static [&'static str] {
        if self.0.is_some() { &["migrate", "--grants", postgres::ROLE] } else { &["migrate"] }
    }
}

/// A folder for rings of visits, on tmpfs as they have to be. They outlive their server, also one that a test kills, and go
/// with this.
pub(crate) fn rings() -> TempDir {
    tempfile::Builder::new().prefix("waypost-rings-").tempdir_in("/dev/shm").unwrap()
}

/// A server that could be started: its folder, its configuration, its arguments. Started again it is the same server.
/// Its links go when it is dropped.
pub(crate) struct Setup {
    folder: TempDir,
    rings: TempDir,
    kept: Kept,
    prepared: Once,
    arguments: Vec<String>,
    variables: Vec<(String, String)>,
    /// What runs before the server in its process, such as `ulimit -n 64`.
    shell: String,
    listens: bool,
}

impl Setup {
    /// `config` is the content of its `waypost.toml`. It listens on 127.0.0.1, at a free port, unless that says where.
    pub(crate) fn new(config: &str) -> Self {
        let (folder, kept) = (tempfile::tempdir().unwrap(), Kept::new());
        std::fs::write(folder.path().join("waypost.toml"), kept.configuration(config)).unwrap();
        Self {
            folder,
            rings: rings(),
            kept,
            prepared: Once::new(),
            arguments: Vec::new(),
            variables: Vec::new(),
            shell: String::new(),
            listens: config.contains("[[listen]]"),
        }
    }

    pub(crate) fn configure(&self, config: &str) {
        std::fs::write(self.path("waypost.toml"), self.kept.configuration(config)).unwrap();
    }

    pub(crate) fn argument(mut self, argument: &str) -> Self {
        self.listens |= argument == "--listen";
        self.arguments.push(argument.to_owned());
        self
    }

    pub(crate) fn variable(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    pub(crate) fn shell(mut self, script: &str) -> Self {
        script.clone_into(&mut self.shell);
        self
    }

    /// It is given its sockets and binds none.
    pub(crate) fn without_listener(mut self) -> Self {
        self.listens = true;
        self
    }

    /// A file in the folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.path("data")
    }

    /// The store, from this process.
    pub(crate) fn store(&self) -> Direct {
        self.prepare();
        if self.kept.0.is_some() { Direct::postgres(&self.path("store.toml")) } else { Direct::embedded(&self.data()) }
    }

    /// Makes the store in Postgres and the first key, as a person does; the embedded store and its first key are made by
    /// whoever comes first.
    fn prepare(&self) {
        if self.kept.0.is_none() {
            return;
        }
        self.prepared.call_once(|| {
            // The test's own configuration may be one that is to be refused.
            std::fs::write(self.path("store.toml"), self.kept.configuration("")).unwrap();
            let waypost = |arguments: &[&str]| {
                let mut command = Command::new(env!("CARGO_BIN_EXE_waypost"));
                clean(&mut command);
                command.args(arguments).args(["--config", "store.toml"]).current_dir(self.folder.path());
                let Output { status, stdout, stderr } = command.output().unwrap();
                assert!(status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&stderr));
                stdout
            };
            waypost(self.kept.migrate());
            let key = waypost(&["key", "create", "--scope", "admin"]);
            std::fs::create_dir(self.data()).unwrap();
            std::fs::write(self.data().join("admin.key"), key).unwrap();
        });
    }

    /// Makes the store, as a person does.
    pub(crate) fn migrate(&self) {
        let output = self.run(self.kept.migrate());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// `waypost` with its configuration and a clean environment; the command and its arguments are the caller's.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let binary = env!("CARGO_BIN_EXE_waypost");
        let mut command = if self.shell.is_empty() {
            Command::new(binary)
        } else {
            let mut shell = Command::new("sh");
            shell.args(["-c", &format!("{}; exec \"$0\" \"$@\"", self.shell), binary]);
            shell
        };
        command.args(arguments).arg("--config").arg(self.path("waypost.toml")).arg("--data").arg(self.data());
        clean(&mut command);
        command.env("WAYPOST_SPOOL__RING", self.rings.path());
        command.envs(self.variables.clone()).current_dir(self.folder.path());
        command
    }

    /// `waypost serve` with a store that is there, ready to be spawned.
    pub(crate) fn serve(&self) -> Command {
        self.prepare();
        let mut command = self.command(&["serve"]);
        if !self.listens {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        command.args(&self.arguments);
        command
    }

    pub(crate) fn start(&self) -> Server {
        Server::spawn(self.serve(), &self.data())
    }

    /// Runs a command of the command line to its end, on the same folder.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// The exit code and the messages of a server that must not start.
    pub(crate) fn refused(&self) -> (i32, String) {
        let mut child = self.serve().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let ended = wait(&mut child);
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (ended.expect("it started all the same"), said)
    }
}

/// Removes what a person or another test may have set for a waypost or a service.
pub(crate) fn clean(command: &mut Command) {
    let ours = |name: &str| {
        ["WAYPOST_", "LISTEN_", "WATCHDOG_"].iter().any(|start| name.starts_with(start)) || name == "NOTIFY_SOCKET"
    };
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(ours) {
            command.env_remove(name);
        }
    }
}

/// The exit code of a child that ends by itself; none, and the child is killed, if it does not within [`LIMIT`].
fn wait(child: &mut Child) -> Option<i32> {
    let begun = time::monotonic();
    while time::monotonic().duration_since(begun) < LIMIT {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status.code().unwrap_or(-1));
        }
        pause();
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}

/// A running server; killed when dropped.
pub(crate) struct Server {
    child: Child,
    data: PathBuf,
    /// Where it listens, as it printed it.
    pub(crate) addresses: Vec<Listening>,
    log: Arc<Mutex<Vec<String>>>,
}

/// A line `waypost listens on …`.
#[derive(Clone, Debug)]
pub(crate) struct Listening {
    pub(crate) address: SocketAddr,
    /// Empty, `(redirects)` or `(API)`.
    pub(crate) what: String,
}

impl Server {
    /// A server of its own folder with this configuration.
    pub(crate) fn new(config: &str) -> (Setup, Self) {
        let setup = Setup::new(config);
        let server = setup.start();
        (setup, server)
    }

    /// Spawns it and waits until it listens.
    pub(crate) fn spawn(mut command: Command, data: &Path) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (errors, collected) = (child.stderr.take().unwrap(), Arc::clone(&log));
        std::thread::spawn(move || {
            for line in BufReader::new(errors).lines().map_while(Result::ok) {
                collected.lock().unwrap().push(line);
            }
        });
        let said = lines(child.stdout.take().unwrap());
        let mut server = Self { child, data: data.to_owned(), addresses: Vec::new(), log };
        loop {
            let Ok(line) = said.recv_timeout(LIMIT) else {
                panic!("it did not start: {}", server.log().join("\n"));
            };
            if let Some(rest) = line.strip_prefix("waypost listens on http://") {
                let (address, what) = rest.split_once(' ').unwrap_or((rest, ""));
                server.addresses.push(Listening { address: address.parse().unwrap(), what: what.to_owned() });
            } else if !server.addresses.is_empty() {
                // What it says next comes after the last of its listeners.
                return server;
            }
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The first address.
    pub(crate) fn address(&self) -> SocketAddr {
        self.addresses[0].address
    }

    /// The listener of this address, or with this note behind it.
    pub(crate) fn listener(&self, which: &str) -> SocketAddr {
        let is = |listening: &&Listening| listening.what == which || listening.address.ip().to_string() == which;
        self.addresses.iter().find(is).expect("it listens there").address
    }

    pub(crate) fn admin_key(&self) -> String {
        std::fs::read_to_string(self.data.join("admin.key")).unwrap().trim().to_owned()
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// Waits for a line of the log.
    pub(crate) fn logged(&self, part: &str) {
        eventually(LIMIT, &format!("a log line with {part:?}"), || self.log().iter().any(|line| line.contains(part)));
    }

    pub(crate) fn connect(&self) -> Client {
        Client::connect(self.address())
    }

    /// The answer to a GET on a connection of its own.
    pub(crate) fn get(&self, path: &str) -> Answer {
        self.connect().get(path)
    }

    /// `POST /shorten` with the admin key.
    pub(crate) fn shorten(&self, body: &Value) -> Answer {
        self.connect().shorten(body, &self.admin_key())
    }

    /// A new link's code.
    pub(crate) fn link(&self, target: &str) -> String {
        let answer = self.shorten(&json!({"original_url": target}));
        assert_eq!(answer.status, 201, "{answer:?}");
        answer.json()["short_code"].as_str().unwrap().to_owned()
    }

    /// A new link of this code.
    pub(crate) fn custom(&self, code: &str, target: &str) {
        let answer = self.shorten(&json!({"original_url": target, "custom_code": code}));
        assert_eq!(answer.status, 201, "{answer:?}");
    }

    /// A code whose link is in every memory that there is.
    pub(crate) fn warm(&self, target: &str) -> String {
        let code = self.link(target);
        let mut client = self.connect();
        (0..5).for_each(|_| assert_eq!(client.get(&format!("/{code}")).status, 307));
        code
    }

    /// The sum of a metric over the lines that begin with `name` and have all of `labels`.
    pub(crate) fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        metric(&self.get("/metrics").text(), name, labels)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Waits until it has ended by itself, well; returns its log.
    pub(crate) fn ends(mut self) -> Vec<String> {
        let code = wait(&mut self.child);
        assert_eq!(code, Some(0), "{}", self.log().join("\n"));
        self.log()
    }

    /// SIGTERM, and what [`Server::ends`] does.
    pub(crate) fn stop(self) -> Vec<String> {
        self.signal(Signal::TERM);
        self.ends()
    }

    /// Whether it has ended, by whatever hand.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// SIGKILL: no chance to put anything in order.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// A figure of `/proc/PID/status`, in KiB.
    pub(crate) fn memory_kib(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// The CPU time that the process has taken (proc_pid_stat(5): utime and stime).
    pub(crate) fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum();
        // USER_HZ is 100 wherever Linux shows it to programs.
        Duration::from_millis(ticks * 10)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            // To where the failed test's own message goes.
            #[expect(clippy::print_stdout, reason = "a failed test tells what the server said")]
            {
                println!("the server's log:\n{}", self.log().join("\n"));
            }
        }
    }
}

/// The sum of a metric over the lines that begin with `name` and have all of `labels`.
pub(crate) fn metric(text: &str, name: &str, labels: &[&str]) -> f64 {
    let is = |line: &&str| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
            && labels.iter().all(|label| line.contains(label))
    };
    let values: Vec<f64> =
        text.lines().filter(is).map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
    assert!(!values.is_empty(), "there is no metric {name} {labels:?} in\n{text}");
    values.iter().sum()
}

/// The lines of `reader` as they come. It is read to its end, so that the writer never waits.
pub(crate) fn lines(reader: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = sync_channel(1000);
    std::thread::spawn(move || {
        for line in BufReader::new(reader).lines().map_while(Result::ok) {
            let _ = sender.try_send(line);
        }
    });
    receiver
}

/// The store of a server, opened by this process: another one than the server, as the command line is.
pub(crate) struct Direct {
    runtime: tokio::runtime::Runtime,
    store: Store,
}

impl Direct {
    /// Opens the store of a data folder, and makes it if there is none.
    fn embedded(data: &Path) -> Self {
        let path = data.join("waypost.db");
        sqlite::migrate(&path).unwrap();
        Self { runtime: runtime(), store: Store::Sqlite(Sqlite::open(&path).unwrap()) }
    }

    /// Opens the store that a configuration names.
    pub(crate) fn postgres(config: &Path) -> Self {
        let flags = Flags { config: Some(config.to_owned()), ..Flags::default() };
        let loaded = load::load(&flags, [], load::read).unwrap();
        let runtime = runtime();
        // What it spawns is this runtime's.
        let store = runtime.block_on(async { Postgres::open(&loaded.config.postgres.unwrap()).unwrap() });
        Self { runtime, store: Store::Postgres(store) }
    }

    fn ask<T>(&self, question: impl Future<Output = store::Result<T>>) -> T {
        self.runtime.block_on(question).unwrap()
    }

    /// Runs what needs the store itself.
    pub(crate) fn check<'a, F: Future<Output = ()>>(&'a self, check: impl FnOnce(&'a Store) -> F) {
        self.runtime.block_on(check(&self.store));
    }

    /// Whether nobody who sleeps holds a lock.
    pub(crate) fn is_writable(&self) -> bool {
        self.runtime.block_on(self.store.present("another".to_owned(), true, time::now())).is_ok()
    }

    /// Takes a worker id, for no time at all; false while somebody has it.
    pub(crate) fn takes_worker(&self, id: u16) -> bool {
        self.ask(self.store.lease_worker("another".to_owned(), Some(id), 0, 0)).is_some()
    }

    pub(crate) fn fields(target: &str) -> Fields {
        Fields::new(target.to_owned(), Target::new(target).unwrap())
    }

    /// The number of a configured domain; an empty host is the default domain.
    pub(crate) fn domain(&self, host: &str) -> DomainId {
        let all = self.ask(self.store.domains());
        all.into_iter().find(|(_, known)| known == host).expect("it is configured").0
    }

    /// Adds links in one transaction.
    pub(crate) fn add_all(&self, links: Vec<(Key, Fields)>) {
        let now = time::now();
        let count = links.len() as u64;
        let first = self.ask(self.store.lease("link_ids", 1, count));
        let new = |(id, (key, fields))| NewLink {
            id: LinkId(id),
            key,
            fields,
            given: Patch::default(),
            created_at: now,
            imported_clicks: 0,
            on_conflict: OnConflict::Take,
        };
        let links = (first..).zip(links).map(new).collect();
        let inserted = self.ask(self.store.insert(links, now));
        assert!(inserted.iter().all(|one| *one == Inserted::Created), "{inserted:?}");
    }

    /// Adds a link of the default domain.
    pub(crate) fn add(&self, code: &str, target: &str, more: impl FnOnce(&mut Fields)) {
        let mut fields = Self::fields(target);
        more(&mut fields);
        self.add_all(vec![(key(DomainId(0), code), fields)]);
    }

    /// Changes a link of the default domain.
    pub(crate) fn change(&self, code: &str, change: Change) {
        let changed = self.ask(self.store.change(key(DomainId(0), code), change, time::now()));
        assert!(changed.is_some(), "there is no link {code}");
    }

    /// A new API key.
    pub(crate) fn key(&self, scopes: &[Scope], per_minute: Option<u32>, expires_at: Option<UnixMillis>) -> String {
        let key = ApiKey::generate(&mut rand::rng());
        self.ask(self.store.add_key(KeyRecord {
            id: key.id.clone(),
            name: None,
            digest: keys::digest(&key.secret),
            scopes: Scopes::of(scopes),
            created_at: time::now(),
            expires_at,
            revoked_at: None,
            per_minute,
            last_used_at: None,
        }));
        key.reveal()
    }

    pub(crate) fn revoke(&self, key: &str) {
        let id = ApiKey::parse(key).unwrap().id;
        assert!(self.ask(self.store.revoke_key(id, time::now())));
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

pub(crate) fn key(domain: DomainId, code: &str) -> Key {
    Key { domain, code: Code::parse(code.as_bytes(), Case::Sensitive).unwrap() }
}

/// A connection, of which every byte is the test's.
pub(crate) struct Client {
    stream: TcpStream,
    /// Read, and not yet part of an answer.
    read: Vec<u8>,
}

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Names in lower case, in order.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// A header's value; the test fails if it stands there twice.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.iter().filter(|(known, _)| known == name).map(|(_, value)| value.as_str());
        let value = values.next();
        assert_eq!(values.next(), None, "{name} stands there twice: {self:?}");
        value
    }

    pub(crate) fn location(&self) -> Option<&str> {
        self.header("location")
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub(crate) fn closes(&self) -> bool {
        self.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }
}

impl Client {
    pub(crate) fn connect(address: SocketAddr) -> Self {
        Self::of(TcpStream::connect_timeout(&address, LIMIT).unwrap())
    }

    /// From an address of this machine: all of 127.0.0.0/8 is.
    pub(crate) fn connect_from(source: &str, address: SocketAddr) -> Self {
        let source: IpAddr = source.parse().unwrap();
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::new(source, 0).into()).unwrap();
        socket.connect_timeout(&address.into(), LIMIT).unwrap();
        Self::of(socket.into())
    }

    /// With as little of a receive buffer as there can be: what is not read stays with the server.
    pub(crate) fn connect_narrow(address: SocketAddr) -> Self {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        socket.connect_timeout(&address.into(), LIMIT).unwrap();
        Self::of(socket.into())
    }

    fn of(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        Self { stream, read: Vec::new() }
    }

    pub(crate) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    /// Sends to a peer that may have gone.
    pub(crate) fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.stream.write_all(bytes.as_ref()).is_ok()
    }

    /// The next answer; the test fails if none comes, or only a part of one.
    #[track_caller]
    pub(crate) fn answer(&mut self) -> Answer {
        match self.next(false) {
            Ok(answer) => answer,
            Err(problem) => panic!("no answer: {problem}; read so far: {:?}", String::from_utf8_lossy(&self.read)),
        }
    }

    /// The next answer, or why there is none. The answer to a HEAD has no body.
    pub(crate) fn next(&mut self, head: bool) -> Result<Answer, String> {
        let end = loop {
            if let Some(end) = find(&self.read, b"\r\n\r\n") {
                break end;
            }
            self.fill()?;
        };
        let text = String::from_utf8(self.read.drain(..end + 4).collect()).map_err(|error| error.to_string())?;
        let mut rows = text.trim_end().split("\r\n");
        let status_line = rows.next().unwrap_or_default();
        let status = status_line.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)?.parse().ok());
        let status = status.ok_or_else(|| format!("not a status line: {status_line:?}"))?;
        let header =
            |row: &str| row.split_once(':').map(|(name, value)| (name.to_lowercase(), value.trim().to_owned()));
        let headers: Option<Vec<_>> = rows.map(header).collect();
        let mut answer =
            Answer { status, headers: headers.ok_or_else(|| format!("not a head: {text:?}"))?, body: vec![] };
        if head || status == 304 || status / 100 == 1 {
            return Ok(answer);
        }
        answer.body = if answer.header("transfer-encoding") == Some("chunked") {
            self.chunks()?
        } else if let Some(length) = answer.header("content-length") {
            let length = length.parse().map_err(|_| format!("no length: {answer:?}"))?;
            self.take(length)?
        } else {
            return Err(format!("its end is not told: {answer:?}"));
        };
        Ok(answer)
    }

    fn chunks(&mut self) -> Result<Vec<u8>, String> {
        let mut body = Vec::new();
        loop {
            let end = loop {
                if let Some(end) = find(&self.read, b"\r\n") {
                    break end;
                }
                self.fill()?;
            };
            let line = self.take(end + 2)?;
            let digits = str::from_utf8(&line[..end]).map_err(|error| error.to_string())?;
            let size = usize::from_str_radix(digits, 16).map_err(|_| format!("no chunk: {digits:?}"))?;
            body.extend(self.take(size)?);
            self.take(2)?;
            if size == 0 {
                return Ok(body);
            }
        }
    }

    fn take(&mut self, count: usize) -> Result<Vec<u8>, String> {
        while self.read.len() < count {
            self.fill()?;
        }
        Ok(self.read.drain(..count).collect())
    }

    fn fill(&mut self) -> Result<(), String> {
        let mut bytes = [0; 16 << 10];
        match self.stream.read(&mut bytes) {
            Ok(0) => Err("the connection was closed".to_owned()),
            Ok(count) => {
                self.read.extend(&bytes[..count]);
                Ok(())
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                Err(format!("nothing came within {LIMIT:?}"))
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// Whether the peer has closed the connection, without a further byte. Does not wait.
    pub(crate) fn is_closed(&mut self) -> bool {
        self.stream.set_nonblocking(true).unwrap();
        let read = self.stream.read(&mut [0; 1]);
        self.stream.set_nonblocking(false).unwrap();
        match read {
            Ok(0) => true,
            Ok(_) => panic!("a byte came where the end was due"),
            Err(error) => error.kind() != ErrorKind::WouldBlock,
        }
    }

    /// Waits for the end of the connection; returns whatever came before it.
    pub(crate) fn rest(&mut self) -> Vec<u8> {
        loop {
            match self.fill() {
                Ok(()) => {}
                Err(problem) => {
                    assert!(!problem.starts_with("nothing came"), "the connection stays open: {problem}");
                    return std::mem::take(&mut self.read);
                }
            }
        }
    }

    pub(crate) fn get(&mut self, path: &str) -> Answer {
        self.ask("GET", path, &[], b"")
    }

    /// Sends a request and takes its answer. A body brings its length along.
    #[track_caller]
    pub(crate) fn ask(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        self.send(request(method, path, headers, body));
        match self.next(method == "HEAD") {
            Ok(answer) => answer,
            Err(problem) => panic!("no answer to {method} {path}: {problem}"),
        }
    }

    pub(crate) fn shorten(&mut self, body: &Value, key: &str) -> Answer {
        let bearer = format!("Bearer {key}");
        let headers = [("Content-Type", "application/json"), ("Authorization", bearer.as_str())];
        let headers = if key.is_empty() { &headers[..1] } else { &headers };
        self.ask("POST", "/shorten", headers, body.to_string().as_bytes())
    }
}

/// A request's bytes. `Host` is `waypost.test` unless `headers` has one.
pub(crate) fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut head = format!("{method} {path} HTTP/1.1\r\n");
    if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
        head += "Host: waypost.test\r\n";
    }
    for (name, value) in headers {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    if !body.is_empty() {
        let _ = write!(head, "Content-Length: {}\r\n", body.len());
    }
    [head.as_bytes(), b"\r\n", body].concat()
}

fn find(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).position(|window| window == part)
}
