//! What the process watches, each once for all pools, stripped of what nobody reads.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;

use anyhow::{Result, anyhow};
use futures::{Stream, StreamExt};
use k8s_openapi::api::apps::v1::{DaemonSet, DaemonSetSpec};
use k8s_openapi::api::core::v1::{Node, NodeStatus, Pod, PodSpec, PodTemplateSpec, ResourceQuota, Secret};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::Api;
use kube::runtime::reflector::{self, Store, store::Writer};
use kube::runtime::watcher::{self, Event, watcher};
use kube::runtime::{WatchStreamExt, predicates};
use kube::{Client, Resource, ResourceExt};
use mayfly_crds::names::{LABEL_POOL, managed_selector};
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::pool::{Deaf, Guarded, PoolHandle, PoolKey, Pools, looked_at, parts};
use crate::runner::phase;

/// The caches.
#[derive(Clone)]
pub(super) struct Stores {
    pub(super) pools: Store<Guarded>,
    pub(super) pods: Store<Pod>,
    pub(super) secrets: Store<Secret>,
    pub(super) policies: Store<NetworkPolicy>,
    pub(super) nodes: Store<Node>,
    pub(super) daemon_sets: Store<DaemonSet>,
    pub(super) quotas: Store<ResourceQuota>,
    pub(super) api_endpoints: Store<EndpointSlice>,
}

impl Stores {
    /// Waits until every cache but the pools' was filled once.
    pub(super) async fn wait_but_root(&self) -> Result<()> {
        let ended = |_| anyhow!("a watch ended before it began");
        self.pods.wait_until_ready().await.map_err(ended)?;
        self.secrets.wait_until_ready().await.map_err(ended)?;
        self.policies.wait_until_ready().await.map_err(ended)?;
        self.nodes.wait_until_ready().await.map_err(ended)?;
        self.daemon_sets.wait_until_ready().await.map_err(ended)?;
        self.quotas.wait_until_ready().await.map_err(ended)?;
        self.api_endpoints.wait_until_ready().await.map_err(ended)
    }
}

