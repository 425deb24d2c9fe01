//! API keys: what they look like, what of them is kept, and what they allow.
//!
//! In: request headers, a generator of random bits, records of the store. Out: keys, digests, scopes, yes or no.
//! Never: stores or logs a secret. A secret is in memory while it is made or checked, and is shown once.
//! At the limit: everything is bounded by the head of a request, which HTTP has bounded before.
//!
//! A key is `wp_<id>_<secret>`: eight characters that the record is found by, and 32 that prove it. The secret has 190
//! bits of chance, so that a plain SHA-256 of it is enough: there is nothing to guess, and no salt would add to it.

use std::fmt;

use http::HeaderMap;
use http::header::{AUTHORIZATION, GetAll, HeaderName, HeaderValue};
use rand::CryptoRng;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::codes::Alphabet;
use crate::codes::random::characters;
use crate::domain::time::UnixMillis;

pub const ID_CHARS: usize = 8;
const SECRET_CHARS: usize = 32;
/// The least bytes of a key that a person chose.
pub const ADMIN_KEY_BYTES_MIN: usize = 20;

const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// A key as its owner has it.
pub struct ApiKey {
    pub id: String,
    pub secret: String,
}

/// What a key may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    LinksRead,
    LinksWrite,
    StatsRead,
    /// Everything.
    Admin,
}

/// A set of scopes; a bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scopes(u8);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadScopes {
    #[error("unknown scope {0:?}: the scopes are links:read, links:write, stats:read and admin")]
    Unknown(String),
    #[error("scopes are missing: give one or more of links:read, links:write, stats:read and admin")]
    Missing,
}

/// The key that the configuration names; it has no record, and the scope `admin`.
pub struct AdminKey {
    digest: [u8; 32],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadAdminKey {
    #[error(
        "WAYPOST_ADMIN_KEY has {0} bytes, and {ADMIN_KEY_BYTES_MIN} is the least: make one with `openssl rand -hex 20`"
    )]
    TooShort(usize),
    #[error("WAYPOST_ADMIN_KEY has a control character, which no header can carry: remove it")]
    Control,
}

/// The key in a request's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presented<'a> {
    None,
    Key(&'a str),
    /// Not readable as one key.
    Malformed,
}

/// A key as the store has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRecord {
    pub id: String,
    pub name: Option<String>,
    /// Of the secret; see [`digest`].
    pub digest: [u8; 32],
    pub scopes: Scopes,
    pub created_at: UnixMillis,
    pub expires_at: Option<UnixMillis>,
    pub revoked_at: Option<UnixMillis>,
    /// None = the instance's.
    pub per_minute: Option<u32>,
    pub last_used_at: Option<UnixMillis>,
}

impl ApiKey {
    pub fn generate(rng: &mut impl CryptoRng) -> Self {
        Self {
            id: characters(Alphabet::Base62, ID_CHARS, rng),
            secret: characters(Alphabet::Base62, SECRET_CHARS, rng),
        }
    }

    /// None for anything but a key in full, without a space around it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (id, secret) = text.strip_prefix("wp_")?.split_once('_')?;
        let is_base62 = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric());
        (id.len() == ID_CHARS && secret.len() == SECRET_CHARS && is_base62(id) && is_base62(secret))
            .then(|| Self { id: id.to_owned(), secret: secret.to_owned() })
    }

    /// The whole key, for the one time that its owner sees it. There is no `Display`, lest a log line finds it.
    #[must_use]
    pub fn reveal(&self) -> String {
        format!("wp_{}_{}", self.id, self.secret)
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKey(wp_{}_…)", self.id)
    }
}

/// What is kept of a secret: its SHA-256 (FIPS 180-4).
#[must_use]
pub fn digest(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

/// Whether `secret` is the one that `kept` was made of, in a time that does not tell how much of it is right.
#[must_use]
pub fn verify(kept: &[u8; 32], secret: &str) -> bool {
    digest(secret).ct_eq(kept).into()
}

impl Scope {
    pub const ALL: [Self; 4] = [Self::LinksRead, Self::LinksWrite, Self::StatsRead, Self::Admin];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::LinksRead => "links:read",
            Self::LinksWrite => "links:write",
            Self::StatsRead => "stats:read",
            Self::Admin => "admin",
        }
    }

    fn bit(self) -> u8 {
        1 << self as u8
    }
}

