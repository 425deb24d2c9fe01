//! Quantities as people write them, and as they are printed.
//!
//! In: `250ms`, `1m30s`, `20k`, `2_000_000`, `0.1%`. Out: nanoseconds, requests a second, counts, fractions; and back.
//! Never: guesses a unit. A bare number is no duration: tools of this kind disagree on whether it means seconds or
//! milliseconds. At its limit: a duration ends at 100 years, a count at 2^53, below which an `f64` is exact.

const NS_PER_US: u64 = 1_000;
const NS_PER_MS: u64 = 1_000_000;
const NS_PER_S: u64 = 1_000_000_000;
const NS_PER_MIN: u64 = 60 * NS_PER_S;
const NS_PER_H: u64 = 60 * NS_PER_MIN;

/// A hundred years: below `u64::MAX` nanoseconds, above all that is meant.
const LONGEST_NS: f64 = 100.0 * 365.0 * 24.0 * NS_PER_H as f64;

/// 2^53: up to here every whole number is an `f64`.
const LARGEST_COUNT: f64 = 9_007_199_254_740_992.0;

/// Nanoseconds of `250ms`, `10s`, `1m30s`, `2h`, `0.5ms`, `210 µs`; units are ns, us or µs, ms, s, m, h.
///
/// # Errors
///
/// What is wrong, in words that follow the name of a key or flag.
pub fn duration_ns(text: &str) -> Result<u64, String> {
    const HOW: &str = "give a duration with its unit: ns, us, ms, s, m or h, such as 250ms or 1m30s";
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(HOW.to_owned());
    }
    let mut total_ns = 0.0;
    while !rest.is_empty() {
        let (digits, after) = split_number(rest);
        let number = number(digits).ok_or_else(|| format!("{text:?} is no duration: {HOW}"))?;
        let after = after.trim_start();
        let end = after.find(|c: char| !c.is_alphabetic()).unwrap_or(after.len());
        let unit_ns = match &after[..end] {
            "ns" => 1,
            "us" | "µs" | "μs" => NS_PER_US,
            "ms" => NS_PER_MS,
            "s" => NS_PER_S,
            "m" => NS_PER_MIN,
            "h" => NS_PER_H,
            "" => return Err(format!("{text:?} has no unit: {HOW}")),
            other => return Err(format!("{other:?} is no unit of time: {HOW}")),
        };
        total_ns += number * unit_ns as f64;
        rest = after[end..].trim_start();
    }
    if total_ns > LONGEST_NS {
        return Err(format!("{text:?} is longer than 100 years"));
    }
    Ok(total_ns.round() as u64)
}

/// A number of `400`, `20k`, `1.5M`, `2_000_000`: at least 0, finite.
///
/// # Errors
///
/// As for [`duration_ns`].
pub fn number_of(text: &str) -> Result<f64, String> {
    let wrong = || format!("{text:?} is no number: give one such as 400, 20k or 1.5M");
    let (digits, factor) = split_number(text.trim());
    let factor = match factor.trim() {
        "" => 1.0,
        "k" | "K" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        _ => return Err(wrong()),
    };
    Ok(number(digits).ok_or_else(wrong)? * factor)
}

/// A whole number of `2M`, `20k`, `2_000_000`.
///
/// # Errors
///
/// As for [`duration_ns`].
pub fn count_of(text: &str) -> Result<u64, String> {
    let number = number_of(text)?;
    if number.fract() != 0.0 || number > LARGEST_COUNT {
        return Err(format!("{text:?} is no whole number: give one such as 400, 20k or 2_000_000"));
    }
    Ok(number as u64)
}

/// 0.001 of `0.1%`. The sign is needed: `0.1` alone could be either.
///
/// # Errors
///
/// As for [`duration_ns`].
pub fn fraction_of(text: &str) -> Result<f64, String> {
    let wrong = || format!("{text:?} is no share: give one such as 0.1%");
    let digits = text.trim().strip_suffix('%').ok_or_else(wrong)?;
    // Shifting the decimal point keeps 0.001 what it is.
    let shifted = format!("{}e-2", number(digits.trim_end()).ok_or_else(wrong)?);
    shifted.parse().map_err(|_| wrong())
}

