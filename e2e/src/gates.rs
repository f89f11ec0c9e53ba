//! What plays the pods of simulated nodes, on which no container runs: the gate of each runner pod, with a real token of its own, the stand-in
//! for its runner, and the sentinel of each node. It answers as on a network that is closed: for load, and not for a proof of anything.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{Config as Watch, watcher};
use kube::{Api, Client, Config, ResourceExt};
use mayfly_cluster::World as Place;
use mayfly_crds::names::{GATE_AUDIENCE, LABEL_POOL, RUNNER_SERVICE_ACCOUNT};
use mayfly_github_simulator::http::agent;
use mayfly_github_simulator::runner::{self, Options};
use mayfly_proof::{Answer, Challenge, Look, Looked, Probe, Report};
use serde_json::json;
use ureq::Agent;

use crate::World;
use crate::world::{SYSTEM, built};

/// What it is called among the programs of the outside world, and its policy in the cluster.
const NAME: &str = "gates";
/// Simulated nodes have names that begin so.
pub const NODE_PREFIX: &str = "kwok-";
/// The sentinels' account, and the name of their pods.
const SENTINEL: &str = "mayfly-sentinel";
/// Longer than the operator keeps a question open.
const CALL: Duration = Duration::from_secs(70);
/// After a call that failed, and how long at most as it fails again, as the gate has it.
const PAUSE: Duration = Duration::from_millis(50);
const PAUSE_LONGEST: Duration = Duration::from_secs(5);
/// Between two proofs while a job runs, as the gate has it.
const PROVE_EVERY: Duration = Duration::from_secs(15);
/// How long the tokens are good for, in seconds.
const TOKEN_LIFE: i64 = 3_600;

/// What the program is told.
#[derive(Args)]
pub struct Arguments {
    /// The administrator's kubeconfig.
    kubeconfig: PathBuf,
    /// Where runners work.
    folder: PathBuf,
}

/// Has it run, and lets it reach the gate API.
///
/// # Errors
/// When it cannot be started.
pub async fn start(world: &World) -> Result<()> {
    let outside = &world.cluster.layout().addresses().outside;
    let policy = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": NAME}, "spec": {
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "mayfly"}}, "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"ipBlock": {"cidr": format!("{outside}/32")}}], "ports": [{"port": "gate", "protocol": "TCP"}]}]}});
    policies(world).patch(NAME, &PatchParams::apply("mayfly-e2e").force(), &Patch::Apply(&policy)).await?;
    let words = [
        built()?.join("demo").display().to_string(),
        NAME.to_owned(),
        world.cluster.kubeconfig().display().to_string(),
        world.cluster.layout().at(NAME).display().to_string(),
    ];
    world.cluster.start(Place::Outside, NAME, &words.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Ends it.
///
/// # Errors
/// When it stays.
pub async fn stop(world: &World) -> Result<()> {
    world.cluster.stop(NAME)?;
    policies(world).delete(NAME, &DeleteParams::default()).await?;
    Ok(())
}

fn policies(world: &World) -> Api<NetworkPolicy> {
    Api::namespaced(world.client.clone(), SYSTEM)
}

/// The program: it runs until it is ended.
///
/// # Errors
/// When it cannot follow the cluster's pods.
pub async fn serve(arguments: Arguments) -> Result<()> {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let kubeconfig = Kubeconfig::read_from(&arguments.kubeconfig)?;
    let client = Client::try_from(Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?)?;
    let authority = Api::<ConfigMap>::namespaced(client.clone(), SYSTEM).get("mayfly-gate-ca").await?;
    let authority = authority.data.and_then(|data| data.get("ca.crt").cloned()).context("the gate API's authority")?;
    let gate_api = Arc::new(GateApi {
        agent: agent(authority.as_bytes(), CALL),
        url: format!("https://mayfly-gate.{SYSTEM}.svc:8443"),
        folder: arguments.folder,
    });
    let mut pods = watcher(Api::<Pod>::all(client.clone()), Watch::default()).default_backoff().applied_objects().boxed();
    let mut known = BTreeSet::new();
    while let Some(pod) = pods.try_next().await? {
        let is_here = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).is_some_and(|node| node.starts_with(NODE_PREFIX));
        let runs = pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running");
        let ends = pod.metadata.deletion_timestamp.is_some();
        let Some(role) = Role::of(&pod).filter(|_| is_here && runs && !ends) else { continue };
        if known.insert(pod.uid().unwrap_or_default()) {
            let (client, gate_api) = (client.clone(), gate_api.clone());
            tokio::spawn(async move {
                let name = pod.name_any();
                let played = async {
                    let token = token(&client, &pod, role).await?;
                    // Each waits for most of its life.
                    let playing = std::thread::Builder::new().spawn(move || gate_api.play(role, &pod.name_any(), &token));
                    playing.context("a thread").map(drop)
                };
                if let Err(error) = played.await {
                    say(&format!("{name}: {error:#}"));
                }
            });
        }
    }
    bail!("the watch has ended")
}

fn say(what: &str) {
    // Nobody to tell if the log is gone.
    let _ = writeln!(std::io::stderr(), "{what}");
}

/// What a pod is.
#[derive(Clone, Copy)]
enum Role {
    Runner,
    Sentinel,
}

