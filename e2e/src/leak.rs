//! Pods whose very first instruction connects: whether a policy that stood before them has holes at a pod's start.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::{DeleteParams, LogParams, PostParams};
use mayfly_cluster::command::random_hex;
use mayfly_crds::names::{LABEL_POOL, RUNNER_CONTAINER};

use crate::stage::{POOL, Stage};
use crate::wait::eventually;
use crate::world::built;

/// Where the pods try to get: an address outside that no pool opens.
const TARGET: (&str, u16) = ("100.100.100.201", 8_099);
/// Pods at the same time.
const AT_ONCE: usize = 10;
/// Tries of a pod, every 20 ms, begun by its first instruction.
const TRIES: usize = 60;

/// What came of it.
#[derive(Clone, Debug)]
pub struct Leaks {
    /// Pods that ran.
    pub starts: usize,
    /// Tries that got through, as `POD TRY`.
    pub visits: BTreeSet<String>,
}

/// A runner pod's spec with another program in the runner's container.
///
/// # Errors
/// When the pool makes no pod to take it from.
pub async fn shape(stage: &Stage, script: &str) -> Result<PodSpec> {
    let pod = stage.a_pod("to take the shape of", |pod| pod.spec.is_some()).await?;
    let mut spec = pod.spec.context("a pod has a spec")?;
    spec.node_name = None;
    let runner = spec.containers.first_mut().context("a runner")?;
    runner.command = Some(["bash", "-c", script].map(str::to_owned).to_vec());
    Ok(spec)
}

/// Starts that many pods of this shape, with the pool's label or without it, and counts what gets out.
///
/// # Errors
/// When they do not run.
pub async fn leaks(stage: &Stage, shape: &PodSpec, count: usize, policed: bool) -> Result<Leaks> {
    let (address, port) = TARGET;
    stage.world.cluster.add_outside_address(&format!("{address}/32"))?;
    let decoy = "decoy-leaks";
    stage.world.cluster.start_outside(decoy, &[&built()?.join("demo").display().to_string(), "decoy", &format!("{address}:{port}")])?;
    let log = stage.world.cluster.layout().at(&format!("log/{decoy}.log"));
    let group = random_hex(4)?;
    let api: Api<Pod> = Api::namespaced(stage.world.as_operator()?, &stage.namespace);
    let ran: Vec<Result<()>> = stream::iter((0..count).map(|n| format!("leak-{group}-{n}")))
        .map(|name| {
            let api = api.clone();
            async move { run(&api, shape, &name, policed).await }
        })
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    ran.into_iter().collect::<Result<()>>()?;
    let visits = std::fs::read_to_string(log)?;
    let visits = visits.lines().filter_map(|line| line.strip_prefix("visit ")).filter(|visit| visit.contains(&group)).map(str::to_owned);
    Ok(Leaks { starts: count, visits: visits.collect() })
}

async fn run(api: &Api<Pod>, shape: &PodSpec, name: &str, policed: bool) -> Result<()> {
    let (address, port) = TARGET;
    let script = format!("for i in {{1..{TRIES}}}; do (echo {name} $i > /dev/tcp/{address}/{port}) 2>/dev/null & sleep 0.02; done; echo tried; sleep 60");
    let mut spec = shape.clone();
    if let Some(runner) = spec.containers.first_mut() {
        runner.command = Some(vec!["bash".to_owned(), "-c".to_owned(), script]);
    }
    let label = policed.then(|| [(LABEL_POOL.to_owned(), POOL.to_owned())].into());
    let metadata = ObjectMeta { name: Some(name.to_owned()), labels: label, ..ObjectMeta::default() };
    api.create(&PostParams::default(), &Pod { metadata, spec: Some(spec), status: None }).await?;
    let said = LogParams { container: Some(RUNNER_CONTAINER.to_owned()), ..LogParams::default() };
    eventually(format!("the word of pod {name}"), Duration::from_secs(90), || async {
        Ok(api.logs(name, &said).await?.contains("tried").then_some(()))
    })
    .await?;
    api.delete(name, &DeleteParams::default().grace_period(0)).await?;
    Ok(())
}
