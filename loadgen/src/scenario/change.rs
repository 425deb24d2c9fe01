//! What a command line changes in a scenario's text, before it is read.
//!
//! In: the text of a file and `--set KEY=VALUE`. Out: the text with the values in their places, comments kept: what is
//! read, shown and hashed is one thing. Never: knows which keys there are; whoever reads the text refuses the others.

use toml::de::DeValue;

use super::table::{Problems, child};

/// Changes of one run, in the order in which they are applied.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    /// `--target`: the URL of the server.
    pub target: Option<String>,
    /// What `peak` means, requests a second.
    pub peak: Option<f64>,
    /// `--set KEY=VALUE`: a dotted key of the file, phases and the like by number from 1; a key without a dot is one of
    /// `[run]`.
    pub set: Vec<(String, String)>,
    /// `--postgres-pid`: stands in for `"{postgres_pid}"`.
    pub postgres_pid: Option<u32>,
    /// For commands that carry out no event (`check`, `plan`, `seed`): nobody needs to say which process is Postgres.
    pub rehearsal: bool,
    /// Classes of traffic to leave out, such as those that the server does not offer.
    pub drop: Vec<String>,
}

/// Where a new key goes.
enum Place {
    /// After the header of a table.
    Header(usize),
    /// After the brace of a table in one line.
    Brace { at: usize, empty: bool },
    /// Into a table of its own at the end of the text.
    End,
}

/// The text with all changes.
///
/// # Errors
///
/// Which change could not be applied, and why.
pub(super) fn apply(text: &str, changes: &Changes) -> Result<String, String> {
    let mut text = text.to_owned();
    if let Some(target) = &changes.target {
        text = edit(&text, "run.target", &literal(target)).map_err(|error| format!("--target: {error}"))?;
    }
    if let Some(peak) = changes.peak {
        text = edit(&text, "run.peak", &peak.to_string()).map_err(|error| format!("run.peak: {error}"))?;
    }
    for (key, value) in &changes.set {
        let edited = match key.strip_prefix("traffic.") {
            Some(class) if value == "off" && !class.contains('.') => edit(&text, &format!("{key}.off"), "true"),
            _ if key.contains('.') => edit(&text, key, &literal(value)),
            _ => edit(&text, &format!("run.{key}"), &literal(value)),
        };
        text = edited.map_err(|error| format!("--set {key}: {error}"))?;
    }
    if let Some(pid) = changes.postgres_pid {
        text = text.replace("\"{postgres_pid}\"", &pid.to_string());
    }
    for class in &changes.drop {
        text = edit(&text, &format!("traffic.{class}.off"), "true").map_err(|error| format!("{class}: {error}"))?;
    }
    Ok(text)
}

/// As TOML has it if it is that, else as a text: `5` is a number, `5s` a text.
fn literal(value: &str) -> String {
    match DeValue::parse(value) {
        Ok(parsed) if !matches!(parsed.get_ref(), DeValue::Datetime(_)) => value.to_owned(),
        _ => toml::Value::String(value.to_owned()).to_string(),
    }
}

