//! Follows a scale set: makes sure that it is there, holds its session, and takes its messages into the view.
//!
//! Source: actions/scaleset, listener/listener.go, for the loop; what its users complain of, for what happens when something breaks.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use reqwest::StatusCode;
use tokio_util::sync::CancellationToken;

use super::super::{ForgeError, RunnerGroup, ScaleSet, Secret};
use super::auth::expiry;
use super::group::{self, group};
use super::http::CallError;
use super::service::Queue;
use super::{Shared, State, wire};

/// Between two tries, at first and at most.
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// Between two tries to get a session that somebody else holds.
const CONFLICT_WAIT: Duration = Duration::from_secs(5);
/// After an answer that says nothing: it came at once, and the next may.
const EMPTY_WAIT: Duration = Duration::from_millis(500);
/// A session is refreshed this long after it was made, where its token does not say when it ends.
const SESSION_LIFE: Duration = Duration::from_secs(30 * 60);
/// For the end of a session, when the process ends.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);
/// A poll is not given up sooner than this to tell of more room.
const ROOM_WAIT: Duration = Duration::from_secs(1);
/// Messages that are known to have been taken in, should they come again.
const SEEN: usize = 64;

/// Runs until `end`, whatever happens.
pub(super) async fn listen(shared: Arc<Shared>, end: CancellationToken) {
    let mut failures: u32 = 0;
    loop {
        let error = tokio::select! {
            error = follow(&shared) => error,
            () = end.cancelled() => break,
        };
        // After an answer it begins to count anew.
        failures = if shared.heard.swap(false, Ordering::Relaxed) { 1 } else { failures + 1 };
        let conflict = error.names("SessionConflict");
        let error = explain(error, &shared.config.scale_set);
        tracing::warn!(scale_set = shared.config.scale_set, %error, failures, "the scale set cannot be followed; it is tried again");
        shared.failed(error, failures);
        let wait = match conflict {
            true => CONFLICT_WAIT,
            false => (FIRST_WAIT * 2_u32.saturating_pow(failures.min(8))).min(LONGEST_WAIT),
        };
        tokio::select! {
            () = tokio::time::sleep(wait.mul_f64(rand::random_range(0.7..1.3))) => {}
            () = end.cancelled() => break,
        }
    }
    close(&shared).await;
}

/// Ends the session: GitHub holds one that nobody ended for a minute and a half, and lets nobody else have one.
pub(super) async fn close(shared: &Shared) {
    let Some(ScaleSet { id, session: Some(session), .. }) = shared.scale_set() else { return };
    shared.note_session(None);
    match tokio::time::timeout(CLOSE_TIMEOUT, shared.service.close_session(id, &session)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::info!(scale_set = shared.config.scale_set, error = %ForgeError::from(error), "the session was not ended")
        }
        Err(_) => tracing::info!(scale_set = shared.config.scale_set, "the session was not ended in time"),
    }
}

fn explain(error: CallError, scale_set: &str) -> ForgeError {
    if error.names("SessionConflict") {
        return ForgeError::Unreachable(format!(
            "somebody else holds the session of scale set {scale_set}: another pool or another controller with a scale set of that name? \
             GitHub lets go of an abandoned one after a minute and a half"
        ));
    }
    error.into()
}

/// Follows the scale set until something goes wrong.
async fn follow(shared: &Arc<Shared>) -> CallError {
    match follow_or_fail(shared).await {
        Err(error) => error,
        Ok(never) => match never {},
    }
}

