//! `CredentialBinding`: which job may become which cloud identity.
// The KubeSchema derive copies each struct into a private scope, where its `pub` leads nowhere.
#![allow(unreachable_pub)]

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod rules;

pub use rules::{Claim, DEFAULT_EVENTS, Fault, NEVER_EVENTS, is_organization_audience};

/// Shortest life of a credential, in seconds: the shortest that AWS gives.
pub const LIFETIME_MIN: u32 = 900;
/// Longest life of a credential, in seconds: the longest that AWS gives.
pub const LIFETIME_MAX: u32 = 43_200;

/// A CredentialBinding says which jobs of which pools get which short-lived credential for their own OIDC token.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "mayfly.dev",
    version = "v1alpha1",
    kind = "CredentialBinding",
    namespaced,
    shortname = "cbind",
    category = "mayfly",
    status = "CredentialBindingStatus",
    derive = "PartialEq",
    doc = "A CredentialBinding says which jobs of which pools get which short-lived credential for their own OIDC token.",
    validation = Rule::new("!has(self.spec.production) || !self.spec.production || ('environment' in self.spec.subject.claims && \
        !has(self.spec.subject.claims['environment'].prefixSegments)) || ('ref_protected' in self.spec.subject.claims && \
        has(self.spec.subject.claims['ref_protected'].exact) && self.spec.subject.claims['ref_protected'].exact == 'true')")
        .message("a binding for production needs a protected ref (ref_protected: {exact: 'true'}) or a named environment: whoever may push \
            a branch would have the credential"),
    validation = Rule::new("!has(self.spec.provider.aws) || !has(self.spec.provider.aws.durationSeconds) || \
        self.spec.provider.aws.durationSeconds <= self.spec.lifetimeSeconds")
        .message("provider.aws.durationSeconds cannot be more than lifetimeSeconds"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].status"),
    printcolumn(name = "Issuer", type_ = "string", json_path = ".spec.token.issuer"),
    printcolumn(name = "Audience", type_ = "string", json_path = ".spec.token.audience", priority = "1"),
    printcolumn(name = "Role", type_ = "string", json_path = ".spec.provider.aws.roleArn"),
    printcolumn(name = "Production", type_ = "boolean", json_path = ".spec.production"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].message", priority = "1"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct CredentialBindingSpec {
    /// RunnerPools of this namespace whose jobs may use the binding.
    #[schemars(length(min = 1, max = 50), inner(length(min = 1, max = 40), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")))]
    pub pools: Vec<String>,
    /// The token that a job has to show.
    pub token: Token,
    /// What the token has to say of the job.
    pub subject: Subject,
    /// The credential is one for production: a job needs a protected ref or a named environment.
    #[serde(default)]
    pub production: bool,
    /// Longest life of a credential, in seconds. A job may ask for less.
    #[serde(default = "default_lifetime")]
    #[schemars(range(min = 900, max = 43200))]
    pub lifetime_seconds: u32,
    /// What the job gets.
    pub provider: Provider,
}

fn default_lifetime() -> u32 {
    3600
}

/// The token that a job has to show.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!self.audience.matches('^https?://(www[.])?github[.]com(/.*)?$') && \
    !self.audience.matches('^https?://[^/]+[.]ghe[.]com(/.*)?$') && \
    !(self.audience.matches('^https?://') && self.audience.split('/')[2] == self.issuer.split('/')[2])")
    .message("this audience is one that a whole organization shares: name one of this binding's own"))]
pub struct Token {
    /// Who issued it, to the letter: one of the issuers in the operator's configuration, such as
    /// `https://token.actions.githubusercontent.com`.
    #[schemars(length(min = 8, max = 512), regex(pattern = r"^https?://[A-Za-z0-9.:-]+(/[A-Za-z0-9._~/-]*)?$"))]
    pub issuer: String,
    /// For whom: the token's one audience, to the letter. One of this binding's own is best. `https://github.com/OWNER`, which GitHub puts
    /// in where nothing was asked for, is refused.
    #[schemars(length(min = 1, max = 255), regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9:/._@+=-]*$"))]
    pub audience: String,
}

