//! Durations and sizes as people write them: a whole number and a unit, `250ms 5s 10min 24h 90d`, `2048B 8KiB 512MiB
//! 1GiB`.
//!
//! In: text. Out: a `Duration` or a number of bytes, and the text again.
//! Never: guesses the unit of a bare number (`60` is refused, and told how to be written); takes fractions, signs or
//! spaces.
//! At the limit: more than [`DURATION_MAX`] or [`SIZE_MAX`] is refused, so that nobody's sum of times or bytes
//! overflows.

use std::time::Duration;

/// A hundred years of 365 days.
pub const DURATION_MAX: Duration = Duration::from_secs(36_500 * 86_400);
/// A pebibyte, in bytes.
pub const SIZE_MAX: u64 = 1 << 50;

/// From the smallest to the largest; a unit and what it is in the smallest.
const DURATION_UNITS: [(&str, u64); 5] =
    [("ms", 1), ("s", 1_000), ("min", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
const SIZE_UNITS: [(&str, u64); 4] = [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadQuantity {
    #[error("{written:?} has no unit: write {written} and one of {units}, such as {example:?}")]
    NoUnit { written: String, units: String, example: String },
    #[error("{written:?} is not a whole number and one of {units}, such as {example:?}")]
    Malformed { written: String, units: String, example: &'static str },
    #[error("{written:?} is too much: at most {max}")]
    TooMuch { written: String, max: String },
}

/// `250ms`, `5s`, `10min`, `24h`, `90d`; at most [`DURATION_MAX`].
pub fn duration(written: &str) -> Result<Duration, BadQuantity> {
    let max = DURATION_MAX.as_millis() as u64;
    quantity(written, &DURATION_UNITS, max, ("s", "30s")).map(Duration::from_millis)
}

/// `2048B`, `8KiB`, `512MiB`, `1GiB`: bytes; at most [`SIZE_MAX`].
pub fn size(written: &str) -> Result<u64, BadQuantity> {
    quantity(written, &SIZE_UNITS, SIZE_MAX, ("MiB", "512MiB"))
}

/// In the largest unit that leaves no fraction, so that it parses to the same; what is below a millisecond is left out.
#[must_use]
pub fn print_duration(duration: Duration) -> String {
    let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if millis == 0 { "0s".to_owned() } else { print(millis, &DURATION_UNITS) }
}

/// In the largest unit that leaves no fraction, so that it parses to the same.
#[must_use]
pub fn print_size(bytes: u64) -> String {
    if bytes == 0 { "0B".to_owned() } else { print(bytes, &SIZE_UNITS) }
}

/// `likely` and `example` are for the messages: the unit that a bare number is shown with, and a whole quantity.
fn quantity(
    written: &str,
    units: &[(&str, u64)],
    max: u64,
    (likely, example): (&str, &'static str),
) -> Result<u64, BadQuantity> {
    let names = || units.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let (number, unit) = written.split_at(written.bytes().take_while(u8::is_ascii_digit).count());
    if !number.is_empty() && unit.is_empty() {
        let example = format!("{number}{likely}");
        return Err(BadQuantity::NoUnit { written: written.to_owned(), units: names(), example });
    }
    let Some((_, factor)) = units.iter().find(|(name, _)| *name == unit && !number.is_empty()) else {
        return Err(BadQuantity::Malformed { written: written.to_owned(), units: names(), example });
    };
    // All digits: what does not parse is too large for a u64.
    let value = number.parse::<u64>().ok().and_then(|number| number.checked_mul(*factor)).filter(|value| *value <= max);
    value.ok_or_else(|| BadQuantity::TooMuch { written: written.to_owned(), max: print(max, units) })
}

fn print(value: u64, units: &[(&str, u64)]) -> String {
    let mut printed = value.to_string();
    for (name, factor) in units {
        if value.is_multiple_of(*factor) {
            printed = format!("{}{name}", value / factor);
        }
    }
    printed
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check<T: PartialEq + std::fmt::Debug>(got: Result<T, BadQuantity>, want: Result<T, &str>) {
        assert_eq!(got.map_err(|error| error.to_string()), want.map_err(str::to_owned));
    }

    #[test]
    fn durations() {
        let units = "ms, s, min, h, d";
        for (written, millis) in [
            ("250ms", 250),
            ("5s", 5_000),
            ("10min", 600_000),
            ("24h", 86_400_000),
            ("90d", 7_776_000_000),
            ("0s", 0),
            ("007s", 7_000),
            ("36500d", 3_153_600_000_000),
        ] {
            check(duration(written), Ok(Duration::from_millis(millis)));
        }
        for (written, example) in [("60", "60s"), ("0", "0s")] {
            let want = format!("\"{written}\" has no unit: write {written} and one of {units}, such as \"{example}\"");
            check(duration(written), Err(&want));
        }
        for written in
            ["", "s", "-5s", "+5s", "1.5h", "5 s", " 5s", "5s ", "5m", "5S", "5sec", "1h30min", "٣s", "512MiB"]
        {
            let want = format!("{written:?} is not a whole number and one of {units}, such as \"30s\"");
            check(duration(written), Err(&want));
        }
        for written in ["36501d", "3153600000001ms", "18446744073709551615d", "99999999999999999999999s"] {
            check(duration(written), Err(&format!("\"{written}\" is too much: at most 36500d")));
        }
    }

    #[test]
    fn sizes() {
        for (written, bytes) in
            [("2048B", 2048), ("8KiB", 8192), ("512MiB", 536_870_912), ("1GiB", 1_073_741_824), ("0B", 0)]
        {
            check(size(written), Ok(bytes));
        }
        check(size("1048576GiB"), Ok(SIZE_MAX));
        check(size("1048577GiB"), Err("\"1048577GiB\" is too much: at most 1048576GiB"));
        check(size("512"), Err("\"512\" has no unit: write 512 and one of B, KiB, MiB, GiB, such as \"512MiB\""));
        for written in ["8KB", "8kib", "8M", "GiB", "1.5GiB", "8 KiB", "5s"] {
            let want = format!("\"{written}\" is not a whole number and one of B, KiB, MiB, GiB, such as \"512MiB\"");
            check(size(written), Err(&want));
        }
    }

    #[test]
    fn printed_in_the_largest_unit() {
        for written in ["0s", "1ms", "1500ms", "5s", "90s", "10min", "36h", "90d"] {
            assert_eq!(print_duration(duration(written).unwrap()), written);
        }
        for (written, printed) in [("0d", "0s"), ("1000ms", "1s"), ("60min", "1h"), ("48h", "2d")] {
            assert_eq!(print_duration(duration(written).unwrap()), printed);
        }
        for (written, printed) in [("0B", "0B"), ("2048B", "2KiB"), ("2049B", "2049B"), ("1024MiB", "1GiB")] {
            assert_eq!(print_size(size(written).unwrap()), printed);
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_parses_to_the_same(
            millis in 0..=DURATION_MAX.as_millis() as u64,
            bytes in 0..=SIZE_MAX,
            shift in 0..40u32,
        ) {
            let (time, bytes) = (Duration::from_millis(millis >> shift), bytes >> shift << shift);
            prop_assert_eq!(duration(&print_duration(time)), Ok(time));
            prop_assert_eq!(size(&print_size(bytes)), Ok(bytes));
        }

        #[test]
        fn any_text_is_a_quantity_or_an_error(written in "\\PC{0,12}|[0-9]{0,30}[a-zA-Z]{0,4}") {
            prop_assert!(duration(&written).map_or(true, |duration| duration <= DURATION_MAX));
            prop_assert!(size(&written).map_or(true, |bytes| bytes <= SIZE_MAX));
        }
    }
}
