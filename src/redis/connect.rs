//! Connections to Redis: what the URL means, how one connects to it, and a line, the one connection that all callers share.
//!
//! In: a `redis.url` and a file of authorities; commands. Out: answers, over a connection that is made anew in the
//! background whenever it is of no use any more. Never: makes a caller wait for a connect beyond their deadline.
//! At its limit: an attempt ends after [`CONNECT_TIMEOUT`] (with Sentinel: each question to each of them), the next
//! begins after [`WAIT_MIN_MS`] to [`WAIT_MAX_MS`]. While the last attempt has failed, commands fail at once.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use ::redis::aio::{MultiplexedConnection, PubSub};
use ::redis::io::tcp::TcpSettings;
use ::redis::sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType};
use ::redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, ErrorKind, IntoConnectionInfo, Pipeline,
    RedisConnectionInfo, RedisError, RedisResult, ServerErrorKind, TlsCertificates, TlsMode, Value,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};

use crate::config::{self, ServiceUrl};

/// Of a connect with its handshakes.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const WAIT_MIN_MS: u64 = 100;
const WAIT_MAX_MS: u64 = 1000;

/// Why [`super::Redis::open`] cannot work with its configuration.
#[derive(Debug, thiserror::Error)]
pub enum BadUrl {
    #[error("redis.url {url} cannot be used: {reason}")]
    Url { url: ServiceUrl, reason: String },
    #[error("redis.ca_file {path} cannot be used: {reason}")]
    CaFile { path: PathBuf, reason: String },
}

/// What `redis.url` means.
pub(super) enum Form {
    One(Target),
    Cluster(Seeds),
}

/// What a line leads to.
pub(super) enum Target {
    Single(Client),
    Sentinel(Sentinels),
}

/// The nodes of a cluster that the URL names, which know the others.
pub(super) struct Seeds {
    infos: Vec<ConnectionInfo>,
    tls: Option<TlsCertificates>,
}

pub(super) struct Sentinels {
    addresses: Vec<ConnectionAddr>,
    master: String,
    node: RedisConnectionInfo,
    /// Some: TLS to Sentinels and nodes.
    tls: Option<TlsCertificates>,
}

/// One connection, and the task that keeps it. The task ends with the line.
pub(super) struct Line {
    state: watch::Receiver<State>,
    lost: mpsc::Sender<Loss>,
    /// Runs in a row that nothing answered. After `failures` of them the connection may lead nowhere: the server may
    /// have moved, and nobody has said so.
    silent: AtomicU32,
    failures: u32,
}

#[derive(Clone)]
enum State {
    /// The first attempt, or the first one after a loss, is under way.
    Connecting,
    /// The last attempt has failed, or nothing was answered for so long that nobody waits for the first one.
    Away(RedisError),
    /// The number tells it from those before it.
    Up { number: u64, connection: MultiplexedConnection },
}

/// A connection that is of no use any more.
struct Loss {
    number: u64,
    by_silence: bool,
}

