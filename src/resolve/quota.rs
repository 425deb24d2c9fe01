//! Quota: what this process may still answer of one limited link's visits, leased from the store and spent from memory.
//!
//! In: visitors, what the store grants, and the time. Out: whether there is a visit for a visitor; what to ask the store.
//! Never: spends what was not granted, or after its term (by this process's clock, from before it was asked for, so that
//! one that was frozen spends nothing), or after a change of the link; asks a second time before it was answered.
//! At its limit: a lease is of at most [`LEASE_MAX`] visits. Of leases whose end the store was not told of,
//! [`OWED_MAX`] are remembered; what the older ones left stays counted as used.
//!
//! A link that is visited now and then takes its visits one by one, and leases nothing. A lease that was used up before
//! its term is followed by one of twice its size; one that was not, by one of what was spent of it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::invalidate::AsOf;
use crate::store::row::{Settled, Taken};

/// How long a lease is spent. Who asks in vain meanwhile, on another instance, is told to come again after as long.
pub const TERM: Duration = Duration::from_secs(1);
/// The most visits that are lost with a process.
pub const LEASE_MAX: u32 = 256;
const OWED_MAX: usize = 16;
/// All of a lease of which nobody knows whether it was granted.
const ALL: u32 = u32::MAX;

#[derive(Debug)]
pub struct Quota {
    lease: Option<Lease>,
    /// Of how many visits the next lease is.
    size: u32,
    /// Leases that are over, oldest first, and when the store is told of them.
    owed: VecDeque<Settled>,
    owed_at: Instant,
}

#[derive(Debug)]
struct Lease {
    number: u64,
    granted: u32,
    left: u32,
    /// What is left is given back. If not, it is spent at once by who waited for it, whatever changed meanwhile: that
    /// may be the very change that this visit was the last.
    leased: bool,
    until: Instant,
    as_of: AsOf,
}

/// What is to be done now.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// To ask the store for so many visits and to settle with it; none: only to settle.
    Ask { wanted: u32, settled: Vec<Settled> },
    /// Nothing, until then.
    Wait(Instant),
    /// Nothing at all: to forget this is to forget nothing.
    Rest,
}

/// A question to the store.
#[derive(Clone, Debug)]
pub struct Asked {
    pub wanted: u32,
    pub settled: Vec<Settled>,
    /// False: nobody was asked, since the store was known not to answer.
    pub sent: bool,
    /// Of the lease that is wanted.
    pub number: u64,
    /// Both of before it was sent.
    pub at: Instant,
    pub as_of: AsOf,
}

impl Lease {
    fn is_good(&self, now: Instant, believes: impl Fn(AsOf) -> bool) -> bool {
        now < self.until && (!self.leased || believes(self.as_of))
    }
}

impl Quota {
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { lease: None, size: 1, owed: VecDeque::new(), owed_at: now }
    }

    /// Spends a visit, if there is one. `believes`: whether the link has not changed since a moment of the feed.
    pub fn take(&mut self, now: Instant, believes: impl Fn(AsOf) -> bool) -> bool {
        match &mut self.lease {
            Some(lease) if lease.left > 0 && lease.is_good(now, believes) => {
                lease.left -= 1;
                true
            }
            _ => false,
        }
    }

    /// What is to be done when whoever could be answered was. `wanted`: whether somebody waits; `ending`: whether this
    /// process ends.
    pub fn next(&mut self, now: Instant, wanted: bool, ending: bool, believes: impl Fn(AsOf) -> bool) -> Next {
        if let Some(lease) = &self.lease
            && (wanted || ending || !lease.is_good(now, believes))
        {
            self.end(now);
        }
        if wanted || !self.owed.is_empty() && now >= self.owed_at {
            let wanted = if wanted { self.size } else { 0 };
            return Next::Ask { wanted, settled: self.owed.iter().copied().collect() };
        }
        match &self.lease {
            Some(lease) => Next::Wait(lease.until),
            None if self.owed.is_empty() => Next::Rest,
            None => Next::Wait(self.owed_at),
        }
    }

    /// What the store said to a question, or that it is not known what it did.
    pub fn answered(&mut self, asked: &Asked, taken: Option<Taken>, now: Instant) {
        match taken {
            Some(taken) => {
                self.owed.retain(|owed| !asked.settled.contains(owed));
                if let Taken::Visits { count, leased } = taken {
                    let (number, until, as_of) = (asked.number, asked.at + TERM, asked.as_of);
                    self.lease = Some(Lease { number, granted: count, left: count, leased, until, as_of });
                }
            }
            None => {
                // Of a single visit there is nothing that could be given back.
                if asked.sent && asked.wanted > 1 {
                    self.owe(Settled { lease: asked.number, rest: ALL });
                }
                self.owed_at = now + TERM;
            }
        }
    }

    fn end(&mut self, now: Instant) {
        let Some(lease) = self.lease.take() else { return };
        self.size = match lease.left {
            0 if now < lease.until => lease.granted.saturating_mul(2).min(LEASE_MAX),
            left => (lease.granted - left).max(1),
        };
        if lease.leased {
            self.owe(Settled { lease: lease.number, rest: lease.left });
            self.owed_at = now;
        }
    }

    fn owe(&mut self, settled: Settled) {
        if self.owed.len() == OWED_MAX {
            self.owed.pop_front();
        }
        self.owed.push_back(settled);
    }
}
