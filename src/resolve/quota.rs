//! Quota: what this process may still answer of one limited link's visits, leased from the store and spent from memory.
//!
//! In: visitors, what the store grants, and the time. Out: whether there is a visit for a visitor; what to ask the store.
//! Never: spends what was not granted; spends of a lease after its term (by this process's clock, from before it was asked
//! for, so that one that was frozen spends nothing); spends of a lease of several after a change of the link.
//! At its limit: a lease is of at most [`LEASE_MAX`] visits, and of one while it is not known of another whether it was
//! granted. Of those [`OWED_MAX`] are remembered: with so many none is asked for, and nothing is forgotten.
//!
//! A link that is visited now and then takes its visits one by one. A lease that was used up before its term is followed
//! by one of twice its size; one that was not, by one of what was spent of it.

use std::time::{Duration, Instant};

use super::invalidate::AsOf;
use crate::store::row::{Settled, Taken};

/// How long a lease is spent. Who asks in vain meanwhile, on another instance, is told to come again after as long.
pub const TERM: Duration = Duration::from_secs(1);
/// The most visits of a lease.
pub const LEASE_MAX: u32 = 256;
/// As in the store's `TAKE_VISITS`: after so long a holder that did not settle counts as dead, and a question that was
/// not answered does not come there any more.
const EXPIRY: Duration = Duration::from_secs(10);
/// How long visits that cannot be given back are kept for the next visitors, when nobody waits for them any more.
const KEPT: Duration = Duration::from_secs(60);
/// How long nobody asks again, when others hold what is left or the store did not answer.
const BACK_OFF: Duration = Duration::from_millis(100);
const OWED_MAX: usize = 16;
/// All of a lease of which nobody knows whether it was granted.
const ALL: u32 = u32::MAX;

#[derive(Debug)]
pub struct Quota {
    lease: Option<Lease>,
    /// Of how many visits the last lease was, or what was spent of it.
    size: u32,
    /// The last lease was spent, and its term goes on until then: the next one is of twice as many.
    busy_until: Instant,
    /// Leases that are over, and when the store is told of them.
    owed: Vec<Owed>,
    owed_at: Instant,
    refused_until: Instant,
    /// Visits that could not be given back, and that nobody came for. Who counts them sets it to 0.
    pub unclaimed: u64,
}

#[derive(Debug)]
struct Lease {
    number: u64,
    granted: u32,
    left: u32,
    /// What is left is given back. If not, it is lost unless somebody spends it.
    leased: bool,
    until: Instant,
    as_of: AsOf,
}

#[derive(Debug)]
struct Owed {
    settled: Settled,
    /// Nobody knows whether it was granted, and until then it may still be: to settle it before proves nothing.
    unknown_until: Option<Instant>,
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
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    pub wanted: u32,
    /// Whether something may be granted that is not heard of: not if nobody was asked, nor by the embedded store.
    pub may_be_granted: bool,
    /// Of the lease that is wanted.
    pub number: u64,
    /// Both of before it was sent.
    pub at: Instant,
    pub as_of: AsOf,
}

impl Lease {
    /// A single visit is for whoever waits, whatever changed meanwhile: else a link that is edited all the time would
    /// have none. So is what cannot be given back: the change may be the very one that this visit was the last.
    fn is_good(&self, now: Instant, believes: impl Fn(AsOf) -> bool) -> bool {
        now < self.until && (!self.leased || self.granted == 1 || believes(self.as_of))
    }
}

impl Quota {
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { lease: None, size: 1, busy_until: now, owed: Vec::new(), owed_at: now, refused_until: now, unclaimed: 0 }
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

    /// Whether the store was asked in vain a moment ago: who has no visit now need not wait for one.
    #[must_use]
    pub fn is_refused(&self, now: Instant) -> bool {
        now < self.refused_until
    }

