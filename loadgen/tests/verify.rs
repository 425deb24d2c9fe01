//! `verify` names each fault that was planted into the exports of a made-up run, and nothing else.

#![expect(clippy::unwrap_used, reason = "a test that meets one has failed")]

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use loadgen::ledger::write::Ledger;
use loadgen::verify::{Findings, Options, Visits, Wrong, verify};
use proptest::prelude::*;

/// A request of the made-up run.
#[derive(Debug, Clone)]
struct Asked {
    worker: usize,
    /// `None`: it asks for no link.
    code: Option<String>,
    /// `None`: no whole answer.
    status: Option<u16>,
    /// Whether the server stored it where it may choose: unanswered, or to no link.
    stored: bool,
    fault: Fault,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    Lose,
    Repeat,
    Orphan,
    Count,
    Misplace,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum LinkFault {
    None,
    Lose,
    Redirect,
}

#[derive(Debug, Clone)]
struct Made {
    asked: Vec<Asked>,
    created: Vec<LinkFault>,
    /// Ids of this run that were never sent: (worker, beyond its last).
    unknown: BTreeSet<(u16, u64)>,
    others: usize,
    cut: bool,
    csv: bool,
}

fn made() -> impl Strategy<Value = Made> {
    let fault = prop_oneof![
        6 => Just(Fault::None),
        1 => Just(Fault::Lose),
        1 => Just(Fault::Repeat),
        1 => Just(Fault::Orphan),
        1 => Just(Fault::Count),
        1 => Just(Fault::Misplace),
    ];
    let status = prop::sample::select(vec![200, 201, 301, 302, 307, 308, 404, 410, 429, 500, 502, 503, 504]);
    let asked = (0..3_usize, prop::option::weighted(0.8, "[A-Za-z0-9]{1,8}|ä \"%,[a-z]"))
        .prop_flat_map(move |(worker, code)| {
            (Just(worker), Just(code), prop::option::weighted(0.8, status.clone()), any::<bool>(), fault.clone())
        })
        .prop_map(|(worker, code, status, stored, fault)| Asked { worker, code, status, stored, fault });
    let link = prop_oneof![4 => Just(LinkFault::None), 1 => Just(LinkFault::Lose), 1 => Just(LinkFault::Redirect)];
    (
        prop::collection::vec(asked, 0..40),
        prop::collection::vec(link, 0..10),
        prop::collection::btree_set((0..5_u16, 0..1000_u64), 0..3),
        0..4_usize,
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(asked, created, unknown, others, cut, csv)| Made { asked, created, unknown, others, cut, csv })
}

/// Writes tables as CSV or NDJSON.
struct Table {
    csv: bool,
    text: String,
}

impl Table {
    fn row(&mut self, fields: &[(&str, &str)]) {
        if self.csv && self.text.is_empty() {
            self.text = fields.iter().map(|field| field.0).collect::<Vec<_>>().join(",") + "\n";
        }
        if self.csv {
            let quoted: Vec<_> = fields.iter().map(|field| format!("\"{}\"", field.1.replace('"', "\"\""))).collect();
            writeln!(self.text, "{}", quoted.join(",")).unwrap();
        } else {
            let object: serde_json::Map<_, _> =
                fields.iter().map(|field| (field.0.to_owned(), field.1.into())).collect();
            writeln!(self.text, "{}", serde_json::Value::Object(object)).unwrap();
        }
    }

    fn visit(&mut self, id: &str, code: &str, kind: &str) {
        self.row(&[("at", "2026-03-01"), ("code", code), ("kind", kind), ("request_id", id), ("epoch", "1")]);
    }
}

/// What must be found: the kind, and the id or the code.
type Planted = BTreeSet<(Wrong, String)>;

/// Whether what came back says nothing of the server: 502 and 504 are a balancer's.
fn is_unknown(asked: &Asked) -> bool {
    matches!(asked.status, None | Some(502 | 504))
}

/// The kind of visit that a right server stores, if any.
fn right_kind(asked: &Asked) -> Option<&'static str> {
    asked.code.as_ref()?;
    match asked.status {
        Some(300..400) => Some("click"),
        Some(404 | 410) => asked.stored.then_some("orphan"),
        _ if is_unknown(asked) => asked.stored.then_some("head"),
        _ => None,
    }
}

