//! Who provides the cluster: this machine itself, kind, or somebody else. `MAYFLY_E2E_CLUSTER` chooses.

use std::path::Path;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::builder::{self, Selection};
use crate::command::{command, succeeds};
use crate::layout::Layout;
use crate::local::{self, Options, Saved};
use crate::progress::Progress;
use crate::{Engine, given, kind};

/// A way to get a cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    /// Processes of this machine. Needs root, and nothing else.
    #[default]
    Local,
    /// kind. Needs a Docker daemon.
    Kind,
    /// Whatever `KUBECONFIG` leads to. The cluster must be able to pull the images, and the forge must be there.
    Kubeconfig,
}

impl Provider {
    /// What `MAYFLY_E2E_CLUSTER` says; without it, kind where a Docker daemon answers, and this machine elsewhere.
    pub fn chosen() -> Result<Self> {
        match std::env::var("MAYFLY_E2E_CLUSTER").as_deref() {
            Ok("local") => Ok(Self::Local),
            Ok("kind") => Ok(Self::Kind),
            Ok("kubeconfig") => Ok(Self::Kubeconfig),
            Ok(other) => bail!("MAYFLY_E2E_CLUSTER={other}: use local, kind or kubeconfig"),
            Err(_) if docker_answers() => Ok(Self::Kind),
            Err(_) => Ok(Self::Local),
        }
    }

    /// `local`, `kind` or `kubeconfig`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Kind => "kind",
            Self::Kubeconfig => "kubeconfig",
        }
    }
}

/// Brings the cluster up, or makes sure that it is. What is in `also` is built with the cluster's parts: on a fresh machine the
/// downloads of one overlap with the compilation of another.
pub fn up(layout: &Layout, options: Options, also: &[String], progress: &Progress) -> Result<()> {
    let chosen = Provider::chosen()?;
    if let Some(saved) = Saved::read(layout)
        && saved.provider != chosen
        // A local cluster ends with the machine.
        && (saved.provider != Provider::Local || local::is_fresh(layout, &saved))
    {
        let (has, wanted) = (saved.provider.as_str(), chosen.as_str());
        bail!(
            "cluster {} is up and provided by {has}; set MAYFLY_E2E_CLUSTER={has}, or run `cluster down` to have it by {wanted}",
            layout.name()
        );
    }
    let needed = match chosen {
        Provider::Local => Selection::for_cluster(options.engine == Engine::Cilium, options.forge),
        Provider::Kind => Selection::for_kind(options.forge, kind::builds_node()?),
        Provider::Kubeconfig => Selection::for_given(),
    };
    builder::build(layout, &needed.and(also)?, progress)?;
    match chosen {
        Provider::Local => local::up(layout, options, progress),
        Provider::Kind => kind::up(layout, options, progress),
        Provider::Kubeconfig => given::up(layout, progress),
    }
}

/// Takes the cluster down. Somebody else's cluster is only forgotten.
pub fn down(layout: &Layout, purge: bool, progress: &Progress) -> Result<()> {
    match Saved::read(layout).map(|saved| saved.provider) {
        Some(Provider::Kind) => kind::down(layout, progress),
        Some(Provider::Kubeconfig) => given::down(layout, progress),
        Some(Provider::Local) | None => local::down(layout, purge, progress),
    }
}

fn docker_answers() -> bool {
    let socket = std::env::var_os("DOCKER_HOST").is_some() || Path::new("/var/run/docker.sock").exists();
    socket && succeeds(&mut command("docker", ["version"]))
}
