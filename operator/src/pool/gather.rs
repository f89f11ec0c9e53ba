//! What is: the jobs of the forge, the pods of the cluster, and who has which. Reads only.

use std::cell::LazyCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, Secret as KubeSecret};
use kube::ResourceExt;
use kube::runtime::reflector::ObjectRef;
use mayfly_crds::names::{
    ANNOTATION_FORGE, ANNOTATION_JOB, ANNOTATION_JOB_CLAIMS, ANNOTATION_POOL_NAMESPACES, ANNOTATION_WORKFLOW, LABEL_POOL, RunnerName,
};
use mayfly_crds::{ScaleSetStatus, SecretKeyRef, WaitingJob};
use wildmatch::WildMatch;

use super::accept::Refusal;
use super::apply::pod_request;
use super::controller::Context;
use super::plan::{PodFacts, Role};
use super::registry::{Link, OwedJob, PoolHandle, PoolState, Registered};
use super::room::{Charge, Left, add_times, charge, left};
use super::validate::{GitHubCredential, Pool, Source};
use crate::forge::github::{self, GitHub, JustInTime};
use crate::forge::{
    Forge, ForgeError, Job, JobId, JobKey, JobState, Reach, RegisteredRunner, Repository, Run, RunnerKey, ScaleSet, Secret, refused,
};
use crate::isolation::no_forge_at;
use crate::runner::{Phase, phase, runner_pod};

/// Most waiting jobs told in a pool's status.
pub(super) const WAITING_TOLD: usize = 10;
/// A created pod that the watch has not shown after this long is taken as lost.
const WATCH_LAG: SignedDuration = SignedDuration::from_secs(30);
/// The API server made a pod, and the watch has not shown it after this long: it is taken as deaf.
const WATCH_DEAF: SignedDuration = SignedDuration::from_secs(4);
/// Most workflow runs remembered per pool.
const RUNS_KEPT: usize = 2_000;

/// What was seen.
#[derive(Debug, Default)]
pub(super) struct Observed {
    /// Accepted jobs that wait, oldest first.
    pub(super) queued: Vec<OwedJob>,
    /// Further jobs that fit by label and repository; there are more than could be served now.
    pub(super) beyond: usize,
    /// Jobs that wait, and why this pool does not serve them.
    pub(super) waiting: Vec<WaitingJob>,
    /// Pods of the pool.
    pub(super) pods: Vec<PodFacts>,
    /// Pods that do not say yet which job they have.
    pub(super) unmarked: Vec<Unmarked>,
    /// Pods that do not say yet what the token of their job has to say, with the job.
    pub(super) unclaimed: Vec<(String, String, Job)>,
    /// Pods that say which job they have, one that the pool accepts.
    pub(super) accepted: Vec<String>,
    /// Registrations whose pods are gone.
    pub(super) orphans: Vec<Orphan>,
    /// Older pools that may accept some of the same jobs.
    pub(super) overlaps: Vec<String>,
    /// What the namespace's quotas leave; `None` where none counts runner pods.
    pub(super) quota: Option<Left>,
}

/// A registration whose pod is gone, with the job it had and the means to say that this job is lost.
#[derive(Debug)]
pub(super) struct Orphan {
    pub(super) key: RunnerKey,
    pub(super) lost: Option<(Job, Secret)>,
}

/// A pod that does not say yet which job it has.
#[derive(Debug)]
pub(super) struct Unmarked {
    pub(super) pod: String,
    pub(super) uid: String,
    pub(super) job: JobKey,
    /// `run/file@ref`.
    pub(super) workflow: String,
}

