//! `waypost import --from-embedded`: everything of an embedded store into Postgres.
//!
//! In: the folder of an embedded store that no server uses, and a Postgres that has the schema and no links of its own.
//! Out: there what was here, ids, versions, deleted links, keys, pins and what is added up of visits included, each link
//! compared; and the counts of both sides. Single visits stay behind: they are exported.
//! Never: changes the embedded store; changes a link that is in Postgres already, so that it may be run again whenever it
//! was interrupted; calls a move done of which a link differs.
//! At its limit: keeps [`BATCH`] links in memory; what is written to the embedded store meanwhile is noticed at the end,
//! and the move is not done.

use std::collections::HashSet;
use std::io::{self, IsTerminal};
use std::path::Path;

use anyhow::anyhow;
use indicatif::{HumanCount, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::{
    Common, Failure, Hosts, Outcome, announce, block_on, configure, embedded, link, open, print, say, table, warm,
};
use crate::config::load::Flags;
use crate::domain::key::Key;
use crate::domain::link::{Link, LinkId};
use crate::domain::time;
use crate::guard::keys::KeyRecord;
use crate::stats::query::Stats;
use crate::store::row::{Filter, Found, Reading, Rest};
use crate::store::sqlite::{self, Sqlite};
use crate::store::{self, Store};

/// Links to a transaction.
const BATCH: u32 = 5_000;
/// Links that are compared at a time: few enough for the time limits of a page and of a look-up.
const COMPARED: u32 = 500;
/// Totals or days of visits to a transaction: each has up to 8 KiB.
const ADDED_UP: u32 = 500;

/// What a store has.
struct Side {
    links: u64,
    /// None if nobody looked.
    deleted: Option<u64>,
    keys: u64,
    pins: u64,
    /// Those of links.
    visits: u64,
}

pub fn run(data: &Path, common: &Common) -> Outcome {
    let loaded = configure(common, Flags::default())?;
    announce(&loaded);
    if loaded.config.postgres.is_none() {
        return Err(Failure::usage(anyhow!(
            "--from-embedded moves links into Postgres: name it with --postgres or postgres.url"
        )));
    }
    say(&format!("moving {}: stop the server that uses it first", embedded(data).display()));
    block_on(async {
        let source = open_source(data).await?;
        let target = open(&loaded).await?;
        let bar = bar();
        let outcome = move_all(data, &source, &target, &bar).await;
        bar.finish_and_clear();
        let (moved, from, to) = outcome?;
        print(&report(moved, &from, &to, common.json));
        Ok(())
    })
}

/// The embedded store that is there, up to date and at rest.
async fn open_source(data: &Path) -> Result<Store, Failure> {
    let path = embedded(data);
    if !path.exists() {
        return Err(Failure::config(anyhow!("--from-embedded: there is no store at {}", path.display())));
    }
    if let [first, ..] = sqlite::pending(&path)? {
        return Err(Failure::config(anyhow!(
            "the store {} lacks migration {} ({}): run `waypost migrate --postgres '' --data {}`",
            path.display(),
            first.number,
            first.name,
            data.display()
        )));
    }
    let source = Store::Sqlite(Sqlite::open(&path)?);
    // What a server still makes here would be missed.
    if !warm::running(source.instances().await?, time::now()).is_empty() {
        return Err(anyhow!(
            "a server uses {}: stop it first; if it was killed, wait for the {} s after which it counts as gone",
            data.display(),
            warm::SILENT.as_secs()
        )
        .into());
    }
    Ok(source)
}

/// Returns how many links went over, none if the move was done before; and what either side has now.
async fn move_all(
    data: &Path,
    source: &Store,
    target: &Store,
    bar: &ProgressBar,
) -> Result<(Option<u64>, Side, Side), Failure> {
    let before = source.rest().await?;
    bar.set_length(before.links);
    let (after, was_done) = target.adopt_rest(before.clone(), false).await.map_err(stopped)?;
    if was_done {
        if moved_at(target, before.version).await.map_err(stopped)? != before.version {
            return Err(anyhow!(
                "{} was moved before, and was changed since: take new links over with `waypost export` and \
                 `waypost import --on-conflict skip`",
                data.display()
            )
            .into());
        }
        return Ok((None, here(source, &before).await?, there(target, None).await?));
    }
    let moved = copy(source, target, after, bar).await?;
    let rest = source.rest().await?;
    if (rest.version, rest.generation) != (before.version, before.generation) {
        return Err(anyhow!(
            "{} was changed while it was moved: stop the server that uses it, then run this again, it resumes",
            data.display()
        )
        .into());
    }
    compare(source, target, &rest, bar).await?;
    copy_visits(source, target).await?;
    let from = here(source, &rest).await?;
    if Stats::of(target).sum().await.map_err(stopped)? != from.visits {
        return Err(begin_anew("what is added up of visits"));
    }
    let version = rest.version;
    target.adopt_rest(rest, true).await.map_err(stopped)?;
    moved_at(target, version).await.map_err(stopped)?;
    let to = there(target, from.deleted).await?;
    Ok((Some(moved), from, to))
}

/// The embedded store's version when all of it had gone over: `version`, unless that was noted before.
async fn moved_at(target: &Store, version: u64) -> store::Result<u64> {
    let noted = target.settle("moved.version", version.to_be_bytes().to_vec()).await?;
    let noted = noted.try_into().map_err(|_| store::Error::Broken("the setting moved.version is no number".into()))?;
    Ok(u64::from_be_bytes(noted))
}

/// Returns how many links went over.
async fn copy(source: &Store, target: &Store, mut after: LinkId, bar: &ProgressBar) -> Result<u64, Failure> {
    let mut moved = 0;
    loop {
        let links = source.all(after, BATCH).await?;
        let Some(last) = links.last() else { return Ok(moved) };
        after = last.id;
        let count = links.len() as u64;
        target.adopt(links).await.map_err(stopped)?;
        moved += count;
        bar.inc(count);
    }
}

/// What is added up of visits, after the links that it is of.
async fn copy_visits(source: &Store, target: &Store) -> Outcome {
    let (Stats::Sqlite(source), Stats::Postgres(target)) = (Stats::of(source), Stats::of(target)) else {
        return Err(anyhow!("visits move out of an embedded store into Postgres alone").into());
    };
    target.adopt_places(&source.places().await?).await.map_err(stopped)?;
    let mut after = LinkId(0);
    loop {
        let totals = source.totals(after, ADDED_UP).await?;
        let Some((last, _)) = totals.last() else { break };
        after = *last;
        target.adopt_totals(&totals).await.map_err(stopped)?;
    }
    let mut after = (LinkId(0), i32::MIN);
    loop {
        let days = source.days(after, ADDED_UP).await?;
        let Some(last) = days.last() else { return Ok(()) };
        after = (last.link, last.row.day);
        target.adopt_days(&days).await.map_err(stopped)?;
    }
}

fn begin_anew(what: &str) -> Failure {
    anyhow!(
        "{what} is not the same in both stores, so it was changed after it had been moved: empty the database, \
         run `waypost migrate`, then this again"
    )
    .into()
}

/// Everything that is in `source` must be in `target`, and be the same.
async fn compare(source: &Store, target: &Store, rest: &Rest, bar: &ProgressBar) -> Outcome {
    let hosts = Hosts(rest.domains.clone());
    bar.set_position(0);
    let mut after = LinkId(0);
    loop {
        let links = source.all(after, COMPARED).await?;
        let Some(last) = links.last() else { break };
        let (from, count) = (after, links.len() as u64);
        after = last.id;
        if let Some(key) = difference(target, from, links).await.map_err(stopped)? {
            return Err(begin_anew(&format!("the link {}", link::name(key, hosts.name(key.domain)))));
        }
        bar.inc(count);
    }
    let keys = target.keys().await.map_err(stopped)?;
    let known = |key: &&KeyRecord| keys.iter().any(|other| other.id == key.id && other.revoked_at == key.revoked_at);
    if let Some(key) = rest.keys.iter().find(|key| !known(key)) {
        return Err(begin_anew(&format!("the API key {}", key.id)));
    }
    let pins: HashSet<Key> = target.pins().await.map_err(stopped)?.into_iter().collect();
    match rest.pins.iter().find(|key| !pins.contains(key)) {
        Some(key) => Err(begin_anew(&format!("the pin of {}", link::name(*key, hosts.name(key.domain))))),
        None => Ok(()),
    }
}

/// The first of `links`, which follow `after`, that `target` has not or has another. Of deleted ones, which no page
/// shows, it is the answer that must be the same.
async fn difference(target: &Store, after: LinkId, links: Vec<Link>) -> store::Result<Option<Key>> {
    let (deleted, alive): (Vec<Link>, Vec<Link>) = links.into_iter().partition(|link| link.deleted_at.is_some());
    if !alive.is_empty() {
        let page = target.page(Filter::default(), Some(after), alive.len() as u32, Reading::Now).await?;
        let mut page = page.into_iter().map(in_order);
        for link in alive {
            let key = link.key;
            if page.next() != Some(in_order(link)) {
                return Ok(Some(key));
            }
        }
    }
    if deleted.is_empty() {
        return Ok(None);
    }
    let found = target.look_up(deleted.iter().map(|link| link.key).collect()).await?;
    let differs = |(link, found): (&Link, Found)| (found != Found::Entry(link.entry())).then_some(link.key);
    Ok(deleted.iter().zip(found).find_map(differs))
}

/// Stores order tags as their collations do.
fn in_order(mut link: Link) -> Link {
    link.fields.tags.sort_unstable();
    link
}

async fn here(source: &Store, rest: &Rest) -> Result<Side, Failure> {
    let links = source.count(Filter::default(), Reading::Now).await?;
    Ok(Side {
        links,
        deleted: Some(rest.links.saturating_sub(links)),
        keys: rest.keys.len() as u64,
        pins: rest.pins.len() as u64,
        visits: Stats::of(source).sum().await?,
    })
}

async fn there(target: &Store, deleted: Option<u64>) -> Result<Side, Failure> {
    Ok(Side {
        links: target.count(Filter::default(), Reading::Now).await?,
        deleted,
        keys: target.keys().await?.len() as u64,
        pins: target.pins().await?.len() as u64,
        visits: Stats::of(target).sum().await?,
    })
}

/// What Postgres did not do; all that went over before stays there.
fn stopped(error: store::Error) -> Failure {
    let again = error.is_transient();
    let failure = Failure::from(error);
    if !again {
        return failure;
    }
    Failure { error: failure.error.context("the move stopped: run this again, it resumes"), ..failure }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::hidden();
    if io::stderr().is_terminal() {
        let style = ProgressStyle::with_template("{wide_bar} {human_pos} of {human_len} links {eta}");
        bar.set_style(style.expect("the template is well-formed"));
        bar.set_draw_target(ProgressDrawTarget::stderr());
    }
    bar
}

fn report(moved: Option<u64>, from: &Side, to: &Side, as_json: bool) -> String {
    if as_json {
        let side = |side: &Side| {
            json!({"links": side.links, "deleted": side.deleted, "keys": side.keys, "pins": side.pins,
                "visits": side.visits})
        };
        return json!({"moved": moved.unwrap_or(0), "was_done": moved.is_none(), "embedded": side(from), "postgres": side(to)})
            .to_string();
    }
    let head = match moved {
        Some(moved) => format!("moved {} links, each is the same in both stores", HumanCount(moved)),
        None => "nothing was left to do: it was moved before".to_owned(),
    };
    let row = |name: &str, from: Option<u64>, to: Option<u64>| {
        let count = |count: Option<u64>| count.map_or("-".to_owned(), |count| HumanCount(count).to_string());
        vec![name.to_owned(), count(from), count(to)]
    };
    let rows = [
        vec![String::new(), "EMBEDDED".to_owned(), "POSTGRES".to_owned()],
        row("links", Some(from.links), Some(to.links)),
        row("deleted", from.deleted, to.deleted),
        row("keys", Some(from.keys), Some(to.keys)),
        row("pins", Some(from.pins), Some(to.pins)),
        row("visits", Some(from.visits), Some(to.visits)),
    ];
    format!("{head}\n{}", table(&rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports() {
        let side = |links, deleted| Side { links, deleted, keys: 2, pins: 1, visits: 9 };
        assert_eq!(
            report(Some(1_234), &side(1_200, Some(34)), &side(1_200, Some(34)), false),
            "moved 1,234 links, each is the same in both stores\n         \
             EMBEDDED  POSTGRES\nlinks    1,200     1,200\ndeleted  34        34\nkeys     2         2\npins     1         1\nvisits   9         9"
        );
        let text = report(None, &side(5, Some(0)), &side(7, None), false);
        assert!(text.starts_with("nothing was left to do") && text.contains("\ndeleted  0         -\n"), "{text}");
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&report(None, &side(5, Some(0)), &side(7, None), true)).unwrap(),
            json!({
                "moved": 0,
                "was_done": true,
                "embedded": {"links": 5, "deleted": 0, "keys": 2, "pins": 1, "visits": 9},
                "postgres": {"links": 7, "deleted": null, "keys": 2, "pins": 1, "visits": 9},
            })
        );
    }
}
