//! A class's request, cut once into what is the same each time and what is not.
//!
//! In: a class of the scenario; then, for each request, [`Values`]. Out: the bytes of the request: request line, `Host`,
//! the scenario's headers, the ledger's, `Connection: close` where the class wants it, `Content-Length`, body. Never:
//! allocates while it renders (but to grow the buffer that it is given), sends what could be read as another header or
//! request. At its limit: names that it does not know stay as they are, since `{` may be meant.

use std::fmt;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};

use crate::scenario::{ConnectionKind, Traffic};

/// One class's request.
pub struct Template {
    /// The key too. All that is the same each time; [`Part::Fixed`] points into it.
    fixed: Vec<u8>,
    parts: Vec<Part>,
    /// Bytes of the body that are the same each time, and the slots of the rest: the sum is `Content-Length`.
    body_fixed: u64,
    body_slots: Vec<Slot>,
}

/// What goes into the slots of one request.
#[derive(Debug, Clone, Copy)]
pub struct Values<'a> {
    /// `{code}`
    pub code: &'a [u8],
    /// `{n}`
    pub number: u64,
    /// `{target}`
    pub target: &'a [u8],
    /// `{intended}`, nanoseconds.
    pub intended_ns: u64,
    /// The ledger's id.
    pub id: &'a [u8],
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Fixed(Range<usize>),
    Slot(Slot),
    ContentLength,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Code,
    Number,
    Target,
    Intended,
    Id,
}

/// The names that a scenario knows; `{key}` is the same each time.
const SLOTS: [(&str, Slot); 4] =
    [("{code}", Slot::Code), ("{n}", Slot::Number), ("{target}", Slot::Target), ("{intended}", Slot::Intended)];
const KEY: &str = "{key}";

/// Without the bytes: the key is among them.
impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Template").field("parts", &self.parts).finish_non_exhaustive()
    }
}

impl Template {
    /// Fails on what is no header or no path, by the class's name and the header's; never shows `key`.
    pub fn compile(traffic: &Traffic, authority: &str, key: Option<&str>, ledger_header: Option<&str>) -> Result<Self> {
        let mut template = Self { fixed: Vec::new(), parts: Vec::new(), body_fixed: 0, body_slots: Vec::new() };
        template.head(traffic, authority, key, ledger_header).with_context(|| format!("traffic {}", traffic.name))?;
        let is_bodiless = matches!(traffic.method.as_str(), "GET" | "HEAD" | "DELETE" | "OPTIONS");
        if traffic.body.is_some() || !is_bodiless {
            template.text("Content-Length: ");
            template.parts.push(Part::ContentLength);
            template.text("\r\n");
        }
        template.text("\r\n");
        for piece in pieces(traffic.body.as_deref().unwrap_or_default()) {
            match piece {
                Piece::Text(text) => template.body_fixed += text.len() as u64,
                Piece::Slot(slot) => template.body_slots.push(slot),
            }
            template.piece(piece);
        }
        Ok(template)
    }

