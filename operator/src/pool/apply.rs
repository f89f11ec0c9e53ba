//! Carries a plan out. What goes wrong in one part does not keep the other parts from being done.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use data_encoding::HEXLOWER;
use futures::{StreamExt, stream};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{ObjectReference, Pod, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::reflector::ObjectRef;
use kube::{Resource, ResourceExt};
use mayfly_crds::names::{
    ANNOTATION_JOB, ANNOTATION_JOB_CLAIMS, ANNOTATION_WORKFLOW, LABEL_MANAGED_BY, MANAGED_BY, RUNNER_SERVICE_ACCOUNT, RunnerName,
};
use mayfly_crds::{Failure, RunnerPool};
use serde::Serialize;
use serde_json::{Value, json};

use super::controller::Context;
use super::dialects;
use super::gather::{Observed, Unmarked};
use super::plan::{Deletion, Plan};
use super::proof;
use super::registry::{PoolHandle, PoolKey, Spawned};
use super::validate::Pool;
use crate::audit::Action;
use crate::digest::sha256;
use crate::forge::{Forge, ForgeError, Job, Removal, RunnerKey, Secret};
use crate::isolation::{ForgeAddress, network_policies};
use crate::kube_io::stored_time;
use crate::runner::{Placement, PodRequest, Reason, runner_pod};

/// Pods created or deleted at the same time per pool.
const CONCURRENCY: usize = 32;
/// First and longest wait after starts that failed in a row.
const BACKOFF_FIRST: SignedDuration = SignedDuration::from_secs(5);
const BACKOFF_LONGEST: SignedDuration = SignedDuration::from_mins(5);
/// How long the forge's addresses are trusted.
const ADDRESS_AGE: SignedDuration = SignedDuration::from_secs(30);
/// Tries to remove a registration before the sweep is left to it.
const DEREGISTER_TRIES: u32 = 4;

/// Makes the namespace ready: the runners' ServiceAccount and the policies, before any pod.
///
/// # Errors
/// A sentence for a person; no pod may be created then.
pub(super) async fn prepare(ctx: &Context, pool: &Pool, handle: &PoolHandle) -> Result<(), String> {
    let addresses = forge_addresses(ctx, pool, handle).await?;
    handle.state().forge_endpoints = addresses.iter().map(|address| SocketAddr::from((*address, pool.port))).collect();
    let forge = ForgeAddress { addresses, port: pool.port };
    let egress = &pool.spec.isolation.egress;
    let cluster = dialects::facts(ctx);
    let wanted = network_policies(&pool.key.name, &pool.key.namespace, &pool.owner, egress, &forge, &cluster)?;
    let stronger = dialects::wanted(ctx, pool, &forge, &cluster)?;
    let digest = digest(&(&wanted, &stronger))?;
    let unchanged = handle.state().policies.as_ref().is_some_and(|(applied, versions)| {
        *applied == digest
            && versions.iter().all(|(name, version)| {
                let reference = ObjectRef::<NetworkPolicy>::new(name).within(&pool.key.namespace);
                let seen = || ctx.policies.get(&reference)?.resource_version();
                // One that the watch does not show may have been removed by somebody: applying it once too often does no harm.
                dialects::seen(ctx, pool, name).or_else(seen).as_ref() == Some(version)
            })
    });
    if unchanged {
        return Ok(());
    }
    let account = ServiceAccount {
        metadata: ObjectMeta {
            name: Some(RUNNER_SERVICE_ACCOUNT.to_owned()),
            labels: Some([(LABEL_MANAGED_BY.to_owned(), MANAGED_BY.to_owned())].into()),
            ..ObjectMeta::default()
        },
        automount_service_account_token: Some(false),
        ..ServiceAccount::default()
    };
    ctx.io.apply(&pool.key.namespace, &account).await.map_err(|error| format!("ServiceAccount: {}", error.message()))?;
    let mut versions = BTreeMap::new();
    for policy in &wanted {
        let stored = ctx.io.apply(&pool.key.namespace, policy).await.map_err(|error| format!("NetworkPolicy: {}", error.message()))?;
        versions.insert(stored.name_any(), stored.resource_version().unwrap_or_default());
    }
    for stale in ctx.policies.state().iter().filter(|policy| is_stale(policy, pool, &versions)) {
        let deleted = ctx.io.delete::<NetworkPolicy>(&pool.key.namespace, &stale.name_any()).await;
        deleted.map_err(|error| format!("NetworkPolicy: {}", error.message()))?;
    }
    dialects::apply(ctx, pool, &stronger, &mut versions).await?;
    handle.state().policies = Some((digest, versions));
    Ok(())
}

fn is_stale(policy: &NetworkPolicy, pool: &Pool, wanted: &BTreeMap<String, String>) -> bool {
    policy.namespace().as_deref() == Some(&pool.key.namespace)
        && policy.owner_references().iter().any(|owner| owner.uid == pool.uid)
        && !wanted.contains_key(&policy.name_any())
}

fn digest(policies: &impl Serialize) -> Result<String, String> {
    let json = serde_json::to_vec(policies).map_err(|error| error.to_string())?;
    Ok(HEXLOWER.encode(&sha256([json.as_slice()])))
}

async fn forge_addresses(ctx: &Context, pool: &Pool, handle: &PoolHandle) -> Result<Vec<std::net::IpAddr>, String> {
    let now = ctx.now();
    if let Some((known, at)) = &handle.state().addresses
        && now.duration_since(*at) < ADDRESS_AGE
    {
        return Ok(known.clone());
    }
    let mut addresses = Vec::new();
    for host in &pool.hosts {
        let found = tokio::net::lookup_host((host.as_str(), pool.port)).await;
        let found = found.map_err(|error| format!("the forge's host name {host} cannot be resolved: {error}"))?;
        addresses.extend(found.map(|socket| socket.ip()));
    }
    addresses.sort();
    addresses.dedup();
    handle.state().addresses = Some((addresses.clone(), now));
    Ok(addresses)
}

/// Carries the plan out.
pub(super) async fn apply(
    ctx: &Arc<Context>,
    pool: &Pool,
    handle: &Arc<PoolHandle>,
    forge: &Arc<dyn Forge>,
    observed: &Observed,
    plan: &Plan,
) {
    // Waiting gates first: a job that is owed can be on its way while pods are being made.
    handle.state().owed = plan.owed.iter().cloned().collect();
    handle.jobs_changed();

    if plan.create > 0 || !plan.probe.is_empty() {
        // What silence in the pods will be held against is there when their gates ask.
        ctx.tasks.spawn(proof::prepare_controls(ctx.clone(), handle.clone()));
    }
    let deletions = each(plan.delete.iter().map(|deletion| delete(ctx, pool, handle, Some(forge), deletion)).collect());
    let anywhere = (0..plan.create).map(|_| None);
    let creations = each(anywhere.chain(plan.probe.iter().map(Some)).map(|node| create(ctx, pool, handle, node)).collect());
    let marks = each(observed.unmarked.iter().map(|unmarked| mark(ctx, pool, handle, unmarked)).collect());
    observed.unclaimed.iter().for_each(|unclaimed| claim(ctx, pool, handle, forge, unclaimed));
    observed.accepted.iter().for_each(|pod| handle.job_accepted(pod));
    let pauses = each(plan.pause.iter().map(|name| pause(ctx, pool, handle, forge, name)).collect());
    futures::join!(deletions, creations, marks, pauses);
    for orphan in &observed.orphans {
        deregister_later(ctx, pool, forge, orphan.key.clone(), orphan.lost.clone());
    }
}

/// Carries out what a plan made without the forge can hold: deletions.
pub(super) async fn apply_blind(ctx: &Arc<Context>, pool: &Pool, handle: &Arc<PoolHandle>, plan: &Plan) {
    each(plan.delete.iter().map(|deletion| delete(ctx, pool, handle, None, deletion)).collect()).await;
}

/// Carries out a few at a time.
async fn each<F: Future<Output = ()>>(actions: Vec<F>) {
    stream::iter(actions).buffer_unordered(CONCURRENCY).collect::<()>().await;
}

/// Writes the job onto its pod, whose first step waits for that where the runner has hooks.
async fn mark(ctx: &Context, pool: &Pool, handle: &PoolHandle, unmarked: &Unmarked) {
    // The watch may not have shown yet what an earlier pass wrote.
    if handle.state().registered.get(&unmarked.pod).is_some_and(|runner| runner.accepted) {
        return;
    }
    let annotations = [(ANNOTATION_JOB, unmarked.job.to_string()), (ANNOTATION_WORKFLOW, unmarked.workflow.clone())];
    match ctx.io.annotate_pod(&pool.key.namespace, &unmarked.pod, &unmarked.uid, &annotations).await {
        Ok(()) => {
            handle.job_accepted(&unmarked.pod);
            let payload = json!({"job": unmarked.job.to_string(), "workflow": unmarked.workflow});
            ctx.record(ctx.event(Action::JobMatched, &pool.key, runner_target(&unmarked.pod, &unmarked.uid)).about(payload, true));
        }
        Err(error) => {
            tracing::warn!(pool = %pool.key, pod = unmarked.pod, error = error.message(), "a pod could not be marked with its job");
        }
    }
}

/// Writes onto a pod what the token of its job has to say, without keeping anybody waiting. What fails is tried again in the next pass.
fn claim(ctx: &Arc<Context>, pool: &Pool, handle: &Arc<PoolHandle>, forge: &Arc<dyn Forge>, (pod, uid, job): &(String, String, Job)) {
    if !handle.state().claimed.insert(pod.clone()) {
        return;
    }
    let issuer = ctx.issuer_for(pool).cloned();
    let (ctx, pool, handle, forge) = (ctx.clone(), pool.key.clone(), handle.clone(), forge.clone());
    let (pod, uid, job) = (pod.clone(), uid.clone(), job.clone());
    ctx.clone().tasks.spawn(async move {
        let claims = forge.claims(&job).await.map(|claims| match &issuer {
            Some(issuer) => issuer.record(claims),
            None => claims,
        });
        let written = match &claims {
            Ok(claims) if claims.is_empty() => Ok(()),
            Ok(claims) => {
                let annotation = [(ANNOTATION_JOB_CLAIMS, serde_json::to_string(claims).unwrap_or_default())];
                ctx.io.annotate_pod(&pool.namespace, &pod, &uid, &annotation).await.map_err(|error| error.message())
            }
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = written {
            tracing::warn!(%pool, pod, error, "a pod is not marked with what the token of its job has to say");
            handle.state().claimed.remove(&pod);
        }
    });
}

async fn delete(ctx: &Arc<Context>, pool: &Pool, handle: &Arc<PoolHandle>, forge: Option<&Arc<dyn Forge>>, deletion: &Deletion) {
    let spawned = {
        let mut state = handle.state();
        let taken = state.spawned.get(&deletion.name).is_some_and(|pod| pod.registering.is_some());
        if deletion.unless_taken && (taken || state.registered.contains_key(&deletion.name)) {
            return;
        }
        state.spawned.remove(&deletion.name)
    };
    if let Err(error) = ctx.io.delete_this::<Pod>(&pool.key.namespace, &deletion.name, &deletion.uid, Some(deletion.grace)).await {
        tracing::warn!(pool = %pool.key, pod = deletion.name, error = error.message(), "a pod could not be deleted; it is tried again");
        if let Some(pod) = spawned {
            // Still what it was: the next pass decides anew, and tells why.
            handle.state().spawned.entry(deletion.name.clone()).or_insert(pod);
        }
        return;
    }
    handle.state().deleted.insert(deletion.uid.clone(), ctx.now());
    let completed = ctx.event(Action::RunnerCompleted, &pool.key, runner_target(&deletion.name, &deletion.uid));
    ctx.record(completed.about(told(deletion.failure.as_ref()), deletion.failure.is_none()));
    if let Some(failure) = &deletion.failure {
        let made = spawned.as_ref().map_or_else(|| ctx.now(), |pod| pod.created);
        note_failure(ctx, pool, handle, deletion, failure, made).await;
    }
    ctx.metrics.pod_deleted(deletion.failure.as_ref().map_or("finished", |_| "failed"));
    let mut state = handle.state();
    if let Some(node) = spawned.as_ref().and_then(|pod| pod.only_on.clone()) {
        // Whether it told something or not: it is not tried again at once.
        state.tried.insert(node.name, (ctx.now(), node.environment));
    }
    // With its registration the runner tells the forge that its job is cancelled: that goes when the pod is gone.
    let has_job = state.registered.get(&deletion.name).is_some_and(|runner| runner.job.is_some() && !runner.done);
    let registered = if has_job { None } else { state.registered.remove(&deletion.name) };
    drop(state);
    match registered {
        Some(runner) if deletion.deregister && !runner.done => match forge {
            Some(forge) => deregister_later(ctx, pool, forge, runner.key, None),
            None => handle.state().next_sweep = None,
        },
        Some(_) => {}
        // Its registration may have reached the forge although the answer did not reach us.
        None if deletion.deregister && spawned.is_some_and(|pod| pod.burnt.is_some()) => {
            handle.state().next_sweep = Some(ctx.now() + SignedDuration::from_secs(10));
        }
        None => {}
    }
}

/// A runner, as records name it.
pub(crate) fn runner_target(name: &str, uid: &str) -> Value {
    json!({"kind": "Runner", "name": name, "uid": uid})
}

/// Why a runner ended, for the record.
fn told(failure: Option<&Reason>) -> Value {
    failure.map_or_else(|| json!({}), |failure| json!({"reason": failure.reason, "message": failure.message}))
}

/// `made` says when the runner was.
async fn note_failure(ctx: &Context, pool: &Pool, handle: &PoolHandle, deletion: &Deletion, failure: &Reason, made: Timestamp) {
    let now = ctx.now();
    {
        let mut state = handle.state();
        // Runners that were made together fail together, one sooner and one later: that is one failure.
        let counted = state.not_before.is_some_and(|pause| now < pause) || state.start_failed.is_some_and(|last| made <= last);
        if deletion.start_failure && !counted {
            state.start_failed = Some(now);
            let factor = 2_i32.saturating_pow(state.start_failures.min(8));
            state.start_failures = state.start_failures.saturating_add(1);
            state.not_before = Some(now + BACKOFF_FIRST.saturating_mul(factor).min(BACKOFF_LONGEST));
        }
        state.last_failure = Some(Failure {
            runner: deletion.name.clone(),
            reason: failure.reason.clone(),
            message: mayfly_crds::conditions::truncate(&failure.message, 1024),
            time: stored_time(now),
        });
    }
    tracing::warn!(pool = %pool.key, pod = deletion.name, reason = failure.reason, message = failure.message, "runner failed");
    ctx.io
        .warn(&reference_to(&pool.key, &pool.uid), &failure.reason, "DeletePod", &format!("{}: {}", deletion.name, failure.message))
        .await;
}

/// A pool as events name it.
pub(crate) fn reference_to(key: &PoolKey, uid: &str) -> ObjectReference {
    ObjectReference {
        api_version: Some(RunnerPool::api_version(&()).into_owned()),
        kind: Some(RunnerPool::kind(&()).into_owned()),
        name: Some(key.name.clone()),
        namespace: Some(key.namespace.clone()),
        uid: Some(uid.to_owned()),
        ..ObjectReference::default()
    }
}

/// What a pod of this pool is asked for with, but for what is known only when it is made.
pub(super) fn pod_request<'a>(pool: &'a Pool, name: &'a RunnerName) -> PodRequest<'a> {
    PodRequest {
        name,
        namespace: &pool.key.namespace,
        pool: &pool.key.name,
        owner: &pool.owner,
        spec: &pool.spec,
        user_namespace: false,
        life_seconds: 1,
        sentinels: &[],
        placement: Placement::NotOn(Vec::new()),
    }
}

/// Makes a pod; `node` is the only one it may be on.
async fn create(ctx: &Arc<Context>, pool: &Pool, handle: &Arc<PoolHandle>, node: Option<&String>) {
    let name = RunnerName::new(&pool.key.name, &pool.uid, rand::random());
    let deadlines = pool.deadlines;
    let warm = if pool.spec.scale.warm > 0 { SignedDuration::from_hours(2) } else { SignedDuration::ZERO };
    let life = deadlines.start + deadlines.idle + deadlines.job + warm + SignedDuration::from_mins(1);
    let mut sentinels = ctx.names.find(&ctx.settings.sentinel_service).await;
    sentinels.extend(proof::sentinel_pods(ctx).await);
    let (only_on, placement) = {
        let state = handle.state();
        let only_on = node.and_then(|node| state.nodes.iter().find(|known| known.name == *node).cloned());
        let placement = node.cloned().map_or_else(|| Placement::NotOn(state.open_nodes()), Placement::OnlyOn);
        (only_on, placement)
    };
    let request = PodRequest {
        user_namespace: ctx.user_namespaces().all_support(),
        life_seconds: life.as_secs(),
        sentinels: &sentinels,
        placement,
        ..pod_request(pool, &name)
    };
    let pod = runner_pod(&request, &ctx.settings.pods);
    let made = ctx.now();
    let waits = Spawned { uid: String::new(), created: made, seen: false, asked: None, registering: None, burnt: None, only_on };
    handle.state().spawned.insert(name.to_string(), waits);
    match ctx.io.create(&pool.key.namespace, &pod).await {
        Ok(stored) => {
            let told_at = {
                let mut state = handle.state();
                if let Some(spawned) = state.spawned.get_mut(name.as_str()) {
                    spawned.uid = stored.uid().unwrap_or_default();
                }
                state.told_at
            };
            handle.jobs_changed();
            ctx.metrics.pod_created(told_at.map(|at| at.elapsed()));
            let uid = stored.uid().unwrap_or_default();
            ctx.record(
                ctx.event(Action::RunnerStarted, &pool.key, runner_target(name.as_str(), &uid)).about(json!({"onlyOn": node}), true),
            );
            tracing::info!(pool = %pool.key, pod = %name, "created a runner pod");
        }
        Err(error) => {
            let deletion = Deletion::of_start(name.as_str());
            let failure = Reason::new("PodRefused", format!("the API server refused the pod: {}", error.message()));
            ctx.record(ctx.event(Action::RunnerStarted, &pool.key, runner_target(name.as_str(), "")).about(told(Some(&failure)), false));
            note_failure(ctx, pool, handle, &deletion, &failure, made).await;
            // Somebody may have taken away what pods need; it is applied anew before the next one.
            handle.state().policies = None;
            // If it was created after all, it is a stray and goes.
            handle.state().spawned.remove(name.as_str());
        }
    }
}

async fn pause(ctx: &Context, pool: &Pool, handle: &PoolHandle, forge: &Arc<dyn Forge>, name: &str) {
    let Some(key) = handle.state().registered.get(name).map(|runner| runner.key.clone()) else { return };
    let result = forge.pause(&key).await;
    let mut state = handle.state();
    let Some(runner) = state.registered.get_mut(name) else { return };
    match result {
        Ok(Removal::Done) => runner.paused = Some(ctx.now()),
        // It took a job just now, of which the forge will tell.
        Ok(Removal::Busy) => runner.since = ctx.now(),
        // The forge removed it: its one job is over.
        Ok(Removal::Gone) => runner.done = true,
        Err(error) => tracing::warn!(pool = %pool.key, runner = name, %error, "a runner could not be paused; it is tried again"),
    }
}

/// Removes a registration without keeping anybody waiting; what fails for good is left to the sweep. A job that the runner had is
/// ended first, in its name: without the registration nobody could say that it is lost.
fn deregister_later(ctx: &Arc<Context>, pool: &Pool, forge: &Arc<dyn Forge>, runner: RunnerKey, lost: Option<(Job, Secret)>) {
    let (forge, pool, ctx) = (forge.clone(), pool.key.clone(), ctx.clone());
    ctx.clone().tasks.spawn(async move {
        if let Some((job, credential)) = lost {
            match forge.give_up(&job, &credential).await {
                Ok(_) => tracing::info!(%pool, job = %job.key, "told the forge that the job lost its runner"),
                Err(error) => tracing::warn!(%pool, job = %job.key, %error, "the forge was not told that the job lost its runner"),
            }
        }
        let removed = ctx.event(Action::RunnerRemoved, &pool, json!({"kind": "Registration", "id": runner.id}));
        for attempt in 0..DEREGISTER_TRIES {
            match forge.deregister(&runner).await {
                Ok(Removal::Done | Removal::Gone) => {
                    ctx.metrics.deregistered("ok");
                    return ctx.record(removed);
                }
                // The forge has not noticed yet that the runner is gone: the sweep comes back to it.
                Ok(Removal::Busy) => break,
                Err(error @ ForgeError::Unauthorized { .. }) => {
                    tracing::warn!(%pool, %error, "a registration could not be removed");
                    break;
                }
                Err(error) => {
                    tracing::warn!(%pool, %error, attempt, "a registration could not be removed");
                    tokio::time::sleep(Duration::from_secs(1 << (2 * attempt))).await;
                }
            }
        }
        ctx.metrics.deregistered("left_to_sweep");
        ctx.record(removed.about(json!({"leftTo": "sweep"}), false));
    });
}

impl Deletion {
    /// For a pod that was never there.
    fn of_start(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            uid: String::new(),
            grace: 0,
            deregister: false,
            unless_taken: false,
            failure: None,
            start_failure: true,
        }
    }
}

/// Deletes every pod of a pool that is being deleted; true when none is left.
pub(super) async fn delete_all(ctx: &Context, namespace: &str, pods: &[Arc<Pod>]) -> bool {
    let staying = pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none());
    let delete = |pod: &Arc<Pod>| {
        let (name, uid) = (pod.name_any(), pod.uid().unwrap_or_default());
        async move {
            if let Err(error) = ctx.io.delete_this::<Pod>(namespace, &name, &uid, Some(1)).await {
                tracing::warn!(namespace, pod = name, error = error.message(), "a pod could not be deleted; it is tried again");
            }
        }
    };
    each(staying.map(delete).collect()).await;
    pods.is_empty()
}
