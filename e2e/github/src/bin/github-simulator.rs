//! Runs a GitHub that can be tested against.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use mayfly_github_simulator::model::{Flow, Settings};
use mayfly_github_simulator::server::{Config, Server};

/// A simulator of GitHub's runner protocol, for tests. It is not GitHub, and keeps nothing.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    /// Where to listen.
    #[arg(long, env = "GITHUB_SIMULATOR_LISTEN", default_value = "127.0.0.1:8480")]
    listen: SocketAddr,
    /// Certificate chain, PEM; without it the simulator speaks plain HTTP.
    #[arg(long, env = "GITHUB_SIMULATOR_TLS_CERT", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Private key of the certificate, PEM.
    #[arg(long, env = "GITHUB_SIMULATOR_TLS_KEY", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Where to listen with the certificate, beside plain HTTP [default: with the certificate alone].
    #[arg(long, env = "GITHUB_SIMULATOR_TLS_LISTEN", requires = "tls_cert")]
    tls_listen: Option<SocketAddr>,
    /// Base of every URL that is handed out, as its readers reach the simulator.
    #[arg(long, env = "GITHUB_SIMULATOR_PUBLIC_URL")]
    public_url: Option<String>,
    /// Issuer of OIDC tokens [default: <public URL>/_services/token].
    #[arg(long, env = "GITHUB_SIMULATOR_ISSUER")]
    issuer: Option<String>,
    /// How jobs reach a scale set: assigned directly as on github.com, or acquired as on GitHub Enterprise Server.
    #[arg(long, env = "GITHUB_SIMULATOR_FLOW", value_enum, default_value_t = FlowName::Assign)]
    flow: FlowName,
}

#[derive(Clone, Copy, ValueEnum)]
enum FlowName {
    Assign,
    Acquire,
}

#[tokio::main]
async fn main() -> Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let cli = Cli::parse();
    let flow = match cli.flow {
        FlowName::Assign => Flow::Assign,
        FlowName::Acquire => Flow::Acquire,
    };
    let config = Config {
        listen: Some(cli.listen),
        tls: cli.tls_cert.zip(cli.tls_key),
        tls_listen: cli.tls_listen,
        public_url: cli.public_url,
        issuer: cli.issuer,
        settings: Settings { flow, ..Settings::default() },
    };
    let server = Server::start(config).await?;
    tracing::info!(url = server.url, address = %server.address, "the GitHub simulator is ready; it is not GitHub");
    server.run().await
}
