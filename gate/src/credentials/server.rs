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

/// Where SDKs of Azure show what they found in `IDENTITY_HEADER`.
const IDENTITY_HEADER: HeaderName = HeaderName::from_static("x-identity-header");

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
            get(async |State(desk): State<Arc<Desk>>, Path(binding): Path<String>| answer(desk.finished_token(&binding).await)),
        )
        .route(
            "/v1/subject-token/{binding}",
            get(async |State(desk): State<Arc<Desk>>, Path(binding): Path<String>| answer(desk.subject_token(&binding).await)),
        )
        .route("/v1/azure/{binding}", get(azure))
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

/// What SDKs of Azure find at `IDENTITY_ENDPOINT` (learn.microsoft.com, "How to use managed identities for App Service", REST endpoint
/// reference, 2019-08-01).
async fn azure(State(desk): State<Arc<Desk>>, Path(binding): Path<String>, RawQuery(query): RawQuery) -> Response {
    let pairs = form_urlencoded::parse(query.as_deref().unwrap_or_default().as_bytes());
    let (mut resource, mut client_id) = (None, None);
    for (name, value) in pairs {
        let place = match name.as_ref() {
            "api-version" => continue,
            "resource" => &mut resource,
            "client_id" | "clientid" => &mut client_id,
            _ => return refusal(StatusCode::BAD_REQUEST, "BadRequest", "an identity is chosen by client_id, or by the binding alone"),
        };
        if place.replace(value.into_owned()).is_some() {
            return refusal(StatusCode::BAD_REQUEST, "BadRequest", "a parameter comes twice");
        }
    }
    match resource.filter(|resource| !resource.is_empty()) {
        Some(resource) => answer(desk.azure(&binding, &resource, client_id.as_deref()).await),
        None => refusal(StatusCode::BAD_REQUEST, "BadRequest", "name a resource: ?resource=..."),
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
    let one = |names: &[HeaderName]| {
        let mut all = names.iter().flat_map(|name| headers.get_all(name));
        all.next().filter(|_| all.next().is_none())
    };
    if !one(&[header::HOST]).and_then(|host| host.to_str().ok()).is_some_and(|host| desk.is_at(host)) {
        let why = "this is not the host that was asked for";
        return Err(Box::new(refusal(StatusCode::MISDIRECTED_REQUEST, "WrongHost", why)));
    }
    if !one(&[header::AUTHORIZATION, IDENTITY_HEADER]).is_some_and(|shown| desk.admits(shown.as_bytes())) {
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
    async fn an_sdk_of_azure_gets_a_token_for_what_the_binding_has() {
        let (scopes, client_id) = (vec!["https://management.azure.com/.default".to_owned()], "c-1".to_owned());
        let desk = desk(&[("deploy", Provider::Azure { client_id, scopes }, "a.b.c")]);
        let identity = HeaderName::from_static("x-identity-header");
        let headers = [(header::HOST, "127.0.0.1:4711"), (identity.clone(), desk.token())];
        let path = "/v1/azure/deploy?api-version=2019-08-01&resource=https%3A%2F%2Fmanagement.azure.com";
        for path in [path.to_owned(), format!("{path}%2F"), format!("{path}&client_id=c-1")] {
            let (status, body) = ask(&desk, &path, &headers).await;
            assert_eq!((status, &body["access_token"], &body["token_type"]), (200, &json!("a.b.c"), &json!("Bearer")), "{body}");
            let until: u64 = body["expires_on"].as_str().and_then(|text| text.parse().ok()).expect("a time");
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a time").as_secs();
            assert!((now + 3500..=now + 3600).contains(&until), "{until}");
        }
        for (path, wanted) in [
            ("/v1/azure/deploy".to_owned(), 400),
            ("/v1/azure/deploy?resource=".to_owned(), 400),
            ("/v1/azure/deploy?resource=https%3A%2F%2Fvault.azure.net".to_owned(), 403),
            (format!("{path}&client_id=c-2"), 403),
            (format!("{path}&mi_res_id=x"), 400),
            (format!("{path}&resource=https%3A%2F%2Fmanagement.azure.com"), 400),
        ] {
            let (status, body) = ask(&desk, &path, &headers).await;
            assert_eq!(status, wanted, "{path}: {body}");
            assert!(!body.to_string().contains("a.b.c"));
        }
        let twice = [headers[0].clone(), headers[1].clone(), (header::AUTHORIZATION, desk.token())];
        assert_eq!(ask(&desk, path, &twice).await.0, 401, "shown in two places");
        assert_eq!(ask(&desk, path, &[headers[0].clone(), (identity, "wrong")]).await.0, 401);
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
