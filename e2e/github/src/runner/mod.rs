//! A stand-in for GitHub's runner program: takes one JIT configuration, runs one job's `run:` steps, and ends.
//!
//! It is not GitHub's runner, and says so in its help, its version and every log. What it does, it does as that one does: environment,
//! file commands, workflow commands, masks, hooks, cancelling, exit codes.

mod commands;
mod job;
mod log;
mod process;
mod protocol;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::Value;

use log::Log;
use protocol::{Failure, Forge, Message, Registration};

/// What the program says of itself.
pub const WHAT_THIS_IS: &str = "a stand-in for GitHub's runner, made for tests; it is not GitHub's runner";

/// How long a conflicting session is waited for.
const CONFLICT_PATIENCE: Duration = Duration::from_secs(30);
/// How long a forge is asked that cannot be reached.
const OUTAGE_PATIENCE: Duration = Duration::from_secs(60);
/// How often a job is renewed at least.
const RENEWAL: Duration = Duration::from_secs(60);

/// Exit codes of the listener, as the real runner has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// A job ran, or there is nothing more to do.
    Success = 0,
    /// The registration is of no use.
    Terminated = 1,
    /// The forge could not be reached.
    Retryable = 2,
    /// Another runner has the session.
    SessionConflict = 5,
    /// The forge wants a newer runner.
    Deprecated = 7,
}

/// What the program is started with.
pub struct Options {
    /// Where `_work` is made, unless the configuration names an absolute folder.
    pub root: PathBuf,
    /// Authorities to trust for `https`, PEM.
    pub authorities: Vec<u8>,
    /// Set when the program is told to end.
    pub ending: Arc<AtomicBool>,
}

/// Takes a job with this JIT configuration, runs it, and ends.
pub fn run(configuration: &str, options: &Options) -> Exit {
    let log = Arc::new(Log::default());
    log.line(&format!("This is runner-stand-in {}: {WHAT_THIS_IS}.", env!("CARGO_PKG_VERSION")));
    let registration = match Registration::parse(configuration) {
        Ok(registration) => registration,
        Err(error) => {
            log.line(&format!("An error occurred: the JIT configuration cannot be used: {error:#}"));
            return Exit::Terminated;
        }
    };
    match listen(registration, options, &log) {
        Ok(()) => Exit::Success,
        Err(failure) => {
            log.line(&format!("An error occurred: {failure}"));
            match failure {
                Failure::Refused(_) => Exit::Terminated,
                Failure::Conflict => Exit::SessionConflict,
                Failure::Deprecated => Exit::Deprecated,
                Failure::Unreachable(_) => Exit::Retryable,
            }
        }
    }
}

fn listen(registration: Registration, options: &Options, log: &Arc<Log>) -> Result<(), Failure> {
    let forge = Arc::new(Forge::new(registration, &options.authorities));
    patiently(options, || forge.sign_in())?;
    let begun = Instant::now();
    let session = loop {
        match patiently(options, || forge.open_session()) {
            Err(Failure::Conflict) if begun.elapsed() < CONFLICT_PATIENCE && !options.ending.load(Ordering::Relaxed) => {
                log.line("A session for this runner already exists; waiting.");
                thread::sleep(Duration::from_secs(2));
            }
            other => break other?,
        }
    };
    log.line(&format!("{} Connected to GitHub as {}", Timestamp::now(), forge.registration.name));
    log.line("Listening for Jobs");
    let result = one_job(&forge, &session, options, log);
    // A registration that is gone has no session either.
    let _ = forge.close_session();
    result
}

fn one_job(forge: &Arc<Forge>, session: &str, options: &Options, log: &Arc<Log>) -> Result<(), Failure> {
    loop {
        match patiently(options, || next_message(forge, session, options))? {
            Some(Message::Job(request)) => {
                forge.acknowledge(session, &request)?;
                let Some(message) = forge.acquire(&request)? else {
                    log.line("The job is gone; waiting for another.");
                    continue;
                };
                execute(forge, session, &request, &message, options, log);
                return Ok(());
            }
            _ if options.ending.load(Ordering::Relaxed) => return Ok(()),
            Some(Message::Cancel) | None => {}
        }
    }
}

