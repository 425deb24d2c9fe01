//! The commands, each seen through another one: the real binary, a folder of its own, no environment of ours.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::support::{Kept, Setup, TESTED, Tested, clean, embedded_only};

/// A folder with a configuration; the embedded store lies in `data` within.
struct Place {
    folder: TempDir,
    kept: Kept,
}

#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Place {
    fn bare(config: &str) -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap(), kept: Kept::new() };
        place.configure(config);
        place
    }

    fn new() -> Self {
        let place = Self::bare("base_url = \"https://go.test\"\n[[domains]]\nhost = \"other.test\"\n");
        place.ok(place.kept.migrate());
        place
    }

    fn configure(&self, config: &str) {
        self.file("waypost.toml", self.kept.configuration(config));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn file(&self, name: &str, text: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_waypost"));
        clean(&mut command);
        command.args(arguments).current_dir(self.folder.path()).env("WAYPOST_DATA", self.path("data"));
        command
    }

    fn run_with(&self, arguments: &[&str], input: &[u8]) -> Ended {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // One that does not read its input is no failure of ours.
        let _ = child.stdin.take().unwrap().write_all(input);
        let output = child.wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().trim_end().to_owned();
        Ended { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }

    fn run(&self, arguments: &[&str]) -> Ended {
        self.run_with(arguments, b"")
    }

    #[track_caller]
    fn ok(&self, arguments: &[&str]) -> String {
        let ended = self.run(arguments);
        assert_eq!(ended.code, Some(0), "{arguments:?}: {ended:?}");
        ended.out
    }

    #[track_caller]
    fn json(&self, arguments: &[&str]) -> Value {
        self.json_of(&[arguments, &["--json"]].concat())
    }

    #[track_caller]
    fn json_of(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(arguments)).unwrap()
    }

    /// The exit code, and what stands in stderr.
    #[track_caller]
    fn check(&self, arguments: &[&str], code: i32, want: &[&str]) {
        let ended = self.run(arguments);
        assert_eq!(ended.code, Some(code), "{arguments:?}: {ended:?}");
        for want in want {
            assert!(ended.err.contains(want), "{arguments:?}: {want:?} is not in {}", ended.err);
        }
    }

    /// Code and target of each link, by id.
    fn links(&self) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let list = self.json(&["link", "ls"]);
        list.as_array().unwrap().iter().map(|link| (text(&link["code"]), text(&link["target"]))).collect()
    }
}

#[test]
fn exit_codes() {
    let bare = Place::bare("");
    let here = if *TESTED == Tested::Embedded { "there is no store at" } else { "store postgres://" };
    for arguments in
        [&["link", "ls"][..], &["link", "add", "https://example.com/"], &["key", "list"], &["export"], &["import", "-"]]
    {
        bare.check(arguments, 78, &["using ./waypost.toml, store ", here, "waypost migrate"]);
    }
    assert!(!bare.path("data").exists());
    let place = Place::new();
    for (arguments, code, want) in [
        (&["--help"][..], 0, &[][..]),
        (&[], 2, &["Usage"]),
        (&["frobnicate"], 2, &["frobnicate"]),
        (&["link", "add", "https://a.test/", "--max-visits=-1"], 2, &["--max-visits"]),
        (&["link", "add", "https://a.test/", "--max-visits", "9223372036854775808"], 2, &["9223372036854775807"]),
        (&["link", "edit", "abc"], 2, &["nothing is to be changed"]),
        (&["import", "x.csv", "--format", "xml"], 2, &["csv and ndjson"]),
        (&["import", "x.csv"], 1, &["cannot read x.csv"]),
        (&["key", "create"], 2, &["--scope"]),
        (&["key", "create", "--scope", "root"], 2, &["unknown scope \"root\""]),
        (&["key", "create", "--scope", "admin", "--expires", "soon"], 2, &["\"soon\" is no time"]),
        (&["key", "create", "--scope", "admin", "--expires", "2001-01-01"], 2, &["is over"]),
        (&["key", "revoke", "abcdefgh"], 1, &["there is no key abcdefgh"]),
        (&["link", "show", "nothing"], 1, &["there is no link nothing"]),
        (&["link", "rm", "nothing"], 1, &["there is no link nothing"]),
        (&["link", "show", "a/b"], 1, &["code: "]),
        (&["link", "show", "abc", "--domain", "nowhere.test"], 1, &["nowhere.test", "[[domains]]"]),
        (&["link", "ls", "--domain", "nowhere.test"], 1, &["nowhere.test"]),
        (&["link", "ls", "--config", "none.toml"], 78, &["none.toml"]),
    ] {
        place.check(arguments, code, want);
    }
    // Everything that is wrong at once.
    place.check(
        &["link", "add", "nowhere", "--code", "api", "--status", "200", "--expires", "soon"],
        1,
        &["\n  url: ", "\n  code: ", "\n  status: 200 is none of", "\n  expires_at: "],
    );
    assert_eq!(place.links(), []);
}

