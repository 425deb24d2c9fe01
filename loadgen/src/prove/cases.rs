//! The cases, as data: what the stub does, what is asked of it, and what the truth must look like.
//!
//! In: whether the proof is a short one. Out: [`Case`]s whose texts are whole scenarios but for the target. Never: a case
//! whose truth depends on how fast the machine is, as long as it is fast enough for some thousand requests a second.

use crate::stub::script::{Script, Slow, Window};

/// One proof.
#[derive(Debug, Clone)]
pub struct Case {
    pub name: &'static str,
    /// What a generator that is wrong about it would get wrong.
    pub why: &'static str,
    pub script: Script,
    /// TOML; every request carries the header by which the stub knows when it was due.
    pub scenario: String,
    pub loss: Loss,
    pub fluid: Option<Fluid>,
    /// The stub reads each request as it comes and has time for it: it knows when they were sent.
    pub read_at_once: bool,
    /// Part of the short proof as well.
    pub short: bool,
}

/// What becomes of requests that get no right answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Every request is answered, rightly or wrongly.
    None,
    /// Some are reset, and those are all.
    Reset,
    /// Some are never answered and time out, and those are all.
    TimedOut,
    /// From some instant on no request is answered.
    Hung,
}

/// A stall's quantiles as the fluid queue has them: x_q = S - (1 - q)(1 - ρ)T while the backlog of a stall of S in a run
/// of T is worked off before its end, with ρ the share of the capacity that the load takes. It is the sum of two
/// triangles: the arrivals of the stall wait for S down to 0, and those that find the backlog for what is left of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fluid {
    pub stall_ns: u64,
    pub run_ns: u64,
    pub load: f64,
    /// How much longer each age is, where the run ends in the stall: the answers are waited for so long.
    pub waited_ns: u64,
}

impl Fluid {
    /// The quantile's value, where it lies in the stall.
    #[must_use]
    pub fn quantile_ns(&self, q: f64) -> Option<f64> {
        let into = self.stall_ns as f64 - (1.0 - q) * (1.0 - self.load) * self.run_ns as f64;
        (into > 0.0).then_some(into + self.waited_ns as f64)
    }
}

/// Requests a second of most cases.
const RATE: u64 = 2_000;
/// Twice of it: a backlog is worked off as fast as it grew.
const CAPACITY: f64 = 4_000.0;
const MS: u64 = 1_000_000;

/// Who connects how.
const POOL: &str = "{ kind = \"pool\", max = 64, when_full = \"queue\" }";
const PER_REQUEST: &str = "{ kind = \"per_request\", max = 4096, when_full = \"grow\" }";

