//! The layers, put together and checked: flags over environment over file over defaults.
//!
//! In: flags, the environment's pairs, and a function that reads a file. Out: [`Loaded`], or [`Errors`] with everything
//! that is wrong. Never: touches the process' environment; guesses at what is unknown; shows a secret.
//! At the limit: [`read`] refuses a file of more than [`FILE_BYTES_MAX`]; of a file that is no TOML, the first
//! [`SYNTAX_ERRORS_MAX`] errors are told and its values are not looked at.
//!
//! How all errors come out at once: a layer that cannot be taken apart says so and is left out; then the checks run,
//! the value that is refused is put aside, its default stands in, and the checks run again.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::HeaderValue;
use ipnet::IpNet;
use toml::de::{DeTable, DeValue};
use url::Url;

use super::keys::{self, KEYS, Key, Kind, TABLES};
use super::{
    Api, Breaker, Cache, Codes, Config, Connections, Domain, Limits, Listen, Log, LogFormat, Metrics, Migrate, Pages,
    Peers, Postgres, Proxies, Redirect, Redis, Secret, ServiceUrl, Shorten, Shutdown, Statements, Targets, Workers,
    units,
};
use crate::codes::{Alphabet, Strategy};
use crate::domain::key::Case;
use crate::domain::link::STATUSES;
use crate::domain::target::Target;
use crate::guard::targets::Lookalikes;

/// The most bytes of a configuration file, and of a file that a `…_FILE` variable names: 1 MiB.
pub const FILE_BYTES_MAX: u64 = 1 << 20;
/// Of a file that is no TOML, errors past these only follow from the first ones.
pub const SYNTAX_ERRORS_MAX: usize = 20;
/// A domain's number has 16 bits, and 0 is the default domain.
const DOMAINS_MAX: usize = u16::MAX as usize;
const HEADER_BYTES_MAX: usize = 256;

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

// The checks.

fn check(given: &Given, yes: bool, errors: &mut Vec<Error>) -> Option<Config> {
    let listen = each(&given.listen, errors, listener);
    let domains = each(&given.domains, errors, domain);
    let mut config = repaired(given.single.clone(), errors, single)?;
    let is_good = |key, errors: &[Error]| {
        !errors.iter().any(|error| matches!(error, Error::Value { key: bad, .. } if *bad == key))
    };

    for (index, (at, one)) in listen.iter().enumerate() {
        if one.address.port() != 0 && listen[..index].iter().any(|(_, other)| other.address == one.address) {
            let problem = format!("{} is given twice: leave one out", one.address);
            errors.push(Error::Value { at: at.clone(), key: "listen.address", problem });
        }
    }
    config.listen = listen.into_iter().map(|(_, listen)| listen).collect();
    if given.listen.is_empty() {
        config.listen = vec![listener(&Entry::default()).map_err(|error| errors.push(error)).ok()?];
    }

    let mut hosts = BTreeMap::new();
    for (at, Domain { host, .. }) in &domains {
        if let Some(first) = hosts.insert(host.clone(), at) {
            let problem = format!("{host} stands at {first} already: leave one out");
            errors.push(Error::Value { at: at.clone(), key: "domains.host", problem });
        }
    }
    if let Some((at, _)) = domains.get(DOMAINS_MAX) {
        let problem = format!("is one too many: at most {DOMAINS_MAX} domains");
        errors.push(Error::Value { at: at.clone(), key: "domains.host", problem });
    }
    config.domains = domains.into_iter().map(|(_, domain)| inherit(domain, &config.redirect)).collect();

    let refuse = |key: &'static str, problem: String| {
        let at = given.single.values.get(key).map_or(Source::Default, |(_, at)| at.clone());
        Error::Value { at, key, problem }
    };
    if let Some(api) = config.api.listen
        && api.port() != 0
        && config.listen.iter().any(|listen| listen.address == api)
    {
        let problem = format!("{api} is a listener already: choose another port, or \"\" for the same one");
        errors.push(refuse("api.listen", problem));
    }
    let Codes { alphabet, case, .. } = &config.codes;
    if *case == Case::Insensitive && *alphabet != Alphabet::Base36 && is_good("codes.alphabet", errors) {
        let problem = "is insensitive, and codes.alphabet has letters in both cases: set codes.alphabet to base36";
        errors.push(refuse("codes.case", problem.to_owned()));
    }
    // With a listener of its own, the API is not served on the others.
    let shortening = config
        .api
        .listen
        .map_or_else(|| config.listen.iter().map(|listen| listen.address).collect(), |address| vec![address]);
    let public = shortening.iter().find(|address| !address.ip().to_canonical().is_loopback());
    if let Some(public) = public
        && config.shorten.open
        && !yes
        && is_good("api.listen", errors)
    {
        let problem = format!(
            "lets anybody shorten, and {public} is not a loopback address: listen on 127.0.0.1, or confirm with --yes"
        );
        errors.push(refuse("shorten.open", problem));
    }
    Some(config)
}

/// What `build` makes of the entry, if need be with defaults in place of what it refused.
/// None if a default is refused too: that is a value without one.
fn repaired<T>(mut entry: Entry, errors: &mut Vec<Error>, build: fn(&Entry) -> Result<T, Error>) -> Option<T> {
    let mut aside = Vec::new();
    loop {
        match build(&entry) {
            Ok(value) => return Some(value),
            Err(Error::Value { key, .. }) if aside.contains(&key) => return None,
            Err(error) => {
                let key = if let Error::Value { key, .. } = &error { Some(*key) } else { None };
                errors.push(error);
                aside.push(key?);
                entry.values.remove(key?)?;
            }
        }
    }
}

/// Those of the entries in which nothing is wrong.
fn each<T>(entries: &[Entry], errors: &mut Vec<Error>, build: fn(&Entry) -> Result<T, Error>) -> Vec<(Source, T)> {
    let mut good = Vec::new();
    for entry in entries {
        let before = errors.len();
        let built = repaired(entry.clone(), errors, build);
        if errors.len() == before {
            good.extend(built.map(|built| (entry.at.clone(), built)));
        }
    }
    good
}

fn listener(entry: &Entry) -> Result<Listen, Error> {
    Ok(Listen { address: entry.text("listen.address", address)?, proxy_protocol: entry.flag("listen.proxy_protocol")? })
}

