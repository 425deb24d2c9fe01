//! A phase's rate over time, its integral, and the way back.
//!
//! In: a [`Curve`] and the length of its phase. Out: how many arrivals are due until an instant, and at which instant so
//! many are. Never: steps through time, so nothing adds up and nothing drifts. At its limit: instants outside the phase
//! are taken for its nearer end.
//!
//! Rates are arrivals a second, instants seconds since the phase began.

use crate::scenario::Curve;

/// A curve prepared for its phase: pieces in order of time, each of one formula.
#[derive(Debug)]
pub struct Cumulative {
    pieces: Vec<Piece>,
}

#[derive(Debug)]
struct Piece {
    from_s: f64,
    length_s: f64,
    /// At the piece's begin.
    rate: f64,
    shape: Shape,
    /// Arrivals before the piece, and up to its end.
    before: f64,
    until: f64,
}

#[derive(Debug)]
enum Shape {
    /// rate + slope t.
    Line { slope: f64 },
    /// rate e^(growth t); growth is not 0.
    Exponential { growth: f64 },
}

impl Cumulative {
    /// For a phase of this length. The rates of an exponential curve are above 0.
    #[must_use]
    pub fn new(curve: &Curve, for_ns: u64) -> Self {
        let mut cumulative = Self { pieces: Vec::new() };
        let for_s = seconds(for_ns);
        match curve {
            Curve::None => {}
            Curve::Constant(rate) => cumulative.push_line(0.0, for_s, *rate, *rate),
            Curve::Linear { from, to } => cumulative.push_line(0.0, for_s, *from, *to),
            Curve::Exponential { from, to } => {
                let growth = (to / from).ln() / for_s;
                // Where both rates are one number the formula would divide by 0; next to that it still holds.
                if growth == 0.0 {
                    cumulative.push_line(0.0, for_s, *from, *to);
                } else {
                    cumulative.push(0.0, for_s, *from, Shape::Exponential { growth });
                }
            }
            Curve::Points(points) => {
                for pair in points.windows(2) {
                    let [(from_ns, from), (to_ns, to)] = pair else { continue };
                    cumulative.push_line(seconds(*from_ns), seconds(*to_ns), *from, *to);
                }
            }
        }
        cumulative
    }

    fn push_line(&mut self, from_s: f64, to_s: f64, from: f64, to: f64) {
        self.push(from_s, to_s, from, Shape::Line { slope: (to - from) / (to_s - from_s) });
    }

    fn push(&mut self, from_s: f64, to_s: f64, rate: f64, shape: Shape) {
        // Two points at one instant: the rate jumps there.
        if to_s > from_s {
            let before = self.total();
            let mut piece = Piece { from_s, length_s: to_s - from_s, rate, shape, before, until: before };
            piece.until += piece.count(piece.length_s);
            self.pieces.push(piece);
        }
    }

    /// Arrivals of the whole phase, seldom a whole number.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.pieces.last().map_or(0.0, |piece| piece.until)
    }

    /// Arrivals a second at this instant; where the rate jumps, the one after.
    #[must_use]
    pub fn rate(&self, at_s: f64) -> f64 {
        self.piece_at(at_s).map_or(0.0, |piece| {
            let since_s = piece.clamp(at_s - piece.from_s);
            match piece.shape {
                Shape::Line { slope } => piece.rate + slope * since_s,
                Shape::Exponential { growth } => piece.rate * (growth * since_s).exp(),
            }
        })
    }

    /// Arrivals from the phase's begin to this instant: the integral of the rate.
    #[must_use]
    pub fn count(&self, at_s: f64) -> f64 {
        self.piece_at(at_s).map_or(0.0, |piece| piece.before + piece.count(piece.clamp(at_s - piece.from_s)))
    }

    /// The first instant until which there are `count` arrivals.
    #[must_use]
    pub fn instant(&self, count: f64) -> f64 {
        let index = self.pieces.partition_point(|piece| piece.until < count);
        let Some(piece) = self.pieces.get(index).or(self.pieces.last()) else { return 0.0 };
        piece.from_s + piece.clamp(piece.instant(count - piece.before))
    }

    fn piece_at(&self, at_s: f64) -> Option<&Piece> {
        let begun = self.pieces.partition_point(|piece| piece.from_s <= at_s);
        self.pieces.get(begun.saturating_sub(1))
    }
}

