//! What the simulated forge knows: accounts, repositories, Apps, groups, scale sets, runners, runs and jobs.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::sync::Notify;

use crate::keys::{RsaKey, RsaNumbers};
use crate::queue::Queue;
use crate::workflow::{JobPlan, Workflow};

/// How jobs reach a scale set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flow {
    /// As on github.com: jobs are assigned directly, and there is nothing to acquire.
    #[default]
    Assign,
    /// As on GitHub Enterprise Server: jobs are offered, acquired, then assigned.
    Acquire,
}

/// What can be changed while the simulator runs. Times are in seconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// How jobs reach a scale set.
    pub flow: Flow,
    /// How long a poll without news stays open.
    pub poll: f64,
    /// How long an abandoned session blocks a new one.
    pub session_hold: f64,
    /// After which time a message comes again that was delivered and not acknowledged.
    pub redelivery: f64,
    /// How long after its queueing a job is given to a scale set at the earliest.
    pub assign_delay: f64,
    /// After which time a job that no runner took is assigned anew.
    pub pickup: f64,
    /// How often a job is assigned before it fails.
    pub assignments: u32,
    /// How long a runner keeps a job without renewing it.
    pub lock: f64,
    /// How long a job waits in the queue.
    pub queue: f64,
    /// How long the runner of a cancelled job may take.
    pub cancel: f64,
    /// Life of an installation token.
    pub installation_token: f64,
    /// Life of a registration token.
    pub registration_token: f64,
    /// Life of the Actions service's admin token.
    pub admin_token: f64,
    /// Life of a message queue token.
    pub queue_token: f64,
    /// Life of a runner's token.
    pub runner_token: f64,
    /// Life of an OIDC token.
    pub id_token: f64,
    /// Drop labels other than the scale set's name without a word, as some versions of GitHub Enterprise Server do.
    pub drop_custom_labels: bool,
    /// Begin bodies of the Actions service with a byte order mark.
    pub byte_order_mark: bool,
    /// Requests an hour that a REST credential may make; none: no limit and no headers, as on GitHub Enterprise Server.
    pub rate_limit: Option<u32>,
    /// `jobId` in job messages is the number of the check run; otherwise it is a UUID.
    pub job_id_is_check_run: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            flow: Flow::Assign,
            poll: 50.0,
            session_hold: 91.0,
            redelivery: 300.0,
            assign_delay: 0.0,
            pickup: 300.0,
            assignments: 3,
            lock: 600.0,
            queue: 86_400.0,
            cancel: 300.0,
            installation_token: 3600.0,
            registration_token: 3600.0,
            admin_token: 1020.0,
            queue_token: 3600.0,
            runner_token: 3600.0,
            id_token: 300.0,
            drop_custom_labels: false,
            byte_order_mark: false,
            rate_limit: Some(15_000),
            job_id_is_check_run: false,
        }
    }
}

/// A number of seconds as a duration; what is no duration counts as none.
pub fn seconds(number: f64) -> Duration {
    Duration::try_from_secs_f64(number).unwrap_or_default()
}

/// Where runners are managed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// An enterprise.
    Enterprise(String),
    /// An organization.
    Organization(String),
    /// A repository: owner and name.
    Repository(String, String),
}

impl Level {
    /// From the path of a configuration URL.
    pub fn from_path(path: &str) -> Option<Self> {
        let parts: Vec<String> = path.split('/').filter(|part| !part.is_empty()).map(str::to_lowercase).collect();
        match parts.as_slice() {
            [organization] => Some(Self::Organization(organization.clone())),
            [first, enterprise] if first == "enterprises" => Some(Self::Enterprise(enterprise.clone())),
            [owner, repository] => Some(Self::Repository(owner.clone(), repository.clone())),
            _ => None,
        }
    }

    /// The path of a configuration URL.
    pub fn path(&self) -> String {
        match self {
            Self::Enterprise(slug) => format!("enterprises/{slug}"),
            Self::Organization(login) => login.clone(),
            Self::Repository(owner, name) => format!("{owner}/{name}"),
        }
    }
}

/// An enterprise.
pub struct Enterprise {
    /// Its number.
    pub id: i64,
    /// Its name in URLs.
    pub slug: String,
}

