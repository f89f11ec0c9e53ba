//! Runners of GitHub's without a scale set, each registered for one job by REST.
//!
//! GitHub lists the queue of a repository and of nothing larger. So webhooks say which jobs there are, REST says what they are, and the
//! queues of repositories that are known by name are read as well, for what no webhook told. What is known is kept by [`super::board`].
//!
//! Source: docs.github.com, REST, "Self-hosted runners", "Workflow jobs" and "Workflow runs".

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use futures::{StreamExt, stream};
use mayfly_crds::names::RunnerName;
use reqwest::StatusCode;

use super::super::address::Refuse;
use super::super::{
    Forge, ForgeError, Job, JobKey, JobState, Reach, RegisteredRunner, Registration, Removal, Repository, Run, RunnerGroup, RunnerKey,
    Secret,
};
use super::auth::{Auth, Credential};
use super::board::{Board, Budget, Pace};
use super::config_url::ConfigUrl;
use super::group::{self, DEFAULT_GROUP};
use super::http::{CallError, Caller};
use super::service::Service;
use super::{Group, POLL, wire};

/// Jobs looked up at the same time.
const CONCURRENCY: usize = 8;
/// Most jobs looked up in one go.
const LOOKS: usize = 64;
/// Most runs of a repository whose jobs are read in one go, the oldest first.
const RUNS: usize = 50;

/// What a pool says of its runners.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct JitConfig {
    /// Whose jobs.
    pub(crate) url: ConfigUrl,
    /// Labels of the pool: a job that names another is not looked at.
    pub(crate) labels: Vec<String>,
    /// In which runner group, where one is named: then runners are registered at the pool's level. Else at their job's repository.
    pub(crate) group: Group,
    /// UID of the pool, which is in its runners' names.
    pub(crate) pool: String,
    /// Repositories whose queues are read.
    pub(crate) repositories: Vec<Repository>,
    /// How often.
    pub(crate) pace: Pace,
}

/// One pool's runners.
#[derive(Debug)]
pub(crate) struct JustInTime {
    config: JitConfig,
    auth: Arc<Auth>,
    caller: Arc<Caller>,
    service: Service,
    board: Mutex<Board>,
    looking: tokio::sync::Mutex<Looking>,
    group: Mutex<Option<(u64, RunnerGroup)>>,
}

#[derive(Debug)]
struct Looking {
    budget: Budget,
    /// When the runner group was looked at.
    group: Option<Instant>,
}

impl JustInTime {
    /// Makes no call.
    pub(crate) fn new(http: reqwest::Client, config: JitConfig, credential: Credential, refuse: Refuse) -> Self {
        let caller = Arc::new(Caller::default());
        let auth = Arc::new(Auth::new(http.clone(), caller.clone(), config.url.clone(), credential, refuse));
        let service = Service::new(http, caller.clone(), auth.clone(), config.url.clone(), POLL);
        let looking = tokio::sync::Mutex::new(Looking { budget: Budget::new(Instant::now()), group: None });
        Self { config, auth, caller, service, board: Mutex::default(), looking, group: Mutex::default() }
    }

    /// Goes on with a rotated key or token.
    pub(crate) fn renew(&self, credential: Credential) {
        self.auth.renew(credential);
    }

    /// A webhook spoke of this job, with these labels where it named any. It is looked up before anything is done for it.
    pub(crate) fn hint(&self, job: JobKey, labels: Option<&[String]>) {
        if self.config.url.covers(&job.repository) && labels.is_none_or(|labels| self.fits(labels)) {
            self.board().hint(job);
        }
    }

    /// Jobs that are known and not over.
    pub(crate) fn known(&self) -> Vec<JobKey> {
        self.board().open()
    }

