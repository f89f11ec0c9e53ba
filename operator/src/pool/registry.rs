//! What the process remembers of each pool between passes. All of it can be found again from the cluster and the forge
//! (see [`super::gather`]); nothing here is needed to clean up.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use mayfly_crds::{Enforcement, Failure, JobIssuer, NodeIsolation};
use serde::Serialize;
use tokio::sync::{Notify, mpsc};

use super::dialects::Names;
use super::nodes::PoolNode;
use super::proof::PodProof;
use super::room::Charge;
use super::validate::Source;
use crate::forge::github::{self, GitHub, JustInTime};
use crate::forge::{Forge, Job, JobKey, Reach, Repository, Run, RunnerKey, Secret};

/// Most jobs remembered to be looked at; the next pass lists them all anyway. A forge that cannot list them keeps them itself.
const HINTS_KEPT: usize = 1_000;
/// A watch is not begun anew more often than this.
const DEAF_AGAIN: SignedDuration = SignedDuration::from_secs(10);

/// Namespace and name of a RunnerPool.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PoolKey {
    /// Namespace.
    pub(crate) namespace: String,
    /// Name.
    pub(crate) name: String,
}

impl fmt::Display for PoolKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A job that is owed a runner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct OwedJob {
    /// Which job; `None` where the forge tells no more than that there is one.
    pub(crate) key: Option<JobKey>,
    /// Which jobs its runner may take.
    pub(crate) reach: Reach,
}

impl OwedJob {
    /// Whether a runner registered for `other` would take this job as well.
    pub(crate) fn same_runner_as(&self, other: &Self) -> bool {
        self.reach == other.reach
    }
}

impl fmt::Display for OwedJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.key {
            Some(key) => key.fmt(f),
            None => f.write_str("a job that the forge does not name"),
        }
    }
}

/// A pod this process made, which has no registration yet.
#[derive(Clone, Debug)]
pub(crate) struct Spawned {
    /// The pod's UID; empty while the API server has not answered yet.
    pub(crate) uid: String,
    /// When it was made.
    pub(crate) created: Timestamp,
    /// Whether the watch has shown it.
    pub(crate) seen: bool,
    /// When its gate first asked for a registration.
    pub(crate) asked: Option<Timestamp>,
    /// The job for which a registration is being made right now.
    pub(crate) registering: Option<OwedJob>,
    /// The registration failed: the name may be known to the forge, so it is not tried again.
    pub(crate) burnt: Option<String>,
    /// It was made to prove isolation on this node, and runs nowhere else.
    pub(crate) only_on: Option<PoolNode>,
}

/// A runner the forge knows.
#[derive(Clone, Debug)]
pub(crate) struct Registered {
    /// How to name it to the forge.
    pub(crate) key: RunnerKey,
    /// The job it was registered for; it may take another of the same kind. `None` for one found after a restart.
    pub(crate) meant_for: Option<OwedJob>,
    /// When it was registered, or found.
    pub(crate) since: Timestamp,
    /// The job it has, and when that was first seen.
    pub(crate) job: Option<(JobKey, Timestamp)>,
    /// The pool accepts that job, and its pod says so.
    pub(crate) accepted: bool,
    /// When it was kept from taking a job.
    pub(crate) paused: Option<Timestamp>,
    /// Its job is over at the forge, and with it the registration.
    pub(crate) done: bool,
    /// The registration did not arrive at the pod.
    pub(crate) lost: bool,
    /// With which the forge can be told that the runner is lost; known only to the process that registered it.
    pub(crate) credential: Option<Secret>,
}

impl Registered {
    /// One that the forge knows, and of which no more is known yet.
    pub(crate) fn found(key: RunnerKey, since: Timestamp) -> Self {
        Self { key, meant_for: None, since, job: None, accepted: false, paused: None, done: false, lost: false, credential: None }
    }
}

/// The forge of a pool, with the inputs it was made from.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    /// The client.
    pub(crate) forge: Arc<dyn Forge>,
    /// The same, where it is a scale set.
    pub(crate) scale_set: Option<Arc<GitHub>>,
    /// The same, where it is GitHub without a scale set: to be told of what webhooks say.
    pub(crate) just_in_time: Option<Arc<JustInTime>>,
    /// The forge as the pool's Secrets name it.
    pub(crate) url: String,
    /// What it was made from; a change makes a new one.
    pub(crate) source: Source,
    /// With which it is known there.
    pub(crate) credential: github::Credential,
}

