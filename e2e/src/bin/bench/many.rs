//! What one process needs for many scale sets, most of which have nothing to do.

use std::time::Duration;

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::api::DeleteParams;
use kube::{Api, ResourceExt};
use mayfly_e2e::github::Organization;
use mayfly_e2e::wait::eventually;
use mayfly_e2e::{World, pool};
use serde_json::json;

use crate::measure::{Figures, Process};

const NAMESPACE: &str = "mayfly-bench-many";
/// Scale sets without jobs, on nodes that are not there, and scale sets with one that runs.
const IDLE: usize = 500;
const BUSY: usize = 50;
/// How long processor time is looked at.
const LOOK: Duration = Duration::from_secs(30);
const PATIENCE: Duration = Duration::from_secs(600);
const AT_ONCE: usize = 16;

pub(crate) async fn scale_sets(figures: &mut Figures) -> Result<()> {
    let world = World::connect().await?;
    let organization = Organization::create(&world, "bench-many", "web").await?;
    pool::namespace(&world, NAMESPACE).await?;
    organization.secret(&world, NAMESPACE).await?;
    let name = |n: usize| format!("s{n}");
    let apply = |n: usize| {
        let manifest = organization.manifest(NAMESPACE, &name(n), |pool| {
            pool["spec"]["forge"]["github"]["scaleSet"]["name"] = json!(name(n));
            pool["spec"]["scale"]["max"] = json!(1);
            pool["spec"]["runner"]["resources"]["requests"] = json!({"cpu": "5m", "memory": "16Mi"});
            if n < IDLE {
                pool["spec"]["runner"]["nodeSelector"] = json!({"bench": "nowhere"});
            }
        });
        let world = &world;
        async move { pool::apply(world, &manifest).await.map(drop) }
    };
    stream::iter(0..IDLE + BUSY).map(apply).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
    let (pools, pods) = (pool::pools(&world, NAMESPACE), Api::<Pod>::namespaced(world.client.clone(), NAMESPACE));
    eventually("every scale set is followed, and isolation is proved", PATIENCE, || async {
        let all = pools.list(&Default::default()).await?.items;
        let followed = all.iter().filter_map(|pool| pool.status.as_ref()?.scale_set.as_ref()?.session_id.as_ref()).count();
        let proved = all.iter().filter_map(|pool| pool.status.as_ref()).filter(|status| !status.isolation.is_empty()).count();
        Ok((followed == IDLE + BUSY && proved >= BUSY && pods.list(&Default::default()).await?.items.is_empty()).then_some(()))
    })
    .await?;
    look(&format!("github_{}_idle", IDLE + BUSY), figures).await?;

    let mut runs = Vec::new();
    for n in IDLE..IDLE + BUSY {
        runs.push(organization.enqueue(&name(n), 1, "sleep 900").await?);
    }
    eventually("every job runs", PATIENCE, || async {
        let mut running = 0;
        for run in &runs {
            running += organization.simulator.jobs(*run).await?.iter().filter(|job| job.state == "running").count();
        }
        Ok((running == BUSY).then_some(()))
    })
    .await?;
    look(&format!("github_{IDLE}_idle_{BUSY}_busy"), figures).await?;
    for run in runs {
        organization.simulator.cancel(run).await?;
    }
    eventually("the pods are gone", PATIENCE, || async { Ok(pods.list(&Default::default()).await?.items.is_empty().then_some(())) })
        .await?;
    let all = pools.list(&Default::default()).await.context("the pools")?.items;
    let delete = |pool: mayfly_crds::RunnerPool| {
        let pools = &pools;
        async move { pools.delete(&pool.name_any(), &DeleteParams::default()).await.map(drop) }
    };
    stream::iter(all).map(delete).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
    eventually("the pools are gone", PATIENCE, || async { Ok(pools.list(&Default::default()).await?.items.is_empty().then_some(())) }).await
}

/// Memory and connections of the operator, and what it uses of a processor.
async fn look(name: &str, figures: &mut Figures) -> Result<()> {
    // What the last change brought about is over.
    tokio::time::sleep(LOOK).await;
    let operator = Process::operator()?;
    let before = operator.used()?;
    tokio::time::sleep(LOOK).await;
    figures.add(format!("{name}_operator_cpu"), (operator.used()? - before) / LOOK.as_secs_f64(), "cores");
    figures.add(format!("{name}_operator_memory"), operator.memory()?, "MiB");
    figures.add(format!("{name}_operator_connections"), operator.connections()?, "connections");
    Ok(())
}
