//! Rollups: what a batch adds to a link on a day, and in total.
//!
//! In: the rows of a batch. Out: one [`Rollup`] for each link and day, by link and day. Pure.
//! Never: looks at a text twice: agents and referrers are looked up once for each distinct one of the batch.

use std::collections::HashMap;

use super::sketch::{Dimension, Sketch, Value};
use crate::domain::link::LinkId;
use crate::domain::time::UnixMillis;
use crate::domain::visit::Class;
use crate::visits::agents::Agent;
use crate::visits::batch::{Referrer, Row};

/// Days since 1970, UTC.
pub type Day = i32;

pub const DAY_MS: i64 = 86_400_000;
const QUARTER_MS: i64 = 900_000;

/// What is added to a link on a day.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollup {
    pub link: LinkId,
    pub day: Day,
    /// By [`Class`], orphans left out.
    pub counts: [u64; Class::OF_LINKS],
    /// The first and the last click or tool; none without one.
    pub first_at: Option<UnixMillis>,
    pub last_at: Option<UnixMillis>,
    pub sketch: Sketch,
}

/// What is added to a link in total.
#[derive(Clone, Debug)]
pub struct Total<'a> {
    pub link: LinkId,
    pub counts: [u64; Class::OF_LINKS],
    pub first_at: Option<UnixMillis>,
    pub last_at: Option<UnixMillis>,
    days: &'a [Rollup],
}

impl Total<'_> {
    /// Appends the sketches of its days without their buckets, one behind the other, which are read as their sum: nearly
    /// always it is one day, and nothing has to be merged.
    pub fn encode_sketch(&self, out: &mut Vec<u8>) {
        self.days.iter().for_each(|day| day.sketch.encode_without_quarters(out));
    }
}

/// The day of a moment.
#[must_use]
pub fn day(at: UnixMillis) -> Day {
    i32::try_from(at.0.div_euclid(DAY_MS)).unwrap_or(0)
}

/// What `rows` add, by link and day. `agent` and `referrer` know the ids that the rows have; what they do not know counts
/// for no value. Only clicks and tools are in the sketches; rows of orphans count for nothing.
#[must_use]
pub fn roll_up<'a>(
    rows: &[Row],
    agent: impl Fn(i64) -> Option<&'a Agent>,
    referrer: impl Fn(i64) -> Option<&'a Referrer>,
) -> Vec<Rollup> {
    let mut values = Values::default();
    let mut order: Vec<u128> = Vec::with_capacity(rows.len());
    let mut seen: Vec<Seen> = Vec::with_capacity(rows.len());
    for (at, row) in rows.iter().enumerate() {
        order.push(place(row, at));
        seen.push(Seen {
            at: row.at,
            visitor: row.visitor,
            agent: values.of_agent(row.agent, &agent),
            referrer: values.of_referrer(row.referrer, &referrer),
            class: row.class,
        });
    }
    order.sort_unstable();
    let days = order.chunk_by(|a, b| a >> 32 == b >> 32);
    days.map(|places| {
        let (link, day) = link_and_day(places[0]);
        let mut rollup = Rollup {
            link,
            day,
            counts: [0; Class::OF_LINKS],
            first_at: None,
            last_at: None,
            sketch: Sketch::default(),
        };
        places.iter().for_each(|place| rollup.add(&seen[*place as u32 as usize], &mut values));
        values.drain_into(&mut rollup.sketch);
        rollup
    })
    .collect()
}

/// What they are in total, by link.
pub fn totals(days: &[Rollup]) -> impl Iterator<Item = Total<'_>> {
    days.chunk_by(|a, b| a.link == b.link).map(total)
}

/// By link, then day, then as they came: one number sorts faster than a tuple.
fn place(row: &Row, at: usize) -> u128 {
    // Days before 1970 come first.
    let day = day(row.at) as u32 ^ 1 << 31;
    u128::from(row.link.0) << 64 | u128::from(day) << 32 | at as u128
}

