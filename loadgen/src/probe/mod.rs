//! Before a run: does the server offer what the scenario asks for?
//!
//! In: a scenario and the server's address. Out: a [`Probe`] for each class, in the scenario's order. Each class that
//! only reads is asked once, as the run would ask, from an address that the run would use; one that creates with a key is
//! asked with half a body, which no server can carry out: it tells whether the key is right. Never: creates anything;
//! follows a redirect. At its limit: who is refused for the moment (429, 503) asks again as `seed` does, [`TRIES`] times; a
//! class that reads what another has just created counts as offered; a server that cannot be reached is an error.

pub mod ids;

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::client::{Answer, Client};
use crate::clock;
use crate::engine::address::Addresses;
use crate::engine::answer;
use crate::engine::template::{Template, Values};
use crate::links;
use crate::measure::Outcome;
use crate::plan::pick::{Choice, Picker};
use crate::scenario::{Pick, Scenario, Traffic};
use crate::seed;

/// Questions about one class, as long as the server refuses for the moment.
const TRIES: u32 = 5;

/// What became of one class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// Index of traffic.
    pub traffic: usize,
    pub verdict: Verdict,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Offered,
    /// This server, or this run, has none of it: a class that is `optional` can be left out. Says why.
    Missing(String),
    /// The run would measure something else than it means. Says why, and the way out.
    Wrong(String),
}

/// Asks about all classes. `key`: the API key, or why there is none (`waypost-data/admin.key is not there; give
/// --key-file`).
pub fn ask(scenario: &Scenario, address: SocketAddr, key: Result<&str, &str>) -> Result<Vec<Probe>> {
    let ask = |traffic| Ok(Probe { traffic, verdict: ask_about(scenario, traffic, address, key)? });
    (0..scenario.traffic.len()).map(ask).collect()
}

fn ask_about(scenario: &Scenario, index: usize, address: SocketAddr, key: Result<&str, &str>) -> Result<Verdict> {
    let traffic = &scenario.traffic[index];
    if let (true, Err(reason)) = (wants_key(traffic), key) {
        return Ok(Verdict::Missing(format!("no key: {reason}")));
    }
    let authority = &scenario.run.target.authority;
    // Also where nothing is sent: what is wrong with it is said before the run.
    let template = Template::compile(traffic, authority, key.ok(), None)?;
    let reads = matches!(traffic.method.as_str(), "GET" | "HEAD") && !matches!(traffic.pick, Pick::Fresh { .. });
    if !reads && !tells_key(traffic) {
        return Ok(Verdict::Offered);
    }
    let mut tries = 0;
    loop {
        let (answer, verdict) = if reads {
            ask_once(scenario, index, address, &template)?
        } else {
            ask_for_key(scenario, index, address, key.ok())?
        };
        tries += 1;
        if verdict == Verdict::Offered || !matches!(answer.status, 429 | 503) || tries == TRIES {
            return Ok(verdict);
        }
        thread::sleep(seed::wait_after(&answer));
    }
}

/// As the run would.
fn ask_once(scenario: &Scenario, index: usize, address: SocketAddr, template: &Template) -> Result<(Answer, Verdict)> {
    let traffic = &scenario.traffic[index];
    let choice = Picker::new(scenario, index).pick(last_ordinal(scenario, traffic));
    let request = render(scenario, traffic, template, &choice);
    let answer = send(scenario, traffic, address, &request)?;
    let verdict = judge(scenario, traffic, &choice, &line(&request), &answer);
    Ok((answer, verdict))
}

/// Whether a request with half a body shows that its key is right: JSON that ends too early creates nothing.
fn tells_key(traffic: &Traffic) -> bool {
    let is_json = traffic.body.as_ref().is_some_and(|body| body.starts_with('{'));
    traffic.method == "POST" && traffic.pick == Pick::None && is_json && wants_key(traffic)
}

