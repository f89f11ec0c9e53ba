//! Gitea 1.25 and later: REST API v1 for jobs and runners, and the runner service's `Register` call.
//!
//! Sources: Gitea's OpenAPI document (`/swagger.v1.json`) and `runner/v1/services.proto` of code.gitea.io/actions-proto-def,
//! called with the Connect protocol's JSON codec (POST, `application/json`, camelCase, 64-bit numbers as strings).

mod together;
mod wire;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use futures::{StreamExt, TryStreamExt, stream};
use reqwest::{Method, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub(crate) use together::Giteas;
use together::Together;

use super::client::body;
use super::{Forge, ForgeError, Job, JobKey, JobState, Reach, RegisteredRunner, Registration, Removal, Repository, Run, RunnerKey, Secret};

/// Entries asked for per page: Gitea's own default limit (`[api] MAX_RESPONSE_ITEMS`); a server may be set to give fewer.
const PAGE: usize = 50;
/// Most pages read of a list of jobs, so that one pass is bounded: 2,000 jobs that wait are enough to know of.
const JOB_PAGES: usize = 40;
/// Most pages read of any other list, which have to be whole.
const MAX_PAGES: usize = 1_000;
/// Repositories asked at the same time.
const CONCURRENCY: usize = 8;
/// Longest answer read, in bytes.
const MAX_ANSWER: usize = 16 << 20;

/// Whose jobs are served.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Scope {
    /// All repositories of an organization.
    Organization(String),
    /// One repository.
    Repository(Repository),
    /// The whole server.
    Instance,
}

/// A Gitea server, one scope of it, one token.
#[derive(Debug)]
pub(crate) struct Gitea {
    http: reqwest::Client,
    base: String,
    scope: Scope,
    token: Secret,
    waiting: Together<Vec<Job>>,
    running: Together<Vec<Job>>,
    registered: Together<Vec<RegisteredRunner>>,
}

impl Gitea {
    /// `base` is the server's URL as its users and runners see it.
    pub(crate) fn new(http: reqwest::Client, base: &str, scope: Scope, token: Secret) -> Self {
        let (waiting, running, registered) = Default::default();
        Self { http, base: base.trim_end_matches('/').to_owned(), scope, token, waiting, running, registered }
    }

    fn scope_path(&self) -> String {
        match &self.scope {
            Scope::Organization(name) => format!("/orgs/{name}"),
            Scope::Repository(name) => format!("/repos/{name}"),
            Scope::Instance => "/admin".to_owned(),
        }
    }

    async fn rest<T: DeserializeOwned>(&self, method: Method, path: &str, what: &str) -> Result<T, ForgeError> {
        let body = self.send::<()>(method, &format!("/api/v1{path}"), what, None, Some(&self.token)).await?;
        decode(&body, what)
    }

    async fn send<B: Serialize + Sync>(
        &self,
        method: Method,
        path: &str,
        what: &str,
        content: Option<&B>,
        token: Option<&Secret>,
    ) -> Result<Vec<u8>, ForgeError> {
        let mut request = self.http.request(method, format!("{}{path}", self.base));
        if let Some(token) = token {
            request = request.header("Authorization", format!("token {}", token.reveal()));
        }
        if let Some(content) = content {
            request = request.json(content);
        }
        let mut answer = request.send().await?;
        let status = answer.status();
        let too_long = || ForgeError::Unexpected(format!("more than {MAX_ANSWER} bytes for {what}"));
        let bytes = body(&mut answer, MAX_ANSWER).await?.ok_or_else(too_long)?;
        match status {
            s if s.is_success() => Ok(bytes),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(ForgeError::Unauthorized { what: what.to_owned() }),
            StatusCode::NOT_FOUND => Err(ForgeError::NotFound { what: what.to_owned() }),
            s if s.is_server_error() || s == StatusCode::TOO_MANY_REQUESTS => Err(ForgeError::Unreachable(format!("HTTP {s} for {what}"))),
            s => Err(ForgeError::Unexpected(format!("HTTP {s} for {what}"))),
        }
    }

    /// Reads a list page by page until it has as many entries as it says, or a page is empty.
    async fn pages<L: DeserializeOwned, T>(
        &self,
        path: &str,
        what: &str,
        most: usize,
        entries: impl Fn(L) -> (Vec<T>, Option<usize>),
    ) -> Result<Vec<T>, ForgeError> {
        let joint = if path.contains('?') { '&' } else { '?' };
        let mut all = Vec::new();
        for page in 1..=most {
            let list: L = self.rest(Method::GET, &format!("{path}{joint}limit={PAGE}&page={page}"), what).await?;
            let (read, total) = entries(list);
            let empty = read.is_empty();
            all.extend(read);
            if empty || total.is_some_and(|total| all.len() >= total) {
                return Ok(all);
            }
        }
        if most == JOB_PAGES { Ok(all) } else { Err(ForgeError::Unexpected(format!("{what}: the list does not end"))) }
    }