impl Scopes {
    #[must_use]
    pub fn of(scopes: &[Scope]) -> Self {
        Self(scopes.iter().fold(0, |bits, scope| bits | scope.bit()))
    }

    /// Names with commas or white space between them.
    pub fn parse(list: &str) -> Result<Self, BadScopes> {
        let mut scopes = Self(0);
        for name in list.split(|c: char| c == ',' || c.is_whitespace()).filter(|name| !name.is_empty()) {
            let known = Scope::ALL.into_iter().find(|scope| scope.name() == name);
            scopes.0 |= known.ok_or_else(|| BadScopes::Unknown(name.to_owned()))?.bit();
        }
        if scopes.0 == 0 { Err(BadScopes::Missing) } else { Ok(scopes) }
    }

    /// `admin` allows everything. Writing does not include reading: a key in a public form may make links, and
    /// must not list those of others.
    #[must_use]
    pub fn allows(self, scope: Scope) -> bool {
        self.0 & (scope.bit() | Scope::Admin.bit()) != 0
    }

    /// The scopes that were given, in the order of [`Scope::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Scope> {
        Scope::ALL.into_iter().filter(move |scope| self.0 & scope.bit() != 0)
    }
}

/// The names with a space between them, as in RFC 6749, section 3.3.
impl fmt::Display for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.iter().map(Scope::name).collect::<Vec<_>>().join(" "))
    }
}

impl AdminKey {
    /// White space around it is not part of it: no header keeps it, and files end in a line feed.
    pub fn new(text: &str) -> Result<Self, BadAdminKey> {
        let text = text.trim();
        if text.len() < ADMIN_KEY_BYTES_MIN {
            return Err(BadAdminKey::TooShort(text.len()));
        }
        if text.contains(char::is_control) {
            return Err(BadAdminKey::Control);
        }
        Ok(Self { digest: digest(text) })
    }

    /// In a time that tells nothing of the key.
    #[must_use]
    pub fn matches(&self, presented: &str) -> bool {
        verify(&self.digest, presented)
    }
}

/// A key that a person chose may be guessed from its digest, so that is not shown either.
impl fmt::Debug for AdminKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AdminKey(…)")
    }
}

/// The key in `Authorization: Bearer KEY` (RFC 6750, section 2.1) or `X-Api-Key: KEY`; in both, if they agree.
///
/// `Authorization` of another scheme counts as absent: it may be meant for a proxy in front.
#[must_use]
pub fn presented(headers: &HeaderMap) -> Presented<'_> {
    let bearer = match only(headers.get_all(AUTHORIZATION)) {
        Presented::Key(value) => match value.split_once(' ') {
            Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => of_value(key),
            Some(_) => Presented::None,
            None => Presented::Malformed,
        },
        other => other,
    };
    match (bearer, only(headers.get_all(X_API_KEY))) {
        (Presented::None, other) | (other, Presented::None) => other,
        (Presented::Key(a), Presented::Key(b)) if a == b => Presented::Key(a),
        _ => Presented::Malformed,
    }
}

fn only(values: GetAll<'_, HeaderValue>) -> Presented<'_> {
    let mut values = values.into_iter();
    match (values.next(), values.next()) {
        (None, _) => Presented::None,
        // Not `to_str`, which refuses what is not ASCII: an admin key may be any text.
        (Some(value), None) => str::from_utf8(value.as_bytes()).map_or(Presented::Malformed, of_value),
        (Some(_), Some(_)) => Presented::Malformed,
    }
}

fn of_value(value: &str) -> Presented<'_> {
    match value.trim() {
        "" => Presented::Malformed,
        key => Presented::Key(key),
    }
}

impl KeyRecord {
    /// A revoked key stays so, whatever the clock says.
    #[must_use]
    pub fn valid(&self, now: UnixMillis) -> bool {
        self.revoked_at.is_none() && self.expires_at.is_none_or(|end| now < end)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        AdminKey, ApiKey, BadAdminKey, BadScopes, KeyRecord, Presented, Scope, Scopes, digest, presented, verify,
    };
    use crate::domain::time::UnixMillis;
    use http::{HeaderMap, HeaderName, HeaderValue};
    use proptest::prelude::{any, prop, prop_assert_eq, proptest};
    use proptest::sample::subsequence;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    const KEY: &str = "wp_abcdEF12_0123456789abcdefghijABCDEFGHIJxy";

