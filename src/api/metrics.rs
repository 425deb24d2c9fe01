//! `GET /metrics`: figures for Prometheus, as OpenMetrics text.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderValue, header};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::problem::Problem;
use super::{Api, From};
use crate::config::Peers;
use crate::guard::address;
use crate::guard::keys::Scope;
use crate::http::STATUSES;
use crate::instance::{Instance, Phase};
use crate::metrics::{Histogram, histogram};
use crate::resolve::Tier;
use crate::store::Store;
use crate::visits::Dropped;

/// Upper bounds in nanoseconds: what a redirect takes lies between a microsecond and a look-up's time-out.
const BUCKETS_NS: [u64; 16] = [
    1_000,
    2_500,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    10_000_000,
    50_000_000,
    250_000_000,
    1_000_000_000,
    5_000_000_000,
];

pub async fn metrics(
    State(api): State<Arc<Api>>,
    Extension(from): Extension<From>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    // A balancer's own address in the client's place allows nothing: whoever it forwards for is somewhere else.
    let forwarded = headers.contains_key(header::FORWARDED) || headers.contains_key("x-forwarded-for");
    let unknown = forwarded && from.client == from.peer.address;
    if unknown || !is_allowed(&api.metrics_allow, from.client) {
        api.require(&headers, from, Scope::Admin).await?;
    }
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Scrape(Arc::clone(&api))));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).map_err(|_| Problem::new(500, "no figures"))?;
    let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

fn is_allowed(allow: &[Peers], client: IpAddr) -> bool {
    let client = client.to_canonical();
    allow.iter().any(|peers| match peers {
        Peers::Loopback => client.is_loopback(),
        Peers::Private => address::is_private(client),
        Peers::Net(net) => net.contains(&client),
    })
}

struct Scrape(Arc<Api>);

impl fmt::Debug for Scrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scrape")
    }
}

/// A name and a value.
type Label = (&'static str, String);

struct Sheet<'a>(DescriptorEncoder<'a>);

impl Sheet<'_> {
    fn counter(&mut self, name: &str, help: &str, rows: impl IntoIterator<Item = (Vec<Label>, u64)>) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in rows {
            family.encode_family(&labels)?.encode_counter::<NoLabelSet, u64, f64>(&value, None)?;
        }
        Ok(())
    }

    fn gauge(&mut self, name: &str, help: &str, rows: impl IntoIterator<Item = (Vec<Label>, f64)>) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in rows {
            family.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    }

    fn histogram(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = (Vec<Label>, Histogram)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for (labels, figures) in rows {
            let mut below = 0;
            let mut buckets: Vec<(f64, u64)> = Vec::with_capacity(BUCKETS_NS.len() + 1);
            for bound in BUCKETS_NS {
                let count = figures.count_between(0, bound);
                buckets.push((bound as f64 / 1e9, count - below));
                below = count;
            }
            buckets.push((f64::MAX, figures.len() - below));
            let sum = figures.mean() * figures.len() as f64 / 1e9;
            family.encode_family(&labels)?.encode_histogram::<NoLabelSet>(sum, figures.len(), &buckets, None)?;
        }
        Ok(())
    }
}

