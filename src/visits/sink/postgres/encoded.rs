//! A batch as its transaction sends it: columns for the statements, pieces for COPY.
//!
//! In: a batch. Out: the same, encoded, before the transaction begins, which then waits for nothing of ours.
//! Never: does IO; looks at a clock (rows of positions carry the server's).
//! At its limit: a batch's; each sketch lies in memory once more.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};

use super::copy;
use crate::domain::link::LinkId;
use crate::domain::time::UnixMillis;
use crate::domain::visit::Class;
use crate::stats::rollup::{self, Day};
use crate::stats::sketch::Sketch;
use crate::visits::Dropped;
use crate::visits::batch::Batch;
use crate::visits::spool::Source;

/// A value and its type, so that the server need not be asked for it.
pub(super) type Param<'a> = (&'a (dyn ToSql + Sync), Type);
/// A constant text and its values.
pub(super) type Query<'a> = (&'static str, Vec<Param<'a>>);

/// A source that the store does not know is at 0.
const KNOW: &str = "INSERT INTO spool_positions (epoch, core, instance, next, stored, answered, at)
  SELECT epoch, core, $3, 0, 0, 0, 0 FROM unnest($1::int8[], $2::int4[]) AS a (epoch, core)
  ON CONFLICT (epoch, core) DO NOTHING";

/// The judge: as many rows as there are ranges, or nothing of the batch is stored. Should the server refuse the `BEGIN`
/// before it (somebody cancelled that), it would be a transaction of its own, and so asks for what `BEGIN` sets.
const MOVE: &str = "UPDATE spool_positions p
  SET next = a.next_to, stored = p.stored + a.visits, at = (extract(epoch FROM now()) * 1000)::int8
  FROM unnest($1::int8[], $2::int4[], $3::int8[], $4::int8[], $5::int8[]) AS a (epoch, core, next_from, next_to, visits)
  WHERE p.epoch = a.epoch AND p.core = a.core AND p.next = a.next_from
    AND current_setting('waypost.begun', true) = 'yes'
  RETURNING 1";

/// A tally that comes again, or late, changes nothing.
const ANSWERED: &str = "INSERT INTO spool_positions AS p (epoch, core, instance, next, stored, answered, at)
  SELECT epoch, core, $3, 0, 0, answered, (extract(epoch FROM now()) * 1000)::int8
  FROM unnest($1::int8[], $2::int4[], $4::int8[]) AS a (epoch, core, answered)
  ON CONFLICT (epoch, core) DO UPDATE SET answered = greatest(p.answered, excluded.answered), at = excluded.at";

/// What a core counts itself is told as its sum so far, everything else as what is added.
const DROPS: &str = "INSERT INTO spool_drops AS d (epoch, core, reason, visits)
  SELECT * FROM unnest($1::int8[], $2::int4[], $3::text[], $4::int8[])
  ON CONFLICT (epoch, core, reason) DO UPDATE SET visits = CASE WHEN d.reason IN ('ring_full', 'spool_error')
    THEN greatest(d.visits, excluded.visits) ELSE d.visits + excluded.visits END";

/// The day is the server's, as where they are deleted. It is written once, not with each telling.
const AGENTS: &str = "INSERT INTO agents AS t (id, text, kind, browser, os, device, seen_day)
  SELECT a.*, floor(extract(epoch FROM now()) / 86400)::int4
  FROM unnest($1::int8[], $2::text[], $3::int2[], $4::text[], $5::text[], $6::text[]) AS a
  ON CONFLICT (id) DO UPDATE SET seen_day = excluded.seen_day WHERE t.seen_day < excluded.seen_day";

const REFERRERS: &str = "INSERT INTO referrers AS t (id, text, host, seen_day)
  SELECT a.*, floor(extract(epoch FROM now()) / 86400)::int4 FROM unnest($1::int8[], $2::text[], $3::text[]) AS a
  ON CONFLICT (id) DO UPDATE SET seen_day = excluded.seen_day WHERE t.seen_day < excluded.seen_day";

/// Returns the sketches that have grown past `$10` bytes; their rows are locked by then.
const DAYS: &str = "WITH stored AS (
    INSERT INTO link_days AS d (link_id, day, clicks, tools, bots, heads, prefetches, last_at, sketch)
    SELECT * FROM unnest($1::int8[], $2::int4[], $3::int8[], $4::int8[], $5::int8[], $6::int8[], $7::int8[], $8::int8[],
      $9::bytea[])
    ON CONFLICT (link_id, day) DO UPDATE SET clicks = d.clicks + excluded.clicks, tools = d.tools + excluded.tools,
      bots = d.bots + excluded.bots, heads = d.heads + excluded.heads,
      prefetches = d.prefetches + excluded.prefetches, last_at = greatest(d.last_at, excluded.last_at),
      sketch = d.sketch || excluded.sketch
    RETURNING link_id, day, CASE WHEN octet_length(sketch) > $10 THEN sketch END AS sketch
  ) SELECT link_id, day, sketch FROM stored WHERE sketch IS NOT NULL";

