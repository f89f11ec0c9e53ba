//! `workflow_job` webhooks: a hint that something changed, never the truth about what.
//!
//! Gitea sends GitHub's header names beside its own; the signature is HMAC-SHA-256 over the raw body (docs.github.com, "Validating webhook
//! deliveries"). The number of a delivery (`X-GitHub-Delivery`) is not signed, so that it cannot tell one that is played again: a hint that
//! comes again has to be harmless.

use aws_lc_rs::hmac::{self, HMAC_SHA256, Key};
use serde::Deserialize;

use super::{Repository, Secret};

/// Longest body accepted, in bytes. Those of both forges are some ten kilobytes.
pub(crate) const MAX_BODY: usize = 1 << 20;

/// Why a delivery is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone, Copy)]
pub(crate) enum Refusal {
    /// There is no `X-Hub-Signature-256` header.
    #[error("the X-Hub-Signature-256 header is missing: set a secret on the webhook")]
    Unsigned,
    /// The signature does not fit the body and the secret.
    #[error("the signature does not match: the webhook's secret is not the one in webhookSecretRef")]
    WrongSignature,
    /// Signed, but not JSON with a repository.
    #[error("the body is not a workflow_job event")]
    Malformed,
}

/// Checks `X-Hub-Signature-256` (`sha256=<hex>`) over the raw body, in constant time.
pub(crate) fn verify(secret: &Secret, signature: Option<&[u8]>, body: &[u8]) -> Result<(), Refusal> {
    let signature = signature.ok_or(Refusal::Unsigned)?;
    let digest = signature.strip_prefix(b"sha256=").and_then(from_hex).ok_or(Refusal::WrongSignature)?;
    if secret.reveal().is_empty() {
        return Err(Refusal::WrongSignature);
    }
    let key = Key::new(HMAC_SHA256, secret.reveal().as_bytes());
    hmac::verify(&key, body, &digest).map_err(|_| Refusal::WrongSignature)
}

fn from_hex(hex: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|d| u8::try_from(d).ok());
    if hex.len() != 64 {
        return None;
    }
    hex.chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

/// What a verified delivery speaks of.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Hint {
    /// The repository.
    pub(crate) repository: Repository,
    /// The job, where the event is about one.
    pub(crate) job: Option<u64>,
    /// Its `runs-on`.
    pub(crate) labels: Vec<String>,
}

impl Refusal {
    /// A word for metrics.
    pub(crate) fn category(self) -> &'static str {
        match self {
            Self::Unsigned => "unsigned",
            Self::WrongSignature => "wrong_signature",
            Self::Malformed => "malformed",
        }
    }
}

/// Reads a verified delivery of this event. `None` for one that only asks whether anybody is there.
pub(crate) fn read(event: Option<&[u8]>, body: &[u8]) -> Result<Option<Hint>, Refusal> {
    if event == Some(b"ping") {
        return Ok(None);
    }
    #[derive(Deserialize)]
    struct Event {
        repository: Named,
        workflow_job: Option<Numbered>,
    }
    #[derive(Deserialize)]
    struct Named {
        full_name: String,
    }
    #[derive(Deserialize)]
    struct Numbered {
        id: u64,
        #[serde(default)]
        labels: Vec<String>,
    }
    let event: Event = serde_json::from_slice(body).map_err(|_| Refusal::Malformed)?;
    let repository = Repository::parse(&event.repository.full_name).ok_or(Refusal::Malformed)?;
    let (job, labels) = event.workflow_job.map(|job| (job.id, job.labels)).unzip();
    Ok(Some(Hint { repository, job, labels: labels.unwrap_or_default() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    // GitHub's published example: "Validating webhook deliveries", section "Testing the webhook payload validation".
    const SECRET: &str = "It's a Secret to Everybody";
    const BODY: &[u8] = b"Hello, World!";
    const SIGNATURE: &[u8] = b"sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";

    #[test]
    fn the_published_vector_verifies() {
        assert_eq!(verify(&Secret::new(SECRET), Some(SIGNATURE), BODY), Ok(()));
    }

    #[test]
    fn everything_else_is_refused() {
        let secret = Secret::new(SECRET);
        assert_eq!(verify(&secret, None, BODY), Err(Refusal::Unsigned));
        let wrong: [(&Secret, &[u8], &[u8]); 6] = [
            (&secret, SIGNATURE, b"Hello, World?"),
            (&Secret::new("other"), SIGNATURE, BODY),
            (&Secret::new(""), SIGNATURE, BODY),
            (&secret, b"sha256=", BODY),
            (&secret, b"sha1=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17", BODY),
            (&secret, &SIGNATURE[..SIGNATURE.len() - 1], BODY),
        ];
        for (secret, signature, body) in wrong {
            assert_eq!(verify(secret, Some(signature), body), Err(Refusal::WrongSignature));
        }
    }

    #[test]
    fn a_body_without_a_repository_is_malformed() {
        for body in ["", "{}", r#"{"repository":{"full_name":"x y/z"}}"#, "[1"] {
            assert_eq!(read(Some(b"workflow_job"), body.as_bytes()), Err(Refusal::Malformed), "{body}");
        }
        for body in [
            r#"{"repository":{"full_name":"acme/web"},"workflow_job":{"id":-1}}"#,
            r#"{"repository":{"full_name":"a/b"},"workflow_job":{}}"#,
        ] {
            assert_eq!(read(None, body.as_bytes()), Err(Refusal::Malformed), "{body}");
        }
        let hint = read(None, br#"{"repository":{"full_name":"acme/web"},"action":"queued","workflow_job":{"id":7,"labels":["linux"]}}"#);
        assert_eq!(hint.map(|hint| hint.map(|hint| (hint.job, hint.labels))), Ok(Some((Some(7), vec!["linux".to_owned()]))));
        assert_eq!(read(Some(b"ping"), br#"{"zen":"..."}"#), Ok(None));
    }
}
