//! The runner pod, as a pure builder: Pod Security `restricted`, and what that leaves open closed as well.
//!
//! `charts/mayfly/templates/admission.yaml` refuses a pod that is not exactly this: the two change together.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::{
    Affinity, Capabilities, Container, EmptyDirVolumeSource, EnvVar, LocalObjectReference, NodeAffinity, NodeSelector,
    NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSecurityContext, PodSpec, ProjectedVolumeSource, ResourceRequirements,
    SeccompProfile, SecurityContext, ServiceAccountTokenProjection, Volume, VolumeMount, VolumeProjection,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use mayfly_crds::RunnerPoolSpec;
use mayfly_crds::names::{
    BROKER_AUDIENCE, GATE_AUDIENCE, GATE_CONTAINER, LABEL_MANAGED_BY, LABEL_POOL, MANAGED_BY, RUNNER_CONTAINER, RUNNER_SERVICE_ACCOUNT,
    RunnerName,
};
use mayfly_proof::SENTINEL_PORT;

/// User and group of the runner and of every step of a job.
const RUNNER_ID: i64 = 1001;
/// User and group of the gate: another than the runner's, so that a job cannot signal or trace it even if namespaces fail.
const GATE_ID: i64 = 65532;
/// Where gate and runner meet: the gate writes, the runner reads.
const HANDOFF_DIR: &str = "/run/mayfly";
/// Where the gate's own tokens are; mounted in the gate alone.
const TOKEN_DIR: &str = "/var/run/secrets/mayfly.dev/gate";
/// Shortest life Kubernetes gives a projected token, in seconds.
const TOKEN_SECONDS: i64 = 600;
/// Seconds between SIGTERM and SIGKILL when a pod ends in good order: the runner reports a cancelled job to the forge.
const GRACE_SECONDS: i64 = 10;

/// What every runner pod of this operator has in common.
#[derive(Clone, Debug)]
pub(crate) struct PodSettings {
    /// Image of `mayfly-gate`.
    pub(crate) gate_image: String,
    /// Runner image of Gitea pools that name none.
    pub(crate) runner_image: String,
    /// Runner image of GitHub pools that name none.
    pub(crate) github_runner_image: String,
    /// When the kubelet pulls the gate's image, and the runner's where the pool does not say.
    pub(crate) image_pull_policy: String,
    /// Base URL of the gate API, as pods reach it.
    pub(crate) gate_url: String,
    /// Certificate authority of the gate API, PEM. Not a secret.
    pub(crate) gate_ca: String,
    /// Where gates ask for credentials; `None` where there is no broker.
    pub(crate) broker: Option<BrokerAccess>,
}

/// The broker, as pods reach it.
#[derive(Clone, Debug)]
pub(crate) struct BrokerAccess {
    /// Base URL.
    pub(crate) url: String,
    /// Its certificate authority, PEM.
    pub(crate) ca: String,
    /// Certificate authorities of forges with a private one, PEM: gates ask forges for the tokens of jobs.
    pub(crate) forge_ca: Option<String>,
}

/// What is asked for one runner.
#[derive(Clone, Debug)]
pub(crate) struct PodRequest<'a> {
    pub(crate) name: &'a RunnerName,
    pub(crate) namespace: &'a str,
    pub(crate) pool: &'a str,
    pub(crate) owner: &'a OwnerReference,
    pub(crate) spec: &'a RunnerPoolSpec,
    /// Whether it gets a user namespace of its own.
    pub(crate) user_namespace: bool,
    /// It ends after so many seconds, whatever happens.
    pub(crate) life_seconds: i64,
    /// Sentinels, which must not answer it.
    pub(crate) sentinels: &'a [IpAddr],
    /// Where it may be.
    pub(crate) placement: Placement,
}

/// On which nodes a pod may be, beside what its pool says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Placement {
    /// On this node alone, to prove isolation there.
    OnlyOn(String),
    /// Anywhere but on these, which were found open.
    NotOn(Vec<String>),
}

