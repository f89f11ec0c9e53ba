//! The REST API: what a runner operator needs of it.

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::keys::{Token, hex, random};
use crate::model::{Group, Job, Level, Repository, RestToken, Runner, State, seconds};
use crate::server::{Ask, Forge, Reply};
use crate::world::World;

type Answer = Result<Reply, Reply>;

/// Who asks.
enum Asker {
    Personal,
    /// By its number, and the repositories that its token was made for.
    Installation(i64, Option<Vec<String>>),
}

/// Answers a request; `path` is without `/api/v3`.
pub(crate) fn answer(forge: &Forge, ask: &Ask, path: &[&str]) -> Reply {
    let mut world = forge.world();
    let limits = limit(&mut world, ask);
    let mut reply = match &limits {
        Some((limit, used, reset)) if used > limit => {
            error(403, "API rate limit exceeded for installation.").with("retry-after", reset.to_string())
        }
        _ => dispatch(&mut world, ask, path).unwrap_or_else(|error| error),
    };
    if let Some((limit, used, reset)) = limits {
        let resource =
            if path.last().is_some_and(|last| last.contains("generate-jitconfig")) { "actions_runner_registration" } else { "core" };
        reply = reply
            .with("x-ratelimit-limit", limit.to_string())
            .with("x-ratelimit-used", used.to_string())
            .with("x-ratelimit-remaining", limit.saturating_sub(used).to_string())
            .with("x-ratelimit-reset", (Timestamp::now().as_second() + reset).to_string())
            .with("x-ratelimit-resource", resource);
    }
    reply.with("x-github-media-type", "github.v3; format=json")
}

fn error(status: u16, message: &str) -> Reply {
    Reply::json(status, &json!({"message": message, "documentation_url": "https://docs.github.com/rest", "status": status.to_string()}))
}

fn not_found() -> Reply {
    error(404, "Not Found")
}

/// Limit, use, and seconds until the hour of this credential is over.
fn limit(world: &mut World, ask: &Ask) -> Option<(u32, u32, i64)> {
    let limit = world.settings.rate_limit?;
    let token = world.tokens.get_mut(bearer(ask)?)?;
    if token.hour.elapsed().as_secs() >= 3600 {
        token.hour = std::time::Instant::now();
        token.used = 0;
    }
    token.used += 1;
    let left = 3600_u64.saturating_sub(token.hour.elapsed().as_secs());
    Some((limit, token.used, i64::try_from(left).unwrap_or_default()))
}

fn bearer(ask: &Ask) -> Option<&str> {
    ask.credential("bearer").or_else(|| ask.credential("token"))
}

fn asker(world: &World, ask: &Ask) -> Result<Asker, Reply> {
    let Some(token) = bearer(ask) else { return Err(error(401, "Requires authentication")) };
    match world.tokens.get(token) {
        Some(token) if token.expires.is_none_or(|expires| expires > Timestamp::now()) => {
            Ok(token.installation.map_or(Asker::Personal, |id| Asker::Installation(id, token.repositories.clone())))
        }
        _ => Err(error(401, "Bad credentials")),
    }
}

/// Whether the asker may see a place: everything for a personal token, its account for an installation.
fn may(world: &World, asker: &Asker, level: &Level) -> Result<(), Reply> {
    let allowed = match asker {
        Asker::Personal => true,
        Asker::Installation(id, repositories) => {
            let account = world.installations.get(id).map(|installation| installation.account.to_lowercase());
            let owner = match level {
                Level::Enterprise(slug) => slug,
                Level::Organization(login) | Level::Repository(login, _) => login,
            };
            let narrowed = match (repositories, level) {
                (None, _) => true,
                (Some(names), Level::Repository(owner, name)) => names.contains(&format!("{owner}/{name}")),
                (Some(_), _) => false,
            };
            account.as_ref() == Some(owner) && narrowed
        }
    };
    if allowed && world.exists(level) { Ok(()) } else { Err(not_found()) }
}

