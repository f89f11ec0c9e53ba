//! The broker's wire format: token exchange (RFC 8693), with a closed set of errors.
//!
//! `GET /v1/bindings`, `Authorization: Bearer <the pod's projected token>`: the CredentialBindings that the pod's job may use, as far as
//! the cluster knows the job: `{"bindings": [{"name", "audience", "provider"}]}`, where `audience` is that of the token to bring, and
//! `provider` says what comes of it: `{"aws": {"region"}}`, `{"google": {"audience", "serviceAccount", "scopes", "lifetime", "stsEndpoint",
//! "iamCredentialsEndpoint"}}`, `{"azure": {"clientId", "scopes"}}`, `{"vault": {"address", "namespace"}}`, `{"githubApp": {}}` or
//! `{"audienceToken": {}}`.
//!
//! `POST /v1/token`, `application/x-www-form-urlencoded`, each parameter once:
//!
//! | parameter | value |
//! |---|---|
//! | `grant_type` | `urn:ietf:params:oauth:grant-type:token-exchange` |
//! | `subject_token` | the workflow's OIDC token |
//! | `subject_token_type` | `urn:ietf:params:oauth:token-type:jwt` or `…:id_token` |
//! | `actor_token` | the pod's projected token, audience `broker.mayfly.dev` |
//! | `actor_token_type` | `urn:ietf:params:oauth:token-type:jwt` |
//! | `audience` | `broker.mayfly.dev`; may be left out |
//! | `resource` | name of the CredentialBinding in the pod's namespace |
//! | `lifetime` | longest life wanted, in seconds, at least 900; may be left out |
//! | `scope` | some of the binding's scopes, with spaces between them; may be left out |
//! | `requested_token_type` | left out for what the binding gives; `urn:ietf:params:oauth:token-type:jwt` for the subject token itself, once all is verified, which an SDK shows to its provider |
//!
//! The answer is JSON with `access_token`, `issued_token_type`, `token_type` and `expires_in`. What `access_token` holds is said by
//! `issued_token_type`: `urn:ietf:params:oauth:token-type:jwt` is a token; `urn:ietf:params:oauth:token-type:access_token` is one for APIs
//! (`token_type` is `Bearer`; `N_A` for everything else); `urn:mayfly:params:oauth:token-type:vault-token` is Vault's;
//! `urn:mayfly:params:oauth:token-type:aws-credentials` is the JSON that AWS's `credential_process` prints (`Version`, `AccessKeyId`,
//! `SecretAccessKey`, `SessionToken`, `Expiration`).
//!
//! An error is JSON with `error`, one of [`Public`], and `correlation_id`, by which the audit records are found. It never says more.

use std::borrow::Cow;

use axum::Json;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use kube::ResourceExt;
use mayfly_crds::names::BROKER_AUDIENCE;
use mayfly_crds::{Chosen, CredentialBinding, LIFETIME_MIN};
use serde::Serialize;
use serde_json::{Value, json};

use super::decide::{Check, Denial, Public};
use super::providers::{ACCESS_TOKEN, Credential, JWT};
use super::token::MAX_TOKEN;
use crate::forge::Secret;

pub(crate) const GRANT_TYPE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const ID_TOKEN: &str = "urn:ietf:params:oauth:token-type:id_token";
/// Longest body, in bytes: two tokens and some words.
pub(crate) const MAX_BODY: usize = 32 << 10;
/// Most parameters.
const MAX_PARAMETERS: usize = 16;
/// Longest scope, in bytes.
const MAX_SCOPE: usize = 4 << 10;
/// Longest name of a binding: an object's.
const MAX_NAME: usize = 253;

/// A request, read and not yet believed.
#[derive(Debug)]
pub(crate) struct TokenRequest {
    pub(crate) subject_token: Secret,
    pub(crate) actor_token: Secret,
    pub(crate) binding: String,
    pub(crate) lifetime: Option<u32>,
    /// Words with spaces between them.
    pub(crate) scope: Option<String>,
    /// The subject token itself is wanted.
    pub(crate) itself: bool,
}

