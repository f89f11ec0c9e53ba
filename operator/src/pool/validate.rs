//! From a RunnerPool as stored to a pool as the rest of the program knows it: parsed once, here.
//!
//! The API server checks the same rules (see `crds`); an object written before a rule existed, or past validation, stops here.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::SignedDuration;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::core::DeserializeGuard;
use kube::{Resource, ResourceExt};
use mayfly_crds::{Gitea, Github, GithubScaleSet, Jobs, RunnerPool, RunnerPoolSpec, SecretKeyRef};

use super::accept::Rules;
use super::registry::PoolKey;
use crate::forge::Repository;
use crate::forge::gitea::Scope;
use crate::forge::github::{self, ConfigUrl};
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
    /// The forge, as the pool's Secrets name it.
    pub(crate) url: String,
    /// Host names at which runners reach it, the first that of `url`.
    pub(crate) hosts: Vec<String>,
    pub(crate) port: u16,
    pub(crate) source: Source,
    pub(crate) webhook_secret: Option<SecretKeyRef>,
    pub(crate) rules: Rules,
    pub(crate) deadlines: Deadlines,
}

/// Where a pool's jobs come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A Gitea server.
    Gitea { scope: Scope, token: SecretKeyRef },
    /// A scale set of GitHub's.
    GitHub { config: Box<github::Config>, credential: GitHubCredential },
    /// GitHub, without a scale set.
    JustInTime { config: Box<github::JitConfig>, credential: GitHubCredential },
}

impl Source {
    /// The field that names the webhooks' secret.
    pub(crate) fn webhook_secret_field(&self) -> &'static str {
        match self {
            Self::Gitea { .. } => "forge.gitea.webhookSecretRef",
            Self::GitHub { .. } | Self::JustInTime { .. } => "forge.github.webhookSecretRef",
        }
    }

    /// With what GitHub knows the pool; `None` for another forge.
    pub(crate) fn github_credential(&self) -> Option<&GitHubCredential> {
        match self {
            Self::Gitea { .. } => None,
            Self::GitHub { credential, .. } | Self::JustInTime { credential, .. } => Some(credential),
        }
    }

    /// The address of what it serves at GitHub; `None` for another forge.
    fn github_url(&self) -> Option<&ConfigUrl> {
        match self {
            Self::Gitea { .. } => None,
            Self::GitHub { config, .. } => Some(&config.url),
            Self::JustInTime { config, .. } => Some(&config.url),
        }
    }
}

/// With what GitHub knows a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum GitHubCredential {
    App { client_id: String, installation_id: u64, key: SecretKeyRef },
    Token(SecretKeyRef),
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
    let key = PoolKey { namespace: pool.namespace().unwrap_or_default(), name: pool.name_any() };
    let found = match (&spec.forge.gitea, &spec.forge.github) {
        (Some(gitea), None) => from_gitea(gitea)?,
        (None, Some(github)) => from_github(github, &key, pool.uid().as_deref().unwrap_or_default(), &spec.jobs)?,
        _ => return Err("spec.forge: name exactly one forge, gitea or github".to_owned()),
    };
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
        key,
        uid: pool.uid().unwrap_or_default(),
        owner: pool.controller_owner_ref(&()).unwrap_or_default(),
        generation: pool.meta().generation,
        created: pool.creation_timestamp().map(|time| time.0),
        url: found.url,
        hosts: found.hosts,
        port: found.port,
        source: found.source,
        webhook_secret: found.webhook_secret,
        rules: Rules::new(&found.labels, &spec.jobs).private_only(found.private_only),
        deadlines: Deadlines {
            start: duration("spec.deadlines.start", &spec.deadlines.start)?,
            idle: duration("spec.deadlines.idle", &spec.deadlines.idle)?,
            job: duration("spec.deadlines.job", &spec.deadlines.job)?,
        },
        spec: spec.clone(),
    })
}

/// Pools that make sense, each read once in each of its generations: every pass of every pool looks at all of them.
#[derive(Default)]
pub(crate) struct Validated(Mutex<HashMap<Generation, Option<Arc<Pool>>>>);

/// UID and generation.
type Generation = (String, i64);

