//! The broker's API: who asks, may it, get it, write it down, hand it out. In this order, and nothing leaves before it is written down.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{ConnectInfo, DefaultBodyLimit, RawQuery, State};
use axum::http::{HeaderMap, header};
use axum::response::Response;
use axum::routing::{get, post};
use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::{ObjectRef, Store};
use mayfly_crds::names::{ANNOTATION_JOB_CLAIMS, LABEL_POOL};
use mayfly_crds::{CredentialBinding, RunnerPool};
use serde::{Serialize, Serializer};
use serde_json::{Value, json};
use tokio::sync::OnceCell;
use tower::limit::GlobalConcurrencyLimitLayer;

use super::decide::{Check, Denial, Grant, PodFacts, Presenter, Public, Question, decide, offers};
use super::issuers::{Issuers, VerifyError};
use super::providers::{Credential, Order, ProviderError, Providers, session_name};
use super::replay::{Replay, SpentKey};
use super::report::Reports;
use super::revoke::{Owed, Revocations};
use super::token::Claims;
use super::wire::{MAX_BODY, TokenRequest, denied, granted, offered};
use crate::audit::{Action, Audit, Event, Program, Request};
use crate::runner::identity::{Identities, IdentityError, PodIdentity};
use crate::runner::{Phase, phase};
use crate::runtime::metrics::Metrics;

/// Requests served at the same time.
const REQUESTS: usize = 512;
/// How long a request may take, the cloud's answer included.
const REQUEST: Duration = Duration::from_secs(25);
/// Answers kept for a pod that asks again: as many, and so long as a token of the longest sound life.
const ANSWERS: u64 = 10_000;
const ANSWER_LIFE: Duration = Duration::from_secs(900);
/// Pods remembered that had something, by binding, and how long after they had it.
const GIVEN: u64 = 100_000;
const GIVEN_LIFE: Duration = Duration::from_secs(13 * 60 * 60);
/// Between two looks at which pods have ended, and revocations at the same time.
const LOOK: Duration = Duration::from_millis(500);
const REVOCATIONS: usize = 16;
/// A credential may be dated so much later than was ordered, in seconds: clocks differ.
const SLACK: i64 = 60;

/// A custom resource as the watch has it: one that cannot be read silences no other.
pub(crate) type Guarded<K> = DeserializeGuard<K>;

/// What the broker knows of the cluster.
#[derive(Clone)]
pub(crate) struct Known {
    pub(crate) pods: Store<Pod>,
    pub(crate) pools: Store<Guarded<RunnerPool>>,
    pub(crate) bindings: Store<Guarded<CredentialBinding>>,
}

/// What a provider gave, once it has.
type Answer = Arc<OnceCell<Arc<Credential>>>;

/// The broker.
pub(crate) struct Broker {
    known: Known,
    identities: Identities,
    issuers: Arc<Issuers>,
    providers: Providers,
    audit: Audit,
    metrics: Metrics,
    replay: Mutex<Replay>,
    /// By spent token, the binding's generation and what was wanted: a pod that asks again, or twice at once, gets the one answer.
    answers: moka::sync::Cache<(SpentKey, i64, String), Answer>,
    /// By pod and binding, who had something: what they get after that is a refreshment.
    given: moka::sync::Cache<(String, String), ()>,
    revocations: Revocations,
    started: i64,
    alone: bool,
    reports: Option<Reports>,
}

/// What the broker is made of.
pub(crate) struct Parts {
    pub(crate) known: Known,
    pub(crate) identities: Identities,
    pub(crate) issuers: Arc<Issuers>,
    pub(crate) providers: Providers,
    pub(crate) audit: Audit,
    pub(crate) metrics: Metrics,
    /// Most spent tokens that are remembered.
    pub(crate) remembered: usize,
    /// No other process gives out credentials.
    pub(crate) alone: bool,
    /// Where refusals are left for the controller; `None` where nobody tells them.
    pub(crate) reports: Option<Reports>,
}

impl Broker {
    /// Remembers nothing yet.
    pub(crate) fn new(parts: Parts) -> Self {
        Self {
            known: parts.known,
            identities: parts.identities,
            issuers: parts.issuers,
            providers: parts.providers,
            audit: parts.audit,
            metrics: parts.metrics,
            replay: Mutex::new(Replay::new(parts.remembered)),
            answers: moka::sync::Cache::builder().max_capacity(ANSWERS).time_to_live(ANSWER_LIFE).build(),
            given: moka::sync::Cache::builder().max_capacity(GIVEN).time_to_idle(GIVEN_LIFE).build(),
            revocations: Revocations::default(),
            started: Timestamp::now().as_second(),
            alone: parts.alone,
            reports: parts.reports,
        }
    }
}

