//! From a GitHub App or a personal access token to the tokens that calls carry.
//!
//! Source: actions/scaleset, client.go (the chain of tokens); docs.github.com, "Authenticating as a GitHub App installation".

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use reqwest::{Client, Method};
use serde::{Deserialize, Serialize};

use super::super::address::{Refuse, refused};
use super::super::{ForgeError, Secret};
use super::config_url::ConfigUrl;
use super::http::{CallError, Caller};

/// With what GitHub knows the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Credential {
    /// A GitHub App that is installed at the level.
    App {
        /// Client id of the App; its number is taken as well.
        client_id: String,
        /// Number of the installation.
        installation_id: u64,
        /// The App's private key, PEM.
        key: Secret,
    },
    /// A personal access token: of a person, and often good for more than the pool needs.
    Token(Secret),
}

impl Credential {
    /// What is secret of it.
    pub(crate) fn secret(&self) -> &Secret {
        match self {
            Self::App { key, .. } => key,
            Self::Token(token) => token,
        }
    }
}

/// Where the Actions service answers, and the token for it.
#[derive(Clone, Debug)]
pub(super) struct Tenant {
    pub(super) base: reqwest::Url,
    pub(super) token: Secret,
}

/// Makes tokens, and keeps them as long as they are good.
#[derive(Debug)]
pub(super) struct Auth {
    http: Client,
    caller: Arc<Caller>,
    url: ConfigUrl,
    refuse: Refuse,
    credential: Mutex<Credential>,
    installation: Slot<Secret>,
    tenant: Slot<Tenant>,
}

impl Auth {
    pub(super) fn new(http: Client, caller: Arc<Caller>, url: ConfigUrl, credential: Credential, refuse: Refuse) -> Self {
        let (installation, tenant) = (Slot::default(), Slot::default());
        Self { http, caller, url, refuse, credential: Mutex::new(credential), installation, tenant }
    }

    /// Goes on with another credential: a key was rotated. What was made with the old one stays good until it expires.
    pub(super) fn renew(&self, credential: Credential) {
        *self.credential() = credential;
        self.installation.forget();
    }

    /// The `Authorization` header of REST calls.
    pub(super) async fn rest(&self) -> Result<String, CallError> {
        let credential = self.credential().clone();
        let token = match credential {
            Credential::Token(token) => token,
            Credential::App { client_id, installation_id, key } => {
                self.installation.get(|| self.installation_token(client_id, installation_id, key)).await?
            }
        };
        Ok(format!("Bearer {}", token.reveal()))
    }

    /// The Actions service.
    pub(super) async fn tenant(&self) -> Result<Tenant, CallError> {
        self.tenant.get(|| self.admin_token()).await
    }

    /// A token was refused: the next call gets a new one.
    pub(super) fn forget(&self) {
        self.installation.forget();
        self.tenant.forget();
    }

    /// An address that GitHub named, if calls may be made to it: not in plain text where the pool's own address is not, and not to where
    /// no forge can be. Names are checked when they are resolved.
    pub(super) fn named(&self, text: &str, what: &str) -> Result<reqwest::Url, CallError> {
        let bad = |why: &str| CallError::Failed(ForgeError::Unexpected(format!("{what}: {why}")));
        let url = reqwest::Url::parse(text).map_err(|_| bad("GitHub names no address"))?;
        let plain = url.scheme() == "http" && self.url.text.starts_with("http:");
        if url.scheme() != "https" && !plain {
            return Err(bad("GitHub names an address that is not https"));
        }
        match refused(url.host_str().unwrap_or_default(), self.refuse) {
            Some(why) => Err(bad(&why)),
            None => Ok(url),
        }
    }

    fn credential(&self) -> MutexGuard<'_, Credential> {
        self.credential.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn installation_token(&self, client_id: String, installation: u64, key: Secret) -> Result<(Secret, Duration), CallError> {
        #[derive(Deserialize)]
        struct Token {
            token: String,
            expires_at: Option<Timestamp>,
        }
        let what = "a token of the GitHub App's installation";
        let jwt = app_jwt(&client_id, &key, Timestamp::now())?;
        let url = format!("{}/app/installations/{installation}/access_tokens", self.url.api);
        let request = self.http.post(url).bearer_auth(jwt.reveal()).header("Accept", "application/vnd.github+json");
        let token: Token = self.caller.send(request, what).await?.json(what)?;
        let lives = token.expires_at.and_then(|at| Duration::try_from(at.duration_since(Timestamp::now())).ok());
        Ok((Secret::new(token.token), lives.unwrap_or(Duration::from_secs(600))))
    }

    async fn admin_token(&self) -> Result<(Tenant, Duration), CallError> {
        #[derive(Deserialize)]
        struct Registration {
            token: String,
        }
        #[derive(Serialize)]
        struct Register<'a> {
            url: &'a str,
            runner_event: &'a str,
        }
        #[derive(Deserialize)]
        struct Connection {
            #[serde(default)]
            url: String,
            #[serde(default)]
            token: String,
        }
        let what = "a registration token for runners";
        let path = format!("{}{}/runners/registration-token", self.url.api, self.url.runners_path());
        let request = self.http.request(Method::POST, path).header("Authorization", self.rest().await?);
        // Good for any number of runners for an hour: it stays in this function.
        let registration: Registration = self.caller.send(request, what).await?.json(what)?;

