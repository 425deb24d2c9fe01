//! The worker's side.

use std::io;
use std::path::Path;

/// Hexadecimal digits of an id.
pub const ID_DIGITS: usize = 32;

/// A run's ledger: the file, begun with a line that says what it is.
#[derive(Debug)]
pub struct Ledger {}

/// One worker's pen.
#[derive(Debug)]
pub struct Writer {}

/// A request's number in its worker: with run and worker it is the id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Id(pub u64);

impl Ledger {
    /// Makes the file; one that exists is not overwritten. `target` and `header` go into its first line.
    pub fn create(file: &Path, target: &str, header: &str) -> io::Result<Self> {
        let _ = (file, target, header);
        todo!()
    }

    /// For worker number `worker`.
    pub fn writer(&self, worker: usize) -> io::Result<Writer> {
        let _ = worker;
        todo!()
    }
}

impl Writer {
    /// Stages a line: this is about to be sent. The id is the next of this worker.
    pub fn sending(&mut self, at_ns: u64, traffic: &str, method: &str, code: &[u8]) -> Id {
        let _ = (at_ns, traffic, method, code);
        todo!()
    }

    /// The digits that go into the header.
    #[must_use]
    pub fn digits(&self, id: Id) -> [u8; ID_DIGITS] {
        let _ = id;
        todo!()
    }

    /// Stages a line: the answer came whole. `location_right`: it was a redirect to the known target, or nobody asked.
    pub fn received(&mut self, id: Id, at_ns: u64, status: u16, location_right: bool) {
        let _ = (id, at_ns, status, location_right);
        todo!()
    }

    /// Stages a line: the server acknowledged that this code now has that target.
    pub fn created(&mut self, id: Id, at_ns: u64, code: &[u8], target: &[u8]) {
        let _ = (id, at_ns, code, target);
        todo!()
    }

    /// Hands all staged lines to the kernel in one write. What was staged as being sent may leave after this.
    pub fn flush(&mut self) -> io::Result<()> {
        todo!()
    }
}
