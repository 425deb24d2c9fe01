//! Chaos: three instances behind HAProxy, Postgres with an asynchronous standby, Redis; faults drawn by chance, some of them
//! at once; a load all the while.
//!
//! In: how many seconds (`WAYPOST_CHAOS_SECONDS`, 25 by default), a seed (`WAYPOST_SEED`, [`SEED`] by default). Out:
//! the plan, a line for each begin and end with its time, what the judge found, a summary.
//! Never: tells an instance of a fault; excuses what no fault explains.
//! At the limit: each round has at most 22 s, of which faults take 8; what is not over by then makes the next one late.
//!
//! What must hold, whatever happens:
//! - Each redirect that a client received is one visit, none is two, nothing was given up; a visit without an answer was in
//!   flight when an instance went (I4–I7).
//! - No answer of an instance leads elsewhere, or says that a link is not there which is (I3, I8), to whomever.
//! - What an instance has in memory it answers (I9), unless it is itself stopped, or was started without Postgres.
//! - 10 s after the last end of a round there is full service (I11), and until the next round no client sees a failure.
//! - Each link that was acknowledged is there (I1), with its target (I2).
//!
//! One loss is Postgres's own: what was committed and had not reached the asynchronous standby when it became the primary.
//! Links that were acknowledged between a moment by which the standby had everything and its promotion may be gone; they are
//! counted as `lost links`. Their visits are in the store all the same, as every visit that was received; no row names their
//! code any more, so the export leaves it empty, which `loadgen verify` calls `elsewhere`. Each of these findings must be one
//! of such a link; any other fails the campaign.
//!
//! Left out: a full disk of one spool, whose drops `visits_faults::disk` accounts for to the visit.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;
use waypost::domain::time::{self, UnixMillis};

use self::ledger::Saw;
use self::plan::{Event, Fault, ROUND, plan};
use self::stand::{Diary, Span, Stand};
use self::watch::{Odd, Outcome, Seen, Watch};
use crate::campaign::{Account, Judged, Sums};
use crate::support::throughout;

mod ledger;
mod plan;
mod stand;
mod watch;

/// Of the short form: what fails for somebody who changes something failed by that. A replay, lost commits, a Redis that forgets
/// and a reload, all in one round. `script/chaos` draws another one.
const SEED: u64 = 16;
/// Requests a second.
const RATE: u32 = if cfg!(debug_assertions) { 150 } else { 600 };
/// Of a span without faults, at its end: what was sent by then has its answer before the next fault.
const MARGIN_MS: i64 = 2_500;
/// How long HAProxy waits for an answer.
const IN_FLIGHT_MS: i64 = 6_000;
/// What was under way when a fault began, or is late when it has ended.
const EDGE_MS: i64 = 1_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Edge {
    Begin,
    End,
}

/// Carries the rounds out; the spans without faults.
#[expect(clippy::print_stdout, reason = "the log of the faults is what is asked for")]
fn carry_out(stand: &mut Stand, rounds: &[Vec<Event>]) -> Vec<Span> {
    let begun = time::monotonic();
    let since = || time::monotonic().duration_since(begun);
    let mut calm = Vec::new();
    for (number, round) in rounds.iter().enumerate() {
        // Late if the one before took too long.
        let at = since().max(ROUND * u32::try_from(number).unwrap());
        let mut edges: Vec<(Duration, Edge, Event)> = Vec::new();
        for event in round {
            let begin = at + Duration::from_millis(event.begin_ms);
            edges.push((begin, Edge::Begin, *event));
            edges.push((begin + Duration::from_millis(event.for_ms), Edge::End, *event));
        }
        edges.sort_by_key(|(at, ..)| *at);
        for (at, edge, event) in edges {
            throughout(at.saturating_sub(since()), || stand.tick());
            let begins = since();
            match edge {
                Edge::Begin => stand.begin(event),
                Edge::End => stand.end(event),
            }
            let (begins, ends) = (begins.as_secs_f64(), since().as_secs_f64());
            println!("{begins:8.3} s, round {}: {edge:?} {event}; done at {ends:.3} s", number + 1);
        }
        let took = stand.serves();
        let from = time::now();
        println!("{:8.3} s, round {}: full service after {took:?}", since().as_secs_f64(), number + 1);
        stand.made_whole();
        let next = ROUND * u32::try_from(number + 1).unwrap();
        throughout(next.saturating_sub(since()), || {});
        calm.push((from, UnixMillis(time::now().0 - MARGIN_MS)));
    }
    calm
}

/// What the watchers saw that nothing excuses.
fn unexcused<'a>(seen: &'a Seen, diary: &Diary) -> Vec<&'a Odd> {
    let within = |odd: &Odd, spans: &[(usize, Span)]| {
        spans.iter().any(|(instance, (from, to))| {
            *instance == odd.instance && odd.from.0 <= to.0.saturating_add(EDGE_MS) && from.0 - EDGE_MS <= odd.to.0
        })
    };
    let excused = |odd: &&Odd| match &odd.outcome {
        Outcome::Nothing(_) => within(odd, &diary.down),
        Outcome::Answered { status: 503, .. } => within(odd, &diary.without_store),
        Outcome::Answered { .. } => false,
    };
    seen.odd.iter().filter(|odd| !excused(odd)).collect()
}