/// Everything remembered about one pool.
#[derive(Debug, Default)]
pub(crate) struct PoolState {
    /// The forge, once the pool's token was found.
    pub(crate) link: Option<Link>,
    /// Secret of the webhook.
    pub(crate) webhook_secret: Option<Secret>,
    /// Jobs owed a runner, oldest first.
    pub(crate) owed: VecDeque<OwedJob>,
    /// Pods without a registration, by name.
    pub(crate) spawned: BTreeMap<String, Spawned>,
    /// Runners with a registration, by name.
    pub(crate) registered: BTreeMap<String, Registered>,
    /// When the forge told of what the pass is for that is under way.
    pub(crate) told_at: Option<Instant>,
    /// Jobs that a webhook spoke of since the last pass.
    pub(crate) hinted: BTreeSet<JobKey>,
    /// Jobs that runners of this pool have.
    pub(crate) running: HashMap<JobKey, Job>,
    /// The pool is being deleted: nothing is registered any more.
    pub(crate) closing: bool,
    /// Facts about workflow runs, which do not change.
    pub(crate) runs: HashMap<(Repository, u64), Run>,
    /// Whether runners of an earlier process were looked for.
    pub(crate) adopted: bool,
    /// When the forge is next searched for leftovers.
    pub(crate) next_sweep: Option<Timestamp>,
    /// Starts that failed in a row.
    pub(crate) start_failures: u32,
    /// When the last of them was counted.
    pub(crate) start_failed: Option<Timestamp>,
    /// No pod is created before.
    pub(crate) not_before: Option<Timestamp>,
    /// The last runner that ended other than by finishing its job.
    pub(crate) last_failure: Option<Failure>,
    /// The forge's addresses, and when they were looked up.
    pub(crate) addresses: Option<(Vec<IpAddr>, Timestamp)>,
    /// The forge's addresses and port, as pods reach them.
    pub(crate) forge_endpoints: Vec<SocketAddr>,
    /// Whether the network engine opens host names.
    pub(crate) names: Names,
    /// What a pod has to prove before it is registered.
    pub(crate) enforcement: Enforcement,
    /// Whose tokens the pool's jobs get.
    pub(crate) job_issuer: JobIssuer,
    /// What each pod proved of its isolation.
    pub(crate) proofs: BTreeMap<String, PodProof>,
    /// The nodes that fit the pool.
    pub(crate) nodes: Vec<PoolNode>,
    /// What was last found on each node.
    pub(crate) isolation: BTreeMap<String, NodeIsolation>,
    /// When a runner pod last told what it found on a node, or could not start there, and what the node was like then.
    pub(crate) tried: BTreeMap<String, (Timestamp, String)>,
    /// Pods are made, or wait, for the sake of the proof alone.
    pub(crate) probing: bool,
    /// Policies as last applied: a digest of all, and each one's resource version.
    pub(crate) policies: Option<(String, BTreeMap<String, String>)>,
    /// Pods that are marked with what the tokens of their jobs have to say, or are about to be.
    pub(crate) claimed: BTreeSet<String>,
    /// Jobs that the pool does not serve and that an event told of.
    pub(crate) told: BTreeSet<String>,
    /// What each of its pods is charged with by quotas.
    pub(crate) charge: Charge,
    /// Since when jobs wait because a quota has no room.
    pub(crate) short_since: Option<Timestamp>,
    /// Pods that were deleted, by UID, and when: for a moment the watch shows them as they were.
    pub(crate) deleted: BTreeMap<String, Timestamp>,
    /// Generation of the spec that was last recorded.
    pub(crate) recorded: Option<i64>,
    /// When the status was last written.
    pub(crate) status_written: Option<Timestamp>,
}

impl PoolState {
    /// The policies that stand, in one word that changes whenever one of them does. `None` before they were applied.
    pub(crate) fn policies_mark(&self) -> Option<String> {
        let (digest, versions) = self.policies.as_ref()?;
        Some(versions.iter().fold(digest.clone(), |mark, (name, version)| format!("{mark} {name}={version}")))
    }
}

/// One pool.
#[derive(Debug)]
pub(crate) struct PoolHandle {
    /// Namespace and name.
    pub(crate) key: PoolKey,
    /// UID: a pool made anew under the same name is another pool.
    pub(crate) uid: String,
    state: Mutex<PoolState>,
    changed: Notify,
    /// When the forge first told of something that no pass has looked at yet. Beside the state, as it is told from everywhere.
    told: Mutex<Option<Instant>>,
}

