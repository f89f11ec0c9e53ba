//! What every provider keeps, against a stand-in that speaks the documented protocol.

use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jiff::Timestamp;
use mayfly_crds::{AudienceToken, Aws as AwsSpec, Azure, Google, Installation, Permission, Vault};
use mayfly_github_simulator::client::Simulator;
use mayfly_github_simulator::control::{NewOrganization, NewRepository};
use mayfly_github_simulator::server;

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
    signing_for(Vec::new())
}

fn signing_for(apps: Vec<AppConfig>) -> Providers {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    Providers::new(Http::new(None, |_| None).expect("a client"), apps)
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
    Provider { aws: Some(aws), ..Provider::default() }
}

const POOL: &str = "projects/123/locations/global/workloadIdentityPools/ci-pool/providers/mayfly";
const ACCOUNT: &str = "deploy@acme.iam.gserviceaccount.com";
const ID: &str = "00000000-1111-2222-3333-444444444444";

fn google(sts: &Sts, service_account: Option<&str>) -> Provider {
    let google = Google {
        workload_identity_provider: POOL.to_owned(),
        service_account: service_account.map(str::to_owned),
        scopes: vec!["https://www.googleapis.com/auth/devstorage.read_only".to_owned()],
        sts_endpoint: Some(sts.url.clone()),
        iam_credentials_endpoint: Some(sts.url.clone()),
    };
    Provider { google: Some(google), ..Provider::default() }
}

fn azure(sts: &Sts) -> Provider {
    let azure = Azure {
        tenant_id: ID.to_owned(),
        client_id: ID.replace('4', "5"),
        scopes: vec!["https://management.azure.com/.default".to_owned()],
        authority_host: Some(sts.url.clone()),
    };
    Provider { azure: Some(azure), ..Provider::default() }
}

fn vault(sts: &Sts) -> Provider {
    let (mount, role) = ("ci/jwt".to_owned(), "deploy".to_owned());
    let vault = Vault { address: sts.url.clone(), mount, role, namespace: Some("team".to_owned()) };
    Provider { vault: Some(vault), ..Provider::default() }
}

fn audience_token() -> Provider {
    Provider { audience_token: Some(AudienceToken {}), ..Provider::default() }
}

fn json_answer(answer: &Value) -> (u16, String) {
    (200, answer.to_string())
}

/// The answer of Google's STS.
fn federated(life: i64) -> (u16, String) {
    json_answer(&json!({"access_token": "key-of-the-job", "issued_token_type": ACCESS_TOKEN, "token_type": "Bearer", "expires_in": life}))
}

/// That of Google's IAM.
fn impersonated(expires: i64) -> (u16, String) {
    let when = Timestamp::from_second(expires).expect("a time").to_string();
    json_answer(&json!({"accessToken": "session-of-the-job", "expireTime": when}))
}

/// That of Entra.
fn entra(life: i64) -> (u16, String) {
    json_answer(&json!({"token_type": "Bearer", "expires_in": life, "ext_expires_in": life, "access_token": "key-of-the-job"}))
}

/// That of Vault.
fn login(life: i64, kind: &str) -> (u16, String) {
    json_answer(&json!({"request_id": "r", "auth": {
        "client_token": "key-of-the-job", "accessor": "accessor-1", "policies": ["default", "deploy"], "lease_duration": life,
        "renewable": true, "token_type": kind}}))
}

async fn exchange(provider: &Provider) -> Result<Credential, ProviderError> {
    ordered(provider, false).await
}

async fn ordered(provider: &Provider, itself: bool) -> Result<Credential, ProviderError> {
    let token = Secret::new(TOKEN);
    let scopes = provider.chosen().map(|chosen| chosen.scopes().to_vec()).unwrap_or_default();
    providers().exchange(&order(provider, &token, &scopes, itself)).await
}

