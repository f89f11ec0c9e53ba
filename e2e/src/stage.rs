//! A stage for one test: an organization, a namespace and a pool of its own, so that tests run side by side.

use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Namespace, Pod, Secret};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::Api;
use kube::api::{DeleteParams, ListParams, PostParams};
use mayfly_cluster::Forge;
use mayfly_cluster::command::random_hex;
use mayfly_cluster::forge::{Job, Runner, Scope};
use mayfly_crds::names::{LABEL_MANAGED_BY, LABEL_POOL, MANAGED_BY};
use mayfly_crds::{RunnerPool, RunnerPoolStatus};
use serde_json::{Value, json};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

use crate::forge::Organization;
use crate::wait::eventually;
use crate::world::SYSTEM;
use crate::{World, install, pool};

/// Longest time a step of a job's life may take in a test, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// Name of the policy that opens everything.
const OPEN: &str = "open-wide";
/// Name of the pool of a stage.
pub const POOL: &str = "ci";

/// An organization, its robot, a namespace.
pub struct Stage {
    /// The cluster and the forge.
    pub world: World,
    /// The organization.
    pub organization: Organization,
    /// The forge, as the organization's robot.
    pub forge: Forge,
    /// The namespace, named as the organization.
    pub namespace: String,
    /// Held while the test runs: tests run side by side, but for those that disturb what all share.
    _turn: Turn,
}

/// The operator, its CRDs and the node's time are shared: whoever disturbs them does so alone.
static OPERATOR: LazyLock<Arc<RwLock<()>>> = LazyLock::new(Arc::default);

enum Turn {
    Shared { _guard: OwnedRwLockReadGuard<()> },
    Alone { _guard: OwnedRwLockWriteGuard<()> },
}

/// Waits until nobody disturbs what all share. For a test without a stage; the turn ends when it is dropped.
pub async fn turn() -> OwnedRwLockReadGuard<()> {
    OPERATOR.clone().read_owned().await
}

/// Waits until nobody uses what all share, and keeps it alone. For a test without a stage; the turn ends when it is dropped.
pub async fn alone() -> OwnedRwLockWriteGuard<()> {
    OPERATOR.clone().write_owned().await
}

impl Stage {
    /// Sets the stage: no pool yet.
    ///
    /// # Errors
    /// When the cluster is not up or the operator not installed.
    pub async fn set(name: &str) -> Result<Self> {
        let turn = Turn::Shared { _guard: turn().await };
        Self::set_in(name, turn).await
    }

    /// Sets a stage for a test that disturbs what all share, the operator, its CRDs or the node's time: no other test of this program
    /// runs meanwhile.
    ///
    /// # Errors
    /// When the cluster is not up or the operator not installed.
    pub async fn set_alone(name: &str) -> Result<Self> {
        let turn = Turn::Alone { _guard: OPERATOR.clone().write_owned().await };
        Self::set_in(name, turn).await
    }

    async fn set_in(name: &str, turn: Turn) -> Result<Self> {
        let world = World::connect().await?;
        let name = format!("t-{name}-{}", random_hex(3)?);
        let organization = Organization::create(&world, &name)?;
        pool::namespace(&world, &name).await?;
        pool::secret(&world, &organization, &name).await?;
        Ok(Self { forge: organization.client(&world), world, organization, namespace: name, _turn: turn })
    }

    /// Applies the stage's pool, changed by `change`, and waits until it is ready.
    ///
    /// # Errors
    /// When it does not get ready.
    pub async fn pool(&self, change: impl FnOnce(&mut Value)) -> Result<RunnerPool> {
        let applied = self.unready_pool(change).await?;
        pool::condition(&self.world, &self.namespace, POOL, "Ready", "True").await?;
        pool::first_proof(&self.world, &self.namespace, POOL, applied.spec.scale.warm as usize).await?;
        Ok(applied)
    }

    /// Applies the stage's pool, changed by `change`.
    ///
    /// # Errors
    /// With the API server's answer.
    pub async fn unready_pool(&self, change: impl FnOnce(&mut Value)) -> Result<RunnerPool> {
        let manifest = pool::manifest(&self.world, &self.namespace, POOL, &self.organization, change);
        pool::apply(&self.world, &manifest).await
    }

    /// Has the forge tell the pool of its jobs.
    ///
    /// # Errors
    /// With the forge's answer.
    pub fn hook(&self) -> Result<()> {
        let url = install::webhook_url(&self.world.cluster, &self.namespace, POOL)?;
        let scope = Scope::Organization(self.organization.name.clone());
        self.forge.create_hook(&scope, &url, &self.organization.webhook_secret, &["workflow_job"]).map(drop)
    }

