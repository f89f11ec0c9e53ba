//! Where a job's OIDC tokens come from: its forge, by the right to ask that the hook handed over, or the operator.
//!
//! Source: docs.github.com, "OpenID Connect reference", on `ACTIONS_ID_TOKEN_REQUEST_URL` and `ACTIONS_ID_TOKEN_REQUEST_TOKEN`.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use ureq::Agent;
use ureq::tls::{Certificate, PemItem, parse_pem};

use super::broker::Trouble;
use crate::http::agent;
use crate::operator::Client;

/// Deadline of one call.
const CALL: Duration = Duration::from_secs(10);
/// Longest answer, in bytes.
const MAX_ANSWER: u64 = 64 << 10;

/// Where a job's tokens come from.
pub(crate) enum Identity {
    /// Its forge.
    Forge(HandedOver),
    /// The operator, which knows the pod.
    Operator(Arc<Client>),
}

impl Identity {
    /// A token of the job for this audience.
    pub(crate) fn token_for(&self, audience: &str) -> Result<String, Trouble> {
        match self {
            Self::Forge(handed) => handed.token_for(audience).map_err(Trouble::Passing),
            Self::Operator(client) => client.id_token(audience),
        }
    }
}

/// What the hook handed over.
pub(crate) struct HandedOver {
    agent: Agent,
    url: String,
    token: String,
}

impl fmt::Debug for HandedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HandedOver")
    }
}

impl HandedOver {
    /// Reads two lines, the URL and the token. `authorities` (PEM) are trusted beside the public ones.
    pub(crate) fn read(handed: &[u8], authorities: &str) -> Result<Self, String> {
        let text = std::str::from_utf8(handed).map_err(|_| "the job's identity is no text")?;
        let mut lines = text.lines();
        let (Some(url), Some(token), None) = (lines.next(), lines.next(), lines.next()) else {
            return Err("the job's identity is not a URL and a token".to_owned());
        };
        let plain = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        if !(url.starts_with("https://") || url.starts_with("http://")) || !plain(url) || !plain(token) {
            return Err("the job's identity is not a URL and a token".to_owned());
        }
        let mut roots: Vec<Certificate<'static>> =
            webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter().map(|root| Certificate::from_der(root).to_owned()).collect();
        for item in parse_pem(authorities.as_bytes()) {
            if let PemItem::Certificate(authority) = item.map_err(|error| format!("the forge's authorities: {error}"))? {
                roots.push(authority);
            }
        }
        Ok(Self { agent: agent(roots, CALL, false), url: url.to_owned(), token: token.to_owned() })
    }

    /// A token of the job for this audience. No error says anything of what was handed over.
    pub(super) fn token_for(&self, audience: &str) -> Result<String, String> {
        #[derive(Deserialize)]
        struct Answer {
            value: String,
        }
        let joint = if self.url.contains('?') { '&' } else { '?' };
        let query = form_urlencoded::Serializer::new(String::new()).append_pair("audience", audience).finish();
        let request = self.agent.get(format!("{}{joint}{query}", self.url)).header("Authorization", format!("Bearer {}", self.token));
        let mut answer = request.call().map_err(|error| format!("the forge gives no token: {}", without_address(&error)))?;
        let status = answer.status().as_u16();
        let body = answer.body_mut().with_config().limit(MAX_ANSWER).read_to_vec().map_err(|error| error.to_string())?;
        match (status, serde_json::from_slice::<Answer>(&body)) {
            (200, Ok(answer)) => Ok(answer.value),
            (200, Err(_)) => Err("the forge's answer holds no token".to_owned()),
            (status, _) => Err(format!("the forge gives no token: HTTP {status}")),
        }
    }
}

/// Errors of a client may quote the address, which is part of the identity.
fn without_address(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Io(error) => error.kind().to_string(),
        ureq::Error::Timeout(_) => "it does not answer in time".to_owned(),
        ureq::Error::HostNotFound => "its host is not known".to_owned(),
        ureq::Error::Tls(why) => (*why).to_owned(),
        ureq::Error::Rustls(error) => error.to_string(),
        _ => "it cannot be asked".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_two_plain_lines_and_is_not_shown() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let identity = HandedOver::read(b"https://forge.example/x?v=1\nhunter2\n", "").expect("read");
        assert_eq!((identity.url.as_str(), identity.token.as_str()), ("https://forge.example/x?v=1", "hunter2"));
        assert!(!format!("{identity:?}").contains("hunter2"));
        for bad in [
            &b""[..],
            b"\n\n",
            b"https://forge.example/\n",
            b"https://forge.example/\n\n",
            b"ftp://forge.example/\ntoken\n",
            b"https://forge.example/\ntoken\nmore\n",
            b"https://forge.example/ x\ntoken\n",
            b"https://forge.example/\ntok en\n",
            b"https://forge.example/\n\xff\xff\n",
        ] {
            let error = HandedOver::read(bad, "").expect_err("refused");
            assert!(!error.contains("forge.example"), "{error}");
        }
        assert!(HandedOver::read(b"https://forge.example/\ntoken\n", "-----BEGIN CERTIFICATE-----\nAAA\n").is_err());
    }
}