const TOTALS: &str = "WITH stored AS (
    INSERT INTO link_totals AS t (link_id, clicks, tools, bots, heads, prefetches, first_at, last_at, sketch)
    SELECT * FROM unnest($1::int8[], $2::int8[], $3::int8[], $4::int8[], $5::int8[], $6::int8[], $7::int8[], $8::int8[],
      $9::bytea[])
    ON CONFLICT (link_id) DO UPDATE SET clicks = t.clicks + excluded.clicks, tools = t.tools + excluded.tools,
      bots = t.bots + excluded.bots, heads = t.heads + excluded.heads,
      prefetches = t.prefetches + excluded.prefetches, first_at = least(t.first_at, excluded.first_at),
      last_at = greatest(t.last_at, excluded.last_at), sketch = t.sketch || excluded.sketch
    RETURNING link_id, CASE WHEN octet_length(sketch) > $10 THEN sketch END AS sketch
  ) SELECT link_id, 0, sketch FROM stored WHERE sketch IS NOT NULL";

/// What replaces the sketches of [`DAYS`] and [`TOTALS`].
const MERGED_DAYS: &str = "UPDATE link_days d SET sketch = a.sketch
  FROM unnest($1::int8[], $2::int4[], $3::bytea[]) AS a (link_id, day, sketch)
  WHERE d.link_id = a.link_id AND d.day = a.day";
const MERGED_TOTALS: &str = "UPDATE link_totals t SET sketch = a.sketch
  FROM unnest($1::int8[], $2::int4[], $3::bytea[]) AS a (link_id, day, sketch) WHERE t.link_id = a.link_id";

/// Sketches longer than this are merged; shorter ones lie one behind the other.
const SKETCHES_BYTES_MAX: i32 = 1500;
/// Of most sketches: a few visits from a page or two.
const SKETCH_BYTES: usize = 64;

#[derive(Debug)]
pub(super) struct Encoded<'a> {
    instance: &'a str,
    /// Those that the batch begins.
    new: Sources,
    ranges: Ranges,
    tallies: (Sources, Vec<i64>),
    drops: (Sources, Vec<&'static str>, Vec<i64>),
    agents: Agents<'a>,
    referrers: [Vec<&'a str>; 2],
    referrer_ids: Vec<i64>,
    pub(super) visits: Vec<Bytes>,
    pub(super) orphans: Vec<Bytes>,
    /// Whose partitions it needs.
    pub(super) days: Vec<Day>,
    by_day: Sums,
    total: Sums,
}

#[derive(Debug, Default)]
struct Sources {
    epochs: Vec<i64>,
    cores: Vec<i32>,
}

impl Sources {
    fn push(&mut self, source: Source) {
        self.epochs.push(source.epoch.0.cast_signed());
        self.cores.push(i32::from(source.core));
    }
}

#[derive(Debug, Default)]
struct Ranges {
    sources: Sources,
    from: Vec<i64>,
    to: Vec<i64>,
    stored: Vec<i64>,
}

#[derive(Debug, Default)]
struct Agents<'a> {
    ids: Vec<i64>,
    texts: Vec<&'a str>,
    kinds: Vec<i16>,
    browsers: Vec<&'a str>,
    systems: Vec<&'a str>,
    devices: Vec<&'a str>,
}

/// What is added to links, by day or in total.
#[derive(Debug, Default)]
struct Sums {
    links: Vec<i64>,
    /// Empty in total.
    days: Vec<Day>,
    counts: [Vec<i64>; Class::OF_LINKS],
    first_at: Vec<Option<i64>>,
    last_at: Vec<Option<i64>>,
    sketches: Vec<Vec<u8>>,
}

impl Sums {
    fn push(
        &mut self,
        link: LinkId,
        counts: &[u64; Class::OF_LINKS],
        [first_at, last_at]: [Option<UnixMillis>; 2],
        sketch: Vec<u8>,
    ) {
        self.links.push(link.0.cast_signed());
        self.counts.iter_mut().zip(counts).for_each(|(column, count)| column.push(bigint(*count)));
        self.first_at.push(first_at.map(|at| at.0));
        self.last_at.push(last_at.map(|at| at.0));
        self.sketches.push(sketch);
    }

    /// That of a link, and of a day unless it is one of totals; empty if there is none.
    fn sketch(&self, link: i64, day: Day) -> &[u8] {
        let place = (0..self.links.len())
            .find(|place| self.links[*place] == link && self.days.get(*place).is_none_or(|of| *of == day));
        place.map_or(&[], |place| &self.sketches[place])
    }
}