fn link_and_day(place: u128) -> (LinkId, Day) {
    (LinkId((place >> 64) as u64), ((place >> 32) as u32 ^ 1 << 31) as Day)
}

/// What is needed of a row: rows are so large that reading them in another order would miss every cache.
struct Seen {
    at: UnixMillis,
    visitor: u64,
    /// Where the values of the agent are.
    agent: u32,
    /// The number of the referrer's host.
    referrer: Option<u32>,
    class: Class,
}

impl Rollup {
    fn add(&mut self, seen: &Seen, values: &mut Values) {
        let Some(count) = self.counts.get_mut(seen.class as usize) else { return };
        *count += 1;
        if !matches!(seen.class, Class::Click | Class::Tool) {
            return;
        }
        self.first_at = Some(self.first_at.map_or(seen.at, |at| at.min(seen.at)));
        self.last_at = self.last_at.max(Some(seen.at));
        self.sketch.count_quarter((seen.at.0.rem_euclid(DAY_MS) / QUARTER_MS) as u8, 1);
        self.sketch.see_visitor(seen.visitor);
        values.count(seen);
    }
}

fn total(days: &[Rollup]) -> Total<'_> {
    let mut counts = [0; Class::OF_LINKS];
    for day in days {
        counts.iter_mut().zip(day.counts).for_each(|(sum, count)| *sum += count);
    }
    Total {
        link: days[0].link,
        counts,
        first_at: days.iter().filter_map(|day| day.first_at).min(),
        last_at: days.iter().filter_map(|day| day.last_at).max(),
        days,
    }
}

/// The values of a batch, numbered, with how often the day that is under way has each.
#[derive(Default)]
struct Values {
    /// Where the values of an agent are, by its id; the number of a referrer's host.
    agents: HashMap<i64, u32, ahash::RandomState>,
    referrers: HashMap<i64, Option<u32>, ahash::RandomState>,
    /// Browser, system and device.
    of_agents: Vec<[Option<u32>; 3]>,
    numbers: HashMap<(Dimension, Value), u32, ahash::RandomState>,
    /// By number.
    all: Vec<(Dimension, Value)>,
    counts: Vec<u64>,
    /// Numbers with a count.
    met: Vec<u32>,
}

