//! Mayfly as the OIDC issuer of jobs whose forge is none: discovery, keys, and tokens with GitHub's names for their claims.
//!
//! Sources: OpenID Connect Discovery 1.0, sections 3 and 4; RFC 7517, RFC 7519; docs.github.com, "OpenID Connect reference".
//!
//! The forge does not vouch for such a token: it says what the forge told the operator, and whoever has the operator's keys can say
//! anything. The claim [`VOUCHED_BY`] says so.

mod keys;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use jiff::Timestamp;
use jsonwebtoken::{Algorithm, Header};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret as KubeSecret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use mayfly_crds::names::{LABEL_MANAGED_BY, MANAGED_BY};
use serde_json::{Map, Value, json};
use tokio_util::sync::CancellationToken;

use crate::forge::Secret;
use crate::kube_io::KubeIo;
use keys::{Kept, Open, Ring};

/// The claim that tells who says all the others.
const VOUCHED_BY: &str = "vouched_by";
/// How long a token lives, in seconds.
const LIFE: i64 = 300;
/// How far the clock of whoever reads a token may be behind, in seconds.
const BEFORE: i64 = 10;
/// Longest audience, in bytes.
const MAX_AUDIENCE: usize = 512;
/// Between two looks at the keys.
const LOOK: Duration = Duration::from_secs(3600);
/// How long others may keep the documents, in seconds: much less than a key is published before it signs.
const KEEP: &str = "public, max-age=3600";
/// Key of the Secret.
const FIELD: &str = "keys.json";
/// Where the documents are, below the issuer's address.
const DISCOVERY: &str = "/.well-known/openid-configuration";
const KEYS: &str = "/.well-known/jwks";
/// What may be in a token, besides what every token has.
const CLAIMS: [&str; 18] = [
    "actor",
    "actor_id",
    "check_run_id",
    "event_name",
    "ref",
    "ref_protected",
    "ref_type",
    "repository",
    "repository_id",
    "repository_owner",
    "repository_owner_id",
    "repository_visibility",
    "run_attempt",
    "run_id",
    "run_number",
    "runner_environment",
    "sha",
    "workflow_ref",
];

/// Why there is no token. Texts hold no secret.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum MintError {
    /// Nobody can be meant by it.
    #[error("an audience is 1 to 512 letters, digits and signs, without spaces")]
    Audience,
    /// What was written down of the job cannot have been written by this issuer.
    #[error("the record of the pod's job is not this issuer's")]
    Record,
    /// Signing failed.
    #[error("the token could not be signed: {0}")]
    Signing(String),
}

/// The issuer.
pub(crate) struct Issuer {
    url: String,
    io: KubeIo,
    namespace: String,
    secret: String,
    open: RwLock<Open>,
}

