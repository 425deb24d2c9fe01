//! A visit: a redirect that left.

use std::net::IpAddr;

use super::link::LinkId;
use super::time::UnixMillis;

/// What the recorder is told of a redirect, before it leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visit {
    pub link: LinkId,
    pub at: UnixMillis,
    pub kind: Kind,
    /// The client's address, as `guard::address` decided it.
    pub client: IpAddr,
}

/// What kind of request it was, as far as the request's own head says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Click,
    Head,
    /// `Sec-Purpose: prefetch`: nobody has looked yet.
    Prefetch,
}
