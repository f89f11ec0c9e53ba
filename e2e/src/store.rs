//! A store in the outside world: MinIO, whose STS takes the tokens of the simulated GitHub's jobs and those that Mayfly gives to jobs of
//! Gitea, and whose S3 takes what STS gave.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mayfly_cluster::builder::part_folder;
use mayfly_cluster::command::{random_hex, run, write_file};
use mayfly_cluster::process::check_running;
use mayfly_cluster::{World as Place, pki};
use serde_json::{Value, json};
use tokio::sync::Mutex;

use crate::binding::bind;
use crate::wait::eventually;
use crate::world::{host_beside_forge, host_of};
use crate::{World, github, ingress};

/// What it is called among the programs of the outside world, and its part's name.
const NAME: &str = "minio";
const PORT: u16 = 9000;
/// The one bucket.
const BUCKET: &str = "artifacts";
/// The audiences of tokens that are meant for it, of GitHub's issuer and of Mayfly's, and the role that comes of each: MinIO names it by the
/// SHA-1 of the audience.
const GITHUB: [&str; 2] = ["store.mayfly.example", "arn:minio:iam:::role/FFIP175FgZAnS3r0RJQkaUzrJrE"];
const MAYFLY: [&str; 2] = ["store.mayfly.example/gitea", "arn:minio:iam:::role/B2SY75NpcldqtaSaDiQRvqdQApw"];
/// The policy of the roles: reads and writes the one bucket.
const POLICY: &str = "one-bucket";
/// How MinIO tells of its roles when it starts.
const ROLES: &str = "IAM Roles:";
/// Below the cluster's state: all that is the store's, and in it a file that is written when all is arranged.
const FOLDER: &str = "store";
const ARRANGED: &str = "arranged";

/// Whom the store trusts, for what audience, and the role for `AssumeRoleWithWebIdentity` that comes of it: it may do everything with the
/// bucket, and nothing with others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trust {
    /// `iss` of the tokens.
    pub issuer: String,
    /// What `aud` has to be.
    pub audience: &'static str,
    /// The role.
    pub role_arn: &'static str,
}

/// A store with one bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Store {
    /// Address of both STS and S3, for pods, operator and outside world: `https://HOST:PORT`.
    pub endpoint: String,
    /// Tokens of the simulated GitHub.
    pub github: Trust,
    /// Tokens that Mayfly gives to jobs of a forge that gives none.
    pub mayfly: Trust,
    /// The bucket.
    pub bucket: String,
    /// The authority that signed its certificate, and the issuer's: PEM.
    pub authority: String,
}

impl Store {
    /// Name of the binding that [`bind`](Self::bind) applies.
    pub const BINDING: &str = "store";

    /// Lets jobs of the repository of this number become the store's role, by tokens of that issuer, if their pool is the one of this name;
    /// `change` may change the binding before it is applied.
    ///
    /// # Errors
    /// With the API server's answer.
    pub async fn bind(
        &self,
        world: &World,
        (trust, repository_id): (&Trust, i64),
        (namespace, pool): (&str, &str),
        change: impl FnOnce(&mut Value),
    ) -> Result<()> {
        let mut binding = json!({
            "apiVersion": "mayfly.dev/v1alpha1", "kind": "CredentialBinding",
            "metadata": {"name": Self::BINDING, "namespace": namespace},
            "spec": {
                "pools": [pool], "lifetimeSeconds": 900,
                "token": {"issuer": trust.issuer, "audience": trust.audience},
                "subject": {"claims": {
                    "repository_id": {"exact": repository_id.to_string()},
                    "event_name": {"exact": "push"},
                }},
                "provider": {"aws": {"roleArn": trust.role_arn, "region": "us-east-1", "endpoint": self.endpoint}},
            },
        });
        change(&mut binding);
        bind(world, &binding).await
    }

    /// What a pool says to let its jobs reach the store: `spec.isolation.egress`.
    ///
    /// # Errors
    /// When an address is none.
    pub fn egress(&self, world: &World) -> Result<Value> {
        Ok(json!({"allow": [{"cidr": format!("{}/32", host_of(&world.access.local_url)?), "ports": [PORT]}]}))
    }

    /// Whether there is an object with this key, by what is on the store's disk: nobody else has the keys to ask.
    pub fn holds(&self, world: &World, key: &str) -> bool {
        world.cluster.layout().at(FOLDER).join("server/data").join(&self.bucket).join(key).exists()
    }
}

/// One is started at a time: two cannot listen on one address.
static STARTING: Mutex<()> = Mutex::const_new(());

/// Has the simulated GitHub, the way to Mayfly's issuer and the store run. A store that runs is kept with what is in it; another one begins empty.
///
/// # Errors
/// When MinIO is not built (`cluster build minio`), or does not get ready.
pub async fn start(world: &World) -> Result<Store> {
    let _one = STARTING.lock().await;
    // Who the issuers are, is read when the store starts.
    github::start(world).await?;
    ingress::start(world).await?;
    let layout = world.cluster.layout();
    let (folder, host) = (layout.at(FOLDER), host_beside_forge(&world.access, "s3")?);
    let (endpoint, arranged) = (format!("https://{host}:{PORT}"), folder.join(ARRANGED));
    let trust = |issuer: String, [audience, role_arn]: [&'static str; 2]| Trust { issuer, audience, role_arn };
    let (github, mayfly) = (trust(github::issuer(&world.access)?, GITHUB), trust(ingress::issuer(&world.access)?, MAYFLY));
    if !world.cluster.runs(NAME) || !arranged.exists() {
        world.cluster.stop(NAME)?;
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("cannot empty {}", folder.display()))?;
        }
        arrange(world, &folder, &host, &github, &mayfly).await.context("the store does not get ready")?;
        write_file(&arranged, "")?;
    }
    Ok(Store { endpoint, github, mayfly, bucket: BUCKET.to_owned(), authority: pki::authority(layout)? })
}

