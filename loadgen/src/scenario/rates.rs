//! What checks and warnings need to know of a curve: its ends, its highest rate, how many arrivals it has in all.
//!
//! In: a [`Curve`]. Out: requests a second, or a number of arrivals that is seldom whole. Never: says when or which; that
//! is the plan's.

use super::Curve;

/// Rates at the begin and at the end, requests a second.
#[must_use]
pub fn ends(curve: &Curve) -> (f64, f64) {
    match curve {
        Curve::None => (0.0, 0.0),
        Curve::Constant(rate) => (*rate, *rate),
        Curve::Linear { from, to } | Curve::Exponential { from, to } => (*from, *to),
        Curve::Points(points) => {
            (points.first().map_or(0.0, |&(_, rate)| rate), points.last().map_or(0.0, |&(_, rate)| rate))
        }
    }
}

/// Requests a second at the highest point, which is always an end of a piece.
#[must_use]
pub fn highest(curve: &Curve) -> f64 {
    match curve {
        Curve::Points(points) => points.iter().map(|&(_, rate)| rate).fold(0.0, f64::max),
        _ => {
            let (first, last) = ends(curve);
            first.max(last)
        }
    }
}

/// Arrivals of a phase that lasts `for_ns`: the integral of the rate.
#[must_use]
pub fn arrivals(curve: &Curve, for_ns: u64) -> f64 {
    let seconds = for_ns as f64 / 1e9;
    match curve {
        // The mean of two rates that differ by growth is (to - from) / ln(to / from); next to equal ones it is 0 / 0.
        Curve::Exponential { from, to } if (to - from).abs() > 1e-9 * from => (to - from) / (to / from).ln() * seconds,
        Curve::Points(points) => {
            let areas = points.windows(2).map(|pair| (pair[0].1 + pair[1].1) / 2.0 * (pair[1].0 - pair[0].0) as f64);
            areas.sum::<f64>() / 1e9
        }
        _ => {
            let (first, last) = ends(curve);
            (first + last) / 2.0 * seconds
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{arrivals, ends, highest};
    use crate::plan::curve::Cumulative;
    use crate::scenario::Curve;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn rates_of_each_curve() {
        for (curve, first, last, most) in [
            (Curve::None, 0.0, 0.0, 0.0),
            (Curve::Constant(5.0), 5.0, 5.0, 5.0),
            (Curve::Linear { from: 2.0, to: 8.0 }, 2.0, 8.0, 8.0),
            (Curve::Exponential { from: 100.0, to: 1.0 }, 100.0, 1.0, 100.0),
            (Curve::Exponential { from: 3.0, to: 3.0 }, 3.0, 3.0, 3.0),
            (Curve::Points(vec![(0, 0.0), (SECOND, 4.0), (SECOND, 5.0), (4 * SECOND, 1.0)]), 0.0, 1.0, 5.0),
        ] {
            assert_eq!((ends(&curve), highest(&curve)), ((first, last), most), "{curve:?}");
            let (found, planned) = (arrivals(&curve, 4 * SECOND), Cumulative::new(&curve, 4 * SECOND).total());
            assert!((found - planned).abs() < 1e-6, "{curve:?}: {found}, not {planned}");
        }
    }
}
