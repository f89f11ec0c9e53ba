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
/// How often it is told again: a tool that replaces objects, or makes one anew, takes away what was told.
const AGAIN: Duration = Duration::from_secs(300);

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

/// Tells the API server where to ask, and whom to believe there, for as long as somebody polls it.
pub(crate) async fn announce(ctx: Arc<Context>, configuration: String, path: String, authority: String) {
    loop {
        let told = ctx.io.point_webhook(&configuration, &path, &authority).await;
        if let Err(error) = &told {
            tracing::warn!(configuration, error = error.message(), "break-glass use will not be told as events yet");
        }
        tokio::time::sleep(if told.is_ok() { AGAIN } else { RETRY }).await;
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
    use crate::kube_io::scripted::{Answer, Server};
    use crate::pool::context;

    #[tokio::test(start_paused = true)]
    async fn the_api_server_is_told_until_it_hears_and_every_five_minutes() {
        let told = || Answer::Object(json!({"metadata": {"name": "glass"}}));
        let server = Server::new([Answer::Refusal(404, "NotFound"), told(), told()]);
        let announce = announce(context(&server, &[]), "glass".to_owned(), "/v1/x".to_owned(), "PEM".to_owned());
        let until = RETRY + AGAIN + Duration::from_secs(1);
        assert!(tokio::time::timeout(until, announce).await.is_err(), "it never ends");
        let calls = server.calls();
        assert_eq!(calls.len(), 3);
        let wanted = "PATCH /apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/glass";
        assert!(calls.iter().all(|call| call.what == wanted && call.body == calls[0].body), "{calls:?}");
        assert_eq!(calls[0].body["webhooks"][0]["clientConfig"], json!({"caBundle": "UEVN", "service": {"path": "/v1/x"}}));
    }

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
