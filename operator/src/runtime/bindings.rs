//! The controller's part in credentials: what bindings tell, and for which pools there are any.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use jiff::Timestamp;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher;
use kube::{Api, Client, Resource, ResourceExt};
use mayfly_crds::CredentialBinding;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::watches::{strip, watch};
use crate::audit::{Action, Audit, Event, of_spec};
use crate::credentials::{Configured, Guarded, status};
use crate::kube_io::{KubeIo, stored_time};
use crate::pool::{Deaf, PoolKey, Pools};

/// After a status that could not be written.
const RETRY: Duration = Duration::from_secs(5);

/// A binding that is new, other than it was, or gone.
struct Change {
    namespace: String,
    name: String,
    gone: bool,
}

/// What there is to record of a binding, by the generation that was last recorded, by this process or, as its status says, an earlier one.
fn record(
    recorded: &mut HashMap<(String, String), i64>,
    io: &KubeIo,
    (namespace, name): (&str, &str),
    binding: Option<&Guarded<CredentialBinding>>,
) -> Option<Event> {
    let key = (namespace.to_owned(), name.to_owned());
    let event = |action, uid: Option<&String>| {
        let target = json!({"kind": "CredentialBinding", "name": name, "uid": uid});
        Event::of_controller(io.instance(), action, namespace, None, target)
    };
    let Some(binding) = binding else {
        recorded.remove(&key);
        return Some(event(Action::BindingDeleted, None));
    };
    let generation = binding.meta().generation?;
    let stored = binding.0.as_ref().ok().and_then(|binding| binding.status.as_ref()?.observed_generation);
    let before = recorded.insert(key, generation).or(stored);
    let action = of_spec(before, generation, Action::BindingCreated, Action::BindingChanged)?;
    let spec = binding.0.as_ref().ok().map(|binding| &binding.spec);
    Some(event(action, binding.meta().uid.as_ref()).about(json!({"generation": generation, "spec": spec}), spec.is_some()))
}

type Bindings = Store<Guarded<CredentialBinding>>;

/// Watches bindings, wakes the pools they name, and keeps their status.
pub(super) fn start(
    client: &Client,
    io: &KubeIo,
    audit: &Audit,
    registry: &Arc<Pools>,
    known: Configured,
    parts: &mut JoinSet<Result<&'static str>>,
    stop: &CancellationToken,
) -> Bindings {
    let (changed, mut changes) = mpsc::unbounded_channel();
    let (registry, again) = (registry.clone(), changed.clone());
    let touched = move |binding: &Guarded<CredentialBinding>, gone: bool| {
        let namespace = binding.namespace().unwrap_or_default();
        for name in binding.0.iter().flat_map(|binding| &binding.spec.pools) {
            registry.wake(PoolKey { namespace: namespace.clone(), name: name.clone() });
        }
        // The receiver lives as long as the process: an error means it is ending.
        let _ = changed.send(Change { namespace, name: binding.name_any(), gone });
    };
    let never = Arc::new(Deaf::default());
    let all = Api::<Guarded<CredentialBinding>>::all(client.clone());
    let bindings = watch(parts, stop, "bindings", &never, all, watcher::Config::default(), strip, touched);
    let (store, io, audit, stop) = (bindings.clone(), io.clone(), audit.clone(), stop.clone());
    parts.spawn(async move {
        let told = async {
            let mut recorded = HashMap::new();
            while let Some(Change { namespace, name, gone }) = changes.recv().await {
                let binding = store.get(&ObjectRef::new(&name).within(&namespace)).filter(|_| !gone);
                // What is asked about again may be gone meanwhile, of which the watch tells by itself.
                if binding.is_none() && !gone {
                    continue;
                }
                if let Some(event) = record(&mut recorded, &io, (&namespace, &name), binding.as_deref()) {
                    audit.tell(&event).await;
                }
                let Some(binding) = binding else { continue };
                let Some(new) = status(&binding, &known, &stored_time(Timestamp::now())) else { continue };
                match io.patch_status::<CredentialBinding>(&namespace, &name, &json!(new)).await {
                    Ok(()) => {}
                    // It breaks a rule of its definition, and no change of it is taken until that is mended.
                    Err(error) if error.is_invalid() => {
                        tracing::warn!(namespace, name, error = error.message(), "a binding breaks its rules")
                    }
                    Err(error) => {
                        tracing::warn!(namespace, name, error = error.message(), "the status of a binding could not be written");
                        tokio::time::sleep(RETRY).await;
                        let _ = again.send(Change { namespace, name, gone: false });
                    }
                }
            }
        };
        tokio::select! { () = told => {}, () = stop.cancelled() => {} }
        Ok("bindings' status")
    });
    bindings
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::kube_io::scripted::Server;
    use crate::runtime::metrics::Metrics;

    fn binding(generation: i64, observed: Option<i64>) -> Guarded<CredentialBinding> {
        let binding = json!({
            "apiVersion": "mayfly.dev/v1alpha1", "kind": "CredentialBinding",
            "metadata": {"name": "deploy", "namespace": "ci", "uid": "b-1", "generation": generation},
            "spec": {
                "pools": ["linux"], "token": {"issuer": "https://issuer.example", "audience": "deploy.example"},
                "subject": {"claims": {"repository_id": {"exact": "42"}}}, "provider": {"audienceToken": {}},
            },
            "status": {"observedGeneration": observed},
        });
        serde_json::from_value(binding).expect("a binding")
    }

    #[tokio::test]
    async fn a_binding_is_recorded_when_it_is_new_other_than_it_was_or_gone() {
        let io = KubeIo::new(Server::new([]).client(), Some("pod-1".to_owned()), Metrics::new());
        let mut recorded = HashMap::new();
        let mut told = |binding: Option<&Guarded<CredentialBinding>>| {
            let event = record(&mut recorded, &io, ("ci", "deploy"), binding)?;
            let event = json!(event);
            assert_eq!((&event["actor"]["name"], &event["scope"]["namespace"]), (&json!("pod-1"), &json!("ci")));
            Some(json!([event["action"], event["payload"]["generation"]]))
        };
        let steps: [(Option<Guarded<CredentialBinding>>, Option<Value>); 6] = [
            (Some(binding(1, None)), Some(json!(["binding.created", 1]))),
            (Some(binding(1, Some(1))), None),
            (Some(binding(2, Some(1))), Some(json!(["binding.changed", 2]))),
            (Some(binding(2, Some(2))), None),
            (None, Some(json!(["binding.deleted", null]))),
            // An earlier process told of this one.
            (Some(binding(5, Some(5))), None),
        ];
        for (n, (binding, wanted)) in steps.into_iter().enumerate() {
            assert_eq!(told(binding.as_ref()), wanted, "step {n}");
        }
    }
}
