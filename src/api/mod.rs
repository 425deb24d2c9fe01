//! The API: what is no redirect. Runs in back.
//!
//! In: requests over the `api` crossing. Out: their answers; every error is problem+json (RFC 9457) with the request's id.
//! Never: runs on a worker; answers a create before it is on the disk.
//! At its limit: [`CALLS_MAX`] requests wait in the crossing and as many are worked on; the next one is 503, unless it asks
//! for the process's health.
//! A body is at most [`BODY_BYTES_MAX`], and comes within [`BODY_TIMEOUT`].

pub mod accounting;
pub mod health;
pub mod identity;
pub mod links;
pub mod metrics;
pub mod problem;
pub mod shorten;
pub mod stats;
pub mod status;

use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::routing::{get, post};
use http::{HeaderMap, HeaderName, HeaderValue, Request, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tokio::sync::{Semaphore, mpsc};
use tower_service::Service;

use crate::config;
use crate::domain::key::Key;
use crate::guard::keys::AdminKey;
use crate::guard::limits::{Limiter, Verdict};
use crate::http::Shared;
use crate::http::call::{CALLS_MAX, Call};
use crate::http::visitor::Peer;
use crate::instance::Instance;
use crate::links::Links;
use crate::redis::Redis;
use crate::resolve::follow::Follower;
use crate::resolve::through::Through;
use crate::store::Store;
use identity::Known;
use problem::Problem;

/// Requests that are worked on.
const WORKED_ON_MAX: usize = CALLS_MAX;
const BODY_BYTES_MAX: usize = 64 << 10;
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// What the API works with.
pub struct Api {
    pub store: Store,
    /// Empty until the store was there once.
    pub links: Arc<OnceLock<Arc<Links>>>,
    /// To Redis, if there is one.
    pub through: Option<Through>,
    /// Of the shared rate limits.
    pub redis: Option<Redis>,
    pub follower: Arc<Follower>,
    pub instance: Arc<Instance>,
    pub reader: stats::Reader,
    /// Its domains.
    pub front: Arc<Shared>,
    /// `base_url`, or what stands in for it.
    pub base_url: String,
    pub admin_key: Option<AdminKey>,
    pub open: bool,
    pub metrics_allow: Vec<config::Peers>,
    /// Requests without a valid key, by address.
    pub by_address: Limiter,
    pub by_key: Limiter,
    /// Keys that were looked up a moment ago.
    pub known: Known,
}

impl Api {
    /// A link was created by this process: it shows here when this returns, and soon everywhere. `is_new`: no link ever
    /// had its code; of one that was deleted memory may know, and forgets by way of the feed.
    pub async fn created(&self, key: Key, is_new: bool) {
        if is_new {
            self.instance.memory().created(&key);
            self.follower.hint();
        } else {
            self.follower.catch_up().await;
        }
        if let Some(through) = &self.through {
            through.created(key);
        }
        if let Some(redis) = &self.redis {
            // A hint: whoever hears it looks into the feed. The store hints as well, past a pooler to nobody.
            redis.publish(Vec::new());
        }
    }

    /// What makes links. An error says at once that the store is away, rather than let everybody wait for it.
    pub fn links(&self) -> Result<&Arc<Links>, Problem> {
        if self.instance.store_is_away() { Err(away()) } else { self.links.get().ok_or_else(away) }
    }
}

/// What is said at once while the store's breaker is open.
fn away() -> Problem {
    Problem::new(503, "the store is not available: try again in a moment")
}

/// Who sent a request: an extension of it.
#[derive(Clone, Copy, Debug)]
pub struct From {
    pub peer: Peer,
    pub client: IpAddr,
}

/// Answers calls until the front has gone.
pub async fn run(api: Arc<Api>, mut calls: mpsc::Receiver<Call>) {
    let router = router(api);
    let working = Arc::new(Semaphore::new(WORKED_ON_MAX));
    while let Some(call) = calls.recv().await {
        let permit = Arc::clone(&working).try_acquire_owned().ok();
        // Whether the process lives is answered when nothing else is.
        let vital = matches!(call.request.uri().path(), "/health" | "/healthz" | "/readyz");
        if permit.is_none() && !vital {
            continue; // The front sees that the reply is dropped, and says 503.
        }
        let router = router.clone();
        tokio::spawn(async move {
            handle(router, call).await;
            drop(permit);
        });
    }
}

fn router(api: Arc<Api>) -> Router {
    Router::new()
        .route("/shorten", post(shorten::shorten))
        .route("/health", get(health::alive))
        .route("/healthz", get(health::alive))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(metrics::metrics))
        .route("/stats/{code}", get(stats::stats))
        .route("/{code}/stats", get(stats::stats))
        .route("/api/v1/accounting", get(accounting::accounting))
        .route("/api/v1/status", get(status::status))
        .route("/api/v1/export", get(links::export))
        .fallback(async || Problem::new(404, "there is no such address"))
        .with_state(api)
}