#[test]
fn a_link_s_life() {
    let place = Place::new();
    let state = |code: &str| place.json(&["link", "show", code])["state"].clone();
    assert_eq!(place.ok(&["link", "add", "https://a.test", "--code", "abc"]), "https://go.test/abc");
    assert_eq!(
        place.ok(&["link", "add", "https://b.test", "--code", "abc", "--domain", "other.test"]),
        "https://other.test/abc"
    );
    place.check(&["link", "add", "https://a.test", "--code", "abc"], 1, &["the code is taken"]);
    assert_eq!(place.ok(&["link", "add", "https://c.test"]).len(), "https://go.test/1234567".len());

    let full = place.json(&[
        "link",
        "add",
        "https://full.test/x",
        "--code",
        "-full",
        "--title",
        "-t",
        "--tag",
        "b",
        "--tag",
        "a",
        "--status",
        "301",
        "--starts",
        "2020-01-01",
        "--expires",
        "2999-01-31T09:00:00+01:00",
        "--expired-url",
        "https://over.test/",
        "--max-visits",
        "5",
        "--cache-control",
        "no-store",
        "--forward-query",
        "false",
        "--note",
        "n\nm",
    ]);
    for (field, want) in [
        ("short_url", json!("https://go.test/-full")),
        ("state", json!("on")),
        ("url", json!("https://full.test/x")),
        ("title", json!("-t")),
        ("tags", json!(["a", "b"])),
        ("status", json!(301)),
        ("starts_at", json!("2020-01-01T00:00:00Z")),
        ("expires_at", json!("2999-01-31T08:00:00Z")),
        ("expired_url", json!("https://over.test/")),
        ("max_visits", json!(5)),
        ("cache_control", json!("no-store")),
        ("forward_query", json!(false)),
        ("note", json!("n\nm")),
        ("domain", Value::Null),
    ] {
        assert_eq!(full[field], want, "{field}");
    }
    assert_eq!(place.json_of(&["link", "show", "--json", "--", "-full"]), full);
    assert!(place.ok(&["link", "show", "--", "-full"]).contains("\ntarget           https://full.test/x\n"));

    // An empty value clears.
    let cleared = place.json_of(&[
        "link",
        "edit",
        "--json",
        "--url",
        "https://new.test",
        "--title=",
        "--tag=",
        "--status=",
        "--starts=",
        "--expires=",
        "--expired-url=",
        "--max-visits=",
        "--cache-control=",
        "--forward-query=",
        "--note=",
        "--",
        "-full",
    ]);
    let fields = ["title", "status", "starts_at", "expires_at", "expired_url", "max_visits", "cache_control", "note"];
    for field in fields.into_iter().chain(["forward_query"]) {
        assert_eq!(cleared[field], Value::Null, "{field}");
    }
    assert_eq!((&cleared["tags"], &cleared["target"]), (&json!([]), &json!("https://new.test/")));

    for (action, says, want) in [("disable", "abc is disabled", "disabled"), ("enable", "abc is enabled", "on")] {
        assert_eq!(place.ok(&["link", action, "abc"]), says);
        assert_eq!(state("abc"), want);
    }
    place.ok(&["link", "edit", "abc", "--expires", "2020-01-01"]);
    assert_eq!(state("abc"), "expired");
    place.ok(&["link", "edit", "abc", "--expires", "", "--starts", "90d"]);
    assert_eq!(state("abc"), "not yet");
    assert_eq!(place.ok(&["link", "rm", "abc"]), "abc is deleted");
    for action in ["show", "rm", "enable"] {
        place.check(&["link", action, "abc"], 1, &["the link abc was deleted at 20"]);
    }
    assert_eq!(place.json(&["link", "show", "abc", "--domain", "other.test"])["target"], "https://b.test/");
    // Its code is free for those who ask for it.
    place.ok(&["link", "add", "https://again.test", "--code", "abc"]);
    assert_eq!(place.json(&["link", "show", "abc"])["target"], "https://again.test/");
}

