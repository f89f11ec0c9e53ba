//! The network of pods and, with Cilium, the engine that enforces NetworkPolicies.
//!
//! Cilium is 1.15 because newer ones cannot be built from Go modules alone: old upstream, but it enforces. Its operator and agent
//! run as processes of the node. Both end when they lose the API server; a loop starts them again, as a kubelet would.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::builder::part_folder;
use crate::command::{command, output, run, wait_for, write_file};
use crate::layout::{Layout, NODE_NAME, World};
use crate::pki;
use crate::process::{Daemon, Mounts, check_running};
use crate::template::render;

/// What connects pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// Cilium: NetworkPolicies are enforced.
    #[default]
    Cilium,
    /// A link for each pod, and routes: NetworkPolicies are accepted and mean nothing.
    None,
    /// What somebody else's cluster has.
    #[value(skip)]
    Other,
}

impl Engine {
    /// `cilium`, `none` or `other`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cilium => "cilium",
            Self::None => "none",
            Self::Other => "other",
        }
    }

    /// Processes of the engine.
    pub fn parts(self) -> &'static [&'static str] {
        match self {
            Self::Cilium => &["cilium-operator", "cilium-agent"],
            Self::None | Self::Other => &[],
        }
    }

    /// Starts the engine, if it does not run, waits until it is healthy, and only then lets the node have a network. The API server
    /// must be ready and the node registered.
    pub fn ensure(self, layout: &Layout) -> Result<()> {
        match self {
            Self::Cilium => cilium(layout),
            Self::Other => Ok(()),
            Self::None => {
                let state = layout.state().display().to_string();
                let (v4, v6) = (layout.addresses().pod_cidr.as_str(), layout.addresses().pod_cidr_v6.as_str());
                let values = [("STATE", state.as_str()), ("POD_CIDR", v4), ("POD_CIDR_V6", v6)];
                let config = render(include_str!("../templates/ptp.conflist"), &values)?;
                write_file(&layout.at("cni/conf/05-ptp.conflist"), &config)
            }
        }
    }

    /// Fails unless the engine says it is healthy.
    pub fn healthy(self, layout: &Layout) -> Result<()> {
        match self {
            Self::Cilium => {
                for part in self.parts() {
                    check_running(layout, part)?;
                }
                let mut status = command(layout.bin("cilium-dbg"), ["status", "--brief"]);
                output(status.env("CILIUM_SOCK", layout.cilium_socket())).context("Cilium's agent is not healthy").map(drop)
            }
            Self::None | Self::Other => Ok(()),
        }
    }
}

fn cilium(layout: &Layout) -> Result<()> {
    let data = layout.at("cilium");
    let lib = data.join("lib");
    if !lib.join("bpf").exists() {
        fs::create_dir_all(&lib)?;
        // The agent writes what it finds out about the kernel among the sources.
        run(command("cp", ["-r", "--"]).arg(part_folder(layout, "cilium")?.join("bpf")).arg(&lib))?;
    }
    compiler(layout)?;
    let plugin = layout.at("cni/bin/cilium-cni");
    if plugin.symlink_metadata().is_err() {
        symlink(layout.bin("cilium-cni"), &plugin).with_context(|| format!("cannot make {}", plugin.display()))?;
    }

    let common = [
        format!("--k8s-kubeconfig-path={}", pki::path(layout, "cilium.kubeconfig").display()),
        "--identity-allocation-mode=crd".into(),
        "--cluster-name=default".into(),
        "--ipam=kubernetes".into(),
    ];
    let mut operator = Daemon::new("cilium-operator", World::Node, layout.bin("cilium-operator-generic")).args(common.clone()).args([
        "--operator-api-serve-addr=127.0.0.1:9234",
        "--unmanaged-pod-watcher-interval=0",
        "--remove-cilium-node-taints=false",
    ]);
    operator.restart = true;
    with_names(operator).ensure(layout)?;

    let mut agent = Daemon::new("cilium-agent", World::Node, layout.bin("cilium-agent")).args(common).args([
        format!("--state-dir={}", data.join("state").display()),
        format!("--lib-dir={}", lib.display()),
        format!("--socket-path={}", layout.cilium_socket().display()),
        format!("--bpf-root={}", data.join("bpf").display()),
        // A tree of its own: the agent would attach programs to the machine's.
        format!("--cgroup-root={}", data.join("cgroup").display()),
        "--enable-ipv4=true".into(),
        "--enable-ipv6=true".into(),
        "--devices=eth0".into(),
        "--routing-mode=native".into(),
        format!("--ipv4-native-routing-cidr={}", layout.addresses().pod_cidr),
        format!("--ipv6-native-routing-cidr={}", layout.addresses().pod_cidr_v6),
        "--enable-ipv4-masquerade=true".into(),
        "--enable-ipv6-masquerade=true".into(),
        "--kube-proxy-replacement=false".into(),
        "--enable-l7-proxy=true".into(),
        "--disable-envoy-version-check=true".into(),
        "--enable-health-checking=false".into(),
        "--enable-endpoint-health-checking=false".into(),
        "--enable-hubble=false".into(),
        "--enable-policy=default".into(),
        "--preallocate-bpf-maps=false".into(),
    ]);
    agent.restart = true;
    let view = format!("data={}\n{}", data.display(), include_str!("../views/cilium-agent.sh"));
    agent.mounts = Some(Mounts { propagation: "slave", script: format!("{view}see") });
    agent.before = Some(format!("{view}appear"));
    with_names(agent).ensure(layout)?;

    wait_for("health of Cilium's agent", Duration::from_secs(180), Duration::from_millis(300), || Engine::Cilium.healthy(layout))?;
    let state = layout.state().display().to_string();
    let config = render(include_str!("../templates/cilium.conflist"), &[("STATE", &state)])?;
    // After the agent is healthy, and not by the agent: a pod that starts earlier would start without a policy.
    write_file(&layout.at("cni/conf/05-cilium.conflist"), &config)
}

fn with_names(daemon: Daemon) -> Daemon {
    daemon.env("K8S_NODE_NAME", NODE_NAME).env("CILIUM_K8S_NAMESPACE", "kube-system")
}

/// Cilium calls `clang` and was written for an older one.
fn compiler(layout: &Layout) -> Result<()> {
    let path = layout.bin("clang");
    write_file(&path, "#!/bin/sh\nexec clang-19 \"$@\" -Wno-shorten-64-to-32\n")?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}
