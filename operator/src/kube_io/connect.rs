//! The client of the API server, of which no connection outlives the path to the other end.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hyper_rustls::{FixedServerNameResolver, HttpsConnectorBuilder};
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

/// What `Client::try_from` makes, with an eye on the connections: by HTTP/2, as Go's clients have it, so that calls at the same time need no
/// connections of their own. With HTTP/1.1 a burst of pods began with one TLS handshake for each.
fn client(config: Config) -> Result<Client> {
    ensure!(config.proxy_url.is_none(), "the API server is not asked by way of a proxy: take proxy-url out of the kubeconfig");
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_keepalive(Some(QUIET));
    tcp.set_keepalive_interval(Some(AGAIN));
    tcp.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
    let mut tls = HttpsConnectorBuilder::new().with_tls_config(config.rustls_client_config()?).https_or_http();
    if let Some(name) = &config.tls_server_name {
        let name = name.clone().try_into().context("tls-server-name of the kubeconfig")?;
        tls = tls.with_server_name_resolver(FixedServerNameResolver::new(name));
    }
    let mut connector = TimeoutConnector::new(tls.enable_all_versions().wrap_connector(tcp));
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

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::net::SocketAddr;
    use std::sync::{Arc, Mutex};

    use axum::Router;
    use axum::extract::ConnectInfo;
    use axum_server::Handle;
    use axum_server::tls_rustls::{RustlsConfig, bind_rustls};
    use futures::future::try_join_all;

    use super::*;

    /// Calls at the same time.
    const BURST: usize = 50;

    #[tokio::test]
    async fn calls_at_the_same_time_share_a_connection() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
        let (certificate, key) = (made.cert.pem().into_bytes(), made.signing_key.serialize_pem().into_bytes());
        let tls = RustlsConfig::from_pem(certificate, key).await.expect("a server's TLS");
        let peers = Arc::new(Mutex::new(HashSet::new()));
        let seen = peers.clone();
        let router = Router::new().fallback(async move |ConnectInfo(peer): ConnectInfo<SocketAddr>| {
            seen.lock().expect("peers").insert(peer);
            // All of them are there before the first is answered.
            tokio::time::sleep(Duration::from_millis(200)).await;
            "here"
        });
        let handle = Handle::new();
        let server = bind_rustls(SocketAddr::from(([127, 0, 0, 1], 0)), tls).handle(handle.clone());
        tokio::spawn(server.serve(router.into_make_service_with_connect_info::<SocketAddr>()));
        let address = handle.listening().await.expect("an address");

        let mut config = Config::new(format!("https://localhost:{}", address.port()).parse().expect("an address"));
        config.root_cert = Some(vec![made.cert.der().to_vec()]);
        let client = client(config).expect("a client");
        let ask = async || client.request_text(http::Request::get("/version").body(Vec::new()).expect("a request")).await;
        assert_eq!(ask().await.expect("an answer"), "here");
        try_join_all((0..BURST).map(|_| ask())).await.expect("answers");
        assert_eq!(peers.lock().expect("peers").len(), 1);
    }
}