#[test]
fn lists_and_their_filters() {
    let place = Place::new();
    for (code, domain, tag) in [("one", "", "x"), ("two", "", "y"), ("three", "other.test", "x")] {
        let url = format!("https://{code}.test/{}", "p".repeat(100));
        place.ok(&["link", "add", &url, "--code", code, "--domain", domain, "--tag", tag]);
    }
    for (flags, want) in [
        (&[][..], &["one", "two", "other.test/three"][..]),
        (&["--tag", "x"], &["one", "other.test/three"]),
        (&["--search", "TWO"], &["two"]),
        (&["--domain", ""], &["one", "two"]),
        (&["--domain", "Other.test"], &["other.test/three"]),
        (&["--tag", "x", "--domain", "other.test"], &["other.test/three"]),
        (&["--limit", "2"], &["one", "two"]),
        (&["--limit", "0"], &[]),
        (&["--search", "none"], &[]),
    ] {
        let list = place.ok(&[&["link", "ls"], flags].concat());
        let codes: Vec<_> = list.lines().filter_map(|line| line.split_whitespace().next()).collect();
        assert_eq!(codes, want, "{flags:?}");
        assert_eq!(place.json(&[&["link", "ls"], flags].concat()).as_array().unwrap().len(), want.len(), "{flags:?}");
        if !flags.contains(&"--limit") {
            let exported = place.ok(&[&["export"], flags].concat());
            assert_eq!(exported.lines().count(), 1 + want.len(), "{flags:?}");
        }
    }
    // Where stdout is no terminal, nothing is cut.
    assert!(place.ok(&["link", "ls"]).contains(&"p".repeat(100)));
}

#[test]
fn a_list_longer_than_a_page_and_a_reader_that_goes() {
    let place = Place::new();
    let file: String = (0..2_500).map(|number| format!("c{number},https://a.test/{number}\n")).collect();
    place.file("many.csv", format!("code,url\n{file}"));
    let out = place.ok(&["import", "many.csv"]);
    assert_eq!(out, "imported 2,500, updated 0, skipped 0, refused 0 of 2,500 lines");
    let codes: Vec<String> = place.links().into_iter().map(|(code, _)| code).collect();
    assert_eq!(codes, (0..2_500).map(|number| format!("c{number}")).collect::<Vec<_>>());
    assert_eq!(place.ok(&["link", "ls", "--limit", "1001"]).lines().count(), 1001);
    for arguments in [&["export"][..], &["link", "ls"], &["link", "ls", "--json"]] {
        let mut child = place.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut first = [0];
        child.stdout.take().unwrap().read_exact(&mut first).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {output:?}");
    }
}

