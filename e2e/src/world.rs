//! The cluster, the forge and the clients to both.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use mayfly_cluster::{Cluster, Forge, ForgeAccess};

/// Namespace of the operator.
pub const SYSTEM: &str = "mayfly-system";

/// Everything a test or the demo works with.
#[derive(Clone)]
pub struct World {
    /// The cluster.
    pub cluster: Cluster,
    /// The forge's addresses and its administrator.
    pub access: ForgeAccess,
    /// The forge, as its administrator.
    pub forge: Forge,
    /// The API server, as its administrator.
    pub client: Client,
    config: Config,
}

impl World {
    /// Connects to the cluster that is up.
    ///
    /// # Errors
    /// When there is none, or its kubeconfig cannot be used.
    pub async fn connect() -> Result<Self> {
        // A second call finds the provider installed, which is what was wanted.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let cluster = Cluster::connect()?;
        let access = cluster.forge()?;
        let kubeconfig = Kubeconfig::read_from(cluster.kubeconfig())?;
        let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        config.default_retry = false;
        let client = Client::try_from(config.clone())?;
        Ok(Self { forge: access.client(), cluster, access, client, config })
    }

    /// The API server, in the operator's name: for what nobody else may do, and to see whether the operator may.
    ///
    /// # Errors
    /// When the client cannot be made.
    pub fn as_operator(&self) -> Result<Client> {
        let mut config = self.config.clone();
        config.auth_info.impersonate = Some(operator_account());
        Ok(Client::try_from(config)?)
    }
}

/// The operator's user name.
pub fn operator_account() -> String {
    format!("system:serviceaccount:{SYSTEM}:mayfly-controller")
}

/// The repository's folder.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).unwrap_or_default()
}

/// The folder this program was built into, where the other programs of the workspace are as well.
///
/// # Errors
/// When the program's own path is unknown.
pub fn built() -> Result<PathBuf> {
    let own = std::env::current_exe().context("the path of this program")?;
    let folder = own.parent().context("a program is in a folder")?;
    // Tests are one folder deeper.
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    Ok(folder.to_owned())
}
