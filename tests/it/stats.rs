//! Stats: the document over HTTP and on the command line, who may read it, the accounting, the export of visits.
//!
//! Visits are stored through the sink of the store that is tested, as the writer does.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use waypost::config::load::{self, Flags};
use waypost::domain::key::DomainId;
use waypost::domain::link::LinkId;
use waypost::domain::time::UnixMillis;
use waypost::domain::visit::Class;
use waypost::guard::keys::Scope;
use waypost::stats::rollup::roll_up;
use waypost::store::Store;
use waypost::store::row::Change;
use waypost::visits::Drops;
use waypost::visits::agents::Agent;
use waypost::visits::batch::{Batch, Orphan, Range, Referrer, RequestId, Row};
use waypost::visits::sink::{Settings, Sink, postgres, sqlite};
use waypost::visits::spool::segment::Tally;
use waypost::visits::spool::{Epoch, Source};

use super::support::{Answer, Direct, Server, Setup, key};

const EPOCH: u64 = 0xFEDC_BA98_7654_3210;
const REQUEST: &str = "0123456789abcdef0123456789abcdef";

/// A visit: when, what, by whom.
type Seen<'a> = (&'a str, Class, u64);

fn at(text: &str) -> UnixMillis {
    UnixMillis(text.parse::<jiff::Timestamp>().unwrap().as_millisecond())
}

fn row(link: LinkId, number: u64, (time, class, visitor): Seen<'_>) -> Row {
    Row {
        link,
        at: at(time),
        epoch: EPOCH,
        core: 0,
        number,
        class,
        address: Some(IpAddr::from([192, 0, 2, 0])),
        // Any hash: it is its high bits that count.
        visitor: visitor.wrapping_mul(0x9E37_79B9_7F4A_7C15),
        agent: 7,
        referrer: 9,
        request_id: RequestId::Packed(u128::from_str_radix(REQUEST, 16).unwrap()),
    }
}

