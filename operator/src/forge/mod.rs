//! What a CI forge is to Mayfly: jobs that wait or run, and runners that can be registered and removed.
//!
//! This room knows no Kubernetes. The contract every forge keeps is written at the methods of [`Forge`].

mod address;
pub(crate) mod gitea;
pub(crate) mod secret;

use std::fmt;

use async_trait::async_trait;
use serde::Serialize;

pub(crate) use secret::Secret;

/// A CI forge, narrowed to one scope (an organization, a repository, a whole server) and one credential.
///
/// Every method has a deadline of its own and may be cancelled at any `await`. None retries by itself: callers are
/// level-triggered and ask again.
#[async_trait]
pub(crate) trait Forge: Send + Sync + fmt::Debug {
    /// Jobs of the scope in this state, oldest first. What the forge lists and Mayfly cannot read (an impossible repository
    /// name, say) is left out.
    async fn jobs(&self, state: JobState) -> Result<Vec<Job>, ForgeError>;

    /// One job as it is now; `None` where the forge no longer has it.
    async fn job(&self, job: &JobKey) -> Result<Option<Job>, ForgeError>;

    /// What the workflow run of a job is about.
    async fn run(&self, repository: &Repository, run: u64) -> Result<Run, ForgeError>;

    /// Registers a runner for exactly one job at the narrowest scope the forge has, and returns what its program needs.
    /// Not idempotent: after an error, the name is burnt and [`Forge::runners`] tells whether something was left behind.
    async fn register(&self, repository: &Repository, name: &str, labels: &[String]) -> Result<Registration, ForgeError>;

    /// Runners registered for this repository itself (not those it inherits).
    async fn runners(&self, repository: &Repository) -> Result<Vec<RegisteredRunner>, ForgeError>;

    /// Every repository of the scope, for the sweep after a start.
    async fn repositories(&self) -> Result<Vec<Repository>, ForgeError>;

    /// Keeps a registered runner from taking a job from now on. A job it has taken goes on.
    async fn pause(&self, runner: &RunnerKey) -> Result<Removal, ForgeError>;

    /// Says in the runner's name that the job it had is lost, so that the job ends now and not when the forge grows suspicious. A job
    /// that is over already is a success ([`Removal::Gone`]).
    async fn give_up(&self, job: &Job, credential: &Secret) -> Result<Removal, ForgeError>;

    /// Removes a registration. A runner that is not there is a success ([`Removal::Gone`]).
    async fn deregister(&self, runner: &RunnerKey) -> Result<Removal, ForgeError>;
}

/// `owner/name` of a repository, checked: letters, digits, `.`, `_`, `-` only, so that it is safe in paths and in messages.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub(crate) struct Repository(String);

impl Repository {
    /// Checks and takes `owner/name`. `None` for anything that is not one.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (owner, name) = text.split_once('/')?;
        let fits = |part: &str| {
            !part.is_empty()
                && part.len() <= 100
                && part != "."
                && part != ".."
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        };
        (fits(owner) && fits(name)).then(|| Self(text.to_owned()))
    }

    /// `owner/name`.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// The owner alone.
    pub(crate) fn owner(&self) -> &str {
        self.0.split_once('/').map_or(self.0.as_str(), |(owner, _)| owner)
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// State of a job, as far as runners are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum JobState {
    /// Waits for a runner.
    Queued,
    /// A runner has it.
    InProgress,
    /// Over, one way or another.
    Completed,
    /// Waits for something other than a runner (another job, an approval).
    Blocked,
}

/// Which job: ids are unique in a repository only as far as Mayfly relies on it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub(crate) struct JobKey {
    /// Repository the job belongs to.
    pub(crate) repository: Repository,
    /// The forge's id of the job.
    pub(crate) id: u64,
}

impl fmt::Display for JobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.repository, self.id)
    }
}

/// A job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Job {
    /// Which job.
    pub(crate) key: JobKey,
    /// The workflow run it belongs to.
    pub(crate) run: u64,
    /// State at the time of asking.
    pub(crate) state: JobState,
    /// `runs-on`.
    pub(crate) labels: Vec<String>,
    /// Name of the runner that has it; the forge may forget the name when the runner is gone.
    pub(crate) runner: Option<String>,
    /// The forge's id of the runner that has or had it.
    pub(crate) runner_id: Option<u64>,
}

/// What a workflow run is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Run {
    /// Event that started it, for example `push`.
    pub(crate) event: String,
    /// File name of the workflow, for example `ci.yml`.
    pub(crate) workflow: String,
    /// Git ref it runs for.
    pub(crate) git_ref: String,
    /// Whether code from a fork runs. `None` where the forge does not say: to be treated as a fork.
    pub(crate) fork: Option<bool>,
}

/// How to name a registered runner to the forge.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub(crate) struct RunnerKey {
    /// Repository it is registered for.
    pub(crate) repository: Repository,
    /// The forge's id of the runner.
    pub(crate) id: u64,
}

/// A runner as the forge lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct RegisteredRunner {
    /// How to name it to the forge.
    pub(crate) key: RunnerKey,
    /// Its name, chosen at registration.
    pub(crate) name: String,
}

/// A fresh registration.
#[derive(Debug)]
pub(crate) struct Registration {
    /// How to name the runner to the forge.
    pub(crate) key: RunnerKey,
    /// What the runner program reads at its start. Worth one job; held in memory and handed over once.
    pub(crate) hand_over: Secret,
    /// With which [`Forge::give_up`] speaks in the runner's name.
    pub(crate) credential: Secret,
}

/// Outcome of a removal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Removal {
    /// Done now.
    Done,
    /// It was not there.
    Gone,
}

/// Why the forge could not do what it was asked. Texts never hold a credential.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub(crate) enum ForgeError {
    /// No connection, no answer in time, a broken answer, or the forge is in trouble (5xx, 429).
    #[error("the forge cannot be reached: {0}")]
    Unreachable(String),
    /// 401 or 403: the token is wrong or lacks a permission.
    #[error("the forge refuses the token for {what}: it is wrong, expired or lacks a permission")]
    Unauthorized {
        /// The call that was refused.
        what: String,
    },
    /// 404: the scope does not exist, or the token may not see it.
    #[error("the forge has no {what}, or the token may not see it")]
    NotFound {
        /// What was asked for.
        what: String,
    },
    /// Anything else.
    #[error("the forge answered unexpectedly: {0}")]
    Unexpected(String),
}

impl ForgeError {
    /// A word for metrics and events.
    pub(crate) fn category(&self) -> &'static str {
        match self {
            Self::Unreachable(_) => "unreachable",
            Self::Unauthorized { .. } => "unauthorized",
            Self::NotFound { .. } => "not_found",
            Self::Unexpected(_) => "unexpected",
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_repository_is_safe_wherever_it_is_written(text in ".{0,120}") {
            if let Some(repository) = Repository::parse(&text) {
                prop_assert!(repository.as_str().bytes().all(|b| b.is_ascii_alphanumeric() || b"._-/".contains(&b)));
                prop_assert_eq!(repository.as_str().matches('/').count(), 1);
            }
        }
    }

    #[test]
    fn repositories_are_checked() {
        assert!(Repository::parse("acme/web.app_1-2").is_some());
        for bad in ["", "acme", "acme/", "/web", "a/b/c", "../x", "acme/..", "ac me/web", "acme/we\nb", "acme/'web'"] {
            assert!(Repository::parse(bad).is_none(), "{bad:?}");
        }
    }
}