/// The routes.
pub(crate) fn router(broker: Arc<Broker>) -> Router {
    Router::new()
        .route("/v1/token", post(token))
        .route("/v1/bindings", get(bindings))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(GlobalConcurrencyLimitLayer::new(REQUESTS))
        .with_state(broker)
}

/// What is known of a request so far, for the record.
#[derive(Default)]
struct Trail {
    presenter: Option<PodIdentity>,
    pool: Option<String>,
    binding: String,
    claims: Option<Arc<Claims>>,
    grant: Option<Arc<Grant>>,
}

async fn token(State(broker): State<Arc<Broker>>, ConnectInfo(peer): ConnectInfo<SocketAddr>, headers: HeaderMap, body: Bytes) -> Response {
    let request = Request { id: crate::audit::uuid(), ip_address: Some(peer.ip().to_string()) };
    let mut trail = Trail::default();
    let answer = tokio::time::timeout(REQUEST, broker.serve(&headers, &body, &mut trail, &request));
    let late = || Err(Denial::new(Check::Provider, Public::TemporarilyUnavailable, "it took too long"));
    let answer = answer.await.unwrap_or_else(|_| late());
    match answer {
        Ok(credential) => {
            broker.metrics.exchange("granted");
            granted(&credential, Timestamp::now().as_second())
        }
        Err(denial) => {
            broker.metrics.exchange(outcome(&denial));
            if let (None, Some(presenter)) = (&trail.pool, &trail.presenter) {
                trail.pool = broker.pod(presenter).and_then(|pod| pod.pool);
            }
            broker.tell(&denial, &trail, &request).await;
            denied(denial.public, &request.id)
        }
    }
}

/// Tells a pod what there is for its job, or with `?job=any` for any job of its pool. Nothing is given out, and nothing recorded.
async fn bindings(State(broker): State<Arc<Broker>>, headers: HeaderMap, RawQuery(query): RawQuery) -> Response {
    let any_job = query.is_some_and(|query| query == "job=any");
    match tokio::time::timeout(REQUEST, broker.offers(&headers, any_job)).await {
        Ok(Ok(found)) => offered(&found),
        Ok(Err(denial)) => {
            let id = crate::audit::uuid();
            tracing::debug!(request = id, check = ?denial.check, reason = denial.reason, "no bindings told");
            denied(denial.public, &id)
        }
        Err(_) => denied(Public::TemporarilyUnavailable, &crate::audit::uuid()),
    }
}

/// What is known of a pod; `owns` says whether the pool that it names is there and owns it.
pub(crate) fn pod_facts(pod: &Pod, owns: impl Fn(&str) -> bool) -> PodFacts {
    PodFacts {
        namespace: pod.namespace().unwrap_or_default(),
        name: pod.name_any(),
        uid: pod.uid().unwrap_or_default(),
        pool: pod.labels().get(LABEL_POOL).filter(|pool| owns(pool)).cloned(),
        running: running(pod),
        job_claims: pod.annotations().get(ANNOTATION_JOB_CLAIMS).cloned(),
    }
}

/// It has begun, and neither ends nor has ended.
fn running(pod: &Pod) -> bool {
    let begun = pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running");
    begun && matches!(phase(pod), Phase::Alive { .. })
}

fn outcome(denial: &Denial) -> &'static str {
    match (denial.alarm, denial.public) {
        (true, _) => "alarm",
        (false, Public::TemporarilyUnavailable) => "unavailable",
        (false, Public::InvalidRequest | Public::UnsupportedGrantType | Public::InvalidScope) => "invalid",
        (false, Public::InvalidClient) => "unauthorized",
        (false, Public::InvalidTarget | Public::AccessDenied) => "denied",
    }
}

