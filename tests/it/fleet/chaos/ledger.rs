//! What loadgen's clients saw, by time: what `loadgen verify` does not ask.
//!
//! In: the ledger, the exports, the diary. Out: counts, each by what it is wrong with.
//! Never: excuses what `verify` finds wrong, but for what an asynchronous standby did not have when it became the primary.
//! At the limit: all requests of a campaign are in memory.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use serde_json::Value;
use waypost::domain::time::UnixMillis;

use super::stand::Span;
use crate::campaign::{Created, Ledger, Received, Request, UnixNanos};

#[derive(Debug)]
pub(super) struct Saw(Ledger);

/// Asks for a link that is there.
fn is_for_a_link(request: &Request) -> bool {
    matches!(request.class.as_str(), "clicks" | "launch" | "cold" | "readback")
}

fn millis(at: UnixNanos) -> UnixMillis {
    UnixMillis(at / 1_000_000)
}

/// Sent within one of these.
fn within(request: &Request, spans: &[Span]) -> bool {
    let at = millis(request.sent);
    spans.iter().any(|(from, to)| *from <= at && at <= *to)
}

impl Saw {
    pub(super) fn read(path: &Path) -> Self {
        Self(Ledger::read(path))
    }

    /// Links that were acknowledged and are not there, each acknowledged within one of these spans. `links`: their export.
    #[track_caller]
    pub(super) fn lost(&self, links: &Path, spans: &[Span]) -> HashSet<&str> {
        let exported = std::fs::read_to_string(links).unwrap();
        let there: HashSet<&str> = exported.lines().filter_map(|line| line.split(',').next()).collect();
        let lost: Vec<&Created> =
            self.0.created.iter().filter(|created| !there.contains(created.code.as_str())).collect();
        for Created { at, code } in &lost {
            let at = millis(*at);
            let excused = spans.iter().any(|(from, to)| *from <= at && at <= *to);
            assert!(excused, "I1: {code}, acknowledged at {at}, is lost, which none of {spans:?} explains");
        }
        lost.into_iter().map(|created| created.code.as_str()).collect()
    }

    /// Visits that no link has any more, each of a link that is among the `lost`. `visits`: their export.
    #[track_caller]
    pub(super) fn without_link(&self, visits: &Path, lost: &HashSet<&str>) -> u64 {
        let without =
            self.visits(visits).into_iter().filter(|(_, visit)| visit["code"] == "" && visit["kind"] != "orphan");
        let codes: Vec<&str> = without.map(|(request, _)| request.code.as_str()).collect();
        let others: Vec<&&str> = codes.iter().filter(|code| !lost.contains(*code)).collect();
        assert!(others.is_empty(), "visits without a link, and the links are there: {others:?}");
        codes.len() as u64
    }

    /// I6: visits of requests that no answer came to, sent outside of these spans. `visits`: their export.
    pub(super) fn unexplained(&self, visits: &Path, spans: &[Span]) -> Vec<String> {
        let unanswered = |request: &Request| matches!(request.answer, None | Some(Received { status: 502 | 504, .. }));
        let within = |request: &Request| within(request, spans);
        let visits = self.visits(visits).into_iter().map(|(request, _)| request);
        visits.filter(|request| unanswered(request) && !within(request)).map(|request| format!("{request:?}")).collect()
    }

    /// Visits of the ledger's requests. Those of other clients are of links that were not made while anything could be lost.
    fn visits(&self, exported: &Path) -> Vec<(&Request, Value)> {
        let exported = std::fs::read_to_string(exported).unwrap();
        let visits = exported.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        visits.filter_map(|visit| Some((self.0.requests.get(visit["request_id"].as_str()?)?, visit))).collect()
    }

    /// I3, I8: a redirect to somewhere else, and "there is no such link" of a link that is there.
    pub(super) fn wrong_answers(&self, lost: &HashSet<&str>) -> Vec<String> {
        let is_wrong = |request: &&Request| match request.answer {
            Some(Received { status: 404 | 410, .. }) => is_for_a_link(request) && !lost.contains(request.code.as_str()),
            Some(received) => received.leads_astray(),
            None => false,
        };
        self.0.requests.values().filter(is_wrong).map(|request| format!("{request:?}")).collect()
    }

    /// What did not go well of what was sent within these spans.
    pub(super) fn failures(&self, spans: &[Span], lost: &HashSet<&str>) -> Vec<String> {
        let within = |request: &&Request| within(request, spans);
        let failed = |request: &&Request| !request.went_well() && !lost.contains(request.code.as_str());
        self.0.requests.values().filter(within).filter(failed).map(|request| format!("{request:?}")).collect()
    }

    /// Of each status, how many; 0: no answer.
    pub(super) fn statuses(&self) -> BTreeMap<u16, u64> {
        let mut statuses = BTreeMap::new();
        for request in self.0.requests.values() {
            *statuses.entry(request.answer.map_or(0, |received| received.status)).or_default() += 1;
        }
        statuses
    }
}
