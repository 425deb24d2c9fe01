//! The store of many instances: Postgres, or what speaks its protocol.
//!
//! In: the same calls as the embedded store gets. Out: the same answers, durable where they say so.
//! Never: connects before it is asked; waits for us inside of a transaction (each is sent whole, so that an instance that
//! freezes holds no lock); asks the server for types; leaves something in a session (no `SET`, no `LISTEN`, no session lock,
//! and with `statements = "unnamed"` no named statement), so that a pooler may give each transaction another connection.
//! At its limit: every statement or transaction ends `statement_timeout` after it got a connection as
//! [`Error::Unavailable`] (look-ups: after `lookup_timeout` in all; what reads a whole table: after a minute), its connection is closed, and the server ends it
//! too: because it is asked to cancel it, or by the time-out of its transaction. A call may be several of them, and each
//! waits for a connection and for room before. Transactions leave half of the pool to look-ups and polls, and listings
//! half of that to what writes; creates and visits wait in a bounded queue, for as long as `insert` says. What ended by its time may have been written all the same, or be written a moment later:
//! where it can be told it is asked for, else the error says so.
//!
//! Links change in one way only, see `Inner::write`: lock the row of the feed, change, give versions from that row, update
//! it, commit. The order of commits is the order of versions, and no version is left out.

pub(crate) mod connect;
pub(crate) mod errors;
pub(crate) mod fence;
mod insert;
mod leases;
mod links;
mod listen;
mod migrate;
mod moving;
mod moving_visits;
mod settings;
mod stats;
mod warm;

use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use deadpool::managed::Object;
use deadpool_postgres::ClientWrapper;
use futures_util::future::{join_all, join3};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc};
use tokio_postgres::types::{FromSql, ToSql, Type};
use tokio_postgres::{Row, Statement};

pub use listen::Hints;
pub use migrate::{MIGRATIONS, grants, migrate, pending};

use super::{Error, Result};
use crate::config::{self, Statements};
use connect::{Canceller, Connector, Pool};
use errors::{explain, explain_pool, is_conflict, refuses_statement, spares_connection};
use fence::{FAILED_OVER, Fence};

/// How often a transaction is sent again that met another one.
const ATTEMPTS_MAX: u32 = 10;
/// For what reads a whole table, and is asked rarely.
const WHOLE_TABLE: Duration = Duration::from_secs(60);
const LIMIT_WHOLE_TABLE: &str = "SET LOCAL statement_timeout = '60s'";
/// What a server without a write-ahead log of its own, or one that does not let us see it, is asked instead.
const NO_TIMELINE: &str = "''";
const TIMELINE: &str =
    "CASE WHEN pg_is_in_recovery() THEN '' ELSE substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) END";
/// It is the same on a standby.
const CLUSTER: &str = "(SELECT system_identifier::text FROM pg_control_system())";

/// First in every transaction: what a server gets after a `BEGIN` that it refused (somebody cancelled it) runs by itself.
/// What gives versions asks for this, and gives none then: columns that are NOT NULL refuse the rest.
const BEGUN: &str = "SET LOCAL waypost.begun = 'yes'";
/// First in every transaction that changes links.
const LOCK: &str = "SELECT version FROM feed FOR UPDATE";
/// Last in it. The hint proves nothing: who misses it polls.
const BUMP: &str = "WITH last AS (SELECT max(version) AS version FROM link_changes),
    bumped AS (UPDATE feed SET version = last.version FROM last WHERE feed.version < last.version RETURNING one)
  SELECT pg_notify('waypost', '') FROM bumped";

/// A value and its type, so that the server need not be asked for it.
type Param<'a> = (&'a (dyn ToSql + Sync), Type);
/// A constant text and its values.
type Query<'a> = (&'a str, &'a [Param<'a>]);

