//! Jobs of a scale set, from the GitHub simulator: what they cost there and in the cluster, and how long things take.

use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::{Api, ResourceExt};
use mayfly_crds::RunnerPool;
use mayfly_e2e::github::{Organization, Stage};
use mayfly_e2e::stage::POOL;
use mayfly_e2e::wait::eventually;
use mayfly_e2e::{World, pool, store};
use serde_json::{Value, json};

use crate::measure::{Audited, Figures, Metrics, Times, now, per_job};
use crate::slots;

/// Jobs that come at once.
const BURSTS: [usize; 2] = [1, 20];
/// The same at length.
const LONG: usize = 100;
/// Jobs that come one after another, for what one takes.
const SINGLES: usize = 30;
/// Pods at the same time.
const SLOTS: usize = 20;
const NAMESPACE: &str = "mayfly-bench-github";
const PATIENCE: Duration = Duration::from_secs(300);

/// Measures bursts.
pub(crate) async fn bursts(quick: bool, figures: &mut Figures) -> Result<()> {
    let world = World::connect().await?;
    let organization = Organization::create(&world, "bench", "web").await?;
    pool::namespace(&world, NAMESPACE).await?;
    organization.secret(&world, NAMESPACE).await?;
    let manifest = organization.manifest(NAMESPACE, POOL, |pool| pool["spec"]["scale"]["max"] = json!(SLOTS));
    let served = pool::apply(&world, &manifest).await?;
    pool::condition(&world, NAMESPACE, POOL, "IsolationProved", "True").await?;
    organization.nothing_left(&world, &served).await?;
    let times = Times::watch(Api::<Pod>::namespaced(world.client.clone(), NAMESPACE));
    if !quick {
        singles(&world, &organization, &served, &times, figures).await?;
    }
    let plain = plain(&world, &organization, &served, &times, figures).await?;
    for burst in BURSTS.into_iter().chain((!quick).then_some(LONG)) {
        let created = measure(&world, &organization, &times, burst, figures).await?;
        if burst == SLOTS {
            figures.add(format!("github_burst_{burst}_enqueue_to_pod_create_over_plain_pods"), created / plain, "ratio");
        }
        organization.nothing_left(&world, &served).await?;
    }
    pool::delete(&world, NAMESPACE, POOL).await
}

/// Measures what a credential adds to a job: from the moment its job is accepted until its first session of a real STS is there, and writes.
pub(crate) async fn credentials(quick: bool, figures: &mut Figures) -> Result<()> {
    let stage = Stage::set("bench").await?;
    let store = store::start(&stage.world).await?;
    let egress = store.egress(&stage.world)?;
    stage.pool(|pool| pool["spec"]["isolation"] = json!({"egress": egress})).await?;
    store.bind(&stage.world, (&store.github, stage.organization.repository_id), (&stage.namespace, POOL), |_| {}).await?;
    let job = || json!({"permissions": {"id-token": "write"}, "steps": [{"run": "true"}]});
    // The first one has the broker and the store look up the issuer.
    stage.succeeds(stage.push_job("ci.yml", job()).await?).await?;
    let audited = Audited::from_now(&stage.world.cluster)?;
    let jobs = if quick { 5 } else { 20 };
    let mut waited = Vec::new();
    for _ in 0..jobs {
        let log = stage.succeeds(stage.push_job("ci.yml", job()).await?).await?;
        let at = |what: &str| -> Result<f64> {
            let mut lines = log.lines().filter_map(|line| line.split_once(' '));
            let (time, _) = lines.find(|(_, text)| text.starts_with(what)).with_context(|| format!("no {what:?} in the log:\n{log}"))?;
            Ok(time.parse::<k8s_openapi::jiff::Timestamp>()?.as_millisecond() as f64 / 1000.0)
        };
        waited.push(at("Mayfly: AWS SDKs find")? - at("Mayfly accepted")?);
    }
    figures.spread("credential_accepted_to_session", waited);
    tokio::time::sleep(Duration::from_secs(8)).await;
    figures.add("credential_kube_writes_per_job", per_job(&audited.calls()?, "write", jobs), "1/job");
    stage.strike().await
}

/// From the moment that GitHub knows of a job, and tells, until its pod is there: beside each, a pod that nobody asks about, made by this
/// program.
async fn singles(world: &World, organization: &Organization, served: &RunnerPool, times: &Times, figures: &mut Figures) -> Result<()> {
    let plain: Pod = serde_json::from_value(json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"generateName": "plain-"},
        "spec": {"nodeSelector": {"bench": "none"}, "containers": [{"name": "plain", "image": "none"}]}}))?;
    let pods: Api<Pod> = Api::default_namespaced(world.client.clone());
    let (mut told, mut bare, since) = (Vec::new(), Vec::new(), Told::now(world)?);
    for _ in 0..SINGLES {
        times.0.lock().await.clear();
        let began = now();
        let run = organization.enqueue("linux", 1, "true").await?;
        organization.simulator.finished(run, PATIENCE).await?;
        organization.nothing_left(world, served).await?;
        told.push(times.over(None).await?.seen - began);
        let began = now();
        let made = pods.create(&PostParams::default(), &plain).await?;
        bare.push(now() - began);
        pods.delete(&made.name_any(), &DeleteParams::default().grace_period(0)).await?;
    }
    since.figures("github_job", "0.02", figures, world)?;
    let told = figures.spread("github_job_told_to_pod_create", told);
    let bare = figures.spread("plain_pod_create", bare);
    figures.add("github_job_told_to_pod_create_over_plain_pod_create", told / bare, "ratio");
    Ok(())
}

