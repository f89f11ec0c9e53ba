//! Who looks into runner pods: what the break-glass group does to them is told as an event of their pool.
//!
//! The API server's policies decide who may (charts/mayfly/templates/admission.yaml); they cannot tell of it but in the audit log. So the
//! API server asks here as well, about requests of that group alone, and is never refused: without an answer it goes on
//! (`failurePolicy: Ignore`). The path has a part that only the API server knows, so that nobody else makes such events.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, State};
use axum::routing::post;
use axum::{Json, Router};
use kube::ResourceExt;
use kube::runtime::reflector::ObjectRef;
use mayfly_crds::names::LABEL_POOL;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::pool::{Context, PoolKey, reference_to};

/// Reason of the event.
const BREAK_GLASS: &str = "BreakGlass";
/// Longest question, in bytes: a whole pod is in some.
const MAX_QUESTION: usize = 2 << 20;
/// Between two tries to tell the API server where to ask.
const RETRY: Duration = Duration::from_secs(15);

/// What is read of an AdmissionReview (admission.k8s.io/v1).
#[derive(Debug, Deserialize)]
struct Question {
    request: Request,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Request {
    uid: String,
    name: String,
    namespace: String,
    sub_resource: String,
    dry_run: bool,
    user_info: UserInfo,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct UserInfo {
    username: String,
}

/// The route, under a path that is told to the API server alone.
pub(crate) fn router(ctx: Arc<Context>, path: &str) -> Router {
    Router::new().route(path, post(asked)).layer(DefaultBodyLimit::max(MAX_QUESTION)).with_state(ctx)
}

/// Tells the API server where to ask, and whom to believe there; until it is told.
pub(crate) async fn announce(ctx: Arc<Context>, configuration: String, path: String, authority: String) {
    while let Err(error) = ctx.io.point_webhook(&configuration, &path, &authority).await {
        tracing::warn!(configuration, error = error.message(), "break-glass use will not be told as events yet");
        tokio::time::sleep(RETRY).await;
    }
}

async fn asked(State(ctx): State<Arc<Context>>, Json(question): Json<Question>) -> Json<Value> {
    let request = question.request;
    let answer = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": {"uid": request.uid, "allowed": true}});
    if !request.dry_run
        && let Some((pool, uid, note)) = use_of(&ctx, &request)
    {
        tracing::warn!(%pool, note, "break-glass");
        let told = ctx.clone();
        // The API server waits for the answer, not for the event.
        ctx.tasks.spawn(async move { told.io.warn(&reference_to(&pool, &uid), BREAK_GLASS, "Connect", &note).await });
    }
    Json(answer)
}

/// The pool, and what was done to its pod; nothing where it is no runner pod.
fn use_of(ctx: &Context, request: &Request) -> Option<(PoolKey, String, String)> {
    // For pods/proxy the name may be scheme:name:port.
    let mut pods = request.name.split(':').filter_map(|name| ctx.pods.get(&ObjectRef::new(name).within(&request.namespace)));
    let pod = pods.next()?;
    let key = PoolKey { namespace: request.namespace.clone(), name: pod.labels().get(LABEL_POOL)?.clone() };
    let uid = pod.owner_references().first()?.uid.clone();
    let note = format!("{}: pods/{} of {}/{}", request.user_info.username, request.sub_resource, request.namespace, pod.name_any());
    Some((key, uid, note))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_api_server_asks_is_read() {
        let question = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
            "uid": "u", "kind": {"group": "", "version": "v1", "kind": "PodExecOptions"}, "resource": {"group": "", "version": "v1", "resource": "pods"},
            "subResource": "exec", "name": "ci-a-b", "namespace": "team", "operation": "CONNECT", "dryRun": false,
            "userInfo": {"username": "alice", "groups": ["mayfly:break-glass"]}, "object": {"command": ["bash"]}, "oldObject": null}});
        let request = serde_json::from_value::<Question>(question).expect("a question").request;
        let read = (request.uid, request.user_info.username, request.sub_resource, request.name, request.dry_run);
        assert_eq!(read, ("u".into(), "alice".into(), "exec".into(), "ci-a-b".into(), false));
    }
}
