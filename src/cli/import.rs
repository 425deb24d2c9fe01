//! `waypost import`: links out of a file; `moving` has those out of an embedded store.
//!
//! In: CSV or NDJSON, of any size. Out: links in the store, thousands to a transaction, and the number of each kind; each
//! line that is refused goes to stderr with every reason.
//! Never: stops at a line that is wrong; changes a link that is there, but under `update`; writes with `--dry-run`.
//! At its limit: what the store refuses as a whole ends it; the batches before that stay, and the message says so.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow};
use clap::{Args, ValueEnum};
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use tokio::task::JoinHandle;

use super::{Common, Outcome, block_on, format, format_of, links, moving, print, say, start};
use crate::domain::key::{Code, DomainId, Key};
use crate::domain::time::{self, UnixMillis};
use crate::links::{Checked, Links, NotMade};
use crate::store::Store;
use crate::store::row::{Found, Inserted, OnConflict};
use crate::table::{Format, Reader};

/// Links to a transaction: enough that its commit does not count, few enough that a server waits for it some 10 ms.
/// A million links take 10 s in release on two cores (56 MB of CSV, one thread), 4 s of them for reading and checking.
const BATCH: usize = 1000;
/// The same where each transaction costs round trips: of 100,000 links, 3 s of reading and checking apart, a thousand at a
/// time took 2.6 s, five thousand 0.7 s (an unoptimised build).
const BATCH_POSTGRES: usize = 5000;

#[derive(Debug, Args)]
pub struct Import {
    /// The file; - is stdin
    #[arg(required_unless_present = "from_embedded")]
    file: Option<PathBuf>,
    /// csv or ndjson [default: by the file's ending, else csv]
    #[arg(long, value_parser = format)]
    format: Option<Format>,
    /// What happens to a line whose code is taken
    #[arg(long, value_enum, default_value = "fail")]
    on_conflict: Conflict,
    /// Check everything, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Move everything of the embedded store in this folder into Postgres, but for single visits (`waypost export --visits`
    /// writes them): what is added up of them moves; stop the server that uses it first
    #[arg(long, value_name = "DATA", conflicts_with_all = ["file", "format", "on_conflict", "dry_run"])]
    from_embedded: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Conflict {
    /// It is refused; all others go in
    Fail,
    /// It is left out, and no error
    Skip,
    /// It replaces what the link has
    Update,
}

#[derive(Debug, Default)]
struct Counts {
    lines: u64,
    imported: u64,
    updated: u64,
    skipped: u64,
    refused: u64,
}

struct Run<'a> {
    store: &'a Store,
    links: Arc<Links>,
    on_conflict: Conflict,
    /// With `--dry-run`, the codes that the lines before would have taken.
    dry_run: Option<HashSet<(DomainId, String)>>,
    now: UnixMillis,
    bar: ProgressBar,
    /// Links to a transaction.
    batch: usize,
    /// What is on its way into the store while the lines after it are read; one batch, so that of two lines with the same
    /// code the first one wins.
    sent: Option<Sent>,
    counts: Counts,
}

struct Sent {
    /// Numbers of the lines, and their codes.
    lines: Vec<(u64, Option<Code>)>,
    outcomes: JoinHandle<Result<Vec<Inserted>, NotMade>>,
}

pub fn run(import: &Import, common: &Common) -> Outcome {
    if let Some(data) = &import.from_embedded {
        return moving::run(data, common);
    }
    let path = import.file.as_deref().expect("clap asks for a file where there is no folder");
    block_on(async {
        let (loaded, store) = start(common).await?;
        let format = import.format.unwrap_or_else(|| format_of(path));
        let (bar, input) = open(path)?;
        let mut reader = Reader::new(input, format).with_context(|| path.display().to_string())?;
        let links = Arc::new(links(&loaded.config, &store).await?);
        let mut run = Run {
            store: &store,
            links: Arc::clone(&links),
            on_conflict: import.on_conflict,
            dry_run: import.dry_run.then(HashSet::new),
            now: time::now(),
            bar,
            batch: match &store {
                Store::Sqlite(_) => BATCH,
                Store::Postgres(_) => BATCH_POSTGRES,
            },
            sent: None,
            counts: Counts::default(),
        };
        let read = run.take(&mut reader).await;
        let outcome = read.and(run.settle().await);
        links.close().await;
        run.bar.finish_and_clear();
        print(&run.counts.report(import.dry_run, common.json));
        outcome?;
        match run.counts.refused {
            0 => Ok(()),
            1 => Err(anyhow!("1 line was refused: its reasons stand above").into()),
            refused => Err(anyhow!("{} lines were refused: their reasons stand above", HumanCount(refused)).into()),
        }
    })
}

/// The file, and a bar that follows its reading where there is a terminal.
fn open(path: &Path) -> anyhow::Result<(ProgressBar, Box<dyn BufRead>)> {
    const BUFFER_BYTES: usize = 64 << 10;
    let (bar, template, input): (_, _, Box<dyn Read>) = if path == Path::new("-") {
        (ProgressBar::new_spinner(), "{spinner} {binary_bytes} {binary_bytes_per_sec}", Box::new(io::stdin()))
    } else {
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let bar = ProgressBar::new(file.metadata()?.len());
        (bar, "{wide_bar} {binary_bytes} of {binary_total_bytes} {eta}", Box::new(file))
    };
    bar.set_style(ProgressStyle::with_template(template).expect("the templates are well-formed"));
    let input = BufReader::with_capacity(BUFFER_BYTES, bar.wrap_read(input));
    Ok((bar, Box::new(input)))
}

