//! Links that a run will ask for, created through the API where they are not there yet.
//!
//! In: a catalogue, and a server of waypost's API. Out: every derived and chosen link stands there with its target, or an
//! error that names the first that cannot. Never: changes a link that stands there, sends a create again without asking
//! what became of the first, seeds what was read from a list. At its limit: who is refused for the moment (429, 503, a
//! lost connection) waits as long as the server says, at most [`WAIT_MAX`], and gives up after [`TRIES`] times without
//! any progress. For millions of links, [`write_csv`] and an import are faster.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use serde_json::json;

use crate::client::{Answer, Client};
use crate::links::{Catalogue, Source};

/// Connections, each with a thread of its own. They wait for the server's disk rather than use a core, and a server that
/// makes many creates durable with one write is faster the more of them come at a time.
const CONNECTIONS: u64 = 8;
/// Links that are asked for at a time on one connection.
const CHUNK: usize = 64;
/// The longest that one refusal is waited for.
pub const WAIT_MAX: Duration = Duration::from_secs(30);
/// Where the server does not say how long.
const WAIT: Duration = Duration::from_secs(1);
/// Attempts on a connection's chunk without any progress.
pub const TRIES: u32 = 10;
/// Of an answer that nobody expected, in an error.
const BODY_SHOWN: usize = 300;

/// Where links are created.
pub struct Api<'a> {
    pub address: SocketAddr,
    /// For `Host`.
    pub authority: &'a str,
    /// Of one request.
    pub timeout: Duration,
    pub key: Option<Key<'a>>,
}

/// An API key with the scope to create links. It is in no message: `from` is what people are told.
#[derive(Clone, Copy)]
pub struct Key<'a> {
    pub secret: &'a str,
    /// Where it was read: a flag, a variable or a file.
    pub from: &'a str,
}

/// What came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seeded {
    /// Stood there already, with the right target.
    pub there: u64,
    pub created: u64,
}

impl Seeded {
    fn total(self) -> u64 {
        self.there + self.created
    }
}

/// Creates what is missing; `progress` is called with the links that are done and all there are, many times a second.
pub fn seed(catalogue: &Catalogue, api: &Api<'_>, progress: &mut dyn FnMut(u64, u64)) -> Result<Seeded> {
    let total: u64 = seeded_sets(catalogue).map(|set| catalogue.count(set)).sum();
    let mut seeded = Seeded::default();
    progress(0, total);
    thread::scope(|scope| {
        // Dropped at the first error: then nobody waits any longer.
        let (running, stopped) = bounded::<()>(0);
        let (report, reports) = bounded(CONNECTIONS as usize);
        for number in 0..CONNECTIONS.min(total.div_ceil(CHUNK as u64)) {
            let (stopped, report) = (stopped.clone(), report.clone());
            scope.spawn(move || {
                // Nobody listens any more when another connection met an error: that one is told.
                if let Err(error) = seed_share(catalogue, api, number, &stopped, &report) {
                    drop(report.send(Err(error)));
                }
            });
        }
        drop(report);
        for part in reports {
            let part: Seeded = part?;
            seeded.there += part.there;
            seeded.created += part.created;
            progress(seeded.total(), total);
        }
        drop(running);
        Ok(seeded)
    })
}

/// Writes `code,url` and all links that [`seed`] would create: what `waypost import` reads.
pub fn write_csv(catalogue: &Catalogue, out: impl Write) -> io::Result<()> {
    let mut csv = csv::Writer::from_writer(out);
    csv.write_record(["code", "url"])?;
    let (mut code, mut target) = (Vec::new(), Vec::new());
    for set in seeded_sets(catalogue) {
        for index in 0..catalogue.count(set) {
            code.clear();
            target.clear();
            catalogue.code_into(set, index, &mut code);
            catalogue.target_into(set, index, &mut target);
            csv.write_record([&code, &target])?;
        }
    }
    csv.flush()
}

/// Indices of the sets whose targets are derived.
fn seeded_sets(catalogue: &Catalogue) -> impl Iterator<Item = usize> {
    let is_seeded = |set: &usize| !matches!(catalogue.sets[*set].source, Source::Listed(_));
    (0..catalogue.sets.len()).filter(is_seeded)
}

