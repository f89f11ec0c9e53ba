//! The command line and the environment become one checked [`Settings`]; nothing else reads them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use ipnet::IpNet;
use jiff::Timestamp;
use kube::CustomResourceExt;
use mayfly_crds::{CredentialBinding, RunnerPool};

use crate::audit::{self as records, Filter, Format, Shown, Verification};
use crate::credentials::Configured;
use crate::isolation::{ClusterFacts, Dialect, cluster_wide_denial, nameservers};
use crate::runner::{BrokerAccess, PodSettings};

mod audit;
mod broker;

use audit::AuditArgs;
pub(crate) use audit::AuditTo;
pub(crate) use broker::{BrokerArgs, BrokerSettings};
use broker::{read_github_apps, read_issuers};

/// Where a pod is told whom to ask for names.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Runs every CI job in a locked-down Kubernetes pod of its own.
#[derive(Parser)]
#[command(name = "mayfly", version, about, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Watch RunnerPools and run their jobs.
    Controller(Box<ControllerArgs>),
    /// Exchange the OIDC tokens of jobs for short-lived credentials.
    Broker(Box<BrokerArgs>),
    /// Read audit records.
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Say which of the pods that run now may use a CredentialBinding, which may not, and why.
    Explain(ExplainArgs),
    /// Print the CustomResourceDefinitions as YAML.
    Crd,
    /// Print the denial of metadata endpoints for all runner pods, as an object of cluster scope. The chart applies it.
    ClusterDenial {
        /// The kind of the object.
        dialect: Dialect,
    },
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: Shell,
    },
}

/// With the rights of the kubeconfig: CredentialBindings, pods and events of the namespace are read.
#[derive(Args)]
pub(crate) struct ExplainArgs {
    /// Name of the CredentialBinding.
    pub(crate) binding: String,
    /// Its namespace [default: the kubeconfig's].
    #[arg(long, short)]
    pub(crate) namespace: Option<String>,
    /// Only this runner pod.
    #[arg(long)]
    pub(crate) pod: Option<String>,
}

#[derive(Subcommand)]
pub(crate) enum AuditCommand {
    /// Check that no record was changed, left out or put in.
    Verify {
        /// Files of one chain, in the order in which they were written: FILE.2 FILE.1 FILE.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// The chain began before the first file: older ones are gone.
        #[arg(long)]
        continued: bool,
    },
    /// Show records that fit, as text, JSON or CSV.
    ///
    /// Lines that are no records are left out, so that a broker's whole log will do: kubectl logs deploy/mayfly-broker | mayfly audit show
    Show(AuditShow),
}

#[derive(Args)]
pub(crate) struct AuditShow {
    /// Files, in the order in which they were written; `-` is standard input.
    #[arg(default_value = "-")]
    files: Vec<PathBuf>,
    /// Only this action, for example credential.denied; several can be named.
    #[arg(long = "action")]
    actions: Vec<String>,
    /// Only this namespace.
    #[arg(long, short)]
    namespace: Option<String>,
    /// Only this RunnerPool.
    #[arg(long)]
    pool: Option<String>,
    /// Only this correlation id, which a job's log and a binding's events have.
    #[arg(long)]
    request: Option<String>,
    /// Only what was refused or failed.
    #[arg(long)]
    failed: bool,
    /// Only from this time on (RFC 3339).
    #[arg(long, value_name = "TIME")]
    since: Option<Timestamp>,
    /// Only before this time (RFC 3339).
    #[arg(long, value_name = "TIME")]
    until: Option<Timestamp>,
    /// How they are shown.
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
    /// Go on with what is added to the last file.
    #[arg(long, short)]
    follow: bool,
}

