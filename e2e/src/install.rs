//! Installing the operator into the cluster as a user would: images and the two Helm charts.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mayfly_cluster::builder::{self, Selection};
use mayfly_cluster::command::{feed, output, run};
use mayfly_cluster::images::{Image, Recipe};
use mayfly_cluster::layout::Layout;
use mayfly_cluster::{Cluster, Progress, Provider, pki};
use serde_json::json;

use crate::world::{SYSTEM, built, repository};
use crate::{clouds, github, ingress};

/// Registry part of the names of images that exist on the test node only.
const REGISTRY: &str = "mayfly.test";

/// ConfigMap with the authority of the outside world's certificates.
const AUTHORITY: &str = "mayfly-e2e-authority";

/// Secret with which the broker signs for an App, by Vault's transit engine.
const SIGNER: &str = "mayfly-e2e-signer";

/// For half a minute after its start, an API server does not know the resources that policies take parameters from, and admits nothing that
/// such a policy is about.
const STARTING: &str = "failed to find resource referenced by paramKind";
const STARTED: Duration = Duration::from_secs(60);

/// The cluster tool's names for the runners' images.
const RUNNER_IMAGES: [&str; 2] = ["image-gitea-runner", "image-gitea-runner-with-boto3"];

/// An image: where its Dockerfile is, the program it holds, and its name.
const IMAGES: [(&str, &str, &str); 3] = [
    ("operator", "mayfly", "operator"),
    ("gate", "mayfly-gate", "gate"),
    ("e2e/images/github-runner-stand-in", "runner-stand-in", "github-runner-stand-in"),
];

/// Builds the operator's and the gate's images from the binaries beside this program, puts them into the node, and installs the
/// charts. Quick when nothing changed. Returns when the operator is ready.
///
/// # Errors
/// With what the program that failed said.
pub fn install(cluster: &Cluster, progress: &Progress) -> Result<()> {
    let layout = cluster.layout();
    let images = images(layout, progress)?;
    for image in &images {
        cluster.load_image(&image.archive)?;
    }
    let tags: Vec<&str> = images.iter().take(IMAGES.len()).filter_map(|image| Some(image.reference.rsplit_once(':')?.1)).collect();
    let step = progress.step("operator");
    let [operator, gate, stand_in] = tags[..] else { bail!("three images were expected") };
    let charts = repository().join("charts");
    helm(cluster, &["mayfly-crds".into(), charts.join("mayfly-crds").display().to_string()], &[])?;
    let (app, signer) = clouds::app_values(cluster, SIGNER)?;
    let mut values = vec![
        format!("image.repository={REGISTRY}/operator"),
        format!("image.tag={operator}"),
        "image.pullPolicy=Never".to_owned(),
        format!("gate.repository={REGISTRY}/gate"),
        format!("gate.tag={gate}"),
        format!("runner.repository={REGISTRY}/gitea-runner"),
        "runner.tag=dev".to_owned(),
        // GitHub's own runner talks to GitHub alone.
        format!("githubRunner.repository={REGISTRY}/github-runner-stand-in"),
        format!("githubRunner.tag={stand_in}"),
        "runnerPodPullPolicy=Never".to_owned(),
        format!("broker.issuers[0].issuer={}", github::issuer(&cluster.forge()?)?),
        "broker.issuers[0].certificateAuthorityFile=/etc/mayfly/ca/ca.crt".to_owned(),
        format!("jobIdentity.issuer={}", ingress::issuer(&cluster.forge()?)?),
        "jobIdentity.certificateAuthorityFile=/etc/mayfly/ca/ca.crt".to_owned(),
        format!("broker.caConfigMap={AUTHORITY}"),
    ];
    values.extend(app);
    if cluster.provider() == Provider::Kind {
        values.push("webhook.service.type=NodePort".to_owned());
    }
    let needed = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": AUTHORITY, "namespace": SYSTEM}, "data": {"ca.crt": pki::authority(layout)?}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SIGNER, "namespace": SYSTEM}, "stringData": {"token": signer}},
    ]});
    feed(cluster.kubectl().args(["apply", "-f", "-"]), &needed.to_string())?;
    helm(cluster, &["mayfly".into(), charts.join("mayfly").display().to_string()], &values)?;
    run(cluster.kubectl().args(["-n", SYSTEM, "rollout", "status", "deployment/mayfly-controller", "--timeout=90s"]))
        .with_context(|| format!("the operator did not get ready:\n{}", operator_log(cluster)))?;
    step.done("ready");
    Ok(())
}

