//! A visit: a redirect that left.

use std::net::IpAddr;

use super::key::Key;
use super::link::LinkId;
use super::time::UnixMillis;

/// What the recorder is told of an answer, before it leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visit<'a> {
    pub of: Of<'a>,
    pub at: UnixMillis,
    /// The client's address, as `guard::address` decided it.
    pub client: IpAddr,
    /// As the client wrote them; empty where it did not.
    pub agent: &'a [u8],
    pub referrer: &'a [u8],
    /// The balancer's, of a trusted peer alone; else empty.
    pub request_id: &'a [u8],
    /// The client asked not to be tracked, and that is honoured.
    pub not_tracked: bool,
}

/// What was visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of<'a> {
    Link(LinkId, Kind),
    /// An unknown or dead code, a fallback. None: what was asked for is no code at all; it is only counted.
    Orphan(Option<&'a Key>),
}

/// What kind of request it was, as far as the request's own head says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Click,
    Head,
    /// `Sec-Purpose: prefetch`: nobody has looked yet.
    Prefetch,
}

/// What kind of visit it is, once back has looked at the agent. The numbers are those of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Class {
    Click = 0,
    /// curl, HTTP libraries, an empty agent or one of a single word: counted as a click, shown apart.
    Tool = 1,
    /// Declared crawlers, previewers, monitors.
    Bot = 2,
    Head = 3,
    Prefetch = 4,
    Orphan = 5,
}

impl Class {
    /// In the order of their numbers.
    pub const ALL: [Self; 6] = [Self::Click, Self::Tool, Self::Bot, Self::Head, Self::Prefetch, Self::Orphan];
    /// The classes of visits of a link: all but orphans.
    pub const OF_LINKS: usize = 5;

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Click => "click",
            Self::Tool => "tool",
            Self::Bot => "bot",
            Self::Head => "head",
            Self::Prefetch => "prefetch",
            Self::Orphan => "orphan",
        }
    }
}

/// Why a visit is not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dropped {
    RingFull,
    SpoolError,
    SpoolFull,
    Corrupt,
    FailoverGap,
    Refused,
    Bot,
}

impl Dropped {
    pub const ALL: [Self; 7] =
        [Self::RingFull, Self::SpoolError, Self::SpoolFull, Self::Corrupt, Self::FailoverGap, Self::Refused, Self::Bot];

    /// As metrics, the accounting and the store name it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::RingFull => "ring_full",
            Self::SpoolError => "spool_error",
            Self::SpoolFull => "spool_full",
            Self::Corrupt => "corrupt",
            Self::FailoverGap => "failover_gap",
            Self::Refused => "refused",
            Self::Bot => "bot",
        }
    }
}

/// Visits that are given up, by [`Dropped::ALL`].
pub type Drops = [u64; Dropped::ALL.len()];
