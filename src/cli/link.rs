//! `waypost link`: single links, and the list of them.
//!
//! In: codes and fields, as texts. Out: a link that is on the disk, or everything that is wrong, a line each.
//! Never: shows a deleted link; waits for a running server, which sees a change within a second.

use std::io::{ErrorKind, IsTerminal, Write};

use anyhow::anyhow;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{Common, Failure, Hosts, Outcome, Wanted, base_url, block_on, links, print, say, start, table};
use crate::config::Config;
use crate::domain::key::Key;
use crate::domain::link::{self as domain, LinkId};
use crate::domain::target::Target;
use crate::domain::time::{self, UnixMillis};
use crate::links::{BadField, Draft, Links, rfc3339};
use crate::store::Store;
use crate::store::row::{Change, Reading};

/// Links that are read at a time.
const PAGE: u32 = 1000;
/// The store keeps numbers as signed ones.
const COUNT_MAX: u64 = i64::MAX as u64;
/// Of a target, where there is no room for it.
const TARGET_CHARS_MIN: usize = 20;
/// Of the states of [`state`].
const STATE_CHARS: usize = 8;

#[derive(Debug, Args)]
pub struct Link {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make a link and print its short URL
    Add {
        /// Where it leads
        url: String,
        /// Its code [default: a generated one]
        #[arg(long, allow_hyphen_values = true)]
        code: Option<String>,
        /// The host of its domain [default: the default domain]
        #[arg(long, value_name = "HOST")]
        domain: Option<String>,
        #[command(flatten)]
        fields: Box<Fields>,
    },
    /// Show a link
    Show(Which),
    /// Change fields of a link; "" clears one
    Edit {
        #[command(flatten)]
        which: Which,
        /// Where it leads
        #[arg(long)]
        url: Option<String>,
        #[command(flatten)]
        fields: Box<Fields>,
    },
    /// Answer 410 until it is enabled again
    Disable(Which),
    /// Answer again
    Enable(Which),
    /// Delete a link
    Rm(Which),
    /// List links
    Ls {
        #[command(flatten)]
        wanted: Wanted,
        /// At most so many [default: all]
        #[arg(long, value_name = "N")]
        limit: Option<u64>,
    },
}

#[derive(Debug, Args)]
struct Which {
    code: String,
    /// The host of its domain [default: the default domain]
    #[arg(long, value_name = "HOST")]
    domain: Option<String>,
}

#[derive(Debug, Args)]
struct Fields {
    #[arg(long, allow_hyphen_values = true)]
    title: Option<String>,
    /// May be given several times
    #[arg(long = "tag", value_name = "TAG")]
    tags: Option<Vec<String>>,
    /// 301, 302, 303, 307 or 308 [default: redirect.status]
    #[arg(long, value_parser = number)]
    status: Option<u64>,
    /// From when on it answers: 2027-01-31, 2027-01-31T09:00:00+01:00, 7d
    #[arg(long, value_name = "TIME")]
    starts: Option<String>,
    /// When it ends: 2027-01-31, 2027-01-31T09:00:00+01:00, 90d
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
    /// Where it leads once it has ended
    #[arg(long, value_name = "URL")]
    expired_url: Option<String>,
    /// How often it answers in all; on Postgres, an instance that is killed may take up to 256 of them along
    #[arg(long, value_name = "N", value_parser = number)]
    max_visits: Option<u64>,
    /// [default: redirect.cache_control]
    #[arg(long, value_name = "HEADER")]
    cache_control: Option<String>,
    /// Whether a visitor's query is added to the target [default: redirect.forward_query]
    #[arg(long, value_name = "BOOL", value_parser = ["true", "false", ""])]
    forward_query: Option<String>,
    #[arg(long, allow_hyphen_values = true)]
    note: Option<String>,
}

/// A number; the empty text, as 0, is none.
fn number(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(number) if number <= COUNT_MAX => Ok(number),
        Err(_) if text.is_empty() => Ok(0),
        _ => Err(format!("it is no whole number from 1 to {COUNT_MAX}")),
    }
}

impl Fields {
    fn draft(&self) -> Draft {
        Draft {
            title: self.title.clone(),
            tags: self.tags.clone(),
            status: self.status,
            cache_control: self.cache_control.clone(),
            starts_at: self.starts.clone(),
            expires_at: self.expires.clone(),
            expired_url: self.expired_url.clone(),
            max_visits: self.max_visits,
            forward_query: self.forward_query.as_deref().and_then(|text| text.parse().ok()),
            note: self.note.clone(),
            ..Draft::default()
        }
    }

    fn clears_forward_query(&self) -> bool {
        self.forward_query.as_deref() == Some("")
    }
}

/// What every action but `ls` works with.
struct Desk<'a> {
    config: &'a Config,
    store: &'a Store,
    links: Links,
    now: UnixMillis,
    json: bool,
}