/// Every option can be given by its environment variable as well.
#[derive(Args)]
pub(crate) struct ControllerArgs {
    /// Namespace the operator runs in; Secrets that pools name are looked for here, and nowhere else.
    #[arg(long, env = "MAYFLY_NAMESPACE")]
    namespace: String,
    /// Name of this process in events, for example the pod's.
    #[arg(long, env = "MAYFLY_INSTANCE")]
    instance: Option<String>,
    /// Image of mayfly-gate for runner pods.
    #[arg(long, env = "MAYFLY_GATE_IMAGE")]
    gate_image: String,
    /// Runner image of Gitea pools that name none.
    #[arg(long, env = "MAYFLY_RUNNER_IMAGE")]
    runner_image: String,
    /// Runner image of GitHub pools that name none.
    #[arg(long, env = "MAYFLY_GITHUB_RUNNER_IMAGE", default_value = concat!("ghcr.io/mayfly-dev/github-runner:", env!("CARGO_PKG_VERSION")))]
    github_runner_image: String,
    /// When the kubelet pulls these images: Always, IfNotPresent or Never.
    #[arg(long, env = "MAYFLY_IMAGE_PULL_POLICY", default_value = "IfNotPresent", value_parser = ["Always", "IfNotPresent", "Never"])]
    image_pull_policy: String,
    /// Service through which runner pods reach the gate API.
    #[arg(long, env = "MAYFLY_GATE_SERVICE", default_value = "mayfly-gate")]
    gate_service: String,
    /// Where the gate API listens (TLS).
    #[arg(long, env = "MAYFLY_GATE_ADDRESS", default_value = "0.0.0.0:8443")]
    gate_address: SocketAddr,
    /// Where webhooks arrive (plain HTTP: put TLS in front of it).
    #[arg(long, env = "MAYFLY_WEBHOOK_ADDRESS", default_value = "0.0.0.0:8080")]
    webhook_address: SocketAddr,
    /// Where health and metrics are served.
    #[arg(long, env = "MAYFLY_HEALTH_ADDRESS", default_value = "0.0.0.0:8081")]
    health_address: SocketAddr,
    /// ValidatingWebhookConfiguration by which the API server tells of break-glass use; without it nothing is told but in the audit log.
    #[arg(long, env = "MAYFLY_BREAK_GLASS_WEBHOOK")]
    break_glass_webhook: Option<String>,
    /// Service through which the API server tells of it.
    #[arg(long, env = "MAYFLY_ADMISSION_SERVICE", default_value = "mayfly-admission")]
    admission_service: String,
    /// Where that is listened for (TLS).
    #[arg(long, env = "MAYFLY_ADMISSION_ADDRESS", default_value = "0.0.0.0:9443")]
    admission_address: SocketAddr,
    /// Secret that keeps the gate API's certificate; made if it is not there.
    #[arg(long, env = "MAYFLY_GATE_SECRET", default_value = "mayfly-gate-tls")]
    gate_secret: String,
    /// ConfigMap in the operator's namespace into which the authority of that certificate is written, for sentinels.
    #[arg(long, env = "MAYFLY_GATE_AUTHORITY", default_value = "mayfly-gate-ca")]
    gate_authority: String,
    /// Service of the broker: its certificate is made for it, as the broker may neither read nor write Secrets.
    #[arg(long, env = "MAYFLY_BROKER_SERVICE", requires = "issuers_file")]
    broker_service: Option<String>,
    /// Secret that keeps the broker's certificate.
    #[arg(long, env = "MAYFLY_BROKER_SECRET", default_value = "mayfly-broker-tls")]
    broker_secret: String,
    /// ServiceAccount of the broker, in the operator's namespace: it alone may tell of refusals.
    #[arg(long, env = "MAYFLY_BROKER_ACCOUNT", default_value = "mayfly-broker")]
    broker_account: String,
    /// Port of the broker, of its Service as well as of its pods.
    #[arg(long, env = "MAYFLY_BROKER_PORT", default_value_t = 8443)]
    broker_port: u16,
    /// Labels of the broker's pods, which runner pods may reach: key=value, comma-separated.
    #[arg(long, env = "MAYFLY_BROKER_LABELS", default_value = "app.kubernetes.io/name=mayfly-broker", value_parser = labels)]
    broker_labels: BTreeMap<String, String>,
    /// Namespace in which Cilium, where the cluster has it, keeps its settings.
    #[arg(long, env = "MAYFLY_CILIUM_NAMESPACE", default_value = "kube-system")]
    cilium_namespace: String,
    /// ServiceAccount of the sentinels, in the operator's namespace: they alone may tell what answers on a node.
    #[arg(long, env = "MAYFLY_SENTINEL_ACCOUNT", default_value = "mayfly-sentinel")]
    sentinel_account: String,
    /// Labels of the operator's own pods, which runner pods may reach: key=value, comma-separated.
    #[arg(long, env = "MAYFLY_POD_LABELS", default_value = "app.kubernetes.io/name=mayfly", value_parser = labels)]
    pod_labels: BTreeMap<String, String>,
    /// Namespace of the cluster's DNS.
    #[arg(long, env = "MAYFLY_DNS_NAMESPACE", default_value = "kube-system")]
    dns_namespace: String,
    /// Labels of the cluster's DNS pods: key=value, comma-separated.
    #[arg(long, env = "MAYFLY_DNS_LABELS", default_value = "k8s-app=kube-dns", value_parser = labels)]
    dns_labels: BTreeMap<String, String>,
    /// Addresses that runner pods may ask for names, beside the cluster's DNS pods (comma-separated). Without them, in a cluster, those
    /// that this process is told to ask itself.
    #[arg(long, env = "MAYFLY_DNS_ADDRESSES", value_delimiter = ',')]
    dns_addresses: Vec<IpAddr>,
    /// Public address ranges that belong to the cluster (Services, for example) and stay closed to jobs. Private ranges are closed
    /// anyway, and so are nodes, their pod ranges and the API server, which are found.
    #[arg(long, env = "MAYFLY_CLUSTER_RANGES", value_delimiter = ',')]
    cluster_ranges: Vec<IpNet>,
    /// Service of the sentinels in the operator's namespace; `NAME-pods` is the headless one.
    #[arg(long, env = "MAYFLY_SENTINEL_SERVICE", default_value = "mayfly-sentinel")]
    sentinel_service: String,
    /// Addresses outside of the cluster (address:port, comma-separated) that answer the operator and that no pool opens: runner pods
    /// are shown to be closed by them. Needed only where the forge's host drops what it does not serve.
    #[arg(long, env = "MAYFLY_OUTSIDE_SENTINELS", value_delimiter = ',')]
    outside_sentinels: Vec<SocketAddr>,
    /// Address of the API server's Service, as Kubernetes tells every pod.
    #[arg(long, env = "KUBERNETES_SERVICE_HOST")]
    api_server_host: Option<IpAddr>,
    /// Its port.
    #[arg(long, env = "KUBERNETES_SERVICE_PORT", default_value_t = 443)]
    api_server_port: u16,
    /// PEM file of certificate authorities for forges with a private one.
    #[arg(long, env = "MAYFLY_FORGE_CA_FILE")]
    forge_ca_file: Option<PathBuf>,
    /// YAML file with the issuers that the broker trusts: bindings tell whether theirs is among them.
    #[arg(long, env = "MAYFLY_ISSUERS_FILE", requires = "broker_service")]
    issuers_file: Option<PathBuf>,
    /// YAML file with the GitHub Apps that the broker can sign for: bindings tell whether theirs is among them, and where its key is.
    #[arg(long, env = "MAYFLY_GITHUB_APPS_FILE", requires = "issuers_file")]
    github_apps_file: Option<PathBuf>,
    /// Address at which the world finds this operator's OIDC issuer, for pools with jobIdentity.issuer Mayfly: https, and to the letter what
    /// tokens say. Its documents are served where webhooks arrive. Without it no pool can have that.
    #[arg(long, env = "MAYFLY_IDENTITY_ISSUER", value_parser = issuer)]
    identity_issuer: Option<String>,
    /// Secret that keeps the issuer's keys; made if it is not there.
    #[arg(long, env = "MAYFLY_IDENTITY_SECRET", default_value = "mayfly-identity-keys")]
    identity_secret: String,
    /// HTTP proxy for all calls to forges: http://HOST:PORT. It resolves their names, and has to keep them from leading inside.
    #[arg(long, env = "MAYFLY_FORGE_PROXY", value_parser = proxy)]
    forge_proxy: Option<String>,
    /// Seconds between two looks at a forge when no webhook comes.
    #[arg(long, env = "MAYFLY_POLL_SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    poll_seconds: u64,
    #[command(flatten)]
    audit: AuditArgs,
}

