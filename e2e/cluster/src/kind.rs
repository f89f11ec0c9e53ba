//! The cluster from kind, with the forge as a process of this machine that listens on the address of kind's network.
//!
//! What differs from the local cluster: names of `mayfly.test` do not resolve, so the forge is known by its address; and the outside world
//! is this machine. The node is kind's own image, or with `MAYFLY_E2E_KIND_NODE=built` one from Debian's packages and Go modules, for
//! machines that reach no registry with `kindest/node`.

use anyhow::{Context, Result, bail};

use crate::builder::{kind_node, part_folder};
use crate::command::{command, output, run_logged, write_file};
use crate::engine::Engine;
use crate::forge::{self, Place};
use crate::layout::{FORGE_PORT, Layout, World};
use crate::local::{ForgePlace, Options, Saved, link, lock, remove_state};
use crate::pki;
use crate::process::{boot_id, stop};
use crate::progress::Progress;
use crate::provider::Provider;

/// The image brings its network.
const CONFIG_OF_BUILT_NODE: &str = "\
kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
networking: {disableDefaultCNI: true}
";

/// Whether the node's image is built rather than pulled: what `MAYFLY_E2E_KIND_NODE` says.
pub(crate) fn builds_node() -> Result<bool> {
    match std::env::var("MAYFLY_E2E_KIND_NODE").as_deref() {
        Ok("built") => Ok(true),
        Err(_) => Ok(false),
        Ok(other) => bail!("MAYFLY_E2E_KIND_NODE={other}: use built, or leave it unset for kind's own image"),
    }
}

pub(crate) fn up(layout: &Layout, options: Options, progress: &Progress) -> Result<()> {
    let _lock = lock(layout)?;
    std::fs::create_dir_all(layout.at("bin"))?;
    pki::create_authority(layout)?;
    link(&part_folder(layout, "kubernetes")?.join("kube"), &layout.bin("kubectl"))?;
    link(&part_folder(layout, "kind")?.join("kind"), &layout.bin("kind"))?;

    let clusters = output(&mut kind(layout, &["get", "clusters"])).context("cannot ask kind; does Docker answer?")?;
    if !clusters.lines().any(|name| name == layout.name()) {
        let step = progress.step("kind");
        let mut create = kind(layout, &["create", "cluster", "--wait", "180s"]);
        create.arg("--kubeconfig").arg(layout.kubeconfig());
        if builds_node()? {
            step.doing("loading the node's image");
            let node = kind_node(layout, progress)?;
            run_logged(command("docker", ["load", "--quiet", "--input"]).arg(&node.archive), &layout.log("kind"))?;
            let config = layout.at("kind.yaml");
            write_file(&config, CONFIG_OF_BUILT_NODE)?;
            create.args(["--image", &node.reference, "--config"]).arg(config);
        }
        step.doing("creating the cluster");
        run_logged(&mut create, &layout.log("kind")).context(
            "kind cannot create a cluster; if its node image cannot be pulled, set MAYFLY_E2E_KIND_NODE=built to have one built here",
        )?;
        step.done("created");
    }
    let mut saved = Saved {
        boot: boot_id()?,
        provider: Provider::Kind,
        // kind's own network enforces policies.
        engine: Engine::Other,
        forge: options.forge,
        kubeconfig: None,
        place: None,
    };
    if options.forge {
        let step = progress.step("forge");
        let ip = gateway()?;
        let url = format!("http://{ip}:{FORGE_PORT}");
        forge::ensure(layout, &Place { world: World::Machine, ip: ip.clone(), url: url.clone() })?;
        let admin = forge::ADMIN.to_owned();
        saved.place = Some(ForgePlace { url: url.clone(), local_url: url, ip, port: FORGE_PORT, admin });
        step.done("answers");
    }
    saved.write(layout)
}

pub(crate) fn down(layout: &Layout, progress: &Progress) -> Result<()> {
    let _lock = lock(layout)?;
    let step = progress.step("down");
    stop(layout, &[forge::PART], std::time::Duration::from_secs(8))?;
    run_logged(&mut kind(layout, &["delete", "cluster"]), &layout.log("kind"))?;
    remove_state(layout, true)?;
    step.done("kind's cluster is deleted");
    Ok(())
}

/// Puts an image into kind's node.
pub(crate) fn load(layout: &Layout, archive: &std::path::Path) -> Result<bool> {
    let mut load = kind(layout, &["load", "image-archive"]);
    run_logged(load.arg(archive), &layout.log("kind"))?;
    Ok(true)
}

/// A command in kind's node.
pub(crate) fn command_in_node(layout: &Layout) -> std::process::Command {
    command("docker", ["exec", "-i", &format!("{}-control-plane", layout.name())])
}

fn kind(layout: &Layout, verb: &[&str]) -> std::process::Command {
    let mut kind = command(layout.bin("kind"), verb);
    if verb != ["get", "clusters"] {
        kind.args(["--name", layout.name()]);
    }
    kind
}

/// This machine's IPv4 address on kind's network: pods reach the machine by it.
fn gateway() -> Result<String> {
    let format = "{{range .IPAM.Config}}{{.Gateway}} {{end}}";
    let text = output(&mut command("docker", ["network", "inspect", "kind", "-f", format]))?;
    match text.split_whitespace().find(|address| address.parse::<std::net::Ipv4Addr>().is_ok()) {
        Some(address) => Ok(address.to_owned()),
        None => bail!("Docker's network `kind` has no IPv4 gateway: {text}"),
    }
}
