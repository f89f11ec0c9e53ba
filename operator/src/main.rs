//! `mayfly`: a Kubernetes operator that runs every CI job in a locked-down pod of its own. See ARCHITECTURE.md for the rooms.

mod audit;
mod cli;
mod credentials;
mod digest;
mod forge;
mod gc;
mod isolation;
mod issuer;
mod kube_io;
mod pool;
mod runner;
mod runtime;

use anyhow::Result;
use clap::Parser;
use tracing_subscriber::EnvFilter;

use cli::{Cli, Command};

#[tokio::main]
async fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Controller(args) => {
            let filter = EnvFilter::try_from_env("MAYFLY_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
            // Standard output is for audit records.
            tracing_subscriber::fmt().json().flatten_event(true).with_writer(std::io::stderr).with_env_filter(filter).init();
            runtime::run_controller(args.settings()?).await
        }
        Command::Broker(args) => {
            let filter = EnvFilter::try_from_env("MAYFLY_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
            // However much is asked for: the SDK's tracing would write requests, and so tokens.
            let quiet = ["aws_smithy_runtime=info", "aws_smithy_runtime_api=info", "aws_sdk_sts=info"];
            let filter = quiet.iter().try_fold(filter, |filter, part| part.parse().map(|part| filter.add_directive(part)))?;
            tracing_subscriber::fmt().json().flatten_event(true).with_writer(std::io::stderr).with_env_filter(filter).init();
            runtime::run_broker(args.settings()?).await
        }
        Command::Audit(command) => cli::audit(command),
        Command::Explain(args) => runtime::run_explain(args).await,
        Command::Crd => cli::print_crds(),
        Command::ClusterDenial { dialect } => cli::print_cluster_denial(dialect),
        Command::Completions { shell } => {
            cli::print_completions(shell);
            Ok(())
        }
    }
}
