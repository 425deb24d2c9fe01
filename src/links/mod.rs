//! Links: from what a person asks for to a row in the store.
//!
//! In: a [`Draft`], all of it text as it was given. Out: a link that is on the disk, or every field that is wrong, at once.
//! Never: gives a code or an id twice; makes a code that is reserved or offensive; asks who may.
//! A new generation of the store drops every leased number: those of the old one may be given to others as well.
//! At its limit: a generated code that meets an existing one is drawn again, [`DRAWS_MAX`] times, and counted.

pub mod worker_id;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use http::HeaderValue;
use tokio::sync::Mutex;

use crate::codes::permuted::{self, Permutation};
use crate::codes::words::Words;
use crate::codes::{Strategy, random, snowflake};
use crate::config::{self, units};
use crate::domain::key::{Code, DomainId, Key};
use crate::domain::link::{Fields, LinkId, STATUSES};
use crate::domain::target::Target;
use crate::domain::time::UnixMillis;
use crate::guard::targets::{Policy, Refresh};
use crate::store::row::{Inserted, NewLink, OnConflict, Patch};
use crate::store::{self, Store};
use worker_id::WorkerId;

/// Numbers that are leased at a time.
const LEASE: u64 = 1000;
/// How often a code is drawn again.
const DRAWS_MAX: u32 = 20;
const TITLE_CHARS_MAX: usize = 512;
const NOTE_CHARS_MAX: usize = 4096;
const TAGS_MAX: usize = 32;
const TAG_CHARS_MAX: usize = 64;

/// A link as it is asked for. An empty text is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Draft {
    pub url: Option<String>,
    pub code: Option<String>,
    /// A host; none is the default domain.
    pub domain: Option<String>,
    pub title: Option<String>,
    pub tags: Option<Vec<String>>,
    pub status: Option<u64>,
    pub cache_control: Option<String>,
    pub starts_at: Option<String>,
    pub expires_at: Option<String>,
    pub expired_url: Option<String>,
    pub max_visits: Option<u64>,
    pub forward_query: Option<bool>,
    pub note: Option<String>,
    pub created_at: Option<String>,
    pub clicks: Option<u64>,
}

/// A field that is not right. `field` is the name in [`Draft`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {detail}")]
pub struct BadField {
    pub field: &'static str,
    /// For programs: `missing`, `reserved`, `not_a_url`, …
    pub code: &'static str,
    /// For people: what is wrong, and the way out.
    pub detail: String,
}

