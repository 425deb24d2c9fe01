//! Instances of waypost that share a database: each a process with a folder of its own.
//!
//! In: the way to Postgres, the rest of the configuration. Out: servers, the command line, and the same store from the
//! test's process.
//! Never: shares a database with another test.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

use super::postgres::{Database, Postgres, ROLE};
use crate::support::{Direct, LIMIT, Server, clean, eventually, rings};

/// How instances come to Postgres.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Straight,
    /// Through PgBouncer in transaction mode, and past it for what needs a session.
    Pooled,
    /// Through PgBouncer alone: Postgres can tell them nothing.
    PooledAlone,
    /// To this cluster and to the one at this port, whichever takes writes.
    OfTwo(u16),
    /// Through somebody at this port who leads to the one that takes writes.
    Through(u16),
    /// Through somebody of another network; its owner comes straight.
    Elsewhere(SocketAddr),
}

/// The program that is tested.
pub(crate) const WAYPOST: &str = env!("CARGO_BIN_EXE_waypost");

#[derive(Debug)]
pub(crate) struct Deployment {
    folder: TempDir,
    rings: TempDir,
    pub(crate) database: Database,
}

impl Deployment {
    /// Makes the store and the first key, as a person does. `config` is what all instances have beside the store.
    pub(crate) fn new(way: Way, config: &str) -> Self {
        Self::on(Postgres::shared(), way, config)
    }

    pub(crate) fn on(postgres: &Postgres, way: Way, config: &str) -> Self {
        Self::made_by(Path::new(WAYPOST), postgres, way, config)
    }

    /// The same by another version of the program.
    pub(crate) fn made_by(program: &Path, postgres: &Postgres, way: Way, config: &str) -> Self {
        let (folder, database) = (tempfile::tempdir().unwrap(), postgres.database());
        let (url, pooled) = (database.url(), || database.pooled_url());
        let section = match way {
            Way::Straight => format!("url = \"{url}\""),
            Way::Pooled => format!("url = \"{}\"\ndirect_url = \"{url}\"\nstatements = \"unnamed\"", pooled()),
            Way::PooledAlone => format!("url = \"{}\"\nstatements = \"unnamed\"", pooled()),
            Way::OfTwo(port) => format!("url = \"{}\"", database.url_of_two(port)),
            Way::Through(port) => format!("url = \"{}\"", database.url_at(port)),
            Way::Elsewhere(address) => format!("url = \"{}\"", database.url_through(address)),
        };
        let owner_url = if let Way::Through(port) = way { database.owner_url_at(port) } else { database.owner_url() };
        // What is asked is right answers, also of a machine that does other things: with what is shipped, 0.3 s, a look-up of a
        // server that works is given up there, and a 503 is what the test would find wrong.
        let store = format!("[postgres]\n{section}\nlookup_timeout = \"2s\"\nmigrate_url = \"{owner_url}\"\n");
        std::fs::write(folder.path().join("store.toml"), &store).unwrap();
        let this = Self { folder, rings: rings(), database };
        this.configure(&store, config);
        this.cli(program, &["migrate", "--grants", ROLE]);
        let key = this.cli(program, &["key", "create", "--scope", "admin"]);
        std::fs::write(this.path("admin.key"), key).unwrap();
        this
    }

    fn configure(&self, store: &str, config: &str) {
        std::fs::write(self.path("waypost.toml"), format!("{config}\n{store}")).unwrap();
    }

    /// What the instances that start from now on have beside the store.
    pub(crate) fn reconfigure(&self, config: &str) {
        self.configure(&std::fs::read_to_string(self.path("store.toml")).unwrap(), config);
    }

    /// Adds to what the instances that start from now on have of Postgres.
    pub(crate) fn restrict(&self, more: &str) {
        let mut config = std::fs::read_to_string(self.path("waypost.toml")).unwrap();
        config.push_str(more);
        std::fs::write(self.path("waypost.toml"), config).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        self.command_of(Path::new(WAYPOST), arguments)
    }

    pub(crate) fn command_of(&self, program: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        clean(&mut command);
        command.env("WAYPOST_SPOOL__RING", self.rings.path());
        command.args(arguments).args(["--config", "waypost.toml"]).current_dir(self.folder.path());
        command
    }

    /// The stdout of a command, which must not fail.
    #[track_caller]
    pub(crate) fn cli(&self, program: &Path, arguments: &[&str]) -> Vec<u8> {
        let Output { status, stdout, stderr } = self.command_of(program, arguments).output().unwrap();
        assert!(status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&stderr));
        stdout
    }

    /// Starts an instance at a free port. The same name again is the same instance.
    pub(crate) fn instance(&self, name: &str) -> Server {
        self.instance_at(name, 0)
    }

    pub(crate) fn instance_at(&self, name: &str, port: u16) -> Server {
        let (command, data) = self.serve(Path::new(WAYPOST), name, port);
        Server::spawn(command, &data)
    }

    /// What starts an instance by a version of the program, and its data folder.
    pub(crate) fn serve(&self, program: &Path, name: &str, port: u16) -> (Command, PathBuf) {
        self.serve_at(program, name, &format!("127.0.0.1:{port}"))
    }

    /// The same of one that listens elsewhere.
    pub(crate) fn serve_at(&self, program: &Path, name: &str, listen: &str) -> (Command, PathBuf) {
        let data = self.path(name);
        if !data.exists() {
            std::fs::create_dir(&data).unwrap();
            std::fs::copy(self.path("admin.key"), data.join("admin.key")).unwrap();
        }
        let mut command = self.command_of(program, &["serve", "--listen", listen]);
        command.arg("--data").arg(&data);
        (command, data)
    }

    /// The store, from this process.
    pub(crate) fn store(&self) -> Direct {
        Direct::postgres(&self.path("store.toml"))
    }

    /// How often links were looked for since the store was made. Every instance must have ended: what Postgres counts for
    /// a connection is there when that ends, or whenever it likes.
    pub(crate) fn look_ups(&self) -> u64 {
        let sql = |sql: &str| -> u64 { self.database.sql(sql).parse().unwrap() };
        eventually(LIMIT, "every connection ends", || {
            sql("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
                == 0
        });
        sql(
            "SELECT sum(coalesce(seq_scan, 0) + coalesce(idx_scan, 0)) FROM pg_stat_user_tables WHERE relname = 'links'",
        )
    }
}
