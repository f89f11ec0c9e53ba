//! The control API under `/_simulator/`: what tests arrange and look at. It asks for no credential; it is not of GitHub's making.

use std::collections::BTreeSet;
use std::time::Instant;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::keys::{RsaKey, hex, random};
use crate::model::{
    App, Enterprise, Event, Fault, Group, Hook, Installation, Job, Level, Organization, Repository, RestToken, Settings, State,
};
use crate::server::{Ask, Forge, Reply};
use crate::workflow::Workflow;
use crate::world::World;

/// What the simulator says about itself.
pub const WHAT_THIS_IS: &str =
    "This is github-simulator, a program that follows the documented protocol of GitHub's runners for tests. It is not GitHub.\n";

/// A new organization.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NewOrganization {
    /// Its name.
    pub login: String,
    /// The enterprise it belongs to.
    pub enterprise: Option<String>,
}

/// A new repository, or what is changed of one that is there.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NewRepository {
    /// Its owner; made with it where it is not there.
    pub owner: String,
    /// Its name.
    pub name: String,
    /// Whether it is private.
    pub private: bool,
    /// Whether it is a fork.
    pub fork: bool,
    /// Its default branch.
    pub default_branch: String,
    /// Whether `sub` of its OIDC tokens carries ids.
    pub immutable_subject: bool,
    /// Secrets of its jobs.
    pub secrets: Map<String, Value>,
    /// Its protected branches.
    pub protected_branches: Vec<String>,
    /// Environments that wait for an approval.
    pub protected_environments: Vec<String>,
    /// Its custom properties.
    pub properties: Map<String, Value>,
}

impl Default for NewRepository {
    fn default() -> Self {
        Self {
            owner: String::new(),
            name: String::new(),
            private: true,
            fork: false,
            default_branch: "main".to_owned(),
            immutable_subject: false,
            secrets: Map::new(),
            protected_branches: vec!["main".to_owned()],
            protected_environments: Vec::new(),
            properties: Map::new(),
        }
    }
}

/// An App as its owner gets it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NewApp {
    /// Its number.
    pub app_id: i64,
    /// Its client id.
    pub client_id: String,
    /// Its private key, PEM.
    pub private_key: String,
}

/// A new runner group, or what is changed of one with the same name.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NewGroup {
    /// Where: `org`, or `enterprises/slug`.
    pub place: String,
    /// Its name; `Default` changes the default group.
    pub name: String,
    /// `all`, `selected` or `private`.
    pub visibility: String,
    /// Whether public repositories may use it.
    pub allows_public_repositories: bool,
    /// Whether only some workflows may use it.
    pub restricted_to_workflows: bool,
    /// Which.
    pub selected_workflows: Vec<String>,
    /// Repositories that may use it, `owner/name`.
    pub repositories: Vec<String>,
    /// Of an enterprise: organizations that may use it.
    pub organizations: Vec<String>,
}

impl Default for NewGroup {
    fn default() -> Self {
        Self {
            place: String::new(),
            name: String::new(),
            visibility: "all".to_owned(),
            allows_public_repositories: false,
            restricted_to_workflows: false,
            selected_workflows: Vec::new(),
            repositories: Vec::new(),
            organizations: Vec::new(),
        }
    }
}

/// Jobs without a workflow file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Enqueue {
    /// `owner/name`.
    pub repository: String,
    /// `runs-on`.
    pub labels: Vec<String>,
    /// How many.
    pub count: usize,
    /// What each runs.
    pub script: String,
}

impl Default for Enqueue {
    fn default() -> Self {
        Self { repository: String::new(), labels: Vec::new(), count: 1, script: "true".to_owned() }
    }
}

/// A job, as tests see it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct JobView {
    /// Its number, and that of its check run.
    pub id: i64,
    /// Its run.
    pub run: i64,
    /// The UUID in job messages.
    pub uuid: String,
    /// `owner/name`.
    pub repository: String,
    /// Its key in the workflow file.
    pub key: String,
    /// Its name.
    pub name: String,
    /// `runs-on`.
    pub labels: Vec<String>,
    /// `blocked`, `waiting`, `queued`, `available`, `assigned`, `running`, `completed`.
    pub state: String,
    /// `success`, `failure`, `cancelled`, `skipped`.
    pub conclusion: Option<String>,
    /// Its scale set.
    pub scale_set: Option<i64>,
    /// The runner that had it.
    pub runner: Option<String>,
    /// How often it was assigned.
    pub assignments: u32,
    /// When it was queued, RFC 3339.
    pub queued_at: Option<String>,
    /// When it was assigned.
    pub assigned_at: Option<String>,
    /// When it was started.
    pub started_at: Option<String>,
    /// When it ended.
    pub completed_at: Option<String>,
    /// Its steps.
    pub steps: Vec<Value>,
    /// Its log.
    pub log: String,
}