/// A draft that is right.
#[derive(Clone, Debug)]
pub struct Checked {
    pub domain: DomainId,
    /// None: to be generated.
    pub code: Option<Code>,
    pub fields: Fields,
    /// Of `fields`, what the draft says.
    pub given: Patch,
    pub created_at: Option<UnixMillis>,
    pub clicks: u64,
    /// The target's host looks like another one.
    pub lookalike: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum NotMade {
    #[error("the code is taken: choose another one")]
    Taken,
    #[error("{DRAWS_MAX} codes were drawn and all are taken: set codes.length to a larger number")]
    Full,
    #[error("every number that codes are made of is used up: set codes.strategy to \"random\"")]
    NumbersUsedUp,
    #[error("no worker id is leased at the moment: try again")]
    NoWorkerId,
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// Makes links.
pub struct Links {
    store: Store,
    policy: Arc<Policy>,
    codes: config::Codes,
    words: Words,
    /// By host.
    domains: HashMap<String, DomainId>,
    /// Of the store, as far as it is known.
    generation: AtomicU64,
    ids: Mutex<Leased>,
    permuted: Mutex<Permuted>,
    /// Of snowflakes.
    worker_id: Option<Arc<WorkerId>>,
    redrawn: AtomicU64,
}

/// Numbers that were leased, and not given yet.
struct Leased {
    numbers: Range<u64>,
    generation: u64,
}

struct Permuted {
    permutation: Permutation,
    leased: Leased,
}

impl Leased {
    fn none(generation: u64) -> Self {
        Self { numbers: 0..0, generation }
    }

    /// Drops the numbers of another generation. Their end stays: it is the least that the next lease begins with.
    fn follow(&mut self, generation: u64) {
        if self.generation != generation {
            *self = Self { numbers: self.numbers.end..self.numbers.end, generation };
        }
    }
}

impl Links {
    /// Settles what is fixed when a store is made, and refuses a configuration that says otherwise. Without a
    /// `worker_id` no snowflakes are made.
    pub async fn open(
        store: Store,
        policy: Arc<Policy>,
        codes: config::Codes,
        worker_id: Option<Arc<WorkerId>>,
    ) -> Result<Self, store::Error> {
        let case = if codes.case == crate::domain::key::Case::Insensitive { "insensitive" } else { "sensitive" };
        for (name, key, want) in
            [("codes.alphabet", "codes.alphabet", codes.alphabet.name()), ("codes.case", "codes.case", case)]
        {
            let have = store.settle(name, want.into()).await?;
            if have != want.as_bytes() {
                return Err(store::Error::Schema(format!(
                    "{key} is \"{}\" in this store and \"{want}\" in the configuration: it is fixed when a store is made",
                    String::from_utf8_lossy(&have)
                )));
            }
        }
        let secret = store.settle("codes.permutation_key", rand::random::<[u8; 32]>().to_vec()).await?;
        let secret: [u8; 32] = secret
            .try_into()
            .map_err(|_| store::Error::Broken("the setting codes.permutation_key is not 32 bytes".into()))?;
        let domains = store.domains().await?.into_iter().map(|(id, host)| (host, id)).collect();
        let generation = store.position().await?.generation;
        let permutation = Permutation::new(codes.alphabet, &secret, generation);
        Ok(Self {
            store,
            policy,
            codes,
            words: Words::built_in(),
            domains,
            generation: AtomicU64::new(generation),
            ids: Mutex::new(Leased::none(generation)),
            permuted: Mutex::new(Permuted { permutation, leased: Leased::none(generation) }),
            worker_id,
            redrawn: AtomicU64::new(0),
        })
    }

    /// Codes that were drawn again because the first one was taken.
    #[must_use]
    pub fn redrawn(&self) -> u64 {
        self.redrawn.load(Ordering::Relaxed)
    }

    /// Gives the worker id back, at the end of the process: no snowflakes are made after it.
    pub async fn close(&self) {
        if let Some(worker_id) = &self.worker_id {
            worker_id.release().await;
        }
    }

    /// Whether snowflakes are wanted and cannot be made.
    #[must_use]
    pub fn worker_id_is_lost(&self) -> bool {
        self.worker_id.as_ref().is_some_and(|worker_id| worker_id.is_lost())
    }

    /// Tells the store's generation, at every poll: a new one begins a new permutation and drops what is leased.
    pub fn set_generation(&self, generation: u64) {
        self.generation.store(generation, Ordering::Relaxed);
    }

    /// Reads the block list anew if its file has changed.
    pub fn refresh_policy(&self, now: UnixMillis) {
        match self.policy.refresh(now) {
            Refresh::Unchanged => {}
            Refresh::Reloaded { hosts } => tracing::info!(hosts, "the block list was read anew"),
            Refresh::Kept(error) => tracing::warn!(%error, "the block list cannot be read: the old one stays"),
        }
    }

    /// The host of a domain's number; empty for the default domain.
    #[must_use]
    pub fn host(&self, domain: DomainId) -> &str {
        self.domains.iter().find(|(_, id)| **id == domain).map_or("", |(host, _)| host)
    }

    /// A key as a person writes it.
    pub fn key(&self, code: &str, domain: Option<&str>) -> Result<Key, BadField> {
        Ok(Key { domain: self.domain(domain)?, code: self.code(code)? })
    }

    fn domain(&self, host: Option<&str>) -> Result<DomainId, BadField> {
        let host = host.unwrap_or("").trim().to_ascii_lowercase();
        self.domains.get(&host).copied().ok_or_else(|| {
            bad(
                "domain",
                "unknown_domain",
                format!("{host:?} is no domain of this server: add it to [[domains]] first"),
            )
        })
    }

    fn code(&self, text: &str) -> Result<Code, BadField> {
        let code = Code::parse(text.trim().as_bytes(), self.codes.case)
            .map_err(|error| bad("code", "not_a_code", format!("{error}, and {text:?} is not")))?;
        if code.is_reserved() {
            return Err(bad(
                "code",
                "reserved",
                format!("{code} is an address of the server itself: choose another one"),
            ));
        }
        Ok(code)
    }

    /// Checks a draft; all that is wrong with it comes at once.
    pub fn check(&self, draft: Draft, now: UnixMillis) -> Result<Checked, Vec<BadField>> {
        let mut wrong = Vec::new();
        let domain = keep(&mut wrong, self.domain(draft.domain.as_deref())).unwrap_or_default();
        let code = text(draft.code.clone()).and_then(|code| keep(&mut wrong, self.code(&code)));
        let created_at =
            text(draft.created_at.clone()).and_then(|at| keep(&mut wrong, moment("created_at", &at, None)));
        for (field, count) in [("max_visits", draft.max_visits), ("clicks", draft.clicks)] {
            if count.is_some_and(|count| i64::try_from(count).is_err()) {
                wrong.push(bad(field, "too_large", format!("at most {}", i64::MAX)));
            }
        }
        let clicks = draft.clicks.unwrap_or(0);
        let target = match text(draft.url.clone()) {
            Some(written) => keep(&mut wrong, self.target("url", &written)).map(|(target, odd)| (written, target, odd)),
            None => {
                wrong.push(bad("url", "missing", "a link needs a target".to_owned()));
                None
            }
        };
        let patch = self.patch(draft, now, &mut wrong);
        match target {
            Some((written, target, lookalike)) if wrong.is_empty() => {
                let mut fields = Fields::new(written.clone(), target.clone());
                patch.apply(&mut fields);
                let given = Patch { target: Some((written, target)), ..patch };
                Ok(Checked { domain, code, fields, given, created_at, clicks, lookalike })
            }
            _ => Err(wrong),
        }
    }

    /// Checks the fields of an edit. What is given as an empty text is cleared.
    pub fn check_patch(&self, draft: Draft, now: UnixMillis) -> Result<Patch, Vec<BadField>> {
        let mut wrong = Vec::new();
        let target = draft
            .url
            .clone()
            .and_then(|written| keep(&mut wrong, self.target("url", &written)).map(|(target, _)| (written, target)));
        let patch = Patch { target, ..self.patch(draft, now, &mut wrong) };
        if wrong.is_empty() { Ok(patch) } else { Err(wrong) }
    }

    fn target(&self, field: &'static str, written: &str) -> Result<(Target, bool), BadField> {
        let accepted = self.policy.check(written).map_err(|refused| bad(field, refused.code(), refused.to_string()))?;
        Ok((accepted.target, accepted.lookalike))
    }

    /// Everything but target, code and domain.
    fn patch(&self, draft: Draft, now: UnixMillis, wrong: &mut Vec<BadField>) -> Patch {
        let mut patch = Patch::default();
        if let Some(status) = draft.status {
            let known = STATUSES.into_iter().find(|known| u64::from(*known) == status);
            match known {
                Some(status) => patch.status = Some(Some(status)),
                None if status == 0 => patch.status = Some(None),
                None => wrong.push(bad("status", "not_a_redirect", format!("{status} is none of {STATUSES:?}"))),
            }
        }
        if let Some(value) = draft.cache_control {
            let fits = value.len() <= 256 && value.is_ascii() && HeaderValue::from_str(&value).is_ok();
            if !fits {
                wrong.push(bad("cache_control", "not_a_header", "at most 256 visible ASCII characters".to_owned()));
            }
            patch.cache_control = Some(text(Some(value)));
        }
        patch.title = limited("title", draft.title, TITLE_CHARS_MAX, wrong);
        patch.note = limited("note", draft.note, NOTE_CHARS_MAX, wrong);
        if let Some(tags) = draft.tags {
            let mut tags: Vec<String> =
                tags.iter().map(|tag| tag.trim().to_owned()).filter(|tag| !tag.is_empty()).collect();
            tags.sort();
            tags.dedup();
            let wrong_tag =
                |tag: &String| tag.chars().count() > TAG_CHARS_MAX || tag.chars().any(|c| c.is_control() || c == ',');
            if tags.len() > TAGS_MAX || tags.iter().any(wrong_tag) {
                let detail = format!(
                    "at most {TAGS_MAX} tags of {TAG_CHARS_MAX} characters, without comma or control character"
                );
                wrong.push(bad("tags", "bad_tags", detail));
            }
            patch.tags = Some(tags);
        }
        let mut time = |field, at: Option<String>| {
            at.map(|at| text(Some(at)).and_then(|at| keep(wrong, moment(field, &at, Some(now)))))
        };
        patch.starts_at = time("starts_at", draft.starts_at);
        patch.expires_at = time("expires_at", draft.expires_at);
        if let (Some(Some(start)), Some(Some(end))) = (patch.starts_at, patch.expires_at)
            && start >= end
        {
            wrong.push(bad("expires_at", "before_start", "a link expires after it starts".to_owned()));
        }
        patch.expired_url = draft.expired_url.map(|url| {
            text(Some(url)).and_then(|url| keep(wrong, self.target("expired_url", &url)).map(|(target, _)| target))
        });
        patch.max_visits = draft.max_visits.map(|max| Some(max).filter(|max| *max > 0));
        patch.forward_query = draft.forward_query.map(Some);
        patch
    }

    /// Makes one link; durable when it returns.
    pub async fn create(&self, checked: Checked, now: UnixMillis) -> Result<(Key, LinkId), NotMade> {
        let custom = checked.code.is_some();
        for draw in 0..DRAWS_MAX {
            let new = self.new_link(checked.clone(), OnConflict::Take, now).await?;
            let made = (new.key, new.id);
            match self.store.insert(vec![new], now).await?.pop() {
                Some(Inserted::Created | Inserted::Updated) => return Ok(made),
                Some(Inserted::Failed(why)) => return Err(store::Error::Unavailable(why).into()),
                _ if custom => return Err(NotMade::Taken),
                _ => self.count_redraw(draw),
            }
        }
        Err(NotMade::Full)
    }

    fn count_redraw(&self, draw: u32) {
        self.redrawn.fetch_add(1, Ordering::Relaxed);
        if draw + 1 == DRAWS_MAX {
            tracing::warn!("{DRAWS_MAX} codes were drawn and all are taken: set codes.length to a larger number");
        }
    }

    /// Makes many links; the outcomes stand in the order of `all`. They are not one transaction: an error means that none
    /// is known to be made, what fails after that is the outcome of its link. `on_conflict` is for codes that were given: a
    /// generated one never takes the place of another link, nor of a deleted one.
    pub async fn import(
        &self,
        all: Vec<Checked>,
        on_conflict: OnConflict,
        now: UnixMillis,
    ) -> Result<Vec<Inserted>, NotMade> {
        let mut outcomes = vec![Inserted::Taken; all.len()];
        let mut left: Vec<(usize, Checked)> = all.into_iter().enumerate().collect();
        for draw in 0..DRAWS_MAX {
            let inserted = match self.insert(&left, on_conflict, now).await {
                Ok(inserted) => inserted,
                Err(error) => return partly(outcomes, &left, error),
            };
            let mut again = Vec::new();
            for ((index, checked), outcome) in left.into_iter().zip(inserted) {
                if outcome == Inserted::Taken && checked.code.is_none() {
                    again.push((index, checked));
                } else {
                    outcomes[index] = outcome;
                }
            }
            if again.is_empty() {
                return Ok(outcomes);
            }
            self.count_redraw(draw);
            left = again;
        }
        partly(outcomes, &left, NotMade::Full)
    }

    async fn insert(
        &self,
        all: &[(usize, Checked)],
        on_conflict: OnConflict,
        now: UnixMillis,
    ) -> Result<Vec<Inserted>, NotMade> {
        let mut rows = Vec::with_capacity(all.len());
        for (_, checked) in all {
            rows.push(self.new_link(checked.clone(), on_conflict, now).await?);
        }
        Ok(self.store.insert(rows, now).await?)
    }

    async fn new_link(&self, checked: Checked, given: OnConflict, now: UnixMillis) -> Result<NewLink, NotMade> {
        let (code, on_conflict) = match checked.code {
            Some(code) => (code, given),
            None => (self.generate().await?, OnConflict::Refuse),
        };
        Ok(NewLink {
            id: LinkId(self.next_id().await?),
            key: Key { domain: checked.domain, code },
            fields: checked.fields,
            given: checked.given,
            created_at: checked.created_at.unwrap_or(now),
            imported_clicks: checked.clicks,
            on_conflict,
        })
    }

    async fn generate(&self) -> Result<Code, NotMade> {
        let text = match self.codes.strategy {
            Strategy::Random => random::draw(self.codes.alphabet, self.codes.length, &mut rand::rng(), &self.words),
            Strategy::Permuted => self.permuted().await?,
            Strategy::Snowflake => self.snowflake().await?,
        };
        Ok(Code::parse(text.as_bytes(), self.codes.case).expect("an alphabet has characters of codes alone"))
    }

    async fn permuted(&self) -> Result<String, NotMade> {
        let mut permuted = self.permuted.lock().await;
        let Permuted { permutation, leased } = &mut *permuted;
        loop {
            let generation = self.generation.load(Ordering::Relaxed);
            leased.follow(generation);
            permutation.set_generation(generation);
            match permutation.draw(&mut leased.numbers, &self.words) {
                permuted::Drawn::Code(code) => return Ok(code),
                permuted::Drawn::LeaseUsedUp => {
                    let first = self.store.lease("codes", leased.numbers.end, LEASE).await?;
                    leased.numbers = first..first + LEASE;
                }
                permuted::Drawn::NumbersUsedUp => return Err(NotMade::NumbersUsedUp),
            }
        }
    }

    async fn snowflake(&self) -> Result<String, NotMade> {
        let worker_id = self.worker_id.as_ref().ok_or(NotMade::NoWorkerId)?;
        loop {
            let text = match worker_id.draw().await {
                snowflake::Drawn::Id(id) => snowflake::text(self.codes.alphabet, id),
                snowflake::Drawn::LeaseUsedUp => return Err(NotMade::NoWorkerId),
                snowflake::Drawn::TimeUsedUp => return Err(NotMade::NumbersUsedUp),
            };
            if !self.words.forbids(&text) {
                return Ok(text);
            }
        }
    }

    /// The next id of a link. Ids begin with 1.
    async fn next_id(&self) -> Result<u64, store::Error> {
        let mut leased = self.ids.lock().await;
        loop {
            leased.follow(self.generation.load(Ordering::Relaxed));
            if let Some(number) = leased.numbers.next() {
                return Ok(number);
            }
            let first = self.store.lease("link_ids", leased.numbers.end.max(1), LEASE).await?;
            leased.numbers = first..first + LEASE;
        }
    }
}

/// What is said of `left` when it failed: to try all of a call again would make those that were made a second time.
fn partly(mut outcomes: Vec<Inserted>, left: &[(usize, Checked)], error: NotMade) -> Result<Vec<Inserted>, NotMade> {
    if left.len() == outcomes.len() {
        return Err(error);
    }
    for (index, _) in left {
        outcomes[*index] = Inserted::Failed(error.to_string());
    }
    Ok(outcomes)
}

fn bad(field: &'static str, code: &'static str, detail: String) -> BadField {
    BadField { field, code, detail }
}

fn keep<T>(wrong: &mut Vec<BadField>, outcome: Result<T, BadField>) -> Option<T> {
    outcome.map_err(|error| wrong.push(error)).ok()
}

/// None for an empty text.
fn text(value: Option<String>) -> Option<String> {
    value.map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

fn limited(
    field: &'static str,
    value: Option<String>,
    chars_max: usize,
    wrong: &mut Vec<BadField>,
) -> Option<Option<String>> {
    let value = value?;
    let odd = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if value.chars().count() > chars_max || value.chars().any(odd) {
        wrong.push(bad(field, "bad_text", format!("at most {chars_max} characters, none of them a control character")));
    }
    Some(text(Some(value)))
}

/// A moment as a person writes it: RFC 3339 with an offset, a date (its first moment, UTC), or, where there is a
/// `now` to count from, a duration such as `90d`.
pub fn moment(field: &'static str, text: &str, now: Option<UnixMillis>) -> Result<UnixMillis, BadField> {
    if let Ok(at) = text.parse::<jiff::Timestamp>() {
        return Ok(UnixMillis(at.as_millisecond()));
    }
    if let Ok(date) = text.parse::<jiff::civil::Date>()
        && let Ok(at) = date.to_zoned(jiff::tz::TimeZone::UTC)
    {
        return Ok(UnixMillis(at.timestamp().as_millisecond()));
    }
    if let (Some(now), Ok(duration)) = (now, units::duration(text)) {
        return Ok(now.after(duration));
    }
    Err(bad(field, "not_a_time", format!("{text:?} is no time: write 2027-01-31T09:00:00+01:00, 2027-01-31 or 90d")))
}

/// RFC 3339 in UTC.
#[must_use]
pub fn rfc3339(at: UnixMillis) -> String {
    jiff::Timestamp::from_millisecond(at.0).map(|at| at.to_string()).unwrap_or_else(|_| at.to_string())
}

#[cfg(test)]
mod tests {
    use super::{LEASE, Links};
    use crate::codes::{Alphabet, Strategy};
    use crate::config;
    use crate::domain::key::Case;
    use crate::guard::targets::{Lookalikes, Policy};
    use crate::store::Store;
    use crate::store::sqlite::{self, Sqlite};
    use std::sync::Arc;
    use std::time::Duration;

    #[tokio::test]
    async fn a_new_generation_drops_what_is_leased_and_permutes_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("waypost.db");
        sqlite::migrate(&path).unwrap();
        let store = Store::Sqlite(Sqlite::open(&path).unwrap());
        let codes = config::Codes {
            strategy: Strategy::Permuted,
            length: 7,
            alphabet: Alphabet::Base62,
            case: Case::Sensitive,
            worker_id: None,
            worker_lease: Duration::from_secs(60),
        };
        let policy = Arc::new(Policy::new(&["https"], 100, None, &[""; 0], Lookalikes::Flag).unwrap());
        let open = async || Links::open(store.clone(), Arc::clone(&policy), codes.clone(), None).await.unwrap();
        let links = open().await;
        assert_eq!((links.next_id().await.unwrap(), links.next_id().await.unwrap()), (1, 2));
        let before = links.generate().await.unwrap();
        let generation = store.position().await.unwrap().generation;
        links.set_generation(generation);
        assert_eq!(links.next_id().await.unwrap(), 3, "it is the same");

        assert_eq!(store.begin_generation(generation).await.unwrap(), generation + 1);
        // As a standby that knows of none of the leases.
        rusqlite::Connection::open(&path).unwrap().execute("DELETE FROM ranges", []).unwrap();
        links.set_generation(generation + 1);
        assert_eq!(links.next_id().await.unwrap(), LEASE + 1, "past all that it was given before");
        assert_eq!(links.next_id().await.unwrap(), LEASE + 2);
        links.generate().await.unwrap();
        assert_eq!(links.permuted.lock().await.leased.numbers.end, 2 * LEASE);
        // One that starts now begins with the first number, and with another code than that one gave.
        rusqlite::Connection::open(&path).unwrap().execute("DELETE FROM ranges", []).unwrap();
        let started = open().await;
        assert_ne!(started.generate().await.unwrap(), before);
        assert_eq!(started.permuted.lock().await.leased.numbers.end, LEASE);
    }
}