impl Form {
    pub(super) fn new(settings: &config::Redis) -> Result<Self, BadUrl> {
        let bad = |reason: &dyn Display| BadUrl::Url { url: settings.url.clone(), reason: reason.to_string() };
        let text = settings.url.expose();
        let (scheme, rest) = text.split_once("://").ok_or_else(|| bad(&"it has no scheme"))?;
        if rest.contains('#') {
            return Err(bad(&"it has a #, which is written %23 in a password"));
        }
        if matches!(scheme, "redis+unix" | "unix") {
            let info = text.into_connection_info().map_err(|error| bad(&error))?;
            return Ok(Self::One(Target::Single(Client::open(info).map_err(|error| bad(&error))?)));
        }
        let (scheme, form) = scheme.split_once('+').unwrap_or((scheme, ""));
        let tls = match scheme {
            "rediss" => Some(certificates(settings.ca_file.as_deref())?),
            _ => None,
        };
        let (authority, tail) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let (credentials, nodes) = authority.rsplit_once('@').unwrap_or(("", authority));
        let at = if credentials.is_empty() { "" } else { "@" };
        // Each node alone is a URL that the client reads, user and password decoded.
        let infos = |default_port: u16, tail: &str| -> Result<Vec<ConnectionInfo>, BadUrl> {
            let info = |node: &str| {
                let port = if node.rfind(':') > node.rfind(']') { String::new() } else { format!(":{default_port}") };
                let url = format!("{scheme}://{credentials}{at}{node}{port}{tail}");
                let info = url.as_str().into_connection_info().map_err(|error| bad(&error))?;
                Ok(info.set_tcp_settings(tcp_settings()))
            };
            nodes.split(',').map(info).collect()
        };
        match form {
            "" => {
                let [info] = <[ConnectionInfo; 1]>::try_from(infos(6379, tail)?)
                    .map_err(|_| bad(&"it has several nodes: say redis+cluster:// or redis+sentinel://"))?;
                Ok(Self::One(Target::Single(client(info, tls.as_ref()).map_err(|error| bad(&error))?)))
            }
            "cluster" => {
                if !matches!(tail, "" | "/") {
                    return Err(bad(&"a cluster has no databases: nothing may follow its nodes"));
                }
                let seeds = Seeds { infos: infos(6379, "")?, tls };
                for info in &seeds.infos {
                    client(info.clone(), seeds.tls.as_ref()).map_err(|error| bad(&error))?;
                }
                Ok(Self::Cluster(seeds))
            }
            "sentinel" => {
                let (master, database) = match tail.trim_matches('/').split_once('/') {
                    Some((master, database)) => (master, format!("/{database}")),
                    None => (tail.trim_matches('/'), String::new()),
                };
                if master.is_empty() || tail.contains('?') {
                    return Err(bad(&"it must end in the name of the master: redis+sentinel://host,host/name"));
                }
                let infos = infos(26379, &database)?;
                let node = infos[0].redis_settings().clone();
                let addresses = infos.iter().map(|info| info.addr().clone()).collect();
                let sentinels = Sentinels { addresses, master: master.to_owned(), node, tls };
                sentinels.client(true).map_err(|error| bad(&error))?;
                Ok(Self::One(Target::Sentinel(sentinels)))
            }
            other => Err(bad(&format_args!("there is no form {other:?}, only +unix, +cluster and +sentinel"))),
        }
    }
}

impl Target {
    async fn connect(&self) -> RedisResult<MultiplexedConnection> {
        // How long an answer may take is each caller's own: see `Line::run`.
        let config =
            AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECT_TIMEOUT)).set_response_timeout(None);
        self.client().await?.get_multiplexed_async_connection_with_config(&config).await
    }

    /// The server, or the present master.
    pub(super) async fn client(&self) -> RedisResult<Client> {
        match self {
            Self::Single(client) => Ok(client.clone()),
            Self::Sentinel(sentinels) => sentinels.ask().await,
        }
    }
}

impl Seeds {
    #[cfg(test)]
    pub(super) fn new(infos: Vec<ConnectionInfo>) -> Self {
        Self { infos, tls: None }
    }

    pub(super) fn clients(&self) -> impl Iterator<Item = Client> {
        self.infos.iter().filter_map(|info| client(info.clone(), self.tls.as_ref()).ok())
    }

    /// A node that another one has named; user and password are those of all.
    pub(super) fn node(&self, host: &str, port: u16) -> RedisResult<Client> {
        let host = host.to_owned();
        let address = match self.tls {
            None => ConnectionAddr::Tcp(host, port),
            Some(_) => ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None },
        };
        client(self.infos[0].clone().set_addr(address), self.tls.as_ref())
    }
}

impl Sentinels {
    /// The present master, which has said itself that it is one.
    async fn ask(&self) -> RedisResult<Client> {
        // The password is the nodes'. Sentinels often have none, and refuse one then.
        match self.client(false)?.async_get_client().await {
            Err(_) if self.node.password().is_some() => self.client(true)?.async_get_client().await,
            result => result,
        }
    }

    fn client(&self, with_password: bool) -> RedisResult<SentinelClient> {
        let addresses = self.addresses.iter().cloned();
        let mut builder = SentinelClientBuilder::new(addresses, &self.master, SentinelServerType::Master)?
            .set_client_to_redis_tcp_settings(tcp_settings())
            .set_client_to_redis_db(self.node.db());
        if let Some(password) = self.node.password() {
            builder = builder.set_client_to_redis_password(password);
            if with_password {
                builder = builder.set_client_to_sentinel_password(password);
            }
        }
        if let Some(username) = self.node.username() {
            builder = builder.set_client_to_redis_username(username);
            if with_password {
                builder = builder.set_client_to_sentinel_username(username);
            }
        }
        if let Some(certificates) = &self.tls {
            builder = builder
                .set_client_to_redis_tls_mode(TlsMode::Secure)
                .set_client_to_redis_certificates(certificates.clone())
                .set_client_to_sentinel_certificates(certificates.clone());
        }
        builder.build()
    }
}