impl TokenRequest {
    /// Reads a body.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, Denial> {
        let wrong = |why: &str| Denial::new(Check::Request, Public::InvalidRequest, why);
        if body.len() > MAX_BODY {
            return Err(wrong("the body is too long"));
        }
        let text = std::str::from_utf8(body).map_err(|_| wrong("the body is no text"))?;
        let mut parameters = std::collections::HashMap::new();
        for (name, value) in form_urlencoded::parse(text.as_bytes()).take(MAX_PARAMETERS + 1) {
            if parameters.insert(name, value).is_some() {
                return Err(wrong("a parameter comes twice"));
            }
        }
        if parameters.len() > MAX_PARAMETERS {
            return Err(wrong("there are too many parameters"));
        }
        let mut take = |name: &str| parameters.remove(name).filter(|value| !value.is_empty());
        if take("grant_type").as_deref() != Some(GRANT_TYPE) {
            return Err(Denial::new(Check::Request, Public::UnsupportedGrantType, "another grant type than token exchange"));
        }
        let scope = take("scope");
        if scope.as_ref().is_some_and(|scope| scope.len() > MAX_SCOPE) {
            return Err(Denial::new(Check::Request, Public::InvalidScope, "the scope is too long"));
        }
        let kinds = (take("subject_token_type"), take("actor_token_type"), take("requested_token_type"));
        let subject = matches!(kinds.0.as_deref(), Some(JWT | ID_TOKEN));
        let itself = kinds.2.is_some();
        if !subject || kinds.1.as_deref() != Some(JWT) || kinds.2.is_some_and(|wanted| wanted != JWT) {
            return Err(wrong("a token of another type is shown or wanted; what else is given, the binding decides"));
        }
        if take("audience").is_some_and(|audience| audience != BROKER_AUDIENCE) {
            return Err(wrong("for another audience than this broker"));
        }
        let lifetime = match take("lifetime").map(|text| text.parse::<u32>()) {
            None => None,
            Some(Ok(seconds)) if seconds >= LIFETIME_MIN => Some(seconds),
            Some(_) => return Err(wrong("a lifetime that is no number of at least 900 seconds")),
        };
        let token = |text: Option<Cow<'_, str>>| text.filter(|text| text.len() <= MAX_TOKEN).map(Secret::new);
        let (Some(subject_token), Some(actor_token)) = (token(take("subject_token")), token(take("actor_token"))) else {
            return Err(wrong("a token is missing or too long"));
        };
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
        let binding = take("resource").filter(|name| name.len() <= MAX_NAME && name.bytes().all(plain));
        let binding = binding.ok_or_else(|| wrong("the resource is no name of a binding"))?;
        match parameters.is_empty() {
            true => {
                Ok(Self { subject_token, actor_token, binding: binding.into_owned(), lifetime, scope: scope.map(Cow::into_owned), itself })
            }
            false => Err(wrong("a parameter that is not known")),
        }
    }
}

/// Nobody on the way keeps an answer (RFC 6749, section 5.1).
const NO_STORE: [(HeaderName, &str); 2] = [(header::CACHE_CONTROL, "no-store"), (header::PRAGMA, "no-cache")];

/// RFC 8693, section 2.2.1.
#[derive(Serialize)]
struct Granted<'a> {
    access_token: &'a str,
    issued_token_type: &'static str,
    token_type: &'static str,
    expires_in: i64,
}

/// The answer with a credential.
pub(crate) fn granted(credential: &Credential, now: i64) -> Response {
    let body = Granted {
        access_token: credential.value.reveal(),
        issued_token_type: credential.kind,
        token_type: if credential.kind == ACCESS_TOKEN { "Bearer" } else { "N_A" },
        expires_in: credential.expires.saturating_sub(now).max(0),
    };
    (StatusCode::OK, NO_STORE, Json(body)).into_response()
}

/// The answer with what there is.
pub(crate) fn offered(bindings: &[CredentialBinding]) -> Response {
    let offers = bindings.iter().filter_map(|binding| {
        let provider = told(binding.spec.provider.chosen()?, binding.spec.lifetime_seconds);
        Some(json!({"name": binding.name_any(), "audience": binding.spec.token.audience, "provider": provider}))
    });
    (StatusCode::OK, NO_STORE, Json(json!({"bindings": offers.collect::<Vec<_>>()}))).into_response()
}

/// What a job's SDK has to know of a provider.
fn told(chosen: Chosen<'_>, lifetime: u32) -> Value {
    match chosen {
        Chosen::Aws(aws) => json!({"aws": {"region": aws.region}}),
        Chosen::Google(google) => json!({"google": {
            "audience": google.audience(), "serviceAccount": google.service_account, "scopes": google.scopes, "lifetime": lifetime,
            "stsEndpoint": google.sts_endpoint(), "iamCredentialsEndpoint": google.iam_credentials_endpoint(),
        }}),
        Chosen::Azure(azure) => json!({"azure": {"clientId": azure.client_id, "scopes": azure.scopes}}),
        Chosen::Vault(vault) => json!({"vault": {"address": vault.address, "namespace": vault.namespace}}),
        Chosen::GithubApp(_) => json!({"githubApp": {}}),
        Chosen::AudienceToken => json!({"audienceToken": {}}),
    }
}

