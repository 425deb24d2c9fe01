//! Whether the process lives, and whether it should get requests.

use std::sync::Arc;

use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde_json::json;

use super::Api;
use super::problem::Whole;
use crate::instance::Phase;

/// It answers, so it lives.
pub async fn alive() -> impl IntoResponse {
    axum::Json(json!({"status": "pass"}))
}

/// 200 while redirects can be served, 503 while starting or draining; with `?require=store` also 503 while the store
/// does not answer.
pub async fn ready(State(api): State<Arc<Api>>, RawQuery(query): RawQuery) -> Response {
    let degraded = api.instance.degraded();
    let require_store = query.is_some_and(|query| query.split('&').any(|parameter| parameter == "require=store"));
    let phase = api.instance.phase();
    let (status, word) = match phase {
        Phase::Starting => (StatusCode::SERVICE_UNAVAILABLE, "starting"),
        Phase::Draining => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
        Phase::Serving if require_store && degraded.contains(&"store") => (StatusCode::SERVICE_UNAVAILABLE, "degraded"),
        Phase::Serving if degraded.is_empty() => (StatusCode::OK, "ready"),
        Phase::Serving => (StatusCode::OK, "degraded"),
    };
    let mut response = (status, axum::Json(json!({"status": word, "degraded": degraded}))).into_response();
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response.extensions_mut().insert(Whole);
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}
