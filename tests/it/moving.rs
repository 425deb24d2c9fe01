//! `waypost import --from-embedded` and `waypost migrate`, from an embedded store into Postgres.

use rusqlite::Connection;
use serde_json::{Value, json};
use waypost::domain::key::DomainId;
use waypost::domain::link::LinkId;
use waypost::domain::time;
use waypost::store::Store;
use waypost::store::postgres::Postgres;
use waypost::store::row::{QuotaAsk, Taken};
use waypost::store::sqlite;

use super::servers::PASSWORD;
use super::servers::postgres::{Database, Postgres as Cluster, ROLE};
use super::support::{LIMIT, eventually, key};
use super::warm::{Place, ask, open};

const DOMAINS: &str = "base_url = \"https://go.test\"\n[[domains]]\nhost = \"other.test\"\n";

/// An embedded store with a link of every kind.
fn source() -> Place {
    let place = Place::new(DOMAINS);
    place.ok(&["migrate"]);
    let link = |arguments: &[&str]| place.ok(&[&["link", "add"], arguments].concat());
    link(&["HTTPS://A.test/ü", "--code", "plain"]);
    link(&[
        "https://b.test/",
        "--code",
        "full",
        "--title",
        "T",
        "--note",
        "n\nm",
        "--tag",
        "b",
        "--tag",
        "Ä",
        "--tag",
        "a",
    ]);
    link(&[
        "https://c.test/",
        "--code",
        "plain",
        "--domain",
        "other.test",
        "--status",
        "301",
        "--cache-control",
        "no-store",
    ]);
    link(&["https://d.test/", "--code", "some", "--max-visits", "3", "--forward-query", "true"]);
    link(&["https://e.test/", "--code", "times", "--starts", "2020-01-01", "--expires", "2999-01-01"]);
    link(&["https://f.test/", "--code", "off", "--expired-url", "https://g.test/"]);
    link(&["https://h.test/", "--code", "gone"]);
    link(&["https://i.test/"]);
    place.ok(&["link", "disable", "off"]);
    place.ok(&["link", "rm", "gone"]);
    place.ok(&["pin", "plain", "full"]);
    let (store, some) = (open(&place.data()), key(DomainId(0), "some"));
    let link = ask(store.link(some)).unwrap();
    let one = QuotaAsk { key: some, id: link.id, wanted: 1, waiting: 1, lease: 0, settled: Vec::new() };
    assert!(matches!(ask(store.take_visits(one, time::now())), Taken::Visits { .. }));
    std::fs::write(
        place.data().join("clicks.csv"),
        "code,url,clicks,created_at\nold,https://j.test/,41,2019-05-01T12:00:00Z\n",
    )
    .unwrap();
    place.ok(&["import", "data/clicks.csv"]);
    place.ok(&["key", "create", "--scope", "admin", "--name", "first"]);
    let revoked = place.json(&["key", "create", "--scope", "links:read", "--per-minute", "7"]);
    place.ok(&["key", "revoke", revoked["id"].as_str().unwrap()]);
    // Each link has ten visits on a day, and the core of a start that stored them gave up three more.
    let visits = Connection::open(place.data().join(sqlite::VISITS_FILE)).unwrap();
    visits
        .execute_batch(&format!(
            "ATTACH '{}' AS links;
             INSERT INTO link_totals SELECT id, 7, 1, 2, 0, 0, 1800000000000, 1800000000001, x'' FROM links.links;
             INSERT INTO link_days SELECT id, 20833, 7, 1, 2, 0, 0, 1800000000001, x'' FROM links.links;
             INSERT INTO spool_positions VALUES (-5, 1, 'one', 100, 90, 93, 1800000000000);
             INSERT INTO spool_drops VALUES (-5, 1, 'ring_full', 3);",
            place.data().join("waypost.db").display()
        ))
        .unwrap();
    place
}

/// A place whose commands use Postgres; no schema is in it yet.
fn target() -> (Place, Database) {
    let database = Cluster::shared().database();
    let config =
        format!("{DOMAINS}[postgres]\nurl = \"{}\"\nmigrate_url = \"{}\"\n", database.url(), database.owner_url());
    (Place::new(&config), database)
}

fn migrated() -> (Place, Database) {
    let (place, database) = target();
    place.ok(&["migrate", "--grants", ROLE]);
    (place, database)
}

/// Everything that the command line shows of a store.
fn shown(place: &Place) -> Vec<Value> {
    let mut all = vec![place.json(&["link", "ls"]), place.json(&["key", "list"])];
    for code in ["plain", "full", "some", "times", "off", "old"] {
        all.push(place.json(&["link", "show", code]));
        all.push(place.json(&["stats", code]));
        assert_eq!(all.last().unwrap()["total_clicks"], 8, "{all:?}");
    }
    all.push(place.json(&["link", "show", "plain", "--domain", "other.test"]));
    all
}