#[test]
fn what_is_exported_is_imported_as_it_was() {
    let place = Place::new();
    let link = |arguments: &[&str]| place.ok(&[&["link", "add"], arguments].concat());
    link(&["HTTPS://A.test", "--code", "plain"]);
    link(&[
        "https://b.test/?a=b,c",
        "--code=-dash",
        "--title",
        "=1+1",
        "--note",
        "two\nlines, \"quoted\"",
        "--tag",
        "é",
    ]);
    link(&["https://c.test", "--code", "c", "--domain", "other.test", "--title", "'=x", "--expires", "2999-01-01"]);
    link(&[
        "https://d.test",
        "--status",
        "308",
        "--max-visits",
        "3",
        "--forward-query",
        "true",
        "--starts",
        "2020-01-01",
    ]);
    for name in ["out.csv", "out.ndjson", "out.jsonl"] {
        let says = place.ok(&["export", name]);
        assert_eq!(says, format!("exported 4 links to {name}"));
        assert!(!place.path(&format!("{name}.part")).exists());
        let file = std::fs::read(place.path(name)).unwrap();
        assert_eq!(file.first(), Some(if name == "out.csv" { &b'c' } else { &b'{' }), "{name}");
        let other = Place::new();
        other.file(name, &file);
        assert!(other.ok(&["import", name]).starts_with("imported 4, updated 0"), "{name}");
        other.ok(&["export", name]);
        assert_eq!(String::from_utf8(std::fs::read(other.path(name)).unwrap()), String::from_utf8(file), "{name}");
    }
    let csv = place.ok(&["export", "--format", "csv"]);
    assert_eq!(csv, std::fs::read_to_string(place.path("out.csv")).unwrap().trim_end());
    assert!(csv.contains("\n'-dash,"), "{csv}");
    place.check(&["export", "no/such/folder.csv"], 1, &["no/such/folder.csv.part"]);
}

#[test]
fn lines_that_are_refused() {
    let place = Place::new();
    place.file(
        "bad.csv",
        [
            &b"code,url,status,max_visits,note\n"[..],
            b"good1,https://a.test/,,,\n",
            b"api,https://a.test/,,,\n",
            b"x,nowhere,200,many,\n",
            b"y,https://a.test/\n",
            b"z,https://a.test/,,,\xff\n",
            b"long,https://a.test/,,,\"",
            &b"n\n".repeat(40_000),
            b"\"\n",
            b"w,,404,,\n",
            b"good2,https://a.test/,,,\n",
        ]
        .concat(),
    );
    let ended = place.run(&["import", "bad.csv"]);
    assert_eq!(ended.code, Some(1));
    assert_eq!(ended.out, "imported 2, updated 0, skipped 0, refused 6 of 8 lines");
    let lines: Vec<&str> = ended.err.lines().filter(|line| line.starts_with("line ")).collect();
    let want = [
        "line 3: code: api is an address of the server itself",
        "line 4: max_visits: \"many\" is no whole number",
        "line 5: it has 2 cells, and the first line names 5 columns",
        "line 6: note: it is not UTF-8",
        "line 7: it has 80025 bytes, and 65536 is the most",
        "line 40008: url: a link needs a target",
        "line 40008: status: 404 is none of",
    ];
    assert_eq!(lines.len(), want.len(), "{lines:#?}");
    for (line, want) in lines.iter().zip(want) {
        assert!(line.starts_with(want), "{line}");
    }
    assert!(ended.err.ends_with("6 lines were refused: their reasons stand above"), "{}", ended.err);
    let codes: Vec<String> = place.links().into_iter().map(|(code, _)| code).collect();
    assert_eq!(codes, ["good1", "good2"]);

    for (file, want) in [
        ("", "the file is empty"),
        ("https://a.test/\n", "unknown columns \"https://a.test/\""),
        ("code,long_url\n", "unknown columns \"long_url\": the first line names the columns, which are code, url"),
        ("code\nx\n", "there is no column url"),
    ] {
        let ended = place.run_with(&["import", "-"], file.as_bytes());
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.err.contains(want), "{}", ended.err);
    }
    let ended = place.run_with(&["import", "-", "--format", "ndjson"], b"{\"url\": \"https://n.test\", \"x\": 1}\n");
    assert!(ended.err.contains("line 1: unknown field `x`, expected one of `code`, `url`"), "{}", ended.err);
}

