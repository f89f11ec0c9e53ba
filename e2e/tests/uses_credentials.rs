//! A job of the simulated GitHub becomes an identity of a real STS, from its pod alone. Its client is AWS's own SDK for Python.

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::Api;
use kube::api::{ListParams, PostParams};
use mayfly_cluster::World as Place;
use mayfly_cluster::command::{output, run};
use mayfly_crds::names::{ANNOTATION_JOB_CLAIMS, BROKER_AUDIENCE, RUNNER_SERVICE_ACCOUNT};
use mayfly_e2e::audit;
use mayfly_e2e::github::Stage;
use mayfly_e2e::stage::{PATIENCE, POOL, alone, turn};
use mayfly_e2e::store::{self, Store};
use mayfly_e2e::wait::eventually;
use mayfly_e2e::world::SYSTEM;
use serde_json::{Value, json};

/// Lets jobs of the stage's repository become the store's role.
async fn bind(stage: &Stage, store: &Store, change: impl FnOnce(&mut Value)) -> Result<()> {
    store.bind(&stage.world, (&store.github, stage.organization.repository_id), (&stage.namespace, POOL), change).await
}

/// A stage whose pool may reach the store.
async fn set(name: &str) -> Result<(Stage, Store)> {
    let stage = Stage::set(name).await?;
    let store = store::start(&stage.world).await?;
    let egress = store.egress(&stage.world)?;
    stage.pool(|pool| pool["spec"]["isolation"] = json!({"egress": egress})).await?;
    Ok((stage, store))
}

/// A job that may ask for OIDC tokens and trusts the store's authority.
fn job(store: &Store, script: &str) -> Value {
    let authority = format!("cat >~/authority.pem <<'END'\n{}\nEND\n", store.authority.trim());
    json!({"permissions": {"id-token": "write"}, "steps": [{"run": authority}, {"run": script}]})
}

/// What the broker told its audit trail about pods of this namespace.
async fn records(stage: &Stage) -> Result<Vec<Value>> {
    audit::records(&stage.world, "broker", &stage.namespace).await
}

