//! From a RunnerPool as stored to a pool as the rest of the program knows it: parsed once, here.
//!
//! The API server checks the same rules (see `crds`); an object written before a rule existed, or past validation, stops here.

use jiff::SignedDuration;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{Resource, ResourceExt};
use mayfly_crds::{RunnerPool, RunnerPoolSpec, SecretKeyRef};

use super::accept::Rules;
use super::registry::PoolKey;
use crate::forge::Repository;
use crate::forge::gitea::Scope;
use crate::isolation::is_host_name;

/// A pool whose spec makes sense.
#[derive(Clone, Debug)]
pub(crate) struct Pool {
    pub(crate) key: PoolKey,
    pub(crate) uid: String,
    pub(crate) owner: OwnerReference,
    pub(crate) generation: Option<i64>,
    /// When it was made; older pools are served first.
    pub(crate) created: Option<jiff::Timestamp>,
    pub(crate) spec: RunnerPoolSpec,
    pub(crate) url: String,
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) scope: Scope,
    pub(crate) token: SecretKeyRef,
    pub(crate) webhook_secret: Option<SecretKeyRef>,
    pub(crate) rules: Rules,
    pub(crate) deadlines: Deadlines,
}

/// The pool's deadlines as durations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Deadlines {
    /// From creation to waiting for a job.
    pub(crate) start: SignedDuration,
    /// From registration to a job.
    pub(crate) idle: SignedDuration,
    /// For the job.
    pub(crate) job: SignedDuration,
}

/// Reads a RunnerPool.
///
/// # Errors
/// One sentence for a person, naming the field.
pub(crate) fn validate(pool: &RunnerPool) -> Result<Pool, String> {
    let spec = &pool.spec;
    let gitea = match (&spec.forge.gitea, &spec.forge.github) {
        (Some(gitea), None) => gitea,
        (None, Some(_)) => return Err("spec.forge.github is not served by this version of Mayfly: use spec.forge.gitea".to_owned()),
        _ => return Err("spec.forge: name exactly one forge, gitea or github".to_owned()),
    };
    let url = url(&gitea.url)?;
    let scope = match (&gitea.scope.organization, &gitea.scope.repository, &gitea.scope.instance) {
        (Some(organization), None, None) if Repository::parse(&format!("{organization}/x")).is_some() => {
            Scope::Organization(organization.clone())
        }
        (None, Some(repository), None) => {
            Scope::Repository(Repository::parse(repository).ok_or("spec.forge.gitea.scope.repository: write owner/name".to_owned())?)
        }
        (None, None, Some(_)) => Scope::Instance,
        (Some(_), None, None) => return Err("spec.forge.gitea.scope.organization is not a name".to_owned()),
        _ => return Err("spec.forge.gitea.scope: name exactly one of organization, repository and instance".to_owned()),
    };
    if gitea.labels.is_empty() {
        return Err("spec.forge.gitea.labels: name at least one label".to_owned());
    }
    if spec.scale.max == 0 || spec.scale.warm > spec.scale.max {
        return Err("spec.scale: max is at least 1, and warm at most max".to_owned());
    }
    let bounded = spec.runner.resources.limits.iter().map(|(name, amount)| (format!("resources.limits.{name}"), amount));
    let workspace = spec.runner.workspace.iter().map(|amount| ("workspace".to_owned(), amount));
    if let Some((field, _)) = bounded.chain(workspace).find(|(_, amount)| is_zero(amount)) {
        return Err(format!("spec.runner.{field}: 0 would mean without limit"));
    }
    if let Some(opened) = spec.isolation.egress.hosts.iter().find(|opened| !is_host_name(&opened.host)) {
        return Err(format!(
            "spec.isolation.egress.hosts: {:?} is not a host name such as registry.example.org or *.example.org",
            opened.host
        ));
    }
    Ok(Pool {
        key: PoolKey { namespace: pool.namespace().unwrap_or_default(), name: pool.name_any() },
        uid: pool.uid().unwrap_or_default(),
        owner: pool.controller_owner_ref(&()).unwrap_or_default(),
        generation: pool.meta().generation,
        created: pool.creation_timestamp().map(|time| time.0),
        url: gitea.url.trim_end_matches('/').to_owned(),
        host: url.0,
        port: url.1,
        scope,
        token: gitea.token_secret_ref.clone(),
        webhook_secret: gitea.webhook_secret_ref.clone(),
        rules: Rules::new(&gitea.labels, &spec.jobs),
        deadlines: Deadlines {
            start: duration("spec.deadlines.start", &spec.deadlines.start)?,
            idle: duration("spec.deadlines.idle", &spec.deadlines.idle)?,
            job: duration("spec.deadlines.job", &spec.deadlines.job)?,
        },
        spec: spec.clone(),
    })
}

