//! What is allowed in a scenario and probably not meant.
//!
//! In: a checked [`Scenario`]. Out: sentences, each with what to change. Never: refuses anything.

use ipnet::IpNet;

use super::{ConnectionKind, Requests, Scenario, Traffic, rates};
use crate::units;

/// An answer time that a server of redirects may well reach under load, for Little's law.
const SLOW_S: f64 = 0.01;

/// Local ports of one address, Linux's default (`net.ipv4.ip_local_port_range`, 32768 to 60999).
const PORTS: f64 = 28_232.0;

/// Linux keeps a closed connection's port for so long (`TCP_TIMEWAIT_LEN`).
const TIME_WAIT_S: f64 = 60.0;

/// Sentences for people; empty where nothing is doubtful.
#[must_use]
pub fn warnings(scenario: &Scenario) -> Vec<String> {
    let mut found = Vec::new();
    if scenario.run.drain_ns < scenario.run.timeout_ns {
        found.push(format!(
            "drain {} is shorter than timeout {}: answers to the last requests may be cut off",
            units::exact_duration(scenario.run.drain_ns),
            units::exact_duration(scenario.run.timeout_ns)
        ));
    }
    for phase in scenario.phases.iter().filter(|phase| !phase.mix.is_empty()) {
        let expected = rates::arrivals(&phase.curve, phase.for_ns);
        if expected < 1.0 {
            let (name, length) = (&phase.name, units::exact_duration(phase.for_ns));
            found.push(format!("{name}: {expected:.2} arrivals in {length}: give it a higher rate, or more time"));
        }
    }
    for (index, traffic) in scenario.traffic.iter().enumerate() {
        let name = &traffic.name;
        let used = scenario
            .phases
            .iter()
            .any(|phase| phase.also.contains(&index) || phase.mix.iter().any(|&(in_mix, _)| in_mix == index));
        if !used {
            found.push(format!("{name} is in no phase's mix or also: it is never sent"));
        }
        let rate = highest_rate(scenario, index);
        // Little's law: as many are in flight as arrive while one is answered.
        let in_use = connections(rate, SLOW_S, traffic.connection.pipeline);
        if traffic.closed.is_none() && in_use > traffic.connection.max as u64 {
            found.push(format!(
                "{name}: at {} and answers in {} some {} connections are in use, and at most {} may be open: raise \
                 connection.max",
                units::rate(rate),
                units::duration((SLOW_S * 1e9) as u64),
                units::count(in_use),
                units::count(traffic.connection.max as u64)
            ));
        }
        let (needed, there) = (addresses_needed(scenario, traffic, index), addresses(traffic.bind));
        if needed > there {
            found.push(format!(
                "{name}: closed connections keep their local ports for a minute; at {} they need {} addresses, and there \
                 {}: give bind a range with more",
                units::rate(rate),
                units::count(needed as u64),
                if there == 1.0 { "is 1".to_owned() } else { format!("are {}", units::count(there as u64)) }
            ));
        }
    }
    found
}

/// Connections in use at once when `rate` requests a second take `answer_s` each.
#[must_use]
pub fn connections(rate: f64, answer_s: f64, pipeline: usize) -> u64 {
    (rate * answer_s / pipeline as f64).ceil() as u64
}

/// Requests a second of one class in its busiest phase.
#[must_use]
pub fn highest_rate(scenario: &Scenario, traffic: usize) -> f64 {
    let shares = scenario.phases.iter().flat_map(|phase| {
        let share = phase.mix.iter().filter(move |(index, _)| *index == traffic);
        share.map(|(_, weight)| rates::highest(&phase.curve) * weight)
    });
    shares.fold(0.0, f64::max)
}

