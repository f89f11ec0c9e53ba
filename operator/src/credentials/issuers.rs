//! The issuers that are trusted, by the operator's configuration, and their keys.
//!
//! Discovery and key sets come through `openidconnect` (OpenID Connect Discovery 1.0, RFC 7517), over our own client. Keys are kept through
//! outages, dropped where a fetch shows that they are withdrawn, and fetched at most once a minute, whatever is thrown at the broker: a key
//! that nobody knows is looked for once in that time, so that a name that was not found is not asked for again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use openidconnect::core::CoreProviderMetadata;
use openidconnect::{AsyncHttpClient, DiscoveryError, IssuerUrl};
use reqwest::Url;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::http::{CallError, Http};
use super::json;
use super::keys::{Key, Keys, read_keys};
use super::token::{Algorithm, Claims, Profile, TokenError, Unverified};

/// Longest discovery document or key set, in bytes.
const MAX_DOCUMENT: usize = 100 << 10;
/// Longest life of a token that a configuration may allow, in seconds.
const LONGEST_AGE: i64 = 86_400;

/// One entry of the configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct IssuerConfig {
    /// As tokens and bindings spell it.
    pub(crate) issuer: String,
    /// Which algorithms its tokens may be signed with.
    #[serde(default = "default_algorithms")]
    pub(crate) algorithms: Vec<Algorithm>,
    /// Longest life of its tokens.
    #[serde(default = "default_age")]
    pub(crate) max_age_seconds: i64,
    /// Its tokens have the claim `check_run_id`. Those of a GitHub Enterprise Server may not.
    #[serde(default = "yes")]
    pub(crate) per_job_claim: bool,
    /// PEM file of certificate authorities, for an issuer with a private one.
    #[serde(default)]
    pub(crate) certificate_authority_file: Option<std::path::PathBuf>,
}

fn default_algorithms() -> Vec<Algorithm> {
    vec![Algorithm::Rs256]
}

fn yes() -> bool {
    true
}

fn default_age() -> i64 {
    900
}

impl IssuerConfig {
    /// Reads the configuration: a YAML list.
    pub(crate) fn read_all(text: &str) -> Result<Vec<Self>, String> {
        let list: Vec<Self> = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
        if list.is_empty() {
            return Err("no issuer is named".to_owned());
        }
        for (n, config) in list.iter().enumerate() {
            let name = &config.issuer;
            let url = Url::parse(name).map_err(|error| format!("{name}: {error}"))?;
            let plain = url.scheme() == "https" && url.username().is_empty() && url.password().is_none();
            if !plain || url.query().is_some() || url.fragment().is_some() || url.host_str().is_none() {
                return Err(format!("{name}: an issuer is https://HOST[:PORT][/PATH]"));
            }
            if config.algorithms.is_empty() || !(60..=LONGEST_AGE).contains(&config.max_age_seconds) {
                return Err(format!("{name}: algorithms cannot be empty, and maxAgeSeconds is between 60 and {LONGEST_AGE}"));
            }
            if list[..n].iter().any(|other| other.issuer == *name) {
                return Err(format!("{name} is named twice"));
            }
        }
        Ok(list)
    }
}

/// How often keys are fetched, and how long they are believed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rhythm {
    /// Least time between two fetches.
    pub(crate) least: Duration,
    /// The same before the first that succeeded: until then nobody gets anything.
    pub(crate) first: Duration,
    /// Time after which keys are fetched anew.
    pub(crate) refresh: Duration,
    /// Time after which keys are not believed any more where no fetch succeeded.
    pub(crate) stale: Duration,
}

impl Default for Rhythm {
    fn default() -> Self {
        Self {
            least: Duration::from_secs(60),
            first: Duration::from_secs(5),
            refresh: Duration::from_secs(300),
            stale: Duration::from_secs(24 * 3600),
        }
    }
}

