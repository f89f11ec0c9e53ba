//! What a verified token becomes. All providers keep one contract (`contract.rs`): they give out no more than was ordered, tell a refusal
//! from an outage, and put nothing secret into errors.

use mayfly_crds::{Chosen, Provider};
use serde_json::{Value, json};

use super::http::Http;
use crate::forge::Secret;

mod aws;
mod azure;
mod calls;
#[cfg(test)]
mod contract;
mod github_app;
mod google;
#[cfg(test)]
pub(crate) mod stand_in;
mod vault;

use aws::Aws;
pub(crate) use aws::session_name;
use calls::Calls;
pub(crate) use github_app::AppConfig;

/// `issued_token_type` of a JWT, and of an access token (RFC 8693, section 3).
pub(crate) const JWT: &str = "urn:ietf:params:oauth:token-type:jwt";
pub(crate) const ACCESS_TOKEN: &str = "urn:ietf:params:oauth:token-type:access_token";

/// A credential to get.
pub(crate) struct Order<'a> {
    /// What the binding says.
    pub(crate) provider: &'a Provider,
    /// The workflow's token, verified.
    pub(crate) token: &'a Secret,
    /// When that token ends, in seconds since 1970.
    pub(crate) token_expires: i64,
    /// The token itself is wanted, to be shown to the provider by the job's SDK.
    pub(crate) itself: bool,
    /// Of the binding's scopes, those that are wanted.
    pub(crate) scopes: &'a [String],
    /// Longest life of the credential, in seconds.
    pub(crate) lifetime: u32,
    /// Name of the session, by which the cloud's own records speak of the job.
    pub(crate) session: &'a str,
    /// Now, in seconds since 1970.
    pub(crate) now: i64,
}

/// A credential.
#[derive(Clone, Debug)]
pub(crate) struct Credential {
    /// What the caller gets in `access_token`.
    pub(crate) value: Secret,
    /// Of what kind that is: `issued_token_type` of RFC 8693.
    pub(crate) kind: &'static str,
    /// When it ends, in seconds since 1970.
    pub(crate) expires: i64,
    /// It can be ended before, by [`Providers::revoke`].
    pub(crate) revocable: bool,
    /// What records say of it. No secret.
    pub(crate) about: Value,
}

impl Credential {
    /// One that cannot be revoked, and has not ended yet.
    fn new(value: Secret, kind: &'static str, expires: i64, about: Value, order: &Order<'_>) -> Result<Self, ProviderError> {
        match value.reveal().is_empty() || expires <= order.now {
            true => Err(ProviderError::Unavailable("what the provider gives is nothing, or has ended already".to_owned())),
            false => Ok(Self { value, kind, expires, revocable: false, about }),
        }
    }
}

/// Why there is no credential. The texts are for the binding's owner and hold nothing of the token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProviderError {
    /// The provider says no: asking again changes nothing.
    #[error("the provider refuses: {0}")]
    Refused(String),
    /// The provider cannot be reached, or has trouble.
    #[error("the provider cannot be asked: {0}")]
    Unavailable(String),
}

/// All providers.
pub(crate) struct Providers {
    aws: Aws,
    calls: Calls,
    apps: Vec<AppConfig>,
}

impl Providers {
    /// Clouds are spoken to with this client; `apps` are the GitHub Apps that can be signed for.
    pub(crate) fn new(http: Http, apps: Vec<AppConfig>) -> Self {
        Self { aws: Aws::new(http.clone()), calls: Calls(http), apps }
    }

    /// Gets what the binding says.
    pub(crate) async fn exchange(&self, order: &Order<'_>) -> Result<Credential, ProviderError> {
        match chosen(order.provider)? {
            _ if order.itself => the_token_itself(order),
            Chosen::Aws(aws) => self.aws.exchange(aws, order).await,
            Chosen::Google(google) => google::exchange(&self.calls, google, order).await,
            Chosen::Azure(azure) => azure::exchange(&self.calls, azure, order).await,
            Chosen::Vault(vault) => vault::exchange(&self.calls, vault, order).await,
            Chosen::GithubApp(app) => github_app::exchange(&self.calls, &self.apps, app, order).await,
            Chosen::AudienceToken => the_token_itself(order),
        }
    }

    /// Ends a revocable credential that this provider gave.
    pub(crate) async fn revoke(&self, provider: &Provider, credential: &Secret) -> Result<(), ProviderError> {
        match chosen(provider)? {
            Chosen::Vault(vault) => vault::revoke(&self.calls, vault, credential).await,
            Chosen::GithubApp(app) => github_app::revoke(&self.calls, &self.apps, app, credential).await,
            Chosen::Aws(_) | Chosen::Google(_) | Chosen::Azure(_) | Chosen::AudienceToken => {
                Err(ProviderError::Refused("it cannot be revoked".to_owned()))
            }
        }
    }
}

fn chosen(provider: &Provider) -> Result<Chosen<'_>, ProviderError> {
    provider.chosen().ok_or_else(|| ProviderError::Refused("the binding names no provider, or more than one".to_owned()))
}

/// Nothing is exchanged.
fn the_token_itself(order: &Order<'_>) -> Result<Credential, ProviderError> {
    let about = json!({"provider": "audienceToken"});
    Credential::new(order.token.clone(), JWT, order.token_expires, about, order)
}