/// A handle; the writers end when the last one is dropped.
#[derive(Clone, Debug)]
pub struct Postgres {
    inner: Arc<Inner>,
    /// To the writers, which start with the first write: before, there may be no runtime.
    writes: Arc<OnceLock<mpsc::Sender<insert::Write>>>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    primary: Pool,
    replica: Option<Pool>,
    replica_max_lag: Duration,
    /// Around all that is written to.
    fence: Arc<Fence>,
    /// For what needs a session; none where there is no way past a pooler.
    direct: Option<Connector>,
    statements: Statements,
    /// None behind a pooler: PgBouncer forgets a request whose connection ends before it is passed on, as the driver ends
    /// it (measured with 1.18).
    canceller: Option<Canceller>,
    /// Begins a transaction and limits what the server does for it when we are gone.
    begin: String,
    statement_timeout: Duration,
    lookup_timeout: Duration,
    /// The longest that a write waits for its outcome.
    write_timeout: Duration,
    /// Transactions at once, half of the pool: while all of them wait for a lock, look-ups find connections.
    beside: Semaphore,
    /// Of them those that only read, half as many: while all of them go through many links, what writes finds room. (In
    /// a pool of less than four there is one transaction at a time.)
    readers: Semaphore,
    /// The server has not refused to show its timeline.
    shows_timeline: AtomicBool,
    visits_swept: AtomicU64,
}

/// What `/metrics` shows: of the pool, and of limited links.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    pub pool_max: usize,
    pub open: usize,
    pub idle: usize,
    /// Calls that wait for a connection.
    pub waiting: usize,
    /// Visits of leases that were taken for lost, because nobody settled them: see `insert::TAKE_VISITS`. What their
    /// holders had spent of them is not known.
    pub visits_swept: u64,
}

/// A transaction that failed.
#[derive(Debug)]
struct Failed {
    error: Error,
    /// It may be sent again as it is.
    is_conflict: bool,
    /// It may have been committed.
    is_unknown: bool,
}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Self {
        failed.error
    }
}

impl Failed {
    fn unsent(error: Error) -> Self {
        Self { error, is_conflict: false, is_unknown: false }
    }
}

impl Postgres {
    /// Makes the handle; no connection is made. Fails on a URL or a file of authorities that cannot be read, as
    /// [`Error::Schema`].
    pub fn open(settings: &config::Postgres) -> Result<Self> {
        let fence = Arc::default();
        let primary = Connector::new("postgres.url", &settings.url, settings)?.primary(&fence);
        let replica = match &settings.replica_url {
            Some(url) => Some(Connector::new("postgres.replica_url", url, settings)?.pool(settings)?),
            None => None,
        };
        let direct = match (&settings.direct_url, settings.statements) {
            (Some(url), _) => Some(Connector::new("postgres.direct_url", url, settings)?.primary(&fence)),
            (None, Statements::Prepared) => Some(primary.clone()),
            (None, Statements::Unnamed) => None,
        };
        let limit_ms = settings.statement_timeout.as_millis();
        let inner = Inner {
            name: format!("postgres {}", settings.url),
            primary: primary.pool(settings)?,
            replica,
            replica_max_lag: settings.replica_max_lag,
            fence,
            direct,
            statements: settings.statements,
            canceller: (settings.statements == Statements::Prepared).then(|| primary.canceller()),
            begin: format!(
                "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = {limit_ms}; \
                 SET LOCAL lock_timeout = {limit_ms}; SET LOCAL idle_in_transaction_session_timeout = {limit_ms}; {BEGUN}"
            ),
            statement_timeout: settings.statement_timeout,
            lookup_timeout: settings.lookup_timeout,
            // One transaction of others, and its own.
            write_timeout: settings.pool_timeout + settings.statement_timeout * 2,
            beside: Semaphore::new((settings.pool / 2).max(1)),
            readers: Semaphore::new((settings.pool / 4).max(1)),
            shows_timeline: AtomicBool::new(true),
            visits_swept: AtomicU64::new(0),
        };
        Ok(Self { inner: Arc::new(inner), writes: Arc::default() })
    }

