//! The stats document of a link, as the HTTP contract names its members.
//!
//! In: what the store has of the link's visits, and the range that was asked for. Out: JSON. Pure.
//! Never: shows a visitor.
//! At its limit: [`TOP_MAX`] values of each kind. Of a sketch that cannot be read it leaves out what stands there alone:
//! counts are beside it.
//!
//! Clicks are counted by 15 minutes, everything else by days (UTC): for a range `total_clicks`, `clicks_by_day` and
//! `clicks_by_hour` are exact, while `unique_visitors`, `by_kind` and what was most are of the whole days that the range
//! touches, which `range.whole_days` names. `first_clicked`, `last_clicked` and `imported_clicks` are always of all time.

use serde_json::{Map, Value, json};

use super::range::{Interval, QUARTER_MS, Range};
use super::rollup::{DAY_MS, Day};
use super::sketch::{Dimension, Sketch};
use crate::config::VisitorKey;
use crate::domain::link::Link;
use crate::domain::time::UnixMillis;
use crate::domain::visit::Class;
use crate::links::rfc3339;
use crate::store::visited::{DayRow, Kinds, LinkRows};

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

#[must_use]
pub fn document(link: &Link, rows: &LinkRows, range: Option<&Range>, visitor: VisitorKey) -> Value {
    let Parts { clicks, kinds, sketch, name, by } = match range {
        None => all_time(rows),
        Some(range) => ranged(rows, range),
    };
    let by_kind: Map<_, _> =
        Class::ALL.iter().zip(kinds).map(|(class, count)| (class.name().to_owned(), count.into())).collect();
    let mut document = json!({
        "short_code": link.key.code.to_string(),
        "total_clicks": clicks,
        "unique_visitors": sketch.as_ref().map(Sketch::unique),
        // Whether somebody who came on two days is one visitor, or two.
        "unique_visitors_by": match visitor { VisitorKey::Deployment => "visitor", VisitorKey::Daily => "day" },
        "imported_clicks": link.imported_clicks,
        "first_clicked": rows.totals.first_at.map(rfc3339),
        "last_clicked": rows.totals.last_at.map(rfc3339),
        "by_kind": by_kind,
        name: by,
    });
    for (sketch, (dimension, name, one)) in sketch.iter().flat_map(|sketch| TOPS.map(|top| (sketch, top))) {
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
    document
}

/// What differs between all time and a range.
struct Parts {
    clicks: u64,
    kinds: Kinds,
    /// None if it cannot be read.
    sketch: Option<Sketch>,
    /// The member that has clicks by time.
    name: &'static str,
    by: Value,
}

fn clicks(kinds: &Kinds) -> u64 {
    kinds[Class::Click as usize] + kinds[Class::Tool as usize]
}

fn all_time(rows: &LinkRows) -> Parts {
    let by = rows.days.iter().filter(|row| clicks(&row.kinds) > 0);
    Parts {
        clicks: clicks(&rows.totals.kinds),
        kinds: rows.totals.kinds,
        sketch: read(&rows.totals.sketch),
        name: "clicks_by_day",
        by: by.map(|row| json!({"date": date(row.day), "clicks": clicks(&row.kinds)})).collect(),
    }
}

fn ranged(rows: &LinkRows, range: &Range) -> Parts {
    let slots = range.slots();
    let mut counts = vec![0; slots.len()];
    let (mut kinds, mut sketch_of_all) = (Kinds::default(), Sketch::default());
    for DayRow { day, kinds: of_day, sketch } in &rows.days {
        kinds.iter_mut().zip(of_day).for_each(|(sum, count)| *sum += count);
        let begin = i64::from(*day) * DAY_MS;
        let Some(sketch) = read(sketch) else {
            // When it was is not known: all of it is where the day begins.
            let at = UnixMillis(begin.max(range.from.0));
            if let Some(slot) = slots.partition_point(|slot| slot.from <= at).checked_sub(1) {
                counts[slot] += clicks(of_day);
            }
            continue;
        };
        for (quarter, count) in (0..).zip(sketch.buckets()) {
            let at = UnixMillis(begin + quarter * QUARTER_MS);
            if count > 0 && range.from <= at && at < range.to {
                // The first slot begins with the range.
                counts[slots.partition_point(|slot| slot.from <= at) - 1] += count;
            }
        }
        sketch_of_all.merge_sketch(sketch);
    }
    let (name, one) = match range.interval {
        Interval::Day => ("clicks_by_day", "date"),
        Interval::Hour => ("clicks_by_hour", "hour"),
    };
    let shown = slots.iter().zip(&counts).rev().filter(|(_, count)| range.is_bounded || **count > 0);
    Parts {
        clicks: counts.iter().sum(),
        kinds,
        sketch: Some(sketch_of_all),
        name,
        by: shown.map(|(slot, count)| json!({one: slot.name, "clicks": count})).collect(),
    }
}

fn read(bytes: &[u8]) -> Option<Sketch> {
    let mut sketch = Sketch::default();
    match sketch.merge(bytes) {
        Ok(()) => Some(sketch),
        Err(bad) => {
            tracing::warn!(%bad, "a sketch of a link's visits is damaged: its stats lack what it had");
            None
        }
    }
}

/// As ISO 8601 writes it.
fn date(day: Day) -> String {
    let begin = jiff::Timestamp::from_millisecond(i64::from(day) * DAY_MS);
    begin.map_or_else(|_| day.to_string(), |begin| begin.to_zoned(jiff::tz::TimeZone::UTC).date().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::key::{Case, Code, DomainId, Key};
    use crate::domain::link::{Fields, LinkId};
    use crate::domain::target::Target;
    use crate::stats::range::Wanted;
    use crate::stats::rollup::day;
    use crate::stats::sketch::Value as Named;
    use crate::store::visited::Totals;

    fn at(text: &str) -> UnixMillis {
        UnixMillis(text.parse::<jiff::Timestamp>().unwrap().as_millisecond())
    }

    fn link() -> Link {
        let target = Target::new("https://example.com/").unwrap();
        let code = Code::parse(b"abc", Case::Sensitive).unwrap();
        Link {
            id: LinkId(1),
            key: Key { domain: DomainId(0), code },
            fields: Fields::new("https://example.com/".to_owned(), target),
            version: 1,
            created_at: UnixMillis(0),
            updated_at: UnixMillis(0),
            disabled_at: None,
            deleted_at: None,
            imported_clicks: 5,
            visits_used: 0,
        }
    }

    /// What the store has after a click of each visitor at each of these times, and a bot on each of their days.
    fn rows(clicks: &[(&str, u64)]) -> LinkRows {
        let mut days: Vec<(Day, Sketch, Kinds)> = Vec::new();
        let mut all = Sketch::default();
        let referrer = Named::new(Dimension::Referrer, "news.example").unwrap();
        for (time, visitor) in clicks {
            let (at, mut one) = (at(time), Sketch::default());
            // Any hash: it is its high bits that count.
            one.see_visitor(visitor.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            one.count_values([(Dimension::Referrer, &referrer, 1)]);
            all.merge_sketch(one.clone());
            one.count_quarter(u8::try_from(at.0.rem_euclid(DAY_MS) / QUARTER_MS).unwrap(), 1);
            let day = day(at);
            let place = days.iter().position(|(known, ..)| *known == day).unwrap_or_else(|| {
                days.push((day, Sketch::default(), [0, 0, 1, 0, 0]));
                days.len() - 1
            });
            days[place].1.merge_sketch(one);
            days[place].2[0] += 1;
        }
        days.sort_by_key(|(day, ..)| std::cmp::Reverse(*day));
        let encoded = |sketch: &Sketch| {
            let mut bytes = Vec::new();
            sketch.encode(&mut bytes);
            bytes
        };
        LinkRows {
            totals: Totals {
                kinds: [clicks.len() as u64, 0, days.len() as u64, 0, 0],
                first_at: clicks.iter().map(|(time, _)| at(time)).min(),
                last_at: clicks.iter().map(|(time, _)| at(time)).max(),
                sketch: encoded(&all),
            },
            days: days
                .iter()
                .map(|(day, sketch, kinds)| DayRow { day: *day, kinds: *kinds, sketch: encoded(sketch) })
                .collect(),
        }
    }

    fn shown(rows: &LinkRows, wanted: &Wanted) -> Value {
        let range = Range::of(wanted, at("2027-04-01T12:00:00Z")).unwrap();
        let mut rows = rows.clone();
        match &range {
            // As the store answers.
            None => rows.days.iter_mut().for_each(|row| row.sketch.clear()),
            Some(range) => {
                let days = range.days();
                rows.days.retain(|row| (days.from..=days.to).contains(&row.day));
            }
        }
        document(&link(), &rows, range.as_ref(), VisitorKey::Deployment)
    }

    #[test]
    fn a_link_without_visits_has_zeros() {
        let document = shown(&LinkRows::default(), &Wanted::default());
        let want = json!({
            "short_code": "abc", "total_clicks": 0, "unique_visitors": 0, "unique_visitors_by": "visitor",
            "imported_clicks": 5, "first_clicked": null, "last_clicked": null,
            "by_kind": {"click": 0, "tool": 0, "bot": 0, "head": 0, "prefetch": 0},
            "clicks_by_day": [], "top_referrers": [],
        });
        assert_eq!(document, want);
    }

    #[test]
    fn all_time_is_newest_first_without_empty_days() {
        let clicks = [("2027-03-01T10:00:00Z", 1), ("2027-03-01T11:00:00Z", 2), ("2027-03-28T23:59:59.999Z", 1)];
        let document = shown(&rows(&clicks), &Wanted::default());
        let days = json!([{"date": "2027-03-28", "clicks": 1}, {"date": "2027-03-01", "clicks": 2}]);
        assert_eq!((&document["clicks_by_day"], &document["total_clicks"]), (&days, &json!(3)));
        assert_eq!((&document["unique_visitors"], &document["by_kind"]["bot"]), (&json!(2), &json!(2)));
        assert_eq!(document["last_clicked"], "2027-03-28T23:59:59.999Z");
        assert_eq!(document["top_referrers"], json!([{"referrer": "news.example", "clicks": 3}]));
        assert_eq!((&document["range"], &document["top_countries"]), (&Value::Null, &Value::Null));
    }

    #[test]
    fn ranges_count_by_the_clock_of_the_zone() {
        // Before and after a midnight of Berlin on both sides of its change of the clock, and one of Kathmandu.
        let clicks = [
            ("2027-03-27T22:59:00Z", 1),
            ("2027-03-27T23:00:00Z", 1),
            ("2027-03-28T21:59:00Z", 2),
            ("2027-03-28T22:00:00Z", 3),
            ("2027-03-29T18:14:59Z", 3),
            ("2027-03-29T18:15:00Z", 3),
        ];
        let rows = rows(&clicks);
        let check = |[from, to, tz, interval]: [&str; 4], total: u64, unique: u64, want: &[(&str, u64)]| {
            let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            let wanted =
                Wanted { domain: None, from: given(from), to: given(to), tz: given(tz), interval: given(interval) };
            let document = shown(&rows, &wanted);
            let (name, one) = if interval == "hour" { ("clicks_by_hour", "hour") } else { ("clicks_by_day", "date") };
            let want: Vec<_> = want.iter().map(|(name, clicks)| json!({one: name, "clicks": clicks})).collect();
            assert_eq!(document[name], json!(want), "{from} {to} {tz} {interval}");
            assert_eq!((&document["total_clicks"], &document["unique_visitors"]), (&json!(total), &json!(unique)));
            assert_eq!(document["last_clicked"], "2027-03-29T18:15:00Z");
        };
        check(
            ["2027-03-26", "2027-03-29", "", ""],
            6,
            3,
            &[("2027-03-29", 2), ("2027-03-28", 2), ("2027-03-27", 2), ("2027-03-26", 0)],
        );
        check(
            ["2027-03-27", "2027-03-29", "Europe/Berlin", ""],
            6,
            3,
            &[("2027-03-29", 3), ("2027-03-28", 2), ("2027-03-27", 1)],
        );
        // Visitors are those of the whole days (UTC).
        check(["2027-03-28", "2027-03-28", "Europe/Berlin", ""], 2, 3, &[("2027-03-28", 2)]);
        check(
            ["2027-03-30", "", "Asia/Kathmandu", ""],
            1,
            1,
            &[("2027-04-01", 0), ("2027-03-31", 0), ("2027-03-30", 1)],
        );
        // Without a beginning what is empty is left out.
        check(["", "", "Asia/Kathmandu", ""], 6, 3, &[("2027-03-30", 1), ("2027-03-29", 3), ("2027-03-28", 2)]);
        check(
            ["2027-03-28T21:30:00Z", "2027-03-28T23:00:00Z", "Europe/Berlin", "hour"],
            2,
            2,
            &[("2027-03-29T00:00:00+02:00", 1), ("2027-03-28T23:30:00+02:00", 1)],
        );
    }

    #[test]
    fn a_range_says_what_it_is() {
        let wanted = Wanted {
            from: Some("2027-03-28".to_owned()),
            to: Some("2027-03-28".to_owned()),
            tz: Some("Europe/Berlin".to_owned()),
            ..Wanted::default()
        };
        let want = json!({
            "from": "2027-03-28T00:00:00+01:00", "to": "2027-03-29T00:00:00+02:00", "tz": "Europe/Berlin",
            "interval": "day", "whole_days": {"from": "2027-03-27", "to": "2027-03-28"},
        });
        assert_eq!(shown(&LinkRows::default(), &wanted)["range"], want);
    }

    #[test]
    fn of_what_is_no_sketch_the_counts_are_shown() {
        let mut rows = rows(&[("2027-03-27T10:00:00Z", 1), ("2027-03-28T11:00:00Z", 2)]);
        rows.totals.sketch = vec![0xFF; 3];
        rows.days[0].sketch = vec![0xFF; 3];
        let all = shown(&rows, &Wanted::default());
        assert_eq!((&all["total_clicks"], &all["unique_visitors"]), (&json!(2), &Value::Null));
        assert!(all.get("top_referrers").is_none());
        let [from, to] = ["2027-03-27", "2027-03-28"].map(|date| Some(date.to_owned()));
        let some = shown(&rows, &Wanted { from, to, ..Wanted::default() });
        let days = json!([{"date": "2027-03-28", "clicks": 1}, {"date": "2027-03-27", "clicks": 1}]);
        assert_eq!((&some["clicks_by_day"], &some["unique_visitors"]), (&days, &json!(1)));
    }
}
