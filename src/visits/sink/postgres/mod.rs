//! Visits in Postgres, on a connection of its own beside the store's pool.
//!
//! In: batches. Out: each stored whole, in one transaction with its positions, or not at all.
//! Never: takes the word of a server that is no longer the store (see `store::postgres::fence`); waits for anything of ours
//! inside of a transaction (a batch is encoded before); leaves anything in a session, or names a statement that outlives its
//! transaction, so that a pooler may stand between; leaves a transaction of its own behind that holds the locks of positions.
//! At its limit: each wait for the server ends after [`STEPS`] times `postgres.statement_timeout`. The limit is ours, for
//! `statement_timeout` does not end a COPY that hears nothing. Its connection is closed then, and before the next
//! transaction the server is told to end what it was.
//!
//! A batch takes five round trips: begin and judge the positions, begin to copy, copy, add the rollups, commit; two more
//! with orphans, one more with agents or referrers that are new. Those are told before, each statement a transaction of its
//! own: another instance that meets the same agent would wait for the whole batch. They are facts: told twice, or without
//! their batch, they do no harm.
//!
//! What the server refuses of a row or of its texts (SQLSTATE 22, 23) is [`Failure::Refused`], so that the writer finds the
//! row and sets it aside. A rollup is numbers and bytes of ours, no visitor's words: what refuses one would refuse every
//! row of its link, so that it is [`Failure::Broken`], and nobody's visit is set aside for it.
//!
//! Rows of links are locked for the last two of them alone, in the order of their keys, so that instances do
//! not meet in deadlocks.

mod copy;
mod encoded;
mod partitions;

use std::future::Future;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::SinkExt;
use futures_util::future::{join, join_all, join4};
use tokio::task::JoinHandle;
use tokio_postgres::types::{FromSql, Type};
use tokio_postgres::{Client, CopyInSink, Row, Statement};

use self::encoded::{Encoded, Merged, Query};
use super::{Failure, Position, Settings};
use crate::config;
use crate::store;
use crate::store::postgres::connect::{Connector, Single};
use crate::store::postgres::errors::{code, explain, refuses_statement};
use crate::store::postgres::fence::{Admission, FAILED_OVER};
use crate::visits::batch::Batch;
use crate::visits::spool::{Epoch, Source};
use crate::visits::{Dropped, Drops};

/// A batch is the work of many requests: each of its steps may take as long as so many of them.
const STEPS: u32 = 5;

const BACKEND: &str = "SELECT pid, (extract(epoch FROM backend_start) * 1000000)::int8 FROM pg_stat_activity
  WHERE pid = pg_backend_pid()";
const END_BACKEND: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
  WHERE pid = $1 AND (extract(epoch FROM backend_start) * 1000000)::int8 = $2";

/// What a former primary has is not what the store has: none of its connections is of use any more.
const READ_ONLY: &str = "SELECT current_setting('transaction_read_only')";
const POSITIONS: &str = "SELECT p.epoch, p.core, p.next, p.stored, d.reason, d.visits
  FROM spool_positions p LEFT JOIN spool_drops d ON d.epoch = p.epoch AND d.core = p.core
  WHERE p.epoch = ANY ($1) ORDER BY p.epoch, p.core";

#[derive(Debug)]
pub struct Postgres {
    connector: Connector,
    settings: Settings,
    /// Begins a transaction.
    begin: String,
    /// For each wait.
    limit: Duration,
    /// None until it is needed, and after it was lost.
    session: Option<Single>,
    /// What was in a transaction of ours when we last heard of it.
    left: Option<Backend>,
    buffer: BytesMut,
    indexing: Option<JoinHandle<Result<(), Failure>>>,
}

/// A process of the server's; others have its number later.
#[derive(Clone, Copy, Debug)]
struct Backend {
    pid: i32,
    /// Microseconds since 1970, by the server's clock.
    started_us: i64,
}

