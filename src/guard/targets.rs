//! Targets: where a link may lead.
//!
//! In: what a person wrote, and the policy of the configuration. Out: the URL as it goes into `Location`,
//! or the rule that refuses it.
//! Never: asks DNS or the target; reads the clock; reads the disk in [`Policy::check`]; changes what a URL means.
//! At its limits: a target beyond `targets.max_bytes` is refused, written or serialised, as is a policy that could
//! not be kept; a blocklist that broke, vanished or outgrew [`BLOCKLIST_BYTES_MAX`] leaves the last good one in force.
//!
//! URLs are those of the WHATWG URL Standard. Where crate `url` is behind it, [`parse`] makes up for it.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError, RwLock, TryLockError};
use std::time::{Duration, SystemTime};

use unicode_security::{MixedScript, skeleton};
use url::{Host, ParseError, Position, Url};

use crate::domain::target::Target;
use crate::domain::time::UnixMillis;

/// The schemes of `targets.schemes` unless configured.
pub const SCHEMES: [&str; 2] = ["http", "https"];
/// `targets.max_bytes` unless configured.
pub const MAX_BYTES: usize = 2048;
/// The largest blocklist that is read: about two million hosts.
pub const BLOCKLIST_BYTES_MAX: u64 = 64 << 20;
/// How much of a broken line is told.
const LINE_SHOWN_CHARS: usize = 80;
/// How seldom the blocklist's file is looked at.
const BLOCKLIST_CHECK: Duration = Duration::from_secs(1);

/// The rules that a target has to pass; shared by all threads.
#[derive(Debug)]
pub struct Policy {
    /// Lower case, without the colon; never `file`.
    schemes: Vec<String>,
    max_bytes: usize,
    blocklist: Option<Blocklist>,
    own_hosts: Vec<OwnHost>,
    lookalikes: Lookalikes,
}

/// What happens to a target whose host passes for another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lookalikes {
    /// It is accepted, and says so.
    #[default]
    Flag,
    Refuse,
}

/// A target that passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    pub target: Target,
    /// Its host passes for another; only under [`Lookalikes::Flag`].
    pub lookalike: bool,
}

/// The rule that a target broke. Hosts are given as they were compared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("the target is not an absolute url: write it in full, like https://example.com/")]
    NotAUrl,
    #[error("the target's scheme is {scheme}, allowed are {allowed}; targets.schemes allows others")]
    Scheme { scheme: String, allowed: String },
    #[error("the target has {bytes} bytes, allowed are {max_bytes}; targets.max_bytes allows more")]
    TooLong { bytes: usize, max_bytes: usize },
    #[error("the target has characters that no header can carry: percent-encode them")]
    ControlCharacter,
    #[error("the target has a user name or password, which every visitor would see: leave them out")]
    Credentials,
    #[error("the target's host {host} is this service itself, which would be a loop: give the final address")]
    OwnHost { host: String },
    #[error("the target's host {host} is on the blocklist; targets.blocklist names its file")]
    Blocked { host: String },
    #[error("the target's host {host} looks like another: write the host that is meant")]
    Lookalike { host: String },
}

impl Refused {
    /// The `code` of the field's error in problem+json.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotAUrl => "not_a_url",
            Self::Scheme { .. } => "scheme",
            Self::TooLong { .. } => "too_long",
            Self::ControlCharacter => "control_character",
            Self::Credentials => "credentials",
            Self::OwnHost { .. } => "own_host",
            Self::Blocked { .. } => "blocked",
            Self::Lookalike { .. } => "lookalike",
        }
    }
}

/// A configuration that cannot be meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPolicy {
    #[error("targets.schemes: {0:?} is no scheme: a letter, then letters, digits, + - . and no colon")]
    Scheme(String),
    #[error("targets.schemes: file cannot be a target: no browser follows a redirect to a file; leave it out")]
    File,
    #[error("targets.own_hosts: {0:?} is neither host nor host:port")]
    OwnHost(String),
}

/// A host of the service, as targets are compared to it.
#[derive(Debug)]
struct OwnHost {
    host: String,
    /// None = on every port.
    port: Option<u16>,
}

impl Policy {
    /// `schemes` without colons; `max_bytes` holds for what is written and for what is serialised; `own_hosts` are
    /// `host` (on every port) or `host:port` (on this one alone: another port of 127.0.0.1 is another service).
    pub fn new(
        schemes: &[impl AsRef<str>],
        max_bytes: usize,
        blocklist: Option<Blocklist>,
        own_hosts: &[impl AsRef<str>],
        lookalikes: Lookalikes,
    ) -> Result<Self, BadPolicy> {
        let schemes = schemes.iter().map(|scheme| allowed_scheme(scheme.as_ref())).collect::<Result<_, _>>()?;
        let own_hosts = own_hosts.iter().map(|entry| own_host(entry.as_ref())).collect::<Result<_, _>>()?;
        Ok(Self { schemes, max_bytes, blocklist, own_hosts, lookalikes })
    }

