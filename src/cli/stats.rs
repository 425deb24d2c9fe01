//! `waypost stats`: what became of the visits of a link.
//!
//! In: a code, a range. Out: its stats as a table with a bar for each day, or as the document of the API.
//! Never: asks a server: it reads the store, also while servers write to it.
//! At its limit: without a range the newest [`SHOWN_MAX`] days have a line; bars are as wide as the terminal.

use std::fmt::Write as _;
use std::io::IsTerminal;

use anyhow::anyhow;
use clap::Args;
use indicatif::HumanCount;
use serde_json::Value;

use super::{Common, Failure, Hosts, Outcome, block_on, print, start, table};
use crate::domain::key::{Code, DomainId, Key};
use crate::domain::time;
use crate::stats::document::document;
use crate::stats::query::Stats as Stored;
use crate::stats::range::{Range, Wanted};
use crate::store::row::Reading;
use crate::store::visited::Days;

/// Days that are shown of all time.
const SHOWN_MAX: usize = 31;
/// Cells of the longest bar, at least.
const BAR_CELLS_MIN: usize = 8;
/// A full cell, and its eighths.
const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
const FULL: &str = "█";

#[derive(Debug, Args)]
pub struct Stats {
    /// The link's code
    code: String,
    /// The link's host; "" is the default domain
    #[arg(long, value_name = "HOST", default_value = "")]
    domain: String,
    /// The first day, or when to begin: 2027-01-31, 2027-01-31T09:00:00+01:00
    #[arg(long, value_name = "TIME")]
    from: Option<String>,
    /// The last day, or when to end [default: today]
    #[arg(long, value_name = "TIME")]
    to: Option<String>,
    /// The time zone whose days are meant, such as Europe/Berlin [default: UTC]
    #[arg(long, value_name = "ZONE")]
    tz: Option<String>,
    /// Show days or hours
    #[arg(long, value_name = "day|hour")]
    interval: Option<String>,
}

pub fn run(stats: &Stats, common: &Common) -> Outcome {
    let wanted = Wanted {
        domain: None,
        from: stats.from.clone(),
        to: stats.to.clone(),
        tz: stats.tz.clone(),
        interval: stats.interval.clone(),
    };
    let range = Range::of(&wanted, time::now()).map_err(|wrong| {
        let wrong: Vec<_> = wrong.iter().map(|bad| format!("--{bad}")).collect();
        Failure::usage(anyhow!("{}", wrong.join("; ")))
    })?;
    block_on(async {
        let (loaded, store) = start(common).await?;
        let domain = match stats.domain.as_str() {
            "" => DomainId::default(),
            host => Hosts::read(&store).await?.id(host)?,
        };
        let unknown = || anyhow!("there is no link {}: `waypost link ls` shows all", stats.code);
        let code = Code::parse(stats.code.as_bytes(), loaded.config.codes.case).map_err(|_| unknown())?;
        let link = store.link(Key { domain, code }).await?.ok_or_else(unknown)?;
        let days = range.as_ref().map_or(Days::ALL, Range::days);
        let rows = Stored::of(&store).link(link.id, days, Reading::Now).await?;
        let document = document(&link, &rows, range.as_ref(), loaded.config.privacy.visitor);
        print(&if common.json { document.to_string() } else { text(&document, columns()) });
        Ok(())
    })
}

/// The width of the terminal that stdout is; a file gets no bars.
fn columns() -> Option<usize> {
    let stdout = std::io::stdout();
    let size = stdout.is_terminal().then(|| rustix::termios::tcgetwinsize(&stdout).ok())??;
    Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
}

/// A document as people read it; `columns` is the terminal's width.
fn text(document: &Value, columns: Option<usize>) -> String {
    let count = |value: &Value| HumanCount(value.as_u64().unwrap_or(0)).to_string();
    let or_never = |value: &Value| value.as_str().unwrap_or("never").to_owned();
    let mut rows = vec![
        vec!["clicks".to_owned(), count(&document["total_clicks"])],
        vec!["unique visitors".to_owned(), count(&document["unique_visitors"])],
        vec!["first click".to_owned(), or_never(&document["first_clicked"])],
        vec!["last click".to_owned(), or_never(&document["last_clicked"])],
    ];
    if document["imported_clicks"] != 0 {
        rows.push(vec!["imported clicks".to_owned(), count(&document["imported_clicks"])]);
    }
    let kinds = document["by_kind"].as_object().into_iter().flatten();
    let kinds: Vec<String> = kinds.map(|(kind, visits)| format!("{} {kind}", count(visits))).collect();
    rows.push(vec!["visits".to_owned(), kinds.join(", ")]);
    for name in ["referrers", "countries", "browsers", "os", "devices"] {
        let top = document[format!("top_{name}")].as_array().into_iter().flatten();
        let value = |one: &Value| {
            let named = one.as_object()?.iter().find(|(name, _)| *name != "clicks")?.1;
            Some(format!("{} {}", plain(named.as_str()?), count(&one["clicks"])))
        };
        let top: Vec<String> = top.filter_map(value).collect();
        if !top.is_empty() {
            rows.push(vec![name.to_owned(), top.join(", ")]);
        }
    }
    let mut text = table(&rows);
    let by = ["clicks_by_day", "clicks_by_hour"].iter().find_map(|name| document[*name].as_array());
    let lines: Vec<(&str, u64)> = by
        .into_iter()
        .flatten()
        .filter_map(|part| Some((part["date"].as_str().or(part["hour"].as_str())?, part["clicks"].as_u64()?)))
        .collect();
    let shown = if document["range"].is_null() { SHOWN_MAX.min(lines.len()) } else { lines.len() };
    if shown > 0 {
        let _ = write!(text, "\n\n{}", plot(&lines[..shown], columns));
    }
    if shown < lines.len() {
        let _ = write!(text, "\n{} earlier days: --from shows them", HumanCount((lines.len() - shown) as u64));
    }
    text
}