impl Pool {
    /// Whether `other` looks at jobs of this repository on the same server.
    pub(crate) fn scope_covers(&self, url: &str, repository: &Repository) -> bool {
        // Gitea's names do not distinguish case.
        same_server(&self.url, url)
            && match &self.scope {
                Scope::Instance => true,
                Scope::Organization(name) => repository.owner().eq_ignore_ascii_case(name),
                Scope::Repository(own) => own.as_str().eq_ignore_ascii_case(repository.as_str()),
            }
    }

    /// Whether both may accept the same job.
    pub(crate) fn may_overlap(&self, other: &Self) -> bool {
        let meet = |a: &Scope, b: &Scope| match (a, b) {
            (Scope::Instance, _) => true,
            (Scope::Organization(a), Scope::Organization(b)) => a.eq_ignore_ascii_case(b),
            (Scope::Organization(a), Scope::Repository(b)) => a.eq_ignore_ascii_case(b.owner()),
            (Scope::Repository(a), Scope::Repository(b)) => a.as_str().eq_ignore_ascii_case(b.as_str()),
            _ => false,
        };
        same_server(&self.url, &other.url)
            && (meet(&self.scope, &other.scope) || meet(&other.scope, &self.scope))
            && self.rules.may_overlap(&other.rules)
    }

    /// Forge and scope in one line.
    pub(crate) fn scope_text(&self) -> String {
        match &self.scope {
            Scope::Instance => self.url.clone(),
            Scope::Organization(name) => format!("{}/{name}", self.url),
            Scope::Repository(name) => format!("{}/{name}", self.url),
        }
    }

    /// Whether this pool is served before `other` where both accept a job: the older one, then the one first in the alphabet.
    pub(crate) fn goes_before(&self, other: &Self) -> bool {
        (self.created, &self.key) < (other.created, &other.key)
    }
}

/// Whether two URLs name the same server: default ports and the case of host names aside.
fn same_server(a: &str, b: &str) -> bool {
    match (reqwest::Url::parse(a), reqwest::Url::parse(b)) {
        (Ok(a), Ok(b)) => {
            let path = |url: &reqwest::Url| url.path().trim_end_matches('/').to_owned();
            a.host_str() == b.host_str() && a.port_or_known_default() == b.port_or_known_default() && path(&a) == path(&b)
        }
        _ => a == b,
    }
}

/// Whether a quantity is nothing, in whatever unit.
fn is_zero(amount: &Quantity) -> bool {
    let number: String = amount.0.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    number.parse::<f64>().is_ok_and(|number| number == 0.0)
}

/// Host and port of an http or https URL.
fn url(text: &str) -> Result<(String, u16), String> {
    let wrong = || format!("spec.forge.gitea.url: {text:?} is not an http or https URL");
    let url = reqwest::Url::parse(text).map_err(|_| wrong())?;
    if !matches!(url.scheme(), "http" | "https") || !url.username().is_empty() || url.password().is_some() {
        return Err(wrong());
    }
    let host = url.host_str().ok_or_else(wrong)?.trim_matches(['[', ']']).to_owned();
    Ok((host, url.port_or_known_default().ok_or_else(wrong)?))
}

