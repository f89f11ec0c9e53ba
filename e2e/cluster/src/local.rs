//! The local cluster: bringing it up, looking at it, taking it down.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::artefacts::go_part;
use crate::builder::{self, part_folder};
use crate::command::{wait_for, write_file};
use crate::control_plane as control;
use crate::engine::Engine;
use crate::forge::Place;
use crate::layout::Layout;
use crate::process::{self, all_recorded, boot_id};
use crate::progress::{Progress, seconds};
use crate::provider::Provider;
use crate::{cgroup, dns, forge, images, net, node, pki};

/// Programs of the multi-call binary.
const KUBE_PROGRAMS: [&str; 7] =
    ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet", "kubectl"];

/// What a cluster is to have.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What connects pods.
    pub engine: Engine,
    /// Whether there is a forge.
    pub forge: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { engine: Engine::default(), forge: true }
    }
}

/// What is remembered about a running cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Saved {
    /// The start of the machine in which it runs.
    pub boot: String,
    /// Its engine.
    pub engine: Engine,
    /// Whether it has a forge.
    pub forge: bool,
    /// Who provides it.
    #[serde(default)]
    pub provider: Provider,
    /// Its kubeconfig, unless that is where a cluster's kubeconfig usually is.
    #[serde(default)]
    pub kubeconfig: Option<PathBuf>,
    /// Its forge, unless that is where a local cluster's is.
    #[serde(default)]
    pub place: Option<ForgePlace>,
}

/// Where a forge is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ForgePlace {
    /// Its address for pods.
    pub url: String,
    /// Its address for this machine.
    pub local_url: String,
    /// Its IP address.
    pub ip: String,
    /// Its port.
    pub port: u16,
    /// Its administrator.
    pub admin: String,
}

impl Saved {
    /// What is remembered, if there is a cluster.
    pub fn read(layout: &Layout) -> Option<Self> {
        serde_json::from_str(&fs::read_to_string(layout.at("cluster.json")).ok()?).ok()
    }

    pub(crate) fn write(&self, layout: &Layout) -> Result<()> {
        write_file(&layout.at("cluster.json"), &serde_json::to_string_pretty(self)?)
    }
}

/// Brings the cluster of built parts up, or makes sure that it is. Ends when the node is ready, DNS answers, the engine is healthy and
/// the forge answers.
pub fn up(layout: &Layout, options: Options, progress: &Progress) -> Result<()> {
    require_root()?;
    let began = Instant::now();
    let _lock = lock(layout)?;
    let known = Saved::read(layout).filter(|saved| is_fresh(layout, saved));
    if let Some(saved) = &known
        && saved.engine != options.engine
    {
        let (has, wanted) = (saved.engine.as_str(), options.engine.as_str());
        bail!("the cluster is up with engine {has}; run `cluster down` before `cluster up --engine {wanted}`");
    }
    if known.is_none() && has_traces(layout) {
        progress.note("found what a cluster left behind that is no more: cleaning up first");
        tear_down(layout, false, progress)?;
    }
    if known.is_none() {
        // Of the cluster before: kept until now for whoever wanted to know.
        let _ = fs::remove_dir_all(layout.at("log"));
    }
    let running_forge = known.as_ref().is_some_and(|saved| saved.forge);
    let saved = Saved {
        boot: boot_id()?,
        engine: options.engine,
        forge: options.forge || running_forge,
        provider: Provider::Local,
        kubeconfig: None,
        place: None,
    };
    saved.write(layout)?;
    link_programs(layout, saved.engine)?;
    protect_links(progress);
    net::create(layout)?;
    net::create_mount_namespaces(layout)?;
    cgroup::create(layout)?;
    pki::create(layout)?;
    start(layout, &saved, progress)?;
    let verb = if known.is_some() { "is up" } else { "came up" };
    progress.note(format!("cluster {} {verb} in {}", layout.name(), seconds(began.elapsed())));
    Ok(())
}

/// Kernel parameters that systemd raises on nearly every node that users have, so that programs in pods meet them here too: who may open
/// what in folders that everybody can write to. They are the machine's, and are never lowered.
const OF_NODES: [(&str, u8); 4] = [("protected_fifos", 1), ("protected_hardlinks", 1), ("protected_regular", 2), ("protected_symlinks", 1)];

