//! What the cluster takes from Debian.

use anyhow::{Context, Result, bail};

use crate::command::{command, output, run_logged, succeeds};
use crate::layout::Layout;
use crate::progress::Progress;

/// Package and the reason it is there.
const PACKAGES: &[(&str, &str)] = &[
    ("bpftool", "Cilium's agent asks the kernel for its features with it"),
    ("ca-certificates", "Go modules and Debian packages come over TLS"),
    ("clang-19", "Cilium's agent compiles its BPF programs with it"),
    ("containernetworking-plugins", "loopback for every pod; ptp and host-local without an engine"),
    ("gcc", "runc and Gitea's SQLite are C"),
    ("git", "Gitea runs it"),
    ("iproute2", "namespaces, links, routes"),
    ("ipset", "Cilium"),
    ("iptables", "Cilium"),
    ("kmod", "kube-proxy and Cilium look for modprobe"),
    ("libc6-dev", "runc and Gitea's SQLite are C"),
    ("libseccomp-dev", "runc"),
    ("mmdebstrap", "Debian images without a daemon"),
    ("mount", "mount"),
    ("nftables", "kube-proxy and the wall between the cluster and this machine"),
    ("pkg-config", "runc finds libseccomp with it"),
    ("procps", "sysctl"),
    ("util-linux", "nsenter, unshare, setpriv, setsid"),
];

/// Installs what is missing. Does nothing, and needs no right to, when nothing is.
pub fn install(layout: &Layout, progress: &Progress) -> Result<()> {
    let missing = missing()?;
    if missing.is_empty() {
        return Ok(());
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("Debian packages are missing: run `apt-get install --no-install-recommends {}` as root", missing.join(" "));
    }
    let step = progress.step("packages");
    step.doing(format!("apt-get install {}", missing.join(" ")));
    let log = layout.cache().join("log/packages.log");
    let install = || {
        // Another apt or dpkg may hold the lock for a while.
        let mut apt = command("apt-get", ["install", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=600"]);
        run_logged(apt.args(&missing).env("DEBIAN_FRONTEND", "noninteractive"), &log)
    };
    if !known(&missing) || install().is_err() {
        step.doing("apt-get update");
        run_logged(&mut command("apt-get", ["update", "-o", "DPkg::Lock::Timeout=600"]), &log)?;
        step.doing(format!("apt-get install {}", missing.join(" ")));
        install()?;
    }
    step.done(format!("installed {}", missing.join(" ")));
    Ok(())
}

/// Packages that are not installed.
fn missing() -> Result<Vec<&'static str>> {
    let names = PACKAGES.iter().map(|(name, _)| *name);
    // Ends with 1 when a name is unknown to dpkg, which is one of the answers we ask for.
    let listed = command("dpkg-query", ["-W", "-f", "${Package} ${db:Status-Status}\n"])
        .args(names.clone())
        .output()
        .context("the cluster takes its tools from Debian packages, and this machine has no dpkg-query")?;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    Ok(names.filter(|name| !listed.lines().any(|line| line == format!("{name} installed"))).collect())
}

/// Whether apt's lists name all of them.
fn known(names: &[&str]) -> bool {
    names.iter().all(|name| {
        succeeds(&mut command("apt-cache", ["show", name]))
            && output(&mut command("apt-cache", ["policy", name])).is_ok_and(|text| !text.contains("Candidate: (none)"))
    })
}
