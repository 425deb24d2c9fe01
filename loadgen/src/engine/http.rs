//! An incremental reader of HTTP/1.1 answers (RFC 9112) that allocates nothing.
//!
//! In: the bytes of one connection in any pieces. Out: for each answer a [`Step::Head`], the pieces of its body and a
//! [`Step::Done`]. Never: copies, waits, reads past the end of an answer. At its limit: a head of more than
//! [`HEAD_MAX`] bytes or [`FIELDS_MAX`] fields, a chunk's line of more than [`LINE_MAX`] bytes and trailers of more than
//! [`HEAD_MAX`] bytes are [`Malformed`]; after that the connection is of no use.
//!
//! ```text
//! let mut at = 0;
//! loop {
//!     let Progress { consumed, step } = reader.read(&bytes[at..], is_head_request)?;   // Err: protocol error, close
//!     at += consumed;
//!     match step {
//!         Step::More => break,             // keep bytes[at..] (part of a head, else empty), read more behind them
//!         Step::Head(head) => …            // status, Location; `bytes` are still borrowed, nothing is copied
//!         Step::Body(piece) => …           // keep it, search it, or forget it
//!         Step::Done => …                  // the answer is whole; bytes[at..] may hold the next (pipelining)
//!     }
//! }
//! // The connection was closed: whole if reader.ends_by_close(); between answers if reader.is_idle() and at == bytes.len().
//! ```

use std::fmt;
use std::mem::MaybeUninit;

use httparse::{Header, ParserConfig, Response, Status};

/// Bytes of a head, its empty line included; also of the trailers of one answer.
pub const HEAD_MAX: usize = 32 * 1024;
/// Fields of a head.
pub const FIELDS_MAX: usize = 64;
/// Bytes of the line that begins a chunk, extensions included.
pub const LINE_MAX: u16 = 4 * 1024;

/// Where one connection stands.
#[derive(Debug, Default)]
pub struct Reader {
    state: State,
}

/// What one call came to.
#[derive(Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// Bytes that are not to be given again.
    pub consumed: usize,
    pub step: Step<'a>,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// Nothing can be said before more bytes come. What was not consumed is part of a head: to be given again in front
    /// of what comes.
    More,
    /// A final answer's head. Interim ones (1xx) are skipped.
    Head(Head<'a>),
    /// Some of the body as the server meant it (chunks are undone); never empty.
    Body(&'a [u8]),
    /// The answer is whole; the next call is about the next.
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head<'a> {
    pub status: u16,
    /// The value of `Location`; empty where there is none.
    pub location: &'a [u8],
    /// Whether the connection can carry another request after this answer (RFC 9112, 9.3).
    pub keep_alive: bool,
    /// The whole head as it came, for who wants other fields.
    pub raw: &'a [u8],
}

/// What came is no HTTP/1.1 answer; says why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no HTTP/1.1 answer: {}", self.0)
    }
}

impl std::error::Error for Malformed {}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum State {
    /// Before or inside a head.
    #[default]
    Head,
    /// Inside a body with so many bytes to come.
    Counted(u64),
    Chunked(Chunked),
    /// Inside a body that ends with the connection.
    UntilClose,
}

/// Inside a chunked body (RFC 9112, 7.1), by what comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunked {
    /// Digits of a chunk's size, its extensions, the end of that line.
    Line {
        size: u64,
        at: Line,
        bytes: u16,
    },
    Data(u64),
    /// CR and LF behind the data.
    DataCr,
    DataLf,
    /// Trailers and the empty line; so many bytes of them were seen.
    Trailers {
        at: Trailer,
        bytes: u16,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    FirstDigit,
    Digits,
    Extension,
    Lf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trailer {
    Start,
    Inside,
    Lf,
    LastLf,
}

/// How an answer ends (RFC 9112, 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    Length(u64),
    Chunked,
    Close,
}

