//! `http` and `run`: from what was typed to a scenario that the server can answer.

use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use super::args::{Http, Run, Source};
use super::measure::{self, Subject};
use super::{Failure, print, tools};
use crate::calibrate::{self, Calibration};
use crate::checks::machine;
use crate::client::Client;
use crate::probe::{self, Verdict};
use crate::report::Skipped;
use crate::scenario::change::Changes;
use crate::scenario::{Scenario, Target, flags, load, presets, warnings};
use crate::seed::{self, Api};
use crate::units;

/// Where a waypost that was started in this folder keeps the key of its first start.
const KEY_FILE: &str = "waypost-data/admin.key";
/// Each of the two loads of a calibration that nobody asked for.
const CALIBRATION_S: u32 = 3;
/// Of a request beside the measured ones.
const PATIENCE: Duration = Duration::from_secs(10);

/// `loadgen http URL`.
pub(super) fn http(http: &Http) -> Result<u8, Failure> {
    let scenario = flags::scenario(&http.flags).map_err(|error| Failure::Usage(error.into()))?;
    let address = resolve(&scenario.run.target).map_err(Failure::Usage)?;
    measure::check(&scenario, &http.common).map_err(Failure::Usage)?;
    // A run against nobody would report that everything was refused, as if it were the server's.
    Client::connect(address, &scenario.run.target.authority, PATIENCE)?;
    warn(&scenario);
    measure::measure(Subject { scenario, address, key: None, skipped: Vec::new(), notes: Vec::new() }, &http.common)
}

/// `loadgen run NAME`: the peak that this machine can do, the links that are missing, the classes that the server has.
pub(super) fn run(command: &Run) -> Result<u8, Failure> {
    let mut changes = command.source.changes();
    let mut scenario = read(&command.source, &changes)?;
    let address = resolve(&scenario.run.target).map_err(Failure::Usage)?;
    let key = Key::find(command.key_file.as_deref()).map_err(Failure::Usage)?;
    measure::check(&scenario, &command.common).map_err(Failure::Usage)?;

    let mut notes = Vec::new();
    if !command.no_seed {
        create_links(&scenario, address, &key)?;
    }
    let skipped = offered(&scenario, address, &key)?;
    if !skipped.is_empty() {
        changes.drop = skipped.iter().map(|skipped| skipped.traffic.clone()).collect();
        scenario = read(&command.source, &changes)?;
    }
    // What was measured is a generator and a server that share this machine.
    if machine::is_this_host(address.ip())
        && let Some(note) = scale(&command.source, &scenario, &mut changes)?
    {
        notes.push(note);
        scenario = read(&command.source, &changes)?;
    }
    warn(&scenario);
    let key = key.secret.ok();
    measure::measure(Subject { scenario, address, key, skipped, notes }, &command.common)
}

/// The scenario of that name, or in that file.
pub(super) fn read(source: &Source, changes: &Changes) -> Result<Scenario, Failure> {
    let name = &source.scenario;
    let path = Path::new(name);
    let usage = |error: anyhow::Error| Failure::Usage(error);
    let (text, folder) = match presets::find(name) {
        Some(text) => (text.to_owned(), PathBuf::from(".")),
        None => {
            let known = presets::ALL.iter().map(|(preset, _)| *preset).collect::<Vec<_>>().join(", ");
            let text = match fs::read_to_string(path) {
                Ok(text) => text,
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    return Err(usage(anyhow!("{name} is neither a file nor a scenario that loadgen has ({known})")));
                }
                Err(error) => return Err(usage(anyhow!("{name}: {error}"))),
            };
            (text, path.parent().map(Path::to_owned).unwrap_or_default())
        }
    };
    load::from_toml(name, &text, &folder, changes).map_err(|error| usage(error.into()))
}

/// The first address of the target's name.
pub(super) fn resolve(target: &Target) -> Result<SocketAddr> {
    let mut addresses = (target.host.as_str(), target.port)
        .to_socket_addrs()
        .with_context(|| format!("{}: its address cannot be found", target.authority))?;
    addresses.next().with_context(|| format!("{} has no address", target.authority))
}

