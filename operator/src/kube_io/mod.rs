//! The one door for cluster writes: one field manager, one deadline, one place to count them.
#![expect(clippy::disallowed_methods, reason = "this is the door that the other rooms must use")]

use std::fmt::Debug;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::serde::Serialize;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::core::NamespaceResourceScope;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::runtime::metrics::Metrics;

mod connect;

pub(crate) use connect::connect;

/// Field manager of everything the controller applies.
pub(crate) const MANAGER: &str = "mayfly-controller";
/// Name of the webhook that is asked about break-glass use, in its configuration.
const WEBHOOK: &str = "break-glass.mayfly.dev";
/// Deadline of one call, retries of the client included.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Most calls at the same time. With more, the API server's priority and fairness refuses some (429), which costs it more than waiting.
const AT_ONCE: usize = 64;

/// A time as the API server stores it: whole seconds. With more, what is stored would differ from what was meant at every look.
pub(crate) fn stored_time(now: Timestamp) -> Time {
    Time(Timestamp::from_second(now.as_second()).unwrap_or(now))
}

/// The door.
#[derive(Clone)]
pub(crate) struct KubeIo {
    client: Client,
    instance: Option<String>,
    recorder: Recorder,
    metrics: Metrics,
    at_once: Arc<Semaphore>,
}

/// Why a write failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    /// The API server refused it.
    #[error("{0}")]
    Kube(#[from] kube::Error),
    /// No answer in time.
    #[error("the API server did not answer within {} s", TIMEOUT.as_secs())]
    Timeout,
}

impl WriteError {
    /// What the API server said, without the client's wrapping.
    pub(crate) fn message(&self) -> String {
        match self {
            Self::Kube(kube::Error::Api(status)) => status.message.clone(),
            other => other.to_string(),
        }
    }

    /// There is an object of that name already.
    pub(crate) fn already_exists(&self) -> bool {
        matches!(self, Self::Kube(kube::Error::Api(status)) if status.is_already_exists())
    }

    /// The object breaks a rule of its definition: no change of it is taken, its status included.
    pub(crate) fn is_invalid(&self) -> bool {
        matches!(self, Self::Kube(kube::Error::Api(status)) if status.code == 422)
    }

    fn is_gone(&self) -> bool {
        // A UID that no longer fits is a conflict: the object meant is gone, and another has its name.
        matches!(self, Self::Kube(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict())
    }
}

impl KubeIo {
    /// `instance` names this process in events.
    pub(crate) fn new(client: Client, instance: Option<String>, metrics: Metrics) -> Self {
        let recorder = Recorder::new(client.clone(), Reporter { controller: MANAGER.to_owned(), instance: instance.clone() });
        Self { client, instance, recorder, metrics, at_once: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    /// Name of this process.
    pub(crate) fn instance(&self) -> Option<&str> {
        self.instance.as_deref()
    }

    /// Creates an object under the name it has.
    pub(crate) async fn create<K>(&self, namespace: &str, object: &K) -> Result<K, WriteError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + Serialize + Debug,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
        self.call("create", &K::plural(&()), api.create(&params, object)).await
    }

    /// Deletes this very object (the UID must fit), with so many seconds between SIGTERM and SIGKILL if it is a pod. One that is
    /// gone is a success.
    pub(crate) async fn delete_this<K>(&self, namespace: &str, name: &str, uid: &str, grace: Option<u32>) -> Result<(), WriteError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + Debug,
    {
        let preconditions = Preconditions { uid: Some(uid.to_owned()), resource_version: None };
        let params = DeleteParams { grace_period_seconds: grace, preconditions: Some(preconditions), ..DeleteParams::default() };
        self.delete_with::<K>(namespace, name, &params).await
    }

    /// Sets annotations of a pod.
    pub(crate) async fn annotate_pod(
        &self,
        namespace: &str,
        name: &str,
        uid: &str,
        annotations: &[(&str, String)],
    ) -> Result<(), WriteError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let pairs: serde_json::Map<String, Value> =
            annotations.iter().map(|(key, value)| ((*key).to_owned(), Value::String(value.clone()))).collect();
        // The UID in the patch makes the API server refuse it for another pod of that name.
        let patch = Patch::Merge(json!({"metadata": {"uid": uid, "annotations": pairs}}));
        gone_is_fine(self.call("patch", "pods", api.patch_metadata(name, &PatchParams::default(), &patch)).await)
    }

