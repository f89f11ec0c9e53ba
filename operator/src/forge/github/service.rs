//! Calls to the Actions service and to REST, one function each.
//!
//! Source: actions/scaleset, client.go and session_client.go, for paths, methods and who is asked with which token.

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::USER_AGENT;
use reqwest::{Client, Method, RequestBuilder, StatusCode, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::super::{ForgeError, JobId, Repository, Secret};
use super::auth::Auth;
use super::config_url::{ConfigUrl, Level};
use super::http::{Answer, CallError, Caller};
use super::wire;

const SETS: &str = "_apis/runtime/runnerscalesets";
const AGENTS: &str = "_apis/distributedtask/pools/0/agents";
/// Work folder of runners, relative to their home.
const WORK_FOLDER: &str = "_work";
/// Entries of a page: GitHub gives no more.
const PAGE: usize = 100;
/// Most pages read of a list: GitHub has a thousand runner groups at most, and a thousand jobs in a run.
const PAGES: usize = 20;

/// GitHub, as one pool's credential sees it.
#[derive(Debug)]
pub(super) struct Service {
    http: Client,
    caller: Arc<Caller>,
    auth: Arc<Auth>,
    url: ConfigUrl,
    poll: Duration,
}

/// The queue of a session, as it is asked.
#[derive(Debug, Clone)]
pub(super) struct Queue {
    pub(super) url: Url,
    pub(super) token: Secret,
}

impl Service {
    pub(super) fn new(http: Client, caller: Arc<Caller>, auth: Arc<Auth>, url: ConfigUrl, poll: Duration) -> Self {
        Self { http, caller, auth, url, poll }
    }

    /// The scale set of this name in a runner group.
    pub(super) async fn find_set(&self, name: &str, group: u64) -> Result<Option<wire::ScaleSet>, CallError> {
        let what = "the scale set";
        let query = [("runnerGroupId", group.to_string()), ("name", name.to_owned())];
        let list: wire::List<wire::ScaleSet> = self.read(Method::GET, SETS, &query, None::<&()>, what).await?;
        let mut found = list.value.into_iter().filter(|set| set.name.eq_ignore_ascii_case(name));
        match (found.next(), found.next()) {
            (_, Some(_)) => Err(ForgeError::Unexpected(format!("GitHub has several scale sets called {name} in one runner group")).into()),
            (found, None) => Ok(found),
        }
    }

    pub(super) async fn get_set(&self, id: u64) -> Result<wire::ScaleSet, CallError> {
        self.read(Method::GET, &format!("{SETS}/{id}"), &[], None::<&()>, "the scale set").await
    }

    pub(super) async fn create_set(&self, set: &wire::WantedScaleSet<'_>) -> Result<wire::ScaleSet, CallError> {
        self.read(Method::POST, SETS, &[], Some(set), "a new scale set").await
    }

    pub(super) async fn update_set(&self, id: u64, set: &wire::WantedScaleSet<'_>) -> Result<wire::ScaleSet, CallError> {
        self.read(Method::PATCH, &format!("{SETS}/{id}"), &[], Some(set), "the change of the scale set").await
    }

    pub(super) async fn delete_set(&self, id: u64) -> Result<(), CallError> {
        self.service(Method::DELETE, &format!("{SETS}/{id}"), &[], None::<&()>, "the removal of the scale set").await.map(drop)
    }

    /// The number of a runner group, as the Actions service counts.
    pub(super) async fn group(&self, name: &str) -> Result<u64, CallError> {
        let query = [("groupName", name.to_owned())];
        let what = "the runner group";
        let list: wire::List<wire::RunnerGroup> = self.read(Method::GET, "_apis/runtime/runnergroups/", &query, None::<&()>, what).await?;
        match list.value[..] {
            [ref group] => Ok(group.id),
            _ => Err(ForgeError::NotFound { what: format!("runner group {name:?} that this scope can use") }.into()),
        }
    }

    pub(super) async fn open_session(&self, set: u64, owner: &str) -> Result<wire::Session, CallError> {
        let body = json!({"sessionId": "00000000-0000-0000-0000-000000000000", "ownerName": owner});
        self.read(Method::POST, &format!("{SETS}/{set}/sessions"), &[], Some(&body), "a session of the scale set").await
    }

    pub(super) async fn refresh_session(&self, set: u64, session: &str) -> Result<wire::Session, CallError> {
        let path = format!("{SETS}/{set}/sessions/{session}");
        self.read(Method::PATCH, &path, &[], None::<&()>, "the session of the scale set").await
    }

    pub(super) async fn close_session(&self, set: u64, session: &str) -> Result<(), CallError> {
        let path = format!("{SETS}/{set}/sessions/{session}");
        self.service(Method::DELETE, &path, &[], None::<&()>, "the end of the session").await.map(drop)
    }

    /// Waits for a message. `None` where none came.
    pub(super) async fn poll(&self, queue: &Queue, room: u32) -> Result<Option<wire::Message>, CallError> {
        let what = "messages of the scale set";
        let request = self.http.get(queue.url.clone()).bearer_auth(queue.token.reveal()).header(USER_AGENT, user_agent(None));
        let request = request.header("Accept", "application/json; api-version=6.0-preview").timeout(self.poll);
        // `lastMessageId` is left out: what was acknowledged does not come again, and ids that begin anew would never exceed it.
        let answer = self.caller.send(request.header("X-ScaleSetMaxCapacity", room), what).await?;
        if answer.status == StatusCode::ACCEPTED || answer.text().is_empty() {
            return Ok(None);
        }
        answer.json(what).map(Some)
    }

    /// Takes a message off the queue.
    pub(super) async fn acknowledge(&self, queue: &Queue, message: u64) -> Result<(), CallError> {
        let mut url = queue.url.clone();
        let what = "the acknowledgement of a message";
        url.path_segments_mut().map_err(|()| no_base(what))?.pop_if_empty().push(&message.to_string());
        let request = self.http.delete(url).bearer_auth(queue.token.reveal()).header(USER_AGENT, user_agent(None));
        self.caller.send(request, what).await.map(drop)
    }

    /// Asks for jobs that were offered. An older server gives out no job that was not asked for; github.com does not know the call.
    pub(super) async fn acquire(&self, set: u64, queue: &Queue, offers: &[i64]) -> Result<Vec<i64>, CallError> {
        let what = "jobs that were offered";
        let url = self.address(&format!("{SETS}/{set}/acquirejobs"), &[], what).await?.0;
        let request = self.http.post(url).bearer_auth(queue.token.reveal()).header(USER_AGENT, user_agent(Some(set))).json(offers);
        let won: wire::List<i64> = self.caller.send(request, what).await?.json(what)?;
        Ok(won.value)
    }

    /// Registers a runner for one job of the scale set.
    pub(super) async fn jit_config(&self, set: u64, name: &str) -> Result<wire::JitConfig, CallError> {
        let body = wire::JitRequest { name, work_folder: WORK_FOLDER };
        self.read(Method::POST, &format!("{SETS}/{set}/generatejitconfig"), &[], Some(&body), "the registration of a runner").await
    }

    pub(super) async fn runners(&self) -> Result<Vec<wire::Runner>, CallError> {
        let list: wire::List<wire::Runner> = self.read(Method::GET, AGENTS, &[], None::<&()>, "the runners of the scope").await?;
        Ok(list.value)
    }

    pub(super) async fn remove_runner(&self, id: u64) -> Result<(), CallError> {
        self.service(Method::DELETE, &format!("{AGENTS}/{id}"), &[], None::<&()>, "the removal of a runner").await.map(drop)
    }

    /// What runner groups may be used for; of an organization or enterprise.
    pub(super) async fn group_rules(&self) -> Result<Vec<wire::GroupRules>, CallError> {
        let path = format!("{}/runner-groups?", self.url.runners_path());
        self.pages(&path, "the runner groups", |list: wire::GroupList| list.runner_groups).await
    }

    /// Repositories that may use a runner group of an organization, by its number in REST.
    pub(super) async fn group_repositories(&self, group: u64) -> Result<Vec<String>, CallError> {
        let path = format!("{}/runner-groups/{group}/repositories?", self.url.runners_path());
        let names = |list: wire::GroupRepositories| list.repositories.into_iter().map(|repository| repository.full_name).collect();
        self.pages(&path, "the repositories of the runner group", names).await
    }

    /// Organizations that may use a runner group of an enterprise, by its number in REST.
    pub(super) async fn group_organizations(&self, group: u64) -> Result<Vec<String>, CallError> {
        let path = format!("{}/runner-groups/{group}/organizations?", self.url.runners_path());
        let logins = |list: wire::GroupOrganizations| list.organizations.into_iter().map(|organization| organization.login).collect();
        self.pages(&path, "the organizations of the runner group", logins).await
    }

    /// Whether everybody may see the repository of the pool; `None` where it has more than one.
    pub(super) async fn is_public(&self) -> Result<Option<bool>, CallError> {
        let Level::Repository(repository) = &self.url.level else { return Ok(None) };
        let facts: wire::RepositoryFacts = self.rest(&format!("/repos/{repository}"), "the repository").await?;
        Ok(Some(!facts.private))
    }

    pub(super) async fn run(&self, repository: &Repository, run: u64) -> Result<wire::WorkflowRun, CallError> {
        self.rest(&format!("/repos/{repository}/actions/runs/{run}"), "the workflow run").await
    }

    /// Jobs of the last attempt at a run.
    pub(super) async fn run_jobs(&self, repository: &Repository, run: u64) -> Result<Vec<wire::RunJob>, CallError> {
        let path = format!("/repos/{repository}/actions/runs/{run}/jobs?filter=latest&");
        self.pages(&path, "the jobs of the workflow run", |list: wire::RunJobs| list.jobs).await
    }

    pub(super) async fn job(&self, repository: &Repository, job: &JobId) -> Result<wire::RunJob, CallError> {
        self.rest(&format!("/repos/{repository}/actions/jobs/{job}"), "the job").await
    }

    /// Numbers of a repository's runs in this state: at most a page of them.
    pub(super) async fn runs(&self, repository: &Repository, status: &str) -> Result<Vec<u64>, CallError> {
        let path = format!("/repos/{repository}/actions/runs?status={status}&per_page={PAGE}");
        let list: wire::Runs = self.rest(&path, "the workflow runs of the repository").await?;
        Ok(list.workflow_runs.into_iter().map(|run| run.id).collect())
    }

    /// Registers a runner for one job, without a scale set, at the level or repository to which the path belongs.
    pub(super) async fn rest_jit_config(
        &self,
        path: &str,
        name: &str,
        group: u64,
        labels: &[String],
    ) -> Result<wire::RestJitConfig, CallError> {
        let (what, body) =
            ("the registration of a runner", wire::RestJitRequest { name, runner_group_id: group, labels, work_folder: WORK_FOLDER });
        let path = format!("{path}/runners/generate-jitconfig");
        self.rest_call(Method::POST, &path, Some(&body), what).await?.json(what)
    }

    /// Runners of a level or a repository.
    pub(super) async fn rest_runners(&self, path: &str) -> Result<Vec<wire::RestRunner>, CallError> {
        self.pages(&format!("{path}/runners?"), "the runners of the scope", |list: wire::RestRunners| list.runners).await
    }

    pub(super) async fn remove_rest_runner(&self, path: &str, id: u64) -> Result<(), CallError> {
        self.rest_call(Method::DELETE, &format!("{path}/runners/{id}"), None::<&()>, "the removal of a runner").await.map(drop)
    }

    /// Reads a list page by page. `path` ends where its query goes on.
    async fn pages<L: DeserializeOwned, T>(&self, path: &str, what: &str, entries: impl Fn(L) -> Vec<T>) -> Result<Vec<T>, CallError> {
        let mut all = Vec::new();
        for page in 1..=PAGES {
            let read = entries(self.rest(&format!("{path}per_page={PAGE}&page={page}"), what).await?);
            let last = read.len() < PAGE;
            all.extend(read);
            if last {
                break;
            }
        }
        Ok(all)
    }

    async fn rest<T: DeserializeOwned>(&self, path: &str, what: &str) -> Result<T, CallError> {
        self.rest_call(Method::GET, path, None::<&()>, what).await?.json(what)
    }

    async fn rest_call(&self, method: Method, path: &str, body: Option<&(impl Serialize + Sync)>, what: &str) -> Result<Answer, CallError> {
        let request = self.http.request(method, format!("{}{path}", self.url.api)).header("Authorization", self.auth.rest().await?);
        let mut request = request.header("Accept", "application/vnd.github+json").header("X-GitHub-Api-Version", "2022-11-28");
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = self.caller.send(request, what).await;
        if answer.as_ref().is_err_and(|error| error.is(StatusCode::UNAUTHORIZED)) {
            self.auth.forget();
        }
        answer
    }

    async fn read<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, String)],
        body: Option<&(impl Serialize + Sync)>,
        what: &str,
    ) -> Result<T, CallError> {
        self.service(method, path, query, body, what).await?.json(what)
    }

    /// A call with the admin token. One that is refused for its token was not carried out, and is made once more with a new one.
    async fn service(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, String)],
        body: Option<&(impl Serialize + Sync)>,
        what: &str,
    ) -> Result<Answer, CallError> {
        let first = self.once(method.clone(), path, query, body, what).await;
        if !first.as_ref().is_err_and(|error| error.is(StatusCode::UNAUTHORIZED)) {
            return first;
        }
        self.auth.forget();
        self.once(method, path, query, body, what).await
    }

    async fn once(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, String)],
        body: Option<&(impl Serialize + Sync)>,
        what: &str,
    ) -> Result<Answer, CallError> {
        let (url, token) = self.address(path, query, what).await?;
        let mut request: RequestBuilder = self.http.request(method, url).bearer_auth(token.reveal()).header(USER_AGENT, user_agent(None));
        if let Some(body) = body {
            request = request.json(body);
        }
        self.caller.send(request, what).await
    }

    async fn address(&self, path: &str, query: &[(&str, String)], what: &str) -> Result<(Url, Secret), CallError> {
        let tenant = self.auth.tenant().await?;
        let mut url = tenant.base;
        // Their paths may end in a slash, which is part of them.
        url.path_segments_mut().map_err(|()| no_base(what))?.pop_if_empty().extend(path.split('/'));
        url.query_pairs_mut().append_pair("api-version", "6.0-preview").extend_pairs(query);
        Ok((url, tenant.token))
    }
}

fn no_base(what: &str) -> CallError {
    ForgeError::Unexpected(format!("{what}: GitHub names an address without a path")).into()
}

/// GitHub wants to know who asks, as JSON.
fn user_agent(set: Option<u64>) -> String {
    json!({
        "system": "mayfly", "version": env!("CARGO_PKG_VERSION"), "commit_sha": "", "scale_set_id": set.unwrap_or_default(),
        "subsystem": "controller", "build_version": env!("CARGO_PKG_VERSION"), "build_commit_sha": "", "kind": "scaleset",
    })
    .to_string()
}
