//! What was reported against what was true, as a pure function.
//!
//! In: the sum that a report would show, what the generator says of itself, and the stub's truth. Out: a [`Line`] for
//! each statement. Never: trusts the code that found the reported percentiles: the truth's are counted here. At its limit:
//! a quantile with fewer than ten requests beyond it says nothing and is left out.

use hdrhistogram::Histogram;

use super::cases::{Case, Fluid, Loss};
use crate::measure::Outcome;
use crate::measure::percentile::Distribution;
use crate::measure::percentile::{Quantile, enough};
use crate::measure::totals::Sum;
use crate::stub::truth::Truth;
use crate::units;

/// The percentiles that a report shows.
pub const QUANTILES: [f64; 6] = [0.5, 0.75, 0.9, 0.95, 0.99, 0.999];

/// A percentile may be off by this share of the truth, or by this much.
const OFF_SHARE: f64 = 0.02;
const OFF_NS: f64 = 100_000.0;

/// A statement, and whether it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub what: String,
    pub reported: String,
    pub truth: String,
    pub verdict: Verdict,
}

/// The worse the later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    True,
    /// Too high by no more than the generator itself says to have been late in half of the requests beyond this quantile:
    /// as late as it woke up for an arrival it wakes up for an answer. It was kept from its core, and said so.
    Late,
    False,
}

impl Verdict {
    fn of(holds: bool) -> Self {
        if holds { Self::True } else { Self::False }
    }

    /// Of a value that may be off by `room_ns`, and above that by the generator's own lateness.
    fn near(value_ns: u64, true_ns: f64, room_ns: f64, late_ns: u64) -> Self {
        let over_ns = value_ns as f64 - true_ns;
        if over_ns.abs() <= room_ns {
            Self::True
        } else if over_ns > 0.0 && over_ns <= room_ns + late_ns as f64 {
            Self::Late
        } else {
            Self::False
        }
    }
}

/// Everything that a case says about a run: `gen_lag` is how late the generator says that it was itself.
#[must_use]
pub fn judge(case: &Case, planned: u64, sum: &Sum, gen_lag: &Histogram<u64>, truth: &Truth) -> Vec<Line> {
    let unanswered = match case.loss {
        Loss::None | Loss::Reset => 0,
        Loss::TimedOut | Loss::Hung => planned.saturating_sub(truth.right.len() + truth.wrong.len()),
    };
    let mut lines = percentiles("", &sum.response, gen_lag, &truth.right, unanswered);
    lines.extend(percentiles("wrong answers: ", &sum.failed, gen_lag, &truth.wrong, 0));
    lines.extend(case.fluid.iter().flat_map(|fluid| formula(fluid, &sum.response, gen_lag)));
    if case.read_at_once {
        lines.extend(sends(gen_lag, &truth.arrival));
    }
    lines.extend(account(case.loss, planned, sum, truth));
    lines
}

/// Quantiles at which it is judged when requests were sent. Beyond them an arrival shows how late the stub itself woke up:
/// a worker that spins says 1 µs at p99, where the stub takes 150.
const SENDS: [f64; 2] = [0.5, 0.9];

/// How late the generator says that requests left, against how late they arrived: a generator that is later than it says
/// bills its own lateness to the server. The stub is woken for each, and that as late as the generator is.
#[must_use]
pub fn sends(gen_lag: &Histogram<u64>, arrival: &Histogram<u64>) -> Vec<Line> {
    let line = |q: f64| {
        let rank = rank(arrival.len(), q);
        let (said_ns, true_ns) = (at_rank(gen_lag, rank)?, at_rank(arrival, rank)?);
        let late_ns = gen_lag.value_at_quantile((1.0 + q) / 2.0);
        // Near with the sides changed: what came later than it was said to have left may be the stub's lateness.
        let verdict = Verdict::near(true_ns, said_ns as f64, OFF_NS.max(OFF_SHARE * true_ns as f64), late_ns);
        Some(Line {
            what: format!("sent late: p{}", percent(q)),
            reported: units::duration(said_ns),
            truth: units::duration(true_ns),
            verdict,
        })
    };
    SENDS.into_iter().filter(|&q| enough(arrival.len(), q)).filter_map(line).collect()
}

