//! The runner's side of OAuth, broker and run service.

use std::fmt;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::{Value, json};
use ureq::Agent;
use ureq::http::Request;

use super::job::Outcome;
use crate::keys::{RsaKey, RsaNumbers, uuid};

/// Longer than a poll stays open.
const CALL_TIMEOUT: Duration = Duration::from_secs(100);
const VERSION: &str = concat!("2.335.0-stand-in-", env!("CARGO_PKG_VERSION"));

/// What a JIT configuration holds.
pub(crate) struct Registration {
    /// The runner's number.
    pub(crate) id: String,
    /// Its name.
    pub(crate) name: String,
    /// The folder it works in.
    pub(crate) work_folder: String,
    server: String,
    client_id: String,
    authorization: String,
    key: RsaKey,
}

impl Registration {
    /// Takes a configuration apart: base64 of JSON with three files in base64.
    pub(crate) fn parse(configuration: &str) -> Result<Self> {
        let files: Value = serde_json::from_slice(&STANDARD.decode(configuration.trim()).context("it is not base64")?)?;
        let file = |name: &str| -> Result<Value> {
            let text = files[name].as_str().with_context(|| format!("it has no {name}"))?;
            Ok(serde_json::from_slice(&STANDARD.decode(text)?)?)
        };
        let (runner, credentials) = (file(".runner")?, file(".credentials")?);
        let text = |value: &Value, name: &str| match &value[name] {
            Value::String(text) => Ok(text.clone()),
            Value::Number(number) => Ok(number.to_string()),
            _ => Err(anyhow::anyhow!("{name} is missing")),
        };
        let data = &credentials["Data"];
        Ok(Self {
            id: text(&runner, "AgentId")?,
            name: text(&runner, "AgentName")?,
            work_folder: text(&runner, "WorkFolder")?,
            server: text(&runner, "ServerUrlV2")?.trim_end_matches('/').to_owned(),
            client_id: text(data, "clientId")?,
            authorization: text(data, "authorizationUrl")?,
            key: RsaKey::from_numbers(RsaNumbers::from_parameters(&file(".credentials_rsaparams")?)?)?,
        })
    }
}

/// Why it does not go on.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The forge does not know this runner, or does not want it.
    Refused(String),
    /// Another one has the session.
    Conflict,
    /// The forge wants a newer one.
    Deprecated,
    /// There is no sensible answer.
    Unreachable(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(why) => write!(f, "the runner registration is of no use: {why}"),
            Self::Conflict => f.write_str("a session for this runner already exists"),
            Self::Deprecated => f.write_str("this version of the runner is deprecated"),
            Self::Unreachable(why) => write!(f, "the forge does not answer: {why}"),
        }
    }
}

/// What the broker says.
pub(crate) enum Message {
    /// There is a job.
    Job(Value),
    /// The job is cancelled.
    Cancel,
}

/// What is needed to speak about a job.
pub(crate) struct Job {
    service: String,
    token: String,
    plan: String,
    id: String,
    results: String,
    /// How long it is this runner's without renewal.
    pub(crate) lock: Duration,
    /// The message with everything else.
    pub(crate) message: Value,
}

impl Job {
    pub(crate) fn new(request: &Value, message: &Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let endpoint = &message["resources"]["endpoints"][0];
        Self {
            service: text(&request["run_service_url"]),
            token: text(&endpoint["authorization"]["parameters"]["AccessToken"]),
            plan: text(&message["plan"]["planId"]),
            id: text(&message["jobId"]),
            results: text(&endpoint["data"]["ResultsServiceUrl"]),
            lock: until(&message["lockedUntil"]),
            message: message.clone(),
        }
    }

    /// URL and token for OIDC tokens, where the job may ask for them.
    pub(crate) fn id_token(&self) -> Option<(&str, &str)> {
        let url = self.message["resources"]["endpoints"][0]["data"]["GenerateIdTokenUrl"].as_str()?;
        Some((url, &self.token))
    }
}

