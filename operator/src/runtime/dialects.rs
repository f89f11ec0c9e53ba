//! Follows kinds that a cluster may have or not, and may get or lose while the process runs.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use futures::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::Api;
use kube::core::PartialObjectMeta;
use kube::runtime::reflector::store::Writer;
use kube::runtime::watcher::{self, Event, watcher};
use kube::runtime::{WatchStreamExt, reflector};
use kube::{Client, Resource, ResourceExt};
use mayfly_crds::names::{LABEL_POOL, managed_selector};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::isolation::CiliumNetworkPolicy;
use crate::pool::{Dialects, PoolKey, Pools};

/// How often the API server is asked for a kind that it does not serve.
const LOOK: Duration = Duration::from_secs(120);
/// Where Cilium's agents have their settings, and the one of them that says whether they know host names.
const CILIUM_CONFIG: &str = "cilium-config";
const L7_PROXY: &str = "enable-l7-proxy";
/// After a call that failed.
const RETRY: Duration = Duration::from_secs(5);

/// Starts to follow the pools' policies in Cilium's dialect. Where it comes, goes or changes, pools look again.
pub(super) fn start(
    client: &Client,
    cilium_namespace: &str,
    registry: &Arc<Pools>,
    parts: &mut JoinSet<Result<&'static str>>,
    stop: &CancellationToken,
) -> Arc<Dialects> {
    let writer = Writer::default();
    let dialects = Arc::new(Dialects::new(writer.as_reader()));
    let following = futures::future::join(
        follow(client.clone(), registry.clone(), dialects.clone(), writer),
        follow_settings(Api::namespaced(client.clone(), cilium_namespace), registry.clone(), dialects.clone()),
    );
    let stop = stop.clone();
    parts.spawn(async move {
        tokio::select! { ((), ()) = following => {}, () = stop.cancelled() => {} }
        Ok("dialects")
    });
    dialects
}

async fn follow(client: Client, registry: Arc<Pools>, dialects: Arc<Dialects>, mut writer: Writer<PartialObjectMeta<CiliumNetworkPolicy>>) {
    loop {
        let served = match served(&client).await {
            Ok(served) => served,
            Err(error) => {
                tracing::warn!(%error, "the API server does not say whether it has Cilium's policies");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        let tell = |served: bool| {
            if dialects.note_cilium(served) {
                tracing::info!(served, "CiliumNetworkPolicy");
                registry.all().iter().for_each(|handle| registry.wake(handle.key.clone()));
            }
        };
        if !served {
            tell(false);
            tokio::time::sleep(LOOK).await;
            continue;
        }
        let config = watcher::Config::default().labels(&managed_selector());
        let mut events = watcher(Api::<PartialObjectMeta<CiliumNetworkPolicy>>::all(client.clone()), config).boxed();
        // An error may mean that the kind is gone: that is asked before the watch begins anew.
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => {
                    writer.apply_watcher_event(&event);
                    match &event {
                        Event::Apply(policy) | Event::Delete(policy) => {
                            if let (Some(namespace), Some(name)) = (policy.namespace(), policy.labels().get(LABEL_POOL)) {
                                registry.wake(PoolKey { namespace, name: name.clone() });
                            }
                        }
                        // Not before: what is there and no longer wanted has to be known when pools look.
                        Event::InitDone => tell(true),
                        Event::Init | Event::InitApply(_) => {}
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "watch of Cilium's policies");
                    // Where it may not be watched it may not be applied either, which the pools tell.
                    tell(true);
                    break;
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Follows Cilium's settings, where it has any that may be read: an agent whose proxy is off takes no policy about names.
async fn follow_settings(api: Api<ConfigMap>, registry: Arc<Pools>, dialects: Arc<Dialects>) {
    let config = watcher::Config::default().fields(&format!("metadata.name={CILIUM_CONFIG}"));
    let (reader, writer) = reflector::store();
    let mut changes = std::pin::pin!(reflector::reflector(writer, watcher(api, config)).default_backoff());
    while let Some(event) = changes.next().await {
        if let Err(error) = event {
            tracing::warn!(%error, "watch of Cilium's settings");
            continue;
        }
        if dialects.note_proxy(reader.state().iter().all(|settings| has_proxy(settings))) {
            tracing::info!("Cilium's L7 proxy was turned on or off");
            registry.all().iter().for_each(|handle| registry.wake(handle.key.clone()));
        }
    }
}

/// It is on where nothing is said.
fn has_proxy(settings: &ConfigMap) -> bool {
    settings.data.as_ref().and_then(|data| data.get(L7_PROXY)).is_none_or(|value| value != "false")
}

/// Whether the API server has Cilium's policies. That it has not is normal.
async fn served(client: &Client) -> Result<bool, kube::Error> {
    match client.list_api_group_resources(&CiliumNetworkPolicy::api_version(&())).await {
        Ok(list) => Ok(list.resources.iter().any(|resource| resource.name == CiliumNetworkPolicy::plural(&()))),
        // The answer for a group that there is not is plain text and carries no reason.
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::kube_io::scripted::{Answer, Server};

    #[tokio::test]
    async fn a_cluster_without_the_group_or_the_kind_has_it_not_and_trouble_is_no_answer() {
        let group = |kinds: &[&str]| {
            let resources: Vec<_> = kinds
                .iter()
                .map(|name| json!({"name": name, "singularName": "", "namespaced": true, "kind": "K", "verbs": ["list"]}))
                .collect();
            Answer::Object(json!({"kind": "APIResourceList", "groupVersion": "cilium.io/v2", "resources": resources}))
        };
        let answers = [
            Answer::Text(404, "404 page not found"),
            Answer::Refusal(404, "NotFound"),
            group(&["ciliumnodes"]),
            group(&["ciliumnodes", "ciliumnetworkpolicies"]),
        ];
        let client = Server::new(answers).client();
        for has in [false, false, false, true] {
            assert_eq!(served(&client).await.ok(), Some(has));
        }
        assert!(served(&client).await.is_err());
    }
}
