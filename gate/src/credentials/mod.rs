//! Credentials for the job, on loopback, in the protocols that SDKs speak already.
//!
//! The hook that runs before a job's first step hands over the job's right to ask its forge for OIDC tokens, through the named pipe
//! `identity`, and reads from the pipe `credentials` what it has to do, a line each:
//!
//! - `mask VALUE`: the log is not to show this;
//! - `set NAME=VALUE`: a variable for the job's steps;
//! - `say TEXT`: for whoever reads the job's log.
//!
//! A hook that hands over nothing, because its job may not ask for tokens, is not waited for, and nothing is served.
//!
//! Where the forge gives its jobs no tokens and the operator does, there is nothing to hand over, and often no hook: the steps' variables
//! are written into the file `environment` before the runner gets its registration ([`Arranged`]), and answered once it is known which job it is.

mod broker;
mod desk;
mod identity;
mod server;

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use rustix::fs::Mode;

use crate::operator::Client;
use crate::pipe;
use broker::Broker;
pub(crate) use broker::Trouble;
pub(crate) use desk::Desk;
use identity::{HandedOver, Identity};

/// Variables for the job's steps, a line each, for runners that are told them before they have a job.
const ENVIRONMENT: &str = "environment";
/// Longest identity that is read, in bytes.
const MAX_IDENTITY: u64 = 32 << 10;

/// Where credentials come from.
#[derive(Args, Clone)]
pub(crate) struct Settings {
    /// Base URL of the broker; without it there are no credentials.
    #[arg(long, env = "MAYFLY_BROKER_URL")]
    broker_url: String,
    /// Certificate authority of the broker, PEM.
    #[arg(long, env = "MAYFLY_BROKER_CA")]
    broker_ca: String,
    /// File with the pod's token for the broker; read anew for every call, as it is rotated.
    #[arg(long, env = "MAYFLY_BROKER_TOKEN_FILE")]
    broker_token_file: PathBuf,
    /// Further certificate authorities of forges, PEM.
    #[arg(long, env = "MAYFLY_FORGE_CA")]
    forge_ca: Option<String>,
}

/// Where a job's hook and the gate meet. It is there before the job is told to begin.
pub(crate) struct Counter {
    folder: PathBuf,
    identity: PathBuf,
    credentials: PathBuf,
}

impl Counter {
    /// Makes the pipe that the hook writes to. The job cannot read it, so that a step that reads whatever is there does not wait on it.
    ///
    /// # Errors
    /// When this container was started before.
    pub(crate) fn open(folder: &Path) -> Result<Self, String> {
        let (identity, credentials) = (folder.join("identity"), folder.join("credentials"));
        pipe::make(&identity, Mode::RUSR | Mode::WGRP)?;
        Ok(Self { folder: folder.to_owned(), identity, credentials })
    }

    /// Waits for the hook, tells it what there is, and gives it to the job's steps as long as the pod lives.
    ///
    /// # Errors
    /// When nothing can be given; the hook was told so, if there was one.
    pub(crate) fn serve(self, settings: &Settings) -> Result<Infallible, String> {
        let handed = pipe::read(&self.identity, MAX_IDENTITY);
        // Whatever comes of it, the hook waits for a word.
        pipe::make(&self.credentials, Mode::WUSR | Mode::RGRP)?;
        let prepared = handed.and_then(|handed| self.prepare(settings, &handed));
        let runtime = runtime()?;
        let tell = |lines: String| pipe::write(pipe::open(&self.credentials)?, &self.credentials, lines.as_bytes());
        match prepared {
            Ok((listener, desk)) => {
                tell(runtime.block_on(desk.introduce()))?;
                runtime.block_on(serve(listener, desk))
            }
            Err(why) => {
                tell(format!("say Mayfly: no credentials: {why}\n"))?;
                Err(why)
            }
        }
    }

