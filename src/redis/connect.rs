//! Connections to Redis: what the URL means, how one connects to it, and the one connection that all callers share.
//!
//! In: a `redis.url` and a file of authorities. Out: a connection in a `watch`, renewed in the background whenever a
//! caller says that it is of no use any more. Never: makes a caller wait for a connect; asks a command of its own.
//! At its limit: an attempt ends after [`CONNECT_TIMEOUT`] (with Sentinel: each question to each of them), the next
//! begins after [`WAIT_MIN_MS`] to [`WAIT_MAX_MS`].

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ::redis::aio::{ConnectionLike, MultiplexedConnection, PubSub};
use ::redis::cluster::{ClusterClient, ClusterClientBuilder};
use ::redis::cluster_async::ClusterConnection;
use ::redis::io::tcp::TcpSettings;
use ::redis::sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType};
use ::redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, Pipeline,
    RedisConnectionInfo, RedisError, RedisResult, TlsCertificates, TlsMode, Value,
};
use futures_util::future::join_all;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};

use crate::config::{self, ServiceUrl};

/// Of a connect with its handshakes, and of the questions that the cluster client asks for itself.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const WAIT_MIN_MS: u64 = 100;
const WAIT_MAX_MS: u64 = 1000;
/// How long a node of a cluster may take to say who has which slots. All calls wait for it meanwhile, so that a frozen
/// node must not hold them up for long.
const TOPOLOGY_TIMEOUT: Duration = Duration::from_millis(250);
/// A key that has moved is asked for again at most so often.
const CLUSTER_RETRIES: u32 = 3;
const CLUSTER_RETRY_MIN_MS: u64 = 2;
const CLUSTER_RETRY_MAX_MS: u64 = 50;

/// Why [`super::Redis::open`] cannot work with its configuration.
#[derive(Debug, thiserror::Error)]
pub enum BadUrl {
    #[error("redis.url {url} cannot be used: {reason}")]
    Url { url: ServiceUrl, reason: String },
    #[error("redis.ca_file {path} cannot be used: {reason}")]
    CaFile { path: PathBuf, reason: String },
}

/// What `redis.url` leads to.
pub(super) enum Target {
    Single(Client),
    Sentinel(Sentinels),
    /// The nodes are those of the URL; the client finds the others.
    Cluster {
        client: ClusterClient,
        nodes: Vec<Client>,
    },
}

pub(super) struct Sentinels {
    addresses: Vec<ConnectionAddr>,
    master: String,
    node: RedisConnectionInfo,
    /// Some: TLS to Sentinels and nodes.
    tls: Option<TlsCertificates>,
}

/// A connection that is shared by its clones.
#[derive(Clone)]
pub(super) enum Connection {
    Single(MultiplexedConnection),
    Cluster(ClusterConnection),
}

/// What callers see of the connection.
#[derive(Clone)]
pub(super) enum State {
    Away {
        reason: String,
    },
    /// The number tells it from those before it.
    Up {
        number: u64,
        connection: Connection,
    },
}

