//! Connections to Postgres: from a URL to a pool, or to one connection of its own.
//!
//! In: a URL as libpq reads it. Out: connections, with TLS as its `sslmode` says.
//! Never: connects when it is only made; waits for one host so that the next is not asked; keeps a connection much past
//! `postgres.max_lifetime`, or one to a server that the [`Fence`] shuts out.
//! At its limit: who finds no connection free waits `postgres.pool_timeout`, then gets an error.
//!
//! `sslmode` and `sslrootcert`: PostgreSQL manual, section 34.19 (libpq, SSL support).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use deadpool::Runtime;
use deadpool::managed::{self, PoolConfig, RecycleError, Timeouts};
use deadpool_postgres::ClientWrapper;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use rand::seq::SliceRandom;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::task::AbortHandle;
use tokio_postgres::config::{Host, LoadBalanceHosts, SslMode, TargetSessionAttrs};
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{Error as Failure, SimpleQueryMessage, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;
use url::form_urlencoded;

use super::errors::{code, explain};
use super::fence::{Admission, Fence, Server};
use super::{CLUSTER, TIMELINE};
use crate::config::{self, ServiceUrl};
use crate::store::{Error, Result};

/// What was sent and is not acknowledged after this time ends a connection, and so does silence of about the same.
const DEAD_AFTER: Duration = Duration::from_secs(5);
const KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEPALIVE_RETRIES: u32 = 3;
/// A host that has not answered for so long is asked on beside the next one. The kernel of a server that hangs completes the
/// handshake of TCP for it: in turn, each connection would wait its whole time-out there first, and a poll, which has a
/// second, would never come to the next host.
const NEXT_HOST_AFTER: Duration = Duration::from_millis(250);
/// By how much of its lifetime a connection ends earlier than another, in thousandths: else all of them, made in the
/// same moment, would end in the same moment.
const LIFETIME_JITTER_PERMILLE: u64 = 200;

/// How to reach one server.
#[derive(Clone)]
pub(crate) struct Connector {
    /// One for each host.
    hosts: Vec<tokio_postgres::Config>,
    /// The place of the one that took the last connection: it is asked first.
    first: Arc<AtomicUsize>,
    /// Asked only of a server that is written to.
    fence: Arc<Fence>,
    is_primary: bool,
    tls: MakeRustlsConnect,
    timeout: Duration,
    max_lifetime: Duration,
    jitter: ahash::RandomState,
}

pub(super) type Pool = managed::Pool<Connector>;

/// A connection of the pool, with its prepared statements.
#[derive(Debug)]
pub(crate) struct Pooled {
    pub(super) client: ClientWrapper,
    pub(super) admission: Admission,
}

/// A connection beside the pool; closed when it is dropped. To drop the client is not enough: the connection stays until
/// every answer has come, which a silent server never sends.
#[derive(Debug)]
pub(crate) struct Single {
    pub(crate) client: tokio_postgres::Client,
    pub(crate) admission: Admission,
    connection: AbortHandle,
}

impl Drop for Single {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connector({} hosts)", self.hosts.len())
    }
}

/// Asks a server to end what it does for a connection.
#[derive(Clone)]
pub(super) struct Canceller {
    tls: MakeRustlsConnect,
    timeout: Duration,
}

impl fmt::Debug for Canceller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Canceller")
    }
}

impl Canceller {
    /// On a connection of its own. Nobody learns whether it was heard.
    pub(super) async fn cancel(&self, client: &tokio_postgres::Client) {
        let token = client.cancel_token();
        let _ = tokio::time::timeout(self.timeout, token.cancel_query(self.tls.clone())).await;
    }
}

