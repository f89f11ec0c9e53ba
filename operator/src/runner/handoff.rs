//! The gate API: a pod that proves who it is gets a registration, once, when a job is owed.
//!
//! Every call is a POST with `Authorization: Bearer <projected token>`. Answers that all calls have: 401 no pod of ours; 410 nothing
//! more for this pod; 503 try again in a moment.
//!
//! - `/v1/challenge`, no body: 200 with what the pod has to try (JSON, [`mayfly_proof::Challenge`]).
//! - `/v1/proof`, body [`mayfly_proof::Report`]: 204 taken; 409 not an answer to the last challenge, or the policies changed meanwhile.
//! - `/v1/registration`, no body: 200 with the registration as the runner program reads it; 204 no job yet, ask again; 428 prove
//!   first.
//! - `/v1/control`, body [`mayfly_proof::Looked`] or none, from sentinels alone: 200 with what to try next ([`mayfly_proof::Look`]); 204 nothing
//!   yet, ask again.
//! - `/v1/id-token`, body `{"audience": "..."}`: 200 with an OIDC token of the pod's job, for pools whose jobs get theirs from Mayfly; 400 no
//!   audience; 403 this job gets none. That a pool is one of those is said with the registration, in the header [`ID_TOKENS`].
//! - `/v1/ended`, no body: the runner's program has ended; 204 heard.
//! - `/v1/job`, no body: 200 with the job that the pod's runner has, in words, when the pool has accepted it; 204 not yet, ask again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::runtime::reflector::ObjectRef;
use mayfly_crds::JobIssuer;
use mayfly_crds::names::{ANNOTATION_JOB_CLAIMS, GATE_AUDIENCE, LABEL_POOL};
use mayfly_proof::{Challenge, Look, Looked, Report};
use serde::Deserialize;
use serde_json::json;
use tower::limit::GlobalConcurrencyLimitLayer;

use super::identity::{Identities, IdentityError, PodIdentity};
use super::state::{Phase, phase};
use crate::audit::Action;
use crate::forge::{Forge, Secret};
use crate::issuer::MintError;
use crate::pool::proof::{self as pool, Taken};
use crate::pool::{Context, NoJob, OwedJob, PoolHandle, PoolKey, runner_target};

/// How long a gate's question is kept open when no job is owed.
const PATIENCE: Duration = Duration::from_secs(50);
/// Longest report, in bytes.
const MAX_REPORT: usize = 64 << 10;
/// Header of a registration whose job gets OIDC tokens here.
const ID_TOKENS: &str = "mayfly-id-tokens";
/// Longest question for a token, in bytes.
const MAX_QUESTION: usize = 2 << 10;
/// Sentinels served at the same time: one a node.
const SENTINELS: usize = 8_192;
/// Gates served at the same time.
const GATES: usize = 4_096;

/// What the API works with.
pub(crate) struct GateApi {
    ctx: Arc<Context>,
    identities: Identities,
}

/// The routes.
pub(crate) fn router(ctx: Arc<Context>) -> Router {
    let identities = Identities::new(ctx.io.clone(), GATE_AUDIENCE);
    let api = Arc::new(GateApi { ctx, identities });
    let sentinels = Router::new()
        .route("/v1/control", post(control).layer(DefaultBodyLimit::max(MAX_REPORT)))
        .layer(GlobalConcurrencyLimitLayer::new(SENTINELS));
    Router::new()
        .route("/v1/registration", post(registration).layer(DefaultBodyLimit::max(0)))
        .route("/v1/id-token", post(id_token).layer(DefaultBodyLimit::max(MAX_QUESTION)))
        .route("/v1/job", post(job).layer(DefaultBodyLimit::max(0)))
        .route("/v1/ended", post(ended).layer(DefaultBodyLimit::max(0)))
        .route("/v1/challenge", post(challenge).layer(DefaultBodyLimit::max(0)))
        .route("/v1/proof", post(proof).layer(DefaultBodyLimit::max(MAX_REPORT)))
        .layer(GlobalConcurrencyLimitLayer::new(GATES))
        .merge(sentinels)
        .with_state(api)
}

/// What a token is to be good for.
#[derive(Deserialize)]
struct Wanted {
    audience: String,
}

