//! Whether what must hold did hold.
//!
//! In: SLOs and the run's [`Totals`]. Out: one [`Judged`] for each expression, in their order. Never: passes on what was
//! not measured: a scope in which nothing was asked fails whatever it asks for, and a time of which only a lower bound is
//! known keeps below no limit. At its limit: a percentile on fewer than ten samples beyond it is judged, and the remark
//! says so.

use serde::{Deserialize, Serialize};

use super::{Comparison, Expression, Metric, Scope, Slo};
use crate::events::Happened;
use crate::measure::Outcome;
use crate::measure::percentile::{Distribution, Quantile, enough};
use crate::measure::seconds::SecondOfTraffic;
use crate::measure::totals::{Sum, Totals};
use crate::plan::{Segment, segments};
use crate::scenario::Scenario;
use crate::units;

/// One expression's verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Judged {
    /// Phase, event and classes, by name.
    pub scope: String,
    /// The expression as it was written.
    pub text: String,
    /// What was measured, with its unit; `–` where nothing was.
    pub value: String,
    pub pass: bool,
    /// Why it was judged so, where the value does not say it.
    pub why: Option<String>,
}

/// Errors of a second that counts as good where the SLO sets no limit of its own.
const GOOD_ERRORS: f64 = 0.001;

/// Judges every expression. `events`: what became of each event of the scenario, in its order.
#[must_use]
pub fn evaluate(slos: &[Slo], scenario: &Scenario, totals: &Totals, events: &[Happened]) -> Vec<Judged> {
    let mut judged = Vec::new();
    for slo in slos {
        let sum = totals.sum(&slo.scope);
        let length_ns = length_ns(&slo.scope, scenario);
        for expression in &slo.must {
            let found = if expression.metric == Metric::Recovery {
                recovery(slo, scenario, totals, events)
            } else {
                find(expression.metric, &sum, length_ns)
            };
            judged.push(judge(name(&slo.scope, scenario), expression, found));
        }
    }
    judged
}

/// A measured value.
#[derive(Debug)]
struct Found {
    /// In the unit of [`Expression::limit`].
    value: f64,
    /// The largest that the true value can be: `value` where that is exact, none where nothing bounds it.
    at_most: Option<f64>,
    text: String,
    remark: Option<String>,
}

fn judge(scope: String, expression: &Expression, found: Result<Found, String>) -> Judged {
    let text = expression.text.clone();
    let found = match found {
        Ok(found) => found,
        Err(why) => return Judged { scope, text, value: "–".to_owned(), pass: false, why: Some(why) },
    };
    let Expression { comparison, limit, .. } = expression;
    let pass = holds(found.value, found.at_most, *comparison, *limit);
    // It would hold, or not, if the true value were known.
    let is_unknown = !pass
        && match comparison {
            Comparison::Greater | Comparison::GreaterOrEqual => {
                found.at_most.is_none_or(|most| compare(most, *comparison, *limit))
            }
            _ => compare(found.value, *comparison, *limit),
        };
    let why = if is_unknown {
        Some("only a lower bound is known: some requests had no answer when they were given up".to_owned())
    } else {
        found.remark
    };
    Judged { scope, text, value: found.text, pass, why }
}

fn find(metric: Metric, sum: &Sum, length_ns: u64) -> Result<Found, String> {
    if sum.scheduled == 0 {
        return Err("nothing was due here, so nothing was measured".to_owned());
    }
    let ended_so = |outcome: Outcome| sum.outcomes[outcome as usize];
    let is_of_ours = matches!(metric, Metric::Count(outcome) | Metric::Share(outcome) if outcome.is_ours());
    let ours: u64 = Outcome::ALL.into_iter().filter(|outcome| outcome.is_ours()).map(ended_so).sum();
    // What never left this side says nothing of the server, for better or worse.
    let of = if is_of_ours { sum.scheduled } else { sum.scheduled.saturating_sub(ours) };
    if of == 0 {
        return Err("nothing was asked here: all lacked a code, a file or a port (no_code, no_fd, no_port)".to_owned());
    }
    let share = |many: u64| many as f64 / of as f64;
    let plain = |value: f64, text: String| Ok(Found { value, at_most: Some(value), text, remark: None });
    match metric {
        Metric::Percentile(q) => {
            let n = sum.response.count();
            let few = || format!("of {} samples: fewer than ten lie beyond it", units::count(n));
            time(sum.response.quantile(q), (!enough(n, q)).then(few))
        }
        Metric::Max => time(max(&sum.response), None),
        Metric::Mean => time(mean(&sum.response), None),
        Metric::Errors => {
            let value = share(errors(sum));
            plain(value, units::percent(value))
        }
        Metric::Count(outcome) => plain(ended_so(outcome) as f64, units::count(ended_so(outcome))),
        Metric::Share(outcome) => {
            let value = share(ended_so(outcome));
            plain(value, units::percent(value))
        }
        Metric::Rate => {
            let value = ended_so(Outcome::Ok) as f64 / (length_ns as f64 / 1e9);
            plain(value, units::rate(value))
        }
        Metric::Recovery => Err("recovery needs an event: name one in `in`".to_owned()),
    }
}

