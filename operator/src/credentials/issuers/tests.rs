//! Issuers against one that was written without us (the GitHub simulator's), and against hostile ones.

use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use mayfly_github_simulator::client::Simulator;
use mayfly_github_simulator::keys::RsaKey;
use mayfly_github_simulator::server;
use serde_json::json;

use super::*;

const QUICK: Rhythm = Rhythm {
    least: Duration::from_millis(200),
    first: Duration::from_millis(200),
    refresh: Duration::from_millis(400),
    stale: Duration::from_secs(3600),
};

fn config(issuer: &str) -> IssuerConfig {
    IssuerConfig {
        issuer: issuer.to_owned(),
        algorithms: default_algorithms(),
        max_age_seconds: 900,
        per_job_claim: true,
        certificate_authority_file: None,
    }
}

fn http() -> Http {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    Http::new(None, |_| None).expect("a client")
}

fn issuers(name: &str, rhythm: Rhythm) -> Issuers {
    Issuers::new([Issuer::new(&config(name), http(), rhythm)])
}

fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

fn claims(issuer: &str) -> Value {
    json!({"iss": issuer, "aud": "broker", "sub": "repo:acme/web", "iat": now(), "exp": now() + 300, "jti": "j", "repository_id": "42"})
}

/// The simulator, and its issuer's name.
async fn simulator() -> (server::Server, Simulator, String) {
    let server = server::Server::start(server::Config::default()).await.expect("a simulator");
    let simulator = Simulator::new(&server.url, b"");
    let issuer = format!("{}/_services/token", server.url);
    (server, simulator, issuer)
}

async fn signed(simulator: &Simulator, claims: &Value) -> String {
    let answer = simulator.call("POST", "oidc/sign", claims.to_string().into_bytes()).await.expect("signed");
    answer["token"].as_str().expect("a token").to_owned()
}

#[tokio::test]
async fn a_token_of_githubs_simulator_is_verified_with_what_it_publishes() {
    let (_server, simulator, issuer) = simulator().await;
    let issuers = issuers(&issuer, Rhythm::default());
    let claims = issuers.verify(&signed(&simulator, &claims(&issuer)).await, now()).await.expect("verified");
    assert_eq!((claims.issuer.as_str(), claims.get("repository_id")), (issuer.as_str(), Some("42")));
}

#[tokio::test]
async fn a_new_key_is_found_and_a_withdrawn_one_is_dropped_with_the_next_fetch() {
    let (_server, simulator, issuer) = simulator().await;
    let issuers = issuers(&issuer, QUICK);
    let old = signed(&simulator, &claims(&issuer)).await;
    issuers.verify(&old, now()).await.expect("verified");
    simulator.rotate_oidc().await.expect("rotated");
    let new = signed(&simulator, &claims(&issuer)).await;
    tokio::time::sleep(QUICK.least).await;
    issuers.verify(&new, now()).await.expect("the new key");
    issuers.verify(&old, now()).await.expect("the old key is still published");
    simulator.withdraw_oidc().await.expect("withdrawn");
    let fresh = async { tokio::time::timeout(QUICK.refresh * 3, issuers.keep_fresh()).await };
    assert!(fresh.await.is_err(), "it goes on for ever");
    assert_eq!(issuers.verify(&old, now()).await, Err(VerifyError::UnknownKey));
    issuers.verify(&new, now()).await.expect("the key that is left");
}

#[tokio::test]
async fn keys_outlive_an_outage_and_not_for_ever() {
    let (server, simulator, issuer) = simulator().await;
    let issuers = issuers(&issuer, Rhythm { stale: Duration::from_secs(2), ..QUICK });
    let token = signed(&simulator, &claims(&issuer)).await;
    issuers.verify(&token, now()).await.expect("verified");
    drop(server);
    tokio::time::sleep(QUICK.refresh).await;
    assert!(tokio::time::timeout(QUICK.refresh, issuers.keep_fresh()).await.is_err());
    issuers.verify(&token, now()).await.expect("the keys that were fetched before");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(issuers.verify(&token, now()).await, Err(VerifyError::Unavailable));
}

