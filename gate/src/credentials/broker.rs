//! The gate's side of the broker's API: token exchange (RFC 8693), and what there is to exchange for.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use ureq::Agent;
use ureq::http::Response;
use ureq::tls::Certificate;

use crate::http::agent;

/// Deadline of one call: longer than the broker takes with a slow cloud.
const CALL: Duration = Duration::from_secs(30);
/// Longest answer, in bytes.
const MAX_ANSWER: u64 = 64 << 10;
const GRANT_TYPE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const JWT: &str = "urn:ietf:params:oauth:token-type:jwt";

/// A binding that this job may use.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub(crate) struct Offer {
    /// Name of the CredentialBinding.
    pub(crate) name: String,
    /// The audience that the job's token has to have.
    pub(crate) audience: String,
    /// What comes of it.
    pub(crate) provider: Provider,
}

/// What a binding gives.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub(crate) enum Provider {
    /// A session of an AWS role.
    Aws {
        /// Region of its STS.
        region: String,
    },
    /// An access token of Google Cloud.
    Google {
        /// The workload identity provider, as the STS is asked for it.
        audience: String,
        service_account: Option<String>,
        /// Longest life of a service account's token, in seconds.
        lifetime: u32,
        sts_endpoint: String,
        iam_credentials_endpoint: String,
    },
    /// An access token of Microsoft Entra.
    Azure {
        client_id: String,
        /// What there are tokens for.
        scopes: Vec<String>,
    },
    /// A token of Vault.
    Vault { address: String, namespace: Option<String> },
    /// A token of a GitHub App's installation.
    GithubApp {},
    /// The token itself.
    AudienceToken {},
}

/// A kind of provider, of which SDKs find the one by themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Aws,
    Google,
    Azure,
    Vault,
    GithubApp,
    AudienceToken,
}

impl Provider {
    /// Of what kind it is.
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Aws { .. } => Kind::Aws,
            Self::Google { .. } => Kind::Google,
            Self::Azure { .. } => Kind::Azure,
            Self::Vault { .. } => Kind::Vault,
            Self::GithubApp {} => Kind::GithubApp,
            Self::AudienceToken {} => Kind::AudienceToken,
        }
    }

    /// What is wanted where nobody says.
    pub(crate) fn usual(&self) -> Wish {
        let scope = match self {
            Self::Azure { scopes, .. } => scopes.first().cloned(),
            _ => None,
        };
        Wish { itself: false, scope }
    }
}

/// What is wanted of a binding.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Wish {
    /// The job's token itself, rather than what the provider gives for it.
    pub(crate) itself: bool,
    /// For this scope rather than for those of the binding.
    pub(crate) scope: Option<String>,
}

/// What was given out.
#[derive(Deserialize)]
pub(crate) struct Granted {
    /// As its kind says; secret.
    pub(crate) access_token: String,
    /// Of the answer, in seconds.
    pub(crate) expires_in: u64,
}

/// Why nothing was given out. The texts hold no secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// Asking again changes nothing.
    Denied(String),
    /// Asking again may help.
    Passing(String),
}

impl Trouble {
    /// In words.
    pub(crate) fn into_text(self) -> String {
        match self {
            Self::Denied(text) | Self::Passing(text) => text,
        }
    }
}

/// A client of the broker.
pub(crate) struct Broker {
    agent: Agent,
    url: String,
    token_file: PathBuf,
}

impl Broker {
    /// `authority` (PEM) is the only one trusted.
    pub(crate) fn new(url: &str, authority: &str, token_file: &Path) -> Result<Self, String> {
        let authority = Certificate::from_pem(authority.as_bytes()).map_err(|error| format!("the broker's authority: {error}"))?;
        Ok(Self { agent: agent(vec![authority], CALL, true), url: url.trim_end_matches('/').to_owned(), token_file: token_file.to_owned() })
    }

    /// Bindings that the job may use, as far as is known before its token is seen.
    pub(crate) fn offers(&self) -> Result<Vec<Offer>, Trouble> {
        self.bindings("/v1/bindings")
    }

    /// Bindings that some job of this pod's pool may use.
    pub(crate) fn offers_to_any_job(&self) -> Result<Vec<Offer>, Trouble> {
        self.bindings("/v1/bindings?job=any")
    }

    fn bindings(&self, path: &str) -> Result<Vec<Offer>, Trouble> {
        #[derive(Deserialize)]
        struct Answer {
            bindings: Vec<Offer>,
        }
        let request = self.agent.get(format!("{}{path}", self.url)).header("Authorization", format!("Bearer {}", self.pod_token()?));
        read::<Answer>(request.call()).map(|answer| answer.bindings)
    }

    /// Trades a token of the job for what the binding gives.
    pub(crate) fn exchange(&self, binding: &str, subject_token: &str, wish: &Wish) -> Result<Granted, Trouble> {
        let pod_token = self.pod_token()?;
        let mut form = vec![
            ("grant_type", GRANT_TYPE),
            ("subject_token", subject_token),
            ("subject_token_type", JWT),
            ("actor_token", &pod_token),
            ("actor_token_type", JWT),
            ("resource", binding),
        ];
        if wish.itself {
            form.push(("requested_token_type", JWT));
        }
        if let Some(scope) = &wish.scope {
            form.push(("scope", scope));
        }
        read(self.agent.post(format!("{}/v1/token", self.url)).send_form(form))
    }

    fn pod_token(&self) -> Result<String, Trouble> {
        let token = fs::read_to_string(&self.token_file);
        token.map(|token| token.trim().to_owned()).map_err(|error| Trouble::Passing(format!("the pod's token cannot be read: {error}")))
    }
}

fn read<T: for<'a> Deserialize<'a>>(answer: Result<Response<ureq::Body>, ureq::Error>) -> Result<T, Trouble> {
    #[derive(Default, Deserialize)]
    struct Refusal {
        #[serde(default)]
        error: String,
        #[serde(default)]
        correlation_id: String,
    }
    let unreachable = |error: ureq::Error| Trouble::Passing(format!("the broker cannot be asked: {error}"));
    let mut answer = answer.map_err(unreachable)?;
    let status = answer.status();
    let body = answer.body_mut().with_config().limit(MAX_ANSWER).read_to_vec().map_err(unreachable)?;
    if status.is_success() {
        // Of what cannot be read nothing is quoted: it may be a credential.
        return serde_json::from_slice(&body).map_err(|_| Trouble::Passing("the broker's answer cannot be read".to_owned()));
    }
    let refusal: Refusal = serde_json::from_slice(&body).unwrap_or_default();
    let plain =
        |text: &str| text.chars().filter(|letter| letter.is_ascii_alphanumeric() || "-_".contains(*letter)).take(64).collect::<String>();
    let text =
        format!("the broker answers {} {} (correlation id {})", status.as_u16(), plain(&refusal.error), plain(&refusal.correlation_id));
    match status.is_server_error() || status.as_u16() == 429 {
        true => Err(Trouble::Passing(text)),
        false => Err(Trouble::Denied(text)),
    }
}
