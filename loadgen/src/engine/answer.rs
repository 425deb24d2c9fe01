//! Whether an answer is the right one.

use std::borrow::Cow;
use std::fmt;

use serde::Deserializer as _;
use serde::de::{IgnoredAny, MapAccess, Visitor};

use crate::measure::Outcome;
use crate::scenario::Expect;

/// What is wrong first: the status, then where it leads, then the body. `location_right` is whether `Location` is what
/// it must be.
#[must_use]
pub(crate) fn judge(expect: &Expect, status: u16, location_right: bool, body: &[u8]) -> Outcome {
    let expected = if expect.status.is_empty() { status < 400 } else { expect.status.contains(&status) };
    if !expected {
        return Outcome::WrongStatus;
    }
    if expect.known_location && is_redirect(status) && !location_right {
        return Outcome::WrongLocation;
    }
    match &expect.body {
        Some(part) if !contains(body, part.as_bytes()) => Outcome::WrongBody,
        _ => Outcome::Ok,
    }
}

#[must_use]
pub(crate) fn is_redirect(status: u16) -> bool {
    matches!(status, 301 | 302 | 303 | 307 | 308)
}

fn contains(body: &[u8], part: &[u8]) -> bool {
    part.is_empty() || body.windows(part.len()).any(|window| window == part)
}

/// The string member `name` of a JSON object.
#[must_use]
pub(crate) fn member<'a>(body: &'a [u8], name: &str) -> Option<Cow<'a, str>> {
    serde_json::Deserializer::from_slice(body).deserialize_map(Member(name)).ok().flatten()
}

struct Member<'n>(&'n str);

impl<'a> Visitor<'a> for Member<'_> {
    type Value = Option<Cow<'a, str>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object with the string {}", self.0)
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<Text<'a>>()? {
            if key.0 == self.0 {
                found = Some(map.next_value::<Text<'a>>()?.0);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

/// A string that is borrowed where it holds no escape (`Cow` by itself never borrows: serde-rs/serde#1852).
#[derive(serde::Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

#[cfg(test)]
mod tests {
    use super::{judge, member};
    use crate::measure::Outcome;
    use crate::scenario::Expect;

    #[test]
    fn what_is_wrong_first_is_said() {
        let known = Expect { status: vec![301, 404], known_location: true, body: None };
        let any = Expect::default();
        let body = Expect { status: vec![200], known_location: false, body: Some("pass".to_owned()) };
        for (expect, status, location_right, answer, want) in [
            (&known, 301, true, "", Outcome::Ok),
            (&known, 301, false, "", Outcome::WrongLocation),
            (&known, 302, false, "", Outcome::WrongStatus),
            (&known, 404, false, "", Outcome::Ok),
            (&any, 307, false, "", Outcome::Ok),
            (&any, 399, false, "", Outcome::Ok),
            (&any, 400, true, "", Outcome::WrongStatus),
            (&body, 200, true, r#"{"status":"pass"}"#, Outcome::Ok),
            (&body, 200, true, "fail", Outcome::WrongBody),
            (&body, 200, true, "", Outcome::WrongBody),
        ] {
            assert_eq!(judge(expect, status, location_right, answer.as_bytes()), want, "{expect:?} {status} {answer}");
        }
    }

    #[test]
    fn a_member_is_found_wherever_it_stands() {
        for (body, want) in [
            (r#"{"short_code":"abc1234"}"#, Some("abc1234")),
            (r#"{"a":[{"short_code":"no"}],"short_code":"yes","z":null}"#, Some("yes")),
            (r#"{"short_code":"a\u0062c"}"#, Some("abc")),
            (r#"{"short_code":7}"#, None),
            (r#"{"other":"x"}"#, None),
            (r#"["short_code"]"#, None),
            (r#"{"short_code":"cut"#, None),
            ("", None),
        ] {
            assert_eq!(member(body.as_bytes(), "short_code").as_deref(), want, "{body}");
        }
    }
}