impl Target {
    pub(super) fn new(settings: &config::Redis) -> Result<Self, BadUrl> {
        let bad = |reason: &dyn Display| BadUrl::Url { url: settings.url.clone(), reason: reason.to_string() };
        let text = settings.url.expose();
        let (scheme, rest) = text.split_once("://").ok_or_else(|| bad(&"it has no scheme"))?;
        if rest.contains('#') {
            return Err(bad(&"it has a #, which is written %23 in a password"));
        }
        if matches!(scheme, "redis+unix" | "unix") {
            let info = text.into_connection_info().map_err(|error| bad(&error))?;
            return Ok(Self::Single(Client::open(info).map_err(|error| bad(&error))?));
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
        let client = |info| match &tls {
            None => Client::open(info),
            Some(certificates) => Client::build_with_tls(info, certificates.clone()),
        };
        match form {
            "" => {
                let [info] = <[ConnectionInfo; 1]>::try_from(infos(6379, tail)?)
                    .map_err(|_| bad(&"it has several nodes: say redis+cluster:// or redis+sentinel://"))?;
                Ok(Self::Single(client(info).map_err(|error| bad(&error))?))
            }
            "cluster" => {
                if !matches!(tail, "" | "/") {
                    return Err(bad(&"a cluster has no databases: nothing may follow its nodes"));
                }
                let infos = infos(6379, "")?;
                let mut builder = ClusterClientBuilder::new(infos.clone())
                    .tcp_settings(tcp_settings())
                    .connection_timeout(CONNECT_TIMEOUT)
                    .response_timeout(TOPOLOGY_TIMEOUT)
                    .overall_response_timeout(None)
                    .retries(CLUSTER_RETRIES)
                    .min_retry_wait(CLUSTER_RETRY_MIN_MS)
                    .max_retry_wait(CLUSTER_RETRY_MAX_MS);
                if let Some(certificates) = &tls {
                    builder = builder.certs(certificates.clone());
                }
                let nodes: RedisResult<_> = infos.into_iter().map(client).collect();
                Ok(Self::Cluster {
                    client: builder.build().map_err(|error| bad(&error))?,
                    nodes: nodes.map_err(|error| bad(&error))?,
                })
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
                Ok(Self::Sentinel(sentinels))
            }
            other => Err(bad(&format_args!("there is no form {other:?}, only +unix, +cluster and +sentinel"))),
        }
    }

    pub(super) fn is_cluster(&self) -> bool {
        matches!(self, Self::Cluster { .. })
    }

    async fn connect(&self) -> RedisResult<Connection> {
        if let Self::Cluster { client, .. } = self {
            return Ok(Connection::Cluster(client.get_async_connection().await?));
        }
        // How long an answer may take is each caller's own: see `Connection::run`.
        let config =
            AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECT_TIMEOUT)).set_response_timeout(None);
        let connection = self.node().await?.get_multiplexed_async_connection_with_config(&config).await?;
        Ok(Connection::Single(connection))
    }

    /// A subscription with a connection of its own.
    pub(super) async fn subscribe(&self, channel: &str) -> RedisResult<PubSub> {
        let client = self.node().await?;
        let subscribe = async {
            let mut pubsub = client.get_async_pubsub().await?;
            pubsub.subscribe(channel).await?;
            Ok(pubsub)
        };
        tokio::time::timeout(CONNECT_TIMEOUT, subscribe).await.unwrap_or_else(|_| Err(timed_out()))
    }

    /// The server, the present master, or some node of the cluster.
    async fn node(&self) -> RedisResult<Client> {
        match self {
            Self::Single(client) => Ok(client.clone()),
            Self::Sentinel(sentinels) => sentinels.ask().await,
            Self::Cluster { nodes, .. } => Ok(nodes[rand::random_range(0..nodes.len())].clone()),
        }
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

impl Connection {
    /// The answers to `commands`, in their order; an error of one of them stands in its place. What has not been
    /// answered at `deadline` has timed out.
    pub(super) async fn run(self, commands: Vec<Cmd>, deadline: Instant) -> Vec<RedisResult<Value>> {
        match self {
            Self::Single(mut connection) => {
                let count = commands.len();
                let mut pipeline = Pipeline::with_capacity(count);
                for command in commands {
                    pipeline.add_command(command);
                }
                let answers = timeout_at(deadline, connection.send_packed_commands(&pipeline, 0, count)).await;
                match answers.unwrap_or_else(|_| Err(timed_out())) {
                    Ok(values) if values.len() == count => values.into_iter().map(Value::extract_error).collect(),
                    Ok(_) => vec![Err(broken("it answered with another number of values")); count],
                    Err(error) => vec![Err(error); count],
                }
            }
            // A pipeline of a cluster goes to one node alone. Single commands are gathered into one write a node.
            Self::Cluster(connection) => {
                join_all(commands.into_iter().map(|command| {
                    let mut connection = connection.clone();
                    async move {
                        let answer = timeout_at(deadline, connection.req_packed_command(&command)).await;
                        answer.unwrap_or_else(|_| Err(timed_out())).and_then(Value::extract_error)
                    }
                }))
                .await
            }
        }
    }
}

/// Connects, and again each time that `lost` names the present connection, until nobody looks at `state` any more.
pub(super) async fn keep(target: std::sync::Arc<Target>, state: watch::Sender<State>, mut lost: mpsc::Receiver<u64>) {
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
                // A late word about a connection before this one says nothing.
                while lost.recv().await.is_some_and(|which| which != number) {}
                if lost.is_closed() {
                    return;
                }
                state.send_replace(State::Away { reason: "the connection was lost".to_owned() });
            }
            Err(error) => {
                state.send_replace(State::Away { reason: error.to_string() });
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