fn protect_links(progress: &Progress) {
    for (name, wanted) in OF_NODES {
        let path = format!("/proc/sys/fs/{name}");
        let is = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<u8>().ok());
        if is.is_none_or(|is| is < wanted) && fs::write(&path, wanted.to_string()).is_err() {
            progress.note(format!("fs.{name} cannot be set to {wanted}, as nodes have it: pods are tried with less"));
        }
    }
}

/// Starts what does not run, with as much side by side as the parts' needs of one another allow.
fn start(layout: &Layout, saved: &Saved, progress: &Progress) -> Result<()> {
    thread::scope(|scope| {
        let runtime = scope.spawn(|| {
            told(progress, "containerd", "runs", || {
                node::ensure_containerd(layout)?;
                for name in ["image-pause", "image-coredns"] {
                    images::load(layout, &builder::image(layout, name, progress)?.archive)?;
                }
                Ok(())
            })
        });
        let forge = scope.spawn(|| {
            if saved.forge { told(progress, "forge", "answers", || forge::ensure(layout, &Place::outside(layout))) } else { Ok(()) }
        });
        let cluster = scope.spawn(|| {
            told(progress, "control plane", "ready", || {
                control::ensure_api(layout)?;
                control::ensure_controllers(layout)?;
                once(layout, "objects", || control::apply_objects(layout))
            })?;
            join(runtime)?;
            told(progress, "kubelet and kube-proxy", "run", || node::ensure_agents(layout))?;
            told(progress, &format!("engine {}", saved.engine.as_str()), "healthy", || saved.engine.ensure(layout))?;
            told(progress, "node", "ready", || node::wait_ready(layout))?;
            told(progress, "DNS", "answers", || {
                wait_for("an answer of the cluster's DNS", Duration::from_secs(120), Duration::from_millis(100), || dns::answers(layout))
            })
        });
        let results = [join(cluster), join(forge)];
        results.into_iter().collect()
    })
}

/// Runs a step and tells about it only when it took a while: on a cluster that is up nothing needs telling.
fn told(progress: &Progress, name: &str, result: &str, run: impl FnOnce() -> Result<()>) -> Result<()> {
    let step = progress.step(name);
    let began = Instant::now();
    run().with_context(|| name.to_owned())?;
    if began.elapsed() > Duration::from_millis(700) {
        step.done(result);
    }
    Ok(())
}

fn join(thread: thread::ScopedJoinHandle<'_, Result<()>>) -> Result<()> {
    thread.join().unwrap_or_else(|_| Err(anyhow!("a part of this program ended unexpectedly")))
}

/// Runs something once in a cluster's life.
fn once(layout: &Layout, name: &str, run: impl FnOnce() -> Result<()>) -> Result<()> {
    let mark = layout.at("run").join(format!("{name}.done"));
    if mark.exists() {
        return Ok(());
    }
    run()?;
    write_file(&mark, "")
}

/// Links the programs into the state, so that a running cluster does not depend on what is built next.
fn link_programs(layout: &Layout, engine: Engine) -> Result<()> {
    fs::create_dir_all(layout.at("bin"))?;
    let kube = part_folder(layout, "kubernetes")?.join("kube");
    for program in KUBE_PROGRAMS {
        link(&kube, &layout.bin(program))?;
    }
    let mut parts = vec!["containerd", "runc"];
    parts.extend((engine == Engine::Cilium).then_some("cilium"));
    for part in parts {
        let folder = part_folder(layout, part)?;
        for program in go_part(part)?.programs {
            link(&folder.join(program.file), &layout.bin(program.file))?;
        }
    }
    Ok(())
}

pub(crate) fn link(to: &Path, link: &Path) -> Result<()> {
    if fs::read_link(link).is_ok_and(|current| current == to) {
        return Ok(());
    }
    let new = link.with_extension("new");
    let _ = fs::remove_file(&new);
    symlink(to, &new).and_then(|()| fs::rename(&new, link)).with_context(|| format!("cannot make {}", link.display()))
}

