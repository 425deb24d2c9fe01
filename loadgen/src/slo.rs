//! What must hold: `p(99) < 5ms`, `errors < 0.1%`, `wrong_location == 0`, `recovery < 2s`; k6's syntax with units.
//!
//! In: expressions of a scenario or of `--slo`. Out: each with the value that was measured and whether it holds. Never:
//! passes on what was not measured: without a sample, or on a bound only ("at least 5 s"), a limit from above fails.

pub mod eval;
pub mod parse;

use crate::measure::Outcome;

/// `[[slo]]`: where, and what.
#[derive(Debug, Clone, PartialEq)]
pub struct Slo {
    pub scope: Scope,
    pub must: Vec<Expression>,
}

/// Nothing named: everything but the warm-up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scope {
    pub phase: Option<usize>,
    pub event: Option<usize>,
    /// Indices of traffic; none: all.
    pub traffic: Vec<usize>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Expression {
    pub text: String,
    pub metric: Metric,
    pub comparison: Comparison,
    /// Nanoseconds, a fraction (0.001 for 0.1%) or a number, as the metric is.
    pub limit: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Metric {
    /// Response time at this quantile (0.99 for `p(99)`), nanoseconds. Also `max`, `mean`.
    Percentile(f64),
    Max,
    Mean,
    /// Share of finished requests whose outcome is an error.
    Errors,
    /// How many ended so.
    Count(Outcome),
    /// Share that ended so, where the limit has a `%`.
    Share(Outcome),
    /// Answers that were right, a second.
    Rate,
    /// Nanoseconds from an event's end, or its begin where it has none, to the begin of the first second that is good again.
    Recovery,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Equal,
}
