//! Percentiles that say what they do not know.
//!
//! In: histograms of known times and of ages, which are lower bounds. Out: values by nearest rank (the smallest value with
//! at least `q * n` values at or below it, as a sorted list would show it), at most 0.1 % or half a microsecond too high.
//! Never: interpolates, guesses without samples. At its limit: a quantile that an age could have raised is `at_least`, with
//! the most that it can be where that is known.

use hdrhistogram::{Counter, Histogram};

use super::batch::Samples;

/// A quantile's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantile {
    pub value_ns: u64,
    /// The true value is this one or larger: it depends on how long requests took that were still waiting at their age.
    pub at_least: bool,
    /// The largest that the true value can be, however long those took; none when nothing bounds it.
    pub at_most_ns: Option<u64>,
}

/// Fewer values than this beyond a quantile say little about where it lies.
pub const ENOUGH_BEYOND: f64 = 10.0;

/// Whether `n` values are enough to speak of quantile `q`: at least [`ENOUGH_BEYOND`] of them lie beyond it.
#[must_use]
pub fn enough(n: u64, q: f64) -> bool {
    // The products of short decimals are off by less than this.
    n as f64 * (1.0 - q) >= ENOUGH_BEYOND - 1e-6
}

/// Quantile `q` (0 to 1) of plain values, in nanoseconds, as the top of its bucket.
#[must_use]
pub fn quantile_ns<C: Counter>(counts: &Histogram<C>, q: f64) -> Option<u64> {
    (!counts.is_empty()).then(|| value_at_rank(counts, rank(counts.len(), q)))
}

/// As [`quantile_ns`], of known values and ages together.
#[must_use]
pub fn quantile<C: Counter>(known: &Histogram<C>, censored: &Histogram<C>, q: f64) -> Option<Quantile> {
    let ranks = Ranks::new(known, censored);
    (ranks.n > 0).then(|| ranks.value(rank(ranks.n, q)))
}

/// Values and the ages of those that are only known to be longer.
#[derive(Debug, Clone)]
pub struct Distribution {
    pub known: Histogram<u64>,
    pub censored: Histogram<u64>,
    /// Exact; of `known`. 0 without values.
    pub min_ns: u64,
    pub max_ns: u64,
}

impl Distribution {
    #[must_use]
    pub fn new(known: Samples<u64>, censored: Samples<u64>) -> Self {
        let min_ns = if known.is_empty() { 0 } else { known.min_ns };
        Self { known: known.counts, censored: censored.counts, min_ns, max_ns: known.max_ns }
    }

    /// Known values and ages.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.known.len() + self.censored.len()
    }

    /// Quantile `q`, 0 to 1; none without values.
    #[must_use]
    pub fn quantile(&self, q: f64) -> Option<Quantile> {
        quantile(&self.known, &self.censored, q).map(|quantile| self.within_ends(quantile))
    }

    /// The interval that holds the true quantile `q` with 95 % confidence; none when fewer than [`ENOUGH_BEYOND`] values
    /// lie beyond `q`.
    ///
    /// Its ends are order statistics, whatever the distribution's shape: the number of values below the quantile is
    /// binomial, approximated by the normal distribution and rounded outwards, ranks `⌊nq − 1.96 √(nq(1−q))⌋` and
    /// `⌈nq + 1.96 √(nq(1−q))⌉ + 1` (J.-Y. Le Boudec, Performance Evaluation of Computer and Communication Systems,
    /// theorem 2.1). It takes values to be independent; those of one stall are not, so the truth may be wider.
    #[must_use]
    pub fn interval_95(&self, q: f64) -> Option<(Quantile, Quantile)> {
        let ranks = Ranks::new(&self.known, &self.censored);
        if !enough(ranks.n, q) {
            return None;
        }
        let middle = ranks.n as f64 * q;
        let reach = 1.96 * (middle * (1.0 - q)).sqrt();
        let end = |at: f64| self.within_ends(ranks.value((at.max(1.0) as u64).min(ranks.n)));
        Some((end((middle - reach).floor()), end((middle + reach).ceil() + 1.0)))
    }

    /// A bucket's top may lie beyond the exact ends.
    fn within_ends(&self, quantile: Quantile) -> Quantile {
        let within = |ns: u64| ns.clamp(self.min_ns, self.max_ns.max(self.min_ns));
        let Quantile { value_ns, at_least, at_most_ns } = quantile;
        Quantile {
            value_ns: if at_least { value_ns } else { within(value_ns) },
            at_least,
            at_most_ns: at_most_ns.map(within),
        }
    }
}

