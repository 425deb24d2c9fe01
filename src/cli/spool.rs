//! `waypost spool`: the visits that no store has yet.
//!
//! In: the folder of a spool, of this machine or of one that is gone. Out: what it has; or all of it in the store, each
//! visit once, however often it is told.
//! Never: replays the spool of a server that runs (it is locked); removes anything.
//! At its limit: a store that does not answer for half a minute ends a replay, which can be begun anew.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use clap::{Args, Subcommand};
use indicatif::{HumanBytes, HumanCount};
use serde_json::{Value, json};

use super::{Common, Outcome, announce, block_on, configure, print, start, table};
use crate::app::visits;
use crate::config::load::Flags;
use crate::instance::dropped;
use crate::visits::spool;
use crate::visits::writer::{self, Replayed};

#[derive(Debug, Args)]
pub struct Spool {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show what a spool has
    Status {
        /// The folder [default: spool.dir, else DATA/spool]
        dir: Option<PathBuf>,
    },
    /// Store what the spool of a machine that is gone has, each visit once
    Replay {
        /// The folder, as that machine left it or as a copy
        dir: PathBuf,
    },
}

pub fn run(spool: &Spool, common: &Common) -> Outcome {
    match &spool.action {
        Action::Status { dir } => status(dir.as_deref(), common),
        Action::Replay { dir } => block_on(replay(dir, common)),
    }
}

fn status(dir: Option<&Path>, common: &Common) -> Outcome {
    let loaded = configure(common, Flags::default())?;
    announce(&loaded);
    let config = &loaded.config;
    let own = || visits::spool_dir(config);
    let dir = dir.map_or_else(own, Path::to_owned);
    let summary = spool::summary(&dir).with_context(|| unreadable(&dir))?;
    if common.json {
        let document = json!({
            "dir": dir,
            "segments": summary.segments,
            "bytes": summary.bytes,
            "starts": summary.epochs.iter().map(|epoch| format!("{:016x}", epoch.0)).collect::<Vec<_>>(),
            "records": summary.records,
            "visits": summary.visits,
            "rings": summary.rings,
            "lost": dropped(&summary.lost),
        });
        print(&document.to_string());
        return Ok(());
    }
    let rings: Vec<String> = summary.rings.iter().map(|ring| ring.display().to_string()).collect();
    let rows = [
        ("folder", dir.display().to_string()),
        ("segments", HumanCount(summary.segments).to_string()),
        ("bytes", HumanBytes(summary.bytes).to_string()),
        ("starts", HumanCount(summary.epochs.len() as u64).to_string()),
        // What is stored stays for a while: only the store knows what of it is pending.
        ("records, stored ones too", HumanCount(summary.records).to_string()),
        ("visits of links", HumanCount(summary.visits).to_string()),
        ("rings", if rings.is_empty() { "none".to_owned() } else { rings.join(", ") }),
        ("lost", reasons(&dropped(&summary.lost))),
    ];
    print(&table(&rows.map(|(name, value)| vec![name.to_owned(), value])));
    Ok(())
}

fn unreadable(dir: &Path) -> String {
    format!("cannot read the spool {}: is it the folder with the .log files?", dir.display())
}

/// Why visits are lost, by [`dropped`]: the reasons that hold for any.
pub(super) fn reasons(dropped: &Value) -> String {
    let all = dropped.as_object().into_iter().flatten().filter_map(|(why, visits)| Some((why, visits.as_u64()?)));
    let named: Vec<String> =
        all.filter(|(_, visits)| *visits > 0).map(|(why, visits)| format!("{why} {}", HumanCount(visits))).collect();
    if named.is_empty() { "none".to_owned() } else { named.join(", ") }
}

async fn replay(dir: &Path, common: &Common) -> Outcome {
    // Only a store that is there, and of this schema.
    let (loaded, store) = start(common).await?;
    let config = &loaded.config;
    if !dir.is_dir() {
        return Err(anyhow!("{} is no folder: give the spool of the machine that is gone", dir.display()).into());
    }
    let (sink, builder) = (visits::sink(config, &store, &instance_of(dir))?, visits::builder(config)?);
    let replayed = writer::replay(dir, visits::writer_settings(config, None), builder, sink)
        .await
        .with_context(|| unreadable(dir))?;
    tell(&replayed, common.json);
    match replayed.failed {
        Some(why) => {
            Err(anyhow!("not all of it is stored: {why}; replay it once more, what is stored is skipped").into())
        }
        None => Ok(()),
    }
}

/// The instance whose spool it is: its name lies beside it, in its data folder.
fn instance_of(dir: &Path) -> String {
    let name = std::fs::read_to_string(dir.join("../instance")).unwrap_or_default();
    match name.trim() {
        "" => "replayed".to_owned(),
        name => name.to_owned(),
    }
}

fn tell(replayed: &Replayed, as_json: bool) {
    let Replayed { stored, drops, failed } = replayed;
    if as_json {
        print(&json!({"stored": stored, "dropped": dropped(drops), "failed": failed}).to_string());
    } else {
        print(&format!("stored {} visits; given up: {}", HumanCount(*stored), reasons(&dropped(drops))));
    }
}
