//! What `loadgen plan` prints: the curve of the rate, what happens when, how many requests, how many connections.
//!
//! In: a scenario and its planned counts. Out: text of at most 80 columns. Never: walks the plan itself.

use std::fmt::Write as _;

use super::curve::Cumulative;
use crate::scenario::Scenario;
use crate::scenario::warnings::{connections, highest_rate};
use crate::units;

/// Columns of the curve; the axis takes the rest of 80.
const WIDTH: usize = 68;
/// Lines of the curve, each of eight steps.
const HEIGHT: usize = 8;
const STEPS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Answer times, in seconds, for which the connections in use are told.
const ANSWERS_S: [f64; 2] = [0.001, 0.05];

/// The drawing; `counts[phase][traffic]` as [`super::arrivals::counts`] has them.
#[must_use]
pub fn draw(scenario: &Scenario, counts: &[Vec<u64>]) -> String {
    let mut out = String::new();
    curve(&mut out, scenario);
    phases(&mut out, scenario, counts);
    needed_connections(&mut out, scenario);
    out
}

/// Appends a line; writing into a String does not fail.
fn line(out: &mut String, text: &str) {
    let _ = writeln!(out, "{}", text.trim_end());
}

fn curve(out: &mut String, scenario: &Scenario) {
    let length_ns = scenario.length_ns();
    let curves: Vec<(u64, u64, Cumulative)> = scenario
        .phases
        .iter()
        .scan(0, |begin_ns, phase| {
            let from_ns = *begin_ns;
            *begin_ns += phase.for_ns;
            Some((from_ns, *begin_ns, Cumulative::new(&phase.curve, phase.for_ns)))
        })
        .collect();
    // Each column shows the mean rate of its stretch of time, so that the area is the number of requests.
    let column_ns = length_ns as f64 / WIDTH as f64;
    let before = |at_ns: f64| -> f64 {
        let of = |(from_ns, to_ns, curve): &(u64, u64, Cumulative)| {
            let inside_ns = at_ns.min(*to_ns as f64) - *from_ns as f64;
            if inside_ns > 0.0 { curve.count(inside_ns / 1e9) } else { 0.0 }
        };
        curves.iter().map(of).sum()
    };
    let rates: Vec<f64> = (0..WIDTH)
        .map(|column| {
            let (from_ns, to_ns) = (column as f64 * column_ns, (column + 1) as f64 * column_ns);
            (before(to_ns) - before(from_ns)) / (column_ns / 1e9)
        })
        .collect();
    let highest = rates.iter().copied().fold(0.0, f64::max);
    if highest > 0.0 {
        for row in (0..HEIGHT).rev() {
            let bars: String = rates.iter().map(|rate| step(rate / highest, row)).collect();
            let label = if row == HEIGHT - 1 { units::rate(highest) } else { String::new() };
            line(out, &format!("{label:>11} {bars}"));
        }
    }
    let column_of = |at_ns: u64| ((at_ns as f64 / column_ns) as usize).min(WIDTH - 1);
    let mut axis = vec!['─'; WIDTH];
    for (from_ns, _, _) in &curves {
        axis[column_of(*from_ns)] = '├';
    }
    for event in &scenario.events {
        let end_ns = event.at_ns + event.lasts_ns.saturating_sub(1);
        axis[column_of(event.at_ns)..=column_of(end_ns)].fill('!');
    }
    line(out, &format!("{:>11} {}", "", axis.into_iter().collect::<String>()));
    let end = units::exact_duration(length_ns);
    line(out, &format!("{:>11} 0s{end:>width$}", "", width = WIDTH - 2));
    for event in &scenario.events {
        let at = units::exact_duration(event.at_ns);
        let end = if event.lasts_ns > 0 {
            format!("to {}", units::exact_duration(event.at_ns + event.lasts_ns))
        } else {
            "to its phase's end".to_owned()
        };
        line(out, &format!("{:>11} ! {} from {at} {end}", "", short(&event.name, 30)));
    }
}

/// The part of a bar of this height (0 to 1) that lies in a row.
fn step(height: f64, row: usize) -> char {
    let eighths = (height * (HEIGHT * 8) as f64).ceil() as usize;
    STEPS[eighths.saturating_sub(row * 8).min(8)]
}

