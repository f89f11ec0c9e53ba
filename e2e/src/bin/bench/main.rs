//! What a job costs and how long things take, measured on the running cluster: one figure a line as `name value unit`, and the same
//! in `target/bench.json`. Times are wall-clock of this machine, which runs cluster, forge and jobs at once: compare the ratios.

mod crowd;
mod github;
mod many;
mod measure;
mod process;
mod slots;

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;
use kube::api::{DeleteParams, ListParams, LogParams, PostParams};
use mayfly_cluster::command::run;
use mayfly_cluster::{Cluster, Options, Progress};
use mayfly_crds::RunnerPool;
use mayfly_crds::names::{ANNOTATION_JOB, RUNNER_CONTAINER};
use mayfly_e2e::stage::{POOL, Stage, workflow};
use mayfly_e2e::wait::eventually;
use mayfly_e2e::world::SYSTEM;
use mayfly_e2e::{World, install, leak, pool};
use serde_json::{Value, json};

use measure::{Audited, Figures, Metrics, Process, Times, now, per_job};

/// Jobs measured one after another, and as one burst.
const SINGLE: usize = 8;
const BURST: usize = 20;
/// Numbers of pools at which memory is measured.
const POOLS: [usize; 3] = [1, 50, 500];
/// Pools that are made at the same time, and how long all of them may take.
const AT_ONCE: usize = 16;
const PATIENCE: Duration = Duration::from_secs(600);
/// Seconds between the first step and the last, by workflow. The kubelet has the mark on a job's pod in hand for up to a second or two, and
/// only then takes up its deletion: a job that is over before is measured apart.
const EMPTY: (&str, u32) = ("empty.yml", 0);
const STEADY: (&str, u32) = ("steady.yml", 4);

/// Measures Mayfly on the cluster that is up.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// Leave out what takes many minutes.
    #[arg(long)]
    quick: bool,
    /// The forge: GitHub is a simulator here, and its runner a stand-in.
    #[arg(long, env = "FORGE", value_enum)]
    forge: Option<ForgeName>,
    /// Nothing but these parts, however long they take.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
}

