//! GitHub's own Go client and its listener against the simulator, with stand-in runners: whole stories in both flows.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking, in its helpers as well")]

mod common;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{PATIENCE, quick, runner, start};
use mayfly_github_simulator::control::{Enqueue, NewGroup};
use mayfly_github_simulator::model::{Fault, Flow, Settings};
use mayfly_github_simulator::server::{Config, Server};
use serde_json::Value;
use tokio::sync::OnceCell;

/// Builds the Go program once.
async fn program() -> &'static PathBuf {
    static PROGRAM: OnceCell<PathBuf> = OnceCell::const_new();
    PROGRAM
        .get_or_init(|| async {
            tokio::task::spawn_blocking(|| {
                let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/github-clients");
                let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("github-clients");
                let built = Command::new("go")
                    .args(["build", "-trimpath", "-o"])
                    .arg(&program)
                    .arg(".")
                    .current_dir(folder)
                    .env("CGO_ENABLED", "0")
                    .status()
                    .expect("these tests need Go");
                assert!(built.success());
                program
            })
            .await
            .unwrap()
        })
        .await
}

/// Runs the program; each runner that it registers is started. Answers what it saw, and what the runners did.
async fn story(arguments: &[String]) -> (Value, Vec<common::Ran>) {
    let mut command = Command::new(program().await);
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    let handle = tokio::runtime::Handle::current();
    let (seen, runners, errors) = tokio::task::spawn_blocking(move || {
        let mut child = command.spawn().unwrap();
        let mut runners = Vec::new();
        let mut seen = Value::Null;
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            let value: Value = serde_json::from_str(&line.unwrap()).unwrap();
            match value["jit"].as_str() {
                Some(configuration) => {
                    let _entered = handle.enter();
                    runners.push(runner(configuration, &[]));
                }
                None => seen = value,
            }
        }
        let output = child.wait_with_output().unwrap();
        (seen, runners, String::from_utf8_lossy(&output.stderr).into_owned())
    })
    .await
    .unwrap();
    assert!(!seen.is_null(), "the Go program failed: {errors}");
    let mut ran = Vec::new();
    for runner in runners {
        ran.push(runner.await.unwrap());
    }
    (seen, ran)
}

fn arguments(pairs: &[(&str, String)]) -> Vec<String> {
    pairs.iter().flat_map(|(name, value)| [format!("--{name}"), value.clone()]).collect()
}

