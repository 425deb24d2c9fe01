//! `GET /api/v1/export`: every link, streamed.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::Extension;
use axum::body::Body;
use axum::extract::{Query, State};
use bytes::Bytes;
use http::{HeaderMap, Response, header};
use serde::Deserialize;
use tokio::sync::mpsc;

use super::problem::Problem;
use super::{Api, From};
use crate::domain::link::LinkId;
use crate::guard::keys::Scope;
use crate::store::row::{Filter, Reading};
use crate::table::{Format, Writer};

/// Links that are read at a time, for one piece of the stream: at 2 KiB each, several copies of it stay far below the
/// megabyte that an unread export may cost.
const PAGE: u32 = 25;
/// Pieces that wait for a client that reads slowly: all that an export keeps in memory beside the one in the making.
const PIECES_MAX: usize = 1;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    format: Option<String>,
}

pub async fn export(
    State(api): State<Arc<Api>>,
    Extension(from): Extension<From>,
    headers: HeaderMap,
    Query(wanted): Query<Wanted>,
) -> Result<Response<Body>, Problem> {
    api.require(&headers, from, Scope::LinksRead).await?;
    let format = Format::parse(wanted.format.as_deref().unwrap_or("csv"))
        .ok_or_else(|| Problem::new(400, "format is csv or ndjson"))?;
    let names = Arc::clone(api.links()?);
    let (pieces, taken) = mpsc::channel::<Result<Bytes, axum::Error>>(PIECES_MAX);
    // Ends when the client has gone: then nobody takes the next piece.
    tokio::spawn(async move {
        let mut writer = Writer::new(format);
        let mut after: Option<LinkId> = None;
        loop {
            let links = match api.store.page(Filter::default(), after, PAGE, Reading::Lately).await {
                Ok(links) => links,
                // The client sees a body that ends early, not one that looks whole.
                Err(error) => return pieces.send(Err(axum::Error::new(error))).await.unwrap_or(()),
            };
            let bytes = writer.write(&links, |domain| names.host(domain));
            after = links.last().map(|link| link.id);
            if pieces.send(Ok(bytes)).await.is_err() || after.is_none() {
                return;
            }
        }
    });
    let mut response = Response::new(Body::new(Pieces(taken)));
    response.headers_mut().insert(header::CONTENT_TYPE, format.content_type());
    Ok(response)
}

/// A body of pieces as they come.
struct Pieces(mpsc::Receiver<Result<Bytes, axum::Error>>);

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, axum::Error>>> {
        self.0.poll_recv(cx).map(|piece| piece.map(|piece| piece.map(http_body::Frame::data)))
    }
}
