//! A ledger is read back as it was written, wherever its writer was killed.

#![expect(clippy::unwrap_used, reason = "a test that meets one has failed")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use loadgen::campaign;
use loadgen::clock;
use loadgen::engine::{Job, LedgerJob, Spin};
use loadgen::ledger::read::{Reader, Record, RequestId, at, unescape};
use loadgen::ledger::write::{Id, Ledger};
use loadgen::links::Catalogue;
use loadgen::probe::ids::ask;
use loadgen::scenario::change::Changes;
use loadgen::scenario::load;
use loadgen::scenario::{Connection, ConnectionKind, Expect, Pick, Run, Scenario, Target, Traffic, WhenFull};
use loadgen::stub::Stub;
use loadgen::stub::script::Script;
use proptest::prelude::*;

/// What a worker may write.
#[derive(Debug, Clone)]
enum Line {
    Sent { class: String, code: Vec<u8> },
    Received { of: prop::sample::Index, status: u16, right: bool },
    Created { of: prop::sample::Index, code: Vec<u8>, target: Vec<u8> },
}

fn line() -> impl Strategy<Value = Line> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..12);
    prop_oneof![
        3 => ("\\PC{0,8}", bytes()).prop_map(|(class, code)| Line::Sent { class, code }),
        2 => (any::<prop::sample::Index>(), 100..1000_u16, any::<bool>())
            .prop_map(|(of, status, right)| Line::Received { of, status, right }),
        1 => (any::<prop::sample::Index>(), bytes(), bytes())
            .prop_map(|(of, code, target)| Line::Created { of, code, target }),
    ]
}

/// A record with its texts as they were: kind, worker, number, texts or status.
type Told = (char, u16, u64, Vec<Vec<u8>>);

fn told(record: &Record<'_>) -> Told {
    let (kind, id, fields) = match *record {
        Record::Sent { id, class, method, code, .. } => ('S', id, [class, method, code].map(unescape).to_vec()),
        Record::Received { id, status, location_right, .. } => {
            ('R', id, vec![status.to_string().into_bytes(), location_right.to_string().into_bytes()])
        }
        Record::Created { id, code, target, .. } => ('C', id, [code, target].map(unescape).to_vec()),
    };
    (kind, id.worker, id.number, fields)
}

/// Writes the lines, flushed after each group, and gives what must be read.
fn write(file: &Path, lines: &[(usize, Line)], flush_every: usize) -> Vec<Told> {
    let ledger = Ledger::create(file, "http://127.0.0.1:8080", "X-Request-Id").unwrap();
    let mut writers: Vec<_> = (0..3).map(|worker| ledger.writer(worker).unwrap()).collect();
    let mut sent = [0_u64; 3];
    let mut staged: Vec<Vec<Told>> = vec![Vec::new(); 3];
    let mut expected = Vec::new();
    for (count, (worker, line)) in lines.iter().enumerate() {
        let writer = &mut writers[*worker];
        let now = clock::now_ns();
        let name = *worker as u16;
        let record = match line {
            Line::Sent { class, code } => {
                let id = writer.sending(now, class, "GET", code);
                assert_eq!(id, Id(sent[*worker]), "ids are dense");
                sent[*worker] += 1;
                ('S', name, id.0, vec![class.clone().into_bytes(), b"GET".to_vec(), code.clone()])
            }
            _ if sent[*worker] == 0 => continue,
            Line::Received { of, status, right } => {
                let id = Id(of.index(sent[*worker] as usize) as u64);
                writer.received(id, now, *status, *right);
                ('R', name, id.0, vec![status.to_string().into_bytes(), right.to_string().into_bytes()])
            }
            Line::Created { of, code, target } => {
                let id = Id(of.index(sent[*worker] as usize) as u64);
                writer.created(id, now, code, target);
                ('C', name, id.0, vec![code.clone(), target.clone()])
            }
        };
        staged[*worker].push(record);
        if count % flush_every == 0 {
            writer.flush().unwrap();
            expected.append(&mut staged[*worker]);
        }
    }
    for (writer, staged) in writers.iter_mut().zip(&mut staged) {
        writer.flush().unwrap();
        expected.append(staged);
    }
    expected
}