fn order<'a>(provider: &'a Provider, token: &'a Secret, scopes: &'a [String], itself: bool) -> Order<'a> {
    Order { provider, token, token_expires: NOW + 300, itself, scopes, lifetime: 900, session: "mayfly-1-1-1", now: NOW }
}

/// One contract for all of them.
#[tokio::test]
async fn every_provider_gives_a_credential_that_ends_and_records_that_hold_no_secret() {
    let sts =
        Sts::start(vec![granted(NOW + 900), federated(300), federated(300), impersonated(NOW + 900), entra(900), login(900, "service")])
            .await;
    for provider in [aws(&sts), google(&sts, None), google(&sts, Some(ACCOUNT)), azure(&sts), vault(&sts), audience_token()] {
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
    let both = Provider { audience_token: Some(AudienceToken {}), ..aws(&sts) };
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
        assert_eq!(sts.call(0).parameter(name).as_deref(), Some(wanted), "{name}");
    }
}

#[tokio::test]
async fn google_is_asked_for_what_the_binding_says() {
    let sts = Sts::start(vec![federated(300), federated(300), impersonated(NOW + 900)]).await;
    let credential = exchange(&google(&sts, None)).await.expect("a credential");
    assert_eq!((credential.value.reveal(), credential.kind, credential.expires), ("key-of-the-job", ACCESS_TOKEN, NOW + 300));
    let read_only = "https://www.googleapis.com/auth/devstorage.read_only";
    let asked = |number: usize, scope: &str| {
        let call = sts.call(number);
        assert_eq!(call.path, "/v1/token");
        for (name, wanted) in [
            ("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange"),
            ("audience", &format!("//iam.googleapis.com/{POOL}")),
            ("scope", scope),
            ("requested_token_type", ACCESS_TOKEN),
            ("subject_token", TOKEN),
            ("subject_token_type", JWT),
        ] {
            assert_eq!(call.parameter(name).as_deref(), Some(wanted), "{name}");
        }
    };
    asked(0, read_only);
    let credential = exchange(&google(&sts, Some(ACCOUNT))).await.expect("a credential");
    assert_eq!((credential.value.reveal(), credential.expires), ("session-of-the-job", NOW + 900));
    asked(1, "https://www.googleapis.com/auth/cloud-platform");
    let call = sts.call(2);
    assert_eq!(call.path, format!("/v1/projects/-/serviceAccounts/{ACCOUNT}:generateAccessToken"));
    assert_eq!(call.headers["authorization"], "Bearer key-of-the-job");
    assert_eq!(serde_json::from_str::<Value>(&call.body).expect("JSON"), json!({"scope": [read_only], "lifetime": "900s"}));
}

#[tokio::test]
async fn azure_is_asked_for_what_the_binding_says() {
    let sts = Sts::start(vec![entra(900)]).await;
    let credential = exchange(&azure(&sts)).await.expect("a credential");
    assert_eq!((credential.value.reveal(), credential.kind, credential.expires), ("key-of-the-job", ACCESS_TOKEN, NOW + 900));
    let call = sts.call(0);
    assert_eq!(call.path, format!("/{ID}/oauth2/v2.0/token"));
    for (name, wanted) in [
        ("grant_type", "client_credentials"),
        ("client_id", &ID.replace('4', "5")),
        ("scope", "https://management.azure.com/.default"),
        ("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"),
        ("client_assertion", TOKEN),
    ] {
        assert_eq!(call.parameter(name).as_deref(), Some(wanted), "{name}");
    }
}

