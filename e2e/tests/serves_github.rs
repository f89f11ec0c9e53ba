//! Jobs of a scale set. GitHub is a simulator here that other people's clients agree with, and the runner a stand-in for GitHub's.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Pod, ResourceQuota};
use kube::api::{ListParams, PostParams};
use kube::{Api, ResourceExt};
use mayfly_crds::names::ANNOTATION_JOB;
use mayfly_e2e::github::Stage;
use mayfly_e2e::stage::{PATIENCE, POOL, alone, turn};
use mayfly_e2e::wait::eventually;
use mayfly_e2e::world::SYSTEM;
use mayfly_e2e::{World, pool};
use mayfly_github_simulator::model::Fault;
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_a_scale_set_runs_in_a_pod_of_its_own_and_leaves_nothing() -> Result<()> {
    let _turn = turn().await;
    let stage = Stage::set("ghruns").await?;
    let pool = stage.pool(|_| {}).await?;
    let script = "id; cat /proc/1/environ | tr '\\0' '\\n' | grep JITCONFIG || echo no blob; ls -A /run/mayfly | sed 's/^/left: /'; \
                  cat .runner .credentials .credentials_rsaparams 2>&1 | grep RSA || echo done";
    let log = stage.succeeds(stage.push("ci.yml", script).await?).await?;
    let said: Vec<&str> = log.lines().filter_map(|line| line.split_once(' ')).map(|(_, text)| text).collect();
    ensure!(said.iter().any(|line| line.starts_with("uid=1001")) && said.contains(&"no blob") && said.contains(&"done"), "{log}");
    // What is there says whose pod it is.
    ensure!(said.iter().filter(|line| line.starts_with("left: ")).eq([&"left: identity", &"left: job"]), "{log}");
    ensure!(log.contains("Mayfly accepted "), "{log}");
    stage.organization.nothing_left(&stage.world, &pool).await?;
    let set = stage.scale_set().await?.context("the scale set")?;
    ensure!(stage.status().await?.scale_set.is_some_and(|told| Some(told.id) == set["id"].as_u64()), "{set}");
    let organization = stage.organization.clone();
    let place = stage.namespace.clone();
    stage.strike().await?;
    let left = organization.simulator.scale_sets().await?;
    ensure!(!left.iter().any(|set| set["place"].as_str().is_some_and(|at| at.ends_with(&place))), "{left:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_the_rules_refuse_stays_queued_and_is_told_once() -> Result<()> {
    let _turn = turn().await;
    let stage = Stage::set("ghrules").await?;
    let pool = stage.pool(|pool| pool["spec"]["jobs"] = json!({"workflows": ["release.yml"]})).await?;
    // A script is told when its step begins.
    let refused = stage.push("ci.yml", "echo never").await?;
    eventually("the job is told", PATIENCE, || async {
        let waiting = stage.status().await?.waiting_jobs;
        Ok(waiting.iter().any(|job| job.reason == "WorkflowNotServed").then_some(()))
    })
    .await?;
    let accepted = stage.push("release.yml", "echo released").await?;
    let log = stage.succeeds(accepted).await;
    // GitHub may give the runner that was made for one to the other, which loses it at once then.
    if log.is_err() {
        ensure!(!stage.events("JobRefused").await?.is_empty(), "{log:?}");
    }
    for job in stage.organization.simulator.jobs(refused).await? {
        let log = stage.organization.simulator.job(job.id).await?.log;
        ensure!(!log.contains("never"), "no step of it ran: {log}");
    }
    ensure!(stage.events("JobNotServed").await?.len() == 1, "{:?}", stage.events("JobNotServed").await?);
    stage.organization.simulator.cancel(refused).await?;
    stage.organization.nothing_left(&stage.world, &pool).await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_forges_word_ends_a_pod_that_hangs() -> Result<()> {
    let _turn = turn().await;
    let stage = Stage::set("ghhangs").await?;
    let pool = stage.pool(|pool| pool["spec"]["runner"]["command"] = json!(["bash", "-c", "(mayfly-runner); exec sleep 600"])).await?;
    let run = stage.push("ci.yml", "echo quick").await?;
    stage.succeeds(run).await?;
    let begun = Instant::now();
    stage.organization.nothing_left(&stage.world, &pool).await?;
    ensure!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_that_never_takes_its_job_is_replaced() -> Result<()> {
    let _turn = turn().await;
    let stage = Stage::set("ghidle").await?;
    // It takes the registration and does nothing with it.
    let deaf = json!(["bash", "-c", "cat \"$MAYFLY_REGISTRATION\" >/dev/null; exec sleep 600"]);
    let change = |command: Value| {
        move |pool: &mut Value| {
            pool["spec"]["runner"]["command"] = command;
            pool["spec"]["deadlines"] = json!({"idle": "5s"});
        }
    };
    let pool = stage.pool(change(deaf)).await?;
    let run = stage.push("ci.yml", "echo at last").await?;
    let mut seen = BTreeSet::new();
    let began = Instant::now();
    while seen.len() < 2 {
        let now = stage.organization.registrations(&pool).await?;
        ensure!(now.len() <= 1, "one job has one runner: {now:?}");
        seen.extend(now);
        ensure!(began.elapsed() < PATIENCE, "no other runner came: {seen:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    pool::apply(&stage.world, &stage.organization.manifest(&stage.namespace, POOL, change(json!([])))).await?;
    stage.succeeds(run).await?;
    stage.organization.nothing_left(&stage.world, &pool).await?;
    stage.strike().await
}

/// `kill -9`: the job that runs goes on, and one that is queued meanwhile gets a runner at once, in the session that was left.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_operator_takes_its_sessions_over_and_its_jobs_go_on() -> Result<()> {
    let _alone = alone().await;
    let stage = Stage::set("ghkill").await?;
    let pool = stage.pool(|_| {}).await?;
    let long = stage.push("long.yml", "for i in $(seq 25); do sleep 1; done; echo survived").await?;
    stage.runs(long).await?;
    eventually("the pod is marked", PATIENCE, || async {
        Ok(stage.pods().await?.iter().any(|pod| pod.annotations().contains_key(ANNOTATION_JOB)).then_some(()))
    })
    .await?;
    let session = stage.status().await?.scale_set.and_then(|set| set.session_id).context("a session")?;
    kill_operator(&stage.world).await?;
    let begun = Instant::now();
    let quick = stage.push("quick.yml", "echo quick").await?;
    stage.runs(quick).await?;
    // The kubelet starts the container anew at once; the session that nobody ended would be held for a minute and a half.
    ensure!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    ensure!(stage.status().await?.scale_set.and_then(|set| set.session_id) == Some(session), "{:?}", stage.status().await?.scale_set);
    stage.succeeds(quick).await?;
    let log = stage.succeeds(long).await?;
    ensure!(log.contains("survived"), "{log}");
    stage.organization.nothing_left(&stage.world, &pool).await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn while_github_is_away_pods_that_are_over_go() -> Result<()> {
    let _alone = alone().await;
    let stage = Stage::set("ghaway").await?;
    let pool = stage.pool(|_| {}).await?;
    let run = stage.push("ci.yml", "sleep 8; echo over").await?;
    stage.runs(run).await?;
    // The service for operators is away, and the one for runners is there.
    for path in ["/api/v3/**", "/_services/pipelines/**", "/_services/messages/**"] {
        stage.organization.simulator.fault(&Fault { path: path.to_owned(), status: Some(503), ..Fault::default() }).await?;
    }
    let away = pool::condition(&stage.world, &stage.namespace, POOL, "ForgeReachable", "False").await;
    let gone = eventually("the pod is gone", PATIENCE, || async { Ok(stage.pods().await?.is_empty().then_some(())) }).await;
    stage.organization.simulator.clear_faults().await?;
    ensure!(away?.0 == "Unreachable");
    gone?;
    stage.succeeds(run).await?;
    pool::condition(&stage.world, &stage.namespace, POOL, "ForgeReachable", "True").await?;
    stage.organization.nothing_left(&stage.world, &pool).await?;
    stage.strike().await
}

/// Without a scale set: a webhook tells of the job, and its runner is registered for the job's repository alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_without_a_scale_set_runs_by_a_webhook_and_leaves_nothing() -> Result<()> {
    let _turn = turn().await;
    let stage = Stage::set("ghjit").await?;
    let pool = stage.pool(|pool| stage.organization.just_in_time(pool)).await?;
    stage.hook().await?;
    let run = stage.push("ci.yml", "sleep 3; echo in time").await?;
    stage.runs(run).await?;
    let own = stage.organization.registrations(&pool).await?;
    let runners = stage.organization.simulator.runners().await?;
    let places: Vec<&Value> =
        runners.iter().filter(|runner| own.iter().any(|name| runner["name"] == **name)).map(|of| &of["place"]).collect();
    ensure!(places == [&json!(format!("{}/web", stage.organization.name))], "{places:?}");
    let log = stage.succeeds(run).await?;
    ensure!(log.contains("in time") && log.contains("Mayfly accepted "), "{log}");
    stage.organization.nothing_left(&stage.world, &pool).await?;
    ensure!(stage.scale_set().await?.is_none() && stage.status().await?.scale_set.is_none());
    let answers = stage.organization.simulator.deliveries().await?;
    ensure!(answers.iter().any(|sent| sent["status"] == 202), "{answers:?}");
    stage.strike().await
}

/// A quota for one pod: jobs run one after another, none of their pods is refused, and the pool says why.
#[tokio::test(flavor = "multi_thread")]
async fn a_quota_bounds_the_pool_and_is_told() -> Result<()> {
    let _turn = turn().await;
    let stage = Stage::set("ghquota").await?;
    let pool = stage.pool(|_| {}).await?;
    let quota = json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few"}, "spec": {"hard": {"pods": "1"}}});
    let quotas: Api<ResourceQuota> = Api::namespaced(stage.world.client.clone(), &stage.namespace);
    quotas.create(&PostParams::default(), &serde_json::from_value(quota)?).await?;
    let told = pool::condition(&stage.world, &stage.namespace, POOL, "QuotaSuffices", "False").await?;
    ensure!(told.0 == "QuotaBelowMax" && told.1.contains("ResourceQuota few"), "{told:?}");
    let (first, second) = (stage.push("one.yml", "sleep 3").await?, stage.push("two.yml", "sleep 3").await?);
    stage.succeeds(first).await?;
    stage.succeeds(second).await?;
    stage.organization.nothing_left(&stage.world, &pool).await?;
    ensure!(stage.events("PodRefused").await?.is_empty(), "{:?}", stage.events("PodRefused").await?);
    stage.strike().await
}

/// Kills the operator's process without a word to it, and waits until the kubelet has started it anew.
async fn kill_operator(world: &World) -> Result<()> {
    let operators: Api<Pod> = Api::namespaced(world.client.clone(), SYSTEM);
    let selector = ListParams::default().labels("app.kubernetes.io/component=controller");
    let restarts = || async {
        let pods = operators.list(&selector).await?.items;
        let statuses = pods.first().and_then(|pod| pod.status.as_ref()).and_then(|status| status.container_statuses.clone());
        Ok::<_, anyhow::Error>(statuses.into_iter().flatten().map(|status| (status.restart_count, status.ready)).next())
    };
    let (before, _) = restarts().await?.context("the operator runs")?;
    let pod = operators.list(&selector).await?.items.pop().context("the operator's pod")?;
    world.kill_container(&pod)?;
    eventually("the operator is back", PATIENCE, || async {
        Ok(restarts().await?.filter(|(count, ready)| *count > before && *ready).map(drop))
    })
    .await
}
