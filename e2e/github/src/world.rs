//! The simulated forge as a whole, and what happens to jobs in it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedSender;

use crate::expressions::{Scope, Status, condition};
use crate::keys::{self, RsaKey, random, uuid};
use crate::model::{
    App, Enterprise, Event, Fault, Flow, Group, Hook, HookDelivery, Installation, Job, Level, OidcKeys, Organization, Repository, Requests,
    RestToken, Run, Runner, ScaleSet, Settings, State, seconds,
};
use crate::workflow::JobPlan;

/// Most RSA keys that runners share: making one takes longer than everything else about a runner.
const RUNNER_KEYS: usize = 16;

/// Kinds of tokens that can be made void at once.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Generations {
    /// Registration tokens.
    pub(crate) registration: u64,
    /// Admin tokens of the Actions service.
    pub(crate) admin: u64,
    /// Message queue tokens.
    pub(crate) queue: u64,
    /// Tokens of runners.
    pub(crate) runner: u64,
}

/// The simulated forge.
pub(crate) struct World {
    /// What can be changed while it runs.
    pub(crate) settings: Settings,
    /// Its base URL, without a slash at its end.
    pub(crate) url: String,
    /// Its OIDC issuer.
    pub(crate) issuer: String,
    /// What signs tokens that only the simulator reads.
    pub(crate) secret: [u8; 32],
    /// Tokens of an older generation are void.
    pub(crate) generations: Generations,
    /// By slug.
    pub(crate) enterprises: BTreeMap<String, Enterprise>,
    /// By login in lower case.
    pub(crate) organizations: BTreeMap<String, Organization>,
    /// By `owner/name` in lower case.
    pub(crate) repositories: BTreeMap<String, Repository>,
    /// By number.
    pub(crate) apps: BTreeMap<i64, App>,
    /// By number.
    pub(crate) installations: BTreeMap<i64, Installation>,
    /// By token.
    pub(crate) tokens: HashMap<String, RestToken>,
    /// By place and number; every place has the default group without an entry.
    pub(crate) groups: BTreeMap<(Level, i64), Group>,
    /// By number.
    pub(crate) sets: BTreeMap<i64, ScaleSet>,
    /// Counts changes of scale sets and groups.
    pub(crate) sets_version: u64,
    /// By number.
    pub(crate) runners: BTreeMap<i64, Runner>,
    /// By number.
    pub(crate) runs: BTreeMap<i64, Run>,
    /// By number.
    pub(crate) jobs: BTreeMap<i64, Job>,
    /// Jobs that are not over.
    pub(crate) active: BTreeSet<i64>,
    /// Webhooks.
    pub(crate) hooks: Vec<Hook>,
    /// Deliveries by GUID.
    pub(crate) deliveries: BTreeMap<String, HookDelivery>,
    /// Where deliveries are sent from.
    pub(crate) outbox: UnboundedSender<String>,
    /// Keys of the OIDC issuer.
    pub(crate) oidc: OidcKeys,
    /// Faults.
    pub(crate) faults: Vec<Fault>,
    /// Requests seen.
    pub(crate) requests: Requests,
    runner_keys: Vec<Arc<RsaKey>>,
    next: i64,
    next_set: i64,
    next_group: i64,
}

impl World {
    /// An empty forge.
    ///
    /// # Errors
    /// When no keys can be made.
    pub(crate) fn new(url: String, issuer: Option<String>, settings: Settings, outbox: UnboundedSender<String>) -> Result<Self> {
        let signing = Arc::new(RsaKey::generate()?);
        Ok(Self {
            settings,
            issuer: issuer.unwrap_or_else(|| format!("{url}/_services/token")),
            url,
            secret: random(),
            generations: Generations::default(),
            enterprises: BTreeMap::new(),
            organizations: BTreeMap::new(),
            repositories: BTreeMap::new(),
            apps: BTreeMap::new(),
            installations: BTreeMap::new(),
            tokens: HashMap::new(),
            groups: BTreeMap::new(),
            sets: BTreeMap::new(),
            sets_version: 0,
            runners: BTreeMap::new(),
            runs: BTreeMap::new(),
            jobs: BTreeMap::new(),
            active: BTreeSet::new(),
            hooks: Vec::new(),
            deliveries: BTreeMap::new(),
            outbox,
            oidc: OidcKeys { published: vec![signing.jwk()], signing },
            faults: Vec::new(),
            requests: Requests::default(),
            runner_keys: Vec::new(),
            next: 1000,
            next_set: 0,
            next_group: 1,
        })
    }