/// An answer other than a registration.
struct Refusal(StatusCode, &'static str);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, self.1).into_response()
    }
}

async fn registration(State(api): State<Arc<GateApi>>, headers: HeaderMap) -> Result<Response, Refusal> {
    let answer = hand_over(&api, &headers).await;
    let outcome = match &answer {
        Ok(_) => "handed_over",
        Err(Refusal(StatusCode::NO_CONTENT, _)) => "no_job_yet",
        Err(Refusal(StatusCode::PRECONDITION_REQUIRED, _)) => "unproved",
        Err(Refusal(StatusCode::UNAUTHORIZED, _)) => "unauthorized",
        Err(Refusal(StatusCode::GONE, _)) => "refused",
        Err(_) => "unavailable",
    };
    api.ctx.metrics.hand_over(outcome);
    answer
}

/// What the pod has to try.
async fn challenge(State(api): State<Arc<GateApi>>, headers: HeaderMap) -> Result<Json<Challenge>, Refusal> {
    let (_, pod, handle) = caller(&api, &headers).await?;
    match pool::ask(&api.ctx, &handle, &pod).await {
        Ok(Some(challenge)) => Ok(Json(challenge)),
        Ok(None) => {
            Err(Refusal(StatusCode::SERVICE_UNAVAILABLE, "the pool's policies, the pod's node or what answers there are not known yet"))
        }
        Err(error) => {
            tracing::error!(error, "the list of metadata endpoints");
            Err(Refusal(StatusCode::SERVICE_UNAVAILABLE, "the operator has nothing to try"))
        }
    }
}

/// What the pod found.
async fn proof(State(api): State<Arc<GateApi>>, headers: HeaderMap, report: Json<Report>) -> Result<StatusCode, Refusal> {
    let (_, pod, handle) = caller(&api, &headers).await?;
    let taken = pool::take(&api.ctx, &handle, &pod, &report).await;
    let outcome = match &taken {
        Taken::Enough => "enough",
        Taken::NotEnough(_) => "not_enough",
        Taken::Stale => "stale",
    };
    api.ctx.metrics.proof(outcome, report.took_ms);
    match taken {
        Taken::Enough => Ok(StatusCode::NO_CONTENT),
        Taken::NotEnough(_) => Err(Refusal(StatusCode::GONE, "the pod is not shown to be isolated")),
        Taken::Stale => Err(Refusal(StatusCode::CONFLICT, "ask for another challenge")),
    }
}

/// What a sentinel is to try next, where it is.
async fn control(State(api): State<Arc<GateApi>>, headers: HeaderMap, body: axum::body::Bytes) -> Result<Json<Look>, Refusal> {
    let account = &api.ctx.settings.sentinel_account;
    let caller = api.identities.of_account(authorization(&headers), account).await.map_err(refused)?;
    let node = caller.node.ok_or(Refusal(StatusCode::UNAUTHORIZED, "the API server does not say which node the token's pod is on"))?;
    let found: Option<Looked> = match body.is_empty() {
        true => None,
        false => Some(serde_json::from_slice(&body).map_err(|_| Refusal(StatusCode::BAD_REQUEST, "not what was asked for"))?),
    };
    api.ctx.controls.serve(&node, found).await.map(Json).ok_or(Refusal(StatusCode::NO_CONTENT, ""))
}

fn authorization(headers: &HeaderMap) -> Option<&str> {
    headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok())
}

fn refused(error: IdentityError) -> Refusal {
    match error {
        IdentityError::Refused(why) => Refusal(StatusCode::UNAUTHORIZED, why),
        IdentityError::Unavailable(error) => {
            tracing::warn!(%error, "a token could not be reviewed");
            Refusal(StatusCode::SERVICE_UNAVAILABLE, "the token could not be reviewed")
        }
    }
}

/// Who calls: the pod as it proved to be, as the watch knows it, and its pool.
async fn caller(api: &GateApi, headers: &HeaderMap) -> Result<(PodIdentity, Arc<Pod>, Arc<PoolHandle>), Refusal> {
    let identity = api.identities.identify(authorization(headers)).await.map_err(refused)?;
    let (pod, handle) = pool_of(&api.ctx, &identity)?;
    Ok((identity, pod, handle))
}

