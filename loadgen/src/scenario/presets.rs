//! Scenarios that come with the tool, each a commented file of the format that `SCENARIOS.md` describes.

/// Name and text.
pub const ALL: [(&str, &str); 4] = [
    ("mail-blast", include_str!("../../scenarios/mail-blast.toml")),
    ("tv-spot", include_str!("../../scenarios/tv-spot.toml")),
    ("cold-start", include_str!("../../scenarios/cold-start.toml")),
    ("store-outage", include_str!("../../scenarios/store-outage.toml")),
];

/// The text of the preset `name`.
#[must_use]
pub fn find(name: &str) -> Option<&'static str> {
    ALL.iter().find(|(preset, _)| *preset == name).map(|&(_, text)| text)
}
