//! A range: the time that stats are asked for, and the parts that it is shown in.
//!
//! In: `from`, `to`, `tz`, `interval`, as people and programs write them; now. Out: the days that have to be read, and a
//! [`Slot`] for each day or hour of a time zone. Pure.
//! Never: reads a clock; asks for more than the store reads at a time.
//! At its limit: [`DAYS_MAX`] days, [`HOURLY_DAYS_MAX`] in hours.
//!
//! A part begins and ends at a quarter of an hour, since visits are counted by those. The offsets of all time zones of
//! today are multiples of that (tz database, 2024b). Names are those of the system's tz database.

use jiff::civil::{Date, DateTime};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan, Zoned};
use serde::Deserialize;

use super::rollup::day;
use crate::domain::time::UnixMillis;
use crate::store::visited::{DAYS_MAX, Days};

/// The most days that are shown by the hour.
pub const HOURLY_DAYS_MAX: u16 = 92;
/// A bucket of a sketch.
pub const QUARTER_MS: i64 = 15 * 60 * 1000;
const HOUR_MS: i64 = 60 * 60 * 1000;

/// What is asked for, as it is written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// Another domain than that of the request's Host.
    pub domain: Option<String>,
    /// A date, or RFC 3339, whose offset may be missing: then it is a time of the zone.
    pub from: Option<String>,
    /// A date, which is included; or a time as in `from`, which is not.
    pub to: Option<String>,
    /// IANA name.
    pub tz: Option<String>,
    /// `day` or `hour`.
    pub interval: Option<String>,
}

/// A field that is not right: its name and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name}: {detail}")]
pub struct Bad {
    pub name: &'static str,
    pub detail: String,
}

fn bad(name: &'static str, detail: impl Into<String>) -> Bad {
    Bad { name, detail: detail.into() }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interval {
    Day,
    Hour,
}

/// A range in a time zone.
#[derive(Clone, Debug)]
pub struct Range {
    /// The first moment, and the one behind the last.
    pub from: UnixMillis,
    pub to: UnixMillis,
    pub tz: TimeZone,
    pub interval: Interval,
    /// Its beginning was given: then parts without clicks are shown too.
    pub is_bounded: bool,
}

/// A part of a range: a day of a time zone, or an hour.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    pub from: UnixMillis,
    /// A date, or RFC 3339 with the zone's offset.
    pub name: String,
}

impl Range {
    /// The range that is asked for; none if nothing says more than "all, by days". An error has every field that is not
    /// right.
    pub fn of(wanted: &Wanted, now: UnixMillis) -> Result<Option<Self>, Vec<Bad>> {
        let mut wrong = Vec::new();
        let interval = match wanted.interval.as_deref() {
            None | Some("day") => Interval::Day,
            Some("hour") => Interval::Hour,
            Some(other) => {
                wrong.push(bad("interval", format!("{other:?} is no interval: day and hour are")));
                Interval::Day
            }
        };
        let tz = match wanted.tz.as_deref() {
            None | Some("UTC" | "Etc/UTC") => TimeZone::UTC,
            Some(name) => TimeZone::get(name).unwrap_or_else(|_| {
                let why = format!("{name:?} is no time zone that this machine knows: write one like Europe/Berlin");
                wrong.push(bad("tz", why));
                TimeZone::UTC
            }),
        };
        let times = [("from", &wanted.from, false), ("to", &wanted.to, true)];
        let [from, to] = times.map(|(name, text, is_end)| {
            let at = text.as_ref().map(|text| moment(name, text, &tz, is_end)).transpose();
            at.unwrap_or_else(|bad| {
                wrong.push(bad);
                None
            })
        });
        if !wrong.is_empty() {
            return Err(wrong);
        }
        if wanted.from.is_none() && wanted.to.is_none() && tz == TimeZone::UTC && interval == Interval::Day {
            return Ok(None);
        }
        Self::between(from, to, tz, interval, now).map(Some).map_err(|bad| vec![bad])
    }

