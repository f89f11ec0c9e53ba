//! The Actions service: scale sets, sessions, messages, runners.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::keys::uuid;
use crate::model::{Flow, Group, Level, Runner, ScaleSet, ServiceError, seconds};
use crate::rest::{after, own, tenant};
use crate::server::{Ask, Forge, Reply};
use crate::world::World;

type Answer = Result<Reply, ServiceError>;

/// Longest time between two looks of an open poll, for what no event tells: redelivery, and tokens that end.
const LOOK: Duration = Duration::from_secs(1);

const ADMIN: &str = "GitHub.DistributedTask.WebApi.RunnerAdminException";

/// Answers a request to `<tenant>/_apis/..`.
pub(crate) fn answer(forge: &Forge, ask: &Ask, path: &[&str]) -> Reply {
    let mut world = forge.world();
    let reply = match path {
        ["_apis", "runtime", "runnerscalesets", set, "acquirejobs"] if ask.method == "POST" => acquire(&mut world, ask, set),
        _ => admin(&world, ask).and_then(|level| dispatch(&mut world, ask, &level, path)),
    };
    finish(&world, reply)
}

fn finish(world: &World, reply: Answer) -> Reply {
    let mut reply = reply.unwrap_or_else(|error| {
        // What the router does not know is answered by the router, not by the service.
        if error.kind.is_empty() { Reply::text(error.status, error.message) } else { Reply::json(error.status, &error.body()) }
    });
    if world.settings.byte_order_mark && !reply.body.is_empty() {
        reply.body.splice(..0, [0xef, 0xbb, 0xbf]);
    }
    reply
}

fn ok(value: &Value) -> Answer {
    Ok(Reply::json(200, value))
}

fn list(values: &[Value]) -> Answer {
    ok(&json!({"count": values.len(), "value": values}))
}

fn unrouted() -> ServiceError {
    ServiceError::new(404, "", "404 page not found\n")
}

fn unauthorized() -> ServiceError {
    ServiceError::new(
        401,
        "GitHub.Services.Common.VssUnauthorizedException",
        "TF400813: The user is not authorized to access this resource.",
    )
}

fn no_set(id: &str) -> ServiceError {
    ServiceError::new(
        404,
        "GitHub.Actions.Runtime.WebApi.RunnerScaleSetNotFoundException",
        format!("No runner scale set found with identifier {id}."),
    )
}

fn no_runner(id: &str) -> ServiceError {
    ServiceError::new(404, "GitHub.DistributedTask.WebApi.AgentNotFoundException", format!("Agent {id} not found."))
}

/// Of which place the asker is an administrator.
fn admin(world: &World, ask: &Ask) -> Result<Level, ServiceError> {
    let token = own(world, ask.credential("bearer"), "admin", world.generations.admin).ok_or_else(unauthorized)?;
    token.claims["level"].as_str().and_then(Level::from_path).ok_or_else(unauthorized)
}

fn dispatch(world: &mut World, ask: &Ask, level: &Level, path: &[&str]) -> Answer {
    match (ask.method.as_str(), path) {
        ("GET", ["_apis", "runtime", "runnergroups"]) => {
            let wanted = ask.parameter("groupName");
            let groups: Vec<Value> = world
                .groups_of(level)
                .iter()
                .filter(|group| wanted.is_none_or(|name| group.name.eq_ignore_ascii_case(name)))
                .map(|group| {
                    let size = world.runners.values().filter(|runner| runner.level == *level && runner.group == group.id).count();
                    json!({"id": group.id, "name": group.name, "size": size, "isDefaultGroup": group.default})
                })
                .collect();
            list(&groups)
        }
        (_, ["_apis", "runtime", "runnerscalesets", rest @ ..]) => sets(world, ask, level, rest),
        (method, ["_apis", "distributedtask", "pools", "0", "agents", rest @ ..]) => agents(world, ask, level, method, rest),
        _ => Err(unrouted()),
    }
}

fn find<'a>(world: &'a mut World, level: &Level, id: &str) -> Result<&'a mut ScaleSet, ServiceError> {
    let number: i64 = id.parse().map_err(|_| no_set(id))?;
    world.sets.get_mut(&number).filter(|set| set.level == *level).ok_or_else(|| no_set(id))
}

