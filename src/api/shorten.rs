//! `POST /shorten`: a target becomes a short link.

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::response::IntoResponse;
use http::{HeaderMap, HeaderValue, Request, StatusCode, header};
use serde_json::{Map, Value, json};

use super::problem::{FieldError, Problem};
use super::{Api, From, json_object, limit_headers};
use crate::domain::time::{self, UnixMillis};
use crate::guard::keys::Scope;
use crate::links::{Draft, NotMade};

/// What a draft's fields are called here.
const NAMES: [(&str, &str); 2] = [("url", "original_url"), ("code", "custom_code")];

pub async fn shorten(
    State(api): State<Arc<Api>>,
    Extension(from): Extension<From>,
    request: Request<Body>,
) -> Result<impl IntoResponse, Problem> {
    let now = time::now();
    let identity = api.identify(request.headers(), from, now).await?;
    let limit = api.limit(identity.as_ref(), from, now).await?;
    match &identity {
        None if !api.open => {
            return Err(Problem::new(401, "this needs a key: send Authorization: Bearer KEY or X-Api-Key: KEY"));
        }
        Some(identity) if !identity.scopes.allows(Scope::LinksWrite) => {
            return Err(Problem::new(403, "this needs a key with the scope links:write"));
        }
        _ => {}
    }
    let (mut draft, mut errors) = draft(json_object(request).await?);
    check_expiry(&mut draft, &mut errors, now);
    let original = draft.url.clone();
    let checked = {
        let links = Arc::clone(api.links()?);
        // The disk is waited for elsewhere; a thread of its own for each check cost a third of a create's CPU time.
        if links.policy_is_due(now) {
            let refreshing = Arc::clone(&links);
            let refresh = tokio::task::spawn_blocking(move || refreshing.refresh_policy(now));
            refresh.await.map_err(|_| Problem::new(500, "the request failed"))?;
        }
        links.check(draft, now)
    };
    let checked = match checked {
        Ok(checked) if errors.is_empty() => checked,
        checked => {
            let known: Vec<String> = errors.iter().map(|error| error.pointer.clone()).collect();
            let more = checked.err().unwrap_or_default().into_iter().map(|bad| FieldError::of(bad, &NAMES));
            // A field of the wrong type is not missing as well.
            errors.extend(more.filter(|error| !known.contains(&error.pointer)));
            return Err(Problem::fields(errors));
        }
    };
    if checked.lookalike {
        let host = url::Url::parse(checked.fields.target.as_str()).ok();
        let host = host.as_ref().and_then(url::Url::host_str).unwrap_or("");
        tracing::info!(host, "a link's host looks like another one");
    }
    let is_new = checked.code.is_none();
    let (key, _) = api.links()?.create(checked, now).await.map_err(|error| match error {
        NotMade::Taken => Problem {
            errors: vec![FieldError {
                pointer: "/custom_code".into(),
                code: "taken",
                detail: "another link has this code: choose another one".into(),
            }],
            ..Problem::new(409, "the code is taken")
        },
        NotMade::Full | NotMade::NumbersUsedUp | NotMade::NoWorkerId => Problem::new(503, error.to_string()),
        NotMade::Store(error) => Problem::of_store(&error),
    })?;
    api.created(key, is_new).await;
    let code = key.code.to_string();
    let short_url = format!("{}/{code}", api.base_url);
    let mut headers: HeaderMap = limit_headers(&limit);
    if let Ok(location) = HeaderValue::from_str(&short_url) {
        headers.insert(header::LOCATION, location);
    }
    let body = json!({"short_code": code, "short_url": short_url, "original_url": original});
    Ok((StatusCode::CREATED, headers, axum::Json(body)))
}

/// A program says when to the second: RFC 3339 with an offset, and not in the past. (People may write `90d` elsewhere.)
fn check_expiry(draft: &mut Draft, errors: &mut Vec<FieldError>, now: UnixMillis) {
    let mut wrong = |code, detail: String| errors.push(FieldError { pointer: "/expires_at".into(), code, detail });
    match draft.expires_at.as_deref().map(str::parse::<jiff::Timestamp>) {
        Some(Err(_)) => {
            wrong("not_a_time", "it is not RFC 3339 with an offset, such as 2027-01-31T09:00:00+01:00".into())
        }
        Some(Ok(at)) if at.as_millisecond() <= now.0 => wrong("in_the_past", "the link would be over already".into()),
        Some(Ok(_)) | None => return,
    }
    draft.expires_at = None;
}

/// The draft that a body is, and every field of the wrong name or type.
fn draft(body: Map<String, Value>) -> (Draft, Vec<FieldError>) {
    let mut draft = Draft::default();
    let mut errors = Vec::new();
    for (name, value) in body {
        let mut wrong = |code, detail: String| {
            let pointer = format!("/{}", name.replace('~', "~0").replace('/', "~1"));
            errors.push(FieldError { pointer, code, detail });
        };
        let text = match &value {
            Value::String(text) => Some(text.clone()),
            _ => None,
        };
        match (name.as_str(), &value) {
            ("custom_code" | "expires_at" | "max_visits", Value::Null) => {}
            ("custom_code" | "expires_at", Value::String(text)) if text.trim().is_empty() => {
                wrong("empty", "it is empty: leave it out".into());
            }
            ("original_url", Value::String(_)) => draft.url = text,
            ("custom_code", Value::String(_)) => draft.code = text,
            ("expires_at", Value::String(_)) => draft.expires_at = text,
            ("max_visits", Value::Number(number)) if number.as_u64().is_some_and(|max| max > 0) => {
                draft.max_visits = number.as_u64();
            }
            ("original_url" | "custom_code" | "expires_at", _) => wrong("not_a_string", "it must be a string".into()),
            ("max_visits", _) => wrong("not_a_count", "it must be a whole number above 0".into()),
            _ => {
                let known = "original_url, custom_code, expires_at, max_visits";
                wrong("unknown_field", format!("there is no such field: the known ones are {known}"));
            }
        }
    }
    (draft, errors)
}
