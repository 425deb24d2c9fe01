//! Redis as a tier: between the memory of this process and the store.
//!
//! In: keys; entries that were read from the store or just written to it, and where its feed stood then. Out: entries
//! with where the feed stood; whoever asked decides whether they are believed.
//! Never: answers with anything but what was put there whole (see [`value`]); keeps absences or links with a limit.
//! At its limit: what does not fit into the queue of writes is dropped, and read from the store once more.

use std::io::Write;

use super::value::{self, StoredAsOf};
use crate::domain::key::Key;
use crate::domain::link::Entry;
use crate::redis::Redis;

#[derive(Clone, Debug)]
pub struct Remote {
    redis: Redis,
    /// What the keys of links begin with.
    prefix: String,
}

impl Remote {
    #[must_use]
    pub fn new(redis: Redis) -> Self {
        Self { prefix: format!("{}l:", redis.prefix()), redis }
    }

    /// `waypost:l:` + the domain's number + `:` + code.
    fn name(&self, key: &Key) -> Vec<u8> {
        let mut name = self.prefix.clone().into_bytes();
        write!(name, "{}:{}", key.domain.0, key.code).expect("a vector takes everything");
        name
    }

    /// What Redis has of `keys`, in their order; none if it does not answer.
    pub async fn get(&self, keys: &[Key]) -> Option<Vec<Option<(StoredAsOf, Entry)>>> {
        let names: Vec<Vec<u8>> = keys.iter().map(|key| self.name(key)).collect();
        let found = self.redis.get_many(&names).await?;
        let decode = |bytes: Vec<u8>| {
            let value = value::decode(&bytes);
            if value.is_none() {
                self.redis.count_garbage();
            }
            value
        };
        Some(found.into_iter().map(|bytes| bytes.and_then(decode)).collect())
    }

    /// Leaves an entry there, some time soon.
    pub fn put(&self, key: &Key, entry: &Entry, as_of: StoredAsOf) {
        // Each visit of a limited link is granted by the store, which is asked all the same.
        if !entry.rules.limited {
            self.redis.set(self.name(key), value::encode(entry, as_of));
        }
    }
}
