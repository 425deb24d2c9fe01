//! Links that were created through the stub: the last [`REMEMBERED`] of them.
//!
//! In: bodies of `POST /shorten`. Out: their codes, and targets by code. Never: a second link of the same generated
//! code. At its limit: the oldest is forgotten, and its code then has a derived target as any other.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

/// Created links that are kept.
pub(super) const REMEMBERED: usize = 65_536;

/// As many digits as a generated code of seven base62 digits.
const CODE_DIGITS: usize = 7;

const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

pub(super) struct Links {
    targets: HashMap<Vec<u8>, Vec<u8>>,
    /// Codes in a ring, the oldest at `created % REMEMBERED`.
    order: Vec<Vec<u8>>,
    created: u64,
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
        Self { targets: HashMap::new(), order: Vec::new(), created: 0 }
    }

    /// The answer's JSON, or none where the request's is not right.
    pub(super) fn create(&mut self, body: &[u8]) -> Option<String> {
        let posted: Posted = serde_json::from_slice(body).ok()?;
        let code = posted.custom_code.unwrap_or_else(|| digits(self.created));
        let answer = serde_json::to_string(&Answer { short_code: &code, original_url: &posted.original_url }).ok()?;
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
        Some(answer)
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
    use super::{Links, REMEMBERED, digits};

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
            links.create(post(0).as_bytes()).as_deref(),
            Some("{\"short_code\":\"0000000\",\"original_url\":\"https://a.example/0\"}")
        );
        assert_eq!(links.target(b"0000000"), Some(b"https://a.example/0".as_slice()));
        for number in 1..=REMEMBERED {
            links.create(post(number).as_bytes()).expect("a right body");
        }
        assert_eq!(links.target(b"0000000"), None);
        assert_eq!(links.target(b"0000001"), Some(b"https://a.example/1".as_slice()));
        assert_eq!(links.targets.len(), REMEMBERED);
        let own = links.create(b"{\"original_url\":\"https://b.example/\",\"custom_code\":\"spring\"}");
        assert!(own.is_some_and(|answer| answer.contains("\"spring\"")));
        assert_eq!(links.target(b"spring"), Some(b"https://b.example/".as_slice()));
        assert_eq!(links.create(b"{}"), None);
    }
}
