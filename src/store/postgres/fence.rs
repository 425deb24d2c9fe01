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

use std::sync::Arc;

use tokio::sync::watch;

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

#[derive(Debug, Default)]
struct Seen {
    /// None until one that shows its timeline was admitted.
    server: Option<Server>,
    /// How often another one has become the store.
    term: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Fence {
    seen: watch::Sender<Seen>,
}

/// A connection's, as long as the server that it leads to is the store.
#[derive(Clone, Debug)]
pub(crate) struct Admission {
    fence: Arc<Fence>,
    term: u64,
}

impl Fence {
    /// Fails at a former primary, and says so. Another server than before ends all admissions to that one. Who does not say
    /// which server it is gets in.
    pub(super) fn admit(self: &Arc<Self>, server: Option<Server>) -> Result<Admission, String> {
        let mut admitted = Ok(0);
        self.seen.send_if_modified(|seen| {
            let is_new = match (&seen.server, &server) {
                (_, None) => false,
                (Some(known), Some(server)) if known.cluster == server.cluster && known.timeline > server.timeline => {
                    admitted = Err(format!(
                        "this is a former primary: it is on timeline {}, and one on {} was seen. Make it a standby; if it \
                         was put back on purpose, restart the instances",
                        server.timeline, known.timeline
                    ));
                    return false;
                }
                (known, server) => known != server,
            };
            if is_new {
                *seen = Seen { term: seen.term + 1, server };
            }
            admitted = Ok(seen.term);
            is_new
        });
        Ok(Admission { fence: Arc::clone(self), term: admitted? })
    }
}

impl Admission {
    pub(crate) fn holds(&self) -> bool {
        self.fence.seen.borrow().term == self.term
    }

    /// Until another server is the store.
    pub(crate) async fn ends(&self) {
        // It cannot fail: the sender is here.
        let _ = self.fence.seen.subscribe().wait_for(|seen| seen.term != self.term).await.map(drop);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_former_primary_stays_out() {
        let fence = Arc::<Fence>::default();
        let mut before: Option<Admission> = None;
        for (cluster, timeline, admits, ends_those_before) in [
            ("a", "00000002", true, false),
            ("a", "00000002", true, false),
            ("a", "00000001", false, false),
            ("a", "0000000A", true, true),
            ("a", "00000010", true, true),
            ("a", "0000000F", false, false),
            // Another one in its place begins anew.
            ("b", "00000001", true, true),
            ("b", "00000002", true, true),
            ("b", "00000001", false, false),
            // A standby is on no timeline of its own.
            ("b", "", true, false),
        ] {
            let admitted = fence.admit(Server::new(cluster, timeline));
            assert_eq!(admitted.is_ok(), admits, "{cluster} {timeline}");
            assert!(before.as_ref().is_none_or(|before| before.holds() != ends_those_before), "{cluster} {timeline}");
            if let Ok(admission) = admitted {
                assert!(admission.holds(), "{cluster} {timeline}");
                before = Some(admission);
            }
        }
    }
}