impl Broker {
    async fn serve(&self, headers: &HeaderMap, body: &[u8], trail: &mut Trail, request: &Request) -> Result<Arc<Credential>, Denial> {
        let form = "application/x-www-form-urlencoded";
        let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if kind.split(';').next().unwrap_or_default().trim() != form {
            return Err(Denial::new(Check::Request, Public::InvalidRequest, "the body is no form"));
        }
        let asked = TokenRequest::parse(body)?;
        trail.binding.clone_from(&asked.binding);

        let presenter = self.identities.identify_token(asked.actor_token.reveal()).await.map_err(unknown_pod)?;
        trail.presenter = Some(presenter.clone());

        let claims = self.issuers.verify(asked.subject_token.reveal(), Timestamp::now().as_second()).await.map_err(no_token)?;
        let claims = &*trail.claims.insert(Arc::new(claims)).clone();
        let known = self.binding(&presenter.namespace, &asked.binding);
        let binding = known.as_ref().and_then(|binding| binding.0.as_ref().ok());
        // After everything that is waited for: what holds now is what counts.
        let (pod, now) = (self.pod(&presenter), Timestamp::now().as_second());
        trail.pool = pod.as_ref().and_then(|pod| pod.pool.clone());
        let question = Question {
            token: claims,
            presenter: Presenter { namespace: &presenter.namespace, name: &presenter.name, uid: &presenter.uid },
            pod: pod.as_ref(),
            binding,
            lifetime: asked.lifetime,
            scope: asked.scope.as_deref(),
            itself: asked.itself,
            per_job_claim: self.issuers.have_per_job_claim(&claims.issuer),
            started: self.started,
            alone: self.alone,
            now,
        };
        let grant = decide(&question, &mut self.replay.lock().unwrap_or_else(PoisonError::into_inner))?;
        let grant = &*trail.grant.insert(Arc::new(grant)).clone();
        let Some(binding) = binding else {
            return Err(Denial::new(Check::Binding, Public::InvalidTarget, "the binding is gone"));
        };

        let trail = &*trail;
        let owe = |credential: &Arc<Credential>| {
            self.revocations.owe(Owed {
                pod: presenter.clone(),
                binding: (asked.binding.clone(), grant.binding_uid.clone()),
                provider: binding.spec.provider.clone(),
                credential: credential.clone(),
                event: trail.event(Action::CredentialRevoked, request, Some(credential), None).owned(),
                again: None,
            });
        };
        let credential = self.exchange(&asked, claims, binding, grant, now, owe).await?;
        // The cloud may have taken its time, and the pod may be gone meanwhile.
        if !self.runs(&presenter) {
            return Err(Denial::new(Check::Pod, Public::InvalidClient, "the pod ended before its credential was there"));
        }
        let given = (presenter.uid.clone(), grant.binding_uid.clone());
        let action = match self.given.entry_by_ref(&given).or_insert(()).is_fresh() {
            true => Action::CredentialGranted,
            false => Action::CredentialRefreshed,
        };
        let event = trail.event(action, request, Some(&credential), None);
        if let Err(error) = self.audit.write(&event).await {
            tracing::error!(%error, request = request.id, "nothing leaves");
            self.given.invalidate(&given);
            return Err(Denial::new(Check::Audit, Public::TemporarilyUnavailable, "the audit record could not be written"));
        }
        Ok(credential)
    }

    async fn offers(&self, headers: &HeaderMap, any_job: bool) -> Result<Vec<CredentialBinding>, Denial> {
        let authorization = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let presenter = self.identities.identify(authorization).await.map_err(unknown_pod)?;
        let pod = self.pod(&presenter);
        let all = self.known.bindings.state();
        let sound = all.iter().filter_map(|binding| binding.0.as_ref().ok());
        let own = sound.filter(|binding| binding.metadata.namespace.as_ref() == Some(&presenter.namespace));
        let who = Presenter { namespace: &presenter.namespace, name: &presenter.name, uid: &presenter.uid };
        let mut found: Vec<CredentialBinding> = offers(who, pod.as_ref(), own, any_job)?.into_iter().cloned().collect();
        found.sort_by_key(ResourceExt::name_any);
        Ok(found)
    }

    /// Revokes what pods had that are no longer, as long as the process lives.
    pub(crate) async fn keep_revoking(&self) {
        loop {
            tokio::time::sleep(LOOK).await;
            self.revoke_what_is_due().await;
        }
    }

    /// How many credentials would be revoked if this process went on.
    pub(crate) fn unrevoked(&self) -> usize {
        self.revocations.len()
    }

    /// What belonged to a pod that does not run any more, or came of a binding that is gone. What could not be revoked is due again.
    async fn revoke_what_is_due(&self) {
        let due = self.revocations.due(Timestamp::now().as_second(), |owed| {
            let (name, uid) = &owed.binding;
            let sound = |binding: &Guarded<CredentialBinding>| binding.0.is_ok() && binding.uid().as_ref() == Some(uid);
            !self.runs(&owed.pod) || !self.binding(&owed.pod.namespace, name).is_some_and(|binding| sound(&binding))
        });
        futures::stream::iter(due).for_each_concurrent(REVOCATIONS, |owed| self.revoke(owed)).await;
    }

