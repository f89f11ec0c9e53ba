//! The audit trail: one JSON record a line, each with the hash of the one before, so that a line that is changed, left out or put in shows.
//!
//! A record is written, and for a file is on the disk, before what it tells of leaves the process; where it cannot be written, nothing
//! leaves. Records hold no token and no credential, only digests.

use std::fmt::Write as _;
use std::io;
use std::mem;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use data_encoding::HEXLOWER;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::digest::sha256;

mod read;
mod sink;

pub(crate) use read::{Filter, Format, Shown, follow, show};
pub(crate) use sink::{FileSink, HttpSink, Rotation, Sink, StdoutSink};

/// Version of the records' form.
const VERSION: u32 = 1;
/// What stands before the first record of a chain.
pub(crate) const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// Most events that a sink is given at once.
const AT_ONCE: usize = 256;
/// Most events that wait for a sink that hangs.
const MOST: usize = 10_000;
/// What the line ends with, around the hash: it is taken away to compute the hash.
const HASH: &str = r#","hash":""#;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Action {
    /// A credential is about to leave.
    #[serde(rename = "credential.granted")]
    CredentialGranted,
    /// A credential is about to leave, for a pod that had one of this binding before.
    #[serde(rename = "credential.refreshed")]
    CredentialRefreshed,
    /// A credential was asked for, and refused.
    #[serde(rename = "credential.denied")]
    CredentialDenied,
    /// A credential was ended before its time, or could not be.
    #[serde(rename = "credential.revoked")]
    CredentialRevoked,
    /// A pod was made for a runner, or refused.
    #[serde(rename = "runner.started")]
    RunnerStarted,
    /// A runner's registration is about to leave for its pod.
    #[serde(rename = "runner.registered")]
    RunnerRegistered,
    /// A runner's pod was deleted: its job is over, or it failed.
    #[serde(rename = "runner.completed")]
    RunnerCompleted,
    /// A registration was removed at the forge, or is left to the sweep.
    #[serde(rename = "runner.removed")]
    RunnerRemoved,
    /// A registration that no pod stands behind was removed by the sweep.
    #[serde(rename = "runner.swept")]
    RunnerSwept,
    /// The pool accepts the job that a runner took.
    #[serde(rename = "job.matched")]
    JobMatched,
    /// The pool does not serve a job.
    #[serde(rename = "job.refused")]
    JobRefused,
    /// A pod is not, or not any more, shown to be isolated.
    #[serde(rename = "isolation.breached")]
    IsolationBreached,
    /// A RunnerPool is new.
    #[serde(rename = "pool.created")]
    PoolCreated,
    /// A RunnerPool has another spec.
    #[serde(rename = "pool.changed")]
    PoolChanged,
    /// A RunnerPool is gone, and all that was its.
    #[serde(rename = "pool.deleted")]
    PoolDeleted,
    /// A CredentialBinding is new.
    #[serde(rename = "binding.created")]
    BindingCreated,
    /// A CredentialBinding has another spec.
    #[serde(rename = "binding.changed")]
    BindingChanged,
    /// A CredentialBinding is gone.
    #[serde(rename = "binding.deleted")]
    BindingDeleted,
}

/// The request that caused it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Request {
    /// Its correlation id, which the caller was told.
    pub(crate) id: String,
    /// Where it came from.
    pub(crate) ip_address: Option<String>,
}

/// What is to be recorded. Where there are many, what it is made of has types of its own.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Event<A = Value, T = Value, S = Value, P = Value> {
    pub(crate) action: Action,
    /// Who did it: a pod, or the controller.
    pub(crate) actor: A,
    /// To what: a binding, a pool, a runner, a job.
    pub(crate) target: T,
    /// Within what: namespace and pool.
    pub(crate) scope: S,
    /// What it was about: the job, the token's digest, what was given or why not.
    pub(crate) payload: P,
    /// What helps to read it: the version of the program.
    pub(crate) metadata: Program,
    pub(crate) success: bool,
    pub(crate) request: Request,
}