/// Each percentile of `reported` against the answers of `truth` and the `unanswered`, which take longer than all others.
#[must_use]
pub fn percentiles(
    of: &str,
    reported: &Distribution,
    gen_lag: &Histogram<u64>,
    truth: &Histogram<u64>,
    unanswered: u64,
) -> Vec<Line> {
    let n = truth.len() + unanswered;
    let line = |q: f64| {
        let found = reported.quantile(q);
        let rank = rank(n, q);
        let true_ns = at_rank(truth, rank);
        let verdict = match (true_ns, found) {
            (Some(true_ns), Some(Quantile { value_ns, at_least: false, .. })) => {
                let true_ns = true_ns as f64;
                // Of a sum: beyond this rank's share of those that were answered (a higher one where many were not)
                // lie at most the half of it that is slow and the half of it that was seen late.
                let late_ns = gen_lag.value_at_quantile((1.0 + rank as f64 / truth.len() as f64) / 2.0);
                Verdict::near(value_ns, true_ns, OFF_NS.max(OFF_SHARE * true_ns), late_ns)
            }
            (Some(_), _) => Verdict::False,
            (None, found) => Verdict::of(found.is_some_and(|found| found.at_least)),
        };
        let truth = true_ns.map_or("never".to_owned(), units::duration);
        Line { what: format!("{of}p{}", percent(q)), reported: show(found), truth, verdict }
    };
    QUANTILES.into_iter().filter(|&q| enough(n, q)).map(line).collect()
}

/// The percentiles of a stall against the fluid queue, within 2 % of the stall.
#[must_use]
pub fn formula(fluid: &Fluid, reported: &Distribution, gen_lag: &Histogram<u64>) -> Vec<Line> {
    let line = |q: f64| {
        let true_ns = fluid.quantile_ns(q)?;
        let found = reported.quantile(q);
        let room_ns = OFF_SHARE * fluid.stall_ns as f64;
        let verdict =
            found.map_or(Verdict::False, |found| Verdict::near(found.value_ns, true_ns, room_ns, gen_lag.max()));
        let truth = format!("{} by the fluid queue", units::duration(true_ns as u64));
        Some(Line { what: format!("p{}", percent(q)), reported: show(found), truth, verdict })
    };
    QUANTILES.into_iter().filter(|&q| enough(reported.count(), q)).filter_map(line).collect()
}

/// Whether every request is there, and ended as the stub saw it end.
#[must_use]
pub fn account(loss: Loss, planned: u64, sum: &Sum, truth: &Truth) -> Vec<Line> {
    let outcome = |outcome: Outcome| sum.outcomes[outcome as usize];
    let censored: u64 = Outcome::ALL.into_iter().filter(|outcome| outcome.is_censored()).map(outcome).sum();
    let equal = |what: &str, reported: u64, truth: u64| Line {
        what: what.to_owned(),
        reported: units::count(reported),
        truth: units::count(truth),
        verdict: Verdict::of(reported == truth),
    };
    let rest = planned.saturating_sub(truth.right.len() + truth.wrong.len());
    let (resets, waiting) = match loss {
        Loss::None => (0, 0),
        Loss::Reset => (truth.unanswered(), 0),
        Loss::TimedOut => (0, truth.unanswered()),
        Loss::Hung => (0, rest),
    };
    let mut lines = vec![
        equal("requests scheduled", sum.scheduled, planned),
        equal("requests that ended", sum.outcomes.iter().sum(), planned),
        equal("ok", outcome(Outcome::Ok), truth.right.len()),
        equal("times of those", sum.response.known.len(), truth.right.len()),
        equal("wrong status", outcome(Outcome::WrongStatus), truth.wrong.len()),
        equal("reset", outcome(Outcome::Reset), resets),
        equal("never answered", censored, waiting),
    ];
    if loss == Loss::TimedOut {
        lines.push(equal("timed out", outcome(Outcome::Timeout), waiting));
    }
    // A case in which the fault did not come about shows nothing.
    if loss != Loss::None {
        let lost = resets + waiting;
        let reported = units::count(lost);
        lines.push(Line {
            what: "lost at all".to_owned(),
            reported,
            truth: "some".to_owned(),
            verdict: Verdict::of(lost > 0),
        });
    }
    lines
}

/// Of `n` values the one that has the share `q` of them at or below it, from 1. Products of short decimals are off by
/// less than what is taken off.
fn rank(n: u64, q: f64) -> u64 {
    (q * n as f64 - 1e-6).ceil() as u64
}

/// The value of this rank, or none where there are fewer.
fn at_rank(values: &Histogram<u64>, rank: u64) -> Option<u64> {
    let mut below = 0;
    values.iter_recorded().find_map(|step| {
        below += step.count_since_last_iteration();
        (below >= rank).then(|| values.median_equivalent(step.value_iterated_to()))
    })
}

fn show(quantile: Option<Quantile>) -> String {
    match quantile {
        None => "nothing".to_owned(),
        Some(Quantile { value_ns, at_least: false, .. }) => units::duration(value_ns),
        Some(Quantile { value_ns, at_least: true, .. }) => format!("≥ {}", units::duration(value_ns)),
    }
}