    /// Makes a repository with these workflows in one push. Returns once the forge has made as many jobs as `jobs`.
    ///
    /// # Errors
    /// When they do not appear.
    pub async fn push(&self, repository: &str, workflows: &[(&str, &str)], jobs: usize) -> Result<Vec<Job>> {
        let owner = &self.organization.name;
        self.forge.create_repo(owner, repository, false)?;
        let seen: BTreeSet<i64> = self.jobs(repository)?.iter().map(|job| job.id).collect();
        let paths: Vec<String> = workflows.iter().map(|(file, _)| format!(".gitea/workflows/{file}")).collect();
        let files: Vec<(&str, &[u8])> = paths.iter().zip(workflows).map(|(path, (_, text))| (path.as_str(), text.as_bytes())).collect();
        self.forge.put_files(owner, repository, "main", &files, "Add workflows")?;
        eventually(format!("{jobs} job(s) of {repository}"), PATIENCE, || async {
            let mut found = self.jobs(repository)?;
            found.retain(|job| !seen.contains(&job.id));
            found.sort_by_key(|job| job.id);
            Ok((found.len() >= jobs).then_some(found))
        })
        .await
    }

    /// Makes the repository `app` with a workflow, and a pull request to it from the robot's fork. Returns the pull request's job.
    ///
    /// # Errors
    /// When it does not appear.
    pub async fn fork_pull_request(&self, workflow: &str) -> Result<Job> {
        let (owner, robot) = (&self.organization.name, &self.organization.robot);
        self.forge.create_repo(owner, "app", false)?;
        self.forge.put_file(owner, "app", "main", ".gitea/workflows/pr.yml", workflow.as_bytes(), "Add workflow")?;
        self.forge.call("POST", &format!("/repos/{owner}/app/forks"), Some(&json!({"name": "app-fork"})))?;
        eventually("the fork's branch", PATIENCE, || async {
            Ok(Some(self.world.forge.call("GET", &format!("/repos/{robot}/app-fork/branches/main"), None)?))
        })
        .await?;
        self.world.forge.put_file(robot, "app-fork", "main", "evil.txt", b"from a fork", "Change something")?;
        let pull = json!({"title": "from a fork", "head": format!("{robot}:main"), "base": "main"});
        self.world.forge.call("POST", &format!("/repos/{owner}/app/pulls"), Some(&pull))?;
        eventually("the pull request's job", PATIENCE, || async { Ok(self.jobs("app")?.into_iter().next()) }).await
    }

    /// Jobs of a repository.
    ///
    /// # Errors
    /// With the forge's answer.
    pub fn jobs(&self, repository: &str) -> Result<Vec<Job>> {
        self.forge.jobs(&Scope::repository(&self.organization.name, repository), None)
    }

    /// The job as it is now.
    ///
    /// # Errors
    /// With the forge's answer.
    pub fn job(&self, repository: &str, id: i64) -> Result<Job> {
        self.forge.job(&self.organization.name, repository, id)
    }

    /// Waits until a job has this status.
    ///
    /// # Errors
    /// When it does not get so.
    pub async fn job_is(&self, repository: &str, id: i64, status: &str) -> Result<Job> {
        eventually(format!("job {id} of {repository} {status}; pool: {:?}", self.status().await?.conditions), PATIENCE, || async {
            let job = self.job(repository, id)?;
            Ok((job.status == status).then_some(job))
        })
        .await
    }

    /// Waits until a job is over and returns its log.
    ///
    /// # Errors
    /// When it does not end with success.
    pub async fn succeeds(&self, repository: &str, id: i64) -> Result<String> {
        let job = self.job_is(repository, id, "completed").await?;
        let log = self.forge.job_log(&self.organization.name, repository, id)?;
        ensure!(job.conclusion == "success", "job {id} of {repository}: {}; its log:\n{log}", job.conclusion);
        Ok(log)
    }

    /// Runner pods.
    ///
    /// # Errors
    /// With the API server's answer.
    pub async fn pods(&self) -> Result<Vec<Pod>> {
        pool::pods(&self.world, &self.namespace, POOL).await
    }

    /// The pods' API.
    pub fn pod_api(&self) -> Api<Pod> {
        Api::namespaced(self.world.client.clone(), &self.namespace)
    }

    /// Registrations of a pool's runners.
    ///
    /// # Errors
    /// With the forge's answer.
    pub fn registrations(&self, of: &RunnerPool) -> Result<Vec<Runner>> {
        pool::registrations(&self.world.forge, &self.organization.name, of)
    }

    /// The pool's status.
    ///
    /// # Errors
    /// With the API server's answer.
    pub async fn status(&self) -> Result<RunnerPoolStatus> {
        let found = pool::pools(&self.world, &self.namespace).get_opt(POOL).await?;
        Ok(found.and_then(|pool| pool.status).unwrap_or_default())
    }