/// Why a batch was not stored, as far as is known.
#[derive(Debug)]
enum Ended {
    /// No connection.
    Never(Failure),
    /// Before COMMIT was sent.
    Failed(tokio_postgres::Error),
    /// While the rows were copied, or their texts told.
    Rows(tokio_postgres::Error),
    /// A position was elsewhere.
    Moved,
    /// Nothing was heard in time, before COMMIT was sent.
    Silent,
    /// It may have been committed.
    Unknown(String),
}

impl From<tokio_postgres::Error> for Ended {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Failed(error)
    }
}

impl Postgres {
    /// Makes no connection. What `beside` knows of a failover is known here, too. Fails on a URL, or a file of authorities,
    /// that cannot be read.
    pub fn open(
        config: &config::Postgres,
        beside: &store::postgres::Postgres,
        settings: &Settings,
    ) -> Result<Self, Failure> {
        let (key, url) = match &config.direct_url {
            Some(url) => ("postgres.direct_url", url),
            None => ("postgres.url", &config.url),
        };
        let connector = Connector::new(key, url, config).map_err(failure)?.primary(beside.fence());
        let limit = config.statement_timeout * STEPS;
        let (limit_ms, lock_ms) = (limit.as_millis(), config.statement_timeout.as_millis());
        // Plans that are good for few rows and for many: a stale statistic must not read a whole table of rollups, nor is
        // a batch worth to be compiled.
        let begin = format!(
            "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = {limit_ms}; \
             SET LOCAL lock_timeout = {lock_ms}; SET LOCAL idle_in_transaction_session_timeout = {limit_ms}; \
             SET LOCAL jit = off; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; \
             SET LOCAL enable_seqscan = off; SET LOCAL waypost.begun = 'yes'"
        );
        Ok(Self {
            connector,
            settings: settings.clone(),
            begin,
            limit,
            session: None,
            left: None,
            buffer: BytesMut::new(),
            indexing: None,
        })
    }

    /// See [`super::Sink::positions`].
    pub async fn positions(&mut self, epochs: &[Epoch]) -> Result<Vec<Position>, Failure> {
        let epochs: Vec<i64> = epochs.iter().map(|epoch| epoch.0.cast_signed()).collect();
        let answers = self.ask(&[(READ_ONLY, vec![]), (POSITIONS, vec![(&epochs, Type::INT8_ARRAY)])]).await?;
        let [read_only, rows] = &answers[..] else {
            return Err(Failure::Broken("postgres gave another number of answers than it was asked for".into()));
        };
        if read_only.first().is_none_or(|row| row.get::<_, &str>(0) == "on") {
            self.session = None;
            return Err(Failure::Away("postgres takes no writes: it is a standby, or was made read-only".into()));
        }
        let mut positions: Vec<Position> = Vec::new();
        for row in rows {
            let source = Source { epoch: Epoch(get::<i64>(row, 0)?.cast_unsigned()), core: core(row)? };
            if positions.last().is_none_or(|last| last.source != source) {
                let (next, stored) = (get::<i64>(row, 2)?, get::<i64>(row, 3)?);
                let [next, stored] = [next, stored].map(i64::cast_unsigned);
                positions.push(Position { source, next, stored, drops: Drops::default() });
            }
            if let (Some(last), Some(reason)) = (positions.last_mut(), get::<Option<&str>>(row, 4)?) {
                add_drop(&mut last.drops, reason, get(row, 5)?);
            }
        }
        Ok(positions)
    }

