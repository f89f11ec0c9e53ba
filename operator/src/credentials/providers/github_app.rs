//! Tokens of a GitHub App's installation, for some repositories and permissions, which are revoked at the job's end.
//!
//! GitHub trusts no job's token: it trusts the App's key, which outlives every job. It is best where nobody can copy it, in the transit
//! engine of a Vault; a file does as well, and the binding's condition says so.
//!
//! Sources: docs.github.com, "Generating a JSON Web Token (JWT) for a GitHub App", "Create an installation access token for an app", "Revoke
//! an installation access token"; developer.hashicorp.com, "Transit secrets engine (API)", `POST /transit/sign/:name`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use http::Method;
use jiff::Timestamp;
use jsonwebtoken::{Algorithm, EncodingKey};
use mayfly_crds::{Installation as Spec, Permission};
use serde::Deserialize;
use serde_json::{Value, json};

use super::calls::{Body, Call, Calls, read};
use super::{ACCESS_TOKEN, Credential, Order, ProviderError};
use crate::forge::Secret;

const WHO: &str = "GitHub";
/// How long the App's own token is good, in seconds, and from how long ago: clocks differ.
const JWT_LIFE: i64 = 480;
const JWT_BEFORE: i64 = 60;
/// A permission that GitHub adds by itself.
const IMPLIED: &str = "metadata";

/// An App that the broker can sign for.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct AppConfig {
    /// Its client ID.
    pub(crate) client_id: String,
    /// Where GitHub's REST API is.
    #[serde(default = "github_com")]
    api_url: String,
    /// File with its private key, PEM; read anew for every token, as it is rotated.
    #[serde(default)]
    key_file: Option<PathBuf>,
    /// The key in a Vault.
    #[serde(default)]
    vault_transit: Option<Transit>,
}

fn github_com() -> String {
    "https://api.github.com".to_owned()
}

/// A key of Vault's transit engine, of the type `rsa-2048` or longer.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Transit {
    address: String,
    #[serde(default = "transit")]
    mount: String,
    key: String,
    /// File with a token that may sign with it; read anew for every call.
    token_file: PathBuf,
}

fn transit() -> String {
    "transit".to_owned()
}

impl AppConfig {
    /// Reads the configuration: a YAML list.
    pub(crate) fn read_all(text: &str) -> Result<Vec<Self>, String> {
        let list: Vec<Self> = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
        for (n, app) in list.iter().enumerate() {
            let name = &app.client_id;
            if app.key_file.is_some() == app.vault_transit.is_some() {
                return Err(format!("{name}: name exactly one of keyFile and vaultTransit"));
            }
            let addresses = [Some(&app.api_url), app.vault_transit.as_ref().map(|transit| &transit.address)];
            if addresses.into_iter().flatten().any(|url| !url.starts_with("https://") || url.ends_with('/')) {
                return Err(format!("{name}: an address is https://HOST, without a slash at its end"));
            }
            if list[..n].iter().any(|other| other.client_id == *name) {
                return Err(format!("{name} is named twice"));
            }
        }
        Ok(list)
    }

    /// Its key is where nobody can copy it.
    pub(crate) fn key_is_protected(&self) -> bool {
        self.key_file.is_none()
    }

    #[cfg(test)]
    pub(super) fn with_key(client_id: &str, api_url: &str, key_file: &Path) -> Self {
        let (client_id, api_url, key_file) = (client_id.to_owned(), api_url.to_owned(), Some(key_file.to_owned()));
        Self { client_id, api_url, key_file, vault_transit: None }
    }

    #[cfg(test)]
    pub(super) fn with_transit(client_id: &str, url: &str, token_file: &Path) -> Self {
        let (address, mount, key, token_file) = (url.to_owned(), transit(), "app".to_owned(), token_file.to_owned());
        let vault_transit = Some(Transit { address, mount, key, token_file });
        Self { client_id: client_id.to_owned(), api_url: url.to_owned(), key_file: None, vault_transit }
    }

    /// The App's own token, good for some minutes.
    async fn jwt(&self, calls: &Calls, now: i64) -> Result<Secret, ProviderError> {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let claims = json!({"iat": now - JWT_BEFORE, "exp": now + JWT_LIFE, "iss": self.client_id});
        let signed = format!("{}.{}", part(&json!({"alg": "RS256", "typ": "JWT"})), part(&claims));
        let signature = match (&self.key_file, &self.vault_transit) {
            (Some(file), _) => sign(file, signed.as_bytes())?,
            (None, Some(transit)) => transit.sign(calls, signed.as_bytes()).await?,
            (None, None) => return Err(ProviderError::Refused("the App has no key".to_owned())),
        };
        Ok(Secret::new(format!("{signed}.{signature}")))
    }
}

/// A signature by the key in a file, as a JWT has it.
fn sign(file: &Path, message: &[u8]) -> Result<String, ProviderError> {
    let unread = |error: std::io::Error| ProviderError::Unavailable(format!("the App's key cannot be read: {}", error.kind()));
    let pem = std::fs::read(file).map_err(unread)?;
    // The library's message may quote the key.
    let bad = |_| ProviderError::Refused("the App's private key is no RSA key in PEM".to_owned());
    let key = EncodingKey::from_rsa_pem(&pem).map_err(bad)?;
    jsonwebtoken::crypto::sign(message, &key, Algorithm::RS256).map_err(bad)
}