fn domain(entry: &Entry) -> Result<Domain, Error> {
    Ok(Domain {
        root_url: entry.optional("domains.root_url", target)?,
        not_found_url: entry.optional("domains.not_found_url", target)?,
        gone_url: entry.optional("domains.gone_url", target)?,
        // Last: without one the entry is not looked at further.
        host: entry.text("domains.host", host)?,
    })
}

fn inherit(domain: Domain, redirect: &Redirect) -> Domain {
    let or = |own: Option<Target>, all: &Option<Target>| own.or_else(|| all.clone());
    Domain {
        host: domain.host,
        root_url: or(domain.root_url, &redirect.root_url),
        not_found_url: or(domain.not_found_url, &redirect.not_found_url),
        gone_url: or(domain.gone_url, &redirect.gone_url),
    }
}

/// Everything but the listeners and the domains.
fn single(entry: &Entry) -> Result<Config, Error> {
    Ok(Config {
        base_url: entry.optional("base_url", base_url)?,
        data: entry.text("data", path)?,
        admin_key: entry.secret("admin_key"),
        listen: Vec::new(),
        workers: Workers { count: entry.count("workers.count")? },
        connections: Connections {
            max: Some(entry.count("connections.max")?).filter(|max| *max != 0),
            header_timeout: entry.duration("connections.header_timeout")?,
            idle_timeout: entry.duration("connections.idle_timeout")?,
        },
        domains: Vec::new(),
        redirect: Redirect {
            status: entry.status("redirect.status")?,
            cache_control: entry.text("redirect.cache_control", header)?,
            permanent_cache_control: entry.text("redirect.permanent_cache_control", header)?,
            forward_query: entry.flag("redirect.forward_query")?,
            root_url: entry.optional("redirect.root_url", target)?,
            not_found_url: entry.optional("redirect.not_found_url", target)?,
            gone_url: entry.optional("redirect.gone_url", target)?,
        },
        pages: Pages { dir: entry.optional("pages.dir", path)? },
        api: Api { listen: entry.optional("api.listen", address)? },
        metrics: Metrics { allow: entry.list("metrics.allow", peers)? },
        postgres: postgres(entry)?,
        redis: redis(entry)?,
        breaker: Breaker { failures: entry.count("breaker.failures")?, recovery: entry.duration("breaker.recovery")? },
        cache: Cache {
            memory: entry.optional("cache.memory", size)?,
            ttl: entry.duration("cache.ttl")?,
            negative_ttl: entry.duration("cache.negative_ttl")?,
            stale_max: entry.duration("cache.stale_max")?,
        },
        codes: Codes {
            strategy: entry.one_of("codes.strategy", |name| Strategy::parse(name).ok())?,
            length: entry.count("codes.length")?,
            alphabet: entry.one_of("codes.alphabet", |name| Alphabet::parse(name).ok())?,
            case: entry.one_of("codes.case", |name| match name {
                "sensitive" => Some(Case::Sensitive),
                "insensitive" => Some(Case::Insensitive),
                _ => None,
            })?,
            worker_id: entry.optional_count("codes.worker_id")?,
            worker_lease: entry.duration("codes.worker_lease")?,
        },
        shorten: Shorten { open: entry.flag("shorten.open")? },
        limits: Limits {
            shorten_per_minute: entry.count("limits.shorten_per_minute")?,
            key_per_minute: entry.count("limits.key_per_minute")?,
        },
        targets: Targets {
            schemes: entry.some("targets.schemes", scheme)?,
            max_bytes: entry.count("targets.max_bytes")?,
            blocklist: entry.optional("targets.blocklist", path)?,
            own_hosts: entry.list("targets.own_hosts", host_and_port)?,
            lookalikes: entry.one_of("targets.lookalikes", |name| match name {
                "flag" => Some(Lookalikes::Flag),
                "refuse" => Some(Lookalikes::Refuse),
                _ => None,
            })?,
        },
        proxies: Proxies { trusted: entry.list("proxies.trusted", net)? },
        log: Log {
            format: entry.one_of("log.format", |name| match name {
                "json" => Some(LogFormat::Json),
                "text" => Some(LogFormat::Text),
                _ => None,
            })?,
            level: entry.one_of("log.level", |name| name.parse().ok())?,
            access: entry.flag("log.access")?,
        },
        shutdown: Shutdown { drain: entry.duration("shutdown.drain")?, grace: entry.duration("shutdown.grace")? },
    })
}

/// None without `postgres.url`; the other keys are checked all the same.
fn postgres(entry: &Entry) -> Result<Option<Postgres>, Error> {
    let schemes = &["postgres", "postgresql"];
    let settings = Postgres {
        url: entry.service("postgres.url", schemes)?.unwrap_or_else(|| ServiceUrl::new(String::new())),
        replica_url: entry.service("postgres.replica_url", schemes)?,
        replica_max_lag: entry.duration("postgres.replica_max_lag")?,
        direct_url: entry.service("postgres.direct_url", schemes)?,
        migrate_url: entry.service("postgres.migrate_url", schemes)?,
        migrate: entry.one_of("postgres.migrate", |name| match name {
            "auto" => Some(Migrate::Auto),
            "check" => Some(Migrate::Check),
            _ => None,
        })?,
        pool: entry.count("postgres.pool")?,
        pool_timeout: entry.duration("postgres.pool_timeout")?,
        max_lifetime: entry.duration("postgres.max_lifetime")?,
        lookups: entry.count("postgres.lookups")?,
        lookup_timeout: entry.duration("postgres.lookup_timeout")?,
        statements: entry.one_of("postgres.statements", |name| match name {
            "prepared" => Some(Statements::Prepared),
            "unnamed" => Some(Statements::Unnamed),
            _ => None,
        })?,
        connect_timeout: entry.duration("postgres.connect_timeout")?,
        statement_timeout: entry.duration("postgres.statement_timeout")?,
    };
    Ok(Some(settings).filter(|settings| !settings.url.expose().is_empty()))
}

/// None without `redis.url`; the other keys are checked all the same.
fn redis(entry: &Entry) -> Result<Option<Redis>, Error> {
    let schemes = &[
        "redis",
        "rediss",
        "redis+unix",
        "unix",
        "redis+cluster",
        "rediss+cluster",
        "redis+sentinel",
        "rediss+sentinel",
    ];
    let settings = Redis {
        url: entry.service("redis.url", schemes)?.unwrap_or_else(|| ServiceUrl::new(String::new())),
        ca_file: entry.optional("redis.ca_file", path)?,
        timeout: entry.duration("redis.timeout")?,
        ttl: entry.duration("redis.ttl")?,
        prefix: entry.text("redis.prefix", prefix)?,
    };
    Ok(Some(settings).filter(|settings| !settings.url.expose().is_empty()))
}