/// Why there are no verified claims.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum VerifyError {
    /// The token is none.
    #[error("{0}")]
    Token(#[from] TokenError),
    /// Nobody said to trust this issuer.
    #[error("the issuer is not in the operator's configuration")]
    Untrusted,
    /// The issuer has no key of this name.
    #[error("the issuer has no such key")]
    UnknownKey,
    /// The issuer's keys could not be fetched for too long.
    #[error("the issuer's keys are not known")]
    Unavailable,
}

/// All trusted issuers.
pub(crate) struct Issuers(HashMap<String, Arc<Issuer>>);

impl Issuers {
    /// By their names, to the letter.
    pub(crate) fn new(issuers: impl IntoIterator<Item = Issuer>) -> Self {
        Self(issuers.into_iter().map(|issuer| (issuer.name.clone(), Arc::new(issuer))).collect())
    }

    /// Whether the tokens of this issuer say which job of their run they are of.
    pub(crate) fn have_per_job_claim(&self, issuer: &str) -> bool {
        self.0.get(issuer).is_none_or(|issuer| issuer.per_job_claim)
    }

    /// Verifies a token. Nothing is asked of anybody before the token is well-formed, of a trusted issuer and of a pinned algorithm.
    pub(crate) async fn verify(&self, token: &str, now: i64) -> Result<Claims, VerifyError> {
        let token = Unverified::parse(token)?;
        let issuer = self.0.get(token.issuer()).ok_or(VerifyError::Untrusted)?;
        token.check_algorithm(&issuer.profile)?;
        let key = issuer.key(token.kid()).await?;
        Ok(token.verify(&key, &issuer.profile, now)?)
    }

    /// Fetches the keys of all issuers in their rhythm, for ever.
    pub(crate) async fn keep_fresh(&self) {
        futures::future::join_all(self.0.values().map(|issuer| issuer.keep_fresh())).await;
    }
}

#[derive(Default)]
struct Known {
    keys: Keys,
    fetched: Option<Instant>,
    tried: Option<Instant>,
}

/// An issuer.
pub(crate) struct Issuer {
    name: String,
    profile: Profile,
    per_job_claim: bool,
    http: Http,
    rhythm: Rhythm,
    known: Mutex<Known>,
    /// Held while fetching: one fetch at a time.
    fetching: tokio::sync::Mutex<()>,
}

impl Issuer {
    /// Nothing is fetched yet.
    pub(crate) fn new(config: &IssuerConfig, http: Http, rhythm: Rhythm) -> Self {
        let profile = Profile { algorithms: config.algorithms.clone(), max_age: config.max_age_seconds };
        let (name, per_job_claim) = (config.issuer.clone(), config.per_job_claim);
        Self { name, profile, per_job_claim, http, rhythm, known: Mutex::default(), fetching: tokio::sync::Mutex::new(()) }
    }

