//! An API server that says what a test wrote down for it, one answer a call, and remembers what it was asked. For answers that the
//! real one of the end-to-end tests does not give on request: refusals, silence, trouble.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use axum::http::{Request, Response};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};

/// What was asked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Call {
    /// Method and path, without the query.
    pub(crate) what: String,
    /// `Content-Type`.
    pub(crate) content: String,
    /// The body; null where there was none.
    pub(crate) body: Value,
}

/// What is answered.
pub(crate) enum Answer {
    /// 200 with this object.
    Object(Value),
    /// This status code with this reason.
    Refusal(u16, &'static str),
    /// This status code with plain text, as for a path that there is not.
    Text(u16, &'static str),
    /// Nothing, for ever.
    Silence,
}

#[derive(Default)]
struct Script {
    answers: VecDeque<Answer>,
    calls: Vec<Call>,
}

/// The server. A call that the script has no answer for gets 500.
#[derive(Clone, Default)]
pub(crate) struct Server(Arc<Mutex<Script>>);

impl Server {
    /// Gives these answers, in this order.
    pub(crate) fn new(answers: impl IntoIterator<Item = Answer>) -> Self {
        let server = Self::default();
        server.script(|script| script.answers = answers.into_iter().collect());
        server
    }

    /// A client of it.
    pub(crate) fn client(&self) -> Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let server = server.clone();
            async move { Ok::<_, Infallible>(server.answer(request).await) }
        });
        Client::new(service, "default")
    }

    /// What was asked so far.
    pub(crate) fn calls(&self) -> Vec<Call> {
        self.script(|script| script.calls.clone())
    }

    fn script<T>(&self, change: impl FnOnce(&mut Script) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn answer(&self, request: Request<Body>) -> Response<Body> {
        let (head, body) = request.into_parts();
        let bytes = body.collect_bytes().await.unwrap_or_default();
        let call = Call {
            what: format!("{} {}", head.method, head.uri.path()),
            content: head.headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned(),
            body: serde_json::from_slice(&bytes).unwrap_or_default(),
        };
        let answer = self.script(|script| {
            script.calls.push(call);
            script.answers.pop_front()
        });
        let (code, text) = match answer {
            Some(Answer::Object(object)) => (200, object.to_string()),
            Some(Answer::Refusal(code, reason)) => (code, status(code, reason).to_string()),
            Some(Answer::Text(code, text)) => (code, text.to_owned()),
            Some(Answer::Silence) => std::future::pending().await,
            None => (500, status(500, "NotInTheScript").to_string()),
        };
        let mut response = Response::new(Body::from(text.into_bytes()));
        *response.status_mut() = axum::http::StatusCode::from_u16(code).unwrap_or_default();
        response
    }
}

fn status(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": format!("scripted: {reason}")})
}
