//! `AssumeRoleWithWebIdentity` of AWS STS, and of what speaks like it.
//!
//! Through `aws-sdk-sts` for the protocol and over our own HTTP client, which follows no redirect and speaks to no metadata endpoint. The
//! call is unsigned: the broker has no key at AWS. What is tried again is the SDK's standard rule, three times in all: throttling,
//! `IDPCommunicationError`, errors of the server, connections that broke. A refusal is not.

use std::fmt;
use std::time::Duration;

use aws_sdk_sts::config::retry::RetryConfig;
use aws_sdk_sts::config::timeout::TimeoutConfig;
use aws_sdk_sts::config::{BehaviorVersion, Config, Region};
use aws_sdk_sts::error::{ProvideErrorMetadata as _, SdkError};
use aws_sdk_sts::types::PolicyDescriptorType;
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::body::SdkBody;
use jiff::Timestamp;
use mayfly_crds::Aws as Spec;
use serde_json::json;

use super::super::http::{CallError, Http};
use super::{Credential, Order, ProviderError};
use crate::forge::Secret;

/// Longest answer of STS, in bytes.
const MAX_ANSWER: usize = 64 << 10;
/// Tries of one exchange.
const TRIES: u32 = 3;
/// How long one exchange may take, all tries included.
const EXCHANGE: Duration = Duration::from_secs(20);
/// `issued_token_type` of what this gives out: the JSON that AWS's `credential_process` prints.
const KIND: &str = "urn:mayfly:params:oauth:token-type:aws-credentials";
/// Longest name of a session (STS, `RoleSessionName`).
const SESSION_MAX: usize = 64;

/// The name of a job's session: it appears in CloudTrail, and in the ARN that policies see.
pub(crate) fn session_name(run: &str, attempt: &str, job: &str) -> String {
    let plain = |text: &str| text.chars().filter(|letter| letter.is_ascii_alphanumeric()).collect::<String>();
    let mut name = format!("mayfly-{}-{}-{}", plain(run), plain(attempt), plain(job));
    name.truncate(SESSION_MAX);
    name
}

/// AWS.
pub(super) struct Aws {
    http: SharedHttpClient,
}

impl Aws {
    /// Speaks with this client.
    pub(super) fn new(http: Http) -> Self {
        Self { http: SharedHttpClient::new(Client(http)) }
    }

    pub(super) async fn exchange(&self, aws: &Spec, order: &Order<'_>) -> Result<Credential, ProviderError> {
        let mut config = Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(aws.region.clone()))
            .http_client(self.http.clone())
            .retry_config(RetryConfig::standard().with_max_attempts(TRIES))
            .timeout_config(TimeoutConfig::builder().operation_timeout(EXCHANGE).build());
        if let Some(endpoint) = &aws.endpoint {
            config = config.endpoint_url(endpoint);
        }
        let arns = aws.policy_arns.iter().map(|arn| PolicyDescriptorType::builder().arn(arn).build()).collect::<Vec<_>>();
        let answer = aws_sdk_sts::Client::from_conf(config.build())
            .assume_role_with_web_identity()
            .role_arn(&aws.role_arn)
            .role_session_name(order.session)
            .web_identity_token(order.token.reveal())
            .duration_seconds(i32::try_from(order.lifetime).unwrap_or(i32::MAX))
            .set_policy(aws.session_policy.clone())
            .set_policy_arns((!arns.is_empty()).then_some(arns))
            .send()
            .await
            .map_err(|error| classified(&error))?;
        let keys = answer.credentials().ok_or_else(|| ProviderError::Unavailable("the answer of STS holds no credentials".to_owned()))?;
        let expires = keys.expiration().secs();
        let when = Timestamp::from_second(expires).map_err(|_| ProviderError::Unavailable("STS gives a time that is none".to_owned()))?;
        let value = json!({
            "Version": 1, "AccessKeyId": keys.access_key_id(), "SecretAccessKey": keys.secret_access_key(),
            "SessionToken": keys.session_token(), "Expiration": when.to_string(),
        });
        let about = json!({
            "provider": "aws", "roleArn": aws.role_arn, "region": aws.region, "session": order.session,
            "assumedRole": answer.assumed_role_user().map(|user| user.arn()), "accessKeyId": keys.access_key_id(),
        });
        Credential::new(Secret::new(value.to_string()), KIND, expires, about, order)
    }
}

/// What went wrong, by the code that STS gives. Its message is left out: it may quote the token's claims.
fn classified<E>(error: &SdkError<E, HttpResponse>) -> ProviderError
where
    SdkError<E, HttpResponse>: aws_sdk_sts::error::ProvideErrorMetadata,
{
    match error {
        SdkError::ServiceError(answer) => {
            let status = answer.raw().status();
            let code: String = error.code().unwrap_or_default().chars().filter(char::is_ascii_alphanumeric).take(64).collect();
            let what = format!("STS answers {} {code}", status.as_u16());
            // Of what is tried again, the last try came to nothing as well.
            let passing = ["Throttling", "ThrottlingException", "IDPCommunicationError", "RequestTimeout"].contains(&code.as_str());
            match passing || status.is_server_error() || status.as_u16() == 429 {
                true => ProviderError::Unavailable(what),
                false => ProviderError::Refused(what),
            }
        }
        SdkError::TimeoutError(_) => ProviderError::Unavailable("STS does not answer".to_owned()),
        SdkError::DispatchFailure(failure) => {
            let cause = failure.as_connector_error().and_then(std::error::Error::source);
            ProviderError::Unavailable(cause.map_or_else(|| "STS is not reached".to_owned(), ToString::to_string))
        }
        SdkError::ResponseError(answer) => {
            ProviderError::Unavailable(format!("STS answers {} and something that is not understood", answer.raw().status().as_u16()))
        }
        _ => ProviderError::Refused("the request cannot be made: the binding's values do not fit".to_owned()),
    }
}

/// Our client, as the SDK wants one.
#[derive(Clone)]
struct Client(Http);

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client")
    }
}

impl HttpClient for Client {
    fn http_connector(&self, _: &HttpConnectorSettings, _: &RuntimeComponents) -> SharedHttpConnector {
        SharedHttpConnector::new(self.clone())
    }
}

impl HttpConnector for Client {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let http = self.0.clone();
        HttpConnectorFuture::new(async move {
            let request = request.try_into_http1x().map_err(|error| ConnectorError::user(error.into()))?;
            let (head, body) = request.into_parts();
            let body = body.bytes().ok_or_else(|| ConnectorError::user("a body that is a stream".into()))?.to_vec();
            let answer = http.send(http::Request::from_parts(head, body), MAX_ANSWER).await.map_err(|error| match error {
                CallError::Failed(_) => ConnectorError::io(error.into()),
                CallError::Refused(_) => ConnectorError::user(error.into()),
            })?;
            HttpResponse::try_from(answer.map(SdkBody::from)).map_err(|error| ConnectorError::other(error.into(), None))
        })
    }
}