impl Run<'_> {
    async fn take(&mut self, reader: &mut Reader<Box<dyn BufRead>>) -> Outcome {
        let mut batch = Vec::with_capacity(self.batch);
        loop {
            let lines = self.counts.lines;
            let row = reader.next_row().with_context(|| format!("reading stopped after {lines} lines"))?;
            let Some(row) = row else { break };
            self.counts.lines += 1;
            let checked = row.draft.and_then(|draft| {
                self.links
                    .check(draft, self.now)
                    .map_err(|wrong| wrong.iter().map(ToString::to_string).collect::<Vec<_>>())
            });
            match checked {
                Ok(checked) => batch.push((row.line, checked)),
                Err(reasons) => self.refuse(row.line, &reasons),
            }
            if batch.len() == self.batch {
                self.put(std::mem::take(&mut batch)).await?;
            }
        }
        self.put(batch).await
    }

    /// A batch of lines and their links, into the store or with `--dry-run` nowhere.
    async fn put(&mut self, batch: Vec<(u64, Checked)>) -> Outcome {
        if batch.is_empty() {
            return Ok(());
        }
        if self.dry_run.is_some() {
            return self.foresee(&batch).await;
        }
        self.settle().await?;
        let on_conflict = match self.on_conflict {
            Conflict::Fail | Conflict::Skip => OnConflict::Take,
            Conflict::Update => OnConflict::Update,
        };
        let lines = batch.iter().map(|(line, checked)| (*line, checked.code)).collect();
        let checked = batch.into_iter().map(|(_, checked)| checked).collect();
        let (links, now) = (Arc::clone(&self.links), self.now);
        let outcomes = tokio::spawn(async move { links.import(checked, on_conflict, now).await });
        self.sent = Some(Sent { lines, outcomes });
        Ok(())
    }

    /// Waits for the batch that was sent last.
    async fn settle(&mut self) -> Outcome {
        let Some(Sent { lines, outcomes }) = self.sent.take() else { return Ok(()) };
        let outcomes = outcomes.await.context("the import was ended")?.with_context(|| {
            let first = lines.first().map_or(0, |(line, _)| *line);
            format!(
                "the import stopped at line {first}: what is counted above stays, and --on-conflict skip goes on from there"
            )
        })?;
        for ((line, code), outcome) in lines.into_iter().zip(outcomes) {
            self.count(line, code, &outcome);
        }
        Ok(())
    }

    /// What [`Run::put`] would do.
    async fn foresee(&mut self, batch: &[(u64, Checked)]) -> Outcome {
        let key = |checked: &Checked| checked.code.map(|code| Key { domain: checked.domain, code });
        let keys: Vec<Key> = batch.iter().filter_map(|(_, checked)| key(checked)).collect();
        let mut entries = self.store.look_up(keys).await?.into_iter();
        for (line, checked) in batch {
            let Some(key) = key(checked) else {
                self.count(*line, None, &Inserted::Created);
                continue;
            };
            let mut taken = match entries.next().filter(|found| *found != Found::Missing) {
                Some(Found::Entry(entry)) if !entry.rules.gone => true,
                // Its entry does not tell a deleted link, whose code is free, from one that is disabled.
                Some(_) => self.store.link(key).await?.is_some_and(|link| link.deleted_at.is_none()),
                None => false,
            };
            if let Some(seen) = &mut self.dry_run {
                taken |= !seen.insert((key.domain, key.code.to_string()));
            }
            let outcome = match (taken, self.on_conflict) {
                (false, _) => Inserted::Created,
                (true, Conflict::Update) => Inserted::Updated,
                (true, Conflict::Fail | Conflict::Skip) => Inserted::Taken,
            };
            self.count(*line, Some(key.code), &outcome);
        }
        Ok(())
    }

    fn count(&mut self, line: u64, code: Option<Code>, outcome: &Inserted) {
        match (outcome, self.on_conflict) {
            (Inserted::Created, _) => self.counts.imported += 1,
            (Inserted::Updated, _) => self.counts.updated += 1,
            (Inserted::Failed(why), _) => self.refuse(line, &[format!("{why}: import the line again")]),
            (Inserted::Taken, Conflict::Skip) => self.counts.skipped += 1,
            (Inserted::Taken, Conflict::Fail | Conflict::Update) => {
                let code = code.map_or_else(String::new, |code| code.to_string());
                let way_out = "choose another one, or --on-conflict skip or update";
                self.refuse(line, &[format!("code: {code} is taken: {way_out}")]);
            }
        }
    }

    fn refuse(&mut self, line: u64, reasons: &[String]) {
        self.counts.refused += 1;
        self.bar.suspend(|| reasons.iter().for_each(|reason| say(&format!("line {line}: {reason}"))));
    }
}

impl Counts {
    fn report(&self, dry_run: bool, as_json: bool) -> String {
        let Self { lines, imported, updated, skipped, refused } = *self;
        if as_json {
            return serde_json::json!({
                "dry_run": dry_run, "lines": lines, "imported": imported, "updated": updated, "skipped": skipped,
                "refused": refused,
            })
            .to_string();
        }
        let [lines, imported, updated, skipped, refused] = [lines, imported, updated, skipped, refused].map(HumanCount);
        let would = if dry_run { "would have " } else { "" };
        format!("{would}imported {imported}, updated {updated}, skipped {skipped}, refused {refused} of {lines} lines")
    }
}