impl Validated {
    /// Those of `stored` that make sense and are there to stay.
    pub(crate) fn of(&self, stored: &[Arc<DeserializeGuard<RunnerPool>>]) -> Vec<Arc<Pool>> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() > 2 * stored.len() {
            known.clear();
        }
        let readable = stored.iter().filter_map(|guarded| guarded.0.as_ref().ok());
        let staying = readable.filter(|pool| pool.metadata.deletion_timestamp.is_none());
        let read = |pool: &RunnerPool| validate(pool).ok().map(Arc::new);
        let all = staying.filter_map(|pool| match (pool.uid(), pool.meta().generation) {
            (Some(uid), Some(generation)) => known.entry((uid, generation)).or_insert_with(|| read(pool)).clone(),
            _ => read(pool),
        });
        all.collect()
    }
}

/// What a pool says of its forge.
struct Found {
    url: String,
    hosts: Vec<String>,
    port: u16,
    source: Source,
    webhook_secret: Option<SecretKeyRef>,
    labels: Vec<String>,
    private_only: bool,
}

fn from_gitea(gitea: &Gitea) -> Result<Found, String> {
    let (host, port) = url(&gitea.url)?;
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
    Ok(Found {
        url: gitea.url.trim_end_matches('/').to_owned(),
        hosts: vec![host],
        port,
        source: Source::Gitea { scope, token: gitea.token_secret_ref.clone() },
        webhook_secret: gitea.webhook_secret_ref.clone(),
        labels: gitea.labels.clone(),
        private_only: false,
    })
}

fn from_github(github: &Github, key: &PoolKey, uid: &str, jobs: &Jobs) -> Result<Found, String> {
    let url = ConfigUrl::parse(&github.url).map_err(|why| format!("spec.forge.github.url: {why}"))?;
    let credential = match (&github.app, &github.token_secret_ref) {
        (Some(app), None) => GitHubCredential::App {
            client_id: app.client_id.clone(),
            installation_id: app.installation_id,
            key: app.private_key_secret_ref.clone(),
        },
        (None, Some(token)) => GitHubCredential::Token(token.clone()),
        _ => return Err("spec.forge.github: name exactly one credential, app or tokenSecretRef".to_owned()),
    };
    let label = |text: &String| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    let group = github::Group {
        name: github.runner_group.name.clone(),
        allow_default_group: github.runner_group.allow_default_group,
        allow_public_repositories: github.runner_group.allow_public_repositories,
        require_selected_repositories: github.runner_group.require_selected_repositories,
        require_selected_workflows: github.runner_group.require_selected_workflows,
    };
    if group.require_selected_workflows && url.is_repository() {
        return Err(
            "spec.forge.github.runnerGroup.requireSelectedWorkflows: the runners of a repository are in no runner group, which could \
             restrict them"
                .to_owned(),
        );
    }
    let (private_only, api) = (!github.runner_group.allow_public_repositories, reqwest::Url::parse(&url.api).ok());
    let api = api.and_then(|api| api.host_str().map(str::to_owned));
    let mut hosts = vec![url.host.clone()];
    hosts.extend(api.filter(|api| *api != url.host));
    let found = |url: &ConfigUrl, source: Source, labels: Vec<String>, private_only: bool| Found {
        url: url.text.clone(),
        hosts,
        port: url.port,
        source,
        webhook_secret: github.webhook_secret_ref.clone(),
        labels,
        private_only,
    };
    if let Some(just_in_time) = &github.just_in_time {
        let field = "spec.forge.github.justInTime";
        if github.webhook_secret_ref.is_none() {
            return Err(format!("{field} needs webhookSecretRef: GitHub tells of jobs by webhooks"));
        }
        if github.scale_set != GithubScaleSet::default() {
            return Err(format!("{field}: there is no scale set then, so that scaleSet has to be left out"));
        }
        if (group.require_selected_repositories || group.require_selected_workflows) && group.name.is_none() {
            return Err(format!("{field}: without runnerGroup.name its runners are in no runner group, which could be restricted"));
        }
        if just_in_time.labels.is_empty() || !just_in_time.labels.iter().all(label) {
            return Err(format!("{field}.labels: name at least one label, of letters, digits, '.', '_' and '-'"));
        }
        let repositories = match url.repository() {
            Some(own) => vec![own.clone()],
            None => {
                let named = jobs.repositories.iter().filter_map(|name| Repository::parse(name));
                named.filter(|repository| url.covers(repository)).collect()
            }
        };
        let labels = just_in_time.labels.clone();
        let pool = uid.to_owned();
        let config = github::JitConfig { url, labels: labels.clone(), group, pool, repositories, pace: github::Pace::default() };
        let url = config.url.clone();
        return Ok(found(&url, Source::JustInTime { config: Box::new(config), credential }, labels, private_only));
    }
    let name = github.scale_set.name.clone().unwrap_or_else(|| key.name.clone());
    let mut labels = vec![name.clone()];
    labels.extend(github.scale_set.labels.iter().filter(|label| **label != name).cloned());
    if let Some(bad) = labels.iter().find(|text| !label(text)) {
        return Err(format!("spec.forge.github.scaleSet: {bad:?} is not a name of letters, digits, '.', '_' and '-'"));
    }
    let config = github::Config {
        url,
        scale_set: name,
        labels: labels.clone(),
        group,
        owner: format!("mayfly {key}"),
        poll: github::POLL,
        look: github::LOOK,
    };
    let url = config.url.clone();
    // GitHub keeps public repositories out of a runner group by itself.
    Ok(found(&url, Source::GitHub { config: Box::new(config), credential }, labels, false))
}