    fn prepare(&self, settings: &Settings, handed: &[u8]) -> Result<(TcpListener, Arc<Desk>), String> {
        let identity = Identity::Forge(HandedOver::read(handed, settings.forge_ca.as_deref().unwrap_or_default())?);
        let broker = settings.broker()?;
        let (listener, address) = loopback()?;
        Ok((listener, Arc::new(Desk::open(identity, broker, address, &self.folder)?)))
    }
}

impl Settings {
    fn broker(&self) -> Result<Broker, String> {
        Broker::new(&self.broker_url, &self.broker_ca, &self.broker_token_file)
    }
}

fn loopback() -> Result<(TcpListener, SocketAddr), String> {
    let bound = TcpListener::bind("127.0.0.1:0").and_then(|listener| Ok((listener.local_addr()?, listener)));
    bound.map(|(address, listener)| (listener, address)).map_err(|error| format!("loopback: {error}"))
}

fn runtime() -> Result<tokio::runtime::Runtime, String> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())
}

/// Answers, and has ready what is not asked for, as long as the pod lives.
async fn serve(listener: TcpListener, desk: Arc<Desk>) -> Result<Infallible, String> {
    tokio::join!(server::serve(listener, desk.clone()), desk.keep_ready()).0
}

/// Tokens of the operator and what comes of them, for a job that is not known yet.
pub(crate) struct Arranged {
    listener: TcpListener,
    desk: Arc<Desk>,
}

impl Arranged {
    /// Writes down what the job's steps have to know. Without a broker there are tokens and nothing else.
    ///
    /// # Errors
    /// When that cannot be written, or loopback cannot be listened on.
    pub(crate) fn open(folder: &Path, client: Arc<Client>, settings: Option<&Settings>) -> Result<Self, String> {
        let (listener, address) = loopback()?;
        let broker = settings.map(Settings::broker).transpose()?;
        let desk = Arc::new(Desk::waiting(Identity::Operator(client), broker, address, folder)?);
        crate::tell(&folder.join(ENVIRONMENT), desk.environment().as_bytes())?;
        Ok(Self { listener, desk })
    }

    /// Which has to be told once the job is known.
    pub(crate) fn desk(&self) -> Arc<Desk> {
        self.desk.clone()
    }