/// An organization, or a user who owns repositories.
pub struct Organization {
    /// Its number.
    pub id: i64,
    /// Its name.
    pub login: String,
    /// The enterprise it belongs to.
    pub enterprise: Option<String>,
}

/// A repository.
pub struct Repository {
    /// Its number.
    pub id: i64,
    /// Its owner.
    pub owner: String,
    /// Its name.
    pub name: String,
    /// Whether it is private.
    pub private: bool,
    /// Whether it is a fork.
    pub fork: bool,
    /// Its default branch.
    pub default_branch: String,
    /// Whether `sub` of its OIDC tokens carries ids, as for repositories made since July 2026.
    pub immutable_subject: bool,
    /// Secrets of its jobs.
    pub secrets: Map<String, Value>,
    /// Protected branches.
    pub protected_branches: Vec<String>,
    /// Environments that wait for an approval.
    pub protected_environments: Vec<String>,
    /// Its custom properties.
    pub properties: Map<String, Value>,
    /// Its workflow files.
    pub workflows: BTreeMap<String, Workflow>,
    /// How many runs it had.
    pub runs: i64,
}

impl Repository {
    /// `owner/name`.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }
}

/// A GitHub App.
pub struct App {
    /// Its number.
    pub id: i64,
    /// Its client id.
    pub client_id: String,
    /// Keys that are valid now.
    pub keys: Vec<RsaNumbers>,
}

/// An installation of an App.
pub struct Installation {
    /// Its App.
    pub app: i64,
    /// The account it is installed in.
    pub account: String,
}

/// Whose a REST token is.
pub struct RestToken {
    /// None: a personal access token.
    pub installation: Option<i64>,
    /// The repositories it was made for, as `owner/name`; without them, all of the installation's account.
    pub repositories: Option<Vec<String>>,
    /// When it ends.
    pub expires: Option<Timestamp>,
    /// How many requests it made in this hour.
    pub used: u32,
    /// When that hour began.
    pub hour: Instant,
}

/// A runner group.
#[derive(Clone, Debug, Serialize)]
pub struct Group {
    /// Its number.
    pub id: i64,
    /// Its name.
    pub name: String,
    /// `all`, `selected` or `private`.
    pub visibility: String,
    /// Whether it is the default group.
    pub default: bool,
    /// Whether public repositories may use it.
    pub allows_public_repositories: bool,
    /// Whether only some workflows may use it.
    pub restricted_to_workflows: bool,
    /// Which.
    pub selected_workflows: Vec<String>,
    /// Repositories that may use it, `owner/name`.
    #[serde(skip)]
    pub repositories: BTreeSet<String>,
    /// Of an enterprise: organizations that may use it.
    #[serde(skip)]
    pub organizations: BTreeSet<String>,
}

impl Group {
    /// The group that every account has.
    pub fn default_one() -> Self {
        Self {
            id: 1,
            name: "Default".to_owned(),
            visibility: "all".to_owned(),
            default: true,
            allows_public_repositories: false,
            restricted_to_workflows: false,
            selected_workflows: Vec::new(),
            repositories: BTreeSet::new(),
            organizations: BTreeSet::new(),
        }
    }
}

/// A scale set.
pub struct ScaleSet {
    /// Its number.
    pub id: i64,
    /// Its name.
    pub name: String,
    /// Where it is managed.
    pub level: Level,
    /// Its runner group.
    pub group: i64,
    /// Its labels: name and type.
    pub labels: Vec<(String, String)>,
    /// What its creator said of its runners.
    pub setting: Value,
    /// When it was made.
    pub created: Timestamp,
    /// Its messages.
    pub queue: Queue,
    /// Wakes its polls.
    pub wake: Arc<Notify>,
}

/// A runner made by a JIT configuration.
pub struct Runner {
    /// Its number.
    pub id: i64,
    /// Its name.
    pub name: String,
    /// Where it is managed.
    pub level: Level,
    /// Its group.
    pub group: i64,
    /// Its scale set.
    pub set: Option<i64>,
    /// Its labels, without a scale set.
    pub labels: Vec<String>,
    /// Its OAuth client id.
    pub client_id: String,
    /// Its key.
    pub key: RsaNumbers,
    /// Its session with the broker.
    pub session: Option<String>,
    /// When it was last heard of.
    pub seen: Instant,
    /// Its job.
    pub job: Option<i64>,
    /// Whether the job was delivered to it.
    pub delivered: bool,
    /// Whether it was told to cancel the job.
    pub told_to_cancel: bool,
    /// Wakes its poll.
    pub wake: Arc<Notify>,
}

