//! The command line: a file per command.
//!
//! In: arguments and the environment. Out: an exit code: 0, 1 it failed, 2 usage, 78 bad configuration.
//! Never: makes a store, but for `serve` and `migrate`; prints a secret, but for the one time that a key is made; writes
//! anything but its result to stdout.

pub mod config;
pub mod export;
pub mod import;
pub mod key;
pub mod link;
pub mod migrate;
pub mod moving;
pub mod serve;
pub mod spool;
pub mod stats;
pub mod status;
pub mod warm;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::anyhow;
use clap::{Args, Parser, Subcommand};

use crate::accept::listener::reachable;
use crate::app;
use crate::codes::Strategy;
use crate::config::Config;
use crate::config::load::{self, Flags, Loaded};
use crate::domain::key::DomainId;
use crate::links::Links;
use crate::links::worker_id::WorkerId;
use crate::store::postgres::Postgres;
use crate::store::row::Filter;
use crate::store::sqlite::{Sqlite, VISITS_FILE};
use crate::store::{self, Store};
use crate::table::Format;

/// A URL shortener and redirect server.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
struct Arguments {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

/// What every command understands.
#[derive(Clone, Debug, Args)]
pub struct Common {
    /// The configuration file [else $WAYPOST_CONFIG, ./waypost.toml, /etc/waypost/waypost.toml]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The folder of the embedded store [default: ./waypost-data]
    #[arg(long, global = true, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Keep links in Postgres: postgres://user:password@host/database
    #[arg(long, global = true, value_name = "URL")]
    postgres: Option<String>,
    /// Cache links in Redis: redis://host
    #[arg(long, global = true, value_name = "URL")]
    redis: Option<String>,
    /// Print JSON instead of text
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve redirects and the API
    Serve(serve::Serve),
    /// Make the store, or bring its schema up to date
    Migrate(migrate::Migrate),
    /// Make, list and revoke API keys
    Key(key::Key),
    /// Make, show, change and list links
    Link(link::Link),
    /// Make links out of a file
    Import(import::Import),
    /// Write links, or visits, to a file
    Export(export::Export),
    /// Load links into the memory of every running server, and wait for it
    Warm(warm::Warm),
    /// Keep links in the memory of every server, from its start on
    Pin(warm::Pins),
    /// Let links leave the memory again
    Unpin(warm::Pins),
    /// Show what became of the visits of a link
    Stats(stats::Stats),
    /// Show the visits that wait on a disk, or store those of a machine that is gone
    Spool(spool::Spool),
    /// Show what a running server does
    Status(status::Status),
    /// Check or print the configuration
    Config(config::Configuration),
}

/// A command that ended as it should not have.
#[derive(Debug)]
pub struct Failure {
    pub code: u8,
    pub error: anyhow::Error,
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        // A store of another schema or of other codes is bad configuration.
        let code = if matches!(error.downcast_ref(), Some(store::Error::Schema(_))) { 78 } else { 1 };
        Self { code, error }
    }
}

impl Failure {
    /// Bad configuration: `EX_CONFIG` of sysexits.h.
    pub fn config(error: impl Into<anyhow::Error>) -> Self {
        Self { code: 78, error: error.into() }
    }

    /// Arguments that clap took, and that cannot be meant.
    pub fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self { code: 2, error: error.into() }
    }
}

pub type Outcome = Result<(), Failure>;

/// Parses the arguments and runs the command.
#[must_use]
pub fn run() -> ExitCode {
    let Arguments { common, command } = Arguments::parse();
    let outcome = match command {
        Command::Serve(serve) => serve::run(&serve, &common),
        Command::Migrate(migrate) => migrate::run(&migrate, &common),
        Command::Key(key) => key::run(&key, &common),
        Command::Link(link) => link::run(&link, &common),
        Command::Import(import) => import::run(&import, &common),
        Command::Export(export) => export::run(&export, &common),
        Command::Warm(warm) => warm::run(&warm, &common),
        Command::Pin(pins) => warm::pin(&pins, true, &common),
        Command::Unpin(pins) => warm::pin(&pins, false, &common),
        Command::Stats(stats) => stats::run(&stats, &common),
        Command::Spool(spool) => spool::run(&spool, &common),
        Command::Status(status) => status::run(&status, &common),
        Command::Config(config) => config::run(&config, &common),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            say(&format!("waypost: {:#}", failure.error));
            ExitCode::from(failure.code)
        }
    }
}

/// A line to the person at the terminal; not a log line.
#[expect(clippy::print_stderr, reason = "the command line talks to a person here, and nowhere else")]
pub fn say(text: &str) {
    eprintln!("{text}");
}

/// A command's result. A reader that has gone away is no error.
pub fn print(text: &str) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    // `waypost link ls | head`: whoever reads has enough.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush());
}

/// The configuration that `flags`, the environment and the file make.
pub fn configure(common: &Common, flags: Flags) -> Result<Loaded, Failure> {
    let flags = Flags {
        config: common.config.clone(),
        data: common.data.clone(),
        postgres: common.postgres.clone(),
        redis: common.redis.clone(),
        ..flags
    };
    // What is no text is no configuration.
    let environment =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    load::load(&flags, environment, load::read).map_err(|errors| Failure::config(anyhow::anyhow!("{errors}")))
}

