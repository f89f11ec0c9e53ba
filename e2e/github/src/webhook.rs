//! Delivers webhooks.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use ureq::Agent;

use crate::keys::webhook_signatures;
use crate::server::Forge;

/// How long a receiver may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Delivers what comes in, one after another, and notes the answers. There is no second try, unless somebody asks for it.
pub(crate) async fn deliver(forge: Arc<Forge>, mut guids: UnboundedReceiver<String>) {
    let agent = crate::http::agent(&[], PATIENCE);
    while let Some(guid) = guids.recv().await {
        let found = {
            let world = forge.world();
            let delivery = world.deliveries.get(&guid).cloned();
            let hook = delivery.as_ref().and_then(|delivery| world.hooks.iter().find(|hook| hook.id == delivery.hook)).cloned();
            let place = hook.as_ref().and_then(|hook| world.organizations.get(&hook.organization.as_ref()?.to_lowercase())).map(|of| of.id);
            delivery.zip(hook).map(|(delivery, hook)| (delivery, hook, place))
        };
        let Some((delivery, hook, place)) = found else { continue };
        let agent: Agent = agent.clone();
        let sent = tokio::task::spawn_blocking(move || {
            let (sha256, sha1) = webhook_signatures(&hook.secret, delivery.body.as_bytes());
            let request = agent
                .post(&hook.url)
                .header("content-type", "application/json")
                .header("user-agent", "GitHub-Hookshot/simulator")
                .header("accept", "*/*")
                .header("x-github-event", "workflow_job")
                .header("x-github-delivery", &delivery.guid)
                .header("x-github-hook-id", hook.id.to_string())
                .header("x-github-hook-installation-target-type", if hook.organization.is_some() { "organization" } else { "integration" })
                .header("x-github-hook-installation-target-id", place.unwrap_or(hook.id).to_string())
                .header("x-hub-signature", format!("sha1={sha1}"))
                .header("x-hub-signature-256", format!("sha256={sha256}"));
            request.send(delivery.body.as_bytes()).map(|response| response.status().as_u16()).unwrap_or_default()
        });
        let status = sent.await.unwrap_or_default();
        if let Some(delivery) = forge.world().deliveries.get_mut(&guid) {
            delivery.attempts += 1;
            delivery.status = Some(status);
        }
    }
}