/// What is secret of it is not shown.
impl std::fmt::Debug for Issuer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issuer").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Issuer {
    /// With the keys that the Secret keeps; the first is made where there is none. `url` is where the world finds the documents, to the letter.
    pub(crate) async fn open(io: KubeIo, namespace: &str, secret: &str, url: &str) -> Result<Self> {
        let open = RwLock::new(ring(&io, namespace, secret).await?.open(Timestamp::now())?);
        Ok(Self { url: url.to_owned(), io, namespace: namespace.to_owned(), secret: secret.to_owned(), open })
    }

    /// Who it is, to the letter.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Renews the keys when it is time, until told to stop.
    pub(crate) async fn keep_fresh(&self, stop: &CancellationToken) {
        while stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_some() {
            let renewed = ring(&self.io, &self.namespace, &self.secret).await.and_then(|ring| ring.open(Timestamp::now()));
            match renewed {
                Ok(open) => *self.open.write().unwrap_or_else(PoisonError::into_inner) = open,
                // There is a month's time.
                Err(error) => {
                    tracing::error!(error = format!("{error:#}"), "the keys that tokens of jobs are signed with could not be renewed")
                }
            }
        }
    }

    /// What a pod's record says of its job, with this issuer's name on it: no other issuer's token is about this job.
    pub(crate) fn record(&self, mut claims: BTreeMap<String, String>) -> BTreeMap<String, String> {
        claims.retain(|name, _| CLAIMS.contains(&name.as_str()));
        if !claims.is_empty() {
            claims.insert("iss".to_owned(), self.url.clone());
        }
        claims
    }

    /// A token that says what the record says, for this audience.
    pub(crate) fn mint(&self, record: &BTreeMap<String, String>, audience: &str, now: Timestamp) -> Result<Secret, MintError> {
        if audience.is_empty() || audience.len() > MAX_AUDIENCE || !audience.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(MintError::Audience);
        }
        if record.get("iss") != Some(&self.url) {
            return Err(MintError::Record);
        }
        let mut claims: Map<String, Value> = record.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
        let issued = now.as_second();
        let more = [
            ("aud", json!(audience)),
            ("sub", json!(subject(record).ok_or(MintError::Record)?)),
            ("iat", json!(issued)),
            ("nbf", json!(issued - BEFORE)),
            ("exp", json!(issued + LIFE)),
            ("jti", json!(crate::audit::uuid())),
            (VOUCHED_BY, json!("mayfly")),
        ];
        claims.extend(more.map(|(name, value)| (name.to_owned(), value)));
        let open = self.now();
        let header = Header { kid: Some(open.kid), ..Header::new(Algorithm::RS256) };
        let token = jsonwebtoken::encode(&header, &claims, &open.key).map_err(|error| MintError::Signing(error.to_string()))?;
        Ok(Secret::new(token))
    }

    fn now(&self) -> Open {
        self.open.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The documents, where the issuer's address leads.
    pub(crate) fn router(self: &Arc<Self>) -> Router {
        let path = reqwest::Url::parse(&self.url).map(|url| url.path().trim_end_matches('/').to_owned()).unwrap_or_default();
        Router::new()
            .route(&format!("{path}{DISCOVERY}"), get(async |State(issuer): State<Arc<Self>>| document(issuer.discovery())))
            .route(&format!("{path}{KEYS}"), get(async |State(issuer): State<Arc<Self>>| document(json!({"keys": issuer.now().published}))))
            .with_state(self.clone())
    }

    fn discovery(&self) -> Value {
        let every = ["iss", "sub", "aud", "iat", "nbf", "exp", "jti", VOUCHED_BY];
        json!({
            "issuer": self.url,
            "jwks_uri": format!("{}{KEYS}", self.url),
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS256"],
            "scopes_supported": ["openid"],
            "claims_supported": every.iter().chain(&CLAIMS).collect::<Vec<_>>(),
        })
    }
}

fn document(content: Value) -> Response {
    ([(header::CACHE_CONTROL, KEEP)], Json(content)).into_response()
}

/// `sub`, as GitHub writes it for a job without an environment.
fn subject(record: &BTreeMap<String, String>) -> Option<String> {
    let repository = record.get("repository")?;
    match record.get("event_name")?.starts_with("pull_request") {
        true => Some(format!("repo:{repository}:pull_request")),
        false => Some(format!("repo:{repository}:ref:{}", record.get("ref")?)),
    }
}

/// The keys in the Secret, renewed where it is time.
async fn ring(io: &KubeIo, namespace: &str, secret: &str) -> Result<Ring> {
    let api: Api<KubeSecret> = Api::namespaced(io.client(), namespace);
    let stored = api.get_opt(secret).await.with_context(|| format!("reading Secret {namespace}/{secret}"))?;
    let ring = match &stored {
        None => Ring::default(),
        Some(stored) => {
            let text = stored.data.as_ref().and_then(|data| data.get(FIELD));
            // Keys that cannot be read are not written over: somebody has to look.
            let read = text.and_then(|text| Ring::read(&text.0));
            read.ok_or_else(|| anyhow!("Secret {namespace}/{secret} holds no keys in {FIELD}; delete it to begin with new ones"))?
        }
    };
    let now = Timestamp::now();
    let Some(renewed) = ring.renewed(now, || Kept::generate(now))? else { return Ok(ring) };
    let object = KubeSecret {
        metadata: ObjectMeta {
            name: Some(secret.to_owned()),
            namespace: Some(namespace.to_owned()),
            labels: Some(BTreeMap::from([(LABEL_MANAGED_BY.to_owned(), MANAGED_BY.to_owned())])),
            ..ObjectMeta::default()
        },
        data: Some(BTreeMap::from([(FIELD.to_owned(), ByteString(renewed.write()?))])),
        ..KubeSecret::default()
    };
    let written = match stored {
        None => io.create(namespace, &object).await,
        Some(_) => io.apply(namespace, &object).await,
    };
    written.with_context(|| format!("writing Secret {namespace}/{secret}"))?;
    Ok(renewed)
}

#[cfg(test)]
mod tests;