impl Reader {
    /// Takes the next step. `head_request`: the request was a HEAD, so no body follows whatever the head says.
    pub fn read<'a>(&mut self, bytes: &'a [u8], head_request: bool) -> Result<Progress<'a>, Malformed> {
        match self.state {
            State::Head => self.head(bytes, head_request),
            State::Counted(0) => Ok(self.done(0)),
            State::Counted(left) => {
                let piece = at_most(bytes, left);
                self.state = State::Counted(left - piece.len() as u64);
                Ok(body(piece, 0))
            }
            State::Chunked(chunked) => self.chunked(chunked, bytes),
            State::UntilClose => Ok(body(bytes, 0)),
        }
    }

    /// The answer that is being read is whole as soon as the server closes the connection.
    #[must_use]
    pub fn ends_by_close(&self) -> bool {
        self.state == State::UntilClose
    }

    /// No answer has begun, as far as its bytes were consumed.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.state == State::Head
    }

    fn done<'a>(&mut self, consumed: usize) -> Progress<'a> {
        self.state = State::Head;
        Progress { consumed, step: Step::Done }
    }

    fn head<'a>(&mut self, bytes: &'a [u8], head_request: bool) -> Result<Progress<'a>, Malformed> {
        let mut consumed = 0;
        loop {
            let Some((head, framing)) = parse(&bytes[consumed..])? else {
                return Ok(Progress { consumed, step: Step::More });
            };
            consumed += head.raw.len();
            match head.status {
                101 => return Err(Malformed("101: no change of protocol was asked for")),
                100..=199 => continue,
                _ => {}
            }
            let empty = head_request || matches!(head.status, 204 | 304);
            self.state = match framing {
                _ if empty => State::Counted(0),
                Framing::Length(length) => State::Counted(length),
                Framing::Chunked => State::Chunked(Chunked::start()),
                Framing::Close => State::UntilClose,
            };
            let keep_alive = head.keep_alive && self.state != State::UntilClose;
            return Ok(Progress { consumed, step: Step::Head(Head { keep_alive, ..head }) });
        }
    }

    fn chunked<'a>(&mut self, mut chunked: Chunked, bytes: &'a [u8]) -> Result<Progress<'a>, Malformed> {
        let mut consumed = 0;
        while consumed < bytes.len() {
            if let Chunked::Data(left) = chunked {
                let piece = at_most(&bytes[consumed..], left);
                let left = left - piece.len() as u64;
                self.state = State::Chunked(if left == 0 { Chunked::DataCr } else { Chunked::Data(left) });
                return Ok(body(piece, consumed));
            }
            let byte = bytes[consumed];
            consumed += 1;
            match chunked.next(byte)? {
                Some(next) => chunked = next,
                None => return Ok(self.done(consumed)),
            }
        }
        self.state = State::Chunked(chunked);
        Ok(Progress { consumed, step: Step::More })
    }
}

impl Chunked {
    fn start() -> Self {
        Self::Line { size: 0, at: Line::FirstDigit, bytes: 0 }
    }

    /// Behind one byte that is not data; none: the answer is whole.
    fn next(self, byte: u8) -> Result<Option<Self>, Malformed> {
        Ok(Some(match (self, byte) {
            (Self::Line { bytes: LINE_MAX, .. }, _) => return Err(Malformed("a chunk's line is longer than 4 KiB")),
            (
                Self::Line { size, at: Line::FirstDigit | Line::Digits, bytes },
                b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F',
            ) => {
                let digit = char::from(byte).to_digit(16).expect("the arm takes hexadecimal digits alone");
                let size = size.checked_mul(16).ok_or(Malformed("a chunk's size is beyond 64 bits"))?;
                Self::Line { size: size | u64::from(digit), at: Line::Digits, bytes: bytes + 1 }
            }
            (Self::Line { at: Line::FirstDigit, .. }, _) => return Err(Malformed("a chunk has no size")),
            (Self::Line { size, at: Line::Digits | Line::Extension, bytes }, b'\r') => {
                Self::Line { size, at: Line::Lf, bytes: bytes + 1 }
            }
            // White space before an extension is bad, but to be understood (RFC 9112, 7.1.1).
            (Self::Line { size, at: Line::Digits, bytes }, b';' | b' ' | b'\t') => {
                Self::Line { size, at: Line::Extension, bytes: bytes + 1 }
            }
            (Self::Line { at: Line::Digits, .. }, _) => {
                return Err(Malformed("a chunk's size is no hexadecimal number"));
            }
            (Self::Line { at: Line::Extension, .. }, b'\n') => return Err(Malformed("a chunk's line ends without CR")),
            (Self::Line { size, at: Line::Extension, bytes }, _) => {
                Self::Line { size, at: Line::Extension, bytes: bytes + 1 }
            }
            (Self::Line { size: 0, at: Line::Lf, .. }, b'\n') => Self::Trailers { at: Trailer::Start, bytes: 0 },
            (Self::Line { size, at: Line::Lf, .. }, b'\n') => Self::Data(size),
            (Self::Line { at: Line::Lf, .. }, _) => return Err(Malformed("a chunk's line has a CR without LF")),
            (Self::Data(_), _) => unreachable!("data are taken as a piece, not byte by byte"),
            (Self::DataCr, b'\r') => Self::DataLf,
            (Self::DataLf, b'\n') => Self::start(),
            (Self::DataCr | Self::DataLf, _) => return Err(Malformed("a chunk is longer than its size")),
            (Self::Trailers { at: Trailer::LastLf, .. }, b'\n') => return Ok(None),
            (Self::Trailers { at, bytes }, _) => {
                if usize::from(bytes) == HEAD_MAX {
                    return Err(Malformed("trailers are longer than 32 KiB"));
                }
                let at = match (at, byte) {
                    (Trailer::Start, b'\r') => Trailer::LastLf,
                    (Trailer::Inside, b'\r') => Trailer::Lf,
                    (Trailer::Lf, b'\n') => Trailer::Start,
                    (Trailer::Lf | Trailer::LastLf, _) | (_, b'\n') => {
                        return Err(Malformed("a trailer's line does not end with CR LF"));
                    }
                    (Trailer::Start | Trailer::Inside, _) => Trailer::Inside,
                };
                Self::Trailers { at, bytes: bytes + 1 }
            }
        }))
    }
}

