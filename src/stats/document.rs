//! The stats document of a link, as the HTTP contract names its members.
//!
//! In: what the store has of the link's visits, and the range that was asked for. Out: JSON. Pure.
//! Never: shows a visitor.
//! At its limit: [`TOP_MAX`] values of each kind.
//!
//! Clicks are counted by 15 minutes, everything else by days (UTC): for a range `total_clicks`, `clicks_by_day` and
//! `clicks_by_hour` are exact, while `unique_visitors`, `by_kind` and what was most are of the whole days that the range
//! touches, which `range.whole_days` names. `first_clicked`, `last_clicked` and `imported_clicks` are always of all time.

use serde_json::{Map, Value, json};

use super::query::{DayRow, Kinds, LinkRows};
use super::range::{Interval, QUARTER_MS, Range};
use super::rollup::{DAY_MS, Day};
use super::sketch::{Dimension, Sketch};
use crate::config::VisitorKey;
use crate::domain::link::Link;
use crate::domain::time::UnixMillis;
use crate::domain::visit::Class;
use crate::links::rfc3339;
use crate::store::{Error, Result};

/// Values of each kind that are shown.
pub const TOP_MAX: usize = 10;

/// Where values stand, and what one of them is called.
const TOPS: [(Dimension, &str, &str); 5] = [
    (Dimension::Referrer, "top_referrers", "referrer"),
    (Dimension::Country, "top_countries", "country"),
    (Dimension::Browser, "top_browsers", "browser"),
    (Dimension::System, "top_os", "os"),
    (Dimension::Device, "top_devices", "device"),
];

/// The document. [`Error::Broken`] if the store has a sketch that cannot be read.
pub fn document(link: &Link, rows: &LinkRows, range: Option<&Range>, visitor: VisitorKey) -> Result<Value> {
    let Parts { clicks, kinds, sketch, name, by } = match range {
        None => all_time(rows)?,
        Some(range) => ranged(rows, range)?,
    };
    let by_kind: Map<_, _> =
        Class::ALL.iter().zip(kinds).map(|(class, count)| (class.name().to_owned(), count.into())).collect();
    let mut document = json!({
        "short_code": link.key.code.to_string(),
        "total_clicks": clicks,
        "unique_visitors": sketch.unique(),
        // Whether somebody who came on two days is one visitor, or two.
        "unique_visitors_by": match visitor { VisitorKey::Deployment => "visitor", VisitorKey::Daily => "day" },
        "imported_clicks": link.imported_clicks,
        "first_clicked": rows.totals.first_at.map(rfc3339),
        "last_clicked": rows.totals.last_at.map(rfc3339),
        "by_kind": by_kind,
        name: by,
    });
    for (dimension, name, one) in TOPS {
        let mut top = sketch.top(dimension);
        top.truncate(TOP_MAX);
        // What is not recorded at all is no member. Referrers always are.
        if !top.is_empty() || dimension == Dimension::Referrer {
            document[name] = top.into_iter().map(|(value, clicks)| json!({one: value, "clicks": clicks})).collect();
        }
    }
    if let Some(range) = range {
        let days = range.days();
        document["range"] = json!({
            "from": range.show(range.from),
            "to": range.show(range.to),
            "tz": range.tz.iana_name(),
            "interval": match range.interval { Interval::Day => "day", Interval::Hour => "hour" },
            "whole_days": {"from": date(days.from), "to": date(days.to)},
        });
    }
    Ok(document)
}

/// What differs between all time and a range.
struct Parts {
    clicks: u64,
    kinds: Kinds,
    sketch: Sketch,
    /// The member that has clicks by time.
    name: &'static str,
    by: Value,
}

fn clicks(kinds: &Kinds) -> u64 {
    kinds[Class::Click as usize] + kinds[Class::Tool as usize]
}

fn all_time(rows: &LinkRows) -> Result<Parts> {
    let by = rows.days.iter().filter(|row| clicks(&row.kinds) > 0);
    Ok(Parts {
        clicks: clicks(&rows.totals.kinds),
        kinds: rows.totals.kinds,
        sketch: read(&rows.totals.sketch)?,
        name: "clicks_by_day",
        by: by.map(|row| json!({"date": date(row.day), "clicks": clicks(&row.kinds)})).collect(),
    })
}

fn ranged(rows: &LinkRows, range: &Range) -> Result<Parts> {
    let slots = range.slots();
    let mut counts = vec![0; slots.len()];
    let (mut kinds, mut sketch_of_all) = (Kinds::default(), Sketch::default());
    for DayRow { day, kinds: of_day, sketch } in &rows.days {
        kinds.iter_mut().zip(of_day).for_each(|(sum, count)| *sum += count);
        let of_day = read(sketch)?;
        for (quarter, count) in (0..).zip(of_day.buckets()) {
            let at = UnixMillis(i64::from(*day) * DAY_MS + quarter * QUARTER_MS);
            if count > 0 && range.from <= at && at < range.to {
                // The first slot begins with the range.
                counts[slots.partition_point(|slot| slot.from <= at) - 1] += count;
            }
        }
        sketch_of_all.merge_sketch(of_day);
    }
    let (name, one) = match range.interval {
        Interval::Day => ("clicks_by_day", "date"),
        Interval::Hour => ("clicks_by_hour", "hour"),
    };
    let shown = slots.iter().zip(&counts).rev().filter(|(_, count)| range.is_bounded || **count > 0);
    Ok(Parts {
        clicks: counts.iter().sum(),
        kinds,
        sketch: sketch_of_all,
        name,
        by: shown.map(|(slot, count)| json!({one: slot.name, "clicks": count})).collect(),
    })
}

fn read(bytes: &[u8]) -> Result<Sketch> {
    let mut sketch = Sketch::default();
    sketch.merge(bytes).map_err(|error| Error::Broken(format!("a sketch of a link's visits: {error}")))?;
    Ok(sketch)
}

/// As ISO 8601 writes it.
fn date(day: Day) -> String {
    let begin = jiff::Timestamp::from_millisecond(i64::from(day) * DAY_MS);
    begin.map_or_else(|_| day.to_string(), |begin| begin.to_zoned(jiff::tz::TimeZone::UTC).date().to_string())
}
