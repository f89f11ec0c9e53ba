//! The network: the node and the outside world in namespaces of their own, and this machine beside them.
//!
//! ```text
//!   this machine                    outside world                       node
//!   NAME-host 172.30.1.1/30 ------- host0 172.30.1.2
//!                                   eth0  172.30.0.254/24 ------------- eth0 172.30.0.1/24
//!                                   lo    169.254.169.254                pods 10.244.0.0/16, Services 10.96.0.0/16
//! ```
//!
//! Node, outside world, pods and Services have IPv6 addresses beside these (`fd6d:6179:666c::/48`); this machine has none of them.
//!
//! This machine has routes to node, pods and Services through the outside world. The other way round only answers pass, and
//! nothing is ever translated towards the machine's own network: a pod cannot reach it.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::command::{command, feed, output, run, succeeds, wait_for, write_file};
use crate::layout::{Addresses, CLUSTER_DOMAIN, Layout, METADATA_IP, World};

/// Makes what is missing of namespaces, links and routes.
pub fn create(layout: &Layout) -> Result<()> {
    if is_complete(layout) {
        return Ok(());
    }
    remove(layout)?;
    refuse_conflicts(layout)?;
    let (node, outside, host) = (layout.netns(World::Node), layout.netns(World::Outside), layout.host_link());
    let Addresses { node: node_ip, outside: outside_ip, node_cidr, host: host_ip, host_link, pod_cidr, service_cidr, .. } =
        layout.addresses();
    let Addresses { node_v6, outside_v6, pod_cidr_v6, service_cidr_v6, .. } = layout.addresses();
    for netns in [&node, &outside] {
        run(&mut command("ip", ["netns", "add", netns]))
            .with_context(|| format!("cannot make the network namespace {netns}; this needs root and a kernel with network namespaces"))?;
    }
    ip(&[
        &format!("link add eth0 netns {node} type veth peer name eth0 netns {outside}"),
        &format!("link add {host} type veth peer name host0 netns {outside}"),
    ])?;
    ip_in(
        &node,
        &[
            "link set lo up",
            &format!("addr add {node_ip}/24 dev eth0"),
            &format!("addr add {node_v6}/64 dev eth0 nodad"),
            "link set eth0 up",
            &format!("route add default via {outside_ip}"),
            &format!("route add ::/0 via {outside_v6}"),
        ],
    )
    .context("cannot give the node its addresses; this needs a kernel with IPv6 as well")?;
    ip_in(
        &outside,
        &[
            "link set lo up",
            &format!("addr add {METADATA_IP}/32 dev lo"),
            &format!("addr add {outside_ip}/24 dev eth0"),
            &format!("addr add {outside_v6}/64 dev eth0 nodad"),
            "link set eth0 up",
            &format!("addr add {host_link}/30 dev host0"),
            "link set host0 up",
            &format!("route add {pod_cidr} via {node_ip}"),
            &format!("route add {service_cidr} via {node_ip}"),
            &format!("route add {pod_cidr_v6} via {node_v6}"),
            &format!("route add {service_cidr_v6} via {node_v6}"),
        ],
    )?;
    ip(&[
        &format!("addr add {host_ip}/30 dev {host}"),
        &format!("link set {host} up"),
        &format!("route add {node_cidr} via {host_link}"),
        &format!("route add {pod_cidr} via {host_link}"),
        &format!("route add {service_cidr} via {host_link}"),
    ])?;
    for netns in [&node, &outside] {
        run(&mut command("ip", ["netns", "exec", netns, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"]))?;
    }
    // Answers may pass to this machine, questions may not.
    let firewall = "table inet mayfly {
        chain forward {
            type filter hook forward priority filter; policy accept;
            oifname \"host0\" ct state established,related accept
            oifname \"host0\" drop
        }
    }";
    feed(&mut command("ip", ["netns", "exec", &outside, "nft", "-f", "-"]), firewall)?;
    Ok(())
}

/// Makes the mount namespaces of node and outside world, which keep what the node mounts away from this machine.
pub fn create_mount_namespaces(layout: &Layout) -> Result<()> {
    let folder = layout.at("ns");
    let resolv = layout.at("resolv.conf");
    write_file(&resolv, &format!("nameserver {}\nsearch {CLUSTER_DOMAIN}\noptions ndots:1\n", layout.addresses().dns))?;
    if !is_mountpoint(&folder)? {
        std::fs::create_dir_all(&folder)?;
        run(&mut command("mount", ["--bind".as_ref(), folder.as_os_str(), folder.as_os_str()]))?;
        run(&mut command("mount", ["--make-private".as_ref(), folder.as_os_str()]))?;
    }
    lend_folders(layout)?;
    for world in [World::Node, World::Outside] {
        let file = layout.mntns_file(world);
        if is_mountpoint(&file)? {
            continue;
        }
        write_file(&file, "")?;
        let script = match world {
            World::Node => NODE_MOUNTS,
            World::Outside | World::Machine => OUTSIDE_MOUNTS,
        };
        run(command("unshare", [format!("--mount={}", file.display())])
            .args(["--propagation", "slave", "sh", "-euc", script])
            .env("RESOLV", &resolv))
        .with_context(|| format!("cannot make the mount namespace of the {}", world.as_str()))?;
    }
    Ok(())
}

/// Folders that node programs insist on. They have to exist for a mount to lie over them.
const LENT: [&str; 2] = ["/var/lib/cni", "/var/lib/kubelet"];

/// Makes those folders where this machine has none, and remembers which.
fn lend_folders(layout: &Layout) -> Result<()> {
    let mut made = Vec::new();
    for folder in LENT {
        if !Path::new(folder).exists() {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot make {folder}"))?;
            made.push(folder);
        }
    }
    if !made.is_empty() {
        write_file(&layout.at("lent-folders"), &made.join("\n"))?;
    }
    Ok(())
}

/// Takes those folders away again, if they are as empty as they were.
fn return_folders(layout: &Layout) {
    let made = std::fs::read_to_string(layout.at("lent-folders")).unwrap_or_default();
    for folder in made.lines().filter(|line| LENT.contains(line)) {
        // Somebody else may use it by now.
        let _ = std::fs::remove_dir(folder);
    }
}

/// Container runtimes keep sockets, network namespaces and locks in /run, plugins and the kubelet have folders in /var/lib, and the
/// kubelet links logs into /var/log: in memory here, so that none of it survives the node. Shared among the node's processes, because kubelet and containerd mount for one
/// another.
const NODE_MOUNTS: &str = r#"
mount --make-rshared /
resolv=$(readlink -m /etc/resolv.conf)
for folder in /run /var/log /var/lib/cni /var/lib/kubelet; do mount -t tmpfs -o mode=755 tmpfs $folder; done
mkdir -p /run/lock /run/netns
case $resolv in /run/*) mkdir -p "$(dirname "$resolv")"; : > "$resolv";; esac
mount --bind "$RESOLV" /etc/resolv.conf
"#;

/// Names of the cluster resolve in the outside world too, and no others.
const OUTSIDE_MOUNTS: &str = r#"
mount --make-rprivate /
resolv=$(readlink -m /etc/resolv.conf)
case $resolv in /run/*) mount -t tmpfs -o mode=755 tmpfs /run; mkdir -p "$(dirname "$resolv")"; : > "$resolv";; esac
mount --bind "$RESOLV" /etc/resolv.conf
"#;

/// Adds an address that the outside world or the node answers for, e.g. a decoy's. Cilium takes one of the node for the node itself.
pub fn add_address(layout: &Layout, world: World, address: IpAddr) -> Result<()> {
    let mut add = command("ip", ["-n", &layout.netns(world), "addr", "replace"]);
    match address {
        IpAddr::V4(_) => add.arg(format!("{address}/32")).args(["dev", "lo"]),
        // Whether another has it is not asked, so that it can be listened on at once.
        IpAddr::V6(_) => add.arg(format!("{address}/128")).args(["dev", "lo", "nodad"]),
    };
    run(&mut add)
}

/// Removes mount and network namespaces, and with them every link, route and rule. Nothing may run in them any more.
pub fn remove(layout: &Layout) -> Result<()> {
    for netns in [layout.netns(World::Node), layout.netns(World::Outside)] {
        if Path::new("/run/netns").join(&netns).exists() {
            run(&mut command("ip", ["netns", "del", &netns]))?;
        }
    }
    // The kernel takes a namespace apart, and our end of the link with it, a moment after its last user is gone.
    let host = layout.host_link();
    let device = Path::new("/sys/class/net").join(&host);
    if device.exists() && !succeeds(&mut command("ip", ["link", "del", &host])) {
        wait_for("removal of the link to the cluster", Duration::from_secs(10), Duration::from_millis(50), || {
            if device.exists() { bail!("{host} is still there") } else { Ok(()) }
        })?;
    }
    remove_empty_netns_folder()
}

/// Takes away the mount namespaces' files.
pub fn remove_mount_namespaces(layout: &Layout) -> Result<()> {
    let below = layout.state();
    let mut mounts: Vec<String> = mountpoints()?.into_iter().filter(|mount| Path::new(mount).starts_with(&below)).collect();
    // Deepest first.
    mounts.sort_by_key(|mount| std::cmp::Reverse(mount.len()));
    for mount in mounts {
        run(&mut command("umount", [&mount])).with_context(|| format!("{mount} is in use; see `fuser -vm {mount}`"))?;
    }
    return_folders(layout);
    Ok(())
}

/// Whether namespaces and links are as [`create`] makes them.
pub fn is_complete(layout: &Layout) -> bool {
    Path::new("/sys/class/net").join(layout.host_link()).exists()
        && [World::Node, World::Outside].into_iter().all(|world| {
            layout.netns_file(world).exists() && succeeds(&mut command("ip", ["-n", &layout.netns(world), "link", "show", "eth0"]))
        })
}

/// Whether anything of the network is there.
pub fn exists(layout: &Layout) -> bool {
    Path::new("/sys/class/net").join(layout.host_link()).exists()
        || [World::Node, World::Outside].into_iter().any(|world| layout.netns_file(world).exists())
}

/// Two clusters, or a cluster and a VPN, may want the same addresses: say so instead of taking them over.
fn refuse_conflicts(layout: &Layout) -> Result<()> {
    let Addresses { node_cidr, pod_cidr, service_cidr, .. } = layout.addresses();
    for cidr in [node_cidr, pod_cidr, service_cidr] {
        let taken = output(&mut command("ip", ["-4", "route", "show", cidr.as_str()]))?;
        let taken = taken.trim();
        if !taken.is_empty() && !taken.contains(&format!("dev {}", layout.host_link())) {
            bail!(
                "this machine already routes {cidr} elsewhere ({taken}): stop what does, or give the cluster another name, which \
                 gives it other addresses"
            );
        }
    }
    Ok(())
}

/// `ip netns` leaves its folder mounted on itself.
fn remove_empty_netns_folder() -> Result<()> {
    let folder = Path::new("/run/netns");
    let empty = std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none());
    if empty {
        if is_mountpoint(folder)? {
            run(&mut command("umount", ["/run/netns"]))?;
        }
        // Somebody may just have made a namespace.
        let _ = std::fs::remove_dir(folder);
    }
    Ok(())
}

fn is_mountpoint(path: &Path) -> Result<bool> {
    Ok(mountpoints()?.iter().any(|mount| Path::new(mount) == path))
}

fn mountpoints() -> Result<Vec<String>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    Ok(table.lines().filter_map(|line| line.split(' ').nth(4)).map(str::to_owned).collect())
}

fn ip(batch: &[&str]) -> Result<()> {
    feed(&mut command("ip", ["-batch", "-"]), &batch.join("\n")).map(drop)
}

fn ip_in(netns: &str, batch: &[&str]) -> Result<()> {
    feed(&mut command("ip", ["-n", netns, "-batch", "-"]), &batch.join("\n")).map(drop)
}