impl Arguments {
    fn want(&self, part: Part) -> bool {
        let of_forge = match part {
            Part::Broker => true,
            Part::Gitea | Part::Pools => self.forge != Some(ForgeName::Github),
            _ => self.forge != Some(ForgeName::Gitea),
        };
        let long = matches!(part, Part::Slots | Part::ScaleSets | Part::Crowd | Part::Pools);
        if self.only.is_empty() { of_forge && !(long && self.quick) } else { self.only.contains(&part) }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum ForgeName {
    Gitea,
    Github,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// What an exchange costs, on one core.
    Broker,
    /// Jobs of one scale set at once.
    Bursts,
    /// What a credential adds to a job.
    Credentials,
    /// More jobs than pods at a time, beside the same pods without Mayfly.
    Slots,
    /// Many scale sets in one process.
    ScaleSets,
    /// Many jobs of many pools at once, on simulated nodes.
    Crowd,
    /// Jobs of Gitea, one after another and at once; breach, leaks.
    Gitea,
    /// Many pools of Gitea's in one process.
    Pools,
}

#[tokio::main]
async fn main() -> ExitCode {
    match bench(&Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "bench failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn bench(arguments: &Arguments) -> Result<()> {
    let progress = Progress::stderr();
    let cluster = Cluster::up(Options::default(), &progress)?;
    install::install(&cluster, &progress)?;
    let mut figures = Figures::default();
    let (quick, want) = (arguments.quick, |part| arguments.want(part));
    if want(Part::Broker) {
        process::broker(&mut figures)?;
    }
    if want(Part::Bursts) {
        github::bursts(quick, &mut figures).await?;
    }
    if want(Part::Credentials) {
        github::credentials(quick, &mut figures).await?;
    }
    if want(Part::Slots) {
        slots::compare(&mut figures).await?;
    }
    if want(Part::ScaleSets) {
        many::scale_sets(&mut figures).await?;
    }
    if want(Part::Crowd) {
        crowd::measure(&mut figures).await?;
    }
    if want(Part::Gitea) {
        gitea(quick, &mut figures).await?;
    }
    if want(Part::Pools) {
        pools(&mut figures).await?;
    }
    figures.write()
}

async fn gitea(quick: bool, figures: &mut Figures) -> Result<()> {
    let stage = Stage::set("bench").await?;
    let served = stage.pool(|pool| pool["spec"]["scale"]["max"] = json!(10)).await?;
    stage.hook()?;
    let (owner, app) = (stage.organization.name.clone(), "app");
    stage.forge.create_repo(&owner, app, false)?;
    for (name, seconds) in [EMPTY, STEADY] {
        stage.forge.put_file(&owner, app, "main", &format!(".gitea/workflows/{name}"), timed(seconds).as_bytes(), "Add workflow")?;
    }

    let times = Times::watch(stage.pod_api());
    let before = proofs(&stage)?;
    let shape = shape(&stage).await?;
    stage.nothing_left(&served).await?;
    let bare = pods(&stage, &times, "bare", &bare(&shape), figures).await?;
    let shaped = pods(&stage, &times, "shaped", &shape, figures).await?;
    let start = one_by_one(&stage, &served, &times, figures).await?;
    let end = ends(&stage, &served, &times, "job", STEADY, figures).await?;
    ends(&stage, &served, &times, "empty_job", EMPTY, figures).await?;
    figures.add("queue_to_first_step_over_bare_pod", start / bare.start, "ratio");
    figures.add("queue_to_first_step_over_shaped_pod", start / shaped.start, "ratio");
    figures.add("job_end_to_pod_gone_over_shaped_pod", end / shaped.end, "ratio");
    let (seconds, count) = proofs(&stage)?;
    figures.add("proof_rounds_mean", (seconds - before.0) / (count - before.1), "s");
    warm(&stage, figures).await?;
    burst(&stage, &served, figures).await?;
    if !quick {
        breach(&stage, &served, figures).await?;
        let found = leak::leaks(&stage, leak::STARTS).await?;
        stage.nothing_left(&served).await?;
        figures.add(format!("leaks_in_{}_starts", leak::STARTS), found.visits.len() as f64, "tries");
    }
    stage.strike().await
}

async fn pools(figures: &mut Figures) -> Result<()> {
    // What other parts had it keep is no pool's.
    let world = World::connect().await?;
    for verb in ["restart", "status"] {
        run(world.cluster.kubectl().args(["-n", SYSTEM, "rollout", verb, "deployment/mayfly-controller"]))?;
    }
    let stage = Stage::set("bench-pools").await?;
    stage.pool(|_| {}).await?;
    // However that went: so many pools would keep the machine busy.
    let measured = memory(&stage, figures).await;
    let pools = pool::pools(&stage.world, &stage.namespace);
    for pool in pools.list(&ListParams::default()).await?.items.iter().filter(|pool| pool.name_any() != POOL) {
        pools.delete(&pool.name_any(), &DeleteParams::default()).await?;
    }
    let gone = || async { Ok((pools.list(&ListParams::default()).await?.items.len() == 1).then_some(())) };
    eventually("the pools gone", PATIENCE, gone).await?;
    stage.strike().await?;
    measured
}

/// How long something took to begin and to go, in the middle, in seconds.
struct Spans {
    start: f64,
    end: f64,
}

/// The shape of a runner pod, with a program that tells the time and waits for its end.
async fn shape(stage: &Stage) -> Result<PodSpec> {
    let id = dispatch(stage, EMPTY)?;
    let pod = stage.a_pod("to take the shape of", |pod| pod.spec.is_some()).await?;
    let mut shape = pod.spec.context("a pod has a spec")?;
    shape.node_name = None;
    let runner = shape.containers.first_mut().context("a runner")?;
    runner.command = Some(["bash", "-c", "date +%s.%N; trap 'exit 0' TERM; sleep 600 & wait"].map(str::to_owned).to_vec());
    stage.succeeds("app", id).await?;
    Ok(shape)
}

/// The same program in a pod of one container and nothing else.
fn bare(shape: &PodSpec) -> PodSpec {
    let mut bare = shape.clone();
    bare.init_containers = None;
    bare.volumes = None;
    for container in &mut bare.containers {
        container.volume_mounts = None;
    }
    bare
}

/// Pods one after another, without Mayfly: how long each takes to begin, and from its deletion until it is gone.
async fn pods(stage: &Stage, times: &Times, kind: &str, spec: &PodSpec, figures: &mut Figures) -> Result<Spans> {
    let api = stage.pod_api();
    let (mut start, mut end) = (Vec::new(), Vec::new());
    for n in 0..SINGLE {
        let name = format!("{kind}-{n}");
        let metadata = ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() };
        let pod = Pod { metadata, spec: Some(spec.clone()), status: None };
        let began = now();
        api.create(&PostParams::default(), &pod).await?;
        let said = LogParams { container: Some(RUNNER_CONTAINER.to_owned()), ..LogParams::default() };
        let log = eventually(format!("the word of pod {name}"), Duration::from_secs(60), || async {
            Ok(api.logs(&name, &said).await?.trim().parse::<f64>().ok())
        })
        .await?;
        start.push(log - began);
        let began = now();
        api.delete(&name, &DeleteParams::default().grace_period(2)).await?;
        end.push(times.over(Some(&name)).await?.gone.unwrap_or_default() - began);
    }
    Ok(Spans {
        start: figures.spread(&format!("{kind}_pod_create_to_first_instruction"), start),
        end: figures.spread(&format!("{kind}_pod_delete_to_gone"), end),
    })
}

/// Jobs one after another: how long each takes to begin when nothing else happens.
async fn one_by_one(stage: &Stage, served: &RunnerPool, times: &Times, figures: &mut Figures) -> Result<f64> {
    let (mut create, mut first) = (Vec::new(), Vec::new());
    for _ in 0..SINGLE {
        times.0.lock().await.clear();
        let began = now();
        let id = dispatch(stage, EMPTY)?;
        let job = stage.job_is("app", id, "completed").await?;
        stage.nothing_left(served).await?;
        let log = stage.forge.job_log(&stage.organization.name, "app", job.id)?;
        create.push(times.over(None).await?.seen - began);
        first.push(stamp(&log, "first=")? - began);
    }
    figures.spread("queue_to_pod_create", create);
    Ok(figures.spread("queue_to_first_step", first))
}

/// Jobs one after another: how long each takes to go.
async fn ends(stage: &Stage, served: &RunnerPool, times: &Times, kind: &str, length: (&str, u32), figures: &mut Figures) -> Result<f64> {
    let (mut leaving, mut pod_gone, mut registration_gone) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..SINGLE {
        times.0.lock().await.clear();
        let id = dispatch(stage, length)?;
        let job = stage.job_is("app", id, "completed").await?;
        let free = eventually("the registration gone", Duration::from_secs(60), || async {
            Ok(stage.registrations(served)?.is_empty().then(now))
        })
        .await?;
        stage.nothing_left(served).await?;
        let life = times.over(None).await?;
        let ended = stamp(&stage.forge.job_log(&stage.organization.name, "app", job.id)?, "last=")?;
        leaving.push(life.leaving.context("a pod is deleted before it is gone")? - ended);
        pod_gone.push(life.gone.unwrap_or_default() - ended);
        registration_gone.push(free - ended);
    }
    figures.spread(&format!("{kind}_end_to_registration_gone"), registration_gone);
    figures.spread(&format!("{kind}_end_to_pod_deletion"), leaving);
    Ok(figures.spread(&format!("{kind}_end_to_pod_gone"), pod_gone))
}

/// Jobs that find a pod waiting, which proved its isolation before.
async fn warm(stage: &Stage, figures: &mut Figures) -> Result<()> {
    let with = |warm: usize| move |pool: &mut Value| pool["spec"]["scale"] = json!({"max": 10, "warm": warm});
    stage.unready_pool(with(1)).await?;
    let mut first = Vec::new();
    for _ in 0..SINGLE {
        eventually("a warm pod and no other", Duration::from_secs(60), || async {
            let pods = stage.pods().await?;
            let running = |pod: &&Pod| pod.status.as_ref().is_some_and(|status| status.phase.as_deref() == Some("Running"));
            Ok((pods.len() == 1 && pods.iter().filter(running).count() == 1).then_some(()))
        })
        .await?;
        // Until its gate has proved and asks.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let began = now();
        let id = dispatch(stage, EMPTY)?;
        let job = stage.job_is("app", id, "completed").await?;
        first.push(stamp(&stage.forge.job_log(&stage.organization.name, "app", job.id)?, "first=")? - began);
    }
    figures.spread("queue_to_first_step_warm", first);
    stage.unready_pool(with(0)).await?;
    Ok(())
}

/// A hole is opened while a job runs: how long until its pod is gone.
async fn breach(stage: &Stage, served: &RunnerPool, figures: &mut Figures) -> Result<()> {
    stage.nothing_left(served).await?;
    let long = workflow("push", "sleep 300");
    stage.push("long", &[("long.yml", &long)], 1).await?;
    stage.a_pod("with its job", |pod| pod.annotations().contains_key(ANNOTATION_JOB)).await?;
    let began = now();
    stage.open_wide().await?;
    eventually("the pod gone", Duration::from_secs(120), || async { Ok(stage.pods().await?.is_empty().then_some(())) }).await?;
    figures.add("breach_to_pod_gone", now() - began, "s");
    stage.close_again().await
}

/// A job that says when its first step began and when its last step ended, by the clock that this program reads as well.
fn timed(seconds: u32) -> String {
    let steps = ["echo first=$(date +%s.%N)".to_owned(), format!("sleep {seconds}; echo last=$(date +%s.%N)")];
    let steps: Vec<Value> = steps.iter().map(|step| json!({"run": step})).collect();
    json!({"on": "workflow_dispatch", "jobs": {"job": {"runs-on": "linux", "steps": steps}}}).to_string()
}

fn dispatch(stage: &Stage, (workflow, _): (&str, u32)) -> Result<i64> {
    let run = stage.forge.dispatch(&stage.organization.name, "app", workflow, "main", &json!({}))?;
    let jobs = stage.forge.run_jobs(&stage.organization.name, "app", run)?;
    Ok(jobs.first().context("a run has a job")?.id)
}

fn stamp(log: &str, mark: &str) -> Result<f64> {
    let found = log.lines().filter_map(|line| line.split_once(mark)).find_map(|(_, time)| time.trim().parse().ok());
    found.with_context(|| format!("{mark} is not in the log:\n{log}"))
}

/// Many jobs at once: what each costs the API server.
async fn burst(stage: &Stage, served: &RunnerPool, figures: &mut Figures) -> Result<()> {
    let audited = Audited::from_now(&stage.world.cluster)?;
    let began = now();
    let jobs: Vec<i64> = (0..BURST).map(|_| dispatch(stage, EMPTY)).collect::<Result<_>>()?;
    for job in &jobs {
        stage.succeeds("app", *job).await?;
    }
    figures.add("burst_jobs_per_minute", BURST as f64 * 60.0 / (now() - began), "1/min");
    stage.nothing_left(served).await?;
    // The last numbers of the status are written with a delay.
    tokio::time::sleep(Duration::from_secs(8)).await;
    let calls = audited.calls()?;
    figures.add("kube_writes_per_job", per_job(&calls, "write", BURST), "1/job");
    figures.add("kube_reads_per_job", per_job(&calls, "read", BURST), "1/job");
    for ((kind, what), n) in &calls {
        let name = what.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        figures.add(format!("kube_{kind}s_per_job_{name}"), f64::from(*n) / BURST as f64, "1/job");
    }
    Ok(())
}

/// How long the rounds of all proofs took, in seconds, and how many there were, from the operator's metrics.
fn proofs(stage: &Stage) -> Result<(f64, f64)> {
    let metrics = Metrics::now(&stage.world.cluster)?;
    Ok((metrics.value("mayfly_proof_seconds_sum")?, metrics.value("mayfly_proof_seconds_count")?))
}

/// The operator's memory with more and more pools.
async fn memory(stage: &Stage, figures: &mut Figures) -> Result<()> {
    let mut made = 1;
    for count in POOLS {
        let began = now();
        let apply = |n: usize| {
            let manifest = pool::manifest(&stage.world, &stage.namespace, &format!("m{n}"), &stage.organization, |pool| {
                pool["spec"]["forge"]["gitea"]["labels"] = json!([format!("m{n}")]);
            });
            async move { pool::apply(&stage.world, &manifest).await.map(drop) }
        };
        let new = made..count;
        stream::iter(new.clone()).map(apply).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
        made = count;
        eventually(format!("{count} pools ready"), PATIENCE, || async {
            let all = pool::pools(&stage.world, &stage.namespace).list(&Default::default()).await?;
            let ready = |pool: &&RunnerPool| {
                pool.status.iter().flat_map(|status| &status.conditions).any(|c| c.type_ == "Ready" && c.status == "True")
            };
            Ok((all.items.iter().filter(ready).count() >= count).then_some(()))
        })
        .await?;
        if !new.is_empty() {
            figures.add(format!("until_{count}_pools_ready"), now() - began, "s");
        }
        tokio::time::sleep(Duration::from_secs(15)).await;
        figures.add(format!("operator_memory_{count}_pools"), Process::operator()?.memory()?, "MiB");
    }
    Ok(())
}