    /// What is to be done when whoever could be answered was. `waited_for`: whether somebody waits; `ending`: whether
    /// this process ends, and asks for none.
    pub fn next(&mut self, now: Instant, waited_for: bool, ending: bool, believes: impl Fn(AsOf) -> bool) -> Next {
        let mut wants = waited_for && !ending;
        if let Some(lease) = &self.lease
            && (wants || ending || lease.left == 0 || !lease.is_good(now, believes))
        {
            // Under steady traffic what settles a lease asks for the next one, too: one commit a second, not two.
            wants |= !ending && lease.leased && now >= lease.until && (1..lease.granted).contains(&lease.left);
            self.end(now);
        }
        if ending {
            self.settle_the_unknown_once_more(now);
        }
        let wanted = match self.owed.len() {
            _ if !wants => 0,
            OWED_MAX.. => 0,
            _ if self.owed.iter().any(|owed| owed.unknown_until.is_some()) => 1,
            _ if now < self.busy_until => self.size.saturating_mul(2).min(LEASE_MAX),
            _ => self.size,
        };
        if wanted > 0 || !self.owed.is_empty() && now >= self.owed_at {
            return Next::Ask { wanted, settled: self.owed.iter().map(|owed| owed.settled).collect() };
        }
        match &self.lease {
            Some(lease) => Next::Wait(lease.until),
            None if !self.owed.is_empty() => Next::Wait(self.owed_at),
            None if self.is_refused(now) && !ending => Next::Wait(self.refused_until),
            None if now < self.busy_until && !ending => Next::Wait(self.busy_until),
            None => Next::Rest,
        }
    }

    /// What the store said to a question, or that it is not known what it did.
    pub fn answered(&mut self, asked: Asked, taken: Option<Taken>, now: Instant) {
        let Some(taken) = taken else {
            if asked.may_be_granted && asked.wanted > 0 {
                let settled = Settled { lease: asked.number, rest: ALL };
                self.owed.push(Owed { settled, unknown_until: Some(asked.at + EXPIRY) });
            }
            self.owed_at = now + TERM;
            self.refused_until = now + BACK_OFF;
            return;
        };
        self.owed.retain(|owed| owed.unknown_until.is_some_and(|until| asked.at < until));
        if let Some(until) = self.owed.iter().filter_map(|owed| owed.unknown_until).min() {
            self.owed_at = until;
        }
        match taken {
            Taken::Visits { count, leased } => {
                let until = if leased { asked.at + TERM } else { now + KEPT };
                let (number, as_of) = (asked.number, asked.as_of);
                self.lease = Some(Lease { number, granted: count, left: count, leased, until, as_of });
            }
            Taken::Held => self.refused_until = now + BACK_OFF,
            Taken::UsedUp => {}
        }
    }

    fn end(&mut self, now: Instant) {
        let Some(lease) = self.lease.take() else { return };
        (self.size, self.busy_until) = match lease.left {
            0 if lease.leased => (lease.granted, lease.until),
            left => ((lease.granted - left).max(1), now),
        };
        if lease.leased {
            let settled = Settled { lease: lease.number, rest: lease.left };
            self.owed.push(Owed { settled, unknown_until: None });
            self.owed_at = now;
        } else {
            self.unclaimed += u64::from(lease.left);
        }
    }

    /// There is no time to wait until a question that was not answered cannot come there any more.
    fn settle_the_unknown_once_more(&mut self, now: Instant) {
        for until in self.owed.iter_mut().filter_map(|owed| owed.unknown_until.as_mut()).filter(|until| **until > now) {
            *until = now;
            self.owed_at = now;
        }
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
        fn take(&mut self, asked: Asked, settled: &[Settled], now: Instant) -> Taken {
            let mut settles = false;
            for settled in settled {
                if let Some((granted, _)) = self.leases.remove(&settled.lease) {
                    self.used -= settled.rest.min(granted);
                    settles = true;
                }
            }
            let left = self.max - self.used;
            let count = asked.wanted.min((left / 16).max(1)).min(left);
            self.used += count;
            if count > 0 {
                self.leases.insert(asked.number, (count, now.checked_add(EXPIRY)));
            }
            let live = self.leases.values().any(|(_, expires)| expires.is_some_and(|at| at > now));
            let dead = !self.leases.is_empty();
            if count == 0 && self.used == self.max && !live && (settles || dead) {
                self.lost += self.leases.drain().map(|(_, (granted, _))| granted).sum::<u32>();
                self.recorded += 1;
            }
            match count {
                0 if live => Taken::Held,
                0 => Taken::UsedUp,
                count => Taken::Visits { count, leased: true },
            }
        }
    }

    struct Instance {
        quota: Quota,
        waiting: u32,
        asked: Option<(Asked, Vec<Settled>, Option<Option<Taken>>)>,
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