impl Connector {
    /// `key` names the URL in errors, which are all [`Error::Schema`]: a URL or a file that cannot be read.
    pub(crate) fn new(key: &str, url: &ServiceUrl, settings: &config::Postgres) -> Result<Self> {
        let wrong = |why: String| Error::Schema(format!("{key}: {why}"));
        let (rest, tls) = Tls::take_out_of(url.expose()).map_err(wrong)?;
        let mut config: tokio_postgres::Config = rest.parse().map_err(|error: tokio_postgres::Error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            wrong(format!("{error}: {cause}"))
        })?;
        config
            .application_name("waypost")
            .connect_timeout(settings.connect_timeout)
            .tcp_user_timeout(DEAD_AFTER)
            .keepalives_idle(KEEPALIVE_IDLE)
            .keepalives_interval(KEEPALIVE_INTERVAL)
            .keepalives_retries(KEEPALIVE_RETRIES)
            .ssl_mode(tls.mode);
        Ok(Self {
            hosts: each_host(&config),
            first: Arc::default(),
            fence: Arc::default(),
            is_primary: false,
            tls: MakeRustlsConnect::new(tls.client().map_err(wrong)?),
            timeout: settings.connect_timeout,
            max_lifetime: settings.max_lifetime,
            jitter: ahash::RandomState::new(),
        })
    }

    /// For a server that is written to: of several hosts, the one that takes writes, and none that `fence` shuts out.
    pub(crate) fn primary(mut self, fence: &Arc<Fence>) -> Self {
        (self.fence, self.is_primary) = (Arc::clone(fence), true);
        if self.hosts.len() > 1 {
            for host in &mut self.hosts {
                host.target_session_attrs(TargetSessionAttrs::ReadWrite);
            }
        }
        self
    }

    pub(super) fn canceller(&self) -> Canceller {
        Canceller { tls: self.tls.clone(), timeout: self.timeout }
    }

    pub(super) fn pool(&self, settings: &config::Postgres) -> Result<Pool> {
        let timeouts =
            Timeouts { wait: Some(settings.pool_timeout), create: Some(self.limit()), recycle: Some(self.limit()) };
        Pool::builder(self.clone())
            .config(PoolConfig { timeouts, ..PoolConfig::new(settings.pool) })
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| Error::Broken(error.to_string()))
    }

    /// One connection beside the pool. `heard` is called for each notification, and dropped when the connection ends.
    pub(crate) async fn connect(&self, mut heard: impl FnMut() + Send + 'static) -> Result<Single> {
        let connecting = tokio::time::timeout(self.limit(), self.any_host());
        let (client, mut connection, admission) = connecting
            .await
            .map_err(|_| {
                Error::Unavailable("postgres did not take a connection within postgres.connect_timeout".into())
            })?
            .map_err(|error| explain(&error))?;
        let task = tokio::spawn(async move {
            loop {
                match std::future::poll_fn(|cx| connection.poll_message(cx)).await {
                    Some(Ok(tokio_postgres::AsyncMessage::Notification(_))) => heard(),
                    Some(Ok(_)) => {}
                    // Whoever waits for an answer on it is told.
                    Some(Err(_)) | None => return,
                }
            }
        });
        Ok(Single { client, admission, connection: task.abort_handle() })
    }
}

type Stream = <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream;
type Connected = (tokio_postgres::Client, tokio_postgres::Connection<Socket, Stream>, Admission);

impl Connector {
    /// Of the host that takes it first. Whoever asks limits this by [`Connector::limit`].
    async fn any_host(&self) -> std::result::Result<Connected, Failure> {
        let (count, first) = (self.hosts.len(), self.first.load(Ordering::Relaxed));
        let mut others = (1..count).map(|more| (first + more) % count);
        let asked = FuturesUnordered::from_iter([self.host(first)]);
        tokio::pin!(asked);
        loop {
            match tokio::time::timeout(NEXT_HOST_AFTER, asked.next()).await {
                Ok(Some((place, Ok(connected)))) => {
                    self.first.store(place, Ordering::Relaxed);
                    return Ok(connected);
                }
                Ok(Some((_, Err(error)))) => match others.next() {
                    Some(next) => asked.push(self.host(next)),
                    None if asked.is_empty() => return Err(error),
                    None => {}
                },
                Ok(None) => unreachable!("somebody is asked"),
                Err(_) => asked.extend(others.next().map(|next| self.host(next))),
            }
        }
    }

    async fn host(&self, place: usize) -> (usize, std::result::Result<Connected, Failure>) {
        let connecting = async {
            let (client, mut connection) = self.hosts[place].connect(self.tls.clone()).await?;
            let admission = tokio::select! {
                admission = self.admission(&client) => admission?,
                Err(error) = &mut connection => return Err(error),
            };
            Ok((client, connection, admission))
        };
        (place, connecting.await)
    }