    async fn jobs_listed(&self, state: JobState) -> Result<Vec<Job>, ForgeError> {
        let status = wire::status_filter(state);
        let path = format!("{}/actions/jobs?status={status}", self.scope_path());
        let mut jobs = self.pages(&path, "jobs of the scope", JOB_PAGES, |list: wire::Jobs| (list.jobs, list.total_count)).await?;
        jobs.sort_by_key(|job| job.id);
        Ok(jobs.into_iter().filter_map(wire::Job::into_job).filter(|job| job.state == state).collect())
    }

    async fn runners_listed(&self) -> Result<Vec<RegisteredRunner>, ForgeError> {
        let lists: Vec<Vec<RegisteredRunner>> = stream::iter(self.repositories().await?)
            .map(|repository| async move {
                match self.runners_of(&repository).await {
                    // A repository that vanished, or in which the token may not manage runners: Mayfly has none there.
                    Err(ForgeError::NotFound { .. } | ForgeError::Unauthorized { .. }) => Ok(Vec::new()),
                    other => other,
                }
            })
            .buffer_unordered(CONCURRENCY)
            .try_collect()
            .await?;
        Ok(lists.into_iter().flatten().collect())
    }

    /// Runners registered for this repository itself (not those it inherits).
    async fn runners_of(&self, repository: &Repository) -> Result<Vec<RegisteredRunner>, ForgeError> {
        let path = format!("/repos/{repository}/actions/runners");
        let runners =
            self.pages(&path, "runners of the repository", MAX_PAGES, |list: wire::Runners| (list.runners, list.total_count)).await?;
        let key = |id: u64| RunnerKey { repository: Some(repository.clone()), id };
        Ok(runners.into_iter().map(|runner| RegisteredRunner { key: key(runner.id), name: runner.name }).collect())
    }

    /// Every repository of the scope.
    async fn repositories(&self) -> Result<Vec<Repository>, ForgeError> {
        let names = match &self.scope {
            Scope::Repository(repository) => return Ok(vec![repository.clone()]),
            Scope::Organization(name) => {
                let path = format!("/orgs/{name}/repos");
                self.pages(&path, "repositories of the organization", MAX_PAGES, |list: Vec<wire::Repo>| (list, None)).await?
            }
            Scope::Instance => {
                self.pages("/repos/search", "repositories of the server", MAX_PAGES, |list: wire::RepoSearch| (list.data, None)).await?
            }
        };
        Ok(names.iter().filter(|repo| repo.has_actions).filter_map(|repo| Repository::parse(&repo.full_name)).collect())
    }

    /// The path of a runner; its repository is always named here.
    fn runner_path(runner: &RunnerKey) -> Result<String, ForgeError> {
        let missing = || ForgeError::Unexpected("a runner without its repository".to_owned());
        let repository = runner.repository.as_ref().ok_or_else(missing)?;
        Ok(format!("/api/v1/repos/{repository}/actions/runners/{}", runner.id))
    }
}

#[async_trait]
impl Forge for Gitea {
    async fn jobs(&self, state: JobState) -> Result<Vec<Job>, ForgeError> {
        match state {
            JobState::Queued => self.waiting.get(self.jobs_listed(state)).await,
            JobState::InProgress => self.running.get(self.jobs_listed(state)).await,
            JobState::Blocked | JobState::Completed => self.jobs_listed(state).await,
        }
    }