/// What the operator has counted of pods that were made because the forge told of jobs.
struct Told(Metrics);

impl Told {
    fn now(world: &World) -> Result<Self> {
        Ok(Self(Metrics::now(&world.cluster)?))
    }

    /// What came since: how long it took the operator and the API server together, from the message on, and the share that took no more
    /// than this bound (seconds, one of the histogram's).
    fn figures(&self, name: &str, bound: &str, figures: &mut Figures, world: &World) -> Result<()> {
        let now = Metrics::now(&world.cluster)?;
        let more = |what: &str| -> Result<f64> {
            let series = format!("mayfly_told_to_pod_seconds_{what}");
            Ok(now.value(&series)? - self.0.value(&series)?)
        };
        let count = more("count")?;
        figures.add(format!("{name}_message_to_pod_mean"), more("sum")? / count, "s");
        figures.add(format!("{name}_message_to_pod_within_{bound}_s"), more(&format!("bucket{{le=\"{bound}\"}}"))? / count, "ratio");
        Ok(())
    }
}

/// As many pods of a runner pod's shape at once, made by this program: until half of them are there.
async fn plain(world: &World, organization: &Organization, served: &RunnerPool, times: &Times, figures: &mut Figures) -> Result<f64> {
    let shape = slots::shape(world, organization, NAMESPACE, 1).await?;
    organization.nothing_left(world, served).await?;
    let pods: Api<Pod> = Api::namespaced(world.client.clone(), NAMESPACE);
    let mut created = Vec::new();
    // The first time is for this program's connections.
    for _ in 0..2 {
        times.0.lock().await.clear();
        let began = now();
        futures::future::try_join_all((0..SLOTS).map(|n| slots::create(&pods, &shape, n))).await?;
        pods.delete_collection(&DeleteParams::default().grace_period(0), &ListParams::default()).await?;
        created = eventually("the plain pods are gone", PATIENCE, || async {
            let lives = times.0.lock().await;
            let gone = lives.len() == SLOTS && lives.values().all(|life| life.gone.is_some());
            Ok(gone.then(|| lives.values().map(|life| life.seen - began).collect()))
        })
        .await?;
    }
    // The node is still at their containers.
    tokio::time::sleep(Duration::from_secs(8)).await;
    Ok(figures.spread(&format!("plain_burst_{SLOTS}_pod_create"), created))
}

/// Until half of the pods of so many jobs were there, or so many as there may be at once.
async fn measure(world: &World, organization: &Organization, times: &Times, burst: usize, figures: &mut Figures) -> Result<f64> {
    times.0.lock().await.clear();
    let audited = Audited::from_now(&world.cluster)?;
    let (before, since) = (organization.simulator.counters().await?, Told::now(world)?);
    let began = now();
    let run = organization.enqueue("linux", burst, "true").await?;
    let jobs = organization.simulator.finished(run, PATIENCE).await?;
    let seconds = now() - began;
    // The last numbers of the status are written with a delay, and pods of the last jobs go.
    tokio::time::sleep(Duration::from_secs(8)).await;
    let (calls, after) = (audited.calls()?, organization.simulator.counters().await?);
    let name = |what: &str| format!("github_burst_{burst}_{what}");
    let counted = |counters: &Value, what: &str| counters[what].as_f64().unwrap_or_default();
    let asked = |what: &str| (counted(&after, what) - counted(&before, what)) / burst as f64;
    figures.add(name("calls_per_job"), asked("operator"), "1/job");
    figures.add(name("polls_per_job"), asked("polls"), "1/job");
    figures.add(name("kube_writes_per_job"), per_job(&calls, "write", burst), "1/job");
    figures.add(name("kube_reads_per_job"), per_job(&calls, "read", burst), "1/job");
    for ((kind, what), n) in &calls {
        let what = what.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        figures.add(name(&format!("kube_{kind}s_per_job_{what}")), f64::from(*n) / burst as f64, "1/job");
    }
    figures.add(name("jobs_per_minute"), burst as f64 * 60.0 / seconds, "1/min");

    let lives = times.0.lock().await.clone();
    let time = |text: &Option<String>| -> Result<f64> {
        let text = text.as_deref().context("a job that is over has its times")?;
        Ok(text.parse::<k8s_openapi::jiff::Timestamp>()?.as_millisecond() as f64 / 1000.0)
    };
    let (mut start, mut gone) = (Vec::new(), Vec::new());
    for job in &jobs {
        start.push(time(&job.started_at)? - time(&job.queued_at)?);
        let life = job.runner.as_ref().and_then(|runner| lives.get(runner)).context("a job's pod was seen")?;
        gone.push(life.gone.context("a pod is gone in the end")? - time(&job.completed_at)?);
    }
    let mut created: Vec<f64> = lives.values().map(|life| life.seen - began).collect();
    created.sort_by(f64::total_cmp);
    // With more jobs than pods the later ones wait for the earlier.
    created.truncate(SLOTS);
    let created = figures.spread(&name("enqueue_to_pod_create"), created);
    since.figures(&format!("github_burst_{burst}"), "0.1", figures, world)?;
    figures.spread(&name("queue_to_start"), start);
    figures.spread(&name("completed_to_pod_gone"), gone);
    Ok(created)
}