impl Event {
    /// What this program did of itself, to what is in this namespace and, where it is named, pool.
    pub(crate) fn of_controller(instance: Option<&str>, action: Action, namespace: &str, pool: Option<&str>, target: Value) -> Self {
        Self {
            action,
            actor: json!({"kind": "Controller", "name": instance}),
            target,
            scope: json!({"namespace": namespace, "pool": pool}),
            payload: json!({}),
            metadata: Program::THIS,
            success: true,
            request: Request { id: uuid(), ip_address: None },
        }
    }

    /// With what it was about, and how it went.
    pub(crate) fn about(self, payload: Value, success: bool) -> Self {
        Self { payload, success, ..self }
    }
}

impl<A: Serialize, T: Serialize, S: Serialize, P: Serialize> Event<A, T, S, P> {
    /// To be kept for later, without what it was made from.
    pub(crate) fn owned(&self) -> Event {
        Event {
            action: self.action,
            actor: json!(self.actor),
            target: json!(self.target),
            scope: json!(self.scope),
            payload: json!(self.payload),
            metadata: self.metadata,
            success: self.success,
            request: self.request.clone(),
        }
    }
}

/// What a record's `metadata` says of this program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Program {
    program: &'static str,
}

impl Program {
    /// This one.
    pub(crate) const THIS: Self = Self { program: concat!("mayfly/", env!("CARGO_PKG_VERSION")) };
}

/// Which of two actions the generation of a spec is, by the one that was last recorded; `None` where that is the same.
pub(crate) fn of_spec(before: Option<i64>, generation: i64, created: Action, changed: Action) -> Option<Action> {
    match before {
        None => Some(created),
        Some(before) => (before != generation).then_some(changed),
    }
}

/// Why a record was not written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AuditError {
    /// The sink does not take it.
    #[error("the audit record could not be written: {0}")]
    Sink(Arc<io::Error>),
    /// It cannot be written as JSON.
    #[error("the audit record cannot be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// The sink hangs.
    #[error("too many audit records wait to be written")]
    Behind,
    /// The writer died.
    #[error("the audit writer ended")]
    Ended,
}

struct Chain {
    sink: Box<dyn Sink>,
    previous: String,
}

/// An event as JSON, and who waits for its record.
struct Waiting {
    event: String,
    written: oneshot::Sender<Result<(), AuditError>>,
}

/// The trail. Clones write to the same; with the last one the writer ends.
#[derive(Clone)]
pub(crate) struct Audit(Arc<Writer>);

/// A thread of its own: a disk takes as long as it takes, and what came meanwhile is written at once.
struct Writer {
    queue: Arc<Queue>,
    thread: Option<JoinHandle<()>>,
}

/// What waits for the writer: for those who wait for their records, and for those who gave up since the sink answered last.
#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: Vec<Waiting>,
    /// Nothing more comes.
    ended: bool,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that waits, as soon as there is something; `None` at the end.
    fn take(&self) -> Option<Vec<Waiting>> {
        let idle = |state: &mut State| state.waiting.is_empty() && !state.ended;
        let mut state = self.changed.wait_while(self.state(), idle).unwrap_or_else(PoisonError::into_inner);
        Some(mem::take(&mut state.waiting)).filter(|waiting| !waiting.is_empty())
    }
}

/// Wakes the writer when it goes, also where whoever had it is cancelled.
struct Wake<'a>(&'a Queue);

impl Drop for Wake<'_> {
    fn drop(&mut self) {
        self.0.changed.notify_one();
    }
}

impl Audit {
    /// Goes on where the sink's last record ended.
    pub(crate) fn new(sink: impl Sink + 'static) -> Self {
        let previous = sink.last_hash().unwrap_or_else(|| GENESIS.to_owned());
        let mut chain = Chain { sink: Box::new(sink), previous };
        let queue = Arc::new(Queue::default());
        let queued = queue.clone();
        let thread = thread::spawn(move || {
            while let Some(mut waiting) = queued.take() {
                while !waiting.is_empty() {
                    chain.write(waiting.drain(..waiting.len().min(AT_ONCE)));
                }
            }
        });
        Self(Arc::new(Writer { queue, thread: Some(thread) }))
    }

    /// Writes a record, and tells the log where that fails: for what happens anyway.
    pub(crate) async fn tell<A: Serialize, T: Serialize, S: Serialize, P: Serialize>(&self, event: &Event<A, T, S, P>) {
        let action = event.action;
        if let Err(error) = self.write(event).await {
            tracing::error!(%error, ?action, "what happened is not recorded");
        }
    }