async fn whole(flow: Flow) {
    let (server, simulator) = start(Settings { flow, byte_order_mark: true, ..quick() }).await;
    let token = simulator.personal_token().await.unwrap();
    // The first job takes long enough for the client to try to remove its runner.
    let script = "echo done; sleep 3".to_owned();
    let run = simulator
        .enqueue(&Enqueue { repository: "acme/widgets".into(), labels: vec!["linux".into(), "big".into()], count: 3, script })
        .await
        .unwrap();
    // The token of the message queue ends once, while the listener is at it.
    let expire = tokio::spawn({
        let simulator = simulator.clone();
        async move {
            // Whenever the program has come so far: it may have to be built first.
            while !simulator.scale_sets().await.unwrap().iter().any(|set| set["session"]["polls"].as_u64() > Some(0)) {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
            simulator.expire("queue").await.unwrap();
        }
    });
    let url = format!("{}/acme", server.url);
    let (seen, ran) =
        story(&arguments(&[("url", url), ("token", token), ("jobs", "3".into()), ("label", "big".into()), ("max", "2".into())])).await;
    expire.await.unwrap();

    assert_eq!(seen["groupId"], 1);
    assert_eq!(seen["labels"], serde_json::json!(["linux", "big"]));
    assert!(seen["duplicate"].as_str().unwrap().contains("400"), "{seen}");
    assert!(seen["conflict"].as_str().unwrap().contains("409"), "{seen}");
    assert_eq!(seen["jitDuplicate"], "RunnerExists");
    assert_eq!(seen["busyRemoval"], "JobStillRunning");
    assert_eq!(seen["goneRunner"], "RunnerNotFound");
    assert_eq!(seen["runnerFound"], true);
    assert_eq!(seen["started"].as_array().unwrap().len(), 3);
    assert_eq!(seen["completed"], serde_json::json!({"job 0": "succeeded", "job 1": "succeeded", "job 2": "succeeded"}));
    assert_eq!(seen["mostDesired"], 2, "the capacity bounds what is assigned");
    assert_eq!(seen["refreshed"], true);
    assert_eq!(seen["deletedAfterward"], true);
    let acquired = seen["requestIds"].as_array().map_or(0, Vec::len);
    assert_eq!(acquired, if flow == Flow::Acquire { 3 } else { 0 });
    assert!(ran.iter().all(|ran| ran.code == 0), "{}", ran[0].output);
    for job in simulator.finished(run, PATIENCE).await.unwrap() {
        assert_eq!(job.conclusion.as_deref(), Some("success"), "{}", job.log);
        assert!(job.log.contains("stand-in") && job.log.contains("done"), "{}", job.log);
    }
    assert!(simulator.runners().await.unwrap().is_empty(), "a runner gets one job and is removed");
}

#[tokio::test]
async fn a_story_in_which_jobs_are_assigned() {
    whole(Flow::Assign).await;
}

#[tokio::test]
async fn a_story_in_which_jobs_are_acquired() {
    whole(Flow::Acquire).await;
}

#[tokio::test]
async fn an_app_of_a_repository_on_a_hosted_name() {
    // The client takes `github.localhost` for a hosted name and asks `api.github.localhost`; the simulator is its proxy.
    let server =
        Server::start(Config { public_url: Some("http://github.localhost".into()), settings: quick(), ..Config::default() }).await.unwrap();
    let address = format!("http://{}", server.address);
    let simulator = mayfly_github_simulator::client::Simulator::new(&address, b"");
    let repository = mayfly_github_simulator::control::NewRepository {
        owner: "Acme".into(),
        name: "Widgets".into(),
        private: false,
        ..Default::default()
    };
    simulator.repository(&repository).await.unwrap();
    let (app, installation) = simulator.app("Acme").await.unwrap();
    let folder = common::Folder::new();
    let key = folder.0.join("key.pem");
    std::fs::write(&key, &app.private_key).unwrap();
    // A repository's own scale set gets jobs of a public repository.
    simulator.enqueue(&Enqueue { repository: "acme/widgets".into(), labels: vec!["linux".into()], ..Enqueue::default() }).await.unwrap();
    let drive = arguments(&[
        ("url", "http://github.localhost/Acme/Widgets".into()),
        ("client-id", app.client_id),
        ("installation", installation.to_string()),
        ("key", key.display().to_string()),
        ("proxy", address),
        ("jobs", "1".into()),
        ("patience", "6s".into()),
    ]);
    // The runners of this story cannot resolve the name: the job is cancelled instead, which the listener is told as well.
    let cancel = tokio::spawn({
        let simulator = simulator.clone();
        async move {
            loop {
                let made = simulator.runners().await.unwrap();
                if !made.is_empty() {
                    let jobs = simulator.call("GET", "jobs", Vec::new()).await.unwrap();
                    return simulator.cancel(jobs["jobs"][0]["run"].as_i64().unwrap()).await.unwrap();
                }
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
    });
    let mut command = Command::new(program().await);
    command.args(&drive);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    cancel.await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let seen: Value = serde_json::from_str(text.lines().last().unwrap_or_default())
        .unwrap_or_else(|_| panic!("{text} {}", String::from_utf8_lossy(&output.stderr)));
    assert_eq!(seen["completed"], serde_json::json!({"job 0": "canceled"}));
}

#[tokio::test]
async fn an_enterprise_with_a_group() {
    let (server, simulator) = start(quick()).await;
    simulator.enterprise("big").await.unwrap();
    let acme = mayfly_github_simulator::control::NewOrganization { login: "acme".into(), enterprise: Some("big".into()) };
    simulator.organization(&acme).await.unwrap();
    let group = NewGroup {
        place: "enterprises/big".into(),
        name: "locked".into(),
        visibility: "selected".into(),
        // An enterprise selects organizations.
        organizations: vec!["acme".into()],
        ..NewGroup::default()
    };
    simulator.runner_group(&group).await.unwrap();
    let token = simulator.personal_token().await.unwrap();
    // A server that stumbles is asked again.
    simulator.fault(&Fault { path: "/**/agents".into(), status: Some(503), times: Some(1), ..Fault::default() }).await.unwrap();
    simulator
        .enqueue(&Enqueue { repository: "acme/widgets".into(), labels: vec!["linux".into()], script: "sleep 2".into(), count: 1 })
        .await
        .unwrap();
    let url = format!("{}/enterprises/big", server.url);
    let (seen, ran) = story(&arguments(&[("url", url), ("token", token), ("group", "locked".into()), ("jobs", "1".into())])).await;
    assert_eq!(seen["completed"], serde_json::json!({"job 0": "succeeded"}), "{}", ran[0].output);
    assert!(seen["groupId"].as_i64().unwrap() > 1);
}
