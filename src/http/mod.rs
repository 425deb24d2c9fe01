//! The redirect, on one page: route, resolve, record, respond.
//!
//! In: the head of a request on a worker. Out: its answer, at once if memory has it; else through the `lookup`
//! crossing; what is no redirect through the `api` crossing.
//! Never: waits in front for anything else; keeps a request alive over a wait that a hit could meet (its buffer would
//! have to be allocated anew); allocates or locks on a hit; says 404 for what it could not find out.
//! At its limit: a full crossing is 503 with `Retry-After`.

pub mod body;
pub mod call;
pub mod respond;
pub mod route;
pub mod site;
pub mod visitor;

use std::cell::{Cell, RefCell};
use std::future::{Future, ready};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use tokio::sync::{mpsc, oneshot};

use crate::domain::key::{Code, Key};
use crate::domain::time::Stamp;
use crate::domain::visit::{Kind, Of, Visit};
use crate::guard::address::{Decided, Trusted};
use crate::metrics::{Counter, LocalHistogram, SharedHistogram};
use crate::resolve::ask::Looked;
use crate::resolve::{Resolution, Resolver, Step, Tier};
use crate::visits::{self, Recorder};
use body::{Body, Never};
use call::Call;
use route::{Route, Surface, forgiven, route};
use site::{DomainSite, Site};
use visitor::Peer;

/// Statuses that are counted apart; the rest is `other`.
pub const STATUSES: [u16; 12] = [301, 302, 303, 307, 308, 400, 404, 405, 410, 414, 503, 0];

/// What one core counts of its redirects, on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Counts {
    /// Answers by status (as in [`STATUSES`]) and tier (as in [`Tier::ALL`]).
    pub redirects: [[Counter; Tier::ALL.len()]; STATUSES.len()],
    /// What the server itself took for them, by tier.
    pub latency: [SharedHistogram; Tier::ALL.len()],
    pub visits: visits::Counts,
    /// Requests that went over the `api` crossing, and those that found it full.
    pub crossed: Counter,
    pub refused: Counter,
}

impl Counts {
    /// Redirects to a target, and everything else that was answered in front.
    #[must_use]
    pub fn answers(&self, tier: Tier) -> u64 {
        self.redirects.iter().map(|row| row[tier as usize].get()).sum()
    }
}

/// What every core of the front shares, without writing to it.
#[derive(Debug)]
pub struct Shared {
    pub site: Site,
    pub trusted: Trusted,
    /// A private peer that is not trusted sent a forwarding header, and that was logged.
    pub warned: AtomicBool,
    pub access_log: bool,
    /// The header with a request's id, which is taken from a trusted peer; none: no visit has one.
    pub request_id_header: Option<HeaderName>,
    /// Of those who send `DNT: 1` or `Sec-GPC: 1` nothing but the click is recorded.
    pub honour_dnt: bool,
}

/// A core's front: everything that its connections need.
#[derive(Debug)]
pub struct Front {
    shared: Arc<Shared>,
    resolver: Resolver,
    api: mpsc::Sender<Call>,
    counts: Arc<Counts>,
    recorder: RefCell<Recorder>,
    latency: [LocalHistogram; Tier::ALL.len()],
    draining: Cell<bool>,
}

/// Who sent a request, and over which listener.
#[derive(Clone, Copy, Debug)]
pub struct Via {
    pub peer: Peer,
    pub surface: Surface,
}

impl Front {
    #[must_use]
    pub fn new(
        shared: Arc<Shared>,
        resolver: Resolver,
        api: mpsc::Sender<Call>,
        counts: Arc<Counts>,
        recorder: Recorder,
    ) -> Self {
        let (recorder, draining) = (RefCell::new(recorder), Cell::new(false));
        Self { shared, resolver, api, counts, recorder, latency: Default::default(), draining }
    }

    /// The answer to a request.
    pub fn answer(self: &Rc<Self>, request: Request<Incoming>, via: Via) -> Answer {
        if self.shared.access_log { self.logged(request, via) } else { self.respond(request, via) }
    }

