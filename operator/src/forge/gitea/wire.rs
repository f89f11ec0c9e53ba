//! Gitea's JSON, as far as Mayfly reads it, and what becomes of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::super::{self as forge, ForgeError, JobId, JobKey, JobState, Repository};

#[derive(Deserialize)]
pub(super) struct Jobs {
    #[serde(default)]
    pub(super) jobs: Vec<Job>,
    pub(super) total_count: Option<usize>,
}

#[derive(Deserialize)]
pub(super) struct Job {
    pub(super) id: u64,
    #[serde(default)]
    url: String,
    #[serde(default)]
    run_id: u64,
    #[serde(default)]
    labels: Option<Vec<String>>,
    #[serde(default)]
    status: String,
    #[serde(default)]
    runner_name: String,
    #[serde(default)]
    runner_id: u64,
}

impl Job {
    /// `None` where the job's address does not name a repository.
    pub(super) fn into_job(self) -> Option<forge::Job> {
        let state = match self.status.as_str() {
            "queued" => JobState::Queued,
            "in_progress" => JobState::InProgress,
            "completed" => JobState::Completed,
            _ => JobState::Blocked,
        };
        Some(forge::Job {
            key: JobKey { repository: repository_of(&self.url)?, id: self.id.into() },
            run: self.run_id,
            state,
            labels: self.labels.unwrap_or_default(),
            runner: Some(self.runner_name).filter(|name| !name.is_empty()),
            runner_id: Some(self.runner_id).filter(|id| *id > 0),
        })
    }
}

/// `…/api/v1/repos/OWNER/NAME/actions/jobs/7` names its repository.
fn repository_of(url: &str) -> Option<Repository> {
    let (_, rest) = url.split_once("/api/v1/repos/")?;
    let (repository, _) = rest.split_once("/actions/")?;
    Repository::parse(repository)
}

/// Gitea's word for the state in `?status=`.
pub(super) fn status_filter(state: JobState) -> &'static str {
    match state {
        JobState::Queued => "queued",
        JobState::InProgress => "in_progress",
        JobState::Completed => "completed",
        JobState::Blocked => "waiting",
    }
}

#[derive(Deserialize)]
pub(super) struct Run {
    #[serde(default)]
    pub(super) event: String,
    #[serde(default)]
    pub(super) path: String,
    #[serde(default)]
    head_sha: String,
    #[serde(default)]
    run_number: u64,
    actor: Option<Person>,
    repository: Option<RunRepository>,
}

#[derive(Deserialize)]
struct Person {
    #[serde(default)]
    id: i64,
    #[serde(default)]
    login: String,
}

#[derive(Deserialize)]
struct RunRepository {
    #[serde(default)]
    id: i64,
    #[serde(default)]
    full_name: String,
    private: Option<bool>,
    owner: Option<Person>,
}

/// Which attempt at a job it is.
#[derive(Deserialize)]
pub(super) struct Attempt {
    #[serde(default)]
    pub(super) run_attempt: u64,
}

/// Whether pushes to a branch are restricted.
#[derive(Deserialize)]
pub(super) struct Protection {
    #[serde(default)]
    pub(super) protected: bool,
}

impl Run {
    /// What a token about a job of this run says, by GitHub's names. What the forge does not tell is left out; without what tells one
    /// repository and one job from all others there is nothing.
    pub(super) fn claims(
        self,
        repository: &Repository,
        run: u64,
        job: &JobId,
        attempt: u64,
        protected: Option<bool>,
    ) -> Result<BTreeMap<String, String>, ForgeError> {
        let unexpected = |what: &str| ForgeError::Unexpected(format!("the workflow run: {what}"));
        let own = self.repository.filter(|own| own.id > 0).ok_or_else(|| unexpected("its repository has no number"))?;
        if !own.full_name.eq_ignore_ascii_case(repository.as_str()) {
            return Err(unexpected("it is of another repository"));
        }
        let owner = own.owner.filter(|owner| owner.id > 0).ok_or_else(|| unexpected("its repository has no owner"))?;
        let (_, git_ref) = split_path(&self.path);
        let kind = match git_ref.strip_prefix("refs/tags/") {
            Some(_) => "tag",
            None => "branch",
        };
        let visibility = own.private.map(|private| if private { "private" } else { "public" });
        let actor = self.actor.filter(|actor| actor.id > 0);
        let number = |number: u64| Some(number).filter(|number| *number > 0).map(|number| number.to_string());
        let all = [
            ("repository", Some(repository.to_string())),
            ("repository_id", Some(own.id.to_string())),
            ("repository_owner", Some(repository.owner().to_owned())),
            ("repository_owner_id", Some(owner.id.to_string())),
            ("repository_visibility", visibility.map(str::to_owned)),
            ("run_id", number(run)),
            ("run_number", number(self.run_number)),
            ("run_attempt", number(attempt)),
            ("check_run_id", Some(job.to_string())),
            ("event_name", Some(self.event)),
            ("workflow_ref", Some(format!("{repository}/{}", self.path))),
            ("ref", Some(git_ref)),
            ("ref_type", Some(kind.to_owned())),
            ("ref_protected", protected.map(|protected| protected.to_string())),
            ("sha", Some(self.head_sha)),
            ("actor_id", actor.as_ref().map(|actor| actor.id.to_string())),
            ("actor", actor.map(|actor| actor.login)),
            ("runner_environment", Some("self-hosted".to_owned())),
        ];
        Ok(all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value.filter(|value| !value.is_empty())?))).collect())
    }
}