fn read(file: &Path) -> anyhow::Result<(Vec<Told>, bool)> {
    let mut reader = Reader::open(file)?;
    let mut records = Vec::new();
    let again = fs::File::open(file)?;
    while let Some((offset, record)) = reader.next()? {
        records.push(told(&record));
        let kept = records.last().cloned();
        assert_eq!(at(&again, offset, |record| told(&record))?, kept.unwrap(), "a line is found again by its offset");
    }
    Ok((records, reader.was_cut()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_was_written_is_read(
        lines in prop::collection::vec((0..3_usize, line()), 0..40),
        flush_every in 1..5_usize,
        cut in any::<prop::sample::Index>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ledger");
        let expected = write(&file, &lines, flush_every);
        prop_assert_eq!(read(&file).unwrap(), (expected.clone(), false));

        // Killed anywhere: whole lines are there, the rest is absent.
        let bytes = fs::read(&file).unwrap();
        let first = bytes.iter().position(|byte| *byte == b'\n').unwrap() + 1;
        let length = first + cut.index(bytes.len() - first + 1);
        fs::write(&file, &bytes[..length]).unwrap();
        let whole = bytes[first..length].iter().filter(|byte| **byte == b'\n').count();
        prop_assert_eq!(read(&file).unwrap(), (expected[..whole].to_vec(), bytes[length - 1] != b'\n'));
    }
}

#[test]
fn workers_append_to_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ledger");
    let ledger = Ledger::create(&file, "http://127.0.0.1:8080", "X-Request-Id").unwrap();
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let mut writer = ledger.writer(worker).unwrap();
            scope.spawn(move || {
                for turn in 0..200 {
                    for _ in 0..turn % 7 {
                        let id = writer.sending(clock::now_ns(), "clicks", "GET", b"abc");
                        writer.received(id, clock::now_ns(), 302, true);
                    }
                    writer.flush().unwrap();
                }
            });
        }
    });
    let (records, cut) = read(&file).unwrap();
    assert!(!cut);
    let each: u64 = (0..200).map(|turn| turn % 7).sum();
    for worker in 0..4 {
        let sent: Vec<u64> =
            records.iter().filter(|record| (record.0, record.1) == ('S', worker)).map(|record| record.2).collect();
        assert_eq!(sent, (0..each).collect::<Vec<_>>());
    }
}

#[test]
fn a_ledger_is_not_overwritten() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = Ledger::create(file.path(), "http://127.0.0.1:8080", "X-Request-Id").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
}

#[test]
fn ids() {
    let folder = tempfile::tempdir().unwrap();
    let ledger = Ledger::create(&folder.path().join("ledger"), "http://127.0.0.1:8080", "X-Request-Id").unwrap();
    let mut writer = ledger.writer(0xabc).unwrap();
    writer.sending(0, "clicks", "GET", b"");
    let second = writer.sending(0, "clicks", "GET", b"");
    let digits = writer.digits(second);
    let expected = RequestId { run: ledger.run(), worker: 0xabc, number: 1 };
    assert_eq!(RequestId::parse(&digits), Some(expected));
    assert_eq!(RequestId::parse(&digits.to_ascii_uppercase()), Some(expected));
    assert_eq!(expected.to_string().into_bytes(), digits);
    assert!(ledger.writer(1 << 16).is_err(), "16 bits");
    for wrong in ["", "00", "0000000000000000000000000000000g", "000000000000000000000000000000000"] {
        assert_eq!(RequestId::parse(wrong.as_bytes()), None, "{wrong}");
    }
}

