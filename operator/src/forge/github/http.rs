//! One call to GitHub, and how what goes wrong is told. Nothing is repeated here: whoever asks knows whether asking again is harmless.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::header::{CONTENT_TYPE, HeaderMap, RETRY_AFTER};
use reqwest::{RequestBuilder, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::super::ForgeError;
use super::super::client::body;

/// Longest answer read, in bytes.
const MAX_ANSWER: usize = 8 << 20;
/// Longest that GitHub is left alone because it asked to be.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);
/// How long it is left alone where it does not say for how long.
const PAUSE: Duration = Duration::from_secs(60);

/// A call that went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum CallError {
    /// GitHub answered with an error.
    Refused {
        /// What was asked for.
        what: String,
        /// The status.
        status: StatusCode,
        /// The exception's name, as far as the answer has one. Never the message, which may quote the request.
        exception: String,
    },
    /// It did not answer, or not with what it should.
    Failed(ForgeError),
}

impl CallError {
    /// Whether GitHub answered with this status.
    pub(super) fn is(&self, wanted: StatusCode) -> bool {
        matches!(self, Self::Refused { status, .. } if *status == wanted)
    }

    /// Whether GitHub named this exception. Names are compared as a part: they come with and without their namespace.
    pub(super) fn names(&self, wanted: &str) -> bool {
        matches!(self, Self::Refused { exception, .. } if exception.contains(wanted))
    }
}

impl From<ForgeError> for CallError {
    fn from(error: ForgeError) -> Self {
        Self::Failed(error)
    }
}

impl From<CallError> for ForgeError {
    fn from(error: CallError) -> Self {
        let (what, status, exception) = match error {
            CallError::Refused { what, status, exception } => (what, status, exception),
            CallError::Failed(error) => return error,
        };
        let named = if exception.is_empty() { String::new() } else { format!(" ({exception})") };
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ForgeError::Unauthorized { what },
            StatusCode::NOT_FOUND => ForgeError::NotFound { what },
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                ForgeError::Unreachable(format!("HTTP {status}{named} for {what}"))
            }
            status => ForgeError::Unexpected(format!("HTTP {status}{named} for {what}")),
        }
    }
}

/// An answer that is no error.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) body: Vec<u8>,
}

impl Answer {
    /// The body as JSON. Some of the service's bodies begin with a byte order mark.
    pub(super) fn json<T: DeserializeOwned>(&self, what: &str) -> Result<T, CallError> {
        // serde's message can quote the body, which may hold a token: say where, not what.
        serde_json::from_slice(self.text()).map_err(|error| {
            let place = format!("{what}: not the expected JSON (line {}, column {})", error.line(), error.column());
            CallError::Failed(ForgeError::Unexpected(place))
        })
    }

    /// The body without a byte order mark.
    pub(super) fn text(&self) -> &[u8] {
        self.body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&self.body)
    }
}

/// Makes calls, unless GitHub asked for a pause.
#[derive(Debug, Default)]
pub(super) struct Caller {
    paused: Mutex<Option<Instant>>,
    scarce: AtomicBool,
}

impl Caller {
    /// Sends a request.
    pub(super) async fn send(&self, request: RequestBuilder, what: &str) -> Result<Answer, CallError> {
        if let Some(left) = self.pause_left() {
            let text = format!("GitHub asked to be left alone for another {} s", left.as_secs().max(1));
            return Err(ForgeError::Unreachable(text).into());
        }
        let mut answer = request.send().await.map_err(ForgeError::from)?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        let too_long = || ForgeError::Unexpected(format!("more than {MAX_ANSWER} bytes for {what}"));
        let body = body(&mut answer, MAX_ANSWER).await.map_err(ForgeError::from)?.ok_or_else(too_long)?;
        if let Some(scarce) = is_scarce(&headers) {
            self.scarce.store(scarce, Ordering::Relaxed);
        }
        if let Some(pause) = asks_for_pause(status, &headers) {
            *self.paused.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + pause);
            return Err(ForgeError::Unreachable(format!("GitHub limits its rate: no calls for {} s", pause.as_secs())).into());
        }
        let answer = Answer { status, body };
        match status.is_success() {
            true => Ok(answer),
            false => Err(CallError::Refused { what: what.to_owned(), status, exception: exception(&headers, answer.text()) }),
        }
    }

    /// Whether little is left of the calls that GitHub allows in an hour.
    pub(super) fn is_scarce(&self) -> bool {
        self.scarce.load(Ordering::Relaxed)
    }

    fn pause_left(&self) -> Option<Duration> {
        let until = (*self.paused.lock().unwrap_or_else(PoisonError::into_inner))?;
        until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }
}