/// A link that is not known to be there.
struct Link {
    set: usize,
    index: u64,
    code: String,
    /// The server said so when it was to be created.
    is_taken: bool,
}

/// Before the rest of a chunk is tried again.
struct Wait {
    length: Duration,
    because: String,
}

/// One connection's share: the chunks whose number modulo [`CONNECTIONS`] is its own.
fn seed_share(
    catalogue: &Catalogue,
    api: &Api<'_>,
    number: u64,
    stopped: &Receiver<()>,
    report: &Sender<Result<Seeded>>,
) -> Result<()> {
    let client = Client::connect(api.address, api.authority, api.timeout)?;
    let mut seeder = Seeder { catalogue, api, client };
    let links = seeded_sets(catalogue).flat_map(|set| (0..catalogue.count(set)).map(move |index| (set, index)));
    let is_mine = |place: u64| place / CHUNK as u64 % CONNECTIONS == number;
    let mut mine = (0..).zip(links).filter(|(place, _)| is_mine(*place)).map(|(_, (set, index))| {
        let mut code = Vec::new();
        catalogue.code_into(set, index, &mut code);
        Link { set, index, code: String::from_utf8_lossy(&code).into_owned(), is_taken: false }
    });
    loop {
        let mut chunk: Vec<Link> = mine.by_ref().take(CHUNK).collect();
        if chunk.is_empty() {
            return Ok(());
        }
        let mut tries = 0;
        loop {
            let before = chunk.len();
            let (seeded, wait) = seeder.pass(&mut chunk)?;
            if report.send(Ok(seeded)).is_err() {
                return Ok(());
            }
            let Some(wait) = wait else { break };
            tries = if chunk.len() < before { 0 } else { tries + 1 };
            if tries == TRIES {
                bail!("{TRIES} attempts brought no link more: {}", wait.because);
            }
            if stopped.recv_timeout(wait.length) == Err(RecvTimeoutError::Disconnected) {
                return Ok(());
            }
        }
    }
}

struct Seeder<'a> {
    catalogue: &'a Catalogue,
    api: &'a Api<'a>,
    client: Client,
}