    /// For connections to the same store beside this one's.
    pub(crate) fn fence(&self) -> &Arc<Fence> {
        &self.inner.fence
    }

    /// Without user and password.
    #[must_use]
    pub fn describe(&self) -> String {
        self.inner.name.clone()
    }

    #[must_use]
    pub fn figures(&self) -> Figures {
        let status = self.inner.primary.status();
        Figures {
            pool_max: status.max_size,
            open: status.size,
            idle: status.available,
            waiting: status.waiting,
            visits_swept: self.inner.visits_swept.load(Ordering::Relaxed),
        }
    }

    /// [`Error::Schema`] if the schema is not up to date, or not ours; [`Error::Unavailable`] if nobody answers.
    pub async fn check_schema(&self) -> Result<()> {
        migrate::only_utf8(&self.inner.one(migrate::ENCODING, &[]).await?)?;
        let rows = self.inner.one(migrate::APPLIED, &[]).await.map_err(migrate::not_ours)?;
        let applied = rows.iter().map(migrate::applied).collect::<Result<Vec<_>>>()?;
        match super::schema::pending(&MIGRATIONS, &applied)? {
            [] => Ok(()),
            [first, ..] => Err(Error::Schema(format!(
                "the store {} lacks migration {} ({}): run `waypost migrate`",
                self.inner.name, first.number, first.name
            ))),
        }
    }
}