/// Everything the controller was told.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) instance: Option<String>,
    pub(crate) pods: PodSettings,
    pub(crate) cluster: ClusterFacts,
    pub(crate) gate_address: SocketAddr,
    pub(crate) webhook_address: SocketAddr,
    pub(crate) health_address: SocketAddr,
    pub(crate) break_glass_webhook: Option<String>,
    pub(crate) admission_address: SocketAddr,
    pub(crate) admission_name: String,
    pub(crate) gate_secret: String,
    pub(crate) gate_authority: String,
    pub(crate) gate_names: Vec<String>,
    /// Name of the broker, and the Secret for its certificate.
    pub(crate) broker: Option<(String, String)>,
    /// Address of the OIDC issuer, and the Secret for its keys.
    pub(crate) identity: Option<(String, String)>,
    pub(crate) forge_ca: Option<Vec<u8>>,
    pub(crate) forge_proxy: Option<String>,
    /// User name of the broker's account; `None` where there is no broker.
    pub(crate) broker_account: Option<String>,
    /// What bindings have to know of the broker; `None` where there is none.
    pub(crate) broker_knows: Option<Configured>,
    pub(crate) poll_interval: Duration,
    pub(crate) cilium_namespace: String,
    /// User name of the sentinels' account.
    pub(crate) sentinel_account: String,
    pub(crate) sentinel_service: String,
    pub(crate) sentinel_pods: String,
    pub(crate) outside_sentinels: Vec<SocketAddr>,
    pub(crate) api_server: Option<SocketAddr>,
    pub(crate) audit: AuditTo,
}

