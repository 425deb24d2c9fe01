//! The layers, put together and checked: flags over environment over file over defaults.
//!
//! In: flags, the environment's pairs, and a function that reads a file. Out: [`Loaded`], or [`Errors`] with everything
//! that is wrong. Never: touches the process' environment; guesses at what is unknown; shows a secret.
//! At the limit: [`read`] refuses a file of more than [`FILE_BYTES_MAX`]; of a file that is no TOML, the first
//! [`SYNTAX_ERRORS_MAX`] errors are told and its values are not looked at.
//!
//! How all errors come out at once: a layer that cannot be taken apart says so and is left out; then the checks run,
//! the value that is refused is put aside, its default stands in, and the checks run again.

mod check;
mod text;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::keys::{self, KEYS, Key, Kind, TABLES};
use super::{Config, Secret, ServiceUrl, units};
use check::check;

/// The most bytes of a configuration file, and of a file that a `…_FILE` variable names: 1 MiB.
pub const FILE_BYTES_MAX: u64 = 1 << 20;
/// Of a file that is no TOML, errors past these only follow from the first ones.
pub const SYNTAX_ERRORS_MAX: usize = 20;
/// A domain's number has 16 bits, and 0 is the default domain.
const DOMAINS_MAX: usize = u16::MAX as usize;

/// Where a file is looked for that nobody named; the first that exists.
pub const PLACES: [&str; 2] = ["./waypost.toml", "/etc/waypost/waypost.toml"];

const PREFIX: &str = "WAYPOST_";
/// They belong to the command line, which talks to a server with them.
const NOT_OURS: [&str; 2] = ["SERVER", "KEY"];
const CONFIG: &str = "config";
const LISTEN: &str = "listen";
const DOMAINS: &str = "domains";

/// What the command line says.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    pub config: Option<PathBuf>,
    pub listen: Vec<String>,
    pub base_url: Option<String>,
    pub data: Option<PathBuf>,
    pub workers: Option<usize>,
    pub postgres: Option<String>,
    pub redis: Option<String>,
    /// Sets `shorten.open`; false says nothing.
    pub open: bool,
    /// `shorten.open` is meant, on any listener.
    pub yes: bool,
}

#[derive(Clone, Debug)]
pub struct Loaded {
    pub config: Config,
    /// The file that was read.
    pub file: Option<PathBuf>,
    /// What was given, and where.
    pub given: Given,
}

/// What was given in all layers, the highest one's where several name a key; what is not in it has its default.
#[derive(Clone, Debug, Default)]
pub struct Given {
    pub single: Entry,
    pub listen: Vec<Entry>,
    pub domains: Vec<Entry>,
}

/// Values that stand together: all keys outside of double brackets, or one `[[listen]]`, or one `[[domains]]`.
#[derive(Clone, Debug, Default)]
pub struct Entry {
    pub at: Source,
    /// By the key's full name.
    pub values: BTreeMap<&'static str, (Raw, Source)>,
}

/// A value as a layer has it, of its key's kind but otherwise unchecked.
#[derive(Clone, Debug)]
pub enum Raw {
    /// Of `Text`, `OneOf`, `Duration` and `Size`.
    Text(String),
    Count(u64),
    Flag(bool),
    List(Vec<String>),
    Secret(Secret),
    Service(ServiceUrl),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Source {
    #[default]
    Default,
    /// Lines count from 1.
    File {
        path: PathBuf,
        line: usize,
    },
    Variable(String),
    Flag(&'static str),
}

/// At least one; a line each.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(Error::to_string).collect::<Vec<_>>().join("\n"))]
pub struct Errors(pub Vec<Error>);

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{at}: {key} {problem}")]
    Value { at: Source, key: &'static str, problem: String },
    #[error("{at}: unknown {what}: {hint}")]
    Unknown { at: Source, what: String, hint: String },
    /// A layer, or a part of it, that cannot be taken apart.
    #[error("{at}: {problem}")]
    Malformed { at: Source, problem: String },
    #[error("{at}: cannot read {}: {problem}", path.display())]
    Unreadable { at: Source, path: PathBuf, problem: String },
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Variable(name) => f.write_str(name),
            Self::Flag(name) => f.write_str(name),
        }
    }
}

