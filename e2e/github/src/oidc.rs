//! The OIDC issuer of jobs.

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::keys::uuid;
use crate::model::{Job, State};
use crate::rest::after;
use crate::server::{Ask, Forge, Reply};
use crate::world::World;

/// Claims of a token, as discovery lists them.
const CLAIMS: &[&str] = &[
    "sub",
    "aud",
    "exp",
    "iat",
    "iss",
    "jti",
    "nbf",
    "ref",
    "sha",
    "repository",
    "repository_id",
    "repository_owner",
    "repository_owner_id",
    "enterprise",
    "enterprise_id",
    "run_id",
    "run_number",
    "run_attempt",
    "actor",
    "actor_id",
    "workflow",
    "workflow_ref",
    "workflow_sha",
    "head_ref",
    "base_ref",
    "event_name",
    "ref_type",
    "ref_protected",
    "environment",
    "environment_node_id",
    "job_workflow_ref",
    "job_workflow_sha",
    "repository_visibility",
    "runner_environment",
    "check_run_id",
];

/// The discovery document.
pub(crate) fn discovery(forge: &Forge) -> Reply {
    let world = forge.world();
    Reply::json(
        200,
        &json!({
            "issuer": world.issuer, "jwks_uri": format!("{}/.well-known/jwks", world.issuer),
            "subject_types_supported": ["public", "pairwise"], "response_types_supported": ["id_token"], "claims_supported": CLAIMS,
            "id_token_signing_alg_values_supported": ["RS256"], "scopes_supported": ["openid"],
        }),
    )
}

/// The keys.
pub(crate) fn jwks(forge: &Forge) -> Reply {
    Reply::json(200, &json!({"keys": forge.world().oidc.published}))
}

/// A token for the job that asks.
pub(crate) fn id_token(forge: &Forge, ask: &Ask, plan: &str, job: &str) -> Reply {
    let (claims, key) = {
        let world = forge.world();
        let Some(id) = crate::broker::job_of_token(&world, ask) else { return Reply::empty(401) };
        let Some(job) = world.jobs.get(&id).filter(|found| found.plan_id == plan && found.uuid == job) else { return Reply::empty(403) };
        if job.state != State::Running {
            let state = if job.state == State::Completed { "Completed" } else { "Queued" };
            return refused(400, &format!("Can't issue ID_TOKEN for job in '{state}' state"));
        }
        let audience = ask.parameter("audience").filter(|audience| !audience.is_empty());
        match claims(&world, job, audience) {
            Some(claims) => (claims, world.oidc.signing.clone()),
            None => return refused(403, "The job may not ask for tokens: it lacks the permission id-token: write"),
        }
    };
    match key.sign(&Value::Object(claims)) {
        Ok(token) => Reply::json(200, &json!({"count": token.len(), "value": token})),
        Err(error) => Reply::text(500, error.to_string()),
    }
}

fn refused(status: u16, message: &str) -> Reply {
    Reply::json(
        status,
        &json!({"$id": "1", "message": message, "typeName": "GitHub.DistributedTask.WebApi.TaskOrchestrationJobException", "errorCode": 0}),
    )
}

fn claims(world: &World, job: &Job, audience: Option<&str>) -> Option<Map<String, Value>> {
    let run = world.runs.get(&job.run)?;
    let repository = world.repositories.get(&run.repository)?;
    let event = &run.event;
    if !job.plan.id_token || event.from_fork() {
        return None;
    }
    let context = world.github_context(job.run, Some(job));
    let owner = world.organizations.get(&repository.owner.to_lowercase());
    let owner_id = owner.map(|owner| owner.id).unwrap_or_default();
    let escape = |text: &str| text.replace(':', "%3A");
    let subject_of = if repository.immutable_subject {
        format!("{}@{owner_id}/{}@{}", repository.owner, repository.name, repository.id)
    } else {
        repository.full_name()
    };
    let what = match (&job.plan.environment, event.name.as_str()) {
        (Some(environment), _) => format!("environment:{}", escape(environment)),
        (None, "pull_request") => "pull_request".to_owned(),
        (None, _) => format!("ref:{}", escape(&event.git_ref)),
    };
    let workflow_ref = World::workflow_ref(run, repository);
    let now = Timestamp::now().as_second();
    let mut claims = json!({
        "iss": world.issuer, "sub": format!("repo:{subject_of}:{what}"),
        "aud": audience.map_or_else(|| format!("{}/{}", world.url, repository.owner), str::to_owned),
        "iat": now, "nbf": now - 600, "exp": after(world.settings.id_token).as_second(), "jti": uuid(),
        "job_workflow_ref": world.job_workflow_ref(run, repository), "job_workflow_sha": event.sha,
        "workflow_ref": workflow_ref, "workflow_sha": event.sha, "ref_protected": context["ref_protected"].to_string(),
        "ref_type": context["ref_type"], "runner_environment": "self-hosted", "check_run_id": job.id.to_string(),
    });
    for name in [
        "repository",
        "repository_id",
        "repository_owner",
        "repository_owner_id",
        "repository_visibility",
        "actor",
        "actor_id",
        "ref",
        "base_ref",
        "head_ref",
        "sha",
        "event_name",
        "workflow",
        "run_id",
        "run_number",
        "run_attempt",
    ] {
        claims[name] = context[name].clone();
    }
    if let Some(environment) = &job.plan.environment {
        claims["environment"] = json!(environment);
        claims["environment_node_id"] = json!(format!("EN_{}_{environment}", repository.id));
    }
    if let Some(enterprise) = owner.and_then(|owner| world.enterprises.get(owner.enterprise.as_ref()?)) {
        claims["enterprise"] = json!(enterprise.slug);
        claims["enterprise_id"] = json!(enterprise.id.to_string());
    }
    for (name, value) in &repository.properties {
        claims[format!("repo_property_{name}")] = json!(crate::expressions::to_text(value));
    }
    match claims {
        Value::Object(claims) => Some(claims),
        _ => None,
    }
}
