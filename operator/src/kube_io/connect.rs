//! The client of the API server, of which no connection outlives the path to the other end.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::Client as Hyper;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::ConfigExt;
use kube::client::retry::RetryPolicy;
use kube::{Client, Config};
use tower::ServiceBuilder;
use tower::retry::RetryLayer;

use super::MANAGER;

/// Longest silence on a connection to the API server. A watch hears a bookmark every minute, if nothing else.
const SILENCE: Duration = Duration::from_secs(100);
/// A connection that is quiet for this long is asked whether its other end is still there.
const QUIET: Duration = Duration::from_secs(10);
/// How far such questions are apart.
const AGAIN: Duration = Duration::from_secs(2);
/// What was sent has to be acknowledged by the other end's kernel after this long.
const UNACKNOWLEDGED: Duration = Duration::from_secs(10);

/// A client of the cluster that this process runs in, or of the kubeconfig's.
///
/// Where the path to the API server is gone without a word (a node of the control plane that lost its power, a load balancer that forgot
/// its connections), every connection is known to be dead after a quarter of a minute, the watches' and those that wait for use. By
/// default, a call finds out one connection after the other, at a call's whole deadline each.
pub(crate) async fn connect() -> Result<Client> {
    let mut config = Config::infer().await.context("no cluster: neither a kubeconfig nor a pod's service account was found")?;
    config.headers.push((http::header::USER_AGENT, http::HeaderValue::from_static(MANAGER)));
    config.read_timeout = Some(SILENCE);
    client(config).context("the cluster's configuration cannot be used")
}

/// What `Client::try_from` makes, with an eye on the connections.
fn client(config: Config) -> Result<Client> {
    ensure!(config.proxy_url.is_none(), "the API server is not asked by way of a proxy: take proxy-url out of the kubeconfig");
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_keepalive(Some(QUIET));
    tcp.set_keepalive_interval(Some(AGAIN));
    tcp.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
    let mut connector = TimeoutConnector::new(config.rustls_https_connector_with_connector(tcp)?);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(config.read_timeout);
    connector.set_write_timeout(config.write_timeout);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .layer(RetryLayer::new(RetryPolicy::server_retry()))
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(tower::BoxError::from)
        .service(Hyper::builder(TokioExecutor::new()).build(connector));
    Ok(Client::new(service, config.default_namespace))
}
