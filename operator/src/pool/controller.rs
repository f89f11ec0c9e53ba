//! The controller: one pass over a pool is gather, plan, apply, status; this file says when a pass happens.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt, Stream, StreamExt};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Node, Pod, ResourceQuota, Secret};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::runtime::controller::{Action, Config, Controller};
use kube::runtime::finalizer::{Event, finalizer};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher;
use kube::{Api, Resource, ResourceExt};
use mayfly_crds::conditions::reasons;
use mayfly_crds::names::FINALIZER_REGISTRATIONS;
use mayfly_crds::{CredentialBinding, JobIssuer, RunnerPool, RunnerPoolStatus, WaitingJob};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::apply::{self, apply};
use super::dialects::Dialects;
use super::gather::{self, gather};
use super::nodes::pool_nodes;
use super::plan::{Input, Plan, Role, plan, plan_blind};
use super::proof;
use super::registry::{Deaf, PoolHandle, PoolKey, Pools};
use super::room::{self, Facts};
use super::status::{self, Outcome, UserNamespaces, status};
use super::validate::{Pool, Source, Validated, validate};
use crate::audit::{self, Audit};
use crate::cli::Settings;
use crate::forge::ForgeError;
use crate::forge::gitea::Giteas;
use crate::gc;
use crate::isolation::{Controls, Names};
use crate::issuer::Issuer;
use crate::kube_io::KubeIo;
use crate::runner::{Phase, phase};
use crate::runtime::metrics::Metrics;

/// A RunnerPool that may be malformed.
pub(crate) type Guarded = DeserializeGuard<RunnerPool>;

/// Passes at the same time.
const CONCURRENCY: usize = 32;
/// The controller's own limit, which [`Turns`] stands in for.
const UNLIMITED: u16 = 0;
/// While a runner is registered and no webhook is set up, the forge is asked this often.
const POLL_BUSY: Duration = Duration::from_secs(2);
/// After a pass that failed.
const RETRY: Duration = Duration::from_secs(5);
/// A pool that is deleted is not held back longer by a forge that does not answer.
const FINALIZER_DEADLINE: SignedDuration = SignedDuration::from_secs(60);
/// Nor by a Secret that is missing: it is often deleted together with the pool.
const FINALIZER_DEADLINE_SECRET: SignedDuration = SignedDuration::from_secs(5);

/// Everything a pass needs.
pub(crate) struct Context {
    pub(crate) settings: Settings,
    pub(crate) io: KubeIo,
    pub(crate) http: reqwest::Client,
    pub(crate) giteas: Giteas,
    pub(crate) metrics: Metrics,
    pub(crate) registry: Arc<Pools>,
    pub(crate) pools: Store<Guarded>,
    /// What became of them.
    pub(crate) validated: Validated,
    pub(crate) pods: Store<Pod>,
    /// To be told when the watch of pods hears nothing.
    pub(crate) deaf: Arc<Deaf>,
    pub(crate) secrets: Store<Secret>,
    pub(crate) policies: Store<NetworkPolicy>,
    /// `None` where there is no broker.
    pub(crate) bindings: Option<Store<DeserializeGuard<CredentialBinding>>>,
    pub(crate) dialects: Arc<Dialects>,
    pub(crate) nodes: Store<Node>,
    /// Of the whole cluster; those that bring network plugins are of interest.
    pub(crate) daemon_sets: Store<DaemonSet>,
    /// Of every namespace: pools may be in any.
    pub(crate) quotas: Store<ResourceQuota>,
    /// Endpoints of the API server.
    pub(crate) api_endpoints: Store<EndpointSlice>,
    pub(crate) controls: Controls,
    /// With which jobs get tokens whose forge gives none; `None` where the operator has no address for it.
    pub(crate) issuer: Option<Arc<Issuer>>,
    pub(crate) names: Names,
    pub(crate) tasks: TaskTracker,
    pub(crate) audit: Audit,
}

impl Context {
    /// Something that happened to what is a pool's, for [`Self::record`] or to be written first.
    pub(crate) fn event(&self, action: audit::Action, pool: &PoolKey, target: Value) -> audit::Event {
        audit::Event::of_controller(self.io.instance(), action, &pool.namespace, Some(&pool.name), target)
    }

