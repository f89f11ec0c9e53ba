//! Pods whose very first instruction connects: whether a policy that stood before them has holes at a pod's start.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, LogParams, PostParams};
use mayfly_cluster::command::random_hex;
use mayfly_crds::names::RUNNER_CONTAINER;
use serde_json::json;

use crate::stage::Stage;
use crate::wait::eventually;
use crate::world::{SYSTEM, built};

/// Where the pods try to get: an address outside that no pool opens.
const TARGET: (&str, u16) = ("100.100.100.201", 8_099);
/// Pods at the same time.
const AT_ONCE: usize = 10;
/// Tries of a pod, every 20 ms, begun by its first instruction.
const TRIES: usize = 60;
const LIMIT: Duration = Duration::from_secs(90);

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

/// Has the stage's pool start that many pods, all of whose runners connect at once, and counts what gets out. The pool is left without
/// warm pods.
///
/// # Errors
/// When they do not run.
pub async fn leaks(stage: &Stage, count: usize) -> Result<Leaks> {
    let mark = open_target(stage)?;
    let command = json!(["bash", "-c", script(&mark)]);
    let change = |warm: usize| {
        let command = command.clone();
        move |pool: &mut serde_json::Value| {
            pool["spec"]["runner"]["command"] = command;
            pool["spec"]["scale"] = json!({"max": AT_ONCE, "warm": warm});
        }
    };
    stage.unready_pool(change(AT_ONCE)).await?;
    let api = stage.pod_api();
    let mut ran = BTreeSet::new();
    while ran.len() < count {
        for pod in stage.pods().await? {
            let name = pod.name_any();
            if pod.metadata.deletion_timestamp.is_some() || ran.contains(&name) {
                continue;
            }
            tried(&api, &name, RUNNER_CONTAINER).await?;
            api.delete(&name, &DeleteParams::default().grace_period(1)).await?;
            ran.insert(name);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    stage.unready_pool(change(0)).await?;
    Ok(Leaks { starts: ran.len(), visits: visits(stage, &mark)? })
}

/// The same from a pod that no policy selects.
///
/// # Errors
/// When it does not run.
pub async fn control(stage: &Stage) -> Result<BTreeSet<String>> {
    let mark = open_target(stage)?;
    let api: Api<Pod> = Api::namespaced(stage.world.client.clone(), SYSTEM);
    let name = format!("leak-{mark}");
    let pod: Pod = serde_json::from_value(
        json!({"metadata": {"name": name}, "spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "try", "image": "mayfly.test/gitea-runner:dev", "imagePullPolicy": "Never", "command": ["bash", "-c", script(&mark)]}]}}),
    )?;
    api.create(&PostParams::default(), &pod).await?;
    tried(&api, &name, "try").await?;
    api.delete(&name, &DeleteParams::default()).await?;
    visits(stage, &mark)
}

fn script(mark: &str) -> String {
    let (address, port) = TARGET;
    format!(
        "for i in {{1..{TRIES}}}; do (echo {mark} $HOSTNAME $i > /dev/tcp/{address}/{port}) 2>/dev/null & sleep 0.02; done; echo tried; \
         exec sleep 600"
    )
}

fn open_target(stage: &Stage) -> Result<String> {
    let (address, port) = TARGET;
    stage.world.cluster.add_outside_address(&format!("{address}/32"))?;
    let demo = built()?.join("demo").display().to_string();
    stage.world.cluster.start_outside(DECOY, &[&demo, "decoy", &format!("{address}:{port}")])?;
    random_hex(4)
}

const DECOY: &str = "decoy-leaks";

async fn tried(api: &Api<Pod>, pod: &str, container: &str) -> Result<()> {
    let said = LogParams { container: Some(container.to_owned()), ..LogParams::default() };
    eventually(format!("the word of pod {pod}"), LIMIT, || async { Ok(api.logs(pod, &said).await?.contains("tried").then_some(())) }).await
}

fn visits(stage: &Stage, mark: &str) -> Result<BTreeSet<String>> {
    let log = std::fs::read_to_string(stage.world.cluster.layout().at(&format!("log/{DECOY}.log")))?;
    let visits = log.lines().filter_map(|line| line.strip_prefix("visit ")?.strip_prefix(mark));
    Ok(visits.map(|visit| visit.trim().to_owned()).collect())
}