/// The answer without one.
pub(crate) fn denied(public: Public, correlation: &str) -> Response {
    let status = match public {
        Public::InvalidClient => StatusCode::UNAUTHORIZED,
        Public::AccessDenied => StatusCode::FORBIDDEN,
        Public::TemporarilyUnavailable => StatusCode::SERVICE_UNAVAILABLE,
        Public::InvalidRequest | Public::UnsupportedGrantType | Public::InvalidScope | Public::InvalidTarget => StatusCode::BAD_REQUEST,
    };
    (status, NO_STORE, Json(json!({"error": public, "correlation_id": correlation}))).into_response()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: [(&str, &str); 7] = [
        ("grant_type", GRANT_TYPE),
        ("subject_token", "a.b.c"),
        ("subject_token_type", JWT),
        ("actor_token", "d.e.f"),
        ("actor_token_type", JWT),
        ("audience", BROKER_AUDIENCE),
        ("resource", "deploy"),
    ];

    fn parse(pairs: &[(&str, &str)]) -> Result<TokenRequest, Public> {
        let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish();
        TokenRequest::parse(body.as_bytes()).map_err(|denial| denial.public)
    }

    fn with(name: &str, value: &str) -> Result<TokenRequest, Public> {
        let mut pairs: Vec<(&str, &str)> = GOOD.iter().copied().filter(|(known, _)| *known != name).collect();
        pairs.push((name, value));
        parse(&pairs)
    }

    #[test]
    fn a_sound_request_is_read_and_hides_its_tokens() {
        let request = parse(&GOOD).expect("read");
        assert_eq!((request.subject_token.reveal(), request.actor_token.reveal()), ("a.b.c", "d.e.f"));
        assert_eq!((request.binding.as_str(), request.lifetime, request.scope.as_deref(), request.itself), ("deploy", None, None, false));
        assert!(!format!("{request:?}").contains("a.b.c"));
        assert_eq!(with("lifetime", "900").expect("read").lifetime, Some(900));
        assert!(with("subject_token_type", ID_TOKEN).is_ok());
        assert!(with("requested_token_type", JWT).expect("read").itself);
        assert_eq!(with("scope", "a b").expect("read").scope.as_deref(), Some("a b"));
    }

    #[test]
    fn every_other_request_is_refused_with_one_of_few_words() {
        use Public::{InvalidRequest, InvalidScope, UnsupportedGrantType};
        let long = "x".repeat(MAX_TOKEN + 1);
        for (name, value, wanted) in [
            ("grant_type", "client_credentials", UnsupportedGrantType),
            ("grant_type", "", UnsupportedGrantType),
            ("scope", &long, InvalidScope),
            ("subject_token", "", InvalidRequest),
            ("subject_token", &long, InvalidRequest),
            ("subject_token_type", "urn:ietf:params:oauth:token-type:saml2", InvalidRequest),
            ("actor_token", "", InvalidRequest),
            ("actor_token_type", ID_TOKEN, InvalidRequest),
            ("requested_token_type", ACCESS_TOKEN, InvalidRequest),
            ("audience", "https://elsewhere.example", InvalidRequest),
            ("resource", "", InvalidRequest),
            ("resource", "../other/deploy", InvalidRequest),
            ("resource", "other/deploy", InvalidRequest),
            ("resource", "Deploy", InvalidRequest),
            ("lifetime", "60", InvalidRequest),
            ("lifetime", "-900", InvalidRequest),
            ("lifetime", "1e9", InvalidRequest),
            ("policy", "{}", InvalidRequest),
        ] {
            assert_eq!(with(name, value).map(drop), Err(wanted), "{name}={value}");
        }
        for (name, _) in GOOD {
            let twice: Vec<(&str, &str)> = GOOD.iter().chain(GOOD.iter().filter(|(known, _)| *known == name)).copied().collect();
            assert_eq!(parse(&twice).map(drop), Err(InvalidRequest), "{name} twice");
        }
        assert!(TokenRequest::parse(&[0xff; 10]).is_err(), "bad UTF-8");
        assert!(TokenRequest::parse("a=1&".repeat(10_000).as_bytes()).is_err(), "10 000 parameters");
    }

    proptest! {
        #[test]
        fn noise_is_refused(body in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(TokenRequest::parse(&body).is_err());
        }
    }
}
