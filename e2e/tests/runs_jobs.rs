//! Jobs run, each in a locked-down pod of its own.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kube::ResourceExt;
use mayfly_crds::names::{ANNOTATION_JOB, RunnerName};
use mayfly_e2e::stage::{PATIENCE, Stage, said, workflow};
use mayfly_e2e::wait::eventually;
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_pushed_job_runs_in_a_locked_down_pod_and_leaves_nothing() -> Result<()> {
    let stage = Stage::set("run").await?;
    let pool = stage.pool(|_| {}).await?;
    stage.hook()?;
    let script = "id -u; grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status; cat /proc/self/uid_map; \
                  touch /x 2>&1 || true; ls -A /run/mayfly | wc -l; ls /var/run/secrets 2>&1 || true; sleep 4";
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", script))], 1).await?;
    let pod = stage.a_pod("with its job", |pod| pod.annotations().contains_key(ANNOTATION_JOB)).await?;
    let expected = format!("{}/app#{}", stage.organization.name, jobs[0].id);
    assert_eq!(pod.annotations().get(ANNOTATION_JOB), Some(&expected));
    assert!(RunnerName::is_of_pool(&pod.name_any(), &pool.uid().unwrap_or_default()));

    let spec = pod.spec.clone().unwrap_or_default();
    assert_eq!(spec.host_users, Some(false));
    assert_eq!(spec.automount_service_account_token, Some(false));
    assert_eq!(spec.enable_service_links, Some(false));
    assert_eq!(spec.restart_policy.as_deref(), Some("Never"));
    assert!(spec.active_deadline_seconds.is_some());
    let runner = &spec.containers[0];
    let limits = runner.resources.as_ref().and_then(|resources| resources.limits.clone()).unwrap_or_default();
    assert!(["cpu", "memory", "ephemeral-storage"].iter().all(|name| limits.contains_key(*name)), "{limits:?}");
    let volumes = spec.volumes.unwrap_or_default();
    let mounted = |volume: &str| runner.volume_mounts.iter().flatten().any(|mount| mount.name == volume);
    assert!(!mounted("gate-token"), "the runner has the gate's token");
    let unbounded = volumes.iter().filter_map(|v| v.empty_dir.as_ref()).filter(|dir| dir.size_limit.is_none()).count();
    assert_eq!(unbounded, 0);

    let log = stage.succeeds("app", jobs[0].id).await?;
    for expected in ["1001", "CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2", "Read-only file system"] {
        ensure!(log.contains(expected), "{expected:?} is not in the log:\n{log}");
    }
    ensure!(!log.contains("0          0 4294967295"), "no user namespace:\n{log}");
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn many_jobs_at_once_never_take_more_than_max_pods_and_no_pod_twice() -> Result<()> {
    let stage = Stage::set("many").await?;
    let pool = stage.pool(|pool| pool["spec"]["scale"]["max"] = json!(3)).await?;
    stage.hook()?;
    let matrix = json!({"on": "push", "jobs": {"job": {
        "runs-on": "linux", "strategy": {"matrix": {"n": [1, 2, 3, 4, 5, 6, 7]}},
        "steps": [{"run": "echo host=$(cat /proc/sys/kernel/hostname); ls -A ~/work /tmp | sort"}]}}});
    let jobs = stage.push("app", &[("ci.yml", &matrix.to_string())], 7).await?;
    let most = AtomicUsize::new(0);
    eventually("all jobs over", PATIENCE, || async {
        most.fetch_max(stage.pods().await?.len(), Ordering::Relaxed);
        Ok(stage.jobs("app")?.iter().all(|job| job.status == "completed").then_some(()))
    })
    .await?;
    assert_eq!(most.into_inner(), 3, "pods at the same time");
    let mut hosts = BTreeSet::new();
    for job in &jobs {
        let log = stage.succeeds("app", job.id).await?;
        let host = said(&log, "host=").context("the job says where it ran")?.to_owned();
        assert!(hosts.insert(host), "two jobs in one pod: {log}");
    }
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_warm_pod_waits_without_a_registration_and_takes_the_job() -> Result<()> {
    let stage = Stage::set("warm").await?;
    let pool = stage.pool(|pool| pool["spec"]["scale"]["warm"] = json!(1)).await?;
    stage.hook()?;
    let running =
        |pod: &k8s_openapi::api::core::v1::Pod| pod.status.as_ref().is_some_and(|status| status.phase.as_deref() == Some("Running"));
    let warm = stage.a_pod("waiting ahead of demand", running).await?;
    assert!(stage.registrations(&pool)?.is_empty(), "a warm pod is registered");
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "echo host=$(cat /proc/sys/kernel/hostname)"))], 1).await?;
    let log = stage.succeeds("app", jobs[0].id).await?;
    assert_eq!(said(&log, "host="), Some(warm.name_any().as_str()), "another pod took the job:\n{log}");
    let next = stage.a_pod("in its place", |pod| pod.name_any() != warm.name_any() && running(pod)).await?;
    assert_ne!(next.name_any(), warm.name_any());
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_webhook_the_pool_finds_the_job_by_itself() -> Result<()> {
    let stage = Stage::set("poll").await?;
    let without_hook = |pool: &mut serde_json::Value| {
        pool["spec"]["forge"]["gitea"].as_object_mut().map(|gitea| gitea.remove("webhookSecretRef"));
    };
    let pool = stage.pool(without_hook).await?;
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "true"))], 1).await?;
    let began = Instant::now();
    stage.succeeds("app", jobs[0].id).await?;
    ensure!(began.elapsed() < Duration::from_secs(40), "it took {:?}", began.elapsed());
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_pool_serves_its_repository_alone() -> Result<()> {
    let stage = Stage::set("repo").await?;
    let owner = stage.organization.name.clone();
    stage.forge.create_repo(&owner, "one", false)?;
    let pool = stage.pool(|pool| pool["spec"]["forge"]["gitea"]["scope"] = json!({"repository": format!("{owner}/one")})).await?;
    let other = stage.push("two", &[("ci.yml", &workflow("push", "true"))], 1).await?;
    let own = stage.push("one", &[("ci.yml", &workflow("push", "true"))], 1).await?;
    stage.succeeds("one", own[0].id).await?;
    assert_eq!(stage.job("two", other[0].id)?.status, "queued");
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_in_javascript_runs() -> Result<()> {
    let stage = Stage::set("node").await?;
    let pool = stage.pool(|_| {}).await?;
    stage.hook()?;
    let owner = &stage.organization.name;
    stage.forge.create_repo(owner, "greet", false)?;
    let action = json!({"name": "Greet", "description": "Greets", "inputs": {"whom": {"description": "Whom", "required": true}},
        "runs": {"using": "node20", "main": "index.js"}})
    .to_string();
    let program = "console.log(`greeting=${process.env.INPUT_WHOM}`)";
    let files: [(&str, &[u8]); 2] = [("action.yml", action.as_bytes()), ("index.js", program.as_bytes())];
    stage.forge.put_files(owner, "greet", "main", &files, "Add the action")?;
    let uses = format!("{}/{owner}/greet@main", stage.world.access.url);
    let text = json!({"on": "push", "jobs": {"job": {"runs-on": "linux", "steps": [{"uses": uses, "with": {"whom": "world"}}]}}});
    let jobs = stage.push("app", &[("ci.yml", &text.to_string())], 1).await?;
    let log = stage.succeeds("app", jobs[0].id).await?;
    assert_eq!(said(&log, "greeting="), Some("world"), "{log}");
    stage.nothing_left(&pool).await?;
    stage.strike().await
}
