//! `waypost config`: whether the configuration is right, and what it comes to.
//!
//! In: the configuration's layers. Out: `ok`, or every error, a line each; or the effective values and where each one
//! comes from. Never: opens a store; shows a secret.

use clap::{Args, Subcommand};

use super::{Common, Failure, Outcome, announce, base_url, configure, print};
use crate::app;
use crate::config::load::{self, Flags};

#[derive(Debug, Args)]
pub struct Configuration {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Say "ok", or everything that is wrong
    Check,
    /// Print the effective configuration as TOML, with where each value comes from
    Print,
}

pub fn run(config: &Configuration, common: &Common) -> Outcome {
    let loaded = configure(common, Flags::default())?;
    announce(&loaded);
    match config.action {
        Action::Check => {
            // The block list is read where it is used, and not before.
            app::policy(&loaded.config, &base_url(&loaded.config)).map_err(Failure::config)?;
            match (&loaded.file, common.json) {
                (file, true) => print(&serde_json::json!({"ok": true, "file": file}).to_string()),
                (Some(file), false) => print(&format!("ok: {}", file.display())),
                (None, false) => print("ok: no configuration file, environment and defaults alone"),
            }
        }
        Action::Print => {
            let text = load::print(&loaded);
            if common.json {
                let values: toml::Value = toml::from_str(&text)?;
                print(&serde_json::to_string(&values)?);
            } else {
                print(text.trim());
            }
        }
    }
    Ok(())
}