impl Pool {
    /// Whether this pool looks at jobs of this repository, for a pool of the forge at `url`.
    pub(crate) fn scope_covers(&self, url: &str, repository: &Repository) -> bool {
        match &self.source {
            // Gitea's names do not distinguish case.
            Source::Gitea { scope, .. } => {
                same_server(&self.url, url)
                    && match scope {
                        Scope::Instance => true,
                        Scope::Organization(name) => repository.owner().eq_ignore_ascii_case(name),
                        Scope::Repository(own) => own.as_str().eq_ignore_ascii_case(repository.as_str()),
                    }
            }
            source @ (Source::GitHub { .. } | Source::JustInTime { .. }) => {
                let host = |text: &str| {
                    reqwest::Url::parse(text).ok().and_then(|url| Some((url.host_str()?.to_owned(), url.port_or_known_default())))
                };
                host(&self.url) == host(url) && source.github_url().is_some_and(|own| own.covers(repository))
            }
        }
    }

    /// Whether both may accept the same job.
    pub(crate) fn may_overlap(&self, other: &Self) -> bool {
        match (&self.source, &other.source) {
            (Source::Gitea { scope, .. }, Source::Gitea { scope: others, .. }) => {
                let meet = |a: &Scope, b: &Scope| match (a, b) {
                    (Scope::Instance, _) => true,
                    (Scope::Organization(a), Scope::Organization(b)) => a.eq_ignore_ascii_case(b),
                    (Scope::Organization(a), Scope::Repository(b)) => a.eq_ignore_ascii_case(b.owner()),
                    (Scope::Repository(a), Scope::Repository(b)) => a.as_str().eq_ignore_ascii_case(b.as_str()),
                    _ => false,
                };
                (meet(scope, others) || meet(others, scope)) && self.rules.may_overlap(&other.rules) && same_server(&self.url, &other.url)
            }
            // GitHub gives a job to one scale set: two pools meet where both want to be the same one.
            (Source::GitHub { config, .. }, Source::GitHub { config: others, .. }) => {
                config.scale_set.eq_ignore_ascii_case(&others.scale_set) && same_server(&self.url, &other.url)
            }
            // Whoever is faster gets the job, be it a scale set.
            (one, other_source) => match (one.github_url(), other_source.github_url()) {
                (Some(url), Some(others)) => url.meets(others) && self.rules.may_overlap(&other.rules),
                _ => false,
            },
        }
    }