impl Role {
    fn of(pod: &Pod) -> Option<Self> {
        let account = pod.spec.as_ref()?.service_account_name.as_deref()?;
        match account {
            RUNNER_SERVICE_ACCOUNT if pod.labels().contains_key(LABEL_POOL) => Some(Self::Runner),
            SENTINEL if pod.namespace().as_deref() == Some(SYSTEM) => Some(Self::Sentinel),
            _ => None,
        }
    }
}

/// The token that the kubelet would put into the pod.
async fn token(client: &Client, pod: &Pod, role: Role) -> Result<String> {
    let account = match role {
        Role::Runner => RUNNER_SERVICE_ACCOUNT,
        Role::Sentinel => SENTINEL,
    };
    let request: TokenRequest = serde_json::from_value(json!({"spec": {
        "audiences": [GATE_AUDIENCE], "expirationSeconds": TOKEN_LIFE,
        "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": pod.name_any(), "uid": pod.uid()}}}))?;
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let made = accounts.create_token_request(account, &PostParams::default(), &request).await?;
    Ok(made.status.context("a token")?.token)
}

struct GateApi {
    agent: Agent,
    url: String,
    folder: PathBuf,
}

struct Reply {
    status: u16,
    body: Vec<u8>,
}

impl GateApi {
    fn play(&self, role: Role, name: &str, token: &str) {
        let played = match role {
            Role::Runner => self.runner(name, token),
            Role::Sentinel => self.sentinel(token),
        };
        if let Err(error) = played {
            say(&format!("{name}: {error:#}"));
        }
    }

    /// Asks until the answer is one of these, or the operator wants nothing more of this pod.
    fn ask(&self, path: &str, token: &str, body: &[u8], good: &[u16]) -> Result<Reply> {
        let mut pause = PAUSE;
        loop {
            let request = self.agent.post(format!("{}{path}", self.url)).header("Authorization", format!("Bearer {token}"));
            let answer = match body.is_empty() {
                true => request.send_empty(),
                false => request.header("Content-Type", "application/json").send(body),
            };
            if let Ok(mut answer) = answer {
                let (status, body) = (answer.status().as_u16(), answer.body_mut().read_to_vec()?);
                ensure!(!matches!(status, 401 | 410), "{path}: {}", String::from_utf8_lossy(&body));
                if good.contains(&status) {
                    return Ok(Reply { status, body });
                }
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_LONGEST);
        }
    }

    fn prove(&self, token: &str) -> Result<()> {
        loop {
            let challenge: Challenge = serde_json::from_slice(&self.ask("/v1/challenge", token, b"", &[200])?.body)?;
            let report = Report {
                forbidden: vec![Answer::Silent; challenge.forbidden.len()],
                nonce: challenge.nonce,
                required: true,
                clean: challenge.rounds,
                unclean: 0,
                took_ms: 1,
                start: None,
            };
            if self.ask("/v1/proof", token, &serde_json::to_vec(&report)?, &[204, 409])?.status == 204 {
                return Ok(());
            }
        }
    }

    fn runner(&self, name: &str, token: &str) -> Result<()> {
        self.prove(token)?;
        let registration = loop {
            let reply = self.ask("/v1/registration", token, b"", &[200, 204, 428])?;
            match reply.status {
                200 => break String::from_utf8(reply.body).context("a registration is text")?,
                204 => {}
                _ => self.prove(token)?,
            }
        };
        let root = self.folder.join(name);
        std::fs::create_dir_all(&root)?;
        let options = Options { root: root.clone(), authorities: Vec::new(), ending: Arc::new(AtomicBool::new(false)) };
        std::thread::scope(|scope| {
            // Where a runner has hooks, its first step waits for this.
            scope.spawn(|| while self.ask("/v1/job", token, b"", &[200, 204]).is_ok_and(|reply| reply.status == 204) {});
            let (running, over) = mpsc::channel::<()>();
            scope.spawn(move || while over.recv_timeout(PROVE_EVERY) == Err(RecvTimeoutError::Timeout) && self.prove(token).is_ok() {});
            runner::run(registration.trim(), &options);
            drop(running);
            // The pod may be gone by now: the forge's word is faster than this.
            let _ = self.ask("/v1/ended", token, b"", &[204]);
        });
        Ok(std::fs::remove_dir_all(root)?)
    }

    /// Tells for ever that everything answers on its node: what is silent in the pods is silent by policy.
    fn sentinel(&self, token: &str) -> Result<()> {
        let mut found = Vec::new();
        loop {
            let reply = self.ask("/v1/control", token, &found, &[200, 204])?;
            found = Vec::new();
            if reply.status == 200 {
                let look: Look = serde_json::from_slice(&reply.body)?;
                let answered = Probe { answer: Answer::Accepted, took: Duration::from_millis(1) };
                found = serde_json::to_vec(&Looked { number: look.number, probes: vec![answered; look.endpoints.len()] })?;
            }
        }
    }
}

/// The manifest of a simulated node with room for so many pods.
pub fn node(n: usize, pods: usize) -> serde_json::Value {
    let name = format!("{NODE_PREFIX}{n}");
    let room = json!({"cpu": "64", "memory": "256Gi", "ephemeral-storage": "4Ti", "pods": pods.to_string()});
    let labels = BTreeMap::from([("bench", "kwok"), ("kubernetes.io/os", "linux"), ("kubernetes.io/hostname", name.as_str())]);
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels, "annotations": {"kwok.x-k8s.io/node": "fake"}},
        "status": {"allocatable": room, "capacity": room}})
}