fn plant(asked: &Asked, id: &str, visits: &mut Table, planted: &mut Planted) {
    let code = asked.code.as_deref().unwrap_or("stats");
    let right = right_kind(asked);
    let redirected = right == Some("click");
    let mut fault = |wrong| planted.insert((wrong, id.to_owned()));
    match (asked.fault, right) {
        (Fault::Lose, Some(_)) if redirected => {
            fault(Wrong::Missing);
        }
        (Fault::Repeat, Some(kind)) => {
            fault(Wrong::Doubled);
            visits.visit(id, code, kind);
            visits.visit(id, code, kind);
        }
        (Fault::Orphan, Some(_)) if redirected => {
            fault(Wrong::StoredAsOrphan);
            visits.visit(id, code, "orphan");
        }
        (Fault::Misplace, Some(_)) if redirected => {
            fault(Wrong::Elsewhere);
            visits.visit(id, &format!("{code}x"), "bot");
        }
        (Fault::Count, _) if !redirected && (!is_unknown(asked) || asked.code.is_none()) => {
            fault(Wrong::Counted);
            visits.visit(id, code, "tool");
        }
        (_, Some(kind)) => visits.visit(id, code, kind),
        (_, None) => {}
    }
}

/// Writes the run's three files, and says what must be found.
fn write(folder: &Path, made: &Made) -> ([PathBuf; 3], Planted) {
    let paths = ["ledger", "visits", "links"].map(|name| folder.join(name));
    let ledger = Ledger::create(&paths[0], "http://127.0.0.1:8080", "X-Request-Id").unwrap();
    let mut writers: Vec<_> = (0..3).map(|worker| ledger.writer(worker).unwrap()).collect();
    let mut sent = [0_u64; 5];
    let mut visits = Table { csv: made.csv, text: String::new() };
    let mut links = Table { csv: made.csv, text: String::new() };
    let mut planted = Planted::new();
    for asked in &made.asked {
        let writer = &mut writers[asked.worker];
        let id = writer.sending(0, "clicks", "GET", asked.code.as_deref().unwrap_or("").as_bytes());
        sent[asked.worker] += 1;
        if let Some(status) = asked.status {
            writer.received(id, 0, status, true);
        }
        let digits = String::from_utf8(writer.digits(id).to_vec()).unwrap();
        plant(asked, &digits, &mut visits, &mut planted);
    }
    for (number, fault) in made.created.iter().enumerate() {
        let (code, target) = (format!("new{number}"), format!("https://shop.example/{number}"));
        let id = writers[0].sending(0, "create", "POST", b"");
        sent[0] += 1;
        writers[0].received(id, 0, 201, true);
        writers[0].created(id, 0, code.as_bytes(), target.as_bytes());
        match fault {
            LinkFault::None => links.row(&[("clicks", "7"), ("url", &target), ("code", &code)]),
            LinkFault::Lose => {
                planted.insert((Wrong::LinkLost, code));
            }
            LinkFault::Redirect => {
                links.row(&[("clicks", "7"), ("url", "https://other.example/"), ("code", &code)]);
                planted.insert((Wrong::LinkOtherTarget, code));
            }
        }
    }
    links.row(&[("clicks", "7"), ("url", "https://seeded.example/"), ("code", "seeded")]);
    for (worker, beyond) in &made.unknown {
        let id = format!("{:016x}{worker:04x}{:012x}", ledger.run(), sent[usize::from(*worker)] + beyond);
        visits.visit(&id, "abc", "click");
        planted.insert((Wrong::Unknown, id));
    }
    for other in 0..made.others {
        let another_run = format!("{:016x}0000000000000000", ledger.run() ^ 1);
        visits.visit(["", "not-an-id", &another_run, "\"\\"][other], "abc", "click");
    }
    for writer in &mut writers {
        writer.flush().unwrap();
    }
    if made.cut {
        let digits = format!("{:016x}0000{:012x}", ledger.run(), sent[0]);
        let mut file = fs::OpenOptions::new().append(true).open(&paths[0]).unwrap();
        write!(file, "S\t{digits}\t0\tclic").unwrap();
    }
    fs::write(&paths[1], &visits.text).unwrap();
    fs::write(&paths[2], &links.text).unwrap();
    (paths, planted)
}

