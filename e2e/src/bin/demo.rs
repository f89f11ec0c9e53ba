//! The whole story in the terminal: a push, a queued job, a locked-down pod of its own, its log, and nothing left.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Api, ResourceExt};
use mayfly_cluster::builder::RUNNER_WITH_BOTO3_IMAGE;
use mayfly_cluster::cluster::default_name;
use mayfly_cluster::forge::Scope;
use mayfly_cluster::layout::Layout;
use mayfly_cluster::{Cluster, Options, Progress, Provider, World as Place};
use mayfly_crds::RunnerPool;
use mayfly_crds::names::{ANNOTATION_JOB, LABEL_POOL};
use mayfly_e2e::forge::Organization;
use mayfly_e2e::store::{self, Store};
use mayfly_e2e::wait::eventually;
use mayfly_e2e::{World, gates, github, ingress, install, pool};
use mayfly_github_simulator::control::JobView;
use serde_json::json;

const ORGANIZATION: &str = "demo";
const REPOSITORY: &str = "hello";
const NAMESPACE: &str = "mayfly-demo";
const POOL: &str = "demo";
/// What a job says that found its credential where AWS's SDKs look.
const FOUND_BY: &str = "its credential was found by: container-role";
/// What the job writes into the store, where it may.
const OBJECT: &str = "hello.txt";
const METADATA: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)), 80);
const WORKFLOW: &str = include_str!("../../demo/hello.yml");
/// What is appended to it where the forge gives its jobs tokens.
const STORE_STEP: &str = include_str!("../../demo/store.yml");

/// Shows Mayfly at work on a cluster and a forge on this machine.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// The forge that queues the job. GitHub is a simulator here, and its runner a stand-in.
    #[arg(long, env = "FORGE", value_enum, default_value_t = ForgeName::Gitea)]
    forge: ForgeName,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ForgeName {
    Gitea,
    Github,
}

