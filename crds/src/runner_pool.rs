//! `RunnerPool`: which forge, which jobs, and what a runner pod may do.
// The KubeSchema derive copies each struct into a private scope, where its `pub` leads nowhere.
#![allow(unreachable_pub)]

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A RunnerPool runs the jobs of one forge scope, each in a locked-down pod of its own in the pool's namespace.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "mayfly.dev",
    version = "v1alpha1",
    kind = "RunnerPool",
    namespaced,
    shortname = "rpool",
    category = "mayfly",
    status = "RunnerPoolStatus",
    derive = "PartialEq",
    doc = "A RunnerPool runs the jobs of one forge scope, each in a locked-down pod of its own in the pool's namespace.",
    validation = Rule::new("size(self.metadata.name) <= 40 && !self.metadata.name.contains('.')")
        .message("a RunnerPool's name has at most 40 characters and no dots: runner pods are named after it"),
    validation = Rule::new("!has(self.spec.forge.github) || !has(self.spec.jobIdentity) || self.spec.jobIdentity.issuer != 'Mayfly'")
        .message("jobIdentity.issuer: Mayfly is for forges that give their jobs no OIDC tokens; GitHub does"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].status"),
    printcolumn(name = "Isolated", type_ = "string", json_path = ".status.conditions[?(@.type=='IsolationProved')].status",
        description = "Whether runner pods were shown to be isolated"),
    printcolumn(name = "Queued", type_ = "integer", json_path = ".status.counts.queued",
        description = "Jobs this pool accepts that wait for a runner"),
    printcolumn(name = "Starting", type_ = "integer", json_path = ".status.counts.starting",
        description = "Runner pods without a job yet"),
    printcolumn(name = "Running", type_ = "integer", json_path = ".status.counts.running",
        description = "Runner pods with a job"),
    printcolumn(name = "Max", type_ = "integer", json_path = ".spec.scale.max"),
    printcolumn(name = "Scope", type_ = "string", json_path = ".status.scope", priority = "1"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].reason", priority = "1"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].message", priority = "1"),
    printcolumn(name = "Isolation", type_ = "string", json_path = ".status.conditions[?(@.type=='IsolationProved')].message", priority = "1"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct RunnerPoolSpec {
    /// The forge whose jobs this pool runs.
    pub forge: Forge,
    /// How many runner pods there may be.
    #[serde(default)]
    pub scale: Scale,
    /// Which jobs may have a runner of this pool. All that is set must hold.
    #[serde(default)]
    pub jobs: Jobs,
    /// The container that runs the job.
    #[serde(default)]
    pub runner: Runner,
    /// What a runner pod may reach.
    #[serde(default)]
    pub isolation: Isolation,
    /// How long things may take.
    #[serde(default)]
    pub deadlines: Deadlines,
    /// Who vouches for this pool's jobs.
    #[serde(default)]
    pub job_identity: JobIdentity,
}

/// Who says, to clouds and to the broker, which job this is.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct JobIdentity {
    /// Whose OIDC tokens jobs get.
    #[serde(default)]
    pub issuer: JobIssuer,
}

/// Whose OIDC tokens jobs get.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum JobIssuer {
    /// The forge's own, where it gives any.
    #[default]
    Forge,
    /// Mayfly's, for forges that give none, such as Gitea. The operator needs an address for it (`jobIdentity.issuer` of the chart). It is
    /// weaker than a forge's: what a token says is what the forge told the operator of the job, and the forge does not vouch for it.
    Mayfly,
}

/// Exactly one member names the forge.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.gitea) != has(self.github)").message("name exactly one forge: gitea or github"))]
pub struct Forge {
    /// A Gitea server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gitea: Option<Gitea>,
    /// GitHub: github.com, GHE.com or a GitHub Enterprise Server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub github: Option<Github>,
}

