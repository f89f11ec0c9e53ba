//! What an exchange costs, on one core: measurements, run by `make bench`. Each line is `figure NAME VALUE UNIT`.

use std::io::Write;
use std::time::Instant;

use axum::body::Body;
use axum::http::{Request as HttpRequest, StatusCode};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures::StreamExt as _;
use kube::runtime::watcher::Event as WatchEvent;
use mayfly_github_simulator::keys::RsaKey;
use tower::Service as _;

use super::tests::{Stage, binding, form, now, review};
use super::*;
use crate::credentials::keys::read_keys;
use crate::credentials::replay::Spent;
use crate::credentials::token::Algorithm;

/// Exchanges measured, in so many rounds with as many bare verifications before each, and how many at the same time: what else the machine
/// does meanwhile, it does to both.
const EXCHANGES: usize = 10_000;
const ROUNDS: usize = 20;
const AT_ONCE: usize = 50;
/// Tokens thrown at an issuer, and remembered.
const MANY: usize = 1_000_000;

fn figure(name: &str, value: f64, unit: &str) {
    // Nobody to tell if the terminal is gone. The harness has begun a line.
    let _ = writeln!(std::io::stdout(), "\nfigure {name} {value} {unit}");
}

/// Bytes of this process in memory.
fn resident() -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    let kilobytes: f64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kilobytes * 1024.0
}

/// Processor time that the threads of this process have used so far, in seconds.
fn used() -> f64 {
    let threads = std::fs::read_dir("/proc/self/task").expect("Linux").flatten();
    // One that ends meanwhile has no more.
    let times = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("schedstat")).ok());
    let nanoseconds = |text: String| text.split_whitespace().next().and_then(|first| first.parse::<f64>().ok()).expect("a number");
    times.map(nanoseconds).sum::<f64>() / 1e9
}

#[tokio::test]
#[ignore = "a measurement"]
async fn exchanges_beside_bare_verification() {
    let mut stage = Stage::remembering(vec![review("linux-1", "uid-1")], MANY).await;
    let mut instant = serde_json::to_value(binding(&stage.issuer, "https://sts.example").0.expect("a binding")).expect("JSON");
    instant["spec"]["provider"] = json!({"audienceToken": {}});
    stage.bindings.apply_watcher_event(&WatchEvent::Apply(serde_json::from_value(instant).expect("a binding")));
    let mut tokens = Vec::with_capacity(EXCHANGES + 1);
    for _ in 0..=EXCHANGES {
        tokens.push(stage.token(|_| {}).await);
    }
    // Keys are fetched and the pod's token is reviewed.
    let (status, answer) = stage.ask("pod-1", &tokens[EXCHANGES]).await;
    assert_eq!(status, StatusCode::OK, "{answer}");

    let own = RsaKey::generate().expect("a key");
    let keys = read_keys(&[own.jwk().as_object().cloned().expect("a key")]).expect("keys");
    let key = keys.values().next().expect("a key");
    let signed: Vec<(String, Vec<u8>)> = (0..EXCHANGES)
        .map(|n| {
            let token = own.sign(&json!({"jti": n})).expect("signed");
            let (input, signature) = token.rsplit_once('.').expect("three parts");
            (input.to_owned(), URL_SAFE_NO_PAD.decode(signature).expect("a signature"))
        })
        .collect();
    let request = |token: &String| {
        let request = HttpRequest::post("/v1/token").header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
        request.body(Body::from(form("pod-1", token))).expect("a request")
    };
    let mut requests: Vec<_> = tokens[..EXCHANGES].iter().map(request).collect();
    let mut router = stage.router();
    let mut took = Vec::new();
    for request in requests.drain(..EXCHANGES / 10) {
        let asked = Instant::now();
        assert_eq!(router.call(request).await.expect("an answer").status(), StatusCode::OK);
        took.push(asked.elapsed().as_secs_f64());
    }
    let (mut bare, mut exchanged) = (0.0, 0.0);
    let count = requests.len() / ROUNDS;
    for round in signed.chunks(count).take(ROUNDS) {
        let before = used();
        assert!(round.iter().all(|(input, signature)| key.verifies(Algorithm::Rs256, input.as_bytes(), signature)));
        let between = used();
        let asked = requests.drain(..count).map(|request| router.call(request));
        let mut answers = futures::stream::iter(asked).buffer_unordered(AT_ONCE);
        while let Some(answer) = answers.next().await {
            assert_eq!(answer.expect("an answer").status(), StatusCode::OK);
        }
        (bare, exchanged) = (bare + between - before, exchanged + used() - between);
    }
    let (bare, exchanges) = ((count * ROUNDS) as f64 / bare, (count * ROUNDS) as f64 / exchanged);
    took.sort_by(f64::total_cmp);
    figure("broker_rs256_verifications_per_second_per_core", bare, "1/s");
    figure("broker_exchanges_per_second_per_core", exchanges, "1/s");
    figure("broker_exchanges_over_bare_verifications", exchanges / bare, "ratio");
    figure("broker_added_latency_p50", took[took.len() / 2] * 1e3, "ms");
    figure("broker_added_latency_p99", took[took.len() * 99 / 100] * 1e3, "ms");
}

#[tokio::test]
#[ignore = "a measurement"]
async fn keys_are_not_fetched_for_bad_tokens() {
    let stage = Stage::set(Vec::new()).await;
    let before = stage.fetches().await;
    let strange: Vec<String> = (0..100)
        .map(|n| {
            let claims = json!({"iss": stage.issuer, "aud": "a", "sub": "s", "iat": now(), "exp": now() + 300, "jti": n.to_string()});
            RsaKey::generate().expect("a key").sign(&claims).expect("signed")
        })
        .collect();
    let began = Instant::now();
    for n in 0..MANY {
        let wrong = stage.broker.issuers.verify(&strange[n % strange.len()], now()).await;
        assert!(wrong.is_err());
    }
    figure("broker_bad_tokens_per_second_per_core", MANY as f64 / began.elapsed().as_secs_f64(), "1/s");
    figure("broker_key_fetches_under_1000000_bad_tokens", (stage.fetches().await - before) as f64, "fetches");
}

#[test]
#[ignore = "a measurement"]
fn memory_of_spent_tokens() {
    let mut replay = Replay::new(MANY);
    let before = resident();
    for n in 0..MANY {
        let mut key = SpentKey::default();
        key[..8].copy_from_slice(&(n as u64).to_le_bytes());
        assert_eq!(replay.spend(key, "pod", "binding", 1_000 + (n % 900) as i64, 0), Spent::First);
    }
    figure("broker_memory_of_1000000_spent_tokens", (resident() - before) / f64::from(1 << 20), "MiB");
    assert_eq!(replay.len(), MANY);
}
