//! HTTP: takes requests, notes them, injects faults, and hands them to the part of the forge they belong to.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use axum_server::Handle;
use axum_server::tls_rustls::RustlsConfig;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::keys::RsaKey;
use crate::model::{Fault, Seen, Settings, seconds};
use crate::workflow::matches;
use crate::world::World;
use crate::{actions, broker, control, oidc, rest, webhook};

/// Longest body that is taken.
const LONGEST_BODY: usize = 32 << 20;
/// How many requests are remembered one by one.
const REMEMBERED: usize = 50_000;
/// How often time is looked at.
const TICK: Duration = Duration::from_millis(100);

/// How to start a simulator.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Where to listen; port 0: a free one on the loopback interface.
    pub listen: Option<SocketAddr>,
    /// Certificate chain and key, PEM files; none: plain HTTP.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Where to listen with that certificate, and with plain HTTP at `listen`; none: with the certificate at `listen`.
    pub tls_listen: Option<SocketAddr>,
    /// Base of every URL handed out; none: the address listened on. Port 0 stands for the port listened on, here and below.
    pub public_url: Option<String>,
    /// The OIDC issuer; none: `<public URL>/_services/token`.
    pub issuer: Option<String>,
    /// What can be changed later, too.
    pub settings: Settings,
}

/// A simulator that runs in this process until it is dropped.
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    /// Where it listens with its certificate.
    pub tls_address: Option<SocketAddr>,
    /// Its base URL.
    pub url: String,
    handles: Vec<Handle<SocketAddr>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Server {
    /// Starts a simulator.
    ///
    /// # Errors
    /// When it cannot listen, or the certificate cannot be used.
    pub async fn start(config: Config) -> Result<Self> {
        // Somebody may have chosen a provider already; it is the same one.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let listener = listen(config.listen.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0))))?;
        let address = listener.local_addr()?;
        let beside = config.tls_listen.map(listen).transpose()?;
        let (plain, with_certificate) = match (&config.tls, beside) {
            (None, None) => (Some(listener), None),
            (None, Some(_)) => bail!("there is no certificate to listen with"),
            (Some(tls), None) => (None, Some((listener, tls))),
            (Some(tls), Some(beside)) => (Some(listener), Some((beside, tls))),
        };
        let scheme = if plain.is_some() { "http" } else { "https" };
        let url = config.public_url.unwrap_or_else(|| format!("{scheme}://{address}"));
        let url = with_port(url.trim_end_matches('/'), address);
        let tls_address = with_certificate.as_ref().map(|(listener, _)| listener.local_addr()).transpose()?;
        let issuer = config.issuer.map(|issuer| with_port(&issuer, tls_address.unwrap_or(address)));
        let (outbox, deliveries) = mpsc::unbounded_channel();
        let world = World::new(url.clone(), issuer, config.settings, outbox)?;
        let forge = Arc::new(Forge { world: Mutex::new(world) });
        make_runner_keys(Arc::downgrade(&forge));
        let service = Router::new().fallback(serve).with_state(forge.clone()).into_make_service();
        let mut tasks = vec![tokio::spawn(webhook::deliver(forge.clone(), deliveries)), tokio::spawn(tick(forge))];
        let mut handles = Vec::new();
        let mut handle = || {
            handles.push(Handle::new());
            handles[handles.len() - 1].clone()
        };
        if let Some(listener) = plain {
            let server = axum_server::from_tcp(listener)?.handle(handle());
            let service = service.clone();
            tasks.push(tokio::spawn(async move { drop(server.serve(service).await) }));
        }
        if let Some((listener, (certificate, key))) = with_certificate {
            let tls = RustlsConfig::from_pem_file(certificate, key).await.context("the certificate cannot be used")?;
            let server = axum_server::from_tcp_rustls(listener, tls)?.handle(handle());
            tasks.push(tokio::spawn(async move { drop(server.serve(service).await) }));
        }
        Ok(Self { address, tls_address, url, handles, tasks })
    }

    /// Runs until the process is told to end.
    ///
    /// # Errors
    /// When signals cannot be listened to.
    pub async fn run(self) -> Result<()> {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            _ = terminate.recv() => {}
            result = tokio::signal::ctrl_c() => result?,
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for handle in &self.handles {
            handle.shutdown();
        }
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// An address with its port, where that is 0, replaced by the one that is listened on.
fn with_port(url: &str, listening: SocketAddr) -> String {
    let port = listening.port();
    match url.strip_suffix(":0") {
        Some(host) => format!("{host}:{port}"),
        None => url.replacen(":0/", &format!(":{port}/"), 1),
    }
}

fn listen(address: SocketAddr) -> Result<TcpListener> {
    let listener = TcpListener::bind(address).with_context(|| format!("the simulator cannot listen at {address}"))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// The forge behind its lock.
pub(crate) struct Forge {
    world: Mutex<World>,
}

impl Forge {
    /// The forge, to look at or to change. Never held while something is waited for.
    pub(crate) fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes keys for runners beside everything else, so that registering one does not wait for it.
fn make_runner_keys(forge: Weak<Forge>) {
    std::thread::spawn(move || {
        while let Ok(key) = RsaKey::generate() {
            match forge.upgrade() {
                Some(forge) if forge.world().add_runner_key(key) => {}
                _ => return,
            }
        }
    });
}

async fn tick(forge: Arc<Forge>) {
    let mut interval = tokio::time::interval(TICK);
    loop {
        interval.tick().await;
        forge.world().tick();
    }
}

/// A request, taken apart.
pub(crate) struct Ask {
    /// Its method.
    pub(crate) method: String,
    /// Its path.
    pub(crate) path: String,
    /// The parts of the path, decoded.
    pub(crate) segments: Vec<String>,
    /// Its query, decoded.
    pub(crate) query: BTreeMap<String, String>,
    /// Its headers.
    pub(crate) headers: HeaderMap,
    /// Its body.
    pub(crate) body: Bytes,
}

impl Ask {
    /// A header.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The credential in `Authorization` with this scheme.
    pub(crate) fn credential(&self, scheme: &str) -> Option<&str> {
        let (found, credential) = self.header("authorization")?.split_once(' ')?;
        found.eq_ignore_ascii_case(scheme).then_some(credential.trim())
    }

    /// The body as JSON; nothing where it is none.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// A parameter of the query.
    pub(crate) fn parameter(&self, name: &str) -> Option<&str> {
        self.query.get(name).map(String::as_str)
    }
}

/// An answer.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    /// Its status.
    pub(crate) status: u16,
    /// Its headers.
    pub(crate) headers: Vec<(String, String)>,
    /// Its body.
    pub(crate) body: Vec<u8>,
}

impl Reply {
    /// An answer without a body.
    pub(crate) fn empty(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new() }
    }

    /// JSON.
    pub(crate) fn json(status: u16, value: &Value) -> Self {
        Self::empty(status).with("content-type", "application/json; charset=utf-8").body(value.to_string())
    }

    /// Plain text.
    pub(crate) fn text(status: u16, text: impl Into<String>) -> Self {
        Self::empty(status).with("content-type", "text/plain; charset=utf-8").body(text.into())
    }

    /// And this header.
    #[must_use]
    pub(crate) fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    fn body(mut self, body: String) -> Self {
        self.body = body.into_bytes();
        self
    }

    fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.body));
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        for (name, value) in self.headers {
            if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
                response.headers_mut().insert(name, value);
            }
        }
        response
    }
}

