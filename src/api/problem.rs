//! Errors as `application/problem+json` (RFC 9457).

use axum::body::Body;
use axum::response::IntoResponse;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use serde_json::json;

use crate::links::BadField;
use crate::store;

/// An error on its way to the client. [`render`] writes it, since the request's id is known there.
#[derive(Clone, Debug)]
pub struct Problem {
    pub status: StatusCode,
    pub detail: String,
    pub errors: Vec<FieldError>,
    pub headers: HeaderMap,
}

/// A field that is not right.
#[derive(Clone, Debug)]
pub struct FieldError {
    /// JSON pointer (RFC 6901) into the request's body.
    pub pointer: String,
    pub code: &'static str,
    pub detail: String,
}

impl Problem {
    #[must_use]
    pub fn new(status: u16, detail: impl Into<String>) -> Self {
        let status = StatusCode::from_u16(status).expect("statuses are literals");
        let mut headers = HeaderMap::new();
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        Self { status, detail: detail.into(), errors: Vec::new(), headers }
    }

    /// 422 with every field that is not right.
    #[must_use]
    pub fn fields(errors: Vec<FieldError>) -> Self {
        Self { errors, ..Self::new(422, "some fields are not right: see errors") }
    }

    /// 503 where trying again may help, else 500. The store's own words are for the log.
    #[must_use]
    pub fn of_store(error: &store::Error) -> Self {
        tracing::warn!(%error, "a request failed at the store");
        if error.is_transient() {
            Self::new(503, "the store is not available: try again in a moment")
        } else {
            Self::new(500, "the store failed")
        }
    }
}

impl FieldError {
    /// `names` has the field's name in this request where it is another one than in a draft.
    #[must_use]
    pub fn of(bad: BadField, names: &[(&'static str, &'static str)]) -> Self {
        let name = names.iter().find(|(draft, _)| *draft == bad.field).map_or(bad.field, |(_, name)| name);
        Self { pointer: format!("/{name}"), code: bad.code, detail: bad.detail }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> axum::response::Response {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = self.status;
        response.extensions_mut().insert(self);
        response
    }
}

/// An answer of an error's status that has a body of its own.
#[derive(Clone, Copy, Debug)]
pub struct Whole;

/// Writes the body of an error; other answers stay as they are.
#[must_use]
pub fn render(mut response: Response<Body>, id: &HeaderValue) -> Response<Body> {
    let status = response.status();
    let problem = match response.extensions_mut().remove::<Problem>() {
        Some(problem) => problem,
        None if status.as_u16() < 400 || response.extensions().get::<Whole>().is_some() => return response,
        // The router's own: a method that an address does not have, a query that it cannot read.
        None if status == StatusCode::METHOD_NOT_ALLOWED => {
            Problem::new(405, "this address has other methods: see Allow")
        }
        None => Problem::new(status.as_u16(), "the request cannot be read: is its query right?"),
    };
    let title = status.canonical_reason().unwrap_or("Error");
    let mut body = json!({
        "type": "about:blank",
        "title": title,
        "status": status.as_u16(),
        "detail": problem.detail,
        "instance": format!("urn:waypost:request:{}", id.to_str().unwrap_or_default()),
    });
    if !problem.errors.is_empty() {
        let error = |error: &FieldError| json!({"pointer": error.pointer, "code": error.code, "detail": error.detail});
        body["errors"] = problem.errors.iter().map(error).collect();
    }
    response.headers_mut().extend(problem.headers);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    response.headers_mut().remove(header::CONTENT_LENGTH);
    *response.body_mut() = Body::from(body.to_string());
    response
}
