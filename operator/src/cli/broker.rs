//! The broker's command line.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use reqwest::Url;

use crate::audit::Rotation;
use crate::credentials::{Controller, IssuerConfig};
use crate::forge::Secret;

/// Every option can be given by its environment variable as well.
#[derive(Args)]
pub(crate) struct BrokerArgs {
    /// Name of this process towards the API server, for example the pod's.
    #[arg(long, env = "MAYFLY_INSTANCE")]
    instance: Option<String>,
    /// YAML file with the issuers whose tokens are believed: a list of {issuer, algorithms, maxAgeSeconds, certificateAuthorityFile}.
    #[arg(long, env = "MAYFLY_ISSUERS_FILE")]
    issuers_file: PathBuf,
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
    /// File that audit records are appended to. Without it they go to standard output; the log goes to standard error.
    #[arg(long, env = "MAYFLY_AUDIT_FILE")]
    audit_file: Option<PathBuf>,
    /// Size in MiB at which that file becomes FILE.1, FILE.1 becomes FILE.2, and so on [default: never].
    #[arg(long, env = "MAYFLY_AUDIT_FILE_MAX_SIZE", requires = "audit_file", value_parser = clap::value_parser!(u64).range(1..=1_048_576))]
    audit_file_max_size: Option<u64>,
    /// How many of those are kept; the oldest is removed.
    #[arg(long, env = "MAYFLY_AUDIT_FILE_MAX_BACKUPS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    audit_file_max_backups: u32,
    /// Collector that gets audit records instead: it is sent lines of JSON by POST, and a credential leaves when it answered with 2xx. https,
    /// or http to this host alone.
    #[arg(long, env = "MAYFLY_AUDIT_URL", conflicts_with = "audit_file")]
    audit_url: Option<Url>,
    /// PEM file of certificate authorities, for a collector with a private one.
    #[arg(long, env = "MAYFLY_AUDIT_CA_FILE", requires = "audit_url")]
    audit_ca_file: Option<PathBuf>,
    /// File with a bearer token for it; read anew for every call.
    #[arg(long, env = "MAYFLY_AUDIT_TOKEN_FILE", requires = "audit_url")]
    audit_token_file: Option<PathBuf>,
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

/// Where audit records go.
#[derive(Debug)]
pub(crate) enum AuditTo {
    /// Line by line.
    StandardOutput,
    /// A file of this process alone.
    File { path: PathBuf, rotation: Option<Rotation> },
    /// Somebody who keeps them; PEM.
    Collector { url: Url, authorities: Option<Vec<u8>>, token_file: Option<PathBuf> },
}

/// Everything the broker was told.
#[derive(Debug)]
pub(crate) struct BrokerSettings {
    pub(crate) instance: Option<String>,
    /// With the certificate authorities of each, PEM.
    pub(crate) issuers: Vec<(IssuerConfig, Option<Vec<u8>>)>,
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
        let audit = match (self.audit_url, self.audit_file) {
            (Some(url), _) => AuditTo::Collector {
                url: collector(url)?,
                authorities: self.audit_ca_file.as_ref().map(|path| bytes("--audit-ca-file", path)).transpose()?,
                token_file: self.audit_token_file,
            },
            (None, Some(path)) => {
                let rotation = self.audit_file_max_size.map(|size| Rotation { most: size << 20, kept: self.audit_file_max_backups });
                AuditTo::File { path, rotation }
            }
            (None, None) => AuditTo::StandardOutput,
        };
        Ok(BrokerSettings {
            instance: self.instance,
            issuers: issuers.collect::<Result<_>>()?,
            broker_address: self.broker_address,
            health_address: self.health_address,
            certificate: text("--tls-certificate-file", &self.tls_certificate_file)?,
            key: Secret::new(text("--tls-key-file", &self.tls_key_file)?),
            provider_ca: self.provider_ca_file.as_ref().map(|path| bytes("--provider-ca-file", path)).transpose()?,
            audit,
            controller,
            only_replica: self.only_replica,
            remembered_tokens: self.remembered_tokens as usize,
        })
    }
}

/// The address of a collector, to which records may go in the open only where they do not leave this host.
fn collector(url: Url) -> Result<Url> {
    let local = matches!(url.host_str(), Some("localhost" | "127.0.0.1" | "[::1]"));
    ensure!(url.scheme() == "https" || (url.scheme() == "http" && local), "--audit-url: https, or http to localhost");
    ensure!(url.username().is_empty() && url.password().is_none(), "--audit-url holds no password: name a file in --audit-token-file");
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_go_in_the_open_to_this_host_alone() {
        let taken = |url: &str| collector(Url::parse(url).expect("an address")).is_ok();
        assert!(taken("https://collector.example/audit") && taken("http://127.0.0.1:9880/") && taken("http://[::1]/"));
        for refused in ["http://collector.example/", "http://127.0.0.1.example/", "https://me:secret@collector.example/", "file:///tmp/x"] {
            assert!(!taken(refused), "{refused}");
        }
    }
}
