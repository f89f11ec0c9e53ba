//! Pools, and what belongs to them, for the demo and the tests.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{Namespace, Pod, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, ValidationDirective};
use kube::{Api, Resource, ResourceExt};
use mayfly_cluster::Forge;
use mayfly_cluster::forge::{Runner, Scope};
use mayfly_crds::RunnerPool;
use mayfly_crds::names::{ANNOTATION_FORGE, ANNOTATION_POOL_NAMESPACES, LABEL_POOL, RunnerName};
use serde_json::{Value, json};

use crate::World;
use crate::forge::Organization;
use crate::stage::PATIENCE;
use crate::wait::eventually;
use crate::world::SYSTEM;

/// Field manager of the demo and the tests.
const MANAGER: &str = "mayfly-e2e";

/// Makes a namespace whose pods must meet Pod Security `restricted`.
///
/// # Errors
/// With the API server's answer.
pub async fn namespace(world: &World, name: &str) -> Result<()> {
    let labels = BTreeMap::from([("pod-security.kubernetes.io/enforce".to_owned(), "restricted".to_owned())]);
    let namespace = Namespace {
        metadata: ObjectMeta { name: Some(name.to_owned()), labels: Some(labels), ..ObjectMeta::default() },
        ..Namespace::default()
    };
    Api::<Namespace>::all(world.client.clone()).patch(name, &params(), &Patch::Apply(&namespace)).await?;
    Ok(())
}

/// Puts an organization's token and webhook secret where the operator looks for them, for the pools of one namespace. Returns the
/// Secret's name.
///
/// # Errors
/// With the API server's answer.
pub async fn secret(world: &World, organization: &Organization, namespace: &str) -> Result<String> {
    let name = format!("forge-{}", organization.name);
    let text = |value: &str| ByteString(value.as_bytes().to_vec());
    let secret = Secret {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            annotations: Some(BTreeMap::from([
                (ANNOTATION_FORGE.to_owned(), world.access.url.clone()),
                (ANNOTATION_POOL_NAMESPACES.to_owned(), namespace.to_owned()),
            ])),
            ..ObjectMeta::default()
        },
        data: Some(BTreeMap::from([
            ("token".to_owned(), text(&organization.token)),
            ("webhook".to_owned(), text(&organization.webhook_secret)),
        ])),
        ..Secret::default()
    };
    Api::<Secret>::namespaced(world.client.clone(), SYSTEM).patch(&name, &params(), &Patch::Apply(&secret)).await?;
    Ok(name)
}

/// Lets the organization's Secret be used for another URL.
///
/// # Errors
/// With the API server's answer.
pub async fn meant_for(world: &World, organization: &Organization, url: &str) -> Result<()> {
    let patch = json!({"metadata": {"annotations": {ANNOTATION_FORGE: url}}});
    let secrets: Api<Secret> = Api::namespaced(world.client.clone(), SYSTEM);
    secrets.patch(&format!("forge-{}", organization.name), &PatchParams::default(), &Patch::Merge(patch)).await?;
    Ok(())
}

/// The manifest of a pool that serves an organization with the label `linux`; `change` may change it before it is applied.
pub fn manifest(world: &World, namespace: &str, name: &str, organization: &Organization, change: impl FnOnce(&mut Value)) -> Value {
    let secret = format!("forge-{}", organization.name);
    let forge = json!({"gitea": {
        "url": world.access.url,
        "scope": {"organization": organization.name},
        "tokenSecretRef": {"name": secret},
        "webhookSecretRef": {"name": secret, "key": "webhook"},
        "labels": ["linux"],
    }});
    manifest_of(forge, namespace, name, change)
}

/// The manifest of a pool of this forge, with what all of them have in common.
pub fn manifest_of(forge: Value, namespace: &str, name: &str, change: impl FnOnce(&mut Value)) -> Value {
    let mut pool = json!({
        "apiVersion": "mayfly.dev/v1alpha1",
        "kind": "RunnerPool",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "forge": forge,
            "scale": {"max": 4},
            "runner": {"resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"cpu": "1", "memory": "512Mi", "ephemeral-storage": "1Gi"}}},
        },
    });
    change(&mut pool);
    pool
}

/// Applies a RunnerPool.
///
/// # Errors
/// With the API server's answer.
pub async fn apply(world: &World, pool: &Value) -> Result<RunnerPool> {
    let (namespace, name) = (pool["metadata"]["namespace"].as_str(), pool["metadata"]["name"].as_str());
    let (namespace, name) = (namespace.context("a namespace")?, name.context("a name")?);
    Ok(pools(world, namespace).patch(name, &params(), &Patch::Apply(pool)).await?)
}

/// Has the API server check an object without storing it: a refusal is the inner error, in its words.
///
/// # Errors
/// When the API server cannot be asked.
pub async fn validate<K: Resource<DynamicType = ()>>(world: &World, object: &Value) -> Result<Result<(), String>> {
    let (namespace, name) = (object["metadata"]["namespace"].as_str(), object["metadata"]["name"].as_str());
    let (namespace, name) = (namespace.context("a namespace")?, name.context("a name")?);
    let strict = PatchParams { field_validation: Some(ValidationDirective::Strict), dry_run: true, ..params() };
    let api: Api<DynamicObject> = Api::namespaced_with(world.client.clone(), namespace, &ApiResource::erase::<K>(&()));
    match api.patch(name, &strict, &Patch::Apply(object)).await {
        Ok(_) => Ok(Ok(())),
        Err(kube::Error::Api(status)) => Ok(Err(status.message)),
        Err(error) => Err(error.into()),
    }
}

