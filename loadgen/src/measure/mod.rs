//! What happened to each request, kept in a memory that does not grow with the run.
//!
//! In: from a worker, one call for each arrival that became due and one for each that ended; no allocation, no lock.
//! Out: each second a [`batch::Batch`] goes over a bounded channel to the collector, which adds it to [`totals::Totals`]
//! without loss (histograms are added, never sampled) and gives the emptied batch back. Never: drops a sample. At its
//! limit: a worker whose batches nobody takes goes on filling the one that it has.
//!
//! Times are nanoseconds. A histogram has three digits from 1 µs to an hour, and its exact smallest and largest value.

pub mod batch;
#[cfg(test)]
pub(crate) mod fixture;
pub mod hgrm;
pub mod hlog;
pub mod percentile;
pub mod recorder;
pub mod seconds;
pub mod totals;

/// How a request ended. Each arrival of the plan ends in exactly one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Outcome {
    /// Answered, with everything that was expected.
    Ok,
    WrongStatus,
    /// A redirect to somewhere else: cross-talk between links, or a stale answer.
    WrongLocation,
    WrongBody,
    /// What came is no HTTP/1.1.
    ProtocolError,
    /// Nobody listens there.
    Refused,
    Reset,
    /// The server closed before the answer was whole.
    ClosedEarly,
    /// No whole answer within `timeout` of the intended instant.
    Timeout,
    /// No connection was free for it: within `timeout`, until the run's end, or at once with `shed`.
    Unsent,
    /// Neither answered nor late when the run ended.
    InFlightAtEnd,
    /// This process may open no more files: the generator's fault.
    NoFd,
    /// No local port is left for its address: the generator's fault.
    NoPort,
    /// A `fresh` read before any code was created: the scenario's fault.
    NoCode,
}

impl Outcome {
    pub const ALL: [Self; 14] = [
        Self::Ok,
        Self::WrongStatus,
        Self::WrongLocation,
        Self::WrongBody,
        Self::ProtocolError,
        Self::Refused,
        Self::Reset,
        Self::ClosedEarly,
        Self::Timeout,
        Self::Unsent,
        Self::InFlightAtEnd,
        Self::NoFd,
        Self::NoPort,
        Self::NoCode,
    ];
    pub const COUNT: usize = Self::ALL.len();

    /// As in `run.json` and in SLOs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::WrongStatus => "wrong_status",
            Self::WrongLocation => "wrong_location",
            Self::WrongBody => "wrong_body",
            Self::ProtocolError => "protocol_error",
            Self::Refused => "refused",
            Self::Reset => "reset",
            Self::ClosedEarly => "closed_early",
            Self::Timeout => "timeout",
            Self::Unsent => "unsent",
            Self::InFlightAtEnd => "in_flight_at_end",
            Self::NoFd => "no_fd",
            Self::NoPort => "no_port",
            Self::NoCode => "no_code",
        }
    }

    /// Its response time is known only to be at least its age: it counts in percentiles as that bound.
    #[must_use]
    pub fn is_censored(self) -> bool {
        matches!(self, Self::Timeout | Self::Unsent | Self::InFlightAtEnd)
    }

    /// The server was not asked, for a reason on this side of the wire.
    #[must_use]
    pub fn is_ours(self) -> bool {
        matches!(self, Self::NoFd | Self::NoPort | Self::NoCode)
    }
}

/// One request that ended. Instants are of [`crate::clock::now_ns`]; 0 where it never came that far.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    pub segment: u16,
    pub traffic: u16,
    pub outcome: Outcome,
    /// 0: none came.
    pub status: u16,
    /// Read from the socket for this answer.
    pub bytes: u32,
    pub intended_ns: u64,
    /// When a worker took it out of the plan.
    pub picked_ns: u64,
    pub sent_ns: u64,
    pub first_byte_ns: u64,
    /// Also the end of those without an answer.
    pub done_ns: u64,
    /// When the worker woke up for the event that ended it: `done - woken` is time in our own batch.
    pub woken_ns: u64,
    /// For a code that another class created: when that was answered; else 0.
    pub created_ns: u64,
}

/// A time that is measured of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// `done - intended` of what was answered rightly: the headline.
    Response,
    /// Ages of what is known only to have taken at least that long.
    Censored,
    /// `done - intended` of what was answered, but not rightly: fast errors improve no percentile.
    Failed,
    /// `done - sent`: what a closed-loop tool shows.
    Service,
    /// `first byte - sent`.
    Ttfb,
    /// `sent - picked`: no free connection, connecting.
    ConnWait,
    /// `done - created` of the first right answer for a fresh code.
    Visible,
    /// From the intended instant until an arrival of the plan left our hands: our fault.
    GenLag,
    /// `done - woken`: ours too.
    RxLag,
}

impl Kind {
    pub const COUNT: usize = 9;
}

/// What happened to connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Connected {
    Asked,
    Opened,
    /// Refused, reset or timed out while it was being opened.
    Failed,
    /// This process had no file or no port for it.
    FailedByUs,
    /// By the server, whatever was in flight.
    ClosedByServer,
    /// By us: the class wants it so, a time-out, an answer that is none, the end.
    Closed,
    /// Bytes came that answer no request: whatever they are, they are nobody's.
    Unsolicited,
}

impl Connected {
    pub const COUNT: usize = 7;
}
