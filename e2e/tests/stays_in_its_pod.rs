//! A job finds no way out of its pod: not to the node, not to its gate, not into what its neighbours need.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use mayfly_crds::names::{ANNOTATION_JOB, GATE_CONTAINER};
use mayfly_e2e::stage::{Stage, said, workflow};
use mayfly_e2e::world::repository;

/// Takes far more memory than its pod has, in pieces, and says so before each.
const DEVOUR: &str = "import time
pieces = []
for size in range(0, 2048, 32):
    print('taken=' + str(size), flush=True)
    pieces.append(bytearray(32 << 20))
    time.sleep(0.01)";
/// Begins processes that do nothing until it cannot, or until there are far more than the memory of its pod is for.
const FORK: &str = "import os, signal
for count in range(3000):
    if os.fork() == 0:
        kept = bytearray(1 << 20)
        signal.pause()
print('forked=3000')";
/// Runs beside them and says how many of its rounds were done.
const NEIGHBOUR: &str = "for i in $(seq 1 60); do sleep 0.5; echo $i > ~/rounds; done; echo rounds=$(cat ~/rounds)";

fn python(program: &str) -> String {
    format!("cat > /tmp/program.py <<'E'\n{program}\nE\nexec python3 /tmp/program.py")
}

/// Everything a job said under a key.
fn all<'a>(log: &'a str, key: &str) -> Vec<&'a str> {
    log.lines().filter_map(|line| line.split_once(' ')).filter_map(|(_, text)| text.strip_prefix(key)).map(str::trim).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_way_out_and_no_way_to_the_gate() -> Result<()> {
    let stage = Stage::set("escape").await?;
    let pool = stage.pool(|_| {}).await?;
    stage.hook()?;
    let program = fs::read_to_string(repository().join("e2e/tests/job/escape.py"))?;
    // Longer than the gate is silent between two proofs: a gate that was harmed would be a breach, and the end of the job.
    let script = format!("cat > /tmp/escape.py <<'E'\n{program}\nE\npython3 /tmp/escape.py; sleep 45; echo over=yes");
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", &script))], 1).await?;
    let pod = stage.a_pod("with its job", |pod| pod.annotations().contains_key(ANNOTATION_JOB)).await?;
    tokio::time::sleep(Duration::from_secs(40)).await;
    let pod = stage.pod_api().get(&pod.name_any()).await?;
    let log = stage.succeeds("app", jobs[0].id).await?;

    for line in
        ["Uid: 1001 1001 1001 1001", "Groups: 1001", "CapEff: 0000000000000000", "CapBnd: 0000000000000000", "NoNewPrivs: 1", "Seccomp: 2"]
    {
        ensure!(all(&log, "status=").contains(&line), "{line} is not what the kernel holds the job to:\n{log}");
    }
    let map: Vec<u64> = said(&log, "uid_map=").context("a map")?.split(' ').map(str::parse).collect::<Result<_, _>>()?;
    ensure!(map.len() == 3 && map[1] >= 65_536 && map[2] <= 65_536, "the users of the pod are users of the node: {map:?}");
    ensure!(all(&log, "open=").is_empty(), "ways that are open: {:?}", all(&log, "open="));
    let shut = all(&log, "shut=");
    let otherwise: Vec<&&str> = shut.iter().filter(|way| !way.ends_with(": Operation not permitted")).collect();
    ensure!(shut.len() >= 30 && otherwise.is_empty(), "{} ways; not shut but failed: {otherwise:?}", shut.len());
    ensure!(all(&log, "writable=").is_empty(), "files of the kernel that a job can write: {:?}", all(&log, "writable="));
    ensure!(all(&log, "foreign=").is_empty(), "processes of others: {:?}", all(&log, "foreign="));
    let killed: u32 = said(&log, "killed=").context("how many it killed")?.parse()?;
    ensure!(killed > 0 && said(&log, "tried=") == Some("all") && said(&log, "over=") == Some("yes"), "{log}");
    let gate = gate_of(&pod).context("the gate's status")?;
    ensure!(gate.restart_count == 0 && gate.state.as_ref().is_some_and(|state| state.running.is_some()), "the gate was harmed: {gate:?}");
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

fn gate_of(pod: &Pod) -> Option<k8s_openapi::api::core::v1::ContainerStatus> {
    let statuses = pod.status.as_ref()?.init_container_statuses.as_ref()?;
    statuses.iter().find(|status| status.name == GATE_CONTAINER).cloned()
}

/// Memory and processes: what takes too much of them falls alone. Both are bounded, by themselves and by the pod.
#[tokio::test(flavor = "multi_thread")]
async fn what_takes_too_much_falls_alone() -> Result<()> {
    let stage = Stage::set("greedy").await?;
    let pool = stage
        .pool(|pool| {
            pool["spec"]["runner"]["resources"] = serde_json::json!({"requests": {"cpu": "50m", "memory": "64Mi"},
                "limits": {"cpu": "500m", "memory": "256Mi", "ephemeral-storage": "256Mi"}});
        })
        .await?;
    stage.hook()?;
    let neighbour = stage.push("neighbour", &[("ci.yml", &workflow("push", NEIGHBOUR))], 1).await?;
    stage.a_pod("with the neighbour", |pod| pod.annotations().contains_key(ANNOTATION_JOB)).await?;
    for (repository, program) in [("memory", DEVOUR), ("processes", FORK)] {
        let jobs = stage.push(repository, &[("ci.yml", &workflow("push", &python(program)))], 1).await?;
        let over = stage.job_is(repository, jobs[0].id, "completed").await?;
        ensure!(over.conclusion == "failure" || over.conclusion == "cancelled", "{repository}: {}", over.conclusion);
        let log = stage.forge.job_log(&stage.organization.name, repository, jobs[0].id)?;
        ensure!(said(&log, "taken=2016").is_none() && said(&log, "forked=").is_none(), "nothing stopped {repository}:\n{log}");
    }
    let log = stage.succeeds("neighbour", neighbour[0].id).await?;
    ensure!(said(&log, "rounds=") == Some("60"), "{log}");
    for node in Api::<Node>::all(stage.world.client.clone()).list(&ListParams::default()).await?.items {
        let conditions = node.status.unwrap_or_default().conditions.unwrap_or_default();
        let pressed = conditions.iter().find(|condition| condition.type_.ends_with("Pressure") && condition.status == "True");
        ensure!(pressed.is_none(), "{pressed:?}");
    }
    stage.nothing_left(&pool).await?;
    stage.strike().await
}