/// The job, once it was accepted: what the runner's first step waits for.
async fn job(State(api): State<Arc<GateApi>>, headers: HeaderMap) -> Result<String, Refusal> {
    let (pod, _, handle) = caller(&api, &headers).await?;
    handle.accepted_job(&pod.name, PATIENCE).await.map(|job| job.to_string()).map_err(Refusal::from)
}

/// A reason to look at the pod's job now. Whether it is over, the forge says.
async fn ended(State(api): State<Arc<GateApi>>, headers: HeaderMap) -> Result<StatusCode, Refusal> {
    let (pod, _, handle) = caller(&api, &headers).await?;
    handle.hint_of(&pod.name);
    api.ctx.registry.wake(handle.key.clone());
    Ok(StatusCode::NO_CONTENT)
}

/// A token that says which job this is. Nobody but the gate of the pod that has the job gets one.
async fn id_token(State(api): State<Arc<GateApi>>, headers: HeaderMap, wanted: Json<Wanted>) -> Result<Response, Refusal> {
    let minted = mint(&api, &headers, &wanted.audience).await;
    api.ctx.metrics.id_token(if minted.is_ok() { "minted" } else { "refused" });
    let headers = [(header::CONTENT_TYPE, "application/jwt"), (header::CACHE_CONTROL, "no-store")];
    minted.map(|token| (headers, token.reveal().to_owned()).into_response())
}

async fn mint(api: &GateApi, headers: &HeaderMap, audience: &str) -> Result<Secret, Refusal> {
    let (identity, pod, handle) = caller(api, headers).await?;
    let none = Refusal(StatusCode::FORBIDDEN, "the jobs of this pool get no tokens of Mayfly's");
    let issuer = api.ctx.issuer.as_ref().filter(|_| handle.state().job_issuer == JobIssuer::Mayfly).ok_or(none)?;
    let wait = || Refusal(StatusCode::SERVICE_UNAVAILABLE, "it is not known yet which job the pod has");
    let job = handle.job_for_tokens(&identity.name).map_err(|no| match no {
        NoJob::Never(why) => Refusal(StatusCode::FORBIDDEN, why),
        NoJob::NotYet | NoJob::Unproved => wait(),
    })?;
    // What the broker will hold the token against.
    let record = pod.annotations().get(ANNOTATION_JOB_CLAIMS).ok_or_else(wait)?;
    let record: BTreeMap<String, String> =
        serde_json::from_str(record).map_err(|_| Refusal(StatusCode::FORBIDDEN, "the record of the pod's job cannot be read"))?;
    let of_this_job = |name: &str, value: &str| record.get(name).map(String::as_str) == Some(value);
    if !of_this_job("check_run_id", &job.id.to_string()) || !of_this_job("repository", job.repository.as_str()) {
        return Err(Refusal(StatusCode::FORBIDDEN, "the record of the pod's job is another job's"));
    }
    let minted = issuer.mint(&record, audience, api.ctx.now());
    match &minted {
        Ok(_) => tracing::info!(pool = %handle.key, pod = identity.name, %job, audience, "made a token of the job"),
        Err(error) => tracing::warn!(pool = %handle.key, pod = identity.name, %job, %error, "no token of the job"),
    }
    minted.map_err(|error| match error {
        MintError::Audience => Refusal(StatusCode::BAD_REQUEST, "this is no audience"),
        MintError::Record => Refusal(StatusCode::FORBIDDEN, "the record of the pod's job is not this issuer's"),
        MintError::Signing(_) => Refusal(StatusCode::SERVICE_UNAVAILABLE, "the token could not be signed"),
    })
}

impl From<NoJob> for Refusal {
    fn from(no: NoJob) -> Self {
        match no {
            NoJob::NotYet => Self(StatusCode::NO_CONTENT, ""),
            NoJob::Unproved => Self(StatusCode::PRECONDITION_REQUIRED, "prove the pod's isolation first"),
            NoJob::Never(why) => Self(StatusCode::GONE, why),
        }
    }
}