    /// A number that nothing else has.
    pub(crate) fn number(&mut self) -> i64 {
        self.next += 1;
        self.next
    }

    /// The next number of a runner group.
    pub(crate) fn group_number(&mut self) -> i64 {
        self.next_group += 1;
        self.next_group
    }

    /// Keys for a new runner.
    ///
    /// # Errors
    /// When no key can be made.
    pub(crate) fn runner_key(&mut self, number: i64) -> Result<Arc<RsaKey>> {
        if self.runner_keys.is_empty() {
            self.runner_keys.push(Arc::new(RsaKey::generate()?));
        }
        let index = usize::try_from(number).unwrap_or_default() % self.runner_keys.len();
        self.runner_keys.get(index).cloned().context("there is a key")
    }

    /// One more key for runners to share; whether more are wanted.
    pub(crate) fn add_runner_key(&mut self, key: RsaKey) -> bool {
        self.runner_keys.push(Arc::new(key));
        self.runner_keys.len() < RUNNER_KEYS
    }

    /// A group of a place.
    pub(crate) fn group(&self, level: &Level, id: i64) -> Option<Group> {
        self.groups.get(&(level.clone(), id)).cloned().or_else(|| (id == 1).then(Group::default_one))
    }

    /// All groups of a place.
    pub(crate) fn groups_of(&self, level: &Level) -> Vec<Group> {
        let mut groups: Vec<Group> = self.groups.iter().filter(|((of, _), _)| of == level).map(|(_, group)| group.clone()).collect();
        if !groups.iter().any(|group| group.id == 1) {
            groups.insert(0, Group::default_one());
        }
        groups
    }

    /// Whether a place exists.
    pub(crate) fn exists(&self, level: &Level) -> bool {
        match level {
            Level::Enterprise(slug) => self.enterprises.contains_key(slug),
            Level::Organization(login) => self.organizations.contains_key(login),
            Level::Repository(owner, name) => self.repositories.contains_key(&format!("{owner}/{name}")),
        }
    }

    /// Whether runners of this place and group may run a job.
    fn serves(&self, level: &Level, group: i64, job: &Job) -> bool {
        let Some(run) = self.runs.get(&job.run) else { return false };
        let Some(repository) = self.repositories.get(&run.repository) else { return false };
        let owner = repository.owner.to_lowercase();
        match level {
            // A repository's own runners are outside of all groups.
            Level::Repository(of, name) => return format!("{of}/{name}") == run.repository,
            Level::Organization(login) if *login != owner => return false,
            Level::Enterprise(slug) if self.organizations.get(&owner).and_then(|of| of.enterprise.as_ref()) != Some(slug) => return false,
            _ => {}
        }
        let Some(group) = self.group(level, group) else { return false };
        let chosen = match group.visibility.as_str() {
            "selected" => group.repositories.contains(&run.repository),
            "private" => repository.private,
            _ => true,
        };
        let workflow = self.job_workflow_ref(run, repository);
        chosen
            && (repository.private || group.allows_public_repositories)
            && (!group.restricted_to_workflows || group.selected_workflows.iter().any(|allowed| allowed.eq_ignore_ascii_case(&workflow)))
            && job.plan.group.as_ref().is_none_or(|wanted| wanted.eq_ignore_ascii_case(&group.name))
    }

    /// `workflow_ref` of a run.
    pub(crate) fn workflow_ref(run: &Run, repository: &Repository) -> String {
        format!("{}/.github/workflows/{}@{}", repository.full_name(), run.file, run.event.git_ref)
    }

    /// `job_workflow_ref` of a run's jobs.
    pub(crate) fn job_workflow_ref(&self, run: &Run, repository: &Repository) -> String {
        run.event.job_workflow_ref.clone().unwrap_or_else(|| Self::workflow_ref(run, repository))
    }

    // Scale sets.

    /// Makes a scale set.
    pub(crate) fn create_set(&mut self, level: Level, group: i64, name: String, labels: Vec<(String, String)>, setting: Value) -> i64 {
        self.next_set += 1;
        let id = self.next_set;
        let set = ScaleSet {
            id,
            name,
            level,
            group,
            labels,
            setting,
            created: Timestamp::now(),
            queue: crate::queue::Queue::default(),
            wake: Arc::default(),
        };
        self.sets.insert(id, set);
        self.sets_changed();
        id
    }

