//! The GitHub simulator in the outside world, and pools that are served from it, for the demo, the tests and the benchmarks.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{Namespace, Pod, Secret};
use k8s_openapi::api::events::v1::Event as KubeEvent;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use mayfly_cluster::command::random_hex;
use mayfly_cluster::{ForgeAccess, World as Place, pki};
use mayfly_crds::names::{ANNOTATION_FORGE, ANNOTATION_POOL_NAMESPACES, RunnerName};
use mayfly_crds::{RunnerPool, RunnerPoolStatus};
use mayfly_github_simulator::client::Simulator;
use mayfly_github_simulator::control::{Enqueue, NewApp, NewGroup, NewOrganization, NewRepository};
use mayfly_github_simulator::model::Event;
use serde_json::{Value, json};
use tokio::sync::Mutex;

use crate::install::webhook_url;
use crate::stage::{PATIENCE, POOL};
use crate::wait::eventually;
use crate::world::{SYSTEM, built, host_beside_forge, host_of};
use crate::{World, pool};

/// Port of the simulator, at the address of the outside world's other forge.
const PORT: u16 = 8480;
/// Port at which it answers with a certificate: tokens of its issuer are good for those only who can be sure of its keys.
const TLS_PORT: u16 = 8481;
/// What it is called among the programs of the outside world.
const NAME: &str = "github-simulator";
/// The runner group that pools are in.
const GROUP: &str = "runners";

/// One is started at a time: two cannot listen on one address.
static STARTING: Mutex<()> = Mutex::const_new(());

/// An organization at the simulated GitHub, with an App that is installed in it.
#[derive(Clone)]
pub struct Organization {
    /// Its name.
    pub name: String,
    /// Its repository's, with its own before: `acme/app`.
    pub repository: String,
    /// Number of its repository.
    pub repository_id: i64,
    /// The simulator, by its control API.
    pub simulator: Simulator,
    /// Base address for pods and operator.
    pub url: String,
    /// The App.
    pub app: NewApp,
    /// Number of its installation.
    pub installation: i64,
    /// Secret of its webhook.
    pub webhook_secret: String,
}

/// The issuer of its jobs' tokens, whose certificate is of the cluster's authority ([`mayfly_cluster::pki::authority`]).
///
/// # Errors
/// When the forge's address is none.
pub fn issuer(access: &ForgeAccess) -> Result<String> {
    Ok(format!("https://{}:{TLS_PORT}/_services/token", host_beside_forge(access, "github")?))
}

/// Its REST API, by a certificate of the same authority.
///
/// # Errors
/// When the forge's address is none.
pub fn api_url(access: &ForgeAccess) -> Result<String> {
    Ok(format!("https://{}:{TLS_PORT}/api/v3", host_beside_forge(access, "github")?))
}

/// The simulator, from where tests run.
///
/// # Errors
/// When the forge's address is none.
pub fn local_url(world: &World) -> Result<String> {
    Ok(format!("http://{}:{PORT}", host_of(&world.access.local_url)?))
}

/// Has the simulator run. Everything of an earlier one is kept.
///
/// # Errors
/// When it does not answer.
pub async fn start(world: &World) -> Result<Simulator> {
    let _one = STARTING.lock().await;
    let (host, local) = (host_beside_forge(&world.access, "github")?, host_of(&world.access.local_url)?);
    let (certificate, key) = pki::server(world.cluster.layout(), NAME, &[&host, local])?;
    let program = built()?.join(NAME);
    let arguments = [
        ("--listen", format!("0.0.0.0:{PORT}")),
        ("--public-url", format!("http://{host}:{PORT}")),
        ("--tls-listen", format!("0.0.0.0:{TLS_PORT}")),
        ("--tls-cert", certificate.display().to_string()),
        ("--tls-key", key.display().to_string()),
        ("--issuer", issuer(&world.access)?),
    ];
    let (program, words) = (program.display().to_string(), arguments.iter().flat_map(|(name, value)| [*name, value.as_str()]));
    let argv: Vec<&str> = std::iter::once(program.as_str()).chain(words).collect();
    world.cluster.start(Place::Outside, NAME, &argv)?;
    let simulator = Simulator::new(&local_url(world)?, b"");
    eventually("the GitHub simulator answers", Duration::from_secs(10), || async {
        Ok(simulator.call("GET", "settings", Vec::new()).await.is_ok().then_some(()))
    })
    .await?;
    Ok(simulator)
}