/// Reads and writes the bucket with whatever credentials AWS's SDK finds by itself.
fn sdk(store: &Store) -> String {
    let (Store { endpoint, bucket, .. }, binding) = (store, Store::BINDING);
    format!(
        r#"python3 - <<'END'
import boto3, botocore, os
assert not [name for name in os.environ if name.startswith('AWS_') and ('KEY' in name or name == 'AWS_SESSION_TOKEN')], 'a key in the environment'
verify = os.path.expanduser('~/authority.pem')
s3 = boto3.client('s3', endpoint_url='{endpoint}', verify=verify)
s3.put_object(Bucket='{bucket}', Key=os.environ['GITHUB_REPOSITORY'].split('/')[0], Body=b'written by a job')
print('read:', s3.get_object(Bucket='{bucket}', Key=os.environ['GITHUB_REPOSITORY'].split('/')[0])['Body'].read().decode())
try:
    s3.list_objects_v2(Bucket='another')
    print('another bucket is open')
except botocore.exceptions.ClientError as error:
    print('another bucket:', error.response['Error']['Code'])
found = boto3.Session().get_credentials()
print('found by:', found.method)
os.makedirs(os.path.expanduser('~/.aws'), exist_ok=True)
with open(os.path.expanduser('~/.aws/config'), 'w') as config:
    config.write('[profile several]\ncredential_process = mayfly-credentials {binding}\n')
process = boto3.Session(profile_name='several')
s3 = process.client('s3', endpoint_url='{endpoint}', verify=verify)
print('by the profile:', s3.get_object(Bucket='{bucket}', Key=os.environ['GITHUB_REPOSITORY'].split('/')[0])['Body'].read().decode())
print('the profile found by:', process.get_credentials().method)
print('the secret is', found.get_frozen_credentials().secret_key)
END
export AWS_CA_BUNDLE=$HOME/authority.pem
echo "aws: $(aws --endpoint-url {endpoint} s3 cp "s3://{bucket}/${{GITHUB_REPOSITORY%%/*}}" -)"
"#,
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_without_a_secret_writes_an_object_with_a_credential_of_its_own() -> Result<()> {
    let _turn = turn().await;
    let (stage, store) = set("credential").await?;
    bind(&stage, &store, |_| {}).await?;
    let log = stage.succeeds(stage.push_job("ci.yml", job(&store, &sdk(&store))).await?).await?;
    let lines = [
        "read: written by a job",
        "another bucket: AccessDenied",
        " found by: container-role",
        "by the profile: written by a job",
        "the profile found by: custom-process",
        "the secret is ***",
        "aws: written by a job",
    ];
    for line in lines {
        ensure!(log.contains(line), "{line:?} is not in the log:\n{log}");
    }
    let records = records(&stage).await?;
    let granted: Vec<&Value> = records.iter().filter(|record| record["action"] == "credential.granted").collect();
    let [record] = granted.as_slice() else { anyhow::bail!("one exchange serves the whole job: {records:?}") };
    ensure!(store.holds(&stage.world, &stage.namespace), "the object is there");
    ensure!(record["payload"]["token"]["job"]["repository"] == json!(format!("{}/web", stage.organization.name)), "{record}");
    ensure!(record["payload"]["grant"]["per_job"] == json!(true), "{record}");
    stage.strike().await
}

/// A job that may not ask for tokens is not held up; one that may, and for which there is no binding, is told so.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_without_a_binding_or_the_permission_get_nothing_and_run() -> Result<()> {
    let _turn = turn().await;
    let (stage, store) = set("nobinding").await?;
    bind(&stage, &store, |binding| binding["spec"]["subject"]["claims"]["event_name"] = json!({"exact": "schedule"})).await?;
    let look = "env | grep -E '^(AWS|MAYFLY_CREDENTIALS)' || echo none";
    let log = stage.succeeds(stage.push("plain.yml", look).await?).await?;
    ensure!(log.lines().any(|line| line.ends_with(" none")), "{log}");
    let log = stage.succeeds(stage.push_job("ci.yml", job(&store, look)).await?).await?;
    ensure!(log.contains("Mayfly: no CredentialBinding is for this job") && !log.contains("AWS_"), "{log}");
    ensure!(records(&stage).await?.is_empty());
    stage.strike().await
}

/// A job's script that publishes its right to ask for OIDC tokens, and goes on.
const PUBLISH: &str = "printf '%s\\n%s\\n' \"$ACTIONS_ID_TOKEN_REQUEST_URL\" \"$ACTIONS_ID_TOKEN_REQUEST_TOKEN\" | base64 -w0 | sed 's/^/loot: /'; \
                       echo; for i in $(seq 100); do [ -e ~/over ] && break; sleep 1; done";

/// What such a job published: two lines, the URL and the token.
async fn loot(stage: &Stage, run: i64) -> Result<String> {
    let text = eventually("the loot", PATIENCE, || async {
        let jobs = stage.organization.simulator.jobs(run).await?;
        let id = jobs.first().context("a job")?.id;
        let log = stage.organization.simulator.job(id).await?.log;
        // Behind the time, and not in the script, which is told as well.
        let said = log.lines().filter_map(|line| line.split_once(' '));
        Ok(said.filter_map(|(_, text)| text.strip_prefix("loot: ")).map(str::to_owned).next())
    })
    .await?;
    Ok(String::from_utf8(STANDARD.decode(text.trim())?)?)
}

/// One job publishes its right to ask for OIDC tokens while it runs. Another pod of the same pool hands it to its own gate, and shows a
/// token made with it to the broker.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_worth_nothing_outside_of_its_pod() -> Result<()> {
    let _turn = turn().await;
    let (stage, store) = set("stolen").await?;
    bind(&stage, &store, |_| {}).await?;
    let victim = stage.push_job("victim.yml", job(&store, PUBLISH)).await?;
    let loot = STANDARD.encode(loot(&stage, victim).await?);
    let (audience, binding) = (store.github.audience, Store::BINDING);
    let steal = format!(
        r#"cd /run/mayfly
echo {loot} | base64 -d >~/loot
dd if=~/loot of=identity bs=64k conv=nocreat,notrunc status=none
until [ -p credentials ]; do sleep 0.1; done
while read -r line; do echo "gate: $line"; done <credentials
python3 - <<'END'
import json, os, urllib.error, urllib.request
url, token = open(os.path.expanduser('~/loot')).read().split()
request = urllib.request.Request(url + '&audience={audience}', headers={{'Authorization': 'Bearer ' + token}})
value = json.load(urllib.request.urlopen(request))['value']
print('the forge gives a token of', len(value.split('.')), 'parts')
import ssl
context = ssl._create_unverified_context()
kind = 'urn:ietf:params:oauth:token-type:jwt'
for actor in (value, 'nobody'):
    form = urllib.parse.urlencode({{'grant_type': 'urn:ietf:params:oauth:grant-type:token-exchange', 'subject_token': value,
        'subject_token_type': kind, 'actor_token': actor, 'actor_token_type': kind, 'resource': '{binding}'}}).encode()
    try:
        urllib.request.urlopen('https://mayfly-broker.{SYSTEM}.svc:8443/v1/token', form, context=context)
        print('the broker gave something')
    except urllib.error.HTTPError as error:
        print('broker:', error.code, json.load(error)['error'])
for actor in (value, 'nobody'):
    headers = {{'Authorization': 'Bearer ' + actor, 'Content-Type': 'application/json'}}
    request = urllib.request.Request('https://mayfly-gate.{SYSTEM}.svc:8443/v1/refusals', b'[]', headers)
    try:
        print('controller:', urllib.request.urlopen(request, context=context).status)
    except urllib.error.HTTPError as error:
        print('controller:', error.code)
END
"#
    );
    let thief = stage.push("thief.yml", &steal).await?;
    let log = stage.succeeds(thief).await?;
    ensure!(
        log.contains(&format!("gate: say Mayfly: CredentialBinding {binding} gives nothing: the broker answers 400 invalid_target")),
        "{log}"
    );
    ensure!(log.contains("the forge gives a token of 3 parts"), "the attack is none:\n{log}");
    // Behind the time, and not in the script.
    let said = |text: &str| log.lines().filter(|line| line.split_once(' ').is_some_and(|(_, said)| said == text)).count();
    ensure!(said("broker: 401 invalid_client") == 2 && said("the broker gave something") == 0, "{log}");
    ensure!(said("controller: 401") == 2, "nobody but the broker tells of refusals:\n{log}");
    let records = records(&stage).await?;
    let alarms = records.iter().filter(|record| record["payload"]["denial"]["alarm"] == json!(true)).count();
    ensure!(alarms == 1, "{records:?}");
    let told = eventually("the owner is told", PATIENCE, || async { Ok(stage.events("TokenMisused").await?.pop()) }).await?;
    ensure!(told.contains("the token is another job's") && told.contains("correlation id"), "{told}");
    stage.organization.simulator.cancel(victim).await?;
    stage.strike().await
}