/// The next message; none as well when the program is told to end. The poll itself cannot be interrupted, and is left behind then.
fn next_message(forge: &Arc<Forge>, session: &str, options: &Options) -> Result<Option<Message>, Failure> {
    let (sender, receiver) = channel();
    let (asking, session) = (forge.clone(), session.to_owned());
    // Nobody may be there any more to hear the answer.
    thread::spawn(move || drop(sender.send(asking.message(&session, "Online"))));
    loop {
        match receiver.recv_timeout(Duration::from_millis(50)) {
            Ok(message) => return message,
            Err(RecvTimeoutError::Timeout) if !options.ending.load(Ordering::Relaxed) => {}
            Err(_) => return Ok(None),
        }
    }
}

/// Runs a job while its lock is renewed and the forge is listened to.
fn execute(forge: &Arc<Forge>, session: &str, request: &Value, message: &Value, options: &Options, log: &Arc<Log>) {
    let cancelled = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicBool::new(false));
    let job = Arc::new(protocol::Job::new(request, message));
    let name = message["jobDisplayName"].as_str().unwrap_or_default();
    log.line(&format!("{} Running job: {name}", Timestamp::now()));
    let helpers = [
        thread::spawn({
            let (forge, job, done, cancelled) = (forge.clone(), job.clone(), done.clone(), cancelled.clone());
            move || renew(&forge, &job, &done, &cancelled)
        }),
        thread::spawn({
            let (forge, log, job, done) = (forge.clone(), log.clone(), job.clone(), done.clone());
            move || send_log(&forge, &job, &log, &done)
        }),
    ];
    // Listens for a cancellation; it ends with the program, as a poll cannot be interrupted.
    thread::spawn({
        let (forge, session, cancelled, done) = (forge.clone(), session.to_owned(), cancelled.clone(), done.clone());
        move || {
            while !done.load(Ordering::Relaxed) {
                match forge.message(&session, "Busy") {
                    Ok(Some(Message::Cancel)) => cancelled.store(true, Ordering::Relaxed),
                    Ok(_) => {}
                    Err(_) => thread::sleep(Duration::from_secs(1)),
                }
            }
        }
    });
    let result = job::run(&job, &forge.registration, options, &cancelled, log);
    done.store(true, Ordering::Relaxed);
    for helper in helpers {
        let _ = helper.join();
    }
    let told = patiently(options, || forge.complete(&job, &result));
    log.line(&format!("{} Job {name} completed with result: {}", Timestamp::now(), job::capitalized(result.conclusion)));
    if let Err(error) = told {
        log.line(&format!("The forge could not be told: {error}"));
    }
}

fn renew(forge: &Forge, job: &protocol::Job, done: &AtomicBool, cancelled: &AtomicBool) {
    let mut pause = job.lock / 2;
    while !done.load(Ordering::Relaxed) {
        let begun = Instant::now();
        while begun.elapsed() < pause.min(RENEWAL) {
            if done.load(Ordering::Relaxed) {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        pause = match forge.renew(job) {
            Ok(lock) => lock / 2,
            Err(Failure::Refused(_)) => {
                // The job is not this runner's any more.
                cancelled.store(true, Ordering::Relaxed);
                RENEWAL
            }
            Err(_) => Duration::from_secs(1),
        };
    }
}

fn send_log(forge: &Forge, job: &protocol::Job, log: &Log, done: &AtomicBool) {
    loop {
        let over = done.load(Ordering::Relaxed);
        let text = log.unsent();
        if !text.is_empty() {
            let _ = forge.send_log(job, &text);
        }
        if over {
            return;
        }
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(1) && !done.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Tries again what fails because the forge cannot be reached.
fn patiently<T>(options: &Options, mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
    let begun = Instant::now();
    loop {
        match attempt() {
            Err(Failure::Unreachable(_)) if begun.elapsed() < OUTAGE_PATIENCE && !options.ending.load(Ordering::Relaxed) => {
                thread::sleep(Duration::from_secs(1));
            }
            other => return other,
        }
    }
}
