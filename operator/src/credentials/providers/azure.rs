//! A federated identity credential of Microsoft Entra: the job's token is the assertion of a client.
//!
//! Source: learn.microsoft.com, "Microsoft identity platform and the OAuth 2.0 client credentials flow", third case. How long the token
//! lives, Entra decides.

use http::Method;
use mayfly_crds::Azure as Spec;
use serde::Deserialize;
use serde_json::json;

use super::calls::{Body, Call, Calls, read};
use super::{ACCESS_TOKEN, Credential, Order, ProviderError};
use crate::forge::Secret;

/// The authority of the public cloud.
const AUTHORITY: &str = "https://login.microsoftonline.com";

#[derive(Deserialize)]
struct Granted {
    access_token: Secret,
    expires_in: i64,
}

pub(super) async fn exchange(calls: &Calls, azure: &Spec, order: &Order<'_>) -> Result<Credential, ProviderError> {
    let scope = order.scopes.join(" ");
    let form = [
        ("grant_type", "client_credentials"),
        ("client_id", azure.client_id.as_str()),
        ("scope", &scope),
        ("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"),
        ("client_assertion", order.token.reveal()),
    ];
    let url = format!("{}/{}/oauth2/v2.0/token", azure.authority_host.as_deref().unwrap_or(AUTHORITY), azure.tenant_id);
    let call = Call { who: "Entra", method: Method::POST, url: &url, headers: &[], body: Body::Form(&form) };
    let granted: Granted = read(call.who, calls.make(&call).await?)?;
    let about = json!({"provider": "azure", "tenantId": azure.tenant_id, "clientId": azure.client_id, "scope": scope});
    Credential::new(granted.access_token, ACCESS_TOKEN, order.now.saturating_add(granted.expires_in), about, order)
}
