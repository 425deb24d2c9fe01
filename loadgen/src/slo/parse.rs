//! Expressions as they are written: `METRIC COMPARISON LIMIT`.
//!
//! In: `p(99) < 5ms`. Out: an [`Expression`] whose limit has the metric's unit. Never: takes a limit without the unit that
//! its metric needs. At its limit: what is wrong is said with the form that would be right.

use super::{Comparison, Expression, Metric};
use crate::measure::Outcome;
use crate::units;

/// What a metric is compared with.
enum Unit {
    Duration,
    /// A share, written with `%`; 0 needs no sign.
    Share,
    Number,
}

impl Expression {
    /// Of `p(99) < 5ms`, `max <= 1s`, `mean < 1ms`, `errors < 0.1%`, `wrong_location == 0`, `timeout < 0.01%`,
    /// `rate > 9k`, `recovery < 2s`; the syntax of k6's thresholds (<https://grafana.com/docs/k6/latest/using-k6/thresholds/>)
    /// with units.
    ///
    /// # Errors
    ///
    /// What is wrong and what would be right, for people.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let wrong = || format!("{text:?} is no expression: write METRIC COMPARISON LIMIT, such as p(99) < 5ms");
        let begin = text.find(['<', '>', '=', '!']).ok_or_else(wrong)?;
        let (name, rest) = text.split_at(begin);
        let length = rest.find(|c| !matches!(c, '<' | '>' | '=' | '!')).ok_or_else(wrong)?;
        let (sign, limit) = rest.split_at(length);
        let limit = limit.trim();
        let comparison = match sign {
            "<" => Comparison::Less,
            "<=" => Comparison::LessOrEqual,
            ">" => Comparison::Greater,
            ">=" => Comparison::GreaterOrEqual,
            "==" => Comparison::Equal,
            _ => return Err(format!("{sign:?} in {text:?} is no comparison: use <, <=, >, >= or ==")),
        };
        let (metric, unit) = metric(name.trim(), limit.ends_with('%'))?;
        let limit = match unit {
            Unit::Duration => units::duration_ns(limit).map(|ns| ns as f64),
            Unit::Share if limit == "0" => Ok(0.0),
            Unit::Share => units::fraction_of(limit),
            Unit::Number => units::number_of(limit.trim_end_matches("/s")),
        };
        let limit = limit.map_err(|error| format!("{text:?}: {error}"))?;
        Ok(Self { text: text.to_owned(), metric, comparison, limit })
    }
}

fn metric(name: &str, limit_is_share: bool) -> Result<(Metric, Unit), String> {
    if let Some(percent) = name.strip_prefix("p(").and_then(|rest| rest.strip_suffix(')')) {
        // Shifting the decimal point keeps 0.999 what it is; 99.9 / 100 is a little more.
        return match format!("{}e-2", percent.trim()).parse::<f64>() {
            Ok(quantile) if quantile > 0.0 && quantile < 1.0 => Ok((Metric::Percentile(quantile), Unit::Duration)),
            _ => Err(format!("{name:?} is no percentile: p(50) to p(99.99), or max")),
        };
    }
    if let Some(outcome) = Outcome::ALL.into_iter().find(|outcome| outcome.name() == name) {
        return Ok(if limit_is_share {
            (Metric::Share(outcome), Unit::Share)
        } else {
            (Metric::Count(outcome), Unit::Number)
        });
    }
    Ok(match name {
        "max" => (Metric::Max, Unit::Duration),
        "mean" => (Metric::Mean, Unit::Duration),
        "errors" => (Metric::Errors, Unit::Share),
        "rate" => (Metric::Rate, Unit::Number),
        "recovery" => (Metric::Recovery, Unit::Duration),
        _ => {
            let outcomes = Outcome::ALL.map(Outcome::name).join(", ");
            return Err(format!(
                "{name:?} is no metric: use p(99), max, mean, errors, rate, recovery, or an outcome ({outcomes})"
            ));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::{Comparison, Expression, Metric};
    use crate::measure::Outcome;

    #[test]
    fn expressions_are_read() {
        for (text, metric, comparison, limit) in [
            ("p(99) < 5ms", Metric::Percentile(0.99), Comparison::Less, 5e6),
            (" p( 99.9 )<25 ms ", Metric::Percentile(0.999), Comparison::Less, 25e6),
            ("max<=1s", Metric::Max, Comparison::LessOrEqual, 1e9),
            ("mean < 100us", Metric::Mean, Comparison::Less, 1e5),
            ("errors < 0.1%", Metric::Errors, Comparison::Less, 0.001),
            ("errors == 0", Metric::Errors, Comparison::Equal, 0.0),
            ("wrong_location == 0", Metric::Count(Outcome::WrongLocation), Comparison::Equal, 0.0),
            ("timeout < 1%", Metric::Share(Outcome::Timeout), Comparison::Less, 0.01),
            ("rate >= 9.2k", Metric::Rate, Comparison::GreaterOrEqual, 9200.0),
            ("rate > 9k/s", Metric::Rate, Comparison::Greater, 9000.0),
            ("recovery < 2s", Metric::Recovery, Comparison::Less, 2e9),
        ] {
            let read = Expression::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!((read.metric, read.comparison), (metric, comparison), "{text}");
            assert!((read.limit - limit).abs() <= limit * 1e-12, "{text}: {}", read.limit);
            assert_eq!(read.text, text.trim());
        }
    }

    #[test]
    fn what_is_no_expression_says_what_would_be() {
        for (text, part) in [
            ("", "METRIC COMPARISON LIMIT"),
            ("p(99)", "METRIC COMPARISON LIMIT"),
            ("p(99) <", "METRIC COMPARISON LIMIT"),
            ("p(99) = 5ms", "use <, <=, >, >= or =="),
            ("p(99) != 5ms", "use <, <=, >, >= or =="),
            ("p(99) < 5", "has no unit"),
            ("p(100) < 5ms", "or max"),
            ("p(0) < 5ms", "p(50) to p(99.99)"),
            ("p99 < 5ms", "use p(99)"),
            ("errors < 10", "such as 0.1%"),
            ("max < 1%", "has no unit"),
            ("rate > fast", "is no number"),
            ("lateness < 1s", "wrong_location, wrong_body"),
        ] {
            let error = Expression::parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
