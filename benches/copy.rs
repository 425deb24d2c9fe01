//! Question: how fast do visits come from batches into Postgres, rollups and all, beside `psql \copy` of the same rows in
//! binary into a table without an index?
//!
//! Run: `cargo bench --bench copy -- URL [ROWS [BATCH [ROUNDS]]]`, with the URL of an empty database of its owner, and psql
//! in PATH. Bar: at least 0.12. Figures: PERF.md.

#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use waypost::config::{self, Migrate, ServiceUrl, Statements};
use waypost::domain::link::LinkId;
use waypost::domain::time::{self, UnixMillis};
use waypost::domain::visit::Class;
use waypost::stats::rollup::roll_up;
use waypost::store;
use waypost::store::postgres::migrate;
use waypost::visits::agents::Agent;
use waypost::visits::batch::{Batch, Range, Referrer, RequestId, Row};
use waypost::visits::sink::Settings;
use waypost::visits::sink::postgres::Postgres;
use waypost::visits::spool::{Epoch, Source};

const LINKS: usize = 100_000;
const VISITORS: u64 = 400_000;
const AGENTS: i64 = 300;
const REFERRERS: i64 = 1000;
/// Visits a second, which says how many of them share a quarter of an hour.
const RATE: i64 = 5000;

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let url = arguments.next().expect("the URL of an empty database");
    let mut number = |default: usize| arguments.next().map_or(default, |text| text.parse().expect("a number"));
    let (count, batch, rounds) = (number(2_000_000), number(100_000), number(3));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let settings = settings(&url);
    runtime.block_on(migrate(&settings)).expect("the schema");
    let visits = Visits::new(count);
    let mut ratios = Vec::new();
    for round in 0..rounds {
        psql(&url, "TRUNCATE visits, link_days, link_totals, spool_positions, agents, referrers; CHECKPOINT");
        let (rolling, total) = runtime.block_on(visits.store(&settings, batch, round as u64));
        let file = std::env::temp_dir().join(format!("waypost-copy-{}", std::process::id()));
        let columns = "SELECT * FROM visits";
        psql(&url, &format!("\\copy ({columns}) TO '{}' (FORMAT binary)", file.display()));
        psql(&url, "DROP TABLE IF EXISTS plain; CREATE TABLE plain (LIKE visits); CHECKPOINT");
        let begun = time::monotonic();
        psql(&url, &format!("\\copy plain FROM '{}' (FORMAT binary)", file.display()));
        let copied = begun.elapsed();
        std::fs::remove_file(&file).expect("it is ours");
        let ratio = copied.as_secs_f64() / total.as_secs_f64();
        println!(
            "round {round}: {count} visits in {:.2} s ({:.0}/s; {:.2} s of it to roll up); \\copy {:.2} s ({:.0}/s); ratio {ratio:.3}",
            total.as_secs_f64(),
            count as f64 / total.as_secs_f64(),
            rolling.as_secs_f64(),
            copied.as_secs_f64(),
            count as f64 / copied.as_secs_f64(),
        );
        ratios.push(ratio);
    }
    ratios.sort_by(f64::total_cmp);
    println!("median ratio {:.3} (bar 0.12)", ratios[ratios.len() / 2]);
}

struct Visits {
    rows: Vec<Row>,
    agents: HashMap<i64, Arc<Agent>>,
    referrers: HashMap<i64, Arc<Referrer>>,
}

