//! GitHub's runner scale sets: github.com, GHE.com and GitHub Enterprise Server.
//!
//! Jobs are not listed: they come as messages of a session that [`listener`] holds, beside the numbers of the scale set, and [`view`]
//! makes jobs of both. A runner is registered for the scale set; GitHub chooses which of its jobs the runner gets.
//!
//! [`just_in_time`] is the other way: no scale set, jobs by webhooks and REST, runners for one repository or runner group.

mod auth;
mod board;
mod config_url;
mod group;
mod http;
mod just_in_time;
mod listener;
mod service;
mod view;
mod wire;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use reqwest::StatusCode;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::address::Refuse;
use super::{
    Forge, ForgeError, Job, JobKey, JobState, Reach, RegisteredRunner, Registration, Removal, Repository, Run, RunnerGroup, RunnerKey,
    ScaleSet, Secret,
};
use auth::Auth;
pub(crate) use auth::Credential;
pub(crate) use board::Pace;
pub(crate) use config_url::ConfigUrl;
use http::Caller;
pub(crate) use just_in_time::{JitConfig, JustInTime};
use service::{Queue, Service};
use view::View;

/// [`Config::poll`] of every pool.
pub(crate) const POLL: Duration = Duration::from_secs(70);
/// [`Config::look`] of every pool.
pub(crate) const LOOK: Duration = Duration::from_secs(600);
/// How long whoever asks for jobs waits for the first session.
const FIRST_SESSION: Duration = Duration::from_secs(15);

/// What a pool says of its scale set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    /// Whose jobs.
    pub(crate) url: ConfigUrl,
    /// Name of the scale set.
    pub(crate) scale_set: String,
    /// Its labels, the name among them.
    pub(crate) labels: Vec<String>,
    /// In which runner group.
    pub(crate) group: Group,
    /// Who holds the session, for people who look at GitHub's messages.
    pub(crate) owner: String,
    /// After which time a poll is dead: more than the fifty seconds or so that GitHub holds one.
    pub(crate) poll: Duration,
    /// How often is looked whether the runner group is still as the pool wants it.
    pub(crate) look: Duration,
}

/// Which runner group, and how open it may be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Group {
    /// Its name; the default group without one.
    pub(crate) name: Option<String>,
    /// Every repository may use it.
    pub(crate) allow_default_group: bool,
    /// Public repositories may use it.
    pub(crate) allow_public_repositories: bool,
    /// It has to be one that only selected repositories (of an enterprise: organizations) may use.
    pub(crate) require_selected_repositories: bool,
    /// It has to be one that only selected workflows may use.
    pub(crate) require_selected_workflows: bool,
}

/// One scale set of GitHub's.
#[derive(Debug)]
pub(crate) struct GitHub {
    shared: Arc<Shared>,
    end: CancellationToken,
    _end: DropGuard,
}

#[derive(Debug)]
struct Shared {
    config: Config,
    auth: Arc<Auth>,
    service: Service,
    view: Mutex<View>,
    queue: Mutex<Option<Queue>>,
    set: Mutex<Option<ScaleSet>>,
    group: Mutex<Option<RunnerGroup>>,
    state: watch::Sender<State>,
    room: watch::Sender<u32>,
    /// Whether a poll was answered since something went wrong.
    heard: AtomicBool,
    wake: Wake,
}

/// How the listener fares.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Opening,
    Open,
    Failing(ForgeError),
}

/// Called where something changed.
struct Wake(Box<dyn Fn() + Send + Sync>);

impl fmt::Debug for Wake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wake")
    }
}