/// An issuer that answers what a test says, and counts.
struct Hostile {
    name: String,
    fetches: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.task.abort();
    }
}

type Document = fn(&str) -> (u16, String);

impl Hostile {
    async fn start(discovery: Document, keys: String) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let name = format!("http://{}", listener.local_addr().expect("an address"));
        let fetches = Arc::new(AtomicUsize::new(0));
        let (own, count) = (name.clone(), fetches.clone());
        let router = Router::new().fallback(move |uri: axum::http::Uri| {
            let (own, keys, count) = (own.clone(), keys.clone(), count.clone());
            async move {
                let (status, text) = match uri.path() {
                    "/.well-known/openid-configuration" => {
                        count.fetch_add(1, Ordering::SeqCst);
                        discovery(&own)
                    }
                    _ => (200, keys),
                };
                let headers = [(header::CONTENT_TYPE, "application/json"), (header::LOCATION, "/keys")];
                (StatusCode::from_u16(status).expect("a status"), headers, text).into_response()
            }
        });
        #[expect(clippy::disallowed_methods, reason = "a test's own server ends with the test")]
        let task = tokio::spawn(async move { drop(axum::serve(listener, router).await) });
        Self { name, fetches, task }
    }

    fn fetches(&self) -> usize {
        self.fetches.load(Ordering::SeqCst)
    }
}

fn honest(name: &str) -> (u16, String) {
    let document = json!({
        "issuer": name, "jwks_uri": format!("{name}/keys"), "subject_types_supported": ["public"],
        "response_types_supported": ["id_token"], "id_token_signing_alg_values_supported": ["RS256"],
    });
    (200, document.to_string())
}

fn key_set(keys: &[Value]) -> String {
    json!({ "keys": keys }).to_string()
}

#[tokio::test]
async fn whatever_is_thrown_at_it_keys_are_fetched_once_in_the_time() {
    let key = RsaKey::generate().expect("a key");
    let hostile = Hostile::start(honest, key_set(&[key.jwk()])).await;
    let issuers = issuers(&hostile.name, Rhythm::default());
    let (good, other) = (key.sign(&claims(&hostile.name)).expect("signed"), RsaKey::generate().expect("a key"));
    let unknown = other.sign(&claims(&hostile.name)).expect("signed");
    issuers.verify(&good, now()).await.expect("verified");
    let all = (0..2_000).map(|_| issuers.verify(&unknown, now()));
    assert!(futures::future::join_all(all).await.iter().all(|result| *result == Err(VerifyError::UnknownKey)));
    assert_eq!(hostile.fetches(), 1);
}

#[tokio::test]
async fn an_issuer_that_has_given_no_keys_yet_is_asked_again_soon() {
    let rhythm = Rhythm { first: Duration::from_millis(50), ..Rhythm::default() };
    let documents: [(Document, bool); 2] = [(|_| (503, String::new()), true), (honest, false)];
    for (discovery, again) in documents {
        let key = RsaKey::generate().expect("a key");
        let issuer = Hostile::start(discovery, key_set(&[key.jwk()])).await;
        let issuers = issuers(&issuer.name, rhythm);
        assert!(tokio::time::timeout(Duration::from_millis(500), issuers.keep_fresh()).await.is_err());
        assert_eq!(issuer.fetches() > 2, again, "{}", issuer.fetches());
        assert!(issuer.fetches() > 0);
    }
}

#[tokio::test]
async fn nobody_is_asked_about_a_token_that_cannot_be_good() {
    let key = RsaKey::generate().expect("a key");
    let hostile = Hostile::start(honest, key_set(&[key.jwk()])).await;
    let issuers = issuers(&hostile.name, QUICK);
    for name in [
        "https://evil.example".to_owned(),
        format!("{}/", hostile.name),
        hostile.name.to_uppercase(),
        hostile.name.replace("http://", "http://user@"),
        format!("{}.", hostile.name),
        String::new(),
    ] {
        let token = key.sign(&claims(&name)).expect("signed");
        assert_eq!(issuers.verify(&token, now()).await, Err(VerifyError::Untrusted), "{name}");
    }
    assert!(matches!(issuers.verify("nonsense", now()).await, Err(VerifyError::Token(_))));
    assert_eq!(hostile.fetches(), 0);
}

