//! JSON of the Actions service and of REST, as far as Mayfly reads or writes it. Key spelling is actions/scaleset's types.go.

use serde::{Deserialize, Serialize};

use super::super::{self as forge, JobId, JobKey, JobState, Repository};

/// `{"count":…,"value":[…]}`.
#[derive(Deserialize)]
pub(super) struct List<T> {
    #[serde(default = "Vec::new")]
    pub(super) value: Vec<T>,
}

/// `RunnerScaleSet`, as it is read.
#[derive(Deserialize, Debug)]
#[serde(rename_all = "camelCase")]
pub(super) struct ScaleSet {
    pub(super) id: u64,
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    pub(super) runner_group_id: u64,
    #[serde(default)]
    pub(super) labels: Vec<Label>,
}

#[derive(Serialize, Deserialize, Debug, Clone)]
pub(super) struct Label {
    #[serde(rename = "type", default)]
    pub(super) kind: String,
    #[serde(default)]
    pub(super) name: String,
}

/// `RunnerScaleSet`, as it is asked for.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct WantedScaleSet<'a> {
    name: &'a str,
    runner_group_id: u64,
    labels: Vec<Label>,
    #[serde(rename = "RunnerSetting")]
    setting: Setting,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Setting {
    disable_update: bool,
}

impl<'a> WantedScaleSet<'a> {
    /// Runners do not update themselves: they are as their image is.
    pub(super) fn new(name: &'a str, runner_group_id: u64, labels: &[String]) -> Self {
        let label = |name: &String| Label { kind: "System".to_owned(), name: name.clone() };
        Self { name, runner_group_id, labels: labels.iter().map(label).collect(), setting: Setting { disable_update: true } }
    }
}

/// A runner group, of the Actions service.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RunnerGroup {
    pub(super) id: u64,
}

/// Runner groups, of REST.
#[derive(Deserialize)]
pub(super) struct GroupList {
    #[serde(default)]
    pub(super) runner_groups: Vec<GroupRules>,
}

/// What a runner group may be used for.
#[derive(Deserialize, Debug, Clone, Default)]
pub(super) struct GroupRules {
    pub(super) id: u64,
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    pub(super) default: bool,
    /// `all`, `private` or `selected`; of an enterprise `all` or `selected`.
    #[serde(default)]
    pub(super) visibility: String,
    #[serde(default)]
    pub(super) allows_public_repositories: bool,
    #[serde(default)]
    pub(super) restricted_to_workflows: bool,
    /// As `owner/name/.github/workflows/file@ref`.
    #[serde(default)]
    pub(super) selected_workflows: Vec<String>,
}

/// Repositories that may use a runner group.
#[derive(Deserialize)]
pub(super) struct GroupRepositories {
    #[serde(default)]
    pub(super) repositories: Vec<FullName>,
}

#[derive(Deserialize)]
pub(super) struct FullName {
    #[serde(default)]
    pub(super) full_name: String,
}

/// Organizations that may use a runner group.
#[derive(Deserialize)]
pub(super) struct GroupOrganizations {
    #[serde(default)]
    pub(super) organizations: Vec<Login>,
}

#[derive(Deserialize)]
pub(super) struct Login {
    #[serde(default)]
    pub(super) login: String,
}

/// `RunnerScaleSetStatistic`.
#[derive(Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Statistics {
    pub(super) total_assigned_jobs: u32,
    pub(super) total_running_jobs: u32,
}

/// `RunnerScaleSetSession`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Session {
    #[serde(default)]
    pub(super) session_id: String,
    #[serde(default)]
    pub(super) message_queue_url: String,
    #[serde(default)]
    pub(super) message_queue_access_token: String,
    #[serde(default)]
    pub(super) statistics: Option<Statistics>,
}

/// `RunnerScaleSetMessage`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Message {
    pub(super) message_id: u64,
    #[serde(default)]
    pub(super) message_type: String,
    #[serde(default)]
    pub(super) body: Option<String>,
    #[serde(default)]
    pub(super) statistics: Option<Statistics>,
}

/// The only type of message there is.
pub(super) const JOB_MESSAGES: &str = "RunnerScaleSetJobMessages";

/// One entry of a message's body. What cannot be read is left out, whatever else is in the message.
#[derive(Deserialize, Debug, Clone, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct JobMessage {
    pub(super) message_type: String,
    pub(super) runner_request_id: i64,
    pub(super) repository_name: String,
    pub(super) owner_name: String,
    pub(super) job_id: String,
    pub(super) job_workflow_ref: String,
    pub(super) workflow_run_id: u64,
    pub(super) event_name: String,
    pub(super) request_labels: Vec<String>,
    pub(super) result: String,
    pub(super) runner_id: u64,
    pub(super) runner_name: String,
}

impl JobMessage {
    /// The job it is about; `None` where repository or id cannot be one.
    pub(super) fn key(&self) -> Option<JobKey> {
        let repository = Repository::parse(&format!("{}/{}", self.owner_name, self.repository_name))?;
        let id = match self.job_id.is_empty() {
            false => JobId::parse(&self.job_id)?,
            true => JobId::from(u64::try_from(self.runner_request_id).ok().filter(|id| *id > 0)?),
        };
        Some(JobKey { repository, id })
    }

