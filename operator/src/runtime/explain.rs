//! `mayfly explain`: reads a binding and the pods of its pools with the caller's own rights, and says what the broker will look at.

use std::io::Write as _;

use anyhow::{Context as _, Result, anyhow, ensure};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::events::v1::Event;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};
use mayfly_crds::CredentialBinding;
use mayfly_crds::names::{LABEL_POOL, managed_selector};

use super::connect;
use crate::cli::ExplainArgs;
use crate::credentials::{explain, pod_facts};

/// Most events that are shown.
const EVENTS: usize = 5;

/// Prints it.
pub(crate) async fn run_explain(args: ExplainArgs) -> Result<()> {
    super::install_tls_provider()?;
    let client = connect().await?;
    let namespace = args.namespace.unwrap_or_else(|| client.default_namespace().to_owned());
    let bindings: Api<CredentialBinding> = Api::namespaced(client.clone(), &namespace);
    let found = bindings.get_opt(&args.binding).await.context("CredentialBindings cannot be read")?;
    let binding = found.ok_or_else(|| anyhow!("there is no CredentialBinding {namespace}/{}; --namespace names another", args.binding))?;

    let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let listed = api.list(&ListParams::default().labels(&managed_selector())).await.context("pods cannot be listed")?;
    let wanted = |pod: &Pod| match &args.pod {
        Some(name) => pod.name_any() == *name,
        None => pod.labels().get(LABEL_POOL).is_some_and(|pool| binding.spec.pools.contains(pool)),
    };
    let pods: Vec<_> = listed.items.iter().filter(|pod| wanted(pod)).map(|pod| pod_facts(pod, |_| true)).collect();
    if let Some(name) = &args.pod {
        ensure!(!pods.is_empty(), "there is no runner pod {namespace}/{name}: it goes with its job");
    }
    let mut text = explain(&binding, &pods);
    text.push_str(
        &refusals(client, &namespace, &args.binding).await.unwrap_or_else(|error| format!("\nEvents cannot be listed: {error}\n")),
    );
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// The last refusals, as events of the binding tell them.
async fn refusals(client: Client, namespace: &str, binding: &str) -> Result<String, kube::Error> {
    let selector = format!("regarding.kind=CredentialBinding,regarding.name={binding}");
    let mut events = Api::<Event>::namespaced(client, namespace).list(&ListParams::default().fields(&selector)).await?.items;
    events.sort_by_key(|event| event.event_time.as_ref().map(|time| time.0));
    let last = events.iter().rev().take(EVENTS).map(|event| {
        let time = event.event_time.as_ref().map(|time| time.0.to_string()).unwrap_or_default();
        let (reason, note) = (event.reason.as_deref().unwrap_or_default(), event.note.as_deref().unwrap_or_default());
        format!("  {time}  {reason}: {note}\n")
    });
    let last: String = last.collect();
    Ok(if last.is_empty() { String::new() } else { format!("\nrefused lately\n{last}") })
}
