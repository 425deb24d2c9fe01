//! What can be typed.
//!
//! In: the words of the command line. Out: one [`Command`] with values of the right kinds. Never: opens a file. At its
//! limit: a wrong value is refused with its flag, exit code 2.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Parser, Subcommand};

use crate::engine::{Defect, Spin};
use crate::scenario::change::Changes;
use crate::scenario::flags::Flags;

const EXIT_CODES: &str = "\
Exit codes: 0 valid and all SLOs met · 1 the run failed · 2 usage or scenario
            3 invalid measurement · 99 an SLO failed · 130 or 143 interrupted";

/// An open-loop load generator for servers of short links that tells when it was too late itself
#[derive(Debug, Parser)]
#[command(name = "loadgen", version, after_help = EXIT_CODES, subcommand_required = true, arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Load one URL, as wrk2 or oha would
    #[command(after_help = EXIT_CODES)]
    Http(Http),
    /// Carry out a scenario
    #[command(after_help = EXIT_CODES)]
    Run(Run),
    /// Say what is wrong or doubtful in a scenario
    Check(Source),
    /// Draw a scenario: rates over time, arrivals, connections needed
    Plan(Source),
    /// Create the links of a scenario that the server does not have yet, or write them to a CSV
    Seed(Seed),
    /// Measure what this machine can do, for the peak of scenarios
    Calibrate(Calibrate),
    /// Print the report of a run again, with all percentiles
    Report(Report),
    /// Serve redirects by a script, to try a load generator on
    Stub(Stub),
    /// Prove against a scripted server that what is reported is true
    Prove(Prove),
    /// Hold what the server stored against what it was asked (a run's --ledger)
    Verify(Verify),
}

#[derive(Debug, clap::Args)]
pub struct Http {
    #[command(flatten)]
    pub flags: Flags,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Debug, clap::Args)]
pub struct Run {
    #[command(flatten)]
    pub source: Source,
    /// Where the server's API key is [default: waypost-data/admin.key]
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Do not look for the scenario's links, nor create those that are missing
    #[arg(long)]
    pub no_seed: bool,
    #[command(flatten)]
    pub common: Common,
}

/// Which scenario, and what is other than in its file.
#[derive(Debug, Clone, clap::Args)]
pub struct Source {
    /// A file, or one of mail-blast, tv-spot, cold-start, store-outage
    #[arg(value_name = "NAME|FILE.toml")]
    pub scenario: String,
    /// Set a key of the file, such as peak=30k, phase.2.for=5s or traffic.stats=off; may be repeated
    #[arg(long, short = 'e', value_name = "KEY=VALUE", value_parser = key_value)]
    pub set: Vec<(String, String)>,
    /// The server, instead of the file's
    #[arg(long, value_name = "URL")]
    pub target: Option<String>,
    /// The Postgres server's first process, for scenarios that stop it
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(u32).range(2..))]
    pub postgres_pid: Option<u32>,
}

impl Source {
    /// What the flags change in the file.
    #[must_use]
    pub fn changes(&self) -> Changes {
        Changes {
            set: self.set.clone(),
            target: self.target.clone(),
            postgres_pid: self.postgres_pid,
            ..Changes::default()
        }
    }
}

/// Flags of everything that measures.
#[derive(Debug, Clone, clap::Args)]
pub struct Common {
    /// Print the whole percentile table
    #[arg(long)]
    pub latency: bool,
    /// A new folder for run.json, .hgrm, .hlog and timeline.csv
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Write run.json here; - is the standard output
    #[arg(long, value_name = "FILE|-")]
    pub json: Option<PathBuf>,
    /// Whether a worker that waits polls instead of sleeping; auto: for the last 50 µs
    #[arg(long, default_value = "auto", value_parser = spin())]
    pub spin: Spin,
    /// A new file that each request is written to before it is sent, for verify
    #[arg(long, value_name = "FILE")]
    pub ledger: Option<PathBuf>,
    /// The header that carries a request's number in the ledger
    #[arg(long, value_name = "NAME", default_value = "X-Request-Id", requires = "ledger")]
    pub ledger_header: String,
    /// Accepted as oha has it: there is no live view
    #[arg(long, hide_short_help = true)]
    pub no_tui: bool,
}

#[derive(Debug, clap::Args)]
pub struct Seed {
    #[command(flatten)]
    pub source: Source,
    /// Where the server's API key is [default: waypost-data/admin.key]
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Write the links as a CSV for an import instead of creating them
    #[arg(long, value_name = "FILE.csv")]
    pub write: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub struct Calibrate {
    /// How long each of the two loads lasts, seconds
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=60))]
    pub seconds: u32,
    /// Only print, do not save
    #[arg(long)]
    pub print: bool,
}

#[derive(Debug, clap::Args)]
pub struct Report {
    /// The folder that a run wrote with --out
    pub dir: PathBuf,
}