/// Why a gate gets no registration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NoJob {
    /// Nothing is owed right now: ask again.
    NotYet,
    /// The pod has not proved its isolation, or not lately: prove first.
    Unproved,
    /// This pod will never get one.
    Never(&'static str),
}

impl PoolHandle {
    fn new(key: PoolKey, uid: String) -> Self {
        Self { key, uid, state: Mutex::default(), changed: Notify::new(), told: Mutex::default() }
    }

    /// Notes that the forge told of something.
    pub(crate) fn tell(&self) {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(Instant::now);
    }

    /// When the forge told of what this pass is for; `None` where it is for something else.
    pub(crate) fn take_told(&self) -> Option<Instant> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The remembered state. Never held across an `await`.
    pub(crate) fn state(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells waiting gates that the jobs owed have changed.
    pub(crate) fn jobs_changed(&self) {
        self.changed.notify_waiters();
    }

    /// The oldest job owed, for a pod of this process that had none yet; waits up to `patience` for one.
    pub(crate) async fn take_job(&self, pod: &str, uid: &str, now: Timestamp, patience: Duration) -> Result<OwedJob, NoJob> {
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(job) = self.try_take(pod, uid, now)? {
                return Ok(job);
            }
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                return Err(NoJob::NotYet);
            }
        }
    }

    fn try_take(&self, pod: &str, uid: &str, now: Timestamp) -> Result<Option<OwedJob>, NoJob> {
        let mut state = self.state();
        let proved = state.is_proved(pod, now);
        let state = &mut *state;
        if state.closing {
            return Err(NoJob::Never("the pool is being deleted"));
        }
        if let Some(runner) = state.registered.get_mut(pod) {
            // Its gate would not ask again if it had received it: the runner serves nobody and is taken back.
            runner.meant_for = None;
            runner.lost = true;
            return Err(NoJob::Never("this pod already had its registration"));
        }
        let Some(spawned) = state.spawned.get_mut(pod).filter(|spawned| spawned.uid.is_empty() || spawned.uid == uid) else {
            return Err(NoJob::Never("this pod is not waiting for a registration"));
        };
        if spawned.uid.is_empty() {
            return Ok(None);
        }
        if spawned.registering.is_some() || spawned.burnt.is_some() {
            return Err(NoJob::Never("this pod already asked for its registration"));
        }
        if !proved {
            return Err(NoJob::Unproved);
        }
        spawned.asked.get_or_insert(now);
        spawned.registering = state.owed.pop_front();
        Ok(spawned.registering.clone())
    }

    /// Has the next pass look at this job, with these labels where they are known.
    pub(crate) fn hint(&self, job: JobKey, labels: Option<&[String]>) {
        let mut state = self.state();
        if let Some(just_in_time) = state.link.as_ref().and_then(|link| link.just_in_time.clone()) {
            just_in_time.hint(job, labels);
        } else if state.hinted.len() < HINTS_KEPT {
            state.hinted.insert(job);
        }
    }

    /// Has the next pass look at the job that this pod's runner has, or was registered for as long as that is not known.
    pub(crate) fn hint_of(&self, pod: &str) {
        let job = self.state().registered.get(pod).and_then(|runner| {
            let has = runner.job.as_ref().map(|(job, _)| job);
            has.or(runner.meant_for.as_ref().and_then(|owed| owed.key.as_ref())).cloned()
        });
        if let Some(job) = job {
            self.hint(job, None);
        }
    }

    /// The job that this pod's runner has, when the pool has accepted it; waits up to `patience` for that.
    pub(crate) async fn accepted_job(&self, pod: &str, patience: Duration) -> Result<JobKey, NoJob> {
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            match self.state().registered.get(pod) {
                None => return Err(NoJob::Never("this pod has no registration")),
                Some(Registered { accepted: true, job: Some((job, _)), .. }) => return Ok(job.clone()),
                Some(_) => {}
            }
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                return Err(NoJob::NotYet);
            }
        }
    }

    /// The job that this pod's runner has now, accepted and not over, if it may have tokens of Mayfly's. Whoever may fork could write the
    /// code of a fork's job.
    pub(crate) fn job_for_tokens(&self, pod: &str) -> Result<JobKey, NoJob> {
        let state = self.state();
        let runner = state.registered.get(pod).ok_or(NoJob::Never("this pod has no registration"))?;
        if runner.done || runner.lost || state.closing {
            return Err(NoJob::Never("this pod has no job any more"));
        }
        let (key, _) = runner.job.as_ref().filter(|_| runner.accepted).ok_or(NoJob::NotYet)?;
        let run = state.running.get(key).and_then(|job| state.runs.get(&(key.repository.clone(), job.run)));
        match run.ok_or(NoJob::NotYet)?.fork {
            Some(false) => Ok(key.clone()),
            _ => Err(NoJob::Never("the job runs a fork's code, or may do so")),
        }
    }

    /// The pool accepts the job that this pod's runner has, and the pod says so.
    pub(crate) fn job_accepted(&self, pod: &str) {
        if let Some(runner) = self.state().registered.get_mut(pod) {
            runner.accepted = true;
        }
        self.jobs_changed();
    }

    /// The registration was made.
    pub(crate) fn registered(&self, pod: &str, key: RunnerKey, credential: Secret, now: Timestamp) {
        let mut state = self.state();
        let meant_for = state.spawned.remove(pod).and_then(|spawned| spawned.registering);
        let runner = Registered { meant_for, credential: Some(credential), ..Registered::found(key, now) };
        state.registered.insert(pod.to_owned(), runner);
        state.start_failures = 0;
        state.not_before = None;
    }

    /// The registration failed: the job is owed again, the pod is used up.
    pub(crate) fn registration_failed(&self, pod: &str, why: &str) {
        let mut state = self.state();
        let job = state.spawned.get_mut(pod).and_then(|spawned| {
            spawned.burnt = Some(why.to_owned());
            spawned.registering.take()
        });
        if let Some(job) = job {
            state.owed.push_front(job);
        }
    }
}

