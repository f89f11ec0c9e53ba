//! What a runner speaks to: OAuth, the broker, the run service, and a place for logs.
//!
//! Paths and names are those of the real services, as far as the runner's source shows them. Simplified: messages are not encrypted;
//! contexts and steps of a job message are plain JSON instead of the runner's typed one; logs go to a path of the simulator's own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::keys::{RsaKey, Token, uuid};
use crate::model::{Job, Level, State, seconds};
use crate::rest::{after, own, tenant};
use crate::server::{Ask, Forge, Reply};
use crate::world::World;

const LOOK: Duration = Duration::from_secs(1);

/// The JIT configuration: three files, each base64, in JSON, in base64.
pub(crate) fn jit_files(url: &str, id: i64, name: &str, level: &Level, client_id: &str, key: &RsaKey, work_folder: &str) -> String {
    let authorization = format!("{url}/_services/vstoken/_apis/oauth2/token/{}", tenant(level));
    let runner = json!({
        "AgentId": id.to_string(), "AgentName": name, "PoolId": "0", "PoolName": "Default", "DisableUpdate": "true", "Ephemeral": "true",
        "ServerUrl": format!("{url}/_services/pipelines/{}/", tenant(level)), "GitHubUrl": format!("{url}/{}", level.path()),
        "WorkFolder": work_folder, "UseV2Flow": "true", "UseRunnerAdminFlow": "true", "ServerUrlV2": format!("{url}/_services/broker/"),
    });
    let credentials = json!({
        "Scheme": "OAuth",
        "Data": {"clientId": client_id, "authorizationUrl": authorization, "authorizationUrlV2": authorization, "requireFipsCryptography": "True"},
    });
    let file = |value: &Value| STANDARD.encode(value.to_string());
    let files = json!({
        ".runner": file(&runner), ".credentials": file(&credentials), ".credentials_rsaparams": file(&key.numbers().to_parameters()),
    });
    STANDARD.encode(files.to_string())
}

/// OAuth: a signed assertion for an access token (RFC 7523).
pub(crate) fn token(forge: &Forge, ask: &Ask) -> Reply {
    let world = forge.world();
    let form: std::collections::BTreeMap<String, String> = form_urlencoded::parse(&ask.body).into_owned().collect();
    let refused = |what: &str| Reply::json(400, &json!({"error": "invalid_client", "error_description": what}));
    let Some(assertion) = form.get("client_assertion").and_then(|text| Token::parse(text).ok()) else {
        return refused("there is no assertion");
    };
    let Some(runner) = world.runners.values().find(|runner| assertion.claims["iss"] == runner.client_id.as_str()) else {
        return refused("the client is not known");
    };
    let audience = assertion.claims["aud"].as_str().unwrap_or_default();
    let now = jiff::Timestamp::now().as_second();
    let timely = assertion.number("exp").is_some_and(|exp| exp > now && exp <= now + 600);
    if !assertion.signed_by(&runner.key)
        || assertion.claims["sub"] != runner.client_id.as_str()
        || !audience.ends_with(&ask.path)
        || !timely
    {
        return refused("the assertion is not valid");
    }
    let life = world.settings.runner_token;
    let token = world.own_token(&json!({
        "kind": "runner", "runner": runner.id, "generation": world.generations.runner, "exp": after(life).as_second(), "jti": uuid(),
    }));
    #[expect(clippy::cast_possible_truncation, reason = "whole seconds of a setting")]
    let expires = life as i64;
    Reply::json(200, &json!({"access_token": token, "token_type": "JWT", "expires_in": expires}))
}

fn error(source: &str, status: u16, kind: &str, message: &str) -> Reply {
    Reply::json(status, &json!({"source": source, "errorKind": kind, "statusCode": status, "errorMessage": message}))
}

fn broker_error(status: u16, kind: &str, message: &str) -> Reply {
    error("actions-broker-listener", status, kind, message)
}

/// The runner that asks.
fn runner(world: &World, ask: &Ask) -> Result<i64, Reply> {
    let token = own(world, ask.credential("bearer"), "runner", world.generations.runner).ok_or_else(|| Reply::empty(401))?;
    let id = token.number("runner").unwrap_or_default();
    if world.runners.contains_key(&id) {
        Ok(id)
    } else {
        Err(broker_error(404, "RunnerNotFound", "The runner registration has been deleted."))
    }
}