impl ControllerArgs {
    /// Checks what was given.
    pub(crate) fn settings(self) -> Result<Settings> {
        if self.pod_labels.is_empty() || self.dns_labels.is_empty() || self.broker_labels.is_empty() {
            bail!(
                "--pod-labels, --dns-labels and --broker-labels cannot be empty: an empty selector would open every pod of the namespace"
            );
        }
        let forge_ca = match &self.forge_ca_file {
            Some(path) => Some(std::fs::read(path).with_context(|| format!("--forge-ca-file {}", path.display()))?),
            None => None,
        };
        let mut dns_addresses = self.dns_addresses;
        if dns_addresses.is_empty() && self.api_server_host.is_some() {
            // The kubelet writes the same servers for runner pods: both have the DNS policy ClusterFirst.
            dns_addresses = nameservers(&std::fs::read_to_string(RESOLV_CONF).unwrap_or_default());
        }
        let host = format!("{}.{}.svc", self.gate_service, self.namespace);
        let admission_name = format!("{}.{}.svc", self.admission_service, self.namespace);
        let broker_knows = match &self.issuers_file {
            Some(path) => Some(Configured { issuers: read_issuers(path)?, apps: read_github_apps(self.github_apps_file.as_deref())? }),
            None => None,
        };
        let account = |name: &str| format!("system:serviceaccount:{}:{name}", self.namespace);
        let broker_account = self.broker_service.as_ref().map(|_| account(&self.broker_account));
        let sentinel_account = account(&self.sentinel_account);
        let broker_host = self.broker_service.as_ref().map(|service| format!("{service}.{}.svc", self.namespace));
        let pods_forge_ca = match (&broker_host, &forge_ca) {
            (Some(_), Some(authorities)) => Some(small_text(authorities).context("--forge-ca-file, which runner pods are given")?),
            _ => None,
        };
        let access = |host: &String| BrokerAccess {
            url: format!("https://{host}:{}", self.broker_port),
            ca: String::new(),
            forge_ca: pods_forge_ca.clone(),
        };
        let gate_port = self.gate_address.port();
        let sentinels = |suffix: &str| format!("{}{suffix}.{}.svc", self.sentinel_service, self.namespace);
        let (sentinel_service, sentinel_pods) = (sentinels(""), sentinels("-pods"));
        Ok(Settings {
            instance: self.instance,
            pods: PodSettings {
                gate_image: self.gate_image,
                runner_image: self.runner_image,
                github_runner_image: self.github_runner_image,
                image_pull_policy: self.image_pull_policy,
                gate_url: format!("https://{host}:{gate_port}"),
                gate_ca: String::new(),
                broker: broker_host.as_ref().map(access),
            },
            cluster: ClusterFacts {
                operator_namespace: self.namespace,
                operator_labels: self.pod_labels,
                gate_port,
                broker: self.broker_service.map(|_| (self.broker_labels, self.broker_port)),
                dns_namespace: self.dns_namespace,
                dns_labels: self.dns_labels,
                dns_addresses,
                cluster_ranges: self.cluster_ranges.into_iter().chain(self.api_server_host.map(IpNet::from)).collect(),
                nodes: Vec::new(),
            },
            gate_address: self.gate_address,
            webhook_address: self.webhook_address,
            health_address: self.health_address,
            break_glass_webhook: self.break_glass_webhook,
            admission_address: self.admission_address,
            admission_name,
            gate_secret: self.gate_secret,
            gate_authority: self.gate_authority,
            gate_names: vec![host],
            broker: broker_host.map(|host| (host, self.broker_secret)),
            identity: self.identity_issuer.map(|issuer| (issuer, self.identity_secret)),
            forge_ca,
            forge_proxy: self.forge_proxy,
            broker_account,
            broker_knows,
            poll_interval: Duration::from_secs(self.poll_seconds),
            cilium_namespace: self.cilium_namespace,
            sentinel_account,
            sentinel_service,
            sentinel_pods,
            outside_sentinels: self.outside_sentinels,
            api_server: self.api_server_host.map(|host| (host, self.api_server_port).into()),
            audit: self.audit.settings()?,
        })
    }
}

