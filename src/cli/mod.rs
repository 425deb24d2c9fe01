//! The command line: a file per command.
//!
//! In: arguments and the environment. Out: an exit code: 0, 1 it failed, 2 usage, 78 bad configuration.
//! Never: makes a store, but for `serve` and `migrate`; prints a secret, but for the one time that a key is made.

pub mod serve;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::load::{self, Flags, Loaded};
use crate::store::Store;
use crate::store::sqlite::Sqlite;

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
    /// Print JSON instead of text
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve redirects and the API
    Serve(serve::Serve),
}

/// A command that ended as it should not have.
#[derive(Debug)]
pub struct Failure {
    pub code: u8,
    pub error: anyhow::Error,
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { code: 1, error: error.into() }
    }
}

impl Failure {
    /// Bad configuration: `EX_CONFIG` of sysexits.h.
    pub fn config(error: impl Into<anyhow::Error>) -> Self {
        Self { code: 78, error: error.into() }
    }
}

pub type Outcome = Result<(), Failure>;

/// Parses the arguments and runs the command.
#[must_use]
pub fn run() -> ExitCode {
    let Arguments { common, command } = Arguments::parse();
    let outcome = match command {
        Command::Serve(serve) => serve::run(&serve, &common),
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
    let flags = Flags { config: common.config.clone(), data: common.data.clone(), ..flags };
    // What is no text is no configuration.
    let environment =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    load::load(&flags, environment, load::read).map_err(|errors| Failure::config(anyhow::anyhow!("{errors}")))
}

/// Says which file and which store a command uses.
pub fn announce(loaded: &Loaded) {
    let file = loaded.file.as_ref().map_or("no configuration file".to_owned(), |file| file.display().to_string());
    say(&format!("using {file}, store {}", database(loaded).display()));
}

/// Where the embedded store lies.
#[must_use]
pub fn database(loaded: &Loaded) -> PathBuf {
    loaded.config.data.join("waypost.db")
}

/// The store that is there. Only `serve` and `migrate` make one.
pub fn open(loaded: &Loaded) -> Result<Store, Failure> {
    let path = database(loaded);
    if !path.exists() {
        return Err(Failure::config(anyhow::anyhow!(
            "there is no store at {}: start `waypost serve` or run `waypost migrate` first, or point --data at one",
            path.display()
        )));
    }
    Ok(Store::Sqlite(Sqlite::open(&path)?))
}