    /// Fails at a server that the fence shuts out. One that does not say which it is gets in.
    async fn admission(&self, client: &tokio_postgres::Client) -> std::result::Result<Admission, Failure> {
        let server = if self.is_primary { server(client).await? } else { None };
        match self.fence.admit(server) {
            Ok(admission) => Ok(admission),
            // Only the driver and the server make errors of this kind; the server's log says so, too.
            Err(why) => {
                let raise = format!("DO $$BEGIN RAISE '{why}' USING ERRCODE = 'read_only_sql_transaction'; END$$");
                client.batch_execute(&raise).await?;
                unreachable!("it raises")
            }
        }
    }

    /// For all hosts.
    fn limit(&self) -> Duration {
        self.timeout + NEXT_HOST_AFTER * u32::try_from(self.hosts.len() - 1).unwrap_or(u32::MAX)
    }
}

/// Which one it is; none if it does not say.
async fn server(client: &tokio_postgres::Client) -> std::result::Result<Option<Server>, Failure> {
    let answers = match client.simple_query(&format!("SELECT {CLUSTER}, {TIMELINE}")).await {
        // 42883: there is no such function; 42501: it is not for us.
        Err(error) if matches!(code(&error), Some("42883" | "42501")) => return Ok(None),
        answers => answers?,
    };
    Ok(answers.iter().find_map(|answer| match answer {
        SimpleQueryMessage::Row(row) => Server::new(row.get(0)?, row.get(1)?),
        _ => None,
    }))
}

impl managed::Manager for Connector {
    type Type = Pooled;
    type Error = Failure;

    async fn create(&self) -> std::result::Result<Pooled, Failure> {
        let (client, connection, admission) = self.any_host().await?;
        // Whoever waits for an answer on it is told how it ended.
        let task = tokio::spawn(async move { drop(connection.await) });
        Ok(Pooled { client: ClientWrapper::new(client, task), admission })
    }

    async fn recycle(&self, pooled: &mut Pooled, metrics: &managed::Metrics) -> managed::RecycleResult<Failure> {
        let share = 1000 - self.jitter.hash_one(metrics.created) % LIFETIME_JITTER_PERMILLE;
        let is_over = metrics.age() >= self.max_lifetime.mul_f64(share as f64 / 1000.0);
        if is_over || pooled.client.is_closed() || !pooled.admission.holds() {
            return Err(RecycleError::message("it is too old, was closed, or leads to a former primary"));
        }
        Ok(())
    }
}

/// The same for each host alone.
fn each_host(all: &tokio_postgres::Config) -> Vec<tokio_postgres::Config> {
    let count = all.get_hosts().len().max(all.get_hostaddrs().len());
    if count < 2 {
        return vec![all.clone()];
    }
    let one = |place: usize| {
        let mut one = tokio_postgres::Config::new();
        if let Some(Host::Tcp(host)) = all.get_hosts().get(place) {
            one.host(host);
        }
        #[cfg(unix)]
        if let Some(Host::Unix(path)) = all.get_hosts().get(place) {
            one.host_path(path);
        }
        if let Some(address) = all.get_hostaddrs().get(place) {
            one.hostaddr(*address);
        }
        // One port is that of all hosts.
        if let Some(port) = all.get_ports().get(place).or(all.get_ports().first()) {
            one.port(*port);
        }
        all.get_user().map(|user| one.user(user));
        all.get_password().map(|password| one.password(password));
        all.get_dbname().map(|name| one.dbname(name));
        all.get_options().map(|options| one.options(options));
        all.get_application_name().map(|name| one.application_name(name));
        all.get_connect_timeout().map(|limit| one.connect_timeout(*limit));
        all.get_tcp_user_timeout().map(|limit| one.tcp_user_timeout(*limit));
        all.get_keepalives_interval().map(|interval| one.keepalives_interval(interval));
        all.get_keepalives_retries().map(|retries| one.keepalives_retries(retries));
        one.keepalives(all.get_keepalives())
            .keepalives_idle(all.get_keepalives_idle())
            .ssl_mode(all.get_ssl_mode())
            .ssl_negotiation(all.get_ssl_negotiation())
            .channel_binding(all.get_channel_binding())
            .target_session_attrs(all.get_target_session_attrs());
        one
    };
    let mut hosts: Vec<_> = (0..count).map(one).collect();
    if all.get_load_balance_hosts() == LoadBalanceHosts::Random {
        hosts.shuffle(&mut rand::rng());
    }
    hosts
}

