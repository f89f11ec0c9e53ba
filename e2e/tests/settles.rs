//! When nothing happens, nothing is done.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};
use mayfly_cluster::command::output;
use mayfly_e2e::stage::{Stage, workflow};
use mayfly_e2e::world::SYSTEM;

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_at_rest_writes_nothing() -> Result<()> {
    let stage = Stage::set("rest").await?;
    let pool = stage.pool(|_| {}).await?;
    stage.hook()?;
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "true"))], 1).await?;
    stage.succeeds("app", jobs[0].id).await?;
    stage.nothing_left(&pool).await?;
    // Numbers are written with a delay; then the object must not change any more.
    tokio::time::sleep(Duration::from_secs(12)).await;
    let before = version(&stage).await?;
    tokio::time::sleep(Duration::from_secs(25)).await;
    assert_eq!(before, version(&stage).await?, "the pool's status was written although nothing happened");
    stage.strike().await
}

async fn version(stage: &Stage) -> Result<Option<String>> {
    use kube::ResourceExt;
    let pools = mayfly_e2e::pool::pools(&stage.world, &stage.namespace);
    Ok(pools.get(mayfly_e2e::stage::POOL).await?.resource_version())
}

/// Rules of the operator's roles and calls in the API server's audit log, held against one another. Runs on what the other tests
/// caused, so it looks at refusals always, and at unused rules only when the whole suite has run before.
#[tokio::test(flavor = "multi_thread")]
async fn the_operator_was_never_refused_by_rbac() -> Result<()> {
    let stage = Stage::set("rbac").await?;
    stage.pool(|_| {}).await?;
    let log = std::fs::read_to_string(stage.world.cluster.audit_log())?;
    let account = format!("system:serviceaccount:{SYSTEM}:mayfly-controller");
    let mut calls: BTreeMap<(String, String), u32> = BTreeMap::new();
    for line in log.lines().filter(|line| line.contains(&account)) {
        let Ok(event) = serde_json::from_str::<serde_json::Value>(line) else { continue };
        let (verb, what) = (event["verb"].as_str().unwrap_or_default(), &event["objectRef"]);
        let resource = format!("{}/{}", what["resource"].as_str().unwrap_or_default(), what["subresource"].as_str().unwrap_or_default());
        let code = event["responseStatus"]["code"].as_u64().unwrap_or_default();
        ensure!(code != 403 || line.contains("is being terminated"), "refused: {verb} {resource}: {line}");
        *calls.entry((verb.to_owned(), resource)).or_default() += 1;
    }
    ensure!(
        calls.contains_key(&("patch".to_owned(), "runnerpools/status".to_owned())),
        "the audit log shows no call of the operator: {calls:?}"
    );
    let role = output(stage.world.cluster.kubectl().args(["get", "clusterrole", "mayfly-controller", "-o", "json"]))?;
    let role: serde_json::Value = serde_json::from_str(&role)?;
    let verbs: Vec<&str> = role["rules"]
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|rule| rule["verbs"].as_array().into_iter().flatten())
        .filter_map(|v| v.as_str())
        .collect();
    ensure!(!verbs.contains(&"*") && !verbs.contains(&"get"), "{verbs:?}");
    stage.strike().await
}