impl Seeder<'_> {
    /// Asks for all links of the chunk, then creates those that are missing; what is done leaves the chunk. An error is
    /// one that no waiting mends.
    fn pass(&mut self, chunk: &mut Vec<Link>) -> Result<(Seeded, Option<Wait>)> {
        let mut seeded = Seeded::default();
        let wait = self.ask(chunk, &mut seeded.there)?;
        if wait.is_some() {
            return Ok((seeded, wait));
        }
        while let Some(link) = chunk.last_mut() {
            if let Some(wait) = self.create(link)? {
                return Ok((seeded, Some(wait)));
            }
            seeded.created += 1;
            chunk.pop();
        }
        Ok((seeded, None))
    }

    fn ask(&mut self, chunk: &mut Vec<Link>, there: &mut u64) -> Result<Option<Wait>> {
        let head = |link: &Link| format!("HEAD /{} HTTP/1.1\r\nHost: {}\r\n\r\n", link.code, self.api.authority);
        let heads: Vec<Vec<u8>> = chunk.iter().map(|link| head(link).into_bytes()).collect();
        let mut answers = Vec::with_capacity(heads.len());
        let end = self.client.pipeline(&heads, |_, answer| answers.push(answer.clone()));
        let mut wait = end.err().as_ref().map(lost);
        let mut answers = answers.iter();
        let mut rest = Vec::with_capacity(chunk.len());
        for link in chunk.drain(..) {
            match answers.next().map(|answer| self.standing(&link, answer)).transpose()? {
                Some(Standing::Right) => *there += 1,
                Some(Standing::Later(later)) => {
                    wait = Some(later);
                    rest.push(link);
                }
                Some(Standing::Missing) | None => rest.push(link),
            }
        }
        *chunk = rest;
        Ok(wait)
    }

    /// What the answer to `HEAD /CODE` says.
    fn standing(&self, link: &Link, answer: &Answer) -> Result<Standing> {
        let code = &link.code;
        let way_out = format!(
            "use another instance, or {} links.{}",
            match self.catalogue.sets[link.set].source {
                Source::Codes(_) => "another code in",
                Source::Derived { .. } | Source::Listed(_) => "another name for",
            },
            self.catalogue.sets[link.set].name
        );
        match answer.status {
            300..=399 if self.catalogue.is_target(link.set, link.index, &answer.location) => Ok(Standing::Right),
            300..=399 => {
                let other = String::from_utf8_lossy(&answer.location);
                bail!("code {code} belongs to another link, to {other}: {way_out}")
            }
            404 if link.is_taken => bail!("code {code} is taken, though no link stands there: {way_out}"),
            404 => Ok(Standing::Missing),
            410 => bail!("code {code} belongs to a link that has ended: {way_out}"),
            429 | 503 => Ok(Standing::Later(later(answer))),
            _ => Err(unexpected(&format!("HEAD /{code}"), answer)),
        }
    }

    /// None: it is created.
    fn create(&mut self, link: &mut Link) -> Result<Option<Wait>> {
        let mut target = Vec::new();
        self.catalogue.target_into(link.set, link.index, &mut target);
        let body = json!({"original_url": String::from_utf8_lossy(&target), "custom_code": link.code}).to_string();
        let bearer = self.api.key.map(|key| format!("Bearer {}", key.secret));
        let mut headers = vec![("Content-Type", "application/json")];
        headers.extend(bearer.as_deref().map(|bearer| ("Authorization", bearer)));
        let answer = match self.client.request("POST", "/shorten", &headers, body.as_bytes()) {
            Ok(answer) => answer,
            // Nobody knows whether it was created: the next pass asks first.
            Err(error) => return Ok(Some(lost(&error))),
        };
        match answer.status {
            201 => Ok(None),
            // By whom, the next pass asks.
            409 => {
                link.is_taken = true;
                Ok(Some(Wait { length: Duration::ZERO, because: format!("code {} is taken", link.code) }))
            }
            status @ (401 | 403) => Err(match self.api.key {
                Some(key) => {
                    anyhow!("the server refuses the key from {} ({status}): it needs the scope links:write", key.from)
                }
                None => anyhow!("the server wants a key with the scope links:write ({status}), and none was given"),
            }),
            429 | 503 => Ok(Some(later(&answer))),
            _ => Err(unexpected("POST /shorten", &answer)),
        }
    }
}

/// What stands at a code.
enum Standing {
    Right,
    Missing,
    Later(Wait),
}

fn later(answer: &Answer) -> Wait {
    Wait { length: wait_after(answer), because: format!("the server answers {}", answer.status) }
}

/// How long one who was refused for the moment waits: what `Retry-After` says (RFC 9110, section 10.2.3) if it does so in
/// seconds, at most [`WAIT_MAX`].
pub(crate) fn wait_after(answer: &Answer) -> Duration {
    let given = answer.header("retry-after").and_then(|value| value.trim().parse().ok()).map(Duration::from_secs);
    given.unwrap_or(WAIT).min(WAIT_MAX)
}

fn lost(error: &anyhow::Error) -> Wait {
    Wait { length: WAIT, because: format!("{error:#}") }
}

