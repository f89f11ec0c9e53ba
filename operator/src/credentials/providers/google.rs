//! Workload Identity Federation of Google Cloud: the job's token becomes an access token, of a service account where one is named.
//!
//! Sources: cloud.google.com, "Security Token Service API: v1.token", "IAM Service Account Credentials API:
//! projects.serviceAccounts.generateAccessToken".

use http::Method;
use jiff::Timestamp;
use mayfly_crds::Google as Spec;
use serde::Deserialize;
use serde_json::json;

use super::super::wire::GRANT_TYPE;
use super::calls::{Body, Call, Calls, read};
use super::{ACCESS_TOKEN, Credential, JWT, Order, ProviderError};
use crate::forge::Secret;

/// What a federated token has to have to become a service account's.
const TO_IMPERSONATE: &str = "https://www.googleapis.com/auth/cloud-platform";

#[derive(Deserialize)]
struct Federated {
    access_token: Secret,
    expires_in: i64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Impersonated {
    access_token: Secret,
    expire_time: Timestamp,
}

pub(super) async fn exchange(calls: &Calls, google: &Spec, order: &Order<'_>) -> Result<Credential, ProviderError> {
    let audience = google.audience();
    let wanted = order.scopes.join(" ");
    let scope = if google.service_account.is_some() { TO_IMPERSONATE } else { &wanted };
    let form = [
        ("grant_type", GRANT_TYPE),
        ("audience", &audience),
        ("scope", scope),
        ("requested_token_type", ACCESS_TOKEN),
        ("subject_token", order.token.reveal()),
        ("subject_token_type", JWT),
    ];
    let url = format!("{}/v1/token", google.sts_endpoint());
    let call = Call { who: "Google's STS", method: Method::POST, url: &url, headers: &[], body: Body::Form(&form) };
    let federated: Federated = read(call.who, calls.make(&call).await?)?;
    let about = json!({
        "provider": "google", "audience": audience, "serviceAccount": google.service_account, "scopes": order.scopes,
    });
    let (value, expires) = match &google.service_account {
        None => (federated.access_token, order.now.saturating_add(federated.expires_in)),
        Some(account) => {
            let own = impersonate(calls, google, account, &federated.access_token, order).await?;
            (own.access_token, own.expire_time.as_second())
        }
    };
    Credential::new(value, ACCESS_TOKEN, expires, about, order)
}

async fn impersonate(
    calls: &Calls,
    google: &Spec,
    account: &str,
    federated: &Secret,
    order: &Order<'_>,
) -> Result<Impersonated, ProviderError> {
    let url = format!("{}/v1/projects/-/serviceAccounts/{account}:generateAccessToken", google.iam_credentials_endpoint());
    let bearer = format!("Bearer {}", federated.reveal());
    let body = Body::Json(json!({"scope": order.scopes, "lifetime": format!("{}s", order.lifetime)}));
    let call = Call { who: "Google's IAM", method: Method::POST, url: &url, headers: &[("authorization", &bearer)], body };
    read(call.who, calls.make(&call).await?)
}
