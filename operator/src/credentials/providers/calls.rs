//! Calls to providers that speak JSON: tried again where that may help, and errors that hold nothing of what was sent.

use std::time::Duration;

use http::{Method, StatusCode, header};
use serde::Deserialize;
use serde_json::Value;
use tokio::time::sleep;

use super::super::http::{CallError, Http};
use super::ProviderError;

/// Longest answer, in bytes.
const MAX_ANSWER: usize = 64 << 10;
/// Tries of one call.
const TRIES: u32 = 3;
/// Longest pause before the second try, in milliseconds; twice as long before the next. How much of it is waited, chance says.
const PAUSE: u64 = 200;

/// A client for calls.
#[derive(Clone)]
pub(super) struct Calls(pub(super) Http);

/// A call, which can be made more than once.
pub(super) struct Call<'a> {
    /// Who is asked, for errors.
    pub(super) who: &'static str,
    pub(super) method: Method,
    pub(super) url: &'a str,
    pub(super) headers: &'a [(&'static str, &'a str)],
    pub(super) body: Body<'a>,
}

/// What is sent.
pub(super) enum Body<'a> {
    Form(&'a [(&'a str, &'a str)]),
    Json(Value),
    Nothing,
}

impl Body<'_> {
    fn bytes(&self) -> (Option<&'static str>, Vec<u8>) {
        match self {
            Self::Form(pairs) => {
                let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(*pairs).finish();
                (Some("application/x-www-form-urlencoded"), body.into_bytes())
            }
            Self::Json(value) => (Some("application/json"), value.to_string().into_bytes()),
            Self::Nothing => (None, Vec::new()),
        }
    }
}

impl Call<'_> {
    fn request(&self) -> Result<http::Request<Vec<u8>>, ProviderError> {
        let (kind, body) = self.body.bytes();
        let mut request = http::Request::builder().method(&self.method).uri(self.url).header(header::ACCEPT, "application/json");
        if let Some(kind) = kind {
            request = request.header(header::CONTENT_TYPE, kind);
        }
        for (name, value) in self.headers {
            request = request.header(*name, *value);
        }
        // The error would quote what was given.
        request.body(body).map_err(|_| ProviderError::Refused("the request cannot be made: the binding's values do not fit".to_owned()))
    }
}

impl Calls {
    /// Makes a call and reads its answer; an answer without a body is `null`. Tried again, three times in all, are connections that
    /// broke, 429, and errors of the server.
    pub(super) async fn make(&self, call: &Call<'_>) -> Result<Value, ProviderError> {
        let mut tried = 1;
        loop {
            match self.once(call).await {
                Err(ProviderError::Unavailable(_)) if tried < TRIES => {
                    sleep(Duration::from_millis(rand::random_range(0..PAUSE << (tried - 1)))).await;
                    tried += 1;
                }
                ended => return ended,
            }
        }
    }

    async fn once(&self, call: &Call<'_>) -> Result<Value, ProviderError> {
        let who = call.who;
        let answer = self.0.send(call.request()?, MAX_ANSWER).await.map_err(|error| match error {
            CallError::Refused(why) => ProviderError::Refused(why),
            CallError::Failed(why) => ProviderError::Unavailable(why),
        })?;
        let (status, body) = (answer.status(), answer.body());
        match status {
            StatusCode::NO_CONTENT => Ok(Value::Null),
            // Of what cannot be read nothing is quoted: it may be a credential.
            StatusCode::OK | StatusCode::CREATED => serde_json::from_slice(body)
                .map_err(|_| ProviderError::Unavailable(format!("{who} answers {} and something that is not understood", status.as_u16()))),
            _ => {
                let what = format!("{who} answers {}{}", status.as_u16(), code(body));
                match status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
                    true => Err(ProviderError::Unavailable(what)),
                    false => Err(ProviderError::Refused(what)),
                }
            }
        }
    }
}

/// Reads what is needed of an answer. The message of an error would quote it, so that there is none.
pub(super) fn read<T: for<'a> Deserialize<'a>>(who: &str, answer: Value) -> Result<T, ProviderError> {
    serde_json::from_value(answer).map_err(|_| ProviderError::Unavailable(format!("the answer of {who} holds no credential")))
}

/// The code of an error, by which it is found in the provider's documentation: OAuth's, those of Google's APIs, those of Microsoft Entra.
/// Messages are left out, as they may quote the token's claims.
fn code(body: &[u8]) -> String {
    let Ok(body) = serde_json::from_slice::<Value>(body) else { return String::new() };
    let status = body["error"].as_str().or_else(|| body["error"]["status"].as_str()).unwrap_or_default();
    let plain: String = status.chars().filter(|letter| letter.is_ascii_alphanumeric() || *letter == '_').take(64).collect();
    let entra = body["error_codes"][0].as_u64().map(|number| format!(" AADSTS{number}"));
    [Some(plain).filter(|plain| !plain.is_empty()).map(|plain| format!(" {plain}")), entra].into_iter().flatten().collect()
}
