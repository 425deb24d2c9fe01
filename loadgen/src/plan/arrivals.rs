//! The sequence of arrivals: when each is due, and of which class.
//!
//! In: the phases' curves and mixes, and the seed. Out: one worker's share, in order of time. Each phase begins anew.
//! Never: allocates after `new`, steps through time, plans for closed loops (they follow the answers). At its limit: an
//! instant that rounding puts outside its phase is moved to the phase's nearer end.
//!
//! Even arrivals are due where the integral of the rate is 1/2, 3/2, 5/2 …: each stands in the middle of its share of
//! time. So a phase has the whole number of arrivals that is nearest to its integral (rate times seconds where it is
//! constant; with whole numbers the last digit of a product would decide about one more), none falls on a border where
//! two phases meet, and none at an instant at which a ramp's rate is still 0.
//!
//! What another worker takes costs this one about 10 ns (even, 6 classes: 8; Poisson: 13; the test `cost` measures it).

use super::chance::{self, Purpose};
use super::curve::Cumulative;
use super::{Arrival, Segment, segments};
use crate::scenario::{ArrivalKind, Phase, Scenario};

/// Worker `worker` of `workers`'s share of the plan, in order of time: each `workers`-th of each class. By their number in
/// the whole plan they would alias with the turns of even classes: of two workers and two classes in equal parts one
/// would create all links, and the other read back what it never sees.
#[derive(Debug)]
pub struct Arrivals<'a> {
    segments: Vec<Segment>,
    /// One for each phase; those before `phase` are done.
    courses: Vec<Course<'a>>,
    phase: usize,
    segment: usize,
    /// Arrivals so far: of all, and of each class.
    number: u64,
    ordinals: Vec<u64>,
    workers: u64,
    /// Of each class: arrivals of other workers before the next of this one.
    others: Vec<u64>,
}

impl<'a> Arrivals<'a> {
    #[must_use]
    pub fn new(scenario: &'a Scenario, worker: usize, workers: usize) -> Self {
        let mut from_ns = 0;
        let mut courses = Vec::with_capacity(scenario.phases.len());
        for (index, phase) in scenario.phases.iter().enumerate() {
            courses.push(Course::new(phase, index, from_ns, scenario.run.seed));
            from_ns += phase.for_ns;
        }
        // Classes begin with different workers, so that rare ones do not all fall to the first.
        let first = |traffic: usize| ((worker + workers - traffic % workers) % workers) as u64;
        Self {
            segments: segments(scenario),
            courses,
            phase: 0,
            segment: 0,
            number: 0,
            ordinals: vec![0; scenario.traffic.len()],
            workers: workers as u64,
            others: (0..scenario.traffic.len()).map(first).collect(),
        }
    }

    /// The next of the whole sequence: how far its phase's integral has come, and its class.
    fn step(&mut self) -> Option<(f64, usize)> {
        while let Some(course) = self.courses.get_mut(self.phase) {
            if let Some(step) = course.step() {
                return Some(step);
            }
            self.phase += 1;
        }
        None
    }

    /// The segment of an instant that is not before the last one asked for.
    fn segment_at(&mut self, at_ns: u64) -> u16 {
        while self.segment + 1 < self.segments.len() && self.segments[self.segment].to_ns <= at_ns {
            self.segment += 1;
        }
        self.segment as u16
    }
}

impl Iterator for Arrivals<'_> {
    type Item = Arrival;

    fn next(&mut self) -> Option<Arrival> {
        loop {
            let (count, traffic) = self.step()?;
            let (number, ordinal) = (self.number, self.ordinals[traffic]);
            self.number += 1;
            self.ordinals[traffic] += 1;
            if self.others[traffic] > 0 {
                self.others[traffic] -= 1;
                continue;
            }
            self.others[traffic] = self.workers - 1;
            let at_ns = self.courses[self.phase].instant_ns(count);
            return Some(Arrival { at_ns, number, ordinal, segment: self.segment_at(at_ns), traffic: traffic as u16 });
        }
    }
}

/// How many arrivals each class has in each phase: `counts[phase][traffic]`. Walks the whole plan.
#[must_use]
pub fn counts(scenario: &Scenario) -> Vec<Vec<u64>> {
    let mut counts = vec![vec![0; scenario.traffic.len()]; scenario.phases.len()];
    let mut arrivals = Arrivals::new(scenario, 0, 1);
    while let Some((_, traffic)) = arrivals.step() {
        counts[arrivals.phase][traffic] += 1;
    }
    counts
}

/// One phase's sequence.
#[derive(Debug)]
struct Course<'a> {
    cumulative: Cumulative,
    total: f64,
    from_ns: u64,
    last_ns: u64,
    mix: &'a [(usize, f64)],
    /// Arrivals so far.
    number: u64,
    process: Process,
}