/// Three significant digits with the largest fitting unit up to seconds: `830 ns`, `210 µs`, `1.43 s`, `3600 s`.
#[must_use]
pub fn duration(ns: u64) -> String {
    if ns < NS_PER_US {
        return format!("{ns} ns");
    }
    let (value, unit) = [(NS_PER_US, "µs"), (NS_PER_MS, "ms")]
        .iter()
        .map(|&(unit_ns, unit)| (ns as f64 / unit_ns as f64, unit))
        .find(|&(value, _)| value < 999.5)
        .unwrap_or((ns as f64 / NS_PER_S as f64, "s"));
    format!("{} {unit}", three_digits(value))
}

/// Without loss, as a scenario has it: `10s`, `1m30s`, `1.5s`, `250ms`, `0s`.
#[must_use]
pub fn exact_duration(ns: u64) -> String {
    let (hours, minutes, rest) = (ns / NS_PER_H, ns % NS_PER_H / NS_PER_MIN, ns % NS_PER_MIN);
    let mut text = String::new();
    if hours > 0 {
        text += &format!("{hours}h");
    }
    if minutes > 0 {
        text += &format!("{minutes}m");
    }
    let (whole, unit) = [(NS_PER_S, "s"), (NS_PER_MS, "ms"), (NS_PER_US, "us"), (1, "ns")]
        .into_iter()
        .find(|&(unit_ns, _)| rest >= unit_ns)
        .unwrap_or((NS_PER_S, "s"));
    match (rest, text.is_empty()) {
        (0, false) => {}
        _ if rest % whole == 0 => text += &format!("{}{unit}", rest / whole),
        _ => text += &format!("{}.{}{unit}", rest / whole, decimals(rest % whole, whole)),
    }
    text
}

/// `2,000,000`.
#[must_use]
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Requests a second: `9,200/s`, and `0.25/s` where a whole number would say too little.
#[must_use]
pub fn rate(per_s: f64) -> String {
    if per_s > 0.0 && per_s < 100.0 {
        let text = three_digits(per_s);
        let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
        return format!("{text}/s");
    }
    format!("{}/s", count(per_s.round() as u64))
}

/// `0.1%` of 0.001: up to four digits after the point, no more than it takes.
#[must_use]
pub fn percent(fraction: f64) -> String {
    let text = format!("{:.4}", fraction * 100.0);
    format!("{}%", text.trim_end_matches('0').trim_end_matches('.'))
}

fn three_digits(value: f64) -> String {
    let decimals = match value {
        value if value < 9.995 => 2,
        value if value < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}

/// The digits of `part / whole` after the point, without zeros at the end; `whole` is a power of ten.
fn decimals(part: u64, whole: u64) -> String {
    let width = whole.ilog10() as usize;
    let digits = format!("{part:0width$}");
    digits.trim_end_matches('0').to_owned()
}

/// Splits before the first character that belongs to no number.
fn split_number(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '_')).unwrap_or(text.len());
    text.split_at(end)
}

