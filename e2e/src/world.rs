//! The cluster, the forge and the clients to both.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, LogParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use mayfly_cluster::command::run;
use mayfly_cluster::{Cluster, Forge, ForgeAccess, World as Place};
use serde_json::json;
use tokio::sync::Mutex;

use crate::stage::PATIENCE;
use crate::wait::eventually;

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

    /// Has an address answer as a metadata endpoint would, on the node or in the outside world, so that silence means something. Returns
    /// the file in which it notes who came, as `visit FIRST-LINE`. It answers until the cluster ends.
    ///
    /// # Errors
    /// When it does not answer the node, where no policy stands in the way.
    pub async fn decoy(&self, place: Place, address: SocketAddr) -> Result<PathBuf> {
        let _one = DECOYS.lock().await;
        let name = format!("decoy-{}", address.to_string().replace(['.', ':', '[', ']'], "-"));
        let program = built()?.join("demo").display().to_string();
        self.cluster.add_address(place, address.ip())?;
        self.cluster.start(place, &name, &[&program, "decoy", &address.to_string()])?;
        let knock = format!("exec 3<>/dev/tcp/{}/{} && head -c 4 <&3 | grep -q HTTP", address.ip(), address.port());
        eventually(format!("the decoy at {address}"), Duration::from_secs(5), || async {
            run(&mut self.cluster.command_in(Place::Node, ["bash", "-c", &knock])).map(Some)
        })
        .await
        .context("the decoy must answer where no policy stands in the way")?;
        Ok(self.cluster.layout().log(&name))
    }

    /// Kills the first process of a pod's first container from the node, as the kernel does when memory is short. Takes a cluster of this
    /// machine.
    ///
    /// # Errors
    /// When the container does not run.
    pub fn kill_container(&self, pod: &Pod) -> Result<()> {
        let status = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref()?.first()).context("a container")?;
        let id = status.container_id.as_deref().and_then(|id| id.strip_prefix("containerd://")).context("its id")?;
        let layout = self.cluster.layout();
        let mut ctr = std::process::Command::new(layout.bin("ctr"));
        ctr.arg("--address").arg(layout.containerd_socket()).args(["--namespace", "k8s.io", "tasks", "kill", "--signal", "SIGKILL", id]);
        run(&mut ctr)
    }

    /// Runs a command of the runner's image in a pod that no policy selects, until it has said `last`; returns what it said. What does
    /// not answer there shows nothing by being silent elsewhere.
    ///
    /// # Errors
    /// When it does not say so.
    pub async fn unpoliced(&self, name: &str, command: &[String], last: &str) -> Result<String> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), SYSTEM);
        let container = json!({"name": "try", "image": "mayfly.test/gitea-runner:dev", "imagePullPolicy": "Never", "command": command});
        let spec = json!({"restartPolicy": "Never", "terminationGracePeriodSeconds": 0, "containers": [container]});
        api.create(&PostParams::default(), &serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec}))?).await?;
        let log = eventually(format!("the word of pod {name}"), PATIENCE, || async {
            let log = api.logs(name, &LogParams::default()).await?;
            Ok(log.contains(last).then_some(log))
        })
        .await?;
        api.delete(name, &DeleteParams::default()).await?;
        Ok(log)
    }
}

/// One decoy is started at a time: two programs cannot listen on one address.
static DECOYS: Mutex<()> = Mutex::const_new(());

/// The host in a URL.
///
/// # Errors
/// When it has no scheme.
pub fn host_of(url: &str) -> Result<&str> {
    let authority = url.split_once("://").context("an address has a scheme")?.1.split('/').next().unwrap_or_default();
    Ok(authority.rsplit_once(':').map_or(authority, |(host, _)| host))
}

/// By which name, or address, pods, operator and outside world reach another program of the outside world: beside the forge's name
/// where it has one there.
///
/// # Errors
/// When the forge's address is none.
pub fn host_beside_forge(access: &ForgeAccess, name: &str) -> Result<String> {
    let host = host_of(&access.url)?;
    Ok(host.strip_prefix("forge.").map_or_else(|| host.to_owned(), |domain| format!("{name}.{domain}")))
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