async fn handle(mut router: Router, call: Call) {
    let id = request_id(call.request.headers(), call.peer);
    let mut request = call.request.map(Body::new);
    request.extensions_mut().insert(From { peer: call.peer, client: call.client });
    let head = *request.method() == http::Method::HEAD;
    let response = router.call(request).await.unwrap_or_else(|never| match never {});
    let mut response = problem::render(response, &id);
    response.headers_mut().insert(REQUEST_ID, id);
    response.headers_mut().entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    if head {
        *response.body_mut() = Body::empty();
    }
    // Nobody listens when the client has gone.
    let _ = call.reply.send(response);
}

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The id that a trusted peer gave the request, or one of our own: 32 hexadecimal digits.
fn request_id(headers: &HeaderMap, peer: Peer) -> HeaderValue {
    let given = headers.get(REQUEST_ID).filter(|id| peer.names_requests && (1..=128).contains(&id.len()));
    match given.filter(|id| id.as_bytes().iter().all(u8::is_ascii_graphic)) {
        Some(id) => id.clone(),
        None => HeaderValue::from_str(&format!("{:032x}", rand::random::<u128>())).expect("digits"),
    }
}

/// `RateLimit-*` and, when refused, `Retry-After`, in seconds.
#[must_use]
pub fn limit_headers(verdict: &Verdict) -> HeaderMap {
    let (limit, remaining, reset_ms, retry_ms) = match *verdict {
        Verdict::Unlimited => return HeaderMap::new(),
        Verdict::Allowed { limit, remaining, reset_ms } => (limit, remaining, reset_ms, None),
        Verdict::Refused { limit, retry_after_ms, reset_ms } => (limit, 0, reset_ms, Some(retry_after_ms)),
    };
    let seconds = crate::guard::limits::seconds;
    let mut headers = HeaderMap::new();
    headers.insert("ratelimit-limit", HeaderValue::from(limit));
    headers.insert("ratelimit-remaining", HeaderValue::from(remaining));
    headers.insert("ratelimit-reset", HeaderValue::from(seconds(reset_ms)));
    if let Some(retry_ms) = retry_ms {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds(retry_ms)));
    }
    headers
}

/// A JSON object, whole: bounded in size and time.
pub async fn json_object(request: Request<Body>) -> Result<serde_json::Map<String, serde_json::Value>, Problem> {
    let json = request.headers().get(header::CONTENT_TYPE).is_some_and(|kind| {
        let kind = kind.to_str().unwrap_or("").split(';').next().unwrap_or("").trim();
        kind.eq_ignore_ascii_case("application/json")
    });
    if !json {
        return Err(Problem::new(415, "the body must be JSON: send Content-Type: application/json"));
    }
    let read = Limited::new(request.into_body(), BODY_BYTES_MAX).collect();
    let body = match tokio::time::timeout(BODY_TIMEOUT, read).await {
        Err(_) => return Err(Problem::new(408, "the body did not come within 10 seconds")),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            return Err(Problem::new(413, format!("the body is larger than {BODY_BYTES_MAX} bytes")));
        }
        Ok(Err(_)) => return Err(Problem::new(400, "the body ended early")),
        Ok(Ok(body)) => body.to_bytes(),
    };
    match serde_json::from_slice(&body) {
        Ok(serde_json::Value::Object(object)) => Ok(object),
        Ok(_) => Err(Problem::new(400, "the body must be a JSON object")),
        Err(error) => Err(Problem::new(400, format!("the body is no JSON: {error}"))),
    }
}