    /// Removes a scale set with its idle runners; its jobs that no runner has are queued again.
    pub(crate) fn remove_set(&mut self, id: i64) -> bool {
        let Some(set) = self.sets.remove(&id) else { return false };
        set.wake.notify_waiters();
        let idle: Vec<i64> =
            self.runners.values().filter(|runner| runner.set == Some(id) && runner.job.is_none()).map(|runner| runner.id).collect();
        for runner in idle {
            self.remove_runner(runner);
        }
        let held: Vec<i64> =
            self.active_jobs().filter(|job| job.set == Some(id) && job.state != State::Running).map(|job| job.id).collect();
        for job in held {
            self.requeue(job);
        }
        self.sets_changed();
        self.schedule();
        true
    }

    /// Scale sets or groups changed: who may run what is found out anew.
    pub(crate) fn sets_changed(&mut self) {
        self.sets_version += 1;
    }

    /// Jobs that are not over, oldest first.
    pub(crate) fn active_jobs(&self) -> impl Iterator<Item = &Job> {
        self.active.iter().filter_map(|id| self.jobs.get(id))
    }

    /// Counts for a scale set.
    pub(crate) fn statistics(&self, set: i64) -> Value {
        let (mut available, mut assigned, mut running) = (0, 0, 0);
        for job in self.active_jobs() {
            match job.state {
                State::Queued if job.candidates.contains(&set) => available += 1,
                State::Available(of) if of == set => available += 1,
                State::Assigned(of) if of == set => assigned += 1,
                State::Running if job.set == Some(set) => running += 1,
                _ => {}
            }
        }
        let runners = || self.runners.values().filter(|runner| runner.set == Some(set));
        let registered = runners().count();
        let busy = runners().filter(|runner| runner.job.is_some()).count();
        let idle = runners().filter(|runner| runner.job.is_none() && runner.session.is_some()).count();
        json!({
            "totalAvailableJobs": available, "totalAcquiredJobs": 0, "totalAssignedJobs": assigned + running,
            "totalRunningJobs": running, "totalRegisteredRunners": registered, "totalBusyRunners": busy, "totalIdleRunners": idle,
        })
    }

    // Runs and jobs.

    /// Starts the workflows of a repository that an event starts. Answers the runs.
    ///
    /// # Errors
    /// When nothing starts, or an expression is not understood.
    pub(crate) fn dispatch(&mut self, repository: &str, event: &Event) -> Result<Vec<i64>> {
        let key = repository.to_lowercase();
        let of = self.repositories.get(&key).with_context(|| format!("there is no repository {repository}"))?;
        let starting: Vec<(String, Option<String>)> = of
            .workflows
            .iter()
            .filter(|(file, workflow)| match &event.workflow {
                Some(wanted) => wanted == *file,
                None => workflow.starts_on(&event.name, event.branch()),
            })
            .map(|(file, workflow)| (file.clone(), workflow.name.clone()))
            .collect();
        if starting.is_empty() {
            bail!("no workflow of {repository} starts on {} of {}", event.name, event.git_ref);
        }
        let mut runs = Vec::new();
        for (file, name) in starting {
            let run = self.new_run(&key, name.unwrap_or_else(|| format!(".github/workflows/{file}")), file.clone(), event.clone())?;
            let contexts = json!({"github": self.github_context(run, None), "inputs": event.inputs, "env": {}, "secrets": {}, "vars": {}});
            let plans =
                self.repositories.get(&key).and_then(|of| of.workflows.get(&file)).context("the workflow is there")?.plan(&contexts)?;
            self.add_jobs(run, plans);
            runs.push(run);
        }
        self.schedule();
        Ok(runs)
    }

    /// Starts a run with this many jobs that do nothing, without a workflow file.
    ///
    /// # Errors
    /// When there is no such repository.
    pub(crate) fn enqueue(&mut self, repository: &str, labels: &[String], count: usize, script: &str) -> Result<i64> {
        let key = repository.to_lowercase();
        if !self.repositories.contains_key(&key) {
            bail!("there is no repository {repository}");
        }
        let event = Event { name: "workflow_dispatch".to_owned(), ..Event::default() };
        let run = self.new_run(&key, "enqueued".to_owned(), "enqueued.yaml".to_owned(), event)?;
        let step = json!({
            "id": uuid(), "type": "action", "contextName": "__run_0", "reference": {"type": "script"}, "continueOnError": false,
            "environment": {}, "inputs": {"script": script},
        });
        let plans = (0..count).map(|number| JobPlan {
            key: format!("job-{number}"),
            name: format!("job {number}"),
            labels: labels.to_vec(),
            group: None,
            needs: Vec::new(),
            condition: None,
            id_token: false,
            environment: None,
            matrix: Value::Null,
            env: Map::new(),
            steps: vec![step.clone()],
            outputs: Map::new(),
            timeout_minutes: 360,
        });
        self.add_jobs(run, plans.collect());
        self.schedule();
        Ok(run)
    }

