//! What goes into a store and comes out of it, beside links and entries.

use crate::domain::key::{DomainId, Key};
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
}

/// A change of one link.
#[derive(Clone, Debug)]
pub enum Change {
    Edit(Box<Patch>),
    Disable,
    Enable,
    Delete,
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