async fn serve(State(forge): State<Arc<Forge>>, request: Request<Body>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let query = parts.uri.query().unwrap_or_default().to_owned();
    let body = axum::body::to_bytes(body, LONGEST_BODY).await.unwrap_or_default();
    let ask = Ask {
        method: parts.method.to_string(),
        segments: path.split('/').filter(|part| !part.is_empty()).map(decode).collect(),
        path,
        query: form_urlencoded::parse(query.as_bytes()).into_owned().collect(),
        headers: parts.headers,
        body,
    };
    if ask.segments.first().is_some_and(|first| first == "_simulator") {
        return control::answer(&forge, &ask).into_response();
    }
    let host = parts.uri.host().map(str::to_owned).or_else(|| ask.header("host").map(str::to_owned)).unwrap_or_default();
    let noted = note(&forge, &ask, query);
    let fault = forge.world().strike(&ask.method, &ask.path);
    if let Some(fault) = &fault {
        tokio::time::sleep(seconds(fault.latency)).await;
        if fault.hang {
            std::future::pending::<()>().await;
        }
        if let Some(status) = fault.status {
            let mut reply = Reply::text(status, fault.body.clone().unwrap_or_default());
            for (name, value) in &fault.headers {
                reply = reply.with(name, value.as_str());
            }
            noted.answered(reply.status);
            return reply.into_response();
        }
    }
    let mut reply = route(&forge, &ask, &host).await;
    if let Some(fault) = &fault {
        if fault.empty_queue_url {
            let mut value: Value = serde_json::from_slice(&reply.body).unwrap_or_default();
            value["messageQueueUrl"] = json!("");
            reply.body = value.to_string().into_bytes();
        }
        if fault.empty_body {
            reply.body.clear();
        }
    }
    noted.answered(reply.status);
    if fault.is_some_and(|fault| fault.drop) {
        let broken = futures::stream::once(async { Err::<Bytes, _>(std::io::Error::other("the connection breaks here")) });
        return Response::new(Body::from_stream(broken));
    }
    let id = crate::keys::uuid();
    reply.with("x-github-request-id", id.as_str()).with("activityid", id).into_response()
}