/// `ci.yml@refs/heads/main` into file and ref.
pub(super) fn split_path(path: &str) -> (String, String) {
    let (file, git_ref) = path.split_once('@').unwrap_or((path, ""));
    (file.to_owned(), git_ref.to_owned())
}

/// `refs/pull/7/head` is pull request 7.
pub(super) fn pull_request_of(git_ref: &str) -> Option<u64> {
    git_ref.strip_prefix("refs/pull/")?.split('/').next()?.parse().ok()
}

#[derive(Deserialize)]
pub(super) struct PullRequest {
    head: Option<Branch>,
    base: Option<Branch>,
}

#[derive(Deserialize)]
struct Branch {
    repo_id: Option<u64>,
}

impl PullRequest {
    /// `None` where one side is unknown (the fork was deleted, say).
    pub(super) fn is_from_fork(&self) -> Option<bool> {
        let id = |branch: &Option<Branch>| branch.as_ref().and_then(|b| b.repo_id).filter(|id| *id > 0);
        Some(id(&self.head)? != id(&self.base)?)
    }
}

#[derive(Deserialize)]
pub(super) struct Runners {
    #[serde(default)]
    pub(super) runners: Vec<Runner>,
    pub(super) total_count: Option<usize>,
}

#[derive(Deserialize)]
pub(super) struct Runner {
    pub(super) id: u64,
    #[serde(default)]
    pub(super) name: String,
}

#[derive(Deserialize)]
pub(super) struct RepoSearch {
    #[serde(default)]
    pub(super) data: Vec<Repo>,
}

#[derive(Deserialize)]
pub(super) struct Repo {
    #[serde(default)]
    pub(super) full_name: String,
    #[serde(default)]
    pub(super) has_actions: bool,
}

#[derive(Serialize)]
pub(super) struct EditRunner {
    pub(super) disabled: bool,
}

#[derive(Deserialize)]
pub(super) struct RegistrationToken {
    pub(super) token: String,
}

#[derive(Serialize)]
pub(super) struct RegisterRequest<'a> {
    pub(super) name: &'a str,
    pub(super) token: &'a str,
    pub(super) version: &'a str,
    pub(super) labels: &'a [String],
    pub(super) ephemeral: bool,
}

#[derive(Deserialize)]
pub(super) struct RegisterResponse {
    pub(super) runner: NewRunner,
}

#[derive(Deserialize)]
pub(super) struct NewRunner {
    #[serde(deserialize_with = "number_or_text")]
    pub(super) id: u64,
    uuid: String,
    token: String,
    #[serde(default)]
    pub(super) ephemeral: bool,
}

impl NewRunner {
    /// UUID and token, with which the runner speaks to the server.
    pub(super) fn credential(&self) -> String {
        format!("{} {}", self.uuid, self.token)
    }
}

#[derive(Deserialize)]
pub(super) struct Tasks {
    #[serde(default)]
    pub(super) workflow_runs: Vec<Task>,
    pub(super) total_count: Option<usize>,
}

/// A runner's attempt at a job.
#[derive(Deserialize)]
pub(super) struct Task {
    pub(super) id: u64,
    #[serde(default)]
    status: String,
    #[serde(default)]
    url: String,
}

impl Task {
    /// Whether this may be the attempt at `job` that runs.
    pub(super) fn may_be(&self, job: &forge::Job) -> bool {
        self.status == "running" && self.url.rsplit_once("/actions/runs/").is_some_and(|(_, run)| run == job.run.to_string())
    }
}

/// `UpdateTaskRequest`: the task is over, and it failed.
#[derive(Serialize)]
pub(super) struct LostTask {
    state: LostState,
}

#[derive(Serialize)]
struct LostState {
    id: String,
    result: &'static str,
    #[serde(rename = "stoppedAt")]
    stopped_at: String,
}

impl LostTask {
    pub(super) fn new(id: u64) -> Self {
        Self { state: LostState { id: id.to_string(), result: "RESULT_FAILURE", stopped_at: jiff::Timestamp::now().to_string() } }
    }
}