async fn follow_or_fail(shared: &Arc<Shared>) -> Result<std::convert::Infallible, CallError> {
    let set = scale_set(shared).await?;
    shared.note_set(&set);
    let mut session = open(shared, set.id).await?;
    let mut seen: VecDeque<(u64, u64)> = VecDeque::new();
    let mut looked = Instant::now();
    loop {
        if looked.elapsed() >= shared.config.look {
            looked = Instant::now();
            group::look_again(shared).await?;
        }
        if session.is_due() {
            session.renew(shared, set.id).await?;
        }
        let room = *shared.room.borrow();
        let answer = tokio::select! {
            answer = shared.service.poll(&session.queue, room) => answer,
            // GitHub reads it at the beginning of a poll, which it then holds for long. What it was about to say, it says again.
            () = shared.more_than(room) => continue,
        };
        let message = match answer {
            // The token can end while GitHub holds the poll.
            Err(error) if error.is(StatusCode::UNAUTHORIZED) => {
                session.renew(shared, set.id).await?;
                continue;
            }
            other => other?,
        };
        shared.heard();
        let Some(message) = message else {
            // GitHub holds a poll for long; one that ends at once must not become a storm.
            if session.polled.replace(Instant::now()).is_some_and(|last| last.elapsed() < EMPTY_WAIT) {
                tokio::time::sleep(EMPTY_WAIT).await;
            }
            continue;
        };
        session.polled = None;
        let mark = (message.message_id, digest(&message));
        if !seen.contains(&mark) {
            take(shared, &message);
            seen.push_back(mark);
            if seen.len() > SEEN {
                seen.pop_front();
            }
        }
        // After it was taken in: what is not acknowledged comes again. Another session has the queue where this fails.
        match shared.service.acknowledge(&session.queue, message.message_id).await {
            Err(error) if error.is(StatusCode::UNAUTHORIZED) => session.renew(shared, set.id).await?,
            Err(error) if error.is(StatusCode::NOT_FOUND) => {}
            Err(error) => {
                tracing::info!(error = %ForgeError::from(error), message = message.message_id, "a message was not acknowledged");
                tokio::time::sleep(EMPTY_WAIT).await;
            }
            Ok(()) => {}
        }
    }
}

/// An open session.
struct Open {
    id: String,
    queue: Queue,
    refresh: Instant,
    /// When the last poll without a message ended.
    polled: Option<Instant>,
}

impl Open {
    fn is_due(&self) -> bool {
        Instant::now() >= self.refresh
    }

    /// Has the session go on with a new token. One that GitHub no longer knows ends the pass, and the next opens another.
    async fn renew(&mut self, shared: &Arc<Shared>, set: u64) -> Result<(), CallError> {
        match shared.service.refresh_session(set, &self.id).await {
            Ok(session) => {
                *self = opened(shared, session)?;
                Ok(())
            }
            Err(error) => {
                if matches!(&error, CallError::Refused { status, .. } if status.is_client_error()) {
                    shared.note_session(None);
                }
                Err(error)
            }
        }
    }
}

/// Goes on with the session of an earlier process, or of before something went wrong, where GitHub still has it; else opens one.
async fn open(shared: &Arc<Shared>, set: u64) -> Result<Open, CallError> {
    let kept = shared.scale_set().filter(|known| known.id == set).and_then(|known| known.session);
    if let Some(session) = kept {
        match shared.service.refresh_session(set, &session).await {
            Ok(session) => return opened(shared, session),
            // It is not there any more, or never was.
            Err(CallError::Refused { status, .. }) if status.is_client_error() => shared.note_session(None),
            Err(error) => return Err(error),
        }
    }
    opened(shared, shared.service.open_session(set, &shared.config.owner).await?)
}

fn opened(shared: &Arc<Shared>, session: wire::Session) -> Result<Open, CallError> {
    let what = "a session of the scale set";
    if session.session_id.is_empty() || session.message_queue_url.is_empty() || session.message_queue_access_token.is_empty() {
        return Err(ForgeError::Unexpected(format!("{what}: GitHub leaves out its id, its queue or the queue's token")).into());
    }
    if !session.session_id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') || session.session_id.len() > 64 {
        return Err(ForgeError::Unexpected(format!("{what}: its id is none")).into());
    }
    let url = shared.auth.named(&session.message_queue_url, what)?;
    let left = expiry(&session.message_queue_access_token).map(|at| at.duration_since(Timestamp::now()));
    let left = left.and_then(|left| Duration::try_from(left).ok()).unwrap_or(SESSION_LIFE);
    // Before its end, by more than a poll takes where there is that much.
    let early = Duration::from_secs(120).min(left / 2);
    let queue = Queue { url, token: Secret::new(session.message_queue_access_token) };
    shared.opened(&session.session_id, queue.clone(), session.statistics);
    Ok(Open { id: session.session_id, queue, refresh: Instant::now() + (left - early), polled: None })
}

fn take(shared: &Shared, message: &wire::Message) {
    if message.message_type != wire::JOB_MESSAGES {
        return tracing::info!(
            kind = mayfly_crds::conditions::truncate(&message.message_type, 80),
            "a message of a kind that is not known"
        );
    }
    let body = message.body.as_deref().filter(|body| !body.is_empty()).unwrap_or("[]");
    let entries: Vec<serde_json::Value> = serde_json::from_str(body).unwrap_or_else(|error| {
        tracing::warn!(line = error.line(), column = error.column(), "a message that cannot be read; the numbers beside it are");
        Vec::new()
    });
    // What cannot be read keeps nothing else from being.
    let entries: Vec<wire::JobMessage> = entries.into_iter().filter_map(|entry| serde_json::from_value(entry).ok()).collect();
    shared.take(&entries, message.statistics);
}

