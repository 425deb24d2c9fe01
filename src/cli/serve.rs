//! `waypost serve`: the server's life, from its configuration to its last answer.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::Context;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::{Common, Failure, Outcome, configure, database, print};
use crate::app::{self, Running};
use crate::config::load::{Flags, Loaded};
use crate::domain::time;
use crate::guard::keys::{self, ApiKey, KeyRecord, Scope, Scopes};
use crate::http::route::Surface;
use crate::store::Store;
use crate::store::sqlite::{self, Sqlite};

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
    app::raise_nofile();
    let runtime = tokio::runtime::Builder::new_multi_thread().thread_name("waypost-back").enable_all().build()?;
    runtime.block_on(live(&loaded))
}

async fn live(loaded: &Loaded) -> Outcome {
    let config = &loaded.config;
    let path = database(loaded);
    for migration in sqlite::migrate(&path).map_err(Failure::config)? {
        tracing::info!(number = migration.number, name = migration.name, "migrated");
    }
    let store = Store::Sqlite(Sqlite::open(&path)?);
    let key_file = config.data.join("admin.key");
    make_first_key(&store, &key_file).await?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    // Not the end of the process, as it would be without a handler.
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            tracing::warn!("SIGHUP: the configuration is read at the start alone, restart to read it anew");
        }
    });
    let running = app::start(config.clone(), store).await?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        config = loaded.file.as_ref().map_or("none".to_owned(), |file| file.display().to_string()),
        store = %path.display(),
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
    let mut out = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(file)
        .with_context(|| format!("cannot write the admin key to {}", file.display()))?;
    writeln!(out, "{}", key.reveal())?;
    out.sync_all()?;
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
    let Some(api) = running.addresses.iter().find(|listen| listen.surface != Surface::Public) else { return };
    let host = if api.address.ip().is_unspecified() { "127.0.0.1".to_owned() } else { host_of(api.address.ip()) };
    print(&format!("the admin key lies in {}", key_file.display()));
    print(&format!(
        "shorten a first link:\n\n  curl -H \"Authorization: Bearer $(cat '{}')\" -H 'Content-Type: application/json' \\\n    \
         -d '{{\"original_url\": \"https://example.com/\"}}' http://{host}:{}/shorten\n",
        key_file.display(),
        api.address.port()
    ));
}

fn host_of(address: std::net::IpAddr) -> String {
    if address.is_ipv6() { format!("[{address}]") } else { address.to_string() }
}