/// Whoever is not the job gets nothing at the gate's door, and a job that is over has none.
#[tokio::test(flavor = "multi_thread")]
async fn the_gates_door_opens_to_the_job_alone() -> Result<()> {
    let _turn = turn().await;
    let (stage, store) = set("door").await?;
    bind(&stage, &store, |_| {}).await?;
    let knock = r#"ls -ln "$MAYFLY_CREDENTIALS_TOKEN_FILE" | cut -d' ' -f1,3,4 | sed 's/^/file: /'
python3 - <<'END'
import os, socket, urllib.error, urllib.request
base, token = os.environ['MAYFLY_CREDENTIALS_URL'], open(os.environ['MAYFLY_CREDENTIALS_TOKEN_FILE']).read()
def ask(what, path='/v1/aws/store', **headers):
    request = urllib.request.Request(base + path, headers=headers)
    try:
        print(what, urllib.request.urlopen(request).status)
    except urllib.error.HTTPError as error:
        print(what, error.code)
ask('with the token:', Authorization=token)
ask('without:')
ask('with another:', Authorization=token[::-1])
ask('by another name:', Authorization=token, Host='evil.example')
ask('another binding:', '/v1/aws/other', Authorization=token)
port = int(base.rsplit(':', 1)[1])
own = socket.gethostbyname(socket.gethostname())
try:
    socket.create_connection((own, port), 2)
    print('from outside: open', own)
except OSError:
    print('from outside: closed')
END
"#;
    let log = stage.succeeds(stage.push_job("ci.yml", job(&store, knock)).await?).await?;
    for line in [
        "with the token: 200",
        "without: 401",
        "with another: 401",
        "by another name: 421",
        "another binding: 403",
        "from outside: closed",
        "file: -r--r-----",
    ] {
        ensure!(log.contains(line), "{line:?} is not in the log:\n{log}");
    }
    stage.strike().await
}

