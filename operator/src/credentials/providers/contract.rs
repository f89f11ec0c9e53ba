//! What every provider keeps, against a stand-in that speaks the documented protocol.

use mayfly_crds::{AudienceToken as AudienceTokenSpec, Aws as AwsSpec};

use super::stand_in::{Sts, granted};
use super::*;

const NOW: i64 = 1_800_000_000;
const TOKEN: &str = "header.payload.signature-of-the-job";

fn error(status: u16, code: &str) -> (u16, String) {
    let text = format!(
        r#"<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type><Code>{code}</Code>
        <Message>{TOKEN} is not to be repeated</Message></Error><RequestId>r</RequestId></ErrorResponse>"#
    );
    (status, text)
}

fn providers() -> Providers {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    Providers::new(Http::new(None, |_| None).expect("a client"))
}

fn aws(sts: &Sts) -> Provider {
    let aws = AwsSpec {
        role_arn: "arn:aws:iam::123456789012:role/ci".to_owned(),
        region: "eu-central-1".to_owned(),
        endpoint: Some(sts.url.clone()),
        session_policy: Some(r#"{"Version":"2012-10-17"}"#.to_owned()),
        policy_arns: vec!["arn:aws:iam::aws:policy/ReadOnlyAccess".to_owned()],
        ..AwsSpec::default()
    };
    Provider { aws: Some(aws), audience_token: None }
}

fn audience_token() -> Provider {
    Provider { aws: None, audience_token: Some(AudienceTokenSpec {}) }
}

async fn exchange(provider: &Provider) -> Result<Credential, ProviderError> {
    let token = Secret::new(TOKEN);
    let order = Order { provider, token: &token, token_expires: NOW + 300, lifetime: 900, session: "mayfly-1-1-1", now: NOW };
    providers().exchange(&order).await
}

/// One contract for all of them.
#[tokio::test]
async fn every_provider_gives_a_credential_that_ends_and_records_that_hold_no_secret() {
    let sts = Sts::start(vec![granted(NOW + 900)]).await;
    for provider in [aws(&sts), audience_token()] {
        let credential = exchange(&provider).await.expect("a credential");
        assert!(credential.expires > NOW && credential.expires <= NOW + 900, "no more life than was ordered");
        assert!(credential.kind.starts_with("urn:"));
        let (about, value) = (credential.about.to_string(), credential.value.reveal().to_owned());
        for secret in [TOKEN, "key-of-the-job", "session-of-the-job", value.as_str()] {
            assert!(!about.contains(secret), "{about}");
        }
        assert!(!format!("{credential:?}").contains("of-the-job"));
    }
}

#[tokio::test]
async fn a_binding_without_a_provider_or_with_two_gets_nothing() {
    let sts = Sts::start(vec![granted(NOW + 900)]).await;
    let both = Provider { audience_token: Some(AudienceTokenSpec {}), ..aws(&sts) };
    for provider in [Provider::default(), both] {
        assert!(matches!(exchange(&provider).await, Err(ProviderError::Refused(_))));
    }
    assert_eq!(sts.calls(), 0);
}

#[tokio::test]
async fn aws_is_asked_for_what_the_binding_says() {
    let sts = Sts::start(vec![granted(NOW + 900)]).await;
    let credential = exchange(&aws(&sts)).await.expect("a credential");
    let value: Value = serde_json::from_str(credential.value.reveal()).expect("JSON");
    assert_eq!(
        value,
        json!({"Version": 1, "AccessKeyId": "ASIAEXAMPLE", "SecretAccessKey": "key-of-the-job", "SessionToken": "session-of-the-job",
            "Expiration": "2027-01-15T08:15:00Z"})
    );
    for (name, wanted) in [
        ("Action", "AssumeRoleWithWebIdentity"),
        ("Version", "2011-06-15"),
        ("RoleArn", "arn:aws:iam::123456789012:role/ci"),
        ("RoleSessionName", "mayfly-1-1-1"),
        ("WebIdentityToken", TOKEN),
        ("DurationSeconds", "900"),
        ("Policy", r#"{"Version":"2012-10-17"}"#),
        ("PolicyArns.member.1.arn", "arn:aws:iam::aws:policy/ReadOnlyAccess"),
    ] {
        assert_eq!(sts.last(name).as_deref(), Some(wanted), "{name}");
    }
}

#[tokio::test]
async fn a_refusal_is_final_and_trouble_is_tried_again() {
    for (status, code) in [
        (403, "AccessDenied"),
        (400, "InvalidIdentityToken"),
        (403, "IDPRejectedClaim"),
        (400, "ExpiredTokenException"),
        (400, "PackedPolicyTooLarge"),
        (400, "MalformedPolicyDocument"),
        (403, "RegionDisabledException"),
    ] {
        let sts = Sts::start(vec![error(status, code)]).await;
        let refused = exchange(&aws(&sts)).await.expect_err(code);
        assert_eq!(refused, ProviderError::Refused(format!("STS answers {status} {code}")), "without STS's message");
        assert_eq!(sts.calls(), 1, "{code}");
    }
    for (status, code) in [(400, "IDPCommunicationError"), (400, "Throttling"), (500, "InternalFailure"), (503, "ServiceUnavailable")] {
        let sts = Sts::start(vec![error(status, code), granted(NOW + 900)]).await;
        assert!(exchange(&aws(&sts)).await.is_ok(), "{code}");
        assert_eq!(sts.calls(), 2, "{code}");
        sts.then(vec![error(status, code)]);
        assert_eq!(exchange(&aws(&sts)).await.expect_err(code), ProviderError::Unavailable(format!("STS answers {status} {code}")));
        assert_eq!(sts.calls(), 5, "{code}: three tries and no more");
    }
}

#[tokio::test]
async fn an_answer_that_is_none_gives_no_credential() {
    let nothing = "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult/></AssumeRoleWithWebIdentityResponse>";
    for answer in
        [(200, "nonsense".to_owned()), (200, nothing.to_owned()), granted(NOW - 1), (302, String::new()), (200, "x".repeat(1 << 20))]
    {
        let sts = Sts::start(vec![answer.clone()]).await;
        let error = exchange(&aws(&sts)).await.expect_err("no credential");
        assert!(!error.to_string().contains(TOKEN), "{error}");
    }
}

#[tokio::test]
async fn an_sts_that_is_away_is_an_outage_and_one_at_a_metadata_endpoint_is_not_spoken_to() {
    let sts = Sts::start(vec![granted(NOW + 900)]).await;
    let mut away = aws(&sts);
    away.aws.as_mut().expect("aws").endpoint = Some("http://127.0.0.1:1".to_owned());
    assert!(matches!(exchange(&away).await, Err(ProviderError::Unavailable(_))));
    let token = Secret::new(TOKEN);
    let provider = aws(&sts);
    let order = Order { provider: &provider, token: &token, token_expires: NOW + 300, lifetime: 900, session: "mayfly-1-1-1", now: NOW };
    let guarded = Providers::new(Http::new(None, super::super::http::no_server_at).expect("a client"));
    assert!(guarded.exchange(&order).await.is_err());
    assert_eq!(sts.calls(), 0);
}

#[test]
fn a_session_is_named_after_the_job_in_letters_that_aws_takes() {
    assert_eq!(session_name("900", "2", "31"), "mayfly-900-2-31");
    assert_eq!(session_name("9 0/0\n", "é", ""), "mayfly-900--");
    assert_eq!(session_name(&"9".repeat(100), "1", "1").len(), 64);
}