/// Starts the watches. The stream is the pools' own, which the controller drives.
pub(super) fn start(
    client: &Client,
    namespace: &str,
    registry: &Arc<Pools>,
    deaf: &Arc<Deaf>,
    parts: &mut JoinSet<Result<&'static str>>,
    stop: &CancellationToken,
) -> (Stores, impl Stream<Item = Result<Guarded, watcher::Error>> + Send + 'static + use<>) {
    let managed = watcher::Config::default().labels(&managed_selector());
    let (pools, writer) = reflector::store();
    let root = watcher(Api::<Guarded>::all(client.clone()), watcher::Config::default())
        .default_backoff()
        .modify(|pool| pool.managed_fields_mut().clear())
        .reflect(writer)
        .applied_objects()
        .predicate_filter(combined(), kube::runtime::PredicateConfig::default());

    let never = Arc::new(Deaf::default());
    let wake_of = |registry: &Arc<Pools>| {
        let registry = registry.clone();
        move |namespace: Option<String>, pool: Option<&String>| {
            if let (Some(namespace), Some(name)) = (namespace, pool) {
                registry.wake(PoolKey { namespace, name: name.clone() });
            }
        }
    };
    let wake = wake_of(registry);
    let mut phases = HashMap::new();
    let all = Api::<Pod>::all(client.clone());
    let pods = watch(parts, stop, "pods", deaf, all, managed.clone(), strip_pod, move |pod: &Pod, gone: bool| {
        // A pod says a dozen things while it starts; a pass is due when one of them changes what is to be done.
        let before = match gone {
            true => phases.remove(&pod.uid()),
            false => phases.insert(pod.uid(), phase(pod)),
        };
        if gone || before.is_some_and(|before| before != phase(pod)) {
            wake(pod.namespace(), pod.labels().get(LABEL_POOL));
        }
    });
    let wake = wake_of(registry);
    let all = Api::<NetworkPolicy>::all(client.clone());
    let policies = watch(parts, stop, "policies", &never, all, managed, strip, move |policy: &NetworkPolicy, _| {
        wake(policy.namespace(), policy.labels().get(LABEL_POOL));
    });
    // A token that comes late or changes: every pool looks again.
    let all = registry.clone();
    let secrets = watch(
        parts,
        stop,
        "secrets",
        &never,
        Api::<Secret>::namespaced(client.clone(), namespace),
        watcher::Config::default(),
        strip,
        move |_: &Secret, _| all.all().iter().for_each(|handle| all.wake(handle.key.clone())),
    );
    // A node or a network plugin that is new or changed: every pool looks whether it has something to prove there.
    let (all, mut seen) = (registry.clone(), HashMap::new());
    let changed = move |node: &Node, gone: bool| {
        let now = (!gone).then(|| looked_at(node));
        if seen.insert(node.name_any(), now.clone()) != Some(now) {
            all.all().iter().for_each(|handle| all.wake(handle.key.clone()));
        }
    };
    let nodes = watch(parts, stop, "nodes", &never, Api::<Node>::all(client.clone()), watcher::Config::default(), strip_node, changed);
    let (all, mut seen) = (registry.clone(), HashMap::new());
    let changed = move |set: &DaemonSet, gone: bool| {
        let now = (!gone).then_some(set.metadata.generation);
        if seen.insert((set.namespace(), set.name_any()), now) != Some(now) {
            all.all().iter().for_each(|handle| all.wake(handle.key.clone()));
        }
    };
    let sets = Api::<DaemonSet>::all(client.clone());
    let daemon_sets = watch(parts, stop, "DaemonSets", &never, sets, watcher::Config::default(), strip_daemon_set, changed);
    // A quota that leaves more than before: pools of its namespace may make pods that it kept away. That they use it up is no news to them.
    let (all, mut seen) = (registry.clone(), HashMap::new());
    let changed = move |quota: &ResourceQuota, gone: bool| {
        let before = match gone {
            true => seen.remove(&quota.uid()),
            false => seen.insert(quota.uid(), quota.clone()),
        };
        if gone || before.is_none_or(|before| leaves_more(&before, quota)) {
            let of_namespace = |handle: &&Arc<PoolHandle>| Some(&handle.key.namespace) == quota.metadata.namespace.as_ref();
            all.all().iter().filter(of_namespace).for_each(|handle| all.wake(handle.key.clone()));
        }
    };
    let quotas = Api::<ResourceQuota>::all(client.clone());
    let quotas = watch(parts, stop, "ResourceQuotas", &never, quotas, watcher::Config::default(), strip_quota, changed);
    // By RBAC this one object and no other.
    let own = watcher::Config::default().fields("metadata.name=kubernetes");
    let api = Api::<EndpointSlice>::namespaced(client.clone(), "default");
    let api_endpoints = watch(parts, stop, "API server's endpoints", &never, api, own, strip, |_: &EndpointSlice, _| {});
    (Stores { pools, pods, secrets, policies, nodes, daemon_sets, quotas, api_endpoints }, root)
}

fn combined() -> impl kube::runtime::Predicate<Guarded> {
    use kube::runtime::Predicate;
    // Generation alone would swallow the update that adds the finalizer.
    predicates::generation.combine(predicates::finalizers)
}

