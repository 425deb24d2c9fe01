//! The ledger: what was sent and what was fully received, in a file that the server cannot touch.
//!
//! In: from a worker, a line before a request leaves and a line after its answer came whole. Out: a text file that is
//! complete up to the last system call, whatever ends this process: a request never leaves before its line is with the
//! kernel. Never: buffers a `sent` line past the send. At its limit: when a line cannot be written (disk full) the run
//! ends with an error, since what is not in the ledger can prove nothing.

pub mod read;
pub mod write;
