//! A link: from a code on a domain to a target; and the part of it that decides an answer.

use super::key::Key;
use super::target::Target;
use super::time::UnixMillis;

/// The statuses that a link may answer with.
pub const STATUSES: [u16; 5] = [301, 302, 303, 307, 308];

/// A link's number; never given twice in a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub u64);

/// A link as the store has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub id: LinkId,
    pub key: Key,
    pub fields: Fields,
    /// The change that made it what it is; versions grow in the order of commits.
    pub version: u64,
    pub created_at: UnixMillis,
    pub updated_at: UnixMillis,
    pub disabled_at: Option<UnixMillis>,
    pub deleted_at: Option<UnixMillis>,
    /// Visits that an import brought along; the server's own are counted elsewhere.
    pub imported_clicks: u64,
    /// Visits taken out of `max_visits`.
    pub visits_used: u64,
}

/// What a person chooses of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fields {
    /// As it was written.
    pub target_written: String,
    /// As it goes into `Location`.
    pub target: Target,
    /// One of [`STATUSES`]; none = the instance's.
    pub status: Option<u16>,
    pub cache_control: Option<String>,
    pub title: Option<String>,
    pub tags: Vec<String>,
    pub note: Option<String>,
    pub starts_at: Option<UnixMillis>,
    pub expires_at: Option<UnixMillis>,
    /// Where visitors go once it is over, instead of 410.
    pub expired_url: Option<Target>,
    pub max_visits: Option<u64>,
    /// None = the instance's.
    pub forward_query: Option<bool>,
}

impl Fields {
    /// Nothing but the target.
    #[must_use]
    pub fn new(target_written: String, target: Target) -> Self {
        Self {
            target_written,
            target,
            status: None,
            cache_control: None,
            title: None,
            tags: Vec::new(),
            note: None,
            starts_at: None,
            expires_at: None,
            expired_url: None,
            max_visits: None,
            forward_query: None,
        }
    }
}

/// Everything of a link that decides an answer: what the caches keep.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub id: LinkId,
    pub target: Target,
    pub rules: Rules,
}

/// What an entry says beyond its target. The default is that of most links: valid always, answered as the
/// instance answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    pub status: Option<u16>,
    pub cache_control: Option<Box<str>>,
    pub forward_query: Option<bool>,
    pub starts_at: Option<UnixMillis>,
    pub expires_at: Option<UnixMillis>,
    pub expired_url: Option<Target>,
    /// Disabled, deleted or used up.
    pub gone: bool,
    /// It has a limit: each visit is one of those that the store has granted.
    pub limited: bool,
}

/// What an entry means at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validity {
    Valid,
    /// Not begun: nobody may know of it.
    NotYet,
    /// Over by its time: `expired_url` may lead on.
    Expired,
    /// Disabled, deleted or used up.
    Gone,
}

impl Rules {
    #[must_use]
    pub fn validity(&self, now: UnixMillis) -> Validity {
        if self.gone {
            Validity::Gone
        } else if self.expires_at.is_some_and(|end| now >= end) {
            Validity::Expired
        } else if self.starts_at.is_some_and(|start| now < start) {
            Validity::NotYet
        } else {
            Validity::Valid
        }
    }
}

impl Entry {
    /// Whether a visit of it, now, is one of those that its limit allows.
    #[must_use]
    pub fn is_counted(&self, now: UnixMillis) -> bool {
        self.rules.limited && self.rules.validity(now) == Validity::Valid
    }
}

impl Link {
    /// The part that decides an answer.
    #[must_use]
    pub fn entry(&self) -> Entry {
        let fields = &self.fields;
        let used_up = fields.max_visits.is_some_and(|max| self.visits_used >= max);
        Entry {
            id: self.id,
            target: fields.target.clone(),
            rules: Rules {
                status: fields.status,
                cache_control: fields.cache_control.as_deref().map(Into::into),
                forward_query: fields.forward_query,
                starts_at: fields.starts_at,
                expires_at: fields.expires_at,
                expired_url: fields.expired_url.clone(),
                gone: self.disabled_at.is_some() || self.deleted_at.is_some() || used_up,
                limited: fields.max_visits.is_some(),
            },
        }
    }
}
