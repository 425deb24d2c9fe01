//! The schema of the Postgres store.
//!
//! In: a database, as a role that may make tables. Out: the same with every migration applied, each in a transaction
//! together with its mark, so that a stop in between loses nothing.
//! Never: runs beside another migration (each transaction takes a lock first); leaves anything in its session, which may be
//! a pooler's; waits long in the queue of a table that others use.
//! At its limit: gives up after [`LOCK_WAIT`] as transient.

use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::{Client, Row};

use super::connect::{Connector, Single};
use super::errors::{code, explain};
use super::{get, limited};
use crate::config;
use crate::store::schema::{self, Applied, Migration};
use crate::store::{Error, Result};

pub const MIGRATIONS: [Migration; 3] = [
    Migration { number: 1, name: "links", sql: include_str!("../../../migrations/postgres/0001_links.sql") },
    Migration { number: 2, name: "visits", sql: include_str!("../../../migrations/postgres/0002_visits.sql") },
    Migration { number: 3, name: "quotas", sql: include_str!("../../../migrations/postgres/0003_quotas.sql") },
];

/// Programs that know the migrations up to this one go on, and start, on a schema as this program leaves it: in a rolling
/// upgrade both run. What a migration adds leaves this as it is; one that takes away what older programs use comes a
/// version later than the program that does without, and raises this to the migrations which that one knows.
const COMPATIBLE_FROM: u32 = 2;

/// As JSON, since older programs have made the table without the last column.
pub(super) const APPLIED: &str = "SELECT number::int8, checksum, (to_jsonb(m) ->> 'compatible_from')::int8
  FROM schema_migrations m ORDER BY number";

pub(super) const ENCODING: &str = "SELECT current_setting('server_encoding')";

/// How long another migration, or a table in use, is waited for in all, and at a time.
const LOCK_WAIT: Duration = Duration::from_secs(60);
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
const LOCK_POLL: Duration = Duration::from_millis(500);
/// The longest that one migration may take.
const MIGRATION_MAX: Duration = Duration::from_secs(3600);
/// The lock's number ("waypost" as ASCII): of all programs that use this database, ours.
const LOCK_NUMBER: i64 = 0x0077_6179_706F_7374;

const HAS_MIGRATIONS: &str =
    "SELECT 1 FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  WHERE c.relname = 'schema_migrations' AND n.nspname = current_schema()";

/// Brings the schema up to date; returns what was applied.
pub async fn migrate(settings: &config::Postgres) -> Result<Vec<&'static Migration>> {
    let Single { client, .. } = &connect(settings).await?;
    let mut applied = Vec::new();
    while let [next, ..] = pending_of(client).await? {
        if apply(client, next).await? {
            applied.push(next);
        }
    }
    Ok(applied)
}

/// The migrations that the store still lacks.
pub async fn pending(settings: &config::Postgres) -> Result<Vec<&'static Migration>> {
    Ok(pending_of(&connect(settings).await?.client).await?.iter().collect())
}

/// Lets `role`, which owns nothing, use the tables; run as their owner.
pub async fn grants(settings: &config::Postgres, role: &str) -> Result<()> {
    let Single { client, .. } = &connect(settings).await?;
    let schema = simple(client, "SELECT current_schema()").await?;
    let schema = schema.first().map(|row| get::<Option<&str>>(row, 0)).transpose()?.flatten();
    run(client, &granting(schema.unwrap_or("public"), role)).await
}

fn granting(schema: &str, role: &str) -> String {
    let (schema, role) = (quote(schema), quote(role));
    let tables = TABLES.map(|table| format!("{schema}.{table}")).join(", ");
    let functions = FUNCTIONS.map(|function| format!("{schema}.{function}")).join(", ");
    format!(
        "GRANT USAGE ON SCHEMA {schema} TO {role};
         GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} TO {role};
         GRANT EXECUTE ON FUNCTION {functions} TO {role};
         GRANT SELECT ON {schema}.schema_migrations TO {role}"
    )
}

/// Who serves here without owning anything: whoever may write links.
const SERVING: &str = "SELECT DISTINCT current_schema()::text, r.rolname::text
  FROM pg_class c CROSS JOIN aclexplode(c.relacl) a JOIN pg_roles r ON r.oid = a.grantee
  WHERE c.oid = 'links'::regclass AND a.privilege_type = 'INSERT' AND a.grantee <> c.relowner";

const TABLES: [&str; 23] = [
    "settings",
    "domains",
    "links",
    "tags",
    "link_totals",
    "link_quotas",
    "quota_leases",
    "feed",
    "link_changes",
    "ranges",
    "api_keys",
    "worker_leases",
    "pins",
    "warm_requests",
    "warm_reports",
    "instances",
    "visits",
    "orphan_visits",
    "agents",
    "referrers",
    "spool_positions",
    "spool_drops",
    "link_days",
];
/// What the owner does for a role that owns nothing.
const FUNCTIONS: [&str; 3] = ["add_visit_day(integer)", "drop_visit_day(integer)", "index_visit_day(integer)"];

/// An identifier as SQL reads it, whatever is in it.
fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

