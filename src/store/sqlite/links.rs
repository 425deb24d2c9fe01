//! Links and their changes in SQLite. Every function runs inside of a transaction that its caller holds.

use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Result, Row, params, params_from_iter};

use super::Writing;
use crate::domain::key::{Case, Code, DomainId, Key};
use crate::domain::link::{Entry, Fields, Link, LinkId, Rules};
use crate::domain::target::Target;
use crate::domain::time::UnixMillis;
use crate::store::row::{
    Change, ChangeRow, Filter, Found, Inserted, NewLink, OnConflict, Position, QuotaAsk, Taken, history,
};

const LOOK_UP: &str = "SELECT id, target_url, status, cache_control, forward_query, starts_at, expires_at, expired_url,
    disabled_at IS NOT NULL OR deleted_at IS NOT NULL
      OR max_visits <= coalesce((SELECT used FROM link_quotas WHERE link_id = id), 0),
    max_visits IS NOT NULL
  FROM links WHERE domain_id = ?1 AND code = ?2";

pub(super) const LINK: &str =
    "SELECT id, domain_id, code, target_url, target_written, status, cache_control, title, note, starts_at,
    expires_at, expired_url, max_visits, forward_query, version, created_at, updated_at, disabled_at, deleted_at,
    (SELECT group_concat(tag, char(31)) FROM tags WHERE link_id = id),
    (SELECT imported FROM link_totals WHERE link_id = id),
    (SELECT used FROM link_quotas WHERE link_id = id)
  FROM links";

pub fn look_up(db: &Connection, keys: &[Key]) -> Result<Vec<Found>> {
    let mut statement = db.prepare_cached(LOOK_UP)?;
    let mut one = |key: &Key| match statement.query_row(params![key.domain.0, key.code.to_string()], entry).optional() {
        Ok(Some(entry)) => Ok(Found::Entry(entry)),
        Ok(None) => Ok(Found::Missing),
        // Somebody else wrote into the file: this row cannot be read, its neighbours can.
        Err(rusqlite::Error::FromSqlConversionFailure(..) | rusqlite::Error::InvalidColumnType(..)) => {
            Ok(Found::Unreadable)
        }
        Err(error) => Err(error),
    };
    keys.iter().map(&mut one).collect()
}

fn entry(row: &Row<'_>) -> Result<Entry> {
    Ok(Entry {
        id: LinkId(row.get(0)?),
        target: target(row, 1)?,
        rules: Rules {
            status: row.get(2)?,
            cache_control: row.get::<_, Option<String>>(3)?.map(Into::into),
            forward_query: row.get(4)?,
            starts_at: row.get::<_, Option<i64>>(5)?.map(UnixMillis),
            expires_at: row.get::<_, Option<i64>>(6)?.map(UnixMillis),
            expired_url: optional_target(row, 7)?,
            gone: row.get::<_, Option<bool>>(8)?.unwrap_or(false),
            limited: row.get(9)?,
        },
    })
}

/// A target that somebody else wrote into the file and that could end a header is an error, not an answer.
fn target(row: &Row<'_>, column: usize) -> Result<Target> {
    let text = row.get_ref(column)?.as_str()?;
    Target::new(text).ok_or_else(|| {
        rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, "not a serialised URL".into())
    })
}

fn optional_target(row: &Row<'_>, column: usize) -> Result<Option<Target>> {
    if row.get_ref(column)? == rusqlite::types::ValueRef::Null { Ok(None) } else { target(row, column).map(Some) }
}

pub(super) fn key(row: &Row<'_>, domain: usize, code: usize) -> Result<Key> {
    let text = row.get_ref(code)?.as_str()?;
    let parsed = Code::parse(text.as_bytes(), Case::Sensitive).map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(code, rusqlite::types::Type::Text, Box::new(error))
    })?;
    Ok(Key { domain: DomainId(row.get(domain)?), code: parsed })
}