    #[test]
    fn keys_come_back_and_differ() {
        let mut rng = StdRng::seed_from_u64(1);
        let (a, b) = (ApiKey::generate(&mut rng), ApiKey::generate(&mut rng));
        assert!(a.id != b.id && a.secret != b.secret);
        let text = a.reveal();
        let again = ApiKey::parse(&text).unwrap();
        assert_eq!((&again.id, &again.secret), (&a.id, &a.secret));
        assert_eq!(text.len(), 44);
    }

    #[test]
    fn only_a_key_in_full_is_a_key() {
        let check = |text: &str, want| assert_eq!(ApiKey::parse(text).is_some(), want, "{text:?}");
        check(KEY, true);
        check("", false);
        check("wp_", false);
        check("wp__", false);
        check(&KEY[1..], false);
        check(&KEY[..KEY.len() - 1], false);
        check(&format!("{KEY}z"), false);
        check(&format!(" {KEY}"), false);
        check(&format!("{KEY}\n"), false);
        check(&KEY.replace("wp_", "WP_"), false);
        check(&KEY.replace("EF", "E"), false);
        check(&KEY.replace("EF", "E-"), false);
        check(&KEY.replace("xy", "x_"), false);
        check(&KEY.replace("xy", "é"), false);
    }

    #[test]
    fn secrets_are_not_shown() {
        let key = ApiKey::parse(KEY).unwrap();
        assert_eq!(format!("{key:?}"), "ApiKey(wp_abcdEF12_…)");
        let admin = AdminKey::new("correct horse battery staple").unwrap();
        assert_eq!(format!("{admin:?}"), "AdminKey(…)");
    }

    #[test]
    fn digests_prove_secrets() {
        // SHA-256 of "abc" from FIPS 180-4's examples, its first and last bytes.
        let abc = digest("abc");
        assert_eq!((abc[..4].to_vec(), abc[31]), (vec![0xba, 0x78, 0x16, 0xbf], 0xad));
        assert!(verify(&abc, "abc"));
        assert!(!verify(&abc, "abd"));
        assert!(!verify(&abc, ""));
    }

    #[test]
    fn scopes_as_lists() {
        let check = |list: &str, want: Result<&[Scope], BadScopes>| {
            assert_eq!(Scopes::parse(list), want.map(Scopes::of), "{list:?}");
        };
        check("admin", Ok(&[Scope::Admin]));
        check("links:read,stats:read", Ok(&[Scope::LinksRead, Scope::StatsRead]));
        check(" stats:read, links:read\tlinks:read ", Ok(&[Scope::LinksRead, Scope::StatsRead]));
        check("", Err(BadScopes::Missing));
        check(" , ", Err(BadScopes::Missing));
        check("links:read,link:write", Err(BadScopes::Unknown("link:write".to_owned())));
        check("Admin", Err(BadScopes::Unknown("Admin".to_owned())));
        assert_eq!(
            Scopes::parse("root").unwrap_err().to_string(),
            "unknown scope \"root\": the scopes are links:read, links:write, stats:read and admin"
        );
    }

    #[test]
    fn what_scopes_allow() {
        let check = |given: &[Scope], want: &[Scope]| {
            let allowed = Scope::ALL.into_iter().filter(|scope| Scopes::of(given).allows(*scope));
            assert_eq!(allowed.collect::<Vec<_>>(), want, "{given:?}");
        };
        check(&[], &[]);
        check(&[Scope::LinksRead], &[Scope::LinksRead]);
        check(&[Scope::LinksWrite], &[Scope::LinksWrite]);
        check(&[Scope::StatsRead, Scope::LinksWrite], &[Scope::LinksWrite, Scope::StatsRead]);
        check(&[Scope::Admin], &Scope::ALL);
    }

    #[test]
    fn admin_keys() {
        let check = |text: &str, want: Option<BadAdminKey>| assert_eq!(AdminKey::new(text).err(), want, "{text:?}");
        check("0123456789abcdefghi", Some(BadAdminKey::TooShort(19)));
        check("0123456789abcdefghij", None);
        check("  0123456789abcdefghi\n", Some(BadAdminKey::TooShort(19)));
        check("ééééé ééééé", None);
        check("0123456789\nabcdefghij", Some(BadAdminKey::Control));
        let key = AdminKey::new("0123456789 abcdefghi é\n").unwrap();
        assert!(key.matches("0123456789 abcdefghi é"));
        assert!(!key.matches("0123456789 abcdefghi"));
        assert!(!key.matches(""));
    }

