//! The forge itself: what the clients of others do not reach.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking, in its helpers as well")]

mod common;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::{Folder, PATIENCE, call, call_of, jit, quick, runner, start};
use mayfly_github_simulator::client::Simulator;
use mayfly_github_simulator::control::{Enqueue, NewGroup, NewRepository};
use mayfly_github_simulator::keys::{RsaKey, Token, webhook_signatures};
use mayfly_github_simulator::model::{Event, Fault, Settings};
use mayfly_github_simulator::server::{Config, Server};
use serde_json::{Value, json};

const NOTHING: Value = Value::Null;

/// URL and `Authorization` of the Actions service for `acme`.
async fn admin(simulator: &Simulator, token: &str) -> (String, String) {
    let api = format!("{}/api/v3", simulator.url());
    let (status, made) =
        call("POST", &format!("{api}/orgs/acme/actions/runners/registration-token"), &format!("Bearer {token}"), &NOTHING).await;
    assert_eq!(status, 201);
    let body = json!({"url": format!("{}/acme", simulator.url()), "runner_event": "register"});
    let remote = format!("RemoteAuth {}", made["token"].as_str().unwrap());
    let (status, made) = call("POST", &format!("{api}/actions/runner-registration"), &remote, &body).await;
    assert_eq!(status, 200);
    (made["url"].as_str().unwrap().trim_end_matches('/').to_owned(), format!("Bearer {}", made["token"].as_str().unwrap()))
}

#[tokio::test]
async fn an_app_signs_in_as_documented() {
    let (_server, simulator) = start(quick()).await;
    let (app, installation) = simulator.app("acme").await.unwrap();
    let rotated = simulator.rotate_app_key(app.app_id, true).await.unwrap();
    assert_ne!(rotated.private_key, app.private_key);
    let url = format!("{}/api/v3/app/installations/{installation}/access_tokens", simulator.url());
    let now = jiff::Timestamp::now().as_second();
    let stranger = RsaKey::generate().unwrap();
    let wrong = stranger.sign(&json!({"iss": app.client_id, "iat": now - 60, "exp": now + 300})).unwrap();
    let (status, answer) = call("POST", &url, &format!("Bearer {wrong}"), &NOTHING).await;
    assert_eq!((status, answer["message"].as_str().unwrap()), (401, "A JSON web token could not be decoded"));
    let (status, answer) = call("GET", &format!("{}/api/v3/orgs/acme", simulator.url()), "Bearer ghs_nothing", &NOTHING).await;
    assert_eq!((status, answer["message"].as_str().unwrap()), (401, "Bad credentials"));
    // An installation sees its account only.
    let token = simulator.personal_token().await.unwrap();
    let (status, _) = call("GET", &format!("{}/api/v3/orgs/other", simulator.url()), &format!("Bearer {token}"), &NOTHING).await;
    assert_eq!(status, 404);
}