    fn head(&mut self, traffic: &Traffic, authority: &str, key: Option<&str>, ledger: Option<&str>) -> Result<()> {
        let Traffic { method, path, headers, .. } = traffic;
        ensure!(is_token(method), "the method {method:?} is none: letters such as GET");
        let is_path = path.starts_with('/') && path.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#');
        ensure!(is_path, "the path {path:?} begins with / and has no blanks, fragment or line ends: %-encode them");
        self.text(&format!("{method} "));
        pieces(path).for_each(|piece| self.piece(piece));
        self.text(" HTTP/1.1\r\n");

        // A Host of the scenario's own stands for another domain of the same server.
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("Host")) {
            ensure!(is_value(authority), "the target's authority {authority:?} holds a line end");
            self.text(&format!("Host: {authority}\r\n"));
        }
        for (name, value) in headers {
            ensure!(is_token(name), "header {name:?}: not a header's name: letters, digits and - only");
            ensure!(
                is_value(value),
                "header {name}: its value {value:?} holds a line end or another control character"
            );
            for ours in ["Content-Length", "Transfer-Encoding", "Connection"] {
                ensure!(
                    !name.eq_ignore_ascii_case(ours),
                    "header {name}: loadgen sends it itself, as body and connection say"
                );
            }
            ensure!(
                ledger.is_none_or(|ledger| !name.eq_ignore_ascii_case(ledger)),
                "header {name}: it carries the ledger's id: leave it out, or give another --ledger-header"
            );
            self.text(&format!("{name}: "));
            for (number, value) in value.split(KEY).enumerate() {
                if number > 0 {
                    let Some(key) = key else { bail!("header {name}: there is no key: give --key-file") };
                    ensure!(
                        is_value(key),
                        "header {name}: the key holds a line end: a key file's first line is the key"
                    );
                    self.text(key);
                }
                pieces(value).for_each(|piece| self.piece(piece));
            }
            self.text("\r\n");
        }
        if let Some(ledger) = ledger {
            ensure!(is_token(ledger), "--ledger-header {ledger:?}: not a header's name: letters, digits and - only");
            self.text(&format!("{ledger}: "));
            self.piece(Piece::Slot(Slot::Id));
            self.text("\r\n");
        }
        if traffic.connection.kind == ConnectionKind::PerRequest {
            self.text("Connection: close\r\n");
        }
        Ok(())
    }

    /// Neighbouring texts are one part.
    fn text(&mut self, text: &str) {
        let begin = self.fixed.len();
        self.fixed.extend_from_slice(text.as_bytes());
        match self.parts.last_mut() {
            Some(Part::Fixed(range)) => range.end = self.fixed.len(),
            _ => self.parts.push(Part::Fixed(begin..self.fixed.len())),
        }
    }

    fn piece(&mut self, piece: Piece<'_>) {
        match piece {
            Piece::Text(text) => self.text(text),
            Piece::Slot(slot) => self.parts.push(Part::Slot(slot)),
        }
    }

    /// Whether [`Values::target`] is looked at.
    #[must_use]
    pub fn wants_target(&self) -> bool {
        self.parts.contains(&Part::Slot(Slot::Target))
    }

    /// Appends the request.
    pub fn render(&self, values: &Values<'_>, out: &mut Vec<u8>) {
        for part in &self.parts {
            match part {
                Part::Fixed(range) => out.extend_from_slice(&self.fixed[range.clone()]),
                Part::Slot(slot) => slot.render(values, out),
                Part::ContentLength => {
                    let slots = self.body_slots.iter().map(|slot| slot.length(values)).sum::<u64>();
                    decimal(self.body_fixed + slots, out);
                }
            }
        }
    }
}

impl Slot {
    fn render(self, values: &Values<'_>, out: &mut Vec<u8>) {
        match self {
            Self::Code => out.extend_from_slice(values.code),
            Self::Number => decimal(values.number, out),
            Self::Target => out.extend_from_slice(values.target),
            Self::Intended => decimal(values.intended_ns, out),
            Self::Id => out.extend_from_slice(values.id),
        }
    }

    fn length(self, values: &Values<'_>) -> u64 {
        match self {
            Self::Code => values.code.len() as u64,
            Self::Number => digits(values.number),
            Self::Target => values.target.len() as u64,
            Self::Intended => digits(values.intended_ns),
            Self::Id => values.id.len() as u64,
        }
    }
}

fn digits(number: u64) -> u64 {
    u64::from(number.checked_ilog10().unwrap_or(0)) + 1
}

fn decimal(mut number: u64, out: &mut Vec<u8>) {
    let mut text = [b'0'; 20];
    let mut begin = text.len();
    loop {
        begin -= 1;
        text[begin] += (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return out.extend_from_slice(&text[begin..]);
        }
    }
}

#[derive(Clone, Copy)]
enum Piece<'a> {
    Text(&'a str),
    Slot(Slot),
}

/// Cuts at the names of slots.
fn pieces(text: &str) -> impl Iterator<Item = Piece<'_>> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let next =
            SLOTS.iter().filter_map(|(name, slot)| Some((rest.find(name)?, *name, *slot))).min_by_key(|next| next.0);
        match next {
            _ if rest.is_empty() => None,
            None => Some(Piece::Text(std::mem::take(&mut rest))),
            Some((0, name, slot)) => {
                rest = &rest[name.len()..];
                Some(Piece::Slot(slot))
            }
            Some((at, ..)) => {
                let (text, behind) = rest.split_at(at);
                rest = behind;
                Some(Piece::Text(text))
            }
        }
    })
}

/// RFC 9110, 5.6.2.
fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

