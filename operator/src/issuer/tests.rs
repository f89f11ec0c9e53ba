//! The issuer with an API server that answers as told; what it signs is verified from what it publishes.

use axum::body::{Body, to_bytes};
use axum::http::Request;
use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{DecodingKey, Validation};
use tower::ServiceExt as _;

use super::*;
use crate::kube_io::scripted::{Answer, Server};
use crate::runtime::metrics::Metrics;

const URL: &str = "https://mayfly.example/ci";

fn door(server: &Server) -> KubeIo {
    KubeIo::new(server.client(), None, Metrics::new())
}

/// An issuer that found no keys, and what it wrote down.
async fn fresh() -> (Arc<Issuer>, Value) {
    let written = json!({"metadata": {"name": "keys"}});
    let server = Server::new([Answer::Refusal(404, "NotFound"), Answer::Object(written)]);
    let issuer = Issuer::open(door(&server), "mayfly-system", "keys", URL).await.expect("an issuer");
    let calls = server.calls();
    assert_eq!(calls[1].what, "POST /api/v1/namespaces/mayfly-system/secrets");
    (Arc::new(issuer), calls[1].body.clone())
}

async fn get_json(issuer: &Arc<Issuer>, path: &str) -> (u16, Value) {
    let answer = issuer.router().oneshot(Request::get(path).body(Body::empty()).expect("a request")).await.expect("an answer");
    let status = answer.status().as_u16();
    let body = to_bytes(answer.into_body(), 100_000).await.expect("a body");
    (status, serde_json::from_slice(&body).unwrap_or_default())
}

fn record(issuer: &Issuer, event: &str) -> BTreeMap<String, String> {
    let facts = [
        ("repository", "acme/web"),
        ("repository_id", "42"),
        ("run_id", "900"),
        ("check_run_id", "7"),
        ("event_name", event),
        ("ref", "refs/heads/main"),
        ("nonsense", "of the forge's"),
    ];
    issuer.record(facts.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
}

#[tokio::test]
async fn a_token_is_verified_by_what_is_published() {
    let (issuer, _) = fresh().await;
    let now = Timestamp::now();
    let token = issuer.mint(&record(&issuer, "push"), "deploy.example", now).expect("a token");

    let (status, discovery) = get_json(&issuer, "/ci/.well-known/openid-configuration").await;
    assert_eq!((status, &discovery["issuer"]), (200, &json!(URL)));
    let keys = discovery["jwks_uri"].as_str().and_then(|url| url.strip_prefix("https://mayfly.example")).expect("an address of its own");
    let (_, keys) = get_json(&issuer, keys).await;
    let keys: JwkSet = serde_json::from_value(keys).expect("a key set");
    let kid = jsonwebtoken::decode_header(token.reveal()).expect("a header").kid.expect("a key's name");
    let key = DecodingKey::from_jwk(keys.find(&kid).expect("published")).expect("a key");
    let mut validation = Validation::new(Algorithm::RS256);
    validation.set_audience(&["deploy.example"]);
    validation.set_issuer(&[URL]);
    let claims = jsonwebtoken::decode::<Value>(token.reveal(), &key, &validation).expect("verified").claims;

    let text = |name: &str| claims[name].as_str().unwrap_or_default().to_owned();
    assert_eq!((text("sub"), text(VOUCHED_BY)), ("repo:acme/web:ref:refs/heads/main".to_owned(), "mayfly".to_owned()));
    assert_eq!((text("repository_id"), text("check_run_id"), text("iss")), ("42".to_owned(), "7".to_owned(), URL.to_owned()));
    assert_eq!(claims["exp"].as_i64().zip(claims["iat"].as_i64()).map(|(exp, iat)| exp - iat), Some(LIFE));
    assert!(claims.get("nonsense").is_none(), "only claims that are published");
    let published = discovery["claims_supported"].as_array().expect("a list");
    assert!(claims.as_object().expect("claims").keys().all(|name| published.contains(&json!(name))), "{claims}");

    let other = issuer.mint(&record(&issuer, "push"), "deploy.example", now).expect("a token");
    assert_ne!(token, other, "each has an identifier of its own");
    let pull = issuer.mint(&record(&issuer, "pull_request"), "deploy.example", now).expect("a token");
    let claims = jsonwebtoken::decode::<Value>(pull.reveal(), &key, &validation).expect("verified").claims;
    assert_eq!(claims["sub"], "repo:acme/web:pull_request");
}

#[tokio::test]
async fn nothing_is_signed_for_nobody_or_for_another_issuers_record() {
    let (issuer, _) = fresh().await;
    let now = Timestamp::now();
    for audience in ["", "two words", "a\nb", &"x".repeat(513)] {
        assert_eq!(issuer.mint(&record(&issuer, "push"), audience, now).expect_err("refused"), MintError::Audience);
    }
    let mut foreign = record(&issuer, "push");
    foreign.insert("iss".to_owned(), "https://token.actions.githubusercontent.com".to_owned());
    assert_eq!(issuer.mint(&foreign, "deploy.example", now).expect_err("refused"), MintError::Record);
    foreign.remove("iss");
    assert_eq!(issuer.mint(&foreign, "deploy.example", now).expect_err("refused"), MintError::Record);
    assert!(issuer.record(BTreeMap::new()).is_empty(), "of a job of which nothing is known nothing is said");
    assert_eq!(issuer.mint(&BTreeMap::new(), "deploy.example", now).expect_err("refused"), MintError::Record);
}

#[tokio::test]
async fn keys_are_found_again_and_broken_ones_are_not_written_over() {
    let (issuer, written) = fresh().await;
    let again = Server::new([Answer::Object(written.clone())]);
    let second = Issuer::open(door(&again), "mayfly-system", "keys", URL).await.expect("an issuer");
    assert_eq!(issuer.now().kid, second.now().kid);
    assert_eq!(again.calls().len(), 1, "nothing is written");
    assert!(!format!("{second:?}").contains("PRIVATE"));

    let mut broken = written;
    broken["data"][FIELD] = json!("bm9uc2Vuc2U=");
    let server = Server::new([Answer::Object(broken)]);
    let error = Issuer::open(door(&server), "mayfly-system", "keys", URL).await.expect_err("refused").to_string();
    assert!(error.contains("holds no keys"), "{error}");
    assert_eq!(server.calls().len(), 1);
}
