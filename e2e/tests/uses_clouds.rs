//! Jobs of the simulated GitHub use Vault, Google Cloud and Azure with those clouds' own libraries, and no change to what they do.
//! Vault's JWT auth method is Vault's own; Google's STS, Entra and GitHub are simulated. The App's key is in a stand-in for Vault's transit
//! engine: the broker never has it.

use anyhow::{Context, Result, ensure};
use mayfly_e2e::audit;
use mayfly_e2e::binding::bind;
use mayfly_e2e::clouds::{self, Clouds};
use mayfly_e2e::github::{self, Stage};
use mayfly_e2e::moto;
use mayfly_e2e::stage::{PATIENCE, POOL, turn};
use mayfly_e2e::wait::eventually;
use mayfly_github_simulator::control::NewRepository;
use serde_json::{Value, json};

/// The audience of tokens for Vault, and for Entra.
const VAULT: &str = "vault.mayfly.example";
const ENTRA: &str = "api://AzureADTokenExchange";
const PROVIDER: &str = "projects/123/locations/global/workloadIdentityPools/ci-pool/providers/mayfly";
const ACCOUNT: &str = "deploy@acme.iam.gserviceaccount.com";
const CLIENT: &str = "00000000-1111-2222-3333-444444444444";

/// A stage whose pool may reach the clouds.
async fn set(name: &str) -> Result<(Stage, Clouds)> {
    let stage = Stage::set(name).await?;
    let clouds = clouds::start(&stage.world).await?;
    let egress = clouds.egress(&stage.world)?;
    stage.pool(|pool| pool["spec"]["isolation"] = json!({"egress": egress})).await?;
    Ok((stage, clouds))
}

/// Lets the repository's jobs have what the provider gives, for a token of this audience.
async fn give(stage: &Stage, clouds: &Clouds, (name, audience): (&str, &str), lifetime: u32, provider: Value) -> Result<()> {
    let binding = json!({
        "apiVersion": "mayfly.dev/v1alpha1", "kind": "CredentialBinding", "metadata": {"name": name, "namespace": stage.namespace},
        "spec": {
            "pools": [POOL], "lifetimeSeconds": lifetime, "token": {"issuer": clouds.issuer, "audience": audience},
            "subject": {"claims": {"repository_id": {"exact": stage.organization.repository_id.to_string()}}},
            "provider": provider,
        },
    });
    bind(&stage.world, &binding).await
}

/// A job that may ask for OIDC tokens, and whose programs trust the clouds' authority.
fn job(clouds: &Clouds, script: &str) -> Value {
    let authority = format!("cat >~/authority.pem <<'END'\n{}\nEND\n", clouds.authority.trim());
    let trust = "echo REQUESTS_CA_BUNDLE=$HOME/authority.pem >>$GITHUB_ENV";
    json!({"permissions": {"id-token": "write"}, "steps": [{"run": authority}, {"run": trust}, {"run": script}]})
}

/// Behind the time, and not in the script.
fn said(log: &str, text: &str) -> bool {
    log.lines().any(|line| line.split_once(' ').is_some_and(|(_, said)| said == text))
}

/// The log of a job that has published what it has, and goes on.
async fn published(stage: &Stage, run: i64) -> Result<String> {
    eventually("the job has published its token", PATIENCE, || async {
        let jobs = stage.organization.simulator.jobs(run).await?;
        let job = stage.organization.simulator.job(jobs.first().context("a job")?.id).await?;
        ensure!(job.conclusion.is_none(), "{:?}; its log:\n{}", job.conclusion, job.log);
        Ok(said(&job.log, "published").then_some(job.log))
    })
    .await
}

/// The token in that log, where it is backwards: it would be masked.
fn loot(log: &str) -> Result<String> {
    let loot = log.lines().find_map(|line| line.split_once(' ')?.1.strip_prefix("loot: ")).context("the loot")?;
    Ok(loot.trim().chars().rev().collect())
}

