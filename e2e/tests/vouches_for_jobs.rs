//! Mayfly as the OIDC issuer of jobs whose forge gives them no tokens: real Gitea, its own runner, a real STS, and AWS's own SDK for Python.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::{Patch, PatchParams};
use mayfly_cluster::World as Place;
use mayfly_cluster::builder::RUNNER_WITH_BOTO3_IMAGE;
use mayfly_cluster::command::{output, run};
use mayfly_crds::RunnerPool;
use mayfly_crds::names::{ANNOTATION_JOB, ANNOTATION_JOB_CLAIMS};
use mayfly_e2e::stage::{PATIENCE, POOL, Stage, said, workflow};
use mayfly_e2e::store::{self, Store};
use mayfly_e2e::wait::eventually;
use mayfly_e2e::world::{SYSTEM, built};
use mayfly_e2e::{ingress, pool};
use serde_json::{Value, json};

/// A stage whose pool's jobs get tokens of Mayfly's and may reach the store.
async fn set(name: &str, change: impl FnOnce(&mut Value)) -> Result<(Stage, Store, RunnerPool)> {
    let stage = Stage::set(name).await?;
    let store = store::start(&stage.world).await?;
    let egress = store.egress(&stage.world)?;
    let served = stage
        .pool(|pool| {
            pool["spec"]["isolation"] = json!({"egress": egress});
            pool["spec"]["jobIdentity"] = json!({"issuer": "Mayfly"});
            pool["spec"]["runner"]["image"] = json!(RUNNER_WITH_BOTO3_IMAGE);
            change(pool);
        })
        .await?;
    stage.hook()?;
    Ok((stage, store, served))
}

/// Lets jobs of a repository become the store's role.
async fn bind(stage: &Stage, store: &Store, repository: &str, change: impl FnOnce(&mut Value)) -> Result<()> {
    let owner = &stage.organization.name;
    stage.forge.create_repo(owner, repository, false)?;
    let number = stage.forge.call("GET", &format!("/repos/{owner}/{repository}"), None)?["id"].as_i64().context("its number")?;
    store.bind(&stage.world, (&store.mayfly, number), (&stage.namespace, POOL), change).await
}

/// What a job needs to reach the store: its authority.
fn trusting(store: &Store, script: &str) -> String {
    format!("cat >/tmp/authority.pem <<'PEM'\n{}\nPEM\n{script}", store.authority.trim())
}

/// Asks for a token as GitHub's own clients do: `@actions/core` appends the audience to the URL and reads `value`.
const ASK: &str = r"import base64, json, os, urllib.error, urllib.request
def ask(audience, token=None):
    url = os.environ['ACTIONS_ID_TOKEN_REQUEST_URL'] + '&audience=' + urllib.parse.quote(audience, safe='')
    headers = {'Authorization': 'Bearer ' + (token or os.environ['ACTIONS_ID_TOKEN_REQUEST_TOKEN'])}
    try:
        return 200, json.load(urllib.request.urlopen(urllib.request.Request(url, headers=headers)))['value']
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)['message']
def claims(token):
    part = token.split('.')[1]
    return json.loads(base64.urlsafe_b64decode(part + '=' * (-len(part) % 4)))
";