/// 99.9 of 0.999, which is 99.90000000000001 when multiplied.
fn percent(q: f64) -> f64 {
    (q * 1e5).round() / 1e3
}

#[cfg(test)]
mod tests {
    use hdrhistogram::Histogram;

    use super::{Line, SENDS, Verdict, account, formula, percentiles, sends};
    use crate::measure::Outcome;
    use crate::measure::percentile::Distribution;
    use crate::measure::totals::Sum;
    use crate::prove::cases::{Fluid, Loss};
    use crate::stub::Stub;
    use crate::stub::script::Script;
    use crate::stub::truth::Truth;

    const MS: u64 = 1_000_000;

    fn histogram(values: impl IntoIterator<Item = u64>) -> Histogram<u64> {
        let mut histogram = Histogram::new_with_bounds(1, 3_600_000 * MS, 3).unwrap();
        values.into_iter().for_each(|value| histogram.record(value).unwrap());
        histogram
    }

    fn distribution(known: &Histogram<u64>, censored: &Histogram<u64>) -> Distribution {
        Distribution { known: known.clone(), censored: censored.clone(), min_ns: known.min(), max_ns: known.max() }
    }

    fn wrong(lines: &[Line]) -> Vec<&str> {
        lines.iter().filter(|line| line.verdict == Verdict::False).map(|line| line.what.as_str()).collect()
    }

    /// A twentieth of a run hangs for half a second; `f` is what a generator makes of each value.
    fn after(f: impl Fn(u64) -> u64) -> Vec<Line> {
        let truth: Vec<u64> =
            (0..20_000).map(|number| if number < 1_000 { MS + number * MS / 2 } else { MS }).collect();
        let reported = histogram(truth.iter().map(|&value| f(value)));
        percentiles("", &distribution(&reported, &histogram([])), &histogram([]), &histogram(truth), 0)
    }

    #[test]
    fn percentiles_may_be_off_by_little() {
        let all = ["p50", "p75", "p90", "p95", "p99", "p99.9"];
        assert!(wrong(&after(|value| value)).is_empty());
        assert!(wrong(&after(|value| value + MS / 12)).is_empty());
        assert!(wrong(&after(|value| value.max(value * 1_015 / 1_000))).is_empty());
        assert_eq!(wrong(&after(|value| value + MS / 8)), all[..4]);
        assert_eq!(wrong(&after(|value| value * 97 / 100)), all[4..]);
        assert_eq!(wrong(&after(|_| MS)), all[4..]);
        assert_eq!(wrong(&after(|value| value / 2)), all);
    }

    /// Hanging requests: the reported age is a bound, and must be said to be one from the right rank on.
    #[test]
    fn what_was_never_answered_is_a_bound() {
        let known = histogram((0..18_000).map(|_| MS));
        let ages = histogram((0..2_000).map(|number| (2_000 + number) * MS));
        let none = histogram([]);
        let check = |reported: Distribution, expected: &[&str]| {
            assert_eq!(wrong(&percentiles("", &reported, &none, &known, 2_000)), expected);
        };
        check(distribution(&known, &ages), &[]);
        check(distribution(&known, &none), &["p95", "p99", "p99.9"]);
        let mut pretended = known.clone();
        pretended.add(&ages).unwrap();
        check(distribution(&pretended, &none), &["p95", "p99", "p99.9"]);
        // However early they were given up, what lies below the answers that came is known.
        check(distribution(&known, &histogram((0..2_000).map(|_| MS / 2))), &[]);
    }

    #[test]
    fn a_quantile_of_few_is_not_judged() {
        let values = histogram((0..500).map(|_| MS));
        let lines = percentiles("", &distribution(&values, &histogram([])), &histogram([]), &values, 0);
        assert_eq!(lines.last().map(|line| line.what.as_str()), Some("p95"));
    }

    #[test]
    fn a_stall_is_held_against_the_fluid_queue() {
        // 10,000 arrivals in 10 s, of which those of 2 s hang, each until the stall's end, and half the capacity is free.
        let fluid = Fluid { stall_ns: 2_000 * MS, run_ns: 10_000 * MS, load: 0.5, waited_ns: 0 };
        let base = (0..6_000).map(|_| MS / 10);
        let waits = (0..4_000).map(|number| number * MS / 2);
        let right = histogram(base.clone().chain(waits));
        assert!(wrong(&formula(&fluid, &distribution(&right, &histogram([])), &histogram([]))).is_empty());
        let omitted = histogram(base.chain((0..64).map(|_| 2_000 * MS)));
        let lines = formula(&fluid, &distribution(&omitted, &histogram([])), &histogram([]));
        assert_eq!(wrong(&lines), ["p75", "p90", "p95", "p99"]);
    }