fn time(quantile: Option<Quantile>, remark: Option<String>) -> Result<Found, String> {
    let Some(Quantile { value_ns, at_least, at_most_ns }) = quantile else {
        return Err("no right answer came, so there is no response time".to_owned());
    };
    let least = if at_least { "≥" } else { "" };
    let at_most = if at_least { at_most_ns.map(|ns| ns as f64) } else { Some(value_ns as f64) };
    let most = at_most_ns.filter(|_| at_least).map(|ns| format!("at most {}", units::duration(ns)));
    let remarks: Vec<String> = most.into_iter().chain(remark).collect();
    let remark = (!remarks.is_empty()).then(|| remarks.join("; "));
    Ok(Found { value: value_ns as f64, at_most, text: format!("{least}{}", units::duration(value_ns)), remark })
}

/// Whatever did not end well and was not the generator's own fault.
fn errors(sum: &Sum) -> u64 {
    let is_error = |outcome: &Outcome| *outcome != Outcome::Ok && !outcome.is_ours();
    Outcome::ALL.into_iter().filter(is_error).map(|outcome| sum.outcomes[outcome as usize]).sum()
}

/// The longest time; at least that where some requests never ended.
#[must_use]
pub fn max(distribution: &Distribution) -> Option<Quantile> {
    let Distribution { known, censored, max_ns, .. } = distribution;
    // A bucket's top would be more than the age that it holds.
    let age_ns = censored.lowest_equivalent(censored.max());
    let longest_ns = if known.is_empty() { age_ns } else { age_ns.max(*max_ns) };
    (distribution.count() > 0).then_some(of_all(longest_ns, censored.is_empty()))
}

/// The mean of times and ages; at least that where there are ages.
#[must_use]
pub fn mean(distribution: &Distribution) -> Option<Quantile> {
    let Distribution { known, censored, .. } = distribution;
    let sum_ns = known.mean() * known.len() as f64 + censored.mean() * censored.len() as f64;
    let n = distribution.count();
    (n > 0).then(|| of_all((sum_ns / n as f64).round() as u64, censored.is_empty()))
}

/// Of a value that one age without end would take with it.
fn of_all(value_ns: u64, is_known: bool) -> Quantile {
    Quantile { value_ns, at_least: !is_known, at_most_ns: is_known.then_some(value_ns) }
}

fn compare(value: f64, comparison: Comparison, limit: f64) -> bool {
    match comparison {
        Comparison::Less => value < limit,
        Comparison::LessOrEqual => value <= limit,
        Comparison::Greater => value > limit,
        Comparison::GreaterOrEqual => value >= limit,
        Comparison::Equal => value == limit,
    }
}

/// Whether a value holds that lies between these two, wherever it does.
fn holds(least: f64, most: Option<f64>, comparison: Comparison, limit: f64) -> bool {
    let is_from_below = matches!(comparison, Comparison::Greater | Comparison::GreaterOrEqual);
    compare(least, comparison, limit) && (is_from_below || most.is_some_and(|most| compare(most, comparison, limit)))
}

