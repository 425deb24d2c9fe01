//! `GET /api/v1/status`: what `waypost status` shows.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::IntoResponse;
use http::HeaderMap;

use super::problem::Problem;
use super::{Api, From};
use crate::guard::keys::Scope;

pub async fn status(
    State(api): State<Arc<Api>>,
    Extension(from): Extension<From>,
    headers: HeaderMap,
) -> Result<impl IntoResponse, Problem> {
    api.require(&headers, from, Scope::Admin).await?;
    Ok(axum::Json(api.instance.status()))
}