#[tokio::test]
async fn sessions_messages_and_capacity() {
    let (_server, simulator) = start(Settings { poll: 0.5, session_hold: 2.0, ..Settings::default() }).await;
    let token = simulator.personal_token().await.unwrap();
    let (base, bearer) = admin(&simulator, &token).await;
    let sets = format!("{base}/_apis/runtime/runnerscalesets");
    let (status, set) = call("POST", &sets, &bearer, &json!({"name": "linux", "runnerGroupId": 1})).await;
    assert_eq!(status, 200);
    let set = format!("{sets}/{}", set["id"]);
    let open = |owner: &'static str| {
        let (url, bearer) = (format!("{set}/sessions"), bearer.clone());
        async move { call("POST", &url, &bearer, &json!({"ownerName": owner})).await }
    };
    let (status, session) = open("first").await;
    assert_eq!(status, 200);
    let (status, conflict) = open("second").await;
    assert_eq!(status, 409);
    assert!(conflict["typeName"].as_str().unwrap().starts_with("GitHub.Actions.Runtime.WebApi.RunnerScaleSetSessionConflictException"));

    simulator
        .enqueue(&Enqueue { repository: "acme/widgets".into(), labels: vec!["linux".into()], count: 3, ..Enqueue::default() })
        .await
        .unwrap();
    let poll = |session: &Value, last: i64, capacity: i64| {
        let queue = format!("Bearer {}", session["messageQueueAccessToken"].as_str().unwrap());
        let url = format!("{}&lastMessageId={last}", session["messageQueueUrl"].as_str().unwrap());
        async move {
            let request = ureq::get(&url).header("authorization", queue).header("x-scalesetmaxcapacity", capacity.to_string());
            let answer = tokio::task::spawn_blocking(move || request.config().http_status_as_error(false).build().call().unwrap());
            let mut answer = answer.await.unwrap();
            let value: Value = serde_json::from_str(&answer.body_mut().read_to_string().unwrap()).unwrap_or_default();
            (answer.status().as_u16(), value)
        }
    };
    // No capacity: nothing. Then one, then one more; less takes nothing back.
    let begun = Instant::now();
    assert_eq!(poll(&session, 0, 0).await.0, 202);
    assert!(begun.elapsed() >= Duration::from_millis(500));
    let (status, first) = poll(&session, 0, 1).await;
    assert_eq!((status, &first["messageId"], &first["statistics"]["totalAssignedJobs"]), (200, &json!(100_000_001), &json!(1)));
    let jobs: Vec<Value> = serde_json::from_str(first["body"].as_str().unwrap()).unwrap();
    assert_eq!((jobs.len(), &jobs[0]["messageType"], &jobs[0]["runnerRequestId"]), (1, &json!("JobAssigned"), &json!(0)));
    let (_, second) = poll(&session, 100_000_001, 2).await;
    assert_eq!((&second["messageId"], &second["statistics"]["totalAssignedJobs"]), (&json!(100_000_002), &json!(2)));
    assert_eq!(poll(&session, 100_000_002, 0).await.0, 202);
    assert_eq!(simulator.scale_sets().await.unwrap()[0]["statistics"]["totalAssignedJobs"], 2);

    // A successor refreshes the session of a listener that was killed: same id, new token.
    let url = format!("{set}/sessions/{}", session["sessionId"].as_str().unwrap());
    let (status, refreshed) = call("PATCH", &url, &bearer, &NOTHING).await;
    assert_eq!((status, &refreshed["sessionId"]), (200, &session["sessionId"]));
    // Abandoned, it is released after the hold, and what was not acknowledged comes again.
    assert_eq!(open("second").await.0, 409);
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let (status, next) = open("second").await;
    assert_eq!(status, 200);
    assert_eq!(call("PATCH", &url, &bearer, &NOTHING).await.0, 404);
    assert_eq!(poll(&session, 0, 2).await.0, 401);
    assert_eq!(poll(&next, 0, 2).await.1["messageId"], 100_000_001);
    let delete = next["messageQueueUrl"].as_str().unwrap().replace("message?", "message/100000001?");
    let queue = format!("Bearer {}", next["messageQueueAccessToken"].as_str().unwrap());
    assert_eq!(call("DELETE", &delete, &queue, &NOTHING).await.0, 204);
    assert_eq!(poll(&next, 0, 2).await.1["messageId"], 100_000_002);
    simulator.expire("queue").await.unwrap();
    assert_eq!(call("DELETE", &delete, &queue, &NOTHING).await.0, 401);
    // Nothing is to be acquired on github.com, and the router says so.
    assert_eq!(call("POST", &format!("{set}/acquirejobs"), &queue, &json!([1])).await.0, 404);

    // Behind the client's back.
    let id = simulator.scale_sets().await.unwrap()[0]["id"].as_i64().unwrap();
    simulator.delete_scale_set(id).await.unwrap();
    let (status, gone) = call("GET", &set, &bearer, &NOTHING).await;
    assert_eq!(status, 404);
    assert!(gone["typeName"].as_str().unwrap().contains("RunnerScaleSetNotFoundException"));
}

#[tokio::test]
async fn groups_and_visibility_decide_who_gets_jobs() {
    let (_server, simulator) = start(Settings { poll: 0.2, drop_custom_labels: true, ..Settings::default() }).await;
    let public = NewRepository { owner: "acme".into(), name: "public".into(), private: false, ..NewRepository::default() };
    simulator.repository(&public).await.unwrap();
    let token = simulator.personal_token().await.unwrap();
    let (base, bearer) = admin(&simulator, &token).await;
    let sets = format!("{base}/_apis/runtime/runnerscalesets");
    let (_, set) = call("POST", &sets, &bearer, &json!({"name": "linux", "labels": [{"name": "linux"}, {"name": "big"}]})).await;
    assert_eq!(set["labels"].as_array().unwrap().len(), 1, "labels are dropped without a word");
    call("POST", &format!("{sets}/{}/sessions", set["id"]), &bearer, &json!({"ownerName": "me"})).await;
    for repository in ["acme/public", "acme/widgets"] {
        simulator.enqueue(&Enqueue { repository: repository.into(), labels: vec!["linux".into()], ..Enqueue::default() }).await.unwrap();
    }
    let available = || async { simulator.scale_sets().await.unwrap()[0]["statistics"]["totalAvailableJobs"].clone() };
    assert_eq!(available().await, 1, "the default group has no public repositories");
    let group = NewGroup { place: "acme".into(), name: "default".into(), allows_public_repositories: true, ..NewGroup::default() };
    assert_eq!(simulator.runner_group(&group).await.unwrap(), 1);
    assert_eq!(available().await, 2);
    let selected = vec!["acme/widgets/.github/workflows/other.yaml@refs/heads/main".to_owned()];
    simulator.runner_group(&NewGroup { restricted_to_workflows: true, selected_workflows: selected, ..group }).await.unwrap();
    assert_eq!(available().await, 0);
    let url = format!("{}/api/v3/orgs/acme/actions/runner-groups", simulator.url());
    let (_, groups) = call("GET", &url, &format!("Bearer {token}"), &NOTHING).await;
    let found = &groups["runner_groups"][0];
    assert_eq!((&found["id"], &found["restricted_to_workflows"], &found["default"]), (&json!(1), &json!(true), &json!(true)));
}

