//! What moves out of SQLite into another store. Every function runs inside of a transaction that its caller holds.

use rusqlite::{Connection, Result};

use super::links::{LINK, position, whole};
use super::settings;
use super::warm::pins;
use crate::domain::link::{Link, LinkId};
use crate::store::row::Rest;

pub fn rest(db: &Connection) -> Result<Rest> {
    let position = position(db)?;
    let mut named = db.prepare_cached("SELECT name, value FROM settings WHERE name <> 'store.id' ORDER BY name")?;
    let mut ranges = db.prepare_cached("SELECT name, next FROM ranges ORDER BY name")?;
    Ok(Rest {
        // It stays: another store has a name of its own.
        store_id: db
            .query_row("SELECT CAST(value AS TEXT) FROM settings WHERE name = 'store.id'", [], |row| row.get(0))?,
        generation: position.generation,
        version: position.version,
        links: db.query_row("SELECT count(*) FROM links", [], |row| row.get(0))?,
        settings: named.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<Result<_>>()?,
        domains: settings::domains(db)?,
        ranges: ranges.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<Result<_>>()?,
        keys: settings::keys(db, None)?,
        pins: pins(db)?,
    })
}

pub fn all(db: &Connection, after: LinkId, limit: u32) -> Result<Vec<Link>> {
    let mut statement = db.prepare_cached(&format!("{LINK} WHERE id > ?1 ORDER BY id LIMIT ?2"))?;
    statement.query_map([after.0, limit.into()], whole)?.collect()
}

#[cfg(test)]
mod tests {
    use super::{all, rest};
    use crate::domain::key::DomainId;
    use crate::domain::link::LinkId;
    use crate::domain::time::UnixMillis;
    use crate::guard::keys::{KeyRecord, Scope, Scopes};
    use crate::store::row::Change;
    use crate::store::sqlite::tests::{fresh, key, new, write};
    use crate::store::sqlite::{links, settings, warm};

    #[test]
    fn everything_moves() {
        let db = fresh();
        let now = UnixMillis(9);
        write(&db, 0, |tx| {
            links::insert(tx, &[new(1, "a", &["x", "y"], 5), new(2, "b", &[], 0), new(7, "c", &[], 0)], now)?;
            links::change(tx, key("b"), &Change::Delete, now)?;
            settings::settle(tx, "codes.case", b"sensitive")?;
            settings::number_domains(tx, &["go.test".to_owned()])?;
            settings::lease(tx, "link_ids", 1, 1000)?;
            let record = |id: &str| KeyRecord {
                id: id.to_owned(),
                name: None,
                digest: [1; 32],
                scopes: Scopes::of(&[Scope::Admin]),
                created_at: now,
                expires_at: None,
                revoked_at: None,
                per_minute: None,
                last_used_at: None,
            };
            settings::add_key(tx, &record("one"))?;
            settings::add_key(tx, &record("two"))?;
            settings::revoke_key(tx, "one", now)?;
            warm::pin(tx, &[key("a")], true, now)
        });
        db.execute("UPDATE feed SET version = 4, generation = 3", []).unwrap();
        let rest = rest(&db).unwrap();
        assert_eq!((rest.generation, rest.version, rest.links), (3, 4, 3));
        assert!(rest.store_id.len() == 32 && rest.store_id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{rest:?}");
        assert_eq!(rest.settings, [("codes.case".to_owned(), b"sensitive".to_vec())]);
        assert_eq!(rest.domains, [(DomainId(0), String::new()), (DomainId(1), "go.test".to_owned())]);
        assert_eq!(rest.ranges, [("link_ids".to_owned(), 1001)]);
        let keys: Vec<_> = rest.keys.iter().map(|key| (key.id.as_str(), key.revoked_at)).collect();
        assert_eq!((keys, rest.pins), (vec![("one", Some(now)), ("two", None)], vec![key("a")]));
        let check = |after, limit, want: &[u64]| {
            let links = all(&db, LinkId(after), limit).unwrap();
            assert_eq!(links.iter().map(|link| link.id.0).collect::<Vec<_>>(), want);
            links
        };
        let links = check(0, 9, &[1, 2, 7]);
        assert_eq!((links[0].fields.tags.len(), links[0].imported_clicks), (2, 5));
        assert_eq!(links[1].deleted_at, Some(now));
        check(0, 2, &[1, 2]);
        check(2, 9, &[7]);
        check(7, 9, &[]);
    }
}
