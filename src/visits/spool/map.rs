//! The one mapping of the program: a file as words that are read and written atomically.
//!
//! In: a file and its size. Out: its words, for every thread that holds the [`Map`].
//! Never: hands out a plain reference into the file, which another process may write at any time; maps what is not
//! allocated (a full tmpfs would answer a store with SIGBUS).
//! At its limit: a file system that is full says so when the file is made, and never later.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, fallocate};

pub const WORD_BYTES: usize = 8;
const PAGE_BYTES: usize = 4096;

#[derive(Debug)]
pub struct Map(MmapRaw);

impl Map {
    /// Gives `file`, which is new and empty, `bytes` bytes, and touches each page: no store to it faults later.
    pub fn create(file: &File, bytes: usize) -> io::Result<Self> {
        fallocate(file, FallocateFlags::empty(), 0, bytes as u64)?;
        let map = Self::of(file, bytes)?;
        for page in map.words().chunks(PAGE_BYTES / WORD_BYTES) {
            page[0].store(0, Ordering::Relaxed);
        }
        Ok(map)
    }

    /// Maps the first `bytes` bytes of `file`; it must have as many and keep them, or a load is answered with SIGBUS.
    pub fn of(file: &File, bytes: usize) -> io::Result<Self> {
        MmapOptions::new().len(bytes).populate().map_raw(file).map(Self)
    }

    #[inline]
    #[expect(unsafe_code, reason = "a mapping is memory that Rust has not allocated")]
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping begins at a page, so each word is aligned; it is readable and writable, as long as is said
        // here, and lives as long as `self`. Any bytes are a valid `AtomicU64`. Nothing refers to the memory but by these
        // atomics, and whoever else maps the file does as much (see `format`).
        unsafe { std::slice::from_raw_parts(self.0.as_mut_ptr().cast::<AtomicU64>(), self.0.len() / WORD_BYTES) }
    }
}