fn label(name: &'static str, value: &str) -> Vec<Label> {
    vec![(name, value.to_owned())]
}

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let api = &*self.0;
        let instance: &Instance = &api.instance;
        let mut sheet = Sheet(encoder);
        let tiers = || Tier::ALL.into_iter();

        let mut redirects = Vec::new();
        for (row, status) in STATUSES.iter().enumerate() {
            for tier in tiers() {
                let count: u64 = instance.cores().map(|core| core.http.redirects[row][tier as usize].get()).sum();
                let status = if *status == 0 { "other".to_owned() } else { status.to_string() };
                redirects.push((vec![("status", status), ("tier", tier.name().to_owned())], count));
            }
        }
        sheet.counter(
            "waypost_redirects",
            "Answers of the front by status and by the tier they came from.",
            redirects,
        )?;
        sheet.histogram(
            "waypost_redirect_seconds",
            "What the server itself took for them.",
            tiers().map(|tier| {
                let mut sum = histogram();
                instance.cores().for_each(|core| core.http.latency[tier as usize].add_to(&mut sum));
                (label("tier", tier.name()), sum)
            }),
        )?;
        let visits = |count: fn(&crate::visits::Counts) -> u64| -> u64 {
            instance.cores().map(|core| count(&core.http.visits)).sum()
        };
        let figures = instance.visits();
        sheet.counter("waypost_visits_answered", "Redirects to a target that left.", [(vec![], figures.answered)])?;
        sheet.counter(
            "waypost_visits_orphan",
            "Answers to unknown and dead codes.",
            [(vec![], visits(|counts| counts.orphan.get()))],
        )?;
        sheet.counter("waypost_visits_spooled", "Visits that are in the log on disk.", [(vec![], figures.spooled)])?;
        sheet.counter(
            "waypost_visits_stored",
            "Visits that were stored, of earlier starts too; what the store lost in a failover counts again.",
            [(vec![], figures.ever.stored)],
        )?;
        sheet.counter(
            "waypost_visits_dropped",
            "Visits that were given up, of earlier starts too, by reason.",
            Dropped::ALL
                .iter()
                .zip(figures.ever.drops)
                .map(|(dropped, visits)| (label("reason", dropped.name()), visits)),
        )?;
        let swept = match instance.store() {
            Store::Postgres(postgres) => postgres.figures().visits_swept,
            Store::Sqlite(_) => 0,
        };
        sheet.counter(
            "waypost_limited_visits_lost",
            "Visits of limited links that nobody gets: whole leases that were not settled, what was answered of them included; single ones that nobody came for.",
            [
                (label("reason", "dead_lease"), swept),
                (label("reason", "unclaimed"), instance.memory().unclaimed.get()),
            ],
        )?;
        let gauges = [
            (
                "waypost_visits_pending",
                "Visits that are neither stored nor given up, of earlier starts too.",
                figures.pending + figures.earlier.pending,
            ),
            (
                "waypost_visit_oldest_pending_seconds",
                "Since the oldest of them was answered.",
                figures.oldest_pending_seconds,
            ),
            ("waypost_spool_bytes", "What the log of visits takes on the disk.", figures.spool_bytes),
            ("waypost_spool_max_bytes", "What it may take: then visits are given up.", figures.spool_max_bytes),
        ];
        for (name, help, value) in gauges {
            sheet.gauge(name, help, [(vec![], value as f64)])?;
        }

        let hits = |tier: Tier| -> u64 { instance.cores().map(|core| core.http.answers(tier)).sum() };
        let (hot, shards) = (hits(Tier::Hot), hits(Tier::Shards));
        let (redis, store) = (hits(Tier::Redis), hits(Tier::Store));
        let tiers_with = |mut rows: Vec<(Vec<Label>, u64)>, of_redis: u64| {
            // Without a Redis there is no such tier.
            rows.extend(instance.redis().map(|_| (label("tier", "redis"), of_redis)));
            rows
        };
        sheet.counter(
            "waypost_cache_hits",
            "Answers out of this tier.",
            tiers_with(vec![(label("tier", "hot"), hot), (label("tier", "shards"), shards)], redis),
        )?;
        let (past_hot, past_shards) = (shards + redis + store, redis + store);
        sheet.counter(
            "waypost_cache_misses",
            "Questions that this tier could not answer.",
            tiers_with(vec![(label("tier", "hot"), past_hot), (label("tier", "shards"), past_shards)], store),
        )?;
        let figures = instance.memory().shards.figures();
        sheet.counter(
            "waypost_cache_evictions",
            "Links that gave way to others.",
            [(label("tier", "shards"), figures.evictions)],
        )?;
        sheet.gauge(
            "waypost_cache_bytes",
            "Memory that links and their index take.",
            [(vec![], figures.bytes as f64)],
        )?;
        sheet.gauge("waypost_cache_links", "Links in memory.", [(vec![], figures.entries as f64)])?;
        sheet.counter(
            "waypost_codes_redrawn",
            "Generated codes that were taken already.",
            [(vec![], api.links.get().map_or(0, |links| links.redrawn()))],
        )?;

        let sum = |count: fn(&crate::accept::Counts) -> u64| -> u64 {
            instance.cores().map(|core| count(&core.accept)).sum()
        };
        sheet.gauge("waypost_connections", "Open connections.", [(vec![], sum(|counts| counts.open.get()) as f64)])?;
        sheet.counter(
            "waypost_connections_accepted",
            "Accepted connections.",
            [(vec![], sum(|counts| counts.accepted.get()))],
        )?;
        sheet.counter(
            "waypost_connections_closed",
            "Connections that the server ended, by reason.",
            [
                (label("reason", "cap"), sum(|counts| counts.over_cap.get())),
                (label("reason", "no_descriptor"), sum(|counts| counts.no_descriptor.get())),
                (label("reason", "slow"), sum(|counts| counts.swept.get())),
                (label("reason", "no_proxy_header"), sum(|counts| counts.no_proxy_header.get())),
            ],
        )?;
        let crossing =
            |count: fn(&crate::http::Counts) -> u64| -> u64 { instance.cores().map(|core| count(&core.http)).sum() };
        sheet.counter(
            "waypost_api_calls",
            "Requests that went to the API.",
            [(vec![], crossing(|counts| counts.crossed.get()))],
        )?;
        sheet.counter(
            "waypost_api_refused",
            "Requests that found the API's queue full.",
            [(vec![], crossing(|counts| counts.refused.get()))],
        )?;
        sheet.counter("waypost_limited", "Requests over a rate limit.", [(vec![], instance.limited())])?;
        let overflowed = api.by_address.overflowed() + api.by_key.overflowed();
        sheet.counter(
            "waypost_limit_overflowed",
            "Requests whose address or key shared a limit: too many to remember.",
            [(vec![], overflowed)],
        )?;
        let degraded = instance.degraded();
        sheet.gauge(
            "waypost_breaker_state",
            "Whether a dependency is asked: 0 always, 1 once to see, 2 not at all.",
            instance.breakers().map(|(dependency, state)| (label("dependency", dependency), f64::from(state as u8))),
        )?;
        sheet.counter(
            "waypost_breaker_opened",
            "How often a dependency was given up on for a while.",
            instance.opened().map(|(dependency, opened)| (label("dependency", dependency), opened)),
        )?;
        if let Store::Postgres(postgres) = instance.store() {
            let figures = postgres.figures();
            sheet.gauge(
                "waypost_postgres_connections",
                "Connections to Postgres, and the most there may be.",
                [
                    (label("state", "open"), figures.open as f64),
                    (label("state", "idle"), figures.idle as f64),
                    (label("state", "max"), figures.pool_max as f64),
                ],
            )?;
            sheet.gauge(
                "waypost_postgres_waiting",
                "Requests that wait for a connection.",
                [(vec![], figures.waiting as f64)],
            )?;
        }
        if let Some(redis) = instance.redis() {
            let figures = redis.figures();
            sheet.counter(
                "waypost_redis_reads",
                "Links that were asked of Redis, by what came of it; garbage is what no waypost of this version has put there.",
                [
                    (label("outcome", "hit"), figures.hits),
                    (label("outcome", "miss"), figures.misses),
                    (label("outcome", "garbage"), figures.garbage),
                ],
            )?;
            sheet.counter(
                "waypost_redis_failures",
                "Calls that Redis did not answer in time, or with an error; writes that found their queue full.",
                [
                    (label("reason", "timeout"), figures.timeouts),
                    (label("reason", "error"), figures.errors),
                    (label("reason", "dropped"), figures.dropped),
                ],
            )?;
        }
        sheet.gauge(
            "waypost_degraded",
            "1 while something is away that redirects can do without.",
            crate::instance::REASONS
                .into_iter()
                .map(|reason| (label("reason", reason), f64::from(u8::from(degraded.contains(&reason))))),
        )?;
        sheet.gauge(
            "waypost_ready",
            "1 while requests are welcome.",
            [(vec![], f64::from(u8::from(instance.phase() == Phase::Serving)))],
        )?;
        Ok(())
    }
}