fn addresses_needed(scenario: &Scenario, traffic: &Traffic, index: usize) -> f64 {
    let requests = match traffic.connection.kind {
        ConnectionKind::Pool => return 0.0,
        ConnectionKind::Session(Requests::Fixed(requests)) => f64::from(requests),
        ConnectionKind::Session(Requests::Geometric(mean)) => mean,
        ConnectionKind::PerRequest => 1.0,
    };
    let at_most = highest_rate(scenario, index) * TIME_WAIT_S;
    let of_phase = |phase: &super::Phase| {
        let weight: f64 = phase.mix.iter().filter(|(in_mix, _)| *in_mix == index).map(|(_, weight)| weight).sum();
        rates::arrivals(&phase.curve, phase.for_ns) * weight
    };
    let all: f64 = scenario.phases.iter().map(of_phase).sum();
    (at_most.min(all) / requests / PORTS).ceil()
}

/// Hosts of the range; without one the kernel chooses one address.
fn addresses(bind: Option<IpNet>) -> f64 {
    match bind {
        None => 1.0,
        Some(network) => {
            let bits = network.max_prefix_len() - network.prefix_len();
            // The network's own address and the broadcast are left out where there are others.
            let outside = if bits > 1 { 2.0 } else { 0.0 };
            2_f64.powi(i32::from(bits)) - outside
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::warnings;
    use crate::scenario::change::Changes;
    use crate::scenario::load::from_toml;
    use crate::scenario::presets;

    fn check(run: &str, class: &str, rate: &str, expected: &[&str]) {
        let text = format!(
            "[run]\ntarget = \"http://127.0.0.1:1\"\n{run}\n[traffic.a]\nrequest = \"GET /\"\n{class}\n[traffic.b]\n\
             request = \"GET /\"\n[[phase]]\nname = \"x\"\nfor = \"30s\"\nrate = {rate}\nmix = {{ a = 3, b = 1 }}\n"
        );
        let scenario = from_toml("t", &text, Path::new("."), &Changes::default()).unwrap();
        let found = warnings(&scenario);
        assert_eq!(found.len(), expected.len(), "{found:?}");
        for (found, part) in found.iter().zip(expected) {
            assert!(found.contains(part), "{found}");
        }
    }

    #[test]
    fn what_is_doubtful_is_said() {
        check("", "", "1000", &[]);
        check("drain = \"1s\"", "", "1000", &["drain 1s is shorter than timeout 5s"]);
        let few = "a: at 3,000/s and answers in 10.0 ms some 30 connections are in use, and at most 20 may be open";
        check("", "connection = { max = 20 }", "4000", &[few]);
        check("", "connection = { max = 20, pipeline = 2 }", "4000", &[]);
        check("", "", "0.01", &["x: 0.30 arrivals in 30s: give it a higher rate, or more time"]);
        // 90,000 connections in all: four addresses.
        check("", "connection = { kind = \"per_request\" }", "4000", &["they need 4 addresses, and there is 1"]);
        check("", "connection = { kind = \"per_request\" }\nbind = \"127.1.0.0/30\"", "4000", &["there are 2"]);
        check("", "connection = { kind = \"session\", requests = 4 }", "4000", &[]);
        check("", "bind = \"127.1.0.0/29\"\nconnection = { kind = \"per_request\" }", "4000", &[]);
    }

    #[test]
    fn a_class_that_is_never_sent_is_named() {
        let text = "[run]\ntarget = \"http://127.0.0.1:1\"\n[traffic.a]\nrequest = \"GET /\"\n[traffic.b]\nrequest = \"GET /\"\n\
                    [[phase]]\nname = \"x\"\nfor = \"1s\"\nrate = 1\nmix = { a = 1 }\n";
        let scenario = from_toml("t", text, Path::new("."), &Changes::default()).unwrap();
        assert_eq!(warnings(&scenario), ["b is in no phase's mix or also: it is never sent"]);
    }

    #[test]
    fn presets_are_beyond_doubt() {
        for (name, text) in presets::ALL {
            let changes = Changes { rehearsal: true, ..Changes::default() };
            let scenario = from_toml(name, text, Path::new("."), &changes).unwrap();
            assert_eq!(warnings(&scenario), [""; 0], "{name}");
        }
    }
}
