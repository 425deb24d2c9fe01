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
            (Self::Data(_), _) => return Err(Malformed("a chunk's data are not read byte by byte")),
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
            8 if is("location") => {
                if location.replace(field.value).is_some() {
                    return Err(Malformed("it has two Location"));
                }
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
