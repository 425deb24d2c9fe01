//! Rates of a curve: at an instant, the highest, and how many arrivals they are in all.
//!
//! In: a [`Curve`] and its phase's length. Out: requests a second, or arrivals as a real number. The plan turns them into
//! instants; here they serve checks, warnings and drawings.

use super::Curve;

const NS_PER_S: f64 = 1e9;

/// Requests a second at `at_ns` of a phase that lasts `for_ns`.
#[must_use]
pub fn rate_at(curve: &Curve, at_ns: u64, for_ns: u64) -> f64 {
    let part = at_ns as f64 / for_ns as f64;
    match curve {
        Curve::None => 0.0,
        Curve::Constant(rate) => *rate,
        Curve::Linear { from, to } => from + (to - from) * part,
        Curve::Exponential { from, to } => from * (to / from).powf(part),
        Curve::Points(points) => {
            let after = points.partition_point(|&(point_ns, _)| point_ns <= at_ns).clamp(1, points.len() - 1);
            let ((begin_ns, from), (end_ns, to)) = (points[after - 1], points[after]);
            from + (to - from) * (at_ns - begin_ns) as f64 / (end_ns - begin_ns) as f64
        }
    }
}

/// Requests a second at the curve's highest point: always at an end of one of its pieces.
#[must_use]
pub fn highest(curve: &Curve) -> f64 {
    match curve {
        Curve::None => 0.0,
        Curve::Constant(rate) => *rate,
        Curve::Linear { from, to } | Curve::Exponential { from, to } => from.max(*to),
        Curve::Points(points) => points.iter().map(|&(_, rate)| rate).fold(0.0, f64::max),
    }
}

/// Arrivals of the whole phase: the integral of its rate.
#[must_use]
pub fn arrivals(curve: &Curve, for_ns: u64) -> f64 {
    let seconds = for_ns as f64 / NS_PER_S;
    match curve {
        Curve::None => 0.0,
        Curve::Constant(rate) => rate * seconds,
        Curve::Linear { from, to } => (from + to) / 2.0 * seconds,
        Curve::Exponential { from, to } if (to - from).abs() < 1e-9 * from => from * seconds,
        Curve::Exponential { from, to } => (to - from) / (to / from).ln() * seconds,
        Curve::Points(points) => {
            points.windows(2).map(|pair| (pair[0].1 + pair[1].1) / 2.0 * (pair[1].0 - pair[0].0) as f64).sum::<f64>()
                / NS_PER_S
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{arrivals, highest, rate_at};
    use crate::scenario::Curve;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn rates_of_each_curve() {
        for (curve, first, middle, last, most, all) in [
            (Curve::None, 0.0, 0.0, 0.0, 0.0, 0.0),
            (Curve::Constant(5.0), 5.0, 5.0, 5.0, 5.0, 20.0),
            (Curve::Linear { from: 2.0, to: 8.0 }, 2.0, 5.0, 8.0, 8.0, 20.0),
            (Curve::Exponential { from: 1.0, to: 100.0 }, 1.0, 10.0, 100.0, 100.0, 4.0 * 99.0 / 100_f64.ln()),
            (Curve::Exponential { from: 3.0, to: 3.0 }, 3.0, 3.0, 3.0, 3.0, 12.0),
            (Curve::Points(vec![(0, 0.0), (SECOND, 4.0), (4 * SECOND, 1.0)]), 0.0, 3.0, 1.0, 4.0, 9.5),
        ] {
            let found = [
                rate_at(&curve, 0, 4 * SECOND),
                rate_at(&curve, 2 * SECOND, 4 * SECOND),
                rate_at(&curve, 4 * SECOND, 4 * SECOND),
                highest(&curve),
                arrivals(&curve, 4 * SECOND),
            ];
            for (found, expected) in found.into_iter().zip([first, middle, last, most, all]) {
                assert!((found - expected).abs() < 1e-9, "{curve:?}: {found}, not {expected}");
            }
        }
    }
}