impl Organization {
    /// Makes an organization with the private repository `repository`, a runner group and an installed App.
    ///
    /// # Errors
    /// With the simulator's answer.
    pub async fn create(world: &World, name: &str, repository: &str) -> Result<Self> {
        let simulator = start(world).await?;
        simulator.organization(&NewOrganization { login: name.to_owned(), enterprise: None }).await?;
        let new = NewRepository { owner: name.to_owned(), name: repository.to_owned(), ..NewRepository::default() };
        let repository_id = simulator.repository(&new).await?;
        let repository = format!("{name}/{repository}");
        let group = NewGroup { place: name.to_owned(), name: GROUP.to_owned(), ..NewGroup::default() };
        simulator.runner_group(&group).await?;
        let (app, installation) = simulator.app(name).await?;
        let about = simulator.call("GET", "", Vec::new()).await?;
        let url = about["url"].as_str().context("the simulator tells its address")?.to_owned();
        let webhook_secret = random_hex(16)?;
        Ok(Self { name: name.to_owned(), repository, repository_id, simulator, url, app, installation, webhook_secret })
    }

    /// So many jobs at once for the runners with a label, each with this script. Returns their run.
    ///
    /// # Errors
    /// With the simulator's answer.
    pub async fn enqueue(&self, label: &str, count: usize, script: &str) -> Result<i64> {
        let (repository, labels) = (self.repository.clone(), vec![label.to_owned()]);
        self.simulator.enqueue(&Enqueue { repository, labels, count, script: script.to_owned() }).await
    }

    /// The address of the pool: the organization's.
    pub fn config_url(&self) -> String {
        format!("{}/{}", self.url, self.name)
    }

    /// Puts the App's key, and the webhook's secret, where the operator looks for it, for the pools of one namespace. Returns the Secret's name.
    ///
    /// # Errors
    /// With the API server's answer.
    pub async fn secret(&self, world: &World, namespace: &str) -> Result<String> {
        let name = format!("forge-{}", self.name);
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                annotations: Some(BTreeMap::from([
                    (ANNOTATION_FORGE.to_owned(), self.config_url()),
                    (ANNOTATION_POOL_NAMESPACES.to_owned(), namespace.to_owned()),
                ])),
                ..ObjectMeta::default()
            },
            data: Some(BTreeMap::from([
                ("key.pem".to_owned(), ByteString(self.app.private_key.clone().into_bytes())),
                ("webhook".to_owned(), ByteString(self.webhook_secret.clone().into_bytes())),
            ])),
            ..Secret::default()
        };
        let params = PatchParams::apply("mayfly-e2e").force();
        Api::<Secret>::namespaced(world.client.clone(), SYSTEM).patch(&name, &params, &Patch::Apply(&secret)).await?;
        Ok(name)
    }

    /// The manifest of a pool that serves the organization with the scale set `linux`; `change` may change it before it is applied.
    pub fn manifest(&self, namespace: &str, name: &str, change: impl FnOnce(&mut Value)) -> Value {
        let app = json!({"clientId": self.app.client_id, "installationId": self.installation,
            "privateKeySecretRef": {"name": format!("forge-{}", self.name), "key": "key.pem"}});
        let forge =
            json!({"github": {"url": self.config_url(), "app": app, "runnerGroup": {"name": GROUP}, "scaleSet": {"name": "linux"}}});
        pool::manifest_of(forge, namespace, name, change)
    }

    /// Changes a manifest of [`Organization::manifest`] into one without a scale set.
    pub fn just_in_time(&self, pool: &mut Value) {
        let github = &mut pool["spec"]["forge"]["github"];
        if let Some(github) = github.as_object_mut() {
            github.retain(|field, _| !matches!(field.as_str(), "scaleSet" | "runnerGroup"));
        }
        github["justInTime"] = json!({"labels": ["linux"]});
        github["webhookSecretRef"] = json!({"name": format!("forge-{}", self.name), "key": "webhook"});
    }

    /// Registrations that runners of this pool have.
    ///
    /// # Errors
    /// With the simulator's answer.
    pub async fn registrations(&self, of: &RunnerPool) -> Result<Vec<String>> {
        let uid = of.uid().unwrap_or_default();
        let runners = self.simulator.runners().await?;
        let names = runners.iter().filter_map(|runner| runner["name"].as_str()).filter(|name| RunnerName::is_of_pool(name, &uid));
        Ok(names.map(str::to_owned).collect())
    }

    /// Waits until the pool has neither pods nor registrations.
    ///
    /// # Errors
    /// When something stays; it is named.
    pub async fn nothing_left(&self, world: &World, of: &RunnerPool) -> Result<()> {
        let (namespace, name) = (of.namespace().unwrap_or_default(), of.name_any());
        eventually(format!("nothing left of {namespace}/{name}"), Duration::from_secs(60), || async {
            let (pods, runners) = (pool::pods(world, &namespace, &name).await?, self.registrations(of).await?);
            ensure!(pods.is_empty() && runners.is_empty(), "{} pod(s), registrations {runners:?}", pods.len());
            Ok(Some(()))
        })
        .await
    }
}

/// A stage for one test: an organization at the simulated GitHub, with a namespace and a pool of its own.
pub struct Stage {
    /// The cluster.
    pub world: World,
    /// The organization.
    pub organization: Organization,
    /// The namespace, named as the organization.
    pub namespace: String,
}

