//! The API server refuses what would undo the isolation of runner pods, whoever asks for it. Cases are data: `admission/*.yaml`.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use k8s_openapi::api::events::v1::Event;
use kube::api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use mayfly_cluster::command::{feed, random_hex};
use mayfly_crds::names::{ANNOTATION_JOB, RUNNER_SERVICE_ACCOUNT};
use mayfly_e2e::World;
use mayfly_e2e::stage::{PATIENCE, POOL, Stage, workflow};
use mayfly_e2e::wait::eventually;
use mayfly_e2e::world::{operator_account, repository};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pods {
    needs: Vec<Value>,
    good: Value,
    also_good: Vec<Change>,
    bad: Vec<Change>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    name: String,
    why: Option<String>,
    patch: json_patch::Patch,
}

/// Something that somebody does with kubectl.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    #[serde(rename = "as")]
    user: Option<String>,
    #[serde(default)]
    groups: Vec<String>,
    run: Vec<String>,
    input: Option<String>,
    #[serde(default)]
    by: Vec<String>,
    why: Option<String>,
}

fn corpus<T: for<'a> Deserialize<'a>>(file: &str) -> Result<T> {
    let path = repository().join("e2e/tests/admission").join(file);
    serde_saphyr::from_str(&std::fs::read_to_string(&path)?).with_context(|| path.display().to_string())
}

/// Every change that a mutating webhook could make to a runner pod on its way, tried in the operator's own name, in a namespace without
/// Pod Security: Mayfly's policies alone refuse.
#[tokio::test(flavor = "multi_thread")]
async fn runner_pods_that_are_not_as_they_were_rendered_are_refused() -> Result<()> {
    let world = World::connect().await?;
    let namespace = format!("t-shape-{}", random_hex(3)?);
    let namespaces: Api<Namespace> = Api::all(world.client.clone());
    namespaces.create(&PostParams::default(), &serde_json::from_value(json!({"metadata": {"name": namespace}}))?).await?;
    let accounts: Api<ServiceAccount> = Api::namespaced(world.client.clone(), &namespace);
    accounts.create(&PostParams::default(), &serde_json::from_value(json!({"metadata": {"name": RUNNER_SERVICE_ACCOUNT}}))?).await?;
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("", "v1", "Pod"), "pods");
    let pods: Api<DynamicObject> = Api::namespaced_with(world.as_operator()?, &namespace, &resource);
    let Pods { needs, good, also_good, bad } = corpus("pods.yaml")?;
    for need in &needs {
        let need: DynamicObject = serde_json::from_value(need.clone())?;
        let types = need.types.clone().unwrap_or_default();
        let (group, version) = types.api_version.split_once('/').context("a group")?;
        let kind = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, &types.kind));
        let all: Api<DynamicObject> = Api::all_with(world.client.clone(), &kind);
        all.patch(&need.name_any(), &PatchParams::apply("mayfly-e2e").force(), &Patch::Apply(&need)).await?;
    }
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    let make = async |pod: &Value| match pods.create(&dry, &serde_json::from_value(pod.clone())?).await {
        Ok(_) => anyhow::Ok(Ok(())),
        Err(kube::Error::Api(status)) => Ok(Err(status.message)),
        Err(error) => Err(error.into()),
    };
    let patched = |change: &Change| -> Result<Value> {
        let mut pod = good.clone();
        json_patch::patch(&mut pod, &change.patch).with_context(|| change.name.clone())?;
        Ok(pod)
    };
    if let Err(why) = make(&good).await? {
        anyhow::bail!("the pod as it is rendered is refused: {why}");
    }
    for change in &also_good {
        let result = make(&patched(change)?).await?;
        ensure!(result.is_ok(), "{}: refused: {}", change.name, result.err().unwrap_or_default());
    }
    for change in &bad {
        let wanted = change.why.as_deref().with_context(|| change.name.clone())?;
        match make(&patched(change)?).await? {
            Ok(()) => anyhow::bail!("{}: taken", change.name),
            Err(why) => ensure!(why.contains("ValidatingAdmissionPolicy 'mayfly-") && why.contains(wanted), "{}: {why}", change.name),
        }
    }
    ensure!(bad.len() >= 60 && also_good.len() >= 5, "{} bad and {} good pods", bad.len(), also_good.len());
    namespaces.delete(&namespace, &DeleteParams::background()).await?;
    Ok(())
}