    /// The target as it goes into `Location`, or the first rule that it breaks.
    pub fn check(&self, written: &str) -> Result<Accepted, Refused> {
        self.check_length(written)?;
        let Parsed { url, host } = parse(written).ok_or(Refused::NotAUrl)?;
        if !self.schemes.iter().any(|scheme| scheme == url.scheme()) {
            return Err(Refused::Scheme { scheme: url.scheme().to_owned(), allowed: self.schemes.join(", ") });
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(Refused::Credentials);
        }
        let href = serialise(&url, &host);
        self.check_length(&href)?;
        let target = Target::new(&href).ok_or(Refused::ControlCharacter)?;

        // Other schemes leave their hosts as they were written; whoever opens them may yet read them as domains.
        let host = comparable(&host).unwrap_or(host);
        let port = url.port_or_known_default();
        if self.own_hosts.iter().any(|own| own.host == host && (own.port.is_none() || own.port == port)) {
            return Err(Refused::OwnHost { host });
        }
        if self.blocklist.as_ref().is_some_and(|list| list.blocks(&host)) {
            return Err(Refused::Blocked { host });
        }
        let lookalike = is_lookalike(&host);
        if lookalike && self.lookalikes == Lookalikes::Refuse {
            return Err(Refused::Lookalike { host });
        }
        Ok(Accepted { target, lookalike })
    }

    /// Reads the blocklist again if its file changed; to be called before checks, where the disk may be waited for.
    pub fn refresh(&self, now: UnixMillis) -> Refresh {
        self.blocklist.as_ref().map_or(Refresh::Unchanged, |list| list.refresh(now))
    }

    /// Whether [`Policy::refresh`] would look at the disk.
    pub fn is_due(&self, now: UnixMillis) -> bool {
        self.blocklist.as_ref().is_some_and(|list| list.is_due(now))
    }

    fn check_length(&self, text: &str) -> Result<(), Refused> {
        if text.len() > self.max_bytes {
            return Err(Refused::TooLong { bytes: text.len(), max_bytes: self.max_bytes });
        }
        Ok(())
    }
}

/// A scheme by RFC 3986, section 3.1.
fn allowed_scheme(scheme: &str) -> Result<String, BadPolicy> {
    let well_formed = scheme.starts_with(|first: char| first.is_ascii_alphabetic())
        && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.'));
    let scheme = scheme.to_ascii_lowercase();
    // Crate url 2.5.8 merges slashes in these and drops the host before a drive letter: it would change the target.
    match &*scheme {
        _ if !well_formed => Err(BadPolicy::Scheme(scheme)),
        "file" => Err(BadPolicy::File),
        _ => Ok(scheme),
    }
}

fn own_host(entry: &str) -> Result<OwnHost, BadPolicy> {
    let bad = || BadPolicy::OwnHost(entry.to_owned());
    if let Some(host) = comparable(entry) {
        return Ok(OwnHost { host, port: None });
    }
    let (host, port) = entry.rsplit_once(':').ok_or_else(bad)?;
    Ok(OwnHost { host: comparable(host).ok_or_else(bad)?, port: Some(port.parse().map_err(|_| bad())?) })
}

/// A URL and its host as it is serialised (empty if there is none), which are not always crate `url`'s.
struct Parsed {
    url: Url,
    host: String,
}

/// By the URL Standard's basic parser, without a base. `url` 2.5.8 refuses domains with a label in `xn--` that is no
/// valid IDNA; since 2026 the Standard takes any domain that is ASCII as it is, in lower case ("domain to ASCII",
/// step for non-strict). Such a URL is parsed with another domain of the same length in place of its own.
/// Left as they are: a domain that hides such a label in percent-escapes stays refused; and a path's segment of a
/// letter and `:` or `|` outlives a `..` after it, as only a drive in `file` should. Neither moves a host.
fn parse(written: &str) -> Option<Parsed> {
    let cleaned: String = written
        .trim_matches(|character| character <= ' ')
        .chars()
        .filter(|character| !matches!(character, '\t' | '\n' | '\r'))
        .collect();
    match Url::parse(&cleaned) {
        Ok(url) if !url.is_special() && has_bad_authority(&cleaned) => None,
        Ok(url) => {
            let host = url.host_str().unwrap_or_default().to_owned();
            Some(Parsed { url, host })
        }
        Err(ParseError::IdnaError) => {
            let (before, domain, after) = around_domain(&cleaned)?;
            let stand_in = stand_in(domain)?;
            let url = Url::parse(&[before, &stand_in, after].concat()).ok()?;
            (url.host_str() == Some(&stand_in)).then(|| Parsed { url, host: domain.to_ascii_lowercase() })
        }
        Err(_) => None,
    }
}

