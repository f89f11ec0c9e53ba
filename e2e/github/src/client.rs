//! A typed client of the control API, for test programs.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use ureq::Agent;
use ureq::http::Request;

use crate::control::{Enqueue, JobView, NewApp, NewGroup, NewOrganization, NewRepository};
use crate::model::{Event, Fault, Seen};

/// A handle on a simulator, wherever it runs.
#[derive(Clone)]
pub struct Simulator {
    agent: Agent,
    url: String,
}

impl Simulator {
    /// The simulator at this base URL. `authorities` (PEM) are trusted for `https`.
    pub fn new(url: &str, authorities: &[u8]) -> Self {
        Self { agent: crate::http::agent(authorities, Duration::from_secs(30)), url: url.trim_end_matches('/').to_owned() }
    }

    /// Its base URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Any request to the control API, `path` without `/_simulator/`.
    ///
    /// # Errors
    /// When it cannot be reached or refuses.
    pub async fn call(&self, method: &str, path: &str, body: Vec<u8>) -> Result<Value> {
        let (agent, url) = (self.agent.clone(), format!("{}/_simulator/{path}", self.url));
        let request = Request::builder().method(method).uri(url).body(body)?;
        tokio::task::spawn_blocking(move || {
            let mut response = agent.run(request)?;
            let status = response.status();
            let text = response.body_mut().with_config().limit(256 << 20).read_to_string()?;
            if !status.is_success() {
                bail!("the simulator answers {status}: {text}");
            }
            Ok(serde_json::from_str(&text)?)
        })
        .await?
    }

    async fn post(&self, path: &str, body: &impl Serialize) -> Result<Value> {
        self.call("POST", path, serde_json::to_vec(body)?).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str, member: &str) -> Result<T> {
        let value = self.call("GET", path, Vec::new()).await?;
        Ok(serde_json::from_value(if member.is_empty() { value } else { value[member].clone() })?)
    }