/// Answers a request to the broker.
pub(crate) async fn answer(forge: &Arc<Forge>, ask: &Ask, path: &[&str]) -> Reply {
    match (ask.method.as_str(), path) {
        ("POST", ["session"]) => open(&mut forge.world(), ask).unwrap_or_else(|error| error),
        ("DELETE", ["session"]) => close(&mut forge.world(), ask).unwrap_or_else(|error| error),
        ("GET", ["message"]) => message(forge, ask).await.unwrap_or_else(|error| error),
        ("POST", ["acknowledge"]) => acknowledge(&forge.world(), ask).unwrap_or_else(|error| error),
        _ => Reply::text(404, "404 page not found"),
    }
}

fn open(world: &mut World, ask: &Ask) -> Result<Reply, Reply> {
    let id = runner(world, ask)?;
    let hold = seconds(world.settings.session_hold);
    let body = ask.json();
    let session = uuid();
    let Some(runner) = world.runners.get_mut(&id) else { return Err(Reply::empty(404)) };
    if runner.session.is_some() && runner.seen.elapsed() < hold {
        return Err(Reply::text(409, "A session for this runner already exists."));
    }
    runner.session = Some(session.clone());
    runner.seen = Instant::now();
    let reply = json!({"sessionId": session, "ownerName": body["ownerName"], "agent": {"id": id, "name": runner.name}});
    world.schedule();
    Ok(Reply::json(200, &reply))
}

fn close(world: &mut World, ask: &Ask) -> Result<Reply, Reply> {
    let id = runner(world, ask)?;
    if let Some(runner) = world.runners.get_mut(&id) {
        runner.session = None;
    }
    let idle = world.runners.get(&id).is_some_and(|runner| !crate::rest::is_busy(world, runner));
    if let Some(job) = world.runners.get_mut(&id).filter(|_| idle).and_then(|runner| runner.job.take()) {
        if let Some(job) = world.jobs.get_mut(&job) {
            job.runner = None;
        }
        world.schedule();
    }
    Ok(Reply::empty(200))
}

fn acknowledge(world: &World, ask: &Ask) -> Result<Reply, Reply> {
    let id = runner(world, ask)?;
    let wanted = ask.json();
    let job = world.runners.get(&id).and_then(|runner| world.jobs.get(&runner.job?));
    match job {
        Some(job) if wanted["runnerRequestId"] == job.uuid.as_str() => Ok(Reply::empty(200)),
        _ => Err(broker_error(404, "AcknowledgeJobNotFound", "The job is no longer there.")),
    }
}

async fn message(forge: &Arc<Forge>, ask: &Ask) -> Result<Reply, Reply> {
    let deadline = Instant::now() + seconds(forge.world().settings.poll);
    loop {
        let wake = {
            let world = forge.world();
            let id = runner(&world, ask)?;
            world.runners.get(&id).map(|runner| runner.wake.clone()).ok_or_else(|| Reply::empty(404))?
        };
        let notified = wake.notified();
        tokio::pin!(notified);
        notified.as_mut().enable();
        if let Some(message) = next_message(&mut forge.world(), ask)? {
            return Ok(Reply::json(200, &message));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Reply::empty(202));
        }
        let _ = tokio::time::timeout(left.min(LOOK), notified).await;
    }
}