    async fn job(&self, job: &JobKey) -> Result<Option<Job>, ForgeError> {
        let path = format!("/repos/{}/actions/jobs/{}", job.repository, job.id);
        match self.rest::<wire::Job>(Method::GET, &path, "the job").await {
            Ok(found) => found.into_job().map(Some).ok_or_else(|| ForgeError::Unexpected("a job without a repository".to_owned())),
            Err(ForgeError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn run(&self, repository: &Repository, run: u64) -> Result<Run, ForgeError> {
        let run: wire::Run = self.rest(Method::GET, &format!("/repos/{repository}/actions/runs/{run}"), "the workflow run").await?;
        let (workflow, git_ref) = wire::split_path(&run.path);
        let fork = match wire::pull_request_of(&git_ref) {
            // The run itself does not say where the code comes from; the pull request does.
            Some(number) => {
                let path = format!("/repos/{repository}/pulls/{number}");
                match self.rest::<wire::PullRequest>(Method::GET, &path, "the pull request").await {
                    Ok(pull_request) => pull_request.is_from_fork(),
                    // What the token may not read is not claimed: a binding that asks for it does not fit.
                    Err(ForgeError::NotFound { .. } | ForgeError::Unauthorized { .. }) => None,
                    Err(error) => return Err(error),
                }
            }
            None if run.event.starts_with("pull_request") => None,
            None => Some(false),
        };
        Ok(Run { event: run.event, workflow, git_ref, fork, public: None })
    }

    async fn claims(&self, job: &Job) -> Result<BTreeMap<String, String>, ForgeError> {
        let (repository, id) = (&job.key.repository, &job.key.id);
        let run = format!("/repos/{repository}/actions/runs/{}", job.run);
        let run: wire::Run = self.rest(Method::GET, &run, "the workflow run").await?;
        let task: wire::Attempt = self.rest(Method::GET, &format!("/repos/{repository}/actions/jobs/{id}"), "the job").await?;
        let branch = wire::split_path(&run.path).1.strip_prefix("refs/heads/").map(str::to_owned);
        let protected = match branch {
            None => None,
            Some(branch) => {
                let mut url = reqwest::Url::parse("http://x/").map_err(|error| ForgeError::Unexpected(error.to_string()))?;
                url.path_segments_mut().map_err(|()| ForgeError::Unexpected("a branch".to_owned()))?.extend(branch.split('/'));
                match self.rest::<wire::Protection>(Method::GET, &format!("/repos/{repository}/branches{}", url.path()), "the branch").await
                {
                    Ok(branch) => Some(branch.protected),
                    Err(ForgeError::NotFound { .. }) => None,
                    Err(error) => return Err(error),
                }
            }
        };
        run.claims(repository, job.run, id, task.run_attempt, protected)
    }

    fn reach(&self, job: &Job) -> Reach {
        Reach { repository: Some(job.key.repository.clone()), labels: job.labels.clone() }
    }

    async fn register(&self, reach: &Reach, name: &str) -> Result<Registration, ForgeError> {
        let Reach { repository: Some(repository), labels } = reach else {
            return Err(ForgeError::Unexpected("a runner is registered for a repository, and none is named".to_owned()));
        };
        // The token is good for any number of runners until somebody resets it: it stays in this function.
        let path = format!("/repos/{repository}/actions/runners/registration-token");
        let token: wire::RegistrationToken = self.rest(Method::POST, &path, "the registration token of the repository").await?;
        let request = wire::RegisterRequest {
            name,
            token: &token.token,
            version: concat!("mayfly-", env!("CARGO_PKG_VERSION")),
            labels,
            ephemeral: true,
        };
        let what = "the registration of a runner";
        let body = self.send(Method::POST, "/api/actions/runner.v1.RunnerService/Register", what, Some(&request), None).await?;
        let runner = decode::<wire::RegisterResponse>(&body, what)?.runner;
        if !runner.ephemeral {
            return Err(ForgeError::Unexpected(
                "the server registered a runner for more than one job; it has to be Gitea 1.25 or later".to_owned(),
            ));
        }
        let key = RunnerKey { repository: Some(repository.clone()), id: runner.id };
        let credential = Secret::new(runner.credential());
        let hand_over = wire::RunnerFile::new(&self.base, name, labels, &runner).to_json();
        Ok(Registration { key, hand_over: Secret::new(hand_over), credential })
    }

    async fn runners(&self) -> Result<Vec<RegisteredRunner>, ForgeError> {
        self.registered.get(self.runners_listed()).await
    }

    async fn pause(&self, runner: &RunnerKey) -> Result<Removal, ForgeError> {
        let path = Self::runner_path(runner)?;
        let body = wire::EditRunner { disabled: true };
        let answer = self.send(Method::PATCH, &path, "the pause of a runner", Some(&body), Some(&self.token)).await;
        done_or_gone(answer)
    }

    async fn give_up(&self, job: &Job, credential: &Secret) -> Result<Removal, ForgeError> {
        let path = format!("/repos/{}/actions/tasks", job.key.repository);
        let tasks =
            self.pages(&path, "tasks of the repository", JOB_PAGES, |list: wire::Tasks| (list.workflow_runs, list.total_count)).await?;
        let (uuid, token) = credential.reveal().split_once(' ').unwrap_or_default();
        let url = format!("{}/api/actions/runner.v1.RunnerService/UpdateTask", self.base);
        // The API does not say which task a job is; the server says whose it is: it takes a runner's word for its own task only.
        for task in tasks.iter().filter(|task| task.may_be(job)) {
            let request = self.http.post(&url).header("x-runner-uuid", uuid).header("x-runner-token", token);
            let answer = request.json(&wire::LostTask::new(task.id)).send().await?;
            if answer.status().is_success() {
                return Ok(Removal::Done);
            }
        }
        Ok(Removal::Gone)
    }

    async fn deregister(&self, runner: &RunnerKey) -> Result<Removal, ForgeError> {
        let path = Self::runner_path(runner)?;
        let answer = self.send::<()>(Method::DELETE, &path, "the removal of a runner", None, Some(&self.token)).await;
        done_or_gone(answer)
    }
}

fn done_or_gone(answer: Result<Vec<u8>, ForgeError>) -> Result<Removal, ForgeError> {
    match answer {
        Ok(_) => Ok(Removal::Done),
        Err(ForgeError::NotFound { .. }) => Ok(Removal::Gone),
        Err(error) => Err(error),
    }
}

fn decode<T: DeserializeOwned>(body: &[u8], what: &str) -> Result<T, ForgeError> {
    // serde's message can quote the body, which may hold a token: say where, not what.
    serde_json::from_slice(body).map_err(|error| {
        ForgeError::Unexpected(format!("{what}: not the expected JSON (line {}, column {})", error.line(), error.column()))
    })
}
