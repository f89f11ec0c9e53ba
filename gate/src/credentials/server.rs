//! The desk's door: HTTP on loopback, for those who show the job's local token.

use std::convert::Infallible;
use std::net::TcpListener;
use std::sync::Arc;

use axum::extract::{Path, RawQuery, Request, State};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use super::broker::Trouble;
use super::desk::Desk;

/// Serves as long as the pod lives.
pub(crate) async fn serve(listener: TcpListener, desk: Arc<Desk>) -> Result<Infallible, String> {
    let serve = async {
        listener.set_nonblocking(true)?;
        axum::serve(tokio::net::TcpListener::from_std(listener)?, router(desk)).await
    };
    match serve.await {
        Ok(()) => Err("loopback is no longer served".to_owned()),
        Err(error) => Err(format!("loopback: {error}")),
    }
}

/// The routes.
pub(super) fn router(desk: Arc<Desk>) -> Router {
    Router::new()
        .route("/v1/id-token", get(id_token))
        .route("/v1/aws", get(async |State(desk): State<Arc<Desk>>| answer(desk.only_aws().await)))
        .route(
            "/v1/aws/{binding}",
            get(async |State(desk): State<Arc<Desk>>, Path(binding): Path<String>| answer(desk.aws(&binding).await)),
        )
        .route(
            "/v1/credential-process/{binding}",
            get(async |State(desk): State<Arc<Desk>>, Path(binding): Path<String>| answer(desk.credential_process(&binding).await)),
        )
        .route(
            "/v1/token/{binding}",
            get(async |State(desk): State<Arc<Desk>>, Path(binding): Path<String>| answer(desk.audience_token(&binding).await)),
        )
        .layer(middleware::from_fn_with_state(desk.clone(), guard))
        .with_state(desk)
}

/// What GitHub's jobs find at `ACTIONS_ID_TOKEN_REQUEST_URL`, for jobs of other forges.
async fn id_token(State(desk): State<Arc<Desk>>, RawQuery(query): RawQuery) -> Response {
    let pairs = form_urlencoded::parse(query.as_deref().unwrap_or_default().as_bytes());
    let mut audiences = pairs.filter(|(name, _)| name == "audience").map(|(_, value)| value.into_owned());
    match (audiences.next(), audiences.next()) {
        (Some(audience), None) if !audience.is_empty() => answer(desk.id_token(audience).await),
        _ => refusal(StatusCode::BAD_REQUEST, "BadRequest", "name one audience: &audience=..."),
    }
}

/// Nobody is served who does not show the token, or who came here by another name.
async fn guard(State(desk): State<Arc<Desk>>, request: Request, next: Next) -> Response {
    match admitted(&desk, request.headers()) {
        Ok(()) => next.run(request).await,
        Err(refusal) => *refusal,
    }
}

fn admitted(desk: &Desk, headers: &HeaderMap) -> Result<(), Box<Response>> {
    let one = |name: HeaderName| {
        let mut all = headers.get_all(name).iter();
        all.next().filter(|_| all.next().is_none())
    };
    if !one(header::HOST).and_then(|host| host.to_str().ok()).is_some_and(|host| desk.is_at(host)) {
        let why = "this is not the host that was asked for";
        return Err(Box::new(refusal(StatusCode::MISDIRECTED_REQUEST, "WrongHost", why)));
    }
    if !one(header::AUTHORIZATION).is_some_and(|shown| desk.admits(shown.as_bytes())) {
        let why = "the file MAYFLY_CREDENTIALS_TOKEN_FILE holds what to show as Authorization";
        return Err(Box::new(refusal(StatusCode::UNAUTHORIZED, "Unauthorized", why)));
    }
    Ok(())
}

fn answer(given: Result<Value, Trouble>) -> Response {
    match given {
        Ok(body) => (StatusCode::OK, [(header::CACHE_CONTROL, "no-store")], Json(body)).into_response(),
        Err(Trouble::Denied(why)) => refusal(StatusCode::FORBIDDEN, "AccessDenied", &why),
        Err(Trouble::Passing(why)) => refusal(StatusCode::SERVICE_UNAVAILABLE, "Unavailable", &why),
    }
}