fn found(findings: &Findings) -> Planted {
    let of_links = [Wrong::LinkLost, Wrong::LinkOtherTarget];
    let all = findings.wrong.iter().flat_map(|group| &group.findings);
    all.map(|finding| {
        let name = if of_links.contains(&finding.wrong) { &finding.code } else { &finding.id };
        (finding.wrong, name.clone())
    })
    .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn each_fault_is_named_and_nothing_else(made in made()) {
        let folder = tempfile::tempdir().unwrap();
        let ([ledger, visits, links], planted) = write(folder.path(), &made);
        let findings = verify(&ledger, Some(&visits), Some(&links), Options::default()).unwrap();
        prop_assert_eq!(found(&findings), planted.clone());
        let count: u64 = findings.wrong.iter().map(|group| group.count).sum();
        prop_assert_eq!(count, planted.len() as u64);
        prop_assert_eq!(findings.exit_code(), u8::from(!planted.is_empty()));

        let asked = made.asked.len() as u64;
        let unanswered = made.asked.iter().filter(|asked| is_unknown(asked) && asked.code.is_some());
        let explained = unanswered.clone().filter(|asked| asked.stored && asked.fault != Fault::Repeat).count() as u64;
        prop_assert_eq!(findings.requests.sent, asked + made.created.len() as u64);
        prop_assert_eq!(findings.requests.unanswered, unanswered.count() as u64);
        prop_assert_eq!(findings.requests.cut, made.cut);
        let totals = findings.visits.unwrap();
        prop_assert_eq!((totals.of_others, totals.explained), (made.others as u64, explained));
        prop_assert_eq!(findings.links.unwrap().not_acknowledged, 1);
    }
}

const RUN: &str = "00000000000000ff";

fn id(number: u64) -> String {
    format!("{RUN}0000{number:012x}")
}

/// A ledger with these lines after its first.
fn ledger_of(lines: &str) -> tempfile::NamedTempFile {
    file_of(&format!("loadgen-ledger\t1\t{RUN}\thttp://127.0.0.1:8080\tX-Request-Id\t5\n{lines}"))
}

fn file_of(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    file
}

/// Five requests for `abc`: redirected, redirected, 404, 503, not answered; then one for no link.
fn five() -> tempfile::NamedTempFile {
    let mut lines = String::new();
    for (number, status) in [302, 302, 404, 503, 0, 200].into_iter().enumerate() {
        let id = id(number as u64);
        let code = if status == 200 { "" } else { "abc" };
        writeln!(lines, "S\t{id}\t{number}250000000\tclicks\tGET\t{code}").unwrap();
        if status != 0 {
            writeln!(lines, "R\t{id}\t{number}260000000\t{status}\t1").unwrap();
        }
    }
    ledger_of(&lines)
}

#[test]
fn what_people_read() {
    let ledger = five();
    let check = |rows: &[(u64, &str)], expected: &[&str]| {
        let mut text = "request_id,code,kind\n".to_owned();
        for (number, kind) in rows {
            writeln!(text, "{},abc,{kind}", id(*number)).unwrap();
        }
        let visits = file_of(&text);
        let findings = verify(ledger.path(), Some(visits.path()), None, Options { max: 2 }).unwrap();
        let told = findings.to_string();
        let mut rest = told.as_str();
        for part in expected {
            let at = rest.find(part).unwrap_or_else(|| panic!("{part:?} is not, or not in its place, in:\n{told}"));
            rest = &rest[at + part.len()..];
        }
    };
    check(
        &[(0, "click"), (1, "bot"), (4, "click")],
        &[
            "RIGHT: every redirect is one visit\n",
            "ledger: 6 requests sent, 5 fully received, 2 redirects of a link, 0 to a wrong target",
            "visits: 3 read, 3 of this run, 0 without its id",
            "1 requests for a link were sent and not fully received: they explain up to 1 visits too many; 1 of them are there",
            "links: not checked (no --links)",
        ],
    );
    check(&[(0, "click")], &["WRONG: 1 missing\n", ": answered 302, in no visit\n"]);
    check(
        &[(0, "click"), (0, "click"), (0, "click"), (1, "orphan")],
        &[
            "WRONG: 1 doubled, 1 stored as orphan\n",
            "doubled: 00000000000000ff0000000000000000 at 0.250000 s, clicks GET, code abc: answered 302, in 3 visits\n",
            "stored as orphan: 00000000000000ff0000000000000001 at 1.250000 s",
        ],
    );
    check(
        &[(0, "click"), (1, "click"), (2, "click"), (3, "orphan"), (5, "click")],
        &[
            "WRONG: 3 counted\n",
            "counted as click though it was answered 404\n",
            "counted as orphan though it was answered 503\n",
            "counted: and 1 more\n",
        ],
    );
    check(
        &[(0, "click"), (1, "click"), (5, "tool")],
        &["WRONG: 1 counted\n", "counted as tool though it asks for no link\n"],
    );
    check(
        &[(0, "click"), (1, "click"), (4, "click"), (4, "click"), (6, "click")],
        &["WRONG: 1 doubled, 1 unknown\n", ": not fully received, in 2 visits\n", ": stored as click, but never sent"],
    );
}