pub fn run(link: &Link, common: &Common) -> Outcome {
    block_on(async {
        let (loaded, store) = start(common).await?;
        if let Action::Ls { wanted, limit } = &link.action {
            return list(&store, wanted, limit.unwrap_or(u64::MAX), common.json).await;
        }
        let links = links(&loaded.config, &store).await?;
        let desk = Desk { config: &loaded.config, store: &store, links, now: time::now(), json: common.json };
        let outcome = match &link.action {
            Action::Add { url, code, domain, fields } => desk.add(url, code.as_ref(), domain.as_ref(), fields).await,
            Action::Show(which) => desk.show(which).await,
            Action::Edit { which, url, fields } => desk.edit(which, url.as_ref(), fields).await,
            Action::Disable(which) => desk.change(which, Change::Disable).await,
            Action::Enable(which) => desk.change(which, Change::Enable).await,
            Action::Rm(which) => desk.change(which, Change::Delete).await,
            Action::Ls { .. } => Ok(()),
        };
        desk.links.close().await;
        outcome
    })
}

impl Desk<'_> {
    async fn add(&self, url: &str, code: Option<&String>, domain: Option<&String>, fields: &Fields) -> Outcome {
        let draft = Draft { url: Some(url.to_owned()), code: code.cloned(), domain: domain.cloned(), ..fields.draft() };
        let checked = self.links.check(draft, self.now).map_err(|wrong| refused(&wrong))?;
        if checked.lookalike {
            say("the target's host looks like another one: is it the one that is meant?");
        }
        let (key, _) = self.links.create(checked, self.now).await?;
        if !self.json {
            print(&self.short_url(key));
            return Ok(());
        }
        let link = self.find(key).await?;
        self.tell(&link, "");
        Ok(())
    }

    async fn show(&self, which: &Which) -> Outcome {
        let link = self.find(self.key(which)?).await?;
        if self.json {
            self.tell(&link, "");
            return Ok(());
        }
        let rows: Vec<Vec<String>> = self
            .describe(&link)
            .into_iter()
            .filter_map(|(name, value)| {
                let text = match value {
                    Value::Null => return None,
                    Value::String(text) => text,
                    Value::Array(list) => list.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "),
                    other => other.to_string(),
                };
                (!text.is_empty()).then(|| vec![name.to_owned(), text])
            })
            .collect();
        print(&table(&rows));
        Ok(())
    }

    async fn edit(&self, which: &Which, url: Option<&String>, fields: &Fields) -> Outcome {
        let draft = Draft { url: url.cloned(), ..fields.draft() };
        if draft == Draft::default() && !fields.clears_forward_query() {
            return Err(Failure::usage(anyhow!("nothing is to be changed: give a field, such as --url or --title")));
        }
        let mut patch = self.links.check_patch(draft, self.now).map_err(|wrong| refused(&wrong))?;
        if fields.clears_forward_query() {
            patch.forward_query = Some(None);
        }
        self.change(which, Change::Edit(Box::new(patch))).await
    }

    async fn change(&self, which: &Which, change: Change) -> Outcome {
        let what = match &change {
            Change::Edit(_) => "is changed",
            Change::Disable => "is disabled",
            Change::Enable => "is enabled",
            Change::Delete => "is deleted",
        };
        let key = self.key(which)?;
        match self.store.change(key, change, self.now).await? {
            Some(link) => self.tell(&link, what),
            // It says why.
            None => drop(self.find(key).await?),
        }
        Ok(())
    }

    fn key(&self, which: &Which) -> Result<Key, Failure> {
        self.links.key(&which.code, which.domain.as_deref()).map_err(Into::into)
    }

    /// The link, unless it is deleted.
    async fn find(&self, key: Key) -> Result<domain::Link, Failure> {
        let name = name(key, self.links.host(key.domain));
        let link = self.store.link(key).await?;
        let link = link.ok_or_else(|| anyhow!("there is no link {name}: `waypost link ls` lists all"))?;
        match link.deleted_at {
            None => Ok(link),
            Some(at) => Err(anyhow!("the link {name} was deleted at {}", rfc3339(at)).into()),
        }
    }

    fn tell(&self, link: &domain::Link, what: &str) {
        if self.json {
            let object: serde_json::Map<_, _> =
                self.describe(link).into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
            print(&Value::Object(object).to_string());
        } else {
            print(&format!("{} {what}", name(link.key, self.links.host(link.key.domain))));
        }
    }

    /// `base_url` and the code; on another domain its host under the same scheme.
    fn short_url(&self, key: Key) -> String {
        let base = base_url(self.config);
        match self.links.host(key.domain) {
            "" => format!("{base}/{}", key.code),
            host => format!("{}://{host}/{}", base.split_once("://").map_or("http", |(scheme, _)| scheme), key.code),
        }
    }

    fn describe(&self, link: &domain::Link) -> Vec<(&'static str, Value)> {
        let fields = &link.fields;
        let host = self.links.host(link.key.domain);
        let time = |at: Option<UnixMillis>| json!(at.map(rfc3339));
        vec![
            ("short_url", self.short_url(link.key).into()),
            ("state", state(link, self.now).into()),
            ("code", link.key.code.to_string().into()),
            ("domain", json!(Some(host).filter(|host| !host.is_empty()))),
            ("url", fields.target_written.clone().into()),
            ("target", fields.target.as_str().into()),
            ("title", json!(fields.title)),
            ("tags", json!(fields.tags)),
            ("status", json!(fields.status)),
            ("cache_control", json!(fields.cache_control)),
            ("forward_query", json!(fields.forward_query)),
            ("starts_at", time(fields.starts_at)),
            ("expires_at", time(fields.expires_at)),
            ("expired_url", json!(fields.expired_url.as_ref().map(Target::as_str))),
            ("max_visits", json!(fields.max_visits)),
            ("visits_used", json!(fields.max_visits.map(|_| link.visits_used))),
            ("note", json!(fields.note)),
            ("imported_clicks", link.imported_clicks.into()),
            ("created_at", time(Some(link.created_at))),
            ("updated_at", time(Some(link.updated_at))),
            ("disabled_at", time(link.disabled_at)),
            ("deleted_at", time(link.deleted_at)),
        ]
    }
}

