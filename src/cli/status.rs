//! `waypost status`: what a running server does.
//!
//! In: its address and an admin key. Out: what it says of itself, as a table or as its own JSON.
//! Never: speaks TLS (it asks the server itself, not what stands before it); repeats the key.
//! At its limits: [`CONNECT_TIMEOUT`] to connect, [`READ_TIMEOUT`] for each piece of an answer, [`ANSWER_BYTES_MAX`] of it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use clap::Args;
use indicatif::{HumanBytes, HumanCount};
use serde_json::Value;
use url::Url;

use super::{Common, Outcome, announce, configure, print, reachable, say, spool, table};
use crate::config::Config;
use crate::config::load::Flags;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const READ_TIMEOUT: Duration = Duration::from_secs(10);
const ANSWER_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, Args)]
pub struct Status {
    /// Where the server listens [else $WAYPOST_SERVER, the first listener of the configuration that serves the API]
    #[arg(long, value_name = "URL")]
    server: Option<String>,
    /// An admin key [else $WAYPOST_KEY, DATA/admin.key]
    #[arg(long)]
    key: Option<String>,
}

pub fn run(status: &Status, common: &Common) -> Outcome {
    let loaded = configure(common, Flags::default())?;
    announce(&loaded);
    let chosen = status.server.clone().or_else(|| given("WAYPOST_SERVER"));
    let own = chosen.is_none();
    let server = chosen.map_or_else(|| default_server(&loaded.config), Ok)?;
    let key = match status.key.clone().or_else(|| given("WAYPOST_KEY")) {
        Some(key) => key,
        // It goes over the wire as it is: not to another machine, unless somebody says so.
        None if !own && !is_here(&server) => {
            return Err(anyhow!("{server} needs a key: give it with --key or $WAYPOST_KEY").into());
        }
        None => {
            let file = loaded.config.data.join("admin.key");
            std::fs::read_to_string(&file).with_context(|| {
                format!("cannot read an admin key from {}: give one with --key or $WAYPOST_KEY", file.display())
            })?
        }
    };
    say(&format!("asking {server}"));
    let (code, body) = get(&server, key.trim())?;
    let body: Value = serde_json::from_slice(&body)
        .with_context(|| format!("{server} answers {code}, and not as a waypost does: is it one?"))?;
    if code != 200 {
        let detail = body["detail"].as_str().unwrap_or("it does not say why");
        return Err(anyhow!("{server} answers {code}: {detail}").into());
    }
    if common.json {
        print(&body.to_string());
    } else {
        print(&table(&rows(&body)));
    }
    Ok(())
}

fn is_here(server: &str) -> bool {
    // What is no address is told so when it is asked.
    Url::parse(server).ok().and_then(|url| url.host().map(|host| host.to_owned())).is_none_or(|host| match host {
        url::Host::Domain(name) => name == "localhost",
        url::Host::Ipv4(ip) => ip.is_loopback(),
        url::Host::Ipv6(ip) => ip.is_loopback(),
    })
}

fn given(variable: &str) -> Option<String> {
    std::env::var(variable).ok().filter(|value| !value.is_empty())
}

/// A listener that begins with a PROXY header cannot be asked directly.
fn default_server(config: &Config) -> anyhow::Result<String> {
    let plain = config.listen.iter().find(|listen| !listen.proxy_protocol).map(|listen| listen.address);
    let address = config.api.listen.or(plain).filter(|address| address.port() != 0);
    let address = address.context("no listener of the configuration can be asked: give the server with --server")?;
    Ok(format!("http://{}", reachable(address)))
}

/// The status and the body of `GET /api/v1/status` (RFC 9112).
fn get(server: &str, key: &str) -> anyhow::Result<(u16, Vec<u8>)> {
    let url = Url::parse(server).ok().filter(|url| url.scheme() == "http" && url.has_host());
    let url = url.with_context(|| format!("--server: {server:?} is no address like http://127.0.0.1:8080"))?;
    ensure!(
        !key.is_empty() && !key.contains(char::is_control),
        "--key: it is empty, or has a character that no header can carry"
    );
    let mut stream = connect(&url)
        .with_context(|| format!("nothing answers at {server}: is the server running? --server asks another one"))?;
    let host = &url[url::Position::BeforeHost..url::Position::AfterPort];
    let path = url.path().trim_end_matches('/');
    let request = format!(
        "GET {path}/api/v1/status HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n\r\n"
    );
    let mut answer = Vec::new();
    let exchange =
        stream.write_all(request.as_bytes()).and_then(|()| stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer));
    exchange.with_context(|| format!("{server} does not answer in time, or ends early"))?;
    parse(&answer).with_context(|| format!("{server} does not answer in HTTP/1.1: is it a waypost?"))
}

