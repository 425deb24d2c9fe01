//! The one place that writes to the standard output and error. A reader that has gone, as `head` does, wants no more of
//! it: that ends no run.

use std::io::{self, Write};

/// A result.
pub(super) fn out(text: &str) {
    let _ = writeln!(io::stdout(), "{}", text.trim_end());
}

/// News while something goes on, and what went wrong: results may go to a file.
pub(super) fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// A share of a long work, written over itself where the standard error is a terminal.
pub(super) fn progress(what: &str, done: u64, total: u64) {
    if rustix::termios::isatty(io::stderr()) {
        let end = if done == total { "\n" } else { "" };
        let _ = write!(io::stderr(), "\r{what}: {done} of {total}{end}");
    }
}
