//! A key: the domain's number and the code. It is made once from Host and path, and is the only way
//! into a cache, Redis, the store or a counter.
//!
//! A code is 1–128 bytes of the unreserved characters of RFC 3986, section 2.3. Codes of at most ten
//! characters out of `A–Z a–z 0–9 - _` pack into a `u64`: all that are generated, and most of the others.

use std::fmt;
use std::hash::{Hash, Hasher};

/// The most bytes that a code has.
pub const CODE_BYTES_MAX: usize = 128;
/// The most characters that pack into a `u64` beside their number.
const PACKED_CHARS_MAX: usize = 10;

/// Paths that the server answers itself; no code is one of them, in any spelling of letters.
pub const RESERVED: [&str; 26] = [
    "-",
    "_",
    "admin",
    "api",
    "app",
    "assets",
    "dashboard",
    "docs",
    "favicon.ico",
    "health",
    "healthz",
    "livez",
    "login",
    "metrics",
    "openapi.json",
    "qr",
    "readyz",
    "redoc",
    "rest",
    "robots.txt",
    "shorten",
    "static",
    "stats",
    "v4",
    "yourls-api.php",
    ".well-known",
];

/// A domain's number in the store; 0 is the default domain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomainId(pub u16);

/// What a link is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub domain: DomainId,
    pub code: Code,
}

/// A code, by value and without a heap. A code that packs is always packed, so that equal codes are equal values.
#[derive(Clone, Copy)]
pub struct Code(Repr);

#[derive(Clone, Copy)]
enum Repr {
    /// The number of characters in the top four bits, then six bits a character.
    Packed(u64),
    /// The bytes past `len` are zero.
    Long { len: u8, bytes: [u8; CODE_BYTES_MAX] },
}

/// Whether codes that differ in the case of letters are the same code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    Sensitive,
    /// Letters are folded to lower case before the key is made.
    Insensitive,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadCode {
    #[error("a code has at least one character")]
    Empty,
    #[error("a code has at most {CODE_BYTES_MAX} characters")]
    TooLong,
    #[error("a code is made of A-Z a-z 0-9 - . _ ~")]
    Character,
}

const CHARACTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const NOT_PACKED: u8 = 0xFF;
/// The six bits of each byte that packs.
const SIX_BITS: [u8; 256] = {
    let mut table = [NOT_PACKED; 256];
    let mut index = 0;
    while index < 64 {
        table[CHARACTERS[index] as usize] = index as u8;
        index += 1;
    }
    table
};

impl Code {
    /// A code as it is stored, written by hand or imported: each byte stands for itself.
    pub fn parse(text: &[u8], case: Case) -> Result<Self, BadCode> {
        if case == Case::Sensitive
            && let Some(packed) = pack(text)
        {
            return Ok(Self(Repr::Packed(packed)));
        }
        let mut folded = Folded::new(case);
        text.iter().try_for_each(|byte| folded.push(*byte))?;
        folded.finish()
    }

    /// A code as a path has it: percent-encoded unreserved characters are the same code
    /// (RFC 3986, section 6.2.2.2), every other escape is none.
    pub fn from_path(segment: &[u8], case: Case) -> Result<Self, BadCode> {
        if case == Case::Sensitive
            && let Some(packed) = pack(segment)
        {
            return Ok(Self(Repr::Packed(packed)));
        }
        let mut folded = Folded::new(case);
        let mut rest = segment;
        while let Some((byte, after)) = rest.split_first() {
            rest = after;
            let byte = match (*byte, after) {
                (b'%', [high, low, after @ ..]) => {
                    rest = after;
                    let digit = |byte: &u8| char::from(*byte).to_digit(16).ok_or(BadCode::Character);
                    (digit(high)? * 16 + digit(low)?) as u8
                }
                (byte, _) => byte,
            };
            folded.push(byte)?;
        }
        folded.finish()
    }

    /// The number that a packed code is, for what stores it in eight bytes.
    #[must_use]
    pub fn packed(&self) -> Option<u64> {
        match self.0 {
            Repr::Packed(packed) => Some(packed),
            Repr::Long { .. } => None,
        }
    }

    /// The code of a number that [`Code::packed`] gave.
    #[must_use]
    pub fn from_packed(packed: u64) -> Self {
        Self(Repr::Packed(packed))
    }

    /// The code's bytes, all of them ASCII, written into `buffer`.
    pub fn bytes<'a>(&'a self, buffer: &'a mut [u8; PACKED_CHARS_MAX]) -> &'a [u8] {
        match &self.0 {
            Repr::Long { len, bytes } => &bytes[..usize::from(*len)],
            Repr::Packed(packed) => {
                let len = (packed >> 60) as usize;
                for (index, slot) in buffer[..len].iter_mut().enumerate() {
                    *slot = CHARACTERS[(packed >> (6 * (len - 1 - index)) & 63) as usize];
                }
                &buffer[..len]
            }
        }
    }

    #[must_use]
    pub fn is_reserved(&self) -> bool {
        let mut buffer = [0; PACKED_CHARS_MAX];
        let bytes = self.bytes(&mut buffer);
        RESERVED.iter().any(|word| word.as_bytes().eq_ignore_ascii_case(bytes))
    }
}

fn pack(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > PACKED_CHARS_MAX {
        return None;
    }
    let mut packed = text.len() as u64;
    // The length moves to the top as the characters come in below it; fewer than ten leave a gap that stays zero.
    let mut bits = 0u64;
    for byte in text {
        let six = SIX_BITS[usize::from(*byte)];
        if six == NOT_PACKED {
            return None;
        }
        bits = bits << 6 | u64::from(six);
    }
    packed <<= 60;
    Some(packed | bits)
}

