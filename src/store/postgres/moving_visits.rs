//! What is added up of visits, out of an embedded store into Postgres.
//!
//! In: totals, days and places in the spool as they are. Out: the same in Postgres.
//! Never: makes less of what is there: it may be run again, also after the embedded store has gone on.

use tokio_postgres::types::Type;

use super::moving::{all, millis};
use super::{Param, Postgres, bigint, number, only};
use crate::domain::link::LinkId;
use crate::store::Result;
use crate::store::visited::{DayOfLink, Kinds, Place, Totals};

const TOTALS: &str = "INSERT INTO link_totals AS t
    (link_id, clicks, tools, bots, heads, prefetches, first_at, last_at, sketch)
  SELECT * FROM unnest($1::int8[], $2::int8[], $3::int8[], $4::int8[], $5::int8[], $6::int8[], $7::int8[], $8::int8[],
    $9::bytea[])
  ON CONFLICT (link_id) DO UPDATE SET clicks = excluded.clicks, tools = excluded.tools, bots = excluded.bots,
    heads = excluded.heads, prefetches = excluded.prefetches, first_at = excluded.first_at, last_at = excluded.last_at,
    sketch = excluded.sketch
  WHERE t.clicks + t.tools + t.bots + t.heads + t.prefetches
    < excluded.clicks + excluded.tools + excluded.bots + excluded.heads + excluded.prefetches";
const DAYS: &str = "INSERT INTO link_days AS d
    (link_id, day, clicks, tools, bots, heads, prefetches, last_at, sketch)
  SELECT * FROM unnest($1::int8[], $2::int4[], $3::int8[], $4::int8[], $5::int8[], $6::int8[], $7::int8[], $8::int8[],
    $9::bytea[])
  ON CONFLICT (link_id, day) DO UPDATE SET clicks = excluded.clicks, tools = excluded.tools, bots = excluded.bots,
    heads = excluded.heads, prefetches = excluded.prefetches, last_at = excluded.last_at, sketch = excluded.sketch
  WHERE d.clicks + d.tools + d.bots + d.heads + d.prefetches
    < excluded.clicks + excluded.tools + excluded.bots + excluded.heads + excluded.prefetches";
const PLACES: &str = "INSERT INTO spool_positions AS p (epoch, core, instance, next, stored, answered, at)
  SELECT * FROM unnest($1::int8[], $2::int4[], $3::text[], $4::int8[], $5::int8[], $6::int8[], $7::int8[])
  ON CONFLICT (epoch, core) DO UPDATE SET next = excluded.next, stored = excluded.stored,
    answered = greatest(p.answered, excluded.answered), at = greatest(p.at, excluded.at)
  WHERE p.next <= excluded.next";
const DROPS: &str = "INSERT INTO spool_drops AS d (epoch, core, reason, visits)
  SELECT * FROM unnest($1::int8[], $2::int4[], $3::text[], $4::int8[])
  ON CONFLICT (epoch, core, reason) DO UPDATE SET visits = greatest(d.visits, excluded.visits)";
const SUM: &str = "SELECT coalesce(sum(clicks + tools + bots + heads + prefetches), 0)::int8 FROM link_totals";

impl Postgres {
    pub async fn adopt_totals(&self, totals: &[(LinkId, Totals)]) -> Result<()> {
        let links = all(totals, |(link, _)| bigint(link.0));
        let [clicks, tools, bots, heads, prefetches] = counts(totals, |(_, totals)| &totals.kinds);
        let firsts = all(totals, |(_, totals)| millis(totals.first_at));
        let lasts = all(totals, |(_, totals)| millis(totals.last_at));
        let sketches = all(totals, |(_, totals)| totals.sketch.as_slice());
        let params: [Param<'_>; 9] = [
            (&links, Type::INT8_ARRAY),
            (&clicks, Type::INT8_ARRAY),
            (&tools, Type::INT8_ARRAY),
            (&bots, Type::INT8_ARRAY),
            (&heads, Type::INT8_ARRAY),
            (&prefetches, Type::INT8_ARRAY),
            (&firsts, Type::INT8_ARRAY),
            (&lasts, Type::INT8_ARRAY),
            (&sketches, Type::BYTEA_ARRAY),
        ];
        self.inner.again(&[(TOTALS, &params)]).await?;
        Ok(())
    }

    pub async fn adopt_days(&self, days: &[DayOfLink]) -> Result<()> {
        let links = all(days, |day| bigint(day.link.0));
        let numbers = all(days, |day| day.row.day);
        let [clicks, tools, bots, heads, prefetches] = counts(days, |day| &day.row.kinds);
        let lasts = all(days, |day| millis(day.last_at));
        let sketches = all(days, |day| day.row.sketch.as_slice());
        let params: [Param<'_>; 9] = [
            (&links, Type::INT8_ARRAY),
            (&numbers, Type::INT4_ARRAY),
            (&clicks, Type::INT8_ARRAY),
            (&tools, Type::INT8_ARRAY),
            (&bots, Type::INT8_ARRAY),
            (&heads, Type::INT8_ARRAY),
            (&prefetches, Type::INT8_ARRAY),
            (&lasts, Type::INT8_ARRAY),
            (&sketches, Type::BYTEA_ARRAY),
        ];
        self.inner.again(&[(DAYS, &params)]).await?;
        Ok(())
    }

    /// What the spool still keeps of a store that moved would be stored once more without.
    pub async fn adopt_places(&self, places: &[Place]) -> Result<()> {
        let epochs = all(places, |place| place.epoch);
        let cores = all(places, |place| place.core);
        let instances = all(places, |place| place.instance.as_str());
        let nexts = all(places, |place| bigint(place.next));
        let stored = all(places, |place| bigint(place.stored));
        let answered = all(places, |place| bigint(place.answered));
        let times = all(places, |place| place.at.0);
        let drops: Vec<_> =
            places.iter().flat_map(|place| place.drops.iter().map(|drop| (place.epoch, place.core, drop))).collect();
        let drop_epochs = all(&drops, |(epoch, ..)| *epoch);
        let drop_cores = all(&drops, |(_, core, _)| *core);
        let reasons = all(&drops, |(.., (reason, _))| reason.as_str());
        let visits = all(&drops, |(.., (_, visits))| bigint(*visits));
        let positions: [Param<'_>; 7] = [
            (&epochs, Type::INT8_ARRAY),
            (&cores, Type::INT4_ARRAY),
            (&instances, Type::TEXT_ARRAY),
            (&nexts, Type::INT8_ARRAY),
            (&stored, Type::INT8_ARRAY),
            (&answered, Type::INT8_ARRAY),
            (&times, Type::INT8_ARRAY),
        ];
        let drops: [Param<'_>; 4] = [
            (&drop_epochs, Type::INT8_ARRAY),
            (&drop_cores, Type::INT4_ARRAY),
            (&reasons, Type::TEXT_ARRAY),
            (&visits, Type::INT8_ARRAY),
        ];
        self.inner.again(&[(PLACES, &positions), (DROPS, &drops)]).await?;
        Ok(())
    }

    /// All visits of links that are added up, of every kind.
    pub async fn sum_of_visits(&self) -> Result<u64> {
        number(only(&self.inner.read_all(SUM, &[]).await?)?, 0)
    }
}

/// A column for each kind.
fn counts<T>(rows: &[T], kinds: impl Fn(&T) -> &Kinds) -> [Vec<i64>; 5] {
    std::array::from_fn(|kind| rows.iter().map(|row| bigint(kinds(row)[kind])).collect())
}
