//! Names, addresses and paths of a cluster: the one place that decides what is called how and lies where.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Name of the only node.
pub const NODE_NAME: &str = "node1";
/// Domain of Services.
pub const CLUSTER_DOMAIN: &str = "cluster.local";
/// Every name below this domain leads to the outside world, for pods and for the outside world itself.
pub const OUTSIDE_DOMAIN: &str = "mayfly.test";
/// The link-local address where clouds serve instance metadata; it answers (or does not) in the outside world.
pub const METADATA_IP: &str = "169.254.169.254";
/// Port of the forge.
pub const FORGE_PORT: u16 = 3000;
/// Name of the cluster whose addresses are those of the documentation.
pub const DEFAULT_NAME: &str = "mayfly";

/// Prefix of all IPv6 addresses (RFC 4193): no network of the real world, and nothing that Mayfly opens by itself.
const UNIQUE_LOCAL: &str = "fd6d:6179:666c";
/// Number of clusters that can be up at the same time.
const SLOTS: u32 = 16;

/// Addresses of a cluster. Those of the cluster `mayfly` are given as examples; another name has others, so that several clusters can
/// be up beside one another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// The node: API server, kubelet, and what pods look like from outside. 172.30.0.1
    pub node: String,
    /// The outside world on the node's network: the forge listens here. 172.30.0.254
    pub outside: String,
    /// The network of node and outside world. 172.30.0.0/24
    pub node_cidr: String,
    /// This machine on its link to the outside world. 172.30.1.1
    pub host: String,
    /// The outside world's end of that link. 172.30.1.2
    pub host_link: String,
    /// Pods. 10.244.0.0/16
    pub pod_cidr: String,
    /// Services. 10.96.0.0/16
    pub service_cidr: String,
    /// The node, in IPv6. fd6d:6179:666c:a000::1
    pub node_v6: String,
    /// The outside world on the node's network, in IPv6. fd6d:6179:666c:a000::fe
    pub outside_v6: String,
    /// Pods, in IPv6. fd6d:6179:666c:b000::/56
    pub pod_cidr_v6: String,
    /// Services, in IPv6. fd6d:6179:666c:c000::/112
    pub service_cidr_v6: String,
    /// The Service `kubernetes`. 10.96.0.1
    pub api_service: String,
    /// The Service `kube-dns`. 10.96.0.10
    pub dns: String,
}

impl Addresses {
    fn of(name: &str) -> Self {
        let slot = if name == DEFAULT_NAME {
            0
        } else {
            // FNV-1a: any spread will do.
            let hash = name.bytes().fold(2_166_136_261_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(16_777_619));
            1 + hash % (SLOTS - 1)
        };
        let (node, link, pods, services) = (2 * slot, 2 * slot + 1, 244 - slot, 96 + slot);
        Self {
            node: format!("172.30.{node}.1"),
            outside: format!("172.30.{node}.254"),
            node_cidr: format!("172.30.{node}.0/24"),
            host: format!("172.30.{link}.1"),
            host_link: format!("172.30.{link}.2"),
            pod_cidr: format!("10.{pods}.0.0/16"),
            service_cidr: format!("10.{services}.0.0/16"),
            node_v6: format!("{UNIQUE_LOCAL}:a{slot:x}00::1"),
            outside_v6: format!("{UNIQUE_LOCAL}:a{slot:x}00::fe"),
            pod_cidr_v6: format!("{UNIQUE_LOCAL}:b{slot:x}00::/56"),
            service_cidr_v6: format!("{UNIQUE_LOCAL}:c{slot:x}00::/112"),
            api_service: format!("10.{services}.0.1"),
            dns: format!("10.{services}.0.10"),
        }
    }

    /// Address of the API server. https://172.30.0.1:6443
    pub fn api_url(&self) -> String {
        format!("https://{}:6443", self.node)
    }

    /// Address of the forge for this machine, which does not know the cluster's names. http://172.30.0.254:3000
    pub fn forge_url(&self) -> String {
        format!("http://{}:{FORGE_PORT}", self.outside)
    }
}

/// Where a program runs: in one of the two network namespaces of a local cluster, or beside them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum World {
    /// Where the node's processes run.
    Node,
    /// Where everything runs that is not the cluster: forge, decoys, clouds.
    Outside,
    /// This machine, where no namespaces are made.
    #[value(skip)]
    Machine,
}

impl World {
    /// `node`, `outside` or `machine`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Outside => "outside",
            Self::Machine => "machine",
        }
    }
}

/// Where the parts of one cluster are.
#[derive(Clone, Debug)]
pub struct Layout {
    name: String,
    addresses: Addresses,
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
        let addresses = Addresses::of(name);
        Ok(Self { name: name.to_owned(), addresses, base: base()?, cache, repo: repository()? })
    }

    /// Name of the cluster.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Addresses of the cluster.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
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

/// Where clusters keep what they keep: only root, who alone can have a local cluster, writes to /var/lib.
fn base() -> Result<PathBuf> {
    if nix::unistd::geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib/mayfly-e2e"));
    }
    let state = match std::env::var_os("XDG_STATE_HOME") {
        Some(state) => PathBuf::from(state),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".local/state"),
    };
    Ok(state.join("mayfly-e2e"))
}

/// The repository: `MAYFLY_REPO`, or the tree this program was compiled in.
fn repository() -> Result<PathBuf> {
    let path = match std::env::var_os("MAYFLY_REPO") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."),
    };
    let path = path.canonicalize().with_context(|| format!("no working tree at {}; set MAYFLY_REPO to one", path.display()))?;
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
    fn clusters_of_other_names_have_other_addresses_than_the_usual_one() {
        let usual = Addresses::of(DEFAULT_NAME);
        assert_eq!((usual.node.as_str(), usual.pod_cidr.as_str()), ("172.30.0.1", "10.244.0.0/16"));
        for name in ["a", "chaos", "mayfly2", "test-1"] {
            let other = Addresses::of(name);
            assert_ne!(other.node_cidr, usual.node_cidr);
            assert_ne!(other.pod_cidr, usual.pod_cidr);
            assert_ne!(other.service_cidr, usual.service_cidr);
            for field in [&other.node, &other.host, &other.dns] {
                assert!(field.parse::<std::net::Ipv4Addr>().is_ok(), "{field}");
            }
            for field in [&other.node_v6, &other.outside_v6] {
                assert!(field.parse::<std::net::Ipv6Addr>().is_ok(), "{field}");
            }
            assert_ne!(other.pod_cidr_v6, usual.pod_cidr_v6);
            assert_ne!(other.service_cidr_v6, usual.service_cidr_v6);
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