fn next_message(world: &mut World, ask: &Ask) -> Result<Option<Value>, Reply> {
    let id = runner(world, ask)?;
    let url = world.url.clone();
    let number = world.number();
    let Some(runner) = world.runners.get_mut(&id) else { return Ok(None) };
    if runner.session.is_none() || runner.session.as_deref() != ask.parameter("sessionId") {
        return Err(broker_error(404, "RunnerSessionInvalid", "The session is not valid."));
    }
    runner.seen = Instant::now();
    let Some(job) = runner.job.and_then(|job| world.jobs.get(&job)) else { return Ok(None) };
    let (kind, body) = if job.state == State::Running {
        if job.cancel.is_none() || runner.told_to_cancel {
            return Ok(None);
        }
        runner.told_to_cancel = true;
        ("JobCancellation", json!({"jobId": job.uuid, "timeout": "00:05:00"}))
    } else {
        if runner.delivered {
            return Ok(None);
        }
        runner.delivered = true;
        let body = json!({
            "id": uuid(), "runner_request_id": job.uuid, "should_acknowledge": true, "run_service_url": format!("{url}/_services/run/"),
            "billing_owner_id": "U_simulator",
        });
        ("RunnerJobRequest", body)
    };
    Ok(Some(json!({"messageId": number, "messageType": kind, "body": body.to_string()})))
}

fn run_error(status: u16, message: &str) -> Reply {
    error("actions-run-service", status, "", message)
}

/// Answers a request to the run service.
pub(crate) fn run(forge: &Forge, ask: &Ask, path: &[&str]) -> Reply {
    let mut world = forge.world();
    let reply = match (ask.method.as_str(), path) {
        ("POST", ["acquirejob"]) => acquire(&mut world, ask),
        ("POST", ["renewjob"]) => renew(&mut world, ask),
        ("POST", ["completejob"]) => complete(&mut world, ask),
        _ => Err(Reply::text(404, "404 page not found")),
    };
    reply.unwrap_or_else(|error| error)
}

fn acquire(world: &mut World, ask: &Ask) -> Result<Reply, Reply> {
    let id = runner(world, ask)?;
    let wanted = ask.json()["jobMessageId"].as_str().unwrap_or_default().to_owned();
    let found = world.jobs.values().find(|job| job.uuid == wanted).map(|job| (job.id, job.state.clone(), job.runner.clone()));
    match found {
        None => Err(run_error(404, "There is no such job.")),
        Some((job, State::Assigned(_) | State::Queued, Some((of, _)))) if of == id => {
            world.start(job);
            let message = world.jobs.get(&job).map(|job| job_request(world, job)).unwrap_or_default();
            Ok(Reply::json(200, &message))
        }
        Some((_, State::Completed, _)) => Err(run_error(404, "The job is over.")),
        Some(_) => Err(run_error(409, "The job is another runner's.")),
    }
}

/// The job whose token this is, while a runner has it.
pub(crate) fn job_of_token(world: &World, ask: &Ask) -> Option<i64> {
    let token = own(world, ask.credential("bearer"), "job", 0)?;
    token.number("job")
}

fn running(world: &World, ask: &Ask) -> Result<i64, Reply> {
    let id = job_of_token(world, ask).ok_or_else(|| Reply::empty(401))?;
    let job = world.jobs.get(&id).filter(|job| job.state == State::Running);
    if job.is_some() { Ok(id) } else { Err(run_error(404, "The job is not running.")) }
}

fn renew(world: &mut World, ask: &Ask) -> Result<Reply, Reply> {
    let id = running(world, ask)?;
    let lock = world.settings.lock;
    if let Some(job) = world.jobs.get_mut(&id) {
        job.locked_until = Instant::now() + seconds(lock);
    }
    Ok(Reply::json(200, &json!({"LockedUntil": after(lock).to_string(), "lockedUntil": after(lock).to_string()})))
}

fn complete(world: &mut World, ask: &Ask) -> Result<Reply, Reply> {
    let id = running(world, ask)?;
    let body = ask.json();
    if let Some(job) = world.jobs.get_mut(&id) {
        let steps = body["stepResults"].as_array().cloned().unwrap_or_default();
        job.steps = steps
            .into_iter()
            .map(|step| {
                let conclusion = conclusion(step["conclusion"].as_str().unwrap_or_default());
                json!({"name": step["name"], "number": step["number"], "status": "completed", "conclusion": conclusion, "started_at": step["started_at"], "completed_at": step["completed_at"]})
            })
            .collect();
        let outputs = body["outputs"].as_object().cloned().unwrap_or_default();
        job.outputs = outputs.into_iter().map(|(name, value)| (name, value["value"].clone())).collect();
    }
    world.complete(id, conclusion(body["conclusion"].as_str().unwrap_or_default()));
    Ok(Reply::empty(200))
}