    async fn revoke(&self, owed: Owed) {
        let (id, pod, binding) = (&owed.event.request.id, &owed.pod, &owed.binding.0);
        let error = match self.providers.revoke(&owed.provider, &owed.credential.value).await {
            Ok(()) => None,
            Err(error @ ProviderError::Unavailable(_)) => {
                tracing::warn!(request = id, pod = pod.name, binding, %error, "a credential is not revoked yet");
                return self.revocations.owe(owed.later());
            }
            Err(error) => {
                tracing::error!(request = id, pod = pod.name, binding, %error, "a credential is not revoked, and lives until its end");
                Some(error.to_string())
            }
        };
        let mut event = owed.event;
        event.success = error.is_none();
        event.payload["error"] = json!(error);
        self.audit.tell(&event).await;
    }

    /// One exchange for one token, however often its pod asks; `owe` is told of what has to be revoked, before anything is waited for.
    async fn exchange(
        &self,
        asked: &TokenRequest,
        claims: &Claims,
        binding: &CredentialBinding,
        grant: &Grant,
        now: i64,
        owe: impl Fn(&Arc<Credential>),
    ) -> Result<Arc<Credential>, Denial> {
        let claim = |name: &str| claims.get(name).unwrap_or_default();
        let session = session_name(claim("run_id"), claim("run_attempt"), claim("check_run_id"));
        let order = Order {
            provider: &binding.spec.provider,
            token: &asked.subject_token,
            token_expires: claims.expires,
            itself: grant.itself,
            scopes: &grant.scopes,
            lifetime: grant.lifetime,
            session: &session,
            now,
        };
        let wanted = if grant.itself { "itself".to_owned() } else { grant.scopes.join(" ") };
        let answer = self.answers.get_with((claims.spent_as(), grant.generation, wanted), Arc::default);
        let exchange = async || {
            let credential = Arc::new(self.providers.exchange(&order).await?);
            if credential.revocable {
                owe(&credential);
            }
            Ok(credential)
        };
        let credential = answer.get_or_try_init(exchange).await.map_err(|error| {
            let public = match &error {
                ProviderError::Refused(_) => Public::AccessDenied,
                ProviderError::Unavailable(_) => Public::TemporarilyUnavailable,
            };
            Denial::new(Check::Provider, public, error.to_string())
        })?;
        if credential.expires <= now {
            return Err(Denial::new(Check::Provider, Public::InvalidRequest, "the credential of this token has ended"));
        }
        if credential.expires > now + i64::from(grant.lifetime) + SLACK {
            return Err(Denial::new(Check::Provider, Public::AccessDenied, "the provider gave more life than was ordered"));
        }
        Ok(credential.clone())
    }

    /// The pod as the watch knows it.
    fn pod(&self, identity: &PodIdentity) -> Option<PodFacts> {
        let pod = self.known.pods.get(&ObjectRef::<Pod>::new(&identity.name).within(&identity.namespace))?;
        Some(pod_facts(&pod, |pool| self.owns(&identity.namespace, pool, &pod)))
    }

    /// A label anybody could have written; an owner by UID is the pool that is there.
    fn owns(&self, namespace: &str, pool: &str, pod: &Pod) -> bool {
        let known = self.known.pools.get(&ObjectRef::<Guarded<RunnerPool>>::new(pool).within(namespace));
        let uid = known.and_then(|pool| pool.uid());
        uid.is_some_and(|uid| pod.owner_references().iter().any(|owner| owner.kind == "RunnerPool" && owner.uid == uid))
    }

    /// The binding, which may be unsound.
    fn binding(&self, namespace: &str, name: &str) -> Option<Arc<Guarded<CredentialBinding>>> {
        self.known.bindings.get(&ObjectRef::<Guarded<CredentialBinding>>::new(name).within(namespace))
    }

    /// Whether this very pod still runs.
    fn runs(&self, identity: &PodIdentity) -> bool {
        let pod = self.known.pods.get(&ObjectRef::<Pod>::new(&identity.name).within(&identity.namespace));
        pod.is_some_and(|pod| pod.metadata.uid.as_ref() == Some(&identity.uid) && running(&pod))
    }

    /// Logs and records that nothing was given out.
    async fn tell(&self, denial: &Denial, trail: &Trail, request: &Request) {
        let pod = trail.presenter.as_ref().map(|pod| format!("{}/{}", pod.namespace, pod.name)).unwrap_or_default();
        let (id, binding, check, reason) = (&request.id, &trail.binding, denial.check, &denial.reason);
        match denial.alarm {
            true => tracing::error!(request = id, pod, binding, ?check, reason, "ALARM: a token is not where it belongs"),
            false => tracing::info!(request = id, pod, binding, ?check, reason, "no credential"),
        }
        // Callers that nobody knows are counted and logged, not recorded: anybody who reaches the port could fill the trail.
        let Some(presenter) = &trail.presenter else { return };
        if let Some(reports) = &self.reports {
            reports.leave(presenter, &trail.binding, denial, request);
        }
        if denial.check == Check::Audit {
            return;
        }
        self.audit.tell(&trail.event(Action::CredentialDenied, request, None, Some(denial))).await;
    }
}