/// The checked configuration. `env` is the environment's pairs; `read` reads a file whole ([`read`], but for tests),
/// and relative paths are its to resolve.
pub fn load(
    flags: &Flags,
    env: impl IntoIterator<Item = (String, String)>,
    read: impl Fn(&Path) -> io::Result<String>,
) -> Result<Loaded, Errors> {
    let mut errors = Vec::new();
    let mut variables = environment(env, &read, &mut errors);
    let named = match (&flags.config, variables.remove(CONFIG)) {
        (Some(path), _) => Some((path.clone(), Source::Flag("--config"))),
        (None, Some((path, at))) => Some((path.into(), at)),
        (None, None) => None,
    };
    let mut given = Given::default();
    let file = match find(named, &read) {
        Ok(None) => None,
        Ok(Some((path, text))) => match from_file(&path, &text, &mut given, &mut errors) {
            Whole::Taken => Some(path),
            // Checks of what stands in the other layers would find faults that come of the missing file alone.
            Whole::NoToml => return Err(Errors(errors)),
        },
        Err(error) => {
            errors.push(error);
            return Err(Errors(errors));
        }
    };
    from_variables(variables, &mut given, &mut errors);
    from_flags(flags, &mut given, &mut errors);
    match check(&given, flags.yes, &mut errors) {
        Some(config) if errors.is_empty() => Ok(Loaded { config, file, given }),
        _ => Err(Errors(errors)),
    }
}

/// A file's text, of at most [`FILE_BYTES_MAX`].
pub fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        let problem = format!("it has more than {}", units::print_size(FILE_BYTES_MAX));
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, problem));
    }
    Ok(text)
}

/// The effective configuration as TOML that loads to the same [`Config`], each value with a comment that says where it
/// comes from; secrets are comments without their value. (An open instance on a public listener wants its `--yes`
/// again.)
#[must_use]
pub fn print(loaded: &Loaded) -> String {
    let mut lines = Vec::new();
    let mut section = "";
    for key in &KEYS {
        if TABLES.contains(&key.section()) {
            if key.section() != section {
                section = key.section();
                print_entries(&loaded.given, section, &mut lines);
            }
            continue;
        }
        if key.section() != section {
            section = key.section();
            lines.push(format!("\n[{section}]"));
        }
        lines.push(print_value(&loaded.given.single, key));
    }
    lines.join("\n") + "\n"
}

fn print_entries(given: &Given, table: &str, lines: &mut Vec<String>) {
    // Without any [[listen]] there is one by default, without any [[domains]] there is none.
    let by_default = [Entry::default()];
    let entries = match table {
        LISTEN if given.listen.is_empty() => &by_default[..],
        LISTEN => &given.listen,
        _ => &given.domains,
    };
    for entry in entries {
        lines.push(format!("\n[[{table}]]"));
        lines.extend(KEYS.iter().filter(|key| key.section() == table).map(|key| print_value(entry, key)));
    }
}

fn print_value(entry: &Entry, key: &Key) -> String {
    let leaf = key.leaf();
    let Some((raw, at)) = entry.values.get(key.name) else {
        return match key.kind {
            Kind::Secret => format!("# {leaf} is not set"),
            _ => format!("{leaf} = {}  # default", key.default),
        };
    };
    // A path may have a line break in its name, a comment may not.
    let at = at.to_string().replace(char::is_control, "?");
    let quoted = |text: &String| toml::Value::String(text.clone());
    match raw {
        Raw::Text(text) => format!("{leaf} = {}  # {at}", quoted(text)),
        Raw::Count(count) => format!("{leaf} = {count}  # {at}"),
        Raw::Flag(flag) => format!("{leaf} = {flag}  # {at}"),
        Raw::List(list) => format!("{leaf} = {}  # {at}", toml::Value::Array(list.iter().map(quoted).collect())),
        Raw::Secret(_) => format!("# {leaf} = \"(hidden)\"  # {at}"),
        Raw::Service(url) if url.has_credentials() => format!("# {leaf} = {}  # {at}", quoted(&url.to_string())),
        Raw::Service(url) => format!("{leaf} = {}  # {at}", quoted(&url.expose().to_owned())),
    }
}

// The environment.

