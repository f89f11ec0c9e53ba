//! A thousand jobs over twenty pools, on simulated nodes: what the operator and the API server do when no container takes its time. kwok
//! plays the kubelets; gates, runners and sentinels are played as [`mayfly_e2e::gates`] says. All of it shares this machine's cores.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::{Api, ResourceExt};
use mayfly_cluster::builder::{self, Selection};
use mayfly_cluster::{Progress, World as Place};
use mayfly_e2e::github::Organization;
use mayfly_e2e::wait::eventually;
use mayfly_e2e::{World, gates, pool};
use serde_json::json;

use crate::measure::{Audited, Figures, Process, now, per_job};

const NAMESPACE: &str = "mayfly-bench-crowd";
const KWOK: &str = "kwok";
/// What becomes of nodes and pods, as kwok has it.
const STAGES: [&str; 4] = [
    "node/fast/node-initialize.yaml",
    "node/heartbeat-with-lease/node-heartbeat-with-lease.yaml",
    "pod/fast/pod-ready.yaml",
    "pod/fast/pod-delete.yaml",
];
const POOLS: usize = 20;
/// Jobs of each pool, all at once.
const JOBS: usize = 50;
/// Pods of each pool at a time. With a thousand in all, their played gates and sentinels take this machine's cores for so long that proofs
/// come too late, and runners are lost to it.
const PODS: usize = 20;
const NODES: usize = 4;
const PODS_OF_NODE: usize = 400;
const PATIENCE: Duration = Duration::from_secs(600);
const AT_ONCE: usize = 16;

pub(crate) async fn measure(figures: &mut Figures) -> Result<()> {
    let world = World::connect().await?;
    let layout = world.cluster.layout();
    builder::build(layout, &Selection::named(&[KWOK.to_owned()])?, &Progress::stderr())?;
    let kwok = builder::part_folder(layout, KWOK)?;
    let program = kwok.join(KWOK).display().to_string();
    let stages: Vec<String> = STAGES.iter().map(|stage| format!("--config={}", kwok.join("stage").join(stage).display())).collect();
    let kubeconfig = world.cluster.kubeconfig().display().to_string();
    let nodes: Api<Node> = Api::all(world.client.clone());
    for n in 0..NODES {
        nodes.create(&PostParams::default(), &serde_json::from_value(gates::node(n, PODS_OF_NODE))?).await?;
    }
    let flags = ["--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake", "--cidr=10.254.0.1/16", "--node-ip=192.0.2.1"];
    let argv: Vec<&str> =
        [program.as_str(), "--kubeconfig", kubeconfig.as_str()].into_iter().chain(flags).chain(stages.iter().map(String::as_str)).collect();
    world.cluster.start(Place::Node, KWOK, &argv)?;
    gates::start(&world).await?;
    let measured = on_nodes(&world, figures).await;
    // What is left behind would be scheduled to by others.
    for n in 0..NODES {
        nodes.delete(&format!("{}{n}", gates::NODE_PREFIX), &DeleteParams::default()).await?;
    }
    gates::stop(&world).await?;
    world.cluster.stop(KWOK)?;
    measured
}

async fn on_nodes(world: &World, figures: &mut Figures) -> Result<()> {
    let organization = Organization::create(world, "bench-crowd", "web").await?;
    pool::namespace(world, NAMESPACE).await?;
    organization.secret(world, NAMESPACE).await?;
    let name = |n: usize| format!("c{n}");
    let apply = |n: usize| {
        let manifest = organization.manifest(NAMESPACE, &name(n), |pool| {
            pool["spec"]["forge"]["github"]["scaleSet"]["name"] = json!(name(n));
            pool["spec"]["scale"]["max"] = json!(PODS);
            pool["spec"]["runner"]["nodeSelector"] = json!({"bench": KWOK});
        });
        async move { pool::apply(world, &manifest).await.map(drop) }
    };
    stream::iter(0..POOLS).map(apply).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
    let (pools, pods) = (pool::pools(world, NAMESPACE), Api::<Pod>::namespaced(world.client.clone(), NAMESPACE));
    for n in 0..POOLS {
        pool::condition(world, NAMESPACE, &name(n), "IsolationProved", "True").await?;
    }
    let no_pods = || async { Ok(pods.list(&ListParams::default()).await?.items.is_empty().then_some(())) };
    eventually("the proofs are over", PATIENCE, no_pods).await?;

    let (api_server, operator, audited) = (Process::api_server()?, Process::operator()?, Audited::from_now(&world.cluster)?);
    let (began, before) = (now(), (api_server.used()?, operator.used()?));
    let organization = &organization;
    let enqueue = |n: usize| async move { organization.enqueue(&name(n), JOBS, "true").await };
    let runs: Vec<i64> = stream::iter(0..POOLS).map(enqueue).buffer_unordered(AT_ONCE).try_collect().await?;
    for run in runs {
        let jobs = organization.simulator.finished(run, PATIENCE).await?;
        ensure!(jobs.iter().all(|job| job.conclusion.as_deref() == Some("success")), "a job of run {run} failed");
    }
    let done = now() - began;
    eventually("the pods are gone", PATIENCE, no_pods).await?;
    let (seconds, count) = (now() - began, POOLS * JOBS);
    let used = (api_server.used()? - before.0, operator.used()? - before.1);
    let figure = |what: &str| format!("github_{count}_jobs_{POOLS}_pools_{what}");
    figures.add(figure("jobs_per_second"), count as f64 / done, "1/s");
    figures.add(figure("until_all_pods_gone"), seconds, "s");
    figures.add(figure("api_server_cpu"), used.0 / seconds, "cores");
    figures.add(figure("operator_cpu"), used.1 / seconds, "cores");
    figures.add(figure("operator_memory"), operator.memory()?, "MiB");
    // The last numbers of the statuses are written with a delay.
    tokio::time::sleep(Duration::from_secs(8)).await;
    let calls = audited.calls()?;
    figures.add(figure("kube_writes_per_job"), per_job(&calls, "write", count), "1/job");
    figures.add(figure("kube_reads_per_job"), per_job(&calls, "read", count), "1/job");
    let all = pools.list(&ListParams::default()).await.context("the pools")?.items;
    for pool in all {
        pool::delete(world, NAMESPACE, &pool.name_any()).await?;
    }
    Ok(())
}