/// Lines whose codes are taken: by a link that is there, by one that is disabled or deleted, by a line before.
#[test]
fn conflicts_and_what_a_dry_run_foresees() {
    let file = "code,url\nnew,https://new.test/\nhave,https://2.test/\noff,https://2.test/\ngone,https://2.test/\n\
                new,https://3.test/\n,https://generated.test/\n";
    let place_with_links = || {
        let place = Place::new();
        for code in ["have", "off", "gone"] {
            place.ok(&["link", "add", "https://1.test/", "--code", code]);
        }
        place.ok(&["link", "disable", "off"]);
        place.ok(&["link", "rm", "gone"]);
        place.file("file.csv", file);
        place
    };
    for (on_conflict, code, counts, want) in [
        ("fail", 1, [3, 0, 0, 3], [("have", "1"), ("off", "1"), ("new", "new"), ("gone", "2")]),
        ("skip", 0, [3, 0, 3, 0], [("have", "1"), ("off", "1"), ("new", "new"), ("gone", "2")]),
        ("update", 0, [3, 3, 0, 0], [("have", "2"), ("off", "2"), ("new", "3"), ("gone", "2")]),
    ] {
        let place = place_with_links();
        let before = place.links();
        for dry_run in [true, false] {
            let mut arguments = vec!["import", "file.csv", "--json", "--on-conflict", on_conflict];
            arguments.extend(dry_run.then_some("--dry-run"));
            let ended = place.run(&arguments);
            assert_eq!(ended.code, Some(code), "{on_conflict}: {ended:?}");
            let got: Value = serde_json::from_str(&ended.out).unwrap();
            let [imported, updated, skipped, refused] = counts;
            let want = json!({"dry_run": dry_run, "lines": 6, "imported": imported, "updated": updated,
                "skipped": skipped, "refused": refused});
            assert_eq!(got, want, "{on_conflict}");
            let mut lines: Vec<&str> = ended.err.lines().filter(|line| line.starts_with("line ")).collect();
            lines.sort_unstable();
            let refused = ["line 3: code: have is taken", "line 4: code: off is taken", "line 6: code: new is taken"];
            assert_eq!(lines.len(), if on_conflict == "fail" { 3 } else { 0 }, "{on_conflict}: {lines:?}");
            assert!(lines.iter().zip(refused).all(|(line, want)| line.starts_with(want)), "{lines:?}");
            if dry_run {
                assert_eq!(place.links(), before, "{on_conflict}");
            }
        }
        let links = place.links();
        assert_eq!(links.len(), 5, "{on_conflict}: {links:?}");
        for (code, host) in want {
            assert!(links.contains(&(code.to_owned(), format!("https://{host}.test/"))), "{on_conflict}: {links:?}");
        }
        // What the file says replaces fields; that a link is disabled is none of them.
        assert_eq!(place.json(&["link", "show", "off"])["state"], "disabled");
    }
    let place = place_with_links();
    let says = place.run(&["import", "file.csv", "--dry-run"]).out;
    assert_eq!(says, "would have imported 3, updated 0, skipped 0, refused 3 of 6 lines");
}

#[test]
fn what_an_import_brings_along() {
    let place = Place::new();
    let line =
        "{\"code\": \"old\", \"url\": \"https://a.test\", \"created_at\": \"2019-05-01T12:00:00Z\", \"clicks\": 41}\n";
    let ended = place.run_with(&["import", "-", "--format", "ndjson"], line.as_bytes());
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let link = place.json(&["link", "show", "old"]);
    assert_eq!((&link["created_at"], &link["imported_clicks"]), (&json!("2019-05-01T12:00:00Z"), &json!(41)));
}