impl<'a> Encoded<'a> {
    /// `buffer` is empty again when the pieces are dropped.
    pub(super) fn of(batch: &'a Batch, instance: &'a str, buffer: &mut BytesMut) -> Self {
        let mut encoded = Self {
            instance,
            new: Sources::default(),
            ranges: Ranges::default(),
            tallies: Default::default(),
            drops: drops(batch),
            agents: Agents::default(),
            referrer_ids: batch.referrers.iter().map(|referrer| referrer.id).collect(),
            referrers: [
                batch.referrers.iter().map(|referrer| referrer.text.as_str()).collect(),
                batch.referrers.iter().map(|referrer| referrer.host.as_str()).collect(),
            ],
            visits: copy::visits(&batch.rows, buffer),
            orphans: copy::orphans(&batch.orphans, buffer),
            days: days(batch),
            by_day: Sums::default(),
            total: Sums::default(),
        };
        for range in &batch.ranges {
            if range.from == 0 {
                encoded.new.push(range.source);
            }
            encoded.ranges.sources.push(range.source);
            encoded.ranges.from.push(bigint(range.from));
            encoded.ranges.to.push(bigint(range.to));
            encoded.ranges.stored.push(bigint(range.stored));
        }
        for tally in &batch.tallies {
            encoded.tallies.0.push(tally.source);
            encoded.tallies.1.push(bigint(tally.visits + tally.ring_full + tally.spool_error));
        }
        for agent in &batch.agents {
            let columns = &mut encoded.agents;
            columns.ids.push(agent.id);
            columns.texts.push(&agent.text);
            columns.kinds.push(agent.class as i16);
            columns.browsers.push(&agent.browser);
            columns.systems.push(&agent.os);
            columns.devices.push(agent.device);
        }
        for day in &batch.rollups {
            let mut sketch = Vec::with_capacity(SKETCH_BYTES);
            day.sketch.encode(&mut sketch);
            encoded.by_day.push(day.link, &day.counts, [day.first_at, day.last_at], sketch);
            encoded.by_day.days.push(day.day);
        }
        for total in rollup::totals(&batch.rollups) {
            let mut sketch = Vec::with_capacity(SKETCH_BYTES);
            total.encode_sketch(&mut sketch);
            encoded.total.push(total.link, &total.counts, [total.first_at, total.last_at], sketch);
        }
        encoded
    }

    pub(super) fn ranges(&self) -> usize {
        self.ranges.from.len()
    }

    /// What comes before the transaction, in the order of ids, so that instances do not meet in deadlocks.
    pub(super) fn texts(&self) -> Vec<Query<'_>> {
        let Self { agents, referrers: [texts, hosts], .. } = self;
        let mut queries: Vec<Query<'_>> = Vec::new();
        if !agents.ids.is_empty() {
            queries.push((
                AGENTS,
                vec![
                    bigints(&agents.ids),
                    (&agents.texts, Type::TEXT_ARRAY),
                    (&agents.kinds, Type::INT2_ARRAY),
                    (&agents.browsers, Type::TEXT_ARRAY),
                    (&agents.systems, Type::TEXT_ARRAY),
                    (&agents.devices, Type::TEXT_ARRAY),
                ],
            ));
        }
        if !self.referrer_ids.is_empty() {
            queries.push((
                REFERRERS,
                vec![bigints(&self.referrer_ids), (texts, Type::TEXT_ARRAY), (hosts, Type::TEXT_ARRAY)],
            ));
        }
        queries
    }

    /// What comes before the rows. The answer of the one at [`Self::JUDGE`] has [`Self::ranges`] rows, or the batch must
    /// not be stored.
    pub(super) fn before(&self) -> Vec<Query<'_>> {
        let Self { new, ranges, tallies, drops, .. } = self;
        let mut queries: Vec<Query<'_>> = vec![
            (KNOW, vec![bigints(&new.epochs), ints(&new.cores), (&self.instance, Type::TEXT)]),
            (
                MOVE,
                vec![
                    bigints(&ranges.sources.epochs),
                    ints(&ranges.sources.cores),
                    bigints(&ranges.from),
                    bigints(&ranges.to),
                    bigints(&ranges.stored),
                ],
            ),
        ];
        if !tallies.1.is_empty() {
            let (sources, answered) = tallies;
            queries.push((
                ANSWERED,
                vec![bigints(&sources.epochs), ints(&sources.cores), (&self.instance, Type::TEXT), bigints(answered)],
            ));
        }
        if !drops.1.is_empty() {
            let (sources, reasons, visits) = drops;
            queries.push((
                DROPS,
                vec![bigints(&sources.epochs), ints(&sources.cores), (reasons, Type::TEXT_ARRAY), bigints(visits)],
            ));
        }
        queries
    }

    pub(super) const JUDGE: usize = 1;

    /// What comes after the rows; answered with the sketches that are to be [`merged`], by day and in total.
    pub(super) fn after(&self) -> Vec<Query<'_>> {
        let mut queries = Vec::new();
        if self.by_day.links.is_empty() {
            return queries;
        }
        let Sums { links, days, counts, last_at, sketches, .. } = &self.by_day;
        let mut params = vec![bigints(links), ints(days)];
        params.extend(counts.iter().map(bigints));
        params.push((last_at, Type::INT8_ARRAY));
        params.push((sketches, Type::BYTEA_ARRAY));
        params.push((&SKETCHES_BYTES_MAX, Type::INT4));
        queries.push((DAYS, params));
        let Sums { links, counts, first_at, last_at, sketches, .. } = &self.total;
        let mut params = vec![bigints(links)];
        params.extend(counts.iter().map(bigints));
        params.push((first_at, Type::INT8_ARRAY));
        params.push((last_at, Type::INT8_ARRAY));
        params.push((sketches, Type::BYTEA_ARRAY));
        params.push((&SKETCHES_BYTES_MAX, Type::INT4));
        queries.push((TOTALS, params));
        queries
    }
}

