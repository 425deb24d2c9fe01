//! Counters and histograms, one cell per core.
//!
//! In: additions by the core that owns the cell. Out: sums, read by back at a scrape.
//! Never: a locked instruction or a shared cache line on the hit path.
//!
//! What is counted is declared beside the code that counts it; here are the cells alone.

use std::cell::RefCell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Latencies in nanoseconds, up to a minute, within 1 %.
pub type Histogram = hdrhistogram::Histogram<u64>;

const NANOS_MAX: u64 = 60_000_000_000;

#[must_use]
pub fn histogram() -> Histogram {
    Histogram::new_with_max(NANOS_MAX, 2).expect("the bounds are constant and valid")
}

/// A number that one thread adds to and any may read. Plain loads and stores: no other thread writes it.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    #[inline]
    pub fn add(&self, count: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
    }

    /// For what goes up and down.
    pub fn subtract(&self, count: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_sub(count), Ordering::Relaxed);
    }

    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A core's own histogram, which it hands over at each tick.
#[derive(Debug)]
pub struct LocalHistogram(RefCell<Histogram>);

/// What a core has handed over.
#[derive(Debug)]
pub struct SharedHistogram(Mutex<Histogram>);

impl Default for LocalHistogram {
    fn default() -> Self {
        Self(RefCell::new(histogram()))
    }
}

impl Default for SharedHistogram {
    fn default() -> Self {
        Self(Mutex::new(histogram()))
    }
}

impl LocalHistogram {
    #[inline]
    pub fn record(&self, nanos: u64) {
        self.0.borrow_mut().saturating_record(nanos.max(1));
    }

    /// Adds what was recorded since the last time.
    pub fn hand_over(&self, to: &SharedHistogram) {
        let mut local = self.0.borrow_mut();
        if !local.is_empty() {
            to.0.lock().expect("nobody panics with it").add(&*local).expect("both have the same bounds");
            local.reset();
        }
    }
}

impl SharedHistogram {
    pub fn add_to(&self, sum: &mut Histogram) {
        sum.add(&*self.0.lock().expect("nobody panics with it")).expect("both have the same bounds");
    }
}