/// The values of our variables, by the name of the key (or [`CONFIG`], or [`LISTEN`]), those of `…_FILE` already read.
fn environment(
    env: impl IntoIterator<Item = (String, String)>,
    read: &impl Fn(&Path) -> io::Result<String>,
    errors: &mut Vec<Error>,
) -> BTreeMap<&'static str, (String, Source)> {
    let mut values: BTreeMap<&'static str, (String, Source)> = BTreeMap::new();
    // Sorted, so that the same errors come in the same order.
    let env: BTreeMap<String, String> = env.into_iter().filter(|(name, _)| name.starts_with(PREFIX)).collect();
    for (variable, value) in env {
        let at = Source::Variable(variable.clone());
        let (name, value) = if let Some(name) = named_by(&variable) {
            (name, value)
        } else if let Some(name) = variable.strip_suffix("_FILE").and_then(named_by) {
            let path = PathBuf::from(value);
            match read(&path) {
                Ok(text) => (name, without_line_end(&text).to_owned()),
                Err(error) => {
                    errors.push(Error::Unreadable { at, path, problem: error.to_string() });
                    continue;
                }
            }
        } else {
            if !is_foreign(&variable, &value) {
                errors.push(Error::Unknown { at, what: "variable".to_owned(), hint: hint_of_variable(&variable) });
            }
            continue;
        };
        if let Some((_, other)) = values.get(name) {
            errors.push(Error::Malformed { at, problem: format!("is given beside {other}: unset one of them") });
        } else if value.contains(char::is_control) {
            // The value is not shown: it may be a secret, or a file that was meant otherwise.
            let problem = "holds a line break or another control character: a value is one line, and a file that a …_FILE \
                           variable names holds the value alone";
            errors.push(Error::Malformed { at, problem: problem.to_owned() });
        } else {
            values.insert(name, (value, at));
        }
    }
    values
}

fn named_by(variable: &str) -> Option<&'static str> {
    match variable.strip_prefix(PREFIX)? {
        "CONFIG" => Some(CONFIG),
        "LISTEN" => Some(LISTEN),
        "POSTGRES_URL" => Some("postgres.url"),
        "REDIS_URL" => Some("redis.url"),
        _ => KEYS.iter().find(|key| key.variable().as_deref() == Some(variable)).map(|key| key.name),
    }
}

/// Whether the variable is somebody else's: the command line's, or made by Kubernetes for a service whose name begins
/// with `waypost` (`WAYPOST_SERVICE_HOST`, `WAYPOST_PORT_8080_TCP_ADDR`, …), which would keep every pod beside it from
/// starting.
fn is_foreign(variable: &str, value: &str) -> bool {
    let name = variable.strip_prefix(PREFIX).unwrap_or(variable);
    let of_service = variable.ends_with("_SERVICE_HOST") || variable.contains("_SERVICE_PORT");
    let of_port = match variable.split_once("_PORT") {
        Some((_, "")) => value.contains("://"),
        Some((_, rest)) => ["_TCP", "_UDP", "_SCTP"].iter().any(|protocol| rest.contains(protocol)),
        None => false,
    };
    NOT_OURS.contains(&name) || !name.contains("__") && (of_service || of_port)
}

fn hint_of_variable(variable: &str) -> String {
    let name = variable.strip_prefix(PREFIX).unwrap_or(variable).to_ascii_lowercase().replace("__", ".");
    let name = name.strip_suffix("_file").unwrap_or(&name);
    match keys::nearest(name).map(|key| (key.section(), key.variable())) {
        Some((_, Some(near))) => format!("did you mean {near}"),
        Some((DOMAINS, None)) => "[[domains]] stands in the file alone".to_owned(),
        Some((_, None)) => "did you mean WAYPOST_LISTEN".to_owned(),
        None => "`waypost config print` shows the known keys".to_owned(),
    }
}

fn without_line_end(text: &str) -> &str {
    text.strip_suffix('\n').map_or(text, |text| text.strip_suffix('\r').unwrap_or(text))
}

fn from_variables(variables: BTreeMap<&'static str, (String, Source)>, given: &mut Given, errors: &mut Vec<Error>) {
    for (name, (value, at)) in variables {
        if name == LISTEN {
            given.listen = listeners_at(list(&value), &at);
            if given.listen.is_empty() {
                let problem = "names no address: write one, such as 127.0.0.1:8080, or unset it".to_owned();
                errors.push(Error::Value { at, key: LISTEN, problem });
            }
        } else if let Some(key) = keys::find(name) {
            match from_text(key, value) {
                Ok(raw) => {
                    given.single.values.insert(name, (raw, at));
                }
                Err(problem) => errors.push(Error::Value { at, key: name, problem }),
            }
        }
    }
}

