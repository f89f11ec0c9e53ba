//! What an exchange costs, on one core: measurements, run by `make bench`. Each line is `figure NAME VALUE UNIT`.

use std::io::Write;
use std::time::Instant;

use axum::http::StatusCode;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use kube::runtime::watcher::Event as WatchEvent;
use mayfly_github_simulator::keys::RsaKey;

use super::tests::{Stage, binding, now, review};
use super::*;
use crate::credentials::keys::read_keys;
use crate::credentials::replay::Spent;
use crate::credentials::token::Algorithm;

/// Exchanges measured, one after another.
const EXCHANGES: usize = 4_000;
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

/// Runs on one thread: simulator, broker and caller.
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
    let began = Instant::now();
    assert!(signed.iter().all(|(input, signature)| key.verifies(Algorithm::Rs256, input.as_bytes(), signature)));
    let bare = EXCHANGES as f64 / began.elapsed().as_secs_f64();

    let mut took = Vec::with_capacity(EXCHANGES);
    let began = Instant::now();
    for token in &tokens[..EXCHANGES] {
        let asked = Instant::now();
        let (status, _) = stage.ask("pod-1", token).await;
        assert_eq!(status, StatusCode::OK);
        took.push(asked.elapsed().as_secs_f64());
    }
    let exchanges = EXCHANGES as f64 / began.elapsed().as_secs_f64();
    took.sort_by(f64::total_cmp);
    figure("broker_rs256_verifications_per_second_per_core", bare, "1/s");
    figure("broker_exchanges_per_second_per_core", exchanges, "1/s");
    figure("broker_exchanges_over_bare_verifications", exchanges / bare, "ratio");
    figure("broker_added_latency_p50", took[EXCHANGES / 2], "s");
    figure("broker_added_latency_p99", took[EXCHANGES * 99 / 100], "s");
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