/// Starts MinIO, and has its own client make bucket and policy. Nobody has the administrator's credentials afterwards.
async fn arrange(world: &World, folder: &Path, host: &str, github: &Trust, mayfly: &Trust) -> Result<()> {
    let layout = world.cluster.layout();
    let programs = part_folder(layout, NAME)?;
    // MinIO looks for its certificate and for authorities under these names, and so does its client.
    let (certificate, key) = pki::server(layout, "s3", &[host, host_of(&world.access.local_url)?])?;
    let (server, client) = (folder.join("server"), folder.join("client"));
    for certificates in [server.join("certs"), client.join("certs")] {
        write_file(&certificates.join("CAs/ca.crt"), &pki::authority(layout)?)?;
    }
    fs::copy(certificate, server.join("certs/public.crt"))?;
    fs::copy(key, server.join("certs/private.key"))?;

    let (user, password) = (random_hex(10)?, random_hex(20)?);
    let discovery = |trust: &Trust| format!("{}/.well-known/openid-configuration", trust.issuer);
    let path = |path: &Path| path.display().to_string();
    let (program, certs, data) = (path(&programs.join("minio")), path(&server.join("certs")), path(&server.join("data")));
    let log = layout.log(NAME);
    let before = fs::metadata(&log).map_or(0, |log| log.len());
    world.cluster.start_with(
        Place::Outside,
        NAME,
        &[&program, "server", "--address", &format!(":{PORT}"), "--certs-dir", &certs, &data],
        &[
            ("HOME", &path(&server)),
            ("MINIO_ROOT_USER", &user),
            ("MINIO_ROOT_PASSWORD", &password),
            ("MINIO_BROWSER", "off"),
            ("MINIO_IDENTITY_OPENID_CONFIG_URL", &discovery(github)),
            ("MINIO_IDENTITY_OPENID_CLIENT_ID", github.audience),
            ("MINIO_IDENTITY_OPENID_ROLE_POLICY", POLICY),
            ("MINIO_IDENTITY_OPENID_CONFIG_URL_MAYFLY", &discovery(mayfly)),
            ("MINIO_IDENTITY_OPENID_CLIENT_ID_MAYFLY", mayfly.audience),
            ("MINIO_IDENTITY_OPENID_ROLE_POLICY_MAYFLY", POLICY),
        ],
    )?;
    eventually("MinIO tells its roles", Duration::from_secs(60), || async {
        check_running(layout, NAME)?;
        let said = fs::read(&log)?;
        let roles = roles_in(&String::from_utf8_lossy(said.get(usize::try_from(before)?..).unwrap_or_default()));
        let Some(roles) = roles else { return Ok(None) };
        let known = |trust: &Trust| roles.iter().any(|role| role == trust.role_arn);
        ensure!(known(github) && known(mayfly), "MinIO's roles are {roles:?}");
        Ok(Some(()))
    })
    .await?;

    let statement =
        json!({"Effect": "Allow", "Action": ["s3:*"], "Resource": [format!("arn:aws:s3:::{BUCKET}"), format!("arn:aws:s3:::{BUCKET}/*")]});
    let policy = client.join("policy.json");
    write_file(&policy, &json!({"Version": "2012-10-17", "Statement": [statement]}).to_string())?;
    let (bucket, policy) = (format!("store/{BUCKET}"), path(&policy));
    for words in [&["mb", "--ignore-existing", &bucket][..], &["admin", "policy", "create", "store", POLICY, &policy]] {
        eventually(format!("`mc {}`", words.join(" ")), Duration::from_secs(30), || async {
            let argv = [path(&programs.join("mc")), "--config-dir".to_owned(), path(&client)];
            let mut mc = world.cluster.command_in(Place::Outside, argv);
            // A proxy of the caller's does not lead there.
            mc.args(words).env("MC_HOST_store", format!("https://{user}:{password}@{host}:{PORT}")).env("NO_PROXY", host);
            run(&mut mc).map(Some)
        })
        .await?;
    }
    Ok(())
}

/// The roles that MinIO tells of.
fn roles_in(log: &str) -> Option<Vec<String>> {
    let (_, after) = log.split_once(ROLES)?;
    // The line may not be whole yet.
    let (line, _) = after.split_once('\n')?;
    Some(line.split_whitespace().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_read_from_a_whole_line() {
        let whole = "MinIO Object Storage Server\nINFO: IAM Roles: arn:minio:iam:::role/one arn:minio:iam:::role/two\nAPI: ..";
        assert_eq!(roles_in(whole), Some(vec!["arn:minio:iam:::role/one".to_owned(), "arn:minio:iam:::role/two".to_owned()]));
        assert_eq!(roles_in("INFO: IAM Roles: arn:minio:iam:::ro"), None);
        assert_eq!(roles_in("API: https://s3"), None);
    }
}
