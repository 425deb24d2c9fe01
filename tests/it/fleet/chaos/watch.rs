//! Clients that ask each instance for the same links all the time, past HAProxy.
//!
//! In: links that every instance has in its memory. Out: every answer that was not the redirect to the link's target.
//! Never: waits for an answer longer than [`PATIENCE`]; decides what is excused.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use waypost::domain::time::{self, UnixMillis};

use crate::support::{request, throughout};

/// More than a look-up may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// From one question to the next.
const PAUSE: Duration = Duration::from_millis(20);
const LINKS: usize = 20;

pub(super) fn links() -> impl Iterator<Item = (String, String)> {
    (0..LINKS).map(|number| (format!("warm-{number}"), format!("https://example.com/warm/{number}")))
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Answered {
        status: u16,
        location: Option<String>,
    },
    /// No answer, or only a part of one.
    Nothing(String),
}

/// Something else than the redirect that was due.
#[derive(Clone, Debug)]
pub(super) struct Odd {
    pub(super) instance: usize,
    pub(super) code: String,
    pub(super) from: UnixMillis,
    pub(super) to: UnixMillis,
    pub(super) outcome: Outcome,
}

impl fmt::Display for Odd {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { instance, code, from, to, outcome } = self;
        write!(out, "instance-{instance}, {code}, from {from} to {to}: {outcome:?}")
    }
}

/// What the watchers saw.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) right: u64,
    pub(super) odd: Vec<Odd>,
}

pub(super) struct Watch {
    over: Arc<AtomicBool>,
    watchers: Vec<JoinHandle<Seen>>,
}

impl Watch {
    /// One client for each instance.
    pub(super) fn begin(instances: &[SocketAddr]) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let watcher = |(instance, address): (usize, &SocketAddr)| {
            let (over, address) = (Arc::clone(&over), *address);
            std::thread::spawn(move || watch(instance, address, &over))
        };
        let watchers = instances.iter().enumerate().map(watcher).collect();
        Self { over, watchers }
    }

    pub(super) fn end(self) -> Seen {
        self.over.store(true, Ordering::SeqCst);
        let mut all = Seen::default();
        for watcher in self.watchers {
            let Seen { right, odd } = watcher.join().unwrap();
            all.right += right;
            all.odd.extend(odd);
        }
        all
    }
}

fn watch(instance: usize, address: SocketAddr, over: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    let links: Vec<(String, String)> = links().collect();
    for (code, target) in links.iter().cycle() {
        if over.load(Ordering::SeqCst) {
            break;
        }
        let from = time::now();
        let outcome = ask(address, "GET", &format!("/{code}"), &[], b"");
        if is_redirect(&outcome, target) {
            seen.right += 1;
        } else {
            seen.odd.push(Odd { instance, code: code.clone(), from, to: time::now(), outcome });
        }
        throughout(PAUSE, || {});
    }
    seen
}

pub(super) fn is_redirect(outcome: &Outcome, target: &str) -> bool {
    matches!(outcome, Outcome::Answered { status: 307, location: Some(location) } if location == target)
}

/// A request on a connection of its own, to a server that may be away.
pub(super) fn ask(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Outcome {
    match try_ask(address, method, path, headers, body) {
        Ok(outcome) => outcome,
        Err(error) => Outcome::Nothing(error.to_string()),
    }
}

fn try_ask(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> std::io::Result<Outcome> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&request(method, path, &[headers, &[("Connection", "close")]].concat(), body))?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let parsed = answer.split_once("\r\n\r\n").and_then(|(head, _)| {
        let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
        let location = head.lines().find(|line| line.to_lowercase().starts_with("location:"));
        let location = location.and_then(|line| Some(line.split_once(':')?.1.trim().to_owned()));
        Some(Outcome::Answered { status, location })
    });
    parsed.ok_or_else(|| ErrorKind::UnexpectedEof.into())
}