/// A watch that hears nothing although something happened: a connection of which the other end is gone looks just like a quiet one.
#[derive(Debug, Default)]
pub(crate) struct Deaf {
    notify: Notify,
    told: Mutex<Option<Timestamp>>,
}

impl Deaf {
    /// Has the watch begin anew, unless it did so a moment ago.
    pub(crate) fn tell(&self, now: Timestamp) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_none_or(|at| now.duration_since(at) > DEAF_AGAIN) {
            *told = Some(now);
            self.notify.notify_one();
        }
    }

    /// Waits until somebody says so.
    pub(crate) async fn told(&self) {
        self.notify.notified().await;
    }
}

/// All pools of this process.
#[derive(Debug)]
pub(crate) struct Pools {
    handles: Mutex<HashMap<PoolKey, Arc<PoolHandle>>>,
    wakes: mpsc::UnboundedSender<PoolKey>,
}

impl Pools {
    /// No pools yet. The receiver yields the pools to look at.
    pub(crate) fn new() -> (Self, mpsc::UnboundedReceiver<PoolKey>) {
        let (wakes, receiver) = mpsc::unbounded_channel();
        (Self { handles: Mutex::default(), wakes }, receiver)
    }

    /// The handle of the pool with this UID; a new one where the UID is new.
    pub(crate) fn open(&self, key: &PoolKey, uid: &str) -> Arc<PoolHandle> {
        let mut handles = self.handles();
        match handles.get(key) {
            Some(handle) if handle.uid == uid => handle.clone(),
            _ => {
                let handle = Arc::new(PoolHandle::new(key.clone(), uid.to_owned()));
                handles.insert(key.clone(), handle.clone());
                handle
            }
        }
    }

    /// The handle of a pool that was seen before.
    pub(crate) fn get(&self, key: &PoolKey) -> Option<Arc<PoolHandle>> {
        self.handles().get(key).cloned()
    }

    /// Forgets a pool.
    pub(crate) fn close(&self, key: &PoolKey) {
        self.handles().remove(key);
    }

    /// Has the pool looked at soon, as its forge told of something.
    pub(crate) fn tell(&self, key: PoolKey) {
        if let Some(handle) = self.get(&key) {
            handle.tell();
        }
        self.wake(key);
    }

    /// Has the pool looked at soon.
    pub(crate) fn wake(&self, key: PoolKey) {
        // The receiver lives as long as the process: an error means it is ending.
        let _ = self.wakes.send(key);
    }

    /// Lets go of every forge: sessions are ended, as far as there is time.
    pub(crate) fn let_go(&self) {
        self.all().iter().for_each(|handle| handle.state().link = None);
    }

    /// Every pool, for hints that concern several.
    pub(crate) fn all(&self) -> Vec<Arc<PoolHandle>> {
        self.handles().values().cloned().collect()
    }