fn dispatch(world: &mut World, ask: &Ask, path: &[&str]) -> Answer {
    let method = ask.method.as_str();
    match (method, path) {
        ("GET", [] | ["meta"]) => return Ok(Reply::json(200, &json!({"installed_version": "3.21.0", "simulator": true}))),
        ("POST", ["app", "installations", id, "access_tokens"]) => return access_token(world, ask, id),
        ("GET", ["app"]) => {
            let app = app(world, ask)?;
            return Ok(Reply::json(200, &json!({"id": app, "client_id": world.apps.get(&app).map(|app| app.client_id.clone())})));
        }
        ("POST", ["actions", "runner-registration"]) => return registration(world, ask),
        _ => {}
    }
    let asker = asker(world, ask)?;
    // docs.github.com, REST, "Revoke an installation access token" and "List repositories accessible to the app installation".
    if let (Asker::Installation(id, repositories), ["installation", what]) = (&asker, path) {
        return match (method, *what) {
            ("DELETE", "token") => {
                world.tokens.remove(bearer(ask).unwrap_or_default());
                Ok(Reply::empty(204))
            }
            ("GET", "repositories") => {
                let account = world.installations.get(id).map(|installation| installation.account.to_lowercase());
                let of_account = world.repositories.iter().filter(|(_, of)| Some(of.owner.to_lowercase()) == account);
                let reached = of_account.filter(|(key, _)| repositories.as_ref().is_none_or(|names| names.contains(key)));
                let list: Vec<Value> = reached.map(|(_, of)| repository_json(world, of)).collect();
                Ok(Reply::json(200, &json!({"total_count": list.len(), "repositories": list})))
            }
            _ => Err(not_found()),
        };
    }
    let (level, rest) = match path {
        ["orgs", login, rest @ ..] => (Level::Organization(login.to_lowercase()), rest),
        ["enterprises", slug, rest @ ..] => (Level::Enterprise(slug.to_lowercase()), rest),
        ["repos", owner, name, rest @ ..] => (Level::Repository(owner.to_lowercase(), name.to_lowercase()), rest),
        ["rate_limit"] => return Ok(Reply::json(200, &json!({"resources": {"core": {"limit": world.settings.rate_limit}}}))),
        _ => return Err(not_found()),
    };
    may(world, &asker, &level)?;
    match (method, rest) {
        ("POST", ["actions", "runners", "registration-token"]) => {
            let (expires, claims) = registration_claims(world, &level);
            let token = world.own_token(&claims);
            Ok(Reply::json(201, &json!({"token": token, "expires_at": expires.to_string()})))
        }
        (_, ["actions", "runners", rest @ ..]) => runners(world, ask, &level, rest),
        (_, ["actions", "runner-groups", rest @ ..]) if !matches!(level, Level::Repository(..)) => groups(world, ask, &level, rest),
        ("GET", []) => match &level {
            Level::Repository(owner, name) => {
                let repository = world.repositories.get(&format!("{owner}/{name}")).ok_or_else(not_found)?;
                Ok(Reply::json(200, &repository_json(world, repository)))
            }
            Level::Organization(login) => Ok(Reply::json(200, &account_json(world, login))),
            Level::Enterprise(_) => Err(not_found()),
        },
        // docs.github.com, REST, "Workflow runs": "List workflow runs for a repository", the latest first.
        ("GET", ["actions", "runs"]) => {
            let Level::Repository(owner, name) = &level else { return Err(not_found()) };
            let (wanted, key) = (ask.parameter("status"), format!("{owner}/{name}"));
            let own = world.runs.values().rev().filter(|run| run.repository == key).filter_map(|run| run_json(world, run.id).ok());
            let fits = |run: &Value| wanted.is_none_or(|wanted| run["status"] == wanted || run["conclusion"] == wanted);
            let found: Vec<Value> = own.filter(fits).collect();
            Ok(Reply::json(200, &page(ask, "workflow_runs", &found)))
        }
        ("GET", ["actions", "runs", run]) => run_json(world, of_repository(world, &level, run)?).map(|run| Reply::json(200, &run)),
        ("GET", ["actions", "runs", run, "jobs"] | ["actions", "runs", run, "attempts", _, "jobs"]) => {
            let run = of_repository(world, &level, run)?;
            let ids = world.runs.get(&run).map(|run| run.jobs.clone()).unwrap_or_default();
            // One that waits for other jobs is not made before its turn.
            let made = ids.iter().filter_map(|id| world.jobs.get(id)).filter(|job| job.state != State::Blocked);
            let jobs: Vec<Value> = made.filter_map(|job| job_json(world, job)).collect();
            Ok(Reply::json(200, &page(ask, "jobs", &jobs)))
        }
        ("POST", ["actions", "runs", run, "cancel"]) => {
            let run = of_repository(world, &level, run)?;
            world.cancel_run(run);
            Ok(Reply::json(202, &json!({})))
        }
        ("POST", ["actions", "runs", run, what @ ("rerun" | "rerun-failed-jobs")]) => {
            let run = of_repository(world, &level, run)?;
            match world.rerun(run, *what == "rerun-failed-jobs") {
                true => Ok(Reply::json(201, &json!({}))),
                false => Err(error(403, "This workflow is already running")),
            }
        }
        ("GET", ["actions", "jobs", job]) => {
            let job = job.parse().ok().and_then(|id: i64| world.jobs.get(&id)).ok_or_else(not_found)?;
            of_repository(world, &level, &job.run.to_string())?;
            Ok(Reply::json(200, &job_json(world, job).ok_or_else(not_found)?))
        }
        _ => Err(not_found()),
    }
}

