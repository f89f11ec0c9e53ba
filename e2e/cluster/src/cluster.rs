//! A cluster as tests, benchmarks and the demo use it, whoever provides it.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result, bail};

use crate::command::{command, output};
use crate::engine::Engine;
use crate::forge::{self, Forge};
use crate::layout::{DEFAULT_NAME, FORGE_PORT, Layout, NODE_NAME, OUTSIDE_DOMAIN, World};
use crate::local::{ForgePlace, Options, Saved};
use crate::process::{Daemon, recorded, search_path, stop};
use crate::progress::Progress;
use crate::provider::{self, Provider};
use crate::{images, kind, net};

/// A cluster that is up.
#[derive(Clone, Debug)]
pub struct Cluster {
    layout: Layout,
    saved: Saved,
}

/// The forge of a cluster.
#[derive(Clone, Debug)]
pub struct ForgeAccess {
    /// Its address for pods, and in everything it says about itself.
    pub url: String,
    /// Its address for this machine, which does not know the cluster's names.
    pub local_url: String,
    /// Its IP address, for network policies.
    pub ip: String,
    /// Its port.
    pub port: u16,
    /// Name of its administrator.
    pub admin: String,
    /// The administrator's password.
    pub admin_password: String,
    /// The administrator's token, with all scopes.
    pub admin_token: String,
}

impl ForgeAccess {
    /// A client with the administrator's token.
    pub fn client(&self) -> Forge {
        Forge::new(&self.local_url, &self.admin_token)
    }
}

impl Cluster {
    /// The cluster that is up under the name in `MAYFLY_E2E_NAME`, or `mayfly`. Does not look whether it is healthy.
    pub fn connect() -> Result<Self> {
        Self::connect_to(&default_name())
    }

    /// The cluster of that name.
    pub fn connect_to(name: &str) -> Result<Self> {
        let layout = Layout::new(name)?;
        let saved = Saved::read(&layout).with_context(|| format!("cluster {name} is not up; run `cluster up`"))?;
        Ok(Self { layout, saved })
    }

    /// Brings the cluster up, or makes sure that it is.
    pub fn up(options: Options, progress: &Progress) -> Result<Self> {
        let name = default_name();
        provider::up(&Layout::new(&name)?, options, &[], progress)?;
        Self::connect_to(&name)
    }

    /// Takes the cluster down.
    pub fn down(self, purge: bool, progress: &Progress) -> Result<()> {
        provider::down(&self.layout, purge, progress)
    }