    /// A runner of an earlier process may be registered at this repository.
    pub(crate) fn note_place(&self, repository: &Repository) {
        self.board().place(repository);
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fits(&self, labels: &[String]) -> bool {
        !labels.is_empty() && labels.iter().all(|label| self.config.labels.contains(label))
    }

    /// The number of the group in which runners are registered at the pool's level; `None` where they are registered at repositories.
    fn group_number(&self) -> Option<u64> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|(number, _)| *number)
    }

    /// Looks at what there is to be looked at: the group, queues, and jobs.
    async fn look(&self) -> Result<(), ForgeError> {
        let mut looking = self.looking.lock().await;
        if looking.group.is_none_or(|at| at.elapsed() >= self.config.pace.group) {
            self.look_at_group().await?;
            looking.group = Some(Instant::now());
        }
        let mut pace = self.config.pace;
        if self.caller.is_scarce() {
            // What is left of the hour's calls is for jobs.
            pace.queue = pace.queue.saturating_mul(10);
        }
        let queues = self.board().to_scan(&self.config.repositories, Instant::now(), &pace);
        for repository in queues {
            if looking.budget.take(2, Instant::now()) < 2 {
                break;
            }
            match self.read_queue(&repository, &mut looking.budget).await {
                Ok(()) => {}
                // The pool is about this repository alone; of many, one may be misspelled or not the App's.
                Err(error) if self.config.url.is_repository() || !is_about_one(&error) => return Err(error.into()),
                Err(error) => {
                    tracing::info!(%repository, error = %ForgeError::from(error), "the queue of a repository cannot be read");
                }
            }
            self.board().scanned(&repository, Instant::now());
        }
        let due = {
            let now = Instant::now();
            let may = looking.budget.take(LOOKS, now);
            let due = self.board().due(now, &self.config.pace, may);
            looking.budget.give_back(may - due.len());
            due
        };
        let looks = due.into_iter().map(|key| async move { (self.look_up(&key).await, key) });
        let mut failed = None;
        let mut looks = stream::iter(looks).buffer_unordered(CONCURRENCY);
        while let Some((found, key)) = looks.next().await {
            if let Err(error) = found {
                self.board().hint(key);
                failed = Some(error);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    async fn look_at_group(&self) -> Result<(), ForgeError> {
        let at_level = self.config.group.name.is_some() || self.config.group.allow_default_group || self.config.url.is_repository();
        if !at_level {
            return Ok(());
        }
        let found = group::find(&self.service, &self.config.url, &self.config.group).await?;
        // Without its name it is where runners go that a repository does not take.
        let named = found.filter(|_| self.config.group.name.is_some());
        *self.group.lock().unwrap_or_else(PoisonError::into_inner) = named.map(|(rules, group)| (rules.id, group));
        Ok(())
    }

    async fn read_queue(&self, repository: &Repository, budget: &mut Budget) -> Result<(), CallError> {
        // A run that has begun may have jobs that wait.
        let mut runs = self.service.runs(repository, "queued").await?;
        runs.extend(self.service.runs(repository, "in_progress").await?);
        runs.sort_unstable();
        runs.dedup();
        let may = budget.take(runs.len().min(RUNS), Instant::now());
        for run in runs.into_iter().take(may) {
            let mut jobs = self.service.run_jobs(repository, run).await?;
            jobs.sort_by_key(|job| job.id);
            for job in jobs {
                self.take(repository, &job);
            }
        }
        Ok(())
    }

    /// Looks a job up. An error is one that says nothing about the job.
    async fn look_up(&self, key: &JobKey) -> Result<(), ForgeError> {
        match self.service.job(&key.repository, &key.id).await {
            Ok(job) => {
                self.take(&key.repository, &job);
                Ok(())
            }
            Err(error) if error.is(StatusCode::NOT_FOUND) || (is_about_one(&error) && !self.config.url.is_repository()) => {
                // Nobody else tells why it is not served.
                tracing::warn!(job = %key, "GitHub does not show a job: it is gone, or the credential may not read its repository's Actions");
                self.board().gone(key);
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn take(&self, repository: &Repository, found: &wire::RunJob) {
        let Some(job) = found.job(repository) else { return };
        match self.fits(&job.labels) {
            true => self.board().take(job, Instant::now()),
            false => self.board().gone(&job.key),
        }
    }

    /// Where a runner is named in REST: at its repository, or at the pool's level.
    fn path(&self, place: Option<&Repository>) -> String {
        place.map_or_else(|| self.config.url.runners_path(), |repository| format!("/repos/{repository}/actions"))
    }

    async fn register_at(&self, place: Option<&Repository>, group: u64, reach: &Reach, name: &str) -> Result<Registration, CallError> {
        let made = self.service.rest_jit_config(&self.path(place), name, group, &reach.labels).await?;
        if made.runner.id == 0 || made.encoded.is_empty() {
            return Err(ForgeError::Unexpected("GitHub registered a runner and does not say which".to_owned()).into());
        }
        let key = RunnerKey { repository: place.cloned(), id: made.runner.id };
        Ok(Registration { key, hand_over: Secret::new(made.encoded), credential: Secret::new("") })
    }
}

/// Whether an error is about one repository or job, and not about GitHub or the credential.
fn is_about_one(error: &CallError) -> bool {
    [StatusCode::FORBIDDEN, StatusCode::NOT_FOUND].iter().any(|status| error.is(*status))
}

#[async_trait]
impl Forge for JustInTime {
    async fn jobs(&self, state: JobState) -> Result<Vec<Job>, ForgeError> {
        self.look().await?;
        Ok(self.board().jobs(state))
    }

    async fn job(&self, job: &JobKey) -> Result<Option<Job>, ForgeError> {
        if let Some(known) = self.board().job(job, Instant::now()) {
            return Ok(Some(known));
        }
        match self.service.job(&job.repository, &job.id).await {
            Ok(found) => {
                self.take(&job.repository, &found);
                Ok(found.job(&job.repository))
            }
            Err(error) if error.is(StatusCode::NOT_FOUND) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn run(&self, repository: &Repository, run: u64) -> Result<Run, ForgeError> {
        Ok(self.service.run(repository, run).await?.facts())
    }

    fn reach(&self, job: &Job) -> Reach {
        Reach { repository: Some(job.key.repository.clone()), labels: job.labels.clone() }
    }

    async fn register(&self, reach: &Reach, name: &str) -> Result<Registration, ForgeError> {
        let no_place = || ForgeError::Unexpected("a runner without a repository to serve".to_owned());
        let repository = reach.repository.as_ref().ok_or_else(no_place)?;
        let named = self.config.group.name.is_some() && !self.config.url.is_repository();
        let made = match self.group_number() {
            None if named => return Err(ForgeError::Unreachable("the runner group is not known yet".to_owned())),
            Some(group) => self.register_at(None, group, reach, name).await,
            None => match self.register_at(Some(repository), DEFAULT_GROUP, reach, name).await {
                Err(error) if is_about_one(&error) && self.config.group.allow_default_group && !self.config.url.is_repository() => {
                    self.register_at(None, DEFAULT_GROUP, reach, name).await
                }
                other => other,
            },
        };
        let made = made.map_err(ForgeError::from)?;
        let mut board = self.board();
        let meant_for = board.meant_for(repository, &reach.labels);
        board.registered(name, &made.key, meant_for, Instant::now());
        Ok(made)
    }

    async fn runners(&self) -> Result<Vec<RegisteredRunner>, ForgeError> {
        let mut places: Vec<Option<Repository>> = self.board().places().cloned().map(Some).collect();
        let named = self.config.repositories.iter().filter(|named| !places.contains(&Some((*named).clone()))).cloned().map(Some);
        places.extend(named.collect::<Vec<_>>());
        let at_level = self.config.group.name.is_some() || self.config.group.allow_default_group;
        if at_level && !self.config.url.is_repository() {
            places.push(None);
        }
        let mut all = Vec::new();
        for place in places {
            let found = match self.service.rest_runners(&self.path(place.as_ref())).await {
                Err(error) if place.is_some() && !self.config.url.is_repository() && is_about_one(&error) => continue,
                other => other?,
            };
            let key = |id: u64| RunnerKey { repository: place.clone(), id };
            all.extend(found.into_iter().map(|runner| RegisteredRunner { key: key(runner.id), name: runner.name }));
        }
        let own = all.iter().filter(|runner| RunnerName::is_of_pool(&runner.name, &self.config.pool));
        self.board().listed(own, Instant::now());
        Ok(all)
    }

    async fn deregister(&self, runner: &RunnerKey) -> Result<Removal, ForgeError> {
        let removal = match self.service.remove_rest_runner(&self.path(runner.repository.as_ref()), runner.id).await {
            Ok(()) => Removal::Done,
            Err(error) if error.is(StatusCode::NOT_FOUND) => Removal::Gone,
            Err(error) if error.is(StatusCode::UNPROCESSABLE_ENTITY) => return Ok(Removal::Busy),
            Err(error) => return Err(error.into()),
        };
        self.board().removed(runner);
        Ok(removal)
    }

    fn news(&self) -> Vec<JobKey> {
        self.board().news()
    }

    fn remember(&self, job: Job) {
        let mut board = self.board();
        board.place(&job.key.repository);
        board.hint(job.key);
    }

    /// The workflow that a job calls is not told by REST, so that `job_workflow_ref` is missing.
    async fn claims(&self, job: &Job) -> Result<BTreeMap<String, String>, ForgeError> {
        let run = self.service.run(&job.key.repository, job.run).await?;
        let number = run.repository_id().ok_or_else(|| ForgeError::NotFound { what: format!("the repository's number of {}", job.key) })?;
        let claims = [
            ("repository", Some(job.key.repository.to_string())),
            ("repository_id", Some(number.to_string())),
            ("run_id", Some(job.run.to_string())),
            ("run_attempt", (run.run_attempt > 0).then(|| run.run_attempt.to_string())),
            ("event_name", Some(run.event).filter(|event| !event.is_empty())),
            ("check_run_id", Some(job.key.id.to_string())),
        ];
        Ok(claims.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect())
    }

    fn runner_group(&self) -> Option<RunnerGroup> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|(_, group)| group.clone())
    }
}