    /// Has it recorded; nobody waits.
    pub(crate) fn record(&self, event: audit::Event) {
        let audit = self.audit.clone();
        self.tasks.spawn(async move { audit.tell(&event).await });
    }

    /// The time. The only place in this room that asks for it.
    pub(crate) fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    /// Pools that are served before this one.
    pub(super) fn pools_before(&self, pool: &Pool) -> Vec<Arc<Pool>> {
        let mut others = self.valid_pools();
        others.retain(|other| other.uid != pool.uid && other.goes_before(pool));
        others
    }

    /// Pools that are served.
    pub(super) fn valid_pools(&self) -> Vec<Arc<Pool>> {
        self.validated.of(&self.pools.state())
    }

    /// Whether somebody has to know what the jobs of this pool are: who issues their tokens, or the broker, for a binding that names it.
    pub(super) fn needs_claims(&self, pool: &Pool) -> bool {
        match pool.source {
            Source::Gitea { .. } => self.issuer_for(pool).is_some(),
            Source::GitHub { .. } | Source::JustInTime { .. } => self.has_bindings(&pool.key),
        }
    }

    fn has_bindings(&self, pool: &PoolKey) -> bool {
        let all = self.bindings.as_ref().map(Store::state).unwrap_or_default();
        let own = all.iter().filter(|binding| binding.namespace().as_deref() == Some(&pool.namespace));
        own.filter_map(|binding| binding.0.as_ref().ok()).any(|binding| binding.spec.pools.contains(&pool.name))
    }

    /// The issuer of the tokens of this pool's jobs, where that is Mayfly.
    pub(super) fn issuer_for(&self, pool: &Pool) -> Option<&Arc<Issuer>> {
        self.issuer.as_ref().filter(|_| pool.spec.job_identity.issuer == JobIssuer::Mayfly)
    }

    /// What the schedulable nodes say of user namespaces.
    pub(crate) fn user_namespaces(&self) -> UserNamespaces {
        let mut users = UserNamespaces { lacking: Vec::new(), supporting: 0 };
        for node in self.nodes.state() {
            if node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true) {
                continue;
            }
            let handlers = node.status.iter().flat_map(|status| status.runtime_handlers.iter().flatten());
            let supports = handlers
                .filter(|handler| handler.name.as_deref().unwrap_or_default().is_empty())
                .any(|handler| handler.features.as_ref().and_then(|f| f.user_namespaces) == Some(true));
            match supports {
                true => users.supporting += 1,
                false => users.lacking.push(node.name_any()),
            }
        }
        users.lacking.sort();
        users
    }
}

/// Why a pass failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The finalizer could not be set or removed, or the clean-up behind it failed.
    #[error("finalizer: {0}")]
    Finalizer(String),
    /// A cluster write failed.
    #[error(transparent)]
    Write(#[from] crate::kube_io::WriteError),
    /// The pool is going, and something of it in the cluster is still there.
    #[error("still there: {0}")]
    PodsLeft(String),
    /// The pool is going, and the forge cannot be asked for its registrations.
    #[error("registrations: {0}")]
    RegistrationsLeft(gather::GatherError),
}

/// Runs until `stop`. `wakes` are pools to look at soon.
pub(crate) async fn run(
    ctx: Arc<Context>,
    pools: Store<Guarded>,
    stream: impl Stream<Item = Result<Guarded, watcher::Error>> + Send + 'static,
    wakes: impl Stream<Item = PoolKey> + Send + 'static,
    stop: CancellationToken,
) {
    let wakes = wakes.map(|key| ObjectRef::<Guarded>::new_with(&key.name, ()).within(&key.namespace));
    let turns = Turns::new(CONCURRENCY);
    let waiting = turns.clone();
    let stopped = async move {
        stop.cancelled().await;
        waiting.end();
    };
    Controller::for_stream(stream, pools)
        .with_config(Config::default().concurrency(UNLIMITED))
        .reconcile_on(wakes)
        .graceful_shutdown_on(stopped)
        .run(move |pool, ctx| turns.clone().take(reconcile(pool, ctx)), |pool, error, ctx| on_error(&pool, error, &ctx), ctx)
        .for_each(|result| async move {
            if let Err(error) = result {
                tracing::debug!(%error, "pass");
            }
        })
        .await;
}

