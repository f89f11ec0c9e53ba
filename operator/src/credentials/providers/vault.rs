//! The JWT auth method of HashiCorp Vault and OpenBao: the job's token becomes one of theirs, which is revoked at the job's end.
//!
//! Sources: developer.hashicorp.com, "JWT/OIDC auth method (API)", `POST /auth/jwt/login`; "Token auth method (API)",
//! `POST /auth/token/revoke-self`.

use http::Method;
use mayfly_crds::Vault as Spec;
use serde::Deserialize;
use serde_json::{Value, json};

use super::calls::{Body, Call, Calls, read};
use super::{Credential, Order, ProviderError};
use crate::forge::Secret;

/// `issued_token_type` of what this gives out.
const KIND: &str = "urn:mayfly:params:oauth:token-type:vault-token";
const WHO: &str = "Vault";

#[derive(Deserialize)]
struct Login {
    auth: Auth,
}

#[derive(Deserialize)]
struct Auth {
    client_token: Secret,
    #[serde(default)]
    accessor: String,
    #[serde(default)]
    policies: Vec<String>,
    lease_duration: i64,
    /// A token of the type `batch` cannot be revoked.
    #[serde(default)]
    token_type: String,
}

pub(super) async fn exchange(calls: &Calls, vault: &Spec, order: &Order<'_>) -> Result<Credential, ProviderError> {
    let url = format!("{}/v1/auth/{}/login", vault.address, vault.mount);
    let body = Body::Json(json!({"role": vault.role, "jwt": order.token.reveal()}));
    let answer = calls.make(&Call { who: WHO, method: Method::POST, url: &url, headers: &namespace(vault), body }).await?;
    let Auth { client_token, accessor, policies, lease_duration, token_type } = read::<Login>(WHO, answer)?.auth;
    let revocable = token_type != "batch";
    // Zero is a token without an end.
    if lease_duration <= 0 || lease_duration > i64::from(order.lifetime) {
        if revocable {
            // What cannot be revoked either ends by itself, and nobody has it.
            let _ = revoke(calls, vault, &client_token).await;
        }
        let why = format!("a token of the role {} lives {lease_duration} s (0: for ever), and lifetimeSeconds is less", vault.role);
        return Err(ProviderError::Refused(why));
    }
    let about = json!({
        "provider": "vault", "address": vault.address, "namespace": vault.namespace, "mount": vault.mount, "role": vault.role,
        "accessor": accessor, "policies": policies, "revocable": revocable,
    });
    let credential = Credential::new(client_token, KIND, order.now.saturating_add(lease_duration), about, order)?;
    Ok(Credential { revocable, ..credential })
}

/// Ends a token, and with it what was leased by it.
pub(super) async fn revoke(calls: &Calls, vault: &Spec, token: &Secret) -> Result<(), ProviderError> {
    let url = format!("{}/v1/auth/token/revoke-self", vault.address);
    let mut headers = namespace(vault);
    headers.push(("x-vault-token", token.reveal()));
    calls.make(&Call { who: WHO, method: Method::POST, url: &url, headers: &headers, body: Body::Nothing }).await.map(|_: Value| ())
}

fn namespace(vault: &Spec) -> Vec<(&'static str, &str)> {
    // Proof against forged requests of browsers, which Vault may be set to ask for.
    let mut headers = vec![("x-vault-request", "true")];
    headers.extend(vault.namespace.as_deref().map(|namespace| ("x-vault-namespace", namespace)));
    headers
}