/// Known values and ages in one order.
struct Ranks<'a, C: Counter> {
    known: &'a Histogram<C>,
    /// Only where there are ages.
    merged: Option<Histogram<C>>,
    n: u64,
}

impl<'a, C: Counter> Ranks<'a, C> {
    fn new(known: &'a Histogram<C>, censored: &Histogram<C>) -> Self {
        let merged = (!censored.is_empty()).then(|| {
            let mut merged = known.clone();
            merged.add(censored).expect("they resize themselves");
            merged
        });
        Self { known, merged, n: known.len() + censored.len() }
    }

    /// Had all that was given up ended at its age, the value would be the least that it can be; had none of it ever ended,
    /// the most. Where both are one, the ages do not matter.
    fn value(&self, rank: u64) -> Quantile {
        let most_ns = (rank <= self.known.len()).then(|| value_at_rank(self.known, rank));
        let Some(merged) = &self.merged else {
            return Quantile { value_ns: value_at_rank(self.known, rank), at_least: false, at_most_ns: most_ns };
        };
        let least_ns = value_at_rank(merged, rank);
        let at_least = most_ns != Some(least_ns);
        // A bound must not be larger than what it bounds.
        let value_ns = if at_least { merged.lowest_equivalent(least_ns) } else { least_ns };
        Quantile { value_ns, at_least, at_most_ns: most_ns }
    }
}

/// 1 to `n`.
fn rank(n: u64, q: f64) -> u64 {
    // 0.999 * 1000 is a little more than 999; a rank is exact up to 10^9 values.
    (((n as f64 * q) - 1e-6).ceil().max(1.0) as u64).min(n)
}