#[derive(Subcommand)]
enum Command {
    /// Play a cloud's metadata endpoint: answer on this address until ended. (The demo and the tests start this.)
    #[command(hide = true)]
    Decoy {
        /// Address and port.
        address: String,
    },
    /// Play the Ingress that leads to Mayfly's issuer, until ended. (The demo and the tests start this.)
    #[command(hide = true)]
    Ingress(ingress::Arguments),
    /// Build all images and nothing else: what comes after needs no way to the world.
    #[command(hide = true)]
    Images,
    /// Play the pods of simulated nodes, until ended. (The benchmarks start this.)
    #[command(hide = true)]
    Gates(gates::Arguments),
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.command {
        Some(Command::Decoy { address }) => decoy(&address),
        Some(Command::Ingress(arguments)) => ingress::serve(arguments).await,
        Some(Command::Images) => images(),
        Some(Command::Gates(arguments)) => gates::serve(arguments).await,
        None => demo(arguments.forge).await,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("demo failed: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn images() -> Result<()> {
    install::images(&Layout::new(&default_name())?, &Progress::stderr()).map(drop)
}

async fn demo(forge: ForgeName) -> Result<()> {
    let progress = Progress::stderr();
    let cluster = Cluster::up(Options::default(), &progress)?;
    let world = World::connect().await?;
    install::install(&cluster, &progress)?;
    match cluster.provider() {
        // It answers, so that "no answer" in the job means something.
        Provider::Local => world.decoy(Place::Outside, METADATA).await.map(drop)?,
        Provider::Kind | Provider::Kubeconfig => say("no metadata endpoint is played here: that takes a cluster of this machine"),
    }

    let step = progress.step("forge and pool");
    pool::namespace(&world, NAMESPACE).await?;
    let stand = match forge {
        ForgeName::Gitea => Stand::gitea(&world).await?,
        ForgeName::Github => Stand::github(&world).await?,
    };
    pool::condition(&world, NAMESPACE, POOL, "Ready", "True").await?;
    step.done("RunnerPool mayfly-demo/demo is Ready");

    let seen: BTreeSet<i64> = stand.jobs().await?.iter().map(|job| job.id).collect();
    let story = Story { began: Instant::now() };
    story.tell(&stand.push().await?);

    let watching = tokio::spawn(watch_pods(world.clone(), story));
    let jobs = follow(&stand, &seen, &story).await?;
    if let Some(job) = jobs.iter().find(|job| job.conclusion != "success") {
        say(&stand.log(job.id).await?);
        bail!("job {} \"{}\" ended with {:?}; its log is above", job.id, job.name, job.conclusion);
    }
    let log = eventually("the log of the job", Duration::from_secs(20), || async {
        let log = stand.log(jobs[0].id).await?;
        // The forge has the last lines a moment after the job's end.
        Ok(log.contains(stand.last_words()).then_some(log))
    })
    .await?;
    stand.nothing_left(&world).await?;
    story.tell("no pod and no registration is left");
    watching.abort();

    say("\n--- what the job saw -------------------------------------------------------");
    // Lines begin with a time. Some runners tell the script as well, whose lines begin otherwise.
    let said: Vec<&str> = log.lines().filter_map(|line| line.split_once(' ')?.1.trim_start().strip_prefix("| ")).collect();
    let said = said.join("\n");
    say(&said);
    say("-----------------------------------------------------------------------------");
    check_log(&said)?;
    if let Some(store) = stand.store() {
        ensure_contains(&said, FOUND_BY)?;
        ensure_contains(&said, "cloud keys in the environment: none")?;
        ensure!(store.holds(&world, OBJECT), "the object is not in the store");
        say(&format!("an object was written: s3://{}/{OBJECT}, by a job that holds no secret", store.bucket));
    }
    look_around(&world, &stand);

    let pods = pool::pods(&world, NAMESPACE, POOL).await?.len();
    let registrations = stand.registrations(&world).await?;
    say(&format!("demo: {} jobs ran, {pods} pods left, {registrations} registrations left", jobs.len()));
    ensure!(pods == 0 && registrations == 0, "something is left");
    Ok(())
}

/// The forge of the story, with its organization and the pool that serves it.
enum Stand {
    Gitea { forge: mayfly_cluster::Forge, served: Box<RunnerPool>, store: Option<Box<Store>> },
    Github { organization: Box<github::Organization>, served: Box<RunnerPool>, store: Box<Store> },
}

/// A job as the story tells of it.
struct Seen {
    id: i64,
    name: String,
    status: String,
    conclusion: String,
}

impl Stand {
    async fn gitea(world: &World) -> Result<Self> {
        let organization = Organization::create(world, ORGANIZATION)?;
        let forge = organization.client(world);
        forge.create_repo(ORGANIZATION, REPOSITORY, false)?;
        pool::secret(world, &organization, NAMESPACE).await?;
        let store = match world.cluster.provider() {
            Provider::Local => Some(Box::new(store::start(world).await?)),
            Provider::Kind | Provider::Kubeconfig => None,
        };
        let egress = store.as_ref().map(|store| store.egress(world)).transpose()?;
        let manifest = pool::manifest(world, NAMESPACE, POOL, &organization, |pool| {
            if let Some(egress) = egress {
                pool["spec"]["isolation"] = json!({"egress": egress});
                pool["spec"]["jobIdentity"] = json!({"issuer": "Mayfly"});
                pool["spec"]["runner"]["image"] = json!(RUNNER_WITH_BOTO3_IMAGE);
            }
        });
        let served = Box::new(apply(world, &manifest).await?);
        if let Some(store) = &store {
            let repository = forge.call("GET", &format!("/repos/{ORGANIZATION}/{REPOSITORY}"), None)?;
            let repository = repository["id"].as_i64().context("the forge does not say the repository's number")?;
            store.bind(world, (&store.mayfly, repository), (NAMESPACE, POOL), |_| {}).await?;
        }
        let hook = install::webhook_url(&world.cluster, NAMESPACE, POOL)?;
        replace_hook(&forge, &hook, &organization.webhook_secret)?;
        Ok(Self::Gitea { forge, served, store })
    }

    async fn github(world: &World) -> Result<Self> {
        let organization = github::Organization::create(world, ORGANIZATION, REPOSITORY).await?;
        organization.secret(world, NAMESPACE).await?;
        let store = store::start(world).await?;
        let egress = store.egress(world)?;
        let manifest = organization.manifest(NAMESPACE, POOL, |pool| pool["spec"]["isolation"] = json!({"egress": egress}));
        let served = Box::new(apply(world, &manifest).await?);
        store.bind(world, (&store.github, organization.repository_id), (NAMESPACE, POOL), |_| {}).await?;
        Ok(Self::Github { organization: Box::new(organization), served, store: Box::new(store) })
    }

    /// What the job says last.
    fn last_words(&self) -> &'static str {
        match self.store() {
            None => "hello is done",
            Some(_) => FOUND_BY,
        }
    }

    /// Where the job writes an object.
    fn store(&self) -> Option<&Store> {
        match self {
            Self::Gitea { store, .. } => store.as_deref(),
            Self::Github { store, .. } => Some(store),
        }
    }

    async fn push(&self) -> Result<String> {
        match self {
            Self::Gitea { forge, .. } => {
                let stamp = format!("# pushed by the demo {}\n", mayfly_cluster::command::random_hex(4)?);
                let content = format!("{stamp}{}", workflow(self.store()));
                forge.put_file(ORGANIZATION, REPOSITORY, "main", ".gitea/workflows/hello.yml", content.as_bytes(), "Say hello")?;
                Ok("pushed .gitea/workflows/hello.yml to demo/hello".to_owned())
            }
            Self::Github { organization, .. } => {
                let repository = format!("{ORGANIZATION}/{REPOSITORY}");
                organization.simulator.workflow(&repository, "hello.yml", &workflow(self.store())).await?;
                organization.simulator.dispatch(&repository, &mayfly_github_simulator::model::Event::default()).await?;
                Ok("pushed .github/workflows/hello.yml to demo/hello".to_owned())
            }
        }
    }

    async fn jobs(&self) -> Result<Vec<Seen>> {
        Ok(match self {
            Self::Gitea { forge, .. } => {
                let jobs = forge.jobs(&Scope::repository(ORGANIZATION, REPOSITORY), None)?;
                jobs.into_iter().map(|job| Seen { id: job.id, name: job.name, status: job.status, conclusion: job.conclusion }).collect()
            }
            Self::Github { organization, .. } => {
                let listed = organization.simulator.call("GET", "jobs", Vec::new()).await?;
                let jobs: Vec<JobView> = serde_json::from_value(listed["jobs"].clone())?;
                let own = jobs.into_iter().filter(|job| job.repository == format!("{ORGANIZATION}/{REPOSITORY}"));
                own.map(|job| Seen { id: job.id, name: job.name, status: job.state, conclusion: job.conclusion.unwrap_or_default() })
                    .collect()
            }
        })
    }

    async fn log(&self, job: i64) -> Result<String> {
        match self {
            Self::Gitea { forge, .. } => forge.job_log(ORGANIZATION, REPOSITORY, job),
            Self::Github { organization, .. } => Ok(organization.simulator.job(job).await?.log),
        }
    }

    async fn nothing_left(&self, world: &World) -> Result<()> {
        match self {
            Self::Gitea { served, .. } => pool::nothing_left(world, ORGANIZATION, served).await,
            Self::Github { organization, served, .. } => organization.nothing_left(world, served).await,
        }
    }

    async fn registrations(&self, world: &World) -> Result<usize> {
        Ok(match self {
            Self::Gitea { served, .. } => pool::registrations(&world.forge, ORGANIZATION, served)?.len(),
            Self::Github { organization, served, .. } => organization.registrations(served).await?.len(),
        })
    }
}

/// The workflow that is pushed.
fn workflow(store: Option<&Store>) -> String {
    let step = store.map(|store| {
        let values = [("ENDPOINT", &store.endpoint), ("BUCKET", &store.bucket), ("AUTHORITY", &store.authority)];
        values.iter().fold(STORE_STEP.to_owned(), |step, (name, value)| step.replace(name, &json!(value).to_string()))
    });
    format!("{WORKFLOW}{}", step.unwrap_or_default())
}

/// Applies the pool; the one that an earlier demo left for another forge goes first.
async fn apply(world: &World, manifest: &serde_json::Value) -> Result<RunnerPool> {
    let at_github = manifest["spec"]["forge"].get("github").is_some();
    let earlier = pool::pools(world, NAMESPACE).get_opt(POOL).await?;
    // A pool stays with its kind of forge.
    if earlier.is_some_and(|earlier| earlier.spec.forge.github.is_some() != at_github) {
        pool::delete(world, NAMESPACE, POOL).await?;
    }
    pool::apply(world, manifest).await
}

#[derive(Clone, Copy)]
struct Story {
    began: Instant,
}

impl Story {
    fn tell(&self, what: &str) {
        say(&format!("{:>7.2}s  {what}", self.began.elapsed().as_secs_f64()));
    }
}

/// Follows the new jobs until all are over.
async fn follow(stand: &Stand, seen: &BTreeSet<i64>, story: &Story) -> Result<Vec<Seen>> {
    let mut told: BTreeSet<(i64, String)> = BTreeSet::new();
    let began = Instant::now();
    loop {
        let mut jobs = stand.jobs().await?;
        jobs.retain(|job| !seen.contains(&job.id));
        for job in &jobs {
            if told.insert((job.id, job.status.clone())) {
                story.tell(&format!("job {} \"{}\": {} {}", job.id, job.name, job.status, job.conclusion));
            }
        }
        if !jobs.is_empty() && jobs.iter().all(|job| job.status == "completed") {
            return Ok(jobs);
        }
        if began.elapsed() > Duration::from_secs(120) {
            bail!("the job did not run within 120 s; look at `kubectl -n {NAMESPACE} describe runnerpool {POOL}`");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Tells what happens to the pool's pods.
async fn watch_pods(world: World, story: Story) {
    let api: Api<Pod> = Api::namespaced(world.client.clone(), NAMESPACE);
    let mut events = watcher(api, Config::default().labels(&format!("{LABEL_POOL}={POOL}"))).boxed();
    let mut told = BTreeSet::new();
    while let Ok(Some(event)) = events.try_next().await {
        let (pod, what) = match &event {
            Event::Apply(pod) | Event::InitApply(pod) => (pod, describe(pod)),
            Event::Delete(pod) => (pod, "gone".to_owned()),
            Event::Init | Event::InitDone => continue,
        };
        if told.insert((pod.name_any(), what.clone())) {
            story.tell(&format!("pod {}: {what}", pod.name_any()));
        }
    }
}

fn describe(pod: &Pod) -> String {
    if pod.metadata.deletion_timestamp.is_some() {
        return "ending".to_owned();
    }
    if let Some(job) = pod.annotations().get(ANNOTATION_JOB) {
        return format!("runs {job}");
    }
    let status = pod.status.clone().unwrap_or_default();
    let started = status.container_statuses.iter().flatten().any(|container| container.started == Some(true));
    match (started, status.phase.as_deref()) {
        (true, Some("Running")) => "runner started".to_owned(),
        (_, Some("Succeeded")) => "runner ended".to_owned(),
        (_, Some("Pending")) => "created".to_owned(),
        (_, Some(phase)) => phase.to_lowercase(),
        (_, None) => "created".to_owned(),
    }
}

/// The job's own findings are held to the promise.
fn check_log(log: &str) -> Result<()> {
    let has = |text: &str| ensure_contains(log, text);
    has("uid=1001")?;
    has("capabilities: none")?;
    has("no new privileges: yes")?;
    has("seccomp: filter")?;
    has("root file system: read-only")?;
    has("service account token: none")?;
    has("the forge: reached")?;
    for closed in ["cloud metadata", "the API server", "the API server's Service", "the kubelet"] {
        has(&format!("{closed}: no answer"))?;
    }
    Ok(())
}

fn ensure_contains(log: &str, text: &str) -> Result<()> {
    ensure!(log.contains(text), "the job's log does not say {text:?}");
    Ok(())
}

fn replace_hook(forge: &mayfly_cluster::Forge, url: &str, secret: &str) -> Result<()> {
    let hooks = forge.call("GET", &format!("/orgs/{ORGANIZATION}/hooks"), None)?;
    for hook in hooks.as_array().into_iter().flatten().filter_map(|hook| hook["id"].as_i64()) {
        forge.call("DELETE", &format!("/orgs/{ORGANIZATION}/hooks/{hook}"), None)?;
    }
    forge.create_hook(&Scope::Organization(ORGANIZATION.to_owned()), url, secret, &["workflow_job"])?;
    Ok(())
}

fn decoy(address: &str) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("listening on {address}"))?;
    for stream in listener.incoming() {
        // A client that left early is no reason to end.
        let Ok(stream) = stream else { continue };
        std::thread::spawn(move || answer(stream));
    }
    Ok(())
}

/// Notes what a visitor says first, and answers.
fn answer(mut stream: TcpStream) {
    let mut said = [0; 100];
    let read = stream.set_read_timeout(Some(Duration::from_millis(300))).and_then(|()| stream.read(&mut said));
    let line = String::from_utf8_lossy(&said[..read.unwrap_or_default()]).lines().next().unwrap_or_default().to_owned();
    say(&format!("visit {line}"));
    // A visitor that left early is answered no more.
    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nConnection: close\r\n\r\nsecret\n");
}

fn look_around(world: &World, stand: &Stand) {
    let kubectl = format!("KUBECONFIG={} {}", world.cluster.kubeconfig().display(), world.cluster.layout().bin("kubectl").display());
    say("look around:");
    match stand {
        Stand::Gitea { .. } => say(&format!(
            "  forge     {}  (user {}, password in {})",
            world.access.local_url,
            world.access.admin,
            world.cluster.layout().at("forge/admin-password").display()
        )),
        Stand::Github { organization, .. } => {
            let url = organization.simulator.url();
            say(&format!("  forge     {url}/_simulator/jobs  (a simulator of GitHub's runner protocol; it has no pages)"));
        }
    }
    say(&format!("  pool      {kubectl} -n {NAMESPACE} describe runnerpool {POOL}"));
    say(&format!("  operator  {kubectl} -n mayfly-system logs deployment/mayfly-controller"));
    say("  take it all down: make down");
}

fn say(line: &str) {
    // Nobody to tell if the terminal is gone.
    let _ = writeln!(std::io::stdout(), "{line}");
}
