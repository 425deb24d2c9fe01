//! `GET /api/v1/accounting`: what was answered, and what became of it.
//!
//! `{"instance": {"name", …, "earlier": {…}}, "instances": {name: {…}}, "all": {…}}`, each with `{"answered", "stored",
//! "pending", "dropped": {reason: n}}`, where `answered = stored + pending + dropped`. `instance` is this process since its
//! start, as it knows it itself; `earlier`, without `answered`, is what it has found in its spool of earlier starts, and
//! what became of that since. `instances` and `all`, their sum, are what the store has of every instance that ever ran, as
//! late as their last batch, with `"at"` of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::IntoResponse;
use http::HeaderMap;
use serde_json::{Value, json};

use super::problem::Problem;
use super::{Api, From, away};
use crate::guard::keys::Scope;
use crate::instance::dropped;
use crate::links::rfc3339;
use crate::stats::query::pending;
use crate::store::visited::Account;

pub async fn accounting(
    State(api): State<Arc<Api>>,
    Extension(from): Extension<From>,
    headers: HeaderMap,
) -> Result<impl IntoResponse, Problem> {
    api.require(&headers, from, Scope::Admin).await?;
    if api.instance.store_is_away() {
        return Err(away());
    }
    let accounts = api.reader.stats.accounts().await.map_err(|error| Problem::of_store(&error))?;
    let figures = api.instance.visits();
    let instance = json!({
        "name": api.instance.name(),
        "answered": figures.answered,
        "stored": figures.stored,
        "pending": figures.pending,
        "dropped": dropped(&figures.drops),
        "earlier": figures.earlier.show(),
    });
    let instances: BTreeMap<&str, Value> =
        accounts.iter().map(|account| (account.instance.as_str(), show(account))).collect();
    Ok(axum::Json(json!({"instance": instance, "instances": instances, "all": show(&all(&accounts))})))
}

fn show(account: &Account) -> Value {
    json!({
        "answered": account.answered,
        "stored": account.stored,
        "pending": pending(account.answered, account.stored, &account.drops),
        "dropped": dropped(&account.drops),
        "at": rfc3339(account.at),
    })
}

fn all(accounts: &[Account]) -> Account {
    let mut all = Account::default();
    for account in accounts {
        all.answered += account.answered;
        all.stored += account.stored;
        all.drops.iter_mut().zip(account.drops).for_each(|(sum, drops)| *sum += drops);
        all.at = all.at.max(account.at);
    }
    all
}