fn from_text(key: &Key, text: String) -> Result<Raw, String> {
    Ok(match key.kind {
        Kind::Text | Kind::OneOf(_) | Kind::Duration { .. } | Kind::Size => Raw::Text(text),
        Kind::Secret => Raw::Secret(Secret::new(text).map_err(|error| error.to_string())?),
        Kind::List => Raw::List(list(&text)),
        Kind::Flag => Raw::Flag(text.parse().map_err(|_| must_be(key, &text))?),
        Kind::OptionalCount { .. } if text.is_empty() => Raw::Text(text),
        Kind::Count { .. } | Kind::OptionalCount { .. } => Raw::Count(text.parse().map_err(|_| must_be(key, &text))?),
        Kind::Service => Raw::Service(ServiceUrl::new(text)),
    })
}

fn list(text: &str) -> Vec<String> {
    if text.trim().is_empty() { Vec::new() } else { text.split(',').map(|item| item.trim().to_owned()).collect() }
}

fn listeners_at(addresses: Vec<String>, at: &Source) -> Vec<Entry> {
    let entry = |address| Entry {
        at: at.clone(),
        values: BTreeMap::from([("listen.address", (Raw::Text(address), at.clone()))]),
    };
    addresses.into_iter().map(entry).collect()
}

fn must_be(key: &Key, got: &str) -> String {
    format!("must be {}, not {got:?}", key.kind.describe())
}

// The flags.

fn from_flags(flags: &Flags, given: &mut Given, errors: &mut Vec<Error>) {
    let mut set = |name, raw, flag| given.single.values.insert(name, (raw, Source::Flag(flag)));
    if let Some(base_url) = &flags.base_url {
        set("base_url", Raw::Text(base_url.clone()), "--base-url");
    }
    match flags.data.as_deref().map(|path| (path, path.to_str())) {
        None => {}
        Some((_, Some(data))) => {
            set("data", Raw::Text(data.to_owned()), "--data");
        }
        Some((path, None)) => {
            let problem = format!("must be UTF-8, not {path:?}: rename the folder");
            errors.push(Error::Value { at: Source::Flag("--data"), key: "data", problem });
        }
    }
    if let Some(count) = flags.workers {
        set("workers.count", Raw::Count(count as u64), "--workers");
    }
    for (name, url, flag) in [("postgres.url", &flags.postgres, "--postgres"), ("redis.url", &flags.redis, "--redis")] {
        if let Some(url) = url {
            set(name, Raw::Service(ServiceUrl::new(url.clone())), flag);
        }
    }
    if flags.open {
        set("shorten.open", Raw::Flag(true), "--open");
    }
    if !flags.listen.is_empty() {
        given.listen = listeners_at(flags.listen.clone(), &Source::Flag("--listen"));
    }
}

// The file.

fn find(
    named: Option<(PathBuf, Source)>,
    read: &impl Fn(&Path) -> io::Result<String>,
) -> Result<Option<(PathBuf, String)>, Error> {
    if let Some((path, at)) = named {
        return match read(&path) {
            Ok(text) => Ok(Some((path, text))),
            Err(error) => Err(Error::Unreadable { at, path, problem: error.to_string() }),
        };
    }
    for path in PLACES.map(PathBuf::from) {
        match read(&path) {
            Ok(text) => return Ok(Some((path, text))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(Error::Unreadable { at: Source::Default, path, problem: error.to_string() });
            }
        }
    }
    Ok(None)
}

/// What became of a file.
enum Whole {
    Taken,
    NoToml,
}

fn from_file(path: &Path, text: &str, given: &mut Given, errors: &mut Vec<Error>) -> Whole {
    let (table, syntax) = DeTable::parse_recoverable(text);
    // Once for the file, not once for a value: a line is the number of line ends before it.
    let line_ends: Vec<usize> = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at).collect();
    let at = |offset: usize| Source::File {
        path: path.to_owned(),
        line: 1 + line_ends.partition_point(|line_end| *line_end < offset),
    };
    if !syntax.is_empty() {
        errors.extend(syntax.iter().take(SYNTAX_ERRORS_MAX).map(|error| Error::Malformed {
            at: at(error.span().map_or(0, |span| span.start)),
            problem: format!("this is not toml: {}", error.message()),
        }));
        return Whole::NoToml;
    }
    for (name, value) in table.get_ref() {
        let (section, at_name) = (name.get_ref().as_ref(), at(name.span().start));
        let malformed = |problem| Error::Malformed { at: at_name.clone(), problem };
        match value.get_ref() {
            DeValue::Array(items) if TABLES.contains(&section) => {
                for item in items {
                    let DeValue::Table(table) = item.get_ref() else {
                        errors.push(malformed(format!("{section} is a list of tables: write [[{section}]] for each")));
                        continue;
                    };
                    let mut entry = Entry { at: at(item.span().start), ..Entry::default() };
                    let before = errors.len();
                    from_table(section, table, &at, &mut entry, errors);
                    // With a value left out, a default would stand where none was meant.
                    if errors[before..].iter().any(|error| matches!(error, Error::Value { .. })) {
                        continue;
                    }
                    if section == LISTEN { &mut given.listen } else { &mut given.domains }.push(entry);
                }
            }
            _ if TABLES.contains(&section) => {
                errors.push(malformed(format!("{section} is a list of tables: write [[{section}]] for each")));
            }
            DeValue::Table(table) if keys::is_section(section) => {
                from_table(section, table, &at, &mut given.single, errors);
            }
            _ if keys::is_section(section) => {
                errors.push(malformed(format!("{section} is a section: write [{section}], and its keys below")));
            }
            DeValue::Table(_) => {
                let hint = match keys::nearest_section(section) {
                    Some(near) => format!("did you mean [{near}]"),
                    None => "`waypost config print` shows the known ones".to_owned(),
                };
                errors.push(Error::Unknown { at: at_name, what: format!("section [{section}]"), hint });
            }
            value => from_value(section, value, at_name, &mut given.single, errors),
        }
    }
    Whole::Taken
}

