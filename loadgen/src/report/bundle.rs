//! The folder of a run (`--out DIR`): `run.json`, `hgrm/<phase>.<traffic>.hgrm`, `intervals.hlog`, `timeline.csv`.
//!
//! In: a report, and the run's totals for the histograms. Out: files; `intervals.hlog` is written while the run goes on
//! ([`crate::measure::hlog`]), the others at its end, `run.json` first: it alone is enough for `loadgen report`. Never: overwrites a run;
//! leaves half a `run.json`. At its limit: a write that fails ends the command with its path and the system's words.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::{Report, SCHEMA};
use crate::measure::hgrm;
use crate::measure::totals::Totals;
use crate::scenario::Scenario;
use crate::slo::Scope;

/// The report's file in its folder.
pub const RUN_JSON: &str = "run.json";

/// The interval log in its folder.
pub const INTERVALS: &str = "intervals.hlog";

/// Makes the folder, before the run: what cannot be written is told before the load, not after it.
///
/// # Errors
/// When the folder holds a run, or cannot be made.
pub fn prepare(folder: &Path) -> Result<()> {
    let file = folder.join(RUN_JSON);
    if file.try_exists().with_context(|| format!("--out: cannot look for {}", file.display()))? {
        bail!("--out {}: it holds a run already; name another folder, or remove it", folder.display());
    }
    let histograms = folder.join("hgrm");
    let cannot = || format!("--out: cannot make {}", histograms.display());
    fs::create_dir_all(&histograms).with_context(cannot)?;
    // Those of classes that this run does not have would stay among its own.
    if fs::read_dir(&histograms).with_context(cannot)?.next().is_some() {
        bail!("--out: {} is not empty; name another folder, or empty it", histograms.display());
    }
    Ok(())
}

/// Writes everything but the interval log, which exists by then.
///
/// # Errors
/// When a file cannot be written.
pub fn write(folder: &Path, report: &Report, scenario: &Scenario, totals: &Totals) -> Result<()> {
    let part = folder.join("run.json.part");
    write_json(&part, report)?;
    let file = folder.join(RUN_JSON);
    fs::rename(&part, &file).with_context(|| format!("cannot rename {} to {}", part.display(), file.display()))?;
    timeline(&folder.join("timeline.csv"), report)?;
    histograms(&folder.join("hgrm"), scenario, totals)
}

/// The report alone, to a file or anything else (`--json`).
///
/// # Errors
/// When `out` cannot be written.
pub fn json(report: &Report, mut out: impl Write) -> Result<()> {
    serde_json::to_writer_pretty(&mut out, report)?;
    writeln!(out)?;
    out.flush()?;
    Ok(())
}

fn write_json(file: &Path, report: &Report) -> Result<()> {
    let out = File::create(file).with_context(|| format!("cannot make {}", file.display()))?;
    json(report, BufWriter::new(&out)).with_context(|| format!("cannot write {}", file.display()))?;
    out.sync_all().with_context(|| format!("cannot write {}", file.display()))
}

/// Reads a run back (`loadgen report DIR`).
///
/// # Errors
/// When there is no `run.json`, or it is not of this version.
pub fn read(folder: &Path) -> Result<Report> {
    let file = folder.join(RUN_JSON);
    let text = fs::read_to_string(&file)
        .with_context(|| format!("cannot read {}: name the folder that --out made", file.display()))?;
    let wrong = || format!("{} is no report of this version of loadgen ({SCHEMA})", file.display());
    // Its version first: another one's members would be told as mistakes.
    let value: serde_json::Value = serde_json::from_str(&text).with_context(wrong)?;
    ensure!(value["schema"] == SCHEMA, "{}: its schema is {}", wrong(), value["schema"]);
    serde_json::from_value(value).with_context(wrong)
}

/// Response times of each phase and class, as HdrHistogram's plotter reads them.
fn histograms(folder: &Path, scenario: &Scenario, totals: &Totals) -> Result<()> {
    let mut taken = HashSet::new();
    for (index, phase) in scenario.phases.iter().enumerate() {
        for (traffic, class) in scenario.traffic.iter().enumerate() {
            let sum = totals.sum(&Scope { phase: Some(index), event: None, traffic: vec![traffic] });
            if sum.response.known.is_empty() {
                continue;
            }
            let file = folder.join(file_name(&phase.name, &class.name, &mut taken));
            let context = || format!("cannot write {}", file.display());
            let mut out = BufWriter::new(File::create(&file).with_context(context)?);
            hgrm::write(&mut out, &sum.response).and_then(|()| out.flush()).with_context(context)?;
        }
    }
    Ok(())
}

/// Characters that a shell or a file system may take amiss become `-`; names that become alike are numbered.
fn file_name(phase: &str, class: &str, taken: &mut HashSet<String>) -> String {
    let plain = |name: &str| name.replace(|c: char| !c.is_alphanumeric() && c != '_', "-");
    let stem = format!("{}.{}", plain(phase), plain(class));
    let mut name = format!("{stem}.hgrm");
    let mut number = 2;
    while !taken.insert(name.clone()) {
        name = format!("{stem}-{number}.hgrm");
        number += 1;
    }
    name
}

/// The intervals as a table: one row each, the columns named as in `run.json`.
fn timeline(file: &Path, report: &Report) -> Result<()> {
    let context = || format!("cannot write {}", file.display());
    let mut out = csv::Writer::from_path(file).with_context(context)?;
    for interval in &report.intervals {
        out.serialize(interval).with_context(context)?;
    }
    out.flush().with_context(context)
}
