//! A client of Gitea's REST interface (version 1.26) with what tests and demos need of it. Calls are synchronous; each has a time
//! limit. What exists already is no error for the calls that make things.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use ureq::Agent;
use ureq::http::Response;

/// Longest time a call may take.
const LIMIT: Duration = Duration::from_secs(20);

/// A forge and a token for it.
#[derive(Clone)]
pub struct Forge {
    url: String,
    token: String,
    agent: Agent,
}

/// Whose jobs, runs, runners or hooks are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The whole forge.
    Instance,
    /// An organization.
    Organization(String),
    /// A repository: owner and name.
    Repository(String, String),
}

/// A job.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Job {
    /// Number, unique in the forge.
    pub id: i64,
    /// Its run.
    pub run_id: i64,
    /// Name in the workflow.
    pub name: String,
    /// `queued`, `in_progress`, `completed` and others.
    pub status: String,
    /// `success`, `failure`, `cancelled` and others, once it is completed.
    pub conclusion: String,
    /// `runs-on`.
    pub labels: Vec<String>,
    /// The runner that took it, or 0.
    pub runner_id: i64,
    /// Name of that runner.
    pub runner_name: String,
    /// RFC 3339.
    pub created_at: String,
    /// RFC 3339.
    pub started_at: String,
    /// RFC 3339.
    pub completed_at: String,
    /// Branch.
    pub head_branch: String,
    /// Commit.
    pub head_sha: String,
    /// Address of its run in the interface.
    pub run_url: String,
    /// Address for a browser.
    pub html_url: String,
}

/// A run of a workflow.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Run {
    /// Number, unique in the forge.
    pub id: i64,
    /// Number within the repository.
    pub run_number: i64,
    /// Title.
    pub display_title: String,
    /// File of the workflow and the branch it came from.
    pub path: String,
    /// What started it.
    pub event: String,
    /// `queued`, `in_progress`, `completed` and others.
    pub status: String,
    /// How it ended.
    pub conclusion: String,
    /// Branch.
    pub head_branch: String,
    /// Commit.
    pub head_sha: String,
    /// Address for a browser.
    pub html_url: String,
}

/// A registered runner.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Runner {
    /// Number.
    pub id: i64,
    /// Name.
    pub name: String,
    /// `online`, `offline`.
    pub status: String,
    /// Whether it has a job.
    pub busy: bool,
    /// Whether it is gone after one job.
    pub ephemeral: bool,
}

/// An answer that is not a success.
#[derive(Debug)]
pub struct CallError {
    /// HTTP status.
    pub status: u16,
    /// What was asked, and what the forge said.
    pub message: String,
}

impl std::fmt::Display for CallError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for CallError {}

impl Scope {
    /// A repository.
    pub fn repository(owner: &str, name: &str) -> Self {
        Self::Repository(owner.to_owned(), name.to_owned())
    }

    /// Its part of the interface, e.g. `/orgs/NAME`.
    fn path(&self) -> String {
        match self {
            Self::Instance => "/admin".into(),
            Self::Organization(name) => format!("/orgs/{name}"),
            Self::Repository(owner, name) => format!("/repos/{owner}/{name}"),
        }
    }
}

impl Forge {
    /// A client that shows `token`, unless that is empty, to the forge at `url`.
    pub fn new(url: impl Into<String>, token: impl Into<String>) -> Self {
        let agent = Agent::config_builder()
            .timeout_global(Some(LIMIT))
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .build()
            .new_agent();
        Self { url: url.into().trim_end_matches('/').to_owned(), token: token.into(), agent }
    }

    /// Its address, without a slash at the end.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The token.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// The same forge with another token.
    pub fn with_token(&self, token: impl Into<String>) -> Self {
        Self { token: token.into(), ..self.clone() }
    }

    /// Fails unless the forge says it is healthy.
    pub fn healthy(&self) -> Result<()> {
        let url = format!("{}/api/healthz", self.url);
        let answer = self.agent.get(&url).call().with_context(|| format!("the forge at {} does not answer", self.url))?;
        if !answer.status().is_success() {
            bail!("the forge at {} answers with {}", self.url, answer.status());
        }
        Ok(())
    }

