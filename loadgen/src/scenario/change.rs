//! What a command line changes in a scenario's text, before it is read.
//!
//! In: the text of a file and `--set KEY=VALUE`. Out: the text with the values in their places, comments kept: what is
//! read, shown and hashed is one thing. Never: knows which keys there are; whoever reads the text refuses the others.

use std::cmp::Reverse;

use toml::de::{DeArray, DeValue};

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
    /// `--postgres-pid`: what `"{postgres_pid}"` means. It is not written into the text: the scenario is the same one
    /// with the next server's.
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
    /// Before the first header.
    Begin,
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
    for class in &changes.drop {
        text = edit(&text, &format!("traffic.{class}.off"), "true").map_err(|error| format!("{class}: {error}"))?;
    }
    Ok(text)
}

/// Headers whose values let in whoever has them.
const SECRET_HEADERS: [&str; 4] = ["authorization", "cookie", "proxy-authorization", "x-api-key"];

/// A scenario's text as it may be shown to anybody: without the keys that its headers hold. `{key}` is none.
#[must_use]
pub fn masked(text: &str) -> String {
    let root = Problems::of(text).parse();
    let classes = root
        .get("traffic")
        .and_then(|classes| classes.get_ref().as_table())
        .into_iter()
        .flat_map(|classes| classes.values());
    let headers = classes.filter_map(|class| class.get_ref().get("headers")?.get_ref().as_table()).flatten();
    let is_secret = |name: &str, value: &DeValue<'_>| {
        SECRET_HEADERS.iter().any(|secret| name.eq_ignore_ascii_case(secret))
            && !value.as_str().is_some_and(|value| value.contains("{key}"))
    };
    let secret = headers.filter(|(name, value)| is_secret(name.get_ref(), value.get_ref()));
    let mut spans: Vec<_> = secret.map(|(_, value)| value.span()).collect();
    // From the end, so that those before stay where they are.
    spans.sort_by_key(|span| Reverse(span.start));
    let mut shown = text.to_owned();
    for span in spans {
        shown.replace_range(span, "\"(not shown)\"");
    }
    shown
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

    // Where new keys go, and how many segments lead there.
    let mut place = (Place::End, 0);
    let mut found = &root;
    let mut depth = 0;
    for segment in &segments {
        let Some((span, value_there)) = child(found, segment) else { break };
        depth += 1;
        found = value_there;
        place = match text[span.clone()].chars().next() {
            Some('[') if found.is_table() => (Place::Header(span.end), depth),
            Some('{') if found.is_table() => {
                let empty = found.as_table().is_some_and(|table| table.is_empty());
                (Place::Brace { at: span.start + 1, empty }, depth)
            }
            // A part of another table's header can have a header of its own.
            _ if is_in_header(text, span.start) => (Place::End, 0),
            // A table of dotted keys cannot: `expect.status = 200` goes with its like.
            _ => match place {
                (Place::End, 0) => (Place::Begin, 0),
                place => place,
            },
        };
        if depth == segments.len() {
            let is_tables = |items: &DeArray<'_>| items.iter().any(|item| item.get_ref().is_table());
            let is_inline = text[span.start..].starts_with('{');
            if (found.is_table() && !is_inline) || value_there.as_array().is_some_and(is_tables) {
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

    let rest = segments[place.1..].join(".");
    Ok(match place.0 {
        Place::Begin => format!("{rest} = {value}\n{text}"),
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

fn is_in_header(text: &str, at: usize) -> bool {
    let line = text[..at].rfind('\n').map_or(0, |newline| newline + 1);
    text[line..].trim_start().starts_with('[')
}

#[cfg(test)]
mod tests {
    use super::{Changes, apply, masked};

    const TEXT: &str = "\
[run] # the run
seed = 1

[traffic.a]
expect = { status = 200 }
code = {}
dotted.deep.one = 1

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
            ("traffic.a.dotted.x", "5", "[traffic.a]", "[traffic.a]\ndotted.x = 5"),
            ("traffic.a.dotted.deep.x", "5", "[traffic.a]", "[traffic.a]\ndotted.deep.x = 5"),
            ("traffic.a.dotted.deep.one", "5", "one = 1", "one = 5"),
            ("links.new.count", "5", "# long\n", "# long\n\n[links.new]\ncount = 5\n"),
        ] {
            assert_eq!(set(&[(key, value)]).as_deref(), Ok(TEXT.replacen(before, after, 1).as_str()), "{key}");
        }
    }

    #[test]
    fn a_value_may_be_lists_in_a_list() {
        let points = set(&[("phase.1.points", "[[0, 1]]"), ("phase.1.points", "[[0, 2]]")]).unwrap();
        assert!(points.contains("points = [[0, 2]]"), "{points}");
    }

    #[test]
    fn what_cannot_be_set_is_named() {
        for (key, value, message) in [
            ("phase.3.for", "5s", "--set phase.3.for: there is no 3: there are 2, from 1"),
            ("phase.0.for", "5s", "--set phase.0.for: there is no 0: there are 2, from 1"),
            ("run.seed.low", "5", "--set run.seed.low: run.seed is a value, not a table"),
            ("traffic.a.dotted", "5", "--set traffic.a.dotted: is a table: name one of its keys"),
            ("traffic.a", "5", "--set traffic.a: is a table: name one of its keys"),
            ("a..b", "5", "--set a..b: \"\" is no key: letters, digits, - and _, with dots between them"),
        ] {
            assert_eq!(set(&[(key, value)]), Err(message.to_owned()), "{key}");
        }
    }

    #[test]
    fn a_file_without_headers_stays_one() {
        let set = vec![("run.peak".to_owned(), "5".to_owned())];
        let changed = apply("run.seed = 1\n", &Changes { set, ..Changes::default() });
        assert_eq!(changed.as_deref(), Ok("run.peak = 5\nrun.seed = 1\n"));
    }

    #[test]
    fn keys_are_not_shown() {
        for (headers, shown) in [
            (
                "headers = { Authorization = \"Bearer wpk_1\", A = \"b\" }",
                Some("{ Authorization = \"(not shown)\", A = \"b\" }"),
            ),
            ("headers.\"x-api-key\" = 'wpk_1' # mine", Some("headers.\"x-api-key\" = \"(not shown)\" # mine")),
            (
                "headers = { Cookie = \"a=wpk_1\", Proxy-Authorization = \"wpk_1\" }",
                Some("{ Cookie = \"(not shown)\", Proxy-Authorization = \"(not shown)\" }"),
            ),
            ("headers = { Authorization = \"Bearer {key}\" }", None),
            ("headers = { Accept = \"text/html\" }", None),
        ] {
            let text = format!("[traffic.a]\nrequest = \"GET /\"\n{headers}\n[traffic.b]\nbody = \"cookie\"\n");
            let masked = masked(&text);
            assert_eq!(masked == text, shown.is_none(), "{masked}");
            assert!(masked.contains(shown.unwrap_or(headers)) && !masked.contains("wpk_1"), "{masked}");
        }
    }

    #[test]
    fn other_flags_are_written_into_the_text() {
        let text = "[run]\n[traffic.x]\n";
        let changes = Changes {
            target: Some("http://127.0.0.2:80".to_owned()),
            peak: Some(9200.0),
            drop: vec!["x".to_owned()],
            ..Changes::default()
        };
        let expected = "[run]\npeak = 9200\ntarget = \"http://127.0.0.2:80\"\n[traffic.x]\noff = true\n";
        assert_eq!(apply(text, &changes).as_deref(), Ok(expected));
    }
}