    fn between(
        from: Option<i64>,
        to: Option<i64>,
        tz: TimeZone,
        interval: Interval,
        now: UnixMillis,
    ) -> Result<Self, Bad> {
        let is_bounded = from.is_some();
        let to = match to {
            Some(to) => to,
            // The day is not over, and another machine's clock may be ahead.
            None => midnight("to", zoned(now, &tz)?.date(), &tz, true)?,
        };
        let days_max = i64::from(if interval == Interval::Hour { HOURLY_DAYS_MAX } else { DAYS_MAX });
        // A range that begins and ends within a day touches one day more than it is long; a change of the clock an hour.
        let span_ms_max = (days_max - 1) * super::rollup::DAY_MS + HOUR_MS;
        let from = from.unwrap_or(to - to.rem_euclid(QUARTER_MS) - span_ms_max);
        let (from, to) = (from.div_euclid(QUARTER_MS) * QUARTER_MS, -(-to).div_euclid(QUARTER_MS) * QUARTER_MS);
        if from >= to {
            return Err(bad("to", "the range ends before it begins: let to be later than from"));
        }
        if to - from > span_ms_max {
            let why = format!("the range is longer than {} days: ask for less at a time", days_max - 1);
            return Err(bad("from", why));
        }
        let (from, to) = (UnixMillis(from), UnixMillis(to));
        Ok(Self { from, to, tz, interval, is_bounded })
    }

    /// The days (UTC) that it touches.
    #[must_use]
    pub fn days(&self) -> Days {
        Days { from: day(self.from), to: day(UnixMillis(self.to.0 - 1)), sketches: true }
    }

    /// Its parts, oldest first. The first one begins with the range, also within a day.
    #[must_use]
    pub fn slots(&self) -> Vec<Slot> {
        let mut slots = Vec::new();
        let mut next = Some(self.from);
        while let Some(from) = next.filter(|from| *from < self.to) {
            let Ok(begin) = zoned(from, &self.tz) else { break };
            let name = match self.interval {
                Interval::Day => begin.date().to_string(),
                Interval::Hour => begin.strftime("%Y-%m-%dT%H:%M:%S%:z").to_string(),
            };
            slots.push(Slot { from, name });
            next = match self.interval {
                Interval::Day => midnight("from", begin.date(), &self.tz, true).ok().map(UnixMillis),
                // The first one ends with the hour of the clock.
                Interval::Hour => {
                    let into_ms = i64::from(begin.minute()) * 60_000;
                    Some(UnixMillis(from.0 + HOUR_MS - into_ms))
                }
            };
        }
        slots
    }

    /// RFC 3339 with the zone's offset.
    #[must_use]
    pub fn show(&self, at: UnixMillis) -> String {
        zoned(at, &self.tz).map_or_else(|_| at.to_string(), |at| at.strftime("%Y-%m-%dT%H:%M:%S%:z").to_string())
    }
}

fn zoned(at: UnixMillis, tz: &TimeZone) -> Result<Zoned, Bad> {
    let at = Timestamp::from_millisecond(at.0).map_err(|_| bad("from", "it is further away than times go"))?;
    Ok(at.to_zoned(tz.clone()))
}

/// The first moment of a date in a time zone, or of the day after it.
fn midnight(name: &'static str, date: Date, tz: &TimeZone, after: bool) -> Result<i64, Bad> {
    let date = if after { date.checked_add(1.day()) } else { Ok(date) };
    let begin = date.and_then(|date| date.to_zoned(tz.clone())).and_then(|begin| begin.start_of_day());
    let begin = begin.map_err(|_| bad(name, "it is further away than times go"))?;
    Ok(begin.timestamp().as_millisecond())
}

