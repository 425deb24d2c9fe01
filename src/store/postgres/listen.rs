//! Hints that something changed: `LISTEN`, on a connection of its own past any pooler.
//!
//! In: notifications. Out: a hint after one or more of them. Never: proves that nothing changed.
//! At its limit: notifications that come faster than they are taken are one hint; a server that is no longer the store is
//! left, also if it says nothing.

use tokio::sync::mpsc;

use super::connect::Single;
use super::errors::explain;
use super::{Postgres, limited};
use crate::store::{Error, Result};

/// A connection that listens; it ends when this is dropped.
#[derive(Debug)]
pub struct Hints {
    hints: mpsc::Receiver<()>,
    connection: Single,
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
        let connection = direct.connect(hear).await?;
        let listening =
            async { connection.client.batch_execute("LISTEN waypost").await.map_err(|error| explain(&error)) };
        limited(self.inner.statement_timeout, listening).await?;
        Ok(Some(Hints { hints, connection }))
    }
}

impl Hints {
    /// Waits for a hint; an error once the connection is lost.
    pub async fn next(&mut self) -> Result<()> {
        let lost = || Error::Unavailable("the connection that listens was lost".into());
        tokio::select! {
            heard = self.hints.recv() => heard.ok_or_else(lost),
            () = self.connection.admission.ends() => Err(lost()),
        }
    }
}