fn of_repository(world: &World, level: &Level, run: &str) -> Result<i64, Reply> {
    let Level::Repository(owner, name) = level else { return Err(not_found()) };
    let run = run.parse().ok().and_then(|id: i64| world.runs.get(&id)).ok_or_else(not_found)?;
    if run.repository == format!("{owner}/{name}") { Ok(run.id) } else { Err(not_found()) }
}

// Apps and tokens.

/// The App whose token this is.
fn app(world: &World, ask: &Ask) -> Result<i64, Reply> {
    let Some(token) = ask.credential("bearer") else { return Err(error(401, "A JSON web token could not be decoded")) };
    let Ok(token) = Token::parse(token) else { return Err(error(401, "A JSON web token could not be decoded")) };
    let issuer = match &token.claims["iss"] {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let Some(app) = world.apps.values().find(|app| app.client_id == issuer || app.id.to_string() == issuer) else {
        return Err(error(401, "'Issuer' claim ('iss') must be the client ID or the ID of the GitHub App"));
    };
    if !app.keys.iter().any(|key| token.signed_by(key)) {
        return Err(error(401, "A JSON web token could not be decoded"));
    }
    let now = Timestamp::now().as_second();
    match (token.number("iat"), token.number("exp")) {
        (None, _) => Err(error(401, "Missing 'issued at' claim ('iat') in assertion")),
        (_, None) => Err(error(401, "Missing 'expiration time' claim ('exp') in assertion")),
        (Some(iat), _) if iat > now => {
            Err(error(401, "'Issued at' claim ('iat') must be an Integer representing the time that the assertion was issued"))
        }
        (_, Some(exp)) if exp <= now => Err(error(
            401,
            "'Expiration time' claim ('exp') must be a numeric value representing the future time at which the assertion expires",
        )),
        (_, Some(exp)) if exp > now + 600 => Err(error(401, "'Expiration time' claim ('exp') is too far in the future")),
        _ => Ok(app.id),
    }
}

fn access_token(world: &mut World, ask: &Ask, id: &str) -> Answer {
    let app = app(world, ask)?;
    let id: i64 = id.parse().map_err(|_| not_found())?;
    if world.installations.get(&id).is_none_or(|installation| installation.app != app) {
        return Err(not_found());
    }
    // docs.github.com, REST, "Create an installation access token for an app": some repositories and permissions of the installation's.
    let wanted = ask.json();
    let account = world.installations.get(&id).map(|installation| installation.account.to_lowercase()).unwrap_or_default();
    let repositories: Option<Vec<String>> = wanted["repositories"]
        .as_array()
        .map(|names| names.iter().filter_map(Value::as_str).map(|name| format!("{account}/{}", name.to_lowercase())).collect());
    if repositories.iter().flatten().any(|name| !world.repositories.contains_key(name)) {
        return Err(error(422, "There is at least one repository that does not exist or is not accessible to the parent installation."));
    }
    let all = json!({"organization_self_hosted_runners": "write", "actions": "read", "contents": "write", "metadata": "read"});
    let permissions = match wanted["permissions"].as_object() {
        None => all,
        Some(asked) if asked.iter().any(|(name, much)| all[name].is_null() || (*much == "write" && all[name] == "read")) => {
            return Err(error(422, "The permissions requested are not granted to this installation."));
        }
        Some(asked) => {
            let mut given = asked.clone();
            given.insert("metadata".to_owned(), json!("read"));
            Value::Object(given)
        }
    };
    let selection = if repositories.is_some() { "selected" } else { "all" };
    let token = format!("ghs_{}", hex(&random::<18>()));
    let expires = after(world.settings.installation_token);
    let entry = RestToken { installation: Some(id), repositories, expires: Some(expires), used: 0, hour: std::time::Instant::now() };
    world.tokens.insert(token.clone(), entry);
    Ok(Reply::json(
        201,
        &json!({
            "token": token, "expires_at": expires.round(jiff::Unit::Second).unwrap_or(expires).to_string(),
            "permissions": permissions, "repository_selection": selection,
        }),
    ))
}

/// So many seconds from now.
pub(crate) fn after(number: f64) -> Timestamp {
    let duration = SignedDuration::try_from(seconds(number)).unwrap_or_default();
    Timestamp::now().checked_add(duration).unwrap_or(Timestamp::MAX)
}

fn registration_claims(world: &World, level: &Level) -> (Timestamp, Value) {
    let expires = after(world.settings.registration_token);
    let claims = json!({
        "kind": "registration", "level": level.path(), "generation": world.generations.registration, "exp": expires.as_second(),
        "jti": hex(&random::<8>()),
    });
    (expires, claims)
}

/// A token that this simulator made, of this kind and generation, that has not ended.
pub(crate) fn own<'a>(world: &World, token: Option<&'a str>, kind: &str, generation: u64) -> Option<Token<'a>> {
    let token = Token::parse(token?).ok()?;
    let valid = token.made_with(&world.secret)
        && token.claims["kind"] == kind
        && token.claims["generation"] == generation
        && token.number("exp").is_some_and(|exp| exp > Timestamp::now().as_second());
    valid.then_some(token)
}