/// Stores visits of a link, and one of the unknown code `gone`, by an instance called `one`, which dropped two more.
fn store(setup: &Setup, direct: &Direct, code: &str, seen: &[Seen<'_>]) {
    let settings = Settings { instance: "one".to_owned(), keep: Duration::from_secs(100 * 365 * 86_400) };
    let source = Source { epoch: Epoch(EPOCH), core: 0 };
    let agent = Agent {
        id: 7,
        text: "=Firefox/1".to_owned(),
        class: Class::Click,
        browser: "Firefox".to_owned(),
        os: "Linux".to_owned(),
        device: "desktop",
    };
    let referrer = Referrer { id: 9, text: "https://news.example/a".to_owned(), host: "news.example".to_owned() };
    direct.check(|links| async move {
        let link = links.link(key(DomainId(0), code)).await.unwrap().unwrap();
        let rows: Vec<Row> = (0..).zip(seen).map(|(number, seen)| row(link.id, number, *seen)).collect();
        let count = rows.len() as u64;
        let orphan = row(LinkId(0), count, ("2027-03-01T00:00:00Z", Class::Orphan, 0));
        let mut drops = Drops::default();
        drops[0] = 2;
        let batch = Batch {
            ranges: vec![Range { source, from: 0, to: count + 1, stored: count, drops }],
            rollups: roll_up(&rows, |id| (id == 7).then_some(&agent), |id| (id == 9).then_some(&referrer)),
            rows,
            orphans: vec![Orphan { domain: 0, code: "gone".to_owned(), row: orphan }],
            agents: vec![Arc::new(agent.clone())],
            referrers: vec![Arc::new(referrer.clone())],
            tallies: vec![Tally {
                source,
                appended: count + 1,
                visits: count,
                ring_full: 2,
                spool_error: 0,
                orphans: 0,
            }],
        };
        let mut sink = match links {
            Store::Sqlite(links) => {
                let path = links.path().with_file_name("visits.db");
                sqlite::migrate(&path).unwrap();
                Sink::Sqlite(sqlite::Sqlite::open(&path, &settings).unwrap())
            }
            Store::Postgres(links) => {
                let flags = Flags { config: Some(setup.path("store.toml")), ..Flags::default() };
                let loaded = load::load(&flags, [], load::read).unwrap();
                let config = loaded.config.postgres.unwrap();
                Sink::Postgres(postgres::Postgres::open(&config, links, &settings).unwrap())
            }
        };
        sink.store(&batch).await.unwrap();
    });
}

/// Two days of Berlin around its change of the clock, and one later.
const SEEN: [Seen<'static>; 7] = [
    ("2027-03-27T22:59:59.999Z", Class::Click, 1),
    ("2027-03-27T23:00:00Z", Class::Tool, 1),
    ("2027-03-28T21:59:00Z", Class::Click, 2),
    ("2027-03-28T21:59:00.001Z", Class::Bot, 3),
    ("2027-03-28T22:00:00Z", Class::Click, 2),
    ("2027-03-28T22:00:01Z", Class::Head, 4),
    ("2027-04-02T00:00:00Z", Class::Click, 5),
];

fn visited(config: &str) -> (Setup, Direct) {
    let setup = Setup::new(config);
    let direct = setup.store();
    direct.add("seen", "https://example.com/", |_| {});
    direct.add("fresh", "https://example.com/", |_| {});
    store(&setup, &direct, "seen", &SEEN);
    (setup, direct)
}

fn read(server: &Server, path: &str, key: &str) -> Answer {
    let bearer = format!("Bearer {key}");
    let headers: &[(&str, &str)] = if key.is_empty() { &[] } else { &[("authorization", &bearer)] };
    server.connect().ask("GET", path, headers, b"")
}

#[test]
fn documents() {
    let (setup, direct) = visited("");
    let server = setup.start();
    let admin = server.admin_key();
    let get = |path: &str| {
        let answer = read(&server, path, &admin);
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        answer.json()
    };
    let whole = json!({
        "short_code": "seen", "total_clicks": 5, "unique_visitors": 3, "unique_visitors_by": "visitor",
        "imported_clicks": 0, "first_clicked": "2027-03-27T22:59:59.999Z", "last_clicked": "2027-04-02T00:00:00Z",
        "by_kind": {"click": 4, "tool": 1, "bot": 1, "head": 1, "prefetch": 0},
        "clicks_by_day": [
            {"date": "2027-04-02", "clicks": 1}, {"date": "2027-03-28", "clicks": 2}, {"date": "2027-03-27", "clicks": 2},
        ],
        "top_referrers": [{"referrer": "news.example", "clicks": 5}],
        "top_browsers": [{"browser": "Firefox", "clicks": 5}],
        "top_os": [{"os": "Linux", "clicks": 5}],
        "top_devices": [{"device": "desktop", "clicks": 5}],
    });
    assert_eq!(get("/stats/seen"), whole);
    assert_eq!(get("/seen/stats"), whole);
    let cli = setup.run(&["stats", "seen", "--json"]);
    assert_eq!(serde_json::from_slice::<Value>(&cli.stdout).unwrap(), whole);
    let berlin = get("/stats/seen?from=2027-03-27&to=2027-03-29&tz=Europe/Berlin");
    let days = json!([
        {"date": "2027-03-29", "clicks": 1}, {"date": "2027-03-28", "clicks": 2}, {"date": "2027-03-27", "clicks": 1},
    ]);
    assert_eq!((&berlin["clicks_by_day"], &berlin["total_clicks"]), (&days, &json!(4)));
    // Of the whole days, of which the last one has no visit.
    assert_eq!((&berlin["unique_visitors"], &berlin["by_kind"]["bot"]), (&json!(2), &json!(1)));
    let hours = get("/stats/seen?from=2027-03-28T21:00:00Z&to=2027-03-28T23:00:00Z&interval=hour");
    let want =
        json!([{"hour": "2027-03-28T22:00:00+00:00", "clicks": 1}, {"hour": "2027-03-28T21:00:00+00:00", "clicks": 1}]);
    assert_eq!(hours["clicks_by_hour"], want);
    let fresh = get("/stats/fresh");
    assert_eq!((&fresh["total_clicks"], &fresh["last_clicked"]), (&json!(0), &Value::Null));
    for (path, status) in [
        ("/stats/nobody", 404),
        ("/stats/no!code", 404),
        ("/stats/", 404),
        ("/api/stats", 404),
        ("/stats/seen?domain=other.example", 404),
        ("/stats/seen?domain=", 200),
        ("/stats/seen?from=yesterday", 422),
        ("/stats/seen?tz=Mars/Olympus", 422),
        ("/stats/seen?since=2027-01-01", 400),
    ] {
        assert_eq!(read(&server, path, &admin).status, status, "{path}");
    }
    let wrong = read(&server, "/stats/seen?from=yesterday&to=tomorrow&tz=Mars&interval=week", &admin).json();
    let pointers: Vec<_> = wrong["errors"].as_array().unwrap().iter().map(|error| &error["pointer"]).collect();
    assert_eq!(json!(pointers), json!(["/interval", "/tz", "/from", "/to"]));
    let usage = setup.run(&["stats", "seen", "--from", "yesterday"]);
    assert_eq!(usage.status.code(), Some(2));
    assert_eq!(setup.run(&["stats", "nobody"]).status.code(), Some(1));
    // What is deleted keeps its stats.
    direct.change("seen", Change::Delete);
    assert_eq!(get("/stats/seen"), whole);
    // What the store has of an instance that is not this one.
    let accounting = read(&server, "/api/v1/accounting", &admin).json();
    let one = json!({
        "answered": 9, "stored": 7, "pending": 0, "at": accounting["instances"]["one"]["at"],
        "dropped": {
            "ring_full": 2, "spool_error": 0, "spool_full": 0, "corrupt": 0, "failover_gap": 0, "refused": 0, "bot": 0,
        },
    });
    assert_eq!(accounting["instances"]["one"], one);
    assert_eq!(accounting["instance"]["pending"], 0);
}

#[test]
fn who_may_read() {
    let check = |config: &str, anybody: u16, other_scope: u16| {
        let (setup, direct) = visited(config);
        let reader = direct.key(&[Scope::StatsRead], None, None);
        let admin = direct.key(&[Scope::Admin], None, None);
        let other = direct.key(&[Scope::LinksRead, Scope::LinksWrite], None, None);
        let server = setup.start();
        let unknown = "wp_AAAAAAAA_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
        for (path, key, want) in [
            ("/stats/seen", "", anybody),
            ("/seen/stats", "", anybody),
            ("/stats/seen", reader.as_str(), 200),
            ("/stats/seen", &admin, 200),
            ("/stats/seen", &other, other_scope),
            ("/stats/seen", unknown, 401),
            ("/api/v1/accounting", "", 401),
            ("/api/v1/accounting", &reader, 403),
            ("/api/v1/accounting", &admin, 200),
        ] {
            assert_eq!(read(&server, path, key).status, want, "{path} with {config:?}");
        }
    };
    check("", 401, 403);
    check("[stats]\npublic = true", 200, 200);
    check("[shorten]\nopen = true", 200, 200);
}

#[test]
fn whoever_has_no_key_reads_at_a_limit() {
    let (setup, direct) = visited("[stats]\npublic = true");
    let reader = direct.key(&[Scope::StatsRead], None, None);
    let server = setup.start();
    assert_eq!(read(&server, "/stats/seen", "").status, 200);
    // One more is allowed each second.
    assert!((0..1000).any(|_| read(&server, "/stats/seen", "").status == 429));
    assert_eq!(read(&server, "/stats/seen", &reader).status, 200);
}

#[test]
fn visits_are_exported_in_the_order_of_time() {
    let (setup, _direct) = visited("");
    let export = |arguments: &[&str]| {
        let output = setup.run(&[&["export", "--visits"], arguments].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let lines: Vec<Value> =
        export(&["--format", "ndjson"]).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let short: Vec<_> =
        lines.iter().map(|line| (line["at"].as_str().unwrap(), line["kind"].as_str().unwrap())).collect();
    let want = [
        ("2027-03-01T00:00:00.000Z", "orphan"),
        ("2027-03-27T22:59:59.999Z", "click"),
        ("2027-03-27T23:00:00.000Z", "tool"),
        ("2027-03-28T21:59:00.000Z", "click"),
        ("2027-03-28T21:59:00.001Z", "bot"),
        ("2027-03-28T22:00:00.000Z", "click"),
        ("2027-03-28T22:00:01.000Z", "head"),
        ("2027-04-02T00:00:00.000Z", "click"),
    ];
    assert_eq!(short, want);
    let whole = json!({
        "at": "2027-03-27T22:59:59.999Z", "domain": "", "code": "seen", "kind": "click", "address": "192.0.2.0",
        "user_agent": "=Firefox/1", "referrer": "https://news.example/a", "country": null, "request_id": REQUEST,
        "epoch": "fedcba9876543210",
    });
    assert_eq!((&lines[1], &lines[0]["code"]), (&whole, &json!("gone")));
    let csv = export(&["--format", "csv"]);
    let mut csv = csv.lines();
    assert_eq!(csv.next(), Some("at,domain,code,kind,address,user_agent,referrer,country,request_id,epoch"));
    // No spreadsheet takes a visitor's words for a formula.
    let want = format!(
        "2027-03-27T22:59:59.999Z,,seen,click,192.0.2.0,'=Firefox/1,https://news.example/a,,{REQUEST},fedcba9876543210"
    );
    assert_eq!((csv.clone().count(), csv.nth(1)), (8, Some(&*want)));
    let file = setup.path("visits.ndjson");
    assert!(setup.run(&["export", "--visits", file.to_str().unwrap()]).status.success());
    assert_eq!(std::fs::read_to_string(file).unwrap().lines().count(), 8);
    assert_eq!(setup.run(&["export", "--visits", "--tag", "x"]).status.code(), Some(2));
}
