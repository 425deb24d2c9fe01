//! `waypost migrate`: makes the store, or brings its schema up to date.
//!
//! In: the configured store. Out: the migrations that it has, that were applied, or that would be.
//! Never: touches a link; makes anything with `--dry-run` or `--status`; makes a role or a database of Postgres, which are
//! its administrator's.

use anyhow::anyhow;
use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use serde_json::json;

use super::{Common, Failure, Outcome, announce, block_on, configure, database, print, store_name, visits_database};
use crate::config::load::{Flags, Loaded};
use crate::store::schema::Migration;
use crate::store::{self, postgres, sqlite};
use crate::visits::sink::sqlite as visits;

#[derive(Debug, Args)]
pub struct Migrate {
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// List all migrations, and which ones the store has; do nothing
    #[arg(long, conflicts_with_all = ["dry_run", "grants"])]
    status: bool,
    /// Let this role of Postgres serve: it may read and write the tables, and owns none
    #[arg(long, value_name = "ROLE", value_parser = NonEmptyStringValueParser::new())]
    grants: Option<String>,
}

pub fn run(migrate: &Migrate, common: &Common) -> Outcome {
    let loaded = configure(common, Flags::default())?;
    announce(&loaded);
    if migrate.grants.is_some() && loaded.config.postgres.is_none() {
        return Err(Failure::usage(anyhow!(
            "--grants: the embedded store has no roles, who may read its folder may read it: name a Postgres with --postgres"
        )));
    }
    block_on(async {
        let (all, pending) = read(&loaded).await?;
        let existed = pending.len() < all.len();
        let changes = !migrate.dry_run && !migrate.status;
        let lacked = if changes { apply(&loaded).await? } else { pending };
        if let (Some(role), Some(config), true) = (&migrate.grants, &loaded.config.postgres, changes) {
            postgres::grants(config, role).await?;
        }
        let had: Vec<&Migration> =
            all.into_iter().filter(|migration| lacked.iter().all(|other| other.name != migration.name)).collect();
        let text = if common.json {
            let list = |migrations: &[&Migration]| -> Vec<_> {
                migrations.iter().map(|migration| json!({"number": migration.number, "name": migration.name})).collect()
            };
            let names = if changes { ("had", "applied") } else { ("has", "pending") };
            let mut object = json!({
                "store": store_name(&loaded), "existed": existed, names.0: list(&had), names.1: list(&lacked),
            });
            if let Some(role) = &migrate.grants {
                object[if changes { "granted" } else { "would_grant" }] = json!(role);
            }
            object.to_string()
        } else {
            migrate.report(&store_name(&loaded), existed, &had, &lacked)
        };
        print(&text);
        Ok(())
    })
}

/// All migrations that the configured store can have, and those that it lacks. The embedded store is two files.
async fn read(loaded: &Loaded) -> store::Result<(Vec<&'static Migration>, Vec<&'static Migration>)> {
    if let Some(config) = &loaded.config.postgres {
        return Ok((postgres::MIGRATIONS.iter().collect(), postgres::pending(config).await?));
    }
    let links = sqlite::pending(&database(loaded))?;
    let of_visits = visits::pending(&visits_database(loaded))?;
    let all = sqlite::MIGRATIONS.iter().chain(&visits::MIGRATIONS).collect();
    Ok((all, links.iter().chain(of_visits).collect()))
}

/// Returns what was applied: another process may have been faster with the rest.
async fn apply(loaded: &Loaded) -> store::Result<Vec<&'static Migration>> {
    match &loaded.config.postgres {
        Some(config) => postgres::migrate(config).await,
        None => migrate_embedded(loaded),
    }
}

/// Makes both files of the embedded store, or brings them up to date.
pub(super) fn migrate_embedded(loaded: &Loaded) -> store::Result<Vec<&'static Migration>> {
    let mut applied = sqlite::migrate(&database(loaded))?;
    applied.extend(visits::migrate(&visits_database(loaded))?);
    Ok(applied)
}

impl Migrate {
    fn report(&self, store: &str, existed: bool, had: &[&Migration], lacked: &[&Migration]) -> String {
        let lines = |verb: &str, migrations: &[&Migration]| -> Vec<String> {
            migrations
                .iter()
                .map(|migration| format!("{verb} migration {} ({})", migration.number, migration.name))
                .collect()
        };
        let mut text = match (self.status, self.dry_run) {
            (true, _) => [lines("applied", had), lines("pending", lacked)].concat(),
            (false, true) => lines("would apply", lacked),
            (false, false) => lines("applied", lacked),
        };
        if !existed && (self.status || self.dry_run) {
            text.insert(0, format!("there is no store at {store}"));
        }
        if text.is_empty() {
            text.push("the schema is up to date".to_owned());
        }
        if let Some(role) = &self.grants {
            let verb = if self.dry_run { "would grant" } else { "granted" };
            text.push(format!("{verb} {role} what a server needs"));
        }
        text.join("\n")
    }
}
