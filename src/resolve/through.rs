//! Write-through: what was just created is in Redis before another instance is asked for it.
//!
//! In: keys that were created a moment ago. Out: their links in Redis.
//! Never: holds up the create; writes what it has not read from the store, with where the feed stood before: thus
//! a link that somebody else edits at the same moment is never there as it was created.
//! At its limit: [`WAITING_MAX`] keys wait; a further one is left to whoever asks for it first.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::tier::Remote;
use super::{Memory, Share};
use crate::domain::key::Key;
use crate::store::Store;
use crate::store::row::Found;

const WAITING_MAX: usize = 4096;

/// Where creates are told.
#[derive(Clone, Debug)]
pub struct Through(mpsc::Sender<Key>);

impl Through {
    /// Where creates are told, and the task that writes.
    pub fn start(memory: Arc<Memory>, store: Store, remote: Remote, share: Share) -> (Self, impl Future<Output = ()>) {
        let (sender, mut created) = mpsc::channel(WAITING_MAX);
        let run = async move {
            let mut keys = Vec::new();
            while created.recv_many(&mut keys, share.keys_max).await > 0 {
                let _taken = share.take(keys.len()).await;
                let as_of = memory.feed.now().stored;
                // A store that fails now is noticed by those who need it.
                if let Ok(found) = store.look_up(keys.clone()).await {
                    for (key, found) in keys.iter().zip(found) {
                        if let Found::Entry(entry) = found {
                            remote.put(key, &entry, as_of);
                        }
                    }
                }
                keys.clear();
            }
        };
        (Self(sender), run)
    }

    /// A link was created.
    pub fn created(&self, key: Key) {
        let _ = self.0.try_send(key);
    }
}