impl Entry {
    /// The value or its default, as `take` reads it.
    fn get<T>(&self, name: &'static str, take: impl FnOnce(&Key, Raw) -> Result<T, String>) -> Result<T, Error> {
        let refuse = |at: &Source, problem| Error::Value { at: at.clone(), key: name, problem };
        let key = keys::find(name).ok_or_else(|| refuse(&self.at, "is not in the table of keys".to_owned()))?;
        let (raw, at) = match self.values.get(name) {
            Some((raw, at)) => (Ok(raw.clone()), at),
            None => (default(key), &self.at),
        };
        raw.and_then(|raw| take(key, raw)).map_err(|problem| refuse(at, problem))
    }

    fn text<T>(&self, name: &'static str, parse: fn(&str) -> Result<T, String>) -> Result<T, Error> {
        self.get(name, |key, raw| match raw {
            Raw::Text(text) => parse(&text),
            _ => Err(not_of_its_kind(key)),
        })
    }

    /// `""` = none.
    fn optional<T>(&self, name: &'static str, parse: fn(&str) -> Result<T, String>) -> Result<Option<T>, Error> {
        self.get(name, |key, raw| match raw {
            Raw::Text(text) if text.is_empty() => Ok(None),
            Raw::Text(text) => parse(&text).map(Some),
            _ => Err(not_of_its_kind(key)),
        })
    }

    fn one_of<T>(&self, name: &'static str, parse: fn(&str) -> Option<T>) -> Result<T, Error> {
        self.get(name, |key, raw| match (key.kind, raw) {
            (Kind::OneOf(names), Raw::Text(text)) => {
                let known = if names.contains(&text.as_str()) { parse(&text) } else { None };
                known.ok_or_else(|| must_be(key, &text))
            }
            _ => Err(not_of_its_kind(key)),
        })
    }

    fn flag(&self, name: &'static str) -> Result<bool, Error> {
        self.get(name, |key, raw| match raw {
            Raw::Flag(flag) => Ok(flag),
            _ => Err(not_of_its_kind(key)),
        })
    }

    fn count<T: TryFrom<u64>>(&self, name: &'static str) -> Result<T, Error> {
        self.get(name, |key, raw| match (key.kind, raw) {
            (Kind::Count { min, max }, Raw::Count(count)) => {
                let count = Some(count).filter(|count| (min..=max).contains(count)).ok_or(count);
                let fits = count.and_then(|count| T::try_from(count).map_err(|_| count));
                fits.map_err(|count| format!("must be {}, not {count}", key.kind.describe()))
            }
            _ => Err(not_of_its_kind(key)),
        })
    }

    /// `""` = none.
    fn optional_count<T: TryFrom<u64>>(&self, name: &'static str) -> Result<Option<T>, Error> {
        self.get(name, |key, raw| match (key.kind, raw) {
            (Kind::OptionalCount { .. }, Raw::Text(_)) => Ok(None),
            (Kind::OptionalCount { max }, Raw::Count(count)) => {
                let fits = Some(count).filter(|count| *count <= max).and_then(|count| T::try_from(count).ok());
                fits.map(Some).ok_or_else(|| format!("must be {}, not {count}", key.kind.describe()))
            }
            _ => Err(not_of_its_kind(key)),
        })
    }

    /// `""` = none. A message never shows the address: it may have a password in it.
    fn service(&self, name: &'static str, schemes: &[&str]) -> Result<Option<ServiceUrl>, Error> {
        self.get(name, |key, raw| match raw {
            Raw::Service(url) if url.expose().is_empty() => Ok(None),
            Raw::Service(url) => {
                let known = url.expose().split_once("://").is_some_and(|(scheme, _)| schemes.contains(&scheme));
                known.then_some(Some(url)).ok_or_else(|| format!("must begin with {}://", schemes.join("://, ")))
            }
            _ => Err(not_of_its_kind(key)),
        })
    }

    fn status(&self, name: &'static str) -> Result<u16, Error> {
        let status = self.count(name)?;
        self.get(name, |_, _| {
            let known = STATUSES.contains(&status).then_some(status);
            known.ok_or_else(|| format!("must be one of {STATUSES:?}, not {status}"))
        })
    }

    fn duration(&self, name: &'static str) -> Result<Duration, Error> {
        self.get(name, |key, raw| match (key.kind, raw) {
            (Kind::Duration { min }, Raw::Text(text)) => {
                let duration = units::duration(&text).map_err(|error| error.to_string())?;
                let enough = Some(duration).filter(|duration| *duration >= min);
                enough.ok_or_else(|| format!("must be at least {}, not {text}", units::print_duration(min)))
            }
            _ => Err(not_of_its_kind(key)),
        })
    }

    fn list<T>(&self, name: &'static str, parse: fn(&str) -> Result<T, String>) -> Result<Vec<T>, Error> {
        self.get(name, |key, raw| match raw {
            Raw::List(list) => list.iter().map(|item| parse(item)).collect(),
            _ => Err(not_of_its_kind(key)),
        })
    }

    /// A list that is not empty.
    fn some<T>(&self, name: &'static str, parse: fn(&str) -> Result<T, String>) -> Result<Vec<T>, Error> {
        let list = self.list(name, parse)?;
        self.get(name, |_, _| if list.is_empty() { Err("must name at least one".to_owned()) } else { Ok(list) })
    }

    fn secret(&self, name: &'static str) -> Option<Secret> {
        match self.values.get(name) {
            Some((Raw::Secret(secret), _)) => Some(secret.clone()),
            _ => None,
        }
    }
}

fn default(key: &Key) -> Result<Raw, String> {
    let value = DeValue::parse(key.default).map_err(|error| error.message().to_owned())?;
    from_toml(key, value.get_ref())
}

/// The table of keys and the checks disagree; a test loads every default.
fn not_of_its_kind(key: &Key) -> String {
    format!("is not {} in the table of keys", key.kind.describe())
}

// What a text means.

fn path(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() || text.contains('\0') {
        return Err(format!("must be a path, not {text:?}"));
    }
    Ok(text.into())
}

/// What keys of Redis begin with. Braces would put every key into one slot of a cluster.
fn prefix(text: &str) -> Result<String, String> {
    let fits = text.len() <= 64 && text.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'{' | b'}'));
    fits.then(|| text.to_owned())
        .ok_or_else(|| format!("must be at most 64 visible ascii characters without braces, not {text:?}"))
}