#[test]
fn migrations_of_postgres() {
    let (place, _database) = target();
    let here = "there is no store at postgres://(hidden)@127.0.0.1";
    for flag in ["--dry-run", "--status"] {
        let says = place.ok(&["migrate", flag]);
        assert!(says.contains(here) && says.contains(" migration 1 ("), "{flag}: {says}");
    }
    place.check(&["link", "ls"], 78, &["waypost migrate", "store postgres://(hidden)@127.0.0.1"]);
    let lacked = place.json(&["migrate", "--status"])["pending"].clone();
    assert!(place.ok(&["migrate", "--dry-run", "--grants", ROLE]).contains(&format!("would grant {ROLE}")));
    let done = place.json(&["migrate"]);
    assert_eq!((&done["applied"], &done["existed"]), (&lacked, &json!(false)));
    assert_eq!(place.ok(&["migrate"]), "the schema is up to date");
    // The role that serves has no rights yet.
    place.check(&["link", "ls"], 78, &["--grants"]);
    assert_eq!(
        place.ok(&["migrate", "--grants", ROLE]),
        format!("the schema is up to date\ngranted {ROLE} what a server needs")
    );
    assert_eq!(place.json(&["link", "ls"]), json!([]));
    place.check(&["migrate", "--grants", "no \"such\" role"], 1, &["such"]);
    place.check(&["migrate", "--grants", ROLE, "--status"], 2, &["--status"]);
    for ended in [place.run(&["migrate", "--json"]), place.run(&["config", "print"]), place.run(&["config", "check"])] {
        assert!(!ended.out.contains(PASSWORD) && !ended.err.contains(PASSWORD), "{ended:?}");
    }
    assert!(place.ok(&["config", "print"]).contains("url = \"postgres://(hidden)@127.0.0.1"));
    Place::new("").check(&["migrate", "--grants", ROLE], 2, &["the embedded store has no roles", "--postgres"]);
}

/// Whether the store answers or not, and where a URL has it.
#[test]
fn no_password_is_shown() {
    let secret = "s3cr3t@x";
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let place = Place::new("");
    for url in [format!("postgres://u:{secret}@{nobody}/d"), format!("postgres://u@{nobody}/d?password={secret}")] {
        for arguments in [
            &["config", "check"][..],
            &["config", "print"],
            &["config", "print", "--json"],
            &["link", "ls"],
            &["migrate"],
            &["migrate", "--status", "--json"],
            &["import", "--from-embedded", "."],
        ] {
            let mut command = place.command(arguments);
            command.args(["--postgres", &url, "--redis", &format!("redis://:{secret}@127.0.0.1")]);
            let output = command.output().unwrap();
            let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
            assert!(!said.contains("s3cr3t"), "{arguments:?}: {said}");
            assert!(said.contains("store postgres://"), "{arguments:?}: {said}");
            assert_eq!(output.status.success(), arguments[0] == "config", "{arguments:?}: {said}");
        }
    }
}

#[test]
fn everything_moves_once() {
    let source = source();
    let (target, database) = target();
    let data = source.data();
    let arguments = ["import", "--from-embedded", data.to_str().unwrap()];
    target.check(&arguments, 78, &["waypost migrate"]);
    target.ok(&["migrate", "--grants", ROLE]);

    let moved = target.json(&arguments);
    let side = json!({"links": 8, "deleted": 1, "keys": 2, "pins": 2, "visits": 90});
    assert_eq!(moved, json!({"moved": 9, "was_done": false, "embedded": side, "postgres": side}));
    assert_eq!(shown(&target), shown(&source));
    // What the spool keeps is not stored once more.
    assert_eq!(database.sql("SELECT * FROM spool_positions"), "-5|1|one|100|90|93|1800000000000");
    assert_eq!(database.sql("SELECT * FROM spool_drops"), "-5|1|ring_full|3");
    let exported = |place: &Place| place.ok(&["export", "--format", "ndjson"]);
    assert_eq!(exported(&target), exported(&source));
    target.check(&["link", "show", "gone"], 1, &["the link gone was deleted at"]);

    // Once more, and once more after the new store has gone on.
    let again = target.run(&arguments);
    assert!(again.code == Some(0) && again.out.starts_with("nothing was left to do"), "{again:?}");
    target.ok(&["link", "add", "https://new.test/", "--code", "gone"]);
    target.ok(&["link", "edit", "plain", "--url", "https://edited.test/"]);
    let again = target.json(&arguments);
    assert_eq!(
        (&again["moved"], &again["was_done"], &again["postgres"]["links"]),
        (&json!(0), &json!(true), &json!(9))
    );
    assert_eq!(target.json(&["link", "show", "plain"])["target"], "https://edited.test/");
    // The old one goes on, too: what is changed there is not lost silently.
    source.ok(&["link", "edit", "full", "--title", "late"]);
    target.check(&arguments, 1, &["was moved before, and was changed since", "--on-conflict skip"]);
}

