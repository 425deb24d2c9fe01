//! Fills a store for `script/bench-visits stats`: one link with ten million visits over the year before today, one with ten
//! thousand, by the sinks themselves.
//!
//! `cargo bench --bench stats -- MANY FEW (--data DIR | --postgres URL)`, where MANY and FEW are the ids of the links.

#![expect(clippy::print_stdout, reason = "a bench prints what it measured")]

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use waypost::config::load::{self, Flags};
use waypost::domain::link::LinkId;
use waypost::domain::time::{self, UnixMillis};
use waypost::domain::visit::Class;
use waypost::stats::rollup::{DAY_MS, day, roll_up};
use waypost::store;
use waypost::visits::agents::patterns::BotList;
use waypost::visits::agents::{Agent, Agents, Referrers};
use waypost::visits::batch::{Batch, Range, Referrer, RequestId, Row};
use waypost::visits::sink::{Settings, Sink, postgres, sqlite};
use waypost::visits::spool::{Epoch, Source};

const DAYS: i64 = 365;
const MANY: u64 = 10_000_000;
const FEW: u64 = 10_000;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let [many, few, which, whereto] = &words[..] else {
        println!("give MANY FEW --data DIR or MANY FEW --postgres URL");
        return;
    };
    let links = [(many, MANY), (few, FEW)].map(|(id, visits)| (LinkId(id.parse().expect("a link's id")), visits));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(fill(&links, &mut sink(which, whereto)));
}

fn sink(which: &str, whereto: &str) -> Sink {
    let settings = Settings { instance: "bench".to_owned(), keep: Duration::from_secs(3600) };
    if which == "--data" {
        let file = PathBuf::from(whereto).join("visits.db");
        return Sink::Sqlite(sqlite::Sqlite::open(&file, &settings).expect("a store of visits"));
    }
    let flags = Flags { postgres: Some(whereto.to_owned()), ..Flags::default() };
    let loaded = load::load(&flags, [], |_: &Path| Err(std::io::ErrorKind::NotFound.into())).expect("a configuration");
    let config = loaded.config.postgres.expect("it was given");
    let links = store::postgres::Postgres::open(&config).expect("a store of links");
    Sink::Postgres(postgres::Postgres::open(&config, &links, &settings).expect("a store of visits"))
}

async fn fill(links: &[(LinkId, u64); 2], sink: &mut Sink) {
    let today = i64::from(day(time::now()));
    let agents: Vec<Arc<Agent>> = {
        let mut known = Agents::new(BotList::default(), 1000);
        let text = |version: u32| {
            format!(
                "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/{version}.0 Safari/537.36"
            )
        };
        (100..130).map(|version| known.look_up(text(version).as_bytes(), 0)).collect()
    };
    let referrers: Vec<Arc<Referrer>> = {
        let mut known = Referrers::new(1000);
        (0..200).map(|site| known.look_up(format!("https://site{site}.example/page").as_bytes(), 0)).collect()
    };
    let epoch = rand::random::<u64>();
    let mut from = 0;
    for back in (0..DAYS).rev() {
        let begins_ms = (today - back) * DAY_MS;
        let mut rows = Vec::new();
        for (link, visits) in links {
            let of_day = visits / DAYS.unsigned_abs();
            rows.extend((0..of_day).map(|number| Row {
                link: *link,
                at: UnixMillis(begins_ms + i64::try_from(number * 86_399_999 / of_day).expect("within a day")),
                epoch,
                core: 0,
                number: from + number,
                class: Class::Click,
                address: Some(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 0))),
                visitor: rand::random(),
                agent: agents[rand::random_range(0..agents.len())].id,
                referrer: referrers[rand::random_range(0..referrers.len())].id,
                request_id: RequestId::None,
            }));
        }
        let agent = |id| agents.iter().find(|agent| agent.id == id).map(AsRef::as_ref);
        let referrer = |id| referrers.iter().find(|referrer| referrer.id == id).map(AsRef::as_ref);
        let to = from + rows.len() as u64;
        let batch = Batch {
            ranges: vec![Range {
                source: Source { epoch: Epoch(epoch), core: 0 },
                from,
                to,
                stored: rows.len() as u64,
                drops: Default::default(),
            }],
            rollups: roll_up(&rows, agent, referrer),
            // What a year ago was is no longer there: totals alone, as in any store that is so old.
            rows: Vec::new(),
            agents: agents.clone(),
            referrers: referrers.clone(),
            ..Batch::default()
        };
        sink.store(&batch).await.expect("it is stored");
        from = to;
    }
    println!("{from} visits of two links over {DAYS} days");
}