    /// A generator that admits to be late is excused for what is too high, and for that much alone.
    #[test]
    fn lateness_excuses_what_is_too_high() {
        let truth = histogram((0..20_000).map(|_| MS));
        let late = histogram((0..20_000).map(|_| MS / 2));
        let check = |reported_ns: u64, verdict: Verdict| {
            let reported = distribution(&histogram((0..20_000).map(|_| reported_ns)), &histogram([]));
            let lines = percentiles("", &reported, &late, &truth, 0);
            assert!(lines.iter().all(|line| line.verdict == verdict), "{reported_ns}: {lines:?}");
        };
        check(MS + MS / 12, Verdict::True);
        check(MS + MS / 2, Verdict::Late);
        check(MS + MS * 7 / 10, Verdict::False);
        check(MS - MS / 2, Verdict::False);
    }

    /// A generator sends when it says, or says that it was late.
    #[test]
    fn what_arrives_late_was_sent_late() {
        let all = |value_ns: u64| histogram((0..2_000).map(|_| value_ns));
        let check = |said_ns: u64, arrived_ns: u64, verdict: Verdict| {
            let lines = sends(&all(said_ns), &all(arrived_ns));
            assert_eq!(lines.len(), SENDS.len());
            assert!(lines.iter().all(|line| line.verdict == verdict), "{said_ns}, {arrived_ns}: {lines:?}");
        };
        check(MS / 100, MS / 20, Verdict::True);
        check(MS, MS + MS / 12, Verdict::True);
        check(MS / 100, MS, Verdict::False);
        check(MS, MS + MS / 2, Verdict::Late);
        check(MS, MS / 2, Verdict::False);
    }

    fn truth(right: u64, wrong: u64, unanswered: u64) -> Truth {
        let stub = Stub::start(([127, 0, 0, 1], 0).into(), Script::default()).unwrap();
        let mut truth = stub.stop().unwrap();
        truth.marked = right + wrong + unanswered;
        truth.right.record_n(MS, right).unwrap();
        truth.wrong.record_n(MS, wrong).unwrap();
        truth
    }

    fn sum(scheduled: u64, outcomes: &[(Outcome, u64)]) -> Sum {
        let none = distribution(&histogram([]), &histogram([]));
        let mut sum = Sum {
            scheduled,
            sent: scheduled,
            outcomes: [0; Outcome::COUNT],
            statuses: Vec::new(),
            bytes: 0,
            response: none.clone(),
            service: none.clone(),
            ttfb: none.clone(),
            conn_wait: none.clone(),
            failed: none.clone(),
            visible: none,
        };
        for (outcome, count) in outcomes {
            sum.outcomes[*outcome as usize] = *count;
        }
        sum.response.known.record_n(MS, sum.outcomes[Outcome::Ok as usize]).unwrap();
        sum
    }

    #[test]
    fn accounts_add_up() {
        use Outcome::{InFlightAtEnd, Ok, Reset, Timeout, Unsent, WrongStatus};
        let check = |loss, truth: &Truth, outcomes: &[(Outcome, u64)], expected: &[&str]| {
            assert_eq!(wrong(&account(loss, 100, &sum(100, outcomes), truth)), expected, "{outcomes:?}");
        };
        check(Loss::None, &truth(90, 10, 0), &[(Ok, 90), (WrongStatus, 10)], &[]);
        check(Loss::None, &truth(100, 0, 0), &[(Ok, 99)], &["requests that ended", "ok", "times of those"]);
        check(Loss::None, &truth(90, 10, 0), &[(Ok, 100)], &["ok", "times of those", "wrong status"]);
        check(Loss::Reset, &truth(97, 0, 3), &[(Ok, 97), (Reset, 3)], &[]);
        check(Loss::Reset, &truth(100, 0, 0), &[(Ok, 100)], &["lost at all"]);
        check(Loss::Reset, &truth(97, 0, 3), &[(Ok, 97), (Timeout, 3)], &["reset", "never answered"]);
        check(Loss::TimedOut, &truth(99, 0, 1), &[(Ok, 99), (Timeout, 1)], &[]);
        check(Loss::TimedOut, &truth(99, 0, 1), &[(Ok, 99), (Unsent, 1)], &["timed out"]);
        check(Loss::Hung, &truth(80, 0, 0), &[(Ok, 80), (InFlightAtEnd, 5), (Unsent, 15)], &[]);
        check(Loss::Hung, &truth(80, 0, 0), &[(Ok, 80)], &["requests that ended", "never answered"]);
    }
}