/// Whether less than a fifth of the hour's calls is left; `None` where an answer does not say.
fn is_scarce(headers: &HeaderMap) -> Option<bool> {
    let number = |name: &str| headers.get(name)?.to_str().ok()?.trim().parse::<u64>().ok();
    // Registrations have a limit of their own.
    let core = headers.get("x-ratelimit-resource").is_none_or(|resource| resource == "core");
    let (limit, left) = (number("x-ratelimit-limit")?, number("x-ratelimit-remaining")?);
    core.then_some(left < limit / 5)
}

/// Primary and secondary rate limits (docs.github.com, "Rate limits for the REST API"): 429, or 403 with one of two headers.
fn asks_for_pause(status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    let seconds = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()?.trim().parse::<u64>().ok());
    let used_up = seconds("x-ratelimit-remaining") == Some(0);
    let after = seconds(RETRY_AFTER.as_str()).map(Duration::from_secs);
    let limited = match status {
        StatusCode::TOO_MANY_REQUESTS => true,
        StatusCode::FORBIDDEN => after.is_some() || used_up,
        StatusCode::SERVICE_UNAVAILABLE => after.is_some(),
        _ => false,
    };
    if !limited {
        return None;
    }
    let reset = || {
        let at = seconds("x-ratelimit-reset").filter(|_| used_up)?;
        Some(Duration::from_secs(at.saturating_sub(u64::try_from(jiff::Timestamp::now().as_second()).unwrap_or_default())))
    };
    Some(after.or_else(reset).unwrap_or(PAUSE).clamp(Duration::from_secs(1), LONGEST_PAUSE))
}

/// The name of the exception in an error's body.
fn exception(headers: &HeaderMap, body: &[u8]) -> String {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Exception {
        #[serde(default)]
        type_name: String,
    }
    if headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).is_some_and(|kind| kind.contains("text/plain")) {
        return String::new();
    }
    let found = serde_json::from_slice::<Exception>(body).map(|exception| exception.type_name).unwrap_or_default();
    // The last part of `Namespace.Name, Assembly`.
    let name = found.split(',').next().unwrap_or_default().rsplit('.').next().unwrap_or_default();
    name.chars().filter(char::is_ascii_alphanumeric).take(80).collect()
}

#[cfg(test)]
mod tests {
    use reqwest::header::{HeaderName, HeaderValue};

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn a_rate_limit_is_told_from_a_missing_permission() {
        let pause = |status: u16, pairs: &[(&'static str, &'static str)]| {
            asks_for_pause(StatusCode::from_u16(status).expect("a status"), &headers(pairs)).map(|pause| pause.as_secs())
        };
        assert_eq!(pause(403, &[]), None, "a permission is missing");
        assert_eq!(pause(403, &[("retry-after", "7")]), Some(7));
        assert_eq!(pause(403, &[("x-ratelimit-remaining", "0"), ("x-ratelimit-reset", "9999999999")]), Some(3600));
        assert_eq!(pause(403, &[("x-ratelimit-remaining", "12")]), None);
        assert_eq!(pause(429, &[]), Some(60));
        assert_eq!(pause(429, &[("retry-after", "0")]), Some(1));
        assert_eq!(pause(503, &[]), None);
        assert_eq!(pause(503, &[("retry-after", "5")]), Some(5));
        assert_eq!(pause(200, &[("x-ratelimit-remaining", "0")]), None);
    }

    #[test]
    fn calls_are_scarce_when_a_fifth_is_left() {
        let scarce = |limit: &'static str, left: &'static str, resource: &'static str| {
            is_scarce(&headers(&[("x-ratelimit-limit", limit), ("x-ratelimit-remaining", left), ("x-ratelimit-resource", resource)]))
        };
        assert_eq!((scarce("5000", "1000", "core"), scarce("5000", "999", "core")), (Some(false), Some(true)));
        assert_eq!((scarce("10000", "1", "actions_runner_registration"), is_scarce(&headers(&[]))), (None, None));
    }

    #[test]
    fn an_exception_is_known_by_its_name_with_or_without_a_namespace() {
        let json = headers(&[("content-type", "application/json")]);
        let name = |body: &str| exception(&json, body.as_bytes());
        assert_eq!(name(r#"{"typeName":"AgentExistsException","message":"m"}"#), "AgentExistsException");
        let long = r#"{"typeName":"GitHub.Actions.Runtime.WebApi.RunnerScaleSetSessionConflictException, GitHub.Actions.Runtime.WebApi"}"#;
        assert_eq!(name(long), "RunnerScaleSetSessionConflictException");
        assert_eq!(name("<html>"), "");
        assert_eq!(exception(&headers(&[("content-type", "text/plain; charset=utf-8")]), br#"{"typeName":"X"}"#), "");
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_the_json() {
        let answer = Answer { status: StatusCode::OK, body: b"\xef\xbb\xbf{\"a\":1}".to_vec() };
        assert_eq!(answer.json::<serde_json::Value>("x").expect("JSON"), serde_json::json!({"a": 1}));
    }
}