#[derive(Debug)]
enum Process {
    Even {
        turns: Turns,
    },
    /// `reached` of the integral.
    Poisson {
        reached: f64,
        gaps: u64,
        classes: u64,
        /// Where each class's share of (0, 1] ends.
        ends: Vec<f64>,
    },
}

impl<'a> Course<'a> {
    fn new(phase: &'a Phase, index: usize, from_ns: u64, seed: u64) -> Self {
        let cumulative = Cumulative::new(&phase.curve, phase.for_ns);
        let process = match phase.arrivals {
            ArrivalKind::Even => Process::Even { turns: Turns::new(&phase.mix) },
            ArrivalKind::Poisson => Process::Poisson {
                reached: 0.0,
                gaps: chance::key(seed, Purpose::Gap, index),
                classes: chance::key(seed, Purpose::Class, index),
                ends: ends(&phase.mix),
            },
        };
        Self {
            total: cumulative.total(),
            cumulative,
            from_ns,
            last_ns: (from_ns + phase.for_ns).saturating_sub(1),
            mix: &phase.mix,
            number: 0,
            process,
        }
    }

    fn step(&mut self) -> Option<(f64, usize)> {
        let (count, class) = match &mut self.process {
            Process::Even { turns } => {
                let count = self.number as f64 + 0.5;
                if count >= self.total {
                    return None;
                }
                (count, turns.next(self.number + 1))
            }
            // The integral turns the process of a rate that moves into one of rate 1 (Çinlar: Introduction to
            // stochastic processes, 1975, section 4.7), whose gaps are exponential with mean 1.
            Process::Poisson { reached, gaps, classes, ends } => {
                *reached -= chance::unit(chance::word(*gaps, self.number)).ln();
                if *reached >= self.total {
                    return None;
                }
                let place = chance::unit(chance::word(*classes, self.number));
                // All are compared: a branch that cannot be foretold costs more than the few comparisons it saves.
                (*reached, ends.iter().filter(|end| place > **end).count())
            }
        };
        self.number += 1;
        Some((count, self.mix[class].0))
    }

    fn instant_ns(&self, count: f64) -> u64 {
        let since_ns = (self.cumulative.instant(count) * 1e9).round() as u64;
        (self.from_ns + since_ns).min(self.last_ns)
    }
}

/// Running sums of the weights, without the last: what rounding left of 1 belongs to the last class.
fn ends(mix: &[(usize, f64)]) -> Vec<f64> {
    let sums = mix.iter().scan(0.0, |sum, (_, weight)| {
        *sum += weight;
        Some(*sum)
    });
    sums.take(mix.len().saturating_sub(1)).collect()
}

/// Whose turn it is, so that after each arrival every class has had its share to within one: Balinski and Young's quota
/// method (The quota method of apportionment, American Mathematical Monthly 82, 1975). A class may be served once its
/// share has begun; of those, the one whose share is over first.
#[derive(Debug)]
struct Turns {
    classes: Vec<Turn>,
}

#[derive(Debug)]
struct Turn {
    weight: f64,
    /// Its next share, in arrivals of the phase: after `from`, and best before `until`.
    from: f64,
    until: f64,
    served: u64,
}

impl Turns {
    fn new(mix: &[(usize, f64)]) -> Self {
        let classes = mix.iter().map(|(_, weight)| Turn { weight: *weight, from: 0.0, until: 1.0 / weight, served: 0 });
        Self { classes: classes.collect() }
    }

