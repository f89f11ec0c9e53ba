//! CredentialBindings of tests.

use std::time::Duration;

use anyhow::{Context, Result};
use kube::Api;
use kube::api::{Patch, PatchParams};
use mayfly_crds::CredentialBinding;
use serde_json::Value;

use crate::World;
use crate::wait::eventually;

/// Applies a binding, and waits until it can be used.
///
/// # Errors
/// With the API server's answer, or when it does not get ready.
pub async fn bind(world: &World, binding: &Value) -> Result<()> {
    let text = |field: &str| binding["metadata"][field].as_str().with_context(|| format!("a {field}"));
    let (name, namespace) = (text("name")?, text("namespace")?);
    let bindings: Api<CredentialBinding> = Api::namespaced(world.client.clone(), namespace);
    bindings.patch(name, &PatchParams::apply("mayfly-e2e").force(), &Patch::Apply(binding)).await?;
    eventually("the binding is ready", Duration::from_secs(20), || async {
        let told = bindings.get(name).await?.status.unwrap_or_default().conditions;
        Ok(told.iter().any(|told| told.type_ == "Ready" && told.status == "True").then_some(()))
    })
    .await
}
