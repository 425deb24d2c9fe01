//! `waypost migrate`: makes the store, or brings its schema up to date.
//!
//! In: the folder of the store. Out: the migrations that it has, that were applied, or that would be.
//! Never: touches a link; makes anything with `--dry-run` or `--status`.

use clap::Args;
use serde_json::json;

use super::{Common, Failure, Outcome, announce, configure, database, print};
use crate::config::load::Flags;
use crate::store::schema::Migration;
use crate::store::sqlite::{self, MIGRATIONS};

#[derive(Debug, Args)]
pub struct Migrate {
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// List all migrations, and which ones the store has; do nothing
    #[arg(long)]
    status: bool,
}

pub fn run(migrate: &Migrate, common: &Common) -> Outcome {
    let loaded = configure(common, Flags::default())?;
    announce(&loaded);
    let path = database(&loaded);
    let exists = path.exists();
    let pending: &[Migration] = if exists { sqlite::pending(&path).map_err(Failure::store)? } else { &MIGRATIONS };
    let is_pending = |migration: &Migration| pending.iter().any(|other| other.number == migration.number);
    let lines = |verb: &str, migrations: &[Migration]| -> Vec<String> {
        migrations
            .iter()
            .map(|migration| format!("{verb} migration {} ({})", migration.number, migration.name))
            .collect()
    };
    let changed = !migrate.dry_run && !migrate.status;
    if changed {
        sqlite::migrate(&path).map_err(Failure::store)?;
    }
    if common.json {
        let list = |wanted: bool| -> Vec<_> {
            let wanted = MIGRATIONS.iter().filter(|migration| is_pending(migration) == wanted);
            wanted.map(|migration| json!({"number": migration.number, "name": migration.name})).collect()
        };
        let (had, lacked) = (list(false), list(true));
        let names = if changed { ("had", "applied") } else { ("has", "pending") };
        print(&json!({"store": path, "existed": exists, names.0: had, names.1: lacked}).to_string());
        return Ok(());
    }
    let had = &MIGRATIONS[..MIGRATIONS.len() - pending.len()];
    let mut text = match (migrate.status, changed) {
        (true, _) => [lines("applied", had), lines("pending", pending)].concat(),
        (false, true) => lines("applied", pending),
        (false, false) => lines("would apply", pending),
    };
    if !exists && !changed {
        text.insert(0, format!("there is no store at {}", path.display()));
    }
    if text.is_empty() {
        text.push("the schema is up to date".to_owned());
    }
    print(&text.join("\n"));
    Ok(())
}