/// What REST calls a result of a runner.
fn conclusion(result: &str) -> &'static str {
    match result.to_ascii_lowercase().as_str() {
        "succeeded" | "succeededwithissues" => "success",
        "canceled" => "cancelled",
        "skipped" => "skipped",
        _ => "failure",
    }
}

/// Takes a piece of a job's log.
pub(crate) fn results(forge: &Forge, ask: &Ask, path: &[&str]) -> Reply {
    let mut world = forge.world();
    match (ask.method.as_str(), path) {
        ("POST", ["logs"]) => match running(&world, ask) {
            Ok(id) => {
                if let Some(job) = world.jobs.get_mut(&id) {
                    job.log.push_str(&String::from_utf8_lossy(&ask.body));
                }
                Reply::empty(204)
            }
            Err(error) => error,
        },
        _ => Reply::text(404, "404 page not found"),
    }
}

/// The message with everything that the runner needs for a job.
fn job_request(world: &World, job: &Job) -> Value {
    let run = world.runs.get(&job.run);
    let repository = run.and_then(|run| world.repositories.get(&run.repository));
    let fork = run.is_some_and(|run| run.event.from_fork());
    let secrets = repository.filter(|_| !fork).map(|of| of.secrets.clone()).unwrap_or_default();
    let life = job.plan.timeout_minutes.saturating_add(10).saturating_mul(60);
    #[expect(clippy::cast_precision_loss, reason = "a number of seconds")]
    let token = world.own_token(&json!({
        "kind": "job", "job": job.id, "generation": 0, "exp": after(life as f64).as_second(), "jti": uuid(),
        "scp": format!("Actions.Results:{}:{} Actions.ExampleScope", job.plan_id, job.uuid),
    }));
    let level = repository.map(|of| Level::Organization(of.owner.to_lowercase()));
    let pipelines = format!("{}/_services/pipelines/{}", world.url, level.as_ref().map(tenant).unwrap_or_default());
    let mut data = json!({"CacheServerUrl": "", "ResultsServiceUrl": format!("{}/_services/results/", world.url)});
    if job.plan.id_token && !fork {
        let path = format!("_apis/distributedtask/hubs/Actions/plans/{}/jobs/{}/idtoken", job.plan_id, job.uuid);
        data["GenerateIdTokenUrl"] = json!(format!("{pipelines}/{path}?api-version=2.0"));
    }
    let mut masks: Vec<Value> = secrets.values().filter_map(Value::as_str).map(|value| json!({"type": "regex", "value": value})).collect();
    masks.push(json!({"type": "regex", "value": token}));
    let mut variables = json!({
        "system.github.job": {"value": job.plan.key}, "system.github.launch_endpoint": {"value": world.url},
        "system.github.token": {"value": format!("ghs_job_{}", job.id), "isSecret": true},
    });
    for (name, value) in &secrets {
        variables[name] = json!({"value": value, "isSecret": true});
    }
    json!({
        "messageType": "PipelineAgentJobRequest",
        "plan": {"planId": job.plan_id, "planType": "Actions", "scopeIdentifier": uuid(), "version": 12},
        "timeline": {"id": job.plan_id}, "jobId": job.uuid, "jobName": "__default", "jobDisplayName": job.plan.name, "requestId": job.request,
        "lockedUntil": after(world.settings.lock).to_string(), "variables": variables, "mask": masks,
        "resources": {"endpoints": [{
            "name": "SystemVssConnection", "url": format!("{pipelines}/"), "isReady": true, "data": data,
            "authorization": {"scheme": "OAuth", "parameters": {"AccessToken": token}},
        }]},
        "contextData": {
            "github": world.github_context(job.run, Some(job)), "matrix": job.plan.matrix, "needs": world.needs_context(job),
            "inputs": run.map(|run| run.event.inputs.clone()), "strategy": {"job-index": 0, "job-total": 1},
        },
        "environmentVariables": [job.plan.env], "jobOutputs": job.plan.outputs, "steps": job.plan.steps,
        "timeoutInMinutes": job.plan.timeout_minutes, "workspace": {}, "fileTable": [],
    })
}