    /// See [`super::Sink::store`].
    pub async fn store(&mut self, batch: &Batch) -> Result<(), Failure> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let instance = self.settings.instance.clone();
        let encoded = Encoded::of(batch, &instance, &mut buffer);
        self.buffer = buffer;
        match self.attempt(&encoded).await {
            Err(Ended::Rows(error)) if is_without_partition(&error) => {
                self.add_days(&encoded.days).await?;
                self.attempt(&encoded).await.map_err(Ended::explain)
            }
            ended => ended.map_err(Ended::explain),
        }
    }

    async fn attempt(&mut self, batch: &Encoded<'_>) -> Result<(), Ended> {
        let session = self.session().await.map_err(Ended::Never)?;
        let ended = tokio::select! {
            biased;
            () = session.admission.ends() => Err(Ended::Unknown(FAILED_OVER.into())),
            ended = self.transaction(&session.client, batch) => ended,
        };
        let is_over = match &ended {
            Ok(()) => true,
            // The server lives, and so does the connection.
            Err(Ended::Moved | Ended::Rows(_)) => self.limited(session.client.batch_execute("ROLLBACK")).await.is_ok(),
            Err(_) => false,
        };
        if is_over {
            self.left = None;
            self.session = Some(session);
        }
        ended
    }

    /// Up to COMMIT, or to where it fails; then it is still open.
    async fn transaction(&mut self, client: &Client, batch: &Encoded<'_>) -> Result<(), Ended> {
        let texts = batch.texts();
        if !texts.is_empty() {
            self.limited(all(client, &texts)).await.map_err(of_rows)?;
        }
        let before = batch.before();
        let mut backend = None;
        // Known as soon as it is told, also if what comes behind it waits for a lock.
        let known = async {
            let rows = client.query_typed(BACKEND, &[]).await?;
            let Some(row) = rows.first() else { return Ok(()) };
            backend = Some(Backend { pid: row.try_get(0)?, started_us: row.try_get(1)? });
            Ok::<(), tokio_postgres::Error>(())
        };
        let statements = join(
            prepare(client, copy::COPY_VISITS, &batch.visits),
            prepare(client, copy::COPY_ORPHANS, &batch.orphans),
        );
        let begun = join4(client.batch_execute(&self.begin), known, all(client, &before), statements);
        let begun = tokio::time::timeout(self.limit, begun).await;
        self.left = backend;
        let (begun, known, before, (visits, orphans)) = begun.map_err(|_| Ended::Silent)?;
        begun.and(known)?;
        if before?[Encoded::JUDGE].len() != batch.ranges() {
            return Err(Ended::Moved);
        }
        self.copy(client, visits?, &batch.visits).await?;
        self.copy(client, orphans?, &batch.orphans).await?;

        let grown = self.limited(all(client, &batch.after())).await?;
        let mut merged = Vec::new();
        for (rows, in_total) in grown.iter().zip([false, true]) {
            merged.extend(Merged::of(rows, batch, in_total)?);
        }
        let merged: Vec<Query<'_>> = merged.iter().map(Merged::query).collect();
        let committed = join(all(client, &merged), client.batch_execute("COMMIT"));
        let (merged, committed) = tokio::time::timeout(self.limit, committed)
            .await
            .map_err(|_| Ended::Unknown(format!("postgres did not answer within {} ms", self.limit.as_millis())))?;
        // After a statement that the server refused, COMMIT is a ROLLBACK.
        match (merged, committed) {
            (Ok(_), Ok(())) => Ok(()),
            (Err(error), _) | (_, Err(error)) if refuses_statement(&error) => Err(Ended::Failed(error)),
            (Err(error), _) | (_, Err(error)) => Err(Ended::Unknown(why(&error))),
        }
    }

    /// The statement goes before its transaction does: see the head of this file.
    async fn copy(&self, client: &Client, statement: Option<Statement>, pieces: &[Bytes]) -> Result<(), Ended> {
        let Some(statement) = statement else { return Ok(()) };
        let sink: CopyInSink<Bytes> = self.limited(client.copy_in(&statement)).await.map_err(of_rows)?;
        tokio::pin!(sink);
        for piece in pieces {
            // A row that is refused is told of at the end.
            self.limited(sink.send(piece.clone())).await?;
        }
        self.limited(sink.as_mut().finish()).await.map_err(of_rows)?;
        Ok(())
    }

    /// One statement after the other, each a transaction of its own, in one round trip.
    async fn ask(&mut self, queries: &[Query<'_>]) -> Result<Vec<Vec<Row>>, Failure> {
        let session = self.session().await?;
        let answers = self.heard(&session.admission, all(&session.client, queries)).await?;
        self.session = Some(session);
        Ok(answers)
    }

    /// What the server says to whom nothing is committed, unless another one becomes the store meanwhile.
    async fn heard<T>(
        &self,
        admission: &Admission,
        wait: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, Failure> {
        tokio::select! {
            biased;
            () = admission.ends() => Err(Failure::Away(FAILED_OVER.into())),
            answer = self.limited(wait) => answer.map_err(Ended::explain),
        }
    }

    /// The one that is there, or a new one, by which what another one left is ended. It is closed unless it is put back.
    async fn session(&mut self) -> Result<Single, Failure> {
        if let Some(session) = self.session.take()
            && !session.client.is_closed()
            && session.admission.holds()
        {
            return Ok(session);
        }
        let session = self.connector.connect(|| {}).await.map_err(failure)?;
        if let Some(Backend { pid, started_us }) = self.left {
            let end = [(END_BACKEND, vec![(&pid as _, Type::INT4), (&started_us as _, Type::INT8)])];
            self.limited(all(&session.client, &end)).await.map_err(Ended::explain)?;
            self.left = None;
        }
        Ok(session)
    }

    async fn limited<T>(&self, wait: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T, Ended> {
        Ok(tokio::time::timeout(self.limit, wait).await.map_err(|_| Ended::Silent)??)
    }
}

/// It is about rows, or their texts.
fn of_rows(ended: Ended) -> Ended {
    match ended {
        Ended::Failed(error) => Ended::Rows(error),
        other => other,
    }
}

impl Ended {
    fn explain(self) -> Failure {
        match self {
            Self::Never(failure) => failure,
            Self::Moved => Failure::Moved,
            Self::Silent => Failure::Away("postgres did not answer in time".into()),
            Self::Unknown(why) => Failure::Unknown(why),
            Self::Rows(error) if is_without_partition(&error) => Failure::Broken(
                "a row's day has no partition, and add_visit_day made none: attach or rename the table of that day"
                    .into(),
            ),
            Self::Rows(error) if code(&error).is_some_and(|code| code.starts_with("22") || code.starts_with("23")) => {
                Failure::Refused(why(&error))
            }
            Self::Rows(error) | Self::Failed(error) => failure(explain(&error)),
        }
    }
}

fn failure(error: store::Error) -> Failure {
    match error {
        store::Error::Unavailable(why) => Failure::Away(why),
        store::Error::Broken(why) | store::Error::Schema(why) => Failure::Broken(why),
    }
}

fn why(error: &tokio_postgres::Error) -> String {
    match explain(error) {
        store::Error::Unavailable(why) | store::Error::Broken(why) | store::Error::Schema(why) => why,
    }
}

/// 23514 is that of a CHECK, too, which then is named.
fn is_without_partition(error: &tokio_postgres::Error) -> bool {
    code(error) == Some("23514") && error.as_db_error().is_some_and(|error| error.constraint().is_none())
}

/// In their order, in one flight. Nothing is prepared: a batch is thousands of rows, beside which a plan costs nothing, and
/// a name would outlive a pooler's transaction.
async fn all(client: &Client, queries: &[Query<'_>]) -> Result<Vec<Vec<Row>>, tokio_postgres::Error> {
    let answers = queries.iter().map(|(sql, params)| client.query_typed(sql, params));
    // Each is sent when it is polled first, which for few of them is the order of the list.
    join_all(answers).await.into_iter().collect()
}

async fn prepare(client: &Client, copy: &str, pieces: &[Bytes]) -> Result<Option<Statement>, tokio_postgres::Error> {
    if pieces.is_empty() { Ok(None) } else { client.prepare_typed(copy, &[]).await.map(Some) }
}

fn add_drop(drops: &mut Drops, reason: &str, visits: i64) {
    if let Some(place) = Dropped::ALL.iter().position(|dropped| dropped.name() == reason) {
        drops[place] += visits.cast_unsigned();
    }
}

fn core(row: &Row) -> Result<u16, Failure> {
    let core: i32 = get(row, 1)?;
    u16::try_from(core).map_err(|_| Failure::Broken(format!("spool_positions has core {core}, which no source has")))
}

fn get<'a, T: FromSql<'a>>(row: &'a Row, column: usize) -> Result<T, Failure> {
    row.try_get(column).map_err(|error| failure(explain(&error)))
}