/// Of what is no redirect the last field says nothing, whatever it is.
#[test]
fn only_redirects_lead_to_a_wrong_target() {
    for (status, right, expected) in [(302, 0, 1), (307, 0, 1), (302, 1, 0), (200, 0, 0), (404, 0, 0), (503, 0, 0)] {
        let ledger = ledger_of(&format!("S\t{0}\t1\tclicks\tGET\tabc\nR\t{0}\t2\t{status}\t{right}\n", id(0)));
        let visits = file_of("");
        let findings = verify(ledger.path(), Some(visits.path()), None, Options::default()).unwrap();
        assert_eq!(findings.requests.wrong_location, expected, "{status} {right}");
    }
}

/// A request that asks for no link explains nothing, though its answer did not come.
#[test]
fn what_asks_for_no_link_explains_nothing() {
    for (code, explained, counted) in [("abc", 1, 0), ("", 0, 1)] {
        let ledger = ledger_of(&format!("S\t{}\t1\tstats\tGET\t{code}\n", id(0)));
        let visits = file_of(&format!("request_id,code,kind\n{},abc,click\n", id(0)));
        let findings = verify(ledger.path(), Some(visits.path()), None, Options::default()).unwrap();
        assert_eq!(findings.requests.unanswered, explained);
        assert_eq!(findings.visits.as_ref().map(|visits| visits.explained), Some(explained));
        assert_eq!(findings.wrong.iter().map(|group| (group.wrong, group.count)).collect::<Vec<_>>(), {
            if counted > 0 { vec![(Wrong::Counted, counted)] } else { Vec::new() }
        });
    }
}

#[test]
fn totals_of_a_right_run() {
    let ledger = five();
    let rows: Vec<_> =
        [0, 1].map(|n| format!("{{\"request_id\":\"{}\",\"code\":\"abc\",\"kind\":\"click\"}}\n", id(n))).into();
    let visits = file_of(&format!("{}{{\"request_id\":null,\"code\":\"abc\",\"kind\":\"bot\"}}\n", rows.concat()));
    let findings = verify(ledger.path(), Some(visits.path()), None, Options::default()).unwrap();
    assert_eq!(findings.visits, Some(Visits { read: 3, of_this_run: 2, of_others: 1, explained: 0 }));
    assert!(findings.is_right());
    assert_eq!(serde_json::to_value(&findings).unwrap()["requests"]["redirects"], 2);
}

#[test]
fn the_same_code_of_two_domains_is_there() {
    let ledger = ledger_of(&format!(
        "S\t{0}\t1\tcreate\tPOST\t\nR\t{0}\t2\t201\t1\nC\t{0}\t2\tabc\thttps://a.example/\n",
        id(0)
    ));
    let links = file_of("domain,code,url\nx,abc,https://b.example/\ny,abc,https://a.example/\n");
    assert!(verify(ledger.path(), None, Some(links.path()), Options::default()).unwrap().is_right());
}