impl GitHub {
    /// A scale set, and what has to run for it to be followed, which ends with it. `earlier` is what [`Forge::scale_set`] said last;
    /// `room` is how many jobs can be served at the same time; `wake` is called where something changed.
    pub(crate) fn new(
        http: reqwest::Client,
        config: Config,
        credential: Credential,
        refuse: Refuse,
        earlier: Option<ScaleSet>,
        room: u32,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let caller = Arc::new(Caller::default());
        let auth = Arc::new(Auth::new(http.clone(), caller.clone(), config.url.clone(), credential, refuse));
        let shared = Arc::new(Shared {
            service: Service::new(http, caller, auth.clone(), config.url.clone(), config.poll),
            set: Mutex::new(earlier.filter(|set| set.name == config.scale_set)),
            config,
            auth,
            view: Mutex::default(),
            queue: Mutex::default(),
            group: Mutex::default(),
            state: watch::Sender::new(State::Opening),
            room: watch::Sender::new(room),
            heard: AtomicBool::default(),
            wake: Wake(Box::new(wake)),
        });
        let end = CancellationToken::new();
        let listening = listener::listen(shared.clone(), end.clone());
        (Self { shared, _end: end.clone().drop_guard(), end }, listening)
    }

    /// Goes on with a rotated key or token.
    pub(crate) fn renew(&self, credential: Credential) {
        self.shared.auth.renew(credential);
    }

    fn set(&self) -> Result<u64, ForgeError> {
        let missing = || ForgeError::Unreachable("the scale set is not known yet".to_owned());
        self.shared.scale_set().map(|set| set.id).ok_or_else(missing)
    }

    /// Whether the view is worth anything now.
    async fn open(&self) -> Result<(), ForgeError> {
        let mut state = self.shared.state.subscribe();
        let known = state.wait_for(|state| !matches!(state, State::Opening));
        match tokio::time::timeout(FIRST_SESSION, known).await {
            Ok(Ok(state)) => match &*state {
                State::Failing(error) => Err(error.clone()),
                _ => Ok(()),
            },
            _ => Err(ForgeError::Unreachable("GitHub has not given a session yet".to_owned())),
        }
    }
}

impl Shared {
    fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue(&self) -> MutexGuard<'_, Option<Queue>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn scale_set(&self) -> Option<ScaleSet> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note_set(&self, found: &wire::ScaleSet) {
        let mut set = self.set.lock().unwrap_or_else(PoisonError::into_inner);
        let session = set.take().filter(|known| known.id == found.id).and_then(|known| known.session);
        *set = Some(ScaleSet { id: found.id, name: self.config.scale_set.clone(), session });
    }

    fn note_session(&self, session: Option<String>) {
        if let Some(set) = self.set.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            set.session = session;
        }
    }
}

#[async_trait]
impl Forge for GitHub {
    async fn jobs(&self, state: JobState) -> Result<Vec<Job>, ForgeError> {
        self.open().await?;
        Ok(self.shared.view().jobs(state))
    }

    async fn job(&self, job: &JobKey) -> Result<Option<Job>, ForgeError> {
        Ok(self.shared.view().job(job))
    }

    async fn run(&self, repository: &Repository, run: u64) -> Result<Run, ForgeError> {
        let told = self.shared.view().run(repository, run);
        if let Some(told) = told.as_ref().filter(|run| run.fork.is_some()) {
            return Ok(told.clone());
        }
        // Whose code a pull request's run is about is not in the messages.
        let found = self.shared.service.run(repository, run).await?.facts();
        Ok(told.map_or_else(|| found.clone(), |told| Run { fork: found.fork, ..told }))
    }

    fn reach(&self, _job: &Job) -> Reach {
        Reach::default()
    }

    async fn register(&self, _reach: &Reach, name: &str) -> Result<Registration, ForgeError> {
        let set = self.set()?;
        let config = self.shared.service.jit_config(set, name).await?;
        if config.runner.runner_scale_set_id != set || config.encoded.is_empty() {
            return Err(ForgeError::Unexpected("GitHub registered a runner that is not the scale set's".to_owned()));
        }
        Ok(Registration {
            key: RunnerKey { repository: None, id: config.runner.id },
            hand_over: Secret::new(config.encoded),
            credential: Secret::new(""),
        })
    }

