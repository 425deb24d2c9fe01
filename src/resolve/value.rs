//! (Being built.)

/// Where the store's feed stood before a value was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoredAsOf {
    pub generation: u64,
    pub position: u64,
}
pub fn encode(_: &crate::domain::link::Entry, _: StoredAsOf) -> Vec<u8> { Vec::new() }
pub fn decode(_: &[u8]) -> Option<(StoredAsOf, crate::domain::link::Entry)> { None }