fn size(text: &str) -> Result<u64, String> {
    units::size(text).map_err(|error| error.to_string())
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        format!("must be IP:PORT or [IPv6]:PORT, such as 127.0.0.1:8080, 0.0.0.0:80 or [::]:80, not {text:?}")
    })
}

/// An absolute `http` or `https` URL.
fn web(text: &str) -> Result<Url, String> {
    let url = Url::parse(text)
        .map_err(|error| format!("must be an absolute URL, such as https://go.example, not {text:?} ({error})"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("must begin with http:// or https://, not {:?}", format!("{}:", url.scheme())));
    }
    // The value is not shown: it has a password in it.
    if !url.username().is_empty() || url.password().is_some() {
        return Err("must not have a user name or password: leave out what stands before the @".to_owned());
    }
    Ok(url)
}

fn target(text: &str) -> Result<Target, String> {
    Target::new(web(text)?.as_str())
        .ok_or_else(|| format!("must be a URL of visible ascii when serialised, not {text:?}"))
}

fn base_url(text: &str) -> Result<Target, String> {
    let url = web(text)?;
    if url.query().is_some() || url.fragment().is_some() {
        return Err(format!("must have no query and no fragment: leave out what stands after ? or #, not {text:?}"));
    }
    let url = url.as_str().trim_end_matches('/');
    Target::new(url).ok_or_else(|| format!("must be a URL of visible ascii when serialised, not {text:?}"))
}

fn header(text: &str) -> Result<HeaderValue, String> {
    let text = text.trim();
    if text.is_empty() || text.len() > HEADER_BYTES_MAX {
        return Err(format!("must have from 1 to {HEADER_BYTES_MAX} bytes, such as \"no-store\", not {}", text.len()));
    }
    // The crate lets bytes past ASCII through (obs-text of RFC 9110, section 5.5), which nobody agrees on how to read.
    let value = HeaderValue::from_str(text).ok().filter(|_| text.is_ascii());
    value.ok_or_else(|| format!("must be visible ascii, such as \"no-store\", not {text:?}"))
}

/// A host as the WHATWG URL standard parses and serialises it, in lower-case ASCII; without a trailing dot. Labels have
/// 1 to 63 bytes, a name at most 253 (RFC 1035, section 2.3.4).
fn host(text: &str) -> Result<String, String> {
    let problem = || format!("must be a host name without scheme, port and path, such as \"go.example\", not {text:?}");
    let host = url::Host::parse(text.strip_suffix('.').unwrap_or(text)).map_err(|_| problem())?;
    if let url::Host::Domain(name) = &host
        && (name.len() > 253 || name.split('.').any(|label| !(1..=63).contains(&label.len())))
    {
        return Err(problem());
    }
    Ok(host.to_string())
}

fn host_and_port(text: &str) -> Result<String, String> {
    let with_port = || {
        let (name, port) = text.rsplit_once(':')?;
        Some(format!("{}:{}", host(name).ok()?, port.parse::<u16>().ok()?))
    };
    host(text)
        .ok()
        .or_else(with_port)
        .ok_or_else(|| format!("must be hosts, such as \"go.example\" or \"127.0.0.1:8080\", not {text:?}"))
}

/// RFC 3986, section 3.1.
fn scheme(text: &str) -> Result<String, String> {
    let is_scheme = text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.'));
    is_scheme
        .then(|| text.to_ascii_lowercase())
        .ok_or_else(|| format!("must be schemes without colon, such as \"https\" or \"mailto\", not {text:?}"))
}

/// An address is the network of itself; bits past the prefix are cleared.
fn net(text: &str) -> Result<IpNet, String> {
    let net = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    net.map(|net| net.trunc())
        .ok_or_else(|| format!("must be addresses and CIDRs, such as \"10.0.0.0/8\" or \"::1\", not {text:?}"))
}