/// What a URL says of TLS.
#[derive(Debug, PartialEq, Eq)]
struct Tls {
    mode: SslMode,
    verify: Verify,
    root_file: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verify {
    Nothing,
    Chain,
    ChainAndName,
}

impl Tls {
    /// The URL without the parameters that the driver does not know, and what they say.
    fn take_out_of(url: &str) -> std::result::Result<(String, Self), String> {
        let mut tls = Self { mode: SslMode::Prefer, verify: Verify::Nothing, root_file: None };
        // As the driver reads it: user and password end with the first `@`, and a `?` before it is theirs.
        let after_user = url.find('@').unwrap_or(0);
        let question = url[after_user..].find('?').map_or(url.len(), |place| after_user + place);
        let (address, query) = (&url[..question], url.get(question + 1..).unwrap_or(""));
        let (mut mode, mut by_system) = (None, false);
        let mut kept = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let Some((name, value)) = form_urlencoded::parse(pair.as_bytes()).next() else { continue };
            match name.as_ref() {
                "sslmode" => {
                    mode = Some(value.to_string());
                    (tls.mode, tls.verify) = match value.as_ref() {
                        "disable" => (SslMode::Disable, Verify::Nothing),
                        "prefer" => (SslMode::Prefer, Verify::Nothing),
                        "require" => (SslMode::Require, Verify::Nothing),
                        "verify-ca" => (SslMode::Require, Verify::Chain),
                        "verify-full" => (SslMode::Require, Verify::ChainAndName),
                        _ => {
                            return Err(format!(
                                "sslmode {value:?} must be disable, prefer, require, verify-ca or verify-full"
                            ));
                        }
                    }
                }
                "sslrootcert" => {
                    by_system = value == "system";
                    tls.root_file = Some(value.into_owned()).filter(|_| !by_system);
                }
                _ => kept.push(pair),
            }
        }
        // As libpq does: anybody gets a certificate of some authority of the system's, but not for this name.
        if by_system {
            match mode.as_deref() {
                None | Some("verify-full") => (tls.mode, tls.verify) = (SslMode::Require, Verify::ChainAndName),
                Some(weaker) => {
                    return Err(format!("sslmode {weaker:?} is too weak for sslrootcert=system: use verify-full"));
                }
            }
        }
        // As libpq does: who names an authority wants it to be asked.
        if tls.mode == SslMode::Require && tls.verify == Verify::Nothing && tls.root_file.is_some() {
            tls.verify = Verify::Chain;
        }
        let rest = if kept.is_empty() { address.to_owned() } else { format!("{address}?{}", kept.join("&")) };
        Ok((rest, tls))
    }