const WORKFLOW: &str = r#"
name: CI
on: [push, pull_request]
permissions: {id-token: write}
env: {GREETING: hello}
jobs:
  build:
    runs-on: lin
    outputs: {made: "${{ steps.one.outputs.value }}"}
    steps:
      - uses: actions/checkout@v4
      - id: one
        run: |
          echo "$GREETING ${{ github.repository }} $GITHUB_REF_NAME $RUNNER_NAME CI=$CI"
          echo "value=forty-two" >> "$GITHUB_OUTPUT"
          printf 'MULTI<<EOF\na\nb\nEOF\n' >> "$GITHUB_ENV"
          mkdir -p "$RUNNER_TEMP/bin"; printf '#!/bin/sh\necho from-path\n' > "$RUNNER_TEMP/bin/tool"; chmod +x "$RUNNER_TEMP/bin/tool"
          echo "$RUNNER_TEMP/bin" >> "$GITHUB_PATH"
          echo "::add-mask::sesame"
          echo "open sesame, and ${{ secrets.KEY }}"
          env | grep -c JITCONFIG || true
      - run: tool; echo "$MULTI" | tr '\n' '+'; echo "got ${{ steps.one.outputs.value }}"
      - shell: python
        run: print("python " + "works")
      - run: echo "$ACTIONS_ID_TOKEN_REQUEST_URL"; exit 3
        continue-on-error: true
      - run: echo "::set-output name=x::y"
      - run: echo never
      - if: always()
        run: echo after-all
  next:
    needs: build
    runs-on: lin
    steps: [{run: "echo unreachable"}]
  clean:
    needs: build
    if: failure()
    runs-on: lin
    steps: [{run: "echo cleaned ${{ needs.build.result }} ${{ needs.build.outputs.made }}"}]
"#;

#[tokio::test]
async fn a_workflow_runs_on_the_stand_in_runner() {
    let (_server, simulator) = start(quick()).await;
    let secrets = json!({"KEY": "s3cr3t"}).as_object().unwrap().clone();
    simulator
        .repository(&NewRepository { owner: "acme".into(), name: "widgets".into(), secrets, ..NewRepository::default() })
        .await
        .unwrap();
    simulator.workflow("acme/widgets", "ci.yaml", WORKFLOW).await.unwrap();
    let token = simulator.personal_token().await.unwrap();
    let folder = common::Folder::new();
    let (started, completed) = (folder.0.join("started.sh"), folder.0.join("completed.sh"));
    std::fs::write(&started, "echo hook-started $GITHUB_RUN_ID; test -n \"$ACTIONS_ID_TOKEN_REQUEST_TOKEN\"").unwrap();
    std::fs::write(&completed, "echo hook-completed").unwrap();
    let hooks = [
        ("ACTIONS_RUNNER_HOOK_JOB_STARTED", started.to_str().unwrap()),
        ("ACTIONS_RUNNER_HOOK_JOB_COMPLETED", completed.to_str().unwrap()),
    ];
    let runs = simulator.dispatch("acme/widgets", &Event::default()).await.unwrap();
    let mut ran = Vec::new();
    for name in ["one", "two"] {
        ran.push(runner(&jit(&simulator, &token, name, "lin").await, &hooks));
    }
    let jobs = simulator.finished(runs[0], PATIENCE).await.unwrap();
    for ran in ran {
        let ran = ran.await.unwrap();
        assert_eq!(ran.code, 0, "{}", ran.output);
    }
    let job = |key: &str| jobs.iter().find(|job| job.key == key).unwrap();
    let build = job("build");
    let log = &build.log;
    assert_eq!(build.conclusion.as_deref(), Some("failure"), "{log}");
    for expected in [
        "stand-in",
        "hook-started",
        "hello acme/widgets main ",
        "CI=true",
        "open ***, and ***",
        "from-path",
        "a+b+",
        "got forty-two",
        "python works",
        "##[error]Process completed with exit code 3.",
        "`set-output` command is refused",
        "after-all",
        "hook-completed",
        "actions/checkout does nothing",
    ] {
        assert!(log.contains(expected), "{expected:?} is missing in: {log}");
    }
    for hidden in ["s3cr3t", "never\n", "sesame,"] {
        assert!(!log.lines().any(|line| line.ends_with(hidden.trim()) || line.contains("s3cr3t")), "{hidden} in: {log}");
    }
    assert_eq!(job("next").conclusion.as_deref(), Some("skipped"));
    assert!(job("clean").log.contains("cleaned failure forty-two"), "{}", job("clean").log);
    let conclusions: Vec<&str> = build.steps.iter().filter_map(|step| step["conclusion"].as_str()).collect();
    assert_eq!(conclusions, ["success", "success", "success", "success", "success", "failure", "failure", "skipped", "success", "success"]);
    let url = format!("{}/api/v3/repos/acme/widgets/actions/jobs/{}", simulator.url(), build.id);
    let (status, seen) = call("GET", &url, &format!("Bearer {token}"), &NOTHING).await;
    assert_eq!((status, &seen["conclusion"], &seen["status"]), (200, &json!("failure"), &json!("completed")));
    assert!(seen["runner_name"].is_string());
    assert!(simulator.counters().await.unwrap()["runner_per_job"].as_f64().unwrap() > 0.0);
}