/// What pods are given in a variable of their environment: Linux takes 128 KiB for one.
fn small_text(bytes: &[u8]) -> Result<String> {
    let text = std::str::from_utf8(bytes).context("it is no text")?;
    match text.len() <= 64 << 10 {
        true => Ok(text.to_owned()),
        false => bail!("it has more than 64 KiB: name the forges' own authorities only"),
    }
}

fn labels(text: &str) -> Result<BTreeMap<String, String>, String> {
    let pair = |pair: &str| match pair.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{pair:?} is not key=value")),
    };
    text.split(',').filter(|part| !part.is_empty()).map(pair).collect()
}

/// An address that can be a proxy's. Without a password, which every process of the node could read.
fn proxy(text: &str) -> Result<String, String> {
    let url = reqwest::Url::parse(text).map_err(|error| error.to_string())?;
    match matches!(url.scheme(), "http" | "https") && url.username().is_empty() && url.password().is_none() && url.has_host() {
        true => Ok(text.to_owned()),
        false => Err("write http://HOST:PORT, without a user name".to_owned()),
    }
}

/// An address that tokens can name as their issuer (OpenID Connect Discovery 1.0, section 3).
fn issuer(text: &str) -> Result<String, String> {
    let url = reqwest::Url::parse(text).map_err(|error| error.to_string())?;
    let plain = url.scheme() == "https" && url.username().is_empty() && url.password().is_none() && url.has_host();
    match plain && url.query().is_none() && url.fragment().is_none() && !text.ends_with('/') && text.bytes().all(|b| b.is_ascii_graphic()) {
        true => Ok(text.to_owned()),
        false => Err("write https://HOST or https://HOST/PATH, without a slash at the end".to_owned()),
    }
}

/// Prints the CustomResourceDefinitions.
pub(crate) fn print_crds() -> Result<()> {
    let crds = [CredentialBinding::crd(), RunnerPool::crd()];
    for (n, crd) in crds.iter().enumerate() {
        let yaml = serde_saphyr::to_string(crd).context("the CRD cannot be written as YAML")?;
        let separator = if n == 0 { "" } else { "---\n" };
        io::stdout().write_all(format!("{separator}{yaml}").as_bytes())?;
    }
    Ok(())
}

