//! What the broker refused becomes an event of the binding, or of the pool where there is no such binding.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::routing::post;
use axum::{Json, Router};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::reflector::ObjectRef;
use kube::{Resource, ResourceExt};
use mayfly_crds::names::{GATE_AUDIENCE, LABEL_POOL};
use mayfly_crds::{CredentialBinding, RunnerPool};
use tower::limit::GlobalConcurrencyLimitLayer;

use crate::credentials::Refusal;
use crate::pool::Context;
use crate::runner::identity::{Identities, IdentityError};

/// Longest list, in bytes.
const MAX_BODY: usize = 256 << 10;
/// Requests served at the same time: whoever reaches the gate API reaches this.
const REQUESTS: usize = 16;
/// Events that a namespace gets in a minute: a job that asks in a loop must not fill the cluster with them.
const EVENTS: u32 = 10;

struct Desk {
    ctx: Arc<Context>,
    identities: Identities,
    /// User name of the broker.
    broker: String,
    /// Events of the last minute, by namespace.
    told: moka::sync::Cache<String, Arc<AtomicU32>>,
}

/// The route, of the gate API: `POST /v1/refusals` (see `credentials/report.rs`).
pub(super) fn router(ctx: Arc<Context>, broker: String) -> Router {
    let identities = Identities::new(ctx.io.clone(), GATE_AUDIENCE);
    let told = moka::sync::Cache::builder().max_capacity(10_000).time_to_live(Duration::from_secs(60)).build();
    let desk = Arc::new(Desk { ctx, identities, broker, told });
    Router::new()
        .route("/v1/refusals", post(refusals))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(GlobalConcurrencyLimitLayer::new(REQUESTS))
        .with_state(desk)
}

async fn refusals(State(desk): State<Arc<Desk>>, headers: HeaderMap, body: axum::body::Bytes) -> StatusCode {
    let authorization = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    match desk.identities.of_account(authorization, &desk.broker).await {
        Ok(_) => {}
        Err(IdentityError::Refused(_)) => return StatusCode::UNAUTHORIZED,
        Err(IdentityError::Unavailable(_)) => return StatusCode::SERVICE_UNAVAILABLE,
    }
    let Ok(Json(refusals)) = Json::<Vec<Refusal>>::from_bytes(&body) else { return StatusCode::BAD_REQUEST };
    for refusal in refusals {
        let told = desk.told.get_with(refusal.namespace.clone(), Arc::default);
        if told.fetch_add(1, Ordering::Relaxed) < EVENTS {
            tell(&desk.ctx, &refusal).await;
        }
    }
    StatusCode::NO_CONTENT
}

async fn tell(ctx: &Context, refusal: &Refusal) {
    let Refusal { namespace, pod, binding, reason, correlation_id, .. } = refusal;
    let Some(reference) = about(ctx, refusal) else { return };
    let note = format!("pod {pod} got nothing by CredentialBinding {binding} in {namespace}: {reason} (correlation id {correlation_id})");
    match refusal.alarm {
        true => ctx.io.warn(&reference, "TokenMisused", "Refuse", &note).await,
        false => ctx.io.warn(&reference, "CredentialDenied", "Refuse", &note).await,
    }
}

/// The binding, or else the pool of the pod.
fn about(ctx: &Context, refusal: &Refusal) -> Option<ObjectReference> {
    let Refusal { namespace, binding, pod, .. } = refusal;
    let known = ctx.bindings.as_ref().and_then(|all| all.get(&ObjectRef::new(binding).within(namespace)));
    if let Some(binding) = known.and_then(|known| known.0.clone().ok()) {
        return Some(CredentialBinding::object_ref(&binding, &()));
    }
    let pod = ctx.pods.get(&ObjectRef::new(pod).within(namespace))?;
    let pool = ctx.pools.get(&ObjectRef::new(pod.labels().get(LABEL_POOL)?).within(namespace))?;
    let pool = pool.0.as_ref().ok()?;
    Some(RunnerPool::object_ref(pool, &()))
}

#[cfg(test)]
mod tests {
    use mayfly_crds::names::BROKER_AUDIENCE;
    use serde_json::json;

    use super::*;
    use crate::kube_io::KubeIo;
    use crate::kube_io::scripted::{Answer, Server};
    use crate::runtime::metrics::Metrics;

    #[tokio::test]
    async fn an_account_is_known_by_its_whole_name() {
        let review = |user: &str, audience: &str| {
            let status = json!({"authenticated": true, "audiences": [audience], "user": {"username": user}});
            Answer::Object(json!({"spec": {}, "status": status}))
        };
        let broker = "system:serviceaccount:mayfly-system:mayfly-broker";
        let answers = vec![
            review(broker, GATE_AUDIENCE),
            review(broker, BROKER_AUDIENCE),
            review("system:serviceaccount:team:mayfly-broker", GATE_AUDIENCE),
            review("system:serviceaccount:mayfly-system:mayfly-broker2", GATE_AUDIENCE),
        ];
        let identities = Identities::new(KubeIo::new(Server::new(answers).client(), None, Metrics::new()), GATE_AUDIENCE);
        assert!(identities.of_account(None, broker).await.is_err() && identities.of_account(Some("Bearer "), broker).await.is_err());
        let mut known = Vec::new();
        for n in 0..4 {
            known.push(identities.of_account(Some(&format!("Bearer token{n}")), broker).await.is_ok());
        }
        assert_eq!(known, [true, false, false, false]);
    }
}