/// So many passes at the same time, in the order in which they came due. (The controller's own limit goes by the order of a hash table: where
/// there is always one that is due, some would never have their turn.)
#[derive(Clone)]
struct Turns(Arc<Semaphore>);

impl Turns {
    fn new(at_once: usize) -> Self {
        Self(Arc::new(Semaphore::new(at_once)))
    }

    /// When it is its turn.
    async fn take(self, pass: impl Future<Output = Result<Action, Error>>) -> Result<Action, Error> {
        match self.0.acquire().await {
            Ok(_turn) => pass.await,
            Err(_) => Ok(Action::await_change()),
        }
    }

    /// Those that wait go; those that run go on.
    fn end(&self) {
        self.0.close();
    }
}

fn on_error(pool: &Guarded, error: &Error, ctx: &Context) -> Action {
    ctx.metrics.pass("failed");
    tracing::warn!(pool = %key_of(pool), %error, "a pass failed; it is repeated");
    Action::requeue(match error {
        Error::PodsLeft(_) => Duration::from_millis(500),
        Error::Finalizer(_) | Error::Write(_) | Error::RegistrationsLeft(_) => RETRY,
    })
}

fn key_of(pool: &impl ResourceExt) -> PoolKey {
    PoolKey { namespace: pool.namespace().unwrap_or_default(), name: pool.name_any() }
}

async fn reconcile(guarded: Arc<Guarded>, ctx: Arc<Context>) -> Result<Action, Error> {
    let key = key_of(&*guarded);
    let api: Api<PartialObjectMeta<RunnerPool>> = Api::namespaced(ctx.io.client(), &key.namespace);
    let meta = PartialObjectMeta { types: None, metadata: guarded.meta().clone(), _phantom: std::marker::PhantomData };
    let (pool, context) = (&guarded, &ctx);
    let held = guarded.finalizers().iter().any(|finalizer| finalizer == FINALIZER_REGISTRATIONS);
    if !held && !is_valid(&guarded) {
        // Nothing was ever registered for it. A finalizer could not be taken off again: the API server refuses every change of an
        // object that breaks its rules.
        return match guarded.meta().deletion_timestamp {
            None => serve(pool, context).boxed().await,
            Some(_) => Ok(Action::await_change()),
        };
    }
    let result = finalizer(&api, FINALIZER_REGISTRATIONS, Arc::new(meta), |event| async move {
        match event {
            Event::Apply(_) => serve(pool, context).boxed().await,
            Event::Cleanup(_) => clean_up(pool, context).boxed().await,
        }
    })
    .await;
    ctx.metrics.pass("done");
    match result {
        Ok(action) => Ok(action),
        Err(kube::runtime::finalizer::Error::ApplyFailed(error) | kube::runtime::finalizer::Error::CleanupFailed(error)) => Err(error),
        Err(other) => {
            if guarded.meta().deletion_timestamp.is_some() {
                let note = format!("everything of the pool is gone, and its finalizer cannot be removed; is its spec valid? {other}");
                ctx.io.warn(&guarded.object_ref(&()), "FinalizerRefused", "Finalize", &note).await;
            }
            Err(Error::Finalizer(other.to_string()))
        }
    }
}

fn is_valid(guarded: &Guarded) -> bool {
    guarded.0.as_ref().is_ok_and(|pool| validate(pool).is_ok())
}