/// Prints a denial of cluster scope.
pub(crate) fn print_cluster_denial(dialect: Dialect) -> Result<()> {
    let object = cluster_wide_denial(dialect).map_err(anyhow::Error::msg)?;
    let yaml = serde_saphyr::to_string(&object).context("the policy cannot be written as YAML")?;
    io::stdout().write_all(yaml.as_bytes())?;
    Ok(())
}

/// Checks or shows audit records.
pub(crate) fn audit(command: AuditCommand) -> Result<()> {
    let (files, continued) = match command {
        AuditCommand::Verify { files, continued } => (files, continued),
        AuditCommand::Show(args) => return show_audit(args),
    };
    let mut chain = Verification::new(!continued);
    for file in &files {
        if let Err(line) = chain.file(file).with_context(|| file.display().to_string())? {
            bail!("{}: line {line} is not what was written, or not where it was written", file.display());
        }
    }
    writeln!(io::stdout(), "{} records, each as it was written", chain.count)?;
    Ok(())
}

fn show_audit(args: AuditShow) -> Result<()> {
    let AuditShow { files, actions, namespace, pool, request, failed, since, until, output, follow } = args;
    let filter = Filter { actions, namespace, pool, request, failed, since, until };
    let last = files.len().saturating_sub(1);
    let read = || -> io::Result<()> {
        let mut shown = Shown::new(filter, output, io::stdout().lock())?;
        for (n, file) in files.iter().enumerate() {
            let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", file.display()));
            match file.to_str() {
                Some("-") => records::show(io::stdin().lock(), &mut shown)?,
                _ if follow && n == last => records::follow(file, &mut shown).map_err(named)?,
                _ => records::show(fs::File::open(file).map_err(named)?, &mut shown)?,
            }
        }
        Ok(())
    };
    match read() {
        // Whoever read it has seen enough, such as `head`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

/// Prints a completion script.
pub(crate) fn print_completions(shell: Shell) {
    clap_complete::generate(shell, &mut Cli::command(), "mayfly", &mut io::stdout());
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDED: [&str; 8] = ["mayfly", "controller", "--namespace", "m", "--gate-image", "g", "--runner-image", "r"];

    fn settings(more: &[&str]) -> Result<Settings> {
        match Cli::try_parse_from(NEEDED.iter().chain(more))?.command {
            Command::Controller(args) => args.settings(),
            _ => bail!("another command"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_broker_needs_issuers_and_a_certificate() {
        let args = ["mayfly", "broker", "--issuers-file", "/nowhere", "--tls-certificate-file", "/nowhere", "--tls-key-file", "/nowhere"];
        let Ok(Command::Broker(args)) = Cli::try_parse_from(args).map(|cli| cli.command) else { panic!("another command") };
        assert!(args.settings().is_err_and(|error| error.to_string().contains("--issuers-file")));
        assert!(Cli::try_parse_from(["mayfly", "broker"]).is_err());
    }

    #[test]
    fn defaults_are_complete_and_nonsense_is_refused() {
        let found = settings(&[]).expect("valid");
        assert_eq!(found.pods.gate_url, "https://mayfly-gate.m.svc:8443");
        let identity = settings(&["--identity-issuer", "https://mayfly.example/ci"]).expect("valid").identity;
        assert_eq!(identity, Some(("https://mayfly.example/ci".to_owned(), "mayfly-identity-keys".to_owned())));
        let told = settings(&["--dns-addresses", "169.254.20.10,10.96.0.10"]).expect("valid").cluster.dns_addresses;
        assert_eq!(told.len(), 2, "what was told goes before what is found");
        for bad in [
            ["--pod-labels", ""],
            ["--dns-labels", "x"],
            ["--poll-seconds", "0"],
            ["--cluster-ranges", "ten"],
            ["--dns-addresses", "kube-dns"],
            ["--forge-proxy", "proxy:3128"],
            ["--forge-proxy", "http://me:secret@proxy:3128"],
            ["--identity-issuer", "http://mayfly.example"],
            ["--identity-issuer", "https://mayfly.example/"],
            ["--identity-issuer", "https://mayfly.example/ci?x=1"],
            ["--identity-issuer", "https://me@mayfly.example"],
        ] {
            assert!(settings(&bad).is_err(), "{bad:?}");
        }
    }
}