async fn hand_over(api: &GateApi, headers: &HeaderMap) -> Result<Response, Refusal> {
    let (pod, _, handle) = caller(api, headers).await?;
    let now = api.ctx.now();
    let job = handle.take_job(&pod.name, &pod.uid, now, PATIENCE).await.map_err(Refusal::from)?;
    let (forge, issuer) = {
        let state = handle.state();
        (state.link.as_ref().map(|link| link.forge.clone()), state.job_issuer)
    };
    let Some(forge) = forge else {
        handle.registration_failed(&pod.name, "the pool lost its forge");
        return Err(Refusal(StatusCode::GONE, "the pool lost its forge"));
    };
    // From here on the caller may vanish at any moment; what was begun is finished and remembered all the same.
    let ctx = api.ctx.clone();
    let task = api.ctx.tasks.spawn(async move { register(&ctx, &handle, forge.as_ref(), &pod, &job).await });
    let secret = task.await.map_err(|_| Refusal(StatusCode::GONE, "the registration was interrupted"))??;
    let headers = [(header::CONTENT_TYPE, "application/octet-stream"), (header::CACHE_CONTROL, "no-store")];
    let mut answer = (headers, secret.reveal().to_owned()).into_response();
    if api.ctx.issuer.is_some() && issuer == JobIssuer::Mayfly {
        answer.headers_mut().insert(ID_TOKENS, HeaderValue::from_static("mayfly"));
    }
    Ok(answer)
}

/// Registers a runner, and returns what its program reads. That is written down before anything of it leaves; where it cannot be, the
/// registration is taken back.
async fn register(ctx: &Context, handle: &PoolHandle, forge: &dyn Forge, pod: &PodIdentity, job: &OwedJob) -> Result<Secret, Refusal> {
    let failed = |why: &str, told: &'static str| {
        handle.registration_failed(&pod.name, why);
        ctx.registry.wake(handle.key.clone());
        Err(Refusal(StatusCode::GONE, told))
    };
    let registration = match forge.register(&job.reach, &pod.name).await {
        Ok(registration) => registration,
        Err(error) => {
            tracing::warn!(pool = %handle.key, pod = pod.name, job = %job, %error, "a runner could not be registered");
            return failed(&error.to_string(), "the forge did not register the runner");
        }
    };
    let payload = json!({"registration": registration.key.id, "job": job.to_string()});
    let event = ctx.event(Action::RunnerRegistered, &handle.key, runner_target(&pod.name, &pod.uid)).about(payload, true);
    if let Err(error) = ctx.audit.write(&event).await {
        tracing::error!(pool = %handle.key, pod = pod.name, %error, "nothing leaves: the registration is taken back");
        if let Err(error) = forge.deregister(&registration.key).await {
            tracing::warn!(pool = %handle.key, pod = pod.name, %error, "it is left to the sweep");
        }
        return failed("the audit record could not be written", "the registration could not be recorded");
    }
    tracing::info!(pool = %handle.key, pod = pod.name, job = %job, runner = registration.key.id, "registered a runner");
    handle.registered(&pod.name, registration.key, registration.credential, ctx.now());
    Ok(registration.hand_over)
}