/// One pass over a pool that is there to stay.
async fn serve(guarded: &Guarded, ctx: &Arc<Context>) -> Result<Action, Error> {
    let meta = guarded.meta();
    let handle = ctx.registry.open(&key_of(guarded), meta.uid.as_deref().unwrap_or_default());
    let (stored, valid) = match &guarded.0 {
        Ok(pool) => (pool.status.clone().unwrap_or_default(), validate(pool)),
        Err(invalid) => (RunnerPoolStatus::default(), Err(format!("the object cannot be read: {}", invalid.error))),
    };
    record_spec(ctx, guarded, &handle, stored.observed_generation);
    // Of an invalid pool as well: what was told while it is one is not what a later pass is for.
    let told_at = handle.take_told();
    let pool = match valid {
        Ok(pool) => pool,
        Err(why) => {
            handle.state().probing = false;
            // Jobs that run go on; what is over goes. A pod's end wakes the pool.
            let over: Vec<Arc<Pod>> =
                pods_of(ctx, &handle.uid).into_iter().filter(|pod| matches!(phase(pod), Phase::Over { .. })).collect();
            apply::delete_all(ctx, &handle.key.namespace, &over).await;
            return match report(ctx, &handle, None, meta.generation, &stored, &Outcome::Invalid(&why)).await {
                // It is so malformed that it cannot even be told so in its status.
                Err(Error::Write(refused)) if refused.is_invalid() => {
                    ctx.io.warn(&guarded.object_ref(&()), reasons::INVALID, "Validate", &why).await;
                    Ok(Action::await_change())
                }
                Err(error) => Err(error),
                Ok(_) => Ok(Action::await_change()),
            };
        }
    };
    {
        let nodes = pool_nodes(&ctx.nodes.state(), &ctx.daemon_sets.state(), &pool.spec.runner);
        let mut state = handle.state();
        state.told_at = told_at;
        state.enforcement = pool.spec.isolation.enforcement;
        state.job_issuer = pool.spec.job_identity.issuer;
        state.nodes = nodes;
        state.adopt_isolation(&stored.isolation, ctx.now());
        state.names = ctx.dialects.names();
    }
    let observed = match gather(ctx, &pool, &handle, stored.scale_set.as_ref()).await {
        Ok(observed) => observed,
        Err(error) => {
            ctx.metrics.forge_error(match &error {
                gather::GatherError::Secret(_) | gather::GatherError::NotAllowed(_) => "secret",
                gather::GatherError::Forge(error) => error.category(),
            });
            tidy_blind(ctx, &pool, &handle).await;
            report(ctx, &handle, Some(&pool), pool.generation, &stored, &Outcome::Blind(&error)).await?;
            return Ok(Action::requeue(RETRY));
        }
    };
    if let Err(why) = apply::prepare(ctx, &pool, &handle).await {
        // Without its policies no pod is made; pods that run go on, and those that are over go.
        tidy_blind(ctx, &pool, &handle).await;
        report(ctx, &handle, Some(&pool), pool.generation, &stored, &Outcome::Unprepared(&why)).await?;
        return Ok(Action::requeue(RETRY));
    }
    let plan = plan(&input(ctx, &pool, &handle, &observed, proof::wanted(ctx, &handle)));
    {
        let mut state = handle.state();
        state.short_since = (plan.beyond_quota > 0).then(|| state.short_since.unwrap_or_else(|| ctx.now()));
    }
    let forge = handle.state().link.as_ref().map(|link| link.forge.clone());
    if let Some(forge) = forge {
        forge.note_room(jobs_at_once(ctx, &pool, &handle, &observed));
        apply(ctx, &pool, &handle, &forge, &observed, &plan).await;
        gc::sweep_if_due(ctx, &pool, &handle, &forge);
        tell_refused(ctx, &pool, &handle, &observed).await;
    }
    let written = report(ctx, &handle, Some(&pool), pool.generation, &stored, &Outcome::Planned(&observed, &plan)).await?;
    Ok(next(ctx, &pool, &handle, &observed, &plan, written))
}

/// Records a spec that is new, once, whether it is sound or not; `stored` is the generation that an earlier process told of.
fn record_spec(ctx: &Context, guarded: &Guarded, handle: &PoolHandle, stored: Option<i64>) {
    let Some(generation) = guarded.meta().generation else { return };
    let before = handle.state().recorded.replace(generation).or(stored);
    let news = audit::of_spec(before, generation, audit::Action::PoolCreated, audit::Action::PoolChanged);
    let Some(action) = news else { return };
    let spec = guarded.0.as_ref().ok().map(|pool| &pool.spec);
    let payload = json!({"generation": generation, "spec": spec});
    ctx.record(ctx.event(action, &handle.key, of_pool(handle)).about(payload, spec.is_some()));
}

/// A pool, as records name it.
fn of_pool(handle: &PoolHandle) -> Value {
    json!({"kind": "RunnerPool", "name": handle.key.name, "uid": handle.uid})
}

/// How many jobs the pool can have at the same time.
fn jobs_at_once(ctx: &Context, pool: &Pool, handle: &PoolHandle, observed: &gather::Observed) -> u32 {
    room::jobs_at_once(&Facts {
        now: ctx.now(),
        max: pool.spec.scale.max,
        start_failures: handle.state().start_failures,
        queued: observed.queued.len(),
        refused: observed.waiting.len(),
        pods: &observed.pods,
        quota: observed.quota.as_ref(),
    })
}