/// Two brokers, a hundred requests at once at each: the job's own pod gets its credential from both, another pod with the same token from
/// none, and after the job nobody gets anything. The tokens are real: of the forge's issuer, and of the API server for each pod.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_one_pods_alone_on_every_replica() -> Result<()> {
    let _alone = alone().await;
    let (stage, store) = set("replicas").await?;
    bind(&stage, &store, |_| {}).await?;
    replicas(&stage, 2).await?;
    let tried = on_two_replicas(&stage, &store).await;
    replicas(&stage, 1).await?;
    tried?;
    stage.strike().await
}

async fn on_two_replicas(stage: &Stage, store: &Store) -> Result<()> {
    let victim = stage.push_job("victim.yml", job(store, PUBLISH)).await?;
    stage.runs(victim).await?;
    let own = running_pod(stage, &[]).await?;
    let other = stage.push("other.yml", "for i in $(seq 100); do [ -e ~/over ] && break; sleep 1; done").await?;
    stage.runs(other).await?;
    let stranger = running_pod(stage, &[&own]).await?;

    let loot = loot(stage, victim).await?;
    let (url, right) = loot.split_once('\n').context("a URL and a token")?;
    let curl = ["curl", "--silent", "--insecure", "--noproxy", "*", "-H", &format!("Authorization: Bearer {}", right.trim())];
    let mut ask = stage.world.cluster.command_in(Place::Node, curl);
    let told: Value = serde_json::from_str(&output(ask.arg(format!("{url}&audience={}", store.github.audience)))?)?;
    let token = told["value"].as_str().context("a token of the job")?;

    let brokers = addresses(stage).await?;
    ensure!(brokers.len() == 2, "{brokers:?}");
    let shown = async |pod: &str| post(stage, &brokers, token, &pod_token(stage, pod).await?);
    let (mine, theirs) = (shown(&own).await?, shown(&stranger).await?);
    ensure!(mine.iter().all(|status| status == "200") && mine.len() == 200, "{mine:?}");
    ensure!(theirs.iter().all(|status| status == "400") && theirs.len() == 200, "{theirs:?}");
    let kept = pod_token(stage, &own).await?;
    let records = records(stage).await?;
    let alarms = records.iter().filter(|record| record["payload"]["denial"]["alarm"] == json!(true)).count();
    ensure!(alarms == 200, "{alarms} alarms");
    let granted = |record: &&Value| record["payload"]["credential"].is_object() && record["actor"]["name"] == json!(own);
    ensure!(records.iter().filter(granted).count() >= 200, "what is given out is written down, each time");

    stage.organization.simulator.cancel(victim).await?;
    eventually("the job's pod is gone", PATIENCE, || async {
        Ok((!stage.pods().await?.iter().any(|pod| pod.metadata.name.as_deref() == Some(&own))).then_some(()))
    })
    .await?;
    let late = post(stage, &brokers, token, &kept)?;
    ensure!(late.iter().all(|status| status == "401"), "{late:?}");
    stage.organization.simulator.cancel(other).await
}

/// Has so many brokers run.
async fn replicas(stage: &Stage, count: usize) -> Result<()> {
    let deployment = "deployment/mayfly-broker";
    run(stage.world.cluster.kubectl().args(["-n", SYSTEM, "scale", deployment, &format!("--replicas={count}")]))?;
    run(stage.world.cluster.kubectl().args(["-n", SYSTEM, "rollout", "status", deployment, "--timeout=90s"]))?;
    eventually(format!("{count} broker(s)"), PATIENCE, || async { Ok((addresses(stage).await?.len() == count).then_some(())) }).await
}