/// RFC 9110, 5.5.
fn is_value(text: &str) -> bool {
    text.bytes().all(|byte| byte == b'\t' || !byte.is_ascii_control())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::scenario::{Connection, Expect, Pick, WhenFull};

    fn traffic(
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&str>,
        kind: ConnectionKind,
    ) -> Traffic {
        Traffic {
            name: "clicks".to_owned(),
            method: method.to_owned(),
            path: path.to_owned(),
            headers: headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
            body: body.map(str::to_owned),
            pick: Pick::None,
            expect: Expect::default(),
            yields: None,
            connection: Connection { kind, max: 1, when_full: WhenFull::Queue, pipeline: 1 },
            closed: None,
            bind: None,
            optional: false,
        }
    }

    const VALUES: Values<'_> =
        Values { code: b"abc", number: 90, target: b"https://t/", intended_ns: 1_000, id: b"00ff" };

    fn rendered(traffic: &Traffic, ledger: Option<&str>, values: &Values<'_>) -> String {
        let template = Template::compile(traffic, "sho.rt:80", Some("wpk_1"), ledger).unwrap();
        let mut out = Vec::new();
        template.render(values, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn requests_are_rendered_as_they_should_go_out() {
        use ConnectionKind::{PerRequest, Pool};
        let check = |traffic: &Traffic, ledger: Option<&str>, expected: &str| {
            assert_eq!(rendered(traffic, ledger, &VALUES), expected);
        };
        check(&traffic("GET", "/{code}", &[], None, Pool), None, "GET /abc HTTP/1.1\r\nHost: sho.rt:80\r\n\r\n");
        check(
            &traffic("HEAD", "/{x}{code}{n}?{", &[("A", "{intended}{key}b")], None, PerRequest),
            Some("X-Request-Id"),
            "HEAD /{x}abc90?{ HTTP/1.1\r\nHost: sho.rt:80\r\nA: 1000wpk_1b\r\nX-Request-Id: 00ff\r\nConnection: close\r\n\r\n",
        );
        check(
            &traffic("POST", "/s", &[("host", "other")], Some("{\"u\":\"{target}\",\"n\":{n}}"), Pool),
            None,
            "POST /s HTTP/1.1\r\nhost: other\r\nContent-Length: 25\r\n\r\n{\"u\":\"https://t/\",\"n\":90}",
        );
        check(
            &traffic("POST", "/s", &[], None, Pool),
            None,
            "POST /s HTTP/1.1\r\nHost: sho.rt:80\r\nContent-Length: 0\r\n\r\n",
        );
    }

    #[test]
    fn what_would_be_another_request_is_refused_by_name() {
        let check = |traffic: &Traffic, key: Option<&str>, expected: &str| {
            let error = Template::compile(traffic, "sho.rt", key, Some("X-Request-Id")).unwrap_err();
            assert_eq!(format!("{error:#}"), format!("traffic clicks: {expected}"));
        };
        let with = |name: &str, value: &str| traffic("GET", "/", &[(name, value)], None, ConnectionKind::Pool);
        let path = |path: &str| traffic("GET", path, &[], None, ConnectionKind::Pool);
        let no_path =
            |path| format!("the path {path:?} begins with / and has no blanks, fragment or line ends: %-encode them");
        for wrong in ["/a\r\nX: y", "/a b", "a", "", "/#x", "/ä"] {
            check(&path(wrong), None, &no_path(wrong));
        }
        check(
            &traffic("GET /", "/", &[], None, ConnectionKind::Pool),
            None,
            "the method \"GET /\" is none: letters such as GET",
        );
        check(
            &with("A", "x\r\nB: y"),
            None,
            "header A: its value \"x\\r\\nB: y\" holds a line end or another control character",
        );
        check(&with("A: b", "x"), None, "header \"A: b\": not a header's name: letters, digits and - only");
        check(&with("A", "{key}"), None, "header A: there is no key: give --key-file");
        check(
            &with("A", "{key}"),
            Some("secret\n"),
            "header A: the key holds a line end: a key file's first line is the key",
        );
        check(
            &with("connection", "close"),
            None,
            "header connection: loadgen sends it itself, as body and connection say",
        );
        check(
            &with("x-request-id", "1"),
            None,
            "header x-request-id: it carries the ledger's id: leave it out, or give another --ledger-header",
        );
    }

    proptest! {
        /// The oracle replaces names in the whole text.
        #[test]
        fn bodies_have_the_length_that_is_said(
            parts in prop::collection::vec(prop::sample::select(vec!["{code}", "{n}", "{target}", "{intended}", "{", "}", "ä", "x"]), 0..9),
            (code, target) in ("[a-z]{0,9}", "[a-z]{0,9}"),
            (number, intended_ns) in (any::<u64>(), 0..2_000_u64),
        ) {
            let body = parts.concat();
            let values = Values { code: code.as_bytes(), number, target: target.as_bytes(), intended_ns, id: b"" };
            let request = rendered(&traffic("POST", "/", &[], Some(&body), ConnectionKind::Pool), None, &values);
            let body = body
                .replace("{code}", &code)
                .replace("{n}", &number.to_string())
                .replace("{target}", &target)
                .replace("{intended}", &intended_ns.to_string());
            let head = format!("POST / HTTP/1.1\r\nHost: sho.rt:80\r\nContent-Length: {}\r\n\r\n", body.len());
            prop_assert_eq!(request, head + &body);
        }
    }
}