#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_a_forge_without_tokens_writes_an_object() -> Result<()> {
    let (stage, store, served) = set("vouch", |_| {}).await?;
    bind(&stage, &store, "app", |_| {}).await?;
    let (Store { endpoint, bucket, .. }, key) = (&store, &stage.namespace);
    let script = format!(
        r#"python3 - <<'END'
{ASK}
import boto3
print('keys=', [name for name in os.environ if name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY', 'AWS_SESSION_TOKEN')])
s3 = boto3.client('s3', endpoint_url='{endpoint}', verify='/tmp/authority.pem')
s3.put_object(Bucket='{bucket}', Key='{key}', Body=b'written by a job')
print('read=', s3.get_object(Bucket='{bucket}', Key='{key}')['Body'].read().decode())
print('method=', boto3.Session().get_credentials().method)
print('process=', os.popen('mayfly-credentials {binding}').read()[:12])
print('claims=', json.dumps(claims(ask('https://vault.example/x')[1])))
print('wrong=', ask('https://vault.example/x', 'nobody')[0])
print('empty=', ask('')[0])
END
"#,
        binding = Store::BINDING
    );
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", &trusting(&store, &script)))], 1).await?;
    let log = stage.succeeds("app", jobs[0].id).await?;
    for (key, value) in [
        ("keys=", "[]"),
        ("read=", "written by a job"),
        ("method=", "container-role"),
        ("process=", r#"{"AccessKeyI"#),
        ("wrong=", "401"),
        ("empty=", "400"),
    ] {
        ensure!(said(&log, key) == Some(value), "{key} is not {value}:\n{log}");
    }
    ensure!(store.holds(&stage.world, key), "the object is there");

    let claims: Value = serde_json::from_str(said(&log, "claims=").context("no claims")?)?;
    let name = format!("{}/app", stage.organization.name);
    let expected = [
        ("iss", ingress::issuer(&stage.world.access)?),
        ("aud", "https://vault.example/x".to_owned()),
        ("sub", format!("repo:{name}:ref:refs/heads/main")),
        ("repository", name.clone()),
        ("event_name", "push".to_owned()),
        ("check_run_id", jobs[0].id.to_string()),
        ("run_attempt", "1".to_owned()),
        ("workflow_ref", format!("{name}/ci.yml@refs/heads/main")),
        ("ref_protected", "false".to_owned()),
        ("vouched_by", "mayfly".to_owned()),
    ];
    for (claim, value) in expected {
        ensure!(claims[claim] == json!(value), "{claim} is not {value}: {claims}");
    }
    let (reason, message) = pool::condition(&stage.world, &stage.namespace, POOL, "JobIdentity", "True").await?;
    ensure!(reason == "MayflyVouches" && message.contains("does not vouch"), "{message}");
    stage.nothing_left(&served).await?;
    stage.strike().await
}

/// Two jobs of one run, side by side: the tokens of each name itself, and so does what its pod is marked with, which the broker holds tokens
/// against.
#[tokio::test(flavor = "multi_thread")]
async fn each_job_of_a_run_has_tokens_of_its_own() -> Result<()> {
    let (stage, store, _) = set("jobs", |_| {}).await?;
    bind(&stage, &store, "app", |_| {}).await?;
    let tell =
        format!("python3 - <<'END'\n{ASK}\nown = claims(ask('x')[1])\nprint('job=', own['check_run_id'], own['run_id'])\nEND\nsleep 8");
    let both = json!({"on": "push", "jobs": {"job": {
        "runs-on": "linux", "strategy": {"matrix": {"n": [1, 2]}}, "steps": [{"run": tell}]}}});
    let jobs = stage.push("app", &[("ci.yml", &both.to_string())], 2).await?;
    let record = |id: i64| {
        let stage = &stage;
        async move {
            let wanted = format!("#{id}");
            let pod = stage
                .a_pod("that is marked with its job's claims", |pod| {
                    let annotations = pod.metadata.annotations.clone().unwrap_or_default();
                    annotations.get(ANNOTATION_JOB).is_some_and(|job| job.ends_with(&wanted))
                        && annotations.contains_key(ANNOTATION_JOB_CLAIMS)
                })
                .await?;
            let text = pod.metadata.annotations.unwrap_or_default()[ANNOTATION_JOB_CLAIMS].clone();
            anyhow::Ok(serde_json::from_str::<Value>(&text)?)
        }
    };
    let (first, second) = (record(jobs[0].id).await?, record(jobs[1].id).await?);
    ensure!(first["run_id"] == second["run_id"] && first["check_run_id"] != second["check_run_id"], "{first} {second}");
    ensure!(first["iss"] == json!(ingress::issuer(&stage.world.access)?), "{first}");
    let mut explain = std::process::Command::new(built()?.join("mayfly"));
    explain.env("KUBECONFIG", stage.world.cluster.kubeconfig()).args(["explain", Store::BINDING, "--namespace", &stage.namespace]);
    let explained = output(&mut explain)?;
    ensure!(explained.matches("=> its job gets the credential").count() == 2, "{explained}");
    for (job, record) in jobs.iter().zip([first, second]) {
        let log = stage.succeeds("app", job.id).await?;
        let (id, run) = (record["check_run_id"].as_str().unwrap_or_default(), record["run_id"].as_str().unwrap_or_default());
        ensure!(said(&log, "job=") == Some(&format!("{id} {run}")) && id == job.id.to_string(), "{record}:\n{log}");
    }
    stage.strike().await
}

/// Whoever may fork writes a fork's code. Where a pool serves such jobs all the same, Mayfly does not vouch for them, as GitHub would not.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_vouches_for_a_fork() -> Result<()> {
    let (stage, store, _) = set("vfork", |pool| pool["spec"]["jobs"] = json!({"forks": "Allow"})).await?;
    bind(&stage, &store, "app", |binding| binding["spec"]["subject"]["claims"]["event_name"] = json!({"exact": "pull_request"})).await?;
    let script = format!(
        "python3 - <<'END'\n{ASK}\nprint('answer=', *ask('x'))\nEND\ncurl -s -o /dev/null -w 'aws= %{{http_code}}\\n' -H \"Authorization: $AWS_CONTAINER_AUTHORIZATION_TOKEN\" $AWS_CONTAINER_CREDENTIALS_FULL_URI"
    );
    let job = stage.fork_pull_request(&workflow("pull_request", &script)).await?;
    let log = stage.succeeds("app", job.id).await?;
    ensure!(said(&log, "answer=").is_some_and(|answer| answer.starts_with("403") && answer.contains("fork")), "{log}");
    ensure!(said(&log, "aws=") == Some("403"), "{log}");
    stage.strike().await
}

/// Jobs of other pools find nothing of it, and whoever asks the gate API without being a gate is told nothing.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_of_other_pools_get_no_tokens() -> Result<()> {
    let stage = Stage::set("forgeid").await?;
    stage.pool(|_| {}).await?;
    stage.hook()?;
    let script = format!(
        r#"echo "found= $(env | grep -cE 'ACTIONS_ID_TOKEN|AWS_|MAYFLY_CREDENTIALS')"
echo "files= $(ls -A /run/mayfly | grep -c environment)"
python3 - <<'END'
import ssl, urllib.error, urllib.request
request = urllib.request.Request('https://mayfly-gate.{SYSTEM}.svc:8443/v1/id-token', b'{{"audience": "x"}}',
    {{'Authorization': 'Bearer nobody', 'Content-Type': 'application/json'}})
try:
    print('gate=', urllib.request.urlopen(request, context=ssl._create_unverified_context()).status)
except urllib.error.HTTPError as error:
    print('gate=', error.code)
END
"#
    );
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", &script))], 1).await?;
    let log = stage.succeeds("app", jobs[0].id).await?;
    for (key, value) in [("found=", "0"), ("files=", "0"), ("gate=", "401")] {
        ensure!(said(&log, key) == Some(value), "{key} is not {value}:\n{log}");
    }
    stage.strike().await
}