/// What `url` 2.5.8 takes and the Standard does not, under a scheme that is not special: `@` without a host
/// after it, and a backslash after a port's colon, which ends nothing there.
fn has_bad_authority(cleaned: &str) -> bool {
    let rest = cleaned.split_once(':').and_then(|(_, rest)| rest.strip_prefix("//"));
    let authority = rest.and_then(|rest| rest.split(['/', '?', '#']).next()).unwrap_or_default();
    match authority.rsplit_once('@') {
        Some((_, host_and_port)) => host_and_port.is_empty() || host_and_port.contains('\\'),
        None => authority.contains('\\'),
    }
}

/// The URL up to its domain, the domain, and what follows; for schemes whose hosts are domains, in which any number
/// of slashes and backslashes leads to the authority.
fn around_domain(cleaned: &str) -> Option<(&str, &str, &str)> {
    let scheme_end = cleaned.find(':')? + 1;
    let slashes = cleaned[scheme_end..].bytes().take_while(|byte| matches!(byte, b'/' | b'\\')).count();
    let start = scheme_end + slashes;
    let end = cleaned[start..].find(['/', '\\', '?', '#']).map_or(cleaned.len(), |length| start + length);
    let start = cleaned[start..end].rfind('@').map_or(start, |length| start + length + 1);
    let end = cleaned[start..end].find(':').map_or(end, |length| start + length);
    Some((&cleaned[..start], &cleaned[start..end], &cleaned[end..]))
}

/// A domain of the same length, without labels in `xn--`; none for domains that are not plain ASCII.
fn stand_in(domain: &str) -> Option<String> {
    (domain.is_ascii() && !domain.contains('%')).then(|| {
        let labels = domain.split('.').map(|label| {
            let label = label.to_ascii_lowercase();
            label.strip_prefix("xn--").map_or_else(|| label.clone(), |rest| format!("xx--{rest}"))
        });
        labels.collect::<Vec<_>>().join(".")
    })
}

/// The Standard's serialisation, and two corrections. `url` 2.5.8 leaves `^` in paths, which the Standard encodes.
/// The Standard leaves spaces in opaque paths (`mailto:a b`), which no `Location` can have; encoded, they are the
/// same to whoever decodes the path.
fn serialise(url: &Url, host: &str) -> String {
    let path = &url[Position::BeforePath..Position::AfterPath];
    let path = if url.cannot_be_a_base() { path.replace(' ', "%20") } else { path.replace('^', "%5E") };
    let authority = &url[Position::AfterHost..Position::BeforePath];
    [&url[..Position::BeforeHost], host, authority, &path, &url[Position::AfterPath..]].concat()
}

/// A host as hosts are compared: by the Standard's host parser, without trailing dots, IPv4 in IPv6 as IPv4.
/// None if it is no host.
fn comparable(host: &str) -> Option<String> {
    match Host::parse(host) {
        Ok(Host::Domain(domain)) => Some(domain.trim_end_matches('.').to_owned()),
        Ok(Host::Ipv4(address)) => Some(address.to_string()),
        Ok(Host::Ipv6(address)) => Some(ipv6(address)),
        Err(ParseError::IdnaError) => {
            Host::parse(&stand_in(host)?).ok()?;
            Some(host.trim_end_matches('.').to_ascii_lowercase())
        }
        Err(_) => None,
    }
}

fn ipv6(address: Ipv6Addr) -> String {
    address.to_ipv4_mapped().map_or_else(|| format!("[{address}]"), |address| address.to_string())
}

/// Whether a host passes for another: a label claims to be IDNA and is not, mixes scripts (UTS 39, section 5.1;
/// letters of ASCII beside Chinese, Japanese or Korean are no mix, as in its section 5.2, "highly restrictive"), or
/// looks like ASCII from end to end (its section 4). The last does not count below a top-level domain that is
/// itself not ASCII: under `рф`, Cyrillic words are what they seem.
fn is_lookalike(host: &str) -> bool {
    if !host.split('.').any(|label| label.starts_with("xn--")) {
        return false;
    }
    let (unicode, decoded) = idna::domain_to_unicode(host);
    let ascii_top = unicode.rsplit('.').next().is_some_and(str::is_ascii);
    decoded.is_err()
        || unicode
            .split('.')
            .filter(|label| !label.is_ascii())
            .any(|label| mixes_scripts(label) || ascii_top && skeleton(label).all(|character| character.is_ascii()))
}

