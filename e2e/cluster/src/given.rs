//! Somebody else's cluster: `KUBECONFIG` leads to it, `MAYFLY_FORGE_*` to its forge (the variables that `cluster env` prints). Images
//! must be where the cluster can pull them; nothing is loaded.

use std::fs;
use std::net::ToSocketAddrs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::builder::part_folder;
use crate::command::{run, write_private};
use crate::control_plane::kubectl_with;
use crate::engine::Engine;
use crate::forge::{self, Forge};
use crate::layout::Layout;
use crate::local::{ForgePlace, Saved, link, lock, remove_state};
use crate::pki;
use crate::process::boot_id;
use crate::progress::Progress;
use crate::provider::Provider;

pub(crate) fn up(layout: &Layout, progress: &Progress) -> Result<()> {
    let _lock = lock(layout)?;
    let kubeconfig =
        PathBuf::from(variable("KUBECONFIG")?).canonicalize().context("KUBECONFIG must name one file for MAYFLY_E2E_CLUSTER=kubeconfig")?;
    fs::create_dir_all(layout.at("bin"))?;
    pki::create_authority(layout)?;
    link(&part_folder(layout, "kubernetes")?.join("kube"), &layout.bin("kubectl"))?;
    run(kubectl_with(layout, &kubeconfig).args(["get", "--raw=/readyz", "--request-timeout=15s"]))
        .with_context(|| format!("the cluster of {} is not ready", kubeconfig.display()))?;

    let place = forge_place()?;
    if let Some(place) = &place {
        for (file, variable) in [(forge::TOKEN_FILE, "MAYFLY_FORGE_TOKEN_FILE"), (forge::PASSWORD_FILE, "MAYFLY_FORGE_ADMIN_PASSWORD_FILE")]
        {
            let path = self::variable(variable)?;
            let secret = fs::read_to_string(&path).with_context(|| format!("cannot read {variable}={path}"))?;
            write_private(&layout.at(file), secret.trim())?;
        }
        Forge::new(&place.local_url, "").healthy()?;
    }
    let saved = Saved {
        boot: boot_id()?,
        provider: Provider::Kubeconfig,
        engine: Engine::Other,
        forge: place.is_some(),
        kubeconfig: Some(kubeconfig),
        place,
    };
    saved.write(layout)?;
    progress.note(format!("cluster {} is somebody else's, and ready", layout.name()));
    Ok(())
}

pub(crate) fn down(layout: &Layout, progress: &Progress) -> Result<()> {
    let _lock = lock(layout)?;
    remove_state(layout, true)?;
    progress.note(format!("cluster {} is forgotten; it was somebody else's and goes on", layout.name()));
    Ok(())
}

/// The forge, if `MAYFLY_FORGE_URL` names one.
fn forge_place() -> Result<Option<ForgePlace>> {
    let Ok(url) = std::env::var("MAYFLY_FORGE_URL") else { return Ok(None) };
    let local_url = std::env::var("MAYFLY_FORGE_LOCAL_URL").unwrap_or_else(|_| url.clone());
    let (host, port) = host_and_port(&local_url).with_context(|| format!("{local_url} is not of the form http://HOST[:PORT]"))?;
    let mut addresses = (host.as_str(), port).to_socket_addrs().with_context(|| format!("{host} does not resolve"))?;
    let ip = addresses.next().with_context(|| format!("{host} has no address"))?.ip().to_string();
    let admin = std::env::var("MAYFLY_FORGE_ADMIN").unwrap_or_else(|_| forge::ADMIN.to_owned());
    Ok(Some(ForgePlace { url, local_url, ip, port, admin }))
}

fn host_and_port(url: &str) -> Option<(String, u16)> {
    let rest = url.strip_prefix("http://")?;
    let authority = rest.split('/').next()?;
    match authority.rsplit_once(':') {
        Some((host, port)) => Some((host.to_owned(), port.parse().ok()?)),
        None => Some((authority.to_owned(), 80)).filter(|(host, _)| !host.is_empty()),
    }
}

fn variable(name: &str) -> Result<String> {
    std::env::var(name).with_context(|| format!("MAYFLY_E2E_CLUSTER=kubeconfig needs {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_forges() {
        assert_eq!(host_and_port("http://a.b:3000/"), Some(("a.b".into(), 3000)));
        assert_eq!(host_and_port("http://a.b"), Some(("a.b".into(), 80)));
        for bad in ["a.b:3000", "http://", "http://a:b", "https://a"] {
            assert_eq!(host_and_port(bad), None, "{bad}");
        }
    }
}