#[tokio::test]
async fn vault_is_logged_in_to_and_its_token_is_revoked() {
    let sts = Sts::start(vec![login(900, "service"), (204, String::new())]).await;
    let credential = exchange(&vault(&sts)).await.expect("a credential");
    assert_eq!((credential.value.reveal(), credential.expires, credential.revocable), ("key-of-the-job", NOW + 900, true));
    let call = sts.call(0);
    assert_eq!((call.path.as_str(), &call.headers["x-vault-namespace"]), ("/v1/auth/ci/jwt/login", &"team".parse().expect("a value")));
    assert_eq!(serde_json::from_str::<Value>(&call.body).expect("JSON"), json!({"role": "deploy", "jwt": TOKEN}));
    assert_eq!(providers().revoke(&vault(&sts), &credential.value).await, Ok(()));
    let call = sts.call(1);
    assert_eq!(
        (call.path.as_str(), &call.headers["x-vault-token"]),
        ("/v1/auth/token/revoke-self", &"key-of-the-job".parse().expect("a value"))
    );
    assert_eq!(call.headers["x-vault-namespace"], "team");

    sts.then(vec![login(900, "batch")]);
    assert!(!exchange(&vault(&sts)).await.expect("a credential").revocable, "a batch token cannot be revoked");
}

#[tokio::test]
async fn a_token_of_vault_that_lives_too_long_is_revoked_before_anybody_has_it() {
    for life in [0, 901, -1] {
        let sts = Sts::start(vec![login(life, "service"), (204, String::new())]).await;
        let refused = exchange(&vault(&sts)).await.expect_err("too long");
        assert!(matches!(&refused, ProviderError::Refused(why) if why.contains("lifetimeSeconds")), "{refused}");
        assert_eq!((sts.calls(), sts.call(1).path.as_str()), (2, "/v1/auth/token/revoke-self"));
    }
}

/// A binding for the repository `web` of an installation.
fn github_app(client_id: &str, installation_id: i64) -> Provider {
    let (client_id, repositories) = (client_id.to_owned(), vec!["web".to_owned()]);
    let permissions = [("contents".to_owned(), Permission::Read)].into();
    Provider { github_app: Some(Installation { client_id, installation_id, repositories, permissions }), ..Provider::default() }
}

/// A file of this test's own.
fn scratch(text: &str) -> PathBuf {
    let file = std::env::temp_dir().join(format!("mayfly-github-app-{}", crate::audit::uuid()));
    std::fs::write(&file, text).expect("a file");
    file
}

/// The answer of GitHub: one repository is selected, with these permissions.
fn installation(selection: &str, permissions: &Value) -> (u16, String) {
    let when = Timestamp::from_second(NOW + 3600).expect("a time").to_string();
    let body = json!({"token": "key-of-the-job", "expires_at": when, "permissions": permissions, "repository_selection": selection});
    (201, body.to_string())
}

