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
use tokio::sync::Semaphore;

use super::identity::Identity;
use super::problem::Problem;
use super::{Api, From, away, limit_headers};
use crate::config::VisitorKey;
use crate::domain::key::{Code, Key};
use crate::domain::time;
use crate::guard::keys::Scope;
use crate::stats::document::document;
use crate::stats::query::Stats;
use crate::stats::range::{Range, Wanted};
use crate::store::row::Reading;
use crate::store::visited::Days;

/// Ranges that are read at once: each may take up to 14 MiB.
const RANGES_MAX: usize = 4;
/// How long a request waits until one of them has ended.
const ROOM_TIMEOUT: Duration = Duration::from_secs(2);

/// What the API reads stats with.
#[derive(Debug)]
pub struct Reader {
    pub stats: Stats,
    /// Anybody may read them.
    pub public: bool,
    pub visitor: VisitorKey,
    ranges: Semaphore,
}

impl Reader {
    #[must_use]
    pub fn new(stats: Stats, public: bool, visitor: VisitorKey) -> Self {
        Self { stats, public, visitor, ranges: Semaphore::new(RANGES_MAX) }
    }
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
        Some(_) => limit_headers(&api.limit(identity.as_ref(), from, now).await?),
        None => HeaderMap::new(),
    };
    let Query(wanted) = wanted.map_err(|error| Problem::new(400, error.body_text()))?;
    let range = Range::of(&wanted, now).map_err(|bad| Problem::new(400, bad.to_string()))?;
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
    let Reader { stats, visitor, ranges, .. } = &api.reader;
    let (visitor, days) = (*visitor, range.as_ref().map_or(Days::ALL, Range::days));
    let _room = match &range {
        None => None,
        Some(_) => {
            let room = tokio::time::timeout(ROOM_TIMEOUT, ranges.acquire()).await;
            Some(room.map_err(|_| Problem::new(503, "too many ranges are being read: try again in a moment"))?)
        }
    };
    let rows = stats.link(link.id, days, Reading::Lately).await.map_err(of_store)?;
    // Years of sketches take a while to be added up.
    let document = tokio::task::spawn_blocking(move || document(&link, &rows, range.as_ref(), visitor)).await;
    let document = document.map_err(|_| Problem::new(500, "the request failed"))?.map_err(of_store)?;
    Ok((limit, axum::Json(document)))
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
