//! Names, addresses and paths of a cluster: the one place that decides what is called how and lies where.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Name of the only node.
pub const NODE_NAME: &str = "node1";
/// The node's address: API server, kubelet, and what pods look like from outside.
pub const NODE_IP: &str = "172.30.0.1";
/// The outside world's address on the node's network: the forge listens here.
pub const OUTSIDE_IP: &str = "172.30.0.254";
/// This machine's address on its link to the outside world.
pub const HOST_IP: &str = "172.30.1.1";
/// The outside world's end of that link.
pub const HOST_LINK_OUTSIDE_IP: &str = "172.30.1.2";
/// The network of node and outside world.
pub const NODE_CIDR: &str = "172.30.0.0/24";
/// Addresses of pods.
pub const POD_CIDR: &str = "10.244.0.0/16";
/// Addresses of Services.
pub const SERVICE_CIDR: &str = "10.96.0.0/16";
/// The Service `kubernetes`.
pub const API_SERVICE_IP: &str = "10.96.0.1";
/// The Service `kube-dns`.
pub const DNS_IP: &str = "10.96.0.10";
/// Domain of Services.
pub const CLUSTER_DOMAIN: &str = "cluster.local";
/// Every name below this domain leads to [`OUTSIDE_IP`], in pods and in the outside world.
pub const OUTSIDE_DOMAIN: &str = "mayfly.test";
/// The link-local address where clouds serve instance metadata; it answers (or does not) in the outside world.
pub const METADATA_IP: &str = "169.254.169.254";
/// Port of the forge.
pub const FORGE_PORT: u16 = 3000;
/// Address of the API server.
pub const API_URL: &str = "https://172.30.0.1:6443";

/// One of the two network namespaces of a local cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum World {
    /// Where the node's processes run.
    Node,
    /// Where everything runs that is not the cluster: forge, decoys, clouds.
    Outside,
}

impl World {
    /// `node` or `outside`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Outside => "outside",
        }
    }
}

/// Where the parts of one cluster are.
#[derive(Clone, Debug)]
pub struct Layout {
    name: String,
    base: PathBuf,
    cache: PathBuf,
    repo: PathBuf,
}

impl Layout {
    /// The layout of the cluster `name`: 1 to 10 lower-case letters, digits and dashes, so that interface names fit.
    pub fn new(name: &str) -> Result<Self> {
        let fits = (1..=10).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !name.starts_with('-');
        if !fits {
            bail!("cluster name {name:?}: use 1 to 10 lower-case letters, digits and dashes");
        }
        let cache = match std::env::var_os("MAYFLY_CACHE") {
            Some(dir) => PathBuf::from(dir),
            None => {
                let home = std::env::var_os("HOME").context("neither MAYFLY_CACHE nor HOME is set")?;
                PathBuf::from(home).join(".cache/mayfly")
            }
        };
        Ok(Self { name: name.to_owned(), base: PathBuf::from("/var/lib/mayfly-e2e"), cache, repo: repository()? })
    }

    /// Name of the cluster.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The working tree this program was built from.
    pub fn repo(&self) -> &Path {
        &self.repo
    }

    /// Where built artefacts are kept between clusters.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// Everything the running cluster keeps.
    pub fn state(&self) -> PathBuf {
        self.base.join(&self.name)
    }

    /// A path below [`state`](Self::state).
    pub fn at(&self, path: &str) -> PathBuf {
        self.state().join(path)
    }

    /// Held while a command changes the cluster. Lies beside the state, because `down` removes the state.
    pub fn lock(&self) -> PathBuf {
        self.base.join(format!("{}.lock", self.name))
    }

    /// Log files: one per part.
    pub fn log(&self, part: &str) -> PathBuf {
        self.state().join("log").join(format!("{part}.log"))
    }

    /// The folder of programs the cluster was started with (links into the cache).
    pub fn bin(&self, program: &str) -> PathBuf {
        self.state().join("bin").join(program)
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.at("kubeconfig")
    }

    /// Name of a network namespace as `ip netns` shows it.
    pub fn netns(&self, world: World) -> String {
        format!("{}-{}", self.name, world.as_str())
    }

    /// File of a network namespace, for `nsenter --net=`.
    pub fn netns_file(&self, world: World) -> PathBuf {
        Path::new("/run/netns").join(self.netns(world))
    }

    /// File of a mount namespace, for `nsenter --mount=`.
    pub fn mntns_file(&self, world: World) -> PathBuf {
        self.at("ns").join(world.as_str())
    }

    /// This machine's end of its link to the outside world.
    pub fn host_link(&self) -> String {
        format!("{}-host", self.name)
    }

    /// Parent of all cgroups of the cluster, as the kubelet's `cgroupRoot` names it.
    pub fn cgroup(&self) -> String {
        format!("mayfly-e2e-{}", self.name)
    }

    /// containerd's socket.
    pub fn containerd_socket(&self) -> PathBuf {
        self.at("containerd/containerd.sock")
    }

    /// The Cilium agent's socket.
    pub fn cilium_socket(&self) -> PathBuf {
        self.at("cilium/state/cilium.sock")
    }
}

/// The repository: `MAYFLY_REPO`, or the tree this program was compiled in.
fn repository() -> Result<PathBuf> {
    let path = match std::env::var_os("MAYFLY_REPO") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."),
    };
    let path = path
        .canonicalize()
        .with_context(|| format!("no working tree at {}; set MAYFLY_REPO to one", path.display()))?;
    if !path.join("e2e/tools").is_dir() {
        bail!("{} has no e2e/tools; set MAYFLY_REPO to a working tree of Mayfly", path.display());
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_names_that_do_not_fit_an_interface() {
        for bad in ["", "eleven-char", "Mayfly", "a/b", "-a", "a b", "../x"] {
            assert!(Layout::new(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn longest_name_keeps_interfaces_and_sockets_short() {
        let layout = Layout::new("ten-chars-").unwrap();
        assert!(layout.host_link().len() <= 15);
        for socket in [layout.containerd_socket(), layout.cilium_socket()] {
            assert!(socket.as_os_str().len() < 100, "{}", socket.display());
        }
    }
}