/// A Gitea server (1.25 or later) and the part of it that this pool serves.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Gitea {
    /// Base URL as runner pods reach it, for example `https://git.example.com`. Immutable: make a new pool instead.
    #[schemars(length(max = 512), regex(pattern = r"^https?://[A-Za-z0-9.\[\]:-]+(/[A-Za-z0-9._~/-]*)?$"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("forge.gitea.url cannot be changed: make a new RunnerPool"))]
    pub url: String,
    /// Whose jobs are served.
    pub scope: GiteaScope,
    /// Where the operator finds the access token: a Secret in the operator's namespace, never in the pool's.
    /// The token needs `write:organization` and `write:repository` (organization scope), `write:repository` (repository
    /// scope) or `write:admin` and `write:repository` (instance scope). The Secret says itself who may use it, in its annotations
    /// `mayfly.dev/forge` (this URL) and `mayfly.dev/pool-namespaces` (this pool's namespace, or a pattern of it).
    pub token_secret_ref: SecretKeyRef,
    /// Secret of the `workflow_job` webhook, in the operator's namespace and with the same annotations. Without it the pool polls only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub webhook_secret_ref: Option<SecretKeyRef>,
    /// Labels of this pool's runners: a job is served if all its `runs-on` labels are among them.
    #[schemars(length(min = 1, max = 32), inner(length(max = 63), regex(pattern = r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")))]
    pub labels: Vec<String>,
}

/// Exactly one member says how much of the Gitea server is served.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("[has(self.organization), has(self.repository), has(self.instance)].filter(x, x).size() == 1")
    .message("name exactly one scope: organization, repository or instance"))]
#[x_kube(validation = Rule::new("self == oldSelf").message("forge.gitea.scope cannot be changed: make a new RunnerPool"))]
pub struct GiteaScope {
    /// All repositories of this organization (or user).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 100), regex(pattern = r"^[A-Za-z0-9._-]+$"))]
    pub organization: Option<String>,
    /// One repository, as `owner/name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 201), regex(pattern = r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$"))]
    pub repository: Option<String>,
    /// The whole server. Needs the token of a site administrator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<Instance>,
}

/// The whole server; has no settings.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
pub struct Instance {}

/// A runner scale set of GitHub's (github.com, GHE.com, GitHub Enterprise Server 3.9 or later).
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.app) != has(self.tokenSecretRef)").message("name exactly one credential: app or tokenSecretRef"))]
#[x_kube(validation = Rule::new(
    "!(has(self.runnerGroup) && self.runnerGroup.requireSelectedWorkflows) || self.url.matches('^https?://[^/]+/[^/]+/?$') || \
     self.url.matches('(?i)^https?://[^/]+/enterprises/')"
).message("runnerGroup.requireSelectedWorkflows: the runners of a repository are in no runner group, which could restrict them"))]
#[x_kube(validation = Rule::new("!has(self.justInTime) || has(self.webhookSecretRef)")
    .message("justInTime needs webhookSecretRef: GitHub tells of jobs by webhooks"))]
#[x_kube(validation = Rule::new("!has(self.justInTime) || !has(self.scaleSet) || (!has(self.scaleSet.name) && !has(self.scaleSet.labels))")
    .message("name at most one of justInTime and scaleSet"))]
#[x_kube(validation = Rule::new(
    "!has(self.justInTime) || !has(self.runnerGroup) || has(self.runnerGroup.name) || \
     !(self.runnerGroup.requireSelectedRepositories || self.runnerGroup.requireSelectedWorkflows)"
).message("justInTime: without runnerGroup.name its runners are in no runner group, which could be restricted"))]
#[x_kube(validation = Rule::new("has(self.justInTime) == has(oldSelf.justInTime)")
    .message("forge.github cannot change between scaleSet and justInTime: make a new RunnerPool"))]