/// hvac finds its token by itself. What it has is published, and is worth nothing once the job is over.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_vault_is_found_by_its_client_and_ends_with_the_job() -> Result<()> {
    let _turn = turn().await;
    let (stage, clouds) = set("vault").await?;
    clouds.vault_role(&stage.world, &stage.namespace, stage.organization.repository_id, VAULT).await?;
    let vault = json!({"vault": {"address": clouds.endpoint, "role": stage.namespace}});
    give(&stage, &clouds, ("vault", VAULT), 900, vault).await?;
    let script = format!(
        r#"python3 - <<'END'
import hvac
vault = hvac.Client()
print('authenticated:', vault.is_authenticated())
print('read:', vault.secrets.kv.v2.read_secret_version(path='{namespace}')['data']['data']['value'])
try:
    vault.secrets.kv.v2.read_secret_version(path='another')
    print('another secret is open')
except hvac.exceptions.Forbidden:
    print('another secret: forbidden')
print('loot:', vault.token[::-1], flush=True)
END
env | grep hvs. || echo 'no token in the environment'
ls -lnL ~/.vault-token | cut -d' ' -f1 | sed 's/^/file: /'
echo published
for i in $(seq 100); do [ -e ~/over ] && break; sleep 1; done
"#,
        namespace = stage.namespace
    );
    let run = stage.push_job("ci.yml", job(&clouds, &script)).await?;
    let log = published(&stage, run).await?;
    let read = format!("read: the secret of {}", stage.namespace);
    for line in ["authenticated: True", read.as_str(), "another secret: forbidden", "no token in the environment", "file: -r--r-----"] {
        ensure!(said(&log, line), "{line:?} is not in the log:\n{log}");
    }
    let token = loot(&log)?;
    ensure!(token.starts_with("hvs.") && !log.contains(&token), "{log}");
    ensure!(clouds.vault_knows(&stage.world, &token).await?, "the job runs");
    stage.organization.simulator.cancel(run).await?;
    eventually("the token is revoked", PATIENCE, || async { Ok((!clouds.vault_knows(&stage.world, &token).await?).then_some(())) }).await?;
    stage.strike().await
}

/// Google's and Microsoft's own libraries find what they need by themselves. The broker gives finished tokens to whoever asks with `curl`.
#[tokio::test(flavor = "multi_thread")]
async fn libraries_of_google_and_azure_find_their_credentials() -> Result<()> {
    let _turn = turn().await;
    let (stage, clouds) = set("clouds").await?;
    let google = json!({"google": {
        "workloadIdentityProvider": PROVIDER, "serviceAccount": ACCOUNT, "stsEndpoint": clouds.endpoint,
        "iamCredentialsEndpoint": clouds.endpoint,
    }});
    give(&stage, &clouds, ("google", &format!("https://iam.googleapis.com/{PROVIDER}")), 900, google).await?;
    let subject = format!("repo:{}/web:ref:refs/heads/main", stage.organization.name);
    clouds.federate(&stage.world, CLIENT, &subject, ENTRA).await?;
    let azure = json!({"azure": {"tenantId": CLIENT, "clientId": CLIENT, "authorityHost": clouds.endpoint}});
    give(&stage, &clouds, ("azure", ENTRA), 5400, azure).await?;
    let script = format!(
        r#"export GOOGLE_CLOUD_PROJECT=acme
python3 - <<'END'
import json, os, requests, time
def whoami(token):
    answer = requests.get('{endpoint}/whoami', headers={{'Authorization': 'Bearer ' + token}})
    return answer.json()['identity'] if answer.ok else answer.status_code
import google.auth, google.auth.transport.requests
credentials, _ = google.auth.default(scopes=['https://www.googleapis.com/auth/devstorage.read_only'])
session = google.auth.transport.requests.AuthorizedSession(credentials)
answer = session.get('{endpoint}/whoami').json()
print('google:', answer['identity'], answer['scopes'][0].split('/')[-1])
print('google lives', 'at most 900 s' if answer['expires'] <= time.time() + 901 else answer)
from azure.identity import DefaultAzureCredential
from azure.core.exceptions import ClientAuthenticationError
azure = DefaultAzureCredential()
print('azure:', whoami(azure.get_token('https://management.azure.com/.default').token))
try:
    DefaultAzureCredential().get_token('https://vault.azure.net/.default')
    print('another resource is open')
except ClientAuthenticationError:
    print('another resource: refused')
from azure.identity import WorkloadIdentityCredential
itself = WorkloadIdentityCredential(tenant_id='{CLIENT}', client_id='{CLIENT}', authority='{endpoint}', disable_instance_discovery=True)
print('azure by the file:', whoami(itself.get_token('https://management.azure.com/.default').token))
base, shown = os.environ['MAYFLY_CREDENTIALS_URL'], open(os.environ['MAYFLY_CREDENTIALS_TOKEN_FILE']).read()
for name in ('google', 'azure'):
    print('finished', name + ':', whoami(requests.get(f'{{base}}/v1/token/{{name}}', headers={{'Authorization': shown}}).json()['value']))
END
"#,
        endpoint = clouds.endpoint
    );
    let log = stage.succeeds(stage.push_job("ci.yml", job(&clouds, &script)).await?).await?;
    for line in [
        format!("google: {ACCOUNT} devstorage.read_only"),
        "google lives at most 900 s".to_owned(),
        format!("azure: {CLIENT}"),
        "another resource: refused".to_owned(),
        format!("azure by the file: {CLIENT}"),
        format!("finished google: {ACCOUNT}"),
        format!("finished azure: {CLIENT}"),
    ] {
        ensure!(said(&log, &line), "{line:?} is not in the log:\n{log}");
    }
    stage.strike().await
}