fn mixes_scripts(label: &str) -> bool {
    let foreign: String = label.chars().filter(|character| !character.is_ascii()).collect();
    let scripts = foreign.as_str().resolve_script_set();
    !(label.is_single_script() || scripts.hanb || scripts.jpan || scripts.kore)
}

/// A file of hosts that no target may have, one a line: `host` for itself, `.host` or `*.host` for it and all below;
/// from `#` on, a line is a comment. Hosts are compared as targets' are, so any spelling will do.
#[derive(Debug)]
pub struct Blocklist {
    path: PathBuf,
    /// Replaced as a whole, so that a poisoned lock hides nothing half done.
    hosts: RwLock<Hosts>,
    file: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Hosts {
    exact: HashSet<Box<str>>,
    /// Each with all below it.
    below: HashSet<Box<str>>,
}

/// The file when it was last looked at.
#[derive(Debug)]
struct Seen {
    at: UnixMillis,
    /// None = it could not be read.
    stamp: Option<Stamp>,
}

impl Seen {
    fn is_due(&self, now: UnixMillis) -> bool {
        // A clock that was set back is a reason to look, not to wait until it has caught up.
        !(self.at..self.at.after(BLOCKLIST_CHECK)).contains(&now)
    }
}

/// Modification time and length. A file changed twice within the file system's tick (some milliseconds), to the same
/// length, and read in between, is not seen to have changed; one that is replaced by a rename within it neither.
type Stamp = (SystemTime, u64);

/// What became of a look at the blocklist's file.
#[derive(Debug)]
pub enum Refresh {
    /// Not due, not changed, or another thread is at it.
    Unchanged,
    /// The list now has this many entries.
    Reloaded { hosts: usize },
    /// The file changed for the worse, and the old list stays. Told once, until it changes again: to be logged.
    Kept(BadBlocklist),
}

#[derive(Debug, thiserror::Error)]
pub enum BadBlocklist {
    #[error("targets.blocklist: {path} cannot be read")]
    Read { path: PathBuf, source: io::Error },
    #[error("targets.blocklist: {path} has {bytes} bytes, at most {BLOCKLIST_BYTES_MAX} are read: shorten it")]
    TooLong { path: PathBuf, bytes: u64 },
    #[error("targets.blocklist: {path}, line {line}: {text:?} is no host; write host, .host or *.host")]
    Line { path: PathBuf, line: usize, text: String },
}

impl Blocklist {
    /// Reads the file for the first time; `now` is when.
    pub fn open(path: PathBuf, now: UnixMillis) -> Result<Self, BadBlocklist> {
        let stamp = stamp(&path).map_err(|source| BadBlocklist::Read { path: path.clone(), source })?;
        let hosts = RwLock::new(read(&path, stamp)?);
        Ok(Self { path, hosts, file: Mutex::new(Seen { at: now, stamp: Some(stamp) }) })
    }

    fn blocks(&self, host: &str) -> bool {
        let hosts = self.hosts.read().unwrap_or_else(PoisonError::into_inner);
        let mut above = Some(host);
        while let Some(domain) = above {
            if hosts.below.contains(domain) {
                return true;
            }
            above = domain.split_once('.').map(|(_, above)| above);
        }
        hosts.exact.contains(host)
    }

    fn is_due(&self, now: UnixMillis) -> bool {
        match self.file.try_lock() {
            Ok(seen) => seen.is_due(now),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner().is_due(now),
            Err(TryLockError::WouldBlock) => false,
        }
    }

