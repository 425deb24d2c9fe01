//! What another process changes in the same store shows in the server within a second; and what it does while the
//! store is away.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::json;
use waypost::domain::target::Target;
use waypost::domain::time::{self, UnixMillis};
use waypost::store::row::{Change, Patch};

use crate::support::{Answer, Client, LIMIT, Server, Setup, embedded_only, eventually, throughout};

const A: &str = "https://example.com/a";
const B: &str = "https://example.com/b";
/// The contract, and a little for a machine that does other things meanwhile.
const SOON: Duration = Duration::from_millis(1500);

fn outcome(answer: &Answer) -> (u16, Option<&str>) {
    (answer.status, answer.location())
}

/// Connections that the kernel spreads over all workers.
fn connections(server: &Server) -> Vec<Client> {
    (0..8).map(|_| server.connect()).collect()
}

fn edit(target: &str) -> Change {
    let target = Some((target.to_owned(), Target::new(target).unwrap()));
    Change::Edit(Box::new(Patch { target, ..Patch::default() }))
}

#[test]
fn a_change_by_another_process_shows_within_a_second() {
    let (setup, server) = Server::new("");
    let store = setup.store();
    let mut clients = connections(&server);
    store.add("code", A, |_| {});
    let mut check = |change: Option<Change>, old: (u16, Option<&str>), new: (u16, Option<&str>)| {
        // Hot on every worker.
        for client in &mut clients {
            (0..5).for_each(|_| assert_eq!(outcome(&client.get("/code")), old));
        }
        match change {
            Some(change) => store.change("code", change),
            None => store.add("code", A, |_| {}),
        }
        let mut seen = false;
        eventually(SOON, &format!("{new:?} after {old:?}"), || {
            let mut all = true;
            for client in &mut clients {
                let answer = client.get("/code");
                let is_new = outcome(&answer) == new;
                assert!(is_new || outcome(&answer) == old, "neither old nor new: {answer:?}");
                assert!(is_new || !seen, "the old value after the new one: {answer:?}");
                seen |= is_new;
                all &= is_new;
            }
            all
        });
    };
    let (gone, a, b) = ((410, None), (307, Some(A)), (307, Some(B)));
    let patch = |patch: Patch| Some(Change::Edit(Box::new(patch)));
    check(Some(edit(B)), a, b);
    check(Some(edit(A)), b, a);
    check(Some(Change::Disable), a, gone);
    check(Some(Change::Enable), gone, a);
    check(patch(Patch { status: Some(Some(301)), ..Patch::default() }), a, (301, Some(A)));
    check(patch(Patch { status: Some(None), ..Patch::default() }), (301, Some(A)), a);
    check(patch(Patch { expires_at: Some(Some(UnixMillis(1))), ..Patch::default() }), a, gone);
    check(patch(Patch { expires_at: Some(None), ..Patch::default() }), gone, a);
    check(patch(Patch { max_visits: Some(Some(0)), ..Patch::default() }), a, gone);
    check(patch(Patch { max_visits: Some(None), ..Patch::default() }), gone, a);
    check(Some(Change::Delete), a, gone);
    check(None, gone, a);
}

#[test]
fn a_code_that_was_unknown_is_found_once_it_is_there() {
    // Nothing but the feed can end what is remembered as unknown.
    let (setup, server) = Server::new("[cache]\nnegative_ttl = \"1h\"");
    let store = setup.store();
    let mut clients = connections(&server);
    for client in &mut clients {
        (0..3).for_each(|_| assert_eq!(client.get("/another").status, 404));
        (0..3).for_each(|_| assert_eq!(client.get("/own").status, 404));
    }
    store.add("another", A, |_| {});
    eventually(SOON, "another process's link is found", || {
        clients.iter_mut().all(|client| client.get("/another").status == 307)
    });
    // One of its own is found at once, on every worker.
    server.custom("own", B);
    for client in &mut clients {
        assert_eq!(outcome(&client.get("/own")), (307, Some(B)));
    }
}

#[test]
fn ten_thousand_changes_at_once_do_not_delay_one() {
    let (setup, server) = Server::new("");
    let store = setup.store();
    store.add("code", A, |_| {});
    let mut client = server.connect();
    (0..5).for_each(|_| assert_eq!(outcome(&client.get("/code")), (307, Some(A))));
    let links = (0..10_000).map(|number| {
        let key = crate::support::key(store.domain(""), &format!("bulk-{number}"));
        (key, crate::support::Direct::fields(B))
    });
    store.add_all(links.collect());
    store.change("code", edit(B));
    eventually(SOON, "the edit shows", || outcome(&client.get("/code")) == (307, Some(B)));
    assert_eq!(outcome(&client.get("/bulk-9999")), (307, Some(B)));
}

/// Another process that holds the locks which readers of the log need (WAL_READ_LOCK of SQLite's WAL-index, bytes 123
/// to 127 of the shm file), as a hanging one would: no read transaction begins until it lets go. (The file's removal
/// or loss of its rights changes nothing for who has it open, and to cut it off would be SIGBUS under mmap.)
struct Hold(Child);