pub(super) fn whole(row: &Row<'_>) -> Result<Link> {
    let target = target(row, 3)?;
    let millis = |column: usize| Ok::<_, rusqlite::Error>(row.get::<_, Option<i64>>(column)?.map(UnixMillis));
    let tags: Option<String> = row.get(19)?;
    Ok(Link {
        id: LinkId(row.get(0)?),
        key: key(row, 1, 2)?,
        fields: Fields {
            target_written: row.get::<_, Option<String>>(4)?.unwrap_or_else(|| target.as_str().to_owned()),
            target,
            status: row.get(5)?,
            cache_control: row.get(6)?,
            title: row.get(7)?,
            tags: tags.map(|tags| tags.split('\u{1f}').map(str::to_owned).collect()).unwrap_or_default(),
            note: row.get(8)?,
            starts_at: millis(9)?,
            expires_at: millis(10)?,
            expired_url: optional_target(row, 11)?,
            max_visits: row.get(12)?,
            forward_query: row.get(13)?,
        },
        version: row.get(14)?,
        created_at: UnixMillis(row.get(15)?),
        updated_at: UnixMillis(row.get(16)?),
        disabled_at: millis(17)?,
        deleted_at: millis(18)?,
        imported_clicks: row.get::<_, Option<u64>>(20)?.unwrap_or(0),
        visits_used: row.get::<_, Option<u64>>(21)?.unwrap_or(0),
    })
}

pub fn link(db: &Connection, key: Key) -> Result<Option<Link>> {
    let mut statement = db.prepare_cached(&format!("{LINK} WHERE domain_id = ?1 AND code = ?2"))?;
    statement.query_row(params![key.domain.0, key.code.to_string()], whole).optional()
}

/// The part of a query that `filter` is, and its values.
fn wanted(filter: &Filter) -> (String, Vec<Value>) {
    let mut sql = "deleted_at IS NULL".to_owned();
    let mut values = Vec::new();
    if let Some(search) = &filter.search {
        let pattern = search.replace('\\', "\\\\").replace('%', "\\%").replace('_', "\\_");
        values.push(Value::Text(format!("%{pattern}%")));
        let n = values.len();
        sql += &format!(
            " AND (code LIKE ?{n} ESCAPE '\\' OR target_url LIKE ?{n} ESCAPE '\\' OR title LIKE ?{n} ESCAPE '\\')"
        );
    }
    if let Some(tag) = &filter.tag {
        values.push(Value::Text(tag.clone()));
        sql += &format!(" AND id IN (SELECT link_id FROM tags WHERE tag = ?{})", values.len());
    }
    if let Some(domain) = filter.domain {
        values.push(Value::Integer(domain.0.into()));
        sql += &format!(" AND domain_id = ?{}", values.len());
    }
    (sql, values)
}

pub fn page(db: &Connection, filter: &Filter, after: Option<LinkId>, limit: u32) -> Result<Vec<Link>> {
    let (wanted, mut values) = wanted(filter);
    // Ids are given from 1.
    values.push(Value::Integer(after.map_or(0, |after| after.0 as i64)));
    values.push(Value::Integer(limit.into()));
    let n = values.len();
    let mut statement =
        db.prepare_cached(&format!("{LINK} WHERE {wanted} AND id > ?{} ORDER BY id LIMIT ?{n}", n - 1))?;
    statement.query_map(params_from_iter(values), whole)?.collect()
}

pub fn count(db: &Connection, filter: &Filter) -> Result<u64> {
    let (wanted, values) = wanted(filter);
    let mut statement = db.prepare_cached(&format!("SELECT count(*) FROM links WHERE {wanted}"))?;
    statement.query_row(params_from_iter(values), |row| row.get(0))
}

pub fn position(db: &Connection) -> Result<Position> {
    let position = |row: &Row<'_>| Ok(Position { version: row.get(0)?, generation: row.get(1)?, asked: row.get(2)? });
    db.prepare_cached("SELECT version, generation, asked FROM feed")?.query_row([], position)
}

