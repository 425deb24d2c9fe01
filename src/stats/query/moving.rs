//! What is added up of visits, out of `visits.db`, as it moves into another store. Page by page, in the order of the keys.

use rusqlite::{Connection, Result, params};

use super::sqlite::{Sqlite, kinds, totals};
use crate::domain::link::LinkId;
use crate::domain::time::UnixMillis;
use crate::store;
use crate::store::visited::{DayOfLink, DayRow, Place, Totals};

impl Sqlite {
    /// At most `limit` totals of the links after `after`.
    pub async fn totals(&self, after: LinkId, limit: u32) -> store::Result<Vec<(LinkId, Totals)>> {
        self.read(move |db| {
            let mut statement = db.prepare_cached(
                "SELECT clicks, tools, bots, heads, prefetches, first_at, last_at, sketch, link_id FROM link_totals
                 WHERE link_id > ?1 ORDER BY link_id LIMIT ?2",
            )?;
            statement.query_map([after.0, limit.into()], |row| Ok((LinkId(row.get(8)?), totals(row)?)))?.collect()
        })
        .await
    }

    /// At most `limit` days of links after this one.
    pub async fn days(&self, after: (LinkId, i32), limit: u32) -> store::Result<Vec<DayOfLink>> {
        self.read(move |db| {
            let mut statement = db.prepare_cached(
                "SELECT link_id, day, clicks, tools, bots, heads, prefetches, last_at, sketch FROM link_days
                 WHERE (link_id, day) > (?1, ?2) ORDER BY link_id, day LIMIT ?3",
            )?;
            let rows = statement.query_map(params![after.0.0, after.1, limit], |row| {
                Ok(DayOfLink {
                    link: LinkId(row.get(0)?),
                    row: DayRow { day: row.get(1)?, kinds: kinds(row, 2)?, sketch: row.get(8)? },
                    last_at: row.get::<_, Option<i64>>(7)?.map(UnixMillis),
                })
            })?;
            rows.collect()
        })
        .await
    }

    /// Up to where every source is stored: a few for each start of each instance.
    pub async fn places(&self) -> store::Result<Vec<Place>> {
        self.read(places).await
    }

    /// All visits of links that are added up, of every kind.
    pub async fn sum(&self) -> store::Result<u64> {
        self.read(|db| {
            let sql = "SELECT coalesce(sum(clicks + tools + bots + heads + prefetches), 0) FROM link_totals";
            db.query_row(sql, [], |row| row.get(0))
        })
        .await
    }
}

fn places(db: &Connection) -> Result<Vec<Place>> {
    let mut statement = db.prepare("SELECT epoch, core, instance, next, stored, answered, at FROM spool_positions")?;
    let mut drops = db.prepare("SELECT reason, visits FROM spool_drops WHERE epoch = ?1 AND core = ?2")?;
    let rows = statement.query_map([], |row| {
        let (epoch, core): (i64, i32) = (row.get(0)?, row.get(1)?);
        Ok(Place {
            epoch,
            core,
            instance: row.get(2)?,
            next: row.get(3)?,
            stored: row.get(4)?,
            answered: row.get(5)?,
            at: UnixMillis(row.get(6)?),
            drops: drops.query_map((epoch, core), |row| row.try_into())?.collect::<Result<_>>()?,
        })
    })?;
    rows.collect()
}
