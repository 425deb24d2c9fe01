//! Which code an arrival asks for, and how many requests a session has.
//!
//! In: the class's `pick`, the seed, and the arrival's ordinal within its class. Out: a [`Choice`], the same whoever
//! asks and in whatever order. Never: allocates, remembers what was picked. At its limit: `never_twice` begins its walk
//! again when the set is used up.

use rand::RngExt;
use rand_distr::{Distribution, Geometric, Zipf};

use super::Arrival;
use super::chance::{self, Permutation, Purpose};
use crate::links::DIGITS;
use crate::scenario::{Pick, Requests, Scenario};

/// The code of one request; the catalogue, or the digits here, spell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    None,
    Link {
        set: u16,
        index: u64,
    },
    /// The first `length` of the digits.
    Random {
        digits: [u8; RANDOM_MAX],
        length: u8,
    },
    /// The worker's next fresh code of class `from`.
    Fresh {
        from: u16,
    },
}

/// Longest random code.
pub const RANDOM_MAX: usize = 16;

/// Prepared for one class: Zipf's constants, the permutation's size.
#[derive(Debug)]
pub struct Picker {
    key: u64,
    rule: Rule,
}

#[derive(Debug)]
enum Rule {
    None,
    Zipf { set: u16, count: u64, zipf: Zipf<f64>, scatter: Option<Permutation> },
    One { set: u16 },
    Uniform { set: u16, count: u64 },
    Once { set: u16, order: Permutation },
    Random { length: usize },
    Fresh { from: u16 },
}

impl Picker {
    /// For class `traffic` of the scenario.
    #[must_use]
    pub fn new(scenario: &Scenario, traffic: usize) -> Self {
        let seed = scenario.run.seed;
        let count = |set| scenario.catalogue.count(set);
        let rule = match scenario.traffic[traffic].pick {
            Pick::None => Rule::None,
            Pick::Zipf { set, s, scatter } => Rule::Zipf {
                set: set as u16,
                count: count(set),
                zipf: Zipf::new(count(set) as f64, s).expect("a scenario's sets are not empty and its s is at least 0"),
                // By set, not by class: who asks for the statistics of popular links means those that are clicked.
                scatter: scatter.then(|| Permutation::new(chance::key(seed, Purpose::Scatter, set), count(set))),
            },
            Pick::One { set } => Rule::One { set: set as u16 },
            Pick::Uniform { set, never_twice: false } => Rule::Uniform { set: set as u16, count: count(set) },
            Pick::Uniform { set, never_twice: true } => Rule::Once {
                set: set as u16,
                order: Permutation::new(chance::key(seed, Purpose::Order, traffic), count(set)),
            },
            Pick::Random { length } => Rule::Random { length: length.min(RANDOM_MAX) },
            Pick::Fresh { from, .. } => Rule::Fresh { from: from as u16 },
        };
        Self { key: chance::key(seed, Purpose::Code, traffic), rule }
    }

    /// The choice of the arrival with this ordinal within its class: the same for any number of workers.
    #[must_use]
    pub fn pick(&self, ordinal: u64) -> Choice {
        match &self.rule {
            Rule::None => Choice::None,
            Rule::Zipf { set, count, zipf, scatter } => {
                // Rounding may lead one past the last rank.
                let rank = (zipf.sample(&mut chance::stream(self.key, ordinal)) as u64).clamp(1, *count) - 1;
                Choice::Link { set: *set, index: scatter.as_ref().map_or(rank, |scatter| scatter.place(rank)) }
            }
            Rule::One { set } => Choice::Link { set: *set, index: 0 },
            Rule::Uniform { set, count } => {
                Choice::Link { set: *set, index: chance::stream(self.key, ordinal).random_range(0..*count) }
            }
            Rule::Once { set, order } => Choice::Link { set: *set, index: order.place(ordinal) },
            Rule::Random { length } => {
                let mut stream = chance::stream(self.key, ordinal);
                let mut digits = [0; RANDOM_MAX];
                for digit in &mut digits[..*length] {
                    *digit = DIGITS[stream.random_range(0..DIGITS.len())];
                }
                Choice::Random { digits, length: *length as u8 }
            }
            Rule::Fresh { from } => Choice::Fresh { from: *from },
        }
    }
}