    /// Any call: `path` begins behind `/api/v1`. Fails with a [`CallError`] if the answer is not a success.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let authorization = (!self.token.is_empty()).then(|| format!("token {}", self.token));
        self.send(method, path, authorization.as_deref(), body).and_then(|text| parse(&text))
    }

    /// Whether there is a user of that name.
    pub fn has_user(&self, name: &str) -> Result<bool> {
        Ok(absent_is_none(self.call("GET", &format!("/users/{name}"), None))?.is_some())
    }

    /// Makes a user.
    pub fn create_user(&self, name: &str, password: &str) -> Result<()> {
        let body = json!({
            "username": name, "password": password, "email": format!("{name}@mayfly.test"), "must_change_password": false,
        });
        present_is_fine(self.call("POST", "/admin/users", Some(&body)))
    }

    /// Makes a token of `user`, as that user or as an administrator, who must give a password for it: name and password. Scopes are
    /// those of Gitea, e.g. `write:organization`.
    pub fn create_token(&self, by: (&str, &str), user: &str, name: &str, scopes: &[&str]) -> Result<String> {
        let basic = format!("Basic {}", STANDARD.encode(format!("{}:{}", by.0, by.1)));
        let body = json!({"name": name, "scopes": scopes});
        let text = self.send("POST", &format!("/users/{user}/tokens"), Some(&basic), Some(&body))?;
        parse(&text)?["sha1"].as_str().map(str::to_owned).context("the forge made a token and did not tell it")
    }

    /// Makes an organization.
    pub fn create_org(&self, name: &str) -> Result<()> {
        present_is_fine(self.call("POST", "/orgs", Some(&json!({"username": name, "visibility": "public"}))))
    }

    /// Makes an empty repository of an organization, or of the token's user if `owner` is that.
    pub fn create_repo(&self, owner: &str, name: &str, private: bool) -> Result<()> {
        let body = json!({"name": name, "private": private, "auto_init": false, "default_branch": "main"});
        match self.call("POST", &format!("/orgs/{owner}/repos"), Some(&body)) {
            Err(error) if status(&error) == Some(404) => present_is_fine(self.call("POST", "/user/repos", Some(&body))),
            other => present_is_fine(other),
        }
    }

    /// Writes a file, new or not, as one commit on a branch, and returns the commit. The first commit of an empty repository makes
    /// the branch.
    pub fn put_file(&self, owner: &str, repo: &str, branch: &str, path: &str, content: &[u8], message: &str) -> Result<String> {
        self.put_files(owner, repo, branch, &[(path, content)], message)
    }

    /// Writes several files as one commit, and returns the commit.
    pub fn put_files(&self, owner: &str, repo: &str, branch: &str, files: &[(&str, &[u8])], message: &str) -> Result<String> {
        let files: Vec<Value> =
            files.iter().map(|(path, content)| json!({"operation": "upload", "path": path, "content": STANDARD.encode(content)})).collect();
        let body = json!({"branch": branch, "message": message, "files": files});
        let answer = self.call("POST", &format!("/repos/{owner}/{repo}/contents"), Some(&body))?;
        answer["commit"]["sha"].as_str().map(str::to_owned).context("the forge made a commit and did not name it")
    }

    /// Makes a webhook and returns its number. Events are Gitea's names, e.g. `workflow_job`.
    pub fn create_hook(&self, scope: &Scope, url: &str, secret: &str, events: &[&str]) -> Result<i64> {
        let body = json!({
            "type": "gitea", "active": true, "events": events,
            "config": {"url": url, "content_type": "json", "secret": secret},
        });
        let answer = self.call("POST", &format!("{}/hooks", scope.path()), Some(&body))?;
        answer["id"].as_i64().context("the forge made a webhook and did not number it")
    }

    /// Starts a workflow that has `workflow_dispatch`, and returns its run. `workflow` is the file's name, `reference` a branch.
    pub fn dispatch(&self, owner: &str, repo: &str, workflow: &str, reference: &str, inputs: &Value) -> Result<i64> {
        let path = format!("/repos/{owner}/{repo}/actions/workflows/{workflow}/dispatches?return_run_details=true");
        let answer = self.call("POST", &path, Some(&json!({"ref": reference, "inputs": inputs})))?;
        answer["workflow_run_id"].as_i64().context("the forge started a run and did not number it")
    }

    /// Jobs of a scope; `status` narrows the list, e.g. to `queued`.
    pub fn jobs(&self, scope: &Scope, status: Option<&str>) -> Result<Vec<Job>> {
        let filter = status.map(|status| format!("&status={status}")).unwrap_or_default();
        self.list(&format!("{}/actions/jobs?{filter}", scope.path()), "jobs")
    }

    /// Jobs of one run.
    pub fn run_jobs(&self, owner: &str, repo: &str, run: i64) -> Result<Vec<Job>> {
        self.list(&format!("/repos/{owner}/{repo}/actions/runs/{run}/jobs?"), "jobs")
    }

    /// One job.
    pub fn job(&self, owner: &str, repo: &str, id: i64) -> Result<Job> {
        decode(self.call("GET", &format!("/repos/{owner}/{repo}/actions/jobs/{id}"), None)?)
    }

    /// Runs of a scope.
    pub fn runs(&self, scope: &Scope) -> Result<Vec<Run>> {
        self.list(&format!("{}/actions/runs?", scope.path()), "workflow_runs")
    }

    /// One run.
    pub fn run(&self, owner: &str, repo: &str, id: i64) -> Result<Run> {
        decode(self.call("GET", &format!("/repos/{owner}/{repo}/actions/runs/{id}"), None)?)
    }

    /// Registered runners of a scope. An organization's list does not hold those of its repositories.
    pub fn runners(&self, scope: &Scope) -> Result<Vec<Runner>> {
        self.list(&format!("{}/actions/runners?", scope.path()), "runners")
    }

    /// Takes a runner's registration away. One that is gone already is no error.
    pub fn delete_runner(&self, scope: &Scope, id: i64) -> Result<()> {
        absent_is_none(self.call("DELETE", &format!("{}/actions/runners/{id}", scope.path()), None)).map(drop)
    }

    /// The log of a job.
    pub fn job_log(&self, owner: &str, repo: &str, id: i64) -> Result<String> {
        let authorization = format!("token {}", self.token);
        self.send("GET", &format!("/repos/{owner}/{repo}/actions/jobs/{id}/logs"), Some(&authorization), None)
    }

    /// Cancels a run, as a person would: the interface has no call for it. Takes a user's name and password.
    pub fn cancel_run(&self, by: (&str, &str), owner: &str, repo: &str, run: i64) -> Result<()> {
        let login = format!("{}/user/login", self.url);
        let answer = self.agent.post(&login).send_form([("user_name", by.0), ("password", by.1)]).context("cannot sign in")?;
        if answer.status() != 303 {
            bail!("the forge does not let {} in: {}", by.0, answer.status());
        }
        // The session cookie comes twice; as in a browser, the later one counts.
        let cookies: BTreeMap<&str, &str> = answer
            .headers()
            .get_all("set-cookie")
            .iter()
            .filter_map(|cookie| cookie.to_str().ok()?.split(';').next()?.split_once('='))
            .filter(|(_, value)| !value.is_empty())
            .collect();
        let cookies: Vec<String> = cookies.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let cancel = format!("{}/{owner}/{repo}/actions/runs/{run}/cancel", self.url);
        let answer = self.agent.post(&cancel).header("cookie", cookies.join("; ")).send_empty().context("cannot cancel the run")?;
        if !answer.status().is_success() {
            bail!("the forge does not cancel run {run} of {owner}/{repo}: {}", answer.status());
        }
        Ok(())
    }

    /// Removes a repository. One that is gone already is no error.
    pub fn delete_repo(&self, owner: &str, name: &str) -> Result<()> {
        absent_is_none(self.call("DELETE", &format!("/repos/{owner}/{name}"), None)).map(drop)
    }

    /// Removes an organization and its repositories. One that is gone already is no error.
    pub fn delete_org(&self, name: &str) -> Result<()> {
        let path = format!("/orgs/{name}/repos?limit=50");
        let Some(repos) = absent_is_none(self.call("GET", &path, None))? else { return Ok(()) };
        for repo in repos.as_array().into_iter().flatten().filter_map(|repo| repo["name"].as_str()) {
            self.delete_repo(name, repo)?;
        }
        absent_is_none(self.call("DELETE", &format!("/orgs/{name}"), None)).map(drop)
    }

    /// All pages of a list. `path` ends with `?` or with a first parameter.
    fn list<T: DeserializeOwned>(&self, path: &str, field: &str) -> Result<Vec<T>> {
        let mut all = Vec::new();
        for page in 1.. {
            let mut answer = self.call("GET", &format!("{path}&limit=50&page={page}").replace("?&", "?"), None)?;
            let items: Option<Vec<T>> = decode(answer[field].take())?;
            let items = items.unwrap_or_default();
            let last = items.len() < 50;
            all.extend(items);
            if last {
                break;
            }
        }
        Ok(all)
    }

    fn send(&self, method: &str, path: &str, authorization: Option<&str>, body: Option<&Value>) -> Result<String> {
        let mut request = ureq::http::Request::builder().method(method).uri(format!("{}/api/v1{path}", self.url));
        if let Some(value) = authorization {
            request = request.header("authorization", value);
        }
        let asked = || format!("{method} {path}");
        let answer: Response<ureq::Body> = match body {
            Some(body) => {
                let request = request.header("content-type", "application/json").body(body.to_string())?;
                self.agent.run(request)
            }
            None => self.agent.run(request.body(())?),
        }
        .with_context(|| format!("the forge at {} does not answer {}", self.url, asked()))?;
        let code = answer.status();
        let text = answer.into_body().read_to_string().with_context(asked)?;
        if !code.is_success() {
            let said: String = text.chars().take(300).collect();
            let message = format!("{}: the forge answers {code}: {said}", asked());
            return Err(CallError { status: code.as_u16(), message }.into());
        }
        Ok(text)
    }
}