/// What people and controllers do to runner pods that run, to sessions in them, and to network policies beside them.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_changes_enters_or_opens_runner_pods() -> Result<()> {
    let stage = Stage::set("entry").await?;
    let pool = stage.pool(|_| {}).await?;
    stage.hook()?;
    let other = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "other"}, "spec": {"terminationGracePeriodSeconds": 0,
        "securityContext": {"runAsNonRoot": true, "runAsUser": 1001, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [{"name": "runner", "image": "mayfly.test/gitea-runner:dev", "imagePullPolicy": "Never", "command": ["sleep", "600"],
            "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}}]}});
    stage.pod_api().create(&PostParams::default(), &serde_json::from_value(other)?).await?;
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "sleep 600"))], 1).await?;
    let pod = stage.a_pod("with its job", |pod| pod.annotations().contains_key(ANNOTATION_JOB)).await?.name_any();
    // Pod Security would refuse some of it first.
    let namespaces: Api<Namespace> = Api::all(stage.world.client.clone());
    let open = json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "privileged"}}});
    namespaces.patch(&stage.namespace, &PatchParams::default(), &Patch::Merge(open)).await?;
    let operator = operator_account();
    let fill = |text: &str| {
        text.replace("NAMESPACE", &stage.namespace)
            .replace("OPERATOR", &operator)
            .replace("OTHER", "other")
            .replace("POOL", POOL)
            .replace("POD", &pod)
    };
    let cases: Vec<Case> = corpus("others.yaml")?;
    for case in &cases {
        let mut kubectl = stage.world.cluster.kubectl();
        kubectl.args(["-n", &stage.namespace, "--request-timeout=20s"]);
        kubectl.args(case.user.iter().map(|user| format!("--as={}", fill(user))));
        kubectl.args(case.groups.iter().map(|group| format!("--as-group={group}")));
        kubectl.args(case.run.iter().map(|word| fill(word)));
        let said = match feed(&mut kubectl, &fill(case.input.as_deref().unwrap_or_default())) {
            Ok(_) => String::new(),
            Err(error) => format!("{error:#}"),
        };
        if case.by.is_empty() {
            ensure!(!said.contains("ValidatingAdmissionPolicy"), "{}: refused: {said}", case.name);
        } else {
            let told = case.by.iter().any(|by| said.contains(&format!("ValidatingAdmissionPolicy '{by}'")));
            let why = fill(case.why.as_deref().with_context(|| case.name.clone())?);
            ensure!(told && said.contains(&why), "{}: {said:?}", case.name);
        }
    }
    ensure!(cases.len() > 40, "{} cases", cases.len());
    // What the break-glass group did is told, for alice and what she did, by the pool.
    let events: Api<Event> = Api::namespaced(stage.world.client.clone(), &stage.namespace);
    let told = format!("alice: pods/exec of {}/{pod}", stage.namespace);
    eventually("the use of break-glass told", PATIENCE, || async {
        let found = events.list(&ListParams::default()).await?;
        let about = |event: &Event| event.reason.as_deref() == Some("BreakGlass") && event.note.as_deref() == Some(&told);
        Ok(found.items.iter().any(about).then_some(()))
    })
    .await?;
    ensure!(stage.job("app", jobs[0].id)?.status == "in_progress", "the job goes on");
    stage.pod_api().delete(&pod, &DeleteParams::default()).await?;
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

/// A mutating policy of the cluster that adds a sidecar, as a service mesh does: the pod is refused, and the pool says why.
#[tokio::test(flavor = "multi_thread")]
async fn a_mutated_runner_pod_is_refused_and_told() -> Result<()> {
    let stage = Stage::set("mutate").await?;
    let pool = stage.pool(|_| {}).await?;
    stage.hook()?;
    let kind = |kind: &str| ApiResource::from_gvk(&GroupVersionKind::gvk("admissionregistration.k8s.io", "v1", kind));
    let policies: Api<DynamicObject> = Api::all_with(stage.world.client.clone(), &kind("MutatingAdmissionPolicy"));
    let bindings: Api<DynamicObject> = Api::all_with(stage.world.client.clone(), &kind("MutatingAdmissionPolicyBinding"));
    let name = stage.namespace.clone();
    let sidecar = "[JSONPatch{op: 'add', path: '/spec/containers/-', value: Object.spec.containers{name: 'mesh', image: 'mesh:1', \
        securityContext: Object.spec.containers.securityContext{allowPrivilegeEscalation: false, \
        capabilities: Object.spec.containers.securityContext.capabilities{drop: ['ALL']}}}}]";
    let policy: DynamicObject =
        serde_json::from_value(json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": name}, "spec": {
        "failurePolicy": "Fail", "reinvocationPolicy": "Never",
        "matchConstraints": {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": stage.namespace}},
            "resourceRules": [{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"]}]},
        "mutations": [{"patchType": "JSONPatch", "jsonPatch": {"expression": sidecar}}]}}))?;
    policies.create(&PostParams::default(), &policy).await?;
    let binding = json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingAdmissionPolicyBinding",
        "metadata": {"name": name}, "spec": {"policyName": name}});
    bindings.create(&PostParams::default(), &serde_json::from_value(binding)?).await?;
    // The API server takes a policy into use a moment after it was made.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let jobs = stage.push("app", &[("ci.yml", &workflow("push", "true"))], 1).await?;
    let told = stage.event("PodRefused").await;
    bindings.delete(&name, &DeleteParams::default()).await?;
    policies.delete(&name, &DeleteParams::default()).await?;
    let told = told?;
    ensure!(told.contains("a mutating webhook or policy changed the runner pod") && told.contains("mesh"), "{told}");
    stage.succeeds("app", jobs[0].id).await?;
    stage.nothing_left(&pool).await?;
    stage.strike().await
}
