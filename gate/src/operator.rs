//! The gate's side of the operator's gate API.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ureq::Agent;
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};

/// Longer than the operator keeps a question open.
const CALL_TIMEOUT: Duration = Duration::from_secs(70);
/// Longest registration taken, in bytes.
const MAX_REGISTRATION: u64 = 64 << 10;
/// First and longest pause after a call that failed.
const PAUSE_FIRST: Duration = Duration::from_millis(50);
const PAUSE_LONGEST: Duration = Duration::from_secs(5);

/// A client of the gate API.
pub(crate) struct Client {
    agent: Agent,
    url: String,
    token_file: PathBuf,
}

/// What one call brought.
enum Answer {
    Registration(Vec<u8>),
    NotYet,
    Never(String),
    Again(String),
}

impl Client {
    /// `authority` (PEM) is the only one trusted.
    pub(crate) fn new(url: &str, authority: &str, token_file: &Path) -> Result<Self, String> {
        let authority = Certificate::from_pem(authority.as_bytes()).map_err(|error| format!("the operator's authority: {error}"))?;
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .root_certs(RootCerts::Specific(Arc::new(vec![authority])))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .build();
        let agent = Agent::config_builder()
            .tls_config(tls)
            .https_only(true)
            .proxy(None)
            .max_redirects(0)
            .timeout_connect(Some(Duration::from_secs(3)))
            .timeout_global(Some(CALL_TIMEOUT))
            .http_status_as_error(false)
            .build()
            .new_agent();
        Ok(Self { agent, url: format!("{}/v1/registration", url.trim_end_matches('/')), token_file: token_file.to_owned() })
    }

    /// Asks until there is a registration.
    ///
    /// # Errors
    /// When the operator says that this pod will never get one.
    pub(crate) fn registration(&self) -> Result<Vec<u8>, String> {
        let mut pause = PAUSE_FIRST;
        loop {
            match self.ask() {
                Answer::Registration(registration) => return Ok(registration),
                Answer::Never(why) => return Err(why),
                Answer::NotYet => pause = PAUSE_FIRST,
                Answer::Again(why) => {
                    super::say(&format!("asking again: {why}"));
                    thread::sleep(pause);
                    pause = (pause * 2).min(PAUSE_LONGEST);
                }
            }
        }
    }

    fn ask(&self) -> Answer {
        let token = match fs::read_to_string(&self.token_file) {
            Ok(token) => token,
            Err(error) => return Answer::Again(format!("{}: {error}", self.token_file.display())),
        };
        let call = self.agent.post(&self.url).header("Authorization", format!("Bearer {}", token.trim())).send_empty();
        let mut answer = match call {
            Ok(answer) => answer,
            Err(error) => return Answer::Again(error.to_string()),
        };
        let status = answer.status().as_u16();
        let body = answer.body_mut().with_config().limit(MAX_REGISTRATION).read_to_vec();
        match (status, body) {
            (204, _) => Answer::NotYet,
            (200, Ok(body)) if !body.is_empty() => Answer::Registration(body),
            // The registration is made, and this was its one delivery.
            (200, _) => Answer::Never("the registration did not arrive whole".to_owned()),
            (401 | 410, body) => Answer::Never(String::from_utf8_lossy(&body.unwrap_or_default()).into_owned()),
            (code, _) => Answer::Again(format!("HTTP {code}")),
        }
    }
}
