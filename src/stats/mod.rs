//! Stats: what became of the visits of a link.
//!
//! In: rollups, which the writer keeps in the same transaction as the visits. Out: the stats document, and the accounting.
//! Never: reads single visits: a link with a hundred million of them answers as fast as one with ten thousand. (`export`
//! alone reads them, one after the other.)

pub mod document;
pub mod export;
pub mod query;
pub mod range;
pub mod rollup;
pub mod sketch;