fn warn(scenario: &Scenario) {
    for warning in warnings::warnings(scenario) {
        print::say(&format!("warning: {warning}"));
    }
}

/// An API key, or why there is none.
pub(super) struct Key {
    secret: Result<String, String>,
    from: String,
}

impl Key {
    /// From the file that was named, or from where waypost puts it.
    pub(super) fn find(file: Option<&Path>) -> Result<Self> {
        let from = file.unwrap_or(Path::new(KEY_FILE)).display().to_string();
        match (fs::read_to_string(&from), file) {
            (Ok(text), _) if text.trim().is_empty() => bail!("{from} is empty: it should hold an API key"),
            (Ok(text), _) => Ok(Self { secret: Ok(text.trim().to_owned()), from }),
            (Err(error), Some(_)) => Err(anyhow!("--key-file {from}: {error}")),
            (Err(_), None) => Ok(Self {
                secret: Err(format!(
                    "{from} is not there: start loadgen where the server was started, or give --key-file"
                )),
                from,
            }),
        }
    }
}

/// Creates the links of the scenario that are not there.
pub(super) fn create_links(scenario: &Scenario, address: SocketAddr, key: &Key) -> Result<()> {
    let key = key.secret.as_ref().ok().map(|secret| seed::Key { secret, from: &key.from });
    let api = Api { address, authority: &scenario.run.target.authority, timeout: PATIENCE, key };
    let mut shown = 0;
    let seeded = seed::seed(&scenario.catalogue, &api, &mut |done, total| {
        // A line for each percent: writing more would take longer than the links.
        if done == total || (done - shown) * 100 >= total {
            shown = done;
            print::progress("links", done, total);
        }
    })?;
    if seeded.created + seeded.there > 0 {
        let (created, there) = (units::count(seeded.created), units::count(seeded.there));
        print::say(&format!("links: {created} created, {there} there already"));
    }
    Ok(())
}

/// Asks the server for one of each class. What it does not offer is left out where the scenario allows that.
fn offered(scenario: &Scenario, address: SocketAddr, key: &Key) -> Result<Vec<Skipped>> {
    let mut skipped = Vec::new();
    for probe in probe::ask(scenario, address, key.secret.as_deref().map_err(String::as_str))? {
        let traffic = &scenario.traffic[probe.traffic];
        match probe.verdict {
            Verdict::Offered => {}
            Verdict::Missing(reason) if traffic.optional => {
                skipped.push(Skipped { traffic: traffic.name.clone(), reason });
            }
            Verdict::Missing(reason) => {
                let name = &traffic.name;
                bail!("{name}: {reason}; leave it out with --set traffic.{name}=off");
            }
            Verdict::Wrong(reason) => bail!("{}: {reason}", traffic.name),
        }
    }
    Ok(skipped)
}

/// What `peak` is on this machine, unless it was said; with the sentence that says so.
fn scale(source: &Source, scenario: &Scenario, changes: &mut Changes) -> Result<Option<String>> {
    let said = source.set.iter().any(|(key, _)| matches!(key.as_str(), "peak" | "run.peak"));
    if said || scenario.run.peak == 0.0 {
        return Ok(None);
    }
    let calibration = match Calibration::load() {
        Some(calibration) => calibration,
        None => {
            print::say("calibrate: not done on this machine yet; it takes some seconds");
            let made = calibrate::measure(&std::env::current_exe()?, CALIBRATION_S)?;
            tools::keep(&made)?;
            made.calibration
        }
    };
    let (asked, peak) = (scenario.run.peak, calibration.peak_for(scenario).floor());
    if peak >= asked {
        return Ok(None);
    }
    changes.peak = Some(peak);
    Ok(Some(format!(
        "peak: {} a second instead of {}, by what calibrate found for this machine; --set peak=… decides otherwise",
        units::count(peak as u64),
        units::count(asked as u64)
    )))
}
