//! `mayfly`: a Kubernetes operator that runs every CI job in a locked-down pod of its own. See ARCHITECTURE.md for the rooms.

mod cli;
mod forge;
mod gc;
mod isolation;
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
            tracing_subscriber::fmt().json().flatten_event(true).with_env_filter(filter).init();
            runtime::run_controller(args.settings()?).await
        }
        Command::Crd => cli::print_crds(),
        Command::ClusterDenial { dialect } => cli::print_cluster_denial(dialect),
        Command::Completions { shell } => {
            cli::print_completions(shell);
            Ok(())
        }
    }
}
