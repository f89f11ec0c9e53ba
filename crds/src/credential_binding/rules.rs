//! What a binding must not be. The same as the rules of its definition, for whoever acts on a binding: admission may have been off.

use std::fmt;
use std::str::FromStr;

use super::{Chosen, CredentialBindingSpec, LIFETIME_MAX, LIFETIME_MIN, Matcher, Token};

/// Events that a binding takes where it names none: somebody with write access, or the forge's own clock, started the job.
pub const DEFAULT_EVENTS: [&str; 7] =
    ["push", "schedule", "workflow_dispatch", "repository_dispatch", "release", "merge_group", "deployment"];
/// Events that no binding takes: they run with the base repository's rights on input of strangers.
pub const NEVER_EVENTS: [&str; 1] = ["pull_request_target"];

/// Longest life that Azure gives its tokens by itself, in seconds (learn.microsoft.com, "Access tokens in the Microsoft identity platform").
const AZURE_LIFETIME: u32 = 5_400;
/// Life of a token of an installation, in seconds (docs.github.com, "Generating an installation access token for a GitHub App").
const GITHUB_LIFETIME: u32 = 3_600;
/// Longest value of a matcher, in bytes.
const VALUE_MAX: usize = 512;

macro_rules! claims {
    ($($name:ident = $text:literal),* $(,)?) => {
        /// A claim that a binding may speak of.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[allow(missing_docs, reason = "each is named after its claim, which GitHub documents")]
        pub enum Claim { $($name),* }

        impl Claim {
            /// All of them.
            pub const ALL: &[Claim] = &[$(Claim::$name),*];

            /// Its name in the token.
            pub fn as_str(self) -> &'static str {
                match self { $(Claim::$name => $text),* }
            }
        }
    };
}

claims! {
    Repository = "repository",
    RepositoryId = "repository_id",
    RepositoryOwner = "repository_owner",
    RepositoryOwnerId = "repository_owner_id",
    RepositoryVisibility = "repository_visibility",
    Ref = "ref",
    RefType = "ref_type",
    RefProtected = "ref_protected",
    BaseRef = "base_ref",
    HeadRef = "head_ref",
    Sha = "sha",
    Environment = "environment",
    EventName = "event_name",
    Workflow = "workflow",
    WorkflowRef = "workflow_ref",
    WorkflowSha = "workflow_sha",
    JobWorkflowRef = "job_workflow_ref",
    JobWorkflowSha = "job_workflow_sha",
    Actor = "actor",
    ActorId = "actor_id",
    RunnerEnvironment = "runner_environment",
    Enterprise = "enterprise",
    EnterpriseId = "enterprise_id",
}

impl Claim {
    /// Its value is a number.
    pub fn is_id(self) -> bool {
        self.as_str().ends_with("_id")
    }

    /// Its value is a path, whose first segments may be named.
    pub fn is_path(self) -> bool {
        matches!(self, Self::Repository | Self::Ref | Self::BaseRef | Self::WorkflowRef | Self::JobWorkflowRef)
    }
}

impl FromStr for Claim {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        Self::ALL.iter().copied().find(|claim| claim.as_str() == name).ok_or(())
    }
}

/// Why a binding is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault(&'static str);

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// Whether an audience is one that a whole organization shares: what GitHub puts in where nothing was asked for, `https://HOST/OWNER`.
pub fn is_organization_audience(issuer: &str, audience: &str) -> bool {
    let host = |url: &str| {
        let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"))?;
        Some(rest.split('/').next().unwrap_or_default().split(':').next().unwrap_or_default().to_ascii_lowercase())
    };
    let Some(of_audience) = host(audience) else { return false };
    let github = ["github.com", "www.github.com"].contains(&of_audience.as_str()) || of_audience.ends_with(".ghe.com");
    github || host(issuer).is_some_and(|of_issuer| of_issuer == of_audience)
}