fn duration(field: &str, text: &str) -> Result<SignedDuration, String> {
    match text.parse::<SignedDuration>() {
        Ok(duration) if duration > SignedDuration::ZERO && duration <= SignedDuration::from_hours(24 * 7) => Ok(duration),
        _ => Err(format!("{field}: {text:?} is not a duration such as 90s, 10m or 1h30m, above zero and at most 168h")),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn runner_pool(spec: &str) -> RunnerPool {
        let pool = format!(
            r#"{{"apiVersion":"mayfly.dev/v1alpha1","kind":"RunnerPool",
            "metadata":{{"name":"ci","namespace":"team","uid":"u-1","generation":1,"creationTimestamp":"2026-01-01T00:00:00Z"}},"spec":{spec}}}"#
        );
        serde_json::from_str(&pool).expect("a RunnerPool")
    }

    const GITEA: &str =
        r#"{"url":"https://git.example:3000/","scope":{"organization":"acme"},"tokenSecretRef":{"name":"t"},"labels":["linux"]}"#;

    #[test]
    fn a_good_pool_is_taken_apart() {
        let pool = validate(&runner_pool(&format!(r#"{{"forge":{{"gitea":{GITEA}}}}}"#))).expect("valid");
        assert_eq!((pool.host.as_str(), pool.port, pool.url.as_str()), ("git.example", 3000, "https://git.example:3000"));
        assert_eq!(pool.deadlines.job, SignedDuration::from_hours(6));
        assert!(pool.scope_covers("https://git.example:3000", &Repository::parse("acme/web").expect("valid")));
        assert!(!pool.scope_covers("https://git.example:3000", &Repository::parse("evil/web").expect("valid")));
        assert!(pool.scope_covers("https://GIT.example:3000/", &Repository::parse("Acme/web").expect("valid")));
        assert!(!pool.scope_covers("https://git.example", &Repository::parse("acme/web").expect("valid")));
    }

    #[test]
    fn what_got_past_the_api_server_is_refused_here() {
        let gitea = |scope: &str| format!(r#"{{"gitea":{}}}"#, GITEA.replace(r#"{"organization":"acme"}"#, scope));
        let cases = [
            ("exactly one forge", r#"{"forge":{}}"#.to_owned()),
            ("exactly one forge", format!(r#"{{"forge":{{"gitea":{GITEA},"github":{{"url":"x"}}}}}}"#)),
            ("not served", r#"{"forge":{"github":{"url":"x"}}}"#.to_owned()),
            ("exactly one of", format!(r#"{{"forge":{}}}"#, gitea("{}"))),
            ("exactly one of", format!(r#"{{"forge":{}}}"#, gitea(r#"{"organization":"a","instance":{}}"#))),
            ("owner/name", format!(r#"{{"forge":{}}}"#, gitea(r#"{"repository":"../../admin"}"#))),
            ("not a name", format!(r#"{{"forge":{}}}"#, gitea(r#"{"organization":"a/../b"}"#))),
            ("scale", format!(r#"{{"forge":{{"gitea":{GITEA}}},"scale":{{"max":0}}}}"#)),
            ("runner.workspace", format!(r#"{{"forge":{{"gitea":{GITEA}}},"runner":{{"workspace":"0Gi"}}}}"#)),
            ("limits.cpu", format!(r#"{{"forge":{{"gitea":{GITEA}}},"runner":{{"resources":{{"limits":{{"cpu":"0.0"}}}}}}}}"#)),
            (
                "egress.hosts",
                format!(r#"{{"forge":{{"gitea":{GITEA}}},"isolation":{{"egress":{{"hosts":[{{"host":"*","ports":[443]}}]}}}}}}"#),
            ),
            ("deadlines.job", format!(r#"{{"forge":{{"gitea":{GITEA}}},"deadlines":{{"job":"soon"}}}}"#)),
            ("url", format!(r#"{{"forge":{{"gitea":{}}}}}"#, GITEA.replace("https://", "https://user:pw@"))),
            ("url", format!(r#"{{"forge":{{"gitea":{}}}}}"#, GITEA.replace("https://", "file://"))),
        ];
        for (says, spec) in cases {
            let error = validate(&runner_pool(&spec)).expect_err(&spec);
            assert!(error.contains(says), "{spec}: {error}");
        }
    }
}
