//! Visits' wiring: the spool, the writer and its sink, the keys of visitors.
//!
//! In: the configuration, the store. Out: a recorder for each core, figures, and, at the end, a spool that is sealed and as
//! much in the store as it takes.
//! Never: keeps redirects waiting for a store of visits. At its limit: see [`crate::visits`].

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::watch;

use super::BadConfiguration;
use crate::config::{Breaker, Config};
use crate::domain::time;
use crate::instance::{Core, EarlierVisits, VisitFigures};
use crate::store::Store;
use crate::store::row::Position;
use crate::store::sqlite::VISITS_FILE;
use crate::visits::agents::patterns::BotList;
use crate::visits::agents::{Agents, Referrers};
use crate::visits::batch::{self, Builder};
use crate::visits::sink::{self, Sink};
use crate::visits::spool::{self, Epoch, Spool};
use crate::visits::visitor::Keys;
use crate::visits::writer::{self, Figures, Report, Writer};
use crate::visits::{Dropped, Recorder, visitor_keys};

const DEAD_LETTERS: &str = "dead-letters.ndjson";
const RECOVERY_MAX: Duration = Duration::from_secs(3);

/// Visits on their way, while the server runs.
pub struct Visits {
    spool: Arc<Spool>,
    writer: Writer,
}

/// What tells how they stand, whoever stops the writer.
#[derive(Clone)]
pub struct Standing {
    spool: Arc<Spool>,
    figures: Arc<Figures>,
}

/// Starts recording; the recorders are those of the cores, in order. `seen`: where the follower saw the store stand. Without
/// `visits.sinks` nothing is recorded.
pub fn start(
    config: &Config,
    cores: usize,
    store: &Store,
    instance: &str,
    seen: watch::Receiver<Option<Position>>,
) -> anyhow::Result<(Option<Visits>, Vec<Recorder>)> {
    if !config.visits.recorded {
        return Ok((None, (0..cores).map(|_| Recorder::default()).collect()));
    }
    // Before anything is made: what is wrong here is said at once.
    let builder = builder(config).context(BadConfiguration)?;
    let sink = sink(config, store, instance)?;
    let keys = Arc::new(Keys::default());
    visitor_keys::start(&keys, config.privacy.visitor, &config.data);
    super::vital(tokio::spawn(visitor_keys::run(
        Arc::clone(&keys),
        store.clone(),
        config.privacy.visitor,
        config.data.clone(),
    )));
    let epoch = Epoch(rand::random());
    let settings = spool::Settings {
        dir: spool_dir(config),
        ring: config.spool.ring.clone(),
        runtime_dir: runtime_dir(),
        ring_bytes: config.spool.ring_size,
        segment_bytes: config.spool.segment,
        sync: config.spool.sync,
        bytes_max: config.spool.max_bytes,
        keep: config.spool.keep,
        keep_bytes: config.spool.keep_bytes,
        cores: u16::try_from(cores).context("there are more than 65,535 workers")?,
    };
    let (spool, rings) = Spool::open(&settings, time::now(), epoch).map_err(|error| match error {
        spool::Error::InUse(_) | spool::Error::RingFolder(_) | spool::Error::Newer { .. } => {
            anyhow::Error::new(error).context(BadConfiguration)
        }
        error @ spool::Error::Io { .. } => error.into(),
    })?;
    let spool = Arc::new(spool);
    let settings_of_writer = writer_settings(config, Some(epoch));
    let writer = Writer::start(settings_of_writer, &settings.dir, Arc::clone(&spool), builder, sink, seen)
        .context("no thread for the writer of visits")?;
    let recording = crate::visits::Settings { address: config.privacy.address, keys };
    let recorders = rings.into_iter().map(|ring| Recorder::new(ring, recording.clone())).collect();
    Ok((Some(Visits { spool, writer }), recorders))
}

impl Visits {
    #[must_use]
    pub fn standing(&self) -> Standing {
        Standing { spool: Arc::clone(&self.spool), figures: Arc::clone(self.writer.figures()) }
    }

    /// Seals the log and stores, for up to `flush`, what it still has. The cores record nothing any more. Blocks.
    pub fn close(self, flush: Duration) {
        let by = time::monotonic() + flush;
        self.spool.seal();
        self.writer.stop(by);
    }
}

