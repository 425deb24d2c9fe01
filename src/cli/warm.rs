//! `waypost warm`, `pin` and `unpin`: links in the memory of every running server.
//!
//! In: codes, a tag, or a number of the most visited. Out: what each instance loaded of them; or how many pins changed.
//! Never: loads anything itself, each instance does as soon as it sees the request in the store, within a second; waits
//! for one that starts later, which is not asked any more.
//! At its limits: [`CODES_MAX`] codes at a time, [`PINS_MAX`] pins in all, and `--timeout` for the reports.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::anyhow;
use clap::{ArgGroup, Args};
use indicatif::HumanCount;
use serde_json::json;

use super::link::name;
use super::{Common, Failure, Hosts, Outcome, block_on, print, start};
use crate::config::units;
use crate::domain::key::{Case, Code, DomainId, Key};
use crate::domain::time::{self, UnixMillis};
use crate::store::row::{Found, InstanceRow, WarmReport, WarmWhat};
use crate::store::{self, Store};

/// They travel in one row of the store.
const CODES_MAX: usize = 10_000;
/// Every instance keeps them all in memory.
const PINS_MAX: usize = 10_000;
/// Codes to a look-up, which has a time limit of its own.
const LOOKED_UP: usize = 500;
/// An instance that has not been heard of for longer has ended without saying so.
pub(super) const SILENT: Duration = Duration::from_secs(90);
/// Between two looks for reports.
const POLL: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("what").required(true).args(["codes", "top", "tag"])))]
pub struct Warm {
    /// Codes of links
    #[arg(value_name = "CODE")]
    codes: Vec<String>,
    /// The N most visited links: clicks, and what an import brought along
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    top: Option<u32>,
    /// All links with this tag
    #[arg(long)]
    tag: Option<String>,
    /// The host of the codes' domain [default: the default domain]
    #[arg(long, value_name = "HOST", conflicts_with_all = ["top", "tag"])]
    domain: Option<String>,
    /// How long to wait for the instances: 10s, 2min
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = units::duration)]
    timeout: Duration,
}

#[derive(Debug, Args)]
pub struct Pins {
    /// Codes of links
    #[arg(value_name = "CODE", required = true)]
    codes: Vec<String>,
    /// The host of the codes' domain [default: the default domain]
    #[arg(long, value_name = "HOST")]
    domain: Option<String>,
}

pub fn run(warm: &Warm, common: &Common) -> Outcome {
    block_on(async {
        let (loaded, store) = start(common).await?;
        let hosts = Hosts::read(&store).await?;
        let keys = keys(&warm.codes, warm.domain.as_deref(), &hosts, loaded.config.codes.case)?;
        let unknown = without_link(&store, &keys).await?;
        let what = match (&warm.tag, warm.top) {
            (Some(tag), _) => WarmWhat::Tag(tag.clone()),
            (None, Some(count)) => WarmWhat::Top(count),
            (None, None) => WarmWhat::Codes(keys.iter().map(|key| (key.domain.0, key.code.to_string())).collect()),
        };
        // Read before it asks: who comes later may never see the request.
        let running = running(store.instances().await?, time::now());
        let mut reports = Vec::new();
        if !running.is_empty() {
            let number = store.ask_warm(what, time::now()).await?;
            reports = wait(&store, number, &running, warm.timeout).await?;
        }
        print(&report(&running, &reports, common.json));
        let mut wrong = Vec::new();
        let silent = running.iter().filter(|instance| of(&reports, instance).is_none()).count();
        if silent > 0 {
            wrong.push(format!(
                "{silent} of {} instances did not answer within {}: look at `waypost status` there, --timeout waits longer",
                running.len(),
                units::print_duration(warm.timeout)
            ));
        }
        if !unknown.is_empty() {
            wrong.push(no_link(&unknown, &hosts));
        }
        if wrong.is_empty() { Ok(()) } else { Err(anyhow!(wrong.join("\n")).into()) }
    })
}

