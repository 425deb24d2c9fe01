//! `[[phase]]`, and the warm-up before them.

use super::super::rates;
use super::super::table::{Problems, Table, Value, unknown_name};
use super::super::{ArrivalKind, Curve, Phase};
use super::traffic::Classes;
use super::{PHASE_MAX_NS, Peak, phase_ns, tables};
use crate::units;

/// Name of the phase that `run.warmup` makes.
const WARMUP: &str = "warm-up";

/// (index of traffic, weight).
type Mix = Vec<(usize, f64)>;

pub(super) fn read(
    root: &Table<'_>,
    classes: &Classes<'_>,
    warmup_ns: u64,
    peak: &Peak,
    problems: &mut Problems<'_>,
) -> Vec<Phase> {
    let mut phases: Vec<Phase> = Vec::new();
    let tables = tables(root, "phase", problems);
    if tables.is_empty() {
        problems.add(root.offset, "phase", "there is none, write [[phase]] with name, for, rate and mix");
    }
    for table in tables {
        let phase = read_phase(&table, classes, phases.last(), peak, problems);
        let is_taken = phase.name == WARMUP || phases.iter().any(|before| before.name == phase.name);
        if is_taken && !phase.name.is_empty() {
            table.refuse("name", &format!("{:?} is taken: give each phase its own name", phase.name), problems);
        }
        phases.push(phase);
    }
    if let (Some(first), true) = (phases.first(), warmup_ns > 0) {
        let curve = match &first.curve {
            Curve::None => Curve::None,
            curve => Curve::Constant(rates::ends(curve).0),
        };
        let warmup = Phase { name: WARMUP.to_owned(), for_ns: warmup_ns, curve, warmup: true, ..first.clone() };
        phases.insert(0, warmup);
    }
    phases
}

/// What is wrong in it reads as something that no later phase, event or SLO finds fault with: each mistake is told once.
fn read_phase(
    table: &Table<'_>,
    classes: &Classes<'_>,
    previous: Option<&Phase>,
    peak: &Peak,
    problems: &mut Problems<'_>,
) -> Phase {
    table.only(&["name", "for", "rate", "ramp", "points", "arrivals", "mix", "also"], problems);
    let name = table.need("name", "name = \"peak\"", problems, |value| match value.text()? {
        text if text.trim() == text && !text.is_empty() && text.len() <= 64 && !text.contains(char::is_control) => {
            Ok(text.to_owned())
        }
        text => Err(format!("{text:?} is no name: up to 64 letters without spaces around")),
    });
    let for_ns = table.need("for", "for = \"30s\"", problems, phase_ns);
    let curve = read_curve(table, for_ns, previous, peak, problems);
    const ARRIVALS: [(&str, ArrivalKind); 2] = [("even", ArrivalKind::Even), ("poisson", ArrivalKind::Poisson)];
    let arrivals = table.read("arrivals", problems, |value| value.one_of(&ARRIVALS));

    let also = table.read("also", problems, |value| {
        let also = classes.indices(value)?;
        match also.iter().find(|&&index| !classes.is_closed(index)) {
            Some(&open) => {
                Err(format!("{} is no closed loop: put it into mix, or give it closed = {{ … }}", classes.names[open]))
            }
            None => Ok(also),
        }
    });
    let has_rate = curve.as_ref().is_none_or(|curve| *curve != Curve::None);
    let mix = if has_rate {
        table.need("mix", "mix = { CLASS = 1 }, or \"previous\"", problems, |value| read_mix(value, classes, previous))
    } else {
        table.refuse("mix", "without a rate nothing arrives: add rate, ramp or points", problems);
        if table.get("also").is_none() {
            let what = "has neither a rate (rate, ramp, points) nor closed loops (also)";
            problems.add(table.offset, &table.path, what);
        }
        Some(Mix::new())
    };
    Phase {
        name: name.unwrap_or_default(),
        for_ns: for_ns.unwrap_or(PHASE_MAX_NS),
        curve: curve.unwrap_or(Curve::Constant(1.0)),
        arrivals: arrivals.unwrap_or(ArrivalKind::Even),
        mix: mix.unwrap_or_else(|| vec![(0, 1.0)]),
        also: also.unwrap_or_default(),
        warmup: false,
    }
}

