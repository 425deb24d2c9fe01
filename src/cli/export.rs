//! `waypost export`: links, or visits, to a file or to stdout.
//!
//! In: the store, while others write to it. Out: every link that is not deleted, by id, as `table` writes them; or every
//! visit that is kept, oldest first, as `stats::export` does.
//! Never: keeps more than [`PAGE`] links in memory, or a few pages of visits; leaves half a file under its name: it is FILE.part until it is whole.
//! At its limit: a reader of stdout that has gone ends it, without an error.

use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use indicatif::{HumanCount, ProgressBar, ProgressStyle};

use super::{Common, Failure, Hosts, Outcome, Wanted, block_on, format, format_of, print, say, start};
use crate::domain::link::LinkId;
use crate::stats::export as visits;
use crate::stats::query::Stats;
use crate::store::Store;
use crate::store::row::{Filter, Reading};
use crate::table::{self, Format};

const PAGE: u32 = 1000;

#[derive(Debug, Args)]
pub struct Export {
    /// The file; - is stdout
    #[arg(default_value = "-")]
    file: PathBuf,
    /// csv or ndjson [default: by the file's ending, else csv]
    #[arg(long, value_parser = format)]
    format: Option<Format>,
    /// Write visits, a line each, instead of links
    #[arg(long, conflicts_with_all = ["search", "tag", "domain"])]
    visits: bool,
    #[command(flatten)]
    wanted: Wanted,
}

/// What is written.
enum What {
    Links(Filter),
    Visits,
}

impl What {
    fn name(&self) -> &'static str {
        match self {
            Self::Links(_) => "links",
            Self::Visits => "visits",
        }
    }
}

pub fn run(export: &Export, common: &Common) -> Outcome {
    let format = export.format.unwrap_or_else(|| format_of(&export.file));
    block_on(async {
        let (loaded, store) = start(common).await?;
        if export.visits && !loaded.config.visits.raw {
            say(
                "visits.raw is false: single visits are not kept, and only those of before are written; waypost stats CODE has totals",
            );
        }
        let hosts = Hosts::read(&store).await?;
        let what = if export.visits { What::Visits } else { What::Links(export.wanted.filter(&hosts)?) };
        if export.file == Path::new("-") {
            let mut out = io::stdout().lock();
            return match write(&store, &hosts, &what, format, &mut out, &ProgressBar::hidden()).await {
                Err(failure) if is_broken_pipe(&failure) => Ok(()),
                outcome => outcome.map(|_| ()),
            };
        }
        let written = to_file(&store, &hosts, &what, format, &export.file).await?;
        if common.json {
            print(&serde_json::json!({"exported": written, "file": export.file}).to_string());
        } else {
            let (name, file) = (what.name(), export.file.display());
            print(&format!("exported {} {name} to {file}", HumanCount(written)));
        }
        Ok(())
    })
}

fn is_broken_pipe(failure: &Failure) -> bool {
    failure.error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

async fn to_file(store: &Store, hosts: &Hosts, what: &What, format: Format, path: &Path) -> Result<u64, Failure> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let bar = ProgressBar::hidden();
    if io::stderr().is_terminal() {
        let style = match what {
            What::Links(filter) => {
                bar.set_length(store.count(filter.clone(), Reading::Lately).await?);
                ProgressStyle::with_template("{wide_bar} {human_pos} of {human_len} links {eta}")
            }
            // To count them would take as long as to read them.
            What::Visits => ProgressStyle::with_template("{human_pos} visits {per_sec}"),
        };
        bar.set_style(style.expect("the template is well-formed"));
        bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
    }
    let mut out = File::create(&part).with_context(|| format!("cannot write {}", part.display()))?;
    let written = write(store, hosts, what, format, &mut out, &bar).await;
    bar.finish_and_clear();
    let kept = written.and_then(|written| {
        out.sync_all()?;
        std::fs::rename(&part, path)?;
        Ok(written)
    });
    kept.map_err(|failure| {
        // What is left of it is of no use, and may be what fills the disk.
        let _ = std::fs::remove_file(&part);
        Failure { error: failure.error.context(format!("{} is not written", path.display())), ..failure }
    })
}

/// Returns how many there were.
async fn write(
    store: &Store,
    hosts: &Hosts,
    what: &What,
    format: Format,
    out: &mut impl Write,
    bar: &ProgressBar,
) -> Result<u64, Failure> {
    match what {
        What::Links(filter) => write_links(store, hosts, filter, format, out, bar).await,
        What::Visits => write_visits(store, hosts, format, out, bar).await,
    }
}

async fn write_visits(
    store: &Store,
    hosts: &Hosts,
    format: Format,
    out: &mut impl Write,
    bar: &ProgressBar,
) -> Result<u64, Failure> {
    let mut writer = visits::Writer::new(format);
    let mut pages = visits::Pages::of(&Stats::of(store));
    let mut written = 0;
    loop {
        let page = pages.next().await?;
        let visits = page.as_deref().unwrap_or_default();
        out.write_all(&writer.write(visits, |domain| hosts.name(domain)))?;
        written += visits.len() as u64;
        bar.set_position(written);
        if page.is_none() {
            out.flush()?;
            return Ok(written);
        }
    }
}

async fn write_links(
    store: &Store,
    hosts: &Hosts,
    filter: &Filter,
    format: Format,
    out: &mut impl Write,
    bar: &ProgressBar,
) -> Result<u64, Failure> {
    let mut writer = table::Writer::new(format);
    let mut after: Option<LinkId> = None;
    let mut written = 0;
    let mut disabled = 0;
    loop {
        let links = store.page(filter.clone(), after, PAGE, Reading::Lately).await?;
        out.write_all(&writer.write(&links, |domain| hosts.name(domain)))?;
        written += links.len() as u64;
        disabled += links.iter().filter(|link| link.disabled_at.is_some()).count();
        bar.set_position(written);
        after = links.last().map(|link| link.id);
        if after.is_none() {
            out.flush()?;
            if disabled > 0 {
                say(&format!(
                    "{disabled} of the links are disabled, which no column says: an import would enable them"
                ));
            }
            return Ok(written);
        }
    }
}