impl Visits {
    fn new(count: usize) -> Self {
        let mut random = StdRng::seed_from_u64(7);
        let agent = |id| Agent {
            id,
            text: format!("Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/{id}.0"),
            class: Class::Click,
            browser: ["Chrome", "Firefox", "Safari", "Edge", "Chrome Mobile"][(id % 5) as usize].into(),
            os: ["Windows", "Android", "iOS", "Linux"][(id % 4) as usize].into(),
            device: ["desktop", "mobile", "tablet"][(id % 3) as usize],
        };
        let referrer =
            |id| Referrer { id, text: format!("https://site-{id}.example/page"), host: format!("site-{id}.example") };
        let zipf = Zipf::new(LINKS);
        let begun = time::now().0 - 3_600_000;
        let rows = (0..count).map(|number| {
            // Visitors are as unequal as links.
            let visitor = random.random_range(1..=VISITORS) * random.random_range(1..=VISITORS) / VISITORS;
            Row {
                link: LinkId(zipf.draw(&mut random)),
                at: UnixMillis(begun + number as i64 * 1000 / RATE),
                epoch: 7,
                core: 0,
                number: number as u64,
                class: if random.random_range(0..20) == 0 { Class::Bot } else { Class::Click },
                address: Some(IpAddr::V4(Ipv4Addr::from_bits(visitor as u32 & !255))),
                visitor: visitor.wrapping_mul(0x9e37_79b9_7f4a_7c15),
                agent: (visitor % AGENTS as u64) as i64 + 1,
                referrer: random.random_range(0..=REFERRERS),
                request_id: if number % 2 == 0 { RequestId::None } else { RequestId::Packed(random.random()) },
            }
        });
        Self {
            rows: rows.collect(),
            agents: (1..=AGENTS).map(|id| (id, Arc::new(agent(id)))).collect(),
            referrers: (1..=REFERRERS).map(|id| (id, Arc::new(referrer(id)))).collect(),
        }
    }

    /// How long it took to roll up, and in all.
    async fn store(&self, config: &config::Postgres, batch: usize, epoch: u64) -> (Duration, Duration) {
        let settings = Settings { instance: "bench".into(), keep: Duration::from_secs(90 * 86_400) };
        let links = store::postgres::Postgres::open(config).expect("a store of links");
        let mut sink = Postgres::open(config, &links, &settings).expect("a sink");
        sink.housekeep(time::now()).await.expect("partitions");
        let mut rolling = Duration::ZERO;
        let begun = time::monotonic();
        for (number, rows) in self.rows.chunks(batch).enumerate() {
            let before = time::monotonic();
            let from = (number * batch) as u64;
            let to = from + rows.len() as u64;
            let range = Range {
                source: Source { epoch: Epoch(epoch), core: 0 },
                from,
                to,
                stored: rows.len() as u64,
                drops: Default::default(),
            };
            let rollups = roll_up(
                rows,
                |id| self.agents.get(&id).map(|agent| &**agent),
                |id| self.referrers.get(&id).map(|r| &**r),
            );
            let batch = Batch { ranges: vec![range], rows: rows.to_vec(), rollups, ..Batch::default() };
            rolling += before.elapsed();
            sink.store(&batch).await.expect("it is stored");
        }
        (rolling, begun.elapsed())
    }
}

/// Ranks by Zipf's law with exponent 1.
struct Zipf(Vec<f64>);

impl Zipf {
    fn new(count: usize) -> Self {
        let mut sum = 0.0;
        Self(
            (1..=count)
                .map(|rank| {
                    sum += 1.0 / rank as f64;
                    sum
                })
                .collect(),
        )
    }

    /// From 1.
    fn draw(&self, random: &mut impl Rng) -> u64 {
        let point = random.random_range(0.0..self.0[self.0.len() - 1]);
        self.0.partition_point(|sum| *sum <= point) as u64 + 1
    }
}

fn psql(url: &str, command: &str) {
    let status = Command::new("psql").args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", url, "-c", command]).status();
    assert!(status.expect("psql runs").success(), "{command}");
}

fn settings(url: &str) -> config::Postgres {
    config::Postgres {
        url: ServiceUrl::new(url.to_owned()),
        replica_url: None,
        replica_max_lag: Duration::from_secs(2),
        direct_url: None,
        migrate_url: None,
        migrate: Migrate::Auto,
        pool: 8,
        pool_timeout: Duration::from_secs(5),
        max_lifetime: Duration::from_secs(3600),
        lookups: 32,
        lookup_timeout: Duration::from_secs(5),
        statements: Statements::Prepared,
        connect_timeout: Duration::from_secs(5),
        statement_timeout: Duration::from_secs(30),
    }
}