#[tokio::test]
async fn github_is_asked_in_the_name_of_the_app_and_its_key_stays_in_vault() {
    let signed = (200, json!({"data": {"signature": "vault:v1:AQID"}}).to_string());
    let narrow = json!({"contents": "read", "metadata": "read"});
    let github = Sts::start(vec![signed.clone(), installation("selected", &narrow), (204, String::new())]).await;
    let file = scratch("token-of-vault\n");
    let providers = signing_for(vec![AppConfig::with_transit("Iv1.a", &github.url, &file)]);
    let (provider, token) = (github_app("Iv1.a", 7), Secret::new(TOKEN));
    let credential = providers.exchange(&order(&provider, &token, &[], false)).await.expect("a credential");
    assert_eq!((credential.value.reveal(), credential.expires, credential.revocable), ("key-of-the-job", NOW + 3600, true));
    let call = github.call(0);
    assert_eq!((call.path.as_str(), &call.headers["x-vault-token"]), ("/v1/transit/sign/app", &"token-of-vault".parse().expect("a value")));
    let asked: Value = serde_json::from_str(&call.body).expect("JSON");
    assert_eq!((&asked["hash_algorithm"], &asked["signature_algorithm"]), (&json!("sha2-256"), &json!("pkcs1v15")));
    let input = String::from_utf8(STANDARD.decode(asked["input"].as_str().expect("text")).expect("base64")).expect("text");
    let claims = URL_SAFE_NO_PAD.decode(input.split('.').nth(1).expect("claims")).expect("base64");
    let claims: Value = serde_json::from_slice(&claims).expect("JSON");
    assert_eq!(claims, json!({"iss": "Iv1.a", "iat": NOW - 60, "exp": NOW + 480}));
    let call = github.call(1);
    assert_eq!(
        (call.path.as_str(), &call.headers["authorization"]),
        ("/app/installations/7/access_tokens", &format!("Bearer {input}.AQID").parse().expect("a value"))
    );
    assert_eq!(
        serde_json::from_str::<Value>(&call.body).expect("JSON"),
        json!({"repositories": ["web"], "permissions": {"contents": "read"}})
    );
    let about = credential.about.to_string();
    assert!(!about.contains("of-the-job") && !about.contains(TOKEN), "{about}");
    assert_eq!(providers.revoke(&provider, &credential.value).await, Ok(()));
    let call = github.call(2);
    assert_eq!((call.method.as_str(), call.path.as_str()), ("DELETE", "/installation/token"));
    assert_eq!(call.headers["authorization"], "Bearer key-of-the-job");

    // More than was asked for is taken back.
    for (selection, permissions) in [("all", narrow), ("selected", json!({"contents": "write"})), ("selected", json!({"issues": "read"}))] {
        let before = github.calls();
        github.then(vec![signed.clone(), installation(selection, &permissions), (204, String::new())]);
        let refused = providers.exchange(&order(&provider, &token, &[], false)).await.expect_err("too much");
        assert_eq!(refused, ProviderError::Refused("GitHub gave more than was asked for".to_owned()));
        assert_eq!(github.call(before + 2).method.as_str(), "DELETE");
    }
    let unknown = providers.exchange(&order(&github_app("Iv1.b", 7), &token, &[], false)).await.expect_err("another App");
    assert!(matches!(unknown, ProviderError::Refused(why) if why.contains("broker.githubApps")));
    std::fs::remove_file(file).expect("removed");
}

/// The simulator checks the App's signature, and what its tokens reach.
#[tokio::test]
async fn a_token_of_an_installation_reaches_its_repositories_until_it_is_revoked() {
    let server = server::Server::start(server::Config::default()).await.expect("a simulator");
    let simulator = Simulator::new(&server.url, b"");
    simulator.organization(&NewOrganization { login: "acme".to_owned(), enterprise: None }).await.expect("an organization");
    for name in ["web", "secrets"] {
        let repository = NewRepository { owner: "acme".to_owned(), name: name.to_owned(), ..NewRepository::default() };
        simulator.repository(&repository).await.expect("a repository");
    }
    let (app, installation) = simulator.app("acme").await.expect("an App");
    let api = format!("{}/api/v3", server.url);
    let file = scratch(&app.private_key);
    let providers = signing_for(vec![AppConfig::with_key(&app.client_id, &api, &file)]);
    let (provider, token, now) = (github_app(&app.client_id, installation), Secret::new(TOKEN), Timestamp::now().as_second());
    let order = Order { lifetime: 3600, now, token_expires: now + 300, ..order(&provider, &token, &[], false) };
    let credential = providers.exchange(&order).await.expect("a credential");
    let reached = async || {
        let request = reqwest::Client::new().get(format!("{api}/installation/repositories")).bearer_auth(credential.value.reveal());
        let answer = request.send().await.expect("an answer");
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap_or_default()["repositories"][0]["full_name"].clone())
    };
    assert_eq!(reached().await, (200, json!("acme/web")));
    assert_eq!(providers.revoke(&provider, &credential.value).await, Ok(()));
    assert_eq!(reached().await.0, 401);
    std::fs::remove_file(file).expect("removed");
}

