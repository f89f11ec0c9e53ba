//! The nodes that a pool's pods may be on, and what enforces policies there, as far as the cluster tells. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Node, Taint, Toleration};
use kube::ResourceExt;
use mayfly_crds::Runner;

/// Host paths under which network plugins put their programs and configuration.
const PLUGIN_PATHS: [&str; 3] = ["/etc/cni", "/opt/cni", "/var/lib/cni"];
/// The label that says what runs on a node; runner pods are for Linux.
const OS: &str = "kubernetes.io/os";
/// Digits of the boot ID that are told.
const BOOT_DIGITS: usize = 8;

/// A node that fits the pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PoolNode {
    /// Its name.
    pub(crate) name: String,
    /// What enforces policies there; whatever is proved holds for this.
    pub(crate) environment: String,
    /// It takes pods now.
    pub(crate) ready: bool,
}

/// The nodes that the pool's selector and tolerations allow.
pub(super) fn pool_nodes(nodes: &[Arc<Node>], daemon_sets: &[Arc<DaemonSet>], runner: &Runner) -> Vec<PoolNode> {
    let plugins = plugins(daemon_sets);
    let fits = |node: &&Arc<Node>| {
        let labels = node.labels();
        let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
        labels.get(OS).is_none_or(|os| os == "linux")
            && runner.node_selector.iter().all(|(key, value)| labels.get(key) == Some(value))
            && taints.filter(|taint| taint.effect != "PreferNoSchedule").all(|taint| {
                // They come and go with the node's state, which says whether it is ready.
                taint.key.starts_with("node.kubernetes.io/") || runner.tolerations.iter().any(|toleration| tolerates(toleration, taint))
            })
    };
    let mut found: Vec<PoolNode> = nodes
        .iter()
        .filter(fits)
        .map(|node| PoolNode { name: node.name_any(), environment: environment(node, &plugins), ready: is_ready(node) })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// Everything of a node that a pool looks at, for telling whether it changed.
pub(crate) fn looked_at(node: &Node) -> (String, bool, BTreeMap<String, String>, Vec<Taint>) {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default();
    (environment(node, ""), is_ready(node), node.labels().clone(), taints)
}

/// Whether this DaemonSet brings a network plugin: it writes where plugins are looked for.
pub(crate) fn is_plugin(daemon_set: &DaemonSet) -> bool {
    let template = daemon_set.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
    let volumes = template.and_then(|spec| spec.volumes.as_ref());
    let mut paths = volumes.into_iter().flatten().filter_map(|volume| volume.host_path.as_ref()).map(|host| host.path.as_str());
    paths.any(|path| PLUGIN_PATHS.iter().any(|plugin| path.starts_with(plugin)))
}

fn plugins(daemon_sets: &[Arc<DaemonSet>]) -> String {
    let mut found: Vec<String> = daemon_sets
        .iter()
        .filter(|set| is_plugin(set))
        .map(|set| format!(", {}/{}@{}", set.namespace().unwrap_or_default(), set.name_any(), set.metadata.generation.unwrap_or_default()))
        .collect();
    found.sort();
    found.concat()
}

fn environment(node: &Node, plugins: &str) -> String {
    let Some(info) = node.status.as_ref().and_then(|status| status.node_info.as_ref()) else { return plugins.to_owned() };
    let boot: String = info.boot_id.chars().take(BOOT_DIGITS).collect();
    format!("kernel {}, {}, kubelet {}, boot {boot}{plugins}", info.kernel_version, info.container_runtime_version, info.kubelet_version)
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let ready = conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True");
    ready && node.spec.as_ref().and_then(|spec| spec.unschedulable) != Some(true)
}

/// As the scheduler reads it.
fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = toleration.effect.as_deref().unwrap_or_default();
    let key = toleration.key.as_deref().unwrap_or_default();
    let value = match toleration.operator.as_deref() {
        Some("Exists") => true,
        None | Some("" | "Equal") => {
            !key.is_empty() && toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default()
        }
        Some(_) => false,
    };
    (effect.is_empty() || effect == taint.effect) && (key.is_empty() || key == taint.key) && value
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(name: &str, change: impl Fn(&mut Value)) -> Arc<Node> {
        let mut node = json!({
            "metadata": {"name": name, "labels": {"disk": "ssd"}}, "spec": {},
            "status": {"conditions": [{"type": "Ready", "status": "True"}], "nodeInfo": {
                "kernelVersion": "6.1", "containerRuntimeVersion": "containerd://2.1", "kubeletVersion": "v1.36.3", "bootID": "0123456789ab",
                "architecture": "", "kubeProxyVersion": "", "machineID": "", "operatingSystem": "", "osImage": "", "systemUUID": ""}},
        });
        change(&mut node);
        Arc::new(serde_json::from_value(node).expect("a node"))
    }

    fn plugin(generation: i64, path: &str) -> Arc<DaemonSet> {
        let set = json!({"metadata": {"name": "net", "namespace": "kube-system", "generation": generation},
            "spec": {"selector": {}, "template": {"spec": {"containers": [], "volumes": [{"name": "c", "hostPath": {"path": path}}]}}}});
        Arc::new(serde_json::from_value(set).expect("a DaemonSet"))
    }

    fn names(nodes: &[Arc<Node>], runner: Value) -> Vec<String> {
        let runner = serde_json::from_value(runner).expect("a runner");
        pool_nodes(nodes, &[], &runner).into_iter().map(|node| node.name).collect()
    }

    #[test]
    fn selector_and_taints_decide_and_the_state_of_a_node_does_not() {
        let taint = |effect: &str| json!([{"key": "gpu", "value": "a", "effect": effect}]);
        let nodes = [
            node("slow", |node| node["metadata"]["labels"]["disk"] = json!("hdd")),
            node("windows", |node| node["metadata"]["labels"][OS] = json!("windows")),
            node("tainted", |node| node["spec"]["taints"] = taint("NoSchedule")),
            node("preferred", |node| node["spec"]["taints"] = taint("PreferNoSchedule")),
            node("away", |node| node["spec"]["taints"] = json!([{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}])),
        ];
        assert_eq!(names(&nodes, json!({"nodeSelector": {"disk": "ssd"}})), ["away", "preferred"]);
        for (toleration, fits) in [
            (json!({"operator": "Exists"}), true),
            (json!({"key": "gpu", "operator": "Exists"}), true),
            (json!({"key": "gpu", "value": "a"}), true),
            (json!({"key": "gpu", "value": "a", "effect": "NoSchedule"}), true),
            (json!({"key": "gpu", "value": "b"}), false),
            (json!({"key": "gpu", "value": "a", "effect": "NoExecute"}), false),
            (json!({"key": "cpu", "operator": "Exists"}), false),
        ] {
            let found = names(&nodes[2..3], json!({"tolerations": [toleration]}));
            assert_eq!(!found.is_empty(), fits, "{toleration}");
        }
    }

    #[test]
    fn a_cordoned_or_failing_node_is_not_ready() {
        let ready = |change: fn(&mut Value)| pool_nodes(&[node("n", change)], &[], &Runner::default())[0].ready;
        assert!(ready(|_| {}));
        assert!(!ready(|node| node["spec"]["unschedulable"] = json!(true)));
        assert!(!ready(|node| node["status"]["conditions"][0]["status"] = json!("Unknown")));
    }

    #[test]
    fn a_new_kernel_runtime_boot_or_plugin_is_another_environment() {
        let of = |change: &dyn Fn(&mut Value), sets: &[Arc<DaemonSet>]| {
            pool_nodes(&[node("n", change)], sets, &Runner::default())[0].environment.clone()
        };
        let plain = of(&|_| {}, &[plugin(1, "/opt/cni/bin")]);
        assert_eq!(plain, "kernel 6.1, containerd://2.1, kubelet v1.36.3, boot 01234567, kube-system/net@1");
        for field in ["kernelVersion", "containerRuntimeVersion", "kubeletVersion", "bootID"] {
            assert_ne!(of(&|node| node["status"]["nodeInfo"][field] = json!("new"), &[plugin(1, "/opt/cni/bin")]), plain, "{field}");
        }
        assert_ne!(of(&|_| {}, &[plugin(2, "/etc/cni/net.d")]), plain);
        assert_eq!(of(&|_| {}, &[plugin(2, "/var/log")]), of(&|_| {}, &[]), "not a network plugin");
    }
}