/// It ended somewhere in the middle; what was moved by then stays, and is compared all the same.
#[test]
fn a_move_that_was_interrupted() {
    for edited in [false, true] {
        let source = source();
        let (target, database) = migrated();
        let data = source.data();
        let arguments = ["import", "--from-embedded", data.to_str().unwrap()];
        let config = waypost::config::load::load(
            &waypost::config::load::Flags { postgres: Some(database.url()), ..Default::default() },
            std::iter::empty::<(String, String)>(),
            waypost::config::load::read,
        )
        .unwrap()
        .config;
        let from = open(&data);
        ask(async {
            let to = Store::Postgres(Postgres::open(config.postgres.as_ref().unwrap())?);
            to.adopt_rest(from.rest().await?, false).await?;
            to.adopt(from.all(LinkId(0), 4).await?).await
        });
        if edited {
            source.ok(&["link", "edit", "full", "--title", "edited"]);
            target.check(&arguments, 1, &["the link full is not the same in both stores", "empty the database"]);
            // It says so until somebody does.
            target.check(&arguments, 1, &["the link full"]);
        } else {
            source.ok(&["link", "add", "https://late.test/", "--code", "late"]);
            let moved = target.json(&arguments);
            assert_eq!((&moved["moved"], &moved["was_done"]), (&json!(6), &json!(false)), "{moved}");
            assert_eq!(shown(&target), shown(&source));
        }
    }
}

#[test]
fn what_does_not_move() {
    let source = source();
    let data = source.data();
    let arguments = ["import", "--from-embedded", data.to_str().unwrap()];
    source.check(&arguments, 2, &["--from-embedded moves links into Postgres", "--postgres"]);
    source.check(&["import"], 2, &["FILE"]);
    source.check(&[&arguments[..], &["x.csv"]].concat(), 2, &["--from-embedded"]);
    source.check(&[&arguments[..], &["--dry-run"]].concat(), 2, &["--dry-run"]);
    let (target, _database) = migrated();
    target.check(&["import", "--from-embedded", "nowhere"], 78, &["there is no store at nowhere/waypost.db"]);
    // One that an older program made, and nobody has migrated since.
    let old = Place::new("");
    std::fs::create_dir(old.data()).unwrap();
    let db = Connection::open(old.data().join("waypost.db")).unwrap();
    let first = &sqlite::MIGRATIONS[0];
    db.execute_batch(&format!(
        "PRAGMA application_id = 0x77707374;
         CREATE TABLE schema_migrations (number INTEGER, name TEXT, checksum TEXT, applied_at TEXT);
         INSERT INTO schema_migrations VALUES (1, '{}', '{}', datetime());
         {}",
        first.name,
        first.checksum(),
        first.sql
    ))
    .unwrap();
    drop(db);
    let data_of_old = old.data();
    let wanted = "lacks migration 2";
    target.check(&["import", "--from-embedded", data_of_old.to_str().unwrap()], 78, &[wanted, "migrate --postgres ''"]);
    // The way out that it names.
    target.ok(&["migrate", "--postgres", "", "--data", data_of_old.to_str().unwrap()]);
    assert_eq!(target.json(&["import", "--from-embedded", data_of_old.to_str().unwrap()])["moved"], 0);
    let (target, _database) = migrated();
    // A server runs on it.
    let store = open(&data);
    ask(store.present("one".to_owned(), true, time::now()));
    target.check(&arguments, 1, &["a server uses", "stop it first"]);
    ask(store.present("one".to_owned(), false, time::now()));
    // A store of its own links takes none over.
    target.ok(&["link", "add", "https://own.test/", "--code", "own"]);
    let refused = target.run(&arguments);
    assert!(refused.code == Some(78), "{refused:?}");
    assert_eq!(target.json(&["link", "ls"]).as_array().unwrap().len(), 1);
}

/// It is killed; then links come in while it copies, and it says so at the end; what came is there once it has run again.
#[test]
fn a_move_that_is_killed_and_a_store_that_changes_meanwhile() {
    let source = source();
    let lines: String = (0..60_000).map(|number| format!("c{number},https://a.test/{number}\n")).collect();
    std::fs::write(source.data().join("many.csv"), format!("code,url\n{lines}")).unwrap();
    source.ok(&["import", "data/many.csv"]);
    let (target, database) = migrated();
    let data = source.data();
    let arguments = ["import", "--from-embedded", data.to_str().unwrap()];
    let moved = || database.sql("SELECT count(*) FROM links").parse::<u64>().unwrap();
    let copying = |had: u64| {
        let child = target.spawn(&arguments);
        eventually(LIMIT, "it copies", || moved() > had);
        child
    };

    let mut child = copying(0);
    child.kill().unwrap();
    assert_eq!(child.wait_with_output().unwrap().status.code(), None);
    let had = moved();
    assert!(had < 60_000, "it was done already: {had}");

    let child = copying(had);
    source.ok(&["link", "add", "https://late.test/", "--code", "late"]);
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("was changed while it was moved: stop the server") && said.contains("it resumes"), "{said}");

    let moved = target.json(&arguments);
    assert_eq!((&moved["was_done"], &moved["postgres"]["links"]), (&json!(false), &json!(60_009)), "{moved}");
    assert_eq!(target.json(&["link", "show", "late"])["target"], "https://late.test/");
}