impl CredentialBindingSpec {
    /// The first rule that the binding breaks.
    ///
    /// # Errors
    /// The rule, as a sentence for the binding's owner.
    pub fn check(&self) -> Result<(), Fault> {
        if self.pools.is_empty() {
            return Err(Fault("no pool is named"));
        }
        token(&self.token)?;
        self.claims()?;
        self.production()?;
        let lifetimes = [Some(self.lifetime_seconds), self.provider.aws.as_ref().and_then(|aws| aws.duration_seconds)];
        if lifetimes.iter().flatten().any(|seconds| !(LIFETIME_MIN..=LIFETIME_MAX).contains(seconds)) {
            return Err(Fault("a lifetime is between 900 and 43200 seconds"));
        }
        match self.provider.chosen() {
            None => Err(Fault("name exactly one provider: aws, google, azure, vault, githubApp or audienceToken")),
            Some(Chosen::Azure(_)) if self.lifetime_seconds < AZURE_LIFETIME => {
                Err(Fault("Azure decides how long its tokens live, up to 5400 seconds: lifetimeSeconds has to allow for that"))
            }
            Some(Chosen::GithubApp(_)) if self.lifetime_seconds < GITHUB_LIFETIME => Err(Fault(
                "GitHub's tokens of an installation live 3600 seconds unless they are revoked: lifetimeSeconds has to allow for that",
            )),
            // Without them it would be everything that the installation has.
            Some(Chosen::GithubApp(app)) if app.repositories.is_empty() || app.permissions.is_empty() => {
                Err(Fault("no repository, or no permission, is named"))
            }
            Some(chosen) if matches!(chosen, Chosen::Google(_) | Chosen::Azure(_)) && chosen.scopes().is_empty() => {
                Err(Fault("no scope is named"))
            }
            Some(_) => Ok(()),
        }
    }

    fn matcher(&self, claim: Claim) -> Option<&Matcher> {
        self.subject.claims.get(claim.as_str())
    }

    fn claims(&self) -> Result<(), Fault> {
        let has = |claim| self.matcher(claim).is_some();
        for (name, matcher) in &self.subject.claims {
            let claim = name.parse().map_err(|()| Fault("subject.claims names a claim that Mayfly does not know"))?;
            one(claim, matcher)?;
        }
        if !has(Claim::RepositoryId) && !has(Claim::Repository) {
            return Err(Fault("no repository: name repository_id, or repository together with repository_owner_id"));
        }
        if !has(Claim::RepositoryId) && !has(Claim::RepositoryOwnerId) {
            return Err(Fault("names can be taken over: name repository_id, or repository_owner_id beside repository"));
        }
        if has(Claim::Environment) && !has(Claim::EventName) {
            return Err(Fault("an environment alone does not say what started the job: name event_name as well"));
        }
        let events = self.matcher(Claim::EventName).map(values).unwrap_or_default();
        if events.iter().any(|event| NEVER_EVENTS.contains(event)) {
            return Err(Fault("pull_request_target runs with the base repository's rights on behalf of whoever opened the pull request"));
        }
        Ok(())
    }

    fn production(&self) -> Result<(), Fault> {
        let protected = self.matcher(Claim::RefProtected).is_some_and(|matcher| matcher.exact.as_deref() == Some("true"));
        if self.production && !protected && self.matcher(Claim::Environment).is_none() {
            return Err(Fault("a binding for production needs ref_protected: {exact: 'true'} or a named environment"));
        }
        Ok(())
    }
}

fn token(token: &Token) -> Result<(), Fault> {
    if token.audience.is_empty() || token.audience.contains(['*', '?']) {
        return Err(Fault("token.audience has to be one audience, to the letter"));
    }
    if is_organization_audience(&token.issuer, &token.audience) {
        return Err(Fault("token.audience is one that a whole organization shares"));
    }
    Ok(())
}

/// The values of a matcher, whatever its kind.
fn values(matcher: &Matcher) -> Vec<&str> {
    let single = matcher.exact.iter().chain(&matcher.prefix_segments).map(String::as_str);
    single.chain(matcher.one_of.iter().flatten().map(String::as_str)).collect()
}

