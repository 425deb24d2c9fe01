//! Logs: one line an event on stderr, as JSON or as text.
//!
//! Never: a line break or a control character out of a value. What a client sends may end up in a field, and must not be
//! able to begin a line of its own.

use std::fmt;
use std::io;

use tracing::Level;
use tracing::field::{Field, Visit};
use tracing::subscriber::set_global_default;
use tracing_subscriber::field::{MakeVisitor, VisitFmt, VisitOutput};
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::layer::SubscriberExt;

use crate::config::{Log, LogFormat};

/// Starts logging; the first call counts.
pub fn start(log: &Log) {
    let writer = || Clean(io::stderr());
    let builder = tracing_subscriber::fmt().with_writer(writer).with_target(false).with_max_level(level(log.level));
    // What libraries say of a dependency's state we say ourselves, once.
    let everybody = log.level >= Level::DEBUG;
    let ours = filter_fn(move |event| everybody || event.target().starts_with(env!("CARGO_CRATE_NAME")));
    let started = match log.format {
        LogFormat::Json => {
            let builder = builder.json().flatten_event(true).with_current_span(false).with_span_list(false);
            set_global_default(builder.finish().with(ours))
        }
        LogFormat::Text => set_global_default(builder.with_ansi(false).fmt_fields(Escaped).finish().with(ours)),
    };
    // A second start in one process is a test's.
    drop(started);
}

fn level(level: Level) -> LevelFilter {
    LevelFilter::from_level(level)
}

/// Whether a terminal or a reader of lines may take it for more than a character.
fn is_odd(character: char) -> bool {
    character.is_control() || matches!(character, '\u{2028}' | '\u{2029}')
}

/// JSON leaves DEL, C1 and the line separators of Unicode as they are; here they become escapes of JSON. The line's own
/// end stays.
struct Clean<W>(W);

impl<W: io::Write> io::Write for Clean<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        if text.chars().any(|character| is_odd(character) && character != '\n') {
            let escape = |character: char| match character {
                '\n' => "\n".to_owned(),
                odd if is_odd(odd) => format!("\\u{:04x}", u32::from(odd)),
                other => other.to_string(),
            };
            self.0.write_all(text.chars().map(escape).collect::<String>().as_bytes())?;
        } else {
            self.0.write_all(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Fields as `name=value`, the message without its name, control characters escaped.
struct Escaped;

impl<'w> MakeVisitor<Writer<'w>> for Escaped {
    type Visitor = Line<'w>;

    fn make_visitor(&self, target: Writer<'w>) -> Self::Visitor {
        Line { out: target, begun: false, outcome: Ok(()) }
    }
}

struct Line<'w> {
    out: Writer<'w>,
    begun: bool,
    outcome: fmt::Result,
}

impl Line<'_> {
    fn write(&mut self, field: &Field, text: &str) -> fmt::Result {
        if std::mem::replace(&mut self.begun, true) {
            self.out.write_char(' ')?;
        }
        if field.name() != "message" {
            write!(self.out, "{}=", field.name())?;
        }
        for character in text.chars() {
            if is_odd(character) {
                write!(self.out, "{}", character.escape_default())?;
            } else {
                self.out.write_char(character)?;
            }
        }
        Ok(())
    }
}

impl Visit for Line<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.outcome = self.outcome.and_then(|()| self.write(field, value));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.outcome = self.outcome.and_then(|()| self.write(field, &format!("{value:?}")));
    }
}

impl VisitOutput<fmt::Result> for Line<'_> {
    fn finish(self) -> fmt::Result {
        self.outcome
    }
}

impl VisitFmt for Line<'_> {
    fn writer(&mut self) -> &mut dyn fmt::Write {
        &mut self.out
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_a_client_sends_begins_no_line() {
        let evil = "a\r\n2026-01-01 INFO forged\u{1b}[31m\u{2028}b\u{9b}c\u{7f}";
        for json in [false, true] {
            let sink = Sink::default();
            let writer = sink.clone();
            let builder = tracing_subscriber::fmt().with_writer(move || Clean(writer.clone()));
            let log = || {
                tracing::warn!(host = evil, error = %evil, debugged = ?evil, "sent {evil}");
            };
            if json {
                tracing::subscriber::with_default(builder.json().flatten_event(true).finish(), log);
            } else {
                tracing::subscriber::with_default(builder.with_ansi(false).fmt_fields(Escaped).finish(), log);
            }
            let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
            assert_eq!(text.matches('\n').count(), 1, "{text:?}");
            assert!(!text.trim_end_matches('\n').chars().any(is_odd), "{text:?}");
            assert!(text.contains("forged"), "{text:?}");
        }
    }
}
