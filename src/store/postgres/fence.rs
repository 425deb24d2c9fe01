//! Fence: keeps away from a former primary, which may believe for ever that it is one.
//!
//! In: which server it is that answers. Out: whether it is still the store, and when another one has become it.
//! Never: lets a server in that was left behind: of one cluster, only the highest timeline that was seen is the store.
//! Believes what a connection says that is older than the last change of servers.
//! At its limit: servers that do not show their timeline are not told apart, nor are two that were promoted from the same
//! one, neither of which knows of the other: both have the same timeline then.
//!
//! Timelines: PostgreSQL manual, "Continuous Archiving and Point-in-Time Recovery". Each promotion begins one, with a higher
//! number than all before it. Another cluster (`initdb`) is another store, which was put in the place of this one on purpose.

use std::time::Instant;

use tokio::sync::watch;

use crate::domain::time;

/// Why what a connection said is not believed.
pub(crate) const FAILED_OVER: &str = "postgres has failed over meanwhile";

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Server {
    cluster: String,
    /// Eight hexadecimal digits, so that their order is that of the numbers.
    timeline: String,
}

impl Server {
    /// None if it does not show its timeline, or is a standby.
    pub(super) fn new(cluster: &str, timeline: &str) -> Option<Self> {
        (!timeline.is_empty()).then(|| Self { cluster: cluster.to_owned(), timeline: timeline.to_owned() })
    }
}

#[derive(Clone, Debug)]
struct Seen {
    server: Server,
    since: Instant,
}

#[derive(Debug, Default)]
pub(crate) struct Fence {
    seen: watch::Sender<Option<Seen>>,
}

impl Fence {
    /// Fails at a former primary, and says so. Another server than before ends all belief in what was connected before.
    pub(super) fn admit(&self, server: Server) -> Result<(), String> {
        let mut admitted = Ok(());
        self.seen.send_if_modified(|seen| match seen {
            Some(Seen { server: known, .. }) if *known == server => false,
            Some(Seen { server: known, .. }) if known.cluster == server.cluster && known.timeline > server.timeline => {
                admitted = Err(format!(
                    "this is a former primary: it is on timeline {}, and one on {} was seen. Make it a standby; if it \
                     was put back on purpose, restart the instances",
                    server.timeline, known.timeline
                ));
                false
            }
            _ => {
                *seen = Some(Seen { server, since: time::monotonic() });
                true
            }
        });
        admitted
    }

    /// Whether the server to which a connection was made at this moment is the store as far as was seen.
    pub(crate) fn believes(&self, made: Instant) -> bool {
        self.seen.borrow().as_ref().is_none_or(|seen| seen.since <= made)
    }

    /// Until another server is the store than when a connection was made.
    pub(crate) async fn moves_on(&self, made: Instant) {
        let has_moved = |seen: &Option<Seen>| seen.as_ref().is_some_and(|seen| seen.since > made);
        // It cannot end: its sender is here.
        let _ = self.seen.subscribe().wait_for(has_moved).await.map(drop);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_former_primary_stays_out() {
        let fence = Fence::default();
        for (cluster, timeline, admitted) in [
            ("a", "00000002", true),
            ("a", "00000002", true),
            ("a", "00000001", false),
            ("a", "0000000A", true),
            ("a", "00000010", true),
            ("a", "0000000F", false),
            // Another one in its place begins anew.
            ("b", "00000001", true),
            ("b", "00000002", true),
            ("b", "00000001", false),
        ] {
            let (before, was) = (time::monotonic(), fence.seen.borrow().as_ref().map(|seen| seen.server.clone()));
            let server = Server::new(cluster, timeline).unwrap();
            assert_eq!(fence.admit(server.clone()).is_ok(), admitted, "{server:?}");
            // Who was connected before goes on if it is the same as before.
            assert_eq!(fence.believes(before), !admitted || was == Some(server.clone()), "{server:?}");
            assert!(fence.believes(time::monotonic()));
        }
        assert_eq!(Server::new("a", ""), None, "a standby is on no timeline of its own");
    }
}