    fn handles(&self) -> MutexGuard<'_, HashMap<PoolKey, Arc<PoolHandle>>> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_forge_told_is_for_one_pass() {
        let (pools, mut wakes) = Pools::new();
        let key = PoolKey { namespace: "ci".to_owned(), name: "linux".to_owned() };
        let handle = pools.open(&key, "1");
        pools.wake(key.clone());
        assert_eq!(handle.take_told(), None, "nobody told of anything");
        pools.tell(key.clone());
        let first = handle.take_told();
        assert!(first.is_some());
        assert_eq!(handle.take_told(), None);
        pools.tell(key.clone());
        let second = *handle.told.lock().expect("a time");
        pools.tell(key);
        assert_eq!(handle.take_told(), second, "the first word counts");
        assert_eq!(std::iter::from_fn(|| wakes.try_recv().ok()).count(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn a_deaf_watch_is_told_so_once_in_a_while() {
        let (deaf, second) = (Deaf::default(), Duration::from_secs(1));
        let at = |seconds: i64| Timestamp::from_second(seconds).expect("a time");
        let told = async || tokio::time::timeout(second, deaf.told()).await.is_ok();
        deaf.tell(at(0));
        deaf.tell(at(5));
        assert!(told().await && !told().await, "the second came too early");
        deaf.tell(at(11));
        assert!(told().await);
    }

    fn handle_with_pod() -> PoolHandle {
        let key = PoolKey { namespace: "team".to_owned(), name: "ci".to_owned() };
        let handle = PoolHandle::new(key, "uid".to_owned());
        let created = Timestamp::UNIX_EPOCH;
        let spawned =
            Spawned { uid: "pod-uid".to_owned(), created, seen: false, asked: None, registering: None, burnt: None, only_on: None };
        handle.state().spawned.insert("pod".to_owned(), spawned);
        crate::pool::proof::tests::prove(&mut handle.state(), "pod", created);
        handle
    }

    #[test]
    fn the_job_of_a_runner_that_ended_is_looked_at() {
        let handle = handle_with_pod();
        let hinted = || std::mem::take(&mut handle.state().hinted).into_iter().map(|job| job.id.to_string()).collect::<Vec<_>>();
        let job = |id: u64| JobKey { repository: Repository::parse("acme/web").expect("a repository"), id: id.into() };
        handle.hint_of("pod");
        assert!(hinted().is_empty(), "it is not registered");
        let owed = OwedJob { key: Some(job(7)), reach: Reach::default() };
        handle.state().spawned.get_mut("pod").expect("a pod").registering = Some(owed);
        handle.registered("pod", RunnerKey { repository: None, id: 1 }, Secret::new("x"), Timestamp::UNIX_EPOCH);
        handle.hint_of("pod");
        assert_eq!(hinted(), ["7"], "which it took is not known yet");
        handle.state().registered.get_mut("pod").expect("a runner").job = Some((job(8), Timestamp::UNIX_EPOCH));
        handle.hint_of("pod");
        handle.hint_of("another");
        assert_eq!(hinted(), ["8"]);
    }

    #[test]
    fn only_the_pod_that_has_the_job_gets_its_token() {
        let handle = handle_with_pod();
        let never = |why: &'static str| Err(NoJob::Never(why));
        assert_eq!(handle.job_for_tokens("pod"), never("this pod has no registration"));
        handle.registered("pod", RunnerKey { repository: None, id: 1 }, Secret::new("x"), Timestamp::UNIX_EPOCH);
        assert_eq!(handle.job_for_tokens("pod"), Err(NoJob::NotYet), "it has no job yet");
        let key = JobKey { repository: Repository::parse("acme/web").expect("a repository"), id: 7.into() };
        let job = Job {
            key: key.clone(),
            run: 900,
            state: crate::forge::JobState::InProgress,
            labels: Vec::new(),
            runner: None,
            runner_id: None,
        };
        let change = |change: &dyn Fn(&mut Registered)| change(handle.state().registered.get_mut("pod").expect("a runner"));
        change(&|runner| runner.job = Some((key.clone(), Timestamp::UNIX_EPOCH)));
        handle.state().running.insert(key.clone(), job);
        assert_eq!(handle.job_for_tokens("pod"), Err(NoJob::NotYet), "nobody has accepted it");
        handle.job_accepted("pod");
        assert_eq!(handle.job_for_tokens("pod"), Err(NoJob::NotYet), "nobody knows whose code it runs");
        let run = |fork: Option<bool>| {
            let (event, workflow, git_ref) = ("push".to_owned(), "ci.yml".to_owned(), "refs/heads/main".to_owned());
            handle.state().runs.insert((key.repository.clone(), 900), Run { event, workflow, git_ref, fork, public: None });
        };
        for fork in [None, Some(true)] {
            run(fork);
            assert_eq!(handle.job_for_tokens("pod"), never("the job runs a fork's code, or may do so"));
        }
        run(Some(false));
        assert_eq!(handle.job_for_tokens("pod"), Ok(key.clone()));
        assert_eq!(handle.job_for_tokens("another"), never("this pod has no registration"));
        for end in [|runner: &mut Registered| runner.done = true, |runner: &mut Registered| (runner.done, runner.lost) = (false, true)] {
            change(&end);
            assert_eq!(handle.job_for_tokens("pod"), never("this pod has no job any more"));
        }
        change(&|runner| runner.lost = false);
        handle.state().closing = true;
        assert_eq!(handle.job_for_tokens("pod"), never("this pod has no job any more"));
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_proof_there_is_no_job() {
        let handle = handle_with_pod();
        owe(&handle, 1);
        handle.state().proofs.clear();
        let taken = handle.take_job("pod", "pod-uid", Timestamp::UNIX_EPOCH, Duration::from_secs(1)).await;
        assert_eq!(taken, Err(NoJob::Unproved));
        assert_eq!(handle.state().owed.len(), 1, "the job is still owed");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_is_told_of_its_job_when_it_was_accepted_and_not_before() {
        let (handle, now, second) = (handle_with_pod(), Timestamp::UNIX_EPOCH, Duration::from_secs(1));
        assert!(matches!(handle.accepted_job("pod", second).await, Err(NoJob::Never(_))), "it has no registration");
        let job = owe(&handle, 1);
        handle.take_job("pod", "pod-uid", now, second).await.expect("a job");
        handle.registered("pod", RunnerKey { repository: None, id: 9 }, Secret::new(""), now);
        assert_eq!(handle.accepted_job("pod", second).await, Err(NoJob::NotYet));
        if let Some(runner) = handle.state().registered.get_mut("pod") {
            runner.job = Some((job.key.clone().expect("a key"), now));
        }
        assert_eq!(handle.accepted_job("pod", second).await, Err(NoJob::NotYet), "it has one that may yet be refused");
        handle.job_accepted("pod");
        assert_eq!(handle.accepted_job("pod", second).await, Ok(job.key.expect("a key")));
    }

    fn owe(handle: &PoolHandle, id: u64) -> OwedJob {
        let repository = Repository::parse("acme/web").expect("a repository");
        let reach = Reach { repository: Some(repository.clone()), labels: vec!["linux".to_owned()] };
        let job = OwedJob { key: Some(JobKey { repository, id: id.into() }), reach };
        handle.state().owed.push_back(job.clone());
        handle.jobs_changed();
        job
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_waits_for_a_job_and_gets_one_only_once() {
        let handle = handle_with_pod();
        let now = Timestamp::UNIX_EPOCH;
        let second = Duration::from_secs(1);
        assert_eq!(handle.take_job("pod", "pod-uid", now, second).await, Err(NoJob::NotYet));
        let job = owe(&handle, 1);
        owe(&handle, 2);
        let repository = job.reach.repository.clone();
        assert_eq!(handle.take_job("pod", "pod-uid", now, second).await, Ok(job.clone()));
        assert!(matches!(handle.take_job("pod", "pod-uid", now, second).await, Err(NoJob::Never(_))));
        handle.registered("pod", RunnerKey { repository, id: 9 }, Secret::new("u t"), now);
        assert!(matches!(handle.take_job("pod", "pod-uid", now, second).await, Err(NoJob::Never(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stranger_and_a_burnt_pod_get_nothing_and_the_job_is_owed_again() {
        let handle = handle_with_pod();
        let now = Timestamp::UNIX_EPOCH;
        let job = owe(&handle, 1);
        for (pod, uid) in [("other", "pod-uid"), ("pod", "another-uid")] {
            assert!(matches!(handle.take_job(pod, uid, now, Duration::ZERO).await, Err(NoJob::Never(_))));
        }
        assert!(handle.take_job("pod", "pod-uid", now, Duration::ZERO).await.is_ok());
        handle.registration_failed("pod", "no answer");
        assert_eq!(handle.state().owed.front(), Some(&job));
        assert!(matches!(handle.take_job("pod", "pod-uid", now, Duration::ZERO).await, Err(NoJob::Never(_))));
    }
}