    /// Waits until the pool tells of a job that waits for this reason.
    ///
    /// # Errors
    /// When it does not.
    pub async fn waits_because(&self, id: i64, reason: &str) -> Result<String> {
        eventually(format!("job {id} told to wait because of {reason}"), PATIENCE, || async {
            let told = self.status().await?.waiting_jobs;
            let found = told.into_iter().find(|job| job.job.ends_with(&format!("#{id}")) && job.reason == reason);
            Ok(found.map(|job| job.message))
        })
        .await
    }

    /// Waits until a warning event about the pool has this reason; returns its text.
    ///
    /// # Errors
    /// When none comes.
    pub async fn event(&self, reason: &str) -> Result<String> {
        let events: Api<Event> = Api::namespaced(self.world.client.clone(), &self.namespace);
        eventually(format!("event {reason}; failure: {:?}", self.status().await?.last_failure), PATIENCE, || async {
            let found = events.list(&ListParams::default()).await?;
            Ok(found.items.into_iter().find(|event| event.reason.as_deref() == Some(reason)).map(|event| event.note.unwrap_or_default()))
        })
        .await
    }

    /// Waits until some pod satisfies `test`.
    ///
    /// # Errors
    /// When none does.
    pub async fn a_pod(&self, what: &str, test: impl Fn(&Pod) -> bool) -> Result<Pod> {
        eventually(format!("a pod {what}"), PATIENCE, || async { Ok(self.pods().await?.into_iter().find(|pod| test(pod))) }).await
    }

    /// Waits until the pool has neither pods nor registrations.
    ///
    /// # Errors
    /// When something stays.
    pub async fn nothing_left(&self, of: &RunnerPool) -> Result<()> {
        pool::nothing_left(&self.world, &self.organization.name, of).await
    }

    /// Adds a policy that opens every pod of the namespace, as somebody might beside Mayfly's: policies add up. It is made in the
    /// operator's name, who alone may, and as one of its own.
    ///
    /// # Errors
    /// With the API server's answer.
    pub async fn open_wide(&self) -> Result<()> {
        let labels = json!({LABEL_MANAGED_BY: MANAGED_BY, LABEL_POOL: "another"});
        let policy = json!({"metadata": {"name": OPEN, "labels": labels},
            "spec": {"podSelector": {}, "policyTypes": ["Egress"], "egress": [{}]}});
        let policies: Api<NetworkPolicy> = Api::namespaced(self.world.as_operator()?, &self.namespace);
        policies.create(&PostParams::default(), &serde_json::from_value(policy)?).await?;
        Ok(())
    }

    /// Takes that policy away.
    ///
    /// # Errors
    /// With the API server's answer.
    pub async fn close_again(&self) -> Result<()> {
        let policies: Api<NetworkPolicy> = Api::namespaced(self.world.as_operator()?, &self.namespace);
        policies.delete(OPEN, &DeleteParams::default()).await?;
        Ok(())
    }

    /// Takes everything away again.
    ///
    /// # Errors
    /// When the pool does not go.
    pub async fn strike(self) -> Result<()> {
        pool::delete(&self.world, &self.namespace, POOL).await?;
        match Api::<Namespace>::all(self.world.client.clone()).delete(&self.namespace, &DeleteParams::background()).await {
            Ok(_) => {}
            // The test took it away itself.
            Err(kube::Error::Api(status)) if status.is_not_found() => {}
            Err(error) => return Err(error.into()),
        }
        let secrets: Api<Secret> = Api::namespaced(self.world.client.clone(), SYSTEM);
        for secret in secrets.list_metadata(&ListParams::default()).await?.items {
            let name = secret.metadata.name.unwrap_or_default();
            if name.starts_with(&format!("forge-{}", self.organization.name)) {
                secrets.delete(&name, &DeleteParams::default()).await?;
            }
        }
        self.world.forge.delete_org(&self.organization.name)?;
        self.world.forge.call("DELETE", &format!("/admin/users/{}?purge=true", self.organization.robot), None).context("the robot")?;
        Ok(())
    }
}

/// What a job said under a key: the rest of the line that begins with `key`. The log holds the script as well, whose lines begin
/// otherwise.
pub fn said<'a>(log: &'a str, key: &str) -> Option<&'a str> {
    log.lines().filter_map(|line| line.split_once(' ')).find_map(|(_, text)| text.strip_prefix(key)).map(str::trim)
}

/// A workflow of one job with the label `linux` that runs `script`.
pub fn workflow(on: &str, script: &str) -> String {
    let job = json!({"on": on, "jobs": {"job": {"runs-on": "linux", "steps": [{"run": script}]}}});
    // JSON is YAML.
    job.to_string()
}