fn digest(message: &wire::Message) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    message.body.hash(&mut hasher);
    hasher.finish()
}

/// Finds or makes the scale set, as the pool wants it, in a runner group that is not too open.
async fn scale_set(shared: &Shared) -> Result<wire::ScaleSet, CallError> {
    let (service, config) = (&shared.service, &shared.config);
    let group = group(shared).await?;
    let wanted = wire::WantedScaleSet::new(&config.scale_set, group, &config.labels);
    let mut found = service.find_set(&config.scale_set, group).await?;
    if found.is_none()
        && let Some(known) = shared.scale_set()
    {
        // It may be in another runner group, in which the pool had it before.
        found = service.get_set(known.id).await.ok().filter(|set| set.name.eq_ignore_ascii_case(&config.scale_set));
    }
    let set = match found {
        Some(set) if set.runner_group_id == group && missing(&set, &config.labels).is_none() => set,
        Some(set) => service.update_set(set.id, &wanted).await?,
        None => match service.create_set(&wanted).await {
            // Somebody was faster.
            Err(error) if error.names("RunnerScaleSetExists") => {
                let gone = || ForgeError::NotFound { what: format!("scale set {}", config.scale_set) };
                service.find_set(&config.scale_set, group).await?.ok_or_else(gone)?
            }
            other => {
                let set = other?;
                tracing::info!(scale_set = config.scale_set, id = set.id, "made the scale set");
                set
            }
        },
    };
    match missing(&set, &config.labels) {
        None => Ok(set),
        // GitHub Enterprise Server before 3.21 drops them without a word.
        Some(label) => Err(ForgeError::Unexpected(format!(
            "the scale set does not have the label {label:?} although it was asked for: the server takes none but the scale set's name \
             (GitHub Enterprise Server takes others from 3.21 on)"
        ))
        .into()),
    }
}

fn missing<'a>(set: &wire::ScaleSet, wanted: &'a [String]) -> Option<&'a String> {
    wanted.iter().find(|label| !set.labels.iter().any(|has| has.name.eq_ignore_ascii_case(label)))
}

impl Shared {
    /// What the runner group lets in now.
    pub(super) fn note_group(&self, found: RunnerGroup) {
        let before = self.group.lock().unwrap_or_else(PoisonError::into_inner).replace(found.clone());
        if before.is_some_and(|before| before != found) {
            (self.wake.0)();
        }
    }

    /// Waits until there is more room than `told`, and not only for a moment.
    async fn more_than(&self, told: u32) {
        tokio::time::sleep(ROOM_WAIT).await;
        // The sender lives as long as this does.
        if self.room.subscribe().wait_for(|room| *room > told).await.is_err() {
            std::future::pending().await
        }
    }

    /// Something went wrong so many times in a row.
    fn failed(&self, error: ForgeError, failures: u32) {
        // A first stumble is nobody's news.
        if matches!(error, ForgeError::Unreachable(_)) && failures < 2 && matches!(*self.state.borrow(), State::Open) {
            return;
        }
        self.state.send_replace(State::Failing(error));
        (self.wake.0)();
    }

    /// GitHub answered.
    fn heard(&self) {
        self.heard.store(true, Ordering::Relaxed);
        let again = self.state.send_if_modified(|state| {
            let failing = !matches!(state, State::Open);
            *state = State::Open;
            failing
        });
        if again {
            (self.wake.0)();
        }
    }

    fn opened(&self, session: &str, queue: Queue, statistics: Option<wire::Statistics>) {
        self.note_session(Some(session.to_owned()));
        *self.queue() = Some(queue);
        if let Some(statistics) = statistics {
            self.view().count(statistics);
        }
        self.state.send_replace(State::Open);
        (self.wake.0)();
    }

    fn take(&self, entries: &[wire::JobMessage], statistics: Option<wire::Statistics>) {
        {
            let mut view = self.view();
            view.take(entries);
            if let Some(statistics) = statistics {
                view.count(statistics);
            }
        }
        (self.wake.0)();
    }
}