fn until(time: &Value) -> Duration {
    let left = time.as_str().and_then(|text| text.parse::<Timestamp>().ok()).map(|time| time.duration_since(Timestamp::now()));
    left.and_then(|left| Duration::try_from(left).ok()).unwrap_or(Duration::from_secs(60))
}

struct Answer {
    status: u16,
    text: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_default()
    }

    fn failure(&self) -> Failure {
        let body = self.json();
        let told = body["errorMessage"].as_str().or(body["error_description"].as_str()).unwrap_or(&self.text).to_owned();
        match (self.status, body["errorKind"].as_str()) {
            (_, Some("RunnerVersionTooOld")) => Failure::Deprecated,
            (409, _) => Failure::Conflict,
            (429 | 500.., _) => Failure::Unreachable(format!("{} {told}", self.status)),
            _ => Failure::Refused(format!("{} {told}", self.status)),
        }
    }
}

/// The forge.
pub(crate) struct Forge {
    agent: Agent,
    /// Who this runner is.
    pub(crate) registration: Registration,
    token: Mutex<String>,
}

impl Forge {
    pub(crate) fn new(registration: Registration, authorities: &[u8]) -> Self {
        Self { agent: crate::http::agent(authorities, CALL_TIMEOUT), registration, token: Mutex::default() }
    }