fn moment(name: &'static str, text: &str, tz: &TimeZone, is_end: bool) -> Result<i64, Bad> {
    if let Ok(at) = text.parse::<Timestamp>() {
        return Ok(at.as_millisecond());
    }
    let further = || bad(name, "it is further away than times go");
    let hyphens = text.bytes().filter(|byte| *byte == b'-').count();
    // The parsers take a time for its date, and drop the offset or zone behind it: they get what has none of these.
    let is_plain = hyphens == 2 && text.bytes().all(|byte| byte.is_ascii_digit() || b"-:.Tt ".contains(&byte));
    match (text.parse::<Date>(), text.parse::<DateTime>()) {
        (Ok(date), _) if is_plain && text.len() == "2027-01-31".len() => midnight(name, date, tz, is_end),
        (_, Ok(at)) if is_plain && text.len() > "2027-01-31".len() => {
            Ok(at.to_zoned(tz.clone()).map_err(|_| further())?.timestamp().as_millisecond())
        }
        _ => Err(bad(name, format!("{text:?} is no time: write 2027-01-31 or 2027-01-31T09:00:00+01:00"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::links::rfc3339;

    /// 2027-03-10T12:34:56Z.
    const NOW: UnixMillis = UnixMillis(1_804_682_096_000);

    fn wanted([from, to, tz, interval]: [&str; 4]) -> Wanted {
        let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Wanted { domain: None, from: given(from), to: given(to), tz: given(tz), interval: given(interval) }
    }

    #[test]
    fn ranges() {
        let check = |fields: [&str; 4], want: Result<Option<[&str; 2]>, &str>| {
            let got = Range::of(&wanted(fields), NOW);
            let got = got.map(|range| range.map(|range| [rfc3339(range.from), rfc3339(range.to)]));
            match (got, want) {
                (Ok(got), Ok(want)) => assert_eq!(got, want.map(|want| want.map(str::to_owned)), "{fields:?}"),
                (Err(got), Err(want)) => {
                    let got: Vec<_> = got.iter().map(ToString::to_string).collect();
                    assert!(got.join("; ").contains(want), "{got:?} for {fields:?}");
                }
                (got, want) => panic!("{got:?} instead of {want:?} for {fields:?}"),
            }
        };
        check(["", "", "", ""], Ok(None));
        check(["", "", "UTC", "day"], Ok(None));
        check(["2027-03-01", "2027-03-02", "", ""], Ok(Some(["2027-03-01T00:00:00Z", "2027-03-03T00:00:00Z"])));
        check(["2027-03-01", "", "", ""], Ok(Some(["2027-03-01T00:00:00Z", "2027-03-11T00:00:00Z"])));
        // A range ends with the day of its zone, not with ours.
        check(["2027-03-10", "", "Asia/Kathmandu", ""], Ok(Some(["2027-03-09T18:15:00Z", "2027-03-10T18:15:00Z"])));
        check(
            ["2027-03-01T09:07:00+01:00", "2027-03-01T10:07:00+01:00", "", ""],
            Ok(Some(["2027-03-01T08:00:00Z", "2027-03-01T09:15:00Z"])),
        );
        // Without an offset it is a time of the zone.
        check(
            ["2027-03-01T10:00:00", "2027-03-01 11:30", "Asia/Kathmandu", ""],
            Ok(Some(["2027-03-01T04:15:00Z", "2027-03-01T05:45:00Z"])),
        );
        check(["2027-03-01T10:00", "2027-03-01", "", ""], Ok(Some(["2027-03-01T10:00:00Z", "2027-03-02T00:00:00Z"])));
        for odd in
            ["20270301", "2027-03-01T10:00:00[Asia/Kathmandu]", "2027-03-01[UTC]", "2027-03-01T", "+002027-03-01"]
        {
            check([odd, "", "", ""], Err("from: "));
        }
        check(
            ["odd", "odd", "odd", "odd"],
            Err("odd\" is no time: write 2027-01-31 or 2027-01-31T09:00:00+01:00; to: "),
        );
        check(["", "2027-03-02", "", "hour"], Ok(Some(["2026-12-01T23:00:00Z", "2027-03-03T00:00:00Z"])));
        check(["2027-03-02", "2027-03-01", "", ""], Err("to: the range ends before it begins"));
        check(["2021-03-02", "2027-03-01", "", ""], Err("from: the range is longer than 1826 days"));
        check(["2026-03-02", "2027-03-01", "", "hour"], Err("from: the range is longer than 91 days"));
        check(["yesterday", "", "", ""], Err("from: \"yesterday\" is no time"));
        check(["", "", "Mars/Olympus", ""], Err("tz: \"Mars/Olympus\" is no time zone"));
        check(["", "", "", "week"], Err("interval: \"week\" is no interval"));
        check(["9999-12-31", "", "", ""], Err("from: it is further away than times go"));
        check(["0001-01-01", "2027-01-01", "", ""], Err("from: the range is longer"));
    }

    #[test]
    fn every_range_is_read_whole() {
        for fields in [["", "", "", "hour"], ["", "", "Asia/Kathmandu", ""], ["", "2027-03-02", "", ""]] {
            let days = Range::of(&wanted(fields), NOW).unwrap().unwrap().days();
            assert!(days.to - days.from < i32::from(DAYS_MAX), "{fields:?}: {days:?}");
        }
    }

    #[test]
    fn slots_follow_the_clock_of_the_zone() {
        let check = |fields: [&str; 4], want: &[(&str, &str)]| {
            let range = Range::of(&wanted(fields), NOW).unwrap().unwrap();
            let got: Vec<_> = range.slots().into_iter().map(|slot| (rfc3339(slot.from), slot.name)).collect();
            let want: Vec<_> = want.iter().map(|(from, name)| ((*from).to_owned(), (*name).to_owned())).collect();
            assert_eq!(got, want, "{fields:?}");
        };
        // A day of 23 hours, and one of 25.
        check(
            ["2027-03-27", "2027-03-29", "Europe/Berlin", ""],
            &[
                ("2027-03-26T23:00:00Z", "2027-03-27"),
                ("2027-03-27T23:00:00Z", "2027-03-28"),
                ("2027-03-28T22:00:00Z", "2027-03-29"),
            ],
        );
        check(
            ["2027-10-31", "2027-11-01", "Europe/Berlin", ""],
            &[("2027-10-30T22:00:00Z", "2027-10-31"), ("2027-10-31T23:00:00Z", "2027-11-01")],
        );
        // The hour that there is twice has two names; the one that is left out has none.
        check(
            ["2027-10-31T00:00:00Z", "2027-10-31T02:00:00Z", "Europe/Berlin", "hour"],
            &[
                ("2027-10-31T00:00:00Z", "2027-10-31T02:00:00+02:00"),
                ("2027-10-31T01:00:00Z", "2027-10-31T02:00:00+01:00"),
            ],
        );
        check(
            ["2027-03-28T00:30:00Z", "2027-03-28T02:00:00Z", "Europe/Berlin", "hour"],
            &[
                ("2027-03-28T00:30:00Z", "2027-03-28T01:30:00+01:00"),
                ("2027-03-28T01:00:00Z", "2027-03-28T03:00:00+02:00"),
            ],
        );
        // Midnight is left out in Santiago on this day.
        check(
            ["2027-09-05", "2027-09-06", "America/Santiago", ""],
            &[("2027-09-05T04:00:00Z", "2027-09-05"), ("2027-09-06T03:00:00Z", "2027-09-06")],
        );
        check(["2027-03-01", "2027-03-01", "Asia/Kathmandu", ""], &[("2027-02-28T18:15:00Z", "2027-03-01")]);
        check(
            ["2027-03-01T06:00:00Z", "2027-03-01T07:30:00Z", "Asia/Kathmandu", "hour"],
            &[
                ("2027-03-01T06:00:00Z", "2027-03-01T11:45:00+05:45"),
                ("2027-03-01T06:15:00Z", "2027-03-01T12:00:00+05:45"),
                ("2027-03-01T07:15:00Z", "2027-03-01T13:00:00+05:45"),
            ],
        );
    }
}
