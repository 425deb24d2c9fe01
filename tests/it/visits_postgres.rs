//! The sink of visits over a real Postgres, also where it breaks: each batch is stored once or not at all, and the sink
//! says which of them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Runtime;
use waypost::config::{self, Migrate, ServiceUrl, Statements};
use waypost::domain::link::LinkId;
use waypost::domain::time::{self, UnixMillis};
use waypost::domain::visit::Class;
use waypost::stats::rollup::{self, DAY_MS, Day};
use waypost::stats::sketch::Sketch;
use waypost::store;
use waypost::store::postgres::{MIGRATIONS, grants, migrate};
use waypost::visits::agents::Agent;
use waypost::visits::batch::{Batch, Orphan, Range, Referrer, RequestId, Row};
use waypost::visits::sink::postgres::Postgres;
use waypost::visits::sink::{Failure, Settings, Tidied};
use waypost::visits::spool::segment::Tally;
use waypost::visits::spool::{Epoch, Source};
use waypost::visits::{Dropped, Drops};

use crate::servers::postgres::{self, Database, ROLE};
use crate::servers::proxy::{Mode, Proxy};
use crate::support::{LIMIT, eventually};

/// Its highest bit is set: the store has it as a negative number.
const EPOCH: Epoch = Epoch(0xfedc_ba98_7654_3210);
const SOURCE: Source = Source { epoch: EPOCH, core: 3 };
const KEEP: Duration = Duration::from_secs(90 * 86_400);

struct Trial {
    runtime: Runtime,
    database: Database,
    proxy: Proxy,
}

impl Trial {
    /// A store of its own, behind a network that can be broken; the role that is used owns nothing.
    fn new() -> Self {
        let postgres = postgres::Postgres::shared();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let trial = Self {
            runtime,
            database: postgres.database(),
            proxy: Proxy::start(SocketAddr::from(([127, 0, 0, 1], postgres.port()))),
        };
        let settings = trial.settings(Statements::Prepared);
        trial.runtime.block_on(async {
            migrate(&settings).await.unwrap();
            grants(&settings, ROLE).await.unwrap();
        });
        trial
    }

    fn settings(&self, statements: Statements) -> config::Postgres {
        let url = match statements {
            Statements::Prepared => self.database.url_at(self.proxy.address().port()),
            Statements::Unnamed => self.database.pooled_url(),
        };
        config::Postgres {
            url: ServiceUrl::new(url),
            replica_url: None,
            replica_max_lag: Duration::from_secs(2),
            direct_url: None,
            migrate_url: Some(ServiceUrl::new(self.database.owner_url())),
            migrate: Migrate::Auto,
            pool: 8,
            pool_timeout: Duration::from_secs(5),
            max_lifetime: Duration::from_secs(3600),
            lookups: 32,
            lookup_timeout: Duration::from_secs(5),
            statements,
            connect_timeout: Duration::from_secs(5),
            statement_timeout: Duration::from_millis(600),
        }
    }

    fn sink(&self, statements: Statements) -> Postgres {
        let (config, settings) = (self.settings(statements), Settings { instance: "one".into(), keep: KEEP });
        let links = store::postgres::Postgres::open(&config).unwrap();
        Postgres::open(&config, &links, &settings).unwrap()
    }

    fn store(&self, sink: &mut Postgres, batch: &Batch) -> Result<(), Failure> {
        self.runtime.block_on(sink.store(batch))
    }

    /// The number of the next record, and what was stored.
    fn position(&self, sink: &mut Postgres) -> (u64, u64, Drops) {
        match &self.runtime.block_on(sink.positions(&[EPOCH])).unwrap()[..] {
            [] => (0, 0, Drops::default()),
            [position] => {
                assert_eq!(position.source, SOURCE);
                (position.next, position.stored, position.drops)
            }
            more => panic!("{more:?}"),
        }
    }

    /// Rows, clicks of all days, clicks in total: equal, whatever happened.
    fn clicks(&self) -> u64 {
        let said = self.database.sql(
            "SELECT (SELECT count(*) FROM visits), (SELECT coalesce(sum(clicks), 0) FROM link_days),
               (SELECT coalesce(sum(clicks), 0) FROM link_totals)",
        );
        let counts: Vec<u64> = said.split('|').map(|count| count.parse().unwrap()).collect();
        assert!(counts.iter().all(|count| *count == counts[0]), "{said}");
        counts[0]
    }
}

fn today() -> Day {
    rollup::day(time::now())
}