#[test]
fn what_is_no_ledger_is_refused() {
    const FIRST: &str = "loadgen-ledger\t1\t00000000000000ff\thttp://127.0.0.1\tX-Request-Id\t5\n";
    const ID: &str = "00000000000000ff0000000000000000";
    let check = |text: String, expected: &str| {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), &text).unwrap();
        match (read(file.path()), expected) {
            (Ok(_), "") => {}
            (Ok(_), _) => panic!("{text:?} was read"),
            (Err(error), _) => {
                let error = format!("{error:#}");
                assert!(!expected.is_empty() && error.contains(expected), "{text:?}: {error}");
            }
        }
    };
    check(FIRST.to_owned(), "");
    check(format!("{FIRST}S\t{ID}\t1\tclicks\tGET\t\n"), "");
    check(String::new(), "first line is not whole");
    check("code,url\n".to_owned(), "does not begin with loadgen-ledger");
    check(FIRST.replace("\t1\t", "\t2\t"), "a ledger of version \"2\": this loadgen reads version 1");
    check(FIRST.replace("00ff", "ff"), "no run of 16 digits");
    check(FIRST.replace("\t5", ""), "not six fields");
    check(FIRST.replace("\t5", "\tnow"), "no time");
    for broken in [
        format!("X\t{ID}\t1\tclicks\tGET\tabc"),
        format!("S\t{ID}\t1\tclicks\tGET"),
        format!("S\t{ID}\t1\tclicks\tGET\tabc\t"),
        format!("S\t{ID}x\t1\tclicks\tGET\tabc"),
        format!("S\t{ID}\t-1\tclicks\tGET\tabc"),
        format!("S\t{ID}\t18446744073709551616\tclicks\tGET\tabc"),
        format!("R\t{ID}\t1\t65536\t1"),
        format!("R\t{ID}\t1\t302\t2"),
        format!("R\t{ID}\t1\t302\t"),
        // One line that was cut, and another that begins in it.
        format!("R\t{ID}\t1\t30R\t{ID}\t1\t302\t1"),
        String::new(),
    ] {
        check(format!("{FIRST}{broken}\n"), "line 2 is no record of a ledger");
        // Nor is one in the middle skipped: what stood there may have left.
        let whole = format!("S\t{ID}\t1\tclicks\tGET\tabc\n");
        check(format!("{FIRST}{whole}{broken}\n{whole}"), "line 3 is no record of a ledger");
        check(format!("{FIRST}{whole}{broken}\n{whole}"), "run again, with the ledger on a disk with room");
    }
    check(format!("{FIRST}{}\n", "S".repeat(70_000)), "line 2: longer than 65536 bytes");
}

/// A server that takes over ids in `header` from peers that it trusts, as waypost does.
fn server(trusts: fn(IpAddr) -> bool, header: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        while let Ok((mut stream, peer)) = listener.accept() {
            let head: Vec<String> =
                BufReader::new(&stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
            let given = head.iter().filter_map(|line| line.split_once(": ")).find(|(name, _)| *name == header);
            let id = given.filter(|_| trusts(peer.ip())).map_or("its own", |(_, id)| id);
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\nx-request-id: {id}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            );
        }
    });
    address
}

fn scenario(address: SocketAddr, binds: &[Option<&str>]) -> Scenario {
    let traffic = |bind: &Option<&str>| Traffic {
        name: "clicks".to_owned(),
        method: "GET".to_owned(),
        path: "/".to_owned(),
        headers: Vec::new(),
        body: None,
        pick: Pick::None,
        expect: Expect::default(),
        yields: None,
        connection: Connection { kind: ConnectionKind::Pool, max: 1, when_full: WhenFull::Queue, pipeline: 1 },
        closed: None,
        bind: bind.map(|range| range.parse().unwrap()),
        optional: false,
    };
    Scenario {
        name: "test".to_owned(),
        toml: String::new(),
        run: Run {
            target: Target { authority: address.to_string(), host: address.ip().to_string(), port: address.port() },
            seed: 0,
            workers: 1,
            timeout_ns: 1,
            drain_ns: 1,
            peak: 0.0,
        },
        catalogue: Catalogue::default(),
        traffic: binds.iter().map(traffic).collect(),
        phases: Vec::new(),
        events: Vec::new(),
        slos: Vec::new(),
    }
}

