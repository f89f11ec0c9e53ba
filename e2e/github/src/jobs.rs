//! What happens to runs and jobs: from an event to a conclusion.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::expressions::{Scope, Status, condition};
use crate::keys::uuid;
use crate::model::{Event, Flow, HookDelivery, Job, Repository, Run, Runner, ScaleSet, State, seconds};
use crate::workflow::JobPlan;
use crate::world::{World, ref_parts};

impl World {
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

    /// docs.github.com, REST, "Re-run a workflow" and "Re-run failed jobs from a workflow run": another attempt at a run that is over. False
    /// where it is not.
    pub(crate) fn rerun(&mut self, id: i64, failed: bool) -> bool {
        let Some(run) = self.runs.get_mut(&id) else { return false };
        let of = |id: &i64| self.jobs.get(id);
        if run.jobs.iter().filter_map(of).any(|job| job.state != State::Completed) {
            return false;
        }
        let again = |job: &&Job| !failed || job.conclusion.as_deref() != Some("success");
        let again: Vec<(i64, JobPlan)> = run.jobs.iter().filter_map(of).filter(again).map(|job| (job.id, job.plan.clone())).collect();
        run.attempt += 1;
        run.cancelled = false;
        run.jobs.retain(|id| again.iter().all(|(other, _)| other != id));
        self.add_jobs(id, again.into_iter().map(|(_, plan)| plan).collect());
        self.schedule();
        true
    }

    fn add_jobs(&mut self, run: i64, plans: Vec<JobPlan>) {
        let attempt = self.runs.get(&run).map_or(1, |run| run.attempt);
        for plan in plans {
            let id = self.number() + 50_000_000_000;
            let request = self.number();
            let now = Instant::now();
            let job = Job {
                id,
                run,
                attempt,
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
    pub(crate) fn requeue(&mut self, id: i64) {
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
}