pub struct Github {
    /// Address of the enterprise, organization or repository: `https://github.com/acme`, `https://github.com/acme/web` or
    /// `https://github.com/enterprises/acme`, or the same on another host. Immutable: make a new pool instead.
    #[schemars(length(max = 512), regex(pattern = r"^https?://[A-Za-z0-9.:-]+/[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?/?$"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("forge.github.url cannot be changed: make a new RunnerPool"))]
    pub url: String,
    /// The GitHub App that is installed there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app: Option<GithubApp>,
    /// A personal access token, in a Secret of the operator's namespace with the annotations that `app.privateKeySecretRef` needs. It is a
    /// person's and lives long: an App is better, and the condition `ForgeReachable` says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_secret_ref: Option<SecretKeyRef>,
    /// In which runner group the scale set is. A repository's scale sets are in none.
    #[serde(default)]
    pub runner_group: GithubRunnerGroup,
    /// The scale set, which the operator makes and, with the pool, removes.
    #[serde(default)]
    pub scale_set: GithubScaleSet,
    /// Runners without a scale set, each registered for one job. GitHub tells of jobs by webhooks then: `webhookSecretRef` is needed. A pool
    /// cannot change from one to the other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub just_in_time: Option<GithubJustInTime>,
    /// Secret of the `workflow_job` webhook, in the operator's namespace and with the same annotations. Messages of the scale set come
    /// without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub webhook_secret_ref: Option<SecretKeyRef>,
}

/// Runners without a scale set.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GithubJustInTime {
    /// Labels of this pool's runners: a job is served if all its `runs-on` labels are among them. GitHub adds none by itself.
    #[schemars(length(min = 1, max = 32), inner(length(max = 63), regex(pattern = r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")))]
    pub labels: Vec<String>,
}

/// An installed GitHub App.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GithubApp {
    /// Client id of the App, as its settings show it; its number is taken as well.
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Za-z0-9._-]+$"))]
    pub client_id: String,
    /// Number of the installation, as its address shows it.
    #[schemars(range(min = 1))]
    pub installation_id: u64,
    /// The App's private key, PEM: a Secret in the operator's namespace, never in the pool's. The Secret says itself who may use it, in its
    /// annotations `mayfly.dev/forge` (the pool's url) and `mayfly.dev/pool-namespaces` (this pool's namespace, or a pattern of it).
    pub private_key_secret_ref: SecretKeyRef,
}

/// A runner group, and how open it may be.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GithubRunnerGroup {
    /// Its name. Without one, the default group, which has to be allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$"))]
    pub name: Option<String>,
    /// Serve a group that every repository of the organization may use, those to come included.
    #[serde(default)]
    pub allow_default_group: bool,
    /// Serve public repositories, in which anybody may open a pull request.
    #[serde(default)]
    pub allow_public_repositories: bool,
    /// Refuse a group that every repository of the organization may use; of an enterprise, every organization.
    #[serde(default)]
    pub require_selected_repositories: bool,
    /// Refuse a group that jobs of every workflow may use. A repository's scale sets are in no group, so that there it cannot hold.
    #[serde(default)]
    pub require_selected_workflows: bool,
}

/// A runner scale set.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GithubScaleSet {
    /// Its name, which workflows may name in `runs-on`. Default: the pool's name. Immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("forge.github.scaleSet.name cannot be changed: make a new RunnerPool"))]
    pub name: Option<String>,
    /// Further labels for `runs-on`. GitHub Enterprise Server takes them from 3.21 on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(max = 63), regex(pattern = r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")))]
    pub labels: Vec<String>,
}

/// One key of a Secret in the operator's namespace.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[serde(rename_all = "camelCase")]
pub struct SecretKeyRef {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"))]
    pub name: String,
    /// Key in the Secret.
    #[serde(default = "default_secret_key")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[A-Za-z0-9._-]+$"))]
    pub key: String,
}

fn default_secret_key() -> String {
    "token".to_owned()
}

/// How many runner pods there may be.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.warm <= self.max").message("scale.warm cannot be more than scale.max"))]
pub struct Scale {
    /// Most runner pods at any moment, whatever they are doing.
    #[serde(default = "default_max")]
    #[schemars(range(min = 1, max = 1000))]
    pub max: u32,
    /// Pods kept waiting ahead of demand. They have no registration until a job needs one.
    #[serde(default)]
    #[schemars(range(min = 0, max = 100))]
    pub warm: u32,
}

fn default_max() -> u32 {
    10
}