impl Line {
    pub(super) fn open(target: impl Into<Arc<Target>>, failures: u32) -> Self {
        let (state_sender, state) = watch::channel(State::Connecting);
        let (lost, lost_receiver) = mpsc::channel(1);
        tokio::spawn(keep(target.into(), state_sender, lost_receiver));
        Self { state, lost, silent: AtomicU32::new(0), failures }
    }

    /// The answers to `commands`, in their order; an error of one of them stands in its place. What has not been
    /// answered at `deadline` has timed out.
    pub(super) async fn run(&self, commands: Vec<Cmd>, deadline: Instant) -> Vec<RedisResult<Value>> {
        let count = commands.len();
        let mut state = self.state.clone();
        let state = timeout_at(deadline, state.wait_for(|state| !matches!(state, State::Connecting))).await;
        let (number, mut connection) = match state.ok().and_then(Result::ok).map(|state| state.clone()) {
            Some(State::Up { number, connection }) => (number, connection),
            Some(State::Away(error)) => return vec![Err(error); count],
            Some(State::Connecting) | None => return vec![Err(broken("no connection in time")); count],
        };
        let mut pipeline = Pipeline::with_capacity(count);
        for command in commands {
            pipeline.add_command(command);
        }
        let answers = timeout_at(deadline, connection.send_packed_commands(&pipeline, 0, count)).await;
        let silent = if answers.is_ok() { 0 } else { self.silent.load(Relaxed).saturating_add(1) };
        self.silent.store(silent, Relaxed);
        let answers = match answers.unwrap_or_else(|_| Err(timed_out())) {
            Ok(values) if values.len() == count => values.into_iter().map(Value::extract_error).collect(),
            Ok(_) => vec![Err(broken("it answered with another number of values")); count],
            Err(error) => vec![Err(error); count],
        };
        let by_silence = silent >= self.failures;
        if by_silence || answers.iter().any(|answer| answer.as_ref().is_err_and(is_gone)) {
            // When it is full, somebody has just said so.
            let _ = self.lost.try_send(Loss { number, by_silence });
        }
        answers
    }
}

/// Whether an error says that the connection is of no use: it is closed, or leads to what is no master any more.
fn is_gone(error: &RedisError) -> bool {
    error.is_unrecoverable_error() || error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly)
}

/// Connects, and again each time that `lost` names the present connection, until nobody looks at `state` any more.
async fn keep(target: Arc<Target>, state: watch::Sender<State>, mut lost: mpsc::Receiver<Loss>) {
    let (mut number, mut wait_ms) = (0, WAIT_MIN_MS);
    loop {
        let connected = tokio::select! {
            () = state.closed() => return,
            connected = target.connect() => connected,
        };
        match connected {
            Ok(connection) => {
                number += 1;
                wait_ms = WAIT_MIN_MS;
                state.send_replace(State::Up { number, connection });
                let loss = loop {
                    match lost.recv().await {
                        None => return,
                        Some(loss) if loss.number == number => break loss,
                        // A late word about a connection before this one says nothing.
                        Some(_) => {}
                    }
                };
                state.send_replace(if loss.by_silence { State::Away(timed_out()) } else { State::Connecting });
            }
            Err(error) => {
                state.send_replace(State::Away(error));
                let wait = Duration::from_millis(rand::random_range(wait_ms / 2..=wait_ms));
                tokio::select! {
                    () = state.closed() => return,
                    () = tokio::time::sleep(wait) => {}
                }
                wait_ms = (wait_ms * 2).min(WAIT_MAX_MS);
            }
        }
    }
}

/// A subscription with a connection of its own.
pub(super) async fn subscribe(client: &Client, channel: &str) -> RedisResult<PubSub> {
    let subscribe = async {
        let mut pubsub = client.get_async_pubsub().await?;
        pubsub.subscribe(channel).await?;
        Ok(pubsub)
    };
    tokio::time::timeout(CONNECT_TIMEOUT, subscribe).await.unwrap_or_else(|_| Err(timed_out()))
}

fn client(info: ConnectionInfo, tls: Option<&TlsCertificates>) -> RedisResult<Client> {
    match tls {
        None => Client::open(info),
        Some(certificates) => Client::build_with_tls(info, certificates.clone()),
    }
}

pub(super) fn timed_out() -> RedisError {
    io::Error::new(io::ErrorKind::TimedOut, "no answer in time").into()
}

