//! `waypost export`: links to a file or to stdout.
//!
//! In: the store, while others write to it. Out: every link that is not deleted, by id, as `table` writes them.
//! Never: keeps more than [`PAGE`] links in memory; leaves half a file under its name: it is FILE.part until it is whole.
//! At its limit: a reader of stdout that has gone ends it, without an error.

use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use indicatif::{HumanCount, ProgressBar, ProgressStyle};

use super::{Common, Failure, Hosts, Outcome, Wanted, block_on, format, format_of, print, say, start};
use crate::domain::link::LinkId;
use crate::store::Store;
use crate::store::row::{Filter, Reading};
use crate::table::{Format, Writer};

const PAGE: u32 = 1000;

#[derive(Debug, Args)]
pub struct Export {
    /// The file; - is stdout
    #[arg(default_value = "-")]
    file: PathBuf,
    /// csv or ndjson [default: by the file's ending, else csv]
    #[arg(long, value_parser = format)]
    format: Option<Format>,
    #[command(flatten)]
    wanted: Wanted,
}

pub fn run(export: &Export, common: &Common) -> Outcome {
    let writer = Writer::new(export.format.unwrap_or_else(|| format_of(&export.file)));
    block_on(async {
        let (_, store) = start(common).await?;
        let hosts = Hosts::read(&store).await?;
        let filter = export.wanted.filter(&hosts)?;
        if export.file == Path::new("-") {
            let mut out = io::stdout().lock();
            return match write(&store, &hosts, filter, writer, &mut out, &ProgressBar::hidden()).await {
                Err(failure) if is_broken_pipe(&failure) => Ok(()),
                outcome => outcome.map(|_| ()),
            };
        }
        let written = to_file(&store, &hosts, filter, writer, &export.file).await?;
        if common.json {
            print(&serde_json::json!({"exported": written, "file": export.file}).to_string());
        } else {
            print(&format!("exported {} links to {}", HumanCount(written), export.file.display()));
        }
        Ok(())
    })
}

fn is_broken_pipe(failure: &Failure) -> bool {
    failure.error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

async fn to_file(store: &Store, hosts: &Hosts, filter: Filter, writer: Writer, path: &Path) -> Result<u64, Failure> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let bar = ProgressBar::hidden();
    if io::stderr().is_terminal() {
        let style = ProgressStyle::with_template("{wide_bar} {human_pos} of {human_len} links {eta}");
        bar.set_style(style.expect("the template is well-formed"));
        bar.set_length(store.count(filter.clone(), Reading::Lately).await?);
        bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
    }
    let mut out = File::create(&part).with_context(|| format!("cannot write {}", part.display()))?;
    let written = write(store, hosts, filter, writer, &mut out, &bar).await;
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

/// Returns how many links there were.
async fn write(
    store: &Store,
    hosts: &Hosts,
    filter: Filter,
    mut writer: Writer,
    out: &mut impl Write,
    bar: &ProgressBar,
) -> Result<u64, Failure> {
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
