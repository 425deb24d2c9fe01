//! `waypost serve`: the server's life, from its configuration to its last answer.

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::migrate::migrate_embedded;
use super::{Common, Failure, Outcome, configure, database, print, store_name};
use crate::accept::listener::{Listen, reachable};
use crate::app::{self, Running};
use crate::config::load::{Flags, Loaded};
use crate::domain::time;
use crate::guard::keys::{self, ApiKey, KeyRecord, Scope, Scopes};
use crate::http::route::Surface;
use crate::store::postgres::Postgres;
use crate::store::sqlite::Sqlite;
use crate::store::{self, Store};

#[derive(Debug, Args)]
pub struct Serve {
    /// Where to listen [default: 127.0.0.1:8080]; may be given several times
    #[arg(long, value_name = "ADDR")]
    listen: Vec<String>,
    /// What short links begin with [default: http:// and the first listener]
    #[arg(long, value_name = "URL")]
    base_url: Option<String>,
    /// Worker threads [default: one per core]
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// Let anybody shorten
    #[arg(long)]
    open: bool,
    /// Do what is refused without it: --open on a listener that others reach
    #[arg(long)]
    yes: bool,
}

pub fn run(serve: &Serve, common: &Common) -> Outcome {
    let flags = Flags {
        listen: serve.listen.clone(),
        base_url: serve.base_url.clone(),
        workers: serve.workers,
        open: serve.open,
        yes: serve.yes,
        ..Flags::default()
    };
    let loaded = configure(common, flags)?;
    crate::log::start(&loaded.config.log);
    app::abort_on_panic();
    app::refuse_huge_pages();
    app::raise_nofile();
    let runtime = tokio::runtime::Builder::new_multi_thread().thread_name(app::BACK).enable_all().build()?;
    let outcome = runtime.block_on(live(&loaded));
    // What still waits for a disk that hangs is not waited for.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

async fn live(loaded: &Loaded) -> Outcome {
    let config = &loaded.config;
    let file = loaded.file.as_ref().map_or("none".to_owned(), |file| file.display().to_string());
    // What the other commands say in a sentence; stderr has log lines alone here.
    tracing::info!(config = file, store = store_name(loaded), "starting");
    let key_file = config.data.join("admin.key");
    let store = match &config.postgres {
        // It may be away, and is migrated when it is there: see `app::opening`.
        Some(settings) => Store::Postgres(Postgres::open(settings)?),
        None => {
            let path = database(loaded);
            for migration in migrate_embedded(loaded)? {
                tracing::info!(number = migration.number, name = migration.name, "migrated");
            }
            let store = Store::Sqlite(Sqlite::open(&path)?);
            make_first_key(&store, &key_file).await?;
            store
        }
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    // Not the end of the process, as it would be without a handler.
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            tracing::warn!("SIGHUP: the configuration is read at the start alone, restart to read it anew");
        }
    });
    let running =
        app::start(config.clone(), store).await.map_err(|error| match error.downcast_ref::<store::Error>() {
            Some(store::Error::Schema(_)) => Failure::config(error),
            _ if error.is::<app::BadConfiguration>() => Failure::config(error),
            _ => error.into(),
        })?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        config = file,
        store = store_name(loaded),
        listeners = ?running.addresses.iter().map(|listen| listen.address.to_string()).collect::<Vec<_>>(),
        workers = running.instance.cores().count(),
        "started"
    );
    greet(&running, &key_file);
    app::notify(&[sd_notify::NotifyState::Ready]);
    let stop = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    running.serve(stop, config.shutdown.drain, config.shutdown.grace).await;
    tracing::info!("stopped");
    Ok(())
}

/// A new store gets an admin key; it lies in a file that only its owner reads, and is printed nowhere.
async fn make_first_key(store: &Store, file: &Path) -> anyhow::Result<()> {
    if !store.keys().await?.is_empty() {
        return Ok(());
    }
    let key = ApiKey::generate(&mut rand::rng());
    write_secret(file, &key.reveal()).with_context(|| format!("cannot write the admin key to {}", file.display()))?;
    store
        .add_key(KeyRecord {
            id: key.id.clone(),
            name: Some("first".to_owned()),
            digest: keys::digest(&key.secret),
            scopes: Scopes::of(&[Scope::Admin]),
            created_at: time::now(),
            expires_at: None,
            revoked_at: None,
            per_minute: None,
            last_used_at: None,
        })
        .await?;
    Ok(())
}

/// Writes a new file that only its owner reads: a mode counts when a file is made, so one that is there is not used.
fn write_secret(file: &Path, secret: &str) -> io::Result<()> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut out = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(file)?;
    writeln!(out, "{secret}")?;
    out.sync_all()
}

/// What a person needs to begin: where it listens, where the key lies, and a command that works when pasted.
fn greet(running: &Running, key_file: &Path) {
    for listen in &running.addresses {
        let what = match listen.surface {
            Surface::Everything => "",
            Surface::Public => " (redirects)",
            Surface::Api => " (API)",
        };
        print(&format!("waypost listens on http://{}{what}", listen.address));
    }
    let asked = |listen: &&Listen| listen.surface != Surface::Public && !listen.proxy_protocol;
    let Some(api) = running.addresses.iter().find(asked).map(|listen| reachable(listen.address)) else { return };
    if !key_file.exists() {
        print("a key for the API is made by `waypost key create --scope admin`");
        return;
    }
    print(&format!("the admin key lies in {}", key_file.display()));
    print(&format!(
        "shorten a first link:\n\n  curl -H \"Authorization: Bearer $(cat '{}')\" -H 'Content-Type: application/json' \\\n    \
         -d '{{\"original_url\": \"https://example.com/\"}}' http://{api}/shorten\n",
        key_file.display(),
    ));
}