#[tokio::test]
async fn jobs_get_oidc_tokens() {
    let (_server, simulator) = start(quick()).await;
    let file = r#"
on: [push, pull_request]
permissions: {id-token: write}
jobs:
  ask:
    runs-on: lin
    environment: production
    steps:
      - shell: python
        run: |
          import base64, os, urllib.request
          url = os.environ.get("ACTIONS_ID_TOKEN_REQUEST_URL")
          if not url: print("no-url"); raise SystemExit
          request = urllib.request.Request(url + "&audience=me", headers={"Authorization": "bearer " + os.environ["ACTIONS_ID_TOKEN_REQUEST_TOKEN"]})
          value = __import__("json").load(urllib.request.urlopen(request))["value"]
          print("token=" + base64.b32encode(value.encode()).decode())
          print("asked=" + base64.b32encode((url + " " + os.environ["ACTIONS_ID_TOKEN_REQUEST_TOKEN"]).encode()).decode())
"#;
    simulator.workflow("acme/widgets", "ask.yaml", file).await.unwrap();
    let token = simulator.personal_token().await.unwrap();
    let runs = simulator.dispatch("acme/widgets", &Event::default()).await.unwrap();
    let ran = runner(&jit(&simulator, &token, "one", "lin").await, &[]);
    let job = simulator.finished(runs[0], PATIENCE).await.unwrap().remove(0);
    ran.await.unwrap();
    let told = |name: &str| {
        let text = job.log.split(name).nth(1).unwrap_or_else(|| panic!("{}", job.log)).lines().next().unwrap();
        String::from_utf8(base32(text)).unwrap()
    };
    let jwt = told(" token=");
    let parsed = Token::parse(&jwt).unwrap();
    let claims = &parsed.claims;
    for (name, value) in [
        ("iss", format!("{}/_services/token", simulator.url())),
        ("aud", "me".into()),
        ("sub", "repo:acme/widgets:environment:production".into()),
        ("repository", "acme/widgets".into()),
        ("check_run_id", job.id.to_string()),
        ("run_id", job.run.to_string()),
        ("runner_environment", "self-hosted".into()),
        ("environment", "production".into()),
        ("ref_protected", "true".into()),
        ("event_name", "push".into()),
        ("job_workflow_ref", "acme/widgets/.github/workflows/ask.yaml@refs/heads/main".into()),
        ("repository_visibility", "private".into()),
    ] {
        assert_eq!(claims[name], value, "{name}");
    }
    assert_eq!(parsed.number("exp").unwrap() - parsed.number("iat").unwrap(), 300);
    // Discovery leads to the key; after rotation both are there, after withdrawal only the new one.
    let (_, discovery) = call("GET", &format!("{}/_services/token/.well-known/openid-configuration", simulator.url()), "", &NOTHING).await;
    assert_eq!(discovery["issuer"], claims["iss"]);
    let keys = || async { call("GET", discovery["jwks_uri"].as_str().unwrap(), "", &NOTHING).await.1["keys"].as_array().unwrap().clone() };
    assert!(keys().await.iter().any(|key| key["kid"] == parsed.header["kid"]));
    simulator.rotate_oidc().await.unwrap();
    assert_eq!(keys().await.len(), 2);
    simulator.withdraw_oidc().await.unwrap();
    assert!(keys().await.iter().all(|key| key["kid"] != parsed.header["kid"]));
    // The job is over: so are its tokens.
    let asked = told(" asked=");
    let (url, bearer) = asked.split_once(' ').unwrap();
    let (status, refused) = call("GET", url, &format!("bearer {bearer}"), &NOTHING).await;
    assert_eq!((status, refused["message"].as_str().unwrap()), (400, "Can't issue ID_TOKEN for job in 'Completed' state"));

    // A pull request from a fork may not ask.
    let event = Event {
        name: "pull_request".into(),
        git_ref: "refs/pull/1/merge".into(),
        head_ref: "evil".into(),
        base_ref: "main".into(),
        head_repository: Some("mallory/widgets".into()),
        ..Event::default()
    };
    let runs = simulator.dispatch("acme/widgets", &event).await.unwrap();
    let ran = runner(&jit(&simulator, &token, "two", "lin").await, &[]);
    let job = simulator.finished(runs[0], PATIENCE).await.unwrap().remove(0);
    ran.await.unwrap();
    assert!(job.log.contains("no-url"), "{}", job.log);
}

