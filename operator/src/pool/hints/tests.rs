//! Deliveries as hostile input: what is not signed is not read, and what is signed is a hint at most.

use std::time::Instant;

use hmac::{Hmac, Mac};
use kube::runtime::reflector::store::Writer;
use kube::runtime::watcher;
use reqwest::header::{HeaderMap, HeaderValue};
use serde_json::{Value, json};
use sha2::Sha256;

use super::super::context;
use super::super::controller::Guarded;
use super::super::registry::Link;
use super::super::validate::{Source, validate};
use super::*;
use crate::forge::github::{Credential, JustInTime};
use crate::forge::{Secret, http_client};
use crate::kube_io::scripted::Server;

const SECRET: &str = "It's a Secret to Everybody";
const NAMESPACE: &str = "team";

struct Stage {
    url: String,
    forge: Arc<JustInTime>,
    http: reqwest::Client,
}

impl Stage {
    /// A pool without a scale set, and the endpoint of its webhook on loopback.
    async fn set() -> Self {
        let github = json!({"url": "http://127.0.0.1:9/acme", "tokenSecretRef": {"name": "t"}, "webhookSecretRef": {"name": "w"},
            "justInTime": {"labels": ["self-hosted", "ci"]}});
        let pool = json!({"apiVersion": "mayfly.dev/v1alpha1", "kind": "RunnerPool",
            "metadata": {"name": "ci", "namespace": NAMESPACE, "uid": "u-1"}, "spec": {"forge": {"github": github}}});
        let guarded: Guarded = serde_json::from_value(pool).expect("a pool");
        let valid = validate(guarded.0.as_ref().expect("it can be read")).expect("valid");
        let Source::JustInTime { config, .. } = &valid.source else { panic!("no scale set") };
        let credential = Credential::Token(Secret::new("t"));
        let forge =
            Arc::new(JustInTime::new(http_client(None, None, |_| None).expect("a client"), (**config).clone(), credential.clone(), |_| {
                None
            }));
        let server = Server::new([]);
        let mut ctx = context(&server, &[]);
        let mut pools: Writer<Guarded> = Writer::new(());
        pools.apply_watcher_event(&watcher::Event::Apply(guarded));
        Arc::get_mut(&mut ctx).expect("nobody else has it").pools = pools.as_reader();
        let handle = ctx.registry.open(&valid.key, &valid.uid);
        {
            let mut state = handle.state();
            state.webhook_secret = Some(Secret::new(SECRET));
            let (url, source) = (valid.url.clone(), valid.source.clone());
            let link = Link { forge: forge.clone(), scale_set: None, just_in_time: Some(forge.clone()), url, source, credential };
            state.link = Some(link);
        }
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/webhooks/github/{NAMESPACE}/ci", listener.local_addr().expect("an address"));
        let router = router(ctx.clone());
        ctx.tasks.spawn(async move {
            // The writer keeps the store filled.
            let _pools = pools;
            axum::serve(listener, router).await
        });
        Self { url, forge, http: reqwest::Client::new() }
    }

    async fn deliver(&self, body: &[u8], headers: &[(&'static str, String)]) -> u16 {
        let map: HeaderMap = headers
            .iter()
            .map(|(name, value)| ((*name).parse().expect("a name"), HeaderValue::from_str(value).expect("a value")))
            .collect();
        let sent = self.http.post(&self.url).headers(map).body(body.to_vec()).send().await;
        sent.expect("an answer").status().as_u16()
    }

    async fn signed(&self, event: &str, body: &[u8]) -> u16 {
        self.deliver(
            body,
            &[("x-github-event", event.to_owned()), ("x-github-delivery", "one".to_owned()), (SIGNATURE, sign(SECRET, body))],
        )
        .await
    }

    fn known(&self) -> Vec<String> {
        self.forge.known().iter().map(JobKey::to_string).collect()
    }
}

const SIGNATURE: &str = "x-hub-signature-256";

fn sign(secret: &str, body: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("any key will do");
    mac.update(body);
    let hex: String = mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256={hex}")
}

fn body(action: &str, id: u64, repository: &str, labels: &[&str]) -> Vec<u8> {
    let body: Value = json!({"action": action, "repository": {"full_name": repository},
        "workflow_job": {"id": id, "run_id": 1, "labels": labels, "status": "completed", "runner_name": "somebody's"}});
    body.to_string().into_bytes()
}

#[tokio::test]
async fn what_is_not_signed_with_the_pools_secret_is_refused() {
    let stage = Stage::set().await;
    let good = body("queued", 7, "acme/web", &["ci"]);
    let other = body("queued", 8, "acme/web", &["ci"]);
    for (what, headers) in [
        ("no signature", vec![]),
        ("an empty one", vec![(SIGNATURE, String::new())]),
        ("of another secret", vec![(SIGNATURE, sign("other", &good))]),
        ("of an empty secret", vec![(SIGNATURE, sign("", &good))]),
        ("of another body", vec![(SIGNATURE, sign(SECRET, &other))]),
        ("the old kind alone", vec![("x-hub-signature", sign(SECRET, &good).replace("sha256", "sha1"))]),
        ("cut off", vec![(SIGNATURE, sign(SECRET, &good)[..40].to_owned())]),
    ] {
        assert_eq!(stage.deliver(&good, &headers).await, 401, "{what}");
    }
    let elsewhere = Stage { url: stage.url.replace("/ci", "/nobody"), forge: stage.forge.clone(), http: stage.http.clone() };
    assert_eq!(elsewhere.signed("workflow_job", &good).await, 401, "a pool that does not exist looks the same");
    assert!(stage.known().is_empty());
}

#[tokio::test]
async fn what_is_signed_is_a_hint_whatever_its_order_and_however_often_it_comes() {
    let stage = Stage::set().await;
    for _ in 0..20 {
        for action in ["completed", "in_progress", "queued", "no such action"] {
            assert_eq!(stage.signed("workflow_job", &body(action, 7, "acme/web", &["ci"])).await, 202);
        }
    }
    assert_eq!(stage.known(), ["acme/web#7"], "one job, to be looked up");
    for (what, delivery) in [
        ("somebody else's labels", body("queued", 8, "acme/web", &["gpu"])),
        ("no labels", body("queued", 8, "acme/web", &[])),
        ("another organization", body("queued", 8, "eve/web", &["ci"])),
    ] {
        assert_eq!(stage.signed("workflow_job", &delivery).await, 202, "{what}");
    }
    assert_eq!(stage.signed("ping", br#"{"zen": "Design for failure."}"#).await, 202);
    assert_eq!(stage.known(), ["acme/web#7"]);
}

#[tokio::test]
async fn what_is_malformed_or_too_long_is_refused() {
    let stage = Stage::set().await;
    let too_long = [body("queued", 7, "acme/web", &["ci"]), vec![b' '; MAX_BODY]].concat();
    assert_eq!(stage.signed("workflow_job", &too_long).await, 413);
    let long = [body("queued", 9, "acme/web", &["ci"]), vec![b' '; MAX_BODY / 2]].concat();
    let begun = Instant::now();
    assert_eq!(stage.signed("workflow_job", &long).await, 202);
    assert!(begun.elapsed() < Duration::from_secs(5));
    let deep = "[".repeat(100_000);
    for bad in ["", "null", "{}", "[1", deep.as_str(), r#"{"repository":{"full_name":"../../x"},"workflow_job":{"id":7}}"#] {
        assert_eq!(stage.signed("workflow_job", bad.as_bytes()).await, 400, "{}", &bad[..bad.len().min(40)]);
    }
    assert_eq!(stage.known(), ["acme/web#9"]);
}
