//! `mayfly-gate`: the native sidecar of every runner pod.
//!
//! It proves to the operator that the pod's network is closed, makes a named pipe in the pod's memory volume, waits until the runner's
//! entry point reads from it, asks the operator for the pod's registration with a token that only it has, and writes the registration
//! into the pipe: a file that can be read once and is never stored. When the pool has accepted the job that the runner took, it says so in a
//! file, for which a runner with hooks waits. While the job runs it goes on proving, and when the runner's program has ended it says so. From
//! its first instruction on it tries whether a pod's policies are enforced late.
//!
//! As `mayfly-gate sentinel` it is what proofs are held against: something that answers wherever no policy stands in the way, and tells
//! what answers on its node.

mod credentials;
mod end;
mod http;
mod operator;
mod pipe;
mod prove;
mod race;
mod sentinel;

use std::convert::Infallible;
use std::fs;
use std::io::Write;
use std::net::{AddrParseError, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::thread;

use clap::{Args, Parser, Subcommand};
use credentials::{Arranged, Counter, Desk};
use end::Running;
use operator::{Client, Registration};
use race::Race;
use rustix::fs::Mode;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// The file beside the registration that says which job the runner has, once the pool has accepted it. A runner with hooks waits for it
/// before the job's first step.
const JOB: &str = "job";

/// Proves that a runner pod is isolated, and hands it its registration, once.
#[derive(Parser)]
#[command(version, about, subcommand_negates_reqs = true, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    settings: Option<Settings>,
}

#[derive(Subcommand)]
enum Command {
    /// Answer whoever asks, TCP and UDP, so that silence elsewhere means something.
    Sentinel(sentinel::Settings),
}

#[derive(Args)]
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
    /// Addresses of sentinels, which the pod must not reach; tried from the gate's first instruction on.
    #[arg(long, env = "MAYFLY_SENTINELS", default_value = "", value_name = "ADDRESS:PORT,..")]
    sentinels: Addresses,
    #[command(flatten)]
    credentials: Option<credentials::Settings>,
}

/// None, one or several, with commas between them.
#[derive(Clone)]
struct Addresses(Vec<SocketAddr>);

impl FromStr for Addresses {
    type Err = AddrParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let written = text.split(',').filter(|address| !address.is_empty());
        Ok(Self(written.map(str::parse).collect::<Result<_, _>>()?))
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Before anything else: it is what happens first that may be open.
    let race = cli.settings.as_ref().map(|settings| Race::begin(&settings.sentinels.0));
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
    match (cli.command, cli.settings.zip(race)) {
        (Some(Command::Sentinel(settings)), _) => match sentinel::run(&settings) {
            Ok(never) => match never {},
            Err(error) => fail(&error),
        },
        (None, Some((settings, race))) => {
            let Err(error) = guard(&settings, race);
            say(&error);
            // The operator removes the pod; a restart of this container would change nothing.
            loop {
                thread::park();
            }
        }
        (None, None) => fail("nothing to do: see --help"),
    }
}

/// The gate's whole life. It ends only when the operator wants nothing more of this pod.
fn guard(settings: &Settings, race: Race) -> Result<Infallible, String> {
    let client = Arc::new(Client::new(&settings.operator_url, &settings.operator_ca, &settings.token_file)?);
    let folder = settings.registration.parent().ok_or("the registration has no folder")?;
    let running = Running::open(folder)?;
    pipe::make(&settings.registration, Mode::RUSR | Mode::WUSR | Mode::RGRP)?;
    {
        let client = client.clone();
        thread::spawn(move || {
            if let Err(why) = running.wait().and_then(|()| client.ended()) {
                say(&why);
            }
        });
    }
    // The runner's container is being started meanwhile. Opening the pipe waits until it reads: nothing is registered for a runner
    // that never starts.
    let pipe = thread::scope(|scope| {
        let proof = scope.spawn(|| prove::first(&client, race));
        let pipe = pipe::open(&settings.registration);
        proof.join().map_err(|_| "the proof ended unexpectedly".to_owned())??;
        pipe
    })?;
    say("runner is waiting");
    let handed = loop {
        match client.registration()? {
            Registration::Here(handed) => break handed,
            // What was proved a while ago is proved anew, so that a job does not have to wait for it.
            Registration::NotYet | Registration::Unproved => prove::prove(&client)?,
        }
    };
    let arranged = match handed.id_tokens {
        true => arrange(settings, &client),
        false => None,
    };
    pipe::write(pipe, &settings.registration, &handed.registration)?;
    drop(handed);
    say("registration handed over");
    thread::scope(|scope| {
        let desk = arranged.as_ref().map(Arranged::desk);
        if let Some(arranged) = arranged {
            scope.spawn(|| {
                let Err(why) = arranged.serve();
                say(&why);
            });
        }
        scope.spawn(|| {
            if let Err(why) = serve_job(settings, &client, desk) {
                say(&why);
            }
        });
        prove::go_on(&client)
    })
}

/// Has a job's steps find its tokens and credentials, before its runner starts. Where that fails the job runs without.
fn arrange(settings: &Settings, client: &Arc<Client>) -> Option<Arranged> {
    let folder = settings.registration.parent()?;
    let arranged = Arranged::open(folder, client.clone(), settings.credentials.as_ref());
    arranged.inspect_err(|why| say(&format!("the job gets no tokens: {why}"))).ok()
}

/// Tells the job that it may begin, and gives it credentials where it may have any.
fn serve_job(settings: &Settings, client: &Client, desk: Option<Arc<Desk>>) -> Result<(), String> {
    let job = client.job()?;
    let folder = settings.registration.parent().ok_or("the registration has no folder")?;
    // Where the job's hook comes as soon as it is told.
    let counter = match (&desk, &settings.credentials) {
        (None, Some(credentials)) => Some((Counter::open(folder)?, credentials)),
        _ => None,
    };
    tell(&folder.join(JOB), &job)?;
    say("the job is accepted");
    match (desk, counter) {
        (Some(desk), _) => desk.learn(),
        (None, Some((counter, credentials))) => match counter.serve(credentials)? {},
        (None, None) => Err("there is no broker: the job gets no credentials".to_owned()),
    }
}

/// Writes a file that the runner may read, whole from its first moment on.
fn tell(path: &Path, text: &[u8]) -> Result<(), String> {
    let new = path.with_extension("new");
    let written = fs::write(&new, text)
        .and_then(|()| fs::set_permissions(&new, fs::Permissions::from_mode(0o440)))
        .and_then(|()| fs::rename(&new, path));
    written.map_err(|error| format!("{}: {error}", path.display()))
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
