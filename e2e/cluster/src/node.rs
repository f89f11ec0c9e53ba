//! The node: containerd, kubelet and kube-proxy.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::builder::PAUSE_IMAGE;
use crate::command::write_file;
use crate::layout::{CLUSTER_DOMAIN, Layout, NODE_NAME, World};
use crate::process::{Daemon, Mounts, check_running};
use crate::template::render;
use crate::{command, pki};

/// Where Debian puts CNI plugins, and which of them are used.
const CNI_PLUGINS: (&str, [&str; 3]) = ("/usr/lib/cni", ["loopback", "ptp", "host-local"]);

/// Starts containerd, if it does not run, and waits for its first answer.
pub fn ensure_containerd(layout: &Layout) -> Result<()> {
    for folder in ["containerd", "cni/bin", "cni/conf"] {
        fs::create_dir_all(layout.at(folder))?;
    }
    let (from, plugins) = CNI_PLUGINS;
    for plugin in plugins {
        let link = layout.at("cni/bin").join(plugin);
        if link.symlink_metadata().is_err() {
            symlink(format!("{from}/{plugin}"), &link).with_context(|| format!("cannot make {}", link.display()))?;
        }
    }
    let (state, socket) = (layout.state().display().to_string(), layout.containerd_socket().display().to_string());
    let config = layout.at("containerd.toml");
    let values = [("STATE", state.as_str()), ("SOCKET", &socket), ("PAUSE", PAUSE_IMAGE)];
    write_file(&config, &render(include_str!("../templates/containerd.toml"), &values)?)?;
    Daemon::new("containerd", World::Node, layout.bin("containerd"))
        .args(["--config".to_owned(), config.display().to_string()])
        // The Cilium plugin finds its agent by this; containerd hands its environment to plugins.
        .env("CILIUM_SOCK", layout.cilium_socket().display().to_string())
        .ensure(layout)?;
    crate::images::wait_for_runtime(layout)
}

/// Starts kubelet and kube-proxy, if they do not run.
pub fn ensure_agents(layout: &Layout) -> Result<()> {
    let state = layout.state().display().to_string();
    let pki_folder = layout.at("pki").display().to_string();
    let socket = layout.containerd_socket().display().to_string();
    let (node_ip, node_v6) = (&layout.addresses().node, &layout.addresses().node_v6);
    let config = layout.at("kubelet.yaml");
    write_file(
        &config,
        &render(
            include_str!("../templates/kubelet.yaml"),
            &[
                ("STATE", &state),
                ("PKI", &pki_folder),
                ("SOCKET", &socket),
                ("CGROUP", &layout.cgroup()),
                ("NODE_IP", node_ip),
                ("DNS_IP", &layout.addresses().dns),
                ("DOMAIN", CLUSTER_DOMAIN),
            ],
        )?,
    )?;
    let mut kubelet = Daemon::new("kubelet", World::Node, layout.bin("kubelet")).args([
        format!("--config={}", config.display()),
        format!("--kubeconfig={}", pki::path(layout, "kubelet.kubeconfig").display()),
        format!("--root-dir={}", layout.at("kubelet").display()),
        format!("--hostname-override={NODE_NAME}"),
        format!("--node-ip={node_ip},{node_v6}"),
    ]);
    let view = format!("data={}\n{}", layout.at("kubelet-sysctl").display(), include_str!("../views/kubelet.sh"));
    kubelet.mounts = Some(Mounts { propagation: "unchanged", script: view });
    kubelet.ensure(layout)?;

    let config = layout.at("proxy.yaml");
    let values = [("PKI", pki_folder.as_str()), ("NODE", NODE_NAME), ("NODE_IP", node_ip)];
    write_file(&config, &render(include_str!("../templates/proxy.yaml"), &values)?)?;
    Daemon::new("kube-proxy", World::Node, layout.bin("kube-proxy")).args([format!("--config={}", config.display())]).ensure(layout)?;
    Ok(())
}

/// Waits until the node is ready: its network is configured and its kubelet reports.
pub fn wait_ready(layout: &Layout) -> Result<()> {
    command::wait_for("readiness of the node", Duration::from_secs(120), Duration::from_millis(300), || {
        check_running(layout, "kubelet")?;
        check_running(layout, "containerd")?;
        crate::control_plane::node_ready(layout)
    })
}