/// A visitor's words, without anything that moves a terminal's cursor.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// A line for each part: its name, its clicks, and a bar if there is a terminal.
fn plot(lines: &[(&str, u64)], columns: Option<usize>) -> String {
    let counts: Vec<String> = lines.iter().map(|(_, clicks)| HumanCount(*clicks).to_string()).collect();
    let name_width = lines.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let count_width = counts.iter().map(String::len).max().unwrap_or(0);
    let most = lines.iter().map(|(_, clicks)| *clicks).max().unwrap_or(0);
    let mut text = String::new();
    for ((name, clicks), count) in lines.iter().zip(counts) {
        let _ = write!(text, "{name:name_width$}  {count:>count_width$}");
        if let Some(columns) = columns {
            let cells = columns.saturating_sub(name_width + count_width + 4).max(BAR_CELLS_MIN);
            let bar = bar(*clicks, most, cells);
            if !bar.is_empty() {
                let _ = write!(text, "  {bar}");
            }
        }
        text.push('\n');
    }
    text.pop();
    text
}

/// `most` fills `cells`; what is not nothing shows.
fn bar(clicks: u64, most: u64, cells: usize) -> String {
    if clicks == 0 || most == 0 {
        return String::new();
    }
    let eighths = u128::from(clicks) * (cells as u128 * 8) / u128::from(most);
    let eighths = usize::try_from(eighths.max(1)).unwrap_or(cells * 8);
    format!("{}{}", FULL.repeat(eighths / 8), EIGHTHS[eighths % 8])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn bars() {
        for (clicks, most, cells, want) in [
            (0, 0, 10, ""),
            (0, 5, 10, ""),
            (5, 5, 3, "███"),
            (1, 1_000_000, 10, "▏"),
            (1, 2, 3, "█▌"),
            (7, 8, 1, "▉"),
            (u64::MAX, u64::MAX, 2, "██"),
        ] {
            assert_eq!(bar(clicks, most, cells), want, "{clicks} of {most} in {cells}");
        }
    }

    #[test]
    fn documents_as_text() {
        let document = json!({
            "short_code": "abc", "total_clicks": 1230, "unique_visitors": 7, "unique_visitors_by": "visitor",
            "imported_clicks": 0, "first_clicked": null, "last_clicked": "2027-01-31T09:00:00Z",
            "by_kind": {"click": 1200, "tool": 30}, "top_referrers": [{"referrer": "a\u{1b}.example", "clicks": 5}],
            "clicks_by_day": [{"date": "2027-01-31", "clicks": 1000}, {"date": "2027-01-30", "clicks": 230}],
        });
        let head = "clicks           1,230\nunique visitors  7\nfirst click      never\n\
                    last click       2027-01-31T09:00:00Z\nvisits           1,200 click, 30 tool\n\
                    referrers        a?.example 5\n\n";
        assert_eq!(text(&document, None), format!("{head}2027-01-31  1,000\n2027-01-30    230"));
        let wide = text(&document, Some(29));
        assert_eq!(wide, format!("{head}2027-01-31  1,000  ██████████\n2027-01-30    230  ██▎"));
        assert!(wide.lines().all(|line| line.chars().count() <= 40));
    }

    #[test]
    fn all_time_is_cut_and_a_range_is_not() {
        let days: Vec<Value> = (0..40).map(|day| json!({"date": format!("d{day}"), "clicks": 1})).collect();
        let mut document = json!({"clicks_by_day": days});
        assert!(text(&document, None).ends_with("d30  1\n9 earlier days: --from shows them"));
        document["range"] = json!({});
        assert!(text(&document, None).ends_with("d39  1"));
    }
}
