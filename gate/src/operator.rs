//! The gate's side of the operator's gate API.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use mayfly_proof::{Challenge, Look, Looked, Report};
use ureq::Agent;
use ureq::tls::Certificate;

use crate::credentials::Trouble;
use crate::http::agent;

/// Longer than the operator keeps a question open.
const CALL_TIMEOUT: Duration = Duration::from_secs(70);
/// Header of a registration whose job gets OIDC tokens of the operator.
const ID_TOKENS: &str = "mayfly-id-tokens";
/// Longest answer taken, in bytes.
const MAX_ANSWER: u64 = 64 << 10;
/// First and longest pause after a call that failed.
const PAUSE_FIRST: Duration = Duration::from_millis(50);
const PAUSE_LONGEST: Duration = Duration::from_secs(5);

/// A client of the gate API. Every method asks until there is an answer, and fails when the operator wants nothing more of this pod.
pub(crate) struct Client {
    agent: Agent,
    url: String,
    token_file: PathBuf,
}

/// The answer to the question for a registration.
pub(crate) enum Registration {
    /// Here it is.
    Here(Handed),
    /// There is no job yet.
    NotYet,
    /// The last proof is too old, or not of today's policies.
    Unproved,
}

/// What came of the question.
pub(crate) struct Handed {
    /// As the runner program reads it.
    pub(crate) registration: Vec<u8>,
    /// The job gets OIDC tokens of the operator: see [`Client::id_token`].
    pub(crate) id_tokens: bool,
}

/// Whether a report was taken.
pub(crate) enum Taken {
    /// It was.
    Yes,
    /// It answers a challenge that is no longer of interest.
    Stale,
}

/// What one call brought.
struct Answer {
    status: u16,
    id_tokens: bool,
    body: Vec<u8>,
}

impl Client {
    /// `authority` (PEM) is the only one trusted.
    pub(crate) fn new(url: &str, authority: &str, token_file: &Path) -> Result<Self, String> {
        let authority = Certificate::from_pem(authority.as_bytes()).map_err(|error| format!("the operator's authority: {error}"))?;
        Ok(Self {
            agent: agent(vec![authority], CALL_TIMEOUT, true),
            url: url.trim_end_matches('/').to_owned(),
            token_file: token_file.to_owned(),
        })
    }

    /// What is to be proved.
    pub(crate) fn challenge(&self) -> Result<Challenge, String> {
        self.until("/v1/challenge", &[], |answer| match answer.status {
            200 => Ok(serde_json::from_slice(&answer.body).map_err(|error| format!("the challenge cannot be read: {error}"))?),
            _ => Err(answer.again()),
        })
    }

    /// What was found.
    pub(crate) fn report(&self, report: &Report) -> Result<Taken, String> {
        let body = serde_json::to_vec(report).map_err(|error| error.to_string())?;
        self.until("/v1/proof", &body, |answer| match answer.status {
            204 => Ok(Taken::Yes),
            409 => Ok(Taken::Stale),
            _ => Err(answer.again()),
        })
    }

    /// The registration. It is delivered once: one that does not arrive whole is lost.
    pub(crate) fn registration(&self) -> Result<Registration, String> {
        let found = self.until("/v1/registration", &[], |answer| match answer.status {
            200 => Ok(Registration::Here(Handed { registration: std::mem::take(&mut answer.body), id_tokens: answer.id_tokens })),
            204 => Ok(Registration::NotYet),
            428 => Ok(Registration::Unproved),
            _ => Err(answer.again()),
        })?;
        match found {
            Registration::Here(handed) if handed.registration.is_empty() => Err("the registration did not arrive whole".to_owned()),
            other => Ok(other),
        }
    }

    /// The job that the runner has, in words, once the pool has accepted it.
    pub(crate) fn job(&self) -> Result<Vec<u8>, String> {
        loop {
            let job = self.until("/v1/job", &[], |answer| match answer.status {
                200 => Ok(Some(std::mem::take(&mut answer.body))),
                204 => Ok(None),
                _ => Err(answer.again()),
            })?;
            if let Some(job) = job {
                return Ok(job);
            }
        }
    }

    /// The runner's program has ended.
    pub(crate) fn ended(&self) -> Result<(), String> {
        self.until("/v1/ended", &[], |answer| match answer.status {
            204 => Ok(()),
            _ => Err(answer.again()),
        })
    }

    /// An OIDC token of the pod's job for this audience. Asks once.
    pub(crate) fn id_token(&self, audience: &str) -> Result<String, Trouble> {
        let body = serde_json::json!({"audience": audience}).to_string();
        let away = |error: String| Trouble::Passing(format!("the operator cannot be asked for a token: {error}"));
        let answer = self.call("/v1/id-token", body.as_bytes()).map_err(away)?;
        match answer.status {
            200 => String::from_utf8(answer.body).map_err(|_| away("its answer is no text".to_owned())),
            400 | 401 | 403 | 410 => {
                Err(Trouble::Denied(format!("the operator gives no token: {}", String::from_utf8_lossy(&answer.body))))
            }
            _ => Err(away(answer.again())),
        }
    }

    /// For a sentinel: tells what was found, and asks once what to try next. `None`: nothing for now.
    pub(crate) fn control(&self, found: Option<&Looked>) -> Result<Option<Look>, String> {
        let body = found.map(serde_json::to_vec).transpose().map_err(|error| error.to_string())?.unwrap_or_default();
        let answer = self.call("/v1/control", &body)?;
        match answer.status {
            200 => serde_json::from_slice(&answer.body).map(Some).map_err(|error| format!("the question cannot be read: {error}")),
            204 => Ok(None),
            _ => Err(format!("/v1/control: {}", answer.again())),
        }
    }

    /// Calls until `read` makes something of the answer.
    fn until<T>(&self, path: &str, body: &[u8], mut read: impl FnMut(&mut Answer) -> Result<T, String>) -> Result<T, String> {
        let mut pause = PAUSE_FIRST;
        loop {
            let why = match self.call(path, body) {
                Ok(Answer { status: 401 | 410, body, .. }) => return Err(format!("{path}: {}", String::from_utf8_lossy(&body))),
                Ok(mut answer) => match read(&mut answer) {
                    Ok(found) => return Ok(found),
                    Err(why) => why,
                },
                Err(why) => why,
            };
            super::say(&format!("{path}: asking again: {why}"));
            thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_LONGEST);
        }
    }

    fn call(&self, path: &str, body: &[u8]) -> Result<Answer, String> {
        let token = fs::read_to_string(&self.token_file).map_err(|error| format!("{}: {error}", self.token_file.display()))?;
        let request = self.agent.post(format!("{}{path}", self.url)).header("Authorization", format!("Bearer {}", token.trim()));
        let mut answer = match body.is_empty() {
            true => request.send_empty(),
            false => request.header("Content-Type", "application/json").send(body),
        }
        .map_err(|error| error.to_string())?;
        let status = answer.status().as_u16();
        let id_tokens = answer.headers().contains_key(ID_TOKENS);
        let body = answer.body_mut().with_config().limit(MAX_ANSWER).read_to_vec();
        match body {
            Ok(body) => Ok(Answer { status, id_tokens, body }),
            // Whatever was to be delivered once is gone.
            Err(_) if status == 200 => Ok(Answer { status, id_tokens, body: Vec::new() }),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl Answer {
    fn again(&self) -> String {
        format!("HTTP {}", self.status)
    }
}