/// From the event's end, or from its begin where it has no end, to the first second in which all percentiles and errors that the SLO limits are within their
/// limits again; where it limits none, errors below 0.1 %.
fn recovery(slo: &Slo, scenario: &Scenario, totals: &Totals, events: &[Happened]) -> Result<Found, String> {
    let event = slo.scope.event.ok_or("recovery needs an event: name one in `in`")?;
    let planned = &scenario.events[event];
    let what = if planned.end.is_some() { "end" } else { "begin" };
    let instant = |happened: &Happened| if planned.end.is_some() { happened.ended_ns } else { happened.begun_ns };
    let from_ns = events.get(event).and_then(instant);
    let from_ns = from_ns.ok_or_else(|| format!("{:?} did not {what} within the run", planned.name))?;
    let limits: Vec<&Expression> = slo.must.iter().filter(|expression| limits_seconds(expression)).collect();
    match totals.recovery(&slo.scope.traffic, from_ns, &|second| is_good(second, &limits)) {
        Some(ns) => {
            let text = if ns == 0 { "at once".to_owned() } else { units::duration(ns) };
            Ok(Found { value: ns as f64, at_most: Some(ns as f64), text, remark: None })
        }
        None => Err(format!("no second after the event's {what} was good again")),
    }
}

fn limits_seconds(expression: &Expression) -> bool {
    matches!(expression.metric, Metric::Percentile(_) | Metric::Max | Metric::Errors)
}

/// A second keeps four of its percentiles: a limit on another one is held against the next higher of them.
fn is_good(second: &SecondOfTraffic, limits: &[&Expression]) -> bool {
    if limits.is_empty() {
        return second.error_share() < GOOD_ERRORS;
    }
    limits.iter().all(|Expression { metric, comparison, limit, .. }| {
        let longest = of_all(second.max_ns, true);
        let time = match metric {
            Metric::Errors => return compare(second.error_share(), *comparison, *limit),
            Metric::Percentile(q) if *q <= 0.5 => second.p50,
            Metric::Percentile(q) if *q <= 0.99 => second.p99,
            Metric::Percentile(q) if *q <= 0.999 => second.p99_9,
            _ => second.p50.map(|_| longest),
        };
        time.is_some_and(|Quantile { value_ns, at_most_ns, .. }| {
            holds(value_ns as f64, at_most_ns.map(|ns| ns as f64), *comparison, *limit)
        })
    })
}

/// The planned length of a scope.
fn length_ns(scope: &Scope, scenario: &Scenario) -> u64 {
    let is_in = |segment: &&Segment| {
        let in_phase = match scope.phase {
            Some(phase) => segment.phase == phase,
            None => !scenario.phases[segment.phase].warmup,
        };
        in_phase && (scope.event.is_none() || segment.event == scope.event)
    };
    segments(scenario).iter().filter(is_in).map(|segment| segment.to_ns - segment.from_ns).sum()
}

/// `peak, store stalls: clicks, launch`.
fn name(scope: &Scope, scenario: &Scenario) -> String {
    let phase = scope.phase.map(|phase| scenario.phases[phase].name.as_str());
    let event = scope.event.map(|event| scenario.events[event].name.as_str());
    let places: Vec<&str> = phase.into_iter().chain(event).collect();
    let place = if places.is_empty() { "the whole run".to_owned() } else { places.join(", ") };
    let classes: Vec<&str> = scope.traffic.iter().map(|traffic| scenario.traffic[*traffic].name.as_str()).collect();
    if classes.is_empty() { place } else { format!("{place}: {}", classes.join(", ")) }
}

#[cfg(test)]
mod tests {
    use hdrhistogram::Histogram;

    use super::{Found, SecondOfTraffic, find, is_good, judge, of_all};
    use crate::measure::Outcome;
    use crate::measure::percentile::{Distribution, Quantile};
    use crate::measure::totals::Sum;
    use crate::slo::Expression;

    const MS: u64 = 1_000_000;

    fn distribution(known: &[u64], censored: &[u64]) -> Distribution {
        let histogram = |values: &[u64]| {
            let mut histogram = Histogram::new_with_bounds(1_000, 3_600_000_000_000, 3).unwrap();
            histogram.auto(true);
            values.iter().for_each(|value| histogram.record(*value).unwrap());
            histogram
        };
        let (min_ns, max_ns) = (known.iter().copied().min(), known.iter().copied().max());
        Distribution {
            known: histogram(known),
            censored: histogram(censored),
            min_ns: min_ns.unwrap_or(0),
            max_ns: max_ns.unwrap_or(0),
        }
    }

