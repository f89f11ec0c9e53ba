//! Where audit records go: the same options for every process that writes some.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use reqwest::Url;

use crate::audit::Rotation;

/// Every option can be given by its environment variable as well.
#[derive(Args)]
pub(super) struct AuditArgs {
    /// File that audit records are appended to. Without it they go to standard output; the log goes to standard error.
    #[arg(long, env = "MAYFLY_AUDIT_FILE")]
    audit_file: Option<PathBuf>,
    /// Size in MiB at which that file becomes FILE.1, FILE.1 becomes FILE.2, and so on [default: never].
    #[arg(long, env = "MAYFLY_AUDIT_FILE_MAX_SIZE", requires = "audit_file", value_parser = clap::value_parser!(u64).range(1..=1_048_576))]
    audit_file_max_size: Option<u64>,
    /// How many of those are kept; the oldest is removed.
    #[arg(long, env = "MAYFLY_AUDIT_FILE_MAX_BACKUPS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    audit_file_max_backups: u32,
    /// Collector that gets audit records instead: it is sent lines of JSON by POST, and a credential or a registration leaves when it
    /// answered with 2xx. https, or http to this host alone.
    #[arg(long, env = "MAYFLY_AUDIT_URL", conflicts_with = "audit_file")]
    audit_url: Option<Url>,
    /// PEM file of certificate authorities, for a collector with a private one.
    #[arg(long, env = "MAYFLY_AUDIT_CA_FILE", requires = "audit_url")]
    audit_ca_file: Option<PathBuf>,
    /// File with a bearer token for it; read anew for every call.
    #[arg(long, env = "MAYFLY_AUDIT_TOKEN_FILE", requires = "audit_url")]
    audit_token_file: Option<PathBuf>,
}

/// Where audit records go.
#[derive(Clone, Debug)]
pub(crate) enum AuditTo {
    /// Line by line.
    StandardOutput,
    /// A file of this process alone.
    File { path: PathBuf, rotation: Option<Rotation> },
    /// Somebody who keeps them; PEM.
    Collector { url: Url, authorities: Option<Vec<u8>>, token_file: Option<PathBuf> },
}

impl AuditArgs {
    /// Checks what was given, and reads the files.
    pub(super) fn settings(self) -> Result<AuditTo> {
        let read = |path: &PathBuf| std::fs::read(path).with_context(|| format!("--audit-ca-file {}", path.display()));
        Ok(match (self.audit_url, self.audit_file) {
            (Some(url), _) => AuditTo::Collector {
                url: collector(url)?,
                authorities: self.audit_ca_file.as_ref().map(read).transpose()?,
                token_file: self.audit_token_file,
            },
            (None, Some(path)) => {
                let rotation = self.audit_file_max_size.map(|size| Rotation { most: size << 20, kept: self.audit_file_max_backups });
                AuditTo::File { path, rotation }
            }
            (None, None) => AuditTo::StandardOutput,
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