impl Standing {
    /// Of this process, and of what it found in its spool.
    #[must_use]
    pub fn figures(&self, cores: &[Core]) -> VisitFigures {
        // What is settled is read before what was recorded: whatever happens between counts as pending, never the reverse.
        let report = self.figures.report();
        let spool = self.spool.figures();
        let answered = cores.iter().map(|core| core.http.visits.answered()).sum::<u64>();
        figures(&report, &spool, answered)
    }
}

/// Of figures that were read in this order.
fn figures(report: &Report, spool: &spool::Figures, answered: u64) -> VisitFigures {
    let sum = |count: fn(&spool::segment::Tally) -> u64| spool.cores.iter().map(count).sum::<u64>();
    let [ring_full, spool_error] = [sum(|core| core.ring_full), sum(|core| core.spool_error)];
    let recorded = answered.saturating_sub(ring_full + spool_error).saturating_sub(report.own.sum());
    // The store is told of it when it is back; everybody else is now.
    let untold = spool.given_up.saturating_sub(report.own.drops[Dropped::SpoolFull as usize]).min(recorded);
    let mut own = report.own;
    let mut ever = report.ever;
    for drops in [&mut own.drops, &mut ever.drops] {
        drops[Dropped::RingFull as usize] += ring_full;
        drops[Dropped::SpoolError as usize] += spool_error;
        drops[Dropped::SpoolFull as usize] += untold;
    }
    let pending = recorded - untold;
    let earlier = EarlierVisits { fates: report.earlier, pending: report.earlier_pending };
    let oldest = report.oldest_pending.filter(|_| pending + earlier.pending > 0);
    VisitFigures {
        answered,
        spooled: sum(|core| core.visits),
        stored: own.stored,
        pending,
        drops: own.drops,
        earlier,
        ever,
        oldest_pending_seconds: oldest.map_or(0, |at| u64::try_from((time::now().0 - at.0) / 1000).unwrap_or(0)),
        spool_bytes: spool.bytes,
        spool_max_bytes: spool.bytes_max,
        spool_waiting_bytes: spool.waiting_bytes,
        sink_away_since: report.away.as_ref().map(|away| away.since),
        spool_failing_since: spool.failing_since,
    }
}

/// What makes batches as the configuration says.
pub fn builder(config: &Config) -> anyhow::Result<Builder> {
    let bots = match &config.visits.bot_list {
        Some(file) => BotList::open(file)?,
        None => BotList::default(),
    };
    let per_day = config.visits.agents_per_day;
    let settings = batch::Settings { raw: config.visits.raw, bots: config.visits.bots };
    Ok(Builder::new(settings, Agents::new(bots, per_day), Referrers::new(per_day)))
}

/// Where visits go: beside the links.
pub fn sink(config: &Config, store: &Store, instance: &str) -> Result<Sink, sink::Failure> {
    let settings = sink::Settings { instance: instance.to_owned(), keep: config.visits.keep };
    match (store, &config.postgres) {
        (Store::Postgres(store), Some(postgres)) => {
            sink::postgres::Postgres::open(postgres, store, &settings).map(Sink::Postgres)
        }
        _ => sink::sqlite::Sqlite::open(&config.data.join(VISITS_FILE), &settings).map(Sink::Sqlite),
    }
}

/// Of a server, whose start `own` is, or of a command.
#[must_use]
pub fn writer_settings(config: &Config, own: Option<Epoch>) -> writer::Settings {
    // Nobody waits for it but the log: a store that is back is found out sooner than by those whose requests fail.
    let breaker = Breaker { recovery: config.breaker.recovery.min(RECOVERY_MAX), ..config.breaker };
    writer::Settings { dead_letters: config.data.join(DEAD_LETTERS), breaker, own }
}

#[must_use]
pub fn spool_dir(config: &Config) -> PathBuf {
    config.spool.dir.clone().unwrap_or_else(|| config.data.join("spool"))
}

/// systemd's; of several the first (systemd.exec(5)).
fn runtime_dir() -> Option<PathBuf> {
    let folders = std::env::var("RUNTIME_DIRECTORY").ok()?;
    folders.split(':').next().filter(|first| !first.is_empty()).map(PathBuf::from)
}