fn registration(world: &World, ask: &Ask) -> Answer {
    let Some(token) = own(world, ask.credential("remoteauth"), "registration", world.generations.registration) else {
        return Err(error(401, "Bad credentials"));
    };
    let body = ask.json();
    let path = body["url"].as_str().and_then(|url| url.split_once("://")?.1.split_once('/')).map(|(_, path)| path).unwrap_or_default();
    let level = Level::from_path(path).filter(|level| world.exists(level)).ok_or_else(not_found)?;
    if token.claims["level"] != level.path() || body["runner_event"] != "register" {
        return Err(not_found());
    }
    let now = Timestamp::now().as_second();
    let expires = after(world.settings.admin_token).as_second();
    let token = world.own_token(&json!({
        "kind": "admin", "level": level.path(), "generation": world.generations.admin, "iat": now, "nbf": now - 300, "exp": expires,
        "iss": "github-simulator", "jti": hex(&random::<8>()),
    }));
    Ok(Reply::json(
        200,
        &json!({"url": format!("{}/_services/pipelines/{}/", world.url, tenant(&level)), "token": token, "token_schema": "OAuthAccessToken"}),
    ))
}

/// The part of the Actions service's URL that differs between places.
pub(crate) fn tenant(level: &Level) -> String {
    crate::keys::hex(&aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, level.path().as_bytes()).as_ref()[..12])
}

// Runners.