    /// The answer, and a line of the log when it is there: for who asked for it, at its price.
    fn logged(self: &Rc<Self>, request: Request<Incoming>, via: Via) -> Answer {
        let begun = Stamp::now();
        let (method, uri) = (request.method().clone(), request.uri().clone());
        let client = via.peer.client(request.headers(), &self.shared.trusted);
        let host = request.headers().get(header::HOST).cloned();
        let answer = self.respond(request, via);
        Answer::later(async move {
            let Ok(response) = answer.await;
            let host = host.as_ref().map(|host| String::from_utf8_lossy(host.as_bytes()));
            let host = host.as_deref().unwrap_or("");
            let micros = Stamp::now().nanos_since(begun) / 1000;
            tracing::info!(%client, %method, %uri, host, status = response.status().as_u16(), micros, "request");
            response
        })
    }

    fn respond(self: &Rc<Self>, request: Request<Incoming>, via: Via) -> Answer {
        let begun = Stamp::now();
        let shared = &*self.shared;
        let asked = route(request.method(), request.uri(), request.headers(), &shared.site, via.surface);
        let (status, text) = match asked {
            Route::Code { key: Some(key), .. } => return self.redirect(key, request, via, begun),
            Route::Code { key: None, .. } => {
                let parts = request.into_parts().0;
                return Answer::later(Rc::clone(self).missed(
                    Step::Done(Resolution::Missing, Tier::None),
                    parts,
                    via,
                    begun,
                ));
            }
            Route::Back => return self.cross(request, via),
            Route::Home { domain } => {
                return self.done(begun, Tier::None, home(&shared.site, domain, request.headers()));
            }
            Route::File { path } => {
                let response = match shared.site.pages.files.get(path) {
                    Some(page) => respond::page(StatusCode::OK, page),
                    None if path == "robots.txt" => respond::sentence(StatusCode::OK, ROBOTS, false),
                    None => respond::sentence(StatusCode::NOT_FOUND, "There is no such file here.", false),
                };
                return self.done(begun, Tier::None, response);
            }
            Route::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, "A short link answers GET and HEAD."),
            Route::BodyNotAllowed => (StatusCode::BAD_REQUEST, "A short link takes no request body."),
            Route::TargetTooLong => (StatusCode::URI_TOO_LONG, "This address is longer than 8 KiB."),
            Route::UnknownHost => (StatusCode::NOT_FOUND, "This server does not answer for this host name."),
        };
        let mut response = respond::sentence(status, text, respond::wants_html(request.headers()));
        if status == StatusCode::METHOD_NOT_ALLOWED {
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        }
        // What follows such a head may be its body: the connection cannot be read on.
        let refused = status != StatusCode::NOT_FOUND;
        self.done(begun, Tier::None, if refused { respond::closing(response) } else { response })
    }

    /// Resolve, record, respond. What memory answers is answered here, and the request is dropped here.
    fn redirect(self: &Rc<Self>, key: Key, request: Request<Incoming>, via: Via, begun: Stamp) -> Answer {
        let visit = visitor::kind(request.method(), request.headers());
        let step = self.resolver.resolve(&key, visit != Kind::Head, begun.millis());
        let (parts, _) = request.into_parts();
        match step {
            Step::Done(Resolution::Found(ready), tier) => {
                self.record(Of::Link(ready.link, visit), &parts.headers, via, begun);
                self.done(begun, tier, respond::redirect(parts.headers, ready, parts.uri.query()))
            }
            step => Answer::later(Rc::clone(self).missed(step, parts, via, begun)),
        }
    }

    /// What is not in memory: the store's word, then that of other spellings, then a page.
    async fn missed(self: Rc<Self>, step: Step, parts: Parts, via: Via, begun: Stamp) -> Response<Body> {
        let visit = visitor::kind(&parts.method, &parts.headers);
        let (mut resolution, mut tier) = self.wait(step).await;
        let Route::Code { key, spelled, domain } =
            route(&parts.method, &parts.uri, &parts.headers, &self.shared.site, via.surface)
        else {
            unreachable!("it was a code before")
        };
        for spelled in forgiven(spelled) {
            if !matches!(resolution, Resolution::Missing) {
                break;
            }
            if let Ok(code) = Code::from_path(spelled.as_bytes(), self.shared.site.case) {
                let key = Key { domain: domain.id, code };
                let step = self.resolver.resolve(&key, visit != Kind::Head, Stamp::now().millis());
                (resolution, tier) = self.wait(step).await;
            }
        }
        let response = match resolution {
            Resolution::Found(ready) => {
                self.record(Of::Link(ready.link, visit), &parts.headers, via, begun);
                respond::redirect(parts.headers, ready, parts.uri.query())
            }
            Resolution::Unavailable => unavailable(&parts.headers),
            Resolution::Missing => {
                self.record(Of::Orphan(key.as_ref()), &parts.headers, via, begun);
                missing(&self.shared.site, domain, &parts.headers)
            }
            Resolution::Gone(instead) => {
                self.record(Of::Orphan(key.as_ref()), &parts.headers, via, begun);
                gone(&self.shared.site, domain, instead.map(crate::resolve::header_value), &parts.headers)
            }
        };
        self.finish(begun, tier, response)
    }

    async fn wait(&self, step: Step) -> (Resolution, Tier) {
        match step {
            Step::Done(resolution, tier) => (resolution, tier),
            Step::Asked(looked) => {
                let looked = looked.await.unwrap_or(Looked::Unavailable);
                self.resolver.judge(looked, Stamp::now().millis())
            }
        }
    }

    fn record(&self, of: Of<'_>, headers: &HeaderMap, via: Via, at: Stamp) {
        let shared = &*self.shared;
        let value = |name: &HeaderName| headers.get(name).map_or(&b""[..], HeaderValue::as_bytes);
        let request_id = shared.request_id_header.as_ref().filter(|_| via.peer.names_requests);
        self.recorder.borrow_mut().record(
            &self.counts.visits,
            &Visit {
                of,
                at: at.millis(),
                client: via.peer.client(headers, &shared.trusted),
                agent: value(&header::USER_AGENT),
                referrer: value(&header::REFERER),
                request_id: request_id.map_or(b"", value),
                not_tracked: shared.honour_dnt && visitor::asks_not_to_be_tracked(headers),
            },
        );
    }

    /// Sends what is no redirect to back.
    fn cross(self: &Rc<Self>, request: Request<Incoming>, via: Via) -> Answer {
        let (reply, response) = oneshot::channel();
        let counts = &self.counts;
        let client = via.peer.client(request.headers(), &self.shared.trusted);
        match self.api.try_send(Call { request, peer: via.peer, client, reply }) {
            Ok(()) => {
                counts.crossed.add(1);
                let front = Rc::clone(self);
                Answer::later(async move {
                    let response = match response.await {
                        Ok(response) => response.map(|body| Body::Back { body, done: None }),
                        Err(_) => respond::problem_unavailable(),
                    };
                    if front.draining.get() { respond::closing(response) } else { response }
                })
            }
            Err(_) => {
                counts.refused.add(1);
                // The body, if there is one, was not read.
                Answer::now(respond::closing(respond::problem_unavailable()))
            }
        }
    }

    fn done(&self, begun: Stamp, tier: Tier, response: Response<Body>) -> Answer {
        Answer::now(self.finish(begun, tier, response))
    }

    /// Counts an answer, and ends its connection when the server is about to.
    fn finish(&self, begun: Stamp, tier: Tier, response: Response<Body>) -> Response<Body> {
        let status = response.status().as_u16();
        let row = STATUSES.iter().position(|known| *known == status).unwrap_or(STATUSES.len() - 1);
        self.counts.redirects[row][tier as usize].add(1);
        self.latency[tier as usize].record(Stamp::now().nanos_since(begun));
        if self.draining.get() { respond::closing(response) } else { response }
    }

    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.get()
    }

    /// From now on every answer ends its connection.
    pub fn drain(&self) {
        self.draining.set(true);
    }

    /// The core's own tasks: until back has gone.
    pub async fn run(&self) {
        self.resolver.run().await;
    }

    /// Time has passed: figures are handed over, and questions that nobody answers are given up.
    pub fn tick(&self, now_ms: u64) {
        self.resolver.tick(now_ms);
        self.hand_over();
    }

    pub fn hand_over(&self) {
        for (local, shared) in self.latency.iter().zip(&self.counts.latency) {
            local.hand_over(shared);
        }
    }

    /// Whether a peer of this address may say who is behind it.
    #[must_use]
    pub fn peer(&self, address: std::net::IpAddr) -> Peer {
        Peer::new(address, &self.shared.trusted)
    }

    /// Who is behind a peer, by its PROXY header.
    #[must_use]
    pub fn client_of(&self, peer: Peer, address: std::net::IpAddr) -> Peer {
        peer.in_front_of(address, &self.shared.trusted)
    }

    /// Warns, once, of a balancer that was not declared; asked with the first request of a connection.
    pub fn look_at_forwarding(&self, peer: Peer, headers: &HeaderMap) {
        if peer.names_requests || self.shared.warned.load(Ordering::Relaxed) {
            return;
        }
        if peer.decide(headers, &self.shared.trusted).decided == Decided::UntrustedPrivatePeer
            && !self.shared.warned.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(
                "visits are recorded with the balancer's address {}: add it to proxies.trusted",
                peer.address
            );
        }
    }
}