fn read_mix(value: &Value<'_>, classes: &Classes<'_>, previous: Option<&Phase>) -> Result<Mix, String> {
    if value.is_text() {
        let text = value.text()?;
        let mix = previous.map(|phase| &phase.mix).filter(|mix| !mix.is_empty());
        return match (text, mix) {
            ("previous", Some(mix)) => Ok(mix.clone()),
            ("previous", None) => Err("no phase before has a mix: write mix = { CLASS = 1 }".to_owned()),
            _ => Err(format!("{text:?} is neither a table nor \"previous\"")),
        };
    }
    let mut mix = Mix::new();
    for (name, weight) in value.table()?.iter() {
        let weight = weight.number().map_err(|error| format!("{name}: {error}"))?;
        let Some(index) = classes.index(name)? else { continue };
        if classes.is_closed(index) {
            return Err(format!("{name} is a closed loop and has no share of the arrivals: name it in also"));
        }
        if weight > 0.0 {
            mix.push((index, weight));
        }
    }
    let sum: f64 = mix.iter().map(|(_, weight)| weight).sum();
    if mix.is_empty() || !sum.is_finite() {
        return Err("has no class with a weight above 0 that takes part".to_owned());
    }
    Ok(mix.into_iter().map(|(index, weight)| (index, weight / sum)).collect())
}

fn read_curve(
    table: &Table<'_>,
    for_ns: Option<u64>,
    previous: Option<&Phase>,
    peak: &Peak,
    problems: &mut Problems<'_>,
) -> Option<Curve> {
    const SHAPES: [&str; 3] = ["rate", "ramp", "points"];
    let given: Vec<&str> = SHAPES.into_iter().filter(|shape| table.get(shape).is_some()).collect();
    match given[..] {
        [] => Some(Curve::None),
        ["rate"] => table.read("rate", problems, |value| match peak.rate(value)? {
            0.0 => Err("is 0: leave it out where nothing arrives".to_owned()),
            rate => Ok(Curve::Constant(rate)),
        }),
        ["ramp"] => {
            let ramp = table.read("ramp", problems, Value::table)?;
            read_ramp(&ramp, previous, peak, problems)
        }
        ["points"] => table.read("points", problems, |value| points(value, for_ns, peak)),
        _ => {
            problems.add(table.offset, &table.path, format!("has {}: only one of them", given.join(" and ")));
            None
        }
    }
}

fn read_ramp(ramp: &Table<'_>, previous: Option<&Phase>, peak: &Peak, problems: &mut Problems<'_>) -> Option<Curve> {
    ramp.only(&["to", "from", "shape"], problems);
    let to = ramp.need("to", "to = \"peak\"", problems, |value| peak.rate(value));
    let before = previous.filter(|phase| phase.curve != Curve::None);
    let from = match before {
        Some(phase) if ramp.get("from").is_none() => Some(rates::ends(&phase.curve).1),
        _ => ramp.need("from", "from = 100: there is no rate before", problems, |value| peak.rate(value)),
    };
    let exponential = ramp.read("shape", problems, |value| value.one_of(&[("linear", false), ("exp", true)]));
    let (from, to) = (from?, to?);
    if exponential == Some(true) {
        if from <= 0.0 || to <= 0.0 {
            ramp.refuse("shape", "an exponential ramp neither begins nor ends at 0: use linear, or 1", problems);
            return None;
        }
        return Some(Curve::Exponential { from, to });
    }
    if from + to <= 0.0 {
        ramp.refuse("to", "the ramp is 0 all the time: leave it out where nothing arrives", problems);
        return None;
    }
    Some(Curve::Linear { from, to })
}

fn points(value: &Value<'_>, for_ns: Option<u64>, peak: &Peak) -> Result<Curve, String> {
    let mut points = Vec::new();
    for item in value.items()? {
        let [at, rate] = &item.items()?[..] else {
            return Err("each point is [TIME, RATE], such as [\"10s\", 400]".to_owned());
        };
        points.push((at.duration_ns()?, peak.rate(rate)?));
    }
    let (Some(&(first_ns, _)), Some(&(last_ns, _)), true) = (points.first(), points.last(), points.len() >= 2) else {
        return Err("needs at least two points, such as [[\"0s\", 400], [\"10s\", \"20k\"]]".to_owned());
    };
    if first_ns != 0 || points.windows(2).any(|pair| pair[0].0 > pair[1].0) {
        return Err("the times begin with 0s and never go back".to_owned());
    }
    if let Some(for_ns) = for_ns.filter(|&for_ns| for_ns != last_ns) {
        let (last, end) = (units::exact_duration(last_ns), units::exact_duration(for_ns));
        return Err(format!("the last point is at {last}, and the phase ends at {end}: make them the same"));
    }
    if points.iter().all(|&(_, rate)| rate == 0.0) {
        return Err("the rate is 0 all the time: leave points out where nothing arrives".to_owned());
    }
    Ok(Curve::Points(points))
}

/// Begin of the phase called `name`, since the origin.
pub(super) fn begin_ns(phases: &[Phase], name: &str) -> Result<(u64, u64), String> {
    let mut begin_ns = 0;
    for phase in phases {
        if phase.name == name {
            return Ok((begin_ns, phase.for_ns));
        }
        begin_ns += phase.for_ns;
    }
    let names: Vec<String> = phases.iter().map(|phase| phase.name.clone()).collect();
    Err(unknown_name(name, &names, "phase"))
}