    /// Forge and scope in one line.
    pub(crate) fn scope_text(&self) -> String {
        match &self.source {
            Source::Gitea { scope: Scope::Instance, .. } => self.url.clone(),
            Source::Gitea { scope: Scope::Organization(name), .. } => format!("{}/{name}", self.url),
            Source::Gitea { scope: Scope::Repository(name), .. } => format!("{}/{name}", self.url),
            Source::GitHub { config, .. } => format!("{} ({})", self.url, config.scale_set),
            Source::JustInTime { .. } => format!("{} (just in time)", self.url),
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
    use serde_json::{Value, json};

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

    const APP: &str = r#""app":{"clientId":"Iv1.a","installationId":7,"privateKeySecretRef":{"name":"k"}}"#;

    fn github(url: &str, credential: &str, scale_set: &str) -> String {
        let comma = if credential.is_empty() { "" } else { "," };
        format!(r#"{{"forge":{{"github":{{"url":"{url}"{comma}{credential},"scaleSet":{scale_set}}}}}}}"#)
    }

    #[test]
    fn a_pool_is_read_once_in_each_generation() {
        let of = |change: fn(&mut Value)| {
            let mut pool = serde_json::to_value(runner_pool(&format!(r#"{{"forge":{{"gitea":{GITEA}}}}}"#))).expect("JSON");
            change(&mut pool);
            Arc::new(serde_json::from_value::<DeserializeGuard<RunnerPool>>(pool).expect("a pool"))
        };
        let validated = Validated::default();
        let read = |change| validated.of(&[of(change)]).pop();
        let (first, again) = (read(|_| {}).expect("valid"), read(|pool| pool["status"] = json!({"queued": 1})).expect("valid"));
        assert!(Arc::ptr_eq(&first, &again));
        let changed = read(|pool| {
            pool["metadata"]["generation"] = json!(2);
            pool["spec"]["scale"] = json!({"max": 77});
        });
        assert_eq!((first.spec.scale.max == 77, changed.expect("valid").spec.scale.max), (false, 77));
        let unsound = read(|pool| {
            pool["metadata"]["uid"] = json!("u-2");
            pool["spec"]["scale"] = json!({"max": 0});
        });
        assert!(unsound.is_none());
        assert!(read(|pool| pool["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z")).is_none(), "it goes");
        assert!(read(|pool| pool["spec"] = json!(7)).is_none(), "it cannot be read");
    }

    #[test]
    fn a_pool_of_a_scale_set_is_taken_apart() {
        let pool = |url: &str, set: &str| validate(&runner_pool(&github(url, APP, set))).expect("valid");
        let acme = pool("https://github.com/acme/", r#"{"labels":["linux","ci"]}"#);
        let Source::GitHub { config, .. } = &acme.source else { panic!("a scale set") };
        assert_eq!((config.scale_set.as_str(), config.labels.join(" ").as_str()), ("ci", "ci linux"));
        assert_eq!((acme.hosts.join(" ").as_str(), acme.port), ("github.com api.github.com", 443));
        assert_eq!(acme.scope_text(), "https://github.com/acme (ci)");
        let web = Repository::parse("acme/web").expect("a repository");
        assert!(acme.scope_covers("https://github.com/other", &web) && !acme.scope_covers("https://git.example/acme", &web));
        assert!(acme.may_overlap(&pool("https://github.com/acme", "{}")), "both want to be the scale set ci");
        assert!(!acme.may_overlap(&pool("https://github.com/acme", r#"{"name":"gpu","labels":["linux"]}"#)));
    }

    #[test]
    fn a_pool_without_a_scale_set_is_taken_apart() {
        let spec = |url: &str, more: &str, jobs: &str| {
            let jit = r#""justInTime":{"labels":["self-hosted","linux"]},"webhookSecretRef":{"name":"w"}"#;
            let spec = format!(r#"{{"forge":{{"github":{{"url":"{url}",{APP},{jit}{more}}}}},"jobs":{jobs}}}"#);
            validate(&runner_pool(&spec)).expect("valid")
        };
        let named = r#"{"repositories":["acme/web","acme/lib-*","eve/web"]}"#;
        let acme = spec("https://github.com/acme", "", named);
        let Source::JustInTime { config, .. } = &acme.source else { panic!("no scale set") };
        assert_eq!(config.repositories.iter().map(Repository::as_str).collect::<Vec<_>>(), ["acme/web"], "those of its own with a name");
        assert_eq!((acme.scope_text().as_str(), config.labels.len()), ("https://github.com/acme (just in time)", 2));
        let web = Repository::parse("acme/web").expect("a repository");
        assert!(acme.scope_covers("https://github.com/acme", &web) && !acme.scope_covers("https://git.example/acme", &web));
        let own = spec("https://github.com/acme/web", "", "{}");
        let Source::JustInTime { config, .. } = &own.source else { panic!("no scale set") };
        assert_eq!(config.repositories, [web]);
        let set = |name: &str| validate(&runner_pool(&github("https://github.com/acme", APP, name))).expect("valid");
        assert!(acme.may_overlap(&own) && acme.may_overlap(&set(r#"{"name":"linux"}"#)) && !acme.may_overlap(&set("{}")));
        assert!(!own.may_overlap(&spec("https://github.com/acme/api", "", "{}")));
    }

    #[test]
    fn a_good_pool_is_taken_apart() {
        let pool = validate(&runner_pool(&format!(r#"{{"forge":{{"gitea":{GITEA}}}}}"#))).expect("valid");
        assert_eq!((pool.hosts.join(" ").as_str(), pool.port, pool.url.as_str()), ("git.example", 3000, "https://git.example:3000"));
        assert_eq!(pool.deadlines.job, SignedDuration::from_hours(6));
        assert!(pool.scope_covers("https://git.example:3000", &Repository::parse("acme/web").expect("valid")));
        assert!(!pool.scope_covers("https://git.example:3000", &Repository::parse("evil/web").expect("valid")));
        assert!(pool.scope_covers("https://GIT.example:3000/", &Repository::parse("Acme/web").expect("valid")));
        assert!(!pool.scope_covers("https://git.example", &Repository::parse("acme/web").expect("valid")));
    }

    #[test]
    fn what_got_past_the_api_server_is_refused_here() {
        let gitea = |scope: &str| format!(r#"{{"gitea":{}}}"#, GITEA.replace(r#"{"organization":"acme"}"#, scope));
        let jit = |just_in_time: &str, more: &str| format!(r#"{APP},"webhookSecretRef":{{"name":"w"}},"justInTime":{just_in_time}{more}"#);
        let cases = [
            ("exactly one forge", r#"{"forge":{}}"#.to_owned()),
            ("exactly one forge", format!(r#"{{"forge":{{"gitea":{GITEA},"github":{{"url":"x"}}}}}}"#)),
            ("github.url", github("ftp://x/acme", APP, "{}")),
            ("github.url", github("https://github.com", APP, "{}")),
            ("exactly one credential", github("https://github.com/acme", "", "{}")),
            ("exactly one credential", github("https://github.com/acme", &format!(r#"{APP},"tokenSecretRef":{{"name":"t"}}"#), "{}")),
            (
                "in no runner group",
                github("https://github.com/acme/web", &format!(r#"{APP},"runnerGroup":{{"requireSelectedWorkflows":true}}"#), "{}"),
            ),
            ("needs webhookSecretRef", github("https://github.com/acme", &format!(r#"{APP},"justInTime":{{"labels":["a"]}}"#), "{}")),
            ("at least one label", github("https://github.com/acme", &jit(r#"{"labels":[]}"#, ""), "{}")),
            ("at least one label", github("https://github.com/acme", &jit(r#"{"labels":["a b"]}"#, ""), "{}")),
            ("scaleSet has to be left out", github("https://github.com/acme", &jit(r#"{"labels":["a"]}"#, ""), r#"{"name":"x"}"#)),
            (
                "in no runner group",
                github(
                    "https://github.com/acme",
                    &jit(r#"{"labels":["a"]}"#, r#","runnerGroup":{"requireSelectedRepositories":true}"#),
                    "{}",
                ),
            ),
            ("scaleSet", github("https://github.com/acme", APP, r#"{"name":"a&b"}"#)),
            ("scaleSet", github("https://github.com/acme", APP, r#"{"labels":["a b"]}"#)),
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
