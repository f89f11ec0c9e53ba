//! The controller's part in credentials: what bindings tell, and for which pools there are any.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use jiff::Timestamp;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use mayfly_crds::CredentialBinding;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::watches::{strip, watch};
use crate::credentials::{Guarded, status};
use crate::kube_io::{KubeIo, stored_time};
use crate::pool::{Deaf, PoolKey, Pools};

/// After a status that could not be written.
const RETRY: Duration = Duration::from_secs(5);

type Bindings = Store<Guarded<CredentialBinding>>;

/// Watches bindings, wakes the pools they name, and keeps their status. `trusted` are the issuers of the configuration.
pub(super) fn start(
    client: &Client,
    io: &KubeIo,
    registry: &Arc<Pools>,
    trusted: Vec<String>,
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
        if !gone {
            // The receiver lives as long as the process: an error means it is ending.
            let _ = changed.send((namespace, binding.name_any()));
        }
    };
    let never = Arc::new(Deaf::default());
    let all = Api::<Guarded<CredentialBinding>>::all(client.clone());
    let bindings = watch(parts, stop, "bindings", &never, all, watcher::Config::default(), strip, touched);
    let (store, io, stop) = (bindings.clone(), io.clone(), stop.clone());
    parts.spawn(async move {
        let told = async {
            while let Some((namespace, name)) = changes.recv().await {
                let Some(binding) = store.get(&ObjectRef::new(&name).within(&namespace)) else { continue };
                let Some(new) = status(&binding, &trusted, &stored_time(Timestamp::now())) else { continue };
                match io.patch_status::<CredentialBinding>(&namespace, &name, &json!(new)).await {
                    Ok(()) => {}
                    // It breaks a rule of its definition, and no change of it is taken until that is mended.
                    Err(error) if error.is_invalid() => {
                        tracing::warn!(namespace, name, error = error.message(), "a binding breaks its rules")
                    }
                    Err(error) => {
                        tracing::warn!(namespace, name, error = error.message(), "the status of a binding could not be written");
                        tokio::time::sleep(RETRY).await;
                        let _ = again.send((namespace, name));
                    }
                }
            }
        };
        tokio::select! { () = told => {}, () = stop.cancelled() => {} }
        Ok("bindings' status")
    });
    bindings
}