/// protobuf's JSON writes 64-bit numbers as strings.
fn number_or_text<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(u64),
        Text(String),
    }
    match Either::deserialize(deserializer)? {
        Either::Number(number) => Ok(number),
        Either::Text(text) => text.parse().map_err(|_| serde::de::Error::custom("not a number")),
    }
}

/// The `.runner` file of Gitea's runner program.
#[derive(Serialize)]
pub(super) struct RunnerFile<'a> {
    id: u64,
    uuid: &'a str,
    name: &'a str,
    token: &'a str,
    address: &'a str,
    labels: Vec<String>,
    ephemeral: bool,
}

impl<'a> RunnerFile<'a> {
    /// Labels carry the scheme `host`: steps run in the runner's own container. Written in full, or the program would try to
    /// rewrite the file.
    pub(super) fn new(address: &'a str, name: &'a str, labels: &[String], runner: &'a NewRunner) -> Self {
        Self {
            id: runner.id,
            uuid: &runner.uuid,
            name,
            token: &runner.token,
            address,
            labels: labels.iter().map(|label| format!("{label}:host")).collect(),
            ephemeral: true,
        }
    }

    pub(super) fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_read_with_its_repository() {
        let json = r#"{"id":7,"url":"https://git.example/api/v1/repos/acme/web/actions/jobs/7","run_id":3,
            "labels":["linux"],"status":"in_progress","runner_name":"ci-1","steps":[]}"#;
        let job = serde_json::from_str::<Job>(json).expect("valid").into_job().expect("complete");
        assert_eq!(job.key.to_string(), "acme/web#7");
        assert_eq!((job.state, job.runner.as_deref()), (JobState::InProgress, Some("ci-1")));
    }

    #[test]
    fn a_job_of_an_impossible_repository_is_left_out() {
        let json = r#"{"id":7,"url":"https://git.example/api/v1/repos/ac me/$(id)/actions/jobs/7","status":"queued"}"#;
        assert!(serde_json::from_str::<Job>(json).expect("valid").into_job().is_none());
    }

    #[test]
    fn a_pull_request_from_elsewhere_is_a_fork_and_an_unknown_one_is_unknown() {
        let fork = |json: &str| serde_json::from_str::<PullRequest>(json).expect("valid").is_from_fork();
        assert_eq!(fork(r#"{"head":{"repo_id":2},"base":{"repo_id":1}}"#), Some(true));
        assert_eq!(fork(r#"{"head":{"repo_id":1},"base":{"repo_id":1}}"#), Some(false));
        assert_eq!(fork(r#"{"head":{"repo_id":0},"base":{"repo_id":1}}"#), None);
        assert_eq!(fork(r#"{"head":null,"base":{"repo_id":1}}"#), None);
    }

    #[test]
    fn what_a_token_says_is_what_the_forge_told() {
        let run = |repository: &str| {
            let text = format!(
                r#"{{"event":"push","path":"ci.yml@refs/heads/main","head_sha":"abc","run_number":3,"actor":{{"id":2,"login":"ann"}},
                "repository":{repository}}}"#
            );
            serde_json::from_str::<Run>(&text).expect("valid")
        };
        let (web, job) = (Repository::parse("acme/web").expect("a repository"), JobId::from(7));
        let claims = |repository: &str| run(repository).claims(&web, 900, &job, 1, Some(true));
        let told = claims(r#"{"id":42,"full_name":"acme/web","private":true,"owner":{"id":5,"login":"acme"}}"#).expect("claims");
        let expected = [
            ("actor", "ann"),
            ("actor_id", "2"),
            ("check_run_id", "7"),
            ("event_name", "push"),
            ("ref", "refs/heads/main"),
            ("ref_protected", "true"),
            ("ref_type", "branch"),
            ("repository", "acme/web"),
            ("repository_id", "42"),
            ("repository_owner", "acme"),
            ("repository_owner_id", "5"),
            ("repository_visibility", "private"),
            ("run_attempt", "1"),
            ("run_id", "900"),
            ("run_number", "3"),
            ("runner_environment", "self-hosted"),
            ("sha", "abc"),
            ("workflow_ref", "acme/web/ci.yml@refs/heads/main"),
        ];
        assert_eq!(told.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect::<Vec<_>>(), expected);
        for bad in [
            "null",
            "{}",
            r#"{"id":42,"full_name":"acme/web"}"#,
            r#"{"id":42,"full_name":"acme/web","owner":{"id":0}}"#,
            r#"{"id":42,"full_name":"acme/other","owner":{"id":5}}"#,
        ] {
            assert!(claims(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn paths_and_refs_are_taken_apart() {
        assert_eq!(split_path("ci.yml@refs/heads/a@b"), ("ci.yml".to_owned(), "refs/heads/a@b".to_owned()));
        assert_eq!(pull_request_of("refs/pull/12/head"), Some(12));
        assert_eq!(pull_request_of("refs/heads/pull/12"), None);
    }
}