/// Takes the cluster down and leaves nothing of it but its logs, or nothing at all.
pub fn down(layout: &Layout, purge: bool, progress: &Progress) -> Result<()> {
    require_root()?;
    if !layout.state().exists() && !has_traces(layout) {
        progress.note(format!("cluster {} is not up", layout.name()));
        return Ok(());
    }
    let _lock = lock(layout)?;
    if !has_traces(layout) && !purge {
        progress.note(format!("cluster {} is not up", layout.name()));
        return Ok(());
    }
    let began = Instant::now();
    tear_down(layout, purge, progress)?;
    progress.note(format!("cluster {} is gone ({})", layout.name(), seconds(began.elapsed())));
    Ok(())
}

fn tear_down(layout: &Layout, purge: bool, progress: &Progress) -> Result<()> {
    let step = progress.step("down");
    step.doing("stopping the node");
    // From here on it is not up: should we be interrupted, the next `up` does not take what is ending for what runs.
    let _ = fs::remove_file(layout.at("cluster.json"));
    let mut first = vec!["kubelet", "kube-proxy", "cilium-agent", "cilium-operator", forge::PART];
    let known = ["containerd", "kube-apiserver", "etcd", "kube-scheduler", "kube-controller-manager"];
    // Decoys and whatever else tests have started.
    let others = all_recorded(layout);
    first.extend(others.iter().map(|(part, _)| part.as_str()).filter(|part| !known.contains(part)));
    first.sort_unstable();
    first.dedup();
    process::stop(layout, &first, Duration::from_secs(8))?;
    step.doing("stopping pods");
    cgroup::kill_pods(layout)?;
    process::stop(layout, &["containerd"], Duration::from_secs(8))?;
    step.doing("stopping the control plane");
    for parts in control::STOP_ORDER {
        process::stop(layout, parts, Duration::from_secs(15))?;
    }
    cgroup::kill_all(layout)?;
    step.doing("removing namespaces, control groups and state");
    net::remove_mount_namespaces(layout)?;
    net::remove(layout)?;
    cgroup::remove(layout)?;
    remove_state(layout, purge)?;
    drop(step);
    Ok(())
}

/// Removes the state; logs stay for a look at what happened, unless `purge`.
pub(crate) fn remove_state(layout: &Layout, purge: bool) -> Result<()> {
    let state = layout.state();
    let Ok(entries) = fs::read_dir(&state) else { return Ok(()) };
    for entry in entries {
        let path = entry?.path();
        if path.ends_with("log") && !purge {
            continue;
        }
        let removed = if path.is_dir() && !path.is_symlink() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.with_context(|| format!("cannot remove {}", path.display()))?;
    }
    if purge {
        fs::remove_dir(&state).with_context(|| format!("cannot remove {}", state.display()))?;
        if let Some(base) = state.parent() {
            // Other clusters may be there.
            let _ = fs::remove_dir(base);
        }
    }
    Ok(())
}

/// Whether the cluster that is remembered can still be the one that runs.
pub(crate) fn is_fresh(layout: &Layout, saved: &Saved) -> bool {
    boot_id().is_ok_and(|boot| boot == saved.boot) && net::is_complete(layout)
}

/// Whether anything but logs is left of a cluster, running or not.
fn has_traces(layout: &Layout) -> bool {
    let state = fs::read_dir(layout.state()).is_ok_and(|entries| entries.flatten().any(|entry| entry.file_name() != "log"));
    state || net::exists(layout) || cgroup::exists(layout)
}

/// Held while a command changes the cluster. The state folder itself is locked, so that nothing is left of the lock either; it may have
/// been removed, and made anew, while we waited.
pub(crate) fn lock(layout: &Layout) -> Result<File> {
    let path = layout.state();
    loop {
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let folder = File::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
        folder.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        let there = fs::metadata(&path).is_ok_and(|now| folder.metadata().is_ok_and(|held| held.ino() == now.ino()));
        if there {
            return Ok(folder);
        }
    }
}

fn require_root() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("a cluster needs namespaces, mounts and control groups: run this as root, or set MAYFLY_E2E_CLUSTER=kind");
    }
    Ok(())
}