/// AWS's answers, as moto gives them: a session of the role, which is named by run, attempt and job; also when a run is run again.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_of_aws_is_named_by_its_job() -> Result<()> {
    let _turn = turn().await;
    let (stage, clouds) = set("aws").await?;
    let endpoint = moto::start(&stage.world).await?;
    let aws = json!({"aws": {
        "roleArn": "arn:aws:iam::123456789012:role/deploy", "region": "eu-central-1", "endpoint": endpoint,
        "sessionPolicy": r#"{"Version":"2012-10-17","Statement":[]}"#, "policyArns": ["arn:aws:iam::aws:policy/ReadOnlyAccess"],
    }});
    give(&stage, &clouds, ("aws", "sts.amazonaws.com"), 900, aws).await?;
    let script = r#"python3 - <<'END'
import boto3, datetime
found = boto3.Session().get_credentials()
keys, left = found.get_frozen_credentials(), found._expiry_time - datetime.datetime.now(datetime.timezone.utc)
print('found by:', found.method, boto3.Session().region_name, keys.access_key[:4], len(keys.secret_key), bool(keys.token))
print('lives', 'as long as was ordered' if 600 < left.total_seconds() <= 900 else left)
END
aws configure list | awk '$1 == "access_key" {print "aws: " $3}'"#;
    let run = stage.push_job("ci.yml", job(&clouds, script)).await?;
    let log = stage.succeeds(run).await?;
    for line in ["found by: container-role eu-central-1 ASIA 40 True", "lives as long as was ordered", "aws: container-role"] {
        ensure!(said(&log, line), "{line:?} is not in the log:\n{log}");
    }
    // Another attempt at the same run is another job, with a pod and a session of its own.
    stage.organization.simulator.rerun(run).await?;
    let jobs = stage.organization.simulator.finished(run, PATIENCE).await?;
    let [first, second] = &jobs[..] else { anyhow::bail!("two attempts at one job: {jobs:?}") };
    ensure!(second.conclusion.as_deref() == Some("success") && first.runner != second.runner, "{second:?}");
    let records = audit::records(&stage.world, "broker", &stage.namespace).await?;
    let roles: Vec<&Value> = records.iter().map(|record| &record["payload"]["credential"]["about"]["assumedRole"]).collect();
    let role = |attempt: u32, check: i64| format!("arn:aws:sts::123456789012:assumed-role/deploy/mayfly-{run}-{attempt}-{check}");
    ensure!(roles == [&json!(role(1, first.id)), &json!(role(2, second.id))], "one exchange serves a whole job: {roles:?}");
    stage.strike().await
}