impl Hold {
    fn readers(setup: &Setup) -> Self {
        let script = "import fcntl, sys\n\
             f = open(sys.argv[1], 'r+b')\n\
             fcntl.lockf(f, fcntl.LOCK_EX, 5, 123)\n\
             print('held', flush=True)\n\
             sys.stdin.read()";
        let mut child = Command::new("python3")
            .args(["-c", script])
            .arg(setup.data().join("waypost.db-shm"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 is there: script/setup installs it");
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "held\n");
        Self(child)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn while_the_store_is_away_what_is_in_memory_goes_on() {
    if embedded_only("its files are locked") {
        return;
    }
    let (setup, server) = Server::new("");
    let code = server.warm(A);
    let path = format!("/{code}");
    let hold = Hold::readers(&setup);
    eventually(LIMIT, "it is noticed", || server.get("/readyz").json()["degraded"] == json!(["store"]));
    let mut client = server.connect();
    for _ in 0..20 {
        assert_eq!(outcome(&client.get(&path)), (307, Some(A)));
    }
    let ready = client.get("/readyz");
    assert_eq!((ready.status, &ready.json()["status"]), (200, &json!("degraded")), "{ready:?}");
    let required = client.get("/readyz?require=store");
    assert_eq!(required.status, 503, "{required:?}");
    assert!(required.header("retry-after").is_some(), "{required:?}");
    assert_eq!(server.metric("waypost_degraded", &["reason=\"store\""]), 1.0);
    for unknown in ["/unknown", "/unknown", "/another/"] {
        let answer = client.get(unknown);
        assert_eq!(answer.status, 503, "it cannot be known: {answer:?}");
        assert!(answer.header("retry-after").is_some(), "{answer:?}");
        assert_eq!(answer.header("cache-control"), Some("no-store"), "{answer:?}");
    }
    assert_eq!(client.get("/healthz").status, 200);
    drop(hold);
    eventually(2 * LIMIT, "it is back", || server.get("/readyz?require=store").status == 200);
    eventually(2 * LIMIT, "what is unknown is unknown again", || server.get("/unknown").status == 404);
    assert_eq!(outcome(&client.get(&path)), (307, Some(A)));
    server.link(B);
    let log = server.stop();
    let said = |part: &str| log.iter().filter(|line| line.contains(part)).count();
    assert_eq!((said("the store does not answer"), said("the store answers again")), (1, 1), "{log:?}");
}

#[test]
fn what_is_in_memory_is_not_believed_for_ever() {
    if embedded_only("its files are locked") {
        return;
    }
    let (setup, server) = Server::new("[cache]\nttl = \"1s\"\nstale_max = \"3s\"");
    let path = format!("/{}", server.warm(A));
    let hold = Hold::readers(&setup);
    let held = time::monotonic();
    let mut client = server.connect();
    let mut stale = false;
    eventually(LIMIT, "too old to be served", || {
        let answer = client.get(&path);
        let age = time::monotonic().duration_since(held);
        assert!(matches!(answer.status, 307 | 503), "{answer:?}");
        assert!(answer.status == 307 || age > Duration::from_secs(2), "given up after {age:?}");
        stale |= server.get("/readyz").json()["degraded"] == json!(["store", "stale"]);
        answer.status == 503
    });
    assert!(stale, "readyz did not name what it serves as stale");
    drop(hold);
    eventually(2 * LIMIT, "it is back", || client.get(&path).status == 307);
}

/// A writer of another process that does not end: creating waits, then says so; reading goes on.
#[test]
fn while_another_process_writes_reading_goes_on() {
    if embedded_only("it has one writer at a time") {
        return;
    }
    let (setup, server) = Server::new("");
    server.custom("known", A);
    let other = rusqlite::Connection::open(setup.data().join("waypost.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let mut creating = server.connect();
    let bearer = format!("Bearer {}", server.admin_key());
    let headers = [("Content-Type", "application/json"), ("Authorization", bearer.as_str())];
    creating.send(crate::support::request(
        "POST",
        "/shorten",
        &headers,
        br#"{"original_url": "https://example.com/"}"#,
    ));
    throughout(Duration::from_secs(1), || {
        assert_eq!(server.get("/known").status, 307);
        assert_eq!(server.get("/unknown").status, 404);
    });
    let refused = creating.answer();
    assert_eq!(refused.status, 503, "{refused:?}");
    assert!(refused.header("retry-after").is_some(), "{refused:?}");
    other.execute_batch("ROLLBACK").unwrap();
    server.link(B);
}

#[test]
fn what_the_command_line_changes_shows_in_a_running_server() {
    let (setup, server) = Server::new("");
    let mut client = server.connect();
    let mut check = |arguments: &[&str], want: (u16, Option<&str>)| {
        // In memory as it is now, be it as unknown.
        (0..4).for_each(|_| drop(client.get("/code")));
        let output = setup.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        eventually(SOON, &format!("{arguments:?}"), || outcome(&client.get("/code")) == want);
    };
    check(&["link", "add", A, "--code", "code"], (307, Some(A)));
    check(&["link", "edit", "code", "--url", B], (307, Some(B)));
    check(&["link", "disable", "code"], (410, None));
    check(&["link", "enable", "code"], (307, Some(B)));
    check(&["link", "edit", "code", "--status", "301"], (301, Some(B)));
    check(&["link", "rm", "code"], (410, None));
    check(&["link", "add", A, "--code", "code"], (307, Some(A)));
}