    fn new_run(&mut self, repository: &str, workflow: String, file: String, event: Event) -> Result<i64> {
        let id = self.number() + 9_000_000_000;
        let of = self.repositories.get_mut(repository).context("the repository is there")?;
        of.runs += 1;
        let number = of.runs;
        let created = Timestamp::now();
        let repository = repository.to_owned();
        self.runs
            .insert(id, Run { id, repository, number, attempt: 1, workflow, file, event, created, jobs: Vec::new(), cancelled: false });
        Ok(id)
    }

    fn add_jobs(&mut self, run: i64, plans: Vec<JobPlan>) {
        for plan in plans {
            let id = self.number() + 50_000_000_000;
            let request = self.number();
            let now = Instant::now();
            let job = Job {
                id,
                run,
                uuid: uuid(),
                plan_id: uuid(),
                request,
                plan,
                state: State::Blocked,
                conclusion: None,
                set: None,
                runner: None,
                assignments: 0,
                candidates: Vec::new(),
                candidates_of: None,
                queued: None,
                assigned: None,
                started: None,
                completed: None,
                since: now,
                locked_until: now,
                cancel: None,
                steps: Vec::new(),
                outputs: Map::new(),
                log: String::new(),
            };
            self.jobs.insert(id, job);
            self.active.insert(id);
            if let Some(run) = self.runs.get_mut(&run) {
                run.jobs.push(id);
            }
        }
        self.unblock(run);
    }

    /// Moves on what waited for other jobs of the run.
    fn unblock(&mut self, run: i64) {
        let Some(ids) = self.runs.get(&run).map(|run| run.jobs.clone()) else { return };
        loop {
            let mut moved = false;
            for id in &ids {
                let Some(job) = self.jobs.get(id).filter(|job| job.state == State::Blocked) else { continue };
                let needed: Vec<&Job> =
                    ids.iter().filter_map(|other| self.jobs.get(other)).filter(|other| job.plan.needs.contains(&other.plan.key)).collect();
                if needed.iter().any(|other| other.state != State::Completed) {
                    continue;
                }
                let conclusions: Vec<&str> = needed.iter().filter_map(|other| other.conclusion.as_deref()).collect();
                let status = if self.runs.get(&run).is_some_and(|run| run.cancelled) {
                    Status::Cancelled
                } else if conclusions.iter().all(|conclusion| *conclusion == "success") {
                    Status::Success
                } else {
                    Status::Failure
                };
                let contexts =
                    json!({"github": self.github_context(run, Some(job)), "needs": self.needs_context(job), "env": {}, "inputs": {}});
                let wanted = condition(job.plan.condition.as_deref(), &Scope { contexts: &contexts, status });
                let waits = job.plan.environment.as_ref().is_some_and(|environment| {
                    let repository = self.runs.get(&run).and_then(|run| self.repositories.get(&run.repository));
                    repository.is_some_and(|repository| repository.protected_environments.contains(environment))
                });
                moved = true;
                match wanted {
                    Ok(true) if waits => {
                        self.set_state(*id, State::Waiting);
                        self.announce(*id, "waiting");
                    }
                    Ok(true) => self.enter_queue(*id),
                    Ok(false) => self.complete(*id, if status == Status::Cancelled { "cancelled" } else { "skipped" }),
                    Err(error) => {
                        if let Some(job) = self.jobs.get_mut(id) {
                            job.log.push_str(&error);
                        }
                        self.complete(*id, "failure");
                    }
                }
            }
            if !moved {
                return;
            }
        }
    }

    /// Lets a job go on that waited for an approval.
    pub(crate) fn approve(&mut self, id: i64) -> bool {
        let waiting = self.jobs.get(&id).is_some_and(|job| job.state == State::Waiting);
        if waiting {
            self.enter_queue(id);
            self.schedule();
        }
        waiting
    }

    fn enter_queue(&mut self, id: i64) {
        self.set_state(id, State::Queued);
        if let Some(job) = self.jobs.get_mut(&id) {
            job.queued = Some(Timestamp::now());
        }
        self.announce(id, "queued");
    }

    fn set_state(&mut self, id: i64, state: State) {
        if let Some(job) = self.jobs.get_mut(&id) {
            job.state = state;
            job.since = Instant::now();
        }
    }