/// Pins codes, or with `pinned` false lets them go.
pub fn pin(pins: &Pins, pinned: bool, common: &Common) -> Outcome {
    block_on(async {
        let (loaded, store) = start(common).await?;
        let hosts = Hosts::read(&store).await?;
        let keys = keys(&pins.codes, pins.domain.as_deref(), &hosts, loaded.config.codes.case)?;
        let before: HashSet<Key> = store.pins().await?.into_iter().collect();
        let mut unknown = without_link(&store, &keys).await?;
        // A link that was deleted may be pinned still.
        unknown.retain(|key| pinned || !before.contains(key));
        if !unknown.is_empty() {
            return Err(anyhow!(no_link(&unknown, &hosts)).into());
        }
        let more = keys.iter().filter(|key| !before.contains(key)).count();
        if pinned && more > 0 && before.len() + more > PINS_MAX {
            return Err(anyhow!(
                "{} links are pinned and {more} more are too many: at most {PINS_MAX} can be, `waypost unpin` makes room",
                before.len()
            )
            .into());
        }
        let asked = keys.len() as u64;
        let changed = store.pin(keys, pinned, time::now()).await?;
        let (all, unchanged) = (store.pins().await?.len() as u64, asked.saturating_sub(changed));
        let (did, were) = if pinned { ("pinned", "pinned before") } else { ("unpinned", "not pinned") };
        if common.json {
            print(&json!({did: changed, "unchanged": unchanged, "pins": all}).to_string());
        } else {
            let [changed, unchanged, all] = [changed, unchanged, all].map(HumanCount);
            print(&format!("{did} {changed}, {unchanged} {were}, {all} pins in all"));
        }
        Ok(())
    })
}

/// The keys of codes as a person writes them, each once.
fn keys(codes: &[String], domain: Option<&str>, hosts: &Hosts, case: Case) -> Result<Vec<Key>, Failure> {
    if codes.len() > CODES_MAX {
        return Err(Failure::usage(anyhow!("{} codes are too many: give at most {CODES_MAX} at a time", codes.len())));
    }
    let domain = domain.map(|host| hosts.id(host)).transpose()?.unwrap_or(DomainId(0));
    let mut seen = HashSet::new();
    let mut keys = Vec::with_capacity(codes.len());
    for text in codes {
        let code =
            Code::parse(text.trim().as_bytes(), case).map_err(|error| anyhow!("{error}, and {text:?} is not"))?;
        let key = Key { domain, code };
        if seen.insert(key) {
            keys.push(key);
        }
    }
    Ok(keys)
}

/// Those of `keys` that no link has, or one that was deleted.
async fn without_link(store: &Store, keys: &[Key]) -> store::Result<Vec<Key>> {
    let mut without = Vec::new();
    for keys in keys.chunks(LOOKED_UP) {
        for (key, found) in keys.iter().zip(store.look_up(keys.to_vec()).await?) {
            let is_link = match found {
                Found::Missing => false,
                // Its entry does not tell one that was deleted from one that is disabled.
                Found::Entry(entry) if entry.rules.gone => {
                    store.link(*key).await?.is_some_and(|link| link.deleted_at.is_none())
                }
                Found::Entry(_) | Found::Unreadable => true,
            };
            if !is_link {
                without.push(*key);
            }
        }
    }
    Ok(without)
}

fn no_link(unknown: &[Key], hosts: &Hosts) -> String {
    let names: Vec<String> = unknown.iter().map(|key| name(*key, hosts.name(key.domain))).collect();
    format!("there is no link {}: `waypost link ls` lists all", names.join(", "))
}

/// The names of the instances that were heard of lately.
pub(super) fn running(instances: Vec<InstanceRow>, now: UnixMillis) -> Vec<String> {
    let heard = |instance: &InstanceRow| instance.seen_at.after(SILENT) >= now;
    let mut names: Vec<String> = instances.into_iter().filter(heard).map(|instance| instance.instance).collect();
    names.sort_unstable();
    names
}

/// What came of a request by the time that all instances have reported, or that the time is over.
async fn wait(store: &Store, number: u64, running: &[String], timeout: Duration) -> store::Result<Vec<WarmReport>> {
    let asked = time::monotonic();
    loop {
        let reports = store.warm_reports(number).await?;
        let all = running.iter().all(|instance| of(&reports, instance).is_some());
        if all || time::monotonic().saturating_duration_since(asked) >= timeout {
            return Ok(reports);
        }
        tokio::time::sleep(POLL).await;
    }
}

