//! Links that were created through the stub: the last [`REMEMBERED`] of them.
//!
//! In: bodies of `POST /shorten`. Out: their codes, and targets by code. Never: a second link of a code that is remembered,
//! whether it was generated or asked for. At its limit: the oldest is forgotten, and its code then has a derived target as
//! any other.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

/// Created links that are kept.
pub(super) const REMEMBERED: usize = 65_536;

/// As many digits as a generated code of seven base62 digits.
const CODE_DIGITS: usize = 7;

const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

pub(super) struct Links {
    targets: HashMap<Vec<u8>, Vec<u8>>,
    /// Codes in a ring, each once, the oldest at `created % REMEMBERED` when it is full.
    order: Vec<Vec<u8>>,
    created: u64,
    /// Of the next code to generate.
    number: u64,
}

/// What became of a `POST`.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Creation {
    /// The answer's JSON.
    Created(String),
    /// Another link has the code that was asked for.
    Taken,
    Malformed,
}

#[derive(Deserialize)]
struct Posted {
    original_url: String,
    custom_code: Option<String>,
}

#[derive(Serialize)]
struct Answer<'a> {
    short_code: &'a str,
    original_url: &'a str,
}

impl Links {
    pub(super) fn new() -> Self {
        Self { targets: HashMap::new(), order: Vec::new(), created: 0, number: 0 }
    }

    pub(super) fn create(&mut self, body: &[u8]) -> Creation {
        let Ok(posted) = serde_json::from_slice::<Posted>(body) else { return Creation::Malformed };
        let code = match posted.custom_code {
            Some(code) if self.targets.contains_key(code.as_bytes()) => return Creation::Taken,
            Some(code) => code,
            None => self.generate(),
        };
        let answer = serde_json::to_string(&Answer { short_code: &code, original_url: &posted.original_url });
        let Ok(answer) = answer else { return Creation::Malformed };
        let code = code.into_bytes();
        let place = (self.created % REMEMBERED as u64) as usize;
        self.created += 1;
        if let Some(oldest) = self.order.get_mut(place) {
            self.targets.remove(oldest);
            oldest.clone_from(&code);
        } else {
            self.order.push(code.clone());
        }
        self.targets.insert(code, posted.original_url.into_bytes());
        Creation::Created(answer)
    }

    /// The next that nobody asked for.
    fn generate(&mut self) -> String {
        loop {
            let code = digits(self.number);
            self.number += 1;
            if !self.targets.contains_key(code.as_bytes()) {
                return code;
            }
        }
    }

    /// The target that was posted for this code.
    pub(super) fn target(&self, code: &[u8]) -> Option<&[u8]> {
        if self.targets.is_empty() { None } else { self.targets.get(code).map(Vec::as_slice) }
    }
}

fn digits(mut number: u64) -> String {
    let mut code = [b'0'; CODE_DIGITS];
    for digit in code.iter_mut().rev() {
        *digit = BASE62[(number % 62) as usize];
        number /= 62;
    }
    code.iter().map(|&digit| char::from(digit)).collect()
}

#[cfg(test)]
mod tests {
    use super::{Creation, Links, REMEMBERED, digits};

    #[test]
    fn codes_are_a_counter_in_base62() {
        for (number, code) in [(0, "0000000"), (61, "000000z"), (62, "0000010"), (62u64.pow(7) - 1, "zzzzzzz")] {
            assert_eq!(digits(number), code);
        }
    }

    #[test]
    fn the_last_links_are_remembered() {
        let mut links = Links::new();
        let post = |number: usize| format!("{{\"original_url\":\"https://a.example/{number}\"}}");
        assert_eq!(
            links.create(post(0).as_bytes()),
            Creation::Created("{\"short_code\":\"0000000\",\"original_url\":\"https://a.example/0\"}".to_owned())
        );
        assert_eq!(links.target(b"0000000"), Some(b"https://a.example/0".as_slice()));
        for number in 1..=REMEMBERED {
            assert!(matches!(links.create(post(number).as_bytes()), Creation::Created(_)));
        }
        assert_eq!(links.target(b"0000000"), None);
        assert_eq!(links.target(b"0000001"), Some(b"https://a.example/1".as_slice()));
        assert_eq!(links.targets.len(), REMEMBERED);
        assert_eq!(links.create(b"{}"), Creation::Malformed);
    }

    /// Also when its first link is the oldest of the ring, and when it is one that would be generated.
    #[test]
    fn a_code_belongs_to_one_link() {
        let mut links = Links::new();
        let mut post = |code: Option<&str>, number: usize| {
            let custom = code.map_or(String::new(), |code| format!(",\"custom_code\":\"{code}\""));
            let body = format!("{{\"original_url\":\"https://a.example/{number}\"{custom}}}");
            let created = links.create(body.as_bytes());
            assert_eq!(links.targets.len(), links.order.len());
            created
        };
        let is = |created: Creation, code: &str| {
            assert!(
                matches!(&created, Creation::Created(answer) if answer.contains(&format!("\"{code}\""))),
                "{created:?}"
            );
        };
        is(post(Some("spring"), 0), "spring");
        assert_eq!(post(Some("spring"), 1), Creation::Taken);
        is(post(Some("0000001"), 2), "0000001");
        is(post(None, 3), "0000000");
        is(post(None, 4), "0000002");
        for number in 5..=REMEMBERED {
            is(post(None, number), &digits(number as u64 - 2));
        }
        assert_eq!(post(Some("spring"), 6), Creation::Taken);
        is(post(None, 7), &digits(REMEMBERED as u64 - 1));
        is(post(Some("spring"), 8), "spring");
        assert_eq!(links.target(b"spring"), Some(b"https://a.example/8".as_slice()));
        assert_eq!(links.targets.len(), REMEMBERED);
    }
}
