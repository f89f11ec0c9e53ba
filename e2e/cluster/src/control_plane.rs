//! etcd, API server, controller manager and scheduler: processes in the node's namespace.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::command::{command, feed, output, run, wait_for, write_file};
use crate::layout::{CLUSTER_DOMAIN, Layout, METADATA_IP, NODE_NAME, OUTSIDE_DOMAIN, World};
use crate::pki;
use crate::process::{Daemon, check_running};
use crate::template::render;

/// The parts in the order in which they may be stopped: the API server hangs for ever when etcd goes first.
pub const STOP_ORDER: [&[&str]; 3] = [&["kube-scheduler", "kube-controller-manager"], &["kube-apiserver"], &["etcd"]];

/// Starts etcd and the API server, if they do not run, and waits until the API server is ready.
pub fn ensure_api(layout: &Layout) -> Result<()> {
    etcd(layout).ensure(layout)?;
    write_file(&layout.at("audit-policy.yaml"), include_str!("../templates/audit-policy.yaml"))?;
    api_server(layout).ensure(layout)?;
    wait_for("readiness of the API server", Duration::from_secs(180), Duration::from_millis(200), || {
        check_running(layout, "etcd")?;
        check_running(layout, "kube-apiserver")?;
        ready(layout, &layout.kubeconfig())
    })
}

/// Starts what reconciles, if it does not run. The API server must be ready.
pub fn ensure_controllers(layout: &Layout) -> Result<()> {
    controller_manager(layout).ensure(layout)?;
    scheduler(layout).ensure(layout)?;
    Ok(())
}

/// Fails unless the API server says it is ready.
pub fn ready(layout: &Layout, kubeconfig: &Path) -> Result<()> {
    run(kubectl_with(layout, kubeconfig).args(["get", "--raw=/readyz", "--request-timeout=5s"]))
}

/// Creates the objects every cluster has: DNS, and the policy engine's rights.
pub fn apply_objects(layout: &Layout) -> Result<()> {
    let objects = render(
        include_str!("../templates/cluster.yaml"),
        &[
            ("COREDNS", crate::builder::COREDNS_IMAGE),
            ("DNS_IP", &layout.addresses().dns),
            ("DOMAIN", CLUSTER_DOMAIN),
            ("OUTSIDE_DOMAIN", OUTSIDE_DOMAIN),
            ("OUTSIDE_IP", &layout.addresses().outside),
            ("METADATA_IP", METADATA_IP),
        ],
    )?;
    let mut apply = kubectl(layout);
    apply.args(["apply", "--server-side", "--force-conflicts", "--field-manager=mayfly-cluster", "-f", "-"]);
    feed(&mut apply, &objects).context("cannot create the cluster's own objects").map(drop)
}

/// Fails unless the node is ready.
pub fn node_ready(layout: &Layout) -> Result<()> {
    let jsonpath = "jsonpath={.status.conditions[?(@.type==\"Ready\")].status} {.status.conditions[?(@.type==\"Ready\")].message}";
    let told = output(kubectl(layout).args(["get", "node", NODE_NAME, "--request-timeout=5s", "-o", jsonpath]))?;
    anyhow::ensure!(told.starts_with("True "), "node {NODE_NAME} is not ready: {told}");
    Ok(())
}

/// `kubectl` as the administrator.
pub fn kubectl(layout: &Layout) -> std::process::Command {
    kubectl_with(layout, &layout.kubeconfig())
}

/// `kubectl` with a kubeconfig.
pub fn kubectl_with(layout: &Layout, kubeconfig: &Path) -> std::process::Command {
    let mut kubectl = command(layout.bin("kubectl"), ["--kubeconfig"]);
    kubectl.arg(kubeconfig);
    // A proxy setting of the caller must not come between.
    for name in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        kubectl.env_remove(name);
    }
    kubectl
}

fn etcd(layout: &Layout) -> Daemon {
    Daemon::new("etcd", World::Node, layout.bin("etcd")).args([
        format!("--data-dir={}", layout.at("etcd").display()),
        "--listen-client-urls=http://127.0.0.1:2379".into(),
        "--advertise-client-urls=http://127.0.0.1:2379".into(),
        "--listen-peer-urls=http://127.0.0.1:2380".into(),
        "--listen-metrics-urls=http://127.0.0.1:2381".into(),
        "--auto-compaction-retention=10m".into(),
        "--log-level=warn".into(),
        // Nobody needs a test cluster after a power cut.
        "--unsafe-no-fsync".into(),
    ])
}

