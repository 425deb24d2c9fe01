//! What loadgen's clients saw, by time: what `loadgen verify` does not ask.
//!
//! In: the ledger (`loadgen/LEDGER.md`), the exports, the diary. Out: counts, each by what it is wrong with.
//! Never: excuses what `verify` finds wrong, but for what an asynchronous standby did not have when it became the primary.
//! At the limit: all requests of a campaign are in memory.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use serde_json::Value;
use waypost::domain::time::UnixMillis;

use super::stand::Span;

#[derive(Debug)]
struct Request {
    at: UnixMillis,
    class: String,
    code: String,
    /// Status, and whether it led to the right target.
    answer: Option<(u16, bool)>,
}

#[derive(Debug)]
struct Created {
    at: UnixMillis,
    code: String,
}

#[derive(Debug)]
pub(super) struct Ledger {
    requests: HashMap<String, Request>,
    created: Vec<Created>,
}

impl Request {
    /// Whether it came to what loadgen's scenario expects of it.
    fn went_well(&self) -> bool {
        let Some((status, right)) = self.answer else { return false };
        match self.class.as_str() {
            "create" => status == 201,
            "stats" => status == 200,
            "typo" => status == 404,
            _ => (300..400).contains(&status) && right,
        }
    }

    /// Asks for a link that is there.
    fn is_for_a_link(&self) -> bool {
        matches!(self.class.as_str(), "clicks" | "launch" | "cold" | "readback")
    }
}

impl Ledger {
    pub(super) fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap();
        let mut lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
        let first: Vec<&str> = lines.next().unwrap().split('\t').collect();
        let begun_ns: i64 = first[5].parse().unwrap();
        let at = |field: &str| UnixMillis((begun_ns + field.parse::<i64>().unwrap()) / 1_000_000);
        let mut this = Self { requests: HashMap::new(), created: Vec::new() };
        for line in lines {
            match line.split('\t').collect::<Vec<_>>()[..] {
                ["S", id, sent, class, _, code] => {
                    let request =
                        Request { at: at(sent), class: class.to_owned(), code: code.to_owned(), answer: None };
                    this.requests.insert(id.to_owned(), request);
                }
                ["R", id, _, status, right] => {
                    this.requests.get_mut(id).unwrap().answer = Some((status.parse().unwrap(), right == "1"));
                }
                ["C", _, acknowledged, code, _] => {
                    this.created.push(Created { at: at(acknowledged), code: code.to_owned() });
                }
                _ => panic!("no line of a ledger: {line:?}"),
            }
        }
        this
    }

    /// Links that were acknowledged and are not there, each acknowledged within one of these spans. `links`: their export.
    #[track_caller]
    pub(super) fn lost(&self, links: &Path, spans: &[Span]) -> HashSet<&str> {
        let exported = std::fs::read_to_string(links).unwrap();
        let there: HashSet<&str> = exported.lines().filter_map(|line| line.split(',').next()).collect();
        let lost: Vec<&Created> =
            self.created.iter().filter(|created| !there.contains(created.code.as_str())).collect();
        for Created { at, code } in &lost {
            let excused = spans.iter().any(|(from, to)| from <= at && at <= to);
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
        let unanswered = |request: &Request| matches!(request.answer, None | Some((502 | 504, _)));
        let within = |request: &Request| spans.iter().any(|(from, to)| *from <= request.at && request.at <= *to);
        let visits = self.visits(visits).into_iter().map(|(request, _)| request);
        visits.filter(|request| unanswered(request) && !within(request)).map(|request| format!("{request:?}")).collect()
    }

    /// Visits of the ledger's requests. Those of other clients are of links that were not made while anything could be lost.
    fn visits(&self, exported: &Path) -> Vec<(&Request, Value)> {
        let exported = std::fs::read_to_string(exported).unwrap();
        let visits = exported.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        visits.filter_map(|visit| Some((self.requests.get(visit["request_id"].as_str()?)?, visit))).collect()
    }

    /// I3, I8: a redirect to somewhere else, and "there is no such link" of a link that is there.
    pub(super) fn wrong_answers(&self, lost: &HashSet<&str>) -> Vec<String> {
        let is_wrong = |request: &&Request| match request.answer {
            Some((404 | 410, _)) => request.is_for_a_link() && !lost.contains(request.code.as_str()),
            Some((status, right)) => (300..400).contains(&status) && !right,
            None => false,
        };
        self.requests.values().filter(is_wrong).map(|request| format!("{request:?}")).collect()
    }

    /// What did not go well of what was sent within these spans.
    pub(super) fn failures(&self, spans: &[Span], lost: &HashSet<&str>) -> Vec<String> {
        let within = |request: &&Request| spans.iter().any(|(from, to)| *from <= request.at && request.at <= *to);
        let failed = |request: &&Request| !request.went_well() && !lost.contains(request.code.as_str());
        self.requests.values().filter(within).filter(failed).map(|request| format!("{request:?}")).collect()
    }

    /// Of each status, how many; 0: no answer.
    pub(super) fn statuses(&self) -> BTreeMap<u16, u64> {
        let mut statuses = BTreeMap::new();
        for request in self.requests.values() {
            *statuses.entry(request.answer.map_or(0, |(status, _)| status)).or_default() += 1;
        }
        statuses
    }
}