/// A job has a token of an App's installation for the repositories and permissions of its binding, of which nobody told it the key. It is
/// published, and worth nothing once the job is over.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_a_github_app_reaches_the_bindings_repositories_and_ends_with_the_job() -> Result<()> {
    let _turn = turn().await;
    let (stage, clouds) = set("app").await?;
    let (simulator, owner) = (&stage.organization.simulator, &stage.organization.name);
    for name in ["site", "secrets"] {
        let repository = NewRepository { owner: owner.clone(), name: name.to_owned(), ..NewRepository::default() };
        simulator.repository(&repository).await?;
    }
    let (app, installation) = simulator.app_of(clouds::APP, owner).await?;
    clouds.app_key(&stage.world, &app.private_key).await?;
    let provider = json!({"githubApp": {
        "clientId": app.client_id, "installationId": installation, "repositories": ["site"], "permissions": {"contents": "read"},
    }});
    give(&stage, &clouds, ("app", "github.mayfly.example"), 3600, provider).await?;
    let script = format!(
        r#"python3 - <<'END'
import os, requests
base, shown = os.environ['MAYFLY_CREDENTIALS_URL'], open(os.environ['MAYFLY_CREDENTIALS_TOKEN_FILE']).read()
token = requests.get(f'{{base}}/v1/token/app', headers={{'Authorization': shown}}).json()['value']
api, asks = '{api}', {{'Authorization': 'Bearer ' + token, 'Accept': 'application/vnd.github+json'}}
print('reaches:', *[found['full_name'] for found in requests.get(f'{{api}}/installation/repositories', headers=asks).json()['repositories']])
print('another repository:', requests.get(f'{{api}}/repos/{owner}/secrets', headers=asks).status_code)
print('loot:', token[::-1], flush=True)
END
echo published
for i in $(seq 100); do [ -e ~/over ] && break; sleep 1; done
"#,
        api = format_args!("{}/api/v3", stage.organization.url)
    );
    let run = stage.push_job("ci.yml", job(&clouds, &script)).await?;
    let log = published(&stage, run).await?;
    for line in [format!("reaches: {owner}/site"), "another repository: 404".to_owned()] {
        ensure!(said(&log, &line), "{line:?} is not in the log:\n{log}");
    }
    let token = loot(&log)?;
    ensure!(token.starts_with("ghs_") && !log.contains(&token), "{log}");
    let knows = || -> Result<bool> {
        let url = format!("{}/api/v3/installation/repositories", github::local_url(&stage.world)?);
        Ok(ureq::get(&url).header("Authorization", format!("Bearer {token}")).call().is_ok())
    };
    ensure!(knows()?, "the job runs");
    simulator.cancel(run).await?;
    eventually("the token is revoked", PATIENCE, || async { Ok((!knows()?).then_some(())) }).await?;
    stage.strike().await
}

/// The clouds do not take Mayfly's word: a token for another audience, and a binding for a role that another repository has, give nothing,
/// and the owner is told what the cloud said.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_cloud_refuses_is_told_to_the_owner() -> Result<()> {
    let _turn = turn().await;
    let (stage, clouds) = set("refused").await?;
    clouds.vault_role(&stage.world, &stage.namespace, stage.organization.repository_id + 1, VAULT).await?;
    give(&stage, &clouds, ("vault", VAULT), 900, json!({"vault": {"address": clouds.endpoint, "role": stage.namespace}})).await?;
    let azure = json!({"azure": {"tenantId": CLIENT, "clientId": CLIENT.replace('4', "5"), "authorityHost": clouds.endpoint}});
    give(&stage, &clouds, ("azure", ENTRA), 5400, azure).await?;
    let log = stage
        .succeeds(stage.push_job("ci.yml", job(&clouds, "[ ! -e ~/.vault-token ] && [ -z \"${IDENTITY_ENDPOINT:-}\" ]")).await?)
        .await?;
    for binding in ["vault", "azure"] {
        let line = format!("Mayfly: CredentialBinding {binding} gives nothing: the broker answers 403 access_denied");
        ensure!(log.contains(&line), "{line:?} is not in the log:\n{log}");
    }
    let told = eventually("the owner is told", PATIENCE, || async {
        let told = stage.events("CredentialDenied").await?;
        Ok((told.len() >= 2).then_some(told))
    })
    .await?;
    for why in ["Vault answers 400", "Entra answers 401 invalid_client AADSTS700213"] {
        ensure!(told.iter().any(|told| told.contains(why)), "{why:?} is not in {told:?}");
    }
    stage.strike().await
}
