//! What goes into a store and comes out of it, beside links and entries.

use crate::domain::key::{Case, Code, DomainId, Key};
use crate::domain::link::{Entry, Fields, Link, LinkId};
use crate::domain::target::Target;
use crate::domain::time::UnixMillis;

/// A link to be inserted.
#[derive(Clone, Debug)]
pub struct NewLink {
    pub id: LinkId,
    pub key: Key,
    pub fields: Fields,
    /// What [`OnConflict::Update`] changes: of `fields`, those that were given.
    pub given: Patch,
    pub created_at: UnixMillis,
    pub imported_clicks: u64,
    pub on_conflict: OnConflict,
}

/// What happens to a link whose code is taken by one that is not deleted. A deleted link's code is free
/// for those who ask for it by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnConflict {
    /// It is [`Inserted::Taken`], also when the link that has it is deleted: of generated codes.
    Refuse,
    /// It is [`Inserted::Taken`], unless the link that has it is deleted.
    Take,
    /// What was given replaces that of the link that has it; its other fields stay.
    Update,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Inserted {
    Created,
    Updated,
    Taken,
    /// It was not made, or nobody knows whether it was, and why; other links of the same call were made.
    Failed(String),
}

/// A change of one link.
#[derive(Clone, Debug)]
pub enum Change {
    Edit(Box<Patch>),
    Disable,
    Enable,
    Delete,
}

impl Change {
    /// Makes the change; returns what the history calls it.
    pub fn apply(&self, link: &mut Link, now: UnixMillis) -> &'static str {
        match self {
            Self::Edit(patch) => {
                patch.apply(&mut link.fields);
                "edit"
            }
            Self::Disable => {
                link.disabled_at = link.disabled_at.or(Some(now));
                "disable"
            }
            Self::Enable => {
                link.disabled_at = None;
                "enable"
            }
            Self::Delete => {
                link.deleted_at = Some(now);
                "delete"
            }
        }
    }
}

/// New values of some fields; `Some(None)` clears one.
#[derive(Clone, Debug, Default)]
pub struct Patch {
    /// As written, and as it goes into `Location`.
    pub target: Option<(String, Target)>,
    pub status: Option<Option<u16>>,
    pub cache_control: Option<Option<String>>,
    pub title: Option<Option<String>>,
    pub tags: Option<Vec<String>>,
    pub note: Option<Option<String>>,
    pub starts_at: Option<Option<UnixMillis>>,
    pub expires_at: Option<Option<UnixMillis>>,
    pub expired_url: Option<Option<Target>>,
    pub max_visits: Option<Option<u64>>,
    pub forward_query: Option<Option<bool>>,
}

impl Patch {
    pub fn apply(&self, fields: &mut Fields) {
        fn set<T: Clone>(field: &mut T, value: &Option<T>) {
            if let Some(value) = value {
                field.clone_from(value);
            }
        }
        if let Some((written, target)) = &self.target {
            fields.target_written.clone_from(written);
            fields.target = target.clone();
        }
        set(&mut fields.status, &self.status);
        set(&mut fields.cache_control, &self.cache_control);
        set(&mut fields.title, &self.title);
        set(&mut fields.tags, &self.tags);
        set(&mut fields.note, &self.note);
        set(&mut fields.starts_at, &self.starts_at);
        set(&mut fields.expires_at, &self.expires_at);
        set(&mut fields.expired_url, &self.expired_url);
        set(&mut fields.max_visits, &self.max_visits);
        set(&mut fields.forward_query, &self.forward_query);
    }
}

/// What is asked of a limited link's quota, by one process at a time: all that it leased before it settles with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaAsk {
    pub key: Key,
    pub id: LinkId,
    /// Visits to be leased; 0: it only settles.
    pub wanted: u32,
    /// Visitors who wait for one. A store of one process leases none: it grants as many as wait.
    pub waiting: u32,
    /// The number of the lease, drawn at random, below 2^63.
    pub lease: u64,
    pub settled: Vec<Settled>,
}

/// A lease that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settled {
    pub lease: u64,
    /// What is left of it; more than was granted stands for all of it.
    pub rest: u32,
}

/// What came of a [`QuotaAsk`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// They count as used. Of what is `leased` the rest is taken back when it is settled; else what is not spent is lost.
    Visits { count: u32, leased: bool },
    /// None is left but what others hold, who may give some back.
    Held,
    /// None is left, or none was wanted.
    UsedUp,
}