    async fn key(&self, kid: &str) -> Result<Key, VerifyError> {
        if let Some(key) = self.known_key(kid) {
            return Ok(key);
        }
        self.fetch(self.rhythm.least).await;
        match self.known_key(kid) {
            Some(key) => Ok(key),
            None if self.believed().is_some() => Err(VerifyError::UnknownKey),
            None => Err(VerifyError::Unavailable),
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known, if it is not too old.
    fn believed(&self) -> Option<std::sync::MutexGuard<'_, Known>> {
        let known = self.known();
        known.fetched.is_some_and(|fetched| fetched.elapsed() < self.rhythm.stale).then_some(known)
    }

    fn known_key(&self, kid: &str) -> Option<Key> {
        self.believed()?.keys.get(kid).cloned()
    }

    async fn keep_fresh(&self) {
        loop {
            self.fetch(self.rhythm.refresh).await;
            // Soon after a fetch that failed, and never more often than is allowed.
            let least = self.least(&self.known());
            tokio::time::sleep(least).await;
        }
    }

    fn least(&self, known: &Known) -> Duration {
        if known.fetched.is_some() { self.rhythm.least } else { self.rhythm.first }
    }

    /// Fetches the keys, unless that was tried within the least time between two fetches or succeeded within `age`.
    async fn fetch(&self, age: Duration) {
        let _one_at_a_time = self.fetching.lock().await;
        {
            let mut known = self.known();
            let recent = |time: Option<Instant>, span: Duration| time.is_some_and(|time| time.elapsed() < span);
            if recent(known.tried, self.least(&known)) || recent(known.fetched, age) {
                return;
            }
            known.tried = Some(Instant::now());
        }
        match self.discover().await {
            Ok(keys) => {
                let mut known = self.known();
                (known.keys, known.fetched) = (keys, Some(Instant::now()));
            }
            // What was fetched before goes on until it is stale: an empty or broken answer must not lock every job out.
            Err(error) => tracing::warn!(%error, issuer = self.name, "an issuer's keys could not be fetched"),
        }
    }

    async fn discover(&self) -> Result<Keys, CallError> {
        let url = IssuerUrl::new(self.name.clone()).map_err(|_| CallError::new("the issuer is no address"))?;
        let documents = Documents { issuer: self.name.clone(), http: self.http.clone() };
        let metadata = CoreProviderMetadata::discover_async(url, &documents).await.map_err(|error| match error {
            DiscoveryError::Request(error) => error,
            DiscoveryError::Response(status, ..) => CallError::new(format!("HTTP {status}, or not JSON by its content type")),
            DiscoveryError::Parse(_) => CallError::new("a document is not what it should be"),
            DiscoveryError::Validation(_) => CallError::new("the discovery document is another issuer's"),
            _ => CallError::new("the discovery document cannot be used"),
        })?;
        let keys: Vec<Map<String, Value>> = metadata
            .jwks()
            .keys()
            .iter()
            .filter_map(|key| match serde_json::to_value(key) {
                Ok(Value::Object(key)) => Some(key),
                _ => None,
            })
            .collect();
        read_keys(&keys).map_err(CallError::new)
    }
}

/// Where the library gets discovery document and key set from: each is looked at before it is handed on.
struct Documents {
    issuer: String,
    http: Http,
}

impl<'c> AsyncHttpClient<'c> for Documents {
    type Error = CallError;
    type Future = BoxFuture<'c, Result<http::Response<Vec<u8>>, CallError>>;

    fn call(&'c self, request: http::Request<Vec<u8>>) -> Self::Future {
        Box::pin(self.get(request))
    }
}

impl Documents {
    async fn get(&self, request: http::Request<Vec<u8>>) -> Result<http::Response<Vec<u8>>, CallError> {
        let asked = Url::parse(&request.uri().to_string()).map_err(|_| CallError::new("the key set has no address"))?;
        let own = Url::parse(&self.issuer).map_err(|_| CallError::new("the issuer is no address"))?;
        if asked.origin() != own.origin() {
            return Err(CallError::new("the key set is at another host than the issuer"));
        }
        let mut response = self.http.send(request, MAX_DOCUMENT).await?;
        if response.status() == http::StatusCode::OK {
            let document = json::object(response.body()).map_err(CallError::new)?;
            *response.body_mut() = self.looked_at(document)?;
        }
        Ok(response)
    }

    fn looked_at(&self, mut document: Map<String, Value>) -> Result<Vec<u8>, CallError> {
        if let Some(keys) = document.get("keys") {
            // The library leaves out keys that it does not understand, whose names count all the same.
            let keys = keys.as_array().ok_or_else(|| CallError::new("the key set is no list"))?;
            let keys: Vec<Map<String, Value>> = keys.iter().filter_map(|key| key.as_object().cloned()).collect();
            read_keys(&keys).map_err(CallError::new)?;
        } else if document.get("issuer").and_then(Value::as_str) != Some(self.issuer.as_str()) {
            return Err(CallError::new("the discovery document is another issuer's"));
        } else if !document.contains_key("authorization_endpoint") {
            // The standard wants one and the library insists; issuers of workload tokens, such as GitHub's, have none. Nobody reads it.
            document.insert("authorization_endpoint".to_owned(), Value::String(self.issuer.clone()));
        }
        serde_json::to_vec(&document).map_err(|_| CallError::new("a document cannot be written"))
    }
}

#[cfg(test)]
mod tests;