type Answer = Result<Value, (u16, String)>;

fn refuse(error: impl ToString) -> (u16, String) {
    (400, error.to_string())
}

fn nothing() -> (u16, String) {
    (404, "there is no such thing".to_owned())
}

/// Answers a request.
pub(crate) fn answer(forge: &Forge, ask: &Ask) -> Reply {
    let path: Vec<&str> = ask.segments.iter().skip(1).map(String::as_str).collect();
    let result = dispatch(&mut forge.world(), ask, &path);
    match result {
        Ok(value) => Reply::json(200, &value),
        Err((status, error)) => Reply::json(status, &json!({"error": error})),
    }
}

fn body<T: DeserializeOwned>(ask: &Ask) -> Result<T, (u16, String)> {
    let bytes: &[u8] = if ask.body.is_empty() { b"{}" } else { &ask.body };
    serde_json::from_slice(bytes).map_err(refuse)
}

fn number(text: &str) -> Result<i64, (u16, String)> {
    text.parse().map_err(refuse)
}

fn dispatch(world: &mut World, ask: &Ask, path: &[&str]) -> Answer {
    let method = ask.method.as_str();
    match (method, path) {
        ("GET", []) => Ok(json!({"about": WHAT_THIS_IS, "version": env!("CARGO_PKG_VERSION"), "url": world.url, "issuer": world.issuer})),
        ("GET", ["settings"]) => Ok(json!(world.settings)),
        ("PATCH", ["settings"]) => {
            let mut settings = json!(world.settings);
            let changes: Map<String, Value> = body(ask)?;
            if let Some(settings) = settings.as_object_mut() {
                settings.extend(changes);
            }
            world.settings = serde_json::from_value::<Settings>(settings).map_err(refuse)?;
            world.schedule();
            Ok(json!(world.settings))
        }
        (_, ["enterprises" | "organizations" | "repositories" | "apps" | "installations" | "personal-tokens" | "runner-groups", ..]) => {
            accounts(world, ask, path)
        }
        ("POST", ["jobs"]) => {
            let wanted: Enqueue = body(ask)?;
            let run = world.enqueue(&wanted.repository, &wanted.labels, wanted.count, &wanted.script).map_err(refuse)?;
            Ok(json!({"run": run}))
        }
        ("GET", ["jobs"]) => {
            let state = ask.parameter("state");
            let run = ask.parameter("run").map(number).transpose()?;
            let jobs: Vec<JobView> = world
                .jobs
                .values()
                .filter(|job| run.is_none_or(|run| job.run == run))
                .map(|job| view(world, job, false))
                .filter(|job| state.is_none_or(|state| job.state == state))
                .collect();
            Ok(json!({"jobs": jobs}))
        }
        ("GET", ["jobs", id]) => world.jobs.get(&number(id)?).map(|job| json!(view(world, job, true))).ok_or_else(nothing),
        ("POST", ["jobs", id, "approve"]) => {
            if world.approve(number(id)?) {
                Ok(json!({}))
            } else {
                Err(nothing())
            }
        }
        ("POST", ["runs", id, "cancel"]) => {
            if world.cancel_run(number(id)?) {
                Ok(json!({}))
            } else {
                Err(nothing())
            }
        }
        ("POST", ["runs", id, "rerun"]) => {
            if world.rerun(number(id)?, false) {
                Ok(json!({}))
            } else {
                Err(nothing())
            }
        }
        (_, ["scale-sets", ..]) => scale_sets(world, ask, path),
        ("GET", ["runners"]) => {
            let runners: Vec<Value> = world
                .runners
                .values()
                .map(|runner| {
                    json!({
                        "id": runner.id, "name": runner.name, "place": runner.level.path(), "scale_set": runner.set, "group": runner.group,
                        "online": runner.session.is_some(), "job": runner.job, "busy": crate::rest::is_busy(world, runner),
                    })
                })
                .collect();
            Ok(json!({"runners": runners}))
        }
        ("DELETE", ["runners", id]) => {
            if world.remove_runner(number(id)?) {
                Ok(json!({}))
            } else {
                Err(nothing())
            }
        }
        ("POST", ["expire", kind]) => expire(world, kind),
        ("GET", ["faults"]) => Ok(json!({"faults": world.faults})),
        ("POST", ["faults"]) => {
            let mut fault: Fault = body(ask)?;
            fault.id = world.number();
            let id = fault.id;
            world.faults.push(fault);
            Ok(json!({"id": id}))
        }
        ("DELETE", ["faults"]) => {
            world.faults.clear();
            Ok(json!({}))
        }
        ("DELETE", ["faults", id]) => {
            let id = number(id)?;
            world.faults.retain(|fault| fault.id != id);
            Ok(json!({}))
        }
        ("GET", ["requests"]) => {
            let after: u64 = ask.parameter("after").map_or(Ok(0), str::parse).map_err(refuse)?;
            let seen: Vec<_> = world.requests.last.iter().filter(|seen| seen.number > after).collect();
            Ok(json!({"requests": seen}))
        }
        ("DELETE", ["requests"]) => {
            world.requests.last.clear();
            world.requests.by_route.clear();
            Ok(json!({}))
        }
        ("GET", ["counters"]) => Ok(counters(world)),
        ("POST", ["webhooks"]) => {
            let (hook, id) = (body::<Map<String, Value>>(ask)?, world.number());
            let text = |name: &str| hook.get(name).and_then(Value::as_str).map(str::to_owned);
            let url = text("url").ok_or_else(|| refuse("a webhook has a url"))?;
            world.hooks.push(Hook { id, url, secret: text("secret").unwrap_or_default(), organization: text("organization") });
            Ok(json!({"id": id}))
        }
        ("DELETE", ["webhooks"]) => {
            world.hooks.clear();
            Ok(json!({}))
        }
        ("GET", ["deliveries"]) => Ok(json!({"deliveries": world.deliveries.values().collect::<Vec<_>>()})),
        ("POST", ["deliveries", guid, "redeliver"]) => {
            if !world.deliveries.contains_key(*guid) {
                return Err(nothing());
            }
            world.outbox.send((*guid).to_owned()).map_err(refuse)?;
            Ok(json!({}))
        }
        ("POST", ["oidc", "rotate"]) => Ok(json!({"kid": world.rotate_oidc().map_err(refuse)?})),
        ("POST", ["oidc", "withdraw"]) => {
            // What signs stays; `all` takes that away, too, as after a wrong deployment.
            let all = ask.parameter("all").is_some();
            let signing = world.oidc.signing.id.clone();
            world.oidc.published.retain(|key| !all && key["kid"] == signing.as_str());
            Ok(json!({"keys": world.oidc.published.len()}))
        }
        ("POST", ["oidc", "sign"]) => {
            // A token of this issuer with any claims: for tests of what takes tokens.
            let claims: Value = body(ask)?;
            Ok(json!({"token": world.oidc.signing.sign(&claims).map_err(refuse)?}))
        }
        _ => Err((404, format!("the control API has no {method} {}", ask.path))),
    }
}