fn connect(url: &Url) -> anyhow::Result<TcpStream> {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    let addresses: Vec<SocketAddr> = (host, url.port_or_known_default().unwrap_or(80)).to_socket_addrs()?.collect();
    let mut last = anyhow!("{host} has no address");
    for address in addresses {
        match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            Ok(stream) => {
                stream.set_read_timeout(Some(READ_TIMEOUT))?;
                stream.set_write_timeout(Some(READ_TIMEOUT))?;
                return Ok(stream);
            }
            Err(error) => last = error.into(),
        }
    }
    Err(last)
}

/// An answer that ended with its connection: its status and its body, whole or in chunks (RFC 9112, section 7.1).
fn parse(answer: &[u8]) -> anyhow::Result<(u16, Vec<u8>)> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").context("its head has no end")?;
    let head = str::from_utf8(&answer[..end])?;
    let mut body = &answer[end + 4..];
    let code = head.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1)).context("it has no status")?;
    let code = code.parse()?;
    let header = |name: &str| {
        let mut headers = head.lines().skip(1).filter_map(|line| line.split_once(':'));
        headers.find(|(have, _)| have.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim().to_owned())
    };
    if header("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
        let mut whole = Vec::new();
        loop {
            let line = body.windows(2).position(|window| window == b"\r\n").context("a chunk has no length")?;
            let size = str::from_utf8(&body[..line])?;
            let size = usize::from_str_radix(size.split(';').next().unwrap_or(size).trim(), 16)?;
            if size == 0 {
                return Ok((code, whole));
            }
            let chunk = body[line + 2..].get(..size).context("a chunk ends early")?;
            whole.extend_from_slice(chunk);
            body = body[line + 2 + size..].strip_prefix(b"\r\n").context("a chunk has no end")?;
        }
    }
    if let Some(length) = header("content-length") {
        let length: usize = length.parse()?;
        match body.get(..length) {
            Some(whole) => body = whole,
            None => bail!("its body ends early"),
        }
    }
    Ok((code, body.to_vec()))
}

/// What is wrong first, then a row for each value.
fn rows(status: &Value) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    if let Some(list) = status["degraded"].as_array() {
        let first = list.first().map_or("no".to_owned(), reason);
        rows.push(vec!["degraded".to_owned(), first]);
        rows.extend(list.iter().skip(1).map(|other| vec![String::new(), reason(other)]));
    }
    let mut rest = status.clone();
    if let Some(object) = rest.as_object_mut() {
        object.remove("degraded");
        if let Some(visits) = object.get_mut("visits") {
            *visits = visits_as_text(visits);
        }
        for name in ["answers_by_tier", "redis"] {
            if let Some(figures) = object.get_mut(name) {
                *figures = with_shares(name, figures);
            }
        }
    }
    flatten("", &rest, &mut rows);
    rows
}

/// The figures of visits, shorter: reasons that hold for no visit and states that do not last are left out.
fn visits_as_text(visits: &Value) -> Value {
    let Some(object) = visits.as_object() else { return visits.clone() };
    let one = |(name, value): (&String, &Value)| {
        let value = match (name.as_str(), value) {
            (_, Value::Null) => return None,
            ("dropped", _) => spool::reasons(value).into(),
            ("earlier", Value::Object(earlier)) => {
                let is_zero = |value: &Value| match value {
                    Value::Object(reasons) => reasons.values().all(|count| count == 0),
                    value => value == 0,
                };
                if earlier.values().all(is_zero) {
                    return None;
                }
                visits_as_text(value)
            }
            ("spool_bytes" | "spool_max_bytes", Value::Number(bytes)) => {
                HumanBytes(bytes.as_u64().unwrap_or(0)).to_string().into()
            }
            _ => value.clone(),
        };
        Some((name.clone(), value))
    };
    Value::Object(object.iter().filter_map(one).collect())
}

/// Why it is degraded, and since when if it says so.
fn reason(value: &Value) -> String {
    match (value.as_str().or(value["reason"].as_str()), value["since"].as_str()) {
        (Some(reason), Some(since)) => format!("{reason} since {since}"),
        (Some(reason), None) => reason.to_owned(),
        (None, _) => value.to_string(),
    }
}

/// The answers of each tier with their share of all that were looked up; of Redis, its hits with their share of all
/// that it was asked for.
fn with_shares(name: &str, figures: &Value) -> Value {
    let Some(object) = figures.as_object() else { return figures.clone() };
    // Of tier `none` nothing was looked up.
    let counts = |of: &str| if name == "redis" { ["hits", "misses"].contains(&of) } else { of != "none" };
    let shows = |of: &str| if name == "redis" { of == "hits" } else { of != "none" };
    let all: u64 = object.iter().filter(|(of, _)| counts(of)).filter_map(|(_, count)| count.as_u64()).sum();
    let line = |of: &String, value: &Value| match value.as_u64() {
        Some(count) if shows(of) && all > 0 => {
            Value::from(format!("{} ({:.1} %)", HumanCount(count), 100.0 * count as f64 / all as f64))
        }
        _ => value.clone(),
    };
    Value::Object(object.iter().map(|(of, value)| (of.clone(), line(of, value))).collect())
}