impl Values {
    fn of_agent<'a>(&mut self, id: i64, agent: impl Fn(i64) -> Option<&'a Agent>) -> u32 {
        if let Some(at) = self.agents.get(&id) {
            return *at;
        }
        let numbers = agent(id).map_or([None; 3], |agent| {
            [
                self.number(Dimension::Browser, &agent.browser),
                self.number(Dimension::System, &agent.os),
                self.number(Dimension::Device, agent.device),
            ]
        });
        let at = self.of_agents.len() as u32;
        self.of_agents.push(numbers);
        self.agents.insert(id, at);
        at
    }

    fn of_referrer<'a>(&mut self, id: i64, referrer: impl Fn(i64) -> Option<&'a Referrer>) -> Option<u32> {
        if let Some(number) = self.referrers.get(&id) {
            return *number;
        }
        let number = referrer(id).and_then(|referrer| self.number(Dimension::Referrer, &referrer.host));
        self.referrers.insert(id, number);
        number
    }

    fn count(&mut self, seen: &Seen) {
        let of_agent = self.of_agents[seen.agent as usize];
        for number in of_agent.into_iter().chain([seen.referrer]).flatten() {
            let count = &mut self.counts[number as usize];
            if *count == 0 {
                self.met.push(number);
            }
            *count += 1;
        }
    }

    fn number(&mut self, dimension: Dimension, text: &str) -> Option<u32> {
        let value = Value::new(dimension, text)?;
        Some(*self.numbers.entry((dimension, value)).or_insert_with_key(|(dimension, value)| {
            self.all.push((*dimension, value.clone()));
            self.counts.push(0);
            (self.all.len() - 1) as u32
        }))
    }

    /// Ends a day.
    fn drain_into(&mut self, sketch: &mut Sketch) {
        sketch.count_values(self.met.drain(..).map(|number| {
            let (dimension, value) = &self.all[number as usize];
            (*dimension, value, std::mem::take(&mut self.counts[number as usize]))
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::{DAY_MS, Rollup, Total, day, roll_up, totals};
    use crate::domain::link::LinkId;
    use crate::domain::time::{UnixMillis, monotonic};
    use crate::domain::visit::Class;
    use crate::stats::sketch::{Dimension, Sketch};
    use crate::visits::agents::Agent;
    use crate::visits::batch::{Referrer, RequestId, Row};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const BROWSERS: [&str; 4] = ["Firefox", "Chrome", "curl", "A browser of one's own"];

    fn agents() -> Vec<Agent> {
        let agent = |(id, browser): (usize, &&str)| Agent {
            id: id as i64 + 1,
            text: String::new(),
            class: Class::Click,
            browser: (*browser).to_owned(),
            os: "Linux".to_owned(),
            device: "desktop",
        };
        BROWSERS.iter().enumerate().map(agent).collect()
    }

    fn referrers(count: i64) -> Vec<Referrer> {
        (1..=count).map(|id| Referrer { id, text: String::new(), host: format!("host{id}.example") }).collect()
    }

    fn row(link: u64, at: i64, class: Class, visitor: u64, agent: i64, referrer: i64) -> Row {
        Row {
            link: LinkId(link),
            at: UnixMillis(at),
            epoch: 1,
            core: 0,
            number: 0,
            class,
            address: None,
            visitor: visitor << 32,
            agent,
            referrer,
            request_id: RequestId::None,
        }
    }

    fn roll_up_all(rows: &[Row]) -> Vec<Rollup> {
        let (agents, referrers) = (agents(), referrers(10));
        let at = |id: i64| usize::try_from(id - 1).ok();
        roll_up(rows, |id| agents.get(at(id)?), |id| referrers.get(at(id)?))
    }

    fn sketch_of(total: &Total<'_>) -> Sketch {
        let mut bytes = Vec::new();
        total.encode_sketch(&mut bytes);
        sketch_of_bytes(&bytes)
    }

    fn sketch_of_bytes(bytes: &[u8]) -> Sketch {
        let mut sketch = Sketch::default();
        sketch.merge(bytes).unwrap();
        sketch
    }

    proptest! {
        #[test]
        fn rollups_are_what_was_counted(
            visits in prop::collection::vec((0..4_u64, -2 * DAY_MS..2 * DAY_MS, 0..5_usize, 0..9_u64, 0..6_i64, 0..12_i64), 0..200),
        ) {
            let rows: Vec<Row> = visits
                .iter()
                .map(|&(link, at, class, visitor, agent, referrer)| row(link, at, Class::ALL[class], visitor, agent, referrer))
                .collect();
            let mut want: BTreeMap<(LinkId, i32), Vec<Row>> = BTreeMap::new();
            rows.iter().for_each(|row| want.entry((row.link, day(row.at))).or_default().push(*row));
            let rollups = roll_up_all(&rows);
            let keys: Vec<_> = rollups.iter().map(|rollup| (rollup.link, rollup.day)).collect();
            prop_assert_eq!(keys, want.keys().copied().collect::<Vec<_>>());
            for (rollup, rows) in rollups.iter().zip(want.values()) {
                for class in &Class::ALL[..Class::OF_LINKS] {
                    let count = rows.iter().filter(|row| row.class == *class).count() as u64;
                    prop_assert_eq!(rollup.counts[*class as usize], count);
                }
                let people = || rows.iter().filter(|row| row.class <= Class::Tool);
                prop_assert_eq!(rollup.first_at, people().map(|row| row.at).min());
                prop_assert_eq!(rollup.last_at, people().map(|row| row.at).max());
                let mut quarters = [0; 96];
                people().for_each(|row| quarters[(row.at.0.rem_euclid(DAY_MS) / 900_000) as usize] += 1);
                prop_assert_eq!(rollup.sketch.buckets(), quarters);
                let mut visitors: Vec<_> = people().map(|row| row.visitor).filter(|visitor| *visitor != 0).collect();
                visitors.sort_unstable();
                visitors.dedup();
                prop_assert_eq!(rollup.sketch.unique(), visitors.len() as u64);
                let top: BTreeMap<_, _> = rollup.sketch.top(Dimension::Browser).into_iter().collect();
                for (at, browser) in BROWSERS.iter().enumerate() {
                    let count = people().filter(|row| row.agent == at as i64 + 1).count() as u64;
                    prop_assert_eq!(top.get(*browser).copied().unwrap_or(0), count);
                }
                let referred = people().filter(|row| (1..=10).contains(&row.referrer)).count() as u64;
                prop_assert_eq!(rollup.sketch.top(Dimension::Referrer).iter().map(|top| top.1).sum::<u64>(), referred);
            }
            for total in totals(&rollups) {
                let of_link: Vec<Row> = rows.iter().filter(|row| row.link == total.link).copied().collect();
                prop_assert_eq!(total.counts.iter().sum::<u64>(), of_link.len() as u64);
                let people = || of_link.iter().filter(|row| row.class <= Class::Tool).map(|row| row.at);
                prop_assert_eq!((total.first_at, total.last_at), (people().min(), people().max()));
                // The same visits on one day are the same sketch.
                let on_a_day: Vec<Row> = of_link.iter().map(|row| Row { at: UnixMillis(0), ..*row }).collect();
                let mut bytes = Vec::new();
                roll_up_all(&on_a_day)[0].sketch.encode_without_quarters(&mut bytes);
                prop_assert_eq!(sketch_of(&total), sketch_of_bytes(&bytes));
            }
        }
    }

    #[test]
    fn what_is_no_click_is_in_no_sketch() {
        let rows = [Class::Bot, Class::Head, Class::Prefetch, Class::Orphan].map(|class| row(1, 5, class, 1, 1, 1));
        let [rollup] = &roll_up_all(&rows)[..] else { panic!("one link, one day") };
        assert_eq!((rollup.counts, rollup.first_at, rollup.sketch.is_empty()), ([0, 0, 1, 1, 1], None, true));
        assert_eq!(totals(&roll_up_all(&rows)).map(|total| sketch_of(&total)).collect::<Vec<_>>(), [Sketch::default()]);
    }

    /// `CARGO_PROFILE_DEV_OPT_LEVEL=3 cargo test --lib rollup_speed -- --ignored --nocapture`
    #[test]
    #[ignore = "it prints how fast it is"]
    fn rollup_speed() {
        let (agents, referrers) = (agents(), referrers(300));
        let mut seed = 1_u64;
        let mut chance = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % below
        };
        for links in [10, 1_000, 15_000] {
            let rows: Vec<Row> = (0..50_000)
                .map(|at| {
                    let (link, visitor) = (chance(links) * 7919, chance(1 << 31));
                    row(
                        link,
                        1_700_000_000_000 + at / 50,
                        Class::Click,
                        visitor,
                        chance(4) as i64 + 1,
                        chance(300) as i64 + 1,
                    )
                })
                .collect();
            let mut best = [f64::MAX; 3];
            for _ in 0..20 {
                let mut bytes = Vec::new();
                let started = monotonic();
                let rollups = roll_up(&rows, |id| agents.get(id as usize - 1), |id| referrers.get(id as usize - 1));
                let rolled_up = monotonic();
                rollups.iter().for_each(|rollup| rollup.sketch.encode(&mut bytes));
                let encoded = monotonic();
                totals(&rollups).for_each(|total| total.encode_sketch(&mut bytes));
                let ended = monotonic();
                let times = [rolled_up - started, encoded - rolled_up, ended - encoded];
                for (best, time) in best.iter_mut().zip(times) {
                    *best = best.min(time.as_nanos() as f64 / rows.len() as f64);
                }
            }
            println!(
                "{links} links: roll_up {:.0} ns, days {:.0} ns, totals {:.0} ns a visit",
                best[0], best[1], best[2]
            );
        }
    }
}
