//! On a cluster that accepts NetworkPolicies and enforces none, as one with a plain network plugin does: nothing is proved there, so
//! nothing is registered. `make test` brings such a cluster up for these tests alone.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kube::ResourceExt;
use mayfly_cluster::{Cluster, Progress, World as Place};
use mayfly_crds::names::ANNOTATION_JOB;
use mayfly_e2e::install::install;
use mayfly_e2e::pool;
use mayfly_e2e::stage::{PATIENCE, POOL, Stage, workflow};
use mayfly_e2e::wait::eventually;
use serde_json::json;
use tokio::sync::OnceCell;

const METADATA: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)), 80);
/// Every class that a cluster of one node has.
const OPEN: [&str; 6] =
    ["Metadata (Breach)", "Outside (Breach)", "Node (Breach)", "ApiServer (Breach)", "Pods (Breach)", "Services (Breach)"];
/// How long nothing may happen.
const LONG: Duration = Duration::from_secs(15);

/// The demo, which installs the operator for all other tests, shows a job in a pod that is isolated: it cannot run here.
static INSTALLED: OnceCell<()> = OnceCell::const_new();

/// Sets a stage on a cluster without an engine, and fails on any other. A metadata endpoint answers there.
async fn set(name: &str) -> Result<Stage> {
    INSTALLED
        .get_or_try_init(|| async {
            let cluster = Cluster::connect()?;
            ensure!(
                cluster.enforces_policies() == Some(false),
                "cluster {} enforces network policies, or may: these tests are for one of `cluster up --engine none`",
                cluster.layout().name()
            );
            install(&cluster, &Progress::stderr())
        })
        .await?;
    let stage = Stage::set(name).await?;
    stage.world.decoy(Place::Outside, METADATA).await?;
    Ok(stage)
}

/// What the forge was asked about runners of the stage's repositories: each registration begins with a token for the repository.
fn registrations_asked(stage: &Stage) -> Result<Vec<String>> {
    let path = stage.world.cluster.forge_access_log();
    let log = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let own = format!("/{}/", stage.organization.name);
    ensure!(log.contains(&own), "the forge's log knows nothing of {own}");
    Ok(log.lines().filter(|line| line.contains(&own) && line.contains("/registration-token")).map(str::to_owned).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_registration_without_proof() -> Result<()> {
    let stage = set("noengine").await?;
    let pool = stage.unready_pool(|_| {}).await?;
    stage.hook()?;
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "true"))], 1).await?;
    let note = stage.event("IsolationBreach").await?;
    for class in OPEN {
        ensure!(note.contains(class), "{class} is not in the event: {note}");
    }
    let (reason, message) = pool::condition(&stage.world, &stage.namespace, POOL, "IsolationProved", "False").await?;
    ensure!(reason == "IsolationBreach" && message.contains("answers the pod"), "{reason}: {message}");
    let (reason, _) = pool::condition(&stage.world, &stage.namespace, POOL, "Ready", "False").await?;
    ensure!(reason == "PodsFail", "{reason}");

    // Pods come and go, as they are not isolated; none gets a job, for none was a runner asked for.
    let (mut seen, mut last) = (BTreeSet::new(), BTreeSet::new());
    let until = Instant::now() + LONG;
    while Instant::now() < until {
        let pods = stage.pods().await?;
        ensure!(pods.iter().all(|pod| !pod.annotations().contains_key(ANNOTATION_JOB)), "a pod has a job: {pods:?}");
        last = pods.iter().map(ResourceExt::name_any).collect();
        seen.extend(last.iter().cloned());
        let registered = stage.registrations(&pool)?;
        ensure!(registered.is_empty(), "a pod without a proof was registered: {registered:?}");
        assert_eq!(stage.job("app", jobs[0].id)?.status, "queued");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    ensure!(!seen.is_empty(), "no pod was seen");
    eventually("the end of the pods that were seen last", PATIENCE, || async {
        let pods = stage.pods().await?;
        Ok(pods.iter().all(|pod| !last.contains(&pod.name_any())).then_some(()))
    })
    .await?;
    let asked = registrations_asked(&stage)?;
    ensure!(asked.is_empty(), "the forge was asked: {asked:?}");
    assert_eq!(stage.job("app", jobs[0].id)?.status, "queued");
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn warn_mode_runs_the_job_and_says_so() -> Result<()> {
    let stage = set("nowarn").await?;
    let pool = stage.pool(|pool| pool["spec"]["isolation"] = json!({"enforcement": "Warn"})).await?;
    stage.hook()?;
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "true"))], 1).await?;
    stage.succeeds("app", jobs[0].id).await?;
    let note = stage.event("IsolationBreach").await?;
    ensure!(note.contains("runs jobs although") && note.contains("Pods (Breach)"), "{note}");
    let (reason, _) = pool::condition(&stage.world, &stage.namespace, POOL, "IsolationProved", "False").await?;
    ensure!(reason == "IsolationBreach", "{reason}");
    ensure!(!registrations_asked(&stage)?.is_empty(), "the forge's log does not show what the other test looks for");
    stage.nothing_left(&pool).await?;
    stage.strike().await
}