async fn addresses(stage: &Stage) -> Result<Vec<String>> {
    let pods: Api<Pod> = Api::namespaced(stage.world.client.clone(), SYSTEM);
    let found = pods.list(&ListParams::default().labels("app.kubernetes.io/component=broker")).await?.items;
    Ok(found.into_iter().filter_map(|pod| pod.status?.pod_ip).collect())
}

/// A pod that runs a job, other than these.
async fn running_pod(stage: &Stage, but: &[&str]) -> Result<String> {
    eventually("a pod with a job that the broker can know", PATIENCE, || async {
        let pods = stage.pods().await?.into_iter();
        let marked = pods.filter(|pod| pod.metadata.annotations.iter().any(|marks| marks.contains_key(ANNOTATION_JOB_CLAIMS)));
        Ok(marked.filter_map(|pod| pod.metadata.name).find(|name| !but.contains(&name.as_str())))
    })
    .await
}

/// A token of the pod for the broker, as its gate has one.
async fn pod_token(stage: &Stage, pod: &str) -> Result<String> {
    let found = stage.pods().await?.into_iter().find(|found| found.metadata.name.as_deref() == Some(pod)).context("the pod")?;
    let bound = json!({"apiVersion": "v1", "kind": "Pod", "name": pod, "uid": found.metadata.uid});
    let request = json!({"spec": {"audiences": [BROKER_AUDIENCE], "expirationSeconds": 600, "boundObjectRef": bound}});
    let accounts: Api<ServiceAccount> = Api::namespaced(stage.world.client.clone(), &stage.namespace);
    let made = accounts.create_token_request(RUNNER_SERVICE_ACCOUNT, &PostParams::default(), &serde_json::from_value(request)?).await?;
    Ok(made.status.context("a token")?.token)
}

/// A hundred requests at once at each broker; the answers' status codes.
fn post(stage: &Stage, brokers: &[String], token: &str, pod: &str) -> Result<Vec<String>> {
    let kind = "urn:ietf:params:oauth:token-type:jwt";
    let form = format!(
        "grant_type=urn:ietf:params:oauth:grant-type:token-exchange&subject_token={token}&subject_token_type={kind}&actor_token={pod}&\
         actor_token_type={kind}&resource={}",
        Store::BINDING
    );
    let script = "for broker in \"$@\"; do seq 100 | xargs -P 50 -I{} curl --silent --insecure --noproxy '*' --output /dev/null \
                  --write-out '%{http_code}\\n' --data \"$FORM\" \"https://$broker:8443/v1/token\" & done; wait";
    let mut all = stage.world.cluster.command_in(Place::Node, ["bash", "-c", script, "post"]);
    Ok(output(all.args(brokers).env("FORM", form))?.lines().map(str::to_owned).collect())
}

/// The broker is away: jobs go on without credentials, and are told.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_run_while_the_broker_is_away() -> Result<()> {
    let _alone = alone().await;
    let (stage, store) = set("nobroker").await?;
    bind(&stage, &store, |_| {}).await?;
    let pods: Api<Pod> = Api::namespaced(stage.world.client.clone(), SYSTEM);
    let brokers = ListParams::default().labels("app.kubernetes.io/component=broker");
    let scale = |replicas: &str| {
        run(stage.world.cluster.kubectl().args(["-n", SYSTEM, "scale", "deployment/mayfly-broker", replicas]))?;
        run(stage.world.cluster.kubectl().args(["-n", SYSTEM, "rollout", "status", "deployment/mayfly-broker", "--timeout=60s"]))
    };
    scale("--replicas=0")?;
    eventually("the broker is gone", PATIENCE, || async { Ok(pods.list(&brokers).await?.items.is_empty().then_some(())) }).await?;
    let served = async {
        let plain = stage.push("plain.yml", "echo quick").await?;
        stage.succeeds(plain).await?;
        stage.succeeds(stage.push_job("ci.yml", job(&store, "echo ${AWS_CONTAINER_CREDENTIALS_FULL_URI:-none}")).await?).await
    };
    let log = served.await;
    scale("--replicas=1")?;
    let log = log?;
    ensure!(log.contains("Mayfly: no credentials: the broker cannot be asked") && log.lines().any(|line| line.ends_with(" none")), "{log}");
    stage.strike().await
}