#[expect(clippy::print_stdout, reason = "the plan, the log and the summary are what is asked for")]
fn campaign(seconds: u64, seed: u64) {
    let program = if cfg!(debug_assertions) { "cargo test" } else { "cargo test --release" };
    println!(
        "{seconds} s of chaos; again by: WAYPOST_CHAOS_SECONDS={seconds} WAYPOST_SEED={seed} {program} --test it \
         fleet::chaos::short -- --exact --nocapture"
    );
    let rounds = plan(seconds, seed);
    for (number, round) in rounds.iter().enumerate() {
        let events: Vec<String> = round.iter().map(ToString::to_string).collect();
        println!("round {}: {}", number + 1, events.join(", "));
    }
    let mut stand = Stand::new();
    // Some rounds may be late.
    let load_s = u32::try_from(2 * seconds + 60).unwrap();
    let load = stand.fleet.load(stand.haproxy.address().port(), RATE, load_s);
    let watch = Watch::begin(&stand.addresses());
    let calm = carry_out(&mut stand, &rounds);
    let stopped = time::now();
    let (path, seen) = (load.stop(), watch.end());

    let account = Account::settled(&stand.fleet.servers());
    let folder = stand.fleet.deployment.path("");
    let command = |arguments: &[&str]| {
        let mut command = stand.fleet.deployment.command(arguments);
        command.env("WAYPOST_POSTGRES__STATEMENT_TIMEOUT", "60s");
        command
    };
    let sums = Sums::of(|sql| stand.sql(sql).parse().unwrap());
    let judged = Judged::judge(&folder, &path, command, account, sums);
    println!("{:#}", judged.said);

    let ledger = Saw::read(&path);
    let lost = ledger.lost(&folder.join("links.csv"), &stand.diary.lost);
    let without_link = ledger.without_link(&folder.join("visits.ndjson"), &lost);
    let failures = ledger.failures(&calm, &lost);
    // What was in flight when an instance went, or loadgen.
    let in_flight = |from: UnixMillis, to: UnixMillis| (UnixMillis(from.0 - IN_FLIGHT_MS), to);
    let mut went: Vec<Span> = stand.diary.down.iter().map(|(_, (from, to))| in_flight(*from, *to)).collect();
    went.push(in_flight(stopped, UnixMillis::NEVER));
    let unexplained = ledger.unexplained(&folder.join("visits.ndjson"), &went);
    let calm_ms: i64 = calm.iter().map(|(from, to)| to.0 - from.0).sum();
    let mut kinds: BTreeMap<Fault, usize> = BTreeMap::new();
    rounds.iter().flatten().for_each(|event| *kinds.entry(event.fault).or_default() += 1);
    println!(
        "seed {seed}: {seconds} s, {} faults in {} rounds {kinds:?}; {} requests {:?}, {} redirects, {} visits of them, {} \
         explained, {} links made, {} lost with a primary, {without_link} visits of those; {} answers right to watchers, {} \
         not, each by a fault; {} failures in {:.1} s without faults",
        rounds.iter().flatten().count(),
        rounds.len(),
        judged.of("requests", "sent"),
        ledger.statuses(),
        judged.of("requests", "redirects"),
        judged.of("visits", "of_this_run"),
        judged.explained(),
        judged.of("requests", "created"),
        lost.len(),
        seen.right,
        seen.odd.len(),
        failures.len(),
        calm_ms as f64 / 1000.0,
    );

    let empty: [String; 0] = [];
    assert_eq!(ledger.wrong_answers(&lost), empty, "I3, I8");
    let unexcused: Vec<String> = unexcused(&seen, &stand.diary).into_iter().map(Odd::to_string).collect();
    assert!(
        unexcused.is_empty(),
        "I3, I8, I9: {} of {} {:#?}",
        unexcused.len(),
        seen.odd.len(),
        &unexcused[..unexcused.len().min(20)]
    );
    assert_eq!(unexplained, empty, "I6");
    assert_eq!(failures, empty, "I11");
    let panicked: Vec<_> = stand.lines().filter(|(_, line)| line.contains("panicked")).collect();
    assert!(panicked.is_empty(), "I10: {panicked:#?}");
    let known = [("link_lost", lost.len() as u64), ("elsewhere", without_link)];
    for (what, count) in known {
        assert_eq!(judged.wrong(what), count, "{what}, and what a lost primary explains of it: {:#}", judged.said);
    }
    let groups = judged.said["wrong"].as_array().unwrap().iter();
    let others: Vec<&Value> = groups.filter(|group| known.iter().all(|(what, _)| group["wrong"] != *what)).collect();
    assert!(others.is_empty(), "{others:#?}");
    assert_eq!(judged.account.dropped(), 0, "{:?}", judged.account);
    assert!(judged.of("requests", "redirects") > 100 && seen.right > 100, "a judge that sees nothing finds nothing");
}

#[test]
fn short() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    campaign(number("WAYPOST_CHAOS_SECONDS").unwrap_or(25), number("WAYPOST_SEED").unwrap_or(SEED));
}
