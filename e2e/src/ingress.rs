//! The address at which the world finds Mayfly's OIDC issuer. Where users have an Ingress, a program of the outside world stands in: it ends
//! TLS and hands everything on to the Service that serves webhooks and the issuer's documents.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use mayfly_cluster::command::{output, run};
use mayfly_cluster::{Cluster, ForgeAccess, Provider, World as Place, pki};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::World;
use crate::wait::eventually;
use crate::world::{SYSTEM, built, host_beside_forge, host_of};

/// What it is called among the programs of the outside world.
const NAME: &str = "ingress";
const PORT: u16 = 8445;

/// What the program is told.
#[derive(Args)]
pub struct Arguments {
    /// Where it listens.
    listen: SocketAddr,
    /// Where everything goes, in the open.
    to: SocketAddr,
    /// PEM file of its certificate.
    certificate: PathBuf,
    /// PEM file of the key.
    key: PathBuf,
}

/// The issuer, as tokens name it.
///
/// # Errors
/// When the forge's address is none.
pub fn issuer(access: &ForgeAccess) -> Result<String> {
    Ok(format!("https://{}:{PORT}", host_beside_forge(access, "mayfly")?))
}

/// Has it run, and waits until the issuer's documents are behind it. Takes an installed operator and a cluster of this machine.
///
/// # Errors
/// When they are not.
pub async fn start(world: &World) -> Result<()> {
    let (host, local) = (host_beside_forge(&world.access, "mayfly")?, host_of(&world.access.local_url)?);
    let (certificate, key) = pki::server(world.cluster.layout(), NAME, &[&host, local])?;
    let words = [
        built()?.join("demo").display().to_string(),
        NAME.to_owned(),
        format!("0.0.0.0:{PORT}"),
        webhook_service(&world.cluster)?,
        certificate.display().to_string(),
        key.display().to_string(),
    ];
    let argv: Vec<&str> = words.iter().map(String::as_str).collect();
    world.cluster.start(Place::Outside, NAME, &argv)?;
    let discovery = format!("https://{local}:{PORT}/.well-known/openid-configuration");
    eventually("the issuer's documents", Duration::from_secs(30), || async {
        let curl = ["curl", "--silent", "--show-error", "--fail", "--insecure", "--noproxy", "*", "--max-time", "5", &discovery];
        run(&mut world.cluster.command_in(Place::Outside, curl)).map(Some)
    })
    .await
}

/// Address and port, for the outside world, of the Service that serves webhooks and the issuer's documents.
///
/// # Errors
/// When it is not there.
pub fn webhook_service(cluster: &Cluster) -> Result<String> {
    let service = |path: &str| {
        let path = format!("jsonpath={path}");
        output(cluster.kubectl().args(["-n", SYSTEM, "get", "service", "mayfly-webhooks", "-o", &path]))
    };
    // There is a way to Services from the outside world of a local cluster, and from around kind's there is one to the node.
    if cluster.provider() == Provider::Kind {
        let address = "jsonpath={.items[0].status.addresses[?(@.type==\"InternalIP\")].address}";
        let node = output(cluster.kubectl().args(["get", "nodes", "-o", address]))?;
        return Ok(format!("{}:{}", node.trim(), service("{.spec.ports[0].nodePort}")?.trim()));
    }
    Ok(format!("{}:80", service("{.spec.clusterIP}")?.trim()))
}

/// The program: it runs until it is ended.
///
/// # Errors
/// When it cannot listen.
pub async fn serve(arguments: Arguments) -> Result<()> {
    let certificates = CertificateDer::pem_file_iter(&arguments.certificate).context("the certificate")?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(&arguments.key).context("the key")?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let acceptor = TlsAcceptor::from(Arc::new(tls.with_no_client_auth().with_single_cert(certificates, key)?));
    let listener = TcpListener::bind(arguments.listen).await.with_context(|| format!("listening on {}", arguments.listen))?;
    loop {
        // A visitor that left early is no reason to end.
        let Ok((visitor, _)) = listener.accept().await else { continue };
        let (acceptor, to) = (acceptor.clone(), arguments.to);
        tokio::spawn(async move {
            let mut visitor = acceptor.accept(visitor).await?;
            let mut service = TcpStream::connect(to).await?;
            tokio::io::copy_bidirectional(&mut visitor, &mut service).await
        });
    }
}