/// The class's request with a body that is cut off behind its first brace. waypost asks for the key before it reads.
fn ask_for_key(scenario: &Scenario, index: usize, address: SocketAddr, key: Option<&str>) -> Result<(Answer, Verdict)> {
    let traffic = Traffic { body: Some("{".to_owned()), ..scenario.traffic[index].clone() };
    let template = Template::compile(&traffic, &scenario.run.target.authority, key, None)?;
    let request = render(scenario, &traffic, &template, &Choice::None);
    let answer = send(scenario, &traffic, address, &request)?;
    let (status, asked) = (answer.status, line(&request));
    let verdict = match status {
        401 | 403 => Verdict::Wrong(format!(
            "{asked} was answered {status}: the key is not this server's, or may not create; give --key-file"
        )),
        429 | 503 => Verdict::Wrong(refused(&asked, status)),
        _ => Verdict::Offered,
    };
    Ok((answer, verdict))
}

fn refused(asked: &str, status: u16) -> String {
    format!(
        "{asked} was answered {status}, {TRIES} times: try again later, or raise the server's limits for this address"
    )
}

fn send(scenario: &Scenario, traffic: &Traffic, address: SocketAddr, request: &[u8]) -> Result<Answer> {
    let authority = &scenario.run.target.authority;
    let local = Addresses::new(traffic.bind, 0, 1).next();
    let timeout = Duration::from_nanos(scenario.run.timeout_ns);
    let mut answered = None;
    Client::connect_from(local, address, authority, timeout)
        .and_then(|mut client| client.pipeline(&[request.to_vec()], |_, answer| answered = Some(answer.clone())))
        .with_context(|| format!("traffic {}: {}", traffic.name, line(request)))?;
    answered.context("a request without an answer came back without an error")
}

fn wants_key(traffic: &Traffic) -> bool {
    traffic.headers.iter().any(|(_, value)| value.contains("{key}"))
}

/// Of an arrival that hardly any run comes to, so that `never_twice` stays true: the last of a walk through the set.
fn last_ordinal(scenario: &Scenario, traffic: &Traffic) -> u64 {
    match traffic.pick {
        Pick::Zipf { set, .. } | Pick::One { set } | Pick::Uniform { set, .. } => scenario.catalogue.count(set) - 1,
        Pick::None | Pick::Random { .. } | Pick::Fresh { .. } => 0,
    }
}

fn render(scenario: &Scenario, traffic: &Traffic, template: &Template, choice: &Choice) -> Vec<u8> {
    let mut code = Vec::new();
    match choice {
        Choice::Link { set, index } => scenario.catalogue.code_into(usize::from(*set), *index, &mut code),
        Choice::Random { digits, length } => code.extend_from_slice(&digits[..usize::from(*length)]),
        Choice::None | Choice::Fresh { .. } => {}
    }
    let mut request = Vec::new();
    let target = links::numbered_target(&traffic.name, 0);
    let values = Values { code: &code, number: 0, target: &target, intended_ns: clock::now_ns(), id: &[] };
    template.render(&values, &mut request);
    request
}

/// Method and path, as a person would name the request.
fn line(request: &[u8]) -> String {
    let text = String::from_utf8_lossy(request);
    text.split(" HTTP/1.1").next().unwrap_or_default().to_owned()
}

/// The run's own judgement, and what to do about it.
fn judge(scenario: &Scenario, traffic: &Traffic, choice: &Choice, asked: &str, answer: &Answer) -> Verdict {
    let expect = &traffic.expect;
    let Answer { status, location, body, .. } = answer;
    let (is_right, target) = match choice {
        Choice::Link { set, index } => {
            let mut target = Vec::new();
            scenario.catalogue.target_into(usize::from(*set), *index, &mut target);
            (*location == target, String::from_utf8_lossy(&target).into_owned())
        }
        _ => (true, String::new()),
    };
    let seed = format!("seed first: loadgen seed {}", scenario.name);
    match answer::judge(expect, *status, is_right, body) {
        Outcome::Ok => Verdict::Offered,
        Outcome::WrongLocation => {
            let location = String::from_utf8_lossy(location);
            Verdict::Wrong(format!("{asked} leads to {location:?} instead of {target:?}: {seed}"))
        }
        Outcome::WrongBody => {
            let part = expect.body.as_deref().unwrap_or_default();
            Verdict::Wrong(format!("{asked} was answered {status} without {part:?} in the body"))
        }
        _ if *status == 404 && expect.known_location => Verdict::Wrong(format!("{asked} was answered 404: {seed}")),
        _ if matches!(status, 404 | 405 | 501) => {
            Verdict::Missing(format!("{asked} was answered {status}: this server has none"))
        }
        _ if matches!(status, 401 | 403) && wants_key(traffic) => {
            Verdict::Wrong(format!("{asked} was answered {status}: the key is not this server's; give --key-file"))
        }
        _ if matches!(status, 429 | 503) => Verdict::Wrong(refused(asked, *status)),
        _ => Verdict::Wrong(format!("{asked} was answered {status} instead of {}", expected(&expect.status))),
    }
}

