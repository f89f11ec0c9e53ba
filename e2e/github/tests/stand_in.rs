//! The stand-in runner as a program: over TLS, through its image's entry point, and what it says of itself.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking, in its helpers as well")]

mod common;

use std::path::Path;
use std::process::{Command, Stdio};

use common::{Folder, PATIENCE, jit_of, quick};
use mayfly_github_simulator::client::Simulator;
use mayfly_github_simulator::control::{Enqueue, NewRepository};
use mayfly_github_simulator::server::{Config, Server};

const RUNNER: &str = env!("CARGO_BIN_EXE_runner-stand-in");

/// What a job looks for: its registration, in every place where a careless entry point leaves it.
const SEARCH: &str = r#"
process=$(cat /proc/$PPID/environ /proc/$PPID/cmdline | tr '\0' '\n' | grep -c 'eyIuY3Jl[Z]' || true)
pipe=$(tr '\0' '\n' < /proc/$PPID/environ | grep -c MAYFLY_REGISTRATION || true)
step=$(env | grep -cE 'JITCONFIG|eyIuY3Jl[Z]' || true)
files=$(grep -rlE 'eyIuY3Jl[Z]' "$HOME" 2>/dev/null | wc -l || true)
echo "found: $process $pipe $step $files"
"#;

#[tokio::test]
async fn a_job_over_tls_through_the_entry_point() {
    let folder = Folder::new();
    let signed = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (certificate, key) = (folder.0.join("certificate.pem"), folder.0.join("key.pem"));
    std::fs::write(&certificate, signed.cert.pem()).unwrap();
    std::fs::write(&key, signed.signing_key.serialize_pem()).unwrap();
    let config = Config {
        tls: Some((certificate.clone(), key)),
        public_url: Some("https://localhost:0".to_owned()),
        settings: quick(),
        ..Config::default()
    };
    let server = Server::start(config).await.unwrap();
    let authority = std::fs::read(&certificate).unwrap();
    let simulator = Simulator::new(&server.url, &authority);
    simulator.repository(&NewRepository { owner: "acme".into(), name: "widgets".into(), ..NewRepository::default() }).await.unwrap();
    let jobs = Enqueue { repository: "acme/widgets".into(), labels: vec!["lin".into()], script: SEARCH.into(), count: 1 };
    let run = simulator.enqueue(&jobs).await.unwrap();
    let token = simulator.personal_token().await.unwrap();
    let configuration = jit_of(&simulator, &authority, &token, "one", "lin").await;
    assert!(configuration.starts_with("eyIuY3JlZ"), "what the job searches for is how a configuration begins");

    // The entry point waits for the pipe; the gate makes it and writes once.
    let pipe = folder.0.join("registration");
    let entrypoint = Path::new(env!("CARGO_MANIFEST_DIR")).join("../images/github-runner-stand-in/mayfly-runner");
    let path = format!("{}:{}", Path::new(RUNNER).parent().unwrap().display(), std::env::var("PATH").unwrap());
    let child = Command::new("bash")
        .arg(entrypoint)
        .env("MAYFLY_REGISTRATION", &pipe)
        .env("HOME", &folder.0)
        .env("PATH", path)
        .env("SSL_CERT_FILE", &certificate)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // What the gate writes when the job was accepted.
    std::fs::write(folder.0.join("job"), "acme/widgets#1").unwrap();
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    tokio::task::spawn_blocking(move || std::fs::write(pipe, configuration).unwrap()).await.unwrap();
    let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    let job = simulator.finished(run, PATIENCE).await.unwrap().remove(0);
    assert_eq!(job.conclusion.as_deref(), Some("success"), "{}", job.log);
    assert!(job.log.contains("found: 0 0 0 0"), "{}", job.log);
}

#[tokio::test]
async fn told_to_end_it_leaves_at_once() {
    let (_server, simulator) = common::start(common::Settings::default()).await;
    let token = simulator.personal_token().await.unwrap();
    let configuration = common::jit(&simulator, &token, "idle", "lin").await;
    let folder = Folder::new();
    let mut child = Command::new(RUNNER).arg("--root").arg(&folder.0).env("ACTIONS_RUNNER_INPUT_JITCONFIG", configuration).spawn().unwrap();
    let online = || async { simulator.runners().await.unwrap()[0]["online"] == true };
    let begun = std::time::Instant::now();
    while !online().await {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let told = std::time::Instant::now();
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let status = tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
    assert_eq!(status.code(), Some(0));
    assert!(told.elapsed() < std::time::Duration::from_secs(10) && !online().await, "it closes its session");
}

#[test]
fn it_says_that_it_is_a_stand_in() {
    for argument in ["--help", "--version"] {
        let output = Command::new(RUNNER).arg(argument).output().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains("stand-in for GitHub's runner"), "{argument}");
    }
    let output = Command::new(RUNNER).args(["--jitconfig", "nonsense"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("stand-in"));
}

/// What stands in for GitHub's listener: says what it was given, and what its parent, the first program of the container, shows.
const LISTENER: &str = r#"#!/bin/bash
echo "$1 in $PWD: $ACTIONS_RUNNER_INPUT_JITCONFIG"
echo "parent shows: $(cat /proc/$PPID/environ /proc/$PPID/cmdline | tr '\0' '\n' | grep -c the-configuration)"
test -w "$RUNNER_TOOL_CACHE" && test -e "$PWD/externals/node" && test -z "$MAYFLY_REGISTRATION" && echo prepared
trap 'echo told to end; exit 0' TERM
test -e "$HOME/linger" && { sleep 30 > /dev/null & wait $!; }
exit 7
"#;

/// Runs the entry point of GitHub's own runner image with a listener that is not GitHub's: only the entry point is tested here.
fn entry_point(linger: bool) -> (i32, String) {
    let folder = Folder::new();
    let (installed, root, pipe) = (folder.0.join("installed"), folder.0.join("root"), folder.0.join("registration"));
    for made in ["installed/bin", "installed/externals/node", "root"] {
        std::fs::create_dir_all(folder.0.join(made)).unwrap();
    }
    std::fs::write(installed.join("run.sh"), "").unwrap();
    std::fs::write(installed.join("bin/Runner.Listener"), LISTENER).unwrap();
    assert!(Command::new("chmod").arg("+x").arg(installed.join("bin/Runner.Listener")).status().unwrap().success());
    if linger {
        std::fs::write(root.join("linger"), "").unwrap();
    }
    let child = Command::new("bash")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../images/github-runner/entrypoint"))
        .env("MAYFLY_REGISTRATION", &pipe)
        .env("MAYFLY_RUNNER_INSTALLED", &installed)
        .env("MAYFLY_RUNNER_ROOT", &root)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    std::fs::write(&pipe, "the-configuration").unwrap();
    if linger {
        std::thread::sleep(std::time::Duration::from_secs(1));
        assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    }
    let output = child.wait_with_output().unwrap();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn the_entry_point_of_github_s_runner() {
    let (code, output) = entry_point(false);
    assert_eq!(code, 7, "{output}");
    for expected in ["run in ", "/root: the-configuration", "parent shows: 0", "prepared"] {
        assert!(output.contains(expected), "{expected:?} is missing in {output}");
    }
    let (code, output) = entry_point(true);
    assert!(code == 0 && output.contains("told to end"), "{code} {output}");
}