fn one(claim: Claim, matcher: &Matcher) -> Result<(), Fault> {
    let kinds = [matcher.exact.is_some(), matcher.one_of.is_some(), matcher.prefix_segments.is_some()];
    if kinds.iter().filter(|set| **set).count() != 1 {
        return Err(Fault("a matcher has exactly one of exact, oneOf and prefixSegments"));
    }
    let values = values(matcher);
    let odd =
        |value: &&str| value.is_empty() || value.len() > VALUE_MAX || value.contains(['*', '?']) || value.chars().any(char::is_control);
    if values.is_empty() || values.iter().any(odd) {
        return Err(Fault("a matcher's values are taken to the letter: no wildcards, no control characters, nothing empty"));
    }
    if claim.is_id() && values.iter().any(|value| !value.bytes().all(|byte| byte.is_ascii_digit())) {
        return Err(Fault("claims that end in _id are numbers"));
    }
    let Some(prefix) = &matcher.prefix_segments else { return Ok(()) };
    if !claim.is_path() {
        return Err(Fault("prefixSegments is for claims that are paths"));
    }
    let segments: Vec<&str> = prefix.split('/').collect();
    if segments.iter().any(|segment| segment.is_empty()) {
        return Err(Fault("a prefix has no empty segments"));
    }
    let every_branch = claim == Claim::Ref && (segments.len() < 3 || segments[0] != "refs" || !["heads", "tags"].contains(&segments[1]));
    if every_branch {
        return Err(Fault("a prefix of refs names more than refs/heads or refs/tags: that would be every branch"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use kube::CustomResourceExt;
    use serde_json::{Value, json};

    use super::*;
    use crate::CredentialBinding;

    fn spec() -> Value {
        json!({
            "pools": ["linux"],
            "token": {"issuer": "https://token.actions.githubusercontent.com", "audience": "sts.amazonaws.com"},
            "subject": {"claims": {"repository_id": {"exact": "42"}, "ref": {"exact": "refs/heads/main"}}},
            "provider": {"aws": {"roleArn": "arn:aws:iam::123456789012:role/ci", "region": "eu-central-1"}},
        })
    }

    fn google() -> Value {
        json!({"google": {"workloadIdentityProvider": "projects/1/locations/global/workloadIdentityPools/pool/providers/mayfly"}})
    }

    fn azure() -> Value {
        let id = "00000000-1111-2222-3333-444444444444";
        json!({"azure": {"tenantId": id, "clientId": id}})
    }

    fn vault() -> Value {
        json!({"vault": {"address": "https://vault.example", "role": "ci"}})
    }

    fn github_app() -> Value {
        json!({"githubApp": {"clientId": "Iv1.x", "installationId": 7, "repositories": ["web"], "permissions": {"contents": "read"}}})
    }

    fn checked(change: impl Fn(&mut Value)) -> Result<(), String> {
        let mut spec = spec();
        change(&mut spec);
        let spec: CredentialBindingSpec = serde_json::from_value(spec).map_err(|error| error.to_string())?;
        spec.check().map_err(|fault| fault.to_string())
    }

    #[test]
    fn sound_bindings_pass() {
        let changes: [fn(&mut Value); 11] = [
            |s| s["provider"] = github_app(),
            |_| {},
            |s| s["provider"] = google(),
            |s| {
                s["provider"] = azure();
                s["lifetimeSeconds"] = json!(5400);
            },
            |s| s["provider"] = vault(),
            |s| s["subject"]["claims"] = json!({"repository": {"exact": "acme/web"}, "repository_owner_id": {"exact": "7"}}),
            |s| s["subject"]["claims"]["ref"] = json!({"prefixSegments": "refs/heads/release"}),
            |s| s["subject"]["claims"]["event_name"] = json!({"oneOf": ["push", "pull_request"]}),
            |s| {
                s["production"] = json!(true);
                s["subject"]["claims"]["ref_protected"] = json!({"exact": "true"});
            },
            |s| {
                s["production"] = json!(true);
                s["subject"]["claims"]["environment"] = json!({"exact": "live"});
                s["subject"]["claims"]["event_name"] = json!({"exact": "push"});
            },
            |s| s["provider"] = json!({"audienceToken": {}}),
        ];
        for (n, change) in changes.into_iter().enumerate() {
            assert_eq!(checked(change), Ok(()), "change {n}");
        }
    }

    /// A word of the reason, and what is changed.
    type Row = (&'static str, fn(&mut Value));

    #[test]
    fn every_dangerous_shape_is_refused_with_its_reason() {
        let changes: [Row; 30] = [
            ("live 3600", |s| {
                s["provider"] = github_app();
                s["lifetimeSeconds"] = json!(900);
            }),
            ("no repository, or no permission", |s| {
                s["provider"] = github_app();
                s["provider"]["githubApp"]["repositories"] = json!([]);
            }),
            ("no repository, or no permission", |s| {
                s["provider"] = github_app();
                s["provider"]["githubApp"]["permissions"] = json!({});
            }),
            ("exactly one provider", |s| s["provider"]["vault"] = vault()["vault"].clone()),
            ("up to 5400", |s| s["provider"] = azure()),
            ("no scope", |s| {
                s["provider"] = google();
                s["provider"]["google"]["scopes"] = json!([]);
            }),
            ("no scope", |s| {
                s["provider"] = azure();
                s["provider"]["azure"]["scopes"] = json!([]);
                s["lifetimeSeconds"] = json!(5400);
            }),
            ("no repository", |s| s["subject"]["claims"] = json!({"ref": {"exact": "refs/heads/main"}})),
            ("no repository", |s| s["subject"]["claims"] = json!({"repository_owner_id": {"exact": "7"}})),
            ("taken over", |s| s["subject"]["claims"] = json!({"repository": {"exact": "acme/web"}})),
            ("to the letter", |s| s["subject"]["claims"]["ref"] = json!({"exact": "*"})),
            ("to the letter", |s| s["subject"]["claims"]["ref"] = json!({"exact": "refs/heads/*"})),
            ("to the letter", |s| s["subject"]["claims"]["ref"] = json!({"oneOf": []})),
            ("to the letter", |s| s["subject"]["claims"]["ref"] = json!({"exact": "a\nb"})),
            ("every branch", |s| s["subject"]["claims"]["ref"] = json!({"prefixSegments": "refs/heads"})),
            ("every branch", |s| s["subject"]["claims"]["ref"] = json!({"prefixSegments": "refs/pull/1"})),
            ("empty segments", |s| s["subject"]["claims"]["ref"] = json!({"prefixSegments": "refs/heads//x"})),
            ("are paths", |s| s["subject"]["claims"]["actor"] = json!({"prefixSegments": "a"})),
            ("exactly one of", |s| s["subject"]["claims"]["ref"] = json!({"exact": "a", "oneOf": ["b"]})),
            ("exactly one of", |s| s["subject"]["claims"]["ref"] = json!({"pattern": ".*"})),
            ("are numbers", |s| s["subject"]["claims"]["repository_id"] = json!({"exact": "acme"})),
            ("does not know", |s| s["subject"]["claims"]["repositroy"] = json!({"exact": "acme/web"})),
            ("event_name", |s| s["subject"]["claims"]["environment"] = json!({"exact": "live"})),
            ("pull_request_target", |s| s["subject"]["claims"]["event_name"] = json!({"oneOf": ["push", "pull_request_target"]})),
            ("production", |s| s["production"] = json!(true)),
            ("organization", |s| s["token"]["audience"] = json!("https://github.com/acme")),
            ("organization", |s| s["token"]["audience"] = json!("https://token.actions.githubusercontent.com/acme")),
            ("between 900", |s| s["lifetimeSeconds"] = json!(60)),
            ("exactly one provider", |s| s["provider"] = json!({})),
            ("no pool", |s| s["pools"] = json!([])),
        ];
        for (n, (word, change)) in changes.into_iter().enumerate() {
            let refused = checked(change).expect_err(&format!("change {n} ({word})"));
            assert!(refused.contains(word), "change {n}: {refused}");
        }
    }

    #[test]
    fn what_is_not_said_of_a_provider_is_what_most_have() {
        let provider = |text: Value| serde_json::from_value::<super::super::Provider>(text).expect("a provider");
        assert_eq!(provider(google()).chosen().expect("one").scopes(), ["https://www.googleapis.com/auth/cloud-platform"]);
        assert_eq!(provider(azure()).chosen().expect("one").scopes(), ["https://management.azure.com/.default"]);
        assert_eq!(provider(vault()).chosen().expect("one").identity(), "https://vault.example/v1/auth/jwt/role/ci");
    }

    #[test]
    fn an_audience_of_an_organization_is_known_on_every_host() {
        let shared = |issuer: &str, audience: &str| is_organization_audience(issuer, audience);
        assert!(shared("https://git.corp/_services/token", "https://git.corp/acme"));
        assert!(shared("https://git.corp/_services/token", "https://GIT.corp:8443/acme"));
        assert!(shared("https://token.actions.acme.ghe.com", "https://acme.ghe.com/acme"));
        assert!(!shared("https://token.actions.githubusercontent.com", "sts.amazonaws.com"));
        assert!(!shared("https://git.corp/_services/token", "https://vault.corp/acme"));
    }

    #[test]
    fn the_definition_knows_the_same_claims() {
        let crd = serde_json::to_value(CredentialBinding::crd()).expect("JSON").to_string();
        let rule = crd.split("self.all(name, name in [").nth(1).and_then(|rest| rest.split(']').next()).expect("the rule");
        let named: Vec<&str> = rule.split(',').map(|name| name.trim().trim_matches('\'')).collect();
        let known: Vec<&str> = Claim::ALL.iter().map(|claim| claim.as_str()).collect();
        assert_eq!(named, known);
    }
}