    /// What happens, at a millisecond, and what is then to be done: visits wanted, settled leases, or a wait until then.
    enum Event {
        /// Somebody waits, or nobody.
        Next(bool, Want),
        /// The last question is answered.
        Heard(Option<Taken>),
        /// Whether there is a visit.
        Take(bool),
        Refused(bool),
        Ending(Want),
        /// So many were lost.
        Unclaimed(u64),
    }

    #[derive(Debug, PartialEq, Eq)]
    enum Want {
        /// By the number of the question in which they were asked for, with their rests.
        Ask(u32, Vec<(u64, u32)>),
        Wait(u64),
        Rest,
    }

    fn check(events: Vec<(u64, Event)>) {
        let start = time::monotonic();
        let moment = as_of();
        let mut quota = Quota::new(start);
        let mut asked = None;
        let mut number = 0;
        for (step, (ms, event)) in events.into_iter().enumerate() {
            let now = start + Duration::from_millis(ms);
            let mut next = |quota: &mut Quota, waited_for, ending| match quota.next(now, waited_for, ending, |_| true) {
                Next::Ask { wanted, settled } => {
                    number += 1;
                    let owed = settled.iter().map(|settled| (settled.lease, settled.rest)).collect();
                    asked = Some(Asked { wanted, may_be_granted: true, number, at: now, as_of: moment });
                    Want::Ask(wanted, owed)
                }
                Next::Wait(until) => Want::Wait(until.duration_since(start).as_millis().try_into().unwrap()),
                Next::Rest => Want::Rest,
            };
            match event {
                Event::Next(waited_for, want) => assert_eq!(next(&mut quota, waited_for, false), want, "step {step}"),
                Event::Ending(want) => assert_eq!(next(&mut quota, true, true), want, "step {step}"),
                Event::Heard(taken) => quota.answered(asked.unwrap(), taken, now),
                Event::Take(want) => assert_eq!(quota.take(now, |_| true), want, "step {step}"),
                Event::Unclaimed(want) => assert_eq!(quota.unclaimed, want, "step {step}"),
                Event::Refused(want) => assert_eq!(quota.is_refused(now), want, "step {step}"),
            }
        }
    }