    /// Puts a job back into the queue that was given away and not started.
    fn requeue(&mut self, id: i64) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.set = None;
        job.assigned = None;
        job.candidates_of = None;
        let runner = job.runner.take();
        self.set_state(id, State::Queued);
        if let Some(runner) = runner.and_then(|(runner, _)| self.runners.get_mut(&runner)) {
            runner.job = None;
            runner.delivered = false;
        }
    }

    /// Gives out what can be given out: jobs to scale sets as far as they have room, and jobs to idle runners.
    pub(crate) fn schedule(&mut self) {
        let now = Instant::now();
        let hold = seconds(self.settings.session_hold);
        let delay = seconds(self.settings.assign_delay);
        let mut given: BTreeMap<i64, usize> = BTreeMap::new();
        for job in self.active_jobs() {
            match job.state {
                State::Available(set) | State::Assigned(set) => *given.entry(set).or_default() += 1,
                State::Running => {
                    if let Some(set) = job.set {
                        *given.entry(set).or_default() += 1;
                    }
                }
                _ => {}
            }
        }
        let queued: Vec<i64> = self.active_jobs().filter(|job| job.state == State::Queued).map(|job| job.id).collect();
        for id in queued {
            self.find_candidates(id);
            let Some(job) = self.jobs.get(&id) else { continue };
            if now.saturating_duration_since(job.since) < delay {
                continue;
            }
            let candidates = job.candidates.clone();
            let free = candidates.into_iter().find(|set| {
                self.sets.get_mut(set).is_some_and(|of| {
                    of.queue.session(now, hold).is_some() && of.queue.room(given.get(set).copied().unwrap_or_default()) > 0
                })
            });
            if let Some(set) = free {
                *given.entry(set).or_default() += 1;
                match self.settings.flow {
                    Flow::Assign => self.assign(id, set),
                    Flow::Acquire => {
                        self.set_state(id, State::Available(set));
                        if let Some(job) = self.jobs.get_mut(&id) {
                            job.set = Some(set);
                        }
                        self.tell_set(
                            id,
                            "JobAvailable",
                            &json!({"acquireJobUrl": format!("{}/_apis/runtime/runnerscalesets/{set}/acquirejobs", self.url)}),
                        );
                    }
                }
            }
        }
        self.give_to_runners();
    }

    fn find_candidates(&mut self, id: i64) {
        let Some(job) = self.jobs.get(&id).filter(|job| job.candidates_of != Some(self.sets_version)) else { return };
        let fits = |set: &&ScaleSet| {
            !job.plan.labels.is_empty()
                && job.plan.labels.iter().all(|label| set.labels.iter().any(|(name, _)| name.eq_ignore_ascii_case(label)))
                && self.serves(&set.level, set.group, job)
        };
        let candidates = self.sets.values().filter(fits).map(|set| set.id).collect();
        let version = self.sets_version;
        if let Some(job) = self.jobs.get_mut(&id) {
            job.candidates = candidates;
            job.candidates_of = Some(version);
        }
    }

    fn assign(&mut self, id: i64, set: i64) {
        self.set_state(id, State::Assigned(set));
        if let Some(job) = self.jobs.get_mut(&id) {
            job.set = Some(set);
            job.assigned = Some(Timestamp::now());
            job.assignments += 1;
        }
        self.tell_set(id, "JobAssigned", &json!({}));
    }

    /// A scale set acquires offered jobs. Answers those it won.
    pub(crate) fn acquire(&mut self, set: i64, requests: &[i64]) -> Vec<i64> {
        let won: Vec<(i64, i64)> = self
            .active_jobs()
            .filter(|job| job.state == State::Available(set) && requests.contains(&job.request))
            .map(|job| (job.id, job.request))
            .collect();
        for (job, _) in &won {
            self.assign(*job, set);
        }
        self.schedule();
        won.into_iter().map(|(_, request)| request).collect()
    }

    fn give_to_runners(&mut self) {
        let idle: Vec<i64> =
            self.runners.values().filter(|runner| runner.session.is_some() && runner.job.is_none()).map(|runner| runner.id).collect();
        if idle.is_empty() {
            return;
        }
        let mut of_sets: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
        let mut others = Vec::new();
        for id in idle.into_iter().rev() {
            match self.runners.get(&id).and_then(|runner| runner.set) {
                Some(set) => of_sets.entry(set).or_default().push(id),
                None => others.insert(0, id),
            }
        }
        let waiting: Vec<i64> = self
            .active_jobs()
            .filter(|job| job.runner.is_none() && matches!(job.state, State::Assigned(_) | State::Queued))
            .map(|job| job.id)
            .collect();
        for id in waiting {
            let Some(job) = self.jobs.get(&id) else { continue };
            let taker = match job.state {
                State::Assigned(set) => of_sets.get_mut(&set).and_then(Vec::pop),
                _ => {
                    let at = others.iter().position(|runner| self.runners.get(runner).is_some_and(|runner| self.fits(runner, job)));
                    at.map(|at| others.remove(at))
                }
            };
            let Some(runner) = taker.and_then(|runner| self.runners.get_mut(&runner)) else { continue };
            runner.job = Some(id);
            runner.delivered = false;
            runner.wake.notify_waiters();
            let of = (runner.id, runner.name.clone());
            if let Some(job) = self.jobs.get_mut(&id) {
                job.runner = Some(of);
                job.since = Instant::now();
            }
        }
    }

    fn fits(&self, runner: &Runner, job: &Job) -> bool {
        !job.plan.labels.is_empty()
            && job.plan.labels.iter().all(|label| runner.labels.iter().any(|name| name.eq_ignore_ascii_case(label)))
            && self.serves(&runner.level, runner.group, job)
    }

    /// A runner takes the job that was given to it.
    pub(crate) fn start(&mut self, id: i64) {
        let lock = seconds(self.settings.lock);
        self.set_state(id, State::Running);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.started = Some(Timestamp::now());
        job.locked_until = Instant::now() + lock;
        let (runner, name) = job.runner.clone().unwrap_or_default();
        self.tell_set(id, "JobStarted", &json!({"runnerId": runner, "runnerName": name}));
        self.announce(id, "in_progress");
    }

    /// A job is over.
    pub(crate) fn complete(&mut self, id: i64, conclusion: &str) {
        let Some(job) = self.jobs.get_mut(&id).filter(|job| job.state != State::Completed) else { return };
        let told = matches!(job.state, State::Assigned(_) | State::Available(_) | State::Running);
        job.conclusion = Some(conclusion.to_owned());
        job.completed = Some(Timestamp::now());
        let run = job.run;
        let runner = job.runner.clone();
        let started = job.started.is_some();
        self.set_state(id, State::Completed);
        self.active.remove(&id);
        if told {
            let (number, name) = if started { runner.clone().unwrap_or_default() } else { (0, String::new()) };
            let result = match conclusion {
                "success" => "succeeded",
                "cancelled" => "canceled",
                _ => "failed",
            };
            self.tell_set(id, "JobCompleted", &json!({"result": result, "runnerId": number, "runnerName": name}));
        }
        if let Some((runner, _)) = runner {
            if started {
                self.remove_runner(runner);
            } else if let Some(runner) = self.runners.get_mut(&runner) {
                runner.job = None;
            }
        }
        self.announce(id, "completed");
        self.unblock(run);
        self.schedule();
    }

    /// Cancels a run: what waits ends now, what runs is told to.
    pub(crate) fn cancel_run(&mut self, run: i64) -> bool {
        let Some(of) = self.runs.get_mut(&run) else { return false };
        of.cancelled = true;
        for id in of.jobs.clone() {
            let Some(job) = self.jobs.get_mut(&id) else { continue };
            match job.state {
                State::Completed | State::Blocked => {}
                State::Running => {
                    job.cancel = Some(Instant::now());
                    if let Some(runner) = job.runner.as_ref().and_then(|(runner, _)| self.runners.get(runner)) {
                        runner.wake.notify_waiters();
                    }
                }
                _ => self.complete(id, "cancelled"),
            }
        }
        self.unblock(run);
        true
    }

    /// Removes a runner's registration. A job that was given to it and not started goes to another.
    pub(crate) fn remove_runner(&mut self, id: i64) -> bool {
        let Some(runner) = self.runners.remove(&id) else { return false };
        runner.wake.notify_waiters();
        if let Some(job) =
            runner.job.and_then(|job| self.jobs.get_mut(&job)).filter(|job| matches!(job.state, State::Assigned(_) | State::Queued))
        {
            job.runner = None;
        }
        true
    }

    /// What time brings: lost runners, jobs that nobody takes, and the end of waiting.
    pub(crate) fn tick(&mut self) {
        let now = Instant::now();
        let (pickup, queue, cancel) = (seconds(self.settings.pickup), seconds(self.settings.queue), seconds(self.settings.cancel));
        let ids: Vec<i64> = self.active.iter().copied().collect();
        for id in ids {
            let Some(job) = self.jobs.get_mut(&id) else { continue };
            let waited = now.saturating_duration_since(job.since);
            match job.state {
                State::Running => {
                    let too_long = job.cancel.is_some_and(|since| now.saturating_duration_since(since) >= cancel);
                    if too_long {
                        self.complete(id, "cancelled");
                    } else if now >= job.locked_until {
                        job.log.push_str("The self-hosted runner lost communication with the server.\n");
                        self.complete(id, "failure");
                    }
                }
                State::Assigned(_) if waited >= pickup => {
                    let assignments = job.assignments;
                    self.tell_set(id, "JobCompleted", &json!({"result": "canceled", "runnerId": 0, "runnerName": ""}));
                    self.requeue(id);
                    if assignments >= self.settings.assignments {
                        self.complete(id, "failure");
                    }
                }
                State::Available(_) if waited >= pickup => self.requeue(id),
                State::Queued if job.runner.is_some() && waited >= pickup => self.requeue(id),
                State::Queued if waited >= queue => self.complete(id, "cancelled"),
                _ => {}
            }
        }
        self.schedule();
    }

    // What is told to others.

    fn tell_set(&mut self, id: i64, kind: &str, more: &Value) {
        let Some(job) = self.jobs.get(&id) else { return };
        let Some(set) = job.set else { return };
        let mut message = self.job_message(job, kind);
        if let (Some(message), Some(more)) = (message.as_object_mut(), more.as_object()) {
            message.extend(more.clone());
        }
        if let Some(set) = self.sets.get_mut(&set) {
            set.queue.push(message);
            set.wake.notify_waiters();
        }
    }

    /// What all job messages have.
    pub(crate) fn job_message(&self, job: &Job, kind: &str) -> Value {
        let run = self.runs.get(&job.run);
        let repository = run.and_then(|run| self.repositories.get(&run.repository));
        let time = |time: Option<Timestamp>| time.map_or_else(|| "0001-01-01T00:00:00Z".to_owned(), |time| time.to_string());
        let request = if self.settings.flow == Flow::Assign { 0 } else { job.request };
        json!({
            "messageType": kind,
            "runnerRequestId": request,
            "repositoryName": repository.map(|of| of.name.clone()),
            "ownerName": repository.map(|of| of.owner.clone()),
            "jobId": if self.settings.job_id_is_check_run { job.id.to_string() } else { job.uuid.clone() },
            "jobWorkflowRef": run.zip(repository).map(|(run, of)| self.job_workflow_ref(run, of)),
            "jobDisplayName": job.plan.name,
            "workflowRunId": job.run,
            "eventName": run.map(|run| run.event.name.clone()),
            "requestLabels": job.plan.labels,
            "queueTime": time(job.queued),
            "scaleSetAssignTime": time(job.assigned),
            "runnerAssignTime": time(job.started),
            "finishTime": time(job.completed),
        })
    }

    /// Sends `workflow_job` to whom it concerns.
    fn announce(&mut self, id: i64, action: &str) {
        if self.hooks.is_empty() {
            return;
        }
        let Some(job) = self.jobs.get(&id) else { return };
        let Some(body) = crate::rest::workflow_job_event(self, job, action) else { return };
        let owner = body["repository"]["owner"]["login"].as_str().unwrap_or_default().to_lowercase();
        let concerned: Vec<i64> = self
            .hooks
            .iter()
            .filter(|hook| hook.organization.as_ref().is_none_or(|login| login.to_lowercase() == owner))
            .map(|hook| hook.id)
            .collect();
        let body = body.to_string();
        for hook in concerned {
            let guid = uuid();
            let delivery = HookDelivery {
                guid: guid.clone(),
                hook,
                action: action.to_owned(),
                job: id,
                status: None,
                attempts: 0,
                body: body.clone(),
            };
            self.deliveries.insert(guid.clone(), delivery);
            let _ = self.outbox.send(guid);
        }
    }

    // Contexts.

    /// The `github` context of a run, or of one of its jobs.
    pub(crate) fn github_context(&self, run: i64, job: Option<&Job>) -> Value {
        let Some(run) = self.runs.get(&run) else { return json!({}) };
        let Some(repository) = self.repositories.get(&run.repository) else { return json!({}) };
        let owner = self.organizations.get(&repository.owner.to_lowercase());
        let event = &run.event;
        let (kind, name) = ref_parts(&event.git_ref);
        json!({
            "action": "", "actor": event.actor, "actor_id": event.actor_id.to_string(), "triggering_actor": event.actor,
            "api_url": format!("{}/api/v3", self.url), "server_url": self.url, "graphql_url": format!("{}/api/graphql", self.url),
            "base_ref": event.base_ref, "head_ref": event.head_ref, "ref": event.git_ref, "ref_name": name, "ref_type": kind,
            "ref_protected": repository.protected_branches.contains(&name), "sha": event.sha,
            "event_name": event.name, "event": self.event_payload(run, repository),
            "job": job.map(|job| job.plan.key.clone()),
            "repository": repository.full_name(), "repository_id": repository.id.to_string(), "repository_owner": repository.owner,
            "repository_owner_id": owner.map(|of| of.id.to_string()), "repositoryUrl": format!("git://{}/{}.git", self.url, repository.full_name()),
            "repository_visibility": if repository.private { "private" } else { "public" },
            "run_id": run.id.to_string(), "run_number": run.number.to_string(), "run_attempt": run.attempt.to_string(),
            "retention_days": "90", "secret_source": if event.from_fork() { "None" } else { "Actions" },
            "workflow": run.workflow, "workflow_ref": Self::workflow_ref(run, repository), "workflow_sha": event.sha,
        })
    }

    fn event_payload(&self, run: &Run, repository: &Repository) -> Value {
        let event = &run.event;
        let mut payload = json!({
            "repository": crate::rest::repository_json(self, repository),
            "sender": {"login": event.actor, "id": event.actor_id},
        });
        match event.name.as_str() {
            "push" => {
                payload["ref"] = json!(event.git_ref);
                payload["after"] = json!(event.sha);
            }
            "workflow_dispatch" => {
                payload["ref"] = json!(event.git_ref);
                payload["inputs"] = json!(event.inputs);
            }
            "pull_request" => {
                let head = event.head_repository.clone().unwrap_or_else(|| repository.full_name());
                payload["number"] = json!(run.number);
                payload["pull_request"] = json!({
                    "number": run.number,
                    "head": {"ref": event.head_ref, "sha": event.sha, "repo": {"full_name": head, "fork": event.head_repository.is_some()}},
                    "base": {"ref": event.base_ref, "repo": {"full_name": repository.full_name()}},
                });
            }
            _ => {}
        }
        payload
    }

    /// The `needs` context of a job.
    pub(crate) fn needs_context(&self, job: &Job) -> Value {
        let ids = self.runs.get(&job.run).map(|run| run.jobs.clone()).unwrap_or_default();
        let needed = ids.iter().filter_map(|id| self.jobs.get(id)).filter(|other| job.plan.needs.contains(&other.plan.key));
        needed.map(|other| (other.plan.key.clone(), json!({"result": other.conclusion, "outputs": other.outputs}))).collect()
    }

    /// Registers a JIT runner and answers its number and its configuration.
    ///
    /// # Errors
    /// When no key can be made.
    pub(crate) fn register_runner(
        &mut self,
        level: Level,
        group: i64,
        set: Option<i64>,
        name: &str,
        labels: Vec<String>,
        work_folder: &str,
    ) -> Result<(i64, String)> {
        let id = self.number();
        let key = self.runner_key(id)?;
        let client_id = uuid();
        let files = crate::broker::jit_files(&self.url, id, name, &level, &client_id, &key, work_folder);
        let runner = Runner {
            id,
            name: name.to_owned(),
            level,
            group,
            set,
            labels,
            client_id,
            key: key.numbers().clone(),
            session: None,
            seen: Instant::now(),
            job: None,
            delivered: false,
            told_to_cancel: false,
            wake: Arc::new(Notify::new()),
        };
        self.runners.insert(id, runner);
        Ok((id, files))
    }

    /// The runner with this name in a place.
    pub(crate) fn runner_named(&self, level: &Level, name: &str) -> Option<&Runner> {
        self.runners.values().find(|runner| runner.level == *level && runner.name.eq_ignore_ascii_case(name))
    }

    /// A new signing key for OIDC; the old one stays published.
    ///
    /// # Errors
    /// When no key can be made.
    pub(crate) fn rotate_oidc(&mut self) -> Result<String> {
        let key = RsaKey::generate()?;
        self.oidc.published.push(key.jwk());
        let id = key.id.clone();
        self.oidc.signing = Arc::new(key);
        Ok(id)
    }

    /// A token that only the simulator reads.
    pub(crate) fn own_token(&self, claims: &Value) -> String {
        keys::token_with_secret(&self.secret, claims)
    }
}

/// Type and short name of a git reference.
pub(crate) fn ref_parts(git_ref: &str) -> (&'static str, String) {
    match git_ref.strip_prefix("refs/tags/") {
        Some(tag) => ("tag", tag.to_owned()),
        None => {
            ("branch", git_ref.strip_prefix("refs/heads/").or_else(|| git_ref.strip_prefix("refs/pull/")).unwrap_or(git_ref).to_owned())
        }
    }
}