impl Piece {
    fn clamp(&self, since_s: f64) -> f64 {
        since_s.clamp(0.0, self.length_s)
    }

    fn count(&self, since_s: f64) -> f64 {
        match self.shape {
            Shape::Line { slope } => since_s * (self.rate + slope * since_s / 2.0),
            Shape::Exponential { growth } => self.rate * (growth * since_s).exp_m1() / growth,
        }
    }

    fn instant(&self, count: f64) -> f64 {
        match self.shape {
            // The root of slope/2 t^2 + rate t = count in the form that subtracts nothing: the usual one loses all
            // digits on ramps that are nearly flat, and divides by 0 on flat ones.
            Shape::Line { slope } => {
                let root = (self.rate * self.rate + 2.0 * slope * count).max(0.0).sqrt();
                let sum = self.rate + root;
                // No rate and no slope: nothing ever arrives.
                if sum > 0.0 { 2.0 * count / sum } else { 0.0 }
            }
            Shape::Exponential { growth } => (count * growth / self.rate).ln_1p() / growth,
        }
    }
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::{Just, Strategy, prop, prop_assert, prop_oneof, proptest};

    const FOR_NS: u64 = 60_000_000_000;

    fn check(curve: &Curve, total: f64, courses: &[(f64, f64, f64)]) {
        let cumulative = Cumulative::new(curve, FOR_NS);
        let near = |found: f64, expected: f64| {
            assert!((found - expected).abs() <= 1e-9 * expected.abs().max(1.0), "{curve:?}: {found}, not {expected}");
        };
        near(cumulative.total(), total);
        for (at_s, rate, count) in courses {
            near(cumulative.rate(*at_s), *rate);
            near(cumulative.count(*at_s), *count);
            near(cumulative.instant(*count), *at_s);
        }
    }

    #[test]
    fn known_courses() {
        check(&Curve::None, 0.0, &[]);
        check(&Curve::Constant(400.0), 24_000.0, &[(0.0, 400.0, 0.0), (15.0, 400.0, 6000.0), (60.0, 400.0, 24_000.0)]);
        let up = Curve::Linear { from: 0.0, to: 120.0 };
        check(&up, 3600.0, &[(0.0, 0.0, 0.0), (30.0, 60.0, 900.0), (60.0, 120.0, 3600.0)]);
        let down = Curve::Linear { from: 120.0, to: 0.0 };
        check(&down, 3600.0, &[(0.0, 120.0, 0.0), (30.0, 60.0, 2700.0), (60.0, 0.0, 3600.0)]);
        let exponential = Curve::Exponential { from: 1.0, to: 1f64.exp() };
        check(
            &exponential,
            60.0 * (1f64.exp() - 1.0),
            &[(0.0, 1.0, 0.0), (30.0, 0.5f64.exp(), 60.0 * (0.5f64.exp() - 1.0))],
        );
        // Flat, but not by a last digit: nearly a constant.
        let nearly = Curve::Exponential { from: 100.0, to: 100.0 * (1.0 + f64::EPSILON) };
        check(&nearly, 6000.0, &[(30.0, 100.0, 3000.0), (60.0, 100.0, 6000.0)]);
        check(&Curve::Exponential { from: 100.0, to: 100.0 }, 6000.0, &[(30.0, 100.0, 3000.0)]);
        let second = 1_000_000_000;
        let points =
            Curve::Points(vec![(0, 0.0), (10 * second, 100.0), (20 * second, 0.0), (40 * second, 0.0), (FOR_NS, 50.0)]);
        check(&points, 1500.0, &[(10.0, 100.0, 500.0), (50.0, 25.0, 1125.0), (60.0, 50.0, 1500.0)]);
        // In a pause the first instant of it.
        check(&points, 1500.0, &[(20.0, 0.0, 1000.0)]);
        let jump = Curve::Points(vec![(0, 10.0), (30 * second, 10.0), (30 * second, 20.0), (FOR_NS, 20.0)]);
        check(&jump, 900.0, &[(29.0, 10.0, 290.0), (30.0, 20.0, 300.0), (60.0, 20.0, 900.0)]);
        check(&Curve::Constant(0.0), 0.0, &[(0.0, 0.0, 0.0)]);
    }

