//! What the log of this process and its one reader tell each other.
//!
//! In: how far was written; what is being read. Out: the same to the other side.
//! Never: lets a segment go as lost that the reader has opened, for it may have been sent.

use std::io;
use std::sync::{Mutex, MutexGuard};

use super::Place;

#[derive(Debug)]
pub struct Live {
    inner: Mutex<Inner>,
    news: tokio::sync::Notify,
}

#[derive(Debug)]
struct Inner {
    written: Place,
    /// The segment that is being read.
    reading: u64,
    /// The last segment that was ever opened by a reader of this process, or that an earlier one may have opened.
    claimed: u64,
    /// The segment that is being given up.
    leaving: Option<u64>,
}

impl Live {
    /// A log whose next segment is `next`: every earlier one may have been sent by an earlier process.
    #[must_use]
    pub fn new(next: u64) -> Self {
        let written = Place { segment: next, offset: 0 };
        let inner = Inner { written, reading: 0, claimed: next.saturating_sub(1), leaving: None };
        Self { inner: Mutex::new(inner), news: tokio::sync::Notify::new() }
    }

    /// Up to where the log may be read.
    #[must_use]
    pub fn written(&self) -> Place {
        self.lock().written
    }

    pub fn set_written(&self, place: Place) {
        self.lock().written = place;
        self.news.notify_one();
    }

    /// Waits until something was written since the last time.
    pub async fn news(&self) {
        self.news.notified().await;
    }

    /// Opens a segment to read it; none while it is being given up.
    pub fn claim<T>(&self, segment: u64, open: impl FnOnce() -> io::Result<T>) -> io::Result<Option<T>> {
        let mut inner = self.lock();
        if inner.leaving == Some(segment) {
            return Ok(None);
        }
        let opened = open()?;
        inner.reading = segment;
        inner.claimed = inner.claimed.max(segment);
        Ok(Some(opened))
    }

    /// The segment that is being read, and the last one that may have been sent.
    #[must_use]
    pub fn claimed(&self) -> (u64, u64) {
        let inner = self.lock();
        (inner.reading, inner.claimed)
    }

    /// Begins to give a segment up; false if it may have been sent by now.
    pub fn leave(&self, segment: u64) -> bool {
        let mut inner = self.lock();
        let free = segment > inner.claimed;
        if free {
            inner.leaving = Some(segment);
        }
        free
    }

    /// It is gone, or stays after all.
    pub fn left(&self) {
        self.lock().leaving = None;
        // The reader that found it leaving took that for the log's end.
        self.news.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nobody panics with it")
    }
}