pub fn edits(db: &Connection, limit: u32) -> Result<Vec<ChangeRow>> {
    let mut statement = db.prepare_cached(
        "SELECT version, domain_id, code FROM link_changes WHERE what <> 'create' ORDER BY version DESC LIMIT ?1",
    )?;
    let rows = statement
        .query_map([limit], |row| Ok(ChangeRow { version: row.get(0)?, key: key(row, 1, 2)?, created: false }))?;
    let mut rows: Vec<ChangeRow> = rows.collect::<Result<_>>()?;
    rows.reverse();
    Ok(rows)
}

pub fn changes(db: &Connection, position: u64, limit: u32) -> Result<Vec<ChangeRow>> {
    let mut statement = db.prepare_cached(
        "SELECT version, domain_id, code, what = 'create' FROM link_changes WHERE version > ?1 ORDER BY version LIMIT ?2",
    )?;
    let rows = statement.query_map([position, limit.into()], |row| {
        Ok(ChangeRow { version: row.get(0)?, key: key(row, 1, 2)?, created: row.get(3)? })
    })?;
    rows.collect()
}

pub fn insert(tx: &mut Writing<'_>, links: &[NewLink], now: UnixMillis) -> Result<Vec<Inserted>> {
    links.iter().map(|new| insert_one(tx, new, new.on_conflict, now)).collect()
}

fn insert_one(tx: &mut Writing<'_>, new: &NewLink, on_conflict: OnConflict, now: UnixMillis) -> Result<Inserted> {
    let fields = &new.fields;
    let version = tx.next_version();
    let inserted = tx
        .db
        .prepare_cached(
            "INSERT INTO links (id, domain_id, code, target_url, target_written, status, cache_control, title, note,
               starts_at, expires_at, expired_url, max_visits, forward_query, version, created_at, updated_at)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17)
             ON CONFLICT (domain_id, code) DO NOTHING",
        )?
        .execute(params![
            new.id.0,
            new.key.domain.0,
            new.key.code.to_string(),
            fields.target.as_str(),
            written(fields),
            fields.status,
            fields.cache_control,
            fields.title,
            fields.note,
            fields.starts_at.map(|at| at.0),
            fields.expires_at.map(|at| at.0),
            fields.expired_url.as_ref().map(Target::as_str),
            fields.max_visits,
            fields.forward_query,
            version,
            new.created_at.0,
            now.0,
        ])?;
    if inserted == 1 {
        set_tags(tx.db, new.id, &fields.tags)?;
        if new.imported_clicks > 0 {
            tx.db
                .prepare_cached("INSERT INTO link_totals (link_id, imported) VALUES (?1, ?2)")?
                .execute([new.id.0, new.imported_clicks])?;
        }
        record(tx.db, version, now, new.key, "create", None)?;
        return Ok(Inserted::Created);
    }
    tx.version -= 1;
    let taken = link(tx.db, new.key)?.expect("the insert met it in this transaction");
    match on_conflict {
        OnConflict::Refuse => Ok(Inserted::Taken),
        OnConflict::Take | OnConflict::Update if taken.deleted_at.is_some() => {
            let version = tx.next_version();
            record(tx.db, version, now, new.key, "replace", Some(&taken))?;
            tx.db.prepare_cached("DELETE FROM links WHERE id = ?1")?.execute([taken.id.0])?;
            insert_one(tx, new, OnConflict::Refuse, now)
        }
        OnConflict::Take => Ok(Inserted::Taken),
        OnConflict::Update => {
            let mut changed = taken.clone();
            new.given.apply(&mut changed.fields);
            save(tx, &taken, changed, "edit", now)?;
            Ok(Inserted::Updated)
        }
    }
}

/// What was written, where it is not what is served.
fn written(fields: &Fields) -> Option<&str> {
    (fields.target_written != fields.target.as_str()).then_some(&fields.target_written)
}