#[test]
fn keys() {
    let place = Place::new();
    assert_eq!(place.json(&["key", "list"]), json!([]));
    let ended = place.run(&["key", "create", "--scope", "links:read,links:write", "--name", "ci", "--expires", "90d"]);
    let (key, id) = (&ended.out, &ended.out[3..11]);
    assert!(ended.code == Some(0) && key.starts_with("wp_") && key.len() == 44, "{ended:?}");
    assert!(!ended.err.contains(&key[12..]), "{}", ended.err);
    let other = place.json(&["key", "create", "--scope", "admin", "--per-minute", "7"]);
    assert_eq!(
        (&other["scopes"], &other["per_minute"], &other["state"]),
        (&json!(["admin"]), &json!(7), &json!("valid"))
    );

    let list = place.json(&["key", "list"]);
    let of = |list: &Value, id: &str| list.as_array().unwrap().iter().find(|key| key["id"] == id).unwrap().clone();
    let listed = of(&list, id);
    assert_eq!((&listed["name"], &listed["scopes"]), (&json!("ci"), &json!(["links:read", "links:write"])));
    assert_eq!((&listed["revoked_at"], &listed["state"]), (&Value::Null, &json!("valid")));
    assert!(listed["expires_at"].as_str().is_some(), "{listed}");
    for shown in [place.ok(&["key", "list"]), list.to_string()] {
        assert!(shown.contains(id) && !shown.contains(&key[12..]), "{shown}");
    }

    assert_eq!(place.ok(&["key", "revoke", id]), format!("{id} is revoked"));
    assert_eq!(of(&place.json(&["key", "list"]), id)["state"], "revoked");
    assert!(place.ok(&["key", "revoke", id]).starts_with(&format!("{id} was revoked before, at 20")));
    // A whole key is understood, and its secret not repeated.
    let whole = other["key"].as_str().unwrap();
    assert_eq!(place.ok(&["key", "revoke", whole]), format!("{} is revoked", &whole[3..11]));
}

#[test]
fn migrations() {
    if embedded_only("they make its file") {
        return;
    }
    let place = Place::bare("");
    let store = place.path("data/waypost.db");
    for flag in ["--dry-run", "--status"] {
        let says = place.ok(&["migrate", flag]);
        assert!(says.contains("there is no store at") && says.contains("migration 1 (links)"), "{flag}: {says}");
        assert!(!place.path("data").exists(), "{flag}");
    }
    let lacked = place.json(&["migrate", "--status"])["pending"].clone();
    assert_eq!(place.json(&["migrate"])["applied"], lacked);
    assert!(store.exists());
    assert_eq!(place.ok(&["migrate"]), "the schema is up to date");
    assert_eq!(place.ok(&["migrate", "--dry-run"]), "the schema is up to date");
    assert!(place.ok(&["migrate", "--status"]).contains("applied migration 1 (links)"));
    assert_eq!(place.links(), []);
    // Another program's database stays as it is.
    let other = Place::bare("");
    std::fs::create_dir(other.path("data")).unwrap();
    other.file("data/waypost.db", "not a database, and longer than the head of one would have to be, to be sure of it");
    let ended = other.run(&["migrate"]);
    assert_ne!(ended.code, Some(0), "{ended:?}");
    assert!(std::fs::read(other.path("data/waypost.db")).unwrap().starts_with(b"not a database"));
}