    /// The job, in this state.
    pub(super) fn job(&self, key: JobKey, state: JobState) -> forge::Job {
        forge::Job {
            key,
            run: self.workflow_run_id,
            state,
            labels: self.request_labels.clone(),
            runner: Some(self.runner_name.clone()).filter(|name| !name.is_empty()),
            runner_id: Some(self.runner_id).filter(|id| *id > 0),
        }
    }

    /// What the message says of the run. A pull request's origin is not in it.
    pub(super) fn run(&self, repository: &Repository) -> forge::Run {
        let (workflow, git_ref) = workflow(&self.job_workflow_ref, repository);
        let fork = if self.event_name.starts_with("pull_request") { None } else { Some(false) };
        forge::Run { event: self.event_name.clone(), workflow, git_ref, fork, public: None }
    }
}

/// `acme/web/.github/workflows/ci.yml@refs/heads/main` into `ci.yml` and the ref. A workflow of another repository, which this one calls,
/// keeps its whole path: its file name says nothing about what it is.
pub(super) fn workflow(reference: &str, repository: &Repository) -> (String, String) {
    let (path, git_ref) = reference.split_once('@').unwrap_or((reference, ""));
    let own = |path: &str| {
        let rest = path.get(repository.as_str().len()..)?;
        let owned = path.get(..repository.as_str().len())?.eq_ignore_ascii_case(repository.as_str());
        owned.then(|| rest.strip_prefix("/.github/workflows/")).flatten().map(str::to_owned)
    };
    (own(path).unwrap_or_else(|| path.to_owned()), git_ref.to_owned())
}

/// `POST …/generatejitconfig`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct JitRequest<'a> {
    pub(super) name: &'a str,
    pub(super) work_folder: &'a str,
}

#[derive(Deserialize)]
pub(super) struct JitConfig {
    pub(super) runner: Runner,
    #[serde(rename = "encodedJITConfig")]
    pub(super) encoded: String,
}

/// `RunnerReference`.
#[derive(Deserialize, Debug)]
#[serde(rename_all = "camelCase")]
pub(super) struct Runner {
    pub(super) id: u64,
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    pub(super) runner_scale_set_id: u64,
}

/// `GET /repos/{owner}/{repo}`.
#[derive(Deserialize)]
pub(super) struct RepositoryFacts {
    #[serde(default)]
    pub(super) private: bool,
}

/// `GET /repos/{owner}/{repo}/actions/runs/{id}`.
#[derive(Deserialize)]
pub(super) struct WorkflowRun {
    #[serde(default)]
    pub(super) event: String,
    #[serde(default)]
    pub(super) path: String,
    #[serde(default)]
    pub(super) head_branch: Option<String>,
    #[serde(default)]
    pub(super) run_attempt: u64,
    head_repository: Option<Identified>,
    repository: Option<Identified>,
}

/// `GET /repos/{owner}/{repo}/actions/runs/{id}/jobs`.
#[derive(Deserialize)]
pub(super) struct RunJobs {
    #[serde(default)]
    pub(super) jobs: Vec<RunJob>,
}

/// One job; its number is that of its check run as well.
#[derive(Deserialize, Debug, Clone, Default)]
pub(super) struct RunJob {
    pub(super) id: u64,
    #[serde(default)]
    pub(super) run_id: u64,
    #[serde(default)]
    pub(super) status: String,
    #[serde(default)]
    pub(super) labels: Vec<String>,
    #[serde(default)]
    pub(super) runner_id: Option<u64>,
    #[serde(default)]
    pub(super) runner_name: Option<String>,
}

impl RunJob {
    /// The job; `None` in a state that is not known.
    pub(super) fn job(&self, repository: &Repository) -> Option<forge::Job> {
        let state = match self.status.as_str() {
            "queued" => JobState::Queued,
            "in_progress" => JobState::InProgress,
            "completed" => JobState::Completed,
            "waiting" | "pending" | "requested" => JobState::Blocked,
            _ => return None,
        };
        Some(forge::Job {
            key: JobKey { repository: repository.clone(), id: self.id.into() },
            run: self.run_id,
            state,
            labels: self.labels.clone(),
            runner: self.runner_name.clone().filter(|name| !name.is_empty()),
            runner_id: self.runner_id.filter(|id| *id > 0),
        })
    }
}

/// `GET /repos/{owner}/{repo}/actions/runs`.
#[derive(Deserialize)]
pub(super) struct Runs {
    #[serde(default)]
    pub(super) workflow_runs: Vec<Numbered>,
}

#[derive(Deserialize)]
pub(super) struct Numbered {
    pub(super) id: u64,
}

/// `GET …/actions/runners`.
#[derive(Deserialize)]
pub(super) struct RestRunners {
    #[serde(default)]
    pub(super) runners: Vec<RestRunner>,
}