impl Inner {
    /// One statement, without a transaction around it if the server can be told to end it: what reads little or writes
    /// one row. On the primary.
    async fn one(&self, sql: &str, params: &[Param<'_>]) -> Result<Vec<Row>> {
        self.within(self.statement_timeout, &self.primary, sql, params).await
    }

    async fn within(&self, limit: Duration, pool: &Pool, sql: &str, params: &[Param<'_>]) -> Result<Vec<Row>> {
        if self.canceller.is_none() {
            // The server's own limit is set by a transaction, which costs no round trip.
            return Ok(self.flight(pool, &[(sql, params)]).await?.pop().unwrap_or_default());
        }
        let session = self.session(pool).await?;
        limited(limit, async {
            let asked = async { session.query(session.prepare(sql, params).await?.as_ref(), sql, params).await };
            let answer = asked.await;
            let ended = session.end(answer.as_ref().err());
            let rows = answer.map_err(|error| explain(&error))?;
            ended.map(|()| rows)
        })
        .await
    }

    /// A reading that may be long, on the primary: limited to what look-ups and writes leave.
    async fn read(&self, sql: &str, params: &[Param<'_>]) -> Result<Vec<Row>> {
        let _reader = self.room(&self.readers).await?;
        let mut answers = self.transaction(&[(sql, params)]).await?;
        Ok(answers.pop().unwrap_or_default())
    }

    /// The same for what reads a whole table: it may take [`WHOLE_TABLE`].
    async fn read_all(&self, sql: &str, params: &[Param<'_>]) -> Result<Vec<Row>> {
        let _reader = self.room(&self.readers).await?;
        let _beside = self.room(&self.beside).await?;
        let queries: [Query<'_>; 2] = [(LIMIT_WHOLE_TABLE, &[]), (sql, params)];
        Ok(self.flight_within(WHOLE_TABLE, &self.primary, &queries).await?.pop().unwrap_or_default())
    }

    /// Changes links: `queries` in one transaction that holds the feed's row from beginning to end. They give versions
    /// from it, upwards without a gap, and write a row into `link_changes` for each.
    async fn write(&self, queries: &[Query<'_>]) -> std::result::Result<Vec<Vec<Row>>, Failed> {
        let mut all = vec![(LOCK, [].as_slice())];
        all.extend_from_slice(queries);
        all.push((BUMP, &[]));
        let mut answers = self.again(&all).await?;
        answers.pop();
        answers.remove(0);
        Ok(answers)
    }

    /// A transaction that is sent again, a few times, if it met another one.
    async fn again(&self, queries: &[Query<'_>]) -> std::result::Result<Vec<Vec<Row>>, Failed> {
        let mut attempts = 1;
        loop {
            match self.transaction(queries).await {
                Err(failed) if failed.is_conflict && attempts < ATTEMPTS_MAX => attempts += 1,
                Err(Failed { error: Error::Unavailable(why), is_unknown: true, is_conflict }) => {
                    let error = Error::Unavailable(format!("{why}; whether it was written is not known"));
                    return Err(Failed { error, is_conflict, is_unknown: true });
                }
                ended => return ended,
            }
        }
    }

    /// On the primary, in what room look-ups leave.
    async fn transaction(&self, queries: &[Query<'_>]) -> std::result::Result<Vec<Vec<Row>>, Failed> {
        let _beside = self.room(&self.beside).await.map_err(Failed::unsent)?;
        self.flight(&self.primary, queries).await
    }

    /// Waits as long as one that is under way may take.
    async fn room<'a>(&self, among: &'a Semaphore) -> Result<SemaphorePermit<'a>> {
        match tokio::time::timeout(self.statement_timeout, among.acquire()).await {
            Ok(permit) => permit.map_err(|_| Error::Broken("it is closed".into())),
            Err(_) => Err(Error::Unavailable(
                "too many transactions are under way, which have half of the connections and listings a quarter: \
                 postgres.pool says how many there are"
                    .into(),
            )),
        }
    }

    async fn flight(&self, pool: &Pool, queries: &[Query<'_>]) -> std::result::Result<Vec<Vec<Row>>, Failed> {
        self.flight_within(self.statement_timeout, pool, queries).await
    }

    /// Everything in one flight: `BEGIN`, the queries, `COMMIT`, without waiting for an answer in between.
    async fn flight_within(
        &self,
        limit: Duration,
        pool: &Pool,
        queries: &[Query<'_>],
    ) -> std::result::Result<Vec<Vec<Row>>, Failed> {
        let session = self.session(pool).await.map_err(Failed::unsent)?;
        // Before it begins: to prepare one inside of it would let it wait for us.
        let preparing = async {
            let mut statements = Vec::with_capacity(queries.len());
            for (sql, params) in queries {
                statements.push(session.prepare(sql, params).await.map_err(|error| explain(&error))?);
            }
            Ok(statements)
        };
        let statements = limited(self.statement_timeout, preparing).await.map_err(Failed::unsent)?;
        let answers = queries
            .iter()
            .zip(&statements)
            .map(|((sql, params), statement)| session.query(statement.as_ref(), sql, params));
        // They are sent in the order in which they are polled first, which for few of them is the order of the list.
        let flight =
            join3(session.object.batch_execute(&self.begin), join_all(answers), session.object.batch_execute("COMMIT"));
        let Ok((begun, answers, committed)) = tokio::time::timeout(limit, flight).await else {
            return Err(Failed { error: too_late(limit), is_conflict: false, is_unknown: true });
        };
        // Without its BEGIN each statement was a transaction of its own: see `BEGUN`.
        let (error, is_unknown) = match (begun, answers.into_iter().collect(), committed) {
            (Ok(()), Ok(answers), Ok(())) => {
                return match session.end(None) {
                    Ok(()) => Ok(answers),
                    Err(error) => Err(Failed { error, is_conflict: false, is_unknown: true }),
                };
            }
            (Err(error), ..) | (_, Ok(_), Err(error)) => (error, true),
            // After a statement that the server refused, COMMIT is a ROLLBACK: then nothing is unknown.
            (_, Err(error), _) => {
                let is_refused = refuses_statement(&error);
                (error, !is_refused)
            }
        };
        let failed = Failed { error: explain(&error), is_conflict: is_conflict(&error), is_unknown };
        // It has failed already.
        drop(session.end(Some(&error)));
        Err(failed)
    }

    /// Waits as long as the pool lets it: `pool_timeout`, and `connect_timeout`.
    async fn session(&self, pool: &Pool) -> Result<Session> {
        let object = pool.get().await.map_err(|error| explain_pool(&error))?;
        Ok(Session {
            object: Held { object: Some(object), canceller: self.canceller.clone() },
            statements: self.statements,
        })
    }
}

/// A connection for one call. It goes back into the pool only if its last answer has come: dropped before (a time-out,
/// a caller that gave up), the server is asked to cancel what it does, and it is closed.
struct Session {
    object: Held,
    statements: Statements,
}

struct Held {
    object: Option<Object<Connector>>,
    canceller: Option<Canceller>,
}

impl std::ops::Deref for Held {
    type Target = ClientWrapper;

    fn deref(&self) -> &ClientWrapper {
        &self.object.as_ref().expect("taken only when it is dropped").client
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(object) = self.object.take() else { return };
        let client = Object::take(object).client;
        // A server that waits for a lock does not see that we are gone: its processes would pile up until it takes no
        // more connections.
        if let (Some(canceller), Ok(runtime)) = (self.canceller.take(), tokio::runtime::Handle::try_current())
            && !client.is_closed()
        {
            runtime.spawn(async move { canceller.cancel(&client).await });
        }
    }
}

impl Session {
    async fn prepare(
        &self,
        sql: &str,
        params: &[Param<'_>],
    ) -> std::result::Result<Option<Statement>, tokio_postgres::Error> {
        match self.statements {
            Statements::Unnamed => Ok(None),
            Statements::Prepared => {
                let types: Vec<Type> = params.iter().map(|(_, kind)| kind.clone()).collect();
                self.object.prepare_typed_cached(sql, &types).await.map(Some)
            }
        }
    }

    async fn query(
        &self,
        prepared: Option<&Statement>,
        sql: &str,
        params: &[Param<'_>],
    ) -> std::result::Result<Vec<Row>, tokio_postgres::Error> {
        match prepared {
            Some(statement) => {
                let values: Vec<&(dyn ToSql + Sync)> = params.iter().map(|(value, _)| *value).collect();
                self.object.query(statement, &values).await
            }
            None => self.object.query_typed(sql, params).await,
        }
    }

    /// All answers have come; one of them may be an error. Fails if another server is the store by now: this one may have
    /// been frozen, and what it says that it has written is nowhere else.
    fn end(mut self, error: Option<&tokio_postgres::Error>) -> Result<()> {
        let Some(object) = self.object.object.take() else { return Ok(()) };
        let is_believed = object.admission.holds();
        if !is_believed || !error.is_none_or(spares_connection) {
            drop(Object::take(object));
        }
        if is_believed { Ok(()) } else { Err(Error::Unavailable(FAILED_OVER.into())) }
    }
}

async fn limited<T>(limit: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(too_late(limit)))
}

fn too_late(limit: Duration) -> Error {
    Error::Unavailable(format!("postgres did not answer within {} ms", limit.as_millis()))
}

/// A column of a row.
fn get<'a, T: FromSql<'a>>(row: &'a Row, column: usize) -> Result<T> {
    row.try_get(column).map_err(|error| explain(&error))
}

/// A column that is never negative, and is no larger than `T` holds.
fn number<T: TryFrom<i64>>(row: &Row, column: usize) -> Result<T> {
    let value: i64 = get(row, column)?;
    T::try_from(value).map_err(|_| Error::Broken(format!("column {column} has {value}, which is out of its range")))
}

/// Numbers are as large as a bigint at the most: ids and versions count up from 1, limits are checked before.
fn bigint(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn only(rows: &[Row]) -> Result<&Row> {
    rows.first().ok_or_else(|| Error::Broken("a row is missing that is always there".into()))
}