    fn refresh(&self, now: UnixMillis) -> Refresh {
        // Whoever comes second need not wait for the disk.
        let mut seen = match self.file.try_lock() {
            Ok(seen) => seen,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Refresh::Unchanged,
        };
        if !seen.is_due(now) {
            return Refresh::Unchanged;
        }
        seen.at = now;
        // The stamp comes before the text: what is written in between has a later one, and is read next time.
        let (stamp, hosts) = match stamp(&self.path) {
            Ok(stamp) if seen.stamp == Some(stamp) => return Refresh::Unchanged,
            Ok(stamp) => (Some(stamp), read(&self.path, stamp)),
            Err(source) => (None, Err(BadBlocklist::Read { path: self.path.clone(), source })),
        };
        match hosts {
            Ok(hosts) => {
                seen.stamp = stamp;
                let count = hosts.exact.len() + hosts.below.len();
                *self.hosts.write().unwrap_or_else(PoisonError::into_inner) = hosts;
                Refresh::Reloaded { hosts: count }
            }
            // Permissions can be mended without a new stamp, so an unreadable file is tried again each time.
            Err(error @ BadBlocklist::Read { .. }) => match seen.stamp.take() {
                Some(_) => Refresh::Kept(error),
                None => Refresh::Unchanged,
            },
            Err(error) => {
                seen.stamp = stamp;
                Refresh::Kept(error)
            }
        }
    }
}

fn stamp(path: &PathBuf) -> io::Result<Stamp> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.modified()?, metadata.len()))
}

fn read(path: &PathBuf, (_, bytes): Stamp) -> Result<Hosts, BadBlocklist> {
    if bytes > BLOCKLIST_BYTES_MAX {
        return Err(BadBlocklist::TooLong { path: path.clone(), bytes });
    }
    let text = fs::read(path).map_err(|source| BadBlocklist::Read { path: path.clone(), source })?;
    parse_hosts(&text).map_err(|(line, text)| BadBlocklist::Line { path: path.clone(), line, text })
}

/// The error is the number of the first broken line, from 1, and the beginning of its text.
fn parse_hosts(text: &[u8]) -> Result<Hosts, (usize, String)> {
    let mut hosts = Hosts::default();
    for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
        let line = String::from_utf8_lossy(line);
        let entry = line.split('#').next().unwrap_or_default();
        // Some editors open a file with U+FEFF.
        let entry = entry.trim_start_matches('\u{FEFF}').trim();
        if entry.is_empty() {
            continue;
        }
        let broken = || (index + 1, entry.chars().take(LINE_SHOWN_CHARS).collect());
        match entry.strip_prefix("*.").or_else(|| entry.strip_prefix('.')) {
            // Below an address is nothing, and `.1.2` would be read as the address 1.0.0.2.
            Some(suffix) if matches!(Host::parse(suffix), Ok(Host::Ipv4(_) | Host::Ipv6(_))) => return Err(broken()),
            Some(suffix) => hosts.below.insert(domain(suffix).ok_or_else(broken)?),
            None => hosts.exact.insert(domain(entry).ok_or_else(broken)?),
        };
    }
    Ok(hosts)
}

