//! The schema of the Postgres store.
//!
//! In: a database, as a role that may make tables. Out: the same with every migration applied, each in a transaction
//! together with its mark, so that a stop in between loses nothing.
//! Never: runs beside another migration (a lock of its session); waits long for a table that others use.
//! At its limit: gives up after [`LOCK_WAIT`] as transient.

use std::time::Duration;

use tokio_postgres::{Client, Row};

use super::connect::Connector;
use super::errors::{code, explain};
use super::{get, limited};
use crate::config;
use crate::store::schema::{self, Applied, Migration};
use crate::store::{Error, Result};

pub const MIGRATIONS: [Migration; 1] =
    [Migration { number: 1, name: "links", sql: include_str!("../../../migrations/postgres/0001_links.sql") }];

pub(super) const APPLIED: &str = "SELECT number::int8, checksum FROM schema_migrations ORDER BY number";

/// How long another migration, or a table in use, is waited for.
const LOCK_WAIT: Duration = Duration::from_secs(60);
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
    let client = connect(settings).await?;
    lock(&client).await?;
    let pending = pending_of(&client).await?;
    run(&client, "SET lock_timeout = 1000; SET client_min_messages = warning").await?;
    if pending.len() == MIGRATIONS.len() {
        run(
            &client,
            "CREATE TABLE IF NOT EXISTS schema_migrations (number integer PRIMARY KEY, name text NOT NULL,
               checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())",
        )
        .await?;
    }
    for migration in pending {
        apply(&client, migration).await?;
    }
    // The lock ends with the connection.
    Ok(pending.iter().collect())
}

/// The migrations that the store still lacks.
pub async fn pending(settings: &config::Postgres) -> Result<Vec<&'static Migration>> {
    Ok(pending_of(&connect(settings).await?).await?.iter().collect())
}

/// Lets `role`, which owns nothing, use the tables; run as their owner.
pub async fn grants(settings: &config::Postgres, role: &str) -> Result<()> {
    let client = connect(settings).await?;
    let schema = simple(&client, "SELECT current_schema()").await?;
    let schema = schema.first().map(|row| get::<Option<&str>>(row, 0)).transpose()?.flatten();
    let (schema, role) = (quote(schema.unwrap_or("public")), quote(role));
    let tables = TABLES.map(|table| format!("{schema}.{table}")).join(", ");
    run(
        &client,
        &format!(
            "GRANT USAGE ON SCHEMA {schema} TO {role};
             GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} TO {role};
             GRANT SELECT ON {schema}.schema_migrations TO {role}"
        ),
    )
    .await
}

const TABLES: [&str; 15] = [
    "settings",
    "domains",
    "links",
    "tags",
    "link_totals",
    "link_quotas",
    "feed",
    "link_changes",
    "ranges",
    "api_keys",
    "worker_leases",
    "pins",
    "warm_requests",
    "warm_reports",
    "instances",
];

/// An identifier as SQL reads it, whatever is in it.
fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

async fn connect(settings: &config::Postgres) -> Result<Client> {
    let (key, url) = match (&settings.migrate_url, &settings.direct_url) {
        (Some(url), _) => ("postgres.migrate_url", url),
        (None, Some(url)) => ("postgres.direct_url", url),
        (None, None) => ("postgres.url", &settings.url),
    };
    Connector::new(key, url, settings)?.primary().connect(|| {}).await
}

async fn lock(client: &Client) -> Result<()> {
    let mut waited = Duration::ZERO;
    let sql = format!("SELECT pg_try_advisory_lock({LOCK_NUMBER})");
    while !get::<bool>(super::only(&simple(client, &sql).await?)?, 0)? {
        if waited >= LOCK_WAIT {
            return Err(Error::Unavailable("another migration is under way: wait for its end and try again".into()));
        }
        tokio::time::sleep(LOCK_POLL).await;
        waited += LOCK_POLL;
    }
    Ok(())
}

async fn pending_of(client: &Client) -> Result<&'static [Migration]> {
    if simple(client, HAS_MIGRATIONS).await?.is_empty() {
        return Ok(&MIGRATIONS);
    }
    let rows = simple(client, APPLIED).await?;
    schema::pending(&MIGRATIONS, &rows.iter().map(applied).collect::<Result<Vec<_>>>()?)
}

pub(super) fn applied(row: &Row) -> Result<Applied> {
    Ok(Applied { number: super::number(row, 0)?, checksum: get(row, 1)? })
}

/// In a transaction together with its mark. A table that others hold is tried again: to wait in its queue would stop
/// everybody who comes after us.
async fn apply(client: &Client, migration: &Migration) -> Result<()> {
    let sql = format!(
        "BEGIN; {} ; INSERT INTO schema_migrations (number, name, checksum) VALUES ({}, '{}', '{}'); COMMIT",
        migration.sql,
        migration.number,
        migration.name,
        migration.checksum()
    );
    let mut waited = Duration::ZERO;
    loop {
        let applied = async { Ok(client.batch_execute(&sql).await) };
        let Err(error) = limited(MIGRATION_MAX, applied).await? else { return Ok(()) };
        run(client, "ROLLBACK").await?;
        // 55P03: the lock was not to be had within `lock_timeout`.
        if code(&error) != Some("55P03") || waited >= LOCK_WAIT {
            return Err(match explain(&error) {
                Error::Broken(why) => Error::Broken(format!("migration {}: {why}", migration.number)),
                other => other,
            });
        }
        tokio::time::sleep(LOCK_POLL).await;
        waited += LOCK_POLL;
    }
}

async fn run(client: &Client, sql: &str) -> Result<()> {
    limited(LOCK_WAIT, async { client.batch_execute(sql).await.map_err(|error| explain(&error)) }).await
}

async fn simple(client: &Client, sql: &str) -> Result<Vec<Row>> {
    limited(LOCK_WAIT, async { client.query_typed(sql, &[]).await.map_err(|error| explain(&error)) }).await
}