/// Builds what an installation needs that comes from elsewhere, or finds it built: Helm, and all images, those of this program's
/// neighbours first. Takes no cluster.
///
/// # Errors
/// With what the program that failed said.
pub fn images(layout: &Layout, progress: &Progress) -> Result<Vec<Image>> {
    let wanted: Vec<String> = RUNNER_IMAGES.iter().chain(&["helm"]).map(|name| (*name).to_owned()).collect();
    builder::build(layout, &Selection::named(&wanted)?, progress)?;
    let own = IMAGES.iter().map(|(folder, program, name)| image(layout, progress, folder, program, name));
    own.chain(RUNNER_IMAGES.iter().map(|name| builder::image(layout, name, progress))).collect()
}

/// The end of the operator's log.
pub fn operator_log(cluster: &Cluster) -> String {
    let mut logs = cluster.kubectl();
    logs.args(["-n", SYSTEM, "logs", "deployment/mayfly-controller", "--tail=40"]);
    output(&mut logs).unwrap_or_else(|error| format!("{error:#}"))
}

/// Address at which the forge reaches the webhook receiver.
///
/// # Errors
/// When the Service is not there.
pub fn webhook_url(cluster: &Cluster, namespace: &str, pool: &str) -> Result<String> {
    Ok(format!("http://{}/webhooks/gitea/{namespace}/{pool}", ingress::webhook_service(cluster)?))
}

/// `helm`, pointed at the cluster.
///
/// # Errors
/// When it was not built.
pub fn helm_command(cluster: &Cluster) -> Result<Command> {
    let mut helm = Command::new(builder::part_folder(cluster.layout(), "helm")?.join("helm"));
    helm.env("KUBECONFIG", cluster.kubeconfig());
    Ok(helm)
}

fn helm(cluster: &Cluster, release: &[String], values: &[String]) -> Result<()> {
    let mut helm = helm_command(cluster)?;
    helm.args(["upgrade", "--install", "--namespace", SYSTEM, "--create-namespace", "--wait", "--timeout", "90s"]).args(release);
    for value in values {
        helm.args(["--set-string", value]);
    }
    let began = Instant::now();
    loop {
        match run(&mut helm) {
            Err(error) if format!("{error:#}").contains(STARTING) && began.elapsed() < STARTED => thread::sleep(Duration::from_secs(2)),
            done => return done,
        }
    }
}

/// Builds one image; its tag is a hash of the binary, so that an unchanged one restarts nothing.
fn image(layout: &Layout, progress: &Progress, folder: &str, program: &str, name: &str) -> Result<Image> {
    let binary = built()?.join(program);
    let content = fs::read(&binary).with_context(|| format!("{} is not there: `cargo build --release` makes it", binary.display()))?;
    let tag = digest(&content);
    let context = layout.at(&format!("context/{name}"));
    fs::create_dir_all(&context)?;
    let copy = context.join(program);
    if fs::read(&copy).ok().as_ref() != Some(&content) {
        fs::copy(&binary, &copy)?;
    }
    let dockerfile = repository().join(folder);
    let recipe = Recipe::new(Path::new(&dockerfile), vec![context, dockerfile.clone()], Some(&format!("{REGISTRY}/{name}:{tag}")))?;
    recipe.build(layout, progress)
}

fn digest(content: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(content).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}