async fn connect(settings: &config::Postgres) -> Result<Single> {
    let (key, url) = match (&settings.migrate_url, &settings.direct_url) {
        (Some(url), _) => ("postgres.migrate_url", url),
        (None, Some(url)) => ("postgres.direct_url", url),
        (None, None) => ("postgres.url", &settings.url),
    };
    Connector::new(key, url, settings)?.primary(&Arc::default()).connect(|| {}).await
}

async fn pending_of(client: &Client) -> Result<&'static [Migration]> {
    only_utf8(&simple(client, ENCODING).await?)?;
    if simple(client, HAS_MIGRATIONS).await?.is_empty() {
        return Ok(&MIGRATIONS);
    }
    let rows = simple(client, APPLIED).await.map_err(not_ours)?;
    schema::pending(&MIGRATIONS, &rows.iter().map(applied).collect::<Result<Vec<_>>>()?)
}

/// Of the answer to [`ENCODING`]. Any other encoding refuses what some visitor's browser says, with the batch it is in.
pub(super) fn only_utf8(rows: &[Row]) -> Result<()> {
    match rows.first().map(|row| get::<&str>(row, 0)).transpose()? {
        None | Some("UTF8") => Ok(()),
        Some(other) => Err(Error::Schema(format!(
            "the database's encoding is {other}, which does not have every character: choose one that was made with \
             ENCODING 'UTF8'"
        ))),
    }
}

/// Many programs have a table `schema_migrations`. 42703: a column of [`APPLIED`] is missing in it.
pub(super) fn not_ours(error: Error) -> Error {
    match error {
        Error::Schema(why) if why.contains("42703") => Error::Schema(
            "another program uses the database (its schema_migrations is not ours): choose one of waypost's own".into(),
        ),
        other => other,
    }
}

pub(super) fn applied(row: &Row) -> Result<Applied> {
    let compatible_from = get::<Option<i64>>(row, 2)?.and_then(|number| number.try_into().ok());
    Ok(Applied { number: super::number(row, 0)?, checksum: get(row, 1)?, compatible_from })
}

/// False if somebody else has applied it meanwhile. A lock that others hold is tried again: to wait in the queue of a
/// table would stop everybody who comes after us.
async fn apply(client: &Client, migration: &Migration) -> Result<bool> {
    let mut waited = Duration::ZERO;
    loop {
        let error = match limited(MIGRATION_MAX, async { Ok(attempt(client, migration).await) }).await? {
            Ok(applied) => return Ok(applied),
            Err(error) => error,
        };
        run(client, "ROLLBACK").await?;
        // 55P03: the lock was not to be had within `lock_timeout`.
        if code(&error) != Some("55P03") {
            return Err(match explain(&error) {
                Error::Broken(why) => Error::Broken(format!("migration {}: {why}", migration.number)),
                other => other,
            });
        }
        if waited >= LOCK_WAIT {
            return Err(Error::Unavailable(
                "another migration is under way, or a table in use: wait for its end and try again".into(),
            ));
        }
        tokio::time::sleep(LOCK_POLL).await;
        waited += LOCK_TIMEOUT + LOCK_POLL;
    }
}

/// In a transaction together with its mark; whatever is set and locked for it ends with it.
async fn attempt(client: &Client, migration: &Migration) -> std::result::Result<bool, tokio_postgres::Error> {
    let Migration { number, name, sql } = migration;
    let lock_timeout_ms = LOCK_TIMEOUT.as_millis();
    let begin = format!(
        "BEGIN; SET LOCAL lock_timeout = {lock_timeout_ms}; SET LOCAL client_min_messages = warning;
         SELECT pg_advisory_xact_lock({LOCK_NUMBER})"
    );
    client.batch_execute(&begin).await?;
    if *number == MIGRATIONS[0].number {
        client
            .batch_execute(
                "CREATE TABLE IF NOT EXISTS schema_migrations (number integer PRIMARY KEY, name text NOT NULL,
                   checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())",
            )
            .await?;
    }
    let mark = format!("SELECT 1 FROM schema_migrations WHERE number = {number}");
    let is_applied = !client.query_typed(&mark, &[]).await?.is_empty();
    if !is_applied {
        client.batch_execute(sql).await?;
        let mark = format!(
            "ALTER TABLE schema_migrations ADD COLUMN IF NOT EXISTS compatible_from integer;
             INSERT INTO schema_migrations (number, name, checksum, compatible_from)
               VALUES ({number}, '{name}', '{}', {COMPATIBLE_FROM})",
            migration.checksum()
        );
        client.batch_execute(&mark).await?;
        // With the last one: an instance that migrates at its start would else meet tables that its role may not read.
        if *number == MIGRATIONS[MIGRATIONS.len() - 1].number {
            for row in client.query_typed(SERVING, &[]).await? {
                client.batch_execute(&granting(row.try_get(0)?, row.try_get(1)?)).await?;
            }
        }
    }
    client.batch_execute("COMMIT").await?;
    Ok(!is_applied)
}

async fn run(client: &Client, sql: &str) -> Result<()> {
    limited(LOCK_WAIT, async { client.batch_execute(sql).await.map_err(|error| explain(&error)) }).await
}

async fn simple(client: &Client, sql: &str) -> Result<Vec<Row>> {
    limited(LOCK_WAIT, async { client.query_typed(sql, &[]).await.map_err(|error| explain(&error)) }).await
}