async fn route(forge: &Arc<Forge>, ask: &Ask, host: &str) -> Reply {
    let segments: Vec<&str> = ask.segments.iter().map(String::as_str).collect();
    match segments.as_slice() {
        ["api", "v3", rest @ ..] => rest::answer(forge, ask, rest),
        ["_services", "pipelines", _, "_apis", "distributedtask", "hubs", "Actions", "plans", plan, "jobs", job, "idtoken"] => {
            oidc::id_token(forge, ask, plan, job)
        }
        ["_services", "pipelines", _, rest @ ..] => actions::answer(forge, ask, rest),
        ["_services", "messages", set, rest @ ..] => actions::queue(forge, ask, set, rest).await,
        ["_services", "vstoken", ..] => broker::token(forge, ask),
        ["_services", "broker", rest @ ..] => broker::answer(forge, ask, rest).await,
        ["_services", "run", rest @ ..] => broker::run(forge, ask, rest),
        ["_services", "results", rest @ ..] => broker::results(forge, ask, rest),
        [.., ".well-known", "openid-configuration"] => oidc::discovery(forge),
        [.., ".well-known", "jwks"] => oidc::jwks(forge),
        rest if host.starts_with("api.") => rest::answer(forge, ask, rest),
        [] => Reply::text(200, control::WHAT_THIS_IS),
        _ => Reply::text(404, "404 page not found"),
    }
}

fn decode(text: &str) -> String {
    // A path has no `+` for a space.
    let pair = format!("x={}", text.replace('+', "%2B").replace('&', "%26").replace('=', "%3D"));
    form_urlencoded::parse(pair.as_bytes()).next().map(|(_, value)| value.into_owned()).unwrap_or_default()
}

/// A request in the list of those seen.
struct Noted<'a> {
    forge: &'a Forge,
    number: u64,
    began: Instant,
}

impl Noted<'_> {
    fn answered(&self, status: u16) {
        let mut world = self.forge.world();
        let took = self.began.elapsed().as_secs_f64();
        let at = world.requests.last.binary_search_by_key(&self.number, |seen| seen.number);
        if let Some(seen) = at.ok().and_then(|at| world.requests.last.get_mut(at)) {
            seen.status = status;
            seen.took = took;
        }
    }
}

fn note<'a>(forge: &'a Forge, ask: &Ask, query: String) -> Noted<'a> {
    let mut world = forge.world();
    let requests = &mut world.requests;
    requests.count += 1;
    let number = requests.count;
    let now = Timestamp::now().as_duration().as_secs_f64();
    *requests.by_route.entry(kind_of(&ask.method, &ask.segments)).or_default() += 1;
    requests.last.push_back(Seen { number, at: now, method: ask.method.clone(), path: ask.path.clone(), query, status: 0, took: 0.0 });
    if requests.last.len() > REMEMBERED {
        requests.last.pop_front();
    }
    Noted { forge, number, began: Instant::now() }
}

/// Method and path with numbers and names taken out.
fn kind_of(method: &str, segments: &[String]) -> String {
    let mut kind = format!("{method} ");
    let mut names = 0;
    for segment in segments {
        let variable =
            names > 0 || segment.len() >= 20 && segment.chars().all(|character| character.is_ascii_hexdigit() || character == '-');
        names = match segment.as_str() {
            _ if names > 0 => names - 1,
            "orgs" | "enterprises" => 1,
            "repos" => 2,
            _ => 0,
        };
        let number = segment.chars().all(|character| character.is_ascii_digit());
        kind.push('/');
        kind.push_str(if variable || number && segment != "0" { "{}" } else { segment });
    }
    kind
}

impl World {
    /// The fault that strikes this request.
    fn strike(&mut self, method: &str, path: &str) -> Option<Fault> {
        let fault = self.faults.iter_mut().find(|fault| {
            matches(&fault.path, path)
                && fault.method.as_deref().is_none_or(|wanted| wanted.eq_ignore_ascii_case(method))
                && fault.times.is_none_or(|times| fault.struck < times)
        })?;
        if fault.after > 0 {
            fault.after -= 1;
            return None;
        }
        fault.struck += 1;
        Some(fault.clone())
    }
}
