//! AWS's STS as moto has it, in a pod of the cluster: the shapes of AWS's own answers, behind which nothing is verified.

use std::fs;
use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use mayfly_cluster::Progress;
use mayfly_cluster::command::feed;
use mayfly_cluster::images::Recipe;
use mayfly_cluster::pki;
use serde_json::json;

use crate::World;
use crate::wait::eventually;
use crate::world::repository;

const NAMESPACE: &str = "mayfly-e2e-aws";
const NAME: &str = "moto";
const PORT: u16 = 5000;
const IMAGE: &str = "mayfly.test/moto:dev";

/// Has it run, and returns its address, for pods: `https://HOST:PORT`.
///
/// # Errors
/// When its image cannot be built, or it does not get ready.
pub async fn start(world: &World) -> Result<String> {
    let layout = world.cluster.layout();
    let source = repository().join("e2e/images/moto");
    let image = Recipe::new(&source, vec![source.clone()], Some(IMAGE))?.build(layout, &Progress::stderr())?;
    world.cluster.load_image(&image.archive)?;
    let host = format!("{NAME}.{NAMESPACE}.svc");
    let (certificate, key) = pki::server(layout, NAME, &[&host])?;
    let (labels, port) = (json!({"app": NAME}), json!({"name": "https", "port": PORT}));
    let container = json!({
        "name": NAME, "image": IMAGE, "imagePullPolicy": "Never", "env": [{"name": "HOME", "value": "/tmp"}],
        "args": ["--host", "0.0.0.0", "--port", PORT.to_string(), "--ssl-cert", "/tls/tls.crt", "--ssl-key", "/tls/tls.key"],
        "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1},
        "volumeMounts": [{"name": "tls", "mountPath": "/tls"}],
    });
    let wanted = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": NAME, "namespace": NAMESPACE}, "type": "kubernetes.io/tls",
            "stringData": {"tls.crt": fs::read_to_string(certificate)?, "tls.key": fs::read_to_string(key)?}},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": NAME, "namespace": NAMESPACE},
            "spec": {"selector": labels, "ports": [port]}},
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": NAME, "namespace": NAMESPACE, "labels": labels},
            "spec": {"automountServiceAccountToken": false, "enableServiceLinks": false, "containers": [container],
                "volumes": [{"name": "tls", "secret": {"secretName": NAME}}]}},
    ]});
    feed(world.cluster.kubectl().args(["apply", "-f", "-"]), &wanted.to_string())?;
    let pods: Api<Pod> = Api::namespaced(world.client.clone(), NAMESPACE);
    eventually("moto is ready", Duration::from_secs(60), || async {
        let status = pods.get(NAME).await?.status.unwrap_or_default();
        let ready = status.conditions.iter().flatten().any(|told| told.type_ == "Ready" && told.status == "True");
        Ok(ready.then_some(()))
    })
    .await?;
    Ok(format!("https://{host}:{PORT}"))
}