fn runners(world: &mut World, ask: &Ask, level: &Level, rest: &[&str]) -> Answer {
    match (ask.method.as_str(), rest) {
        ("GET", []) => {
            let wanted = ask.parameter("name");
            let found: Vec<Value> = world
                .runners
                .values()
                .filter(|runner| runner.level == *level && wanted.is_none_or(|name| runner.name == name))
                .map(runner_json)
                .collect();
            Ok(Reply::json(200, &page(ask, "runners", &found)))
        }
        ("POST", ["generate-jitconfig"]) => generate(world, ask, level),
        ("GET", [id]) => Ok(Reply::json(200, &runner_json(find_runner(world, level, id)?))),
        ("DELETE", [id]) => {
            let runner = find_runner(world, level, id)?;
            if is_busy(world, runner) {
                return Err(error(422, "Bad request - Runner is currently running a job and cannot be deleted."));
            }
            let id = runner.id;
            world.remove_runner(id);
            Ok(Reply::empty(204))
        }
        _ => Err(not_found()),
    }
}

fn find_runner<'a>(world: &'a World, level: &Level, id: &str) -> Result<&'a Runner, Reply> {
    id.parse().ok().and_then(|id: i64| world.runners.get(&id)).filter(|runner| runner.level == *level).ok_or_else(not_found)
}

/// Whether a runner has started a job.
pub(crate) fn is_busy(world: &World, runner: &Runner) -> bool {
    runner.job.and_then(|job| world.jobs.get(&job)).is_some_and(|job| job.state == State::Running)
}

fn runner_json(runner: &Runner) -> Value {
    let labels: Vec<Value> =
        runner.labels.iter().enumerate().map(|(at, name)| json!({"id": at + 1, "name": name, "type": "custom"})).collect();
    json!({
        "id": runner.id, "name": runner.name, "os": "linux", "status": if runner.session.is_some() { "online" } else { "offline" },
        "busy": runner.job.is_some(), "labels": labels, "runner_group_id": runner.group, "ephemeral": true,
    })
}

fn generate(world: &mut World, ask: &Ask, level: &Level) -> Answer {
    let body = ask.json();
    let labels: Vec<String> = body["labels"]
        .as_array()
        .map(|labels| labels.iter().filter_map(|label| label.as_str().map(str::to_owned)).collect())
        .unwrap_or_default();
    let (Some(name), Some(group)) = (body["name"].as_str().filter(|name| !name.is_empty()), body["runner_group_id"].as_i64()) else {
        return Err(error(422, "Invalid request.\n\n\"name\" and \"runner_group_id\" weren't supplied."));
    };
    if labels.is_empty() || labels.len() > 100 || name.len() > 64 {
        return Err(error(422, "Validation Failed"));
    }
    if world.group(level, group).is_none() {
        return Err(not_found());
    }
    if world.runner_named(level, name).is_some() {
        return Err(error(409, "Already exists - A runner with this name already exists."));
    }
    let folder = body["work_folder"].as_str().unwrap_or("_work").to_owned();
    let (id, configuration) =
        world.register_runner(level.clone(), group, None, name, labels, &folder).map_err(|problem| error(500, &problem.to_string()))?;
    let runner = world.runners.get(&id).map(runner_json);
    Ok(Reply::json(201, &json!({"runner": runner, "encoded_jit_config": configuration})))
}

// Runner groups.

fn groups(world: &World, ask: &Ask, level: &Level, rest: &[&str]) -> Answer {
    let find = |id: &str| id.parse().ok().and_then(|id: i64| world.group(level, id)).ok_or_else(not_found);
    match (ask.method.as_str(), rest) {
        ("GET", []) => {
            let visible = ask.parameter("visible_to_repository").map(str::to_lowercase);
            let found: Vec<Value> = world
                .groups_of(level)
                .iter()
                .filter(|group| {
                    visible
                        .as_ref()
                        .is_none_or(|name| group.visibility != "selected" || group.repositories.iter().any(|of| of.ends_with(name)))
                })
                .map(|group| group_json(world, level, group))
                .collect();
            Ok(Reply::json(200, &page(ask, "runner_groups", &found)))
        }
        ("GET", [id]) => Ok(Reply::json(200, &group_json(world, level, &find(id)?))),
        ("GET", [id, "repositories"]) => {
            let group = find(id)?;
            let found: Vec<Value> =
                group.repositories.iter().filter_map(|key| world.repositories.get(key)).map(|of| repository_json(world, of)).collect();
            Ok(Reply::json(200, &page(ask, "repositories", &found)))
        }
        // docs.github.com, REST, "Self-hosted runner groups" of an enterprise: "List organization access".
        ("GET", [id, "organizations"]) if matches!(level, Level::Enterprise(_)) => {
            let group = find(id)?;
            let found: Vec<Value> = group.organizations.iter().map(|login| account_json(world, login)).collect();
            Ok(Reply::json(200, &page(ask, "organizations", &found)))
        }
        ("GET", [id, "runners"]) => {
            let group = find(id)?;
            let found: Vec<Value> =
                world.runners.values().filter(|runner| runner.level == *level && runner.group == group.id).map(runner_json).collect();
            Ok(Reply::json(200, &page(ask, "runners", &found)))
        }
        _ => Err(not_found()),
    }
}

