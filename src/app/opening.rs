//! Opening: what a server must know of its store before it can do everything, and how it starts without it.
//!
//! In: the configuration, a store that may be away, what the last run left in `DATA/warm`. Out: at once, or some time
//! later, the parts that make links; the numbers of the domains; where memory begins.
//! Never: starts on a store of another schema or of other codes, or makes links in one that comes later; serves a domain
//! whose number it does not know.
//! At its limit: a store that is away is asked again each second, for as long as the process lives. One that is slow is waited
//! for as long as it takes, or for [`PATIENCE`] where the last run's links are there to begin with.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context;
use tokio::task::JoinHandle;

use crate::codes::Strategy;
use crate::config::{self, Config};
use crate::domain::key::DomainId;
use crate::guard::targets::Policy;
use crate::links::Links;
use crate::links::worker_id::WorkerId;
use crate::resolve::value::StoredAsOf;
use crate::resolve::warm::Warm;
use crate::store::{self, Store, postgres};

const AGAIN: Duration = Duration::from_secs(1);
/// Opening asks some twenty times, one after the other: with 400 ms for each it took ten seconds.
const PATIENCE: Duration = Duration::from_secs(3);

type Opens = JoinHandle<store::Result<(Vec<DomainId>, StoredAsOf)>>;

/// What stays closed until the store was there once.
pub type Later = Arc<OnceLock<Arc<Links>>>;

/// What opening takes.
#[derive(Clone)]
pub struct Opening {
    pub store: Store,
    pub policy: Arc<Policy>,
    pub config: Arc<Config>,
    /// The name by which this instance leases.
    pub instance: String,
}

/// Where a server begins.
pub struct Opened {
    pub links: Later,
    /// Of the configured domains, in their order.
    pub domains: Vec<DomainId>,
    pub at: StoredAsOf,
    /// The store was there.
    pub complete: bool,
}

impl Opening {
    /// Opens what can be opened now. What the store has to say is waited for in the background if it is away.
    pub async fn start(self, snapshot: Option<&Warm>) -> anyhow::Result<Opened> {
        let links = Later::default();
        let mut opens = self.spawn(&links);
        let opened = match snapshot {
            Some(_) => tokio::time::timeout(PATIENCE, &mut opens).await.ok(),
            None => Some((&mut opens).await),
        };
        // Each step has a time-out of its own. A migration has none: killed half-way it would only begin again.
        let (error, opens) = match opened.transpose()? {
            Some(Ok((domains, at))) => return Ok(Opened { links, domains, at, complete: true }),
            Some(Err(error)) if error.is_transient() => (error.to_string(), None),
            Some(Err(error)) => return Err(error.into()),
            None => (format!("it takes more than {} s", PATIENCE.as_secs()), Some(opens)),
        };
        let domains = self.known_domains(snapshot).with_context(|| error.clone())?;
        tracing::warn!(
            dependency = "store",
            %error,
            links = snapshot.map_or(0, |warm| warm.entries.len()),
            "the store is away: starting with the links of the last run"
        );
        let (later, known) = (Arc::clone(&links), domains.clone());
        super::vital(tokio::spawn(async move { self.go_on(opens, &later, &known).await }));
        let at = snapshot.map_or(StoredAsOf { generation: 0, position: 0 }, |warm| warm.about.as_of);
        Ok(Opened { links, domains, at, complete: false })
    }

    /// `opens`: what is under way already.
    async fn go_on(&self, mut opens: Option<Opens>, links: &Later, known: &[DomainId]) {
        let mut said = String::new();
        loop {
            let opens = match opens.take() {
                Some(opens) => opens,
                None => {
                    tokio::time::sleep(AGAIN).await;
                    self.spawn(links)
                }
            };
            let Ok(opened) = opens.await else { return };
            match opened {
                Ok((domains, _)) if domains == known => {
                    return tracing::info!(dependency = "store", "the store is there: links can be made");
                }
                Ok(_) => {
                    tracing::error!("the store numbers the domains otherwise than the last run knew: starting anew");
                    // Each answer would be of another domain. The next start asks the store first.
                    std::process::abort();
                }
                Err(error) if error.is_transient() => {}
                // A person has to act, and the links in memory are served meanwhile.
                Err(error) => {
                    let text = error.to_string();
                    if text != said {
                        tracing::error!(dependency = "store", %error, "the store cannot be used");
                        said = text;
                    }
                }
            }
        }
    }

    fn spawn(&self, later: &Later) -> Opens {
        let (this, later) = (self.clone(), Arc::clone(later));
        tokio::spawn(async move { this.open(&later).await })
    }

    async fn open(&self, later: &Later) -> store::Result<(Vec<DomainId>, StoredAsOf)> {
        if let (Store::Postgres(postgres), Some(settings)) = (&self.store, &self.config.postgres) {
            if settings.migrate == config::Migrate::Auto {
                for migration in postgres::migrate(settings).await? {
                    tracing::info!(number = migration.number, name = migration.name, "migrated");
                }
            }
            postgres.check_schema().await?;
        }
        let hosts: Vec<String> = self.config.domains.iter().map(|domain| domain.host.clone()).collect();
        let domains = self.store.number_domains(hosts).await?;
        let worker_id = match self.config.codes.strategy {
            Strategy::Snowflake => {
                let leased = WorkerId::lease(self.store.clone(), self.instance.clone(), &self.config.codes).await?;
                Some(Arc::new(leased))
            }
            Strategy::Random | Strategy::Permuted => None,
        };
        let codes = self.config.codes.clone();
        let links = Links::open(self.store.clone(), Arc::clone(&self.policy), codes, worker_id.clone()).await?;
        let position = self.store.position().await?;
        // Last: a lease that nobody uses ends by itself, a keeper would not.
        if let Some(worker_id) = worker_id {
            super::vital(tokio::spawn(async move { worker_id.run().await }));
        }
        let _ = later.set(Arc::new(links));
        Ok((domains, StoredAsOf { generation: position.generation, position: position.version }))
    }

    /// The numbers of the configured domains as the last run knew them.
    fn known_domains(&self, snapshot: Option<&Warm>) -> anyhow::Result<Vec<DomainId>> {
        let known = snapshot.map_or(&[][..], |warm| &warm.about.domains);
        let number = |domain: &config::Domain| {
            let known = known.iter().find(|(_, host)| *host == domain.host).map(|(id, _)| *id);
            known.with_context(|| format!("the domain {} has no number yet, which the store gives", domain.host))
        };
        self.config.domains.iter().map(number).collect()
    }
}