/// Clicks on link 1 and on link 2, in turn.
fn batch(from: u64, to: u64, day: Day) -> Batch {
    let row = |number| Row {
        link: LinkId(1 + number % 2),
        at: UnixMillis(i64::from(day) * DAY_MS + number as i64),
        epoch: EPOCH.0,
        core: SOURCE.core,
        number,
        class: Class::Click,
        address: Some("2001:db8::1".parse().unwrap()),
        visitor: ahash::RandomState::with_seeds(1, 2, 3, 4).hash_one(number),
        agent: 0,
        referrer: 0,
        request_id: RequestId::Packed(0xab),
    };
    let rows: Vec<Row> = (from..to).map(row).collect();
    let rollups = rollup::roll_up(&rows, |_| None, |_| None);
    let range = Range { source: SOURCE, from, to, stored: to - from, drops: Drops::default() };
    Batch { ranges: vec![range], rows, rollups, ..Batch::default() }
}

#[test]
fn what_breaks() {
    /// How it breaks, what the sink says then, how it heals, and whether the batch was stored all the same.
    type Case = (&'static str, fn(&Trial), fn(&Failure) -> bool, fn(&Trial), bool);
    let nothing: fn(&Trial) = |_| {};
    let cases: [Case; 7] = [
        (
            "the answer to COMMIT is lost",
            |trial| trial.proxy.mode(Mode::CutAt(b"COMMIT\0".to_vec())),
            |failure| matches!(failure, Failure::Unknown(_)),
            nothing,
            true,
        ),
        (
            "the answer to COPY is lost",
            |trial| trial.proxy.mode(Mode::CutAt(b"COPY 4\0".to_vec())),
            |failure| matches!(failure, Failure::Away(_)),
            nothing,
            false,
        ),
        (
            "no answer comes",
            |trial| trial.proxy.mode(Mode::Silent),
            |failure| matches!(failure, Failure::Away(_)),
            |trial| trial.proxy.mode(Mode::Pass),
            false,
        ),
        (
            "a row is refused",
            |trial| drop(trial.database.sql("ALTER TABLE visits ADD CONSTRAINT odd CHECK (link_id <> 2) NOT VALID")),
            |failure| matches!(failure, Failure::Refused(why) if why.contains("odd")),
            |trial| drop(trial.database.sql("ALTER TABLE visits DROP CONSTRAINT odd")),
            false,
        ),
        (
            "a rollup is refused: no row is to blame",
            |trial| drop(trial.database.sql("ALTER TABLE link_days ADD CONSTRAINT odd CHECK (link_id <> 2) NOT VALID")),
            |failure| matches!(failure, Failure::Broken(why) if why.contains("odd")),
            |trial| drop(trial.database.sql("ALTER TABLE link_days DROP CONSTRAINT odd")),
            false,
        ),
        (
            "it is read-only",
            |trial| {
                let name = trial.database.sql("SELECT current_database()");
                trial.database.sql(&format!("ALTER DATABASE {name} SET default_transaction_read_only = on"));
                trial.proxy.cut();
            },
            |failure| matches!(failure, Failure::Away(why) if why.contains("read-only")),
            |trial| {
                let name = trial.database.sql("SELECT current_database()");
                // From another database: in this one all is read-only.
                let reset = format!("ALTER DATABASE {name} RESET default_transaction_read_only");
                postgres::Postgres::shared().sql(&reset);
            },
            false,
        ),
        (
            "a table is missing",
            |trial| drop(trial.database.sql("ALTER TABLE link_totals RENAME TO elsewhere")),
            |failure| matches!(failure, Failure::Broken(_)),
            |trial| drop(trial.database.sql("ALTER TABLE elsewhere RENAME TO link_totals")),
            false,
        ),
    ];
    for (name, breaks, says, heals, is_stored) in cases {
        let trial = Trial::new();
        let mut sink = trial.sink(Statements::Prepared);
        trial.store(&mut sink, &batch(0, 6, today())).unwrap();
        breaks(&trial);
        let next = batch(6, 10, today());
        let mut failure = trial.store(&mut sink, &next).unwrap_err();
        if !says(&failure) {
            // A connection that was cut is noticed by the first call.
            failure = trial.store(&mut sink, &next).unwrap_err();
        }
        assert!(says(&failure), "{name}: {failure:?}");
        heals(&trial);
        let before = if is_stored { (10, 10, Drops::default()) } else { (6, 6, Drops::default()) };
        // The last transaction may still be about to end.
        eventually(LIMIT, name, || trial.position(&mut sink) == before);
        let again = trial.store(&mut sink, &next);
        assert_eq!(again, if is_stored { Err(Failure::Moved) } else { Ok(()) }, "{name}");
        assert_eq!(trial.position(&mut sink), (10, 10, Drops::default()), "{name}");
        assert_eq!(trial.clicks(), 10, "{name}");
    }
}

/// They are told by themselves: another instance that meets the same agent does not wait for a batch, and one that is refused
/// is its row's.
#[test]
fn texts_of_a_batch() {
    let trial = Trial::new();
    let mut sink = trial.sink(Statements::Prepared);
    let agent = |id, text: &str| {
        let (browser, os) = ("curl".into(), String::new());
        Arc::new(Agent { id, text: text.into(), class: Class::Tool, browser, os, device: "other" })
    };
    let mut elsewhere = batch(3, 4, today());
    elsewhere.agents = vec![agent(-5, "curl/8"), agent(7, "curl/9")];
    elsewhere.referrers =
        vec![Arc::new(Referrer { id: 9, text: "https://a.example/x".into(), host: "a.example".into() })];
    assert_eq!(trial.store(&mut sink, &elsewhere), Err(Failure::Moved));
    assert_eq!(trial.database.sql("SELECT string_agg(text, ' ' ORDER BY id) FROM agents"), "curl/8 curl/9");
    assert_eq!(trial.database.sql("SELECT id, text, host FROM referrers"), "9|https://a.example/x|a.example");
    // They go when no visit can have them any more; what is told again stays.
    trial.database.sql("UPDATE agents SET seen_day = seen_day - 93; UPDATE referrers SET seen_day = seen_day - 93");
    elsewhere.agents.truncate(1);
    elsewhere.referrers.clear();
    assert_eq!(trial.store(&mut sink, &elsewhere), Err(Failure::Moved));
    assert_eq!(trial.runtime.block_on(sink.housekeep(time::now())), Ok(Tidied::All));
    assert_eq!(trial.database.sql("SELECT text, (SELECT count(*) FROM referrers) FROM agents"), "curl/8|0");
    trial.database.sql("ALTER TABLE agents ADD CONSTRAINT odd CHECK (text <> 'odd') NOT VALID");
    let mut odd = batch(0, 1, today());
    odd.agents = vec![agent(11, "odd")];
    let refused = trial.store(&mut sink, &odd);
    assert!(matches!(&refused, Err(Failure::Refused(why)) if why.contains("odd")), "{refused:?}");
    trial.store(&mut sink, &batch(0, 1, today())).unwrap();
    assert_eq!(trial.clicks(), 1);
}

/// It would refuse what some visitor's browser says, and with it everything.
#[test]
fn a_database_without_every_character() {
    let trial = Trial::new();
    let name = trial.database.sql("SELECT current_database()");
    let latin = format!("{name}_latin");
    let shared = postgres::Postgres::shared();
    shared.sql(&format!("CREATE DATABASE {latin} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0"));
    let mut settings = trial.settings(Statements::Prepared);
    settings.url = ServiceUrl::new(settings.url.expose().replace(&name, &latin));
    settings.migrate_url = Some(ServiceUrl::new(trial.database.owner_url().replace(&name, &latin)));
    let [migrated, opened] = trial.runtime.block_on(async {
        let migrated = migrate(&settings).await.map(drop);
        [migrated, store::postgres::Postgres::open(&settings).unwrap().check_schema().await]
    });
    for refused in [migrated, opened] {
        let why = refused.unwrap_err().to_string();
        assert!(why.contains("encoding is LATIN1") && why.contains("ENCODING 'UTF8'"), "{why}");
    }
    shared.sql(&format!("DROP DATABASE {latin} WITH (FORCE)"));
}

#[test]
fn two_sinks_for_one_range() {
    let trial = Trial::new();
    let mut sinks = [trial.sink(Statements::Prepared), trial.sink(Statements::Prepared)];
    for number in 0..20 {
        let batch = batch(number * 5, number * 5 + 5, today());
        let [one, other] = &mut sinks;
        let (one, other) = trial.runtime.block_on(async { tokio::join!(one.store(&batch), other.store(&batch)) });
        assert!(
            matches!((&one, &other), (Ok(()), Err(Failure::Moved)) | (Err(Failure::Moved), Ok(()))),
            "{one:?} {other:?}"
        );
    }
    assert_eq!(trial.clicks(), 100);
}

/// Straight and through a pooler: everything that a batch can hold, and what is read of it again.
#[test]
fn a_batch_with_everything() {
    for statements in [Statements::Prepared, Statements::Unnamed] {
        let trial = Trial::new();
        let mut sink = trial.sink(statements);
        // No partition was made ahead, for none of the two days.
        let mut all = batch(0, 3, today() - 1);
        let more = batch(3, 6, today());
        all.rows.extend(&more.rows);
        all.rollups.extend(more.rollups);
        all.rollups.sort_by_key(|rollup| (rollup.link, rollup.day));
        let mut row = all.rows[0];
        row.class = Class::Orphan;
        let mut request_id = RequestId::Written { len: 3, bytes: [0; 64] };
        if let RequestId::Written { bytes, .. } = &mut request_id {
            bytes[..3].copy_from_slice(b"a\xffb");
        }
        row.request_id = request_id;
        row.address = Some("192.0.2.7".parse().unwrap());
        all.orphans = vec![Orphan { domain: 65_535, code: "nichts".into(), row }];
        let mut drops = Drops::default();
        drops[Dropped::Bot as usize] = 2;
        all.ranges = vec![Range { source: SOURCE, from: 0, to: 9, stored: 6, drops }];
        all.tallies = vec![Tally { source: SOURCE, appended: 9, visits: 8, ring_full: 5, spool_error: 0, orphans: 0 }];
        trial.store(&mut sink, &all).unwrap();
        assert_eq!(trial.clicks(), 6);
        drops[Dropped::RingFull as usize] = 5;
        assert_eq!(trial.position(&mut sink), (9, 6, drops));
        // Tallies are sums, and what a range gives up is added.
        let mut next = batch(9, 10, today());
        next.ranges[0].drops[Dropped::Bot as usize] = 1;
        next.tallies = all.tallies.clone();
        next.tallies[0].ring_full = 6;
        trial.store(&mut sink, &next).unwrap();
        drops[Dropped::RingFull as usize] = 6;
        drops[Dropped::Bot as usize] = 3;
        let read = async { store::postgres::Postgres::open(&trial.settings(statements))?.accounts().await };
        let accounts = trial.runtime.block_on(read).unwrap();
        let [account] = &accounts[..] else { panic!("{accounts:?}") };
        assert_eq!((account.instance.as_str(), account.answered, account.stored), ("one", 14, 7));
        assert_eq!(account.drops, drops);
        assert_eq!(
            trial.database.sql("SELECT * FROM orphan_visits"),
            format!(
                "65535|nichts|{}|{}|0|0|192.0.2.7||a\u{fffd}b",
                i64::from(today() - 1) * DAY_MS,
                EPOCH.0.cast_signed()
            )
        );
        assert_eq!(
            trial.database.sql("SELECT DISTINCT kind, address, request_id FROM visits"),
            "0|2001:db8::1|000000000000000000000000000000ab"
        );
    }
}

/// They lie one behind the other until they are long, and say the same before and after.
#[test]
fn sketches_are_merged() {
    let trial = Trial::new();
    let mut sink = trial.sink(Statements::Prepared);
    let (batches, size) = (60, 40);
    for number in 0..batches {
        trial.store(&mut sink, &batch(number * size, (number + 1) * size, today())).unwrap();
        if number % 10 != 9 {
            continue;
        }
        for table in ["link_days", "link_totals"] {
            let hex = trial.database.sql(&format!("SELECT encode(sketch, 'hex') FROM {table} WHERE link_id = 1"));
            let bytes: Vec<u8> =
                (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
            let mut sketch = Sketch::default();
            sketch.merge(&bytes).unwrap();
            let visitors = ((number + 1) * size / 2) as f64;
            assert!((sketch.unique() as f64 - visitors).abs() < visitors / 5.0, "{table}: {}", sketch.unique());
            let in_quarters: u64 = sketch.buckets().iter().sum();
            assert_eq!(in_quarters, if table == "link_days" { (number + 1) * size / 2 } else { 0 });
        }
    }
    assert_eq!(trial.clicks(), batches * size);
}

#[test]
fn a_damaged_sketch_begins_anew() {
    let trial = Trial::new();
    let mut sink = trial.sink(Statements::Prepared);
    trial.store(&mut sink, &batch(0, 10, today())).unwrap();
    for table in ["link_days", "link_totals"] {
        trial.database.sql(&format!("UPDATE {table} SET sketch = decode(repeat('ff', 2000), 'hex') WHERE link_id = 1"));
    }
    trial.store(&mut sink, &batch(10, 14, today())).unwrap();
    for table in ["link_days", "link_totals"] {
        let hex = trial.database.sql(&format!("SELECT encode(sketch, 'hex') FROM {table} WHERE link_id = 1"));
        let bytes: Vec<u8> =
            (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
        let mut sketch = Sketch::default();
        sketch.merge(&bytes).unwrap();
        assert_eq!(sketch.unique(), 2, "{table}");
    }
    assert_eq!(trial.clicks(), 14);
}

#[test]
fn days_come_and_go() {
    let trial = Trial::new();
    let mut sink = trial.sink(Statements::Prepared);
    let name = |day: Day| {
        let date = trial.database.sql(&format!("SELECT to_char(DATE '1970-01-01' + {day}, 'YYYYMMDD')"));
        format!("visits_{date}")
    };
    let exists = |table: &str| trial.database.sql(&format!("SELECT to_regclass('{table}') IS NOT NULL")) == "t";
    let (today, old, yesterday) = (today(), today() - 91, today() - 1);
    trial.store(&mut sink, &batch(0, 4, old)).unwrap();
    trial.store(&mut sink, &batch(4, 8, yesterday)).unwrap();
    assert!(exists(&name(old)) && exists(&format!("orphan_{}", name(yesterday))));
    let noon = UnixMillis(i64::from(today) * DAY_MS + DAY_MS / 2);
    trial.runtime.block_on(sink.housekeep(noon)).unwrap();
    for ahead in 0..4 {
        assert!(exists(&name(today + ahead)) && exists(&format!("orphan_{}", name(today + ahead))), "{ahead}");
    }
    assert!(!exists(&name(old)) && !exists(&format!("orphan_{}", name(old))), "it is too old");
    eventually(LIMIT, "the index of yesterday", || exists(&format!("{}_by_link", name(yesterday))));
    assert!(!exists(&format!("{}_by_link", name(today))), "that would slow down what is written");
    // A clock that is years ahead drops nothing.
    trial.runtime.block_on(sink.housekeep(noon.after(KEEP * 10))).unwrap();
    assert!(exists(&name(yesterday)));
    // What comes late finds its place all the same.
    trial.store(&mut sink, &batch(8, 12, yesterday)).unwrap();
    assert_eq!(trial.database.sql("SELECT count(*) FROM visits"), "8");
}

/// What an import brought along stays when the table of totals gets its columns.
#[test]
fn a_store_that_had_links_alone() {
    let trial = Trial::new();
    let url = trial.database.owner_url();
    let owner = |sql: &str| postgres::psql(&url, sql);
    owner("DROP SCHEMA public CASCADE; CREATE SCHEMA public");
    owner(&format!("GRANT USAGE ON SCHEMA public TO {ROLE}"));
    owner(
        "CREATE TABLE schema_migrations (number integer PRIMARY KEY, name text NOT NULL, checksum text NOT NULL,
             applied_at timestamptz NOT NULL DEFAULT now())",
    );
    owner(MIGRATIONS[0].sql);
    owner(&format!("INSERT INTO schema_migrations VALUES (1, 'links', '{}')", MIGRATIONS[0].checksum()));
    owner(
        "INSERT INTO links (id, domain_id, code, target_url, version, created_at, updated_at)
             VALUES (1, 0, 'a', 'https://example.com/', 1, 0, 0)",
    );
    owner("INSERT INTO link_totals VALUES (1, 41)");
    // Whoever served before goes on with what is new.
    owner(&format!("GRANT SELECT, INSERT, UPDATE, DELETE ON links TO {ROLE}"));
    let settings = trial.settings(Statements::Prepared);
    let applied = trial.runtime.block_on(migrate(&settings)).unwrap();
    assert_eq!(applied.len(), MIGRATIONS.len() - 1);
    let mut sink = trial.sink(Statements::Prepared);
    trial.store(&mut sink, &batch(0, 4, today())).unwrap();
    let totals = trial.database.sql("SELECT link_id, imported, clicks FROM link_totals ORDER BY link_id");
    assert_eq!(totals, "1|41|2\n2|0|2");
    owner("DELETE FROM links WHERE id = 1");
    trial.store(&mut sink, &batch(4, 6, today())).unwrap();
    assert_eq!(trial.clicks(), 6);
}