fn sets(world: &mut World, ask: &Ask, level: &Level, rest: &[&str]) -> Answer {
    match (ask.method.as_str(), rest) {
        ("GET", []) => {
            let group = ask.parameter("runnerGroupId");
            let name = ask.parameter("name");
            let found: Vec<Value> = world
                .sets
                .values()
                .filter(|set| set.level == *level)
                .filter(|set| {
                    group.is_none_or(|group| set.group.to_string() == group) && name.is_none_or(|name| set.name.eq_ignore_ascii_case(name))
                })
                .map(|set| set_json(world, set))
                .collect();
            list(&found)
        }
        ("POST", []) => create(world, ask, level),
        ("GET", [id]) => {
            let id = find(world, level, id)?.id;
            shown(world, id)
        }
        ("PATCH", [id]) => update(world, ask, level, id),
        ("DELETE", [id]) => {
            let id = find(world, level, id)?.id;
            world.remove_set(id);
            Ok(Reply::empty(204))
        }
        ("POST", [id, "sessions"]) => open(world, ask, level, id),
        ("PATCH", [id, "sessions", session]) => {
            let now = Instant::now();
            let hold = seconds(world.settings.session_hold);
            let set = find(world, level, id)?;
            let number = set.id;
            if set.queue.touch(session, now, hold).is_none() {
                let told = "The runner referenced a session ID that doesn't exist in redis.";
                return Err(ServiceError::new(404, ADMIN, told));
            }
            session_json(world, number)
        }
        ("DELETE", [id, "sessions", session]) => {
            let set = find(world, level, id)?;
            if !set.queue.close(session) {
                let kind = "GitHub.Actions.Runtime.WebApi.RunnerScaleSetSessionExpiredException";
                return Err(ServiceError::new(400, kind, format!("The session {session} has expired.")));
            }
            set.wake.notify_waiters();
            Ok(Reply::empty(204))
        }
        ("POST", [id, "generatejitconfig"]) => generate(world, ask, level, id),
        ("GET", [id, "acquirablejobs"]) if world.settings.flow == Flow::Acquire => {
            let id = find(world, level, id)?.id;
            let jobs: Vec<Value> = world
                .active_jobs()
                .filter(|job| job.state == crate::model::State::Available(id))
                .map(|job| {
                    let mut message = world.job_message(job, "JobAvailable");
                    message["acquireJobUrl"] = json!(format!("{}/_apis/runtime/runnerscalesets/{id}/acquirejobs", world.url));
                    message
                })
                .collect();
            if jobs.is_empty() { Ok(Reply::empty(204)) } else { list(&jobs) }
        }
        _ => Err(unrouted()),
    }
}

fn set_json(world: &World, set: &ScaleSet) -> Value {
    let labels: Vec<Value> =
        set.labels.iter().enumerate().map(|(at, (name, kind))| json!({"id": at + 1, "name": name, "type": kind})).collect();
    let group = world.group(&set.level, set.group);
    json!({
        "id": set.id, "name": set.name, "runnerGroupId": set.group, "runnerGroupName": group.map(|group| group.name), "labels": labels,
        "RunnerSetting": set.setting, "createdOn": set.created.to_string(), "statistics": world.statistics(set.id),
        "runnerJitConfigUrl": format!("{}/_services/pipelines/{}/_apis/runtime/runnerscalesets/{}/generatejitconfig", world.url, tenant(&set.level), set.id),
        "getAcquirableJobsUrl": format!("{}/_services/pipelines/{}/_apis/runtime/runnerscalesets/{}/acquirablejobs", world.url, tenant(&set.level), set.id),
    })
}

fn shown(world: &World, id: i64) -> Answer {
    world.sets.get(&id).map_or_else(|| Err(no_set(&id.to_string())), |set| ok(&set_json(world, set)))
}

fn labels_of(body: &Value) -> Vec<(String, String)> {
    let label = |label: &Value| {
        let name = label["name"].as_str().filter(|name| !name.is_empty())?;
        Some((name.to_owned(), label["type"].as_str().filter(|kind| !kind.is_empty()).unwrap_or("System").to_owned()))
    };
    body["labels"].as_array().map(|labels| labels.iter().filter_map(label).collect()).unwrap_or_default()
}

