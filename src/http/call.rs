//! The letter of the `api` crossing.

use std::net::IpAddr;

use http::{Request, Response};
use hyper::body::Incoming;
use tokio::sync::oneshot;

use super::visitor::Peer;

/// Requests that wait in the crossing.
pub const CALLS_MAX: usize = 1024;

/// A request that is no redirect, on its way from front to back.
#[derive(Debug)]
pub struct Call {
    pub request: Request<Incoming>,
    pub peer: Peer,
    pub client: IpAddr,
    pub reply: oneshot::Sender<Response<axum::body::Body>>,
}