/// Requests of the session that begins with this arrival, at least 1; pure as well.
#[must_use]
pub fn session_requests(seed: u64, arrival: &Arrival, requests: Requests) -> u32 {
    match requests {
        Requests::Fixed(requests) => requests.max(1),
        // One, and then one more as long as chance says so: P(n) = p (1-p)^(n-1), whose mean is 1/p.
        Requests::Geometric(mean) => {
            let more = Geometric::new(1.0 / mean.max(1.0)).expect("a probability, since the mean is at least 1");
            let key = chance::key(seed, Purpose::Session, usize::from(arrival.traffic));
            let more = more.sample(&mut chance::stream(key, arrival.ordinal));
            u32::try_from(more).unwrap_or(u32::MAX).saturating_add(1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::collections::{HashMap, HashSet};

    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    use crate::clock;
    use crate::links::Source;
    use crate::plan::sample;

    /// A scenario with one class and one set.
    fn scenario(seed: u64, count: u64, pick: Pick) -> Scenario {
        let mut scenario = sample::scenario(seed, vec![sample::traffic(pick)], vec![]);
        scenario.catalogue.sets[0].source = Source::Derived { count };
        scenario
    }

    fn indices(seed: u64, count: u64, pick: Pick, draws: u64) -> Vec<u64> {
        let picker = Picker::new(&scenario(seed, count, pick), 0);
        let index = |ordinal| match picker.pick(ordinal) {
            Choice::Link { set: 0, index } if index < count => index,
            other => panic!("{other:?}"),
        };
        (0..draws).map(index).collect()
    }

    fn frequencies(indices: &[u64]) -> HashMap<u64, f64> {
        let mut found = HashMap::new();
        for index in indices {
            *found.entry(*index).or_insert(0.0) += 1.0;
        }
        found
    }

    #[test]
    fn zipf_follows_its_law() {
        const DRAWS: u64 = 100_000;
        let check = |count: u64, s: f64, scatter: bool| {
            let weights: Vec<f64> = (1..=count).map(|rank| (rank as f64).powf(-s)).collect();
            let sum: f64 = weights.iter().sum();
            let found = frequencies(&indices(3, count, Pick::Zipf { set: 0, s, scatter }, DRAWS));
            let order = Permutation::new(chance::key(3, Purpose::Scatter, 0), count);
            for (rank, weight) in weights.iter().enumerate().take(100) {
                let index = if scatter { order.place(rank as u64) } else { rank as u64 };
                let found = found.get(&index).copied().unwrap_or(0.0);
                let share = weight / sum;
                let expected = DRAWS as f64 * share;
                // 5 deviations, for the hundreds of ranks that are looked at; and 5 draws, where a Poisson number of few
                // is not normal.
                let limit = 5.0 * (expected * (1.0 - share)).sqrt() + 5.0;
                assert!((found - expected).abs() < limit, "{count} {s} rank {rank}: {found}, not {expected}");
            }
        };
        for (count, s) in [(1, 1.1), (2, 1.1), (10, 0.0), (1000, 0.8), (1000, 1.0), (1000, 1.1), (100_000, 1.3)] {
            check(count, s, false);
            check(count, s, true);
        }
    }

    #[test]
    fn uniform_is_uniform() {
        let pick = Pick::Uniform { set: 0, never_twice: false };
        let found = frequencies(&indices(5, 100, pick, 100_000));
        let chi_square: f64 =
            (0..100).map(|index| (found.get(&index).copied().unwrap_or(0.0) - 1000.0).powi(2) / 1000.0).sum();
        // 99 degrees of freedom: mean 99, deviation 14.
        assert!((50.0..170.0).contains(&chi_square), "{chi_square}");
    }

    proptest! {
        #[test]
        fn never_twice_walks_the_whole_set(seed in any::<u64>(), count in 1..3000u64) {
            let pick = Pick::Uniform { set: 0, never_twice: true };
            let found = indices(seed, count, pick, 2 * count);
            let (first, second) = found.split_at(count as usize);
            prop_assert_eq!(first.iter().collect::<HashSet<_>>().len() as u64, count);
            prop_assert_eq!(first, second);
        }

        #[test]
        fn random_codes_are_digits(seed in any::<u64>(), length in 1..=RANDOM_MAX, ordinal in any::<u64>()) {
            let scenario = scenario(seed, 1, Pick::Random { length });
            let Choice::Random { digits, length: found } = Picker::new(&scenario, 0).pick(ordinal) else {
                panic!("no random code");
            };
            prop_assert_eq!(usize::from(found), length);
            prop_assert!(digits[..length].iter().all(u8::is_ascii_alphanumeric));
        }
    }

    #[test]
    fn seeds_and_classes_differ_and_the_same_repeats() {
        let pick = || Pick::Uniform { set: 0, never_twice: false };
        assert_eq!(indices(1, 1000, pick(), 100), indices(1, 1000, pick(), 100));
        assert_ne!(indices(1, 1000, pick(), 100), indices(2, 1000, pick(), 100));
        let two = sample::scenario(1, vec![sample::traffic(pick()); 2], vec![]);
        let (first, second) = (Picker::new(&two, 0), Picker::new(&two, 1));
        assert!((0..100).any(|ordinal| first.pick(ordinal) != second.pick(ordinal)));
    }

    #[test]
    fn fixed_choices() {
        let check = |pick: Pick, expected: Choice| {
            let picker = Picker::new(&scenario(1, 10, pick), 0);
            assert!([0, 1, u64::MAX].iter().all(|ordinal| picker.pick(*ordinal) == expected), "{expected:?}");
        };
        check(Pick::None, Choice::None);
        check(Pick::One { set: 0 }, Choice::Link { set: 0, index: 0 });
        check(Pick::Fresh { from: 4, delay_ns: 50 }, Choice::Fresh { from: 4 });
    }

    #[test]
    #[ignore = "a measurement: cargo test -p loadgen --release --lib -- --ignored --nocapture pick::tests::cost"]
    fn cost() {
        let zipf = Pick::Zipf { set: 0, s: 1.1, scatter: true };
        let once = Pick::Uniform { set: 0, never_twice: true };
        for pick in [zipf, once, Pick::Random { length: 7 }] {
            let scenario = scenario(1, 2_000_000, pick.clone());
            let picker = Picker::new(&scenario, 0);
            let mut code = Vec::with_capacity(RANDOM_MAX);
            let from_ns = clock::thread_cpu_ns();
            for ordinal in 0..1_000_000 {
                code.clear();
                if let Choice::Link { set, index } = picker.pick(ordinal) {
                    scenario.catalogue.code_into(usize::from(set), index, &mut code);
                }
                std::hint::black_box(&code);
            }
            println!(
                "{pick:?}: {:.0} ns with the spelling of its code",
                (clock::thread_cpu_ns() - from_ns) as f64 / 1e6
            );
        }
    }

    #[test]
    fn sessions_have_their_mean() {
        const SESSIONS: u64 = 50_000;
        let check = |mean: f64| {
            let length = |ordinal| {
                let arrival = Arrival { at_ns: 0, number: 0, ordinal, segment: 0, traffic: 0 };
                f64::from(session_requests(9, &arrival, Requests::Geometric(mean)))
            };
            let lengths: Vec<f64> = (0..SESSIONS).map(length).collect();
            assert!(lengths.iter().all(|length| *length >= 1.0));
            let sessions = SESSIONS as f64;
            let found = lengths.iter().sum::<f64>() / sessions;
            // The variance is (1-p)/p^2.
            let deviation = (mean * (mean - 1.0) / sessions).sqrt();
            assert!((found - mean).abs() <= 4.0 * deviation, "mean {mean}: {found}");
            let ones = lengths.iter().filter(|length| **length == 1.0).count() as f64;
            let p = 1.0 / mean;
            assert!((ones - sessions * p).abs() <= 4.0 * (sessions * p * (1.0 - p)).sqrt(), "mean {mean}: {ones} ones");
        };
        for mean in [1.0, 1.1, 1.4, 3.0, 50.0] {
            check(mean);
        }
        let arrival = Arrival { at_ns: 0, number: 0, ordinal: 0, segment: 0, traffic: 0 };
        assert_eq!(session_requests(9, &arrival, Requests::Fixed(3)), 3);
        assert_eq!(session_requests(9, &arrival, Requests::Fixed(0)), 1);
    }
}