/// Tells once of each job that GitHub gave to the pool's scale set and that the pool does not serve: nobody else will. A Gitea pool sees
/// the jobs of other pools as well, and tells of them in its status alone.
async fn tell_refused(ctx: &Context, pool: &Pool, handle: &PoolHandle, observed: &gather::Observed) {
    if !matches!(pool.source, Source::GitHub { .. }) {
        return;
    }
    let news: Vec<&WaitingJob> = {
        let mut state = handle.state();
        let waiting: BTreeSet<String> = observed.waiting.iter().map(|job| job.job.clone()).collect();
        state.told.retain(|job| waiting.contains(job));
        observed.waiting.iter().filter(|job| state.told.insert(job.job.clone())).collect()
    };
    let reference = apply::reference_to(&pool.key, &pool.uid);
    for job in news {
        let payload = json!({"reason": job.reason, "message": job.message});
        ctx.record(ctx.event(audit::Action::JobRefused, &pool.key, json!({"kind": "Job", "name": job.job})).about(payload, false));
        ctx.io.warn(&reference, "JobNotServed", "Refuse", &format!("{}: {}: {}", job.job, job.reason, job.message)).await;
    }
}

/// Local clean-up does not wait for anybody else.
async fn tidy_blind(ctx: &Arc<Context>, pool: &Pool, handle: &Arc<PoolHandle>) {
    let observed = gather::gather_blind(ctx, pool, handle);
    let plan = plan_blind(&input(ctx, pool, handle, &observed, Vec::new()));
    {
        let mut state = handle.state();
        // Nothing is registered until the forge was seen again, and what lost its pod meanwhile is left to a sweep then.
        state.owed.clear();
        state.probing = false;
        if !observed.orphans.is_empty() {
            state.next_sweep = None;
        }
    }
    apply::apply_blind(ctx, pool, handle, &plan).await;
}

fn input(ctx: &Context, pool: &Pool, handle: &PoolHandle, observed: &gather::Observed, probe: Vec<String>) -> Input {
    Input {
        now: ctx.now(),
        max: pool.spec.scale.max,
        warm: pool.spec.scale.warm,
        probe,
        deadlines: pool.deadlines,
        queued: observed.queued.clone(),
        pods: observed.pods.clone(),
        quota: observed.quota.as_ref().map(|left| left.pods),
        not_before: handle.state().not_before,
    }
}

/// When the next pass is due if nothing happens before.
fn next(ctx: &Context, pool: &Pool, handle: &PoolHandle, observed: &gather::Observed, plan: &Plan, written: bool) -> Action {
    let mut wait = ctx.settings.poll_interval;
    let registered = observed.pods.iter().any(|pod| matches!(pod.role, Role::Idle { .. } | Role::Busy { .. }));
    if registered && pool.webhook_secret.is_none() {
        wait = wait.min(POLL_BUSY);
    }
    // Decisions that only wait for time to pass: a runner that may be needless, a pause, numbers to write.
    if !plan.pause.is_empty() || observed.pods.iter().any(|pod| matches!(pod.role, Role::Idle { .. })) {
        wait = wait.min(POLL_BUSY);
    }
    // Its end is seen at once; that it lasts is told, and what was counted twice is put right.
    if plan.beyond_quota > 0 {
        wait = wait.min(RETRY);
    }
    if !written {
        wait = wait.min(Duration::try_from(status::COUNTS_EVERY).unwrap_or(RETRY));
    }
    if let Some(not_before) = handle.state().not_before {
        let left = not_before.duration_since(ctx.now());
        if left > SignedDuration::ZERO {
            wait = wait.min(Duration::try_from(left).unwrap_or(RETRY));
        }
    }
    Action::requeue(wait)
}