/// An error as AWS's SDKs read it; some look for small letters.
fn refusal(status: StatusCode, code: &str, message: &str) -> Response {
    (status, Json(json!({"Code": code, "Message": message, "code": code, "message": message}))).into_response()
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use tower::ServiceExt as _;

    use super::super::broker::Provider;
    use super::super::desk::tests::{SESSION, aws, desk};
    use super::*;

    async fn ask(desk: &Arc<Desk>, path: &str, headers: &[(HeaderName, &str)]) -> (u16, Value) {
        let mut request = axum::http::Request::get(path);
        for (name, value) in headers {
            request = request.header(name, *value);
        }
        let answer = router(desk.clone()).oneshot(request.body(Body::empty()).expect("a request")).await.expect("an answer");
        let status = answer.status().as_u16();
        let body = to_bytes(answer.into_body(), 10_000).await.expect("a body");
        (status, serde_json::from_slice(&body).unwrap_or_default())
    }

    #[tokio::test]
    async fn an_sdk_gets_what_it_expects() {
        let desk = desk(&[("deploy", aws(), SESSION), ("vault", Provider::AudienceToken {}, "a.b.c")]);
        let bearer = format!("Bearer {}", desk.token());
        for shown in [desk.token(), &bearer] {
            let headers = [(header::HOST, "127.0.0.1:4711"), (header::AUTHORIZATION, shown)];
            let (status, body) = ask(&desk, "/v1/aws/deploy", &headers).await;
            let wanted =
                json!({"AccessKeyId": "AKIA", "SecretAccessKey": "hunter2", "Token": "hunter3", "Expiration": "2026-11-22T10:00:00Z"});
            assert_eq!((status, body), (200, wanted));
            assert_eq!(ask(&desk, "/v1/token/vault", &headers).await, (200, json!({"value": "a.b.c"})));
            let process: Value = serde_json::from_str(SESSION).expect("JSON");
            assert_eq!(ask(&desk, "/v1/credential-process/deploy", &headers).await, (200, process));
        }
    }

    #[tokio::test]
    async fn nobody_else_gets_anything() {
        let desk = desk(&[("deploy", aws(), SESSION), ("vault", Provider::AudienceToken {}, "a.b.c")]);
        let (host, token) = ((header::HOST, "localhost:4711"), (header::AUTHORIZATION, desk.token()));
        let foreign = |name: &'static str| (header::HOST, name);
        let wrong = format!("{}0", desk.token());
        let cases = [
            ("/v1/aws/deploy", vec![host.clone()], 401),
            ("/v1/aws/deploy", vec![host.clone(), (header::AUTHORIZATION, "")], 401),
            ("/v1/aws/deploy", vec![host.clone(), (header::AUTHORIZATION, &desk.token()[1..])], 401),
            ("/v1/aws/deploy", vec![host.clone(), (header::AUTHORIZATION, &wrong)], 401),
            ("/v1/aws/deploy", vec![host.clone(), token.clone(), token.clone()], 401),
            ("/v1/aws/deploy", vec![token.clone()], 421),
            ("/v1/aws/deploy", vec![foreign("evil.example:4711"), token.clone()], 421),
            ("/v1/aws/deploy", vec![foreign("localhost.evil.example:4711"), token.clone()], 421),
            ("/v1/aws/deploy", vec![foreign("127.0.0.1"), token.clone()], 421),
            ("/v1/aws/vault", vec![host.clone(), token.clone()], 403),
            ("/v1/aws/other", vec![host.clone(), token.clone()], 403),
            ("/v1/credential-process/deploy", vec![host.clone()], 401),
            ("/v1/credential-process/vault", vec![host.clone(), token.clone()], 403),
            ("/v1/token/deploy", vec![host, token], 403),
        ];
        for (n, (path, headers, wanted)) in cases.iter().enumerate() {
            let (status, body) = ask(&desk, path, headers).await;
            assert_eq!(status, *wanted, "case {n}");
            assert!(!body.to_string().contains("hunter") && !body.to_string().contains("a.b.c"), "case {n}: {body}");
            assert_eq!(body["Code"], body["code"]);
        }
    }
}