/// At the front of `bytes`, a piece of a body behind `before` bytes that were none.
fn body(piece: &[u8], before: usize) -> Progress<'_> {
    let step = if piece.is_empty() { Step::More } else { Step::Body(piece) };
    Progress { consumed: before + piece.len(), step }
}

fn at_most(bytes: &[u8], left: u64) -> &[u8] {
    &bytes[..bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX))]
}

/// The head at the front of `bytes`, if it is whole.
fn parse(bytes: &[u8]) -> Result<Option<(Head<'_>, Framing)>, Malformed> {
    let mut fields = [const { MaybeUninit::<Header<'_>>::uninit() }; FIELDS_MAX];
    let mut response = Response::new(&mut []);
    let parsed = ParserConfig::default().parse_response_with_uninit_headers(&mut response, bytes, &mut fields);
    let length = match parsed {
        Ok(Status::Complete(length)) if length <= HEAD_MAX => length,
        Ok(Status::Partial) if bytes.len() < HEAD_MAX => return Ok(None),
        Ok(_) => return Err(Malformed("its head is longer than 32 KiB")),
        Err(httparse::Error::TooManyHeaders) => return Err(Malformed("its head has more than 64 fields")),
        Err(httparse::Error::Status | httparse::Error::Version) => return Err(Malformed("it has no status line")),
        Err(_) => return Err(Malformed("its head cannot be read")),
    };
    let (Some(status), Some(version)) = (response.code, response.version) else {
        return Err(Malformed("it has no status line"));
    };

    let mut location = None;
    let mut content_length = None;
    let mut transfer_encoding = None;
    let (mut close, mut keep_alive) = (false, false);
    for field in &*response.headers {
        let is = |name: &str| field.name.eq_ignore_ascii_case(name);
        // By length first: most fields are none of these.
        match field.name.len() {
            8 if is("location") && location.replace(field.value).is_some() => {
                return Err(Malformed("it has two Location"));
            }
            10 if is("connection") => {
                for option in field.value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
                    close |= option.eq_ignore_ascii_case(b"close");
                    keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
                }
            }
            14 if is("content-length") => {
                let value = length_of(field.value)?;
                if content_length.replace(value).is_some_and(|before| before != value) {
                    return Err(Malformed("it has two Content-Length that differ"));
                }
            }
            // Of several fields the last coding decides (RFC 9112, 6.3).
            17 if is("transfer-encoding") => {
                transfer_encoding = field.value.rsplit(|byte| *byte == b',').next().map(<[u8]>::trim_ascii);
            }
            _ => {}
        }
    }
    let framing = match (transfer_encoding, content_length) {
        (Some(_), Some(_)) => return Err(Malformed("it has both Transfer-Encoding and Content-Length")),
        (Some(_), None) if version == 0 => return Err(Malformed("it has a Transfer-Encoding in HTTP/1.0")),
        (Some(coding), None) if coding.eq_ignore_ascii_case(b"chunked") => Framing::Chunked,
        (None, Some(length)) => Framing::Length(length),
        (_, None) => Framing::Close,
    };
    let head = Head {
        status,
        location: location.unwrap_or_default(),
        keep_alive: !close && (version == 1 || keep_alive),
        raw: &bytes[..length],
    };
    Ok(Some((head, framing)))
}

/// Also a list of the same number, which some proxies make (RFC 9110, 8.6).
fn length_of(value: &[u8]) -> Result<u64, Malformed> {
    let wrong = Malformed("its Content-Length is no number");
    let mut length = None;
    for part in value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
        let digits = std::str::from_utf8(part).ok().filter(|part| part.bytes().all(|byte| byte.is_ascii_digit()));
        let number = digits.and_then(|digits| digits.parse().ok()).ok_or(wrong)?;
        if length.replace(number).is_some_and(|before| before != number) {
            return Err(Malformed("it has two Content-Length that differ"));
        }
    }
    length.ok_or(wrong)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// One answer as a caller sees it.
    #[derive(Debug, Clone, PartialEq, Eq)]
    struct Seen {
        status: u16,
        location: Vec<u8>,
        keep_alive: bool,
        body: Vec<u8>,
        whole: bool,
    }

    /// Reads `pieces` as a connection would bring them; the last may be inside an answer.
    fn read(pieces: &[&[u8]], head_request: bool) -> (Vec<Seen>, Result<(), Malformed>) {
        let mut reader = Reader::default();
        let mut seen: Vec<Seen> = Vec::new();
        let mut buffer: Vec<u8> = Vec::new();
        for piece in pieces {
            buffer.extend_from_slice(piece);
            let mut at = 0;
            loop {
                let progress = match reader.read(&buffer[at..], head_request) {
                    Ok(progress) => progress,
                    Err(malformed) => return (seen, Err(malformed)),
                };
                at += progress.consumed;
                match progress.step {
                    Step::More => break,
                    Step::Head(Head { status, location, keep_alive, .. }) => {
                        seen.push(Seen {
                            status,
                            location: location.into(),
                            keep_alive,
                            body: Vec::new(),
                            whole: false,
                        });
                    }
                    Step::Body(body) => {
                        assert!(!body.is_empty());
                        seen.last_mut().unwrap().body.extend_from_slice(body);
                    }
                    Step::Done => seen.last_mut().unwrap().whole = true,
                }
            }
            assert!(at == buffer.len() || reader.is_idle(), "only a head's bytes are left");
            buffer.drain(..at);
        }
        if reader.ends_by_close() {
            seen.last_mut().unwrap().whole = true;
        }
        (seen, Ok(()))
    }

    /// Cut at `cuts`, wherever those fall in the stream.
    fn split<'a>(stream: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
        let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
        at.extend([0, stream.len()]);
        at.sort_unstable();
        at.windows(2).map(|pair| &stream[pair[0]..pair[1]]).collect()
    }

    /// An answer and what must be seen of it: made together, so that the truth comes from no parser.
    fn answer(head_request: bool) -> impl Strategy<Value = (Vec<u8>, Seen)> {
        let status = prop::sample::select(vec![200_u16, 201, 204, 301, 302, 304, 307, 404, 429, 500, 503]);
        let location = prop_oneof![Just(String::new()), "https?://[a-z0-9./?=&%-]{1,40}"];
        let chunks = prop::collection::vec(prop::collection::vec(any::<u8>(), 1..60), 0..4);
        let extension = prop_oneof![Just(""), Just(";a"), Just("; a=\"b;c\""), Just(" ;x=1")];
        let trailers = prop::collection::vec("X-[A-Z]{1,5}: [a-z ]{0,9}\r\n", 0..3);
        let connection = prop::sample::select(vec!["", "close", "keep-alive", "Keep-Alive, CLOSE", "x"]);
        let fields = prop::collection::vec("X-[A-Za-z]{1,12}: ?[!-~]{0,20}\r\n", 0..5);
        (
            (status, location, chunks, extension, trailers, connection, fields),
            (any::<bool>(), any::<bool>(), any::<bool>(), 0..3_usize),
        )
            .prop_map(move |((status, location, chunks, extension, trailers, connection, fields), bits)| {
                let (is_chunked, is_old, is_interim_first, case) = bits;
                let is_chunked = is_chunked && !is_old;
                let name = |name: &str| match case {
                    0 => name.to_owned(),
                    1 => name.to_ascii_lowercase(),
                    _ => name.to_ascii_uppercase(),
                };
                let has_body = !head_request && status != 204 && status != 304;
                let body: Vec<u8> = if has_body { chunks.concat() } else { Vec::new() };
                let mut bytes = Vec::new();
                if is_interim_first {
                    bytes.extend(b"HTTP/1.1 103 Early Hints\r\nLocation: no\r\nContent-Length: 3\r\n\r\n");
                }
                bytes.extend(format!("HTTP/1.{} {status} Reason\r\n", u8::from(!is_old)).bytes());
                bytes.extend(fields.concat().bytes());
                if !location.is_empty() {
                    bytes.extend(format!("{}:  {location} \r\n", name("Location")).bytes());
                }
                if !connection.is_empty() {
                    bytes.extend(format!("{}: {connection}\r\n", name("Connection")).bytes());
                }
                if is_chunked {
                    bytes.extend(format!("{}: gzip, Chunked\r\n\r\n", name("Transfer-Encoding")).bytes());
                    if has_body {
                        for chunk in &chunks {
                            bytes.extend(format!("0{:x}{extension}\r\n", chunk.len()).bytes());
                            bytes.extend(chunk);
                            bytes.extend(b"\r\n");
                        }
                        bytes.extend(format!("00{extension}\r\n{}\r\n", trailers.concat()).bytes());
                    }
                } else {
                    let length: usize = chunks.iter().map(Vec::len).sum();
                    bytes.extend(format!("{}: {length}\r\n\r\n", name("Content-Length")).bytes());
                    bytes.extend(&body);
                }
                let keep_alive = match connection {
                    "close" | "Keep-Alive, CLOSE" => false,
                    "keep-alive" => true,
                    _ => !is_old,
                };
                (bytes, Seen { status, location: location.into_bytes(), keep_alive, body, whole: true })
            })
    }

    fn answers() -> impl Strategy<Value = (bool, Vec<(Vec<u8>, Seen)>)> {
        any::<bool>()
            .prop_flat_map(|head_request| (Just(head_request), prop::collection::vec(answer(head_request), 1..6)))
    }

    fn cuts() -> impl Strategy<Value = Vec<prop::sample::Index>> {
        prop::collection::vec(any::<prop::sample::Index>(), 0..12)
    }

    /// Neighbouring pieces of a body are one, whatever the split; so are runs of the same error.
    fn same_for_any_split(stream: &[u8], cuts: &[prop::sample::Index], head_request: bool) {
        let bytewise: Vec<&[u8]> = stream.chunks(1).collect();
        let whole = read(&[stream], head_request);
        assert_eq!(read(&split(stream, cuts), head_request), whole);
        assert_eq!(read(&bytewise, head_request), whole);
    }

    proptest! {
        #[test]
        fn valid_answers_are_seen_as_they_were_meant((head_request, answers) in answers(), cuts in cuts()) {
            let stream: Vec<u8> = answers.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
            let truth: Vec<Seen> = answers.into_iter().map(|(_, seen)| seen).collect();
            prop_assert_eq!(read(&split(&stream, &cuts), head_request), (truth, Ok(())));
            same_for_any_split(&stream, &cuts, head_request);
        }

        #[test]
        fn damaged_answers_are_judged_alike_for_any_split(
            (head_request, answers) in answers(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            cuts in cuts(),
        ) {
            let mut stream: Vec<u8> = answers.into_iter().flat_map(|(bytes, _)| bytes).collect();
            for (at, byte) in damage {
                let at = at.index(stream.len());
                stream[at] = byte;
            }
            same_for_any_split(&stream, &cuts, head_request);
        }

        #[test]
        fn garbage_is_refused_or_waited_for(stream in prop::collection::vec(any::<u8>(), 0..300), cuts in cuts()) {
            same_for_any_split(&stream, &cuts, false);
        }
    }

    fn refused(stream: &str, why: &str) {
        let (_, result) = read(&[stream.as_bytes()], false);
        assert_eq!(result, Err(Malformed(why.to_owned().leak())), "{:?}", &stream[..stream.len().min(90)]);
    }

    #[test]
    fn what_is_malformed_says_why() {
        const HEAD: &str = "HTTP/1.1 200 OK\r\n";
        const CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        let long = "a".repeat(HEAD_MAX);
        let cases = [
            ("SSH-2.0-OpenSSH_9.6\r\n".to_owned(), "it has no status line"),
            ("HTTP/2 200\r\n\r\n".to_owned(), "it has no status line"),
            ("HTTP/1.1 2xx OK\r\n\r\n".to_owned(), "it has no status line"),
            ("HTTP/1.1 101 Switching Protocols\r\n\r\n".to_owned(), "101: no change of protocol was asked for"),
            (format!("{HEAD}no colon\r\n\r\n"), "its head cannot be read"),
            (format!("{HEAD}X: {long}"), "its head is longer than 32 KiB"),
            (format!("{HEAD}X: {long}\r\n\r\n"), "its head is longer than 32 KiB"),
            (format!("{HEAD}{}\r\n", "X: 1\r\n".repeat(65)), "its head has more than 64 fields"),
            (format!("{HEAD}Location: /a\r\nLocation: /a\r\n\r\n"), "it has two Location"),
            (format!("{HEAD}Content-Length: 1\r\nContent-Length: 2\r\n\r\n"), "it has two Content-Length that differ"),
            (format!("{HEAD}Content-Length: 1, 2\r\n\r\n"), "it has two Content-Length that differ"),
            (format!("{HEAD}Content-Length: +1\r\n\r\n"), "its Content-Length is no number"),
            (format!("{HEAD}Content-Length:\r\n\r\n"), "its Content-Length is no number"),
            (format!("{HEAD}Content-Length: 18446744073709551616\r\n\r\n"), "its Content-Length is no number"),
            (
                format!("{HEAD}Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"),
                "it has both Transfer-Encoding and Content-Length",
            ),
            (
                "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(),
                "it has a Transfer-Encoding in HTTP/1.0",
            ),
            (format!("{CHUNKED}\r\n"), "a chunk has no size"),
            (format!("{CHUNKED}3g\r\n"), "a chunk's size is no hexadecimal number"),
            (format!("{CHUNKED}11112222333344445\r\n"), "a chunk's size is beyond 64 bits"),
            (format!("{CHUNKED}1;x\n"), "a chunk's line ends without CR"),
            (format!("{CHUNKED}1\ra"), "a chunk's line has a CR without LF"),
            (format!("{CHUNKED}1;{long}"), "a chunk's line is longer than 4 KiB"),
            (format!("{CHUNKED}1\r\nab"), "a chunk is longer than its size"),
            (format!("{CHUNKED}0\r\nX: 1\n"), "a trailer's line does not end with CR LF"),
            (format!("{CHUNKED}0\r\nX: {long}"), "trailers are longer than 32 KiB"),
        ];
        for (stream, why) in cases {
            refused(&stream, why);
        }
    }

    #[test]
    fn what_is_unusual_is_understood() {
        let check = |stream: &str, expected: &[(u16, bool, &str, bool)]| {
            let (seen, result) = read(&[stream.as_bytes()], false);
            assert_eq!(result, Ok(()), "{stream:?}");
            let seen: Vec<_> = seen
                .iter()
                .map(|seen| (seen.status, seen.keep_alive, std::str::from_utf8(&seen.body).unwrap(), seen.whole))
                .collect();
            assert_eq!(seen, expected, "{stream:?}");
        };
        check("HTTP/1.1 200\r\n\r\nuntil the end", &[(200, false, "until the end", true)]);
        check("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nx", &[(200, false, "x", true)]);
        check("HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nab", &[(200, true, "ab", true)]);
        check("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab", &[(200, true, "ab", false)]);
        check("HTTP/1.1 204 No\r\n\r\nHTTP/1.1 304 No\r\n\r\n", &[(204, true, "", true), (304, true, "", true)]);
        check("HTTP/1.1 100 Continue\r\n\r\n", &[]);
        check("\r\nHTTP/1.1 204 No\r\n\r\n", &[(204, true, "", true)]);
    }

    #[test]
    fn a_connection_needs_little() {
        assert!(size_of::<Reader>() <= 64);
    }
}