fn phases(out: &mut String, scenario: &Scenario, counts: &[Vec<u64>]) {
    line(out, "");
    line(out, &format!("{:<24}{:>10}{:>14}  {}", "phase", "lasts", "requests", "of these"));
    for (phase, counts) in scenario.phases.iter().zip(counts) {
        let head = format!(
            "{:<24}{:>10}{:>14}  ",
            short(&phase.name, 23),
            units::exact_duration(phase.for_ns),
            units::count(counts.iter().sum())
        );
        let planned = counts.iter().zip(&scenario.traffic).filter(|(count, _)| **count > 0);
        let mut of_these: Vec<String> =
            planned.map(|(count, traffic)| format!("{} {}", short(&traffic.name, 14), units::count(*count))).collect();
        of_these.extend(phase.also.iter().map(|&index| format!("{} closed", short(&scenario.traffic[index].name, 14))));
        // One class a line: names and counts are of any length.
        let mut lines = of_these.iter();
        line(out, &format!("{head}{}", lines.next().map_or("", String::as_str)));
        for of_these in lines {
            line(out, &format!("{:50}{of_these}", ""));
        }
    }
    let total = counts.iter().flatten().sum();
    line(out, &format!("{:<24}{:>10}{:>14}", "all", units::exact_duration(scenario.length_ns()), units::count(total)));
}

fn needed_connections(out: &mut String, scenario: &Scenario) {
    line(out, "");
    let [fast, slow] = ANSWERS_S.map(|answer_s| format!("at {}", units::exact_duration((answer_s * 1e9) as u64)));
    line(out, &format!("{:<24}{:>12}{fast:>12}{slow:>12}{:>12}", "connections in use", "highest", "at most"));
    for (index, traffic) in scenario.traffic.iter().enumerate() {
        let name = short(&traffic.name, 23);
        let most = units::count(traffic.connection.max as u64);
        if traffic.closed.is_some() {
            line(out, &format!("{name:<24}{:>12}{most:>12}{most:>12}{most:>12}", "closed"));
            continue;
        }
        let rate = highest_rate(scenario, index);
        let [fast, slow] =
            ANSWERS_S.map(|answer_s| units::count(connections(rate, answer_s, traffic.connection.pipeline)));
        line(out, &format!("{name:<24}{:>12}{fast:>12}{slow:>12}{most:>12}", units::rate(rate)));
    }
}

/// At most `width` characters.
fn short(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{HEIGHT, draw, step};
    use crate::plan::arrivals::counts;
    use crate::scenario::change::Changes;
    use crate::scenario::load::from_toml;
    use crate::scenario::presets;

    #[test]
    fn a_ramp_is_drawn() {
        let text = "[run]\ntarget = \"http://127.0.0.1:1\"\n[traffic.a]\nrequest = \"GET /\"\n[traffic.bot]\n\
                    request = \"GET /\"\nclosed = { clients = 4 }\n\
                    [[phase]]\nname = \"up\"\nfor = \"34s\"\nramp = { from = 0, to = 6800 }\nmix = { a = 1 }\n\
                    [[phase]]\nname = \"flat\"\nfor = \"34s\"\nrate = 3400\nmix = { a = 1 }\nalso = [\"bot\"]\n\
                    [[event]]\nname = \"bang\"\nat = \"flat + 4s\"\nlasts = \"2s\"\nbegin = { exec = [\"true\"] }\n\
                    end = { exec = [\"true\"] }\n";
        let scenario = from_toml("t", text, Path::new("."), &Changes::default()).unwrap();
        let drawn = draw(&scenario, &counts(&scenario));
        let lines: Vec<&str> = drawn.lines().collect();
        // Columns 12 to 79 are seconds: the ramp fills the rows from the right, the flat half fills half of them.
        assert!(lines[0].starts_with("    6,700/s ") && lines[0].ends_with("▁▃▅▇█"), "{drawn}");
        let bottom: Vec<char> = lines[HEIGHT - 1].chars().collect();
        assert_eq!((bottom[12], bottom[45], bottom[46], bottom[79]), ('▁', '█', '█', '█'), "{drawn}");
        assert_eq!(lines[HEIGHT].chars().filter(|&c| c == '!').count(), 2, "{drawn}");
        assert!(drawn.contains("! bang from 38s to 40s"), "{drawn}");
        assert!(drawn.contains("up                             34s       115,600  a 115,600\n"), "{drawn}");
        assert!(drawn.contains("bot closed\n"), "{drawn}");
        assert!(
            drawn.contains("a                            6,800/s           7         340       1,000\n"),
            "{drawn}"
        );
    }

    #[test]
    fn presets_fit_80_columns() {
        for (name, text) in presets::ALL {
            let changes = Changes { rehearsal: true, ..Changes::default() };
            let scenario = from_toml(name, text, Path::new("."), &changes).unwrap();
            let drawn = draw(&scenario, &counts(&scenario));
            for line in drawn.lines() {
                assert!(line.chars().count() <= 80, "{name}: {line}");
            }
        }
    }

    #[test]
    fn bars_fill_from_below() {
        for (height, row, expected) in [
            (0.0, 0, ' '),
            (1.0, 7, '█'),
            (1.0, 0, '█'),
            (0.5, 3, '█'),
            (0.5, 4, ' '),
            (0.01, 0, '▁'),
            (1.0 / 16.0, 0, '▄'),
        ] {
            assert_eq!(step(height, row), expected, "{height} in {row}");
        }
    }
}