fn expire(world: &mut World, kind: &str) -> Answer {
    let generations = &mut world.generations;
    match kind {
        "registration" => generations.registration += 1,
        "admin" => generations.admin += 1,
        "queue" => generations.queue += 1,
        "runner" => generations.runner += 1,
        "installation" => world.tokens.retain(|_, token| token.installation.is_none()),
        "personal" => world.tokens.retain(|_, token| token.installation.is_some()),
        _ => return Err(refuse("there are: registration, admin, queue, runner, installation, personal")),
    }
    for set in world.sets.values() {
        set.wake.notify_waiters();
    }
    Ok(json!({}))
}

fn accounts(world: &mut World, ask: &Ask, path: &[&str]) -> Answer {
    match (ask.method.as_str(), path) {
        ("POST", ["enterprises"]) => {
            let wanted: Map<String, Value> = body(ask)?;
            let slug = wanted.get("slug").and_then(Value::as_str).ok_or_else(|| refuse("an enterprise has a slug"))?.to_lowercase();
            let id = world.number();
            world.enterprises.entry(slug.clone()).or_insert(Enterprise { id, slug });
            Ok(json!({"id": id}))
        }
        ("POST", ["organizations"]) => {
            let wanted: NewOrganization = body(ask)?;
            Ok(json!({"id": organization(world, &wanted.login, wanted.enterprise)}))
        }
        ("POST", ["repositories"]) => {
            let wanted: NewRepository = body(ask)?;
            Ok(json!({"id": repository(world, wanted)}))
        }
        ("PUT", ["repositories", owner, name, "workflows", file]) => {
            let workflow = Workflow::parse(&String::from_utf8_lossy(&ask.body)).map_err(|error| refuse(format!("{error:#}")))?;
            let of = world.repositories.get_mut(&format!("{owner}/{name}").to_lowercase()).ok_or_else(nothing)?;
            of.workflows.insert((*file).to_owned(), workflow);
            Ok(json!({}))
        }
        ("POST", ["repositories", owner, name, "dispatch"]) => {
            let event: Event = body(ask)?;
            let runs = world.dispatch(&format!("{owner}/{name}"), &event).map_err(|error| refuse(format!("{error:#}")))?;
            Ok(json!({"runs": runs}))
        }
        ("POST", ["apps"]) => {
            let wanted: Map<String, Value> = body(ask)?;
            let id = world.number();
            let key = RsaKey::generate().map_err(refuse)?;
            let named = wanted.get("client_id").and_then(Value::as_str).map(str::to_owned);
            let client_id = named.unwrap_or_else(|| format!("Iv23li{}", hex(&random::<7>())));
            world.apps.retain(|_, app| app.client_id != client_id);
            world.apps.insert(id, App { id, client_id: client_id.clone(), keys: vec![key.numbers().clone()] });
            Ok(json!(NewApp { app_id: id, client_id, private_key: key.numbers().to_pem() }))
        }
        ("POST", ["apps", id, "rotate"]) => {
            let key = RsaKey::generate().map_err(refuse)?;
            let app = world.apps.get_mut(&number(id)?).ok_or_else(nothing)?;
            if ask.parameter("keep").is_none() {
                app.keys.clear();
            }
            app.keys.push(key.numbers().clone());
            Ok(json!(NewApp { app_id: app.id, client_id: app.client_id.clone(), private_key: key.numbers().to_pem() }))
        }
        ("POST", ["installations"]) => {
            let wanted: Map<String, Value> = body(ask)?;
            let app = wanted.get("app_id").and_then(Value::as_i64).filter(|app| world.apps.contains_key(app)).ok_or_else(nothing)?;
            let account = wanted.get("account").and_then(Value::as_str).ok_or_else(|| refuse("an installation has an account"))?.to_owned();
            let id = world.number();
            world.installations.insert(id, Installation { app, account });
            Ok(json!({"id": id}))
        }
        ("POST", ["personal-tokens"]) => {
            let token = format!("ghp_{}", hex(&random::<18>()));
            world
                .tokens
                .insert(token.clone(), RestToken { installation: None, repositories: None, expires: None, used: 0, hour: Instant::now() });
            Ok(json!({"token": token}))
        }
        ("POST", ["runner-groups"]) => {
            let wanted: NewGroup = body(ask)?;
            Ok(json!({"id": group(world, wanted)?}))
        }
        _ => Err(nothing()),
    }
}

