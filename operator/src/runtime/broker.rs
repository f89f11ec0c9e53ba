//! The process of the broker: three watches, one API, no Secret and no write but token reviews.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use kube::Api;
use kube::runtime::watcher;
use mayfly_crds::names::{BROKER_AUDIENCE, managed_selector};
use mayfly_crds::{CredentialBinding, RunnerPool};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::watches::{strip, strip_pod, watch};
use super::{GRACE, connect, first_end, health, metrics, serve_plain, serve_tls};
use crate::cli::BrokerSettings;
use crate::credentials::{self, Broker, Guarded, Http, Issuer, Issuers, Known, Parts, Providers, Reports, Rhythm, no_server_at};
use crate::kube_io::KubeIo;
use crate::pool::Deaf;
use crate::runner::identity::Identities;
use crate::runner::tls::GateTls;

/// Runs the broker until a signal comes or a part of it fails.
pub(crate) async fn run_broker(settings: BrokerSettings) -> Result<()> {
    super::install_tls_provider()?;
    let metrics = metrics::Metrics::new();
    let health = health::Health::new(metrics.clone(), &["watches"]);
    let stop = CancellationToken::new();
    let mut parts: JoinSet<Result<&'static str>> = JoinSet::new();
    serve_plain(&mut parts, "health", settings.health_address, health.router(), &stop);

    let audit = super::audit_trail(&settings.audit)?;
    let issuers = settings.issuers.iter().map(|(config, authorities)| {
        let http = Http::new(authorities.as_deref(), no_server_at).with_context(|| format!("HTTP client for {}", config.issuer))?;
        Ok(Issuer::new(config, http, Rhythm::default()))
    });
    let issuers = Arc::new(Issuers::new(issuers.collect::<Result<Vec<_>>>()?));
    let providers = Providers::new(
        Http::new(settings.provider_ca.as_deref(), no_server_at).context("HTTP client for providers")?,
        settings.github_apps,
    );

    let client = connect().await?;
    // The broker hears of every change soon enough by the silence that a connection may have; nothing of it depends on a missed event.
    let never = Arc::new(Deaf::default());
    let whole = watcher::Config::default;
    let managed = whole().labels(&managed_selector());
    let known = Known {
        pods: watch(&mut parts, &stop, "pods", &never, Api::all(client.clone()), managed, strip_pod, |_, _| {}),
        pools: watch(&mut parts, &stop, "pools", &never, Api::all(client.clone()), whole(), strip::<Guarded<RunnerPool>>, |_, _| {}),
        bindings: watch(
            &mut parts,
            &stop,
            "bindings",
            &never,
            Api::all(client.clone()),
            whole(),
            strip::<Guarded<CredentialBinding>>,
            |_, _| {},
        ),
    };
    let reports = settings.controller.map(|controller| {
        let ((reports, left), until) = (Reports::new(), stop.clone());
        parts.spawn(async move {
            credentials::deliver(controller, left, until).await.context("--controller-ca-file")?;
            Ok("refusals")
        });
        reports
    });
    let broker = Arc::new(Broker::new(Parts {
        known: known.clone(),
        identities: Identities::new(KubeIo::new(client, settings.instance.clone(), metrics.clone()), BROKER_AUDIENCE),
        issuers: issuers.clone(),
        providers,
        audit,
        metrics,
        remembered: settings.remembered_tokens,
        alone: settings.only_replica,
        reports,
    }));
    let tls = GateTls { authority: String::new(), certificate: settings.certificate, key: settings.key };
    serve_tls(&mut parts, "broker", settings.broker_address, credentials::router(broker.clone()), tls, &stop).await?;
    let until = stop.clone();
    parts.spawn(async move {
        tokio::select! { () = broker.keep_revoking() => {}, () = until.cancelled() => {} }
        match broker.unrevoked() {
            0 => {}
            count => tracing::warn!(count, "credentials of running pods are not revoked by this process: they live until their end"),
        }
        Ok("revocations")
    });

    let until = stop.clone();
    parts.spawn(async move {
        tokio::select! { () = issuers.keep_fresh() => {}, () = until.cancelled() => {} }
        Ok("issuers")
    });
    let until = stop.clone();
    parts.spawn(async move {
        let ended = |_| anyhow::anyhow!("a watch ended before it began");
        known.pods.wait_until_ready().await.map_err(ended)?;
        known.pools.wait_until_ready().await.map_err(ended)?;
        known.bindings.wait_until_ready().await.map_err(ended)?;
        health.done("watches");
        until.cancelled().await;
        Ok("readiness")
    });

    let ended = first_end(&mut parts).await;
    stop.cancel();
    let drain = async { while parts.join_next().await.is_some() {} };
    if tokio::time::timeout(GRACE, drain).await.is_err() {
        tracing::warn!("not everything ended in time");
    }
    ended
}