fn from_table(
    section: &str,
    table: &DeTable<'_>,
    at: &impl Fn(usize) -> Source,
    entry: &mut Entry,
    errors: &mut Vec<Error>,
) {
    for (name, value) in table {
        from_value(&format!("{section}.{}", name.get_ref()), value.get_ref(), at(name.span().start), entry, errors);
    }
}

fn from_value(name: &str, value: &DeValue<'_>, at: Source, entry: &mut Entry, errors: &mut Vec<Error>) {
    let Some(key) = keys::find(name) else {
        let section = name.split_once('.').map_or("", |(section, _)| section);
        let known = KEYS.iter().filter(|key| key.section() == section).map(|key| key.leaf());
        let hint = match keys::nearest(name) {
            Some(near) => format!("did you mean {}", near.name),
            None if section.is_empty() => "`waypost config print` shows the known ones".to_owned(),
            None => format!("[{section}] has {}", known.collect::<Vec<_>>().join(", ")),
        };
        errors.push(Error::Unknown { at, what: format!("key {name}"), hint });
        return;
    };
    match from_toml(key, value) {
        Ok(raw) => {
            entry.values.insert(key.name, (raw, at));
        }
        Err(problem) => errors.push(Error::Value { at, key: key.name, problem }),
    }
}

fn from_toml(key: &Key, value: &DeValue<'_>) -> Result<Raw, String> {
    match (key.kind, value) {
        (Kind::Secret, _) => {
            let variable = key.variable().unwrap_or_default();
            Err(format!("stands in the environment alone: set {variable} or {variable}_FILE"))
        }
        (Kind::Text | Kind::OneOf(_) | Kind::Duration { .. } | Kind::Size, DeValue::String(text)) => {
            Ok(Raw::Text(text.to_string()))
        }
        // A number without a unit: what reads units says how it is written.
        (Kind::Duration { .. } | Kind::Size, DeValue::Integer(number)) => Ok(Raw::Text(number.to_string())),
        (Kind::Flag, DeValue::Boolean(flag)) => Ok(Raw::Flag(*flag)),
        (Kind::Service, DeValue::String(text)) => Ok(Raw::Service(ServiceUrl::new(text.to_string()))),
        (Kind::OptionalCount { .. }, DeValue::String(text)) if text.is_empty() => Ok(Raw::Text(String::new())),
        (Kind::Count { .. } | Kind::OptionalCount { .. }, DeValue::Integer(number)) => {
            u64::from_str_radix(number.as_str(), number.radix())
                .map(Raw::Count)
                .map_err(|_| must_be(key, &number.to_string()))
        }
        (Kind::List, DeValue::Array(items)) => items
            .iter()
            .map(|item| item.get_ref().as_str().map(str::to_owned).ok_or_else(|| must_be_of(key, item.get_ref())))
            .collect::<Result<_, _>>()
            .map(Raw::List),
        (_, value) => Err(must_be_of(key, value)),
    }
}

fn must_be_of(key: &Key, value: &DeValue<'_>) -> String {
    let what = match value {
        DeValue::String(text) => format!("{text:?}"),
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(flag) => flag.to_string(),
        DeValue::Datetime(_) => "a date".to_owned(),
        DeValue::Array(_) => "a list".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    };
    format!("must be {}, not {what}", key.kind.describe())
}

#[cfg(test)]
mod tests;