impl Default for Scale {
    fn default() -> Self {
        Self { max: default_max(), warm: 0 }
    }
}

/// Which jobs may have a runner of this pool.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Jobs {
    /// Repositories as `owner/name`, with `*` and `?`. Empty: every repository of the scope.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100), inner(length(min = 1, max = 201)))]
    pub repositories: Vec<String>,
    /// Workflow files such as `release.yml`, with `*` and `?`. Empty: every workflow.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100), inner(length(min = 1, max = 255)))]
    pub workflows: Vec<String>,
    /// Events such as `push`. Empty: every event but `pull_request_target`, which runs with the base repository's secrets on
    /// behalf of whoever opened the pull request and has to be named.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 50), inner(length(min = 1, max = 64), regex(pattern = r"^[a-z_]+$")))]
    pub events: Vec<String>,
    /// Jobs of pull requests from forks: anybody who may fork writes their code.
    #[serde(default)]
    pub forks: Forks,
}

/// What to do with jobs of pull requests from forks.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Forks {
    /// They get no runner.
    #[default]
    Deny,
    /// They are served as any other job.
    Allow,
}

/// The container that runs the job: a list of what may be chosen, never a whole pod.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Runner {
    /// Image with the forge's runner program. Default: the operator's `--runner-image` or `--github-runner-image`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512), regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$"))]
    pub image: Option<String>,
    /// `Always`, `IfNotPresent` (the default) or `Never`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_pull_policy: Option<ImagePullPolicy>,
    /// Secrets in the pool's namespace with which the kubelet pulls the pod's images. Jobs cannot read them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub image_pull_secrets: Vec<ImagePullSecret>,
    /// Entry point; default is the image's. It waits for the registration at `$MAYFLY_REGISTRATION` (see docs/runner-images.md).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 1024)))]
    pub command: Vec<String>,
    /// Environment of the runner, which every step of a job can read: no secrets here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100))]
    pub env: Vec<EnvVar>,
    /// Resources of the runner container. Limits for `cpu`, `memory` and `ephemeral-storage` always exist: what is not set
    /// here is 2, 4Gi and 12Gi.
    #[serde(default)]
    pub resources: Resources,
    /// Size of the job's home, which holds its workspace. Default 10Gi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<Quantity>,
    /// Nodes that runner pods may run on.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that runner pods tolerate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub tolerations: Vec<Toleration>,
    /// RuntimeClass of runner pods, for example one for virtual machines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub runtime_class_name: Option<String>,
}

/// When the kubelet pulls an image.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImagePullPolicy {
    /// Before every start.
    Always,
    /// Where the node does not have it.
    IfNotPresent,
    /// Never: the image is on the node.
    Never,
}

/// A Secret of type `kubernetes.io/dockerconfigjson`.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
pub struct ImagePullSecret {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"))]
    pub name: String,
}

impl ImagePullPolicy {
    /// As Kubernetes spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Always => "Always",
            Self::IfNotPresent => "IfNotPresent",
            Self::Never => "Never",
        }
    }
}

/// An environment variable with a value that is no secret.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct EnvVar {
    /// Name of the variable.
    #[schemars(length(min = 1, max = 128), regex(pattern = r"^[A-Za-z_][A-Za-z0-9_]*$"))]
    #[x_kube(validation = Rule::new("!self.startsWith('MAYFLY_')").message("names that begin with MAYFLY_ are Mayfly's own"))]
    pub name: String,
    /// Its value.
    #[serde(default)]
    #[schemars(length(max = 4096))]
    pub value: String,
}

/// Compute resources.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    /// What is kept free for the pod.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub requests: BTreeMap<String, Quantity>,
    /// The most it may use.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub limits: BTreeMap<String, Quantity>,
}

/// What a runner pod may reach. DNS, the forge and the operator's gate are always reachable; nothing reaches the pod.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Isolation {
    /// What happens to a pod that is not shown to be isolated.
    #[serde(default)]
    pub enforcement: Enforcement,
    /// Connections out of the pod.
    #[serde(default)]
    pub egress: Egress,
}