fn organization(world: &mut World, login: &str, enterprise: Option<String>) -> i64 {
    let id = world.number();
    let key = login.to_lowercase();
    let of = world.organizations.entry(key).or_insert(Organization { id, login: login.to_owned(), enterprise: None });
    if let Some(enterprise) = enterprise {
        of.enterprise = Some(enterprise.to_lowercase());
    }
    of.id
}

fn repository(world: &mut World, wanted: NewRepository) -> i64 {
    organization(world, &wanted.owner, None);
    let key = format!("{}/{}", wanted.owner, wanted.name).to_lowercase();
    let new = world.number();
    let old = world.repositories.remove(&key);
    let (id, workflows, runs) = old.map_or_else(|| (new, Default::default(), 0), |old| (old.id, old.workflows, old.runs));
    let repository = Repository {
        id,
        owner: wanted.owner,
        name: wanted.name,
        private: wanted.private,
        fork: wanted.fork,
        default_branch: wanted.default_branch,
        immutable_subject: wanted.immutable_subject,
        secrets: wanted.secrets,
        protected_branches: wanted.protected_branches,
        protected_environments: wanted.protected_environments,
        properties: wanted.properties,
        workflows,
        runs,
    };
    world.repositories.insert(key, repository);
    world.sets_changed();
    id
}

fn group(world: &mut World, wanted: NewGroup) -> Result<i64, (u16, String)> {
    let level = Level::from_path(&wanted.place).filter(|level| world.exists(level)).ok_or_else(nothing)?;
    let known = world.groups_of(&level).iter().find(|group| group.name.eq_ignore_ascii_case(&wanted.name)).map(|group| group.id);
    let id = known.unwrap_or_else(|| world.group_number());
    let repositories: BTreeSet<String> = wanted.repositories.iter().map(|name| name.to_lowercase()).collect();
    let group = Group {
        id,
        name: wanted.name,
        visibility: wanted.visibility,
        default: id == 1,
        allows_public_repositories: wanted.allows_public_repositories,
        restricted_to_workflows: wanted.restricted_to_workflows,
        selected_workflows: wanted.selected_workflows,
        repositories,
        organizations: wanted.organizations.iter().map(|name| name.to_lowercase()).collect(),
    };
    world.groups.insert((level, id), group);
    world.sets_changed();
    world.schedule();
    Ok(id)
}