/// Says which file and which store a command uses.
pub fn announce(loaded: &Loaded) {
    let file = loaded.file.as_ref().map_or("no configuration file".to_owned(), |file| file.display().to_string());
    say(&format!("using {file}, store {}", store_name(loaded)));
}

/// Where the embedded store lies.
#[must_use]
pub fn database(loaded: &Loaded) -> PathBuf {
    embedded(&loaded.config.data)
}

/// Where its visits lie.
#[must_use]
pub fn visits_database(loaded: &Loaded) -> PathBuf {
    loaded.config.data.join(VISITS_FILE)
}

/// The file of the embedded store in a folder.
fn embedded(data: &Path) -> PathBuf {
    data.join("waypost.db")
}

/// The configured store as people are told of it, without a password.
fn store_name(loaded: &Loaded) -> String {
    match &loaded.config.postgres {
        Some(postgres) => postgres.url.to_string(),
        None => database(loaded).display().to_string(),
    }
}

/// The store that is there. Only `serve` and `migrate` make one.
pub async fn open(loaded: &Loaded) -> Result<Store, Failure> {
    if let Some(config) = &loaded.config.postgres {
        let postgres = Postgres::open(config)?;
        postgres.check_schema().await?;
        return Ok(Store::Postgres(postgres));
    }
    let path = database(loaded);
    if !path.exists() {
        return Err(Failure::config(anyhow::anyhow!(
            "there is no store at {}: start `waypost serve` or run `waypost migrate` first, or point --data at one",
            path.display()
        )));
    }
    Ok(Store::Sqlite(Sqlite::open(&path)?))
}

/// How every command that works on a store begins: it says which, and opens it.
async fn start(common: &Common) -> Result<(Loaded, Store), Failure> {
    let loaded = configure(common, Flags::default())?;
    announce(&loaded);
    let store = open(&loaded).await?;
    Ok((loaded, store))
}

/// Runs a command to its end, on this thread.
fn block_on<T>(command: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    // A thread beside this one: the store is written to while an import reads on.
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?.block_on(command)
}

/// What makes and checks links as `serve` does; a new domain of the configuration gets its number.
async fn links(config: &Config, store: &Store) -> Result<Links, Failure> {
    let hosts = config.domains.iter().map(|domain| domain.host.clone()).collect();
    store.number_domains(hosts).await?;
    let policy = app::policy(config, &base_url(config)).map_err(Failure::config)?;
    let worker_id = match config.codes.strategy {
        Strategy::Snowflake => {
            let leased = Arc::new(WorkerId::lease_for_command(store.clone()).await?);
            let keeper = Arc::clone(&leased);
            tokio::spawn(async move { keeper.run().await });
            Some(leased)
        }
        Strategy::Random | Strategy::Permuted => None,
    };
    Links::open(store.clone(), Arc::new(policy), config.codes.clone(), worker_id).await.map_err(Failure::from)
}

/// `base_url`, or the first listener; without a trailing slash.
fn base_url(config: &Config) -> String {
    match (&config.base_url, config.listen.first()) {
        (Some(url), _) => url.as_str().trim_end_matches('/').to_owned(),
        (None, Some(listen)) => format!("http://{}", reachable(listen.address)),
        (None, None) => String::new(),
    }
}

/// Which links.
#[derive(Debug, Args)]
struct Wanted {
    /// Only links with this in their code, target or title
    #[arg(long, value_name = "TEXT")]
    search: Option<String>,
    /// Only links with this tag
    #[arg(long)]
    tag: Option<String>,
    /// Only links of this host; "" is the default domain
    #[arg(long, value_name = "HOST")]
    domain: Option<String>,
}

impl Wanted {
    fn filter(&self, hosts: &Hosts) -> Result<Filter, Failure> {
        let domain = self.domain.as_deref().map(|host| hosts.id(host)).transpose()?;
        Ok(Filter { search: self.search.clone(), tag: self.tag.clone(), domain })
    }
}

/// The domains that have a number in the store.
struct Hosts(Vec<(DomainId, String)>);

impl Hosts {
    async fn read(store: &Store) -> Result<Self, Failure> {
        Ok(Self(store.domains().await?))
    }

    /// Empty for the default domain.
    fn name(&self, id: DomainId) -> &str {
        self.0.iter().find(|(known, _)| *known == id).map_or("", |(_, host)| host)
    }

    fn id(&self, host: &str) -> Result<DomainId, Failure> {
        let host = host.trim().to_ascii_lowercase();
        let known = self.0.iter().find(|(_, known)| *known == host);
        known.map(|(id, _)| *id).ok_or_else(|| anyhow!("--domain: no link was ever on the domain {host:?}").into())
    }
}

/// A table's format by its name, for clap.
fn format(name: &str) -> Result<Format, String> {
    Format::parse(name).ok_or_else(|| "the formats are csv and ndjson".to_owned())
}

/// The format of a file that nobody gave one for: NDJSON by its ending, else CSV.
fn format_of(path: &Path) -> Format {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase();
    if matches!(&*ending, "ndjson" | "jsonl") { Format::Ndjson } else { Format::Csv }
}

/// Rows of cells with two spaces between the columns; the last column is as wide as it likes.
fn table(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..count).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text.pop();
    text
}