/// What happens to a pod that is not shown to be isolated.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Enforcement {
    /// It gets no registration, and so no job; one that has a job loses it.
    #[default]
    Require,
    /// It runs jobs all the same; the condition `IsolationProved` and an event say so.
    Warn,
}

/// Connections out of the pod.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Egress {
    /// Public addresses on TCP 443 and 80. Private, link-local, metadata and cluster ranges stay closed.
    #[serde(default)]
    pub internet: bool,
    /// Further destinations, for example a package mirror. A range that covers a metadata endpoint is refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 50))]
    pub allow: Vec<EgressAllow>,
    /// Host names outside of the cluster, for example a package registry. It takes a network engine that knows names (Cilium): the
    /// condition `EgressHostsEnforced` says whether there is one. Without it they stay closed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 50))]
    pub hosts: Vec<EgressHost>,
}

/// Addresses of metadata and credential endpoints of clouds, in which no allowed range may be. The operator's own list
/// (`metadata-endpoints.yaml`, with sources) has these and, in a form that the API server's expressions do not read, IPv4-mapped ones.
pub const METADATA_ADDRESSES: [&str; 19] = [
    "100.100.100.200",
    "168.63.129.16",
    "169.254.0.23",
    "169.254.169.252",
    "169.254.169.254",
    "169.254.170.2",
    "169.254.170.23",
    "169.254.172.1",
    "169.254.42.42",
    "192.0.0.192",
    "2002:a9fe:a9fe::1",
    "64:ff9b::a9fe:a9fe",
    "fd00:42::42",
    "fd00:a9fe:a9fe::1",
    "fd00:c1::a9fe:a9fe",
    "fd00:ec2::23",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fe80::a9fe:a9fe",
];

/// In the language of the API server's validation; a text that is no range is told so by another rule.
fn without_metadata() -> String {
    format!("!isCIDR(self) || {METADATA_ADDRESSES:?}.all(address, !cidr(self).containsIP(address))")
}

/// A destination.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct EgressAllow {
    /// Address range, for example `203.0.113.0/24` or `2001:db8::/48`.
    #[schemars(length(max = 43))]
    #[x_kube(validation = Rule::new("isCIDR(self)").message("not an address range: write 203.0.113.7/32 or 2001:db8::/48"))]
    #[x_kube(validation = Rule::new(without_metadata())
        .message("covers a metadata endpoint (such as 169.254.169.254), which no job may reach: name smaller ranges"))]
    pub cidr: String,
    /// TCP ports. At least one.
    #[schemars(length(min = 1, max = 32), inner(range(min = 1, max = 65535)))]
    pub ports: Vec<u16>,
}

/// A destination by name.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct EgressHost {
    /// A name such as `registry.example.org`, or `*.example.org` for names one label below. In small letters, of two labels or more
    /// without the `*`.
    #[schemars(length(max = 253))]
    #[x_kube(validation = Rule::new(r"self.matches(r'^(\*\.)?([a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])?$')")
        .message("not a host name: write registry.example.org, or *.example.org for names one label below"))]
    pub host: String,
    /// TCP ports. At least one.
    #[schemars(length(min = 1, max = 32), inner(range(min = 1, max = 65535)))]
    pub ports: Vec<u16>,
}

/// How long things may take, as `90s`, `10m` or `1h30m`.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Deadlines {
    /// From the pod's creation until it waits for a job.
    #[serde(default = "default_start")]
    #[schemars(length(max = 16), regex(pattern = r"^([0-9]+(h|m|s))+$"))]
    pub start: String,
    /// From registration until the runner has a job.
    #[serde(default = "default_idle")]
    #[schemars(length(max = 16), regex(pattern = r"^([0-9]+(h|m|s))+$"))]
    pub idle: String,
    /// For the job itself.
    #[serde(default = "default_job")]
    #[schemars(length(max = 16), regex(pattern = r"^([0-9]+(h|m|s))+$"))]
    pub job: String,
}

fn default_start() -> String {
    "5m".to_owned()
}