/// As [`comparable`], but never empty, since dots alone would block what has no host; and without `*`, which the
/// Standard allows, but which is a pattern here that would match nothing.
fn domain(text: &str) -> Option<Box<str>> {
    comparable(text).filter(|host| !host.is_empty() && !host.contains('*')).map(String::into_boxed_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;

    const NONE: [&str; 0] = [];

    fn policy(own_hosts: &[&str], lookalikes: Lookalikes) -> Policy {
        let schemes = ["http", "HTTPS", "mailto", "intent", "data", "web+app"];
        Policy::new(&schemes, MAX_BYTES, None, own_hosts, lookalikes).unwrap()
    }

    fn check(policy: &Policy, written: &str, want: Result<&str, &str>) {
        let got = policy.check(written);
        let got = got.as_ref().map(|accepted| accepted.target.as_str()).map_err(Refused::code);
        assert_eq!(got, want, "{written:?}");
    }

    #[test]
    fn targets_and_their_locations() {
        let policy = policy(&[], Lookalikes::Flag);
        check(&policy, "https://example.com", Ok("https://example.com/"));
        check(&policy, " HTTP:\\\\EXAMPLE.com:80\\a b?c d#e f\n", Ok("http://example.com/a%20b?c%20d#e%20f"));
        check(&policy, "ht\ntps://exam\tple.com/", Ok("https://example.com/"));
        check(&policy, "https://bücher.example/ü?ü#ü", Ok("https://xn--bcher-kva.example/%C3%BC?%C3%BC#%C3%BC"));
        check(&policy, "http://0x7f.1/", Ok("http://127.0.0.1/"));
        check(&policy, "http://@example.com/", Ok("http://example.com/"));
        check(&policy, "mailto:a b@example.com?subject=c d", Ok("mailto:a%20b@example.com?subject=c%20d"));
        check(&policy, "data:a b ?c", Ok("data:a%20b%20?c"));
        check(&policy, "web+app:/..//a^b/", Ok("web+app:/.//a%5Eb/"));
        check(&policy, "web+app://a:/b\\c", Ok("web+app://a/b\\c"));
        check(&policy, "web+app://a:\\b", Err("not_a_url"));
        check(&policy, "web+app://@", Err("not_a_url"));
        check(&policy, "web+app://@/b", Err("not_a_url"));
        check(&policy, "http://a/\0^?^#^", Ok("http://a/%00%5E?^#^"));
        check(&policy, "", Err("not_a_url"));
        check(&policy, "example.com", Err("not_a_url"));
        check(&policy, "//example.com", Err("not_a_url"));
        check(&policy, "http://", Err("not_a_url"));
        check(&policy, "http://a b/", Err("not_a_url"));
        check(&policy, "http://a\0b/", Err("not_a_url"));
        check(&policy, "javascript:alert(1)", Err("scheme"));
        check(&policy, "ja\nvascript:alert(1)", Err("scheme"));
        check(&policy, "ftp://example.com/", Err("scheme"));
        check(&policy, "file:///etc/passwd", Err("scheme"));
        check(&policy, "http://user@example.com/", Err("credentials"));
        check(&policy, "http://:secret@example.com/", Err("credentials"));
        check(&policy, "https://example.com@evil.example/", Err("credentials"));
    }

    #[test]
    fn an_ascii_domain_need_not_be_idna() {
        let policy = policy(&[], Lookalikes::Flag);
        check(&policy, "http://a.XN--pokxncvks:81/b^", Ok("http://a.xn--pokxncvks:81/b%5E"));
        check(&policy, "\thttp:\\/\\XN--\n\\@:a?xn--", Ok("http://xn--/@:a?xn--"));
        check(&policy, "https:xn--?@", Ok("https://xn--/?@"));
        check(&policy, "http://@xn--#", Ok("http://xn--/#"));
        check(&policy, "http://u:p@xn--/", Err("credentials"));
        check(&policy, "http://xn--.ü/", Err("not_a_url"));
        check(&policy, "http://xn--/:x", Ok("http://xn--/:x"));
        check(&policy, "http://xn--:x/", Err("not_a_url"));
        check(&policy, "http://xn--|/", Err("not_a_url"));
    }

    /// Once `url` mends these, they and the words about them at `parse` can go.
    #[test]
    fn where_we_leave_the_standard() {
        let policy = policy(&[], Lookalikes::Flag);
        check(&policy, "http://%78n--/", Err("not_a_url")); // the Standard: http://xn--/
        check(&policy, "https://a/b/c:/..", Ok("https://a/b/c:/")); // the Standard: https://a/b/
        check(&policy, "https://a/b/c|/../d", Ok("https://a/b/c|/d")); // the Standard: https://a/b/d
    }

    #[test]
    fn lengths_as_written_and_as_serialised() {
        let policy = policy(&[], Lookalikes::Flag);
        let longest = format!("http://a/{}", "x".repeat(MAX_BYTES - 9));
        check(&policy, &longest, Ok(&longest));
        check(&policy, &format!("{longest}x"), Err("too_long"));
        check(&policy, &format!(" {longest}"), Err("too_long"));
        check(&policy, &format!("http://a/{}", "ü".repeat(400)), Err("too_long"));
    }

    #[test]
    fn own_hosts_in_any_spelling() {
        let policy = policy(&["Go.Example", "bücher.example:443", "127.0.0.1:8080", "[::1]"], Lookalikes::Flag);
        for own in [
            "http://go.example/",
            "https://GO.EXAMPLE.:8443/a",
            "http:go.example",
            "http://ｇｏ.example",
            "http://g%6F.example",
            "intent://G%6f.Example/#Intent;scheme=https;end",
            "https://xn--bcher-kva.example/",
            "http://BÜCHER.example.:443/",
            "http://127.0.0.1:8080/",
            "http://0x7f000001:8080/",
            "http://2130706433:8080/",
            "http://127.1.:8080/",
            "http://[::ffff:127.0.0.1]:8080/",
            "http://[0:0::1]/",
        ] {
            check(&policy, own, Err("own_host"));
        }
        for other in [
            "http://127.0.0.1/",
            "http://127.0.0.1:8081/",
            "http://xn--bcher-kva.example/",
            "http://ogo.example/",
            "http://www.go.example/",
            "http://[::2]/",
            "mailto:go.example",
        ] {
            check(&policy, other, Ok(other));
        }
    }

    #[test]
    fn policies_that_cannot_be_meant() {
        let bad = |schemes: &[&str], own: &[&str]| {
            Policy::new(schemes, MAX_BYTES, None, own, Lookalikes::Flag).map(|_| ()).unwrap_err()
        };
        assert_eq!(bad(&["http:"], &[]), BadPolicy::Scheme("http:".to_owned()));
        assert_eq!(bad(&[""], &[]), BadPolicy::Scheme(String::new()));
        assert_eq!(bad(&["1a"], &[]), BadPolicy::Scheme("1a".to_owned()));
        assert_eq!(bad(&["http", "File"], &[]), BadPolicy::File);
        for own in ["", "a b", "http://a", "a/", "a:", "a:65536", "a:b", "::1", ":80", "a@b"] {
            assert_eq!(bad(&SCHEMES, &[own]), BadPolicy::OwnHost(own.to_owned()));
        }
    }

    #[test]
    fn hosts_that_pass_for_others() {
        let (flag, refuse) = (policy(&[], Lookalikes::Flag), policy(&[], Lookalikes::Refuse));
        for (host, lookalike) in [
            ("example.com", false),
            ("paypa1.com", false),
            ("bücher.example", false),
            ("яндекс.рф", false),
            ("хор.рф", false),
            ("日本go.jp", false),
            ("東京タワー.jp", false),
            ("한국abc.kr", false),
            ("i❤.ws", false),
            ("pаypal.com", true),   // Cyrillic а among Latin
            ("а.pаypal.рф", true),  // the same, whatever the top
            ("аррӏе.com", true),    // all Cyrillic
            ("www.ехо.com.", true), // all Cyrillic, below a rooted top
            ("ρaypal.com", true),   // Greek ρ among Latin
            ("xn--0.com", true),    // no IDNA at all
        ] {
            let written = format!("https://{host}/");
            assert_eq!(flag.check(&written).map(|accepted| accepted.lookalike), Ok(lookalike), "{host}");
            let refused = refuse.check(&written).map_err(|refused| refused.code());
            assert_eq!(
                refused.map(|accepted| accepted.lookalike),
                if lookalike { Err("lookalike") } else { Ok(false) }
            );
        }
    }

    #[test]
    fn blocked_hosts() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        let text =
            "\u{FEFF}# bad hosts\r\n\r\nEvil.example. # one\r\n.bücher.example\n*.zip\n1.2.3.4\n[::1]\nxn--0.com";
        fs::write(&path, text).unwrap();
        let list = Blocklist::open(path, UnixMillis(0)).unwrap();
        let policy = Policy::new(&["http", "intent"], MAX_BYTES, Some(list), &NONE, Lookalikes::Flag).unwrap();
        for (written, blocked) in [
            ("http://evil.example/", true),
            ("http://EVIL.example.:81/", true),
            ("http://a.evil.example/", false),
            ("http://xevil.example/", false),
            ("http://bücher.example/", true),
            ("http://a.b.xn--bcher-kva.example/", true),
            ("http://xbücher.example/", false),
            ("http://example/", false),
            ("http://a.zip/", true),
            ("http://zip./", true),
            ("http://0x1020304/", true),
            ("http://[::ffff:1.2.3.4]/", true),
            ("http://2.3.4/", false),
            ("http://[::1]/", true),
            ("http://XN--0.com/", true),
            ("intent://%65vil.example/", true),
            ("intent:evil.example", false),
        ] {
            let got = policy.check(written).map(|_| ()).map_err(|refused| refused.code());
            assert_eq!(got, if blocked { Err("blocked") } else { Ok(()) }, "{written}");
        }
    }

    #[test]
    fn broken_lines_of_a_blocklist() {
        for (text, line) in [
            ("0.0.0.0 evil.example", 1),
            ("a\n\n#\nhttp://a", 4),
            ("a:80", 1),
            ("a\n.", 2),
            ("*.", 1),
            ("..", 1),
            ("*", 1),
            ("a.*", 1),
            (".1.2", 1),
            ("a\nb/c", 2),
        ] {
            let got = parse_hosts(text.as_bytes()).map(|_| ()).map_err(|(line, _)| line);
            assert_eq!(got, Err(line), "{text:?}");
        }
        assert_eq!(parse_hosts(b"a\n\xFF").map(|_| ()).map_err(|(line, _)| line), Err(2));
    }

    fn write(path: &Path, text: &str, modified_seconds: u64) {
        fs::write(path, text).unwrap();
        let file = fs::File::options().write(true).open(path).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(modified_seconds)).unwrap();
    }

    #[test]
    fn a_blocklist_follows_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        write(&path, "a", 1);
        let list = Blocklist::open(path.clone(), UnixMillis(0)).unwrap();
        let policy = Policy::new(&SCHEMES, MAX_BYTES, Some(list), &NONE, Lookalikes::Flag).unwrap();
        let blocked = |host: &str| policy.check(&format!("http://{host}/")).is_err();

        write(&path, "b", 2);
        assert!(matches!(policy.refresh(UnixMillis(999)), Refresh::Unchanged), "not due");
        assert!(blocked("a") && !blocked("b"));
        assert!(matches!(policy.refresh(UnixMillis(1000)), Refresh::Reloaded { hosts: 1 }), "another time");
        assert!(!blocked("a") && blocked("b"));
        assert!(matches!(policy.refresh(UnixMillis(2000)), Refresh::Unchanged), "the same file");

        write(&path, "b\nc", 2);
        assert!(matches!(policy.refresh(UnixMillis(3000)), Refresh::Reloaded { hosts: 2 }), "another length");
        assert!(blocked("b") && blocked("c"));

        write(&path, "d\n!!/", 3);
        let kept = policy.refresh(UnixMillis(4000));
        assert!(matches!(&kept, Refresh::Kept(BadBlocklist::Line { line: 2, .. })), "{kept:?}");
        assert!(matches!(policy.refresh(UnixMillis(5000)), Refresh::Unchanged), "told once");
        assert!(blocked("b") && !blocked("d"));

        fs::remove_file(&path).unwrap();
        assert!(matches!(policy.refresh(UnixMillis(6000)), Refresh::Kept(BadBlocklist::Read { .. })));
        assert!(matches!(policy.refresh(UnixMillis(7000)), Refresh::Unchanged), "told once");
        assert!(blocked("b"));

        write(&path, "d", 3);
        assert!(matches!(policy.refresh(UnixMillis(8000)), Refresh::Reloaded { hosts: 1 }), "back again");
        assert!(blocked("d") && !blocked("b"));

        fs::File::options().write(true).open(&path).unwrap().set_len(BLOCKLIST_BYTES_MAX + 1).unwrap();
        assert!(matches!(policy.refresh(UnixMillis(9000)), Refresh::Kept(BadBlocklist::TooLong { .. })));
        write(&path, "e", 4);
        assert!(matches!(policy.refresh(UnixMillis(10)), Refresh::Reloaded { hosts: 1 }), "the clock was set back");
        assert!(blocked("e") && !blocked("d"));
    }

    #[test]
    fn a_blocklist_is_there_at_the_start() {
        let directory = tempfile::tempdir().unwrap();
        let got = Blocklist::open(directory.path().join("none"), UnixMillis(0));
        assert!(matches!(got, Err(BadBlocklist::Read { .. })));
    }

    /// Pieces of URLs, so that chance comes upon what is near to one.
    const PIECES: &str = "(http:|https:|mailto:|intent:|data:|web\\+app:)?[/\\\\]{0,3}\
        (([a-zA-Z0-9éß%@:^ .-]{0,6}|xn--[a-z0-9-]{0,8}|\\[::1\\]|0x7f)[.@:]?){0,4}([/?#\\\\](\\PC|[\0-~]){0,8}){0,3}";

    proptest! {
        #[test]
        fn whatever_is_accepted_stays_what_it_is(written in prop_oneof![any::<String>(), PIECES]) {
            let policy = policy(&["own.example"], Lookalikes::Flag);
            if let Ok(accepted) = policy.check(&written) {
                let location = accepted.target.as_str();
                prop_assert!(location.bytes().all(|byte| byte.is_ascii_graphic()));
                prop_assert!(location.len() <= MAX_BYTES);
                prop_assert_eq!(policy.check(location), Ok(accepted.clone()));
            }
        }

        /// An origin is what the host rules are about: the corrections must not move it.
        #[test]
        fn what_crate_url_takes_keeps_its_parts(written in PIECES) {
            if let (Ok(url), Ok(accepted)) = (Url::parse(&written), policy(&[], Lookalikes::Flag).check(&written)) {
                let again = Url::parse(accepted.target.as_str());
                prop_assert!(again.is_ok());
                if let Ok(again) = again {
                    prop_assert_eq!(
                        (url.scheme(), url.host_str(), url.port(), url.query(), url.fragment()),
                        (again.scheme(), again.host_str(), again.port(), again.query(), again.fragment())
                    );
                }
            }
        }

        #[test]
        fn any_bytes_are_a_blocklist_or_an_error(text in prop::collection::vec(any::<u8>(), 0..200)) {
            let lines = text.split(|byte| *byte == b'\n').count();
            match parse_hosts(&text) {
                Ok(hosts) => prop_assert!(hosts.exact.len() + hosts.below.len() <= lines),
                Err((line, _)) => prop_assert!((1..=lines).contains(&line)),
            }
        }
    }
}