    /// Right answers after these times, and requests that ended otherwise.
    fn sum(known: &[u64], censored: &[u64], others: &[(Outcome, u64)]) -> Sum {
        let mut outcomes = [0; Outcome::COUNT];
        outcomes[Outcome::Ok as usize] = known.len() as u64;
        outcomes[Outcome::Timeout as usize] = censored.len() as u64;
        others.iter().for_each(|(outcome, many)| outcomes[*outcome as usize] += many);
        Sum {
            scheduled: outcomes.iter().sum(),
            sent: 0,
            outcomes,
            statuses: Vec::new(),
            bytes: 0,
            response: distribution(known, censored),
            service: distribution(&[], &[]),
            ttfb: distribution(&[], &[]),
            conn_wait: distribution(&[], &[]),
            failed: distribution(&[], &[]),
            visible: distribution(&[], &[]),
        }
    }

    #[test]
    fn what_was_not_measured_never_holds() {
        let check = |text: &str, sum: &Sum, expected: (bool, &str, Option<&str>)| {
            let expression = Expression::parse(text).unwrap();
            let found = find(expression.metric, sum, 10_000 * MS);
            let judged = judge("scope".into(), &expression, found);
            assert_eq!((judged.pass, judged.value.as_str()), (expected.0, expected.1), "{text}: {judged:?}");
            assert_eq!(judged.why.is_some(), expected.2.is_some(), "{text}: {judged:?}");
            assert!(judged.why.unwrap_or_default().contains(expected.2.unwrap_or_default()), "{text}");
        };
        let nothing = sum(&[], &[], &[]);
        for text in ["p(99) < 5ms", "max > 1ms", "errors < 1%", "timeout == 0", "timeout <= 1%", "rate < 5"] {
            check(text, &nothing, (false, "–", Some("nothing was due")));
        }
        let refused = sum(&[], &[], &[(Outcome::Refused, 5)]);
        check("p(99) < 5ms", &refused, (false, "–", Some("no right answer")));
        check("mean > 0ms", &refused, (false, "–", Some("no right answer")));
        check("errors < 50%", &refused, (false, "100%", None));
        check("refused == 5", &refused, (true, "5", None));

        let thousand = sum(&vec![MS; 1000], &[], &[]);
        check("p(99) < 5ms", &thousand, (true, "1.00 ms", None));
        check("p(99) < 1ms", &thousand, (false, "1.00 ms", None));
        check("p(99) <= 1ms", &thousand, (true, "1.00 ms", None));
        check("p(99.9) < 5ms", &thousand, (true, "1.00 ms", Some("fewer than ten")));
        check("rate >= 100", &thousand, (true, "100/s", None));
        check("rate > 100", &thousand, (false, "100/s", None));

        // Three in a hundred had no answer after two seconds: beyond the 97th percentile only a bound is known.
        let hung = sum(&vec![MS; 9700], &[2000 * MS; 300], &[]);
        check("p(90) < 5ms", &hung, (true, "1.00 ms", None));
        check("p(99) < 1s", &hung, (false, "≥2.00 s", None));
        check("p(99) < 60s", &hung, (false, "≥2.00 s", Some("lower bound")));
        check("p(99) > 1s", &hung, (true, "≥2.00 s", None));
        check("p(99) > 60s", &hung, (false, "≥2.00 s", Some("lower bound")));
        check("max < 60s", &hung, (false, "≥2.00 s", Some("lower bound")));
        check("mean < 60s", &hung, (false, "≥61.0 ms", Some("lower bound")));
        check("errors < 3.1%", &hung, (true, "3%", None));
        check("timeout < 3%", &hung, (false, "3%", None));

        // The generator's own faults are no errors of the server.
        let ours = sum(&[MS; 90], &[], &[(Outcome::NoFd, 8), (Outcome::NoPort, 1), (Outcome::WrongLocation, 1)]);
        check("errors <= 1.1%", &ours, (true, "1.0989%", None));
        check("wrong_location == 0", &ours, (false, "1", None));
        check("no_fd == 0", &ours, (false, "8", None));
        // Of what was asked, not of what was due.
        check("errors < 1.05%", &ours, (false, "1.0989%", None));
        check("wrong_location < 1.05%", &ours, (false, "1.0989%", None));
        check("no_fd <= 8%", &ours, (true, "8%", None));
        let unasked = sum(&[], &[], &[(Outcome::NoCode, 1000)]);
        for text in ["p(99) < 5ms", "errors < 1%", "timeout == 0", "reset <= 1%", "rate < 5"] {
            check(text, &unasked, (false, "–", Some("nothing was asked")));
        }
        check("no_code == 0", &unasked, (false, "1,000", None));

        // One was shed at once: it moves each percentile by one rank at most.
        let times: Vec<u64> = (1..=1000).map(|n| n * MS / 100).collect();
        let shed = sum(&times, &[0], &[]);
        check("p(99) < 9.95ms", &shed, (true, "≥9.90 ms", Some("at most 9.91 ms")));
        check("p(99) < 9.89ms", &shed, (false, "≥9.90 ms", Some("at most")));
        check("p(99) < 9.905ms", &shed, (false, "≥9.90 ms", Some("lower bound")));
        check("p(99) > 9.905ms", &shed, (false, "≥9.90 ms", Some("lower bound")));
        check("p(99) > 9ms", &shed, (true, "≥9.90 ms", Some("at most")));
        check("p(99) >= 9.95ms", &shed, (false, "≥9.90 ms", Some("at most")));
        let agreed = sum(&vec![MS; 1000], &[0], &[]);
        check("p(99) < 1.1ms", &agreed, (true, "1.00 ms", None));
    }