/// The living pod, and the pool whose it is.
fn pool_of(ctx: &Context, identity: &PodIdentity) -> Result<(Arc<Pod>, Arc<PoolHandle>), Refusal> {
    let reference = ObjectRef::new(&identity.name).within(&identity.namespace);
    // A pod younger than the watch's last news comes back in a moment.
    let Some(pod) = ctx.pods.get(&reference).filter(|pod| pod.uid().as_deref() == Some(&identity.uid)) else {
        return Err(Refusal(StatusCode::SERVICE_UNAVAILABLE, "the pod is not known yet"));
    };
    if !matches!(phase(&pod), Phase::Alive { .. }) {
        return Err(Refusal(StatusCode::GONE, "the pod is ending"));
    }
    let name = pod.labels().get(LABEL_POOL).cloned().unwrap_or_default();
    let handle = ctx.registry.get(&PoolKey { namespace: identity.namespace.clone(), name });
    let handle = handle
        .filter(|handle| pod.owner_references().iter().any(|owner| owner.uid == handle.uid))
        .ok_or(Refusal(StatusCode::GONE, "the pod belongs to no pool"))?;
    Ok((pod, handle))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::Ordering;

    use async_trait::async_trait;
    use jiff::Timestamp;

    use super::*;
    use crate::audit::Audit;
    use crate::audit::tests::Memory;
    use crate::forge::{ForgeError, Job, JobKey, JobState, Reach, RegisteredRunner, Registration, Removal, Repository, Run, RunnerKey};
    use crate::kube_io::scripted::Server;
    use crate::pool::{Spawned, context};

    /// A forge that registers and removes, and is asked for nothing else.
    #[derive(Debug, Default)]
    struct Register(Mutex<Vec<String>>);

    impl Register {
        fn note(&self, what: String) {
            self.0.lock().expect("no panic").push(what);
        }
    }

    #[async_trait]
    impl Forge for Register {
        async fn register(&self, _: &Reach, name: &str) -> Result<Registration, ForgeError> {
            self.note(format!("register {name}"));
            let key = RunnerKey { repository: None, id: 7 };
            Ok(Registration { key, hand_over: Secret::new("hunter2"), credential: Secret::new("hunter3") })
        }

        async fn deregister(&self, runner: &RunnerKey) -> Result<Removal, ForgeError> {
            self.note(format!("deregister {}", runner.id));
            Ok(Removal::Done)
        }

        async fn jobs(&self, _: JobState) -> Result<Vec<Job>, ForgeError> {
            Ok(Vec::new())
        }

        async fn job(&self, _: &JobKey) -> Result<Option<Job>, ForgeError> {
            Ok(None)
        }

        async fn run(&self, _: &Repository, _: u64) -> Result<Run, ForgeError> {
            Err(ForgeError::Unexpected("it was not to be asked".to_owned()))
        }

        fn reach(&self, _: &Job) -> Reach {
            Reach::default()
        }

        async fn runners(&self) -> Result<Vec<RegisteredRunner>, ForgeError> {
            Ok(Vec::new())
        }
    }

    #[tokio::test]
    async fn a_registration_that_nobody_wrote_down_does_not_leave() {
        let trail = Memory::default();
        let ctx = Arc::new(Context { audit: Audit::new(trail.clone()), ..Arc::into_inner(context(&Server::new([]), &[])).expect("one") });
        let handle = ctx.registry.open(&PoolKey { namespace: "ci".to_owned(), name: "linux".to_owned() }, "u-1");
        let job = OwedJob { key: None, reach: Reach::default() };
        let pod = PodIdentity { namespace: "ci".to_owned(), name: "linux-1".to_owned(), uid: "uid-1".to_owned() };
        let waits = || Spawned {
            uid: "uid-1".to_owned(),
            created: Timestamp::UNIX_EPOCH,
            seen: true,
            asked: None,
            registering: Some(job.clone()),
            burnt: None,
            only_on: None,
        };
        let forge = Register::default();

        handle.state().spawned.insert(pod.name.clone(), waits());
        trail.fails.store(true, Ordering::SeqCst);
        let refused = register(&ctx, &handle, &forge, &pod, &job).await.err().map(|refusal| refusal.0);
        assert_eq!(refused, Some(StatusCode::GONE));
        assert_eq!(*forge.0.lock().expect("no panic"), ["register linux-1", "deregister 7"]);
        {
            let state = handle.state();
            assert!(state.registered.is_empty() && state.spawned["linux-1"].burnt.is_some());
            assert_eq!(state.owed.len(), 1, "the job is owed again");
        }

        handle.state().spawned.insert(pod.name.clone(), waits());
        trail.fails.store(false, Ordering::SeqCst);
        assert!(register(&ctx, &handle, &forge, &pod, &job).await.is_ok_and(|secret| secret.reveal() == "hunter2"));
        let [record] = &trail.records()[..] else { panic!("{:?}", trail.records()) };
        assert_eq!((&record["action"], &record["target"]["uid"]), (&json!("runner.registered"), &json!("uid-1")));
        assert_eq!((&record["scope"], &record["payload"]["registration"]), (&json!({"namespace": "ci", "pool": "linux"}), &json!(7)));
        assert!(!record.to_string().contains("hunter"));
    }
}