/// `cargo test --release -p loadgen --test verify -- --ignored --nocapture ten_million`: the figures of `verify.rs`.
#[test]
#[ignore = "2 GB of files: a measurement"]
fn ten_million_requests() {
    const REQUESTS: usize = 10_000_000;
    let folder = tempfile::tempdir().unwrap();
    let [ledger, csv, ndjson] = ["ledger", "csv", "ndjson"].map(|name| folder.path().join(name));
    let mut writer = Ledger::create(&ledger, "http://127.0.0.1:8080", "X-Request-Id").unwrap().writer(0).unwrap();
    let [mut rows, mut lines] = [&csv, &ndjson].map(|path| std::io::BufWriter::new(fs::File::create(path).unwrap()));
    writeln!(rows, "at,code,kind,request_id").unwrap();
    for number in 0..REQUESTS {
        let code = format!("{:07}", number % 2_000_000);
        let now = loadgen::clock::now_ns();
        let id = writer.sending(now, "clicks", "GET", code.as_bytes());
        writer.received(id, now, 302, true);
        let digits = writer.digits(id);
        let digits = std::str::from_utf8(&digits).unwrap();
        writeln!(rows, "2026-03-01T12:00:00.000Z,{code},click,{digits}").unwrap();
        writeln!(lines, "{{\"code\":\"{code}\",\"kind\":\"click\",\"request_id\":\"{digits}\"}}").unwrap();
        if number % 1_000 == 999 {
            writer.flush().unwrap();
        }
    }
    rows.flush().unwrap();
    lines.flush().unwrap();
    for visits in [&csv, &ndjson] {
        let before_ns = loadgen::clock::process_cpu_ns();
        let findings = verify(&ledger, Some(visits), None, Options::default()).unwrap();
        let cpu_ms = (loadgen::clock::process_cpu_ns() - before_ns) / 1_000_000;
        assert!(findings.is_right() && findings.requests.redirects == REQUESTS as u64, "{findings}");
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let memory = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        println!("{}: {cpu_ms} ms of CPU time, {memory}", visits.display());
    }
    println!("ledger: {} bytes", fs::metadata(&ledger).unwrap().len());
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let check = |ledger: &str, visits: Option<&str>, links: Option<&str>, expected: &str| {
        let ledger = ledger_of(ledger);
        let (visits, links) = (visits.map(file_of), links.map(file_of));
        let path = |file: &Option<tempfile::NamedTempFile>| file.as_ref().map(|file| file.path().to_owned());
        let error = verify(ledger.path(), path(&visits).as_deref(), path(&links).as_deref(), Options::default());
        let error = format!("{:#}", error.unwrap_err());
        assert!(error.contains(expected), "{error}");
    };
    let sent = format!("S\t{}\t1\tclicks\tGET\tabc\n", id(0));
    let received = format!("R\t{}\t1\t302\t1\n", id(0));
    let visits = Some("request_id,code,kind\n");
    check("", None, None, "give --visits, --links or both");
    check("", Some("at,code,kind\n"), None, "the column request_id is missing; there are: at, code, kind");
    check("", None, Some("code,target\n"), "the column url is missing");
    check(
        "",
        Some("request_id,code,kind\n,abc,human\n"),
        None,
        "line 2: \"human\" is no kind of visit: known are click",
    );
    check("", Some("request_id,code,kind\n,abc\n"), None, "found record with 2 fields");
    check("", Some("{\"request_id\":null,\"code\":\"abc\"}\n"), None, "line 1: missing field `kind`");
    check("", Some("{\"code\":\"abc\",\"kind\":\"click\"}\n"), None, "line 1: missing field `request_id`");
    check("", None, Some("{\"code\":\"abc\",\"url\":\"https://a.example/\"}\n{\"code\":\"a"), "line 2: EOF");
    check(&received, visits, None, "line 2: id 00000000000000ff0000000000000000 was answered and never sent");
    check(&format!("{sent}{sent}"), visits, None, "line 3: id 00000000000000ff0000000000000000 is not the next");
    check(
        &format!("{sent}{received}{received}"),
        visits,
        None,
        "line 4: id 00000000000000ff0000000000000000 was answered twice",
    );
    check(&format!("C\t{}\t1\ta\tb\n", id(0)), visits, None, "created a link and was never sent");
    check("S\t000000000000000000000000000000ff\t1\tclicks\tGET\tabc\n", visits, None, "is of another run");
    let missing =
        verify(Path::new("/nonexistent/ledger"), Some(Path::new("/nonexistent/visits")), None, Options::default());
    assert!(format!("{:#}", missing.unwrap_err()).contains("cannot open the ledger /nonexistent/ledger"));
}
