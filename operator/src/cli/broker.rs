//! The broker's command line.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use clap::Args;

use super::audit::{AuditArgs, AuditTo};
use crate::credentials::{AppConfig, Controller, IssuerConfig};
use crate::forge::Secret;

/// Every option can be given by its environment variable as well.
#[derive(Args)]
pub(crate) struct BrokerArgs {
    /// Name of this process towards the API server, for example the pod's.
    #[arg(long, env = "MAYFLY_INSTANCE")]
    instance: Option<String>,
    /// YAML file with the issuers whose tokens are believed: a list of {issuer, algorithms, maxAgeSeconds, perJobClaim, certificateAuthorityFile}.
    #[arg(long, env = "MAYFLY_ISSUERS_FILE")]
    issuers_file: PathBuf,
    /// YAML file with the GitHub Apps that can be signed for: a list of {clientId, apiUrl} and either {keyFile} or {vaultTransit: {address,
    /// mount, key, tokenFile}}.
    #[arg(long, env = "MAYFLY_GITHUB_APPS_FILE")]
    github_apps_file: Option<PathBuf>,
    /// Where the broker listens (TLS).
    #[arg(long, env = "MAYFLY_BROKER_ADDRESS", default_value = "0.0.0.0:8443")]
    broker_address: SocketAddr,
    /// Where health and metrics are served.
    #[arg(long, env = "MAYFLY_HEALTH_ADDRESS", default_value = "0.0.0.0:8081")]
    health_address: SocketAddr,
    /// PEM file of the certificate.
    #[arg(long, env = "MAYFLY_TLS_CERTIFICATE_FILE")]
    tls_certificate_file: PathBuf,
    /// PEM file of its key.
    #[arg(long, env = "MAYFLY_TLS_KEY_FILE")]
    tls_key_file: PathBuf,
    /// PEM file of certificate authorities for providers with a private one.
    #[arg(long, env = "MAYFLY_PROVIDER_CA_FILE")]
    provider_ca_file: Option<PathBuf>,
    #[command(flatten)]
    audit: AuditArgs,
    /// Base URL of the controller's gate API, which is told of refusals, and makes events of them.
    #[arg(long, env = "MAYFLY_CONTROLLER_URL", requires_all = ["controller_ca_file", "controller_token_file"])]
    controller_url: Option<String>,
    /// PEM file of the authority of its certificate.
    #[arg(long, env = "MAYFLY_CONTROLLER_CA_FILE", requires = "controller_url")]
    controller_ca_file: Option<PathBuf>,
    /// File with this process's token for it (audience gate.mayfly.dev).
    #[arg(long, env = "MAYFLY_CONTROLLER_TOKEN_FILE", requires = "controller_url")]
    controller_token_file: Option<PathBuf>,
    /// This is the only process that gives out credentials. Without it, tokens of forges that give no per-job claim are refused: that they
    /// are spent once is known to one process only.
    #[arg(long, env = "MAYFLY_ONLY_REPLICA")]
    only_replica: bool,
    /// Most spent tokens that are remembered; while there are more, nothing is given out. A million take about 150 MB.
    #[arg(long, env = "MAYFLY_REMEMBERED_TOKENS", default_value_t = 200_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    remembered_tokens: u32,
}

/// Everything the broker was told.
#[derive(Debug)]
pub(crate) struct BrokerSettings {
    pub(crate) instance: Option<String>,
    /// With the certificate authorities of each, PEM.
    pub(crate) issuers: Vec<(IssuerConfig, Option<Vec<u8>>)>,
    pub(crate) github_apps: Vec<AppConfig>,
    pub(crate) broker_address: SocketAddr,
    pub(crate) health_address: SocketAddr,
    pub(crate) certificate: String,
    pub(crate) key: Secret,
    pub(crate) provider_ca: Option<Vec<u8>>,
    pub(crate) audit: AuditTo,
    pub(crate) controller: Option<Controller>,
    pub(crate) only_replica: bool,
    pub(crate) remembered_tokens: usize,
}

/// Reads `--issuers-file`.
pub(super) fn read_issuers(path: &Path) -> Result<Vec<IssuerConfig>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("--issuers-file {}", path.display()))?;
    IssuerConfig::read_all(&text).map_err(|why| anyhow!("--issuers-file {}: {why}", path.display()))
}

/// Reads `--github-apps-file`, where it is given.
pub(super) fn read_github_apps(path: Option<&Path>) -> Result<Vec<AppConfig>> {
    let Some(path) = path else { return Ok(Vec::new()) };
    let text = std::fs::read_to_string(path).with_context(|| format!("--github-apps-file {}", path.display()))?;
    AppConfig::read_all(&text).map_err(|why| anyhow!("--github-apps-file {}: {why}", path.display()))
}

impl BrokerArgs {
    /// Checks what was given, and reads the files.
    pub(crate) fn settings(self) -> Result<BrokerSettings> {
        let bytes = |option: &str, path: &PathBuf| std::fs::read(path).with_context(|| format!("{option} {}", path.display()));
        let text = |option: &str, path: &PathBuf| std::fs::read_to_string(path).with_context(|| format!("{option} {}", path.display()));
        let issuers = read_issuers(&self.issuers_file)?.into_iter().map(|issuer| {
            let authorities = issuer.certificate_authority_file.as_ref();
            let authorities = authorities.map(|path| bytes("certificateAuthorityFile", path)).transpose()?;
            Ok((issuer, authorities))
        });
        let controller = match (self.controller_url, &self.controller_ca_file, self.controller_token_file) {
            (Some(url), Some(authority), Some(token_file)) => {
                let url = url.trim_end_matches('/').to_owned();
                Some(Controller { url, authority: bytes("--controller-ca-file", authority)?, token_file })
            }
            _ => None,
        };
        Ok(BrokerSettings {
            instance: self.instance,
            issuers: issuers.collect::<Result<_>>()?,
            github_apps: read_github_apps(self.github_apps_file.as_deref())?,
            broker_address: self.broker_address,
            health_address: self.health_address,
            certificate: text("--tls-certificate-file", &self.tls_certificate_file)?,
            key: Secret::new(text("--tls-key-file", &self.tls_key_file)?),
            provider_ca: self.provider_ca_file.as_ref().map(|path| bytes("--provider-ca-file", path)).transpose()?,
            audit: self.audit.settings()?,
            controller,
            only_replica: self.only_replica,
            remembered_tokens: self.remembered_tokens as usize,
        })
    }
}
