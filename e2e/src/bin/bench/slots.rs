//! More jobs than pods at a time, beside the same pods without Mayfly: made, awaited and deleted by this program, which knows what it does.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, PostParams};
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Api, ResourceExt};
use mayfly_crds::names::RUNNER_CONTAINER;
use mayfly_e2e::github::Organization;
use mayfly_e2e::stage::POOL;
use mayfly_e2e::wait::eventually;
use mayfly_e2e::{World, pool};
use serde_json::json;

use crate::measure::{Figures, Process, now};

const NAMESPACE: &str = "mayfly-bench-slots";
const JOBS: usize = 100;
const SLOTS: usize = 50;
/// Seconds that a job takes.
const JOB: u32 = 5;
const PATIENCE: Duration = Duration::from_secs(600);

/// How long all of them took, and how long the API server worked for them.
struct Cost {
    seconds: f64,
    api_server: f64,
}

pub(crate) async fn compare(figures: &mut Figures) -> Result<()> {
    let world = World::connect().await?;
    let organization = Organization::create(&world, "bench-slots", "web").await?;
    pool::namespace(&world, NAMESPACE).await?;
    organization.secret(&world, NAMESPACE).await?;
    let manifest = organization.manifest(NAMESPACE, POOL, |pool| {
        pool["spec"]["scale"]["max"] = json!(SLOTS);
        pool["spec"]["runner"]["resources"]["requests"] = json!({"cpu": "5m", "memory": "16Mi"});
    });
    let served = pool::apply(&world, &manifest).await?;
    pool::condition(&world, NAMESPACE, POOL, "IsolationProved", "True").await?;
    organization.nothing_left(&world, &served).await?;

    let shape = shape(&world, &organization, NAMESPACE, JOB).await?;
    organization.nothing_left(&world, &served).await?;
    let plain = cost(|| plain(&world, &shape)).await?;
    let jobs = cost(|| async {
        let run = organization.enqueue("linux", JOBS, &format!("sleep {JOB}")).await?;
        let jobs = organization.simulator.finished(run, PATIENCE).await?;
        ensure!(jobs.iter().all(|job| job.conclusion.as_deref() == Some("success")), "a job failed");
        organization.nothing_left(&world, &served).await
    })
    .await?;
    let name = |what: &str| format!("github_{JOBS}_jobs_{SLOTS}_slots_{what}");
    figures.add(name("plain_pods"), plain.seconds, "s");
    figures.add(name("jobs"), jobs.seconds, "s");
    figures.add(name("jobs_over_plain_pods"), jobs.seconds / plain.seconds, "ratio");
    figures.add(name("api_server_cpu_per_job"), jobs.api_server / JOBS as f64, "s");
    figures.add(name("api_server_cpu_over_plain_pods"), jobs.api_server / plain.api_server, "ratio");
    pool::delete(&world, NAMESPACE, POOL).await
}

async fn cost<F: Future<Output = Result<()>>>(work: impl FnOnce() -> F) -> Result<Cost> {
    let api_server = Process::api_server()?;
    let (began, before) = (now(), api_server.used()?);
    work().await?;
    Ok(Cost { seconds: now() - began, api_server: api_server.used()? - before })
}

/// A runner pod's, with a program that takes so many seconds.
pub(crate) async fn shape(world: &World, organization: &Organization, namespace: &str, seconds: u32) -> Result<PodSpec> {
    let run = organization.enqueue("linux", 1, "true").await?;
    let pod = eventually("a pod to take the shape of", Duration::from_secs(30), || async {
        Ok(pool::pods(world, namespace, POOL).await?.into_iter().next())
    })
    .await?;
    organization.simulator.finished(run, PATIENCE).await?;
    let mut shape = pod.spec.context("a pod has a spec")?;
    shape.node_name = None;
    // Its gate asks nobody: no operator and no API server works for these pods.
    for variable in shape.init_containers.iter_mut().flatten().flat_map(|gate| gate.env.iter_mut().flatten()) {
        if variable.name == "MAYFLY_OPERATOR_URL" {
            variable.value = Some("https://127.0.0.1:1".to_owned());
        }
    }
    shape.containers.first_mut().context("a runner")?.command = Some(["sleep".to_owned(), seconds.to_string()].to_vec());
    Ok(shape)
}

/// One pod of this shape that is nobody's.
pub(crate) async fn create(api: &Api<Pod>, shape: &PodSpec, n: usize) -> kube::Result<Pod> {
    let metadata = ObjectMeta { name: Some(format!("plain-{n}")), ..ObjectMeta::default() };
    api.create(&PostParams::default(), &Pod { metadata, spec: Some(shape.clone()), status: None }).await
}

/// So many pods at a time, each deleted when its program has ended.
async fn plain(world: &World, shape: &PodSpec) -> Result<()> {
    let api: Api<Pod> = Api::namespaced(world.client.clone(), NAMESPACE);
    let mut events = watcher(api.clone(), Config::default()).boxed();
    let (mut begun, mut gone) = (0, 0);
    while gone < JOBS {
        while begun < JOBS && begun - gone < SLOTS {
            create(&api, shape, begun).await?;
            begun += 1;
        }
        let event = tokio::time::timeout(PATIENCE, events.try_next()).await?.context("a watch")?;
        match event.context("a watch does not end")? {
            Event::Apply(pod) | Event::InitApply(pod) => {
                let statuses = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
                let mut runner = statuses.filter(|status| status.name == RUNNER_CONTAINER);
                let ended = runner.any(|runner| runner.state.as_ref().is_some_and(|state| state.terminated.is_some()));
                if ended && pod.metadata.deletion_timestamp.is_none() {
                    // It may be told twice, and be gone.
                    let _ = api.delete(&pod.name_any(), &DeleteParams::default().grace_period(2)).await;
                }
            }
            Event::Delete(_) => gone += 1,
            Event::Init | Event::InitDone => {}
        }
    }
    Ok(())
}
