//! The audit trails of the processes that run, as they are in the logs of their pods.

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{ListParams, LogParams};
use serde_json::{Value, json};

use crate::World;
use crate::world::SYSTEM;

/// The lines of every pod of this component of the operator, records and others, pod by pod.
///
/// # Errors
/// With the API server's answer.
pub async fn logs(world: &World, component: &str) -> Result<Vec<String>> {
    let pods: Api<Pod> = Api::namespaced(world.client.clone(), SYSTEM);
    let labels = format!("app.kubernetes.io/component={component}");
    let mut logs = Vec::new();
    for pod in pods.list(&ListParams::default().labels(&labels)).await?.items {
        logs.push(pods.logs(&pod.metadata.name.context("a pod without a name")?, &LogParams::default()).await?);
    }
    Ok(logs)
}

/// Records about what is in this namespace, pod by pod in the order in which they were written.
///
/// # Errors
/// With the API server's answer.
pub async fn records(world: &World, component: &str, namespace: &str) -> Result<Vec<Value>> {
    let logs = logs(world, component).await?;
    let records = logs.iter().flat_map(|log| log.lines()).filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(records.filter(|record| record["scope"]["namespace"] == json!(namespace)).collect())
}
