//! What a CI forge is to Mayfly: jobs that wait or run, and runners that can be registered and removed.
//!
//! This room knows no Kubernetes. The contract every forge keeps is written at the methods of [`Forge`].

mod address;
mod client;
pub(crate) mod gitea;
pub(crate) mod github;
pub(crate) mod secret;
pub(crate) mod webhook;

use std::collections::BTreeMap;
use std::fmt;

use async_trait::async_trait;
use serde::Serialize;

pub(crate) use address::{Refuse, refused};
pub(crate) use client::{body, causes, http_client};
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

    /// The jobs a runner may take that is registered for `job`: as few as the forge lets a registration say.
    fn reach(&self, job: &Job) -> Reach;

    /// Registers a runner for exactly one job, one of `reach`, and returns what its program needs.
    /// Not idempotent: after an error, the name is burnt and [`Forge::runners`] tells whether something was left behind.
    async fn register(&self, reach: &Reach, name: &str) -> Result<Registration, ForgeError>;

    /// Every runner of the scope that Mayfly may have registered, for the sweep.
    async fn runners(&self) -> Result<Vec<RegisteredRunner>, ForgeError>;

    /// Keeps a registered runner from taking a job from now on. A job it has taken goes on ([`Removal::Busy`] where the forge says so).
    /// Where runners cannot be paused they are removed, which a forge refuses where one has a job.
    async fn pause(&self, runner: &RunnerKey) -> Result<Removal, ForgeError> {
        self.deregister(runner).await
    }

    /// Says in the runner's name that the job it had is lost, so that the job ends now and not when the forge grows suspicious. A job
    /// that is over already is a success ([`Removal::Gone`]), and so is one that the forge alone can end, when its runner has not been
    /// heard of for long enough.
    async fn give_up(&self, _job: &Job, _credential: &Secret) -> Result<Removal, ForgeError> {
        Ok(Removal::Gone)
    }

    /// Removes a registration. A runner that is not there is a success ([`Removal::Gone`]); one that has a job may be kept
    /// ([`Removal::Busy`]).
    async fn deregister(&self, runner: &RunnerKey) -> Result<Removal, ForgeError>;

    /// How many jobs wait of which the forge tells nothing but their number.
    fn unnamed(&self) -> u32 {
        0
    }

    /// Jobs of which there was news since this was last asked, to be looked up with [`Forge::job`].
    fn news(&self) -> Vec<JobKey> {
        Vec::new()
    }

    /// Tells the forge which waiting jobs will be served, where it wants to know before it gives them out.
    async fn claim(&self, _jobs: &[JobKey]) -> Result<(), ForgeError> {
        Ok(())
    }

    /// Notes how many jobs can be served at the same time, for forges that give out no more than that.
    fn note_room(&self, _jobs: u32) {}

    /// A runner of an earlier process has this job, as the cluster remembers: for forges that do not list jobs.
    fn remember(&self, _job: Job) {}

    /// What the OIDC token of a running job says, by claim, as far as the forge tells: with it a credential is bound to the pod that runs
    /// the job. Empty on forges that give their jobs no such tokens.
    async fn claims(&self, _job: &Job) -> Result<BTreeMap<String, String>, ForgeError> {
        Ok(BTreeMap::new())
    }

    /// What a later process has to know to go on where this one ends.
    fn scale_set(&self) -> Option<ScaleSet> {
        None
    }

    /// The group that says whose jobs the pool's runners may get, where the forge has such groups and the pool is in one.
    fn runner_group(&self) -> Option<RunnerGroup> {
        None
    }

    /// Removes what the forge keeps for the pool besides its runners: the pool is being deleted.
    async fn retire(&self) -> Result<(), ForgeError> {
        Ok(())
    }
}

/// Which jobs a runner may take.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Reach {
    /// Those of this repository; without one, all that the forge gives to the pool.
    pub(crate) repository: Option<Repository>,
    /// Those whose `runs-on` is among these labels; of no meaning without a repository.
    pub(crate) labels: Vec<String>,
}

/// A scale set at GitHub and the session in which its messages come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ScaleSet {
    /// GitHub's number of it.
    pub(crate) id: u64,
    /// Its name.
    pub(crate) name: String,
    /// The open session, which is worth nothing without the pool's credential.
    pub(crate) session: Option<String>,
}

/// A runner group at GitHub: whose jobs its runners may get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunnerGroup {
    /// Its name.
    pub(crate) name: String,
    /// Repositories whose jobs are let in.
    pub(crate) members: Members,
    /// Workflows whose jobs alone are let in, as `owner/name/.github/workflows/file@ref`; `None`: all.
    pub(crate) workflows: Option<Vec<String>>,
}

/// Which repositories may use a runner group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Members {
    /// All of this organization, or all private ones of it; without a name, of every organization of the enterprise.
    All(Option<String>),
    /// These organizations, all of each.
    Organizations(Vec<String>),
    /// These.
    Repositories(Vec<Repository>),
    /// Some, and GitHub does not say which.
    Unknown,
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
    pub(crate) id: JobId,
}

/// A forge's id of a job, checked: letters, digits and `-`, at most 64 of them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub(crate) struct JobId(String);

impl JobId {
    /// Checks and takes an id. `None` for anything that is not one.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let fits = (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        fits.then(|| Self(text.to_owned()))
    }
}

impl From<u64> for JobId {
    fn from(number: u64) -> Self {
        Self(number.to_string())
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
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
    /// Whether everybody may see its repository, where the forge says so with it.
    pub(crate) public: Option<bool>,
}

/// How to name a registered runner to the forge.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub(crate) struct RunnerKey {
    /// Repository it is registered for; without one, the pool's scope.
    pub(crate) repository: Option<Repository>,
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
    /// It has a job and was left alone.
    Busy,
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
    /// The forge would let others use the pool's runners than the pool says.
    #[error("{0}")]
    TooOpen(String),
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
            Self::TooOpen(_) => "too_open",
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