impl Stage {
    /// Sets the stage: no pool yet.
    ///
    /// # Errors
    /// With what went wrong.
    pub async fn set(name: &str) -> Result<Self> {
        let world = World::connect().await?;
        let name = format!("t-{name}-{}", random_hex(3)?);
        let organization = Organization::create(&world, &name, "web").await?;
        pool::namespace(&world, &name).await?;
        organization.secret(&world, &name).await?;
        Ok(Self { world, organization, namespace: name })
    }

    /// Applies the stage's pool, changed by `change`, and waits until it is ready and has no pods.
    ///
    /// # Errors
    /// When it does not get ready.
    pub async fn pool(&self, change: impl FnOnce(&mut Value)) -> Result<RunnerPool> {
        let applied = pool::apply(&self.world, &self.organization.manifest(&self.namespace, POOL, change)).await?;
        pool::condition(&self.world, &self.namespace, POOL, "Ready", "True").await?;
        pool::first_proof(&self.world, &self.namespace, POOL, 0).await?;
        Ok(applied)
    }

    /// Has GitHub tell the pool of the organization's jobs.
    ///
    /// # Errors
    /// With the simulator's answer.
    pub async fn hook(&self) -> Result<()> {
        let url = webhook_url(&self.world.cluster, &self.namespace, POOL)?.replace("/gitea/", "/github/");
        self.organization.simulator.webhook(&url, &self.organization.webhook_secret, Some(&self.organization.name)).await
    }

    /// Pushes a workflow of one job that runs `script`; returns its run.
    ///
    /// # Errors
    /// With the simulator's answer.
    pub async fn push(&self, file: &str, script: &str) -> Result<i64> {
        self.push_job(file, json!({"steps": [{"run": script}]})).await
    }

    /// Pushes a workflow with this job, which runs on the pool; returns its run.
    ///
    /// # Errors
    /// With the simulator's answer.
    pub async fn push_job(&self, file: &str, mut job: Value) -> Result<i64> {
        job["runs-on"] = json!("linux");
        let repository = &self.organization.repository;
        let workflow = json!({"on": "push", "jobs": {"job": job}});
        self.organization.simulator.workflow(repository, file, &workflow.to_string()).await?;
        let event = Event { workflow: Some(file.to_owned()), ..Event::default() };
        self.organization.simulator.dispatch(repository, &event).await?.pop().context("a run")
    }

    /// Waits until the run's one job is over; returns its log.
    ///
    /// # Errors
    /// With its log, when it fails.
    pub async fn succeeds(&self, run: i64) -> Result<String> {
        let job = self.organization.simulator.finished(run, PATIENCE).await?.pop().context("a job")?;
        ensure!(job.conclusion.as_deref() == Some("success"), "{:?}; its log:\n{}", job.conclusion, job.log);
        Ok(job.log)
    }

    /// Waits until every job of the run has a runner.
    ///
    /// # Errors
    /// When it takes too long.
    pub async fn runs(&self, run: i64) -> Result<()> {
        eventually(format!("run {run} has a runner; {:?}", self.status().await?.conditions), PATIENCE, || async {
            Ok(self.organization.simulator.jobs(run).await?.iter().all(|job| job.state == "running").then_some(()))
        })
        .await
    }

    /// Pods of the pool.
    ///
    /// # Errors
    /// With the API server's answer.
    pub async fn pods(&self) -> Result<Vec<Pod>> {
        pool::pods(&self.world, &self.namespace, POOL).await
    }

    /// The pool's status.
    ///
    /// # Errors
    /// With the API server's answer.
    pub async fn status(&self) -> Result<RunnerPoolStatus> {
        let found = pool::pools(&self.world, &self.namespace).get_opt(POOL).await?;
        Ok(found.and_then(|pool| pool.status).unwrap_or_default())
    }

    /// Notes of the events with this reason.
    ///
    /// # Errors
    /// With the API server's answer.
    pub async fn events(&self, reason: &str) -> Result<Vec<String>> {
        let events: Api<KubeEvent> = Api::namespaced(self.world.client.clone(), &self.namespace);
        let found = events.list(&ListParams::default()).await?.items.into_iter();
        Ok(found.filter(|event| event.reason.as_deref() == Some(reason)).filter_map(|event| event.note).collect())
    }

    /// The scale set of the pool, as the simulator tells it.
    ///
    /// # Errors
    /// With the simulator's answer.
    pub async fn scale_set(&self) -> Result<Option<Value>> {
        let place = self.organization.name.clone();
        let sets = self.organization.simulator.scale_sets().await?;
        Ok(sets.into_iter().find(|set| set["place"].as_str().is_some_and(|at| at.ends_with(&place))))
    }

    /// Takes everything away.
    ///
    /// # Errors
    /// With the API server's answer.
    pub async fn strike(self) -> Result<()> {
        pool::delete(&self.world, &self.namespace, POOL).await?;
        Api::<Namespace>::all(self.world.client.clone()).delete(&self.namespace, &DeleteParams::background()).await?;
        Ok(())
    }
}