/// What the token has to say of the job.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Subject {
    /// By the name of the claim, what it has to be. All of them must hold, and a claim that the token lacks does not.
    #[schemars(extend("maxProperties" = 24, "minProperties" = 1))]
    #[x_kube(validation = Rule::new("self.all(name, name in ['repository', 'repository_id', 'repository_owner', 'repository_owner_id', \
        'repository_visibility', 'ref', 'ref_type', 'ref_protected', 'base_ref', 'head_ref', 'sha', 'environment', 'event_name', \
        'workflow', 'workflow_ref', 'workflow_sha', 'job_workflow_ref', 'job_workflow_sha', 'actor', 'actor_id', 'runner_environment', \
        'enterprise', 'enterprise_id'])").message("a claim that Mayfly does not know: docs/credentialbinding.md lists those it does"))]
    #[x_kube(validation = Rule::new("'repository_id' in self || 'repository' in self")
        .message("no repository: name repository_id, or repository together with repository_owner_id"))]
    #[x_kube(validation = Rule::new("'repository_id' in self || 'repository_owner_id' in self")
        .message("names can be taken over after a rename or deletion: name repository_id, or repository_owner_id beside repository"))]
    #[x_kube(validation = Rule::new("!('environment' in self) || 'event_name' in self")
        .message("an environment alone does not say what started the job: name event_name as well"))]
    #[x_kube(validation = Rule::new("!('event_name' in self) || !((has(self['event_name'].exact) && self['event_name'].exact == \
        'pull_request_target') || (has(self['event_name'].oneOf) && 'pull_request_target' in self['event_name'].oneOf))")
        .message("pull_request_target runs with the base repository's rights on behalf of whoever opened the pull request"))]
    #[x_kube(validation = Rule::new("self.all(name, !has(self[name].prefixSegments) || name in ['repository', 'ref', 'base_ref', \
        'workflow_ref', 'job_workflow_ref'])")
        .message("prefixSegments is for claims that are paths: repository, ref, base_ref, workflow_ref, job_workflow_ref"))]
    #[x_kube(validation = Rule::new("self.all(name, !name.endsWith('_id') || ((!has(self[name].exact) || \
        self[name].exact.matches('^[0-9]+$')) && (!has(self[name].oneOf) || self[name].oneOf.all(id, id.matches('^[0-9]+$')))))")
        .message("claims that end in _id are numbers"))]
    #[x_kube(validation = Rule::new("!('ref' in self) || !has(self['ref'].prefixSegments) || \
        self['ref'].prefixSegments.matches('^refs/(heads|tags)/[^/]+')")
        .message("a prefix of refs names more than refs/heads or refs/tags: that would be every branch"))]
    pub claims: BTreeMap<String, Matcher>,
}

/// Exactly one member says what a claim has to be. There are no wildcards and no regular expressions.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("[has(self.exact), has(self.oneOf), has(self.prefixSegments)].filter(x, x).size() == 1")
    .message("name exactly one of exact, oneOf and prefixSegments"))]
pub struct Matcher {
    /// This value, to the letter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512), regex(pattern = r"^[^*?\x00-\x1f]+$"))]
    pub exact: Option<String>,
    /// One of these values, to the letter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 32), inner(length(min = 1, max = 512), regex(pattern = r"^[^*?\x00-\x1f]+$")))]
    pub one_of: Option<Vec<String>>,
    /// These first segments of a path, and at least one more: `refs/heads/release` fits `refs/heads/release/1.2`, but neither
    /// `refs/heads/release` nor `refs/heads/release-1.2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512), regex(pattern = r"^[^*?/\x00-\x1f]+(/[^*?/\x00-\x1f]+)*$"))]
    pub prefix_segments: Option<String>,
}

/// Exactly one member says what the job gets.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.aws) != has(self.audienceToken)").message("name exactly one provider: aws or audienceToken"))]
pub struct Provider {
    /// A session of an AWS role, by `AssumeRoleWithWebIdentity`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aws: Option<Aws>,
    /// The token itself, for anything that takes one. Nothing is exchanged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audience_token: Option<AudienceToken>,
}

/// A session of an AWS role.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Aws {
    /// The role. Its trust policy names the issuer, the audience and the repository.
    #[schemars(length(min = 20, max = 2048), regex(pattern = r"^arn:[a-z0-9-]+:iam::[0-9]*:role/[A-Za-z0-9+=,.@_/-]+$"))]
    pub role_arn: String,
    /// Region whose STS is asked.
    #[schemars(length(min = 5, max = 32), regex(pattern = r"^[a-z]{2,}(-[a-z]+)+-[0-9]{1,2}$"))]
    pub region: String,
    /// Another STS than the region's: `https://HOST` or `https://HOST:PORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 255), regex(pattern = r"^https://[A-Za-z0-9.-]+(:[0-9]{1,5})?$"))]
    pub endpoint: Option<String>,
    /// Life of a session, in seconds. Default: `lifetimeSeconds`. The role's own longest life is not looked at: AWS refuses more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 900, max = 43200))]
    pub duration_seconds: Option<u32>,
    /// Policy (JSON) that narrows the role for the session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 2048))]
    pub session_policy: Option<String>,
    /// Managed policies that narrow the role for the session.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 10),
        inner(length(min = 20, max = 2048), regex(pattern = r"^arn:[a-z0-9-]+:iam::([0-9]{12}|aws):policy/[A-Za-z0-9+=,.@_/-]+$"))
    )]
    pub policy_arns: Vec<String>,
}

/// The token itself; has no settings.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
pub struct AudienceToken {}

/// What the operator last saw. Exchanges are not counted here: the broker writes nothing in the cluster.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct CredentialBindingStatus {
    /// Generation of the spec that the rest speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Ready` and `IssuerTrusted`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}