impl Transit {
    async fn sign(&self, calls: &Calls, message: &[u8]) -> Result<String, ProviderError> {
        #[derive(Deserialize)]
        struct Answer {
            data: Signature,
        }
        #[derive(Deserialize)]
        struct Signature {
            signature: String,
        }
        let who = "Vault's transit engine";
        let token = std::fs::read_to_string(&self.token_file);
        let token = token.map_err(|error| ProviderError::Unavailable(format!("the token for {who} cannot be read: {}", error.kind())))?;
        let url = format!("{}/v1/{}/sign/{}", self.address, self.mount, self.key);
        let body = json!({"input": STANDARD.encode(message), "hash_algorithm": "sha2-256", "signature_algorithm": "pkcs1v15"});
        let headers = [("x-vault-request", "true"), ("x-vault-token", token.trim())];
        let answer = calls.make(&Call { who, method: Method::POST, url: &url, headers: &headers, body: Body::Json(body) }).await?;
        let signature = read::<Answer>(who, answer)?.data.signature;
        // `vault:v1:BASE64`
        let bytes = signature.rsplit(':').next().and_then(|text| STANDARD.decode(text).ok());
        let bytes = bytes.ok_or_else(|| ProviderError::Unavailable(format!("the answer of {who} is no signature")))?;
        Ok(URL_SAFE_NO_PAD.encode(bytes))
    }
}

#[derive(Deserialize)]
struct Granted {
    token: Secret,
    expires_at: Timestamp,
    #[serde(default)]
    permissions: BTreeMap<String, Value>,
    #[serde(default)]
    repository_selection: String,
}

pub(super) async fn exchange(calls: &Calls, apps: &[AppConfig], spec: &Spec, order: &Order<'_>) -> Result<Credential, ProviderError> {
    let app = find(apps, spec)?;
    let bearer = format!("Bearer {}", app.jwt(calls, order.now).await?.reveal());
    let url = format!("{}/app/installations/{}/access_tokens", app.api_url, spec.installation_id);
    let body = Body::Json(json!({"repositories": spec.repositories, "permissions": spec.permissions}));
    let answer = calls.make(&Call { who: WHO, method: Method::POST, url: &url, headers: &headers(&bearer), body }).await?;
    let granted: Granted = read(WHO, answer)?;
    if granted.repository_selection != "selected" || !granted.permissions.iter().all(|(name, much)| asked_for(spec, name, much)) {
        // Nobody has it: where it cannot be revoked either, it ends by itself.
        let _ = revoke(calls, apps, spec, &granted.token).await;
        return Err(ProviderError::Refused("GitHub gave more than was asked for".to_owned()));
    }
    let about = json!({
        "provider": "githubApp", "clientId": spec.client_id, "installationId": spec.installation_id, "repositories": spec.repositories,
        "permissions": spec.permissions,
    });
    let credential = Credential::new(granted.token, ACCESS_TOKEN, granted.expires_at.as_second(), about, order)?;
    Ok(Credential { revocable: true, ..credential })
}

/// Ends a token.
pub(super) async fn revoke(calls: &Calls, apps: &[AppConfig], spec: &Spec, token: &Secret) -> Result<(), ProviderError> {
    let (url, bearer) = (format!("{}/installation/token", find(apps, spec)?.api_url), format!("Bearer {}", token.reveal()));
    let call = Call { who: WHO, method: Method::DELETE, url: &url, headers: &headers(&bearer), body: Body::Nothing };
    calls.make(&call).await.map(|_: Value| ())
}

fn find<'a>(apps: &'a [AppConfig], spec: &Spec) -> Result<&'a AppConfig, ProviderError> {
    let unknown = || ProviderError::Refused(format!("the broker cannot sign for the GitHub App {}: broker.githubApps", spec.client_id));
    apps.iter().find(|app| app.client_id == spec.client_id).ok_or_else(unknown)
}

/// GitHub serves nobody who does not say what they are.
fn headers(bearer: &str) -> [(&'static str, &str); 3] {
    [("authorization", bearer), ("user-agent", concat!("mayfly/", env!("CARGO_PKG_VERSION"))), ("x-github-api-version", "2022-11-28")]
}

fn asked_for(spec: &Spec, name: &str, much: &Value) -> bool {
    let implied = name == IMPLIED && *much == json!(Permission::Read);
    implied || spec.permissions.get(name).is_some_and(|asked| *much == json!(asked))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_app_has_one_key_and_addresses_that_nobody_reads_on_the_way() {
        let read = |text: &str| AppConfig::read_all(text).map(|apps| apps.len());
        assert_eq!(read("[]"), Ok(0));
        assert_eq!(read("- {clientId: Iv1.a, keyFile: /k}\n- {clientId: Iv1.b, apiUrl: https://git.corp/api/v3, keyFile: /l}"), Ok(2));
        let transit = "vaultTransit: {address: https://vault.corp, key: app, tokenFile: /t}";
        let apps = AppConfig::read_all(&format!("- {{clientId: Iv1.a, {transit}}}")).expect("read");
        assert!(apps[0].key_is_protected() && apps[0].api_url == "https://api.github.com");
        for bad in [
            "- {clientId: Iv1.a}".to_owned(),
            format!("- {{clientId: Iv1.a, keyFile: /k, {transit}}}"),
            "- {clientId: Iv1.a, keyFile: /k, apiUrl: http://api.github.com}".to_owned(),
            "- {clientId: Iv1.a, keyFile: /k, apiUrl: https://api.github.com/}".to_owned(),
            "- {clientId: Iv1.a, keyFile: /k}\n- {clientId: Iv1.a, keyFile: /l}".to_owned(),
            "- {clientId: Iv1.a, keyFile: /k, key: x}".to_owned(),
        ] {
            assert!(AppConfig::read_all(&bad).is_err(), "{bad}");
        }
    }
}