    /// Names and paths.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.saved.kubeconfig.clone().unwrap_or_else(|| self.layout.kubeconfig())
    }

    /// Who provides it.
    pub fn provider(&self) -> Provider {
        self.saved.provider
    }

    /// Name of a node.
    pub fn node(&self) -> Result<String> {
        if self.saved.provider == Provider::Local {
            return Ok(NODE_NAME.to_owned());
        }
        let name = output(self.kubectl().args(["get", "nodes", "-o", "jsonpath={.items[0].metadata.name}"]))?;
        if name.is_empty() {
            bail!("the cluster has no node");
        }
        Ok(name)
    }

    /// Whether NetworkPolicies mean something, where that is known.
    pub fn enforces_policies(&self) -> Option<bool> {
        match (self.saved.provider, self.saved.engine) {
            (Provider::Kind, _) | (_, Engine::Cilium) => Some(true),
            (_, Engine::None) => Some(false),
            (_, Engine::Other) => None,
        }
    }

    /// What connects pods.
    pub fn engine(&self) -> Engine {
        self.saved.engine
    }

    /// The API server's audit log: one JSON object a line, of kind `audit.k8s.io/v1 Event`, level Metadata. At 200 MB it is renamed to
    /// `audit-TIME.log` beside it. Only a local cluster writes one.
    pub fn audit_log(&self) -> PathBuf {
        self.layout.at("log/audit.log")
    }

    /// The forge's log of the requests it got: one line for each, with `"METHOD PATH PROTOCOL"` in it. A forge that was there before has
    /// none.
    pub fn forge_access_log(&self) -> PathBuf {
        self.layout.at(forge::ACCESS_LOG)
    }

    /// The forge.
    pub fn forge(&self) -> Result<ForgeAccess> {
        if !self.saved.forge {
            bail!("cluster {} was brought up without a forge; run `cluster up`", self.layout.name());
        }
        let place = self.saved.place.clone().unwrap_or_else(|| ForgePlace {
            url: format!("http://forge.{OUTSIDE_DOMAIN}:{FORGE_PORT}"),
            local_url: self.layout.addresses().forge_url(),
            ip: self.layout.addresses().outside.clone(),
            port: FORGE_PORT,
            admin: forge::ADMIN.to_owned(),
        });
        Ok(ForgeAccess {
            url: place.url,
            local_url: place.local_url,
            ip: place.ip,
            port: place.port,
            admin: place.admin,
            admin_password: forge::admin_password(&self.layout)?,
            admin_token: forge::admin_token(&self.layout)?,
        })
    }

    /// Puts an image (a file that `docker save`, `skopeo` or [`images::Recipe`] wrote) into the node. Returns whether it was not there
    /// yet. Somebody else's cluster pulls its images, and gets none.
    pub fn load_image(&self, archive: &Path) -> Result<bool> {
        match self.saved.provider {
            Provider::Local => images::load(&self.layout, archive),
            Provider::Kind => kind::load(&self.layout, archive),
            Provider::Kubeconfig => Ok(false),
        }
    }

    /// `kubectl` as the administrator.
    pub fn kubectl(&self) -> Command {
        crate::control_plane::kubectl_with(&self.layout, &self.kubeconfig())
    }

    /// A command that will run in a namespace of the cluster, with the cluster's programs on its path and its kubeconfig. In kind, the
    /// node is kind's container and the outside world is this machine.
    pub fn command_in<I, S>(&self, world: World, argv: I) -> Command
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        let layout = &self.layout;
        let mut prefixed = match (self.saved.provider, world) {
            (Provider::Local, World::Node | World::Outside) => command(
                "nsenter",
                [
                    format!("--net={}", layout.netns_file(world).display()),
                    format!("--mount={}", layout.mntns_file(world).display()),
                    "--wdns=/".to_owned(),
                    "--".to_owned(),
                ],
            ),
            (Provider::Kind, World::Node) => kind::command_in_node(layout),
            _ => command("env", ["--"]),
        };
        prefixed.args(argv).env("PATH", search_path(layout)).env("KUBECONFIG", self.kubeconfig());
        prefixed
    }

    /// Runs a command in a namespace of the cluster, with this program's standard input and outputs.
    pub fn run_in<I, S>(&self, world: World, argv: I) -> Result<ExitStatus>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        self.command_in(world, argv).status().context("cannot start nsenter; is util-linux installed?")
    }

    /// Starts a program in a namespace of the cluster under a name, unless it runs: a decoy, a cloud. It writes to `log/NAME.log`,
    /// outlives this program and ends with the cluster. One of that name that runs with other arguments is stopped first. Where the
    /// cluster is not of this machine, its outside world is this machine, and nothing is started on its nodes.
    pub fn start(&self, world: World, name: &str, argv: &[&str]) -> Result<()> {
        self.start_with(world, name, argv, &[])
    }

    /// The same with variables, the place for secrets: arguments are for everybody to see. One that runs keeps those it was started with.
    pub fn start_with(&self, world: World, name: &str, argv: &[&str], variables: &[(&str, &str)]) -> Result<()> {
        let (program, args) = argv.split_first().context("nothing to start")?;
        let world = match (self.saved.provider, world) {
            (Provider::Local, world) => world,
            (_, World::Node) => bail!("programs are started on the node of a local cluster only"),
            (_, World::Outside | World::Machine) => World::Machine,
        };
        let daemon = Daemon::new(name, world, PathBuf::from(program)).args(args.iter().copied());
        let daemon = variables.iter().fold(daemon, |daemon, (name, value)| daemon.env(name, *value));
        if daemon.differs(&self.layout) {
            self.stop(name)?;
        }
        daemon.ensure(&self.layout).map(drop)
    }

    /// Whether what [`start`](Self::start) started runs.
    pub fn runs(&self, name: &str) -> bool {
        recorded(&self.layout, name).is_some_and(|identity| identity.alive())
    }

    /// Stops what [`start`](Self::start) started.
    pub fn stop(&self, name: &str) -> Result<()> {
        if recorded(&self.layout, name).is_none() {
            return Ok(());
        }
        stop(&self.layout, &[name], std::time::Duration::from_secs(5))
    }

    /// Adds an address that programs of the outside world or of the node can listen on. 169.254.169.254 is in the outside world
    /// already. An address of the node takes precedence over one outside, to which pods are routed.
    pub fn add_address(&self, world: World, address: IpAddr) -> Result<()> {
        net::add_address(&self.layout, world, address)
    }
}

/// The cluster's name: `MAYFLY_E2E_NAME`, or [`DEFAULT_NAME`].
pub fn default_name() -> String {
    std::env::var("MAYFLY_E2E_NAME").unwrap_or_else(|_| DEFAULT_NAME.to_owned())
}
