//! The one place that writes to the standard output and error.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "this is the one place")]

/// A result.
pub(super) fn out(text: &str) {
    println!("{}", text.trim_end());
}

/// News while something goes on, and what went wrong: results may go to a file.
pub(super) fn say(text: &str) {
    eprintln!("{text}");
}

/// A share of a long work, written over itself where the standard error is a terminal.
pub(super) fn progress(what: &str, done: u64, total: u64) {
    if rustix::termios::isatty(std::io::stderr()) {
        eprint!("\r{what}: {done} of {total}");
        if done == total {
            eprintln!();
        }
    }
}