/// RFC 4648 base 32: a form of a token that masks do not know.
fn base32(text: &str) -> Vec<u8> {
    let (mut bits, mut count, mut bytes) = (0_u32, 0, Vec::new());
    for character in text.bytes().filter(|byte| *byte != b'=') {
        let value = if character.is_ascii_digit() { character - b'2' + 26 } else { character - b'A' };
        bits = bits << 5 | u32::from(value);
        count += 5;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff) as u8);
        }
    }
    bytes
}

/// A certificate for `localhost` and its key, in files, and the authority that signed it.
fn certificate(folder: &Folder) -> ((PathBuf, PathBuf), String) {
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority = params.self_signed(&authority_key).unwrap();
    let issuer = rcgen::Issuer::new(params, authority_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let signed = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let paths = (folder.0.join("certificate.pem"), folder.0.join("key.pem"));
    std::fs::write(&paths.0, signed.pem()).unwrap();
    std::fs::write(&paths.1, key.serialize_pem()).unwrap();
    (paths, authority.pem())
}

/// A hook that asks for the job's token, has it hidden, and hands it to the steps.
const ASKING_HOOK: &str = r#"
if [ -z "${ACTIONS_ID_TOKEN_REQUEST_URL:-}${ACTIONS_ID_TOKEN_REQUEST_TOKEN:-}" ]; then echo "hook: nothing to ask with"; exit 0; fi
token=$(python3 - <<'END'
import json, os, urllib.request
bearer = {"Authorization": "bearer " + os.environ["ACTIONS_ID_TOKEN_REQUEST_TOKEN"]}
request = urllib.request.Request(os.environ["ACTIONS_ID_TOKEN_REQUEST_URL"] + "&audience=store", headers=bearer)
print(json.load(urllib.request.urlopen(request))["value"])
END
)
echo "::add-mask::"
echo "::add-mask::$token"
echo "hook: got $token"
echo "HANDED_ON=$token" >> "$GITHUB_ENV"
"#;

#[tokio::test]
async fn a_hook_trades_the_token_of_an_issuer_with_a_certificate() {
    let folder = Folder::new();
    let (tls, authority) = certificate(&folder);
    let (listen, issuer) = ("127.0.0.1:0".parse().unwrap(), "https://localhost:0/_services/token/".to_owned());
    let config = Config { tls: Some(tls), tls_listen: Some(listen), issuer: Some(issuer), settings: quick(), ..Config::default() };
    let server = Server::start(config).await.unwrap();
    let issuer = format!("https://localhost:{}/_services/token", server.tls_address.unwrap().port());
    assert!(server.url.starts_with("http://"), "what is handed out stays plain: {}", server.url);
    let simulator = Simulator::new(&server.url, b"");
    simulator.repository(&NewRepository { owner: "acme".into(), name: "widgets".into(), ..NewRepository::default() }).await.unwrap();
    let file = r#"
on: push
jobs:
  may:
    runs-on: may
    permissions: {id-token: write}
    steps:
      - run: echo "first $HANDED_ON"; echo "wrapped=$(printf %s "$HANDED_ON" | base32 -w0)"
      - run: echo "second $HANDED_ON"
  may-not:
    runs-on: may-not
    steps: [{run: 'echo "handed on: ($HANDED_ON)"'}]
"#;
    simulator.workflow("acme/widgets", "trade.yaml", file).await.unwrap();
    let token = simulator.personal_token().await.unwrap();
    let runs = simulator.dispatch("acme/widgets", &Event::default()).await.unwrap();
    let hook = folder.0.join("hook.sh");
    std::fs::write(&hook, ASKING_HOOK).unwrap();
    let hooks = [("ACTIONS_RUNNER_HOOK_JOB_STARTED", hook.to_str().unwrap())];
    let mut ran = Vec::new();
    for label in ["may", "may-not"] {
        ran.push(runner(&jit(&simulator, &token, label, label).await, &hooks));
    }
    let jobs = simulator.finished(runs[0], PATIENCE).await.unwrap();
    for ran in ran {
        ran.await.unwrap();
    }
    let log = |key: &str| {
        let job = jobs.iter().find(|job| job.key == key).unwrap();
        assert_eq!(job.conclusion.as_deref(), Some("success"), "{}", job.log);
        job.log.as_str()
    };
    // Without the permission there is nothing to ask with.
    for expected in ["hook: nothing to ask with", "handed on: ()"] {
        assert!(log("may-not").contains(expected), "{expected:?} is missing in: {}", log("may-not"));
    }
    // With it, the hook's file is the steps' environment, and what it hid is hidden from then on, as is the word that hid it.
    let log = log("may");
    for expected in ["hook: got ***", "first ***", "second ***", "##[warning]Can't add secret mask for empty string"] {
        assert!(log.contains(expected), "{expected:?} is missing in: {log}");
    }
    assert!(!log.contains("::add-mask"), "{log}");
    let wrapped = log.split(" wrapped=").nth(1).unwrap_or_else(|| panic!("{log}")).lines().next().unwrap();
    let jwt = String::from_utf8(base32(wrapped)).unwrap();
    assert!(!log.contains(&jwt), "{log}");

    // The token says whose it is, and that one answers where the token says, for those who trust its certificate.
    let parsed = Token::parse(&jwt).unwrap();
    assert_eq!((&parsed.claims["iss"], &parsed.claims["aud"]), (&json!(issuer), &json!("store")));
    let authority = authority.as_bytes();
    let (status, discovery) = call_of(authority, "GET", &format!("{issuer}/.well-known/openid-configuration"), "", &NOTHING).await;
    assert_eq!((status, &discovery["issuer"]), (200, &json!(issuer)));
    assert_eq!(discovery["jwks_uri"], format!("{issuer}/.well-known/jwks"));
    let (_, keys) = call_of(authority, "GET", discovery["jwks_uri"].as_str().unwrap(), "", &NOTHING).await;
    assert!(keys["keys"].as_array().unwrap().iter().any(|key| key["kid"] == parsed.header["kid"]), "{keys}");
    let url = format!("{issuer}/.well-known/jwks");
    let stranger = tokio::task::spawn_blocking(move || mayfly_github_simulator::http::agent(b"", PATIENCE).get(&url).call());
    assert!(stranger.await.unwrap().is_err(), "the certificate is nobody else's");
}

#[tokio::test]
async fn jobs_are_cancelled_and_runners_are_lost() {
    let (_server, simulator) = start(Settings { lock: 2.0, poll: 1.0, ..Settings::default() }).await;
    let token = simulator.personal_token().await.unwrap();
    let enqueue = |script: &str| {
        let jobs = Enqueue { repository: "acme/widgets".into(), labels: vec!["lin".into()], script: script.into(), count: 1 };
        let simulator = simulator.clone();
        async move { simulator.enqueue(&jobs).await.unwrap() }
    };
    let state = |run: i64, wanted: &'static str| {
        let simulator = simulator.clone();
        async move {
            let begun = Instant::now();
            while simulator.jobs(run).await.unwrap()[0].state != wanted {
                assert!(begun.elapsed() < PATIENCE);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    };
    // Longer than the lock: the runner renews it. Then somebody cancels.
    let run = enqueue("trap 'echo got-interrupt; exit 1' INT; sleep 60 & wait").await;
    let ran = runner(&jit(&simulator, &token, "one", "lin").await, &[]);
    state(run, "running").await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    state(run, "running").await;
    simulator.cancel(run).await.unwrap();
    let job = simulator.finished(run, PATIENCE).await.unwrap().remove(0);
    assert_eq!(job.conclusion.as_deref(), Some("cancelled"), "{}", job.log);
    assert!(job.log.contains("The operation was canceled."), "{}", job.log);
    assert_eq!(ran.await.unwrap().code, 0);

    // A runner that does not renew its job loses it as failed.
    let run = enqueue("sleep 60").await;
    let fault = Fault { path: "/_services/run/renewjob".into(), status: Some(500), ..Fault::default() };
    simulator.fault(&fault).await.unwrap();
    let ran = runner(&jit(&simulator, &token, "two", "lin").await, &[]);
    let job = simulator.finished(run, PATIENCE).await.unwrap().remove(0);
    assert_eq!(job.conclusion.as_deref(), Some("failure"));
    assert!(job.log.contains("lost communication"), "{}", job.log);
    assert!(simulator.runners().await.unwrap().is_empty());
    // When it hears that the job is not its own any more, it stops it.
    simulator.clear_faults().await.unwrap();
    ran.await.unwrap();

    // A configuration whose registration is gone is of no use.
    let configuration = jit(&simulator, &token, "three", "lin").await;
    let id = simulator.runners().await.unwrap()[0]["id"].as_i64().unwrap();
    let url = format!("{}/api/v3/orgs/acme/actions/runners/{id}", simulator.url());
    assert_eq!(call("DELETE", &url, &format!("Bearer {token}"), &NOTHING).await.0, 204);
    assert_eq!(runner(&configuration, &[]).await.unwrap().code, 1);
}

#[tokio::test]
async fn jobs_that_no_runner_takes_are_assigned_anew() {
    let (_server, simulator) = start(Settings { pickup: 0.3, poll: 0.2, ..Settings::default() }).await;
    let token = simulator.personal_token().await.unwrap();
    let (base, bearer) = admin(&simulator, &token).await;
    let sets = format!("{base}/_apis/runtime/runnerscalesets");
    let (_, set) = call("POST", &sets, &bearer, &json!({"name": "linux"})).await;
    let (_, session) = call("POST", &format!("{sets}/{}/sessions", set["id"]), &bearer, &json!({"ownerName": "me"})).await;
    let run = simulator
        .enqueue(&Enqueue { repository: "acme/widgets".into(), labels: vec!["linux".into()], ..Enqueue::default() })
        .await
        .unwrap();
    let queue = format!("Bearer {}", session["messageQueueAccessToken"].as_str().unwrap());
    let (mut last, mut kinds) = (0, Vec::new());
    let begun = Instant::now();
    while simulator.jobs(run).await.unwrap()[0].state != "completed" {
        assert!(begun.elapsed() < PATIENCE);
        let url = format!("{}&lastMessageId={last}", session["messageQueueUrl"].as_str().unwrap());
        let (status, message) = call("GET", &url, &queue, &NOTHING).await;
        if status == 200 {
            last = message["messageId"].as_i64().unwrap();
            let jobs: Vec<Value> = serde_json::from_str(message["body"].as_str().unwrap()).unwrap();
            kinds.extend(
                jobs.iter().map(|job| format!("{} {}", job["messageType"].as_str().unwrap(), job["result"].as_str().unwrap_or_default())),
            );
        }
    }
    let once = ["JobAssigned ", "JobCompleted canceled"];
    assert!(kinds.starts_with(&[once, once].concat().map_to_strings()), "{kinds:?}");
    assert_eq!(simulator.jobs(run).await.unwrap()[0].assignments, 3);
}

trait ToStrings {
    fn map_to_strings(&self) -> Vec<String>;
}

impl ToStrings for Vec<&str> {
    fn map_to_strings(&self) -> Vec<String> {
        self.iter().map(|text| (*text).to_owned()).collect()
    }
}

#[tokio::test]
async fn webhooks_are_signed_and_come_again_on_command() {
    let (_server, simulator) = start(quick()).await;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let (sender, mut deliveries) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut bytes = Vec::new();
            let mut buffer = [0; 65536];
            loop {
                let read = stream.read(&mut buffer).unwrap();
                bytes.extend_from_slice(&buffer[..read]);
                let text = String::from_utf8_lossy(&bytes).into_owned();
                if let Some((head, body)) = text.split_once("\r\n\r\n") {
                    let length = head
                        .lines()
                        .find_map(|line| line.to_lowercase().strip_prefix("content-length: ").map(|n| n.parse::<usize>().unwrap()));
                    if body.len() >= length.unwrap_or_default() {
                        let _ = sender.send((head.to_lowercase(), body.to_owned()));
                        break;
                    }
                }
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").unwrap();
        }
    });
    simulator.webhook(&url, "secret", Some("acme")).await.unwrap();
    let token = simulator.personal_token().await.unwrap();
    let run =
        simulator.enqueue(&Enqueue { repository: "acme/widgets".into(), labels: vec!["lin".into()], ..Enqueue::default() }).await.unwrap();
    let ran = runner(&jit(&simulator, &token, "one", "lin").await, &[]);
    simulator.finished(run, PATIENCE).await.unwrap();
    ran.await.unwrap();
    let mut actions = Vec::new();
    for _ in 0..3 {
        let (head, body) = tokio::time::timeout(PATIENCE, deliveries.recv()).await.unwrap().unwrap();
        let (sha256, sha1) = webhook_signatures("secret", body.as_bytes());
        for header in [
            format!("x-hub-signature-256: sha256={sha256}"),
            format!("x-hub-signature: sha1={sha1}"),
            "x-github-event: workflow_job".into(),
        ] {
            assert!(head.contains(&header), "{header} is missing in {head}");
        }
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["repository"]["full_name"], "acme/widgets");
        assert_eq!(body["workflow_job"]["labels"], json!(["lin"]));
        actions.push(body["action"].as_str().unwrap().to_owned());
    }
    assert_eq!(actions, ["queued", "in_progress", "completed"]);
    let guid = simulator.deliveries().await.unwrap()[0]["guid"].as_str().unwrap().to_owned();
    simulator.redeliver(&guid).await.unwrap();
    let (head, _) = tokio::time::timeout(PATIENCE, deliveries.recv()).await.unwrap().unwrap();
    assert!(head.contains(&guid), "the same delivery comes again");
}