fn parse(text: &str) -> Result<Value> {
    if text.trim().is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_str(text).context("the forge's answer is not JSON")
}

fn decode<T: DeserializeOwned>(value: Value) -> Result<T> {
    serde_json::from_value(value).context("the forge's answer is not of the form we know")
}

fn status(error: &anyhow::Error) -> Option<u16> {
    error.downcast_ref::<CallError>().map(|error| error.status)
}

fn present_is_fine(result: Result<Value>) -> Result<()> {
    match result {
        Err(error) if matches!(status(&error), Some(409)) || (status(&error) == Some(422) && error.to_string().contains("exist")) => Ok(()),
        other => other.map(drop),
    }
}

fn absent_is_none(result: Result<Value>) -> Result<Option<Value>> {
    match result {
        Err(error) if status(&error) == Some(404) => Ok(None),
        other => other.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(status: u16, message: &str) -> Result<Value> {
        Err(CallError { status, message: message.to_owned() }.into())
    }

    #[test]
    fn only_what_exists_already_is_forgiven() {
        assert!(present_is_fine(error(409, "")).is_ok());
        assert!(present_is_fine(error(422, "user already exists [name: x]")).is_ok());
        assert!(present_is_fine(error(422, "name is reserved")).is_err());
        assert!(present_is_fine(error(403, "exists")).is_err());
    }

    #[test]
    fn only_what_is_absent_is_none() {
        assert!(absent_is_none(error(404, "")).unwrap().is_none());
        assert!(absent_is_none(error(403, "")).is_err());
        assert!(absent_is_none(Ok(Value::Null)).unwrap().is_some());
    }

    #[test]
    fn a_job_without_a_runner_reads() {
        let job: Job = decode(json!({"id": 3, "name": "x", "status": "queued", "labels": ["a"], "unknown": 1})).unwrap();
        assert_eq!((job.id, job.runner_id, job.conclusion.as_str()), (3, 0, ""));
    }
}