fn expected(status: &[u16]) -> String {
    let status: Vec<String> = status.iter().map(u16::to_string).collect();
    match status.as_slice() {
        [] => "anything below 400".to_owned(),
        [only] => only.clone(),
        [before @ .., last] => format!("{} or {last}", before.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::thread;

    use super::*;
    use crate::links::target_of;
    use crate::plan::sample;
    use crate::scenario::Expect;

    /// Answers one request with the head and body that `answer` makes of its method and path, and tells what was asked.
    fn serve(answer: impl FnOnce(&str) -> String + Send + 'static) -> (SocketAddr, thread::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let asked = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut read = Vec::new();
            while !read.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                read.push(byte[0]);
            }
            let asked = String::from_utf8(read).unwrap();
            stream.write_all(answer(&line(asked.as_bytes())).as_bytes()).unwrap();
            asked
        });
        (address, asked)
    }

    fn class(method: &str, path: &str, pick: Pick, expect: Expect) -> Scenario {
        let traffic = Traffic { method: method.to_owned(), path: path.to_owned(), expect, ..sample::traffic(pick) };
        let mut scenario = sample::scenario(1, vec![traffic], vec![]);
        scenario.name = "mail-blast".to_owned();
        scenario.run.timeout_ns = 5_000_000_000;
        scenario
    }

    fn verdict(scenario: &Scenario, address: SocketAddr) -> Verdict {
        ask(scenario, address, Ok("wpk_1")).unwrap().remove(0).verdict
    }

    fn found(location: &[u8]) -> String {
        let location = String::from_utf8_lossy(location);
        format!("HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n")
    }

    fn status(status: u16) -> String {
        format!("HTTP/1.1 {status} X\r\nContent-Length: 2\r\n\r\nok")
    }

    const CLICK: Pick = Pick::Uniform { set: 0, never_twice: true };

    fn redirect() -> Expect {
        Expect { status: vec![301, 302], known_location: true, body: None }
    }

    #[test]
    fn a_known_link_must_lead_to_its_target() {
        let scenario = class("GET", "/{code}", CLICK, redirect());
        let (address, asked) = serve(|line| found(&target_of(line.trim_start_matches("GET /").as_bytes())));
        assert_eq!(verdict(&scenario, address), Verdict::Offered);
        assert!(asked.join().unwrap().starts_with("GET /"));

        let (address, asked) = serve(|_| found(b"https://other/"));
        let wrong = verdict(&scenario, address);
        let path = line(asked.join().unwrap().as_bytes());
        let target = String::from_utf8(target_of(path.trim_start_matches("GET /").as_bytes()).to_vec()).unwrap();
        let told =
            format!("{path} leads to \"https://other/\" instead of \"{target}\": seed first: loadgen seed mail-blast");
        assert_eq!(wrong, Verdict::Wrong(told));
    }

    #[test]
    fn answers_have_their_verdict() {
        let check = |expect: Expect, answer: u16, expected: fn(String) -> Verdict, why: &str| {
            let mut scenario = class("GET", "/stats/{code}", CLICK, expect);
            scenario.traffic[0].headers = vec![("Authorization".to_owned(), "Bearer {key}".to_owned())];
            let (address, asked) = serve(move |_| status(answer));
            let verdict = verdict(&scenario, address);
            let asked = asked.join().unwrap();
            assert!(asked.contains("\r\nAuthorization: Bearer wpk_1\r\n"), "{asked}");
            assert_eq!(verdict, expected(format!("{} was answered {why}", line(asked.as_bytes()))));
        };
        let ok = || Expect { status: vec![200], ..Expect::default() };
        check(ok(), 404, Verdict::Missing, "404: this server has none");
        check(ok(), 405, Verdict::Missing, "405: this server has none");
        check(redirect(), 404, Verdict::Wrong, "404: seed first: loadgen seed mail-blast");
        check(ok(), 401, Verdict::Wrong, "401: the key is not this server's; give --key-file");
        check(ok(), 418, Verdict::Wrong, "418 instead of 200");
        check(redirect(), 200, Verdict::Wrong, "200 instead of 301 or 302");
        check(Expect::default(), 500, Verdict::Wrong, "500 instead of anything below 400");
        check(
            Expect { body: Some("clicks".to_owned()), ..ok() },
            200,
            Verdict::Wrong,
            "200 without \"clicks\" in the body",
        );
    }

    /// Answers each request, one a connection; tells how many came.
    fn serve_all(answers: Vec<String>) -> (SocketAddr, thread::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let asked = thread::spawn(move || {
            let answer = |answer: String| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut bytes = [0; 4096];
                let count = stream.read(&mut bytes).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
                String::from_utf8_lossy(&bytes[..count]).into_owned()
            };
            answers.into_iter().map(answer).collect()
        });
        (address, asked)
    }

    fn later(status: u16) -> String {
        format!("HTTP/1.1 {status} X\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n")
    }

    #[test]
    fn who_is_refused_for_the_moment_asks_again() {
        let scenario = class("GET", "/about", Pick::None, Expect::default());
        let (address, asked) = serve_all(vec![later(429), later(503), status(200)]);
        assert_eq!(verdict(&scenario, address), Verdict::Offered);
        assert_eq!(asked.join().unwrap().len(), 3);
        let (address, asked) = serve_all(vec![later(429); TRIES as usize]);
        let told =
            "GET /about was answered 429, 5 times: try again later, or raise the server's limits for this address";
        assert_eq!(verdict(&scenario, address), Verdict::Wrong(told.to_owned()));
        asked.join().unwrap();
    }

    /// A run whose links are all there would only see it in the answers to its creates.
    #[test]
    fn a_wrong_key_is_noticed_before_the_run() {
        let mut scenario = class("POST", "/shorten", Pick::None, Expect::default());
        scenario.traffic[0].headers = vec![("Authorization".to_owned(), "Bearer {key}".to_owned())];
        scenario.traffic[0].body = Some("{\"original_url\":\"{target}\"}".to_owned());
        for (answers, expected) in [
            (vec![status(400)], None),
            (vec![status(422)], None),
            (vec![later(429), status(401)], Some("401")),
            (vec![status(403)], Some("403")),
        ] {
            let (address, asked) = serve_all(answers);
            let told = |status| {
                let why = "the key is not this server's, or may not create; give --key-file";
                Verdict::Wrong(format!("POST /shorten was answered {status}: {why}"))
            };
            assert_eq!(verdict(&scenario, address), expected.map_or(Verdict::Offered, told));
            for request in asked.join().unwrap() {
                let is_half = request.contains("\r\nAuthorization: Bearer wpk_1\r\n") && request.ends_with("\r\n\r\n{");
                assert!(is_half, "{request}");
            }
        }
    }

    #[test]
    fn what_would_change_something_is_not_asked() {
        // Nobody listens there: whoever asks fails.
        let nobody = SocketAddr::from(([127, 0, 0, 1], 1));
        let create = class("POST", "/shorten", Pick::None, Expect::default());
        assert_eq!(verdict(&create, nobody), Verdict::Offered);
        let fresh = class("GET", "/{code}", Pick::Fresh { from: 0, delay_ns: 0 }, Expect::default());
        assert_eq!(verdict(&fresh, nobody), Verdict::Offered);
        let mut keyed = create;
        keyed.traffic[0].headers = vec![("Authorization".to_owned(), "Bearer {key}".to_owned())];
        let missing = ask(&keyed, nobody, Err("admin.key is not there; give --key-file")).unwrap();
        let told = "no key: admin.key is not there; give --key-file".to_owned();
        assert_eq!(missing, [Probe { traffic: 0, verdict: Verdict::Missing(told) }]);
        let read = class("GET", "/{code}", CLICK, redirect());
        assert!(ask(&read, nobody, Ok("")).is_err());
    }
}
