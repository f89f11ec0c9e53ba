//! The skeleton of the process: watches, servers, shutdown. Any part that ends by itself ends the process.

mod bindings;
mod broker;
mod dialects;
mod explain;
pub(crate) mod health;
pub(crate) mod metrics;
mod refusals;
mod watches;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use axum::Router;
use axum_server::Handle;
use axum_server::tls_rustls::RustlsConfig;
use futures::future::BoxFuture;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::audit::{Audit, FileSink, HttpSink, StdoutSink};
use crate::cli::{AuditTo, Settings};
use crate::forge::gitea::Giteas;
use crate::forge::http_client;
use crate::isolation::{Controls, Names, no_forge_at};
use crate::issuer::Issuer;
use crate::kube_io::{KubeIo, connect};
use crate::pool::{self, Context, Deaf, Pools, Validated};
use crate::runner::tls::{self, GateTls};
use crate::runner::{handoff, sessions};

pub(crate) use broker::run_broker;
pub(crate) use explain::run_explain;

/// How long open requests and passes may take to end.
const GRACE: Duration = Duration::from_secs(8);
/// How long a caller of any server may take to send its request's headers.
const HEADERS: Duration = Duration::from_secs(10);

/// Runs the controller until a signal comes or a part of it fails.
pub(crate) async fn run_controller(mut settings: Settings) -> Result<()> {
    install_tls_provider()?;
    let metrics = metrics::Metrics::new();
    let health = health::Health::new(metrics.clone(), &["watches", "certificate"]);
    let stop = CancellationToken::new();
    let mut parts: JoinSet<Result<&'static str>> = JoinSet::new();
    serve_plain(&mut parts, "health", settings.health_address, health.router(), &stop);

    let audit = audit_trail(&settings.audit)?;
    let client = connect().await?;
    let namespace = settings.cluster.operator_namespace.clone();
    let io = KubeIo::new(client.clone(), settings.instance.clone(), metrics.clone());
    let gate_tls = tls::load_or_create(&io, &namespace, &settings.gate_secret, &settings.gate_names).await?;
    settings.pods.gate_ca = gate_tls.authority.clone();
    tls::publish(&io, &namespace, &settings.gate_authority, &gate_tls.authority).await?;
    if let Some((name, secret)) = &settings.broker {
        let broker_tls = tls::load_or_create(&io, &namespace, secret, std::slice::from_ref(name)).await?;
        if let Some(access) = &mut settings.pods.broker {
            access.ca = broker_tls.authority;
        }
    }
    let issuer = match &settings.identity {
        Some((url, secret)) => Some(Arc::new(Issuer::open(io.clone(), &namespace, secret, url).await?)),
        None => None,
    };
    health.done("certificate");

    let (registry, wakes) = Pools::new();
    let registry = Arc::new(registry);
    let deaf = Arc::new(Deaf::default());
    let (stores, root) = watches::start(&client, &namespace, &registry, &deaf, &mut parts, &stop);
    let configured = settings.broker_knows.clone();
    let bindings = configured.map(|known| bindings::start(&client, &io, &audit, &registry, known, &mut parts, &stop));
    let dialects = dialects::start(&client, &settings.cilium_namespace, &registry, &mut parts, &stop);
    let pools = stores.pools.clone();
    let tasks = TaskTracker::new();
    let ctx = Arc::new(Context {
        io,
        http: http_client(settings.forge_ca.as_deref(), settings.forge_proxy.as_deref(), no_forge_at).context("HTTP client")?,
        giteas: Giteas::default(),
        metrics,
        registry,
        pools: stores.pools.clone(),
        pods: stores.pods.clone(),
        deaf,
        secrets: stores.secrets.clone(),
        policies: stores.policies.clone(),
        bindings,
        dialects: dialects.clone(),
        nodes: stores.nodes.clone(),
        daemon_sets: stores.daemon_sets.clone(),
        quotas: stores.quotas.clone(),
        api_endpoints: stores.api_endpoints.clone(),
        controls: Controls::default(),
        issuer: issuer.clone(),
        names: Names::new(tasks.clone()),
        validated: Validated::default(),
        tasks,
        audit,
        settings,
    });
    let mut gates = handoff::router(ctx.clone());
    if let Some(account) = ctx.settings.broker_account.clone() {
        gates = gates.merge(refusals::router(ctx.clone(), account));
    }
    serve_tls(&mut parts, "gate", ctx.settings.gate_address, gates, gate_tls, &stop).await?;
    if let Some(configuration) = ctx.settings.break_glass_webhook.clone() {
        // Nobody but the API server trusts it, and is told anew at every start and every few minutes.
        let (tls, _) = tls::generate(std::slice::from_ref(&ctx.settings.admission_name))?;
        let path = format!("/v1/break-glass/{:032x}", rand::random::<u128>());
        let announce = sessions::announce(ctx.clone(), configuration, path.clone(), tls.authority.clone());
        serve_tls(&mut parts, "admission", ctx.settings.admission_address, sessions::router(ctx.clone(), &path), tls, &stop).await?;
        let until = stop.clone();
        ctx.tasks.spawn(async move {
            tokio::select! { () = announce => {}, () = until.cancelled() => {} }
        });
    }
    let mut open = pool::hints::router(ctx.clone());
    if let Some(issuer) = issuer {
        open = open.merge(issuer.router());
        let until = stop.clone();
        ctx.tasks.spawn(async move { issuer.keep_fresh(&until).await });
    }
    serve_plain(&mut parts, "webhooks", ctx.settings.webhook_address, open, &stop);

    let (controller_ctx, token, gate) = (ctx.clone(), stop.clone(), health.clone());
    parts.spawn(async move {
        // Nothing is decided before everything was seen once. The root watch is driven by the controller itself.
        stores.wait_but_root().await?;
        dialects.asked().await;
        gate.done("watches");
        pool::run(controller_ctx, pools, root, UnboundedReceiverStream::new(wakes), token).await;
        Ok("controller")
    });

    let ended = first_end(&mut parts).await;
    stop.cancel();
    let registry = ctx.registry.clone();
    let drain = async {
        while parts.join_next().await.is_some() {}
        // After the last pass, which could make them anew.
        registry.let_go();
        ctx.tasks.close();
        ctx.tasks.wait().await;
    };
    if tokio::time::timeout(GRACE, drain).await.is_err() {
        tracing::warn!("not everything ended in time");
    }
    ended
}