/// What is left of the labels where the server knows only one.
fn kept(world: &World, name: &str, mut labels: Vec<(String, String)>) -> Vec<(String, String)> {
    if world.settings.drop_custom_labels {
        labels.retain(|(label, _)| label == name);
    }
    if labels.is_empty() {
        labels.push((name.to_owned(), "System".to_owned()));
    }
    labels
}

fn name_is_free(world: &World, level: &Level, group: i64, name: &str, but: i64) -> Result<(), ServiceError> {
    let taken =
        world.sets.values().any(|set| set.id != but && set.level == *level && set.group == group && set.name.eq_ignore_ascii_case(name));
    if taken {
        let kind = "GitHub.Actions.Runtime.WebApi.RunnerScaleSetExistsException";
        return Err(ServiceError::new(400, kind, format!("Runner scale set {name} already exists in the runner group.")));
    }
    Ok(())
}

fn bad(message: &str) -> ServiceError {
    ServiceError::new(400, "GitHub.Services.Common.VssPropertyValidationException", message)
}

fn group_of(world: &World, level: &Level, body: &Value) -> Result<Option<Group>, ServiceError> {
    match body["runnerGroupId"].as_i64().filter(|id| *id != 0) {
        None => Ok(None),
        Some(id) => world.group(level, id).map(Some).ok_or_else(|| bad("The runner group does not exist.")),
    }
}

fn create(world: &mut World, ask: &Ask, level: &Level) -> Answer {
    let body = ask.json();
    let name = body["name"].as_str().filter(|name| !name.is_empty()).ok_or_else(|| bad("A runner scale set needs a name."))?;
    let group = group_of(world, level, &body)?.map_or(1, |group| group.id);
    name_is_free(world, level, group, name, 0)?;
    let labels = kept(world, name, labels_of(&body));
    let setting = json!({"ephemeral": true, "isElastic": true, "disableUpdate": setting_of(&body)["disableUpdate"] == true});
    let id = world.create_set(level.clone(), group, name.to_owned(), labels, setting);
    world.schedule();
    shown(world, id)
}

fn setting_of(body: &Value) -> &Value {
    // Names are read without regard to case.
    body.as_object()
        .and_then(|body| body.iter().find(|(name, _)| name.eq_ignore_ascii_case("runnersetting")))
        .map_or(&Value::Null, |(_, value)| value)
}

fn update(world: &mut World, ask: &Ask, level: &Level, id: &str) -> Answer {
    let body = ask.json();
    let group = group_of(world, level, &body)?.map(|group| group.id);
    let set = find(world, level, id)?;
    let (id, group) = (set.id, group.unwrap_or(set.group));
    let name = body["name"].as_str().filter(|name| !name.is_empty()).unwrap_or(&set.name).to_owned();
    let given = labels_of(&body);
    let labels = if given.is_empty() { set.labels.clone() } else { given };
    name_is_free(world, level, group, &name, id)?;
    let labels = kept(world, &name, labels);
    if let Some(set) = world.sets.get_mut(&id) {
        set.group = group;
        set.name = name;
        set.labels = labels;
        if let Some(disable) = setting_of(&body)["disableUpdate"].as_bool() {
            set.setting["disableUpdate"] = json!(disable);
        }
    }
    world.sets_changed();
    world.schedule();
    shown(world, id)
}

fn open(world: &mut World, ask: &Ask, level: &Level, id: &str) -> Answer {
    let body = ask.json();
    let hold = seconds(world.settings.session_hold);
    let owner = body["ownerName"].as_str().filter(|owner| !owner.is_empty()).ok_or_else(|| bad("A session needs an owner."))?;
    let set = find(world, level, id)?;
    let number = set.id;
    if let Err(other) = set.queue.open(uuid(), owner, Instant::now(), hold) {
        let kind = "GitHub.Actions.Runtime.WebApi.RunnerScaleSetSessionConflictException";
        let told = if other == owner {
            format!("The actions runner scale set {} already has an active session for owner {owner}.", set.name)
        } else {
            format!("The actions runner scale set {} already has an active session.", set.name)
        };
        return Err(ServiceError::new(409, kind, told));
    }
    world.schedule();
    session_json(world, number)
}

