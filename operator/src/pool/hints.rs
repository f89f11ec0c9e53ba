//! Webhooks make a pass happen now instead of at the next poll. What a webhook says is looked up at the forge, never believed.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use tower::limit::GlobalConcurrencyLimitLayer;

use super::controller::Context;
use super::registry::{PoolHandle, PoolKey};
use crate::forge::webhook::{self, MAX_BODY, Refusal};
use crate::forge::{JobKey, Repository};

/// Deliveries looked at the same time: each may hold `MAX_BODY` bytes.
const DELIVERIES: usize = 64;
/// How long a delivery may take, its body included.
const DELIVERY_TIME: Duration = Duration::from_secs(10);

/// The routes.
pub(crate) fn router(ctx: Arc<Context>) -> Router {
    Router::new()
        .route("/webhooks/gitea/{namespace}/{pool}", post(deliver))
        .route("/webhooks/github/{namespace}/{pool}", post(deliver))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn(in_time))
        .layer(GlobalConcurrencyLimitLayer::new(DELIVERIES))
        .with_state(ctx)
}

/// A delivery that does not arrive in time makes room for another.
async fn in_time(request: Request, next: Next) -> Response {
    let answer = tokio::time::timeout(DELIVERY_TIME, next.run(request)).await;
    answer.unwrap_or_else(|_| StatusCode::REQUEST_TIMEOUT.into_response())
}

async fn deliver(
    State(ctx): State<Arc<Context>>,
    Path((namespace, name)): Path<(String, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> (StatusCode, String) {
    let handle = ctx.registry.get(&PoolKey { namespace, name });
    let result = check(handle.as_deref(), &headers, &body);
    let (outcome, answer) = match result {
        Ok(hint) => {
            if let Some(hint) = hint {
                take(&ctx, handle.as_deref(), &hint);
            }
            ("accepted", (StatusCode::ACCEPTED, String::new()))
        }
        Err(refusal) => {
            let code = match refusal {
                Refusal::Unsigned | Refusal::WrongSignature => StatusCode::UNAUTHORIZED,
                Refusal::Malformed => StatusCode::BAD_REQUEST,
            };
            (refusal.category(), (code, refusal.to_string()))
        }
    };
    ctx.metrics.webhook(outcome);
    answer
}

/// A verified hint; `None` where the forge only asks whether anybody is there. A pool that does not exist and one without a secret look the same from outside as a wrong secret.
fn check(handle: Option<&PoolHandle>, headers: &HeaderMap, body: &[u8]) -> Result<Option<webhook::Hint>, Refusal> {
    let signature = headers.get("x-hub-signature-256").map(|value| value.as_bytes()).ok_or(Refusal::Unsigned)?;
    let secret = handle.and_then(|handle| handle.state().webhook_secret.clone()).ok_or(Refusal::WrongSignature)?;
    webhook::verify(&secret, Some(signature), body)?;
    webhook::read(headers.get("x-github-event").map(|value| value.as_bytes()), body)
}

/// Notes the job and wakes every pool of that server whose scope covers the repository.
fn take(ctx: &Context, handle: Option<&PoolHandle>, hint: &webhook::Hint) {
    let url = handle.and_then(|handle| handle.state().link.as_ref().map(|link| link.url.clone()));
    let Some(url) = url else { return };
    for handle in pools_for(ctx, &url, &hint.repository) {
        if let Some(id) = hint.job {
            handle.hint(JobKey { repository: hint.repository.clone(), id: id.into() }, Some(&hint.labels));
        }
        ctx.registry.tell(handle.key.clone());
    }
}

fn pools_for(ctx: &Context, url: &str, repository: &Repository) -> Vec<Arc<PoolHandle>> {
    ctx.valid_pools().into_iter().filter(|pool| pool.scope_covers(url, repository)).filter_map(|pool| ctx.registry.get(&pool.key)).collect()
}

#[cfg(test)]
mod tests;