fn scale_sets(world: &mut World, ask: &Ask, path: &[&str]) -> Answer {
    if let ("GET", ["scale-sets"]) = (ask.method.as_str(), path) {
        let sets: Vec<Value> = world
            .sets
            .values()
            .map(|set| {
                let session =
                    set.queue.session_now().map(|session| json!({"id": session.id, "owner": session.owner, "polls": session.polls}));
                json!({
                    "id": set.id, "name": set.name, "place": set.level.path(), "group": set.group,
                    "labels": set.labels.iter().map(|(name, _)| name).collect::<Vec<_>>(), "session": session,
                    "capacity": set.queue.capacity(), "unacknowledged": set.queue.unacknowledged(), "statistics": world.statistics(set.id),
                })
            })
            .collect();
        return Ok(json!({"scale_sets": sets}));
    }
    let ["scale-sets", id, rest @ ..] = path else { return Err(nothing()) };
    let id = number(id)?;
    if let ("DELETE", []) = (ask.method.as_str(), rest) {
        return if world.remove_set(id) { Ok(json!({})) } else { Err(nothing()) };
    }
    let set = world.sets.get_mut(&id).ok_or_else(nothing)?;
    match (ask.method.as_str(), rest) {
        ("POST", ["restart-ids"]) => set.queue.restart_ids(),
        ("POST", ["drop-session"]) => {
            set.queue.drop_session();
        }
        ("POST", ["message"]) => set.queue.push_raw(String::from_utf8_lossy(&ask.body).into_owned()),
        _ => return Err(nothing()),
    }
    set.wake.notify_waiters();
    Ok(json!({}))
}

fn view(world: &World, job: &Job, log: bool) -> JobView {
    let time = |time: Option<jiff::Timestamp>| time.map(|time| time.to_string());
    let state = match job.state {
        State::Blocked => "blocked",
        State::Waiting => "waiting",
        State::Queued => "queued",
        State::Available(_) => "available",
        State::Assigned(_) => "assigned",
        State::Running => "running",
        State::Completed => "completed",
    };
    let repository = world.runs.get(&job.run).and_then(|run| world.repositories.get(&run.repository));
    JobView {
        id: job.id,
        run: job.run,
        uuid: job.uuid.clone(),
        repository: repository.map(Repository::full_name).unwrap_or_default(),
        key: job.plan.key.clone(),
        name: job.plan.name.clone(),
        labels: job.plan.labels.clone(),
        state: state.to_owned(),
        conclusion: job.conclusion.clone(),
        scale_set: job.set,
        runner: job.runner.as_ref().filter(|_| job.started.is_some()).map(|(_, name)| name.clone()),
        assignments: job.assignments,
        queued_at: time(job.queued),
        assigned_at: time(job.assigned),
        started_at: time(job.started),
        completed_at: time(job.completed),
        steps: job.steps.clone(),
        log: if log { job.log.clone() } else { String::new() },
    }
}

/// How many requests of which kind, and how many of them a completed job cost. Polls are counted apart: they follow time, not jobs.
fn counters(world: &World) -> Value {
    let (mut operator, mut runner, mut polls) = (0_u64, 0_u64, 0_u64);
    for (route, count) in &world.requests.by_route {
        if route.starts_with("GET /_services/messages") || route.starts_with("GET /_services/broker/message") {
            polls += count;
        } else if ["/_services/broker", "/_services/run", "/_services/results", "/_services/vstoken", "idtoken", ".well-known"]
            .iter()
            .any(|part| route.contains(part))
        {
            runner += count;
        } else {
            operator += count;
        }
    }
    let completed = world.jobs.values().filter(|job| job.state == State::Completed && job.started.is_some()).count();
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let per_job = |count: u64| if completed == 0 { Value::Null } else { json!(count as f64 / completed as f64) };
    json!({
        "requests": world.requests.count, "by_route": world.requests.by_route, "operator": operator, "runner": runner, "polls": polls,
        "jobs_completed": completed, "operator_per_job": per_job(operator), "runner_per_job": per_job(runner),
    })
}
