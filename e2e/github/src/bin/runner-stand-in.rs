//! Runs one job with a JIT configuration, in place of GitHub's runner program.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use clap::Parser;
use mayfly_github_simulator::runner::{Options, WHAT_THIS_IS, run};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// A stand-in for GitHub's runner, made for tests; it is not GitHub's runner.
///
/// Takes one JIT configuration, runs the `run:` steps of one job, and ends with the exit codes of the real one.
#[derive(Parser)]
#[command(version = concat!(env!("CARGO_PKG_VERSION"), " (a stand-in for GitHub's runner, made for tests; it is not GitHub's runner)"))]
struct Cli {
    /// The JIT configuration.
    #[arg(long, env = "ACTIONS_RUNNER_INPUT_JITCONFIG", hide_env_values = true)]
    jitconfig: Option<String>,
    /// A file or a named pipe to read the JIT configuration from, once.
    #[arg(long, conflicts_with = "jitconfig")]
    jitconfig_file: Option<PathBuf>,
    /// Where the work folder is made [default: the home folder, else here].
    #[arg(long)]
    root: Option<PathBuf>,
    /// Authorities to trust, PEM.
    #[arg(long, env = "SSL_CERT_FILE")]
    authorities: Option<PathBuf>,
}

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let configuration = match (cli.jitconfig, cli.jitconfig_file) {
        (_, Some(file)) => fs::read_to_string(&file).with_context(|| format!("{} cannot be read", file.display()))?,
        (Some(configuration), None) => configuration,
        (None, None) => anyhow::bail!("a JIT configuration is needed; this is {WHAT_THIS_IS}"),
    };
    let authorities = match &cli.authorities {
        Some(file) => fs::read(file).with_context(|| format!("{} cannot be read", file.display()))?,
        None => Vec::new(),
    };
    let root = match cli.root.or_else(|| std::env::home_dir().filter(|home| home.is_dir())) {
        Some(root) => root,
        None => std::env::current_dir()?,
    };
    let ending = Arc::new(AtomicBool::new(false));
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let told = ending.clone();
    std::thread::spawn(move || {
        for _ in signals.forever() {
            told.store(true, Ordering::Relaxed);
        }
    });
    let exit = run(configuration.trim(), &Options { root, authorities, ending });
    Ok(ExitCode::from(exit as u8))
}