    async fn runners(&self) -> Result<Vec<RegisteredRunner>, ForgeError> {
        let set = self.set()?;
        let runners = self.shared.service.runners().await?;
        let own = runners.into_iter().filter(|runner| runner.runner_scale_set_id == set);
        Ok(own.map(|runner| RegisteredRunner { key: RunnerKey { repository: None, id: runner.id }, name: runner.name }).collect())
    }

    async fn deregister(&self, runner: &RunnerKey) -> Result<Removal, ForgeError> {
        match self.shared.service.remove_runner(runner.id).await {
            Ok(()) => Ok(Removal::Done),
            Err(error) if error.names("JobStillRunning") => Ok(Removal::Busy),
            Err(error) if error.is(StatusCode::NOT_FOUND) => Ok(Removal::Gone),
            Err(error) => Err(error.into()),
        }
    }

    fn unnamed(&self) -> u32 {
        self.shared.view().unnamed()
    }

    fn news(&self) -> Vec<JobKey> {
        self.shared.view().news()
    }

    async fn claim(&self, jobs: &[JobKey]) -> Result<(), ForgeError> {
        let offers = self.shared.view().offers(jobs);
        let queue = self.shared.queue().clone();
        let (false, Some(queue)) = (offers.is_empty(), queue) else { return Ok(()) };
        match self.shared.service.acquire(self.set()?, &queue, &offers).await {
            Ok(won) => self.shared.view().claimed(&won),
            // github.com gives jobs out without being asked.
            Err(error) if error.is(StatusCode::NOT_FOUND) => self.shared.view().claimed(&offers),
            // The session's token ended; the listener gets a new one.
            Err(error) if error.is(StatusCode::UNAUTHORIZED) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    async fn claims(&self, job: &Job) -> Result<BTreeMap<String, String>, ForgeError> {
        let (service, repository) = (&self.shared.service, &job.key.repository);
        let missing = |what: &str| ForgeError::NotFound { what: format!("{what} of {}", job.key) };
        let (run, jobs) = futures::try_join!(service.run(repository, job.run), service.run_jobs(repository, job.run))?;
        // Neither the message nor the token has the other's name of the job: the runner that has it joins them.
        let mut with_runner = jobs.iter().filter(|listed| listed.runner_name.is_some() && listed.runner_name == job.runner);
        let (Some(listed), None) = (with_runner.next(), with_runner.next()) else { return Err(missing("the one job with the runner")) };
        let reference = self.shared.view().reference(&job.key);
        let claims = [
            ("repository", Some(repository.to_string())),
            ("repository_id", Some(run.repository_id().ok_or_else(|| missing("the repository's number"))?.to_string())),
            ("run_id", Some(job.run.to_string())),
            ("run_attempt", (run.run_attempt > 0).then(|| run.run_attempt.to_string())),
            ("event_name", Some(run.event).filter(|event| !event.is_empty())),
            ("job_workflow_ref", reference),
            ("check_run_id", Some(listed.id.to_string())),
        ];
        Ok(claims.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect())
    }

    fn note_room(&self, jobs: u32) {
        self.shared.room.send_if_modified(|room| std::mem::replace(room, jobs) != jobs);
    }

    fn remember(&self, job: Job) {
        self.shared.view().remember(job);
    }

    fn scale_set(&self) -> Option<ScaleSet> {
        self.shared.scale_set()
    }

    fn runner_group(&self) -> Option<RunnerGroup> {
        self.shared.group.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn retire(&self) -> Result<(), ForgeError> {
        self.end.cancel();
        listener::close(&self.shared).await;
        let Some(set) = self.shared.scale_set() else { return Ok(()) };
        match self.shared.service.delete_set(set.id).await {
            Err(error) if !error.is(StatusCode::NOT_FOUND) => Err(error.into()),
            _ => Ok(()),
        }
    }
}