/// The pod of one runner.
pub(crate) fn runner_pod(request: &PodRequest<'_>, settings: &PodSettings) -> Pod {
    let PodRequest { name, namespace, pool, owner, spec, .. } = *request;
    Pod {
        metadata: ObjectMeta {
            name: Some(name.to_string()),
            namespace: Some(namespace.to_owned()),
            labels: Some(text_map(&[
                (LABEL_MANAGED_BY, MANAGED_BY),
                (LABEL_POOL, pool),
                ("app.kubernetes.io/name", "mayfly-runner"),
                ("app.kubernetes.io/component", "runner"),
            ])),
            annotations: Some(text_map(&[("cluster-autoscaler.kubernetes.io/safe-to-evict", "false")])),
            owner_references: Some(vec![owner.clone()]),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec {
            restart_policy: Some("Never".to_owned()),
            host_users: request.user_namespace.then_some(false),
            service_account_name: Some(RUNNER_SERVICE_ACCOUNT.to_owned()),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            share_process_namespace: Some(false),
            active_deadline_seconds: Some(request.life_seconds),
            affinity: affinity(&request.placement),
            termination_grace_period_seconds: Some(GRACE_SECONDS),
            runtime_class_name: spec.runner.runtime_class_name.clone(),
            node_selector: (!spec.runner.node_selector.is_empty()).then(|| spec.runner.node_selector.clone()),
            tolerations: (!spec.runner.tolerations.is_empty()).then(|| spec.runner.tolerations.clone()),
            security_context: Some(PodSecurityContext {
                run_as_non_root: Some(true),
                run_as_user: Some(RUNNER_ID),
                run_as_group: Some(RUNNER_ID),
                fs_group: Some(RUNNER_ID),
                fs_group_change_policy: Some("OnRootMismatch".to_owned()),
                supplemental_groups_policy: Some("Strict".to_owned()),
                seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
                ..PodSecurityContext::default()
            }),
            init_containers: Some(vec![gate(request.sentinels, settings)]),
            containers: vec![runner(spec, settings)],
            image_pull_secrets: (!spec.runner.image_pull_secrets.is_empty()).then(|| pull_secrets(spec)),
            volumes: Some(volumes(spec, settings)),
            ..PodSpec::default()
        }),
        status: None,
    }
}

/// Nodes are named by field, one requirement each, as the API asks for.
fn affinity(placement: &Placement) -> Option<Affinity> {
    let requirement = |operator: &str, node: &String| NodeSelectorRequirement {
        key: "metadata.name".to_owned(),
        operator: operator.to_owned(),
        values: Some(vec![node.clone()]),
    };
    let requirements: Vec<NodeSelectorRequirement> = match placement {
        Placement::OnlyOn(node) => vec![requirement("In", node)],
        Placement::NotOn(nodes) => nodes.iter().map(|node| requirement("NotIn", node)).collect(),
    };
    let term = NodeSelectorTerm { match_fields: Some(requirements), match_expressions: None };
    let wanted = term.match_fields.iter().any(|all| !all.is_empty());
    wanted.then(|| Affinity {
        node_affinity: Some(NodeAffinity {
            required_during_scheduling_ignored_during_execution: Some(NodeSelector { node_selector_terms: vec![term] }),
            ..NodeAffinity::default()
        }),
        ..Affinity::default()
    })
}

/// The native sidecar: it alone can speak for the pod.
fn gate(sentinels: &[IpAddr], settings: &PodSettings) -> Container {
    let sentinels: Vec<String> = sentinels.iter().map(|address| SocketAddr::from((*address, SENTINEL_PORT)).to_string()).collect();
    let mut environment = vec![
        env("MAYFLY_OPERATOR_URL", &settings.gate_url),
        env("MAYFLY_OPERATOR_CA", &settings.gate_ca),
        env("MAYFLY_TOKEN_FILE", &format!("{TOKEN_DIR}/token")),
        env("MAYFLY_REGISTRATION", &format!("{HANDOFF_DIR}/registration")),
        env("MAYFLY_SENTINELS", &sentinels.join(",")),
    ];
    if let Some(broker) = &settings.broker {
        environment.extend([
            env("MAYFLY_BROKER_URL", &broker.url),
            env("MAYFLY_BROKER_CA", &broker.ca),
            env("MAYFLY_BROKER_TOKEN_FILE", &format!("{TOKEN_DIR}/broker")),
        ]);
        environment.extend(broker.forge_ca.as_ref().map(|authorities| env("MAYFLY_FORGE_CA", authorities)));
    }
    Container {
        name: GATE_CONTAINER.to_owned(),
        image: Some(settings.gate_image.clone()),
        image_pull_policy: Some(settings.image_pull_policy.clone()),
        restart_policy: Some("Always".to_owned()),
        env: Some(environment),
        resources: Some(resources(
            &[("cpu", "5m"), ("memory", "16Mi"), ("ephemeral-storage", "1Mi")],
            &[("cpu", "500m"), ("memory", "64Mi"), ("ephemeral-storage", "16Mi")],
        )),
        security_context: Some(locked(GATE_ID)),
        volume_mounts: Some(vec![mount("handoff", HANDOFF_DIR, false), mount("gate-token", TOKEN_DIR, true)]),
        ..Container::default()
    }
}