/// Why nothing could be seen.
#[derive(Debug, thiserror::Error)]
pub(super) enum GatherError {
    /// The Secret or its key does not exist.
    #[error("{0}")]
    Secret(String),
    /// The Secret does not allow its use.
    #[error("{0}")]
    NotAllowed(String),
    /// The forge.
    #[error(transparent)]
    Forge(#[from] ForgeError),
}

/// Looks at the forge and the cluster.
pub(super) async fn gather(
    ctx: &Context,
    pool: &Pool,
    handle: &Arc<PoolHandle>,
    earlier: Option<&ScaleSetStatus>,
) -> Result<Observed, GatherError> {
    let forge = link(ctx, pool, handle, earlier)?;
    if !handle.state().adopted {
        adopt(ctx, pool, handle, &forge).await?;
    }
    follow_jobs(handle, &forge, ctx.now()).await?;
    let mut observed = Observed::default();
    demand(ctx, pool, handle, &forge, &mut observed).await?;
    let refusals = refusals(ctx, pool, handle, &forge).await?;
    pods(ctx, pool, handle, &refusals, &mut observed);
    observed.quota = quota_left(ctx, pool, handle);
    Ok(observed)
}

/// What the quotas of the pool's namespace leave. Pods that the watch has not shown may be missing in what a quota has counted.
fn quota_left(ctx: &Context, pool: &Pool, handle: &PoolHandle) -> Option<Left> {
    let all = ctx.quotas.state();
    let quotas: Vec<_> = all.into_iter().filter(|quota| quota.namespace().as_deref() == Some(&pool.key.namespace)).collect();
    if quotas.is_empty() {
        return None;
    }
    let name = RunnerName::new(&pool.key.name, &pool.uid, [0; 8]);
    let charge = charge(&runner_pod(&pod_request(pool, &name), &ctx.settings.pods));
    handle.state().charge = charge.clone();
    let mut coming = Charge::new();
    for neighbour in ctx.registry.all().iter().filter(|neighbour| neighbour.key.namespace == pool.key.namespace) {
        let state = neighbour.state();
        add_times(&mut coming, &state.charge, state.spawned.values().filter(|spawned| !spawned.seen).count());
    }
    left(&quotas, &charge, &coming)
}

/// The pool's forge client; a new one when what it is made from changed.
pub(super) fn link(
    ctx: &Context,
    pool: &Pool,
    handle: &PoolHandle,
    earlier: Option<&ScaleSetStatus>,
) -> Result<Arc<dyn Forge>, GatherError> {
    // A name is checked when it is resolved, at every connection.
    if let Some(why) = pool.hosts.iter().find_map(|host| refused(host, no_forge_at)) {
        return Err(GatherError::Forge(ForgeError::Unreachable(why)));
    }
    let credential = match &pool.source {
        Source::Gitea { token, .. } => github::Credential::Token(secret(ctx, pool, token, "forge.gitea.tokenSecretRef")?),
        Source::GitHub { credential, .. } | Source::JustInTime { credential, .. } => match credential {
            GitHubCredential::Token(token) => github::Credential::Token(secret(ctx, pool, token, "forge.github.tokenSecretRef")?),
            GitHubCredential::App { client_id, installation_id, key } => github::Credential::App {
                client_id: client_id.clone(),
                installation_id: *installation_id,
                key: secret(ctx, pool, key, "forge.github.app.privateKeySecretRef")?,
            },
        },
    };
    let webhook_secret = match &pool.webhook_secret {
        Some(reference) => Some(secret(ctx, pool, reference, pool.source.webhook_secret_field())?),
        None => None,
    };
    let mut state = handle.state();
    state.webhook_secret = webhook_secret;
    // One that was made before goes on with a secret that was rotated.
    if let Some(link) = state.link.as_mut().filter(|link| link.source == pool.source && link.url == pool.url) {
        if link.credential == credential {
            return Ok(link.forge.clone());
        }
        if let Some(scale_set) = &link.scale_set {
            scale_set.renew(credential.clone());
            link.credential = credential;
            return Ok(link.forge.clone());
        }
        if let Some(just_in_time) = &link.just_in_time {
            just_in_time.renew(credential.clone());
            link.credential = credential;
            return Ok(link.forge.clone());
        }
    }
    let (mut scale_set, mut just_in_time) = (None, None);
    let forge: Arc<dyn Forge> = match &pool.source {
        Source::Gitea { scope, .. } => ctx.giteas.get(&ctx.http, &pool.url, scope, credential.secret()),
        Source::JustInTime { config, .. } => {
            let made = Arc::new(JustInTime::new(ctx.http.clone(), (**config).clone(), credential.clone(), no_forge_at));
            // What webhooks told before, or of another spec's jobs: it is looked up.
            let known = state.link.as_ref().and_then(|link| link.just_in_time.clone());
            let before = known.map(|known| known.known()).unwrap_or_default();
            before.into_iter().chain(std::mem::take(&mut state.hinted)).for_each(|job| made.hint(job, None));
            just_in_time = Some(made.clone());
            made
        }
        Source::GitHub { config, .. } => {
            let earlier = earlier.map(|set| ScaleSet { id: set.id, name: set.name.clone(), session: set.session_id.clone() });
            let (registry, key) = (Arc::downgrade(&ctx.registry), pool.key.clone());
            let wake = move || {
                if let Some(registry) = registry.upgrade() {
                    registry.tell(key.clone());
                }
            };
            let room = pool.spec.scale.max;
            let (forge, listening) =
                GitHub::new(ctx.http.clone(), (**config).clone(), credential.clone(), no_forge_at, earlier, room, wake);
            ctx.tasks.spawn(listening);
            let forge = Arc::new(forge);
            scale_set = Some(forge.clone());
            forge
        }
    };
    state.link =
        Some(Link { forge: forge.clone(), scale_set, just_in_time, url: pool.url.clone(), source: pool.source.clone(), credential });
    Ok(forge)
}

/// A text from a Secret of the operator's namespace, if that Secret says itself that this pool may use it: whoever may write pools
/// must not be able to have the operator send any Secret anywhere.
fn secret(ctx: &Context, pool: &Pool, reference: &SecretKeyRef, field: &str) -> Result<Secret, GatherError> {
    let namespace = &ctx.settings.cluster.operator_namespace;
    let found: Option<Arc<KubeSecret>> = ctx.secrets.get(&ObjectRef::new(&reference.name).within(namespace));
    let Some(found) = found else {
        return Err(GatherError::Secret(format!("{field}: there is no Secret {} in namespace {namespace}", reference.name)));
    };
    allowed(found.annotations(), pool).map_err(|why| GatherError::NotAllowed(format!("{field}: the Secret {} {why}", reference.name)))?;
    let bytes = found.data.as_ref().and_then(|data| data.get(&reference.key));
    let text = bytes.and_then(|bytes| std::str::from_utf8(&bytes.0).ok()).map(str::trim).filter(|text| !text.is_empty());
    let complaint = || format!("{field}: the Secret {} has no text under the key {}", reference.name, reference.key);
    text.map(Secret::new).ok_or_else(|| GatherError::Secret(complaint()))
}

/// Whether a Secret's annotations allow this pool to use it for its forge.
fn allowed(annotations: &BTreeMap<String, String>, pool: &Pool) -> Result<(), String> {
    let forge = annotations.get(ANNOTATION_FORGE).map(|url| url.trim_end_matches('/'));
    if forge != Some(pool.url.as_str()) {
        return Err(format!("is not meant for {}: it needs the annotation {ANNOTATION_FORGE}: {}", pool.url, pool.url));
    }
    let namespaces = annotations.get(ANNOTATION_POOL_NAMESPACES).map(String::as_str).unwrap_or_default();
    match namespaces.split(',').any(|glob| WildMatch::new(glob.trim()).matches(&pool.key.namespace)) {
        true => Ok(()),
        false => {
            Err(format!("is not for pools of namespace {0}: it needs the annotation {ANNOTATION_POOL_NAMESPACES}: {0}", pool.key.namespace))
        }
    }
}

/// Finds the runners of an earlier process: those with a living pod go on, the others are removed.
async fn adopt(ctx: &Context, pool: &Pool, handle: &PoolHandle, forge: &Arc<dyn Forge>) -> Result<(), ForgeError> {
    let living: BTreeMap<String, Arc<Pod>> =
        own_pods(ctx, pool).into_iter().filter(|pod| phase(pod) != Phase::Leaving).map(|pod| (pod.name_any(), pod)).collect();
    let just_in_time = handle.state().link.as_ref().and_then(|link| link.just_in_time.clone());
    if let Some(just_in_time) = just_in_time {
        // GitHub lists runners by place, and not all places of an organization are known.
        living.values().filter_map(|pod| marked(pod)).for_each(|job| just_in_time.note_place(&job.key.repository));
    }
    for runner in runners_of_pool(forge, &pool.uid).await? {
        if let Some(pod) = living.get(&runner.name) {
            if let Some(job) = marked(pod) {
                // What the pod says was written by this operator, and by nobody else.
                forge.remember(Job { runner: Some(runner.name.clone()), runner_id: Some(runner.key.id), ..job });
            }
            handle.state().registered.insert(runner.name, Registered::found(runner.key, ctx.now()));
        } else {
            forge.deregister(&runner.key).await?;
            tracing::info!(pool = %pool.key, runner = runner.name, "removed a registration without a pod");
        }
    }
    handle.state().adopted = true;
    Ok(())
}

/// The job that a pod is marked with, as far as the marks say.
fn marked(pod: &Pod) -> Option<Job> {
    let (repository, id) = pod.annotations().get(ANNOTATION_JOB)?.rsplit_once('#')?;
    let run = pod.annotations().get(ANNOTATION_WORKFLOW).and_then(|workflow| workflow.split('/').next()?.parse().ok());
    Some(Job {
        key: JobKey { repository: Repository::parse(repository)?, id: JobId::parse(id)? },
        run: run.unwrap_or_default(),
        state: JobState::InProgress,
        labels: Vec::new(),
        runner: None,
        runner_id: None,
    })
}

/// Every runner at the forge whose name says that it is this pool's.
pub(crate) async fn runners_of_pool(forge: &Arc<dyn Forge>, pool_uid: &str) -> Result<Vec<RegisteredRunner>, ForgeError> {
    Ok(forge.runners().await?.into_iter().filter(|runner| RunnerName::is_of_pool(&runner.name, pool_uid)).collect())
}

/// Brings the jobs of registered runners up to date.
async fn follow_jobs(handle: &PoolHandle, forge: &Arc<dyn Forge>, now: Timestamp) -> Result<(), ForgeError> {
    let (hinted, any) = {
        let mut state = handle.state();
        let hinted: Vec<JobKey> = std::mem::take(&mut state.hinted).into_iter().chain(forge.news()).collect();
        (hinted, state.registered.values().any(|runner| !runner.done))
    };
    if !any {
        return Ok(());
    }
    // In progress first, queued after (see `demand`): a job that moves in between is in neither list, never in both.
    let mut jobs = forge.jobs(JobState::InProgress).await?;
    let running: Vec<JobKey> = jobs.iter().map(|job| job.key.clone()).collect();
    let lost: Vec<JobKey> = {
        let state = handle.state();
        let known = state.registered.values().filter(|r| !r.done).filter_map(|r| r.job.as_ref().map(|(job, _)| job.clone()));
        known.chain(hinted).filter(|job| !running.contains(job)).collect()
    };
    for key in lost {
        match forge.job(&key).await? {
            Some(job) => jobs.push(job),
            None => finish(&mut handle.state(), &key, None),
        }
    }
    let mut state = handle.state();
    for job in jobs {
        match job.state {
            JobState::InProgress => {
                if let Some(runner) = job.runner.as_ref().and_then(|name| state.registered.get_mut(name)) {
                    runner.job.get_or_insert_with(|| (job.key.clone(), now));
                    state.running.insert(job.key.clone(), job);
                }
            }
            JobState::Completed => finish(&mut state, &job.key, job.runner_id),
            // It lost its runner and waits again (a re-run): the runner's part is over.
            JobState::Queued | JobState::Blocked => finish(&mut state, &job.key, None),
        }
    }
    Ok(())
}

/// The job is over: so is the runner that has it, or had it unseen.
fn finish(state: &mut PoolState, job: &JobKey, runner_id: Option<u64>) {
    for runner in state.registered.values_mut() {
        let has_it = runner.job.as_ref().is_some_and(|(key, _)| key == job);
        let had_it =
            runner_id == Some(runner.key.id) && runner.key.repository.as_ref().is_none_or(|repository| *repository == job.repository);
        runner.done |= has_it || had_it;
    }
}

/// Which waiting jobs this pool owes a runner.
async fn demand(
    ctx: &Context,
    pool: &Pool,
    handle: &PoolHandle,
    forge: &Arc<dyn Forge>,
    observed: &mut Observed,
) -> Result<(), ForgeError> {
    let enough = (pool.spec.scale.max as usize) + WAITING_TOLD;
    let older: Vec<Arc<Pool>> = ctx.pools_before(pool).into_iter().filter(|other| other.may_overlap(pool)).collect();
    observed.overlaps = older.iter().map(|other| other.key.to_string()).collect();
    observed.overlaps.sort();
    for job in forge.jobs(JobState::Queued).await? {
        let fits = pool.rules.check_job(&job);
        if fits.is_ok() && observed.queued.len() >= enough {
            observed.beyond += 1;
            continue;
        }
        let decision = match fits {
            Ok(()) => match run_of(handle, forge, &job.key.repository, job.run).await? {
                Some(run) => decide(pool, &older, &job, &run),
                None => continue,
            },
            Err(refusal) => Err(refusal),
        };
        match decision {
            Ok(()) => observed.queued.push(OwedJob { reach: forge.reach(&job), key: Some(job.key) }),
            Err(refusal) if observed.waiting.len() < WAITING_TOLD => {
                observed.waiting.push(WaitingJob { job: job.key.to_string(), reason: refusal.reason.to_owned(), message: refusal.message })
            }
            Err(_) => {}
        }
    }
    let accepted: Vec<JobKey> = observed.queued.iter().filter_map(|job| job.key.clone()).collect();
    forge.claim(&accepted).await?;
    // Whether the pool accepts them is decided when a runner has one.
    let room = enough.saturating_sub(observed.queued.len());
    let unnamed = forge.unnamed() as usize;
    observed.queued.extend(std::iter::repeat_n(OwedJob { key: None, reach: Reach::default() }, unnamed.min(room)));
    observed.beyond += unnamed.saturating_sub(room);
    Ok(())
}

fn decide(pool: &Pool, older: &[Arc<Pool>], job: &Job, run: &Run) -> Result<(), Refusal> {
    pool.rules.check_run(run)?;
    let first = older.iter().find(|other| other.scope_covers(&pool.url, &job.key.repository) && other.rules.check(job, run).is_ok());
    match first {
        Some(other) => {
            let message = format!("RunnerPool {} is older and accepts this job as well", other.key);
            Err(Refusal { reason: "ServedByOlderPool", message })
        }
        None => Ok(()),
    }
}

/// Facts about a run, asked once. `None` where the run is gone.
async fn run_of(handle: &PoolHandle, forge: &Arc<dyn Forge>, repository: &Repository, run: u64) -> Result<Option<Run>, ForgeError> {
    let key = (repository.clone(), run);
    if let Some(known) = handle.state().runs.get(&key).cloned() {
        return Ok(Some(known));
    }
    let facts = match forge.run(repository, run).await {
        Ok(facts) => facts,
        Err(ForgeError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut state = handle.state();
    if state.runs.len() >= RUNS_KEPT {
        state.runs.clear();
    }
    state.runs.insert(key, facts.clone());
    Ok(Some(facts))
}

/// The pool's pods in the watch cache.
pub(crate) fn own_pods(ctx: &Context, pool: &Pool) -> Vec<Arc<Pod>> {
    let own = |pod: &Pod| {
        pod.namespace().as_deref() == Some(&pool.key.namespace)
            && pod.labels().get(LABEL_POOL) == Some(&pool.key.name)
            && pod.owner_references().iter().any(|owner| owner.uid == pool.uid)
    };
    ctx.pods.state().into_iter().filter(|pod| own(pod)).collect()
}

/// What the cluster alone says: for a pass in which the forge does not answer.
pub(super) fn gather_blind(ctx: &Context, pool: &Pool, handle: &PoolHandle) -> Observed {
    let mut observed = Observed::default();
    pods(ctx, pool, handle, &BTreeMap::new(), &mut observed);
    observed
}

/// What each pod is.
fn pods(ctx: &Context, pool: &Pool, handle: &PoolHandle, refusals: &BTreeMap<JobKey, Refusal>, observed: &mut Observed) {
    let now = ctx.now();
    let (living, wanted) = (own_pods(ctx, pool), LazyCell::new(|| ctx.needs_claims(pool)));
    let mut state = handle.state();
    let state = &mut *state;
    // A deletion that came to nothing is tried again.
    state.deleted.retain(|_, at| now.duration_since(*at) < WATCH_LAG);
    for pod in &living {
        let name = pod.name_any();
        if let Some(spawned) = state.spawned.get_mut(&name) {
            spawned.seen = true;
        }
        let role = role_of(state, &name, refusals);
        if let Role::Busy { job, refused: None, .. } = &role
            && !pod.annotations().contains_key(ANNOTATION_JOB)
        {
            let run = state.running.get(job).and_then(|found| Some((found.run, state.runs.get(&(job.repository.clone(), found.run))?)));
            let workflow = run.map(|(id, run)| format!("{id}/{}@{}", run.workflow, run.git_ref)).unwrap_or_default();
            let (pod, uid) = (name.clone(), pod.uid().unwrap_or_default());
            observed.unmarked.push(Unmarked { pod, uid, job: job.clone(), workflow });
        }
        if matches!(&role, Role::Busy { refused: None, .. }) && pod.annotations().contains_key(ANNOTATION_JOB) {
            observed.accepted.push(name.clone());
        }
        if let Role::Busy { job, refused: None, .. } = &role
            && let Some(job) = state.running.get(job)
            && !pod.annotations().contains_key(ANNOTATION_JOB_CLAIMS)
            && *wanted
        {
            observed.unclaimed.push((name.clone(), pod.uid().unwrap_or_default(), job.clone()));
        }
        let registered = state.registered.get(&name).map(|runner| runner.since);
        let unproved = state.unproved(&name, registered, now);
        let uid = pod.uid().unwrap_or_default();
        let phase = if state.deleted.contains_key(&uid) { Phase::Leaving } else { phase(pod) };
        observed.pods.push(PodFacts {
            unproved,
            node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
            only_on: state.spawned.get(&name).and_then(|spawned| Some(spawned.only_on.as_ref()?.name.clone())),
            name,
            uid,
            created: pod.creation_timestamp().map_or(now, |time| time.0),
            phase,
            role,
        });
    }
    let exists = |name: &str| living.iter().any(|pod| pod.name_any() == name);
    state.spawned.retain(|name, spawned| {
        let unseen = now.duration_since(spawned.created);
        let lag = !spawned.seen && unseen < WATCH_LAG;
        if lag && unseen > WATCH_DEAF && !spawned.uid.is_empty() && !exists(name) {
            ctx.deaf.tell(now);
        }
        if !exists(name) && lag {
            let role = spawned.registering.clone().map_or(Role::Waiting { ready: false }, Role::Registering);
            let (name, uid, created) = (name.clone(), spawned.uid.clone(), spawned.created);
            let only_on = spawned.only_on.as_ref().map(|node| node.name.clone());
            let phase = Phase::Alive { waits: None };
            observed.pods.push(PodFacts { name, uid, created, phase, role, unproved: None, node: None, only_on });
        }
        exists(name) || lag || spawned.registering.is_some()
    });
    let (spawned, proofs) = (&state.spawned, &mut state.proofs);
    proofs.retain(|name, _| exists(name) || spawned.contains_key(name));
    state.claimed.retain(|name| exists(name));
    let running = &state.running;
    state.registered.retain(|name, runner| {
        if !exists(name) && !runner.done {
            let job = runner.job.as_ref().and_then(|(key, _)| running.get(key).cloned());
            observed.orphans.push(Orphan { key: runner.key.clone(), lost: job.zip(runner.credential.clone()) });
        }
        exists(name)
    });
    let kept: Vec<JobKey> = state.registered.values().filter_map(|r| r.job.as_ref().map(|(job, _)| job.clone())).collect();
    state.running.retain(|job, _| kept.contains(job));
}

/// Which running jobs the pool does not accept, and why. A job of which nothing can be learned is not accepted, unless an earlier process
/// accepted it, which its pod says.
async fn refusals(
    ctx: &Context,
    pool: &Pool,
    handle: &PoolHandle,
    forge: &Arc<dyn Forge>,
) -> Result<BTreeMap<JobKey, Refusal>, ForgeError> {
    let running: Vec<(JobKey, Option<Job>)> = {
        let state = handle.state();
        let jobs = state.registered.values().filter(|runner| !runner.done).filter_map(|runner| runner.job.as_ref());
        jobs.map(|(key, _)| (key.clone(), state.running.get(key).cloned())).collect()
    };
    let mut refusals = BTreeMap::new();
    if running.is_empty() {
        return Ok(refusals);
    }
    let accepted: Vec<JobKey> = own_pods(ctx, pool).iter().filter_map(|pod| marked(pod)).map(|job| job.key).collect();
    for (key, job) in running {
        let known = job.as_ref().is_some_and(|job| !job.labels.is_empty());
        if !known && accepted.contains(&key) {
            continue;
        }
        let facts = match job {
            Some(job) => run_of(handle, forge, &key.repository, job.run).await?.map(|run| (job, run)),
            None => None,
        };
        let decision = match facts {
            Some((job, run)) => pool.rules.check(&job, &run),
            None => Err(Refusal { reason: "RunUnknown", message: "the forge does not say what the job is about".to_owned() }),
        };
        if let Err(refusal) = decision {
            refusals.insert(key, refusal);
        }
    }
    Ok(refusals)
}

fn role_of(state: &PoolState, name: &str, refusals: &BTreeMap<JobKey, Refusal>) -> Role {
    if let Some(runner) = state.registered.get(name) {
        return match &runner.job {
            _ if runner.done => Role::Done,
            Some((job, since)) => Role::Busy { job: job.clone(), since: *since, refused: refusals.get(job).cloned() },
            None => Role::Idle { since: runner.since, meant_for: runner.meant_for.clone(), paused: runner.paused, lost: runner.lost },
        };
    }
    match state.spawned.get(name) {
        Some(spawned) => match (&spawned.burnt, &spawned.registering) {
            (Some(why), _) => Role::Burnt(why.clone()),
            (None, Some(job)) => Role::Registering(job.clone()),
            (None, None) => Role::Waiting { ready: spawned.asked.is_some() },
        },
        // Before the forge was searched, nobody can say whether it has a registration.
        None if !state.adopted => Role::Unknown,
        None => Role::Stray,
    }
}