    fn client(&self) -> std::result::Result<ClientConfig, String> {
        // Given, not installed: a process has one default, and it is not ours to choose.
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?;
        let chain = match self.verify {
            Verify::Nothing => None,
            Verify::Chain | Verify::ChainAndName => Some(
                WebPkiServerVerifier::builder_with_provider(Arc::new(self.roots()?), provider.clone())
                    .build()
                    .map_err(|error| error.to_string())?,
            ),
        };
        let verifier: Arc<dyn ServerCertVerifier> = match (self.verify, chain) {
            (Verify::ChainAndName, Some(chain)) => chain,
            (_, chain) => Arc::new(AnyName { chain, provider }),
        };
        Ok(builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
    }

    fn roots(&self) -> std::result::Result<RootCertStore, String> {
        let mut roots = RootCertStore::empty();
        let Some(file) = &self.root_file else {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
            return if roots.is_empty() {
                Err("the system has no certificate authorities: name a file with sslrootcert=FILE".into())
            } else {
                Ok(roots)
            };
        };
        let unreadable = |why: String| format!("sslrootcert {file}: {why}");
        for certificate in CertificateDer::pem_file_iter(file).map_err(|error| unreadable(error.to_string()))? {
            let certificate = certificate.map_err(|error| unreadable(error.to_string()))?;
            roots.add(certificate).map_err(|error| unreadable(error.to_string()))?;
        }
        if roots.is_empty() { Err(unreadable("it has no certificate".into())) } else { Ok(roots) }
    }
}

/// Takes a certificate for any name; if there is a `chain`, one that an authority has signed.
#[derive(Debug)]
struct AnyName {
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            // The name is checked last, so that everything else was right.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            checked => checked,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_url_says_of_tls() {
        let check = |query: &str, kept: &str, mode: SslMode, verify: Verify, root_file: Option<&str>| {
            let (rest, tls) = Tls::take_out_of(&format!("postgres://a:b@c/d{query}")).unwrap();
            let want = Tls { mode, verify, root_file: root_file.map(str::to_owned) };
            assert_eq!((rest, tls), (format!("postgres://a:b@c/d{kept}"), want), "{query}");
        };
        check("", "", SslMode::Prefer, Verify::Nothing, None);
        check("?sslmode=disable", "", SslMode::Disable, Verify::Nothing, None);
        check("?sslmode=require&port=1", "?port=1", SslMode::Require, Verify::Nothing, None);
        check("?sslmode=require&sslrootcert=%2Fa%20b", "", SslMode::Require, Verify::Chain, Some("/a b"));
        check("?sslmode=prefer&sslrootcert=a", "", SslMode::Prefer, Verify::Nothing, Some("a"));
        check("?port=1&sslmode=verify-ca&user=x", "?port=1&user=x", SslMode::Require, Verify::Chain, None);
        check("?sslrootcert=system&sslmode=verify-full", "", SslMode::Require, Verify::ChainAndName, None);
        check("?sslrootcert=system", "", SslMode::Require, Verify::ChainAndName, None);
        check("?options=a@b?c&sslmode=require", "?options=a@b?c", SslMode::Require, Verify::Nothing, None);
        for query in ["sslmode=maybe", "sslmode=require&sslrootcert=system", "sslrootcert=system&sslmode=disable"] {
            let error = Tls::take_out_of(&format!("postgres://a:secret@c?{query}")).unwrap_err();
            assert!(error.contains("verify-full") && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_question_mark_in_the_password_is_no_query() {
        let check = |url: &str, rest: &str, mode: SslMode| {
            let (kept, tls) = Tls::take_out_of(url).unwrap();
            assert_eq!((kept.as_str(), tls.mode), (rest, mode), "{url}");
        };
        check("postgres://a:b?c@d/e?sslmode=require&port=1", "postgres://a:b?c@d/e?port=1", SslMode::Require);
        check("postgres://a:b?sslmode=disable@d/e", "postgres://a:b?sslmode=disable@d/e", SslMode::Prefer);
        check("postgres://d/e?sslmode=require", "postgres://d/e", SslMode::Require);
    }

    #[test]
    fn each_host_alone_is_as_all_are() {
        let all: tokio_postgres::Config =
            "postgres://u:p@a:1,b:2/d?options=-c%20x&connect_timeout=7&application_name=n&channel_binding=require"
                .parse()
                .unwrap();
        let hosts = super::each_host(&all);
        for (place, host) in hosts.iter().enumerate() {
            assert_eq!(host.get_hosts(), &all.get_hosts()[place..=place]);
            assert_eq!(host.get_ports(), &all.get_ports()[place..=place]);
            // Besides, nothing differs.
            let shown = |config: &tokio_postgres::Config| {
                let shown = format!("{config:?}");
                let (begin, rest) = shown.split_once("host: [").unwrap();
                let (_, rest) = rest.split_once("port: [").unwrap();
                let (_, end) = rest.split_once(']').unwrap();
                format!("{begin}{end}")
            };
            assert_eq!(shown(host), shown(&all));
            assert_eq!(host.get_password(), all.get_password());
        }
        assert_eq!(hosts.len(), 2);
    }
}