        let what = "the connection to the Actions service";
        let body = Register { url: &self.url.text, runner_event: "register" };
        let request = self.http.post(format!("{}/actions/runner-registration", self.url.api)).json(&body);
        let request = request.header("Authorization", format!("RemoteAuth {}", registration.token));
        let connection: Connection = self.caller.send(request, what).await?.json(what)?;
        if connection.token.is_empty() {
            return Err(ForgeError::Unexpected(format!("{what}: GitHub gives no token")).into());
        }
        let lives = expiry(&connection.token).map(|at| at.duration_since(Timestamp::now()));
        let lives = lives.and_then(|lives| Duration::try_from(lives).ok()).unwrap_or(Duration::from_secs(300));
        let base = self.named(&connection.url, what)?;
        Ok((Tenant { base, token: Secret::new(connection.token) }, lives))
    }
}

/// The App's own token: ten minutes at most, and from a minute ago, as clocks differ.
fn app_jwt(client_id: &str, key: &Secret, now: Timestamp) -> Result<Secret, CallError> {
    #[derive(Serialize)]
    struct Claims<'a> {
        iat: i64,
        exp: i64,
        iss: &'a str,
    }
    // The library's message may quote the key.
    let bad = |_| CallError::Failed(ForgeError::Unauthorized { what: "the GitHub App: its private key is no RSA key in PEM".to_owned() });
    let key = EncodingKey::from_rsa_pem(key.reveal().as_bytes()).map_err(bad)?;
    let claims = Claims { iat: now.as_second() - 60, exp: now.as_second() + 480, iss: client_id };
    jsonwebtoken::encode(&Header::new(Algorithm::RS256), &claims, &key).map(Secret::new).map_err(bad)
}

/// `exp` of a token that is not ours to verify: only to know when to ask for the next.
pub(super) fn expiry(jwt: &str) -> Option<Timestamp> {
    #[derive(Deserialize)]
    struct Claims {
        exp: i64,
    }
    let payload = URL_SAFE_NO_PAD.decode(jwt.split('.').nth(1)?.trim_end_matches('=')).ok()?;
    Timestamp::from_second(serde_json::from_slice::<Claims>(&payload).ok()?.exp).ok()
}

/// A token that is made when it is needed, by one at a time. While the old one is good, nobody waits for the new one but who makes it.
#[derive(Debug)]
struct Slot<T> {
    known: Mutex<Option<Made<T>>>,
    making: tokio::sync::Mutex<()>,
}

#[derive(Debug, Clone)]
struct Made<T> {
    value: T,
    /// When a new one should be made.
    fresh: Instant,
    /// Until when it is good.
    good: Instant,
}

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Self { known: Mutex::new(None), making: tokio::sync::Mutex::new(()) }
    }
}

impl<T: Clone> Slot<T> {
    async fn get<F>(&self, make: impl FnOnce() -> F) -> Result<T, CallError>
    where
        F: Future<Output = Result<(T, Duration), CallError>>,
    {
        let known = self.known().clone();
        let now = Instant::now();
        if let Some(made) = known.as_ref().filter(|made| now < made.fresh) {
            return Ok(made.value.clone());
        }
        let usable = known.filter(|made| now < made.good);
        let _maker = match (&usable, self.making.try_lock()) {
            (_, Ok(maker)) => maker,
            (Some(made), Err(_)) => return Ok(made.value.clone()),
            (None, Err(_)) => {
                let maker = self.making.lock().await;
                if let Some(made) = self.known().as_ref().filter(|made| Instant::now() < made.fresh) {
                    return Ok(made.value.clone());
                }
                maker
            }
        };
        match (make().await, usable) {
            (Ok((value, lives)), _) => {
                let begin = Instant::now();
                // A tenth of its life before its end, a minute at least where there is one.
                let early = (lives / 10).max(Duration::from_secs(60)).min(lives / 2);
                *self.known() = Some(Made { value: value.clone(), fresh: begin + lives - early, good: begin + lives });
                Ok(value)
            }
            (Err(_), Some(made)) => Ok(made.value),
            (Err(error), None) => Err(error),
        }
    }

    fn forget(&self) {
        *self.known() = None;
    }

    fn known(&self) -> MutexGuard<'_, Option<Made<T>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn many_who_need_a_token_make_one() {
        let (slot, made) = (Slot::<u32>::default(), AtomicU32::new(0));
        let make = || async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            Ok((made.fetch_add(1, Ordering::SeqCst), Duration::from_secs(600)))
        };
        let all = futures::future::join_all((0..50).map(|_| slot.get(make))).await;
        assert!(all.iter().all(|got| got == &Ok(0)) && made.load(Ordering::SeqCst) == 1);
    }

    #[tokio::test]
    async fn an_old_token_that_is_good_is_used_while_a_new_one_cannot_be_made() {
        let slot = Slot::<u32>::default();
        let now = Instant::now();
        *slot.known() = Some(Made { value: 7, fresh: now, good: now + Duration::from_secs(60) });
        let fails = || async { Err(CallError::Failed(ForgeError::Unreachable("away".to_owned()))) };
        assert_eq!(slot.get(fails).await, Ok(7));
        slot.forget();
        assert!(slot.get(fails).await.is_err());
    }

    #[test]
    fn what_a_token_says_of_its_end_is_read() {
        let token = |claims: &str| format!("e30.{}.sig", URL_SAFE_NO_PAD.encode(claims));
        assert_eq!(expiry(&token(r#"{"exp":1700000000}"#)), Timestamp::from_second(1_700_000_000).ok());
        for bad in ["", "a.b.c", "abc", &token("{}"), &token(r#"{"exp":"soon"}"#)] {
            assert_eq!(expiry(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_key_that_is_none_is_told_without_quoting_it() {
        let error =
            app_jwt("Iv1.a", &Secret::new("-----BEGIN RSA PRIVATE KEY-----\nhunter2\n"), Timestamp::UNIX_EPOCH).expect_err("no key");
        assert!(ForgeError::from(error.clone()).to_string().contains("no RSA key") && !format!("{error:?}").contains("hunter2"));
    }
}