/// Sets one dotted key to a TOML value.
fn edit(text: &str, key: &str, value: &str) -> Result<String, String> {
    let segments: Vec<&str> = key.split('.').collect();
    let bare = |segment: &str| {
        !segment.is_empty() && segment.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'))
    };
    if let Some(bad) = segments.iter().find(|segment| !bare(segment)) {
        return Err(format!("{bad:?} is no key: letters, digits, - and _, with dots between them"));
    }
    let mut problems = Problems::of(text);
    let root = DeValue::Table(problems.parse());
    if !problems.are_none() {
        // Told with their lines by whoever reads the text.
        return Ok(text.to_owned());
    }

    let mut place = Place::End;
    let mut found = &root;
    let mut depth = 0;
    for segment in &segments {
        let Some((span, value_there)) = child(found, segment) else { break };
        depth += 1;
        found = value_there;
        place = match text[span.clone()].chars().next() {
            Some('[') if found.is_table() => Place::Header(span.end),
            Some('{') if found.is_table() => {
                Place::Brace { at: span.start + 1, empty: found.as_table().is_some_and(|table| table.is_empty()) }
            }
            _ => Place::End,
        };
        if depth == segments.len() {
            if matches!(place, Place::Header(_)) || text[span.clone()].starts_with("[[") {
                return Err("is a table: name one of its keys".to_owned());
            }
            return Ok(format!("{}{value}{}", &text[..span.start], &text[span.end..]));
        }
    }
    if let DeValue::Array(items) = found {
        return Err(format!("there is no {}: there are {}, from 1", segments[depth], items.len()));
    }
    if depth > 0 && !found.is_table() {
        return Err(format!("{} is a value, not a table", segments[..depth].join(".")));
    }

    let rest = segments[depth..].join(".");
    Ok(match place {
        Place::Header(at) => {
            let line_end = text[at..].find('\n').map_or(text.len(), |newline| at + newline);
            format!("{}\n{rest} = {value}{}", &text[..line_end], &text[line_end..])
        }
        Place::Brace { at, empty } => {
            let comma = if empty { "" } else { "," };
            format!("{} {rest} = {value}{comma}{}", &text[..at], &text[at..])
        }
        Place::End => {
            let (last, table) = segments.split_last().expect("split gives at least one");
            format!("{}\n\n[{}]\n{last} = {value}\n", text.trim_end(), table.join("."))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::{Changes, apply};

    const TEXT: &str = "\
[run] # the run
seed = 1

[traffic.a]
expect = { status = 200 }
code = {}

[[phase]]
name = \"one\"
[[phase]]
for = \"5s\" # long
";

    fn set(pairs: &[(&str, &str)]) -> Result<String, String> {
        let set = pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
        apply(TEXT, &Changes { set, ..Changes::default() })
    }

    #[test]
    fn values_are_set_in_their_places() {
        for (key, value, before, after) in [
            ("seed", "7", "seed = 1", "seed = 7"),
            ("run.seed", "7", "seed = 1", "seed = 7"),
            ("peak", "30k", "# the run", "# the run\npeak = \"30k\""),
            ("phase.2.for", "9s", "\"5s\" #", "\"9s\" #"),
            ("phase.1.ramp.to", "5", "[[phase]]\nname", "[[phase]]\nramp.to = 5\nname"),
            ("traffic.a.expect.status", "[301, 302]", "status = 200", "status = [301, 302]"),
            ("traffic.a.expect.body", "x", "{ status", "{ body = \"x\", status"),
            ("traffic.a.code.pick", "one", "{}", "{ pick = \"one\"}"),
            ("traffic.a", "off", "[traffic.a]", "[traffic.a]\noff = true"),
            ("links.new.count", "5", "# long\n", "# long\n\n[links.new]\ncount = 5\n"),
        ] {
            assert_eq!(set(&[(key, value)]).as_deref(), Ok(TEXT.replacen(before, after, 1).as_str()), "{key}");
        }
    }

    #[test]
    fn what_cannot_be_set_is_named() {
        for (key, value, message) in [
            ("phase.3.for", "5s", "--set phase.3.for: there is no 3: there are 2, from 1"),
            ("phase.0.for", "5s", "--set phase.0.for: there is no 0: there are 2, from 1"),
            ("run.seed.low", "5", "--set run.seed.low: run.seed is a value, not a table"),
            ("traffic.a", "5", "--set traffic.a: is a table: name one of its keys"),
            ("a..b", "5", "--set a..b: \"\" is no key: letters, digits, - and _, with dots between them"),
        ] {
            assert_eq!(set(&[(key, value)]), Err(message.to_owned()), "{key}");
        }
    }

    #[test]
    fn other_flags_are_written_into_the_text() {
        let text = "[run]\n[traffic.x]\n[[event]]\nbegin = { pid = \"{postgres_pid}\" }\n";
        let changes = Changes {
            target: Some("http://127.0.0.2:80".to_owned()),
            peak: Some(9200.0),
            postgres_pid: Some(42),
            drop: vec!["x".to_owned()],
            ..Changes::default()
        };
        let expected = "[run]\npeak = 9200\ntarget = \"http://127.0.0.2:80\"\n[traffic.x]\noff = true\n[[event]]\n\
                        begin = { pid = 42 }\n";
        assert_eq!(apply(text, &changes).as_deref(), Ok(expected));
    }
}
