//! What a verified token becomes. All providers keep one contract (`contract.rs`): they give out no more than was ordered, tell a refusal
//! from an outage, and put nothing secret into errors.

use async_trait::async_trait;
use mayfly_crds::Provider;
use serde_json::{Value, json};

use super::http::Http;
use crate::forge::Secret;

mod aws;
#[cfg(test)]
mod contract;
#[cfg(test)]
pub(crate) mod stand_in;

pub(crate) use aws::{Aws, session_name};

/// A credential to get.
pub(crate) struct Order<'a> {
    /// What the binding says.
    pub(crate) provider: &'a Provider,
    /// The workflow's token, verified.
    pub(crate) token: &'a Secret,
    /// When that token ends, in seconds since 1970.
    pub(crate) token_expires: i64,
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
    /// What records say of it. No secret.
    pub(crate) about: Value,
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

/// Gets credentials of one kind.
#[async_trait]
pub(crate) trait Exchange: Send + Sync {
    /// Gets one.
    async fn exchange(&self, order: &Order<'_>) -> Result<Credential, ProviderError>;
}

/// The token itself: nothing is exchanged.
pub(crate) struct AudienceToken;

/// `issued_token_type` of a JWT (RFC 8693, section 3).
const JWT: &str = "urn:ietf:params:oauth:token-type:jwt";

#[async_trait]
impl Exchange for AudienceToken {
    async fn exchange(&self, order: &Order<'_>) -> Result<Credential, ProviderError> {
        if order.token_expires <= order.now {
            return Err(ProviderError::Refused("the token has no life left".to_owned()));
        }
        let about = json!({"provider": "audienceToken"});
        Ok(Credential { value: order.token.clone(), kind: JWT, expires: order.token_expires, about })
    }
}

/// All providers.
pub(crate) struct Providers {
    aws: Aws,
    audience_token: AudienceToken,
}

impl Providers {
    /// Clouds are spoken to with this client.
    pub(crate) fn new(http: Http) -> Self {
        Self { aws: Aws::new(http), audience_token: AudienceToken }
    }

    /// Gets what the binding says.
    pub(crate) async fn exchange(&self, order: &Order<'_>) -> Result<Credential, ProviderError> {
        match (&order.provider.aws, &order.provider.audience_token) {
            (Some(_), None) => self.aws.exchange(order).await,
            (None, Some(_)) => self.audience_token.exchange(order).await,
            _ => Err(ProviderError::Refused("the binding names no provider, or more than one".to_owned())),
        }
    }
}