    /// Writes a record. When this returns without an error, the record is where it cannot be lost with the process.
    pub(crate) async fn write<A, T, S, P>(&self, event: &Event<A, T, S, P>) -> Result<(), AuditError>
    where
        Event<A, T, S, P>: Serialize,
    {
        // Here, and not in the writer: there is one, and everybody waits for it.
        let event = serde_json::to_string(event)?;
        let (written, told) = oneshot::channel();
        let queue = &*self.0.queue;
        let first = {
            let mut state = queue.state();
            if state.waiting.len() >= MOST {
                return Err(AuditError::Behind);
            }
            state.waiting.push(Waiting { event, written });
            state.waiting.len() == 1
        };
        if first {
            // Everybody else who is about to write comes first, so that the writer wakes once for all of them.
            let wake = Wake(queue);
            tokio::task::yield_now().await;
            drop(wake);
        }
        told.await.map_err(|_| AuditError::Ended)?
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.queue.state().ended = true;
        drop(Wake(&self.queue));
        if let Some(thread) = self.thread.take() {
            // Whoever waited for a record of a writer that died was told.
            let _ = thread.join();
        }
    }
}

impl Chain {
    /// Writes all of them in one go, and tells each.
    fn write(&mut self, batch: impl ExactSizeIterator<Item = Waiting>) {
        let (mut lines, mut previous) = (String::new(), self.previous.clone());
        let mut taken = Vec::with_capacity(batch.len());
        for Waiting { event, written } in batch {
            let begin = lines.len();
            let (id, at, fields) = (uuid(), Timestamp::now(), &event[1..event.len() - 1]);
            // Into a text, which takes everything.
            let _ = write!(lines, r#"{{"id":"{id}","version":{VERSION},"occurred_at":"{at}",{fields},"previous":"{previous}"}}"#);
            previous = hash_of(&lines[begin..]);
            lines.pop();
            lines.extend([HASH, &previous, "\"}\n"]);
            taken.push(written);
        }
        let kept = self.sink.append(&lines).map_err(Arc::new);
        if kept.is_ok() {
            self.previous = previous;
        }
        for written in taken {
            // Whoever waits may have given up.
            drop(written.send(kept.clone().map_err(AuditError::Sink)));
        }
    }
}

/// A random identifier (RFC 9562, version 4).
pub(crate) fn uuid() -> String {
    let random = rand::random::<u128>() & !(0xf << 76 | 0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let text = format!("{random:032x}");
    format!("{}-{}-{}-{}-{}", &text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..])
}

fn hash_of(body: &str) -> String {
    HEXLOWER.encode(&sha256([body.as_bytes()]))
}

/// The hash of a line, if it is that of the line's content.
fn own_hash(line: &str) -> Option<&str> {
    let (content, end) = line.rsplit_once(HASH)?;
    let hash = end.strip_suffix("\"}")?;
    (hash_of(&format!("{content}}}")) == hash).then_some(hash)
}

/// A chain that is checked, line after line.
pub(crate) struct Verification {
    /// The hash that the next line has to name; any where it is not known.
    previous: Option<String>,
    /// Records so far.
    pub(crate) count: usize,
}

impl Verification {
    /// Of a chain from its beginning, or from wherever its first line is.
    pub(crate) fn new(from_the_beginning: bool) -> Self {
        Self { previous: from_the_beginning.then(|| GENESIS.to_owned()), count: 0 }
    }

    /// Checks the lines of a file: the number of the first (from 1) that is not what was written, or not where it was written.
    pub(crate) fn file(&mut self, path: &Path) -> io::Result<Result<(), usize>> {
        for (n, line) in std::fs::read_to_string(path)?.lines().enumerate() {
            let record: Value = serde_json::from_str(line).unwrap_or_default();
            let follows = self.previous.as_ref().is_none_or(|previous| record["previous"] == previous.as_str());
            match own_hash(line) {
                Some(hash) if follows => self.previous = Some(hash.to_owned()),
                _ => return Ok(Err(n + 1)),
            }
            self.count += 1;
        }
        Ok(Ok(()))
    }
}

#[cfg(test)]
pub(crate) mod tests;
