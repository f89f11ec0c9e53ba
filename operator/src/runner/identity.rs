//! Whose pod is calling: a projected, audience-bound, pod-bound token, checked by the API server.
//!
//! Source: Kubernetes "Managing Service Accounts", section on bound tokens: a TokenReview of a bound token returns the pod's name
//! and UID in `user.extra`. Where they are missing, nobody is let in.

use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenReview, UserInfo};
use mayfly_crds::names::RUNNER_SERVICE_ACCOUNT;
use tokio::sync::Semaphore;

use crate::digest::sha256;
use crate::kube_io::{KubeIo, WriteError};

const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
/// Told since Kubernetes 1.30.
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
/// Longest token looked at, in bytes.
const MAX_TOKEN: usize = 8 << 10;
/// Reviews at the same time: what is not authenticated yet must not become a load on the API server.
const REVIEWS: usize = 32;
/// How long a review's result is remembered. Whether the pod still lives is checked at every call, from the watch.
const REMEMBER: Duration = Duration::from_secs(300);

/// A pod that proved who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodIdentity {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
}

/// Whose token it is, as the API server says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    /// The whole user name.
    account: String,
    /// Name and UID of the pod that the token is bound to.
    pod: Option<(String, String)>,
    /// The node of that pod.
    pub(crate) node: Option<String>,
}

/// Why a caller is not let in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IdentityError {
    /// No, a wrong, or a foreign token.
    #[error("{0}")]
    Refused(&'static str),
    /// The API server could not be asked.
    #[error("the API server could not be asked: {0}")]
    Unavailable(#[from] WriteError),
}

/// Checks tokens.
pub(crate) struct Identities {
    io: KubeIo,
    audience: &'static str,
    known: moka::sync::Cache<[u8; 32], Caller>,
    reviews: Semaphore,
}

impl Identities {
    /// For tokens that are meant for `audience`.
    pub(crate) fn new(io: KubeIo, audience: &'static str) -> Self {
        let known = moka::sync::Cache::builder().max_capacity(10_000).time_to_live(REMEMBER).build();
        Self { io, audience, known, reviews: Semaphore::new(REVIEWS) }
    }

    /// The pod that this `Authorization` header speaks for.
    pub(crate) async fn identify(&self, authorization: Option<&str>) -> Result<PodIdentity, IdentityError> {
        self.identify_token(bearer(authorization)?).await
    }

    /// The pod that this token speaks for.
    pub(crate) async fn identify_token(&self, token: &str) -> Result<PodIdentity, IdentityError> {
        self.caller(token).await?.runner_pod().map_err(IdentityError::Refused)
    }

    /// Whoever this `Authorization` header speaks for, if that is this account, by its whole user name.
    pub(crate) async fn of_account(&self, authorization: Option<&str>, account: &str) -> Result<Caller, IdentityError> {
        let caller = self.caller(bearer(authorization)?).await?;
        match caller.account == account {
            true => Ok(caller),
            false => Err(IdentityError::Refused("the token is somebody else's")),
        }
    }

    async fn caller(&self, token: &str) -> Result<Caller, IdentityError> {
        if token.is_empty() || token.len() > MAX_TOKEN {
            return Err(IdentityError::Refused("the token has no sound length"));
        }
        let digest = sha256([token.as_bytes()]);
        if let Some(caller) = self.known.get(&digest) {
            return Ok(caller);
        }
        let permit = self.reviews.acquire().await;
        let review = self.io.review_token(token, self.audience).await?;
        drop(permit);
        let caller = caller_of(&review, self.audience).map_err(IdentityError::Refused)?;
        self.known.insert(digest, caller.clone());
        Ok(caller)
    }
}

fn bearer(authorization: Option<&str>) -> Result<&str, IdentityError> {
    authorization.and_then(|header| header.strip_prefix("Bearer ")).ok_or(IdentityError::Refused("a bearer token is required"))
}

impl Caller {
    /// The runner pod that it is; every doubt is a refusal.
    fn runner_pod(self) -> Result<PodIdentity, &'static str> {
        let account = self.account.strip_prefix("system:serviceaccount:");
        let namespace = match account.and_then(|account| account.split_once(':')) {
            Some((namespace, RUNNER_SERVICE_ACCOUNT)) => namespace.to_owned(),
            _ => return Err("the token is not a runner pod's"),
        };
        let (name, uid) = self.pod.ok_or("the token is not bound to a pod")?;
        Ok(PodIdentity { namespace, name, uid })
    }
}

/// Whose token it is; every doubt is a refusal.
fn caller_of(review: &TokenReview, wanted: &str) -> Result<Caller, &'static str> {
    let user = user_of(review, wanted)?;
    let extra = |key: &str| match user.extra.as_ref().and_then(|extra| extra.get(key)).map(Vec::as_slice) {
        Some([value]) if !value.is_empty() => Some(value.clone()),
        _ => None,
    };
    let account = user.username.clone().ok_or("the token names nobody")?;
    Ok(Caller { account, pod: extra(POD_NAME).zip(extra(POD_UID)), node: extra(NODE_NAME) })
}

/// Whom a review speaks of; every doubt is a refusal.
fn user_of<'a>(review: &'a TokenReview, wanted: &str) -> Result<&'a UserInfo, &'static str> {
    let status = review.status.as_ref().ok_or("the API server did not judge the token")?;
    if status.authenticated != Some(true) || status.error.as_ref().is_some_and(|error| !error.is_empty()) {
        return Err("the token is not valid");
    }
    if !status.audiences.iter().flatten().any(|audience| audience == wanted) {
        return Err("the token is meant for somebody else");
    }
    status.user.as_ref().ok_or("the token names nobody")
}

#[cfg(test)]
mod tests {
    use mayfly_crds::names::{BROKER_AUDIENCE, GATE_AUDIENCE};
    use serde_json::{Value, json};

    use super::*;

    fn review(change: impl Fn(&mut Value)) -> Result<PodIdentity, &'static str> {
        let mut review = json!({"spec": {}, "status": {
            "authenticated": true, "audiences": [GATE_AUDIENCE],
            "user": {"username": "system:serviceaccount:team:mayfly-runner", "extra": {POD_NAME: ["p"], POD_UID: ["u"]}}}});
        change(&mut review);
        caller_of(&serde_json::from_value(review).expect("a TokenReview"), GATE_AUDIENCE)?.runner_pod()
    }

    #[test]
    fn a_runner_pods_token_names_its_pod() {
        let pod = PodIdentity { namespace: "team".to_owned(), name: "p".to_owned(), uid: "u".to_owned() };
        assert_eq!(review(|_| {}), Ok(pod));
    }

    #[test]
    fn every_doubt_is_a_refusal() {
        let changes: [fn(&mut Value); 10] = [
            |r| r["status"] = Value::Null,
            |r| r["status"]["authenticated"] = json!(false),
            |r| r["status"]["error"] = json!("expired"),
            |r| r["status"]["audiences"] = json!(["https://kubernetes.default.svc"]),
            |r| r["status"]["audiences"] = json!([BROKER_AUDIENCE]),
            |r| r["status"]["audiences"] = Value::Null,
            |r| r["status"]["user"]["username"] = json!("system:serviceaccount:team:default"),
            |r| r["status"]["user"]["username"] = json!("admin"),
            |r| r["status"]["user"]["extra"][POD_UID] = json!([]),
            |r| r["status"]["user"]["extra"] = Value::Null,
        ];
        for (n, change) in changes.into_iter().enumerate() {
            assert!(review(change).is_err(), "change {n}");
        }
    }
}