fn session_json(world: &World, id: i64) -> Answer {
    let gone = || no_set(&id.to_string());
    let set = world.sets.get(&id).ok_or_else(gone)?;
    let session = set.queue.session_now().ok_or_else(gone)?;
    let now = Timestamp::now().as_second();
    let token = world.own_token(&json!({
        "kind": "queue", "set": id, "session": session.id, "generation": world.generations.queue, "iat": now, "nbf": now - 300,
        "exp": after(world.settings.queue_token).as_second(), "iss": "github-simulator", "jti": uuid(),
    }));
    ok(&json!({
        "sessionId": session.id, "ownerName": session.owner, "runnerScaleSet": set_json(world, set), "statistics": world.statistics(id),
        "messageQueueUrl": format!("{}/_services/messages/{id}/message?sessionId={}", world.url, session.id),
        "messageQueueAccessToken": token,
    }))
}

fn generate(world: &mut World, ask: &Ask, level: &Level, id: &str) -> Answer {
    let body = ask.json();
    let set = find(world, level, id)?;
    let (number, group) = (set.id, set.group);
    let name = body["name"].as_str().filter(|name| !name.is_empty()).ok_or_else(|| bad("A runner needs a name."))?;
    if world.runner_named(level, name).is_some() {
        let kind = "GitHub.DistributedTask.WebApi.AgentExistsException";
        return Err(ServiceError::new(409, kind, format!("Agent {name} already exists.")));
    }
    let folder = body["workFolder"].as_str().filter(|folder| !folder.is_empty()).unwrap_or("_work");
    let (runner, configuration) = world
        .register_runner(level.clone(), group, Some(number), name, Vec::new(), folder)
        .map_err(|error| ServiceError::new(500, ADMIN, error.to_string()))?;
    ok(&json!({"runner": {"id": runner, "name": name, "runnerScaleSetId": number}, "encodedJITConfig": configuration}))
}

fn agent_json(runner: &Runner) -> Value {
    json!({
        "id": runner.id, "name": runner.name, "runnerScaleSetId": runner.set.unwrap_or_default(), "maxParallelism": 1, "enabled": true,
        "ephemeral": true, "status": if runner.session.is_some() { "online" } else { "offline" },
    })
}

fn agents(world: &mut World, ask: &Ask, level: &Level, method: &str, rest: &[&str]) -> Answer {
    match (method, rest) {
        ("GET", []) => {
            let wanted = ask.parameter("agentName");
            let found: Vec<Value> = world
                .runners
                .values()
                .filter(|runner| runner.level == *level && wanted.is_none_or(|name| runner.name.eq_ignore_ascii_case(name)))
                .map(agent_json)
                .collect();
            list(&found)
        }
        ("GET", [id]) => ok(&agent_json(agent(world, level, id)?)),
        ("DELETE", [id]) => {
            let runner = agent(world, level, id)?;
            if crate::rest::is_busy(world, runner) {
                let kind = "GitHub.DistributedTask.WebApi.JobStillRunningException";
                return Err(ServiceError::new(400, kind, format!("Agent {id} is still running a job.")));
            }
            let id = runner.id;
            world.remove_runner(id);
            world.schedule();
            Ok(Reply::empty(204))
        }
        _ => Err(unrouted()),
    }
}

fn agent<'a>(world: &'a World, level: &Level, id: &str) -> Result<&'a Runner, ServiceError> {
    let number: i64 = id.parse().map_err(|_| no_runner(id))?;
    world.runners.get(&number).filter(|runner| runner.level == *level).ok_or_else(|| no_runner(id))
}

/// What a queue token is for: a scale set and a session.
fn queue_token(world: &World, ask: &Ask) -> Result<(i64, String), ServiceError> {
    let kind = "GitHub.Actions.Runtime.WebApi.MessageQueueTokenExpiredException";
    let expired = || ServiceError::new(401, kind, "The message queue token has expired.");
    let token = own(world, ask.credential("bearer"), "queue", world.generations.queue).ok_or_else(expired)?;
    let set = token.number("set").ok_or_else(expired)?;
    Ok((set, token.claims["session"].as_str().unwrap_or_default().to_owned()))
}

