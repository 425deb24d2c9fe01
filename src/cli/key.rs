//! `waypost key`: the API keys of the store.
//!
//! In: scopes, a name, an end; or an id. Out: a new key, once and alone on stdout; or the list of keys, without secrets.
//! Never: stores a secret; shows one again; deletes the record of a key.

use anyhow::anyhow;
use clap::{Args, Subcommand};
use serde_json::json;

use super::{Common, Failure, Outcome, block_on, print, say, start, table};
use crate::domain::time::{self, UnixMillis};
use crate::guard::keys::{self, ApiKey, BadScopes, KeyRecord, Scopes};
use crate::links::{moment, rfc3339};
use crate::store::Store;

const NAME_CHARS_MAX: usize = 200;

#[derive(Debug, Args)]
pub struct Key {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make a key and print it, this once
    Create(Create),
    /// List all keys, without their secrets
    List,
    /// End a key's life; servers refuse it from its next request on
    Revoke {
        /// The first part of the key, after wp_
        id: String,
    },
}

#[derive(Debug, Args)]
struct Create {
    /// What it may do: links:read, links:write, stats:read, admin; several with commas
    #[arg(long, value_name = "SCOPE[,SCOPE]", value_parser = scopes)]
    scope: Scopes,
    /// What people call it
    #[arg(long, value_parser = name)]
    name: Option<String>,
    /// When it ends: 90d, 2027-01-31, 2027-01-31T09:00:00+01:00 [default: never]
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
    /// Requests in a minute [default: limits.key_per_minute]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    per_minute: Option<u32>,
}

fn scopes(list: &str) -> Result<Scopes, BadScopes> {
    Scopes::parse(list)
}

fn name(text: &str) -> Result<String, String> {
    if text.chars().count() > NAME_CHARS_MAX || text.contains(char::is_control) {
        return Err(format!("a name has at most {NAME_CHARS_MAX} characters, none of them a control character"));
    }
    Ok(text.to_owned())
}

pub fn run(key: &Key, common: &Common) -> Outcome {
    let now = time::now();
    match &key.action {
        Action::Create(create) => {
            let expires_at = create.expires.as_deref().map(|end| end_of_life(end, now)).transpose()?;
            block_on(async { make(&start(common).await?.1, create, expires_at, now, common.json).await })
        }
        Action::List => block_on(async { list(&start(common).await?.1, now, common.json).await }),
        Action::Revoke { id } => block_on(async { revoke(&start(common).await?.1, id, now, common.json).await }),
    }
}

fn end_of_life(text: &str, now: UnixMillis) -> Result<UnixMillis, Failure> {
    let end = moment("--expires", text, Some(now)).map_err(Failure::usage)?;
    if end <= now {
        return Err(Failure::usage(anyhow!("--expires: {} is over: choose a later time", rfc3339(end))));
    }
    Ok(end)
}

async fn make(
    store: &Store,
    create: &Create,
    expires_at: Option<UnixMillis>,
    now: UnixMillis,
    as_json: bool,
) -> Outcome {
    let key = ApiKey::generate(&mut rand::rng());
    let record = KeyRecord {
        id: key.id.clone(),
        name: create.name.clone().filter(|name| !name.is_empty()),
        digest: keys::digest(&key.secret),
        scopes: create.scope,
        created_at: now,
        expires_at,
        revoked_at: None,
        per_minute: create.per_minute,
        last_used_at: None,
    };
    store.add_key(record.clone()).await?;
    say("the key is shown this once: keep it");
    if as_json {
        let mut json = describe(&record, now);
        json["key"] = key.reveal().into();
        print(&json.to_string());
    } else {
        print(&key.reveal());
    }
    Ok(())
}

fn state(key: &KeyRecord, now: UnixMillis) -> &'static str {
    match key.revoked_at {
        Some(_) => "revoked",
        None if key.valid(now) => "valid",
        None => "expired",
    }
}

fn describe(key: &KeyRecord, now: UnixMillis) -> serde_json::Value {
    json!({
        "id": key.id,
        "name": key.name,
        "scopes": key.scopes.iter().map(|scope| scope.name()).collect::<Vec<_>>(),
        "created_at": rfc3339(key.created_at),
        "expires_at": key.expires_at.map(rfc3339),
        "revoked_at": key.revoked_at.map(rfc3339),
        "last_used_at": key.last_used_at.map(rfc3339),
        "per_minute": key.per_minute,
        "state": state(key, now),
    })
}

async fn list(store: &Store, now: UnixMillis, as_json: bool) -> Outcome {
    let keys = store.keys().await?;
    if as_json {
        let keys: Vec<_> = keys.iter().map(|key| describe(key, now)).collect();
        print(&json!(keys).to_string());
        return Ok(());
    }
    let heads = ["ID", "NAME", "SCOPES", "CREATED", "EXPIRES", "LAST USED", "STATE"];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    let or_never = |at: Option<UnixMillis>| at.map_or("never".to_owned(), rfc3339);
    rows.extend(keys.iter().map(|key| {
        vec![
            key.id.clone(),
            key.name.clone().unwrap_or_else(|| "-".to_owned()),
            key.scopes.iter().map(|scope| scope.name()).collect::<Vec<_>>().join(","),
            rfc3339(key.created_at),
            or_never(key.expires_at),
            or_never(key.last_used_at),
            state(key, now).to_owned(),
        ]
    }));
    print(&table(&rows));
    Ok(())
}

async fn revoke(store: &Store, id: &str, now: UnixMillis, as_json: bool) -> Outcome {
    // A whole key is understood, and its secret is not repeated.
    let id = ApiKey::parse(id).map_or_else(|| id.to_owned(), |key| key.id);
    let revoked = store.revoke_key(id.clone(), now).await?;
    let key = store.key(id.clone()).await?;
    let key = key.ok_or_else(|| anyhow!("there is no key {id}: `waypost key list` shows all"))?;
    match (as_json, revoked) {
        (true, _) => print(&describe(&key, now).to_string()),
        (false, true) => print(&format!("{id} is revoked")),
        (false, false) => {
            print(&format!("{id} was revoked before, at {}", key.revoked_at.map_or_else(String::new, rfc3339)))
        }
    }
    Ok(())
}
