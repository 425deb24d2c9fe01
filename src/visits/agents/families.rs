//! Families: which browser, on which system, on what kind of device.
//!
//! In: an agent's text. Out: names, without versions. Pure.
//!
//! Browsers and systems are told apart by the regular expressions of uap-core, as data (`data/README.md`). Its list of
//! devices names 600 makers and models and takes most of the memory; four kinds need a few words only.

use ua_parser::{Regexes, os, user_agent};

const REGEXES: &str = include_str!("data/families.json");

pub(super) struct Families {
    browsers: user_agent::Extractor<'static>,
    systems: os::Extractor<'static>,
}

impl Families {
    pub(super) fn new() -> Self {
        let regexes: Regexes<'static> = serde_json::from_str(REGEXES).expect("our own data, which a test reads");
        let browsers = user_agent::Builder::new().push_all(regexes.user_agent_parsers);
        let systems = os::Builder::new().push_all(regexes.os_parsers);
        Self {
            browsers: browsers.and_then(|it| Ok(it.build()?)).expect("our own data, which a test compiles"),
            systems: systems.ok().and_then(|it| it.build().ok()).expect("our own data, which a test compiles"),
        }
    }

    /// Empty = unknown.
    pub(super) fn browser(&self, text: &str) -> String {
        self.browsers.extract(text).map(|found| found.family.into_owned()).unwrap_or_default()
    }

    /// Empty = unknown.
    pub(super) fn os(&self, text: &str) -> String {
        self.systems.extract(text).map(|found| found.os.into_owned()).unwrap_or_default()
    }
}

/// `Mobi` is what every browser of a telephone says, and an Android without it is a tablet (MDN, "Browser detection using
/// the user agent string"). An iPad that asks for desktop pages says that it is a Macintosh.
pub(super) fn device(text: &str) -> &'static str {
    let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
    if has(&["TV", "Tizen", "Web0S", "PlayStation", "Xbox", "Nintendo", "CrKey", "Roku", "AFT", "Watch"]) {
        "other"
    } else if has(&["iPad", "Tablet", "tablet", "Kindle", "Silk/", "PlayBook"]) {
        "tablet"
    } else if has(&["Mobi", "mobi", "iPhone", "iPod", "Opera Mini", "Windows Phone", "BlackBerry", "MIDP"]) {
        "mobile"
    } else if has(&["Android"]) {
        "tablet"
    } else if has(&["Windows", "Macintosh", "X11", "CrOS", "Linux"]) {
        "desktop"
    } else {
        "other"
    }
}