/// Sketches that were merged, of days or totals.
#[derive(Debug)]
pub(super) struct Merged {
    sql: &'static str,
    links: Vec<i64>,
    days: Vec<Day>,
    sketches: Vec<Vec<u8>>,
}

impl Merged {
    /// None if there is nothing to merge. What is no sketch is replaced by the batch's own, for the counts beside it are
    /// right all the same.
    pub(super) fn of(rows: &[Row], batch: &Encoded<'_>, in_total: bool) -> Result<Option<Self>, tokio_postgres::Error> {
        let added = if in_total { &batch.total } else { &batch.by_day };
        let sql = if in_total { MERGED_TOTALS } else { MERGED_DAYS };
        let mut merged = Self { sql, links: Vec::new(), days: Vec::new(), sketches: Vec::new() };
        for row in rows {
            let (link, day) = (row.try_get(0)?, row.try_get(1)?);
            let mut sketch = Sketch::default();
            let mut bytes = Vec::new();
            match sketch.merge(row.try_get(2)?) {
                Ok(()) => sketch.encode(&mut bytes),
                Err(bad) => {
                    tracing::warn!(
                        %bad, link, day, in_total,
                        "a link's sketch in postgres is damaged: its buckets, top values and visitors begin anew"
                    );
                    bytes.extend_from_slice(added.sketch(link, day));
                }
            }
            merged.links.push(link);
            merged.days.push(day);
            merged.sketches.push(bytes);
        }
        Ok(Some(merged).filter(|merged| !merged.links.is_empty()))
    }

    pub(super) fn query(&self) -> Query<'_> {
        (self.sql, vec![bigints(&self.links), ints(&self.days), (&self.sketches, Type::BYTEA_ARRAY)])
    }
}

/// Those of the batch, and what the cores count themselves, by source and reason.
fn drops(batch: &Batch) -> (Sources, Vec<&'static str>, Vec<i64>) {
    let mut drops: BTreeMap<(Source, Dropped), u64> = BTreeMap::new();
    for range in &batch.ranges {
        for (reason, visits) in Dropped::ALL.into_iter().zip(range.drops) {
            *drops.entry((range.source, reason)).or_default() += visits;
        }
    }
    for tally in &batch.tallies {
        drops.insert((tally.source, Dropped::RingFull), tally.ring_full);
        drops.insert((tally.source, Dropped::SpoolError), tally.spool_error);
    }
    let mut columns = (Sources::default(), Vec::new(), Vec::new());
    for ((source, reason), visits) in drops.into_iter().filter(|(_, visits)| *visits > 0) {
        columns.0.push(source);
        columns.1.push(reason.name());
        columns.2.push(bigint(visits));
    }
    columns
}

/// Every row is in a rollup, and of those there are a fifth as many.
fn days(batch: &Batch) -> Vec<Day> {
    let of_orphans = batch.orphans.iter().map(|orphan| rollup::day(orphan.row.at));
    let mut days: Vec<Day> = batch.rollups.iter().map(|rollup| rollup.day).chain(of_orphans).collect();
    days.sort_unstable();
    days.dedup();
    days
}

fn bigints(column: &Vec<i64>) -> Param<'_> {
    (column, Type::INT8_ARRAY)
}

fn ints(column: &Vec<i32>) -> Param<'_> {
    (column, Type::INT4_ARRAY)
}

/// Numbers of records and counts of visits stay far below its end.
fn bigint(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