    /// Changes settings: the members of [`crate::model::Settings`] that are given.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn set(&self, changes: Value) -> Result<()> {
        self.call("PATCH", "settings", changes.to_string().into_bytes()).await.map(drop)
    }

    /// Makes an enterprise.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn enterprise(&self, slug: &str) -> Result<()> {
        self.post("enterprises", &json!({"slug": slug})).await.map(drop)
    }

    /// Makes an organization.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn organization(&self, organization: &NewOrganization) -> Result<()> {
        self.post("organizations", organization).await.map(drop)
    }

    /// Makes or changes a repository; returns its number.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn repository(&self, repository: &NewRepository) -> Result<i64> {
        self.post("repositories", repository).await?["id"].as_i64().context("a repository has a number")
    }

    /// Makes an App and installs it in an account: the App, and the number of the installation.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn app(&self, account: &str) -> Result<(NewApp, i64)> {
        self.install(account, &json!({})).await
    }

    /// Makes an App with this client id, in the place of an earlier one, and installs it in an account.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn app_of(&self, client_id: &str, account: &str) -> Result<(NewApp, i64)> {
        self.install(account, &json!({"client_id": client_id})).await
    }

    async fn install(&self, account: &str, app: &Value) -> Result<(NewApp, i64)> {
        let app: NewApp = serde_json::from_value(self.post("apps", app).await?)?;
        let installation = self.post("installations", &json!({"app_id": app.app_id, "account": account})).await?;
        Ok((app, installation["id"].as_i64().context("an installation has a number")?))
    }

    /// Gives an App a new key; the old one is void, unless it is kept.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn rotate_app_key(&self, app: i64, keep: bool) -> Result<NewApp> {
        let path = format!("apps/{app}/rotate{}", if keep { "?keep=1" } else { "" });
        Ok(serde_json::from_value(self.post(&path, &json!({})).await?)?)
    }

    /// Makes a personal access token.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn personal_token(&self) -> Result<String> {
        let made = self.post("personal-tokens", &json!({})).await?;
        Ok(made["token"].as_str().context("there is a token")?.to_owned())
    }

    /// Makes or changes a runner group and answers its number.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn runner_group(&self, group: &NewGroup) -> Result<i64> {
        self.post("runner-groups", group).await?["id"].as_i64().context("a group has a number")
    }

    /// Puts a workflow file into a repository (`owner/name`).
    ///
    /// # Errors
    /// When the file is not understood; else as of [`Simulator::call`].
    pub async fn workflow(&self, repository: &str, file: &str, text: &str) -> Result<()> {
        self.call("PUT", &format!("repositories/{repository}/workflows/{file}"), text.as_bytes().to_vec()).await.map(drop)
    }

    /// Lets something happen in a repository (`owner/name`); answers the runs that it starts.
    ///
    /// # Errors
    /// When nothing starts; else as of [`Simulator::call`].
    pub async fn dispatch(&self, repository: &str, event: &Event) -> Result<Vec<i64>> {
        let made = self.post(&format!("repositories/{repository}/dispatch"), event).await?;
        Ok(serde_json::from_value(made["runs"].clone())?)
    }

    /// Has all jobs of a run that is over run again.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn rerun(&self, run: i64) -> Result<()> {
        self.post(&format!("runs/{run}/rerun"), &json!({})).await.map(drop)
    }

    /// Queues jobs without a workflow file; answers their run.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn enqueue(&self, jobs: &Enqueue) -> Result<i64> {
        self.post("jobs", jobs).await?["run"].as_i64().context("there is a run")
    }

    /// Cancels a run.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn cancel(&self, run: i64) -> Result<()> {
        self.post(&format!("runs/{run}/cancel"), &json!({})).await.map(drop)
    }

    /// The jobs of a run, without their logs.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn jobs(&self, run: i64) -> Result<Vec<JobView>> {
        self.get(&format!("jobs?run={run}"), "jobs").await
    }

    /// A job with its log.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn job(&self, id: i64) -> Result<JobView> {
        self.get(&format!("jobs/{id}"), "").await
    }

    /// Waits until all jobs of a run are over and answers them with their logs.
    ///
    /// # Errors
    /// When that takes longer than `patience`; else as of [`Simulator::call`].
    pub async fn finished(&self, run: i64, patience: Duration) -> Result<Vec<JobView>> {
        let begun = Instant::now();
        loop {
            let jobs = self.jobs(run).await?;
            if jobs.iter().all(|job| job.state == "completed") {
                let mut full = Vec::new();
                for job in jobs {
                    full.push(self.job(job.id).await?);
                }
                return Ok(full);
            }
            if begun.elapsed() > patience {
                let states: Vec<_> = jobs.iter().map(|job| format!("{} {}", job.name, job.state)).collect();
                bail!("run {run} is not over after {patience:?}: {}", states.join(", "));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// All scale sets.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn scale_sets(&self) -> Result<Vec<Value>> {
        self.get("scale-sets", "scale_sets").await
    }

    /// Deletes a scale set behind its owner's back.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn delete_scale_set(&self, id: i64) -> Result<()> {
        self.call("DELETE", &format!("scale-sets/{id}"), Vec::new()).await.map(drop)
    }

    /// Lets the message ids of a scale set begin anew.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn restart_message_ids(&self, id: i64) -> Result<()> {
        self.post(&format!("scale-sets/{id}/restart-ids"), &json!({})).await.map(drop)
    }

    /// Ends the session of a scale set behind its owner's back.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn drop_session(&self, id: i64) -> Result<()> {
        self.post(&format!("scale-sets/{id}/drop-session"), &json!({})).await.map(drop)
    }

    /// All runners.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn runners(&self) -> Result<Vec<Value>> {
        self.get("runners", "runners").await
    }

    /// Makes all tokens of a kind void: `registration`, `admin`, `queue`, `runner`, `installation`, `personal`.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn expire(&self, kind: &str) -> Result<()> {
        self.post(&format!("expire/{kind}"), &json!({})).await.map(drop)
    }

    /// Injects a fault; answers its number.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn fault(&self, fault: &Fault) -> Result<i64> {
        self.post("faults", fault).await?["id"].as_i64().context("a fault has a number")
    }

    /// Takes all faults away.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn clear_faults(&self) -> Result<()> {
        self.call("DELETE", "faults", Vec::new()).await.map(drop)
    }

    /// Requests seen after the one with this number.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn requests(&self, after: u64) -> Result<Vec<Seen>> {
        self.get(&format!("requests?after={after}"), "requests").await
    }

    /// Forgets the requests seen.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn forget_requests(&self) -> Result<()> {
        self.call("DELETE", "requests", Vec::new()).await.map(drop)
    }

    /// How many requests of which kind there were, and how many a job cost.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn counters(&self) -> Result<Value> {
        self.get("counters", "").await
    }

    /// Sends `workflow_job` webhooks to this URL; for all organizations or one.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn webhook(&self, url: &str, secret: &str, organization: Option<&str>) -> Result<()> {
        self.post("webhooks", &json!({"url": url, "secret": secret, "organization": organization})).await.map(drop)
    }

    /// Webhook deliveries so far.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn deliveries(&self) -> Result<Vec<Value>> {
        self.get("deliveries", "deliveries").await
    }

    /// Delivers a webhook once more.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn redeliver(&self, guid: &str) -> Result<()> {
        self.post(&format!("deliveries/{guid}/redeliver"), &json!({})).await.map(drop)
    }

    /// Signs OIDC tokens with a new key from now on; the old one stays published.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn rotate_oidc(&self) -> Result<()> {
        self.post("oidc/rotate", &json!({})).await.map(drop)
    }

    /// Withdraws all OIDC keys but the one that signs.
    ///
    /// # Errors
    /// As of [`Simulator::call`].
    pub async fn withdraw_oidc(&self) -> Result<()> {
        self.post("oidc/withdraw", &json!({})).await.map(drop)
    }
}