/// What a look-up found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    Entry(Entry),
    Missing,
    /// There is a row, and it is no link.
    Unreadable,
}

/// A line of the feed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChangeRow {
    pub version: u64,
    pub key: Key,
    /// There was no link before it, so no cache has one.
    pub created: bool,
}

/// Where the store stands; one row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Of the last committed change.
    pub version: u64,
    /// Grows when the store was put back or its timeline changed: versions and leased numbers may then come again.
    pub generation: u64,
    /// Grows with each request to warm and each change of the pins.
    pub asked: u64,
}

/// A worker id and the milliseconds that its holder may use in snowflakes, `from_ms ..= until_ms`. Whoever leases
/// the id next begins past them, so that no clock can make two snowflakes alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerLease {
    pub worker_id: u16,
    /// Grows each time that the id is leased: who has an older one has lost it.
    pub epoch: u64,
    pub from_ms: u64,
    pub until_ms: u64,
}

/// How far a new generation moves every worker id past what is stored and past the present, in milliseconds: a day. Leases
/// that were lost with the last transactions reach no further.
pub const LEASES_LOST_MS: u64 = 86_400_000;

/// How far a new generation moves the ids of links past what is stored. Ids that were given in the lost transactions reach no
/// further: visits have them, in the spools of instances and in their memory, and would be another link's.
pub const IDS_LOST: u64 = 1 << 32;

/// Links that are to be in memory.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WarmWhat {
    /// Each as its domain's number and code.
    Codes(Vec<(u16, String)>),
    Tag(String),
    /// The most visited, by clicks, tools and what an import brought along.
    Top(u32),
}

impl WarmWhat {
    /// The keys of [`WarmWhat::Codes`], at most `limit`. What is no code has no link.
    #[must_use]
    pub fn keys(codes: &[(u16, String)], limit: u32) -> Vec<Key> {
        let parsed = |(domain, code): &(u16, String)| {
            let code = Code::parse(code.as_bytes(), Case::Sensitive).ok()?;
            Some(Key { domain: DomainId(*domain), code })
        };
        codes.iter().filter_map(parsed).take(limit as usize).collect()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WarmRequest {
    pub number: u64,
    pub what: WarmWhat,
}

/// What an instance made of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WarmReport {
    pub instance: String,
    pub loaded: u64,
    /// Codes that there are no links of.
    pub missing: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceRow {
    pub instance: String,
    pub seen_at: UnixMillis,
}

/// What moves to another store beside links.
#[derive(Clone, Debug, Default)]
pub struct Rest {
    /// Names this store among all.
    pub store_id: String,
    pub generation: u64,
    pub version: u64,
    /// Links, deleted ones included.
    pub links: u64,
    pub settings: Vec<(String, Vec<u8>)>,
    pub domains: Vec<(DomainId, String)>,
    /// Names and the next number of each.
    pub ranges: Vec<(String, u64)>,
    pub keys: Vec<crate::guard::keys::KeyRecord>,
    pub pins: Vec<Key>,
}

/// Whether a reading must see what was just written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// From the primary.
    Now,
    /// From a standby, if there is one that is not too far behind.
    Lately,
}

/// Which links a listing or an export has. The default is all that are not deleted.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// A part of the code, the target or the title, in any case of ASCII letters.
    pub search: Option<String>,
    pub tag: Option<String>,
    pub domain: Option<DomainId>,
}

/// A link as the history keeps it.
#[must_use]
pub fn history(link: &Link) -> String {
    let fields = &link.fields;
    serde_json::json!({
        "id": link.id.0.to_string(),
        "target_url": fields.target_written,
        "status": fields.status,
        "cache_control": fields.cache_control,
        "title": fields.title,
        "tags": fields.tags,
        "note": fields.note,
        "starts_at": fields.starts_at.map(|at| at.0),
        "expires_at": fields.expires_at.map(|at| at.0),
        "expired_url": fields.expired_url.as_ref().map(Target::as_str),
        "max_visits": fields.max_visits,
        "forward_query": fields.forward_query,
        "disabled_at": link.disabled_at.map(|at| at.0),
        "deleted_at": link.deleted_at.map(|at| at.0),
        "version": link.version,
    })
    .to_string()
}