    fn curves() -> impl Strategy<Value = Curve> {
        let rate = || prop_oneof![1 => Just(0.0), 4 => 0.001..100_000.0];
        let above_0 = 0.001..100_000.0f64;
        let points = prop::collection::vec((1..FOR_NS, rate()), 0..6).prop_map(|mut inner| {
            inner.sort_by_key(|(at_ns, _)| *at_ns);
            let mut points = vec![(0, 5.0)];
            points.extend(inner);
            points.push((FOR_NS, 0.0));
            Curve::Points(points)
        });
        prop_oneof![
            rate().prop_map(Curve::Constant),
            (rate(), rate()).prop_map(|(from, to)| Curve::Linear { from, to }),
            (above_0.clone(), -1e-9..1e-9).prop_map(|(from, part)| Curve::Linear { from, to: from * (1.0 + part) }),
            (above_0.clone(), above_0.clone()).prop_map(|(from, to)| Curve::Exponential { from, to }),
            (above_0, -1e-9..1e-9).prop_map(|(from, part)| Curve::Exponential { from, to: from * (1.0 + part) }),
            points,
        ]
    }

    proptest! {
        #[test]
        fn instants_and_counts_are_inverse(curve in curves(), parts in prop::collection::vec(0.0..1.0, 1..50)) {
            let cumulative = Cumulative::new(&curve, FOR_NS);
            let total = cumulative.total();
            let mut counts: Vec<f64> = parts.iter().map(|part| part * total).collect();
            counts.extend([0.0, total]);
            counts.sort_by(f64::total_cmp);
            let mut last_s = 0.0;
            for count in counts {
                let at_s = cumulative.instant(count);
                prop_assert!((0.0..=60.0).contains(&at_s), "{at_s}");
                prop_assert!(at_s >= last_s - 1e-9, "{at_s} after {last_s}");
                last_s = at_s;
                let back = cumulative.count(at_s);
                prop_assert!((back - count).abs() <= 1e-9 * count.max(1e-3), "{count} came back as {back}");
            }
            prop_assert!(cumulative.count(0.0) == 0.0);
            prop_assert!((cumulative.count(60.0) - total).abs() <= 1e-12 * total);
        }

        /// Against the sum of the rate in small steps (Simpson's rule).
        #[test]
        fn counts_are_the_integral_of_rates(curve in curves(), from in 0.0..60.0f64, length in 0.0..0.001f64) {
            let cumulative = Cumulative::new(&curve, FOR_NS);
            let to = (from + length).min(60.0);
            // Where a curve has a corner the rule does not hold.
            if let Curve::Points(points) = &curve
                && points.iter().any(|(at_ns, _)| (from..=to).contains(&seconds(*at_ns)))
            {
                return Ok(());
            }
            let sum = cumulative.rate(from) + 4.0 * cumulative.rate((from + to) / 2.0) + cumulative.rate(to);
            let expected = (to - from) / 6.0 * sum;
            let found = cumulative.count(to) - cumulative.count(from);
            prop_assert!((found - expected).abs() <= 1e-12 * cumulative.total() + 1e-9, "{found}, not {expected}");
        }
    }
}
