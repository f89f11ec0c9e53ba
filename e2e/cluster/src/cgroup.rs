//! Control groups of a cluster. All of its pods live below one group, which is the kubelet's `cgroupRoot`; the cluster's own
//! processes are kept in a second one in the version 2 hierarchy, so that `down` finds every last child of them.
//!
//! Three layouts exist: version 2 alone (a current distribution), version 1 with a version 2 tree beside it in `unified`
//! (hybrid), and version 1 alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::layout::Layout;
use crate::process::{Identity, kill_now};

const ROOT: &str = "/sys/fs/cgroup";
const DAEMONS: &str = "daemons";

/// Makes the groups in which the kubelet makes those of pods.
pub fn create(layout: &Layout) -> Result<()> {
    let name = layout.cgroup();
    for hierarchy in hierarchies()? {
        let group = hierarchy.join(&name);
        fs::create_dir_all(&group).with_context(|| format!("cannot make the control group {}", group.display()))?;
        if is_v2(&hierarchy) && hierarchy == Path::new(ROOT) {
            delegate(&hierarchy)?;
            delegate(&group)?;
        }
        // In version 1 a new cpuset is empty, and nothing can run in it.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let from = hierarchy.join(file);
            if !is_v2(&hierarchy) && from.exists() {
                let all = fs::read_to_string(&from)?;
                fs::write(group.join(file), all.trim()).with_context(|| format!("cannot write {file} of {}", group.display()))?;
            }
        }
    }
    if let Some(daemons) = daemons(layout) {
        fs::create_dir_all(&daemons).with_context(|| format!("cannot make {}", daemons.display()))?;
    }
    Ok(())
}

/// Counts a process, and all it will start, as one of the cluster's.
pub fn track(layout: &Layout, pid: i32) -> Result<()> {
    let Some(daemons) = daemons(layout) else { return Ok(()) };
    fs::write(daemons.join("cgroup.procs"), pid.to_string()).with_context(|| format!("cannot move process {pid} to {}", daemons.display()))
}

/// Ends those of the cluster's own processes that belong to the process group `id`. (Not to the session: containerd's shims are in its
/// session, and have to live on for it to find its containers again.)
pub fn kill_group(layout: &Layout, id: i32) -> Result<()> {
    let Some(daemons) = daemons(layout) else { return Ok(()) };
    let mut pids = Vec::new();
    collect(&daemons, None, &mut pids)?;
    let began = Instant::now();
    loop {
        pids.retain(|pid| group_of(*pid) == Some(id) && Identity::of(*pid).is_some());
        if pids.is_empty() || began.elapsed() > Duration::from_secs(10) {
            return Ok(());
        }
        for identity in pids.iter().filter_map(|pid| Identity::of(*pid)) {
            kill_now(identity);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Field 5 of `/proc/PID/stat`.
fn group_of(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(2)?.parse().ok()
}

/// Ends every process in the cluster's groups, those of pods included, and waits until they are gone.
pub fn kill_all(layout: &Layout) -> Result<()> {
    let began = Instant::now();
    loop {
        let left = members(layout)?;
        if left.is_empty() {
            return Ok(());
        }
        if began.elapsed() > Duration::from_secs(20) {
            bail!("processes {left:?} of cluster {} will not end; look at /proc/PID/stack", layout.name());
        }
        for pid in left {
            if let Some(identity) = Identity::of(pid) {
                kill_now(identity);
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Ends the processes of pods only.
pub fn kill_pods(layout: &Layout) -> Result<()> {
    let spared = daemons(layout);
    let began = Instant::now();
    loop {
        let mut left = Vec::new();
        for hierarchy in hierarchies()? {
            collect(&hierarchy.join(layout.cgroup()), spared.as_deref(), &mut left)?;
        }
        left.retain(|pid| Identity::of(*pid).is_some());
        if left.is_empty() || began.elapsed() > Duration::from_secs(10) {
            return Ok(());
        }
        for pid in left {
            if let Some(identity) = Identity::of(pid) {
                kill_now(identity);
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Removes the groups. They must be empty of processes.
pub fn remove(layout: &Layout) -> Result<()> {
    for hierarchy in hierarchies()? {
        let group = hierarchy.join(layout.cgroup());
        if group.exists() {
            remove_tree(&group).with_context(|| format!("cannot remove the control group {}", group.display()))?;
        }
    }
    Ok(())
}

/// Whether any group of the cluster is there.
pub fn exists(layout: &Layout) -> bool {
    hierarchies().is_ok_and(|all| all.iter().any(|hierarchy| hierarchy.join(layout.cgroup()).exists()))
}

fn members(layout: &Layout) -> Result<Vec<i32>> {
    let mut pids = Vec::new();
    for hierarchy in hierarchies()? {
        collect(&hierarchy.join(layout.cgroup()), None, &mut pids)?;
    }
    pids.sort_unstable();
    pids.dedup();
    pids.retain(|pid| Identity::of(*pid).is_some());
    Ok(pids)
}

fn collect(group: &Path, spared: Option<&Path>, pids: &mut Vec<i32>) -> Result<()> {
    if Some(group) == spared || !group.exists() {
        return Ok(());
    }
    // A group may vanish while we look: that is what we want.
    let procs = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    pids.extend(procs.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
    for child in subfolders(group) {
        collect(&child, spared, pids)?;
    }
    Ok(())
}

fn remove_tree(group: &Path) -> std::io::Result<()> {
    for child in subfolders(group) {
        remove_tree(&child)?;
    }
    // The kernel frees members a moment after they end.
    for _ in 0..50 {
        match fs::remove_dir(group) {
            Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => thread::sleep(Duration::from_millis(20)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            other => return other,
        }
    }
    fs::remove_dir(group)
}

fn subfolders(group: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(group) else { return Vec::new() };
    entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

/// Where the cluster's own processes are counted: the version 2 tree, which has no say over resources in a hybrid layout.
fn daemons(layout: &Layout) -> Option<PathBuf> {
    let unified = Path::new(ROOT).join("unified");
    let tree = [Path::new(ROOT), &unified].into_iter().find(|tree| is_v2(tree))?.join(layout.cgroup());
    Some(tree.join(DAEMONS))
}

fn hierarchies() -> Result<Vec<PathBuf>> {
    let root = Path::new(ROOT);
    if is_v2(root) {
        return Ok(vec![root.to_owned()]);
    }
    let entries = fs::read_dir(root).context("cannot read /sys/fs/cgroup; is it mounted?")?;
    let mut all: Vec<PathBuf> = entries
        .flatten()
        // `cpu,cpuacct` has the alias `cpu`.
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .filter(|path| path.join("cgroup.procs").exists())
        .collect();
    all.sort();
    if all.is_empty() {
        bail!("no control group hierarchy is mounted below /sys/fs/cgroup");
    }
    Ok(all)
}

fn is_v2(tree: &Path) -> bool {
    tree.join("cgroup.controllers").exists()
}

/// Lets children of a version 2 group use every controller it has itself.
fn delegate(group: &Path) -> Result<()> {
    let controllers = fs::read_to_string(group.join("cgroup.controllers"))?;
    let all: Vec<String> = controllers.split_whitespace().map(|name| format!("+{name}")).collect();
    fs::write(group.join("cgroup.subtree_control"), all.join(" "))
        .with_context(|| format!("cannot pass controllers on in {}", group.display()))
}