fn set_tags(db: &Connection, id: LinkId, tags: &[String]) -> Result<()> {
    for tag in tags {
        db.prepare_cached("INSERT OR IGNORE INTO tags (link_id, tag) VALUES (?1, ?2)")?.execute(params![id.0, tag])?;
    }
    Ok(())
}

fn record(db: &Connection, version: u64, now: UnixMillis, key: Key, what: &str, before: Option<&Link>) -> Result<()> {
    db.prepare_cached(
        "INSERT INTO link_changes (version, at, domain_id, code, what, before) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?
    .execute(params![version, now.0, key.domain.0, key.code.to_string(), what, before.map(history)])?;
    Ok(())
}

pub fn change(tx: &mut Writing<'_>, key: Key, change: &Change, now: UnixMillis) -> Result<Option<Link>> {
    let Some(before) = link(tx.db, key)?.filter(|link| link.deleted_at.is_none()) else {
        return Ok(None);
    };
    let mut after = before.clone();
    let what = change.apply(&mut after, now);
    save(tx, &before, after, what, now).map(Some)
}

fn save(tx: &mut Writing<'_>, before: &Link, mut after: Link, what: &str, now: UnixMillis) -> Result<Link> {
    after.version = tx.next_version();
    after.updated_at = now;
    let fields = &after.fields;
    tx.db
        .prepare_cached(
            "UPDATE links SET target_url = ?2, target_written = ?3, status = ?4, cache_control = ?5, title = ?6, note = ?7,
               starts_at = ?8, expires_at = ?9, expired_url = ?10, max_visits = ?11, forward_query = ?12, version = ?13,
               updated_at = ?14, disabled_at = ?15, deleted_at = ?16
             WHERE id = ?1",
        )?
        .execute(params![
            after.id.0,
            fields.target.as_str(),
            written(fields),
            fields.status,
            fields.cache_control,
            fields.title,
            fields.note,
            fields.starts_at.map(|at| at.0),
            fields.expires_at.map(|at| at.0),
            fields.expired_url.as_ref().map(Target::as_str),
            fields.max_visits,
            fields.forward_query,
            after.version,
            after.updated_at.0,
            after.disabled_at.map(|at| at.0),
            after.deleted_at.map(|at| at.0),
        ])?;
    if fields.tags != before.fields.tags {
        tx.db.prepare_cached("DELETE FROM tags WHERE link_id = ?1")?.execute([after.id.0])?;
        set_tags(tx.db, after.id, &fields.tags)?;
    }
    record(tx.db, after.version, now, after.key, what, Some(before))?;
    Ok(after)
}

/// To those who wait: there is one process, and nothing is leased.
pub fn take_visits(tx: &mut Writing<'_>, ask: &QuotaAsk, now: UnixMillis) -> Result<Taken> {
    let left: Option<Option<i64>> = tx
        .db
        .prepare_cached(
            "SELECT max_visits - coalesce((SELECT used FROM link_quotas WHERE link_id = id), 0) FROM links WHERE id = ?1",
        )?
        .query_row([ask.id.0], |row| row.get(0))
        .optional()?;
    let count = match left {
        Some(Some(left)) => ask.waiting.min(u32::try_from(left.max(0)).unwrap_or(u32::MAX)),
        Some(None) => ask.waiting,
        None => 0,
    };
    if count == 0 {
        return Ok(Taken::UsedUp);
    }
    if left == Some(None) {
        // Its limit was taken away a moment ago: they are not counted, so that none of them is lost.
        return Ok(Taken::Visits { count, leased: true });
    }
    tx.db
        .prepare_cached(
            "INSERT INTO link_quotas (link_id, used) VALUES (?1, ?2)
             ON CONFLICT (link_id) DO UPDATE SET used = used + excluded.used",
        )?
        .execute(params![ask.id.0, count])?;
    if left == Some(Some(count.into())) {
        let version = tx.next_version();
        record(tx.db, version, now, ask.key, "used_up", None)?;
    }
    Ok(Taken::Visits { count, leased: false })
}