/// Digits with at most one point; `_` may stand between digits.
fn number(digits: &str) -> Option<f64> {
    if digits.starts_with('_') || digits.ends_with('_') || !digits.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let plain: String = digits.chars().filter(|&c| c != '_').collect();
    let well_formed = plain.chars().all(|c| c.is_ascii_digit() || c == '.') && !plain.ends_with('.');
    if well_formed { plain.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use proptest::{prop_assert, prop_assert_eq, proptest};

    use super::{
        LONGEST_NS, count, count_of, duration, duration_ns, exact_duration, fraction_of, number_of, percent, rate,
    };

    #[test]
    fn durations_are_read() {
        for (text, ns) in [
            ("250ms", 250_000_000),
            ("10s", 10_000_000_000),
            ("1m30s", 90_000_000_000),
            ("2h", 7_200_000_000_000),
            ("0.5ms", 500_000),
            ("210 µs", 210_000),
            ("100us", 100_000),
            ("1.43 s", 1_430_000_000),
            ("0s", 0),
            ("1_000ns", 1000),
        ] {
            assert_eq!(duration_ns(text), Ok(ns), "{text}");
        }
    }

    #[test]
    fn what_is_no_quantity_says_so() {
        let durations = [
            ("5", "\"5\" has no unit"),
            ("", "give a duration"),
            ("1m30", "\"1m30\" has no unit"),
            ("5 parsecs", "\"parsecs\" is no unit"),
            ("-5s", "\"-5s\" is no duration"),
            ("s", "\"s\" is no duration"),
            ("1.2.3s", "\"1.2.3s\" is no duration"),
            ("1e3s", "\"e\" is no unit"),
            ("9999999h", "\"9999999h\" is longer than 100 years"),
        ];
        for (text, begin) in durations {
            let error = duration_ns(text).unwrap_err();
            assert!(error.starts_with(begin), "{text}: {error}");
        }
        for text in ["", "k", "20x", "-1", "1__", "_1", "1.", ".5", "nan", "inf", "20 kk"] {
            assert!(number_of(text).is_err(), "{text}");
        }
        for text in ["1.5", "0.1k1", "1e400"] {
            assert!(count_of(text).is_err(), "{text}");
        }
        for text in ["0.1", "%", "-1%", "1%%"] {
            assert!(fraction_of(text).is_err(), "{text}");
        }
    }

    #[test]
    fn numbers_are_read() {
        for (text, number) in [("400", 400.0), ("20k", 20_000.0), ("1.5M", 1_500_000.0), ("2_000_000", 2e6)] {
            assert_eq!(number_of(text), Ok(number), "{text}");
            assert_eq!(count_of(text), Ok(number as u64), "{text}");
        }
        assert_eq!(fraction_of("0.1%"), Ok(0.001));
        assert_eq!(fraction_of("2 %"), Ok(0.02));
    }

    #[test]
    fn quantities_are_printed() {
        for (ns, text) in [
            (0, "0 ns"),
            (830, "830 ns"),
            (1_000, "1.00 µs"),
            (210_400, "210 µs"),
            (999_600, "1.00 ms"),
            (9_996_000, "10.0 ms"),
            (1_430_000_000, "1.43 s"),
            (3_600_000_000_000, "3600 s"),
        ] {
            assert_eq!(duration(ns), text, "{ns}");
        }
        for (ns, text) in [
            (0, "0s"),
            (10_000_000_000, "10s"),
            (90_000_000_000, "1m30s"),
            (3_600_000_000_000, "1h"),
            (1_500_000_000, "1.5s"),
            (250_000_000, "250ms"),
            (60_000_000_001, "1m1ns"),
        ] {
            assert_eq!(exact_duration(ns), text, "{ns}");
        }
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(2_000_000), "2,000,000");
        assert_eq!(rate(9_200.4), "9,200/s");
        assert_eq!(rate(0.25), "0.25/s");
        assert_eq!(rate(10.0), "10/s");
        assert_eq!(percent(0.001), "0.1%");
        assert_eq!(percent(1.0), "100%");
    }

    proptest! {
        #[test]
        fn an_exact_duration_is_read_back(ns in 0..LONGEST_NS as u64) {
            // What an f64 of nanoseconds cannot hold exactly is off by less than 1 in 10^15.
            let read = duration_ns(&exact_duration(ns)).unwrap();
            prop_assert!(read.abs_diff(ns) <= ns / 1_000_000_000_000_000 + 1, "{read}");
            if ns < 1 << 52 {
                prop_assert_eq!(read, ns);
            }
        }

        #[test]
        fn a_printed_duration_is_within_three_digits(ns in 0..LONGEST_NS as u64) {
            let read = duration_ns(&duration(ns)).unwrap();
            prop_assert!(read.abs_diff(ns) <= ns / 200 + 1, "{read}");
        }

        #[test]
        fn a_printed_count_is_read_back(number in 0..1_u64 << 53) {
            prop_assert_eq!(count_of(&count(number).replace(',', "_")), Ok(number));
        }

        #[test]
        fn a_printed_share_is_read_back(millionths in 0..=1_000_000_u32) {
            let fraction = f64::from(millionths) / 1e6;
            prop_assert!((fraction_of(&percent(fraction)).unwrap() - fraction).abs() < 1e-9);
        }

        #[test]
        fn nothing_that_is_typed_panics(text in "\\PC{0,20}") {
            let _ = (duration_ns(&text), count_of(&text), fraction_of(&text));
        }
    }
}