#[tokio::test]
async fn hostile_documents_give_no_keys() {
    let key = RsaKey::generate().expect("a key");
    let good = key_set(&[key.jwk()]);
    let weak = json!({"kty": "RSA", "kid": key.id, "n": "AQAB", "e": "AQAB"});
    let cases: [(&str, Document, String); 14] = [
        ("another issuer", |name| (200, honest(name).1.replacen(name, "https://evil.example", 1)), good.clone()),
        ("a slash more", |name| (200, honest(name).1.replacen(&format!("{name}\""), &format!("{name}/\""), 1)), good.clone()),
        ("keys elsewhere", |name| (200, honest(name).1.replace(&format!("{name}/keys"), "http://localhost:1/keys")), good.clone()),
        (
            "keys at a metadata endpoint",
            |name| (200, honest(name).1.replace(&format!("{name}/keys"), "http://169.254.169.254/keys")),
            good.clone(),
        ),
        ("keys in a file", |name| (200, honest(name).1.replace(&format!("{name}/keys"), "file:///etc/passwd")), good.clone()),
        ("a redirect", |name| (302, honest(name).1), good.clone()),
        ("an error", |name| (500, honest(name).1), good.clone()),
        ("a name twice", |name| (200, honest(name).1.replacen('{', &format!("{{\"issuer\":\"{name}\","), 1)), good.clone()),
        ("huge", |name| (200, honest(name).1.replacen('{', &format!("{{\"pad\":\"{}\",", "x".repeat(MAX_DOCUMENT)), 1)), good.clone()),
        ("huge keys", honest, good.replacen('{', &format!("{{\"pad\":\"{}\",", "x".repeat(MAX_DOCUMENT)), 1)),
        ("two keys of one name", honest, key_set(&[key.jwk(), key.jwk()])),
        ("a weak key of the same name beside it", honest, key_set(&[key.jwk(), weak])),
        ("too many keys", honest, key_set(&(0..40).map(|n| json!({"kty": "RSA", "kid": n.to_string()})).collect::<Vec<_>>())),
        ("no keys", honest, key_set(&[])),
    ];
    for (what, discovery, keys) in cases {
        let hostile = Hostile::start(discovery, keys).await;
        let token = key.sign(&claims(&hostile.name)).expect("signed");
        assert_eq!(issuers(&hostile.name, QUICK).verify(&token, now()).await, Err(VerifyError::Unavailable), "{what}");
    }
    let hostile = Hostile::start(honest, good).await;
    let token = key.sign(&claims(&hostile.name)).expect("signed");
    assert!(issuers(&hostile.name, QUICK).verify(&token, now()).await.is_ok(), "the same, honest");
}

#[test]
fn a_configuration_is_read_or_refused() {
    let read = |text: &str| IssuerConfig::read_all(text);
    let plain = read("- issuer: https://token.actions.githubusercontent.com\n").expect("read");
    assert_eq!((plain[0].max_age_seconds, plain[0].algorithms.as_slice()), (900, &[Algorithm::Rs256][..]));
    for bad in [
        "",
        "[]",
        "- issuer: http://issuer.example\n",
        "- issuer: https://user@issuer.example\n",
        "- issuer: https://issuer.example?x=1\n",
        "- issuer: issuer.example\n",
        "- {issuer: https://issuer.example, algorithms: []}\n",
        "- {issuer: https://issuer.example, algorithms: [HS256]}\n",
        "- {issuer: https://issuer.example, algorithms: [none]}\n",
        "- {issuer: https://issuer.example, maxAgeSeconds: 1000000}\n",
        "- {issuer: https://issuer.example, insecure: true}\n",
        "- issuer: https://issuer.example\n- issuer: https://issuer.example\n",
    ] {
        assert!(read(bad).is_err(), "{bad}");
    }
}