fn peers(text: &str) -> Result<Peers, String> {
    match text {
        "loopback" => Ok(Peers::Loopback),
        "private" => Ok(Peers::Private),
        _ => net(text).map(Peers::Net).map_err(|_| {
            format!("must be \"loopback\", \"private\", addresses and CIDRs such as \"10.0.0.0/8\", not {text:?}")
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FILE: &str = "./waypost.toml";

    /// Loads with no files but these.
    fn load_with(flags: &Flags, env: &[(&str, &str)], files: &[(&str, &str)]) -> Result<Loaded, Errors> {
        let env = env.iter().map(|(name, value)| (name.to_string(), value.to_string()));
        load(flags, env, |path| {
            let file = files.iter().find(|(name, _)| path == Path::new(name));
            file.map(|(_, text)| text.to_string())
                .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no such file"))
        })
    }

    fn file(text: &str) -> Result<Loaded, Errors> {
        load_with(&Flags::default(), &[], &[(FILE, text)])
    }

    fn env(env: &[(&str, &str)]) -> Result<Loaded, Errors> {
        load_with(&Flags::default(), env, &[])
    }

    /// Each error's line begins and ends so; there are no others.
    fn check(got: Result<Loaded, Errors>, want: &[(&str, &str)]) {
        let got = got.map(|loaded| loaded.config).expect_err("errors").to_string();
        let lines: Vec<&str> = got.lines().collect();
        assert_eq!(lines.len(), want.len(), "{got}");
        for (line, (start, end)) in lines.iter().zip(want) {
            assert!(line.starts_with(start) && line.ends_with(end), "{line}\nis not {start} … {end}");
        }
    }

    /// The configuration without its secret, to compare.
    fn shown(config: &Config) -> String {
        format!("{:#?}", Config { admin_key: None, ..config.clone() })
    }

    /// What is printed loads to the same.
    fn check_print(loaded: &Loaded) {
        let flags = Flags { yes: true, ..Flags::default() };
        let printed = print(loaded);
        let again =
            load_with(&flags, &[], &[(FILE, &printed)]).map_err(|errors| format!("{errors}\n{printed}")).unwrap();
        assert_eq!(shown(&again.config), shown(&loaded.config), "{printed}");
    }

    #[test]
    fn every_default_is_accepted_and_every_key_is_printed() {
        let loaded = env(&[]).unwrap();
        let config = &loaded.config;
        assert!(config.base_url.is_none() && config.admin_key.is_none() && config.domains.is_empty());
        assert_eq!(config.listen, [Listen { address: "127.0.0.1:8080".parse().unwrap(), proxy_protocol: false }]);
        assert_eq!(config.connections.max, None);
        assert_eq!(config.redirect.permanent_cache_control, "private, max-age=90");
        assert_eq!(config.cache.memory, None);
        assert_eq!(config.cache.stale_max, Duration::from_secs(86_400));
        assert_eq!(config.metrics.allow, [Peers::Loopback, Peers::Private]);
        assert_eq!(config.codes.length, 7);
        let printed = print(&loaded);
        for key in KEYS.iter().filter(|key| key.section() != DOMAINS) {
            let (value, absent) = (format!("{} = ", key.leaf()), format!("# {} ", key.leaf()));
            let is_its = |line: &str| line.starts_with(&value) || line.starts_with(&absent);
            assert!(printed.lines().any(is_its), "{}", key.name);
        }
        check_print(&loaded);
    }

    const EVERYTHING: &str = r#"
        base_url = "https://go.example/s/"
        data = "/var/lib/waypost"
        listen = [{ address = "[::1]:80", proxy_protocol = true }, { address = "127.0.0.1:81" }]
        [workers]
        count = 2
        [connections]
        max = 1_000
        header_timeout = "1ms"
        idle_timeout = "2min"
        [[domains]]
        host = "BÜCHER.example."
        gone_url = "https://b.example/ü"
        [[domains]]
        host = "b.example"
        [redirect]
        status = 308
        cache_control = "no-store"
        permanent_cache_control = "public"
        forward_query = false
        root_url = "https://example"
        not_found_url = "https://example/404"
        gone_url = "https://example/410"
        [pages]
        dir = "C:\\a \"b\"\n# c"
        [api]
        listen = "127.0.0.1:9000"
        [metrics]
        allow = ["private", "192.0.2.1"]
        [postgres]
        url = "postgresql://db/waypost"
        replica_url = "postgres://replica"
        replica_max_lag = "1s"
        direct_url = "postgres://direct"
        migrate_url = "postgres://db/owner"
        migrate = "check"
        pool = 2
        pool_timeout = "2s"
        max_lifetime = "2h"
        lookups = 1
        lookup_timeout = "1ms"
        statements = "unnamed"
        connect_timeout = "3s"
        statement_timeout = "3s"
        [redis]
        url = "rediss://cache:6380"
        ca_file = "ca.pem"
        timeout = "5ms"
        ttl = "1h"
        prefix = "w:"
        [breaker]
        failures = 3
        recovery = "1s"
        [cache]
        memory = "64MiB"
        ttl = "1s"
        negative_ttl = "0s"
        stale_max = "90d"
        [codes]
        strategy = "permuted"
        length = 4
        alphabet = "base36"
        case = "insensitive"
        worker_id = 7
        worker_lease = "30s"
        [shorten]
        open = true
        [limits]
        shorten_per_minute = 0
        key_per_minute = 5
        [targets]
        schemes = ["HTTPS", "mailto"]
        max_bytes = 32768
        blocklist = "block.txt"
        own_hosts = ["Short.example", "[::1]:80", "127.0.0.1:8080"]
        lookalikes = "refuse"
        [proxies]
        trusted = ["10.1.2.3/8", "::1"]
        [log]
        format = "text"
        level = "debug"
        access = true
        [shutdown]
        drain = "5s"
        grace = "1min"
    "#;

    #[test]
    fn every_key_arrives() {
        let loaded = file(EVERYTHING).unwrap();
        check_print(&loaded);
        let Config { base_url, domains, redirect, targets, proxies, metrics, cache, listen, .. } = &loaded.config;
        assert_eq!(base_url.as_ref().map(Target::as_str), Some("https://go.example/s"));
        assert_eq!(domains[0].host, "xn--bcher-kva.example");
        assert_eq!(domains[0].gone_url.as_ref().map(Target::as_str), Some("https://b.example/%C3%BC"));
        assert_eq!(domains[1].gone_url, redirect.gone_url, "a domain without its own has the instance's");
        assert_eq!(redirect.root_url.as_ref().map(Target::as_str), Some("https://example/"));
        assert_eq!(targets.own_hosts, ["short.example", "[::1]:80", "127.0.0.1:8080"]);
        assert_eq!(targets.schemes, ["https", "mailto"]);
        assert_eq!(proxies.trusted, ["10.0.0.0/8".parse().unwrap(), "::1/128".parse::<IpNet>().unwrap()]);
        assert_eq!(metrics.allow, [Peers::Private, Peers::Net("192.0.2.1/32".parse().unwrap())]);
        assert_eq!((cache.memory, cache.negative_ttl), (Some(64 << 20), Duration::ZERO));
        assert!(listen[0].proxy_protocol && !listen[1].proxy_protocol);

        // None of the values above is a default, so each field that is not read from its key would show.
        let defaults = shown(&env(&[]).unwrap().config);
        let all = shown(&loaded.config);
        let alike: Vec<&str> = all.lines().filter(|line| line.contains(": ") && defaults.contains(*line)).collect();
        let structs = |line: &&str| {
            !line.ends_with(['{', '[', '(']) && !line.contains("proxy_protocol") && !line.contains("admin_key")
        };
        assert_eq!(alike.into_iter().filter(structs).collect::<Vec<_>>(), Vec::<&str>::new());
    }

    #[test]
    fn names_of_choices_are_accepted() {
        for key in KEYS {
            let Kind::OneOf(names) = key.kind else { continue };
            for name in names {
                let variable = key.variable().unwrap();
                let mut variables = vec![(variable.as_str(), *name)];
                if *name == "insensitive" {
                    variables.push(("WAYPOST_CODES__ALPHABET", "base36"));
                }
                check_print(&env(&variables).unwrap());
            }
        }
    }

    #[test]
    fn flags_over_environment_over_file_over_defaults() {
        let (text, variables) = (
            "data = \"f\"\n[[listen]]\naddress = \"1.1.1.1:1\"\n",
            [("WAYPOST_DATA", "e"), ("WAYPOST_LISTEN", "2.2.2.2:2, [::]:2")],
        );
        let flags = Flags {
            data: Some("g".into()),
            listen: vec!["3.3.3.3:3".to_owned()],
            workers: Some(3),
            ..Flags::default()
        };
        let none = Flags::default();
        for (flags, variables, text, data, listen, from) in [
            (&none, &[][..], "", "./waypost-data", &["127.0.0.1:8080"][..], "default"),
            (&none, &[], text, "f", &["1.1.1.1:1"], "./waypost.toml:1"),
            (&none, &variables, text, "e", &["2.2.2.2:2", "[::]:2"], "WAYPOST_DATA"),
            (&flags, &variables, text, "g", &["3.3.3.3:3"], "--data"),
        ] {
            let loaded = load_with(flags, variables, &[(FILE, text)]).unwrap();
            assert_eq!(loaded.config.data, Path::new(data));
            assert_eq!(loaded.config.listen.iter().map(|one| one.address.to_string()).collect::<Vec<_>>(), listen);
            assert!(print(&loaded).contains(&format!("data = \"{data}\"  # {from}\n")), "{}", print(&loaded));
            assert_eq!(loaded.config.workers.count, flags.workers.unwrap_or(0));
            check_print(&loaded);
        }
    }

    #[test]
    fn variables_of_every_kind() {
        let loaded = load_with(
            &Flags::default(),
            &[
                ("WAYPOST_PROXIES__TRUSTED", "10.0.0.0/8,::1"),
                ("WAYPOST_TARGETS__OWN_HOSTS", ""),
                ("WAYPOST_LOG__ACCESS", "true"),
                ("WAYPOST_CODES__LENGTH", "9"),
                ("WAYPOST_CACHE__MEMORY", "512MiB"),
                ("WAYPOST_CACHE__TTL_FILE", "/run/ttl"),
                ("WAYPOST_ADMIN_KEY_FILE", "/run/key"),
                ("WAYPOST_SERVER", "https://x"),
                ("WAYPOST_POSTGRES_URL_FILE", "/run/postgres"),
                ("WAYPOST_REDIS_URL", "redis://cache"),
                ("WAYPOST_CODES__WORKER_ID", "0"),
                ("WAYPOST_KEY", "k"),
                ("WAYPOST_SERVICE_HOST", "10.0.0.1"),
                ("WAYPOST_SERVICE_PORT_HTTP", "80"),
                ("WAYPOST_PORT", "tcp://10.0.0.1:80"),
                ("WAYPOST_REDIS_PORT_6379_TCP_ADDR", "10.0.0.2"),
                ("PATH", "/bin"),
            ],
            &[
                ("/run/ttl", "5s\r\n"),
                ("/run/key", "correct-horse-battery\n"),
                ("/run/postgres", "postgres://a:pony@db/w\n"),
            ],
        )
        .unwrap();
        let Config { proxies, targets, log, codes, cache, admin_key, .. } = &loaded.config;
        assert_eq!((proxies.trusted.len(), targets.own_hosts.len(), log.access, codes.length), (2, 0, true, 9));
        assert_eq!((cache.memory, cache.ttl), (Some(512 << 20), Duration::from_secs(5)));
        assert_eq!(admin_key.as_ref().map(Secret::expose), Some("correct-horse-battery"));
        let printed = print(&loaded);
        assert!(printed.contains("# admin_key = \"(hidden)\"  # WAYPOST_ADMIN_KEY_FILE\n"), "{printed}");
        let (postgres, redis) = (loaded.config.postgres.as_ref().unwrap(), loaded.config.redis.as_ref().unwrap());
        assert_eq!((postgres.url.expose(), redis.url.expose()), ("postgres://a:pony@db/w", "redis://cache"));
        assert_eq!(codes.worker_id, Some(0));
        assert!(printed.contains("# url = \"postgres://(hidden)@db/w\"  # WAYPOST_POSTGRES_URL_FILE\n"), "{printed}");
        assert!(printed.contains("url = \"redis://cache\"  # WAYPOST_REDIS_URL\n"), "{printed}");
        let shown = format!("{printed}{loaded:?}");
        assert!(!shown.contains("horse") && !shown.contains("pony"), "{shown}");
    }

    #[test]
    fn which_file() {
        let [here, etc] = PLACES;
        let named = Flags { config: Some("a.toml".into()), ..Flags::default() };
        let files: [(&str, &str); 4] = [("a.toml", ""), ("b.toml", ""), (here, ""), (etc, "")];
        for (flags, variable, files, want) in [
            (&named, Some("b.toml"), &files[..], Some("a.toml")),
            (&Flags::default(), Some("b.toml"), &files, Some("b.toml")),
            (&Flags::default(), None, &files, Some(here)),
            (&Flags::default(), None, &files[3..], Some(etc)),
            (&Flags::default(), None, &[], None),
        ] {
            let env: Vec<_> = variable.map(|path| ("WAYPOST_CONFIG", path)).into_iter().collect();
            assert_eq!(load_with(flags, &env, files).unwrap().file.as_deref(), want.map(Path::new));
        }
        check(load_with(&named, &[], &files[1..]), &[("--config: cannot read a.toml: ", "no such file")]);
        check(env(&[("WAYPOST_CONFIG", "b.toml")]), &[("WAYPOST_CONFIG: cannot read b.toml: ", "no such file")]);
        let denied = load(&Flags::default(), [], |_| Err(io::Error::new(io::ErrorKind::PermissionDenied, "denied")));
        check(denied, &[("default: cannot read ./waypost.toml: ", "denied")]);
    }

    #[test]
    fn what_a_file_may_not_say() {
        for (text, start, end) in [
            ("\n[cache]\nmemroy = \"1GiB\"", "3: unknown key cache.memroy: ", "did you mean cache.memory"),
            ("[redirect]\nttl = \"1s\"", "2: unknown key redirect.ttl: ", "did you mean redis.ttl"),
            ("[[listen]]\nadress = \"127.0.0.1:1\"", "2: unknown key listen.adress: ", "did you mean listen.address"),
            ("[cache]\nsize = 5", "2: unknown key cache.size: ", "[cache] has memory, ttl, negative_ttl, stale_max"),
            ("seven = 5", "1: unknown key seven: ", "`waypost config print` shows the known ones"),
            ("ttl = 5", "1: unknown key ttl: ", "did you mean redis.ttl"),
            ("cache.ttl.x = 5", "1: cache.ttl must be a duration in quotes, such as \"30s\", not a table", ""),
            ("[cahce]\nttl = 5", "1: unknown section [cahce]: ", "did you mean [cache]"),
            ("[mysql]\nurl = 5", "1: unknown section [mysql]: ", "shows the known ones"),
            ("[redis]\nurl = 5", "2: redis.url must be an address in quotes", "not 5"),
            (
                "[postgres]\nurl = \"mysql://a:secret@b\"",
                "2: postgres.url must begin with postgres://",
                "postgresql://",
            ),
            ("[codes]\nworker_id = 1024", "2: codes.worker_id must be a whole number from 0 to 1023", "not 1024"),
            ("cache = 5", "1: cache is a section: ", "write [cache], and its keys below"),
            ("[[cache]]", "1: cache is a section: ", "write [cache], and its keys below"),
            ("[listen]\naddress = \"127.0.0.1:1\"", "1: listen is a list of tables: ", "write [[listen]] for each"),
            ("listen = [\"127.0.0.1:1\"]", "1: listen is a list of tables: ", "write [[listen]] for each"),
            ("domains = \"a\"", "1: domains is a list of tables: ", "write [[domains]] for each"),
            (
                "admin_key = \"x\"",
                "1: admin_key stands in the environment alone: ",
                "set WAYPOST_ADMIN_KEY or WAYPOST_ADMIN_KEY_FILE",
            ),
            ("[cache]\nttl = 60", "2: cache.ttl \"60\" has no unit: ", "such as \"60s\""),
            ("[cache]\nmemory = 512", "2: cache.memory \"512\" has no unit: ", "such as \"512MiB\""),
            ("[cache]\nttl = true", "2: cache.ttl must be a duration in quotes, ", "not true"),
            ("[log]\naccess = \"yes\"", "2: log.access must be true or false, ", "not \"yes\""),
            ("[workers]\ncount = -1", "2: workers.count must be a whole number from 0 to 1024, ", "not \"-1\""),
            ("[workers]\ncount = 1025", "2: workers.count must be a whole number from 0 to 1024, ", "not 1025"),
            ("[targets]\nschemes = [5]", "2: targets.schemes must be a list of texts", "not 5"),
            ("a = \n", "1: this is not toml: ", ""),
            ("data = \"a\"\ndata = \"b\"", "2: this is not toml: ", "duplicate key"),
        ] {
            check(file(text), &[(&format!("{FILE}:{start}"), end)]);
        }
    }

    #[test]
    fn what_a_value_may_not_be() {
        for (variable, value, end) in [
            ("BASE_URL", "go.example", "(relative URL without a base)"),
            ("BASE_URL", "ftp://go.example", "must begin with http:// or https://, not \"ftp:\""),
            ("BASE_URL", "https://go.example/?", "leave out what stands after ? or #, not \"https://go.example/?\""),
            ("BASE_URL", "https://go.example/#a", "not \"https://go.example/#a\""),
            ("BASE_URL", "https://u:p@go.example", "leave out what stands before the @"),
            ("DATA", "", "data must be a path, not \"\""),
            ("API__LISTEN", "localhost:80", "such as 127.0.0.1:8080, 0.0.0.0:80 or [::]:80, not \"localhost:80\""),
            ("API__LISTEN", ":80", "not \":80\""),
            ("API__LISTEN", "127.0.0.1", "not \"127.0.0.1\""),
            ("CONNECTIONS__HEADER_TIMEOUT", "0s", "must be at least 1ms, not 0s"),
            ("CONNECTIONS__IDLE_TIMEOUT", "5", "such as \"5s\""),
            ("REDIRECT__STATUS", "304", "must be one of [301, 302, 303, 307, 308], not 304"),
            ("REDIRECT__STATUS", "200", "must be a whole number from 301 to 308, not 200"),
            ("REDIRECT__CACHE_CONTROL", " ", "such as \"no-store\", not 0"),
            ("REDIRECT__CACHE_CONTROL", "é", "such as \"no-store\", not \"é\""),
            ("REDIRECT__ROOT_URL", "/", "(relative URL without a base)"),
            ("REDIRECT__GONE_URL", "javascript:0", "not \"javascript:\""),
            ("REDIRECT__FORWARD_QUERY", "1", "must be true or false, not \"1\""),
            ("METRICS__ALLOW", "public", "not \"public\""),
            ("CACHE__MEMORY", "1GB", "such as \"512MiB\""),
            ("CODES__LENGTH", "3", "must be a whole number from 4 to 32, not 3"),
            ("CODES__LENGTH", "33", "not 33"),
            ("CODES__LENGTH", "seven", "not \"seven\""),
            ("CODES__ALPHABET", "base64", "must be one of base62, base58, base36, not \"base64\""),
            ("CODES__CASE", "insensitive", "set codes.alphabet to base36"),
            ("TARGETS__MAX_BYTES", "32769", "must be a whole number from 1 to 32768, not 32769"),
            ("TARGETS__SCHEMES", "", "must name at least one"),
            ("TARGETS__SCHEMES", "https:", "not \"https:\""),
            ("TARGETS__SCHEMES", "http,,https", "not \"\""),
            ("TARGETS__OWN_HOSTS", "https://go.example", "not \"https://go.example\""),
            ("TARGETS__OWN_HOSTS", "go.example:99999", "not \"go.example:99999\""),
            ("PROXIES__TRUSTED", "10.0.0.0/33", "not \"10.0.0.0/33\""),
            ("PROXIES__TRUSTED", "proxy.example", "not \"proxy.example\""),
            ("LOG__LEVEL", "3", "must be one of error, warn, info, debug, trace, not \"3\""),
            ("ADMIN_KEY", "nineteen-bytes-long", "has 19 bytes: it must have from 20 to 256"),
            ("ADMIN_KEY", "twenty bytes and spaces", "as it travels in a header"),
            ("LISTEN", " ", "write one, such as 127.0.0.1:8080, or unset it"),
            ("LISTEN", "127.0.0.1:80,127.0.0.1:80", "127.0.0.1:80 is given twice: leave one out"),
            ("DATA", "a\nb", "holds the value alone"),
        ] {
            let variable = format!("WAYPOST_{variable}");
            check(env(&[(&variable, value)]), &[(&format!("{variable}: "), end)]);
        }
    }

    #[test]
    fn unknown_variables() {
        for (variable, hint) in [
            ("WAYPOST_CACHE__MEMROY", "did you mean WAYPOST_CACHE__MEMORY"),
            ("WAYPOST_CACHE_MEMORY", "did you mean WAYPOST_CACHE__MEMORY"),
            ("WAYPOST_CACHE__MEMROY_FILE", "did you mean WAYPOST_CACHE__MEMORY"),
            ("WAYPOST_LISTEN__ADDRESS", "did you mean WAYPOST_LISTEN"),
            ("WAYPOST_DOMAINS__HOST", "[[domains]] stands in the file alone"),
            ("WAYPOST_data", "did you mean WAYPOST_DATA"),
            ("WAYPOST_FOO", "`waypost config print` shows the known keys"),
            ("WAYPOST_", "`waypost config print` shows the known keys"),
            ("WAYPOST_PORT", "`waypost config print` shows the known keys"),
        ] {
            check(env(&[(variable, "8080")]), &[(&format!("{variable}: unknown variable: "), hint)]);
        }
    }

    #[test]
    fn a_variable_beside_its_file() {
        let both = [("WAYPOST_DATA", "a"), ("WAYPOST_DATA_FILE", "/run/data")];
        let want = ("WAYPOST_DATA_FILE: is given beside WAYPOST_DATA", "unset one of them");
        check(load_with(&Flags::default(), &both, &[("/run/data", "b")]), &[want]);
        let missing = ("WAYPOST_DATA_FILE: cannot read /run/data: ", "no such file");
        check(env(&[("WAYPOST_DATA_FILE", "/run/data")]), &[missing]);
    }

    #[test]
    fn values_that_do_not_go_together() {
        for (text, start, end) in [
            (
                "[[listen]]\naddress = \"[::]:80\"\n[[listen]]\naddress = \"[::]:80\"",
                "3: listen.address",
                "leave one out",
            ),
            (
                "[api]\nlisten = \"127.0.0.1:8080\"",
                "2: api.listen 127.0.0.1:8080 is a listener already",
                "the same one",
            ),
            (
                "[[domains]]\nhost = \"a.b\"\n[[domains]]\nhost = \"A.b.\"",
                "3: domains.host a.b stands at",
                ":1 already: leave one out",
            ),
            ("[[domains]]\nroot_url = \"https://a\"", "1: domains.host must be a host name", "not \"\""),
            ("[[domains]]\nhost = \"a.b:80\"", "2: domains.host must be a host name", "not \"a.b:80\""),
            ("[[domains]]\nhost = \"a..b\"", "2: domains.host must be a host name", "not \"a..b\""),
            ("[[domains]]\nhost = 5", "2: domains.host must be text in quotes", "not 5"),
        ] {
            check(file(text), &[(&format!("{FILE}:{start}"), end)]);
        }
        // Two listeners on any free port are two, and so is one for the API.
        assert!(env(&[("WAYPOST_LISTEN", "127.0.0.1:0,127.0.0.1:0"), ("WAYPOST_API__LISTEN", "127.0.0.1:0")]).is_ok());
    }

    #[test]
    fn open_to_anybody() {
        for (listen, api, yes, refused) in [
            ("127.0.0.1:80,[::1]:80,[::ffff:127.0.0.1]:80", "", false, false),
            ("127.0.0.1:80,0.0.0.0:80", "", false, true),
            ("[::]:80", "", false, true),
            ("[::]:80", "", true, false),
            ("[::]:80", "127.0.0.1:81", false, false),
            ("127.0.0.1:80", "192.0.2.1:81", false, true),
        ] {
            let flags = Flags { open: true, yes, ..Flags::default() };
            let got = load_with(&flags, &[("WAYPOST_LISTEN", listen), ("WAYPOST_API__LISTEN", api)], &[]);
            match got {
                Ok(loaded) => assert!(loaded.config.shorten.open && !refused, "{listen} {api}"),
                Err(errors) if refused => {
                    check(Err(errors), &[("--open: shorten.open lets anybody shorten, and", "--yes")])
                }
                Err(errors) => panic!("{listen} {api}: {errors}"),
            }
        }
    }

    #[test]
    fn all_errors_at_once() {
        let text = "dta = 1\n[cache]\nttl = 5\nmemory = \"1\"\n[[listen]]\naddress = \"x\"\nproxy = 1\n\
                    [codes]\nalphabet = \"base63\"\ncase = \"insensitive\"\n[[domains]]\nroot_url = \"x\"\ngone_url = \"y\"\n";
        let flags = Flags { base_url: Some("x".to_owned()), workers: Some(5000), open: true, ..Flags::default() };
        let variables = [("WAYPOST_API__LISTEN", "y"), ("WAYPOST_LOGS", "z"), ("WAYPOST_LOG__ACCESS", "no")];
        let errors = load_with(&flags, &variables, &[(FILE, text)]).expect_err("errors").to_string();
        let mut starts: Vec<String> =
            errors.lines().map(|line| line.splitn(3, ' ').take(2).collect::<Vec<_>>().join(" ")).collect();
        starts.sort();
        let mut want = [
            "--base-url: base_url",
            "--workers: workers.count",
            "WAYPOST_API__LISTEN: api.listen",
            "WAYPOST_LOGS: unknown",
            "WAYPOST_LOG__ACCESS: log.access",
            "./waypost.toml:1: unknown",
            "./waypost.toml:3: cache.ttl",
            "./waypost.toml:4: cache.memory",
            "./waypost.toml:6: listen.address",
            "./waypost.toml:7: unknown",
            "./waypost.toml:9: codes.alphabet",
            "./waypost.toml:11: domains.host",
            "./waypost.toml:12: domains.root_url",
            "./waypost.toml:13: domains.gone_url",
        ];
        want.sort_unstable();
        assert_eq!(starts, want, "{errors}");
    }

    #[test]
    fn a_file_past_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("waypost.toml");
        for (bytes, fits) in [(FILE_BYTES_MAX, true), (FILE_BYTES_MAX + 1, false)] {
            std::fs::write(&path, " ".repeat(bytes as usize)).unwrap();
            assert_eq!(read(&path).is_ok(), fits, "{bytes}");
        }
        assert_eq!(read(&folder.path().join("none")).map_err(|error| error.kind()), Err(io::ErrorKind::NotFound));
    }

    proptest! {
        #[test]
        fn any_file_is_a_configuration_or_errors(
            text in "\\PC{0,60}|([a-z\\[\\]]{1,6}|\\[\\[listen\\]\\]|[=.\"\n ]|5s|true|[0-9]){0,20}",
        ) {
            match file(&text) {
                Ok(loaded) => check_print(&loaded),
                Err(Errors(errors)) => prop_assert!(!errors.is_empty()),
            }
        }

        #[test]
        fn any_value_is_taken_or_refused(
            index in 0..KEYS.len(),
            value in "\\PC{0,30}|[a-z0-9.:/,\\[\\]\"\\\\-]{0,20}",
        ) {
            let name = KEYS[index].variable().unwrap_or_else(|| "WAYPOST_LISTEN".to_owned());
            match env(&[(&name, &value)]) {
                Ok(loaded) => check_print(&loaded),
                Err(Errors(errors)) => prop_assert!(!errors.is_empty()),
            }
        }
    }
}