    fn send(&self, method: &str, url: &str, token: &str, kind: &str, body: Vec<u8>) -> Result<Answer, Failure> {
        let unreachable = |error: &dyn fmt::Display| Failure::Unreachable(error.to_string());
        let mut request = Request::builder()
            .method(method)
            .uri(url)
            .header("content-type", kind)
            .header("accept", "application/json")
            .header("user-agent", format!("GitHubActionsRunner-linux/{VERSION}"));
        if !token.is_empty() {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request.body(body).map_err(|error| unreachable(&error))?;
        let mut response = self.agent.run(request).map_err(|error| unreachable(&error))?;
        let text = response.body_mut().read_to_string().map_err(|error| unreachable(&error))?;
        Ok(Answer { status: response.status().as_u16(), text })
    }

    /// A call to the broker, with a new token where the old one has ended.
    fn broker(&self, method: &str, path: &str, body: &Value) -> Result<Answer, Failure> {
        let url = format!("{}/{path}", self.registration.server);
        let call = || {
            let token = self.token.lock().unwrap_or_else(PoisonError::into_inner).clone();
            self.send(method, &url, &token, "application/json", body.to_string().into_bytes())
        };
        let answer = call()?;
        if answer.status != 401 {
            return Ok(answer);
        }
        self.sign_in()?;
        call()
    }

    /// Gets a token for the runner's key (RFC 7523).
    pub(crate) fn sign_in(&self) -> Result<(), Failure> {
        let of = &self.registration;
        let now = Timestamp::now().as_second();
        let claims = json!({
            "iss": of.client_id, "sub": of.client_id, "aud": of.authorization, "jti": uuid(), "nbf": now - 30, "iat": now, "exp": now + 300,
        });
        let assertion = of.key.sign(&claims).map_err(|error| Failure::Refused(error.to_string()))?;
        let form = form_urlencoded::Serializer::new(String::new())
            .append_pair("grant_type", "client_credentials")
            .append_pair("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer")
            .append_pair("client_assertion", &assertion)
            .finish();
        let answer = self.send("POST", &of.authorization, "", "application/x-www-form-urlencoded", form.into_bytes())?;
        let token = answer.json()["access_token"].as_str().map(str::to_owned);
        let token = token.filter(|_| answer.status == 200).ok_or_else(|| answer.failure())?;
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = token;
        Ok(())
    }

    pub(crate) fn open_session(&self) -> Result<String, Failure> {
        let body = json!({
            "sessionId": "00000000-0000-0000-0000-000000000000", "ownerName": format!("{} (PID: {})", self.registration.name, std::process::id()),
            "agent": {"id": self.registration.id, "name": self.registration.name, "version": VERSION, "osDescription": "Linux"},
            "useFipsEncryption": false,
        });
        let answer = self.broker("POST", "session", &body)?;
        let session = answer.json()["sessionId"].as_str().map(str::to_owned);
        session.filter(|_| answer.status == 200).ok_or_else(|| answer.failure())
    }

    pub(crate) fn close_session(&self) -> Result<(), Failure> {
        self.broker("DELETE", "session", &Value::Null).map(drop)
    }

    /// Waits for a message.
    pub(crate) fn message(&self, session: &str, status: &str) -> Result<Option<Message>, Failure> {
        let path = format!("message?{}&disableUpdate=true", Self::about(session, status));
        let answer = self.broker("GET", &path, &Value::Null)?;
        if answer.status == 202 || answer.status == 200 && answer.text.is_empty() {
            return Ok(None);
        }
        if answer.status != 200 {
            return Err(answer.failure());
        }
        let message = answer.json();
        match message["messageType"].as_str() {
            Some("RunnerJobRequest") => {
                Ok(Some(Message::Job(serde_json::from_str(message["body"].as_str().unwrap_or_default()).unwrap_or_default())))
            }
            Some("JobCancellation") => Ok(Some(Message::Cancel)),
            _ => Ok(None),
        }
    }

    fn about(session: &str, status: &str) -> String {
        let architecture = if cfg!(target_arch = "aarch64") { "ARM64" } else { "X64" };
        format!("sessionId={session}&status={status}&runnerVersion={VERSION}&os=linux&architecture={architecture}")
    }

    pub(crate) fn acknowledge(&self, session: &str, request: &Value) -> Result<(), Failure> {
        if request["should_acknowledge"] != true {
            return Ok(());
        }
        let path = format!("acknowledge?{}", Self::about(session, "Online"));
        self.broker("POST", &path, &json!({"runnerRequestId": request["runner_request_id"]})).map(drop)
    }

    /// Takes the job; nothing when it is gone.
    pub(crate) fn acquire(&self, request: &Value) -> Result<Option<Value>, Failure> {
        let url = format!("{}acquirejob", request["run_service_url"].as_str().unwrap_or_default());
        let body =
            json!({"jobMessageId": request["runner_request_id"], "runnerOS": "Linux", "billingOwnerId": request["billing_owner_id"]});
        let token = self.token.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let answer = self.send("POST", &url, &token, "application/json", body.to_string().into_bytes())?;
        match answer.status {
            200 => Ok(Some(answer.json())),
            404 | 409 | 422 => Ok(None),
            _ => Err(answer.failure()),
        }
    }

    fn run_service(&self, job: &Job, call: &str, body: &Value) -> Result<Answer, Failure> {
        let answer = self.send("POST", &format!("{}{call}", job.service), &job.token, "application/json", body.to_string().into_bytes())?;
        if answer.status == 200 { Ok(answer) } else { Err(answer.failure()) }
    }

    /// Keeps the job; answers for how long.
    pub(crate) fn renew(&self, job: &Job) -> Result<Duration, Failure> {
        let answer = self.run_service(job, "renewjob", &json!({"planId": job.plan, "jobId": job.id}))?;
        Ok(until(&answer.json()["lockedUntil"]))
    }

    /// Says how the job ended.
    pub(crate) fn complete(&self, job: &Job, outcome: &Outcome) -> Result<(), Failure> {
        let body = json!({
            "planId": job.plan, "jobId": job.id, "conclusion": outcome.conclusion, "stepResults": outcome.steps,
            "outputs": outcome.outputs.iter().map(|(name, value)| (name.clone(), json!({"value": value}))).collect::<serde_json::Map<_, _>>(),
            "annotations": [], "telemetry": [],
        });
        self.run_service(job, "completejob", &body).map(drop)
    }

    pub(crate) fn send_log(&self, job: &Job, text: &str) -> Result<(), Failure> {
        let url = format!("{}logs", job.results);
        self.send("POST", &url, &job.token, "text/plain", text.as_bytes().to_vec()).map(drop)
    }
}