impl Trail {
    /// The record of what came of it.
    fn event<'a>(
        &'a self,
        action: Action,
        request: &Request,
        credential: Option<&'a Credential>,
        denial: Option<&'a Denial>,
    ) -> Event<Actor<'a>, Target<'a>, Scope<'a>, Payload<'a>> {
        let presenter = self.presenter.as_ref();
        let namespace = presenter.map(|pod| pod.namespace.as_str());
        let grant = self.grant.as_deref();
        Event {
            action,
            actor: Actor {
                kind: "Pod",
                namespace,
                name: presenter.map(|pod| pod.name.as_str()),
                uid: presenter.map(|pod| pod.uid.as_str()),
            },
            target: Target {
                kind: "CredentialBinding",
                name: &self.binding,
                uid: grant.map(|grant| grant.binding_uid.as_str()),
                generation: grant.map(|grant| grant.generation),
            },
            scope: Scope { namespace, pool: self.pool.as_deref() },
            payload: Payload {
                token: self.claims.as_deref().map(TokenRecord::of),
                grant,
                credential: credential.map(|credential| Given { expires: credential.expires, about: &credential.about }),
                denial,
            },
            metadata: Program::THIS,
            success: denial.is_none(),
            request: request.clone(),
        }
    }
}

/// The pod that asked.
#[derive(Serialize)]
struct Actor<'a> {
    kind: &'static str,
    namespace: Option<&'a str>,
    name: Option<&'a str>,
    uid: Option<&'a str>,
}

/// The binding it asked for.
#[derive(Serialize)]
struct Target<'a> {
    kind: &'static str,
    name: &'a str,
    uid: Option<&'a str>,
    generation: Option<i64>,
}

#[derive(Serialize)]
struct Scope<'a> {
    namespace: Option<&'a str>,
    pool: Option<&'a str>,
}

#[derive(Serialize)]
struct Payload<'a> {
    token: Option<TokenRecord<'a>>,
    grant: Option<&'a Grant>,
    credential: Option<Given<'a>>,
    denial: Option<&'a Denial>,
}

/// What was given: when it ends and what it is, and nothing of it.
#[derive(Serialize)]
struct Given<'a> {
    expires: i64,
    about: &'a Value,
}

/// What records say of a token: its digest, and whose job it is of.
#[derive(Serialize)]
struct TokenRecord<'a> {
    sha256: String,
    issuer: &'a str,
    audience: &'a str,
    subject: &'a str,
    jti: Option<&'a str>,
    expires: i64,
    job: JobOf<'a>,
}

/// The claims that say whose job it is, as far as the token has them.
struct JobOf<'a>(&'a Claims);

impl<'a> TokenRecord<'a> {
    fn of(claims: &'a Claims) -> Self {
        Self {
            sha256: claims.digest_text(),
            issuer: &claims.issuer,
            audience: &claims.audience,
            subject: &claims.subject,
            jti: claims.jti.as_deref(),
            expires: claims.expires,
            job: JobOf(claims),
        }
    }
}

impl JobOf<'_> {
    const NAMES: [&'static str; 10] = [
        "repository",
        "repository_id",
        "run_id",
        "run_attempt",
        "check_run_id",
        "event_name",
        "ref",
        "environment",
        "job_workflow_ref",
        "actor_id",
    ];
}

impl Serialize for JobOf<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(Self::NAMES.iter().filter_map(|name| Some((name, self.0.get(name)?))))
    }
}

fn unknown_pod(error: IdentityError) -> Denial {
    match error {
        IdentityError::Refused(why) => Denial::new(Check::PodToken, Public::InvalidClient, why),
        IdentityError::Unavailable(error) => Denial::new(Check::PodToken, Public::TemporarilyUnavailable, error.to_string()),
    }
}

fn no_token(error: VerifyError) -> Denial {
    let public = match error {
        VerifyError::Unavailable => Public::TemporarilyUnavailable,
        VerifyError::Token(_) | VerifyError::Untrusted | VerifyError::UnknownKey => Public::InvalidRequest,
    };
    Denial::new(Check::Token, public, error.to_string())
}

#[cfg(test)]
mod figures;
#[cfg(test)]
mod tests;