/// Writes the status if it says something new. False where only numbers or waiting jobs changed and it is too early to write them.
async fn report(
    ctx: &Context,
    handle: &PoolHandle,
    pool: Option<&Pool>,
    generation: Option<i64>,
    stored: &RunnerPoolStatus,
    outcome: &Outcome<'_>,
) -> Result<bool, Error> {
    let now = ctx.now();
    let (new, early) = {
        let state = handle.state();
        let issuer = ctx.issuer.as_ref().map(|issuer| issuer.url());
        let new = status(stored, pool, generation, &state, &ctx.user_namespaces(), issuer, outcome, &Time(now));
        let early = state.status_written.is_some_and(|at| now.duration_since(at) < status::COUNTS_EVERY);
        (new, early)
    };
    if new == *stored {
        return Ok(true);
    }
    if early && !status::differs_at_once(&new, stored) {
        return Ok(false);
    }
    let value = serde_json::to_value(&new).unwrap_or_default();
    ctx.io.patch_status::<RunnerPool>(&handle.key.namespace, &handle.key.name, &value).await?;
    handle.state().status_written = Some(now);
    if let Some(closed) = status::newly_closed_hosts(stored, &new) {
        ctx.io.warn(&apply::reference_to(&handle.key, &handle.uid), reasons::ENGINE_CANNOT, "Prepare", closed).await;
    }
    Ok(true)
}

/// The pool is being deleted: pods first, then registrations, then the pool may go.
async fn clean_up(guarded: &Guarded, ctx: &Arc<Context>) -> Result<Action, Error> {
    let key = key_of(guarded);
    let meta = guarded.meta();
    let uid = meta.uid.clone().unwrap_or_default();
    let handle = ctx.registry.open(&key, &uid);
    let registering = {
        let mut state = handle.state();
        state.closing = true;
        state.spawned.values().filter(|pod| pod.registering.is_some() && pod.burnt.is_none()).count()
    };
    handle.jobs_changed();
    if registering > 0 {
        return Err(Error::PodsLeft(format!("{registering} registration(s) being made")));
    }
    let pods = pods_of(ctx, &uid);
    if !apply::delete_all(ctx, &key.namespace, &pods).await {
        return Err(Error::PodsLeft(format!("{} pod(s)", pods.len())));
    }
    let since = meta.deletion_timestamp.as_ref().map_or_else(|| ctx.now(), |time| time.0);
    if let Err(error) = remove_registrations(guarded, ctx, &key, &uid).await {
        let deadline = match error {
            gather::GatherError::Forge(_) => FINALIZER_DEADLINE,
            gather::GatherError::Secret(_) | gather::GatherError::NotAllowed(_) => FINALIZER_DEADLINE_SECRET,
        };
        if ctx.now().duration_since(since) < deadline {
            return Err(Error::RegistrationsLeft(error));
        }
        tracing::warn!(pool = %key, %error, "the pool goes although the forge may still have registrations of its runners");
        let reference = guarded.object_ref(&());
        let note =
            format!("the forge may still have registrations of this pool's runners, which are worthless without their pods: {error}");
        ctx.io.warn(&reference, "RegistrationsLeft", "Finalize", &note).await;
    }
    ctx.record(ctx.event(audit::Action::PoolDeleted, &key, of_pool(&handle)));
    ctx.registry.close(&key);
    Ok(Action::await_change())
}

/// Pods of the pool with this UID, whatever its spec says.
fn pods_of(ctx: &Context, uid: &str) -> Vec<Arc<Pod>> {
    let own = |pod: &Pod| pod.owner_references().iter().any(|owner| owner.uid == uid);
    ctx.pods.state().into_iter().filter(|pod| own(pod)).collect()
}

async fn remove_registrations(guarded: &Guarded, ctx: &Context, key: &PoolKey, uid: &str) -> Result<(), gather::GatherError> {
    let handle = ctx.registry.open(key, uid);
    // A pool that never made sense never registered anything.
    let Some(pool) = guarded.0.as_ref().ok().and_then(|pool| validate(pool).ok()) else { return Ok(()) };
    let known = handle.state().link.as_ref().map(|link| link.forge.clone());
    let earlier = guarded.0.as_ref().ok().and_then(|pool| pool.status.as_ref()?.scale_set.as_ref());
    let forge = match gather::link(ctx, &pool, &handle, earlier) {
        Ok(forge) => forge,
        Err(error) => known.ok_or(error)?,
    };
    let runners = match gather::runners_of_pool(&forge, uid).await {
        // The organization or repository is gone, and with it every registration in it.
        Err(ForgeError::NotFound { .. }) => return Ok(()),
        other => other?,
    };
    for runner in runners {
        forge.deregister(&runner.key).await?;
    }
    forge.retire().await?;
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
