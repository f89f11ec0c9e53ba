//! Pods whose very first instruction connects: whether a policy that stood before them has holes at a pod's start.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, LogParams};
use mayfly_cluster::World;
use mayfly_cluster::command::random_hex;
use mayfly_crds::names::RUNNER_CONTAINER;
use serde_json::json;

use crate::stage::{PATIENCE, Stage};
use crate::wait::eventually;

/// Where the pods try to get: an address outside that no pool opens.
const TARGET: (Ipv4Addr, u16) = (Ipv4Addr::new(100, 100, 100, 201), 8_099);
/// Pods that are started to find one that leaks.
pub const STARTS: usize = 200;
/// Pods at the same time.
const AT_ONCE: usize = 16;
/// Tries of a pod, every 20 ms, begun by its first instruction.
const TRIES: usize = 60;
/// Said after the last try.
const TRIED: &str = "all tries made";

/// What came of it.
#[derive(Clone, Debug)]
pub struct Leaks {
    /// Pods that ran.
    pub starts: usize,
    /// Tries that got through, as `POD TRY`.
    pub visits: BTreeSet<String>,
}

/// Has the stage's pool start that many pods, all of whose runners connect at once, and counts what gets out. The pool is left without
/// warm pods.
///
/// # Errors
/// When they do not run.
pub async fn leaks(stage: &Stage, count: usize) -> Result<Leaks> {
    let (mark, log) = open_target(stage).await?;
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
    Ok(Leaks { starts: ran.len(), visits: visits(&log, &mark)? })
}

/// The same from a pod that no policy selects.
///
/// # Errors
/// When it does not run.
pub async fn control(stage: &Stage) -> Result<BTreeSet<String>> {
    let (mark, log) = open_target(stage).await?;
    stage.world.unpoliced(&format!("leak-{mark}"), &["bash".to_owned(), "-c".to_owned(), script(&mark)], TRIED).await?;
    visits(&log, &mark)
}

fn script(mark: &str) -> String {
    let (address, port) = TARGET;
    format!(
        "for i in {{1..{TRIES}}}; do (echo {mark} $HOSTNAME $i > /dev/tcp/{address}/{port}) 2>/dev/null & sleep 0.02; done; echo {TRIED}; \
         exec sleep 600"
    )
}

/// Has the target answer. Returns a mark for its visitors, and the file in which they are noted.
async fn open_target(stage: &Stage) -> Result<(String, PathBuf)> {
    let (address, port) = TARGET;
    let log = stage.world.decoy(World::Outside, SocketAddr::new(address.into(), port)).await?;
    Ok((random_hex(4)?, log))
}

async fn tried(api: &Api<Pod>, pod: &str, container: &str) -> Result<()> {
    let said = LogParams { container: Some(container.to_owned()), ..LogParams::default() };
    eventually(format!("the word of pod {pod}"), PATIENCE, || async { Ok(api.logs(pod, &said).await?.contains(TRIED).then_some(())) }).await
}

fn visits(log: &Path, mark: &str) -> Result<BTreeSet<String>> {
    let log = std::fs::read_to_string(log)?;
    let visits = log.lines().filter_map(|line| line.strip_prefix("visit ")?.strip_prefix(mark));
    Ok(visits.map(|visit| visit.trim().to_owned()).collect())
}