fn runner(spec: &RunnerPoolSpec, settings: &PodSettings) -> Container {
    let wanted = &spec.runner;
    let default_image = if spec.forge.github.is_some() { &settings.github_runner_image } else { &settings.runner_image };
    let mut limits = default_quantities(&[("cpu", "2"), ("memory", "4Gi"), ("ephemeral-storage", "12Gi")]);
    limits.extend(wanted.resources.limits.clone());
    // A request above its limit is refused by the API server, so defaults only fill what the limits leave room for.
    let requests = match wanted.resources.requests.is_empty() {
        true => default_quantities(&[("cpu", "100m"), ("memory", "128Mi"), ("ephemeral-storage", "64Mi")])
            .into_iter()
            .filter(|(name, _)| !wanted.resources.limits.contains_key(name))
            .collect(),
        false => wanted.resources.requests.clone(),
    };
    let mut environment = vec![env("HOME", "/home/runner"), env("MAYFLY_REGISTRATION", &format!("{HANDOFF_DIR}/registration"))];
    environment.extend(wanted.env.iter().map(|variable| env(&variable.name, &variable.value)));
    Container {
        name: RUNNER_CONTAINER.to_owned(),
        image: Some(wanted.image.clone().unwrap_or_else(|| default_image.clone())),
        image_pull_policy: Some(
            wanted.image_pull_policy.map_or_else(|| settings.image_pull_policy.clone(), |policy| policy.as_str().to_owned()),
        ),
        command: (!wanted.command.is_empty()).then(|| wanted.command.clone()),
        working_dir: Some("/home/runner".to_owned()),
        env: Some(environment),
        resources: Some(ResourceRequirements { requests: Some(requests), limits: Some(limits), claims: None }),
        security_context: Some(locked(RUNNER_ID)),
        volume_mounts: Some(vec![mount("handoff", HANDOFF_DIR, true), mount("home", "/home/runner", false), mount("tmp", "/tmp", false)]),
        ..Container::default()
    }
}

fn pull_secrets(spec: &RunnerPoolSpec) -> Vec<LocalObjectReference> {
    spec.runner.image_pull_secrets.iter().map(|secret| LocalObjectReference { name: secret.name.clone() }).collect()
}

fn volumes(spec: &RunnerPoolSpec, settings: &PodSettings) -> Vec<Volume> {
    let workspace = spec.runner.workspace.clone().unwrap_or_else(|| Quantity("10Gi".to_owned()));
    let token = |audience: &str, path: &str| VolumeProjection {
        service_account_token: Some(ServiceAccountTokenProjection {
            audience: Some(audience.to_owned()),
            expiration_seconds: Some(TOKEN_SECONDS),
            path: path.to_owned(),
        }),
        ..VolumeProjection::default()
    };
    let mut tokens = vec![token(GATE_AUDIENCE, "token")];
    if settings.broker.is_some() {
        tokens.push(token(BROKER_AUDIENCE, "broker"));
    }
    vec![
        empty_dir("handoff", Some("Memory"), Quantity("1Mi".to_owned())),
        empty_dir("home", None, workspace),
        empty_dir("tmp", None, Quantity("2Gi".to_owned())),
        Volume {
            name: "gate-token".to_owned(),
            projected: Some(ProjectedVolumeSource { default_mode: None, sources: Some(tokens) }),
            ..Volume::default()
        },
    ]
}

fn locked(user: i64) -> SecurityContext {
    SecurityContext {
        run_as_user: Some(user),
        run_as_group: Some(user),
        run_as_non_root: Some(true),
        privileged: Some(false),
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        capabilities: Some(Capabilities { add: None, drop: Some(vec!["ALL".to_owned()]) }),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), localhost_profile: None }),
        ..SecurityContext::default()
    }
}

fn empty_dir(name: &str, medium: Option<&str>, size: Quantity) -> Volume {
    Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource { medium: medium.map(str::to_owned), size_limit: Some(size) }),
        ..Volume::default()
    }
}

fn mount(name: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount { name: name.to_owned(), mount_path: path.to_owned(), read_only: read_only.then_some(true), ..VolumeMount::default() }
}

fn env(name: &str, value: &str) -> EnvVar {
    EnvVar { name: name.to_owned(), value: Some(value.to_owned()), value_from: None }
}

fn resources(requests: &[(&str, &str)], limits: &[(&str, &str)]) -> ResourceRequirements {
    ResourceRequirements { requests: Some(default_quantities(requests)), limits: Some(default_quantities(limits)), claims: None }
}

fn default_quantities(pairs: &[(&str, &str)]) -> BTreeMap<String, Quantity> {
    pairs.iter().map(|(name, amount)| ((*name).to_owned(), Quantity((*amount).to_owned()))).collect()
}

fn text_map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}
