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
    validation = Rule::new("!has(self.spec.provider.azure) || self.spec.lifetimeSeconds >= 5400")
        .message("Azure decides how long its tokens live, up to 5400 seconds: lifetimeSeconds has to allow for that"),
    validation = Rule::new("!has(self.spec.provider.githubApp) || self.spec.lifetimeSeconds >= 3600")
        .message("GitHub's tokens of an installation live 3600 seconds unless they are revoked: lifetimeSeconds has to allow for that"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].status"),
    printcolumn(name = "Issuer", type_ = "string", json_path = ".spec.token.issuer"),
    printcolumn(name = "Audience", type_ = "string", json_path = ".spec.token.audience", priority = "1"),
    printcolumn(name = "Identity", type_ = "string", json_path = ".status.identity"),
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
#[x_kube(validation = Rule::new("[has(self.aws), has(self.google), has(self.azure), has(self.vault), has(self.githubApp), \
    has(self.audienceToken)].filter(x, x).size() == 1")
    .message("name exactly one provider: aws, google, azure, vault, githubApp or audienceToken"))]
pub struct Provider {
    /// A session of an AWS role, by `AssumeRoleWithWebIdentity`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aws: Option<Aws>,
    /// An access token of Google Cloud, by Workload Identity Federation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub google: Option<Google>,
    /// An access token of Microsoft Entra, by a federated identity credential.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub azure: Option<Azure>,
    /// A token of HashiCorp Vault or OpenBao, by its JWT auth method. It is revoked when the job's pod ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vault: Option<Vault>,
    /// A token of a GitHub App's installation, for some repositories and permissions. It is revoked when the job's pod ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub github_app: Option<Installation>,
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

/// An access token of Google Cloud.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Google {
    /// The provider of a workload identity pool, by its resource name:
    /// `projects/NUMBER/locations/global/workloadIdentityPools/POOL/providers/PROVIDER`.
    #[schemars(
        length(max = 255),
        regex(pattern = r"^projects/[0-9]+/locations/global/workloadIdentityPools/[a-z0-9-]{4,32}/providers/[a-z0-9-]{4,32}$")
    )]
    pub workload_identity_provider: String,
    /// E-mail address of the service account that the job becomes. Without one, the token is the federated identity's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 255), regex(pattern = r"^[a-z0-9][a-z0-9-]*@[a-z0-9.-]+[.]gserviceaccount[.]com$"))]
    pub service_account: Option<String>,
    /// OAuth scopes of the token. A job may ask for one of them.
    #[serde(default = "google_scopes")]
    #[schemars(
        length(min = 1, max = 16),
        inner(length(max = 255), regex(pattern = r"^https://www[.]googleapis[.]com/auth/[a-z0-9._/-]+$"))
    )]
    pub scopes: Vec<String>,
    /// Another address of the Security Token Service than `https://sts.googleapis.com`: `https://HOST` or `https://HOST:PORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 255), regex(pattern = r"^https://[A-Za-z0-9.-]+(:[0-9]{1,5})?$"))]
    pub sts_endpoint: Option<String>,
    /// Another address of the IAM Service Account Credentials API than `https://iamcredentials.googleapis.com`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 255), regex(pattern = r"^https://[A-Za-z0-9.-]+(:[0-9]{1,5})?$"))]
    pub iam_credentials_endpoint: Option<String>,
}

impl Google {
    /// The workload identity provider, as Google's Security Token Service is asked for it.
    pub fn audience(&self) -> String {
        format!("//iam.googleapis.com/{}", self.workload_identity_provider)
    }

    /// Where Google's Security Token Service is.
    pub fn sts_endpoint(&self) -> &str {
        self.sts_endpoint.as_deref().unwrap_or("https://sts.googleapis.com")
    }

    /// Where Google's IAM Service Account Credentials API is.
    pub fn iam_credentials_endpoint(&self) -> &str {
        self.iam_credentials_endpoint.as_deref().unwrap_or("https://iamcredentials.googleapis.com")
    }
}

fn google_scopes() -> Vec<String> {
    vec!["https://www.googleapis.com/auth/cloud-platform".to_owned()]
}

/// An access token of Microsoft Entra.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Azure {
    /// Directory (tenant) ID.
    #[schemars(regex(pattern = r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"))]
    pub tenant_id: String,
    /// Application (client) ID of the application or of the user-assigned managed identity that has the federated credential.
    #[schemars(regex(pattern = r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"))]
    pub client_id: String,
    /// What there may be tokens for, each as `RESOURCE/.default`. A job asks for one of them; for the first if it does not say.
    #[serde(default = "azure_scopes")]
    #[schemars(length(min = 1, max = 16), inner(length(max = 255), regex(pattern = r"^[a-z]+://[A-Za-z0-9._:/-]+/[.]default$")))]
    pub scopes: Vec<String>,
    /// Another authority than `https://login.microsoftonline.com`, such as that of a sovereign cloud: `https://HOST` or `https://HOST:PORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 255), regex(pattern = r"^https://[A-Za-z0-9.-]+(:[0-9]{1,5})?$"))]
    pub authority_host: Option<String>,
}