fn default_idle() -> String {
    "5m".to_owned()
}

fn default_job() -> String {
    "6h".to_owned()
}

impl Default for Deadlines {
    fn default() -> Self {
        Self { start: default_start(), idle: default_idle(), job: default_job() }
    }
}

/// What the operator last saw.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct RunnerPoolStatus {
    /// Generation of the spec that the rest speaks of; set only after a pass without errors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Ready`, `ForgeReachable`, `IsolationProved`, `UserNamespaces`, `Overlapping`, `EgressHostsEnforced`, `QuotaSuffices`,
    /// `RunnerGroupMatches`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// The forge and scope in one line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub scope: String,
    /// The scale set at GitHub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_set: Option<ScaleSetStatus>,
    /// Numbers at the last pass.
    #[serde(default)]
    pub counts: Counts,
    /// What the last runner pod on each node found of its isolation; up to fifty nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub isolation: Vec<NodeIsolation>,
    /// Up to ten jobs that wait, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waiting_jobs: Vec<WaitingJob>,
    /// The last runner that ended other than by finishing its job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<Failure>,
}

/// A scale set at GitHub, and the session in which its messages come: a process that takes over goes on with it.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ScaleSetStatus {
    /// GitHub's number of it.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// The open session. It is worth nothing without the pool's credential.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<String>,
}

/// Numbers at the last pass.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    /// Accepted jobs that wait for a runner.
    pub queued: u32,
    /// Runner pods without a job yet.
    pub starting: u32,
    /// Runner pods with a job.
    pub running: u32,
}

/// What a runner pod found of its isolation.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct NodeIsolation {
    /// Name of the node.
    pub node: String,
    /// The worst of the classes.
    pub verdict: IsolationVerdict,
    /// Since when the classes are as they are here.
    pub since: Time,
    /// What enforces policies there, as far as the cluster tells: kernel, runtime, kubelet, boot, network plugin. A change of it is a
    /// reason for a new proof.
    #[serde(default)]
    pub environment: String,
    /// Where it was tried what answers without a policy.
    #[serde(default)]
    pub control: Control,
    /// Verdict by class of address.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<ClassIsolation>,
    /// What was open at the start of pods.
    #[serde(default)]
    pub starts: Starts,
}

/// What the silence of a runner pod is held against.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Control {
    /// The operator, wherever it is.
    #[default]
    Operator,
    /// A sentinel on the pod's own node, and the operator.
    Node,
}

/// How runner pods fared from their first instruction on, before anything was asked of them. Counted by one process of the operator.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Starts {
    /// Pods that told.
    pub pods: u32,
    /// Pods that a sentinel answered before their policies were enforced.
    pub leaks: u32,
    /// Latest such answer, in milliseconds after the first instruction.
    pub latest_milliseconds: u32,
}

/// What was shown of a pod's isolation, from the best to the worst.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum IsolationVerdict {
    /// What must not answer did not, and answered where no policy stands in the way.
    Proved,
    /// Nothing was shown.
    Unproven,
    /// Something answered that must not.
    Breach,
}

impl IsolationVerdict {
    /// As it is spelled in statuses and events.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Proved => "Proved",
            Self::Unproven => "Unproven",
            Self::Breach => "Breach",
        }
    }
}

/// The verdict about one class of addresses.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ClassIsolation {
    /// `Metadata`, `Outside`, `Node`, `OtherNode`, `ApiServer`, `Pods` or `Services`; `Required` for what must be reachable.
    pub class: String,
    /// What was shown.
    pub verdict: IsolationVerdict,
    /// What it rests on.
    pub message: String,
}

/// A job that waits, and why.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct WaitingJob {
    /// `owner/repository#id`.
    pub job: String,
    /// A word for programs.
    pub reason: String,
    /// A sentence for a person.
    pub message: String,
}

/// A runner that ended other than by finishing its job.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// Name of the runner and of its pod, which is gone.
    pub runner: String,
    /// A word for programs.
    pub reason: String,
    /// A sentence for a person.
    pub message: String,
    /// When.
    pub time: Time,
}