#[test]
fn ids_must_be_believed_from_all_addresses() {
    let check = |trusts: fn(IpAddr) -> bool, header: &'static str, binds: &[Option<&str>], expected: Option<&str>| {
        let address = server(trusts, header);
        let asked = ask(&scenario(address, binds), address, header).map_err(|error| format!("{error:#}"));
        match (&asked, expected) {
            (Ok(()), None) => {}
            (Err(error), Some(expected)) if error.ends_with(expected) => {}
            _ => panic!("{asked:?} instead of {expected:?}"),
        }
    };
    fn is(address: IpAddr, text: &str) -> bool {
        address.to_string() == text
    }
    let ranges = [Some("127.64.3.4/16"), None, Some("127.64.3.4/16")];
    check(|_| true, "X-Request-Id", &ranges, None);
    check(|_| true, "X-Load-Id", &ranges, None);
    let both = Some("[proxies]\ntrusted = [\"127.0.0.1/32\", \"127.64.0.0/16\"]\n");
    check(|_| false, "X-Request-Id", &ranges, both);
    check(|peer| is(peer, "127.0.0.1"), "X-Request-Id", &ranges, both);
    check(|peer| !is(peer, "127.0.0.1"), "X-Request-Id", &ranges, both);
    check(|peer| !is(peer, "127.64.0.1"), "X-Request-Id", &ranges, both);
    check(|peer| !is(peer, "127.64.255.254"), "X-Request-Id", &ranges, both);
    check(|_| false, "X-Request-Id", &[None], Some("trusted = [\"127.0.0.1/32\"]\n"));
    // No request comes from the kernel's choice, so nobody asks from there.
    check(|peer| !is(peer, "127.0.0.1"), "X-Request-Id", &[Some("127.64.3.4/16")], None);
    check(|_| false, "X-Request-Id", &[Some("127.64.3.4/16")], Some("trusted = [\"127.64.0.0/16\"]\n"));
    check(|_| false, "X-Load-Id", &[None], Some("]\n\n[visits]\nrequest_id_header = \"X-Load-Id\"\n"));
}

/// What the engine writes down of each kind of class.
#[test]
fn requests_for_links_are_told_from_others() {
    for (class, expected) in [
        ("request = \"GET /{code}?from=mail\"\ncode = { pick = \"one\", from = \"all\" }", "abc"),
        ("request = \"GET /spring26?from=mail\"", "spring26"),
        ("request = \"GET /stats/{code}\"\ncode = { pick = \"one\", from = \"all\" }", ""),
    ] {
        let stub = Stub::start(SocketAddr::from(([127, 0, 0, 1], 0)), Script::default()).unwrap();
        let toml = format!(
            "[run]\ntarget = \"http://{}\"\nseed = 7\n[links]\nall = {{ codes = [\"abc\"] }}\n[traffic.asks]\n{class}\n\
             [[phase]]\nname = \"only\"\nfor = \"1s\"\nrate = 20\nmix = {{ asks = 1 }}\n",
            stub.address()
        );
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ledger");
        let job = Job {
            scenario: Arc::new(load::from_toml("test", &toml, Path::new("."), &Changes::default()).unwrap()),
            workers: 1,
            address: stub.address(),
            spin: Spin::Never,
            key: None,
            ledger: Some(LedgerJob { file: file.clone(), header: "X-Request-Id".to_owned() }),
            stop: Arc::new(AtomicBool::new(false)),
            defect: None,
        };
        campaign::perform(job, None, &mut |_, _| {}).unwrap();
        let (records, _) = read(&file).unwrap();
        let codes: Vec<_> = records.iter().filter(|told| told.0 == 'S').map(|told| told.3[2].clone()).collect();
        assert_eq!(codes, vec![expected.as_bytes(); 20], "{class}");
    }
}

#[test]
fn a_server_that_cannot_be_asked() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = format!("{:#}", ask(&scenario(address, &[None]), address, "X-Request-Id").unwrap_err());
    assert!(error.starts_with(&format!("cannot ask {address} whether it takes over ids: ")), "{error}");
}