pub(super) fn broken(reason: &'static str) -> RedisError {
    io::Error::new(io::ErrorKind::UnexpectedEof, reason).into()
}

/// The client's default is Nagle's algorithm, which holds a small command back until the one before it is acknowledged.
fn tcp_settings() -> TcpSettings {
    TcpSettings::default().set_nodelay(true)
}

/// What a server's certificate is checked with, and the one provider of cryptography, if none is installed yet.
fn certificates(ca_file: Option<&Path>) -> Result<TlsCertificates, BadUrl> {
    // Whoever was first has installed the same one.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let Some(path) = ca_file else { return Ok(TlsCertificates { client_tls: None, root_cert: None }) };
    let bad = |reason: &dyn Display| BadUrl::CaFile { path: path.to_owned(), reason: reason.to_string() };
    let pem = std::fs::read(path).map_err(|error| bad(&error))?;
    let count = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>().map_err(|error| bad(&error))?.len();
    if count == 0 {
        return Err(bad(&"it has no certificate: it must be a PEM file"));
    }
    Ok(TlsCertificates { client_tls: None, root_cert: Some(pem) })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Form, Target};
    use crate::config::{Redis, ServiceUrl};

    /// What a URL means, in words, or a part of why it means nothing.
    fn check(url: &str, want: Result<&str, &str>) {
        let settings = Redis {
            url: ServiceUrl::new(url.to_owned()),
            ca_file: None,
            timeout: Duration::from_millis(20),
            ttl: Duration::from_secs(600),
            prefix: String::new(),
        };
        let words = |info: &::redis::ConnectionInfo| {
            let settings = info.redis_settings();
            let [user, password] = [settings.username(), settings.password()].map(|text| text.unwrap_or("-"));
            format!("{} {user} {password} {}", info.addr(), settings.db())
        };
        let got = Form::new(&settings).map_err(|error| error.to_string()).map(|form| match form {
            Form::One(Target::Single(client)) => words(client.get_connection_info()),
            Form::One(Target::Sentinel(sentinels)) => {
                let addresses: Vec<String> = sentinels.addresses.iter().map(ToString::to_string).collect();
                let password = sentinels.node.password().unwrap_or("-");
                let tls = if sentinels.tls.is_some() { " tls" } else { "" };
                format!("{} of {} {password} {}{tls}", sentinels.master, addresses.join(" "), sentinels.node.db())
            }
            Form::Cluster(seeds) => seeds.infos.iter().map(words).collect::<Vec<_>>().join(", "),
        });
        match (got, want) {
            (Ok(got), Ok(want)) => assert_eq!(got, want, "{url}"),
            (Err(got), Err(want)) => {
                assert!(got.contains(want), "{url}: {got}");
                assert!(!got.contains("s3cret"), "{url}: {got}");
            }
            (got, want) => panic!("{url}: {got:?} instead of {want:?}"),
        }
    }

    #[test]
    fn forms_of_urls() {
        check("redis://cache", Ok("cache:6379 - - 0"));
        check("redis://cache:1/2", Ok("cache:1 - - 2"));
        check("redis://:a%40b@[::1]:2", Ok("::1:2 - a@b 0"));
        check("rediss://ann:b@[::1]", Ok("::1:6379 ann b 0"));
        check("redis+unix:///run/redis.sock", Ok("/run/redis.sock - - 0"));
        check("unix:///run/redis.sock?db=3&pass=x", Ok("/run/redis.sock - x 3"));
        check("redis+cluster://a,b:2", Ok("a:6379 - - 0, b:2 - - 0"));
        check("rediss+cluster://u:p@a:1,b/", Ok("a:1 u p 0, b:6379 u p 0"));
        check("redis+sentinel://a,b:2/links", Ok("links of a:26379 b:2 - 0"));
        check("rediss+sentinel://:p@a/links/3", Ok("links of a:26379 p 3 tls"));
        check("redis://:s3cret@a,b", Err("(hidden)@a,b cannot be used: it has several nodes"));
        check("redis://:s3cret@a/x", Err("database number"));
        check("redis://:s3#cret@a", Err("it has a #, which is written %23"));
        check("redis+cluster://:s3cret@a/1", Err("a cluster has no databases"));
        check("redis+sentinel://:s3cret@a", Err("must end in the name of the master"));
        check("redis+sentinel://:s3cret@a/links/x", Err("database number"));
        check("redis+cluster://:s3cret@a,,b", Err("cannot be used"));
        check("redis+magic://:s3cret@a", Err("there is no form \"magic\""));
    }
}