    /// For the phase's arrival `number`, from 1.
    fn next(&mut self, number: u64) -> usize {
        let now = number as f64;
        let mut best = 0;
        let mut until = f64::INFINITY;
        for (class, turn) in self.classes.iter().enumerate() {
            if turn.from < now && turn.until < until {
                best = class;
                until = turn.until;
            }
        }
        let turn = &mut self.classes[best];
        turn.served += 1;
        turn.from = turn.until;
        turn.until = (turn.served + 1) as f64 / turn.weight;
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::{Just, Strategy, any, prop, prop_assert, prop_assert_eq, prop_oneof, proptest};

    use crate::clock;
    use crate::plan::sample::{self, SECOND_NS};
    use crate::scenario::{Curve, Pick};

    fn scenario(seed: u64, phases: Vec<Phase>) -> Scenario {
        sample::scenario(seed, vec![sample::traffic(Pick::None); 6], phases)
    }

    fn everything(scenario: &Scenario) -> Vec<Arrival> {
        Arrivals::new(scenario, 0, 1).collect()
    }

    fn seconds(arrivals: &[Arrival]) -> Vec<f64> {
        arrivals.iter().map(|arrival| arrival.at_ns as f64 / 1e9).collect()
    }

    #[test]
    fn even_arrivals_stand_where_the_curve_says() {
        let check = |for_s: u64, curve: Curve, expected: &[f64]| {
            let phases = vec![sample::phase(for_s * SECOND_NS, curve.clone(), ArrivalKind::Even, vec![(0, 1.0)])];
            let found = seconds(&everything(&scenario(1, phases)));
            assert_eq!(found.len(), expected.len(), "{curve:?}: {found:?}");
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 2e-9, "{curve:?}: {found}, not {expected}");
            }
        };
        check(1, Curve::Constant(4.0), &[0.125, 0.375, 0.625, 0.875]);
        check(5, Curve::Constant(0.1), &[]);
        check(6, Curve::Constant(0.1), &[5.0]);
        check(2, Curve::Linear { from: 0.0, to: 4.0 }, &[0.5f64.sqrt(), 1.5f64.sqrt(), 2.5f64.sqrt(), 3.5f64.sqrt()]);
        check(2, Curve::Linear { from: 2.0, to: 0.0 }, &[2.0 - 3f64.sqrt(), 1.0]);
        check(9, Curve::None, &[]);
    }

    #[test]
    fn even_counts_are_exact() {
        let check = |rate: f64, for_s: u64, mix: &[(usize, f64)], expected: &[u64]| {
            let phase = sample::phase(for_s * SECOND_NS, Curve::Constant(rate), ArrivalKind::Even, mix.to_vec());
            // A second phase begins anew.
            let found = counts(&scenario(1, vec![phase.clone(), phase]));
            assert_eq!(found, [expected, expected], "{rate} a second, {for_s} s");
        };
        check(25_000.0, 3, &[(0, 1.0)], &[75_000, 0, 0, 0, 0, 0]);
        check(0.1, 30, &[(0, 1.0)], &[3, 0, 0, 0, 0, 0]);
        check(1000.0 / 3.0, 3, &[(0, 1.0)], &[1000, 0, 0, 0, 0, 0]);
        check(400.0, 30, &[(1, 0.88), (0, 0.04), (2, 0.02), (4, 0.05), (5, 0.01)], &[480, 10_560, 240, 0, 600, 120]);
    }

    proptest! {
        #[test]
        fn turns_keep_every_share_within_one(weights in prop::collection::vec(1..1000u32, 1..9)) {
            let sum: f64 = weights.iter().copied().map(f64::from).sum();
            let shares = weights.iter().map(|weight| f64::from(*weight) / sum);
            let mix: Vec<_> = shares.enumerate().collect();
            let mut turns = Turns::new(&mix);
            let mut served = vec![0u32; mix.len()];
            for number in 1..3000 {
                served[turns.next(number)] += 1;
                for (class, weight) in &mix {
                    let distance = f64::from(served[*class]) - number as f64 * weight;
                    prop_assert!(distance.abs() < 1.0 + 1e-9, "class {class} after {number}: {distance}");
                }
            }
        }

        #[test]
        fn any_number_of_workers_has_the_same_plan(scenario in scenarios()) {
            let all = everything(&scenario);
            for workers in [2, 8] {
                let mut together: Vec<_> =
                    (0..workers).flat_map(|worker| Arrivals::new(&scenario, worker, workers)).collect();
                together.sort_by_key(|arrival| arrival.number);
                prop_assert_eq!(&together, &all);
            }
        }

        #[test]
        fn each_worker_has_its_part_of_each_class(scenario in scenarios(), workers in 2_usize..9) {
            let share = |worker| {
                let mut share = vec![0_u64; scenario.traffic.len()];
                Arrivals::new(&scenario, worker, workers).for_each(|arrival| share[usize::from(arrival.traffic)] += 1);
                share
            };
            let shares: Vec<_> = (0..workers).map(share).collect();
            for traffic in 0..scenario.traffic.len() {
                let of_class = shares.iter().map(|share| share[traffic]);
                let (least, most) = (of_class.clone().min(), of_class.max());
                prop_assert!(most.unwrap_or(0) - least.unwrap_or(0) <= 1, "{:?}", shares);
            }
        }

        #[test]
        fn plans_are_in_order_and_complete(scenario in scenarios()) {
            let segments = segments(&scenario);
            let mut ordinals = vec![0; scenario.traffic.len()];
            let mut found = vec![vec![0; scenario.traffic.len()]; scenario.phases.len()];
            let mut last_ns = 0;
            for (number, arrival) in everything(&scenario).iter().enumerate() {
                prop_assert_eq!(arrival.number, number as u64);
                let traffic = usize::from(arrival.traffic);
                prop_assert_eq!(arrival.ordinal, ordinals[traffic]);
                ordinals[traffic] += 1;
                prop_assert!(arrival.at_ns >= last_ns);
                last_ns = arrival.at_ns;
                let segment = &segments[usize::from(arrival.segment)];
                prop_assert!((segment.from_ns..segment.to_ns).contains(&arrival.at_ns));
                found[segment.phase][traffic] += 1;
            }
            prop_assert_eq!(found, counts(&scenario));
        }
    }

    fn scenarios() -> impl Strategy<Value = Scenario> {
        let rate = 1.0..2000.0f64;
        let curve = prop_oneof![
            Just(Curve::None),
            rate.clone().prop_map(Curve::Constant),
            (rate.clone(), rate.clone()).prop_map(|(from, to)| Curve::Linear { from, to }),
            (rate.clone(), rate).prop_map(|(from, to)| Curve::Exponential { from, to }),
        ];
        let arrivals = prop_oneof![Just(ArrivalKind::Even), Just(ArrivalKind::Poisson)];
        let mix = prop::collection::vec(1..100u32, 1..6).prop_map(|weights| {
            let sum: f64 = weights.iter().copied().map(f64::from).sum();
            weights.iter().enumerate().map(|(class, weight)| (class, f64::from(*weight) / sum)).collect()
        });
        let phase = (0..SECOND_NS, curve, arrivals, mix)
            .prop_map(|(for_ns, curve, arrivals, mix)| sample::phase(for_ns, curve, arrivals, mix));
        let event = prop::option::of((0..3 * SECOND_NS, 0..SECOND_NS));
        (any::<u64>(), prop::collection::vec(phase, 1..4), event).prop_map(|(seed, phases, event)| {
            let mut scenario = scenario(seed, phases);
            scenario.events.extend(event.map(|(at_ns, lasts_ns)| sample::event(at_ns, lasts_ns)));
            scenario
        })
    }

    /// The largest distance between the found and the exponential distribution of mean 1 (Kolmogorov and Smirnov).
    fn distance_from_exponential(mut gaps: Vec<f64>) -> f64 {
        gaps.sort_by(f64::total_cmp);
        let count = gaps.len() as f64;
        let distances = gaps.iter().enumerate().map(|(index, gap)| {
            let expected = 1.0 - (-gap).exp();
            (expected - index as f64 / count).abs().max((expected - (index + 1) as f64 / count).abs())
        });
        distances.fold(0.0, f64::max)
    }

    #[test]
    fn poisson_arrivals_are_poisson() {
        let check = |seed: u64, curve: Curve| {
            let mix = vec![(0, 0.6), (1, 0.3), (2, 0.1)];
            let phase = sample::phase(20 * SECOND_NS, curve.clone(), ArrivalKind::Poisson, mix.clone());
            let cumulative = Cumulative::new(&curve, phase.for_ns);
            let total = cumulative.total();
            let arrivals = everything(&scenario(seed, vec![phase]));
            let count = arrivals.len() as f64;
            assert!((count - total).abs() < 4.0 * total.sqrt(), "{curve:?} seed {seed}: {count}, not {total}");
            // Whatever the rate does: measured in expected arrivals, gaps are exponential.
            let reached: Vec<f64> = seconds(&arrivals).iter().map(|at_s| cumulative.count(*at_s)).collect();
            let distance = distance_from_exponential(reached.windows(2).map(|pair| pair[1] - pair[0]).collect());
            // The 0.01% quantile of Kolmogorov's distribution is 2.23.
            assert!(distance < 2.23 / count.sqrt(), "{curve:?} seed {seed}: distance {distance}");
            for (class, weight) in mix {
                let found = arrivals.iter().filter(|arrival| usize::from(arrival.traffic) == class).count() as f64;
                let deviation = (count * weight * (1.0 - weight)).sqrt();
                assert!((found - count * weight).abs() < 4.0 * deviation, "{curve:?} seed {seed}: class {class}");
            }
        };
        for seed in 0..10 {
            check(seed, Curve::Constant(1000.0));
            check(seed, Curve::Linear { from: 0.0, to: 2000.0 });
            check(seed, Curve::Exponential { from: 100.0, to: 4000.0 });
        }
    }

    #[test]
    #[ignore = "a measurement: cargo test -p loadgen --release --lib -- --ignored --nocapture arrivals::tests::cost"]
    fn cost() {
        let mix = vec![(0, 0.6), (1, 0.3), (2, 0.04), (3, 0.03), (4, 0.02), (5, 0.01)];
        for kind in [ArrivalKind::Even, ArrivalKind::Poisson] {
            for workers in [1, 1_000_000] {
                let phase = sample::phase(400 * SECOND_NS, Curve::Constant(25_000.0), kind, mix.clone());
                let scenario = scenario(1, vec![phase]);
                let from_ns = clock::thread_cpu_ns();
                let taken = Arrivals::new(&scenario, 0, workers).count();
                let each_ns = (clock::thread_cpu_ns() - from_ns) as f64 / 1e7;
                println!("{kind:?}, {taken} taken of 10 M: {each_ns:.1} ns each");
            }
        }
    }
}