fn unexpected(request: &str, answer: &Answer) -> anyhow::Error {
    let body: String = String::from_utf8_lossy(&answer.body).chars().take(BODY_SHOWN).collect();
    anyhow!("{request} was answered with {}, which is no answer of waypost's API: {body}", answer.status)
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::collections::HashMap;
    use std::io::{BufRead, BufReader, Read};
    use std::net::TcpListener;
    use std::str;
    use std::sync::{Arc, Mutex};

    use serde_json::Value;

    use crate::links::{Set, target_of};

    const FOUND: &str = "302 Found\r\nLocation: ";

    /// The links of a server, and what it does instead of answering as it should, once each.
    #[derive(Default)]
    struct State {
        links: HashMap<String, String>,
        /// To the next create: the rest of an answer's head; empty: it carries the create out and closes.
        moods: Vec<&'static str>,
        /// To the next questions, likewise; empty: closes.
        head_moods: Vec<&'static str>,
        creates: u64,
        last_create: String,
    }

    fn answer(state: &mut State, head: &str, body: &str) -> Option<String> {
        let mut words = head.split(' ');
        let (method, path) = (words.next()?, words.next()?);
        if method == "HEAD" {
            if let Some(mood) = state.head_moods.pop() {
                return (!mood.is_empty()).then(|| mood.into());
            }
            return Some(match state.links.get(path.trim_start_matches('/')) {
                Some(target) => format!("{FOUND}{target}"),
                None => "404 Not Found".into(),
            });
        }
        assert_eq!((method, path), ("POST", "/shorten"));
        let mood = state.moods.pop();
        if let Some(mood) = mood.filter(|mood| !mood.is_empty()) {
            return Some(mood.into());
        }
        let wanted: Value = serde_json::from_str(body).unwrap();
        let text = |name: &str| wanted[name].as_str().unwrap().to_owned();
        if state.links.contains_key(&text("custom_code")) {
            return Some("409 Conflict".into());
        }
        state.links.insert(text("custom_code"), text("original_url"));
        state.creates += 1;
        state.last_create = head.to_owned();
        mood.is_none().then(|| "201 Created".into())
    }

    /// Serves until the process ends.
    fn serve(state: State) -> (SocketAddr, Arc<Mutex<State>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(state));
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, state) = (stream.unwrap(), Arc::clone(&shared));
                thread::spawn(move || {
                    let mut reader = BufReader::new(stream.try_clone().unwrap());
                    loop {
                        let (mut head, mut length) = (String::new(), 0);
                        while !head.ends_with("\r\n\r\n") {
                            let from = head.len();
                            if !matches!(reader.read_line(&mut head), Ok(1..)) {
                                return;
                            }
                            if let Some(value) = head[from..].strip_prefix("Content-Length: ") {
                                length = value.trim().parse().unwrap();
                            }
                        }
                        let mut body = vec![0; length];
                        reader.read_exact(&mut body).unwrap();
                        let answer = answer(&mut state.lock().unwrap(), &head, str::from_utf8(&body).unwrap());
                        let Some(answer) = answer else { return };
                        let answer = format!("HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n");
                        if stream.write_all(answer.as_bytes()).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        (address, state)
    }

    fn catalogue() -> Catalogue {
        let set = |name: &str, source| Set { name: name.into(), source };
        Catalogue {
            sets: vec![
                set("existing", Source::Derived { count: 1000 }),
                set("listed", Source::Listed(vec![("else".into(), "https://e.example/".into())])),
                set("launch", Source::Codes(vec!["spring26".into(), "summer26".into()])),
            ],
        }
    }

    fn api(address: SocketAddr, key: Option<Key<'_>>) -> Api<'_> {
        Api { address, authority: "sho.rt", timeout: Duration::from_secs(5), key }
    }

    const KEY: Key<'_> = Key { secret: "s3cret", from: "--key-file key.txt" };

    #[test]
    fn creates_what_is_missing_and_nothing_twice() {
        let (address, state) = serve(State::default());
        let catalogue = catalogue();
        let mut seen = Vec::new();
        let first = seed(&catalogue, &api(address, Some(KEY)), &mut |done, total| seen.push((done, total))).unwrap();
        assert_eq!(first, Seeded { there: 0, created: 1002 });
        assert!(seen.is_sorted());
        assert_eq!((seen.first(), seen.last()), (Some(&(0, 1002)), Some(&(1002, 1002))));
        {
            let mut state = state.lock().unwrap();
            assert_eq!(state.links.len(), 1002);
            assert_eq!(state.links["spring26"].as_bytes(), target_of(b"spring26"));
            assert!(state.links.iter().all(|(code, target)| target.as_bytes() == target_of(code.as_bytes())));
            assert!(state.last_create.contains("\r\nHost: sho.rt\r\n"), "{}", state.last_create);
            assert!(state.last_create.contains("\r\nAuthorization: Bearer s3cret\r\n"), "{}", state.last_create);
            state.links.remove("summer26");
        }
        let second = seed(&catalogue, &api(address, Some(KEY)), &mut |_, _| {}).unwrap();
        assert_eq!(second, Seeded { there: 1001, created: 1 });
        assert_eq!(state.lock().unwrap().creates, 1003);
    }

    #[test]
    fn waits_where_that_helps() {
        let check = |state: State, expected: Seeded| {
            let mood = format!("{:?} {:?}", state.moods, state.head_moods);
            let (address, _) = serve(state);
            assert_eq!(seed(&catalogue(), &api(address, None), &mut |_, _| {}).unwrap(), expected, "{mood}");
        };
        let all = Seeded { there: 0, created: 1002 };
        for mood in ["429 Too Many Requests\r\nRetry-After: 0", "503 Service Unavailable\r\nRetry-After: 0"] {
            check(State { moods: vec![mood; 5], ..State::default() }, all);
            check(State { head_moods: vec![mood; 5], ..State::default() }, all);
        }
        check(State { head_moods: vec![""], ..State::default() }, all);
        // Closed instead of an answer, though it was created: asked about, not created again.
        check(State { moods: vec![""], ..State::default() }, Seeded { there: 1, created: 1001 });
    }

    #[test]
    fn gives_up_where_it_does_not() {
        let check = |state: State, key: Option<Key<'_>>, message: &str| {
            let (address, _) = serve(state);
            let mut catalogue = catalogue();
            catalogue.sets.remove(0);
            let error = seed(&catalogue, &api(address, key), &mut |_, _| {}).unwrap_err();
            assert_eq!(format!("{error:#}"), message);
        };
        let mood = |mood, times| State { moods: vec![mood; times], ..State::default() };
        let belongs = HashMap::from([("spring26".into(), "https://other.example/".into())]);
        check(
            State { links: belongs, ..State::default() },
            None,
            "code spring26 belongs to another link, to https://other.example/: use another instance, or another code in \
             links.launch",
        );
        check(
            mood("409 Conflict", 2),
            None,
            "code summer26 is taken, though no link stands there: use another instance, or another code in links.launch",
        );
        check(
            mood("401 Unauthorized", 1),
            Some(KEY),
            "the server refuses the key from --key-file key.txt (401): it needs the scope links:write",
        );
        check(
            mood("403 Forbidden", 1),
            None,
            "the server wants a key with the scope links:write (403), and none was given",
        );
        check(
            mood("503 Service Unavailable\r\nRetry-After: 0", 99),
            None,
            "10 attempts brought no link more: the server answers 503",
        );
        check(
            mood("500 Internal Server Error", 1),
            None,
            "POST /shorten was answered with 500, which is no answer of waypost's API: ",
        );
    }

    #[test]
    fn nobody_listens() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let error = seed(&catalogue(), &api(address, None), &mut |_, _| {}).unwrap_err();
        assert!(format!("{error:#}").contains(&address.to_string()), "{error:#}");
        let nothing = seed(&Catalogue::default(), &api(address, None), &mut |_, _| {}).unwrap();
        assert_eq!(nothing, Seeded::default());
    }

    #[test]
    fn waits_as_long_as_the_server_says_within_limits() {
        let check = |value: Option<&str>, expected: Duration| {
            let headers = value.map(|value| ("retry-after".to_owned(), value.to_owned())).into_iter().collect();
            let answer = Answer { status: 429, location: vec![], headers, body: vec![] };
            assert_eq!(later(&answer).length, expected, "{value:?}");
        };
        check(None, WAIT);
        check(Some("7"), Duration::from_secs(7));
        check(Some("86400"), WAIT_MAX);
        check(Some("Wed, 21 Oct 2026 07:28:00 GMT"), WAIT);
    }

    #[test]
    fn csv_has_what_would_be_seeded() {
        let mut out = Vec::new();
        let mut catalogue = catalogue();
        catalogue.sets[0].source = Source::Derived { count: 2 };
        write_csv(&catalogue, &mut out).unwrap();
        let target = |code: &str| String::from_utf8(target_of(code.as_bytes()).to_vec()).unwrap();
        let codes = ["ol6oELD", "R4pc6j8", "spring26", "summer26"];
        let lines: String = codes.iter().map(|code| format!("{code},{}\n", target(code))).collect();
        assert_eq!(String::from_utf8(out).unwrap(), format!("code,url\n{lines}"));
    }
}