/// A code in the making.
struct Folded {
    case: Case,
    len: usize,
    bytes: [u8; CODE_BYTES_MAX],
}

impl Folded {
    fn new(case: Case) -> Self {
        Self { case, len: 0, bytes: [0; CODE_BYTES_MAX] }
    }

    fn push(&mut self, byte: u8) -> Result<(), BadCode> {
        if !(byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')) {
            return Err(BadCode::Character);
        }
        let slot = self.bytes.get_mut(self.len).ok_or(BadCode::TooLong)?;
        *slot = if self.case == Case::Insensitive { byte.to_ascii_lowercase() } else { byte };
        self.len += 1;
        Ok(())
    }

    fn finish(self) -> Result<Code, BadCode> {
        if self.len == 0 {
            return Err(BadCode::Empty);
        }
        Ok(Code(match pack(&self.bytes[..self.len]) {
            Some(packed) => Repr::Packed(packed),
            None => Repr::Long { len: self.len as u8, bytes: self.bytes },
        }))
    }
}

impl PartialEq for Code {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Repr::Packed(a), Repr::Packed(b)) => a == b,
            (Repr::Long { len: a, bytes: x }, Repr::Long { len: b, bytes: y }) => {
                a == b && x[..usize::from(*a)] == y[..usize::from(*b)]
            }
            _ => false,
        }
    }
}

impl Eq for Code {}

impl Hash for Code {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match &self.0 {
            Repr::Packed(packed) => state.write_u64(*packed),
            Repr::Long { len, bytes } => state.write(&bytes[..usize::from(*len)]),
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut buffer = [0; PACKED_CHARS_MAX];
        self.bytes(&mut buffer).iter().try_for_each(|byte| fmt::Write::write_char(f, char::from(*byte)))
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Code({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const UNRESERVED: &str = "[A-Za-z0-9._~-]{1,128}";

    fn check(path: &str, want: Result<&str, BadCode>) {
        let got = Code::from_path(path.as_bytes(), Case::Sensitive).map(|code| code.to_string());
        assert_eq!(got, want.map(str::to_owned), "{path:?}");
    }

    #[test]
    fn paths_and_their_codes() {
        check("abc", Ok("abc"));
        check("%61bc", Ok("abc"));
        check("a%2Ec", Ok("a.c"));
        check("a%2ec", Ok("a.c"));
        check("ABCDEFGHIJ", Ok("ABCDEFGHIJ"));
        check("ABCDEFGHIJK", Ok("ABCDEFGHIJK"));
        check("A", Ok("A"));
        check("AA", Ok("AA"));
        check("", Err(BadCode::Empty));
        check("a/b", Err(BadCode::Character));
        check("a%2Fb", Err(BadCode::Character));
        check("a%", Err(BadCode::Character));
        check("a%4", Err(BadCode::Character));
        check("a%zz", Err(BadCode::Character));
        check("a%00", Err(BadCode::Character));
        check("a b", Err(BadCode::Character));
        check("é", Err(BadCode::Character));
        check(&"x".repeat(128), Ok(&"x".repeat(128)));
        check(&"x".repeat(129), Err(BadCode::TooLong));
    }

    #[test]
    fn reserved_in_any_case() {
        for word in RESERVED {
            for word in [word.to_owned(), word.to_uppercase()] {
                assert!(Code::parse(word.as_bytes(), Case::Sensitive).is_ok_and(|code| code.is_reserved()), "{word}");
            }
        }
        assert!(!Code::parse(b"healthy", Case::Sensitive).unwrap().is_reserved());
    }

    proptest! {
        #[test]
        fn a_code_comes_back_as_it_was(text in UNRESERVED) {
            let code = Code::parse(text.as_bytes(), Case::Sensitive).unwrap();
            prop_assert_eq!(code.to_string(), &*text);
            prop_assert_eq!(code.packed().is_some(), text.len() <= 10 && !text.contains(['.', '~']));
        }

        #[test]
        fn different_codes_are_different(a in UNRESERVED, b in UNRESERVED) {
            let code = |text: &str| Code::parse(text.as_bytes(), Case::Sensitive).unwrap();
            prop_assert_eq!(code(&a) == code(&b), a == b);
        }

        #[test]
        fn escapes_of_unreserved_characters_change_nothing(text in UNRESERVED, escaped in any::<u128>()) {
            let path: String = text.bytes().enumerate().map(|(index, byte)| {
                if escaped >> index & 1 == 1 { format!("%{byte:02x}") } else { char::from(byte).to_string() }
            }).collect();
            prop_assert_eq!(Code::from_path(path.as_bytes(), Case::Sensitive), Code::parse(text.as_bytes(), Case::Sensitive));
        }

        #[test]
        fn folding_makes_cases_equal(text in UNRESERVED) {
            let fold = |text: &str| Code::from_path(text.as_bytes(), Case::Insensitive).unwrap();
            prop_assert_eq!(fold(&text), fold(&text.to_uppercase()));
            prop_assert_eq!(fold(&text).to_string(), text.to_lowercase());
        }

        #[test]
        fn any_bytes_are_a_code_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(code) = Code::from_path(&bytes, Case::Sensitive) {
                prop_assert_eq!(Code::parse(code.to_string().as_bytes(), Case::Sensitive), Ok(code));
            }
        }
    }
}