/// All cases of a proof, in the order of the design. A whole one takes ten seconds for each, a short one three for each
/// of some.
#[must_use]
pub fn cases(short: bool) -> Vec<Case> {
    // A tenth of each run.
    let part_ms = if short { 300 } else { 1_000 };
    let part_ns = part_ms * MS;
    let window = |from: u64, lasts: u64| Some(Window { from_ns: from * part_ns, lasts_ns: lasts * part_ns });
    let steady = |rate: u64, connection: &str| scenario(connection, "30s", 2 * part_ms, &[(10 * part_ms, rate)]);
    let quick = Script { service_ns: MS / 10, ..Script::default() };
    let stall = Fluid { stall_ns: 2 * part_ns, run_ns: 10 * part_ns, load: 0.0, waited_ns: 0 };
    let all = vec![
        Case {
            name: "no fault",
            why: "answers take 0.7 ms, however long the generator slept or worked before it saw them",
            script: Script { service_ns: 7 * MS / 10, ..Script::default() },
            scenario: steady(1_000, POOL),
            loss: Loss::None,
            fluid: None,
            read_at_once: true,
            short: true,
        },
        Case {
            name: "stall",
            why: "requests that were due in the stall have waited since they were due",
            script: Script { capacity_per_s: Some(CAPACITY), stall: window(3, 2), ..quick.clone() },
            scenario: steady(RATE, POOL),
            loss: Loss::None,
            fluid: Some(Fluid { load: RATE as f64 / CAPACITY, ..stall }),
            read_at_once: false,
            short: true,
        },
        Case {
            name: "stall to the end",
            why: "requests that are never answered are not forgotten: each takes at least as long as it has",
            script: Script { stall: Some(Window { from_ns: 8 * part_ns, lasts_ns: u64::MAX }), ..quick.clone() },
            scenario: steady(RATE, POOL),
            loss: Loss::Hung,
            fluid: Some(Fluid { waited_ns: 2 * part_ns, ..stall }),
            read_at_once: false,
            short: true,
        },
        Case {
            name: "stuck connection",
            why: "63 of 64 connections are idle: one that hangs holds nobody else up",
            script: Script { stuck_one_of: Some(64), ..quick.clone() },
            scenario: scenario(POOL, "1s", 2_000, &[(10 * part_ms, RATE)]),
            loss: Loss::TimedOut,
            fluid: None,
            read_at_once: false,
            short: true,
        },
        Case {
            name: "accept stall",
            why: "the time until a connection is accepted is part of its request's",
            script: Script { accept_stall: window(4, 2), ..quick.clone() },
            scenario: steady(RATE / 4, PER_REQUEST),
            loss: Loss::None,
            fluid: None,
            read_at_once: false,
            short: false,
        },
        Case {
            name: "overload",
            why: "while more comes than can be served, the wait grows by the second",
            script: Script { capacity_per_s: Some(2_500.0), ..quick.clone() },
            scenario: scenario(
                POOL,
                "30s",
                2 * part_ms,
                &[(3 * part_ms, 1_000), (3 * part_ms, 4_000), (4 * part_ms, 500)],
            ),
            loss: Loss::None,
            fluid: None,
            read_at_once: false,
            short: false,
        },
        Case {
            name: "two speeds",
            why: "2 % of answers take 50 ms by nature: nothing is to be filled in below them",
            script: Script {
                service_ns: MS,
                slow: Some(Slow { share: 0.02, service_ns: 50 * MS }),
                ..Script::default()
            },
            scenario: steady(RATE, POOL),
            loss: Loss::None,
            fluid: None,
            read_at_once: false,
            short: true,
        },
        Case {
            name: "fast errors",
            why: "errors are answered at once and must not make the percentiles better",
            script: Script { service_ns: 3 * MS, fail: window(4, 3), ..Script::default() },
            scenario: steady(RATE, POOL),
            loss: Loss::None,
            fluid: None,
            read_at_once: false,
            short: true,
        },
        Case {
            name: "resets",
            why: "a reset is an outcome of its own, and costs its connection and nothing else",
            script: Script { service_ns: MS, reset_share: 0.01, ..Script::default() },
            scenario: steady(RATE / 2, POOL),
            loss: Loss::Reset,
            fluid: None,
            read_at_once: false,
            short: false,
        },
        Case {
            name: "dripping body",
            why: "an answer is over with its last byte, not with its first",
            script: Script { drip_ns: MS / 2, ..quick },
            scenario: steady(RATE / 4, POOL),
            loss: Loss::None,
            fluid: None,
            read_at_once: false,
            short: false,
        },
    ];
    all.into_iter().filter(|case| case.short || !short).collect()
}

/// A scenario with one class of traffic and phases of (milliseconds, requests a second).
fn scenario(connection: &str, timeout: &str, drain_ms: u64, phases: &[(u64, u64)]) -> String {
    let mut text = format!(
        r#"[run]
target = "http://127.0.0.1:8080"
seed = 1
workers = 1
timeout = "{timeout}"
drain = "{drain_ms}ms"

[links]
proof = {{ count = 10_000 }}

[traffic.clicks]
request = "GET /{{code}}"
code = {{ pick = "uniform", from = "proof" }}
headers = {{ X-Loadgen-Intended = "{{intended}}" }}
expect = {{ status = [307], location = "known" }}
connection = {connection}
"#
    );
    for (number, (for_ms, rate)) in phases.iter().enumerate() {
        text += &format!(
            "\n[[phase]]\nname = \"step {}\"\nfor = \"{for_ms}ms\"\nrate = {rate}\nmix = {{ clicks = 1 }}\n",
            number + 1
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{Fluid, cases};

    /// The table of a stall of 2 s in a minute: at a twentieth and at half of the capacity.
    #[test]
    fn the_fluid_queue_has_the_quantiles_of_the_table() {
        let s = 1_000_000_000;
        let check = |load: f64, q: f64, expected_s: Option<f64>| {
            let fluid = Fluid { stall_ns: 2 * s, run_ns: 60 * s, load, waited_ns: 0 };
            let found_s = fluid.quantile_ns(q).map(|ns| (ns / 1e6).round() / 1e3);
            assert_eq!(found_s, expected_s, "p{} at {load}", q * 100.0);
        };
        check(0.05, 0.95, None);
        check(0.05, 0.97, Some(0.29));
        check(0.05, 0.99, Some(1.43));
        check(0.05, 0.999, Some(1.943));
        check(0.5, 0.95, Some(0.5));
        check(0.5, 0.99, Some(1.7));
        check(0.5, 0.999, Some(1.97));
    }

    #[test]
    fn names_are_their_own_and_the_short_proof_is_a_part() {
        let names = |short| cases(short).iter().map(|case| case.name).collect::<Vec<_>>();
        let (all, short) = (names(false), names(true));
        for (at, name) in all.iter().enumerate() {
            assert!(!all[..at].contains(name), "{name}");
        }
        assert!(short.iter().all(|name| all.contains(name)) && short.len() < all.len());
    }
}
