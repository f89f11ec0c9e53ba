//! Jobs that a pool does not accept get no runner, or lose it, and the reason can be read.

use anyhow::{Result, ensure};
use mayfly_cluster::forge::Scope;
use mayfly_e2e::pool;
use mayfly_e2e::stage::{PATIENCE, POOL, Stage, said, workflow};
use mayfly_e2e::wait::eventually;
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_label_nobody_has_gets_no_pod_and_a_reason() -> Result<()> {
    let stage = Stage::set("label").await?;
    stage.pool(|_| {}).await?;
    stage.hook()?;
    let text = workflow("push", "true").replace("linux", "mainframe");
    let jobs = stage.push("app", &[("ci.yml", &text)], 1).await?;
    let why = stage.waits_because(jobs[0].id, "LabelNotServed").await?;
    ensure!(why.contains("mainframe"), "{why}");
    assert!(stage.pods().await?.is_empty());
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_for_repositories_workflows_and_events_hold() -> Result<()> {
    let stage = Stage::set("rules").await?;
    let name = stage.organization.name.clone();
    let rules = json!({"repositories": [format!("{name}/app")], "workflows": ["ci.yml"], "events": ["push"]});
    let pool = stage.pool(|pool| pool["spec"]["jobs"] = rules).await?;
    stage.hook()?;
    let ci = workflow("push", "true");
    let other = stage.push("other", &[("ci.yml", &ci)], 1).await?;
    let jobs = stage.push("app", &[("deploy.yml", &ci)], 1).await?;
    stage.waits_because(other[0].id, "RepositoryNotServed").await?;
    stage.waits_because(jobs[0].id, "WorkflowNotServed").await?;
    // What waits with the same labels in the same repository would be taken by a runner made for another job: out of the way.
    stage.world.forge.delete_repo(&name, "app")?;
    let jobs = stage.push("app", &[("ci.yml", &ci)], 1).await?;
    stage.succeeds("app", jobs[0].id).await?;
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_pull_request_gets_no_runner() -> Result<()> {
    let stage = Stage::set("fork").await?;
    stage.pool(|_| {}).await?;
    stage.hook()?;
    let job = stage.fork_pull_request(&workflow("pull_request", "true")).await?;
    stage.waits_because(job.id, "ForkDenied").await?;
    assert!(stage.pods().await?.is_empty());
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_job_that_took_the_runner_of_an_accepted_one_loses_it_at_once() -> Result<()> {
    let stage = Stage::set("race").await?;
    let pool = stage.pool(|pool| pool["spec"]["jobs"] = json!({"workflows": ["good.yml"]})).await?;
    stage.hook()?;
    let refused = stage.push("app", &[("bad.yml", &workflow("push", "echo begun; sleep 60; echo finished"))], 1).await?;
    let bad = refused[0].id;
    stage.waits_because(bad, "WorkflowNotServed").await?;
    // The forge gives a runner the oldest job whose labels fit: the refused one.
    let text = workflow("push", "echo good");
    stage.forge.put_file(&stage.organization.name, "app", "main", ".gitea/workflows/good.yml", text.as_bytes(), "Add good")?;
    let good = eventually("the accepted job", PATIENCE, || async {
        let runs = stage.forge.runs(&Scope::repository(&stage.organization.name, "app"))?;
        let run = runs.into_iter().find(|run| run.path.starts_with("good.yml"));
        match run {
            Some(run) => Ok(stage.forge.run_jobs(&stage.organization.name, "app", run.id)?.into_iter().next()),
            None => Ok(None),
        }
    })
    .await?;
    let told = stage.event("JobRefused").await?;
    ensure!(told.contains(&format!("#{bad}")) || told.contains("WorkflowNotServed") || told.contains("jobs.workflows"), "{told}");
    stage.succeeds("app", good.id).await?;
    let log = stage.forge.job_log(&stage.organization.name, "app", bad).unwrap_or_default();
    ensure!(said(&log, "finished").is_none(), "the refused job went on to its end:\n{log}");
    // The forge was told: the job does not hang until the forge grows suspicious.
    stage.job_is("app", bad, "completed").await?;
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_pools_for_the_same_job_the_older_one_serves_it() -> Result<()> {
    let stage = Stage::set("two").await?;
    let older = stage.pool(|_| {}).await?;
    // Creation times have whole seconds.
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let manifest = pool::manifest(&stage.world, &stage.namespace, "younger", &stage.organization, |_| {});
    pool::apply(&stage.world, &manifest).await?;
    let (_, names) = pool::condition(&stage.world, &stage.namespace, "younger", "Overlapping", "True").await?;
    ensure!(names.contains(&format!("{}/{POOL}", stage.namespace)), "{names}");
    pool::condition(&stage.world, &stage.namespace, POOL, "Overlapping", "False").await?;
    // It has proved its isolation, and the pod for that is gone.
    pool::condition(&stage.world, &stage.namespace, "younger", "IsolationProved", "True").await?;
    eventually("the younger pool's pod gone", PATIENCE, || async {
        Ok(pool::pods(&stage.world, &stage.namespace, "younger").await?.is_empty().then_some(()))
    })
    .await?;
    stage.hook()?;
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "echo host=$(cat /proc/sys/kernel/hostname)"))], 1).await?;
    let log = stage.succeeds("app", jobs[0].id).await?;
    ensure!(said(&log, "host=").is_some_and(|host| host.starts_with("ci-")), "{log}");
    assert!(pool::pods(&stage.world, &stage.namespace, "younger").await?.is_empty());
    stage.nothing_left(&older).await?;
    pool::delete(&stage.world, &stage.namespace, "younger").await?;
    stage.strike().await
}