#[test]
fn configurations() {
    let place = Place::bare("");
    // Without Postgres: the URL has a password, which is not printed.
    place.file("waypost.toml", "base_url = \"https://go.test\"\n");
    assert_eq!(place.ok(&["config", "check"]), "ok: ./waypost.toml");
    assert_eq!(place.json(&["config", "check"]), json!({"ok": true, "file": "./waypost.toml"}));
    let printed = place.ok(&["config", "print"]);
    assert!(printed.contains("base_url = \"https://go.test\"  # ./waypost.toml:1"), "{printed}");
    assert!(printed.contains("# WAYPOST_DATA"), "{printed}");
    assert_eq!(place.json(&["config", "print"])["redirect"]["status"], 307);
    // What is printed is a configuration, and the same.
    place.file("printed.toml", printed);
    assert_eq!(place.json(&["config", "print", "--config", "printed.toml"]), place.json(&["config", "print"]));

    for (config, want) in [
        ("base_url = 5\ncodes.length = 1\nbase_ur = 1\n", &["base_url", "codes.length", "base_ur"][..]),
        ("targets.blocklist = \"no-such-file\"\n", &["no-such-file"]),
        ("this is no toml", &["waypost.toml:1"]),
    ] {
        let wrong = Place::bare(config);
        for action in ["check", "print"] {
            // Printing needs no block list.
            if action == "check" || !config.contains("blocklist") {
                wrong.check(&["config", action], 78, want);
            }
        }
    }
    // Fixed when a store is made.
    let store = Place::new();
    store.ok(&["link", "add", "https://a.test"]);
    store.configure("codes.alphabet = \"base58\"\n");
    store.check(&["link", "add", "https://a.test"], 78, &["codes.alphabet", "fixed when a store is made"]);
}

#[test]
fn the_status_of_a_running_server() {
    let setup = Setup::new("");
    let server = setup.start();
    let url = format!("http://{}", server.address());
    let ask = |arguments: &[&str]| {
        let output = setup.command(&[&["status"], arguments].concat()).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, out, err) = ask(&["--server", &url]);
    assert_eq!(code, Some(0), "{err}");
    for want in ["phase", "serving", "uptime seconds", "cache links"] {
        assert!(out.contains(want), "{out}");
    }
    let (_, out, _) = ask(&["--server", &url, "--json"]);
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["phase"], "serving");
    let (code, _, err) = ask(&["--server", &url, "--key", "wp_wrong"]);
    assert!(code == Some(1) && err.contains("401: this key is unknown"), "{err}");
    for (server, want) in [("https://127.0.0.1:1", "no address like http://"), ("nowhere", "no address like http://")] {
        let (code, _, err) = ask(&["--server", server]);
        assert!(code == Some(1) && err.contains(want), "{err}");
    }
    // Bound, and closed again: nobody listens there.
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (code, _, err) = ask(&["--server", &format!("http://{nobody}")]);
    assert!(code == Some(1) && err.contains(&format!("nothing answers at http://{nobody}")), "{err}");
}

/// A CSV of codes and targets says nothing of the other fields, so it changes nothing of them.
#[test]
fn an_update_changes_what_the_file_has() {
    let setup = Setup::new("");
    let ok = |arguments: &[&str]| {
        let output = setup.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    setup.migrate();
    ok(&[
        "link",
        "add",
        "https://e.com/old",
        "--code",
        "a",
        "--title",
        "Kept",
        "--cache-control",
        "no-cache",
        "--tag",
        "t",
    ]);
    let file = setup.path("links.csv");
    std::fs::write(&file, "code,url\na,https://e.com/new\n").unwrap();
    ok(&["import", file.to_str().unwrap(), "--on-conflict", "update"]);
    let shown = ok(&["link", "show", "a", "--json"]);
    for kept in ["https://e.com/new", "Kept", "no-cache", "\"t\""] {
        assert!(shown.contains(kept), "{kept}: {shown}");
    }
}

/// The database has every target and note, and the key of the permutation.
#[test]
fn nobody_else_reads_the_store() {
    use std::os::unix::fs::PermissionsExt;
    if embedded_only("it is a file") {
        return;
    }
    let setup = Setup::new("");
    setup.migrate();
    let mode = std::fs::metadata(setup.data()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}