fn acquire(world: &mut World, ask: &Ask, set: &str) -> Answer {
    if world.settings.flow == Flow::Assign {
        return Err(unrouted());
    }
    let (of, _) = queue_token(world, ask)?;
    if of.to_string() != set || !world.sets.contains_key(&of) {
        return Err(no_set(set));
    }
    let requests: Vec<i64> = serde_json::from_slice(&ask.body).map_err(|_| bad("Expected a list of request ids."))?;
    let won: Vec<Value> = world.acquire(of, &requests).into_iter().map(Value::from).collect();
    list(&won)
}

/// Answers a request to the message queue.
pub(crate) async fn queue(forge: &Arc<Forge>, ask: &Ask, set: &str, rest: &[&str]) -> Reply {
    let reply = match (ask.method.as_str(), rest) {
        ("GET", ["message"]) => poll(forge, ask, set).await,
        ("DELETE", ["message", message]) => acknowledge(forge, ask, set, message),
        _ => Err(unrouted()),
    };
    finish(&forge.world(), reply)
}

/// Checks token and session of a request to the queue, and hears of the owner. Answers scale set and session.
fn enter(world: &mut World, ask: &Ask, set: &str) -> Result<(i64, String), ServiceError> {
    let (of, session) = queue_token(world, ask)?;
    let hold = seconds(world.settings.session_hold);
    let wanted = ask.parameter("sessionId");
    if of.to_string() != set || wanted != Some(&session) {
        return Err(unauthorized());
    }
    let queue = &mut world.sets.get_mut(&of).ok_or_else(|| no_set(set))?.queue;
    // The token of a session that is no more is worth nothing; refreshing it then tells why.
    queue.touch(&session, Instant::now(), hold).ok_or_else(unauthorized)?;
    Ok((of, session))
}

fn acknowledge(forge: &Forge, ask: &Ask, set: &str, message: &str) -> Answer {
    let mut world = forge.world();
    let (of, _) = enter(&mut world, ask, set)?;
    let message: i64 = message.parse().map_err(|_| bad("A message has a number."))?;
    if let Some(set) = world.sets.get_mut(&of) {
        set.queue.acknowledge(message);
    }
    Ok(Reply::empty(204))
}

/// An open poll: while there is one, its session is not abandoned.
struct Open<'a> {
    forge: &'a Forge,
    set: i64,
    session: String,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if let Some(set) = self.forge.world().sets.get_mut(&self.set) {
            set.queue.polling(&self.session, false, Instant::now());
        }
    }
}

async fn poll(forge: &Arc<Forge>, ask: &Ask, set: &str) -> Answer {
    let last: i64 = ask.parameter("lastMessageId").map_or(Ok(0), str::parse).map_err(|_| bad("lastMessageId is a number."))?;
    let capacity = match ask.header("x-scalesetmaxcapacity") {
        None => usize::MAX,
        Some(text) => text.parse().map_err(|_| bad("X-ScaleSetMaxCapacity is a number that is not negative."))?,
    };
    let (deadline, wake, _open) = {
        let mut world = forge.world();
        let (of, session) = enter(&mut world, ask, set)?;
        let of_set = world.sets.get_mut(&of).ok_or_else(|| no_set(set))?;
        of_set.queue.polling(&session, true, Instant::now());
        let wake = of_set.wake.clone();
        let changed = of_set.queue.set_capacity(capacity);
        if changed {
            world.schedule();
        }
        (Instant::now() + seconds(world.settings.poll), wake, Open { forge, set: of, session })
    };
    loop {
        let notified = wake.notified();
        tokio::pin!(notified);
        notified.as_mut().enable();
        {
            let mut world = forge.world();
            let (of, _) = enter(&mut world, ask, set)?;
            let redelivery = seconds(world.settings.redelivery);
            let statistics = world.statistics(of);
            let next = world.sets.get_mut(&of).and_then(|set| set.queue.next(last, Instant::now(), redelivery));
            if let Some(message) = next {
                return ok(&json!({
                    "messageId": message.id, "messageType": "RunnerScaleSetJobMessages", "body": message.body, "statistics": statistics,
                }));
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Reply::empty(202));
        }
        let _ = tokio::time::timeout(left.min(LOOK), notified).await;
    }
}
