//! `mayfly-gate`: the native sidecar of every runner pod.
//!
//! It makes a named pipe in the pod's memory volume, waits until the runner's entry point reads from it, asks the operator for the
//! pod's registration with a token that only it has, and writes the registration into the pipe: a file that can be read once and is
//! never stored. Then it waits to be ended.

mod operator;
mod pipe;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;

use clap::Parser;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Hands a runner pod its registration, once.
#[derive(Parser)]
#[command(version, about)]
struct Settings {
    /// Base URL of the operator's gate API.
    #[arg(long, env = "MAYFLY_OPERATOR_URL")]
    operator_url: String,
    /// Certificate authority of the gate API, PEM.
    #[arg(long, env = "MAYFLY_OPERATOR_CA")]
    operator_ca: String,
    /// File with the pod's token for the gate API; read anew for every call, as it is rotated.
    #[arg(long, env = "MAYFLY_TOKEN_FILE")]
    token_file: PathBuf,
    /// Where the runner's entry point finds its registration.
    #[arg(long, env = "MAYFLY_REGISTRATION")]
    registration: PathBuf,
}

fn main() -> ExitCode {
    let settings = Settings::parse();
    let mut signals = match Signals::new([SIGTERM, SIGINT]) {
        Ok(signals) => signals,
        Err(error) => return fail(&format!("signals cannot be received: {error}")),
    };
    // As the first process of its container the gate gets no default action for signals.
    thread::spawn(move || {
        if signals.forever().next().is_some() {
            std::process::exit(0);
        }
    });
    match hand_over(&settings) {
        Ok(()) => say("registration handed over"),
        // The operator removes the pod; a restart of this container would change nothing.
        Err(error) => say(&format!("no registration: {error}")),
    }
    loop {
        thread::park();
    }
}

fn hand_over(settings: &Settings) -> Result<(), String> {
    let client = operator::Client::new(&settings.operator_url, &settings.operator_ca, &settings.token_file)?;
    pipe::make(&settings.registration)?;
    // Opening blocks until the runner reads: nothing is registered for a runner that never starts.
    let pipe = pipe::open(&settings.registration)?;
    say("runner is waiting");
    let registration = client.registration()?;
    pipe::write(pipe, &settings.registration, &registration)
}

fn fail(why: &str) -> ExitCode {
    say(why);
    ExitCode::FAILURE
}

/// One line to the container's log.
fn say(what: &str) {
    // Nobody to tell if the log is gone.
    let _ = writeln!(std::io::stderr(), "mayfly-gate: {what}");
}