    #[test]
    fn an_unknown_value_is_told_as_such() {
        let expression = Expression::parse("recovery < 2s").unwrap();
        let found = |ns: f64| Found { value: ns, at_most: Some(ns), text: String::new(), remark: None };
        assert!(judge(String::new(), &expression, Ok(found(1.9e9))).pass);
        assert!(!judge(String::new(), &expression, Ok(found(2.0e9))).pass);
        let never = judge(String::new(), &expression, Err("never".into()));
        assert_eq!((never.pass, never.why.as_deref()), (false, Some("never")));
    }

    #[test]
    fn a_second_is_good_when_all_its_limits_hold() {
        let check = |second: SecondOfTraffic, limits: &[&str], expected: bool| {
            let limits: Vec<Expression> = limits.iter().map(|text| Expression::parse(text).unwrap()).collect();
            let limits: Vec<&Expression> = limits.iter().collect();
            assert_eq!(is_good(&second, &limits), expected, "{second:?} {limits:?}");
        };
        let at = |ms: u64| Some(of_all(ms * MS, true));
        let second = SecondOfTraffic {
            scheduled: 1000,
            ok: 998,
            errors: 2,
            ours: 0,
            p50: at(1),
            p99: at(4),
            p99_9: at(20),
            max_ns: 30 * MS,
        };
        check(second, &[], false);
        check(SecondOfTraffic { errors: 0, ..second }, &[], true);
        check(second, &["errors < 1%"], true);
        check(second, &["errors < 0.1%"], false);
        check(second, &["p(99) < 5ms", "errors < 1%"], true);
        check(second, &["p(99) < 4ms"], false);
        check(second, &["p(50) < 2ms"], true);
        // The next higher percentile that a second has.
        check(second, &["p(90) < 2ms"], false);
        check(second, &["p(99.9) < 25ms", "max < 31ms"], true);
        check(second, &["p(99.99) < 25ms"], false);
        check(second, &["max < 30ms"], false);
        let bound =
            |at_most_ns| SecondOfTraffic { p99: Some(Quantile { value_ns: MS, at_least: true, at_most_ns }), ..second };
        check(bound(None), &["p(99) < 5ms"], false);
        check(bound(Some(5 * MS)), &["p(99) < 5ms"], false);
        check(bound(Some(4 * MS)), &["p(99) < 5ms"], true);
        let silent = SecondOfTraffic { p50: None, p99: None, p99_9: None, ..second };
        check(silent, &["p(99) < 5ms"], false);
        check(silent, &["max < 60s"], false);
    }
}