const ROBOTS: &str = "User-agent: *\nDisallow:";

fn home(site: &Site, domain: &DomainSite, headers: &HeaderMap) -> Response<Body> {
    match (&domain.root_url, &site.pages.home) {
        (Some(url), _) => respond::fallback(url.clone()),
        (None, Some(page)) => respond::page(StatusCode::OK, page),
        (None, None) => respond::sentence(
            StatusCode::OK,
            "This is a waypost: it redirects short links. A short link has a code after the slash.",
            respond::wants_html(headers),
        ),
    }
}

fn missing(site: &Site, domain: &DomainSite, headers: &HeaderMap) -> Response<Body> {
    match (&domain.not_found_url, &site.pages.missing) {
        (Some(url), _) => respond::fallback(url.clone()),
        (None, Some(page)) => respond::page(StatusCode::NOT_FOUND, page),
        (None, None) => {
            respond::sentence(StatusCode::NOT_FOUND, "There is no such short link.", respond::wants_html(headers))
        }
    }
}

fn gone(site: &Site, domain: &DomainSite, instead: Option<HeaderValue>, headers: &HeaderMap) -> Response<Body> {
    match (instead.or_else(|| domain.gone_url.clone()), &site.pages.gone) {
        (Some(url), _) => respond::fallback(url),
        (None, Some(page)) => respond::page(StatusCode::GONE, page),
        (None, None) => respond::sentence(StatusCode::GONE, "This short link has ended.", respond::wants_html(headers)),
    }
}

fn unavailable(headers: &HeaderMap) -> Response<Body> {
    let mut response = respond::sentence(
        StatusCode::SERVICE_UNAVAILABLE,
        "This cannot be answered just now. Please try again in a moment.",
        respond::wants_html(headers),
    );
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

/// An answer that is there, or that something in back is asked for. The first kind is no allocation.
pub enum Answer {
    Now(std::future::Ready<Result<Response<Body>, Never>>),
    Later(Pin<Box<dyn Future<Output = Response<Body>>>>),
}

impl Answer {
    fn now(response: Response<Body>) -> Self {
        Self::Now(ready(Ok(response)))
    }

    fn later(response: impl Future<Output = Response<Body>> + 'static) -> Self {
        Self::Later(Box::pin(response))
    }
}

impl Future for Answer {
    type Output = Result<Response<Body>, Never>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Now(answer) => Pin::new(answer).poll(cx),
            Self::Later(answer) => answer.as_mut().poll(cx).map(Ok),
        }
    }
}