/// A run of a workflow.
pub struct Run {
    /// Its number.
    pub id: i64,
    /// The key of its repository.
    pub repository: String,
    /// Its number in the repository.
    pub number: i64,
    /// Its attempt.
    pub attempt: i64,
    /// The workflow's name.
    pub workflow: String,
    /// The workflow's file.
    pub file: String,
    /// What started it.
    pub event: Event,
    /// When.
    pub created: Timestamp,
    /// Its jobs.
    pub jobs: Vec<i64>,
    /// Whether it was cancelled.
    pub cancelled: bool,
}

/// What starts a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Event {
    /// `push`, `pull_request`, `workflow_dispatch` ..
    pub name: String,
    /// `refs/heads/main`; for a pull request `refs/pull/N/merge`.
    pub git_ref: String,
    /// The commit.
    pub sha: String,
    /// Who.
    pub actor: String,
    /// Their number.
    pub actor_id: i64,
    /// For a pull request: the branch it comes from.
    pub head_ref: String,
    /// For a pull request: the branch it goes to.
    pub base_ref: String,
    /// For a pull request from a fork: the fork.
    pub head_repository: Option<String>,
    /// Inputs of `workflow_dispatch`.
    pub inputs: Map<String, Value>,
    /// The workflow file to run; none: every one that the event starts.
    pub workflow: Option<String>,
    /// For a reusable workflow: what `job_workflow_ref` says instead.
    pub job_workflow_ref: Option<String>,
}

impl Default for Event {
    fn default() -> Self {
        Self {
            name: "push".to_owned(),
            git_ref: "refs/heads/main".to_owned(),
            sha: "0123456789abcdef0123456789abcdef01234567".to_owned(),
            actor: "octocat".to_owned(),
            actor_id: 583_231,
            head_ref: String::new(),
            base_ref: String::new(),
            head_repository: None,
            inputs: Map::new(),
            workflow: None,
            job_workflow_ref: None,
        }
    }
}

impl Event {
    /// Whether it comes from a fork: such runs see no secrets and no OIDC.
    pub fn from_fork(&self) -> bool {
        self.name == "pull_request" && self.head_repository.is_some()
    }

    /// The branch by which workflow files filter.
    pub fn branch(&self) -> &str {
        if self.base_ref.is_empty() { self.git_ref.strip_prefix("refs/heads/").unwrap_or(&self.git_ref) } else { &self.base_ref }
    }
}

/// Where a job stands.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    /// It waits for other jobs.
    Blocked,
    /// It waits for an approval.
    Waiting,
    /// It waits for a runner.
    Queued,
    /// It is offered to a scale set.
    Available(i64),
    /// It is assigned to a scale set.
    Assigned(i64),
    /// A runner has it.
    Running,
    /// It is over.
    Completed,
}

/// A job.
pub struct Job {
    /// Its number: also that of its check run.
    pub id: i64,
    /// Its run.
    pub run: i64,
    /// Which attempt at the run it is of.
    pub attempt: i64,
    /// The UUID that runner and Actions service use.
    pub uuid: String,
    /// The UUID of its plan.
    pub plan_id: String,
    /// The number by which it is acquired.
    pub request: i64,
    /// What it is.
    pub plan: JobPlan,
    /// Where it stands.
    pub state: State,
    /// `success`, `failure`, `cancelled`, `skipped`.
    pub conclusion: Option<String>,
    /// The scale set that has it.
    pub set: Option<i64>,
    /// The runner that has or had it: number and name.
    pub runner: Option<(i64, String)>,
    /// How often it was assigned.
    pub assignments: u32,
    /// Scale sets that could take it.
    pub candidates: Vec<i64>,
    /// To which version of the scale sets that belongs.
    pub candidates_of: Option<u64>,
    /// When it was queued.
    pub queued: Option<Timestamp>,
    /// When it was assigned to its scale set.
    pub assigned: Option<Timestamp>,
    /// When its runner took it.
    pub started: Option<Timestamp>,
    /// When it ended.
    pub completed: Option<Timestamp>,
    /// Since when it is in its state.
    pub since: Instant,
    /// Until when its runner has it.
    pub locked_until: Instant,
    /// Whether it is to be cancelled.
    pub cancel: Option<Instant>,
    /// Steps, as the runner reported them.
    pub steps: Vec<Value>,
    /// Outputs, as the runner reported them.
    pub outputs: Map<String, Value>,
    /// Its log.
    pub log: String,
}