/// A row for each value, those of an object within under both names.
fn flatten(name: &str, value: &Value, rows: &mut Vec<Vec<String>>) {
    let text = match value {
        Value::Object(object) => {
            for (inner, value) in object {
                flatten(&format!("{name} {}", inner.replace('_', " ")), value, rows);
            }
            return;
        }
        Value::Array(list) if list.is_empty() => "no".to_owned(),
        Value::Array(list) => list
            .iter()
            .map(|value| value.as_str().map_or(value.to_string(), str::to_owned))
            .collect::<Vec<_>>()
            .join(", "),
        Value::String(text) if text == "half_open" => "half open".to_owned(),
        Value::String(text) => text.clone(),
        Value::Number(number) => match (number.as_u64(), number.as_f64()) {
            (Some(number), _) => HumanCount(number).to_string(),
            (None, Some(number)) => format!("{number:.1}"),
            (None, None) => number.to_string(),
        },
        other => other.to_string(),
    };
    rows.push(vec![name.trim().to_owned(), text]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers() {
        let check = |answer: &str, want: Option<(u16, &str)>| {
            let got = parse(answer.as_bytes()).ok().map(|(code, body)| (code, String::from_utf8(body).unwrap()));
            assert_eq!(got, want.map(|(code, body)| (code, body.to_owned())), "{answer:?}");
        };
        check("HTTP/1.1 200 OK\r\n\r\n{}", Some((200, "{}")));
        check("HTTP/1.1 401 No\r\nContent-Length: 2\r\n\r\n{}x", Some((401, "{}")));
        check("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{}", None);
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        check(&format!("{chunked}1\r\n{{\r\n1;x=y\r\n}}\r\n0\r\n\r\n"), Some((200, "{}")));
        check(&format!("{chunked}5\r\n{{\r\n"), None);
        check(&format!("{chunked}ffffffffffffffff\r\n{{\r\n"), None);
        check("HTTP/1.1 200 OK\r\n", None);
        check("SSH-2.0-OpenSSH\r\n\r\n", None);
        check("", None);
    }

    #[test]
    fn values_as_rows() {
        let check = |status: Value, want: &[[&str; 2]]| assert_eq!(rows(&status), want, "{status}");
        check(
            serde_json::json!({"a": {"b_c": 1234, "d": []}, "e": ["x", "y"], "f": "g", "h": 0.25, "degraded": []}),
            &[["degraded", "no"], ["a b c", "1,234"], ["a d", "no"], ["e", "x, y"], ["f", "g"], ["h", "0.2"]],
        );
        check(serde_json::json!({"degraded": ["store", "stale"]}), &[["degraded", "store"], ["", "stale"]]);
        check(
            serde_json::json!({
                "degraded": [{"reason": "redis", "since": "2027-01-31T09:00:00Z"}, {"reason": "stale", "since": null}],
                "breakers": {"redis": "half_open", "store": "closed"},
                "answers_per_second": 1234.56,
                "answers_by_tier": {"hot": 9_000, "none": 50, "store": 1_000},
                "redis": {"hits": 3, "misses": 1, "timeouts": 7},
                "postgres": {"open": 2, "idle": 1, "waiting": 0, "max": 8},
            }),
            &[
                ["degraded", "redis since 2027-01-31T09:00:00Z"],
                ["", "stale"],
                ["answers by tier hot", "9,000 (90.0 %)"],
                ["answers by tier none", "50"],
                ["answers by tier store", "1,000 (10.0 %)"],
                ["answers per second", "1234.6"],
                ["breakers redis", "half open"],
                ["breakers store", "closed"],
                ["postgres idle", "1"],
                ["postgres max", "8"],
                ["postgres open", "2"],
                ["postgres waiting", "0"],
                ["redis hits", "3 (75.0 %)"],
                ["redis misses", "1"],
                ["redis timeouts", "7"],
            ],
        );
        check(
            serde_json::json!({"visits": {
                "dropped": {"bot": 0, "ring_full": 1234}, "minutes_until_full": null, "pending": 5,
                "sink_away_since": "2027-01-31T09:00:00Z", "spool_bytes": 1 << 20,
            }}),
            &[
                ["visits dropped", "ring_full 1,234"],
                ["visits pending", "5"],
                ["visits sink away since", "2027-01-31T09:00:00Z"],
                ["visits spool bytes", "1.00 MiB"],
            ],
        );
        check(serde_json::json!({"visits": {"dropped": {"bot": 0}}}), &[["visits dropped", "none"]]);
        let earlier =
            |pending: u64| serde_json::json!({"visits": {"earlier": {"dropped": {"bot": 0}, "pending": pending}}});
        check(earlier(0), &[]);
        check(earlier(3), &[["visits earlier dropped", "none"], ["visits earlier pending", "3"]]);
        check(
            serde_json::json!({"answers_by_tier": {"hot": 0, "store": 0}}),
            &[["answers by tier hot", "0"], ["answers by tier store", "0"]],
        );
    }
}