/// Opens the trail; what it says goes on where its last record ended.
fn audit_trail(to: &AuditTo) -> Result<Audit> {
    Ok(match to {
        AuditTo::StandardOutput => Audit::new(StdoutSink),
        AuditTo::File { path, rotation } => {
            Audit::new(FileSink::open(path, *rotation).with_context(|| format!("--audit-file {}", path.display()))?)
        }
        AuditTo::Collector { url, authorities, token_file } => {
            let client = http_client(authorities.as_deref(), None, |_| None).context("HTTP client for --audit-url")?;
            Audit::new(HttpSink { client, url: url.clone(), token_file: token_file.clone(), runtime: tokio::runtime::Handle::current() })
        }
    })
}

fn install_tls_provider() -> Result<()> {
    rustls::crypto::aws_lc_rs::default_provider().install_default().map_err(|_| anyhow!("another TLS provider is already installed"))
}

/// Waits for a signal, or for a part that ends by itself, which none should.
async fn first_end(parts: &mut JoinSet<Result<&'static str>>) -> Result<()> {
    tokio::select! {
        ended = parts.join_next() => match ended {
            Some(Ok(Ok(part))) => Err(anyhow!("{part} ended by itself")),
            Some(Ok(Err(error))) => Err(error),
            Some(Err(error)) => Err(anyhow!("a part of the process died: {error}")),
            None => Err(anyhow!("nothing runs")),
        },
        signal = end_signal() => signal,
    }
}

async fn end_signal() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM"),
        _ = interrupt.recv() => tracing::info!("SIGINT"),
    }
    Ok(())
}

/// Whoever opens a connection has to say what it wants.
fn hurry(http: &mut Builder<TokioExecutor>) {
    http.http1().timer(TokioTimer::new()).header_read_timeout(HEADERS);
}

fn serve_plain(
    parts: &mut JoinSet<Result<&'static str>>,
    name: &'static str,
    address: SocketAddr,
    router: Router,
    stop: &CancellationToken,
) {
    let handle = Handle::new();
    let mut server = axum_server::bind(address).handle(handle.clone());
    hurry(server.http_builder());
    let server = server.serve(router.into_make_service());
    serve(parts, name, address, handle, Box::pin(server), stop);
}

async fn serve_tls(
    parts: &mut JoinSet<Result<&'static str>>,
    name: &'static str,
    address: SocketAddr,
    router: Router,
    tls: GateTls,
    stop: &CancellationToken,
) -> Result<()> {
    let tls = RustlsConfig::from_pem(tls.certificate.into_bytes(), tls.key.reveal().as_bytes().to_vec()).await?;
    let handle = Handle::new();
    let mut server = axum_server::bind_rustls(address, tls).handle(handle.clone());
    hurry(server.http_builder());
    let server = server.serve(router.into_make_service_with_connect_info::<SocketAddr>());
    serve(parts, name, address, handle, Box::pin(server), stop);
    Ok(())
}

fn serve(
    parts: &mut JoinSet<Result<&'static str>>,
    name: &'static str,
    address: SocketAddr,
    handle: Handle<SocketAddr>,
    server: BoxFuture<'static, std::io::Result<()>>,
    stop: &CancellationToken,
) {
    let stop = stop.clone();
    parts.spawn(async move {
        tracing::info!(%address, "{name} listens");
        tokio::select! {
            result = server => result.with_context(|| format!("{name} on {address}"))?,
            () = stop.cancelled() => handle.graceful_shutdown(Some(Duration::from_secs(2))),
        }
        Ok(name)
    });
}