/// The pools of a namespace.
pub fn pools(world: &World, namespace: &str) -> Api<RunnerPool> {
    Api::namespaced(world.client.clone(), namespace)
}

/// Waits until a condition of the pool has this status; returns its reason and message.
///
/// # Errors
/// When it does not get so.
pub async fn condition(world: &World, namespace: &str, name: &str, type_: &str, status: &str) -> Result<(String, String)> {
    let pools = pools(world, namespace);
    eventually(format!("condition {type_}={status} of RunnerPool {namespace}/{name}"), Duration::from_secs(60), || async {
        let conditions = pools.get_status(name).await?.status.unwrap_or_default().conditions;
        let found = conditions.into_iter().find(|condition| condition.type_ == type_ && condition.status == status);
        Ok(found.map(|condition| (condition.reason, condition.message)))
    })
    .await
}

/// The runner pods of a pool.
///
/// # Errors
/// With the API server's answer.
pub async fn pods(world: &World, namespace: &str, pool: &str) -> Result<Vec<Pod>> {
    let api: Api<Pod> = Api::namespaced(world.client.clone(), namespace);
    Ok(api.list(&ListParams::default().labels(&format!("{LABEL_POOL}={pool}"))).await?.items)
}

/// Registrations that runners of this pool have at the forge, in every repository of the organization.
///
/// # Errors
/// With the forge's answer.
pub fn registrations(forge: &Forge, organization: &str, pool: &RunnerPool) -> Result<Vec<Runner>> {
    let uid = pool.uid().unwrap_or_default();
    let repositories = forge.call("GET", &format!("/orgs/{organization}/repos?limit=50"), None)?;
    let mut found = forge.runners(&Scope::Organization(organization.to_owned()))?;
    for repository in repositories.as_array().into_iter().flatten().filter_map(|repository| repository["name"].as_str()) {
        found.extend(forge.runners(&Scope::repository(organization, repository))?);
    }
    found.retain(|runner| RunnerName::is_of_pool(&runner.name, &uid));
    Ok(found)
}

/// Waits until the pool has neither pods nor registrations; returns how long it took to see both gone.
///
/// # Errors
/// When something stays; it is named.
pub async fn nothing_left(world: &World, organization: &str, pool: &RunnerPool) -> Result<()> {
    let (namespace, name) = (pool.namespace().unwrap_or_default(), pool.name_any());
    eventually(format!("nothing left of {namespace}/{name}"), Duration::from_secs(60), || async {
        let pods = pods(world, &namespace, &name).await?;
        let runners = registrations(&world.forge, organization, pool)?;
        ensure!(pods.is_empty() && runners.is_empty(), "{} pod(s), {} registration(s)", pods.len(), runners.len());
        Ok(Some(()))
    })
    .await
}

/// Waits until a pool that was made just now has tried its isolation: it makes a pod for that alone, which goes. `warm` pods stay.
///
/// # Errors
/// When it has not, or the pod stays; the pods say how far they are.
pub async fn first_proof(world: &World, namespace: &str, name: &str, warm: usize) -> Result<()> {
    eventually("the pool's first proof", PATIENCE, || async {
        let status = pools(world, namespace).get_status(name).await?.status.unwrap_or_default();
        if !status.isolation.is_empty() {
            return Ok(Some(()));
        }
        let pods: Vec<String> = pods(world, namespace, name).await?.iter().map(far).collect();
        bail!("last failure: {:?}; pods: {pods:?}", status.last_failure)
    })
    .await?;
    eventually("the pod of the pool's first proof gone", PATIENCE, || async {
        let pods = pods(world, namespace, name).await?;
        ensure!(pods.len() <= warm, "{:?}", pods.iter().map(far).collect::<Vec<_>>());
        Ok(Some(()))
    })
    .await
}

/// How far a pod is.
fn far(pod: &Pod) -> String {
    let meta = &pod.metadata;
    let status = serde_json::to_value(&pod.status).unwrap_or_default();
    let parts = ["phase", "conditions", "initContainerStatuses", "containerStatuses"].map(|part| &status[part]);
    format!("{} made {:?}, leaving {:?}: {parts:?}", pod.name_any(), meta.creation_timestamp, meta.deletion_timestamp)
}

/// Deletes a pool and waits until it is gone.
///
/// # Errors
/// When it stays.
pub async fn delete(world: &World, namespace: &str, name: &str) -> Result<()> {
    let pools = pools(world, namespace);
    match pools.delete(name, &DeleteParams::default()).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    eventually(format!("RunnerPool {namespace}/{name} gone"), Duration::from_secs(90), || async {
        Ok(pools.get_opt(name).await?.is_none().then_some(()))
    })
    .await
}

fn params() -> PatchParams {
    PatchParams::apply(MANAGER).force()
}
