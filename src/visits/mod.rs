//! Visits: every redirect that leaves is one.
//!
//! In: a [`Visit`], before its redirect leaves. Out: this core's counts of them.
//! Never: makes a redirect wait; allocates.

use crate::domain::visit::{Kind, Visit};
use crate::metrics::Counter;

/// What this core has answered.
#[derive(Debug, Default)]
pub struct Counts {
    pub click: Counter,
    pub head: Counter,
    pub prefetch: Counter,
    /// Unknown and dead codes, and fallbacks: answered, but no visit of a link.
    pub orphan: Counter,
}

impl Counts {
    /// Redirects to a target that left.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.click.get() + self.head.get() + self.prefetch.get()
    }
}

/// A core's way to record: what `http` knows of visits.
#[derive(Clone, Copy, Debug)]
pub struct Recorder<'a>(pub &'a Counts);

impl Recorder<'_> {
    pub fn record(&self, visit: &Visit) {
        match visit.kind {
            Kind::Click => self.0.click.add(1),
            Kind::Head => self.0.head.add(1),
            Kind::Prefetch => self.0.prefetch.add(1),
        }
    }

    pub fn orphan(&self) {
        self.0.orphan.add(1);
    }
}
