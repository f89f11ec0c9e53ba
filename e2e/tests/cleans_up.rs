//! However a runner ends, nothing is left, and the reason is told.

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, EvictParams, ListParams};
use kube::{Api, ResourceExt};
use mayfly_crds::names::{ANNOTATION_JOB, RunnerName};
use mayfly_e2e::pool;
use mayfly_e2e::stage::{PATIENCE, POOL, Stage, workflow};
use mayfly_e2e::wait::eventually;
use mayfly_e2e::world::SYSTEM;
use serde_json::json;

const LONG: &str = "echo begun; sleep 300";

async fn running_job(stage: &Stage) -> Result<(i64, Pod)> {
    stage.hook()?;
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", LONG))], 1).await?;
    stage.job_is("app", jobs[0].id, "in_progress").await?;
    let pod = stage.a_pod("with its job", |pod| pod.annotations().contains_key(ANNOTATION_JOB)).await?;
    Ok((jobs[0].id, pod))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_leaves_nothing() -> Result<()> {
    let stage = Stage::set("cancel").await?;
    let pool = stage.pool(|_| {}).await?;
    let (job, _) = running_job(&stage).await?;
    let run = stage.job("app", job)?.run_id;
    let access = &stage.world.access;
    stage.world.forge.cancel_run((&access.admin, &access.admin_password), &stage.organization.name, "app", run)?;
    stage.job_is("app", job, "completed").await?;
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_cancelled_before_it_had_a_runner_leaves_nothing() -> Result<()> {
    let stage = Stage::set("early").await?;
    stage.pool(|_| {}).await?;
    // No node has this label: the pod waits.
    let pool = stage.unready_pool(|pool| pool["spec"]["runner"]["nodeSelector"] = json!({"mayfly.test/absent": "true"})).await?;
    stage.hook()?;
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", LONG))], 1).await?;
    stage.a_pod("waiting for a node", |_| true).await?;
    let access = &stage.world.access;
    let run = stage.job("app", jobs[0].id)?.run_id;
    stage.world.forge.cancel_run((&access.admin, &access.admin_password), &stage.organization.name, "app", run)?;
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_runner_leaves_nothing_and_is_told() -> Result<()> {
    let stage = Stage::set("kill").await?;
    let pool = stage.pool(|_| {}).await?;
    let (job, pod) = running_job(&stage).await?;
    // The first process of a container cannot be killed from within: the node does it, as the kernel does when memory is short.
    stage.world.kill_container(&pod)?;
    let told = stage.event("Error").await?;
    ensure!(told.contains("exit code 137"), "{told}");
    stage.nothing_left(&pool).await?;
    // The forge was told: the job does not hang until the forge grows suspicious.
    assert_eq!(stage.job_is("app", job, "completed").await?.conclusion, "failure");
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evicted_pod_leaves_nothing() -> Result<()> {
    let stage = Stage::set("evict").await?;
    let pool = stage.pool(|_| {}).await?;
    let (_, pod) = running_job(&stage).await?;
    stage.pod_api().evict(&pod.name_any(), &EvictParams::default()).await?;
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_past_its_storage_limit_is_evicted_and_told() -> Result<()> {
    let stage = Stage::set("disk").await?;
    let pool = stage.pool(|pool| pool["spec"]["runner"]["workspace"] = json!("16Mi")).await?;
    stage.hook()?;
    let fill = "dd if=/dev/zero of=$HOME/big bs=1M count=64; sleep 300";
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", fill))], 1).await?;
    stage.job_is("app", jobs[0].id, "in_progress").await?;
    let told = stage.event("Evicted").await?;
    ensure!(told.contains("home"), "{told}");
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_image_is_told_and_leaves_nothing_and_is_mended_by_a_good_one() -> Result<()> {
    let stage = Stage::set("image").await?;
    stage.pool(|_| {}).await?;
    let pool = stage.unready_pool(|pool| pool["spec"]["runner"]["image"] = json!("mayfly.test/no-such-image:1")).await?;
    stage.hook()?;
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "true"))], 1).await?;
    let told = stage.event("ErrImageNeverPull").await?;
    ensure!(told.contains("no-such-image"), "{told}");
    let (reason, message) = pool::condition(&stage.world, &stage.namespace, POOL, "Ready", "False").await?;
    ensure!(reason == "PodsFail" && message.contains("no-such-image"), "{reason}: {message}");
    assert!(stage.registrations(&pool)?.is_empty(), "a runner was registered for a pod that never started");
    stage.unready_pool(|_| {}).await?;
    stage.succeeds("app", jobs[0].id).await?;
    pool::condition(&stage.world, &stage.namespace, POOL, "Ready", "True").await?;
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_room_is_told_with_the_schedulers_words() -> Result<()> {
    let stage = Stage::set("room").await?;
    stage.pool(|_| {}).await?;
    stage
        .unready_pool(|pool| {
            pool["spec"]["runner"]["resources"] = json!({"requests": {"cpu": "900"}, "limits": {"cpu": "900"}});
            pool["spec"]["deadlines"] = json!({"start": "3s"});
        })
        .await?;
    stage.hook()?;
    stage.push("app", &[("ci.yml", &workflow("push", "true"))], 1).await?;
    let told = stage.event("StartDeadlineExceeded").await?;
    ensure!(told.contains("Insufficient cpu"), "{told}");
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_past_its_deadline_loses_its_pod_and_is_told() -> Result<()> {
    let stage = Stage::set("late").await?;
    let pool = stage.pool(|pool| pool["spec"]["deadlines"] = json!({"job": "3s"})).await?;
    let (job, _) = running_job(&stage).await?;
    let told = stage.event("JobDeadlineExceeded").await?;
    ensure!(told.contains(&format!("#{job}")), "{told}");
    stage.nothing_left(&pool).await?;
    // The forge was told: the job does not hang.
    stage.job_is("app", job, "completed").await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_pool_takes_its_running_pod_and_registration_with_it() -> Result<()> {
    let stage = Stage::set("delete").await?;
    let pool = stage.pool(|_| {}).await?;
    running_job(&stage).await?;
    pool::delete(&stage.world, &stage.namespace, POOL).await?;
    assert!(stage.pods().await?.is_empty());
    assert!(stage.registrations(&pool)?.is_empty());
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_whose_forge_is_gone_can_be_deleted() -> Result<()> {
    let stage = Stage::set("lost").await?;
    let nowhere = "http://forge.mayfly.test:3999";
    pool::meant_for(&stage.world, &stage.organization, nowhere).await?;
    stage.unready_pool(|pool| pool["spec"]["forge"]["gitea"]["url"] = json!(nowhere)).await?;
    let (reason, _) = pool::condition(&stage.world, &stage.namespace, POOL, "ForgeReachable", "False").await?;
    assert_eq!(reason, "Unreachable");
    pool::delete(&stage.world, &stage.namespace, POOL).await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_that_lost_its_pod_is_swept_away() -> Result<()> {
    let stage = Stage::set("sweep").await?;
    let owner = stage.organization.name.clone();
    stage.forge.create_repo(&owner, "app", false)?;
    // A pool that has registrations of an earlier life: made under its UID before the operator gets to see the token.
    let pool = stage.unready_pool(|pool| pool["spec"]["forge"]["gitea"]["tokenSecretRef"] = json!({"name": "not-there-yet"})).await?;
    let (reason, message) = pool::condition(&stage.world, &stage.namespace, POOL, "Ready", "False").await?;
    ensure!(reason == "SecretNotFound" && message.contains("not-there-yet"), "{reason}: {message}");
    let lost = RunnerName::new(POOL, &pool.uid().unwrap_or_default(), [7; 8]);
    let foreign = "somebody-elses-runner";
    for name in [lost.as_str(), foreign] {
        register(&stage, &owner, name)?;
    }
    assert_eq!(stage.registrations(&pool)?.len(), 1);
    stage.pool(|_| {}).await?;
    eventually("the leftover gone", PATIENCE, || async { Ok(stage.registrations(&pool)?.is_empty().then_some(())) }).await?;
    let others = stage.forge.runners(&mayfly_cluster::forge::Scope::repository(&owner, "app"))?;
    assert!(others.iter().any(|runner| runner.name == foreign), "a foreign runner was removed");
    stage.strike().await
}

/// Registers a runner as anybody with the token could.
fn register(stage: &Stage, owner: &str, name: &str) -> Result<()> {
    let token = stage.forge.call("POST", &format!("/repos/{owner}/app/actions/runners/registration-token"), None)?;
    let body = json!({"name": name, "token": token["token"], "labels": ["linux"], "ephemeral": true});
    let url = format!("{}/api/actions/runner.v1.RunnerService/Register", stage.world.access.local_url);
    ureq::post(url).send_json(&body)?;
    Ok(())
}

/// Every test of this file that restarts the operator: one, as the others share it.
#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_operator_goes_on_where_the_old_one_was() -> Result<()> {
    let stage = Stage::set_alone("restart").await?;
    let pool = stage.pool(|_| {}).await?;
    stage.hook()?;
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "sleep 15"))], 1).await?;
    let pod = stage.a_pod("with its job", |pod| pod.annotations().contains_key(ANNOTATION_JOB)).await?;
    let operators: Api<Pod> = Api::namespaced(stage.world.client.clone(), SYSTEM);
    let selector = ListParams::default().labels("app.kubernetes.io/name=mayfly");
    for operator in operators.list(&selector).await?.items {
        operators.delete(&operator.name_any(), &DeleteParams::default().grace_period(0)).await?;
    }
    // The job runs on in the same pod, and its end is seen by the new process.
    stage.succeeds("app", jobs[0].id).await?;
    let same = stage.pod_api().get_opt(&pod.name_any()).await?;
    ensure!(same.is_none_or(|same| same.uid() == pod.uid()), "the pod was replaced");
    stage.nothing_left(&pool).await?;
    let again = stage.push("app", &[("again.yml", &workflow("push", "true"))], 1).await?;
    stage.succeeds("app", again[0].id).await?;
    stage.nothing_left(&pool).await?;
    stage.strike().await
}