impl Job {
    /// `status` of the REST API.
    pub fn status(&self) -> &'static str {
        match self.state {
            State::Blocked | State::Queued | State::Available(_) | State::Assigned(_) => "queued",
            State::Waiting => "waiting",
            State::Running => "in_progress",
            State::Completed => "completed",
        }
    }
}

/// A webhook.
#[derive(Clone)]
pub struct Hook {
    /// Its number.
    pub id: i64,
    /// Where to.
    pub url: String,
    /// What signs the bodies.
    pub secret: String,
    /// Whose events; none: everybody's.
    pub organization: Option<String>,
}

/// A webhook delivery.
#[derive(Clone, Debug, Serialize)]
pub struct HookDelivery {
    /// Its GUID.
    pub guid: String,
    /// Its hook.
    pub hook: i64,
    /// `queued`, `waiting`, `in_progress`, `completed`.
    pub action: String,
    /// The job.
    pub job: i64,
    /// What the receiver answered, so far.
    pub status: Option<u16>,
    /// How often it was sent.
    pub attempts: u32,
    /// The body.
    #[serde(skip)]
    pub body: String,
}

/// Keys of the OIDC issuer.
pub struct OidcKeys {
    /// What signs.
    pub signing: Arc<RsaKey>,
    /// What JWKS shows.
    pub published: Vec<Value>,
}

/// A fault to inject.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fault {
    /// Its number.
    pub id: i64,
    /// A path, with `*` and `**`; the query does not count.
    pub path: String,
    /// A method; none: all.
    pub method: Option<String>,
    /// How often it strikes; none: always.
    pub times: Option<u32>,
    /// How many requests it lets pass first.
    pub after: u32,
    /// Answer with this status.
    pub status: Option<u16>,
    /// And this body.
    pub body: Option<String>,
    /// And these headers: `Retry-After`, say.
    pub headers: BTreeMap<String, String>,
    /// Wait so many seconds before anything else.
    pub latency: f64,
    /// Answer as usual, but without a body.
    pub empty_body: bool,
    /// Answer as usual, but with an empty `messageQueueUrl`.
    pub empty_queue_url: bool,
    /// Never answer.
    pub hang: bool,
    /// Do the work, then break the connection.
    pub drop: bool,
    /// How often it struck.
    pub struck: u32,
}

/// A request that was seen.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Seen {
    /// Counts from 1.
    pub number: u64,
    /// When it came, in seconds since 1970.
    pub at: f64,
    /// Its method.
    pub method: String,
    /// Its path.
    pub path: String,
    /// Its query.
    pub query: String,
    /// What it was answered; 0: not yet, or the asker went away.
    pub status: u16,
    /// How long that took, in seconds.
    pub took: f64,
}

/// Requests that were seen, and how many.
#[derive(Default)]
pub struct Requests {
    /// The last ones.
    pub last: VecDeque<Seen>,
    /// All of them.
    pub count: u64,
    /// By method and kind of path.
    pub by_route: BTreeMap<String, u64>,
}

/// An error of the Actions service.
#[derive(Debug)]
pub struct ServiceError {
    /// Status.
    pub status: u16,
    /// Name of the exception.
    pub kind: &'static str,
    /// What it says.
    pub message: String,
}

impl ServiceError {
    /// An error of this status, exception and text.
    pub fn new(status: u16, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into() }
    }

    /// As it is sent.
    pub fn body(&self) -> Value {
        json!({
            "$id": "1", "innerException": null, "message": self.message, "errorCode": 0, "eventId": 3000,
            "typeName": format!("{}, GitHub.Actions.Runtime.WebApi", self.kind),
            "typeKey": self.kind.rsplit('.').next(),
        })
    }
}
