//! The sequence of arrivals.

use super::Arrival;
use crate::scenario::Scenario;

/// Worker `worker` of `workers`'s share of the plan, in order of time.
#[derive(Debug)]
pub struct Arrivals<'a> {
    scenario: &'a Scenario,
}

impl<'a> Arrivals<'a> {
    #[must_use]
    pub fn new(scenario: &'a Scenario, worker: usize, workers: usize) -> Self {
        let _ = (worker, workers);
        Self { scenario }
    }
}

impl Iterator for Arrivals<'_> {
    type Item = Arrival;

    fn next(&mut self) -> Option<Arrival> {
        let _ = self.scenario;
        todo!()
    }
}

/// How many arrivals each class has in each phase: `counts[phase][traffic]`. Walks the whole plan.
#[must_use]
pub fn counts(scenario: &Scenario) -> Vec<Vec<u64>> {
    let _ = scenario;
    todo!()
}
