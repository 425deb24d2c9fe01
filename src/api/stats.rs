//! `GET /stats/{code}` and `GET /{code}/stats`: what became of the visits of a link.
//!
//! Of the domain that the request's Host names, as redirects are, or of `?domain=`: the API's own listener has no other way
//! to say it. A deleted link keeps its stats.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::response::IntoResponse;
use http::{HeaderMap, Uri};
use tokio::sync::{AcquireError, Semaphore, SemaphorePermit};

use super::identity::Identity;
use super::problem::{FieldError, Problem};
use super::{Api, From, away, limit_headers};
use crate::config::VisitorKey;
use crate::domain::key::{Code, Key};
use crate::domain::time;
use crate::guard::keys::Scope;
use crate::guard::limits::{Caller, Limiter, Verdict};
use crate::stats::document::document;
use crate::stats::query::Stats;
use crate::stats::range::{Bad, Range, Wanted};
use crate::store::row::Reading;
use crate::store::visited::Days;

/// Ranges that are read at once: each may take up to 14 MiB.
const RANGES_MAX: usize = 4;
/// Of them those of callers without a key: one is left to who has one.
const RANGES_PUBLIC_MAX: usize = RANGES_MAX - 1;
/// How often an address without a key may read, in a minute and at once. A page that shows a link asks a few times.
const READS_PER_MINUTE: u32 = 60;
/// Addresses that are remembered, at 30 to 60 bytes each.
const ADDRESSES_MAX: usize = 50_000;
/// How long a request waits until one of them has ended.
const ROOM_TIMEOUT: Duration = Duration::from_secs(2);

/// What the API reads stats with.
pub struct Reader {
    pub stats: Stats,
    /// Anybody may read them.
    pub public: bool,
    pub visitor: VisitorKey,
    ranges: Semaphore,
    ranges_public: Semaphore,
    /// Requests without a key, of this process alone: what they cost is its own memory and its share of the store.
    by_address: Limiter,
}

impl Reader {
    #[must_use]
    pub fn new(stats: Stats, public: bool, visitor: VisitorKey) -> Self {
        Self {
            stats,
            public,
            visitor,
            ranges: Semaphore::new(RANGES_MAX),
            ranges_public: Semaphore::new(RANGES_PUBLIC_MAX),
            by_address: Limiter::new(READS_PER_MINUTE, None, ADDRESSES_MAX),
        }
    }

    /// To read a range.
    async fn room(&self, has_key: bool) -> Result<(Option<SemaphorePermit<'_>>, SemaphorePermit<'_>), Problem> {
        let room = async {
            let public = if has_key { None } else { Some(self.ranges_public.acquire().await?) };
            Ok::<_, AcquireError>((public, self.ranges.acquire().await?))
        };
        match tokio::time::timeout(ROOM_TIMEOUT, room).await {
            Ok(Ok(room)) => Ok(room),
            _ => Err(Problem::new(503, "too many ranges are being read: try again in a moment")),
        }
    }
}

fn field(bad: Bad) -> FieldError {
    FieldError { pointer: format!("/{}", bad.name), code: "invalid", detail: bad.detail }
}

pub async fn stats(
    State(api): State<Arc<Api>>,
    Extension(from): Extension<From>,
    uri: Uri,
    headers: HeaderMap,
    Path(code): Path<String>,
    wanted: Result<Query<Wanted>, QueryRejection>,
) -> Result<impl IntoResponse, Problem> {
    let now = time::now();
    let identity = api.identify(&headers, from, now).await?;
    allow(identity.as_ref(), api.reader.public)?;
    let limit = match &identity {
        Some(_) => api.limit(identity.as_ref(), from, now).await?,
        None => match api.reader.by_address.check(Caller::of_address(from.client), now) {
            refused @ Verdict::Refused { .. } => return Err(api.too_many(&refused)),
            allowed => allowed,
        },
    };
    let Query(wanted) = wanted.map_err(|error| Problem::new(400, error.body_text()))?;
    let range = Range::of(&wanted, now).map_err(|wrong| Problem::fields(wrong.into_iter().map(field).collect()))?;
    let site = &api.front.site;
    let domain = match &wanted.domain {
        Some(host) if host.is_empty() => Some(&site.default_domain),
        Some(host) => site.domains.get(&host.to_ascii_lowercase()),
        None => site.domain(&uri, &headers),
    };
    let unknown = || Problem::new(404, "there is no such link, and there never was");
    let key = domain.zip(Code::parse(code.as_bytes(), site.case).ok());
    let key = key.map(|(domain, code)| Key { domain: domain.id, code }).ok_or_else(unknown)?;
    if api.instance.store_is_away() {
        return Err(away());
    }
    let of_store = |error| Problem::of_store(&error);
    let link = api.store.link(key).await.map_err(of_store)?.ok_or_else(unknown)?;
    let Reader { stats, visitor, .. } = &api.reader;
    let (visitor, days) = (*visitor, range.as_ref().map_or(Days::ALL, Range::days));
    let _room = match &range {
        None => None,
        Some(_) => Some(api.reader.room(identity.is_some()).await?),
    };
    let rows = stats.link(link.id, days, Reading::Lately).await.map_err(of_store)?;
    // Years of sketches take a while to be added up.
    let document = tokio::task::spawn_blocking(move || document(&link, &rows, range.as_ref(), visitor)).await;
    let document = document.map_err(|_| Problem::new(500, "the request failed"))?;
    Ok((limit_headers(&limit), axum::Json(document)))
}

/// Whether stats are shown to whoever this is.
fn allow(identity: Option<&Identity>, public: bool) -> Result<(), Problem> {
    match identity {
        _ if public => Ok(()),
        Some(identity) if identity.scopes.allows(Scope::StatsRead) => Ok(()),
        Some(_) => Err(Problem::new(403, "this needs a key with the scope stats:read")),
        None => Err(Problem::new(401, "this needs a key: send Authorization: Bearer KEY or X-Api-Key: KEY")),
    }
}