#[tokio::test]
async fn faults_strike_where_they_are_told() {
    let (_server, simulator) = start(quick()).await;
    let token = format!("Bearer {}", simulator.personal_token().await.unwrap());
    let url = format!("{}/api/v3/repos/acme/widgets", simulator.url());
    let limited = Fault {
        path: "/api/v3/repos/**".into(),
        status: Some(429),
        times: Some(1),
        after: 1,
        headers: [("Retry-After".to_owned(), "7".to_owned())].into(),
        ..Fault::default()
    };
    simulator.fault(&limited).await.unwrap();
    assert_eq!(call("GET", &url, &token, &NOTHING).await.0, 200);
    assert_eq!(call("GET", &url, &token, &NOTHING).await.0, 429);
    assert_eq!(call("GET", &url, &token, &NOTHING).await.0, 200);
    simulator.fault(&Fault { path: "/api/v3/repos/**".into(), latency: 0.5, times: Some(1), ..Fault::default() }).await.unwrap();
    let begun = Instant::now();
    assert_eq!(call("GET", &url, &token, &NOTHING).await.0, 200);
    assert!(begun.elapsed() >= Duration::from_millis(500));
    for fault in [Fault { hang: true, ..Fault::default() }, Fault { drop: true, ..Fault::default() }] {
        simulator.fault(&Fault { path: "/api/v3/repos/**".into(), times: Some(1), ..fault }).await.unwrap();
        let (url, token) = (url.clone(), token.clone());
        let answer = tokio::task::spawn_blocking(move || {
            let agent = ureq::Agent::config_builder().timeout_global(Some(Duration::from_millis(500))).build().new_agent();
            agent.get(&url).header("authorization", &token).call().and_then(|mut answer| answer.body_mut().read_to_string())
        });
        assert!(answer.await.unwrap().is_err());
    }
    let seen = simulator.requests(0).await.unwrap();
    let statuses: Vec<u16> = seen.iter().filter(|seen| seen.path.ends_with("/widgets")).map(|seen| seen.status).collect();
    assert_eq!(statuses, [200, 429, 200, 200, 0, 200]);
    // Limits are GitHub's.
    simulator.set(json!({"rate_limit": 1})).await.unwrap();
    assert_eq!(call("GET", &url, &token, &NOTHING).await.0, 403);
}