    fn headers(pairs: &[(&str, &[u8])]) -> HeaderMap {
        let header = |(name, value): &(&str, &[u8])| {
            (HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_bytes(value).unwrap())
        };
        let mut headers = HeaderMap::new();
        for (name, value) in pairs.iter().map(header) {
            headers.append(name, value);
        }
        headers
    }

    #[test]
    fn keys_in_headers() {
        let check = |pairs: &[(&str, &[u8])], want| assert_eq!(presented(&headers(pairs)), want, "{pairs:?}");
        check(&[], Presented::None);
        check(&[("authorization", b"Bearer abc")], Presented::Key("abc"));
        check(&[("authorization", b"bEARER   abc ")], Presented::Key("abc"));
        check(&[("authorization", b"Bearer a b")], Presented::Key("a b"));
        check(&[("x-api-key", b"abc")], Presented::Key("abc"));
        check(&[("x-api-key", "clé".as_bytes())], Presented::Key("clé"));
        check(&[("x-api-key", b"abc"), ("authorization", b"Bearer abc")], Presented::Key("abc"));
        check(&[("x-api-key", b"abc"), ("authorization", b"Basic dTpw")], Presented::Key("abc"));
        check(&[("authorization", b"Basic dTpw")], Presented::None);
        check(&[("x-api-key", b"abc"), ("authorization", b"Bearer abd")], Presented::Malformed);
        check(&[("x-api-key", b"abc"), ("x-api-key", b"abc")], Presented::Malformed);
        check(&[("authorization", b"Bearer a"), ("authorization", b"Bearer b")], Presented::Malformed);
        check(&[("authorization", b"Bearer ")], Presented::Malformed);
        check(&[("authorization", b"Bearer")], Presented::Malformed);
        check(&[("authorization", b"abc")], Presented::Malformed);
        check(&[("authorization", b"")], Presented::Malformed);
        check(&[("x-api-key", b"")], Presented::Malformed);
        check(&[("x-api-key", b"\xff")], Presented::Malformed);
        check(&[("x-api-key", b"abc"), ("authorization", b"Bearer")], Presented::Malformed);
    }

    #[test]
    fn validity_of_records() {
        let check = |expires_at: Option<i64>, revoked_at: Option<i64>, want| {
            let record = KeyRecord {
                id: "abcdEF12".to_owned(),
                name: None,
                digest: digest("secret"),
                scopes: Scopes::of(&[Scope::Admin]),
                created_at: UnixMillis(0),
                expires_at: expires_at.map(UnixMillis),
                revoked_at: revoked_at.map(UnixMillis),
                per_minute: None,
                last_used_at: None,
            };
            assert_eq!(record.valid(UnixMillis(100)), want, "{record:?}");
        };
        check(None, None, true);
        check(Some(101), None, true);
        check(Some(100), None, false);
        check(None, Some(99), false);
        check(None, Some(101), false);
    }

    proptest! {
        #[test]
        fn scopes_come_back(scopes in subsequence(&Scope::ALL[..], 1..=4)) {
            let scopes = Scopes::of(&scopes);
            prop_assert_eq!(Scopes::parse(&scopes.to_string()), Ok(scopes));
        }

        #[test]
        fn any_text_is_a_key_that_comes_back_or_none(text in "(wp_)?[a-zA-Z0-9_é ]{0,9}_?[a-zA-Z0-9_]{30,33}") {
            if let Some(key) = ApiKey::parse(&text) {
                prop_assert_eq!(key.reveal(), text);
            }
        }

        #[test]
        fn any_header_is_read(bearer in any::<bool>(), value in prop::collection::vec(any::<u8>(), 0..40)) {
            let name = if bearer { "authorization" } else { "x-api-key" };
            if let Ok(value) = HeaderValue::from_bytes(&value) {
                let mut headers = HeaderMap::new();
                headers.insert(name, value.clone());
                if let Presented::Key(key) = presented(&headers) {
                    prop_assert_eq!(key.trim(), key);
                    prop_assert_eq!(value.as_bytes().windows(key.len()).any(|part| part == key.as_bytes()), true);
                }
            }
        }
    }
}