/// A runner, of REST.
#[derive(Deserialize, Debug)]
pub(super) struct RestRunner {
    #[serde(default)]
    pub(super) id: u64,
    #[serde(default)]
    pub(super) name: String,
}

/// `POST …/actions/runners/generate-jitconfig`.
#[derive(Serialize)]
pub(super) struct RestJitRequest<'a> {
    pub(super) name: &'a str,
    pub(super) runner_group_id: u64,
    pub(super) labels: &'a [String],
    pub(super) work_folder: &'a str,
}

#[derive(Deserialize)]
pub(super) struct RestJitConfig {
    pub(super) runner: RestRunner,
    #[serde(rename = "encoded_jit_config", default)]
    pub(super) encoded: String,
}

#[derive(Deserialize)]
struct Identified {
    #[serde(default)]
    id: u64,
    private: Option<bool>,
}

impl WorkflowRun {
    /// GitHub's number of the repository.
    pub(super) fn repository_id(&self) -> Option<u64> {
        self.repository.as_ref().map(|repository| repository.id).filter(|id| *id > 0)
    }

    /// `None` where one side is unknown (the fork was deleted, say).
    pub(super) fn is_from_fork(&self) -> Option<bool> {
        let id = |side: &Option<Identified>| side.as_ref().map(|repository| repository.id).filter(|id| *id > 0);
        Some(id(&self.head_repository)? != id(&self.repository)?)
    }

    /// What it is about.
    pub(super) fn facts(&self) -> forge::Run {
        let (workflow, git_ref) = self.workflow();
        let public = self.repository.as_ref().and_then(|repository| repository.private).map(|private| !private);
        forge::Run { event: self.event.clone(), workflow, git_ref, fork: self.is_from_fork(), public }
    }

    /// File of the workflow and the ref it runs for, as far as REST tells.
    fn workflow(&self) -> (String, String) {
        let path = self.path.split('@').next().unwrap_or_default();
        let file = path.strip_prefix(".github/workflows/").unwrap_or(path).to_owned();
        (file, self.head_branch.as_ref().map(|branch| format!("refs/heads/{branch}")).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_message_becomes_a_job_and_a_run() {
        let json = r#"{"messageType":"JobAssigned","runnerRequestId":0,"repositoryName":"web","ownerName":"acme",
            "jobId":"c9a7b3f0-0000-4000-8000-00000000000a","jobWorkflowRef":"acme/web/.github/workflows/ci.yml@refs/heads/main",
            "workflowRunId":7,"eventName":"push","requestLabels":["linux"],"queueTime":"2026-01-01T00:00:00Z","unknown":[]}"#;
        let message: JobMessage = serde_json::from_str(json).expect("a message");
        let key = message.key().expect("a job");
        assert_eq!(key.to_string(), "acme/web#c9a7b3f0-0000-4000-8000-00000000000a");
        let run = message.run(&key.repository);
        assert_eq!((run.event.as_str(), run.workflow.as_str(), run.git_ref.as_str()), ("push", "ci.yml", "refs/heads/main"));
        assert_eq!(run.fork, Some(false));
        assert_eq!(message.job(key, JobState::Queued).runner, None);
    }

    #[test]
    fn an_older_server_names_jobs_by_a_number_and_a_hostile_name_is_no_job() {
        let message = |owner: &str, job_id: &str, request: i64| JobMessage {
            owner_name: owner.to_owned(),
            repository_name: "web".to_owned(),
            job_id: job_id.to_owned(),
            runner_request_id: request,
            ..JobMessage::default()
        };
        assert_eq!(message("acme", "", 12).key().map(|key| key.to_string()).as_deref(), Some("acme/web#12"));
        for bad in [message("acme", "", 0), message("ac me", "a", 1), message("acme", "$(id)", 1), message("", "a", 1)] {
            assert!(bad.key().is_none(), "{bad:?}");
        }
    }

    #[test]
    fn a_called_workflow_of_another_repository_keeps_its_path() {
        let repository = Repository::parse("acme/web").expect("a repository");
        let file = |reference: &str| workflow(reference, &repository).0;
        assert_eq!(file("Acme/Web/.github/workflows/ci.yml@refs/heads/a@b"), "ci.yml");
        assert_eq!(file("evil/x/.github/workflows/ci.yml@main"), "evil/x/.github/workflows/ci.yml");
        assert_eq!(file("acme/web-evil/.github/workflows/ci.yml@main"), "acme/web-evil/.github/workflows/ci.yml");
        assert_eq!(file(""), "");
    }

    #[test]
    fn a_run_says_whether_its_code_is_a_forks() {
        let fork = |json: &str| serde_json::from_str::<WorkflowRun>(json).expect("a run").is_from_fork();
        assert_eq!(fork(r#"{"head_repository":{"id":2},"repository":{"id":1}}"#), Some(true));
        assert_eq!(fork(r#"{"head_repository":{"id":1},"repository":{"id":1}}"#), Some(false));
        assert_eq!(fork(r#"{"head_repository":null,"repository":{"id":1}}"#), None);
    }
}
