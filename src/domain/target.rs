//! A target: where a link leads, as it goes into `Location`.

/// An absolute URL in serialised form, all of its bytes in 0x21–0x7E: nothing in it can end a header.
/// Only [`Target::new`] makes one, so whoever has one may write it to the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target(Box<str>);

impl Target {
    /// None if a byte lies outside of 0x21–0x7E, or there is none.
    #[must_use]
    pub fn new(href: &str) -> Option<Self> {
        (!href.is_empty() && href.bytes().all(|byte| byte.is_ascii_graphic())).then(|| Self(href.into()))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    #[must_use]
    pub fn into_string(self) -> String {
        self.0.into()
    }
}