    #[test]
    fn what_is_asked_of_the_store() {
        use Event::{Ending, Heard, Next, Refused, Take, Unclaimed};
        use Want::{Ask, Rest, Wait};
        let visits = |count, leased| Heard(Some(Taken::Visits { count, leased }));
        let used_up = || Heard(Some(Taken::UsedUp));
        // A single visit is settled when it is spent; who visits soon after gets two.
        check(vec![
            (0, Next(true, Ask(1, vec![]))),
            (1, visits(1, true)),
            (1, Take(true)),
            (1, Next(false, Ask(0, vec![(1, 0)]))),
            (2, used_up()),
            (2, Next(false, Wait(1000))),
            (9, Next(true, Ask(2, vec![]))),
            (10, visits(2, true)),
            (10, Take(true)),
            (10, Next(false, Wait(1009))),
            // Of steady traffic the next lease is asked for by what settles the last one; of one visit, as here.
            (1009, Next(false, Ask(1, vec![(3, 1)]))),
            (1010, visits(1, true)),
            (1011, Next(false, Wait(2009))),
            (2009, Next(false, Ask(0, vec![(4, 1)]))),
            (2010, used_up()),
            (2010, Next(false, Rest)),
        ]);
        // One that nobody spends is given back; an answer that is late is spent no more.
        check(vec![
            (0, Next(true, Ask(1, vec![]))),
            (1001, visits(1, true)),
            (1001, Take(false)),
            (1001, Next(true, Ask(1, vec![(1, 1)]))),
            (1001, Unclaimed(0)),
        ]);
        // What cannot be given back is there for the next visitor, however late it came.
        check(vec![
            (0, Next(true, Ask(1, vec![]))),
            (5_000, visits(2, false)),
            (5_000, Take(true)),
            (5_000, Next(false, Wait(65_000))),
            (64_000, Take(true)),
            (64_000, Next(false, Rest)),
            (64_000, Unclaimed(0)),
        ]);
        // But not for ever, nor longer than this process.
        check(vec![
            (0, Next(true, Ask(1, vec![]))),
            (5_000, visits(3, false)),
            (5_000, Take(true)),
            (65_000, Take(false)),
            (65_000, Next(false, Rest)),
            (65_000, Unclaimed(2)),
            (70_000, Next(true, Ask(1, vec![]))),
            (70_001, visits(1, false)),
            (70_001, Ending(Rest)),
            (70_001, Unclaimed(3)),
        ]);
        // One that is not heard of is settled until it cannot come there any more, and there is no second one of several.
        check(vec![
            (0, Next(true, Ask(1, vec![]))),
            (1, visits(1, true)),
            (1, Take(true)),
            (2, Next(true, Ask(2, vec![(1, 0)]))),
            (300, Heard(None)),
            (300, Refused(true)),
            (300, Next(false, Wait(1300))),
            (400, Refused(false)),
            (500, Next(true, Ask(1, vec![(1, 0), (2, ALL)]))),
            (501, visits(1, true)),
            (501, Take(true)),
            (502, Next(true, Ask(1, vec![(2, ALL), (3, 0)]))),
            (503, used_up()),
            (503, Next(false, Wait(10_002))),
            (10_002, Next(false, Ask(0, vec![(2, ALL)]))),
            (10_003, used_up()),
            (10_003, Next(false, Rest)),
        ]);
        // Others hold the last: it is not asked for by every visitor.
        check(vec![
            (0, Next(true, Ask(1, vec![]))),
            (1, Heard(Some(Taken::Held))),
            (100, Refused(true)),
            (100, Next(false, Wait(101))),
            (101, Refused(false)),
            (101, Next(false, Rest)),
        ]);
        // At the end none is asked for, and what is unknown is settled once more.
        check(vec![
            (0, Next(true, Ask(1, vec![]))),
            (1, Heard(None)),
            (2, Ending(Ask(0, vec![(1, ALL)]))),
            (3, used_up()),
            (3, Ending(Rest)),
        ]);
        // With as many unknown ones as are remembered none is asked for.
        let mut events = vec![];
        for n in 0..16 {
            let unknown = (1..=n).map(|number| (number, ALL)).collect();
            events.extend([(n * 200, Next(true, Ask(1, unknown))), (n * 200 + 1, Heard(None))]);
        }
        events.push((3_300, Next(true, Wait(4_001))));
        events.push((4_001, Next(true, Ask(0, (1..=16).map(|number| (number, ALL)).collect()))));
        check(events);
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
            let (mut answered, mut number) = (0, 0);
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
                    Step::Visit if instance.quota.is_refused(now) => {}
                    Step::Visit => instance.waiting += 1,
                    Step::Ask if instance.asked.is_none() => {
                        let wanted = instance.waiting > 0;
                        if let Next::Ask { wanted, settled } = instance.quota.next(now, wanted, false, believes(&edited)) {
                            prop_assert!(wanted <= LEASE_MAX && settled.len() <= OWED_MAX);
                            number += 1;
                            let asked = Asked { wanted, may_be_granted: true, number, at: now, as_of: moment };
                            instance.asked = Some((asked, settled, None));
                            edited[which] = false;
                        }
                    }
                    Step::Arrive | Step::Lose => {
                        if let Some((asked, settled, outcome @ None)) = &mut instance.asked {
                            let taken = store.take(*asked, settled, now);
                            *outcome = Some((!matches!(step, Step::Lose)).then_some(taken));
                        }
                    }
                    Step::Miss => {
                        if let Some((_, _, outcome @ None)) = &mut instance.asked {
                            *outcome = Some(None);
                        }
                    }
                    Step::Answer => {
                        if let Some((asked, _, Some(taken))) = instance.asked.take_if(|(.., outcome)| outcome.is_some()) {
                            instance.quota.answered(asked, taken, now);
                            while instance.waiting > 0 && instance.quota.take(now, believes(&edited)) {
                                instance.waiting -= 1;
                                answered += 1;
                            }
                            if asked.wanted > 0 && !matches!(taken, Some(Taken::Visits { .. })) {
                                instance.waiting = 0;
                            }
                        }
                    }
                    Step::Die => *instance = Instance::new(now),
                    Step::Edit => edited[which] = true,
                    Step::Ask => {}
                }
                prop_assert!(answered <= max && store.used <= max);
            }
            prop_assert_eq!(store.used, max);
            prop_assert_eq!(store.recorded, 1, "used up is recorded once");
            prop_assert!(answered + store.lost >= max, "{} of {}, {} with the dead", answered, max, store.lost);
        }
    }
}
