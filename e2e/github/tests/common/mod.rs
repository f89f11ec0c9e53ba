//! What the tests share: a simulator in this process, and stand-in runners beside it.

#![allow(dead_code, reason = "each test program uses its part")]

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use mayfly_github_simulator::client::Simulator;
use mayfly_github_simulator::control::NewRepository;
pub(crate) use mayfly_github_simulator::model::Settings;
use mayfly_github_simulator::server::{Config, Server};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

/// Longest time for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A simulator with the repository `acme/widgets`.
pub(crate) async fn start(settings: Settings) -> (Server, Simulator) {
    let server = Server::start(Config { settings, ..Config::default() }).await.unwrap();
    let simulator = Simulator::new(&server.url, b"");
    simulator.repository(&NewRepository { owner: "acme".into(), name: "widgets".into(), ..NewRepository::default() }).await.unwrap();
    (server, simulator)
}

/// Settings with which nothing takes long.
pub(crate) fn quick() -> Settings {
    Settings { poll: 2.0, ..Settings::default() }
}

/// What a stand-in runner did.
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) output: String,
}

/// A folder that goes with its value.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("mayfly-github-{}", mayfly_github_simulator::keys::uuid()));
        std::fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs a stand-in runner with this configuration, given by its environment.
pub(crate) fn runner(configuration: &str, environment: &[(&str, &str)]) -> JoinHandle<Ran> {
    let mut command = tokio_command(env!("CARGO_BIN_EXE_runner-stand-in"));
    command.env("ACTIONS_RUNNER_INPUT_JITCONFIG", configuration);
    for (name, value) in environment {
        command.env(name, value);
    }
    tokio::task::spawn_blocking(move || {
        let folder = Folder::new();
        let output = command.arg("--root").arg(&folder.0).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        Ran { code: output.status.code().unwrap_or(-1), output: text }
    })
}

fn tokio_command(program: &str) -> std::process::Command {
    let mut command = std::process::Command::new(program);
    command.stdin(Stdio::null());
    command
}

/// A plain HTTP call; status and JSON.
pub(crate) async fn call(method: &str, url: &str, authorization: &str, body: &Value) -> (u16, Value) {
    call_of(b"", method, url, authorization, body).await
}

/// The same of a simulator with a certificate of its own.
pub(crate) async fn call_of(authority: &[u8], method: &str, url: &str, authorization: &str, body: &Value) -> (u16, Value) {
    let authority = authority.to_vec();
    let request = ureq::http::Request::builder()
        .method(method)
        .uri(url)
        .header("authorization", authorization)
        .header("content-type", "application/json")
        .body(if body.is_null() { Vec::new() } else { body.to_string().into_bytes() })
        .unwrap();
    tokio::task::spawn_blocking(move || {
        let agent = mayfly_github_simulator::http::agent(&authority, PATIENCE);
        let mut response = agent.run(request).unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        (response.status().as_u16(), serde_json::from_str(&text).unwrap_or(Value::String(text)))
    })
    .await
    .unwrap()
}

/// A JIT configuration of the REST API, for the organization `acme`.
pub(crate) async fn jit(simulator: &Simulator, token: &str, name: &str, label: &str) -> String {
    jit_of(simulator, b"", token, name, label).await
}

/// The same of a simulator with a certificate of its own.
pub(crate) async fn jit_of(simulator: &Simulator, authority: &[u8], token: &str, name: &str, label: &str) -> String {
    let url = format!("{}/api/v3/orgs/acme/actions/runners/generate-jitconfig", simulator.url());
    let body = json!({"name": name, "runner_group_id": 1, "labels": [label]});
    let (status, made) = call_of(authority, "POST", &url, &format!("Bearer {token}"), &body).await;
    assert_eq!(status, 201, "{made}");
    made["encoded_jit_config"].as_str().unwrap().to_owned()
}
