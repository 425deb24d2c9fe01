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
#[derive(Clone, Debug, PartialEq)]
pub struct Total {
    pub link: LinkId,
    pub counts: [u64; Class::OF_LINKS],
    pub first_at: Option<UnixMillis>,
    pub last_at: Option<UnixMillis>,
    /// Without buckets.
    pub sketch: Sketch,
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
    let mut order: Vec<u128> = rows.iter().enumerate().map(|(at, row)| place(row, at)).collect();
    order.sort_unstable();
    let mut values = Values::default();
    let groups = order.chunk_by(|a, b| a >> 32 == b >> 32);
    groups
        .map(|group| {
            let rows = group.iter().map(|place| &rows[*place as u32 as usize]);
            roll_up_day(rows, &mut values, &agent, &referrer)
        })
        .collect()
}

/// What they are in total, by link.
#[must_use]
pub fn totals(days: &[Rollup]) -> Vec<Total> {
    days.chunk_by(|a, b| a.link == b.link).map(total).collect()
}

/// By link, then day, then as they came: one number sorts faster than a tuple.
fn place(row: &Row, at: usize) -> u128 {
    // Days before 1970 come first.
    let day = day(row.at) as u32 ^ 1 << 31;
    u128::from(row.link.0) << 64 | u128::from(day) << 32 | at as u128
}

fn roll_up_day<'a, 'r>(
    rows: impl ExactSizeIterator<Item = &'r Row> + Clone,
    values: &mut Values,
    agent: impl Fn(i64) -> Option<&'a Agent>,
    referrer: impl Fn(i64) -> Option<&'a Referrer>,
) -> Rollup {
    let first = rows.clone().next().expect("a group has a row");
    let mut rollup = Rollup {
        link: first.link,
        day: day(first.at),
        counts: [0; Class::OF_LINKS],
        first_at: None,
        last_at: None,
        sketch: Sketch::default(),
    };
    for row in rows {
        let Some(count) = rollup.counts.get_mut(row.class as usize) else { continue };
        *count += 1;
        if !matches!(row.class, Class::Click | Class::Tool) {
            continue;
        }
        rollup.first_at = Some(rollup.first_at.map_or(row.at, |at| at.min(row.at)));
        rollup.last_at = rollup.last_at.max(Some(row.at));
        rollup.sketch.count_quarter((row.at.0.rem_euclid(DAY_MS) / QUARTER_MS) as u8, 1);
        rollup.sketch.see_visitor(row.visitor);
        values.count(row, &agent, &referrer);
    }
    values.drain_into(&mut rollup.sketch);
    rollup
}

fn total(days: &[Rollup]) -> Total {
    let mut sketch = Sketch::default();
    let mut counts = [0; Class::OF_LINKS];
    for day in days {
        sketch.merge_sketch(day.sketch.without_quarters());
        counts.iter_mut().zip(day.counts).for_each(|(sum, count)| *sum += count);
    }
    Total {
        link: days[0].link,
        counts,
        first_at: days.iter().filter_map(|day| day.first_at).min(),
        last_at: days.iter().filter_map(|day| day.last_at).max(),
        sketch,
    }
}

/// The values of a batch, numbered, with how often the current group has each.
#[derive(Default)]
struct Values {
    /// Browser, system and device of each agent that was met, by its id; the host of each referrer.
    agents: HashMap<i64, [Option<u32>; 3], ahash::RandomState>,
    referrers: HashMap<i64, Option<u32>, ahash::RandomState>,
    numbers: HashMap<(Dimension, Value), u32, ahash::RandomState>,
    /// By number.
    all: Vec<(Dimension, Value)>,
    counts: Vec<u64>,
    /// Numbers with a count.
    met: Vec<u32>,
}

impl Values {
    fn count<'a>(
        &mut self,
        row: &Row,
        agent: impl Fn(i64) -> Option<&'a Agent>,
        referrer: impl Fn(i64) -> Option<&'a Referrer>,
    ) {
        let of_agent = match self.agents.get(&row.agent) {
            Some(numbers) => *numbers,
            None => {
                let numbers = agent(row.agent).map_or([None; 3], |agent| {
                    [
                        self.number(Dimension::Browser, &agent.browser),
                        self.number(Dimension::System, &agent.os),
                        self.number(Dimension::Device, agent.device),
                    ]
                });
                self.agents.insert(row.agent, numbers);
                numbers
            }
        };
        let of_referrer = match self.referrers.get(&row.referrer) {
            Some(number) => *number,
            None => {
                let number = referrer(row.referrer).and_then(|known| self.number(Dimension::Referrer, &known.host));
                self.referrers.insert(row.referrer, number);
                number
            }
        };
        for number in of_agent.into_iter().chain([of_referrer]).flatten() {
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

    /// Ends a group.
    fn drain_into(&mut self, sketch: &mut Sketch) {
        sketch.count_values(self.met.drain(..).map(|number| {
            let (dimension, value) = &self.all[number as usize];
            (*dimension, value, std::mem::take(&mut self.counts[number as usize]))
        }));
    }
}