fn api_server(layout: &Layout) -> Daemon {
    let pki = |file: &str| pki::path(layout, file).display().to_string();
    let node = &layout.addresses().node;
    let issuer = format!("https://kubernetes.default.svc.{CLUSTER_DOMAIN}");
    Daemon::new("kube-apiserver", World::Node, layout.bin("kube-apiserver")).args([
        "--etcd-servers=http://127.0.0.1:2379".to_owned(),
        format!("--bind-address={node}"),
        format!("--advertise-address={node}"),
        "--secure-port=6443".into(),
        format!("--tls-cert-file={}", pki("apiserver.crt")),
        format!("--tls-private-key-file={}", pki("apiserver.key")),
        format!("--client-ca-file={}", pki("ca.crt")),
        "--authorization-mode=Node,RBAC".into(),
        "--enable-admission-plugins=NodeRestriction".into(),
        "--allow-privileged=true".into(),
        format!("--service-cluster-ip-range={}", services(layout)),
        format!("--service-account-issuer={issuer}"),
        format!("--service-account-jwks-uri={issuer}/openid/v1/jwks"),
        format!("--service-account-key-file={}", pki("service-accounts.pub")),
        format!("--service-account-signing-key-file={}", pki("service-accounts.key")),
        // Node names are in no DNS.
        "--kubelet-preferred-address-types=InternalIP".into(),
        format!("--kubelet-certificate-authority={}", pki("ca.crt")),
        format!("--kubelet-client-certificate={}", pki("apiserver-kubelet-client.crt")),
        format!("--kubelet-client-key={}", pki("apiserver-kubelet-client.key")),
        format!("--audit-policy-file={}", layout.at("audit-policy.yaml").display()),
        format!("--audit-log-path={}", layout.at("log/audit.log").display()),
        "--audit-log-maxsize=200".into(),
        "--audit-log-maxbackup=4".into(),
        "--v=2".into(),
    ])
}

/// Both ranges. Services are IPv4 unless they ask for more.
fn services(layout: &Layout) -> String {
    format!("{},{}", layout.addresses().service_cidr, layout.addresses().service_cidr_v6)
}

fn controller_manager(layout: &Layout) -> Daemon {
    let pki = |file: &str| pki::path(layout, file).display().to_string();
    Daemon::new("kube-controller-manager", World::Node, layout.bin("kube-controller-manager")).args([
        format!("--kubeconfig={}", pki("controller-manager.kubeconfig")),
        "--bind-address=127.0.0.1".into(),
        "--leader-elect=false".into(),
        "--use-service-account-credentials=true".into(),
        format!("--service-account-private-key-file={}", pki("service-accounts.key")),
        format!("--root-ca-file={}", pki("ca.crt")),
        format!("--cluster-signing-cert-file={}", pki("ca.crt")),
        format!("--cluster-signing-key-file={}", pki("ca.key")),
        "--allocate-node-cidrs=true".into(),
        format!("--cluster-cidr={},{}", layout.addresses().pod_cidr, layout.addresses().pod_cidr_v6),
        // Room for the kubelet's 250 pods and for addresses of those just gone.
        "--node-cidr-mask-size-ipv4=22".into(),
        "--node-cidr-mask-size-ipv6=64".into(),
        format!("--service-cluster-ip-range={}", services(layout)),
        // Unused, and made where the default says if it is not there.
        format!("--flex-volume-plugin-dir={}", layout.at("kubelet/volume-plugins").display()),
        "--kube-api-qps=200".into(),
        "--kube-api-burst=400".into(),
        "--v=2".into(),
    ])
}

fn scheduler(layout: &Layout) -> Daemon {
    Daemon::new("kube-scheduler", World::Node, layout.bin("kube-scheduler")).args([
        format!("--kubeconfig={}", pki::path(layout, "scheduler.kubeconfig").display()),
        "--bind-address=127.0.0.1".into(),
        "--leader-elect=false".into(),
        "--kube-api-qps=200".into(),
        "--kube-api-burst=400".into(),
        "--v=2".into(),
    ])
}