fn of<'a>(reports: &'a [WarmReport], instance: &str) -> Option<&'a WarmReport> {
    reports.iter().find(|report| report.instance == instance)
}

fn report(running: &[String], reports: &[WarmReport], as_json: bool) -> String {
    if as_json {
        let instances = running.iter().map(|instance| {
            let report = of(reports, instance);
            json!({
                "instance": instance,
                "answered": report.is_some(),
                "loaded": report.map(|report| report.loaded),
                "missing": report.map(|report| report.missing),
            })
        });
        return json!({"instances": instances.collect::<Vec<_>>()}).to_string();
    }
    if running.is_empty() {
        return "no instance runs".to_owned();
    }
    let lines = running.iter().map(|instance| match of(reports, instance) {
        Some(report) => {
            format!("{instance}  loaded {}, missing {}", HumanCount(report.loaded), HumanCount(report.missing))
        }
        None => format!("{instance}  no answer"),
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(instance: &str, seen_at: i64) -> InstanceRow {
        InstanceRow { instance: instance.to_owned(), seen_at: UnixMillis(seen_at) }
    }

    #[test]
    fn who_runs() {
        let check = |instances: &[(&str, i64)], want: &[&str]| {
            let rows = instances.iter().map(|(instance, seen_at)| row(instance, *seen_at)).collect();
            assert_eq!(running(rows, UnixMillis(1_000_000)), want, "{instances:?}");
        };
        check(&[], &[]);
        check(&[("b", 1_000_000), ("a", 999_000)], &["a", "b"]);
        check(&[("a", 910_000), ("b", 909_999)], &["a"]);
        // Its clock is ahead of ours.
        check(&[("a", 2_000_000)], &["a"]);
    }

    #[test]
    fn reports() {
        let running = ["a".to_owned(), "b".to_owned()];
        let reports = [WarmReport { instance: "a".to_owned(), loaded: 1_200, missing: 1 }];
        assert_eq!(report(&[], &[], false), "no instance runs");
        assert_eq!(report(&[], &[], true), r#"{"instances":[]}"#);
        assert_eq!(report(&running, &reports, false), "a  loaded 1,200, missing 1\nb  no answer");
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&report(&running, &reports, true)).unwrap(),
            json!({"instances": [
                {"instance": "a", "answered": true, "loaded": 1_200, "missing": 1},
                {"instance": "b", "answered": false, "loaded": null, "missing": null},
            ]})
        );
    }

    #[test]
    fn codes_and_their_keys() {
        let hosts = Hosts(vec![(DomainId(0), String::new()), (DomainId(3), "other.test".to_owned())]);
        let check = |codes: &[&str], domain: Option<&str>, case: Case, want: Result<&[(u16, &str)], &str>| {
            let codes: Vec<String> = codes.iter().map(|code| (*code).to_owned()).collect();
            let got = keys(&codes, domain, &hosts, case)
                .map(|keys| keys.iter().map(|key| (key.domain.0, key.code.to_string())).collect::<Vec<_>>());
            match (got, want) {
                (Ok(got), Ok(want)) => {
                    assert_eq!(got, want.iter().map(|(id, code)| (*id, (*code).to_owned())).collect::<Vec<_>>());
                }
                (Err(got), Err(want)) => assert!(got.error.to_string().contains(want), "{got:?}"),
                (got, want) => panic!("{got:?} instead of {want:?}"),
            }
        };
        check(&["a", "B", "a"], None, Case::Sensitive, Ok(&[(0, "a"), (0, "B")]));
        check(&["a", "A"], Some("Other.test"), Case::Insensitive, Ok(&[(3, "a")]));
        check(&["a"], Some("none.test"), Case::Sensitive, Err("none.test"));
        check(&["a/b"], None, Case::Sensitive, Err("\"a/b\""));
        let many = vec!["x"; CODES_MAX + 1];
        check(&many, None, Case::Sensitive, Err("at most 10000"));
    }
}