#[tokio::test]
async fn a_job_waits_for_the_approval_of_its_environment() {
    let (_server, simulator) = start(quick()).await;
    let guarded = NewRepository {
        owner: "acme".into(),
        name: "widgets".into(),
        protected_environments: vec!["production".into()],
        ..NewRepository::default()
    };
    simulator.repository(&guarded).await.unwrap();
    let file = "{on: push, jobs: {deploy: {runs-on: lin, environment: production, steps: [{run: 'true'}]}}}";
    simulator.workflow("acme/widgets", "deploy.yaml", file).await.unwrap();
    let runs = simulator.dispatch("acme/widgets", &Event::default()).await.unwrap();
    let job = simulator.jobs(runs[0]).await.unwrap().remove(0);
    assert_eq!(job.state, "waiting");
    simulator.call("POST", &format!("jobs/{}/approve", job.id), Vec::new()).await.unwrap();
    assert_eq!(simulator.jobs(runs[0]).await.unwrap()[0].state, "queued");
    simulator.cancel(runs[0]).await.unwrap();
    assert_eq!(simulator.jobs(runs[0]).await.unwrap()[0].conclusion.as_deref(), Some("cancelled"));
    assert!(simulator.dispatch("acme/widgets", &Event { name: "release".into(), ..Event::default() }).await.is_err());
}