fn refused(wrong: &[BadField]) -> anyhow::Error {
    let lines: Vec<String> = wrong.iter().map(|field| format!("\n  {field}")).collect();
    anyhow!("the link is refused{}", lines.concat())
}

/// A code as people tell it from those of other domains.
pub(super) fn name(key: Key, host: &str) -> String {
    if host.is_empty() { key.code.to_string() } else { format!("{host}/{}", key.code) }
}

/// What a link answers now, and why not.
fn state(link: &domain::Link, now: UnixMillis) -> &'static str {
    let fields = &link.fields;
    if link.deleted_at.is_some() {
        "deleted"
    } else if link.disabled_at.is_some() {
        "disabled"
    } else if fields.max_visits.is_some_and(|max| link.visits_used >= max) {
        "used up"
    } else {
        match link.entry().rules.validity(now) {
            domain::Validity::Expired => "expired",
            domain::Validity::NotYet => "not yet",
            domain::Validity::Valid | domain::Validity::Gone => "on",
        }
    }
}

async fn list(store: &Store, wanted: &Wanted, limit: u64, as_json: bool) -> Outcome {
    let hosts = Hosts::read(store).await?;
    let filter = wanted.filter(&hosts)?;
    let now = time::now();
    let columns = terminal_columns();
    let mut out = std::io::stdout().lock();
    let mut after: Option<LinkId> = None;
    let mut left = limit;
    let mut text = if as_json { "[".to_owned() } else { String::new() };
    loop {
        let page = left.min(PAGE.into()) as u32;
        let links = if page == 0 { Vec::new() } else { store.page(filter.clone(), after, page, Reading::Now).await? };
        let rows: Vec<_> = links.iter().map(|link| (name(link.key, hosts.name(link.key.domain)), link)).collect();
        let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0).max(10);
        for (index, (name, link)) in rows.into_iter().enumerate() {
            let (target, state) = (link.fields.target.as_str(), state(link, now));
            if as_json {
                let object = json!({
                    "code": link.key.code.to_string(),
                    "domain": Some(hosts.name(link.key.domain)).filter(|host| !host.is_empty()),
                    "target": target,
                    "title": link.fields.title,
                    "tags": link.fields.tags,
                    "state": state,
                });
                let separator = if after.is_none() && index == 0 { "\n" } else { ",\n" };
                text += &format!("{separator}{object}");
            } else {
                text += &match columns {
                    // Four spaces stand between the columns.
                    Some(columns) => {
                        let room = columns.saturating_sub(width + STATE_CHARS + 4).max(TARGET_CHARS_MIN);
                        format!("{name:width$}  {:room$}  {state}\n", cut(target, room))
                    }
                    None => format!("{name:width$}  {target}  {state}\n"),
                };
            }
        }
        let ended = links.is_empty();
        if ended && as_json {
            text += "\n]\n";
        }
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            // `waypost link ls | head`: whoever reads has enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
            written => written?,
        }
        if ended {
            return Ok(());
        }
        text.clear();
        left -= links.len() as u64;
        after = links.last().map(|link| link.id);
    }
}

/// A target, all of it ASCII, in at most so many characters.
fn cut(target: &str, room: usize) -> String {
    if target.len() <= room { target.to_owned() } else { format!("{}…", &target[..room - 1]) }
}

/// The width of the terminal that stdout is; a file gets every target whole.
fn terminal_columns() -> Option<usize> {
    let stdout = std::io::stdout();
    let size = stdout.is_terminal().then(|| rustix::termios::tcgetwinsize(&stdout).ok())??;
    Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_cut() {
        for (target, room, want) in [("abc", 3, "abc"), ("abcd", 3, "ab…"), ("abc", 20, "abc")] {
            assert_eq!(cut(target, room), want);
        }
    }

    #[test]
    fn numbers() {
        for (text, want) in [
            ("", Some(0)),
            ("5", Some(5)),
            ("9223372036854775807", Some(COUNT_MAX)),
            ("9223372036854775808", None),
            ("-1", None),
            ("x", None),
        ] {
            assert_eq!(number(text).ok(), want, "{text:?}");
        }
    }
}