#[tokio::test]
async fn the_token_itself_is_given_without_asking_anybody() {
    let sts = Sts::start(vec![federated(300)]).await;
    for provider in [google(&sts, Some(ACCOUNT)), azure(&sts), vault(&sts), aws(&sts)] {
        let credential = ordered(&provider, true).await.expect("a credential");
        assert_eq!((credential.value.reveal(), credential.kind, credential.expires), (TOKEN, JWT, NOW + 300));
    }
    assert_eq!(sts.calls(), 0);
    assert!(matches!(providers().revoke(&google(&sts, None), &Secret::new("x")).await, Err(ProviderError::Refused(_))));
}

#[tokio::test]
async fn errors_of_those_that_speak_json_are_told_by_their_code() {
    let repeats = format!("{TOKEN} is not to be repeated");
    let rows = [
        (400, json!({"error": "invalid_grant", "error_description": repeats}), " invalid_grant"),
        (403, json!({"error": {"code": 403, "message": repeats, "status": "PERMISSION_DENIED"}}), " PERMISSION_DENIED"),
        (401, json!({"error": "invalid_client", "error_description": repeats, "error_codes": [700_213]}), " invalid_client AADSTS700213"),
        (400, json!({"errors": [repeats]}), ""),
        (400, json!([repeats]), ""),
        (404, json!({"error": "<b>\u{1b}[31m"}), " b31m"),
    ];
    for (status, body, wanted) in rows {
        let sts = Sts::start(vec![(status, body.to_string())]).await;
        for (provider, who) in [(google(&sts, None), "Google's STS"), (azure(&sts), "Entra"), (vault(&sts), "Vault")] {
            let refused = exchange(&provider).await.expect_err("refused");
            assert_eq!(refused, ProviderError::Refused(format!("{who} answers {status}{wanted}")), "without its message");
        }
        assert_eq!(sts.calls(), 3, "a refusal is final");
    }
    for status in [429, 500, 503] {
        let sts = Sts::start(vec![(status, String::new()), entra(900)]).await;
        assert!(exchange(&azure(&sts)).await.is_ok(), "{status}");
        sts.then(vec![(status, repeats.clone())]);
        assert_eq!(exchange(&azure(&sts)).await.expect_err("away"), ProviderError::Unavailable(format!("Entra answers {status}")));
        assert_eq!(sts.calls(), 5, "three tries and no more");
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
    let answers = [
        (200, "nonsense".to_owned()),
        (200, nothing.to_owned()),
        (200, "{}".to_owned()),
        (204, String::new()),
        granted(NOW - 1),
        federated(0),
        impersonated(NOW),
        entra(-5),
        json_answer(&json!({"access_token": "", "expires_in": 900})),
        json_answer(&json!({"access_token": ["key-of-the-job"], "expires_in": 900})),
        json_answer(&json!({"access_token": "key-of-the-job"})),
        json_answer(&json!({"auth": {"client_token": "key-of-the-job"}})),
        json_answer(&json!({"auth": null})),
        (302, String::new()),
        (200, "x".repeat(1 << 20)),
    ];
    for answer in answers {
        let sts = Sts::start(vec![answer.clone()]).await;
        for provider in [aws(&sts), google(&sts, None), google(&sts, Some(ACCOUNT)), azure(&sts), vault(&sts)] {
            let error = exchange(&provider).await.expect_err("no credential").to_string();
            assert!(!error.contains(TOKEN) && !error.contains("of-the-job"), "{error}");
        }
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
    let guarded = Providers::new(Http::new(None, super::super::http::no_server_at).expect("a client"), Vec::new());
    for provider in [provider, google(&sts, None), azure(&sts), vault(&sts)] {
        assert!(guarded.exchange(&order(&provider, &token, &[], false)).await.is_err());
    }
    assert_eq!(sts.calls(), 0);
}

#[test]
fn a_session_is_named_after_the_job_in_letters_that_aws_takes() {
    assert_eq!(session_name("900", "2", "31"), "mayfly-900-2-31");
    assert_eq!(session_name("9 0/0\n", "é", ""), "mayfly-900--");
    assert_eq!(session_name(&"9".repeat(100), "1", "1").len(), 64);
}