fn value_at_rank<C: Counter>(counts: &Histogram<C>, rank: u64) -> u64 {
    let mut seen = 0;
    for bucket in counts.iter_recorded() {
        seen += bucket.count_at_value().as_u64();
        if seen >= rank {
            return bucket.value_iterated_to();
        }
    }
    counts.max()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{ProptestConfig, prop, prop_assert, prop_assert_eq, proptest};

    use super::Distribution;
    use super::{Quantile, enough, quantile_ns};
    use crate::measure::batch::Samples;

    fn distribution(known: &[u64], censored: &[u64]) -> Distribution {
        let mut of = [Samples::new(), Samples::new()];
        for (samples, values) in of.iter_mut().zip([known, censored]) {
            values.iter().for_each(|&value| samples.record(value));
        }
        let [known, censored] = of;
        Distribution::new(known, censored)
    }

    #[test]
    fn a_quantile_tells_whether_it_is_a_bound() {
        let ms = |n: u64| n * 1_000_000;
        let check = |known: &[u64], censored: &[u64], q: f64, expected: Option<(u64, bool)>| {
            let found = distribution(known, censored).quantile(q);
            assert_eq!(found.is_some(), expected.is_some(), "{known:?} {censored:?} {q}");
            let (Some(Quantile { value_ns, at_least, .. }), Some((value, bound))) = (found, expected) else { return };
            assert_eq!(at_least, bound, "{known:?} {censored:?} {q}");
            assert!(value_ns.abs_diff(value) <= value / 1000 + 1000, "{value_ns} for {value}");
            assert!(!bound || value_ns <= value, "{value_ns} is no bound of {value}");
        };
        let ten: Vec<u64> = (1..=10).map(ms).collect();
        check(&[], &[], 0.5, None);
        check(&ten, &[], 0.5, Some((ms(5), false)));
        check(&ten, &[], 0.99, Some((ms(10), false)));
        check(&ten, &[], 1.0, Some((ms(10), false)));
        check(&ten, &[], 0.0, Some((ms(1), false)));
        // The 11th of 11 waited for 5 s: the middle is known all the same.
        check(&ten, &[ms(5000)], 0.5, Some((ms(6), false)));
        check(&ten, &[ms(5000)], 0.99, Some((ms(5000), true)));
        // An age below: where the tenth lies is not known, but no further than among those that were answered.
        check(&ten, &[ms(2)], 0.9, Some((ms(9), true)));
        assert!(distribution(&ten, &[ms(2)]).quantile(0.9).is_some_and(|found| found.at_most_ns == Some(ms(10))));
        // One of a thousand was shed, at age 0: it could not move what all the others agree on.
        let thousand = vec![ms(3); 999];
        check(&thousand, &[0], 0.99, Some((ms(3), false)));
        check(&thousand, &[0], 1.0, Some((ms(3), true)));
        check(&[], &[ms(7)], 0.5, Some((ms(7), true)));
    }

    #[test]
    fn an_interval_needs_enough_values_and_holds_the_quantile() {
        let values: Vec<u64> = (1..=10_000).map(|n| n * 10_000).collect();
        let all = distribution(&values, &[]);
        assert!(all.interval_95(0.999).is_some());
        assert!(all.interval_95(0.9999).is_none());
        assert!(!enough(999, 0.99) && enough(1000, 0.99));
        // Ranks 4901 (4900 rounded outwards) and 5099: n q = 5000, 1.96 * sqrt(2500) = 98.
        let (low, high) = all.interval_95(0.5).expect("enough");
        assert!(low.value_ns.abs_diff(49_020_000) <= 50_000, "{low:?}");
        assert!(high.value_ns.abs_diff(50_990_000) <= 52_000, "{high:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn quantiles_of_many_workers_are_those_of_a_sorted_list(
            workers in prop::collection::vec(prop::collection::vec(0..100_000_000_000_u64, 1..400), 1..5),
            q in 0.0..1.0_f64,
        ) {
            let mut sum = Samples::<u64>::new();
            let mut sorted = Vec::new();
            for values in &workers {
                let mut second = Samples::<u32>::new();
                // Each decade alike: three quarters of all numbers below 10^11 lie above 10^10.
                for value in values.iter().map(|&value| value >> (value % 27)) {
                    second.record(value);
                    sorted.push(value);
                }
                sum.absorb(&second);
            }
            sorted.sort_unstable();
            let n = sorted.len();
            prop_assert_eq!(sum.counts.len(), n as u64);
            prop_assert_eq!((sum.min_ns, sum.max_ns), (sorted[0], sorted[n - 1]));
            for q in [q, 0.5, 0.9, 0.99, 0.999, 1.0] {
                let exact = sorted[((n as f64 * q - 1e-6).ceil() as usize).clamp(1, n) - 1];
                let found = quantile_ns(&sum.counts, q).expect("values");
                prop_assert!(found.abs_diff(exact) <= exact / 1000 + 1000, "{} for {}", found, exact);
            }
        }

        /// Whatever the requests that were given up would have taken: a bound is none too high, all else is the truth.
        #[test]
        fn what_is_not_known_is_told(
            known in prop::collection::vec(0..40_u32, 0..60),
            censored in prop::collection::vec((0..40_u32, 0..10_u32), 0..20),
            q in 0.0..=1.0_f64,
        ) {
            // 1 ms to 1.3 s, each more than a tenth above the one before.
            let ns = |step: u32| (1e6 * 1.2_f64.powi(step.cast_signed())) as u64;
            let known: Vec<u64> = known.into_iter().map(ns).collect();
            let ages: Vec<u64> = censored.iter().map(|&(step, _)| ns(step)).collect();
            let mut truth = known.clone();
            truth.extend(censored.iter().map(|&(step, more)| ns(step + more)));
            truth.sort_unstable();
            let Some(found) = distribution(&known, &ages).quantile(q) else {
                prop_assert!(truth.is_empty());
                return Ok(());
            };
            let n = truth.len();
            let exact = truth[((n as f64 * q - 1e-6).ceil() as usize).clamp(1, n) - 1];
            let rank = ((n as f64 * q - 1e-6).ceil() as usize).clamp(1, n);
            let mut least = [known.clone(), ages].concat();
            least.sort_unstable();
            let mut most = known;
            most.sort_unstable();
            let (least, most) = (least[rank - 1], most.get(rank - 1).copied());
            prop_assert_eq!(found.at_least, most != Some(least));
            prop_assert_eq!(found.at_most_ns.is_some(), most.is_some());
            prop_assert!(found.at_most_ns.is_none_or(|at_most| at_most + at_most / 1000 + 1000 >= exact), "{found:?}");
            prop_assert!(
                found.at_most_ns.zip(most).is_none_or(|(found, most)| found.abs_diff(most) <= most / 1000 + 1000),
                "{found:?} for {most:?}"
            );
            if found.at_least {
                prop_assert!(found.value_ns <= exact, "{found:?} is no bound of {exact}");
            } else {
                prop_assert!(found.value_ns.abs_diff(exact) <= exact / 1000 + 1000, "{found:?} for {exact}");
            }
        }
    }
}
