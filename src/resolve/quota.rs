//! Quota: what this process may still answer of one limited link's visits, leased from the store and spent from memory.
//!
//! In: visitors, what the store grants, and the time. Out: whether there is a visit for a visitor; what to ask the store.
//! Never: spends what was not granted; spends of a lease after its term (by this process's clock, from before it was asked
//! for, so that one that was frozen spends nothing) or after a change of the link.
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
    /// What is left is given back. If not, it is lost unless somebody who waits spends it, however late it came and
    /// whatever changed meanwhile: that may be the very change that this visit was the last.
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
        now < self.until && believes(self.as_of)
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
            Some(lease) if lease.left > 0 && (!lease.leased || lease.is_good(now, believes)) => {
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::domain::time;
    use crate::resolve::invalidate::Feed;
    use crate::resolve::value::StoredAsOf;

    /// After so long nobody waits for a holder any more.
    const EXPIRY: Duration = Duration::from_secs(10);

    fn as_of() -> AsOf {
        Feed::new(StoredAsOf { generation: 0, position: 0 }).now()
    }

    /// The quota's row and those of its leases, as Postgres keeps them: see `TAKE_VISITS` there.
    #[derive(Default)]
    struct Store {
        max: u32,
        used: u32,
        leases: HashMap<u64, (u32, Option<Instant>)>,
        /// How often it became used up.
        recorded: u32,
        /// What those held who did not come back before that: leases as they were granted.
        lost: u32,
    }

    impl Store {
        fn take(&mut self, asked: &Asked, now: Instant) -> Taken {
            let mut settles = false;
            for settled in &asked.settled {
                if let Some((granted, _)) = self.leases.remove(&settled.lease) {
                    self.used -= settled.rest.min(granted);
                    settles = true;
                }
            }
            let left = self.max - self.used;
            let count = asked.wanted.min((left / 16).max(1)).min(left);
            self.used += count;
            if count > 1 {
                self.leases.insert(asked.number, (count, now.checked_add(EXPIRY)));
            }
            let live = self.leases.values().any(|(_, expires)| expires.is_some_and(|at| at > now));
            let dead = !self.leases.is_empty();
            if self.used == self.max && !live && (count > 0 || settles || dead) {
                self.lost += self.leases.drain().map(|(_, (granted, _))| granted).sum::<u32>();
                self.recorded += 1;
            }
            match count {
                0 if live => Taken::Held,
                0 => Taken::UsedUp,
                count => Taken::Visits { count, leased: count > 1 },
            }
        }
    }

    struct Instance {
        quota: Quota,
        waiting: u32,
        asked: Option<(Asked, Option<Option<Taken>>)>,
    }

    impl Instance {
        fn new(now: Instant) -> Self {
            Self { quota: Quota::new(now), waiting: 0, asked: None }
        }
    }

    /// One step of an instance; each may stop between any two.
    #[derive(Clone, Debug)]
    enum Step {
        Visit,
        /// It asks, if there is anything to ask.
        Ask,
        /// The store does what it was asked.
        Arrive,
        /// It does, and the answer is lost.
        Lose,
        /// The question never comes there.
        Miss,
        /// The answer comes, and whoever waits is served.
        Answer,
        /// It dies, and another one starts in its place.
        Die,
        /// Its link is edited.
        Edit,
    }

    fn steps() -> impl Strategy<Value = Vec<(usize, Step, u64)>> {
        let step = prop_oneof![
            30 => Just(Step::Visit),
            30 => Just(Step::Ask),
            30 => Just(Step::Arrive),
            30 => Just(Step::Answer),
            1 => Just(Step::Lose),
            1 => Just(Step::Miss),
            1 => Just(Step::Die),
            1 => Just(Step::Edit),
        ];
        // A long pause is an instance that freezes, a network that is cut, or a night.
        let pause_ms = prop_oneof![60 => 0..30_u64, 3 => 30..1_200_u64, 1 => 1_200..15_000_u64];
        prop::collection::vec((0..3_usize, step, pause_ms), 1..600)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

        #[test]
        fn never_a_visit_more_and_all_of_them_while_nobody_dies(
            max in 1..3_000_u32,
            steps in steps(),
            frozen in prop::option::weighted(0.2, 0..3_usize),
        ) {
            let mut now = time::monotonic();
            let moment = as_of();
            let mut store = Store { max, ..Store::default() };
            let mut instances: Vec<Instance> = (0..3).map(|_| Instance::new(now)).collect();
            let (mut answered, mut forgiven, mut number) = (0, 0, 0);
            let mut edited = [false; 3];
            // In the end everybody visits until it is used up, by and by, and nobody dies any more.
            let end = (0..40_000).map(|n| {
                let step = [Step::Visit, Step::Ask, Step::Arrive, Step::Answer][n / 3 % 4].clone();
                (n % 3, step, (n % 5) as u64)
            });
            // One of them may be frozen when the end begins, and thaws before it is over.
            let (calm, mut thaws_at) = (steps.len(), now);
            for (n, (which, step, pause_ms)) in steps.into_iter().chain(end).enumerate() {
                now += Duration::from_millis(pause_ms);
                if n == calm {
                    thaws_at = now + Duration::from_secs(60);
                }
                if n >= calm && frozen == Some(which) && now < thaws_at {
                    continue;
                }
                let instance = &mut instances[which];
                let believes = |believed: &[bool; 3]| { let good = !believed[which]; move |_| good };
                match step {
                    Step::Visit if instance.waiting == 0 && instance.quota.take(now, believes(&edited)) => answered += 1,
                    Step::Visit => instance.waiting += 1,
                    Step::Ask if instance.asked.is_none() => {
                        let wanted = instance.waiting > 0;
                        if let Next::Ask { wanted, settled } = instance.quota.next(now, wanted, false, believes(&edited)) {
                            prop_assert!(wanted <= LEASE_MAX && settled.len() <= OWED_MAX);
                            number += 1;
                            let asked = Asked { wanted, settled, sent: true, number, at: now, as_of: moment };
                            instance.asked = Some((asked, None));
                            edited[which] = false;
                        }
                    }
                    Step::Arrive | Step::Lose => {
                        if let Some((asked, outcome @ None)) = &mut instance.asked {
                            let taken = store.take(asked, now);
                            // Of what was lost on its way a single visit is never given back.
                            let is_lost = matches!(step, Step::Lose);
                            forgiven += u32::from(is_lost && matches!(taken, Taken::Visits { leased: false, .. }));
                            *outcome = Some((!is_lost).then_some(taken));
                        }
                    }
                    Step::Miss => {
                        if let Some((_, outcome @ None)) = &mut instance.asked {
                            *outcome = Some(None);
                        }
                    }
                    Step::Answer => {
                        if let Some((asked, Some(taken))) = &instance.asked {
                            instance.quota.answered(asked, *taken, now);
                            while instance.waiting > 0 && instance.quota.take(now, believes(&edited)) {
                                instance.waiting -= 1;
                                answered += 1;
                            }
                            if asked.wanted > 0 && !matches!(taken, Some(Taken::Visits { .. })) {
                                instance.waiting = 0;
                            }
                            instance.asked = None;
                        }
                    }
                    Step::Die => {
                        forgiven += u32::from(matches!(
                            instance.asked,
                            Some((_, Some(Some(Taken::Visits { leased: false, .. }))))
                        ));
                        *instance = Instance::new(now);
                    }
                    Step::Edit => edited[which] = true,
                    Step::Ask => {}
                }
                prop_assert!(answered <= max && store.used <= max);
            }
            prop_assert_eq!(store.used, max);
            prop_assert_eq!(store.recorded, 1, "used up is recorded once");
            let lost = store.lost + forgiven;
            prop_assert!(answered + lost >= max, "{} of {}, {} with the dead", answered, max, lost);
        }
    }
}