/// The keys that sign are the operator's alone: no pool can have its Secret sent anywhere, and nothing of it is where the key set is.
#[tokio::test(flavor = "multi_thread")]
async fn only_public_halves_of_the_keys_are_published() -> Result<()> {
    let stage = Stage::set("keys").await?;
    ingress::start(&stage.world).await?;
    let (kept, keys) = (kept_keys(&stage).await?, published_keys(&stage)?);
    ensure!(keys.len() == kept.len() && !keys.is_empty(), "{keys:?}");
    for key in &keys {
        let names: Vec<&String> = key.as_object().context("a key")?.keys().collect();
        ensure!(names == ["alg", "e", "kid", "kty", "n", "use"], "{names:?}");
    }
    // A pool that names it gets nothing: it does not allow its use.
    stage
        .unready_pool(|pool| pool["spec"]["forge"]["gitea"]["tokenSecretRef"] = json!({"name": "mayfly-identity-keys", "key": "keys.json"}))
        .await?;
    pool::condition(&stage.world, &stage.namespace, POOL, "Ready", "False").await?;
    let told = stage.status().await?.conditions;
    ensure!(told.iter().any(|told| told.reason == "SecretNotAllowed"), "{told:?}");
    stage.strike().await
}

/// The key of a month ago goes on to sign until the new one, which is published at once, is known to everybody.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_renewed_before_its_month_is_over() -> Result<()> {
    let stage = Stage::set_alone("renew").await?;
    ingress::start(&stage.world).await?;
    let mut kept = kept_keys(&stage).await?;
    let old = kept.first().context("a key")?["kid"].clone();
    kept.truncate(1);
    kept[0]["made"] = json!("2026-01-01T00:00:00Z");
    let patch = json!({"stringData": {"keys.json": Value::Array(kept).to_string()}});
    secrets(&stage).patch(KEYS, &PatchParams::default(), &Patch::Merge(patch)).await?;
    let deployment = "deployment/mayfly-controller";
    run(stage.world.cluster.kubectl().args(["-n", SYSTEM, "rollout", "restart", deployment]))?;
    run(stage.world.cluster.kubectl().args(["-n", SYSTEM, "rollout", "status", deployment, "--timeout=90s"]))?;
    let published =
        eventually("the next key is published", PATIENCE, || async { Ok(published_keys(&stage).ok().filter(|keys| keys.len() == 2)) })
            .await?;
    let kept = kept_keys(&stage).await?;
    ensure!(kept.len() == 2 && kept[0]["kid"] == old && published[0]["kid"] == old, "{published:?}");
    ensure!(kept[1]["kid"] == published[1]["kid"] && published[0]["n"] != published[1]["n"], "{published:?}");
    stage.strike().await
}

/// Secret of the operator that keeps the keys.
const KEYS: &str = "mayfly-identity-keys";

fn secrets(stage: &Stage) -> Api<Secret> {
    Api::namespaced(stage.world.client.clone(), SYSTEM)
}

async fn kept_keys(stage: &Stage) -> Result<Vec<Value>> {
    let kept = secrets(stage).get(KEYS).await?.data.unwrap_or_default();
    Ok(serde_json::from_slice(&kept.get("keys.json").context("the keys")?.0)?)
}

/// As whoever may ask is told.
fn published_keys(stage: &Stage) -> Result<Vec<Value>> {
    let keys = format!("http://{}/.well-known/jwks", ingress::webhook_service(&stage.world.cluster)?);
    let told =
        output(&mut stage.world.cluster.command_in(Place::Outside, ["curl", "-s", "--fail", "--noproxy", "*", "--max-time", "5", &keys]))?;
    let told: Value = serde_json::from_str(&told)?;
    told["keys"].as_array().cloned().context("a key set")
}