/// One reflector as a part of the process, which begins anew where it is told that it hears nothing; `touched` sees every object that came
/// or changed, and (with true) every one that went.
pub(super) fn watch<K>(
    parts: &mut JoinSet<Result<&'static str>>,
    stop: &CancellationToken,
    name: &'static str,
    deaf: &Arc<Deaf>,
    api: Api<K>,
    config: watcher::Config,
    strip: fn(&mut K),
    mut touched: impl FnMut(&K, bool) + Send + Sync + 'static,
) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    K::DynamicType: Eq + Hash + Clone + Default,
{
    let mut writer = Writer::<K>::default();
    let store = writer.as_reader();
    let (stop, deaf) = (stop.clone(), deaf.clone());
    parts.spawn(async move {
        loop {
            let mut stream = watcher(api.clone(), config.clone()).default_backoff().modify(strip).boxed();
            let watching = async {
                while let Some(event) = stream.next().await {
                    let event = match event {
                        Ok(event) => event,
                        Err(error) => {
                            tracing::warn!(%error, "watch of {name}");
                            continue;
                        }
                    };
                    writer.apply_watcher_event(&event);
                    match &event {
                        Event::Apply(object) | Event::InitApply(object) => touched(object, false),
                        Event::Delete(object) => touched(object, true),
                        Event::Init | Event::InitDone => {}
                    }
                }
            };
            tokio::select! {
                () = watching => return Ok(name),
                () = stop.cancelled() => return Ok(name),
                () = deaf.told() => tracing::warn!("the watch of {name} hears nothing; it begins anew"),
            }
        }
    });
    store
}

pub(super) fn strip<K: Resource>(object: &mut K) {
    object.meta_mut().managed_fields = None;
}

/// Of a pod: who it is, where it is, and how it fares.
pub(super) fn strip_pod(pod: &mut Pod) {
    strip(pod);
    pod.spec = pod.spec.take().map(|spec| PodSpec { node_name: spec.node_name, ..PodSpec::default() });
}

/// Of a node: whether it takes pods, where it is, what runs it, and what its runtime can do.
fn strip_node(node: &mut Node) {
    strip(node);
    node.metadata.annotations = None;
    if let Some(status) = &mut node.status {
        *status = NodeStatus {
            addresses: status.addresses.take(),
            conditions: status.conditions.take(),
            node_info: status.node_info.take(),
            runtime_handlers: status.runtime_handlers.take(),
            ..NodeStatus::default()
        };
    }
}

/// Of a quota: what it bounds, and what is used.
fn strip_quota(quota: &mut ResourceQuota) {
    strip(quota);
    quota.metadata.annotations = None;
    quota.metadata.labels = None;
}

/// Whether there may be room that was not there before: other bounds, or less used of something.
fn leaves_more(before: &ResourceQuota, now: &ResourceQuota) -> bool {
    let hard = |quota: &ResourceQuota| (quota.spec.clone(), quota.status.as_ref().and_then(|status| status.hard.clone()));
    let used = |quota: &ResourceQuota| quota.status.as_ref().and_then(|status| status.used.clone()).unwrap_or_default();
    let (was, is) = (used(before), used(now));
    let less = |(name, amount): (&String, &Quantity)| parts(amount) > is.get(name).and_then(parts);
    hard(before) != hard(now) || was.iter().any(less)
}

/// Of a DaemonSet: its volumes, which tell a network plugin.
fn strip_daemon_set(set: &mut DaemonSet) {
    strip(set);
    set.metadata.annotations = None;
    set.status = None;
    let volumes = set.spec.take().and_then(|spec| spec.template.spec).and_then(|spec| spec.volumes);
    let spec = PodSpec { volumes, ..PodSpec::default() };
    set.spec = Some(DaemonSetSpec { template: PodTemplateSpec { spec: Some(spec), metadata: None }, ..DaemonSetSpec::default() });
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn pools_are_woken_by_a_quota_that_leaves_more() {
        let quota = |hard: &str, used: Value| {
            let quota =
                json!({"metadata": {"name": "q"}, "spec": {"hard": {"pods": hard}}, "status": {"hard": {"pods": hard}, "used": used}});
            serde_json::from_value::<ResourceQuota>(quota).expect("a quota")
        };
        let (two, three) = (quota("5", json!({"pods": "2"})), quota("5", json!({"pods": "3"})));
        assert!(leaves_more(&three, &two) && !leaves_more(&two, &three) && !leaves_more(&two, &two));
        assert!(leaves_more(&two, &quota("6", json!({"pods": "2"}))), "other bounds");
        assert!(!leaves_more(&quota("5", json!({"pods": "2000m"})), &two), "the same, spelled otherwise");
    }
}
