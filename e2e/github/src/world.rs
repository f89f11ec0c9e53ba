//! The simulated forge as a whole, and what happens to jobs in it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedSender;

use crate::keys::{self, RsaKey, random, uuid};
use crate::model::{
    App, Enterprise, Fault, Group, Hook, HookDelivery, Installation, Job, Level, OidcKeys, Organization, Repository, Requests, RestToken,
    Run, Runner, ScaleSet, Settings, State,
};

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
            issuer: issuer.map_or_else(|| format!("{url}/_services/token"), |issuer| issuer.trim_end_matches('/').to_owned()),
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
    pub(crate) fn serves(&self, level: &Level, group: i64, job: &Job) -> bool {
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
            // An enterprise selects organizations.
            "selected" if matches!(level, Level::Enterprise(_)) => group.organizations.contains(&owner),
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
