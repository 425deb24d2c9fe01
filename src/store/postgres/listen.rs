//! Hints that something changed: `LISTEN`, on a connection of its own past any pooler.
//!
//! In: notifications. Out: a hint after one or more of them. Never: proves that nothing changed.
//! At its limit: notifications that come faster than they are taken are one hint; a server that is no longer the store is
//! left, also if it says nothing.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::errors::explain;
use super::fence::Fence;
use super::{Postgres, limited};
use crate::domain::time;
use crate::store::{Error, Result};

/// A connection that listens; it ends when this is dropped.
#[derive(Debug)]
pub struct Hints {
    hints: mpsc::Receiver<()>,
    fence: Arc<Fence>,
    made: Instant,
    /// Keeps the connection.
    _client: tokio_postgres::Client,
}

impl Postgres {
    /// None if there is no way past a pooler: `postgres.direct_url` would be one.
    pub async fn listen(&self) -> Result<Option<Hints>> {
        let Some(direct) = &self.inner.direct else { return Ok(None) };
        let (heard, hints) = mpsc::channel(1);
        let hear = move || {
            // A hint that nobody has taken yet says as much as two.
            let _ = heard.try_send(());
        };
        let client = direct.connect(hear).await?;
        let made = time::monotonic();
        let listening = async { client.batch_execute("LISTEN waypost").await.map_err(|error| explain(&error)) };
        limited(self.inner.statement_timeout, listening).await?;
        Ok(Some(Hints { hints, fence: Arc::clone(&self.inner.fence), made, _client: client }))
    }
}

impl Hints {
    /// Waits for a hint; an error once the connection is lost.
    pub async fn next(&mut self) -> Result<()> {
        let lost = || Error::Unavailable("the connection that listens was lost".into());
        tokio::select! {
            heard = self.hints.recv() => heard.ok_or_else(lost),
            () = self.fence.moves_on(self.made) => Err(lost()),
        }
    }
}