    /// Server-side apply of a whole object; returns it as stored.
    pub(crate) async fn apply<K>(&self, namespace: &str, object: &K) -> Result<K, WriteError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + Serialize + Debug,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        let name = object.meta().name.clone().unwrap_or_default();
        let params = PatchParams::apply(MANAGER).force();
        self.call("apply", &K::plural(&()), api.patch(&name, &params, &Patch::Apply(object))).await
    }

    /// Deletes an object by name. One that is gone is a success.
    pub(crate) async fn delete<K>(&self, namespace: &str, name: &str) -> Result<(), WriteError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + Debug,
    {
        self.delete_with::<K>(namespace, name, &DeleteParams::default()).await
    }

    async fn delete_with<K>(&self, namespace: &str, name: &str, params: &DeleteParams) -> Result<(), WriteError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + Debug,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), namespace);
        gone_is_fine(self.call("delete", &K::plural(&()), api.delete(name, params)).await)
    }

    /// Replaces the status of an object. It is a merge patch, so that an object which cannot be read can be told so as well.
    pub(crate) async fn patch_status<K>(&self, namespace: &str, name: &str, status: &Value) -> Result<(), WriteError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + Debug,
    {
        let api: Api<kube::core::PartialObjectMeta<K>> = Api::namespaced(self.client.clone(), namespace);
        let patch = Patch::Merge(json!({ "status": status }));
        self.call("patch_status", &K::plural(&()), api.patch_status(name, &PatchParams::default(), &patch)).await.map(drop)
    }

    /// Asks the API server whose token this is.
    pub(crate) async fn review_token(&self, token: &str, audience: &str) -> Result<TokenReview, WriteError> {
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let review = TokenReview {
            spec: TokenReviewSpec { token: Some(token.to_owned()), audiences: Some(vec![audience.to_owned()]) },
            ..TokenReview::default()
        };
        self.call("create", "tokenreviews", api.create(&PostParams::default(), &review)).await
    }

    /// Tells the API server at which path of its Service a validating webhook answers, and by which authority (PEM) it is known.
    pub(crate) async fn point_webhook(&self, configuration: &str, path: &str, authority: &str) -> Result<(), WriteError> {
        let api: Api<ValidatingWebhookConfiguration> = Api::all(self.client.clone());
        let client = json!({"caBundle": ByteString(authority.as_bytes().to_vec()), "service": {"path": path}});
        // Lists are merged by the webhook's name.
        let patch = Patch::Strategic(json!({"webhooks": [{"name": WEBHOOK, "clientConfig": client}]}));
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        self.call("patch", "validatingwebhookconfigurations", api.patch(configuration, &params, &patch)).await.map(drop)
    }

    /// Publishes a warning about an object. A failure to do so is counted, not returned: events are a courtesy.
    pub(crate) async fn warn(&self, about: &ObjectReference, reason: &str, action: &str, note: &str) {
        let event = Event {
            type_: EventType::Warning,
            reason: reason.to_owned(),
            note: Some(mayfly_crds::conditions::truncate(note, 1024)),
            action: action.to_owned(),
            secondary: None,
        };
        let publish = async { self.recorder.publish(&event, about).await };
        if let Err(error) = self.call("create", "events", publish).await {
            tracing::warn!(%error, reason, "an event could not be published");
        }
    }

    /// The client, for reads and watches.
    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }

    async fn call<T>(
        &self,
        verb: &'static str,
        resource: &str,
        call: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, WriteError> {
        // It is never closed.
        let _turn = self.at_once.acquire().await;
        let result = match tokio::time::timeout(TIMEOUT, call).await {
            Ok(result) => result.map_err(WriteError::from),
            Err(_) => Err(WriteError::Timeout),
        };
        self.metrics.kube_write(verb, resource, result.is_ok());
        result
    }
}

fn gone_is_fine<T>(result: Result<T, WriteError>) -> Result<(), WriteError> {
    match result {
        Ok(_) => Ok(()),
        Err(error) if error.is_gone() => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
pub(crate) mod scripted;
#[cfg(test)]
mod tests;