fn azure_scopes() -> Vec<String> {
    vec!["https://management.azure.com/.default".to_owned()]
}

/// A token of HashiCorp Vault or OpenBao.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Vault {
    /// Its address, for broker and jobs: `https://HOST` or `https://HOST:PORT`.
    #[schemars(length(max = 255), regex(pattern = r"^https://[A-Za-z0-9.-]+(:[0-9]{1,5})?$"))]
    pub address: String,
    /// Path at which the JWT auth method is mounted.
    #[serde(default = "vault_mount")]
    #[schemars(length(max = 255), regex(pattern = r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*$"))]
    pub mount: String,
    /// Role of that auth method. Its longest life of a token (`token_ttl`) is at most `lifetimeSeconds`.
    #[schemars(length(max = 128), regex(pattern = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"))]
    pub role: String,
    /// Namespace in which the auth method is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 255), regex(pattern = r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*/?$"))]
    pub namespace: Option<String>,
}

fn vault_mount() -> String {
    "jwt".to_owned()
}

/// A token of a GitHub App's installation.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Installation {
    /// Client ID of the App: one of those that the broker can sign for (`broker.githubApps` of the chart).
    #[schemars(length(max = 64), regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"))]
    pub client_id: String,
    /// Number of the installation.
    #[schemars(range(min = 1))]
    pub installation_id: i64,
    /// Names of repositories of the installation's account, without the account.
    #[schemars(length(min = 1, max = 50), inner(length(min = 1, max = 100), regex(pattern = r"^[A-Za-z0-9._-]+$")))]
    pub repositories: Vec<String>,
    /// By its name, how much of each permission: `contents: read`.
    #[schemars(extend("maxProperties" = 30, "minProperties" = 1))]
    #[x_kube(validation = Rule::new("self.all(name, name.matches('^[a-z_]{1,64}$'))")
        .message("permissions are named as GitHub's REST API does: contents, pull_requests"))]
    pub permissions: BTreeMap<String, Permission>,
}

/// How much of a permission.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "GitHub's own words")]
pub enum Permission {
    Read,
    Write,
    Admin,
}

/// The one provider of a binding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Chosen<'a> {
    /// A session of an AWS role.
    Aws(&'a Aws),
    /// An access token of Google Cloud.
    Google(&'a Google),
    /// An access token of Microsoft Entra.
    Azure(&'a Azure),
    /// A token of Vault.
    Vault(&'a Vault),
    /// A token of a GitHub App's installation.
    GithubApp(&'a Installation),
    /// The token itself.
    AudienceToken,
}

impl Provider {
    /// The one that is named; `None` where it is none, or more than one.
    pub fn chosen(&self) -> Option<Chosen<'_>> {
        let named = [
            self.aws.as_ref().map(Chosen::Aws),
            self.google.as_ref().map(Chosen::Google),
            self.azure.as_ref().map(Chosen::Azure),
            self.vault.as_ref().map(Chosen::Vault),
            self.github_app.as_ref().map(Chosen::GithubApp),
            self.audience_token.as_ref().map(|_| Chosen::AudienceToken),
        ];
        let mut named = named.into_iter().flatten();
        named.next().filter(|_| named.next().is_none())
    }
}

impl Chosen<'_> {
    /// Whom the job becomes there, as its owner would name it.
    pub fn identity(&self) -> String {
        match self {
            Self::Aws(aws) => aws.role_arn.clone(),
            Self::Google(google) => google.service_account.clone().unwrap_or_else(|| google.audience()),
            Self::Azure(azure) => format!("{}/{}", azure.tenant_id, azure.client_id),
            Self::Vault(vault) => format!("{}/v1/auth/{}/role/{}", vault.address, vault.mount, vault.role),
            Self::GithubApp(app) => format!("GitHub App {}, installation {}", app.client_id, app.installation_id),
            Self::AudienceToken => "the token itself".to_owned(),
        }
    }

    /// What the job may ask for, if the provider has scopes.
    pub fn scopes(&self) -> &[String] {
        match self {
            Self::Google(google) => &google.scopes,
            Self::Azure(azure) => &azure.scopes,
            Self::Aws(_) | Self::Vault(_) | Self::GithubApp(_) | Self::AudienceToken => &[],
        }
    }
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
    /// Whom a job becomes by the binding: a role, a service account, an application.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    /// `Ready`, and `IssuerTrusted`; `JobBound` where it is; for a GitHub App `KeyProtected` as well.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}
