//! What else trusts a job's token, in the outside world: Vault's own JWT auth method in a stand-in for the rest of Vault, and stand-ins for
//! Google Cloud and Microsoft Entra (`e2e/tools/clouds`). They trust the simulated GitHub.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use mayfly_cluster::builder::part_folder;
use mayfly_cluster::command::{output, random_hex, run, write_file};
use mayfly_cluster::layout::Layout;
use mayfly_cluster::{Cluster, ForgeAccess, World as Place, pki};
use serde_json::{Value, json};
use tokio::sync::Mutex;

use crate::wait::eventually;
use crate::world::{host_beside_forge, host_of};
use crate::{World, github};

/// What they are called among the programs of the outside world, and their part's name.
const NAME: &str = "clouds";
const PORT: u16 = 9443;
/// File with the token of Vault that signs for the App.
const SIGNER: &str = "signer-token";

/// The App that the broker can sign for by Vault's transit engine, and its key there.
pub const APP: &str = "Iv23liMayflyE2e";
const APP_KEY: &str = "mayfly-app";

/// All of them, at one address.
#[derive(Clone, Debug)]
pub struct Clouds {
    /// That address, for pods, operator and outside world: `https://HOST:PORT`.
    pub endpoint: String,
    /// Whose tokens they trust.
    pub issuer: String,
    /// The authority that signed their certificate: PEM.
    pub authority: String,
    root: String,
    local: String,
}

/// One is started at a time: two cannot listen on one address.
static STARTING: Mutex<()> = Mutex::const_new(());

/// Has them run. Those that run are kept, with what they were told.
///
/// # Errors
/// When they are not built (`cluster build clouds`), or do not answer.
pub async fn start(world: &World) -> Result<Clouds> {
    let _one = STARTING.lock().await;
    // The issuer's keys are read at the start.
    github::start(world).await?;
    let layout = world.cluster.layout();
    let (endpoint, local) = (endpoint(&world.access)?, host_of(&world.access.local_url)?);
    let authority = layout.at(NAME).join("authority.pem");
    let (root_file, root) = token(layout, "root-token")?;
    let (signer_file, _) = token(layout, SIGNER)?;
    write_file(&authority, &pki::authority(layout)?)?;
    let (certificate, key) = pki::server(layout, NAME, &[host_of(&endpoint)?, local])?;
    let issuer = github::issuer(&world.access)?;
    let words = [
        part_folder(layout, NAME)?.join(NAME).display().to_string(),
        format!("-address=:{PORT}"),
        format!("-certificate={}", certificate.display()),
        format!("-key={}", key.display()),
        format!("-issuer={issuer}"),
        format!("-authority={}", authority.display()),
        format!("-root-token-file={}", root_file.display()),
        format!("-signer-token-file={}", signer_file.display()),
    ];
    let argv: Vec<&str> = words.iter().map(String::as_str).collect();
    world.cluster.start(Place::Outside, NAME, &argv)?;
    let clouds = Clouds { endpoint, issuer, authority: pki::authority(layout)?, root, local: format!("https://{local}:{PORT}") };
    eventually("the clouds answer", Duration::from_secs(30), || async {
        run(&mut clouds.curl(world, "GET", "/health", "", None)).map(Some)
    })
    .await?;
    Ok(clouds)
}

fn endpoint(access: &ForgeAccess) -> Result<String> {
    Ok(format!("https://{}:{PORT}", host_beside_forge(access, NAME)?))
}

/// A token that Vault was started with, or will be, and its file.
fn token(layout: &Layout, name: &str) -> Result<(PathBuf, String)> {
    let file = layout.at(NAME).join(name);
    if !file.exists() {
        write_file(&file, &random_hex(16)?)?;
    }
    let token = std::fs::read_to_string(&file)?;
    Ok((file, token))
}

/// What the broker is told of the App: values of the chart; and the token that signs for it, whether Vault runs or not.
pub(crate) fn app_values(cluster: &Cluster, secret: &str) -> Result<(Vec<String>, String)> {
    let access = cluster.forge()?;
    let values = [
        ("clientId", APP.to_owned()),
        ("apiUrl", github::api_url(&access)?),
        ("vaultTransit.address", endpoint(&access)?),
        ("vaultTransit.key", APP_KEY.to_owned()),
        ("vaultTransit.tokenSecret", secret.to_owned()),
    ];
    let values = values.map(|(name, value)| format!("broker.githubApps[0].{name}={value}"));
    Ok((values.to_vec(), token(cluster.layout(), SIGNER)?.1))
}

impl Clouds {
    fn curl(&self, world: &World, method: &str, path: &str, token: &str, body: Option<&Value>) -> std::process::Command {
        let mut curl = world.cluster.command_in(Place::Outside, ["curl", "--silent", "--show-error", "--insecure", "--noproxy", "*"]);
        curl.args(["--max-time", "5", "--request", method, "--header", &format!("X-Vault-Token: {token}")]);
        if let Some(body) = body {
            curl.args(["--data", &body.to_string()]);
        }
        curl.args(["--write-out", "\n%{http_code}", &format!("{}{path}", self.local)]);
        curl
    }

    /// As the administrator of all of them.
    async fn tell(&self, world: &World, path: &str, body: &Value) -> Result<()> {
        let told = output(&mut self.curl(world, "POST", path, &self.root, Some(body)))?;
        anyhow::ensure!(told.trim() == "204", "{path}: {told}");
        Ok(())
    }

    /// Lets jobs of the repository of this number, by tokens for this audience, have tokens of Vault that read the secret `name`.
    ///
    /// # Errors
    /// With Vault's answer.
    pub async fn vault_role(&self, world: &World, name: &str, repository_id: i64, audience: &str) -> Result<()> {
        let role = json!({
            "role_type": "jwt", "user_claim": "sub", "bound_audiences": [audience], "token_policies": [name], "token_ttl": 900,
            "bound_claims": {"repository_id": repository_id.to_string()},
        });
        self.tell(world, &format!("/v1/auth/jwt/role/{name}"), &role).await
    }

    /// Whether a token of Vault's is good for anything.
    ///
    /// # Errors
    /// When Vault says neither yes nor no.
    pub async fn vault_knows(&self, world: &World, token: &str) -> Result<bool> {
        let told = output(&mut self.curl(world, "GET", "/v1/auth/token/lookup-self", token, None))?;
        match told.lines().last().context("a status")? {
            "200" => Ok(true),
            "403" => Ok(false),
            _ => anyhow::bail!("{told}"),
        }
    }

    /// Lets tokens with this subject and audience, both to the letter, make somebody the client of Entra.
    ///
    /// # Errors
    /// With Entra's answer.
    pub async fn federate(&self, world: &World, client_id: &str, subject: &str, audience: &str) -> Result<()> {
        let credential = json!({"clientId": client_id, "subject": subject, "audience": audience});
        self.tell(world, "/control/federated-credentials", &credential).await
    }

    /// Gives Vault's transit engine the key of [`APP`].
    ///
    /// # Errors
    /// With Vault's answer.
    pub async fn app_key(&self, world: &World, pem: &str) -> Result<()> {
        self.tell(world, &format!("/control/transit-keys/{APP_KEY}"), &json!({"pem": pem})).await
    }

    /// What a pool says to let its jobs reach them: `spec.isolation.egress`.
    ///
    /// # Errors
    /// When an address is none.
    pub fn egress(&self, world: &World) -> Result<Value> {
        Ok(json!({"allow": [{"cidr": format!("{}/32", host_of(&world.access.local_url)?), "ports": [PORT]}]}))
    }
}