/// Each flag of the script is a name and text of [`crate::stub`]'s script, which says what is wrong with it.
#[derive(Debug, clap::Args)]
pub struct Stub {
    /// Where to listen; port 0 is any free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9999")]
    pub listen: SocketAddr,
    /// How long an answer takes, such as 100us
    #[arg(long, value_name = "TIME")]
    pub service: Option<String>,
    /// Most answers a second, such as 40k
    #[arg(long, value_name = "RATE")]
    pub capacity: Option<String>,
    /// Nothing is read or answered for so long, so long after the first request: 2s@20s, forever@20s
    #[arg(long, value_name = "TIME@FROM")]
    pub stall: Option<String>,
    /// One of so many connections is never answered, such as 1/64
    #[arg(long, value_name = "1/N")]
    pub stuck: Option<String>,
    /// No connection is accepted for so long, such as 1s@5s
    #[arg(long, value_name = "TIME@FROM")]
    pub accept_stall: Option<String>,
    /// A share of requests takes longer, such as 1%@50ms
    #[arg(long, value_name = "SHARE@TIME")]
    pub slow: Option<String>,
    /// Each answer is a 503 for so long, such as 503:1s@5s
    #[arg(long, value_name = "503:TIME@FROM")]
    pub fail: Option<String>,
    /// A share of requests is answered by a reset, such as 1%
    #[arg(long, value_name = "SHARE")]
    pub reset: Option<String>,
    /// Bodies come byte by byte, one each so often, such as 1ms
    #[arg(long, value_name = "TIME")]
    pub drip: Option<String>,
    /// End when the standard input does: with the process at its other end, whatever ended that
    #[arg(long, hide = true)]
    pub until_stdin_ends: bool,
}

impl Stub {
    /// (name, value) of the flags of the script that were given.
    #[must_use]
    pub fn script(&self) -> Vec<(&'static str, &str)> {
        let flags = [
            ("service", &self.service),
            ("capacity", &self.capacity),
            ("stall", &self.stall),
            ("stuck", &self.stuck),
            ("accept-stall", &self.accept_stall),
            ("slow", &self.slow),
            ("fail", &self.fail),
            ("reset", &self.reset),
            ("drip", &self.drip),
        ];
        flags.into_iter().filter_map(|(name, value)| Some((name, value.as_deref()?))).collect()
    }
}

#[derive(Debug, clap::Args)]
pub struct Prove {
    /// Plant a fault that the proofs must find
    #[arg(long, hide = true, value_parser = defect())]
    pub plant: Option<Defect>,
    /// Only this case, such as "stall to the end"
    #[arg(long, value_name = "CASE")]
    pub only: Option<String>,
    /// Fewer and shorter cases
    #[arg(long)]
    pub short: bool,
}

#[derive(Debug, clap::Args)]
pub struct Verify {
    /// What a run wrote with --ledger
    pub ledger: PathBuf,
    /// The server's export of visits, CSV or NDJSON
    #[arg(long, value_name = "FILE")]
    pub visits: Option<PathBuf>,
    /// The server's export of links, CSV or NDJSON
    #[arg(long, value_name = "FILE")]
    pub links: Option<PathBuf>,
    /// How many findings of a kind are named; the others are counted
    #[arg(long, default_value_t = 100)]
    pub max: usize,
    /// Print the findings as JSON
    #[arg(long)]
    pub json: bool,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write it as KEY=VALUE")?;
    Ok((key.trim().to_owned(), value.trim().to_owned()))
}

fn spin() -> impl TypedValueParser<Value = Spin> {
    PossibleValuesParser::new(["auto", "never", "always"]).map(|name| match name.as_str() {
        "never" => Spin::Never,
        "always" => Spin::Always,
        _ => Spin::Auto,
    })
}

fn defect() -> impl TypedValueParser<Value = Defect> {
    PossibleValuesParser::new(["from-send", "back-fill", "cached-clock"]).map(|name| match name.as_str() {
        "from-send" => Defect::FromSend,
        "back-fill" => Defect::BackFill,
        _ => Defect::CachedClock,
    })
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::{Args, Command};
    use crate::scenario::presets;

    fn parse(line: &str) -> Result<Command, String> {
        let words = std::iter::once("loadgen").chain(line.split_whitespace());
        Args::try_parse_from(words).map(|args| args.command).map_err(|error| error.to_string())
    }

    #[test]
    fn the_definition_holds_together() {
        Args::command().debug_assert();
    }

    #[test]
    fn what_is_typed_arrives() {
        let Ok(Command::Run(run)) = parse("run mail-blast --set peak=30k -e phase.2.for=5s --no-seed --spin never")
        else {
            panic!("run")
        };
        let set = run.source.changes().set;
        assert_eq!(set[0], ("peak".to_owned(), "30k".to_owned()));
        assert_eq!(set[1], ("phase.2.for".to_owned(), "5s".to_owned()));
        assert!(run.no_seed);
        let Ok(Command::Stub(stub)) = parse("stub --stall 2s@20s --accept-stall 1s@5s") else { panic!("stub") };
        assert_eq!(stub.script(), [("stall", "2s@20s"), ("accept-stall", "1s@5s")]);
        let Ok(Command::Prove(prove)) = parse("prove --plant back-fill --short") else { panic!("prove") };
        assert_eq!(prove.plant, Some(crate::engine::Defect::BackFill));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (line, part) in [
            ("run", "required arguments"),
            ("run x --set peak", "write it as KEY=VALUE"),
            ("run x --postgres-pid 1", "--postgres-pid"),
            ("run x --ledger-header A", "--ledger <FILE>"),
            ("http http://127.0.0.1 --spin maybe", "auto, never, always"),
            ("stub --listen 9999", "--listen"),
        ] {
            let error = parse(line).map(|_| ()).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
    }

    #[test]
    fn the_help_names_every_preset() {
        let help = Args::command().find_subcommand_mut("run").unwrap().render_long_help().to_string();
        for (name, _) in presets::ALL {
            assert!(help.contains(name), "{name}");
        }
    }
}