fn group_json(world: &World, level: &Level, group: &Group) -> Value {
    let url = format!("{}/api/v3/{}/actions/runner-groups/{}", world.url, rest_path(level), group.id);
    let selected = match level {
        Level::Enterprise(_) => ("selected_organizations_url", format!("{url}/organizations")),
        _ => ("selected_repositories_url", format!("{url}/repositories")),
    };
    json!({
        "id": group.id, "name": group.name, "visibility": group.visibility, "default": group.default, "inherited": false,
        "runners_url": format!("{url}/runners"), selected.0: selected.1,
        "allows_public_repositories": group.allows_public_repositories, "restricted_to_workflows": group.restricted_to_workflows,
        "selected_workflows": group.selected_workflows, "workflow_restrictions_read_only": false,
    })
}

fn rest_path(level: &Level) -> String {
    match level {
        Level::Enterprise(slug) => format!("enterprises/{slug}"),
        Level::Organization(login) => format!("orgs/{login}"),
        Level::Repository(owner, name) => format!("repos/{owner}/{name}"),
    }
}

fn page(ask: &Ask, name: &str, all: &[Value]) -> Value {
    let number = |name, default| ask.parameter(name).and_then(|text| text.parse().ok()).unwrap_or(default);
    let size = number("per_page", 30_usize).clamp(1, 100);
    let from = number("page", 1).saturating_sub(1).saturating_mul(size);
    let part: Vec<&Value> = all.iter().skip(from).take(size).collect();
    json!({"total_count": all.len(), name: part})
}

// What things look like.

fn account_json(world: &World, login: &str) -> Value {
    world.organizations.get(&login.to_lowercase()).map_or(Value::Null, |of| {
        json!({"id": of.id, "login": of.login, "type": "Organization", "node_id": format!("O_{}", of.id), "url": format!("{}/api/v3/users/{}", world.url, of.login)})
    })
}

/// A repository.
pub(crate) fn repository_json(world: &World, of: &Repository) -> Value {
    json!({
        "id": of.id, "node_id": format!("R_{}", of.id), "name": of.name, "full_name": of.full_name(), "private": of.private, "fork": of.fork,
        "visibility": if of.private { "private" } else { "public" }, "owner": account_json(world, &of.owner),
        "default_branch": of.default_branch, "archived": false, "disabled": false,
        "html_url": format!("{}/{}", world.url, of.full_name()), "url": format!("{}/api/v3/repos/{}", world.url, of.full_name()),
    })
}

