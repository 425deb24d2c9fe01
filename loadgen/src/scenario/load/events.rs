//! `[[event]]`.

use std::path::Path;

use super::super::table::{Problems, Table, Value};
use super::super::{Action, Event, Phase, PidFrom};
use super::{phases, tables};
use crate::units;

/// Stands for the process of `--postgres-pid`.
const POSTGRES_PID: &str = "{postgres_pid}";

const SIGNALS: [&str; 9] = ["STOP", "CONT", "TERM", "KILL", "HUP", "INT", "QUIT", "USR1", "USR2"];

/// Some event acts on a process that only the command line can name, and it did not.
pub(super) fn need_postgres_pid(root: &Table<'_>) -> bool {
    let events = root.get("event").and_then(|events| events.items().ok()).unwrap_or_default();
    events.iter().filter_map(|event| event.table().ok()).any(|event| {
        let actions = ["begin", "end"].into_iter().filter_map(|key| event.get(key)?.table().ok());
        actions.filter_map(|action| action.get("pid")).any(|pid| pid.text() == Ok(POSTGRES_PID))
    })
}

/// `folder` is where files are named from; `postgres` is the process that the command line names.
pub(super) fn read(
    root: &Table<'_>,
    (folder, postgres): (&Path, Option<u32>),
    phases: &[Phase],
    problems: &mut Problems<'_>,
) -> Vec<Event> {
    let mut events: Vec<(Event, Table<'_>)> = Vec::new();
    for table in tables(root, "event", problems) {
        if let Some(event) = read_event(&table, (folder, postgres), phases, problems) {
            if events.iter().any(|(before, _)| before.name == event.name) {
                table.refuse("name", &format!("{:?} is taken: give each event its own name", event.name), problems);
            }
            events.push((event, table));
        }
    }
    events.sort_by_key(|(event, _)| event.at_ns);
    for pair in events.windows(2) {
        let ((first, _), (second, table)) = (&pair[0], &pair[1]);
        if end_ns(first, phases) > second.at_ns {
            let what = format!("begins before {:?} has ended: events may not overlap", first.name);
            problems.add(table.offset, &table.path, what);
        }
    }
    events.into_iter().map(|(event, _)| event).collect()
}

/// One without an end lasts until its phase is over.
fn end_ns(event: &Event, phases: &[Phase]) -> u64 {
    if event.end.is_some() {
        return event.at_ns + event.lasts_ns;
    }
    let mut end_ns = 0;
    for phase in phases {
        end_ns += phase.for_ns;
        if event.at_ns < end_ns {
            break;
        }
    }
    end_ns
}

fn read_event(
    table: &Table<'_>,
    (folder, postgres): (&Path, Option<u32>),
    phases: &[Phase],
    problems: &mut Problems<'_>,
) -> Option<Event> {
    table.only(&["name", "at", "lasts", "begin", "end"], problems);
    let name = table.need("name", "name = \"store stops\"", problems, |value| match value.text()? {
        "" => Err("is empty".to_owned()),
        text => Ok(text.to_owned()),
    });
    let at_ns = table.need("at", "at = \"PHASE + 20s\", or \"20s\"", problems, |value| at_ns(value.text()?, phases));
    let lasts_ns = table.read("lasts", problems, |value| match value.duration_ns()? {
        0 => Err("0s is too short".to_owned()),
        ns => Ok(ns),
    });
    let begin = table.need("begin", "begin = { signal = \"STOP\", pid = PID }", problems, Value::table);
    let begin = begin.and_then(|action| read_action(&action, (folder, postgres), problems));
    let end = table.read("end", problems, Value::table);
    let end = end.and_then(|action| read_action(&action, (folder, postgres), problems));
    match (table.get("lasts").is_some(), table.get("end").is_some()) {
        (false, true) => table.refuse("end", "when? add lasts = \"5s\"", problems),
        (true, false) => table.refuse("lasts", "what ends it? add end = { … }", problems),
        _ => {}
    }
    let (at_ns, lasts_ns) = (at_ns?, lasts_ns.unwrap_or(0));
    let run_ns: u64 = phases.iter().map(|phase| phase.for_ns).sum();
    if at_ns + lasts_ns > run_ns && !phases.is_empty() {
        let (end, run) = (units::exact_duration(at_ns + lasts_ns), units::exact_duration(run_ns));
        table.refuse("at", &format!("ends {end} after the run's begin, and the run is over after {run}"), problems);
    }
    Some(Event { name: name?, at_ns, lasts_ns, begin: begin?, end })
}

/// `PHASE`, `PHASE + 20s`, or `20s` since the end of the warm-up: a scenario stays what it is when a warm-up is added.
fn at_ns(text: &str, phases: &[Phase]) -> Result<u64, String> {
    if phases.is_empty() {
        // The phases' own mistakes are told; nothing can be said about this.
        return Ok(0);
    }
    if let Ok(after_ns) = units::duration_ns(text) {
        let warmup_ns = phases.first().filter(|phase| phase.warmup).map_or(0, |phase| phase.for_ns);
        return Ok(warmup_ns + after_ns);
    }
    // A name may hold a + itself.
    let is_name = phases.iter().any(|phase| phase.name == text.trim());
    let (name, after) = match text.rsplit_once('+') {
        Some((name, after)) if !is_name => (name.trim(), units::duration_ns(after)?),
        _ => (text.trim(), 0),
    };
    let (begin_ns, for_ns) = phases::begin_ns(phases, name)?;
    if after >= for_ns {
        return Err(format!("{name:?} lasts {}: the event would be after it", units::exact_duration(for_ns)));
    }
    Ok(begin_ns + after)
}

fn read_action(
    table: &Table<'_>,
    (folder, postgres): (&Path, Option<u32>),
    problems: &mut Problems<'_>,
) -> Option<Action> {
    if table.get("exec").is_some() {
        table.only(&["exec"], problems);
        return table.read("exec", problems, |value| match value.texts()? {
            words if words.first().is_none_or(String::is_empty) => Err("names no program".to_owned()),
            words => Ok(Action::Exec(words)),
        });
    }
    table.only(&["signal", "pid", "pid_file", "tree", "exec"], problems);
    let signal = table.need("signal", "signal = \"STOP\", or exec = [\"PROGRAM\"]", problems, |value| {
        value.one_of(&SIGNALS.map(|signal| (signal, signal)))
    });
    // 0 and 1 would be this process's whole group, and init.
    let pid = table.read("pid", problems, |value| {
        if value.text() == Ok(POSTGRES_PID) {
            // None in a rehearsal: were it carried out all the same, there is no such file and nothing is signalled.
            return Ok(postgres.map_or_else(|| PidFrom::File(POSTGRES_PID.into()), PidFrom::Pid));
        }
        value.count(2..=u64::from(u32::MAX >> 1)).map(|pid| PidFrom::Pid(pid as u32))
    });
    let file = table.read("pid_file", problems, |value| value.text().map(|file| folder.join(file)));
    let tree = table.read("tree", problems, Value::flag).unwrap_or(false);
    let pid = match (table.get("pid").is_some(), table.get("pid_file").is_some()) {
        (true, false) => pid?,
        (false, true) => PidFrom::File(file?),
        _ => {
            problems.add(table.offset, &table.path, "needs either pid = NUMBER or pid_file = \"FILE\"");
            return None;
        }
    };
    Some(Action::Signal { signal: signal?.to_owned(), pid, tree })
}