    /// Serves as long as the pod lives.
    pub(crate) fn serve(self) -> Result<Infallible, String> {
        runtime()?.block_on(serve(self.listener, self.desk))
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod hook {
    use std::process::{Command, Output, Stdio};
    use std::thread::JoinHandle;
    use std::{fs, thread};

    use super::*;

    /// A job's hook, the one that users have, with the variables that its runner gives it.
    struct Hook {
        folder: PathBuf,
        process: JoinHandle<Output>,
    }

    impl Hook {
        fn run(name: &str, variables: &[(&str, &str)]) -> Self {
            let folder = std::env::temp_dir().join(format!("mayfly-gate-hook-{name}-{}", std::process::id()));
            fs::create_dir_all(&folder).expect("a folder");
            fs::write(folder.join("github-env"), "").expect("a file");
            let mut hook = Command::new("bash");
            hook.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../images/github-runner/mayfly-job-started"));
            hook.env("MAYFLY_JOB", folder.join("job")).env("GITHUB_ENV", folder.join("github-env")).envs(variables.iter().copied());
            hook.stdout(Stdio::piped()).stderr(Stdio::piped());
            let process = hook.spawn().expect("bash");
            Self { folder, process: thread::spawn(|| process.wait_with_output().expect("the hook's end")) }
        }

        /// What it said, and what it set.
        fn ended(self) -> (String, String) {
            let output = self.process.join().expect("no panic");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let set = fs::read_to_string(self.folder.join("github-env")).expect("the file");
            fs::remove_dir_all(&self.folder).expect("removed");
            (String::from_utf8(output.stdout).expect("text"), set)
        }
    }

    const IDENTITY: [(&str, &str); 2] =
        [("ACTIONS_ID_TOKEN_REQUEST_URL", "https://forge.example/token?v=1"), ("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "hunter2")];

    #[test]
    fn the_stand_ins_programs_are_those_that_users_have() {
        let [ours, tested] = [
            include_str!("../../../images/github-runner/mayfly-job-started"),
            include_str!("../../../e2e/images/github-runner-stand-in/mayfly-job-started"),
        ];
        assert_eq!(ours, tested);
        let [ours, tested] = [
            include_str!("../../../images/github-runner/mayfly-credentials"),
            include_str!("../../../e2e/images/github-runner-stand-in/mayfly-credentials"),
        ];
        assert_eq!(ours, tested);
    }

    /// Where `fs.protected_fifos` is set, as on most nodes, and as the tests' cluster sets it.
    #[test]
    fn no_program_of_the_images_opens_a_pipe_as_linux_refuses() {
        for program in [
            include_str!("../../../images/gitea-runner/mayfly-runner"),
            include_str!("../../../images/github-runner/entrypoint"),
            include_str!("../../../images/github-runner/mayfly-job-started"),
            include_str!("../../../e2e/images/github-runner-stand-in/mayfly-runner"),
        ] {
            let writes = program.lines().filter(|line| line.contains(">\"$folder/") || line.contains(">\"${registration%/*}/"));
            assert_eq!(writes.collect::<Vec<_>>(), Vec::<&str>::new());
        }
    }

    #[test]
    fn the_hook_hands_over_the_identity_and_does_as_it_is_told() {
        let hook = Hook::run("told", &[IDENTITY[0], IDENTITY[1], ("AWS_REGION", "chosen-by-the-workflow")]);
        let counter = Counter::open(&hook.folder).expect("pipes");
        crate::tell(&hook.folder.join("job"), b"job 7").expect("told");
        assert_eq!(pipe::read(&counter.identity, MAX_IDENTITY).expect("handed over"), b"https://forge.example/token?v=1\nhunter2\n");
        pipe::make(&counter.credentials, Mode::WUSR | Mode::RGRP).expect("a pipe");
        let lines = "mask s3cr3t=\nset AWS_REGION=x\nset URI=http://127.0.0.1:1/v1/aws/a\nsay  hello $HOME `id`\n";
        pipe::write(pipe::open(&counter.credentials).expect("a reader"), &counter.credentials, lines.as_bytes()).expect("written");
        let (said, set) = hook.ended();
        assert_eq!(said, "Mayfly accepted job 7 for this pod\n::add-mask::s3cr3t=\nhello $HOME `id`\n");
        assert_eq!(set, "URI=http://127.0.0.1:1/v1/aws/a\n");
    }

    #[test]
    fn a_job_without_the_right_to_ask_for_tokens_is_not_held_up() {
        let hook = Hook::run("plain", &[]);
        let _counter = Counter::open(&hook.folder).expect("pipes");
        crate::tell(&hook.folder.join("job"), b"job 7").expect("told");
        assert_eq!(hook.ended(), ("Mayfly accepted job 7 for this pod\n".to_owned(), String::new()));
    }

    #[test]
    fn a_hook_that_gets_nothing_is_told_why() {
        let settings = Settings { broker_url: String::new(), broker_ca: String::new(), broker_token_file: PathBuf::new(), forge_ca: None };
        let long = "x".repeat(40_000);
        for (name, url) in [("nowhere", "nowhere"), ("long", long.as_str())] {
            let hook = Hook::run(name, &[("ACTIONS_ID_TOKEN_REQUEST_URL", url), IDENTITY[1]]);
            let counter = Counter::open(&hook.folder).expect("pipes");
            crate::tell(&hook.folder.join("job"), b"job 7").expect("told");
            let error = counter.serve(&settings).expect_err("no identity");
            let (said, set) = hook.ended();
            assert!(said.ends_with(&format!("Mayfly: no credentials: {error}\n")) && !said.contains("hunter2"), "{said}");
            assert_eq!(set, "");
        }
    }
}