fn run_json(world: &World, id: i64) -> Result<Value, Reply> {
    let run = world.runs.get(&id).ok_or_else(not_found)?;
    let of = world.repositories.get(&run.repository).ok_or_else(not_found)?;
    let jobs: Vec<_> = run.jobs.iter().filter_map(|id| world.jobs.get(id)).collect();
    let (status, conclusion) = if jobs.iter().all(|job| job.state == State::Completed) {
        let with = |wanted: &str| jobs.iter().any(|job| job.conclusion.as_deref() == Some(wanted));
        let conclusion = if with("failure") {
            "failure"
        } else if with("cancelled") {
            "cancelled"
        } else {
            "success"
        };
        ("completed", Some(conclusion))
    } else if jobs.iter().any(|job| job.state == State::Running) {
        ("in_progress", None)
    } else {
        ("queued", None)
    };
    let head = run.event.head_repository.as_ref().and_then(|name| world.repositories.get(&name.to_lowercase())).unwrap_or(of);
    Ok(json!({
        "id": run.id, "name": run.workflow, "path": format!(".github/workflows/{}", run.file), "run_number": run.number, "run_attempt": run.attempt,
        "event": run.event.name, "status": status, "conclusion": conclusion, "head_sha": run.event.sha, "head_branch": head_branch(&run.event),
        "actor": {"login": run.event.actor, "id": run.event.actor_id}, "triggering_actor": {"login": run.event.actor, "id": run.event.actor_id},
        "created_at": run.created.to_string(), "run_started_at": run.created.to_string(),
        "repository": repository_json(world, of), "head_repository": repository_json(world, head),
        "url": format!("{}/api/v3/repos/{}/actions/runs/{}", world.url, of.full_name(), run.id),
        "html_url": format!("{}/{}/actions/runs/{}", world.url, of.full_name(), run.id), "referenced_workflows": [],
    }))
}

fn head_branch(event: &crate::model::Event) -> String {
    if event.head_ref.is_empty() { crate::world::ref_parts(&event.git_ref).1 } else { event.head_ref.clone() }
}

/// A job, as REST shows it and webhooks tell it.
fn job_json(world: &World, job: &Job) -> Option<Value> {
    let run = world.runs.get(&job.run)?;
    let of = world.repositories.get(&run.repository)?;
    let url = format!("{}/api/v3/repos/{}", world.url, of.full_name());
    let time = |time: Option<Timestamp>| time.map(|time| time.to_string());
    let runner = job.runner.clone().filter(|_| job.started.is_some());
    let group = match (&runner, job.set.and_then(|set| world.sets.get(&set))) {
        (Some(_), Some(set)) => world.group(&set.level, set.group),
        (Some(_), None) => Some(Group::default_one()),
        (None, _) => None,
    };
    Some(json!({
        "id": job.id, "run_id": job.run, "run_url": format!("{url}/actions/runs/{}", job.run), "run_attempt": job.attempt,
        "node_id": format!("CR_{}", job.id), "head_sha": run.event.sha, "head_branch": head_branch(&run.event),
        "url": format!("{url}/actions/jobs/{}", job.id), "html_url": format!("{}/{}/actions/runs/{}/job/{}", world.url, of.full_name(), job.run, job.id),
        "status": job.status(), "conclusion": job.conclusion, "created_at": time(job.queued.or(Some(run.created))),
        "started_at": time(job.started.or(job.queued).or(Some(run.created))), "completed_at": time(job.completed),
        "name": job.plan.name, "steps": job.steps, "check_run_url": format!("{url}/check-runs/{}", job.id), "labels": job.plan.labels,
        "runner_id": runner.as_ref().map(|(id, _)| id), "runner_name": runner.as_ref().map(|(_, name)| name),
        "runner_group_id": group.as_ref().map(|group| group.id), "runner_group_name": group.as_ref().map(|group| group.name.clone()),
        "workflow_name": run.workflow,
    }))
}

/// The body of a `workflow_job` webhook.
pub(crate) fn workflow_job_event(world: &World, job: &Job, action: &str) -> Option<Value> {
    let run = world.runs.get(&job.run)?;
    let of = world.repositories.get(&run.repository)?;
    let mut body = json!({
        "action": action, "workflow_job": job_json(world, job)?, "repository": repository_json(world, of),
        "organization": account_json(world, &of.owner), "sender": {"login": run.event.actor, "id": run.event.actor_id, "type": "User"},
    });
    let enterprise = world.organizations.get(&of.owner.to_lowercase()).and_then(|org| org.enterprise.as_ref());
    if let Some(enterprise) = enterprise.and_then(|slug| world.enterprises.get(slug)) {
        body["enterprise"] = json!({"id": enterprise.id, "slug": enterprise.slug, "name": enterprise.slug});
    }
    let installed = world.installations.iter().find(|(_, installation)| installation.account.eq_ignore_ascii_case(&of.owner));
    if let Some((id, _)) = installed {
        body["installation"] = json!({"id": id});
    }
    Some(body)
}
